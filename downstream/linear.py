"""The linear probe as papers publish it: frozen backbones, random crops and flips, SGD.

    python evaluate.py RUN --probe linear --augment                               our grid of rates
    python evaluate.py RUN RUN2 --probe linear --augment --protocol moco          several backbones see the same crops
    torchrun --standalone --nproc_per_node=8 -m downstream.linear RUN --protocol byol --data imagenet --root DIR

All rates of a protocol are trained at once: one pass of the backbone serves them all. Of several rates the best is
chosen on held-out training images, a tenth (at most 10,000; of ImageNet 50,046, as many as Kolesnikov et al. 2019 hold
out), and tested as it is, as BYOL's authors do (the probe of un-augmented images trains it again on all). A single rate
is trained on all images. Nothing is chosen on test images, as the best epoch is in MoCo's and SwAV's code.
"""

import argparse
import hashlib
import json
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import checkpoints
import common
import data
import evaluate
import loop
import optim
import sets
from downstream import dense

METHOD = "linear"
CROP, CENTRAL = dict(), dict(scale=((224 / 256) ** 2,) * 2, ratio="square", flip=0.0)  # as data.view; 224 of 256 px
COSINE = dict(nesterov=False, weight_decay=0.0, drop_at=(), batch_size=256, crop=CROP, scaled=False, divided=False)
PROTOCOLS = {  # scaled: lr * batch / 256. divided: features by their mean norm, so that one grid fits every method
    "grid": COSINE | dict(epochs=100, lr=[1.0, 3.0, 10.0, 30.0, 100.0], nesterov=True, divided=True),  # ours
    # Appendix C.1 (rates), eval_experiment.py and configs/eval.py (their scale); its weight decay is 0, too
    "byol": COSINE | dict(epochs=80, lr=[0.4, 0.3, 0.2, 0.1, 0.05], batch_size=1024, nesterov=True, scaled=True),
    "moco": COSINE | dict(epochs=100, lr=[30.0], drop_at=(0.6, 0.8)),  # main_lincls.py
    "swav": COSINE | dict(epochs=100, lr=[0.3], weight_decay=1e-6),  # eval_linear.py, where the rate changes by epoch
    "dilo": COSINE | dict(epochs=100, lr=[30.0], drop_at=(0.3, 0.6, 0.9)),  # section 6.1
    # Kolesnikov et al. 2019, Figure 8 and their linear_eval.py: no flips
    "study": COSINE | dict(epochs=520, lr=[0.1], batch_size=2048, drop_at=(480 / 520, 500 / 520), scaled=True,
                           crop=CENTRAL),
}  # fmt: skip
FLAGS = ("epochs", "lr", "batch_size", "weight_decay")  # the presets that are flags


def parse_args(argv=None):
    p = evaluate.flags(__doc__, several=True)
    p.add_argument("--protocol", choices=PROTOCOLS, default="grid", help="preset of the flags below, with its crops")
    p.add_argument("--epochs", type=int, help="the decays move with it")
    p.add_argument("--lr", type=float, nargs="+", help="one or more; with the scale of the protocol")
    p.add_argument("--batch-size", type=int, help="images per update, over all ranks")
    p.add_argument("--weight-decay", type=float, help="of weights and biases, as in torch.optim.SGD")
    p.add_argument("--out", help="run folder (default: runs/linear-PROTOCOL-NAMES)")
    p.add_argument("--fresh", action="store_true", help="delete the run in --out and start over")
    p.add_argument("--changed-data", action="store_true", help="go on although the training images have changed")
    p.add_argument("--log-every", type=int, default=10, help="updates between log lines")
    p.set_defaults(dry_run=False)
    r = PROTOCOLS[p.parse_args(argv).protocol]
    p.set_defaults(**{k: r[k] for k in FLAGS})
    args = p.parse_args(argv)
    evaluate.check_flags(args)
    common.at_least(1, args, "epochs", "batch_size", "log_every")
    common.at_least(0, args, "lr", "weight_decay")
    names = [Path(c.replace(":", "-")).resolve().name.removesuffix(".pt") for c in args.checkpoint]
    names += [Path(args.data).name] if args.data else []
    args.out = args.out or f"runs/linear-{'-'.join([args.protocol, *names])}"
    return args, r


