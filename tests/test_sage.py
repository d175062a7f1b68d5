import copy
import json
import os

import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, check_accumulation, check_two_processes, equal, run, write_images
from torch import nn
from torchvision.io import decode_image

import backbones
import byol
import data
import memory
import runs
import sage

SIZE, SIGNED = 32, {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
WEIGHTS = {"d": 1.0, "pixel": 0.1, "maps": 0.1, "semantic": 0.1}
SMALL = ["sage.py", *TINY, "--limit", "48", "--epochs", "1"]  # 3 steps


def views(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(n, 3, SIZE, SIZE, generator=g) * 2 - 1 for _ in range(2)]


def tiny_evaluator(seed=7, preprocess=SIGNED, **more):
    torch.manual_seed(seed)
    h = sage.Evaluator(backbones.build("resnet10_16", SIZE), preprocess, [0, 1, 2], **more)
    h.calibrate(views(32, seed)[0])
    return h


def tiny_model(seed=0, weights=WEIGHTS, **evaluator):
    torch.manual_seed(seed)
    backbone, painter = backbones.build("resnet10_16", SIZE), ()
    if weights["pixel"] or weights["maps"] or weights["semantic"]:
        painter = sage.build_decoder(backbone, SIZE, dim=16, width=32, pool=False)
    h = tiny_evaluator(**evaluator) if weights["maps"] or weights["semantic"] else None
    return sage.SaGe(backbone, 32, 8, weights, *painter, evaluator=h)


# ============ the decoder ============


@pytest.mark.parametrize(("width", "millions"), [(1024, 21.8), (512, 11.3), (256, 8.2)])
def test_decoders_have_the_parameters_of_table_9(width, millions):
    with torch.device("meta"):
        decoder = sage.Decoder(512, width, side=7, doublings=5)
    assert round(sum(p.numel() for p in decoder.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("arch", "size", "side"), [("resnet50", 224, 7), ("resnet18", 96, 3), ("resnet18", 64, 2), ("resnet18", 32, 4),
                               ("resnet10_16", 32, 2), ("squeezenet1_1", 63, 3)],
)  # fmt: skip
def test_images_come_back_in_their_own_size(arch, size, side):
    backbone = backbones.build(arch, size)
    if arch == "squeezenet1_1":  # 63 -> 3 is no power of two
        with pytest.raises(SystemExit):
            sage.build_decoder(backbone, size, 16, 16, pool=False)
        return
    for pool in (False, True):
        bottleneck, decoder = sage.build_decoder(backbone, size, 16, 16, pool)
        channels = backbone.dim if pool else 16
        assert decoder.layers[0].kernel_size == (side, side) and decoder.layers[0].in_channels == channels
        net = sage.Autoencoder(backbone, bottleneck, decoder).eval()
        with torch.no_grad():
            x_ = net(torch.rand(2, 3, size, size) * 2 - 1)
        assert x_.shape == (2, 3, size, size) and x_.abs().max() <= 1 and x_.dtype == torch.float32
        assert net.bottleneck(backbone.stages(torch.zeros(1, 3, size, size))[-1]).shape == (1, channels, 1, 1)


def test_an_image_size_that_the_decoder_cannot_produce(capsys):
    with pytest.raises(SystemExit) as stopped:
        sage.build_decoder(backbones.build("resnet18", 100), 100, 16, 16, pool=False)
    assert stopped.value.code == 2 and "doubles to 128" in capsys.readouterr().err


# ============ the evaluator ============


def test_the_evaluator_sees_what_it_was_trained_on():
    imagenet = {"mean": data.MEAN, "std": data.STD}
    h = tiny_evaluator(preprocess=imagenet)
    x = torch.rand(4, 3, SIZE, SIZE)
    maps, semantic = h(x * 2 - 1)
    expected = h.net.stages(data.normalize(x))
    assert torch.allclose(semantic, expected[-1].mean((2, 3)), atol=1e-4)
    assert [m.shape[-1] for m in maps] == [16, 8, 4]
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(maps, expected, strict=False))


def test_levels_of_a_resnet50_are_the_papers():
    torch.manual_seed(0)
    h = sage.Evaluator(backbones.build("resnet50", 224), SIGNED, sage.RECIPES["imagenet"]["levels"])
    with torch.no_grad():
        maps, semantic = h(torch.zeros(1, 3, 224, 224))
    assert [tuple(m.shape[1:]) for m in maps] == [(512, 28, 28), (1024, 14, 14), (2048, 7, 7)]  # appendix A
    assert semantic.shape == (1, 2048)


def test_calibration_gives_a_random_network_the_statistics_of_images():
    h, x = tiny_evaluator(), views(32, 7)[0]
    with torch.no_grad():
        raw = copy.deepcopy(h.net).train()(x)  # batch statistics
        assert torch.allclose(h(x)[1], raw, atol=0.15 * raw.std().item(), rtol=0.1)
    assert not h.training and all(m.momentum == 0.1 for m in h.modules() if isinstance(m, nn.BatchNorm2d))


def test_a_frozen_evaluator_stays_in_eval_mode_and_one_that_is_not_does_not():
    assert not any(m.training for m in tiny_model().train().h.modules())
    loose = tiny_model(frozen=False).train().h
    assert loose.training and all(p.requires_grad for p in loose.parameters())


# ============ the loss ============


def test_loss_equals_a_naive_one():
    """Eq. 3 and 4 written out: every term a mean over all elements, summed over the two views, each with its own
    recovery."""
    model, xs = tiny_model(), views(6)
    reference = copy.deepcopy(model)
    loss = model(xs)
    f, g, q, h = reference.f, reference.g, reference.q, reference.h
    expected = byol_loss(reference, xs)
    maps = [f.stages(v)[-1] for v in xs]
    pixel = semantic = levels = 0.0
    for x, m in zip(xs, maps, strict=True):
        x_ = reference.decoder(reference.bottleneck(m))
        pixel += ((x - x_) ** 2).mean()
        stages, stages_ = h.net.stages(x), h.net.stages(x_)  # trained on mean = std = 0.5, so fed as they are
        semantic += ((stages[-1].mean((2, 3)) - stages_[-1].mean((2, 3))) ** 2).mean()
        levels += sum(((a - b) ** 2).mean() for a, b in zip(stages[:3], stages_[:3], strict=True))
    expected = expected + 0.1 * pixel + 0.1 * semantic + levels / 30  # the official code's 1/10, 1/10 and 1/30 each
    assert torch.allclose(loss, expected, rtol=1e-4)
    assert model.parts["pixel"].item() == pytest.approx(pixel.item() / 2, rel=1e-4)
    assert q is not None and g is not None


def byol_loss(model, xs):
    z = [model.g(model.f(v)) for v in xs]
    p1, p2 = (F.normalize(model.q(t)) for t in z)
    z1, z2 = (F.normalize(t.detach()) for t in z)  # the target is a copy
    return ((p1 - z2) ** 2).sum(1).mean() + ((p2 - z1) ** 2).sum(1).mean()


@pytest.mark.parametrize("left", ["d", "pixel", "maps", "semantic"])
def test_each_weight_scales_its_own_term(left):
    weights = {k: 1.0 * (k == left) for k in WEIGHTS}
    model, xs = tiny_model(weights=weights), views(6)
    loss = model(xs)
    part = model.parts["l_d" if left == "d" else left] * (1 if left == "d" else 2)
    assert torch.allclose(loss, part, rtol=1e-5) and loss > 0
    loss.backward()
    assert sum(p.grad.abs().sum() for p in model.f.parameters()) > 0  # every term reaches the encoder
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == ({"f", "g", "q"} if left == "d" else {"f", "bottleneck", "decoder"})
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)  # or DDP would wait for it


