"""The operator's boundary: tensors that changed or were freed are refused, and a call is a pure function."""

import gc
import subprocess
import sys
import threading

import pytest
import torch

import ktlib
from ktlib import reference
from ktlib.lab.validation import QUANTITIES, evaluate, random_layer, relative_error
from ktlib.operator import registered_op

EXPERTS, HIDDEN, INTERMEDIATE, RANK = 4, 64, 96, 3


def small_layer():
    return random_layer(
        "trained", tokens=10, experts=EXPERTS, top_k=2, hidden=HIDDEN, intermediate=INTERMEDIATE, rank=RANK
    )


@pytest.fixture
def layer():
    return small_layer()


def arguments_of_the_op(
    layer, gate="silu", limit=float("inf"), transposed=False, interleaved=False, save=True, dropout=(None, 0.0)
):
    """``layer`` as torch.ops.ktlib.moe_experts takes it."""
    lora = [t for name in ("gate_up_lora", "down_lora") for t in layer[name][:2]]
    names = ("hidden_states", "top_k_index", "top_k_weights", "gate_up_proj", "down_proj")
    biases = (layer.get("gate_up_bias"), layer.get("down_bias"))
    seed, probability = dropout
    settings = (
        2.0,
        2.0,
        probability,
        gate,
        limit,
        1.702,
        transposed,
        interleaved,
        "",
        False,
        1,
        0,
        "",
        save and biases[0] is not None,
        save,
    )
    return (*(layer[name] for name in names), *biases, *lora, seed, *settings)


def test_a_wrong_id_writes_nothing(layer):
    """C++ checks ids before it writes any output, even if it is called directly."""
    layer["top_k_index"][9, 1] = 10**12
    output = torch.full((10, HIDDEN), 7.0, dtype=torch.bfloat16)
    call = registered_op._native_call(*registered_op._unflatten(arguments_of_the_op(layer))[:3])
    with pytest.raises(ValueError, match="1000000000000"):
        registered_op._kernels.forward(
            "", 2, call.inputs, registered_op._matrix(output), registered_op._saved([None] * 3)
        )
    assert (output == 7.0).all()


WITHOUT_TILES = """
import ctypes, struct
# A filter of system calls that answers EPERM to arch_prctl, with which a process asks for the tile registers of AMX.
lines = [(0x20, 0, 0, 0), (0x15, 0, 1, 158), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS"
assert libc.prctl(22, 2, struct.pack("@HP", len(lines), ctypes.addressof(code))) == 0, "PR_SET_SECCOMP"
import ktlib
print(ktlib.cpu_info()["isa"])
ktlib.operator.registered_op._kernels.select_isa("amx_bf16")
"""


