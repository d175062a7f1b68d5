"""What a network looks at: neighbors, gradients, localization, swap."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch
from helpers import command, write_images
from PIL import Image
from torch import nn
from torchvision.utils import save_image

import backbones
import data
import evaluate
import runs
import saliency
import sets
from analysis import diagnose, pictures

CPU = torch.device("cpu")
PLAIN = {"mean": (0, 0, 0), "std": (1, 1, 1), "size": 16, "interpolation": "bilinear"}


class Reads(nn.Module):
    """A backbone of three features: `what` of images [B, 3, H, W] -> [B, 3]."""

    dim = 3

    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        return self.what(x)


def model(backbone, train=None, test=None, size=16, name=""):
    """What the probes get of a backbone whose three features are the scores of the three classes."""
    head = nn.Linear(3, 3)
    head.load_state_dict({"weight": torch.eye(3), "bias": torch.zeros(3)})
    preprocess = PLAIN | {"size": size}
    pairs = [s and evaluate.extract(backbone, s, preprocess, CPU) for s in (train, test)]
    net = nn.Sequential(backbone, head)
    return SimpleNamespace(name=name, net=net, preprocess=preprocess, train=pairs[0], test=pairs[1])


def two_colors(n=90, seed=0):
    """Class c has a square object in channel c, at a random place, on a ground in channel c + 1; masks say where."""
    g = torch.Generator().manual_seed(seed)
    y, masks = torch.arange(n) % 3, torch.zeros(n, 16, 16, dtype=torch.uint8)
    images = torch.full((n, 3, 16, 16), 20, dtype=torch.uint8)
    for i, (top, left) in enumerate(torch.randint(2, 7, (n, 2), generator=g).tolist()):
        masks[i, top : top + 8, left : left + 8] = 1
        images[i, (y[i] + 1) % 3] = 200
        images[i, :, top : top + 8, left : left + 8] = 20
        images[i, y[i], top : top + 8, left : left + 8] = 255
    return sets.Images("two colors", images, y, ["red", "green", "blue"], masks)


object_reader = Reads(lambda x: x[:, :, 7:9, 7:9].mean((2, 3)))  # every object covers the center
ground_reader = Reads(lambda x: x[:, :, :1, :1].mean((2, 3)).roll(-1, 1))  # no object covers the corner


# ============ gradients ============


def test_gradients_of_a_linear_net_are_its_weights():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 5))
    x, y = torch.randn(4, 3, 4, 4), torch.tensor([4, 0, 2, 2])
    expected = net[1].weight[y].view(4, 3, 4, 4)
    assert torch.allclose(saliency.pixel_gradients(net, x, y), expected)
    assert torch.allclose(saliency.class_gradients(net, x, y), expected.abs().amax(1))


def test_gradients_equal_finite_differences_in_eval_mode_and_within_inference_mode():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Softplus(), nn.Flatten(), nn.Dropout(0.5), nn.LazyLinear(4)
    )
    net(torch.randn(8, 3, 7, 7))  # the running averages of BatchNorm move away from 0 and 1
    x, y = torch.randn(2, 3, 7, 7), torch.tensor([1, 3])
    net[1].running_mean += 1
    with torch.inference_mode():
        maps = saliency.class_gradients(net.requires_grad_(False), x.clone(), y.clone())
    assert maps.shape == (2, 7, 7) and net.training and net[4].training and x.grad is None
    exact = nn.Sequential(*net).double().eval()
    slopes = torch.zeros(2, 3, 7, 7, dtype=torch.double)
    for c, i, j in torch.cartesian_prod(torch.arange(3), torch.arange(7), torch.arange(7)).tolist():
        step = torch.zeros(2, 3, 7, 7, dtype=torch.double)
        step[:, c, i, j] = 1e-5
        change = exact(x.double() + step) - exact(x.double() - step)
        slopes[:, c, i, j] = change.gather(1, y[:, None])[:, 0] / 2e-5
    assert torch.allclose(maps.double(), slopes.abs().amax(1), atol=1e-7) and maps.max() > 0.01


def test_a_fitted_head_is_the_linear_probe():
    g = torch.Generator().manual_seed(0)
    y, test_y = torch.arange(200) % 4, torch.arange(60) % 4
    x, test_x = (3 * torch.eye(4)[t] + torch.randn(len(t), 4, generator=g) for t in (y, test_y))
    result = evaluate.linear_sgd(x, y, test_x, test_y)
    subject = SimpleNamespace(preprocess=PLAIN, backbone=nn.Identity(), features=lambda: [(x, y), (test_x, test_y)])
    fitted = diagnose.Model("", subject, 0)
    head = fitted.net[1]
    assert evaluate.accuracy(head(test_x), test_y)[0].item() == result["top1"] < 100
    assert f"lr {result['lr']:g}, wd {result['weight_decay']:g}" in fitted.protocol
    scale, w, b, _ = evaluate.fit_linear(x, y, 4)
    assert torch.allclose(head(test_x), test_x / scale @ w[0].T + b[0, :, 0], atol=1e-5)


# ============ localization ============


def test_localization_of_networks_that_see_only_the_object_the_ground_or_everything():
    test = two_colors()
    masks = test.masks > 0
    score = lambda what: diagnose.localization(model(Reads(what)), test, masks, CPU)
    on_object = lambda x: (x > 0.9).any(1, keepdim=True)  # objects are brighter than grounds
    r = score(lambda x: (x * on_object(x)).mean((2, 3)))
    assert r["energy"] == pytest.approx(100) and r["pointing"] == 100 and r["images"] == 90
    assert r["area"] == pytest.approx(25)
    partner = diagnose.partners(90, 0)
    shared = (masks & masks[partner]).flatten(1).sum(1) / 64
    assert r["energy_other"] == pytest.approx(100 * shared.mean().item(), abs=1e-3) and 20 < r["energy_other"] < 80
    assert 0 < r["pointing_other"] < 100
    r = score(lambda x: (x * ~on_object(x)).mean((2, 3)))
    assert r["energy"] == 0 and r["pointing"] == 0
    r = score(lambda x: x.mean((2, 3)))
    assert r["energy"] == pytest.approx(r["area"], abs=1e-4) and r["pointing"] == 0  # the first pixel of all alike
    r = score(lambda x: 1e-30 * x.mean((2, 3)))  # squares would be 0
    assert r["energy"] == pytest.approx(r["area"], abs=1e-4)
    weighted = torch.ones(16, 16)
    weighted[:8] = 3  # nine tenths of the squares in the upper half
    r = score(lambda x: (x * weighted).mean((2, 3)))
    by_hand = (masks * weighted**2).sum((1, 2)) / (weighted**2).sum()
    assert r["energy"] == pytest.approx(100 * by_hand.mean().item(), rel=1e-5)


def test_localization_asks_for_the_true_label_and_skips_images_without_label_or_object():
    test = two_colors(6)
    masks = test.masks > 0
    left = torch.zeros(3, 16, 16)
    left[0, 0, 0], left[1, 8, 8], left[2, 8, 8] = 1, 1, 1  # class 0 looks into the corner, the others at the center
    net = model(Reads(lambda x: (x * left).sum((2, 3))))
    assert diagnose.localization(net, test, masks, CPU)["pointing"] == pytest.approx(200 / 3)
    test.labels[0] = -1
    masks[1] = False
    r = diagnose.localization(net, test, masks, CPU, batch_size=3)
    assert r["images"] == 4 and r["pointing"] == 75  # of images 2 to 5, only the fourth is of class 0


def test_masks_are_cut_as_the_images_are(tmp_path):
    """A bright rectangle in wide, tall, and square images: the mask of a network's view is where the view is bright."""
    for i, (h, w) in enumerate([(60, 100), (100, 60), (80, 80), (96, 96)] * 5):
        image = torch.zeros(3, h, w)
        image[:, h // 5 : h // 2, w // 4 : w // 2] = 1
        for kind, scale in (("images", 1), ("masks", 2)):
            path = tmp_path / kind / f"class{i % 2}" / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            mask = tvf_resize(image, (h * scale, w * scale)) if kind == "masks" else image
            save_image(mask, path)
    dataset = sets.load(str(tmp_path / "images"), split="train")
    for size in (48, 96):
        masks = diagnose.object_masks(dataset, size, str(tmp_path / "masks"))
        assert masks.shape == (len(dataset), size, size) and masks.dtype == torch.bool
        x, _ = next(data.batches(dataset, PLAIN | {"size": size}, len(dataset)))
        assert ((x[:, 0] > 0.5) != masks).float().mean() < 0.03  # the edges
        assert 0.05 < masks.float().mean() < 0.2
    both = two_colors(30)
    assert torch.equal(diagnose.object_masks(both, 48), both.masks > 0)


def tvf_resize(image, size):
    return nn.functional.interpolate(image[None], size, mode="nearest")[0]


# ============ swap ============


def test_inpainting_keeps_constants_and_slopes_and_everything_outside_the_hole():
    y, x = torch.meshgrid(torch.linspace(0, 1, 30), torch.linspace(0, 1, 45), indexing="ij")
    images = torch.stack([torch.stack([x, y, (x + y) / 2]), torch.full((3, 30, 45), 0.3), torch.rand(3, 30, 45)])
    masks = torch.zeros(3, 30, 45, dtype=torch.bool)
    masks[:, 5:22, 12:30] = True
    holed = images.where(~masks[:, None], 7.0)  # what is in the hole must not matter
    filled = diagnose.inpaint(holed, masks)
    assert torch.equal(filled.where(~masks[:, None], 0.0), images.where(~masks[:, None], 0.0))
    assert (filled[0] - images[0]).abs().max() < 0.05  # of a slope of 0.6 across the hole
    assert torch.allclose(filled[1], images[1], atol=1e-5)
    assert filled[2].max() <= 1 and filled[2].std() > 0
    assert torch.equal(diagnose.inpaint(images, torch.zeros_like(masks)), images)
    whole = diagnose.inpaint(images[:2], torch.ones(2, 30, 45, dtype=torch.bool))
    assert torch.allclose(whole, torch.tensor(0.5))


def test_partners_are_a_permutation_without_fixed_points():
    for n in (2, 3, 10, 101):
        for seed in range(5):
            p = diagnose.partners(n, seed)
            assert torch.equal(p.sort().values, torch.arange(n)) and not (p == torch.arange(n)).any()
    assert not torch.equal(diagnose.partners(101, 0), diagnose.partners(101, 1))


def test_composites_show_what_their_names_say():
    test = two_colors(6)
    around = nn.functional.max_pool2d(test.masks.float(), 3, 1, 1).byte() - test.masks
    test.images[around[:, None].expand(-1, 3, -1, -1) > 0] = 99  # a soft edge, outside the mask
    (made, y), (more, _) = diagnose.composites(test, test.masks > 0, PLAIN, CPU, torch.arange(6), batch_size=3)
    assert y.tolist() == [0, 1, 2]
    v = {name: (255 * torch.cat([made[name], more[name]])).round().byte() for name in made}
    m = test.masks[:, None] > 0
    assert torch.equal(v["original"], test.images)
    for name in ("swapped", "gray"):
        assert torch.equal(v[name].where(m, torch.tensor(0)), test.images.where(m, torch.tensor(0)))
    ground = lambda labels: test.images[labels, :, 0, 0][:, :, None, None].int()  # each is of one color
    assert ((v["removed"].int() - ground(torch.arange(6))).abs() <= 1).all()
    elsewhere = v["swapped"].where(~m, ground(diagnose.partners(6, 0)).byte().expand_as(v["swapped"]))
    assert ((elsewhere.int() - ground(diagnose.partners(6, 0))).abs() <= 1).all()
    assert ((v["gray"] == 128) | m).all()


def test_swap_tells_readers_of_the_ground_from_readers_of_the_object():
    train, test = two_colors(120, seed=1), two_colors()
    scores = {}
    for reader in (object_reader, ground_reader):
        scores[reader] = diagnose.swap(model(reader, train), test, test.masks > 0, CPU)
    same = 100 * (test.labels == test.labels[diagnose.partners(90, 0)]).float().mean().item()  # by chance
    assert 20 < same < 45
    r = scores[object_reader]
    assert r["original"] == r["swapped"] == r["gray"] == {"knn": 100.0, "linear": 100.0}
    assert r["removed"] == {"knn": 0.0, "linear": 0.0} and r["images"] == 90  # it takes the ground for another class
    r = scores[ground_reader]
    assert r["original"] == r["removed"] == {"knn": 100.0, "linear": 100.0}
    assert r["object"] == 0 and scores[object_reader]["object"] > 60  # ties, two of one class, are not nearer
    assert r["swapped"]["linear"] == pytest.approx(same, abs=1e-3) == r["swapped"]["knn"]
    assert r["gray"]["linear"] == pytest.approx(100 / 3, abs=1e-3)


# ============ pictures ============


def test_queries_are_of_all_classes_labelled_and_chosen_by_the_seed():
    labels = torch.arange(100) % 5
    labels[::7] = -1
    some = diagnose.choose_queries(labels, 10, 0)
    assert sorted(labels[some].tolist()) == labels[some].tolist() == [c for c in range(5) for _ in range(2)]
    assert len(set(some.tolist())) == 10 and torch.equal(some, diagnose.choose_queries(labels, 10, 0))
    assert not torch.equal(some, diagnose.choose_queries(labels, 10, 1))
    assert len(set(labels[diagnose.choose_queries(labels, 3, 0)].tolist())) == 3
    assert len(diagnose.choose_queries(labels[:8], 20, 0)) == (labels[:8] >= 0).sum()


def test_neighbors_of_several_models_side_by_side(monkeypatch):
    train, test, rows = two_colors(30, seed=1), two_colors(9), torch.tensor([4, 2])
    train.labels[3] = -1
    for s in (train, test):  # so that no two images are alike, nor their features
        g = torch.Generator().manual_seed(len(s))
        s.images = s.images // 4 * 3 + torch.randint(40, s.images.shape, dtype=torch.uint8, generator=g)
    some = torch.randn(3, 16 * 16 * 3, generator=torch.Generator().manual_seed(0))
    models = [model(Reads(lambda x: x.flatten(1) @ some.T), train, test, name="a")]
    models.append(model(object_reader, train, test, size=32, name="b"))
    keys, queries = models[0].train[0], models[0].test[0]
    cosines, _ = evaluate.nearest(keys, queries[rows], 21)
    assert -cosines.diff().max() > 1e-5  # so the order is no matter of rounding
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "draw_rows", lambda *args, **kwargs: (args, kwargs))
        (table, headings), frames = diagnose.neighbors(models, train, test, rows, CPU, k=20)
    assert headings == {0: "query", 1: "a", 22: "b"} and frames == {"frames": True}
    size = (3, 32, 32)  # of the larger of them
    for (name, images, captions, marks), row in zip(table, rows.tolist(), strict=True):
        assert name == test.classes[test.labels[row]]
        assert images.shape == (43, *size) and len(captions) == len(marks) == 43
        large = lambda image: tvf_resize(image / 127.5 - 1, (32, 32))
        assert torch.allclose(images[0], large(test.images[row]), atol=1e-6) and captions[0] == f"# {row}"
        found = evaluate.nearest(keys, queries[[row]], 20)[1][0]
        for k, i in enumerate(found.tolist(), 2):
            assert torch.allclose(images[k], large(train.images[i]), atol=1e-6)
            label = train.labels[i].item()
            assert marks[k] == (None if label < 0 else label == test.labels[row].item())
            assert captions[k] == ("" if label < 0 else train.classes[label])
        assert marks[:2] == (None, None) and marks[22] is None and None in marks[2:22] and {True, False} <= set(marks)
        assert marks[23:29] == (True,) * 6  # of the model that reads the object


