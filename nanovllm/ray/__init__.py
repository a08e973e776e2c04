"""A pipeline on a Ray cluster: `nanovllm-ray`. Ray places processes, and places them again.

Two kinds of actors run launchers, and nothing of Ray is in the services. The `Head` runs the
launcher of a pipeline without engines. An `Engine` runs a launcher that joins it with one engine.
"""
