"""Quantised checkpoints on a machine with a GPU: codes on the CPU, the rest on the GPU; or all decoded on the GPU."""

import pytest
import torch
from support.models import relative_error, tokens
from support.pinned import devices, is_expert, is_other
from support.quantised_files import save_decoded, save_mxfp4, save_quantised
from transformers import AutoModelForCausalLM

import ktlib
from ktlib.integrations.stored_weight import is_mapped, quantised_format

SIZES = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128}


def load(folder, **options):
    options = {"dtype": "bfloat16", "experts_implementation": "ktlib"} | options
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def trained(model):
    """Loss and gradients of adapters of the experts after a step, on the CPU."""
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(model, ktlib.lora_config(model, r=4, target_modules=[])).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=torch.Generator(parameter.device).manual_seed(1))
    device = model.get_input_embeddings().weight.device
    loss = model(input_ids=tokens().to(device), labels=tokens().to(device)).loss
    loss.backward()
    return loss.item(), {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["fp8", "int4", "gptq", "mxfp4"])
def test_codes_stay_on_the_cpu_and_train_as_decoded_experts_do(kind, tmp_path):
    source = tmp_path / "source"
    decoded = save_mxfp4(source) if kind == "mxfp4" else save_quantised(source, kind, **SIZES)
    other = save_decoded(tmp_path / "decoded", source, decoded)
    results = []
    for folder in (source, other):
        model = ktlib.pin_experts(load(folder)).to("cuda")
        assert devices(model, is_expert) == {"cpu"} and devices(model, is_other) == {"cuda"}
        assert (quantised_format(model) is None) is (folder is other)
        results.append(trained(model))
    (loss, gradients), (wanted, wanted_gradients) = results
    assert gradients and gradients.keys() == wanted_gradients.keys() and abs(loss - wanted) < 1e-3
    for name, gradient in gradients.items():
        assert relative_error(gradient, wanted_gradients[name]) < 0.03, name


def test_with_a_device_map_the_experts_are_decoded_there(tmp_path):
    decoded = save_quantised(tmp_path, "fp8", **SIZES)
    model = load(tmp_path, device_map="cuda")
    weight = model.model.layers[1].mlp.experts.down_proj
    assert not is_mapped(model) and weight.device.type == "cuda"
    assert torch.equal(weight[3].cpu(), decoded["model.layers.1.mlp.experts.3.down_proj.weight"])
    assert model(tokens().cuda()).logits.isfinite().all()
