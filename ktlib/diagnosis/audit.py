"""What is in an adapter: tensors, sizes, NaN, Inf, zeros and dtypes by component and layer, and what is wrong with it.

>>> print(audit("my-adapter"))
component       tensors  parameters  NaN  Inf  zero   max |x|  dtype
routed_experts      104   ...

Reads adapters of stock PEFT, those with one module per expert (transformers 4), and stacks with one tensor per
projection (``experts.gate_lora_a (E, r, in)``, as KTransformers writes them).
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ktlib.diagnosis import lora_pairs
from ktlib.files import tensor_files
from ktlib.files.tensor_files import read_json
from ktlib.integrations.factor_layouts import refuse_other_layouts
from ktlib.integrations.model_class import meta_model
from ktlib.integrations.peft_settings import check_settings, matches, rank_and_alpha, read_settings
from ktlib.names import COMPONENTS, LAYER, PREFIX, bare_modules, bare_name, component, layer_of

CHUNK = 2**24  # elements looked at together: copies of them are what an audit needs in memory


@dataclass
class ComponentAudit:
    """One row: counts of tensors (``tensors``, ``nan``, ``inf``, ``zero``, ``empty``) and of their elements."""

    component: str
    tensors: int = 0
    parameters: int = 0
    nan: int = 0
    inf: int = 0
    zero: int = 0
    empty: int = 0
    max_abs: float = 0.0
    dtypes: Counter = field(default_factory=Counter)

    def add(self, tensor):
        self.tensors += 1
        self.parameters += tensor.numel()
        self.dtypes[str(tensor.dtype).removeprefix("torch.")] += 1
        if tensor.numel() == 0:
            self.empty += 1
            return
        has_nan = has_inf = has_other_than_zero = False
        for values in tensor.detach().flatten().split(CHUNK):
            values = tensor_files.computable(values)
            nan = values.isnan()
            has_nan |= bool(nan.any())
            has_inf |= bool(values.isinf().any())
            has_other_than_zero |= bool(values.any())
            self.max_abs = max(self.max_abs, values.masked_fill(nan, 0).abs().max().item())
        self.nan += has_nan
        self.inf += has_inf
        self.zero += not has_other_than_zero


@dataclass
class Audit:
    """The result of :func:`audit`. ``print`` shows the table; ``result["self_attn"].nan`` is one number of it.

    ``layers`` holds a :class:`ComponentAudit` per ``(layer number or None, component)``; ``problems`` are findings;
    ``notes`` are facts worth knowing that need no repair; ``flagged`` counts the findings per layer and component.
    """

    source: str
    rows: list[ComponentAudit]
    problems: list[str]
    notes: list[str] = field(default_factory=list)
    layers: dict = field(default_factory=dict)
    flagged: Counter = field(default_factory=Counter)

    @property
    def clean(self):
        """No problem found. See :func:`audit` for what is looked for."""
        return not self.problems

    def plot(self, ax=None):
        """Map of layers and components: a cell's number is how many findings its tensors have. Returns the axes."""
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
        text = []
        for first, *numbers, last in lines:
            middle = (number.rjust(width) for number, width in zip(numbers, widths[1:-1], strict=True))
            text.append("  ".join((first.ljust(widths[0]), *middle, last)))
        return "\n".join(text)

    def __str__(self):
        verdict = "clean" if self.clean else "\n".join(f"problem: {problem}" for problem in self.problems)
        notes = "".join(f"note: {note}\n" for note in self.notes)
        return f"{self.source}\n{self.table()}\n{notes}{verdict}"


