"""Loading of quantised checkpoints: experts keep their codes, everything else is decoded to bf16.

``from_pretrained`` is shown a checkpoint of bf16 tensors. Where the file has codes and scales, the tensor is a
:class:`~ktlib.integrations.stored_weight.StoredWeight` over them. So no converter of transformers, and no code that
runs after it (PEFT, Trainer), has to know that the checkpoint is quantised: the model that is returned is a bf16 model.

:class:`KtlibQuantizer` is registered for ktlib's own files (``quant_method`` "ktlib"). For the methods of the hub it
takes the place of the quantizer of transformers if the model is loaded with ``experts_implementation="ktlib"``.
"""

import functools

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ktlib.files.tensor_files import OWN_STEMS
from ktlib.integrations.stored_formats import OWN_METHOD, Header, check_served, logical_tensors, settings_of
from ktlib.integrations.stored_weight import StoredWeight
from ktlib.integrations.transformers_experts import IMPLEMENTATION, WEIGHT_NAMES, is_experts, unsupported

# Without ktlib this name is not looked for, so that transformers ends with an error and not with random experts.
INDEX = f"{OWN_STEMS[0]}.safetensors.index.json"


@register_quantization_config(OWN_METHOD)
class KtlibConfig(QuantizationConfigMixin):
    """``quantization_config`` of ktlib's own checkpoints; for those of the hub ``source`` is theirs."""

    def __init__(self, quant_method=OWN_METHOD, source=None, **own):
        self.quant_method = quant_method
        self.settings = source or {"quant_method": quant_method, **own}

    @property
    def is_own(self):
        return self.settings["quant_method"] == OWN_METHOD


@register_quantizer(OWN_METHOD)
class KtlibQuantizer(HfQuantizer):
    """Shows a quantised checkpoint as a bf16 one while it is loaded, and leaves no trace in the model."""

    def validate_environment(self, device_map=None, **kwargs):
        check_served(self.quantization_config.settings)
        if isinstance(device_map, dict) and "disk" in map(str, device_map.values()):
            raise ValueError("device_map: got 'disk' for a quantised checkpoint; its experts are in their files anyway")

    def update_dtype(self, dtype):
        """bf16 where transformers took the dtype of the codes for that of the model."""
        return torch.bfloat16 if dtype is None or dtype.itemsize == 1 else dtype

    def as_weights(self, state_dict, model):
        """``{name: tensor or slice}`` of the checkpoint, in which codes and scales are replaced by bf16 weights."""
        headers = {name: Header.of(tensor) for name, tensor in state_dict.items()}
        matrices = logical_tensors(headers, self.quantization_config.settings)
        # A class that holds (experts, in, out) gets what stacks of outputs as rows would be to it.
        transposed = any(module.is_transposed for module in model.modules() if is_experts(module))
        members = {member for matrix in matrices.values() for member in matrix.members}
        entries = {name: tensor for name, tensor in state_dict.items() if name not in members}
        load = functools.partial(_load, state_dict)
        return entries | {name: _Entry(matrix, load, transposed) for name, matrix in matrices.items()}

    def postprocess_model(self, model, **kwargs):
        """The model is an ordinary bf16 one: what says otherwise is removed."""
        del model.hf_quantizer, model.quantization_method
        model.is_quantized = False
        for config in _configs(model.config):
            for name in ("quantization_config", "transformers_weights"):
                if hasattr(config, name):
                    delattr(config, name)

    def is_serializable(self):
        return False

    @property
    def is_trainable(self):
        return True


class _Entry:
    """A matrix of the checkpoint, or a stack of them, with the methods of a slice of safetensors."""

    def __init__(self, matrix, load, transposed):
        self.matrix, self.load = matrix, load
        self.transposed = transposed and matrix.rows_are_outputs and len(matrix.shape) == 3

    def get_dtype(self):
        return "BF16"

    def get_shape(self):
        *experts, rows, columns = self.matrix.shape
        return [*experts, columns, rows] if self.transposed else [*experts, rows, columns]

    def __getitem__(self, index):
        weight = self.matrix.weight(self.load)
        stored = StoredWeight(weight, self.matrix.name, self.get_shape(), transposed=self.transposed)
        return stored if index is Ellipsis else stored[index]


def _load(state_dict, name):
    return state_dict[name][...]


def decode_others(model, keep_experts):
    """Decode what was loaded as codes and is no expert weight that the operator takes."""
    for module in model.modules():
        takes_codes = keep_experts and is_ours(module) and unsupported(module) is None
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(parameter, StoredWeight):
                continue
            if not (takes_codes and name in WEIGHT_NAMES and parameter.transposed == module.is_transposed):
                values = torch.nn.Parameter(parameter.decoded(), parameter.requires_grad)
                values._is_hf_initialized = True  # transformers initialises weights without this mark
                setattr(module, name, values)


def is_ours(module):
    return is_experts(module) and getattr(module.config, "_experts_implementation", None) == IMPLEMENTATION


def choose_quantizer(stock):
    """``get_hf_quantizer`` that loads quantised checkpoints with :class:`KtlibQuantizer` for ktlib's experts."""

    @functools.wraps(stock)
    def get_hf_quantizer(config, quantization_config, *args, gguf_file=None, **kwargs):
        if any(getattr(c, "_experts_implementation", None) == IMPLEMENTATION for c in _configs(config)):
            if gguf_file is not None:
                raise ValueError(
                    "gguf_file: experts of GGUF files are not computed by ktlib; load the safetensors checkpoint, or "
                    "leave out experts_implementation='ktlib'"
                )
            settings = settings_of(config)
            if settings is not None and not getattr(quantization_config, "dequantize", False):
                if quantization_config is not None:
                    raise ValueError(
                        f"quantization_config: got a {type(quantization_config).__name__} for a checkpoint that is "
                        f"quantised already ({settings.get('quant_method')!r}); leave it out, and ktlib loads the "
                        "experts as they are, or set dequantize=True in it for experts in bf16"
                    )
                check_served(settings)
                config.quantization_config = {"quant_method": OWN_METHOD, "source": settings}
        quantizer, config, device_map = stock(config, quantization_config, *args, gguf_file=gguf_file, **kwargs)
        if isinstance(quantizer, KtlibQuantizer) and quantizer.quantization_config.is_own:
            config.transformers_weights = INDEX
        return quantizer, config, device_map

    return get_hf_quantizer


def _configs(config):
    """A model's config and those of its parts."""
    yield config
    for name in getattr(config, "sub_configs", None) or {}:
        if (part := getattr(config, name, None)) is not None:
            yield from _configs(part)
