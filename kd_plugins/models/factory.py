"""Networks from names, folders and files, and what they return."""

from __future__ import annotations

import difflib
import inspect
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from torch import Tensor, nn

from . import cifar_resnet  # noqa: F401  timm then knows resnet18_cifar


def make_model(
    model: str | nn.Module,
    num_classes: int | None,
    *,
    pretrained: bool = False,
    **arguments: Any,
) -> nn.Module:
    """A network from a timm name, a folder or a hub id, or the module itself.

    A bare timm name is initialised at random, or with ``pretrained=True`` from timm's weights.
    A folder that :func:`export` wrote, ``local-dir:PATH``, ``hf-hub:ID`` and ``NAME=FILE`` (a timm
    name and a file of weights) bring their weights. If they have another number of classes, the
    head is new and PyTorch's: it starts near ln C. The new head that timm gives an EfficientNet or
    a MobileNet is drawn wider, the wider the fewer the classes, and is sure of nonsense at first.

    Args:
        model: the name or the module.
        num_classes: of a network that is given by name.
        pretrained: load timm's weights of a bare name.
        **arguments: of ``timm.create_model``, such as ``img_size=64``. They are remembered for
            :func:`kd_plugins.models.export`, which timm itself does from 1.0.31 on.
    """
    if isinstance(model, nn.Module):
        return model
    if num_classes is None:
        raise ValueError(
            f"the model is given by name ({model!r}), but the number of classes is not known: the "
            "training data has no ClassLabel; pass a module with its head instead"
        )
    name, weights = _name_and_file(model)
    if weights:
        return _from_file(name, weights, num_classes, arguments)
    if Path(model, "config.json").is_file():
        model = f"local-dir:{model}"
    _refuse_unknown(model, "a timm name, NAME=FILE or a folder that export() wrote")
    loaded = pretrained or ":" in model
    network: Any = _create(model, model, pretrained=loaded, num_classes=num_classes, **arguments)
    if loaded and network.pretrained_cfg.get("num_classes", num_classes) != num_classes:
        network.reset_classifier(num_classes)
    return network


def make_teacher(teacher: str | Path | nn.Module, num_classes: int | None) -> nn.Module:
    """A trained network: the module itself, or one from a timm name, a folder or a file.

    Args:
        teacher: ``"resnet50"``: timm's pretrained weights. ``"hf-hub:ID"``, ``"local-dir:PATH"`` or
            a folder with ``config.json``: that model. ``"resnet18_cifar=weights.safetensors"``:
            this architecture with the weights of a file; of a pickle only tensors are read.
        num_classes: of an architecture whose weights come from a file.
    """
    if isinstance(teacher, nn.Module):
        return teacher
    name, weights = _name_and_file(str(teacher))
    if weights:
        return _create(name, weights, num_classes=num_classes, checkpoint_path=weights)
    if Path(name, "config.json").is_file():
        name = f"local-dir:{name}"
    elif Path(name).exists():
        raise ValueError(
            f"{name!r}: expected a folder with config.json, as export() writes; for a file "
            f"of weights name its architecture: 'resnet18={name}'"
        )
    _refuse_unknown(name, "a timm name, NAME=FILE or a folder that export() wrote")
    return _create(name, name, pretrained=True)


def _name_and_file(text: str) -> tuple[str, str]:
    """NAME=FILE in its parts; anything else with no file."""
    name, _, weights = text.partition("=")
    if not weights or ":" in name or Path(text).exists():  # a folder runs/eta=2
        return text, ""
    if not Path(weights).is_file():
        raise FileNotFoundError(f"{text!r}: there is no file {weights}")
    _refuse_unknown(name, "a timm name before the =")
    return name, weights


