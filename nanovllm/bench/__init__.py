"""`nanovllm bench`: loads a running pipeline, and measures what its clients see.

The core is arrivals (when), prompts (what), `Load` (which requests are sent, and what came when)
and figures. The core knows no socket and no clock: it is told the time. A loop (`run`) drives a
load with a client of the pipeline, which is anything that takes requests and yields the answers.
"""
