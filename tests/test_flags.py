"""Flags that no run can use end every script with one sentence and exit code 2, before anything is written."""

import importlib

import pytest
import torch
from helpers import METHODS, TINY, write_images
from torchvision.io import write_png

import training

# What each script gets beside the flags of a case; 64 images of `shapes`, 16 a batch.
START = dict.fromkeys(METHODS, TINY) | {m: [*TINY, "--negatives", "16"] for m in ("cmc", "instdisc", "pirl")}
START["byol"] = [*TINY[2:], "--limit", "48"]
START["moco"] = [*TINY, "--queue", "32"]
START["sage"] = [*TINY, "--evaluator", "random:resnet10_16"]
START["pretext"] = [*TINY, "--task", "rotation"]

CASES = {
    "byol": [
        ("--batch-size 100000", "at most 48"),
        ("--batch-size 15 --accumulate 2", "not a multiple"),
        ("--batch-size 1", "BatchNorm"),
        ("--arch resnet81", "did you mean"),
        ("--data cifr10", "did you mean 'cifar10'"),
        ("--limit 1000000", "--limit"),
        ("--limit -5", "--limit"),
        ("--no-such-flag", "unrecognized arguments: --no-such-flag"),
        ("--size 0", "--size"),
        ("--epochs -1", "--epochs"),
        ("--out README.md", "--out"),
    ],
    "sage": [
        ("--weight-d 0 --weight-pixel 0 --weight-maps 0 --weight-semantic 0", "nothing is left"),
        ("--size 36", "doubles to"),
        ("--levels 9", "4 stages"),
        ("--semantic projector", "no checkpoint.pt"),
        ("--evaluator random:resnet81", "did you mean"),
        ("--evaluator nowhere", "no such checkpoint"),
        ("--weight-pixel -1", "--weight-pixel"),
        ("--decoder-lr -1", "--decoder-lr"),
        ("--bottleneck 0", "--bottleneck"),
        ("--evaluator-epochs 0", "--evaluator-epochs"),
    ],
    "simclr": [
        ("--temperature 0", "--temperature 0: it must be above 0"),
        ("--temperature nan", "--temperature nan: it must be above 0"),
        ("--layers 4", "argument --layers: invalid choice: 4"),
        ("--scaling cubic", "argument --scaling: invalid choice: 'cubic'"),
        ("--dim 0", "--dim"),
        ("--batch-size 15 --accumulate 2", "not a multiple"),
    ],
    "moco": [
        ("--queue 40", "--queue 40 is not a multiple of the 16 keys"),
        ("--queue 48 --symmetric", "not a multiple of the 32 keys"),
        ("--queue 128", "--queue 128: with the 64 training images of shapes it must be at most 64"),
        ("--queue 0", "--queue"),
        ("--temperature 0", "--temperature"),
        ("--temperature nan", "--temperature"),
        ("--momentum 1.5", "at most 1"),
        ("--bn-splits 3", "--bn-splits 3"),
        ("--bn-splits 16", "two or more"),
    ],
    "swav": [
        ("--prototypes 0", "--prototypes 0: it must be at least 1"),
        ("--temperature 0", "--temperature 0: it must be above 0"),
        ("--epsilon -1", "--epsilon -1: it must be above 0"),
        ("--epsilon nan", "--epsilon nan"),
        ("--sinkhorn-iterations 0", "--sinkhorn-iterations 0: it must be at least 1"),
        ("--min-scale 0 0.1", "--min-scale 0: it must be above 0"),
        ("--min-scale 0.2 0.6", "--min-scale 0.6: it must be above 0 and at most 0.5"),
        ("--small-crops -1", "--small-crops"),
        ("--small-crops 1 --small-size 33", "--small-size 33: it must be at most --size 32"),
        ("--size 48 --small-size 16", "--size 48: the images of shapes have 32x32 px"),
        ("--queue-length 24", "--queue-length 24 is not a multiple of --batch-size 16"),
        ("--queue-length 80", "--queue-length 80: shapes has only 64 training images"),
        ("--queue-epoch -1", "--queue-epoch"),
        ("--freeze-epochs inf", "--freeze-epochs"),
        ("--batch-size 100000", "at most 64"),
        ("--arch resnet81", "did you mean"),
    ],
    "cmc": [
        ("--negatives 64", "--negatives 64: with the 64 training images of shapes it must be at most 63"),
        ("--negatives 0", "--negatives"),
        ("--temperature 0", "--temperature"),
        ("--temperature nan", "--temperature"),
        ("--temperature 0.01 --contrast nce", "above 0.02"),
        ("--bank-momentum 1.5", "at most 1"),
        ("--bank-momentum -1", "--bank-momentum"),
        ("--drop-at 1.5", "shares of the run"),
        ("--split hsv", "invalid choice: 'hsv'"),
        ("--graph half", "invalid choice: 'half'"),
        ("--arch resnet18_ydbdr", "--split lab needs other views"),
        ("--arch resnet10_61", "did you mean 'resnet10_16_lab'"),
        ("--arch vgg11_bn", "unknown architecture"),
        ("--limit 8 --negatives 4", "batch-size"),
    ],
    "pirl": [
        ("--size 30", "--size 30: too small for a grid of 3 x 3 patches, which needs 31 px"),
        ("--negatives 64", "--negatives 64: with the 64 training images of shapes it must be at most 63"),
        ("--negatives 0", "--negatives"),
        ("--temperature 0", "--temperature"),
        ("--nce constant-z --temperature 0.01", "--temperature 0.01: with --nce constant-z it must be above 0.02"),
        ("--lambda 1.5", "--lambda 1.5: it must be at least 0 and at most 1"),
        ("--lambda -0.1", "at least 0 and at most 1"),
        ("--lambda nan", "--lambda nan"),
        ("--bank-momentum 1.5", "at least 0 and at most 1"),
        ("--transform color", "invalid choice: 'color'"),
        ("--nce softmax", "invalid choice: 'softmax'"),
        ("--arch resnet10_17", "did you mean 'resnet10_16'"),
        ("--arch squeezenet1_1", "too small for it"),
    ],
    "cpc": [
        ("--recipe cifar10 --size 24", "32 px and more"),
        ("--recipe imagenet --size 100", "multiples of 8"),
        ("--size 32 --patch 40 --stride 4", "--patch 40 is larger than --size 32"),
        ("--patch 8 --stride 5", "fit 28 or 33 px"),
        ("--patch 32 --stride 8", "one row of patches"),
        ("--patch 8 --stride 4 --steps 6", "--steps 6: 5 of 7 rows are left"),
        ("--patch 16 --stride 16 --steps 1 --skip 1", "0 of 2 rows"),
        ("--patch 3 --stride 1", "--patch 3: it must be at least 4"),
        ("--patch 8 --stride 0", "--stride 0"),
        ("--steps 0", "--steps 0: it must be at least 1"),
        ("--arch resnet10_16", "add _ln or _nobn"),
        ("--skip -1", "--skip -1"),
        ("--border 3 --patch 8 --stride 4", "less than 4 px"),
        ("--patch-gray 1.5", "at most 1"),
        ("--patch-jitter nan", "and finite"),
        ("--clip -1", "--clip -1"),
        ("--directions 3", "invalid choice"),
        ("--context row", "invalid choice"),
        ("--v 3", "invalid choice"),
        ("--arch resnet10_16_lm --dry-run", "did you mean"),
    ],
    "instdisc": [
        ("--negatives 64", "--negatives 64: with the 64 training images of shapes it must be at most 63"),
        ("--negatives 0", "--negatives"),
        ("--temperature 0", "--temperature"),
        ("--temperature 0.01 --loss nce", "above 0.02"),
        ("--copy-paste nan", "at least 0 and finite"),
        ("--copy-paste 1.5", "at most 1"),
        ("--bank-momentum -1", "--bank-momentum"),
        ("--masks exact --copy-paste 1 --loss nce --limit 8", "batch-size"),
    ],
    "pretext": [
        ("--task jigsaw --size 24", "too small for a grid of 3 x 3 patches"),
        ("--task jigsaw --permutations 20000", "at most 10000"),
        ("--task colorization --size 36", "multiple of 8"),
        ("--task colorization --arch resnet10_16_s4", "total stride of 8"),
        ("--task colorization --arch vgg11_k1", "would not be trained"),
        ("--drop-at 1.5", "between 0 and 1"),
        ("--lr nan", "--lr nan: it must be at least 0 and finite"),
        ("--task exemplar --margin inf", "and finite"),
        ("--size 4", "--size 4: it must be at least 8"),
        ("--task exemplar --copies 1", "--copies 1: it must be at least 2"),
        ("--task rotatoin", "invalid choice"),
        ("--arch revnet50_k0.01 --dry-run", "its narrowest layers would have 0.08 channels"),
        ("--arch revnet5O_k4 --dry-run", "did you mean"),
    ],
}


