"""Many clients at once: everyone is answered, and memory does not grow."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tamis import LLM, SamplingParams
from tests.server.conftest import NAME, Serve
from tests.server.test_process import Start, start

__all__ = ["start"]  # a fixture

CLIENTS = 200


def client(url: str, seed: int, stop: threading.Event, seen: list[str], once: bool) -> None:
    """Send request after request: plain, streamed, left early, wrong."""
    choices = random.Random(seed)
    with httpx.Client(base_url=url, timeout=60) as http:
        while not stop.is_set():
            prompt = "x" * choices.randrange(1, 200)
            body: dict[str, Any] = {"model": NAME, "prompt": prompt, "max_tokens": 8}
            kind = choices.choice(["plain", "streamed", "left", "wrong"])
            if kind == "wrong":
                body["temperature"] = 9
            if kind in ("streamed", "left"):
                body["stream"] = True
                with http.stream("POST", "/v1/completions", json=body) as response:
                    lines = response.iter_lines()
                    if kind == "left":
                        next(lines)
                        seen.append("left")
                    else:
                        *_, last = [line for line in lines if line]
                        seen.append(last)
            else:
                seen.append(str(http.post("/v1/completions", json=body).status_code))
            if once:
                return


def load(url: str, seconds: float, once: bool = False) -> list[str]:
    """What `CLIENTS` clients saw."""
    stop = threading.Event()
    seen: list[str] = []
    threads = [
        threading.Thread(target=client, args=(url, seed, stop, seen, once))
        for seed in range(CLIENTS)
    ]
    for thread in threads:
        thread.start()
    if not once:
        time.sleep(seconds)
        stop.set()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    return seen


def test_two_hundred_clients_are_all_answered(serve: Serve) -> None:
    with serve(engine={"kv_memory": "2MiB", "max_batch_tokens": 512}) as server:
        seen = load(server.url, 0, once=True)
        assert len(seen) == CLIENTS
        assert set(seen) == {"200", "400", "data: [DONE]", "left"}
        server.wait_idle()


@pytest.mark.slow
def test_memory_is_flat_over_five_minutes_of_two_hundred_clients(
    start: Start, llm: LLM, tmp_path: Path
) -> None:
    """Of a process of its own: this one has the clients in it."""
    [expected] = llm.generate("x", SamplingParams(max_tokens=20))
    options = ("--name", NAME, "--kv-memory", "2MiB", "--max-batch-tokens", 512)
    with (tmp_path / "log").open("wb") as log, start(*options, output=log) as process:
        memory = psutil.Process(process.popen.pid).memory_info
        load(process.url, 30)  # buffers and caches fill
        sizes = []
        for _ in range(9):
            seen = load(process.url, 30)
            assert set(seen) == {"200", "400", "data: [DONE]", "left"}
            sizes.append(memory().rss)
        assert max(sizes[-3:]) - min(sizes[:3]) < 30 << 20, sizes
        body = {"model": NAME, "prompt": "x", "temperature": 0, "max_tokens": 20}
        answer = httpx.post(f"{process.url}/v1/completions", json=body, timeout=60)
        assert answer.json()["choices"][0]["text"] == expected.text
