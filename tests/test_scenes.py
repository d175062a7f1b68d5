"""Drawn scenes for detection and segmentation: what is visible, and what a scene depends on."""

import pytest
import torch

import shapes


@pytest.fixture(scope="module")
def scenes():
    return shapes.draw_scenes(60)


def test_a_scene_depends_on_the_seed_and_its_place_alone(scenes):
    images, targets, semantic = shapes.draw_scenes(7)
    assert torch.equal(images, scenes[0][:7]) and torch.equal(semantic, scenes[2][:7])
    for a, b in zip(targets, scenes[1], strict=False):
        assert all(torch.equal(a[k], b[k]) for k in ("boxes", "labels", "masks"))
    assert not torch.equal(shapes.draw_scenes(7, seed=1)[0], images)


def test_targets_are_what_is_visible(scenes):
    images, targets, semantic = scenes
    assert images.shape == (60, 3, 64, 64) and semantic.max() == 10
    for target, plane in zip(targets, semantic, strict=True):
        assert 1 <= len(target["boxes"]) <= 3 and target["masks"].sum(0).max() == 1  # no pixel has two objects
        for box, label, mask in zip(*target.values(), strict=True):
            x1, y1, x2, y2 = box.int().tolist()
            assert mask[y1:y2, x1:x2].sum() == mask.sum() > 0  # all of it, and it touches all four sides
            assert all(side.any() for side in (mask[y1], mask[y2 - 1], mask[:, x1], mask[:, x2 - 1]))
            assert (plane[mask] == label + 1).all()
    counts = torch.tensor([len(t["boxes"]) for t in targets]).bincount()
    assert (counts[1:] > 5).all()


def test_objects_are_those_of_the_drawn_set_in_front_of_a_soft_background(scenes):
    images, targets, semantic = scenes
    objects, labels, masks = shapes.draw_shapes(3 * 60)
    for i in (0, 1, 2, 5):
        (x1, y1, x2, y2), whole = targets[i]["boxes"][-1].int().tolist(), targets[i]["masks"][-1]
        found = [
            j for j in range(3 * i, 3 * i + 3)
            if labels[j] == targets[i]["labels"][-1] and masks[j].sum() == whole.sum()
        ]  # fmt: skip
        (rows, columns), j = masks[found[0]].nonzero().T, found[0]
        assert torch.equal(images[i, :, whole], objects[j][:, masks[j] > 0])  # the last object is in front of all
        assert (y2 - y1, x2 - x1) == (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1)
    ground = images.float().masked_fill((semantic > 0)[:, None], torch.nan)
    assert (ground[..., 1:] - ground[..., :-1]).abs().nanmean() < 3  # of 255: it changes slowly
    assert 0.8 < (semantic == 0).float().mean() < 0.97


def test_what_is_nearly_covered_has_no_box_but_stays_in_the_map():
    _, targets, semantic = shapes.draw_scenes(400, size=40, most=3)  # little room: objects cover each other
    hidden = 0
    for target, plane in zip(targets, semantic, strict=True):
        rest = (plane > 0) & ~target["masks"].any(0)
        hidden += bool(rest.any())
    assert hidden > 10


def test_size_and_number_are_parameters():
    images, targets, semantic = shapes.draw_scenes(5, size=128, most=1, hard=True)
    assert images.shape == (5, 3, 128, 128) and semantic.shape == (5, 128, 128)
    assert all(len(t["boxes"]) == 1 for t in targets)
