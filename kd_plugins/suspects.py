"""Which labels are probably wrong: a ranked table of suspects; pictures and a page to go through them; the data put right.

>>> probs = predict_probs(["runs/pair/peer_a", "runs/pair/peer_b"], view)  # doctest: +SKIP
>>> suspects = find_suspects(view.labels, probs, class_names=view.class_names)  # doctest: +SKIP
>>> suspects.to_parquet("suspects.parquet"), suspects.to_csv("suspects.csv")  # doctest: +SKIP
>>> html_page(suspects, train, "suspects.html")  # doctest: +SKIP
>>> train = correct_labels(train, suspects.select(range(100)))  # doctest: +SKIP
"""

from __future__ import annotations

import base64
import json
import re
import warnings
from collections.abc import Callable, Sequence
from hashlib import blake2b, sha256
from html import escape
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm.auto import tqdm

from .data.noise import _check_labels, _integers, column_array, noisy_view
from .data.views import _KINDS, ImageView, _decode
from .losses import CE
from .models import Hosted, class_count, make_teacher
from .state import in_eval

CHUNK = 1 << 16  # rows copied at a time


def predict_probs(
    models: nn.Module | str | Path | Sequence[nn.Module | str | Path],
    view: ImageView,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
) -> np.ndarray:
    """Mean over networks of softmax(logits): what the ensemble thinks of each picture -> float32 [N, C].

    Of pictures that no network was trained on these are out-of-sample probabilities, of the others in-training ones; either are
    what cleanlab calls `pred_probs`. Networks that learned wrong labels by heart agree with them: out-of-sample ones,
    or the training dynamics, tell more.

    Networks run in eval mode, on the device of the first that is a module; where all come from folders on the accelerator, if
    there is one. Every process goes over all pictures.

    Args:
        models: one or several; modules, or folders that `export` wrote (see `make_teacher`).
        view: the pictures, in a transform without augmentation, normalised for the first network; others get theirs
            (`pretrained_cfg`).
        batch_size: of the forward.
        num_workers: processes that read pictures.

    Returns:
        Row i is of row i of the view. Of a picture that cannot be read it is NaN, with a warning: the row that replaces it
        says nothing about its label. cleanlab takes the others: `known = ~np.isnan(probs[:, 0])`.
    """
    if not isinstance(view, ImageView):
        raise TypeError(
            f"the view must be an ImageView, got {type(view).__name__}: choose rows in the data set below it"
        )
    models = [models] if isinstance(models, nn.Module | str | Path) else list(models)
    if not models:
        raise ValueError("there are no networks: nothing predicts")
    device = next((next(m.parameters(), torch.empty(0)).device for m in models if isinstance(m, nn.Module)), None)
    networks = [make_teacher(model, view.num_classes) for model in models]
    counts = {class_count(network) or view.num_classes for network in networks}
    if counts != {view.num_classes}:
        raise ValueError(f"the data have {view.num_classes} classes, the networks {sorted(counts)}: a probability could not be "
                         "put to its class")  # fmt: skip
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    hosted = Hosted(networks, CE()).to(device)
    probs = np.full((len(view), view.num_classes), np.nan, np.float32)
    loader: Any = torch.utils.data.DataLoader(
        view, batch_size, num_workers=num_workers, generator=torch.Generator()
    )  # the global generator stays as it is
    with in_eval(*networks, hosted):
        for batch in tqdm(loader, "predictions", leave=False, disable=None):
            said = hosted(batch["pixel_values"].to(device))["logits"].softmax(-1).mean(1)  # [B, C]
            if not torch.isfinite(said).all():
                row = int(batch["index"][~torch.isfinite(said).all(1).cpu()][0])
                raise ValueError(f"the networks say NaN of row {row}: look at their weights, and at the transform")
            probs[batch["index"].numpy()] = said.cpu().numpy()
    if missing := int(np.isnan(probs[:, 0]).sum()):
        warnings.warn(f"{missing} of {len(view)} pictures cannot be read; their probabilities are NaN", stacklevel=2)
    return probs


