"""Class names are matched by name, or refused."""

import re

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from helpers.tiny import Net, to_tensor, trainer

from kd_plugins.data import FeatureView, ImageView, noisy_view, same_classes
from kd_plugins.data.labels import class_names, class_positions

NAMES = ["cat", "dog", "owl"]


def data(names=NAMES, labels=(0, 1, 2, 0), **columns):
    """Pictures with a label, and other columns given as (names, values)."""
    columns = {"label": (names, labels)} | columns
    features = {
        key: ClassLabel(names=list(names)) if names else Value("int64")
        for key, (names, _) in columns.items()
    }
    pictures = [np.full((8, 8, 3), 60 * k, np.uint8) for k in range(len(labels))]
    rows = {key: list(values) for key, (_, values) in columns.items()}
    features["image"] = Dataset.from_dict({"image": pictures}).features["image"]
    return Dataset.from_dict(rows | {"image": pictures}, features=Features(features))


def test_human_labels_are_matched_by_name():
    source = data(human=(["owl", "cat", "dog"], [0, 1, 2, 2]))
    for rows in (range(4), [2, 0, 3]):
        view = noisy_view(source.select(rows), "human")
        given = [source.features["human"].names[source["human"][row]] for row in rows]
        assert [NAMES[k] for k in view["noisy_label"][:]] == given
    assert noisy_view(data(human=(None, [2, 2, 1, 0])), "human")["noisy_label"][:] == [2, 2, 1, 0]


@pytest.mark.parametrize(
    ("names", "only"),
    [
        (["owl", "cat", "cow"], ["cow", "dog"]),
        (["owl", "cat"], ["dog"]),
        ([*NAMES, "cow"], ["cow"]),
    ],
)
def test_other_names_are_refused(names, only):
    text = re.escape(f"column 'human' are not the expected classes: {only} are in one of them only")
    source = data(human=(names, [0, 1, 0, 1]))
    with pytest.raises(ValueError, match=text):
        noisy_view(source, "human")
    with pytest.raises(ValueError, match=text):
        ImageView(source, to_tensor, clean="human")


def test_numbers_that_do_not_start_at_zero_are_named(caplog):
    text = "so there are 4 classes; 1 of them have no row, the first is 0"
    for make in (
        lambda first: ImageView(data(None, np.arange(3) + first), to_tensor),
        lambda first: FeatureView(np.zeros((3, 2), np.float32), np.arange(3) + first),
    ):
        assert make(0).class_names == ["0", "1", "2"] and not caplog.text
        assert make(1).class_names == ["0", "1", "2", "3"] and text in caplog.text
        caplog.clear()
    ImageView(data(NAMES, (1, 2)), to_tensor)  # a part of named classes
    assert not caplog.text


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (pd.DataFrame({"label": [0]}), TypeError, "got a DataFrame: datasets.Dataset.from_pandas"),
        ([(np.zeros((8, 8, 3)), 0)], TypeError, "row 0 of this list is a tuple. A folder of"),
        (data(None, [0, None, 1, None]), ValueError, "2 of 4 rows have no label, the first is row"),
        (
            data().map(
                lambda row: {"label": [0, 1]},
                features=Features(
                    {"image": data().features["image"], "label": Sequence(Value("int64"))}
                ),
            ),
            ValueError,
            "got several: targets with several labels are not supported",
        ),
    ],
    ids=["frame", "tuples", "missing", "several"],
)
def test_what_has_no_label_to_train_on(rows, error, message):
    with pytest.raises(error, match=message):
        ImageView(rows, to_tensor)


def test_clean_labels_are_matched_by_name():
    source = data(true=(["owl", "cat", "dog"], [0, 1, -1, 2]))
    view = ImageView(source, to_tensor, clean="true")
    assert view.clean_labels.tolist() == [2, 0, -1, 1]
    assert view[0]["clean_labels"] == 2 and view.class_names == NAMES


def test_a_view_in_a_given_order_of_the_classes():
    view = ImageView(data(), to_tensor, class_names=["owl", "cat", "dog"])
    assert view.class_names == ["owl", "cat", "dog"] and view.labels.tolist() == [1, 2, 0, 1]
    rows = [{"image": b"", "label": 1}]  # without names of its own
    assert ImageView(rows, to_tensor, class_names=NAMES).class_names == NAMES
    with pytest.raises(ValueError, match=r"\['dog', 'cow'\]"):
        ImageView(data(), to_tensor, class_names=["owl", "cat", "cow"])
    with pytest.raises(ValueError, match="Label 1 in row 0"):
        ImageView(rows, to_tensor, class_names=["owl"])


def test_wordnet_numbers_are_names_and_plain_numbers_are_none():
    long = ["n01440764 tench, Tinca tinca", "n01443537 goldfish"]
    assert class_positions(long, ["n01440764", "n01443537"], "a") is None
    assert class_positions(long, ["n01443537", "n01440764"], "a").tolist() == [1, 0]
    assert class_positions(NAMES, ["0", "1", "2"], "a") is None
    assert class_names(data()) == NAMES and class_names(data(None)) is None
    assert class_names(ImageView(data(None), to_tensor)) is None and class_names(3) is None


def test_data_sets_are_compared():
    view, other = ImageView(data(), to_tensor), data(["dog", "cat", "owl"])
    same_classes(data(), view, "the eval data")
    same_classes(data(None), view, "the eval data")
    same_classes(["cat", "dog", "owl"], view, "the teacher")
    with pytest.raises(
        ValueError, match=r"the eval data has the .* another order: class 0 is 'dog' .*class_names="
    ):
        same_classes(other, view, "the eval data")
    with pytest.raises(
        ValueError,
        match=r"the eval data are not the classes of the training data: \['cow', 'owl'\]",
    ):
        same_classes(ImageView(data(["cat", "dog", "cow"]), to_tensor), view, "the eval data")


def test_the_trainer_compares_evaluation_and_training_data(tmp_path):
    train = ImageView(data(), to_tensor)
    other = ImageView(data(["dog", "cat", "owl"]), to_tensor)
    for evals in (other, {"a": train, "b": other}):
        with pytest.raises(ValueError, match="another order: class 0 is 'dog'"):
            trainer(tmp_path, [Net(1), Net(2)], train=train, evaluate=evals)
    trainer(tmp_path, train=train, evaluate={"a": train, "b": ImageView(data(None), to_tensor)})


def test_names_for_labels_are_told_how_to_become_indices():
    rows = Dataset.from_dict({"image": [[0]] * 2, "label": ["cat", "dog"]})
    hint = r"\(first value 'cat'\); dataset.class_encode_column\('label'\) makes indices of names"
    with pytest.raises(ValueError, match=hint):
        ImageView(rows, to_tensor)
