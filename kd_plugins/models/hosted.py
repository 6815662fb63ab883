"""Networks, teachers and loss under one forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..losses.base import Loss, peer_name
from ..losses.mutual import Mutual
from ..losses.online_features import PCL
from ..losses.state import SampleTable
from .factory import logits_of
from .features import with_features
from .inputs import _Input


class Hosted(nn.Module):
    """Peers, teachers and criterion under one forward: one module for the Trainer, one wrap for DDP, one state dict.

    In training mode it returns ``{"loss"}`` and leaves the diagnostics of the step in ``stats``; in eval mode
    ``{"loss", "logits" [B, K, C]}`` with the plain cross-entropy, mean over peers, which compares across methods.
    Teachers are frozen, in eval mode, and not in the state dict. PCL gets as ``teacher`` the peers
    with their weights averaged over time, which are in it: :meth:`average` takes the peers in, after each step.
    With ``watch`` on, ``seen`` holds what the last training batch looked like to each peer, sample by sample.
    """

    _keys_to_ignore_on_save = (
        None  # what the Trainer asks of a module that is not a PreTrainedModel
    )
    accepts_loss_kwargs = False
    main_input_name = "pixel_values"

    def __init__(
        self, peers: Sequence[nn.Module], criterion: Loss, teachers: Sequence[nn.Module] = ()
    ) -> None:
        super().__init__()
        self.peers: Any = nn.ModuleList(peers)
        self.criterion = criterion
        self.inputs = nn.ModuleList(_Input(model, peers[0]) for model in [*peers, *teachers])
        self.teachers = [
            teacher.requires_grad_(False).eval() for teacher in teachers
        ]  # a list: not in the state dict
        self.deep = any(layer != -1 for layer in layers_of(criterion))
        self.stats: dict[str, Tensor] = {}
        self.watch = False  # see DynamicsCallback
        self.seen: dict[str, Tensor] = {}
        ema = averages_of(criterion)
        self.averages: Any = (
            nn.ModuleList(_average(peer, ema) for peer in peers) if ema is not None else None
        )
        # all ranks write the same rows into their tables: DDP need not send them at every step
        self._ddp_params_and_buffers_to_ignore = [
            f"criterion.{name}.rows"
            for name, module in criterion.named_modules()
            if isinstance(module, SampleTable)
        ]

    def average(self) -> None:
        """Take the peers' weights into their averages over time, where the loss wants these."""
        for average, peer in zip(self.averages or (), self.peers, strict=self.averages is not None):
            average.update_parameters(peer)

    def _apply(self, fn: Any, recurse: bool = True) -> Hosted:
        for teacher in self.teachers:
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _run(
        self, model: nn.Module, k: int, pixels: Tensor, features: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits of a network that takes input k, and its maps where they are wanted."""
        dtype = next(model.parameters(), pixels).dtype  # bf16_full_eval casts the weights only
        pixels = self.inputs[k](pixels).to(dtype)
        return (
            with_features(model, pixels, self.deep) if features else (logits_of(model(pixels)), [])
        )

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        index: Tensor | None = None,
        clean_labels: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> dict[str, Tensor]:
        wants = self.criterion.reads if self.training and labels is not None else frozenset()
        runs = [
            self._run(model, k, pixel_values, "features" in wants)
            for k, model in enumerate(self.peers)
        ]
        logits = [z for z, _ in runs]
        if not self.training or labels is None:
            output = {"logits": torch.stack([z.float() for z in logits], dim=1)}  # [B, K, C]
            if clean_labels is not None:
                output["clean_labels"] = clean_labels
            if labels is not None:
                log_p = output["logits"].log_softmax(-1)
                output = {
                    "loss": -log_p.gather(
                        -1, labels.view(-1, 1, 1).expand(-1, log_p.shape[1], 1)
                    ).mean()
                } | output
            return output

        extra: dict[str, Any] = {}
        if teacher is not None:  # [B, T, C], as items of a cache are collated
            extra = {"teacher": teacher.transpose(0, 1)}
        elif wants & {"teacher", "teacher_features"}:
            masters = self.teachers if self.averages is None else self.averages
            first = (
                len(self.peers) if self.averages is None else 0
            )  # an average takes the input of its peer
            with torch.no_grad():
                taught = [
                    self._run(model, first + t, pixel_values, "teacher_features" in wants)
                    for t, model in enumerate(masters)
                ]
            extra = {
                "teacher": torch.stack([z.float() for z, _ in taught]),
                "teacher_features": [f for _, f in taught],
            }
        if "features" in wants:
            features = [maps for _, maps in runs]
            extra["features"] = features if self.criterion.peers else features[0]
        if "index" in wants:
            extra["index"] = index
        extra = {name: value for name, value in extra.items() if name in wants}
        loss = self.criterion(tuple(logits) if self.criterion.peers else logits[0], labels, **extra)
        self.stats = {"loss": loss.detach(), **self.criterion.stats}
        if clean_labels is not None:
            self.stats |= self._purity(clean_labels)
        if self.watch:
            self.seen = self._figures(logits, labels, index)
        return {"loss": loss}

    @torch.no_grad()
    def _figures(
        self, logits: list[Tensor], labels: Tensor, index: Tensor | None
    ) -> dict[str, Tensor]:
        """Index and label [B]; predicted class, its probability and the label's [B, K]; selected [B, K] where the loss selects."""
        if index is None:
            raise ValueError(
                "training dynamics are kept by sample, and the batches have no index: expected rows with index, the "
                "position in the data set, as ImageView hands out; else nobody knows whose they are"
            )
        label = labels if labels.dim() == 1 else labels.argmax(-1)
        p = torch.stack([z.detach().float() for z in logits], dim=1).softmax(-1)  # [B, K, C]
        conf, pred = p.max(-1)
        p_label = p.gather(-1, label.view(-1, 1, 1).expand(-1, p.shape[1], 1)).squeeze(-1)
        small = torch.int16 if p.shape[-1] <= 2**15 else torch.int32
        seen = {
            "index": index,
            "label": label.to(small),
            "pred": pred.to(small),
            "conf": conf,
            "p_label": p_label,
        }
        masks = [
            torch.stack([mask for mask, _ in module.selection], dim=1)
            for module in self.criterion.modules()
            if isinstance(module, Mutual) and module.selection
        ]
        return seen | {"selected": torch.stack(masks).any(0)} if masks else seen

    def _purity(self, clean_labels: Tensor) -> dict[str, Tensor]:
        """Share of the batch that was selected, and of it with the true class taught, per peer (also of a term of a sum)."""
        shares = {}
        for module in self.criterion.modules():
            for k, (mask, taught) in enumerate(
                module.selection if isinstance(module, Mutual) else ()
            ):
                shares[f"selected_{peer_name(k)}"] = mask.float().mean()
                shares[f"selected_right_{peer_name(k)}"] = (
                    (mask & (taught == clean_labels)).float().mean()
                )
        return shares

    def train(self, mode: bool = True) -> Hosted:
        super().train(mode)
        for teacher in [*self.teachers, *(self.averages or ())]:
            teacher.eval()
        return self

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Trade compute for memory in every peer that knows how to; the Trainer calls this."""
        for peer in self.peers:
            if hasattr(peer, "set_grad_checkpointing"):
                peer.set_grad_checkpointing(True)
            elif hasattr(peer, "activation_checkpointing_enable"):
                peer.activation_checkpointing_enable(**kwargs)
            else:
                raise ValueError(
                    f"{type(peer).__name__} has no activation checkpointing: switch it off in the arguments"
                )


def layers_of(loss: Loss) -> set[int]:
    """The layers that a loss (or a term of a sum) reads features of: its ``layer`` or ``layers``."""
    modules = [module for module in loss.modules() if isinstance(module, Loss)]
    return {
        n
        for m in modules
        for n in (*getattr(m, "layers", ()), *([m.layer] if hasattr(m, "layer") else ()))
    }


def averages_of(loss: Loss) -> float | None:
    """The decay of the averages over time that a loss (or a term of a sum) learns from; None if it asks for none."""
    return next((module.ema for module in loss.modules() if isinstance(module, PCL)), None)


def _average(peer: nn.Module, decay: float) -> AveragedModel:
    """A copy whose weights and statistics are averaged over steps: avg <- d avg + (1 - d) now, d = min(1 - 1/(n+1), decay)."""

    def step(average: Tensor, now: Tensor, n: Tensor) -> Tensor:
        if not now.is_floating_point():  # BatchNorm counts its batches
            return now
        return average.lerp(now, (1.0 / (n + 1.0)).clamp(min=1.0 - decay).to(now.dtype))

    return AveragedModel(peer, avg_fn=step, use_buffers=True).requires_grad_(False).eval()  # type: ignore[arg-type]
