"""What detect.py and segment.py share: flags, the backbone, several processes."""

import argparse
import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F

import backbones
import checkpoints
import common
import parallel


def flags(doc, recipes):
    p = argparse.ArgumentParser(description=doc, formatter_class=common.Help, allow_abbrev=False)
    p.add_argument("checkpoint", help="a run folder, its backbone.pt, a plain state dict, or random:ARCH; a ResNet")
    names = ", ".join(name for name in recipes if name != "folder")
    p.add_argument("--data", default="scenes", help=f"a folder, or one of {names}")
    p.add_argument("--recipe", choices=recipes, help="preset of hyper-parameters (default: by --data)")
    p.add_argument("--root", default="datasets", help="where named sets live")
    p.add_argument("--arch", help="the architecture of a plain state dict")
    p.add_argument("--frozen", action="store_true", help="leave conv1 to layer3 (segment: layer4, too) as they are")
    p.add_argument("--limit", type=int, default=0, help="train on N images (0: all; 500 scenes)")
    p.add_argument("--overfit", action="store_true", help="test on the training images, to see that all parts work")
    p.add_argument("--updates", type=int, help="the schedule stretches with it")
    p.add_argument("--batch-size", type=int, help="images per update, over all ranks")
    p.add_argument("--lr", type=float, help="learning rate")
    p.add_argument("--workers", type=int, default=common.default_workers(), help="loader workers per rank")
    p.add_argument("--seed", type=int, default=0, help="of the new layers, the order, and what is drawn in training")
    p.add_argument("--out", help="run folder (default: runs/COMMAND-NAME)")
    p.add_argument("--fresh", action="store_true", help="delete the run in --out and start over")
    p.add_argument("--changed-data", action="store_true", help="go on although the training images have changed")
    p.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda, else cpu")
    p.add_argument("--log-every", type=int, default=10, help="updates between log lines")
    p.set_defaults(dry_run=False, amp=False)  # fp32, as in detectron2
    return p


def parse(p, command, recipes, argv):
    """(the flags, the recipe without them)"""
    known = p.parse_args(argv)
    name = known.recipe or (known.data if known.data in recipes else "folder")
    own = {k for k in recipes[name] if hasattr(known, k)}
    p.set_defaults(recipe=name, **{k: recipes[name][k] for k in own})
    args = p.parse_args(argv)
    common.at_least(1, args, "updates", "batch_size", "log_every")
    common.at_least(0, args, "limit", "workers", "lr", "seed")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    target = args.checkpoint.removeprefix("random:")
    target = target if target != args.checkpoint else Path(target).resolve().name.removesuffix(".pt")
    words = [command, target, *[args.data] * (args.data != "scenes"), *["frozen"] * args.frozen]
    args.out = args.out or f"runs/{'-'.join(Path(word).name for word in words)}"
    return args, {k: v for k, v in recipes[name].items() if k not in own}


def open_resnet(args, size):
    """(the ResNet of the flags, its preprocessing, a digest of its file); random:ARCH is built for `size` px."""
    random = args.checkpoint.startswith("random:")
    net, preprocess, _, path = checkpoints.open_backbone(args.checkpoint, args.arch, size if random else 0, args.seed)
    if not isinstance(net, backbones.ResNet) or net.conv1.in_channels != 3:
        common.fail(f"{args.checkpoint} is not a ResNet that takes plain RGB images, which this command needs")
    return net, preprocess, path and hashlib.sha1(path.read_bytes()).hexdigest()


def distributed(model, device):
    """The model for several processes: on GPUs with BatchNorm over all of them."""
    if common.world_size() == 1:
        return model
    parallel.sync_batch_norm(model)
    return parallel.wrap(model, device)


def millions(model):
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}"


def tile(x, side):
    """[C, H, W] with a long side of `side` px, in the corner of a square."""
    size = [max(1, n * side // max(x.shape[1:])) for n in x.shape[1:]]
    return F.pad(F.interpolate(x[None].float(), size, mode="nearest-exact")[0], (0, side - size[1], 0, side - size[0]))
