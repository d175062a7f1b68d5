"""Data: views of images for training, plain images for the probes; the sets themselves are in sets.py.

    python data.py show shapes --method cmc     a PNG of images and of what a method's network sees of them
    python data.py check DIR                    lists the images that do not decode

Two paths, one augmentation code. Small sets live in memory as one uint8 tensor on the training device and a batch is
an index: no workers, no Python per image. Folders are decoded by workers, which also cut the random crops (uint8, at
the output size); everything after the crop runs batched on the device in both paths.

Randomness comes from generators seeded by a key such as (seed, epoch, step, rank): nothing needs saving, a run resumes
exactly at any step, and no two ranks or views see the same numbers. The parameters are drawn on the CPU, one per image,
and copied to the device, so that no step waits for the device to learn how many images an operation concerns.
"""

import argparse
import collections
import importlib.util
import math
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2 import functional as tvf
from torchvision.utils import make_grid
from tqdm import tqdm

import sets
from common import at_least, fail
from sets import generator

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet; every set uses them unless a recipe says not
HALF = (0.5, 0.5, 0.5)  # as mean and std they take [0, 1] to [-1, 1]


# ============ geometry: random crops and flips ============


def sample_boxes(n, height, width, scale, ratio, g):
    """`n` crops (top, left, height, width) [n, 4], distributed as torchvision's RandomResizedCrop: area U(scale) of the
    image, log-uniform aspect ratio (None: the image's own, so that the resize squashes it; "square": 1, and the area is a
    share of the largest square's, so that it always fits); of ten tries the first that fits, else the largest central crop
    of allowed ratio."""
    whole = min(height, width) ** 2 if ratio == "square" else height * width
    ratio = (1.0, 1.0) if ratio == "square" else ratio or (width / height, width / height)
    area = whole * (scale[0] + (scale[1] - scale[0]) * torch.rand(n, 10, generator=g))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * torch.rand(n, 10, generator=g))
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)  # the first True
    w, h = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0]
    place = torch.rand(n, 2, generator=g)
    top, left = (place[:, 0] * (height - h + 1)).floor(), (place[:, 1] * (width - w + 1)).floor()
    central_w = width if width / height <= ratio[1] else round(height * ratio[1])
    central_h = height if width / height >= ratio[0] else round(width / ratio[0])
    central = torch.tensor([(height - central_h) // 2, (width - central_w) // 2, central_h, central_w]).float()
    return torch.where(fits.any(1, keepdim=True), torch.stack([top, left, h, w], 1), central)


def resize_weights(start, length, inputs, outputs, interpolation):
    """Weights [B, outputs, inputs] that resize `length` pixels from `start` on to `outputs` pixels, antialiased: the
    kernel is stretched by the reduction and cut off at the crop's edge, as in torchvision's resized_crop."""
    reduction = (length / outputs)[:, None, None]
    centre = start[:, None, None] + (torch.arange(outputs, device=start.device)[:, None] + 0.5) * reduction
    pixel = torch.arange(inputs, device=start.device) + 0.5  # [inputs]
    d = ((pixel - centre) / reduction.clamp(min=1)).abs()  # [B, outputs, inputs]
    q, p = (1 - d).clamp_(min=0), (2 - d).clamp_(min=0)
    # Bicubic with a = -0.5: p^2 (p - 1) / 2 is its outer piece, and the second term what the inner one has on top.
    weight = q if interpolation == "bilinear" else 0.5 * p * p * (p - 1) + q * q * (1 - 2 * q)
    end = (start + length)[:, None, None]
    weight = weight * ((pixel > start[:, None, None]) & (pixel < end))
    return weight / weight.sum(-1, keepdim=True)


def crop_resize(images, boxes, flip, size, interpolation):
    """Crops of a batch in memory: uint8 [B, C, H, W], boxes [B, 4], flip [B] bool -> float [B, C, size, size] in [0, 1].

    A crop and resize is linear and separable, so it is two batched matrix products, exact for reduction and
    enlargement alike; the flip reverses the rows of one matrix and costs nothing.
    """
    (b, c, height, width), device = images.shape, images.device
    boxes, flip = boxes.to(device, non_blocking=True), flip.to(device, non_blocking=True)
    down = resize_weights(boxes[:, 0], boxes[:, 2], height, size, interpolation)  # [B, size, H]
    across = resize_weights(boxes[:, 1], boxes[:, 3], width, size, interpolation)  # [B, size, W]
    across = torch.where(flip[:, None, None], across.flip(1), across) / 255
    x = torch.bmm(images.reshape(b, c * height, width).float(), across.transpose(1, 2)).view(b, c, height, size)
    x = torch.matmul(down[:, None], x)  # [B, C, size, size]
    return x.clamp_(0, 1) if interpolation == "bicubic" else x  # bicubic overshoots at edges


def random_crops(images, view, g):
    """Random crops and flips of a batch in memory, by the numbers of `view`."""
    n, _, height, width = images.shape
    boxes = sample_boxes(n, height, width, view["scale"], view["ratio"], g)
    flip = torch.rand(n, generator=g) < view["flip"]
    return crop_resize(images, boxes, flip, view["size"], view["interpolation"])


def random_crop(image, view, g):
    """The same for one image of a folder, in a worker: uint8 [C, H, W] -> uint8 [C, size, size]."""
    top, left, h, w = sample_boxes(1, *image.shape[1:], view["scale"], view["ratio"], g)[0].int().tolist()
    mode, size = tvf.InterpolationMode(view["interpolation"]), [view["size"], view["size"]]
    crop = tvf.resized_crop(image, top, left, h, w, size, mode, antialias=True)
    return crop.flip(-1) if torch.rand((), generator=g) < view["flip"] else crop


def fit(image, size, interpolation="bilinear"):
    """An image [..., H, W] as a network sees it in evaluation: an image of the right size as it is; others with the
    short side at 256/224 of `size` (below 64 px at `size`) and the centre cut out."""
    if tuple(image.shape[-2:]) == (size, size):
        return image
    short = size if size < 64 else round(size * 256 / 224)
    image = tvf.resize(image, [short], tvf.InterpolationMode(interpolation), antialias=True)
    return tvf.center_crop(image, [size, size])


# ============ colour: operations on batches in [0, 1], one parameter per image ============
# Each equals torchvision's operation of that name on a float image (tests/test_data.py compares them).


def grey(x):
    """[B, 3, H, W] -> luma [B, 1, H, W] (ITU-R 601)."""
    return (0.2989 * x[:, 0:1]).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:3], alpha=0.114)


