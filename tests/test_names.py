"""Names without what PEFT adds to them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ktlib.names import bare_modules, bare_name


@pytest.mark.parametrize(
    "name, bare",
    [
        ("base_model.model.layers.1.experts.base_layer.base_layer.gate_up_proj", "layers.1.experts.gate_up_proj"),
        ("base_model.model.layers.1.experts.base_layer.lora_A.default.weight", "layers.1.experts.lora_A.weight"),
        ("base_model.model.layers.1.q_proj.base_layer", "layers.1.q_proj"),
        ("layers.1.q_proj.lora_B.default", "layers.1.q_proj.lora_B"),
        ("layers.1.default_gate.weight", "layers.1.default_gate.weight"),
        ("layers.1.base_layers.0.weight", "layers.1.base_layers.0.weight"),
        ("base_layer_norm.base_layer.weight", "base_layer_norm.weight"),
    ],
)
def test_only_whole_names_that_peft_inserted_are_removed(name, bare):
    assert bare_name(name) == bare


def test_every_module_of_a_model_with_adapters_has_its_name_in_the_bare_model():
    def model():
        layers = {"base_layers": torch.nn.Linear(4, 4), "default": torch.nn.Linear(4, 4)}
        return torch.nn.Sequential(torch.nn.ModuleDict(layers))

    names = [name for name, _ in bare_modules(model())]
    assert {"0.base_layers", "0.default"} < set(names)
    adapted = get_peft_model(model(), LoraConfig(r=2, target_modules=["0.base_layers", "0.default"]))
    assert [name for name, _ in bare_modules(adapted)] == names
