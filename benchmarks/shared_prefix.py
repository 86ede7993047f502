"""Requests that share a long prefix, and a context asked about again, with and without reuse.

    python benchmarks/shared_prefix.py --threads 2

First, engines with and without `prefix_cache` run in turns over the same prompts, each of them new
and so empty. Then one layer's decode attention over a shared prefix, for all sequences at once
(Hydragen) against each by itself, tells from where on that pays. The model has random weights: what
it says does not matter, what it computes does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from random_llama import LlamaShape
from tamis import LLM, SamplingParams
from tamis.attention import decode
from tamis.cache import BatchView, CacheLayout, CommonPrefix, LayerShape, PagedCache, PrefixTree
from tamis.engine.shared import WORTH, SharedDecode
from tamis.engine.views import LayerOptions
from tamis.model import Model, load_model
from timing import Spread, in_turns

PAGE = 64


class Workload:
    """Prompts with one prefix, and what it takes to answer them.

    Args:
        model: a loaded model.
        shared: tokens of the prefix; own: tokens of each prompt after it.
        requests: how many prompts.
        new: tokens of each answer.
    """

    def __init__(self, model: Model, shared: int, own: int, requests: int, new: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(n: int) -> list[int]:
            return torch.randint(0, model.vocab_size, (n,), generator=generator).tolist()

        prefix = draw(shared)
        self.prompts = [prefix + draw(own) for _ in range(requests)]
        self.params = SamplingParams(max_tokens=new, ignore_eos=True)
        self._model = model
        # Twice what all of them take when nothing is shared.
        self._kv_bytes = 2 * requests * (shared + own + new) * model.kv_bytes_per_token + (64 << 20)

    def run(self, reuse: bool) -> dict[str, float]:
        """Answer all prompts at once, and then, in another engine, two of them one by one.

        Returns:
            Generated tokens per second of the whole batch; seconds to the first token of one
            prompt, and of the next one over the same prefix.
        """
        settings = {"kv_memory": self._kv_bytes, "page_size": PAGE, "prefix_cache": reuse}
        llm = LLM(self._model, **settings)
        start = time.perf_counter()
        outputs = llm.generate(self.prompts, self.params)
        seconds = time.perf_counter() - start
        llm = LLM(self._model, **settings)
        first, again = (llm.generate([p], self.params)[0].metrics for p in self.prompts[:2])
        return {
            "tokens_s": sum(len(output.token_ids) for output in outputs) / seconds,
            "first_s": first.ttft_s or 0.0,
            "again_s": again.ttft_s or 0.0,
        }


class OneLayer:
    """One step's attention of sequences that share a prefix, at one layer of a model's shape.

    Args:
        model: whose heads these are.
        shared: tokens of the prefix, whole pages.
        sequences: how many.
    """

    def __init__(self, model: Model, shared: int, sequences: int) -> None:
        spec, self.n = model.layers[0], sequences
        shape = LayerShape(spec.kv_heads, spec.k_dim, spec.v_dim)
        layout = CacheLayout((shape,), PAGE, model.dtype)
        cache = PagedCache(layout, 2 * layout.bytes_for(shared + sequences * PAGE) + (8 << 20))
        generator = torch.Generator().manual_seed(0)
        tree, first = PrefixTree(cache), cache.new_sequence()

        def grow(sequence, n: int) -> None:
            sequence.reserve(n)
            at = torch.arange(sequence.next_position, sequence.next_position + n).int()
            k, v = (
                torch.randn(n, spec.kv_heads, dim, generator=generator).to(model.dtype)
                for dim in (spec.k_dim, spec.v_dim)
            )
            BatchView(cache, [sequence], [n], at).append(0, k, v)
            sequence.advance(n)

        grow(first, shared)
        block = tree.extend(None, [0] * shared, first)
        members = [tree.begin(block) for _ in range(sequences)]
        for sequence in members:
            grow(sequence, 16)
        at = torch.full((sequences,), shared + 16, dtype=torch.int32)
        self.view = BatchView(cache, members, [0] * sequences, at)
        self.q = torch.randn(
            sequences, spec.q_heads, spec.k_dim, generator=generator, dtype=torch.float32
        ).to(model.dtype)
        self.options = LayerOptions(spec.k_dim**-0.5, None, None, None)
        common = CommonPrefix.of(self.view, sequences, least=0)
        assert common is not None
        self.together = SharedDecode(common, sequences)

    def seconds(self, *, together: bool, repeats: int = 20) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        for _ in range(repeats):
            if together:
                self.together(0, self.q, self.options)
            else:
                pages = self.view.pages(0, 0, self.n, with_new=True)
                decode(self.q, pages, scale=self.options.scale)
        return (time.perf_counter() - start) / repeats


def reuse_lines(samples: dict[str, list[dict[str, float]]]) -> list[str]:
    """What the engines did, as a table in Markdown; medians."""
    table = [
        "| | tokens/s | times as many | first token, s | repeated context, s | of the first |",
        "|---|---|---|---|---|---|",
    ]
    base = None
    for kind, runs in samples.items():
        rate, first, again = (
            Spread.of([run[name] for run in runs]).median
            for name in ("tokens_s", "first_s", "again_s")
        )
        base = base or rate
        table.append(
            f"| {kind} | {rate:.0f} | {rate / base:.1f} | {first:.3f} | {again:.3f} | "
            f"{again / first:.3f} |"
        )
    return table


def attention_lines(model: Model, shared: Sequence[int], sequences: Sequence[int], rounds: int):
    """One layer's attention together and apart, as a table in Markdown; medians."""
    table = [
        "| shared tokens | sequences | apart, us | together, us | times as fast | is shared |",
        "|---|---|---|---|---|---|",
    ]
    for n_tokens in shared:
        for n in sequences:
            layer = OneLayer(model, n_tokens, n)
            runs = {
                name: lambda layer=layer, name=name: layer.seconds(together=name == "together")
                for name in ("apart", "together")
            }
            taken = {k: Spread.of(s).median for k, s in in_turns(runs, rounds).items()}
            worth = "yes" if (n - 1) * n_tokens >= WORTH else "no"
            table.append(
                f"| {n_tokens} | {n} | {taken['apart'] * 1e6:.0f} | {taken['together'] * 1e6:.0f} "
                f"| {taken['apart'] / taken['together']:.2f} | {worth} |"
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a directory; by default a random 27M Llama")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shared", type=int, default=4096, help="tokens of the prefix")
    parser.add_argument("--own", type=int, default=32, help="tokens of each prompt after it")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--new", type=int, default=32, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write every sample")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        directory = args.model or Path(folder)
        if args.model is None:
            LlamaShape().save(directory)
        model = load_model(directory, dtype="auto", device="cpu")
        workload = Workload(model, args.shared, args.own, args.requests, args.new)
        workload.run(reuse=True)  # warm
        runs = {
            "computed by each request": lambda: workload.run(reuse=False),
            "computed once": lambda: workload.run(reuse=True),
        }
        samples = in_turns(runs, args.rounds)
        print("\n".join(reuse_lines(samples)), end="\n\n")
        with torch.inference_mode():
            print("\n".join(attention_lines(model, (1024, 4096, 16384), (2, 4, 16), args.rounds)))
    if args.json:
        args.json.write_text(json.dumps(samples, indent=2) + "\n")


if __name__ == "__main__":
    main()
