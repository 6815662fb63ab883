"""Each network goes out by itself: exported, with a card, to a repository of its own. No network
is touched."""

import json
import logging
from concurrent.futures import Future
from pathlib import Path

import pytest
import timm
import torch
import yaml
from helpers.tiny import CLASSES, Net, trainer, view, vit
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from kd_plugins import CE, KD, SMKD, MyLC
from kd_plugins.data import cache_teachers
from kd_plugins.models import library_of, make_model
from kd_plugins.models.card import model_card

TOKEN = "hf_thesecretoftherun"
HOSTILE = 'a: "b"\n---\n# <script>alert(1)</script> | `x` [y](http://z) ![w](http://z)'


@pytest.fixture
def hub(monkeypatch):
    """What would have gone to the hub: repositories by id, the call that made them, and the
    files they would hold."""
    sent = {}

    def create_repo(self, repo_id, *, token=None, private=None, exist_ok=False):
        full = repo_id if "/" in repo_id else f"someone/{repo_id}"
        sent[full] = {"token": token, "private": private, "exist_ok": exist_ok}
        return type("RepoUrl", (str,), {"repo_id": full})(f"https://hub/{full}")

    def upload_folder(self, *, repo_id, folder_path, run_as_future, allow_patterns, **call):
        files = [
            str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file()
        ]
        kept = filter_repo_objects(files, allow_patterns=allow_patterns)
        sent[repo_id] |= {
            "files": {name: Path(folder_path, name).read_bytes() for name in kept},
            "upload": call,
        }
        if not run_as_future:
            return repo_id
        future = Future()
        future.set_result(repo_id)
        return future

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return sent


def timm_net(name="test_resnet", **kwargs):
    return make_model(name, CLASSES, **kwargs)


def unpack(repo, folder):
    folder.mkdir()
    for name, content in repo["files"].items():
        (folder / name).write_bytes(content)
    return folder


def test_both_peers_of_a_run_load_alone(tmp_path):
    """After training, from the folders that export() wrote: timm and transformers, logits equal."""
    models = [timm_net(), timm_net("test_vit", img_size=16, patch_size=8)]
    run = trainer(tmp_path, models, train=view(16), num_train_epochs=1, learning_rate=0.01)
    run.train()
    x = torch.randn(3, 3, 16, 16)
    for folder, peer in zip(run.export(), run.peers, strict=True):
        expected = peer.eval()(x)
        alone = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        torch.testing.assert_close(alone(x), expected, rtol=1e-5, atol=1e-5)
        wrapped = AutoModelForImageClassification.from_pretrained(folder).eval()
        torch.testing.assert_close(wrapped(x).logits, expected, rtol=1e-5, atol=1e-5)


def test_push_to_hub(tmp_path, hub, caplog, capfd):
    """A repository each, with weights, config and card, that load: nothing of the optimizer, no
    pickle, no token."""
    caplog.set_level(logging.DEBUG)
    run = trainer(
        tmp_path / "pair of nets",
        [timm_net(), timm_net("test_resnet")],
        train=view(16),
        evaluate=view(8),
        num_train_epochs=1,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="epoch",
        hub_token=TOKEN,
        hub_model_id="me/nets",
        hub_private_repo=True,
        hub_revision="v1",
    )
    run.train()
    run.save_model()  # leaves the pair, and its arguments as a pickle, in the output folder
    assert (tmp_path / "pair of nets" / "training_args.bin").exists()
    for folder in run.export():
        (folder / "optimizer.pt").write_bytes(b"x")
        (folder / "checkpoint-1").mkdir()
        (folder / "checkpoint-1" / "config.json").write_text("{}")
    assert run.push_to_hub() == ["me/nets-a", "me/nets-b"]
    assert hub.keys() == {"me/nets-a", "me/nets-b"}
    for k, (repo, sent) in enumerate(hub.items()):
        assert sent["files"].keys() == {"config.json", "model.safetensors", "README.md"}
        assert (sent["token"], sent["private"], sent["exist_ok"]) == (TOKEN, True, True)
        assert sent["upload"] == {
            "commit_message": "End of training",
            "token": TOKEN,
            "revision": "v1",
        }
        assert not [name for name, content in sent["files"].items() if TOKEN.encode() in content]
        card = ModelCard(sent["files"]["README.md"].decode())
        assert card.data.to_dict() == {
            "library_name": "timm",
            "pipeline_tag": "image-classification",
            "tags": ["image-classification", "timm", "transformers", "kd-plugins"],
        }
        assert f'timm.create_model("hf-hub:{repo}", pretrained=True)' in card.text
        assert f'from_pretrained("{repo}")' in card.text
        alone = timm.create_model(
            f"local-dir:{unpack(sent, tmp_path / str(k))}", pretrained=True
        ).eval()
        x = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(alone(x), run.peers[k].eval()(x), rtol=1e-5, atol=1e-5)
    assert TOKEN not in caplog.text + "".join(capfd.readouterr())


