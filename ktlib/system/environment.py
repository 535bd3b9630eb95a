"""Checks that ktlib can work in this environment. A failed check is one message: what is wrong, and what to do.

``ktlib/__init__.py`` imports this module before all others, and :func:`check` runs during that import.
"""

import importlib
import os
import re
import warnings
from importlib.metadata import PackageNotFoundError, requires, version

# ktlib depends on details of these packages, so a version outside the tested range may break it
PINNED_PACKAGES = ("torch", "transformers", "peft")
BUILD = "in the repository, run `make setup` or `pip install --no-build-isolation -e .`"


def check():
    """Raise an ImportError if ktlib cannot work here; warn if it works but is slow or was not tested so."""
    for package, tested, found in _untested_packages():
        advice = f"pip install '{package}{tested}'"
        if found is None or not _is_at_least_minimum(found, tested):
            raise ImportError(f"ktlib needs {package}{tested}, found {found or 'none'}: {advice}")
        warnings.warn(f"ktlib was not tested with {package} {found}, only with {tested}: {advice}", stacklevel=2)
    import torch  # noqa: F401  before the extension, so that torch's OpenMP runtime is the one that is loaded

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


def _untested_packages():
    """``[(package, tested range, installed version or None)]`` of the pinned packages outside ktlib's tested range."""
    from packaging.specifiers import SpecifierSet  # packaging.requirements would double the time of this import

    try:
        requirements = requires("ktlib") or []
    except PackageNotFoundError:
        raise ImportError(f"ktlib is not installed, only its files are here: {BUILD}") from None
    untested = []
    for requirement in requirements:
        name, specifiers = re.match(r"([\w.-]+)([^;]*)", requirement).groups()
        if name in PINNED_PACKAGES:
            tested = SpecifierSet(specifiers)
            try:
                installed = version(name)
            except PackageNotFoundError:
                installed = None
            if installed is None or not tested.contains(installed, prereleases=True):
                untested.append((name, tested, installed))
    return untested


def _is_at_least_minimum(installed, tested):
    minimums = [specifier for specifier in tested if specifier.operator == ">="]
    return all(minimum.contains(installed, prereleases=True) for minimum in minimums)


def unusable_cuda():
    """Why a GPU that torch finds cannot be used, such as an incompatible driver or full memory; "" if it can."""
    import torch

    if not torch.cuda.is_available():
        return ""
    try:
        torch.zeros(1, device="cuda").add_(1).item()
    except (RuntimeError, AssertionError) as error:
        return re.split(r"[\n.]", str(error))[0]
    return ""


def without_cuda():
    """Whether the run must use the CPU although torch finds a GPU; warns if so, with the reason."""
    if reason := unusable_cuda():
        warnings.warn(
            f"CUDA is present but unusable ({reason}): running on the CPU. Check `nvidia-smi` and the driver, or set "
            "CUDA_VISIBLE_DEVICES= to hide the GPU.",
            stacklevel=2,
        )
    return bool(reason)


def device():
    """Device on which everything except the routed experts is trained: "cuda" if a usable GPU is found, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() and not unusable_cuda() else "cpu"


check()
