"""Decode steps that are recorded once, over memory that stays where it is, and run again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tamis.attention import decode
from tamis.attention.encoding import PageEncoding
from tamis.cache import FixedBatch, FixedStores, PagedCache, PageFormat, Store, worth_sharing
from tamis.engine import encoded, stores
from tamis.engine.flat import FlatBatch
from tamis.engine.sequence import Sequence
from tamis.engine.shared import WORTH
from tamis.engine.views import LayerOptions
from tamis.model import Model

_log = logging.getLogger(__name__)

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Runs a function of no arguments, which reads and writes tensors that stay where they are, and
gives back what does the same again, for whatever these tensors then hold."""

MOST = 32
"""Recorded steps that are kept."""

LEAST_PAGES = 16
"""The narrowest page tables: widths below it are not told apart, for they cost the same."""

MOST_ENTRIES = 1 << 22
"""Entries of the largest page tables, 16 MiB: a step over more takes the device so long that how it
is launched does not matter, and each size has tables of its own."""


class CudaCapture:
    """Records functions in CUDA graphs, which share one pool of memory: what one of them returned
    may be overwritten when another one runs.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """See `Capture`.

        Raises:
            RuntimeError: `run` does what cannot be recorded, such as to wait for the device.
        """
        caller = torch.cuda.current_stream(self._stream.device)
        graph = torch.cuda.CUDAGraph()
        # The outer context brings the caller's stream back even where a capture fails.
        with torch.cuda.stream(self._stream):
            self._stream.wait_stream(caller)
            run()  # kernels are compiled, and libraries take their workspaces
            with torch.cuda.graph(
                graph, self._pool, self._stream, capture_error_mode="thread_local"
            ):
                result = run()
        caller.wait_stream(self._stream)

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def run_again(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The `Capture` of devices without graphs: nothing is recorded, the function itself runs."""
    return run


def capture_for(device: torch.device, wanted: bool | None) -> Capture | None:
    """How decode steps are recorded on a device; None for not at all.

    Args:
        device: the model's.
        wanted: whether they shall be; None for where it gains something, which is CUDA.
    """
    on_gpu = device.type == "cuda"
    if not (on_gpu if wanted is None else wanted):
        return None
    return CudaCapture(device) if on_gpu else run_again


class DecodeGraphs:
    """Decode steps, each recorded for a number of rows and a width of the page tables.

    A step over few sequences launches hundreds of short kernels, and the host takes longer to
    launch them than the device to run them; a recorded step is launched at once. Both numbers are
    rounded up to powers of two, so that few steps are recorded; rows too many are empty
    (`FixedBatch`), and of page tables too wide nothing is read.

    Steps qualify in which every sequence adds one token, reads all of its live pages and, beside
    encoded ones, nothing else, and has nothing observed; whose encoded pages, where some have them,
    are of one kind; and which share no prefix that is worth reading once
    (`SharedDecode`). Models whose RoPE depends on the sequence's length never qualify.

    Args:
        model: what runs.
        cache: where the sequences' pages lie.
        capture: how a step is recorded.
        most: recorded steps that are kept; the one that was not used for longest goes first.

    Attributes:
        recorded: steps that were recorded, again after they were forgotten included.
        run: steps that ran so.
    """

    def __init__(self, model: Model, cache: PagedCache, capture: Capture, most: int = MOST) -> None:
        self.recorded = 0
        self.run = 0
        self._model = model
        self._cache = cache
        self._capture: Capture | None = capture
        self._most = most
        self._steps: dict[_Size, _Step] = {}  # the last used one last

    def logits(self, sequences: Seq[Sequence], flat: FlatBatch) -> Tensor | None:
        """Run a step of some sequences, if it qualifies.

        When it cannot be recorded a warning says so, and no later step qualifies.

        Args:
            sequences: of the step, their pages reserved; flat: their tokens.

        Returns:
            fp32 [sequences, vocab]; None if the step is to run as any other.
        """
        if self._capture is None or not self._qualifies(sequences, flat):
            return None
        n, caches = len(sequences), [s.cache for s in sequences if s.cache is not None]
        found = [None if s.life is None else stores.readable(s.life) for s in sequences]
        kinds = {_Kind.of(*one) for one in found if one is not None}
        if len(kinds) > 1:
            return None
        rows = _power(n)
        width = _power(max(LEAST_PAGES, *(cache.width for cache in caches)))
        held = [None if one is None else one[0] for one in found]
        beside = max((int(store.page_counts.max()) for store in held if store), default=0)
        if rows * max(width, beside) * self._cache.layout.n_rows > MOST_ENTRIES:
            return None
        beside = _power(max(LEAST_PAGES, beside)) if kinds else 0
        step = self._step(_Size(rows, width, beside, *kinds), held)
        batch = step.batch
        batch.fill(caches, flat.tokens, flat.positions)
        if worth_sharing(batch.tables[:n], batch.lengths[:n], batch.layout, WORTH):
            return None
        batch.send()
        if step.beside is not None:
            step.beside.fill(held)
        replay = step.replay or self._record(step, self._capture)
        if replay is None:
            return None
        self.run += 1
        return replay()[:n].clone()  # the next step overwrites what this one returned

    def _qualifies(self, sequences: Seq[Sequence], flat: FlatBatch) -> bool:
        n = len(sequences)
        return (
            not self._model.dynamic_rope
            and flat.rows is None
            and len(flat.tokens) == n
            and flat.sample_at == list(range(n))
            and all(map(_plain, sequences))
        )

    def _step(self, size: _Size, encoded: Seq[Store | None]) -> _Step:
        """The step of that size, recorded or not, which is now the last used one.

        Args:
            encoded: the stores of encoded pages of a step of that size.
        """
        step = self._steps.pop(size, None)
        if step is None:
            like = next(filter(None, encoded), None)
            step = _Step(
                FixedBatch(self._cache, size.rows, size.width),
                None if like is None else FixedStores(like, size.rows, size.beside),
                None if size.kind is None else size.kind.encoding,
            )
            while len(self._steps) >= self._most:
                del self._steps[next(iter(self._steps))]
        self._steps[size] = step
        return step

    def _record(self, step: _Step, capture: Capture) -> Callable[[], Tensor] | None:
        """Record a step whose batch has been sent; None if that fails."""
        try:
            step.replay = capture(_forward(self._model, step))
        except RuntimeError as error:  # torch's errors of CUDA are such
            first = _first(error)
            _log.warning(
                "a decode step of %d rows could not be recorded, so no later one will be: %s: %s",
                step.batch.rows,
                type(first).__name__,
                first,
            )
            self._capture = None
            self._steps.clear()
            return None
        self.recorded += 1
        return step.replay


