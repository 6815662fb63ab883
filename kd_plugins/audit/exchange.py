"""Suspects for Label Studio, Argilla and cleanlab's Datalab, and what comes back from there.

>>> tasks = to_label_studio(suspects, train, class_names=names)  # doctest: +SKIP
>>> Path("tasks.json").write_text(json.dumps(tasks))  # import this file  # doctest: +SKIP
>>> exported = json.loads(Path("export.json").read_text())  # doctest: +SKIP
>>> decisions = from_label_studio(exported, suspects, names)  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, ClassVar
from xml.sax.saxutils import quoteattr

import numpy as np
from datasets import Dataset, Features, Value

from ..data.labels import column_array
from .decisions import NO_CLASS
from .gallery_rows import pictures_of, shown_rows, thumbnail

QUESTION = "label"  # what Label Studio and Argilla call it
NO_NAME = "none of the classes"  # the answer for a picture that belongs to no class
SIDE = 512  # of a picture inside a task, in pixels
ISSUE = "suspect"  # "label" would mix with Datalab's own


def to_label_studio(
    suspects: Dataset,
    dataset: Any,
    *,
    class_names: Sequence[str],
    count: int = 500,
    image: str = "image",
    label: str | None = "label",
    url: Callable[[int], str] | None = None,
) -> list[dict[str, Any]]:
    """Tasks with the proposed label as a prediction, in Label Studio's basic JSON format.

    The project needs :func:`label_studio_config`.

    Args:
        suspects, dataset, count, image, label: see :func:`html_page`.
        class_names: of all classes, in order.
        url: the address of a row's picture. Without it the pictures are in the tasks (512 px), as
            data URIs; use it for many or large pictures.

    References:
        https://labelstud.io/guide/tasks and https://labelstud.io/guide/predictions
    """
    tasks = []
    for row, picture in _rows(suspects, dataset, count, image, label, url):
        value = {"choices": [class_names[row["proposed"]]]}
        result = {"from_name": QUESTION, "to_name": "image", "type": "choices", "value": value}
        result["id"] = f"suspect-{row['index']}"
        shown = {"image": picture, "row": row["index"], "given": class_names[row["label"]]}
        prediction = {"model_version": "kd_plugins", "score": row["score"], "result": [result]}
        tasks.append({"data": shown, "predictions": [prediction]})
    return tasks


def label_studio_config(class_names: Sequence[str]) -> str:
    """The labelling configuration (XML) for the tasks of :func:`to_label_studio`."""
    choices = "".join(f"<Choice value={quoteattr(name)}/>" for name in [*class_names, NO_NAME])
    return (
        '<View><Image name="image" value="$image"/><Text name="given" value="given: $given"/>'
        f'<Choices name="{QUESTION}" toName="image" choice="single">{choices}</Choices></View>'
    )


def from_label_studio(
    tasks: Iterable[Mapping[str, Any]], suspects: Dataset, class_names: Sequence[str]
) -> Dataset:
    """Decisions from Label Studio's JSON export, for :func:`apply_decisions`.

    A task that was skipped there is skipped here, and one without an annotation is left out. Of
    several annotations of a task the last one counts.
    """
    answers: dict[int, str | None] = {}
    for task in tasks:
        for annotation in task.get("annotations", ()):
            chosen = [
                result["value"]["choices"][0]
                for result in annotation["result"]
                if result["from_name"] == QUESTION
            ]
            skipped = annotation.get("was_cancelled") or not chosen
            answers[int(task["data"]["row"])] = None if skipped else chosen[0]
    return _decisions(answers, suspects, class_names)


def to_argilla(
    suspects: Dataset,
    dataset: Any,
    *,
    class_names: Sequence[str],
    count: int = 500,
    image: str = "image",
    label: str | None = "label",
    url: Callable[[int], str] | None = None,
) -> list[dict[str, Any]]:
    """Records with the proposed label as a suggestion, as ``records.from_json`` of Argilla 2 reads.

    The data set there needs ``rg.ImageField("image")``, ``rg.TextField("given")`` and
    ``rg.LabelQuestion("label", labels=[*class_names, "none of the classes"])``. The arguments are
    those of :func:`to_label_studio`.

    References:
        https://docs.argilla.io/latest/reference/argilla/records/records
    """
    records = []
    for row, picture in _rows(suspects, dataset, count, image, label, url):
        value, score = class_names[row["proposed"]], row["score"]
        records.append(
            {
                "id": str(row["index"]),
                "fields": {"image": picture, "given": class_names[row["label"]]},
                "suggestions": {QUESTION: {"value": value, "score": score, "agent": "kd_plugins"}},
                "metadata": {},
                "responses": {},
                "vectors": {},
            }
        )
    return records


def from_argilla(
    records: Iterable[Mapping[str, Any]], suspects: Dataset, class_names: Sequence[str]
) -> Dataset:
    """Decisions from the file of ``records.to_json``, for :func:`apply_decisions`.

    Records without a response are left out. Of several responses the last one counts.
    """
    answers: dict[int, str | None] = {}
    for record in records:
        for response in record.get("responses", {}).get(QUESTION, ()):
            answers[int(record["id"])] = response["value"]
    return _decisions(answers, suspects, class_names)


def from_datalab(lab: Any, class_names: Sequence[str] | None = None) -> Dataset:
    """The label issues of a cleanlab ``Datalab`` as suspects, the worst first.

    Args:
        lab: after ``lab.find_issues(pred_probs=...)``.
        class_names: in order, if the labels of the lab are names.

    Notes:
        A lab keeps no probabilities: ``p_label`` is cleanlab's label score (by default p of the
        given label), and ``p_proposed`` is NaN.
    """
    issues = lab.get_issues("label")
    issues = issues[issues["is_label_issue"]].sort_values("label_score", kind="stable")
    columns: dict[str, Any] = {"index": issues.index.to_numpy()}
    for name, source in (("label", "given_label"), ("proposed", "predicted_label")):
        values = issues[source].tolist()
        if class_names is not None:
            columns[f"{name}_name"] = values
            values = [_position(value, class_names) for value in values]
        columns[name] = np.array(values, np.int64)
    quality = issues["label_score"].to_numpy(np.float32)
    columns |= {"score": 1 - quality, "p_label": quality}
    columns["p_proposed"] = np.full(len(issues), np.nan, np.float32)
    return Dataset.from_dict(columns)


def to_datalab(suspects: Dataset, lab: Any) -> None:
    """Add suspects to a cleanlab ``Datalab`` of the same rows, as issues of the type ``suspect``.

    ``lab.get_issues("suspect")`` then has ``is_suspect_issue`` and ``suspect_score``, which is
    1 - score, and 1 for rows that are no suspects. ``lab.report()`` and ``lab.save()`` know them.
    """
    import pandas

    index, size = column_array(suspects, "index"), len(lab.labels)
    if len(index) and index.max() >= size:
        raise ValueError(f"the suspects have row {index.max()}, the lab {size} rows: other data")
    quality, doubted = np.ones(size), np.zeros(size, bool)
    quality[index] = 1 - np.array(suspects["score"][:])
    doubted[index] = column_array(suspects, "label") != column_array(suspects, "proposed")
    issues = pandas.DataFrame({f"is_{ISSUE}_issue": doubted, f"{ISSUE}_score": quality})
    _register_manager()
    lab.find_issues(issue_types={ISSUE: {"issues": issues}})


@cache
def _register_manager() -> None:
    """Make the type of issues known to cleanlab."""
    from cleanlab.datalab.internal.issue_manager import IssueManager
    from cleanlab.datalab.internal.issue_manager_factory import register

    class SuspectIssueManager(IssueManager):
        description = "Labels that are probably wrong, by kd_plugins"
        issue_name = ISSUE
        verbosity_levels: ClassVar[dict[int, list[str]]] = {0: [], 1: [], 2: [], 3: []}

        def find_issues(self, issues: Any = None, **_: Any) -> None:
            self.issues = issues
            self.summary = self.make_summary(score=float(issues[self.issue_score_key].mean()))
            self.info: dict[str, Any] = {}

    register(SuspectIssueManager)


def _rows(
    suspects: Dataset,
    dataset: Any,
    count: int,
    image: str,
    label: str | None,
    url: Callable[[int], str] | None,
) -> Iterable[tuple[dict[str, Any], str]]:
    """The first suspects, and the address of their pictures. Broken pictures are left out."""
    picture_of = pictures_of(suspects, dataset, image, label)
    for row in shown_rows(suspects, count):
        if url is not None:
            yield row, url(row["index"])
        elif (encoded := thumbnail(picture_of(row["index"]), SIDE)) is not None:
            yield row, f"data:image/webp;base64,{encoded}"


def _decisions(
    answers: Mapping[int, str | None], suspects: Dataset, class_names: Sequence[str]
) -> Dataset:
    """A table of decisions from the class that was chosen for each row, or None if skipped."""
    index, label, proposed = (
        column_array(suspects, name).tolist() for name in ("index", "label", "proposed")
    )
    place = {row: k for k, row in enumerate(index)}
    if unknown := sorted(answers.keys() - place.keys()):
        raise ValueError(f"row {unknown[0]} is not among the suspects: they are of another export")
    rows: list[tuple[int, int, int, str, int | None]] = []
    for row, name in answers.items():
        given, better = label[place[row]], proposed[place[row]]
        new = NO_CLASS if name == NO_NAME else _position(name, class_names) if name else None
        decision = {None: "skip", better: "wrong", given: "fine"}.get(new, "other")
        rows.append((row, given, better, decision, None if new == NO_CLASS else new))
    names = ("index", "label", "proposed", "decision", "new_label")
    kinds = {name: Value("string" if name == "decision" else "int64") for name in names}
    table = {name: [row[k] for row in rows] for k, name in enumerate(names)}
    return Dataset.from_dict(table, features=Features(kinds))


def _position(name: Any, class_names: Sequence[str]) -> int:
    try:
        return list(class_names).index(name)
    except ValueError:
        raise ValueError(
            f"{name!r} is none of the classes {list(class_names)[:5]}...: expected the names that "
            "the data have"
        ) from None