@pytest.fixture
def stops(tmp_path, capsys):
    """`method.main(flags)` ends with one sentence, which has `words` (argparse: after its usage), and writes
    nothing."""

    def check(method, words, *flags):
        out = [] if "--out" in flags else ["--out", tmp_path / "run"]
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(method).main([str(flag) for flag in (*flags, *out)])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and words in err and not (tmp_path / "run").exists()
        assert len([line for line in err.splitlines() if not line.startswith("usage: ")]) == 1, err

    return check


@pytest.mark.parametrize(
    ("method", "flags", "words"), [(method, *case) for method, cases in CASES.items() for case in cases]
)
def test_bad_flags(method, flags, words, stops):
    stops(method, words, *START[method], *flags.split())


def test_batch_not_divisible_by_processes(refused):
    args = importlib.import_module("byol").parse_args(["--batch-size", "15"])
    assert "--batch-size 15 is not a multiple of 2 ranks" in refused(lambda: training.images_per_pass(args, 2, 48))


@pytest.mark.parametrize(
    ("kind", "words"), [("missing", "neither"), ("empty", "no images"), ("corrupt", "do not decode")]
)
def test_bad_folders(kind, words, tmp_path, refused):
    folder = tmp_path / ("nowhere" if kind == "missing" else "images")
    (tmp_path / "images").mkdir()
    if kind == "corrupt":
        for path in write_images(folder, 32).rglob("*.jpg"):
            path.write_bytes(b"no image")
    flags = [*TINY, "--data", folder, "--recipe", "shapes", "--workers", "2", "--limit", "0", "--out", tmp_path / "run"]
    assert words in refused(lambda: importlib.import_module("byol").main([str(flag) for flag in flags]))


