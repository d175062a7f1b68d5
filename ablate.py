"""Every ablation table of the papers as one command.

    python ablate.py sage                                       SaGe's tables 6 to 10
    python ablate.py sage modules decoder --epochs 4            two of them; what is no flag of ablate.py goes to every row
    python ablate.py instdisc saliency ratio --epochs 24 --seeds 0 1 2
    python ablate.py instdisc --processes 8 --data imagenet --root DIR
    python ablate.py sage --dry-run                             the commands and nothing else

A row is a run of the method's script in OUT/seedN/ROW, and evaluate.py for the figures that the script does not end with.
Rows of the same settings are one run, in whatever tables they stand; what the script looks for beside its run (SaGe's
evaluator) each seed has of its own. The same command goes on where it was stopped and skips what is finished. At the end it
prints the tables, the paper's figures beside ours, and writes OUT/TABLE.json.
"""

import argparse
import difflib
import functools
import importlib
import itertools
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import torch

import byol
import common
import data
import evaluate
import instdisc
import runs
import saliency

# ============ the tables ============
# METHOD: {NAME: (where in the paper, heads of the paper's columns, rows)}. A row: its name, the paper's figures, its flags
# (None: no run, but the network at random, before its first step). What {stands in braces} is filled in by `values`.

FLAT, WEAK = "--weight-maps 0 --weight-semantic 0", "--evaluator random:{other} --semantic pooled"
TRAINED = "--evaluator '' --evaluator-arch {other} --evaluator-epochs"
NO_PASTE, LABELS, RBD = "--copy-paste 0", "--copy-paste 0 --loss supervised", "--copy-paste 0.5 --masks rbd"
TABLES = {
    "sage": {
        "evaluators": ("table 6", ("linear",), [
            ("neither", (0.9,), None),
            ("no L_D, random {other}", (21.7,), f"--weight-d 0 {WEAK}"),
            ("no L_D", (70.3,), "--weight-d 0"),
            ("L_D only", (66.8,), f"--weight-pixel 0 {FLAT}"),
            ("random {other}", (67.3,), WEAK),
            ("{other} for 1 epoch", (67.7,), f"{TRAINED} 1"),
            ("{other} for a third", (68.9,), f"{TRAINED} {{third}}"),
            ("{other} in full", (70.1,), f"{TRAINED} {{epochs}}"),
            ("full", (71.9,), ""),
        ]),
        "recovery": ("table 7", ("linear", "top-5", "MSE"), [
            ("no pixels", (71.6, 0.5, 0.3435), "--weight-pixel 0"),
            ("pixels only", (67.2, 40.5, 0.0297), FLAT),
            ("random {other}", (67.3, 42.6, 0.0290), WEAK),
            ("{other} in full", (70.1, 50.4, 0.0287), f"{TRAINED} {{epochs}}"),
            ("full", (71.9, 52.3, 0.0285), ""),
        ]),
        "bottleneck": ("table 8", ("linear",), [
            ("twice the bottleneck", (71.8,), "--bottleneck {twice_bottleneck}"),
            ("full", (71.9,), ""),
            ("half the bottleneck", (71.7,), "--bottleneck {half_bottleneck}"),
        ]),
        "decoder": ("table 9", ("linear",), [
            ("twice the decoder", (72.0,), "--width {twice_width}"),
            ("full", (71.9,), ""),
            ("half the decoder", (71.7,), "--width {half_width}"),
        ]),
        "modules": ("table 10", ("linear",), [
            ("full", (71.9,), ""),
            ("frozen decoder", (70.5,), "--freeze-decoder"),
            ("no pixels", (71.6,), "--weight-pixel 0"),
            ("pixels only", (67.2,), FLAT),
            ("one level", (71.6,), "--weight-maps 0"),
            ("L_D only", (66.8,), f"--weight-pixel 0 {FLAT}"),
        ]),
        "remarks": ("figure 5 and sec. 3.4", ("linear",), [
            ("average pooling", (None,), "--pool"),
            ("evaluator not frozen", ("< 52",), "--train-evaluator"),
        ]),
    },
    "instdisc": {
        "augmentations": ("DiLo, table 1", ("linear",), [
            ("centre crop", (5.8,), f"{NO_PASTE} --augment none"),
            ("+ flip", (7.3,), f"{NO_PASTE} --augment flip"),
            ("+ crop", (24.7,), f"{NO_PASTE} --augment crop"),
            ("+ scale", (36.8,), f"{NO_PASTE} --augment scale"),
            ("+ jitter", (51.7,), f"{NO_PASTE} --augment jitter"),
            ("+ grey: baseline", (56.5,), f"{NO_PASTE} --augment grey"),
            ("labels, centre crop", (67.1,), f"{LABELS} --augment none"),
            ("labels, + flip", (69.5,), f"{LABELS} --augment flip"),
            ("labels, + crop", (75.0,), f"{LABELS} --augment crop"),
            ("labels, + scale", (76.5,), f"{LABELS} --augment scale"),
            ("labels, + jitter", (74.9,), f"{LABELS} --augment jitter"),
            ("labels, + grey", (75.0,), f"{LABELS} --augment grey"),
        ]),
        "saliency": ("DiLo, table 2a", ("F_beta", "MAE", "linear"), [
            ("baseline", (None, None, 56.5), NO_PASTE),
            ("GS", (0.557, 0.173, 57.8), "--copy-paste 0.5 --masks gs"),
            ("MC", (0.627, 0.186, 58.1), "--copy-paste 0.5 --masks mc"),
            ("RBD", (0.630, 0.144, 59.3), RBD),
            ("learned: BASNet", (0.805, 0.056, 62.9), "--copy-paste 0.5 --masks {learned}"),
            ("exact masks", (None, None, None), "--copy-paste 0.5 --masks {exact}"),
        ]),
        "ratio": ("DiLo, table 2b", ("linear",), [
            ("baseline", (56.5,), NO_PASTE),
            ("pasted 20 %", (59.3,), "--copy-paste 0.2 --masks rbd"),
            ("pasted 50 %", (59.3,), RBD),
            ("pasted 80 %", (57.5,), "--copy-paste 0.8 --masks rbd"),
            ("pasted 100 %", (44.5,), "--copy-paste 1.0 --masks rbd"),
        ]),
        "background": ("DiLo, table 2c", ("linear",), [
            ("baseline", (56.5,), NO_PASTE),
            ("on textures", (57.1,), f"{RBD} --background textures"),
            ("on images", (59.2,), f"{RBD} --background images"),
            ("on grey", (59.3,), f"{RBD} --background grey"),
        ]),
        "blending": ("DiLo, table 2d", ("linear",), [
            ("baseline", (56.5,), NO_PASTE),
            ("no blending", (59.3,), f"{RBD} --blend none"),
            ("Gaussian", (58.9,), f"{RBD} --blend gaussian"),
            ("half of each", (59.3,), f"{RBD} --blend mix"),
        ]),
        "losses": ("DiLo, sec. 6.1", ("linear",), [
            ("NCE", ("about 54",), f"{NO_PASTE} --loss nce"),
            ("softmax-NCE", (56.5,), f"{NO_PASTE} --loss softmax-nce"),
            ("softmax", (None,), f"{NO_PASTE} --loss softmax"),
        ]),
    },
}  # fmt: skip
# Our columns: head -> where it stands in evaluate.json; the first word is the probe.
COMMON = {"20-NN": "knn 20 weighted", "linear": "linear top1"}
FIGURES = {
    "sage": {**COMMON, "top-1": "perceptual top1", "top-5": "perceptual top5", "MSE": "perceptual mse"},
    "instdisc": {**COMMON, "energy": "localisation energy", "other": "localisation energy_other",
                 "pointing": "localisation pointing", "swapped": "swap swapped linear", "object": "swap object"},
}
READ = {
    "sage": "paper: ResNet-50, 100 epochs of ImageNet, and a ResNet-18 where a row names an evaluator; top-1 and top-5 are the "
            "perceptual test's, of recovered images",
    "instdisc": "paper: ResNet-50, 200 epochs of ImageNet. F_beta (the largest over the thresholds) and MAE are of the saliency: "
                "the paper's on DUT-OMRON, ours on the training images, where their true masks are known. Ours from energy on in "
                "per cent: of the class gradient's energy what is inside the object (other: inside another image's object); of "
                "images, those with its maximum there; of objects, those that the linear probe names on another's ground; of "
                "these images, those nearer to the object's than to the ground's",
}
DIGITS = {"MSE": 4, "F_beta": 3, "MAE": 3}  # else 1
MASKED = ("localisation", "swap")  # probes of data whose masks are known
WITHOUT = {"L_D only": ("perceptual",)}  # it has no decoder
# Flags that rows start from, so that they may be given though some rows set them; any other of theirs would break a table.
STARTS = {"sage": {"--bottleneck", "--width", "--semantic", "--evaluator", "--evaluator-arch", "--evaluator-epochs",
                   *(f"--weight-{part}" for part in ("d", "pixel", "maps", "semantic"))}}  # fmt: skip


