"""What the copies of `python data.py shrink` gain: the processor time of a loader worker for two crops of 224 px, and
bytes, before and after.

    python benchmarks/shrink.py DIR            a folder of photographs
    python benchmarks/shrink.py                32 files of noise, of a photograph's size and weight

Processor time, not the clock's: other programs on the machine count for less.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import augment
import timing

import data
import sets


def milliseconds(f, places):
    """Of processor time that `f` takes for each of the `places`."""
    start = time.process_time()
    for i in places:
        f(i)
    return 1000 * (time.process_time() - start) / len(places)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", nargs="?", help="of photographs (default: noise)")
    p.add_argument("--images", type=int, default=2000, help="how many of the folder, spread over it")
    p.add_argument("--short", type=int, default=256, help="as data.py shrink's")
    p.add_argument("--quality", type=int, default=90, help="as data.py shrink's")
    p.add_argument("--repeats", type=int, default=5, help="rounds")
    args = p.parse_args()
    torch.set_num_threads(1)
    timing.where(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as out:
        if not args.folder:
            args.folder = f"{out}/noise"
            Path(args.folder).mkdir()
            augment.jpegs(args.folder, 32)
        items = data.items_of(args.folder)
        items = items[:: -(-len(items) // args.images)]
        pairs = [(path, f"{out}/{i}{Path(path).suffix}") for i, (path, _) in enumerate(items)]
        making = milliseconds(data.Copies(pairs, args.short, args.quality).__getitem__, range(len(pairs)))
        pairs = [pair for pair in pairs if Path(pair[1]).exists()]  # without images that do not decode
        everyone = range(len(pairs))
        found = {"as they are": [path for path, _ in pairs], "copies": [copy for _, copy in pairs]}
        views = augment.views_of("imagenet", 224)
        files = {name: sets.Files(name, [(path, -1) for path in paths]) for name, paths in found.items()}
        workers = {name: data.Crops(images, views, 0) for name, images in files.items()}
        decode, whole = ({name: [] for name in found} for _ in range(2))
        for turn in range(args.repeats + 1):
            for name in found:
                one = milliseconds(files[name].read, everyone)
                both = milliseconds(lambda i, worker=workers[name]: worker[0, i], everyone)
                if turn:  # the first one reads from the disk
                    decode[name].append(one), whole[name].append(both)
        rows = []
        for name, paths in found.items():
            kib = sum(Path(path).stat().st_size for path in paths) / len(paths) / 1024
            medians = [f"{statistics.median(part[name]):.2f}" for part in (decode, whole)]
            ratios = [timing.ratio(part, name, "as they are") for part in (decode, whole)]
            rows.append([name, f"{kib:.0f}", *medians, *ratios, timing.spread(whole[name])])
    head = ["", "KiB", "ms, decoded", "ms, and two crops", "decoding", "both", "spread"]
    timing.table(f"{len(pairs)} images, short side {args.short} px, quality {args.quality}", head, rows)
    print(f"making a copy: {making:.2f} ms")


if __name__ == "__main__":
    main()
