"""Every experts class behind transformers' experts interface, found in the installed transformers.

``python tests/support/families.py`` prints the table of families for ktlib/integrations/README.md.
"""

import importlib
import inspect
import re
import warnings
from pathlib import Path

import torch
import transformers

from ktlib.integrations import transformers_experts

HIDDEN, INTERMEDIATE, EXPERTS = 64, 48, 8
_DECORATED = re.compile(r"^@use_experts_implementation\b[^\n]*\n(?:@[^\n]*\n)*class (\w+)", re.MULTILINE)
_SIZES = {
    r"(.*_)?(num|n)(_local|_routed)?_experts|num_local_experts": EXPERTS,
    r"(moe_)?hidden_size": HIDDEN,
    r"(.*_)?intermediate_size": INTERMEDIATE,
    r"moe_latent_size": None,
}
GATES = {"silu": "SiLU", "gelu": "GELU", "gelu_tanh": "GELU (tanh)", "swiglu_oai": "gpt-oss's SwiGLU"}


def discover():
    """``[(family, class name)]``, sorted, by a look at the sources: nothing is imported."""
    models = Path(transformers.__file__).parent / "models"
    return sorted(
        (file.parent.name, name)
        for file in models.glob("*/modeling_*.py")
        for name in _DECORATED.findall(file.read_text())
    )


def experts_class(family, name):
    for file in Path(transformers.__file__).parent.glob(f"models/{family}/modeling_*.py"):
        module = importlib.import_module(f"transformers.models.{family}.{file.stem}")
        if hasattr(module, name):
            return getattr(module, name)
    raise LookupError(f"{family}: no class {name}")


def tiny_configs(cls):
    """The configs that the class may take, with its family's own defaults but tiny sizes."""
    annotated = inspect.signature(cls.__init__).parameters["config"].annotation
    candidates = [annotated] if isinstance(annotated, type) and annotated is not inspect.Parameter.empty else []
    package = Path(inspect.getfile(cls)).parent
    for file in sorted(package.glob("configuration_*.py")):
        module = importlib.import_module(f"transformers.models.{package.name}.{file.stem}")
        candidates += [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    candidates.sort(key=lambda c: "Vision" in c.__name__ or "Audio" in c.__name__)
    for candidate in candidates:
        if not issubclass(candidate, transformers.PreTrainedConfig):
            continue
        config = candidate()
        for attribute in dir(config):
            if isinstance(getattr(candidate, attribute, None), property):
                continue
            for pattern, size in _SIZES.items():
                if re.fullmatch(pattern, attribute):
                    # past the config's own checks: some families have a list of sizes
                    object.__setattr__(config, config.attribute_map.get(attribute, attribute), size)
        yield config


def tiny_experts(family, name, implementation="eager", dtype=torch.float32, seed=0):
    """The experts module with random weights that are exact in bf16; the same for equal seeds."""
    cls, problems = experts_class(family, name), []
    for config in tiny_configs(cls):
        config._experts_implementation = implementation
        try:
            with torch.device("meta"):
                module = cls(config)
        except (AttributeError, TypeError, KeyError) as error:
            problems.append(f"{type(config).__name__}: {error}")
            continue
        sizes = {size for parameter in module.parameters() for size in parameter.shape}
        if sizes <= {HIDDEN, INTERMEDIATE, 2 * INTERMEDIATE, EXPERTS}:
            break
        problems.append(f"{type(config).__name__}: parameters of sizes {sorted(sizes)}")
    else:
        raise LookupError(f"{family}: no config makes a tiny {name}: {'; '.join(problems)}")
    generator = torch.Generator().manual_seed(seed)
    module = cls(config)
    for parameter in module.parameters():  # large enough for the limits of clamped gates to matter
        scale = 4 * parameter.shape[-2 if module.is_transposed else -1] ** -0.5 if parameter.dim() == 3 else 1.0
        values = (torch.randn(parameter.shape, generator=generator) * scale).bfloat16()
        parameter.data = values.to(dtype)
    return module


def describe(family, name):
    """``(gate, weights)`` of a class that the operator serves, in the table's words; else ``(None, reason)``."""
    module = tiny_experts(family, name, "ktlib", torch.bfloat16)
    reason = transformers_experts.unserved(module, torch.zeros(1, HIDDEN))
    if reason is not None:
        return None, reason
    gate, layout = transformers_experts.gate_of(module), transformers_experts.layout(module)
    words = [word for word in ("transposed", "interleaved") if layout[word]]
    words += ["biases"] * (layout["gate_up_bias"] is not None)
    return GATES[gate["gate"]] + (", clamped" if gate["limit"] else ""), ", ".join(words) or "plain"


def table():
    """A table: families by gate and weights, then those that run a stock implementation."""
    rows = {}
    for family, name in discover():
        gate, words = describe(family, name)
        key = (gate is None, gate or f"not served: {words}", words if gate else "")
        rows.setdefault(key, set()).add(family)
    lines = ["| Gate | Weights | Families |", "|---|---|---|"]
    for (_unserved, gate, weights), families in sorted(rows.items(), key=lambda row: (row[0][0], -len(row[1]), row[0])):
        lines.append(f"| {gate} | {weights} | {len(families)}: {', '.join(sorted(families))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(table())