def test_one_network_has_no_suffix_and_arguments_win(tmp_path, hub):
    run = trainer(
        tmp_path / "vit", vit(), CE(), train=view(16), hub_token="other", hub_private_repo=True
    )
    futures = run.push_to_hub(
        "first",
        blocking=False,
        token=TOKEN,
        revision="dev",
        private=False,
        license="apache-2.0",
        datasets=["uoft-cs/cifar100"],
        tags="mine",
    )
    assert [f.result() for f in futures] == ["someone/vit"]
    sent = hub["someone/vit"]
    assert (sent["token"], sent["private"]) == (TOKEN, False)
    assert sent["upload"] == {"commit_message": "first", "token": TOKEN, "revision": "dev"}
    card = ModelCard(sent["files"]["README.md"].decode())
    assert (card.data.license, card.data.datasets, card.data.library_name) == (
        "apache-2.0",
        ["uoft-cs/cifar100"],
        "transformers",
    )
    assert card.data.tags == ["image-classification", "transformers", "kd-plugins", "mine"]
    assert "timm.create_model" not in card.text
    again = AutoModelForImageClassification.from_pretrained(unpack(sent, tmp_path / "again"))
    assert torch.equal(again.classifier.weight, run.peers[0].classifier.weight)


def test_only_the_main_process_uploads(tmp_path, hub, monkeypatch):
    run = trainer(tmp_path / "x", Net(), CE())
    monkeypatch.setattr(run, "is_world_process_zero", lambda: False)
    assert run.push_to_hub() == []
    assert not hub
    assert not (tmp_path / "x" / "peer_a").exists()


def test_nothing_is_uploaded_where_a_repository_is_refused(tmp_path, hub, monkeypatch):
    """All are made before the first upload; the error is the hub's, and names no token."""

    def refuse(self, repo_id, **call):
        raise OSError(f"403 for {repo_id}")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(OSError, match="403 for pair-a") as caught:
        trainer(tmp_path / "pair", hub_token=TOKEN).push_to_hub()
    assert TOKEN not in str(caught.value)
    assert not hub


def test_push_during_training_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"push_to_hub=True.*trainer\.push_to_hub\(\) after training"
    ) as caught:
        trainer(tmp_path, push_to_hub=True, hub_strategy="end", hub_token=TOKEN)
    assert TOKEN not in str(caught.value)


# --------------------------------------------------------------------------------------------- card


def test_card_of_hostile_names(tmp_path, monkeypatch):
    """They can neither leave the YAML block nor reach the page as HTML, a link or another
    column."""
    known = timm.models._registry._model_entrypoints  # a name that timm lacks is not exported
    monkeypatch.setitem(known, HOSTILE, known["test_resnet"])
    data = view(16)
    data.name, data.class_names = HOSTILE, [HOSTILE, "b", "c"]
    models = [timm_net(), timm_net()]
    models[0].pretrained_cfg = {**models[0].pretrained_cfg, "architecture": HOSTILE}
    run = trainer(tmp_path, models, SMKD(MyLC(window=9)), train=data, evaluate={HOSTILE: view(8)})
    run.evaluate()
    a, b = run.export(license=HOSTILE, tags=[HOSTILE])
    text = (a / "README.md").read_text(encoding="utf-8")
    head, body = text.split("\n---\n", 1)
    fields = yaml.safe_load(head.removeprefix("---\n"))
    assert fields["license"] == HOSTILE and fields["tags"][-1] == HOSTILE
    assert ModelCard(text).data.to_dict() == fields
    assert fields["library_name"] == "timm"
    assert not [
        sign for sign in ("<", "`x", "[y]", "](", "![", "# <") if sign in body.split("**Use**")[0]
    ]
    assert all(line.count("|") == 3 for line in body.splitlines() if line.startswith("|"))
    assert "\n**Data**: a_ _b_ --- _ _script_alert(1)_/script_" in body
    assert json.loads((b / "config.json").read_text())["label_names"][0] == HOSTILE


