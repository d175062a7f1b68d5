"""ResNet v2, RevNet and VGG of "Revisiting Self-Supervised Visual Representation Learning" (Kolesnikov et al. 2019,
https://arxiv.org/abs/1901.09005).

k is the widening factor: the first convolution has 16 k channels and stage s of ResNets and RevNets 64 k 2^(s - 1), so that
the vector has 512 k; k = 4 is the usual ResNet-50. The study's ResNet v1 is `backbones.ResNet`; `backbones.build` makes all.
"""

import contextlib
import functools

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from backbones import Backbone, blocks, he


def root(channels, kernel, strides):
    """First convolution and max-pooling without BatchNorm and ReLU: the first unit has its own. Values may be negative
    here, so it matters that the study pads the pooling with zeros, where torch's own padding is minus infinity."""
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
    """Unit of ResNet v2 (He et al. 2016b): y = s + F(a), a = ReLU(BN(x)). s is x, or a 1x1 convolution of a, without
    BatchNorm, where the shape changes."""

    def __init__(self, inplanes, outplanes, stride):
        super().__init__()
        layers, same = bottleneck(inplanes, outplanes, stride), stride == 1 and inplanes == outplanes
        self.activation, self.residual = nn.Sequential(*layers[:2]), nn.Sequential(*layers[2:])
        self.downsample = None if same else nn.Conv2d(inplanes, outplanes, 1, stride, bias=False)

    @property
    def conv3(self):
        """The last convolution, by the name that it has in torchvision's bottleneck."""
        return self.residual[-1]

    def forward(self, x):
        a = self.activation(x)
        return (x if self.downsample is None else self.downsample(a)) + self.residual(a)


class ResNetV2(Backbone):
    """ResNet v2 of the study: pre-activation bottlenecks. The last stage's map is taken after the last BatchNorm (+ ReLU)."""

    def __init__(self, depths, k, strides, kernel, last_relu=True):
        super().__init__()
        self.root = root(round(16 * k), kernel, strides)
        inplanes = round(16 * k)
        for i, depth in enumerate(depths):
            outplanes, units = round(64 * k) * 2**i, []
            for j in range(depth):
                units.append(PreActivation(inplanes, outplanes, strides[i + 1] if i > 0 and j == 0 else 1))
                inplanes = outplanes
            setattr(self, f"layer{i + 1}", nn.Sequential(*units))
        self.last = last_norm(inplanes, last_relu)
        self.dim = self.channels = inplanes
        he(self)

    def maps(self, x):
        x = self.root(x)
        maps = {"root": x} | blocks(x, (self.layer1, self.layer2, self.layer3, self.layer4))
        return maps | {"block4": self.last(maps["block4"])}


class Reversible(nn.ModuleList):
    """Units of one stage of a RevNet: [x1, x2] -> [y2, y1], y1 = x1 + F(x2), y2 = x2, on halves of the channels. The halves
    change places, so that the next unit changes the other one."""

    def forward(self, x):
        x1, x2 = x.chunk(2, 1)  # [B, C / 2, H, W] each
        for f in self:
            x1, x2 = x2, x1 + f(x2)
        return torch.cat([x1, x2], 1)

    def inverse(self, y):
        """The stage's input from its output: x2 = y2, x1 = y1 - F(x2). In training mode F uses the statistics of the
        batch, as the forward pass did."""
        y2, y1 = y.chunk(2, 1)
        for f in reversed(self):
            y2, y1 = y1 - f(y2), y2
        return torch.cat([y2, y1], 1)


