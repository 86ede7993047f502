"""The protocol: what a method is, stage by stage.

A method decides; the cache moves. It is a frozen dataclass whose fields are the paper's
hyper-parameters, declared with `param`, and one or two functions on tensors. The engine calls
them at the right moments, with a view of one layer (`methods/views.py`), and does what they
return: frees pages, encodes them, reads fewer of them. No method touches a page.

| stage     | decides                                       | is asked                     |
|-----------|-----------------------------------------------|------------------------------|
| `reuse`   | what of reused contexts is computed again     | as a program of passes       |
| `prefill` | which pairs of queries and keys are computed  | per chunk and layer          |
| `tokens`  | which tokens go through which layers          | as a program of passes       |
| `budget`  | how many tokens each head keeps               | before the first eviction    |
| `evict`   | which tokens stay                             | prompt's end, chunk, or step |
| `merge`   | what becomes of evicted tokens                | with every eviction          |
| `heads`   | which heads keep first and recent tokens only | when a request begins        |
| `codec`   | how full pages are stored                     | prompt's end, then per page  |
| `share`   | which layers share their KV                   | prompt's end                 |
| `select`  | what a decode step reads                      | per decode step and layer    |
| `place`   | in which memory pages lie                     | when a request begins        |
| `draft`   | which tokens are proposed for verification    | per decode step              |

Third parties register a class under the entry-point group `tamis.methods`.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tamis.attention.encoding import PageEncoding, restore
from tamis.errors import PlanError
from tamis.methods.views import (
    ChunkView,
    Column,
    DecodeView,
    DraftTree,
    LayerView,
    Merged,
    ModelShape,
    Needs,
    Pass,
    PassResult,
    Selection,
    top_mask,
)

if TYPE_CHECKING:
    from tamis.attention.pattern import SparsePattern
    from tamis.plan import Plan

_LARGEST = int(sys.float_info.max)

STAGES = (
    "reuse",
    "prefill",
    "tokens",
    "budget",
    "evict",
    "merge",
    "heads",
    "codec",
    "share",
    "select",
    "place",
    "draft",
)
"""The stages of a plan, in the order in which they act."""


def param(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    choices: Sequence[Any] | None = None,
) -> Any:
    """A hyper-parameter: a dataclass field with its default, its meaning and its range.

    Args:
        default: the paper's. Its type is the parameter's type: an int is accepted for a float, and
            a parameter annotated `int | float` takes both: a count, or as a decimal a share of at
            most 1.0.
        help: one line for `tamis methods NAME`.
        minimum, maximum: the range, both included; above: an excluded lower bound.
        choices: the only values allowed.
    """
    limits = {"minimum": minimum, "maximum": maximum, "above": above, "choices": choices}
    return field(default=default, metadata={"help": help, **limits})


def budget_param(default: int | float) -> Any:
    """The parameter `budget` of methods that keep a part of the tokens."""
    return param(
        default, "tokens that each KV head keeps, or (a decimal) their share of the prompt", above=0
    )


def resolve(budget: int | float, prompt_tokens: int) -> int:
    """Tokens that a budget means for a prompt: at least 1."""
    tokens = budget if isinstance(budget, int) else round(budget * prompt_tokens)
    return max(1, int(tokens))


def _same(value: Any, other: Any) -> bool:
    """Whether two values of a parameter are the same: 1 token is not 1.0 of all."""
    return type(value) is type(other) and bool(value == other)


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods.

    A subclass states its `stage`, its `paper` ("Title (arXiv:....)") and whether its decisions
    depend on the prompt's question, so that its KV must not be reused for another.
    """

    stage: ClassVar[str]
    paper: ClassVar[str]
    query_dependent: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        """Have every method compare as this class does: a dataclass of its own would be given an
        equality of values, to which 1 token is 1.0 of all."""
        if "__eq__" not in vars(cls):
            cls.__eq__ = Method.__eq__  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        """Check every parameter against its declaration.

        Raises:
            PlanError: a parameter has a wrong type or is out of range.
        """
        for declared in fields(self):
            object.__setattr__(self, declared.name, self._checked(declared))

    def needs(self) -> Needs:
        """What must be gathered for this method while a request runs."""
        return Needs()

    def conflict(self, other: Method) -> str | None:
        """Why this method cannot be composed with `other`, in a clause; None if it can."""
        return None

    def __add__(self, other: Method | Plan | str) -> Plan:
        """The plan of both."""
        from tamis.plan import Plan  # plans are made of methods

        return Plan((self,)) + other

    __radd__ = __add__

    def __eq__(self, other: object) -> bool:
        """Whether both are the same method with parameters of the same types and values."""
        if type(other) is not type(self):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    @classmethod
    def method_name(cls) -> str:
        """The name in plans: the class's, in lower case."""
        return cls.__name__.lower()

    def __str__(self) -> str:
        """The method as a plan writes it: parameters that differ from their defaults."""
        values = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        changed = (
            f"{name}={value!r}" for name, value, default in values if not _same(value, default)
        )
        return f"{self.method_name()}({', '.join(changed)})"

    def _checked(self, declared: Any) -> Any:
        value, meta, default = getattr(self, declared.name), declared.metadata, declared.default
        where = f"{self.method_name()}({declared.name}={value!r})"
        kinds = (int, float) if "|" in str(declared.type) else (type(default),)
        if float in kinds and int not in kinds and type(value) is int:
            value = float(value) if abs(value) <= _LARGEST else math.inf
        if type(value) not in kinds:
            names = " or ".join(kind.__name__ for kind in kinds)
            raise PlanError(f"{where}: {declared.name} must be of type {names}")
        choices = meta.get("choices")
        if choices is not None and value not in choices:
            raise PlanError(
                f"{where}: {declared.name} must be one of {', '.join(map(repr, choices))}"
            )
        minimum, maximum, above = meta.get("minimum"), meta.get("maximum"), meta.get("above")
        if isinstance(value, float) and not math.isfinite(value):
            raise PlanError(f"{where}: {declared.name} must be a finite number")
        if isinstance(value, float) and int in kinds:
            maximum = 1.0  # of something that is counted, a decimal is a share
        if minimum is not None and not value >= minimum:
            raise PlanError(f"{where}: {declared.name} must be at least {minimum}")
        if above is not None and not value > above:
            raise PlanError(f"{where}: {declared.name} must be more than {above}")
        if maximum is not None and not value <= maximum:
            raise PlanError(f"{where}: {declared.name} must be at most {maximum}")
        return value


