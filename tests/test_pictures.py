import pytest
import torch

from analysis import pictures


def test_a_picture_has_the_promised_size_and_dots():
    images = torch.rand(2, 3, 40, 40) * 2 - 1
    rows = [("image", images, None, None), ("recovered", images, ["0.031", "0.500"], [True, False])]
    picture = pictures.draw_rows(rows)
    cell, gap, strip = 120, pictures.GAP, pictures.STRIP  # 40 px, three times
    assert picture.shape[1] == gap + (cell + gap) + (cell + strip + gap) and picture.min() >= 0 and picture.max() <= 1
    left = picture.shape[2] - 2 * (cell + gap)
    assert 40 < left < 120 and picture[:, :, :left].min() < 0.5  # room for the names, and ink
    large = (images / 2 + 0.5).repeat_interleave(3, 2).repeat_interleave(3, 3)
    for i in range(2):
        at = left + i * (cell + gap)
        for top in (gap, gap + cell + gap):
            assert torch.allclose(picture[:, top : top + cell, at : at + cell], large[i], atol=0.51 / 255)
        dot = picture[:, picture.shape[1] - gap - strip // 2, at + strip // 2 - 1]
        assert dot.tolist() == pytest.approx([c / 255 for c in (pictures.RIGHT, pictures.WRONG)[i]])
    unmarked = pictures.draw_rows([("a", images, ["1", "2"], None)])[:, -gap - strip :]
    assert torch.allclose(unmarked[0], unmarked[1], atol=0.01) and torch.allclose(unmarked[0], unmarked[2], atol=0.01)
    assert pictures.draw_rows([("a", images[:, :, :8, :8], None, None)]).shape[1] == 96 + 2 * gap
    assert pictures.draw_rows([("a", images, ["1", "2"], [None, True])]).shape[1] == cell + strip + 2 * gap


def test_frames_and_headings():
    images = torch.zeros(3, 3, 96, 96)
    rows = [("a", images, ["x", "y", "z"], [True, False, None])] * 2
    framed, plain = pictures.draw_rows(rows, {1: "here"}, frames=True), pictures.draw_rows(rows)
    gap, strip = pictures.GAP, pictures.STRIP
    assert framed.shape[1] == plain.shape[1] + strip == gap + strip + 2 * (96 + gap + strip)
    left = framed.shape[2] - 3 * (96 + gap)
    colors = [pictures.RIGHT, pictures.WRONG, (128, 128, 128)]
    for row in range(2):
        top = gap + strip + row * (96 + gap + strip)
        for i, color in enumerate(colors):
            at = left + i * (96 + gap)
            for y, x in ((top, at + 50), (top + 95, at + 50), (top + 50, at), (top + 50, at + 95)):
                assert (255 * framed[:, y, x]).round().tolist() == pytest.approx(color, abs=1)
            assert (255 * framed[:, top + 50, at + 50]).round().tolist() == pytest.approx([128] * 3, abs=1)
    words = framed[:, 2:strip].amin(0) < 0.5
    assert words[:, left + 96 + gap :].any() and not words[:, : left + 96].any()