def test_gradients_picture_has_a_row_for_each_model_and_heat_where_it_looks(monkeypatch):
    train, test, rows = two_colors(30, seed=1), two_colors(9), torch.tensor([4, 2])
    models = [model(object_reader, train, test, name="sees"), model(ground_reader, train, test, name="wrong")]
    models[1].net[1].weight.data = models[1].net[1].weight.data.roll(1, 0)
    monkeypatch.setattr(pictures, "draw_rows", lambda table: table)
    plain, first, second = diagnose.gradients(models, test, rows, CPU)
    assert plain[0] == "image" and plain[2] == ["green", "blue"] and plain[3] is None
    assert torch.allclose(plain[1], test.images[rows] / 127.5 - 1, atol=1e-6)
    assert first[0] == "sees" and first[2] == ["green", "blue"] and first[3] == [True, True]
    assert second[0] == "wrong" and second[2] == ["blue", "red"] and second[3] == [False, False]
    assert (first[1][:, :, 7:9, 7:9] > 0.99).all() and (second[1][:, :, 0, 0] > 0.99).all()  # white
    cold = first[1][:, :, 0, 0]
    assert (cold == cold[:, :1]).all() and (cold < 0.2).all()  # a darker gray
    assert all(not m.net[0].what(torch.zeros(1, 3, 16, 16)).requires_grad for m in models)


