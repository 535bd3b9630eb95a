"""``ktlib fuse --quantise``: experts become the nearest codes, everything else stays as it was, and errors are told."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.family_models import model_classes
from support.family_models import tiny_config as config_of_class
from support.models import tiny_model, tokens

import ktlib
from ktlib.conversion.fuse import fuse_checkpoint
from ktlib.conversion.nearest_codes import quantise, relative_error
from ktlib.files import tensor_files
from ktlib.integrations.transformers_experts import is_experts

GROUPS = {"int8": (1, 128), "int4": (1, 32), "nf4": (1, 64), "e2m1": (1, 32), "e4m3": (128, 128)}
FORMATS = {"int8": "int8", "int4": "int4", "nf4": "nf4", "mxfp4": "e2m1", "fp8": "e4m3"}


def save(folder, family, **options):
    model = tiny_model(family, dtype=torch.bfloat16)
    model.save_pretrained(folder, **options)
    return folder, model


def tensors_of(folder):
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def rewrite(folder, change):
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def report_of(folder):
    return json.loads((folder / "quantise_report.json").read_text())


def expert_weights(model):
    """``{name: weight (experts, outputs, inputs)}`` of all routed experts, whatever the class."""
    found = {}
    for name, module in model.named_modules():
        if is_experts(module):
            for leaf in ("gate_up_proj", "down_proj"):
                weight = getattr(module, leaf).detach()
                found[f"{name}.{leaf}"] = weight.mT.contiguous() if module.is_transposed else weight
    return found


def check(out, model, name):
    """The folder holds the nearest codes of the model's experts and the model's other weights, and tells the errors."""
    format, group = FORMATS[name], GROUPS[FORMATS[name]]
    got, wanted, report = tensors_of(out), model.state_dict(), report_of(out)
    weights = expert_weights(model)
    for weight_name, weight in weights.items():
        expected = quantise(weight, format, group=group)
        codes, scales = got.pop(f"{weight_name}.codes"), got.pop(f"{weight_name}.scales")
        assert codes.dtype == {"int8": torch.int8, "e4m3": torch.float8_e4m3fn}.get(format, torch.uint8)
        assert torch.equal(codes.view(torch.uint8), expected.codes.view(torch.uint8))
        assert scales.dtype == (torch.float8_e8m0fnu if format == "e2m1" else torch.bfloat16)
        assert torch.equal(scales.view(torch.uint8), expected.scales.view(torch.uint8))
        decoded = ktlib.Weight(format, codes, scales, group=group).decoded()
        assert report["relative_l2"].pop(weight_name) == pytest.approx(relative_error(weight, decoded), rel=1e-6)
        del wanted[weight_name]
    assert weights and not report["relative_l2"]
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    assert got.keys() == wanted.keys() - tied
    assert all(torch.equal(value, wanted[name]) and value.dtype == wanted[name].dtype for name, value in got.items())
    config = json.loads((out / "config.json").read_text())
    settings = {"quant_method": "ktlib", "format": format, "group": list(group), "version": 1}
    assert config.pop("quantization_config") == settings
    return config


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", ("deepseek_v2", "mixtral", "gpt_oss"))
def test_experts_become_the_nearest_codes_and_all_else_stays(family, format, tmp_path):
    source, model = save(tmp_path / "source", family)
    (source / "tokenizer.json").write_text("{}")
    out = fuse_checkpoint(source, tmp_path / "out", progress=False, quantise=format)
    assert check(out, model, format) == json.loads((source / "config.json").read_text())
    assert (out / "tokenizer.json").read_text() == "{}"
    index = json.loads((out / "ktlib.safetensors.index.json").read_text())["weight_map"]
    assert index == {name: file.name for file in out.glob("*.safetensors") for name in load_file(file)}
    assert not list(out.glob("model.safetensors*"))


@pytest.mark.parametrize(
    "family", ("qwen3_5_moe:Qwen3_5MoeForConditionalGeneration", "qwen3_vl_moe:Qwen3VLMoeForConditionalGeneration")
)
def test_multimodal_checkpoints_are_quantised_from_experts_stacked_in_any_way(family, tmp_path):
    """Published files of Qwen3.5 hold stacks, those of Qwen3-VL stacks (experts, inputs, outputs)."""
    module, _, name = family.partition(":")
    torch.manual_seed(0)
    (cls,) = (cls for cls in model_classes(module) if cls.__name__ == name)
    config = config_of_class(cls.config_class)
    config.architectures = [name]
    model = cls._from_config(copy.deepcopy(config), dtype=torch.bfloat16)
    tied = set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    if module == "qwen3_vl_moe":
        state |= {name: stack.transpose(1, 2).contiguous() for name, stack in expert_weights(model).items()}
    folders = [tmp_path / "published", tmp_path / "saved"]
    for folder in folders:
        model.save_pretrained(folder)
    save_file(state, folders[0] / "model.safetensors", {"format": "pt"})
    assert state.keys() & expert_weights(model).keys()
    for folder in folders:
        check(fuse_checkpoint(folder, tmp_path / f"{folder.name}-4", progress=False, quantise="int4"), model, "int4")


@pytest.mark.parametrize("family", ("deepseek_v2", "gpt_oss"))
def test_the_folder_loads_with_ktlib_to_the_decoded_weights(family, tmp_path):
    source, model = save(tmp_path / "source", family)
    out = fuse_checkpoint(source, tmp_path / "out", progress=False, quantise="int4")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="bfloat16", experts_implementation="ktlib")
    for name, weight in expert_weights(model).items():
        codes, scales, _, group = quantise(weight, "int4")
        decoded = ktlib.Weight("int4", codes, scales, group=group).decoded()
        parameter = loaded.get_parameter(name)
        assert parameter.shape == model.get_parameter(name).shape
        assert torch.equal(parameter.decoded(), decoded.mT if family == "gpt_oss" else decoded)
        model.get_parameter(name).data = parameter.decoded()
    ids = tokens()
    assert relative_error(model(ids).logits, loaded(ids).logits) < 0.02


def test_a_fused_checkpoint_is_quantised_to_the_same_bytes(tmp_path):
    hub, _ = save(tmp_path / "hub", "qwen3_moe")
    fused = fuse_checkpoint(hub, tmp_path / "fused", progress=False)
    outs = [fuse_checkpoint(source, tmp_path / f"{source.name}-8", False, "int8") for source in (hub, fused)]
    first, second = map(tensors_of, outs)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first)


def test_int4_has_the_bytes_of_compressed_tensors(tmp_path):
    """Its pack-quantized int32: the code of column i plus 8 in bits 4i to 4i + 3."""
    source, model = save(tmp_path / "source", "qwen3_moe")
    got = tensors_of(fuse_checkpoint(source, tmp_path / "out", progress=False, quantise="int4"))
    name = "model.layers.1.mlp.experts.down_proj"
    weight = model.state_dict()[name]
    scales = got[f"{name}.scales"].float().repeat_interleave(32, -1)[..., : weight.shape[-1]]
    values = (weight.float() / scales).round().clamp(-8, 7).long() + 8
    packed = sum(values[..., i::8] << (4 * i) for i in range(8)).to(torch.uint32)
    assert torch.equal(got[f"{name}.codes"].view(torch.int32), packed.view(torch.int32))


def test_layers_that_transformers_does_not_have_are_copied(tmp_path):
    hub, model = save(tmp_path / "hub", "deepseek_v3")
    more = {}

    def add(tensors):
        more.update({name.replace(".1.", ".2.", 1): t + 1 for name, t in tensors.items() if "layers.1." in name})
        tensors.update(more)

    rewrite(hub, add)
    out = fuse_checkpoint(hub, tmp_path / "out", progress=False, quantise="int4")
    got = tensors_of(out)
    assert any(".experts." in name for name in more)
    assert all(torch.equal(got[name], value) for name, value in more.items())
    for file in out.glob("*.safetensors"):
        kept = {name: value for name, value in load_file(file).items() if name not in more}
        file.unlink()
        if kept:
            save_file(kept, file)
    check(out, model, "int4")


# ------------------------------------------------------------------------------------------------------ interruptions


@pytest.mark.parametrize("files", (2, 4))
def test_an_interrupted_quantisation_goes_on_and_tells_all_errors(files, tmp_path, monkeypatch):
    source, _ = save(tmp_path / "source", "qwen3_moe")
    wanted = fuse_checkpoint(source, tmp_path / "whole", progress=False, quantise="nf4")
    written, write = [], tensor_files.write

    def write_some(path, tensors):
        if len(written) == files:
            raise KeyboardInterrupt
        written.append(path)
        write(path, tensors)

    out = tmp_path / "cut"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tensor_files, "write", write_some)
        fuse_checkpoint(source, out, progress=False, quantise="nf4")
    assert len(list(out.glob("*.safetensors"))) == files
    assert not (out / "ktlib.safetensors.index.json").exists() and not (out / "quantise_report.json").exists()
    stamps = {path: path.stat().st_mtime_ns for path in written}
    fuse_checkpoint(source, out, progress=False, quantise="nf4")
    assert stamps == {path: path.stat().st_mtime_ns for path in written}, "finished files were written again"
    for path in wanted.iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    (out / "quantise_report.json").unlink()  # killed before the last file
    fuse_checkpoint(source, out, progress=False, quantise="nf4")
    assert report_of(out) == report_of(wanted)


def test_a_kill_within_a_file_leaves_what_the_next_call_completes(tmp_path):
    source, _ = save(tmp_path / "source", "qwen3_moe")
    wanted = fuse_checkpoint(source, tmp_path / "whole", progress=False, quantise="int4")
    script = f"""
