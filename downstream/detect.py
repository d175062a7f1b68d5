"""Object detection with a pre-trained ResNet: Faster R-CNN in MoCo's C4 form, trained on drawn scenes in minutes.

    python -m downstream.detect runs/byol-shapes                     fine-tune everything
    python -m downstream.detect runs/byol-shapes --frozen            conv1 to layer3 stay as they are
    python -m downstream.detect random:resnet10_16 --frozen          the baseline that every number stands beside
    torchrun --standalone --nproc_per_node=2 -m downstream.detect runs/byol-shapes

    image -> conv1 ... layer3 -> RPN -> RoIAlign -> layer4 -> BatchNorm -> mean -> class and box (He et al. 2020, A.1)

    differences     MoCo's code (detectron2)                 here
    images          VOC, short side 480 to 800 px            scenes of 64 px (shapes.draw_scenes), flips
    RoIAlign, RoIs  14 x 14 -> 7 x 7, 512 an image           8 x 8 -> 4 x 4, 32 an image
    anchors         32 to 512 px, 3 ratios                   14, 20, 26 px, 3 ratios
    box losses      L1                                       smooth L1, beta 1/9 (torchvision's)
    RoIAlign's grid aligned, half a pixel                    not aligned (torchvision's)
    updates         24,000 of 16 images, x 0.1 at 75, 92 %   250 of 16 scenes, x 0.1 at 75 and 92 %
    AP              VOC's 11 recalls                         COCO's 101 recalls (downstream/metrics.py has both)

The same command goes on where it was stopped. OUT has checkpoint.pt, metrics.jsonl, evaluate.json, detections.png.
"""

import argparse
import functools
import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from torchvision.utils import draw_bounding_boxes, make_grid

import backbones
import checkpoints
import common
import data
import evaluate
import runs
import shapes
from downstream import metrics

SIZE, TRAIN_SEED, TEST_SEED, TEST_SCENES = 64, 10, 11, 300  # px; lists of draw_scenes unlike those of pre-training


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=common.Help, allow_abbrev=False)
    p.add_argument("checkpoint", help="a run folder, its backbone.pt, or random:ARCH; a ResNet")
    p.add_argument("--frozen", action="store_true", help="do not train conv1 to layer3")
    p.add_argument("--hard", action="store_true", help="scenes whose objects come from shapes-hard")
    p.add_argument("--limit", type=int, default=500, help="scenes to train on")
    p.add_argument("--updates", type=int, default=250, help="the schedule stretches with it")
    p.add_argument("--batch-size", type=int, default=16, help="scenes per update, over all ranks")
    p.add_argument("--lr", type=float, default=0.02, help="of SGD with momentum 0.9; warm-up over an eighth")
    p.add_argument("--seed", type=int, default=0, help="of the new layers, order, flips and sampling of RoIs")
    p.add_argument("--out", help="run folder (default: runs/detect-NAME)")
    p.add_argument("--fresh", action="store_true", help="delete the run in --out and start over")
    p.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda, else cpu")
    p.add_argument("--log-every", type=int, default=10, help="updates between log lines")
    args = p.parse_args(argv)
    common.at_least(1, args, "limit", "updates", "batch_size", "log_every")
    common.at_least(0, args, "lr", "seed")
    name = Path(args.checkpoint).resolve().name if not args.checkpoint.startswith("random:") else args.checkpoint[7:]
    args.out = args.out or f"runs/detect-{name.removesuffix('.pt')}{'-frozen' * args.frozen}"
    return args


# ============ the detector ============


