"""A pytest plugin that puts ktlib in the place of transformers' experts and of PEFT's adapters on them.

Load it with ``-p plugin`` and this folder on PYTHONPATH, into a run of tests that know nothing of ktlib. Then

- models with routed experts take the experts implementation "ktlib" unless a test names another;
- expert weights that would be fp32 are bf16, which the operator takes; fp16 stays, and transformers computes it;
- every LoraConfig has ktlib's adapters for expert parameters, as one from ``ktlib.lora_config`` has;
- models that the tests name on the hub are replaced by tiny random ones of the same classes, made here: hub.py;
- tests of ``--differences FILE`` (JSON: regular expression of test ids -> reason) have to fail. One that passes fails
  the run, so that the list says what is true;
- the run fails if the operator was never called, since then the tests would say nothing about ktlib.
"""

import functools
import json
import re
from collections import Counter
from pathlib import Path

import hub
import peft
import pytest
import torch
import transformers

from ktlib import _kernels
from ktlib.integrations.peft_lora import _wrap
from ktlib.integrations.transformers_experts import IMPLEMENTATION, WEIGHT_NAMES, is_experts


def pytest_addoption(parser):
    parser.addoption("--differences", metavar="FILE", help="tests that have to fail with ktlib in place, and why")


def pytest_configure(config):
    config.pluginmanager.register(_Calls())
    config.add_cleanup(hub.replace())
    _default_to_ktlib()
    _keep_expert_weights_in_bf16()
    _give_every_lora_config_our_adapters()


def _default_to_ktlib():
    stock = transformers.PreTrainedModel.get_correct_experts_implementation

    @functools.wraps(stock)
    def ours_if_none_is_named(self, requested):
        if requested is None and self._can_set_experts_implementation():
            requested = IMPLEMENTATION
        return stock(self, requested)

    transformers.PreTrainedModel.get_correct_experts_implementation = ours_if_none_is_named


def _keep_expert_weights_in_bf16():
    """After construction and loading, and after moves and casts, which all go by ``_apply``."""
    post_init = transformers.PreTrainedModel.post_init
    from_pretrained = transformers.PreTrainedModel.from_pretrained.__func__

    @functools.wraps(post_init)
    def cast_after_construction(self, *args, **kwargs):
        post_init(self, *args, **kwargs)
        _cast(self)

    @functools.wraps(from_pretrained)
    def cast_after_loading(cls, *args, **kwargs):
        loaded = from_pretrained(cls, *args, **kwargs)
        _cast(loaded[0] if isinstance(loaded, tuple) else loaded)  # with output_loading_info it is a pair
        return loaded

    transformers.PreTrainedModel.post_init = cast_after_construction
    transformers.PreTrainedModel.from_pretrained = classmethod(cast_after_loading)


def _cast(model):
    for module in model.modules():
        if is_experts(module):
            type(module)._apply = _apply_and_cast
            _cast_weights(module)


def _apply_and_cast(self, fn, recurse=True):
    torch.nn.Module._apply(self, fn, recurse)
    _cast_weights(self)
    return self


def _cast_weights(experts):
    for name in WEIGHT_NAMES:
        weight = experts._parameters.get(name)
        if weight is not None and weight.dtype == torch.float32:
            weight.data = weight.data.bfloat16()


def _give_every_lora_config_our_adapters():
    stock = peft.LoraConfig.__post_init__

    @functools.wraps(stock)
    def register(self):
        stock(self)
        self._register_custom_module({torch.nn.Module: _wrap})

    peft.LoraConfig.__post_init__ = register


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if (file := config.getoption("--differences")) is None:
        return
    for pattern, reason in json.loads(Path(file).read_text()).items():
        for item in items:
            if re.search(pattern, item.nodeid):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


class _Calls:
    """Counts calls of the operator's kernels, and the tests that made any."""

    def __init__(self):
        self.calls, self.tests = Counter(), 0
        for name in ("forward", "backward"):
            setattr(_kernels, name, self._counted(name, getattr(_kernels, name)))

    def _counted(self, name, kernel):
        @functools.wraps(kernel)
        def counted(*args):
            self.calls[name] += 1
            return kernel(*args)

        return counted

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self):
        before = self.calls.total()
        try:
            return (yield)
        finally:
            self.tests += self.calls.total() > before

    @pytest.hookimpl(trylast=True)  # after transformers' own, which lets a run that collected nothing pass
    def pytest_sessionfinish(self, session, exitstatus):
        passed = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        if passed and not self.calls and not session.config.option.collectonly:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        forward, backward = self.calls["forward"], self.calls["backward"]
        terminalreporter.write_line(
            f"ktlib's operator: {forward} forward and {backward} backward calls, in {self.tests} tests",
            red=not self.calls,
        )
        if not self.calls:
            terminalreporter.write_line("These tests say nothing about ktlib, and count as failed.", red=True)
