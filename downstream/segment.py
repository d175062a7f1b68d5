"""Semantic segmentation with a pre-trained ResNet: FCN-16s in MoCo's form; in a minute on drawn scenes.

    python -m downstream.segment runs/byol-shapes                    fine-tune everything
    python -m downstream.segment runs/byol-shapes --frozen           the ResNet stays as it is
    python -m downstream.segment random:resnet10_16 --frozen         the baseline that every number stands beside
    python -m downstream.segment RUN --data DIR                      a folder with images/ and masks/ (PNGs of classes)
    torchrun --standalone --nproc_per_node=8 -m downstream.segment RUN --data voc12 --root DIR

    image -> conv1 ... layer4 (stride 1, dilation 2) -> 2 x (3x3 of dilation 6, BatchNorm, ReLU) -> 1x1 -> enlarged

    differences     MoCo, appendix A.5                 here
    upsampling      not said                           bilinear to the size of the image
    scenes          -                                  64 px, 64 channels of dilation 2, AdamW (with SGD: docs)

mIoU is over all test pixels with a class, of the images at their own size. The same command goes on where it was
stopped. OUT has checkpoint.pt, metrics.jsonl, evaluate.json, segmentation.png.
"""

import colorsys

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf
from torchvision.utils import draw_segmentation_masks, make_grid

import common
import data
import evaluate
import loop
import optim
import parallel
from downstream import annotated, dense, metrics

METHOD = "segment"

# ============ recipes: what is also a flag is its default ============

RECIPES = {
    "scenes": dict(optimizer="adamw", lr=3e-3, updates=250, batch_size=16, crop=64, scale=(1.0, 1.0), width=64,
                   dilation=2, warmup=31, drop_at=(0.7, 0.9), built_for=32),  # ours, for a minute on a CPU
    "voc12": dict(optimizer="sgd", lr=0.003, updates=30_000, batch_size=16, crop=513, scale=(0.5, 2.0), width=256,
                  dilation=6, warmup=0, drop_at=(0.7, 0.9), built_for=224),  # MoCo, A.5
    "cityscapes": dict(optimizer="sgd", lr=0.01, updates=90_000, batch_size=16, crop=769, scale=(0.5, 2.0), width=256,
                       dilation=6, warmup=0, drop_at=(0.7, 0.9), built_for=224),  # MoCo, A.5
}  # fmt: skip
RECIPES["scenes-hard"] = RECIPES["scenes"]
RECIPES["folder"] = RECIPES["voc12"] | dict(lr=0.01, updates=2_000, batch_size=8, crop=257, warmup=100)  # ours
OPTIMIZERS = {"sgd": lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9, weight_decay=1e-4),
              "adamw": lambda params, lr: torch.optim.AdamW(params, lr, weight_decay=1e-4)}  # fmt: skip


def parse_args(argv=None):
    return dense.parse(dense.flags(__doc__, RECIPES), METHOD, RECIPES, argv)


# ============ the network ============


def dilate(layer):
    """Stride 1 for the stage `layer`, and dilation 2 for its 3x3 convolutions: as many weights, maps twice as large.
    torchvision's BasicBlock refuses it."""
    for m in layer.modules():
        if isinstance(m, nn.Conv2d):
            m.stride = (1, 1)
            if m.kernel_size == (3, 3):
                m.dilation = m.padding = (2, 2)


class FCN(nn.Module):
    """Images [B, 3, H, W] in [0, 1] to logits [B, C, H, W]."""

    def __init__(self, net, preprocess, classes, width, dilation):
        super().__init__()
        self.f, self.mean, self.std = net, preprocess["mean"], preprocess["std"]
        dilate(net.layer4)
        layers = []
        for inputs in (net.channels, width):
            conv = nn.Conv2d(inputs, width, 3, padding=dilation, dilation=dilation, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.head = nn.Sequential(*layers, nn.Conv2d(width, classes, 1))

    def forward(self, x):
        logits = self.head(self.f.stages(data.normalize(x, self.mean, self.std))[-1])
        return F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=False)


def pixel_loss(logits, classes):
    """Cross-entropy, mean over the pixels that count. logits [B, C, H, W], classes uint8 [B, H, W]."""
    counted = (classes != 255).sum().clamp(min=1)
    return F.cross_entropy(logits, classes.long(), ignore_index=255, reduction="sum") / counted


def train_mode(model, frozen):
    """Train mode; what is frozen stays in eval mode, so that its running averages stay, too."""
    model.train()
    if frozen:
        model.f.eval().requires_grad_(False)


# ============ images ============


def crop(image, target, g, size, scale):
    """Image and classes enlarged by a factor drawn from `scale`, cropped to `size` px, mirrored half of the time. What
    lies beyond the image is black and not counted."""
    mask = target["semantic"][None]
    factor = float(torch.empty(()).uniform_(*scale, generator=g))
    if factor != 1:
        wanted = [max(1, round(n * factor)) for n in image.shape[1:]]
        image = tvf.resize(image, wanted, antialias=True)
        mask = tvf.resize(mask, wanted, InterpolationMode.NEAREST_EXACT)
    height, width = image.shape[1:]
    right, down = max(0, size - width), max(0, size - height)
    image, mask = F.pad(image, (0, right, 0, down)), F.pad(mask, (0, right, 0, down), value=255)
    y, x = (int(torch.randint(n - size + 1, (), generator=g)) for n in mask.shape[1:])
    image, mask = image[:, y : y + size, x : x + size], mask[0, y : y + size, x : x + size]
    if torch.rand((), generator=g) < 0.5:
        image, mask = image.flip(2), mask.flip(1)
    return image, {"semantic": mask}


