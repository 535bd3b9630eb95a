"""Whether stock transformers and PEFT rebuild the trained model from the saved files.

Three questions are answered, each in its own way:

- Is every trained tensor and every LoRA scaling of the model in the files, under its name? The values are compared bit
  by bit.
- Does each layer compute the same in stock? The stock layer gets the inputs that the layer had in the trained model,
  an experts layer also the trained model's choice of experts. Both outputs are compared with the output of the same
  layer in fp32. The trained layer's error may be about as large as stock's: stock's error in bf16 depends on the model,
  so that no fixed bound fits every model.
- How far are the logits from those of stock in fp32? This distance is reported beside stock's own in bf16, but not
  judged: where two experts are nearly tied for a token, a rounding error sends the token to the other expert. In deep
  models and in models with random weights this happens to many tokens, and logits of right adapters differ by 40 %.

No fp32 copy of the whole model is needed: each layer is in fp32 only while it computes.
"""

import contextlib
import hashlib
import statistics
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from ktlib.diagnosis.trace import repeated_layers
from ktlib.integrations.stored_weight import StoredWeight
from ktlib.integrations.transformers_experts import is_experts
from ktlib.names import component
from ktlib.system.memory import available_memory

LAYERS = 4  # decoder layers that are compared; more would take long, since stock PEFT computes each layer's W + BA
TOKENS = 128  # tokens of each prompt, and about as many of each layer's inputs, that are compared


class Observed(NamedTuple):
    """What :func:`observe` recorded of a trained model: all that :func:`read_back` compares with."""

    tensors: dict  # {name of a trained tensor: digest}
    scalings: dict  # {name of an adapted module: {adapter: LoRA scaling}}
    calls: dict  # {name of a module: [(args, kwargs, output)]}, tensors on the CPU
    prompts: list  # lists of token ids
    logits: list  # (tokens, vocabulary) fp32 for each prompt, on the CPU


class Layer(NamedTuple):
    """Relative L2 errors of an adapted module's output against the same module in fp32, on the same inputs."""

    name: str
    ours: float  # of the trained model
    stock: float

    @property
    def agrees(self):
        """Whether our error is explained by rounding: at most twice stock's error plus one rounding to bf16."""
        return self.ours <= 2 * self.stock + 2**-8