# ============ the command ============


def make_run(out, name, size=32):
    out.mkdir()
    torch.manual_seed(len(out.name))
    preprocess = {"mean": data.MEAN, "std": data.STD, "size": size, "interpolation": "bilinear"}
    about = {"method": "byol", "data": str(name), "epoch": 1, "arch": "resnet10_16", "preprocess": preprocess}
    runs.write(out / "backbone.pt", about | {"state_dict": backbones.build("resnet10_16", size).state_dict()})
    return out


ALL = ("--probe", *diagnose.PROBES)


def test_command_draws_and_measures_on_shapes(tmp_path, monkeypatch, capsys):
    run, other = make_run(tmp_path / "run", "shapes"), make_run(tmp_path / "other", "elsewhere")
    fits, fit = [], evaluate.fit_linear
    monkeypatch.setattr(evaluate, "fit_linear", lambda *args, **kwargs: fits.append(args) or fit(*args, **kwargs))
    command(monkeypatch, "analysis.diagnose", run, *ALL, "--beside", other, "--limit", 200)
    out = capsys.readouterr().out
    assert len(fits) == 2  # one for each checkpoint
    words = ("energy", "pointing", "uniform", "TRUE label", "swapped", "removed", "gray", "green frame", "20-NN")
    assert all(word in out for word in words)
    results = json.loads((run / "evaluate.json").read_text())["shapes"]
    r = results["localization"]
    masks = sets.load("shapes", split="test").masks
    assert r["images"] == 2000 and 0 < r["energy"] < 100
    assert r["area"] == pytest.approx(100 * masks.float().mean().item())
    r = results["swap"]
    command(monkeypatch, "evaluate", run, "--probe", "linear", "--limit", 200)
    results = json.loads((run / "evaluate.json").read_text())["shapes"]
    assert set(r) == {"original", "swapped", "removed", "gray", "images", "object"} and r["images"] == 2000
    assert r["original"]["linear"] == pytest.approx(results["linear"]["top1"], abs=0.11)  # the batches differ
    cell, gap, strip = 96, pictures.GAP, pictures.STRIP
    sizes = {"neighbors": (strip + gap + 8 * (cell + gap + strip), 1 + 2 * 4),
             "gradients": (gap + 3 * (cell + gap + strip), 8), "swap": (gap + 4 * (cell + gap + strip), 8)}  # fmt: skip
    for name, (height, columns) in sizes.items():
        with Image.open(run / f"{name}.png") as image:
            assert image.height == height and 20 < image.width - columns * (cell + gap) < 120
    assert f"{run / 'neighbors.png'}" in out and not list(other.glob("*.png"))


