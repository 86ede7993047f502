"""Everything tamis raises on purpose.

Each error carries one sentence that says what was wrong and what would be right; the command
line prints that sentence and exits with status 2.
"""

from __future__ import annotations


class TamisError(Exception):
    """Base of every error that a user can act on."""


class ConfigError(TamisError, ValueError):
    """A setting of the engine is wrong (unknown dtype, malformed memory size, ...)."""


class ModelError(TamisError):
    """A model directory is missing, incomplete or corrupt."""


class UnsupportedModelError(ModelError):
    """The model is sound but its architecture cannot run on per-head KV pages."""


class PlanError(TamisError, ValueError):
    """A plan names an unknown method, a wrong parameter, or methods that cannot be composed."""


class RequestError(TamisError, ValueError):
    """A request cannot be served as it stands (empty prompt, too long, bad sampling parameter)."""


class KVMemoryError(TamisError, MemoryError):
    """The KV memory is too small for one request, however it is scheduled."""


class OverloadError(TamisError):
    """A request would wait for longer than its sender is willing to.

    Attributes:
        retry_s: seconds after which it would not.
    """

    def __init__(self, message: str, retry_s: float) -> None:
        super().__init__(message)
        self.retry_s = retry_s


class EngineError(TamisError, RuntimeError):
    """The engine ended before a request did."""


class TamisWarning(UserWarning):
    """Something works, but not as well as it could on this machine."""
