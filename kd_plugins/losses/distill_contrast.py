"""Contrastive distillation: each network's embedding is compared with a bank of the other's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import validate
from .base import LossArguments
from .distill_features import MapDistillation, Maps, TeacherMaps
from .maps import pooled
from .registry import register_loss
from .state import KeepsPrecision, SampleTable, sum_over_ranks


class _Contrast(KeepsPrecision):
    """A student and a teacher, their embeddings and their banks.

    Args:
        loss: the loss that it is a part of.
        teacher_dim: channels of the teacher's map.
        start: for the first content of the banks.
    """

    z: Tensor

    def __init__(self, loss: CRD, teacher_dim: int, start: torch.Generator) -> None:
        super().__init__()
        self.tau, self.momentum, self.num_samples = loss.tau, loss.momentum, loss.num_samples
        dims, size = (loss.student_dim, teacher_dim), loss.feat_dim
        self.embeds: Any = nn.ModuleList(nn.Linear(d, size) for d in dims)
        self.banks: Any = nn.ModuleList(SampleTable(self.num_samples, size) for _ in dims)
        bound = math.sqrt(3 / size)  # E ‖m‖² = 1
        bank: Any
        for bank in self.banks:
            bank.rows.uniform_(-bound, bound, generator=start)
        self.register_buffer("z", torch.zeros(2))  # 0: not known yet

    def forward(self, maps: Sequence[Tensor], index: Tensor, negatives: Tensor) -> Tensor:
        """The loss [B] of the samples at positions ``index``, with the rows of ``negatives``."""
        anchors = [
            F.normalize(embed(pooled(f)), dim=1) for embed, f in zip(self.embeds, maps, strict=True)
        ]
        score = self._scores(anchors, index, negatives)  # [2, B, 1 + K]
        noise = len(negatives) / self.num_samples  # K P_n
        learns = self.moves_state
        z = self._normalizer(score.detach(), learns)
        log_odds = score - (noise * z).log()[:, None, None]
        if learns:
            self._store(anchors, index)
        return (F.softplus(-log_odds[..., 0]) + F.softplus(log_odds[..., 1:]).sum(-1)).sum(0)

    def _scores(self, anchors: Sequence[Tensor], index: Tensor, negatives: Tensor) -> Tensor:
        """s of each anchor with its own row and K others in the bank of the other network."""
        b, rows, scores = len(index), torch.cat([index, negatives]), []
        for v, bank in zip(anchors, (self.banks[1], self.banks[0]), strict=True):
            # The positives come from a matrix product too. torch.compile reads what feeds only
            # elementwise products again in the backward pass, from banks that have changed by then
            # (pytorch/pytorch#197039).
            found = v @ bank.read(rows).to(v.dtype).T / self.tau  # [B, B + K]
            scores.append(torch.cat([found[:, :b].diagonal()[:, None], found[:, b:]], dim=1))
        return torch.stack(scores)

    @torch.no_grad()
    def _normalizer(self, score: Tensor, learns: bool) -> Tensor:
        """Z of both directions, [2]: N times the mean e^score of the first batch of all ranks."""
        total = torch.cat([score.exp().sum((1, 2)), score.new_full((1,), score[0].numel())])
        if learns:
            total = sum_over_ranks(total)
        now = self.num_samples * total[:2] / total[2]
        z = torch.where(self.z > 0, self.z, now.to(self.z.dtype))
        if learns:
            self.z.copy_(torch.where(z.isfinite(), z, self.z))
        return z.to(score.dtype)

    @torch.no_grad()
    def _store(self, anchors: Sequence[Tensor], index: Tensor) -> None:
        for v, bank in zip(anchors, self.banks, strict=True):
            kept = self.momentum * bank.read(index).to(v.dtype)
            bank.write(index, F.normalize(kept + (1.0 - self.momentum) * v.detach(), dim=1))


@register_loss("crd")
class CRD(MapDistillation):
    """Contrastive distillation, L = mean_k Σ_{a,b} [ -ln D(s_ab) - Σ_negatives ln(1 - D(s)) ].

    D = P / (P + K/N) with P = e^s / Z and s = <u_a, m_b> / tau. u_a is the unit embedding (a
    learned linear layer) of the pooled last map of a. m_b is a row of b's memory bank, which holds
    the embedding of each of the N training samples. (a, b) is (student, teacher) and (teacher,
    student). The sample's own row is the positive; K rows drawn at random are the negatives. The
    first batch sets Z to N times the mean e^s, and Z stays. After the loss, in training,
    m <- momentum m + (1 - momentum) u, normalised. The usual weight is 0.8.

    The banks take 8 · N · feat_dim bytes per teacher, on the device and in each checkpoint
    (CIFAR-100: 51 MB).

    Args:
        num_samples: N, rows of the training data; ``index`` counts in them. :meth:`bind` can fill
            in this, ``student_dim`` and ``teacher_dims``.
        student_dim: channels of the student's last map.
        teacher_dims: of the teacher's, or of each teacher's.
        feat_dim: size of the embeddings.
        negatives: K; more than N - 1 are not drawn.
        tau: temperature.
        momentum: of the banks.

    References:
        Tian et al., "Contrastive representation distillation", ICLR 2020, as in its public code.

    Notes:
        The K negatives are drawn once for the batch, not for each sample: as likely, K rows to
        gather instead of B K, and nothing depends on the order of the samples. As in the code they
        are drawn with replacement and may include a sample's own row. The code's 1e-7 in D is not
        needed. Each teacher has embeddings and banks of its own; the mean over teachers is not from
        the paper.
    """

    num_samples: Any
    needs: Mapping[str, str] = {"num_samples": "num_samples", **MapDistillation.needs}

    def __init__(
        self,
        num_samples: int | None = None,
        student_dim: int | None = None,
        teacher_dims: int | Sequence[int] | None = None,
        feat_dim: int = 128,
        negatives: int = 16384,
        tau: float = 0.07,
        momentum: float = 0.5,
        **base: Unpack[LossArguments],
    ) -> None:
        super().__init__(student_dim, teacher_dims, -1, **base)
        self.num_samples, self.feat_dim = num_samples, feat_dim
        self.negatives = validate.count("negatives", negatives, "nothing would be told apart")
        self.tau = validate.check(tau >= 0.02, "tau", tau, "0.02 or more; e^(1 / tau) overflows")
        still = "at 1 the banks would stay random"
        self.momentum = validate.fraction("momentum", momentum, still, with_one=False)
        self.complete()

    def build(self) -> None:
        validate.count("num_samples", self.num_samples, "one has no negatives", least=2)
        self.negatives = min(self.negatives, self.num_samples - 1)
        # DDP does not send tables: all processes have to begin with the same
        start = torch.Generator().manual_seed(0)
        contrasts = (_Contrast(self, dim, start) for dim in self.teacher_dims)
        self.contrasts: Any = nn.ModuleList(contrasts)

    def per_sample(
        self,
        logits: Tensor,
        target: Tensor,
        features: Maps,
        teacher_features: TeacherMaps,
        index: Tensor,
    ) -> Tensor:
        student, teachers = self.maps(logits, features, teacher_features)
        negatives = torch.randint(self.num_samples, (self.negatives,), device=index.device)
        pairs = zip(self.contrasts, teachers, strict=True)
        losses = [contrast((student, teacher), index, negatives) for contrast, teacher in pairs]
        return torch.stack(losses).mean(0)
