"""Many clients at once: everyone is answered, and memory does not grow."""

from __future__ import annotations

import gc
import random
import threading
import time
from typing import Any

import httpx
import psutil
import pytest

from tamis import LLM, SamplingParams
from tests.server.conftest import NAME, Serve, Server

CLIENTS = 200


def client(server: Server, seed: int, stop: threading.Event, seen: list[str], once: bool) -> None:
    """Send request after request: plain, streamed, left early, wrong."""
    choices = random.Random(seed)
    with server.http as http:
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


def load(server: Server, seconds: float, once: bool = False) -> list[str]:
    """What `CLIENTS` clients saw."""
    stop = threading.Event()
    seen: list[str] = []
    threads = [
        threading.Thread(target=client, args=(server, seed, stop, seen, once))
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
        seen = load(server, 0, once=True)
        assert len(seen) == CLIENTS
        assert set(seen) == {"200", "400", "data: [DONE]", "left"}
        server.wait_idle()


@pytest.mark.slow
def test_memory_is_flat_over_five_minutes_of_two_hundred_clients(serve: Serve, llm: LLM) -> None:
    [expected] = llm.generate("x", SamplingParams(max_tokens=20))
    process = psutil.Process()
    with serve(engine={"kv_memory": "2MiB", "max_batch_tokens": 512}) as server:
        load(server, 30)  # buffers and caches fill
        sizes = []
        for _ in range(9):
            seen = load(server, 30)
            assert set(seen) == {"200", "400", "data: [DONE]", "left"}
            server.wait_idle()
            gc.collect()
            sizes.append(process.memory_info().rss)
        assert max(sizes[-3:]) - min(sizes[:3]) < 30 << 20, sizes
        answer: httpx.Response = server.complete("x", max_tokens=20)
        assert answer.json()["choices"][0]["text"] == expected.text
