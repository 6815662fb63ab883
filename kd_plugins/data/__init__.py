"""Data: noisy-label views over HF Datasets, WebVision from disk, pictures with repeatable augmentation."""

from .noise import (
    NoiseReport,
    asymmetric,
    circular,
    corrupt,
    corrupt_by_key,
    noise_report,
    noisy_stream,
    noisy_view,
    pair_flip,
    symmetric,
)
from .views import ImageView
from .webvision import load_webvision, write_webvision

__all__ = [
    "ImageView",
    "NoiseReport",
    "asymmetric",
    "circular",
    "corrupt",
    "corrupt_by_key",
    "load_webvision",
    "noise_report",
    "noisy_stream",
    "noisy_view",
    "pair_flip",
    "symmetric",
    "write_webvision",
]
