"""Networks: made from a name, hosted beside their peers with the loss, exported by themselves."""

from .._moved import moved_names
from .cifar_resnet import resnet10_cifar, resnet18_cifar, resnet34_cifar
from .export import export, library_of
from .factory import class_count, feature_head, logits_of, make_model, make_teacher
from .features import feature_dims, has_features, with_features
from .hosted import PeerModule

__all__ = [
    "PeerModule",
    "class_count",
    "export",
    "feature_dims",
    "feature_head",
    "has_features",
    "library_of",
    "logits_of",
    "make_model",
    "make_teacher",
    "resnet10_cifar",
    "resnet18_cifar",
    "resnet34_cifar",
    "with_features",
]

__getattr__ = moved_names(__name__)
