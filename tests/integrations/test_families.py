"""Every model family of the installed transformers that has routed experts: the operator against stock eager experts.

Families are found in transformers' sources, so that a family of a new release is tested without a change here.
"""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from support.families import EXPERTS, HIDDEN, describe, discover, table, tiny_experts
from support.models import random_adapter, relative_error
from support.pages import TEXT

import ktlib

# Why the operator cannot serve a family: it runs a stock implementation.
UNSERVED = {
    "NemotronHExperts": "its experts have no gate",
    "MuseSparkExperts": "its experts end in a norm",
    "Inkling2Experts": "its gate is none of silu",
    "Inkling2LoopExperts": "its gate is none of silu",
}
CLASSES = discover()
SERVED = [case for case in CLASSES if case[1] not in UNSERVED]
# Roundings to bf16, as for the operator alone (test_moe_experts.py, test_gates.py); at this size single large
# elements, and values at a limit, weigh more.
BOUND = 0.005


def routed(seed=0, tokens=40, dtype=torch.float32):
    """hidden_states, top_k_index, top_k_weights; the first and last are leaves that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(tokens, HIDDEN, generator=generator).bfloat16().to(dtype).requires_grad_()
    weights, index = torch.randn(tokens, EXPERTS, generator=generator).softmax(-1).topk(2)
    return hidden_states, index, weights.detach().requires_grad_()


def output_and_gradients(module, arguments, named_parameters):
    output = module(*arguments)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    output.backward(gradient.to(output.dtype))
    found = {"output": output, "hidden_states": arguments[0].grad, "top_k_weights": arguments[2].grad}
    return found | {name: parameter.grad for name, parameter in named_parameters if parameter.requires_grad}


def assert_agree(ours, stock):
    assert ours.keys() == stock.keys()
    errors = {name: relative_error(ours[name], stock[name]) for name in stock}
    assert {name: round(error, 5) for name, error in errors.items() if not error <= BOUND} == {}


def test_the_scan_finds_what_it_should():
    assert len(CLASSES) >= 55 and {"deepseek_v2", "qwen3_moe", "gpt_oss", "gemma4"} <= {family for family, _ in CLASSES}
    assert "NemotronHExperts" in {name for _, name in CLASSES}


@pytest.mark.parametrize("family, name", SERVED, ids="/".join)
def test_outputs_and_all_gradients(family, name, logged):
    """Gradients of the hidden states, the routing weights, and every weight and bias of the experts."""
    results = []
    for implementation, dtype in (("ktlib", torch.bfloat16), ("eager", torch.float32)):
        module = tiny_experts(family, name, implementation, dtype)
        results.append(output_and_gradients(module, routed(), module.named_parameters()))
    assert logged() == [], f"{family}: {name} does not run in the operator"
    assert_agree(*results)


@pytest.mark.parametrize("family, name", SERVED, ids="/".join)
def test_adapters(family, name, logged):
    """LoRA as factors in the operator against stock PEFT's W + BA on stock eager experts."""
    results = []
    for implementation, dtype in (("ktlib", torch.bfloat16), ("eager", torch.float32)):
        parent = torch.nn.Module()
        parent.experts = tiny_experts(family, name, implementation, dtype)
        parent.forward = lambda *arguments, parent=parent: parent.experts(*arguments)
        targets = ["experts.down_proj", "experts.gate_up_proj"]
        if implementation == "ktlib":
            config = ktlib.lora_config(parent, r=4, target_modules=[])
            assert sorted(config.target_parameters) == targets
        else:
            config = LoraConfig(r=4, lora_alpha=16, target_modules=[], target_parameters=targets)
        model = random_adapter(get_peft_model(parent, config))
        lora = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
        results.append(output_and_gradients(model, routed(), lora))
    assert logged() == [], f"{family}: {name} does not run in the operator"
    assert len(results[0]) == 3 + 4
    assert_agree(*results)


@pytest.mark.parametrize("family, name", [case for case in CLASSES if case[1] in UNSERVED], ids="/".join)
def test_unserved_families_run_stock_with_one_line_in_the_log(family, name, logged):
    ours, stock = (tiny_experts(family, name, implementation, torch.bfloat16) for implementation in ("ktlib", "eager"))
    for seed in (0, 1):
        arguments = [routed(seed, dtype=torch.bfloat16) for _ in range(2)]
        results = [
            output_and_gradients(module, given, module.named_parameters())
            for module, given in zip((ours, stock), arguments, strict=True)
        ]
        for key in ("output", "hidden_states", "top_k_weights"):  # two stock implementations in bf16
            assert relative_error(results[0][key], results[1][key]) < 0.02
        for module in (ours, stock):
            module.zero_grad()
    assert len(logged()) == 1 and UNSERVED[name] in logged()[0] and name in logged()[0]
    assert describe(family, name)[0] is None


def test_the_page_of_families_lists_them_all():
    if f"in transformers {'.'.join(transformers.__version__.split('.')[:2])}," not in TEXT:
        pytest.skip("the table is of another transformers")
    assert set(UNSERVED) <= {name for _, name in CLASSES}
    missing = [line for line in table().splitlines() if line not in TEXT]
    assert missing == [], "run `python tests/support/families.py` and put its table into ktlib/integrations/README.md"
