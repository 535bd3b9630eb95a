"""What a parameter is a part of, by its name."""

import re

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


def component(name):
    """The component, one of :data:`COMPONENTS`, of a module or parameter called ``name``."""
    return next(label for label, pattern in COMPONENTS if re.search(pattern, f".{name}."))


def layer_of(name):
    """The number of the layer in a module's or parameter's name, or None."""
    match = re.search(r"\.(?:layers?|blocks?|h)\.(\d+)\.", f".{name}.")
    return int(match[1]) if match else None


def bare_modules(model):
    """``(name, module)`` of the model as it is without adapters: each module once, under its own name."""
    if hasattr(model, "get_base_model"):  # a PeftModel
        model = model.get_base_model()
    for name, module in model.named_modules():
        if ".lora_" in f".{name}" or hasattr(module, "base_layer"):
            continue
        yield name.replace(".base_layer", ""), module