def test_command_on_a_folder_with_masks_and_a_random_network(tmp_path, monkeypatch, capsys):
    folder = write_images(tmp_path / "images", 60, classes=3)
    tests = [folder / f"class{c}" / f"{i:03d}.jpg" for i in range(60) for c in [i % 3]]
    for path in tests:
        mask = torch.zeros(1, 40, 40)
        mask[:, 5:25, 10:30] = 1
        (tmp_path / "masks" / path.parent.name).mkdir(parents=True, exist_ok=True)
        save_image(mask, tmp_path / "masks" / path.parent.name / f"{path.stem}.png")
    out = tmp_path / "out"
    out.mkdir()
    flags = ("--data", folder, "--size", 32, "--masks", tmp_path / "masks", "--out", out)
    beside = make_run(tmp_path / "run", "x", size=48)
    command(monkeypatch, "analysis.diagnose", "random:resnet10_16", *ALL, *flags, "--beside", beside)
    assert "6 test images" in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {"neighbors.png", "gradients.png", "swap.png"}
    with Image.open(out / "gradients.png") as image:
        assert image.height == pictures.GAP + 3 * (96 + pictures.GAP + pictures.STRIP)
    run = make_run(tmp_path / "second", folder)
    flags = ("--masks", tmp_path / "masks", "--beside", "random:resnet10_16")
    command(monkeypatch, "analysis.diagnose", run, "--probe", "localization", "gradients", *flags)
    with Image.open(run / "gradients.png") as image:  # a random network of the run's size
        assert image.height == pictures.GAP + 3 * (96 + pictures.GAP + pictures.STRIP)
    (results,) = json.loads((run / "evaluate.json").read_text()).values()
    assert results["localization"]["images"] == 6 and 20 < results["localization"]["area"] < 30  # of 40 px wide images