class _Kind(NamedTuple):
    """How encoded pages are read: as what, and in which format at the first of their layers, which
    tells their methods' sizes apart (as in `EncodedDecode`)."""

    encoding: PageEncoding
    format: PageFormat

    @classmethod
    def of(cls, store: Store, encoding: PageEncoding) -> _Kind:
        return cls(encoding, next(iter(store.formats.values())))


class _Size(NamedTuple):
    """What tells recorded steps apart: rows; pages of the widest live table, and of the widest of
    encoded pages; and how these are read, None where there are none."""

    rows: int
    width: int
    beside: int = 0
    kind: _Kind | None = None


@dataclass
class _Step:
    """A step of one size: what it reads, the encoded pages and how they are read among it, and what
    runs it once it is recorded, which returns logits [rows, vocab]."""

    batch: FixedBatch
    beside: FixedStores | None
    encoding: PageEncoding | None
    replay: Callable[[], Tensor] | None = None


def _forward(model: Model, step: _Step) -> Callable[[], Tensor]:
    """The model's forward over what a step holds whenever it runs; the host is not asked."""
    batch, beside, encoding = step.batch, step.beside, step.encoding
    rows = torch.arange(batch.rows, device=batch.tokens.device)

    def attend(
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        batch.append(layer, k, v)
        state = decode(
            q,
            batch.pages(layer),
            scale=scale,
            positions=batch.positions,
            window=window,
            softcap=softcap,
            sinks=sinks,
        )
        pages = None if beside is None else beside.pages(layer)
        if pages is not None and encoding is not None:
            options = LayerOptions(scale, window, softcap, sinks)
            state = encoded.merged(state, q, pages, encoding, options)
        return state[0]

    def run() -> Tensor:
        return model.forward(batch.tokens.long(), batch.positions.long(), rows, attend)

    return run


def _plain(sequence: Sequence) -> bool:
    """Whether a sequence's token reads all its live pages and, beside encoded ones that attention
    reads where they lie, nothing else; unobserved."""
    cache, life = sequence.cache, sequence.life
    if cache is None or cache.room < 1 or sequence.draft is not None or not sequence.direct:
        return False
    if life is None:
        return True
    observed = life.listens or (life.plan.needs.similarity and not life.generating)
    begun = life.layers[-1].options is not None  # which a step that runs as any other notes
    return begun and not observed


def _first(error: BaseException) -> BaseException:
    """What went wrong first: that a capture is ended by an error is itself an error."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _power(n: int) -> int:
    """The least power of two that is not below `n`."""
    return 1 << (n - 1).bit_length()