def test_unavailable_isa_is_an_error_not_a_crash():
    """A machine without AMX, or one whose operating system refuses AMX's registers to the process."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_TILES], capture_output=True, text=True, timeout=120)
    if "PR_SET_SECCOMP" in done.stderr:
        pytest.skip("this system does not let a process filter its own system calls")
    assert done.returncode == 1 and done.stdout.strip() in set(ktlib.cpu_info()["isas"]) - {"amx_bf16"}
    assert "RuntimeError: isa: 'amx_bf16' cannot run on this machine: it " in done.stderr
    with pytest.raises(ValueError, match="known are"):
        registered_op._kernels.select_isa("sse9")


def test_the_extension_takes_every_field_of_a_call_by_name_and_none_may_be_missing():
    fields = {"tokens": 1, "hidden": 2, "inter": 3, "experts": 4, "topk": 5}
    shape = registered_op._kernels.Shape(**fields)
    assert {name: getattr(shape, name) for name in fields} == fields
    for name in fields:
        with pytest.raises(TypeError):
            registered_op._kernels.Shape(**{other: value for other, value in fields.items() if other != name})
    for wrong in ({"rank": 6}, {"hidden": "2"}):
        with pytest.raises(TypeError):
            registered_op._kernels.Shape(**(fields | wrong))
    with pytest.raises(TypeError):
        registered_op._kernels.Shape(*fields.values())


def test_isa_from_the_environment(layer, monkeypatch):
    monkeypatch.setenv("KTLIB_ISA", "portable")
    assert ktlib.cpu_info()["isa"] == "portable"
    by_variable, by_argument = ktlib.moe_experts(**layer), ktlib.moe_experts(**layer, isa="portable")
    assert torch.equal(by_variable, by_argument)
    monkeypatch.setenv("KTLIB_ISA", "sse9")
    with pytest.raises(ValueError, match="sse9"):
        ktlib.moe_experts(**layer)


def test_tensors_without_memory_are_refused(layer):
    """Tensors on the meta device."""
    for name, size in (("gate_up_bias", 2 * INTERMEDIATE), ("down_bias", HIDDEN)):
        with pytest.raises(ValueError, match=f"{name}: got a tensor on meta"):
            ktlib.moe_experts(**layer, **{name: torch.zeros(EXPERTS, size, device="meta")})
    for name in ("hidden_states", "top_k_index", "top_k_weights", "gate_up_lora", "down_lora"):
        lora_A, lora_B, scaling = layer["down_lora"]
        changed = (lora_A.to("meta"), lora_B, scaling) if "lora" in name else layer[name].to("meta")
        if name == "gate_up_lora":
            changed = (layer[name][0], layer[name][1].to("meta"), scaling)
        with pytest.raises(ValueError, match=f"{name}.*: got a tensor on meta"):
            ktlib.moe_experts(**(layer | {name: changed}))


def emptied(tensor):
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() // 2)


@pytest.mark.parametrize("name", registered_op.NAMES)
def test_memory_that_was_freed_is_not_read(layer, name):
    """The storage of a tensor was shrunk, before the call or between forward and backward."""
    layer |= {"gate_up_bias": torch.ones(EXPERTS, 2 * INTERMEDIATE), "down_bias": torch.ones(EXPERTS, HIDDEN)}
    layer |= {"dropout_seed": torch.tensor(1)}
    for forward_first in (False, True):
        arguments = {key: value.clone() for key, value in layer.items() if isinstance(value, torch.Tensor)}
        for which in ("gate_up_lora", "down_lora"):
            arguments[which] = tuple(t.clone().requires_grad_() for t in layer[which][:2]) + layer[which][2:]
        which, _, matrix = name.partition(" lora_")
        victim = arguments[which]["AB".index(matrix)] if matrix else arguments[which]
        if not forward_first:
            emptied(victim.data)
        with pytest.raises(ValueError, match=f"{name}: got .* its memory was freed"):
            output = ktlib.moe_experts(**arguments, lora_dropout=0.5)
            emptied(victim.data)
            output.sum().backward()


def test_shapes_that_changed_since_forward_are_refused(layer):
    """``.data`` puts another tensor in the place of a saved one, and autograd does not notice."""
    lora_A, lora_B = (t.clone().requires_grad_() for t in layer["down_lora"][:2])
    other = random_layer("trained", tokens=10, experts=EXPERTS, top_k=2, hidden=HIDDEN, intermediate=INTERMEDIATE)
    output = ktlib.moe_experts(**(layer | {"down_lora": (lora_A, lora_B, 2.0)}))
    lora_A.data, lora_B.data = other["down_lora"][:2]  # rank 8 instead of 3
    with pytest.raises(ValueError, match=r"down_lora: changed since forward, which saved bfloat16 \(6, 20\)"):
        output.sum().backward()
    output = ktlib.moe_experts(**(layer | {"down_lora": (lora_A, lora_B, 2.0)}))
    lora_B.data = layer["down_lora"][1]  # rank 3 again, beside an A of rank 8
    with pytest.raises(ValueError, match="down_lora lora_B: got shape"):
        output.sum().backward()
    x = layer["hidden_states"].clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.float() if t.shape == (20, 192) else t, lambda t: t):
        output = ktlib.moe_experts(**(layer | {"hidden_states": x}))
    with pytest.raises(ValueError, match="hidden_states or down_proj: changed since forward, which saved float32"):
        output.sum().backward()


def of_other_strides(tensor):
    return tensor.T.contiguous().T


def without_memory(tensor):
    copy = tensor.clone()
    emptied(copy)
    return copy


@pytest.mark.parametrize(
    "unpack, words", [(of_other_strides, "changed since"), (without_memory, "its memory was freed")]
)
def test_saved_tensors_that_hooks_spoil_are_refused(layer, unpack, words):
    x = layer["hidden_states"].clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: unpack(t) if t.shape == (20, 192) else t):
        output = ktlib.moe_experts(**(layer | {"hidden_states": x}))
    with pytest.raises(ValueError, match=f"hidden_states or down_proj: .*{words}"):
        output.sum().backward()


def test_a_gradient_without_memory_is_refused(layer):
    x = layer["hidden_states"].clone().requires_grad_()
    with pytest.raises(ValueError, match="grad_output: got .* its memory was freed"):
        ktlib.moe_experts(**(layer | {"hidden_states": x})).backward(without_memory(x.detach()))


def test_second_derivatives_are_refused(layer):
    x = layer["hidden_states"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ktlib.moe_experts(**(layer | {"hidden_states": x})).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives are not implemented"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj", "gate_up_bias", "down_bias"])
def test_gradients_of_weights_that_forward_did_not_expect_are_refused(layer, name):
    """Long batches are computed in chunks, and each chunk would overwrite the gradient of the ones before."""
    layer |= {"gate_up_bias": torch.ones(EXPERTS, 2 * INTERMEDIATE), "down_bias": torch.ones(EXPERTS, HIDDEN)}
    layer[name].requires_grad_()
    *arguments, _, save = arguments_of_the_op(layer)
    output, *_ = torch.ops.ktlib.moe_experts(*arguments, False, save)
    with pytest.raises(ValueError, match=f"{name}: its gradient is wanted of a call .* with whole=False"):
        output.sum().backward()


def test_opcheck(layer):
    wide = dict(layer)
    for name in ("hidden_states", "top_k_weights"):
        wide[name] = layer[name].clone().requires_grad_()
    for name in ("gate_up_lora", "down_lora"):
        wide[name] = (*(t.clone().requires_grad_() for t in layer[name][:2]), layer[name][2])
    torch.library.opcheck(torch.ops.ktlib.moe_experts.default, arguments_of_the_op(wide))
    results = torch.ops.ktlib.moe_experts(*arguments_of_the_op(wide))
    assert [t.requires_grad for t in results] == [True, False, False, False]
    arguments = arguments_of_the_op(layer, save=False)
    torch.library.opcheck(torch.ops.ktlib.moe_experts.default, (*arguments[:5], *[None] * 7, *arguments[12:]))


def test_opcheck_with_dropout(layer):
    layer["hidden_states"].requires_grad_()
    arguments = arguments_of_the_op(layer, dropout=(torch.tensor(7), 0.25))
    torch.library.opcheck(torch.ops.ktlib.moe_experts.default, arguments)
    with pytest.raises(ValueError, match="lora_dropout: got 1.5"):
        torch.ops.ktlib.moe_experts(*arguments_of_the_op(layer, dropout=(torch.tensor(7), 1.5)))


def test_opcheck_of_transposed_interleaved_experts_with_biases(layer):
    layer["gate_up_proj"], layer["down_proj"] = (
        layer[name].transpose(1, 2).contiguous().requires_grad_() for name in ("gate_up_proj", "down_proj")
    )
    layer["gate_up_bias"] = torch.randn(EXPERTS, 2 * INTERMEDIATE).requires_grad_()
    layer["down_bias"] = torch.randn(EXPERTS, HIDDEN).bfloat16().requires_grad_()
    arguments = arguments_of_the_op(layer, "swiglu_oai", 7.0, transposed=True, interleaved=True)
    torch.library.opcheck(torch.ops.ktlib.moe_experts.default, arguments)


def test_compiles_without_a_graph_break(layer):
    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(x, ids, weights):
        return ktlib.moe_experts(x * 2, ids, weights, layer["gate_up_proj"], layer["down_proj"]) + 1

    x = layer["hidden_states"].clone().requires_grad_()
    y = layer["hidden_states"].clone().requires_grad_()
    actual = compiled(x, layer["top_k_index"], layer["top_k_weights"])
    expected = (
        ktlib.moe_experts(
            y * 2, layer["top_k_index"], layer["top_k_weights"], layer["gate_up_proj"], layer["down_proj"]
        )
        + 1
    )
    actual.sum().backward()
    expected.sum().backward()
    assert torch.equal(actual, expected) and torch.equal(x.grad, y.grad)


# --------------------------------------------------------------------------------- a call is a pure function


@pytest.mark.parametrize("stream_device", ["", "cpu"])
def test_a_default_device_changes_nothing(layer, stream_device):
    """A default device, as set by ``with torch.device(...)`` or torch.set_default_device."""
    settings = {"stream_rows": 1, "recompute": True, "stream_device": stream_device} if stream_device else {}
    layer["hidden_states"].requires_grad_()
    tensors, _, given, save = registered_op._unflatten(arguments_of_the_op(layer, dropout=(torch.tensor(7), 0.5)))
    given, wanted = given._replace(**settings), [name == "hidden_states" for name in registered_op.DIFFERENTIABLE]

    def results():
        output, *saved = registered_op._forward(*tensors, *given, save)
        gradients = registered_op._backward(output.detach(), *saved, *tensors, *given, wanted)
        called = ktlib.moe_experts(**layer, lora_dropout=0.5, dropout_seed=7)
        return output, *saved, *gradients, called, *torch.autograd.grad(called.sum(), layer["hidden_states"])

    want = results()
    with torch.device("meta"):
        got = results()
    assert all(map(torch.equal, got, want))


def losses_and_gradients(layer, order):
    """Two batches through one layer, forward and backward in the given order of steps: f0 f1 b0 b1 ..."""
    batches = []
    for half in (slice(0, 5), slice(5, 10)):
        x = layer["hidden_states"][half].clone().requires_grad_()
        arguments = {n: layer[n][half] for n in ("top_k_index", "top_k_weights")} | {"hidden_states": x}
        batches.append((x, layer | arguments))
    outputs = {}
    for step in order.split():
        index = int(step[1])
        if step[0] == "f":
            outputs[index] = ktlib.moe_experts(**batches[index][1])
        elif step[0] == "e":
            with torch.no_grad():
                ktlib.moe_experts(**batches[index][1])
        else:
            outputs[index].float().pow(2).sum().backward()
    return [t for i in (0, 1) for t in (outputs[i].detach(), batches[i][0].grad)]


@pytest.mark.parametrize("order", ["f0 f1 b0 b1", "f0 f1 b1 b0", "f0 e1 e0 b0 f1 e0 b1", "f0 f0 f0 b0 f1 b1"])
def test_any_order_of_forward_and_backward(layer, order):
    for actual, expected in zip(
        losses_and_gradients(layer, order), losses_and_gradients(layer, "f0 b0 f1 b1"), strict=True
    ):
        assert torch.equal(actual, expected)


def test_nothing_is_remembered_between_calls(layer):
    """Weights edited in place, moved, replaced or of another rank: each call sees what it is given."""
    expected = evaluate(reference.moe_experts, layer)
    other = random_layer(
        "trained", tokens=10, experts=EXPERTS, top_k=2, hidden=HIDDEN, intermediate=INTERMEDIATE, rank=7, seed=1
    )
    weight = torch.zeros_like(layer["gate_up_proj"])
    scratch = dict(layer, gate_up_proj=weight)
    evaluate(ktlib.moe_experts, scratch)
    evaluate(ktlib.moe_experts, other)  # rank 7 right after rank 3
    weight.copy_(layer["gate_up_proj"])  # same storage, new numbers
    del weight
    for _ in range(2):
        actual = evaluate(ktlib.moe_experts, scratch)
        for name in QUANTITIES:
            assert relative_error(actual[name], expected[name]) < 0.02, name
        scratch["gate_up_proj"] = scratch["gate_up_proj"].clone()  # new storage, the old one freed
        gc.collect()


def test_backward_refuses_weights_that_changed_since_forward(layer):
    lora_A, lora_B, scaling = layer["down_lora"]
    lora_A = lora_A.clone().requires_grad_()
    output = ktlib.moe_experts(**(layer | {"down_lora": (lora_A, lora_B, scaling)}))
    with torch.no_grad():
        lora_A.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


class WithoutGradient(torch.autograd.Function):
    """The identity, whose backward has no gradient to give."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return None


