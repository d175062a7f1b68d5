"""Shapes: ten classes of patterned objects on soft backgrounds, drawn by code, with the exact mask of every object.

The data set that runs anywhere. What varies besides the class is what augmentations remove: place and scale (crops),
color and light (jitter); the colors and the background tell nothing about the class. Raw pixels and random networks
do badly on it, and a network that ignores color, place and scale does well.
"""

import math

import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes

CLASSES = ("disc", "square", "triangle", "star", "cross", "ring", "heart", "crescent", "flower", "pill")
TURN = 2 * math.pi


# fmt: off
def star(r: Tensor, a: Tensor, tips: int, notch: float) -> Tensor:
    """Signed distance to a star with its tips at radius 1 and its notches at `notch` (cos(pi / tips): a polygon)."""
    a = ((a + math.pi / tips) % (TURN / tips) - math.pi / tips).abs()  # fold the plane into one half of one tip
    nx, ny = notch * math.cos(math.pi / tips), notch * math.sin(math.pi / tips)  # its edge runs from (1, 0) to here
    return ((r * a.cos() - 1) * ny + r * a.sin() * (1 - nx)) / math.hypot(ny, 1 - nx)


def outline(k: int, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to the edge of class k, negative inside; y points down and the object fills the unit disc."""
    r, a, ax, ay = torch.hypot(x, y), torch.atan2(x, -y), x.abs(), y.abs()
    if k == 0: return r - 0.85
    if k == 1: return torch.maximum(ax, ay) - 0.75
    if k == 2: return star(r, a, tips=3, notch=0.5)
    if k == 3: return star(r, a, tips=5, notch=0.45)
    if k == 4: return torch.maximum(torch.maximum(ax, ay) - 0.9, torch.minimum(ax, ay) - 0.32)
    if k == 5: return (r - 0.62).abs() - 0.28
    if k == 6: return torch.minimum((ax + (y - 0.1).abs() - 0.8) / 2**0.5,  # a diamond with two discs on its shoulders
                                    torch.hypot(ax - 0.4, y + 0.3) - 0.4 * 2**0.5)
    if k == 7: return torch.maximum(r - 0.95, 0.72 - torch.hypot(x - 0.5, y))
    if k == 8: return 0.7 * (r - 0.72 - 0.22 * (6 * a).cos())  # not quite a distance: 0.7 evens out the edge's slope
    return torch.hypot((ax - 0.5).clamp(min=0), y) - 0.42


def pattern(k: int, x: Tensor, y: Tensor, phase: Tensor) -> Tensor:
    """The surface of class k in [-1, 1]: its sign says which of the object's two colors a point takes."""
    r, a = torch.hypot(x, y), torch.atan2(y, x)
    wave = lambda t, length: (TURN * t / length + phase).sin()
    if k == 0: return wave(x, 0.9)  # broad stripes
    if k == 1: return wave(x, 0.75) * wave(y, 0.75)  # checks
    if k == 2: return wave(y, 0.45)  # narrow stripes
    if k == 3: return wave(r, 0.6)  # circles
    if k == 4: return torch.maximum(wave(x, 0.6), wave(y, 0.6)) - 0.6  # a lattice
    if k == 5: return (6 * a + phase).sin()  # spokes
    if k == 6: return (wave(x, 0.5) + wave(y, 0.5)) / 2 - 0.3  # dots
    if k == 7: return wave(x, 3.0)  # one color, or two halves
    if k == 8: return (2 * a + 6 * r + phase).sin()  # a spiral
    return wave(y + 0.25 * (2 * (x / 0.7 % 1) - 1).abs(), 0.5)  # zigzags


# fmt: on
def color(h: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """HSV to RGB, [N] each to [N, 3, 1, 1]; with the hue in sixths of a turn, one clamp a channel does all cases."""
    rgb = torch.stack([((h + o) % 6 - 3).abs().sub(1).clamp(0, 1) for o in (0, 4, 2)], dim=1)
    return (v[:, None] * (1 - s[:, None] * (1 - rgb)))[..., None, None]


def draw_shapes(n: int, size: int = 32, seed: int = 0, hard: bool = False, natural: bool = False):
    """The first `n` images of the endless list `seed`: uint8 [N, 3, H, W], labels int64 [N], masks uint8 [N, H, W] (1:
    object).

    A class is an outline with its own surface pattern; all else is drawn alike for every class. The background is soft,
    as a network trained without labels learns first whatever varies most; `hard`: it has the pattern of a random class.
    Pose and color of an object are random; `natural`: they belong to the class, as those of things in photographs do,
    up to 15 degrees and a twelfth of the color wheel, so that rotations and colors can be predicted.
    """
    # One row of numbers per image: an image depends on the seed and its place in the list, not on n.
    rows = torch.rand(n, 32, generator=torch.Generator().manual_seed(seed))
    images, labels = torch.empty(n, 3, size, size, dtype=torch.uint8), (rows[:, 0] * 10).long()
    masks = torch.empty(n, size, size, dtype=torch.uint8)
    grid = (torch.arange(size) + 0.5) / size * 2 - 1
    gx, gy = grid[None, None, :], grid[None, :, None]
    for part in torch.arange(n).split(1000):  # in chunks: float canvases are large
        columns = iter(rows[part, 1:].unbind(1))
        u = lambda low, high: low + (high - low) * next(columns)

        # Objects are light with dark marks and the ground lies between: gray pictures keep the outline and the pattern.
        hue = 0.6 * labels[part] + u(-0.5, 0.5) if natural else u(0, 6)
        light = color(hue, u(0.3, 0.7), u(0.8, 1))
        dark = color(hue + (u(2.5, 3.5) if natural else u(1, 5)), u(0.5, 1), u(0.15, 0.35))
        ground = color(u(0, 6), u(0.2, 0.5), u(0.45, 0.65))
        other = (ground + torch.stack([u(-0.4, 0.4) for _ in range(3)], 1)[..., None, None]).clamp(0, 1)

        def frame(scale: Tensor, free: Tensor, still: bool = False):
            """The pixels' coordinates in a frame of its own for each image: turned, shrunk, moved within `free`."""
            px, py = (gx - (free * u(-1, 1))[:, None, None]), (gy - (free * u(-1, 1))[:, None, None])
            turn = u(-TURN / 24, TURN / 24) if still else u(0, TURN)
            c, s = (turn.cos() / scale)[:, None, None], (turn.sin() / scale)[:, None, None]
            return c * px + s * py, c * py - s * px

        def paint(k: int, i: Tensor, x: Tensor, y: Tensor, phase: Tensor, a: Tensor, b: Tensor) -> Tensor:
            mix = (0.5 + size / 13 * pattern(k, x, y, phase[i, None, None])).clamp(0, 1)[:, None]  # edges of one pixel
            return a[i] + (b[i] - a[i]) * mix

        scale = u(0.55, 0.85)
        x, y = frame(scale, free=1.2 - 0.8 * scale, still=natural)
        phase = u(0, TURN)
        bx, by = frame(u(0.6, 0.87), free=torch.ones(len(part)))
        canvas = ground + (other - ground) * (0.5 + 0.35 * bx).clamp(0, 1)[:, None]  # a soft slope between two tints
        if hard:
            kinds, shift = (u(0, 10)).long(), u(0, TURN)
            for k in range(10):
                i = (kinds == k).nonzero()[:, 0]
                canvas[i] = paint(k, i, bx[i], by[i], shift, canvas * 0.75, canvas * 1.25)
        for k in range(10):
            i = (labels[part] == k).nonzero()[:, 0]
            distance = outline(k, x[i], y[i]) * (scale[i] * size / 2)[:, None, None]  # in pixels
            cover = (0.5 - distance).clamp(0, 1)[:, None]
            canvas[i] += cover * (paint(k, i, x[i], y[i], phase, light, dark) - canvas[i])
            masks[part[i]] = (distance < 0).byte()
        images[part] = (canvas * 255).round().clamp(0, 255).to(torch.uint8)
    return images, labels, masks


def draw_scenes(n: int, size: int = 64, seed: int = 0, most: int = 3, hard: bool = False):
    """The first `n` scenes of the endless list `seed`: one to `most` objects of `draw_shapes` (32 px, cut out by their
    masks) on one soft background, later ones in front. For detection and segmentation.

    Returns images uint8 [N, 3, H, W], a list of N dicts of what is visible, {"boxes" [k, 4] (x1, y1, x2, y2 in px,
    x2 and y2 exclusive), "labels" int64 [k] (0 to 9), "masks" bool [k, H, W]}, and the semantic map uint8 [N, H, W]
    (0: background, class + 1). An object of which less than a quarter is visible is in the map alone.
    """
    rows = torch.rand(n, 1 + 2 * most + 12, generator=torch.Generator().manual_seed(seed + 2**32))
    objects, labels, cutouts = draw_shapes(most * n, 32, seed, hard)
    count, (px, py) = (rows[:, 0] * most).long() + 1, (rows[:, 1 : 1 + 2 * most] * (size - 31)).long().split(most, 1)
    u = iter(rows[:, 1 + 2 * most :].unbind(1))
    ground = color(6 * next(u), 0.2 + 0.3 * next(u), 0.45 + 0.2 * next(u))
    other = (ground + 0.8 * torch.stack([next(u) for _ in range(3)], 1)[..., None, None] - 0.4).clamp(0, 1)
    grid, turn = (torch.arange(size) + 0.5) / size * 2 - 1, TURN * next(u)[:, None, None]
    slope = (turn.cos() * grid[None, None] + turn.sin() * grid[None, :, None])[:, None]
    images = ((ground + (other - ground) * (0.5 + 0.35 * slope).clamp(0, 1)) * 255).round().to(torch.uint8)
    semantic, masks = torch.zeros(n, size, size, dtype=torch.uint8), torch.zeros(n, most, size, size, dtype=torch.bool)
    scene, whole = torch.arange(n)[:, None, None], torch.zeros(n, most)
    for j in range(most):
        y, x = torch.arange(size) - py[:, j, None], torch.arange(size) - px[:, j, None]  # in the object's own pixels
        place = scene * most + j, y.clamp(0, 31)[:, :, None], x.clamp(0, 31)[:, None]
        inside = ((y >= 0) & (y < 32))[:, :, None] & ((x >= 0) & (x < 32))[:, None] & (j < count)[:, None, None]
        mask = (cutouts[place] > 0) & inside  # [N, H, W]
        images = torch.where(mask[:, None], objects.movedim(1, -1)[place].movedim(-1, 1), images)
        semantic[mask] = (labels[j::most, None, None].expand(n, size, size)[mask] + 1).byte()
        masks[:, :j] &= ~mask[:, None]
        masks[:, j], whole[:, j] = mask, mask.sum((1, 2)).float()
    seen, targets = masks.sum((2, 3)) > whole / 4, []
    for i in range(n):
        found = masks[i, seen[i]]
        boxes = masks_to_boxes(found) + torch.tensor([0, 0, 1, 1])
        targets.append({"boxes": boxes, "labels": labels[i * most : (i + 1) * most][seen[i]], "masks": found})
    return images, targets, semantic
