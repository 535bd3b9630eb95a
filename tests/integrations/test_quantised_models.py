"""What can be done with a model whose experts stay codes, and what is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support import family_models
from support.memory import measure
from support.models import tiny_model, tokens
from support.quantised_files import KINDS, quantise_files, save_mxfp4, save_quantised, set_config
from test_mapped_experts import assert_same_step, load, mapped_files, step, with_lora
from transformers import AutoConfig, FineGrainedFP8Config, Trainer, TrainingArguments, modeling_utils

import ktlib
from ktlib.conversion.fuse import fuse_checkpoint
from ktlib.integrations.stored_weight import StoredWeight, is_mapped, quantised_format

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module", params=["fp8", "int4"])
def folders(request, tmp_path_factory):
    """``(quantised, bf16)``: a checkpoint and the one that it was made from."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model("qwen3_moe", dtype=torch.bfloat16).save_pretrained(folder / "bf16")
    shutil.copytree(folder / "bf16", folder / "quantised")
    quantise_files(folder / "quantised", request.param)
    return folder / "quantised", folder / "bf16"


# ---- what works -----------------------------------------------------------------------------------------------------


def test_an_adapter_of_codes_is_a_stock_adapter_that_loads_on_bf16_and_the_reverse(folders, tmp_path):
    quantised, bf16 = folders
    for trained_on, used_on in ((quantised, bf16), (bf16, quantised)):
        model = with_lora(load(trained_on))
        folder = tmp_path / trained_on.name
        model.save_pretrained(folder)
        saved = load_file(folder / "adapter_model.safetensors")
        shapes = {
            name: tuple(value.shape) for name, value in with_lora(load(used_on)).state_dict().items() if "lora" in name
        }
        assert {tuple(v.shape) for v in saved.values()} == set(shapes.values()) and len(saved) == len(shapes)
        assert all(value.dtype == torch.float32 and value.isfinite().all() for value in saved.values())
        config = ktlib.load_lora_config(folder)
        loaded = PeftModel.from_pretrained(load(used_on), folder, config=config)
        values = {n: p for n, p in loaded.named_parameters() if "lora_" in n}
        assert values and all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in values.items())
        same = PeftModel.from_pretrained(load(trained_on), folder, config=config).eval()
        assert torch.equal(same(tokens()).logits, model.eval()(tokens()).logits)


