"""Finds the first value that stops being finite, in forward or backward, and says where and why.

>>> with trace_nonfinite(model):
...     model(**batch).loss.backward()
NonFinite: forward: model.layers.1.mlp.experts, stage gate, expert 5, token 17 (row 1, position 5) ...

The cheap check is one sum: of each watched module's result, and in backward of the gradient that reaches each decoder
layer. Only if a sum is not finite, the tracer searches for the cause: it runs the layer's backward again and checks the
gradients of every module in it, and it computes routed experts again, stage by stage, from their inputs
(``ktlib.reference.stages``).

Below, ``call`` is the ``(args, kwargs)`` of a call of a module, and ``inputs`` is what a module computed its result
from: in forward its call, in backward the gradients of its outputs.
"""

import contextlib
import math
from dataclasses import asdict, dataclass, field

import torch
from torch.utils._pytree import tree_leaves

from ktlib.integrations.stored_weight import values_of
from ktlib.integrations.transformers_experts import WEIGHT_NAMES, is_experts, layout, other_form
from ktlib.names import bare_name
from ktlib.reference import lora_layout, stages

MAX_NAMES = 1000  # contaminated modules that a tracer lists


class NonFinite(FloatingPointError):
    """Raised at the first non-finite value; ``finding`` says where."""

    def __init__(self, finding):
        super().__init__(str(finding))
        self.finding = finding


@dataclass
class Finding:
    """Where and why finite values became non-finite. ``print`` it for a report; ``to_dict()`` for JSON."""

    phase: str  # "forward", "backward", "gradient", "loss" or "parameter"
    module: str
    stage: str
    reason: str
    expert: int | None = None
    token: int | None = None  # index into the flattened batch
    position: tuple[int, int] | None = None  # (row, column) of the batch
    token_id: int | None = None
    tensors: list[dict] = field(default_factory=list)  # of :func:`describe`

    def __str__(self):
        where = f"{self.phase}: {self.module}, {self.stage}"
        if self.expert is not None:
            where += f", expert {self.expert}"
        if self.token is not None:
            where += f", token {self.token}"
        if self.position is not None:
            where += f" (row {self.position[0]}, position {self.position[1]}, id {self.token_id})"
        rows = [("tensor", "dtype", "device", "shape", "NaN", "Inf", "finite values")]
        for t in self.tensors:
            span = "none" if t["min"] is None else f"{t['min']:.4g} .. {t['max']:.4g}"
            shape = "x".join(map(str, t["shape"])) or "scalar"
            rows.append((t["name"], t["dtype"], t["device"], shape, str(t["nan"]), str(t["inf"]), span))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([where, f"why: {self.reason}", *(table if self.tensors else [])])

    def to_dict(self):
        return asdict(self)


@contextlib.contextmanager
def trace_nonfinite(model, *, stop=True, backward=True):
    """Watch every module of ``model`` for non-finite results while the ``with`` block runs.

    Args:
        model: any transformers or PEFT model.
        stop: raise :class:`NonFinite` at the first non-finite result. False: go on, and list in the :class:`Tracer`
            that the block receives ``causes``, the findings where finite inputs gave a non-finite result, and
            ``contaminated``, the names of modules whose inputs were not finite.
        backward: also watch gradients.

    Results and gradients are the same bits as without the tracer. The inputs of every decoder layer stay in memory
    until its backward, as with gradient checkpointing.
    """
    tracer = Tracer(model, stop, backward)
    tracer.install()
    try:
        yield tracer
    finally:
        tracer.remove()


