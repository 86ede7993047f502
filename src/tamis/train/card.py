"""The model card: what the model is, how it was made, and what was measured of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_TEXTS = Path(__file__).parent / "card_text"


def write(folder: Path) -> None:
    """Write `README.md` from `training.json`, `config.json` and, if there, `evaluation.json`."""
    about = _read(folder / "training.json")
    config = _read(folder / "config.json")
    text = _text("head").format(parameters=f"{about['parameters'] / 1e6:.1f} million")
    if (folder / "evaluation.json").exists():
        text += _scores(_read(folder / "evaluation.json"))
    else:
        text += _text("unmeasured")
    text += _training(about, config)
    if (folder / "curves.png").exists():
        text += _text("curves")
    (folder / "README.md").write_text(text, encoding="utf-8")


def _text(name: str) -> str:
    """One section of the card, from a Markdown file beside this module."""
    return (_TEXTS / f"{name}.md").read_text(encoding="utf-8") + "\n"


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _scores(found: dict[str, Any]) -> str:
    scores = found["scores"]
    lengths = sorted({score["length"] for score in scores})
    tasks = list(dict.fromkeys(score["task"] for score in scores))
    cells = {(score["task"], score["length"]): score for score in scores}
    exact = [
        [task, *(_share(cells.get((task, n)), "exact", "count") for n in lengths)] for task in tasks
    ]
    groups = ("word", "number", "restated", "natural")
    split = [[task, *(_group(scores, task, group) for group in groups)] for task in tasks]
    parts = len(scores[0]["by_depth"])
    depth = [[task, *(_depth(scores, task, part) for part in range(parts))] for task in tasks]
    ppl = [
        [f"{p['length']:,}", f"{p['perplexity']:.2f}", f"{p['bits_per_character']:.3f}"]
        for p in found["perplexity"]
    ]
    bounds = [f"{i / parts:.1f} to {(i + 1) / parts:.1f}" for i in range(parts)]
    return _text("scores").format(
        exact=_table(["task", *(f"{n:,} tokens" for n in lengths)], exact),
        split=_table(["task", *groups], split),
        depth=_table(["task", *bounds], depth),
        perplexity=_table(["window, tokens", "perplexity per token", "bits per character"], ppl),
    )


def _share(cell: dict[str, Any] | None, value: str, count: str) -> str:
    return "" if cell is None else f"{100 * cell[value]:.0f} ({cell[count]})"


def _pooled(pairs: list[tuple[float, int]]) -> str:
    """The share right of groups together, each given as (share, count)."""
    count = sum(n for _, n in pairs)
    right = sum(share * n for share, n in pairs if n)
    return f"{100 * right / count:.0f} ({count})" if count else ""


def _group(scores: list[dict[str, Any]], task: str, group: str) -> str:
    chosen = [score for score in scores if score["task"] == task]
    return _pooled(
        [
            score[split][group]
            for score in chosen
            for split in ("by_kind", "by_phrasing")
            if group in score[split]
        ]
    )


def _depth(scores: list[dict[str, Any]], task: str, part: int) -> str:
    return _pooled([score["by_depth"][part] for score in scores if score["task"] == task])


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _training(about: dict[str, Any], config: dict[str, Any]) -> str:
    recipe, corpus, machine = about["recipe"], about["corpus"], about["machine"]
    shape, clock = recipe["shape"], about["training"]
    hardware = machine["processor"]
    if machine["device"] != "cpu":
        hardware += f", {machine['device']}"
    return _text("training").format(
        layers=shape["layers"],
        hidden=shape["hidden"],
        heads=shape["heads"],
        kv_heads=shape["kv_heads"],
        head_dim=shape["head_dim"],
        feed_forward=shape["feed_forward"],
        theta=f"{shape['rope_theta']:,.0f}",
        context=f"{shape['max_position']:,}",
        vocabulary=f"{config['vocab_size']:,}",
        python=corpus["python"],
        files=corpus["files"],
        characters=f"{corpus['characters']:,}",
        text_tokens=f"{corpus['tokens']:,}",
        fingerprint=corpus["fingerprint"],
        seen=f"{clock['tokens']:,}",
        steps=f"{clock['step']:,}",
        lengths=", ".join(f"{length:,}" for length in about["lengths_trained"]),
        stretch=f"{max(stage['blend']['stretch'] for stage in recipe['stages']):,}",
        first_weight=f"{recipe['first_weight']:g}",
        text_weight=f"{recipe['text_weight']:g}",
        matrix_lr=f"{recipe['matrix_lr']:g}",
        other_lr=f"{recipe['other_lr']:g}",
        decay=f"{recipe['decay']:.0%}",
        machine=f"{hardware}; PyTorch {machine['torch']}",
        minutes=f"{clock['seconds'] / 60:.0f}",
        seed=recipe["seed"],
    )
