"""In which layout a file holds the LoRA factors of expert parameters: PEFT's present one, its former one or Unsloth's.

A stacked weight of E experts maps ``in`` features to ``out`` features. Adapters of rank r of such a weight
(``target_parameters``) have been written in these layouts:

=============================================  ==============================  ================================
writer                                         lora_A (rows grouped by expert)  lora_B
=============================================  ==============================  ================================
PEFT since 0.19.1                              (E*r, in)                       (out, r*E), rank-major
PEFT before, weight stored as (E, out, in)     (E*r, out)                      (in, r*E), rank-major
Unsloth before 2026.9.6, on either PEFT        as its PEFT                     as its PEFT, grouped by expert
=============================================  ==============================  ================================

Rank j of expert e is column ``j * E + e`` of a rank-major lora_B, and column ``e * r + j`` of one grouped by expert.
The second layout holds the transposed update of the first, ``dW^T = A^T B^T``. Shapes tell these two layouts apart
unless ``in`` equals ``out``; they never tell the order of columns. Where shapes do not tell, the file's
``adapter_config.json`` or the user does.
"""

import warnings
from typing import NamedTuple

from ktlib.files.tensor_files import Stored
from ktlib.integrations.expert_names import FUSED
from ktlib.integrations.peft_settings import MATRIX, rank_and_alpha, weight_of
from ktlib.reference.lora_layout import split_a, split_b, stack_a, stack_b

ORDERS, FEATURES = ("rank_major", "grouped_by_expert"), ("in", "out")
CONVERTED = "ktlib.import_adapter rewrites routed experts as PEFT has them now"


class Base(NamedTuple):
    """What the layout of an adapter may depend on in its base model."""

    shapes: dict  # {weight: (E, out, in)}
    transposed: bool  # the weights are stored as (E, in, out)
    were_modules: bool  # before transformers 5, each expert was a module and there were no 3-D parameters


def check_options(lora_b_order, lora_a_features):
    """ValueError if an option of :func:`ktlib.import_adapter` is neither None nor one of its two values."""
    for name, value, known in (("lora_b_order", lora_b_order, ORDERS), ("lora_a_features", lora_a_features, FEATURES)):
        if value is not None and value not in known:
            raise ValueError(f"{name}: got {value!r}, needs {' or '.join(map(repr, known))}, or None")


def layouts_of(settings, shapes, where, base=None, lora_b_order=None, lora_a_features=None):
    """The layout of the expert parameters' factors in a file.

    Args:
        settings: the dict of the file's ``adapter_config.json``.
        shapes: ``{weight: (shape of lora_A, shape of lora_B)}``.
        where: what errors call the file.
        base: the :class:`Base`, if the model is known. Without it, factors of a weight whose in and out differ are
            taken for PEFT's present layout: PEFT refuses to load them if they are not.
        lora_b_order, lora_a_features: the layout if the user knows it, see :func:`ktlib.import_adapter`.

    Returns:
        ``{weight: one of ORDERS}``, the order of lora_B's columns; and one of ``FEATURES``, those that lora_A has.

    Raises:
        ValueError: neither file nor user says which layout it is, or they contradict each other.
    """
    orders = {weight: _order(settings, weight, where, lora_b_order) for weight in shapes}
    return orders, _features(settings, shapes, where, base, lora_a_features) if shapes else "in"


def refuse_other_layouts(settings, shapes, where, base=None):
    """:func:`layouts_of`, with a ValueError also if the layout is not PEFT's present one."""
    orders, features = layouts_of(settings, shapes, where, base)
    if "grouped_by_expert" in orders.values():
        raise ValueError(f"lora_B in {where} is grouped by expert, as Unsloth wrote it before 2026.9.6; {CONVERTED}")
    if features == "out":
        raise ValueError(f"lora_A in {where} has the out_features, as PEFT before 0.19.1 wrote it; {CONVERTED}")
    return orders, features


def warn_of_unsloth(settings, shapes, where):
    """Warn if Unsloth may have written a file that says nothing of it: one that names Unsloth's copy of a model."""
    base = str(settings.get("base_model_name_or_path"))
    if (
        base.startswith("unsloth/")
        and not _by_unsloth(settings)
        and any(rank_and_alpha(settings, weight)[0] != 1 for weight in shapes)
    ):
        warnings.warn(
            f"{where} names {base} as its base, and nothing in it says whether Unsloth trained it. lora_B of experts "
            "is taken for rank-major, as PEFT has it. If Unsloth before 2026.9.6 wrote it, say so with "
            "lora_b_order='grouped_by_expert' of ktlib.import_adapter (ktlib adapter --lora-b-order)",
            stacklevel=2,
        )


def expert_factors(tensors, settings):
    """``{weight: (shape of lora_A, shape of lora_B)}`` of the expert parameters in ``{name in a file: tensor}``."""
    shapes = {}
    for name, tensor in tensors.items():
        if (match := MATRIX.fullmatch(name)) and (weight := weight_of(match[1], settings)).endswith(tuple(FUSED)):
            shapes.setdefault(weight, {})[match[2]] = tuple(tensor.shape)
    return {weight: (pair["A"], pair["B"]) for weight, pair in shapes.items() if len(pair) == 2}