def brightness(x, f):
    return (x * f).clamp_(0, 1)


def contrast(x, f):
    return (x * f).add_((1 - f) * grey(x).mean((1, 2, 3), keepdim=True)).clamp_(0, 1)


def saturation(x, f):
    return (x * f).add_((1 - f) * grey(x)).clamp_(0, 1)


def hue(x, shift):
    """Turn the hue by `shift` (in turns) without going through HSV and back: with V = max, C = max - min and the hue h
    in sixths of a turn, a channel is V - C + C clamp(ramp, 0, 1), the ramps being |h - 3| - 1, 2 - |h - 2| and
    2 - |h - 4| for R, G, B."""
    r, g, b = x.split(1, 1)
    v = x.amax(1, keepdim=True)
    c = v - x.amin(1, keepdim=True)
    # Which channel is largest is a factor of 0 or 1: torch.where takes several times as long on a CPU.
    h = torch.lerp(2 * c + b - r, 4 * c + r - g, (v - g).sign_())
    h = torch.lerp(g - b, h, (v - r).sign_()).div_(c.clamp(min=1e-8))
    h = h.add_(6 * shift).remainder_(6)  # [B, 1, H, W]
    ramp = torch.cat([(h - 3).abs_().sub_(1), 2 - (h - 2).abs_(), 2 - (h - 4).abs_()], 1).clamp_(0, 1)
    return ramp.mul_(c).add_(v - c)


