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
import contextlib
import difflib
import functools
import importlib
import itertools
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import byol
import common
import data
import evaluate
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
            ("exact masks", (0.805, 0.056, 62.9), "--copy-paste 0.5 --masks exact"),
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
    "instdisc": "paper: ResNet-50, 200 epochs of ImageNet; F_beta and MAE are of the masks, on DUT-OMRON, and beside exact masks "
                "stand a network's, BASNet. Ours from energy on in per cent: of the class gradient's energy what is inside the "
                "object (other: inside another image's object); of images, those with its maximum there; of objects, those that "
                "the linear probe names on another's ground; of these images, those nearer to the object's than to the ground's",
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


def fill(method, args):
    """The rows of TABLES[method] as they are for these args: {table: [(name, the paper's figures, flags as words or None)]}."""
    words, split = values(method, args), lambda flags: None if flags is None else shlex.split(flags)
    return {
        table: [(name.format(**words), paper, split(flags and flags.format(**words))) for name, paper, flags in rows]
        for table, (_, _, rows) in TABLES[method].items()
    }


def folders(parse, flags, tables):
    """{name: folder}: rows of the same settings share the one that is named after the first of them in all tables."""
    first, found = [], {}
    for name, _, own in itertools.chain(*tables.values()):
        if own is not None:
            settings = vars(parse([*flags, *own]))
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
    own.tables, own.rows = list(dict.fromkeys(chosen)) or list(TABLES[own.method]), fill(own.method, args)
    for name, _, flags in itertools.chain(*(own.rows[table] for table in own.tables)):
        if clash := given & set(flags or ()) - STARTS.get(own.method, set()):
            common.fail(f"{min(clash)}: the row {name!r} sets it; leave it out, or choose tables without that row")
    own.out = Path(own.out or f"runs/{own.method}-{Path(args.data).resolve().name}-ablation")
    return own, args


def call(script, words, own, stop, processes=1):
    """Run `python SCRIPT.py WORDS` to its end, and return that command. A signal is passed on to it, and ends this program
    once it has ended; so does a failure of it."""
    launcher, shown = [sys.executable], "python"
    if processes > 1:
        how = ["--standalone", f"--nproc_per_node={processes}"]
        launcher, shown = [*launcher, "-m", "torch.distributed.run", *how], f"torchrun {' '.join(how)}"
    words = [str(word) for word in words]
    print(shown := f"{shown} {script}.py {shlex.join(words)}", flush=True)
    if own.dry_run:
        return shown
    # In a session of its own: a Ctrl-C of the terminal reaches it only from here, and as a signal that torchrun passes on.
    child = subprocess.Popen([*launcher, importlib.import_module(script).__file__, *words], start_new_session=True)
    passed = 0
    try:
        while child.poll() is None:
            if passed < len(stop):
                child.terminate()
                passed += 1
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.2)
    except KeyboardInterrupt:  # the third signal
        child.terminate()
        raise
    if stop:
        print("stopped by a signal; the same command, but for --fresh, goes on from here")
        sys.exit(0)
    if child.returncode:
        print(f"error: exit code {child.returncode} from {shown}", file=sys.stderr)
        sys.exit(child.returncode if child.returncode > 0 else 128 - child.returncode)
    return shown


# ============ what they measured ============


def figures(folder, data_name):
    file = folder / "evaluate.json"
    return json.loads(file.read_text()).get(data_name, {}) if file.exists() else {}


def figure(found, path):
    return functools.reduce(lambda at, key: (at or {}).get(key), path.split(), found)


def at_random(folder):
    """The figures of the network before its first step, which every run begins its log with."""
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    return {"knn": {"20": {"weighted": first.get("knn20")}}}


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
        print(line.format(name, *(cell(h, [v]) for h, v in zip(heads, paper, strict=True)), *(cell(h, ours[h]) for h in columns)))
        kept.append({"row": name, "paper": dict(zip(heads, paper, strict=True)), "seeds": own.seeds, "ours": ours})
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
    of_files = of_files and isinstance(data.load(args.data, args.root), data.Files)

    for seed, (folder, (name, flags)) in itertools.product(own.seeds, plan.items()):
        path = own.out / f"seed{seed}" / folder
        at = flags.index("--masks") + 1 if of_files and "--masks" in flags else 0
        if at and flags[at] in saliency.METHODS:  # of files they are made beforehand
            masks = own.out / f"masks-{flags[at]}"
            if masks not in commands:
                words = [args.data, "--root", args.root, "--method", flags[at], "--out", masks, "--workers", args.workers]
                commands[masks] = call("saliency", words + ["--device", args.device] * bool(args.device), own, stop)
            flags = [*flags[:at], masks, *flags[at + 1 :]]
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
        show(own, table, columns, measured)
    seeds = f"; mean and standard deviation of {len(own.seeds)} seeds" if len(own.seeds) > 1 else ""
    print(f"\nleft of the bar the paper's figures, right ours{seeds}. Compare the order of the rows, not their heights.")
    print(READ[own.method])
    if painted:
        images = figures(painted[0], args.data)["perceptual"]
        print(f"of the images themselves: top-1 {images['originals_top1']:.1f}, top-5 {images['originals_top5']:.1f}")
        print(f"recoveries: {own.out}/reconstructions.png")


if __name__ == "__main__":
    main()
