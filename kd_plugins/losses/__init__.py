"""Losses by family; importing this package fills the registry."""

from .base import Loss, Sum, create_loss, list_losses, loss_class, register_loss
from .label import CE, BootHard, BootSoft, ConfidencePenalty, LabelSmoothing, MyLC, ProSelfLC, Refined
from .mutual import MKD, SMKD, Confident, Everything, Mutual, Nothing, Selector

__all__ = [
    "CE",
    "MKD",
    "SMKD",
    "BootHard",
    "BootSoft",
    "ConfidencePenalty",
    "Confident",
    "Everything",
    "LabelSmoothing",
    "Loss",
    "Mutual",
    "MyLC",
    "Nothing",
    "ProSelfLC",
    "Refined",
    "Selector",
    "Sum",
    "create_loss",
    "list_losses",
    "loss_class",
    "register_loss",
]
