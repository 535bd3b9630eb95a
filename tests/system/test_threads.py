"""Stock torch uses a fixed number of threads in a run, the operator all; a wrong number is refused."""

import os

import pytest
import torch
from transformers import AutoConfig

import ktlib
from ktlib.assets import BASE
from ktlib.operator import registered_op
from ktlib.system import threads


@pytest.fixture
def three_threads(monkeypatch):
    monkeypatch.delenv(threads.VARIABLE, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_only_stock_torch_is_held_to_the_number(three_threads, monkeypatch):
    def state():
        return torch.get_num_threads(), threads.operator_threads()

    with threads.stock_threads(2):
        assert state() == (2, 3)
        with threads.stock_threads(1):
            assert state() == (1, 3)
        assert state() == (2, 3)
    assert state() == (3, 3)
    with pytest.raises(KeyError), threads.stock_threads(1):
        raise KeyError
    assert state() == (3, 3)
    with pytest.raises(KeyError, match="own"), threads.stock_threads(1):
        del os.environ[threads.VARIABLE]
        raise KeyError("its own")
    assert state() == (3, 3)
    monkeypatch.setenv(threads.VARIABLE, "5")
    with threads.stock_threads(1):
        assert state() == (1, 5)
    assert state() == (3, 5)


def test_the_operator_gets_its_number_forward_and_backward(three_threads, monkeypatch):
    seen = []

    def watch(name, function):
        monkeypatch.setattr(
            registered_op._kernels,
            name,
            lambda isa, count, *rest: seen.append((name, count)) or function(isa, count, *rest),
        )

    watch("forward", registered_op._kernels.forward)
    watch("backward", registered_op._kernels.backward)
    x = torch.randn(4, 32).bfloat16().requires_grad_()
    weights = torch.randn(2, 64, 32).bfloat16(), torch.randn(2, 32, 32).bfloat16()
    with threads.stock_threads(1):
        output = ktlib.moe_experts(x, torch.tensor([[0], [1], [1], [0]]), torch.ones(4, 1), *weights)
        output.sum().backward()
    assert seen == [("forward", 3), ("backward", 3)]


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "8193", "99999999999", "9" * 5000], ids=lambda v: v[:12])
def test_a_wrong_number_is_named(value, monkeypatch):
    monkeypatch.setenv(threads.VARIABLE, value)
    with pytest.raises(ValueError, match=f"^KTLIB_THREADS={value}: needs a whole number from 1 to 8192"):
        threads.operator_threads()


def test_the_default_depends_on_the_model_alone(three_threads):
    for hidden, count in ((256, 1), (1023, 1), (1024, 16), (7168, 16)):
        assert threads.default_threads(AutoConfig.for_model("olmoe", hidden_size=hidden)) == count
    assert threads.default_threads(AutoConfig.from_pretrained(BASE)) == 1
