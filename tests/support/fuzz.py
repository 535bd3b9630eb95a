"""Random calls of ``moe_experts`` and its backward, valid and invalid, and checks of their results or errors.

:func:`try_one` makes one call with random choices, and raises AssertionError if its result or its error is wrong. In
``test_fuzz.py`` hypothesis makes the choices, in ``fuzz_long.py`` a seeded generator.
"""

import functools
import gc
import math
import mmap
import random
import re
import tempfile
from unittest import mock

import torch
from support import extension
from support.weights import drawn_weight

import ktlib
from ktlib import reference
from ktlib.operator import checks, moe_experts, registered_op

NAMES = tuple(name for name in registered_op.NAMES if name != "dropout_seed")  # among SETTINGS
WEIGHTS = ("gate_up_proj", "down_proj")
ISAS = [name for name, missing in ktlib.cpu_info()["isas"].items() if not missing]
DIFFERENTIABLE = tuple(name for name in NAMES if name != "top_k_index")
ROUNDING = 2.0**-8  # of bf16, one unit in the last place
# An element's error is at most this many roundings of the sum of its terms' magnitudes. Half a unit each is lost in
# gate and up, their derivatives, h, the result, and the products with two LoRA matrices.
ROUNDINGS = 4
NO_NUMBERS = (math.nan, math.inf, -math.inf, "1", True, [1.0], torch.tensor(1.0))
NO_FLAGS = ("no", None, 0, 1, torch.tensor(True))

# Keyword arguments that are no tensors: a function that draws a valid value, and values that must be refused. A new
# argument is added here, and to REFERENCE if the reference has it too.
SETTINGS = {
    "gate": (lambda choose: choose.pick(checks.GATES), ("relu", "SiLU", None, 0, ["silu"], torch.tensor(0))),
    "limit": (
        lambda choose: choose.pick([None, 1, 10.0, choose.integer(1, 3000) / 1000]),
        (0, -1.5, 1e39, 10**400, *NO_NUMBERS),
    ),
    # other gates than swiglu_oai refuse every alpha: _computed passes None with them
    "alpha": (lambda choose: choose.pick([None, 0, 1, 1.702, -0.8, 20.0]), (1e39, -(10**400), *NO_NUMBERS)),
    "transposed": (lambda choose: choose.chance(50), NO_FLAGS),
    "interleaved": (lambda choose: choose.chance(50), NO_FLAGS),
    "isa": (lambda choose: choose.pick(ISAS), ("sse9", "AVX2", 0, False, b"avx2", ["portable"])),
    "recompute": (lambda choose: choose.chance(25), NO_FLAGS),
    "parts": (lambda choose: choose.integer(1, 5), (0, -1, 1025, 2.0, None, True, "2", 2**31, 2**70)),
    "stream_rows": (lambda choose: choose.pick([None, 1, choose.integer(1, 40)]), (0, -1, 2.0, True, "1", [1])),
    "lora_dropout": (lambda choose: choose.pick([0, 0.0, 0.3, 0.9]), (1, -0.1, 10**400, None, *NO_NUMBERS)),
    "dropout_seed": (
        lambda choose: choose.integer(-(2**63), 2**63 - 1),
        (2**63, -(2**63) - 1, 1.5, "1", True, [1], torch.tensor(1.0), torch.tensor([1])),
    ),
}
REFERENCE = ("gate", "limit", "alpha", "transposed", "interleaved", "lora_dropout", "dropout_seed")


