"""LoRA pairs in an adapter file: which tensors belong together, and what a pair says about its training."""

import re
from collections import Counter, defaultdict

import torch

from ktlib.files.tensor_files import computable
from ktlib.integrations.expert_names import FUSED
from ktlib.integrations.peft_settings import rank_and_alpha, weight_of
from ktlib.names import COMPONENTS
from ktlib.reference import lora_layout

BF16_MAX = torch.finfo(torch.bfloat16).max
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_MATRIX = re.compile(r"(?:^|[._])lora_(?:embedding_)?([ABab])(?=[._]|$)")


def _matrix(name):
    """The match that says which matrix of a LoRA pair this is, or None; the bias of a B (``lora_bias``) is none."""
    found = [] if name.endswith(".bias") else list(_MATRIX.finditer(name))
    return found[-1] if found else None


def letter(name):
    """ "a" or "b" for a LoRA matrix's name, else None."""
    match = _matrix(name)
    return match and match[1].lower()


def partner(name):
    """Name of the other matrix of a LoRA pair, or None if ``name`` is no LoRA matrix."""
    match = _matrix(name)
    return match and name[: match.start(1)] + "BAba"["ABab".index(match[1])] + name[match.end(1) :]


class Pairs:
    """Collects what is wrong with an adapter's pairs, one at a time; ``judge`` writes it into an Audit.

    Args:
        settings: the dict of ``adapter_config.json``; a weight's rank tells how many experts a stacked matrix holds.
        label: what notes begin with, to tell adapters apart.
    """

    def __init__(self, settings, label=""):
        self.settings, self.label = settings, label
        self.updated = Counter()  # B not zero; A for an embedding, whose A is what starts as zero
        self.zero = defaultdict(list)  # names of pairs with B all zero, by (layer, component)
        self.overflow = []
        self.misfits = []
        self.experts = defaultdict(lambda: defaultdict(bool))  # layer -> expert -> any B not zero
        self.unknown = 0
        self.factors = {}  # of expert parameters in PEFT's layout: weight -> shapes of A and B, for factor_layouts

    def add(self, name, a, b, part, layer):
        """Take one pair into account: A and B as stored, in any of the known layouts."""
        where = layer, part
        a, b = computable(a), computable(b)
        if not _multiply(a, b):
            self.misfits.append((where, f"{name}: A {tuple(a.shape)} and B {tuple(b.shape)} do not multiply"))
            return
        if not (a.numel() and b.numel() and a.isfinite().all() and b.isfinite().all()):
            self.updated[where] += 1  # something wrote it
            return
        weight = self._weight_of(name)
        if a.dim() == 2 and weight.endswith(tuple(FUSED)):
            self.factors[weight] = tuple(a.shape), tuple(b.shape)
        rank, scaling = self._rank_and_scaling(weight)
        experts = self._experts_in(part, a, rank)
        touched = bool((a if _of_embedding(name) else b).any())
        self.updated[where] += touched
        if not touched:
            self.zero[where].append(name)
        elif _product_overflows(a, b, scaling, experts):
            self.overflow.append((where, name))
        if part != "routed_experts":
            return
        number = _EXPERT.search(name)
        if number:
            self.experts[layer][int(number[1])] |= touched
        elif experts:
            used = (b if b.dim() == 3 else lora_layout.split_b(b, experts)).any(dim=2).any(dim=1)
            for expert, one in enumerate(used.tolist()):
                self.experts[layer][expert] |= one
        else:
            self.unknown += 1

    def _weight_of(self, name):
        match = _matrix(name)
        module = name[: match.start()]
        stacked = match[0].startswith("_")  # experts.gate_lora_a
        return f"{module}_proj" if stacked else weight_of(module, self.settings)

    def _rank_and_scaling(self, weight):
        rank, alpha = rank_and_alpha(self.settings, weight)
        if rank is None or alpha is None:
            return rank, 1.0
        return rank, alpha / (rank**0.5 if self.settings.get("use_rslora") else rank)

    def _experts_in(self, part, a, rank):
        if a.dim() == 3:
            return a.shape[0]
        if part != "routed_experts" or not rank or a.shape[0] <= rank or a.shape[0] % rank:
            return None
        return a.shape[0] // rank

    def judge(self, report, trained=None):
        """Add problems, notes and flags to an Audit. ``trained`` as in :func:`ktlib.audit`."""
        total = Counter({where: self.updated[where] + len(self.zero[where]) for where in [*self.updated, *self.zero]})
        if trained is None:
            trained = any(self.updated.values())
        for where, what in self.misfits:
            report.problems.append(f"{where[1]}: {what}")
            report.flagged[where] += 1
        for where, name in self.overflow:
            report.problems.append(f"{where[1]}: {name}: A and B are finite, scaling * B A leaves the range of bf16")
            report.flagged[where] += 1
        if total and not any(self.updated.values()) and not trained:
            report.notes.append(f"{self.label}every B is zero: a new adapter, never trained")
        elif trained:
            self._never_updated(report, total)
            self._without_tokens(report)
        if self.unknown:
            report.notes.append(f"{self.label}experts were not looked at one by one: the adapter's rank is not known")

    def _never_updated(self, report, total):
        for part, _ in COMPONENTS:
            found = {where: names for where, names in self.zero.items() if where[1] == part}
            for where in list(found):  # one module per expert: B of an expert without tokens is zero, and that is fine
                if self.updated[where] and all(_EXPERT.search(name) for name in found[where]):
                    del found[where]
            names = [name for here in found.values() for name in here]
            if names:
                of = sum(count for where, count in total.items() if where[1] == part)
                kinds = " and ".join(sorted({"A" if _of_embedding(name) else "B" for name in names}))
                report.problems.append(
                    f"{part}: {len(names)} of {of} {kinds} matrices were never updated, as {names[0]}"
                )
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
            report.notes.append(f"{self.label}routed_experts: {count} experts in {where}")


def _multiply(a, b):
    if a.dim() > 3:  # of a convolution
        return True
    return min(a.dim(), b.dim()) >= 2 and a.shape[:-2] == b.shape[:-2] and a.shape[-2] == b.shape[-1]


def _of_embedding(name):
    return "lora_embedding_" in name


def _product_overflows(a, b, scaling, experts):
    """Whether an element of ``scaling * B @ A`` exceeds bf16. The product is built only if a bound says it might."""
    a, b = a.double(), b.double()
    width = a.shape[-2]
    if a.abs().max() * b.abs().max() * width * abs(scaling) <= BF16_MAX:
        return False
    if a.dim() == 2 and experts:
        a, b = lora_layout.split_a(a, experts), lora_layout.split_b(b, experts)
    pairs = [(a, b)] if a.dim() == 2 else zip(a, b, strict=True)
    return any(not (scaling * (y @ x)).to(torch.bfloat16).isfinite().all() for x, y in pairs)