def test_without_l_g_it_is_exactly_byol():
    torch.manual_seed(3)
    other = byol.BYOL(backbones.build("resnet10_16", SIZE), 32, 8)
    model = tiny_model(3, {"d": 1.0, "pixel": 0.0, "maps": 0.0, "semantic": 0.0})
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, other)]
    for step in range(3):
        losses = []
        for net, optimizer in zip((model, other), optimizers, strict=True):
            loss = net(views(8, step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            net.update_target(0.9)
            losses.append(loss)
        assert torch.equal(*losses)
    assert equal(dict(model.state_dict()), dict(other.state_dict()))


def test_only_what_learns_gets_gradients_and_only_what_should_move_moves():
    model = tiny_model().train()
    still = {k: v.clone() for k, v in model.state_dict().items() if k.startswith("h.")}
    target = [p.clone() for p in model.target.parameters()]
    loss = model(views(8))
    loss.backward()
    assert all(p.grad is None for p in [*model.h.parameters(), *model.target.parameters()])
    learners = nn.ModuleList([model.f, model.g, model.q, model.bottleneck, model.decoder])
    assert all(p.grad is not None for p in learners.parameters())
    assert sum(p.grad.abs().sum() for p in model.bottleneck.parameters()) > 0
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    optimizer.step()
    now = model.state_dict()
    assert all(torch.equal(now[k], v) for k, v in still.items())  # weights and BatchNorm statistics
    assert all(torch.equal(a, b) for a, b in zip(target, model.target.parameters(), strict=True))


def test_nothing_is_encoded_twice_and_originals_build_no_graph():
    model, seen = tiny_model(), []
    for name, net in (("f", model.f), ("target", model.target["f"]), ("h", model.h.net)):
        net.conv1.register_forward_hook(lambda _, x, y, name=name: seen.append((name, len(x[0]), y.requires_grad)))
    model(views(4))
    assert seen == [("f", 4, True)] * 2 + [("target", 4, False)] * 2 + [("h", 8, False), ("h", 8, True)]


@pytest.mark.parametrize("amp", [False, True])
def test_recomputation_changes_no_bit_and_keeps_less(amp):
    kept, grads, models = [], [], []
    for recompute in (False, True):
        model = tiny_model(recompute=recompute)
        with torch.autocast("cpu", enabled=amp):
            loss = model(views(16))
        loss.backward()
        kept.append(memory.bytes_kept(model, [{"size": SIZE}] * 2, 16, amp))
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss})
        models.append(model.state_dict())
    assert equal(*grads) and equal(*models) and len(grads[0]) > 50
    assert kept[1] < 0.75 * kept[0]