class Seeded:
    """Choices of a seeded generator; those of its subclass in test_fuzz.py are hypothesis's."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def integer(self, low, high):
        return self.random.randint(low, high)

    def pick(self, options):
        return options[self.integer(0, len(options) - 1)]

    def chance(self, percent):
        return self.integer(1, 100) <= percent


def try_one(choose):
    """Make one random call; returns "valid" or the name of the mistake."""
    before = torch.get_num_threads()
    torch.set_num_threads(choose.integer(1, 3))
    try:
        tensors, options = _layer(choose)
        if choose.chance(50):
            mistake = choose.pick(list(MISTAKES))
            if _refused(choose, mistake, tensors, options):
                return mistake
        _computed(choose, tensors, options)
        return "valid"
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------- valid calls


def _layer(choose):
    """``{name of NAMES: tensor}``, and the other arguments."""
    tokens, experts, top_k = choose.pick([0, 1, choose.integer(2, 40)]), choose.integer(1, 6), choose.integer(1, 4)
    hidden, inter = choose.integer(1, 40), choose.integer(1, 40)
    floats = (torch.bfloat16, torch.float32)
    settings = {name: draw(choose) for name, (draw, _) in SETTINGS.items()}
    generator = torch.Generator().manual_seed(choose.integer(0, 2**31))

    def normal(*shape, dtype=torch.bfloat16, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    tensors = {
        "hidden_states": normal(tokens, hidden, dtype=choose.pick(floats)),
        "top_k_index": torch.randint(0, experts, (tokens, top_k), generator=generator),
        "top_k_weights": normal(tokens, top_k, dtype=choose.pick(floats)),
        "gate_up_proj": normal(experts, 2 * inter, hidden, scale=hidden**-0.5),
        "down_proj": normal(experts, hidden, inter, scale=inter**-0.5),
    }
    if settings["transposed"]:
        for name in ("gate_up_proj", "down_proj"):
            tensors[name] = tensors[name].transpose(1, 2).contiguous()
    for name, size in (("gate_up_bias", 2 * inter), ("down_bias", hidden)):
        if choose.chance(50):
            tensors[name] = normal(experts, size, dtype=choose.pick(floats), scale=choose.pick([0.0, 1.0]))
    for name, inner, outer in (("gate_up_lora", hidden, 2 * inter), ("down_lora", inter, hidden)):
        if choose.chance(75):
            rank, dtype = choose.integer(1, 9), choose.pick(floats)
            tensors[f"{name} lora_A"] = normal(experts * rank, inner, dtype=dtype, scale=inner**-0.5)
            tensors[f"{name} lora_B"] = normal(outer, rank * experts, dtype=dtype, scale=choose.pick([0.0, 0.3]))
    for name in tensors:
        tensors[name] = _in_other_memory(choose, tensors[name], contiguous=name in ("gate_up_proj", "down_proj"))
    return tensors, settings | {"scaling": choose.pick([0.0, 1, 2.0, -0.5])}


def _in_other_memory(choose, tensor, contiguous):
    """The same values: in the same memory, at an odd address, in a read-only file, or with other strides."""
    form = choose.pick(["plain", "odd address", *(["file"] if contiguous else ["strided", "columns"])])
    if extension.PAGES and form == "plain":
        return extension.guarded(tensor.shape, tensor.dtype).copy_(tensor)
    if form == "odd address":
        buffer = torch.empty(tensor.numel() + 3, dtype=tensor.dtype)
        return buffer[3:].view(tensor.shape).copy_(tensor)
    if form == "file" and tensor.numel():
        return _mapped(tensor)
    if form == "strided":
        return tensor.T.contiguous().T
    if form == "columns":
        return torch.stack([tensor, tensor + 1], dim=-1)[..., 0]
    return tensor


def _mapped(tensor):
    with tempfile.TemporaryFile() as file:
        file.write(tensor.flatten().view(torch.uint8).numpy().tobytes())
        file.flush()
        memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)  # torch warns that it is read-only


def call(tensors, options, function=ktlib.moe_experts):
    """``function`` of the tensors and of the settings that it takes; ``options`` also has LoRA's scaling."""
    arguments = {name: options[name] for name in (REFERENCE if function is reference.moe_experts else SETTINGS)}
    for name in ("gate_up_lora", "down_lora"):
        if f"{name} lora_A" in tensors:
            arguments[name] = (tensors[f"{name} lora_A"], tensors[f"{name} lora_B"], options["scaling"])
    arguments |= {name: tensor for name, tensor in tensors.items() if "lora" not in name}
    with mock.patch.object(moe_experts, "_stream_device", str):  # streams to the CPU as if it were a GPU
        return function(**arguments)


