"""How many threads compute what: the operator as many as there are, stock torch in a training run a fixed number.

The operator gives the same bits on any number of threads; stock torch on a CPU does not. Each operation of fine-tuning
runs was repeated with the same inputs on 1, 2, 3, 4 and 7 threads (torch 2.13). Two of the 74 kinds of an ordinary run
of the built-in model gave other bits, the second and the last here; others did at larger sizes:

- matrix products whose sum is split where threads are left over, fp32 (MKL) and bf16 (oneDNN); for LoRA's gradients at
  width 256 from some 1,000 tokens on. ``MKL_CBWR=AVX2,STRICT``, set before torch is imported, ends that in fp32 on
  Intel's processors; in bf16 nothing does (not ``torch.use_deterministic_algorithms``, which has no effect on this, nor
  ``torch.backends.mkldnn.deterministic``).
- softmax's backward, in eager attention and in SDPA's where heads of keys and values differ in size: one thread gives
  other bits than several, which agree. Fused attention, forward and backward, gives the same on all.
- layer_norm's weight gradient, silu's backward, and ``index_put`` that accumulates.
- sums and means of a whole tensor to one number, beyond 32,768 elements. (Norms, hence clipping, give the same bits.)

So the number that stock torch uses belongs to a run like its seed; :func:`stock_threads` holds it while training.
"""

import contextlib
import os

import torch

VARIABLE = "KTLIB_THREADS"
SMALL, LARGE = 1, 16
LARGE_FROM = 1024
MOST = 8192  # as many CPUs as Linux can have


def operator_threads():
    """On how many threads the operator works: ``KTLIB_THREADS``, else torch's number. No result depends on it.

    ValueError if the variable is no whole number from 1 to 8192.
    """
    given = os.environ.get(VARIABLE)
    if not given:
        return torch.get_num_threads()
    if not given.isdecimal() or len(given) > len(str(MOST)) or not 1 <= int(given) <= MOST:
        raise ValueError(f"{VARIABLE}={given}: needs a whole number from 1 to {MOST}; unset it to get torch's number")
    return int(given)


def default_threads(config):
    """Threads of stock torch for a model: by its size, never by the machine, so that bits do not depend on that.

    ``config`` is transformers'. Small layers are as fast on one thread; large ones get as many as help on common
    machines, and lose little where there are fewer cores.
    """
    return LARGE if config.get_text_config().hidden_size >= LARGE_FROM else SMALL


@contextlib.contextmanager
def stock_threads(count):
    """Stock torch works on ``count`` threads within, the operator on as many as before."""
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
