"""Shared by all tests: the scripts as a user starts them, and small folders of images."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.io import write_jpeg

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)

TINY = [
    "--limit",
    "64",
    "--batch-size",
    "16",
    "--epochs",
    "2",
    "--probes",
    "knn",
    "--log-every",
    "1",
    "--device",
    "cpu",
]


def start(*args, processes=1, **kwargs):
    """The command as a user types it, started in the repository root; returns the Popen."""
    launcher = [sys.executable]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env)
    return subprocess.Popen([*launcher, *map(str, args)], **pipes, **kwargs)


def run(*args, code=0, **kwargs):
    """The same, finished; checks the exit code and returns (stdout, stderr)."""
    process = start(*args, **kwargs)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def write_images(folder, n, classes=2, size=40, seed=0):
    """A folder of `n` JPEG files in `classes` class folders, each class a colour."""
    g = torch.Generator().manual_seed(seed)
    for i in range(n):
        path = Path(folder, f"class{i % classes}", f"{i:03d}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        image = torch.randint(0, 120, (3, size, size + i % 7), generator=g, dtype=torch.uint8)
        image[i % classes % 3] += 100
        write_jpeg(image, str(path), 90)
    return Path(folder)


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images", 64)