def _computed(choose, tensors, options):
    """Assert that the output and a random subset of gradients are the reference's, and no other gradients are made."""
    poison = _poison(choose, tensors, options["limit"]) if choose.chance(25) else None
    if choose.chance(15):
        _overlap(choose, tensors)
    stored = {}  # weights that are not given as bf16 stacks
    if not options["transposed"] and not options["stream_rows"] and poison is None and choose.chance(40):
        stored = {name: drawn_weight(choose, tensors[name].shape) for name in WEIGHTS if choose.chance(70)}
        tensors |= {name: weight.decoded() for name, weight in stored.items()}
    options = options | {
        "alpha": options["alpha"] if options["gate"] == "swiglu_oai" else None,
        "limit": _between_values(options["limit"], tensors, options),
    }
    wanted = [name for name in tensors if name in DIFFERENTIABLE and name not in stored and choose.chance(50)]
    if options["stream_rows"]:
        wanted = [name for name in wanted if not name.endswith(("proj", "bias"))]
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in tensors.items()}
    output = call(leaves | stored, options)
    assert torch.equal(output, call(leaves, options)) or not stored
    assert output.dtype == tensors["hidden_states"].dtype and output.shape == tensors["hidden_states"].shape
    assert output.requires_grad == bool(wanted)
    gradient = _gradient(choose, output)
    got = {"output": output.detach()}
    if wanted:
        _between(choose, tensors, options)
        output.backward(gradient)
        got |= {name: leaves[name].grad for name in wanted}
    assert all((leaf.grad is not None) == (name in wanted) for name, leaf in leaves.items())

    exact = _reference(tensors, options, gradient, wanted)
    size = _reference(tensors, _magnitudes(options), gradient, wanted, torch.abs)
    for name, value in got.items():
        assert name == "output" or value.dtype == tensors[name].dtype
        want, most, value = exact[name], size[name], value.double()
        error, allowed = (value - want).abs(), ROUNDINGS * ROUNDING * most + 1e-30
        bad = most.isfinite() & ~(error <= allowed)
        if poison is math.nan:
            bad |= want.isnan() & ~value.isnan()  # a NaN is never lost
        assert not bad.any(), f"{name}: {int(bad.sum())} of {bad.numel()}, error {error[bad][:3]}, {allowed[bad][:3]}"


def _poison(choose, tensors, limit):
    """Put one NaN or Inf into a tensor, and return it.

    With a limit there is no Inf in LoRA: the product of Inf and the low half of an inner value (csrc/layer/lora.h) may
    be NaN, where the reference clamps Inf to the limit."""
    value = choose.pick([math.nan, math.inf, -math.inf])
    names = [name for name in tensors if name in DIFFERENTIABLE]
    name = choose.pick([n for n in names if "lora" not in n] if limit and not math.isnan(value) else names)
    if tensors[name].numel():
        tensors[name] = tensors[name].clone(memory_format=torch.contiguous_format)
        tensors[name].view(-1)[choose.integer(0, tensors[name].numel() - 1)] = value
    return value


def _overlap(choose, tensors):
    """Make two arguments of one dtype share memory."""
    first, second = (choose.pick([name for name in tensors if name != "top_k_index"]) for _ in range(2))
    a, b = sorted((tensors[first], tensors[second]), key=torch.Tensor.numel)
    if a.dtype == b.dtype and b.isfinite().all():
        shared = b.contiguous()
        small = first if tensors[first] is a else second
        tensors[second if small is first else first] = shared
        tensors[small] = shared.view(-1)[: a.numel()].view(a.shape)


