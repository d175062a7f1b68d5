"""experiments/ablate.py with a method and an evaluate.py that take no time, and once with the real ones."""

import importlib
import json
import os
import shlex
import signal
import sys
import threading
import time
import types

import pytest
import torch
from helpers import ROOT, TINY, fork, write_images
from torchvision.io import decode_image, write_png

import byol
import evaluate
import saliency
import sets
from analysis import score_saliency
from experiments import ablate, jobs

TOY = """
import argparse, json, os, pathlib, signal, sys, time

def parse_args(argv=None):
    p = argparse.ArgumentParser(allow_abbrev=False)
    names = dict(data="shapes", root="datasets", device=None, recipe="shapes", arch="net", out=None)
    for name, default in names.items():
        p.add_argument(f"--{name}", default=default)
    for name in ("limit", "workers", "seed", "size", "wait", "fail"):
        p.add_argument(f"--{name}", type=int, default=0)
    p.add_argument("--ratio", type=float, default=0.0)
    p.add_argument("--masks", default="rbd")
    p.add_argument("--probes", nargs="*", default=["knn", "linear"])
    p.add_argument("--fresh", action="store_true")
    p.add_argument("--in-memory", action="store_true")
    p.add_argument("--amp", action=argparse.BooleanOptionalAction)
    return p.parse_args(argv)

def stopped(*_):
    (out / "stopped").write_text("")
    sys.exit(85)

if __name__ == "__main__":
    args = parse_args()
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, stopped)
    if args.fail and not args.ratio:
        sys.exit(args.fail)
    with open(out / "starts", "a") as f:
        f.write(os.environ.get("WORLD_SIZE", "1") + "\\n")
    if (out / "evaluate.json").exists():
        sys.exit()
    if args.wait and not (out / "stopped").exists():
        (out / "waits").write_text("")
        time.sleep(args.wait)
    log = [{"step": 0, "knn20": 13.0}, {"step": 3, "loss": 1.0}, {"step": 9, "knn20": 50.0}]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in log))
    found = {"knn": {"20": {"weighted": 100 * args.ratio + args.seed}}, "linear": {"top1": 50.0}}
    (out / "evaluate.json").write_text(json.dumps({args.data: {"health": {}, **{k: found[k] for k in args.probes}}}))
"""
MEASURE = """
import json, pathlib, sys
file = pathlib.Path(sys.argv[1], "evaluate.json")
with open(file.parent / "measured", "a") as f:
    f.write(" ".join(sys.argv[2:]) + "\\n")
found = json.loads(file.read_text())
numbers = {"localization": {"energy": 25.0}, "linear": {"top1": 50.0}}
probe = sys.argv[sys.argv.index("--probe") + 1]
next(iter(found.values()))[probe] = numbers[probe]
file.write_text(json.dumps(found))
"""
TABLES = {
    "ratio": ("table 1", ("linear", "MAE"), [
        ("neither", (0.9, None), None),
        ("none", (56.5, 0.1234), ""),
        ("half", ("< 60", None), "--ratio 0.5"),
    ]),
    "masks": ("table 2", ("linear",), [
        ("baseline", (56.5,), "--ratio 0.0"),
        ("exact", (62.9,), "--ratio 0.5 --masks {exact}"),
    ]),
}  # fmt: skip


