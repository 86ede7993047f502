"""The report shows everything, asks the network for nothing, and works in a browser."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tamis.bench.record import Record
from tamis.bench.report import check_writable, render, write_report
from tamis.bench.summary import Summary
from tamis.errors import ConfigError
from tests.bench.conftest import answer, reading, timing

PLANS = ("dense", "snapkv(budget=0.25)", "</script><b>odd & %{x}</b>")
SHARES = (1.0, 0.25, 0.5)
SCORES = (1.0, 0.75, 0.25)


def results(plans: tuple[str, ...] = PLANS) -> Summary:
    answers, readings, timings = [], [], []
    for plan, share, score in zip(plans, SHARES, SCORES, strict=False):
        for length in (1024, 4096):
            size = 2048 * length
            for sample in range(4):
                answers += [
                    answer(
                        plan,
                        task=task,
                        length=length,
                        sample=sample,
                        depth=(sample + 0.5) / 4,
                        score=float(sample < 4 * score),
                        exact=sample < 4 * score,
                        kv_bytes_peak=int(share * size),
                        kv_bytes_dense=size,
                    )
                    for task in ("single", "frequent")
                ]
            nats = 512 * math.log(8 / score)
            readings.append(
                reading(plan, length=length, nats=nats, kv_bytes_peak=int(share * size))
            )
            timings += [
                timing(plan, length=length, repeat=i, ttft_s=share * (1 + i / 10)) for i in range(3)
            ]
    return Summary(answers, timings, readings, first=plans)


class Page(HTMLParser):
    """What a page asks for, and the text of its parts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.figures: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "action", "data", "poster", "srcset"):
                self.links.append(value or "")
            if name == "class" and value and "plotly-graph-div" in value:
                self.figures.append(dict(attrs)["id"] or "")

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.tags[-1] if self.tags else "", []).append(data)


@pytest.fixture(scope="module")
def html() -> str:
    from tests.bench.conftest import SETTINGS

    record = Record(SETTINGS, {"processor": "Some CPU"}, {"tamis": "0.1.0"}, "today", "tamis bench")
    return render(record, results(), depths=4)


def test_nothing_is_asked_of_the_network(html: str) -> None:
    page = Page(html)
    assert page.links == ["data:,"]
    assert not {"iframe", "img", "object", "base", "form"} & set(page.tags)
    style = "".join(page.texts["style"])
    assert "url(" not in style
    assert "@import" not in style
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy is not None
    assert policy[1].startswith("default-src 'none';")
    assert "http" not in policy[1]


def test_every_plan_is_in_every_section(html: str) -> None:
    sections = html.split("<section>")[1:]
    titles = [re.search(r"<h2>(.*?)</h2>", section) for section in sections]
    assert [title[1] for title in titles if title] == [
        "At a glance",
        "Scores",
        "Perplexity of held-out text",
        "Quality against KV memory",
        "Quality against time to first token",
        "Quality against time per output token",
        "Needle depth by length",
        "KV memory over time",
        "Kinds of values and phrasings of questions",
        "How this was measured",
    ]
    for section in sections[:-1]:
        shown = " ".join(Page(section).texts["th"] + Page(section).texts.get("wbr", []))
        assert "dense" in shown
        assert "snapkv(" in shown
        assert "</script><b>odd & %{x}</b>" in shown


def test_names_from_results_stay_text(html: str) -> None:
    assert "<b>odd" not in html
    assert Page(html).tags.count("script") == html.count("</script>")


def test_there_is_a_figure_per_length_and_a_heatmap_per_plan(html: str) -> None:
    figures = Page(html).figures
    assert len(figures) == len(set(figures)) == 4 * 2 + len(PLANS)
    assert sum(name.startswith("depth-") for name in figures) == len(PLANS)


def cells(html: str, section: str) -> list[list[str]]:
    """The texts of a section's table, row by row."""
    (part,) = [s for s in html.split("<section>") if f"<h2>{section}</h2>" in s]
    rows = re.findall(r"<tr>(.*?)</tr>", part.split("<tbody>")[1], re.DOTALL)
    tag = re.compile(r"<t[hd][^>]*>(.*?)</t[hd]>", re.DOTALL)
    return [[re.sub("<wbr>", "", text) for text in tag.findall(row)] for row in rows]


def test_the_numbers_under_the_figures_are_those_of_the_results(html: str) -> None:
    memory = cells(html, "Quality against KV memory")
    assert memory[0] == ["dense", "1k", "100.0", "2.00", "2.00", "2.00", "1.00×", "yes"]  # noqa: RUF001
    assert memory[1][:4] == ["snapkv(budget=0.25)", "1k", "75.0", "0.500"]
    assert memory[1][-1] == "yes"
    assert memory[2][-1] == "no"  # worse than snapkv, and larger
    perplexity = cells(html, "Perplexity of held-out text")
    assert perplexity[1][1:5] == ["1k", "10.67", "512", "1"]
    first = cells(html, "Quality against time to first token")
    assert first[1][3:5] == ["275 ms", "250 ms … 300 ms"]
    depth = cells(html, "Needle depth by length")
    assert depth[4 + 3] == ["snapkv(budget=0.25)", "75–100", "0.0 · n=1", "0.0 · n=1"]  # noqa: RUF001


