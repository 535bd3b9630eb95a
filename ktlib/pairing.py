"""LoRA pairs in an adapter file: which tensors belong together, and what a pair says about its training."""

import re
from collections import Counter, defaultdict

import torch

BF16_MAX = torch.finfo(torch.bfloat16).max
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_LETTER = re.compile(r"(?<=lora_)([ABab])(?=[._]|$)")


def letter(name):
    """ "a" or "b" for a LoRA matrix's name, else None."""
    letters = _LETTER.findall(name)
    return letters[-1].lower() if letters else None


def partner(name):
    """Name of the other matrix of a LoRA pair, or None if ``name`` is no LoRA matrix."""
    match = next(reversed(list(_LETTER.finditer(name))), None)
    return match and name[: match.start()] + match[0].translate(str.maketrans("ABab", "BAba")) + name[match.end() :]


class Pairs:
    """Collects what is wrong with pairs, one at a time; ``judge`` writes it into an Audit.

    Args:
        settings: the dict of ``adapter_config.json``; its rank tells how many experts a stacked matrix holds.
    """

    def __init__(self, settings):
        self.rank = settings.get("r") if not settings.get("rank_pattern") else None
        alpha = settings.get("lora_alpha")
        root = self.rank and (self.rank**0.5 if settings.get("use_rslora") else self.rank)
        self.scaling = alpha / root if alpha and root else 1.0
        self.updated = Counter()  # B not zero
        self.zero = defaultdict(list)  # names of pairs with B all zero, by (layer, component)
        self.overflow = []
        self.misfits = []
        self.experts = defaultdict(lambda: defaultdict(bool))  # layer -> expert -> any B not zero
        self.unknown = 0

    def add(self, name, a, b, part, layer):
        """Take one pair into account: A and B as stored, in any of the known layouts."""
        where = layer, part
        if a.dim() in (2, 3) and (a.dim() != b.dim() or a.shape[-2] != b.shape[-1]):
            self.misfits.append((where, f"{name}: A {tuple(a.shape)} and B {tuple(b.shape)} do not multiply"))
            return
        if not (a.numel() and b.numel() and a.isfinite().all() and b.isfinite().all()):
            self.updated[where] += 1  # something wrote it
            return
        touched = bool(b.any())
        self.updated[where] += touched
        if not touched:
            self.zero[where].append(name)
        elif _product_overflows(a, b, self.scaling, self._experts_in(part, a)):
            self.overflow.append((where, name))
        if part != "routed_experts":
            return
        number = _EXPERT.search(name)
        if number:
            self.experts[layer][int(number[1])] |= touched
        elif experts := self._experts_in(part, a):
            used = b.flatten(1).any(dim=1) if b.dim() == 3 else b.reshape(b.shape[0], -1, experts).any(dim=1).any(dim=0)
            for expert, one in enumerate(used.tolist()):
                self.experts[layer][expert] |= one
        else:
            self.unknown += 1

    def _experts_in(self, part, a):
        if a.dim() == 3:
            return a.shape[0]
        if part != "routed_experts" or not self.rank or a.shape[0] <= self.rank or a.shape[0] % self.rank:
            return None
        return a.shape[0] // self.rank

    def judge(self, report, trained=None):
        """Add problems, notes and flags to an Audit. ``trained`` as in :func:`ktlib.audit`."""
        total = Counter({where: self.updated[where] + len(self.zero[where]) for where in {*self.updated, *self.zero}})
        if trained is None:
            trained = any(self.updated.values())
        for where, what in self.misfits:
            report.problems.append(f"{where[1]}: {what}")
            report.flagged[where] += 1
        for where, name in self.overflow:
            report.problems.append(f"{where[1]}: {name}: A and B are finite, scaling * B A leaves the range of bf16")
            report.flagged[where] += 1
        if total and not any(self.updated.values()) and not trained:
            report.notes.append("every B is zero: a new adapter, never trained")
        elif trained:
            self._never_updated(report, total)
            self._without_tokens(report)
        if self.unknown:
            report.notes.append("experts were not looked at one by one: the adapter's rank is not known")

    def _never_updated(self, report, total):
        for part in dict.fromkeys(part for _, part in total):
            found = {where: names for where, names in self.zero.items() if where[1] == part}
            for where in list(found):  # one module per expert: B of an expert without tokens is zero, and that is fine
                if self.updated[where] and all(_EXPERT.search(name) for name in found[where]):
                    del found[where]
            names = [name for here in found.values() for name in here]
            if names:
                of = sum(count for where, count in total.items() if where[1] == part)
                report.problems.append(f"{part}: {len(names)} of {of} B matrices were never updated, as {names[0]}")
            for where, here in found.items():
                report.flagged[where] += len(here)

    def _without_tokens(self, report):
        idle = {layer: [e for e, used in of.items() if not used] for layer, of in self.experts.items()}
        idle = {layer: found for layer, found in idle.items() if found and len(found) < len(self.experts[layer])}
        if idle:
            count = sum(map(len, idle.values()))
            first = min(idle, key=lambda layer: -1 if layer is None else layer)
            numbers = ", ".join(map(str, idle[first][:6])) + (" ..." if len(idle[first]) > 6 else "")
            where = f"{len(idle)} layers never received a token, as {numbers} in layer {first}"
            report.notes.append(f"routed_experts: {count} experts in {where}")


def _product_overflows(a, b, scaling, experts):
    """Whether an element of ``scaling * B @ A`` exceeds bf16. The product is built only if a bound says it might."""
    a, b = a.double(), b.double()
    width = a.shape[-2]
    if a.abs().max() * b.abs().max() * width * abs(scaling) <= BF16_MAX:
        return False
    if a.dim() == 2 and experts:
        rank = a.shape[0] // experts
        a, b = a.reshape(experts, rank, -1), b.reshape(b.shape[0], rank, experts).permute(2, 0, 1)
    pairs = [(a, b)] if a.dim() == 2 else zip(a, b, strict=True)
    return any(not (scaling * (y @ x)).to(torch.bfloat16).isfinite().all() for x, y in pairs)
