"""Backbones: a module that maps images [B, 3, H, W] to one pooled vector per image [B, dim].

Built from torchvision's own blocks and with torchvision's own key names, so that weights go both ways without a
converter. Below 64 px a network made for 224 px would shrink the image to nothing before it has looked at it, so the
stem becomes a 3x3 convolution of stride 1 without max-pooling (the CIFAR form of He et al. 2016, sec. 4.2).

Bringing your own takes two lines: any `nn.Module` with an attribute `dim` whose forward returns [B, dim] is a backbone;
return it from `build` under a name. `stages(x)` (a list of feature maps) is needed only by methods that read maps.
"""

import difflib

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vgg import cfgs, make_layers

from common import fail

SMALL = 64  # px; below this the small-image stem is used

RESNETS = {  # name: (block, blocks per stage, channels of the first stage)
    "resnet18": (BasicBlock, (2, 2, 2, 2), 64),
    "resnet34": (BasicBlock, (3, 4, 6, 3), 64),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 64),
    "resnet101": (Bottleneck, (3, 4, 23, 3), 64),
    "resnet152": (Bottleneck, (3, 8, 36, 3), 64),
    # One block a stage, few channels, and a stem of stride 2 for small images: what two CPU cores can train in minutes.
    # Not in torchvision.
    "resnet10_16": (BasicBlock, (1, 1, 1, 1), 16),
    "resnet10_32": (BasicBlock, (1, 1, 1, 1), 32),
}
VGGS = {"vgg11_bn": "A", "vgg13_bn": "B", "vgg16_bn": "D", "vgg19_bn": "E"}
NAMES = [*RESNETS, *(f"{n}_w2" for n in RESNETS if not n.startswith("resnet10")), *VGGS, "alexnet_bn"]


class ResNet(nn.Module):
    """ResNet v1 (He et al. 2016; stride on the 3x3 convolution of a bottleneck, as in torchvision).

    `width` multiplies the channels of every layer ("ResNet-50 (2x)" of the BYOL paper), unlike torchvision's
    wide_resnet50_2, which widens only the inner convolution of a block.
    """

    def __init__(self, block, depths, channels, width=1, small=False):
        super().__init__()
        c = channels * width
        if small:
            self.conv1, self.maxpool = nn.Conv2d(3, c, 3, 2 if c < 64 else 1, 1, bias=False), nn.Identity()
        else:
            self.conv1, self.maxpool = nn.Conv2d(3, c, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1)
        self.bn1, self.relu = nn.BatchNorm2d(c), nn.ReLU(inplace=True)
        inplanes = c
        for i, depth in enumerate(depths):
            planes, blocks = c * 2**i, []
            for j in range(depth):
                stride, outplanes, downsample = 2 if i > 0 and j == 0 else 1, planes * block.expansion, None
                if stride != 1 or inplanes != outplanes:
                    conv = nn.Conv2d(inplanes, outplanes, 1, stride, bias=False)
                    downsample = nn.Sequential(conv, nn.BatchNorm2d(outplanes))
                # A bottleneck's inner width is planes * base_width / 64: torchvision's own default.
                blocks.append(block(inplanes, planes, stride, downsample))
                inplanes = outplanes
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.dim = inplanes
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def stages(self, x):
        """Feature maps after each of the four stages; at 224 px 56, 28, 14 and 7 px wide."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            maps.append(x := layer(x))
        return maps

    def forward(self, x):
        return self.stages(x)[-1].mean((2, 3))  # [B, dim]


class ConvNet(nn.Module):
    """A plain stack of convolutions under torchvision's name `features`; a stage ends at each max-pooling."""

    def __init__(self, features, dim):
        super().__init__()
        self.features, self.dim = features, dim
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(m.bias)

    def stages(self, x):
        maps = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                maps.append(x)
        return maps

    def forward(self, x):
        return self.features(x).mean((2, 3))  # [B, dim]


def alexnet_bn(small):
    """AlexNet's five convolutions with BatchNorm after each, as the pretext-task papers train it."""
    layers, inplanes = [], 3
    stem = (64, 3, 1, 1) if small else (64, 11, 4, 2)
    plan = [stem, "M", (192, 5, 1, 2), "M", (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1), "M"]
    for step in plan:
        if step == "M":
            layers.append(nn.MaxPool2d(3, 2))
        else:
            layers += [nn.Conv2d(inplanes, *step), nn.BatchNorm2d(step[0]), nn.ReLU(inplace=True)]
            inplanes = step[0]
    return ConvNet(nn.Sequential(*layers), 256)


def build(name, size=224):
    """The backbone called `name` for images of `size` px, freshly initialised from torch's global generator.

    An unknown name ends the program with exit code 2 and the nearest known one.
    """
    small = size < SMALL
    if size < 32 and name in (*VGGS, "alexnet_bn"):
        fail(f"--size {size}: {name} halves an image five times and needs 32 px or more")
    if name in VGGS:
        return ConvNet(make_layers(cfgs[VGGS[name]], batch_norm=True), 512)
    if name == "alexnet_bn":
        return alexnet_bn(small)
    if name in NAMES:
        block, depths, channels = RESNETS[name.removesuffix("_w2")]
        return ResNet(block, depths, channels, 2 if name.endswith("_w2") else 1, small)
    near = difflib.get_close_matches(name, NAMES, 1, 0.0)[0]
    fail(f"unknown architecture {name!r}; did you mean {near!r}? Known: {', '.join(NAMES)}")


def describe(net, name, size):
    """One line on what `build` made, for the recipe that a script prints."""
    parameters = sum(p.numel() for p in net.parameters()) / 1e6
    stem = f"below {SMALL} px: 3x3 stem, no max-pool" if size < SMALL and name not in VGGS else "the usual stem"
    return f"{name}, {parameters:.2f} M parameters, {net.dim}-d ({stem})"


def loading_lines(arch, size, path):
    """Two lines of Python that load an exported backbone; without this repository where torchvision has the network."""
    load = f'net.load_state_dict(torch.load("{path}", weights_only=True)["state_dict"])'
    stem = "net.conv1, net.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()"
    if arch in RESNETS and RESNETS[arch][2] == 64:
        make = f"import torch, torchvision; net = torchvision.models.{arch}(); net.fc = torch.nn.Identity()"
        return f"{make}; {stem}\n{load}" if size < SMALL else f"{make}\n{load}"
    if arch in VGGS:
        make = f"import torch, torchvision; net = torchvision.models.{arch}(); net.classifier = torch.nn.Identity()"
        return f"{make}\n{load}"
    return f'import torch, backbones; net = backbones.build("{arch}", {size})\n{load}'
