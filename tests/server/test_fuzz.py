"""Requests that nobody would think of, made from the server's own schema: none breaks it."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

schemathesis = pytest.importorskip("schemathesis")

from schemathesis import GenerationMode  # noqa: E402

from tests.server.conftest import NAME, Serve  # noqa: E402

PATHS = {
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/contexts",
    "/v1/contexts/{context_id}",
    "/v1/embeddings",
    "/v1/models",
    "/v1/models/{name}",
    "/tokenize",
    "/health",
    "/ready",
    "/metrics",
}


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize(
    "examples", [20, pytest.param(500, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_no_request_makes_the_server_fail(
    serve: Serve, mode: GenerationMode, examples: int
) -> None:
    with serve(max_output_tokens=8, allow_plans=("*",)) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        statuses, paths = set(), set()
        for result in schema.get_all_operations():
            operation = result.ok()
            paths.add(operation.path)
            anything = not operation.body or operation.path == "/v1/embeddings"
            if mode is GenerationMode.NEGATIVE and anything:
                continue  # nothing that could be wrong

            @settings(
                max_examples=examples,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            @given(operation.as_strategy(generation_mode=mode))
            def ask(case: schemathesis.Case) -> None:
                if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                    case.body["model"] = NAME  # or nearly all would end there
                response = case.call(timeout=30)
                statuses.add(response.status_code)
                assert response.status_code < 500, response.text

            ask()
        assert paths >= PATHS
        assert (200 if mode is GenerationMode.POSITIVE else 400) in statuses
        with server.http as client:
            for context in client.get("/v1/contexts").json()["data"]:
                client.delete(f"/v1/contexts/{context['id']}")
        server.wait_idle()
        assert server.complete("x", max_tokens=4).status_code == 200