class Recompute(torch.autograd.Function):
    """A `Reversible` stage of which only the output is kept for the backward pass; see RevNet. `zeros`: how many of the
    last channels of x are padding."""

    @staticmethod
    def forward(ctx, stage, zeros, x, *parameters):
        device = x.device.type
        norms = [m for m in stage.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        ctx.stage, ctx.zeros, ctx.norms = stage, zeros, [(m, m.training) for m in norms]
        # autocast would remember weights that it has cast in here, where no gradients are recorded, for use outside
        ctx.autocast = dict(
            device_type=device,
            dtype=torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
            cache_enabled=False,
        )
        with torch.autocast(**ctx.autocast):
            y = stage(x)
        ctx.save_for_backward(y, *parameters)  # parameters: torch then notices a change before the backward pass
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, *_ = ctx.saved_tensors
        (y2, y1), (g2, g1), grads = y.chunk(2, 1), grad.chunk(2, 1), {}
        with same_statistics(ctx.norms):
            for f in reversed(ctx.stage):
                if ctx.zeros and f is ctx.stage[0]:
                    # Exact zeros again: BatchNorm leaves them at the ReLU's kink, where rounding would decide the gradient.
                    y2 = nn.functional.pad(y2[:, : -ctx.zeros], (0, 0, 0, 0, 0, ctx.zeros))
                x2, weights = y2.detach().requires_grad_(), [p for p in f.parameters() if p.requires_grad]
                with torch.enable_grad(), torch.autocast(**ctx.autocast):
                    r = f(x2)  # once, for the gradients and for x1
                g, *of_f = torch.autograd.grad(r, [x2, *weights], g1.to(r.dtype))
                grads |= zip(weights, of_f, strict=True)
                y2, y1 = y1 - r, y2  # [x1, x2], which is what the unit before gave as [y2, y1]
                g2, g1 = g1, g2 + g
        return None, None, torch.cat([g2, g1], 1), *(grads.get(p) for p in ctx.stage.parameters())


@contextlib.contextmanager
def same_statistics(norms):
    """Inside, each BatchNorm of [(norm, training)] normalises as in that mode and leaves its running averages and their
    count alone: they have seen this batch already."""
    now = [(m, m.training, m.track_running_stats) for m, _ in norms]
    try:
        for m, training in norms:
            m.training, m.track_running_stats = training, False
        yield
    finally:
        for m, training, track in now:
            m.training, m.track_running_stats = training, track


class RevNet(Backbone):
    """RevNet (Gomez et al. 2017, https://arxiv.org/abs/1707.04585) in the study's form: every unit can be inverted.

        x = [x1, x2] (halves of the channels)  ->  y = [y2, y1],   y1 = x1 + F(x2),   y2 = x2
        inverse:    x2 = y2,   x1 = y1 - F(x2)
        gradients:  dx1 = dy1,   dx2 = dy2 + J_F(x2)^T dy1,   dtheta = (dF / dtheta)^T dy1

    F is the bottleneck of ResNet v2 on half of the channels. A unit is half of a block of the RevNet paper: two in a row
    are y1 = x1 + F(x2), y2 = x2 + G(y1). Between stages the map is averaged over 2x2 and gets C / 2 channels of zeros on
    either side. The first convolution has 64 k channels, since there are no projections that could widen the map later.

    So the backward pass needs of each stage only its output (pooling cannot be inverted): it runs every F once more,
    about a third more arithmetic, for memory that does not grow with depth (`recompute`; False keeps the plain graph). F
    then uses the statistics of the batch again, and running averages are moved once. Inputs come back up to rounding, for
    which the sums x1 + F(x2) stay in the precision of the weights under autocast.
    """

    def __init__(self, depths, k, strides, kernel, last_relu=True):
        super().__init__()
        channels = round(64 * k)
        self.root = root(channels, kernel, strides)
        for i, depth in enumerate(depths):
            half = channels * 2**i // 2
            setattr(self, f"layer{i + 1}", Reversible(nn.Sequential(*bottleneck(half, half)) for _ in range(depth)))
        self.strides, self.recompute = strides[2:], True
        self.dim = self.channels = 2 * half
        self.last = last_norm(self.dim, last_relu)
        he(self)

    def stage(self, i, x):
        """Stage i = 1..4 from the map of the one before."""
        zeros = x.shape[1] // 2 if i > 1 else 0
        if zeros:
            # ceil_mode: an odd map becomes as large as a convolution of stride 2 would make it.
            x = nn.functional.avg_pool2d(x, self.strides[i - 2], ceil_mode=True)
            x = nn.functional.pad(x, (0, 0, 0, 0, zeros, zeros))
        stage = getattr(self, f"layer{i}")
        if self.recompute and torch.is_grad_enabled():
            return Recompute.apply(stage, zeros, x, *stage.parameters())
        return stage(x)

    def maps(self, x):
        if self.recompute:  # the root has no BatchNorm, so torch's own recomputation does; pooling keeps much
            x = checkpoint(self.root, x, use_reentrant=False, preserve_rng_state=False)
        else:
            x = self.root(x)
        x = x.to(self.root[0].weight.dtype)  # out of autocast's half precision
        maps = {"root": x} | blocks(x, [functools.partial(self.stage, i) for i in range(1, 5)])
        return maps | {"block4": self.last(maps["block4"])}


class VGG(Backbone):
    """VGG with BatchNorm in the study's form (k = 8: the usual widths). 3x3 convolutions of 8 k, 16 k, 32 k, 64 k, 64 k
    channels in five stages, the first of which end in a max-pooling, as many as the stride needs; then fc6, one convolution
    over the whole last map, and fc7. A larger image than the network was built for is read at every place, and averaged.
    """

    def __init__(self, depths, k, stride, size):
        super().__init__()
        pools, inplanes = stride.bit_length() - 1, 3
        for i, depth in enumerate(depths):
            outplanes, layers = round(8 * k) * 2 ** min(i, 3), []
            for _ in range(depth):
                layers += self.layer(inplanes, outplanes, 3, 1)
                inplanes = outplanes
            setattr(self, f"layer{i + 1}", nn.Sequential(*layers, *([nn.MaxPool2d(2)] if i < pools else [])))
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
