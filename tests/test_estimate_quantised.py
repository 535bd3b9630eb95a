"""The estimated memory of experts that stay in a quantised checkpoint: what a loaded model has, and at true sizes."""

import pytest
from support.models import expert_modules, tiny_config
from support.quantised_files import KINDS, SIZES, save_mxfp4, save_own, save_quantised, set_config
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    Qwen3MoeConfig,
)

from ktlib.estimate import estimate
from ktlib.integrations.transformers_experts import WEIGHT_NAMES
from ktlib.training import sft

SAVED = [*KINDS, "mxfp4", "own int4", "own nf4", "own int8"]


def save(folder, kind):
    if kind.startswith("own "):
        save_own(folder, kind.removeprefix("own "))
    else:
        save_mxfp4(folder) if kind == "mxfp4" else save_quantised(folder, kind)
    return folder


def expert_bytes(model, **options):
    return estimate(model, timing=False, gpu=False, **options).host["expert weights"]


@pytest.mark.parametrize("kind", SAVED)
def test_a_config_and_the_headers_of_its_files_tell_what_a_loaded_model_has(kind, tmp_path):
    config = AutoConfig.from_pretrained(save(tmp_path, kind))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16", experts_implementation="ktlib")
    experts = list(expert_modules(model).values())
    weights = [getattr(module, name).source for module in experts for name in WEIGHT_NAMES]
    biases = sum(p.nbytes for module in experts for n, p in module.named_parameters() if n not in WEIGHT_NAMES)
    has = sum(weight.nbytes for weight in weights) + biases
    assert expert_bytes(config, folder=tmp_path) == expert_bytes(model) == has
    # a config does not tell the dtype of scales
    assert expert_bytes(config) == pytest.approx(has, rel=1e-3) and all(weight.format != "bf16" for weight in weights)
    assert estimate(config, timing=False).gpu["other weights"] == sum(
        p.nbytes for name, p in model.named_parameters() if ".experts." not in name
    )


def _compressed(**weights):
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32} | weights
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
LITE = {
    **{"hidden_size": 2048, "num_hidden_layers": 27, "moe_intermediate_size": 1408, "n_routed_experts": 64},
    **{"first_k_dense_replace": 1, "intermediate_size": 10944, "q_lora_rank": None},
}
KIMI = {"n_routed_experts": 384, "first_k_dense_replace": 1, "num_attention_heads": 64, "num_key_value_heads": 64}
QWEN = {"hidden_size": 2048, "num_hidden_layers": 48, "num_experts": 128, "moe_intermediate_size": 768}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}


@pytest.mark.parametrize(
    "config, settings, bits",
    [
        (DeepseekV3Config(), FP8, 8 + 32 / 128**2),
        (DeepseekV3Config(), {**FP8, "expert_dtype": "fp4", "scale_fmt": "ue8m0"}, 4 + 8 / 32),
        (DeepseekV3Config(**KIMI), _compressed(), 4 + 16 / 32),
        (DeepseekV2Config(**LITE), {"quant_method": "ktlib", "format": "int4", "group": [1, 32], "version": 1}, 4.5),
        (DeepseekV2Config(**LITE), {"quant_method": "ktlib", "format": "nf4", "group": [1, 64], "version": 1}, 4.25),
        (GptOssConfig(), {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}, 4.25),
        (Qwen3MoeConfig(**QWEN), GPTQ, 4 + 16 / 128),
        (Qwen3MoeConfig(**QWEN), {**GPTQ, "sym": False}, 4 + (16 + 8) / 128),
        (Qwen3MoeConfig(**QWEN), {"quant_method": "awq", "bits": 4, "group_size": 128}, 4 + (16 + 8) / 128),
        (Qwen3MoeConfig(**QWEN), _compressed(num_bits=8, strategy="channel", group_size=None), None),
    ],
)
def test_bits_of_a_weight_of_published_models(config, settings, bits):
    plain = expert_bytes(config)
    config.quantization_config = settings
    biases = 2 * 36 * 128 * 3 * 2880 if config.model_type == "gpt_oss" else 0
    wanted = (plain - biases) / 16 * (bits or 8 + 16 * (2 * 768 + 2048) / (3 * 768 * 2048)) + biases
    assert expert_bytes(config) == pytest.approx(wanted, rel=1e-9)


