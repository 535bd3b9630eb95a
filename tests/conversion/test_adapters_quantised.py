"""Adapters go in and out alike with a quantised base and with the bf16 one: shapes are those of the decoded weights."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.adapter_files import ADAPTER_FILE, CONFIG, FUSED, assert_same_files
from support.models import random_adapter, tokens
from support.quantised_files import save_decoded, save_mxfp4, save_own, save_quantised
from transformers import AutoConfig, AutoModelForCausalLM

import ktlib
from ktlib.conversion.adapters import export_adapter, import_adapter

BASES = ["fp8", "gptq", "own nf4", "mxfp4"]


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16", experts_implementation="ktlib").eval()


def save_adapter(folder, base):
    model = load(base)
    random_adapter(get_peft_model(model, ktlib.lora_config(model, r=3))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=BASES)
def bases(request, tmp_path_factory):
    """``(quantised checkpoint, the decoded bf16 one)``."""
    parent, kind = tmp_path_factory.mktemp("bases"), request.param
    folder = parent / "quantised"
    if kind.startswith("own "):
        decoded = save_own(folder, kind.removeprefix("own "))
    else:
        decoded = save_mxfp4(folder) if kind == "mxfp4" else save_quantised(folder, kind)
    return folder, save_decoded(parent / "bf16", folder, decoded)


def settings(folder):
    """The settings of an adapter, without the path of its base."""
    return json.loads((folder / CONFIG).read_text()) | {"base_model_name_or_path": None}


def test_an_adapter_of_either_base_has_the_same_files_and_loads_on_the_other(bases, tmp_path):
    of_codes, of_bf16 = (save_adapter(tmp_path / f"of_{base.name}", base) for base in bases)
    assert_same_files(of_codes, of_bf16)
    assert settings(of_codes) == settings(of_bf16)
    logits = []
    for adapter, base in ((of_bf16, bases[0]), (of_codes, bases[1])):
        with torch.no_grad():
            ktlib.factor_adapters(model := PeftModel.from_pretrained(load(base), adapter))
            logits.append(model(tokens()).logits)
            assert not torch.equal(logits[-1], load(base)(tokens()).logits)
    assert torch.equal(*logits)


def test_layouts_are_converted_alike_for_either_base(bases, tmp_path):
    source = save_adapter(tmp_path / "source", bases[0])
    layouts = {"ktransformers": FUSED, "per_expert": ADAPTER_FILE, "peft": ADAPTER_FILE}
    if AutoConfig.from_pretrained(bases[0]).model_type == "gpt_oss":  # files have no module per expert
        layouts = {"peft": ADAPTER_FILE}
    for layout, file in layouts.items():
        made = [tmp_path / f"{layout}_for_{base.name}" for base in bases]
        for out, base in zip(made, bases, strict=True):
            export_adapter(source, out, base, layout=layout)
        import_adapter(made[1], back := tmp_path / f"{layout}_back", bases[0])
        assert_same_files(source, back)
        assert_same_files(*made, file)
        assert settings(made[0]) == settings(made[1])


def test_a_loaded_model_may_be_the_base(bases, tmp_path):
    source = save_adapter(tmp_path / "source", bases[1])
    export_adapter(source, tmp_path / "by_folder", bases[0], layout="peft")
    export_adapter(source, tmp_path / "by_model", load(bases[0]), layout="peft")
    assert_same_files(tmp_path / "by_folder", tmp_path / "by_model")


def test_shapes_of_codes_are_refused(bases, tmp_path):
    """Stock PEFT makes them of packed weights whose bytes it takes for elements."""
    source = save_adapter(tmp_path / "source", bases[0])
    tensors = load_file(source / ADAPTER_FILE)
    name = next(name for name in tensors if ".experts." in name and "lora_A" in name)
    tensors[name] = tensors[name][:, : tensors[name].shape[1] // 2].contiguous()
    save_file(tensors, source / ADAPTER_FILE)
    messages = []
    for base in bases:
        with pytest.raises(ValueError, match=r"wrong shape \(1\): .*experts") as error:
            import_adapter(source, tmp_path / "out", base)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
