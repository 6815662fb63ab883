"""Small image data sets on disk."""

import datasets
import numpy as np


def hub(folder, splits=("train", "test"), **kinds):
    """A data set with the hub's columns of CIFAR-100."""
    kinds = {
        "img": datasets.Image(),
        "fine_label": datasets.ClassLabel(names=list("wxyz")),
        "coarse_label": datasets.ClassLabel(names=list("pq")),
        **kinds,
    }
    rng = np.random.default_rng(0)
    values = {
        "img": list(rng.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)),
        "fine_label": [k % 4 for k in range(16)],
        "coarse_label": [k % 2 for k in range(16)],
    }
    features = {key: kind for key, kind in kinds.items() if kind is not None}
    rows = datasets.Dataset.from_dict(
        {k: values[k] for k in features}, features=datasets.Features(features)
    )
    folder.mkdir()
    for split in splits:
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder
