"""How many requests are worked on at once, and when to come back."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tamis.server.errors import ApiError

_SMOOTHING = 0.1
_LONGEST_S = 60


class Admission:
    """Counts requests from their arrival to their end, and refuses what is too many.

    Args:
        limit: requests at once.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._last_end: float | None = None
        self._interval_s = 1.0  # between the ends of two requests, on a moving average
        self.n_open = 0
        self.draining = False

    @property
    def full(self) -> bool:
        return self.n_open >= self._limit

    @property
    def retry_s(self) -> int:
        """Whole seconds until a request may be expected to have ended."""
        return min(_LONGEST_S, max(1, math.ceil(self._interval_s)))

    @contextmanager
    def request(self) -> Iterator[None]:
        """Inside, one request is worked on.

        Raises:
            ApiError: there are too many (429), or the server is about to stop (503).
        """
        headers = {"Retry-After": str(self.retry_s)}
        if self.draining:
            raise ApiError(503, "the server is about to stop", "stopping", headers=headers)
        if self.full:
            message = f"{self.n_open} requests are open, which is the most; try again later"
            raise ApiError(429, message, "too_many_requests", headers=headers)
        self.n_open += 1
        try:
            yield
        finally:
            self.n_open -= 1
            self._note_end()

    def _note_end(self) -> None:
        now = time.monotonic()
        if self._last_end is not None:
            self._interval_s += _SMOOTHING * (now - self._last_end - self._interval_s)
        self._last_end = now
