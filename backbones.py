"""Backbones: modules that map images [B, 3, H, W] to one pooled vector per image [B, dim], by name (`build`).

ResNets are made of torchvision's blocks with torchvision's key names, so weights go both ways without a converter.
Below 64 px the stem is a 3x3 convolution of stride 1 without max-pooling (the CIFAR form of He et al. 2016, sec. 4.2).
revisiting.py has ResNet v2, RevNet and VGG with a widening factor.

Your own backbone takes two lines at the top of `build`: any `nn.Module` with an attribute `dim` whose forward returns
[B, dim]. SaGe, colorization and the probe of all depths also read feature maps, as `Backbone` gives them.
"""

import collections
import difflib
import functools
import math
import re
from pathlib import Path

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import StochasticDepth

from common import fail

SMALL = 64  # px; below this the small-image stem is used

RESNETS = {  # name: (block, blocks per stage, channels of the first stage)
    "resnet18": (BasicBlock, (2, 2, 2, 2), 64),
    "resnet34": (BasicBlock, (3, 4, 6, 3), 64),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 64),
    "resnet101": (Bottleneck, (3, 4, 23, 3), 64),
    "resnet152": (Bottleneck, (3, 8, 36, 3), 64),
    # Not in torchvision: what two CPU cores can train in minutes. The stem has stride 2 for small images, too.
    "resnet10_16": (BasicBlock, (1, 1, 1, 1), 16),
    "resnet10_32": (BasicBlock, (1, 1, 1, 1), 32),
}
PLAIN = [*RESNETS, *(f"{n}_w2" for n in RESNETS if not n.startswith("resnet10"))]
TORCHVISION = [*sorted(set(torchvision.models.list_models(torchvision.models)) - set(RESNETS)), "alexnet_bn"]

STRIDES = {  # total stride: of root, pool, stages 2, 3, 4. The root loses its stride first, then stages from the end
    32: (2, 2, 2, 2, 2),
    16: (1, 2, 2, 2, 2),
    8: (1, 2, 2, 2, 1),  # the study's form for patches of 64 px
    4: (1, 2, 2, 1, 1),
    2: (1, 2, 1, 1, 1),
}

DEPTHS = {"50": (3, 4, 6, 3), "26": (2, 2, 2, 2), "14": (1, 1, 1, 1)}  # 50 is the study's; the others for small budgets
STUDY = {  # family: (class, here or in revisiting.py, units per stage)
    **{f"resnet{n}v1": ("ResNet", units) for n, units in DEPTHS.items()},
    **{f"resnet{n}v2": ("ResNetV2", units) for n, units in DEPTHS.items()},
    **{f"revnet{n}": ("RevNet", units) for n, units in DEPTHS.items()},
    "vgg19": ("VGG", (2, 2, 4, 4, 4)),
    "vgg11": ("VGG", (1, 1, 2, 2, 2)),
}


class Backbone(nn.Module):
    """`dim` is the width of the vector, `channels` that of the last feature map.

    A subclass writes `maps`: {name: map [B, C, H, W]} in order of depth, "root" (after the first convolution and
    pooling) and "block1", "block2", ..., and `vectors` if the vector is not the mean of the last map.
    """

    def vectors(self, last):
        """{name: vector} after the last map; "pre_logits" [B, dim] is what a probe or a head gets."""
        return {"pre_logits": last.mean((2, 3))}

    def stages(self, x):
        """The list of feature maps after each stage."""
        return [m for name, m in self.maps(x).items() if name != "root"]

    def taps(self, x):
        """All maps, then all vectors, by name."""
        maps = self.maps(x)
        return maps | self.vectors(list(maps.values())[-1])

    def forward(self, x):
        return self.taps(x)["pre_logits"]  # [B, dim]


def he(net):
    """The init of He et al. 2015, by fan-out, for all convolutions, which have no biases."""
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")


def blocks(x, layers):
    """{"block1": layers[0](x), "block2": layers[1](of that), ...}"""
    return {f"block{i}": (x := layer(x)) for i, layer in enumerate(layers, 1)}


