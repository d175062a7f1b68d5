import json
import math
import types

import pytest
import torch
import torch.nn.functional as F
from helpers import check_two_processes, part, write_images
from torch import nn

import backbones
import checkpoints
import common
import cpc
import data
import runs
import shapes

GRID = ["--size", "16", "--patch", "4", "--stride", "3", "--steps", "2", "--context-width", "16"]  # 5 x 5, skip 1


def tiny(*flags, seed=0):
    args = cpc.parse_args([*GRID, *flags])
    torch.manual_seed(seed)
    return cpc.CPC(backbones.build(args.arch, args.patch), args)


def images(n, size=16, seed=0):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


V = pytest.mark.parametrize("flags", [["--v", "1"], ["--v", "2"]], ids=["v1", "v2"])

# ============ the grid ============


@pytest.mark.parametrize(
    ("size", "v", "patch", "stride"),
    [(256, 1, 64, 32), (96, 1, 24, 12), (64, 1, 16, 8), (32, 1, 8, 4), (260, 2, 80, 36), (96, 2, 36, 12),
     (64, 2, 24, 8), (32, 2, 12, 4)],
)  # fmt: skip
def test_geometry(size, v, patch, stride):
    assert cpc.layout(size, v) == (patch, stride)
    assert cpc.rows_of(size, patch, stride) == (7 if v == 1 else 6)
    args = cpc.parse_args(["--data", "imagenet", "--v", str(v), "--size", str(size), "--border", "0"])
    assert (args.patch, args.stride, args.skip) == (patch, stride, v)  # row i + 2 or i + 3 is the first
    assert args.skip * stride < patch <= (args.skip + 1) * stride  # without a common pixel, and no row is wasted


@pytest.mark.parametrize(
    ("size", "patch", "stride", "border"), [(32, 8, 4, 0), (32, 8, 6, 1), (96, 24, 12, 1), (64, 24, 8, 3)]
)
def test_patches_come_from_where_they_should(size, patch, stride, border):
    row, column = torch.meshgrid(2 * [torch.arange(float(size))], indexing="ij")
    x = torch.stack([torch.stack([row, column, torch.full_like(row, b)]) for b in range(3)])
    rows = cpc.rows_of(size, patch, stride)
    shift = torch.randint(2 * border + 1, (3, rows**2, 2), generator=torch.Generator().manual_seed(0))
    patches = cpc.cut_grid(x, shift, patch, stride, border).view(
        3, rows, rows, 3, patch - 2 * border, patch - 2 * border
    )
    shift = shift.view(3, rows, rows, 2)
    for b in range(3):
        for i in range(rows):
            for j in range(rows):
                top, left = i * stride + shift[b, i, j, 0], j * stride + shift[b, i, j, 1]
                assert torch.equal(
                    patches[b, i, j], x[b, :, top : top + patch - 2 * border, left : left + patch - 2 * border]
                )


def test_each_process_and_each_pass_draws_patches_of_its_own(monkeypatch):
    model, x, rank = tiny("--v", "1", "--patch", "8", "--stride", "4", "--steps", "1", "--border", "2"), images(4), 0
    alone = model.patches(x, (0,))
    group = types.SimpleNamespace(is_initialized=lambda: True, get_rank=lambda: rank)
    monkeypatch.setattr(common, "dist", group)
    assert torch.equal(model.patches(x, (0,)), alone) and not torch.equal(model.patches(x, (1,)), alone)
    rank = 1
    assert not torch.equal(model.patches(x, (0,)), alone) and torch.equal(
        model.patches(x, (0,)), model.patches(x, (0,))
    )


