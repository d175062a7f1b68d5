"""Average precision and mean IoU, by hand and beside the official COCO evaluation where it is installed."""

import json

import pytest
import torch
from torchvision.ops import box_convert

from downstream import metrics


def image(*boxes, labels=None, **more):
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    labels = torch.tensor(labels or [0] * len(boxes), dtype=torch.int64)
    return {"boxes": boxes, "labels": labels} | {k: torch.tensor(v) for k, v in more.items()}


def ap_of(found, truths, rules="coco", kind="boxes", most=100):
    return metrics.mean_ap(
        [metrics.matched(*pair, rules, kind, most) for pair in zip(found, truths, strict=True)], rules
    )


A, B = (0, 0, 10, 10), (20, 20, 40, 40)


@pytest.mark.parametrize("rules", ["coco", "voc"])
def test_perfect_and_empty_detections(rules):
    truth = [image(A, B), image(A, labels=[3])]
    found = [t | {"scores": torch.ones(len(t["boxes"]))} for t in truth]
    ap = ap_of(found, truth, rules)
    assert (ap["AP"], ap["AP50"], ap["AP75"], ap["classes"]) == (100, 100, 100, {0: 100, 3: 100})
    nothing = [image(scores=[]), image(scores=[])]
    assert ap_of(nothing, truth, rules)["AP"] == 0


def test_by_hand_at_one_threshold():
    """Right, wrong, right, of three objects: precision 1 up to recall 1/3, 2/3 up to 2/3, then 0."""
    scores, hits = torch.tensor([0.3, 0.9, 0.6]), torch.tensor([[1, 1, 0]])  # not in order
    ap = metrics.average_precision(scores, hits, 3, 11)
    assert ap.item() == pytest.approx((4 + 3 * 2 / 3) / 11)  # recalls 0 to .3, and .4 to .6
    ap = metrics.average_precision(scores, hits, 3, 101)
    assert ap.item() == pytest.approx((34 + 33 * 2 / 3) / 101)  # 0 to .33, and .34 to .66
    hits = torch.tensor([[1, 1, -1]])  # what does not count is neither right nor wrong
    assert metrics.average_precision(scores, hits, 2, 11).item() == pytest.approx(1)


def test_the_iou_decides_by_threshold():
    """IoU 0.8 of a box of 10 x 10 with one of 10 x 8: right at .50 to .80, seven of ten thresholds; COCO's boxes."""
    truth, found = [image(A)], [image((0, 0, 10, 8), scores=[0.5])]
    ap = ap_of(found, truth)
    assert ap["AP"] == pytest.approx(70) and (ap["AP50"], ap["AP75"]) == (100, 100)
    assert ap_of(found, truth, "voc")["AP"] == pytest.approx(60)  # above the threshold: .80 is not


def test_a_second_detection_of_an_object_is_wrong_by_voc_and_takes_the_next_one_by_coco():
    near = (0, 0, 10, 11)  # overlaps A by 0.91
    truth, found = [image(A, near)], [image(A, A, scores=[0.9, 0.8])]
    assert ap_of(found, truth)["AP50"] == pytest.approx(100)
    assert ap_of(found, truth, "voc")["AP50"] == pytest.approx(100 * 6 / 11)  # recall 1/2 at best


@pytest.mark.parametrize("rules", ["coco", "voc"])
def test_what_is_ignored_need_not_be_found_and_does_not_count(rules):
    truth = [image(A, B, ignored=[False, True])]
    both, extra = image(A, B, scores=[0.5, 0.9]), image(A, (50, 50, 60, 60), scores=[0.5, 0.9])
    only = image(A, scores=[0.5])
    assert [ap_of([f], truth, rules)["AP"] for f in (both, only)] == [100, 100]
    assert ap_of([extra], truth, rules)["AP"] == pytest.approx(50)