JITTER = (brightness, contrast, saturation, hue)


def jitter(x, factors, order):
    """Colour jitter in place. factors [B, 4]: of brightness, contrast, saturation, hue. order [B, 4], on the CPU: which
    operation an image meets first, second, third, fourth; 4 stands for none."""
    counts = [torch.bincount(order[:, slot], minlength=5).tolist() for slot in range(4)]
    rows = order.argsort(0).to(x.device, non_blocking=True)  # [B, 4]: in each slot the images grouped by operation
    factors = factors.to(x.device, non_blocking=True)
    for slot in range(4):
        for number, group in enumerate(rows[:, slot].split(counts[slot])[:4]):
            if len(group):
                x[group] = JITTER[number](x.index_select(0, group), factors[group, number].view(-1, 1, 1, 1))
    return x


def blur(x, sigma, size):
    """Gaussian blur, sigma [B] in pixels, kernel of `size` pixels, reflected at the border (as torchvision's)."""
    (b, c, h, w), half = x.shape, size // 2
    kernel = torch.exp(-0.5 * (torch.arange(-half, half + 1, device=x.device) / sigma[:, None]) ** 2)  # [B, size]
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)  # [B * 3, size]
    x = F.pad(x.reshape(1, b * c, h, w), (half, half, half, half), mode="reflect")
    x = F.conv2d(x, kernel[:, None, None, :], groups=b * c)
    return F.conv2d(x, kernel[:, None, :, None], groups=b * c).view(b, c, h, w)


def solarize(x):
    return torch.minimum(x, 1 - x)


def normalise(x, mean=MEAN, std=STD):
    mean, std = (torch.tensor(t).to(x.device, non_blocking=True).view(3, 1, 1) for t in (mean, std))
    return (x - mean).div_(std)


def standardise(x):
    """Each image [B, C, H, W] to mean 0 and standard deviation 1 over all its pixels and channels; the deviation counts as
    1 / sqrt(C H W) at least (TensorFlow's per_image_standardization)."""
    x = x - x.mean((1, 2, 3), keepdim=True)
    return x / x.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=x[0].numel() ** -0.5)


def uniform(n, low, high, g):
    return low + (high - low) * torch.rand(n, generator=g)


def chosen(n, p, g, device):
    """The images, each with probability `p`, that an operation concerns; known to the host without asking the device."""
    return (torch.rand(n, generator=g) < p).nonzero()[:, 0].to(device, non_blocking=True)


def masks_at(alpha, size, cut=None):
    """Masks or saliency maps uint8 [N, h, w] at another `size`; with `cut` (uint8 [N]) hard: 255 where a map reaches its cut,
    else 0. The map is enlarged first, as an edge that is enlarged is a ramp."""
    alpha = tvf.resize(alpha, list(size), antialias=True)
    return alpha if cut is None else (alpha >= cut[:, None, None]).to(torch.uint8) * 255


BLENDS = {"none": 0.0, "gaussian": 1.0, "mix": 0.5}  # how many masks are blurred before the paste


def copy_paste(x, alpha, view, grounds, g):
    """Some objects on other grounds, I <- M I + (1 - M) B (Distilling Localization, sec. 5.2), x [B, 3, S, S] in place.

    alpha [B, 1, S, S] is M in [0, 1]; the others, and images whose M is 1 everywhere, stay as they are. B is a level of
    grey, drawn for each image, or one of `grounds` (uint8 [G, 3, H, W]) in a crop and flip of its own. Image and mask have
    been cut alike before, which costs less than after; with grey it is the same up to the interpolation along the edge.
    """
    rows = chosen(len(x), view["paste"], g, x.device)
    if grounds is None:
        ground = torch.randint(256, (len(rows), 1, 1, 1), generator=g).to(x.device, non_blocking=True) / 255
    else:
        pick = torch.randint(len(grounds), (len(rows),), generator=g).to(grounds.device, non_blocking=True)
        ground = random_crops(grounds[pick], view, g)
    alpha = alpha[rows]
    if BLENDS[view["blend"]]:
        soft = chosen(len(rows), BLENDS[view["blend"]], g, x.device)
        if len(soft):  # 5 taps, sigma 2: the kernel of the cut-and-paste generator that the paper cites (its ref. 14)
            alpha[soft] = blur(alpha[soft], torch.full((len(soft),), 2.0, device=x.device), 5)
    x[rows] = torch.lerp(ground, x[rows], alpha)
    return x