@pytest.fixture
def toy(tmp_path, monkeypatch, few_shapes):
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "measure.py").write_text(MEASURE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy", raising=False)
    monkeypatch.setattr(evaluate, "__file__", str(tmp_path / "measure.py"))
    monkeypatch.setattr(ablate, "PROBED_BY", {})  # every probe by evaluate.py
    monkeypatch.setattr(ablate, "TABLES", {**ablate.TABLES, "toy": TABLES})
    columns = {**ablate.FROZEN, "energy": "localization energy"}
    monkeypatch.setattr(ablate, "METRICS", {**ablate.METRICS, "toy": columns})
    monkeypatch.setattr(ablate, "NOTES", {**ablate.NOTES, "toy": "how to read it"})
    return tmp_path / "out"


def lines(file):
    return file.read_text().splitlines()


def folders(path):
    return sorted(p.name for p in path.iterdir() if p.is_dir())


def printed_rows(text):
    """{row: cells} of all tables, the paper's numbers and then ours."""
    lines = [[word.strip() for word in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {name: cells for name, *cells in lines}


def all_rows(method, *flags):
    own, args = ablate.parse_args([method, *flags])
    photographs = types.SimpleNamespace(masks=None)
    return ablate.rows_of(own, args, photographs)


# ============ the tables themselves ============


def test_rows_of_sage_are_commands_that_parse():
    sage = importlib.import_module("sage")
    base = ["--data", "imagenet", "--evaluator-epochs", "300"]
    tables = all_rows("sage", *base)
    rows = {name: flags for table in tables.values() for name, _, flags in table if flags is not None}
    assert len(rows) == 18 and sum(map(len, tables.values())) == 28
    got = {name: sage.parse_args(["--data", "imagenet", *flags]) for name, flags in rows.items()}
    weights = lambda a: (a.weight_d, a.weight_pixel, a.weight_maps, a.weight_semantic)
    assert weights(got["full"]) == (1, 0.1, 0.1, 0.1)
    assert weights(got["L_D only"]) == (1, 0, 0, 0) and weights(got["no L_D"]) == (0, 0.1, 0.1, 0.1)
    assert weights(got["no pixels"]) == (1, 0, 0.1, 0.1)
    assert weights(got["pixels only"]) == (1, 0.1, 0, 0) and weights(got["one level"]) == (1, 0.1, 0, 0.1)
    assert got["random resnet18"].evaluator == "random:resnet18" == got["no L_D, random resnet18"].evaluator
    assert weights(got["no L_D, random resnet18"])[0] == 0
    third, whole = got["resnet18 for a third"], got["resnet18 in full"]
    assert (
        third.evaluator_epochs == 100
        and whole.evaluator_epochs == 300
        and got["resnet18 for 1 epoch"].evaluator_epochs == 1
    )
    assert third.evaluator_arch == whole.evaluator_arch == "resnet18"
    assert [got[f"{n} the bottleneck"].bottleneck for n in ("twice", "half")] == [1024, 256]
    assert [got[f"{n} the decoder"].width for n in ("twice", "half")] == [1024, 256]
    assert (
        got["frozen decoder"].freeze_decoder
        and got["average pooling"].pool
        and got["evaluator not frozen"].train_evaluator
    )
    flags = {name: flags for name, _, flags in all_rows("sage")["evaluators"]}["resnet10_32 in full"]
    assert int(flags[-1]) == byol.RECIPES["shapes"]["epochs"]  # where --evaluator-epochs is not given


@pytest.mark.parametrize("recipe", ["shapes", "cifar10", "imagenet"])
@pytest.mark.parametrize("method", ablate.TABLES)
def test_every_row_parses_and_only_rows_of_the_same_settings_share_a_folder(method, recipe):
    if not (ROOT / f"{method}.py").exists():
        pytest.skip(f"{method}.py is not there")
    parse, base = importlib.import_module(method).parse_args, ["--data", recipe]
    tables = all_rows(method, *base)
    folders = ablate.row_folders(parse, base, tables)
    settings = {}
    for table, found in tables.items():
        heads = ablate.TABLES[method][table][1]
        for name, paper, flags in found:
            assert len(paper) == len(heads)
            if flags is not None:
                args = {k: v for k, v in vars(parse([*base, *flags])).items() if k not in ("given", "why")}
                assert settings.setdefault(folders[name], args) == args
    assert len({tuple(map(str, s.values())) for s in settings.values()}) == len(settings)
    probes = {path.split()[0] for path in ablate.METRICS[method].values()}
    assert probes <= {*evaluate.PROBES, *ablate.PROBED_BY} and method in ablate.NOTES


# ============ running them ============


def test_tables_stand_beside_the_papers_and_rows_are_shared(toy, capfd):
    command = ["toy", "--workers", "0", "--seeds", "0", "2", "--out", str(toy)]
    ablate.main(command)
    printed = capfd.readouterr().out
    assert "table 1" in printed and "table 2" in printed and "how to read it" in printed
    found = printed_rows(printed)
    assert found["half"] == ["< 60", "-", "-", "51.0 ± 1.4", "50.0 ± 0.0", "25.0 ± 0.0"]  # the third is our MAE
    assert found["none"][:2] == ["56.5", "0.123"]
    kept = {row["row"]: row for row in json.loads((toy / "ratio.json").read_text())}
    assert kept["half"]["paper"] == {"linear": "< 60", "MAE": None} and kept["half"]["seeds"] == [0, 2]
    ours = {"20-NN": [50.0, 52.0], "linear": [50.0, 50.0], "energy": [25.0, 25.0]}
    assert kept["half"]["ours"] == {"MAE": [None, None], **ours}
    first = kept["half"]["commands"][0]
    assert shlex.split(first)[:2] == ["python", "toy.py"] and "--ratio 0.5 --seed 0" in first
    assert kept["neither"]["ours"]["20-NN"] == [13.0, 13.0] and kept["neither"]["commands"] == []
    other = {row["row"]: row for row in json.loads((toy / "masks.json").read_text())}
    assert (
        other["baseline"]["ours"] == {k: v for k, v in kept["none"]["ours"].items() if k != "MAE"} and "exact" in other
    )
    assert folders(toy / "seed0") == ["exact", "half", "none"]
    assert lines(toy / "seed0/none/starts") == ["1"]  # one run for both tables
    assert lines(toy / "seed2/half/measured") == ["--probe localization --root datasets --limit 0 --workers 0 --seed 2"]

    ablate.main(command)  # again: nothing is started, and what is measured stays
    assert lines(toy / "seed0/none/starts") == ["1"] and len(lines(toy / "seed0/none/measured")) == 1
    assert (again := capfd.readouterr().out).split("ratio (table 1)")[1] == printed.split("ratio (table 1)")[1]
    ablate.main([*command, "--show"])
    assert capfd.readouterr().out.split("ratio (table 1)")[1] == again.split("ratio (table 1)")[1]
    ablate.main([*command, "--fresh"])
    assert lines(toy / "seed0/none/starts") == ["1", "1"] and (toy / "seed0/none.log").read_text().count("--fresh") == 1


def test_only_the_tables_that_are_asked_for(toy, capfd):
    ablate.main(["toy", "ratio", "--out", str(toy)])
    assert folders(toy / "seed0") == ["half", "none"]
    assert (toy / "ratio.json").exists() and not (toy / "masks.json").exists()
    assert "±" not in capfd.readouterr().out


def test_a_dry_run_lists_the_commands_and_writes_nothing(toy, capfd):
    ablate.main(["toy", "--dry-run", "--processes", "2", "--out", str(toy), "--limit", "5"])
    printed = capfd.readouterr().out.splitlines()
    assert printed[0] == f"torchrun --standalone --nproc_per_node=2 toy.py --limit 5 --seed 0 --out {toy}/seed0/none"
    assert printed[3].startswith(f"python evaluate.py {toy}/seed0/none --probe localization --root datasets --limit 5")
    assert len(printed) == 6 and not toy.exists()


def test_a_row_that_fails_stops_with_its_exit_code_and_command(toy, capfd):
    with pytest.raises(SystemExit) as stopped:
        ablate.main(["toy", "--fail", "3", "--out", str(toy)])
    err = capfd.readouterr().err
    assert stopped.value.code == 3 and "exit code 3 from python toy.py --fail 3 --seed 0" in err
    assert not (toy / "seed0/half").exists() and not (toy / "ratio.json").exists()


def test_a_signal_reaches_the_run_and_the_same_command_goes_on(toy, capfd):
    command = ["toy", "ratio", "--wait", "60", "--out", str(toy)]

    def interrupt():
        while not (toy / "seed0/none/waits").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(SystemExit) as stopped:
        ablate.main(command)
    assert stopped.value.code == 85 and "the same command" in capfd.readouterr().out
    assert (toy / "seed0/none/stopped").exists() and not (toy / "seed0/half").exists()
    (toy / "seed0/half").mkdir()
    (toy / "seed0/half/stopped").touch()  # it does not wait
    ablate.main(command)
    assert len(lines(toy / "seed0/none/starts")) == 2 and (toy / "ratio.json").exists()


def test_a_run_that_was_stopped_by_others_is_no_row(toy, capfd, monkeypatch):
    monkeypatch.setattr(jobs, "read_results", lambda folder, name: {})
    with pytest.raises(SystemExit) as stopped:
        ablate.main(["toy", "--out", str(toy)])
    assert stopped.value.code == 1 and "has not come to its end" in capfd.readouterr().err


def test_data_without_masks_or_labels(toy, tmp_path, capfd):
    images = write_images(tmp_path / "images", 20)
    ablate.main(["toy", "--data", str(images), "--out", str(toy)])
    printed = capfd.readouterr().out
    assert "energy" not in printed and "exact" not in printed and not (toy / "seed0/half/measured").exists()
    plain = write_images(tmp_path / "plain", 20, classes=1) / "class0"
    ablate.main(["toy", "--data", str(plain), "--probes", "--out", str(toy / "plain")])
    assert printed_rows(capfd.readouterr().out)["half"] == ["< 60", "-", "-", "-", "-"]


def test_a_probe_that_the_run_left_out_is_made_up_for(toy):
    ablate.main(["toy", "ratio", "--probes", "knn", "--out", str(toy)])
    assert lines(toy / "seed0/half/measured")[0].startswith("--probe localization ")
    ablate.main(["toy", "ratio", "--out", str(toy)])
    assert lines(toy / "seed0/half/measured")[1].startswith("--probe linear ")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "say of which method"),
        (["--seeds", "0"], "say of which method"),
        (["tow"], "method tow: did you mean 'toy'"),
        (["toy", "ration"], "table ration: did you mean 'ratio'"),
        (["toy", "xyz"], "there are ratio, masks"),
        (["toy", "--seed", "3"], "--seeds"),
        (["toy", "--true-masks", "nowhere"], "--true-masks nowhere: no such folder"),
        (["toy", "--processes", "0"], "--processes"),
        (["toy", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["toy", "--data", "shaps"], "did you mean 'shapes'"),
    ],
)
def test_bad_input(toy, capfd, words, sentence):
    with pytest.raises(SystemExit) as stopped:
        ablate.main([*words, "--out", str(toy)])
    assert stopped.value.code == 2 and sentence in capfd.readouterr().err and not toy.exists()


def test_flags_that_rows_set_are_said_and_stay_those_of_the_rows(toy, capfd):
    ablate.main(["toy", "--ratio", "0.7", "--masks=gs", "--dry-run", "--out", str(toy)])
    printed = capfd.readouterr().out
    assert "--ratio: rows that set it keep" in printed and "--masks: rows that set it keep" in printed
    assert "--ratio 0.7 --masks=gs --ratio 0.5 --masks exact" in printed
    flags = ["--bottleneck", "64", "--weight-pixel", "2", "--evaluator-epochs", "9"]
    ablate.main(["sage", "bottleneck", "evaluators", *flags, "--dry-run", "--out", str(toy)])
    printed = capfd.readouterr().out
    assert "--bottleneck 128" in printed and "--bottleneck 32" in printed and "--evaluator-epochs 3 " in printed


def test_torchrun_is_for_the_rows(toy, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stopped:
        ablate.main(["toy"])
    assert stopped.value.code == 2 and "--processes" in capfd.readouterr().err


# ============ the real thing ============


def test_sage_with_classifier_and_pictures(tmp_path, monkeypatch, capfd):
    rows = [row for row in ablate.TABLES["sage"]["evaluators"][2] if row[0] in ("neither", "L_D only", "full")]
    monkeypatch.setattr(ablate, "TABLES", {"sage": {"evaluators": ("table 6", ("linear",), rows)}})
    monkeypatch.setattr(jobs, "start", lambda words, **_: fork(*words[1:]))
    images = write_images(tmp_path / "images", 64)
    flags = ["--data", str(images), "--recipe", "shapes", "--workers", "0", "--limit", "48", "--epochs", "1"]
    out = tmp_path / "ablation"
    ablate.main(["sage", *TINY, *flags, "--evaluator", "random:resnet10_16", "--out", str(out)])
    table = {row["row"]: row["ours"] for row in json.loads((out / "evaluators.json").read_text())}
    assert table["full"]["MSE"][0] > 0 and table["full"]["top-1"][0] >= 0 and table["L_D only"]["MSE"] == [None]
    assert table["neither"]["20-NN"][0] > 0 and table["neither"]["linear"] == [None]
    assert decode_image(str(out / "reconstructions.png")).shape[0] == 3 and (out / "classifier.pt").exists()
    printed = capfd.readouterr().out
    assert "66.8" in printed and "of the images themselves" in printed and "classifier.pt" in printed


def test_help_names_the_tables(capfd):
    with pytest.raises(SystemExit):
        ablate.main(["--help"])
    assert "sage: evaluators recovery" in capfd.readouterr().out


def test_masks_of_a_folder_are_made_before_the_rows_that_paste_by_them(folder, tmp_path, capfd):
    flags = ["--data", str(folder), "--recipe", "shapes", "--dry-run", "--out", str(tmp_path / "out")]
    ablate.main(["instdisc", "saliency", "ratio", *flags])
    commands = [line for line in capfd.readouterr().out.splitlines() if line.startswith("python ")]
    made = [line.split("--method ")[1].split()[0] for line in commands if line.startswith("python saliency.py")]
    assert made == ["rbd", "mc", "gs"]
    pasted = [line for line in commands if "--copy-paste 0." in line]
    assert pasted and all(f"--masks {tmp_path}/out/masks-" in line for line in pasted)
    assert not any("exact" in line or "learned" in line for line in commands)


# ============ what the masks are worth ============


def square(height, width):
    """A mask of 40 x 40 px: the upper left `height` x `width`."""
    mask = torch.zeros(1, 40, 40, dtype=torch.uint8)
    mask[:, :height, :width] = 255
    return mask


def test_masks_of_a_folder_are_rows_and_are_measured_against_true_ones(folder, tmp_path, capfd):
    for name, mask in (("true", square(20, 20)), ("learned", square(20, 10))):
        for path in folder.rglob("*.jpg"):
            file = tmp_path / name / path.relative_to(folder).with_suffix(".png")
            file.parent.mkdir(parents=True, exist_ok=True)
            write_png(mask, str(file))
    command = [
        "instdisc",
        "saliency",
        "--data",
        str(folder),
        "--recipe",
        "shapes",
        "--dry-run",
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--learned-masks", str(tmp_path / "learned"), "--true-masks", str(tmp_path / "true"), "--seeds", "3"]
    ablate.main(command)
    printed = capfd.readouterr().out.splitlines()
    rows = {line.rpartition("/")[2]: line for line in printed if line.startswith("python instdisc.py")}
    assert f"--masks {tmp_path}/learned --seed 3" in rows["learned-BASNet"]
    assert f"--masks {tmp_path}/true --seed 3" in rows["exact-masks"]
    own, args = ablate.parse_args(command)
    flags = {
        name: flags for name, _, flags in ablate.rows_of(own, args, sets.load(str(folder), split="test"))["saliency"]
    }
    # Half of the object is found and nothing else: precision 1, recall 1/2.
    found = ablate.mask_quality(own, args, flags["learned: BASNet"])
    assert found == {
        "F_beta": [pytest.approx(1.3 * 0.5 / (0.3 + 0.5), abs=0.01)],
        "MAE": [pytest.approx(200 / 1600, abs=0.01)],
    }
    found = ablate.mask_quality(own, args, flags["exact masks"])
    assert found == {"F_beta": [pytest.approx(1, abs=1e-6)], "MAE": [pytest.approx(0, abs=0.01)]}
    assert ablate.mask_quality(own, args, flags["baseline"]) == {}  # it pastes nothing
    own.true_masks = None
    assert ablate.mask_quality(own, args, flags["learned: BASNet"]) == {}  # and of photographs nobody knows


def test_what_the_masks_of_drawn_objects_are_worth_stands_beside_the_papers(toy, tmp_path, monkeypatch, capfd):
    rows = ablate.TABLES["instdisc"]["saliency"][2]
    rows = [(n, paper, flags.replace("--copy-paste", "--ratio")) for n, paper, flags in rows if n not in ("GS", "MC")]
    monkeypatch.setattr(ablate, "TABLES", {"toy": {"saliency": ("table 2a", ("F_beta", "MAE", "linear"), rows)}})
    flags = ["--data", "shapes", "--limit", "6", "--root", str(tmp_path), "--device", "cpu"]
    ablate.main(["toy", "--out", str(toy), *flags])
    train = sets.load("shapes", limit=6)
    expected = score_saliency.score(saliency.maps(train.images), train.masks > 0)
    kept = {row["row"]: row["ours"] for row in json.loads((toy / "saliency.json").read_text())}
    assert kept["RBD"]["F_beta"] == [pytest.approx(expected["max_f"], abs=0.01)]
    assert kept["RBD"]["MAE"] == [pytest.approx(expected["mae"], abs=0.005)]
    assert (
        kept["exact masks"]["F_beta"] == [1.0]
        and kept["exact masks"]["MAE"] == [0.0]
        and kept["baseline"]["F_beta"] == [None]
    )
    printed = printed_rows(capfd.readouterr().out)
    assert printed["exact masks"][3:5] == ["1.000", "0.000"] and printed["baseline"][3:5] == ["-", "-"]
    assert printed["RBD"][3] == f"{kept['RBD']['F_beta'][0]:.3f}"