def hand_over(words):
    """The words of `evaluate.py ... --probe linear --augment` that are flags of this command."""
    p = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    p.add_argument("--augment", action="store_true")
    p.add_argument("--probe", nargs="+", default=["linear"])
    known, rest = p.parse_known_args(words)
    if known.probe != ["linear"]:
        common.fail("--augment is for --probe linear alone: the other probes are of un-augmented images")
    return rest


class Heads(nn.Module):
    """Softmax regressions from 0: for each backbone, of features [b, d], one for each of `rates`."""

    def __init__(self, dims, classes, rates):
        super().__init__()
        self.heads = nn.ModuleList(nn.ModuleList(nn.Linear(d, classes) for _ in range(rates)) for d in dims)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features, y):
        """Cross-entropies [backbones, rates]."""
        pairs = zip(features, self.heads, strict=True)
        return torch.stack([torch.stack([F.cross_entropy(head(z), y) for head in heads]) for z, heads in pairs])

    @torch.no_grad()
    def reset_diverged(self):
        """Back to 0 with those whose rate was too high, so that the others can go on."""
        for head in self.modules():
            if isinstance(head, nn.Linear) and not head.weight.norm().isfinite():
                head.weight.zero_(), head.bias.zero_()


def open_all(args, device):
    """(backbones, their common preprocessing, files or None, a digest of each)"""
    opened = [checkpoints.open_backbone(c, args.arch, args.size, args.seed) for c in args.checkpoint]
    nets, preprocess, abouts, paths = zip(*opened, strict=True)
    names = {about.get("data") for about in abouts} - {None}
    args.data = args.data or (names.pop() if len(names) == 1 else common.fail("say which data with --data"))
    images = [json.dumps([p[k] for k in ("size", "mean", "std", "interpolation")]) for p in preprocess]
    if others := [name for name, own in zip(args.checkpoint, images, strict=True) if own != images[0]]:
        common.fail(
            f"{others[0]} takes images of another size or normalization than {args.checkpoint[0]}: probe it alone"
        )
    nets = [net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False) for net in nets]
    digests = [path and hashlib.sha1(path.read_bytes()).hexdigest() for path in paths]
    return nets, preprocess[0], paths, digests


@torch.no_grad()
def score(heads, norm, net, images, preprocess, device, args):
    """(top-1, top-5) in per cent of each head on un-augmented images. Collective."""
    z, y = evaluate.extract(net, images, preprocess, device, workers=args.workers, amp=args.amp)
    z, y = evaluate.with_labels(z, y)
    return evaluate.accuracy(z, y, lambda z: torch.stack([head(z / norm) for head in heads]))


