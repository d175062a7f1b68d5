"""What all method scripts promise together: one structure, the same plumbing word for word, no script importing
another."""

import argparse
import ast
import importlib
import itertools
from unittest import mock

import pytest
from helpers import METHODS, ROOT

SECTIONS = ["data", "model", "optimizer", "run: print the recipe, go on from a checkpoint", "training"]
OWN = {"main", "parse_args", "views_of", "seen", "forward"}  # the method itself; all else of one name is the same
LONGEST = {"common.py": 257, "runs.py": 282, "training.py": 213, "loop.py": 115, "optim.py": 80, "parallel.py": 89,
           "memory.py": 82, "byol.py": 209, "simclr.py": 221, "moco.py": 327, "swav.py": 327, "cmc.py": 307,
           "pirl.py": 395, "cpc.py": 415, "instdisc.py": 379, "sage.py": 511, "pretext.py": 634}  # fmt: skip
# What main has in every script, in this order; the method stands between these lines.
SKELETON = """
args = parse_args(argv)
rank, world, device = common.setup(args.device)
args.amp = common.bf16_is_fast(device) if args.amp is None else args.amp
train, labelled, test = sets.splits(args, device)
per_pass = training.images_per_pass(args, world, len(train))
loader = data.Loader(train, views, per_pass, args.seed, rank, world, args.workers, device)
torch.manual_seed(args.seed)  # the same initial weights on every rank
ddp = model
if world > 1:
if args.compile:
run = training.Run(
run.describe(
if not run.begin():
return
while run.is_training():
if run.probe_is_due():
for step in run.epoch():
for
with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
loss = ddp(
loss.backward()
run.log.loss += loss.detach()
optimizer.step()
optimizer.zero_grad()
run.end_step(lr_now,
run.save()
if run.stopped:
return common.STOPPED
run.finish(
"""
# Variables of main that are the method's; all others are set by the same words wherever they are.
DIFFER = {"views", "preprocess", "model", "ddp", "f", "lr", "groups", "optimizer", "run", "lr_now", "loss", "start",
          "negatives", "group['lr']"}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_structure(method):
    text = (ROOT / f"{method}.py").read_text()
    sections = [line.strip("# =") for line in text.splitlines() if line.startswith("    # ============ ")]
    assert sections == SECTIONS
    imported = {a.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import) for a in n.names}
    assert imported & set(METHODS) == ({"byol"} if method == "sage" else set())  # the evaluator's training
    assert text.startswith('"""') and "paper" in text and "official code" in text and "here" in text
    assert text.endswith('if __name__ == "__main__":\n    common.run(main)\n')


def test_sage_takes_from_byol_its_main_and_nothing_else():
    used = [n.attr for n in ast.walk(ast.parse((ROOT / "sage.py").read_text()))
            if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "byol"]  # fmt: skip
    assert used == ["main"]


@pytest.mark.parametrize("file", LONGEST)
def test_plumbing_stays_short(file):
    assert len((ROOT / file).read_text().splitlines()) <= LONGEST[file]


def main_of(method):
    tree = ast.parse((ROOT / f"{method}.py").read_text())
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")


@pytest.mark.parametrize("method", METHODS)
def test_main_has_the_common_skeleton(method):
    lines = iter(line.strip() for line in (ROOT / f"{method}.py").read_text().split("\ndef main(")[1].splitlines())
    for wanted in SKELETON.split("\n")[1:-1]:
        assert any(line.startswith(wanted) for line in lines), wanted


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations(METHODS, 2)))
def test_variables_of_main_are_set_alike(a, b):
    one, two = (
        {ast.unparse(n.targets[0]): ast.unparse(n.value) for n in ast.walk(main_of(m)) if isinstance(n, ast.Assign)}
        for m in (a, b)
    )
    shared = one.keys() & two.keys() - DIFFER
    assert len(shared) > 5 and {k: one[k] for k in shared} == {k: two[k] for k in shared}


def functions(method):
    tree = ast.parse((ROOT / f"{method}.py").read_text())
    return {n.name: ast.dump(n) for n in tree.body if isinstance(n, ast.FunctionDef) and n.name not in OWN}


def flags(method):
    """Every flag of a script with its type, choices and help; defaults are the recipes' business."""
    found = {}
    add = argparse.ArgumentParser.add_argument

    def spy(self, *names, **kwargs):
        if "help" in kwargs:
            kwargs = {k: list(v) if k == "choices" else v for k, v in kwargs.items()}  # of recipes, the names
            found[names[0]] = {k: str(v) for k, v in kwargs.items() if k != "default"}
        return add(self, *names, **kwargs)

    with mock.patch.object(argparse.ArgumentParser, "add_argument", spy):
        importlib.import_module(method).parse_args([])
    return found


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations(METHODS, 2)))
def test_what_has_one_name_is_one_thing(a, b):
    for table in (functions, flags):
        one, two = table(a), table(b)
        assert {k: one[k] for k in one.keys() & two.keys()} == {k: two[k] for k in one.keys() & two.keys()}


@pytest.mark.parametrize("method", METHODS)
def test_help_prints(method, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(method).parse_args(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and "--weight-decay" in text
    assert not any(mark in text for mark in ("@@", "MEASURED", "TODO"))


@pytest.mark.parametrize("method", METHODS)
def test_every_flag_of_the_design_is_there(method):
    promised = "data root size arch epochs batch-size lr weight-decay workers eval-every seed out device amp compile"
    assert {f"--{name}" for name in [*promised.split(), "limit", "dry-run", "fresh"]} <= set(flags(method))


@pytest.mark.parametrize("method", METHODS)
def test_recipes_are_defaults_of_flags(method):
    script = importlib.import_module(method)
    for name, recipe in script.RECIPES.items():
        args = vars(script.parse_args(["--data", name]))
        assert {k: args[k] for k in recipe if k != "views"} == {k: v for k, v in recipe.items() if k != "views"}
        assert vars(script.parse_args(["--data", name, "--epochs", "7"]))["epochs"] == 7


@pytest.mark.parametrize("method", METHODS)
def test_one_recipe_is_enough(method, monkeypatch):
    script = importlib.import_module(method)
    for name, recipe in script.RECIPES.items():
        monkeypatch.setattr(script, "RECIPES", {name: recipe})
        for words in ([], ["--data", "cifar10"], ["--data", "a-folder-of-images"]):
            assert script.parse_args(words).recipe == name
