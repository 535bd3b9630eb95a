"""Whether stock transformers and PEFT make of what was saved the model that was trained.

Three questions, each with its own kind of answer:

- Is every trained tensor and every LoRA scaling of the model in the file, under its name? They are compared bit by bit.
- Does a layer compute the same in stock? It gets the inputs that it had in the trained model, experts also the choice
  of experts; the errors of both against the same layer in fp32 are compared. Stock's own error in bf16 is the scale:
  it depends on the model, no bound that is fixed beforehand fits every one.
- How far are the logits from those of stock in fp32? That is reported beside stock's own distance in bf16, and not
  judged: where two experts are nearly tied for a token, a rounding sends it to the other one. In deep models and in
  those with random weights that happens to many tokens, and logits of right adapters differ by 40 %.

No copy of the model in fp32 is needed: one layer at a time is in fp32 while it computes.
"""

import contextlib
import hashlib
import statistics
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from ktlib.diagnosis.trace import repeated_layers
from ktlib.integrations.transformers_experts import is_experts
from ktlib.names import component, layer_of
from ktlib.system.memory import available_memory

LAYERS = 4  # whose outputs are compared: stock PEFT adds up the whole W + BA of a layer, in fp32 for the reference
TOKENS = 128  # of a layer's inputs that are kept


class Observed(NamedTuple):
    """What is kept of a trained model: digests of its tensors, its scalings, and what some of its layers computed."""

    tensors: dict  # name: digest
    scalings: dict  # name of a layer: LoRA scaling by adapter
    calls: dict  # name of a layer: [(args, kwargs, output)], on the CPU
    prompts: list  # lists of token ids
    logits: list  # (tokens, vocabulary) fp32 of each prompt, on the CPU


class Layer(NamedTuple):
    """Relative L2 errors of a layer's output against the same layer in fp32, on the same inputs."""

    name: str
    ours: float
    stock: float

    @property
    def agrees(self):
        """Whether ours is as near to fp32 as roundings allow: twice as far as stock, and one rounding to bf16 more."""
        return self.ours <= 2 * self.stock + 2**-8


class Report(NamedTuple):
    """What :func:`read_back` found. ``print`` shows it."""

    differences: list  # lines of text: tensors and scalings that are not what was trained
    layers: list  # of Layer
    unjudged: str  # why nothing was compared with fp32, "" if it was
    logits_error: float  # median over tokens of the relative L2 difference between ours and stock's
    same_choice: float  # the share of tokens for which ours and stock have the largest logit in the same place
    exact_errors: tuple  # medians of ours and of stock's against stock in fp32; () if that was not computed

    @property
    def wrong(self):
        """What cannot be if stock is given what was trained: lines, none if all is well."""
        off = [f"{x.name}: {x.ours:.4f} from fp32, stock {x.stock:.4f}" for x in self.layers if not x.agrees]
        return self.differences + off

    def __str__(self):
        lines = [f"WRONG: {line}" for line in self.wrong]
        for part in dict.fromkeys(component(layer.name) for layer in self.layers):
            some = [layer for layer in self.layers if component(layer.name) == part]
            ours, stock = (max(column) for column in list(zip(*some, strict=True))[1:])
            lines.append(
                f"{part:<15} {len(some):>3} layers, largest error against fp32: {ours:.4f}, stock's {stock:.4f}"
            )
        if self.unjudged:
            lines.append(f"not compared with fp32: {self.unjudged}")
        lines.append(
            f"logits: median difference from stock {self.logits_error:.4f}, the same choice for {self.same_choice:.1%}"
        )
        if self.exact_errors:
            ours, stock = self.exact_errors
            lines.append(f"logits: median difference from fp32 {ours:.4f}, stock's {stock:.4f}")
        return "\n".join(lines)


def observe(model, prompts):
    """:class:`Observed` of a model that was trained; ``prompts``: lists of token ids, of which each has its beginning
    read."""
    calls, hooks, prompts = {}, [], [ids[:TOKENS] for ids in prompts]

    def keep(name):
        def hook(module, args, kwargs, output):
            if sum(len(rows) for *_, rows in calls.setdefault(name, [])) < TOKENS:
                calls[name].append((_on_cpu(args), _on_cpu(kwargs), _rows(output).cpu()))

        return hook

    try:
        for name, module in _spread(_layers(model)):
            hooks.append(module.register_forward_hook(keep(name), with_kwargs=True))
        answers = logits(model, prompts)
    finally:
        for hook in hooks:
            hook.remove()
    trained = {name: digest(value) for name, value in model.named_parameters() if value.requires_grad}
    return Observed(trained, scalings(model), calls, prompts, answers)


def read_back(model, observed):
    """A :class:`Report` on ``model``, which stock read back with its "eager" experts, on the CPU."""
    layers, exact_errors, unjudged, stock = [], (), "", logits(model, observed.prompts)
    try:
        check_memory(model)
        layers, exact = compare(model, observed), logits_in_fp32(model, observed.prompts)
        exact_errors = tuple(token_errors(answers, exact)[0] for answers in (observed.logits, stock))
    except MemoryError as error:
        unjudged = str(error)
    found = token_errors(observed.logits, stock)
    return Report(differences(model, observed), layers, unjudged, *found, exact_errors)


