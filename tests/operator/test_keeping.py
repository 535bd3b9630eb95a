"""Checkpointing that computes the experts once per step: the same bits, and errors where it is impossible."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import ktlib
from ktlib.operator import registered_op
from ktlib.operator.recompute_once import CHECKPOINTING, _region
from ktlib.training import sft
from ktlib.training.tasks import dates


@pytest.fixture
def calls(monkeypatch):
    """Names of the extension's two passes as they are called."""
    seen = []

    def watch(name, function):
        monkeypatch.setattr(registered_op._kernels, name, lambda *rest: seen.append(name) or function(*rest))

    watch("forward", registered_op._kernels.forward)
    watch("backward", registered_op._kernels.backward)
    return seen


def layer(seed=0):
    """Leaves that need gradients, and a function of them with two calls of the operator."""
    torch.manual_seed(seed)
    gate_up, down = torch.randn(3, 64, 32).bfloat16() / 6, torch.randn(3, 32, 32).bfloat16() / 6
    ids = torch.tensor([[0, 1], [1, 2], [2, 0], [1, 0], [0, 2]])
    lora = (torch.randn(6, 32) / 6, torch.randn(64, 6) / 6)
    leaves = [torch.randn(5, 32).bfloat16(), torch.rand(5, 2), *lora]
    for leaf in leaves:
        leaf.requires_grad_()

    def forward(x, weights, a, b):
        x = ktlib.moe_experts(x.tanh(), ids, weights, gate_up, down, (a, b, 2.0))
        return (
            ktlib.moe_experts((x * 0.5).sin(), ids.flip(0), weights, gate_up, down, (a, b, 2.0)).float().square().sum()
        )

    return leaves, forward


def test_same_bits_and_every_call_computed_once(calls):
    leaves, forward = layer()
    value = forward(*leaves)
    wanted = torch.autograd.grad(value, leaves)
    for options, times in ((CHECKPOINTING, 2), ({"use_reentrant": False}, 4)):
        calls.clear()
        got = checkpoint(forward, *leaves, **options)
        assert got == value
        assert all(map(torch.equal, torch.autograd.grad(got, leaves), wanted))
        assert (calls.count("forward"), calls.count("backward")) == (times, 2)
    assert _region.get() is None


def test_regions_do_not_mix(calls):
    """Two regions alive at once, and one that raises: each backward gets its own results."""
    (first, one), (second, two) = layer(1), layer(2)
    wanted = [torch.autograd.grad(f(*leaves), leaves) for f, leaves in ((one, first), (two, second))]
    a, b = checkpoint(one, *first, **CHECKPOINTING), checkpoint(two, *second, **CHECKPOINTING)
    with pytest.raises(ValueError, match="hidden_states"):
        checkpoint(one, first[0][:, :5], *first[1:], **CHECKPOINTING)
    assert _region.get() is None
    got = [torch.autograd.grad(b, second), torch.autograd.grad(a, first)][::-1]
    assert all(map(torch.equal, got[0] + got[1], wanted[0] + wanted[1]))


def test_results_that_were_used_or_changed_are_an_error():
    leaves, forward = layer()
    value = checkpoint(forward, *leaves, **CHECKPOINTING)
    torch.autograd.grad(value, leaves, retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        torch.autograd.grad(value, leaves)

    def changing(*arguments):
        output = ktlib.moe_experts(arguments[0], torch.zeros(5, 1, dtype=int), torch.ones(5, 1), *weights)
        return (output.add_(1).tanh() * arguments[1][:, :1]).sum()

    weights = torch.randn(1, 64, 32).bfloat16(), torch.randn(1, 32, 32).bfloat16()
    with pytest.raises(RuntimeError, match="changed in place"):
        checkpoint(changing, *leaves, **CHECKPOINTING).backward()


def test_fine_tuning_computes_experts_once_a_step_to_the_same_bits(calls, tmp_path, one_thread):
    rows, trained = dates(n_train=16, n_test=8)[0], []
    for checkpointing in (False, True):
        model, tokenizer = sft.load_model("base")
        model = sft.add_lora(model, rank=4, alpha=8)
        calls.clear()
        options = {"steps": 2, "batch_size": 2, "sequence_length": 64, "progress": False}
        folder = tmp_path / str(checkpointing)
        sft.train(model, tokenizer, rows, folder, gradient_checkpointing=checkpointing, **options)
        layers = model.config.num_hidden_layers - model.config.first_k_dense_replace
        assert calls.count("forward") == calls.count("backward") == 2 * layers
        trained.append([p.detach() for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *trained))