class Reuse(Method):
    """What is computed again of contexts whose KV, computed for each of them alone, stands for the
    first tokens of a prompt.

    The engine lays them out one after the other, their keys turned to the positions that they have
    there. What follows them is computed as ever, attending to all of them. Requests that name no
    context go by the rest of their plan.
    """

    stage = "reuse"

    @abstractmethod
    def program(
        self, lengths: Sequence[int], prompt_tokens: int, shape: ModelShape
    ) -> Generator[Pass, PassResult, None] | None:
        """The passes that compute some of the reused tokens again, and all tokens after them; None
        if no reused token is.

        In every layer of a pass, the new keys and values of its tokens take the place of those that
        are cached, and each query sees what is cached then of the tokens up to its own. The last
        pass ends with the prompt's last token at the last layer.

        Args:
            lengths: tokens of each context, in the order of the prompt. Those of the first are
                cached as the prompt itself would have them.
            prompt_tokens: tokens of the whole prompt, which begins with the contexts.
            shape: the model's.

        Raises:
            PlanError: the method does not work on such a model.
        """


class Prefill(Method):
    """Sparse attention over the prompt. All keys and values stay."""

    stage = "prefill"

    @abstractmethod
    def pattern(self, view: ChunkView) -> SparsePattern | None:
        """Which pairs are computed for a chunk at one layer; None for all."""


class Tokens(Method):
    """Which tokens go through which layers, as a program: it yields passes, the engine runs each
    (in chunks, in the batch) and sends back what was observed.

    Attributes:
        steps: whether generated tokens have programs of their own (`step`).
    """

    stage = "tokens"
    steps: ClassVar[bool] = False

    def eviction(self) -> Evict | None:
        """What it evicts while it generates, for plans that name no eviction."""
        return None

    @abstractmethod
    def program(self, prompt_tokens: int, shape: ModelShape) -> Generator[Pass, PassResult, None]:
        """The prompt's passes; the last ends with the prompt's last token at the last layer."""

    def step(
        self, token: int, cached: Sequence[Tensor], shape: ModelShape
    ) -> Generator[Pass, PassResult, None] | None:
        """The passes of one generated token; None for an ordinary step.

        Args:
            token: its index in the request.
            cached: per layer the tokens whose KV it holds, ascending, int64.
        """
        return None


