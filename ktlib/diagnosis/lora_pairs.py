"""LoRA pairs of an adapter: which two tensors are a pair, and what the values of a pair say about its training."""

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
    """The match of the letter of a LoRA matrix in its name, or None; the bias of a B (``lora_bias``) is no matrix."""
    found = [] if name.endswith(".bias") else list(_MATRIX.finditer(name))
    return found[-1] if found else None


def letter(name):
    """``"a"`` or ``"b"`` if ``name`` is that of a LoRA matrix, else None."""
    match = _matrix(name)
    return match and match[1].lower()


def partner(name):
    """The name of the other matrix of the pair, or None if ``name`` is not that of a LoRA matrix."""
    match = _matrix(name)
    return match and name[: match.start(1)] + "BAba"["ABab".index(match[1])] + name[match.end(1) :]


class Pairs:
    """Collects facts about an adapter's pairs, one pair at a time; ``judge`` adds problems and notes to an Audit.

    Args:
        settings: the dict of ``adapter_config.json``; a weight's rank tells how many experts a stacked matrix holds.
        label: what notes begin with, to tell adapters apart.

    ``cell`` below is a tuple ``(layer number or None, component)``.
    """

    def __init__(self, settings, label=""):
        self.settings, self.label = settings, label
        # A pair is updated if training changed the matrix that starts as zero: its B, or for an embedding its A.
        self.updated = Counter()  # {cell: number of updated pairs}
        self.zero = defaultdict(list)  # {cell: names of pairs that are not updated}
        self.overflow = []  # (cell, name)
        self.misfits = []  # (cell, text)
        self.experts = defaultdict(lambda: defaultdict(bool))  # {layer: {expert: whether any of its pairs is updated}}
        self.unknown = 0  # stacked matrices of which the number of experts is not known
        self.factors = {}  # {expert weight in PEFT's layout: (shape of A, shape of B)}, for factor_layouts

    def add(self, name, a, b, component, layer):
        """Take one pair into account; ``name`` is that of A. A and B may be in any layout that an audit reads."""
        cell = layer, component
        a, b = computable(a), computable(b)
        if not _multiply(a, b):
            self.misfits.append((cell, f"{name}: A {tuple(a.shape)} and B {tuple(b.shape)} do not multiply"))
            return
        if not (a.numel() and b.numel() and a.isfinite().all() and b.isfinite().all()):
            self.updated[cell] += 1  # a new pair is finite, so this one was changed
            return
        weight = self._weight_of(name)
        if a.dim() == 2 and weight.endswith(tuple(FUSED)):
            self.factors[weight] = tuple(a.shape), tuple(b.shape)
        rank, scaling = self._rank_and_scaling(weight)
        experts = self._experts_in(component, a, rank)
        updated = bool((a if _is_embedding(name) else b).any())
        self.updated[cell] += updated
        if not updated:
            self.zero[cell].append(name)
        elif _product_overflows(a, b, scaling, experts):
            self.overflow.append((cell, name))
        if component != "routed_experts":
            return
        match = _EXPERT.search(name)
        if match:
            self.experts[layer][int(match[1])] |= updated
        elif experts:
            b_by_expert = b if b.dim() == 3 else lora_layout.split_b(b, experts)
            for expert, expert_updated in enumerate(b_by_expert.any(dim=2).any(dim=1).tolist()):
                self.experts[layer][expert] |= expert_updated
        else:
            self.unknown += 1

    def _weight_of(self, name):
        match = _matrix(name)
        module = name[: match.start()]
        stacked = match[0].startswith("_")  # as in experts.gate_lora_a
        return f"{module}_proj" if stacked else weight_of(module, self.settings)

    def _rank_and_scaling(self, weight):
        rank, alpha = rank_and_alpha(self.settings, weight)
        if rank is None or alpha is None:
            return rank, 1.0
        return rank, alpha / (rank**0.5 if self.settings.get("use_rslora") else rank)

    def _experts_in(self, component, a, rank):
        """How many experts a stacked A holds; None if it is not stacked or its rank is not known."""
        if a.dim() == 3:
            return a.shape[0]
        if component != "routed_experts" or not rank or a.shape[0] <= rank or a.shape[0] % rank:
            return None
        return a.shape[0] // rank

    def judge(self, report, trained=None):
        """Add problems, notes and flags to an Audit. ``trained`` as in :func:`ktlib.audit`."""
        pairs = Counter({cell: self.updated[cell] + len(self.zero[cell]) for cell in [*self.updated, *self.zero]})
        any_updated = any(self.updated.values())
        if trained is None:
            trained = any_updated
        for cell, text in self.misfits:
            report.problems.append(f"{cell[1]}: {text}")
            report.flagged[cell] += 1
        for cell, name in self.overflow:
            report.problems.append(f"{cell[1]}: {name}: A and B are finite, scaling * B A leaves the range of bf16")
            report.flagged[cell] += 1
        if pairs and not any_updated and not trained:
            report.notes.append(f"{self.label}every B is zero: a new adapter, never trained")
        elif trained:
            self._add_never_updated(report, pairs)
            self._add_experts_without_tokens(report)
        if self.unknown:
            report.notes.append(f"{self.label}experts were not looked at one by one: the adapter's rank is not known")

    def _add_never_updated(self, report, pairs):
        """Add a problem per component; ``pairs`` is the number of pairs by cell.

        If each expert has pairs of its own, those of an expert without tokens stay zero. So zero pairs of experts are
        no problem in a layer in which other pairs were updated.
        """
        for label, _ in COMPONENTS:
            never_updated = {
                cell: names
                for cell, names in self.zero.items()
                if cell[1] == label and not (self.updated[cell] and all(_EXPERT.search(name) for name in names))
            }
            names = [name for cell_names in never_updated.values() for name in cell_names]
            if names:
                total = sum(count for cell, count in pairs.items() if cell[1] == label)
                kinds = " and ".join(sorted({"A" if _is_embedding(name) else "B" for name in names}))
                report.problems.append(
                    f"{label}: {len(names)} of {total} {kinds} matrices were never updated, as {names[0]}"
                )
            for cell, cell_names in never_updated.items():
                report.flagged[cell] += len(cell_names)

    def _add_experts_without_tokens(self, report):
        """Add a note about experts that were never updated, in layers in which others were."""
        idle = {}
        for layer, experts in self.experts.items():
            numbers = [expert for expert, updated in experts.items() if not updated]
            if 0 < len(numbers) < len(experts):
                idle[layer] = numbers
        if idle:
            count = sum(map(len, idle.values()))
            first = min(idle, key=lambda layer: -1 if layer is None else layer)
            shown = ", ".join(map(str, idle[first][:6])) + (" ..." if len(idle[first]) > 6 else "")
            report.notes.append(
                f"{self.label}routed_experts: {count} experts in {len(idle)} layers never received a token, "
                f"as {shown} in layer {first}"
            )


def _multiply(a, b):
    """Whether the shapes of A and B fit a product ``B @ A``; those of convolutions are not checked."""
    if a.dim() > 3:
        return True
    return min(a.dim(), b.dim()) >= 2 and a.shape[:-2] == b.shape[:-2] and a.shape[-2] == b.shape[-1]


def _is_embedding(name):
    return "lora_embedding_" in name


def _product_overflows(a, b, scaling, experts):
    """Whether an element of ``scaling * B @ A`` exceeds bf16. The product is computed only if a bound exceeds bf16."""
    a, b = a.double(), b.double()
    width = a.shape[-2]
    if a.abs().max() * b.abs().max() * width * abs(scaling) <= BF16_MAX:
        return False
    if a.dim() == 2 and experts:
        a, b = lora_layout.split_a(a, experts), lora_layout.split_b(b, experts)
    factors = [(a, b)] if a.dim() == 2 else zip(a, b, strict=True)
    return any(not (scaling * (b @ a)).to(torch.bfloat16).isfinite().all() for a, b in factors)