def augment(x, view, g, grounds=None):
    """The part of a view after the crop: float [B, 3, S, S] in [0, 1] (overwritten) -> normalised. With copy-paste the
    fourth of four channels is the object's mask, and `grounds` are what it may be pasted on (None: levels of grey).

    Paste, jitter, grey, blur, solarize, in the order of BYOL's appendix B; an operation of probability 0 costs nothing.
    """
    n, device = len(x), x.device
    if view["paste"]:
        x = copy_paste(x[:, :3].contiguous(), x[:, 3:], view, grounds, g)
    if view["jitter_p"]:
        b, c, s, h = view["jitter"]
        bounds = [(max(0, 1 - b), 1 + b), (max(0, 1 - c), 1 + c), (max(0, 1 - s), 1 + s), (-h, h)]
        factors = torch.stack([uniform(n, low, high, g) for low, high in bounds], 1)
        order = torch.rand(n, 4, generator=g).argsort(1)  # torchvision, too, draws an order for every image
        order[torch.rand(n, generator=g) >= view["jitter_p"]] = 4
        x = jitter(x, factors, order)
    if view["grey"]:
        rows = chosen(n, view["grey"], g, device)
        x[rows] = grey(x[rows]).expand(-1, 3, -1, -1)
    if view["blur"]:
        rows = chosen(n, view["blur"], g, device)
        sigma = uniform(len(rows), *view["sigma"], g).to(device, non_blocking=True)
        if len(rows):
            x[rows] = blur(x[rows], sigma, 2 * int(view["size"] / 20) + 1)  # 23 taps at 224 px, 3 at 32 px
    if view["solarize"]:
        rows = chosen(n, view["solarize"], g, device)
        x[rows] = solarize(x[rows])
    return normalise(x, view["mean"], view["std"])


def view(size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), interpolation="bicubic", flip=0.5, jitter=(0, 0, 0, 0),
         jitter_p=0.0, grey=0.0, blur=0.0, sigma=(0.1, 2.0), solarize=0.0, mean=MEAN, std=STD, paste=0.0,
         blend="none"):  # fmt: skip
    """The numbers of one view; the scripts spell out those that their paper sets.

    size: px. scale, ratio: of the random crop, as torchvision's RandomResizedCrop (ratio None: the image's own; "square": 1,
    with scale as a share of the largest square). jitter: strengths of brightness, contrast, saturation, hue. sigma: range of
    the blur's standard deviation in px. flip, jitter_p, grey, blur, solarize, paste: probabilities. blend: of the pasted
    object's edge, a key of BLENDS.
    """
    return dict(size=size, scale=scale, ratio=ratio, interpolation=interpolation, flip=flip, jitter=jitter,
                jitter_p=jitter_p, grey=grey, blur=blur, sigma=sigma, solarize=solarize, mean=mean, std=std,
                paste=paste, blend=blend)  # fmt: skip


# ============ batches ============


