"""Average precision of detections as COCO and as PASCAL VOC 2007 count it, and mean IoU of segmentations.

    COCO    precision at 101 recalls; a detection takes the free object of largest IoU, which must reach the threshold
    VOC     precision at 11 recalls; a detection has its best object alone, which must be free and above the threshold

Both are means over the classes that have objects and over the IoU thresholds .50, .55, ..., .95 (detectron2, whose
figures MoCo, DiLo and SaGe publish, applies VOC's rules at all of them, too). An object may be "ignored" (VOC:
difficult, COCO: crowd): it need not be found, and what finds it does not count.
"""

import collections
import contextlib
import importlib.util
import io
import warnings

import torch
from torchvision.ops import box_area, box_convert

THRESHOLDS = torch.arange(50, 100, 5, dtype=torch.float64) / 100


def average_precision(scores, hits, objects, points):
    """Mean precision [T] over `points` recalls 0, ..., 1; at each the largest precision at that recall or above.

    scores [D]; hits [T, D] for T thresholds: 1 right, 0 wrong, -1 does not count; objects: how many there are to find.
    """
    hits = hits[:, scores.argsort(descending=True, stable=True)]
    right, wrong = (hits == 1).cumsum(1).double(), (hits == 0).cumsum(1).double()  # [T, D]
    precision = (right / (right + wrong).clamp(min=1)).flip(1).cummax(1).values.flip(1) if hits.numel() else right
    recalls = (torch.arange(points, dtype=torch.float64) / (points - 1)).expand(len(hits), -1).contiguous()
    at = torch.searchsorted((right / objects).contiguous(), recalls)  # the first detection with that recall; D: none
    return torch.cat([precision, precision.new_zeros(len(hits), 1)], 1).gather(1, at).mean(1)


def match_coco(iou, ignored):
    """hits [T, D] of detections in falling order of their scores, by their IoU [D, G] with the objects of an image.
    ignored [G]: taken only if no other object fits, and by any number of detections."""
    hits, free = torch.zeros(len(THRESHOLDS), len(iou), dtype=torch.int8), torch.ones(len(THRESHOLDS), iou.shape[1]) > 0
    rows = torch.arange(len(THRESHOLDS))
    for d, row in enumerate(iou.double()):
        fits = free & (row >= THRESHOLDS[:, None])  # [T, G]
        best = torch.where(fits, row - 2 * ignored, -3.0).max(1)
        found = best.values > -3
        hits[found, d] = torch.where(ignored[best.indices[found]], -1, 1).to(torch.int8)
        free[rows[found], best.indices[found]] = ignored[best.indices[found]]
    return hits


def match_voc(iou, ignored):
    """The same by the rules of VOC's devkit: only the best object counts, taken or not."""
    hits, taken = torch.zeros(len(THRESHOLDS), len(iou), dtype=torch.int8), set()
    for d, (value, g) in enumerate(zip(*(t.tolist() for t in iou.double().max(1)), strict=True)):
        for t, threshold in enumerate(THRESHOLDS.tolist()):
            if value > threshold:
                hits[t, d] = -1 if ignored[g] else (t, g) not in taken
                taken.add((t, g))
    return hits


def overlap(found, truth, kind, crowds):
    """IoU [D, G] of the boxes, or of the masks, of an image. With `crowds` [G] the part of a detection that lies in
    the object (COCO)."""
    if kind == "masks":
        a, b = (m["masks"].flatten(1).float() for m in (found, truth))
        shared, first, second = (a @ b.T).double(), a.sum(1)[:, None].double(), b.sum(1).double()
    else:
        a, b = found["boxes"].double(), truth["boxes"].double()
        sides = (torch.minimum(a[:, None, 2:], b[:, 2:]) - torch.maximum(a[:, None, :2], b[:, :2])).clamp(min=0)
        shared, first, second = sides.prod(2), box_area(a)[:, None], box_area(b)
    return shared / torch.where(crowds, first, first + second - shared).clamp(min=1e-9)


