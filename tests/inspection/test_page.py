"""The page shows what the inspection holds, asks for nothing, and works in a browser."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tamis.errors import ConfigError, RequestError
from tamis.inspection import Inspection
from tamis.inspection.page import marks, render, share, totals
from tests.bench.test_report import Page, browse, needs_chromium


def data_of(html: str) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return json.loads(found[1])  # type: ignore[no-any-return]


def test_nothing_is_asked_of_the_network(inspection: Inspection) -> None:
    html = render(inspection, ["42"])
    page = Page(html)
    assert set(page.links) == {"data:,", "#text"}
    assert not {"iframe", "img", "object", "base", "form"} & set(page.tags)
    assert "default-src 'none'" in html
    assert "url(" not in html
    assert "http" not in html.replace("http-equiv", "")


def test_texts_of_the_request_stay_text(inspection: Inspection) -> None:
    html = render(inspection, ["<b>"])
    assert "<b>odd" not in html
    assert "<i>42" not in html
    assert html.count("</script>") == Page(html).tags.count("script") == 2
    assert data_of(html)["texts"] == list(inspection.prompt_texts)


def test_kept_tokens_are_bits(inspection: Inspection) -> None:
    data = data_of(render(inspection))
    bits = [np.frombuffer(base64.b64decode(h), np.uint8) for layer in data["kept"] for h in layer]
    unpacked = np.stack([np.unpackbits(head)[: inspection.n_prompt] for head in bits])
    assert (unpacked == inspection.kept()).all()
    assert data["held"] == [[8, 5], [4, 4]]
    assert data["budgets"] == [[6, 3], [4, 4]]


def test_pages_read_are_counted_over_heads(inspection: Inspection) -> None:
    pages = data_of(render(inspection))["pages"]
    assert list(pages) == ["0"]  # layer 1 selects nothing
    counts = np.frombuffer(base64.b64decode(pages["0"]["counts"]), np.uint8)
    assert counts.reshape(2, pages["0"]["width"]).tolist() == [[2, 1, 0, 1], [1, 2, 0, 1]]


def test_highlighted_text_says_what_became_of_it(inspection: Inspection) -> None:
    (mark,) = marks(inspection, "42")
    assert (mark["start"], mark["stop"]) == (3, 5)
    assert (mark["whole"], mark["none"], mark["heads"]) == (1, 3, 4)
    assert (mark["kept"], mark["read"]) == ("25 %", "12.5 %")
    html = render(inspection, ["42"])
    assert "<b>1 of 4</b> KV heads keep all of it, 3 nothing" in html
    assert data_of(html)["marks"] == [[3, 5]]
    assert "What became of" not in render(inspection)
    with pytest.raises(RequestError, match="'43' does not stand in the prompt"):
        render(inspection, ["42", "43"])


def test_totals_are_compared_with_dense(inspection: Inspection) -> None:
    found = {name: (value, note) for name, value, note in totals(inspection)}
    assert found["KV memory"][0] == "1.5 KiB"
    assert found["KV memory"][1].startswith("50 % of 3 KiB dense")
    assert found["Prompt tokens kept"][0] == "32.5 %"
    assert found["Prefill density"][0] == "75 %"
    assert found["Read per step"][0] == "3"
    assert "Read per step" not in dict.fromkeys(
        n for n, *_ in totals(replace(inspection, reads=()))
    )


def test_neither_nothing_nor_all_is_rounded_to() -> None:
    assert [share(x) for x in (0, 1e-5, 0.1234, 0.9999, 1)] == [
        "0 %",
        "under 0.1 %",
        "12.3 %",
        "over 99.9 %",
        "100 %",
    ]


def test_the_page_is_written_whole_into_a_new_folder(
    tmp_path: Path, inspection: Inspection
) -> None:
    path = tmp_path / "new" / "page.html"
    inspection.to_html(path, highlight="42")
    assert list(path.parent.iterdir()) == [path]
    assert path.read_text(encoding="utf-8") == render(inspection, ["42"])
    with pytest.raises(ConfigError, match=r"cannot write the page to .*new: "):
        inspection.to_html(path.parent)


def long(inspection: Inspection, n: int) -> Inspection:
    """The same with a prompt of `n` tokens."""
    texts = [f" w{i}" if i % 12 else "\n" for i in range(n)]
    texts[n // 2] = " needle"
    return replace(inspection, prompt_token_ids=tuple(range(n)), prompt_texts=tuple(texts))


@pytest.mark.slow
@needs_chromium
def test_a_browser_colours_8k_tokens_without_errors_or_requests(
    tmp_path: Path, inspection: Inspection
) -> None:
    page = tmp_path / "page.html"
    long(inspection, 8192).to_html(page, highlight=" needle")

    drawn, console, senders = browse(page)

    assert console == []
    assert senders <= {"not an origin"}
    tokens = dict(re.findall(r'<span data-t="(\d+)" class="([^"]*)"', drawn))
    assert len(tokens) == 8192
    assert tokens["9"] == "k8"
    assert tokens["3"] == "k2"
    assert tokens["2"] == "k0"
    assert tokens["4096"] == "k0 mark first last"
    assert drawn.count('title="layer 0, KV head 0: 8 tokens held"') == 1
    assert '<option value="1">1</option>' in drawn
    assert drawn.count('class="bar"') == 4
    assert re.search(r'id="pages-read">', drawn)  # no longer hidden
    assert "2 of 4 pages per head and step" in drawn


@pytest.mark.slow
@needs_chromium
def test_a_page_of_one_generated_token_has_no_read_pattern(
    tmp_path: Path, inspection: Inspection
) -> None:
    page = tmp_path / "page.html"
    replace(inspection, reads=(), budgets=None).to_html(page)
    drawn, console, _ = browse(page)
    assert console == []
    assert "only one token was generated" in drawn
    assert 'id="pages"' not in drawn
