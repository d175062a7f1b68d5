"""Data: views of images for training, plain images for the probes; the sets themselves are in sets.py.

    python data.py show shapes --method cmc     a PNG of images and of what a method's network sees of them
    python data.py check DIR                    lists the images that do not decode
    python data.py shrink DIR OUT               copies of a folder's images, smaller, which decode faster

Two paths, one augmentation code. Small sets live in memory as one uint8 tensor on the training device and a batch is
an index. Folders are decoded by workers, which also cut the random crops (uint8, at the output size); everything after
the crop runs batched on the device in both paths.

Random numbers come from generators seeded by a key such as (seed, epoch, step, rank), so that a run resumes exactly at
any step, and are drawn on the CPU, one per image, so that no step waits for the device.
"""

import argparse
import collections
import functools
import importlib
import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.v2 import functional as tvf
from torchvision.utils import make_grid
from tqdm import tqdm

import common
import runs
import sets
from common import at_least, fail
from sets import generator

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet; every set uses them unless a recipe says not
HALF = (0.5, 0.5, 0.5)  # as mean and std they take [0, 1] to [-1, 1]


# ============ geometry: random crops and flips ============


def sample_boxes(n, height, width, scale, ratio, g):
    """`n` crops (top, left, height, width) [n, 4], distributed as torchvision's RandomResizedCrop: area U(scale) of the
    image, log-uniform aspect ratio (None: the image's own, so that the resize squashes it; "square": 1, and the area is
    a share of the largest square's, so that it always fits); of ten tries the first that fits, else the largest central
    crop of allowed ratio."""
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
    center = start[:, None, None] + (torch.arange(outputs, device=start.device)[:, None] + 0.5) * reduction
    pixel = torch.arange(inputs, device=start.device) + 0.5  # [inputs]
    d = ((pixel - center) / reduction.clamp(min=1)).abs()  # [B, outputs, inputs]
    q, p = (1 - d).clamp_(min=0), (2 - d).clamp_(min=0)
    # Bicubic with a = -0.5: p^2 (p - 1) / 2 is its outer piece, and the second term what the inner one has on top.
    weight = q if interpolation == "bilinear" else 0.5 * p * p * (p - 1) + q * q * (1 - 2 * q)
    end = (start + length)[:, None, None]
    weight = weight * ((pixel > start[:, None, None]) & (pixel < end))
    return weight / weight.sum(-1, keepdim=True)


def crop_resize(images, boxes, flip, size, interpolation):
    """Crops of a batch in memory: uint8 [B, C, H, W], boxes [B, 4], flip bool [B] -> [B, C, size, size] in [0, 1].
    Crop and resize are linear and separable: two batched matrix products. A flip reverses the rows of one matrix."""
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


def fit(image, size, interpolation="bilinear", short=0):
    """An image [..., H, W] as a network sees it in evaluation: an image of the right size as it is; others with the
    short side at `short` (default: 256/224 of `size`, below 64 px `size`) and the center cut out."""
    if tuple(image.shape[-2:]) == (size, size):
        return image
    short = short or (size if size < 64 else round(size * 256 / 224))
    image = tvf.resize(image, [short], tvf.InterpolationMode(interpolation), antialias=True)
    return tvf.center_crop(image, [size, size])


# ============ color: operations on batches in [0, 1], one parameter per image ============
# Each equals torchvision's on a float image (tests/test_data.py compares them).


def gray(x):
    """[B, 3, H, W] -> luma [B, 1, H, W] (ITU-R 601)."""
    return (0.2989 * x[:, 0:1]).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:3], alpha=0.114)


def blend(x, f, luma, mean):
    """x <- f x + luma Y + mean E[Y], clamped to [0, 1], where Y is the luma of a pixel and E[Y] its image's average; in
    place. With r = 1 - f: (f, 0, 0) is torchvision's brightness, (f, 0, r) its contrast, (f, r, 0) its saturation."""
    y = gray(x)
    average = y.mean((1, 2, 3), keepdim=True).mul_(mean)
    return x.mul_(f).add_(y.mul_(luma).add_(average)).clamp_(0, 1)


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


