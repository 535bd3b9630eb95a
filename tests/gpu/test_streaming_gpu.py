"""tests/operator/test_streaming.py on a GPU, and tests that need one: pinned memory, streams, Trainer, interruption."""

import contextlib
import gc

import pytest
import test_streaming
import test_weight_stream
import torch
from support.pinned import assert_same, loss_and_gradients
from test_hybrid_gpu import SAME, adapted, losses, trainer
from test_moe_experts import layers
from test_streaming import *  # noqa: F403  its tests

import ktlib
from ktlib.lab import hybrid
from ktlib.lab.validation import QUANTITIES, evaluate
from ktlib.operator.gpu import weight_source


@pytest.fixture
def place():
    def to_gpu(layer):
        return layer | {name: layer[name].cuda() for name in test_streaming.ROUTED}

    return to_gpu


@pytest.fixture
def layer(place):
    return place(layers(300, 8, 3, 96, 72, 8)[0])


def equal(results, others):
    return all(torch.equal(results[name], others[name]) for name in QUANTITIES)


def test_pinned_weights_give_the_same_bits(layer):
    want = evaluate(ktlib.moe_experts, layer, stream_rows=1)
    for name in ("gate_up_proj", "down_proj"):
        layer[name] = layer[name].pin_memory()
    assert equal(evaluate(ktlib.moe_experts, layer, stream_rows=1), want)


@pytest.mark.parametrize("chunk_bytes", [64, 1000, 2**25])
@pytest.mark.parametrize("group_bytes", [1, 100_000])
def test_chunks_and_groups(layer, chunk_bytes, group_bytes, monkeypatch):
    want = evaluate(ktlib.moe_experts, layer, stream_rows=1)
    monkeypatch.setattr(weight_source, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(test_streaming.streaming, "GROUP_BYTES", group_bytes)
    got = evaluate(ktlib.moe_experts, layer, stream_rows=1)
    # the sums over experts are taken group by group
    assert all(test_streaming.relative_error(got[name], want[name]) < 0.003 for name in QUANTITIES)
    assert equal(evaluate(ktlib.moe_experts, layer, stream_rows=1), got)


def test_while_the_gpu_is_busy_and_on_other_streams(layer):
    want = evaluate(ktlib.moe_experts, layer, stream_rows=1)
    big = torch.randn(4096, 4096, device="cuda")
    for _ in range(10):
        for _ in range(5):
            big = torch.nn.functional.normalize(big @ big)
        assert equal(evaluate(ktlib.moe_experts, layer, stream_rows=1), want)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            assert equal(evaluate(ktlib.moe_experts, layer, stream_rows=1), want)


def test_autocast_changes_nothing_within(layer):
    want = evaluate(ktlib.moe_experts, layer, stream_rows=1)
    with torch.autocast("cuda", torch.float16):
        assert equal(evaluate(ktlib.moe_experts, layer, stream_rows=1), want)


@pytest.mark.parametrize("stream_rows", [None, 1])
def test_a_default_device_changes_nothing_within(layer, stream_rows):
    layer["hidden_states"].requires_grad_()
    results = []
    for surroundings in (contextlib.nullcontext(), torch.device("cuda")):
        with surroundings:
            output = ktlib.moe_experts(**layer, stream_rows=stream_rows, **test_streaming.DROPOUT)
            gradient = torch.autograd.grad(output, layer["hidden_states"], torch.ones_like(output))
        results.append((output, *gradient))
    assert all(map(torch.equal, *results))


def test_nothing_stays_on_the_gpu(layer):
    evaluate(ktlib.moe_experts, layer, stream_rows=1)
    gc.collect()
    before = torch.cuda.memory_allocated()
    x = layer["hidden_states"].clone().requires_grad_()
    output = ktlib.moe_experts(**layer | {"hidden_states": x}, stream_rows=1)
    assert torch.cuda.memory_allocated() - before <= 4 * 2**20  # x, output and their bookkeeping
    del output, x
    gc.collect()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("failing", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["copy", "product"])
def test_a_call_that_fails_halfway_leaves_nothing_behind(layer, failing, where, monkeypatch):
    """An error in the thread that sends weights or in the one that computes; the next call is right."""
    want = evaluate(ktlib.moe_experts, layer, stream_rows=1)
    monkeypatch.setattr(test_streaming.streaming, "GROUP_BYTES", 1)
    calls, product = [], test_streaming.streaming._product

    def fail(*arguments):
        calls.append(None)
        if len(calls) == 5:
            raise failing("halfway")
        return product(*arguments)

    with monkeypatch.context() as patch:
        if where == "copy":
            kernels = test_weight_stream.failing(weight_source._kernels.copy, 5, failing("halfway"))
            patch.setattr(weight_source, "_kernels", kernels)
        else:
            patch.setattr(test_streaming.streaming, "_product", fail)
        with pytest.raises(failing, match="halfway"):
            ktlib.moe_experts(**layer, stream_rows=1)
    monkeypatch.undo()
    assert equal(evaluate(ktlib.moe_experts, layer, stream_rows=1), want)


@pytest.mark.parametrize("lora_device", ["cpu", "cuda"])
def test_a_model(lora_device):
    model = adapted(lora_device=lora_device)
    wanted = loss_and_gradients(model)
    for rows in (1, 4):
        ktlib.pin_experts(model, lora_device, stream_rows=rows)
        assert_same(loss_and_gradients(model), wanted, SAME)
        checkpointed = hybrid.checkpoint_all_but_experts(adapted(lora_device=lora_device))
        ktlib.pin_experts(checkpointed, lora_device, stream_rows=rows)
        assert_same(loss_and_gradients(checkpointed), wanted, SAME)
    ktlib.pin_experts(model, lora_device)
    assert_same(loss_and_gradients(model), wanted, SAME)


def test_trainer(tmp_path):
    plain, streamed = trainer(tmp_path / "a"), trainer(tmp_path / "b")
    ktlib.pin_experts(streamed.model, stream_rows=1)
    plain.train(), streamed.train()
    torch.testing.assert_close(torch.tensor(losses(streamed)), torch.tensor(losses(plain)), rtol=0.01, atol=0)
