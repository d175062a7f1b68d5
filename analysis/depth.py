"""Which layer of a network tells the classes best? A linear probe after every stage (Kolesnikov et al. 2019, Figure 5).

    python -m analysis.depth RUN [--layers block3 pre_logits] [--most-features 9000]

The table of all layers is printed, and RUN/evaluate.json keeps it.
"""

import difflib
import math

import torch
from torch import nn

import checkpoints
import common
import evaluate


class Depths(nn.Module):
    """The `layers` of a backbone (none: all), each pooled to `most` features at most, as one long vector of an image:
    [B, 3, size, size] to [B, n]. `shapes`: {layer: (C, h, w) or (dim,)}, in order of depth. A layer that the network
    does not have ends the program with exit code 2.

    As in the study's code, root is after the first pooling, and a RevNet's block before the pooling that follows it.
    Unlike there, the last block of a ResNet v2 or RevNet is after the last BatchNorm (and ReLU), and a VGG's block
    after its max-pooling."""

    def __init__(self, backbone, layers, size, most=9000):
        super().__init__()
        self.trunk = backbone if isinstance(backbone, checkpoints.InputAdapter) else checkpoints.InputAdapter(backbone)
        self.most = most
        if not hasattr(self.trunk.f, "taps"):
            common.fail("depth needs a backbone with `taps`, which gives its layers by name (backbones.py)")
        with evaluate.in_eval(backbone), torch.inference_mode():
            taps = self.trunk.taps(torch.zeros(1, 3, size, size, device=next(backbone.parameters()).device), most)
        for name in layers:
            if name not in taps:
                near = difflib.get_close_matches(name, taps, 1, 0.0)[0]
                common.fail(f"--layers {name}: did you mean {near!r}? This network has {', '.join(taps)}")
        self.shapes = {name: tuple(tap.shape[1:]) for name, tap in taps.items() if not layers or name in layers}

    def forward(self, x):
        taps = self.trunk.taps(x, self.most)
        return torch.cat([taps[name].flatten(1) for name in self.shapes], 1)


def depth(net, train, test, preprocess, device, workers=0, amp=False, seed=0):
    """A linear probe on each of the layers of a `Depths`, whose features are extracted in one pass over each set:
    {layer: {"shape", "features", "kept", "top1", "top5", "lr", "weight_decay", "grid"}}. Where those of all layers
    would need more memory than there is `evaluate.room` for, in one pass for each layer. No weight decay is tried: the
    study has none."""
    shapes, images, results = net.shapes, len(train) + len(test), {}
    fits = 4 * images * sum(map(math.prod, shapes.values())) <= evaluate.room(device)
    for names in [list(shapes)] if fits else [[name] for name in shapes]:
        net.shapes = {name: shapes[name] for name in names}  # what its forward gives
        sizes = [math.prod(shapes[name]) for name in names]
        (x, y), (test_x, test_y) = (
            evaluate.with_labels(*evaluate.extract(net, s, preprocess, device, 128, workers, amp, progress=True))
            for s in (train, test)
        )
        for name, n, a, b in zip(names, sizes, x.split(sizes, 1), test_x.split(sizes, 1), strict=True):
            r = evaluate.linear_sgd(a, y, b, test_y, decays=(0.0,), seed=seed)
            results[name] = {"shape": list(shapes[name]), "features": n, "kept": evaluate.kept(x)} | r
        del x, test_x, a, b  # before the next layer's are there
    net.shapes = shapes
    return results


def main():
    p = evaluate.flags(__doc__)
    p.add_argument("--layers", nargs="+", default=[], help="only these (default: all)")
    p.add_argument("--most-features", type=int, default=9000, help="of a layer; more are max-pooled; fewer is faster")
    args = p.parse_args()
    evaluate.within(1, math.inf, args, "most_features")
    s = evaluate.Subject(args)
    s.need_labels("depth")
    net = Depths(s.backbone, args.layers, s.preprocess["size"], args.most_features)
    results = depth(net, *s.sets.values(), s.preprocess, s.device, s.workers, s.amp, args.seed)
    best = max(r["top1"] for r in results.values())
    print(f"{'depth':<12}{'shape':>14}{'features':>10}{'top-1':>8}")
    for name, r in results.items():
        shape = "x".join(map(str, [*r["shape"][1:], r["shape"][0]]))
        print(f"{name:<12}{shape:>14}{r['features']:>10}{r['top1']:8.2f}{'  best' if r['top1'] == best else ''}")
    print(
        f"         linear probes of frozen maps, max-pooled to {args.most_features} features (height x width x depth)"
    )
    print("         SGD 100 epochs, batch 256, cosine, wd 0; lr chosen on a tenth of TRAIN, then all; no augmentation")
    s.write({"depth": results})


if __name__ == "__main__":
    common.run(main)