def jitter(x, factors, order):
    """Color jitter; returns new images. factors [B, 4]: of brightness, contrast, saturation, hue. order [B, 4], on the
    CPU: which operation an image meets first, second, third, fourth; a row of 4s: no jitter.

    All but hue are blends, so with the images sorted by the place of their hue each slot is one blend of neighbors:
    first of the images whose hue comes later, then, after all hues at once, of those whose hue came before. That is
    seven operations on slices, not sixteen on groups of images.
    """
    place = (order == 3).int().argmax(1)  # the slot of the hue
    place[order[:, 0] == 4] = -1
    rows = place.argsort(stable=True)
    end = torch.bincount(place + 1, minlength=5).cumsum(0).tolist()  # of no jitter, of hue in slot 0, 1, 2, 3
    order, factors = order[rows], factors[rows]
    f = factors.gather(1, order.clamp(max=3))  # by slot
    slots = torch.stack([f, (1 - f) * (order == 2), (1 - f) * (order == 1)])  # [3, B, 4]: f, luma, mean of `blend`
    sent = slots[..., None, None, None], factors[:, 3, None, None, None], rows, rows.argsort()
    slots, shift, rows, back = (t.to(x.device, non_blocking=True) for t in sent)
    x = x.index_select(0, rows)
    for slot in range(3):
        blend(x[end[slot + 1] :], *slots[:, end[slot + 1] :, slot])
    x[end[0] :] = hue(x[end[0] :], shift[end[0] :])
    for slot in range(1, 4):
        blend(x[end[0] : end[slot]], *slots[:, end[0] : end[slot], slot])
    return x.index_select(0, back)


def blur(x, sigma, size):
    """Gaussian blur, sigma [B] in pixels, kernel of `size` pixels, reflected at the border (as torchvision's)."""
    (b, c, h, w), half = x.shape, size // 2
    kernel = torch.exp(-0.5 * (torch.arange(-half, half + 1, device=x.device) / sigma[:, None]) ** 2)  # [B, size]
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)  # [B * C, size]
    x = F.pad(x.reshape(1, b * c, h, w), (half, half, half, half), mode="reflect")
    x = F.conv2d(x, kernel[:, None, None, :], groups=b * c)
    return F.conv2d(x, kernel[:, None, :, None], groups=b * c).view(b, c, h, w)


def solarize(x):
    return torch.minimum(x, 1 - x)


@functools.cache
def per_channel(values, device):
    """A tuple of numbers as a tensor [C, 1, 1] on the device, copied there once."""
    with torch.inference_mode(False):  # it may be needed for a gradient later
        return torch.tensor(values).view(-1, 1, 1).to(device, non_blocking=True)


def normalize(x, mean=MEAN, std=STD):
    mean, std = (per_channel(tuple(t), x.device) for t in (mean, std))
    return (x - mean).div_(std)


def standardize(x):
    """Each image [B, C, H, W] to mean 0 and standard deviation 1 over all its pixels and channels; the deviation counts
    as 1 / sqrt(C H W) at least (TensorFlow's per_image_standardization)."""
    x = x - x.mean((1, 2, 3), keepdim=True)
    return x / x.square().mean((1, 2, 3), keepdim=True).sqrt().clamp(min=x[0].numel() ** -0.5)


def uniform(n, low, high, g):
    return low + (high - low) * torch.rand(n, generator=g)


def chosen(n, p, g, device):
    """Rows of the images that an operation concerns, each with probability `p`."""
    return (torch.rand(n, generator=g) < p).nonzero()[:, 0].to(device, non_blocking=True)


