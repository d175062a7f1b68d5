"""Average precision of detections as COCO and as PASCAL VOC 2007 count it, and mean IoU of segmentations.

    COCO    precision at 101 recalls; a detection takes the free object of largest IoU, which must reach the threshold
    VOC     precision at 11 recalls; a detection has its best object alone, which must be free and above the threshold

Both are means over the classes that have objects and over the IoU thresholds .50, .55, ..., .95 (detectron2, whose
figures MoCo, DiLo and SaGe publish, applies VOC's rules at all of them, too). An object may be "ignored" (VOC:
difficult, COCO: crowd): it need not be found, and what finds it does not count.
"""

import torch
from torchvision.ops import box_iou

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


def overlap(found, truth, kind, voc):
    """IoU [D, G] of the boxes, or of the masks, of an image. VOC's boxes include their last pixels."""
    if kind == "masks":
        a, b = (m["masks"].flatten(1).double() for m in (found, truth))
        shared, first = a @ b.T, a.sum(1)[:, None]
        return shared / (first + b.sum(1) - shared).clamp(min=1)
    edge = torch.tensor([0, 0, 1, 1]) if voc else 0
    return box_iou(found["boxes"] + edge, truth["boxes"] + edge)


def detection_ap(found, truths, rules="coco", kind="boxes", most=100):
    """{"AP", "AP50", "AP75", "classes": {label: AP}} in per cent.

    found: for each image {"boxes" [D, 4], "scores" [D], "labels" [D]}, of which the `most` best of each class count;
    truths: {"boxes" [G, 4], "labels" [G]} and, where some objects are ignored, "ignored" bool [G]. Boxes are x1, y1,
    x2, y2 in px. kind = "masks": by "masks" bool [., H, W] in both. rules: "coco" or "voc".
    """
    match, points = {"coco": (match_coco, 101), "voc": (match_voc, 11)}[rules]
    classes = {}
    for label in sorted({label for t in truths for label in t["labels"].tolist()}):
        scores, hits, objects = [torch.zeros(0)], [torch.zeros(len(THRESHOLDS), 0, dtype=torch.int8)], 0
        for f, t in zip(found, truths, strict=True):
            own, its = (f["labels"] == label).nonzero()[:, 0], t["labels"] == label
            own = own[f["scores"][own].argsort(descending=True, stable=True)[:most]]
            t = {k: v[its] for k, v in t.items() if k in (kind, "ignored")}
            ignored = t.get("ignored", torch.zeros(int(its.sum()), dtype=torch.bool))
            objects += int((~ignored).sum())
            scores.append(f["scores"][own])
            if len(own) and len(ignored):
                hits.append(match(overlap({kind: f[kind][own]}, t, kind, rules == "voc"), ignored))
            else:
                hits.append(torch.zeros(len(THRESHOLDS), len(own), dtype=torch.int8))
        if objects:
            classes[label] = 100 * average_precision(torch.cat(scores), torch.cat(hits, 1), objects, points)
    ap = torch.stack(list(classes.values())).mean(0) if classes else torch.full((len(THRESHOLDS),), torch.nan)
    result = {"AP": ap.mean().item(), "AP50": ap[0].item(), "AP75": ap[5].item()}
    return result | {"classes": {label: value.mean().item() for label, value in classes.items()}}


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
