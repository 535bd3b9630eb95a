"""Validation of one layer of routed experts: inputs, output and gradients, and the errors that rounding allows."""

import math

import torch
import torch.nn.functional as F

from ktlib.reference import lora_layout
from ktlib.reference.layer import expert_lora

# Relative error, in the L2 norm, that rounding to bf16 makes in a vector of numbers of many sizes. Rounding changes a
# number m * 2**e, with m from 1 to 2, by at most 2**-8 * 2**e. The changes are evenly distributed, so their root mean
# square is 2**-8 / sqrt(3) / m of the number. The mantissas m have the density 1 / (m * log(2)), and so the mean of
# 1 / m**2 is 3 / (8 * log(2)).
ROUNDING = 2**-8 / math.sqrt(3) * math.sqrt(3 / (8 * math.log(2)))

QUANTITIES = (
    "output",
    "hidden_states",
    "top_k_weights",
    "gate_up lora_A",
    "gate_up lora_B",
    "down lora_A",
    "down lora_B",
)


def random_layer(
    kind="log",
    *,
    tokens=48,
    experts=64,
    top_k=6,
    hidden=2048,
    intermediate=1408,
    rank=8,
    lora_dtype=torch.bfloat16,
    seed=0,
):
    """Random arguments of ``moe_experts`` as a dict, of one of two kinds.

    - ``"log"``: the inputs of the kernel test of the system that ktlib replaces. Weights, LoRA A and hidden states are
      randn/100, LoRA B is zero, and all experts are equally likely.
    - ``"trained"``: the scales of a trained model and adapter. Hidden states have unit size and a few large channels,
      weights have size 1/sqrt(fan-in), A is uniform as in PEFT, B is not zero, and the router prefers few experts.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    if kind == "log":
        hidden_states = normal(tokens, hidden) / 100
        gate_up_proj, down_proj = (
            normal(experts, 2 * intermediate, hidden) / 100,
            normal(experts, hidden, intermediate) / 100,
        )
        gate_up_A, down_A = normal(experts * rank, hidden) / 100, normal(experts * rank, intermediate) / 100
        gate_up_B, down_B = torch.zeros(2 * intermediate, rank * experts), torch.zeros(hidden, rank * experts)
        logits = normal(tokens, experts)
    elif kind == "trained":
        hidden_states = normal(tokens, hidden) * (1 + 20 * (torch.rand(hidden, generator=generator) < 0.005))
        gate_up_proj = normal(experts, 2 * intermediate, hidden) / math.sqrt(hidden)
        down_proj = normal(experts, hidden, intermediate) / math.sqrt(intermediate)
        gate_up_A = (2 * torch.rand(experts * rank, hidden, generator=generator) - 1) / math.sqrt(hidden)
        down_A = (2 * torch.rand(experts * rank, intermediate, generator=generator) - 1) / math.sqrt(intermediate)
        gate_up_B, down_B = normal(2 * intermediate, rank * experts) / 50, normal(hidden, rank * experts) / 50
        logits = normal(tokens, experts) - torch.arange(experts).add(1).log()
    else:
        raise ValueError(f"kind: got {kind!r}, need 'log' or 'trained'")

    top_k_weights, top_k_index = logits.softmax(-1).topk(top_k)
    scaling = 2.0
    return {
        "hidden_states": hidden_states.bfloat16(),
        "top_k_index": top_k_index,
        "top_k_weights": top_k_weights,
        "gate_up_proj": gate_up_proj.bfloat16(),
        "down_proj": down_proj.bfloat16(),
        "gate_up_lora": (gate_up_A.to(lora_dtype), gate_up_B.to(lora_dtype), scaling),
        "down_lora": (down_A.to(lora_dtype), down_B.to(lora_dtype), scaling),
    }


def in_float64(layer):
    """``layer``, arguments of ``moe_experts``, with every matrix in float64."""
    matrices = {
        name: layer[name] if name == "top_k_index" else layer[name].double() for name in layer if "lora" not in name
    }
    loras = {name: (*(m.double() for m in layer[name][:2]), layer[name][2]) for name in layer if "lora" in name}
    return matrices | loras


def layers_of(model, input_ids):
    """Arguments of ``moe_experts`` (without LoRA) in each MoE layer of ``model`` for ``input_ids``: a list of dicts."""
    layers, handles = [], []

    def collect(module, arguments):
        hidden_states, top_k_index, top_k_weights = (tensor.detach().clone() for tensor in arguments)
        layers.append(
            {
                "hidden_states": hidden_states.reshape(-1, hidden_states.shape[-1]).bfloat16(),
                "top_k_index": top_k_index,
                "top_k_weights": top_k_weights,
                "gate_up_proj": module.gate_up_proj.detach().bfloat16(),
                "down_proj": module.down_proj.detach().bfloat16(),
            }
        )

    for module in model.modules():
        if isinstance(getattr(module, "gate_up_proj", None), torch.nn.Parameter):
            handles.append(module.register_forward_pre_hook(collect))
    try:
        with torch.no_grad():
            model(input_ids)
    finally:
        for handle in handles:
            handle.remove()
    return layers


def with_lora(layer, rank=8, lora_dtype=torch.bfloat16, seed=0):
    """``layer`` with random LoRA on both projections; B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    adapted = dict(layer)
    for name in ("gate_up", "down"):
        experts, out, inner = layer[f"{name}_proj"].shape
        shape_A, shape_B = lora_layout.shapes(rank, experts, out, inner)
        lora_A = (2 * torch.rand(shape_A, generator=generator) - 1) / math.sqrt(inner)
        lora_B = torch.randn(shape_B, generator=generator) / 50
        adapted[f"{name}_lora"] = (lora_A.to(lora_dtype), lora_B.to(lora_dtype), 2.0)
    return adapted


