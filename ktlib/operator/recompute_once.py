"""Activation checkpointing that computes the routed experts once: a ``context_fn`` for torch.utils.checkpoint.

Everything else in a checkpointed region is recomputed in backward as usual. The operator saves its forward results, and
returns them during the recomputation.

``torch.utils.checkpoint.create_selective_checkpoint_contexts`` can do the same, but sends every operator of a layer
through Python, in forward and in the recomputation. Where a GPU waits for launches, that took a sixth of a step.
"""

import contextvars
from collections import deque

_region = contextvars.ContextVar("region", default=None)  # (saved results, whether this is the recomputation)


def keep_experts():
    """Contexts for one checkpointed region's forward and its recomputation, as ``context_fn`` has to return them.

    During recomputation the operator returns its saved forward results, in the order of the calls. The region owns
    these tensors: they are freed when backward has used them, or with the graph. Only one backward can run through it.
    """
    saved = deque()
    return _Region(saved, False), _Region(saved, True)


CHECKPOINTING = {"use_reentrant": False, "context_fn": keep_experts}  # for transformers' gradient_checkpointing_kwargs


class _Region:
    """A context that can be entered again for each recomputation, unlike one of ``contextlib.contextmanager``."""

    def __init__(self, saved, recomputing):
        self.state = saved, recomputing

    def __enter__(self):
        self.token = _region.set(self.state)

    def __exit__(self, *_):
        _region.reset(self.token)


def compute_or_reuse(function, *arguments):
    """``function(*arguments)``, a tuple of tensors without gradient; or during recomputation its saved results.

    Raises RuntimeError if no saved results are left, or if they were changed in place since forward.
    """
    saved, recomputing = _region.get() or (None, False)
    if not recomputing:
        results = function(*arguments)
        if saved is not None:
            saved.append([(result.detach(), result._version) for result in results])
        return results
    if not saved:
        raise RuntimeError(
            "experts: checkpointing has no saved results left for this recomputation: a second backward through it "
            "(retain_graph=True), or a forward that differs; use plain checkpointing for that"
        )
    results = saved.popleft()
    if any(result._version != version for result, version in results):
        raise RuntimeError("experts: their output was changed in place after forward; use plain checkpointing for that")
    return tuple(result for result, _ in results)
