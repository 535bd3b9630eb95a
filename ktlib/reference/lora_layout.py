"""Conversion between PEFT's stacked LoRA matrices of all experts and the matrices of each expert.

PEFT (peft/tuners/lora/layer.py, ``ParamWrapper.get_delta_weight``) stores the factors of E experts as two matrices.
``lora_A`` (E*r, in) is expert-major: expert e has rows e*r to e*r + r. ``lora_B`` (out, r*E) is rank-major, and the
expert varies fastest: expert e has columns e, E + e, 2E + e and so on.
"""


def shapes(rank, experts, out_features, in_features):
    """The shapes of ``lora_A`` and ``lora_B``."""
    return (experts * rank, in_features), (out_features, rank * experts)


def split_a(lora_A, experts):
    """(E, r, in), a view of ``lora_A`` (E*r, in) if that is contiguous."""
    return lora_A.reshape(experts, -1, lora_A.shape[1])


def split_b(lora_B, experts):
    """(E, out, r), a view of ``lora_B`` (out, r*E) if that is contiguous."""
    return lora_B.reshape(lora_B.shape[0], -1, experts).permute(2, 0, 1)


def stack_a(matrices):
    """``lora_A`` (E*r, in) of (E, r, in), the inverse of :func:`split_a`."""
    return matrices.flatten(0, 1)


def stack_b(matrices):
    """``lora_B`` (out, r*E) of (E, out, r), the inverse of :func:`split_b`."""
    return matrices.permute(1, 2, 0).flatten(1)
