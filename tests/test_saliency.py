"""saliency.py against plain loops, on layouts with known answers, and as a user starts it."""

import heapq
import json
import math
import os
import signal
import struct
import zlib

import pytest
import torch
from helpers import run, write_images
from torch import nn
from torchvision.io import decode_image, read_file, write_jpeg, write_png

import backbones
import data
import runs
import saliency
import sets
import shapes
from analysis import reconstruct, score_saliency

BLOCK = saliency.BLOCK


def blobs(n=2, height=64, width=64, seed=0):
    """Images of soft blobs with some noise, whole numbers in 0..255: [n, 3, height, width]."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, 5, 5, generator=g) * 255
    x = saliency.resized(x, height, width) + 12 * torch.randn(n, 3, height, width, generator=g)
    return x.round().clamp(0, 255)


def disc(size=200, noise=2.0, at=(0.45, 0.55), radius=0.22):
    """(uint8 [3, size, size], bool [size, size]): a bright disc on plain background, off the middle."""
    y, x = torch.meshgrid(*[torch.arange(size) / size] * 2, indexing="ij")
    truth = (y - at[0]).square() + (x - at[1]).square() < radius**2
    image = torch.where(truth, torch.tensor([230, 200, 60]).view(3, 1, 1), torch.tensor([60, 90, 70]).view(3, 1, 1))
    noise = noise * torch.randn(3, size, size, generator=torch.Generator().manual_seed(1))
    return (image + noise).round().clamp(0, 255).to(torch.uint8), truth


def pieces(label):
    """How many 4-connected pieces each label of [H, W] has: {label: count}, by a flood with a stack."""
    (h, w), rows = label.shape, label.tolist()
    seen, count = [[False] * w for _ in range(h)], {}
    for y in range(h):
        for x in range(w):
            if seen[y][x]:
                continue
            k = rows[y][x]
            count[k] = count.get(k, 0) + 1
            seen[y][x], stack = True, [(y, x)]
            while stack:
                a, b = stack.pop()
                for c, d in ((a + 1, b), (a - 1, b), (a, b + 1), (a, b - 1)):
                    if 0 <= c < h and 0 <= d < w and not seen[c][d] and rows[c][d] == k:
                        seen[c][d] = True
                        stack.append((c, d))
    return count


# ============ superpixels ============


def test_lab_of_known_colors():
    rgb = torch.tensor([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [128, 128, 128]])
    lab = torch.tensor(  # the usual figures for sRGB under D65
        [[0, 0, 0], [100, 0, 0], [53.24, 80.09, 67.20], [87.74, -86.18, 83.18], [32.30, 79.19, -107.86], [53.59, 0, 0]]
    )
    assert torch.allclose(backbones.to_lab(rgb.T[None] / 255)[0].T, lab, atol=0.03)


def test_slic_equals_loops():
    x = backbones.to_lab(blobs(1, 48, 64) / 255)
    (h, w), s = x.shape[2:], BLOCK
    gh, gw, scale = h // s, w // s, 20 / BLOCK
    pixels = torch.cat([x[0], torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")) * scale])
    pixels = pixels.double()  # [5, H, W]
    centers = {}
    for gy in range(gh):
        for gx in range(gw):
            y, x_ = gy * s + s // 2, gx * s + s // 2
            centers[gy * gw + gx] = pixels[:, y, x_]
    for rounds in (1, 2, 3):
        expected, margin = torch.zeros(h, w, dtype=torch.long), torch.zeros(h, w)
        for y in range(h):
            for x_ in range(w):
                near = []
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        gy, gx = y // s + dy, x_ // s + dx
                        if 0 <= gy < gh and 0 <= gx < gw:
                            k = gy * gw + gx
                            near.append(((pixels[:, y, x_] - centers[k]).square().sum().item(), k))
                near.sort()
                expected[y, x_], margin[y, x_] = near[0][1], near[1][0] - near[0][0]
        label, _ = saliency.slic(x, rounds=rounds)
        assert ((label[0] == expected) | (margin < 0.5)).all() and (margin < 0.5).float().mean() < 0.02
        assert (label[0] == expected).float().mean() > 0.995
        for k in centers:
            if (expected == k).any():
                centers[k] = pixels[:, expected == k].mean(1)


@pytest.mark.parametrize("kind", ["blobs", "noise", "binary", "plain"])
def test_connect_leaves_every_region_in_one_piece(kind):
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (2, 3, 96, 80), generator=g).float()
    x = {"blobs": blobs(2, 96, 80), "noise": x, "binary": (x > 127) * 255.0, "plain": torch.full_like(x, 77)}[kind]
    k = 6 * 5
    label, cost = saliency.slic(backbones.to_lab(x / 255))
    done = saliency.connect(label, cost, k)
    assert saliency.connect(done, cost, k).equal(done)  # nothing left to do
    for before, after in zip(label, done, strict=True):
        count = pieces(after)
        assert set(count) == set(before.unique().tolist()), "a label was lost"
        assert set(count.values()) == {1}
        if kind == "blobs":
            assert (before == after).float().mean() > 0.8
            assert max(pieces(before).values()) > 1  # there was something to do


def test_connect_keeps_the_part_with_the_least_cost():
    label = torch.zeros(1, 16, 32, dtype=torch.long)
    label[:, :, 16:] = 1
    label[0, 2:5, 20:24] = 0  # an island of 0 within 1
    cost = torch.full((1, 16, 32), 100, dtype=torch.int32)
    cost[0, 8, 8], cost[0, 8, 24] = 1, 1
    expected = label.clone()
    expected[0, 2:5, 20:24] = 1
    assert saliency.connect(label, cost, 2).equal(expected)
    cost[0, 3, 21] = 0  # now the island is the part that stays, and the rest of 0 goes to 1
    expected[0], expected[0, 2:5, 20:24] = 1, 0
    assert saliency.connect(label, cost, 2)[0].equal(expected[0])


# ============ the graph ============


def test_graph_equals_loops():
    x = blobs(2, 64, 96)
    g, k = saliency.graph(x), 24
    for i in range(2):
        label = g["label"][i]
        h, w = label.shape
        near, near8 = torch.zeros(k, k, dtype=torch.bool), torch.zeros(k, k, dtype=torch.bool)
        for y in range(h):
            for x_ in range(w):
                for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
                    if y + dy < h and 0 <= x_ + dx < w:
                        p, q = label[y, x_].item(), label[y + dy, x_ + dx].item()
                        if p != q:
                            near8[p, q] = near8[q, p] = True
                            if not (dy and dx):
                                near[p, q] = near[q, p] = True
        assert g["near"][i].equal(near)
        assert saliency.touching(g["label"], k, diagonal=True)[i].equal(near8)
        band = {label[y, x_].item() for y in range(h) for x_ in range(w) if min(y, x_, h - 1 - y, w - 1 - x_) < 5}
        assert set(g["band"][i].nonzero()[:, 0].tolist()) == band
        for r in label.unique().tolist():
            inside = label == r
            color = backbones.to_lab(x[i][:, inside].mean(1)[None] / 255)[0]
            assert torch.allclose(g["lab"][i, r], color, atol=1e-2)
            lab_mean = backbones.to_lab(x[i][:, inside][None] / 255)[0].mean(1)
            assert torch.allclose(g["lab_mean"][i, r], lab_mean, atol=1e-2)
            place = inside.nonzero().float().mean(0) / torch.tensor([h, w])
            assert torch.allclose(g["place"][i, r], place, atol=1e-4)
        assert g["used"][i].nonzero()[:, 0].tolist() == label.unique().tolist()


def test_corners_touch_only_with_diagonal():
    label = torch.tensor([[[0, 1], [2, 3]]])
    four = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]]).bool()
    assert saliency.touching(label, 4)[0].equal(four)
    assert saliency.touching(label, 4, diagonal=True)[0].equal(~torch.eye(4, dtype=torch.bool))


def test_contrast_figures_equal_loops():
    g, k = saliency.graph(blobs(1, 128, 128)), 64
    color, near = saliency.distances(g["lab"])[0], g["near"][0]
    first, second, edges = [], [], []
    for i in range(k):
        one = set(near[i].nonzero()[:, 0].tolist())
        two = one.union(*(near[j].nonzero()[:, 0].tolist() for j in one)) - {i}
        first.append(min(color[i, j].item() for j in one))
        second.append(min(color[i, j].item() for j in two))
        edges += [color[i, j].item() for j in one if j > i]
    top = sorted(edges)[-max(1, round(0.01 * len(edges))) :]
    expected = [sum(first) / k, sum(second) / k, sum(top) / len(top)]
    got = [t.item() for t in saliency.spread(saliency.distances(g["lab"]), g["near"], g["used"])]
    assert got == pytest.approx(expected, rel=1e-4)


def dijkstra(cost, edges, source):
    """Shortest distances from `source` with a heap, in double precision."""
    far, heap = [math.inf] * len(cost), [(0.0, source)]
    far[source] = 0.0
    while heap:
        d, i = heapq.heappop(heap)
        if d > far[i]:
            continue
        for j in edges[i].nonzero()[:, 0].tolist():
            if d + cost[i, j].item() < far[j]:
                far[j] = d + cost[i, j].item()
                heapq.heappush(heap, (far[j], j))
    return far


def random_graph(k=40, seed=0):
    """(cost, edges) of a long thin graph, a third of its costs 0, one node tied to none: [k, k]."""
    g = torch.Generator().manual_seed(seed)
    cost = torch.rand(k, k, generator=g) * (torch.rand(k, k, generator=g) > 0.35)
    edges = (torch.arange(k)[:, None] - torch.arange(k)).abs() <= 2
    edges[-1] = edges[:, -1] = False
    return torch.minimum(cost, cost.T), edges.fill_diagonal_(False)


def test_geodesic_equals_dijkstra():
    graphs = [random_graph(seed=s) for s in range(3)]
    d = saliency.geodesic(*(torch.stack(t) for t in zip(*graphs, strict=True)))
    for i, (cost, edges) in enumerate(graphs):
        expected = torch.tensor([dijkstra(cost, edges, j) for j in range(len(cost))])
        assert torch.allclose(d[i], expected, atol=1e-5) and expected.isinf().any()


# ============ the methods ============


def test_gs_equals_loops():
    g, k = saliency.graph(blobs(2, 128, 128, seed=3)), 64
    got = saliency.gs(g)
    for i in range(2):
        color, place = saliency.distances(g["lab"])[i], g["place"][i]
        band = g["band"][i].nonzero()[:, 0].tolist()
        clip = saliency.spread(saliency.distances(g["lab"]), g["near"], g["used"])[1][i].item()
        alike = []
        for p in band:
            unlike = sorted(color[p, q].item() / (1 + 3 * (place[p] - place[q]).norm().item()) for q in band if q != p)
            alike.append(sum(unlike[: round(k / 200 * 5)]) / round(k / 200 * 5))
        low, high = min(alike), max(alike)
        background = [p for p, a in zip(band, alike, strict=True) if high - low <= 1 or (a - low) / (high - low) <= 0.5]
        edges = g["near"][i].clone()
        for p in band:
            for q in band:
                edges[p, q] = p != q or edges[p, q]
        cost = (color - clip).clamp(min=0)
        paths = [dijkstra(cost, edges, p) for p in background]
        far = [min(path[r] for path in paths) for r in range(k)]
        top = sorted(far, reverse=True)[round(0.02 * k) - 1]
        assert len(background) < len(band)  # some of the border is left out here
        assert torch.allclose(got[i], torch.tensor([min(1, f / top) for f in far]), atol=1e-3)


def test_boundary_connectivity_of_known_layouts():
    n = 10  # a grid of n x n regions: region i belongs to row i // n
    rows, columns = torch.arange(n * n) // n, torch.arange(n * n) % n
    near = (rows[:, None] - rows).abs() + (columns[:, None] - columns).abs() == 1
    band = (rows == 0) | (rows == n - 1) | (columns == 0) | (columns == n - 1)

    def con(inside):
        color = (inside[:, None] != inside).float() * 100
        return saliency.boundary_connectivity(color[None], near[None], 0.0, 7.0, band[None])[0]

    whole = con(torch.zeros(n * n, dtype=torch.bool))
    assert torch.allclose(whole, torch.full_like(whole, (4 * n - 4) / n))  # border length over the root of the area
    middle = (rows >= 3) & (rows < 7) & (columns >= 3) & (columns < 7)
    assert (con(middle)[middle] == 0).all()
    corner = (rows < 4) & (columns < 4)
    assert torch.allclose(con(corner)[corner], torch.tensor(7 / 4))  # 4 + 4 - 1 of 16 regions
    d = torch.tensor([0.0, 7.0, 20.9, 21.1, math.inf])
    expected = torch.tensor([1, math.exp(-0.5), math.exp(-((20.9 / 7) ** 2) / 2), 0, 0])
    assert torch.allclose(saliency.weight(d, 7.0), expected)


def test_otsu_equals_loops():
    x = torch.rand(3, 200, generator=torch.Generator().manual_seed(0)).pow(3)
    x[1, :150] *= 0.1
    used = torch.ones(3, 200, dtype=torch.bool)
    used[2, 120:] = False
    got = saliency.otsu(x, used)[:, 0]
    for i in range(3):
        levels = [round(v * 255) for v in x[i][used[i]].double().tolist()]
        between = []
        for cut in range(256):
            low, high = [v for v in levels if v <= cut], [v for v in levels if v > cut]
            if low and high:
                mean = [sum(part) / len(part) for part in (low, high)]
                between.append(len(low) * len(high) * (mean[0] - mean[1]) ** 2)
            else:
                between.append(0)
        best = [cut for cut, v in enumerate(between) if v > max(between) * (1 - 1e-6)]
        assert got[i].item() == pytest.approx(sum(best) / len(best) / 255, abs=1e-4)


def test_rbd_equals_a_dense_solve_in_double_precision():
    g, k = saliency.graph(torch.cat([blobs(1, 128, 128, seed=5), disc(128, noise=9.0)[0][None].float()])), 64
    got, far_out = saliency.rbd(g), 0
    for i in range(2):
        color = saliency.distances(g["lab"])[i].double()
        place = torch.cdist(g["place"][i].double(), g["place"][i].double())
        near, band = g["near"][i], g["band"][i]
        m1, clip, mt = (t[i].item() for t in saliency.spread(saliency.distances(g["lab"]), g["near"], g["used"]))
        edges = (near | (band[:, None] & band)).fill_diagonal_(False)
        cost = (color - clip).clamp(min=0)
        d = torch.tensor([dijkstra(cost, edges, j) for j in range(k)], dtype=torch.double)

        def soft(d, sigma):
            return torch.exp(-(d**2) / (2 * sigma**2)) * (d <= 3 * sigma)

        w = soft(d, max(5, min(10, 3 * m1, mt / 10)))
        con = w[:, band].sum(1) / w.sum(1).sqrt()
        background = 1 - torch.exp(-(con**2) / 2)
        contrast = (color * soft(place, 0.4)) @ background
        contrast = (contrast - contrast.min()) / (contrast.max() - contrast.min())
        cut = saliency.otsu(contrast.float()[None], g["used"][i][None]).item()
        contrast[contrast < cut] = 0
        two = (near.double() @ near.double() + near > 0) | (band[:, None] & band)
        w = soft(color, max(1, min(3 * m1, 0.2 * mt, 20))) * two + 0.1 * near
        system = torch.diag(w.sum(1) + 5 * torch.where(con > 3, 1000.0, background) + contrast) - w
        s = torch.linalg.solve(system, contrast)
        s = (s - s.min()) / (s.max() - s.min())
        far_out += (con > 3).any().item()
        assert torch.allclose(got[i].double(), s, atol=2e-3)
    assert far_out  # the weight of 1000 was needed for one


def test_mc_equals_an_inverse_in_double_precision():
    odd = disc(128, radius=0.05, at=(0.43, 0.43))[0][None].float()  # a region like no other
    reweighted = frames = outliers = 0
    for image in (*blobs(3, 192, 192, seed=7).split(1), *blobs(1, 128, 128, seed=7).split(1), odd):
        g = saliency.graph(image)
        label, k = g["label"][0], g["used"].shape[1]
        near = saliency.touching(g["label"], k, diagonal=True)[0]
        tied = near.clone()
        for a, b in ((label[0], label[-1]), (label[:, 0], label[:, -1])):
            for p, q in zip(a.tolist(), b.tolist(), strict=True):
                tied[p, q] = tied[q, p] = True
        edges = ((tied.double() @ tied.double() + tied) > 0).fill_diagonal_(False)
        color = torch.cdist(g["lab_mean"][0].double(), g["lab_mean"][0].double())
        low, high = color[edges].min(), color[edges].max()
        w = (torch.exp(-10 * (color - low) / (high - low)) + 1e-5) * edges + torch.eye(k)
        ring = torch.zeros(k, dtype=torch.bool)
        ring[torch.cat([label[0], label[-1], label[:, 0], label[:, -1]])] = True
        inner, frame = (near & ring).any(1) & ~ring, (w * near)[ring][:, ~ring].sum().item() <= 13
        outlier = w.sum(1) < 1.1
        absorbs, stays = (inner if frame else ring) & ~outlier, ~(ring if frame else ring & ~ring) & ~outlier
        degree = w.sum(1)[stays]
        absorbed = w[stays][:, absorbs].sum(1)
        # The chain with its absorbing states: the expected number of steps until one is entered.
        inverse = torch.linalg.inv(torch.eye(len(degree)) - w[stays][:, stays] / (degree + absorbed)[:, None])
        part = inverse.sum(1)
        part = (part - part.min()) / (part.max() - part.min())
        bins = torch.tensor([min(10, int(10 * v) + 1) for v in part.tolist()])
        if torch.minimum(bins, 11 - bins).double().mean() >= 2:
            reweighted += 1
            part = inverse @ (degree.sum() / degree)
            part = (part - part.min()) / (part.max() - part.min())
        expected = torch.zeros(k, dtype=torch.double)
        expected[stays] = part
        expected[outlier] = (near[outlier] & (expected > 0.3)).any(1).double()
        assert torch.allclose(saliency.mc(g)[0].double(), expected, atol=2e-3)
        frames, outliers = frames + frame, outliers + outlier.sum().item()
    assert reweighted and outliers and 0 < frames < 5  # every branch was taken


def test_mc_drops_a_picture_frame():
    image, truth = disc(224, at=(0.5, 0.5))
    framed = image.clone()
    framed[:, :14], framed[:, -14:], framed[:, :, :14], framed[:, :, -14:] = 255, 255, 255, 255
    m = saliency.maps(torch.stack([image, framed]), "mc")
    assert m[1][truth].mean() > 0.8 and m[1][:8].max() < 0.05 and m[1][20:40].mean() < 0.2


# ============ maps ============


@pytest.mark.parametrize("method", saliency.METHODS)
def test_finds_a_disc_and_a_batch_is_its_images(method):
    found = [disc(), disc(noise=12.0, at=(0.6, 0.4)), disc(radius=0.15)]
    images, truths = (torch.stack(t) for t in zip(*found, strict=True))
    m = saliency.maps(images, method)
    assert m.shape == truths.shape and m.dtype == torch.float32 and m.min() >= 0 and m.max() <= 1
    r = score_saliency.score(m, truths)
    assert r["max_f"] > 0.9 and r["adaptive_f"] > 0.8 and r["mae"] < 0.1, r
    alone = torch.cat([saliency.maps(image[None], method) for image in images])
    assert torch.allclose(m, alone, atol=1e-3)
    assert torch.allclose(m, saliency.maps(images.float() / 255, method), atol=1e-3)  # floats in [0, 1] are the same
    assert saliency.maps(images, method, size=(20, 30)).shape == (3, 20, 30)


@pytest.mark.parametrize("method", saliency.METHODS)
def test_finds_drawn_objects(method):
    images, _, masks = shapes.draw_shapes(32, seed=5)
    m = saliency.maps(images, method)
    r = score_saliency.score(m, masks > 0)
    # By chance: a map that knows nothing has the objects' share of the image as its precision.
    p = (masks > 0).float().mean().item()
    chance = 1.3 * p / (0.3 * p + 1)
    assert r["max_f"] > chance + 0.25, (r, chance)


@pytest.mark.parametrize("method", saliency.METHODS)
def test_constant_gray_tiny_and_odd_images(method):
    constant = torch.full((2, 3, 40, 40), 0.3)
    constant[1, 0] = 0.9
    assert (saliency.maps(constant, method) == 0).all()
    for height, width in ((32, 32), (37, 91), (300, 400), (5, 3)):
        gray = blobs(1, height, width)[:, :1].expand(-1, 3, -1, -1).to(torch.uint8)
        m = saliency.maps(gray, method)
        assert m.shape == (1, height, width) and m.isfinite().all() and m.max() > 0.2, (height, width)
    half = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    half[..., 32:] = 255  # two colors, both at the border
    assert saliency.maps(half, method).isfinite().all()


# ============ from a network trained with labels ============


def classifier(path, classes=3):
    """A file like those of downstream.finetune --save: the bright channel of an image is its class."""
    backbone = backbones.build("resnet10_16", 32)
    about = {"kind": "classifier", "arch": "resnet10_16", "state_dict": backbone.state_dict(),
             "head": nn.Linear(backbone.dim, classes).state_dict(),
             "preprocess": {"mean": data.MEAN, "std": data.STD, "size": 32, "interpolation": "bilinear"}}  # fmt: skip
    torch.save(about, path)
    return str(path)


def test_cam_equals_loops(tmp_path):
    torch.manual_seed(0)
    net, x = reconstruct.open_classifier(classifier(tmp_path / "c.pt")), torch.rand(3, 3, 64, 64) * 2 - 1
    x[1, 0], x[2, 1:] = -1, -1
    net.net[1].bias -= net(x).mean(0)  # so that not all are of one class
    got = saliency.cam(net, x)
    seen = saliency.F.interpolate((x / 2 + 0.5 - net.mean) / net.std, (32, 32), mode="bilinear", antialias=True)
    features = net.net[0].stages(seen)[-1]
    y, head = net(x).argmax(1), net.net[1]
    assert len(set(y.tolist())) > 1
    for i in range(3):
        expected = sum(head.weight[y[i], c] * features[i, c] for c in range(features.shape[1]))
        assert torch.allclose(got[i], saliency.resized(expected[None, None], 64, 64)[0, 0], atol=1e-4)
        # The mean of a map and the bias make the score.
        score = expected.mean() + head.bias[y[i]]
        assert score.item() == pytest.approx(net(x)[i, y[i]].item(), abs=1e-4)


class Spot(nn.Module):
    """Two scores; the larger one depends on the pixels by how near they are to the middle of the disc."""

    def forward(self, x):
        y, x_ = torch.meshgrid(*(torch.arange(n) / n for n in x.shape[2:]), indexing="ij")
        weight = torch.exp(-20 * ((y - 0.45).square() + (x_ - 0.55).square()).sqrt())
        inside = (x * weight).sum((1, 2, 3))
        return torch.stack([inside - 1e4, inside], 1)


def test_gradient_grows_what_the_network_looks_at():
    image, truth = disc()
    m = saliency.maps(image[None], "gradient", classifier=Spot())
    assert score_saliency.score(m, truth[None])["adaptive_f"] > 0.9  # the whole disc, not only its middle


# ============ score ============


def test_score_equals_loops_and_known_values():
    g = torch.Generator().manual_seed(0)
    ms = [torch.rand(h, w, generator=g) for h, w in ((20, 30), (25, 25), (10, 40))]
    truths = [torch.rand(m.shape, generator=g) < m for m in ms]
    p, r, error, adaptive = [0.0] * 256, [0.0] * 256, 0.0, [0.0, 0.0]
    for m, truth in zip(ms, truths, strict=True):
        m = (m - m.min()) / (m.max() - m.min())
        level = (m * 255).round()
        for t in range(256):
            found = level >= t
            p[t] += (found & truth).sum().item() / max(1, found.sum().item()) / 3
            r[t] += (found & truth).sum().item() / truth.sum().item() / 3
        found = m >= min(2 * m.mean().item(), 1)
        adaptive[0] += (found & truth).sum().item() / found.sum().item() / 3
        adaptive[1] += (found & truth).sum().item() / truth.sum().item() / 3
        error += (m - truth.float()).abs().mean().item() / 3
    f = [1.3 * a * b / (0.3 * a + b) if a + b else 0.0 for a, b in zip(p, r, strict=True)]
    got = score_saliency.score(ms, truths)
    a, b = adaptive
    expected = {"max_f": max(f), "mean_f": sum(f) / 256, "adaptive_f": 1.3 * a * b / (0.3 * a + b), "mae": error}
    assert got == pytest.approx(expected, abs=1e-5)

    truth = torch.zeros(10, 10, dtype=torch.bool)
    truth[:5] = True
    perfect = score_saliency.score([truth.float()], [truth])
    assert perfect["max_f"] == pytest.approx(1) and perfect["mae"] == 0 and perfect["adaptive_f"] == pytest.approx(1)
    everywhere = score_saliency.score([torch.zeros(10, 10)], [truth])  # a constant map: P 1/2, R 1 at threshold 0
    assert everywhere["max_f"] == pytest.approx(1.3 * 0.5 / 1.15) and everywhere["mae"] == pytest.approx(0.5)


# ============ sets and files ============


def here(capsys, *argv, code=0):
    """The command in this process, which saves the seconds of a start: (stdout, stderr)."""
    try:
        command, argv = (score_saliency, argv[1:]) if argv[0] == "score" else (saliency, argv)
        command.main([str(a) for a in argv])
        ended = 0
    except SystemExit as error:
        ended = error.code
    out, err = capsys.readouterr()
    assert ended == code, out + err
    return out, err


def tree(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_masks_are_written_resumed_and_refused(tmp_path, capsys):
    images = write_images(tmp_path / "images" / "train", 8)
    masks = tmp_path / "masks"
    broken = images / "class1" / "003.jpg"
    broken.write_bytes(b"no image")
    command = (tmp_path / "images", "--out", masks, "--size", 24, "--workers", 1, "--device", "cpu")
    out, err = run("saliency.py", *command, "--batch-size", 4)
    names = {f"class{i % 2}/{i:03d}.png" for i in range(8) if i != 3}
    assert tree(masks) == names | {"saliency.json"}
    assert "7 masks" in out and "1 images do not decode" in out and str(broken) in err and "images/s" in out
    assert json.loads((masks / "saliency.json").read_text())["method"] == "rbd"
    mask = decode_image(read_file(str(masks / "class0/004.png")))
    assert mask.shape == (1, 24, 24) and mask.dtype == torch.uint8

    # The same command goes on: what is there stays as it is, what is missing comes.
    was = {name: (masks / name).stat().st_mtime_ns for name in names}
    gone = (masks / "class1/001.png").read_bytes()
    (masks / "class1/001.png").unlink()
    write_jpeg(torch.randint(0, 256, (3, 30, 50), dtype=torch.uint8), str(broken))
    out, _ = here(capsys, *command)
    assert "2 masks" in out and tree(masks) == names | {"class1/003.png", "saliency.json"}
    assert (masks / "class1/001.png").read_bytes() == gone
    assert all((masks / n).stat().st_mtime_ns == t for n, t in was.items() if n != "class1/001.png")
    out, _ = here(capsys, *command)
    assert "all 8" in out

    _, err = here(capsys, *command, "--method", "gs", code=2)
    assert "method rbd -> gs" in err and "Traceback" not in err


def test_stopped_by_a_signal_it_goes_on(tmp_path, capsys, monkeypatch):
    images, masks, put, calls = write_images(tmp_path / "images", 8, size=10), tmp_path / "masks", runs.put, []

    def third(path, fill, **how):
        put(path, fill, **how)
        calls.append(path)
        if len(calls) == 4:  # the first is the note
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runs, "put", third)
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    handlers = [signal.getsignal(number) for number in numbers]
    command = (images, "--out", masks, "--workers", 0, "--device", "cpu", "--batch-size", 1, "--size", 16)
    try:
        _, err = here(capsys, *command, code=85)
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
    assert "stopped by SIGTERM; the same command goes on" in err and not list(masks.rglob("*.tmp"))
    assert len(list(masks.rglob("0*.png"))) == 3
    out, _ = here(capsys, *command)
    assert out.startswith("5 masks") and len(list(masks.rglob("0*.png"))) == 8


def test_what_cannot_be_written_is_a_sentence_and_what_is_there_stays(tmp_path, capsys):
    images, masks = write_images(tmp_path / "images", 4, size=10), tmp_path / "masks"
    command = (images, "--out", masks, "--workers", 0, "--device", "cpu", "--size", 16)
    for name in ("saliency.json", "class1/001.png"):
        (masks / name).parent.mkdir(parents=True, exist_ok=True)
        (masks / f"{name}.tmp").symlink_to("/dev/full")
        _, err = here(capsys, *command, code=2)
        assert f"could not write {masks / name} ([Errno 28] No space left on device)" in err
    here(capsys, *command)
    assert tree(masks) == {"saliency.json", *(f"class{i % 2}/{i:03d}.png" for i in range(4))}
    (tmp_path / "p.png.tmp").symlink_to("/dev/full")
    score = ("score", images, masks, "--device", "cpu", "--method", "gs", "--picture")
    assert "could not write" in here(capsys, *score, tmp_path / "p.png", code=2)[1]
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "class0").touch()
    for out in (tmp_path / "file", tmp_path / "other"):
        assert f"error: {out}" in here(capsys, *command[:2], out, *command[3:], code=2)[1]


def test_what_is_no_image_has_no_mask(tmp_path, capsys):
    """A bomb would take all memory."""
    images, masks = write_images(tmp_path / "images", 4, classes=1, size=10) / "class0", tmp_path / "masks"
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (images / "bomb.png").write_bytes(bomb)
    out, err = here(capsys, images, "--out", masks, "--workers", 0, "--device", "cpu", "--size", 16)
    assert tree(masks) == {"000.png", "001.png", "002.png", "003.png", "saliency.json"}
    assert "4 masks" in out and "bomb.png" in err


def test_masks_of_a_set_in_memory_and_of_a_classifier(tmp_path, capsys):
    masks = tmp_path / "masks"
    command = ("shapes", "--limit", 5, "--device", "cpu", "--workers", 0)
    here(capsys, *command, "--method", "cam", "--classifier", classifier(tmp_path / "c.pt"), "--out", masks)
    keys = {sets.load("shapes", limit=5).key(i) for i in range(5)}
    assert tree(masks) == {f"{k}.png" for k in keys} | {"saliency.json"}


def test_bad_input(tmp_path, capsys):
    folder = write_images(tmp_path / "images", 4)
    for flags, words in (
        ([tmp_path / "none", "--out", tmp_path / "m"], "neither a named set nor a folder"),
        ([folder, "--out", tmp_path / "m", "--method", "abc"], "invalid choice"),
        ([folder, "--out", tmp_path / "m", "--method", "cam"], "--classifier"),
        ([folder, "--out", tmp_path / "m", "--classifier", "x.pt"], "--classifier"),
        (["score", tmp_path / "none", folder], "no such folder"),
        (["score", folder, folder, "--method", "gradient"], "--classifier"),
    ):
        _, err = here(capsys, *flags, code=2)
        assert words in err and "Traceback" not in err, err
    write_images(tmp_path / "twice", 4)
    (tmp_path / "twice/class0/000.png").write_bytes((tmp_path / "twice/class0/000.jpg").read_bytes())
    _, err = here(capsys, tmp_path / "twice", "--out", tmp_path / "m", code=2)
    assert "class0/000" in err


def test_score_command(tmp_path, capsys):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i in range(3):
        image, truth = disc(100, at=(0.4 + 0.1 * i, 0.5))
        write_jpeg(image, str(tmp_path / f"images/{i}.jpg"), 95)
        write_png(truth[None].to(torch.uint8) * 255, str(tmp_path / f"masks/{i}.png"))
    command = ("score", tmp_path / "images", tmp_path / "masks", "--device", "cpu")
    out, _ = here(capsys, *command, "--picture", tmp_path / "p.png", "--method", "gs", "rbd")
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line[:3] in ("rbd", "gs ")}
    assert list(rows) == ["gs", "rbd"] and all(float(r[0]) > 0.9 and float(r[3]) < 0.1 for r in rows.values())
    assert decode_image(read_file(str(tmp_path / "p.png"))).shape[0] == 3

    here(capsys, tmp_path / "images", "--out", tmp_path / "maps", "--workers", 0, "--device", "cpu")
    out, _ = here(capsys, *command, "--maps", tmp_path / "maps")
    saved = next(line.split()[1:] for line in out.splitlines() if line.startswith("saved"))
    assert float(saved[0]) == pytest.approx(float(rows["rbd"][0]), abs=0.05)

    whole = (tmp_path / "masks/1.png").read_bytes()
    (tmp_path / "masks/1.png").write_bytes(b"no image")
    assert f"{tmp_path}/masks/1.png" in here(capsys, *command, code=2)[1]
    (tmp_path / "masks/1.png").unlink()
    sets.list_folder.cache_clear()  # this process has seen the folder
    _, err = here(capsys, *command, code=2)
    assert "1 of 3 images" in err and ": 1\n" in err
    (tmp_path / "masks/1.png").write_bytes(whole)
    (tmp_path / "images/1.jpg").write_bytes(b"no image")
    sets.list_folder.cache_clear()
    assert f"{tmp_path}/images/1.jpg" in here(capsys, *command, code=2)[1]