class Loader:
    """Batches of views for training. `epoch(e)` yields (index [b], [view_1, ..., view_V]), each view a normalised float
    [b, 3, S, S] on the device and `index` the images' places in the set, which memory banks key on.

    Every process draws the same permutation of the set per epoch and takes its own slice of each batch; a ragged tail
    is dropped, so that all processes make the same `steps`. Views that paste need `alpha` and `cut`, the objects' masks as
    `masks_at` takes them, and take `grounds` as `augment` does.
    """

    def __init__(self, data, views, batch_size, seed, rank=0, world=1, workers=0, device="cpu", alpha=None, grounds=None,
                 cut=None):  # fmt: skip
        self.data, self.views, self.batch_size, self.seed, self.grounds = data, views, batch_size, seed, grounds
        self.rank, self.world, self.device = rank, world, torch.device(device)
        self.steps = len(data) // (batch_size * world)
        if isinstance(data, sets.Files):
            self.batches = _Batches()
            check_shared_memory(workers, batch_size * sum((3 + (v["paste"] > 0)) * v["size"] ** 2 for v in views))
            self.loader = DataLoader(
                Crops(data, views, seed, alpha, cut), batch_sampler=self.batches, collate_fn=Crops.collate, num_workers=workers,
                persistent_workers=workers > 0, pin_memory=self.device.type == "cuda", worker_init_fn=outlive_signals,
            )  # fmt: skip
        else:
            self.alpha = None
            if alpha is not None:
                self.alpha = masks_at(alpha, data.images.shape[2:], cut)[:, None].to(data.images.device)

    def epoch(self, epoch, start=0):
        """The batches of epoch `epoch` from step `start` on; the same ones whenever they are asked for."""
        order = torch.randperm(len(self.data), generator=generator(self.seed, "order", epoch))
        order = order[: self.steps * self.batch_size * self.world].view(self.steps, self.world, self.batch_size)
        order = order[:, self.rank]  # [steps, b]
        for step, (index, crops) in enumerate(self.crops(order, epoch, start), start):
            g = generator(self.seed, epoch, step, self.rank)
            if crops is None:
                images = self.data.images[index]
                with_masks = None if self.alpha is None else torch.cat([images, self.alpha[index]], 1)
                crops = [random_crops(with_masks if view["paste"] else images, view, g) for view in self.views]
            yield index, [augment(crop, view, g, self.grounds) for crop, view in zip(crops, self.views, strict=True)]

    def crops(self, order, epoch, start):
        if isinstance(self.data, sets.Images):
            yield from ((index, None) for index in order[start:].to(self.device))
            return
        self.batches.keys = [[(epoch, i) for i in batch] for batch in order[start:].tolist()]
        for index, crops, said in self.loader:
            self.data.report(said, "another image takes its place")
            crops = [c.to(self.device, non_blocking=True).float().div_(255) for c in crops]
            yield index.to(self.device, non_blocking=True), crops


def check_shared_memory(workers, batch):
    """Workers hand their batches, of `batch` bytes, over in /dev/shm, two each ahead of the one that is used. Where these do
    not fit torch waits for ever, so that is refused."""
    try:
        found = os.statvfs("/dev/shm")
    except (OSError, AttributeError):  # not on Windows and macOS, which have other ways
        return
    needed = (2 * workers + 1) * batch * int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # as much for each process beside this one
    if workers and needed > found.f_bavail * found.f_frsize:
        fail(f"/dev/shm is too small for the batches of {workers} workers, {needed / 1e6:.1f} MB: lower --workers (0 needs "
             "none), or give it more (docker run --shm-size 8g)")  # fmt: skip


