"""Opening a backbone: of a run, of a file, of torchvision weights or random:ARCH, with the input it was trained on."""

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

SIZES = 2, 4096  # px, the least and the most


class InputAdapter(nn.Module):
    """A backbone `f` with the input it was trained on, for methods whose networks do not take plain RGB images. Images
    [B, 3, S, S] in [-1, 1] to [B, dim].

    lightness: L of Lab alone (`backbones.lightness`). gray: luma in all three channels. patch: the central `patch` px
    of the 3 x 3 cells of `cell` px in the middle of an image or, with a `stride`, every patch of a grid over the whole
    image; the image's features are the mean over them. standardize: each patch, or image where there are none, to mean
    0 and deviation 1. These names are the keys of "sees" in backbone.pt.
    """

    def __init__(self, f, lightness=False, standardize=False, patch=0, cell=0, stride=0, gray=False):
        super().__init__()
        self.f, self.dim, self.preprocess = f, f.dim, getattr(f, "preprocess", {})
        self.lightness, self.standardize, self.gray = lightness, standardize, gray
        self.patch, self.cell, self.stride = patch, cell, stride

    def see(self, x):
        """The input of f: [B, 3, S, S], or with n patches an image [B * n, 3, patch, patch]."""
        if self.lightness:
            x = backbones.lightness(backbones.to_lab(x / 2 + 0.5))
        if self.gray:
            x = data.gray(x).expand(-1, 3, -1, -1)
        if self.stride:
            x = x.unfold(2, self.patch, self.stride).unfold(3, self.patch, self.stride)  # [B, 3, G, G, patch, patch]
            x = x.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        elif self.patch:
            x = tvf.center_crop(x, [3 * self.cell] * 2)
            x = x.unflatten(2, (3, -1)).unflatten(4, (3, -1))  # [B, 3, 3, cell, 3, cell]
            inside = slice(start := (self.cell - self.patch) // 2, start + self.patch)
            x = x[:, :, :, inside, :, inside].permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        return data.standardize(x) if self.standardize else x

    def mean(self, features, images):
        """Over the patches of each image: [B * n, ...] to [B, ...]."""
        return features.unflatten(0, (images, -1)).mean(1) if self.patch else features

    def forward(self, x):
        return self.mean(self.f(self.see(x)), len(x))  # [B, dim]

    def taps(self, x, most=9000):
        """`taps` of f, each pooled to `most` features at most (`shrink`), then averaged over the patches."""
        return {name: self.mean(shrink(tap, most), len(x)) for name, tap in self.f.taps(self.see(x)).items()}


def shrink(tap, most):
    """A map [B, C, H, W] of more than `most` features, max-pooled by windows of ceil(sqrt(features / most)) px, as in
    the evaluation of Kolesnikov et al. 2019 at all depths; other maps and vectors [B, d] as they are."""
    if tap.ndim == 2 or tap[0].numel() <= most:
        return tap
    return F.max_pool2d(tap, min(math.ceil(math.sqrt(tap[0].numel() / most)), *tap.shape[2:]))  # a window fits the map


def as_trained(f, preprocess, size=0):
    """The backbone `f`, in an InputAdapter if `preprocess` of its checkpoint has arguments of one under "sees". `size`:
    px that were asked for instead of its own."""
    if not preprocess.get("sees"):
        return f
    adapter = InputAdapter(f, **preprocess["sees"])
    if adapter.patch and size not in (0, preprocess["size"]):
        common.fail(f"images of {size} px: the patches of this network are cut from {preprocess['size']} px")
    return adapter


def weights(path, found):
    """`found` if it is a dict of finite tensors by name, as `load_state_dict` takes it; else exit code 2."""
    if not isinstance(found, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in found.items()):
        common.fail(f"{path} is not a state dict: it holds other things than weights by name")
    bad = [k for k, v in found.items() if not v.isfinite().all()]
    return found if not bad else common.fail(f"{path}: the weights {bad[0]} are not finite")


def open_backbone(target, arch, size, seed):
    """(backbone, preprocess, what the file says about it, path or None) for a run folder, a file, or random:ARCH."""
    preprocess = {"mean": data.MEAN, "std": data.STD, "size": size or 224, "interpolation": "bilinear"}
    try:
        if target.startswith("random:"):
            torch.manual_seed(seed)
            backbone = backbones.build(target.removeprefix("random:"), preprocess["size"])
            return backbone, preprocess | getattr(backbone, "preprocess", {}), {}, None
        path = Path(target, "backbone.pt") if os.path.isdir(target) else Path(target)
        if not path.is_file():
            common.fail(f"{path}: no such checkpoint (a run folder, a .pt file, or random:ARCH is expected)")
        found = runs.load(path)
        if {"arch", "state_dict", "preprocess"} <= found.keys():
            own = found["preprocess"]
            backbone = backbones.build(found["arch"], found.get("built_for", own["size"]))
            backbone.load_state_dict(weights(path, found["state_dict"]))
            return as_trained(backbone, own, size), own | ({"size": size} if size else {}), found, path
        if "model" in found:
            common.fail(f"{path} is a training checkpoint; the backbone is in backbone.pt beside it")
        if not arch:
            common.fail(f"{path} holds a plain state dict: say with --arch of which network")
        backbone = backbones.build(arch, preprocess["size"])
        heads, own = ("fc.", "classifier.", "head.", "heads.", "AuxLogits.", "aux1.", "aux2."), backbone.state_dict()
        backbone.load_state_dict({k: v for k, v in weights(path, found).items() if k in own or not k.startswith(heads)})
        return backbone, preprocess | getattr(backbone, "preprocess", {}), {}, path
    except EOFError as error:
        common.fail(str(error))
    except RuntimeError as error:  # of load_state_dict: the first line names the class, the second what is wrong
        common.fail(f"{target} does not fit the architecture: {' '.join(str(error).split())[:300]}")