def values(method, args):
    if method != "sage":
        return {}
    # The paper's second, smaller evaluator is the next smaller network, or a larger one where there is none smaller.
    other = {"resnet50": "resnet18", "resnet18": "resnet10_32", "resnet10_32": "resnet10_16"}.get(args.arch, "resnet10_32")
    epochs = args.evaluator_epochs or byol.RECIPES[args.recipe]["epochs"]
    twice = {f"twice_{k}": 2 * getattr(args, k) for k in ("bottleneck", "width")}
    half = {f"half_{k}": max(1, getattr(args, k) // 2) for k in ("bottleneck", "width")}
    return {"other": other, "epochs": epochs, "third": max(1, epochs // 3), **twice, **half}


# ============ from tables to runs ============


def fill(method, args, learned=None, exact="exact"):
    """The rows of TABLES[method] as they are for these args: {table: [(name, the paper's figures, flags as words or None)]}.
    learned, exact: masks of a saliency network, without which it has no row, and true ones."""
    words = values(method, args) | {"learned": learned and shlex.quote(str(learned)), "exact": shlex.quote(str(exact))}
    split = lambda flags: None if flags is None else shlex.split(flags.format(**words))
    left_out = lambda flags: not learned and "{learned}" in (flags or "")
    return {
        table: [(name.format(**words), paper, split(flags)) for name, paper, flags in rows if not left_out(flags)]
        for table, (_, _, rows) in TABLES[method].items()
    }


def settings_of(parse, words):
    """What a row is, without how it was said."""
    return {k: v for k, v in vars(parse(words)).items() if k not in ("given", "why")}


def folders(parse, flags, tables):
    """{name: folder}: rows of the same settings share the one that is named after the first of them in all tables."""
    first, found = [], {}
    for name, _, own in itertools.chain(*tables.values()):
        if own is not None:
            settings = settings_of(parse, [*flags, *own])
            found[name] = next((folder for s, folder in first if s == settings), re.sub(r"[^\w.]+", "-", name).strip("-"))
            first.append((settings, found[name]))
    return found


def parse_args(argv):
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    p = argparse.ArgumentParser(
        usage="python ablate.py METHOD [tables] [--seeds N ...] [--processes N] [--out DIR] [--dry-run] [flags of METHOD.py]",
        description=__doc__, formatter_class=common.Help, allow_abbrev=False,
        epilog="\n".join(f"{method}: {' '.join(tables)}" for method, tables in TABLES.items()),
    )  # fmt: skip
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="every row with each of them")
    p.add_argument("--processes", type=int, default=1, help="of each run, started by torchrun")
    p.add_argument("--out", help="folder of all runs (default: runs/METHOD-DATA-ablation)")
    p.add_argument("--learned-masks", help="folder: a saliency network's, of the training images, for its row of DiLo's table 2a")
    p.add_argument("--true-masks", help="folder: drawn ones, of the training images, for F_beta, MAE and the row of exact masks")
    p.add_argument("--dry-run", action="store_true", help="list the commands and stop")
    own, own.flags = p.parse_known_args(argv[len(words) :])
    if not words:
        common.fail(f"say of which method: {', '.join(TABLES)}")
    own.method, *chosen = words
    for kind, name, known in [("method", own.method, TABLES), *(("table", t, TABLES.get(own.method, ())) for t in chosen)]:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            common.fail(f"no {kind} {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"))
    common.at_least(1, own, "processes")
    given = {word.split("=")[0] for word in own.flags if word.startswith("--")}
    if "--seed" in given:
        common.fail("--seed: say --seeds, one or more")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        common.fail("ablate.py starts the processes itself: say --processes N, and python instead of torchrun")
    own.parse = importlib.import_module(own.method).parse_args
    args = own.parse(own.flags)
    own.tables = list(dict.fromkeys(chosen)) or list(TABLES[own.method])
    own.rows = fill(own.method, args, own.learned_masks, own.true_masks or "exact")
    for name in ("learned_masks", "true_masks"):
        if (folder := getattr(own, name)) and not Path(folder).is_dir():
            common.fail(f"--{name.replace('_', '-')} {folder}: no such folder")
    for name, _, flags in itertools.chain(*(own.rows[table] for table in own.tables)):
        if clash := given & set(flags or ()) - STARTS.get(own.method, set()):
            common.fail(f"{min(clash)}: the row {name!r} sets it; leave it out, or choose tables without that row")
    own.out = Path(own.out or f"runs/{own.method}-{Path(args.data).resolve().name}-ablation")
    return own, args


# ============ running them ============
# ablate.py, study.py and compare.py start all that they start here.


def command(script, words, processes=1):
    """(the words that start it, the same as a user types it)"""
    launcher, shown = [sys.executable], "python"
    if processes > 1:
        how = ["--standalone", f"--nproc_per_node={processes}"]
        launcher, shown = [*launcher, "-m", "torch.distributed.run", *how], f"torchrun {' '.join(how)}"
    words = [str(word) for word in words]
    return [*launcher, importlib.import_module(script).__file__, *words], f"{shown} {script}.py {shlex.join(words)}"


def start(words, **kwargs):
    """The process ends when this one does, even by SIGKILL, as END_WITH_PARENT names whose end is to be its own. It has a
    session of its own: a Ctrl-C of the terminal reaches it only from here, and as a signal that torchrun passes on."""
    env = {**kwargs.pop("env", os.environ), "END_WITH_PARENT": str(os.getpid())}
    return subprocess.Popen(words, env=env, start_new_session=True, **kwargs)


def run_all(todo, stop, at_once=1):
    """Run jobs, `at_once` at a time. `job.start()` gives a process; after it, `job.end(exit code, whether all is to stop)`
    gives a sentence if this program fails with it, and `job.done()` what there is to say, or None if it needs another
    process. A signal is passed on to all that run and ends this program once they have ended, with exit code 85; so does one
    that stopped a run alone. A failure of one stops the others in the same way, and is this program's.
    """
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as it is under nohup
        signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))
    running, passed, failure, total, began = [], 0, None, len(todo), time.monotonic()
    try:
        while running or (todo and not stop and not failure):
            while todo and len(running) < at_once and not stop and not failure:
                running.append((todo[0], todo.pop(0).start()))
            if passed < len(stop) + bool(failure):
                passed += 1
                for _, child in running:
                    child.terminate()
            for job, child in [pair for pair in running if pair[1].poll() is not None]:
                running.remove((job, child))
                stop += [common.STOPPED] * (child.returncode == common.STOPPED and not stop)
                if sentence := job.end(child.returncode, bool(stop or failure)):
                    code = child.returncode or 1
                    failure = failure or (code if code > 0 else 128 - code, sentence)
                elif (said := job.done()) is None:
                    todo.insert(0, job)
                elif said:
                    ended = total - len(todo) - len(running)
                    left = (time.monotonic() - began) / 60 / ended * (total - ended)
                    print(f"{said} ({ended} of {total}; about {left:.0f} min left)", flush=True)
            time.sleep(0.05)
    except KeyboardInterrupt:  # common's, at the third signal
        pass
    finally:  # and at a full disk, say: what was started here ends here
        for _, child in running:
            child.terminate()
        for _, child in running:
            child.wait()
    if failure:
        print(failure[1], file=sys.stderr)
        sys.exit(failure[0])
    if stop:
        print("stopped by a signal; the same command, but for --fresh, goes on from here")
        sys.exit(common.STOPPED)


