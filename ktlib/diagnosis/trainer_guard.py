"""Callbacks for ``transformers.Trainer``: a stop before non-finite values reach the adapter, and a progress bar."""

import json
import warnings
from pathlib import Path

from tqdm.auto import tqdm
from transformers import TrainerCallback

from ktlib.diagnosis.trace import Finding, Tracer, describe, nonfinite_tensors
from ktlib.files import ownership
from ktlib.names import bare_name


class StopOnNonFinite(TrainerCallback):
    """Stops a ``transformers.Trainer`` before a non-finite value reaches the adapter.

    It checks loss and activations (with ``trace``), gradients before each optimizer step, and the trained parameters
    after the step. At the first non-finite value the step is skipped and training stops. No further checkpoint is
    written, so that those on disk stay good. The report is written to ``nonfinite.txt`` and ``nonfinite.json`` in
    ``folder``, and the model from before the step to ``last_good`` in ``folder``. When training begins, reports of an
    earlier training are removed from ``folder``; if ktlib did not write the files of these names, training ends with a
    ValueError before its first step.

    Args:
        trace: watch every module, and name the first that is not finite; False checks gradients and parameters only.
        folder: where report and model are written. Default: the Trainer's ``output_dir``.
    """

    def __init__(self, trace=True, folder=None):
        self.trace, self.folder, self.finding, self._tracer = trace, folder, None, None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.close()  # the Trainer did not call on_train_end if an earlier training ended with an exception
        self.finding = None
        reports = [self._path(args, name) for name in ("nonfinite.txt", "nonfinite.json")]
        ownership.refuse_foreign([*reports, self._path(args, "last_good")], "folder", self._path(args, ""))
        for report in reports:
            ownership.remove(report)
        if self.trace:
            self._tracer = Tracer(model, stop=False)
            self._tracer.install()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        finding = self._tracer.first if self._tracer else None
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.grad is not None]
        finding = finding or _first_bad("gradient", [(name, p.grad) for name, p in trained])
        if finding is not None:
            for _, parameter in trained:
                parameter.grad = None  # an optimizer skips parameters that have no gradient
            self._stop(finding, args, state, control, model)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.finding is None:
            trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            finding = _first_bad("parameter", trained)
            if finding is not None:
                self._stop(finding, args, state, control, model)

    def on_step_end(self, args, state, control, **kwargs):
        if self.finding is not None:
            control.should_training_stop, control.should_save, control.should_evaluate = True, False, False

    on_epoch_end = on_step_end

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self):
        """Take the tracer's hooks off the model."""
        if self._tracer is not None:
            self._tracer.remove()
            self._tracer = None

    def _path(self, args, name):
        return Path(self.folder or args.output_dir) / name

    def _stop(self, finding, args, state, control, model):
        self.finding, step = finding, state.global_step + 1
        self._path(args, "").mkdir(parents=True, exist_ok=True)
        text = self._tracer.report() if self._tracer and self._tracer.first else str(finding)
        report = json.dumps({"step": step, **finding.to_dict()}, indent=1)
        for name, content in (("nonfinite.txt", f"step {step}\n{text}\n"), ("nonfinite.json", report)):
            ownership.write_text(self._path(args, name), content, "folder", replace=True)
        where = "checkpoints on disk are from before"
        if finding.phase != "parameter" and hasattr(model, "save_pretrained"):
            with ownership.new_folder(self._path(args, "last_good"), "folder", replace=True) as folder:
                model.save_pretrained(folder)
            where = "the model before this step is in last_good"
        warnings.warn(f"training stopped in step {step}, {where}. {str(finding).splitlines()[0]}", stacklevel=2)


def _first_bad(phase, named):
    """A :class:`Finding` for the first ``(name, tensor)`` of a list that is not finite; None if all are finite."""
    bad = nonfinite_tensors(named)
    if not bad:
        return None
    stage = "gradient" if phase == "gradient" else "value after the optimizer step"
    name, tensor = bad[0]
    reason = f"the first of {len(bad)} that are not finite, of {len(named)}"
    return Finding(phase, bare_name(name), stage, reason, tensors=[describe(stage, tensor)])


class ShowProgress(TrainerCallback):
    """Shows optimizer steps and the latest loss: a tqdm bar or, with ``lines``, about ten printed lines."""

    def __init__(self, lines=False):
        self.lines, self.bar = lines, None

    def on_train_begin(self, args, state, control, **_):
        if not self.lines:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" not in logs:
            return
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")
        elif state.global_step % max(1, state.max_steps // 10) == 0:
            print(f"step {state.global_step:>5} of {state.max_steps}  loss {float(logs['loss']):.4f}", flush=True)

    def on_train_end(self, args, state, control, **_):
        if self.bar is not None:
            self.bar.close()
