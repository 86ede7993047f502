"""Files are written whole or not at all, and what cannot be written is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tamis.errors import ConfigError
from tamis.files import check_writable, write_whole


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_whole(path, "old", "it")
    write_whole(path, "né", "it")
    assert path.read_bytes() == "né".encode()
    assert list(path.parent.iterdir()) == [path]


def test_asking_beforehand_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "a.txt", "it")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("place", ["file/a.txt", "folder"])
def test_what_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for attempt in (
        lambda p: check_writable(p, "the page"),
        lambda p: write_whole(p, "", "the page"),
    ):
        with pytest.raises(ConfigError, match=f"cannot write the page to .*{place}: "):
            attempt(tmp_path / place)
    assert list((tmp_path / "folder").iterdir()) == []