def outlive_signals(_):
    """In workers: a signal to stop may reach every process, but it is for the one that trains, which still needs its next
    batch to finish the step and save. SIGTERM, which is also how Python ends workers at exit, works after five seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):  # not on Windows, where processes are not stopped by signals
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(5))
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class _Batches:
    """A batch sampler that hands out whatever `keys` it holds when an epoch begins, batches of (epoch, index), so that workers
    can live for all epochs. It knows no Loader: in a circle of references workers would outlive it, until Python kills them."""

    def __init__(self):
        self.keys = []

    def __iter__(self):
        return iter(self.keys)

    def __len__(self):
        return len(self.keys)


class Crops(Dataset):
    """What a worker does: decode one image and cut its views. The key (epoch, index) decides all randomness, so it does
    not matter which worker does it."""

    def __init__(self, files, views, seed, alpha=None, cut=None):
        self.files, self.views, self.seed, self.alpha, self.cut = files, views, seed, alpha, cut

    def __len__(self):
        return len(self.files)

    def __getitem__(self, key):
        epoch, index = key
        g, at, said = generator(self.seed, "crop", epoch, index), index, {}
        image = torch.zeros(3, 8, 8, dtype=torch.uint8)  # only if twenty images in a row are broken
        for _ in range(20):
            try:
                image, _ = self.files.read(at)
                break
            except OSError as error:
                said[at] = str(error)
                at = int(torch.randint(len(self.files), (), generator=g))
        if self.alpha is not None:
            mask = masks_at(self.alpha[at, None], image.shape[1:], None if self.cut is None else self.cut[at, None])
        crops = [random_crop(torch.cat([image, mask]) if view["paste"] else image, view, g) for view in self.views]
        return index, crops, said

    @staticmethod
    def collate(samples):
        numbers, images, said = zip(*samples, strict=True)
        images = [torch.stack(view) for view in zip(*images, strict=True)]
        return torch.tensor(numbers), images, dict(collections.ChainMap(*said))


class Plain(Dataset):
    """Images of a folder without augmentation, for the probes; a broken one is black, has no label and keeps its place."""

    def __init__(self, files, size, interpolation):
        self.files, self.size, self.interpolation = files, size, interpolation

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        try:
            image, label = self.files.read(index)
        except OSError as error:
            return -1, [torch.zeros(3, self.size, self.size, dtype=torch.uint8)], {index: str(error)}
        return label, [fit(image, self.size, self.interpolation)], {}


def batches(data, preprocess, batch_size=512, device="cpu", workers=0, indices=None):
    """Plain images in order: yields (x normalised [b, 3, S, S] on the device, labels [b] on the CPU, -1 for none). Files that do
    not decode are black, are named, and above 1 % end the program, as in training."""
    size, interpolation = preprocess["size"], preprocess["interpolation"]
    indices = torch.arange(len(data)) if indices is None else indices
    if isinstance(data, sets.Images):
        for index in indices.split(batch_size):
            x = fit(data.images[index.to(data.images.device)].to(device), size, interpolation)
            labels = torch.full((len(index),), -1) if data.labels is None else data.labels[index]
            yield normalise(x.float() / 255, preprocess["mean"], preprocess["std"]), labels
        return
    check_shared_memory(workers, min(batch_size, len(indices)) * 3 * size**2)
    plain = Subset(Plain(data, size, interpolation), indices.tolist())
    pin = torch.device(device).type == "cuda"
    loader = DataLoader(
        plain, batch_size, collate_fn=Crops.collate, num_workers=workers, pin_memory=pin, worker_init_fn=outlive_signals
    )
    for labels, (x,), said in loader:
        data.report(said, "a black one without a label takes its place")
        x = x.to(device, non_blocking=True).float().div_(255)
        yield normalise(x, preprocess["mean"], preprocess["std"]), labels


# ============ pictures and checks ============


def pixels(x, view):
    """Images [B, 3, H, W] of a view with the normalisation undone: in [0, 1]."""
    mean, std = (torch.tensor(view[k], device=x.device).view(3, 1, 1) for k in ("mean", "std"))
    return x.float() * std + mean


def picture(batches_, views, n=8):
    """The first `n` images of each batch, one row per batch: float [3, H, W] in [0, 1]. Views of different sizes are enlarged
    to the largest."""
    size = [max(v["size"] for v in views)] * 2
    rows = [F.interpolate(pixels(x[:n], v), size, mode="nearest") for x, v in zip(batches_, views, strict=True)]
    return make_grid(torch.cat(rows).clamp(0, 1).cpu(), nrow=n, padding=2, pad_value=1)


def tiles(x, n):
    """The k pictures of each of n images, [n * k, 3, s, s], as one square each: [n, 3, S, S]."""
    k = len(x) // n
    return x if k == 1 else torch.stack([make_grid(part, math.ceil(k**0.5), pad_value=1) for part in x.chunk(n)])


def show(args, rest):
    """Write a picture of images, their views and their masks. A script whose views are not those of its recipe as they stand has
    views_of(args), and one whose network sees something else has seen(args, xs, views, g) -> {caption: [n, 3, s, s]}."""
    methods = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if "\nRECIPES = " in path.read_text())
    if args.method not in methods:
        fail(f"--method {args.method}: it must be one of {', '.join(methods)}")
    script, pictures, runs = (importlib.import_module(name) for name in (args.method, "analysis.pictures", "runs"))
    flags = script.parse_args(["--data", args.data, *rest])
    at_least(1, args, "n", most=64)
    at_least(8, flags, "size", most=1024)
    views_of = getattr(script, "views_of", lambda flags: [view(flags.size, **v) for v in script.RECIPES[flags.recipe]["views"]])
    dataset, views = sets.load(flags.data, flags.root, limit=flags.limit, seed=flags.seed), views_of(flags)
    n = min(args.n, len(dataset))
    masks = script.objects(flags, dataset, "cpu", print) if views[0]["paste"] else ()
    index, xs = next(Loader(dataset, views, n, flags.seed, 0, 1, 0, "cpu", *masks).epoch(0))
    plain, _ = next(batches(dataset, view(flags.size, mean=(0, 0, 0), std=(1, 1, 1)), n, indices=index))
    rows = {f"view {i}": pixels(x, v) for i, (x, v) in enumerate(zip(xs, views, strict=True), 1)}
    if hasattr(script, "seen"):
        rows = script.seen(flags, xs, views, generator(flags.seed, "show"))
    rows = {"image": plain, **rows}
    if dataset.masks is not None:
        rows["mask"] = tvf.resize(dataset.masks[index][:, None].float(), [flags.size] * 2).expand(-1, 3, -1, -1)
    runs.write_picture(args.out, pictures.draw_rows([(name, 2 * x.clamp(0, 1) - 1, None, None) for name, x in rows.items()]))
    print(f"{args.out}: {n} images of {dataset.name} and what the network of {args.method}.py sees: {', '.join(rows)}")


def check(args):
    if not os.path.isdir(args.folder):
        fail(f"{args.folder}: no such folder")
    items, _ = sets.list_folder(args.folder)
    if not items:
        fail(f"no images in {args.folder} (looked for {' '.join(sorted(sets.SUFFIXES))})")
    files = sets.Files(args.folder, items)

    def problem(i):
        try:
            files.read(i)
        except OSError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:  # decoders let go of Python's lock
        bad = list(filter(None, tqdm(pool.map(problem, range(len(files))), "check", len(files), disable=None)))
    for sentence in bad:
        print(sentence)
    print(f"{len(files)} images, {len(bad)} do not decode")
    return 1 if bad else 0


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(required=True)
    s = commands.add_parser(
        "show", help="write a PNG of images and of what a network sees of them", allow_abbrev=False,
        epilog="All other flags are the script's: --recipe, --size, --seed, --root; of pretext.py --task, of cmc.py --split, ...",
    )  # fmt: skip
    s.add_argument("data", help=f"a folder, or one of {', '.join(sets.NAMES)}")
    s.add_argument("--method", default="byol", help="the script whose views to show")
    s.add_argument("--n", type=int, default=10, help="how many images")
    s.add_argument("--out", default="show.png", help="the file to write")
    s.set_defaults(run=show)
    c = commands.add_parser(
        "check", help="list the images of a folder that do not decode; exit code 1 if there are any"
    )
    c.add_argument("folder")
    c.set_defaults(run=check)
    args, rest = p.parse_known_args(argv)
    if args.run is show:
        return show(args, rest)
    return check(args) if not rest else p.error(f"unrecognized arguments: {' '.join(rest)}")


if __name__ == "__main__":
    import data  # the scripts import this file, too: its classes must be the same

    raise SystemExit(data.main())
