"""Every ablation table of the papers as one command.

    python -m experiments.ablate sage                                SaGe's tables 6 to 10
    python -m experiments.ablate sage modules decoder --epochs 4     two of them; other flags go before every row's own
    python -m experiments.ablate instdisc saliency ratio --epochs 24 --seeds 0 1 2
    python -m experiments.ablate instdisc --processes 8 --data imagenet --root DIR
    python -m experiments.ablate sage --dry-run                      the commands and nothing else

A row is a run of the method's script in OUT/seedN/ROW, its output in OUT/seedN/ROW.log; the probes that the script does
not end with follow. Rows of the same settings are one run, in whatever tables they stand; what the script looks for
beside its run (SaGe's evaluator) each seed has of its own. The same command goes on where it was stopped and skips what
is finished. At the end it prints the tables, the paper's numbers beside ours, and writes OUT/TABLE.json.
"""

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
import copy_paste
import evaluate
import runs
import saliency
import sets
from analysis import score_saliency
from experiments import jobs

# ============ the tables ============
# METHOD: {NAME: (where in the paper, heads of the paper's columns, rows)}. A row: its name, the paper's numbers, its
# flags (None: no run, but the random init of one). `placeholders` says what {names} in braces stand for.

FLAT, WEAK = "--weight-maps 0 --weight-semantic 0", "--evaluator random:{other} --semantic pooled"
TRAINED = "--evaluator '' --evaluator-arch {other} --evaluator-epochs"
NO_PASTE, RBD = "--copy-paste 0", "--copy-paste 0.5 --masks {rbd}"
AUGMENTATIONS = [  # cumulative: row, --augment, the paper's accuracies of InstDisc and with labels
    ("center crop", "none", 5.8, 67.1), ("+ flip", "flip", 7.3, 69.5), ("+ crop", "crop", 24.7, 75.0),
    ("+ scale", "scale", 36.8, 76.5), ("+ jitter", "jitter", 51.7, 74.9), ("+ gray", "gray", 56.5, 75.0),
]  # fmt: skip
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
            (f"{labels}{name}", (papers[i],), f"{flags} --augment {augment}")
            for i, (labels, flags) in enumerate((("", NO_PASTE), ("labels, ", "--copy-paste 0 --loss supervised")))
            for name, augment, *papers in AUGMENTATIONS
        ]),
        "saliency": ("DiLo, table 2a", ("F_beta", "MAE", "linear"), [
            ("baseline", (None, None, 56.5), NO_PASTE),
            ("GS", (0.557, 0.173, 57.8), "--copy-paste 0.5 --masks {gs}"),
            ("MC", (0.627, 0.186, 58.1), "--copy-paste 0.5 --masks {mc}"),
            ("RBD", (0.630, 0.144, 59.3), RBD),
            ("learned: BASNet", (0.805, 0.056, 62.9), "--copy-paste 0.5 --masks {learned}"),
            ("exact masks", (None, None, None), "--copy-paste 0.5 --masks {exact}"),
        ]),
        "ratio": ("DiLo, table 2b", ("linear",), [
            ("baseline", (56.5,), NO_PASTE),
            ("pasted 20 %", (59.3,), "--copy-paste 0.2 --masks {rbd}"),
            ("pasted 50 %", (59.3,), RBD),
            ("pasted 80 %", (57.5,), "--copy-paste 0.8 --masks {rbd}"),
            ("pasted 100 %", (44.5,), "--copy-paste 1.0 --masks {rbd}"),
        ]),
        "background": ("DiLo, table 2c", ("linear",), [
            ("baseline", (56.5,), NO_PASTE),
            ("on textures", (57.1,), f"{RBD} --background textures"),
            ("on images", (59.2,), f"{RBD} --background images"),
            ("on gray", (59.3,), f"{RBD} --background gray"),
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
    "instdisc": {**FROZEN, "energy": "localization energy", "other": "localization energy_other",
                 "pointing": "localization pointing", "swapped": "swap swapped linear", "object": "swap object"},
}  # fmt: skip
PROBED_BY = {"perceptual": "analysis.reconstruct", "localization": "analysis.diagnose", "swap": "analysis.diagnose"}
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
NO_DECODER = ("L_D-only",)  # folders of rows without recovered images


def rows_of(own, args, test):
    """{table: [(row, the paper's numbers, its flags as words or None)]} for the method, data and flags given."""
    # Masks of photographs are made before the rows that paste by them; of a set in memory the script makes them itself.
    made = isinstance(test, sets.Files) and not args.in_memory
    values = {m: str(own.out / f"masks-{m}") if made else m for m in saliency.METHODS}
    values |= {"learned": own.learned_masks, "exact": own.true_masks or (None if test.masks is None else "exact")}
    if own.method == "sage":
        # The paper's second, smaller evaluator is the next smaller network, or a larger one where there is none.
        smaller = {"resnet50": "resnet18", "resnet18": "resnet10_32", "resnet10_32": "resnet10_16"}
        epochs = args.evaluator_epochs or byol.RECIPES[args.recipe]["epochs"]
        values |= {"other": smaller.get(args.arch, "resnet10_32"), "epochs": epochs, "third": max(1, epochs // 3)}
        for name in ("bottleneck", "width"):
            values |= {f"twice_{name}": 2 * getattr(args, name), f"half_{name}": max(1, getattr(args, name) // 2)}
    known = lambda flags: not any(f"{{{name}}}" in (flags or "") for name, value in values.items() if value is None)
    words = lambda flags: flags if flags is None else [word.format(**values) for word in shlex.split(flags)]
    return {
        table: [(name.format(**values), paper, words(flags)) for name, paper, flags in rows if known(flags)]
        for table, (_, _, rows) in TABLES[own.method].items()
    }


def row_folders(parse, flags, tables):
    """{row: folder}: rows of the same settings, however written, share the one of the first of them in all tables."""
    folders, first = {}, {}
    for name, _, own in itertools.chain(*tables.values()):
        if own is not None:
            settings = {k: v for k, v in vars(parse([*flags, *own])).items() if k not in ("given", "why")}
            folders[name] = first.setdefault(repr(sorted(settings.items())), re.sub(r"[^\w.]+", "-", name).strip("-"))
    return folders


def parse_args(argv):
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    epilog = "\n".join(f"{method}: {' '.join(tables)}" for method, tables in TABLES.items())
    p = jobs.parser("ablate METHOD [tables] [--seeds N ...] [--dry-run] [flags of METHOD.py]", __doc__, epilog, False)
    p.add_argument("--out", help="folder of all runs (default: runs/METHOD-DATA-ablation)")
    p.add_argument("--learned-masks", help="folder: a saliency network's masks of the training images, for their row")
    p.add_argument("--true-masks", help="folder: drawn masks of the training images, for F_beta, MAE and the exact row")
    own, own.flags = jobs.parse(p, argv[len(words) :])
    if not words:
        common.fail(f"say of which method: {', '.join(TABLES)}")
    own.method, *chosen = words
    jobs.check_names("method", [own.method], TABLES)
    jobs.check_names("table", chosen, TABLES[own.method])
    own.tables, own.parse = chosen or list(TABLES[own.method]), importlib.import_module(own.method).parse_args
    args = own.parse(own.flags)
    own.flags = [word for word in own.flags if word != "--fresh"]
    for name in ("learned_masks", "true_masks"):
        if (folder := getattr(own, name)) and not Path(folder).is_dir():
            common.fail(f"--{name.replace('_', '-')} {folder}: no such folder")
    own.out = Path(own.out or f"runs/{own.method}-{Path(args.data).resolve().name}-ablation")
    return own, args


# ============ running them ============


def training(own, args, columns, folder, flags, seed):
    """The run of one row with one seed, a Job."""
    path = own.out / f"seed{seed}" / folder
    words = [*own.flags, *flags, "--seed", seed, "--out", path]
    measured = lambda: jobs.lookup(jobs.read_results(path, args.data), columns)
    return jobs.Job(path, own.method, words, measured, own.processes, args.fresh)


def preparing(own, args, every, classifier):
    """What the runs `every` need: masks of photographs, and the perceptual test's classifier, of the same network."""
    same = ["--root", args.root, "--workers", args.workers, *["--device", args.device] * bool(args.device)]
    for method in saliency.METHODS:
        if any(str(folder := own.out / f"masks-{method}") in job.words for job in every):
            yield jobs.Job(folder, "saliency", [args.data, "--method", method, "--out", folder, *same])
    if classifier and not args.classifier:
        words = [f"random:{args.arch}", "--data", args.data, "--size", args.size, *evaluation_flags(args)]
        yield jobs.Job(classifier, "downstream.finetune", [*words, "--labels", 100, "--save", classifier])


def probing(own, args, probes, classifier, paths):
    """The probes that the runs in `paths` end without. The perceptual test of the first also draws what all recover."""
    drawn = [path for path in paths if path.parent == paths[0].parent and path.name not in NO_DECODER]
    for path, probe in itertools.product(paths, probes):
        words, made = ["--probe", probe], args.probes if own.dry_run else jobs.read_results(path, args.data)
        if probe == "perceptual":
            words = ["--classifier", classifier, "--recipe", args.recipe]
            if drawn[:1] == [path]:
                words += ["--out", own.out, *["--beside", *drawn[1:]] * bool(drawn[1:])]
        words += [*evaluation_flags(args), "--seed", path.parent.name.removeprefix("seed")]
        measured = lambda path=path, probe=probe: jobs.read_results(path, args.data).get(probe)
        if (probe in PROBED_BY or probe not in made) and not (probe == "perceptual" and path.name in NO_DECODER):
            yield jobs.Job(Path(f"{path}-{probe}"), PROBED_BY.get(probe, "evaluate"), [path, *words], measured)


def evaluation_flags(args):
    """How commands on a checkpoint read the data of a run with these args."""
    words = ["--root", args.root, "--limit", args.limit, "--workers", args.workers]
    words += ["--device", args.device] * bool(args.device)
    return words + ["--amp" if args.amp else "--no-amp"] * (args.amp is not None)


# ============ what they measured ============


def mask_quality(own, args, flags):
    """{"F_beta", "MAE"} of the saliency of the training images that a row with these flags pastes by; {} if it pastes
    nothing, or if the true masks are not known."""
    train = sets.load(args.data, args.root, "pretrain", limit=args.limit, seed=own.seeds[0], memory=args.in_memory)
    if "--masks" not in flags or (train.masks is None and not own.true_masks):
        return {}
    truths = sets.read_masks(own.true_masks, train) > 127 if own.true_masks else train.masks > 0
    maps = copy_paste.open_maps(own.parse([*own.flags, *flags]), train, torch.device(args.device or "cpu"))
    resized = (saliency.resized(m[None, None] / 255, *truths.shape[1:])[0, 0] for m in maps.cpu())
    score = score_saliency.score(resized, truths)
    return {"F_beta": [score["max_f"]], "MAE": [score["mae"]]}


def report(own, args, table, rows, columns, trained):
    """Print one table and write OUT/TABLE.json. trained: {row: its Jobs}."""
    where, heads, _ = TABLES[own.method][table]
    columns, kept = [*(head for head in heads if head in ("F_beta", "MAE")), *columns], []
    cell = lambda head, values: jobs.mean_std(values, DIGITS.get(head, 1))
    lines = [["", *(f"paper: {head}" for head in heads), *columns]]
    for name, paper, flags in rows:
        found = [job.measured() for job in trained.get(name, ())]
        if flags is None:  # the random init is the same in every run of a seed
            found = [{"20-NN": jobs.initial_knn(job.path)} for job in next(iter(trained.values())) if job.measured()]
        ours = {head: [numbers.get(head) for numbers in found] for head in columns}
        if flags and "F_beta" in heads:
            ours |= mask_quality(own, args, flags)
        papers = [v if isinstance(v, str) else cell(head, [v]) for head, v in zip(heads, paper, strict=True)]
        lines.append([name, *papers, *(cell(head, ours[head]) for head in columns)])
        kept.append({"row": name, "paper": dict(zip(heads, paper, strict=True)), "seeds": own.seeds, "ours": ours,
                     "commands": [job.typed for job in trained.get(name, ())]})  # fmt: skip
    print(f"\n{table} ({where})", *jobs.table(lines), sep="\n")
    runs.write_text(own.out / f"{table}.json", json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def main(argv=None):
    own, args = parse_args(sys.argv[1:] if argv is None else argv)
    test, columns, trained = sets.load(args.data, args.root, "test"), METRICS[own.method], {}
    if test.masks is None:
        columns = {head: keys for head, keys in columns.items() if keys.split()[0] not in ("localization", "swap")}
    probes = dict.fromkeys(keys.split()[0] for keys in columns.values() if (sets.labels_of(test) >= 0).any())
    probes = [probe for probe in probes if probe in args.probes or probe not in evaluate.PROBES]
    classifier = Path(args.classifier or own.out / "classifier.pt") if "perceptual" in probes else None

    tables = rows_of(own, args, test)
    folders = row_folders(own.parse, own.flags, tables)
    chosen = list(itertools.chain(*(tables[table] for table in own.tables)))
    for name, _, flags in chosen:
        if flags is not None:
            trained[name] = [training(own, args, columns, folders[name], flags, seed) for seed in own.seeds]
    for flag in sorted(own.given & {word for _, _, flags in chosen for word in flags or ()}):
        print(f"{flag}: rows that set it keep their own value")
    every = [job for seed in zip(*trained.values(), strict=True) for job in seed]
    if not own.show:
        jobs.run(list(preparing(own, args, every, classifier)), own)
        jobs.run(every, own)
        paths = list(dict.fromkeys(job.path for job in every if own.dry_run or job.measured()))
        jobs.run(list(probing(own, args, probes, classifier, paths)), own)
    if own.dry_run:
        return
    for table in own.tables:
        report(own, args, table, tables[table], columns, trained)
    print("\nFirst the paper's numbers, then ours. Compare the order of the rows, not their values.")
    print(NOTES[own.method])
    found = (jobs.read_results(job.path, args.data).get("perceptual") for job in every)
    if images := next(filter(None, found), None):
        print(f"of the images themselves: top-1 {images['originals_top1']:.1f}, top-5 {images['originals_top5']:.1f}")
        print(f"recoveries: {own.out}/reconstructions.png")


if __name__ == "__main__":
    main()
