"""What depends on data and networks may be left out of a constructor: ``bind`` fills it in."""

import pytest
import torch
from torch import nn

from kd_plugins import (
    AFD,
    AT,
    CE,
    CRD,
    DML,
    FFL,
    PCL,
    VID,
    CAMKDFeatures,
    FitNet,
    Joint,
    Mutual,
    SelectNone,
    SoftLabels,
    TruncatedGCE,
    create_loss,
)
from kd_plugins.losses.state import SampleTable

N, C, B = 16, 3, 4
DIMS, TAUGHT = [[3, 6], [3, 5]], [[4, 7], [2, 8]]  # channels of two maps of each network
SIZES = {
    "num_samples": N,
    "num_classes": C,
    "feature_dims": DIMS,
    "teacher_feature_dims": TAUGHT,
}


HEADS = [nn.Linear(d[-1], C) for d in TAUGHT]


CASES = {  # without sizes, with all of them, and the sizes that it needs
    "truncated_gce": (TruncatedGCE, lambda: TruncatedGCE(N), "num_samples"),
    "joint": (Joint, lambda: Joint(N, C), "num_samples num_classes"),
    "fitnet": (FitNet, lambda: FitNet(3, (4, 2)), "feature_dims teacher_feature_dims"),
    "vid": (VID, lambda: VID(6, (7, 8)), "feature_dims teacher_feature_dims"),
    "crd": (
        lambda: CRD(feat_dim=4),
        lambda: CRD(N, 6, (7, 8), feat_dim=4),
        "num_samples feature_dims teacher_feature_dims",
    ),
    "camkd_features": (
        lambda: CAMKDFeatures(heads=HEADS),
        lambda: CAMKDFeatures(6, (7, 8), HEADS),
        "feature_dims",
    ),
    "ffl": (FFL, lambda: FFL((6, 5), C), "feature_dims num_classes"),
    "pcl": (PCL, lambda: PCL((6, 5), C), "feature_dims num_classes"),
    "afd": (AFD, lambda: AFD((6, 5)), "feature_dims"),
}
every = pytest.mark.parametrize("name", CASES)


def call(loss):
    g = torch.Generator().manual_seed(2)

    def maps(dims):
        return [torch.randn(B, d, 2, 2, generator=g) for d in dims]

    logits = [torch.randn(B, C, generator=g) for _ in range(loss.num_peers)]
    several = loss.num_peers > 1
    inputs = {
        "features": [maps(d) for d in DIMS] if several else maps(DIMS[0]),
        "teacher_features": [maps(d) for d in TAUGHT],
        "teacher": torch.randn(2, B, C, generator=g),
        "index": torch.tensor([3, 1, 15, 0]),
    }
    inputs = {key: value for key, value in inputs.items() if key in loss.required_inputs}
    loss.set_progress(0.5)
    torch.manual_seed(3)
    return loss(logits if several else logits[0], torch.tensor([0, 1, 2, 0]), **inputs)


