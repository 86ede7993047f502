"""The dashboard shows what the server does, asks nobody else, and wants a key where one is set."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tamis import SamplingParams
from tamis.engine.engine import Engine
from tamis.model import Model
from tamis.plan import Plan
from tamis.server.dashboard import render
from tamis.server.recent import KEPT, Quantiles, Recent
from tamis.server.state import engine_state
from tests.bench.test_report import Page, needs_chromium
from tests.server.browser import Browser, browser
from tests.server.conftest import NAME, Serve, Server, wait_for

KIVI = "kivi(bits=4, group_size=16)"
LONG = {"max_tokens": 150, "ignore_eos": True}


def test_the_state_tells_pages_by_format_and_request(tiny: Model) -> None:
    engine = Engine(tiny, kv_bytes=2**24, page_size=16, prefix_cache=True)
    params = SamplingParams(max_tokens=300, ignore_eos=True)
    prompt = [1 + i % 200 for i in range(300)]
    engine.add_request(prompt, params, request_id="exact")
    engine.add_request(prompt[::-1], params, Plan.parse(KIVI), request_id="encoded")
    engine.add_request(prompt, params, request_id="late")
    waiting = engine_state(engine)
    assert [r.state for r in waiting.requests] == ["waiting"] * 3
    assert [r.pages for r in waiting.requests] == [[], [], []]
    for _ in range(20):
        engine.step()
    state = engine_state(engine)
    assert (state.queue.running, state.queue.waiting) == (3, 0)
    exact, encoded, late = state.requests
    assert (exact.id, exact.plan, encoded.plan) == ("exact", "dense", str(Plan.parse(KIVI)))
    assert (exact.prompt_done, exact.prompt_tokens) == (300, 300)
    assert exact.kv_bytes == exact.kv_bytes_dense == engine.layout.bytes_for(300 + 19)
    assert encoded.kv_bytes < encoded.kv_bytes_dense
    assert len(encoded.pages) == 2
    assert late.cached_tokens == 288
    [device] = state.tiers
    assert device.in_use == sum(p.bytes for p in state.pages) == engine.cache.bytes_in_use
    assert state.prefixes.hit_tokens == 288
    assert state.totals.decode_tokens == engine.stats.decode_tokens


def test_what_lies_in_host_memory_is_told_apart(tiny: Model) -> None:
    engine = Engine(tiny, kv_bytes=2**24, page_size=16, swap_bytes=2**22, preemption="swap")
    engine.add_request([1] * 90, SamplingParams(max_tokens=300, ignore_eos=True))
    for _ in range(3):
        engine.step()
    [sequence] = engine.scheduler.running
    assert sequence.cache is not None
    held = sequence.cache.bytes
    sequence.cache.swap_out()
    state = engine_state(engine)
    [device, host] = state.tiers
    [pages] = state.requests[0].pages
    assert (device.in_use, pages.tier) == (0, "host")
    assert 0 < host.in_use <= held
    sequence.cache.swap_in()


def test_latencies_are_those_of_the_last_requests(tiny: Model) -> None:
    assert Quantiles.of([]) == Quantiles(None, None)
    assert Quantiles.of([3.0]) == Quantiles(3.0, 3.0)
    assert Quantiles.of([float(i) for i in range(101)]) == Quantiles(50.0, 95.0)
    engine = Engine(tiny, kv_bytes=2**24)
    recent = Recent()
    for i in range(KEPT + 5):
        engine.add_request([1, 2], SamplingParams(max_tokens=1), request_id=str(i))
    while not engine.idle:
        recent.add("dense", [i.output for i in engine.step() if i.output is not None])
    assert recent.latencies().requests == KEPT
    assert recent.latencies().tpot == Quantiles(None, None)  # one token each
    assert [ended.id for ended in recent.newest(2)] == [str(KEPT + 4), str(KEPT + 3)]


def test_the_page_asks_nobody_else() -> None:
    html, headers = render()
    page = Page(html)
    assert page.links == ["data:,"]
    assert not {"iframe", "img", "object", "base"} & set(page.tags)
    assert "http" not in html
    assert "url(" not in html
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy
    assert html.count("</script>") == html.count("</style>") == 1
    assert re.search(r'style="|onclick=', html) is None  # the policy would ignore them


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def fresh(tab: Browser) -> Browser:
    """A tab that remembers no requests, problems or keys."""
    tab.open("about:blank")
    tab.requests.clear()
    tab.problems.clear()
    return tab


def tile(tab: Browser, name: str) -> str:
    return tab.text(f"#{name}")


@pytest.mark.slow
@needs_chromium
def test_values_change_while_a_request_runs(serve: Serve, fresh: Browser) -> None:
    with serve(engine={"prefix_cache": True}, allow_plans=(KIVI,)) as server:
        fresh.open(server.url)
        fresh.until("document.querySelector('#kv').textContent === '0 B'")
        assert fresh.text("h1") == NAME
        assert tile(fresh, "running") == "0 running"
        assert tile(fresh, "ttft") == "–"  # noqa: RUF001
        with server.http as client:
            body = {"model": NAME, "prompt": "x" * 300, "kv_plan": KIVI, "stream": True, **LONG}
            with client.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                slow_down(server)
                fresh.until("document.querySelector('#running').textContent === '1 running'")
                fresh.until("document.querySelectorAll('#requests tr').length === 1")
                assert KIVI in fresh.text("#requests .plan")
                assert "saved" in fresh.text("#requests")
                assert tile(fresh, "kv") != "0 B"
                formats = "[...document.querySelectorAll('#formats span')].map((s) => s.innerText)"
                exact, encoded = sorted(fresh.evaluate(formats), reverse=True)
                per_token = 2 * 4 * server.llm.model.layers[0].k_dim + 4  # and its position
                assert exact == f"exact, float32, {per_token} B per token"
                assert re.fullmatch(r"encoded, [\d.]+ B per token", encoded)
                slow_down(server, 0)
                list(lines)
            context = {"document": "a" * 50, "id": "book"}
            assert client.post("/v1/contexts", json=context).status_code == 200
            fresh.until("document.querySelectorAll('#contexts tr').length === 1")
            assert "book" in fresh.text("#contexts")
            assert fresh.text("#contexts-note").startswith("1 kept in ")
        fresh.until("document.querySelectorAll('#ended tr').length === 1")
        assert "length" in fresh.text("#ended")
        assert tile(fresh, "ttft").endswith("s")
        fresh.until("document.querySelector('#running').textContent === '0 running'")
        assert fresh.problems == []
        assert {url.split("?")[0] for url in fresh.requests} <= {
            "about:blank",
            "data:,",
            f"{server.url}/",
            f"{server.url}/dashboard/state",
        }


@pytest.mark.slow
@needs_chromium
def test_one_prompt_runs_under_two_plans_side_by_side(serve: Serve, fresh: Browser) -> None:
    with serve(allow_plans=("streamingllm(budget=32)",)) as server:
        fresh.open(server.url)
        fresh.until("!document.querySelector('#main').hidden")
        plans = "[...document.querySelectorAll('article .plan')].map((i) => i.value)"
        assert fresh.evaluate(plans) == ["dense", "streamingllm(budget=32)"]
        prompt = "abcdefgh" * 16
        fresh.fill("#prompt", prompt)
        fresh.fill("#max-tokens", "6")
        fresh.click("#run")
        fresh.until("!document.querySelector('#run').disabled")
        for number, plan in enumerate(("dense", "streamingllm(budget=32)")):
            answer = server.complete(prompt, max_tokens=6, kv_plan=plan).json()
            assert fresh.text(f"#side-{number} blockquote") == answer["choices"][0]["text"]
            assert "of dense" in fresh.text(f"#side-{number} .numbers")
        assert "100 % of dense" in fresh.text("#side-0 .numbers")
        assert "100 % of dense" not in fresh.text("#side-1 .numbers")
        fresh.fill("#side-1 .plan", "snapkv(budget=0.1)")
        fresh.click("#run")
        fresh.until("document.querySelector('#side-1 .failed') !== null")
        assert "does not allow the plan" in fresh.text("#side-1 .numbers")


@pytest.mark.slow
@needs_chromium
def test_stop_ends_both(serve: Serve, fresh: Browser) -> None:
    with serve() as server:
        fresh.open(server.url)
        fresh.until("!document.querySelector('#main').hidden")
        fresh.fill("#prompt", "x")
        fresh.fill("#max-tokens", "400")
        slow_down(server)
        fresh.click("#run")
        wait_for(lambda: server.service.admission.n_open == 2)
        fresh.click("#stop")
        fresh.until("document.querySelector('#side-0 .numbers').textContent === 'stopped'")
        slow_down(server, 0)
        server.wait_idle()


@pytest.mark.slow
@needs_chromium
def test_a_key_is_asked_for_and_kept_in_the_tab_alone(serve: Serve, fresh: Browser) -> None:
    with serve(api_keys=("secret",)) as server:
        with server.http as client:
            assert client.get("/dashboard/state").status_code == 401
        fresh.open(server.url)
        fresh.until("!document.querySelector('#key-form').hidden")
        assert fresh.evaluate("document.querySelector('#main').hidden")
        fresh.fill("#key", "guess")
        fresh.click("#key-form button")
        fresh.until("document.querySelector('#status').textContent === 'that key is not valid'")
        fresh.fill("#key", "secret")
        fresh.click("#key-form button")
        fresh.until("!document.querySelector('#main').hidden")
        assert fresh.text("h1") == NAME
        fresh.fill("#prompt", "x")
        fresh.fill("#max-tokens", "3")
        fresh.click("#run")
        fresh.until("!document.querySelector('#run').disabled")
        assert "of dense" in fresh.text("#side-0 .numbers")
        assert fresh.evaluate("localStorage.length + document.cookie.length") == 0
        assert all("secret" not in url for url in fresh.requests)


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_it_without_scrolling_sideways(
    server: Server, fresh: Browser, tmp_path: Path, dark: bool
) -> None:
    fresh.open(server.url, width=360, height=740, dark=dark)
    fresh.until("!document.querySelector('#main').hidden")
    assert fresh.evaluate("document.documentElement.scrollWidth") <= 360
    paper = fresh.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(22, 25, 29)" if dark else "rgb(251, 250, 248)")


@pytest.mark.slow
@needs_chromium
def test_a_request_to_somebody_else_would_be_stopped_and_seen(
    server: Server, fresh: Browser
) -> None:
    fresh.open(server.url)
    fresh.until("!document.querySelector('#main').hidden")
    fresh.evaluate("fetch('https://example.com/x').catch(() => null); null")
    fresh.until("document.querySelector('#status') !== null")
    wait_for(lambda: fresh.evaluate("1") == 1 and bool(fresh.problems))
    assert any("Content Security Policy" in problem for problem in fresh.problems)


def slow_down(server: Server, seconds: float = 0.1) -> None:
    """Have every step of the engine begin with a pause."""

    def pause(engine: Engine) -> None:
        schedule = type(engine.scheduler).schedule

        def later() -> object:
            time.sleep(seconds)
            return schedule(engine.scheduler)

        engine.scheduler.schedule = later  # type: ignore[method-assign]

    asyncio.run(server.llm.read(pause))
