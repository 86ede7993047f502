"""What a run was: its settings, and where and when it ran; kept beside its results."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from tamis.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """What results depend on besides plan, task and length: all results of a folder share it.

    Attributes:
        model: its name. `parameters`, `dtype`, `device`: of the loaded model; `dtype` says too
            what quantized weights are kept in.
        haystack: the file that facts are hidden in, or "" for the standard library.
        samples, seed, kinds, phrasings: as in `tamis.bench.tasks.samples.Suite`.
        chat: whether prompts went through the model's chat template.
        truncate: whether published prompts longer than the context were cut in their middle.
        new_tokens: tokens generated where speed is measured.
    """

    model: str
    parameters: int
    dtype: str
    device: str
    haystack: str
    samples: int
    seed: int
    kinds: tuple[str, ...]
    phrasings: tuple[str, ...]
    chat: bool
    truncate: bool
    new_tokens: int


@dataclass(frozen=True)
class Record:
    """A run: its settings, and what a reader needs to judge or repeat it.

    Attributes:
        machine: labels and texts, such as ("processor", "AMD EPYC").
        versions: of the programs that matter. `date`: UTC, ISO 8601.
        command: as it was typed.
    """

    settings: Settings
    machine: dict[str, str]
    versions: dict[str, str]
    date: str
    command: str

    def keep(self, path: Path) -> None:
        """Write the record to `path`, unless the results there belong to other settings.

        Raises:
            ConfigError: they do, or `path` cannot be written or read.
        """
        try:
            if path.exists():
                self._check(json.loads(path.read_text(encoding="utf-8")), path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write results to {path}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{path} is not a record of tamis bench: {error}") from error

    def _check(self, saved: dict[str, dict[str, object]], path: Path) -> None:
        mine = json.loads(json.dumps(asdict(self.settings)))
        for field in fields(Settings):
            before, now = saved.get("settings", {}).get(field.name), mine[field.name]
            if before != now:
                raise ConfigError(
                    f"the results in {path.parent} were made with {field.name} {before!r}, not "
                    f"{now!r}; give another --out, or the same settings to go on with them"
                )
