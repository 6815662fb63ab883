"""Rows of benchmark.py on data: pictures a second, noisy labels, and the time of an import."""

import statistics
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import timm
from measuring import DEVICE, Row, ratio, seconds
from PIL import Image
from torch.utils.data import DataLoader

from kd_plugins import CE
from kd_plugins.data import ImageView, noisy_view, symmetric
from kd_plugins.models import PeerModule


def pictures_on_disk(folder: Path, count: int, side: int) -> None:
    """The same JPEG files as one folder per class and as parquet."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (count, side // 8, side // 8, 3), dtype=np.uint8)
    for i in range(count):
        path = folder / "train" / f"class{i % 4}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(small[i]).resize((side, side), Image.Resampling.BILINEAR).save(
            path, quality=90
        )
    files = sorted((folder / "train").rglob("*.jpg"))
    rows = [
        {"image": {"bytes": p.read_bytes(), "path": None}, "label": int(p.parent.name[5:])}
        for p in files
    ]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=4)}
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")


def data_rate(kind: str, quick: bool, floats: bool = False) -> Row:
    """Rows a second decoded, augmented, batched, normalised on the device, against timm's loader.

    timm's loader has its prefetcher, as in timm's training script: it batches uint8 and normalises
    whole batches, which is the faster way.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures_on_disk(folder, 256 if quick else 1024, 256)
        ours, theirs = our_loader(folder, kind, floats), timm_loader(folder)
        # the bytes are normalised as the Trainer does it
        normalise = PeerModule([timm.create_model("test_resnet")], CE()).inputs[0].to(DEVICE)

        def run_ours() -> None:
            for batch in ours:
                normalise(batch["pixel_values"].to(DEVICE, non_blocking=True))

        def run_theirs() -> None:
            for _ in theirs:
                pass

        figure = 1 / ratio(run_ours, run_theirs, repeats=5, warm=1)
    return figure, "x timm's rows a second", None if floats else 1.3


def our_loader(folder: Path, kind: str, floats: bool) -> DataLoader:
    """ImageView with the transform that timm's loader makes too."""
    settings = {"is_training": True, "color_jitter": None, "normalize": floats}
    cache = str(folder)
    if kind == "parquet":
        data = datasets.Dataset.from_parquet(str(folder / "train.parquet"), cache_dir=cache)
    else:
        at = {"data_dir": str(folder / "train"), "split": "train", "cache_dir": cache}
        data = datasets.load_dataset("imagefolder", **at)
    view = ImageView(data, timm.data.create_transform(224, **settings))
    return DataLoader(view, 64, shuffle=True, drop_last=True)


def timm_loader(folder: Path):
    data = timm.data.create_dataset("", root=str(folder / "train"))
    settings = {"is_training": True, "color_jitter": None, "device": DEVICE}
    settings |= {"num_workers": 0, "persistent_workers": False}
    return timm.data.create_loader(data, (3, 224, 224), 64, **settings)


def millions_of_rows() -> datasets.Dataset:
    """2.4 million rows of 64 bytes as pictures."""
    rows = 2_400_000
    starts = pyarrow.py_buffer(np.arange(rows + 1, dtype=np.int32) * 64)
    content = pyarrow.Array.from_buffers(
        pyarrow.binary(), rows, [None, starts, pyarrow.py_buffer(bytes(rows * 64))]
    )
    image = pyarrow.StructArray.from_arrays(
        [content, pyarrow.nulls(rows, pyarrow.string())], ["bytes", "path"]
    )
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=1000)}
    )
    columns = {"image": image, "label": np.arange(rows) % 1000}
    return datasets.Dataset(pyarrow.table(columns, schema=features.arrow_schema))


def addresses(dataset: datasets.Dataset) -> list[int]:
    """Of the buffers that hold the pictures."""
    buffers = [b for chunk in dataset.data["image"].chunks for b in chunk.buffers()]
    return [buffer.address for buffer in buffers if buffer]


def noisy_view_of_millions(memory: bool) -> Row:
    """Seconds, or the peak of additional memory of numpy and Arrow. No picture may be copied."""
    data, noise = millions_of_rows(), symmetric(1000, 0.4)
    if not memory:
        return seconds(lambda: noisy_view(data, noise, seed=0)), "s", 1.0
    usual = pyarrow.default_memory_pool()
    pool = pyarrow.proxy_memory_pool(usual)  # counts from zero
    pyarrow.set_memory_pool(pool)
    tracemalloc.start()  # numpy tells it what it takes
    view = noisy_view(data, noise, seed=0)
    peak = tracemalloc.get_traced_memory()[1] + pool.max_memory()
    tracemalloc.stop()
    pyarrow.set_memory_pool(usual)
    if addresses(view) != addresses(data):
        raise RuntimeError(
            "noisy_view has copied the pictures: expected the same buffers in both data sets."
        )
    return peak / 1e6, "MB", 50


def import_time() -> Row:
    def start(module: str) -> float:
        code = (
            f"import time; s = time.perf_counter(); import {module}; print(time.perf_counter() - s)"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(done.stdout)

    times = [(start("kd_plugins"), start("torch")) for _ in range(5)]
    return statistics.median(ours - theirs for ours, theirs in times), "s more than torch", 0.1
