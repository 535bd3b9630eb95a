"""How a file holds the LoRA factors of expert parameters: as PEFT does now, as it did before 0.19.1, or as Unsloth did.

A weight of E experts maps ``in`` features to ``out`` features. For an adapter of rank r of such a weight
(``target_parameters``), these have been written:

=============================================  ==============================  ================================
writer                                         lora_A (rows grouped by expert)  lora_B
=============================================  ==============================  ================================
PEFT since 0.19.1                              (E*r, in)                       (out, r*E), rank-major
PEFT before, weight stored as (E, out, in)     (E*r, out)                      (in, r*E), rank-major
Unsloth before 2026.9.6, on either PEFT        as its PEFT                     as its PEFT, grouped by expert
=============================================  ==============================  ================================

In rank-major columns the expert varies fastest: column ``j * E + e`` is rank j of expert e. Grouped by expert it is
column ``e * r + j``. The second layout is the transpose of the first, ``dW^T = A^T B^T``. Shapes tell the two apart
unless in equals out; they never tell the order of columns. So the file's ``adapter_config.json`` decides, or the user.
"""

from typing import NamedTuple

from ktlib.files.tensor_files import Stored
from ktlib.integrations.expert_names import FUSED
from ktlib.integrations.peft_settings import MATRIX, rank_and_alpha, weight_of
from ktlib.reference.lora_layout import split_a, split_b, stack_a, stack_b

ORDERS, FEATURES = ("rank_major", "grouped_by_expert"), ("in", "out")
CONVERTED = "ktlib.import_adapter rewrites routed experts as PEFT has them now"


class Base(NamedTuple):
    """What a base model says of its experts: ``{weight: (E, out, in)}``; whether weights are stored as (E, in, out);
    whether experts were one module each, without 3-D parameters, before transformers 5."""

    shapes: dict
    transposed: bool
    were_modules: bool


def check_options(lora_b_order, lora_a_features):
    """ValueError if an option is neither None nor one of its two values."""
    for name, value, known in (("lora_b_order", lora_b_order, ORDERS), ("lora_a_features", lora_a_features, FEATURES)):
        if value is not None and value not in known:
            raise ValueError(f"{name}: got {value!r}, needs {' or '.join(map(repr, known))}, or None")


def layouts_of(settings, shapes, where, base=None, lora_b_order=None, lora_a_features=None):
    """``({weight: order of lora_B's columns}, features that lora_A has)`` of the expert parameters in a file.

    Args:
        settings: the dict of its ``adapter_config.json``.
        shapes: ``{weight: (shape of lora_A, shape of lora_B)}``.
        where: what errors call the file.
        base: what is known of the model. Without it, a file whose shapes allow one layout only is taken for PEFT's
            layout of now: if it is not, it cannot be loaded.
        lora_b_order, lora_a_features: what the user says, see :func:`ktlib.import_adapter`.

    Raises:
        ValueError: nothing says which layout it is, or the user says something else than the file.
    """
    orders = {weight: _order(settings, weight, where, lora_b_order) for weight in shapes}
    return orders, _features(settings, shapes, where, base, lora_a_features) if shapes else "in"


def refuse_other_layouts(settings, shapes, where, base=None):
    """The same, with a ValueError also if it is not PEFT's layout of now."""
    orders, features = layouts_of(settings, shapes, where, base)
    if "grouped_by_expert" in orders.values():
        raise ValueError(f"lora_B in {where} is grouped by expert, as Unsloth wrote it before 2026.9.6; {CONVERTED}")
    if features == "out":
        raise ValueError(f"lora_A in {where} has the out_features, as PEFT before 0.19.1 wrote it; {CONVERTED}")
    return orders, features


def expert_factors(tensors, settings):
    """``{weight: (shape of lora_A, shape of lora_B)}`` of the expert parameters in ``{name in a file: tensor}``."""
    found = {}
    for name, tensor in tensors.items():
        if (match := MATRIX.fullmatch(name)) and (weight := weight_of(match[1], settings)).endswith(tuple(FUSED)):
            found.setdefault(weight, {})[match[2]] = tuple(tensor.shape)
    return {weight: (of["A"], of["B"]) for weight, of in found.items() if len(of) == 2}


def as_peft_has_it(a, b, experts, order, features):
    """lora_A (E*r, in) and lora_B (out, r*E), rank-major, of a pair of :class:`Stored` in the layout given."""
    if order == "grouped_by_expert":
        grouped = b
        b = Stored(b.shape, b.dtype, lambda: _rank_major(grouped.load(), experts))
    if features == "in":
        return a, b
    of_in, of_out = b, a
    return (
        Stored(of_in.shape[::-1], of_in.dtype, lambda: stack_a(split_b(of_in.load(), experts).mT)),
        Stored(of_out.shape[::-1], of_out.dtype, lambda: _rank_major(of_out.load().T, experts)),
    )


def _rank_major(b, experts):
    """Columns rank-major of columns grouped by expert, which are the rows of a lora_A."""
    return stack_b(split_a(b.T, experts).mT)


# --------------------------------------------------------------------------------------------- the order of columns


def _order(settings, weight, where, given):
    if rank_and_alpha(settings, weight)[0] == 1:
        return "rank_major"  # with one column for each expert there is one order
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
    """What Unsloth since 2026.9.6 records: for each parameter, and once for all if they agree; None where it does not.

    PEFT drops unknown settings when it loads a file, so there is a copy in ``auto_mapping``, which it keeps.
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
    possible = set(FEATURES)
    for weight, (a, b) in shapes.items():
        fitting = _fitting(a, b, base and base.shapes[weight])
        possible &= fitting or possible  # what fits neither has a wrong shape, which others report
    if given and possible and given not in possible:
        raise ValueError(f"lora_a_features: got {given!r}, but in {where} lora_A has the {possible.pop()}_features")
    if given or len(possible) < 2:
        return given or (possible or {"in"}).pop()
    if (features := _features_by_version(settings, base)) is not None:
        return features
    version = settings.get("peft_version")
    writer = f"PEFT {version}" if version else "an unknown version of PEFT"
    raise ValueError(
        f"{where} was written by {writer}, and nothing in it says whether lora_A of {next(iter(shapes))}, which has as "
        "many in_features as out_features, has the in_features, as PEFT since 0.19.1 wrote it, or the out_features, as "
        "PEFT before; say which with lora_a_features of ktlib.import_adapter (ktlib adapter --lora-a-features): "
        "'in' or 'out'"
    )


def _fitting(a, b, shape):
    if len(a) != 2 or len(b) != 2:
        return set()
    if shape is None:
        return set(FEATURES) if a[1] == b[0] else {"in"}
    _, out, inner = shape
    wanted = {"in": (inner, out), "out": (out, inner)}
    return {features for features in FEATURES if (a[1], b[0]) == wanted[features]}


def _features_by_version(settings, base):
    """What lora_A has by the version of PEFT that wrote the file, or None if that does not decide it.

    Up to 0.18 lora_A has the second dimension of the parameter as it was stored. 0.19.0 and the versions in development
    before 0.19.1 took sometimes one and sometimes the other. Unsloth has rules of its own for them.
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
    return "out" if base.were_modules else None  # else transformers 4 may have stored the parameter the other way
