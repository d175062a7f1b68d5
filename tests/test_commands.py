"""Every command that stands in a page is one that the parser of its script takes."""

import argparse
import importlib
import re
import shlex
import sys

import pytest
from helpers import ROOT

PAGES = sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*.md")) + sorted(ROOT.glob("results/*.md"))
NAME = r"\w+\.py|-m (?:experiments|downstream|analysis)\.\w+"
COMMAND = re.compile(rf"(?:python|torchrun [^`\n]*?) ({NAME})\b(.*?)(?=$|  |#|&&|\||;)")
STANDS_FOR = {"S": "0", "N": "1", "T": "rotation", "A": "resnet18"}


def commands(text):
    """(script, its words) of all commands in code spans, in fenced and in indented blocks."""
    text = re.sub(r"\\\n\s*", "", text)
    fenced = re.findall(r"^```.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found = [line for block in fenced for line in block.splitlines()] + re.findall(r"^    (.*)", rest, re.MULTILINE)
    found += [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", rest)]
    for line in found:
        for script, words in COMMAND.findall(line):
            words = re.sub(r"\([^)]*\)|\.\.\.|[\[\]]", " ", words)  # (the same), and what may be left out
            yield script, [STANDS_FOR.get(word, word) for word in shlex.split(words)]


class Parsed(Exception):
    pass


def parsed(*_):
    raise Parsed


def check(script, words, monkeypatch):
    """End with exit code 2 unless the script's parser takes the words."""
    real = argparse.ArgumentParser.parse_args

    def parse_args(*args):
        real(*args)
        parsed()

    module = importlib.import_module(script.removesuffix(".py").removeprefix("-m "))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [script, *words])
        compares = script == "-m experiments.compare"
        if compares:  # what is no flag of its own goes to every script
            own = module.parse_args(words)
            runs = [module.training(own, dataset, method, 0) for dataset in own.data for method in own.methods]
        elif compares := script == "-m experiments.dense":
            runs = [seeds[0] for seeds in module.jobs_of(module.parse_args(words)).values()]
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr("data.check", parsed)
        patch.setattr("data.shrink", parsed)
        if not compares:
            with pytest.raises(Parsed):
                module.main()
            return
    for run in runs:
        _, script, *words = shlex.split(run.typed.replace("-m ", "-m=", 1))
        check(script.replace("=", " "), words, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_that_is_written_down_parses(page, monkeypatch, capsys):
    for script, words in dict.fromkeys((script, tuple(words)) for script, words in commands(page.read_text())):
        try:
            check(script, list(words), monkeypatch)
        except SystemExit as ended:
            if ended.code:  # 0: --help
                pytest.fail(f"{script} {shlex.join(words)}: {capsys.readouterr().err.splitlines()[-1]}")


def test_commands_are_found_and_a_flag_that_is_none_is_refused(monkeypatch, capsys):
    text = "See `python byol.py\n--seed S [--epochs 3]`.\n\n    python moco.py --lr \\\n        3   a comment\n\n"
    text += "```bash\ntorchrun --standalone --nproc_per_node=8 swav.py --amp     # fast\n"
    text += "python -m experiments.ablate sage --dry-run\n```\n"
    assert sorted(commands(text)) == [
        ("-m experiments.ablate", ["sage", "--dry-run"]), ("byol.py", ["--seed", "0", "--epochs", "3"]),
        ("moco.py", ["--lr", "3"]), ("swav.py", ["--amp"]),
    ]  # fmt: skip
    for script in (
        "byol.py",
        "evaluate.py",
        "saliency.py",
        "data.py",
        "-m experiments.compare",
        "-m experiments.ablate",
    ):
        with pytest.raises(SystemExit):
            check(script, ["--no-such-flag"], monkeypatch)
    assert sum(len(list(commands(page.read_text()))) for page in PAGES) > 100
