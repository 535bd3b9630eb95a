"""Strict readers of adapters by the rules of servers: the adapter is applied as the server does it, or ValueError.

The rules are those of vLLM 0.33 and SGLang 0.5.23. A tensor that a server would leave out is an error here. The base
model is a :class:`support.experts_apart.ExpertsApart`, whose names of modules are those that servers look for.
"""

import json
import re

import torch
from safetensors.torch import load_file

PREFIX = "base_model.model."
VLLM, SGLANG = "vLLM", "SGLang"


def apply_as(server, folder, model):
    """Add the adapter in ``folder`` to the weights of ``model``, in place; returns the model."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    pairs = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise ValueError(f"{server}: {key} is no LoRA matrix")
        pairs.setdefault(match[1], {})[match[2]] = tensor
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if unknown := pairs.keys() - linears.keys():
        raise ValueError(f"{server}: no modules {sorted(unknown)}")
    scaling_of = (_check_vllm if server == VLLM else _check_sglang)(settings, pairs, linears)
    with torch.no_grad():
        for name, pair in pairs.items():
            linears[name].weight += scaling_of(name, pair["A"].shape[0]) * (pair["B"] @ pair["A"])
    return model


def _check_vllm(settings, pairs, linears):
    if settings.get("modules_to_save"):
        raise ValueError("vLLM: modules_to_save")
    if left_out := [name for name in pairs if name.endswith(".kv_b_proj")]:
        raise ValueError(f"vLLM: {left_out[0]} is used as it was when the server started")
    for layer in {name.partition(".experts.")[0] for name in pairs if ".experts." in name}:
        of_layer = {name for name in linears if name.startswith(f"{layer}.experts.")}
        if lacking := of_layer - pairs.keys():
            raise ValueError(f"vLLM: gate, up and down of all experts have to be there, not {sorted(lacking)}")

    def value(pattern, name, default):
        table = settings.get(pattern) or {}
        return next((value for key, value in table.items() if re.match(rf"(.*\.)?({key})$", name)), default)

    def scaling(name, rank):
        if rank != value("rank_pattern", name, settings["r"]):
            raise ValueError(f"vLLM: rank {rank} of {name} is not that of the settings")
        return value("alpha_pattern", name, settings["lora_alpha"]) / (rank**0.5 if settings["use_rslora"] else rank)

    return scaling


# Layers that SGLang computes as one, by the part whose tensors it looks for first, and the others: (name, required).
_STACKED = {
    "q_proj": ("qkv_proj", (("k_proj", False), ("v_proj", True))),
    "gate_proj": ("gate_up_proj", (("up_proj", False),)),
    "q_a_proj": ("fused_qkv_a_proj_with_mqa", (("kv_a_proj_with_mqa", False),)),
}


def _check_sglang(settings, pairs, linears):
    if isinstance(settings["target_modules"], str):
        raise ValueError("SGLang: target_modules is a pattern")
    parts = {part: stack for first, (stack, others) in _STACKED.items() for part in (first, *dict(others))}
    targets = {parts.get(name.split(".")[-1], name.split(".")[-1]) for name in settings["target_modules"]}
    # Routed experts are stored as gate_proj, up_proj, down_proj, whatever the family calls them.
    targets |= {{"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}.get(name, name) for name in targets}
    for name in pairs:
        stem, _, leaf = name.rpartition(".")
        leaf = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(leaf, leaf)
        names = {"gate_proj": "w1", "up_proj": "w3"} if f"{stem}.w1" in linears else {}
        if parts.get(leaf, leaf) not in targets:
            raise ValueError(f"SGLang: {name} is not in target_modules")
        for first, (_, others) in _STACKED.items():
            if leaf in dict(others) and f"{stem}.{names.get(first, first)}" not in pairs:
                raise ValueError(f"SGLang: {name} without {first}")
            missing = [other for other, required in others if required and f"{stem}.{other}" not in pairs]
            if leaf == first and missing:
                raise ValueError(f"SGLang: {name} without {missing[0]}")

    def scaling(name, rank):
        if rank != settings["r"]:
            raise ValueError(f"SGLang: rank {rank} of {name} is not r")
        return settings["lora_alpha"] / rank

    return scaling
