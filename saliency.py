"""Saliency: foreground masks for Distilling Localization (instdisc.py), by methods that learn nothing, in batches.

    GS   geodesic saliency            Wei et al., ECCV 2012         far from the border along paths of little contrast
    MC   absorbing Markov chain       Jiang et al., ICCV 2013       a walk from here takes long to reach the border
    RBD  robust background detection  Zhu et al., CVPR 2014         not like regions that touch the border much

and from a network trained with labels: `cam` (Zhou et al. 2016) and `gradient` (Simonyan et al. 2014).

    image -> superpixels -> graph of ~200 regions -> distances, or a linear system -> a value per region -> map
             SLIC           color, place, border     of [B, K, K] matrices

All images of a batch have the same number of regions K (some may be empty): a batch is one computation, in fp32, that
never waits for the device. Constants are those of the authors' code; docs/saliency.md lists them with sources.

    differences          the authors' code                     here
    image                at its own size                       squashed to 224 x 224 px; small ones to less (`side_for`)
    regions              h w / 600 (mc: 250)                   a grid of blocks of 16 px: 196
    SLIC's candidates    centers within a block's side         the centers of the 3x3 blocks around the pixel's block
    scattered regions    large parts become regions            the part nearest to the center stays
    frames               found by edges and cut off (rbd, gs)  not looked for; mc has its own test, which is here
    gradient's mask      graph cut                             geodesic distances between seeds

    python saliency.py DIR --out MASKS                          RBD masks for a folder of images, one small PNG each
    python saliency.py DIR --out MASKS --method cam --classifier FILE
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2 import functional as tvf
from tqdm import tqdm

import backbones
import common
import data
import evaluate
import runs
import sets
from analysis import reconstruct

METHODS = ("rbd", "mc", "gs")
CLASS_METHODS = ("cam", "gradient")  # of a network trained with labels
BLOCK = 16  # px: the side S of a superpixel's block
SIDE = 224  # px: the working size, a multiple of BLOCK
INF = float("inf")


# ============ superpixels (SLIC: Achanta et al. 2012, in the form of RBD's code) ============


def slic(lab, rounds=10):
    """Superpixels of Lab images [B, 3, H, W], H and W multiples of BLOCK: (label, cost) [B, H, W] int64 and int32.

    d^2 = |Lab - Lab_k|^2 + (20 / S)^2 |xy - xy_k|^2, one center k to start with in each of the gh x gw blocks of S px;
    a pixel chooses among the centers that started in the 3x3 blocks around its own. So all distances are one batched
    product [9, 6] x [6, S^2] per block and all new centers another. `cost` orders the pixels by d^2.
    """
    (b, _, height, width), s, device = lab.shape, BLOCK, lab.device
    gh, gw = height // s, width // s
    n = b * gh * gw
    # Places relative to the block's middle, so that they are the same small numbers in every block.
    scale = 20.0 / s
    at = (torch.arange(s, device=device) - (s - 1) / 2) * scale
    x = torch.empty(b, gh, gw, 6, s, s, device=device)
    x[:, :, :, :3] = lab.view(b, 3, gh, s, gw, s).permute(0, 2, 4, 1, 3, 5)
    x[:, :, :, 3], x[:, :, :, 4], x[:, :, :, 5] = at[:, None], at, 1.0
    x = x.view(n, 6, s * s)
    square = x.square().sum(1, keepdim=True)  # [n, 1, S^2], and 1 for the last row, which keeps d^2 well above 0
    kind = torch.arange(9, device=device, dtype=torch.int32)[:, None]
    shift = (torch.cat([kind.div(3, rounding_mode="floor"), kind % 3], 1) - 1) * scale * s  # [9, 2]: of those blocks
    middle = s // 2 * s + s // 2
    center = x[:, :5, middle].reshape(b, gh, gw, 5).permute(0, 3, 1, 2).contiguous()  # [B, 5, gh, gw]
    distance, chosen = torch.empty(n, 9, s * s, device=device), torch.empty(n, 9, s * s, device=device)
    for i in range(rounds):
        c = F.unfold(F.pad(center, (1, 1, 1, 1), value=1e4), 3)  # [B, 5 * 9, gh * gw]: of the 3x3 blocks around each
        c = c.view(b, 5, 9, -1).permute(0, 3, 2, 1).reshape(n, 9, 5)
        c = torch.cat([c[..., :3], c[..., 3:] + shift], 2)
        torch.bmm(torch.cat([-2 * c, c.square().sum(2, keepdim=True)], 2), x, out=distance)
        # The nearest of nine, each with its number in the last four bits: one minimum instead of an argmin, much faster
        # on a CPU, and of equal ones the first on every device. Positive floats are ordered as their bits as integers.
        distance.add_(square).clamp_(min=0.5).view(torch.int32).bitwise_and_(~15).bitwise_or_(kind)
        cost = distance.amin(1, keepdim=True)
        if i == rounds - 1:
            break
        torch.eq(distance, cost, out=chosen)
        sums = torch.bmm(chosen, x.mT).view(b, gh, gw, 9, 6)  # what each block has for its nine centers
        sums[..., 3:5] -= shift * sums[..., 5:]
        total = torch.zeros(b, gh + 2, gw + 2, 6, device=device)
        for k in range(9):
            total[:, k // 3 : k // 3 + gh, k % 3 : k % 3 + gw] += sums[:, :, :, k]
        total = total[:, 1:-1, 1:-1].permute(0, 3, 1, 2)
        center = torch.where(total[:, 5:] > 0, total[:, :5] / total[:, 5:].clamp(min=1), center)  # an empty one stays
    cost = cost.view(torch.int32).view(b, gh, gw, s, s).transpose(2, 3).reshape(b, height, width)
    k = cost.bitwise_and(15).long()
    row = torch.arange(height, device=device).div(s, rounding_mode="floor")[:, None]
    column = torch.arange(width, device=device).div(s, rounding_mode="floor")
    return (row + k.div(3, rounding_mode="floor") - 1) * gw + column + k % 3 - 1, cost


def connect(label, cost, regions):
    """Every region in one piece (4-neighbors): [B, H, W] -> [B, H, W].

    The part with the pixel of least cost is flooded from there; what is not reached takes the label of a neighbor that
    is, step by step. The number of steps is fixed, as a test for the end would wait for the device: in photographs a
    flood takes less than 3 S steps, and 12 fill the rest.
    """
    b, h, w = label.shape
    flat = label.view(b, h * w)
    least = torch.full((b, regions), 2**31 - 1, dtype=torch.int32, device=label.device)
    least.scatter_reduce_(1, flat, cost.view(b, h * w), "amin")
    place = torch.arange(h * w, device=label.device, dtype=torch.int32).expand(b, -1)
    place = torch.where(cost.view(b, h * w) == least.gather(1, flat), place, h * w)  # of equal pixels the first
    first = torch.full_like(least, h * w).scatter_reduce_(1, flat, place, "amin")
    # One long row of pixels: a step to the right is 1 and one down is w, and no mask leads over the end of a line.
    reached = (place == first.gather(1, flat)).byte().view(-1)
    short = label.to(torch.int16)  # quicker
    right, down = torch.zeros_like(label, dtype=torch.uint8), torch.zeros_like(label, dtype=torch.uint8)
    right[:, :, :-1], down[:, :-1] = short[:, :, 1:] == short[:, :, :-1], short[:, 1:] == short[:, :-1]
    right, down = right.view(-1)[:-1], down.view(-1)[:-w]
    for _ in range(3 * BLOCK):
        for to, back, same in ((1, -1, right), (w, -w, down)):
            reached[to:] |= reached[:back] & same
            reached[:back] |= reached[to:] & same
    # 0: not settled yet, else label + 1. Of several settled neighbors the largest label counts.
    settled = (short + 1) * reached.view(b, h, w)
    for _ in range(2 * BLOCK):
        beside = torch.zeros_like(settled)
        beside[:, :, 1:] = settled[:, :, :-1]
        torch.maximum(beside[:, :, :-1], settled[:, :, 1:], out=beside[:, :, :-1])
        torch.maximum(beside[:, 1:], settled[:, :-1], out=beside[:, 1:])
        torch.maximum(beside[:, :-1], settled[:, 1:], out=beside[:, :-1])
        settled += beside * (settled == 0)
    return torch.where(settled > 0, settled.long() - 1, label)


# ============ the graph of regions ============


def touching(label, regions, diagonal=False):
    """Which regions share an edge between two pixels, or with `diagonal` a corner: bool [B, K, K]."""
    pairs = [(label[:, :, :-1], label[:, :, 1:]), (label[:, :-1], label[:, 1:])]
    if diagonal:
        pairs += [(label[:, :-1, :-1], label[:, 1:, 1:]), (label[:, :-1, 1:], label[:, 1:, :-1])]
    return paired(torch.cat([(p * regions + q).flatten(1) for p, q in pairs], 1), regions)


def paired(index, regions):
    """Pairs p K + q, int64 [B, P] -> a symmetric bool matrix [B, K, K] of them; none of a region with itself."""
    a = torch.zeros(len(index), regions * regions, dtype=torch.bool, device=index.device).scatter_(1, index, True)
    a = a.view(-1, regions, regions)
    return (a | a.mT) & ~torch.eye(regions, dtype=torch.bool, device=index.device)


def at_border(label, regions, width):
    """Which regions have a pixel at most `width` px from the border: bool [B, K]."""
    sides = (label[:, :width], label[:, -width:], label[..., :width], label[..., -width:])
    index = torch.cat([side.flatten(1) for side in sides], 1)
    return torch.zeros(len(label), regions, dtype=torch.bool, device=label.device).scatter_(1, index, True)


def graph(rgb):
    """The regions of images [B, 3, H, W], whole numbers in 0..255, H and W multiples of BLOCK, as a dict of label
    [B, H, W]; used [B, K], false for an empty region; lab [B, K, 3] of the mean RGB and lab_mean, the mean of Lab;
    place [B, K, 2] in 0..1; near [B, K, K]: 4-neighbors; band [B, K]: at the border."""
    (b, _, h, w), device = rgb.shape, rgb.device
    k = (h // BLOCK) * (w // BLOCK)
    lab = backbones.to_lab(rgb / 255)
    label = connect(*slic(lab), k)
    y, x = torch.arange(h, device=device).float(), torch.arange(w, device=device).float()
    plane = torch.stack([y[:, None].expand(h, w), x.expand(h, w), torch.ones(h, w, device=device)])
    # Whole numbers, but for Lab: their sums are exact, so that the order in which a GPU adds them does not matter.
    pixels = torch.cat([rgb, lab, plane.expand(b, -1, -1, -1)], 1).flatten(2)  # [B, 9, H W]
    sums = torch.zeros(b, 9, k, device=device).scatter_add_(2, label.view(b, 1, -1).expand(-1, 9, -1), pixels)
    means = (sums[:, :8] / sums[:, 8:].clamp(min=1)).mT  # [B, K, 8]
    return dict(
        label=label,
        used=sums[:, 8] > 0,
        lab=backbones.to_lab(means[..., :3].mT / 255).mT,
        lab_mean=means[..., 3:6],
        place=torch.stack([means[..., 6] / h, means[..., 7] / w], 2),
        near=touching(label, k),
        band=at_border(label, k, round(BLOCK / 3)),  # 8 px of 24.5 in the authors' images of 400 x 300 px
    )


def distances(x):
    """Euclidean distances [B, K, K] between the rows of [B, K, d]."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


