"""The model class that belongs to a checkpoint's config, and the decoder in a model of that class.

A composite config holds a ``text_config`` beside configs for vision or audio, and its checkpoint belongs to a
multimodal class such as ``Qwen3VLMoeForConditionalGeneration``. The text model's parameters have other names in this
class (``model.language_model.layers.0`` for ``model.layers.0``). So an adapter fits the published model only if it was
made for the multimodal class.
"""

import copy
import inspect

import torch


def model_class(config):
    """The class of transformers that a config's checkpoint belongs to.

    This is the class that ``config.architectures`` names, if that class generates text. Otherwise it is a class that
    transformers' auto classes list for the config; one that takes the whole config is preferred to one that takes its
    ``text_config`` only.

    Raises:
        ValueError: there is no such class.
    """
    import transformers
    from transformers.models import auto

    for name in config.architectures or ():
        named = getattr(transformers, name, None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel) and named.can_generate():
            return named
    tables = ("MODEL_FOR_CAUSAL_LM_MAPPING", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "MODEL_FOR_MULTIMODAL_LM_MAPPING")
    listed = [getattr(auto, table).get(type(config), None) for table in tables]
    listed = [candidate for candidate in listed if isinstance(candidate, type)]
    if not listed:
        raise ValueError(
            f"model: transformers has no class that generates text for a {type(config).__name__} (model_type "
            f"{config.model_type!r}), needs the config of a causal or a multimodal language model"
        )
    return next((candidate for candidate in listed if candidate.config_class is type(config)), listed[0])


def meta_model(config):
    """A model of :func:`model_class` with a copy of the config, on the meta device: its weights take no memory."""
    cls = model_class(config)
    class_config = config if isinstance(config, cls.config_class) else config.get_text_config()
    with torch.device("meta"):
        return cls(copy.deepcopy(class_config))


def untied_state(model):
    """``state_dict()`` without weights that are tied to another weight, which files do not hold."""
    tied_embeddings = getattr(model.config, "tie_word_embeddings", False)  # configs of several models may lack it
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if tied_embeddings else set()
    return {name: value for name, value in model.state_dict().items() if name not in tied}


def check_trainable(model):
    """ValueError if a model cannot be trained on text with its routed experts in ktlib; the meta device will do."""
    from ktlib.integrations.transformers_experts import is_experts

    cls = type(model)
    if "labels" not in inspect.signature(cls.forward).parameters:
        raise ValueError(
            f"model: {cls.__name__} has no forward pass with a loss of the next token (labels), needs a causal "
            "language model, alone or as a part of a multimodal one"
        )
    for name, module in model.named_modules():
        stacked = any(value.dim() == 3 for value in module.parameters(recurse=False))
        if name.rpartition(".")[2] == "experts" and stacked and not is_experts(module):
            raise ValueError(
                f"model: {cls.__name__} computes its routed experts ({type(module).__name__}) outside transformers' "
                "experts interface, through which ktlib reaches them, needs a family that uses that interface"
            )


def decoder_name(model):
    """The name of a model's decoder: "model" in a text model, or such as "model.language_model" in a multimodal one."""
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)