def evaluate(function, layer, *, seed=1, **options):
    """Output and gradients of ``function(**layer, **options)``: ``{name in QUANTITIES: float64 tensor}``.

    ``seed`` determines the random gradient of the output.
    """
    leaves = {name: layer[name].detach().clone().requires_grad_() for name in ("hidden_states", "top_k_weights")}
    arguments = dict(layer) | leaves
    for name in ("gate_up", "down"):
        lora_A, lora_B, scaling = layer[f"{name}_lora"]
        lora_A, lora_B = (tensor.detach().clone().requires_grad_() for tensor in (lora_A, lora_B))
        leaves |= {f"{name} lora_A": lora_A, f"{name} lora_B": lora_B}
        arguments[f"{name}_lora"] = (lora_A, lora_B, scaling)
    output = function(**arguments, **options)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    output.backward(gradient.to(output))
    results = {"output": output.detach()} | {name: leaf.grad for name, leaf in leaves.items()}
    return {name: results[name].double() for name in QUANTITIES}


def relative_error(actual, expected, dim=None):
    """``|actual - expected| / |expected|`` in the L2 norm, over all dimensions or ``dim``; 0 where both are equal."""
    difference, size = ((tensor * tensor).sum(dim=dim).sqrt() for tensor in (actual - expected, expected))
    return torch.where(difference == 0, 0.0, difference / size)


def errors(actual, expected):
    """``{name in QUANTITIES: relative L2 error}`` between two results of :func:`evaluate`."""
    return {name: relative_error(actual[name], expected[name]).item() for name in QUANTITIES}


