"""The guard for a Trainer: it stops before the adapter is spoilt, keeps what was good, and leaves a report."""

import json
import warnings

import pytest
import torch
from peft import PeftModel
from support.models import tiny_model
from test_trace import EXPERTS, NAN, experts_of, hooks
from test_trainer import make_trainer
from transformers import Trainer, TrainerCallback, TrainingArguments

from ktlib.diagnosis.audit import audit
from ktlib.diagnosis.trainer_guard import StopOnNonFinite
from ktlib.files.ownership import write_text


class Poison(TrainerCallback):
    """Spoils something at the beginning of the given step (counted from 1)."""

    def __init__(self, step, spoil):
        self.step, self.spoil = step, spoil

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                self.spoil(model)


def spoil_weight(model):
    experts_of(model).down_proj.fill_(NAN)


def spoil_gradient(model):
    parameter = next(p for name, p in model.named_parameters() if "q_proj.lora_B" in name)
    parameter.register_hook(lambda gradient: gradient * NAN)


def spoil_parameter(model):
    next(p for name, p in model.named_parameters() if "q_proj.lora_B" in name).view(-1)[0] = NAN


def train(directory, spoil, callback=None, step=5):
    trainer = make_trainer(directory, steps=12, save_steps=2)
    trainer.add_callback(Poison(step, spoil))
    if callback is not None:
        trainer.add_callback(callback)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return trainer, [str(w.message) for w in caught if "training stopped" in str(w.message)]


def test_without_the_callback_the_adapter_is_lost(tmp_path):
    trainer, _ = train(tmp_path, spoil_weight)
    result = audit(trainer.model)
    assert not result.clean and sum(row.nan for row in result.rows) > 10
    assert not audit(tmp_path / "checkpoint-12").clean


@pytest.mark.parametrize("trace", [True, False])
@pytest.mark.parametrize("spoil", [spoil_weight, spoil_gradient])
def test_callback_stops_before_the_adapter_is_spoilt(tmp_path, spoil, trace):
    callback = StopOnNonFinite(trace=trace)
    trainer, messages = train(tmp_path, spoil, callback)
    assert trainer.state.global_step == 5 and len(messages) == 1 and "step 5" in messages[0]
    assert audit(trainer.model).clean
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    good = audit(tmp_path / "last_good", trainer.model.get_base_model().config)
    assert good.clean, str(good)
    loaded = PeftModel.from_pretrained(tiny_model("deepseek_v2", "ktlib", dtype=torch.bfloat16), tmp_path / "last_good")
    assert all(p.isfinite().all() for p in loaded.parameters())
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    assert report["step"] == 5
    if trace and spoil is spoil_weight:
        assert report["module"] == EXPERTS and report["stage"] == "down" and report["expert"] is not None
        assert "down_proj[" in (tmp_path / "nonfinite.txt").read_text()
    else:
        assert report["phase"] == "gradient" and ("q_proj" in report["module"] or spoil is spoil_weight)


def test_callback_lets_no_evaluation_follow(tmp_path):
    trainer = make_trainer(tmp_path, steps=6)
    trainer.eval_dataset, trainer.args.eval_strategy, trainer.args.eval_steps = trainer.train_dataset, "steps", 1
    trainer.add_callback(Poison(3, spoil_gradient))
    trainer.add_callback(StopOnNonFinite())
    with pytest.warns(UserWarning, match="stopped in step 3"):
        trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [1, 2]


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_callback_lets_no_checkpoint_follow(tmp_path, strategy):
    """Not even at the end of an epoch, which the bad step is."""
    trainer = make_trainer(tmp_path, steps=6, save_strategy=strategy, save_steps=1)
    trainer.add_callback(Poison(4, spoil_weight))  # two steps are an epoch
    trainer.add_callback(StopOnNonFinite())
    with pytest.warns(UserWarning, match="stopped in step 4"):
        trainer.train()
    steps = {"steps": [1, 2, 3], "epoch": [2]}[strategy]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in steps]


def test_callback_reports_the_first_finding(tmp_path):
    """A bad adapter makes bad activations, gradients and, after the step, parameters: one report, of the first."""
    callback = StopOnNonFinite()
    _, messages = train(tmp_path, spoil_parameter, callback)
    assert len(messages) == 1 and callback.finding.phase == "forward"
    assert json.loads((tmp_path / "nonfinite.json").read_text())["phase"] == "forward"


def test_callback_begins_anew_with_every_training(tmp_path):
    callback = StopOnNonFinite()
    trainer, _ = train(tmp_path / "bad", spoil_weight, callback)
    assert trainer.state.global_step == 5 and callback.finding is not None
    good = make_trainer(tmp_path / "good", steps=2)
    before = hooks(good.model)
    good.add_callback(callback)

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    good.add_callback(Interrupt)
    with pytest.raises(KeyboardInterrupt):
        good.train()
    good.remove_callback(Interrupt)
    (tmp_path / "good").mkdir(exist_ok=True)
    write_text(tmp_path / "good/nonfinite.txt", "of an earlier training", replace=True)
    good.train()
    assert good.state.global_step == 2 and callback.finding is None
    assert hooks(good.model) == before and not (tmp_path / "good/nonfinite.txt").exists()


class Plain(torch.nn.Module):
    """What a Trainer also takes: a module that is no transformers model."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x):
        return {"loss": self.layer(x).sum() * NAN}


@pytest.mark.parametrize("trace", [True, False])
def test_callback_on_a_module_that_cannot_save_itself(tmp_path, trace):
    arguments = TrainingArguments(tmp_path, max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
    callback, model = StopOnNonFinite(trace=trace, folder=tmp_path / "report"), Plain()
    trainer = Trainer(model, arguments, train_dataset=[{"x": torch.ones(2)}] * 4, callbacks=[callback])
    with pytest.warns(UserWarning, match="stopped in step 1, checkpoints on disk are from before"):
        trainer.train()
    assert callback.finding.phase == ("loss" if trace else "gradient")
    assert all(p.isfinite().all() for p in model.parameters())
    assert sorted(path.name for path in (tmp_path / "report").glob("[!.]*")) == ["nonfinite.json", "nonfinite.txt"]


def test_callback_sees_a_parameter_that_an_optimizer_step_spoilt(tmp_path):
    class AfterGradients(Poison):
        on_step_begin = TrainerCallback.on_step_begin

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step + 1 == self.step:
                with torch.no_grad():
                    self.spoil(model)

    trainer = make_trainer(tmp_path, steps=6, save_steps=2)
    callback = StopOnNonFinite()
    trainer.add_callback(callback)
    trainer.add_callback(AfterGradients(4, spoil_parameter))
    with pytest.warns(UserWarning, match="step 4, checkpoints on disk are from before"):
        trainer.train()
    assert callback.finding.phase == "parameter" and "q_proj.lora_B" in callback.finding.module
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert audit(tmp_path / "checkpoint-2").clean and not (tmp_path / "last_good").exists()


def test_callback_changes_nothing_in_a_good_run(tmp_path):
    plain, guarded = make_trainer(tmp_path / "a", steps=3), make_trainer(tmp_path / "b", steps=3)
    before = hooks(guarded.model)
    guarded.add_callback(StopOnNonFinite())
    plain.train(), guarded.train()
    for (name, want), (_, got) in zip(plain.model.named_parameters(), guarded.model.named_parameters(), strict=True):
        assert torch.equal(want, got), name
    assert hooks(guarded.model) == before and not (tmp_path / "b/nonfinite.txt").exists()
