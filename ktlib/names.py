"""Names of modules and parameters: the component and layer that a name tells, and names without what PEFT adds."""

import re

PREFIX = "base_model.model."  # PEFT puts it before every name in a PeftModel and in an adapter file.

# The components of a model, each with the names of its parameters: the first pattern found in ".name." decides. Names
# are those of transformers and PEFT. A family that names a component differently gets an alternative in its pattern.
COMPONENTS = (
    (
        "self_attn",
        r"\.(self_attn|self_attention|attention|attn|linear_attn|mixer\.[qkvo]_proj)\.(?!(.*\.)?(indexer|router)\.)",
    ),
    ("shared_experts", r"\.shared_(experts?|mlp)\."),
    ("routed_experts", r"\.experts\."),
    # An indexer chooses the tokens that sparse attention looks at. No gradient passes through this choice.
    ("router", r"\.(gate|router|shared_expert_gate|indexer)\."),
    ("dense_mlp", r"\.(mlps?|feed_forward|ffn|mixer\.(up|down)_proj)\."),
    ("other", r""),
)

LAYER = re.compile(r"\.(?:layers?|blocks?|h)\.(\d+)\.")  # is searched for in f".{name}."


def component(name):
    """The component, a label in :data:`COMPONENTS`, of a module or parameter called ``name``."""
    return next(label for label, pattern in COMPONENTS if re.search(pattern, f".{name}."))


def layer_of(name):
    """The number of the layer in a module's or parameter's name, or None."""
    match = LAYER.search(f".{name}.")
    return int(match[1]) if match else None


def first_of(texts, most=6, separator=", "):
    """The first ``most`` of ``texts`` in one string for an error message, and how many more there are."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more


def bare_name(name):
    """The name in the bare model of a module or parameter of a PeftModel: without PEFT's prefix, ``base_layer`` and
    ``default`` (the adapter's name)."""
    return re.sub(r"\.(?:base_layer|default)(?=\.|$)", "", name.removeprefix(PREFIX))


def bare_model(model):
    """The model inside a PeftModel, its adapters still in place; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def bare_modules(model):
    """``(name, module)`` of a model without its adapters: each module once, under its name in the bare model."""
    for name, module in bare_model(model).named_modules():
        if ".lora_" in f".{name}" or hasattr(module, "base_layer"):
            continue
        yield re.sub(r"\.base_layer(?=\.|$)", "", name), module