def call(script, words, own, stop, processes=1):
    """Run `python SCRIPT.py WORDS` to its end, and return that command."""
    words, shown = command(script, words, processes)
    print(shown, flush=True)
    if not own.dry_run:
        end = lambda code, stopping: f"error: exit code {code} from {shown}" if code and not stopping else ""
        run_all([types.SimpleNamespace(start=lambda: start(words), end=end, done=str)], stop)
    return shown


# ============ what they measured ============


def read_json(file):
    """The dict in a JSON file; {} if there is none."""
    try:
        found = json.loads(file.read_text()) if file.exists() else {}
        return found if isinstance(found, dict) else common.fail(f"{file} holds no JSON object: move it away")
    except (OSError, ValueError) as error:
        common.fail(f"{file} cannot be read ({runs.reason(error)}): move it away")


def figures(folder, data_name):
    return read_json(folder / "evaluate.json").get(data_name, {})


def figure(found, path):
    return functools.reduce(lambda at, key: (at or {}).get(key), path.split(), found)


def mask_figures(own, args, flags):
    """{"F_beta", "MAE"} of the saliency of the training images that a row with these flags pastes by; {} if it pastes nothing,
    or nobody knows where their objects are."""
    train = data.load(args.data, args.root, "pretrain", limit=args.limit, seed=own.seeds[0], memory=args.in_memory)
    if "--masks" not in flags or (train.masks is None and not own.true_masks):
        return {}
    truths = data.read_masks(own.true_masks, train) > 127 if own.true_masks else train.masks > 0
    maps = instdisc.open_maps(own.parse([*own.flags, *flags]), train, torch.device(args.device or "cpu"))
    found = (saliency.resized(m[None, None] / 255, *truths.shape[1:])[0, 0] for m in maps.cpu())
    r = saliency.score(found, truths)
    return {"F_beta": [r["max_f"]], "MAE": [r["mae"]]}


