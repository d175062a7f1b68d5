"""Every ablation table of the papers as one command.

    python -m experiments.ablate sage                                SaGe's tables 6 to 10
    python -m experiments.ablate sage modules decoder --epochs 4     two of them; other flags go to every row
    python -m experiments.ablate instdisc saliency ratio --epochs 24 --seeds 0 1 2
    python -m experiments.ablate instdisc --processes 8 --data imagenet --root DIR
    python -m experiments.ablate sage --dry-run                      the commands and nothing else

A row is a run of the method's script in OUT/seedN/ROW, and evaluate.py for the metrics that the script does not end
with. Rows of the same settings are one run, in whatever tables they stand; what the script looks for beside its run
(SaGe's evaluator) each seed has of its own. The same command goes on where it was stopped and skips what is finished.
At the end it prints the tables, the paper's numbers beside ours, and writes OUT/TABLE.json.
"""

import functools
import importlib
import itertools
import json
import re
import shlex
import sys
from pathlib import Path

import torch

import byol
import common
import evaluate
import instdisc
import runs
import saliency
import sets
from analysis import score_saliency
from experiments import jobs

# ============ the tables ============
# METHOD: {NAME: (where in the paper, heads of the paper's columns, rows)}. A row: its name, the paper's numbers, its
# flags (None: no run, but the random initialization of one). `placeholders` fills in what {stands in braces}.

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
FROZEN = {"20-NN": "knn 20 weighted", "linear": "linear top1"}
METRICS = {
    "sage": {**FROZEN, "top-1": "perceptual top1", "top-5": "perceptual top5", "MSE": "perceptual mse"},
    "instdisc": {**FROZEN, "energy": "localisation energy", "other": "localisation energy_other",
                 "pointing": "localisation pointing", "swapped": "swap swapped linear", "object": "swap object"},
}  # fmt: skip
NOTES = {
    "sage": """\
paper: ResNet-50, 100 epochs of ImageNet, and a ResNet-18 where a row names an evaluator. top-1 and top-5: the
perceptual test, the accuracy of a classifier on recovered images.""",
    "instdisc": """\
paper: ResNet-50, 200 epochs of ImageNet. F_beta (the largest over the thresholds) and MAE are of the saliency: the
paper's on DUT-OMRON, ours on the training images, where their true masks are known. In per cent: energy, the share of
the class gradient's energy inside the object (other: inside another image's object); pointing, images with its maximum
there; swapped, objects that the linear probe recognizes on another background; object, those nearer to the object's
image than to the background's.""",
}
DIGITS = {"MSE": 4, "F_beta": 3, "MAE": 3}  # else 1
NEEDS_MASKS = ("localisation", "swap")  # probes of data whose masks are known
COMMANDS = {"perceptual": "analysis.reconstruct", **dict.fromkeys(NEEDS_MASKS, "analysis.diagnose")}  # others: evaluate
NO_DECODER = ("L_D only",)  # rows without recovered images
# Flags that rows start from, so that they may be given though some rows set them. Any other flag of a row is refused.
START_FROM = {"sage": {"--bottleneck", "--width", "--semantic", "--evaluator", "--evaluator-arch", "--evaluator-epochs",
                       *(f"--weight-{part}" for part in ("d", "pixel", "maps", "semantic"))}}  # fmt: skip