class Tracer:
    """What ``trace_nonfinite`` yields. ``first`` is the first finding or None."""

    def __init__(self, model, stop=True, backward=True):
        self.model, self.stop, self.backward = model, stop, backward
        self.causes, self.contaminated = [], []
        self._pending, self._handles, self._installed = [], [], True
        self._input_ids, self._labels, self._callback_queued, self._last = None, None, False, None

    @property
    def first(self):
        return self.causes[0] if self.causes else None

    def report(self):
        """All causes as text, and the contaminated modules in the order in which they were reached."""
        if not self.causes:
            return "all values were finite"
        text = "\n\n".join(map(str, self.causes))
        if self.contaminated:
            shown = ", ".join(self.contaminated[:4]) + (" ..." if len(self.contaminated) > 4 else "")
            text += f"\n\ncontaminated afterwards: {len(self.contaminated)} modules ({shown})"
        return text

    # ---- hooks ------------------------------------------------------------------------------------------------------

    def install(self):
        self._handles.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
        blocks = repeated_layers(self.model)
        inside = tuple(f"{name}." for name in blocks)
        for name, module in watched(self.model):
            # Inside a block, one look at the gradient that reaches the block is enough.
            hook = self._after_forward(name, is_experts(module), self.backward and not name.startswith(inside))
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        for name, block in blocks.items():
            self._handles.append(block.register_forward_hook(self._after_block(name), with_kwargs=True))
        self._handles.append(self.model.register_forward_hook(self._end))

    def remove(self):
        for handle in self._handles:
            handle.remove()
        self._handles, self._pending, self._installed = [], [], False

    def _begin(self, module, args, kwargs):
        self._last = None
        self._pending, self._callback_queued = [], False
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, torch.Tensor) and not ids.is_floating_point() and ids.dim() == 2:
            self._input_ids = ids
        self._labels = kwargs.get("labels")

    def _after_forward(self, name, experts, backward):
        def hook(module, args, kwargs, output):
            call, results = (args, kwargs), _floats(output)
            for result in results:
                self._watch(result, "forward", name, module, call, call)
            if experts:
                self.check()
            if backward and results and results[0].grad_fn is not None:
                self._watch_backward(name, module, results[0], args, call if experts else None)

        return hook

    def _after_block(self, name):
        def hook(block, args, kwargs, output):
            self.check()
            result = next((t for t in _floats(output) if t.grad_fn is not None), None)
            if self.backward and result is not None:
                call = _detached((args, kwargs))
                result.register_hook(lambda gradient: self._gradient_reaches(name, block, call, gradient))

        return hook

    def _gradient_reaches(self, name, block, call, gradient):
        """The cheap check of backward. If the gradient is not finite, the block after this one in forward made it."""
        if not self._installed:
            return
        if _is_finite(gradient):
            self._last = name, block, call, gradient
        elif self.causes:
            self._note(name)
        else:
            self._search_last()

    def _search_last(self):
        """Run the last block that a finite gradient reached once more, and check the gradients of its modules."""
        if self._last is None:
            self._add(Finding("backward", "the model", "loss", "its gradient is not finite"))
            return
        from transformers import Cache  # here, because it takes seconds to import

        name, block, (args, kwargs), gradient = self._last
        # The second run must not write into the cache, which is found by its type: its argument's name varies.
        args = [None if isinstance(value, Cache) else value for value in args]
        kwargs = {key: None if isinstance(value, Cache) else value for key, value in kwargs.items()}
        hidden = next(t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.is_floating_point())
        hidden.requires_grad_()
        inner = Tracer(block, stop=False)
        inner._input_ids, self._installed = self._input_ids, False
        inner.install()
        checkpointing = vars(block).get("gradient_checkpointing")
        block.gradient_checkpointing = False
        try:
            with torch.enable_grad():
                torch.autograd.grad(_floats(block(*args, **kwargs))[0], hidden, gradient)
        finally:
            inner.remove()
            del block.gradient_checkpointing
            if checkpointing is not None:
                block.gradient_checkpointing = checkpointing
            self._installed = True
        finding = inner.first or Finding("backward", "", "gradient of input", "made between modules of this layer")
        finding.module = bare_name(f"{name}.{finding.module}".rstrip("."))
        self._add(finding)

    def _watch_backward(self, name, module, result, args, call):
        """Check the gradients of a module's inputs, with hooks on the nodes of the graph: no node is added to it."""
        edges = _edges([t for t in args if isinstance(t, torch.Tensor) and t.requires_grad], result.grad_fn)
        if not edges:
            return
        call = call and _detached(call)
        output_gradients, unvisited_edges, number = [], [len(edges)], result.output_nr

        def take_output_gradient(gradients):
            output_gradients[:] = [gradients[number]] if self._installed and gradients[number] is not None else []

        def input_gradient_hook(index):
            def hook(gradients, _):
                if self._installed and gradients[index] is not None:
                    self._watch(gradients[index], "backward", name, module, tuple(output_gradients), call)
                    if len(self._pending) >= 64:
                        self.check()
                unvisited_edges[0] -= 1
                if not unvisited_edges[0]:
                    output_gradients.clear()

            return hook

        result.grad_fn.register_prehook(take_output_gradient)
        for node, index in edges:
            node.register_hook(input_gradient_hook(index))

    def _end(self, module, args, output):
        self.check()
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if isinstance(loss, torch.Tensor) and not _is_finite(loss):
            self._found([loss], "loss", "the model", module, output.get("logits"))

        result = next((t for t in _floats(output) if t.grad_fn is not None), None)
        if self.backward and result is not None:
            result.register_hook(self._at_the_end_of_backward)

    def _watch(self, result, phase, name, module, inputs, call):
        """Check a result on the CPU at once. Those on a device are checked together, since each check waits for it."""
        total = _sum(result)
        if not total.is_cpu:
            self._pending.append((total, result, phase, name, module, inputs, call))
        elif not math.isfinite(total) and not _is_finite(result):
            self.check()
            self._found([result], phase, name, module, inputs, call)

    def _at_the_end_of_backward(self, _):
        if self._installed and not self._callback_queued:
            self._callback_queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._after_whole_backward)

    def _after_whole_backward(self):
        """Check gradients of parameters: they can be bad although the gradients that reached modules are finite."""
        self._callback_queued = False
        self.check()
        named = [(name, p) for name, p in self.model.named_parameters() if p.grad is not None]
        bad = nonfinite_tensors([(name, p.grad) for name, p in named])
        if bad and not self.causes and self._last and all(name.startswith(f"{self._last[0]}.") for name, _ in bad):
            self._search_last()  # the first block: its input gradient reaches no other block, so was not checked
        for name, gradient in reversed(bad):  # in the order of backward
            self._found([gradient], "gradient", name, None, ())
        self._last = None

    def check(self):
        """Check results on a device whose sums were not checked yet. Done after each decoder layer; may be called."""
        pending, self._pending = self._pending, []
        by_device = {}
        for total, *_ in pending:
            by_device.setdefault(total.device, []).append(total.float())
        if all(bool(torch.stack(totals).isfinite().all()) for totals in by_device.values()):
            return
        for _, result, *origin in pending:
            if not _is_finite(result):
                self._found([result], *origin)

    # ---- after a check failed ---------------------------------------------------------------------------------------

    def _found(self, results, phase, name, module, inputs, call=None):
        name, inputs = bare_name(name), _floats(inputs)
        inputs_bad = not all(map(_is_finite, inputs))
        if self.causes and (inputs_bad or phase in ("loss", "gradient")):
            self._note(name)
            return
        finding = Finding(phase, name, "", "")
        if phase == "gradient":
            finding.stage, finding.reason = "gradient of the parameter", "gradients that reached its module were finite"
            finding.expert = self._expert_of(name, results[0])
        elif phase == "loss":
            finding.stage, finding.reason = "loss", "the logits are " + ("not finite" if inputs_bad else "finite")
        elif is_experts(module):
            self._search_experts(finding, module, inputs, call)
        elif inputs_bad:
            finding.stage = "input" if phase == "forward" else "gradient of output"
            finding.reason = "came in like this from operations between modules; every module before it was finite"
        else:
            finding.stage = "output" if phase == "forward" else "gradient of input"
            bad = [n for n, p in module.named_parameters() if not _is_finite(p)]
            finding.reason = f"{', '.join(bad[:3])} of it not finite" if bad else "its input and parameters are finite"
        self._locate_token(finding, inputs if finding.stage == "input" else results)
        if not (is_experts(module) and finding.tensors and phase == "forward"):
            finding.tensors += _describe_all("input" if phase != "backward" else "gradient of output", inputs)
        finding.tensors += _describe_all("result" if phase != "backward" else "gradient of input", results)
        if isinstance(module, torch.nn.Module) and not is_experts(module) and phase != "loss":
            finding.tensors += [describe(bare_name(n), p) for n, p in module.named_parameters()]
        self._add(finding)

    def _note(self, name):
        if name not in self.contaminated and len(self.contaminated) < MAX_NAMES:
            self.contaminated.append(name)

    def _add(self, finding):
        labels, batch = self._labels, self._input_ids
        from_loss = not self.causes and finding.stage in ("loss", "gradient of output")
        if from_loss and isinstance(labels, torch.Tensor) and not (labels != -100).any():
            finding.module, finding.stage = "the batch", "no trained token: its labels are all -100"
            finding.reason = "the loss is a mean over no tokens, 0 / 0"
            if batch is not None:
                starts = [row[:16].tolist() for row in batch[:4]]
                finding.reason += f"; its {len(batch)} rows begin with the token ids {starts}"
        self.causes.append(finding)
        if self.stop:
            raise NonFinite(finding)

    def _search_experts(self, finding, module, inputs, call):
        gradient = None
        if finding.phase == "backward" and inputs:
            gradient = inputs[0].detach().to(module.down_proj.device).flatten(0, -2)
        layer = experts_arguments(module, *call)
        finding.stage = "output" if finding.phase == "forward" else "gradient of input"
        if layer is None or finding.phase == "backward" and gradient is None:
            finding.reason = "its experts are not of the layout that can be computed stage by stage"
            return
        place = stages.locate(layer, module._apply_gate, gradient)
        finding.tensors += [describe(name, value) for name, value in _operands(layer)]
        if place is None:
            # The masks of the call's dropout are not known here.
            undropped = " without dropout" if call[1].get("lora_dropout") else ""
            finding.reason = (
                "inputs, weights and adapters are finite, and so is the same layer computed again in plain torch"
                f"{undropped}: look for memory (stale or overlapping buffers) in the experts implementation, not for "
                "numerics" + (", unless values are near the end of their range" if undropped else "")
            )
            return
        finding.stage, finding.expert, finding.token, finding.reason = (
            place.stage, place.expert, place.token, place.reason,
        )  # fmt: skip
        finding.tensors.append(describe(f"{place.stage} of the token", place.values))

    def _locate_token(self, finding, tensors):
        batch = self._input_ids
        if finding.token is None and batch is not None and finding.phase in ("forward", "backward"):
            for tensor in tensors:
                if tensor.dim() >= 2 and tensor.shape[:-1].numel() == batch.numel():
                    rows = (~tensor.detach().flatten(0, -2).isfinite()).any(dim=-1).nonzero()
                    finding.token = int(rows[0]) if len(rows) else None
                    break
        if finding.token is not None and batch is not None and finding.token < batch.numel():
            finding.position = divmod(finding.token, batch.shape[1])
            finding.token_id = int(batch.flatten()[finding.token])

    def _expert_of(self, name, gradient):
        """The first expert whose rows (lora_A) or columns (lora_B) of a stacked gradient are not finite."""
        owner = next((m for n, m in self.model.named_modules() if name.startswith(f"{bare_name(n)}.lora_") and n), None)
        weight = owner.get_param() if hasattr(owner, "get_param") else None
        if weight is None or weight.dim() != 3 or gradient.dim() != 2:
            return None
        split = lora_layout.split_b if ".lora_B" in name else lora_layout.split_a
        return int(split(~gradient.isfinite(), len(weight)).flatten(1).any(dim=1).nonzero()[0])


