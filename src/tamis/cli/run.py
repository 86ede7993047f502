"""`tamis run`: one prompt, its answer as it comes, and what that cost."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tamis.cli import options, terminal
from tamis.errors import RequestError

if TYPE_CHECKING:
    from tamis.engine.outputs import Increment, RequestMetrics
    from tamis.llm import LLM

STDIN = "-"


def run(
    model: options.Model,
    prompt_file: options.PromptFile = None,
    prompt: options.PromptText = None,
    question: options.Question = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens to generate.")] = 256,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 always takes the most probable token.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="Sample among the tokens of this total probability.")
    ] = 1.0,
    top_k: Annotated[
        int | None, typer.Option(metavar="K", help="Sample among the K most probable tokens.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Makes sampling repeatable.")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End at this text; may be given several times."),
    ] = None,
    chat: options.Chat = None,
    plan: options.Plan = "dense",
    dtype: options.Dtype = "auto",
    weights: options.Weights = None,
    kv_memory: options.KVMemory = "4GiB",
    max_batch_tokens: options.MaxBatchTokens = 2048,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Answer one prompt.

    The answer goes to stdout as it comes, then a line of measurement to stderr. Ctrl-C ends it:
    what was generated so far stays, and the exit status is 130.

    Example: tamis run --model DIR --prompt-file report.txt --question "What was decided?"
    """
    from tamis.plan import Plan
    from tamis.sampling import SamplingParams

    text = read_prompt(prompt, prompt_file, question)
    its_plan = Plan.parse(plan)
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop or (),
    )
    from tamis.llm import LLM

    terminal.quiet_logs(debug)
    llm = LLM(
        model,
        plan=its_plan,
        dtype=dtype,
        weights=weights,
        kv_memory=kv_memory,
        max_batch_tokens=max_batch_tokens,
    )
    tokens = encode_prompt(llm, text, chat)
    answer = _Answer(len(tokens), live=not as_json)
    try:
        increments = llm.stream(tokens, params)
        with terminal.prefill_bar(llm.engine.stats, len(tokens)) as bar:
            for increment in increments:
                bar.stop()
                answer.add(increment)
    except KeyboardInterrupt:
        answer.end()
        raise
    answer.end()
    if answer.error is not None:
        raise RequestError(f"the request failed: {answer.error}")
    if answer.metrics is not None:
        terminal.say(measurement(answer.metrics))


def read_prompt(prompt: str | None, prompt_file: str | None, question: str | None) -> str:
    """The text that the options name: a prompt or a file's text, then the question.

    Raises:
        RequestError: the options name no text or two, or the text cannot be read.
    """
    if prompt is not None and prompt_file is not None:
        raise RequestError("--prompt and --prompt-file were both given; give one of them")
    if STDIN in (prompt, prompt_file):
        text: str | None = _decode(sys.stdin.buffer.read(), "standard input")
    elif prompt_file is not None:
        text = read_text(prompt_file)
    else:
        text = prompt
    parts = [part for part in (text, question) if part is not None]
    if not parts:
        raise RequestError("no prompt; give --prompt-file FILE, --prompt TEXT or --question TEXT")
    return "\n\n".join(parts)


def encode_prompt(llm: LLM, text: str, chat: bool | None) -> list[int]:
    """The token ids of a prompt, in the model's chat template where it has one or `chat` says so.

    Raises:
        RequestError: the model has no tokenizer, or `chat` asks for a template that is not there.
    """
    if llm.has_chat_template if chat is None else chat:
        return llm.encode_chat([{"role": "user", "content": text}])
    return llm.encode(text)


def read_text(path: str) -> str:
    """The text of a UTF-8 file.

    Raises:
        RequestError: it cannot be read, or is not UTF-8.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error
    return _decode(content, path)


def _decode(content: bytes, source: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{source} is not UTF-8 text (byte {error.start}); convert it to UTF-8 first"
        ) from error


def measurement(metrics: RequestMetrics) -> str:
    """One line on what a request cost."""
    from tamis.platform import format_bytes

    parts = [f"{metrics.prompt_tokens:,} prompt tokens"]
    if metrics.ttft_s is not None:
        rate = metrics.prompt_tokens / metrics.ttft_s
        parts.append(f"first token after {metrics.ttft_s:.3g} s ({rate:,.0f} tokens/s)")
    generated = f"{metrics.output_tokens:,} generated"
    if metrics.tpot_s:
        generated += f" at {1e3 * metrics.tpot_s:.3g} ms/token ({1 / metrics.tpot_s:,.1f} tokens/s)"
    parts.append(generated)
    parts.append(
        f"KV {format_bytes(metrics.kv_bytes_peak)} at its peak, "
        f"{format_bytes(metrics.kv_bytes_dense)} dense"
    )
    return " · ".join(parts)


class _Answer:
    """The answer of one request: printed as it comes, or as one JSON object at the end."""

    def __init__(self, prompt_tokens: int, live: bool) -> None:
        self._live = live
        self._json: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "text": "",
            "token_ids": [],
            "finish_reason": "abort",
            "stop_reason": None,
            "metrics": None,
        }
        self.error: str | None = None
        self.metrics: RequestMetrics | None = None

    def add(self, increment: Increment) -> None:
        """Take in an increment; print its text."""
        self._json["text"] += increment.text
        self._json["token_ids"] += increment.token_ids
        if increment.output is not None:
            self._json["finish_reason"] = increment.finish_reason
            self._json["stop_reason"] = increment.stop_reason
            self.error = increment.error
            self.metrics = increment.output.metrics
            self._json["metrics"] = asdict(self.metrics)
        if self._live:
            typer.echo(increment.text, nl=False)

    def end(self) -> None:
        """Print what is left to print: the end of the line, or the object."""
        if not self._live:
            typer.echo(json.dumps(self._json, ensure_ascii=False))
        elif self._json["text"]:
            typer.echo()
