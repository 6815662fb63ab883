"""Networks: how one is made from a name, hosted beside its peers with the loss, and exported by itself."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .losses.base import Loss
from .losses.fusion import PCL
from .losses.mutual import Mutual, peer_name
from .state import SampleTable


def make_model(model: str | nn.Module, num_classes: int | None) -> nn.Module:
    """A network from a timm name, a folder or a hub id, or the module itself.

    A bare timm name is initialised at random; ``local-dir:PATH`` and ``hf-hub:ID`` bring their weights, with a new head if
    theirs has another number of classes. For anything else pass the module: ``timm.create_model(..., pretrained=True)``.
    """
    if isinstance(model, nn.Module):
        return model
    if num_classes is None:
        raise ValueError(f"the model is given by name ({model!r}), but the number of classes is not known: the training data "
                         "has no ClassLabel; pass a module with its head instead")  # fmt: skip
    return _create(model, model, pretrained=":" in model, num_classes=num_classes)


def make_teacher(teacher: str | Path | nn.Module, num_classes: int | None) -> nn.Module:
    """A trained network: the module itself, or one from a timm name, a folder or a file.

    ``"resnet50"``: timm's pretrained weights; ``"hf-hub:ID"``, ``"local-dir:PATH"`` or a folder with ``config.json``: that model;
    ``"resnet18_cifar=weights.safetensors"``: this architecture with the weights of a file (of pickles only tensors are read).
    """
    if isinstance(teacher, nn.Module):
        return teacher
    name, _, weights = str(teacher).partition("=")
    if weights:
        if not Path(weights).is_file():
            raise FileNotFoundError(f"teacher {str(teacher)!r}: there is no file {weights}")
        return _create(name, weights, num_classes=num_classes, checkpoint_path=weights)
    if Path(name, "config.json").is_file():
        name = f"local-dir:{name}"
    elif Path(name).exists():
        raise ValueError(f"teacher {name!r}: expected a folder with config.json, as export() writes; for a file of weights name "
                         f"its architecture: 'resnet18={name}'")  # fmt: skip
    return _create(name, name, pretrained=True)


def _create(name: str, source: str, **kwargs: Any) -> nn.Module:
    """A timm model; where timm does not read its weights, an error that says whose, and does not advise to unpickle them."""
    try:
        return timm.create_model(name, **kwargs)
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "weights_only" not in str(error):
            raise
        raise ValueError(f"the weights of {source} are not read: expected safetensors, or a pickle of tensors (weights_only); "
                         "any other may run code of whoever made it. Convert it where you trust it") from error  # fmt: skip


def class_count(model: nn.Module) -> int | None:
    """The number of classes that a timm model or a Hugging Face classifier says it has; None if it does not say."""
    config = getattr(model, "config", None)
    return getattr(model, "num_classes", None) or getattr(config, "num_labels", None)


def logits_of(output: Any) -> Tensor:
    """The logits [B, C] in what a network returned: a tensor, a Hugging Face output, or a tuple that begins with them."""
    output = output.get("logits", output) if isinstance(output, dict) else getattr(output, "logits", output)
    output = output[0] if isinstance(output, tuple) else output
    if not isinstance(output, Tensor):
        raise TypeError(f"a network must return logits, or an output with .logits; got {type(output).__name__}")
    return output


def has_features(model: nn.Module) -> bool:
    """Whether :func:`with_features` can read this network: it is timm's, or transformers' wrapper of one."""
    body = getattr(model, "timm_model", model)
    return hasattr(body, "forward_features") and hasattr(body, "forward_head")


def with_features(model: nn.Module, pixels: Tensor, deep: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Logits [B, C] and maps [B, D, h, w] of a timm network, shallow to deep, in one pass; logits equal ``model(pixels)``.

    Only the last map, what ``forward_features`` returns, or with ``deep`` those of the earlier stages (of a transformer: blocks)
    too: see :func:`feature_dims`.
    """
    body: Any = getattr(model, "timm_model", model)
    if not deep:
        last = body.forward_features(pixels)
        return body.forward_head(last), [_as_map(body, last)]
    last, maps = body.forward_intermediates(pixels, output_fmt="NCHW")
    return body.forward_head(last), [*maps[:-1], _as_map(body, last)]


def feature_dims(model: nn.Module) -> list[int]:
    """Channels of the maps that :func:`with_features` gives, shallow to deep."""
    body: Any = getattr(model, "timm_model", model)
    return [*[info["num_chs"] for info in body.feature_info[:-1]], body.num_features]


