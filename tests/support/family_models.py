"""Tiny whole models of every family with routed experts: its text class, and its multimodal one where there is one."""

import contextlib
import dataclasses
import importlib
import re
from pathlib import Path

import torch
import transformers
from support.families import EXPERTS, HIDDEN, INTERMEDIATE
from support.models import VOCAB

from ktlib.names import bare_name

_HEADS, _HEAD_DIM, _ROPE_DIM = 4, 16, 8
# Fields of any config, by whole name; the first that fits decides.
_SIZES = {
    r"(unpadded_)?vocab_size(_per_layer_input)?|audio_bos_token_id|ngram_vocab_size_base": VOCAB,
    r"qk_rope_head_dim": _ROPE_DIM,
    r"(.*_)?(head_dim|d_head|linear_head_dim)|qk_nope_head_dim": _HEAD_DIM,
    r"downsample_hidden_size|.*_size_per_layer_input": 16,
    r"d_model|hidden_size|(moe|out|text|projector|thinker)_hidden_size|output_dim|adapter_(in|out)_dim": HIDDEN,
    r"adapter_input_size|projection_hidden_dim": HIDDEN,
    r"moe_intermediate_size": INTERMEDIATE,
    r"(.*_)?intermediate_size|(.*_)?ffn_hidden_size|(encoder_ffn|mlp)_dim": 2 * INTERMEDIATE,
    r"num_hidden_layers|depth|(encoder_|decoder_|num_|num_decoder_|n_)layers": 2,
    r"(.*_)?num_(key_value|kv|key)_heads|.*kv_heads": 2,
    r"(.*_)?(num|n)(_attention|_value)?_heads|encoder_attention_heads": _HEADS,
    r"(.*_)?(kv|o)_lora_rank|hc_lowrank": 32,
    r"q_lora_rank": 24,
    r"(.*_)?(num|n)(_local|_routed)?_experts": EXPERTS,
    r"num_experts_per_tok|top_k_experts|moe_k|moe_topk": 2,
    r"n_group|topk_group|n_groups|first_k_dense_replace|num_dense_layers|moe_layer_start_index": 1,
    r"n_shared_experts": 1,
    r"sliding_window(_size)?": 32,
    r"mamba_d_state|ssm_state_size": 16,
    r"index_topk|router_hidden_size|index_block_size": 8,
    r"initializer_range": 0.1,
    r"(image|max_image)_size": 64,
    r"pad_token_id": 0,
    r"bos_token_id": 1,
    r"eos_token_id": 2,
}
_ATTENTION = {
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "head_dim": _HEAD_DIM + _ROPE_DIM,
    "qk_nope_head_dim": _HEAD_DIM,
    "v_head_dim": _HEAD_DIM,
}


def _mrope(*section):
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)}


# What one config needs beyond that.
_SETTINGS = {
    "AriaConfig": {"projector_patch_to_query_dict": {16: 4}},
    "DbrxConfig": {
        "d_model": HIDDEN,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": INTERMEDIATE, "moe_num_experts": EXPERTS, "moe_top_k": 2},
    },
    "DeepseekV4Config": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 4}},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"], "n_group": None},
    "Dots3NoteTextConfig": {f"swa_{name}": size for name, size in _ATTENTION.items()},
    "Dots3NoteVisionConfig": {"mlp_layer_types": ["dense", "sparse"]},
    "Ernie4_5_VLMoeTextConfig": {"moe_intermediate_size": [INTERMEDIATE] * 2, "rope_parameters": _mrope(2, 2, 4)},
    "Gemma4TextConfig": {"enable_moe_block": True},
    "FlintConfig": {"mlp_only_layers": [0]},
    "Glm4vMoeTextConfig": {"rope_parameters": _mrope(2, 1, 1) | {"partial_rotary_factor": 0.5}},
    "Glm5NextTextConfig": {"qk_rope_head_dim": 0, "index_kpool": 2},
    "GraniteMoeHybridConfig": {"mamba_n_heads": 8, "layer_types": ["linear_attention", "full_attention"]},
    "HYV4VLTextConfig": {"rope_parameters": _mrope(2, 1, 1)},
    "InklingVisionConfig": {"patch_size": 4, "num_hidden_layers": 4},  # with fewer layers it needs scipy
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "LongcatFlashConfig": {"zero_expert_num": 2, "qk_head_dim": _HEAD_DIM + _ROPE_DIM},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "MuseSparkAudioConfig": {"patch_sizes": [16, 6], "hidden_sizes": [HIDDEN] * 2, "depths": [1, 1]},
    "NllbMoeConfig": {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": INTERMEDIATE},
    "Qwen4ExpTextConfig": {"indexer_budget": 8, "indexer_compress_ratio": 2, "indexer_kv_heads": 1},
    "SwitchTransformersConfig": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "ZayaConfig": {"num_experts_per_tok": 1},
}