def picture(shown, classes, side=160):
    """Images (above), their classes, and what is predicted (below); [(image, truth, prediction)]. Class 0 has no
    color."""
    colors = [tuple(int(255 * c) for c in colorsys.hsv_to_rgb(i / (classes - 1), 1, 1)) for i in range(classes - 1)]
    rows = [dense.tile(image, side).byte() for image, _, _ in shown]
    for at in (1, 2):
        for large, found in zip(rows[: len(shown)], shown, strict=False):
            numbers = dense.tile(found[at][None], side)
            masks = numbers == torch.arange(1, classes)[:, None, None]
            rows.append(draw_segmentation_masks(large, masks, 0.7, colors))
    return make_grid(torch.stack(rows).float() / 255, nrow=len(shown), pad_value=1)


@torch.no_grad()
def test_model(model, test, classes, workers, device):
    """(confusion matrix of all test images, the first eight of rank 0 for the picture). Collective."""
    model.eval()
    parallel.same_buffers(model)
    matrix, shown = torch.zeros(classes, classes, dtype=torch.int64, device=device), []
    for _, [(image, target)] in annotated.test_batches(test, 1, workers):  # of their own sizes
        predicted = model(image[None].to(device) / 255).argmax(1)[0]
        matrix += metrics.confusion(predicted, target["semantic"].to(device), classes)
        if len(shown) < 8:
            shown.append((image, target["semantic"], predicted.cpu()))
    return common.all_reduce(matrix).cpu(), shown


# ============ the run ============


def main(argv=None):
    args, r = parse_args(argv)
    rank, _, device = common.setup(args.device)
    torch.backends.cudnn.benchmark = False  # test images have sizes of their own

    # ============ data ============
    train, test = annotated.segmentation(args)
    change = lambda image, target, g: crop(image, target, g, r["crop"], r["scale"])
    loader = annotated.Loader(train, args.batch_size, args.seed, args.workers, change, device)
    classes = len(train.classes)

    # ============ model ============
    net, preprocess, weights = dense.open_resnet(args, r["built_for"])
    torch.manual_seed(args.seed)  # the same new layers on every rank
    model = FCN(net, preprocess, classes, r["width"], r["dilation"]).to(device)
    train_mode(model, args.frozen)
    ddp = dense.distributed(model, device)
    optimizer = OPTIMIZERS[r["optimizer"]]([p for p in model.parameters() if p.requires_grad], args.lr)

    # ============ run: print the recipe, go on from a checkpoint ============
    run = loop.Loop(METHOD, args, {"model": model, "optimizer": optimizer}, loader, args.updates)
    run.say(f"{args.checkpoint} on {train.name}: {len(train)} images, {len(test)} to test, {classes} classes")
    run.say(f"FCN-16s, ResNet {'frozen' if args.frozen else 'trained'}; {dense.millions(model)} M parameters")
    run.say(f"recipe {args.recipe}, seed {args.seed}: {run.total} updates of {args.batch_size}, lr {args.lr:g}, fp32")
    if not run.begin(weights=weights, network=r):
        return

    # ============ training ============
    while run.is_training():
        for step in run.epoch():
            lr_now = optim.rate(step, run.total, args.lr, min(r["warmup"], run.total // 2), r["drop_at"])
            for group in optimizer.param_groups:
                group["lr"] = lr_now
            images, targets = zip(*next(run.batches), strict=True)
            there = lambda xs: torch.stack([x.to(device, non_blocking=True) for x in xs])
            logits = ddp(there(images) / 255)
            loss = pixel_loss(logits, there([target["semantic"] for target in targets]))
            loss.backward()
            run.log.loss += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            run.end_step(lr_now)
        run.save()
    if run.stopped:
        return common.STOPPED

    # ============ test ============
    matrix, shown = test_model(model, test, classes, loader.workers, device)
    result = None
    if rank == 0:
        mean, each = metrics.mean_iou(matrix)
        numbers = {"mIoU": mean, "mIoU_objects": each[1:].nanmean().item()}
        numbers["pixels"] = 100 * (matrix.diagonal().sum() / matrix.sum()).item()
        run.log.record("eval", run.step, **numbers)
        run.log.image("segmentation", picture(shown, classes), run.step)
        run.log.writer.close()
        pairs = zip(train.classes, each.tolist(), strict=True)
        ious = {name: round(value, 2) for name, value in pairs if value == value}  # not nan
        evaluate.write_json(args.out, train.name, {"segmentation": numbers | {"classes": ious, "frozen": args.frozen}})
        result = f"segment {train.name}: " + " ".join(f"{k} {v:.1f}" for k, v in numbers.items()) + f" ({args.out})"
        print(f"IoU of all test pixels, mean over classes (objects: but class 0); pixels: part that is right\n{result}")
    run.save(result)


if __name__ == "__main__":
    common.run(main)