def build(net, preprocess, classes):
    """Faster R-CNN of the ResNet `net`: its layer4 is the box head (C4). A BatchNorm follows layer4 (MoCo's code)."""
    body = IntermediateLayerGetter(net, {"layer3": "0"})
    body.out_channels = net.channels // 2
    head = nn.Sequential(net.layer4, nn.BatchNorm2d(net.channels), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return FasterRCNN(
        body, rpn_anchor_generator=AnchorGenerator(((14, 20, 26),), ((0.5, 1.0, 2.0),)),
        rpn_pre_nms_top_n_train=128, rpn_post_nms_top_n_train=64,
        rpn_pre_nms_top_n_test=128, rpn_post_nms_top_n_test=64,
        rpn_batch_size_per_image=32, box_batch_size_per_image=32, box_roi_pool=MultiScaleRoIAlign(["0"], 8, 2),
        box_head=head, box_predictor=FastRCNNPredictor(net.channels, classes + 1),
        image_mean=preprocess["mean"], image_std=preprocess["std"], min_size=SIZE, max_size=SIZE,
    )  # fmt: skip


def train_mode(model, frozen):
    """Train mode; what is frozen stays in eval mode, so that its running averages stay, too."""
    model.train()
    if frozen:
        model.backbone.eval().requires_grad_(False)


def param_groups(model, weight_decay=1e-4):
    """Weight decay on all parameters but those of norms, as in detectron2."""
    norms = {p for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p not in norms]
    return [{"params": decayed, "weight_decay": weight_decay},
            {"params": [p for p in trained if p in norms], "weight_decay": 0.0}]  # fmt: skip


def rate_at(step, total, lr):
    """Linear from 1/1000 over an eighth, then a tenth at 75 % and at 92 % (18,000 and 22,000 of 24,000 updates)."""
    warmup = total // 8
    if step < warmup:
        return lr * (0.001 + 0.999 * step / warmup)
    return lr * 0.1 ** ((step >= 0.75 * total) + (step >= 0.92 * total))


# ============ data ============


def flipped(image, target):
    """The mirror image of a scene: a box from x1 to x2 goes from W - x2 to W - x1."""
    boxes, width = target["boxes"].clone(), image.shape[-1]
    boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    return image.flip(-1), target | {"boxes": boxes}


def batch(images, targets, rows, g, device):
    """Scenes `rows` as the detector takes them, each flipped with probability 0.5; labels from 1, 0 is background."""
    pairs = []
    for i, flip in zip(rows.tolist(), (torch.rand(len(rows), generator=g) < 0.5).tolist(), strict=True):
        target = {"boxes": targets[i]["boxes"], "labels": targets[i]["labels"] + 1}
        image, target = flipped(images[i], target) if flip else (images[i], target)
        pairs.append((image.to(device) / 255, {k: v.to(device) for k, v in target.items()}))
    return map(list, zip(*pairs, strict=True))


@functools.lru_cache(1)
def order(n, seed, epoch):
    return torch.randperm(n, generator=data.generator(seed, "order", epoch))


def rows_at(step, n, batch_size, seed):
    """The scenes of update `step`, of all ranks: permutations of all, one after the other; the last batch is full."""
    places = torch.arange(step * batch_size, (step + 1) * batch_size)
    return torch.stack([order(n, seed, int(p) // n)[int(p) % n] for p in places])


# ============ the test ============


@torch.no_grad()
def detect(model, images, device, batch_size=50):
    """What the detector finds in each image: [{"boxes", "scores", "labels" from 0}], on the CPU. Collective: each rank
    looks at its share."""
    model.eval()
    rank, world, found = common.rank(), common.world_size(), []
    if world > 1:  # BatchNorm's averages differ by rank; those of rank 0 are in the checkpoint
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    share = math.ceil(len(images) / world)
    for part in images[rank * share : (rank + 1) * share].split(batch_size):
        found += [{k: v.cpu() for k, v in f.items()} for f in model([x.to(device) / 255 for x in part])]
    if world > 1:
        dist.all_gather_object(parts := [None] * world, found)
        found = [f for part in parts for f in part]
    return [f | {"labels": f["labels"] - 1} for f in found]


def picture(images, targets, found, n=8):
    """The first n scenes with their boxes (above) and those found with a score above 0.5 (below)."""
    rows = []
    for boxes_of in (lambda i: targets[i], lambda i: {k: v[found[i]["scores"] > 0.5] for k, v in found[i].items()}):
        for i in range(min(n, len(images))):
            large, boxes = images[i].repeat_interleave(3, 1).repeat_interleave(3, 2), boxes_of(i)
            names = [shapes.CLASSES[label] for label in boxes["labels"].tolist()]
            rows.append(draw_bounding_boxes(large, 3 * boxes["boxes"], names, "white") if names else large)
    return make_grid(torch.stack(rows).float() / 255, nrow=n, pad_value=1)


# ============ the run ============


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = common.setup(args.device)
    if args.batch_size % world:
        common.fail(f"--batch-size {args.batch_size} is not a multiple of {world} ranks")

    # ============ data ============
    images, targets, _ = shapes.draw_scenes(args.limit, SIZE, TRAIN_SEED, hard=args.hard)
    test_images, test_targets, _ = shapes.draw_scenes(TEST_SCENES, SIZE, TEST_SEED, hard=args.hard)

    # ============ model ============
    size = SIZE // 2 if args.checkpoint.startswith("random:") else 0  # px of an object: the stem for small images
    backbone, preprocess, *_ = checkpoints.open_backbone(args.checkpoint, None, size, args.seed)
    if not isinstance(backbone, backbones.ResNet):
        common.fail(f"{args.checkpoint} is not a ResNet that takes plain RGB images, which the C4 detector is made of")
    torch.manual_seed(args.seed)  # the same new layers on every rank
    model = build(backbone, preprocess, len(shapes.CLASSES)).to(device)
    train_mode(model, args.frozen)
    ddp = model
    if world > 1:
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        ddp = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    optimizer = torch.optim.SGD(param_groups(model), args.lr, momentum=0.9)

    # ============ run: go on from a checkpoint ============
    name, per_rank = f"scenes{'-hard' * args.hard}", args.batch_size // world
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "fresh", "device", "log_every")}
    states = {"model": model, "optimizer": optimizer}
    step, result = runs.resume(args.out, "detect", settings, states, args.fresh)
    if result:
        if rank == 0:
            print(f"{args.out} is finished; --fresh starts over\n{result}")
        return

    def save(result=None):
        if rank == 0:
            head = {"method": "detect", "settings": settings, "step": step, "result": result}
            runs.save(args.out, head | {k: state.state_dict() for k, state in states.items()})

    if step == 0:
        save()
    log = runs.Log(args.out, "detect", step, args.updates, args.batch_size, f"{settings}")
    trained = "layer4 and heads" if args.frozen else "all layers"
    log.say(f"{args.checkpoint} on {name}: {trained}, {args.updates} updates of {args.batch_size}")
    log.say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; {len(test_images)} test scenes")

    # ============ training ============
    caught, stopped = common.catch_signals(), False
    while step < args.updates and not stopped:
        lr = rate_at(step, args.updates, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        rows = rows_at(step, len(images), args.batch_size, args.seed)[rank * per_rank : (rank + 1) * per_rank]
        g = data.generator(args.seed, "flip", step, rank)
        torch.manual_seed(g.initial_seed())  # of the sampling of anchors and RoIs
        losses = ddp(*batch(images, targets, rows, g, device))
        loss = sum(losses.values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        log.loss += loss.detach()
        step, stopped = step + 1, common.any_rank(caught)
        if step % args.log_every == 0 or step == args.updates or stopped:
            log.train(step, lr, False, **{k.removeprefix("loss_"): v.detach() for k, v in losses.items()})
        if step % max(1, args.updates // 10) == 0 or stopped:
            save()
    if stopped:
        log.say(f"stopped by a signal at update {step}; the same command goes on from here")
        return common.STOPPED
    common.end_at_signals()

    # ============ test ============
    found = detect(model, test_images, device)
    if rank == 0:
        ap = metrics.detection_ap(found, test_targets)
        classes = {shapes.CLASSES[label]: round(value, 2) for label, value in ap.pop("classes").items()}
        log.record("eval", step, **ap)
        log.image("detections", picture(test_images, test_targets, found), step)
        evaluate.write_json(args.out, name, {"detection": ap | {"classes": classes, "frozen": args.frozen}})
        log.writer.close()
        result = f"detect {name}: AP {ap['AP']:.1f} AP50 {ap['AP50']:.1f} AP75 {ap['AP75']:.1f} ({args.out})"
        save(result)
        log.say(f"COCO's AP on un-augmented scenes, at most 100 boxes an image\n{result}")


if __name__ == "__main__":
    common.run(main)
