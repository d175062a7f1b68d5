"""Backbones: a module that maps images [B, 3, H, W] to one pooled vector per image [B, dim].

Built from torchvision's own blocks and with torchvision's own key names, so that weights go both ways without a
converter. Below 64 px a network made for 224 px would shrink the image to nothing before it has looked at it, so the
stem becomes a 3x3 convolution of stride 1 without max-pooling (the CIFAR form of He et al. 2016, sec. 4.2).

Here are ResNets (`ResNet`), their form with a network for each group of colour channels (`Split`), and every other
classification network of torchvision under its own name, without its head (`Torchvision`); revisiting.py has ResNet v2,
RevNet and VGG with a widening factor. `build` makes any of them from its name.

Bringing your own takes two lines, at the top of `build`: any `nn.Module` with an attribute `dim` whose forward returns
[B, dim] is a backbone. `stages(x)` (a list of feature maps), `taps(x)` and `channels` are needed only by what reads maps:
SaGe, colorization and the probe of all depths.
"""

import difflib
import functools
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
    # One block a stage, few channels, and a stem of stride 2 for small images: what two CPU cores can train in minutes.
    # Not in torchvision.
    "resnet10_16": (BasicBlock, (1, 1, 1, 1), 16),
    "resnet10_32": (BasicBlock, (1, 1, 1, 1), 32),
}
PLAIN = [*RESNETS, *(f"{n}_w2" for n in RESNETS if not n.startswith("resnet10"))]
TORCHVISION = [*sorted(set(torchvision.models.list_models(torchvision.models)) - set(RESNETS)), "alexnet_bn"]

STRIDES = {  # total stride: of root, pool, stages 2, 3, 4. The root gives its own up first, then stages from the end
    32: (2, 2, 2, 2, 2),
    16: (1, 2, 2, 2, 2),
    8: (1, 2, 2, 2, 1),  # the study's form for patches of 64 px
    4: (1, 2, 2, 1, 1),
    2: (1, 2, 1, 1, 1),
}


class Backbone(nn.Module):
    """What every backbone here answers. `dim` is the width of its vector, `channels` that of its last feature map.

    A subclass writes `maps`: {name: map [B, C, H, W]} in order of depth, "root" (after the first convolution and pooling,
    where there is such a part) and "block1", "block2", ..., and `vectors` where the vector is not the last map's mean.
    """

    def vectors(self, last):
        """What follows the last map, by name; "pre_logits" [B, dim] is what a probe or a head gets."""
        return {"pre_logits": last.mean((2, 3))}

    def stages(self, x):
        """The list of feature maps after each stage."""
        return [m for name, m in self.maps(x).items() if name != "root"]

    def taps(self, x):
        """Everything that a probe at several depths reads, from one pass: the maps and then the vectors, by name."""
        maps = self.maps(x)
        return maps | self.vectors(list(maps.values())[-1])

    def forward(self, x):
        return self.taps(x)["pre_logits"]  # [B, dim]


def he(net):
    """He et al. 2015, by fan-out, for the convolutions; BatchNorm as torch makes it."""
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def blocks(x, layers):
    """{"block1": layers[0](x), "block2": layers[1](of that), ...}"""
    return {f"block{i}": (x := layer(x)) for i, layer in enumerate(layers, 1)}