def test_borders_are_gray_in_training_and_windows_stay_within_their_patches():
    x = images(16) * 0.5 + 0.5  # no pixel is mid-gray, which is 0
    model = tiny("--v", "1", "--patch", "8", "--stride", "4", "--steps", "1", "--border", "2", "--patch-jitter", "0")
    seen = model.patches(x, (0,)).view(16, 9, 3, 8, 8)
    inner = seen[..., 2:6, 2:6]
    assert (inner > 0).all() and ((seen != 0).sum((2, 3, 4)) == 3 * 4 * 4).all()
    whole = model.eval().patches(x, (0,)).view(16, 9, 3, 8, 8)
    windows = whole.unfold(3, 4, 1).unfold(4, 4, 1)  # [16, 9, 3, 5, 5, 4, 4]
    found = (windows == inner[:, :, :, None, None]).all(-1).all(-1).all(2)  # [16, 9, 5, 5]
    assert (found.sum((2, 3)) == 1).all() and found.any(0).any(0).all()  # at one place each, and all places occur
    for i, (top, left) in enumerate((r, c) for r in (0, 4, 8) for c in (0, 4, 8)):
        assert torch.equal(whole[:, i], 2 * x[:, :, top : top + 8, left : left + 8] - 1)


def test_each_patch_is_changed_by_itself_in_training_only():
    x = images(1)[:, :, :1, :1].expand(6, 3, 16, 16)  # one color
    model = tiny("--v", "2", "--patch-jitter", "1", "--patch-gray", "0")
    colors = lambda key: model.patches(x, (key,)).mean((2, 3))
    assert len(colors(0).unique(dim=0)) == 6 * 25
    assert torch.equal(colors(0), colors(0)) and not torch.equal(colors(0), colors(1))
    share = lambda p: (
        (tiny("--patch-jitter", "0", "--patch-gray", p).patches(x, (0,)).std(1).amax((1, 2)) < 1e-5).float().mean()
    )
    assert share("1") == 1 and share("0") == 0 and 0.1 < share("0.25") < 0.4
    assert torch.equal(
        model.eval().patches(x, (0,)), data.normalize(x[:1, :, :4, :4].repeat(150, 1, 1, 1), *2 * [data.HALF])
    )


# ============ the loss ============


def test_loss_equals_a_naive_loop_and_known_values():
    g = torch.Generator().manual_seed(0)
    p, targets, labels = (
        torch.randn(6, 5, generator=g),
        torch.randn(9, 5, generator=g),
        torch.tensor([0, 8, 3, 3, 1, 7]),
    )
    loss, right = cpc.info_nce_loss(p, targets, labels)
    naive, hits = 0.0, 0
    for a, own in zip(p, labels.tolist(), strict=True):
        scores = [math.exp(a @ t) for t in targets]
        naive -= math.log(scores[own] / sum(scores)) / 6  # eq. 4
        hits += scores[own] == max(scores)
    assert loss.item() == pytest.approx(naive, rel=1e-5) and right.item() == pytest.approx(hits / 6)
    assert cpc.info_nce_loss(0 * p, targets, labels)[0].item() == pytest.approx(math.log(9))
    assert cpc.info_nce_loss(50 * torch.eye(9), torch.eye(9), torch.arange(9))[0] < 1e-5


TO_GRID = {  # quarter turns: place (i, j) of the turned grid of G rows -> place in the grid, and where rows to come lie
    0: (lambda i, j, G: (i, j), (1, 0)),  # down
    1: (lambda i, j, G: (j, G - 1 - i), (0, -1)),  # to the left
    2: (lambda i, j, G: (G - 1 - i, G - 1 - j), (-1, 0)),  # up
    3: (lambda i, j, G: (G - 1 - j, i), (0, 1)),  # to the right
}


