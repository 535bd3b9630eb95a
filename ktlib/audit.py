"""What is in an adapter: tensors, sizes, NaN, Inf, zeros and dtypes by component of the model.

>>> print(audit("my-adapter"))
component       tensors  parameters  NaN  Inf  zero   max |x|  dtype
routed_experts      104   ...
"""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

# Which part of a model a parameter belongs to: the first pattern found in ".name." decides. Names are those of
# transformers and PEFT; add a line here for a family that calls its parts differently.
COMPONENTS = (
    ("self_attn", r"\.(self_attn|attention|attn|linear_attn)\."),
    ("shared_experts", r"\.shared_(experts?|mlp)\."),
    ("routed_experts", r"\.experts\."),
    ("router", r"\.(gate|router|shared_expert_gate)\."),
    ("dense_mlp", r"\.(mlp|feed_forward|ffn)\."),
    ("other", r""),
)


def component(name):
    """The component, one of :data:`COMPONENTS`, of a module or parameter called ``name``."""
    return next(label for label, pattern in COMPONENTS if re.search(pattern, f".{name}."))


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
        values = tensor.detach()
        if values.dtype.itemsize == 1:
            values = values.float()  # torch has no reductions in 8-bit floats, no abs of bools
        nan = values.isnan()
        self.nan += bool(nan.any())
        self.inf += bool(values.isinf().any())
        self.zero += not values.any()
        self.max_abs = max(self.max_abs, values.masked_fill(nan, 0).abs().max().item())


@dataclass
class Audit:
    """The result of :func:`audit`. ``print`` shows the table; ``result["self_attn"].nan`` is one number of it."""

    source: str
    rows: list[ComponentAudit]
    problems: list[str]

    @property
    def clean(self):
        """No NaN, no Inf, no empty tensor, and the tensor counts are those of the architecture if it was given."""
        return not self.problems

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
        return f"{self.source}\n{self.table()}\n{verdict}"


def audit(source, config=None):
    """Count tensors, NaN, Inf, zeros and dtypes of an adapter by component.

    Args:
        source: directory of a PEFT adapter (or of any safetensors checkpoint), path of one safetensors file, or a
            live model. Files are read one tensor at a time. Of a model with adapters the adapter tensors are counted,
            of a model without, all parameters.
        config: the base model, or its transformers config, to compare an adapter's tensor counts with (see
            :func:`expected_adapter_counts`). A live PEFT model is compared with itself.

    Raises:
        FileNotFoundError: nothing there, or no weights in the directory.
        ValueError: pickled weights (``.bin``: unsafe to read), a damaged safetensors file, or a config to compare
            with and no ``adapter_config.json``.
    """
    if isinstance(source, torch.nn.Module):
        label, tensors, expected = type(source).__name__, _model_tensors(source), _model_counts(source, config)
    else:
        label, path = str(source), Path(source)
        expected = None if config is None else expected_adapter_counts(config, _adapter_config(path))
        tensors = _file_tensors(path)

    rows = {name: ComponentAudit(name) for name, _ in COMPONENTS}
    lora = Counter()
    for name, tensor in tensors:
        rows[component(name)].add(tensor)
        lora[component(name)] += ".lora_" in name
    rows = [row for row in rows.values() if row.tensors]

    problems = [] if rows else ["no tensors"]
    for row in rows:
        for kind in ("nan", "inf", "empty"):
            count = getattr(row, kind)
            if count:
                problems.append(f"{row.component}: {count} of {row.tensors} tensors {_KINDS[kind]}")
    for name, _ in COMPONENTS if expected is not None else ():
        if lora[name] != expected[name]:
            problems.append(f"{name}: {lora[name]} LoRA tensors, the architecture has {expected[name]}")
    return Audit(label, rows, problems)


_KINDS = {"nan": "contain NaN", "inf": "contain Inf", "empty": "are empty"}


def expected_adapter_counts(model, config, layout="fused"):
    """LoRA tensors per component that an adapter of this architecture has, counted without PEFT: a Counter.

    Args:
        model: base model (no adapters needed; the meta device will do), or its transformers config.
        config: LoraConfig, or the dict of an ``adapter_config.json``.
        layout: "fused", as stock PEFT stores routed experts: A and B for gate_up_proj and for down_proj; or
            "per_projection": A and B for each of gate, up and down.
    """
    if layout not in ("fused", "per_projection"):
        raise ValueError(f'layout: got {layout!r}, needed "fused" or "per_projection"')
    config = config if isinstance(config, dict) else config.to_dict()
    if config.get("layers_to_transform") is not None:
        raise ValueError("config: layers_to_transform is not supported by expected_adapter_counts")
    if not isinstance(model, torch.nn.Module):
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model)
    counts = Counter()
    for name, module in bare_modules(model):
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            if matches(name, config["target_modules"]) and not matches(name, config.get("exclude_modules")):
                counts[component(name)] += 2
        for parameter, value in module.named_parameters(recurse=False):
            if matches(f"{name}.{parameter}", config.get("target_parameters")):
                fused = layout == "per_projection" and value.dim() == 3 and parameter == "gate_up_proj"
                counts[component(name)] += 4 if fused else 2
    return counts


def matches(name, targets):
    """PEFT's rule: a string is a regular expression for the whole name, a list holds names or ends of names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets or ())


def bare_modules(model):
    """``(name, module)`` of the model as it is without adapters: each module once, under its own name."""
    if hasattr(model, "get_base_model"):  # a PeftModel
        model = model.get_base_model()
    for name, module in model.named_modules():
        if ".lora_" in f".{name}" or hasattr(module, "base_layer"):
            continue
        yield name.replace(".base_layer", ""), module


def _model_tensors(model):
    # with duplicates: a module under two names is adapted, and saved, under both
    adapters = [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if ".lora_" in name]
    return adapters or model.named_parameters()


def _model_counts(model, config):
    adapters = getattr(model, "peft_config", {})
    if not adapters:
        if config is not None:
            raise ValueError("config: given to compare an adapter's tensor counts, but the model has no adapter")
        return None
    return sum((expected_adapter_counts(config or model, adapter) for adapter in adapters.values()), Counter())


def _adapter_config(path):
    file = (path if path.is_dir() else path.parent) / "adapter_config.json"
    if not file.is_file():
        raise ValueError(f"config: given to compare tensor counts, but there is no {file}")
    return json.loads(file.read_text())


def _file_tensors(path):
    from safetensors import SafetensorError, safe_open

    if path.is_dir():
        adapter = path / "adapter_model.safetensors"
        files = [adapter] if adapter.is_file() else sorted(path.glob("*.safetensors"))
        pickles = sorted(path.glob("*.bin"))
        if not files and pickles:
            raise ValueError(f"{pickles[0]}: pickled weights can run code when read; save them as safetensors")
        if not files:
            raise FileNotFoundError(f"{path}: no *.safetensors file in this directory")
    elif path.is_file():
        files = [path]
        if path.suffix != ".safetensors":
            raise ValueError(f"{path}: needed a .safetensors file or an adapter directory")
    else:
        raise FileNotFoundError(f"{path}: no such file or directory")
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged or not a safetensors file ({error})") from error
