import subprocess
import sys

import pytest

import nanovllm


@pytest.mark.parametrize("name", nanovllm.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(nanovllm, name) is not None
    assert name in dir(nanovllm)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Engine"):
        _ = nanovllm.Engine


def test_messages_import_no_client_and_clients_neither_torch_nor_the_launcher() -> None:
    check = (
        "import sys, nanovllm.messages\n"
        "assert not [name for name in sys.modules if name.startswith('nanovllm.client')]\n"
        "from nanovllm import LLM, SamplingParams, Client, AsyncClient\n"
        "import nanovllm.client.cli\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "assert not [name for name in sys.modules if name.startswith('nanovllm.launch')]\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "prompt_toolkit", "rich", "numpy", "nanovllm.launch")
    check = (
        "import sys\n"
        "from nanovllm.client.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        f"assert not set({heavy!r}) & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", check], check=True, stdout=subprocess.DEVNULL)
