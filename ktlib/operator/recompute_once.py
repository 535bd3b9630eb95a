"""Activation checkpointing in which the routed experts are computed once: a ``context_fn`` for torch.utils.checkpoint.

``torch.utils.checkpoint.create_selective_checkpoint_contexts`` can do the same, by sending every operator of a layer
through Python, forward and in the recomputation. On a GPU that waits for launches this was a sixth of a step. Here the
one operator that is to be kept looks whether it is being recomputed, and all others run as ever.
"""

import contextvars
from collections import deque

_region = contextvars.ContextVar("region", default=None)  # (results kept, whether this is the recomputation)


def keep_experts():
    """Contexts for one checkpointed region's forward and its recomputation, as ``context_fn`` has to return them.

    What the operator returns in the first is what it returns in the second, in order. The region owns these tensors:
    they go when backward has used them, or with the graph. Backward can run once through it.
    """
    kept = deque()
    return _Region(kept, False), _Region(kept, True)


CHECKPOINTING = {"use_reentrant": False, "context_fn": keep_experts}  # for transformers' gradient_checkpointing_kwargs


class _Region:
    """Entered again for each recomputation, which a ``contextlib.contextmanager`` cannot be."""

    def __init__(self, kept, again):
        self.state = kept, again

    def __enter__(self):
        self.token = _region.set(self.state)

    def __exit__(self, *_):
        _region.reset(self.token)


def once(function, *arguments):
    """``function(*arguments)``, a tuple of tensors without gradient; or in a recomputation what it returned before.

    Raises RuntimeError if there is nothing left to return, or if it was changed in place since.
    """
    kept, again = _region.get() or (None, False)
    if not again:
        results = function(*arguments)
        if kept is not None:
            kept.append([(result.detach(), result._version) for result in results])
        return results
    if not kept:
        raise RuntimeError(
            "experts: checkpointing kept nothing more for this recomputation: a second backward through it "
            "(retain_graph=True), or a forward that differs; use plain checkpointing for that"
        )
    results = kept.popleft()
    if any(result._version != version for result, version in results):
        raise RuntimeError("experts: their output was changed in place after forward; use plain checkpointing for that")
    return tuple(result for result, _ in results)
