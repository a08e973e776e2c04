"""The scheduler process: `python -m nanovllm.services.scheduler`."""

from nanovllm.service import service_command
from nanovllm.services.scheduler.loop import serve

if __name__ == "__main__":
    service_command("scheduler", serve, on_step_path=True)()