def audit(source, config=None, trained=None):
    """Count tensors, NaN, Inf, zeros and dtypes of an adapter by component and layer, and look for what is wrong.

    Problems: NaN, Inf or empty tensors; a tensor stored under two names; an A without B; a product ``scaling * B A``
    that leaves the range of bf16 although A and B are finite; B (of an embedding A) all zero in a trained adapter;
    names or shapes other than the architecture's; routed experts that are not, or not certainly, in the layout that
    PEFT has now (see :mod:`ktlib.integrations.factor_layouts`). Of several adapters in a live model each is judged by
    its own settings. Notes: an adapter that was never trained; experts that never received a token.

    Args:
        source: directory of a PEFT adapter (or of any safetensors checkpoint, in one file or several), path of one
            safetensors file, or a live model. Files are read one LoRA pair at a time. Of a model with adapters the
            adapter tensors are counted (those of ``modules_to_save`` too), of a model without, all parameters.
        config: the base model, or its transformers config, to compare an adapter file's names and shapes with. Of a
            live PEFT model the counts are compared, with its own architecture's (see :func:`expected_adapter_counts`).
        trained: whether the adapter was trained. Default: yes, if any B is not zero or a ``trainer_state.json`` beside
            it counts steps.

    Raises:
        FileNotFoundError: nothing there, no weights in the directory, or a shard of the index is missing.
        ValueError: pickled weights (``.bin``: unsafe to read), a damaged safetensors file, an ``adapter_config.json``
            with a field that cannot be used, or a config to compare with and no settings that say what is adapted.
    """
    if isinstance(source, torch.nn.Module):
        label, expected, file = type(source).__name__, _model_counts(source, config), None
        adapters = _model_adapters(source)
    else:
        label, path = str(source), Path(source)
        file = _beside(path, "adapter_config.json")
        settings = read_settings(file)
        if config is not None:
            _check_comparable(settings, path, file)
        expected = None
        in_files = tensor_files.read(*_files(path))
        adapters = {None: (settings, {name: tensor.load for name, tensor in in_files.items()})}
        if trained is None and read_json(_beside(path, "trainer_state.json")).get("global_step"):
            trained = True

    report = Audit(label, [], [])
    rows = {name: ComponentAudit(name) for name, _ in COMPONENTS}
    lora, duplicates, judges = Counter(), {}, []
    for adapter, (settings, tensors) in adapters.items():
        pairs = lora_pairs.Pairs(settings, f"adapter {adapter}: " if len(adapters) > 1 else "")
        judges.append(pairs)
        for name, load in tensors.items():
            part, layer, tensor = component(name), layer_of(name), load()
            cell = report.layers.setdefault((layer, part), ComponentAudit(part))
            before = cell.nan + cell.inf + cell.empty
            rows[part].add(tensor)
            cell.add(tensor)
            report.flagged[layer, part] += cell.nan + cell.inf + cell.empty - before
            lora[part] += lora_pairs.letter(name) is not None
            place, modules = _place(name)
            duplicates.setdefault(place, []).append((name, modules))
            partner = lora_pairs.partner(name)
            if partner in tensors:
                if lora_pairs.letter(name) == "a":
                    pairs.add(name, tensor, tensors[partner](), part, layer)
            elif partner is not None:
                report.problems.append(f"{part}: {name} has no partner {partner}")
                report.flagged[layer, part] += 1
    report.rows = [row for row in rows.values() if row.tensors]

    if not report.rows:
        report.problems.append("no tensors")
    for row in report.rows:
        for kind in ("nan", "inf", "empty"):
            count = getattr(row, kind)
            if count:
                report.problems.append(f"{row.component}: {count} of {row.tensors} tensors {_KINDS[kind]}")
    _add_duplicates(report, [names for places in duplicates.values() if (names := _of_one_tensor(places))])
    for pairs in judges:
        pairs.judge(report, trained)
    if file is not None and config is not None:
        _add_misfits(report, settings, in_files, config, file.name)
    else:
        _add_layouts(report, judges)
    for name, _ in COMPONENTS if expected is not None else ():
        if lora[name] != expected[name]:
            report.problems.append(f"{name}: {lora[name]} LoRA tensors, the architecture has {expected[name]}")
    report.flagged = +report.flagged
    return report


