"""The bytes that all pages live in, handed out in blocks to the pools of the page formats."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from tamis.cache.format import UNIT, align
from tamis.errors import ConfigError

MAX_BYTES = (1 << 31) * UNIT
"""What int32 page ids can address: 128 GiB."""


class BlockHolder(Protocol):
    """Whoever takes blocks from an arena (a page pool)."""

    @property
    def empty_blocks(self) -> int:
        """Blocks held in which no page is in use."""

    def give_back(self) -> None:
        """Return every empty block to the arena."""


class Arena:
    """One UNIT-aligned run of bytes, cut into equal blocks.

    A pool takes blocks as it needs pages. A block in which no page is in use any more stays with
    its pool until another pool needs it, so that memory moves between formats without the cost
    of moving it back and forth when nobody else asks.

    Attributes:
        data: uint8 [n_blocks * block_bytes]; its storage begins at its first element. On the CPU
            the system commits the memory only when it is first written.
        block_bytes: bytes of one block, a multiple of UNIT.
        n_blocks: whole blocks in `capacity_bytes`; a remainder is not used.
        bytes_in_use, bytes_peak: bytes of the pages in use, over all pools, now and at most.
    """

    def __init__(
        self,
        capacity_bytes: int,
        device: torch.device | str = "cpu",
        *,
        block_bytes: int,
        pinned: bool = False,
    ) -> None:
        """Reserve the memory.

        Args:
            capacity_bytes: how much, at the most.
            device: where.
            block_bytes: of one block.
            pinned: whether host memory is pinned for CUDA, so that its copies may run while the
                host goes on. That is done, and takes all of it, when the first block is taken.

        Raises:
            ConfigError: `capacity_bytes` is negative or beyond what page ids can address, or
                `block_bytes` is not a positive multiple of UNIT.
        """
        if not 0 <= capacity_bytes <= MAX_BYTES:
            raise ConfigError(
                f"the KV memory is {capacity_bytes} bytes; "
                f"it must be between 0 and {MAX_BYTES >> 30} GiB"
            )
        if block_bytes <= 0 or block_bytes != align(block_bytes):
            raise ConfigError(f"block_bytes is {block_bytes}; it must be a multiple of {UNIT}")
        self.block_bytes = block_bytes
        self.n_blocks = capacity_bytes // block_bytes
        n_bytes, device = self.n_blocks * block_bytes, torch.device(device)
        if device.type == "cpu":
            # numpy, because a sliced torch tensor has a storage offset in every strided view.
            memory = np.empty(n_bytes + UNIT, dtype=np.uint8)
            start = -memory.ctypes.data % UNIT
            self.data = torch.from_numpy(memory[start : start + n_bytes])
            self._to_pin = memory if pinned else None
        else:  # device allocators align far more coarsely than UNIT
            self.data = torch.empty(n_bytes, dtype=torch.uint8, device=device)
            self._to_pin = None
        self.bytes_in_use = 0
        self.bytes_peak = 0
        self._free = list(range(self.n_blocks - 1, -1, -1))  # a stack: lowest block on top
        self._holders: list[BlockHolder] = []

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all blocks."""
        return self.n_blocks * self.block_bytes

    @property
    def free_blocks(self) -> int:
        """Blocks that no pool holds."""
        return len(self._free)

    def register(self, holder: BlockHolder) -> None:
        """Make `holder` one of those that `reclaim` asks for empty blocks."""
        self._holders.append(holder)

    def obtainable_blocks(self, holder: BlockHolder) -> int:
        """Blocks that `holder` could take: the free ones and the other holders' empty ones."""
        others = (other.empty_blocks for other in self._holders if other is not holder)
        return self.free_blocks + sum(others)

    def reclaim(self) -> None:
        """Have every pool give back its empty blocks."""
        for holder in self._holders:
            holder.give_back()

    def take(self, n: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """Hand out `n` of the free blocks (at most `free_blocks`): their numbers, int32 [n].

        Raises:
            ConfigError: the memory is to be pinned, and the system does not allow it.
        """
        if n > self.free_blocks:
            raise AssertionError(f"{n} blocks taken of {self.free_blocks} free ones")
        if self._to_pin is not None:
            _pin(self._to_pin)
            self._to_pin = None
        at = len(self._free) - n
        taken = self._free[at:][::-1]
        del self._free[at:]
        return np.array(taken, dtype=np.int32)

    def put(self, blocks: np.ndarray[tuple[int], np.dtype[np.int32]]) -> None:
        """Take back blocks that a pool no longer needs."""
        self._free.extend(blocks.tolist())

    def account(self, change: int) -> None:
        """Note that the pages in use grew by `change` bytes."""
        self.bytes_in_use += change
        self.bytes_peak = max(self.bytes_peak, self.bytes_in_use)


def _pin(memory: npt.NDArray[np.uint8]) -> None:
    """Pin host memory for CUDA for as long as it exists. torch's own pinned memory would be of the
    next power of two.

    Raises:
        ConfigError: the system does not allow it.
    """
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = memory.ctypes.data
    error = runtime.cudaHostRegister(address, memory.nbytes, 0)
    if int(error):
        raise ConfigError(
            f"{memory.nbytes} bytes of host memory for pages could not be pinned ({error}); "
            "give swap_memory and host_memory less"
        )
    weakref.finalize(memory, _unpin, runtime, address).atexit = False


def _unpin(runtime: Any, address: int) -> None:
    torch.cuda.synchronize()  # copies may be under way
    runtime.cudaHostUnregister(address)
