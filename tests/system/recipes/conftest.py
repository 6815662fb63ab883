"""Tiny data and teachers for all recipes."""

import datasets
import numpy as np
import pytest
import timm

from kd_plugins.models import export


@pytest.fixture
def pictures(tmp_path):
    """A data set of four classes in a folder of parquet files."""
    rng = np.random.default_rng(0)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=list("wxyz")),
            "coarse_label": datasets.Value("int64"),
        }
    )
    folder = tmp_path / "data"
    folder.mkdir()
    for split, n in (("train", 32), ("test", 8)):
        label = [i % 4 for i in range(n)]
        rows = {"image": list(rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)), "label": label}
        rows["coarse_label"] = [k // 2 for k in label]
        datasets.Dataset.from_dict(rows, features=features).to_parquet(
            folder / f"{split}-00000-of-00001.parquet"
        )
    return folder


@pytest.fixture(scope="module")
def two_teachers(tmp_path_factory):
    """Two exported networks of different kinds."""
    folder = tmp_path_factory.mktemp("teachers")
    return [
        export(timm.create_model(name, num_classes=4), folder / name)
        for name in ("test_resnet", "test_convnext")
    ]