def _as_map(body: Any, last: Tensor) -> Tensor:
    if last.dim() == 3:  # tokens [B, N, D], class and register tokens first
        tokens = last[:, getattr(body, "num_prefix_tokens", 0) :]
        height, width = getattr(body.patch_embed, "grid_size", None) or (int(tokens.shape[1] ** 0.5),) * 2
        return tokens.transpose(1, 2).unflatten(2, (height, width))
    return last.permute(0, 3, 1, 2) if getattr(body, "output_fmt", "NCHW") == "NHWC" else last


class _Input(nn.Module):
    """Pixels as the first peer expects them, or bytes -> pixels as this network expects them: normalisation, fixed size.

    What is not known of either network is left alone. A module tells by ``pretrained_cfg`` (``mean``, ``std``), as timm's do.
    Bytes are normalised here, a whole batch on the device; for a network that does not tell they become x / 255.
    """

    of_floats: Tensor | None
    of_bytes: Tensor | None

    def __init__(self, model: nn.Module, reference: nn.Module) -> None:
        super().__init__()
        own, ref = _normalization(model), _normalization(reference)
        self.size = _fixed_size(model)
        self._keep("of_floats", own if own != ref else None, ref)
        self._keep("of_bytes", own or ((0.0,), (1.0,)), ((0.0,), (1.0,)), 255.0)

    def _keep(self, name: str, own: Any, ref: Any, unit: float = 1.0) -> None:
        """((x / unit · std_ref + mean_ref) - mean) / std as (scale, shift), x · scale + shift; nothing where one is not known."""
        both = None
        if own and ref:
            (mean, std), (ref_mean, ref_std) = (torch.tensor(pair, dtype=torch.float64) for pair in (own, ref))
            both = torch.stack([ref_std / std / unit, (ref_mean - mean) / std]).float()[:, :, None, None]
        self.register_buffer(name, both, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        of_bytes = pixels.dtype == torch.uint8
        known = self.of_bytes if of_bytes else self.of_floats
        if known is not None and known.shape[1] in (1, pixels.shape[1]):
            pixels = pixels.to(known.dtype, copy=not of_bytes).mul_(known[0]).add_(known[1])  # one new batch, not two
        elif of_bytes:
            raise ValueError(f"bytes of {pixels.shape[1]} channels, {list(pixels.shape)}, and the network's mean and std have "
                             "another number: hand over normalised floats")  # fmt: skip
        if self.size and tuple(pixels.shape[-2:]) != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bilinear", antialias=True, align_corners=False)
        return pixels


def _normalization(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    cfg = (
        getattr(model, "pretrained_cfg", None) or getattr(getattr(model, "config", None), "pretrained_cfg", None) or {}
    )
    if cfg.get("mean") is None or cfg.get("std") is None:
        return None
    return tuple(cfg["mean"]), tuple(cfg["std"])


def _fixed_size(model: nn.Module) -> tuple[int, int] | None:
    """(height, width) if the network takes one size only: a ViT or Swin of timm, or of transformers."""
    model = getattr(model, "timm_model", model)  # as transformers wraps it
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None) if getattr(embed, "strict_img_size", True) else None
    if size is None and hasattr(model, "config"):  # not config.image_size: convolutional networks name one and take any
        size = next((m.image_size for m in model.modules() if getattr(m, "image_size", None)), None)
    return (size, size) if isinstance(size, int) else tuple(size) if size else None  # type: ignore[return-value]


class Hosted(nn.Module):
    """Peers, teachers and criterion under one forward: one module for the Trainer, one wrap for DDP, one state dict.

    In training mode it returns ``{"loss"}`` and leaves the diagnostics of the step in ``stats``; in eval mode
    ``{"loss", "logits" [B, K, C]}`` with the plain cross-entropy, mean over peers, which compares across methods.
    Teachers are frozen, in eval mode, and not in the state dict. PCL gets as ``teacher`` the peers
    with their weights averaged over time, which are in it: :meth:`average` takes the peers in, after each step.
    With ``watch`` on, ``seen`` holds what the last training batch looked like to each peer, sample by sample.
    """

    _keys_to_ignore_on_save = None  # what the Trainer asks of a module that is not a PreTrainedModel
    accepts_loss_kwargs = False
    main_input_name = "pixel_values"

    def __init__(self, peers: Sequence[nn.Module], criterion: Loss, teachers: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.peers: Any = nn.ModuleList(peers)
        self.criterion = criterion
        self.inputs = nn.ModuleList(_Input(model, peers[0]) for model in [*peers, *teachers])
        self.teachers = [teacher.requires_grad_(False).eval() for teacher in teachers]  # a list: not in the state dict
        self.deep = any(layer != -1 for layer in layers_of(criterion))
        self.stats: dict[str, Tensor] = {}
        self.watch = False  # see DynamicsCallback
        self.seen: dict[str, Tensor] = {}
        ema = averages_of(criterion)
        self.averages: Any = nn.ModuleList(_average(peer, ema) for peer in peers) if ema is not None else None
        # all ranks write the same rows into their tables: DDP need not send them at every step
        self._ddp_params_and_buffers_to_ignore = [
            f"criterion.{name}.rows" for name, module in criterion.named_modules() if isinstance(module, SampleTable)
        ]

    def average(self) -> None:
        """Take the peers' weights into their averages over time, where the loss wants these."""
        for average, peer in zip(self.averages or (), self.peers, strict=self.averages is not None):
            average.update_parameters(peer)

    def _apply(self, fn: Any, recurse: bool = True) -> Hosted:
        for teacher in self.teachers:
            teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _run(self, model: nn.Module, k: int, pixels: Tensor, features: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Logits of a network that takes input k, and its maps where they are wanted."""
        dtype = next(model.parameters(), pixels).dtype  # bf16_full_eval casts the weights only
        pixels = self.inputs[k](pixels).to(dtype)
        return with_features(model, pixels, self.deep) if features else (logits_of(model(pixels)), [])

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        index: Tensor | None = None,
        clean_labels: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> dict[str, Tensor]:
        wants = self.criterion.reads if self.training and labels is not None else frozenset()
        runs = [self._run(model, k, pixel_values, "features" in wants) for k, model in enumerate(self.peers)]
        logits = [z for z, _ in runs]
        if not self.training or labels is None:
            output = {"logits": torch.stack([z.float() for z in logits], dim=1)}  # [B, K, C]
            if clean_labels is not None:
                output["clean_labels"] = clean_labels
            if labels is not None:
                log_p = output["logits"].log_softmax(-1)
                output = {
                    "loss": -log_p.gather(-1, labels.view(-1, 1, 1).expand(-1, log_p.shape[1], 1)).mean()
                } | output
            return output

        extra: dict[str, Any] = {}
        if teacher is not None:  # [B, T, C], as items of a cache are collated
            extra = {"teacher": teacher.transpose(0, 1)}
        elif wants & {"teacher", "teacher_features"}:
            masters = self.teachers if self.averages is None else self.averages
            first = len(self.peers) if self.averages is None else 0  # an average takes the input of its peer
            with torch.no_grad():
                taught = [self._run(model, first + t, pixel_values, "teacher_features" in wants)
                          for t, model in enumerate(masters)]  # fmt: skip
            extra = {"teacher": torch.stack([z.float() for z, _ in taught]), "teacher_features": [f for _, f in taught]}
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
    def _figures(self, logits: list[Tensor], labels: Tensor, index: Tensor | None) -> dict[str, Tensor]:
        """Index and label [B]; predicted class, its probability and the label's [B, K]; selected [B, K] where the loss selects."""
        if index is None:
            raise ValueError("training dynamics are kept by sample, and the batches have no index: expected rows with index, the "
                             "position in the data set, as ImageView hands out; else nobody knows whose they are")  # fmt: skip
        label = labels if labels.dim() == 1 else labels.argmax(-1)
        p = torch.stack([z.detach().float() for z in logits], dim=1).softmax(-1)  # [B, K, C]
        conf, pred = p.max(-1)
        p_label = p.gather(-1, label.view(-1, 1, 1).expand(-1, p.shape[1], 1)).squeeze(-1)
        small = torch.int16 if p.shape[-1] <= 2**15 else torch.int32
        seen = {"index": index, "label": label.to(small), "pred": pred.to(small), "conf": conf, "p_label": p_label}
        masks = [torch.stack([mask for mask, _ in module.selection], dim=1) for module in self.criterion.modules()
                 if isinstance(module, Mutual) and module.selection]  # fmt: skip
        return seen | {"selected": torch.stack(masks).any(0)} if masks else seen

    def _purity(self, clean_labels: Tensor) -> dict[str, Tensor]:
        """Share of the batch that was selected, and of it with the true class taught, per peer (also of a term of a sum)."""
        shares = {}
        for module in self.criterion.modules():
            for k, (mask, taught) in enumerate(module.selection if isinstance(module, Mutual) else ()):
                shares[f"selected_{peer_name(k)}"] = mask.float().mean()
                shares[f"selected_right_{peer_name(k)}"] = (mask & (taught == clean_labels)).float().mean()
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
    return {n for m in modules for n in (*getattr(m, "layers", ()), *([m.layer] if hasattr(m, "layer") else ()))}


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


def library_of(model: Any) -> str:
    """What loads an exported network: ``"timm"`` (and transformers), ``"transformers"``, or for any other module ``"pytorch"``."""
    if hasattr(model, "save_pretrained"):
        return "transformers"
    known = isinstance(getattr(model, "pretrained_cfg", None), dict) and hasattr(model, "default_cfg")
    return "timm" if known else "pytorch"


def export(model: Any, folder: str | Path, class_names: Sequence[str] | None = None) -> Path:
    """Save one network so that timm and transformers load it alone, with equal logits. Nobody deploys a pair.

    timm: ``timm.create_model("local-dir:FOLDER", pretrained=True)``; transformers:
    ``AutoModelForImageClassification.from_pretrained("FOLDER")``. A module of neither is saved as ``model.safetensors``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = list(class_names) if class_names is not None else None
    library = library_of(model)
    if library == "transformers":
        if names and hasattr(model, "config"):
            model.config.id2label = dict(enumerate(names))
            model.config.label2id = {name: i for i, name in enumerate(names)}
        model.save_pretrained(folder)
    elif library == "timm":
        model_config = {"label_names": names} if names else None
        packed = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # safetensors takes no channels_last
        timm.models.save_for_hf(packed, str(folder), model_config=model_config, safe_serialization=True)
        # transformers passes num_classes itself and fails on a second one in model_args
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config.get("model_args", {}).pop("num_classes", None)
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    else:
        from safetensors.torch import save_model

        save_model(model, str(folder / "model.safetensors"))
    return folder


# ------------------------------------------------------------------------------------------- ResNets for 32 px pictures


class _SmallPictureResNet(ResNet):
    """timm's ResNet with the stem of the CIFAR literature: one 3x3 convolution as wide as the first stage, no pooling."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        first: Any = self.layer1[0]  # type: ignore[index]
        wide = self.conv1.out_channels
        width = first.conv1.out_channels
        self.conv1: Any = nn.Conv2d(self.conv1.in_channels, width, 3, padding=1, bias=False)
        if width != wide:  # timm's stem is 64 wide whatever follows
            self.bn1 = type(self.bn1)(width)
            first.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
            first.downsample = None
        for conv in (self.conv1, first.conv1):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool: Any = nn.Identity()
        info: Any
        for info in self.feature_info:
            info["reduction"] = max(info["reduction"] // 4, 1)
        self.feature_info[0]["num_chs"] = width


_CIFAR = {
    "input_size": (3, 32, 32),
    "pool_size": (4, 4),
    "num_classes": 100,
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": (0.5071, 0.4865, 0.4409),
    "std": (0.2673, 0.2564, 0.2762),
    "first_conv": "conv1",
    "classifier": "fc",
    "license": "apache-2.0",
}
default_cfgs = generate_default_cfgs({f"resnet{n}_cifar.untrained": _CIFAR for n in (10, 18, 34)})


def _small_picture_resnet(name: str, layers: tuple[int, ...], kwargs: dict[str, Any]) -> ResNet:
    return build_model_with_cfg(_SmallPictureResNet, name, **{"block": BasicBlock, "layers": layers, **kwargs})


@register_model
def resnet10_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-10 for 32 px pictures at a quarter of the usual width: what two CPU cores can train."""
    return _small_picture_resnet(
        "resnet10_cifar", (1, 1, 1, 1), {"pretrained": pretrained, "channels": (16, 32, 64, 128), **kwargs}
    )


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 for 32 px pictures."""
    return _small_picture_resnet("resnet18_cifar", (2, 2, 2, 2), {"pretrained": pretrained, **kwargs})


@register_model
def resnet34_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-34 for 32 px pictures: the backbone of SMKD's tables on CIFAR-100."""
    return _small_picture_resnet("resnet34_cifar", (3, 4, 6, 3), {"pretrained": pretrained, **kwargs})
