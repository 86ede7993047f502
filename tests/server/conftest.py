"""Live servers, each in a thread of its own, and what talks to them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("llguidance")

import httpx
from openai import OpenAI

from tamis import LLM, AsyncLLM
from tamis.model import Model, load_model
from tamis.server.app import create_app
from tamis.server.process import DrainingServer, listening
from tamis.server.service import Service
from tamis.server.settings import Settings

NAME = "tiny"


@dataclass(frozen=True)
class Server:
    """A server that listens, seen from inside and outside."""

    service: Service
    url: str
    port: int

    @property
    def llm(self) -> AsyncLLM:
        return self.service.llm

    @property
    def openai(self) -> OpenAI:
        keys = self.service.settings.api_keys
        key = keys[0] if keys else "none"
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60)

    def complete(self, prompt: Any = "hello", **fields: Any) -> httpx.Response:
        """`POST /v1/completions`, greedy unless the fields say otherwise."""
        body = {"model": NAME, "prompt": prompt, "temperature": 0, **fields}
        with self.http as client:
            return client.post("/v1/completions", json=body)

    def wait_idle(self, timeout_s: float = 20) -> None:
        """Until no request is open and no page in use."""
        wait_for(lambda: self.llm.engine.idle and not self.service.admission.n_open, timeout_s)
        assert self.llm.engine.cache.bytes_in_use == 0


def wait_for(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.002)


Serve = Callable[..., Any]


@pytest.fixture(scope="session")
def tiny(tiny_dir: Callable[[str], Path]) -> Model:
    return load_model(tiny_dir("llama"), dtype="float32")


@pytest.fixture(scope="session")
def llm(tiny: Model) -> LLM:
    """The same model, alone: what a server must answer."""
    return LLM(tiny, kv_memory="16MiB")


@pytest.fixture(scope="session")
def serve(tiny: Model) -> Serve:
    """`with serve(engine={...}, max_body=...) as server`: a server with these settings."""

    @contextmanager
    def run(engine: dict[str, Any] | None = None, **settings: Any) -> Iterator[Server]:
        llm = AsyncLLM(tiny, **{"kv_memory": "16MiB", **(engine or {})})
        its = Settings(**{"name": NAME, "port": 0, **settings})
        app = create_app(llm, its)
        with listening(its) as listener:
            port = listener.getsockname()[1]
            server = DrainingServer(app, llm, app.state.service.admission, its)
            thread = threading.Thread(target=server.run, args=([listener],))
            thread.start()
            try:
                wait_for(lambda: server.started)
                yield Server(app.state.service, f"http://127.0.0.1:{port}", port)
            finally:
                server.should_exit = True
                thread.join(timeout=30)
                llm.close()
        assert not thread.is_alive()

    return run


@pytest.fixture(scope="session")
def server(serve: Serve) -> Iterator[Server]:
    """A server with nothing special."""
    with serve(allow_plans=("streamingllm(budget=32)",)) as running:
        yield running
