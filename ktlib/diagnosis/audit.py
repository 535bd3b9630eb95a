"""The audit of an adapter: counts of tensors, NaN, Inf, zeros and dtypes by component and layer, and its faults.

>>> print(audit("my-adapter"))
component       tensors  parameters  NaN  Inf  zero   max |x|  dtype
routed_experts      104   ...

An adapter may be in stock PEFT's layout, have one module per expert (transformers 4), or have one stacked tensor per
projection (``experts.gate_lora_a (E, r, in)``, as KTransformers writes them).
"""

import functools
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from ktlib.diagnosis import lora_pairs
from ktlib.files import tensor_files
from ktlib.files.tensor_files import read_json
from ktlib.integrations.factor_layouts import refuse_other_layouts
from ktlib.integrations.model_classes import meta_model
from ktlib.integrations.peft_settings import check_settings, matches, rank_and_alpha, read_settings
from ktlib.integrations.stored_formats import Header, check_served, logical_tensors, settings_in_file
from ktlib.integrations.stored_weight import StoredWeight, operand
from ktlib.names import COMPONENTS, LAYER, PREFIX, bare_modules, bare_name, component, layer_of
from ktlib.operator.weight import Weight

CHUNK = 2**24  # elements examined together; an audit needs memory for a few copies of one chunk and one decoded expert