def augment(x, view, g):
    """A view from its crop: float [B, 3, S, S] in [0, 1] (overwritten) -> normalized. Jitter, gray, blur, solarize, in
    the order of BYOL's appendix B; an operation of probability 0 costs nothing."""
    n, device = len(x), x.device
    if view["jitter_p"]:
        b, c, s, h = view["jitter"]
        bounds = [(max(0, 1 - b), 1 + b), (max(0, 1 - c), 1 + c), (max(0, 1 - s), 1 + s), (-h, h)]
        factors = torch.stack([uniform(n, low, high, g) for low, high in bounds], 1)
        order = torch.rand(n, 4, generator=g).argsort(1)  # torchvision, too, draws an order for every image
        order[torch.rand(n, generator=g) >= view["jitter_p"]] = 4
        x = jitter(x, factors, order)
    if view["gray"]:
        rows = chosen(n, view["gray"], g, device)
        x[rows] = gray(x[rows]).expand(-1, 3, -1, -1)
    if view["blur"]:
        rows = chosen(n, view["blur"], g, device)
        sigma = uniform(len(rows), *view["sigma"], g).to(device, non_blocking=True)
        if len(rows):
            x[rows] = blur(x[rows], sigma, 2 * int(view["size"] / 20) + 1)  # 23 taps at 224 px, 3 at 32 px
    if view["solarize"]:
        rows = chosen(n, view["solarize"], g, device)
        x[rows] = solarize(x[rows])
    return normalize(x, view["mean"], view["std"])


def view(size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), interpolation="bicubic", flip=0.5, jitter=(0, 0, 0, 0),
         jitter_p=0.0, gray=0.0, blur=0.0, sigma=(0.1, 2.0), solarize=0.0, mean=MEAN, std=STD):  # fmt: skip
    """The numbers of one view; the scripts spell out those that their paper sets.

    size: px. scale, ratio: of the random crop, as torchvision's RandomResizedCrop (more in `sample_boxes`). jitter:
    strengths of brightness, contrast, saturation, hue. sigma: range of the blur's standard deviation in px. flip,
    jitter_p, gray, blur, solarize: probabilities.
    """
    return dict(locals())


# ============ batches ============


