import pytest
import torch
import torch.nn.functional as F

import data
import logistic

PENALTIES = (torch.logspace(-6, 5, 23) / 300).tolist()


def features(kind, n=300, d=40, classes=6):
    """Overlapping clusters; the same with dimensions of very different scale, and with a spread that is small beside
    the mean; separable ones."""
    g = data.generator("logistic", kind)
    y = torch.arange(n) % classes
    x = torch.randn(classes, d, generator=g)[y] + (0.3 if kind == "separable" else 4) * torch.randn(n, d, generator=g)
    if kind == "uneven":
        x = x @ torch.randn(d, d, generator=g) * torch.logspace(0, -3, d) + 3
    return (1 + 1e-3 * x if kind == "collapsed" else x), y


def above_minimum(w, b, x, y, penalty):
    """(the loss, how far it is above its minimum) in fp64, the latter by Newton: g H^-1 g / 2."""
    at, x, shape = torch.cat([w, b[None]]).double().flatten(), x.double(), (len(w) + 1, w.shape[1])

    def loss(at):
        *w, b = at.view(shape)
        return F.cross_entropy(x @ torch.stack(w) + b, y) + penalty / 2 * torch.stack(w).square().sum()

    g, h = torch.func.grad(loss)(at), torch.func.hessian(loss)(at)
    return loss(at).item(), (g @ torch.linalg.lstsq(h, g, driver="gelsd").solution / 2).item()


@pytest.mark.parametrize("kind", ["even", "uneven", "collapsed", "separable"])
def test_every_penalty_has_its_minimum(kind):
    x, y = features(kind)
    w, b = logistic.fit(x, y, 6, PENALTIES)
    assert w.shape == (23, 40, 6) and b.shape == (23, 6)
    for i in range(0, 23, 2):
        loss, above = above_minimum(w[i], b[i], x, y, PENALTIES[i])
        assert 0 <= above < 1e-5 * loss + 1e-6  # near 0, of separable classes, digits are of no use


def test_problems_do_not_know_of_each_other():
    x, y = features("even")
    w, b = logistic.fit(x, y, 6, PENALTIES)
    few, their = logistic.fit(x, y, 6, PENALTIES[3::7])
    assert torch.allclose(few, w[3::7], atol=1e-3) and torch.allclose(their, b[3::7], atol=1e-3)
    parts, _ = logistic.fit(x, y, 6, PENALTIES, most=5 * 300 * 6)  # five at a time
    assert torch.allclose(parts, w, atol=1e-3)


def test_each_problem_may_have_labels_of_its_own():
    x, y = features("even")
    labels = torch.stack([(y == c).long() for c in range(6)])
    w, b = logistic.fit(x, labels, 2, [1e-3] * 6)
    for c in range(6):
        alone, bias = logistic.fit(x, labels[c], 2, [1e-3])
        assert torch.allclose(w[c], alone[0], atol=1e-4) and torch.allclose(b[c], bias[0], atol=1e-4)
    assert (w.sum(2).abs() < 1e-4).all()  # of two classes one is the other's mirror image


def test_features_that_tell_nothing_leave_the_shares_of_the_classes():
    y = torch.arange(90) % 3 % 2  # two thirds are 0
    w, b = logistic.fit(torch.ones(90, 5), y, 2, [1e-3, 1.0])
    assert (w.abs() < 1e-3).all() and torch.allclose(b.softmax(1), torch.tensor([2 / 3, 1 / 3]), atol=1e-3)


def test_a_class_without_images_is_never_chosen():
    x, y = features("even")
    w, b = logistic.fit(x, y, 8, [1e-3])
    assert (x @ w[0] + b[0]).argmax(1).max() < 6