def test_the_stock_trainer_trains_and_resumes_to_the_same_bits(folders, tmp_path):
    def trainer(folder):
        rows = [{"input_ids": row, "labels": row} for row in tokens(16, 12)]
        options = TrainingArguments(
            folder, per_device_train_batch_size=4, learning_rate=2e-2, max_steps=4, save_steps=2, report_to=[],
            use_cpu=True, disable_tqdm=True, seed=3, gradient_checkpointing=True,
        )  # fmt: skip
        return Trainer(with_lora(load(folders[0]), lora_dropout=0.2), options, train_dataset=rows)

    whole, resumed = trainer(tmp_path / "whole"), trainer(tmp_path / "resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    wanted = {name: value for name, value in whole.model.named_parameters() if value.requires_grad}
    got = dict(resumed.model.named_parameters())
    assert wanted and all(torch.equal(got[name], value) for name, value in wanted.items())
    assert quantised_format(resumed.model) is not None


def test_sharing_pinning_and_placing_leave_the_codes_in_their_files(folders, monkeypatch):
    from ktlib.placement import numa

    placed = []
    monkeypatch.setattr(numa._kernels, "place_pages", lambda address, size, node: placed.append((address, size)))
    wanted = load(folders[0])(tokens()).logits
    for prepare in (ktlib.pin_experts, ktlib.share_experts, lambda model: ktlib.place_experts(model, parts=3)):
        model = prepare(load(folders[0])).to("cpu:0")
        weights = [p for p in model.parameters() if isinstance(p, StoredWeight)]
        assert len(weights) == 4 and all(mapped_files(folders[0], weight) for weight in weights)
        assert torch.equal(model(tokens()).logits, wanted)
    codes = {code.data_ptr(): code.nbytes for weight in weights for code in weight.source.codes}
    assert sum(size for _, size in placed) == sum(codes.values()) and codes.keys() <= {address for address, _ in placed}


def test_stacked_experts_are_ordinary_and_are_saved_and_merged_as_bf16(folders, tmp_path):
    model = ktlib.stack_experts(load(folders[0]))
    assert not is_mapped(model)
    assert_same_step(with_lora(load(folders[0])), with_lora(ktlib.stack_experts(load(folders[0]))))
    merged = with_lora(model, target_modules=[]).merge_and_unload().eval()
    merged.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded = load(tmp_path)
    assert torch.equal(loaded(tokens()).logits, merged(tokens()).logits)


def test_saving_the_model_writes_the_decoded_weights(folders, tmp_path):
    model = load(folders[0])
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(folders[1] / "model.safetensors").keys()
    assert torch.equal(load(tmp_path)(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("kind", ["int4 of ktlib fuse", "mxfp4"])
def test_stacks_of_codes_are_saved_decoded_too(kind, folders, tmp_path):
    if kind == "mxfp4":
        save_mxfp4(source := tmp_path / "source")
    else:
        source = fuse_checkpoint(folders[1], tmp_path / "source", quantise="int4", progress=False)
    model = load(source)
    model.save_pretrained(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert quantised_format(model) and quantised_format(loaded) is None
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_a_multimodal_checkpoint_may_have_its_settings_in_the_text_config(tmp_path):
    family = ("glm4v_moe", "Glm4vMoeForConditionalGeneration")
    family_models.tiny_model(*family, dtype=torch.bfloat16).save_pretrained(tmp_path)
    quantise_files(tmp_path, "fp8")
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (kind,) = (cls for cls in family_models.model_classes(family[0]) if cls.__name__ == family[1])
    model = kind.from_pretrained(tmp_path, dtype="bfloat16", experts_implementation="ktlib")
    assert quantised_format(model) == "e4m3" and not hasattr(model.config.text_config, "quantization_config")
    assert_same_step(with_lora(model), with_lora(ktlib.stack_experts(copy_of(kind, tmp_path))))


def test_a_model_of_several_models_is_quantised_and_loaded(tmp_path):
    """Qwen3-Omni: two of its models have routed experts, and its config has no entry on tied embeddings."""
    family = ("qwen3_omni_moe", "Qwen3OmniMoeForConditionalGeneration")
    family_models.tiny_model(*family, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    made = fuse_checkpoint(tmp_path / "bf16", tmp_path / "int4", quantise="int4", progress=False)
    (kind,) = (cls for cls in family_models.model_classes(family[0]) if cls.__name__ == family[1])
    model = copy_of(kind, made)
    assert sum(isinstance(parameter, StoredWeight) for parameter in model.parameters()) == 8
    model.save_pretrained(tmp_path / "saved")
    saved = copy_of(kind, tmp_path / "saved")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), saved.parameters(), strict=True))


def copy_of(kind, folder):
    return kind.from_pretrained(folder, dtype="bfloat16", experts_implementation="ktlib")


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"device_map": {"model": "cpu", "lm_head": "meta"}},
        {"quantization_config": FineGrainedFP8Config(dequantize=True)},
    ],
    ids=["float32", "several devices", "dequantize"],
)
def test_where_codes_cannot_stay_the_experts_are_decoded(options, tmp_path):
    decoded = save_quantised(tmp_path, "fp8", hidden_size=128, moe_intermediate_size=128, intermediate_size=128)
    model = load(tmp_path, **options)
    assert not is_mapped(model)
    got = model.model.layers[1].mlp.experts.down_proj[3]
    if "device_map" in options:  # accelerate has taken the values, and brings them for each forward
        assert got.device.type == "meta" and not isinstance(got, StoredWeight)
        return
    assert torch.equal(got, decoded["model.layers.1.mlp.experts.3.down_proj.weight"].to(got.dtype))


