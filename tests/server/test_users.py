"""Whose request it is, where the order asks: nobody gets a second share by another name."""

from __future__ import annotations

import json
from collections.abc import Sequence

import httpx
import pytest

from tests.server.conftest import NAME, Serve

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("keys", "used", "user"),
    [((), "none", "me"), (("a",), "a", "me"), (("a", "b"), "a", "0"), (("a", "b"), "b", "1")],
)
def test_users_are_keys_where_there_are_several(
    serve: Serve, keys: Sequence[str], used: str, user: str
) -> None:
    body = {"model": NAME, "prompt": "x", "max_tokens": 450, "ignore_eos": True, "stream": True}
    body |= {"user": "me", "priority": 3}
    header = {"Authorization": f"Bearer {used}"}
    with serve(api_keys=tuple(keys)) as server, httpx.Client(timeout=60) as client:
        url = f"{server.url}/v1/completions"
        with client.stream("POST", url, content=json.dumps(body), headers=header | JSON) as answer:
            next(answer.iter_lines())
            [sequence] = server.llm.engine.scheduler.running
            assert (sequence.request.user, sequence.request.priority) == (user, 3)
        server.wait_idle()