def two_steps(a):
    """Neighbors and their neighbors, bool [B, K, K]."""
    return a | (torch.bmm(a.float(), a.float()) > 0)


def spread(color, near, used):
    """(m1, m2, mt) [B, 1, 1] of an image's contrast: the mean over regions of the least color distance to a neighbor,
    the same with the neighbors' neighbors, and the mean of the largest 1 % of the distances between neighbors."""
    n = used.sum(1).clamp(min=1)
    eye = torch.eye(near.shape[1], dtype=torch.bool, device=near.device)
    m1, m2 = (
        torch.where(used, color.masked_fill(~a, INF).amin(2), 0).nan_to_num(posinf=0).sum(1) / n
        for a in (near, two_steps(near) & ~eye)
    )
    edges = near.sum((1, 2)) // 2
    top = (0.01 * edges).round().clamp(min=1)  # how many are 1 %; below, more than that for any planar graph
    most = max(1, round(0.03 * near.shape[1]))
    largest = (color * near.triu()).flatten(1).topk(most, 1).values
    mt = (largest * (torch.arange(most, device=near.device) < top[:, None])).sum(1) / top
    return m1[:, None, None], m2[:, None, None], mt[:, None, None]


def geodesic(cost, edges):
    """All shortest paths [B, K, K] with `cost` on `edges`, infinite where there is none: Floyd and Warshall. Many costs
    are 0, so that paths have many hops, and methods that stop after some number of hops are wrong."""
    k = cost.shape[1]
    d = cost.masked_fill(~edges, INF)
    d.diagonal(dim1=1, dim2=2).zero_()
    through = torch.empty_like(d)
    for i in range(k):
        torch.add(d[:, :, i : i + 1], d[:, i : i + 1, :], out=through)
        torch.minimum(d, through, out=d)
    return d