def find_suspects(
    labels: Any = None,
    probs: Any = None,
    *,
    dynamics: Any = None,
    class_names: Sequence[str] | None = None,
    all_rows: bool = False,
) -> Dataset:
    """Samples for which the networks prefer another class than the given label y, most suspicious first, by s = 1 - p_y.

    If labels are wrong equally often in every class, replaced by any other alike, and p is right, P(y is wrong | picture) is a
    falling function of p_y alone, so no ranking is better; the margin to the next class is another one.

    Source: the self-confidence p_y by which Northcutt, Jiang and Chuang, "Confident learning: estimating uncertainty in dataset
    labels", JAIR 70, 2021 rank label errors (from memory of the paper; it is cleanlab's default). From training dynamics p_y
    is the mean over visits and networks, the confidence of Swayamdipta et al., "Dataset cartography: mapping and diagnosing
    datasets with training dynamics", EMNLP 2020.
    Differs: which labels are suspected is decided by the most probable class, by confident learning with a threshold for each
    class.

    Args:
        labels: the doubted labels [N]: `view.labels`, or a column as an array.
        probs: `predict_probs`, or any probabilities [N, C]. Rows of NaN are left out.
        dynamics: instead of both: the folder that `DynamicsCallback` wrote, or `summarise(folder)`, which can leave out epochs.
        class_names: `view.class_names`; gives the columns `label_name` and `proposed_name`.
        all_rows: rank the samples that nobody doubts too (`proposed` is their label), as AUROC needs it.

    Returns:
        A `Dataset` with columns `index` (row in the data), `label`, `proposed` (the most probable class; by the votes of the
        dynamics, weighted by confidence), `score` (s), `p_label`, `p_proposed`. Of two classes as probable the
        given one stands, of equal scores the first row comes first. `.select(range(100))` or `.filter` shorten it:
        weak networks prefer another class often, so trust the order rather than the number.

    >>> probs = [[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.5, 0.3, 0.2]]
    >>> suspects = find_suspects([0, 1, 1], np.array(probs))
    >>> [(row["index"], row["proposed"], round(row["score"], 2)) for row in suspects]
    [(1, 2, 0.9), (2, 0, 0.7)]
    """
    if [labels is None, probs is None] != [dynamics is not None] * 2:
        raise ValueError("expected labels and probs, or dynamics alone: a score is of one source")
    columns = _from_probs(labels, probs) if dynamics is None else _from_dynamics(dynamics)
    if not all_rows:
        columns = _take(columns, columns["proposed"] != columns["label"])
    columns = _take(columns, np.argsort(columns["p_label"], kind="stable"))
    columns["score"] = np.clip(1 - columns["p_label"], 0, 1)
    table = pa.table({name: columns[name] for name in ("index", "label", "proposed", "score", "p_label", "p_proposed")})
    if class_names is not None:
        for name in ("label", "proposed"):
            _check_labels(columns[name], len(class_names))
            names = pa.array([str(n) for n in class_names], pa.string()).take(pa.array(columns[name]))
            table = table.append_column(f"{name}_name", names)
    digest = blake2b(b"".join(columns[k].tobytes() for k in ("index", "proposed", "score")), digest_size=8)
    return Dataset(table, fingerprint=digest.hexdigest())


def _take(columns: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: column[rows] for name, column in columns.items()}


