"""Saliency masks: where the time goes, and optionally against another program.

    python benchmarks/saliency.py [IMAGES]                            stages of saliency.py, and images/s
    python benchmarks/saliency.py IMAGES --peer FILE.py --repeats 3   the same images, in turns, in one run

Without a folder the images are drawn. A peer is a Python file that defines rbd(path), the RBD map of an image file;
both sides then read the files, one after the other there, in batches here.
"""

import argparse
import importlib.util
import statistics
import sys
from pathlib import Path

import torch
from torchvision.transforms.v2 import functional as tvf

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import timing

import backbones
import common
import saliency
import sets
import shapes


def stages(x, device, args):
    """The parts of maps(), each on what the one before it left: a table of ms an image."""
    k = (x.shape[2] // saliency.BLOCK) * (x.shape[3] // saliency.BLOCK)
    lab = backbones.to_lab(x / 255)
    label, cost = saliency.slic(lab)
    g = saliency.graph(x)
    color = saliency.distances(g["lab"])
    parts = {
        "Lab": lambda: backbones.to_lab(x / 255),
        "SLIC, 10 rounds": lambda: saliency.slic(lab),
        "connectivity": lambda: saliency.connect(label, cost, k),
        "the graph, all of it": lambda: saliency.graph(x),
        "all shortest paths, alone": lambda: saliency.geodesic(color, g["near"]),
        "rbd, after the graph": lambda: saliency.rbd(g),
        "mc, after the graph": lambda: saliency.mc(g),
        "gs, after the graph": lambda: saliency.gs(g),
    }
    times = timing.interleaved(parts, device, args.repeats, args.seconds)
    rows = [[name, f"{1000 * statistics.median(t) / len(x):.3f}", timing.spread(t)] for name, t in times.items()]
    timing.table(f"stages, {len(x)} images of {x.shape[2]} px, {k} regions", ["", "ms/image", "spread"], rows)


def whole(images, device, args):
    """maps() from 8-bit images of the working size: a table of images/s."""
    runs = {m: lambda m=m: saliency.maps(images, m, size=64) for m in saliency.METHODS}
    times = timing.interleaved(runs, device, args.repeats, args.seconds)
    rows = []
    for name, t in times.items():
        each = statistics.median(t) / len(images)
        rows.append([name, f"{1 / each:.1f}", f"{1000 * each:.2f}", timing.spread(t)])
    timing.table(f"maps of {len(images)} images, 64 px out", ["", "images/s", "ms/image", "spread"], rows)


def against(paths, device, args):
    """File to map, at the file's own size, on both sides."""
    spec = importlib.util.spec_from_file_location("peer", args.peer)
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)

    def ours():
        images = [sets.decode(p) for p in paths]
        x = torch.stack([tvf.resize(i, [saliency.SIDE, saliency.SIDE], antialias=True) for i in images]).to(device)
        return [
            saliency.resized(m[None, None], *i.shape[1:]).cpu() for m, i in zip(saliency.maps(x), images, strict=True)
        ]

    times = timing.interleaved({"ours": ours, "peer": lambda: [peer.rbd(p) for p in paths]}, device, args.repeats)
    rows = []
    for name, t in times.items():
        each = statistics.median(t) / len(paths)
        rows.append(
            [name, f"{1 / each:.2f}", f"{1000 * each:.1f}", timing.ratio(times, name, "peer"), timing.spread(t)]
        )
    head = ["", "images/s", "ms/image", "vs peer", "spread"]
    timing.table(f"RBD, {len(paths)} files, file to map, peer {Path(args.peer).name}", head, rows)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("images", nargs="?", help="a folder of images (default: drawn ones)")
    p.add_argument("--peer", help="a Python file that defines rbd(path)")
    p.add_argument("--count", type=int, default=16, help="images")
    p.add_argument("--repeats", type=int, default=5, help="rounds; every variant runs once in each")
    p.add_argument("--seconds", type=float, default=0.3, help="a variant is called again until this time is filled")
    p.add_argument("--threads", type=int, default=1, help="on the CPU")
    p.add_argument("--device", choices=("cuda", "mps", "cpu"), help="default: cuda, else mps, else cpu")
    args = p.parse_args()
    common.at_least(1, args, "count", "repeats", "threads")
    if args.peer and not args.images:
        common.fail("--peer needs a folder of images, as it reads files")
    _, _, device = common.setup(args.device)
    torch.set_num_threads(args.threads)
    timing.where(device)
    side = [saliency.SIDE, saliency.SIDE]
    if args.images:
        paths = [path for path, _ in sets.list_folder(args.images)[0]][: args.count]
        images = torch.stack([tvf.resize(sets.decode(path), side, antialias=True) for path in paths])
    else:
        images = shapes.draw_shapes(args.count, saliency.SIDE)[0]
    images = images.to(device)
    stages(images[: 8 if device.type == "cpu" else 128].float(), device, args)
    whole(images, device, args)
    if args.peer:
        against(paths, device, args)


if __name__ == "__main__":
    main()
