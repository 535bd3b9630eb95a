"""An adapter of DeepSeek-V2-Lite's structure to audit, and changes of it on disk."""

import json

import torch
from safetensors.torch import load_file, save_file

# DeepSeek-V2-Lite's structure: 27 layers, the first dense; q, kv_a, kv_b, o in attention; shared experts.
LITE = {"num_hidden_layers": 27, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8}
LITE |= {"num_attention_heads": 1, "num_key_value_heads": 1, "n_routed_experts": 4, "kv_lora_rank": 8}
COUNTS = {"self_attn": 27 * 4 * 2, "shared_experts": 26 * 3 * 2, "routed_experts": 26 * 2 * 2, "dense_mlp": 3 * 2}


def set_first_value(adapter, name, value):
    """Set the first element of the tensors whose name contains ``name``; return how many there are."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    names = [key for key in tensors if name in key]
    for key in names:
        tensors[key].view(-1)[0] = value
    save_file(tensors, file)
    return len(names)


def filled(adapter, **changes):
    """Write random values into every B of a saved adapter, as training would, and then change some tensors.

    Args:
        changes: by a piece of the tensors' names, with ``__`` for a dot: the function that makes the new tensor.
    """
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for number, name in enumerate(sorted(tensors)):
        if "lora_B" in name:
            tensors[name].normal_(std=0.01, generator=torch.Generator().manual_seed(number))
    for fragment, make in changes.items():
        for name in tensors:
            if fragment.replace("__", ".") in name:
                tensors[name] = make(tensors[name]).contiguous()
    save_file(tensors, file)
    return adapter


def without_expert(expert, experts=4):
    """The function that sets one expert's columns of a stacked lora_B to zero."""

    def change(b):
        b.view(b.shape[0], -1, experts)[:, :, expert] = 0
        return b

    return change


def rewrite_config(adapter, **changes):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