class Loader:
    """Batches of views for training. `epoch(e)` yields (index [b], [view_1, ..., view_V]), each view a normalized float
    [b, 3, S, S] on the device and `index` the images' places in the set, which memory banks key on.

    Every rank draws the same permutation of the set per epoch and takes its own slice of each batch; a ragged tail is
    dropped, so that all ranks make the same `steps`. Crops have the channels of the set's images, and
    `augment(crops, view, g)` makes views of them. `waited`: seconds that the workers' batches were waited for.
    """

    def __init__(self, data, views, batch_size, seed, rank=0, world=1, workers=0, device="cpu", augment=augment):
        self.data, self.views, self.batch_size, self.seed, self.augment = data, views, batch_size, seed, augment
        self.rank, self.world, self.device = rank, world, torch.device(device)
        self.steps, self.waited = len(data) // (batch_size * world), 0.0
        if isinstance(data, sets.Files):
            check_shared_memory(workers, batch_size * data.channels * sum(v["size"] ** 2 for v in views))
            self.late, self.advised = 0.0, False  # share of the last epoch that went by waiting
            self.keys = []  # the batches of an epoch; the list stays the same, so that workers can live for all epochs
            self.loader = DataLoader(
                Crops(data, views, seed), batch_sampler=self.keys, collate_fn=Crops.collate, num_workers=workers,
                persistent_workers=workers > 0, pin_memory=self.device.type == "cuda", worker_init_fn=outlive_signals,
            )  # fmt: skip

    def epoch(self, epoch, start=0):
        """The batches of epoch `epoch` from step `start` on; the same ones whenever they are asked for."""
        order = torch.randperm(len(self.data), generator=generator(self.seed, "order", epoch))
        order = order[: self.steps * self.batch_size * self.world].view(self.steps, self.world, self.batch_size)
        order = order[start:, self.rank]  # [steps, b]
        in_memory = isinstance(self.data, sets.Images)
        for step, batch in enumerate(order.to(self.device) if in_memory else self.decode(order, epoch), start):
            g = generator(self.seed, epoch, step, self.rank)
            if in_memory:
                images = self.data.images[batch]
                index, crops = batch, [random_crops(images, view, g) for view in self.views]
            else:
                index, crops = batch
            yield index, [self.augment(crop, view, g) for crop, view in zip(crops, self.views, strict=True)]

    def decode(self, order, epoch):
        """(index, crops in [0, 1]) of each batch, as the workers cut them."""
        if self.late > 0.1 and not self.advised:
            self.advised = True
            if self.rank == 0:
                tqdm.write(f"data wait was {self.late:.0%} of an epoch: python data.py shrink makes files that decode "
                           f"faster; more --workers than {self.loader.num_workers} help where cores are idle, "
                           "--in-memory where all images have one small size")  # fmt: skip
        self.keys[:] = [[(epoch, i) for i in batch] for batch in order.tolist()]
        start = None
        for index, crops, said in timed(self, self.loader):
            start = start or (time.perf_counter(), self.waited)  # after the first batch, for which workers also start
            self.data.report(said, "another image takes its place")
            crops = [c.to(self.device, non_blocking=True).float().div_(255) for c in crops]
            yield index.to(self.device, non_blocking=True), crops
            self.late = (self.waited - start[1]) / (time.perf_counter() - start[0])

    def decodes(self):
        """Images per second that the workers of all ranks can decode and crop, from up to a second of it in this
        process: 64 files spread over the set, on one thread as in a worker. No more workers count than there are cores.
        """
        files, threads = self.loader.dataset, torch.get_num_threads()
        torch.set_num_threads(1)
        files[0, 0]  # the first use of a decoder takes longer
        done, start = 0, time.perf_counter()
        for i in range(0, len(self.data), math.ceil(len(self.data) / 64)):
            files[0, i]
            done, seconds = done + 1, time.perf_counter() - start
            if seconds > 0.8:
                break
        torch.set_num_threads(threads)
        return self.world * max(1, min(self.loader.num_workers, common.cores())) * done / seconds


def timed(loader, batches):
    """`batches` as they come; the seconds that each is waited for are added to loader.waited."""
    asked = time.perf_counter()
    for batch in batches:
        loader.waited += time.perf_counter() - asked
        yield batch
        asked = time.perf_counter()