def _gradient(choose, output):
    memory = choose.pick(["plain", "strided", "expanded"])
    if memory == "expanded":
        return torch.ones((), dtype=output.dtype).expand(output.shape)
    values = torch.randn(output.shape, generator=torch.Generator().manual_seed(choose.integer(0, 2**31)))
    values = values.bfloat16().to(output.dtype)
    return values.T.contiguous().T if memory == "strided" else values


def _between(choose, tensors, options):
    """Do something that must not matter between a forward and its backward."""
    event = choose.pick(["nothing", "another call", "evaluation", "threads", "garbage"])
    if event == "another call":
        call({name: t.detach() for name, t in tensors.items()}, options)
    elif event == "evaluation":
        with torch.no_grad():
            call(tensors, options)
    elif event == "threads":
        torch.set_num_threads(choose.integer(1, 3))
    elif event == "garbage":
        gc.collect()


def _in_float64(tensors, change=lambda tensor: tensor):
    """The arguments as the operator rounds them, with ``change`` applied to each."""
    exact = ("top_k_weights", "gate_up_bias", "down_bias")
    return {
        name: t if name == "top_k_index" else change((t if name in exact else t.bfloat16()).detach().double())
        for name, t in tensors.items()
    }


def _magnitudes(options):
    """Options with which the reference, given the tensors' magnitudes, sums magnitudes of terms and of derivatives."""
    alpha = None if options["alpha"] is None else abs(options["alpha"])
    return options | {"scaling": abs(options["scaling"]), "alpha": alpha, "limit": None}


def _between_values(limit, tensors, options):
    """``limit``, increased until no gate or up is so near that fp32 may round it to the other side, where the gradient
    jumps."""
    if limit is None:
        return None
    gates_and_ups = []

    def record(gate, up, *_):
        gates_and_ups[-1] += [gate.flatten(), up.flatten()]
        return gate

    with mock.patch("ktlib.reference.layer.apply_gate", record):
        for settings, change in ((options | {"limit": None}, torch.clone), (_magnitudes(options), torch.abs)):
            gates_and_ups.append([torch.zeros(1, dtype=torch.float64)])
            call(_in_float64(tensors, change), settings, reference.moe_experts)
    values, near = torch.cat(gates_and_ups[0]).abs(), torch.cat(gates_and_ups[1]) * 2.0**-15
    values, near = values[near.isfinite()], near[near.isfinite()]
    while (close := (values - limit).abs() <= near).any():
        limit = ((values + near)[close].max() * (1 + 2.0**-20)).item()
    return limit


def _reference(tensors, options, gradient, wanted, change=torch.clone):
    """Output and gradients in float64, of the arguments as the operator rounds them. With ``torch.abs`` as ``change``
    they are sums of magnitudes, by which errors are measured since the terms themselves may cancel."""
    leaves = {n: t if n == "top_k_index" else t.requires_grad_() for n, t in _in_float64(tensors, change).items()}
    output = call(leaves, options, reference.moe_experts)
    if output.requires_grad:
        output.backward(change(gradient.double()))
    # plain torch makes no gradient (None) of experts without tokens
    grads = {name: leaves[name].grad for name in wanted}
    empty = {name: torch.zeros_like(leaves[name]) for name, grad in grads.items() if grad is None}
    return {"output": output.detach()} | grads | empty


# -------------------------------------------------------------------------------------------------- invalid calls


