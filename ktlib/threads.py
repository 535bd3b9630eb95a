"""How many threads compute what: the operator as many as there are, stock torch in a training run a fixed number.

The operator gives the same bits on any number of threads; stock torch on a CPU does not. Re-run with the same inputs on
1 to 16 threads, these operations of a run gave other bits (torch 2.13; the other 70 kinds never did):

- matrix products of larger sizes, fp32 (MKL) and bf16 (oneDNN): the sum is split where threads are left over. In fp32
  ``MKL_CBWR=AVX2,STRICT`` ends that, on Intel's processors and set before torch is imported; for bf16 there is no such
  setting (``torch.use_deterministic_algorithms`` and ``torch.backends.mkldnn.deterministic`` change nothing).
- ``_softmax_backward_data``, in eager attention and in SDPA's: one thread runs another copy of the loop than several
  do, with products and sums fused elsewhere.
- sums of a whole tensor to one number from 32,768 elements on: one part per thread.

So the number that stock torch uses belongs to a run like its seed; :func:`stock_threads` holds it while training.
"""

import contextlib
import os

import torch

VARIABLE = "KTLIB_THREADS"
SMALL, LARGE = 1, 16
LARGE_FROM = 1024


def operator_threads():
    """On how many threads the operator works: ``KTLIB_THREADS``, else torch's number. No result depends on it.

    ValueError if the variable is no whole number >= 1.
    """
    given = os.environ.get(VARIABLE)
    if not given:
        return torch.get_num_threads()
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"{VARIABLE}={given}: needs a whole number >= 1; unset it to get torch's number")
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
        os.environ.pop(VARIABLE)
        if variable is not None:
            os.environ[VARIABLE] = variable
