"""Object detection with a pre-trained ResNet: Faster R-CNN with C4 or FPN, Mask R-CNN; in minutes on drawn scenes.

    python -m downstream.detect runs/byol-shapes                     fine-tune everything
    python -m downstream.detect runs/byol-shapes --frozen            conv1 to layer3 stay as they are
    python -m downstream.detect random:resnet10_16 --frozen          the baseline that every number stands beside
    python -m downstream.detect RUN --data DIR --mask                a folder in COCO's format, with instance masks
    torchrun --standalone --nproc_per_node=8 -m downstream.detect RUN --data voc0712 --root DIR

    C4     image -> conv1 ... layer3 -> RPN -> RoIAlign -> layer4 -> BatchNorm -> mean -> class and box
    FPN    image -> conv1 ... layer4 -> pyramid with BatchNorm -> RPN -> RoIAlign -> two layers -> class and box (mask)

    differences     MoCo's code (detectron2)               here
    box losses      L1                                     the same: torchvision's smooth L1 is replaced
    RoIAlign        aligned, half a pixel                  the same: torchvision's is not aligned, which is replaced
    masks at test   pasted at the exact box                at the box in whole pixels (torchvision's)
    anchors         as they are                            in whole pixels (torchvision's)
    masks in train  cut at the box, yes or no a pixel      cut at the box, shares of pixels (torchvision's)
    new layers      normal, .01 and .001                   torch's default
    resizing        antialiased                            not (torchvision's)
    batches         images of similar aspect ratio         any, padded to the largest
    warm-up         from lr / 1000                         from 0
    VOC's figures   scores rounded to .001, boxes to .1    as they are
    scenes          -                                      64 px, a hundredth of the network, COCO's AP

The same command goes on where it was stopped. OUT has checkpoint.pt, metrics.jsonl, evaluate.json, detections.png.
"""

import functools
import itertools
import types

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, MaskRCNN, roi_heads, rpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign, poolers, roi_align
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

import common
import evaluate
import loop
import optim
import parallel
import sets
from downstream import annotated, dense, metrics

METHOD = "detect"
NAMES = {"boxes": "detection", "masks": "instances"}  # in evaluate.json

# ============ recipes: what is also a flag is its default ============

# What a network is made of: anchors in px (FPN: one for each map); px of a RoI, at `sampling` squared points each (0:
# as many as fit); RoIs and anchors an image in the losses; proposals before and after NMS, in training and in testing;
# FPN: its width, that of the box head, and the map (of stride 2^level) for boxes of so many px; px of an image's sides.
SMALL = dict(
    anchors=dict(c4=((14, 20, 26),), fpn=((8,), (14,), (20,), (26,), (32,))), pool=dict(c4=8, fpn=7), sampling=2,
    rois=32, rpn=32, proposals=dict(c4=(128, 64, 128, 64), fpn=(128, 64, 128, 64)), width=64, hidden=256, level=(20, 2),
    short=(64,), long=64,
)  # fmt: skip
FULL = dict(
    anchors=dict(c4=((32, 64, 128, 256, 512),), fpn=((32,), (64,), (128,), (256,), (512,))), pool=dict(c4=14, fpn=7),
    sampling=0, rois=512, rpn=256, proposals=dict(c4=(12000, 2000, 6000, 1000), fpn=(2000, 1000, 1000, 1000)),
    width=256, hidden=1024, level=(224, 4), short=tuple(range(480, 801, 32)), long=1333,
)  # fmt: skip
RECIPES = {
    # Ours, for minutes on a CPU: objects of 32 px as in pre-training, drops as in `voc0712`.
    "scenes": SMALL | dict(head="c4", updates=250, batch_size=16, lr=0.02, warmup=31, norms=20, rules="coco",
                           drop_at=(18 / 24, 22 / 24), built_for=32),
    # MoCo's code, configs/pascal_voc_R_50_C4_24k_moco.yaml and Base-RCNN-C4-BN.yaml.
    "voc0712": FULL | dict(head="c4", updates=24_000, batch_size=16, lr=0.02, warmup=100, norms=200, rules="voc",
                           drop_at=(18 / 24, 22 / 24), built_for=224),
    # SaGe, "following MoCo": mmselfsup, coco_R_50_FPN_1x.yaml and Base-RCNN-FPN.yaml.
    "coco": FULL | dict(head="fpn", updates=90_000, batch_size=16, lr=0.02, warmup=1000, norms=200, rules="coco",
                        drop_at=(60 / 90, 80 / 90), short=tuple(range(640, 801, 32)), built_for=224),
}  # fmt: skip
RECIPES["scenes-hard"] = RECIPES["scenes"]
RECIPES["voc07"] = RECIPES["voc0712"] | dict(updates=9_000)  # DiLo; where its rate drops is not said
RECIPES["coco-2x"] = RECIPES["coco"] | dict(updates=180_000)
# Ours, for some hundred photographs of 320 px and a ResNet-18.
RECIPES["folder"] = RECIPES["coco"] | dict(
    anchors=dict(c4=((16, 32, 64, 128, 256),), fpn=((16,), (32,), (64,), (128,), (256,))), sampling=2, rois=64, rpn=64,
    proposals=dict(c4=(1000, 200, 1000, 200), fpn=(500, 200, 500, 200)), width=128, hidden=512, level=(112, 4),
    short=(320,), long=320, updates=1_000, batch_size=8, warmup=100, norms=50,
)  # fmt: skip