class ResNet(Backbone):
    """ResNet v1 (He et al. 2016; stride on the 3x3 convolution of a bottleneck, as in torchvision).

    `channels` are those of the root. Twice as many widen every layer ("ResNet-50 (2x)" of the BYOL paper), unlike
    torchvision's wide_resnet50_2, which widens only the inner convolution of a block. `strides`: of root, pool and stages
    2, 3, 4; at 224 px the usual ones give maps of 56, 28, 14 and 7 px. `inputs`: channels of the images.
    """

    def __init__(self, block, depths, channels, strides=STRIDES[32], kernel=7, inputs=3):
        super().__init__()
        root, pool, *strides = strides
        self.conv1 = nn.Conv2d(inputs, channels, kernel, root, kernel // 2, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, pool, 1) if pool > 1 else nn.Identity()
        inplanes = channels
        for i, depth in enumerate(depths):
            planes, units = channels * 2**i, []
            for j in range(depth):
                stride = strides[i - 1] if i > 0 and j == 0 else 1
                outplanes, downsample = planes * block.expansion, None
                if stride != 1 or inplanes != outplanes:
                    conv = nn.Conv2d(inplanes, outplanes, 1, stride, bias=False)
                    downsample = nn.Sequential(conv, nn.BatchNorm2d(outplanes))
                # A bottleneck's inner width is planes * base_width / 64: torchvision's own default.
                units.append(block(inplanes, planes, stride, downsample))
                inplanes = outplanes
            setattr(self, f"layer{i + 1}", nn.Sequential(*units))
        self.dim = self.channels = inplanes
        he(self)

    def maps(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return {"root": x} | blocks(x, (self.layer1, self.layer2, self.layer3, self.layer4))


# ============ colour spaces, and a network for each group of channels ============


def to_lab(rgb):
    """sRGB in [0, 1], [B, 3, ...] -> CIE Lab (D65): L in 0..100, a and b within -108..98."""
    r, g, b = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055).pow(2.4), rgb / 12.92).unbind(1)
    xyz = torch.stack([(0.412453 * r + 0.357580 * g + 0.180423 * b) / 0.95047,
                       0.212671 * r + 0.715160 * g + 0.072169 * b,
                       (0.019334 * r + 0.119193 * g + 0.950227 * b) / 1.08883], 1)  # fmt: skip
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp(min=0.008856).pow(1 / 3), 7.787 * xyz + 16 / 116).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def to_ydbdr(rgb):
    """RGB in [0, 1], [B, 3, ...] -> YDbDr, the colour space of SECAM: Y in 0..1, Db and Dr within -1.333..1.333."""
    r, g, b = rgb.unbind(1)
    return torch.stack([0.299 * r + 0.587 * g + 0.114 * b,
                        -0.450 * r - 0.883 * g + 1.333 * b,
                        -1.333 * r + 1.116 * g + 0.217 * b], 1)  # fmt: skip


def lightness(lab):
    """What a network sees of Lab [B, 3, H, W] if colour is to be predicted: (L - 50) / 50, in [-1, 1], three times over."""
    return ((lab[:, :1] - 50) / 50).expand(-1, 3, -1, -1)


RGB = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # images in [0, 1] as they are
LAB = to_lab, (50.0, 6.025, -6.690), (50.0, 92.208, 101.168)  # middle and half of each channel's range
YDBDR = to_ydbdr, (0.457, -0.082, -0.052), (0.5, 1.331, 1.333)
SPLITS = {  # suffix of a name: (conversion from RGB, mean, std: those of CMC's and PyContrast's code), channels per view
    "lab": (LAB, (1, 2)),
    "ydbdr": (YDBDR, (1, 2)),
    "lab3": (LAB, (1, 1, 1)),
}


def channel_views(x, split):
    """RGB images [B, 3, H, W] in [0, 1] as the views of SPLITS[split]: a tuple of [B, c, H, W] in fp32, about -1 to 1."""
    (convert, mean, std), channels = SPLITS[split]
    with torch.autocast(x.device.type, enabled=False):
        mean, std = (torch.tensor(t).to(x.device, non_blocking=True).view(3, 1, 1) for t in (mean, std))
        return ((convert(x.float()) - mean) / std).split(channels, 1)


class Split(Backbone):
    """Colour channels of an image as views of it, each with a network of its own (CMC, Tian et al. 2019,
    https://arxiv.org/abs/1906.05849). RGB images in [0, 1], not normalised, [B, 3, H, W], are converted to the colour space
    of SPLITS[split]; its channels go in groups to `network(channels of the group)`. Maps and vectors are those of all
    networks, joined along the channels; `widths` are those of the vectors.
    """

    def __init__(self, network, split):
        super().__init__()
        self.preprocess = RGB  # in place of ImageNet's mean and std
        self.split = split
        self.networks = nn.ModuleList(network(channels) for channels in SPLITS[split][1])
        self.widths = [f.dim for f in self.networks]
        self.dim = self.channels = sum(self.widths)

    def views(self, x):
        return channel_views(x, self.split)

    def parts(self, x):
        """The vectors of the views: a list of [B, d]."""
        return [f(v) for f, v in zip(self.networks, self.views(x), strict=True)]

    def maps(self, x):
        maps = [f.maps(v) for f, v in zip(self.networks, self.views(x), strict=True)]
        return {name: torch.cat([m[name] for m in maps], 1) for name in maps[0]}

    def forward(self, x):
        return torch.cat(self.parts(x), 1)  # [B, dim]


# ============ torchvision's ============