def _from_probs(labels: Any, probs: Any) -> dict[str, np.ndarray]:
    labels, probs = _integers(labels), np.asarray(probs)
    if probs.ndim != 2 or probs.shape[1] < 2 or probs.dtype.kind != "f" or labels.shape != probs.shape[:1]:
        raise ValueError(
            f"probs: expected floats [N, C] for labels {list(labels.shape)}, got {probs.dtype} {list(probs.shape)}"
        )
    _check_labels(labels, probs.shape[1])
    p_label, p_proposed = np.empty((2, len(labels)), np.float32)
    proposed = np.empty(len(labels), np.int64)
    for start in range(0, len(labels), CHUNK):  # one temporary of all 2.4 million rows would be another 500 MB
        s = slice(start, start + CHUNK)
        part, y, rows = probs[s], labels[s], np.arange(len(probs[s]))
        total = part.sum(1, dtype=np.float32)
        if (bad := (np.abs(total - 1) > 1e-2) | (part.min(1) < 0)).any():
            row = int(bad.argmax())
            raise ValueError(f"row {start + row} of probs sums to {total[row]:.4g}, its lowest is {part[row].min():.4g}: expected "
                             "probabilities, not logits or scores: 1 - p would not be in [0, 1]")  # fmt: skip
        p_label[s] = np.where(np.isnan(total), np.nan, part[rows, y])
        best = part.argmax(1)
        proposed[s] = np.where(part[rows, best] > part[rows, y], best, y)
        p_proposed[s] = part[rows, proposed[s]]
    known = np.flatnonzero(~np.isnan(p_label))
    if len(known) < len(labels):
        warnings.warn(
            f"{len(labels) - len(known)} of {len(labels)} rows of probs are NaN and are left out", stacklevel=3
        )
    columns = {"index": np.arange(len(labels)), "label": labels, "proposed": proposed}
    return _take(columns | {"p_label": p_label, "p_proposed": p_proposed}, known)


def _from_dynamics(dynamics: Any) -> dict[str, np.ndarray]:
    if not isinstance(dynamics, dict):
        from .dynamics import summarise  # which imports transformers

        dynamics = summarise(dynamics)
    columns = {name: np.asarray(dynamics[name], np.int64) for name in ("index", "label", "proposed")}
    columns["p_label"] = np.asarray(dynamics["p_label"], np.float32)
    # votes count only visits at which the class was the most probable, p_label all of them
    agreed = columns["proposed"] == columns["label"]
    columns["p_proposed"] = np.where(agreed, columns["p_label"], np.asarray(dynamics["confidence"], np.float32))
    return _take(columns, ~np.isnan(columns["p_label"]))


# ----------------------------------------------------------------------------------------------------- views of the data


def correct_labels(
    dataset: Dataset, suspects: Dataset, *, label: str = "label", corrected: str = "corrected_label"
) -> Dataset:
    """`dataset` with one more column `corrected`: the proposed label where it is suspected, `label` elsewhere.

    No picture is copied. `suspects` may also be the page's decisions, read again:
    `load_dataset("csv", data_files="decisions.csv", split="train").filter(lambda row: row["decision"] == "wrong")`.
    """
    index, proposed = _suspected(suspects, dataset, label)
    labels = np.array(column_array(dataset, label))
    labels[index] = proposed
    return noisy_view(dataset, labels, label=label, noisy=corrected)


def drop_suspects(dataset: Dataset, suspects: Dataset, *, label: str = "label") -> Dataset:
    """`dataset` without the suspected rows; no picture is copied. `suspects` as in :func:`correct_labels`."""
    index, _ = _suspected(suspects, dataset, label)
    keep = np.ones(len(dataset), bool)
    keep[index] = False
    return dataset.select(np.flatnonzero(keep))


