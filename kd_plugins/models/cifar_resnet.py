"""ResNets for pictures of 32 px, registered with timm when this module is imported."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn


class _SmallPictureResNet(ResNet):
    """timm's ResNet with the stem of the CIFAR literature.

    The stem is one 3x3 convolution as wide as the first stage, without pooling. Three stages are
    layer2 to layer4, so that timm's forward passes and the order of the maps stay as they are.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        first: Any = self.layer1[0]  # type: ignore[index]
        wide = self.conv1.out_channels
        width = first.conv1.out_channels
        self.conv1: Any = nn.Conv2d(self.conv1.in_channels, width, 3, padding=1, bias=False)
        if width != wide:  # timm's stem is 64 wide whatever follows
            self.bn1 = type(self.bn1)(width)
            first.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
            first.downsample = None
        for conv in (self.conv1, first.conv1):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool: Any = nn.Identity()
        info: Any
        for info in self.feature_info:
            info["reduction"] = max(info["reduction"] // 4, 1)
        self.feature_info[0]["num_chs"] = width
        if len(self.feature_info) == 4:
            for k in (3, 2, 1):
                setattr(self, f"layer{k + 1}", getattr(self, f"layer{k}"))
            self.layer1: Any = nn.Identity()
            self.feature_info.insert(1, dict(self.feature_info[0]))
            for k, info in enumerate(self.feature_info[1:], 1):
                info["module"] = f"layer{k}"


_CIFAR = {
    "input_size": (3, 32, 32),
    "pool_size": (4, 4),
    "num_classes": 100,
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": (0.5071, 0.4865, 0.4409),
    "std": (0.2673, 0.2564, 0.2762),
    "first_conv": "conv1",
    "classifier": "fc",
    "license": "apache-2.0",
}


_NAMES = ("10", "18", "34", "20", "32", "56", "110", "8x4", "32x4")
default_cfgs = generate_default_cfgs({f"resnet{n}_cifar.untrained": _CIFAR for n in _NAMES})


def _build(name: str, layers: tuple[int, ...], pretrained: bool, **kwargs: Any) -> ResNet:
    kwargs = {"block": BasicBlock, "layers": layers, **kwargs}
    return build_model_with_cfg(_SmallPictureResNet, name, pretrained, **kwargs)


@register_model
def resnet10_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-10 for 32 px pictures at a quarter of the usual width, for two CPU cores."""
    kwargs = {"channels": (16, 32, 64, 128), **kwargs}
    return _build("resnet10_cifar", (1, 1, 1, 1), pretrained, **kwargs)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-18 for 32 px pictures."""
    return _build("resnet18_cifar", (2, 2, 2, 2), pretrained, **kwargs)


@register_model
def resnet34_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-34 for 32 px pictures: the backbone of SMKD's tables on CIFAR-100."""
    return _build("resnet34_cifar", (3, 4, 6, 3), pretrained, **kwargs)


# The networks of CRD's and DKD's tables on CIFAR-100: three stages of equally many blocks.


def _three_stages(depth: int, wide: int, pretrained: bool, **kwargs: Any) -> ResNet:
    name = f"resnet{6 * depth + 2}{f'x{wide}' if wide > 1 else ''}_cifar"
    kwargs = {"channels": (16 * wide, 32 * wide, 64 * wide), **kwargs}
    return _build(name, (depth,) * 3, pretrained, **kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-20 for 32 px pictures."""
    return _three_stages(3, 1, pretrained, **kwargs)


@register_model
def resnet32_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-32 for 32 px pictures."""
    return _three_stages(5, 1, pretrained, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-56 for 32 px pictures."""
    return _three_stages(9, 1, pretrained, **kwargs)


@register_model
def resnet110_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-110 for 32 px pictures."""
    return _three_stages(18, 1, pretrained, **kwargs)


@register_model
def resnet8x4_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-8x4 for 32 px pictures, four times as wide. There the stem is half as wide."""
    return _three_stages(1, 4, pretrained, **kwargs)


@register_model
def resnet32x4_cifar(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-32x4 for 32 px pictures, four times as wide. There the stem is half as wide."""
    return _three_stages(5, 4, pretrained, **kwargs)
