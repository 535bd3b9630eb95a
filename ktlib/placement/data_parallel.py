"""What training on several GPUs, or in several processes, does to a model with pinned experts.

torch's DataParallel (one process, several GPUs) and DistributedDataParallel (a process per GPU) want all of a model on
GPUs, and FSDP and DeepSpeed move all of it there. Pinned experts stay on the CPU, so that one process trains on one
GPU, and several processes train on CPUs.
"""

import functools
import warnings


class DdpIgnores:
    """Names of parameters that DistributedDataParallel leaves alone.

    As the attribute ``_ddp_params_and_buffers_to_ignore`` of what it wraps, which is the first that
    DistributedDataParallel asks for; torch has no other way to set it. PEFT's models pass the question on.

    Raises, when it is asked:
        RuntimeError: parameters of the model are on GPUs.
    """

    def __init__(self, model, names=()):
        self.model, self.names = model, names

    def __iter__(self):
        elsewhere = {str(p.device) for p in self.model.parameters() if p.device.type not in ("cpu", "meta")}
        if elsewhere:
            raise RuntimeError(
                f"{type(self.model).__name__}: data parallel training in processes (torchrun, accelerate launch) with "
                f"pinned experts needs the whole model on the CPU, got parameters on {', '.join(sorted(elsewhere))}; "
                "start the script with python instead, and it trains on one GPU"
            )
        return iter(self.names)


def use_one_gpu(arguments, reason="a model with pinned experts does not train on several"):
    """Let a Trainer with these TrainingArguments train on its first GPU alone, with a warning if there are more."""
    if arguments.n_gpu > 1:
        warnings.warn(
            f"training on {arguments.device}, one of {arguments.n_gpu} visible GPUs, because {reason}; "
            "CUDA_VISIBLE_DEVICES chooses another",
            stacklevel=2,
        )
        arguments._n_gpu = 1  # as Trainer does for a model that lies on several devices


def refuse_sharding(trainer):
    """RuntimeError if a Trainer would hand its model to FSDP or DeepSpeed on a GPU, experts included."""
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
    """From now on transformers' Trainer calls :func:`refuse_sharding` and :func:`use_one_gpu` if its model is pinned.

    Trainer counts the visible GPUs, whatever the model, for its batch size and for DataParallel. Before that it calls
    one public method in which it has its model, given or made with ``model_init``: ``add_callback``. All other models
    are trained as ever. ``is_pinned(model)`` says which is which.
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