def test_an_evaluator_that_learns_is_not_recomputed():
    """Its BatchNorm's averages would see each batch twice."""
    model = tiny_model(frozen=False, recompute=True)
    model(views(4)).backward()
    assert model.h.net.bn1.num_batches_tracked == 3  # calibration, originals, recovered views


def test_target_moves_as_eq_1():
    model = tiny_model()
    before = [p.clone() for p in model.target.parameters()]
    with torch.no_grad():
        for p in model.f.parameters():
            p.add_(1.0)
    model.update_target(0.9)
    online = [*model.f.parameters(), *model.g.parameters()]
    for xi, was, theta in zip(model.target.parameters(), before, online, strict=True):
        assert torch.allclose(xi, 0.9 * was + 0.1 * theta, atol=1e-6)


def test_recovery_improves():
    model = tiny_model(weights={"d": 0.0, "pixel": 1.0, "maps": 0.0, "semantic": 0.0})
    xs = [F.interpolate(torch.rand(16, 3, 2, 2, generator=data.generator(i)) * 2 - 1, (SIZE, SIZE)) for i in range(2)]
    optimizer, mse = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=3e-3), []
    for _ in range(40):
        optimizer.zero_grad()
        model(xs).backward()
        optimizer.step()
        mse.append(model.parts["pixel"].item())
    assert mse[-1] < 0.6 * mse[0] and mse[-1] < 0.33  # noise that no one paints has a variance of a third