class Report(NamedTuple):
    """What :func:`read_back` found. ``print`` shows it."""

    differences: list  # lines of text: tensors and scalings that differ from the trained ones
    layers: list  # of Layer
    unjudged: str  # why nothing was compared with fp32; "" if everything was
    logits_error: float  # median over tokens of the relative L2 difference between our logits and stock's
    same_choice: float  # share of tokens for which our largest logit and stock's are of the same vocabulary entry
    exact_errors: tuple  # the same medians of our logits and of stock's against stock in fp32; () if not computed

    @property
    def wrong(self):
        """Lines of text about everything that shows a fault of the files or of ktlib; empty if there is none."""
        disagreeing = [
            f"{layer.name}: {layer.ours:.4f} from fp32, stock {layer.stock:.4f}"
            for layer in self.layers
            if not layer.agrees
        ]
        return self.differences + disagreeing

    def __str__(self):
        lines = [f"WRONG: {line}" for line in self.wrong]
        for label in dict.fromkeys(component(layer.name) for layer in self.layers):
            members = [layer for layer in self.layers if component(layer.name) == label]
            ours, stock = max(layer.ours for layer in members), max(layer.stock for layer in members)
            lines.append(
                f"{label:<15} {len(members):>3} layers, largest error against fp32: {ours:.4f}, stock's {stock:.4f}"
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
    """Record an :class:`Observed` of a trained model.

    Args:
        prompts: lists of token ids, of which the first ``TOKENS`` of each are used.
    """
    calls, hooks, prompts = {}, [], [ids[:TOKENS] for ids in prompts]

    def recorder(name):
        def record(module, args, kwargs, output):
            if sum(len(rows) for *_, rows in calls.setdefault(name, [])) < TOKENS:
                calls[name].append((_on_cpu(args), _on_cpu(kwargs), _rows(output).cpu()))

        return record

    try:
        for name, module in _spread(model):
            hooks.append(module.register_forward_hook(recorder(name), with_kwargs=True))
        prompt_logits = logits(model, prompts)
    finally:
        for hook in hooks:
            hook.remove()
    trained = {name: digest(value) for name, value in model.named_parameters() if value.requires_grad}
    return Observed(trained, scalings(model), calls, prompts, prompt_logits)


def read_back(model, observed):
    """A :class:`Report` on ``model``, which stock PEFT loaded from the saved files: "eager" experts, on the CPU."""
    layers, exact_errors, unjudged, stock = [], (), "", logits(model, observed.prompts)
    try:
        check_memory(model)
        layers, exact = compare(model, observed), logits_in_fp32(model, observed.prompts)
        exact_errors = tuple(token_errors(got, exact)[0] for got in (observed.logits, stock))
    except MemoryError as error:
        unjudged = str(error)
    logits_error, same_choice = token_errors(observed.logits, stock)
    return Report(differences(model, observed), layers, unjudged, logits_error, same_choice, exact_errors)


def differences(model, observed):
    """Lines of text about tensors and scalings in which ``model`` differs from the trained model; empty if equal."""
    parameters, model_scalings = dict(model.named_parameters()), scalings(model)
    extra = [name for name in parameters if ".lora_" in name and name not in observed.tensors]
    lines = [f"{name}: was not trained" for name in extra]
    for name, trained in observed.tensors.items():
        if name not in parameters:
            lines.append(f"{name}: not there")
        elif digest(parameters[name]) != trained:
            lines.append(f"{name}: other values")
    for name, trained in observed.scalings.items():
        if name in model_scalings and model_scalings[name] != trained:
            lines.append(f"{name}: scaling {model_scalings[name]}, was trained with {trained}")
    return lines


@torch.no_grad()
def compare(model, observed):
    """A :class:`Layer` for each module whose calls were recorded, from the outputs of the same module of ``model``."""
    model.eval()
    modules, layers = _compared_modules(model), []
    for name, calls in observed.calls.items():
        if name not in modules:  # `differences` reports it
            continue
        module = modules[name]
        stock = [_rows(module(*args, **kwargs)) for args, kwargs, _ in calls]
        with _in_fp32(module.parameters(), module.buffers()):
            exact = [_rows(module(*_float(args), **_float(kwargs))) for args, kwargs, _ in calls]
        ours = [output for _, _, output in calls]
        layers.append(Layer(name, relative_error(ours, exact), relative_error(stock, exact)))
    return layers


@torch.no_grad()
def logits(model, prompts):
    """Logits of a model for lists of token ids: a list of (tokens, vocabulary), fp32 on the CPU."""
    model.eval()
    batches = (torch.tensor([ids], device=next(model.parameters()).device) for ids in prompts)
    return [model(input_ids=batch).logits[0].float().cpu() for batch in batches]


def logits_in_fp32(model, prompts):
    """:func:`logits` of ``model`` in fp32. Each decoder layer is in fp32 only while it computes."""
    blocks = repeated_layers(model).values()
    inside = {id(tensor) for block in blocks for tensor in (*block.parameters(), *block.buffers())}
    outside = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in inside]
    hooks, contexts = [], {}

    def enter(block, args):
        contexts[block] = _in_fp32(block.parameters(), block.buffers())
        contexts[block].__enter__()

    def leave(block, args, output):
        contexts.pop(block).__exit__(None, None, None)

    try:
        for block in blocks:
            hooks += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave, always_call=True)]
        with _in_fp32(outside):
            return logits(model, prompts)
    finally:
        for hook in hooks:
            hook.remove()


