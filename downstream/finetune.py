"""Fine-tuning of all weights on a share of the labels.

    python -m downstream.finetune RUN --labels 1 10                      on 1 % and on 10 % of the labels
    python -m downstream.finetune RUN --label-list 1percent.txt          on an official list of file names
    python -m downstream.finetune RUN --protocol swav                    rates and decay as published for ImageNet
    python -m downstream.finetune RUN --labels 100 --save FILE           on all labels, kept as a classifier
    python -m downstream.finetune random:resnet18 --data cifar10 --size 32 --labels 100      with labels alone

The semi-supervised protocol of SwAV (eval_semisup.py) and SaGe (configs/benchmarks/semi_classification): SGD with
momentum 0.9, 20 epochs, rates x 0.2 at 60 % and 80 %, batch 256, random crops and flips, one rate for the trunk and one
for the head. The default rates are a small grid of our own: what fits the head depends on the scale of the features,
which differs by method, and few images need other rates than ImageNet (measured: results/README.md).
"""

import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import checkpoints
import common
import data
import evaluate
import runs
import sets

TRUNK_LRS, HEAD_LRS = (0.02, 0.1), (0.02, 0.2)
SCRATCH_LRS = (0.1,), (0.1,)  # random:ARCH, a network trained with labels alone: the trunk has everything to learn
SAGE_LRS = [(lr, factor * lr) for lr in (0.1, 0.01, 0.001) for factor in (1, 10, 100)]
PROTOCOLS = {  # {per cent of the labels: (pairs of rates for trunk and head, weight decay)}
    "swav": {1: ([(0.02, 5.0)], 0.0), 10: ([(0.01, 0.2)], 0.0)},
    "sage": {1: (SAGE_LRS, 5e-4), 10: (SAGE_LRS, 1e-4)},
}


def published(protocol, percent):
    """(pairs of rates, weight decay) of a protocol for about `percent` per cent of the labels."""
    for share, rates in PROTOCOLS[protocol].items():
        if 0.8 < percent / share < 1.25:
            return rates
    common.fail(f"--protocol {protocol} has rates for 1 and 10 % of the labels, not for {percent:.3g} %")


