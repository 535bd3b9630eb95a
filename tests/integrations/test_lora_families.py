"""What ``lora_config`` adapts in whole models of every family with routed experts, for text and multimodal."""

import pytest
import torch
from peft import get_peft_model
from support.families import discover
from support.family_models import adapted, model_classes, tiny_model
from support.models import random_adapter, tokens

from ktlib.integrations import transformers_experts
from ktlib.integrations.peft_lora import ParamWrapper, lora_config
from ktlib.names import component

FAMILIES = {family: {name for f, name in discover() if f == family} for family, _ in discover()}
CASES = [(family, cls.__name__) for family in FAMILIES for cls in model_classes(family)]
# DiffusionGemma's encoder has the weights of its decoder, and makes keys and values of the prompt for it. The decoder
# is adapted.
APART = {"diffusion_gemma": "model.encoder."}


def run_text(model):
    """Forward and backward of token ids alone. Qwen3-Omni has no forward of its own: its thinker reads the text."""
    model = getattr(getattr(model, "base_model", model), "model", model) if hasattr(model, "peft_config") else model
    logits = getattr(model, "thinker", model)(input_ids=tokens(), use_cache=False).logits
    logits.float().square().mean().backward()


@pytest.mark.parametrize("family, name", CASES, ids=map("/".join, CASES))
def test_every_default_adapter_learns_from_text_and_all_experts_that_text_reaches_have_one(family, name, logged):
    model = tiny_model(family, name, dtype=torch.bfloat16)
    model.set_experts_implementation("ktlib")
    reached = set()
    for path, module in model.named_modules():
        if transformers_experts.is_experts(module) and not path.startswith(APART.get(family, "-")):
            module.register_forward_hook(lambda *_, path=path: reached.add(path))
    model = random_adapter(get_peft_model(model, lora_config(model, r=2))).train()
    run_text(model)
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []
    found = adapted(model)
    bases = {path: wrappers[0].get_base_layer() for path, wrappers in found.items()}
    assert {path for path, base in bases.items() if transformers_experts.is_experts(base)} == reached and reached
    for path in reached:
        assert len(found[path]) == 2, "not both weights of the experts"
        reason = transformers_experts.unserved(bases[path], torch.empty(0))
        assert reason is not None or all(type(wrapper) is ParamWrapper for wrapper in found[path])
        assert (reason is not None) == any(f"instead of ktlib: {reason}" in text for text in logged())
    assert {component(path) for path in found} >= {"self_attn", "routed_experts"}


@pytest.mark.parametrize("family, name", CASES, ids=map("/".join, CASES))
def test_all_linear_is_every_layer_that_learns_from_text_but_head_and_routers(family, name):
    model = tiny_model(family, name)
    model.set_experts_implementation("eager")
    model.requires_grad_(False)
    linears = {path: module for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for module in linears.values():
        module.weight.requires_grad_(True)
    run_text(model)
    learning = {path for path, module in linears.items() if module.weight.grad is not None}
    head = {path for path, module in linears.items() if path.rpartition(".")[2] in ("lm_head", "score")}
    refused = {path for path in learning if path.endswith("mixer.out_proj")}  # by PEFT, for Mamba's sake
    refused |= {path for path in learning if type(linears[path]).forward is not torch.nn.Linear.forward}
    refused |= {path for path in learning if path.startswith(APART.get(family, "-"))}
    wanted = {path for path in learning - head - refused if component(path) != "router"}
    model = get_peft_model(model, lora_config(model, r=2, target_modules="all-linear", target_parameters=[]))
    assert set(adapted(model)) == wanted
