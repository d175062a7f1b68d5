"""How good are saliency maps? F-measure and mean absolute error against drawn masks.

    python -m analysis.score_saliency IMAGES MASKS --method rbd mc gs
    python -m analysis.score_saliency IMAGES MASKS --picture FILE              twenty images with masks and maps
    python -m analysis.score_saliency IMAGES MASKS --maps FOLDER

The maps are those of saliency.py, computed here, or saved ones.
"""

import argparse

import torch
from torchvision.transforms.v2 import functional as tvf
from torchvision.utils import make_grid

import common
import runs
import saliency
import sets
from analysis import reconstruct


def score(maps, truths):
    """{"max_f", "mean_f", "adaptive_f", "mae"} of maps, float [h, w], against truths, bool [h, w] of the same sizes.

    A map is stretched to 0..255. Precision and recall at each of the 256 thresholds are averaged over the images before
    F = (1 + b^2) P R / (b^2 P + R), b^2 = 0.3, is computed; then the maximum and the mean over the thresholds, as
    papers report. Adaptive: one threshold per image, twice its mean. MAE: the mean of |map - truth|.
    """
    precision, recall = torch.zeros(257, dtype=torch.double), torch.zeros(257, dtype=torch.double)
    error, n = 0.0, 0
    for m, truth in zip(maps, truths, strict=True):
        m, truth = saliency.scaled(m[None].float().cpu())[0], truth.cpu()
        level, cut = (m * 255).round().long(), m >= (2 * m.mean()).clamp(max=m.max())
        # [256]: pixels at or above each threshold, and those of them within the object
        counts = torch.stack([torch.bincount(t.flatten(), minlength=256) for t in (level, level[truth])])
        found, right = counts.flip(1).cumsum(1).flip(1).double()
        found, right = torch.cat([found, cut.sum()[None]]), torch.cat([right, (cut & truth).sum()[None]])
        precision += right / found.clamp(min=1)
        recall += right / truth.sum().clamp(min=1)
        error += (m - truth.float()).abs().mean().item()
        n += 1
    p, r = precision / n, recall / n
    f = (1.3 * p * r / (0.3 * p + r).clamp(min=1e-12)).tolist()
    return {"max_f": max(f[:256]), "mean_f": sum(f[:256]) / 256, "adaptive_f": f[256], "mae": error / n}


def decoded(folder, keys):
    """Yields the images of a folder with the names `keys`, uint8 [3, h, w]. One that is missing ends the program."""
    files = sets.named(folder)
    if missing := [k for k in keys if k not in files]:
        common.fail(f"{len(missing)} of {len(keys)} images have nothing of their name in {folder}: {missing[0]}")
    for k in keys:
        try:
            yield sets.decode(files[k])
        except OSError as error:
            common.fail(str(error))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=common.Help)
    methods = saliency.METHODS + saliency.CLASS_METHODS
    p.add_argument("images", help="folder of images")
    p.add_argument("masks", help="folder of masks with the images' names: above 128 is the object")
    p.add_argument("--method", nargs="+", choices=methods, default=list(saliency.METHODS), help="of the maps")
    p.add_argument("--classifier", help="for cam and gradient: of downstream.finetune --save, or torchvision:NAME")
    p.add_argument("--maps", help="folder of saved maps with the images' names; none are computed")
    p.add_argument("--picture", help="PNG to write: twenty images, each with its mask and its maps")
    p.add_argument("--limit", type=int, default=0, help="the first N images (0: all)")
    p.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: cuda, else mps, else cpu")
    args = p.parse_args(argv)
    common.at_least(0, args, "limit")
    if not args.maps and set(args.method) & set(saliency.CLASS_METHODS) and not args.classifier:
        common.fail(f"--method {' and '.join(saliency.CLASS_METHODS)} need --classifier FILE")
    _, _, device = common.setup(args.device)
    keys = list(sets.named(args.images))[: args.limit or None] or common.fail(f"no images in {args.images}")
    truths = [mask[0] > 128 for mask in decoded(args.masks, keys)]
    maps = {}  # {name: maps [h, w] in [0, 1], of the masks' sizes}
    if args.maps:
        maps["saved"] = [m[:1] / 255 for m in decoded(args.maps, keys)]
    else:
        classifier = reconstruct.open_classifier(args.classifier).to(device) if args.classifier else None
        side = saliency.side_for(*next(decoded(args.images, keys)).shape[1:])
        images = torch.stack([tvf.resize(x, [side, side], antialias=True) for x in decoded(args.images, keys)])
        for method in args.method:
            found = [saliency.maps(x.to(device), method, classifier).cpu() for x in images.split(64)]
            maps[method] = (torch.cat(found) * 255).round()[:, None] / 255  # as in files, of 8 bits
    print(f"{len(keys)} images, F-measure with beta^2 = 0.3\n\nmethod     max F  mean F  adaptive    MAE")
    for name, found in maps.items():
        maps[name] = [saliency.resized(m[None], *t.shape)[0, 0] for m, t in zip(found, truths, strict=True)]
        r = score(maps[name], truths)
        print(f"{name:<9} {r['max_f']:6.3f} {r['mean_f']:7.3f} {r['adaptive_f']:9.3f} {r['mae']:6.3f}")
    if args.picture:
        shown, cells = torch.linspace(0, len(keys) - 1, min(20, len(keys))).long().tolist(), []
        for i, image in zip(shown, decoded(args.images, [keys[i] for i in shown]), strict=True):
            for cell in (image / 255, truths[i].float(), *(found[i] for found in maps.values())):
                cells.append(saliency.resized(cell.expand(3, -1, -1)[None], 128, 128)[0])
        grid = make_grid(torch.stack(cells), nrow=2 * (2 + len(maps)), padding=2, pad_value=1)
        runs.write_picture(args.picture, grid)
        print(f"{args.picture}: twice in a row: image, mask, {', '.join(maps)}")


if __name__ == "__main__":
    common.run(main)
