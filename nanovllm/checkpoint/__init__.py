"""What a Hugging Face checkpoint says of itself, read without torch.

Every service needs some of it: the launcher to refuse what cannot run, the ingress for the
vocabulary's size, the tokenizer for the end-of-sequence ids, the worker for the shapes.
"""

from nanovllm.checkpoint.config import FAMILIES, ModelConfig
from nanovllm.checkpoint.files import CheckpointError
from nanovllm.checkpoint.locate import DEMO_CHECKPOINT, model_name, resolve_model

__all__ = [
    "DEMO_CHECKPOINT",
    "FAMILIES",
    "CheckpointError",
    "ModelConfig",
    "model_name",
    "resolve_model",
]
