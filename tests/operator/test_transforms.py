"""Forward-mode derivatives and torch.func's transforms of the operator: right, or refused with a clear error."""

import pytest
import torch
from torch.autograd import forward_ad

import ktlib
from ktlib.lab.validation import random_layer

LAYER = random_layer("trained", tokens=5, experts=3, top_k=2, hidden=32, intermediate=16, rank=2)
X = LAYER["hidden_states"]
TANGENT = "got a tensor with a tangent: forward-mode derivatives are not implemented"
NO_GRAD = "torch.func.grad and what is made of it are not implemented; use torch.autograd.grad"


def operator(x, **changes):
    return ktlib.moe_experts(**(LAYER | {"hidden_states": x} | changes))


def loss(x):
    return operator(x).float().sum()


def of_lora(a):
    return operator(X, down_lora=(a, *LAYER["down_lora"][1:]))


def jvp(function, x):
    return torch.func.jvp(function, (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("grad", [False, True])
def test_dual_tensors(grad):
    """A tangent of any argument is refused; tensors that are not arguments may have one."""
    factors = {
        f"{name} lora_{letter}": (name, i) for name in ("gate_up_lora", "down_lora") for i, letter in enumerate("AB")
    }
    with forward_ad.dual_level():
        assert torch.equal(operator(X), ktlib.moe_experts(**LAYER))
        for argument in ("hidden_states", "top_k_weights", "gate_up_proj", "down_proj", *factors):
            name, place = factors.get(argument, (argument, None))
            value = LAYER[name] if place is None else LAYER[name][place]
            dual = forward_ad.make_dual(value.clone().requires_grad_(grad), torch.ones_like(value))
            if place is not None:
                dual = (*LAYER[name][:place], dual, *LAYER[name][place + 1 :])
            with pytest.raises(NotImplementedError, match=f"^{argument}: {TANGENT}"):
                ktlib.moe_experts(**LAYER | {name: dual})


def test_forward_over_reverse():
    """A tangent of grad_output is refused."""
    output = operator(X.clone().requires_grad_())
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"^grad_output: {TANGENT}"):
        output.backward(forward_ad.make_dual(torch.ones_like(output), torch.ones_like(output)))


@pytest.mark.parametrize(
    "transform",
    [
        lambda: jvp(operator, X),
        lambda: jvp(of_lora, LAYER["down_lora"][0]),
        lambda: jvp(torch.func.vmap(operator), X[None]),
        lambda: torch.func.vmap(lambda x: jvp(operator, x))(X[None]),
        lambda: torch.func.jacfwd(operator)(X),
        lambda: torch.func.linearize(operator, X),
        lambda: torch.compile(lambda x: jvp(operator, x), backend="eager")(X),
    ],
)
def test_forward_mode_of_torch_func(transform):
    with pytest.raises(NotImplementedError, match=TANGENT):
        transform()


@pytest.mark.parametrize(
    "transform",
    [
        lambda: torch.func.grad(loss)(X),
        lambda: torch.func.vjp(operator, X),
        lambda: torch.func.jacrev(operator)(X),
        lambda: torch.func.hessian(loss)(X),
        lambda: torch.func.vmap(torch.func.grad(loss))(X[None]),
    ],
)
def test_reverse_mode_of_torch_func(transform):
    with pytest.raises(NotImplementedError, match=NO_GRAD):
        transform()


def test_errors_of_the_operator_itself_pass():
    with pytest.raises(ValueError, match="^top_k_index: got expert id 3"):
        operator(X, top_k_index=torch.full_like(LAYER["top_k_index"], 3))


def test_vmap():
    """Over any tensor arguments and along any dimension, with gradients of tensors outside vmap."""
    batch = torch.stack([X, 2 * X, -X])
    want = torch.stack([operator(x) for x in batch])
    assert torch.equal(torch.func.vmap(operator)(batch), want)
    across = torch.func.vmap(operator, in_dims=1, out_dims=1)(batch.transpose(0, 1).contiguous())
    assert torch.equal(across.transpose(0, 1), want)
    weights = torch.stack([LAYER["down_proj"], 2 * LAYER["down_proj"]])
    got = torch.func.vmap(lambda w, x: operator(x, down_proj=w))(weights, batch[:2])
    assert torch.equal(got, torch.stack([operator(x, down_proj=w) for w, x in zip(weights, batch, strict=False)]))

    factor = LAYER["gate_up_lora"][0].clone().requires_grad_()
    lora = (factor, *LAYER["gate_up_lora"][1:])
    torch.func.vmap(lambda x: operator(x, gate_up_lora=lora))(batch).sum().backward()
    got, factor.grad = factor.grad, None
    sum(operator(x, gate_up_lora=lora).sum() for x in batch).backward()
    torch.testing.assert_close(got, factor.grad)


LONG = random_layer("trained", tokens=12289, experts=2, top_k=2, hidden=16, intermediate=16, rank=1)  # two chunks
LONG |= {"gate_up_bias": torch.full((2, 32), 0.1), "down_bias": torch.full((2, 16), -0.1)}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "name", ["hidden_states", "top_k_weights", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias"]
)
@pytest.mark.parametrize("layer", [LAYER, LONG], ids=["short", "long"])
def test_vmap_over_what_requires_a_gradient(layer, name, recompute):
    """Also in a vmap within a vmap; tensors that other gradients need are saved."""
    value = layer[name] if name in layer else LONG[name].new_ones(3, {"gate_up_bias": 32, "down_bias": 32}[name])
    batch, x = torch.stack([value, 2 * value]).requires_grad_(), layer["hidden_states"].clone().requires_grad_()

    def call(element):
        return ktlib.moe_experts(**layer | {"hidden_states": x} | {name: element}, recompute=recompute)

    def gradients(outputs):
        return torch.autograd.grad(outputs.float().square().sum(), [batch, x], allow_unused=True)

    batched, alone = torch.func.vmap(call), torch.stack([call(element) for element in batch])
    of_batch, of_x = gradients(alone)
    for output in (batched(batch), torch.func.vmap(batched)(batch[None])[0]):
        assert torch.equal(output, alone)
        got = gradients(output)
        assert torch.equal(got[0], of_batch)
        if name != "hidden_states":
            torch.testing.assert_close(got[1], of_x)


def test_vmap_compiled():
    batch = torch.stack([X, 2 * X]).requires_grad_()
    results = []
    for function in (torch.func.vmap(operator), torch.compile(torch.func.vmap(operator), backend="aot_eager")):
        output = function(batch)
        results.append((output, *torch.autograd.grad(output.float().square().sum(), batch)))
    assert all(map(torch.equal, *results))


def test_vmap_over_nothing_is_refused():
    with pytest.raises(ValueError, match="got a batch of torch.func.vmap without elements, needs at least one"):
        torch.func.vmap(operator)(X[None][:0])


@pytest.mark.filterwarnings("ignore")  # of torch: no batching rule for backward, one element after the other
def test_batched_gradients():
    """``is_grads_batched``, and a Jacobian taken with it."""
    x = X.clone().requires_grad_()
    output = operator(x)
    gradients = torch.stack([torch.ones_like(output), torch.zeros_like(output), output.detach()])
    (batched,) = torch.autograd.grad(output, x, gradients, is_grads_batched=True, retain_graph=True)
    one_by_one = [torch.autograd.grad(output, x, gradient, retain_graph=True)[0] for gradient in gradients]
    assert torch.equal(batched, torch.stack(one_by_one))
    jacobians = [torch.autograd.functional.jacobian(operator, X, vectorize=vectorize) for vectorize in (False, True)]
    assert torch.equal(*jacobians)
