"""Suspects for the tests: class names, features, and pictures of every kind."""

from io import BytesIO

import datasets
import numpy as np
from PIL import Image

from kd_plugins import find_suspects

NAMES = ["cat", "dog", "owl"]
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=NAMES),
        "clean": datasets.Value("int64"),
    }
)

HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "\"quoted\" & 'single' <b>bold</b>",
    "line\u2028separators\u2029and @DATA@ @POLICY@ \\u003c",
    "<!-- <script> $&",
    "犬 Ωμέγα",
    "https://example.com/" + "long" * 30,
]
BROKEN = 5


def encoded(picture, kind="PNG", **settings):
    picture.save(buffer := BytesIO(), kind, **settings)
    return buffer.getvalue()


def odd_suspects():
    """Pictures of all kinds, one of them broken, and the suspects among them."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    picture = Image.fromarray(noise)
    smooth = Image.linear_gradient("L").resize((32, 32))  # a PNG is smaller
    kinds = [
        encoded(picture),
        encoded(smooth.convert("RGB"), transparency=(9, 9, 9), icc_profile=bytes(40_000)),
        encoded(picture.convert("CMYK"), "JPEG"),
        encoded(picture.convert("RGBA")),
        encoded(picture.convert("P")),
        b"\xff\xd8 broken",
        encoded(Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)),
        encoded(picture.resize((2000, 3))),
        encoded(picture.convert("LA")),
        encoded(picture.convert("1")),
    ]
    table = [
        {"image": {"bytes": kind, "path": None}, "label": k % 6} for k, kind in enumerate(kinds)
    ]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(k) for k in range(6)])}
    )
    data = datasets.Dataset.from_list(table, features=features)
    labels = np.array(data["label"])
    probs = np.full((10, 6), 0.02, np.float32)
    probs[np.arange(10), (labels + 1) % 6] = np.linspace(0.8, 0.4, 10)
    probs[np.arange(10), labels] = 1 - probs.sum(1) + 0.02
    suspects = find_suspects(labels, probs, class_names=HOSTILE, all_rows=True)
    assert (
        np.array(suspects["proposed"]) != np.array(suspects["label"])
    ).sum() == 8  # the labels of the last two are not doubted
    return data, suspects
