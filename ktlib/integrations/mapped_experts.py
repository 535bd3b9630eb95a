"""Checkpoints with one tensor per expert, used where they lie in their files.

transformers stacks such tensors when it loads a model (``MergeModulelist``, then ``Concatenate`` of gates and ups): a
copy of all experts. For models with ``experts_implementation="ktlib"`` the op here takes the place of
``MergeModulelist``. It returns the tensors as a :class:`~ktlib.integrations.stored_weight.StoredWeight`; everything
else of loading and saving is stock. Quantised tensors come as such weights already (quantised_checkpoints.py).
"""

import dataclasses
import functools

import torch
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    SplitModulelist,
    WeightConverter,
)

from ktlib.integrations.quantised_checkpoints import KtlibQuantizer, choose_quantizer, decode_others, is_ours
from ktlib.integrations.stored_weight import StoredWeight
from ktlib.integrations.transformers_experts import WEIGHT_NAMES, layout, unsupported
from ktlib.operator.weight import Weight


def install(modeling_utils):
    """Let ``from_pretrained`` (its module is ``modeling_utils``) convert expert weights with :class:`KeepExperts`.

    A model of which modules go to other devices or to disk is loaded as ever, since accelerate moves such weights to
    and fro: the experts of a quantised one are decoded and stacked.
    """
    stock = modeling_utils.convert_and_load_state_dict_in_model

    @functools.wraps(stock)
    def with_mapped_experts(model, state_dict, load_config, *args, **kwargs):
        quantizer = load_config.hf_quantizer
        if quantised := isinstance(quantizer, KtlibQuantizer):
            state_dict = quantizer.as_weights(state_dict, model)
            load_config = dataclasses.replace(load_config, hf_quantizer=None)
        devices = {str(device).partition(":")[0] for device in (load_config.device_map or {"": "cpu"}).values()}
        on_cpu = devices == {"cpu"}
        if load_config.hf_quantizer is None and on_cpu and any(map(is_ours, model.modules())):
            for conversion in load_config.weight_mapping or ():
                if isinstance(conversion, WeightConverter) and _stacks_experts(conversion.operations):
                    conversion.operations = [KeepExperts(), *conversion.operations[1:]]
        result = stock(model, state_dict, load_config, *args, **kwargs)
        if quantised:
            decode_others(model, keep_experts=on_cpu)
            _save_stacks_decoded(model)
        return result

    modeling_utils.convert_and_load_state_dict_in_model = with_mapped_experts
    modeling_utils.get_hf_quantizer = choose_quantizer(modeling_utils.get_hf_quantizer)


def _save_stacks_decoded(model):
    """Let saving decode expert weights that no conversion of the loading made, as of files with stacks of codes."""
    used = [op for conversion in model._weight_conversions for op in getattr(conversion, "operations", ())]
    if not any(isinstance(op, KeepExperts) for op in used):
        names = [f"experts.{name}" for name in WEIGHT_NAMES]
        model._weight_conversions += [WeightConverter([name], [name], [Decode()]) for name in names]


class Decode(ConversionOps):
    """Makes a plain tensor of a :class:`StoredWeight`."""

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        (tensors,) = input_dict.values()
        (tensor,) = tensors if isinstance(tensors, list) else [tensors]
        return {target_patterns[0]: tensor.decoded() if isinstance(tensor, StoredWeight) else tensor}

    @property
    def reverse_op(self):
        return self


def _stacks_experts(operations):
    """Whether the ops stack one tensor per expert, and gates on ups, and do nothing else (as for quantised files)."""
    kinds = [type(operation) for operation in operations]
    dims = [getattr(operation, "dim", None) for operation in operations]
    return (kinds, dims) in (([MergeModulelist], [0]), ([MergeModulelist, Concatenate], [0, 1]))


class KeepExperts(MergeModulelist):
    """``MergeModulelist`` that does not stack the experts of a module that the operator computes.

    It stacks as stock does what is neither quantised nor a bf16 matrix in memory of a file: other dtypes that were
    converted, weights on a GPU, shards of several processes.
    """

    def convert(self, input_dict, source_patterns, target_patterns, full_layer_name=None, model=None, **kwargs):
        weights = {pattern: _weight(tensors) for pattern, tensors in input_dict.items()}
        if None in weights.values() or not _takes_lists(model, full_layer_name):
            return super().convert(input_dict, source_patterns, target_patterns)
        input_dict.clear()
        return {
            self.get_target_pattern(len(weights), pattern, target_patterns): StoredWeight(weight, full_layer_name)
            for pattern, weight in weights.items()
        }

    @property
    def reverse_op(self):
        return SplitExperts(self.dim)


class SplitExperts(SplitModulelist):
    """``SplitModulelist``, for saving, that returns plain tensors: those of the checkpoint's files."""

    def convert(self, *args, **kwargs):
        split = super().convert(*args, **kwargs)
        return {name: value.readable() if isinstance(value, StoredWeight) else value for name, value in split.items()}

    @property
    def reverse_op(self):
        return KeepExperts(self.dim)


def _takes_lists(model, full_layer_name):
    """Whether the parameter of this name is a weight of experts that the operator computes from such tensors."""
    path, _, name = full_layer_name.rpartition(".")
    module = model.get_submodule(path)
    if not is_ours(module) or name not in WEIGHT_NAMES:
        return False
    flags = layout(module)
    return not flags["transposed"] and not flags["interleaved"] and unsupported(module) is None


def _weight(tensors):
    """The Weight of one tensor an expert; None if they must be stacked."""
    if not isinstance(tensors, list):
        return None
    if all(isinstance(tensor, StoredWeight) for tensor in tensors):
        return Weight.of_experts([tensor.source for tensor in tensors])
    return Weight("bf16", tensors, shape=(len(tensors), *tensors[0].shape)) if _are_in_files(tensors) else None


def _are_in_files(tensors):
    """Whether these are bf16 matrices of one shape in memory that torch did not allocate: that of a file's map."""
    return all(
        not isinstance(tensor, StoredWeight)
        and tensor.dtype == torch.bfloat16
        and tensor.device.type == "cpu"
        and tensor.dim() == 2
        and tensor.shape == tensors[0].shape
        and tensor.numel() > 0
        and tensor.is_contiguous()
        and not tensor.untyped_storage().resizable()
        for tensor in tensors
    )
