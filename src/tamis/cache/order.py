"""Where the tokens of rows lie once some were taken out and their slots given to others."""

from __future__ import annotations

import numpy as np

from tamis.cache.pool import IntArray


class TokenOrder:
    """The slots of each row's tokens, in the order of their positions.

    A row of `n` tokens fills slots 0 .. n - 1. Its token `i` lies in slot `i` until `take_out`
    gives a slot to the token of the last one; what is appended takes the next slot, in order again.

    Attributes:
        mixed: which rows have a token elsewhere than in its own slot, bool [rows].
    """

    def __init__(self, n_rows: int) -> None:
        self.mixed = np.zeros(n_rows, dtype=np.bool_)
        self._slots: IntArray = np.zeros((n_rows, 0), dtype=np.int32)  # i beyond a row's tokens

    def copy(self) -> TokenOrder:
        """The same order, for a fork."""
        other = TokenOrder(0)
        other.mixed, other._slots = self.mixed.copy(), self._slots.copy()
        return other

    def slots(self, rows: slice, n: int) -> IntArray:
        """Slots of the first `n` tokens of some rows, int32 [rows, n]: `i` where a row has fewer
        than `i`."""
        self._widen(n)
        return self._slots[rows, :n]

    def ends_in_order(self, lengths: IntArray, n: int) -> bool:
        """Whether the last `n` tokens of every row, of lengths[i] >= n tokens, lie in order at its
        end."""
        rows = np.flatnonzero(self.mixed)
        last = lengths[rows, None] - np.arange(1, n + 1, dtype=np.int32)
        self._widen(int(lengths.max()))
        return bool((self._slots[rows[:, None], last] == last).all())

    def take_out(self, rows: IntArray, tokens: IntArray, lengths: IntArray) -> IntArray:
        """Take token tokens[i] out of rows[i], which holds lengths[i], and give its slot to the
        token in the last slot.

        Returns:
            The slots that were given away, int32 [n]; the last one where its own token left.
        """
        self._widen(int(lengths.max(initial=0)))
        freed = self._slots[rows, tokens]
        left = lengths - 1
        columns = (array.tolist() for array in (rows, tokens, freed, left))
        for row, token, slot, last in zip(*columns, strict=True):
            slots = self._slots[row]
            # What was appended last lies last, unless its own slot was given away before.
            holder = last if slots[last] == last else int((slots[: last + 1] == last).argmax())
            slots[holder] = slot
            slots[token:last] = slots[token + 1 : last + 1]
            slots[last] = last
        self.mixed[rows] |= freed != left
        return freed

    def settle(self, rows: IntArray) -> None:
        """Note that the tokens of these rows were moved to their own slots."""
        self._slots[rows] = np.arange(self._slots.shape[1], dtype=np.int32)
        self.mixed[rows] = False

    def _widen(self, n: int) -> None:
        n_rows, width = self._slots.shape
        if n > width:
            width = max(n, 2 * width)
            slots = np.tile(np.arange(width, dtype=np.int32), (n_rows, 1))
            slots[:, : self._slots.shape[1]] = self._slots
            self._slots = slots
