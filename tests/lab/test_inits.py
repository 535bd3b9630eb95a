"""Initialisations of A: scales, expert by expert."""

import math

import pytest
import torch

from ktlib.diagnosis.audit import component
from ktlib.lab import inits
from ktlib.training import sft
from ktlib.training.tasks import dates

STD = {
    "kaiming": 1 / math.sqrt(3 * 256), "kaiming, 3-D stack": 1 / math.sqrt(3 * 8 * 256), "randn/100": 0.01,
    "gaussian": 1 / 8, "orthogonal": 1 / math.sqrt(256), "kaiming x10": 10 / math.sqrt(3 * 256),
    "kaiming x1000": 1000 / math.sqrt(3 * 256),
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return sft.add_lora(sft.load_model("base")[0], "attention+experts", rank=8)


@pytest.mark.parametrize("init", inits.INITS)
def test_scale_of_routed_experts_and_zero_b(model, init):
    inits.initialise(model, init, 8, seed=3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            assert not parameter.any()
        elif "lora_A" in name and component(name) == "routed_experts" and parameter.shape[1] == 256:
            assert parameter.std().item() == pytest.approx(STD[init], rel=0.05)
            experts = parameter.view(16, 8, 256)
            assert not torch.equal(experts[0], experts[1])


def test_the_formulas_are_torch_and_peft():
    stack = torch.nn.init.kaiming_uniform_(torch.empty(16, 8, 256), a=math.sqrt(5))
    assert stack.std().item() == pytest.approx(STD["kaiming, 3-D stack"], rel=0.03)
    matrix = torch.nn.init.kaiming_uniform_(torch.empty(128, 256), a=math.sqrt(5))
    assert matrix.std().item() == pytest.approx(STD["kaiming"], rel=0.03)


def test_orthogonal_rows():
    q = inits.orthogonal(torch.empty(4, 32), torch.Generator().manual_seed(0))
    torch.testing.assert_close(q @ q.mT, torch.eye(4), atol=1e-5, rtol=0)


def test_examples_are_repeated_if_the_steps_need_more(one_thread):
    rows = dates(n_train=3, n_test=1)[0]
    prepared = inits.prepare(rows, rank=1, targets="attention")
    losses = inits.train(prepared, "kaiming", 0.0, 0, rank=1, steps=4, batch_size=3)
    assert len(losses) == 4 and max(losses) - min(losses) < 0.05, "every step has all three rows"


def test_summary():
    curves = {"a": [[9, 9, 9, 1], [9, 9, 9, 3]], "b": [[4.0]]}
    assert inits.summary(curves) == {"a": (2, pytest.approx(math.sqrt(2))), "b": (4, 0)}
