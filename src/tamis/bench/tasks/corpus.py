"""Text that every machine has: the standard library of the Python that runs this program.

Its training split trains the reference model, its held-out split is the default haystack that
facts are hidden in. Files are split by a hash of their path, so the split does not depend on the
order of files, on a seed, or on the Python version.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tamis.errors import ConfigError

Split = Literal["train", "held_out"]

_HELD_OUT_SHARE = 0.06
_SKIPPED = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    | {"lib2to3", "encodings", "ensurepip", "turtledemo"}
)


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus: its path relative to the standard library, and its text."""

    name: str
    text: str


def standard_library(root: Path | None = None) -> Iterator[SourceFile]:
    """Yield the library's Python sources in order of their paths; tests and tables are left out."""
    root = root or Path(sysconfig.get_path("stdlib"))
    yield from _walk(root, root)


def _walk(folder: Path, root: Path) -> Iterator[SourceFile]:
    for path in sorted(folder.iterdir()):
        if path.name in _SKIPPED or path.name.startswith(("test_", "_sysconfigdata")):
            continue
        if path.is_dir() and not path.name.startswith("config-"):
            yield from _walk(path, root)
        elif path.suffix == ".py":
            text = path.read_text(encoding="utf-8", errors="ignore")
            if text.strip():
                yield SourceFile(path.relative_to(root).as_posix(), _normalized(text))


def split_of(name: str) -> Split:
    """The split that a file belongs to, from its relative path alone."""
    digest = hashlib.sha256(name.encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "held_out" if share < _HELD_OUT_SHARE else "train"


def files_of(split: Split, root: Path | None = None) -> list[SourceFile]:
    """All files of one split, in order of their paths."""
    return [file for file in standard_library(root) if split_of(file.name) == split]


def fingerprint(files: Sequence[SourceFile]) -> str:
    """A short hash of names and contents: says whether two machines have the same text."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.text.encode() + b"\0")
    return digest.hexdigest()[:16]


def haystack_lines(file: Path | None = None) -> tuple[str, ...]:
    """The lines (each with its newline) of a text file, or of the held-out library files.

    Raises ConfigError if the file cannot be read as text or is empty.
    """
    if file is None:
        text = "".join(source.text for source in files_of("held_out"))
    else:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the haystack {file} as UTF-8 text: {error}") from error
        if not text.strip():
            raise ConfigError(f"the haystack {file} is empty; give a text file of some pages")
    return tuple(_normalized(text).splitlines(keepends=True))


def _normalized(text: str) -> str:
    """Text whose only line ends are newlines, with one at the end."""
    for sign in ("\r\n", "\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"):
        text = text.replace(sign, "\n" if sign in ("\r\n", "\r") else " ")
    return text if text.endswith("\n") else text + "\n"
