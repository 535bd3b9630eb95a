"""An adapter of DeepSeek-V2-Lite's structure: live, saved, and as a copy that a test may change."""

import shutil

import pytest
from peft import get_peft_model
from support.audits import LITE
from support.models import tiny_model

from ktlib.integrations.peft_lora import lora_config


@pytest.fixture(scope="session")
def lite():
    model = tiny_model("deepseek_v2", "ktlib", **LITE)
    return get_peft_model(model, lora_config(model, r=8))


@pytest.fixture(scope="session")
def saved(lite, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapter")
    lite.save_pretrained(directory)
    return directory


@pytest.fixture
def adapter(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "adapter")
