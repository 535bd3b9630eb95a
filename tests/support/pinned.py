"""Tiny models with pinned experts and adapters, the numbers of a step of theirs, and where their parameters are."""

import torch
from peft import get_peft_model
from support.models import random_adapter, relative_error, tiny_model, tokens

import ktlib


def pinned_model(
    family="deepseek_v2", device="cpu", lora_device="cpu", order=("pin", "adapt", "move"), dtype=torch.bfloat16
):
    """A tiny model of the family, ready for training, after the actions in ``order``.

    Args:
        device: where "move" moves the model.
        lora_device: where "pin" says that adapters of routed experts live.
        order: of "pin", "adapt" (with random adapters), "move" and "upcast" (of trained parameters, to fp32).
        dtype: of all but the routed experts, which are bf16.
    """
    model = tiny_model(family, "ktlib", dtype=dtype)
    model.config.use_cache = False  # the cache makes tensors in a way that the simulated device does not know
    for action in order:
        if action == "pin":
            assert ktlib.pin_experts(model, lora_device) is model
        elif action == "adapt":
            torch.manual_seed(7)
            model = get_peft_model(model, ktlib.lora_config(model, r=4))
        elif action == "move":
            model = model.to(device)
        else:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
    return random_adapter(model).train()


def loss_and_gradients(model, ids=None):
    """The loss and ``{name: gradient}``, in fp32 on the CPU, of one step on the given or the usual tokens."""
    ids = tokens() if ids is None else ids
    ids = ids.to(model.get_input_embeddings().weight.device)
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: p.grad.cpu().float() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, want, bound):
    """Losses and gradients of two models differ by at most ``bound``, relatively."""
    assert abs(got[0] - want[0]) <= bound * abs(want[0])
    assert got[1].keys() == want[1].keys()
    errors = {name: relative_error(got[1][name], want[1][name]) for name in want[1]}
    assert max(errors.values()) <= bound, sorted(errors.items(), key=lambda item: -item[1])[:4]


def devices(model, selects=lambda name: True):
    """Device types of the parameters whose names ``selects`` accepts."""
    return {p.device.type for name, p in model.named_parameters() if selects(name)}


def is_expert(name):
    return ".experts." in name and ".lora_" not in name


def is_expert_lora(name):
    return ".experts." in name and ".lora_" in name


def is_other(name):
    return ".experts." not in name