def test_neighbors_need_no_labels(tmp_path, monkeypatch, capsys):
    folder = write_images(tmp_path / "flat", 30, classes=1)
    run, other = (make_run(tmp_path / name, folder) for name in ("run", "other"))
    seen = []
    monkeypatch.setattr(pictures, "draw_rows", lambda rows, *_, **__: seen.append(rows) or torch.zeros(3, 8, 8))
    monkeypatch.setattr(evaluate, "fit_linear", lambda *_, **__: pytest.fail("nothing to fit without labels"))
    command(monkeypatch, "analysis.diagnose", run, "--probe", "neighbors", "--beside", other)
    out = capsys.readouterr().out
    assert "no labels: left out" in out and (run / "neighbors.png").exists() and len(seen[0]) == 8
    for name, images, captions, marks in seen[0]:
        assert name == "" and len(images) == 1 + 3 + 3  # the query, and three neighbors for each network: no gradients
        assert captions[1:] == ("",) * 6 and marks == (None,) * 7


@pytest.mark.parametrize(
    ("probe", "flags", "words"),
    [
        ("gradients", ("--beside", "nowhere"), "nowhere"),
        ("gradients", ("--out", "nowhere"), "--out nowhere"),
        ("localization", ("--masks", "nowhere"), "nowhere: no such folder"),
        ("localization", ("--data", "FOLDER"), "--masks"),
        ("swap", ("--data", "FOLDER"), "--masks"),
        ("swap", ("--data", "FLAT"), "too few labels"),
        ("gradients", ("--data", "FLAT"), "too few labels"),
        ("localization", ("--limit", "9"), "too few labels"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, capsys, probe, flags, words):
    folders = {
        "FOLDER": lambda: write_images(tmp_path / "images", 60),
        "FLAT": lambda: write_images(tmp_path / "flat", 20, classes=1),
    }
    flags = [folders[flag]() if flag in folders else flag for flag in flags]
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "analysis.diagnose", make_run(tmp_path / "run", "shapes"), "--probe", probe, *flags)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and len(err.splitlines()) == 1


def test_two_images_with_objects_are_needed(refused):
    seeing, none = model(object_reader, two_colors(30)), torch.zeros(4, 16, 16, dtype=torch.bool)
    for dataset, masks in ((two_colors(1), two_colors(1).masks > 0), (two_colors(4), none)):
        for probe in (diagnose.swap, diagnose.localization):
            assert "2 test images with labels" in refused(functools.partial(probe, seeing, dataset, masks, CPU))