def differences(model, observed):
    """What of the trained tensors and scalings is not in ``model``: lines, none if all is."""
    found, scaled = dict(model.named_parameters()), scalings(model)
    extra = [name for name in found if ".lora_" in name and name not in observed.tensors]
    lines = [f"{name}: was not trained" for name in extra]
    for name, value in observed.tensors.items():
        if name not in found:
            lines.append(f"{name}: not there")
        elif digest(found[name]) != value:
            lines.append(f"{name}: other values")
    for name, value in observed.scalings.items():
        if name in scaled and scaled[name] != value:
            lines.append(f"{name}: scaling {scaled[name]}, was trained with {value}")
    return lines


@torch.no_grad()
def compare(model, observed):
    """A :class:`Layer` for each layer whose calls were kept, computed by ``model``, as it was read back on the CPU."""
    model.eval()
    found, layers = dict(_layers(model)), []
    for name, calls in observed.calls.items():
        if name not in found:  # said by differences
            continue
        module = found[name]
        stock = [_rows(module(*args, **kwargs)) for args, kwargs, _ in calls]
        with _in_fp32(module.parameters(), module.buffers()):
            exact = [_rows(module(*_float(args), **_float(kwargs))) for args, kwargs, _ in calls]
        layers.append(Layer(name, *(relative_error(rows, exact) for rows in ([rows for *_, rows in calls], stock))))
    return layers


@torch.no_grad()
def logits(model, prompts):
    """Logits of a model for lists of token ids: (tokens, vocabulary) fp32 on the CPU for each."""
    model.eval()
    rows = (torch.tensor([ids], device=next(model.parameters()).device) for ids in prompts)
    return [model(input_ids=ids).logits[0].float().cpu() for ids in rows]


def logits_in_fp32(model, prompts):
    """:func:`logits` of ``model`` in fp32, of which each decoder layer is in fp32 only while it computes."""
    blocks = repeated_layers(model).values()
    inside = {id(tensor) for block in blocks for tensor in (*block.parameters(), *block.buffers())}
    outside = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in inside]
    hooks, within = [], {}

    def enter(block, args):
        within[block] = _in_fp32(block.parameters(), block.buffers())
        within[block].__enter__()

    def leave(block, args, output):
        within.pop(block).__exit__(None, None, None)

    try:
        for block in blocks:
            hooks += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave, always_call=True)]
        with _in_fp32(outside):
            return logits(model, prompts)
    finally:
        for hook in hooks:
            hook.remove()


def check_memory(model):
    """MemoryError if there is no room for a layer in fp32, its W + BA, and what is outside of all layers, in fp32."""
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in repeated_layers(model).values()]
    outside = sum(parameter.numel() for parameter in model.parameters()) - sum(sizes)
    need = 12 * max(sizes) + 4 * outside
    if need > (have := available_memory()):
        raise MemoryError(f"a layer in fp32 needs {need / 1e9:.1f} GB, {have / 1e9:.1f} GB are free")


def relative_error(got, want):
    """Relative L2 error of all of a list of tensors together."""
    squares = [
        ((a.double() - b.double()).square().sum(), b.double().square().sum()) for a, b in zip(got, want, strict=True)
    ]
    error, size = (sum(column).item() for column in zip(*squares, strict=True))
    return (error / size) ** 0.5 if size else error**0.5


def token_errors(got, want):
    """The median over all tokens of the relative L2 error of their logits, and the share with the same first choice."""
    pairs = [pair for a, b in zip(got, want, strict=True) for pair in zip(a, b, strict=True)]
    errors = [((a - b).norm() / b.norm()).item() for a, b in pairs]
    return statistics.median(errors), statistics.fmean(bool(a.argmax() == b.argmax()) for a, b in pairs)


def digest(tensor):
    """SHA-256 of a tensor's values. bf16 and fp32 tensors of the same values have the same: PEFT loads both in fp32."""
    return hashlib.sha256(tensor.detach().float().cpu().flatten().view(torch.uint8).numpy()).hexdigest()


def scalings(model):
    """LoRA's scaling of every adapted layer: ``{name: {adapter: value}}``."""
    return {name: dict(module.scaling) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _layers(model):
    """Adapted layers and modules of routed experts by name, without those inside of another one of them."""
    found = {}
    for name, module in model.named_modules():
        inside = name.split(".base_layer")[0] in found
        if (isinstance(module, BaseTunerLayer) or is_experts(module)) and not inside:
            found[name] = module
    return found.items()


def _spread(layers):
    """Those of at most LAYERS decoder layers, spread evenly from the first to the last."""
    layers = list(layers)
    numbers = list(dict.fromkeys(layer_of(name) for name, _ in layers))
    if len(numbers) > LAYERS:
        numbers = [numbers[i * (len(numbers) - 1) // (LAYERS - 1)] for i in range(LAYERS)]
    return [(name, module) for name, module in layers if layer_of(name) in numbers]


@contextlib.contextmanager
def _in_fp32(*tensors):
    """The values of parameters and buffers as fp32 within."""
    kept = [(tensor, tensor.data) for some in tensors for tensor in some if tensor.is_floating_point()]
    try:
        for tensor, data in kept:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


def _on_cpu(values):
    return _each(values, lambda tensor: tensor.detach().cpu().clone())


def _float(values):
    return _each(values, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)


def _rows(output):
    return output.detach().reshape(-1, output.shape[-1])


def _each(values, function):
    """A tuple or dict with ``function`` of each tensor in it."""
    if isinstance(values, dict):
        return {name: function(value) if isinstance(value, torch.Tensor) else value for name, value in values.items()}
    return tuple(function(value) if isinstance(value, torch.Tensor) else value for value in values)