def parse_args(argv=None):
    p = dense.flags(__doc__, RECIPES)
    p.add_argument("--head", choices=("c4", "fpn"), help="c4: layer4 looks at each box; fpn: a pyramid of all stages")
    p.add_argument("--mask", action="store_true", help="Mask R-CNN, which also segments (fpn)")
    args, recipe = dense.parse(p, METHOD, RECIPES, argv)
    if args.mask and args.head == "c4":
        common.fail("--mask needs --head fpn")
    return args, recipe


# ============ the detector ============


def like_detectron2():
    """torchvision's detectors with L1 for its smooth L1 (beta 1/9), and RoIAlign half a pixel up and left."""
    l1 = lambda x, y, beta, reduction: F.l1_loss(x, y, reduction=reduction)
    roi_heads.F = rpn.F = types.SimpleNamespace(**vars(F) | {"smooth_l1_loss": l1})
    poolers.roi_align = roi_heads.roi_align = functools.partial(roi_align, aligned=True)


def build(net, preprocess, classes, head, mask, r):
    """The detector of the ResNet `net` with the numbers of the recipe `r`. C4: layer4 is the box head and a BatchNorm
    follows it, as in MoCo's code."""
    pool, anchors, proposals = (r[name][head] for name in ("pool", "anchors", "proposals"))
    if head == "c4":
        trunk, maps = IntermediateLayerGetter(net, {"layer3": "0"}), ["0"]
        trunk.out_channels, features = net.channels // 2, net.channels
        box_head = nn.Sequential(net.layer4, nn.BatchNorm2d(features), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    else:
        maps, features = ["0", "1", "2", "3"], r["hidden"]
        widths, layers = [net.channels // 2**i for i in (3, 2, 1, 0)], {f"layer{i + 1}": str(i) for i in range(4)}
        trunk = BackboneWithFPN(net, layers, widths, r["width"], norm_layer=nn.BatchNorm2d)
        box_head = TwoMLPHead(r["width"] * pool**2, features)
    scale, level = r["level"]  # a box of so many px is looked at in the map of stride 2^level
    rois = lambda size: MultiScaleRoIAlign(maps, size, r["sampling"], canonical_scale=scale, canonical_level=level)
    masks = {}
    if mask:
        layers, predictor = MaskRCNNHeads(r["width"], (r["width"],) * 4, 1), MaskRCNNPredictor
        masks = {"mask_roi_pool": rois(14), "mask_head": layers}
        masks["mask_predictor"] = predictor(r["width"], r["width"], classes + 1)
    return (MaskRCNN if mask else FasterRCNN)(
        trunk, rpn_anchor_generator=AnchorGenerator(anchors, ((0.5, 1.0, 2.0),) * len(anchors)),
        rpn_pre_nms_top_n_train=proposals[0], rpn_post_nms_top_n_train=proposals[1],
        rpn_pre_nms_top_n_test=proposals[2], rpn_post_nms_top_n_test=proposals[3],
        rpn_batch_size_per_image=r["rpn"], box_batch_size_per_image=r["rois"], box_roi_pool=rois(pool),
        box_head=box_head, box_predictor=FastRCNNPredictor(features, classes + 1),
        image_mean=preprocess["mean"], image_std=preprocess["std"], min_size=r["short"], max_size=r["long"],
        **masks,
    )  # fmt: skip


def train_mode(model, net, frozen):
    """Train mode; what is frozen stays in eval mode, so that its running averages stay, too."""
    model.train()
    for name in ("conv1", "bn1", "layer1", "layer2", "layer3") if frozen else ():
        getattr(net, name).eval().requires_grad_(False)


def param_groups(model, weight_decay=1e-4):
    """Weight decay on all parameters but those of norms, as in detectron2."""
    kinds = nn.modules.batchnorm._BatchNorm, nn.GroupNorm
    norms = {p for m in model.modules() if isinstance(m, kinds) for p in m.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p not in norms]
    return [{"params": decayed, "weight_decay": weight_decay},
            {"params": [p for p in trained if p in norms], "weight_decay": 0.0}]  # fmt: skip


@torch.no_grad()
def recompute_norms(model, batches):
    """The running averages of the norms that are trained, anew over `batches` ("precise BN" of detectron2)."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    momentum = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # the mean of all batches
    for batch in batches:
        model(*batch)
    for m, before in zip(norms, momentum, strict=True):
        m.momentum = before


# ============ images ============


def flipped(image, target):
    """The mirror image: a box from x1 to x2 goes from W - x2 to W - x1."""
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = image.shape[-1] - boxes[:, [2, 0]]
    target = target | {"boxes": boxes} | ({"masks": target["masks"].flip(-1)} if "masks" in target else {})
    return image.flip(-1), target


def change(image, target, g):
    return flipped(image, target) if torch.rand((), generator=g) < 0.5 else (image, target)


def prepared(batch, mask, device):
    """(images in [0, 1], targets) as torchvision's detectors take them; labels from 1, 0 is background."""
    move = lambda x: x.to(device, non_blocking=True)
    wanted = lambda t: {"boxes": move(t["boxes"]), "labels": move(t["labels"] + 1)}
    masks = lambda t: {"masks": move(t["masks"]).byte()} if mask else {}
    images, targets = zip(*batch, strict=True)
    return [move(image) / 255 for image in images], [wanted(t) | masks(t) for t in targets]


def picture(shown, classes, side=192):
    """Images with their objects (above) and what is found with a score above 0.5 (below); [(image, truth, found)]."""
    tiles = []
    for image, truth, found in shown:
        sure = found["scores"] > 0.5
        for objects in (truth, {k: v[sure] for k, v in found.items()}):
            drawn, names = dense.tile(image, side).byte(), [classes[label] for label in objects["labels"].tolist()]
            if names and "masks" in found:
                drawn = draw_segmentation_masks(drawn, dense.tile(objects["masks"], side) > 0, 0.5)
            if names:
                scale = side / max(image.shape[1:])
                drawn = draw_bounding_boxes(drawn, scale * objects["boxes"], names, "white")
            tiles.append(drawn)
    return make_grid(torch.stack(tiles[::2] + tiles[1::2]).float() / 255, nrow=len(shown), pad_value=1)


# ============ the test ============


@torch.no_grad()
def detect(model, test, batch_size, workers, device, rules, kinds, collect):
    """What `metrics.matched` says of each image, for each of the `kinds`, [{kind: ...}]; the first eight of rank 0 for
    the picture; COCO's results, if these are to be collected. Collective: each rank looks at its share."""
    model.eval()
    parallel.same_buffers(model)
    matches, shown, results = [], [], []
    for places, batch in annotated.test_batches(test, batch_size, workers):
        answers = model([image.to(device) / 255 for image, _ in batch])
        for place, (image, truth), found in zip(places, batch, answers, strict=True):
            found = {k: v.cpu() for k, v in found.items()} | {"labels": found["labels"].cpu() - 1}
            if "masks" in found:
                found["masks"] = found["masks"][:, 0] > 0.5
            shown += [(image, truth, found)] * (len(shown) < 8)
            if collect:
                results += metrics.coco_results(found, test.ids[test.items[place][0]], test.categories)
            matches.append({kind: metrics.matched(found, truth, rules, kind) for kind in kinds})
    if dist.is_initialized():
        dist.all_gather_object(parts := [None] * common.world_size(), (matches, results))
        matches, results = (list(itertools.chain(*kind)) for kind in zip(*parts, strict=True))
    return matches, shown, results


# ============ the run ============


def main(argv=None):
    args, r = parse_args(argv)
    rank, _, device = common.setup(args.device)
    torch.backends.cudnn.benchmark = False  # nearly every batch has shapes of its own
    like_detectron2()

    # ============ data ============
    train, test = annotated.detection(args, args.mask)
    loader = annotated.Loader(train, args.batch_size, args.seed, args.workers, change, device)

    # ============ model ============
    net, preprocess, weights = dense.open_resnet(args, r["built_for"])
    torch.manual_seed(args.seed)  # the same new layers on every rank
    model = build(net, preprocess, len(train.classes), args.head, args.mask, r).to(device)
    train_mode(model, net, args.frozen)
    ddp = dense.distributed(model, device)
    optimizer = torch.optim.SGD(param_groups(model), args.lr, momentum=0.9)

    # ============ run: print the recipe, go on from a checkpoint ============
    run = loop.Loop(METHOD, args, {"model": model, "optimizer": optimizer}, loader, args.updates)
    network = f"{'Mask' if args.mask else 'Faster'} R-CNN, {args.head}"
    run.say(f"{args.checkpoint} on {train.name}: {len(train)} images, {len(test)} to test")
    run.say(f"{network}, {dense.millions(model)} M parameters{', conv1 to layer3 frozen' * args.frozen}")
    run.say(f"recipe {args.recipe}, seed {args.seed}: {run.total} updates of {args.batch_size}, lr {args.lr:g}, fp32")
    if not run.begin(weights=weights, network=r):
        return

    # ============ training ============
    while run.is_training():
        for step in run.epoch():
            lr_now = optim.rate(step, run.total, args.lr, min(r["warmup"], run.total // 2), r["drop_at"])
            for group in optimizer.param_groups:
                group["lr"] = lr_now
            batch = prepared(next(run.batches), args.mask, device)
            g = sets.generator(args.seed, step, rank)
            torch.manual_seed(g.initial_seed())  # of the sampling of anchors and RoIs, and of sizes
            losses = ddp(*batch)
            loss = sum(losses.values())
            loss.backward()
            run.log.loss += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            run.end_step(lr_now, **{k.removeprefix("loss_"): v.detach() for k, v in losses.items()})
        run.save()
    if run.stopped:
        return common.STOPPED

    # ============ test ============
    torch.manual_seed(args.seed)  # again the sampling
    batches = loader.epoch(run.total)  # of an epoch that is not trained on
    recompute_norms(model, (prepared(batch, args.mask, device) for batch in itertools.islice(batches, r["norms"])))
    kinds = ["boxes"] + ["masks"] * args.mask
    file = metrics.has_official() and test.file
    matches, shown, results = detect(model, test, loader.batch_size, loader.workers, device, r["rules"], kinds, file)
    words, numbers, result = [], {}, None
    if rank == 0:
        for kind in kinds:
            ap = metrics.mean_ap([match[kind] for match in matches], r["rules"])
            ap["classes"] = {test.classes[label]: round(value, 2) for label, value in ap["classes"].items()}
            if file:
                ap["official"] = metrics.official(file, results, [test.ids[path] for path, _ in test.items], kind)
                run.say(f"COCO's own code, {kind}: " + ", ".join(f"{k} {v:.2f}" for k, v in ap["official"].items()))
            three = {k: ap[k] for k in ("AP", "AP50", "AP75")}
            run.log.record("eval", run.step, **{f"{kind}_{k}": v for k, v in three.items()})
            words += [f"{kind} " * args.mask + " ".join(f"{k} {v:.1f}" for k, v in three.items())]
            numbers[NAMES[kind]] = ap | {"frozen": args.frozen}
        evaluate.write_json(args.out, train.name, numbers)
        run.log.image("detections", picture(shown, test.classes), run.step)
        run.log.writer.close()
        points = {"coco": "COCO's AP (101 recalls)", "voc": "VOC 2007's AP (11 recalls)"}[r["rules"]]
        run.say(f"{points}, mean over the IoU of .50 to .95; at most 100 boxes an image")
        result = f"detect {train.name}: {' '.join(words)} ({args.out})"
        print(result)
    run.save(result)


if __name__ == "__main__":
    common.run(main)