def test_a_gradient_that_is_none_is_passed_on(layer):
    x = layer["hidden_states"].clone().requires_grad_()
    output = ktlib.moe_experts(**(layer | {"hidden_states": x}))
    WithoutGradient.apply(output).sum().backward()
    assert x.grad is None


def test_saves_only_for_a_backward(layer, monkeypatch):
    """The kernels get the three addresses of saved tensors if backward may follow, else null addresses."""
    addresses, forward = [], registered_op._kernels.forward

    def watched(*arguments):
        saved = arguments[-1]
        addresses.append((saved.gate_up, saved.t_gate_up, saved.t_down))
        return forward(*arguments)

    monkeypatch.setattr(registered_op._kernels, "forward", watched)
    x = layer["hidden_states"].clone().requires_grad_()
    ktlib.moe_experts(**layer)
    with torch.no_grad():
        ktlib.moe_experts(**(layer | {"hidden_states": x}))
    assert addresses == [(0, 0, 0)] * 2
    output = ktlib.moe_experts(**(layer | {"hidden_states": x}))
    assert all(addresses[2]) and output.grad_fn.next_functions[0][0].variable is x


def test_threads_of_python(layer):
    expected = evaluate(ktlib.moe_experts, layer)
    failures = []

    def work():
        for _ in range(20):
            actual = evaluate(ktlib.moe_experts, layer)
            failures.extend(name for name in QUANTITIES if not torch.equal(actual[name], expected[name]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_read_only_memory_map(layer, tmp_path):
    """Expert weights straight from a file that the process may not write."""
    mapped = dict(layer)
    for name in ("gate_up_proj", "down_proj"):
        file = tmp_path / name
        file.write_bytes(layer[name].view(torch.uint8).numpy().tobytes())
        file.chmod(0o400)
        flat = torch.from_file(str(file), shared=False, size=layer[name].numel(), dtype=torch.bfloat16)
        mapped[name] = flat.reshape(layer[name].shape)
    for first, second in zip(
        evaluate(ktlib.moe_experts, layer).values(), evaluate(ktlib.moe_experts, mapped).values(), strict=True
    ):
        assert torch.equal(first, second)
