"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations (Chen et al., 2020,
https://arxiv.org/abs/2002.05709).

Two views of each image go through one network, backbone f and projector g. Each of the 2B vectors of a batch must find
the other view of its image among all 2B - 1 others: the rest of the batch are its negatives, so the batch must be large.
No bank, no second network: with a gradient into both sides, the negatives alone keep the constant solution away.

    view 1 of B images --.                           .-- z_1 .. z_B ------.
                          >-- one batch -> f -> g --<                      > each z_i: -log P(its other view | all but
    view 2 of B images --'                           '-- z_B+1 .. z_2B ---'  itself), cosines / tau, softmax (eq. 1)

    differences       paper                     official code                here (more in docs/simclr.md)
    loss              mean over the 2B views    sum of the two directions:   mean over the 2B views, so half the step
                                                twice that                   on what LARS does not adapt
    projector         2 layers                  3 by default                 3, --layers 2
    weight decay      1e-6                      1e-4 in its commands         1e-4
    learning rate     0.3 x B / 256             0.075 x sqrt(B) in its       0.075 x sqrt(B); --scaling
                                                command: 4.8 for 4096, too
    random crop       Inception crop            TensorFlow's: mean area .39  torchvision's ten tries: .43
                                                of 500 x 375 px
    resizing          -                         bicubic, no antialiasing     bicubic, antialiased; test images bilinear
    blur              -                         one sigma a batch and view   one sigma an image
    initial weights   -                         truncated normal; blocks     torchvision's (He, fan-out);
                                                start at 0; g N(0, 0.01)     g N(0, 0.01)
    linear probe      crops and flips           the same                     un-augmented frozen features, 100 epochs
    small images      CIFAR-10 at 32 px         3x3 stem up to 32 px         3x3 stem under 64 px
    precision         -                         fp32                         bf16 autocast; L2 and loss in fp32

Measured with this file (k-NN: 20 neighbours; protocols and curves in results/README.md):

    command                      network, epochs    seeds  k-NN                linear              device
    python simclr.py             resnet10_16, 24    0      86.2                87.1                2 CPU cores, 3.0 min, 3980407
                                 at random          0      14.7                not run
    python simclr.py --data cifar10 --limit 10000 --arch resnet10_16 --batch-size 128 --epochs 20 --warmup-epochs 2
           (images recompressed as JPEG)
                                 resnet10_16, 20    0      42.3                not run             the same core
                                 at random          0      27.1                not run
    cifar10, imagenet            in full                   not run             not run

    python simclr.py                                                         shapes, minutes on a laptop
    torchrun --standalone --nproc_per_node=8 simclr.py --data imagenet --root DIR
"""

import contextlib
import functools
import itertools
import math
import shlex
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import backbones
import common
import data
import evaluate
import runs
import training

METHOD = "simclr"

# ============ recipes: one per data regime; every entry but `views` is the default of a flag ============

RECIPES = {
    # Quick on a CPU, so unlike the paper: AdamW, a small network, a small batch.
    "shapes": dict(
        arch="resnet10_16", size=32, epochs=24, batch_size=64, optimizer="adamw", lr=4e-3, scaling="linear",
        weight_decay=1e-4, warmup_epochs=1.0, temperature=0.2, layers=2, hidden=256, dim=128, eval_every=2,
        views=[dict(scale=(0.5, 1.0), interpolation="bilinear", jitter=(0.4, 0.4, 0.4, 0.5), jitter_p=1.0, grey=0.5)] * 2,
    ),
    # The code's command for CIFAR-10: no blur, half the strength of jitter. Not run in full yet.
    "cifar10": dict(
        arch="resnet18", size=32, epochs=1000, batch_size=512, optimizer="lars", lr=1.0, scaling="linear",
        weight_decay=1e-4, warmup_epochs=10, temperature=0.5, layers=3, hidden=512, dim=128, eval_every=10,
        views=[dict(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grey=0.2, mean=(0.0,) * 3, std=(1.0,) * 3)] * 2,
    ),
    # The code's command for 100 epochs. The paper's: --lr 0.3 --scaling linear --weight-decay 1e-6 --layers 2.
    "imagenet": dict(
        arch="resnet50", size=224, epochs=100, batch_size=4096, optimizer="lars", warmup_epochs=10,  # sec. 2.3
        lr=0.075, scaling="sqrt", weight_decay=1e-4, temperature=0.1,  # code, README.md
        layers=3, hidden=2048, dim=128, eval_every=10,  # code, run.py; 128: sec. 2.3
        views=[  # appendix A, strength 1
            dict(jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.8, grey=0.2, blur=0.5, mean=(0.0,) * 3, std=(1.0,) * 3)
        ] * 2,
    ),
}  # fmt: skip
# A folder of photographs, for a laptop or one GPU: the small network's numbers, the paper's views.
RECIPES["folder"] = RECIPES["shapes"] | training.FOLDER | dict(views=RECIPES["imagenet"]["views"])
OPTIMIZERS = {
    "lars": functools.partial(common.LARS, inside=True),  # the learning rate inside the momentum buffer, as the code's
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
    "adamw": torch.optim.AdamW,
}


def parse_args(argv=None):
    p, known = training.flags(METHOD, __doc__, RECIPES, argv)
    # SimCLR
    p.add_argument("--scaling", choices=("linear", "sqrt"), help="of lr with the batch: x B / 256, or x sqrt(B)")
    p.add_argument("--temperature", type=float, help="tau, what the cosines are divided by before the softmax; lower is sharper")
    p.add_argument("--layers", type=int, choices=(2, 3), help="of the projector; 2 in the paper")
    p.add_argument("--hidden", type=int, help="hidden width of the heads")
    p.add_argument("--dim", type=int, help="D, width of the vectors that the loss compares")
    args = training.parse(p, METHOD, RECIPES[known.recipe], argv)
    common.at_least(1, args, "hidden", "dim")
    if not 0 < args.temperature < math.inf:
        common.fail(f"--temperature {args.temperature:g}: it must be above 0 and finite")
    return args


# ============ the method ============


def projector(inputs, hidden, outputs, layers):
    """(Linear, BatchNorm, ReLU) once or twice, then linear and BatchNorm. No linear has a bias, nor has the last BatchNorm;
    weights start at N(0, 0.01) (code, model.py)."""
    widths, modules = [inputs, *[hidden] * (layers - 1)], []
    for a, b in itertools.pairwise(widths):
        modules += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU(inplace=True)]
    modules += [nn.Linear(widths[-1], outputs, bias=False), nn.BatchNorm1d(outputs)]
    modules[-1].bias.requires_grad_(False)  # torch has no BatchNorm with a scale alone: this stays 0
    for m in modules:
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=0.01)
    return nn.Sequential(*modules)


class NTXent(torch.autograd.Function):
    """NT-Xent (eq. 1): -log P(other view | all but itself), mean over the anchors z [2b, D]: the first views of b images, then
    their second views. `every` [2B, D], the views of all processes, holds z from row `offset` on. All are unit vectors. Loss
    and gradients are made together, `chunk` rows of the similarities [2b, 2B] at a time."""

    @staticmethod
    def forward(ctx, z, every, offset, temperature, chunk=2048):
        loss, dz, d_every = 0.0, torch.empty_like(z), torch.zeros_like(every)
        rows = torch.arange(len(z), device=z.device)
        for i, other in zip(rows.split(chunk), rows.roll(len(z) // 2).split(chunk), strict=True):
            s = (z[i] / temperature @ every.T).scatter_(1, offset + i[:, None], -math.inf)  # [c, 2B], itself left out
            p, other = s.log_softmax(1), offset + other[:, None]
            loss = loss - p.gather(1, other).sum()
            p.exp_().scatter_(1, other, -1.0, reduce="add")  # d loss / d s: P, less 1 at the other view
            dz[i] = p @ every
            d_every.addmm_(p.T, z[i])
        scale = 1 / (temperature * len(z))
        ctx.save_for_backward(dz * scale, d_every * scale)
        return loss / len(z)

    @staticmethod
    def backward(ctx, grad):
        dz, d_every = ctx.saved_tensors
        return grad * dz, grad * d_every, None, None, None


class Gather(torch.autograd.Function):
    """The rows of all processes [W b, D]. Backward: the gradients of a row from all processes are summed in the process that
    made it. Every process must call both."""

    @staticmethod
    def forward(ctx, z):
        z = z.contiguous()
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


class SimCLR(nn.Module):
    """Backbone f, projector g; `forward((v1, v2))` is NT-Xent over the views of all processes, which must all call it."""

    def __init__(self, backbone, hidden=2048, dim=128, layers=3, temperature=0.1):
        super().__init__()
        self.temperature, self.figures = temperature, {}
        self.f = backbone
        self.g = projector(backbone.dim, hidden, dim, layers)

    def forward(self, views):
        z = self.g(self.f(torch.cat(views)))  # [2b, D]; both views are one batch to BatchNorm, as in the official code
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.float(), dim=1)
            z1, z2 = z.detach().chunk(2)
            self.figures = {
                "feature_std": z.detach().std(0).mean() * z.shape[1] ** 0.5,  # 1: spread, 0: collapsed
                "positive_cosine": (z1 * z2).sum(1).mean(),  # of the two views of an image
            }
            offset, every = 0, z
            if dist.is_initialized():  # gradients flow back to the process that made a negative, and add up there
                offset, every = dist.get_rank() * len(z), Gather.apply(z)
            # Each process has the mean of its own anchors; DDP's mean of their gradients is that of the mean over all.
            return NTXent.apply(z, every, offset, self.temperature)


# ============ the run ============


def main(argv=None):
    args = parse_args(argv)
    rank, world, device = common.setup(args.device)
    args.amp = common.bf16_is_fast(device) if args.amp is None else args.amp
    say = print if rank == 0 else lambda *_: None

    # ============ data ============
    views = [data.view(args.size, **v) for v in RECIPES[args.recipe]["views"]]
    train, bank, test = (
        data.load(args.data, args.root, split, device, args.limit, args.seed, args.in_memory)
        for split in ("pretrain", "train", "test")
    )
    per_pass = training.images_per_pass(args, world, len(train))
    loader = data.Loader(train, views, per_pass, args.seed, rank, world, args.workers, device)
    preprocess = {"mean": views[0]["mean"], "std": views[0]["std"], "size": args.size, "interpolation": "bilinear"}

    # ============ model ============
    torch.manual_seed(args.seed)  # the same initial weights in every process
    model = SimCLR(
        backbones.build(args.arch, args.size), args.hidden, args.dim, args.layers, args.temperature
    ).to(device, memory_format=torch.channels_last)
    ddp = model
    if world > 1:
        if device.type == "cuda":  # the paper's BatchNorm sees the global batch; there is no such layer for the CPU
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        ddp = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    if args.compile:
        model.f.compile()  # in place: the names in state_dict() stay

    # ============ optimiser ============
    factor, how = args.batch_size / 256, f"{args.batch_size} / 256"
    if args.scaling == "sqrt":
        factor, how = args.batch_size**0.5, f"sqrt({args.batch_size})"
    lr = args.lr * factor
    optimizer = OPTIMIZERS[args.optimizer](common.param_groups(model, args.weight_decay), lr=lr)
    steps = loader.steps // args.accumulate  # updates per epoch
    total = args.epochs * steps
    warmup = min(round(args.warmup_epochs * steps), total // 2)  # a run that is short of epochs warms up for half of it

    # ============ recipe ============
    say(f"{METHOD} on {train.name}: {len(train)} images at {args.size} px, recipe {args.recipe} ({args.why}), seed {args.seed}")
    say(backbones.describe(model.f, args.arch, args.size))
    say(
        f"batch {args.batch_size} = {world} {device.type} x {args.accumulate} x {per_pass}; {args.epochs} epochs x {steps} steps"
    )
    say(f"lr {args.lr:g} x {how} = {lr:.4g}, {warmup} steps of warm-up")
    say(f"{args.optimizer}: {common.count(optimizer)}; {'bf16' if args.amp else 'fp32'}")
    B = world * per_pass  # images of a pass: what --accumulate adds up does not meet
    say(f"{2 * B - 2} negatives a view, B = {B}; tau {args.temperature:g}")
    say(f"loss of unrelated vectors ln(2B - 1) = {math.log(2 * B - 1):.2f}")
    if args.dry_run:
        return

    # ============ resume ============
    states = {"model": model, "optimizer": optimizer}
    settings, step, finished = training.resume(args, METHOD, views, train, states, total)
    if finished:
        return
    command = shlex.join(["python", *sys.argv])

    def checkpoint(result=None):
        norms = torch.stack(torch._foreach_norm(list(model.parameters())))
        runs.stop_unless_finite(norms.isfinite().all(), "network", step, lr, args.amp)  # all processes
        if rank == 0:
            state = {"method": METHOD, "settings": settings, "step": step, "result": result}
            runs.save(args.out, state | {name: of.state_dict() for name, of in states.items()})
            about = {"method": METHOD, "data": args.data, "command": command, "epoch": step // steps}
            about |= {
                "arch": args.arch,
                "preprocess": preprocess,
                "state_dict": {k: v.cpu() for k, v in model.f.state_dict().items()},
            }
            runs.write(Path(args.out, "backbone.pt"), about)

    if step == 0:
        checkpoint()  # the first file in the folder, which is this run's from now on
    log = runs.Log(args.out, METHOD, step, total, args.batch_size, rank, f"{command}\n\n{settings}")

    def probe():
        numbers = evaluate.monitor(model.f, bank, test, preprocess, device, args.workers, args.amp)  # all processes
        log.record("eval", step, epoch=step // steps, **numbers)
        log.say(f"epoch {step // steps:4d}  " + "  ".join(f"{k} {v:.2f}" for k, v in numbers.items()))

    # ============ training ============
    stop = common.catch_signals()
    while step < total:
        epoch, stopped = step // steps, False
        if step == 0 or (args.eval_every and step % (args.eval_every * steps) == 0):
            probe()  # at step 0 of the random network: what learning is measured against
        batches = log.watch(loader.epoch(epoch, step % steps * args.accumulate))
        log.start_interval(step)
        while step < (epoch + 1) * steps and not stopped:
            lr_now = common.cosine(step, total, lr, 0.0, warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr_now
            for micro in range(1, args.accumulate + 1):
                _, xs = next(batches)
                if step == 0 and micro == 1:
                    log.image("views", data.picture(xs, views))
                # Gradients are exchanged between processes once an update.
                with contextlib.nullcontext() if micro == args.accumulate or world == 1 else ddp.no_sync():
                    with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                        loss = ddp(xs) / args.accumulate
                    loss.backward()
                log.loss += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            stopped = common.any_rank(stop)
            if step % args.log_every == 0 or step % steps == 0 or stopped:
                log.train(step, lr_now, args.amp, epoch=step / steps, **model.figures)
        checkpoint()
        if stopped:
            log.say(f"stopped by a signal at step {step}; the same command goes on from here")
            return common.STOPPED

    # ============ final probe ============
    common.end_at_signals()
    log.bar.close()
    result = evaluate.final_probes(model.f, bank, test, preprocess, device, args, log, METHOD, step)
    checkpoint(result)
    say(f"load the backbone anywhere:\n{backbones.loading_lines(args.arch, args.size, log.out / 'backbone.pt', preprocess)}")
    say(result)


if __name__ == "__main__":
    common.run(main)
