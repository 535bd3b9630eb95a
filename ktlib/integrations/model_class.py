"""The class that a checkpoint's config stands for, and where in it the decoder is.

A composite config holds a ``text_config`` beside those of vision or audio, and its checkpoint belongs to a multimodal
class such as ``Qwen3VLMoeForConditionalGeneration``. The text model's parameters have other names there
(``model.language_model.layers.0`` for ``model.layers.0``), so an adapter fits the published model only if it was made
for that class.
"""

import copy
import inspect

import torch


def model_class(config):
    """The class of transformers that a config's checkpoint belongs to.

    It is the class that ``config.architectures`` names, if that class generates text; else the class that
    transformers' auto classes have for the config, one that takes the whole config before one that takes its
    ``text_config`` alone.

    Raises:
        ValueError: there is no such class.
    """
    import transformers
    from transformers.models import auto

    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    named = [one for one in named if isinstance(one, type) and issubclass(one, transformers.PreTrainedModel)]
    for one in named:
        if one.can_generate():
            return one
    tables = ("MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "MODEL_FOR_MULTIMODAL_LM_MAPPING")
    found = [getattr(auto, table).get(type(config), None) for table in tables]
    found = [one for one in found if isinstance(one, type)]
    if not found:
        raise ValueError(
            f"model: transformers has no class that generates text for a {type(config).__name__} (model_type "
            f"{config.model_type!r}), needs the config of a causal or a multimodal language model"
        )
    return next((one for one in found if one.config_class is type(config)), found[0])


def meta_model(config):
    """The model of a config (of :func:`model_class`) without memory for its weights. The config is left as it is."""
    kind = model_class(config)
    of_class = config if isinstance(config, kind.config_class) else config.get_text_config()
    with torch.device("meta"):
        return kind(copy.deepcopy(of_class))


def untied_state(model):
    """``state_dict()`` without what is tied to another weight, so that files do not hold it."""
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    return {name: value for name, value in model.state_dict().items() if name not in tied}


def check_trainable(model):
    """ValueError if a model (the meta device will do) cannot be trained on text with its routed experts in ktlib."""
    from ktlib.integrations.transformers_experts import is_experts

    kind = type(model)
    if "labels" not in inspect.signature(kind.forward).parameters:
        raise ValueError(
            f"model: {kind.__name__} has no forward pass with a loss of the next token (labels), needs a causal "
            "language model, alone or as a part of a multimodal one"
        )
    for name, module in model.named_modules():
        stacked = [own for own, value in module.named_parameters(recurse=False) if value.dim() == 3]
        if name.rpartition(".")[2] == "experts" and stacked and not is_experts(module):
            raise ValueError(
                f"model: {kind.__name__} computes its routed experts ({type(module).__name__}) outside transformers' "
                "experts interface, through which ktlib reaches them, needs a family that uses that interface"
            )


def decoder_name(model):
    """Name of the module that reads text: "model" in a text model, such as "model.language_model" in a multimodal."""
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)
