"""Save one network so that timm and transformers load it alone."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from PIL.Image import Resampling
from safetensors.torch import save_model

from .factory import logits_of
from .inputs import fixed_size

# of a pretrained_cfg: where weights came from, and under which terms
ORIGIN = [
    *("tag", "license", "origin_url", "paper_name", "paper_ids", "description", "notes"),
    *("url", "file", "source", "hf_hub_id", "hf_hub_filename", "state_dict"),
]


def library_of(model: Any) -> str:
    """What loads an exported network: ``"timm"`` (and transformers), ``"transformers"``, or for
    any other module ``"pytorch"``.
    """
    if hasattr(model, "save_pretrained"):
        return "transformers"
    known = isinstance(getattr(model, "pretrained_cfg", None), dict)
    return "timm" if known and hasattr(model, "default_cfg") else "pytorch"


def export(
    model: Any,
    folder: str | Path,
    class_names: Sequence[str] | None = None,
    input_config: Mapping[str, Any] | None = None,
) -> Path:
    """Save one network so that timm and transformers load it alone, with equal logits.

    timm: ``timm.create_model("local-dir:FOLDER", pretrained=True)``; transformers:
    ``AutoModelForImageClassification.from_pretrained("FOLDER")``. A module of neither library is
    saved as ``model.safetensors``. The module itself is left as it was.

    Args:
        model: the network.
        folder: where to; it is made if need be.
        class_names: names of the classes, in order.
        input_config: how pictures were prepared for this network: ``input_size`` (C, H, W),
            ``mean``, ``std``, ``crop_pct``, ``interpolation``, as ``ImageView.input_config()``
            returns them. It becomes what ``timm.data.resolve_data_config`` and
            ``AutoImageProcessor`` find; without it they find what the network came with.

    The weights are new: what timm noted of the origin, license and papers of those that the network
    began with is left out.

    Raises:
        ValueError: a timm network that does not come back from the folder with the same logits.
            timm before 1.0.31 forgets the arguments of ``create_model``; :func:`make_model` keeps
            them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = list(class_names) if class_names is not None else None
    data = {k: v for k, v in (input_config or {}).items() if v is not None}
    library = library_of(model)
    if library == "transformers":
        _export_transformers(model, folder, names, data)
    elif library == "timm":
        _export_timm(model, folder, names, data)
    else:
        save_model(model, str(folder / "model.safetensors"))
        _save_image_processor(folder, data)
    return folder


def _export_timm(model: Any, folder: Path, names: list[str] | None, data: dict[str, Any]) -> None:
    # safetensors does not save channels_last
    packed = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    known = {"label_names": names} if names else None
    timm.models.save_for_hf(packed, str(folder), model_config=known, safe_serialization=True)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    arguments = config.get("model_args") or _arguments(model)
    arguments.pop("num_classes", None)  # transformers passes it itself and fails on a second one
    config["model_args"] = arguments
    config["pretrained_cfg"] = _pretrained_cfg(model, config["pretrained_cfg"], data)
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    try:
        _compare(packed, folder, config["pretrained_cfg"]["input_size"])
    except Exception:
        path.unlink()  # nobody loads another network by mistake
        raise


def _arguments(model: Any) -> dict[str, Any]:
    """What ``timm.create_model`` was given, as far as it is known: timm < 1.0.31 forgets it."""
    known = {k: v for k, v in getattr(model, "_model_args", {}).items() if _is_json(v)}
    channels, *source = model.pretrained_cfg["input_size"]
    if (own := getattr(model, "in_chans", channels)) != channels:
        known["in_chans"] = own
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size and tuple(size) != tuple(source):
        known["img_size"] = size
    return known


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _pretrained_cfg(model: Any, known: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """``known`` as it describes the network now, with how its pictures are prepared."""
    cfg = _without_origin(known) | {"custom_load": False}
    cfg.pop("label_offset", None)
    channels, *size = known["input_size"]
    channels = getattr(model, "in_chans", channels)
    if channels not in (1, 3):
        cfg["first_conv"] = None  # timm < 1.0.31 would make it again, at random
    if own := fixed_size(model):
        size = own
        cfg.pop("test_input_size", None)
    if "input_size" in data:
        cfg.pop("test_input_size", None)
    if "crop_pct" in data:
        cfg.pop("test_crop_pct", None)
    return cfg | {"input_size": (channels, *size)} | data


def _without_origin(cfg: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in cfg.items() if name not in ORIGIN}


def _compare(model: Any, folder: Path, input_size: Sequence[int]) -> None:
    """Load the network from its folder and refuse it if its logits differ."""
    model = model.cpu().float().eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        x = torch.rand(1, *input_size).cpu()
        try:
            again = timm.create_model(f"local-dir:{folder}", pretrained=True).cpu().float().eval()
            ours, theirs = (logits_of(network(x)).nan_to_num() for network in (model, again))
            # one machine, one algorithm: even a resampled position embedding shows
            same = bool((ours - theirs).abs().max() <= 1e-5 * ours.abs().max())
            found = "its logits differ"
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            same, found = False, f"{type(error).__name__}: {error}"
    if not same:
        raise ValueError(
            f"{type(model).__name__} does not come back from {folder} ({found}). Either a layer "
            "was replaced after timm.create_model, or its arguments are not known: timm < 1.0.31 "
            f"forgets them ({timm.__version__} is installed), make_model(name, num_classes, "
            "**arguments) of kd_plugins.models keeps them. model.safetensors holds the weights; "
            "config.json is left out, since it would describe another network"
        )


def _export_transformers(
    model: Any, folder: Path, names: list[str] | None, data: dict[str, Any]
) -> None:
    config = model.config
    model.config = copy.deepcopy(config)  # save_pretrained writes into it too
    try:
        if names and len(names) == config.num_labels:  # else the head would not fit when loaded
            model.config.id2label = dict(enumerate(names))
            model.config.label2id = {name: i for i, name in enumerate(names)}
        if getattr(config, "pretrained_cfg", None):  # timm's network in transformers
            model.config.pretrained_cfg = _without_origin(config.pretrained_cfg) | data
        else:
            _save_image_processor(folder, data)
        model.save_pretrained(folder)
    finally:
        model.config = config


def _save_image_processor(folder: Path, data: dict[str, Any]) -> None:
    """Write what ``AutoImageProcessor`` reads: resize, crop the centre, normalise."""
    path = folder / "preprocessor_config.json"
    path.unlink(missing_ok=True)  # of an earlier export
    if not {"input_size", "mean", "std"} <= data.keys():
        return
    channels, height, width = data["input_size"]
    scaled = [math.floor(side / data.get("crop_pct", 1.0)) for side in (height, width)]
    size = {"height": scaled[0], "width": scaled[1]}
    if data.get("crop_mode") != "squash":
        size = {"shortest_edge": min(scaled)}
    name = data.get("interpolation", "bilinear").upper()
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": channels == 3,
        "size": size,
        "resample": int(getattr(Resampling, name, Resampling.BILINEAR)),
        "crop_size": {"height": height, "width": width},
        "image_mean": list(data["mean"]),
        "image_std": list(data["std"]),
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), True),
    }
    path.write_text(json.dumps(processor, indent=2), encoding="utf-8")
