"""What an autoencoder recovers of images (SaGe, sec. 4.4): pictures, and whether a classifier still recognizes them.

    python -m analysis.reconstruct RUN [--beside RUN2]         RUN/reconstructions.png: images, views, recoveries
    python -m analysis.reconstruct RUN --classifier FILE       the perceptual test as well
    python -m analysis.reconstruct RUN --classifier torchvision:resnet50

FILE: of `python -m downstream.finetune RUN --labels 100 --save FILE`.
"""

import importlib
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import checkpoints
import common
import data
import evaluate
import runs
import sets
from analysis import pictures

# ============ classifiers ============


class Classifier(nn.Module):
    """A frozen network whose forward takes images in [-1, 1], of any square size, to logits [B, classes]: it resizes
    them to the size it was trained at and normalizes them by its own mean and std."""

    def __init__(self, net, classes, mean, std, size):
        super().__init__()
        self.net, self.classes, self.size = net, classes, size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, x):
        x = (x.float() / 2 + 0.5 - self.mean) / self.std
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return self.net(x)


def open_classifier(target):
    """The Classifier in a file of `downstream.finetune --save`, or "torchvision:NAME" with its default weights."""
    if target.startswith("torchvision:"):
        name = target.removeprefix("torchvision:")
        try:
            best = torchvision.models.get_model_weights(name).DEFAULT
            net = torchvision.models.get_model(name, weights=best)
        except (OSError, ValueError) as error:  # no network; no such name
            common.fail(f"--classifier {target} could not be fetched: {runs.reason(error)}")
        own = best.transforms()
        return Classifier(net, len(best.meta["categories"]), own.mean, own.std, own.crop_size[0])
    trunk, own, found, _ = checkpoints.open_backbone(target, None, 0, 0)
    if found.get("kind") != "classifier":
        common.fail(f"--classifier {target} holds no classifier: downstream.finetune RUN --save FILE makes one")
    head = nn.Linear(trunk.dim, len(found["head"]["bias"]))
    if found["head"]["weight"].shape != head.weight.shape:
        common.fail(f"--classifier {target}: its head does not fit the architecture")
    head.load_state_dict(found["head"])
    return Classifier(nn.Sequential(trunk, head), head.out_features, own["mean"], own["std"], own["size"])


def check_classifier(classifier, dataset):
    """Stop unless the outputs of `classifier` can be the classes of `dataset`."""
    if not (sets.labels_of(dataset) >= 0).any():
        common.fail(f"{dataset.name} has no labels that a classifier could predict")
    if classifier.classes != (classes := evaluate.classes_of(dataset)):
        common.fail(f"the classifier knows {classifier.classes} classes, {dataset.name} has {classes}")


def guesses(classifier):
    """Among how many of its first classes the right one must be: 5 as in SaGe (sec. 4.4), 1 of ten classes or fewer."""
    return 1 if classifier.classes <= 10 else 5


# ============ recovered images ============


@torch.inference_mode()
def perceptual(autoencoder, classifier, dataset, size, device, batch_size=256, workers=0, amp=False):
    """The perceptual test of SaGe (sec. 4.4): does a network trained with labels still recognize the recovered images?

    autoencoder: [B, 3, size, size] in [-1, 1] to the same. Returns {"mse", "top1", "top5", "originals_top1",
    "originals_top5"}: the mean squared error of pixels; per cent of the recovered and of the un-augmented images."""
    plain, found = {"size": size, "interpolation": "bilinear", "mean": data.HALF, "std": data.HALF}, []
    with evaluate.in_eval(autoencoder), torch.autocast(device.type, torch.bfloat16, enabled=amp):
        for x, y in data.batches(dataset, plain, batch_size, device, workers):
            recovered = autoencoder(x).float()
            errors = (recovered - x).square().mean((1, 2, 3))
            found.append((errors, classifier(recovered).float(), classifier(x).float(), y))
    errors, logits, originals, labels = map(torch.cat, zip(*found, strict=True))
    result = {"mse": errors.mean().item()}
    for name, scores in (("", logits), ("originals_", originals)):
        top1, top5 = evaluate.accuracy(*evaluate.with_labels(scores, labels))
        result |= {f"{name}top1": top1.item(), f"{name}top5": top5.item()}
    return result