def check_memory(model):
    """MemoryError if fp32 copies of the largest decoder layer, its W + BA and what is outside of layers do not fit."""
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in repeated_layers(model).values()]
    outside = sum(parameter.numel() for parameter in model.parameters()) - sum(sizes)
    need = 12 * max(sizes) + 4 * outside
    if need > (have := available_memory()):
        raise MemoryError(f"a layer in fp32 needs {need / 1e9:.1f} GB, {have / 1e9:.1f} GB are free")


def relative_error(got, want):
    """Relative L2 error of two lists of tensors, each list taken as one vector."""
    pairs = [(a.double(), b.double()) for a, b in zip(got, want, strict=True)]
    error = sum((a - b).square().sum() for a, b in pairs).item()
    size = sum(b.square().sum() for _, b in pairs).item()
    return (error / size) ** 0.5 if size else error**0.5


def token_errors(got, want):
    """The median over all tokens of their logits' relative L2 error, and the share of tokens with equal argmax."""
    pairs = [pair for a, b in zip(got, want, strict=True) for pair in zip(a, b, strict=True)]
    errors = [((a - b).norm() / b.norm()).item() for a, b in pairs]
    return statistics.median(errors), statistics.fmean(bool(a.argmax() == b.argmax()) for a, b in pairs)


def digest(tensor):
    """SHA-256 of a tensor's values in fp32, so that dtypes do not matter: PEFT loads bf16 adapters in fp32."""
    return hashlib.sha256(tensor.detach().float().cpu().flatten().view(torch.uint8).numpy()).hexdigest()


def scalings(model):
    """The LoRA scaling of every adapted module: ``{name: {adapter: value}}``."""
    return {name: dict(module.scaling) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _compared_modules(model):
    """``{name: module}`` of adapted layers and experts modules, without those inside another of them."""
    found = {}
    for name, module in model.named_modules():
        inside = name.split(".base_layer")[0] in found
        if (isinstance(module, BaseTunerLayer) or is_experts(module)) and not inside:
            found[name] = module
    return found


def _spread(model):
    """``(name, module)`` of :func:`_compared_modules` in at most LAYERS decoder layers, evenly spread over all."""
    blocks = repeated_layers(model)
    block_of = {
        name: next((block for block in blocks if f"{name}.".startswith(f"{block}.")), None)
        for name in _compared_modules(model)
    }
    chosen = list(dict.fromkeys(block_of.values()))
    if len(chosen) > LAYERS:
        chosen = [chosen[i * (len(chosen) - 1) // (LAYERS - 1)] for i in range(LAYERS)]
    return [(name, module) for name, module in _compared_modules(model).items() if block_of[name] in chosen]


@contextlib.contextmanager
def _in_fp32(*groups):
    """Inside the block, the floating-point tensors of the groups (parameters, buffers) hold their values in fp32."""
    tensors = [tensor for group in groups for tensor in group if tensor.is_floating_point()]
    originals = [(tensor, tensor.data) for tensor in tensors if not isinstance(tensor, StoredWeight)]
    swapped = []
    try:
        for tensor, data in originals:
            tensor.data = data.float()
        for tensor in tensors:
            if isinstance(tensor, StoredWeight):  # which has no values of its own that could be replaced
                swapped.append((tensor, torch.nn.Parameter(tensor.decoded().float(), tensor.requires_grad)))
                torch.utils.swap_tensors(*swapped[-1])
        yield
    finally:
        for pair in swapped:
            torch.utils.swap_tensors(*pair)
        for tensor, data in originals:
            tensor.data = data


def _on_cpu(values):
    return _each(values, lambda tensor: tensor.detach().cpu().clone())


def _float(values):
    return _each(values, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)


def _rows(output):
    return output.detach().reshape(-1, output.shape[-1])


def _each(values, function):
    """A copy of a tuple or dict in which ``function`` has been applied to each tensor."""
    if isinstance(values, dict):
        return {name: function(value) if isinstance(value, torch.Tensor) else value for name, value in values.items()}
    return tuple(function(value) if isinstance(value, torch.Tensor) else value for value in values)