def check_shared_memory(workers, batch):
    """Workers hand their batches, of `batch` bytes, over in /dev/shm, two each ahead of the one that is used. Where
    these do not fit, torch would wait for ever."""
    if not workers or not os.path.isdir("/dev/shm"):  # Windows and macOS have other ways
        return
    found, batch = os.statvfs("/dev/shm"), batch * common.local_processes()
    needed, free = (2 * workers + 1) * batch, found.f_bavail * found.f_frsize
    if needed > free:
        fits, give = max(0, (free // batch - 1) // 2), f"docker run --shm-size {needed // 10**9 + 1}g"
        fail(f"/dev/shm is too small for the batches of {workers} workers, {needed / 1e6:.1f} MB: --workers {fits} "
             f"at most, or give it more ({give})")  # fmt: skip


def outlive_signals(_):
    """In workers: a signal to stop may reach every process, but it is for the one that trains, which still needs its
    next batch to finish the step and save. SIGTERM, by which Python ends workers at exit, works after five seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):  # not on Windows, where processes are not stopped by signals
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(5))
        signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def read(files, i, said):
    """(image, label); or None, and the reason in said[i], where the file does not decode."""
    try:
        return files.read(i)
    except OSError as error:
        said[i] = str(error)


class Crops(Dataset):
    """What a worker does: decode one image and cut its views. The key (epoch, index) decides all randomness, so it does
    not matter which worker does it."""

    def __init__(self, files, views, seed):
        self.files, self.views, self.seed = files, views, seed

    def __getitem__(self, key):
        epoch, index = key
        g, at, said = generator(self.seed, "crop", epoch, index), index, {}
        for _ in range(20):
            if found := read(self.files, at, said):
                break
            at = int(torch.randint(len(self.files), (), generator=g))
        image = found[0] if found else torch.zeros(self.files.channels, 8, 8, dtype=torch.uint8)
        return index, [random_crop(image, view, g) for view in self.views], said

    @staticmethod
    def collate(samples):
        numbers, images, said = zip(*samples, strict=True)
        images = [torch.stack(view) for view in zip(*images, strict=True)]
        return torch.tensor(numbers), images, dict(collections.ChainMap(*said))


class Plain(Dataset):
    """Images of a folder without augmentation; a broken one is black, has no label and keeps its place."""

    def __init__(self, files, size, interpolation, short):
        self.files, self.size, self.interpolation, self.short = files, size, interpolation, short

    def __getitem__(self, index):
        said, black = {}, torch.zeros(self.files.channels, self.size, self.size, dtype=torch.uint8)
        image, label = read(self.files, index, said) or (black, -1)
        return label, [fit(image, self.size, self.interpolation, self.short)], said


def batches(data, preprocess, batch_size=512, device="cpu", workers=0, indices=None):
    """Plain images in order, for the probes: yields (x normalized [b, 3, S, S] on the device, labels [b] on the CPU, -1
    for none). Files that do not decode are black, are named, and above 1 % end the program, as in training."""
    size, interpolation, short = preprocess["size"], preprocess["interpolation"], preprocess.get("short", 0)
    indices = torch.arange(len(data)) if indices is None else indices
    if isinstance(data, sets.Images):
        for index in indices.split(batch_size):
            x = fit(data.images[index.to(data.images.device)].to(device), size, interpolation, short)
            labels = torch.full((len(index),), -1) if data.labels is None else data.labels[index]
            yield normalize(x.float() / 255, preprocess["mean"], preprocess["std"]), labels
        return
    workers = min(workers, math.ceil(len(indices) / batch_size))  # each makes whole batches
    check_shared_memory(workers, min(batch_size, len(indices)) * 3 * size**2)
    loader = DataLoader(
        Subset(Plain(data, size, interpolation, short), indices.tolist()), batch_size, collate_fn=Crops.collate,
        num_workers=workers, pin_memory=torch.device(device).type == "cuda", worker_init_fn=outlive_signals,
    )  # fmt: skip
    for labels, (x,), said in loader:
        data.report(said, "a black one without a label takes its place")
        x = x.to(device, non_blocking=True).float().div_(255)
        yield normalize(x, preprocess["mean"], preprocess["std"]), labels


# ============ pictures and checks ============


def pixels(x, view):
    """Images [B, 3, H, W] of a view with the normalization undone: in [0, 1]."""
    mean, std = (per_channel(tuple(view[k]), x.device) for k in ("mean", "std"))
    return x.float() * std + mean


def picture(batches_, views, n=8):
    """The first `n` images of each batch, one row per batch: float [3, H, W] in [0, 1]. Views of different sizes are
    enlarged to the largest."""
    size = [max(v["size"] for v in views)] * 2
    rows = [F.interpolate(pixels(x[:n], v), size, mode="nearest") for x, v in zip(batches_, views, strict=True)]
    return make_grid(torch.cat(rows).clamp(0, 1).cpu(), nrow=n, padding=2, pad_value=1)


def tiles(x, n):
    """The k pictures of each of n images, [n * k, 3, s, s], as one square each: [n, 3, S, S]."""
    k = len(x) // n
    return x if k == 1 else torch.stack([make_grid(part, math.ceil(k**0.5), pad_value=1) for part in x.chunk(n)])


def show(args, rest):
    """Write a picture of images, their views and their masks. What a script may have where it differs from its recipe's
    views: views_of(args); prepare(args, set, device, say), which gives the set that its Loader reads, and `augment`;
    seen(args, xs, views, g), which gives what its network gets, {caption: [n, 3, s, s]}."""
    methods = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if "\nRECIPES = " in path.read_text())
    if args.method not in methods:
        fail(f"--method {args.method}: it must be one of {', '.join(methods)}")
    script, pictures = (importlib.import_module(name) for name in (args.method, "analysis.pictures"))
    flags = script.parse_args(["--data", args.data, *rest])
    at_least(1, args, "n", most=64)
    at_least(8, flags, "size", most=1024)
    dataset = sets.load(flags.data, flags.root, limit=flags.limit, seed=flags.seed)
    n = min(args.n, len(dataset))
    recipe_views = lambda flags: [view(flags.size, **v) for v in script.RECIPES[flags.recipe]["views"]]
    views = getattr(script, "views_of", recipe_views)(flags)
    source, how = script.prepare(flags, dataset, "cpu", print) if hasattr(script, "prepare") else (dataset, augment)
    index, xs = next(Loader(source, views, n, flags.seed, augment=how).epoch(0))
    plain, _ = next(batches(dataset, view(flags.size, mean=(0, 0, 0), std=(1, 1, 1)), n, indices=index))
    rows = {f"view {i}": pixels(x, v) for i, (x, v) in enumerate(zip(xs, views, strict=True), 1)}
    if hasattr(script, "seen"):
        rows = script.seen(flags, xs, views, generator(flags.seed, "show"))
    rows = {"image": plain, **rows}
    if dataset.masks is not None:
        rows["mask"] = tvf.resize(dataset.masks[index][:, None].float(), [flags.size] * 2).expand(-1, 3, -1, -1)
    drawn = pictures.draw_rows([(name, 2 * x.clamp(0, 1) - 1, None, None) for name, x in rows.items()])
    runs.write_picture(args.out, drawn)
    print(f"{args.out}: {n} images of {dataset.name} and what the network of {args.method}.py sees: {', '.join(rows)}")


def items_of(folder):
    """The (path, label) pairs of a folder that must have images."""
    if not os.path.isdir(folder):
        fail(f"{folder}: no such folder")
    items, _ = sets.list_folder(folder)
    return items or fail(f"no images in {folder} (looked for {' '.join(sorted(sets.SUFFIXES))})")


def check(folder):
    """List the images of a folder that do not decode; returns the exit code."""
    items = items_of(folder)
    files, found = sets.Files(folder, items), [{} for _ in items]
    with ThreadPoolExecutor() as pool:  # decoders let go of Python's lock
        reads = pool.map(lambda i: read(files, i, found[i]) is None, range(len(files)))
        bad = sum(tqdm(reads, "check", len(files), disable=None))
    for sentence in (sentence for said in found for sentence in said.values()):
        print(sentence)
    print(f"{len(files)} images, {bad} do not decode")
    return 1 if bad else 0


class Copies(Dataset):
    """What a worker of `shrink` does: write a copy, unless it is there. (why the image does not decode, why its copy
    cannot be written), each None if all is well."""

    def __init__(self, pairs, short, quality):
        self.pairs, self.short, self.quality = pairs, short, quality

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, i):
        path, copy = self.pairs[i]
        if os.path.exists(copy) and os.path.getsize(copy):
            return None, None
        try:
            image = sets.decode(path)
        except OSError as error:
            return str(error), None
        try:
            os.makedirs(os.path.dirname(copy), exist_ok=True)
            runs.replace(copy, lambda f: self.write(path, image, f), sync=False)  # of many
        except OSError as error:
            return None, f"{copy}: {runs.reason(error)}"
        return None, None

    def write(self, path, image, f):
        """The smaller image in the format of its file, as training sees it: RGB of 8 bits, not turned; the orientation
        stays as EXIF's tag."""
        with Image.open(path) as old:
            kind, exif = "JPEG" if old.format == "MPO" else old.format, Image.Exif()
            if kind != "TIFF" and (turned := sets.orientation(old)):  # Pillow turns a TIFF as it reads it
                exif[sets.ORIENTATION] = turned
        if min(image.shape[1:]) <= self.short or kind not in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"):
            f.write(Path(path).read_bytes())
        else:
            small = tvf.resize(image, [self.short], tvf.InterpolationMode.BICUBIC, antialias=True)
            tvf.to_pil_image(small).save(f, kind, quality=self.quality, exif=exif)


def shrink(args):
    """Write smaller copies of a folder's images; returns the exit code."""
    at_least(8, args, "short")
    at_least(1, args, "quality", most=100)
    at_least(0, args, "workers")
    folder, out = Path(args.folder), Path(args.out)
    items, ways = items_of(folder), [folder.resolve(), out.resolve()]
    if os.path.commonpath(ways) in map(str, ways):
        fail(f"{out} and {folder}: neither may lie in the other")
    note, kind = out / "shrink.txt", f"{ways[0]}, short side {args.short} px, quality {args.quality}\n"
    was = note.read_text() if note.is_file() else "other files\n" if out.is_dir() and any(out.iterdir()) else kind
    if was != kind:
        fail(f"{out} holds {was.strip()}: choose another folder for copies of {kind.strip()}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"{out}: no folder can be made there ({runs.reason(error)})")
    runs.write_text(note, kind)
    common.end_at_signals()
    pairs = [(path, os.path.join(out, path.removeprefix(f"{folder}{os.sep}"))) for path, _ in items]
    copies, bad = Copies(pairs, args.short, args.quality), 0
    how = dict(batch_size=16, collate_fn=list, num_workers=args.workers, worker_init_fn=outlive_signals)
    with tqdm(total=len(pairs), desc="shrink", unit="img", disable=None) as bar:
        for batch in DataLoader(copies, **how):
            for undecoded, unwritten in batch:
                if unwritten:
                    fail(f"could not write {unwritten}; the same command goes on from here")
                if undecoded:
                    tqdm.write(undecoded)
                    bad += 1
            bar.update(len(batch))
    print(f"{out}: copies of {len(pairs) - bad} images, {bad} do not decode")
    return 1 if bad else 0


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    s = commands.add_parser(
        "show", help="write a PNG of images and of what a network sees of them", allow_abbrev=False,
        epilog="All other flags are the script's: --recipe, --size, --seed, --root; --task, --split, ...",
    )  # fmt: skip
    s.add_argument("data", help=f"a folder, or one of {', '.join(sets.NAMES)}")
    s.add_argument("--method", default="byol", help="the script whose views to show")
    s.add_argument("--n", type=int, default=10, help="how many images")
    s.add_argument("--out", default="show.png", help="the file to write")
    c = commands.add_parser("check", help="list the images of a folder that do not decode; exit code 1 if any")
    c.add_argument("folder")
    s = commands.add_parser("shrink", help="write copies that decode faster; exit code 1 if some images do not decode")
    s.add_argument("folder", help="the images; what is below it keeps its place and name")
    s.add_argument("out", help="the folder for the copies; those that it has stay")
    s.add_argument("--short", type=int, default=256, help="px of the short side; images of fewer are copied (256)")
    s.add_argument("--quality", type=int, default=90, help="of JPEG and WebP; other formats lose nothing (90)")
    s.add_argument("--workers", type=int, default=common.cores(), help="processes (default: one a core)")
    args, rest = p.parse_known_args(argv)
    if args.command == "show":
        return show(args, rest)
    if rest:
        p.error(f"unrecognized arguments: {' '.join(rest)}")
    return check(args.folder) if args.command == "check" else shrink(args)


if __name__ == "__main__":
    import data  # the scripts import this file, too: its classes must be the same

    common.run(data.main)
