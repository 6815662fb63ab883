"""Several networks that learn together: selectors say who teaches, refined labels what."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from . import validate
from .base import Loss, LossArguments, peer_name
from .functional import Prediction, logistic
from .refined import Refined
from .registry import register_loss
from .self_trust import MyLC
from .sizes import Sizes
from .state import KeepsPrecision, Progress

NORMALIZE = ("batch", "selected")


class Selector(KeepsPrecision):
    """Which samples a network may teach: ``(prediction, target [B, C]) -> mask [B]`` of booleans.

    The prediction carries no gradient. A selector may leave diagnostics in ``stats``. One that
    compares a batch with the rest of the training data names ``index`` in ``required_inputs``,
    makes its table in :meth:`build` and writes :meth:`choose`.
    """

    required_inputs: frozenset[str] = frozenset()
    num_samples: int | None = None
    stats: dict[str, Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.stats = {}

    def forward(self, pred: Prediction, target: Tensor) -> Tensor:
        raise NotImplementedError

    def choose(
        self, preds: Sequence[Prediction], target: Tensor, index: Tensor | None = None
    ) -> list[Tensor]:
        """The mask [B] of each network; ``index`` [B] are positions in the training data."""
        return [self(pred, target) for pred in preds]

    def build(self, num_samples: int, num_peers: int) -> None:
        """Make what depends on these sizes."""


class SelectAll(Selector):
    """Every sample: the "all knowledge" limit of SMKD."""

    def forward(self, pred: Prediction, target: Tensor) -> Tensor:
        return torch.ones(len(target), dtype=torch.bool, device=target.device)


class SelectNone(Selector):
    """No sample: "zero knowledge", the networks train side by side and independently."""

    def forward(self, pred: Prediction, target: Tensor) -> Tensor:
        return torch.zeros(len(target), dtype=torch.bool, device=target.device)


class LowEntropy(Selector):
    """Samples with H(p) < chi, strictly; chi(t) = (ln C / eta) · 2 h(t/Γ - 0.5, b2) in nats.

    b2 = 0 is the static threshold ln C / eta (SMKD-S). b2 < 0 tightens it over training, b2 > 0
    relaxes it (SMKD-P); half way through training both equal the static one. eta = inf and a
    negative eta select nothing, eta < 1 with b2 = 0 everything. At eta = 1 rounding decides about
    uniform rows: use ``SelectAll()``.

    Args:
        eta: the larger, the stricter; 1 to 4 in the paper.
        b2: change of the threshold over training; the paper publishes its sign only.

    References:
        Li et al., "Selective mutual knowledge distillation", IJCNN 2023 (arXiv 2106.01489), the
        static and the progressive threshold.

    Notes:
        t/Γ is the progress in steps, which the paper leaves open. H is exact (0 log 0 = 0), so
        chi = 0 selects nothing.

    >>> pred = Prediction.of(torch.tensor([[5.0, 0.0], [0.1, 0.0]]))
    >>> LowEntropy(eta=2, b2=0)(pred, torch.zeros(2, 2))
    tensor([ True, False])
    """

    def __init__(self, eta: float = 2.0, b2: float = -6.0) -> None:
        super().__init__()
        why = "the threshold is ln C / eta"
        if not (isinstance(eta, int | float) and math.isinf(eta)):
            validate.number("eta", eta, why)
        self.eta = float(validate.check(eta != 0, "eta", eta, "a number other than 0", why))
        self.b2 = float(validate.number("b2", b2, "the threshold would be no number"))
        self.progress = Progress() if b2 else None

    def threshold(self, num_classes: int) -> Tensor | float:
        """chi now, in nats."""
        static = math.log(num_classes) / self.eta
        if self.progress is None:
            return static
        return static * 2.0 * logistic(self.progress.get(self) - 0.5, self.b2)

    def forward(self, pred: Prediction, target: Tensor) -> Tensor:
        return self.choose([pred], target)[0]

    def choose(
        self, preds: Sequence[Prediction], target: Tensor, index: Tensor | None = None
    ) -> list[Tensor]:
        chi = self.threshold(preds[0].num_classes)
        if isinstance(chi, float):
            chi = preds[0].log_p.new_full((), chi)
        self.stats = {"threshold": chi}
        return [pred.entropy < chi for pred in preds]

    def extra_repr(self) -> str:
        return f"eta={self.eta}, b2={self.b2}"


class Mutual(Loss):
    """L = Σ_k [ own · H(q~_k, p_k) + Σ_{j≠k} (1/n) Σ_{i: select(p_j)} H(q~_j, p_k) ] for K peers.

    Called as ``loss((z_a, z_b, ...), target)``. A mutual loss is what is taught (``refine``) times
    which samples are selected (``select``): SMKD's Table I is a grid of these calls. q~_j is the
    refined label that peer j teaches, a constant. H is linear in it, so a peer's labels add up:
    L_k = H(T_k, p_k) with T_k = own · q~_k + Σ_{j≠k} w_j q~_j.

    A loss that does not refine labels takes the place of H(q~_k, p_k); peer j then hands over its
    selected samples with their labels. Each peer gets its own ``features``, and every other input
    as it is.

    Args:
        refine: the peers' loss. Each peer gets its own copy, and so its own state.
        select: which samples a peer may teach. It is copied too.
        own: weight of each peer's own loss.
        normalize: ``"batch"``: n = B, equations 4 and 5 averaged over the batch. It does not depend
            on how a batch is cut over processes and accumulation steps. ``"selected"``: n is the
            number of selected samples, as in Algorithm 1.
        num_peers: how many networks.

    References:
        Li et al., "Selective mutual knowledge distillation", IJCNN 2023 (arXiv 2106.01489),
        equations 4 to 6 and Algorithm 1.

    Notes:
        Algorithm 1 as printed swaps the two counts and divides by zero where nothing is selected.
        Here each direction has its own count, and an empty selection is a zero that stays connected
        to the graph.
    """

    num_peers = 2

    def __init__(
        self,
        refine: Loss,
        select: Selector,
        *,
        own: float = 1.0,
        normalize: str = "batch",
        num_peers: int = 2,
        **base: Unpack[LossArguments],
    ) -> None:
        if not isinstance(refine, Loss) or refine.num_peers > 1:
            raise TypeError(f"refine must be a loss for one network, got {refine!r}")
        refine, select = copy.deepcopy(refine), copy.deepcopy(select)  # the caller's stay theirs
        labels = isinstance(refine, Refined)
        if labels and refine.class_weights is not None:
            if base.get("weight") is not None:
                raise ValueError("class weights are given twice: to the mutual loss and to refine")
            base["weight"] = refine.class_weights
        super().__init__(**base)
        if labels:  # the weights act inside H(q~, p), wherever they were given
            self.weighs_labels, refine.class_weights = True, self.class_weights
        self.normalize = validate.one_of("normalize", normalize, NORMALIZE)
        self.own = validate.number("own", own, "it is the weight of each peer's own loss")
        why = "one network has nobody to learn from"
        self.num_peers = validate.count("num_peers", num_peers, why, least=2)
        copies = [refine, *(copy.deepcopy(refine) for _ in range(num_peers - 1))]
        self.refine: Any = nn.ModuleList(copies)
        self.select = select
        self.required_inputs = refine.required_inputs | select.required_inputs
        self.layers, self.any_precision = refine.layers, labels
        self.num_samples: Any = select.num_samples
        if "index" in select.required_inputs:
            self.needs = {"num_samples": "num_samples"}
            self.complete()

    def build(self) -> None:
        self.select.build(self.num_samples, self.num_peers)

    def take_sizes(self, sizes: Sizes) -> None:
        self.settle("num_classes", sizes.num_classes)
        self.settle("num_samples", sizes.num_samples)
        for k, refine in enumerate(self.refine):
            maps = sizes.feature_dims if sizes.feature_dims is None else [sizes.feature_dims[k]]
            refine.take_sizes(dataclasses.replace(sizes, feature_dims=maps))
        self.complete()

    def per_sample(self, logits: Sequence[Tensor], target: Tensor, **inputs: Any) -> Tensor:
        preds = [Prediction.of(z) for z in logits]
        constants = [pred.constant() for pred in preds]
        masks = self.select.choose(constants, target, inputs.get("index"))
        weights = [mask.to(target.dtype) for mask in masks]
        self.log("selected", weights)
        self.logged |= self.select.stats
        weights = [self._weight(selected) for selected in weights]
        labels = [target] * self.num_peers
        if refines := isinstance(self.refine[0], Refined):
            peers = zip(self.refine, preds, constants, strict=True)
            labels = [refine.label(pred, constant, target) for refine, pred, constant in peers]
        taught = [q.detach() for q in labels]
        self.selection = list(zip(masks, taught, strict=True))

        losses = []
        for k, (refine, pred) in enumerate(zip(self.refine, preds, strict=True)):
            others = [j for j in range(self.num_peers) if j != k]
            if refines:
                own = refine.cost(pred, labels[k])
                lesson = _sum([weights[j] * refine.cost(pred, taught[j]) for j in others])
            else:
                own = self._own_loss(k, logits[k], target, inputs)
                lesson = _sum([weights[j] for j in others]) * own
            self.log(f"own_{peer_name(k)}", own)
            self.log(f"taught_{peer_name(k)}", lesson)
            self.collect(refine, "{}_" + peer_name(k))
            losses.append(torch.add(lesson, own, alpha=self.own))
        return _sum(losses)

    def _weight(self, selected: Tensor) -> Tensor:
        """What the samples of a mask [B] of 0 and 1 weigh, before a mean divides by B."""
        if self.normalize == "batch":
            return selected
        return selected * (len(selected) / selected.sum().clamp_min(1.0))

    def _own_loss(self, k: int, z: Tensor, target: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The loss [B] of peer k if it does not refine labels."""
        own = {name: v[k] if name == "features" else v for name, v in inputs.items()}
        loss = self.refine[k].run(z, target, **own)
        if loss.dim() == 0 and not isinstance(self.select, SelectNone):
            raise TypeError(
                f"{type(self.refine[k]).__name__} is one number for the whole batch: peers cannot "
                "teach selected samples with it"
            )
        return loss

    def prime(self, models: Sequence[nn.Module], loader: Iterable[Any]) -> list[Tensor]:
        """Set the r of each peer's MyLC from one pass over ``loader``: see :meth:`MyLC.prime`.

        Raises:
            TypeError: the peers have no r.
            ValueError: the networks expect different normalisations (``pretrained_cfg``), and the
                batches can be right for one of them only.
        """
        if not isinstance(self.refine[0], MyLC):
            raise TypeError(
                f"prime sets MyLC's r; these peers use {type(self.refine[0]).__name__}, "
                "which has none"
            )
        configs = [getattr(model, "pretrained_cfg", None) or {} for model in models]
        known = [(c["mean"], c["std"]) for c in configs if c.get("mean") and c.get("std")]
        if len({(tuple(mean), tuple(std)) for mean, std in known}) > 1:
            raise ValueError(
                "the networks expect different normalisations, and all would see these pixels: "
                "prime each with a loader of its own, loss.refine[k].prime(models[k], loader_k)"
            )
        peers = zip(self.refine, models, strict=True)
        return [refine.prime(model, loader) for refine, model in peers]


