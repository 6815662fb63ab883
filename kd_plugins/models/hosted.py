"""Networks, teachers and loss under one forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..losses.base import Loss, peer_name
from ..losses.mixing import MixedLoss
from ..losses.state import SampleTable, eval_mode
from .factory import input_names, logits_of
from .features import with_features
from .inputs import InputAdapter, Normalization


class PeerModule(nn.Module):
    """Peers, teachers and loss under one forward: one module for the Trainer, one state dict.

    In training mode it returns ``{"loss"}`` and leaves diagnostics in ``stats``. In eval mode it
    returns ``{"loss", "logits" [B, K, C]}`` with the plain cross-entropy, mean over peers, which
    compares across methods; without labels ``{"logits"}``.

    Batches hold ``pixel_values``, which each network gets through its :class:`InputAdapter`, or
    any other inputs (``input_ids``, ``attention_mask``), which each network gets if its ``forward``
    names them. Teachers run in eval mode without gradient and are not in the state dict. For a loss
    with ``ema_decay`` the teachers are the peers with weights averaged over time, which are in it.

    A :class:`MixedLoss` learns from mixtures of pictures, of ``pixel_values`` and, if the batch has
    one, ``second_view``.

    Args:
        peers: the networks that learn.
        criterion: their loss.
        teachers: trained networks, for a loss that reads ``teacher`` or ``teacher_features``.
        normalization: (mean, std) by which the data normalises floats, where they say it.

    Attributes:
        stats: diagnostics of the last training forward.
        last: of the last training forward, ``logits`` (a tuple of detached [B, C]), ``labels`` and
            ``index`` (None if the batch has none).
    """

    _keys_to_ignore_on_save = None  # the Trainer asks this of every model
    accepts_loss_kwargs = False

    def __init__(
        self,
        peers: Sequence[nn.Module],
        criterion: Loss,
        teachers: Sequence[nn.Module] = (),
        normalization: Normalization | None = None,
    ) -> None:
        super().__init__()
        self.peers: Any = nn.ModuleList(peers)
        self.criterion = criterion
        self.teachers = Teachers(teachers)
        networks = [*peers, *teachers]
        self.inputs = nn.ModuleList(
            InputAdapter(network, peers[0], normalization) for network in networks
        )
        self.names = [input_names(network) for network in networks]
        self.main_input_name = getattr(peers[0], "main_input_name", "pixel_values")
        self.deep = any(layer != -1 for layer in criterion.layers)
        self.averages: Any = None
        if criterion.ema_decay is not None:
            self.averages = nn.ModuleList(average_of(peer, criterion.ema_decay) for peer in peers)
        self.stats: dict[str, Tensor] = {}
        self.last: dict[str, Any] = {}
        # all ranks write the same rows into their tables: DDP need not send them at every step
        self._ddp_params_and_buffers_to_ignore = [
            f"criterion.{name}.rows"
            for name, module in criterion.named_modules()
            if isinstance(module, SampleTable)
        ]

    # ------------------------------------------------------------------------------------ forward

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
        loss, logits = self._learn(inputs, labels, index, teacher)
        self.last = {"logits": tuple(z.detach() for z in logits), "labels": labels, "index": index}
        self.stats = {"loss": loss.detach(), **self.criterion.stats}
        if clean_labels is not None:
            self.stats |= _rightly_selected(self.criterion.selection, clean_labels)
        return {"loss": loss}

    def _learn(
        self, inputs: dict[str, Any], labels: Tensor, index: Tensor | None, cached: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss and the peers' logits."""
        if isinstance(self.criterion, MixedLoss):
            return self._learn_mixed(inputs, labels, index)
        required, several = self.criterion.required_inputs, self.criterion.num_peers > 1
        with_maps = "features" in required
        runs = [self._run(peer, k, inputs, with_maps) for k, peer in enumerate(self.peers)]
        logits, maps = [z for z, _ in runs], [m for _, m in runs]
        extra: dict[str, Any] = {}
        if with_maps:
            extra["features"] = maps if several else maps[0]
        if "index" in required:
            extra["index"] = index
        if "teacher" in required and cached is not None:
            extra["teacher"] = cached.transpose(0, 1)  # [B, T, C], as items are collated
        elif required & {"teacher", "teacher_features"}:
            extra |= self.ask_teachers(inputs)
        return self.criterion(tuple(logits) if several else logits[0], labels, **extra), logits

    def _learn_mixed(
        self, inputs: dict[str, Any], labels: Tensor, index: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss on mixtures of pictures, and the logits of the unmixed ones."""
        if "pixel_values" not in inputs:
            kind = type(self.criterion).__name__
            raise ValueError(f"{kind} mixes pictures: expected pixel_values, got {sorted(inputs)}")
        criterion: Any = self.criterion
        views = [inputs[name] for name in ("pixel_values", "second_view") if name in inputs]
        guess = self._guess(views)

        def repeated(rows: Tensor | None, dim: int = 0) -> Any:
            return rows if rows is None else torch.cat([rows] * len(views), dim)

        mixed, pixels, logits = criterion.draw(repeated(guess, 1)), torch.cat(views), []
        for k, peer in enumerate(self.peers):
            logits.append(logits_of(peer(mixed.blend(self._adapted(peer, k, pixels)))))
        given = {"index": repeated(index), "mixed": mixed}
        loss = criterion(tuple(logits), repeated(labels), **given)
        # all views of a picture have one label: what is kept of a step has a row per picture
        rows = len(labels)
        criterion.selection = [(mask[:rows], q[:rows]) for mask, q in criterion.selection or ()]
        return loss, list(guess.clamp_min(torch.finfo(guess.dtype).tiny).log())

    def _guess(self, views: Sequence[Tensor]) -> Tensor:
        """What each network, or its average over time, says of the pictures: [K, B, C].

        It is the mean of the probabilities over the views, in eval mode and without gradient.
        """
        networks = self.peers if self.averages is None else self.averages
        with eval_mode(*networks):
            logits = [
                torch.stack([self._run(model, k, {"pixel_values": v})[0].float() for v in views])
                for k, model in enumerate(networks)
            ]
            return torch.stack(logits).softmax(-1).mean(1)

    @torch.no_grad()
    def ask_teachers(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the loss reads of the teachers, or of the averages, for the inputs of a batch."""
        required, first = self.criterion.required_inputs, len(self.peers)
        teachers: Any = self.teachers
        if self.averages is not None:
            teachers, first = self.averages, 0  # an average takes the input of its peer
        self.teachers.hold()
        with_maps = "teacher_features" in required
        runs = [self._run(model, first + t, inputs, with_maps) for t, model in enumerate(teachers)]
        taught: dict[str, Any] = {}
        if with_maps:
            taught["teacher_features"] = [maps for _, maps in runs]
        if "teacher" in required:
            taught["teacher"] = torch.stack([z.float() for z, _ in runs])
        return taught

    def _evaluate(
        self, inputs: dict[str, Any], labels: Tensor | None, clean_labels: Tensor | None
    ) -> dict[str, Tensor]:
        logits = [self._run(peer, k, inputs)[0].float() for k, peer in enumerate(self.peers)]
        output = {"logits": torch.stack(logits, dim=1)}
        if clean_labels is not None:
            output["clean_labels"] = clean_labels
        if labels is None:
            return output
        labels = labels.long() if labels.dim() == 1 else labels  # else distributions [B, C]
        loss = torch.stack([F.cross_entropy(z, labels) for z in logits]).mean()
        return {"loss": loss} | output

    def _run(
        self, network: nn.Module, k: int, inputs: dict[str, Any], with_maps: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits of a network that takes input k, and its maps where they are wanted."""
        if "pixel_values" in inputs:
            pixels = self._adapted(network, k, inputs["pixel_values"])
            if with_maps:
                return with_features(network, pixels, self.deep)
            return logits_of(network(pixels)), []
        named = {name: inputs[name] for name in self.names[k] or inputs if name in inputs}
        if not named:
            raise ValueError(
                f"the batch has none of the inputs of {type(network).__name__}: expected "
                f"pixel_values, or some of {self.names[k]}; it has {sorted(inputs)}"
            )
        return logits_of(network(**named)), []

    def _adapted(self, network: nn.Module, k: int, pixels: Tensor) -> Tensor:
        """Pixels as the network that takes input k expects them."""
        return self.inputs[k](pixels).to(weights_dtype(network, pixels))

    # --------------------------------------------------------------------------- beside the forward

    def average(self) -> None:
        """Take the peers' weights into their averages over time, where the loss wants these."""
        for average, peer in zip(self.averages or (), self.peers, strict=self.averages is not None):
            average.update_parameters(peer)

    def train(self, mode: bool = True) -> PeerModule:
        """Teachers are in eval mode while it trains; :meth:`eval` hands them back as they came."""
        super().train(mode)
        for average in self.averages or ():
            average.eval()
        if mode:
            self.teachers.hold()
        else:
            self.teachers.release()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> PeerModule:
        for teacher in self.teachers:
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Trade compute for memory in every peer; the Trainer calls this."""
        options = activation_checkpointing_kwargs
        for peer in self.peers:
            if hasattr(peer, "set_grad_checkpointing"):
                peer.set_grad_checkpointing(True)
            elif hasattr(peer, "activation_checkpointing_enable"):
                peer.activation_checkpointing_enable(options, **kwargs)
            elif hasattr(peer, "gradient_checkpointing_enable"):  # transformers < 5.23
                peer.gradient_checkpointing_enable(options)
            else:
                raise ValueError(
                    f"{type(peer).__name__} has no activation checkpointing: switch it off in the "
                    "arguments"
                )

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """The same under the name that the Trainer of transformers < 5.23 calls."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)


class Teachers(list[nn.Module]):
    """Networks that belong to the caller: a plain list, so that they are not in a state dict."""

    def __init__(self, teachers: Sequence[nn.Module]) -> None:
        super().__init__(teachers)
        self._modes: dict[nn.Module, bool] = {}

    def hold(self) -> None:
        """Put them into eval mode and remember in which mode each of their modules was."""
        for teacher in self:
            if teacher not in self._modes:
                self._modes |= {module: module.training for module in teacher.modules()}
            if teacher.training:
                teacher.eval()

    def release(self) -> None:
        """Hand them back in the mode in which they came."""
        for module, mode in self._modes.items():
            module.training = mode
        self._modes = {}


def weights_dtype(network: nn.Module, pixels: Tensor) -> torch.dtype:
    """Of the weights: bf16_full_eval casts these only. torch 2.8 compiles no next(.., default)."""
    for parameter in network.parameters():
        return parameter.dtype
    return pixels.dtype


def _rightly_selected(
    selection: Sequence[tuple[Tensor, Tensor]] | None, clean_labels: Tensor
) -> dict[str, Tensor]:
    """Per peer, the share of the batch that it teaches, and the share that it teaches rightly."""
    shares = {}
    for k, (mask, target) in enumerate(selection or ()):
        right = mask & (target.argmax(-1) == clean_labels)
        shares[f"selected_{peer_name(k)}"] = mask.float().mean()
        shares[f"selected_right_{peer_name(k)}"] = right.float().mean()
    return shares


def average_of(peer: nn.Module, decay: float) -> AveragedModel:
    """A copy whose weights and statistics are averaged over steps.

    avg <- d avg + (1 - d) now, with d = min(1 - 1/(n + 1), decay) after n steps.
    """

    def step(average: Tensor, now: Tensor, n: Tensor) -> Tensor:
        if not now.is_floating_point():  # BatchNorm counts its batches
            return now
        return average.lerp(now, (1.0 / (n + 1.0)).clamp(min=1.0 - decay).to(now.dtype))

    average: Any = AveragedModel(peer, avg_fn=step, use_buffers=True)  # type: ignore[arg-type]
    return average.requires_grad_(False).eval()
