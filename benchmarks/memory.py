"""What the methods need of each GPU's memory, as a Markdown table: by default at the imagenet recipes on eight GPUs.

    python benchmarks/memory.py                                             minutes on a CPU, without GPU and images
    python benchmarks/memory.py --gpus 16 --methods sage --flags="--no-checkpoint-activations"

The numbers are those of the recipe line. Each script runs with --dry-run as the first of so many pretended ranks, on as
many blank images as ImageNet has, which no step reads.
"""

import argparse
import contextlib
import importlib
import io
import os
import re
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sets

METHODS = ["byol", "sage", "instdisc", "pretext", "simclr", "moco", "swav", "pirl", "cmc", "cpc"]
LINE = re.compile(
    r"^batch \d+ = \d+ cpu x (?P<passes>\d+) x (?P<images>\d+);.*?^memory: about (?P<all>[\d.]+) GiB a GPU; "
    r"(?P<kept>[\d.]+) of it kept for backward, (?P<each>[\d.]+) MiB an image",
    re.DOTALL | re.MULTILINE,
)


def measure(method, flags):
    """What the recipe line of `METHOD.py FLAGS` says; of stage 1 and SaGe, that of SaGe."""
    blank = torch.zeros(1, 3, 1, 1, dtype=torch.uint8).expand(1_281_167, 3, 512, 512)  # a view of three numbers
    images = sets.Images("imagenet", blank, torch.arange(len(blank)) % 1000)
    with contextlib.redirect_stdout(io.StringIO()) as out, mock.patch.object(sets, "splits", lambda *_: [images] * 3):
        importlib.import_module(method).main([*flags, "--dry-run", "--device", "cpu"])
    return list(LINE.finditer(out.getvalue()))[-1]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    p.add_argument("--recipe", default="imagenet")
    p.add_argument("--gpus", type=int, default=8, help="ranks that share the batch")
    p.add_argument("--flags", default="", help="more flags of the scripts, as one word")
    args = p.parse_args()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(args.gpus))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=args.gpus)  # its collectives do nothing
    print("| script | images a GPU | MiB an image | GiB kept for backward | GiB a GPU |\n|---|---|---|---|---|")
    for method in args.methods:
        found = measure(method, ["--recipe", args.recipe, *args.flags.split()])
        batch = f"{found['passes']} x {found['images']}" if found["passes"] != "1" else found["images"]
        print(f"| `{method}.py` | {batch} | {found['each']} | {found['kept']} | {found['all']} |", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