def main(argv=None):
    args, r = parse_args(argv)
    rank, world, device = common.setup(args.device)
    args.amp = common.bf16_is_fast(device) if args.amp is None else args.amp

    # ============ data and backbones ============
    nets, preprocess, paths, digests = open_all(args, device)
    train, test = (sets.load(args.data, args.root, split, device, args.limit, args.seed) for split in ("train", "test"))
    if not (labelled := sets.labels_of(train) >= 0).all():
        train = sets.pick(train, labelled.nonzero()[:, 0])
    if len(train) < evaluate.FEWEST or not (sets.labels_of(test) >= 0).any():
        common.fail(f"too few labels: {evaluate.FEWEST} training images with one and a labelled test set are needed")
    chosen, held_out = "", None
    if len(args.lr) > 1:
        most = 50_046 if args.data == "imagenet" else 10_000
        train, held_out = (sets.pick(train, rows) for rows in evaluate.held_out(len(train), args.seed, most))
        chosen = f"; the best of {len(args.lr)} rates on {len(held_out)} held-out ones"
    if args.batch_size > len(train) or args.batch_size % world:
        common.fail(
            f"--batch-size {args.batch_size}: it must be a multiple of {world} ranks, at most {len(train)} images"
        )
    view = data.view(**{k: preprocess[k] for k in ("size", "interpolation", "mean", "std")}, **r["crop"])
    loader = data.Loader(train, [view], args.batch_size // world, args.seed, rank, world, args.workers, device)
    norms = [1.0] * len(nets)
    if r["divided"]:
        few = evaluate.first(train, 2048), preprocess, device
        norms = [evaluate.extract(net, *few, workers=args.workers)[0].norm(dim=1).mean() for net in nets]

    # ============ heads ============
    heads = Heads([net.dim for net in nets], evaluate.classes_of(train), len(args.lr)).to(device)
    ddp = dense.distributed(heads, device)
    rates = [lr * args.batch_size / 256 if r["scaled"] else lr for lr in args.lr]
    groups = [{"params": [p for own in heads.heads for p in own[i].parameters()]} for i in range(len(rates))]
    optimizer = torch.optim.SGD(groups, 0.0, momentum=0.9, nesterov=r["nesterov"], weight_decay=args.weight_decay)

    # ============ run: print the protocol, go on from a checkpoint ============
    run = loop.Loop(METHOD, args, {"model": heads, "optimizer": optimizer}, loader)
    decays = " ".join(f"{at * args.epochs:g}" for at in r["drop_at"])
    how = f"protocol {args.protocol}: random crops{' and flips' * bool(view['flip'])}, SGD, {args.epochs} epochs of "
    how += f"{len(train)} images, batch {args.batch_size}, {f'x 0.1 at {decays}' if decays else 'cosine'}, "
    how += f"wd {args.weight_decay:g}, lr {' '.join(f'{lr:g}' for lr in rates)}"
    how += " on features of mean norm 1" * r["divided"] + chosen
    run.say(f"{' '.join(args.checkpoint)} on {train.name} at {preprocess['size']} px, {'bf16' if args.amp else 'fp32'}")
    run.say(how)
    if not run.begin(weights=digests):
        return

    # ============ training ============
    y = sets.labels_of(train).to(device)
    while run.is_training():
        for step in run.epoch():
            factor = optim.rate(step, run.total, 1.0, 0, r["drop_at"])
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * factor
            index, (x,) = next(run.batches)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                features = [net(x).float() / norm for net, norm in zip(nets, norms, strict=True)]
            losses = ddp(features, y[index])
            losses.sum().backward()
            run.log.loss += losses.detach().nan_to_num(math.inf).min(1).values.mean()  # of the best rates
            optimizer.step()
            optimizer.zero_grad()
            run.end_step(max(rates) * factor)
        heads.reset_diverged()
        run.save()
    if run.stopped:
        return common.STOPPED

    # ============ test ============
    lines, results = [], []
    for name, net, norm, own, path in zip(args.checkpoint, nets, norms, heads.heads, paths, strict=True):
        top1, top5 = score(own, norm, net, test, preprocess, device, args)
        grid = score(own, norm, net, held_out, preprocess, device, args)[0].tolist() if held_out else [0.0]
        best = grid.index(max(grid))
        result = {"top1": top1[best].item(), "top5": top5[best].item(), "lr": rates[best], "protocol": how}
        lines.append(f"linear   {evaluate.tops(result)}   (lr {rates[best]:g}; {name})")
        if held_out:
            result["grid"] = {f"lr {lr:g}": round(s, 2) for lr, s in zip(rates, grid, strict=True)}
            lines.append("         held-out top-1: " + ", ".join(f"{k}: {v}" for k, v in result["grid"].items()))
        results.append((path, result))
    run.say("\n".join(lines))
    if rank == 0:
        run.log.writer.close()
    run.save("\n".join(lines))
    name = " ".join([args.protocol, *(f"{k} {getattr(args, k)}" for k in FLAGS if getattr(args, k) != r[k])])
    for path, result in results if rank == 0 else ():
        if path and os.access(path.parent, os.W_OK):
            evaluate.write_json(path.parent, args.data, {"linear_augmented": {name: result}})


if __name__ == "__main__":
    common.run(main)
