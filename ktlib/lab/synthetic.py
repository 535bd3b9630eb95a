"""Synthetic models of true size: real architectures with pseudo-random weights, without a download.

They serve to measure memory and speed, and to try a run before the real weights are available. Training lowers the loss
of such a model, but its text means nothing. To make 31 GB of weights in seconds, values are copied from one pool of
normal numbers: each chunk of 4M elements of a weight is a window of the pool, at a pseudo-random place.
"""

import copy
import functools
import json
import zlib
from pathlib import Path

import torch

from ktlib.files import ownership, tensor_files
from ktlib.integrations.model_classes import untied_state

POOL = 2**24 + 43  # elements of the pool; no multiple of a row's length, so that windows do not line up with rows
CHUNK = 2**22  # elements of a window
FP8_BLOCK, FP8_SPREAD = (128, 128), 100.0  # of e4m3 codes, which reach to 448: standard deviation


def deepseek_v2_lite(**changes):
    """Config of DeepSeek-V2-Lite: 15.7e9 parameters, 27 layers (the first dense), 64 experts of width 1408, top-6.

    ``changes`` are entries of ``transformers.DeepseekV2Config``, such as ``num_hidden_layers=4``.
    """
    from transformers import DeepseekV2Config

    return DeepseekV2Config(
        **{
            "vocab_size": 102400,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "n_shared_experts": 2,
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "max_position_embeddings": 4096,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-6,
            "bos_token_id": 100000,
            "eos_token_id": 100001,
            "tie_word_embeddings": False,
            **changes,
        }
    )


def deepseek_v2_small(**changes):
    """Config of the same architecture with 6e6 parameters: 3 layers, 16 experts of width 128, hidden size 256."""
    return deepseek_v2_lite(
        **{
            "vocab_size": 4000,
            "hidden_size": 256,
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "n_routed_experts": 16,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **changes,
        }
    )


def published_config(name):
    """Config of a published model by the name of its parameter file in ``notebooks/params``, such as "mixtral_8x7b"."""
    import transformers

    if name == "deepseek_v2_lite":
        return deepseek_v2_lite()
    configs = {
        "deepseek_v3": lambda: transformers.DeepseekV3Config(),
        "mixtral_8x7b": lambda: transformers.MixtralConfig(),
        "olmoe": lambda: transformers.OlmoeConfig(intermediate_size=1024),
        "qwen3_30b_a3b": lambda: transformers.Qwen3MoeConfig(num_hidden_layers=48, head_dim=128),
    }
    if name not in configs:
        raise ValueError(f"name: got {name!r}, needs one of {', '.join(['deepseek_v2_lite', *configs])}")
    return configs[name]()


def random_model(config, seed=0, dtype=torch.bfloat16, experts_implementation="ktlib", progress=True):
    """A model with this config on the CPU. Its weights are made in place, without a file or a second copy."""
    from tqdm.auto import tqdm
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)  # models change it
    model.set_experts_implementation(experts_implementation)
    pool = _pool(config, seed)
    for name, parameter in tqdm(model.named_parameters(), desc="making weights", disable=not progress):
        fill(parameter.data, name, pool, seed)
    model.tie_weights()
    return model.eval()


def write_checkpoint(config, folder, seed=0, dtype=torch.bfloat16, progress=True, fp8_experts=False):
    """Write the weights of :func:`random_model` as a sharded safetensors checkpoint; returns the folder.

    Experts are fused as in transformers' modules. So ``from_pretrained`` maps the files into memory without a copy,
    while it would have to stack a checkpoint with one tensor per expert. At most one tensor is in memory. After an
    interruption, a second call writes the missing shards; each shard appears complete or not at all. ``fp8_experts``:
    the experts are e4m3 codes of normal numbers with a scale for each block of 128 x 128, half the size.

    Raises:
        ValueError: ``folder`` holds shards of another config or seed, or another model or config.
        OSError: the disk has too little free space; raised before anything is written.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    pool = functools.cache(lambda: _pool(config, seed))
    weights = {name: _stored(name, tensor, pool, seed) for name, tensor in untied_state(model).items()}
    about = {"seed": seed, "config": json.loads(config.to_json_string())}
    model.config.architectures = [type(model).__name__]
    if fp8_experts:
        stacks = [name for name, tensor in weights.items() if ".experts." in name and len(tensor.shape) == 3]
        weights |= {
            name: value for stack in stacks for name, value in _fp8(stack, weights[stack], config, pool, seed).items()
        }
        about["fp8_experts"] = True
        model.config.quantization_config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [*FP8_BLOCK]}
    Path(folder).mkdir(parents=True, exist_ok=True)
    with ownership.temporary_folder(folder) as saved:
        model.config.save_pretrained(saved)
        others = list(saved.iterdir())
        return tensor_files.write_sharded(
            folder, tensor_files.shards_of(weights), about, "synthetic.json", others, progress
        )


@torch.no_grad()
def fill(tensor, name, pool, seed=0):
    """Set a contiguous weight in place: matrices to windows of ``pool``, biases to 0, and other vectors to 1."""
    if tensor.dim() < 2:
        tensor.fill_(0 if "bias" in name else 1)
        return
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    for chunk in tensor.view(-1).split(CHUNK):
        start = torch.randint(POOL - CHUNK, (), generator=generator).item()
        chunk.copy_(pool[start : start + len(chunk)])


def _stored(name, tensor, pool, seed):
    def make():
        weight = torch.empty(tensor.shape, dtype=tensor.dtype)
        fill(weight, name, pool(), seed)
        return weight

    return tensor_files.Stored(tuple(tensor.shape), tensor.dtype, make)


def _fp8(name, stack, config, pool, seed):
    """The Stored codes and scales of a stack of matrices, of the same spread as bf16 weights."""
    *experts, rows, columns = stack.shape
    blocks = (*experts, -(-rows // FP8_BLOCK[0]), -(-columns // FP8_BLOCK[1]))

    def codes():
        weight = torch.empty(stack.shape, dtype=torch.float8_e4m3fn)
        fill(weight, name, _fp8_pool(pool(), config.initializer_range), seed)
        return weight

    def scales():
        return torch.full(blocks, config.initializer_range / FP8_SPREAD)

    return {
        name: tensor_files.Stored(stack.shape, torch.float8_e4m3fn, codes),
        f"{name}_scale_inv": tensor_files.Stored(blocks, torch.float32, scales),
    }


@functools.lru_cache(maxsize=1)
def _fp8_pool(pool, spread):
    largest = torch.finfo(torch.float8_e4m3fn).max  # what is larger would become NaN
    return (pool.float() * (FP8_SPREAD / spread)).clamp(-largest, largest).to(torch.float8_e4m3fn)


def _pool(config, seed):
    generator = torch.Generator().manual_seed(seed)
    return (config.initializer_range * torch.randn(POOL, generator=generator)).bfloat16()