def as_peft_has_it(a, b, experts, order, features):
    """A pair of :class:`Stored` converted from the given layout to PEFT's: lora_A (E*r, in), lora_B (out, r*E)."""
    if order == "grouped_by_expert":
        grouped = b
        b = Stored(b.shape, b.dtype, lambda: _rank_major(grouped.load(), experts))
    if features == "in":
        return a, b
    return (
        Stored(b.shape[::-1], b.dtype, lambda: stack_a(split_b(b.load(), experts).mT)),
        Stored(a.shape[::-1], a.dtype, lambda: _rank_major(a.load().T, experts)),
    )


def _rank_major(b, experts):
    """A lora_B with columns grouped by expert, which are ordered as the rows of a lora_A, with rank-major columns."""
    return stack_b(split_a(b.T, experts).mT)


# --------------------------------------------------------------------------------------------- the order of columns


def _order(settings, weight, where, given):
    """The order of lora_B's columns; ``given`` is the user's."""
    if rank_and_alpha(settings, weight)[0] == 1:
        return "rank_major"  # the two orders are the same
    recorded = _recorded_order(settings, weight.rpartition(".")[2])
    if given and recorded and given != recorded:
        raise ValueError(f"lora_b_order: got {given!r}, but {where} says that {weight} is {recorded!r}")
    if given or recorded:
        return given or recorded
    if _by_unsloth(settings):
        raise ValueError(
            f"{where} was written by Unsloth, and nothing in it says whether lora_B of {weight} is grouped by expert, "
            "as Unsloth before 2026.9.6 wrote it for most models, or rank-major, as PEFT has it; say which with "
            "lora_b_order of ktlib.import_adapter (ktlib adapter --lora-b-order): 'grouped_by_expert' or 'rank_major'"
        )
    return "rank_major"


def _recorded_order(settings, parameter):
    """The order that Unsloth since 2026.9.6 records, by parameter and, if all agree, for the file; None if it does not.

    PEFT drops settings that it does not know when it loads a file, but not ``auto_mapping``. So Unsloth records the
    order there a second time.
    """
    for record in (settings, _mapping(settings)):
        parameters = _dict(_dict(record.get("unsloth_fused_expert_lora")).get("parameters"))
        recorded = _dict(parameters.get(parameter)).get("lora_B_layout", record.get("lora_B_layout"))
        if recorded in ORDERS:
            return recorded
    return None


def _by_unsloth(settings):
    names = "lora_B_layout", "unsloth_fused_expert_lora", "unsloth_fixed"
    return any(record.get(name) for record in (settings, _mapping(settings)) for name in names)


def _mapping(settings):
    return _dict(settings.get("auto_mapping"))


def _dict(value):
    return value if isinstance(value, dict) else {}


# --------------------------------------------------------------------------------------------- the features of lora_A


def _features(settings, shapes, where, base, given):
    """The features that lora_A has; ``given`` are the user's."""
    possible = set(FEATURES)
    for weight, (a, b) in shapes.items():
        fitting = _fitting(a, b, base and base.shapes[weight])
        possible &= fitting or possible  # shapes that fit neither are wrong, which is reported elsewhere
    if given and possible and given not in possible:
        raise ValueError(f"lora_a_features: got {given!r}, but in {where} lora_A has the {possible.pop()}_features")
    by_version, version = _features_by_version(settings, base), settings.get("peft_version")
    if not given and possible == {"out"} and by_version == "in" and not _by_unsloth(settings):
        raise ValueError(
            f"{where} was written by PEFT {version}, for which lora_A has the in_features, but in the file it has the "
            f"out_features of {next(iter(shapes))}; needs another base model, or, if the version is wrong, "
            "lora_a_features='out' of ktlib.import_adapter (ktlib adapter --lora-a-features)"
        )
    if given or len(possible) < 2:
        return given or (possible or {"in"}).pop()
    if by_version is not None:
        return by_version
    writer = f"PEFT {version}" if version else "an unknown version of PEFT"
    raise ValueError(
        f"{where} was written by {writer}, and nothing in it says whether lora_A of {next(iter(shapes))}, which has as "
        "many in_features as out_features, has the in_features, as PEFT since 0.19.1 wrote it, or the out_features, as "
        "PEFT before; say which with lora_a_features of ktlib.import_adapter (ktlib adapter --lora-a-features): "
        "'in' or 'out'"
    )


def _fitting(a, b, shape):
    """Those of FEATURES that lora_A can have by its shape ``a``, lora_B's ``b`` and, if known, the weight's."""
    if len(a) != 2 or len(b) != 2:
        return set()
    if shape is None:
        return set(FEATURES) if a[1] == b[0] else {"in"}
    _, out_features, in_features = shape
    sizes = {"in": (in_features, out_features), "out": (out_features, in_features)}
    return {features for features in FEATURES if (a[1], b[0]) == sizes[features]}


def _features_by_version(settings, base):
    """The features that lora_A has by the version of PEFT that wrote the file, or None if the version does not tell.

    Up to PEFT 0.18, lora_A has the size of the second dimension of the parameter as it was stored. PEFT 0.19.0 and the
    development versions before 0.19.1 wrote sometimes one and sometimes the other. Unsloth had rules of its own.
    """
    from packaging.version import InvalidVersion, Version

    try:
        version = Version(str(settings.get("peft_version")).partition("@")[0])
    except InvalidVersion:
        return None
    if version >= Version("0.19.1"):
        return "in"
    if base is None or version.is_devrelease or version >= Version("0.19.0") or _by_unsloth(settings):
        return None
    if base.transposed:
        return "in"
    # If transformers 4 had the parameter, it may have stored it transposed.
    return "out" if base.were_modules else None
