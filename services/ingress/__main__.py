"""`python -m nanovllm.services.ingress`."""

from nanovllm.service import service_command
from nanovllm.services.ingress.loop import serve

command = service_command("ingress", serve)

if __name__ == "__main__":
    command()