@pytest.mark.parametrize("flags", [["--v", "1"], ["--v", "2"], ["--directions", "2", "--skip", "0", "--steps", "3"]])
def test_forward_equals_loops_over_images_places_steps_and_directions(flags):
    model, x, G = tiny(*flags).eval(), images(3), 5
    with torch.no_grad():
        loss = model([x]).item()
        z = model.f(torch.cat([2 * x[b : b + 1, :, 3 * i : 3 * i + 4, 3 * j : 3 * j + 4] - 1
                               for b in range(3) for i in range(G) for j in range(G)]))  # fmt: skip
        t = model.target(z)
        z, means, hits = z.view(3, G, G, -1).permute(0, 3, 1, 2), [], []
        for turn, W in zip(model.turns, model.W, strict=True):
            back, (down, right) = TO_GRID[turn]
            turned = torch.stack([torch.stack([z[(..., *back(i, j, G))] for j in range(G)], 2) for i in range(G)], 2)
            c, w = model.g(turned), W.weight[:, :, 0, 0].view(model.steps, -1, W.in_channels)
            for k in range(model.steps):
                terms, ahead = [], 1 + model.skip + k
                for b in range(3):
                    for i in range(G - ahead):
                        for j in range(G):
                            row, column = back(i, j, G)
                            row, column = row + ahead * down, column + ahead * right
                            scores = 0.1 * t @ (w[k] @ c[b, :, i, j])  # of all 75 patches
                            own = G * G * b + G * row + column
                            terms.append((scores.logsumexp(0) - scores[own]).item())
                            hits.append((scores.argmax() == own).item())
                means.append(sum(terms) / len(terms))
    assert len(means) == len(model.turns) * model.steps
    assert loss == pytest.approx(sum(means) / len(means), abs=1e-5)
    assert model.figures["bound"].item() == pytest.approx(math.log(75) - loss, abs=1e-5)


@pytest.mark.parametrize("size", [16, 32])
@V
def test_the_first_loss_is_the_logarithm_of_all_candidates(flags, size):
    grid = [] if size == 16 else ["--size", "32", "--patch", "8", "--stride", "4"]
    x = shapes.draw_shapes(16)[0][:, :, :size, :size] / 255
    with torch.no_grad():
        loss = tiny(*flags, *grid)([x]).item()
    assert loss == pytest.approx(math.log(16 * (25 if size == 16 else 49)), rel=0.01)


@V
def test_the_loss_falls(flags):
    model, x, losses = tiny(*flags), shapes.draw_shapes(8)[0][:, :, 8:24, 8:24] / 255, []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        loss = model([x])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < losses[0] - 0.5
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


# ============ nothing is seen of what is predicted ============


@pytest.mark.parametrize("context", cpc.CONTEXTS)
def test_a_context_depends_on_no_row_below_it(context):
    torch.manual_seed(0)
    g = cpc.CONTEXTS[context](6, 8)
    z = torch.randn(1, 6, 7, 7, requires_grad=True)
    c = g(z)
    for i in range(7):
        for j in range(7):
            (grad,) = torch.autograd.grad(c[0, :, i, j].square().sum(), z, retain_graph=True)
            by_row = grad.abs().sum((0, 1, 3))
            assert (by_row[i + 1 :] == 0).all() and (by_row[max(0, i - 3) : i + 1] > 0).all()
            seen = grad.abs().sum((0, 1))[i] > 0  # of its own row: four or more to either side
            assert all(seen[k] for k in range(max(0, j - 4), min(7, j + 5)))