import os, signal, ktlib
from ktlib.conversion import quantise_checkpoint
nearest, calls = quantise_checkpoint.quantise, []

def until_the_20th(*args, **options):
    calls.append(args)
    return nearest(*args, **options) if len(calls) < 20 else os.kill(os.getpid(), signal.SIGKILL)

quantise_checkpoint.quantise = until_the_20th
ktlib.fuse_checkpoint({str(source)!r}, {str(tmp_path / "cut")!r}, progress=False, quantise="int4")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == -9, done.stderr
    left = {path.name for path in (tmp_path / "cut").glob("*.safetensors")}
    assert 0 < len(left) < len(list(wanted.glob("*.safetensors")))
    out = fuse_checkpoint(source, tmp_path / "cut", progress=False, quantise="int4")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in wanted.iterdir()
    }


def test_a_folder_made_with_other_settings_is_refused_by_name(tmp_path):
    source, _ = save(tmp_path / "source", "qwen3_moe")
    out = fuse_checkpoint(source, tmp_path / "out", progress=False, quantise="int8")
    plain = fuse_checkpoint(source, tmp_path / "plain", progress=False)
    before = {file: file.read_bytes() for folder in (out, plain) for file in folder.iterdir()}
    for folder, format, had in ((out, "int4", "'int8'"), (out, None, "'int8'"), (plain, "int8", "None")):
        needs = rf"quantise: got {format!r}, but .* made with {had}; needs another folder, such as .*{folder.name}-2"
        with pytest.raises(ValueError, match=needs):
            fuse_checkpoint(source, folder, progress=False, quantise=format)
    other, _ = save(tmp_path / "other", "mixtral")
    with pytest.raises(ValueError, match="made from something else"):
        fuse_checkpoint(other, out, progress=False, quantise="int8")
    assert before == {file: file.read_bytes() for folder in (out, plain) for file in folder.iterdir()}


