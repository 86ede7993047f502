"""`tamis serve`: an OpenAI-compatible server, configured by flags, environment or a file."""

from __future__ import annotations

import importlib.util
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tamis.cli import options, terminal
from tamis.errors import ConfigError

PREFIX = "TAMIS"
"""Of the environment's variables: --max-body may be given as TAMIS_MAX_BODY."""


class Preemption(StrEnum):
    """What becomes of a request's pages when an older request needs them."""

    RECOMPUTE = "recompute"
    SWAP = "swap"


class OrderName(StrEnum):
    """Who goes first."""

    FIRST_COME = "first-come"
    PRIORITY = "priority"
    FAIR = "fair"


class LogFormat(StrEnum):
    """How events are written to standard error."""

    JSON = "json"
    TEXT = "text"


def _read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Take the options' defaults from a TOML file (a typer option callback)."""
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    defaults = {key.replace("-", "_"): value for key, value in values.items()}
    known = {parameter.name for parameter in ctx.command.params}
    unknown = sorted(defaults.keys() - known)
    if unknown:
        raise ConfigError(
            f"{path} sets {', '.join(unknown)}, which tamis serve does not have; "
            "its keys are the names of the options, such as max_body"
        )
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return path


def _limit(what: str) -> object:
    return typer.Option(metavar="N", help=what)


def _seconds(what: str) -> object:
    return typer.Option(metavar="SECONDS", help=what)


def serve(
    model: options.Model,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="TOML file with any of these options, such as max_body = '16MiB'.",
            is_eager=True,
            callback=_read_config,
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="0 takes a free one.")] = 8000,
    name: Annotated[
        str | None,
        typer.Option(
            help="What requests call the model.", show_default="the last part of its path"
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Ask requests for a key; may be given several times. Better in the environment "
            "or the file, where other users of the machine do not see it.",
        ),
    ] = None,
    plan: options.Plan = "dense",
    allow_plan: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PLAN",
            help="A plan that requests may ask for by 'kv_plan', beside the server's own; may be "
            "given several times; * allows any.",
        ),
    ] = None,
    dtype: options.Dtype = "auto",
    weights: options.Weights = None,
    kv_memory: options.KVMemory = "4GiB",
    max_batch_tokens: options.MaxBatchTokens = 2048,
    max_running: Annotated[
        int, typer.Option(metavar="N", help="Most sequences that run at once.")
    ] = 256,
    preemption: Annotated[
        Preemption, typer.Option(help="Compute a preempted request's pages again, or swap them.")
    ] = Preemption.RECOMPUTE,
    order: Annotated[
        OrderName,
        typer.Option(
            help="Who goes first: who came first, the smaller 'priority', or the user who was "
            "served least (users are API keys; with one key, what requests give as 'user')."
        ),
    ] = OrderName.FIRST_COME,
    slowdown: Annotated[
        float,
        typer.Option(
            metavar="X",
            help="Prompts are computed in parts so small that answers come at least 1/X as fast "
            "as without them; 0 takes as much of a prompt at once as fits.",
        ),
    ] = 2.0,
    prefix_cache: Annotated[
        bool,
        typer.Option(help="Keep pages of prompts for later ones that begin with the same tokens."),
    ] = True,
    cuda_graphs: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graphs/--no-cuda-graphs",
            help="Record decode steps in CUDA graphs; by default on a GPU.",
            show_default=False,
        ),
    ] = None,
    context_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Most KV memory of contexts, which clients have computed once and kept.",
            show_default="half of --kv-memory",
        ),
    ] = None,
    max_requests: Annotated[int, _limit("Most requests open at once; more get 429.")] = 512,
    max_choices: Annotated[int, _limit("Most completions of one request.")] = 64,
    max_prompt_tokens: Annotated[int | None, _limit("Longest prompt.")] = None,
    max_output_tokens: Annotated[int | None, _limit("Longest completion.")] = None,
    max_body: Annotated[str, typer.Option(metavar="SIZE", help="Largest body.")] = "8MiB",
    max_wait: Annotated[
        float | None,
        _seconds(
            "Refuse, with 429, whose first token is expected later; by default their timeout."
        ),
    ] = None,
    request_timeout: Annotated[float, _seconds("Until a request must have ended.")] = 600,
    body_timeout: Annotated[float, _seconds("Until a body must have come.")] = 30,
    write_timeout: Annotated[
        float, _seconds("A client that takes nothing for so long is cut off.")
    ] = 30,
    drain_timeout: Annotated[float, _seconds("What open requests get after SIGTERM.")] = 30,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="A web page's origin that may call from a browser; may be given several times.",
        ),
    ] = None,
    log_format: Annotated[
        LogFormat, typer.Option(help="One JSON object per event, or one line of text.")
    ] = LogFormat.JSON,
    debug: options.Debug = False,
) -> None:
    """Serve a model to clients of OpenAI's API.

    /v1/completions, /v1/chat/completions, /v1/contexts, /v1/models, /tokenize; /health, /ready,
    /metrics, and a dashboard at /.
    SIGTERM lets open requests end, then stops. Every option can be given as an environment
    variable too (--max-body as TAMIS_MAX_BODY), or in the file that --config names; a flag beats
    the environment, and that the file.

    Example: TAMIS_API_KEY=secret tamis serve --model DIR --plan "snapkv(budget=2048)"
    """
    missing = [
        library
        for library in ("fastapi", "llguidance", "prometheus_client", "uvicorn")
        if importlib.util.find_spec(library) is None
    ]
    if missing:
        raise ConfigError(
            f"serving needs {', '.join(missing)}; install what it needs with: "
            "pip install 'tamis[serve]'"
        )
    from tamis.plan import Plan
    from tamis.platform import parse_bytes
    from tamis.server.settings import Settings

    settings = Settings(
        name=name or Path(model).resolve().name,
        host=host,
        port=port,
        api_keys=tuple(api_key or ()),
        allow_plans=tuple(allow_plan or ()),
        max_body=parse_bytes(max_body),
        max_prompt_tokens=max_prompt_tokens,
        max_output_tokens=max_output_tokens,
        context_memory=None if context_memory is None else parse_bytes(context_memory),
        max_choices=max_choices,
        max_requests=max_requests,
        max_wait=max_wait,
        request_timeout=request_timeout,
        body_timeout=body_timeout,
        write_timeout=write_timeout,
        drain_timeout=drain_timeout,
        cors_origins=tuple(cors_origin or ()),
        log_format=log_format.value,
    )
    its_plan = Plan.parse(plan)
    from tamis.async_llm import AsyncLLM
    from tamis.engine.order import ByPriority, FairShare, FirstCome
    from tamis.engine.pace import Full, Steady
    from tamis.server.process import serve as serve_until_stopped

    orders = {
        OrderName.FIRST_COME: FirstCome,
        OrderName.PRIORITY: ByPriority,
        OrderName.FAIR: FairShare,
    }
    terminal.quiet_logs(debug)
    llm = AsyncLLM(
        model,
        plan=its_plan,
        dtype=dtype,
        weights=weights,
        kv_memory=kv_memory,
        max_batch_tokens=max_batch_tokens,
        max_running=max_running,
        preemption=preemption.value,
        order=orders[order](),
        pace=Steady(slowdown) if slowdown else Full(),
        prefix_cache=prefix_cache,
        cuda_graphs=cuda_graphs,
    )
    try:
        serve_until_stopped(llm, settings)
    finally:
        llm.close()
