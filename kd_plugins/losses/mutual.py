"""Several networks that learn together: who teaches whom (selectors), and what is taught (refined labels)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import Loss, peer_name
from .functional import (
    Prediction,
    Predictions,
    as_probs,
    cross_entropy,
    logistic,
    mixed_cross_entropy,
)
from .refined import MyLC, Refined
from .registry import register_loss
from .state import KeepsPrecision, Progress

NORMALIZE = ("selected", "batch")


class Selector(KeepsPrecision):
    """Which samples a network may teach: ``(logits [B, C], target [B, C]) -> mask [B]`` of booleans, never differentiated.

    Attributes:
        reads_target: False if it does not look at the target; it may then be asked for all peers at once, with their
            ``Predictions``, and answers [K, B], or [B] where the peers do not matter.
    """

    stats: dict[str, Tensor]
    reads_target = True

    def __init__(self) -> None:
        super().__init__()
        self.stats = {}

    def forward(self, logits: Tensor | Prediction | Predictions, target: Tensor) -> Tensor:
        raise NotImplementedError


class Everything(Selector):
    """Every sample: the "all knowledge" limit of SMKD."""

    reads_target = False

    def forward(self, logits: Tensor | Prediction | Predictions, target: Tensor) -> Tensor:
        return torch.ones(target.shape[0], dtype=torch.bool, device=target.device)


class Nothing(Selector):
    """No sample: "zero knowledge", the networks train side by side and independently."""

    reads_target = False

    def forward(self, logits: Tensor | Prediction | Predictions, target: Tensor) -> Tensor:
        return torch.zeros(target.shape[0], dtype=torch.bool, device=target.device)


class Confident(Selector):
    """Samples with H(p) < chi, strictly; chi(t) = (ln C / eta) · 2 h(t/Γ - 0.5, b2) in nats.

    b2 = 0 is the static threshold ln C / eta (SMKD-S). b2 < 0 tightens it over training, b2 > 0 relaxes it (SMKD-P); half
    way both stand at the static one. eta = inf, or a negative eta, selects nothing; eta < 1 with b2 = 0 everything. At
    eta = 1 exactly, a uniform row lies on the edge and rounding decides: use a smaller eta, or ``Everything()``.

    Source: Li et al., SMKD, IJCNN 2023, the static and the progressive threshold.
    Unsaid there: t/Γ is the progress in steps; H is exact (0 log 0 = 0), so chi = 0 selects nothing.

    Args:
        eta: the larger, the stricter; 1 to 4 in the paper.
        b2: change of the threshold over training; the paper publishes its sign only.

    >>> Confident(eta=2, b2=0)(torch.tensor([[5.0, 0.0], [0.1, 0.0]]), torch.zeros(2, 2))
    tensor([ True, False])
    """

    reads_target = False

    def __init__(self, eta: float = 2.0, b2: float = -6.0) -> None:
        super().__init__()
        if eta == 0 or math.isnan(eta):
            raise ValueError(
                f"eta={eta}: the threshold is ln C / eta; expected a number other than 0"
            )
        self.eta, self.b2 = float(eta), float(b2)
        self.progress = Progress() if b2 else None

    def chi(self, num_classes: int) -> Tensor | float:
        """The threshold now, in nats."""
        static = math.log(num_classes) / self.eta
        if self.progress is None:
            return static
        return static * 2.0 * logistic(self.progress.get(self) - 0.5, self.b2)

    def forward(self, logits: Tensor | Prediction | Predictions, target: Tensor) -> Tensor:
        pred = logits if isinstance(logits, Predictions) else Prediction.of(logits)
        chi = self.chi(pred.num_classes)
        self.stats = {"chi": chi if isinstance(chi, Tensor) else pred.entropy.new_full((), chi)}
        return pred.entropy < chi

    def extra_repr(self) -> str:
        return f"eta={self.eta}, b2={self.b2}"


class Mutual(Loss):
    """L = Σ_k [ own · L_k + Σ_{j≠k} (1/n_j) Σ_{i: select(p_j)} H(q~_j, p_k) ], called as ``loss((z_a, z_b, ...), target)``.

    A mutual loss is what is taught (``refine``) times what is selected (``select``): SMKD's Table I is a grid of these
    calls. L_k is peer k's own loss H(q~_k, p_k) and q~_j the refined label that peer j hands over, a constant. For a
    loss that does not refine labels, L_k is that loss and peer j hands over the selected samples with their labels; what it reads
    (``teacher``, ``index`` ...) each peer gets, of ``features`` its own.

    Source: Li et al., SMKD, IJCNN 2023, equations 4 to 6 and Algorithm 1.
    Differs: Algorithm 1 as printed swaps the two counts and divides by zero where nothing is selected. Here each direction
    has its own n_j, and an empty selection is a zero that stays connected to the graph.

    Args:
        refine: the peers' loss; each peer gets its own copy, and so its own state.
        select: which samples a peer may teach.
        own: weight of each peer's own loss.
        normalize: ``"selected"``: n_j is the number of selected samples (the paper's; it depends on how a batch is cut
            over processes and accumulation steps); ``"batch"``: n_j = B (which does not).
        num_peers: how many networks.
    """

    num_peers = 2

    def __init__(
        self,
        refine: Loss,
        select: Selector,
        *,
        own: float = 1.0,
        normalize: str = "selected",
        num_peers: int = 2,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        if normalize not in NORMALIZE:
            raise ValueError(f"normalize={normalize!r}: expected one of {NORMALIZE}")
        if not isinstance(refine, Loss) or refine.num_peers > 1:
            raise TypeError(f"refine must be a loss for one network, got {refine!r}")
        if num_peers < 2:
            raise ValueError(
                f"num_peers={num_peers}: mutual learning takes at least two; one network needs no Mutual"
            )
        self.refine: Any = nn.ModuleList(
            [refine, *(copy.deepcopy(refine) for _ in range(num_peers - 1))]
        )
        self.select, self.own, self.normalize, self.num_peers = select, own, normalize, num_peers
        self.required_inputs, self.layers = refine.required_inputs, refine.layers
        # labels that are mixtures of q and p are never written down
        self.indices = (
            isinstance(refine, Refined)
            and refine.indices
            and refine.detach
            and not select.reads_target
        )
        self.watch = False  # keep the last selection, for whoever wants to look at it
        self.selection: list[
            tuple[Tensor, Tensor]
        ] = []  # per peer: mask [B], class that its target names [B]

    def per_sample(self, logits: Sequence[Tensor], target: Tensor, **extra: Any) -> Tensor:  # type: ignore[override]
        self.selection = []
        if self.indices:
            return self._mixed(logits, target)
        preds = [Prediction.of(z) for z in logits]
        consts = [pred.detach() for pred in preds]

        total = torch.zeros_like(preds[0].log_p[:, 0])
        taught, owns = (
            [],
            [],
        )  # per teacher: its targets [B, C] and their weights [B]; per peer: its own loss [B]
        for k, (refine, pred, const) in enumerate(zip(self.refine, preds, consts, strict=True)):
            if isinstance(refine, Refined):
                refine.stats = {}
                q = refine.refine(const if refine.detach else pred, target)
                own = cross_entropy(pred.log_p, q)
            else:
                own_extra = {
                    name: value[k] if name == "features" else value for name, value in extra.items()
                }
                q, own = target, refine.run(pred.log_p, target, **own_extra)
                if own.dim() == 0 and not isinstance(self.select, Nothing):
                    raise TypeError(
                        f"{type(refine).__name__} is a loss on the whole batch: it cannot teach selected samples"
                    )
            total = total + self.own * own
            owns.append(own)
            mask = self.select(const, target)
            if self.watch:
                self.selection.append((mask, q.detach().argmax(-1)))
            weight, self.stats[f"selected_{peer_name(k)}"] = self._weight(mask, total.dtype)
            taught.append((q.detach(), weight))
            self.stats[f"own_{peer_name(k)}"] = own.detach().mean()
            self.stats |= {f"{name}_{peer_name(k)}": value for name, value in refine.stats.items()}

        for k, (refine, pred) in enumerate(zip(self.refine, preds, strict=True)):
            lesson = torch.zeros_like(total)
            for j, (q, weight) in enumerate(taught):
                if j == k:
                    continue
                loss = cross_entropy(pred.log_p, q) if isinstance(refine, Refined) else owns[k]
                lesson = lesson + weight * loss
            self.stats[f"taught_{peer_name(k)}"] = lesson.detach().mean()
            total = total + lesson
        self.stats |= self.select.stats
        return total

    def _weight(self, mask: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What the samples [..., B] of a selection weigh, and the share of them that is selected [...]."""
        weight = mask.to(dtype)
        share = weight.mean(-1)
        if self.normalize == "selected":  # times B / n, since the batch mean will divide by B
            weight = weight / share.clamp_min(1.0 / mask.shape[-1]).unsqueeze(-1)
        return weight, share

    def _mixed(self, logits: Sequence[Tensor], target: Tensor) -> Tensor:
        """The same where each q~ is a constant a q + b p."""
        for refine in self.refine:
            refine.stats = {}
        with torch.no_grad():
            preds = Predictions(logits)
            a, b = self.refine[0].shares(self.refine, preds)
            mask = self.select(preds, target).expand(a.shape)
            weights, share = self._weight(mask, a.dtype)
        total, owns, lessons = mixed_cross_entropy(logits, preds, target, a, b, weights, self.own)
        if self.watch:
            q = as_probs(target, preds.num_classes, a.dtype)
            for k, p in enumerate(preds.p):
                mixed = q if b is None else a[k].unsqueeze(1) * q + b[k].unsqueeze(1) * p
                self.selection.append((mask[k], mixed.argmax(-1)))
        means = torch.stack([owns, lessons]).mean(-1)
        for k, (refine, own, taught) in enumerate(zip(self.refine, *means, strict=True)):
            named = {"own": own, "taught": taught, "selected": share[k], **refine.stats}
            self.stats |= {f"{name}_{peer_name(k)}": value for name, value in named.items()}
        self.stats |= self.select.stats
        return total

    def prime(self, models: Sequence[nn.Module], loader: Iterable[Any]) -> list[Tensor]:
        """Set the r of each peer's MyLC from one pass over ``loader``: see :meth:`MyLC.prime`."""
        if not isinstance(self.refine[0], MyLC):
            raise TypeError(
                f"prime sets MyLC's r; these peers use {type(self.refine[0]).__name__}, which has none"
            )
        return [
            refine.prime(model, loader) for refine, model in zip(self.refine, models, strict=True)
        ]  # type: ignore[operator]