def fit_finetune(backbone, train, preprocess, device, trunk_lr, head_lr, epochs, batch_size, weight_decay=0.0,
                 workers=0, amp=False, seed=0):  # fmt: skip
    """A copy of `backbone` with a linear head, which starts at zero, trained together with BatchNorm in train mode:
    (nn.Sequential, mean loss of the last epoch). A loss that is not finite ends the training."""
    y = sets.labels_of(train).to(device)
    net = nn.Sequential(copy.deepcopy(backbone), nn.Linear(backbone.dim, evaluate.classes_of(train))).to(device).train()
    nn.init.zeros_(net[1].weight)
    nn.init.zeros_(net[1].bias)
    groups = [{"params": part.parameters(), "lr": lr} for part, lr in zip(net, (trunk_lr, head_lr), strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=weight_decay)
    view = data.view(**{k: preprocess[k] for k in ("size", "interpolation", "mean", "std")})
    loader = data.Loader(train, [view], min(batch_size, len(train)), seed, workers=workers, device=device)
    drops = [math.ceil(share * epochs) * loader.steps for share in (0.6, 0.8)]
    factor = lambda step: 0.2 ** sum(step >= drop for drop in drops)
    return net, fit(net, optimizer, loader, y, epochs * loader.steps, factor, amp, f"lr {trunk_lr:g} {head_lr:g}")


def fit(net, optimizer, loader, y, updates, factor, amp, words, criterion=F.cross_entropy):
    """Train `net` for `updates` on the images of `loader` with labels `y`, at the optimizer's rates times
    `factor(update)`. Returns the mean loss of the last epoch; one that is not finite ends the training."""
    rates, step, mean = [group["lr"] for group in optimizer.param_groups], 0, math.nan
    with tqdm(total=updates, desc=words, unit="update", leave=False, disable=None) as bar:
        while step < updates:
            total, before = 0.0, step
            for index, (x,) in loader.epoch(step // loader.steps):
                for group, lr in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = lr * factor(step)
                with torch.autocast(loader.device.type, torch.bfloat16, enabled=amp):
                    logits = net(x)
                loss = criterion(logits.float(), y[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach()
                step += 1
                bar.update()
                if step == updates:
                    break
            if not math.isfinite(mean := float(total) / (step - before)):
                break
    return mean


def finetune(backbone, train, test, preprocess, device, pairs, epochs=20, batch_size=256, weight_decay=0.0, workers=0,
             amp=False, seed=0):  # fmt: skip
    """Fine-tune a copy of `backbone` on `train`, all of it labelled, and classify `test`. Of several `pairs` of rates
    (trunk, head) the best is chosen on a held-out tenth of `train`, then all of it is used. Returns (nn.Sequential of
    trunk and head in eval mode, its accuracies and settings). Ends the program where training diverges."""

    def accuracy(net, images):
        logits = evaluate.extract(net, images, preprocess, device, workers=workers, amp=amp)
        return evaluate.accuracy(*evaluate.with_labels(*logits))

    # Of few images smaller batches, so that an epoch still has updates; BatchNorm needs some images in each.
    batch_size = min(batch_size, max(32, len(train) // 16), len(train))
    settings, grid = (epochs, batch_size, weight_decay, workers, amp, seed), {}
    if len(pairs) > 1:
        rows, val = (sets.pick(train, part) for part in evaluate.held_out(len(train), seed))
        for pair in pairs:
            net, loss = fit_finetune(backbone, rows, preprocess, device, *pair, *settings)
            grid[pair] = round(accuracy(net, val)[0].item(), 2) if math.isfinite(loss) else -1.0
    trunk_lr, head_lr = pair = max(pairs, key=lambda pair: grid.get(pair, 0.0))  # the first of the best
    net, loss = fit_finetune(backbone, train, preprocess, device, *pair, *settings)
    if not math.isfinite(loss):
        common.fail(f"fine-tuning diverged at --trunk-lr {trunk_lr:g} --head-lr {head_lr:g}: try lower ones")
    top1, top5 = accuracy(net, test)
    updates = epochs * (len(train) // batch_size)
    result = {"top1": top1.item(), "top5": top5.item(), "images": len(train), "trunk_lr": trunk_lr, "head_lr": head_lr}
    result |= {"weight_decay": weight_decay, "epochs": epochs, "batch_size": batch_size, "updates": updates}
    return net.eval(), result | {"grid": {f"trunk {a:g} head {b:g}": score for (a, b), score in grid.items()}}


def save_classifier(file, net, subject, arch):
    """Write trunk and head of `net`, which `finetune` returns, as `analysis.reconstruct.open_classifier` reads them."""
    trunk = net[0].f if isinstance(net[0], checkpoints.InputAdapter) else net[0]  # what it adapts is in `preprocess`
    about, train = {"arch": arch, "preprocess": subject.preprocess} | subject.about, subject.sets["train"]
    built_for = about.get("built_for", about["preprocess"]["size"])  # it chose the stem; --size may differ
    weights, head = ({k: v.cpu() for k, v in part.state_dict().items()} for part in (trunk, net[1]))
    found = {"kind": "classifier", "arch": about["arch"], "state_dict": weights, "head": head, "built_for": built_for}
    found |= {"preprocess": subject.preprocess, "classes": list(train.classes or []), "data": train.name}
    runs.write(file, found)


def main():
    p = evaluate.flags(__doc__)
    evaluate.label_flags(p, "1 10")
    p.add_argument("--trunk-lr", type=float, nargs="+", help=f"(default: {TRUNK_LRS}, random:ARCH {SCRATCH_LRS[0]})")
    p.add_argument("--head-lr", type=float, nargs="+", help=f"(default: {HEAD_LRS}, random:ARCH {SCRATCH_LRS[1]})")
    p.add_argument("--protocol", choices=PROTOCOLS, help="rates and decay published for 1 and 10 %% of ImageNet")
    p.add_argument("--epochs", type=int, default=20, help="passes over the labelled images")
    p.add_argument("--batch-size", type=int, default=256, help="at most; smaller where there are few images")
    p.add_argument("--weight-decay", type=float, default=0.0, help="on all weights")
    p.add_argument("--save", help="write the last fine-tuned network here, for the --classifier of other commands")
    args = p.parse_args()
    common.at_least(1, args, "epochs")
    common.at_least(2, args, "batch_size")
    common.at_least(0, args, "trunk_lr", "head_lr", "weight_decay", most=1e6)
    if args.protocol and (args.trunk_lr or args.head_lr or args.weight_decay):
        common.fail(f"--protocol {args.protocol} has its own --trunk-lr, --head-lr and --weight-decay")
    if args.save and not Path(args.save).parent.is_dir():
        common.fail(f"--save {args.save}: there is no folder {Path(args.save).parent}")
    s, results, scratch = evaluate.Subject(args), {}, args.checkpoint.startswith("random:")
    shares, train, how = s.label_shares(args, "fine-tuning", (1, 10)), s.sets["train"], "given"
    if args.protocol:
        how = f"{args.protocol}'s, published for ImageNet"
        percent = lambda name, rows: 100 * len(rows) / len(train) if args.label_list else float(name)
        rates = {name: published(args.protocol, percent(name, rows)) for name, rows in shares.items()}
    else:
        trunk_lrs, head_lrs = SCRATCH_LRS if scratch else (TRUNK_LRS, HEAD_LRS)
        pairs = [(a, b) for a in args.trunk_lr or trunk_lrs for b in args.head_lr or head_lrs]
        rates = dict.fromkeys(shares, (pairs, args.weight_decay))
        if not (args.trunk_lr or args.head_lr):
            how = "a small grid of our own, for small data (published ones: --protocol)"
    for name, rows in shares.items():
        pairs, decay = rates[name]
        settings = pairs, args.epochs, args.batch_size, decay, s.workers, s.amp, args.seed
        net, r = finetune(s.backbone, sets.pick(train, rows), s.sets["test"], s.preprocess, s.device, *settings)
        results[name] = r
        chosen = f"trunk lr {r['trunk_lr']:g}, head lr {r['head_lr']:g}"
        print(f"finetune {name}{'' if args.label_list else ' %'}   {evaluate.tops(r)}   ({chosen})")
        start = "from random weights" if scratch else "all weights fine-tuned"
        updates = f"{r['epochs']} epochs = {r['updates']} updates of {r['batch_size']}"
        print(f"         {start}, {r['images']} labelled images, {updates}, random crops and flips")
        print(f"         SGD 0.9, wd {decay:g}, rates x 0.2 at 60 % and 80 %; un-augmented test images; rates: {how}")
        if r["grid"]:
            grid = ", ".join(f"{k}: {v if v >= 0 else 'diverged'}" for k, v in r["grid"].items())
            print(f"         rates chosen on a tenth of these images, then all of them; held-out top-1: {grid}")
    if args.save:
        save_classifier(args.save, net, s, args.arch or args.checkpoint.removeprefix("random:"))
        print(f"the last of them is saved in {args.save}")
    s.write({"finetune": results})


if __name__ == "__main__":
    common.run(main)
