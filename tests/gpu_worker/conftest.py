import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> None:
    """The models are tiny: more threads would only wait for one another."""
    torch.set_num_threads(1)