class Torchvision:
    """What stands before torchvision's own class in a network of its without the head. Key names, initial weights and strides
    are torchvision's at any px: what is made for 224 px shrinks a small image to one pixel. `only`: px of the one size that
    it takes, or None."""

    def forward(self, x):
        if self.only and x.shape[-1] != self.only:
            fail(f"images of {x.shape[-1]} px: {self.name} was built for {self.only} px and takes no other size")
        return super().forward(x)  # [B, dim]

    def taps(self, x):
        """As `Backbone.taps`: "block1", ... are the last maps of each resolution, taken after modules, not inside of them."""
        modules, maps = [], {}
        for child, m in list(self.named_children())[:-1]:  # the last is the head
            if child == "permute" or not self.name.startswith(("vit", "swin")):  # which have tokens, or channels last
                modules += [*(m if type(m) in (nn.Sequential, nn.ModuleList) else ()), m]
        keep = lambda module, inputs, y: maps.update({y.shape[2:]: y}) if y.ndim == 4 else None
        hooks = [m.register_forward_hook(keep) for m in modules if not isinstance(m, (nn.AdaptiveAvgPool2d, nn.Dropout))]
        try:
            vector = self(x)
        finally:
            for hook in hooks:
                hook.remove()
        return {f"block{i}": y for i, y in enumerate(maps.values(), 1)} | {"pre_logits": vector}

    def stages(self, x):
        maps = list(self.taps(x).values())[:-1]
        return maps or fail(f"{self.name} has no feature maps [B, C, H, W], which are asked for here")


def of_torchvision(name, size):
    """How torchvision's network `name` is made and loses its head, that is all that follows the mean of the last map, or the
    class token; AlexNet and VGG keep fc6 and fc7, and are read at the penultimate layer, as in the papers. (Keywords of its
    constructor, name of the head, which of the head's layers stay or None.)"""
    family, whole = re.match("[a-z]+", name)[0], {"aux_logits": False, "init_weights": True}
    keywords = {"vit": {"image_size": size}, "maxvit": {"input_size": (size, size)}, "inception": whole, "googlenet": whole}
    heads = dict.fromkeys(("densenet", "efficientnet", "mnasnet", "mobilenet"), "classifier") | {"vit": "heads", "swin": "head"}
    stay = {"alexnet": slice(0, 6), "vgg": slice(0, 6), "convnext": slice(1, 2), "maxvit": slice(0, 2), "squeezenet": slice(3, 4)}
    return keywords.get(family, {}), heads.get(family, "classifier" if family in stay else "fc"), stay.get(family)


def from_torchvision(name, size):
    """torchvision's network `name` as a backbone. Dropout and stochastic depth are off: no method here has them, and what they
    draw is in no checkpoint. "alexnet_bn" has BatchNorm after each convolution: Distilling Localization (sec. 6.2) inserts it
    into AlexNet and VGG16; whether into fc6 and fc7, too, it does not say."""
    keywords, head, stay = of_torchvision(name, size)
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


DEPTHS = {"50": (3, 4, 6, 3), "26": (2, 2, 2, 2), "14": (1, 1, 1, 1)}  # 50 is the study's; the others for small budgets
STUDY = {  # family: (class, here or in revisiting.py, units per stage, channels of the narrowest layer for k = 1)
    **{f"resnet{n}v1": ("ResNet", units, 16) for n, units in DEPTHS.items()},
    **{f"resnet{n}v2": ("ResNetV2", units, 16) for n, units in DEPTHS.items()},
    **{f"revnet{n}": ("RevNet", units, 8) for n, units in DEPTHS.items()},
    "vgg19": ("VGG", (2, 2, 4, 4, 4), 8),
    "vgg11": ("VGG", (1, 1, 2, 2, 2), 8),
}
NORM = re.compile(r"_(ln|nobn)(?=_|$)")  # suffix of a ResNet's name: what takes BatchNorm's place
NAMES = [
    *PLAIN,
    "alexnet_bn and each classification network of torchvision, as mobilenet_v3_small, vgg16_bn, vit_b_16",
    f"FAMILY_kK with FAMILY one of {' '.join(STUDY)} and K the widening factor (4 8 12 16 in the study)",
    "FAMILY_kK_minus (v2 and RevNet: no last ReLU)",
    "_ln or _nobn after a ResNet's name (before _sN): layer norm or biases in BatchNorm's place",
    f"_sN after a ResNet's name or after FAMILY_kK[_minus] for a total stride N of {' '.join(map(str, reversed(STRIDES)))}",
    f"{' '.join(f'_{split}' for split in SPLITS)} last, after a ResNet's name: colour channels apart, half the width each",
]