def stages(unit, depths, inplanes, widths, strides):
    """A stage of `depth` units for each width; unit(inplanes, outplanes, stride), only the first has the stride."""
    layers = []
    for depth, outplanes, stride in zip(depths, widths, strides, strict=True):
        first = unit(inplanes, outplanes, stride)
        layers.append(nn.Sequential(first, *(unit(outplanes, outplanes, 1) for _ in range(depth - 1))))
        inplanes = outplanes
    return layers


def residual(block, inplanes, outplanes, stride):
    """torchvision's residual `block`, with a projection where the shape changes."""
    project = None
    if stride != 1 or inplanes != outplanes:
        conv = nn.Conv2d(inplanes, outplanes, 1, stride, bias=False)
        project = nn.Sequential(conv, nn.BatchNorm2d(outplanes))
    return block(inplanes, outplanes // block.expansion, stride, project)


class ResNet(Backbone):
    """ResNet v1 (He et al. 2016; stride on the 3x3 convolution of a bottleneck, as in torchvision).

    `channels` are those of the root. Twice as many widen every layer ("ResNet-50 (2x)" of the BYOL paper), unlike
    torchvision's wide_resnet50_2. `strides`: of root, pool and stages 2, 3, 4. `inputs`: channels of the images.
    """

    def __init__(self, block, depths, channels, strides=STRIDES[32], kernel=7, inputs=3):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, kernel, strides[0], kernel // 2, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, strides[1], 1) if strides[1] > 1 else nn.Identity()
        widths = [channels * block.expansion * 2**i for i in range(4)]
        layers = stages(functools.partial(residual, block), depths, channels, widths, (1, *strides[2:]))
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.dim = self.channels = widths[-1]
        he(self)

    def maps(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return {"root": x} | blocks(x, (self.layer1, self.layer2, self.layer3, self.layer4))


class Bias(nn.Module):
    """One number a channel, added out of place: a ReLU in place after it must not change a skip connection."""

    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return x + self.bias[:, None, None]


def without_batchnorm(net, norm):
    """The ResNet with something else in BatchNorm's place, so that the features of an image (for CPC: of a patch) do
    not depend on the rest of its batch. "_ln": layer norm over channels and places of a map; "_nobn": biases only, and
    residual functions that start at 0, as in Fixup (Zhang et al. 2019, https://arxiv.org/abs/1901.09321)."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                channels = child.num_features
                setattr(module, name, nn.GroupNorm(1, channels) if norm == "_ln" else Bias(channels))
        last = getattr(module, "conv3", getattr(module, "conv2", None))  # of a bottleneck, and of a basic block
        if norm == "_nobn" and last is not None:
            nn.init.zeros_(last.weight)
    return net


# ============ color spaces, and a network for each group of channels ============


def to_lab(rgb):
    """sRGB in [0, 1], [B, 3, ...] -> CIE Lab (D65): L in 0..100, a and b within -108..98."""
    r, g, b = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055).pow(2.4), rgb / 12.92).unbind(1)
    xyz = torch.stack([(0.412453 * r + 0.357580 * g + 0.180423 * b) / 0.95047,
                       0.212671 * r + 0.715160 * g + 0.072169 * b,
                       (0.019334 * r + 0.119193 * g + 0.950227 * b) / 1.08883], 1)  # fmt: skip
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp(min=0.008856).pow(1 / 3), 7.787 * xyz + 16 / 116).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def to_ydbdr(rgb):
    """RGB in [0, 1], [B, 3, ...] -> YDbDr, the color space of SECAM: Y in 0..1, Db and Dr within -1.333..1.333."""
    r, g, b = rgb.unbind(1)
    return torch.stack([0.299 * r + 0.587 * g + 0.114 * b,
                        -0.450 * r - 0.883 * g + 1.333 * b,
                        -1.333 * r + 1.116 * g + 0.217 * b], 1)  # fmt: skip


def lightness(lab):
    """The input for predicting colors, from Lab [B, 3, H, W]: (L - 50) / 50, in [-1, 1], in all three channels."""
    return ((lab[:, :1] - 50) / 50).expand(-1, 3, -1, -1)


RGB = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # images in [0, 1] as they are
# Conversion from RGB, mean and std: those of CMC's and PyContrast's code, the middle and half of each channel's range.
LAB = to_lab, (50.0, 6.025, -6.690), (50.0, 92.208, 101.168)
YDBDR = to_ydbdr, (0.457, -0.082, -0.052), (0.5, 1.331, 1.333)
SPLITS = {"lab": (LAB, (1, 2)), "ydbdr": (YDBDR, (1, 2)), "lab3": (LAB, (1, 1, 1))}  # (space, channels per view)


def channel_views(x, split):
    """RGB images [B, 3, H, W] in [0, 1] as the views of SPLITS[split]: a tuple of [B, c, H, W], fp32, about -1 to 1."""
    (convert, mean, std), channels = SPLITS[split]
    with torch.autocast(x.device.type, enabled=False):
        mean, std = (torch.tensor(t).to(x.device, non_blocking=True).view(3, 1, 1) for t in (mean, std))
        return ((convert(x.float()) - mean) / std).split(channels, 1)


class Split(Backbone):
    """Color channels of an image as views of it, each with a network of its own (CMC, Tian et al. 2019,
    https://arxiv.org/abs/1906.05849): network(channels of the view). Takes RGB images [B, 3, H, W] in [0, 1]. Maps and
    vectors are those of all networks, joined along the channels; `widths` are those of the vectors."""

    def __init__(self, network, split):
        super().__init__()
        self.preprocess, self.split = RGB, split  # in place of ImageNet's mean and std
        self.networks = nn.ModuleList(network(channels) for channels in SPLITS[split][1])
        self.widths = [f.dim for f in self.networks]
        self.dim = self.channels = sum(self.widths)

    def maps(self, x):
        maps = [f.maps(v) for f, v in zip(self.networks, channel_views(x, self.split), strict=True)]
        return {name: torch.cat([m[name] for m in maps], 1) for name in maps[0]}

    def forward(self, x):
        views = zip(self.networks, channel_views(x, self.split), strict=True)
        return torch.cat([f(v) for f, v in views], 1)  # [B, dim]


# ============ torchvision's ============

HEADS = {  # family: (name of the head, its layers that stay); all others: ("fc", None)
    **dict.fromkeys(("densenet", "efficientnet", "mnasnet", "mobilenet"), ("classifier", None)),
    **dict.fromkeys(("alexnet", "vgg"), ("classifier", slice(0, 6))),  # read at the penultimate layer, as in papers
    "convnext": ("classifier", slice(1, 2)), "maxvit": ("classifier", slice(0, 2)),
    "squeezenet": ("classifier", slice(3, 4)), "swin": ("head", None), "vit": ("heads", None),
}  # fmt: skip


def torchvision_form(name, size):
    """How torchvision's network `name` is made and loses its head: (keywords of its constructor, *its HEADS)."""
    family, whole = re.match("[a-z]+", name)[0], {"aux_logits": False, "init_weights": True}
    keywords = {"vit": {"image_size": size}, "maxvit": {"input_size": (size, size)}}
    keywords |= {"inception": whole, "googlenet": whole}
    return keywords.get(family, {}), *HEADS.get(family, ("fc", None))


class Torchvision:
    """Mixed into torchvision's class: a network without its head. `only`: px of the one size that it takes, or None."""

    def forward(self, x):
        if self.only and x.shape[-1] != self.only:
            fail(f"images of {x.shape[-1]} px: {self.name} was built for {self.only} px and takes no other size")
        return super().forward(x)  # [B, dim]

    def taps(self, x):
        """As `Backbone.taps`: "block1", ... are the last maps of each resolution that a module returns."""
        modules, maps = [], {}
        for child, m in list(self.named_children())[:-1]:  # the last is the head
            if child == "permute" or not self.name.startswith(("vit", "swin")):  # those have tokens, or channels last
                modules += [*(m if type(m) in (nn.Sequential, nn.ModuleList) else ()), m]
        keep = lambda module, inputs, y: maps.update({y.shape[2:]: y}) if y.ndim == 4 else None
        modules = [m for m in modules if not isinstance(m, (nn.AdaptiveAvgPool2d, nn.Dropout))]
        hooks = [m.register_forward_hook(keep) for m in modules]
        vector = self(x)
        for hook in hooks:
            hook.remove()
        return {f"block{i}": y for i, y in enumerate(maps.values(), 1)} | {"pre_logits": vector}

    def stages(self, x):
        maps = list(self.taps(x).values())[:-1]
        return maps or fail(f"{self.name} has no feature maps [B, C, H, W], which are asked for here")


def from_torchvision(name, size):
    """torchvision's network `name` as a backbone, without dropout and stochastic depth, whose random numbers are in no
    checkpoint. "alexnet_bn" has BatchNorm after each convolution, as Distilling Localization (sec. 6.2)."""
    if size < 32:
        fail(f"images of {size} px: {name} is made for large ones and needs 32 px or more")
    keywords, head, stay = torchvision_form(name, size)
    try:
        net = torchvision.models.get_model("alexnet" if name == "alexnet_bn" else name, weights=None, **keywords)
        if name == "alexnet_bn":
            pairs = ((m, nn.BatchNorm2d(m.out_channels)) if isinstance(m, nn.Conv2d) else (m,) for m in net.features)
            net.features = nn.Sequential(*(layer for pair in pairs for layer in pair))
        setattr(net, head, getattr(net, head)[stay] if stay else nn.Identity())
        for m in net.modules():
            if isinstance(m, (nn.Dropout, StochasticDepth)):
                m.p = 0.0
        net.__class__ = type(name, (Torchvision, type(net)), {})
        net.name, net.only = name, size if name.startswith(("vit", "maxvit")) else None
        with torch.no_grad():
            *maps, vector = net.eval().taps(torch.zeros(1, 3, size, size)).values()
    except (AssertionError, ValueError, RuntimeError) as error:
        fail(f"images of {size} px: {name} does not take them ({' '.join(str(error).split())[:200]})")
    net.dim, net.channels = vector.shape[1], (maps or [vector])[-1].shape[1]
    return net.train()


# ============ by name ============

SUFFIXES = {  # of the names of each kind of networks
    "plain": ("norm", "stride", "split"), "ResNet": ("norm", "stride"), "ResNetV2": ("minus", "norm", "stride"),
    "RevNet": ("minus", "stride"), "VGG": ("stride",), "torchvision": (),
}  # fmt: skip
NAMES = [
    *PLAIN,
    "alexnet_bn and each classification network of torchvision, as mobilenet_v3_small, vgg16_bn, vit_b_16",
    f"FAMILY_kK with FAMILY one of {' '.join(STUDY)} and K the widening factor (4 8 12 16 in the study)",
    "then _minus (v2 and RevNet: no last ReLU), _ln or _nobn (ResNets: in BatchNorm's place), _sN (ResNets and all "
    f"with a K: total stride 2 4 8 16 32), _{' or _'.join(SPLITS)} (ResNets without a K: color channels apart)",
]
# A backbone's name, each part as it is written or None: K, "_minus", "_ln" or "_nobn", N of _sN, key of SPLITS.
Name = collections.namedtuple("Name", "base k minus norm stride split")


def parts(name):
    form = r"(.*?)(?:_k(\d+(?:\.\d+)?))?(_minus)?(_ln|_nobn)?(?:_s(\d+))?"
    return Name(*re.fullmatch(rf"{form}(?:_({'|'.join(SPLITS)}))?", name, re.DOTALL).groups())


def strides_of(n, size):
    """Strides of root, pool and stages 2, 3, 4 of the network with the Name n, for images of `size` px. Without _sN the
    study's networks get the total stride 32 from 112 px, 16 from 64, 8 from 32, 4 from 16 and 2 below."""
    total = int(n.stride or 0)
    if n.k and not n.stride:
        total = next((s for s, px in ((32, 112), (16, 64), (8, 32), (4, 16)) if size >= px), 2)
    if size < total:
        fail(f"{n.base}: an image of {size} px is smaller than the total stride {total}; _sN sets another")
    if total:
        return STRIDES[total]
    strides = [2 if n.base.startswith("resnet10") else 1, 1, 2, 2, 2] if size < SMALL else list(STRIDES[32])
    for i, stride in enumerate(strides):  # 1 where the map is one pixel already: in bf16 on CPUs torch (2.11 to 2.15)
        strides[i] = stride if size > 1 else 1  # leaves the gradient of a strided 3x3 convolution there undefined
        size = math.ceil(size / stride)
    return tuple(strides)


def build(name, size=224):
    """The backbone called `name` (see NAMES) for square images of `size` px (for patch methods: patches), freshly
    initialized from torch's global generator. Your own: `if name == "mine":` and `return Mine()` as the first lines."""
    import revisiting  # which imports this file

    n = parts(name)
    kind = "plain" if n.base in PLAIN else "torchvision" if n.base in TORCHVISION else None
    kind = STUDY.get(n.base, (None,))[0] if n.k else kind
    given = {s for s in ("minus", "norm", "stride", "split") if getattr(n, s)}
    if kind is None or given - {*SUFFIXES[kind]} or int(n.stride or 2) not in STRIDES:
        known = [*PLAIN, *(f"{net}_{s}" for net in RESNETS for s in SPLITS), *TORCHVISION]
        near = difflib.get_close_matches(name, [*known, *(f"{net}_k{n.k or 4}" for net in STUDY)], 1, 0.0)[0]
        fail(f"unknown architecture {name!r}; did you mean {near!r}? Known: {', '.join(NAMES)}")
    if kind == "torchvision":
        return from_torchvision(name, size)
    strides, kernel = strides_of(n, size), 3 if size < SMALL else 7
    if kind == "plain":
        block, depths, channels = RESNETS[n.base.removesuffix("_w2")]
        channels = channels * (2 if n.base.endswith("_w2") else 1) // (2 if n.split else 1)
        network = functools.partial(ResNet, block, depths, channels, strides, kernel)
        net = Split(network, n.split) if n.split else network()
    else:
        depths, k = STUDY[n.base][1], float(n.k)
        if not (width := k * (16 if kind.startswith("ResNet") else 8)).is_integer() or not width:
            fail(f"{name}: its narrowest layers would have {width:g} channels")
        if kind == "ResNet":
            net = ResNet(Bottleneck, depths, round(16 * k), strides, kernel)
        elif kind == "VGG":
            net = revisiting.VGG(depths, k, math.prod(strides), size)
        else:
            net = getattr(revisiting, kind)(depths, k, strides, kernel, last_relu=not n.minus)
    return without_batchnorm(net, n.norm) if n.norm else net


def describe(net, name):
    """One line on a backbone, for the recipe that a script prints."""
    stem = [f", {m.kernel_size[0]}x{m.kernel_size[1]} stem" for m in net.modules() if isinstance(m, nn.Conv2d)][:1]
    return f"{name}, {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, {net.dim}-d{''.join(stem)}"


def loading_lines(arch, size, path, preprocess=None):
    """Two lines of Python that load an exported backbone, without this repository where torchvision has the network;
    with its `preprocess` a third, a comment on what the images must look like."""
    load = f'net.load_state_dict(torch.load("{Path(path).as_posix()}", weights_only=True)["state_dict"])'
    make = f'import torch, backbones; net = backbones.build("{arch}", {size})'
    name = "resnet50" if arch == "resnet50v1_k4" and size >= 112 else arch
    if name in TORCHVISION[:-1] or (name in RESNETS and RESNETS[name][2] == 64):
        keywords, head, stay = torchvision_form(name, size)
        made = f"torchvision.models.{name}({', '.join(f'{k}={v}' for k, v in keywords.items())})"
        rest = f"net.{head}[{stay.start}:{stay.stop}]" if stay else "torch.nn.Identity()"
        make = f"import torch, torchvision; net = {made}; net.{head} = {rest}"
        if name in RESNETS and size < SMALL:
            make += "; net.conv1, net.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()"
    if not preprocess:
        return f"{make}\n{load}"
    mean, std = (tuple(round(v, 3) for v in preprocess[k]) for k in ("mean", "std"))
    images = f"RGB images, {preprocess['size']} px ({preprocess['interpolation']})"
    images += f", (x / 255 - mean) / std: mean {mean}, std {std}"
    if split := parts(arch).split:
        images += f"; the network itself makes {split} channels of them"
    if sees := preprocess.get("sees"):
        images += f"; features: checkpoints.InputAdapter(net, {', '.join(f'{k}={v}' for k, v in sees.items())})"
    return f"{make}\n{load}\n# {images}"