def test_card_describes_the_weights_that_are_exported(tmp_path):
    """The best ones, with their figures; of one data set; with the network's own learning rate."""
    settings = {"num_train_epochs": 3, "eval_strategy": "epoch", "save_strategy": "epoch"}
    settings |= {"load_best_model_at_end": True}
    settings |= {"metric_for_best_model": "loss", "greater_is_better": True}  # so, the first epoch
    rates = {"optim_per_peer": [{"lr": 0.03}, {"lr": 0.001}]}
    run = trainer(tmp_path, evaluate=view(12, clean=False), hf=rates, **settings)
    run.train()
    losses = [log["eval_loss"] for log in run.state.log_history if "eval_loss" in log]
    assert losses[0] == run.state.best_metric > losses[-1]
    card = model_card(run, 1)
    assert f"| eval_loss | {losses[0]:.4f} |" in card
    assert f"The weights are those of step {run.state.best_global_step}, the best." in card
    assert "learning rate 0.001" in card and "learning rate 0.03" in model_card(run, 0)
    assert run.evaluate(view(12))["eval_memorised"] >= 0  # with clean labels
    assert "eval_memorised" in model_card(run, 0)
    figures = run.evaluate()
    card = model_card(run, 0)
    assert f"| eval_loss | {figures['eval_loss']:.4f} |" in card and "eval_memorised" not in card


def test_card_says_what_loads_it(tmp_path):
    small = timm.create_model("resnet10_cifar", num_classes=CLASSES)
    told = Net(2)
    told.pretrained_cfg = {
        "mean": (0.0,) * 3,
        "std": (1.0,) * 3,
    }  # tells its normalisation; timm does not know it
    networks = {"timm": small, "transformers": vit(), "pytorch": told}
    run = trainer(
        tmp_path, list(networks.values()), SMKD(CE(), eta=1, b2=0, num_peers=3), train=view(16)
    )
    for folder, (library, network) in zip(run.export(), networks.items(), strict=True):
        assert library_of(network) == library
        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == library
        assert ('timm.create_model("local-dir:FOLDER"' in card.text) == (library == "timm")
        assert ("AutoModelForImageClassification" in card.text) == (library != "pytorch")
        assert ("import kd_plugins.models" in card.text) == (library == "timm")
        assert "license" not in card.data.to_dict()
    assert load_file(tmp_path / "peer_c" / "model.safetensors").keys() == told.state_dict().keys()
    assert 'load_model(network, "model.safetensors")' in card.text


def test_card_names_the_teachers(tmp_path):
    teachers = [timm_net(), Net(3)]
    beside = trainer(tmp_path, [Net(1)], CE() + KD(), hf={"teachers": teachers})
    assert "trained with kd-plugins, taught by test_resnet, Net." in model_card(beside, 0)
    cached = cache_teachers(view(), teachers, tmp_path / "cache", student=Net(1))
    cached = trainer(tmp_path, [Net(1)], CE() + KD(), train=cached)
    assert "taught by the cached logits of 2 networks." in model_card(cached, 0)
    assert "taught" not in model_card(trainer(tmp_path, [Net(1)], CE()), 0)


def test_card_says_what_it_was_evaluated_on(tmp_path):
    """And what a figure without a suffix is, where there are several networks."""
    sets = {"easy": view(8), "hard": view(12)}
    for data, name in zip(sets.values(), sets, strict=True):
        data.name = f"me/{name}"
    networks = [timm_net(), timm_net()]
    run = trainer(tmp_path, networks, SMKD(MyLC(window=9)), train=view(16), evaluate=sets)
    card = lambda: run.export()[0].joinpath("README.md").read_text(encoding="utf-8")  # noqa: E731
    both = "was on eval_easy: me/easy, 8 rows; eval_hard: me/hard, 12 rows. Figures without _a, _b"
    run.evaluate()
    assert both in card() and "are means of the networks" in card()
    run.evaluate(sets["hard"])
    run.evaluate(sets["easy"], metric_key_prefix="test")  # no figure of the card
    run.evaluated = {k: v for k, v in run.evaluated.items() if k == "eval"}
    assert "was on me/hard, 12 rows." in card()
    alone = trainer(tmp_path / "one", timm_net(), CE(), train=view(16), evaluate=sets["hard"])
    text = alone.export()[0].joinpath("README.md").read_text(encoding="utf-8")
    assert "The last evaluation was on me/hard, 12 rows.\n" in text
    zeros = {"input_size": (3, 8, 8), "mean": (-0.0,) * 3, "std": (1.0,) * 3}
    assert "mean (0, 0, 0), std (1, 1, 1)" in model_card(alone, 0, input_config=zeros)


def test_unknown_field_of_a_card_is_refused(tmp_path, hub):
    """Before anything is made on the hub."""
    run = trainer(tmp_path, Net(), CE())
    for call in (run.create_model_card, run.push_to_hub):
        with pytest.raises(TypeError, match=r"no field \['licence'\].*'license'"):
            call(licence="mit")
    assert not hub
