"""Adapters, bases, arguments and folders that no merge can take are refused by name, and nothing is left behind."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapter_files import ADAPTER_FILE, CONFIG
from support.merged import load, merge, save_adapter, save_base, save_of_class
from support.quantised_files import set_config

from ktlib.conversion.merge import REPORT
from ktlib.files import tensor_files


@pytest.fixture(autouse=True)
def quick(one_thread):
    """Tiny models on one thread."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """``(base, adapter)``, not to be changed."""
    folder = tmp_path_factory.mktemp("pair")
    save_adapter(folder / "adapter", save_base(folder / "base", "deepseek_v2"))
    return folder / "base", folder / "adapter"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"use_dora": True}, "use_dora is True, which a merge by ktlib cannot represent"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices is \[3\]"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', needs 'LORA'"),
        ({"r": 5}, r"does not fit DeepseekV2ForCausalLM, .*\nwrong shape .*at rank 5"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"missing \(.*both matrices of"),
    ],
)
def test_adapters_that_no_merge_represents_are_refused_by_name(settings, message, pair, tmp_path):
    base, adapter = pair[0], shutil.copytree(pair[1], tmp_path / "adapter")
    set_config_of_adapter(adapter, **settings)
    if "embed_tokens" in str(settings):
        change(adapter, lambda t: [t.pop(key) for key in list(t) if "0.self_attn.q_proj" in key])
    with pytest.raises(ValueError, match=message):
        merge(adapter, tmp_path / "out", base)
    assert not (tmp_path / "out").exists()


def set_config_of_adapter(folder, **settings):
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | settings))


def change(folder, function, file=ADAPTER_FILE):
    tensors = load_file(folder / file)
    function(tensors)
    save_file(tensors, folder / file, {"format": "pt"})


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda t: t[f"{Q}.lora_B.weight"].view(-1)[3:4].fill_(math.nan), r"NaN or Inf \(1\): .*q_proj.lora_B"),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), r"missing \(1\): lora_B of model.layers.0.self_attn.q_proj"),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(3)}), r"unknown \(1\): .*lora_magnitude_vector"),
        (lambda t: t.update({f"{Q}.bias": torch.ones(3)}), r"unknown \(1\): .*q_proj.bias"),
        (lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(3, 3)}), "unknown"),
    ],
)
def test_wrong_tensors_of_an_adapter_are_refused_by_name(function, message, pair, tmp_path):
    base, adapter = pair[0], shutil.copytree(pair[1], tmp_path / "adapter")
    change(adapter, function)
    with pytest.raises(ValueError, match=message):
        merge(adapter, tmp_path / "out", base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"moe_intermediate_size": 32}, {"num_hidden_layers": 3}, {"n_routed_experts": 4}])
def test_an_adapter_of_another_base_is_refused(changes, pair, tmp_path):
    base = save_base(tmp_path / "base", "deepseek_v2", **changes)
    with pytest.raises(ValueError, match=r"does not fit DeepseekV2ForCausalLM, .*\n(wrong shape|missing|extra) "):
        merge(pair[1], tmp_path / "out", base)


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda t: t.pop("model.layers.1.mlp.experts.5.up_proj.weight"), r"missing \(1\): .*gate_up_proj has 46080 of"),
        (lambda t: t.pop("model.layers.0.self_attn.o_proj.weight"), r"missing \(1\): .*o_proj.weight has 0 of 4096"),
        (
            lambda t: t.update({"model.layers.0.self_attn.o_proj.weight": torch.ones(32, 128)}),
            r"wrong shape \(1\): .*o_proj.weight is \(32, 128\), needs \(64, 64\)",
        ),
        (
            lambda t: t["model.layers.1.mlp.experts.5.up_proj.weight"].view(-1)[0:1].fill_(math.inf),
            "model.layers.1.mlp.experts.5.up_proj.weight: has NaN or Inf when",
        ),
        (lambda t: t["model.norm.weight"].fill_(math.nan), "base: model.norm.weight has NaN"),
    ],
)
def test_a_base_that_is_incomplete_or_not_finite_is_refused(function, message, pair, tmp_path):
    base = shutil.copytree(pair[0], tmp_path / "base")
    change(base, function, "model.safetensors")
    with pytest.raises(ValueError, match=message):
        merge(pair[1], tmp_path / "out", base)
    assert not (tmp_path / "out/model.safetensors.index.json").exists()


def test_values_beyond_the_range_of_the_dtype_are_refused(tmp_path):
    base = save_base(tmp_path / "base", "qwen3_moe", dtype=torch.float16)
    save_adapter(tmp_path / "adapter", base, lora_alpha=1e9)
    with pytest.raises(ValueError, match=r"weight: has NaN or Inf when it is merged in torch.float16; .*--dtype fp32"):
        merge(tmp_path / "adapter", tmp_path / "out", base)
    merge(tmp_path / "adapter", tmp_path / "fp32", base, dtype="fp32")


def test_weights_that_files_hold_in_another_form_are_refused(tmp_path):
    base = save_of_class(tmp_path / "base", "unlimited_ocr", "UnlimitedOcrForConditionalGeneration")
    tower = [n for n, _ in load(base).named_modules() if n.endswith("layers.0.self_attn.q_proj") and "vision" in n]
    save_adapter(tmp_path / "adapter", base, target_modules=tower, target_parameters=[])
    with pytest.raises(ValueError, match=r"another form \(1\): model.vision_tower.*q_proj.weight, .*\(Chunk\)"):
        merge(tmp_path / "adapter", tmp_path / "out", base)


def test_wrong_arguments_and_folders_are_refused(pair, tmp_path, monkeypatch):
    base, adapter = pair
    for arguments, message in (
        ((adapter, tmp_path / "out", base, "fp16"), "dtype: got 'fp16', needs None, 'bf16' or 'fp32'"),
        ((adapter, tmp_path / "out", base, None, "vllm"), "layout: got 'vllm', needs 'base' or 'hub'"),
        ((adapter, tmp_path / "out", tmp_path), "base: .* has no config.json"),
        ((tmp_path, tmp_path / "out", base), "adapter: .* has no adapter_config.json"),
        ((adapter, base, base), "out: .*base is the base itself, needs another folder, such as .*base-2"),
        ((adapter, adapter / ".", base), "out: .*adapter is the adapter itself"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            merge(*arguments)
    stacked = save_base(tmp_path / "stacked", "gpt_oss")
    save_adapter(tmp_path / "of stacked", stacked)
    with pytest.raises(ValueError, match="layout: got 'hub', but checkpoints of 'gpt_oss' .* needs 'base'"):
        merge(tmp_path / "of stacked", tmp_path / "out", stacked, layout="hub")
    for name in ("config.json", "model.safetensors", REPORT):
        foreign = tmp_path / f"foreign {name}"
        foreign.mkdir()
        (foreign / name).write_text("somebody's")
        with pytest.raises(ValueError, match="^out: "):
            merge(adapter, foreign, base)
        assert [path.name for path in foreign.iterdir()] == [name] and (foreign / name).read_text() == "somebody's"
    set_config(shutil.copytree(base, tmp_path / "bnb"), quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ValueError, match="quant_method is 'bitsandbytes'"):
        merge(adapter, tmp_path / "out", tmp_path / "bnb")
    monkeypatch.setattr(tensor_files.os, "statvfs", lambda path: type("Full", (), {"f_bavail": 1, "f_frsize": 512}))
    with pytest.raises(OSError, match="GB free, the checkpoint needs"):
        merge(adapter, tmp_path / "full", base)
    assert list((tmp_path / "full").iterdir()) == []