def test_full_finetuning_and_experts_that_transformers_computes_are_bf16(tmp_path):
    config = AutoConfig.from_pretrained(save(tmp_path, "int4"))
    decoded = expert_bytes(tiny_config("qwen3_moe", **SIZES))
    for targets in ("routed_experts",), ("self_attn",):
        assert expert_bytes(config, finetuning="full", targets=targets) == decoded
    assert expert_bytes(config, targets=("routed_experts",)) == expert_bytes(config) < decoded / 3
    config.hidden_act = "relu"
    assert expert_bytes(config) == expert_bytes(config, folder=tmp_path) == decoded


def test_stacks_whose_columns_are_outputs_are_decoded(tmp_path):
    save_quantised(tmp_path, "fp8", "gpt_oss", intermediate_size=160)
    config = AutoConfig.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16", experts_implementation="ktlib")
    experts = sum(p.nbytes for module in expert_modules(model).values() for p in module.parameters())
    assert expert_bytes(config, folder=tmp_path) == expert_bytes(model) == experts


def test_codes_are_not_streamed_to_a_gpu(tmp_path):
    config = AutoConfig.from_pretrained(save(tmp_path, "fp8"))
    with pytest.raises(ValueError, match="stream_rows: got 8 with experts that are codes, needs None"):
        estimate(config, stream_rows=8, timing=False)
    assert expert_bytes(config, stream_rows=8) == expert_bytes(config)


@pytest.mark.parametrize("key", ["ignore", "modules_to_not_convert"])
def test_experts_that_the_config_excludes_are_bf16(key):
    config = tiny_config("qwen3_moe", **SIZES)
    decoded = expert_bytes(config)
    config.quantization_config = FP8 | {key: ["lm_head", "model.layers.1.mlp.experts"]}
    half = expert_bytes(config)
    config.quantization_config = FP8 | {key: ["lm_head", "model.layers.1.mlp.gate"]}
    assert decoded - half == (decoded - expert_bytes(config)) / 2
    config.quantization_config = FP8 | {key: [r"re:.*\.mlp\.experts\..*"]}
    assert expert_bytes(config) == decoded


UNREAD = [
    ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes'"),
    ({"quant_method": "of_tomorrow"}, "quant_method is 'of_tomorrow'"),
    ({"quant_method": "gptq", "bits": 8}, "gptq with 8 bits, needs 4"),
    (_compressed() | {"format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
    (_compressed(num_bits=2), "num_bits is 2, needs 4 or 8"),
]


@pytest.mark.parametrize("settings, message", UNREAD)
def test_a_format_that_ktlib_does_not_keep_is_named(settings, message):
    config = tiny_config("qwen3_moe", **SIZES)
    config.quantization_config = settings
    with pytest.raises(ValueError, match=message):
        expert_bytes(config)


def test_a_run_counts_codes_and_is_refused_where_they_cannot_be_read(tmp_path, monkeypatch):
    """Here the files of a shape that needs 4 bits, and a config that does not tell it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    save(tmp_path / "model", "int4")
    parameters = sft.check_parameters() | {"model": str(tmp_path / "model"), "targets": "experts"}
    config = AutoConfig.from_pretrained(tmp_path / "model")
    estimated = sft.estimate_run(parameters, timing=False).host["expert weights"]
    assert estimated == expert_bytes(config) < expert_bytes(tiny_config("qwen3_moe", **SIZES)) / 3
    set_config(tmp_path / "model", quantization_config={"quant_method": "of_tomorrow"})
    with pytest.raises(ValueError, match="model: got experts in a format .*of_tomorrow"):
        sft.run(model=str(tmp_path / "model"), output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
