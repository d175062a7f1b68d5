"""How good are saliency maps? F-measure and mean absolute error against drawn masks.

    python -m analysis.score_saliency IMAGES MASKS --method rbd mc gs          maps of `saliency.py`, computed here
    python -m analysis.score_saliency IMAGES MASKS --maps FOLDER               saved maps
    python -m analysis.score_saliency IMAGES MASKS --picture FILE              twenty images with masks and maps
"""

import argparse
import time

import torch
from torchvision.utils import make_grid

import common
import runs
import saliency
import sets
from analysis import reconstruct


def score(maps, truths):
    """{"max_f", "mean_f", "adaptive_f", "mae"} of maps, float [h, w] each, against truths, bool [h, w] of the same sizes.

    A map is stretched to 0..255. Precision and recall at each of the 256 thresholds are averaged over the images before
    they make F = (1 + b^2) P R / (b^2 P + R), b^2 = 0.3; then the maximum and the mean over the thresholds. (The mean of
    the images' own maxima would be larger, and is not what papers report.) Adaptive: one threshold an image, twice its
    mean. MAE: the mean of |map - truth|.
    """
    precision, recall = torch.zeros(257, dtype=torch.double), torch.zeros(257, dtype=torch.double)
    error, n = 0.0, 0
    for m, truth in zip(maps, truths, strict=True):
        m, truth = saliency.scaled(m[None].float().cpu())[0], truth.cpu()
        level = (m * 255).round().long()
        # [256]: pixels at or above each threshold, and those of them within the object
        counts = torch.stack([torch.bincount(t.flatten(), minlength=256) for t in (level, level[truth])])
        found, right = counts.flip(1).cumsum(1).flip(1).double()
        cut = m >= (2 * m.mean()).clamp(max=m.max())
        found = torch.cat([found, cut.sum()[None]])
        right = torch.cat([right, (cut & truth).sum()[None]])
        precision += right / found.clamp(min=1)
        recall += right / truth.sum().clamp(min=1)
        error += (m - truth.float()).abs().mean().item()
        n += 1
    p, r = precision / n, recall / n
    f = (1.3 * p * r / (0.3 * p + r).clamp(min=1e-12)).tolist()
    return {"max_f": max(f[:256]), "mean_f": sum(f[:256]) / 256, "adaptive_f": f[256], "mae": error / n}


def matched(folder, keys):
    """The masks or maps in a folder for images `keys`, in their order, uint8 [h, w]; names what does not match or decode and
    ends the program."""
    files = sets.named(folder)
    if odd := [k for k in keys if k not in files]:
        some = ", ".join(odd[:10]) + (", ..." if len(odd) > 10 else "")
        common.fail(f"{len(odd)} of {len(keys)} images have nothing of their name in {folder}: {some}")
    try:
        return [sets.decode(path := files[k])[0] for k in keys]
    except OSError as error:
        common.fail(f"{path}: {error}")


def main(argv=None):
    p = argparse.ArgumentParser(
        usage="python -m analysis.score_saliency IMAGES MASKS [flags]", description=__doc__, formatter_class=common.Help,
        allow_abbrev=False,
    )  # fmt: skip
    p.add_argument("images", help="folder of images")
    p.add_argument("masks", help="folder of masks with the images' names: above 128 is the object")
    p.add_argument(
        "--method", nargs="+", choices=saliency.METHODS + saliency.CLASS_METHODS, default=list(saliency.METHODS),
        help="of the maps",
    )  # fmt: skip
    p.add_argument("--classifier", help="for cam and gradient: a file of downstream.finetune --save, or torchvision:NAME")
    p.add_argument("--maps", help="folder of saved maps with the images' names; none are computed")
    p.add_argument("--picture", help="PNG to write: twenty images, each with its mask and its maps")
    p.add_argument("--limit", type=int, default=0, help="the first N images (0: all)")
    p.add_argument("--batch-size", type=int, default=64, help="images at a time")
    p.add_argument("--workers", type=int, default=0, help="loader workers")
    p.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: cuda, else mps, else cpu")
    args = p.parse_args(argv)
    common.at_least(1, args, "batch_size")
    common.at_least(0, args, "workers", "limit")
    if not args.maps and set(args.method) & set(saliency.CLASS_METHODS) and not args.classifier:
        common.fail(f"--method {' and '.join(saliency.CLASS_METHODS)} need --classifier FILE")
    _, _, device = common.setup(args.device)
    images = sets.named(args.images)
    keys = list(images)[: args.limit or None]
    if not keys:
        common.fail(f"no images in {args.images}")
    truths = [grey > 128 for grey in matched(args.masks, keys)]
    saved = [grey[None] / 255 for grey in matched(args.maps, keys)] if args.maps else None
    classifier = reconstruct.open_classifier(args.classifier).to(device) if args.classifier else None
    dataset = sets.Files(args.images, [(images[k], -1) for k in keys], None, args.images)
    side = saliency.first_side(dataset)

    rows, pictures = [], []
    shown = torch.linspace(0, len(keys) - 1, min(20, len(keys))).long().tolist()
    for method in ["saved"] if saved else args.method:
        start, found = time.perf_counter(), saved
        if not saved:
            found, every = [], range(len(keys))
            for _, _, m, errors in saliency.walk(
                dataset, every, method, device, classifier, side, args.batch_size, args.workers
            ):
                if any(errors):
                    common.fail(next(filter(None, errors)))
                found += (m.float() / 255)[:, None]
        ms = 1000 * (time.perf_counter() - start) / len(keys)
        found = [saliency.resized(m[None], *truth.shape)[0, 0] for m, truth in zip(found, truths, strict=True)]
        r = score(found, truths)
        rows.append(f"{method:<9} {r['max_f']:6.3f} {r['mean_f']:7.3f} {r['adaptive_f']:9.3f} {r['mae']:6.3f} "
                    f"{'' if saved else f'{ms:.0f}':>9}")  # fmt: skip
        pictures.append([found[i] for i in shown])
    print(f"{len(keys)} images, F-measure with beta^2 = 0.3\n")
    print("method     max F  mean F  adaptive    MAE  ms/image")
    print("\n".join(rows))
    if args.picture:
        cells = []
        for row, i in enumerate(shown):
            for cell in (dataset.read(i)[0].float() / 255, truths[i].float(), *(column[row] for column in pictures)):
                cells.append(saliency.resized(cell.expand(3, -1, -1)[None], 128, 128)[0])
        runs.write_picture(args.picture, make_grid(torch.stack(cells), nrow=2 * (2 + len(pictures)), padding=2, pad_value=1))
        print(f"{args.picture}: twice in a row: image, mask, {', '.join(['saved'] if saved else args.method)}")


if __name__ == "__main__":
    common.run(main)