@pytest.mark.parametrize("context", cpc.CONTEXTS)
def test_no_pixel_of_a_target_reaches_its_prediction(context):
    """In all four directions; and with --skip 0 one does, by the overlap."""
    for skip, leaks in ((1, False), (0, True)):
        model = tiny("--context", context, "--directions", "4", "--skip", str(skip)).eval()
        for m in (*model.W, model.g):  # nothing is hidden by a dead ReLU
            [nn.init.normal_(p, std=0.3) for p in m.parameters()]
        x = images(1).requires_grad_()
        z = model.f(model.patches(x, (0,))).view(1, 25, -1)
        found = model.predictions(z.transpose(1, 2).unflatten(2, (5, -1)))
        assert len(found) == 8
        for turn, (p, place) in zip([0, 0, 1, 1, 2, 2, 3, 3], found, strict=True):
            down, right = TO_GRID[turn][1]
            reached = []
            for n, to in list(enumerate(place.tolist()))[::3]:
                (grad,) = torch.autograd.grad(p[0, n].square().sum(), x, retain_graph=True)
                row, column = 3 * (to // 5), 3 * (to % 5)
                reached.append(grad[0, :, row : row + 4, column : column + 4].abs().sum().item())
                pixels = grad[0].abs().sum(0)
                before, behind = {  # rows or columns of pixels that come before the target, and from it on
                    (1, 0): (pixels[:row], pixels[row:]), (-1, 0): (pixels[row + 4 :], pixels[: row + 4]),
                    (0, 1): (pixels[:, :column], pixels[:, column:]),
                    (0, -1): (pixels[:, column + 4 :], pixels[:, : column + 4]),
                }[down, right]  # fmt: skip
                assert before.sum() > 0 and (leaks or behind.abs().max() == 0)
            assert (max(reached) > 0) == (leaks and p is found[2 * turn][0])  # of the nearest row only


def test_four_directions_are_four_tasks():
    one, two, four = (tiny("--directions", n).eval() for n in ("1", "2", "4"))
    assert [m.turns for m in (one, two, four)] == [(0,), (0, 2), (0, 1, 2, 3)]
    assert len({id(W.weight) for W in four.W}) == 4
    z = torch.randn(2, four.f.dim, 5, 5)
    for W in four.W:
        W.weight.data.copy_(four.W[0].weight)
    found = four.predictions(z)
    for turn in range(4):  # with equal weights a direction of z is the first direction of z turned
        for k in range(2):
            p, place = found[2 * turn + k]
            q, below = four.predictions(z.rot90(turn, (2, 3)))[k]
            assert torch.allclose(p, q, atol=1e-5) and not (turn and torch.allclose(p, found[k][0], atol=1e-3))
            assert torch.equal(place, torch.arange(25).view(5, 5).rot90(turn).flatten()[below])
    assert [sorted(place.tolist()) for _, place in found[::2]] == [
        list(range(10, 25)), [5 * r + c for r in range(5) for c in range(3)],
        list(range(15)), [5 * r + c for r in range(5) for c in range(2, 5)],
    ]  # fmt: skip


# ============ the encoder ============


@pytest.mark.parametrize(
    "name", ["resnet10_16_ln", "resnet10_16_nobn_s4", "resnet14v2_k1_ln_s8", "resnet14v2_k1_minus_nobn_s8"]
)
def test_features_of_a_patch_do_not_depend_on_the_others(name):
    torch.manual_seed(0)
    f, x = backbones.build(name, 8).train(), torch.randn(6, 3, 8, 8)
    for p in f.parameters():
        if p.abs().sum() == 0:  # what _nobn begins with
            nn.init.normal_(p, std=0.05)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in f.modules())
    with torch.no_grad():
        assert torch.allclose(f(x), torch.cat([f(x[i : i + 1]) for i in range(6)]), atol=1e-4)
    assert "dim" in vars(f) and f.taps(x)["pre_logits"].shape == (6, f.dim)
    plain = backbones.build(name.replace("_ln", "").replace("_nobn", ""), 8)
    assert f.dim == plain.dim and backbones.describe(f, name).startswith(name)
    convs = lambda net: [m.weight.shape for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert convs(f) == convs(plain)


def test_tiny_patches_have_gradients_in_bf16():
    """Where a stride meets a map of one pixel, torch leaves the outer weights' gradients undefined on CPUs with
    bf16."""
    torch.manual_seed(0)
    f, x = backbones.build("resnet10_16_ln", 8), torch.randn(64, 3, 8, 8)
    assert [c.stride for c in (f.conv1, f.layer2[0].conv1, f.layer3[0].conv1, f.layer4[0].conv1)] == [(2, 2)] * 3 + [
        (1, 1)
    ]
    for _ in range(3):  # what is undefined is sometimes 0
        with torch.autocast("cpu", torch.bfloat16):
            f(x).float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in f.parameters())
    outer = f.layer4[0].conv1.weight.grad.clone()
    outer[:, :, 1, 1] = 0
    assert (outer == 0).all()  # padding


