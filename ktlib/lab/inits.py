"""Initialisations of LoRA's matrix A, and an experiment that compares them.

An initialisation is a function of ``a``, a matrix ``(rank, in)`` or a stack of them, which returns new values.
"""

import math
import statistics

import torch

from ktlib.lab.hybrid import one_step
from ktlib.names import component
from ktlib.reference import lora_layout
from ktlib.training import sft


def kaiming(a, generator):
    """PEFT's default: uniform within 1/sqrt(in)."""
    return _uniform(a, 1 / math.sqrt(a.shape[-1]), generator)


def kaiming_3d(a, generator):
    """torch's ``kaiming_uniform_`` on a stack ``(experts, rank, in)``: it takes rank * in as the fan-in."""
    return _uniform(a, 1 / math.sqrt(a.shape[-2] * a.shape[-1]), generator)


def hundredth(a, generator):
    """randn / 100, as in the kernel test of the system that ktlib replaces."""
    return torch.randn(a.shape, generator=generator) / 100


def gaussian(a, generator):
    """PEFT's "gaussian": standard deviation 1 / rank."""
    return torch.randn(a.shape, generator=generator) / a.shape[-2]


def orthogonal(a, generator):
    """Orthonormal rows; orthonormal columns if there are more rows than columns."""
    square = torch.randn(*a.shape[:-2], *sorted(a.shape[-2:], reverse=True), generator=generator)
    q = torch.linalg.qr(square).Q
    return q if q.shape == a.shape else q.mT


def _uniform(a, bound, generator):
    return (2 * torch.rand(a.shape, generator=generator) - 1) * bound


INITS = {
    "kaiming": kaiming,
    "kaiming, 3-D stack": kaiming_3d,
    "randn/100": hundredth,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "kaiming x10": lambda a, generator: 10 * kaiming(a, generator),
    "kaiming x1000": lambda a, generator: 1000 * kaiming(a, generator),
}


def initialise(model, init, rank, seed=0):
    """Draw every LoRA A of a PEFT model from ``INITS[init]``, each expert's separately, and set every B to zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            stack = lora_layout.split_a(parameter.data, len(parameter) // rank)
            drawn = torch.stack([INITS[init](matrix, generator) for matrix in stack])
            if init == "kaiming, 3-D stack" and component(name) != "routed_experts":
                drawn = torch.stack([kaiming(matrix, generator) for matrix in stack])
            stack.copy_(drawn)
        elif "lora_B" in name:
            parameter.data.zero_()
    return model


def prepare(rows, *, rank=8, targets="attention+experts+shared"):
    """``(model, examples, collate)`` for :func:`train`: the built-in model with adapters, and the tokenised rows."""
    model, tokenizer = sft.load_model("base")
    return sft.add_lora(model, targets, rank=rank), sft.encode(tokenizer, rows, 128), sft.collator(tokenizer)


def train(prepared, init, learning_rate, seed, *, rank=8, steps=12, batch_size=8):
    """Losses (list of float, nats per response token) of a short AdamW run from ``init``.

    ``seed`` determines A and the random order of the examples. If there are fewer than ``steps * batch_size`` examples,
    they are repeated in that order.
    """
    model, examples, collate = prepared
    initialise(model, init, rank, seed)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    order *= math.ceil(steps * batch_size / len(order))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0), []
    for step in range(steps):
        batch = collate([examples[i] for i in order[step * batch_size : (step + 1) * batch_size]])
        losses.append(one_step(model, batch, optimizer, trained, model.device)[0])
    return losses


def summary(curves):
    """``{key: (mean, standard deviation)}`` over seeds of the mean loss of the last quarter of each run's steps."""
    result = {}
    for key, runs in curves.items():
        ends = [statistics.fmean(losses[-max(1, len(losses) // 4) :]) for losses in runs]
        result[key] = statistics.fmean(ends), statistics.stdev(ends) if len(ends) > 1 else 0.0
    return result
