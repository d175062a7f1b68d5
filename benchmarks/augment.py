"""Augmentation on one core: two BYOL views from memory at 32 px, and from JPEG files at 224 px.

    python benchmarks/augment.py                      about two minutes
    python benchmarks/augment.py --repeats 2 --seconds 0.2

A batch on our side, image by image on the peers' side, as each of them is used. On a GPU, additionally, the share of
the augmentation in a training step.
"""

import argparse
import io
import statistics
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms.v2 import functional as tvf

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import step
import timing

import byol
import common
import data
import sets

try:
    from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform
except ImportError:
    BYOLTransform = None

INTERPOLATION = {"bilinear": transforms.InterpolationMode.BILINEAR, "bicubic": transforms.InterpolationMode.BICUBIC}


# ============ peers ============


class PILBlur:
    """Pillow's own blur (three box filters), as many codebases have it, with sigma drawn from the same range."""

    def __init__(self, sigma):
        self.sigma = sigma

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(*self.sigma))))


def torchvision_v1(view, pil_blur=False):
    """The numbers of a view as a Compose of torchvision.transforms (v1), on Pillow images until ToTensor."""
    kernel = 2 * int(view["size"] / 20) + 1  # data.augment's: 23 at 224 px
    blur = PILBlur(view["sigma"]) if pil_blur else transforms.GaussianBlur(kernel, view["sigma"])
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(
                view["size"], view["scale"], view["ratio"], INTERPOLATION[view["interpolation"]]
            ),
            transforms.RandomHorizontalFlip(view["flip"]),
            transforms.RandomApply([transforms.ColorJitter(*view["jitter"])], view["jitter_p"]),
            transforms.RandomGrayscale(view["gray"]),
            transforms.RandomApply([blur], view["blur"]),
            transforms.RandomSolarize(128, view["solarize"]),
            transforms.ToTensor(),
            transforms.Normalize(view["mean"], view["std"]),
        ]
    )


def lightly(size, **kwargs):
    """lightly's two BYOL views as shipped, but for `size` and what `kwargs` changes."""
    return BYOLTransform(BYOLView1Transform(input_size=size, **kwargs), BYOLView2Transform(input_size=size, **kwargs))


# ============ the two paths ============


def views_of(recipe, size):
    return [data.view(size, **view) for view in byol.RECIPES[recipe]["views"]]


def from_memory(images, views, g):
    return [data.augment(data.random_crops(images, view, g), view, g) for view in views]


def jpegs(folder, n, width=500, height=375, bytes_wanted=100_000):
    """`n` JPEG files of noise at several scales, smooth with some texture, of a photograph's size and weight."""
    g = data.generator("jpegs")
    for i in range(n):
        image = sum(
            F.interpolate(
                torch.randn(1, 3, height // s + 2, width // s + 2, generator=g), (height, width), mode="bicubic"
            )
            * s**0.5
            for s in (2, 4, 8, 16, 32, 64, 128)
        )[0]
        image = tvf.to_pil_image(((image / image.std() * 0.2 + 0.5).clamp(0, 1) * 255).to(torch.uint8))
        for quality in range(98, 10, -1):
            file = io.BytesIO()
            image.save(file, "JPEG", quality=quality)
            if file.tell() < bytes_wanted:
                break
        Path(folder, f"{i:04d}.jpg").write_bytes(file.getvalue())


def report(title, times, images, references):
    head = ["", "pairs/s", "ms/pair", *(f"vs {r}" for r in references.values()), "spread"]
    rows = []
    for name, seconds in times.items():
        each = statistics.median(seconds) / images
        rows.append([name, f"{1 / each:.0f}", f"{1000 * each:.3f}"])
        rows[-1] += [*(timing.ratio(times, name, r) for r in references), timing.spread(seconds)]
    timing.table(title, head, rows)


def memory_benchmark(args, device):
    n, g = args.size, data.generator("augment")
    images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=g)
    pil = [tvf.to_pil_image(image) for image in images]
    plain, full = views_of("cifar10", 32), views_of("imagenet", 32)

    def peer(*transforms_):
        return lambda: [[t(image) for t in transforms_] for image in pil]

    variants = {"ours": lambda: from_memory(images, plain, g), "torchvision v1": peer(*map(torchvision_v1, plain))}
    variants_full = {"ours": lambda: from_memory(images, full, g), "torchvision v1": peer(*map(torchvision_v1, full))}
    if BYOLTransform:
        variants["lightly, no blur"] = peer(lightly(32, gaussian_blur=0.0))
        variants_full["lightly as shipped"] = peer(lightly(32))
    times = timing.interleaved(variants, device, args.repeats, args.seconds)
    references = {"torchvision v1": "torchvision", "lightly, no blur": "lightly"}
    report(f"two views from memory, 32 px, batch {n}, recipe cifar10 (no blur)", times, n, references)
    times = timing.interleaved(variants_full, device, args.repeats, args.seconds)
    references = {"torchvision v1": "torchvision", "lightly as shipped": "lightly"}
    report(f"two views from memory, 32 px, batch {n}, recipe imagenet (blur, solarize)", times, n, references)


