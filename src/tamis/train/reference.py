"""`tamis train reference`: train the small model that ships with the project, from nothing.

A run lives in one folder: the recipe, the tokenizer, the token text, the log with its curves, and
the last checkpoint. Training goes on from the checkpoint if there is one; `export` turns any
checkpoint into a model directory.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from tamis.bench.tasks.corpus import SourceFile, files_of, fingerprint
from tamis.errors import ConfigError
from tamis.train import loop
from tamis.train.model import build_model
from tamis.train.recipe import Recipe
from tamis.train.screen import Screen
from tamis.train.source import save_text
from tamis.train.text import tokenize_files
from tamis.train.tokenizer import train_tokenizer

_BUDGET = ("minutes", "steps")  # a run may go on with another budget


def train(
    folder: Path,
    recipe: Recipe,
    *,
    device: str = "cpu",
    threads: int | None = None,
    workers: int = 1,
    mirror: Path | None = None,
    compiled: bool = True,
    progress: bool = True,
    files: Sequence[SourceFile] | None = None,
) -> bool:
    """Train, or go on training, the run in `folder`; True when its budget is used up.

    `recipe` must be the one that the run began with, but for its budget (ConfigError otherwise).
    `threads` is the most that PyTorch may use (default: all processors). `mirror` is a folder for
    a second copy of every checkpoint. `files` is the text, by default the training split of the
    standard library.
    """
    tokenizer = prepare(folder, recipe, device, files)
    model = build_model(recipe.shape, tokenizer, recipe.seed).to(device)
    place = loop.Place(
        folder=folder,
        mirror=mirror,
        device=device,
        threads=threads or torch.get_num_threads(),
        workers=workers,
        compiled=compiled,
    )
    with Screen(shown=progress) as screen:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        screen.note(f"{parameters:,} parameters; run in {folder}")
        done = loop.run(model, recipe, place, screen)
        if not done:
            screen.note("interrupted; the same command goes on from the checkpoint")
    return done


def prepare(
    folder: Path, recipe: Recipe, device: str, files: Sequence[SourceFile] | None
) -> PreTrainedTokenizerFast:
    """Make the run's folder, or check that it was made for this recipe; returns the tokenizer."""
    run_file = folder / "run.json"
    wanted = json.loads(json.dumps(recipe.as_dict()))
    if run_file.exists():
        begun = json.loads(run_file.read_text(encoding="utf-8"))["recipe"]
        differing = [key for key in wanted if key not in _BUDGET and begun.get(key) != wanted[key]]
        if differing:
            raise ConfigError(
                f"the run in {folder} began with another recipe; these differ: "
                f"{', '.join(sorted(differing))}. Go on with the same, or choose another folder"
            )
        return PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    folder.mkdir(parents=True, exist_ok=True)
    files = files if files is not None else files_of("train")
    tokenizer = train_tokenizer(file.text for file in files)
    tokenizer.save_pretrained(folder / "tokenizer")
    text = tokenize_files(files, tokenizer.backend_tokenizer)
    save_text(text, folder)
    about: dict[str, Any] = {
        "recipe": wanted,
        "corpus": {
            "python": platform.python_version(),
            "files": len(files),
            "characters": sum(len(file.text) for file in files),
            "tokens": len(text.tokens),
            "fingerprint": fingerprint(files),
        },
        "machine": {
            "processor": _processor(),
            "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
            "torch": torch.__version__,
        },
    }
    run_file.write_text(json.dumps(about, indent=2), encoding="utf-8")
    return tokenizer


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
