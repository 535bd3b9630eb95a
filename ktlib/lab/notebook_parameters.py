"""Checks of a notebook's parameters, before anything is computed, and claims that are about some parameters only.

Every check raises ValueError ``name: got value, needs what``; parameters that do not fit together are named together.
"""

import math


def need(good, what, **given):
    """ValueError that names the parameters ``given`` and their values, and ``what`` is needed, unless ``good``."""
    if not good:
        raise ValueError(f"{', '.join(given)}: got {', '.join(map(repr, given.values()))}, needs {what}")


def whole(least, most=None, **given):
    """Each of ``given`` is an int, at least ``least`` and, if there is a ``most``, at most that."""
    limits = f">= {least}" if most is None else f"from {least} to {most}"
    for name, value in given.items():
        good = isinstance(value, int) and not isinstance(value, bool)
        good = good and value >= least and (most is None or value <= most)
        need(good, f"a whole number {limits}", **{name: value})


def multiple_of(unit, why, **given):
    """Each of ``given`` is a whole number that ``unit`` divides, and at least that; ``why`` says for whose sake."""
    whole(unit, **given)
    for name, value in given.items():
        need(value % unit == 0, f"a multiple of {unit}, {why}", **{name: value})


def positive(most=None, **given):
    """Each of ``given`` is a finite number above 0 and, if there is a ``most``, at most that."""
    limits = "a finite number > 0" if most is None else f"a number > 0 and <= {most:g}"
    for name, value in given.items():
        good = isinstance(value, int | float) and not isinstance(value, bool)
        need(good and 0 < value < math.inf and (most is None or value <= most), limits, **{name: value})


def one_of(options, **given):
    """Each of ``given`` is among ``options``, which are texts."""
    for name, value in given.items():
        need(isinstance(value, str) and value in options, f"one of {', '.join(options)}", **{name: value})


def each(check, *limits, **given):
    """Each of ``given`` is a list of one or more values that differ and pass ``check(*limits, name=value)``."""
    for name, values in given.items():
        need(isinstance(values, list) and values, "a list of at least one value", **{name: values})
        for value in values:
            check(*limits, **{name: value})
        need(len(set(values)) == len(values), "values that differ", **{name: values})


def memory(size, **given):
    """This process can get ``size`` more bytes of memory, which ``given`` ask for."""
    from ktlib.system.memory import available_memory

    available = available_memory()
    need(size <= available, f"{size / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available", **given)


def judge(claims, *, judged=True, about=""):
    """Print of each claim, ``{text: bool}``, whether it holds; AssertionError if one does not and they are ``judged``.

    Args:
        judged: whether this run's parameters are those that the claims are about.
        about: which these are, for whoever runs the notebook with others.
    """
    for text, holds in claims.items():
        print(f"{text}: {'yes' if holds else 'no'}")
    if judged:
        assert all(claims.values()), [text for text, holds in claims.items() if not holds]
    else:
        print(f"not judged, because it is claimed of {about}")
