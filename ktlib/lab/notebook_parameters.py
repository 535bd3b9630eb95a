"""Checks of a notebook's parameters, and judgement of a notebook's claims.

Every check takes the parameters as keywords ``given``, and raises a ValueError "name: got value, needs ...". If several
parameters do not fit together, the error names all of them.
"""

import math


def need(good, needs, **given):
    """Unless ``good``, raise a ValueError with the names and values ``given`` and the text ``needs``."""
    if not good:
        raise ValueError(f"{', '.join(given)}: got {', '.join(map(repr, given.values()))}, needs {needs}")


def whole(least, most=None, **given):
    """Each of ``given`` is an int from ``least`` to ``most`` (None: without a limit)."""
    limits = f">= {least}" if most is None else f"from {least} to {most}"
    for name, value in given.items():
        good = isinstance(value, int) and not isinstance(value, bool)
        good = good and value >= least and (most is None or value <= most)
        need(good, f"a whole number {limits}", **{name: value})


def multiple_of(unit, why, **given):
    """Each of ``given`` is a positive multiple of ``unit``; ``why`` is the reason, for the error."""
    whole(unit, **given)
    for name, value in given.items():
        need(value % unit == 0, f"a multiple of {unit}, {why}", **{name: value})


def positive(most=None, **given):
    """Each of ``given`` is a finite number above 0, and at most ``most`` (None: without a limit)."""
    limits = "a finite number > 0" if most is None else f"a number > 0 and <= {most:g}"
    for name, value in given.items():
        good = isinstance(value, int | float) and not isinstance(value, bool)
        need(good and 0 < value < math.inf and (most is None or value <= most), limits, **{name: value})


def one_of(options, **given):
    """Each of ``given`` is one of the texts ``options``."""
    for name, value in given.items():
        need(isinstance(value, str) and value in options, f"one of {', '.join(options)}", **{name: value})


def each(check, *limits, **given):
    """Each of ``given`` is a list of different values, at least one, that pass ``check(*limits, name=value)``."""
    for name, values in given.items():
        need(isinstance(values, list) and values, "a list of at least one value", **{name: values})
        for value in values:
            check(*limits, **{name: value})
        need(len(set(values)) == len(values), "values that differ", **{name: values})


def memory(size, **given):
    """This process can allocate the ``size`` bytes of memory that the parameters ``given`` require."""
    from ktlib.system.memory import available_memory

    available = available_memory()
    need(size <= available, f"{size / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available", **given)


def judge(claims, *, judged=True, about=""):
    """Print for each claim, ``{text: bool}``, whether it holds; AssertionError if one does not and they are ``judged``.

    Args:
        judged: whether the claims are made about this run's parameters.
        about: text that says which parameters the claims are about, printed if they are not ``judged``.
    """
    for text, holds in claims.items():
        print(f"{text}: {'yes' if holds else 'no'}")
    if judged:
        assert all(claims.values()), [text for text, holds in claims.items() if not holds]
    else:
        print(f"not judged, because it is claimed of {about}")