def minmax(x, used):
    """To 0..1 over the used regions of each image, [B, K]; 0 for the others, and everywhere if all are equal."""
    low, high = x.masked_fill(~used, INF).amin(1, keepdim=True), x.masked_fill(~used, -INF).amax(1, keepdim=True)
    return torch.where(used & (high > low), (x - low) / (high - low).clamp(min=1e-12), 0).clamp_(0, 1)


def linked(g):
    """(color distances, edges of the graph with all border regions linked, clip value m2, m1, mt) of GS and RBD."""
    color = distances(g["lab"])
    m1, m2, mt = spread(color, g["near"], g["used"])
    return color, g["near"] | (g["band"][:, :, None] & g["band"][:, None, :]), m2, m1, mt


# ============ the methods: a graph -> the saliency of each region [B, K] in [0, 1] ============


def gs(g):
    """Geodesic saliency: the length of the shortest path to the background, as GeodesicSaliency.m of RBD's code."""
    color, edges, clip, _, _ = linked(g)
    k, band = g["used"].shape[1], g["band"]
    # Objects may touch the border: a border region unlike the others there is not background.
    unlike = color / (1 + 3 * distances(g["place"]))
    eye = torch.eye(k, dtype=torch.bool, device=band.device)
    unlike = unlike.masked_fill(~(band[:, :, None] & band[:, None, :]) | eye, INF)
    alike = unlike.topk(max(1, round(k / 200 * 5)), 2, largest=False).values.mean(2)  # [B, K]
    low = alike.masked_fill(~band, INF).amin(1, keepdim=True)
    high = alike.masked_fill(~band, -INF).amax(1, keepdim=True)
    background = band & ((high - low <= 1) | (alike <= (low + high) / 2))
    # The least of all distances to background regions is that to a virtual node tied to them at no cost.
    d = geodesic((color - clip).clamp(min=0), edges)
    d = d.masked_fill(~background[:, None, :], INF).amin(2).masked_fill(~g["used"], 0).nan_to_num(posinf=0)
    top = d.topk(max(1, round(0.02 * k)), 1).values[:, -1:]
    return (d / top.clamp(min=1e-6)).clamp(max=1)