@dataclass
class ComponentAudit:
    """One row of the table: how many tensors a component has, and how many of them are bad.

    ``tensors``, ``nan``, ``inf``, ``zero`` and ``empty`` count tensors; ``parameters`` counts elements.
    """

    component: str
    tensors: int = 0
    parameters: int = 0
    nan: int = 0
    inf: int = 0
    zero: int = 0
    empty: int = 0
    max_abs: float = 0.0
    dtypes: Counter = field(default_factory=Counter)

    @classmethod
    def of(cls, component, tensor):
        """The row of one tensor."""
        row = cls(component, 1, tensor.numel(), dtypes=Counter([_format(tensor)]))
        if tensor.numel() == 0:
            row.empty = 1
            return row
        has_nan = has_inf = has_nonzero = False
        for values in _chunks(tensor):
            values = tensor_files.computable(values)
            nan = values.isnan()
            has_nan |= bool(nan.any())
            has_inf |= bool(values.isinf().any())
            has_nonzero |= bool(values.any())
            row.max_abs = max(row.max_abs, values.masked_fill(nan, 0).abs().max().item())
        row.nan, row.inf, row.zero = int(has_nan), int(has_inf), int(not has_nonzero)
        return row

    def add(self, other):
        """Count the tensors of another row, too."""
        for name in ("tensors", "parameters", "nan", "inf", "zero", "empty"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.max_abs = max(self.max_abs, other.max_abs)
        self.dtypes += other.dtypes


def _format(tensor):
    """The dtype of a tensor, or the format of the codes that a weight is stored as."""
    weight = operand(tensor)
    if isinstance(weight, Weight) and weight.format != "bf16":
        return weight.format
    return str(tensor.dtype).removeprefix("torch.")


def _chunks(tensor):
    """The values of a tensor, in chunks. Of expert weights that lie in a checkpoint's files, one expert is decoded."""
    if isinstance(weight := operand(tensor), Weight):
        experts = (weight.narrow(0, expert, 1).decoded() for expert in range(weight.shape[0]))
    else:
        experts = [tensor.detach()]
    for values in experts:
        yield from values.flatten().split(CHUNK)


@dataclass
class Audit:
    """The result of :func:`audit`. ``print`` shows the table; ``result["self_attn"].nan`` is one number in it.

    ``problems`` are faults, as lines of text; ``notes`` are facts worth knowing that need no repair. ``layers`` holds a
    :class:`ComponentAudit` and ``flagged`` the number of problems, both by ``(layer number or None, component)``.
    """

    source: str
    rows: list[ComponentAudit]
    problems: list[str]
    notes: list[str] = field(default_factory=list)
    layers: dict = field(default_factory=dict)
    flagged: Counter = field(default_factory=Counter)

    @property
    def clean(self):
        """Whether no problem was found."""
        return not self.problems

    def plot(self, ax=None):
        """Map of layers and components: the number in a cell counts problems of its tensors. Returns the axes."""
        from ktlib.plots import audit_map

        return audit_map(self, ax)

    def __getitem__(self, name):
        if name not in dict(COMPONENTS):
            raise KeyError(f"{name!r} is no component; they are {', '.join(dict(COMPONENTS))}")
        return next((row for row in self.rows if row.component == name), ComponentAudit(name))

    def table(self):
        lines = [("component", "tensors", "parameters", "NaN", "Inf", "zero", "max |x|", "dtype")]
        for row in self.rows:
            dtypes = ", ".join(f"{count} {dtype}" for dtype, count in sorted(row.dtypes.items()))
            numbers = (row.tensors, f"{row.parameters:,}", row.nan, row.inf, row.zero, f"{row.max_abs:.4g}")
            lines.append((row.component, *map(str, numbers), dtypes))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = []
        for label, *numbers, dtypes in lines:
            aligned = (number.rjust(width) for number, width in zip(numbers, widths[1:-1], strict=True))
            rows.append("  ".join((label.ljust(widths[0]), *aligned, dtypes)))
        return "\n".join(rows)

    def __str__(self):
        verdict = "clean" if self.clean else "\n".join(f"problem: {problem}" for problem in self.problems)
        notes = "".join(f"note: {note}\n" for note in self.notes)
        return f"{self.source}\n{self.table()}\n{notes}{verdict}"


def audit(source, config=None, trained=None):
    """Count tensors, NaN, Inf, zeros and dtypes of an adapter by component and layer, and look for faults.

    Problems are: tensors that are empty or contain NaN or Inf; a tensor stored under two names; an A without a B, or a
    B without an A; a product ``scaling * B A`` that leaves the range of bf16 although A and B are finite; in a trained
    adapter, a B (for an embedding, an A) that is all zero; names or shapes other than the architecture's; routed
    experts that are not, or not certainly, in PEFT's present layout (see :mod:`ktlib.integrations.factor_layouts`).
    Notes are: an adapter that was never trained; experts that never received a token.

    Args:
        source: the directory of a PEFT adapter (or of any safetensors checkpoint, in one file or several), the path of
            one safetensors file, or a live model. Files are read one LoRA pair at a time. Weights that a checkpoint
            holds as codes and scales count as one tensor, with its decoded values and, as dtype, the format of
            :class:`ktlib.Weight`; codes that ktlib does not decode count as they are, with a note. If a live model has
            adapters, only adapter tensors are counted (``modules_to_save`` included), and each adapter is judged by its
            own settings; if it has none, all parameters are counted.
        config: the base model, or its transformers config. An adapter file's names and shapes are compared with it. For
            a live PEFT model only counts are compared, by default with those of its own architecture (see
            :func:`expected_adapter_counts`).
        trained: whether the adapter was trained. Default: True if any B is not zero, or if a ``trainer_state.json`` in
            the same directory counts steps.

    Raises:
        FileNotFoundError: the path does not exist, the directory has no weights, or a file of the index is missing.
        ValueError: the weights are pickled (``.bin``: unsafe to read); a safetensors file is damaged; a field of
            ``adapter_config.json`` cannot be used; or ``config`` is given, but no settings say what is adapted.
    """
    problems, notes = [], []
    if isinstance(source, torch.nn.Module):
        source_label, expected, file = type(source).__name__, _model_counts(source, config), None
        adapters = _model_adapters(source)
    else:
        source_label, path = str(source), Path(source)
        file = _beside(path, "adapter_config.json")
        settings = read_settings(file)
        if config is not None:
            _check_comparable(settings, path, file)
        expected = None
        in_files = tensor_files.read(*_files(path))
        loads, problems, notes = _decoding(in_files, path)
        adapters = {None: (settings, loads)}
        if trained is None and read_json(_beside(path, "trainer_state.json")).get("global_step"):
            trained = True

    report = Audit(source_label, [], problems, notes)
    rows = {label: ComponentAudit(label) for label, _ in COMPONENTS}
    lora_counts, same_ends, pairs_of_adapters = Counter(), {}, []
    for adapter, (settings, tensors) in adapters.items():
        pairs = lora_pairs.Pairs(settings, f"adapter {adapter}: " if len(adapters) > 1 else "")
        pairs_of_adapters.append(pairs)
        for name, load in tensors.items():
            label, layer, tensor = component(name), layer_of(name), load()
            cell = report.layers.setdefault((layer, label), ComponentAudit(label))
            examined = ComponentAudit.of(label, tensor)
            rows[label].add(examined)
            cell.add(examined)
            report.flagged[layer, label] += examined.nan + examined.inf + examined.empty
            lora_counts[label] += lora_pairs.letter(name) is not None
            named = _Name.split(name)
            same_ends.setdefault((named.layer, named.end), []).append(named)
            partner = lora_pairs.partner(name)
            if partner in tensors:
                if lora_pairs.letter(name) == "a":
                    pairs.add(name, tensor, tensors[partner](), label, layer)
            elif partner is not None:
                report.problems.append(f"{label}: {name} has no partner {partner}")
                report.flagged[layer, label] += 1
    report.rows = [row for row in rows.values() if row.tensors]

    if not report.rows:
        report.problems.append("no tensors")
    for row in report.rows:
        for kind in ("nan", "inf", "empty"):
            count = getattr(row, kind)
            if count:
                report.problems.append(f"{row.component}: {count} of {row.tensors} tensors {_KINDS[kind]}")
    _add_duplicates(report, [names for group in same_ends.values() if (names := _of_one_tensor(group))])
    for pairs in pairs_of_adapters:
        pairs.judge(report, trained)
    if file is not None and config is not None:
        _add_misfits(report, settings, in_files, config, file.name)
    else:
        _add_other_layouts(report, pairs_of_adapters)
    for label, _ in COMPONENTS if expected is not None else ():
        if (count := lora_counts[label]) != expected[label]:
            report.problems.append(f"{label}: {count} LoRA tensors, the architecture has {expected[label]}")
    report.flagged = +report.flagged
    return report


def _decoding(in_files, path):
    """``({name: function that returns the tensor}, problems, notes)``; weights stored as codes have their own names."""
    loads = {name: tensor.load for name, tensor in in_files.items()}
    settings = settings_in_file(_beside(path, "config.json"))
    if settings is None:
        return loads, [], []
    try:
        check_served(settings)
    except ValueError as error:
        return loads, [], [f"tensors are counted as they are stored, not decoded: {error}"]
    try:
        matrices = logical_tensors({name: Header.of(tensor) for name, tensor in in_files.items()}, settings)
    except ValueError as error:
        # the scales of codes in one file may be in another file
        return (loads, [f"weights cannot be decoded: {error}"], []) if path.is_dir() else (loads, [], [str(error)])
    members = {member for matrix in matrices.values() for member in matrix.members}
    plain = {name: load for name, load in loads.items() if name not in members}

    def decoded(matrix):
        return StoredWeight(matrix.weight(lambda member: loads[member]()), matrix.name)

    return plain | {name: functools.partial(decoded, matrix) for name, matrix in matrices.items()}, [], []


def _check_comparable(settings, path, file):
    """ValueError if the settings do not say which tensors the adapter of a base model has."""
    if not settings:
        raise ValueError(f"config: given to compare tensors with, but there is no {file.name} in {path}")
    if (kind := settings.get("peft_type", "LORA")) != "LORA":
        raise ValueError(f"config: given to compare tensors with, but peft_type in {file} is {kind!r}, needs 'LORA'")
    if settings.get("r") is None:
        raise ValueError(f"{file}: has no r, needs a number")
    _check_targets(settings, file)


def _add_misfits(report, settings, tensors, config, where):
    """Add a problem per component and kind: tensors that are missing, extra or of a wrong shape for the base model."""
    from ktlib.conversion.adapters import config_of, fit

    fitted = functools.partial(fit, settings, tensors, config_of(config), where, refuse_other_layouts)
    try:
        pairs, others, problems, model = fitted(other_classes=False)
        fit_by_other_names = not pairs and fitted()[0]
    except ValueError as error:
        report.problems.append(f"routed_experts: {error}")
        return
    if not pairs and problems and any(lora_pairs.letter(name) for name in tensors):
        made_for = settings.get("base_model_name_or_path")
        reason = "an adapter of another model" + (
            f"; base_model_name_or_path in {where} is {made_for!r}" if made_for else ""
        )
        if fit_by_other_names:
            reason = "names are those of another class of the model; ktlib.import_adapter rewrites them"
        report.problems.append(f"no LoRA pair fits {type(model).__name__}: {reason}")
    problems += _misfits_beside_pairs(settings, others, model)
    grouped = {}
    for problem in problems:
        kind, _, text = problem.partition(": ")
        name = next((word for word in text.split() if "." in word), "")
        grouped.setdefault(component(name), {}).setdefault(kind, []).append(text)
        report.flagged[layer_of(name), component(name)] += 1
    for label, _ in COMPONENTS:
        for kind, texts in grouped.get(label, {}).items():
            more = " ..." if len(texts) > 3 else ""
            report.problems.append(f"{label}: {kind} ({len(texts)}), as {'; '.join(texts[:3])}{more}")


def _misfits_beside_pairs(settings, others, model):
    """Misfits of all tensors but LoRA matrices of linear layers and parameters: embeddings, biases, saved modules."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        rank, _ = rank_and_alpha(settings, name)
        if isinstance(module, torch.nn.Embedding) and _is_targeted(name, settings):
            for letter, shape in (("A", (rank, module.num_embeddings)), ("B", (module.embedding_dim, rank))):
                shapes[f"{name}.lora_embedding_{letter}"] = shape
                if f"{PREFIX}{name}.lora_embedding_{letter}" not in others:
                    yield f"missing: lora_embedding_{letter} of {name}"
        if matches(name, settings.get("modules_to_save")):
            for parameter, _ in module.named_parameters():
                if f"{PREFIX}{name}.{parameter}" not in others:
                    yield f"missing: {name}.{parameter} of modules_to_save"
    for key, tensor in others.items():
        name = bare_name(key)
        adapted_module = re.split(r"\.(?:lora_|token_adapter\.)", name)[0]
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            yield f"wrong shape: {key} is {tuple(tensor.shape)}, needs {shapes[name]}"
        elif name not in shapes and (adapted_module == name or adapted_module not in modules):
            yield f"extra: {key} is not in the base model"


def _add_other_layouts(report, pairs_of_adapters):
    """Add a problem for each adapter whose expert factors are not, or not certainly, in PEFT's present layout."""
    for pairs in pairs_of_adapters:
        try:
            refuse_other_layouts(pairs.settings, pairs.factors, pairs.label.rstrip(": ") or "the adapter")
        except ValueError as error:
            report.problems.append(f"routed_experts: {error}")


class _Name(NamedTuple):
    """A tensor's name, split around the modules between layer and component."""

    full: str
    layer: str  # the name up to the layer's number; the full name if it has no layer with a component inside
    modules: list  # names of the modules between layer and component
    end: str  # the name from the component on

    @classmethod
    def split(cls, name):
        dotted = f".{name}"
        layer = LAYER.search(dotted)
        pattern = dict(COMPONENTS)[component(name)]
        match = re.search(pattern, f"{dotted}.") if pattern else None
        if not layer or not match or match.start() < layer.end() - 1:
            return cls(name, name, [], "")
        between = dotted[layer.end() : match.start()]
        return cls(name, dotted[: layer.end()], re.findall(r"[^.]+", between), dotted[match.start() :])


def _of_one_tensor(group):
    """Those full names in a list of :class:`_Name` (of equal layer and end) that differ only by a wrapper's modules.

    A wrapper adds modules to the path: ``mlp.original_moe.shared_experts`` and ``mlp.shared_experts`` are one tensor.
    Two modules of equal structure in one layer are not: ``text_moe.experts`` and ``vision_moe.experts``.
    """

    def is_subsequence(modules, others):
        remaining = iter(others)
        return all(module in remaining for module in modules)

    def wraps(first, second):
        return first is not second and (
            is_subsequence(first.modules, second.modules) or is_subsequence(second.modules, first.modules)
        )

    return [name.full for name in group if any(wraps(name, other) for other in group)]


def _add_duplicates(report, groups):
    """Add a problem per component; ``groups`` is a list of lists of names, each list of one tensor."""
    for label, _ in COMPONENTS:
        found = [names for names in groups if component(names[0]) == label]
        if found:
            first, second = found[0][:2]
            report.problems.append(f"{label}: {len(found)} tensors are stored under two names, as {first} and {second}")
        for names in found:
            report.flagged[layer_of(names[0]), label] += len(names)


_KINDS = {"nan": "contain NaN", "inf": "contain Inf", "empty": "are empty"}


def expected_adapter_counts(model, config, layout="fused"):
    """How many LoRA tensors an adapter of this architecture has by component, counted without PEFT: a Counter.

    Args:
        model: the base model, with or without adapters (the meta device will do), or its transformers config.
        config: a LoraConfig, or the dict of an ``adapter_config.json``.
        layout: "fused", as stock PEFT stores routed experts: an A and a B for gate_up_proj and for down_proj; or
            "per_projection": an A and a B for each of gate, up and down.

    Raises:
        ValueError: the layout is unknown, or the config does not say what is adapted.
    """
    if layout not in ("fused", "per_projection"):
        raise ValueError(f'layout: got {layout!r}, needed "fused" or "per_projection"')
    config = config if isinstance(config, dict) else config.to_dict()
    check_settings(config, "config")
    _check_targets(config, "config")
    if not isinstance(model, torch.nn.Module):
        model = meta_model(model)
    counts = Counter()
    for name, module in bare_modules(model):
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            if _is_targeted(name, config):
                counts[component(name)] += 2
        for parameter, value in module.named_parameters(recurse=False):
            if matches(f"{name}.{parameter}", config.get("target_parameters")):
                apart = layout == "per_projection" and value.dim() == 3 and parameter == "gate_up_proj"
                counts[component(name)] += 4 if apart else 2
    return counts


def _check_targets(settings, where):
    for name in ("layers_to_transform", "layer_replication"):
        if settings.get(name) is not None:
            raise ValueError(f"{where}: {name} is not supported where tensors are compared with a base model")
    if settings.get("target_modules") is None and settings.get("target_parameters") is None:
        raise ValueError(f"{where}: needs target_modules or target_parameters to compare tensors by, has neither")


def _is_targeted(name, settings):
    return matches(name, settings.get("target_modules")) and not matches(name, settings.get("exclude_modules"))


def _model_adapters(model):
    """``{adapter: (settings, {name: function that returns the tensor})}`` of a live model.

    A model without adapters counts as one adapter of all its parameters, called None, without settings.
    """
    configs = getattr(model, "peft_config", {})
    adapters = {}
    # With duplicates, because a module that has two names is adapted, and saved, under both.
    for name, p in model.named_parameters(remove_duplicate=False):
        if match := _ADAPTER.search(f".{name}"):
            settings = configs[match[1]].to_dict() if match[1] in configs else {}
            adapters.setdefault(match[1], (settings, {}))[1][name] = p.detach
    return adapters or {None: ({}, {name: p.detach for name, p in model.named_parameters()})}


_ADAPTER = re.compile(r"\.(?:lora_\w+|modules_to_save|trainable_tokens_delta)\.([^.]+)")


def _model_counts(model, config):
    """The expected LoRA tensors by component of all adapters of a live model; None if the model has no adapter."""
    adapters = getattr(model, "peft_config", {})
    if not adapters:
        if config is not None:
            raise ValueError("config: given to compare an adapter's tensor counts, but the model has no adapter")
        return None
    return sum((expected_adapter_counts(config or model, adapter) for adapter in adapters.values()), Counter())


def _beside(path, name):
    """The path of a file in an adapter's directory, or in the directory of an adapter's file."""
    return (path if path.is_dir() else path.parent) / name


def _files(path):
    """The safetensors files that are a path, or in a directory; ValueError or FileNotFoundError if there are none."""
    if path.is_file():
        if path.suffix in (".bin", ".pt", ".pth"):
            raise ValueError(f"{path}: {tensor_files.PICKLED}")
        if path.suffix != ".safetensors":
            raise ValueError(f"{path}: needed a .safetensors file or an adapter directory")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or directory")
    kinds = (tensor_files.ADAPTER_STEMS, tensor_files.MODEL_STEMS, tensor_files.OWN_STEMS)
    return tensor_files.weight_files(path, kinds)