class Evict(Method):
    """Which tokens stay. With budget `b`, a head keeps the `b` tokens of highest score.

    Attributes:
        per_chunk: whether it also acts after each chunk of the prompt, so that the prompt's peak
            memory is the budget and one chunk.
        by_head: whether scores and decisions about a head come from its own cached tokens alone,
            their number, positions, attention, keys and values, so that heads of several layers may
            be put to it in one view, as if they were one layer's.
        interval: generated tokens between two evictions; None if nothing is evicted after the
            prompt.
    """

    stage = "evict"
    per_chunk: ClassVar[bool] = False
    by_head: ClassVar[bool] = False
    budget: int | float

    @property
    def interval(self) -> int | None:
        return None

    @property
    def in_cache_positions(self) -> bool:
        """Whether the tokens that stay take consecutive positions, up to the newest token's."""
        return False

    @abstractmethod
    def scores(self, view: LayerView) -> Tensor:
        """Each token's importance, fp32 [kv_heads, tokens]; +inf for those that must stay."""

    def keep(self, view: LayerView, scores: Tensor, budget: Tensor) -> Tensor:
        """Which tokens stay, bool [kv_heads, tokens].

        Args:
            view: the layer.
            scores: what `scores` returned.
            budget: tokens per head, int64 [kv_heads].
        """
        return top_mask(scores.masked_fill(~view.cached, -torch.inf), budget)


class Budget(Method):
    """How many tokens each layer and head keeps, in the end as many as without it."""

    stage = "budget"

    @abstractmethod
    def allocate(
        self, budget: Tensor, views: Sequence[LayerView], scores: Sequence[Tensor]
    ) -> Tensor:
        """Tokens per head, int64 [layers, kv_heads]; at most those that are cached are kept.

        Args:
            budget: what the eviction method would give every head, int64 [layers, kv_heads]; heads
                of layers with fewer KV heads than the most are padded with 0.
            views: every layer.
            scores: per layer the eviction method's scores, [kv_heads, tokens].
        """


class Merge(Method):
    """What becomes of evicted tokens: their keys and values change those that stay.

    Attributes:
        of_eviction: its parameters that nothing but the eviction it brings uses.
    """

    stage = "merge"
    of_eviction: ClassVar[tuple[str, ...]] = ("budget",)

    def conflict(self, other: Method) -> str | None:
        """Another eviction, where this method was given parameters for its own."""
        defaults = {f.name: f.default for f in fields(self) if f.name in self.of_eviction}
        given = [name for name in defaults if not _same(getattr(self, name), defaults[name])]
        if not isinstance(other, Evict) or not given:
            return None
        return (
            f"{self.method_name()} uses {' and '.join(given)} in the eviction that it brings, and "
            f"here {other.method_name()} evicts; set the budget of {other.method_name()} instead"
        )

    @abstractmethod
    def eviction(self) -> Evict:
        """The eviction of its paper, for plans that name none."""

    @abstractmethod
    def merge(self, view: LayerView, scores: Tensor, kept: Tensor) -> Merged:
        """The kept tokens that take in evicted ones.

        Args:
            view: the layer before the eviction.
            scores: the eviction method's, [kv_heads, tokens].
            kept: which tokens stay, bool [kv_heads, tokens].
        """


class Heads(Method):
    """Which heads keep only the first tokens and the recent ones.

    Attributes:
        during_prefill: whether these heads attend so in the prompt already.
        compensate: whether one token with the mean key and value of all that a head dropped stands
            for them, counted as often as there were.
    """

    stage = "heads"
    during_prefill: ClassVar[bool] = False
    compensate: ClassVar[bool] = False

    @abstractmethod
    def streaming(self, shape: ModelShape) -> list[Tensor]:
        """Per layer which heads are so, bool [kv_heads].

        Raises:
            PlanError: it has not been fitted for this model.
        """

    @abstractmethod
    def span(self, prompt_tokens: int) -> tuple[int, int]:
        """How many first and how many recent tokens those heads keep."""


