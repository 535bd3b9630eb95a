"""What stock reads back is judged: every planted fault is found, and a right adapter passes on any model."""

import json
import re
import shutil

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.models import random_adapter, tiny_model, tokens
from transformers.modeling_outputs import CausalLMOutput

from ktlib.diagnosis import readback
from ktlib.integrations.peft_lora import ParamWrapper
from ktlib.training import sft

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = [row.tolist() for row in tokens(3, 20)]


def trained(folder, family="deepseek_v3", **changes):
    """A model with random bf16 weights and adapters on all its parts; both are saved in ``folder``."""
    model = tiny_model(family, "ktlib", dtype=torch.bfloat16, **changes)
    model.save_pretrained(folder / "base")
    adapted = random_adapter(sft.add_lora(model, rank=4, alpha=8), scale=0.3)
    sft.save(adapted, folder / "adapter")
    return adapted


def stock(folder):
    """The same, read by stock transformers and PEFT."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    base = load(folder / "base", dtype=torch.bfloat16, experts_implementation="eager")
    return PeftModel.from_pretrained(base, folder / "adapter")


def change(folder, function):
    """Change the settings and the tensors of a saved adapter."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    function(settings, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")


def other_scaling(settings, tensors):
    settings["lora_alpha"] = 9


def swapped_layers(settings, tensors):
    for name in [name for name in tensors if ".layers.0.self_attn." in name]:
        other = name.replace(".layers.0.", ".layers.1.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def missing_tensor(settings, tensors):
    del tensors[next(name for name in tensors if "experts.lora_B" in name)]


def one_wrong_value(settings, tensors):
    tensors[next(name for name in tensors if "shared_experts" in name)][0, 0] += 2**-9


def no_attention(settings, tensors):
    settings["target_modules"] = [
        name for name in settings["target_modules"] if "q_a" not in name and "q_b" not in name
    ]


def experts_in_other_order(settings, tensors):
    for name in [name for name in tensors if ".experts." in name and "lora_A" in name]:
        tensors[name] = tensors[name].flip(0).contiguous()


FAULTS = {
    other_scaling: "scaling {'default': 2.25}, was trained with {'default': 2.0}",
    swapped_layers: "layers.0.self_attn.*: other values",
    missing_tensor: "experts.*lora_B.*: other values",
    one_wrong_value: "shared_experts.*: other values",
    no_attention: "q_[ab]_proj.*: not there",
    experts_in_other_order: "experts.*lora_A.*: other values",
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    return folder, readback.observe(trained(folder), PROMPTS)


def test_what_was_trained_is_read_back(good):
    folder, observed = good
    report = readback.read_back(stock(folder), observed)
    assert not report.wrong and len(report.layers) == len(observed.calls) and not report.unjudged
    assert {"self_attn", "routed_experts", "shared_experts", "dense_mlp"} <= set(str(report).split())


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_in_the_file_is_found(good, fault, tmp_path):
    folder, observed = good
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    change(tmp_path / "adapter", fault)
    report = readback.read_back(stock(tmp_path), observed)
    assert any(re.search(FAULTS[fault], line) for line in report.wrong), report.wrong
    assert "WRONG" in str(report)


def test_logits_in_fp32_are_those_of_the_model_in_fp32(good):
    """Layer by layer, and the model is in bf16 again afterwards."""
    folder, observed = good
    model = stock(folder)
    before = {name: value.clone() for name, value in model.named_parameters()}
    layerwise = readback.logits_in_fp32(model, PROMPTS)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    whole = readback.logits(model.float(), PROMPTS)
    assert all(torch.equal(got, want) for got, want in zip(layerwise, whole, strict=True))


def test_another_tensor_in_the_file_is_found(good):
    folder, observed = good
    fewer = dict(list(observed.tensors.items())[1:])
    (line,) = readback.read_back(stock(folder), observed._replace(tensors=fewer)).wrong
    assert line.endswith("was not trained")


def test_experts_that_compute_something_else_are_found(tmp_path, monkeypatch):
    """The file is right, but training has scaled the adapters of the experts otherwise."""
    adapted, factors = trained(tmp_path), ParamWrapper.factors
    monkeypatch.setattr(ParamWrapper, "factors", lambda self: (*factors(self)[:2], 1.1 * factors(self)[2]))
    observed = readback.observe(adapted, PROMPTS)
    (line,) = readback.read_back(stock(tmp_path), observed).wrong
    assert re.search(r"experts: 0\.\d+ from fp32, stock 0\.00\d+", line)


def test_a_layer_that_does_not_fit_is_not_judged(good, monkeypatch):
    folder, observed = good
    monkeypatch.setattr(readback, "available_memory", lambda: 1000)
    report = readback.read_back(stock(folder), observed)
    assert not report.wrong and not report.layers and not report.exact_errors and "in fp32 needs" in report.unjudged
    assert report.unjudged in str(report)


MODELS = {
    "deep": ("deepseek_v3", {"num_hidden_layers": 24}),
    "wide": ("deepseek_v3", {"hidden_size": 1024, "moe_intermediate_size": 256, "intermediate_size": 512}),
    "large weights": ("mixtral", {"num_hidden_layers": 6, "initializer_range": 1.0}),
    "small weights": ("qwen2_moe", {"num_hidden_layers": 4, "initializer_range": 0.002}),
    "many experts": ("olmoe", {"num_hidden_layers": 2, "num_experts": 64, "num_experts_per_tok": 8}),
    "biases": ("gpt_oss", {"num_hidden_layers": 4}),
    "hybrid": ("qwen3_next", {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_right_adapter_passes_on_any_model(name, tmp_path):
    """Of random weights, whose routers are nearly tied for many tokens: logits are far apart, and stock's own too."""
    family, changes = MODELS[name]
    observed = readback.observe(trained(tmp_path, family, **changes), PROMPTS)
    report = readback.read_back(stock(tmp_path), observed)
    assert not report.wrong
    if name == "deep":
        assert report.logits_error > 0.05 and min(report.exact_errors) > 0.05
    layers = {layer.name.split(".layers.")[1].split(".")[0] for layer in report.layers}
    assert len(layers) == min(readback.LAYERS, changes.get("num_hidden_layers", 2)) and "0" in layers


class Staged(torch.nn.Module):
    """A model whose layers are in a container with an unusual name."""

    def __init__(self):
        super().__init__()
        self.embedding, self.stages = torch.nn.Embedding(96, 8), torch.nn.ModuleList()
        for _ in range(9):
            self.stages.append(torch.nn.ModuleDict({"projection": torch.nn.Linear(8, 8)}))

    def forward(self, input_ids):
        hidden = self.embedding(input_ids)
        for stage in self.stages:
            hidden = stage["projection"](hidden)
        return CausalLMOutput(logits=hidden)


def test_few_layers_are_compared_whatever_their_container_is_called():
    model = get_peft_model(Staged(), LoraConfig(target_modules=["projection"], init_lora_weights=False))
    calls = readback.observe(model, PROMPTS).calls
    assert list(calls) == [f"base_model.model.stages.{i}.projection" for i in (0, 2, 5, 8)]