@every
def test_bound_is_as_made_with_the_sizes(name):
    """State dict, value and description."""
    open_, explicit, _ = CASES[name]
    bound = open_()
    torch.manual_seed(0)
    assert bound.bind(**SIZES) is bound
    torch.manual_seed(0)
    whole = explicit()
    torch.testing.assert_close(bound.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert [n for n, _ in bound.named_parameters()] == [n for n, _ in whole.named_parameters()]
    assert repr(bound) == repr(whole)
    assert torch.equal(call(bound), call(whole))
    other = open_().bind(**SIZES)
    other.load_state_dict(bound.state_dict())


@every
def test_unbound_it_names_the_call(name):
    open_, _, needs = CASES[name]
    loss = open_()
    named = ", ".join(f"{size}=..." for size in needs.split())
    with pytest.raises(RuntimeError, match=rf"{type(loss).__name__} .*loss\.bind\({named}\)"):
        call(loss)


@every
def test_a_contradiction_names_both(name):
    _, explicit, needs = CASES[name]
    others = {
        "num_samples": N + 1,
        "num_classes": C + 1,
        "feature_dims": [[9, 9], [9, 9]],
        "teacher_feature_dims": [[9, 9], [9, 9]],
    }
    for size in needs.split():
        with pytest.raises(ValueError, match=r"was made for .*=.*, and .* have .*=.*(17|4|9)"):
            explicit().bind(**{size: others[size]})
    assert explicit().bind(**SIZES)


@every
def test_bound_twice_it_keeps_what_it_learned(name):
    loss = CASES[name][0]().bind(**SIZES)
    before = [id(t) for t in loss.state_dict(keep_vars=True).values()]
    loss.bind(**SIZES).bind(num_samples=N)
    assert [id(t) for t in loss.state_dict(keep_vars=True).values()] == before


@every
def test_sizes_may_come_one_after_the_other(name):
    loss = CASES[name][0]()
    for size, value in SIZES.items():
        loss.bind(**{size: value})
    assert call(loss).isfinite()


@every
def test_it_is_bound_as_part_of_a_sum(name):
    loss = CASES[name][0]()
    total = (CE() if loss.num_peers == 1 else DML()) + 0.5 * loss
    assert call(total.bind(**SIZES)).isfinite()


@pytest.mark.parametrize("name", ["truncated_gce", "joint"])
def test_by_name_and_for_each_peer(name):
    loss = Mutual(create_loss(name), SelectNone()).bind(**SIZES)
    assert call(loss).isfinite()
    tables = [m for m in loss.modules() if isinstance(m, SampleTable)]
    assert [table.num_samples for table in tables] == [N] * 4


@pytest.mark.parametrize("make", [FFL, PCL, AFD])
def test_the_number_of_networks(make):
    """It comes from the channels, or from num_peers, or is 2; the networks have to agree."""
    assert make().num_peers == 2 and make(num_peers=3).num_peers == 3
    assert make(feature_dims=(3, 4, 5)).num_peers == 3
    three = [[3], [4], [5]]
    assert make(num_peers=3).bind(num_classes=C, feature_dims=three).feature_dims == (3, 4, 5)
    with pytest.raises(ValueError, match=r"num_peers=2.* 3 networks.*num_peers=3"):
        make().bind(num_classes=C, feature_dims=three)
    for wrong in ({"num_peers": 1}, {"num_peers": 3, "feature_dims": (3, 4)}):
        with pytest.raises(ValueError, match=r"num_peers=1|feature_dims=\(3, 4\)"):
            make(**wrong)


def test_a_network_with_one_map_has_it_at_every_layer():
    loss = FitNet(layer=-2).bind(feature_dims=[[6]], teacher_feature_dims=[[7]])
    assert (loss.student_dim, loss.teacher_dims) == (6, (7,))
    with pytest.raises(ValueError, match="FitNet reads layer -4, got the maps of 2 layers"):
        FitNet(layer=-4).bind(feature_dims=DIMS)


def test_what_needs_no_sizes_ignores_them():
    for loss in (AT(), SoftLabels(torch.eye(C).repeat(6, 1)[:N])):
        assert loss.bind(**SIZES) is loss
    with pytest.raises(ValueError, match=r"num_samples=4.*num_samples=16"):
        SoftLabels(torch.full((4, C), 1 / C)).bind(**SIZES)


def test_heads_tell_channels_and_classes():
    loss = CAMKDFeatures(heads=HEADS)
    assert (loss.teacher_dims, loss.num_classes) == ((7, 8), C)
    with pytest.raises(ValueError, match=r"heads=.*classifier of each teacher"):
        CAMKDFeatures(6, (7, 8))
    with pytest.raises(ValueError, match=r"teacher_dims=\(7, 8\).*teacher_dims=\(9, 9\)"):
        loss.bind(teacher_feature_dims=[[9], [9]])


def test_labels_before_anything_is_known():
    with pytest.raises(RuntimeError, match=r"Joint .*loss\.bind\(num_samples=..., num_classes"):
        Joint().soft_labels()
