"""transformers' common tests of models, from its source distribution, on our tiny models of eight families.

The source distribution holds ``tests/test_modeling_common.py`` but neither the tests of each family nor two classes
that it takes from other files: those of export and of ``generate``. Empty ones stand in their place here, so none of
their tests run. run.py starts this from the unpacked distribution, whose ``tests`` is the package below.
"""

import sys
import types
import unittest

import torch
import transformers
from support import models

_ABSENT = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
for module, name in _ABSENT.items():
    package = f"tests.{module.partition('.')[0]}"
    sys.modules[package] = types.ModuleType(package)
    sys.modules[f"tests.{module}"] = types.ModuleType(f"tests.{module}")
    setattr(sys.modules[f"tests.{module}"], name, type(name, (), {}))

from tests import test_modeling_common as common  # noqa: E402


class _ModelTester:
    """What the common tests ask of a family: a config, inputs and their sizes."""

    is_training, batch_size, seq_length = True, 3, 7

    def __init__(self, family):
        self.family = family
        config = self.get_config()
        self.hidden_size, self.num_hidden_layers = config.hidden_size, config.num_hidden_layers
        self.num_attention_heads, self.vocab_size = config.num_attention_heads, config.vocab_size

    def get_config(self):
        # Mixtral's own default is None, with which tests of its rotary embedding do not work
        heads = {"head_dim": 16} if self.family == "mixtral" else {}
        return models.tiny_config(self.family, **heads)

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        ids, mask = common.ids_tensor(shape, self.vocab_size), common.random_attention_mask(shape)
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


def _classes(family):
    """The base model of the family and those with a head that it has."""
    kinds = (
        transformers.MODEL_MAPPING,
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    )
    config = type(models.tiny_config(family))
    return tuple(kind[config] for kind in kinds if config in kind)


class _Common(common.ModelTesterMixin, common.GenerationTesterMixin):
    # as transformers' own tests of these families say it: an expert that no token chose has no gradient
    test_all_params_have_gradient = False

    def setUp(self):
        torch.manual_seed(0)
        self.model_tester = _ModelTester(self.family)


for family in models.FAMILIES:
    name = f"Test_{family}"
    members = {"family": family, "all_model_classes": _classes(family), "__module__": __name__}
    globals()[name] = type(name, (_Common, unittest.TestCase), members)
