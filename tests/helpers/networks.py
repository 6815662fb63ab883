"""Small networks, batches and losses for the tests of `kd_plugins.models`."""

import torch

from helpers.tiny import CLASSES, SIZE
from kd_plugins import Loss
from kd_plugins.models import make_model


def pixels(n=6, size=SIZE):
    return torch.randn(n, 3, size, size)


def labels(n=6):
    return torch.arange(n) % CLASSES


def timm_vit(img_size=16, dynamic_img_size=False):
    size = {"img_size": img_size, "patch_size": 8, "dynamic_img_size": dynamic_img_size}
    return make_model("test_vit", CLASSES, **size)


def timm_conv():
    return make_model("resnet10t", CLASSES, channels=(8, 8, 8, 8))


def with_cfg(model, mean, std):
    model.pretrained_cfg = {"mean": mean, "std": std}
    return model


def spoil(model):
    """Statistics and weights that no constructor makes, so that a load which leaves something
    out shows."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.05 + 0.1 * torch.rand_like(tensor))
    return model.eval()


class FromTeachers(Loss):
    """Squared distance to the teachers' mean logits: shows which logits arrived."""

    def per_sample(self, logits, target, teacher):
        return (logits - teacher.mean(0)).square().sum(-1)
