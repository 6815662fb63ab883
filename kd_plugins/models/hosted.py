"""Networks, teachers and loss under one forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..losses.base import Loss, peer_name
from ..losses.mutual import Mutual
from ..losses.state import SampleTable
from .factory import input_names, logits_of
from .features import with_features
from .inputs import InputAdapter


class Hosted(nn.Module):
    """Peers, teachers and loss under one forward: one module for the Trainer, one state dict.

    In training mode it returns ``{"loss"}`` and leaves diagnostics in ``stats``. In eval mode it
    returns ``{"loss", "logits" [B, K, C]}`` with the plain cross-entropy, mean over peers, which
    compares across methods; without labels ``{"logits"}``.

    Batches hold ``pixel_values``, which each network gets through its :class:`InputAdapter`, or
    any other inputs (``input_ids``, ``attention_mask``), which each network gets if its ``forward``
    names them. Teachers run in eval mode without gradient and are not in the state dict. For a loss
    with ``ema_decay`` the teachers are the peers with weights averaged over time, which are in it.

    Args:
        peers: the networks that learn.
        criterion: their loss.
        teachers: trained networks, for a loss that reads ``teacher`` or ``teacher_features``.

    Attributes:
        stats: diagnostics of the last training forward.
        last: ``logits`` (a tuple of detached [B, C]), ``labels`` and ``index`` of the last training
            forward.
    """

    _keys_to_ignore_on_save = None  # the Trainer asks this of every model
    accepts_loss_kwargs = False

    def __init__(
        self, peers: Sequence[nn.Module], criterion: Loss, teachers: Sequence[nn.Module] = ()
    ) -> None:
        super().__init__()
        self.peers: Any = nn.ModuleList(peers)
        self.criterion = criterion
        self.teachers = list(teachers)  # a plain list: not in the state dict
        networks = [*peers, *teachers]
        self.inputs = nn.ModuleList(InputAdapter(model, peers[0]) for model in networks)
        self.names = [input_names(model) for model in networks]
        self.main_input_name = getattr(peers[0], "main_input_name", "pixel_values")
        self.deep = any(layer != -1 for layer in criterion.layers)
        self.stats: dict[str, Tensor] = {}
        self.last: dict[str, Any] = {}
        self.watch = False  # see DynamicsCallback
        self.seen: dict[str, Tensor] = {}
        decay = criterion.ema_decay
        averages = [average_of(peer, decay) for peer in peers] if decay is not None else None
        self.averages: Any = nn.ModuleList(averages) if averages else None
        self._modes: dict[nn.Module, bool] = {}
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

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        index: Tensor | None = None,
        clean_labels: Tensor | None = None,
        teacher: Tensor | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        if pixel_values is not None:
            inputs["pixel_values"] = pixel_values
        if not self.training:
            return self._evaluate(inputs, labels, clean_labels)
        if labels is None:
            raise ValueError(
                f"the training batch has no labels, only {sorted(inputs)}: there is nothing to "
                "learn from. Rows need a 'labels' (or 'label') entry"
            )
        required, several = self.criterion.required_inputs, self.criterion.num_peers > 1
        runs = [
            self._run(peer, k, inputs, "features" in required) for k, peer in enumerate(self.peers)
        ]
        logits = [z for z, _ in runs]
        extra: dict[str, Any] = {}
        if "features" in required:
            extra["features"] = [maps for _, maps in runs] if several else runs[0][1]
        if "index" in required:
            extra["index"] = index
        extra |= self._ask_teachers(inputs, teacher)
        loss = self.criterion(tuple(logits) if several else logits[0], labels, **extra)
        self.last = {"logits": tuple(z.detach() for z in logits), "labels": labels, "index": index}
        self.stats = {"loss": loss.detach(), **self.criterion.stats}
        if clean_labels is not None:
            self.stats |= self._purity(clean_labels)
        if self.watch:
            self.seen = self._figures(logits, labels, index)
        return {"loss": loss}

    def _evaluate(
        self, inputs: dict[str, Any], labels: Tensor | None, clean_labels: Tensor | None
    ) -> dict[str, Tensor]:
        logits = [self._run(peer, k, inputs)[0].float() for k, peer in enumerate(self.peers)]
        output = {"logits": torch.stack(logits, dim=1)}  # [B, K, C]
        if clean_labels is not None:
            output["clean_labels"] = clean_labels
        if labels is None:
            return output
        labels = labels.long() if labels.dim() == 1 else labels  # also distributions [B, C]
        losses = [F.cross_entropy(z, labels.to(z.device)) for z in logits]
        return {"loss": torch.stack(losses).mean()} | output

    def _run(
        self, model: nn.Module, k: int, inputs: dict[str, Any], with_maps: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits of a network that takes input k, and its maps where they are wanted."""
        pixels = inputs.get("pixel_values")
        named = {name: inputs[name] for name in self.names[k] or inputs if name in inputs}
        if pixels is None:
            if not named:
                raise ValueError(
                    f"the batch has none of the inputs of {type(model).__name__}: expected "
                    f"pixel_values, or some of {self.names[k]}; it has {sorted(inputs)}"
                )
            return logits_of(model(**named)), []
        dtype = next(model.parameters(), pixels).dtype  # bf16_full_eval casts the weights only
        pixels = self.inputs[k](pixels).to(dtype)
        if with_maps:
            return with_features(model, pixels, self.deep)
        return logits_of(model(pixels)), []

    @torch.no_grad()
    def _ask_teachers(self, inputs: dict[str, Any], cached: Tensor | None) -> dict[str, Any]:
        """What the loss reads of the teachers (or of the averages), or what the batch brings."""
        required = self.criterion.required_inputs & {"teacher", "teacher_features"}
        if cached is not None and "teacher" in required:
            return {"teacher": cached.transpose(0, 1)}  # [B, T, C] as items are collated
        if not required:
            return {}
        averaged = self.averages is not None
        teachers = self.averages if averaged else self.teachers
        first = 0 if averaged else len(self.peers)  # an average takes the input of its peer
        maps = "teacher_features" in required
        if any(teacher.training for teacher in self.teachers):
            self._hold_teachers()
        runs = [self._run(model, first + t, inputs, maps) for t, model in enumerate(teachers)]
        taught: dict[str, Any] = {"teacher_features": [maps for _, maps in runs]} if maps else {}
        if "teacher" in required:
            taught["teacher"] = torch.stack([z.float() for z, _ in runs])
        return taught

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
        """Teachers are in eval mode while it trains; :meth:`eval` hands them back as they came."""
        super().train(mode)
        for average in self.averages or ():
            average.eval()
        if mode:
            self._hold_teachers()
        else:
            self.release_teachers()
        return self

    def _hold_teachers(self) -> None:
        for teacher in self.teachers:
            if teacher not in self._modes:
                self._modes |= {module: module.training for module in teacher.modules()}
            if teacher.training:
                teacher.eval()

    def release_teachers(self) -> None:
        """Put every teacher into the mode (train or eval) in which it was given."""
        for module, mode in self._modes.items():
            module.training = mode
        self._modes = {}

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


def average_of(peer: nn.Module, decay: float) -> AveragedModel:
    """A copy whose weights and statistics are averaged over steps.

    avg <- d avg + (1 - d) now, with d = min(1 - 1/(n + 1), decay) after n steps.
    """

    def step(average: Tensor, now: Tensor, n: Tensor) -> Tensor:
        if not now.is_floating_point():  # BatchNorm counts its batches
            return now
        return average.lerp(now, (1.0 / (n + 1.0)).clamp(min=1.0 - decay).to(now.dtype))

    return AveragedModel(peer, avg_fn=step, use_buffers=True).requires_grad_(False).eval()  # type: ignore[arg-type]