def test_layers_that_the_model_does_not_have_are_left_out(folders, tmp_path):
    """Such as those for multi-token prediction."""
    shutil.copytree(folders[0], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    more = {n.replace(".layers.1.", ".layers.2."): v.clone() for n, v in tensors.items() if ".layers.1." in n}
    save_file(tensors | more, path, {"format": "pt"})
    model, info = load(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"] and not info["missing_keys"]
    assert torch.equal(model(tokens()).logits, load(folders[0])(tokens()).logits)


def test_loading_and_a_step_add_little_memory(tmp_path):
    sizes = {"hidden_size": 512, "moe_intermediate_size": 1024, "intermediate_size": 512, "num_experts": 32}
    save_quantised(tmp_path, "int4", **sizes)
    tensors = load_file(tmp_path / "model.safetensors")
    size = sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name)
    setup = f"""
import sys
sys.path[:0] = {[str(TESTS), str(TESTS / "integrations")]!r}
import torch, ktlib
from support.models import tokens
from test_mapped_experts import load, step, with_lora
model = load({str(tmp_path)!r}) if {{ready}} else None
"""
    loading = measure(setup.format(ready=False), f"load({str(tmp_path)!r}).config")
    training = measure(setup.format(ready=True), "step(with_lora(model))")
    print({"experts": size, "loading": loading, "training": training})
    assert size > 50e6 and loading["peak"] < 0.03 * size + OTHER_WEIGHTS and training["peak"] < 0.05 * size + REST


OTHER_WEIGHTS = 8e6  # of the model, 3 MB, and what Python allocates
REST = 40e6  # adapters and their gradients, scratch memory of each thread, Python's modules


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    save_quantised(tmp_path, "fp8")
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "hologram"}, r"quant_method is 'hologram'.*fuse SOURCE OUT --quantise"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"quant_method is 'bitsandbytes'"),
        ({"quant_method": "gptq", "bits": 8}, r"gptq with 8 bits, needs 4"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, r"awq version 'gemv', needs 'gemm'"),
        ({"quant_method": "ktlib", "version": 2}, r"version 2 of ktlib's format, this ktlib reads version 1"),
        ({**KINDS["int4"][0], "format": "nvfp4-pack-quantized"}, r"format 'nvfp4-pack-quantized'"),
        ({**KINDS["int4"][0], "transform_config": {"a": 1}}, r"transform_config rotates activations"),
        ({**KINDS["int4"][0], "sparsity_config": {"format": "sparse-24-bitmask"}}, r"'sparse-24-bitmask'"),
        ({"load_in_8bit": True}, r"quant_method is None"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_quantisation_that_is_not_read_is_refused_before_anything_loads(settings, message, saved):
    set_config(saved, quantization_config=settings)
    with pytest.raises(ValueError, match=rf"^quantization_config: .*{message}"):
        load(saved)


def test_settings_for_a_quantised_checkpoint_are_refused(saved):
    with pytest.raises(
        ValueError, match=r"quantization_config: got a FineGrainedFP8Config for a .*'fp8'.*leave it out"
    ):
        load(saved, quantization_config=FineGrainedFP8Config())
    with pytest.raises(ValueError, match=r"device_map: got 'disk' for a quantised checkpoint"):
        load(saved, device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=str(saved))
    config = AutoConfig.from_pretrained(saved, experts_implementation="ktlib")
    with pytest.raises(ValueError, match=r"gguf_file: experts of GGUF files are not computed by ktlib"):
        modeling_utils.get_hf_quantizer(config, None, None, True, {}, gguf_file="model.gguf")


EXPERT = "model.layers.1.mlp.experts.2.up_proj"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("fp8", {"weight_scale_inv": None}, r"weight: is F8_E4M3 without a scale in the checkpoint"),
        ("fp8", {"weight_scale_inv": torch.ones(3, 2)}, r"weight: has scales \(3, 2\) for 176 rows and 160 columns"),
        ("fp8", {"weight": torch.zeros(176, 160).to(torch.float8_e5m2)}, r"weight: is F8_E5M2 in the checkpoint"),
        ("fp8", {"weight_scale_inv": torch.ones(2, 2, dtype=torch.int32)}, r"weight: scales: got int32"),
        ("int4", {"weight_scale": None}, r"weight_packed: has no .*weight_scale in the checkpoint"),
        ("int4", {"weight_g_idx": torch.arange(160)}, r"weight: its columns are permuted \(act-order\)"),
        ("int4", {"weight_global_scale": torch.ones(1)}, r"weight: is in NVFP4"),
        (
            "gptq",
            {"g_idx": torch.arange(160, dtype=torch.int32).flip(0) // 32},
            r"permuted \(act-order, desc_act\)",
        ),
        (
            "gptq",
            {"scales": torch.ones(4, 176).half()},
            r"has scales for 4 groups, needs one for each 32 of 160",
        ),
        ("awq", {"qzeros": None}, r"has no .*qzeros in the checkpoint"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_do_not_fit_together_are_refused_by_name(kind, change, message, tmp_path):
    save_quantised(tmp_path, kind)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for name, value in change.items():
        tensors.pop(f"{EXPERT}.{name}", None)
        if value is not None:
            tensors[f"{EXPERT}.{name}"] = value.contiguous()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(Exception, match=rf"{EXPERT}.*{message}"):
        load(tmp_path)


def test_merging_full_fine_tuning_and_streaming_are_refused_by_name(folders):
    with pytest.raises(RuntimeError, match=r"experts\.down_proj: aten::add_.*ktlib\.stack_experts\(model\) first"):
        with_lora(load(folders[0]), target_modules=[]).merge_and_unload()
    with pytest.raises(RuntimeError, match=r"gate_up_proj: requires a gradient, but stays as it is in its checkpoint"):
        step(load(folders[0]))
    with pytest.raises(ValueError, match=r"^stream_rows: got 8 for a model whose experts are (e4m3|int4) codes"):
        ktlib.pin_experts(load(folders[0]), stream_rows=8)
