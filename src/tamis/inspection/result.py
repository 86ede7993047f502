"""What a plan did to one request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tamis.engine.outputs import RequestMetrics
from tamis.engine.trace import ReadStep
from tamis.errors import RequestError


@dataclass(frozen=True)
class Steps:
    """What the steps after the prompt read.

    Attributes:
        generated: tokens that had been generated and cached before each step, int64 [steps].
        tokens: tokens read, the mean of a layer's heads, float64 [steps, layers].
        dense: tokens that exact attention would have read, int64 [steps, layers].
    """

    generated: NDArray[np.int64]
    tokens: NDArray[np.float64]
    dense: NDArray[np.int64]

    @property
    def share(self) -> NDArray[np.float64]:
        """Tokens read of those that exact attention would have read, at most 1, [steps, layers]."""
        return np.minimum(self.tokens / self.dense, 1.0)


@dataclass(frozen=True)
class Inspection:
    """What a plan did to one request. Token numbers count the prompt from 0, then the output.

    Attributes:
        model: the model's name.
        plan: the plan, as a string.
        prompt_token_ids: the prompt.
        prompt_texts: what each of its tokens shows; joined, the prompt's text. A token that ends
            within a character shows nothing, the one that completes it the whole of it.
        output_token_ids, output_text: what was generated.
        positions: per layer and KV head the numbers of the tokens whose keys and values were
            cached at the end, ascending, int32. The last generated token's are never computed.
        budgets: tokens that each KV head may keep, per layer; None in plans that set no budget.
        bytes: per layer the bytes of its pages at the end, by what they are: "live" for exact
            keys and values on the device, else the store's name ("codec", "share", "host", "rest");
            "waiting" for hidden states of tokens that wait at the layer's input.
        dense_bytes: per layer the bytes of exact attention for the same tokens.
        reads: what each step after the prompt read of each layer.
        density: per layer the pairs of queries and keys that the prompt computed, as a share of
            those of exact attention; more than 1 where tokens ran through the layer twice.
        windows: per layer its sliding window in tokens, None where it has none.
        page_size: tokens per page of one KV head.
        metrics: times and KV memory of the request.
    """

    model: str
    plan: str
    prompt_token_ids: tuple[int, ...] = field(repr=False)
    prompt_texts: tuple[str, ...] = field(repr=False)
    output_token_ids: tuple[int, ...]
    output_text: str
    positions: tuple[tuple[NDArray[np.int32], ...], ...] = field(repr=False)
    budgets: tuple[tuple[int, ...], ...] | None
    bytes: tuple[dict[str, int], ...]
    dense_bytes: tuple[int, ...]
    reads: tuple[ReadStep, ...] = field(repr=False)
    density: tuple[float, ...]
    windows: tuple[int | None, ...]
    page_size: int
    metrics: RequestMetrics

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def n_heads(self) -> int:
        """KV heads of all layers together."""
        return sum(map(len, self.positions))

    def kept(self) -> NDArray[np.bool_]:
        """Which prompt tokens each KV head keeps, layer after layer, bool [heads, tokens]."""
        kept = np.zeros((self.n_heads, self.n_prompt), dtype=np.bool_)
        for row, numbers in zip(
            kept, (head for layer in self.positions for head in layer), strict=True
        ):
            row[numbers[numbers < self.n_prompt]] = True
        return kept

    def keep_counts(self) -> NDArray[np.int64]:
        """How many KV heads, of all layers together, keep each prompt token, int64 [tokens]."""
        counts: NDArray[np.int64] = self.kept().sum(0, dtype=np.int64)
        return counts

    def steps(self) -> Steps:
        """What the steps after the prompt read, layer by layer; no steps where nothing followed
        the prompt's own next token."""
        generated = sorted({read.step for read in self.reads})
        row = {step: i for i, step in enumerate(generated)}
        tokens = np.zeros((len(generated), len(self.positions)))
        for read in self.reads:
            tokens[row[read.step], read.layer] += np.mean(read.tokens)
        number = np.array(generated, dtype=np.int64)
        window = np.array([w or np.iinfo(np.int64).max for w in self.windows])
        return Steps(number, tokens, np.minimum(self.n_prompt + number[:, None] + 1, window))

    def find(self, text: str) -> list[range]:
        """The prompt's tokens that show a text, for every place where it stands.

        Raises:
            RequestError: the text is empty, or stands nowhere in the prompt.
        """
        whole = "".join(self.prompt_texts)
        ends = np.array(list(accumulate(map(len, self.prompt_texts))), dtype=np.int64)
        found = []
        at = whole.find(text) if text else -1
        while at >= 0:
            # The first token that ends beyond the text's first character, to the one of its last.
            first, last = np.searchsorted(ends, (at, at + len(text) - 1), side="right").tolist()
            found.append(range(first, last + 1))
            at = whole.find(text, at + len(text))
        if not found:
            raise RequestError(
                f"{text!r} does not stand in the prompt; give a text as it is written there"
            )
        return found

    def read_share(self, tokens: range) -> float | None:
        """How often the steps after the prompt read these prompt tokens.

        Args:
            tokens: at least one.

        Returns:
            Over all steps, layers, KV heads and these tokens, the share in which the token was in
            the cache (at the end) and its page was read; None where there were no steps, or where
            a step left out tokens that no page tells.
        """
        hits = total = 0.0
        for read in self.reads:
            all_read = read.tokens == read.cached or self.windows[read.layer] is not None
            if read.pages is None and not all_read:
                return None
            hits += self._share_of_heads(read, tokens) * len(read.tokens)
            total += len(read.tokens)
        return hits / total if total else None

    def _share_of_heads(self, read: ReadStep, tokens: range) -> float:
        """The share of a layer's heads, and of these tokens, that a step read."""
        shares = []
        for head, numbers in enumerate(self.positions[read.layer]):
            index = np.flatnonzero((numbers >= tokens.start) & (numbers < tokens.stop))
            if read.pages is not None:
                index = index[np.isin(index // self.page_size, read.pages[head])]
            shares.append(len(index) / len(tokens))
        return float(np.mean(shares))

    def to_html(self, path: str | Path, highlight: str | Sequence[str] | None = None) -> None:
        """Write one page that shows all this, and asks nothing of the network.

        Args:
            path: the file; its folder is made.
            highlight: one or more texts of the prompt, such as the answer: they are outlined, and
                the page says how many heads keep them.

        Raises:
            RequestError: a text stands nowhere in the prompt.
            ConfigError: the file cannot be written.
        """
        from tamis.inspection.page import write_page

        texts = [highlight] if isinstance(highlight, str) else list(highlight or ())
        write_page(Path(path), self, texts)