def otsu(x, used, bins=256):
    """Otsu's threshold [B, 1] for values in [0, 1]: the cut that gives two classes with the largest variance between
    them; of equally good ones the mean."""
    level = (x * (bins - 1)).round().long()
    share = torch.zeros(len(x), bins, device=x.device).scatter_add_(1, level, used.float())
    share = share / share.sum(1, keepdim=True).clamp(min=1)
    weight, mean = share.cumsum(1), (share * torch.arange(bins, device=x.device)).cumsum(1)
    between = (mean[:, -1:] * weight - mean).square() / (weight * (1 - weight)).clamp(min=1e-9)
    between = between.masked_fill((weight < 1e-6) | (weight > 1 - 1e-6), 0)
    best = between >= between.amax(1, keepdim=True) * (1 - 1e-6)
    return (best * torch.arange(bins, device=x.device)).sum(1, keepdim=True) / best.sum(1, keepdim=True) / (bins - 1)


def weight(d, sigma):
    """exp(-d^2 / (2 sigma^2)), and 0 beyond 3 sigma (Dist2WeightMatrix.m)."""
    return torch.where(d > 3 * sigma, 0.0, torch.exp(-d.square() / (2 * sigma * sigma)))


def boundary_connectivity(color, edges, clip, sigma, band):
    """BndCon [B, K]: length along the border over the root of the area, of the soft region around each region, eq. 3-5.
    A square in a corner has about 2, in the middle 0, the whole image 4."""
    w = weight(geodesic((color - clip).clamp(min=0), edges), sigma)
    return (w * band[:, None, :]).sum(2) / w.sum(2).sqrt()


