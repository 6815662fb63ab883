"""Find out how the pictures of a run were prepared, so that exported networks can say it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import InputAdapter, Normalization, normalization

logger = logging.getLogger(__name__)

InputConfig = dict[str, Any]  # input_size (C, H, W), mean, std, crop_pct, interpolation


def normalization_of(views: Iterable[Any], networks: Sequence[nn.Module]) -> Normalization | None:
    """(mean, std) by which data sets normalise floats; None if none of them says it.

    ``networks`` are those that will see them. Where they expect different normalisations, a warning
    says by which one the floats are then read. Bytes need no warning: each network normalises them.
    """
    found = [view.input_config() for view in views if hasattr(view, "input_config")]
    known = [config for config in found if config is not None]
    for config in known:
        if "mean" in config:
            return tuple(config["mean"]), tuple(config["std"])
    if known:  # bytes
        return None
    expected = [normalization(network) for network in networks]
    if len({own for own in expected if own}) > 1 and expected[0]:
        logger.warning(
            "the networks expect different normalisations, and the data do not say theirs: floats "
            f"are taken as normalised for the first network, mean and std {expected[0]}"
        )
    return None


def warn_of_inputs(teachers: Sequence[nn.Module], first: nn.Module, given: Any) -> None:
    """Warn of teachers that see the floats as the first network does, although they expect others.

    A network that was trained on these data, after it was made by timm, still names the
    normalisation of its former weights. So a teacher that names the same one as the first network
    is taken to be such a network.
    """
    for k, own in enumerate(map(normalization, teachers)):
        if given and own and own != given and own == normalization(first):
            logger.warning(
                f"teacher {k} names mean and std {own} in its pretrained_cfg, and the data are "
                f"normalised by {given}: it sees them as they come, like the first network. If it "
                "was not trained on such data, normalise the data by its mean and std"
            )


def batch_range(pixels: Tensor) -> dict[str, Any]:
    """Size, dtype and range of a batch [B, C, H, W]; the range stays on its device."""
    size, of_bytes = tuple(pixels.shape[1:]), pixels.dtype == torch.uint8
    low, high = pixels.detach().amin((0, 2, 3)), pixels.detach().amax((0, 2, 3))
    return {"input_size": size, "of_bytes": of_bytes, "low": low, "high": high}


def input_configs(
    adapters: Sequence[InputAdapter],
    views: Mapping[str, Any],
    batches: Mapping[str, dict[str, Any]],
    given: InputConfig | None = None,
) -> list[InputConfig | None]:
    """The input config of each network: that of the batches, composed with its adapter.

    Args:
        adapters: one for each network.
        views: the data sets by kind (``evaluation``, ``training``); the first that can say how it
            prepares its pictures (``view.input_config()``) is believed.
        batches: what :func:`batch_range` found in the first batch of each kind.
        given: the config of the batches, where the caller knows it.

    Raises:
        ValueError: an evaluation batch contradicts the config: the exported network would not
            reach the accuracy of this evaluation.
    """
    config, of_bytes = _of_batches(views, batches, adapters[0].reference, given)
    if config is None:
        return [None] * len(adapters)
    return [adapter.input_config(config, of_bytes) for adapter in adapters]


def _of_batches(
    views: Mapping[str, Any], batches: Mapping[str, dict[str, Any]], reference: Any, given: Any
) -> tuple[InputConfig | None, bool]:
    """The config of the batches (None if nothing is known), and whether they hold bytes."""
    if given is not None:
        return given, "mean" not in given
    for kind, view in views.items():
        config = view.input_config() if hasattr(view, "input_config") else None
        if config is not None:
            if kind in batches:
                _compare(config, batches[kind], kind)
            return config, "mean" not in config
    for kind in [kind for kind in views if kind in batches]:
        batch = batches[kind]
        config = {"input_size": batch["input_size"]}
        if not batch["of_bytes"] and reference:
            config["mean"], config["std"] = reference
            _compare(config, batch, kind)
        logger.warning(
            f"the {kind} data do not say how they prepare their pictures. The exported config "
            f"has the size of the first batch, {batch['input_size']}; its mean, std and crop are "
            "those that the networks came with. Pass input_config={'input_size': ..., 'mean': "
            "..., 'std': ...} to export(), or evaluate on an ImageView"
        )
        return config, batch["of_bytes"]
    return None, False


def _compare(config: InputConfig, batch: Mapping[str, Any], kind: str) -> None:
    """Refuse an evaluation batch that contradicts the config; of a training batch only warn."""
    if (why := _contradiction(config, batch)) is None:
        return
    message = (
        f"the first {kind} batch does not fit the input config that would be exported: {why}. The "
        "exported network would see other pictures than this run did: pass input_config= to "
        "export() with the size, mean and std of the batches"
    )
    if kind == "evaluation":
        raise ValueError(message)
    logger.warning(message)  # an augmentation may leave the range


def _contradiction(config: InputConfig, batch: Mapping[str, Any]) -> str | None:
    if tuple(config["input_size"]) != batch["input_size"]:
        return f"its pictures are {batch['input_size']}, not {tuple(config['input_size'])}"
    if ("mean" in config) == batch["of_bytes"]:
        return "it holds bytes, not floats" if batch["of_bytes"] else "it holds floats, not bytes"
    if batch["of_bytes"]:
        return None
    mean, std = (torch.tensor(config[k], dtype=torch.float32) for k in ("mean", "std"))
    low, high = (batch[k].float().cpu() * std + mean for k in ("low", "high"))
    if (low < -0.02).any() or (high > 1.02).any():  # interpolation may overshoot a little
        return (
            f"with mean={_short(mean)} and std={_short(std)} its pixels would lie between "
            f"{low.min():.3g} and {high.max():.3g}, not 0 and 1"
        )
    return None


def _short(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