def test_masks_have_an_iou_of_their_own():
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :4], masks[1, :3] = True, True  # 24 of 32 pixels: 0.75
    whole = image((0, 0, 8, 8))
    truth, found = [whole | {"masks": masks[:1]}], [whole | {"masks": masks[1:], "scores": torch.ones(1)}]
    ap = ap_of(found, truth, kind="masks")
    assert ap["AP"] == pytest.approx(60) and ap["AP75"] == 100


def test_only_the_best_detections_of_a_class_count():
    truth = [image(A, B)]
    found = [image((50, 50, 60, 60), A, B, scores=[0.9, 0.8, 0.7])]
    assert ap_of(found, truth, most=2)["AP50"] == pytest.approx(50 * 51 / 101)  # up to recall .50


def noisy_detections(n=30, classes=4, seed=0):
    """Truths, a tenth of them crowds, and detections that are moved, doubled, missed and made up."""
    g, truths, found = torch.Generator().manual_seed(seed), [], []
    rand = lambda *size: torch.rand(*size, generator=g)
    for _ in range(n):
        k = int(torch.randint(1, 7, (), generator=g))
        corner, side = 80 * rand(k, 2), 5 + 40 * rand(k, 2)
        boxes, labels = torch.cat([corner, corner + side], 1), torch.randint(classes, (k,), generator=g)
        truths.append({"boxes": boxes, "labels": labels, "ignored": rand(k) < 0.1})
        at = torch.randint(k, (2 * k,), generator=g)
        moved = boxes[at] + (rand(2 * k, 4) - 0.5) * side[at].repeat(1, 2) * 0.4
        kinds = torch.where(rand(2 * k) < 0.1, torch.randint(classes, (2 * k,), generator=g), labels[at])
        found.append({"boxes": moved, "labels": kinds, "scores": rand(2 * k)})
    return found, truths


def coco_file(path, truths, names=4):
    """The truths as a file in COCO's format; objects of which some are crowds."""
    annotations = []
    for i, t in enumerate(truths):
        for (x, y, w, h), label, crowd in zip(
            box_convert(t["boxes"], "xyxy", "xywh").tolist(), t["labels"].tolist(), t["ignored"].tolist(), strict=True
        ):
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": 3 * label + 1, "area": w * h,
                                "bbox": [x, y, w, h], "iscrowd": int(crowd)})  # fmt: skip
    images = [{"id": i, "width": 200, "height": 200, "file_name": f"{i}.png"} for i in range(len(truths))]
    categories = [{"id": 3 * c + 1, "name": str(c)} for c in range(names)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def test_the_official_evaluation_has_the_same_figures(tmp_path):
    """With crowds, on some of the images of the file."""
    pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
    found, truths = noisy_detections()
    file, few = coco_file(tmp_path / "truth.json", truths), range(0, 30, 2)
    results = [r for i in few for r in metrics.coco_results(found[i], i, [1, 4, 7, 10])]
    official = metrics.official(file, results, few)
    ap = ap_of([found[i] for i in few], [truths[i] for i in few])
    assert 10 < ap["AP"] < 90
    assert [ap[k] for k in ("AP", "AP50", "AP75")] == pytest.approx(
        [official[k] for k in ("AP", "AP50", "AP75")], abs=1e-4
    )


def test_of_a_crowd_a_detection_needs_only_to_lie_in_it():
    truth = [image((0, 0, 100, 100), A, ignored=[True, False])]
    found = [image((60, 60, 70, 70), A, scores=[0.9, 0.5])]  # IoU with the crowd 0.01, but all of it lies inside
    assert ap_of(found, truth)["AP"] == 100
    assert ap_of(found, truth, "voc")["AP"] == pytest.approx(50)


def test_mean_iou_by_hand():
    truth, predicted = torch.tensor([[0, 0, 1], [1, 255, 2]]), torch.tensor([[0, 1, 1], [1, 2, 0]])
    matrix = metrics.confusion(predicted, truth, 4)
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    mean, classes = metrics.mean_iou(matrix)
    assert classes[:3].tolist() == pytest.approx([100 / 3, 200 / 3, 0]) and classes[3].isnan()
    assert mean == pytest.approx(100 / 3)