@register_loss("smkd")
class SMKD(Mutual):
    """SMKD: L = Σ_k [ H(q~_k, p_k) + Σ_{j≠k} mean over {i: H(p_j) < chi(t)} of H(q~_j, p_k) ].

    Each network is taught only what its peer is sure of. b2 = 0: static threshold (SMKD-S); b2 ≠ 0: progressive (SMKD-P).
    ``eta=math.inf`` is zero knowledge (independent training); ``eta<1, b2=0`` all knowledge.

    Source: Li et al., "Selective mutual knowledge distillation", IJCNN 2023 (arXiv 2106.01489), equations 4 to 6.
    Differs: see :class:`Mutual`. Unsaid there: b1, b2 and learning rates; eta is searched per noise rate in {1, 2, 3, 4}.

    Args:
        refine: the label modification; None is ``MyLC()``. Give it ``window=len(train_dataset)``.
        eta, b2: the threshold, see :class:`Confident`.
        normalize, num_peers: see :class:`Mutual`.

    >>> loss = SMKD(MyLC(window=50_000), eta=2, b2=-6)
    >>> loss.set_progress(0.25)
    >>> loss((torch.zeros(2, 4), torch.zeros(2, 4)), torch.tensor([0, 1]))  # nobody is sure: two plain cross-entropies
    tensor(2.7726)
    """

    def __init__(
        self,
        refine: Loss | None = None,
        eta: float = 2.0,
        b2: float = -6.0,
        normalize: str = "selected",
        num_peers: int = 2,
        **base: Any,
    ) -> None:
        select = Confident(eta, b2)
        super().__init__(refine or MyLC(), select, normalize=normalize, num_peers=num_peers, **base)