class Codec(Method):
    """How full pages are stored, once they are older than the last `residual` tokens."""

    stage = "codec"
    residual: int

    @abstractmethod
    def columns(self, page_size: int, k_dim: int, v_dim: int, dtype: torch.dtype) -> list[Column]:
        """The fields of an encoded page of `page_size` tokens of one head.

        Raises:
            PlanError: the parameters do not fit these sizes.
        """

    @abstractmethod
    def encode(self, k: Tensor, v: Tensor, view: LayerView) -> dict[str, Tensor]:
        """Encode whole pages of a layer.

        Args:
            k: [kv_heads, pages, page_size, k_dim]; v: [kv_heads, pages, page_size, v_dim].
            view: the layer, the tokens that are encoded still among the cached ones.

        Returns:
            Every field: [kv_heads, pages, page_size or rows, width].
        """

    def encoding(self) -> PageEncoding | None:
        """What the fields mean, so that attention can read them as they are; None for a codec with
        a `decode` of its own, whose pages are decoded a few at a time to be read."""
        return None

    def decode(self, page: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values of encoded pages, fp32, from the fields as `encode` returned them: by the
        `encoding`, unless a codec without one overrides this."""
        encoding = self.encoding()
        if encoding is None:
            raise TypeError(f"{type(self).__name__} must define `encoding` or `decode`")
        return restore(page, encoding)


class Share(Method):
    """Which pairs of layers share their KV, and how one stored copy gives both."""

    stage = "share"

    @abstractmethod
    def pairs(self, n_layers: int) -> list[tuple[int, int]]:
        """The pairs of layers, each layer in one at most."""

    @abstractmethod
    def columns(self, k_dim: int, v_dim: int, dtype: torch.dtype) -> list[Column]:
        """The fields of a shared page, per token (rows None)."""

    @abstractmethod
    def merge(
        self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Merge the KV of two layers.

        Args:
            first, second: keys and values of both, [kv_heads, tokens, k_dim or v_dim].

        Returns:
            Which tokens are merged, bool [tokens], and the fields of those, [kv_heads, m, width].
        """

    @abstractmethod
    def restore(self, page: dict[str, Tensor], member: int) -> tuple[Tensor, Tensor]:
        """Keys and values, fp32, of the first (0) or second (1) layer.

        Args:
            page: the fields, [..., tokens, width] each.
            member: 0 or 1.
        """


class Select(Method):
    """What a decode step reads. All KV stays.

    Attributes:
        reads_tokens: whether it selects single tokens rather than whole pages.
    """

    stage = "select"
    reads_tokens: ClassVar[bool] = False

    def summaries(self, k_dim: int, dtype: torch.dtype) -> list[Column]:
        """What is kept about every full page, one row each (rows = 1)."""
        return []

    def summarize(self, k: Tensor) -> dict[str, Tensor]:
        """The summaries, [..., width], of full pages with keys [..., page_size, k_dim]."""
        return {}

    @abstractmethod
    def select(self, view: DecodeView) -> Selection | None:
        """What the step reads of this layer; None for everything."""


class Place(Method):
    """In which memory the pages of each head lie. Results stay exact."""

    stage = "place"

    @abstractmethod
    def on_device(self, shape: ModelShape) -> list[Tensor]:
        """Per layer which heads' pages stay on the device, bool [kv_heads]; those of the others lie
        in host memory and are brought in when their layer runs."""


class Draft(Method):
    """Which tokens are proposed. What is generated stays what it would be without."""

    stage = "draft"

    @abstractmethod
    def start(self, vocab_size: int) -> Any:
        """What it learns while it runs, shared by all requests of one plan."""

    @abstractmethod
    def propose(self, learned: Any, token: int) -> DraftTree:
        """Continuations of a request whose last token is `token`."""

    @abstractmethod
    def learn(self, learned: Any, tokens: Tensor, logits: Tensor) -> None:
        """Note, in place, what the model gave after each of the tokens [m]: logits [m, vocab]."""