# These make sound of what the thinker of Qwen3-Omni wrote, or are abstract.
_OTHERS = (
    "Qwen3OmniMoePreTrainedModelForConditionalGeneration",
    "Qwen3OmniMoeTalkerCodePredictorModelForConditionalGeneration",
    "Qwen3OmniMoeTalkerForConditionalGeneration",
)


def model_classes(family):
    """The classes of a family that write text (or, if there are none, classify its tokens)."""
    found = []
    for file in sorted((Path(transformers.__file__).parent / "models" / family).glob("modeling_*.py")):
        module = importlib.import_module(f"transformers.models.{family}.{file.stem}")
        found += [cls for cls in vars(module).values() if isinstance(cls, type) and cls.__module__ == module.__name__]
    found = [cls for cls in found if issubclass(cls, transformers.PreTrainedModel) and cls.__name__ not in _OTHERS]
    kinds = (r"For(CausalLM|ConditionalGeneration|BlockDiffusion)$", r"ForTokenClassification$")
    by_kind = [[cls for cls in found if re.search(kind, cls.__name__)] for kind in kinds]
    return by_kind[0] or by_kind[1]


def tiny_config(cls):
    """A config of this class and those inside it, with its family's own defaults but tiny sizes."""
    default, names = cls(), {field.name for field in dataclasses.fields(cls)}
    settings = {name: size for name in names if (size := _size(name)) is not None}
    if "qk_rope_head_dim" in names:  # latent attention: keys are not grouped
        settings |= {"head_dim": _ROPE_DIM, "num_key_value_heads": _HEADS}
    for name in ("layer_types", "mlp_layer_types"):  # a layer of every kind
        if name in names and (kinds := list(dict.fromkeys(getattr(default, name) or []))):
            settings["num_hidden_layers"] = max(settings["num_hidden_layers"], len(kinds))
            settings[name] = kinds
    for name in {"layer_types", "mlp_layer_types"} & set(settings):
        kinds = settings[name]
        settings[name] = kinds + kinds[-1:] * (settings["num_hidden_layers"] - len(kinds))
    for name in cls.sub_configs:
        inner = type(getattr(default, name, None))
        if inner is type(None):  # optional: the towers of Gemma-4, which DiffusionGemma has too
            inner = getattr(transformers, f"Gemma4{name.title().replace('_', '')}")
        # oldest transformers: this class takes no configs but dicts
        settings[name] = tiny_config(inner).to_dict() if "Talker" in cls.__name__ else tiny_config(inner)
    return cls(**settings | _SETTINGS.get(cls.__name__, {}))


def tiny_model(family, name, **options):
    """A random model of the class of this name; ``options`` as for ``from_config``, such as dtype."""
    cls = next(cls for cls in model_classes(family) if cls.__name__ == name)
    torch.manual_seed(0)
    with _new_memory_is_nan():
        model = cls._from_config(tiny_config(cls.config_class), **options)
    for parameter in model.parameters():  # one that starts at zero would keep gradients from others
        if not parameter.any() or parameter.isnan().any():
            parameter.data.normal_(std=0.1)
    return model


@contextlib.contextmanager
def _new_memory_is_nan():
    """Parameters that a class of transformers forgets to initialise are seen as NaN: Qwen3-Omni's talker has some."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _size(name):
    return next((size for pattern, size in _SIZES.items() if re.fullmatch(pattern, name)), None)


def adapted(model):
    """``{name in the bare model: [its LoRA layers]}`` of a model with adapters."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            found.setdefault(bare_name(name), []).append(module)
    return found