def rbd(g):
    """Robust background detection: contrast weighted by how far a region is background, smoothed by a least squares."""
    color, edges, clip, m1, mt = linked(g)
    used, near, band = g["used"], g["near"], g["band"]
    geo_sigma = torch.minimum(3 * m1, mt / 10).clamp(5, 10)
    smooth_sigma = torch.minimum(3 * m1, 0.2 * mt).clamp(1, 20)
    con = boundary_connectivity(color, edges, clip, geo_sigma, band)
    background = 1 - torch.exp(-con.square() / 2)  # sigma_BndCon 1, eq. 6
    contrast = color * weight(distances(g["place"]), 0.4)  # eq. 8
    contrast = minmax(torch.bmm(contrast, background[:, :, None] * used[:, :, None])[..., 0], used)
    contrast = torch.where(contrast < otsu(contrast, used), 0.0, contrast)
    # eq. 9: min  sum 5 g_i s_i^2 + sum c_i (s_i - 1)^2 + 1/2 sum w_ij (s_i - s_j)^2
    background = 5 * torch.where(con > 3, 1000.0, background)
    smooth = two_steps(near) | (band[:, :, None] & band[:, None, :])
    w = torch.where(smooth, weight(color, smooth_sigma), 0.0) + 0.1 * near
    w = w * used[:, :, None] * used[:, None, :]
    system = torch.diag_embed(w.sum(2) + background + contrast + 1e-6 * ~used) - w
    return minmax(solve(system, contrast[:, :, None])[..., 0], used)


def solve(system, right):
    """Symmetric positive definite systems [B, K, K] with right sides [B, K, R]."""
    return torch.cholesky_solve(right, torch.linalg.cholesky_ex(system)[0])


