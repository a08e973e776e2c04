"""langchain-tests' suite for chat models, over langchain-openai."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("langchain_openai")
pytest.importorskip("langchain_tests")
pytest.importorskip("pytest_asyncio")

from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

from tests.http.server import Server

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),  # langchain-openai keeps connections
    pytest.mark.filterwarnings("ignore:.*is marked with '@pytest.mark.asyncio'"),
]


class TestChatModel(ChatModelIntegrationTests):
    """Without images and the like, which the model cannot read."""

    @pytest.fixture(autouse=True)
    def _serve(self, obedient: Server) -> None:
        TestChatModel.url = f"{obedient.url}/v1"

    url = ""

    @property
    def chat_model_class(self) -> Any:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "demo", "base_url": self.url, "api_key": "none", "stream_usage": True}

    @property
    def supports_json_mode(self) -> bool:
        return True