@pytest.mark.parametrize(
    "name, text",
    [("quantise_report.json", "{}"), ("quantise_report.json", "my notes"), ("quantise_report.json", "[1]")]
    + [("config.json", "{}"), ("ktlib.safetensors.index.json", "{}")],
)
def test_files_of_somebody_else_are_left_alone(name, text, tmp_path):
    source, _ = save(tmp_path / "source", "qwen3_moe")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(text)
    with pytest.raises(ValueError, match=rf"^out: .*({name}|made from something else).*such as .*out-2"):
        fuse_checkpoint(source, tmp_path / "out", progress=False, quantise="int4")
    assert (tmp_path / "out" / name).read_text() == text and len(list((tmp_path / "out").iterdir())) == 1


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_cannot_be_quantised_is_refused_by_name_before_anything_is_written(tmp_path):
    source, _ = save(tmp_path / "source", "qwen3_moe")
    out = tmp_path / "out"
    choices = "'int8', 'int4', 'nf4', 'mxfp4', 'fp8', 'keep'"
    with pytest.raises(ValueError, match=f"quantise: got 'int3', needs None or one of {choices}"):
        fuse_checkpoint(source, out, quantise="int3")
    torch.manual_seed(0)
    for module, name, needs in (
        ("nemotron_h", "NemotronHForCausalLM", r"experts \(NemotronHExperts\) .* no gate; needs a family"),
        ("llama", "LlamaForCausalLM", "no routed experts"),
    ):
        cls = getattr(transformers, name)
        model = cls(config_of_class(cls.config_class)).bfloat16()
        model.save_pretrained(tmp_path / module)
        with pytest.raises(ValueError, match=f"source: .*{module}.*{needs}"):
            fuse_checkpoint(tmp_path / module, out, quantise="int4")
    names = [f"model.layers.0.mlp.experts.{e}.{p}_proj.weight" for e in range(8) for p in ("gate", "up", "down")]
    rewrite(source, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn) for name in names}))
    with pytest.raises(ValueError, match=r"source: model.layers.0.mlp.experts.* is torch.float8_e4m3fn, needs bf16"):
        fuse_checkpoint(source, out, quantise="int4")
    assert not out.exists()


def test_a_weight_that_is_not_finite_is_named_with_its_expert(tmp_path):
    source, _ = save(tmp_path / "source", "qwen3_moe")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    rewrite(source, lambda tensors: tensors[name][2].fill_(torch.nan))
    needs = r"source: model.layers.1.mlp.experts.gate_up_proj, expert 5: weight: got nan at \(50, 0\)"
    with pytest.raises(ValueError, match=needs):
        fuse_checkpoint(source, tmp_path / "out", progress=False, quantise="int4")


def test_without_ktlib_no_model_is_made_of_the_folder(tmp_path):
    source, _ = save(tmp_path / "source", "qwen3_moe")
    out = fuse_checkpoint(source, tmp_path / "out", progress=False, quantise="int4")
    script = f"""
import sys
from transformers import AutoModelForCausalLM
assert "ktlib" not in sys.modules
try:
    AutoModelForCausalLM.from_pretrained({str(out)!r}, dtype="bfloat16")
except OSError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "refused:" in done.stdout and "model.safetensors" in done.stdout, done.stderr
