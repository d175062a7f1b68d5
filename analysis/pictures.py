"""Rows of pictures with words beside and below them."""

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2 import functional as tvf

GAP, STRIP = 4, 16  # px: space between pictures, height of the line of text under one
RIGHT, WRONG = (0, 160, 0), (220, 0, 0)  # colors of marks


def draw_rows(rows, headings=None, frames=False):
    """Rows of pictures with words, as float [3, H, W] in [0, 1].

    rows: list of (name, images [N, 3, S, S] in [-1, 1], captions, marks). The name is written on the left. Images are
    enlarged by a whole factor, without smoothing, to at least 96 px. captions, marks: one string and one bool (or None)
    per image, or None. A mark is a green (True) or red (False) dot beside the caption, with `frames` a frame around the
    image. headings: {column: what to write above it}.
    """
    pixels = [(images.float().cpu() + 1).mul(127.5).round().clamp(0, 255).byte() for _, images, _, _ in rows]
    pixels = [x.repeat_interleave(k := math.ceil(96 / x.shape[-1]), 2).repeat_interleave(k, 3) for x in pixels]
    cell, columns = max(x.shape[-1] for x in pixels), max(map(len, pixels))
    width = ImageFont.load_default().getlength
    left, top = 2 * GAP + math.ceil(max(width(name) for name, *_ in rows)), GAP + STRIP * bool(headings)
    heights = [cell + GAP + STRIP * bool(captions or marks) for _, _, captions, marks in rows]
    canvas = Image.new("RGB", (left + columns * (cell + GAP), top + sum(heights)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, words in (headings or {}).items():
        draw.text((left + column * (cell + GAP), 2), words, fill="black")
    for (name, _, captions, marks), images, height in zip(rows, pixels, heights, strict=True):
        draw.text((GAP, top + cell // 2 - 6), name, fill="black")
        for i, image in enumerate(images):
            at, below = left + i * (cell + GAP), top + cell
            canvas.paste(tvf.to_pil_image(image), (at, top))
            if captions:
                words = captions[i]
                while width(words) > cell - STRIP:
                    words = words[:-1]
                draw.text((at + STRIP, below + 2), words, fill="black")
            if marks and marks[i] is not None:
                color = RIGHT if marks[i] else WRONG
                if frames:
                    draw.rectangle((at - 2, top - 2, at + cell + 1, below + 1), outline=color, width=4)
                else:
                    draw.ellipse((at + 3, below + 3, at + STRIP - 4, below + STRIP - 4), fill=color)
        top += height
    return tvf.pil_to_tensor(canvas).float() / 255


def names_of(checkpoints):
    """A short name for each path: its last folder or file, with the folder above where two have the same."""
    paths = [p.parent if p.name == "backbone.pt" else p for p in (Path(c).resolve() for c in checkpoints)]
    names = [p.name for p in paths]
    return names if len(set(names)) == len(names) else [f"{p.parent.name}/{p.name}" for p in paths]
