"""Numbers of threads: the operator uses all threads, stock torch a fixed number during a training run.

The operator's results have the same bits on any number of threads. Those of stock torch on a CPU do not: each operation
of several fine-tuning runs was repeated with the same inputs on 1, 2, 3, 4 and 7 threads (torch 2.13), and the bits of
these depended on the number of threads:

- Matrix products whose sum is split over idle threads, in fp32 (MKL) and bf16 (oneDNN). LoRA's gradients at width 256
  are such products from about 1,000 tokens on. On Intel processors ``MKL_CBWR=AVX2,STRICT``, set before torch is
  imported, makes the fp32 products independent of the number. For bf16 no setting does:
  ``torch.use_deterministic_algorithms`` and ``torch.backends.mkldnn.deterministic`` have no effect on it.
- Softmax's backward, in eager attention and in SDPA where the heads of keys and values differ in size: one thread gives
  other bits than several threads do. Fused attention gives the same bits on all numbers, forward and backward.
- The weight gradient of layer_norm, the backward of silu, and ``index_put`` with accumulation.
- Sums and means of a whole tensor of more than 32,768 elements. Norms, and so gradient clipping, give the same bits.

In an ordinary run of the built-in model, two of 74 kinds of operations were affected, softmax's
backward and sums; the others were affected in runs of larger sizes.

So a run is repeatable only with the same number of stock threads, as with the same seed. :func:`stock_threads` sets
that number while a run trains.
"""

import contextlib
import os

import torch

VARIABLE = "KTLIB_THREADS"
SMALL_MODEL_THREADS, LARGE_MODEL_THREADS = 1, 16
LARGE_HIDDEN_SIZE = 1024
MAX_THREADS = 8192  # Linux supports no more CPUs


def operator_threads():
    """Number of threads of the operator: the environment variable ``KTLIB_THREADS``, else torch's number.

    Raises:
        ValueError: the variable is no whole number from 1 to 8192.
    """
    given = os.environ.get(VARIABLE)
    if not given:
        return torch.get_num_threads()
    if not given.isdecimal() or len(given) > len(str(MAX_THREADS)) or not 1 <= int(given) <= MAX_THREADS:
        raise ValueError(
            f"{VARIABLE}={given}: needs a whole number from 1 to {MAX_THREADS}; unset it to get torch's number"
        )
    return int(given)


def default_threads(config):
    """Default number of stock torch's threads for a model with this transformers ``config``.

    The number depends on the model's size alone, so that every machine gives the same bits. Small layers are as fast on
    one thread. 16 threads speed up large layers on common machines, and cost little on machines with fewer cores.
    """
    is_large = config.get_text_config().hidden_size >= LARGE_HIDDEN_SIZE
    return LARGE_MODEL_THREADS if is_large else SMALL_MODEL_THREADS


@contextlib.contextmanager
def stock_threads(count):
    """In the block stock torch uses ``count`` threads; the operator uses as many as before the block."""
    before, variable, operator = torch.get_num_threads(), os.environ.get(VARIABLE), operator_threads()
    os.environ[VARIABLE] = str(operator)
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        os.environ.pop(VARIABLE, None)
        if variable is not None:
            os.environ[VARIABLE] = variable