def placeholders(method, args):
    if method != "sage":
        return {}
    # The paper's second, smaller evaluator is the next smaller network, or a larger one where there is none smaller.
    smaller = {"resnet50": "resnet18", "resnet18": "resnet10_32", "resnet10_32": "resnet10_16"}
    epochs = args.evaluator_epochs or byol.RECIPES[args.recipe]["epochs"]
    twice = {f"twice_{k}": 2 * getattr(args, k) for k in ("bottleneck", "width")}
    half = {f"half_{k}": max(1, getattr(args, k) // 2) for k in ("bottleneck", "width")}
    other = smaller.get(args.arch, "resnet10_32")
    return {"other": other, "epochs": epochs, "third": max(1, epochs // 3), **twice, **half}


# ============ from tables to runs ============


def rows_for(method, args, learned=None, exact="exact"):
    """The rows of TABLES[method] for these args: {table: [(name, the paper's numbers, flags as words or None)]}.
    learned, exact: masks of a saliency network, without which it has no row, and true ones."""
    quoted = {"learned": learned and shlex.quote(str(learned)), "exact": shlex.quote(str(exact))}
    values = placeholders(method, args) | quoted
    split = lambda flags: None if flags is None else shlex.split(flags.format(**values))
    left_out = lambda flags: not learned and "{learned}" in (flags or "")
    return {
        table: [(name.format(**values), paper, split(flags)) for name, paper, flags in rows if not left_out(flags)]
        for table, (_, _, rows) in TABLES[method].items()
    }


def settings_of(parse, words):
    """What a row is, however its flags were written."""
    return {k: v for k, v in vars(parse(words)).items() if k not in ("given", "why")}


def row_folders(parse, flags, tables):
    """{name: folder}: rows of the same settings share the one that is named after the first of them in all tables."""
    seen, folders = [], {}
    for name, _, own in itertools.chain(*tables.values()):
        if own is not None:
            settings, new = settings_of(parse, [*flags, *own]), re.sub(r"[^\w.]+", "-", name).strip("-")
            folders[name] = next((folder for s, folder in seen if s == settings), new)
            seen.append((settings, folders[name]))
    return folders


def parse_args(argv):
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    tables = "\n".join(f"{method}: {' '.join(tables)}" for method, tables in TABLES.items())
    p = jobs.parser("ablate METHOD [tables] [--seeds N ...] [--dry-run] [flags of METHOD.py]", __doc__, tables, False)
    p.add_argument("--out", help="folder of all runs (default: runs/METHOD-DATA-ablation)")
    p.add_argument("--learned-masks", help="folder: a saliency network's masks of the training images, for their row")
    p.add_argument("--true-masks", help="folder: drawn masks of the training images, for F_beta, MAE and the exact row")
    own, own.flags = jobs.parse(p, argv[len(words) :])
    if not words:
        common.fail(f"say of which method: {', '.join(TABLES)}")
    own.method, *chosen = words
    jobs.check_names("method", [own.method], TABLES)
    jobs.check_names("table", chosen, TABLES[own.method])
    own.parse = importlib.import_module(own.method).parse_args
    args = own.parse(own.flags)
    own.tables = list(dict.fromkeys(chosen)) or list(TABLES[own.method])
    own.rows = rows_for(own.method, args, own.learned_masks, own.true_masks or "exact")
    for name in ("learned_masks", "true_masks"):
        if (folder := getattr(own, name)) and not Path(folder).is_dir():
            common.fail(f"--{name.replace('_', '-')} {folder}: no such folder")
    for name, _, flags in itertools.chain(*(own.rows[table] for table in own.tables)):
        if clash := own.given & set(flags or ()) - START_FROM.get(own.method, set()):
            common.fail(f"{min(clash)}: the row {name!r} sets it; leave it out, or choose tables without that row")
    own.out = Path(own.out or f"runs/{own.method}-{Path(args.data).resolve().name}-ablation")
    return own, args


# ============ running them ============


def make_masks(own, args, plan, run):
    """Masks of a folder of images are made before the rows that paste by them, whose flags then name them."""
    used = {word for _, flags in plan.values() if "--masks" in flags for word in flags} & set(saliency.METHODS)
    if not used or args.in_memory or not isinstance(sets.load(args.data, args.root), sets.Files):
        return plan
    made = {method: own.out / f"masks-{method}" for method in sorted(used)}
    for method, folder in made.items():
        words = [args.data, "--root", args.root, "--method", method, "--out", folder, "--workers", args.workers]
        run("saliency", words + ["--device", args.device] * bool(args.device))
    return {row: (name, [str(made.get(word, word)) for word in flags]) for row, (name, flags) in plan.items()}


def run_rows(own, args, plan, probes, run):
    """Every row with every seed, and the probes that it lacks; returns {(folder, seed): command}, and the classifier of
    the perceptual test or None."""
    same, commands, classifier = jobs.evaluation_flags(args), {}, None
    if "perceptual" in probes:  # of the same architecture, trained with labels, unless one is given
        classifier = Path(args.classifier or own.out / "classifier.pt")
        if args.fresh and not args.classifier and not own.dry_run:
            classifier.unlink(missing_ok=True)
    for seed, (folder, (name, flags)) in itertools.product(own.seeds, plan.items()):
        path = own.out / f"seed{seed}" / folder
        words = [*own.flags, *flags, "--seed", seed, "--out", path]
        commands[folder, seed] = run(own.method, words, processes=own.processes)
        found = jobs.read_metrics(path, args.data)
        if not found and not own.dry_run:
            sys.exit(f"error: {path} has not come to its end; the same command goes on from there")
        if classifier and found.get("perceptual", {}).get("classifier") != str(classifier):
            found.pop("perceptual", None)
        done = {*found, *(("perceptual",) if name in NO_DECODER else ()), *(evaluate.PROBES if own.dry_run else ())}
        missing = [probe for probe in probes if probe not in done]
        if "perceptual" in missing and not classifier.exists() and "classifier" not in commands:
            words = [f"random:{args.arch}", "--data", args.data, "--size", args.size, *same, "--save", classifier]
            commands["classifier"] = run("downstream.finetune", [*words, "--labels", 100])
        for module in dict.fromkeys(COMMANDS.get(probe, "evaluate") for probe in missing):
            words = ["--classifier", classifier, "--recipe", args.recipe]
            if module != "analysis.reconstruct":
                words = ["--probe", *(probe for probe in missing if COMMANDS.get(probe, "evaluate") == module)]
            run(module, [path, *words, *same, "--seed", seed])
    return commands, classifier


# ============ what they measured ============


def mask_quality(own, args, flags):
    """{"F_beta", "MAE"} of the saliency of the training images that a row with these flags pastes by; {} if it pastes
    nothing, or if the true masks are not known."""
    train = sets.load(args.data, args.root, "pretrain", limit=args.limit, seed=own.seeds[0], memory=args.in_memory)
    if "--masks" not in flags or (train.masks is None and not own.true_masks):
        return {}
    truths = sets.read_masks(own.true_masks, train) > 127 if own.true_masks else train.masks > 0
    maps = instdisc.open_maps(own.parse([*own.flags, *flags]), train, torch.device(args.device or "cpu"))
    resized = (saliency.resized(m[None, None] / 255, *truths.shape[1:])[0, 0] for m in maps.cpu())
    score = score_saliency.score(resized, truths)
    return {"F_beta": [score["max_f"]], "MAE": [score["mae"]]}


def cell(head, values):
    """Mean and standard deviation of our values, or the paper's value, which may be words."""
    return next((v for v in values if isinstance(v, str)), None) or jobs.mean_std(values, DIGITS.get(head, 1))


def write_table(own, args, table, plan, folders, columns, commands):
    """Print one table and write OUT/TABLE.json. columns: our head -> where it stands in evaluate.json."""
    where, heads, _ = TABLES[own.method][table]
    rows = []
    for name, paper, flags in own.rows[table]:
        folder = next(iter(plan)) if flags is None else folders[name]
        paths = [own.out / f"seed{seed}" / folder for seed in own.seeds]
        if flags is None:
            found = [{"knn": {"20": {"weighted": jobs.initial_knn(path)}}} for path in paths]
        else:
            found = [jobs.read_metrics(path, args.data) for path in paths]
        ours = {head: [jobs.lookup(metrics, keys) for metrics in found] for head, keys in columns.items()}
        ours |= mask_quality(own, args, plan[folder][1]) if flags and "F_beta" in heads else {}
        ran = [commands[folder, seed] for seed in own.seeds if flags is not None]
        papers = dict(zip(heads, paper, strict=True))
        rows.append({"row": name, "paper": papers, "seeds": own.seeds, "ours": ours, "commands": ran})
    columns = [head for head in ("F_beta", "MAE", *columns) if any(head in row["ours"] for row in rows)]
    lines = [["", *heads, "|", *columns]]
    for row in rows:
        papers, ours = row["paper"].items(), [(head, row["ours"].get(head, [])) for head in columns]
        lines.append([row["row"], *(cell(h, [v]) for h, v in papers), "|", *(cell(h, values) for h, values in ours)])
    print(f"\n{table} ({where})", *jobs.aligned(lines), sep="\n")
    runs.write_text(own.out / f"{table}.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n")


def main(argv=None):
    own, args = parse_args(sys.argv[1:] if argv is None else argv)
    columns, test = METRICS[own.method], sets.load(args.data, args.root, "test")
    run = functools.partial(jobs.run, stop=common.catch_signals(), dry_run=own.dry_run)
    if test.masks is None:
        columns = {head: keys for head, keys in columns.items() if keys.split()[0] not in NEEDS_MASKS}
        own.rows = {table: [row for row in rows if "exact" not in (row[2] or ())] for table, rows in own.rows.items()}
    probes = dict.fromkeys(keys.split()[0] for keys in columns.values() if (sets.labels_of(test) >= 0).any())
    probes = [probe for probe in probes if probe in args.probes or probe not in evaluate.PROBES]
    folders, plan = row_folders(own.parse, own.flags, own.rows), {}  # plan: {folder: (name of its first row, flags)}
    for name, _, flags in itertools.chain(*(own.rows[table] for table in own.tables)):
        if flags is not None:
            plan.setdefault(folders[name], (name, flags))
    plan = make_masks(own, args, plan, run)
    commands, classifier = run_rows(own, args, plan, probes, run)
    pictured = [
        own.out / f"seed{own.seeds[0]}" / f for f, (name, _) in plan.items() if name not in NO_DECODER and classifier
    ]
    if pictured:
        words = [pictured[0], *jobs.evaluation_flags(args), "--recipe", args.recipe]
        words += ["--classifier", classifier, "--out", own.out, *["--beside", *pictured[1:]] * bool(pictured[1:])]
        run("analysis.reconstruct", words)
    if own.dry_run:
        return
    for table in own.tables:
        write_table(own, args, table, plan, folders, columns, commands)
    seeds = f"; mean and standard deviation of {len(own.seeds)} seeds" if len(own.seeds) > 1 else ""
    print(f"\nleft of the bar the paper's numbers, right ours{seeds}. Compare the order of the rows, not their values.")
    print(NOTES[own.method])
    if pictured:
        images = jobs.read_metrics(pictured[0], args.data)["perceptual"]
        print(f"of the images themselves: top-1 {images['originals_top1']:.1f}, top-5 {images['originals_top5']:.1f}")
        print(f"recoveries: {own.out}/reconstructions.png")


if __name__ == "__main__":
    main()
