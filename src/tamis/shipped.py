"""The model that ships with tamis, found by its name wherever tamis runs."""

from __future__ import annotations

import os
from pathlib import Path

from tamis.errors import ModelError

REFERENCE = "reference"
"""The model that `tamis train reference` makes: small, and able to find facts in long texts."""

_PACKAGE = Path(__file__).resolve().parent
PLACES = (_PACKAGE / "models", _PACKAGE.parents[1] / "models")
"""Folders that may hold it: in an installed package; in a checkout, beside `src`."""


def find() -> Path | None:
    """The reference model's directory, or None where it is not there."""
    found = (place / REFERENCE for place in PLACES)
    return next((folder for folder in found if (folder / "config.json").is_file()), None)


def locate(model: str | os.PathLike[str]) -> str:
    """The directory of the reference model for its name; anything else as it is.

    A directory that happens to have that name is "./reference", or a `Path`.

    Raises:
        ModelError: the reference model is asked for, and is not there.
    """
    if model != REFERENCE:
        return str(model)
    folder = find()
    if folder is None:
        raise ModelError(
            f"the model {REFERENCE!r} is not part of this copy of tamis; give the directory of a "
            "model, or make one with: tamis train reference"
        )
    return str(folder)