def log_lines(folder):
    """The lines of a run's log, each a dict; none where there is no log."""
    file = folder / "metrics.jsonl"
    try:
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    except (OSError, ValueError) as error:
        common.fail(f"{file} cannot be read ({runs.reason(error)})")


def at_random(folder):
    """The figures of the network before its first step, with which every run begins its log."""
    return {"knn": {"20": {"weighted": next((line.get("knn20") for line in log_lines(folder) if line["step"] == 0), None)}}}


def cell(head, numbers):
    """One figure, or its mean and standard deviation over the seeds, or a word of the paper, as it stands in the table."""
    numbers, digits = [v for v in numbers if v is not None], DIGITS.get(head, 1)
    if not numbers or isinstance(numbers[0], str):
        return numbers[0] if numbers else "-"
    spread = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.{digits}f}{spread}"


def show(own, table, columns, measured):
    """Print one table and write OUT/TABLE.json. measured: row name -> ({our head: figures by seed}, commands by seed)."""
    where, heads, _ = TABLES[own.method][table]
    wide = 8 if len(own.seeds) == 1 else 14
    line = "{:30}" + "{:>9}" * len(heads) + "   |" + "".join(f"{{:>{max(wide, len(head) + 2)}}}" for head in columns)
    print(f"\n{table} ({where})\n" + line.format("", *heads, *columns))
    kept = []
    for name, paper, _ in own.rows[table]:
        ours, commands = measured[name]
        papers = dict(zip(heads, paper, strict=True))
        print(line.format(name, *(cell(h, [v]) for h, v in papers.items()), *(cell(h, ours.get(h, [])) for h in columns)))
        kept.append({"row": name, "paper": papers, "seeds": own.seeds, "ours": ours})
        kept[-1]["commands"] = commands
    runs.write_text(own.out / f"{table}.json", json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def main(argv=None):
    own, args = parse_args(sys.argv[1:] if argv is None else argv)
    stop, columns, judge = common.catch_signals(), FIGURES[own.method], None
    test = data.load(args.data, args.root, "test")
    if test.masks is None:
        columns = {head: path for head, path in columns.items() if path.split()[0] not in MASKED}
        own.rows = {table: [row for row in rows if "exact" not in (row[2] or ())] for table, rows in own.rows.items()}
    wanted = dict.fromkeys(path.split()[0] for path in columns.values() if (data.labels_of(test) >= 0).any())
    wanted = [probe for probe in wanted if probe in args.probes or probe not in evaluate.PROBES]
    same = ["--root", args.root, "--limit", args.limit, "--workers", args.workers]
    same += ["--device", args.device] * bool(args.device) + ["--amp" if args.amp else "--no-amp"] * (args.amp is not None)
    if "perceptual" in wanted:  # judged by a network of the same architecture, trained with labels, unless one is given
        judge = Path(args.classifier or own.out / "classifier.pt")
        if args.fresh and not args.classifier and not own.dry_run:
            judge.unlink(missing_ok=True)
    where, commands, plan = folders(own.parse, own.flags, own.rows), {}, {}
    for name, _, flags in itertools.chain(*(own.rows[table] for table in own.tables)):
        if flags is not None:
            plan.setdefault(where[name], (name, flags))
    of_files = any("--masks" in flags for _, flags in plan.values()) and not args.in_memory
    if of_files and isinstance(data.load(args.data, args.root), data.Files):  # of files masks are made beforehand
        used = {word for _, flags in plan.values() for word in flags} & set(saliency.METHODS)
        for method in sorted(used):
            words = [args.data, "--root", args.root, "--method", method, "--out", own.out / f"masks-{method}"]
            call("saliency", [*words, "--workers", args.workers, *["--device", args.device] * bool(args.device)], own, stop)
        made = {method: str(own.out / f"masks-{method}") for method in used}
        plan = {folder: (name, [made.get(word, word) for word in flags]) for folder, (name, flags) in plan.items()}

    for seed, (folder, (name, flags)) in itertools.product(own.seeds, plan.items()):
        path = own.out / f"seed{seed}" / folder
        words = [*own.flags, *flags, "--seed", seed, "--out", path]
        commands[folder, seed] = call(own.method, words, own, stop, own.processes)
        found = figures(path, args.data)
        if not found and not own.dry_run:
            sys.exit(f"error: {path} has not come to its end; the same command goes on from there")
        if judge and found.get("perceptual", {}).get("classifier") != str(judge):
            found.pop("perceptual", None)
        done = {*found, *WITHOUT.get(name, ()), *(evaluate.PROBES if own.dry_run else ())}
        missing = [probe for probe in wanted if probe not in done]
        if "perceptual" in missing and not judge.exists() and judge not in commands:
            words = [f"random:{args.arch}", "--data", args.data, "--size", args.size, *same, "--save", judge]
            commands[judge] = call("evaluate", [*words, "--probe", "finetune", "--labels", 100], own, stop)
        if missing:
            words = [path, "--probe", *missing, *same, "--seed", seed]
            call("evaluate", words + ["--classifier", judge] * ("perceptual" in missing), own, stop)
    painted = [own.out / f"seed{own.seeds[0]}" / f for f, (name, _) in plan.items() if name not in WITHOUT] if judge else []
    if painted:
        words = [painted[0], "--probe", "pictures", *same, "--recipe", args.recipe, "--classifier", judge, "--out", own.out]
        call("evaluate", words + ["--beside", *painted[1:]] * bool(painted[1:]), own, stop)
    if own.dry_run:
        return

    measured = {}
    for name, _, flags in itertools.chain(*(own.rows[table] for table in own.tables)):
        paths = [own.out / f"seed{seed}" / (next(iter(plan)) if flags is None else where[name]) for seed in own.seeds]
        found = [at_random(path) if flags is None else figures(path, args.data) for path in paths]
        ours = {head: [figure(each, path) for each in found] for head, path in columns.items()}
        measured[name] = ours, [commands[where[name], seed] for seed in own.seeds if flags is not None]
    for table in own.tables:
        of_masks = {}
        if "F_beta" in TABLES[own.method][table][1]:
            of_masks = {name: mask_figures(own, args, plan[where[name]][1]) for name, _, flags in own.rows[table] if flags}
        for name, found in of_masks.items():
            measured[name][0].update(found)
        show(own, table, [*(("F_beta", "MAE") if any(of_masks.values()) else ()), *columns], measured)
    seeds = f"; mean and standard deviation of {len(own.seeds)} seeds" if len(own.seeds) > 1 else ""
    print(f"\nleft of the bar the paper's figures, right ours{seeds}. Compare the order of the rows, not their heights.")
    print(READ[own.method])
    if painted:
        images = figures(painted[0], args.data)["perceptual"]
        print(f"of the images themselves: top-1 {images['originals_top1']:.1f}, top-5 {images['originals_top5']:.1f}")
        print(f"recoveries: {own.out}/reconstructions.png")


if __name__ == "__main__":
    main()
