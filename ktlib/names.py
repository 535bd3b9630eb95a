"""Names of modules and parameters: what they are a part of, and without what PEFT adds to them."""

import re

PREFIX = "base_model.model."  # of names in a PeftModel and in files of adapters

# Which part of a model a parameter belongs to: the first pattern found in ".name." decides. Names are those of
# transformers and PEFT; add a line here for a family that calls its parts differently.
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

LAYER = re.compile(r"\.(?:layers?|blocks?|h)\.(\d+)\.")  # in f".{name}."


def component(name):
    """The component, one of :data:`COMPONENTS`, of a module or parameter called ``name``."""
    return next(label for label, pattern in COMPONENTS if re.search(pattern, f".{name}."))


def layer_of(name):
    """The number of the layer in a module's or parameter's name, or None."""
    match = LAYER.search(f".{name}.")
    return int(match[1]) if match else None


def first_of(texts, most=6, separator=", "):
    """The first of some texts for an error, and how many more there are."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more


def bare_name(name):
    """A module's or parameter's name as in the bare model, without what PEFT puts before and between its parts."""
    return name.removeprefix(PREFIX).replace(".base_layer", "").replace(".default", "")


def bare_model(model):
    """The model that a PeftModel is around, with the layers of its adapters in it; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def bare_modules(model):
    """``(name, module)`` of the model as it is without adapters: each module once, under its own name."""
    for name, module in bare_model(model).named_modules():
        if ".lora_" in f".{name}" or hasattr(module, "base_layer"):
            continue
        yield name.replace(".base_layer", ""), module