def _refused(choose, mistake, tensors, options):
    """Assert that the mistake raises an exception whose message begins with an argument's name; returns True.

    Returns False if the mistake is impossible with these sizes."""
    wanted = choose.chance(50)
    options = options | {"alpha": options["alpha"] if options["gate"] == "swiglu_oai" else None}
    options["stream_rows"] = None if wanted else options["stream_rows"]
    tensors = {
        name: t.detach().clone().requires_grad_(wanted and name in DIFFERENTIABLE) for name, t in tensors.items()
    }
    for name in ("gate_up_proj", "down_proj"):
        tensors[name] = tensors[name].contiguous()
    change, *expected = MISTAKES[mistake]
    call_it = change(choose, tensors, options)
    if call_it is None:
        return False
    try:
        call_it()
    except (TypeError, ValueError, RuntimeError) as error:
        words = str(error)
        assert expected or re.match("|".join((*SETTINGS, "down_lora", *NAMES)), words), f"{mistake}: {error!r}"
        assert not expected or re.search(expected[0], words), f"{mistake}: {error!r}"
        return True
    raise AssertionError(f"{mistake}: accepted")


def _changed(tensors, options, **changes):
    """The call with other tensors."""
    return functools.partial(call, tensors | changes, options)


def _replaced(replacement):
    """The mistake of passing ``replacement(choose, name, tensor)`` for a random tensor."""

    def mistake(choose, tensors, options):
        name = choose.pick(list(tensors))
        return _changed(tensors, options, **{name: replacement(choose, name, tensors[name])})

    return mistake


def _wrong_dtype(choose, name, tensor):
    right = {"top_k_index": [torch.int64]}.get(name, [torch.bfloat16])
    right += [torch.float32] if name not in ("top_k_index", "gate_up_proj", "down_proj") else []
    dtypes = [torch.float16, torch.float64, torch.float32, torch.int32, torch.int64, torch.bool, torch.complex64]
    return tensor.detach().to(choose.pick([d for d in dtypes if d not in right]))


def _no_tensor(choose, name, tensor):
    others = [1.0, "x", [[1.0]], tensor.detach().float().numpy()]
    return choose.pick(others if name.endswith("bias") else [None, *others])


def _wrong_ndim(choose, name, tensor):
    return choose.pick([tensor[None], tensor.flatten(), tensor.sum()])


def _one_less(choose, tensors, options):
    name = choose.pick(list(tensors))
    dim = choose.integer(0, tensors[name].dim() - 1)
    if tensors[name].shape[dim] == 0:
        return None
    return _changed(tensors, options, **{name: tensors[name].narrow(dim, 0, tensors[name].shape[dim] - 1).contiguous()})


def _strided_weights(choose, tensors, options):
    name = choose.pick(["gate_up_proj", "down_proj"])
    tensors[name] = torch.stack([tensors[name].detach()] * 2, dim=-1)[..., 0]
    return None if tensors[name].is_contiguous() else _changed(tensors, options)


def _id_out_of_range(choose, tensors, options):
    index = tensors["top_k_index"]
    if not index.numel():
        return None
    experts = tensors["down_proj"].shape[0]
    wrong = choose.pick([-1, -experts, experts, experts + 7, 2**31, 2**32, -(2**63), 2**63 - 1])
    index[choose.integer(0, len(index) - 1), choose.integer(0, index.shape[1] - 1)] = wrong
    return _changed(tensors, options, top_k_index=index)


def _rank_that_does_not_divide(choose, tensors, options):
    experts, present = tensors["down_proj"].shape[0], [name for name in tensors if name.endswith("lora_A")]
    if experts == 1 or not present:
        return None
    which, extra = choose.pick(present), choose.integer(1, experts - 1)
    tensors[which] = torch.cat([tensors[which].detach(), tensors[which].detach()[:1].expand(extra, -1)])
    return _changed(tensors, options)


def _wrong_scaling(choose, tensors, options):
    wrong = choose.pick([math.nan, math.inf, None, "2", torch.tensor([2.0]), 1e39, 10**400, 1j])
    has_lora = any("lora" in name for name in tensors)
    return _changed(tensors, options | {"scaling": wrong}) if has_lora else None


