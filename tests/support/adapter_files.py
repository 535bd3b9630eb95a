"""Adapters in files: stock PEFT's, and those with modules per expert as PEFT on transformers 4 writes them."""

import json

import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from support.models import random_adapter, tiny_config, tiny_model

from ktlib.integrations.peft_lora import lora_config

ADAPTER_FILE, CONFIG, FUSED = "adapter_model.safetensors", "adapter_config.json", "fused_expert_lora.safetensors"


def save_peft(folder, family="deepseek_v2", **options):
    """A stock PEFT adapter of random values, saved; returns (folder, base config)."""
    model = tiny_model(family)
    random_adapter(get_peft_model(model, lora_config(model, **{"r": 4, "lora_alpha": 6} | options))).save_pretrained(
        folder
    )
    return folder, tiny_config(family)


def per_expert_names(family):
    """``{module in the old spelling: (out, in)}`` of all experts, written down without ktlib."""
    config, model = tiny_config(family), tiny_model(family)
    names = {}
    for name, value in model.named_parameters():
        if value.dim() != 3:
            continue
        experts, out, inner = value.shape
        stem = name.rpartition(".")[0]
        for e in range(experts):
            if config.model_type == "mixtral":
                stem, (gate, up, down) = stem.replace(".mlp.", ".block_sparse_moe."), ("w1", "w3", "w2")
            else:
                gate, up, down = "gate_proj", "up_proj", "down_proj"
            if name.endswith("gate_up_proj"):
                names[f"{stem}.{e}.{gate}"] = names[f"{stem}.{e}.{up}"] = (out // 2, inner)
            else:
                names[f"{stem}.{e}.{down}"] = (out, inner)
    return names


def save_per_expert(folder, family="deepseek_v2", r=3, alpha=5, attention=True, **settings):
    """An adapter as PEFT on transformers 4 writes it, every matrix different; returns (folder, base config)."""
    generator, tensors = torch.Generator().manual_seed(1), {}
    shapes = per_expert_names(family)
    if attention:
        model = tiny_model(family)
        shapes |= {n: tuple(m.weight.shape) for n, m in model.named_modules() if n.endswith("self_attn.o_proj")}
    for name, (out, inner) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(r, inner, generator=generator).bfloat16()
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, r, generator=generator).bfloat16()
    experts = "w1|w2|w3" if family == "mixtral" else "gate_proj|up_proj|down_proj"
    targets = rf".*\.experts\.\d+\.({experts})" + (r"|.*\.o_proj" if attention else "")
    folder.mkdir()
    save_file(tensors, folder / ADAPTER_FILE)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": alpha, "target_modules": targets}
    (folder / CONFIG).write_text(json.dumps(config | settings))
    return folder, tiny_config(family)


def assert_same_files(one, other, *names):
    for name in names or (ADAPTER_FILE,):
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys()
        for key, value in first.items():
            assert value.dtype == second[key].dtype and torch.equal(value, second[key]), key


def settings_of(folder, *names):
    config = json.loads((folder / CONFIG).read_text())
    return [config.get(name) for name in names]
