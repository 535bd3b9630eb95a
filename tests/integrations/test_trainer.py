"""Stock transformers.Trainer, no subclass, no hook: it trains, saves, resumes."""

import ast
import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from support.models import tiny_model, tokens
from transformers import Trainer, TrainingArguments

from ktlib.diagnosis.audit import audit
from ktlib.integrations import peft_lora
from ktlib.integrations.peft_lora import ParamWrapper, factor_adapters, lora_config

SOURCES = sorted(Path(peft_lora.__file__).parent.glob("*.py"))


def make_trainer(directory, steps=12, **arguments):
    model = tiny_model("deepseek_v2", "ktlib", dtype=torch.bfloat16)
    torch.manual_seed(7)
    model = get_peft_model(model, lora_config(model, r=4))
    rows = [{"input_ids": row, "labels": row} for row in tokens(16, 12)]
    options = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 2e-2, "max_steps": steps,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_steps": 6, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return Trainer(model, TrainingArguments(directory, **{**options, **arguments}), train_dataset=rows)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    trainer = make_trainer(directory)
    trainer.train()
    return trainer, directory


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.compatible("the stock Trainer")
def test_stock_trainer_trains(trained):
    trainer, _ = trained
    assert type(trainer) is Trainer
    history = losses(trainer)
    assert len(history) == 12 and history[-1] < 0.7 * history[0]
    moved = [p for name, p in trainer.model.named_parameters() if ".experts." in name and "lora_B" in name]
    assert len(moved) == 2 and all(p.detach().abs().max() > 1e-3 for p in moved), "expert adapters did not train"


def test_trained_adapter_is_finite_and_complete(trained):
    trainer, directory = trained
    result = audit(directory / "checkpoint-12", trainer.model.get_base_model().config)
    assert result.clean, str(result)
    assert {row.component: row.tensors for row in result.rows} == {
        "self_attn": 16, "shared_experts": 6, "routed_experts": 4, "dense_mlp": 6,
    }  # fmt: skip
    assert sum(row.zero for row in result.rows) == 0


@pytest.mark.compatible("the stock Trainer")
def test_resumes_from_a_checkpoint(trained, tmp_path):
    trainer, directory = trained
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(directory / "checkpoint-6"))
    assert losses(resumed) == losses(trainer)
    wanted = dict(trainer.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
    assert any(isinstance(module, ParamWrapper) for module in resumed.model.modules())


@pytest.mark.compatible("the stock Trainer")
def test_saved_checkpoint_gives_the_trained_model(trained):
    trainer, directory = trained
    base = tiny_model("deepseek_v2", "ktlib", dtype=torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, directory / "checkpoint-12").eval()
    assert factor_adapters(loaded) == 2 + 6
    assert torch.equal(loaded(tokens()).logits, trainer.model.eval()(tokens()).logits)
    assert "ktlib" not in json.dumps(loaded.peft_config["default"].to_dict(), default=str)


@pytest.mark.compatible("the stock Trainer")
def test_checkpointing_trains_the_same(trained, tmp_path):
    trainer, _ = trained
    other = make_trainer(tmp_path, steps=3, gradient_checkpointing=True)
    other.train()
    assert losses(other) == losses(trainer)[:3]


def overrides(tree):
    """Private methods of subclasses of a Trainer, and private attributes assigned to one."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("Trainer") for base in node.bases):
            found += [f"{node.name}.{f.name}" for f in node.body if isinstance(f, ast.FunctionDef) and f.name[0] == "_"]
        targets = node.targets if isinstance(node, ast.Assign) else []
        found += [
            ast.unparse(target)
            for target in targets
            if isinstance(target, ast.Attribute) and target.attr[0] == "_"
            if "trainer" in ast.unparse(target.value).lower()
        ]
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr" and node.args:
            found += [ast.unparse(node)] if "trainer" in ast.unparse(node.args[0]).lower() else []
    return found


def test_no_private_trainer_method_is_overridden():
    assert len(SOURCES) > 5
    assert {str(path): overrides(ast.parse(path.read_text())) for path in SOURCES} == {
        str(path): [] for path in SOURCES
    }
    # and at run time, whatever the sources look like
    for name, value in vars(transformers.Trainer).items():
        if callable(value) and hasattr(value, "__module__"):
            assert not value.__module__.startswith("ktlib"), name


@pytest.mark.parametrize(
    "source",
    [
        "class T(transformers.Trainer):\n    def _maybe_log_save_evaluate(self): pass",
        "Trainer._inner_training_loop = f",
        "setattr(trainer, '_save', f)",
    ],
)
def test_the_check_finds_overrides(source):
    assert len(overrides(ast.parse(source))) == 1
