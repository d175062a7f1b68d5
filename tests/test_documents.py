"""Pages and docstrings: measured accuracies are those of results/, links resolve, lines fit."""

import ast
import itertools
import os
import re
import subprocess

import pytest
from helpers import ROOT

METHODS = ("byol", "sage", "instdisc", "pretext", "simclr", "moco", "swav", "pirl", "cmc", "cpc")
PAGES = sorted(path for path in ROOT.rglob("*.md") if not {".venv", ".pytest_cache"} & set(path.parts))
FIGURE = re.compile(r"(?<![\w.,-])\d+\.\d+(?![\w.])")


# ============ accuracies ============


def results(text):
    """{heading: sets of figures that belong together}: of a line, or of a table's row those in cells with one figure,
    and those of each cell with several."""
    found = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading, *lines = part.splitlines()
        cells = [list(map(FIGURE.findall, line.split("|") if line.startswith("|") else [line])) for line in lines]
        several = [set(cell) for row in cells for cell in row if len(cell) > 1]
        found[heading] = several + [{cell[0] for cell in row if len(cell) == 1} for row in cells]
    return found


def sections(method, measured):
    """The lines of results/README.md that are about a method."""
    names = {"instdisc": "InstDisc|DiLo|Distilling", "pretext": "Pretext"}
    about = re.compile(rf"\b(?:{names.get(method, method)})", re.IGNORECASE)
    return [line for heading, lines in measured.items() if about.search(heading) for line in lines]


def columns(doc):
    """(k-NN figures, linear figures) of each row of the table "Measured with this file" in a script's docstring."""
    _, _, table = doc.partition("\nMeasured with this file")
    if not table:
        return
    header, *rows = [line for line in table.splitlines() if line.startswith("    ")]
    at = [header.index(name) for name in ("k-NN", "linear", "device")]
    for row in rows:
        starts = [row.rfind(" ", 0, i) + 1 if row[i - 1 : i].strip() else i for i in at]  # a cell that begins early
        knn, linear = (FIGURE.findall(row[a:b]) for a, b in itertools.pairwise(starts))
        if knn or linear:
            yield knn[::-1] if "->" in row else knn, linear  # random network -> trained


def quoted(text, doc_of):
    """(method, figures that must stand in one line of results/README.md): of README's table `text` and of the
    docstrings."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if script := len(cells) == 6 and re.search(r"\b(\w+)\.py\b", cells[1]):
            for row in itertools.zip_longest(
                *map(FIGURE.findall, cells[3:])
            ):  # several seeds, the minutes of the first
                yield script[1], tuple(figure for figure in row if figure)
    for method in METHODS:
        for knn, linear in columns(doc_of(method)):
            for pair in itertools.zip_longest(knn, linear):
                yield method, tuple(figure for figure in pair if figure)


def docstring(method):
    return ast.get_docstring(ast.parse((ROOT / f"{method}.py").read_text()), clean=False)


def unmeasured(quotes, measured):
    """The quotes of which no line of the method's results has all figures."""
    return [(m, figures) for m, figures in quotes if not any(set(figures) <= line for line in sections(m, measured))]


README, MEASURED = (ROOT / "README.md").read_text(), results((ROOT / "results/README.md").read_text())


def test_quoted_accuracies_are_the_measured_ones():
    quotes = list(quoted(README, docstring))
    assert {method for method, _ in quotes} == set(METHODS) and len(quotes) > 60
    assert not unmeasured(quotes, MEASURED)


@pytest.mark.parametrize("share, quotes", [(0, [*quoted(README, lambda _: "")]), (0.03, [*quoted("", docstring)])])
def test_a_changed_digit_is_found(share, quotes):
    """In README's table any, in docstrings nearly any: of two results in a row one may become the other."""
    missed, changed = [], 0
    for method, figures in quotes:
        for i, figure in enumerate(figures):
            for j, digit in enumerate(figure):
                if digit != ".":
                    other = figure[:j] + str((int(digit) + 1) % 10) + figure[j + 1 :]
                    quote = method, (*figures[:i], other, *figures[i + 1 :])
                    changed += 1
                    missed += [] if unmeasured([quote], MEASURED) else [quote]
    assert changed > 100 and len(missed) <= share * changed, missed


# ============ links ============


def anchors(text):
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page, text):
    """The links of a page to files and anchors that are not there."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)", text):
        path, _, anchor = link.partition("#")
        file = page.parent / path if path else page
        if re.match(r"https?:", link):
            continue
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_resolve(page):
    assert not list(broken(page, page.read_text()))


def test_a_broken_link_is_found():
    text = "[a](README.md#tests) [b](README.md#no-such-heading) [c](no.md) [d](https://example.org) `[e](f)`\n"
    assert list(broken(ROOT / "README.md", text)) == ["README.md#no-such-heading", "no.md"]


# ============ the SLURM script ============

SRUN = """for i in $(seq 0 15); do SLURM_PROCID=$i SLURM_LOCALID=$((i % 8)) SLURM_NTASKS=16 "${@:3}"; done
[ $2 = --cpus-per-task=4 ] && exit $CODE"""
PYTHON = """echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >> calls"""


@pytest.mark.parametrize("code", [0, 1, 2, 85, 143])
def test_the_slurm_script_starts_every_rank_and_requeues_after_85_alone(code, tmp_path):
    script = re.search(r"^(#!/bin/bash.*?)^```", (ROOT / "docs/scale.md").read_text(), re.DOTALL | re.MULTILINE)[1]
    for name, text in (("srun", SRUN), ("python", PYTHON), ("scontrol", 'echo "host-$1"; echo "$*" >> slurm')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "CODE": str(code),
        "SLURM_CPUS_PER_TASK": "4",
    }
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env)
    assert done.returncode == code
    ranks = [f"{i} {i % 8} 16 host-show 29500 sage.py --data imagenet --root DIR" for i in range(16)]
    assert (tmp_path / "calls").read_text().splitlines() == ranks
    assert ("requeue 7" in (tmp_path / "slurm").read_text()) == (code == 85)


# ============ lines ============


def test_no_line_of_python_is_longer_than_120_columns():
    files = [path for path in ROOT.rglob("*.py") if ".venv" not in path.parts]
    lines = [(f.relative_to(ROOT), i, x) for f in files for i, x in enumerate(f.read_text().splitlines(), 1)]
    assert not [f"{file}:{i}" for file, i, line in lines if len(line) > 120]
