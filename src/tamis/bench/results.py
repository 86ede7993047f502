"""What a run measured, one JSON line per measurement, in files that a killed run can go on with."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Generic, TypeVar

from tamis.errors import ConfigError


@dataclass(frozen=True)
class Answer:
    """What one plan made of one exercise. Sizes in bytes, as in `RequestMetrics`.

    `prompt_digest` tells prompts apart without holding them. `score` and `exact` are None where the
    request failed; `error` says why then.
    """

    plan: str
    task: str
    length: int | None
    sample: int
    question: int
    depth: float | None
    kind: str | None
    phrasing: str | None
    prompt_digest: str
    prompt_tokens: int
    output_tokens: int
    expected: list[str]
    answer: str
    score: float | None
    exact: bool | None
    kv_bytes: int
    kv_bytes_peak: int
    kv_bytes_dense: int
    error: str | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """What tells this answer from all others of a run."""
        return (self.plan, self.task, self.length, self.sample, self.question)


@dataclass(frozen=True)
class Timing:
    """One request that had the machine to itself. Seconds and bytes, as in `RequestMetrics`.

    Attributes:
        length: tokens of its prompt. `repeat`: the round it was measured in.
        dense_ttft_s, dense_tpot_s: of exact attention in the same round.
        timeline: after each step of the engine, the seconds since the request arrived and the
            bytes of KV pages in use.
    """

    plan: str
    length: int
    repeat: int
    output_tokens: int
    ttft_s: float
    tpot_s: float
    dense_ttft_s: float
    dense_tpot_s: float
    kv_bytes: int
    kv_bytes_peak: int
    kv_bytes_dense: int
    timeline: list[tuple[float, int]]

    @property
    def key(self) -> tuple[object, ...]:
        """What tells this timing from all others of a run."""
        return (self.plan, self.length, self.repeat)


@dataclass(frozen=True)
class Reading:
    """How well one plan foretold a window of held-out text. Bytes as in `RequestMetrics`.

    Attributes:
        length: tokens of the window. `sample`: which window of that length.
        prompt_digest: tells windows apart without holding them.
        scored_tokens: how many of its last tokens are scored.
        nats: minus the sum of their log-probabilities; None where the request failed, and
            `perplexity`, exp(nats / scored_tokens), too; `error` says why then.
    """

    plan: str
    length: int
    sample: int
    prompt_digest: str
    scored_tokens: int
    nats: float | None
    perplexity: float | None
    kv_bytes: int
    kv_bytes_peak: int
    kv_bytes_dense: int
    error: str | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """What tells this reading from all others of a run."""
        return (self.plan, self.length, self.sample)


Row = TypeVar("Row", Answer, Reading, Timing)


class ResultFile(Generic[Row]):
    """A JSONL file of rows of one type; every row is on disk when `append` returns.

    Args:
        path: the file; made, with its folder, when it is not there. A last line that a killed
            run left half-written is cut off.
        kind: the type of its rows.

    Raises:
        ConfigError: the file cannot be written, or a line of it is not such a row.
    """

    def __init__(self, path: Path, kind: type[Row]) -> None:
        self.path = path
        self.rows: list[Row] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.exists() else b""
            whole = content.rfind(b"\n") + 1
            for number, line in enumerate(content[:whole].splitlines(), start=1):
                self.rows.append(_row(line, kind, f"{path}, line {number}"))
            self._file = path.open("ab")
            self._file.truncate(whole)
        except OSError as error:
            raise ConfigError(f"cannot write results to {path}: {error.strerror}") from error

    def append(self, row: Row) -> None:
        """Add a row."""
        self._file.write(json.dumps(asdict(row), ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.rows.append(row)

    def close(self) -> None:
        """Close the file; its rows stay readable in `rows`."""
        self._file.close()

    def __enter__(self) -> ResultFile[Row]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _row(line: bytes, kind: type[Row], where: str) -> Row:
    hint = (
        f"this is no {kind.__name__.lower()} of tamis bench; delete the line, or give a new --out"
    )
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: {hint} (not JSON: {error})") from error
    names = {field.name for field in fields(kind)}
    if not isinstance(values, dict) or set(values) != names:
        raise ConfigError(f"{where}: {hint}")
    return kind(**values)