def watched(model):
    """``(name, module)`` whose results are checked: adapted layers, experts, and modules that own parameters.

    Modules inside an adapted layer or inside experts are not watched: they are searched if the result is bad.
    """
    watched_prefixes = ()
    for name, module in model.named_modules():
        if name.startswith(watched_prefixes) or ".lora_" in name:
            continue
        wraps_experts = hasattr(module, "get_base_layer") and is_experts(module.get_base_layer())
        is_adapted = hasattr(module, "base_layer") and not wraps_experts
        if is_experts(module) or is_adapted or next(module.parameters(recurse=False), None) is not None:
            yield name, module
        if is_experts(module) or is_adapted:
            watched_prefixes += (f"{name}.",)


def repeated_layers(model):
    """``{name: module}`` of a model's repeated layers: the members of every ModuleList that is in no other one."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and not name.startswith(tuple(f"{block}." for block in found)):
            found |= {f"{name}.{child}": block for child, block in module.named_children()}
    return found


def experts_arguments(module, args, kwargs):
    """The arguments of ``moe_experts``, on the experts' device, for one call of an experts module, but for its gate.

    None if the experts have no gate or end in a norm.
    """
    if other_form(module) is not None or len(args) < 3:
        return None
    device = module.down_proj.device
    names = ("hidden_states", "top_k_index", "top_k_weights")
    layer = {name: value.detach().to(device) for name, value in zip(names, args, strict=False)}
    layer["hidden_states"] = layer["hidden_states"].flatten(0, -2)
    layer |= {name: values_of(getattr(module, name)) for name in WEIGHT_NAMES}
    layer |= {name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in layout(module).items()}
    for name in ("gate_up_lora", "down_lora"):
        lora = kwargs.get(name)
        layer[name] = lora and (lora[0].detach().to(device), lora[1].detach().to(device), lora[2])
    return layer


def describe(name, tensor):
    """Name, dtype, device, shape, counts of NaN and Inf, and the range of the finite values, as a dict."""
    tensor = tensor.detach()
    finite = tensor[tensor.isfinite()]
    return {
        "name": name,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "device": str(tensor.device),
        "shape": list(tensor.shape),
        "nan": int(tensor.isnan().sum()),
        "inf": int(tensor.isinf().sum()),
        "min": finite.min().item() if finite.numel() else None,
        "max": finite.max().item() if finite.numel() else None,
    }


def _operands(layer):
    for name in ("hidden_states", "top_k_weights", "gate_up_proj", "down_proj"):
        yield name, layer[name]
    for name in ("gate_up_lora", "down_lora"):
        if layer[name] is not None:
            yield f"{name} A", layer[name][0]
            yield f"{name} B", layer[name][1]
    for name in ("gate_up_bias", "down_bias"):
        if layer[name] is not None:
            yield name, layer[name]


def _describe_all(name, tensors):
    return [describe(name, tensor) for tensor in tensors]


def _edges(tensors, root):
    """``(node, index)`` in the autograd graph below ``root`` whose output ``index`` is the gradient of a tensor."""
    targets = {(edge.node, edge.output_nr) for edge in map(torch.autograd.graph.get_gradient_edge, tensors)}
    found, seen, stack = [], {root}, [root] if targets else []
    while stack:
        node = stack.pop()
        for index, edge in enumerate(node.next_functions):
            if edge in targets:
                found.append((node, index))
            elif edge[0] is not None and edge[0] not in seen:
                seen.add(edge[0])
                stack.append(edge[0])
    return found


def _floats(values):
    leaves = [values] if isinstance(values, torch.Tensor) else tree_leaves(values)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel()]


def _detached(values):
    return torch.utils._pytree.tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, values)


def _sum(tensor):
    """A sum that is not finite if any element is not. A sum of finite elements may overflow: callers check for that."""
    tensor = tensor.detach()
    return tensor.sum(dtype=torch.float32) if tensor.dtype == torch.float16 else tensor.sum()


def _is_finite(tensor):
    return math.isfinite(_sum(tensor).item()) or bool(tensor.detach().isfinite().all())


def nonfinite_tensors(named):
    """Those ``(name, tensor)`` of a list that are not finite. If all norms are finite, no tensor is checked itself."""
    by_device = {}
    for _, tensor in named:
        by_device.setdefault(tensor.device, []).append(tensor.detach())
    norms = [torch.stack([n.float() for n in torch._foreach_norm(tensors)]) for tensors in by_device.values()]
    if all(bool(device_norms.isfinite().all()) for device_norms in norms):
        return []
    return [(name, tensor) for name, tensor in named if not _is_finite(tensor)]