def test_it_says_how_it_was_measured(html: str) -> None:
    page = Page(html.split("<section>")[-1])
    text = " ".join(part for parts in page.texts.values() for part in parts)
    for fact in ("tamis bench", "today", "Some CPU", "0.1.0", "seed 0", "word and number"):
        assert fact in text


def test_one_plan_alone_without_timings_or_without_answers(record: Record) -> None:
    whole = results(PLANS[:1])
    quality_only = render(record, Summary(whole.answers, []), 5)
    assert "time to first token" not in quality_only
    assert cells(quality_only, "At a glance") == [["dense", "100.0", "0.25×", "1.00×", "–", "–"]]  # noqa: RUF001
    speed_only = render(record, Summary([], whole.timings), 5)
    assert "Needle depth" not in speed_only
    assert cells(speed_only, "At a glance")[0][3] == "1.00×"  # noqa: RUF001


def test_perplexity_stands_beside_the_score_at_a_glance(record: Record) -> None:
    html = render(record, results(), 5)
    assert [row[:3] for row in cells(html, "At a glance")] == [
        ["dense", "100.0", "8.00"],
        ["snapkv(budget=0.25)", "75.0", "10.67"],
        ["&lt;/script&gt;&lt;b&gt;odd &amp; %{x}&lt;/b&gt;", "25.0", "32.00"],
    ]


def test_perplexity_alone_is_a_report(record: Record) -> None:
    failed = reading(sample=1, nats=None, perplexity=None, error="no memory")
    html = render(record, Summary([], [], [reading(), failed]), 5)
    assert cells(html, "At a glance") == [["dense", "–", "8.00", "–", "–", "–", "–"]]  # noqa: RUF001
    (row,) = cells(html, "Perplexity of held-out text")
    assert row == ["dense", "1k", "8.00", "512", "1, 1 failed", "2.00", "1.00×"]  # noqa: RUF001
    assert "1 request failed" in html
    assert "<h2>Scores" not in html


def test_failed_requests_and_published_tasks_are_shown(record: Record) -> None:
    rows = [
        answer(score=None, exact=None, error="no memory"),
        answer(sample=1, task="ruler/vt", length=None, depth=None, kind=None, phrasing=None),
    ]
    html = render(record, Summary(rows, []), 5)
    assert "1 request failed" in html
    scores = cells(html, "Scores")
    assert scores[0] == ["dense", "1k", "–", "1 failed", "–"]  # noqa: RUF001
    assert scores[1][:3] == ["dense", "as published", "100.0"]


def test_it_is_written_whole_or_not_at_all(tmp_path: Path, record: Record) -> None:
    path = tmp_path / "new" / "report.html"
    check_writable(path)
    assert list(path.parent.iterdir()) == []
    write_report(path, record, results(), 5)
    assert list(path.parent.iterdir()) == [path]
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("place", ["file/report.html", "folder"])
def test_a_path_that_cannot_be_written_is_named_beforehand(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=f"cannot write the report to .*{place}: "):
        check_writable(tmp_path / place)


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


def browse(page: Path) -> tuple[str, list[str], set[str]]:
    """The page as a browser has it in the end, what its console said, who sent requests.

    A page from a file sends as "null"; what the browser does of its own accord is "not an origin".
    """
    assert CHROMIUM is not None
    log = page.with_suffix(".net.json")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += ["--disable-background-networking", f"--user-data-dir={page.parent / 'profile'}"]
    command += [f"--log-net-log={log}", "--virtual-time-budget=20000", "--dump-dom", page.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
    return ran.stdout, console, set(re.findall(r'"initiator":"([^"]*)"', log.read_text()))


needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs chromium on PATH (apt install chromium)"
)


@pytest.mark.slow
@needs_chromium
def test_a_browser_draws_all_figures_without_errors_or_requests(tmp_path: Path, html: str) -> None:
    page = tmp_path / "report.html"
    page.write_text(html, encoding="utf-8")

    drawn, console, senders = browse(page)

    assert console == []
    assert senders <= {"not an origin"}
    drawn = re.sub(r' style="[^"]*"', "", drawn)
    for name in Page(html).figures:
        assert f'id="{name}" class="plotly-graph-div js-plotly-plot"' in drawn
    assert drawn.count("heatmaplayer") >= len(PLANS)


@pytest.mark.slow
@needs_chromium
def test_a_request_or_an_error_would_have_been_seen(tmp_path: Path, html: str) -> None:
    page = tmp_path / "report.html"
    extra = '<img src="https://example.com/x.png"><script>nonsense()</script></body>'
    page.write_text(html.replace("</body>", extra), encoding="utf-8")
    _, console, _ = browse(page)
    assert any("Content Security Policy" in line for line in console)
    assert any("nonsense is not defined" in line for line in console)

    open_page = tmp_path / "open" / "report.html"
    open_page.parent.mkdir()
    policy = re.compile("<meta http-equiv[^>]*>")
    open_page.write_text(policy.sub("", page.read_text(encoding="utf-8")), encoding="utf-8")
    assert "null" in browse(open_page)[2]