class Bias(nn.Module):
    """One number a channel, added. What it gives is a new tensor: a ReLU in place after it leaves a skip connection as it is."""

    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return x + self.bias[:, None, None]


def without_batchnorm(net, norm):
    """The ResNet with something else in BatchNorm's place, so that the features of an image (or of a patch, for CPC) do not
    depend on the others of its batch. norm "ln": layer norm, over all channels and places of a map; "nobn": biases only.
    Then nothing holds the sums of residual units, so each residual function begins at 0 by its last convolution, as in
    Fixup (Zhang et al. 2019, https://arxiv.org/abs/1901.09321)."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                channels = child.num_features
                setattr(module, name, nn.GroupNorm(1, channels) if norm == "ln" else Bias(channels))
        last = getattr(module, "conv3", getattr(module, "conv2", None))  # of a bottleneck, and of a basic block
        if norm == "nobn" and last is not None:
            nn.init.zeros_(last.weight)
    return net


# ============ by name ============


def unsplit(name):
    """("resnet18", "lab") of "resnet18_lab"; the second is None where a name has no suffix of SPLITS."""
    whole, _, split = name.rpartition("_")
    return (whole, split) if split in SPLITS else (name, None)


def parts(name):
    """(name without suffixes, k, _minus, _ln or _nobn, total stride), each as it is written or None; SPLITS aside."""
    form = r"(.*?)(?:_k(\d+(?:\.\d+)?))?(_minus)?(_ln|_nobn)?(?:_s(\d+))?"
    return re.fullmatch(form, unsplit(name)[0], re.DOTALL).groups()


def parse(name, size):
    """(name without suffixes, k or None, whether _minus, total stride or None for the usual one) of a backbone's name.

    `size`: px of the square input. Bad names end the program with exit code 2 and one sentence.
    """
    split, (base, k, minus, norm, stride) = unsplit(name)[1], parts(name)
    if base not in (STUDY if k else PLAIN + TORCHVISION) or (minus and not k):
        known = [*PLAIN, *(f"{family}_k{k or 4}" for family in STUDY), *(f"{net}_{s}" for net in RESNETS for s in SPLITS)]
        known += TORCHVISION
        near = difflib.get_close_matches(name, known, 1, 0.0)[0]
        fail(f"unknown architecture {name!r}; did you mean {near!r}? Known: {', '.join(NAMES)}")
    if split and base.removesuffix("_w2") not in RESNETS:
        fail(f"{name}: _{split} is for ResNets without a widening factor")
    if k:
        kind, _, narrowest = STUDY[base]
        if not (width := narrowest * float(k)).is_integer() or width == 0:
            fail(f"{name}: its narrowest layers would have {width:g} channels; K must be a multiple of 1/{narrowest}")
        if float(k) > 128:
            fail(f"{name}: K above 128 makes tens of billions of parameters")
        if minus and kind not in ("ResNetV2", "RevNet"):
            fail(f"{name}: the last ReLU can be left out (_minus) of ResNet v2 and RevNet only")
    elif stride and base.removesuffix("_w2") not in RESNETS:
        fail(f"{name}: _s{stride} is for ResNets, RevNets and the VGGs with a widening factor")
    if norm and base.removesuffix("_w2") not in RESNETS and (not k or kind not in ("ResNet", "ResNetV2")):
        fail(f"{name}: {norm} is for ResNets")
    if stride and int(stride) not in STRIDES:
        fail(f"{name}: the total stride _s{stride} is not one of {', '.join(map(str, reversed(STRIDES)))}")
    if k and not stride:
        stride = next((s for s, px in ((32, 112), (16, 64), (8, 32), (4, 16)) if size >= px), 2)
    if stride and size < (stride := int(stride)):
        fail(f"{name}: an image of {size} px is smaller than the total stride {stride}; _sN sets another")
    return base, float(k) if k else None, bool(minus), stride


def without_idle(strides, size):
    """The strides for images of `size` px, with 1 where the map is a single pixel already. There a stride changes nothing but
    the gradient of a 3x3 convolution under bf16 on CPUs, whose outer weights torch (2.11 to 2.15) then leaves undefined."""
    kept = []
    for stride in strides:
        kept.append(stride if size > 1 else 1)
        size = -(-size // stride)
    return tuple(kept)


def build(name, size=224):
    """The backbone called `name` for square images of `size` px (for patch methods: patches), freshly initialised from
    torch's global generator. Your own: `if name == "mine":` and `return Mine()` as the first two lines.

    Names are in NAMES. Without _sN the study's networks take the total stride 32 from 112 px, 16 from 64, 8 from 32, 4 from
    16 and 2 below. An unknown name, a width that is not whole and a size below the stride end the program with exit code 2.
    """
    import revisiting  # which builds on this file

    base, k, minus, stride = parse(name, size)
    if norm := NORM.search(name):
        return without_batchnorm(build(name[: norm.start()] + name[norm.end() :], size), norm[1])
    small = size < SMALL
    kernel = 3 if small else 7
    if base in TORCHVISION and not k:
        if size < 32:
            fail(f"images of {size} px: {name} is made for large ones and needs 32 px or more")
        return from_torchvision(name, size)
    if base in PLAIN:
        block, depths, channels = RESNETS[base.removesuffix("_w2")]
        channels *= 2 if base.endswith("_w2") else 1
        usual = without_idle((2 if channels < 64 else 1, 1, 2, 2, 2) if small else STRIDES[32], size)
        strides, split = STRIDES[stride] if stride else usual, unsplit(name)[1]
        if split:
            return Split(functools.partial(ResNet, block, depths, channels // 2, strides, kernel), split)
        return ResNet(block, depths, channels, strides, kernel)
    kind, depths, _ = STUDY[base]
    if kind == "ResNet":
        return ResNet(Bottleneck, depths, round(16 * k), STRIDES[stride], kernel)
    if kind == "VGG":
        return revisiting.VGG(depths, k, stride, size)
    return getattr(revisiting, kind)(depths, k, STRIDES[stride], kernel, last_relu=not minus)


def describe(net, name, size):
    """One line on what `build` made, for the recipe that a script prints."""
    parameters, (base, k, *_) = sum(p.numel() for p in net.parameters()) / 1e6, parts(name)
    line = f"{name}, {parameters:.2f} M parameters, {net.dim}-d"
    if base not in (STUDY if k else PLAIN):  # torchvision's, or your own
        return line
    if stride := parse(name, size)[3]:
        px, of = (size // stride, "fc6") if base.startswith("vgg") else (3 if size < SMALL else 7, "root")
        return f"{line} (total stride {stride}, {px}x{px} {of})"
    return f"{line} ({f'below {SMALL} px: 3x3 stem, no max-pool' if size < SMALL else 'the usual stem'})"


def loading_lines(arch, size, path, preprocess=None):
    """Lines of Python that load an exported backbone, without this repository where torchvision has the network: two, and
    with its `preprocess` a third, a comment on what the images must look like."""
    load = f'net.load_state_dict(torch.load("{Path(path).as_posix()}", weights_only=True)["state_dict"])'
    stem = "; net.conv1, net.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()"
    make = f'import torch, backbones; net = backbones.build("{arch}", {size})'
    name = "resnet50" if arch == "resnet50v1_k4" and size >= 112 else arch
    if name in TORCHVISION[:-1] or (name in RESNETS and RESNETS[name][2] == 64):
        keywords, head, stay = of_torchvision(name, size)
        made = f"torchvision.models.{name}({', '.join(f'{k}={v}' for k, v in keywords.items())})"
        rest = f"net.{head}[{stay.start}:{stay.stop}]" if stay else "torch.nn.Identity()"
        stem = stem if name in RESNETS and size < SMALL else ""
        make = f"import torch, torchvision; net = {made}; net.{head} = {rest}{stem}"
    return f"{make}\n{load}" + (f"\n# {seen_by(arch, preprocess)}" if preprocess else "")


def seen_by(arch, preprocess):
    """What the images of a backbone must look like, in words."""
    mean, std = (tuple(round(v, 3) for v in preprocess[k]) for k in ("mean", "std"))
    sees = {"patch": 0, "cell": 0, "stride": 0, **preprocess.get("sees", {})}
    words = f"RGB images, {preprocess['size']} px ({preprocess['interpolation']}), (x / 255 - mean) / std: mean {mean}, std {std}"
    words += f"; the network itself makes {unsplit(arch)[1]} channels of them" if unsplit(arch)[1] else ""
    words += "; in lightness alone (backbones.lightness)" * sees.get("lightness", False) + "; in grey" * sees.get("grey", False)
    if sees["patch"]:
        where = f"one every {sees['stride']} px" if sees["stride"] else f"from 3 x 3 cells of {sees['cell']} px"
        words += f"; the network takes patches of {sees['patch']} px of them, {where}, and the image's vector is their mean"
    return words + f"; each {'patch' if sees['patch'] else 'image'} to mean 0, deviation 1" * sees.get("standardise", False)
