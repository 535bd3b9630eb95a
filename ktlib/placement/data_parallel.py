"""Refuses or avoids training a model with pinned experts on several GPUs.

torch's DataParallel (one process, several GPUs) and DistributedDataParallel (one process per GPU) need the whole model
on GPUs, and FSDP and DeepSpeed move the whole model to GPUs. Pinned experts stay on the CPU. So a single process trains
on one GPU, and several processes train on CPUs.
"""

import functools
import warnings


class DdpIgnores:
    """The names of parameters that DistributedDataParallel ignores: it neither broadcasts nor synchronises them.

    An instance is the model's attribute ``_ddp_params_and_buffers_to_ignore``; torch has no other way to set the names.
    DistributedDataParallel reads this attribute before anything else, through PEFT's models too. So this is also the
    place where a model with parameters on GPUs is refused.

    Raises, when DistributedDataParallel iterates over it:
        RuntimeError: parameters of the model are on GPUs.
    """

    def __init__(self, model, names=()):
        self.model, self.names = model, names

    def __iter__(self):
        devices = {str(p.device) for p in self.model.parameters() if p.device.type not in ("cpu", "meta")}
        if devices:
            raise RuntimeError(
                f"{type(self.model).__name__}: data parallel training in processes (torchrun, accelerate launch) with "
                f"pinned experts needs the whole model on the CPU, got parameters on {', '.join(sorted(devices))}; "
                "start the script with python instead, and it trains on one GPU"
            )
        return iter(self.names)


def use_one_gpu(arguments, reason="a model with pinned experts does not train on several"):
    """Make a Trainer with these TrainingArguments use its first GPU only, and warn if several are visible."""
    if arguments.n_gpu > 1:
        warnings.warn(
            f"training on {arguments.device}, one of {arguments.n_gpu} visible GPUs, because {reason}; "
            "CUDA_VISIBLE_DEVICES chooses another",
            stacklevel=2,
        )
        arguments._n_gpu = 1  # as Trainer itself does for a model that is spread over several devices


def refuse_sharding(trainer):
    """RuntimeError if a Trainer would let FSDP or DeepSpeed move its model, experts included, to a GPU."""
    used = [
        name
        for name, is_used in (("FSDP", trainer.is_fsdp_enabled), ("DeepSpeed", trainer.is_deepspeed_enabled))
        if is_used
    ]
    if used and trainer.args.device.type != "cpu":
        raise RuntimeError(
            f"{type(trainer.model).__name__}: {used[0]} with pinned experts needs the whole model on the CPU, got "
            f"{trainer.args.device} to train on; start the script with python and without {used[0]} instead, and it "
            "trains on one GPU"
        )


@functools.cache
def check_trainers(is_pinned):
    """Make every later transformers Trainer whose model is pinned call :func:`refuse_sharding` and :func:`use_one_gpu`.

    Trainer takes the number of visible GPUs for its batch size and for DataParallel, whatever the model. The only
    public method that it calls before that, with its model set (given or from ``model_init``), is ``add_callback``,
    which is patched here. Trainers of models for which ``is_pinned(model)`` is False work as before.
    """
    from transformers import Trainer  # here, because it takes a second to import

    add_callback = Trainer.add_callback

    @functools.wraps(add_callback)
    def check_and_add(self, *args, **kwargs):
        if is_pinned(self.model):
            refuse_sharding(self)
            use_one_gpu(self.args)
        return add_callback(self, *args, **kwargs)

    Trainer.add_callback = check_and_add