@torch.inference_mode()
def draw_recoveries(autoencoders, dataset, views, device, classifier=None, n=8, seed=0, amp=False):
    """Rows of pictures: `n` images and one crop of each per view, each row with what the autoencoders recover of it,
    its mean squared error and, with a classifier, whether the right class is among its first `guesses`.

    autoencoders: {name: module}, each [B, 3, S, S] in [-1, 1] to the same; the name "" is not written. views: of
    data.view, with mean = std = 0.5. Images and crops depend on `seed` alone."""
    some = sets.pick(dataset, torch.randperm(len(dataset), generator=data.generator(seed, "pictures"))[:n])
    plain = {"size": views[0]["size"], "interpolation": "bilinear", "mean": data.HALF, "std": data.HALF}
    whole, y = next(data.batches(some, plain, len(some), device))
    index, crops = next(data.Loader(some, views, len(some), seed, device=device).epoch(0))
    order, rows = index.argsort(), []  # the loader shuffles
    modules = [*autoencoders.values(), *([classifier] if classifier else [])]
    with evaluate.in_eval(*modules), torch.autocast(device.type, torch.bfloat16, enabled=amp):
        for i, x in enumerate([whole, *(crop[order] for crop in crops)]):
            rows.append((f"view {i}" if i else "image", x, None, None))
            for name, autoencoder in autoencoders.items():
                recovered, marks = autoencoder(x).float(), None
                captions = [f"{e:.3f}" for e in (recovered - x).square().mean((1, 2, 3)).tolist()]
                if classifier:
                    best = classifier(recovered).topk(guesses(classifier), 1).indices.cpu()
                    hits = (best == y[:, None]).any(1).tolist()
                    marks = [hit if label >= 0 else None for hit, label in zip(hits, y.tolist(), strict=True)]
                rows.append((f"recovered ({name})" if name else "recovered", recovered, captions, marks))
    return pictures.draw_rows(rows)


# ============ the command ============


def open_autoencoder(run):
    """(autoencoder, what backbone.pt says of itself) for a run folder of a method whose script has `autoencoder`."""
    *_, about, path = checkpoints.open_backbone(run, None, 0, 0)
    method = about.get("method", run)
    script = importlib.import_module(method) if Path(evaluate.__file__).with_name(f"{method}.py").is_file() else None
    if not hasattr(script, "autoencoder"):
        common.fail(f"{method} does not make images: a run with a decoder is needed")
    return script.autoencoder(str(path.parent)), about


def main():
    p = evaluate.flags(__doc__)
    p.add_argument("--classifier", help="a file of downstream.finetune --save, or torchvision:NAME")
    p.add_argument("--beside", nargs="+", default=[], help="other runs whose recoveries the picture shows, too")
    p.add_argument("--recipe", help="of the method's script, whose views the picture shows (default: by data)")
    p.add_argument("--out", help="folder for the picture (default: the checkpoint's)")
    args = p.parse_args()
    s, classifier = evaluate.Subject(args), None
    test, file = s.sets["test"], s.folder(args.out) / "reconstructions.png"
    if args.classifier:
        classifier = open_classifier(args.classifier).to(s.device)
        check_classifier(classifier, test)
    targets = [args.checkpoint, *args.beside]
    opened, abouts = zip(*map(open_autoencoder, targets), strict=True)
    about, size = abouts[0], abouts[0]["preprocess"]["size"]
    recipes = importlib.import_module(about["method"]).RECIPES
    if any(its["preprocess"]["size"] != size for its in abouts):
        common.fail(f"--beside: all runs must be of images of {size} px")
    recipe = args.recipe or sets.recipe_for(about["data"], recipes)
    if recipe not in recipes:
        common.fail(f"--recipe {recipe}: {about['method']}.py has {', '.join(recipes)}")
    views = [data.view(size, **{**v, "mean": data.HALF, "std": data.HALF}) for v in recipes[recipe]["views"]]
    names = pictures.names_of(targets) if args.beside else [""]
    autoencoders = {name: net.to(s.device) for name, net in zip(names, opened, strict=True)}
    if classifier:
        r = perceptual(opened[0], classifier, test, size, s.device, workers=s.workers, amp=s.amp)
        print(f"perceptual {evaluate.tops(r)}  MSE {r['mse']:.4f}   (recovered images)")
        print(f"           top-1 {r['originals_top1']:.2f}  top-5 {r['originals_top5']:.2f}               (the images)")
        print(f"         {len(test)} un-augmented test images at {size} px in [-1, 1]; classifier {args.classifier}")
        s.write({"perceptual": r | {"classifier": args.classifier}})
    runs.write_picture(file, draw_recoveries(autoencoders, test, views, s.device, classifier, 8, args.seed, s.amp))
    print(f"{file}: images, their views, and what is recovered of each, with its MSE in [-1, 1]")
    if classifier:
        print(f"         green: the classifier has the right class among its first {guesses(classifier)}")


if __name__ == "__main__":
    common.run(main)