def test_recipe_is_the_papers():
    recipe = sage.RECIPES["imagenet"]
    assert recipe["lr"] * 4096 / 256 == pytest.approx(4.8) and recipe["decoder_lr"] * 4096 / 256 == pytest.approx(0.048)
    for name, r in sage.RECIPES.items():
        theirs = byol.RECIPES[name]["views"]
        assert [{**v, **SIGNED} for v in theirs] == r["views"]  # the views are BYOL's, in [-1, 1]


# ============ one process with 2N images, two with N ============


def batch(n):
    return (views(n),)


@pytest.mark.parametrize("sync", [False, True])
def test_two_processes_give_the_loss_and_gradients_of_one(sync, tmp_path):
    rtol = 0.02 if sync else 1e-3  # rounding turns signs in the gradient of |I - I'|, of which the decoder's is the sum
    check_two_processes(tiny_model, batch, tmp_path, atol=1e-5, rtol=rtol, sync=sync)


def test_accumulated_gradients_are_those_of_the_mean():
    check_accumulation(tiny_model, batch, atol=1e-5, rtol=1e-3)


# ============ whole runs ============


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """`python sage.py` with nothing there: stage 1, then stage 2."""
    out = tmp_path_factory.mktemp("unbroken") / "sage"
    printed, _ = run(*SMALL, "--evaluator-epochs", "1", "--out", out)
    return out, printed, out.parent / "byol-shapes-1"


def test_stage_1_is_trained_by_byol_when_there_is_none(unbroken):
    out, printed, evaluator = unbroken
    assert "stage 1" in printed and "byol shapes: knn" in printed
    assert printed.splitlines()[-1].startswith("sage shapes: knn ")
    trained = torch.load(evaluator / "backbone.pt", weights_only=True)
    inside = {
        k.removeprefix("h.net."): v for k, v in runs.load(out / "checkpoint.pt")["model"].items() if "h.net." in k
    }
    assert trained["method"] == "byol" and equal(inside, trained["state_dict"])  # loaded, and still as it was


def test_a_run_writes_what_it_promises(unbroken):
    out = unbroken[0]
    files = {
        "checkpoint.pt",
        "checkpoint.prev.pt",
        "backbone.pt",
        "metrics.jsonl",
        "evaluate.json",
        "reconstructions.png",
    }
    assert files <= set(os.listdir(out))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        recipe = sage.RECIPES["shapes"]
        total = line["l_d"] + 2 * sum(recipe[f"weight_{k}"] * line[k] for k in ("pixel", "maps", "semantic"))
        assert line["loss"] == pytest.approx(total, rel=1e-3)
    assert torch.load(out / "backbone.pt", weights_only=True)["preprocess"]["mean"] == (0.5, 0.5, 0.5)
    about = sage.autoencoder(out)
    weights = runs.load(out / "checkpoint.pt")["model"]
    assert all(torch.equal(v, weights[k]) for k, v in about.state_dict().items()) and not about.training


def test_a_byol_run_of_other_data_is_no_evaluator(unbroken, tmp_path):
    (tmp_path / "byol-shapes-1").symlink_to(unbroken[2])
    _, err = run(*SMALL, "--limit", "64", "--evaluator-epochs", "1", "--out", tmp_path / "sage", code=2)
    assert "--limit 48" in err and "--evaluator" in err and len(err.splitlines()) == 1


def test_a_random_evaluator_is_not_the_encoders_start():
    h, _ = sage.open_evaluator(sage.parse_args(["--seed", "3"]), "random:resnet10_16")
    torch.manual_seed(3)
    assert not torch.equal(h.net.conv1.weight, backbones.build("resnet10_16", 32).conv1.weight)


