"""Checkpoints that are quantised already: ``keep`` takes their codes bit for bit, other formats what they decode to."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import tiny_model, tokens
from support.quantised_files import KINDS, SIZES, save_mxfp4, save_quantised, set_config
from transformers import AutoModelForCausalLM

import ktlib
from ktlib.conversion.fuse import fuse_checkpoint
from ktlib.conversion.nearest_codes import quantise

# The format and group in which codes are kept. Gates have 176 rows, so that ups begin within a block of 128 rows: only
# 16 rows share a scale in the stack of both.
KEPT = {
    **{"fp8": ("e4m3", [16, 128]), "fp8, bf16 scales": ("e4m3", [16, 128]), "fp8, e8m0": ("e4m3", [16, 128])},
    **{"mxfp8": ("e4m3", [1, 32]), "v4": ("e2m1", [1, 32]), "mxfp4, packed": ("e2m1", [1, 32])},
    **{"float rows": ("e4m3", [1, 176]), "int8 rows": ("int8", [1, 176])},
    **{"int8, packed": ("int8", [1, 32]), "int8, packed, zeros": ("int8", [1, 32])},
    **dict.fromkeys(("int4", "int4, zeros", "gptq", "gptq, symmetric", "gptq_v2", "awq"), ("int4", [1, 32])),
}


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


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def check_kept(source, out, decoded, stacks, format, group):
    """The folder has the experts ``stacks`` as codes and all other weights as ``decoded``, and loads as the source."""
    settings, got = settings_of(out), tensors_of(out)
    assert settings == {"quant_method": "ktlib", "format": format, "group": group, "version": 1}
    for name, values in stacks.items():
        assert torch.equal(weight_of(got, name, settings).decoded(), values)
    others = {name: value for name, value in decoded.items() if not name.endswith(("gate_up_proj", "down_proj"))}
    others = {name: value for name, value in others.items() if not re.search(r"experts\.\d+\.", name)}
    codes = {f"{name}.{part}" for name in stacks for part in ("codes", "scales", "zeros")}
    assert others.keys() == got.keys() - codes and all(torch.equal(got[name], value) for name, value in others.items())
    errors = json.loads((out / "quantise_report.json").read_text())["relative_l2"]
    assert errors == dict.fromkeys(stacks, 0.0)
    ids = tokens()
    assert torch.equal(load(source)(ids).logits, load(out)(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_kept_bit_for_bit(kind, tmp_path):
    decoded = save_quantised(tmp_path / "source", kind)
    out = fuse_checkpoint(tmp_path / "source", tmp_path / "out", progress=False, quantise="keep")
    check_kept(tmp_path / "source", out, decoded, fused(decoded), *KEPT[kind])
    if kind.startswith("fp8"):
        stored, got = load_file(tmp_path / "source" / "model.safetensors"), tensors_of(out)
        for name, codes in fused(stored).items():
            assert torch.equal(got[f"{name}.codes"].view(torch.uint8), codes.view(torch.uint8))


def test_stacks_of_gpt_oss_in_mxfp4_are_kept(tmp_path):
    """Rows of its codes are outputs, while the class holds (experts, inputs, outputs)."""
    source = tmp_path / "source"
    decoded = save_mxfp4(source)
    stacks = {name: value.mT for name, value in decoded.items() if name.endswith(("gate_up_proj", "down_proj"))}
    out = fuse_checkpoint(source, tmp_path / "out", progress=False, quantise="keep")
    check_kept(source, out, decoded, stacks, "e2m1", [1, 32])
    stored, got = load_file(source / "model.safetensors"), tensors_of(out)
    for name in stacks:
        assert got[f"{name}.scales"].dtype == torch.float8_e8m0fnu
        assert torch.equal(got[f"{name}.codes"], stored[f"{name}_blocks"].flatten(-2))
    again = tensors_of(fuse_checkpoint(source, tmp_path / "int4", progress=False, quantise="int4"))
    for name, values in stacks.items():
        assert torch.equal(again[f"{name}.codes"], quantise(values.contiguous(), "int4").codes)


@pytest.mark.parametrize("kind", ("fp8", "gptq"))
def test_quantised_experts_are_quantised_again_from_what_they_decode_to(kind, tmp_path):
    decoded = save_quantised(tmp_path / "source", kind)
    out = fuse_checkpoint(tmp_path / "source", tmp_path / "out", progress=False, quantise="nf4")
    got = tensors_of(out)
    for name, values in fused(decoded).items():
        expected = quantise(values, "nf4")
        assert torch.equal(got[f"{name}.codes"], expected.codes) and torch.equal(got[f"{name}.scales"], expected.scales)


def test_layers_that_transformers_does_not_have_are_decoded(tmp_path):
    source = tmp_path / "source"
    decoded = save_quantised(source, "fp8")
    stored = load_file(source / "model.safetensors")
    stored |= {name.replace(".1.", ".2.", 1): t.clone() for name, t in stored.items() if "layers.1." in name}
    save_file(stored, source / "model.safetensors", {"format": "pt"})
    got = tensors_of(fuse_checkpoint(source, tmp_path / "out", progress=False, quantise="keep"))
    more = {name for name in got if "layers.2." in name}
    assert more == {name.replace(".1.", ".2.", 1) for name in decoded if "layers.1." in name}
    assert all(torch.equal(got[name], decoded[name.replace(".2.", ".1.", 1)]) for name in more)


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
    source = tmp_path / "source"
    save_quantised(source, "fp8")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.experts.3.down_proj.weight"].view(torch.uint8)[1, 2] = 0x7F
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    out = fuse_checkpoint(source, tmp_path / "out", progress=False, quantise="keep")
    name = "model.layers.0.mlp.experts.down_proj"
    assert tensors_of(out)[f"{name}.codes"].isnan().nonzero().tolist() == [[3, 1, 2]]
    errors = json.loads((out / "quantise_report.json").read_text())["relative_l2"]
    assert errors[name] == 0.0, "two NaN differ"
    with pytest.raises(ValueError, match=rf"source: {name}, expert 3: weight: got nan at \(1, 2\)"):
        fuse_checkpoint(source, tmp_path / "int4", progress=False, quantise="int4")


def test_an_interrupted_keep_goes_on(tmp_path):
    save_quantised(tmp_path / "source", "int4, zeros")
    out = fuse_checkpoint(tmp_path / "source", tmp_path / "out", progress=False, quantise="keep")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    for file in (sorted(out.glob("*.safetensors"))[1], out / "quantise_report.json", out / "config.json"):
        file.unlink()
    fuse_checkpoint(tmp_path / "source", out, progress=False, quantise="keep")
    assert before == {file.name: file.read_bytes() for file in out.iterdir()}


def test_what_cannot_be_kept_is_refused_by_name(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    decoded = save_quantised(source, "int4")
    with pytest.raises(ValueError, match="source: .*source is quantised, .* with quantise='keep'"):
        fuse_checkpoint(source, out)
    tiny_model("qwen3_moe", dtype=torch.bfloat16, **SIZES).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="quantise: got 'keep', but .*plain is not quantised; needs a format"):
        fuse_checkpoint(tmp_path / "plain", out, quantise="keep")
    whole = load_file(source / "model.safetensors")

    def replace(projections, make):
        """Give these projections of layer 1 the tensors ``make(name, weight)``."""
        pattern = re.compile(rf"model\.layers\.1\.mlp\.experts\.\d\.{projections}_proj\.weight")
        tensors = {name: value for name, value in whole.items() if not pattern.match(name)}
        for name in filter(pattern.fullmatch, decoded):
            tensors |= make(name, decoded[name])
        save_file(tensors, source / "model.safetensors", {"format": "pt"})

    def rows(name, weight):
        made = quantise(weight, "e4m3", group=(1, weight.shape[1]))
        return {name: made.codes, f"{name}_scale": made.scales}

    def permuted(name, weight):
        return {f"{name}_packed": torch.zeros(2, 2, dtype=torch.int32), f"{name}_g_idx": torch.arange(3)}

    for projections, make, format, needs in (
        (
            "(gate|up)",
            lambda *item: dict([item]),
            "keep",
            r"no codes of model.layers.1.mlp.experts.gate_up_proj; needs",
        ),
        ("down", rows, "keep", r"experts are in int4 \(.*\), e4m3 \(model.layers.1.*down_proj\); needs one format"),
        ("down", permuted, "int4", "act-order"),
    ):
        replace(projections, make)
        with pytest.raises(ValueError, match=needs):
            fuse_checkpoint(source, out, quantise=format)
    set_config(source, quantization_config={"quant_method": "bitnet"})
    with pytest.raises(ValueError, match="quant_method is 'bitnet'"):
        fuse_checkpoint(source, out, quantise="int4")
    assert not out.exists()