def matched(found, truth, rules="coco", kind="boxes", most=100):
    """What an image adds to the average precision: {label: (scores [D], hits [T, D], objects to find)}.

    found: {"boxes" [D, 4], "scores" [D], "labels" [D]}, of which the `most` best of each class count; truth: {"boxes"
    [G, 4], "labels" [G]} and, where some objects are ignored, "ignored" bool [G]. Boxes are x1, y1, x2, y2 in px, x2
    and y2 exclusive. kind = "masks": by "masks" bool [., H, W] in both. rules: "coco" or "voc".
    """
    every = truth.get("ignored", torch.zeros(len(truth["labels"]), dtype=torch.bool))
    result = {}
    for label in sorted({*found["labels"].tolist(), *truth["labels"].tolist()}):
        own, its = (found["labels"] == label).nonzero()[:, 0], truth["labels"] == label
        own = own[found["scores"][own].argsort(descending=True, stable=True)[:most]]
        ignored, hits = every[its], torch.zeros(len(THRESHOLDS), len(own), dtype=torch.int8)
        if len(own) and len(ignored):
            iou = overlap({kind: found[kind][own]}, {kind: truth[kind][its]}, kind, ignored & (rules == "coco"))
            hits = (match_coco if rules == "coco" else match_voc)(iou, ignored)
        result[label] = found["scores"][own], hits, int((~ignored).sum())
    return result


def mean_ap(images, rules="coco"):
    """{"AP", "AP50", "AP75", "classes": {label: AP}} in per cent of what `matched` returned for each image."""
    parts = collections.defaultdict(list)
    for image in images:
        for label, part in image.items():
            parts[label].append(part)
    classes = {}
    for label in sorted(parts):
        scores, hits, objects = zip(*parts[label], strict=True)
        if sum(objects):
            points = 101 if rules == "coco" else 11
            classes[label] = 100 * average_precision(torch.cat(scores), torch.cat(hits, 1), sum(objects), points)
    ap = torch.stack(list(classes.values())).mean(0) if classes else torch.full((len(THRESHOLDS),), torch.nan)
    result = {"AP": ap.mean().item(), "AP50": ap[0].item(), "AP75": ap[5].item()}
    return result | {"classes": {label: value.mean().item() for label, value in classes.items()}}


# ============ COCO's own code, where faster-coco-eval is installed (requirements-coco.txt) ============


def has_official():
    return importlib.util.find_spec("faster_coco_eval") is not None


def coco_results(found, image, categories):
    """The detections of an image, its id in COCO's file, in COCO's format of results."""
    boxes, results = box_convert(found["boxes"], "xyxy", "xywh").tolist(), []
    for i, (box, label) in enumerate(zip(boxes, found["labels"].tolist(), strict=True)):
        result = {"image_id": image, "category_id": categories[label], "bbox": box, "score": found["scores"][i].item()}
        if "masks" in found:
            from faster_coco_eval.core.mask import encode

            rle = encode(found["masks"][i].byte().numpy().copy(order="F"))
            result["segmentation"] = {"size": rle["size"], "counts": rle["counts"]}
        results.append(result)
    return results


def official(file, results, images, kind="boxes"):
    """COCO's twelve numbers for the annotations in `file` and `coco_results` of the `images`, by their ids."""
    from faster_coco_eval import COCO, COCOeval_faster

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # of a file that it leaves open
        truth = COCO(str(file))
        run = COCOeval_faster(truth, truth.loadRes(results), "bbox" if kind == "boxes" else "segm")
        run.params.imgIds = sorted(images)
        run.evaluate(), run.accumulate(), run.summarize()
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
    return {name: 100 * float(v) for name, v in zip(names, list(run.stats)[:12], strict=True) if v >= 0}  # -1: none


# ============ segmentation ============


def confusion(predicted, truth, classes, ignored=255):
    """Pixels of each true class (rows) that are predicted as each class (columns), [C, C]; `ignored` ones left out."""
    known = truth != ignored
    pairs = truth[known].long() * classes + predicted[known].long()
    return torch.bincount(pairs.flatten(), minlength=classes**2).view(classes, classes)


def mean_iou(matrix):
    """(mean IoU in per cent, IoU of each class) of the confusion matrix of all images. A class that occurs in neither
    truth nor prediction is nan and does not count."""
    matrix = matrix.double()
    right = matrix.diagonal()
    iou = 100 * right / (matrix.sum(0) + matrix.sum(1) - right)  # 0 / 0: nan
    return iou.nanmean().item(), iou
