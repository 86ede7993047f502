"""A directory either becomes a model or one sentence that says what is wrong with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging as hf_logging

from tamis.errors import ConfigError, ModelError, UnsupportedModelError
from tamis.model import Model, load_model
from tests.tiny_models import BOS, EOS, REFUSED, VOCAB, build, save


def load(directory: Path | str) -> Model:
    return load_model(directory, dtype="fp32", device="cpu")


@pytest.fixture
def llama(tiny_dir, tmp_path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(tiny_dir("llama"), tmp_path / "llama"))


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_a_loaded_model_describes_itself(llama):
    model = load(llama)
    hf = build("llama")
    assert model.architecture == "LlamaForCausalLM"
    assert model.name == str(llama)
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    assert model.n_parameters == sum(p.numel() for p in hf.parameters())
    assert model.weight_bytes == 4 * model.n_parameters
    assert (model.vocab_size, model.max_length) == (VOCAB, 512)
    assert model.eos_token_ids == {EOS}
    assert model.kv_bytes_per_token == 3 * 2 * (16 + 16) * 4


def test_shared_weights_count_once(llama):
    untied = load(llama).n_parameters
    edit_config(llama, tie_word_embeddings=True)
    edit_weights(llama, lambda weights: weights.pop("lm_head.weight"))
    assert load(llama).n_parameters == untied - VOCAB * 64


@pytest.mark.parametrize(
    ("name", "length"), [("llama-llama3", 256), ("llama-linear", 512), ("llama-yarn", 256)]
)
def test_the_context_includes_rope_scaling(tiny_dir, name, length):
    assert load(tiny_dir(name)).max_length == length


def test_the_generation_config_decides_what_ends_a_sequence(llama):
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load(llama).eos_token_ids == {7, 9}


def test_the_dtype_is_the_one_asked_for(llama):
    model = load_model(llama, dtype="bf16", device="cpu")
    assert model.dtype == torch.bfloat16
    assert model.weight_bytes == 2 * model.n_parameters


def test_the_tokenizer_comes_from_the_directory(llama):
    tokenizer = load(llama).tokenizer
    ids = tokenizer("héllo").input_ids
    assert ids[0] == BOS
    assert tokenizer.decode(ids[1:]) == "héllo"


def test_a_directory_without_a_tokenizer_loads(tmp_path):
    assert load(save("llama", tmp_path, with_tokenizer=False)).tokenizer is None


@pytest.fixture
def talkative() -> Iterator[None]:
    """Transformers says all it can."""
    before = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_info()
    hf_logging.enable_progress_bar()
    yield
    hf_logging.set_verbosity(before[0])
    if not before[1]:
        hf_logging.disable_progress_bar()


def test_loading_is_silent_and_leaves_logging_as_it_was(llama, talkative, capfd):
    load(llama)
    assert capfd.readouterr().err == ""
    assert hf_logging.get_verbosity() == hf_logging.INFO
    assert hf_logging.is_progress_bar_enabled()


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"/nowhere is not a directory\.$"):
        load(tmp_path / "nowhere")


def test_a_file_is_not_a_model(llama):
    with pytest.raises(ModelError, match=r"config\.json is a file; a model is a directory"):
        load(llama / "config.json")


def test_an_empty_directory_is_not_a_model(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{oops", "is not valid JSON"),
        ("[1, 2]", "must hold a JSON object, not a list"),
        ('{"model_type": "lama"}', "model_type 'lama'"),
        ("{}", "model_type None"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "hidden_size"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(llama, text, reason):
    (llama / "config.json").write_text(text)
    with pytest.raises(ModelError, match=reason):
        load(llama)


def test_a_directory_without_weights_says_so(llama):
    (llama / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no safetensors weights, none"):
        load(llama)


def test_pickled_weights_are_not_read(llama):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pytorch_model\.bin.*safetensors only"):
        load(llama)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5])
def test_truncated_weights_are_named(llama, kept):
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated or corrupt"):
        load(llama)


def test_a_missing_shard_is_named(tmp_path):
    build("llama").save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert load(tmp_path).n_parameters > 0
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"lacks weights.*{shards[1].name}"):
        load(tmp_path)


def test_missing_weights_are_not_made_up(llama):
    edit_weights(llama, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"lack 1 tensors: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(llama)


def test_weights_of_another_shape_are_named(llama):
    edit_config(llama, intermediate_size=80)
    with pytest.raises(ModelError, match=r"mlp\.\w+_proj\.weight \[.*96.*\] instead of \[.*80.*\]"):
        load(llama)


def test_a_corrupt_tokenizer_is_an_error(llama):
    (llama / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(ModelError, match=r"tokenizer in .* cannot be read"):
        load(llama)


def test_unknown_dtypes_and_devices_are_refused(llama):
    with pytest.raises(ConfigError, match="fp12"):
        load_model(llama, dtype="fp12")
    with pytest.raises(ConfigError, match="device 'gpu7' is not available"):
        load_model(llama, device="gpu7")


def test_a_hub_name_that_is_not_cached_says_so_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="neither a directory nor a model that is cached or reach"):
        load("nobody/nothing")


def test_a_cached_hub_model_loads_offline(monkeypatch, tmp_path):
    repository = tmp_path / "models--somebody--tiny"
    save("llama", repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = load("somebody/tiny")
    assert (model.name, model.architecture) == ("somebody/tiny", "LlamaForCausalLM")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("t5", "encoder-decoder"), ("mamba", "recurrent"), ("deepseek-v3", "latent")],
)
def test_unsupported_architectures_are_refused_before_their_weights_are_read(
    tmp_path, name, reason
):
    REFUSED[name]().save_pretrained(tmp_path)  # a configuration alone, without weights
    with pytest.raises(UnsupportedModelError, match=f"which tamis cannot run: .*{reason}"):
        load(tmp_path)
