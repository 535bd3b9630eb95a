"""Stock PEFT on experts that are stored as codes: two more rooms of the notebook ``07_failure_museum``.

PEFT adapts a parameter of stacked experts (``target_parameters``) by adding ``scaling * B A`` to it before the module's
forward reads it. That is right for weights. The parameter of quantised experts holds codes, to which nothing can be
added before they are decoded. Everything here is stock transformers and PEFT but for the two stand-ins,
:func:`decoding_kernel` and :class:`PackedExperts`.
"""

import inspect
from contextlib import contextmanager
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model

from ktlib import reference
from ktlib.conversion.nearest_codes import quantise
from ktlib.lab.validation import random_layer
from ktlib.operator.weight import Weight
from ktlib.reference import lora_layout
from ktlib.reference.formats import decode

NAMES = {"gate_up_proj": "gate_up_lora", "down_proj": "down_lora"}


def quantised_layer(format, *, rank=8, seed=0):
    """``(inputs, weights, lora)`` of four small random experts; each is a dict of arguments of ``moe_experts``.

    ``weights`` are of :class:`ktlib.Weight` in ``format`` with fp32 scales, ``lora`` is a trained adapter in fp32.
    """
    sizes = {"tokens": 24, "experts": 4, "top_k": 2, "hidden": 256, "intermediate": 128}
    layer = random_layer("trained", **sizes, rank=rank, lora_dtype=torch.float32, seed=seed)
    weights, lora = {}, {}
    for name, lora_name in NAMES.items():
        weight = layer.pop(name)
        codes, scales, _, group = quantise(weight, format, scale_dtype=torch.float32)
        weights[name] = Weight(format, codes, scales, group=group, shape=weight.shape)
        lora[lora_name] = layer.pop(lora_name)
    return layer | {"hidden_states": layer["hidden_states"].float()}, weights, lora


def exact(inputs, weights, lora=None):
    """The float64 reference, with the weights that the codes decode to."""
    decoded = {name: weight.decoded() for name, weight in weights.items()}
    return reference.moe_experts(**inputs, **decoded, **(lora or {}))


def effect(output, without_adapter):
    """How much an adapter changes the output, relative to the output without it, in the L2 norm."""
    without_adapter = without_adapter.detach().double()
    return ((output.detach().double() - without_adapter).norm() / without_adapter.norm()).item()


# ---- the experts of transformers ------------------------------------------------------------------------------------


def stock_experts(weights):
    """transformers' experts of FP8 and FP4 models, with the codes and scales of ``weights`` ("e4m3" or "e2m1")."""
    from transformers import PreTrainedConfig
    from transformers.integrations.finegrained_fp8 import FP8Experts

    experts, hidden, intermediate = weights["down_proj"].shape
    config = PreTrainedConfig(
        num_experts=experts, hidden_size=hidden, moe_intermediate_size=intermediate, hidden_act="silu",
    )  # fmt: skip
    config._experts_implementation = "eager"
    options = {"block_size": (128, 128)}
    if weights["down_proj"].is_4_bit:
        config.expert_dtype = "fp4"  # where transformers 5.17 reads it; newer ones take an argument
        if "expert_dtype" in inspect.signature(FP8Experts).parameters:
            options["expert_dtype"] = "fp4"
    module = FP8Experts(config, **options)
    for name, weight in weights.items():
        parameter = getattr(module, name)
        parameter.data.copy_(weight.codes[0].view(parameter.dtype))
        getattr(module, f"{name}_scale_inv").data.copy_(weight.scales[0])
    return module


@contextmanager
def decoding_kernel():
    """Within it, :func:`stock_experts` run on the CPU: the kernel decodes the codes it is given, at float64.

    The Triton kernel that transformers downloads for them needs a GPU. It is all that is replaced. It also rounds the
    activations to float8, which is not done here.
    """
    from transformers.integrations import finegrained_fp8

    class Kernel:
        @staticmethod
        def matmul(x, codes, scales, *_, **__):
            codes, columns = codes.detach(), x.shape[-1]
            if codes.dtype == torch.int8:
                weight = decode("e2m1", codes.view(torch.uint8), scales, columns=columns, group=(1, 32))
            else:
                weight = decode("e4m3", codes, scales, columns=columns, group=(128, 128))
            return (x.double() @ weight.double().T).to(x.dtype)

    with mock.patch.object(finegrained_fp8, "load_finegrained_fp8_kernel", lambda: Kernel):
        yield


# ---- experts of a library that packs 4-bit codes --------------------------------------------------------------------


class PackedExperts(torch.nn.Module):
    """Experts whose parameters are two 4-bit codes a byte, (experts, rows, columns / 2) uint8; forward decodes them."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights
        for name, weight in weights.items():
            self.register_parameter(name, torch.nn.Parameter(weight.codes[0].clone(), requires_grad=False))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        decoded = {
            name: decode(w.format, getattr(self, name), w.scales[0], columns=w.shape[2], group=w.group)
            for name, w in self.weights.items()
        }
        return reference.moe_experts(hidden_states, top_k_index, top_k_weights, **decoded)


# ---- PEFT -----------------------------------------------------------------------------------------------------------


class _Layer(torch.nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return self.experts(hidden_states, top_k_index, top_k_weights)


def adapt(experts, rank, seed=0):
    """A stock PEFT model with a new adapter on both parameters of ``experts``; it takes the inputs of the experts."""
    torch.manual_seed(seed)
    targets = [f"experts.{name}" for name in NAMES]
    return get_peft_model(_Layer(experts), LoraConfig(r=rank, lora_alpha=rank, target_parameters=targets))


def adapter(model):
    """The adapter of :func:`adapt` as ``moe_experts`` takes it, its parameters themselves."""
    return {
        NAMES[m.parameter_name]: (m.lora_A["default"].weight, m.lora_B["default"].weight, m.scaling["default"])
        for m in model.modules()
        if hasattr(m, "parameter_name")
    }


@torch.no_grad()
def set_size(lora, weights, size):
    """Draw B of each pair such that the norm of ``scaling * B A`` over all experts is ``size`` times the weight's."""
    for name, lora_name in NAMES.items():
        lora_A, lora_B, scaling = lora[lora_name]
        lora_B.normal_(generator=torch.Generator().manual_seed(0))
        experts = weights[name].shape[0]
        delta = scaling * lora_layout.split_b(lora_B, experts) @ lora_layout.split_a(lora_A, experts)
        lora_B.mul_(size * weights[name].decoded().float().norm() / delta.norm())