def _from_file(name: str, weights: str, num_classes: int, arguments: dict[str, Any]) -> nn.Module:
    """A network with the weights of a file; its head is new if it has other classes."""
    heads = timm.get_pretrained_cfg_value(name, "classifier")
    head = heads if isinstance(heads, str) else next(iter(heads or ()), "")
    try:
        rows = timm.models.load_state_dict(weights).get(f"{head}.weight", ())
    except Exception:  # _create says why
        rows = ()
    given = {"num_classes": len(rows)} if len(rows) else {}
    try:
        network: Any = _create(name, weights, checkpoint_path=weights, **given, **arguments)
    except RuntimeError as error:  # of load_state_dict
        why = str(error).splitlines()[-1].strip()
        raise ValueError(f"the weights of {weights} do not fit {name}: {why}") from error
    if network.num_classes != num_classes:
        network.reset_classifier(num_classes)
    return network


def network_list(networks: Any) -> list[Any]:
    """One network, or its name, as a list of one; several as they are.

    ``nn.Sequential`` is one network, ``nn.ModuleList`` several.
    """
    one = isinstance(networks, str | Path | nn.Module) and not isinstance(networks, nn.ModuleList)
    return [networks] if one else list(networks)


def _refuse_unknown(name: str, expected: str) -> None:
    """timm's own error for an unknown name comes from within timm and suggests none."""
    if ":" not in name and not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{name}: expected {expected}; there is no such network{hint}")


def _create(name: str, source: str, **kwargs: Any) -> nn.Module:
    """A timm model. The error for unreadable weights names their source.

    timm's own error advises to unpickle them.
    """
    try:
        network: Any = timm.create_model(name, **kwargs)
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        unreadable = isinstance(error, SafetensorError) or "weights_only" in str(error)
        # timm's readers of numpy archives raise these, without the name of the file
        archive = "checkpoint_path" in kwargs and isinstance(error, ValueError | KeyError)
        if not unreadable and not archive:
            raise
        raise ValueError(
            f"the weights of {source} are not read: expected safetensors, or a pickle of tensors "
            "(weights_only). Any other may run the code of its author: convert where you trust it"
        ) from error
    if not hasattr(network, "_model_args"):  # timm < 1.0.31
        loading = ("pretrained", "checkpoint_path")
        network._model_args = {k: v for k, v in kwargs.items() if k not in loading}
    return network


def class_count(model: nn.Module) -> int | None:
    """The number of classes that a timm or Hugging Face network names; None if it names none.

    0 is a network without a classifier, whose output is features.
    """
    count = getattr(model, "num_classes", None)
    return getattr(getattr(model, "config", None), "num_labels", None) if count is None else count


def classes_of(network: nn.Module) -> list[str] | None:
    """The names of the classes in the network's order, as timm or transformers store them."""
    names = getattr(getattr(network, "config", None), "id2label", None)
    names = names or (getattr(network, "pretrained_cfg", None) or {}).get("label_names")
    if isinstance(names, dict):
        names = [names[k] for k in sorted(names, key=int)]
    if not names or list(names) == [f"LABEL_{k}" for k in range(len(names))]:
        return None  # transformers calls unnamed classes LABEL_0, LABEL_1 ...
    return [str(name) for name in names]


def input_names(model: nn.Module) -> list[str]:
    """The arguments that a network's ``forward`` names; empty if it takes any."""
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def logits_of(output: Any) -> Tensor:
    """The logits [B, C] in a network's output.

    Args:
        output: a tensor, a Hugging Face output, or a tuple that begins with the logits.
    """
    if isinstance(output, dict):
        output = output.get("logits", output)
    output = getattr(output, "logits", output)
    output = output[0] if isinstance(output, tuple) else output
    if not isinstance(output, Tensor):
        raise TypeError(
            f"a network must return logits, or an output with .logits; got {type(output).__name__}"
        )
    return output


def feature_head(
    dim: int, num_classes: int, hidden: int | None = 512, dropout: float = 0.5
) -> nn.Sequential:
    """A classifier [B, dim] -> [B, num_classes] for frozen features.

    Args:
        dim: length of the features.
        num_classes: C.
        hidden: width of the one hidden layer; None for a linear classifier.
        dropout: before the last layer.
    """
    body = [] if hidden is None else [nn.Linear(dim, hidden), nn.ReLU()]
    last = nn.Linear(dim if hidden is None else hidden, num_classes)
    return nn.Sequential(*body, nn.Dropout(dropout), last)
