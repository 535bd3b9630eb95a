"""Audits with quantised bases: a weight stored as codes counts with its decoded shape and values."""

import dataclasses

import pytest
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from support.models import expert_modules, random_adapter
from support.quantised_files import KINDS, save_decoded, save_mxfp4, save_own, save_quantised, set_config
from transformers import AutoConfig, AutoModelForCausalLM

import ktlib
from ktlib import cli
from ktlib.diagnosis.audit import audit
from ktlib.files import tensor_files

FORMATS = {kind: format for kind, (_, _, format, _) in KINDS.items()} | {
    **{"v4": "e2m1", "mxfp4": "e2m1", "own int4": "int4"}
}
NVFP4 = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {}}


def save(folder, kind):
    """A quantised checkpoint in the folder, and beside it the decoded one; returns both folders."""
    if kind == "own int4":
        decoded = save_own(folder)
    else:
        decoded = save_mxfp4(folder) if kind == "mxfp4" else save_quantised(folder, kind)
    return folder, save_decoded(folder.parent / "decoded", folder, decoded)


def rows(result):
    """The table without dtypes."""
    return [{**dataclasses.asdict(row), "dtypes": None} for row in result.rows]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_quantised_checkpoint_counts_as_the_decoded_one(kind, tmp_path):
    folder, decoded = save(tmp_path / "source", kind)
    result, wanted = audit(folder), audit(decoded)
    assert rows(result) == rows(wanted) and result.clean and not result.notes
    codes = [t for n, t in load_file(decoded / "model.safetensors").items() if ".experts." in n and "bias" not in n]
    assert result["routed_experts"].dtypes[FORMATS[kind]] == len(codes) > 0
    assert wanted["routed_experts"].dtypes.keys() == {"bfloat16"}


@pytest.mark.parametrize("kind", ["fp8", "int4, zeros", "mxfp4"])
def test_a_loaded_model_is_decoded_one_expert_at_a_time(kind, tmp_path, monkeypatch):
    folder, decoded = save(tmp_path / "source", kind)
    options = {"dtype": "bfloat16", "experts_implementation": "ktlib"}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    sizes, decode = [], ktlib.Weight.decoded
    monkeypatch.setattr(ktlib.Weight, "decoded", lambda weight: sizes.append(weight.shape[0]) or decode(weight))
    result = audit(model)
    assert sizes == [1] * sum(2 * len(module.down_proj) for module in expert_modules(model).values())
    assert rows(result) == rows(audit(AutoModelForCausalLM.from_pretrained(decoded, **options)))
    assert result["routed_experts"].dtypes[FORMATS[kind]] == 4


@pytest.mark.parametrize("kind", ["fp8", "int8 rows", "own int4"])
def test_a_scale_that_is_not_finite_is_a_problem_of_its_weight(kind, tmp_path):
    folder, _ = save(tmp_path / "source", kind)
    file = next(f for f in folder.glob("*.safetensors") if any(".experts." in n for n in load_file(f)))
    tensors = load_file(file)
    name = next(
        name for name in tensors if ".experts." in name and name.endswith(("weight_scale", "scale_inv", ".scales"))
    )
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    result = audit(folder)
    assert result["routed_experts"].nan == 1 and "routed_experts: 1 of" in result.problems[0]


@pytest.mark.parametrize("settings", [{"quant_method": "bitsandbytes"}, {"quant_method": "of_tomorrow"}, NVFP4])
def test_formats_that_ktlib_does_not_decode_are_named_and_count_as_stored(settings, tmp_path):
    folder, _ = save(tmp_path / "source", "int4")
    set_config(folder, quantization_config=settings)
    result = audit(folder)
    assert result.clean and result["routed_experts"].dtypes["int32"] == 48
    assert "counted as they are stored" in result.notes[0]
    assert settings.get("format", settings["quant_method"]) in result.notes[0]


def test_codes_without_scales_are_a_problem_of_a_folder_but_not_of_one_of_several_files(tmp_path):
    folder, _ = save(tmp_path / "source", "fp8")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if ".experts." in name and name.endswith("_scale_inv"))
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    weight = name.removesuffix("_scale_inv")
    assert not audit(folder).clean and weight in audit(folder).problems[0]
    assert audit(file).clean and weight in audit(file).notes[0]


def test_the_index_of_an_own_checkpoint_tells_which_files_are_missing(tmp_path):
    folder, _ = save(tmp_path / "source", "own int4")
    (lost := tensor_files.weight_files(folder)[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {lost.name}, which ktlib.safetensors.index.json names"):
        audit(folder)


def adapted(folder, base):
    """An adapter that stock PEFT saves for a loaded base."""
    options = {"dtype": "bfloat16", "experts_implementation": "ktlib"}
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    random_adapter(get_peft_model(model, ktlib.lora_config(model, r=3))).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["fp8", "int4", "gptq", "mxfp4"])
def test_an_adapter_audits_alike_with_a_quantised_base_and_with_the_bf16_one(kind, tmp_path, capsys):
    """Whichever base it was trained on, and also where its shapes are wrong."""
    bases = save(tmp_path / "source", kind)
    for number, trained_on in enumerate(bases):
        adapter = adapted(tmp_path / f"adapter{number}", trained_on)
        first, second = (audit(adapter, AutoConfig.from_pretrained(base)) for base in bases)
        assert first.clean and str(first) == str(second)
        for base in bases:
            assert cli.main(["audit", str(adapter), "--base", str(base)]) == 0
        file = adapter / "adapter_model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if ".experts." in name and "lora_A" in name)
        tensors[name] = tensors[name][:, : tensors[name].shape[1] // 2].contiguous()  # as for two codes in a byte
        save_file(tensors, file)
        outputs = []
        for base in bases:
            assert cli.main(["audit", str(adapter), "--base", str(base)]) == 1
            outputs.append(capsys.readouterr().out.splitlines()[-1])
        assert outputs[0] == outputs[1] and "routed_experts: wrong shape" in outputs[0]