def _sum(tensors: list[Tensor]) -> Tensor:
    return sum(tensors[1:], tensors[0])


@register_loss("smkd")
class SMKD(Mutual):
    """SMKD: L = Σ_k [ H(q~_k, p_k) + Σ_{j≠k} mean over {i: H(p_j) < chi(t)} of H(q~_j, p_k) ].

    Each network is taught only what its peer is sure of. b2 = 0 is the static threshold (SMKD-S),
    b2 ≠ 0 the progressive one (SMKD-P). ``eta=math.inf`` is zero knowledge (independent training),
    ``eta<1, b2=0`` all knowledge.

    Args:
        refine: the label modification; None is ``MyLC()``.
        eta, b2: the threshold, see :class:`LowEntropy`. eta is searched per noise rate in
            {1, 2, 3, 4} in the paper.
        normalize, num_peers: see :class:`Mutual`.

    References:
        Li et al., "Selective mutual knowledge distillation", IJCNN 2023 (arXiv 2106.01489),
        equations 4 to 6.

    Notes:
        By default the mean is over the batch (equations 4 and 5), not over the selected samples
        (Algorithm 1: ``normalize="selected"``). The paper does not publish b1, b2 and the learning
        rates. See also :class:`Mutual`.

    >>> loss = SMKD(eta=2, b2=-6)
    >>> loss.set_progress(0.25)
    >>> peers = torch.zeros(2, 4), torch.zeros(2, 4)
    >>> loss(peers, torch.tensor([0, 1]))  # nobody is sure: two plain cross-entropies
    tensor(2.7726)
    """

    def __init__(
        self,
        refine: Loss | None = None,
        eta: float = 2.0,
        b2: float = -6.0,
        normalize: str = "batch",
        num_peers: int = 2,
        **base: Unpack[LossArguments],
    ) -> None:
        refine, select = refine or MyLC(), LowEntropy(eta, b2)
        super().__init__(refine, select, normalize=normalize, num_peers=num_peers, **base)
