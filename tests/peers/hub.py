"""Tiny random models in the place of those that PEFT's tests name on the hub: the same classes, nothing downloaded.

They are not the originals: sizes and weights differ, and there is no tokenizer. What the tests compare is a model with
adapters and the same model in another state, which any weights do. Llama-4
has experts that compute themselves, not by transformers' interface: with it the tests say that ktlib leaves such alone.
"""

import functools
import tempfile
from pathlib import Path

import torch
import transformers

_COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# name on the hub -> config class and what it needs beyond that
REPLACED = {
    "hf-internal-testing/tiny-random-LlamaForCausalLM": (transformers.LlamaConfig, {}),
    "trl-internal-testing/tiny-GptOssForCausalLM": (
        transformers.GptOssConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "dtype": "bfloat16"},
    ),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        transformers.Llama4TextConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 48},
    ),
}


def replace():
    """Make these names mean local folders for ``AutoModelForCausalLM``; returns what removes the folders again."""
    folder = tempfile.TemporaryDirectory(prefix="peers-")
    stock = transformers.AutoModelForCausalLM.from_pretrained.__func__

    @functools.wraps(stock)
    def from_folder(cls, name, *args, **kwargs):
        return stock(cls, _made(Path(folder.name), name) if name in REPLACED else name, *args, **kwargs)

    transformers.AutoModelForCausalLM.from_pretrained = classmethod(from_folder)
    return folder.cleanup


def _made(folder, name):
    if not (path := folder / name).exists():
        config_class, settings = REPLACED[name]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = config_class(**_COMMON | settings)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
            model.save_pretrained(path)
    return str(path)