def test_images_without_color_are_refused(tmp_path, stops):
    for i in range(16):
        write_png(torch.full((3, 32, 32), 10 * i, dtype=torch.uint8), str(tmp_path / f"{i}.png"))
    words = ["--data", tmp_path, "--recipe", "shapes", "--limit", "0", "--task", "colorization"]
    stops("pretext", "are gray", *TINY, *words)


def test_supervised_needs_labels(tmp_path, stops):
    folder = write_images(tmp_path / "images", 48, classes=1)
    words = ["--data", folder, "--recipe", "shapes", "--limit", "0", "--loss", "supervised"]
    stops("instdisc", "images without labels", *START["instdisc"], *words)


@pytest.mark.parametrize(("method", "flags", "words"), [
    ("byol", "--arch resnet10_16_lab", "cmc.py trains them"),
    ("cpc", "--arch resnet10_16_ln_lab", "cmc.py trains them"),
    ("instdisc", "--negatives 16 --copy-paste 0.5 --masks nowhere", "neither rbd, mc, gs or exact, nor a folder"),
])  # fmt: skip
def test_what_only_shows_when_the_run_begins(method, flags, words, tmp_path, refused):
    argv = [*TINY, *flags.split(), "--out", str(tmp_path / "run")]
    assert words in refused(lambda: importlib.import_module(method).main(argv))
