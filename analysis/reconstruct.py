"""What an autoencoder recovers of images (SaGe, sec. 4.4): pictures, and whether a classifier still recognises them.

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

import backbones
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


def open_classifier(target, arch=None, size=None):
    """The Classifier in a file of --save, in a torchvision state dict (`arch` names its network; `size` in px, default
    224), or "torchvision:NAME" with its default weights, which torchvision downloads. Bad input ends the program."""
    try:
        if target.startswith("torchvision:"):
            name = target.removeprefix("torchvision:")
            best = torchvision.models.get_model_weights(name).DEFAULT
            net, own = torchvision.models.get_model(name, weights=best), best.transforms()
            return Classifier(net, len(best.meta["categories"]), own.mean, own.std, size or own.crop_size[0])
        if not Path(target).is_file():
            common.fail(f"--classifier {target}: no such file")
        found = runs.load(target)
        if found.get("kind") == "classifier" and {"state_dict", "preprocess"} <= set(found):
            own = checkpoints.well_formed(target, found)["preprocess"]
            backbone = backbones.build(found["arch"], found.get("built_for", own["size"]))
            backbone.load_state_dict(found["state_dict"])
            head = nn.Linear(backbone.dim, len(found["head"]["bias"]))
            head.load_state_dict(found["head"])
            net = nn.Sequential(checkpoints.as_trained(backbone, own, size or 0), head)
            return Classifier(net, head.out_features, own["mean"], own["std"], size or own["size"])
        if "preprocess" in found or "model" in found:
            common.fail(
                f"--classifier {target} holds no classifier: python -m downstream.finetune RUN --save FILE makes one"
            )
        if not arch:
            common.fail(f"--classifier {target} holds a plain state dict: say of which network with --classifier-arch")
        weights = checkpoints.weights(f"--classifier {target}", found)
        biases = [v for k, v in weights.items() if k.endswith(".bias") and v.ndim == 1]
        if not biases:
            common.fail(f"--classifier {target} is not a state dict: it holds no weights by name")
        net = torchvision.models.get_model(arch, weights=None, num_classes=len(biases[-1]))
        net.load_state_dict(found)
        return Classifier(net, len(biases[-1]), data.MEAN, data.STD, size or 224)
    except OSError as error:  # urllib's errors are of this kind
        common.fail(f"--classifier {target} could not be fetched: {runs.reason(error)}")
    except (EOFError, ValueError, AttributeError) as error:  # AttributeError: torchvision's networks for other tasks
        common.fail(f"--classifier {target}: {runs.reason(error)}")
    except RuntimeError as error:
        common.fail(f"--classifier {target} does not fit the architecture: {' '.join(str(error).split())[:300]}")


# ============ recovered images ============


def guesses(classifier):
    """How many a classifier has for one picture: five as in SaGe (sec. 4.4), one of ten classes or fewer, of which five
    would say little."""
    return 1 if classifier.classes <= 10 else 5


def check_classifier(classifier, dataset):
    """Stop unless the outputs of `classifier` can be the classes of `dataset`."""
    if not (sets.labels_of(dataset) >= 0).any():
        common.fail(f"{dataset.name} has no labels, so there is nothing that a classifier could recognise")
    if classifier.classes != evaluate.classes_of(dataset):
        common.fail(
            f"the classifier knows {classifier.classes} classes, {dataset.name} has {evaluate.classes_of(dataset)}"
        )


@torch.inference_mode()
def perceptual(autoencoder, classifier, dataset, size, device, batch_size=256, workers=0, amp=False):
    """The perceptual test of SaGe (sec. 4.4): does a network trained with labels still recognise the recovered images?

    autoencoder: [B, 3, size, size] in [-1, 1] to the same; classifier: from open_classifier, or None for the error
    alone. Returns {"mse"}, the mean squared difference of images in [-1, 1], and top-1 and top-5 in per cent of the
    recovered and of the un-augmented images themselves: {"top1", "top5", "originals_top1", "originals_top5"}.
    """
    if classifier is not None:
        check_classifier(classifier, dataset)
    plain = {"size": size, "interpolation": "bilinear", "mean": data.HALF, "std": data.HALF}
    errors, logits, originals, labels = [], [], [], []
    with evaluate.in_eval(autoencoder), torch.autocast(device.type, torch.bfloat16, enabled=amp):
        for x, y in data.batches(dataset, plain, batch_size, device, workers):
            recovered = autoencoder(x).float()
            errors.append((recovered - x).square().mean((1, 2, 3)))
            if classifier is not None:
                logits.append(classifier(recovered).float())
                originals.append(classifier(x).float())
                labels.append(y)
    result = {"mse": torch.cat(errors).mean().item()}
    for name, scores in (("", logits), ("originals_", originals)) if labels else ():
        top1, top5 = evaluate.accuracy(*evaluate.with_labels(torch.cat(scores), torch.cat(labels)))
        result |= {f"{name}top1": top1.item(), f"{name}top5": top5.item()}
    return result


@torch.inference_mode()
def draw_recoveries(autoencoders, dataset, views, device, classifier=None, n=8, seed=0, amp=False):
    """Rows of pictures: `n` images of a set and of one cut of each per view, all with what the autoencoders recover of
    them.

    autoencoders: {name: module}, each [B, 3, S, S] in [-1, 1] to the same; with one of name "" the rows need no names.
    views: of data.view, with mean = std = 0.5. The images and the cuts depend on `seed` alone. Under a recovery stand
    its mean squared error and, with a classifier, whether the image's class is among its first `guesses`.
    """
    picked = sets.pick(dataset, torch.randperm(len(dataset), generator=data.generator(seed, "pictures"))[:n])
    plain = {"size": views[0]["size"], "interpolation": "bilinear", "mean": data.HALF, "std": data.HALF}
    x, y = next(data.batches(picked, plain, len(picked), device))
    index, cuts = next(data.Loader(picked, views, len(picked), seed, device=device).epoch(0))
    places = index.argsort()  # the loader shuffles
    sources = [("image", x), *((f"view {i}", cut[places]) for i, cut in enumerate(cuts, 1))]
    rows = []
    modules = [*autoencoders.values(), *([classifier] if classifier is not None else [])]
    with evaluate.in_eval(*modules), torch.autocast(device.type, torch.bfloat16, enabled=amp):
        for source, x in sources:
            rows.append((source, x, None, None))
            for name, autoencoder in autoencoders.items():
                recovered = autoencoder(x).float()
                captions = [f"{e:.3f}" for e in (recovered - x).square().mean((1, 2, 3)).tolist()]
                marks = None
                if classifier is not None:
                    best = classifier(recovered).topk(guesses(classifier), 1).indices.cpu()
                    hits = (best == y[:, None]).any(1).tolist()
                    marks = [hit if label >= 0 else None for hit, label in zip(hits, y.tolist(), strict=True)]
                rows.append((f"recovered ({name})" if name else "recovered", recovered, captions, marks))
    return pictures.draw_rows(rows)


# ============ the command ============


def open_autoencoder(run):
    """(the script of the run's method, its autoencoder, what backbone.pt says) for a run folder or the backbone.pt in
    it."""
    *_, about, path = checkpoints.open_backbone(str(run), None, 0, 0)
    method = about.get("method") or common.fail(f"{run} is not a run of a method that makes images")
    script = importlib.import_module(method) if (Path(evaluate.__file__).parent / f"{method}.py").is_file() else None
    if not hasattr(script, "autoencoder"):
        common.fail(f"{method} does not make images: a run with a decoder is needed")
    return script, script.autoencoder(str(path.parent)), about


def main():
    p = evaluate.flags(__doc__)
    p.add_argument("--classifier", help="a file of downstream.finetune --save, a state dict, or torchvision:NAME")
    p.add_argument("--classifier-arch", help="torchvision's name of the network, for a state dict")
    p.add_argument("--classifier-size", type=int, help="px that it sees (default: its own, else 224)")
    p.add_argument("--beside", nargs="+", default=[], help="other runs whose recoveries the picture shows, too")
    p.add_argument("--recipe", help="of the method's script, whose views the picture shows (default: by data)")
    p.add_argument("--out", help="folder for the picture (default: the checkpoint's)")
    args = p.parse_args()
    evaluate.within(*checkpoints.SIZES, args, "classifier_size")
    s, classifier, results = evaluate.Subject(args), None, {}
    test, device, amp = s.sets["test"], s.device, s.amp
    file = s.folder(args.out, "reconstructions.png") / "reconstructions.png"
    if args.classifier:
        classifier = open_classifier(args.classifier, args.classifier_arch, args.classifier_size).to(device)
        check_classifier(classifier, test)
    names = pictures.names_of([args.checkpoint, *args.beside])
    script, autoencoder, about = open_autoencoder(args.checkpoint)
    size = about["preprocess"]["size"]  # the decoder's: it has no other
    autoencoders = {names[0] if args.beside else "": autoencoder.to(device)}
    for name, run in zip(names[1:], args.beside, strict=True):
        _, other, its = open_autoencoder(run)
        if its["preprocess"]["size"] != size:
            common.fail(f"--beside {run}: its images have {its['preprocess']['size']} px, not {size}")
        autoencoders[name] = other.to(device)
    recipe = args.recipe or sets.recipe_for(about["data"], script.RECIPES)
    if recipe not in script.RECIPES:
        common.fail(f"--recipe {recipe}: {about['method']}.py has {', '.join(script.RECIPES)}")
    views = [data.view(size, **{**v, "mean": data.HALF, "std": data.HALF}) for v in script.RECIPES[recipe]["views"]]
    if classifier:
        r = perceptual(autoencoder, classifier, test, size, device, workers=s.workers, amp=amp)
        results["perceptual"] = r | {"classifier": args.classifier}
        print(f"perceptual {evaluate.tops(r)}  MSE {r['mse']:.4f}   (recovered images)")
        print(f"           top-1 {r['originals_top1']:.2f}  top-5 {r['originals_top5']:.2f}               (the images)")
        print(f"         {len(test)} un-augmented test images at {size} px, classified by {args.classifier}")
        print("         MSE of pixels in [-1, 1]")
    runs.write_picture(file, draw_recoveries(autoencoders, test, views, device, classifier, seed=args.seed, amp=amp))
    print(f"{file}: images, their views, and what is recovered of each, with its MSE in [-1, 1]")
    if classifier:
        print(f"         green: {args.classifier} has the right class among its first {guesses(classifier)}")
    s.write(results)


if __name__ == "__main__":
    common.run(main)
