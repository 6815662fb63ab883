"""Every loss with inputs as the hosted module feeds them, for the tests of what all losses keep.

``CASES`` holds each registered loss, and some that are put together. A new loss is in it once it is
registered; only an argument without a default needs a value in ``ARGUMENTS``.
"""

import dataclasses
import functools
import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from helpers.tiny import Staged
from kd_plugins import (
    CE,
    DIST,
    DKD,
    DML,
    GCE,
    KD,
    MKD,
    RKD,
    SMKD,
    FitNet,
    GMMSelector,
    LabelRevision,
    LowEntropy,
    MaskedLoss,
    Mutual,
    MyLC,
    ProSelfLC,
    SelectAll,
    Sum,
    create_loss,
    list_losses,
)
from kd_plugins.losses import loss_class
from kd_plugins.losses.mixing import Mixed
from kd_plugins.models import PeerModule

B, C, T = 8, 4, 2  # samples, classes, teachers
N = 16  # rows of the training data
STUDENT, TEACHER = (2, 3, 6), (2, 3, 5)  # channels of the maps, shallow to deep
SIDES = (4, 3, 3)  # of these maps
MASK = [i % 3 != 1 for i in range(N)]

ARGUMENTS = {  # of constructors that have no default: parameter -> value for c classes
    "transition": lambda c: 0.8 * torch.eye(c) + 0.2 / c,
    "labels": lambda c: torch.randn(N, c).softmax(1),
    "heads": lambda c: [nn.Linear(TEACHER[-1], c) for _ in range(T)],
}


def required(cls):
    """The parameters of a constructor that need a value."""
    parameters = inspect.signature(cls).parameters.values()
    needed = {"heads", *(p.name for p in parameters if p.default is p.empty)}
    return [p.name for p in parameters if p.name in needed and p.kind != p.VAR_KEYWORD]


def registered(name, classes, **kwargs):
    arguments = {p: ARGUMENTS[p](classes) for p in required(loss_class(name))}
    return create_loss(name, **arguments | kwargs)


def build_sum(*terms):
    return lambda classes, **kwargs: Sum([(w, make()) for w, make in terms], **kwargs)


def build_mutual(refine, select, **settings):
    return lambda classes, **kwargs: Mutual(refine(), select(), **settings | kwargs)


def build_masked(term, **settings):
    return lambda classes, **kwargs: MaskedLoss(MASK, term(), **settings | kwargs)


def build_with(cls, **options):
    return lambda classes, **kwargs: cls(**options | kwargs)


def build_revised(term):
    return lambda classes, **kwargs: LabelRevision(term(), **kwargs)


COMPOSED = {
    "sum": build_sum((0.5, MyLC), (2, GCE), (1, ProSelfLC)),
    "sum-taught": build_sum((0.1, CE), (0.9, KD), (0.5, FitNet)),
    "sum-peers": build_sum((0.5, MKD), (1, SMKD)),
    "mutual-all": build_mutual(lambda: MyLC(detach=False), SelectAll, own=0.5),
    "mutual-three": build_mutual(MyLC, LowEntropy, normalize="selected", num_peers=3),
    "mutual-unrefined": build_mutual(GCE, lambda: LowEntropy(1.2, b2=0.0)),
    "mutual-sum": build_mutual(lambda: 0.5 * MyLC() + CE(), LowEntropy),
    "mutual-mixture": build_mutual(CE, GMMSelector),
    "mutual-features": build_mutual(FitNet, SelectAll),
    "kd-standardized": build_with(KD, temperature=2.0, standardize=True),
    "dkd-growing": build_with(DKD, warmup=0.9, standardize=True),
    "revised-dist": build_revised(lambda: DIST(standardize=True)),
    "revised-dkd": build_revised(DKD),
    "masked": build_masked(MyLC),
    "masked-taught": build_masked(KD, normalize="selected"),
    "masked-features": build_masked(FitNet),
    "masked-relations": build_masked(RKD),
    "masked-peers": build_masked(DML),
}

# name -> builder(classes, **kwargs), where kwargs are the keywords of every loss
CASES = {name: functools.partial(registered, name) for name in list_losses()} | COMPOSED

every = pytest.mark.parametrize("name", CASES)


def make(name, classes=C, progress=0.7, **kwargs):
    """The loss of a case, the same at each call, with all sizes known."""
    torch.manual_seed(0)
    loss = CASES[name](classes, **kwargs)
    loss.bind(N, classes, [STUDENT] * loss.num_peers, [TEACHER] * T)
    if progress is not None:
        loss.set_progress(progress)
    return loss


