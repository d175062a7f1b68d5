"""What every script does before its first step: the flags, defaults that are made to fit, the recipe of a folder."""

import importlib
import signal
from argparse import Namespace

import pytest
import torch
from helpers import METHODS, write_images

import common
import data
import evaluate
import runs
import saliency
import sets
import training


@pytest.fixture(autouse=True)
def signals():
    before = {s: signal.getsignal(s) for s in common.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def no_work(monkeypatch):
    """Whatever costs time, or writes, fails."""

    def work(*_, **__):
        raise AssertionError("--dry-run must not do that")

    for owner, name in ((torch.Tensor, "backward"), (data.Loader, "epoch"), (evaluate, "extract"), (runs, "put"),
                        (runs, "lock"), (saliency, "maps")):  # fmt: skip
        monkeypatch.setattr(owner, name, work)


def dry(method, *flags):
    """main of a method with --dry-run, in this process."""
    assert importlib.import_module(method).main([*map(str, flags), "--dry-run", "--device", "cpu"]) is None


def refused(capsys, run, *words):
    with pytest.raises(SystemExit) as stop:
        run()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and all(word in err for word in words), err


# ============ defaults that do not fit ============


@pytest.mark.parametrize("method", METHODS)
def test_a_trial_on_few_images_just_starts(method, no_work, capsys):
    """256 images are less than 4096 negatives or a queue of 2048, 40 less than a batch; --dry-run computes nothing."""
    dry(method, "--limit", 256)
    out = capsys.readouterr().out
    lowered = {"instdisc": "--negatives 255 instead of the recipe's 4096", "pirl": "--negatives 255",
               "cmc": "--negatives 255", "moco": "--queue 256 instead of the recipe's 2048"}  # fmt: skip
    assert (lowered.get(method, "") in out) and ("instead of" in out) == (method in lowered)
    dry(method, "--limit", 40)
    out = capsys.readouterr().out
    assert "--batch-size 40 instead of the recipe's 64" in out and "batch 40 = 1 cpu x 1 x 40" in out


@pytest.mark.parametrize(("method", "flags", "words"), [
    ("byol", ("--batch-size", 64), "--batch-size 64: with the 40 training images of shapes it must be at most 40"),
    ("instdisc", ("--negatives", 4096), "--negatives 4096: with the 40 training images"),
    ("pirl", ("--negatives=4096",), "--negatives 4096"),
    ("cmc", ("--negatives", 40), "--negatives 40"),
    ("moco", ("--queue", 2048), "--queue 2048"),
])  # fmt: skip
def test_what_was_given_by_hand_is_refused(method, flags, words, capsys):
    refused(capsys, lambda: dry(method, "--limit", 40, *flags), words)


def test_a_batch_is_lowered_to_what_the_processes_can_share(capsys):
    args = Namespace(batch_size=64, accumulate=3, given=set(), data="x")
    assert training.images_per_pass(args, 2, 40) == 6 and args.batch_size == 36
    refused(capsys, lambda: training.images_per_pass(args, 2, 4), "--batch-size 36")


@pytest.mark.parametrize(("flags", "words"), [
    (("--size", 1), "--size 1: it must be at least 8"),
    (("--size", 1_000_000), "at most 4096"),
    (("--seed", 2**64), "--seed"),
    (("--seed", -1), "--seed -1"),
    (("--lr", "nan"), "--lr nan"),
    (("--epochs", 0), "--epochs 0"),
])  # fmt: skip
@pytest.mark.parametrize("method", ["byol", "pretext"])
def test_numbers_out_of_range_are_refused(method, flags, words, capsys):
    refused(capsys, lambda: dry(method, *flags), words)


def test_out_is_named_after_any_folder(tmp_path, monkeypatch):
    parse = importlib.import_module("byol").parse_args
    assert parse(["--data", f"{tmp_path}/pictures/"]).out == "runs/byol-pictures"
    monkeypatch.chdir(tmp_path)
    assert parse(["--data", "."]).out == f"runs/byol-{tmp_path.name}"


# ============ the recipe of a folder ============


@pytest.mark.parametrize("method", METHODS)
def test_own_photographs_get_a_recipe_that_fits(method, tmp_path, no_work, capsys):
    """The recipe of ImageNet would need 4096 images a batch. 96 px: the decoder, patches and puzzles must fit, too."""
    write_images(tmp_path / "images", 48, size=100)
    flags = ["--data", tmp_path / "images", "--workers", 0]
    dry(method, *flags)
    out = capsys.readouterr().out
    assert "recipe folder (by --data, sized for 48 images; the paper's: --recipe imagenet)" in out
    assert "48 images at 96 px" in out and "200 epochs x 1 steps" in out and "resnet10_32" in out
    dry(method, *flags, "--epochs", 3, "--recipe", "shapes", "--size", 32)
    out = capsys.readouterr().out
    assert "recipe shapes (as asked for)" in out and "3 epochs" in out


@pytest.mark.parametrize("task", ["exemplar", "jigsaw", "relative", "colorization"])
def test_every_pretext_task_has_a_recipe_for_folders(task, tmp_path, no_work, capsys):
    write_images(tmp_path / "images", 48, size=100)
    if task == "colorization":  # its prior of colors is counted on the images
        importlib.import_module("pretext").parse_args(["--data", str(tmp_path / "images"), "--task", task])
    else:
        dry("pretext", "--data", tmp_path / "images", "--task", task, "--workers", 0)


def test_a_folder_is_sized_by_its_images():
    def sized(images, **given):
        args = Namespace(epochs=100, batch_size=64, arch="resnet10_32_ln", given=set(given), why="", **{})
        vars(args).update(given)
        training.size_folder(args, images)
        return args.epochs, args.batch_size, args.arch

    assert sized(100) == (200, 64, "resnet10_32_ln")
    assert sized(2000) == (100, 64, "resnet10_32_ln")
    assert sized(20_000) == (20, 256, "resnet18_ln")
    assert sized(2000, epochs=7) == (7, 64, "resnet10_32_ln")
    assert sized(50_000, arch="resnet10_32", batch_size=32) == (20, 32, "resnet10_32")


def test_which_recipe_a_set_gets(tmp_path, monkeypatch):
    recipes, names = ("shapes", "cifar10", "imagenet", "folder"), "shapes-hard cifar100 imagenet places365 stl10 pets"
    named = {name: sets.recipe_for(name, recipes) for name in names.split()}
    assert named == {"shapes-hard": "shapes", "cifar100": "cifar10", "imagenet": "imagenet", "places365": "imagenet",
                     "stl10": "folder", "pets": "folder"}  # fmt: skip
    folder = str(write_images(tmp_path / "images", 12))
    assert sets.recipe_for(folder, recipes) == "folder" and sets.count(folder) == 12
    monkeypatch.setattr(sets, "LARGE", 11)
    assert sets.recipe_for(folder, recipes) == "imagenet"
    assert sets.recipe_for(folder, {"cifar10": {}}) == "cifar10"  # a script may have one recipe only
    write_images(tmp_path / "split" / "train", 6), write_images(tmp_path / "split" / "val", 4)
    assert sets.count(str(tmp_path / "split")) == 6


# ============ stopped, finished, out of memory ============

RUN = ["--limit", "32", "--batch-size", "16", "--epochs", "1", "--device", "cpu", "--no-amp"]
RUN += ["--probes", "knn", "--out"]


def test_a_stopped_run_says_so_by_its_exit_code(tmp_path, monkeypatch, capsys):
    main = importlib.import_module("byol").main
    monkeypatch.setattr(common, "catch_signals", lambda: [signal.SIGTERM])
    assert main([*RUN, str(tmp_path)]) == common.STOPPED
    assert "stopped by a signal at step 1; the same command goes on from here" in capsys.readouterr().out
    monkeypatch.setattr(common, "catch_signals", list)
    assert main([*RUN, str(tmp_path)]) is None and "going on from step 1 of 2" in capsys.readouterr().out
    assert main([*RUN, str(tmp_path)]) is None and "is finished" in capsys.readouterr().out


def test_a_final_probe_without_memory_names_the_command_that_repeats_it(tmp_path, monkeypatch, capsys):
    def probe(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 43.00 GiB")

    monkeypatch.setattr(common, "catch_signals", list)
    monkeypatch.setattr(evaluate, "report", probe)
    refused(capsys, lambda: importlib.import_module("byol").main([*RUN, str(tmp_path)]), "memory ran out",
            f"python evaluate.py {tmp_path} --device cpu")  # fmt: skip
    assert runs.load(tmp_path / "checkpoint.pt")["step"] == 2
