"""The losses need torch and what torch itself installs, and nothing else."""

import subprocess
import sys

CODE = """
import re, sys
from importlib.metadata import packages_distributions, requires

def with_its_needs(name, found):
    if name not in found:
        found.add(name)
        for need in requires(name) or []:
            if "extra ==" not in need:
                try:
                    with_its_needs(re.match(r"[\\w.-]+", need)[0].lower().replace("_", "-"), found)
                except ModuleNotFoundError:  # for another platform
                    pass
    return found

allowed = with_its_needs("torch", {"kd-plugins"})
own = {"kd_plugins", "_distutils_hack", "setuptools", "pkg_resources"}
for module, owners in packages_distributions().items():
    if module not in own and not {o.lower().replace("_", "-") for o in owners} & allowed:
        sys.modules[module] = None  # importing it fails

for module in ("numpy", "timm", "transformers", "datasets", "accelerate", "evaluate", "PIL"):
    assert sys.modules[module] is None, module

import torch
from kd_plugins import SMKD, MyLC
from kd_plugins.losses import KD, create_loss, list_losses

logits = torch.randn(8, 5, requires_grad=True)
target = torch.arange(8) % 5
mutual = SMKD()
mutual.set_progress(0.5)
(MyLC(window=8)(logits, target) + mutual([logits, -logits], target)).backward()
KD()(logits, target, teacher=logits[None].detach())
assert logits.grad.abs().sum() > 0 and len(list_losses()) > 40
"""


def test_losses_with_torch_alone():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_star_import_brings_every_public_name():
    """Losses alone would leave out the Trainer and its arguments."""
    names = {}
    exec("from kd_plugins import *", names)
    wanted = {"CE", "SMKD", "MutualDistillationTrainer", "MutualTrainingArguments", "ImageView"}
    assert wanted <= names.keys() and {"cache_teachers", "find_suspects"} <= names.keys()