def test_projector_as_semantic_feature(unbroken, tmp_path):
    args = sage.parse_args(["--semantic", "projector"])
    h, _ = sage.open_evaluator(args, str(unbroken[2]))
    weights = runs.load(unbroken[2] / "checkpoint.pt")["model"]
    assert equal(dict(h.projector.state_dict()), {k[2:]: v for k, v in weights.items() if k.startswith("g.")})
    assert h(torch.zeros(2, 3, 32, 32))[1].shape == (2, args.dim) and not any(p.requires_grad for p in h.parameters())


def test_evaluate_reads_what_a_run_recovers(unbroken):
    out, _, evaluator = unbroken
    (out / "reconstructions.png").unlink()
    printed, _ = run("analysis/reconstruct.py", out, "--beside", out)
    assert "reconstructions.png" in printed and decode_image(str(out / "reconstructions.png")).shape[0] == 3
    _, err = run("analysis/reconstruct.py", evaluator, code=2)
    assert "byol does not make images" in err


def quick(tmp_path, *flags, out="run"):
    """sage.main in this process, of one epoch with a few images; returns the run folder."""
    images = write_images(tmp_path / "images", 32)
    flags = ["--data", str(images), "--recipe", "shapes", "--workers", "0", "--limit", "16", "--epochs", "1", *flags]
    sage.main([*TINY, *flags, "--out", str(tmp_path / out)])
    assert runs.load(tmp_path / out / "checkpoint.pt")["result"]
    return tmp_path / out


def test_a_frozen_decoder_stays_as_it_is_drawn(tmp_path):
    random, recipe = ["--evaluator", "random:resnet10_16"], sage.RECIPES["shapes"]
    learns = quick(tmp_path, *random, "--warmup-epochs", "0", out="learns")
    frozen = quick(tmp_path, *random, "--freeze-decoder", out="frozen")
    a, b = (runs.load(out / "checkpoint.pt")["model"]["decoder.layers.0.weight"] for out in (learns, frozen))
    torch.manual_seed(0)
    backbone = backbones.build("resnet10_16", 32)
    drawn = sage.build_decoder(backbone, 32, recipe["bottleneck"], recipe["width"], False)[1].layers[0].weight
    assert torch.equal(b, drawn) and not torch.equal(a, drawn)


@pytest.mark.parametrize(
    "flags",
    [["--pool"], ["--train-evaluator"], ["--checkpoint-activations"], ["--weight-pixel", "0"], ["--weight-d", "0"]],
)
def test_other_forms_run(tmp_path, flags):
    out = quick(tmp_path, "--evaluator", "random:resnet10_16", *flags)
    assert isinstance(sage.autoencoder(out).bottleneck, nn.AdaptiveAvgPool2d) == ("--pool" in flags)


def test_an_evaluator_of_another_architecture_is_trained_beside_the_run(tmp_path):
    quick(tmp_path, "--evaluator", "", "--evaluator-arch", "resnet10_32", "--evaluator-epochs", "1")
    assert runs.load(tmp_path / "byol-images-resnet10_32-1" / "backbone.pt")["arch"] == "resnet10_32"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "rotation"}, "was trained by rotation"),
        ({"method": None}, "was trained by None"),
        ({"preprocess": {**SIGNED, "size": 48, "interpolation": "bilinear"}}, "was trained at 48 px"),
        ({"arch": "resnet18"}, "does not fit the architecture"),
        ({"state_dict": {}}, "does not fit the architecture"),
    ],
)
def test_an_evaluator_that_does_not_fit_is_refused(unbroken, tmp_path, capsys, change, words):
    file = tmp_path / "backbone.pt"
    torch.save(torch.load(unbroken[2] / "backbone.pt", weights_only=True) | change, file)
    with pytest.raises(SystemExit) as stopped:
        sage.open_evaluator(sage.parse_args([]), str(file))
    assert stopped.value.code == 2 and words in capsys.readouterr().err
