"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from tamis.errors import ConfigError


def check_writable(path: Path, what: str) -> None:
    """Make sure, before long work, that `what` can be written to `path` after it.

    Raises:
        ConfigError: it cannot.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(path)
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write {what} to {path}: {error.strerror}") from error


def write_whole(path: Path, text: str, what: str) -> None:
    """Write `text` in UTF-8; the folder is made.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial(path)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise ConfigError(f"cannot write {what} to {path}: {error.strerror}") from error


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")