def _suspected(suspects: Dataset, dataset: Dataset, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the data set and labels proposed for them; refused if the suspects are not of this data set."""
    index, given, proposed = (column_array(suspects, name) for name in ("index", "label", "proposed"))
    _refuse_rows(index, len(dataset))
    if (other := given != column_array(dataset, label)[index]).any():
        row = int(other.argmax())
        raise ValueError(f"row {index[row]} has label {column_array(dataset, label)[index[row]]} in column {label!r}, and "
                         f"{given[row]} among the suspects: they are of other data, of another order or of another "
                         "column")  # fmt: skip
    doubted = proposed != given
    return index[doubted], proposed[doubted]


def _refuse_rows(index: np.ndarray, size: int) -> None:
    if len(index) and (index.min() < 0 or index.max() >= size):
        bad = index[(index < 0) | (index >= size)][0]
        raise ValueError(f"the suspects have row {bad}, the data set {size} rows: they are of another data set")


# -------------------------------------------------------------------------------------------------------------- pictures


def contact_sheet(
    suspects: Dataset, dataset: Any, path: str | Path, *, count: int = 40, columns: int = 8, image: str = "image"
) -> Path:
    """The first suspects as one PNG: thumbnail, score, given label struck out, proposed label. Needs matplotlib, for its font.

    Args:
        suspects: :func:`find_suspects`.
        dataset: where their rows are: a `Dataset`, an `ImageView`, or a sequence of dict rows. A picture that cannot be
            read is a grey box.
        path: of the PNG.
        count: how many suspects.
        columns: how many beside each other.
        image: column of pictures, as in `ImageView`.
    """
    rows, picture_of = _first(suspects, count), _pictures(suspects, dataset, image)
    side, pad, line = 176, 14, 23
    plain, bold, head = _font(16), _font(16, "-Bold"), _font(22, "-Bold")
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * (side + pad) + pad, 58 + lines * (side + 2 * line + 2 * pad)), "white")
    draw = ImageDraw.Draw(sheet)
    title = f"{len(rows)} of {len(suspects)} labels that are probably wrong, most suspicious first"
    draw.text((pad, 16), _shorten(title, head, sheet.width - 2 * pad), font=head, fill=INK)
    for k, row in enumerate(tqdm(rows, "thumbnails", leave=False, disable=None)):
        x, y = pad + k % columns * (side + pad), 58 + k // columns * (side + 2 * line + 2 * pad)
        draw.rectangle((x, y, x + side - 1, y + side - 1), fill=HOLLOW)
        picture = picture_of(row["index"])
        if picture is None:
            draw.text((x + side / 2, y + side / 2), "no picture", font=plain, fill=SOFT, anchor="mm")
        else:
            thumbnail = _fit(picture, side, enlarge=True)
            sheet.paste(thumbnail, (x + (side - thumbnail.width) // 2, y + (side - thumbnail.height) // 2))
        y += side + 5
        score = f"{row['score']:.3f}"
        room = side - plain.getlength(score) - 8
        given, proposed = _shorten(row["given"], plain, room), _shorten(f"→ {row['better']}", bold, side)
        draw.text((x, y), given, font=plain, fill=GIVEN)
        draw.line((x, y + 11, x + plain.getlength(given), y + 11), fill=GIVEN)
        draw.text((x + side, y), score, font=plain, fill=SOFT, anchor="ra")
        draw.text((x, y + line), proposed, font=bold, fill=PROPOSED)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")
    return path


def html_page(
    suspects: Dataset,
    dataset: Any,
    path: str | Path,
    *,
    count: int = 500,
    image: str = "image",
    title: str = "Labels that are probably wrong",
) -> Path:
    """The first suspects as one HTML file that opens from disk: to filter, to sort, to decide on, decisions as CSV.

    The file holds the thumbnails (96 px, about 4 KB each) and loads nothing; its policy forbids it to. What comes from
    the data is shown as text only. Arguments as of :func:`contact_sheet`.
    """
    rows, picture_of = _first(suspects, count), _pictures(suspects, dataset, image)
    names = {row[key]: row[name] for row in rows for key, name in (("label", "given"), ("proposed", "better"))}
    data = [[row["index"], row["label"], row["proposed"], *(round(row[k], 4) for k in ("score", "p_label", "p_proposed"))]
            for row in rows]  # fmt: skip
    key = "kd_plugins/" + blake2b(json.dumps([title, data]).encode(), digest_size=8).hexdigest()
    for entry, row in zip(data, tqdm(rows, "thumbnails", leave=False, disable=None), strict=True):
        entry.append(_data_uri(picture_of(row["index"])))
    page = files("kd_plugins").joinpath("suspects.html").read_text(encoding="utf-8")
    style, script = (_digest(page, tag) for tag in ("style", "script"))
    fill = {
        # nothing but this style, this script and pictures within the file: an error in the escaping would run nothing
        "POLICY": f"default-src 'none'; img-src data:; style-src {style}; script-src {script}; base-uri 'none'; form-action 'none'",
        "TITLE": escape(title),
        # no "<" can end the element that holds it; all beyond ASCII is escaped
        "DATA": json.dumps({"key": key, "names": names, "rows": data}, separators=(",", ":")).replace("<", "\\u003c"),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    page = re.sub("@(POLICY|TITLE|DATA)@", lambda match: fill[match[1]], page)  # in one pass: a title may hold "@DATA@"
    path.write_text(page, encoding="utf-8")
    return path


INK, SOFT, HOLLOW, GIVEN, PROPOSED = "#1d2127", "#5c6470", "#e7e9ed", "#ae4a00", "#00619a"


def _first(suspects: Dataset, count: int) -> list[dict[str, Any]]:
    """The first suspects as rows, with the names of their classes under `given` and `better`."""
    if count < 1:
        raise ValueError(f"count={count}: expected at least 1 suspect to show")
    doubted = np.flatnonzero(column_array(suspects, "label") != column_array(suspects, "proposed"))[:count]
    rows: Any = suspects.select(doubted).with_format(None).to_list()
    for row in rows:
        for key, name in (("label", "given"), ("proposed", "better")):
            row[name] = " ".join(str(row.get(f"{key}_name", row[key])).split())
    return rows


def _pictures(suspects: Dataset, dataset: Any, image: str) -> Callable[[int], Image.Image | None]:
    """Row of the data set -> its picture in RGB, None if it cannot be read."""
    _refuse_rows(column_array(suspects, "index"), len(dataset))
    value_of: Callable[[int], Any]
    if isinstance(dataset, ImageView):
        value_of = lambda row: dataset._values([row])[0]  # noqa: E731
    elif isinstance(dataset, Dataset):
        if image not in dataset.column_names:
            raise ValueError(f"No column {image!r}; there are {dataset.column_names}.")
        table = dataset.with_format("arrow", columns=[image])  # not decoded
        value_of = lambda row: table[row][image][0].as_py()  # noqa: E731
    else:
        value_of = lambda row: dataset[row][image]  # noqa: E731

    def picture_of(row: int) -> Image.Image | None:
        value = value_of(row)
        if not isinstance(value, _KINDS):
            raise TypeError(f"Column {image!r} holds {type(value).__name__}: expected picture, path or array.")
        try:
            return _decode(value)
        except Exception:  # as in ImageView: PIL's plugins raise nearly anything on broken files
            return None

    return picture_of


def _fit(picture: Image.Image, side: int, enlarge: bool = False) -> Image.Image:
    scale = side / max(picture.size)
    scale = scale if enlarge else min(scale, 1.0)
    width, height = (max(1, round(scale * n)) for n in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def _data_uri(picture: Image.Image | None) -> str | None:
    """A thumbnail as JPEG or PNG, whichever is smaller."""
    if picture is None:
        return None
    thumbnail = _fit(picture, 96)
    thumbnail.info = {}  # a colour profile may be larger than the picture
    encoded = {}
    for kind, settings in (("jpeg", {"quality": 82}), ("png", {"optimize": True})):
        thumbnail.save(buffer := BytesIO(), kind, **settings)
        encoded[kind] = buffer.getvalue()
    kind = min(encoded, key=lambda kind: len(encoded[kind]))
    return f"data:image/{kind};base64,{base64.b64encode(encoded[kind]).decode()}"


def _digest(page: str, tag: str) -> str:
    """The hash by which a policy allows the content of the bare element `tag`."""
    content = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"'sha256-{base64.b64encode(sha256(content.encode()).digest()).decode()}'"


def _font(size: int, style: str = "") -> ImageFont.FreeTypeFont:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the contact sheet needs matplotlib: pip install kd-plugins[recipes]") from error
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVuSans{style}.ttf")), size)


def _shorten(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    if font.getlength(text) <= room:
        return text
    text = text[:200]  # measuring is slow
    while text and font.getlength(f"{text}…") > room:
        text = text[:-1]
    return f"{text.rstrip()}…"
