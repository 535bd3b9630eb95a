"""Another build of the extension, for ``make sanitize``. Import this before ktlib.

``KTLIB_TEST_EXTENSION`` names it. With ``KTLIB_TEST_PAGES`` what the operator returns, keeps and (in fuzz.py) reads is
beside pages that may not be touched, as its scratch is in the build with ``KTLIB_SANITIZE=pages``.
"""

import ctypes
import importlib.util
import itertools
import mmap
import os
import sys

PAGE = mmap.PAGESIZE
PAGES = bool(os.environ.get("KTLIB_TEST_PAGES"))
_protect = ctypes.CDLL(None, use_errno=True).mprotect
_count = itertools.count()


def guarded(shape, dtype, pin_memory=False):
    """Like torch.empty; ends right before a page that may not be touched, or, every third time, begins after one."""
    import torch

    size = torch.Size(shape).numel() * dtype.itemsize
    if size == 0 or pin_memory:
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=pin_memory)
    pages = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, pages + 2 * PAGE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (begin, begin + PAGE + pages):
        assert _protect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) == 0, os.strerror(ctypes.get_errno())
    offset = PAGE if next(_count) % 3 == 0 else PAGE + pages - size
    return torch.frombuffer(memory, dtype=dtype, offset=offset, count=size // dtype.itemsize).view(shape)


if path := os.environ.get("KTLIB_TEST_EXTENSION"):
    import torch  # noqa: F401  its OpenMP runtime first

    spec = importlib.util.spec_from_file_location("ktlib._kernels", path)
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])

if PAGES:
    from ktlib.operator import registered_op

    registered_op._empty = guarded
