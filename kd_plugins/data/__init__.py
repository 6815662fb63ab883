"""Data: label noise, pictures, repeatable augmentation, WebVision, cached teachers and features."""

from .._moved import moved_names
from .feature_cache import FeatureView, cache_features
from .image_view import ImageView
from .labels import same_classes
from .noise import (
    NoiseReport,
    asymmetric,
    circular,
    corrupt,
    corrupt_by_key,
    noise_report,
    pair_flip,
    symmetric,
)
from .noisy_data import noisy_stream, noisy_view
from .pictures import (
    NOISE,
    Pictures,
    find_column,
    hold_out,
    load_data,
    load_pictures,
    load_rows,
    noise_by_name,
    own_side,
    picture_transform,
    plain_view,
    training_view,
)
from .subset import SubsetView, as_view, num_samples, set_epoch
from .teacher_cache import TeacherCache, cache_teachers
from .webvision import load_webvision, write_webvision

__all__ = [
    "NOISE",
    "FeatureView",
    "ImageView",
    "NoiseReport",
    "Pictures",
    "SubsetView",
    "TeacherCache",
    "as_view",
    "asymmetric",
    "cache_features",
    "cache_teachers",
    "circular",
    "corrupt",
    "corrupt_by_key",
    "find_column",
    "hold_out",
    "load_data",
    "load_pictures",
    "load_rows",
    "load_webvision",
    "noise_by_name",
    "noise_report",
    "noisy_stream",
    "noisy_view",
    "num_samples",
    "own_side",
    "pair_flip",
    "picture_transform",
    "plain_view",
    "same_classes",
    "set_epoch",
    "symmetric",
    "training_view",
    "write_webvision",
]

__getattr__ = moved_names(__name__)