def file_benchmark(args, device):
    n, g, views = args.files, data.generator("files"), views_of("imagenet", 224)
    with tempfile.TemporaryDirectory() as folder:
        jpegs(folder, n)
        items, _ = sets.list_folder(folder)
        kib = sum(Path(path).stat().st_size for path, _ in items) / n / 1024
        worker = data.Crops(sets.Files("jpegs", items), views, 0)
        crops = data.Crops.collate([worker[0, i] for i in range(n)])[1]

        def color():
            return [data.augment(c.float().div_(255), view, g) for c, view in zip(crops, views, strict=True)]

        def peer(*transforms_):
            def run():
                for path, _ in items:
                    with Image.open(path) as file:
                        image = file.convert("RGB")
                    [t(image) for t in transforms_]

            return run

        variants = {
            "ours, worker (decode, crops)": lambda: [worker[0, i] for i in range(n)],
            "ours, color, batched": color,
            "ours, both on one core": lambda: (data.Crops.collate([worker[0, i] for i in range(n)]), color()),
            "torchvision v1": peer(*map(torchvision_v1, views)),
            "torchvision v1, Pillow's blur": peer(*(torchvision_v1(view, pil_blur=True) for view in views)),
        }
        if BYOLTransform:
            variants["lightly as shipped"] = peer(lightly(224))
        times = timing.interleaved(variants, device, args.repeats, args.seconds)
    references = {
        "torchvision v1": "torchvision",
        "torchvision v1, Pillow's blur": "Pillow's blur",
        "lightly as shipped": "lightly",
    }
    report(f"JPEG files 500 x 375 ({kib:.0f} KiB) to two views, 224 px, recipe imagenet", times, n, references)


def gpu_benchmark(args):
    """Both views of a batch and a whole step (bf16) on the GPU, at the sizes and with the networks of two recipes."""
    _, _, device = common.setup()
    timing.where(device)
    rows, g = [], data.generator("gpu")
    for name in ("cifar10", "imagenet"):
        recipe = byol.RECIPES[name]
        views, n, size = views_of(name, recipe["size"]), args.size, recipe["size"]
        images = torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=g).to(device)
        run = step.Ours(device, True, recipe=recipe, hidden=recipe["hidden"])
        xs = from_memory(images, views, g)
        variants = {
            "views": lambda images=images, views=views: from_memory(images, views, g),
            "step": lambda run=run, xs=xs: run.step(xs),
        }
        times = timing.interleaved(variants, device, args.repeats, args.seconds)
        views_s, step_s = (statistics.median(times[key]) for key in variants)
        row = [f"{name}, {recipe['arch']}, {size} px", f"{n / views_s:.0f}", f"{n / step_s:.0f}"]
        rows.append([*row, f"{100 * views_s / (views_s + step_s):.1f} %"])
    head = ["", "views: pairs/s", "step alone: pairs/s", "share of views"]
    timing.table(f"augmentation in a training step, batch {args.size}, from memory on the GPU", head, rows)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=5, help="rounds; every variant runs once in each")
    p.add_argument("--seconds", type=float, default=1.0, help="a variant is called again until this time is filled")
    p.add_argument("--size", type=int, default=256, help="images of a batch in memory")
    p.add_argument("--files", type=int, default=32, help="JPEG files")
    args = p.parse_args()
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    timing.where(cpu)
    if not BYOLTransform:
        print("lightly is not installed: left out")
    # A training step frees blocks of many megabytes, after which the C library keeps freed memory instead of returning
    # it to the system each time. One such block gives the batches here the same memory that they have in a run.
    torch.zeros(7_500_000)
    memory_benchmark(args, cpu)
    file_benchmark(args, cpu)
    if torch.cuda.is_available():
        gpu_benchmark(args)
    else:
        print("no GPU: the share of the augmentation in a step on one is left out (on the CPU: benchmarks/step.py)")


if __name__ == "__main__":
    main()
