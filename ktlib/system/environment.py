"""Whether ktlib can work here. If not, one message that says what is wrong and what to do.

The package imports this module first, and the check runs then.
"""

import importlib
import os
import re
import warnings
from importlib.metadata import PackageNotFoundError, requires, version

SEAMS = ("torch", "transformers", "peft")  # what ktlib reaches into; the others are ordinary dependencies
BUILD = "in the repository, run `make setup` or `pip install --no-build-isolation -e .`"


def check():
    """ImportError if ktlib cannot work here, a warning where it does but not well."""
    for package, range_, found in _outside():
        advice = f"pip install '{package}{range_}'"
        if found is None or not _at_least(found, range_):
            raise ImportError(f"ktlib needs {package}{range_}, found {found or 'none'}: {advice}")
        warnings.warn(f"ktlib was not tested with {package} {found}, only with {range_}: {advice}", stacklevel=2)
    import torch  # noqa: F401  its OpenMP runtime comes first

    try:
        kernels = importlib.import_module("ktlib._kernels")
    except ImportError as error:
        raise ImportError(f"ktlib's compiled extension cannot be loaded ({error}): {BUILD}") from None
    if not os.environ.get("KTLIB_ISA") and kernels.select_isa("") == "portable":
        missing = dict(kernels.isas())["avx2"]
        warnings.warn(
            f"ktlib runs its portable kernels, some 30 times slower than the others: avx2 {missing}. Any x86 processor "
            "since about 2015 has it; in a virtual machine, pass the host's CPU through.",
            stacklevel=2,
        )


def _outside():
    """(package, range, installed version or None) of each seam that is outside the range ktlib states."""
    from packaging.specifiers import SpecifierSet  # without packaging.requirements, which costs as much again

    try:
        stated = requires("ktlib") or []
    except PackageNotFoundError:
        raise ImportError(f"ktlib is not installed, only its files are here: {BUILD}") from None
    found = []
    for line in stated:
        name, specifiers = re.match(r"([\w.-]+)([^;]*)", line).groups()
        if name in SEAMS:
            range_ = SpecifierSet(specifiers)
            try:
                installed = version(name)
            except PackageNotFoundError:
                installed = None
            if installed is None or not range_.contains(installed, prereleases=True):
                found.append((name, range_, installed))
    return found


def _at_least(installed, specifiers):
    return all(item.contains(installed, prereleases=True) for item in specifiers if item.operator == ">=")


def unusable_cuda():
    """Why a GPU that torch sees cannot be used (a driver that does not fit, memory in use by others); "" otherwise."""
    import torch

    if not torch.cuda.is_available():
        return ""
    try:
        torch.zeros(1, device="cuda").add_(1).item()
    except (RuntimeError, AssertionError) as error:
        return re.split(r"[\n.]", str(error))[0]
    return ""


def without_cuda():
    """True, after a warning, if there is a GPU that cannot be used: the run then goes on on the CPU."""
    if reason := unusable_cuda():
        warnings.warn(
            f"CUDA is present but unusable ({reason}): running on the CPU. Check `nvidia-smi` and the driver, or set "
            "CUDA_VISIBLE_DEVICES= to leave it alone.",
            stacklevel=2,
        )
    return bool(reason)


def device():
    """Where all of a model but the routed experts is trained: "cuda" if there is a GPU that can be used, or "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() and not unusable_cuda() else "cpu"


check()