def test_without_norm_units_begin_as_their_skip_connection_and_learn():
    torch.manual_seed(0)
    for name, channels in (("resnet10_16_nobn", 16), ("resnet26v2_k1_nobn_s8", 64), ("resnet50_nobn", 256)):
        unit, x = backbones.build(name, 32).layer1[-1], torch.randn(2, channels, 4, 4)
        # Of v2 negative values, too: the ReLU within is not in the way.
        assert torch.equal(unit(x.clone()), x if "v2" in name else x.relu())
    f = backbones.build("resnet10_16_nobn", 8)
    x, optimizer = torch.randn(16, 3, 8, 8), torch.optim.AdamW(f.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (f(x) - 1).square().mean().backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in f.parameters())


@pytest.mark.parametrize(
    ("name", "words"),
    [("vgg11_bn_ln", "did you mean"), ("revnet14_k1_nobn", "did you mean"), ("resnet18_s8_ln", "did you mean"),
     ("resnet18_ln_ln", "did you mean"), ("resnet18_nobm", "did you mean")],
)  # fmt: skip
def test_names_that_have_no_such_form(name, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        backbones.build(name, 32)
    assert stopped.value.code == 2 and words in capsys.readouterr().err


# ============ one process with 2N images, two with N, two passes ============


def batch(n):
    return [images(n)], (3, 5)


def first_version():
    return tiny("--v", "1")


@pytest.mark.parametrize("build", [tiny, first_version])
def test_two_processes_give_the_loss_and_gradients_of_one(build, tmp_path):
    check_two_processes(build, batch, tmp_path, n=8)


def test_an_accumulated_pass_has_only_its_own_candidates():
    whole, parts = tiny().eval(), tiny().eval()
    for k in range(2):
        (parts(*part(batch(8), k, 8)) / 2).backward()
    # The same of all eight images, the candidates of the other half masked out.
    z = whole.f(whole.patches(images(8), (0,))).unflatten(0, (-1, 25))
    t, terms = whole.target(z).flatten(0, 1), []
    half = (torch.arange(200) // 100)[None]  # of candidates
    for p, place in whole.predictions(z.transpose(1, 2).unflatten(2, (5, -1))):
        logits = (0.1 * p.flatten(0, 1) @ t.T).masked_fill(
            half != half.T[::25].repeat_interleave(len(place), 0), -math.inf
        )
        terms.append(F.cross_entropy(logits, (25 * torch.arange(8)[:, None] + place).flatten()))
    torch.stack(terms).mean().backward()
    for p, q in zip(parts.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6, rtol=1e-4)


# ============ whole runs ============


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("pictures"), 70, size=35)


def flags(v, folder, out, *more):
    quick = [
        "--data",
        folder,
        "--recipe",
        "shapes",
        "--batch-size",
        16,
        "--epochs",
        2,
        "--log-every",
        1,
        "--workers",
        0,
    ]
    quick += ["--device", "cpu", "--no-amp", "--probes", "knn", "--clip", 0.5]
    return [str(word) for word in ["--version", v, *GRID, *quick, "--out", out, *more]]


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    """{v: its run folder}."""
    folder = tmp_path_factory.mktemp("runs")
    for v in (1, 2):
        cpc.main(flags(v, pictures, folder / f"v{v}"))
    return {v: folder / f"v{v}" for v in (1, 2)}


def test_a_run_writes_what_it_promises(finished):
    for out in finished.values():
        assert {"checkpoint.pt", "backbone.pt", "metrics.jsonl", "evaluate.json", "views.png"} <= {
            p.name for p in out.iterdir()
        }
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert "knn20" in lines[0] and {"loss", "bound", "right", "feature_std"} <= set(lines[1])
        assert lines[1]["bound"] == pytest.approx(math.log(16 * 25) - lines[1]["loss"], abs=1e-4)
        assert lines[1]["loss"] == pytest.approx(math.log(16 * 25), rel=0.01)  # of the random network
        found = runs.load(out / "checkpoint.pt")
        assert found["result"].startswith("cpc ") and "knn" in found["result"] and str(out) in found["result"]
        model = tiny("--v", out.name[1])
        assert set(found["model"]) == set(model.state_dict())
        model.load_state_dict(found["model"])
        assert len(found["optimizer"]["state"]) == len(list(model.parameters()))  # nothing is left out of training


@pytest.mark.parametrize("v", [1, 2])
def test_the_export_gives_the_mean_over_the_grid(v, finished):
    backbone, preprocess, about, _ = checkpoints.open_backbone(str(finished[v]), None, 0, 0)
    assert isinstance(backbone, checkpoints.InputAdapter) and about["built_for"] == 4 and preprocess["size"] == 16
    assert preprocess["sees"] == {"patch": 4, "stride": 3, "gray": v == 1}
    model, x = tiny("--v", str(v)).eval(), images(3)
    model.load_state_dict(runs.load(finished[v] / "checkpoint.pt")["model"])
    if v == 1:  # trained on gray images, and shown nothing else
        x[:] = (x * torch.tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    with torch.no_grad():
        patches = [x[:, :, r : r + 4, c : c + 4] for r in range(0, 13, 3) for c in range(0, 13, 3)]
        wanted = torch.stack([model.f(2 * p - 1) for p in patches]).mean(0)
        got = backbone.eval()(2 * images(3) - 1)
        assert torch.allclose(got, wanted, atol=1e-4)
        assert torch.allclose(model.f(model.patches(x, (0,))).view(3, 25, -1).mean(1), wanted, atol=1e-5)
    taps = backbone.taps(2 * images(3) - 1)
    assert taps["pre_logits"].shape == (3, backbone.dim) and taps["root"].shape[0] == 3


def test_images_of_another_size_are_refused(finished, capsys):
    found, f = runs.load(finished[2] / "backbone.pt"), backbones.build("resnet10_16_ln", 4)
    with pytest.raises(SystemExit) as stopped:
        checkpoints.as_trained(f, found["preprocess"] | {"size": 16}, 32)
    assert stopped.value.code == 2 and "images of 32 px" in capsys.readouterr().err


# ============ recipes and flags ============


def test_versions_differ_as_published():
    one, two = (cpc.parse_args(["--data", "imagenet", *v]) for v in (["--v", "1"], []))
    assert (one.size, one.patch, one.stride, one.steps, one.skip, one.border) == (256, 64, 32, 5, 1, 2)
    assert (two.size, two.patch, two.stride, two.steps, two.skip, two.border) == (260, 80, 36, 1, 2, 0)
    assert (one.context, one.directions, one.target_dim) == ("pixelcnn", 1, 0)
    assert (two.context, two.directions, two.target_dim, two.clip) == ("rows", 4, 64, 0.01)
    assert one.lr * 512 / 256 == pytest.approx(2e-4) and two.lr * 512 / 256 == pytest.approx(4e-4)
    assert [cpc.recipe_of("imagenet", v)["views"][0].get("gray", 0) for v in (1, 2)] == [1, 0]
    for data_set in ("shapes", "cifar10", "imagenet"):
        for v, suffix in ((1, "_nobn"), (2, "_ln")):
            args = cpc.parse_args(["--data", data_set, "--v", str(v)])
            assert args.arch.endswith(suffix) and args.v == v
            assert cpc.rows_of(args.size, args.patch, args.stride) > args.skip + args.steps


def test_dry_run_says_what_would_be_done(pictures, tmp_path, capsys):
    cpc.main(flags(2, pictures, tmp_path / "run", "--dry-run", "--batch-size", 64))
    out = capsys.readouterr().out
    assert "v2: 5 x 5 patches of 4 px, stride 3; predicts 2 to 3 rows ahead in 4 directions" in out
    assert f"{4 * (15 + 10) * 64} predictions" in out and f"ln(N) = {math.log(64 * 25):.2f}" in out
    assert not (tmp_path / "run").exists()
