"""What training on several GPUs, or in several processes, does to a model with pinned experts.

torch's DataParallel (one process, several GPUs) and DistributedDataParallel (a process per GPU) want all of a model on
GPUs. Pinned experts stay on the CPU, so that one process trains on one GPU, and several processes train on CPUs.
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


@functools.cache
def keep_trainers_on_one_gpu(is_pinned):
    """From now on transformers' Trainer calls :func:`use_one_gpu` for models that ``is_pinned(model)`` says True of.

    Trainer counts the visible GPUs, whatever the model, for its batch size and for DataParallel, before it calls back.
    So two of its public methods, which see the model earlier, ask: one if Trainer is given a model, the other if it
    makes one with ``model_init``. All other models are trained as ever.
    """
    from transformers import Trainer  # here, because it takes a second to import

    def checked(method):
        @functools.wraps(method)
        def and_check(self, *args, **kwargs):
            result = method(self, *args, **kwargs)
            model = self.model if result is None else result
            if model is not None and is_pinned(model):
                use_one_gpu(self.args)
            return result

        return and_check

    Trainer.create_accelerator_and_postprocess = checked(Trainer.create_accelerator_and_postprocess)
    Trainer.call_model_init = checked(Trainer.call_model_init)