def _wrong_lora(choose, tensors, options):
    wrong = choose.pick(
        [(), (1, 2), "abc", 3, tensors["hidden_states"], {"A": 1, "B": 2, "scaling": 3}, (None, None, 1.0)]
    )
    arguments = {name: t for name, t in tensors.items() if "lora" not in name} | {n: options[n] for n in SETTINGS}
    return functools.partial(ktlib.moe_experts, **arguments, down_lora=wrong)


def _wrong_setting(name):
    """A setting has one of the values that must be refused; the message begins with the setting's name."""

    def mistake(choose, tensors, options):
        changed = {name: choose.pick(SETTINGS[name][1])}
        return _changed(tensors, options | {"gate": "swiglu_oai"} | changed)

    return mistake, f"^{name}"


def _alpha_of_another_gate(choose, tensors, options):
    gate = choose.pick([gate for gate in checks.GATES if gate != "swiglu_oai"])
    return _changed(tensors, options | {"gate": gate, "alpha": choose.pick([0.0, 1.702])})


def _other_layout(choose, tensors, options):
    """Refused for all sizes, since gate_up_proj has twice as many rows as down_proj has columns."""
    return _changed(tensors, options | {"transposed": not options["transposed"]})


def _freed(tensor):
    tensor.detach().untyped_storage().resize_(tensor.untyped_storage().nbytes() // 2)


def _freed_before(choose, tensors, options):
    name = choose.pick(list(tensors))
    if not tensors[name].numel():
        return None
    _freed(tensors[name])
    return _changed(tensors, options)


def _before_backward(change):
    """The mistake of calling ``change`` between forward and backward; ``change`` returns False if it is impossible."""

    def mistake(choose, tensors, options):
        for name in DIFFERENTIABLE[:2]:
            tensors[name] = tensors[name].detach().requires_grad_()
        output = call(tensors, options)
        return None if change(choose, tensors) is False else output.sum().backward

    return mistake


def _free(choose, tensors):
    name = choose.pick(list(tensors))
    return _freed(tensors[name]) if tensors[name].numel() else False


def _swap(choose, tensors):
    """Give a saved tensor another shape."""
    name = choose.pick(list(tensors))
    if not tensors[name].numel():
        return False
    dim = choose.integer(0, tensors[name].dim() - 1)
    tensors[name].data = torch.cat([tensors[name].detach()] * 2, dim=dim)


def _reroute(choose, tensors):
    """Put an id out of range into the saved ids, which autograd does not notice."""
    index = tensors["top_k_index"]
    if not index.numel():
        return False
    index.data[-1, -1] = choose.pick([-1, tensors["down_proj"].shape[0], 2**40])


def _edit(choose, tensors):
    name = choose.pick(list(tensors))
    with torch.no_grad():
        tensors[name].add_(1)


MISTAKES = {
    "dtype": (_replaced(_wrong_dtype),),
    "no tensor": (_replaced(_no_tensor),),
    "number of dimensions": (_replaced(_wrong_ndim),),
    "meta": (_replaced(lambda choose, name, tensor: tensor.to("meta")),),
    "sparse": (_replaced(lambda choose, name, tensor: tensor.detach().to_sparse()),),
    "one row less": (_one_less,),
    "strided weights": (_strided_weights,),
    "expert id": (_id_out_of_range,),
    "rank": (_rank_that_does_not_divide,),
    "scaling": (_wrong_scaling,),
    "lora": (_wrong_lora,),
    **{name: _wrong_setting(name) for name in SETTINGS},
    "alpha of another gate": (_alpha_of_another_gate, "^alpha"),
    "other layout": (_other_layout, "^gate_up_proj"),
    "freed": (_freed_before,),
    "freed before backward": (_before_backward(_free),),
    "another shape before backward": (_before_backward(_swap),),
    "expert id before backward": (_before_backward(_reroute), "^top_k_index"),
    "edited before backward": (_before_backward(_edit), "modified by an inplace operation"),
}
