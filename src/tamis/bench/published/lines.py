"""Lines of a published JSONL file, and errors that name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tamis.errors import ConfigError


@dataclass(frozen=True)
class Line:
    """One JSON object of a file.

    Attributes:
        path: the file. `number`: the line's, from 1.
        format: whose format it is, for errors.
        values: the object.
    """

    path: Path
    number: int
    format: str
    values: dict[str, Any]

    @property
    def where(self) -> str:
        return f"{self.path}, line {self.number}"

    def error(self, message: str) -> ConfigError:
        """An error about this line."""
        return ConfigError(f"{self.where}: {message}")

    def text(self, field: str) -> str:
        """A field that holds text (a number is taken as text).

        Raises:
            ConfigError: it is missing, or something else.
        """
        value = self._value(field)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise self._wrong(field, "text")
        return str(value)

    def texts(self, field: str) -> tuple[str, ...]:
        """A field that holds a list of texts; one text stands for a list of one.

        Raises:
            ConfigError: it is missing, empty, or something else.
        """
        value = self._value(field)
        values = value if isinstance(value, list) else [value]
        if not values or any(
            isinstance(one, bool) or not isinstance(one, str | int | float) for one in values
        ):
            raise self._wrong(field, "a list of at least one text")
        return tuple(str(one) for one in values)

    def _value(self, field: str) -> Any:
        if field not in self.values:
            has = ", ".join(self.values) or "none"
            raise self.error(
                f"the field {field!r} is missing from this {self.format} line (it has {has})"
            )
        return self.values[field]

    def _wrong(self, field: str, wanted: str) -> ConfigError:
        shown = json.dumps(self.values[field], ensure_ascii=False)[:60]
        return self.error(
            f"the field {field!r} of this {self.format} line must be {wanted}, not {shown}"
        )


def read_lines(path: Path, format: str) -> Iterator[Line]:
    """The objects of a JSONL file; blank lines are skipped.

    Raises:
        ConfigError: the file cannot be read, a line is not a JSON object, or there is none.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the {format} file {path}: {error}") from error
    empty = True
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        empty = False
        try:
            values = json.loads(line)
        except ValueError as error:
            raise ConfigError(
                f"{path}, line {number}: not JSON ({error}); a {format} file has one JSON object "
                "per line"
            ) from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path}, line {number}: not a JSON object, as {format} has them")
        yield Line(path, number, format, values)
    if empty:
        raise ConfigError(f"the {format} file {path} has no lines")
