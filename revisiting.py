"""ResNet v2, RevNet and VGG of "Revisiting Self-Supervised Visual Representation Learning" (Kolesnikov et al. 2019,
https://arxiv.org/abs/1901.09005).

k is the widening factor: the first convolution has 16 k channels, stage s of ResNets and RevNets 64 k 2^(s - 1), the
vector 512 k; k = 4 is the usual ResNet-50. The study's ResNet v1 is `backbones.ResNet`; `backbones.build` makes all.
"""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from backbones import Backbone, blocks, he, stages


def root(channels, kernel, strides):
    """First convolution and max-pooling, without BatchNorm and ReLU: the first unit has its own. Values may be negative
    here, so padding counts: the study pads the pooling with zeros, torch with minus infinity."""
    conv = nn.Conv2d(3, channels, kernel, strides[0], kernel // 2, bias=False)
    pool = nn.Sequential(nn.ZeroPad2d(1), nn.MaxPool2d(3, strides[1])) if strides[1] > 1 else nn.Identity()
    return nn.Sequential(conv, pool)


def bottleneck(inplanes, outplanes, stride=1):
    """The residual function of a pre-activation unit: BN, ReLU, 1x1, BN, ReLU, 3x3 (stride), BN, ReLU, 1x1."""
    inner = outplanes // 4
    plan = [(inplanes, inner, 1, 1, 0), (inner, inner, 3, stride, 1), (inner, outplanes, 1, 1, 0)]
    return [layer for c in plan for layer in (nn.BatchNorm2d(c[0]), nn.ReLU(inplace=True), nn.Conv2d(*c, bias=False))]


def last_norm(channels, relu):
    """The last BatchNorm before the mean; without its ReLU in the networks that the study marks (-)."""
    return nn.Sequential(nn.BatchNorm2d(channels), *([nn.ReLU(inplace=True)] if relu else []))


class PreActivation(nn.Module):
    """Unit of ResNet v2 (He et al. 2016b): y = s + F(a), a = ReLU(BN(x)). s is x or, where the shape changes, a 1x1
    convolution of a without BatchNorm."""

    def __init__(self, inplanes, outplanes, stride):
        super().__init__()
        layers, same = bottleneck(inplanes, outplanes, stride), stride == 1 and inplanes == outplanes
        self.activation, self.residual = nn.Sequential(*layers[:2]), nn.Sequential(*layers[2:])
        self.downsample = None if same else nn.Conv2d(inplanes, outplanes, 1, stride, bias=False)

    @property
    def conv3(self):  # the last convolution, as torchvision's bottleneck calls it
        return self.residual[-1]

    def forward(self, x):
        a = self.activation(x)
        return (x if self.downsample is None else self.downsample(a)) + self.residual(a)


class ResNetV2(Backbone):
    """ResNet v2 of the study: pre-activation bottlenecks. The last map is taken after the last BatchNorm (and ReLU)."""

    def __init__(self, depths, k, strides, kernel, last_relu=True):
        super().__init__()
        self.root, widths = root(round(16 * k), kernel, strides), [round(64 * k) * 2**i for i in range(4)]
        layers = stages(PreActivation, depths, round(16 * k), widths, (1, *strides[2:]))
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.last = last_norm(widths[-1], last_relu)
        self.dim = self.channels = widths[-1]
        he(self)

    def maps(self, x):
        x = self.root(x)
        maps = {"root": x} | blocks(x, (self.layer1, self.layer2, self.layer3, self.layer4))
        return maps | {"block4": self.last(maps["block4"])}


class Reversible(nn.ModuleList):
    """Units of one stage of a RevNet: [x1, x2] -> [y2, y1], y1 = x1 + F(x2), y2 = x2, on halves of the channels. The
    halves change places, so that the next unit changes the other one."""

    def forward(self, x):
        x1, x2 = x.chunk(2, 1)  # [B, C / 2, H, W] each
        for f in self:
            x1, x2 = x2, x1 + f(x2)
        return torch.cat([x1, x2], 1)


class Recompute(torch.autograd.Function):
    """A `Reversible` stage of which only the output is kept for the backward pass; see RevNet. `zeros`: how many of the
    last channels of x are padding."""

    @staticmethod
    def forward(ctx, stage, zeros, x, *parameters):
        device = x.device.type
        ctx.stage, ctx.zeros = stage, zeros
        ctx.training = {m: m.training for m in stage.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
        # no cache: autocast would keep weights that it casts in here, where no gradients are recorded, for use outside
        ctx.autocast = functools.partial(torch.autocast, device, torch.get_autocast_dtype(device),
                                         torch.is_autocast_enabled(device), cache_enabled=False)  # fmt: skip
        with ctx.autocast():
            y = stage(x)
        ctx.save_for_backward(y, *parameters)  # parameters: torch then notices a change before the backward pass
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (y2, y1), (g2, g1), grads = ctx.saved_tensors[0].chunk(2, 1), grad.chunk(2, 1), {}
        with same_statistics(ctx.training):
            for f in reversed(ctx.stage):
                if ctx.zeros and f is ctx.stage[0]:  # exact zeros: else rounding at the ReLU's kink decides gradients
                    y2 = F.pad(y2[:, : -ctx.zeros], (0, 0, 0, 0, 0, ctx.zeros))
                x2, weights = y2.detach().requires_grad_(), [p for p in f.parameters() if p.requires_grad]
                with torch.enable_grad(), ctx.autocast():
                    r = f(x2)  # once, for the gradients and for x1
                g, *of_f = torch.autograd.grad(r, [x2, *weights], g1.to(r.dtype))
                grads |= zip(weights, of_f, strict=True)
                y2, y1 = y1 - r, y2  # [x1, x2], which is what the unit before gave as [y2, y1]
                g2, g1 = g1, g2 + g
        return None, None, torch.cat([g2, g1], 1), *(grads.get(p) for p in ctx.stage.parameters())


@contextlib.contextmanager
def same_statistics(training):
    """Inside, each BatchNorm of {norm: mode} normalizes as in that mode, and its running averages, which have seen the
    batch already, stay."""
    now = {m: (m.training, m.track_running_stats) for m in training}
    for m, mode in training.items():
        m.training, m.track_running_stats = mode, False
    try:
        yield
    finally:
        for m, (mode, track) in now.items():
            m.training, m.track_running_stats = mode, track


class RevNet(Backbone):
    """RevNet (Gomez et al. 2017, https://arxiv.org/abs/1707.04585) in the study's form: every unit can be inverted.

        x = [x1, x2] (halves of the channels)  ->  y = [y2, y1],   y1 = x1 + F(x2),   y2 = x2
        inverse:    x2 = y2,   x1 = y1 - F(x2)
        gradients:  dx1 = dy1,   dx2 = dy2 + J_F(x2)^T dy1,   dtheta = (dF / dtheta)^T dy1

    F is the bottleneck of ResNet v2 on half of the channels; two units in a row are a block of the RevNet paper.
    Between stages the map is averaged over 2x2 and gets C / 2 channels of zeros on either side. As nothing else widens
    the map, the first convolution has 64 k channels.

    The backward pass needs only the output of each stage: it runs every F once more, about a third more arithmetic, for
    memory that does not grow with depth (`recompute`; False keeps the plain graph). Inputs come back up to rounding, so
    the sums x1 + F(x2) stay in the precision of the weights under autocast.
    """

    def __init__(self, depths, k, strides, kernel, last_relu=True):
        super().__init__()
        self.root, halves = root(round(64 * k), kernel, strides), [round(64 * k) * 2**i // 2 for i in range(4)]
        for i, (depth, half) in enumerate(zip(depths, halves, strict=True), 1):
            setattr(self, f"layer{i}", Reversible(nn.Sequential(*bottleneck(half, half)) for _ in range(depth)))
        self.strides, self.recompute = strides[2:], True
        self.dim = self.channels = 2 * halves[-1]
        self.last = last_norm(self.dim, last_relu)
        he(self)

    def stage(self, i, x):
        """Stage i = 1..4 from the map of the one before."""
        stage, zeros = getattr(self, f"layer{i}"), x.shape[1] // 2 if i > 1 else 0
        if zeros:  # ceil_mode: an odd map becomes as large as by a convolution of stride 2
            x = F.pad(F.avg_pool2d(x, self.strides[i - 2], ceil_mode=True), (0, 0, 0, 0, zeros, zeros))
        if self.recompute and torch.is_grad_enabled():
            return Recompute.apply(stage, zeros, x, *stage.parameters())
        return stage(x)

    def maps(self, x):
        if self.recompute:  # torch's own recomputation does here, as the root has no BatchNorm; pooling keeps much
            x = checkpoint(self.root, x, use_reentrant=False, preserve_rng_state=False)
        else:
            x = self.root(x)
        x = x.to(self.root[0].weight.dtype)  # out of autocast's half precision
        maps = {"root": x} | blocks(x, [functools.partial(self.stage, i) for i in range(1, 5)])
        return maps | {"block4": self.last(maps["block4"])}


class VGG(Backbone):
    """VGG with BatchNorm in the study's form (k = 8: the usual widths). 3x3 convolutions of 8 k, 16 k, 32 k, 64 k, 64 k
    channels in five stages, the first of which end in a max-pooling, as many as the stride needs; then fc6, one
    convolution over the whole last map, and fc7. A larger image is read at every place, and averaged."""

    def __init__(self, depths, k, stride, size):
        super().__init__()
        pools, inplanes, layers = stride.bit_length() - 1, 3, []
        for i, depth in enumerate(depths):
            outplanes = round(8 * k) * 2 ** min(i, 3)
            units = [*self.layer(inplanes, outplanes, 3, 1)]
            for _ in range(depth - 1):
                units += self.layer(outplanes, outplanes, 3, 1)
            layers.append(nn.Sequential(*units, *([nn.MaxPool2d(2)] if i < pools else [])))
            inplanes = outplanes
        self.layer1, self.layer2, self.layer3, self.layer4, self.layer5 = layers
        self.channels, self.dim = inplanes, round(512 * k)
        self.fc6 = nn.Sequential(*self.layer(inplanes, self.dim, size // stride))
        self.fc7 = nn.Sequential(*self.layer(self.dim, self.dim, 1))
        he(self)

    @staticmethod
    def layer(inplanes, outplanes, kernel, padding=0):
        conv = nn.Conv2d(inplanes, outplanes, kernel, padding=padding, bias=False)
        return conv, nn.BatchNorm2d(outplanes), nn.ReLU(inplace=True)

    def maps(self, x):
        return blocks(x, (self.layer1, self.layer2, self.layer3, self.layer4, self.layer5))

    def vectors(self, last):
        fc6 = self.fc6(last)
        return {"fc6": fc6, "pre_logits": self.fc7(fc6).mean((2, 3))}