def _check_comparable(settings, path, file):
    """ValueError if an adapter's tensors cannot be compared with those that its settings and a base model ask for."""
    if not settings:
        raise ValueError(f"config: given to compare tensors with, but there is no {file.name} in {path}")
    if (kind := settings.get("peft_type", "LORA")) != "LORA":
        raise ValueError(f"config: given to compare tensors with, but peft_type in {file} is {kind!r}, needs 'LORA'")
    if settings.get("r") is None:
        raise ValueError(f"{file}: has no r, needs a number")
    _check_targets(settings, file)


def _add_misfits(report, settings, tensors, config, where):
    """Names and shapes that an adapter with these settings of the base model does not have, by component and kind."""
    from ktlib.conversion.adapters import config_of, fit

    try:
        _, others, problems, model = fit(
            settings, tensors, config_of(config), where, refuse_other_layouts, other_classes=False
        )
    except ValueError as error:
        report.problems.append(f"routed_experts: {error}")
        return
    problems += _misfits_beside_pairs(settings, others, model)
    grouped = {}
    for problem in problems:
        kind, _, text = problem.partition(": ")
        name = next(word for word in text.split() if "." in word)
        grouped.setdefault(component(name), {}).setdefault(kind, []).append(text)
        report.flagged[layer_of(name), component(name)] += 1
    for part, _ in COMPONENTS:
        for kind, texts in grouped.get(part, {}).items():
            more = " ..." if len(texts) > 3 else ""
            report.problems.append(f"{part}: {kind} ({len(texts)}), as {'; '.join(texts[:3])}{more}")


def _misfits_beside_pairs(settings, others, model):
    """The same of what is no matrix of a linear layer or parameter: embeddings, biases, magnitudes, saved modules."""
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    for name, module in modules.items():
        rank, _ = rank_and_alpha(settings, name)
        if isinstance(module, torch.nn.Embedding) and _is_targeted(name, settings):
            for letter, shape in (("A", (rank, module.num_embeddings)), ("B", (module.embedding_dim, rank))):
                shapes[f"{name}.lora_embedding_{letter}"] = shape
                if f"{PREFIX}{name}.lora_embedding_{letter}" not in others:
                    yield f"missing: lora_embedding_{letter} of {name}"
    for key, tensor in others.items():
        name = bare_name(key)
        place = re.split(r"\.(?:lora_|token_adapter\.)", name)[0]
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            yield f"wrong shape: {key} is {tuple(tensor.shape)}, needs {shapes[name]}"
        elif name not in shapes and (place == name or place not in modules):
            yield f"extra: {key} is not in the base model"


def _add_layouts(report, judges):
    """Factors of expert parameters that PEFT and ktlib would take for something else than what was trained."""
    for pairs in judges:
        try:
            refuse_other_layouts(pairs.settings, pairs.factors, pairs.label.rstrip(": ") or "the adapter")
        except ValueError as error:
            report.problems.append(f"routed_experts: {error}")


def _place(name):
    """Where a tensor is: ``((stack and layer, the name's end from the component on), the modules between the two)``."""
    dotted = f".{name}"
    layer = LAYER.search(dotted)
    pattern = dict(COMPONENTS)[component(name)]
    part = re.search(pattern, f"{dotted}.") if pattern else None
    if not layer or not part or part.start() < layer.end() - 1:
        return name, []
    return (dotted[: layer.end()], dotted[part.start() :]), re.findall(r"[^.]+", dotted[layer.end() : part.start()])


def _of_one_tensor(places):
    """Those names in ``[(name, modules between layer and component)]`` that differ from another by wrappers alone.

    A wrapper adds modules to the way, as in ``mlp.original_moe.shared_experts`` beside ``mlp.shared_experts``. Modules
    of equal structure lie beside each other: ``text_moe.experts`` and ``vision_moe.experts``.
    """

    def leads_through(modules, others):
        rest = iter(others)
        return all(module in rest for module in modules)

    def wrapped(one, other):
        return one is not other and (leads_through(one[1], other[1]) or leads_through(other[1], one[1]))

    return [place[0] for place in places if any(wrapped(place, other) for other in places)]