def mc(g):
    """Absorbing Markov chain: how long a random walk that prefers like colors takes until the border absorbs it."""
    label, used = g["label"], g["used"]
    k, device = used.shape[1], used.device
    near = touching(label, k, diagonal=True)
    ends = [(label[:, 0], label[:, -1]), (label[..., 0], label[..., -1])]  # opposite sides are tied to each other
    wrapped = near | paired(torch.cat([(p * k + q) for p, q in ends], 1), k)
    eye = torch.eye(k, dtype=torch.bool, device=device)
    edges = two_steps(wrapped) & ~eye
    d = minmax(distances(g["lab_mean"]).flatten(1), edges.flatten(1)).view(-1, k, k)
    w = torch.where(edges, torch.exp(-10 * d) + 1e-5, 0.0) + eye * used[:, :, None]
    degree = w.sum(2)
    outlier = used & (degree < 1.1)  # like none of its neighbors: a walk would never leave it
    ring = at_border(label, k, 1)
    inner = (near & ring[:, :, None]).any(1) & ~ring
    # A border that hardly leads inwards is a picture's frame: it is left out, and the next ring absorbs.
    framed = (w * near * ring[:, :, None] * inner[:, None, :]).sum((1, 2))[:, None] <= 13
    absorbs = torch.where(framed, inner, ring) & ~outlier
    stays = used & ~outlier & ~(framed & ring)
    absorbed = (w * absorbs[:, None, :]).sum(2)
    # (I - Q) y = r with Q = W / (degree + absorbed), times that: symmetric and positive definite.
    both = stays[:, :, None] & stays[:, None, :]
    total = torch.where(stays, degree + absorbed, 1.0)
    system = torch.diag_embed(total) - torch.where(both, w, 0.0)
    inverse = torch.where(stays, 1 / degree.clamp(min=1e-6), 0.0)  # of the equilibrium, up to a factor
    times = solve(system, torch.stack([total * stays, total * inverse * stays], 2))
    plain, weighted = minmax(times[..., 0], stays), minmax(times[..., 1], stays)
    # Maps that leave much undecided are made anew: regions weigh as the inverse of the chain's equilibrium.
    tenth = (plain * 10).floor().clamp(max=9) + 1
    doubt = (torch.minimum(tenth, 11 - tenth) * stays).sum(1, keepdim=True) / stays.sum(1, keepdim=True).clamp(min=1)
    s = torch.where(doubt < 2, plain, weighted)
    return torch.where(outlier, (near & (s > 0.3)[:, None, :]).any(2).float(), s)


REGIONS = {"rbd": rbd, "mc": mc, "gs": gs}


# ============ from a network trained with labels (DiLo, sec. 4: class-specific saliency) ============


def cam(classifier, x):
    """Class activation maps [B, H, W], any scale, of x [B, 3, H, W] in [-1, 1] for the predicted classes: the last map,
    its channels weighted as the head weighs them (Zhou et al. 2016). classifier: of reconstruct.open_classifier, its
    head one linear layer on the pooled last map."""
    trunk, head = classifier.net if isinstance(classifier.net, nn.Sequential) else (classifier.net, None)
    head, last = head or getattr(trunk, "fc", None), getattr(trunk, "layer4", None) or getattr(trunk, "features", None)
    if not isinstance(head, nn.Linear) or last is None:
        common.fail("cam needs a classifier with one linear layer on its pooled last feature map")
    kept = []
    hook = last.register_forward_hook(lambda module, inputs, output: kept.append(output.float()))
    y = classifier(x).argmax(1)
    hook.remove()
    return resized(torch.einsum("bchw,bc->bhw", kept[0], head.weight[y])[:, None], *x.shape[2:])[:, 0]


def pixel_gradients(net, x, y):
    """d score_y / d x, float [B, 3, S, S], the score being the logit of class y [B] for x [B, 3, S, S], net in eval
    mode, where no image's score depends on another image. The caller may be in inference mode."""
    with torch.inference_mode(False), torch.enable_grad(), evaluate.in_eval(net):
        x = x.detach().clone().requires_grad_()  # a clone made here is no inference tensor
        scores = net(x).gather(1, y.clone().to(x.device)[:, None])
        return torch.autograd.grad(scores.sum(), x)[0].float()


def class_gradients(net, x, y):
    """The saliency of each pixel for class y (Simonyan et al. 2014), float [B, S, S]: the largest |d score_y / d x| of
    its channels."""
    return pixel_gradients(net, x, y).abs().amax(1)


def gradient(classifier, x, g):
    """The saliency of each region [B, K]: a segmentation grown from where the score of the predicted class depends most
    and least on the pixels (Simonyan et al. 2014, who cut a graph with the same seeds). Seeds of the object are regions
    whose mean gradient is above the 95 % quantile, of the background those up to the 30 % quantile. A region counts
    d_bg / (d_fg + d_bg), its geodesic distances to the nearest seed of each kind."""
    used, flat = g["used"], g["label"].flatten(1)
    slope = class_gradients(classifier, x, classifier(x).argmax(1)).flatten(1)
    size = torch.zeros_like(used, dtype=torch.float).scatter_add_(1, flat, torch.ones_like(slope))
    slope = torch.zeros_like(size).scatter_add_(1, flat, slope) / size.clamp(min=1)
    high, low = (slope.masked_fill(~used, math.nan).nanquantile(q, 1, keepdim=True) for q in (0.95, 0.3))
    d = geodesic(distances(g["lab"]) + 1e-3, g["near"])  # not 0 between equal regions, so that the seeds share them
    to_object = d.masked_fill(~(used & (slope > high))[:, None], INF).amin(2)
    to_background = d.masked_fill(~(used & (slope <= low))[:, None], INF).amin(2)
    return (to_background / (to_object + to_background)).masked_fill(~used, 0).nan_to_num(0)


