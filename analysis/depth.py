"""At which depth of a network are the classes easiest to read? (Kolesnikov et al. 2019, Figure 5)

    python -m analysis.depth RUN [--most-features 2000]

A linear probe after every stage. The table of all layers is printed, and RUN/evaluate.json keeps it.
"""

import torch
from torch import nn

import checkpoints
import common
import evaluate


class Layer(nn.Module):
    """A layer of a backbone, pooled to `most` features at most: images [B, 3, S, S] to [B, n]."""

    def __init__(self, trunk, name, most):
        super().__init__()
        self.trunk, self.name, self.most = trunk, name, most

    def forward(self, x):
        return self.trunk.taps(x, self.most)[self.name].flatten(1)


def depth(backbone, train, test, preprocess, device, most=9000, workers=0, amp=False, seed=0):
    """A linear probe without weight decay, as in the study, on each layer, in order of depth: {layer: {"shape",
    "features", "top1", "top5", "lr", "weight_decay", "grid"}}. One layer's features are in memory at a time.

    As in the study's code, root is after the first pooling, and a RevNet's block before the pooling that follows it.
    Unlike there, the last block of a ResNet v2 or RevNet is after the last BatchNorm (and ReLU), and a VGG's block
    after its max-pooling."""
    trunk = backbone if isinstance(backbone, checkpoints.InputAdapter) else checkpoints.InputAdapter(backbone)
    if not hasattr(trunk.f, "taps"):
        common.fail("depth needs a backbone with `taps`, which gives its layers by name (backbones.py)")
    with evaluate.in_eval(trunk), torch.inference_mode():
        taps = trunk.taps(torch.zeros(1, 3, preprocess["size"], preprocess["size"], device=device), most)
    results = {}
    for name, tap in taps.items():
        net, how = Layer(trunk, name, most), (preprocess, device, 128, workers, amp, True)
        (x, y), (test_x, test_y) = (evaluate.with_labels(*evaluate.extract(net, s, *how)) for s in (train, test))
        found = evaluate.linear_sgd(x, y, test_x, test_y, decays=(0.0,), seed=seed)
        results[name] = {"shape": list(tap.shape[1:]), "features": x.shape[1]} | found
        del x, test_x  # before the next layer's are extracted
    return results


def main():
    p = evaluate.flags(__doc__)
    p.add_argument("--most-features", type=int, default=9000, help="per layer, by max-pooling; fewer is faster")
    args = p.parse_args()
    common.at_least(1, args, "most_features")
    s = evaluate.Subject(args)
    s.need_labels("depth")
    how = s.preprocess, s.device, args.most_features, s.workers, s.amp, args.seed
    results = depth(s.backbone, *s.sets.values(), *how)
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
