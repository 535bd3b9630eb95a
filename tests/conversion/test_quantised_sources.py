"""Checkpoints that are quantised already: ``keep`` takes their codes bit for bit, other formats what they decode to."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import tiny_model, tokens
from transformers import AutoModelForCausalLM

import ktlib
from ktlib.conversion.fuse import fuse_checkpoint
from ktlib.conversion.nearest_codes import quantise
from ktlib.reference.formats import decode, unpack4

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "checkpoint_format": "gptq"}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
        }
    },
}
PER_ROW = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}},
}


def bits_of(values, dim):
    """int32 of eight numbers of 4 bits each along ``dim``, the first in the lowest bits."""
    values = values.long().movedim(dim, -1)
    packed = sum(values[..., i::8] << (4 * i) for i in range(8)).movedim(-1, dim)
    return packed.to(torch.uint32).view(torch.int32).contiguous()


def fp8(module, weight):
    quantised = quantise(weight, "e4m3", scale_dtype=torch.float32)
    return quantised, {f"{module}.weight": quantised.codes, f"{module}.weight_scale_inv": quantised.scales}


def fp8_per_row(module, weight):
    quantised = quantise(weight, "e4m3", group=(1, weight.shape[1]))
    return quantised, {f"{module}.weight": quantised.codes, f"{module}.weight_scale": quantised.scales}


def packed(module, weight, symmetric=True):
    quantised = quantise(weight, "int4", symmetric=symmetric)
    tensors = {
        f"{module}.weight_packed": bits_of(unpack4(quantised.codes, weight.shape[1]), 1),
        f"{module}.weight_scale": quantised.scales,
        f"{module}.weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        tensors[f"{module}.weight_zero_point"] = bits_of(quantised.zeros + 8, 0)
    return quantised, tensors


def packed_with_zeros(module, weight):
    return packed(module, weight, symmetric=False)


def gptq(module, weight):
    quantised = quantise(weight, "int4", symmetric=False, scale_dtype=torch.float16)
    tensors = {
        f"{module}.qweight": bits_of(unpack4(quantised.codes, weight.shape[1]).T, 0),
        f"{module}.qzeros": bits_of((quantised.zeros.T + 8 - 1) & 15, 1),
        f"{module}.scales": quantised.scales.T.contiguous(),
        f"{module}.g_idx": (torch.arange(weight.shape[1]) // 32).to(torch.int32),
    }
    return quantised, tensors


# the tensors of a matrix, the config, the format, the group in which codes are kept
LAYOUTS = {
    "fp8": (fp8, FP8, "e4m3", [32, 128]),  # gates have 96 rows, so ups begin within a block of 128
    "fp8_per_row": (fp8_per_row, PER_ROW, "e4m3", [1, 160]),
    "packed": (packed, PACKED, "int4", [1, 32]),
    "packed_with_zeros": (packed_with_zeros, PACKED, "int4", [1, 32]),
    "gptq": (gptq, GPTQ, "int4", [1, 32]),
}


def write(folder, tensors, settings):
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


def published(folder, layout, **changes):
    """A checkpoint in a layout of the hub: ``(folder, {experts' weight: its decoded values}, {...: codes})``."""
    made, settings, format, _ = LAYOUTS[layout]
    sizes = {"hidden_size": 160, "intermediate_size": 160, "moe_intermediate_size": 96}
    tiny_model("qwen3_moe", dtype=torch.bfloat16, **sizes).save_pretrained(folder)
    tensors, decoded, codes = {}, {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        is_quantised = ".experts." in name or (settings is FP8 and "self_attn" in name and weight.dim() == 2)
        if not is_quantised:
            tensors[name] = weight
            continue
        quantised, entries = made(name.removesuffix(".weight"), weight)
        tensors |= entries
        codes[name] = quantised.codes
        decoded[name] = decode(format, *quantised[:3], columns=weight.shape[1], group=quantised.group)
    write(folder, tensors, settings)
    return folder, decoded, codes


def fused(values):
    """``{weight: stack}`` of the experts' matrices by their names in files."""
    stacks = {}
    for name, value in values.items():
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name):
            leaf = "down_proj" if match[3] == "down" else "gate_up_proj"
            stacks.setdefault(f"{match[1]}.{leaf}", {})[int(match[2]), match[3]] = value
    return {
        name: torch.stack(
            [torch.cat([found[e, p] for p in ("gate", "up", "down") if (e, p) in found]) for e in range(8)]
        )
        for name, found in stacks.items()
    }


def tensors_of(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def weight_of(tensors, name, settings):
    parts = (tensors.get(f"{name}.{part}") for part in ("codes", "scales", "zeros"))
    return ktlib.Weight(settings["format"], *parts, group=settings["group"])


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16", experts_implementation="ktlib")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_are_kept_bit_for_bit(layout, tmp_path):
    source, decoded, codes = published(tmp_path / "source", layout)
    out = fuse_checkpoint(source, tmp_path / "out", progress=False, quantise="keep")
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings == {
        "quant_method": "ktlib",
        "format": LAYOUTS[layout][2],
        "group": LAYOUTS[layout][3],
        "version": 1,
    }
    got, stacks = tensors_of(out), fused(codes)
    for name, values in fused(decoded).items():
        assert torch.equal(got[f"{name}.codes"].view(torch.uint8), stacks[name].view(torch.uint8))
        assert torch.equal(weight_of(got, name, settings).decoded(), values)
    others = {name: value for name, value in decoded.items() if ".experts." not in name}
    assert (len(others) > 0) == (layout == "fp8")
    assert all(torch.equal(got[name], value) for name, value in others.items())
    errors = json.loads((out / "quantise_report.json").read_text())["relative_l2"]
    assert errors == dict.fromkeys(stacks, 0.0)
    ids = tokens()
    assert torch.equal(load(source)(ids).logits, load(out)(ids).logits)


@pytest.mark.parametrize("layout", ("fp8", "gptq"))
def test_quantised_experts_are_quantised_again_from_what_they_decode_to(layout, tmp_path):
    source, decoded, _ = published(tmp_path / "source", layout)
    out = fuse_checkpoint(source, tmp_path / "out", progress=False, quantise="nf4")
    got = tensors_of(out)
    for name, values in fused(decoded).items():
        expected = quantise(values, "nf4")
        assert torch.equal(got[f"{name}.codes"], expected.codes) and torch.equal(got[f"{name}.scales"], expected.scales)


@pytest.mark.parametrize("format", ("keep", "int4"))
def test_stacks_of_gpt_oss_in_mxfp4(format, tmp_path):
    """Rows of its codes are outputs, while the class holds (experts, inputs, outputs)."""
    source = tmp_path / "source"
    tiny_model("gpt_oss", dtype=torch.bfloat16, intermediate_size=96).save_pretrained(source)
    tensors, values = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            tensors[name] = weight
            continue
        quantised = quantise(weight.mT, "e2m1")
        values[name] = decode("e2m1", *quantised[:3], columns=weight.shape[1], group=(1, 32))
        tensors[f"{name}_blocks"] = quantised.codes.unflatten(-1, (-1, 16))
        tensors[f"{name}_scales"] = quantised.scales.view(torch.uint8)
    write(source, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": []})
    out = fuse_checkpoint(source, tmp_path / "out", progress=False, quantise=format)
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    got = tensors_of(out)
    assert len(values) == 4
    for name, value in values.items():
        if format == "keep":
            assert torch.equal(weight_of(got, name, settings).decoded(), value)
            assert got[f"{name}.scales"].dtype == torch.float8_e8m0fnu
            assert torch.equal(got[f"{name}.codes"], tensors[f"{name}_blocks"].flatten(-2))
        else:
            expected = quantise(value, "int4")
            assert torch.equal(got[f"{name}.codes"], expected.codes)
    if format == "keep":
        assert settings == {"quant_method": "ktlib", "format": "e2m1", "group": [1, 32], "version": 1}
        ids = tokens()
        assert torch.equal(load(source)(ids).logits, load(out)(ids).logits)


def test_a_folder_of_ktlib_is_kept_as_it_is_and_quantised_further(tmp_path):
    tiny_model("qwen3_moe", dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    first = fuse_checkpoint(tmp_path / "source", tmp_path / "first", False, "int8")
    again = fuse_checkpoint(first, tmp_path / "again", False, "keep")
    one, other = tensors_of(first), tensors_of(again)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((first / "config.json").read_text()) == json.loads((again / "config.json").read_text())
    further = tensors_of(fuse_checkpoint(first, tmp_path / "further", False, "int4"))
    name = "model.layers.0.mlp.experts.down_proj"
    expected = quantise(weight_of(one, name, {"format": "int8", "group": (1, 128)}).decoded(), "int4")
    assert torch.equal(further[f"{name}.codes"], expected.codes)


def test_a_code_that_is_nan_is_kept_and_not_quantised(tmp_path):
    source, _, _ = published(tmp_path / "source", "fp8")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.experts.3.down_proj.weight"].view(torch.uint8)[1, 2] = 0x7F
    write(source, tensors, FP8)
    out = fuse_checkpoint(source, tmp_path / "out", progress=False, quantise="keep")
    name = "model.layers.0.mlp.experts.down_proj"
    assert tensors_of(out)[f"{name}.codes"].isnan().nonzero().tolist() == [[3, 1, 2]]
    assert json.loads((out / "quantise_report.json").read_text())["worst"] == 0.0
    with pytest.raises(ValueError, match=rf"source: {name}, expert 3: weight: got nan at \(1, 2\)"):
        fuse_checkpoint(source, tmp_path / "int4", progress=False, quantise="int4")


def test_an_interrupted_keep_goes_on(tmp_path):
    source, _, _ = published(tmp_path / "source", "packed_with_zeros")
    out = fuse_checkpoint(source, tmp_path / "out", progress=False, quantise="keep")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    for file in (sorted(out.glob("*.safetensors"))[1], out / "quantise_report.json", out / "config.json"):
        file.unlink()
    fuse_checkpoint(source, out, progress=False, quantise="keep")
    assert before == {file.name: file.read_bytes() for file in out.iterdir()}


def test_what_cannot_be_kept_is_refused_by_name(tmp_path):
    out = tmp_path / "out"
    source, _, _ = published(tmp_path / "source", "packed")
    with pytest.raises(ValueError, match="source: .*source is quantised, .* with quantise='keep'"):
        fuse_checkpoint(source, out)
    tiny_model("qwen3_moe", dtype=torch.bfloat16).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="quantise: got 'keep', but .*plain is not quantised; needs a format"):
        fuse_checkpoint(tmp_path / "plain", out, quantise="keep")
    whole = load_file(source / "model.safetensors")

    def rewrite(make, projections):
        tensors = dict(whole)
        for name in whole:
            if re.search(rf"layers\.1\.mlp\.experts\.\d\.{projections}_proj\.weight_packed", name):
                module = name.removesuffix(".weight_packed")
                rows, columns = whole[f"{module}.weight_shape"].tolist()
                for end in ("packed", "scale", "shape"):
                    del tensors[f"{module}.weight_{end}"]
                tensors |= make(module, torch.randn(rows, columns).bfloat16())
        write(source, tensors, PACKED)

    rewrite(lambda module, weight: {f"{module}.weight": weight}, "(gate|up)")
    with pytest.raises(ValueError, match=r"has no codes of model.layers.1.mlp.experts.gate_up_proj; needs a format"):
        fuse_checkpoint(source, out, quantise="keep")
    rewrite(lambda module, weight: fp8_per_row(module, weight)[1], "down")
    with pytest.raises(ValueError, match=r"experts are in int4 \(.*\), e4m3 \(model.layers.1.*down_proj\); needs one"):
        fuse_checkpoint(source, out, quantise="keep")
    rewrite(lambda module, weight: packed(module, weight)[1] | {f"{module}.weight_g_idx": torch.arange(3)}, "down")
    with pytest.raises(ValueError, match=r"act-order"):
        fuse_checkpoint(source, out, quantise="int4")
    write(source, whole, {"quant_method": "bitnet"})
    with pytest.raises(ValueError, match="quant_method is 'bitnet'"):
        fuse_checkpoint(source, out, quantise="int4")
    assert not out.exists()