# ============ maps of images ============


def side_for(height, width):
    """The working size in px: SIDE, and for small images at most four times their own."""
    return max(4 * BLOCK, min(SIDE, 4 * max(height, width)) // BLOCK * BLOCK)


def resized(x, height, width):
    """Float [B, C, h, w], enlarged or (antialiased) reduced."""
    if tuple(x.shape[-2:]) == (height, width):
        return x
    return F.interpolate(x, (height, width), mode="bilinear", antialias=True)


def to_bytes(m):
    """[0, 1] to uint8."""
    return (m * 255).round().to(torch.uint8)


def scaled(m):
    """[B, H, W] to 0..1 in each image; 0 where an image has one value."""
    low, high = m.amin((1, 2), keepdim=True), m.amax((1, 2), keepdim=True)
    return (m - low) / (high - low).clamp(min=1e-12)


@torch.no_grad()
def maps(images, method="rbd", classifier=None, size=None):
    """Saliency maps float32 [B, h, w] in [0, 1] of images [B, 3, H, W], uint8 or float in [0, 1], on any device.

    size: (h, w), or one number for both; default that of the images. classifier: of reconstruct.open_classifier, for
    CLASS_METHODS. A constant image has an empty map.
    """
    height, width = images.shape[2:] if size is None else (size, size) if isinstance(size, int) else size
    side, chunk, out = side_for(*images.shape[2:]), 4 if images.device.type == "cpu" else 128, []
    with torch.autocast(images.device.type, enabled=False):
        for part in images.split(chunk):  # 10 MB an image; on a CPU so few that its cache holds them
            x = part.float() if part.dtype == torch.uint8 else part.float() * 255
            x = resized(x, side, side).round_().clamp_(0, 255)  # the methods are made for files of 8 bits
            if method == "cam":
                m = scaled(cam(classifier, x / 127.5 - 1))
            else:
                g = graph(x)
                s = gradient(classifier, x / 127.5 - 1, g) if method == "gradient" else REGIONS[method](g)
                m = s.gather(1, g["label"].flatten(1)).view(-1, side, side)
            m = m * (x.amax((2, 3)) > x.amin((2, 3))).any(1)[:, None, None]
            out.append(resized(m[:, None], height, width)[:, 0].clamp_(0, 1))
    return torch.cat(out)


class Squashed(Dataset):
    """Images of either kind of set, brought to side x side px: (index, uint8 [3, side, side], why not or "")."""

    def __init__(self, dataset, side):
        self.dataset, self.side = dataset, side

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        try:
            image = self.dataset.read(i)[0] if isinstance(self.dataset, sets.Files) else self.dataset.images[i]
            return i, tvf.resize(image, [self.side, self.side], antialias=True), ""
        except OSError as error:
            return i, torch.zeros(3, self.side, self.side, dtype=torch.uint8), runs.reason(error)


def first_side(dataset):
    """The working size for a set, by its first image that can be read."""
    if isinstance(dataset, sets.Images):
        return side_for(*dataset.images.shape[2:])
    for i in range(len(dataset)):
        try:
            return side_for(*dataset.read(i)[0].shape[1:])
        except OSError:
            pass
    common.fail(f"no image of {dataset.name} decodes")


# ============ masks in files ============


def write_note(out, wanted):
    """Make the folder with a note of what its masks are, or check that its note is the same."""
    note = Path(out, "saliency.json")
    if not note.is_file():
        make_folder(out)
        return runs.write_text(note, json.dumps(wanted) + "\n")
    was = json.loads(note.read_text())
    if changed := [f"{k} {was.get(k)} -> {v}" for k, v in wanted.items() if was.get(k) != v]:
        common.fail(f"{out} holds masks of another kind ({', '.join(changed)}); choose another --out")


def make_folder(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        common.fail(f"{folder}: no folder can be made there ({runs.reason(error)})")


def main(argv=None):
    p = argparse.ArgumentParser(
        usage="python saliency.py DATA --out MASKS [flags]", description=__doc__, formatter_class=common.Help,
        allow_abbrev=False,
    )  # fmt: skip
    p.add_argument("data", help=f"a folder of images, or one of {', '.join(sets.NAMES)}")
    p.add_argument("--out", required=True, help="folder for the masks, KEY.png; what it has already stays")
    p.add_argument("--method", choices=METHODS + CLASS_METHODS, default="rbd", help="the last two need --classifier")
    p.add_argument("--classifier", help="a file of downstream.finetune --save, or torchvision:NAME (of a ResNet)")
    p.add_argument("--root", default="datasets", help="where named sets live")
    p.add_argument("--split", choices=("pretrain", "train", "test"), default="pretrain", help="which images of the set")
    p.add_argument("--size", type=int, default=64, help="px, height and width of a mask, whatever the image's")
    p.add_argument("--batch-size", type=int, default=64, help="images at a time")
    p.add_argument("--workers", type=int, default=common.default_workers(), help="loader workers")
    p.add_argument("--limit", type=int, default=0, help="N images, the same as a training script's --limit N (0: all)")
    p.add_argument("--seed", type=int, default=0, help="which ones --limit takes")
    p.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: cuda, else mps, else cpu")
    args = p.parse_args(argv)
    common.at_least(1, args, "size", "batch_size")
    common.at_least(0, args, "workers", "limit")
    if (args.method in CLASS_METHODS) != bool(args.classifier):
        common.fail(f"--classifier FILE goes with --method {' and '.join(CLASS_METHODS)}, and only with them")
    _, _, device = common.setup(args.device)
    dataset = sets.load(args.data, args.root, args.split, limit=args.limit, seed=args.seed)
    keys = sets.keys_of(dataset)
    classifier = reconstruct.open_classifier(args.classifier).to(device) if args.classifier else None
    out = Path(args.out)
    write_note(out, {k: getattr(args, k) for k in ("data", "split", "method", "size", "classifier")})

    todo = [i for i, key in enumerate(keys) if not Path(out, f"{key}.png").is_file()]
    if not todo:
        print(f"{out} has the masks of all {len(keys)} images already")
        return
    bar = tqdm(total=len(keys), initial=len(keys) - len(todo), desc=args.method, unit="img", disable=None)
    broken, start = 0, time.perf_counter()
    images, pin = Subset(Squashed(dataset, first_side(dataset)), todo), device.type == "cuda"
    how = dict(num_workers=args.workers, pin_memory=pin, worker_init_fn=data.outlive_signals)
    for index, x, errors in DataLoader(images, args.batch_size, **how):
        ms = to_bytes(maps(x.to(device, non_blocking=True), args.method, classifier, args.size)).cpu()
        for i, m, error in zip(index.tolist(), ms, errors, strict=True):
            if error:
                tqdm.write(f"skipped: {error}", file=sys.stderr)
                broken += 1
            else:
                file = Path(out, f"{keys[i]}.png")
                make_folder(file.parent)
                runs.put(file, lambda f, m=m: tvf.to_pil_image(m).save(f, "PNG"), sync=False)  # of many
        bar.update(len(index))
    bar.close()
    done, seconds = len(todo) - broken, time.perf_counter() - start
    print(f"{done} masks written to {out}, {done / seconds:.1f} images/s on {device.type}")
    if broken:
        print(f"{broken} images do not decode and have no mask")


if __name__ == "__main__":
    common.run(main)
