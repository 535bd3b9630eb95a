"""Quantised checkpoints: experts stay codes in their files, and compute with the bits of the decoded model."""

import pytest
import torch
from safetensors.torch import load_file
from support.models import expert_modules, tokens
from support.quantised_files import KINDS, save_decoded, save_mxfp4, save_quantised
from test_mapped_experts import assert_same_step, load, with_lora

from ktlib.integrations.stored_weight import StoredWeight
from ktlib.integrations.transformers_experts import WEIGHT_NAMES


@pytest.fixture(scope="module", params=[*KINDS, "mxfp4"])
def checkpoint(request, tmp_path_factory):
    """``(folder, folder of the decoded bf16 checkpoint)``."""
    folder = tmp_path_factory.mktemp("quantised")
    source = folder / "source"
    family = "mixtral" if request.param == "v4" else "qwen3_moe"
    decoded = save_mxfp4(source) if request.param == "mxfp4" else save_quantised(source, request.param, family)
    return source, save_decoded(folder / "decoded", source, decoded)


def of_decoded(folder):
    model = load(folder, experts_implementation="eager")
    model.set_experts_implementation("ktlib")
    return model


def test_experts_stay_codes_and_all_weights_are_the_decoded_ones(checkpoint):
    model, info = load(checkpoint[0], output_loading_info=True)
    assert not any(info.values()), info
    weights = [getattr(m, name) for m in expert_modules(model).values() for name in WEIGHT_NAMES]
    assert weights and all(isinstance(w, StoredWeight) and w.source.format != "bf16" for w in weights)
    assert sum(isinstance(p, StoredWeight) for p in model.parameters()) == len(weights)
    wanted = dict(of_decoded(checkpoint[1]).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, wanted.pop(name)), name
    assert not wanted and model.dtype == torch.bfloat16


def test_training_steps_have_the_bits_of_the_decoded_model(checkpoint):
    assert_same_step(with_lora(load(checkpoint[0])), with_lora(of_decoded(checkpoint[1])))
    with torch.no_grad():
        model, other = load(checkpoint[0]), of_decoded(checkpoint[1])
        assert torch.equal(model(tokens()).logits, other(tokens()).logits)


METHODS = {kind: settings["quant_method"] for kind, (settings, *_) in KINDS.items()}


@pytest.mark.parametrize("kind", [*(kind for kind, method in METHODS.items() if "fp8" in method), "mxfp4"])
def test_transformers_decodes_to_the_same_weights(kind, tmp_path):
    sizes = {"hidden_size": 128, "moe_intermediate_size": 256, "intermediate_size": 256}  # see test_stock.py
    save_mxfp4(tmp_path) if kind == "mxfp4" else save_quantised(tmp_path, kind, **sizes)
    stock = dict(load(tmp_path, experts_implementation="eager").named_parameters())
    for name, parameter in load(tmp_path).named_parameters():
        assert torch.equal(parameter, stock[name]), name


@pytest.mark.parametrize("kind", [kind for kind, method in METHODS.items() if method == "compressed-tensors"])
def test_compressed_tensors_decodes_to_the_same_weights(kind, tmp_path):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    decoded = save_quantised(tmp_path, kind, moe_intermediate_size=160)
    settings = KINDS[kind][0]
    scheme = QuantizationScheme(**settings["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(settings["format"])
    modules = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        module, _, member = name.rpartition(".")
        modules.setdefault(module, {})[member] = tensor
    compared = 0
    for module, members in modules.items():
        if "weight_scale" in members:
            members.setdefault("weight_shape", torch.tensor(decoded[f"{module}.weight"].shape))
            weight = compressor.decompress(members, scheme)["weight"]
            assert torch.equal(weight.bfloat16(), decoded[f"{module}.weight"]), module
            compared += 1
    assert compared == 56
