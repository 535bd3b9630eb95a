"""Small bases and adapters in files, and the numbers of the models that they are."""

import warnings

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from support.family_models import tiny_model as tiny_model_of_class
from support.models import random_adapter, tiny_model, tokens
from transformers import AutoConfig

import ktlib
from ktlib.files import tensor_files
from ktlib.integrations.model_classes import model_class


def load(folder, dtype=torch.float32, experts="eager"):
    cls = model_class(AutoConfig.from_pretrained(folder))
    return cls.from_pretrained(folder, dtype=dtype, experts_implementation=experts).eval()


def save_base(folder, family, dtype=torch.bfloat16, **changes):
    tiny_model(family, dtype=dtype, **changes).save_pretrained(folder)
    return folder


def save_of_class(folder, family, name):
    tiny_model_of_class(family, name, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def save_adapter(folder, base, scale=0.1, **options):
    """A random adapter of all components of a base; returns the live model with stock experts, in fp32."""
    model = load(base)
    options = {"r": 4, "lora_alpha": 6} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights in modules_to_save
        model = random_adapter(get_peft_model(model, ktlib.lora_config(model, **options)), scale=scale)
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    model.save_pretrained(folder)
    return model.eval()


def stored(folder):
    """``{name: tensor}`` of a checkpoint."""
    return {name: value for file in tensor_files.weight_files(folder) for name, value in load_file(file).items()}


@torch.no_grad()
def logits(model):
    torch.manual_seed(0)  # a model of text diffusion begins with noise
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(model, "thinker", model)(input_ids=tokens(), use_cache=False).logits


def merge(*arguments, **options):
    return ktlib.merge_adapter(*arguments, progress=False, **options)
