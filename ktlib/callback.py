"""The guard for ``transformers.Trainer``: stops before a non-finite value reaches the adapter."""

import json
import warnings
from pathlib import Path

from transformers import TrainerCallback

from ktlib.trace import Finding, bad_ones, describe, short, trace_nonfinite


class StopOnNonFinite(TrainerCallback):
    """Stops a ``transformers.Trainer`` before a non-finite value reaches the adapter.

    Looks at loss and activations (with ``trace``), at gradients before each optimizer step, and at the trained
    parameters after it. At the first bad one the step is skipped, training stops, no further checkpoint is written (so
    that those on disk stay good), the report goes to ``output_dir/nonfinite.txt`` and ``.json``, and the model as it
    was before the step to ``output_dir/last_good``.

    Args:
        trace: watch every module, and name the first one; False looks at gradients and parameters only.
    """

    def __init__(self, trace=True):
        self.trace, self.finding, self._context, self._tracer = trace, None, None, None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.finding = None
        if self.trace:
            self._context = trace_nonfinite(model, stop=False)
            self._tracer = self._context.__enter__()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        finding = self._tracer.first if self._tracer else None
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.grad is not None]
        finding = finding or _first_bad("gradient", [(name, p.grad) for name, p in trained])
        if finding is not None:
            for _, parameter in trained:
                parameter.grad = None  # an optimizer leaves parameters without gradient alone
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
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = self._tracer = None

    def _stop(self, finding, args, state, control, model):
        self.finding = finding
        step, folder = state.global_step + 1, Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        text = self._tracer.report() if self._tracer and self._tracer.first else str(finding)
        (folder / "nonfinite.txt").write_text(f"step {step}\n{text}\n", encoding="utf-8")
        (folder / "nonfinite.json").write_text(json.dumps({"step": step, **finding.to_dict()}, indent=1))
        kept = "checkpoints on disk are from before"
        if finding.phase != "parameter" and hasattr(model, "save_pretrained"):
            model.save_pretrained(folder / "last_good")
            kept = "the model before this step is in last_good"
        control.should_training_stop = True
        warnings.warn(f"training stopped in step {step}, {kept}. {str(finding).splitlines()[0]}", stacklevel=2)


def _first_bad(phase, named):
    bad = bad_ones(named)
    if not bad:
        return None
    what = "gradient" if phase == "gradient" else "value after the optimizer step"
    name, tensor = bad[0]
    reason = f"the first of {len(bad)} that are not finite, of {len(named)}"
    return Finding(phase, short(name), what, reason, tensors=[describe(what, tensor)])
