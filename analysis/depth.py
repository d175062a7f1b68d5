"""At which depth of a network are the classes easiest to read? (Kolesnikov et al. 2019, Figure 5)

    python -m analysis.depth RUN [--most-features 2000]

A linear probe after every stage. The table of all layers is printed, and RUN/evaluate.json keeps it.
"""

import math

import torch
from torch import nn

import checkpoints
import common
import evaluate


class Depths(nn.Module):
    """All layers of a backbone, each pooled to `most` features at most, as one long vector per image: [B, 3, size,
    size] to [B, n]. `shapes`: {layer: (C, h, w) or (dim,)}, in order of depth; forward gives the layers in it.

    As in the study's code, root is after the first pooling, and a RevNet's block before the pooling that follows it.
    Unlike there, the last block of a ResNet v2 or RevNet is after the last BatchNorm (and ReLU), and a VGG's block
    after its max-pooling."""

    def __init__(self, backbone, size, most=9000):
        super().__init__()
        self.trunk = backbone if isinstance(backbone, checkpoints.InputAdapter) else checkpoints.InputAdapter(backbone)
        self.most = most
        if not hasattr(self.trunk.f, "taps"):
            common.fail("depth needs a backbone with `taps`, which gives its layers by name (backbones.py)")
        with evaluate.in_eval(backbone), torch.inference_mode():
            taps = self.trunk.taps(torch.zeros(1, 3, size, size, device=next(backbone.parameters()).device), most)
        self.shapes = {name: tuple(tap.shape[1:]) for name, tap in taps.items()}

    def forward(self, x):
        taps = self.trunk.taps(x, self.most)
        return torch.cat([taps[name].flatten(1) for name in self.shapes], 1)


def depth(net, train, test, preprocess, device, workers=0, amp=False, seed=0):
    """A linear probe without weight decay, as in the study, on each layer of a `Depths`: {layer: {"shape", "features",
    "kept", "top1", "top5", "lr", "weight_decay", "grid"}}. One pass over each set extracts the features of all layers,
    or, where those do not fit `evaluate.room`, one pass per layer."""
    shapes, images, results = net.shapes, len(train) + len(test), {}
    fits = 4 * images * sum(map(math.prod, shapes.values())) <= evaluate.room(device)
    for names in [list(shapes)] if fits else [[name] for name in shapes]:
        net.shapes = {name: shapes[name] for name in names}
        (x, y), (test_x, test_y) = (
            evaluate.with_labels(*evaluate.extract(net, s, preprocess, device, 128, workers, amp, progress=True))
            for s in (train, test)
        )
        sizes = [math.prod(shapes[name]) for name in names]
        for name, a, b in zip(names, x.split(sizes, 1), test_x.split(sizes, 1), strict=True):
            found = evaluate.linear_sgd(a, y, b, test_y, decays=(0.0,), seed=seed)
            results[name] = {"shape": list(shapes[name]), "features": a.shape[1], "kept": evaluate.kept(x)} | found
        del x, test_x, a, b  # before the next layer's are extracted
    net.shapes = shapes
    return results


def main():
    p = evaluate.flags(__doc__)
    p.add_argument("--most-features", type=int, default=9000, help="per layer, by max-pooling; fewer is faster")
    args = p.parse_args()
    common.at_least(1, args, "most_features")
    s = evaluate.Subject(args)
    s.need_labels("depth")
    net = Depths(s.backbone, s.preprocess["size"], args.most_features)
    results = depth(net, *s.sets.values(), s.preprocess, s.device, s.workers, s.amp, args.seed)
    best = max(r["top1"] for r in results.values())
    print(f"{'depth':<12}{'shape':>14}{'features':>10}{'top-1':>8}")
    for name, r in results.items():
        shape = "x".join(map(str, [*r["shape"][1:], r["shape"][0]]))
        print(f"{name:<12}{shape:>14}{r['features']:>10}{r['top1']:8.2f}{'  best' if r['top1'] == best else ''}")
    print(f"         linear probes of frozen maps (height x width x depth), max-pooled to {args.most_features} values")
    print("         SGD 100 epochs, batch 256, cosine, wd 0; lr chosen on a tenth of TRAIN, then all; no augmentation")
    s.write({"depth": results})


if __name__ == "__main__":
    common.run(main)
