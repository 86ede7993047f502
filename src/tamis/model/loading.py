"""From a directory or a hub name to a `Model`, or to one sentence that says why not."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from tamis.errors import ConfigError, ModelError
from tamis.model.fused import fuse_layers
from tamis.model.interface import NAME, register
from tamis.model.linear import small_batches
from tamis.model.model import Model
from tamis.model.norm import quick_norms
from tamis.model.quantized import check_weights, quantize_weights
from tamis.model.support import check_supported
from tamis.platform import parse_dtype
from tamis.shipped import locate

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def load_model(
    path_or_name: str | os.PathLike[str],
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    weights: str | None = None,
) -> Model:
    """Load a decoder-only model, ready for `Model.forward`.

    Args:
        path_or_name: a directory in Transformers' format; "reference", the model that ships with
            tamis; or the name of a hub repository, which is looked up and kept by the hub's own
            cache rules (HF_HOME, HF_HUB_OFFLINE, ...).
        dtype: of the weights; "auto" is the fastest the device computes in.
        device: "auto" is CUDA where there is one, else the CPU.
        trust_remote_code: whether Python code that comes with the model may run.
        weights: "int8" or "int4" keeps those of linear layers in so many bits (see
            `tamis.model.quantized`); None keeps them in `dtype`.

    Raises:
        ModelError: the model is missing, incomplete or corrupt.
        UnsupportedModelError: it is sound, but cannot run on per-head KV pages.
        ConfigError: unknown dtype, device or weights, or weights that this model cannot have here.
    """
    check_weights(weights)
    device = parse_device(device)
    torch_dtype = parse_dtype(dtype, device)
    register()
    name = str(path_or_name)
    directory = _directory(locate(path_or_name), trust_remote_code)  # a download shows its progress
    with _quiet():
        config = _load_config(directory, trust_remote_code)
        check_supported(config, name)
        _check_weights(directory)
        tokenizer = _load_tokenizer(directory, trust_remote_code)
        hf = _load_weights(directory, config, torch_dtype, trust_remote_code).to(device)
        if weights is not None:
            quantize_weights(hf, weights, exact=hf.get_output_embeddings())
        small_batches(hf)
        quick_norms(hf)
        model = Model(hf, tokenizer, name, directory, weights)
        fuse_layers(model)
        return model


def parse_device(device: str | torch.device) -> torch.device:
    """The device of that name; "auto" is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: it is not available here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f'device {str(device)!r} is not available here; use "auto", "cpu" or "cuda".'
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the context, Transformers prints no progress bars and no loading reports.

    What a report would say (missing weights, other shapes) is raised as a ModelError instead.
    """
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _directory(name: str, trust_remote_code: bool) -> Path:
    """The local directory of a model, downloaded first if `name` is a hub repository."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{name} is a file; a model is a directory with {CONFIG} and weights.")
    patterns = [*HUB_FILES, "*.py"] if trust_remote_code else [*HUB_FILES]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except HFValidationError as error:
        raise ModelError(f"{name} is not a directory.") from error
    except Exception as error:  # network, permissions, unknown repository: the hub has many
        raise ModelError(
            f"{name} is neither a directory nor a model that is cached or reachable on the hub "
            f"({_first_line(error)})."
        ) from error


def _load_config(directory: Path, trust_remote_code: bool) -> PreTrainedConfig:
    path = directory / CONFIG
    if not path.is_file():
        raise ModelError(f"{directory} has no {CONFIG}, so it is not a model directory.")
    model_type = _read_json(path).get("model_type")
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # configurations validate themselves, each in its own way
        raise ModelError(
            f"{path} is not a configuration that Transformers can use (model_type "
            f"{model_type!r}): {_first_line(error)}"
        ) from error


def _check_weights(directory: Path) -> None:
    """Raise ModelError unless every safetensors file that should be there is there and whole."""
    index = directory / INDEX
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{index} has no weight_map, so the weights cannot be found.")
        shards = [directory / shard for shard in sorted(set(weight_map.values()))]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise ModelError(f"{directory} lacks weights that {INDEX} names: {_some(missing)}.")
    else:
        shards = sorted(directory.glob("*.safetensors"))
    if not shards:
        other = next(iter([*directory.glob("*.bin"), *directory.glob("*.pt")]), None)
        found = f"only {other.name}; convert it, tamis reads" if other else "none; tamis reads"
        raise ModelError(f"{directory} has no safetensors weights, {found} safetensors only.")
    for shard in shards:
        try:
            with safe_open(shard, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{shard} is truncated or corrupt; fetch it again ({_first_line(error)})."
            ) from error


def _load_weights(
    directory: Path, config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool
) -> Any:
    """The Transformers model, every weight of it from the files."""
    try:
        hf, report = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            attn_implementation=NAME,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # Transformers' loaders raise whatever goes wrong underneath
        raise ModelError(
            f"The weights in {directory} cannot be loaded: {_first_line(error)}"
        ) from error
    mismatched = [
        f"{key} {list(found)} instead of {list(wanted)}"
        for key, found, wanted in sorted(report["mismatched_keys"])
    ]
    if mismatched:
        raise ModelError(
            f"The weights in {directory} have other shapes than {CONFIG} says: {_some(mismatched)}."
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"The weights in {directory} lack {len(missing)} tensors: {_some(missing)}."
        )
    return hf


def _load_tokenizer(directory: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    if not any((directory / file).is_file() for file in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers has no exception type of its own
        raise ModelError(
            f"The tokenizer in {directory} cannot be read: {_first_line(error)}"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} is not valid JSON: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def _some(names: list[str], shown: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _first_line(error: Exception) -> str:
    """What an exception says, on one line."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
