"""Opening a backbone of a run, a file, torchvision weights or random:ARCH, behind what it was trained to see."""

import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2 import functional as tvf

import backbones
import common
import data
import runs

# ============ what a network was trained to see ============


class InputAdapter(nn.Module):
    """A backbone `f` behind what it was trained to see, so that all of this file works with methods that do not look at
    plain RGB images. Images [B, 3, S, S] in [-1, 1] to [B, dim].

    lightness: of Lab the L alone, as `backbones.lightness` gives it. grey: luma in the place of all channels. patch: of the
    3 x 3 cells of `cell` px in the middle of an image the central `patch` px each or, with a `stride`, every patch of a
    grid over the whole image, one every `stride` px; the image's features are the mean over these. standardise: each
    patch, or the image where there are none, to mean 0 and deviation 1.
    """

    def __init__(self, f, lightness=False, standardise=False, patch=0, cell=0, stride=0, grey=False):
        super().__init__()
        self.f, self.dim = f, f.dim
        self.lightness, self.standardise, self.grey = lightness, standardise, grey
        self.preprocess = getattr(f, "preprocess", {})  # of a network of colour channels, which `extract` looks at
        self.patch, self.cell, self.stride = patch, cell, stride

    def see(self, x):
        """What f gets: [B, 3, S, S], or n patches an image, [B * n, 3, patch, patch]."""
        if self.lightness:
            x = backbones.lightness(backbones.to_lab(x / 2 + 0.5))
        if self.grey:
            x = data.gray(x).expand(-1, 3, -1, -1)
        if self.stride:
            x = x.unfold(2, self.patch, self.stride).unfold(3, self.patch, self.stride)  # [B, 3, G, G, patch, patch]
            x = x.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        elif self.patch:
            x = (
                tvf.center_crop(x, [3 * self.cell] * 2).unflatten(2, (3, -1)).unflatten(4, (3, -1))
            )  # [B, 3, 3, c, 3, c]
            inside = slice(start := (self.cell - self.patch) // 2, start + self.patch)
            x = x[:, :, :, inside, :, inside].permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        return data.standardize(x) if self.standardise else x

    def mean(self, features, images):
        """Over the patches of each image: [B * n, ...] to [B, ...]."""
        return features.unflatten(0, (images, -1)).mean(1) if self.patch else features

    def forward(self, x):
        return self.mean(self.f(self.see(x)), len(x))  # [B, dim]

    def taps(self, x, most=9000):
        """{layer: map [B, C, h, w] or vector [B, dim]} of f, in order of depth, each pooled to `most` features at most
        (`shrink`), and then averaged over the patches."""
        return {name: self.mean(shrink(tap, most), len(x)) for name, tap in self.f.taps(self.see(x)).items()}


def shrink(tap, most):
    """A map [B, C, H, W] of more than `most` features max-pooled by windows of ceil(sqrt(features / most)) px, of which
    only whole ones count; others, and vectors [B, d], as they are (the study's evaluation at all depths)."""
    if tap.ndim == 2 or tap[0].numel() <= most:
        return tap
    return F.max_pool2d(tap, min(math.ceil(math.sqrt(tap[0].numel() / most)), *tap.shape[2:]))  # a window fits the map


def as_trained(f, preprocess, size=0):
    """The backbone `f` behind what it was trained to see: an InputAdapter if a checkpoint's `preprocess` has its
    arguments under "sees", else f. `size`: px that were asked for instead of its own."""
    if not preprocess.get("sees"):
        return f
    adapter = InputAdapter(f, **preprocess["sees"])
    if adapter.patch and size not in (0, preprocess["size"]):
        common.fail(
            f"images of {size} px: this network looks at patches cut from {preprocess['size']} px, no other size"
        )
    if adapter.stride and adapter.patch > preprocess["size"]:
        common.fail(f"patches of {adapter.patch} px do not fit images of {preprocess['size']} px")
    if not adapter.stride and (3 * adapter.cell > preprocess["size"] or adapter.patch > adapter.cell):
        grid = f"a grid of 3 x 3 cells of {adapter.cell} px, patches of {adapter.patch} px in them"
        common.fail(f"{grid}, does not fit images of {preprocess['size']} px")
    return adapter


# ============ opening it ============

SIZES = 2, 4096  # px, the least and the most
SEES = dict(
    lightness=bool, standardise=bool, grey=bool, patch=int, cell=int, stride=int
)  # the arguments of an InputAdapter


def weights(path, found):
    """`found` if it is a dict of finite tensors by name, as `load_state_dict` takes it; else exit code 2."""
    if not isinstance(found, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in found.items()):
        common.fail(f"{path} is not a state dict: it holds other things than weights by name")
    bad = [k for k, v in found.items() if not v.isfinite().all()]
    return found if not bad else common.fail(f"{path}: the weights {bad[0]} are not finite")


def well_formed(path, found):
    """`found` if it says all that a backbone.pt or a file of --save says, each of its kind and in its bounds; else exit
    code 2. What is read after it needs no checks of its own."""
    number = lambda v: isinstance(v, int | float) and -1e6 < v < 1e6
    three = lambda v: isinstance(v, list | tuple) and len(v) == 3 and all(map(number, v))
    pixels = lambda v, least=SIZES[0]: type(v) is int and least <= v <= SIZES[1]
    preprocess = found["preprocess"] if isinstance(found["preprocess"], dict) else {}
    mean, std, size, sees = (preprocess.get(k, {}) for k in ("mean", "std", "size", "sees"))
    right = {
        "arch": isinstance(found.get("arch"), str),
        "data": isinstance(found.get("data", ""), str),
        "method": isinstance(method := found.get("method", "byol"), str) and method.isidentifier(),  # never a path
        "epoch": "method" not in found or (type(found.get("epoch")) is int and found["epoch"] >= 0),
        "built_for": pixels(found.get("built_for", SIZES[0])),
        "size": pixels(size),
        "mean": three(mean),
        "std": three(std) and min(std) > 0,
        "interpolation": preprocess.get("interpolation") in ("bilinear", "bicubic"),
        "sees": isinstance(sees, dict)
        and all(type(v) is SEES.get(k) for k, v in sees.items())
        and all(pixels(sees.get(k, 0), 0) for k in ("patch", "cell", "stride"))
        and bool(sees.get("patch")) == bool(sees.get("cell") or sees.get("stride")),
        "head": found.get("kind") != "classifier"
        or (set(head := weights(f"{path}: its head", found.get("head"))) == {"weight", "bias"}
            and head["bias"].ndim == 1),
        "classes": isinstance(found.get("classes", []), list),
    }  # fmt: skip
    wrong = [name for name, ok in right.items() if not ok]
    if wrong:
        common.fail(f"{path} is no checkpoint of ours: what it says of {', '.join(wrong)} is missing or cannot be")
    weights(path, found["state_dict"])
    return found


def open_backbone(target, arch, size, seed):
    """(backbone, preprocess, what the file says of itself, path or None) for a run folder, a file, or random:ARCH."""
    preprocess = {"mean": data.MEAN, "std": data.STD, "size": size or 224, "interpolation": "bilinear"}
    try:
        if target.startswith("random:"):
            torch.manual_seed(seed)
            backbone = backbones.build(target.removeprefix("random:"), preprocess["size"])
            return backbone, preprocess | getattr(backbone, "preprocess", {}), {}, None
        path = Path(target, "backbone.pt") if os.path.isdir(target) else Path(target)
        if not os.path.isfile(path):
            common.fail(f"{path}: no such checkpoint (a run folder, a .pt file, or random:ARCH is expected)")
        found = runs.load(path)
        if "state_dict" in found and "preprocess" in found:
            preprocess = well_formed(path, found)["preprocess"] | ({"size": size} if size else {})
            backbone = backbones.build(found["arch"], found.get("built_for", found["preprocess"]["size"]))
            backbone.load_state_dict(found["state_dict"])
            return as_trained(backbone, found["preprocess"], size), preprocess, found, path
        if "model" in found:
            common.fail(f"{path} is a training checkpoint; the backbone is in backbone.pt beside it")
        if not arch:
            common.fail(f"{path} holds a plain state dict; only evaluate.py --arch can say of which network")
        backbone = backbones.build(arch, preprocess["size"])
        heads, own = ("fc.", "classifier.", "head.", "heads.", "AuxLogits.", "aux1.", "aux2."), backbone.state_dict()
        backbone.load_state_dict({k: v for k, v in weights(path, found).items() if k in own or not k.startswith(heads)})
        return backbone, preprocess | getattr(backbone, "preprocess", {}), {}, path
    except EOFError as error:
        common.fail(str(error))
    except RuntimeError as error:  # load_state_dict is strict: the first line names the class, the second what is wrong
        common.fail(f"{target} does not fit the architecture: {' '.join(str(error).split())[:300]}")