def _add_duplicates(report, groups):
    for part, _ in COMPONENTS:
        here = [names for names in groups if component(names[0]) == part]
        if here:
            first, second = here[0][:2]
            report.problems.append(f"{part}: {len(here)} tensors are stored under two names, as {first} and {second}")
        for names in here:
            report.flagged[layer_of(names[0]), part] += len(names)


_KINDS = {"nan": "contain NaN", "inf": "contain Inf", "empty": "are empty"}


def expected_adapter_counts(model, config, layout="fused"):
    """LoRA tensors per component that an adapter of this architecture has, counted without PEFT: a Counter.

    Args:
        model: base model (no adapters needed; the meta device will do), or its transformers config.
        config: LoraConfig, or the dict of an ``adapter_config.json``.
        layout: "fused", as stock PEFT stores routed experts: A and B for gate_up_proj and for down_proj; or
            "per_projection": A and B for each of gate, up and down.

    Raises:
        ValueError: an unknown layout, or a config that does not say what is adapted.
    """
    if layout not in ("fused", "per_projection"):
        raise ValueError(f'layout: got {layout!r}, needed "fused" or "per_projection"')
    config = config if isinstance(config, dict) else config.to_dict()
    check_settings(config, "config")
    return _expected_counts(model, config, "config", layout)


def _check_targets(settings, where):
    for name in ("layers_to_transform", "layer_replication"):
        if settings.get(name) is not None:
            raise ValueError(f"{where}: {name} is not supported where tensors are compared with a base model")
    if settings.get("target_modules") is None and settings.get("target_parameters") is None:
        raise ValueError(f"{where}: needs target_modules or target_parameters to compare tensors by, has neither")


def _is_targeted(name, settings):
    return matches(name, settings.get("target_modules")) and not matches(name, settings.get("exclude_modules"))


def _expected_counts(model, config, where, layout="fused"):
    """The same of settings that are checked; ``where`` they are from is named in errors."""
    _check_targets(config, where)
    if not isinstance(model, torch.nn.Module):
        model = meta_model(model)
    counts = Counter()
    for name, module in bare_modules(model):
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            if _is_targeted(name, config):
                counts[component(name)] += 2
        for parameter, value in module.named_parameters(recurse=False):
            if matches(f"{name}.{parameter}", config.get("target_parameters")):
                fused = layout == "per_projection" and value.dim() == 3 and parameter == "gate_up_proj"
                counts[component(name)] += 4 if fused else 2
    return counts


def _model_adapters(model):
    """``{adapter: (settings, {name: function that returns the tensor})}`` of a live model; all is one without any."""
    configs = getattr(model, "peft_config", {})
    adapters = {}
    # with duplicates: a module under two names is adapted, and saved, under both
    for name, p in model.named_parameters(remove_duplicate=False):
        if match := _ADAPTER.search(f".{name}"):
            settings = configs[match[1]].to_dict() if match[1] in configs else {}
            adapters.setdefault(match[1], (settings, {}))[1][name] = p.detach
    return adapters or {None: ({}, {name: p.detach for name, p in model.named_parameters()})}


_ADAPTER = re.compile(r"\.(?:lora_\w+|modules_to_save|trainable_tokens_delta)\.([^.]+)")


def _model_counts(model, config):
    adapters = getattr(model, "peft_config", {})
    if not adapters:
        if config is not None:
            raise ValueError("config: given to compare an adapter's tensor counts, but the model has no adapter")
        return None
    return sum((expected_adapter_counts(config or model, adapter) for adapter in adapters.values()), Counter())


def _beside(path, name):
    return (path if path.is_dir() else path.parent) / name


def _files(path):
    if path.is_file():
        if path.suffix in (".bin", ".pt", ".pth"):
            raise ValueError(f"{path}: {tensor_files.PICKLED}")
        if path.suffix != ".safetensors":
            raise ValueError(f"{path}: needed a .safetensors file or an adapter directory")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or directory")
    return tensor_files.weight_files(path, (tensor_files.ADAPTER, tensor_files.MODEL))
