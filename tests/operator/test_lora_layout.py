"""Our description of PEFT's layout of expert LoRA agrees with PEFT."""

import torch
from peft import LoraConfig, get_peft_model

from ktlib.reference import lora_layout

EXPERTS, OUT, IN, RANK = 3, 5, 7, 2


class Stack(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(EXPERTS, OUT, IN))


def test_the_product_of_the_split_factors_is_pefts_delta_of_each_expert():
    torch.manual_seed(0)
    config = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=[], target_parameters=["weight"], init_lora_weights=False
    )
    adapted = get_peft_model(torch.nn.Sequential(Stack()), config).base_model.model[0]
    lora_A, lora_B = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    assert (lora_A.shape, lora_B.shape) == lora_layout.shapes(RANK, EXPERTS, OUT, IN)
    delta = lora_layout.split_b(lora_B, EXPERTS) @ lora_layout.split_a(lora_A, EXPERTS)
    torch.testing.assert_close(delta, adapted.get_delta_weight("default"))


def test_splitting_copies_nothing_and_stacking_is_its_inverse():
    lora_A, lora_B = (torch.randn(shape) for shape in lora_layout.shapes(RANK, EXPERTS, OUT, IN))
    a, b = lora_layout.split_a(lora_A, EXPERTS), lora_layout.split_b(lora_B, EXPERTS)
    assert (a.shape, b.shape) == ((EXPERTS, RANK, IN), (EXPERTS, OUT, RANK))
    assert (a.data_ptr(), b.data_ptr()) == (lora_A.data_ptr(), lora_B.data_ptr())
    assert torch.equal(lora_layout.stack_a(a), lora_A) and torch.equal(lora_layout.stack_b(b), lora_B)