def with_roundings(layer, draws=None, seed=0):
    """Simulate roundings to bf16: a list of results of :func:`evaluate`, one per draw of random errors.

    The layer is computed in fp32. Every value that the operator rounds somewhere (csrc/layer/moe.h lists the places) is
    changed by a random relative error of a rounding's size: LoRA matrices given in fp32, gate and up, the input of the
    down projection, the gradients of gate and up, and those results that are bf16. In forward the operator leaves gate
    and up in fp32. They are changed there too, so that the simulated errors are not smaller than the operator's.

    Args:
        layer: arguments of ``moe_experts`` with LoRA on both projections.
        draws: default: 8 to 64, more for small layers, whose errors vary most and which are fast to compute.
    """
    generator = torch.Generator().manual_seed(seed)

    def rounded(values):
        return values + (ROUNDING * torch.randn(values.shape, generator=generator) * values).detach()

    experts, hidden, intermediate = layer["down_proj"].shape
    if draws is None:
        draws = max(8, min(64, 2**31 // (3 * hidden * intermediate * layer["top_k_index"].numel())))
    is_bf16_lora = layer["gate_up_lora"][0].dtype == torch.bfloat16
    rounded_results = {"hidden_states", *(name for name in QUANTITIES if is_bf16_lora and "lora" in name)}
    matrices = ("hidden_states", "top_k_weights", "gate_up_proj", "down_proj")
    in_fp32 = layer | {name: layer[name].float() for name in matrices}
    for name in ("gate_up_lora", "down_lora"):
        in_fp32[name] = *(matrix.float() for matrix in layer[name][:2]), layer[name][2]
    results = []
    for _ in range(draws):
        result = evaluate(_experts_rounded_by, in_fp32, rounded=rounded, lora_rounded=not is_bf16_lora)
        results.append({name: rounded(x) if name in rounded_results else x for name, x in result.items()})
    return results


def _experts_rounded_by(
    hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, gate_up_lora, down_lora, rounded, lora_rounded
):
    """The layer in fp32, with ``rounded`` applied to those values and gradients that the operator rounds."""
    experts = down_proj.shape[0]

    def project(x, weight, lora, expert):
        a, b = expert_lora(lora, expert, experts)
        a, b = (rounded(a), rounded(b)) if lora_rounded else (a, b)
        return F.linear(x, weight[expert]) + lora[2] * F.linear(F.linear(x, a), b)

    output = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        token, slot = torch.where(top_k_index == expert)
        gate_up = rounded(project(hidden_states[token], gate_up_proj, gate_up_lora, expert))
        gate_up.register_hook(rounded)
        gate, up = gate_up.chunk(2, dim=-1)
        down = project(rounded(F.silu(gate) * up), down_proj, down_lora, expert)
        output = output.index_add(0, token, down * top_k_weights[token, slot, None])
    return rounded(output)


def allowed(simulated, expected):
    """Bounds of a result's relative errors, from results of :func:`with_roundings`: ``{quantity: (bound, chance)}``.

    ``chance`` is eight standard deviations of the simulated errors. It is nearly zero for a large layer, and large if
    a norm comes from few numbers, whose errors may cancel. ``bound`` is 1.25 times the mean simulated error plus
    ``chance``.
    """
    bounds = {}
    for name in QUANTITIES:
        values = torch.tensor([relative_error(result[name], expected[name]).item() for result in simulated])
        chance = 8 * values.std().item()
        bounds[name] = 1.25 * values.mean().item() + chance, chance
    return bounds


def stock_module(down_proj, implementation):
    """A module of transformers' DeepSeek-V2 experts with the sizes of ``down_proj``, on the meta device."""
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts

    sizes = dict(zip(("n_routed_experts", "hidden_size", "moe_intermediate_size"), down_proj.shape, strict=True))
    config = DeepseekV2Config(**sizes, num_attention_heads=1, num_key_value_heads=1)
    config._experts_implementation = implementation
    with torch.device("meta"):
        return DeepseekV2Experts(config)


def stock_experts(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, gate_up_lora, down_lora):
    """The output of transformers' eager experts under stock PEFT, which computes the dense W + scaling * B A."""
    experts = len(down_proj)

    def merged(weight, lora):
        lora_A, lora_B, scaling = lora
        a, b = lora_layout.split_a(lora_A, experts), lora_layout.split_b(lora_B, experts)
        return weight + (torch.einsum("eor,eri->eoi", b, a) * scaling).to(weight.dtype)

    weights = {"gate_up_proj": merged(gate_up_proj, gate_up_lora), "down_proj": merged(down_proj, down_lora)}
    module, inputs = stock_module(down_proj, "eager"), (hidden_states, top_k_index, top_k_weights)
    return torch.func.functional_call(module, weights, inputs)
