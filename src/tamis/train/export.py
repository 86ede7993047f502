"""From a run's checkpoint to a 🤗 model directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from tamis.errors import ModelError
from tamis.train import card, checkpoint, log
from tamis.train.model import build_model
from tamis.train.recipe import Shape
from tamis.train.text import NEWLINE


def export(run: Path, out: Path) -> Path:
    """Write the model of the run's last checkpoint, its tokenizer and its card to `out`.

    Weights are saved in bf16, the precision in which training used them. Works on a run that is
    still going on. Scores go into the card once `evaluation.json` lies in `out` (`evaluate`).
    Raises ModelError if there is no checkpoint.
    """
    state = checkpoint.load(run)
    if state is None:
        raise ModelError(f"{run} holds no {checkpoint.NAME}; is it the folder of a training run?")
    about: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run / "tokenizer")
    model = build_model(Shape(**about["recipe"]["shape"]), tokenizer, seed=0)
    model.load_state_dict(state["model"])
    model.to(torch.bfloat16)
    newline = tokenizer.convert_tokens_to_ids(NEWLINE)
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, newline],  # an answer is one line
        pad_token_id=tokenizer.pad_token_id,
    )
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    records = log.read(run / "log.jsonl")
    shutil.copyfile(run / "log.jsonl", out / "training-log.jsonl")
    log.draw(records, out / "curves.png")
    about["training"] = state["clock"]
    about["lengths_trained"] = sorted({record["length"] for record in records})
    about["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    (out / "training.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    card.write(out)
    return out