@dataclasses.dataclass
class Batch:
    """Inputs of one call. ``batch(loss)`` is the call; it fixes whatever a loss draws at random."""

    logits: list[Tensor]
    target: Tensor
    extra: dict

    def __call__(self, loss):
        torch.manual_seed(0)
        logits = tuple(self.logits) if loss.num_peers > 1 else self.logits[0]
        return loss(logits, self.target, **self.extra)

    def each(self, fn):
        """fn on every tensor."""
        return Batch(*(tree_map(fn, getattr(self, f.name)) for f in dataclasses.fields(self)))

    def map(self, fn):
        """fn on every floating tensor.

        The results are new leaves, which want a gradient where ours did.
        """

        def leaf(t):
            if not t.is_floating_point():
                return t
            return fn(t.detach()).clone().requires_grad_(t.requires_grad)

        return self.each(leaf)

    def take(self, order):
        """The samples in this order."""

        def rows(t):
            return t.detach()[order].requires_grad_(t.requires_grad)

        apart = ("teacher", "mixed")
        taken = {k: tree_map(rows, v) for k, v in self.extra.items() if k not in apart}
        if "teacher" in self.extra:
            taken["teacher"] = self.extra["teacher"][:, order]
        if mixed := self.extra.get("mixed"):
            partner = order.argsort()[mixed.partner[order]]
            taken["mixed"] = mixed._replace(guess=mixed.guess[:, order], partner=partner)
        return Batch([rows(z) for z in self.logits], self.target[order], taken)

    def replace(self, **fields):
        return dataclasses.replace(self, **fields)


def batch_for(loss, b=B, classes=C, dtype=torch.float32):
    """What the hosted module would feed: maps in lists, for peers one list each."""
    g = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    def maps(channels):
        drawn = [draw(b, d, side, side) for d, side in zip(channels, SIDES, strict=True)]
        return drawn if any(layer != -1 for layer in loss.layers) else drawn[-1:]

    # unsure and sure rows, so that a selector sees both
    scale = torch.tensor([0.3, 1.0, 3.0, 6.0] * b, dtype=dtype)[:b, None]
    several = loss.num_peers > 1
    features = [maps(STUDENT) for _ in range(loss.num_peers)]
    tree_map(Tensor.requires_grad_, features)
    extra = {
        "teacher": draw(T, b, classes) * 2,
        "features": features if several else features[0],
        "teacher_features": [maps(TEACHER) for _ in range(T)],
        "index": torch.arange(b).roll(1) + 3,
    }
    extra = {k: v for k, v in extra.items() if k in loss.required_inputs}
    if "mixed" in loss.required_inputs:
        guess = draw(loss.num_peers, b, classes).softmax(-1)
        extra["mixed"] = Mixed(guess, torch.arange(b).roll(2), torch.tensor(0.75, dtype=dtype))
    logits = [(draw(b, classes) * scale).requires_grad_() for _ in range(loss.num_peers)]
    target = torch.arange(b).roll(3) % classes
    # a sure row that agrees with its label: what prunes or selects keeps something
    target[-1] = logits[0][-1].argmax()
    return Batch(logits, target, extra)


def pair(name, **kwargs):
    """The loss (its parameters too) and a batch in float64; its own buffers stay as they are."""
    loss = make(name, **kwargs).double()
    return loss, batch_for(loss, dtype=torch.float64)


def leaves(x):
    """The tensors of a batch that a network has computed: logits and maps."""
    return [*x.logits, *tree_leaves(x.extra.get("features", []))]


def learns_from_logits(loss):
    """False for a term on features only."""
    x = batch_for(loss)
    grads = torch.autograd.grad(x(loss), x.logits, allow_unused=True)
    return all(grad is not None for grad in grads)


def hosted(name, seed=0):
    """The loss of a case with tiny networks, and teachers where it wants them, as in training."""
    loss = make(name)
    peers = [Staged(STUDENT, C, seed + k) for k in range(loss.num_peers)]
    taught = loss.ema_decay is None and loss.required_inputs & {"teacher", "teacher_features"}
    teachers = [Staged(TEACHER, C, seed + 10 + t) for t in range(T if taught else 0)]
    return PeerModule(peers, loss, teachers).train()
