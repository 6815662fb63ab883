"""Probabilities of several networks, in the order of the rows and of the class names."""

import datasets
import numpy as np
import pytest
import timm
import torch
from helpers.suspects import FEATURES, NAMES
from helpers.tiny import CLASSES, Net, rows, to_tensor, trainer, vit
from torch import nn
from torchvision.transforms import ToTensor

from kd_plugins import DML, predict_probs
from kd_plugins.data import FeatureView, ImageView
from kd_plugins.models import export


def normalised(net, mean, std):
    net.pretrained_cfg = {"mean": mean, "std": std}
    return net


def test_probabilities_in_order_of_the_view():
    """Two networks with their own normalisation, over shuffled rows; their modes are restored.

    The view says how it normalises, also where the first network names something else.
    """
    data = datasets.Dataset.from_list(rows(21), features=FEATURES).shuffle(seed=1)
    view = ImageView(data, to_tensor)
    a = normalised(Net(1, bn=True, dropout=0.5), (0.5,) * 3, (0.5,) * 3)
    b = normalised(Net(2), (0.1, 0.2, 0.3), (0.9, 0.8, 0.7)).eval()
    b.fc.train()
    modes = [m.training for m in (*a.modules(), *b.modules())]
    random = torch.random.get_rng_state()
    got = predict_probs([a, b], view, batch_size=4)
    assert [m.training for m in (*a.modules(), *b.modules())] == modes and torch.equal(
        random, torch.random.get_rng_state()
    )
    assert got.dtype == np.float32 and got.shape == (21, CLASSES)
    a.eval(), b.eval()
    for i, row in enumerate(data):
        pixels = to_tensor(row["image"])[None]
        theirs = (
            (pixels + 1) * 128 / 255 - torch.tensor([0.1, 0.2, 0.3])[:, None, None]
        ) / torch.tensor([0.9, 0.8, 0.7])[:, None, None]
        with torch.no_grad():
            wanted = (a(pixels).softmax(-1) + b(theirs).softmax(-1)) / 2
        np.testing.assert_allclose(got[i], wanted[0], atol=1e-6)
    np.testing.assert_allclose(got.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(predict_probs(a, view), predict_probs([a], view))


def test_broken_pictures_have_no_probabilities():
    """The row that replaces a broken picture keeps its own probabilities."""
    table = rows(9)
    table[2]["image"] = table[8]["image"] = b"nothing"
    view = ImageView(table, to_tensor, max_broken=0.5)
    with pytest.warns(UserWarning, match="2 of 9 pictures cannot be read"):
        got = predict_probs(Net(1), view, batch_size=2)
    assert np.isnan(got[[2, 8]]).all() and np.isfinite(got[[0, 1, 3, 4, 5, 6, 7]]).all()
    np.testing.assert_allclose(
        got[3], predict_probs(Net(1), ImageView(table[3:6], to_tensor))[0], atol=1e-6
    )


def test_networks_see_what_they_saw_in_training(tmp_path):
    """The view says how it normalises; the second network has a cfg that says something else."""
    networks = [
        timm.create_model(name, num_classes=CLASSES) for name in ("resnet10_cifar", "test_resnet")
    ]
    view = ImageView(rows(6), ToTensor())
    hosting = trainer(tmp_path, networks, DML(), view)
    logits = torch.from_numpy(hosting.predict(view).predictions)  # [N, K, C]
    expected = logits.softmax(-1).mean(1)
    np.testing.assert_allclose(predict_probs(networks, view), expected, atol=1e-5)


def test_rows_of_features_go_by_their_place(tmp_path):
    """Also where they have numbers of their own; a row that stands in for another has none."""
    features = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    head = nn.Linear(4, CLASSES)
    with torch.no_grad():
        expected = head(torch.from_numpy(features)).softmax(-1).numpy()
    view = FeatureView(features, [0, 1, 2] * 2, index=[9, 8, 7, 0, 1, 2])
    assert view.num_samples == 10
    np.testing.assert_allclose(predict_probs(head, view, batch_size=4), expected, atol=1e-6)
    view.stand_in[1] = True
    with pytest.warns(UserWarning, match="1 of 6 pictures cannot be read"):
        assert np.isnan(predict_probs(head, view)).any(1).tolist() == [False, True] + [False] * 4


def test_networks_from_folders(tmp_path):
    network = timm.create_model("test_resnet", num_classes=CLASSES).eval()
    export(network, tmp_path / "peer_a")
    view = ImageView(
        [{"image": np.full((64, 64, 3), 50 * k, np.uint8), "label": k} for k in range(3)], to_tensor
    )
    np.testing.assert_allclose(
        predict_probs([tmp_path / "peer_a"], view), predict_probs(network, view), atol=1e-6
    )


SHUFFLED = [2, 0, 1]  # the network's class k is class SHUFFLED[k] of the data


@pytest.mark.parametrize("library", ["timm", "transformers", "folder"])
def test_classes_are_matched_by_name(library, tmp_path):
    """A network with its classes in another order gives each name the same probability."""
    data = datasets.Dataset.from_list(rows(6), features=FEATURES)
    view, names = ImageView(data, to_tensor), [NAMES[k] for k in SHUFFLED]
    network = {
        "timm": Net(1),
        "transformers": vit(),
        "folder": timm.create_model("test_resnet", num_classes=CLASSES),
    }[library]
    wanted = predict_probs(network, view)[:, np.argsort(SHUFFLED)]
    assert np.ptp(wanted, 1).min() > 1e-4
    if library == "timm":
        network.pretrained_cfg = {"label_names": names}
    elif library == "transformers":
        network.config.id2label = dict(enumerate(names))
    else:
        network = export(network, tmp_path / "peer_a", names)
    np.testing.assert_allclose(predict_probs(network, view), wanted, atol=1e-6)
    plain = Net(2)  # without names: the order of the data is assumed
    both = predict_probs([network, plain], view)
    np.testing.assert_allclose(both, (wanted + predict_probs(plain, view)) / 2, atol=1e-6)


def test_other_classes_are_refused_and_numbers_are_no_names():
    view = ImageView(datasets.Dataset.from_list(rows(6), features=FEATURES), to_tensor)
    network = normalised(Net(1), (0.0,) * 3, (1.0,) * 3)
    wanted = predict_probs(network, view)
    network.pretrained_cfg["label_names"] = ["cat", "cow", "owl"]
    message = r"classes of the view are not the classes of Net: \['dog', 'cow'\] are in one"
    with pytest.raises(ValueError, match=message):
        predict_probs(network, view)
    np.testing.assert_array_equal(predict_probs(network, ImageView(rows(6), to_tensor)), wanted)
    for names in (
        ["0", "1", "2"],
        ["LABEL_0", "LABEL_1", "LABEL_2"],
        ["of", "an", "older", "head"],
    ):
        network.pretrained_cfg["label_names"] = names
        np.testing.assert_array_equal(predict_probs(network, view), wanted)


def test_what_cannot_predict_is_refused():
    view = ImageView(rows(6), to_tensor)
    with pytest.raises(TypeError, match="view: expected an ImageView or a FeatureView, got Subset"):
        predict_probs(Net(1), torch.utils.data.Subset(view, [3, 4]))
    with pytest.raises(ValueError, match="at least one network"):
        predict_probs([], view)
    with pytest.raises(ValueError, match="the data have 3 classes, Net has 7"):
        predict_probs([Net(1), Net(2, classes=7)], view)
    broken = Net(1)
    nn.init.constant_(broken.fc.bias, torch.nan)
    with pytest.raises(ValueError, match="the networks predict NaN for row 0"):
        predict_probs(broken, view)
