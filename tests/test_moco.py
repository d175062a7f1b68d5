import copy
import math
import os
import random

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from helpers import TINY, check_accumulation, check_two_processes, run
from torch import nn

import backbones
import data
import moco

SMALL = ["moco.py", *TINY, "--limit", "48", "--epochs", "4", "--queue", "32"]  # 3 steps an epoch, 12 in all


def rows(n, dim=16, seed=0):
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def tiny_model(seed=0, **changed):
    torch.manual_seed(seed)
    backbone = backbones.build("resnet10_16", 16)
    return moco.MoCo(backbone, **{"queue": 32, "dim": 8, "temperature": 0.1, **changed})


def views(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, 16, 16, generator=g) for _ in range(2)]


# ============ the loss ============


def test_loss_equals_a_naive_loop():
    q, k, queue, T = rows(5), rows(5, seed=1), rows(12, seed=2), 0.2
    loss, logits = moco.info_nce(q, k, queue, T)
    naive = 0.0
    for i in range(5):
        own, others = math.exp(q[i] @ k[i] / T), [math.exp(q[i] @ row / T) for row in queue]
        naive -= math.log(own / (own + sum(others))) / 5  # eq. 1
    assert loss.item() == pytest.approx(naive, abs=1e-5)
    assert logits.shape == (5, 13) and torch.allclose(logits[:, 0], (q * k).sum(1) / T)


def test_equal_logits_give_the_logarithm_of_k_plus_1():
    one = rows(1)
    loss, _ = moco.info_nce(one.expand(6, -1), one.expand(6, -1), one.expand(4096, -1), 0.07)
    assert loss.item() == pytest.approx(math.log(4097), abs=1e-4)


def test_the_first_loss_is_that_of_a_queue_of_random_vectors():
    """A cosine of random unit vectors has variance 1 / D; q.k is that of the untrained networks, whose keys are
    alike."""
    model = tiny_model(queue=4096, dim=128, temperature=0.2)
    loss, T = model(views(16)), 0.2
    expected = math.log1p(4096 * math.exp(1 / (2 * 128 * T**2) - model.figures["own_cosine"].item() / T))
    assert loss.item() == pytest.approx(expected, abs=0.1) and loss < math.log(4097)


# ============ queue and key network ============


def test_queue_is_unit_fp32_no_parameter_and_takes_the_place_of_the_oldest():
    model = tiny_model(queue=12)
    before = model.queue.clone()
    assert torch.allclose(before.norm(dim=1), torch.ones(12)) and "queue" not in dict(model.named_parameters())
    with torch.autocast("cpu", torch.bfloat16):
        model(views(4))
    assert torch.equal(model.queue, before)  # the logits are those of the old queue
    keys = model.seen[0]
    model.enqueue()
    assert model.queue.dtype == torch.float32 and torch.allclose(model.queue.norm(dim=1), torch.ones(12), atol=1e-6)
    assert torch.equal(model.queue[:4], keys) and torch.equal(model.queue[4:], before[4:]) and model.pointer == 4
    for seed in range(1, 4):
        model(views(4, seed))
        latest = model.seen[0]
        model.enqueue()
    assert torch.equal(model.queue[:4], latest) and model.pointer == 4  # once around


def test_keys_come_in_the_order_of_the_images_whatever_the_shuffle():
    model = tiny_model().eval()  # eval: an image does not depend on the others
    x = views(16)[0]
    expected = F.normalize(model.key["g"](model.key["f"](x)), dim=1)
    for step in range(3):
        assert torch.allclose(model.keys(x, (0, step)), expected, atol=1e-6)


def test_shuffling_changes_with_what_batchnorm_sees_a_key():
    model, x = tiny_model(bn_splits=4), views(16)[0]
    one, same, other = (copy.deepcopy(model).keys(x, (0, step)) for step in (0, 0, 1))
    assert torch.equal(one, same) and not torch.allclose(one, other, atol=1e-4)


def test_no_gradient_reaches_keys_and_queue():
    model = tiny_model(mlp=True)
    model(views(8)).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.key.parameters())
    assert all(p.grad is not None for p in [*model.f.parameters(), *model.g.parameters()])
    assert not model.queue.requires_grad and not model.seen[0].requires_grad


def test_key_network_is_the_average_of_parameters_only():
    model = tiny_model()
    with torch.no_grad():
        for p in [*model.f.parameters(), *model.g.parameters()]:
            p.add_(1)
    model.f.bn1.running_mean.add_(5)
    old, buffers = [[t.clone() for t in part] for part in (model.key.parameters(), model.key.buffers())]
    model.update_key_network(0.9)
    theta = [*model.f.parameters(), *model.g.parameters()]
    for new, was, q in zip(model.key.parameters(), old, theta, strict=True):
        assert torch.allclose(new, 0.9 * was + 0.1 * q, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(model.key.buffers(), buffers, strict=True))


def test_symmetric_is_the_sum_of_both_directions():
    one, both = tiny_model(), tiny_model(symmetric=True)
    v1, v2 = views(8)
    assert torch.allclose(both.eval()([v1, v2]), one.eval()([v1, v2]) + one([v2, v1]), atol=1e-5)
    both.enqueue()
    assert both.pointer == 16


# ============ BatchNorm in parts ============


def test_split_batchnorm_is_plain_batchnorm_on_each_part():
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(12, 5, 3, 3, generator=g) * 3 + 1).requires_grad_()
    norm, plain = moco.SplitBatchNorm(5, 4), [nn.BatchNorm2d(5) for _ in range(4)]
    y, expected = norm(x), torch.cat([n(part) for n, part in zip(plain, x.chunk(4), strict=True)])
    assert torch.allclose(y, expected, atol=1e-6)
    assert torch.allclose(norm.running_mean, torch.stack([n.running_mean for n in plain]).mean(0), atol=1e-6)
    assert torch.allclose(norm.running_var, torch.stack([n.running_var for n in plain]).mean(0), atol=1e-6)
    grads = [torch.autograd.grad((out * out.cos()).sum(), x, retain_graph=True)[0] for out in (y, expected)]
    assert torch.allclose(*grads, atol=1e-5)
    norm.eval(), plain[0].load_state_dict(norm.state_dict())
    assert torch.allclose(norm(x), plain[0].eval()(x))


def test_a_revnet_that_computes_anew_moves_the_averages_of_a_split_batchnorm_once():
    net = moco.split_batchnorm(backbones.build("revnet14_k0.5", 32), 2)
    net(torch.randn(4, 3, 32, 32)).sum().backward()
    counts = {int(m.num_batches_tracked) for m in net.modules() if isinstance(m, moco.SplitBatchNorm)}
    assert counts == {1}


def test_splitting_leaves_names_and_every_batchnorm_is_split():
    net = backbones.build("resnet10_16", 16)
    names = list(net.state_dict())
    moco.split_batchnorm(net, 2)
    assert list(net.state_dict()) == names
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) > 5 and all(isinstance(m, moco.SplitBatchNorm) for m in norms)


# ============ schedules and recipes ============


def test_rates_are_those_of_the_official_loops():
    cosine = [moco.rate(step, 10, 200, 0.03, 0, "cosine") for step in range(2000)]
    steps = [moco.rate(step, 10, 200, 0.03, 0, "steps") for step in range(2000)]
    for epoch in range(200):
        assert cosine[10 * epoch : 10 * epoch + 10] == [cosine[10 * epoch]] * 10
        assert cosine[10 * epoch] == pytest.approx(0.03 * 0.5 * (1 + math.cos(math.pi * epoch / 200)))
        assert steps[10 * epoch] == pytest.approx(0.03 * (0.1 if epoch >= 120 else 1) * (0.1 if epoch >= 160 else 1))
    assert cosine[0] == 0.03  # no warm-up: the first step counts
    warm = [moco.rate(step, 10, 200, 1.0, 20, "steps") for step in range(21)]
    assert warm == pytest.approx([step / 20 for step in range(20)] + [1.0])


def test_versions_differ_as_published():
    args = {v: moco.parse_args(["--data", "imagenet", "--v", str(v)]) for v in (1, 2)}
    assert [(a.mlp, a.temperature, a.schedule) for a in args.values()] == [
        (False, 0.07, "steps"),
        (True, 0.2, "cosine"),
    ]
    v1, v2 = (moco.recipe_of("imagenet", v)["views"][0] for v in (1, 2))
    assert (v1["jitter_p"], v1["jitter"][3], v1.get("blur", 0)) == (1.0, 0.4, 0)
    assert (v2["jitter_p"], v2["jitter"][3], v2["blur"]) == (0.8, 0.1, 0.5)
    assert moco.parse_args(["--data", "imagenet", "--v", "1", "--temperature", "0.3"]).temperature == 0.3
    assert moco.parse_args(["--data", "cifar10"]).mlp is False  # the demo's


def test_both_heads():
    for mlp, layers in ((False, 1), (True, 2)):
        linears = [m for m in tiny_model(mlp=mlp).g.modules() if isinstance(m, nn.Linear)]
        assert len(linears) == layers and all(m.bias is not None for m in linears)


def test_the_loss_falls():
    model = tiny_model(bn_splits=2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    x = views(16)[0]
    losses = []
    for step in range(30):
        model.update_key_network(0.9)
        loss = model([x, x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(step))], (0, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.enqueue()
        losses.append(loss.item())
    assert min(losses[-5:]) < max(losses[2:8]) - 0.3  # after the queue has filled with keys of this network


# ============ one process and two ============


def batch(n):
    return views(n), (3, 5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_two_processes_give_the_loss_and_gradients_of_one(tmp_path, symmetric):
    check_two_processes(symmetric_model if symmetric else tiny_model, batch, tmp_path)


def symmetric_model():
    return tiny_model(symmetric=True)


def test_accumulated_gradients_are_those_of_the_mean():
    check_accumulation(tiny_model, batch)


def half(rank, port, out):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(updated(slice(rank * 8, rank * 8 + 8)), f"{out}{rank}")
    torch.distributed.destroy_process_group()


def updated(part):
    """Queue and pointer after two updates with the images `part` of 16, in eval mode, and a training pass's keys."""
    model = tiny_model().eval()
    for step in range(2):
        model([v[part] for v in views(16, step)], (0, step))
        model.enqueue()
    return model.queue, model.pointer, model.train().keys(views(16)[0][part], (0, 9))


def test_two_processes_hold_the_queue_of_one(tmp_path):
    mp.start_processes(half, (random.randint(20000, 40000), tmp_path / "rank"), 2, start_method="forkserver")
    one, two = (torch.load(tmp_path / f"rank{rank}") for rank in range(2))
    queue, pointer, _ = updated(slice(16))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])  # the two agree bit for bit
    assert torch.allclose(one[0], queue, atol=1e-6) and torch.equal(one[1], pointer)
    # In train mode each process normalized a random half of all keys: as BatchNorm in two parts of the shuffled batch.
    order = torch.randperm(16, generator=data.generator("shuffle", 0, 9))
    net = tiny_model().key
    halves = torch.cat([F.normalize(net["g"](net["f"](views(16)[0][rows])), dim=1) for rows in order.chunk(2)])
    assert torch.allclose(one[2], halves[order.argsort()], atol=1e-5) and torch.equal(one[2], two[2])


# ============ whole runs ============


def test_every_tensor_decays(tmp_path):
    out, _ = run(*SMALL, "--dry-run", "--out", tmp_path / "run")
    model = tiny_model()
    moved = len([p for p in model.parameters() if p.requires_grad])
    assert f"{moved} tensors, {moved} decayed" in out and not (tmp_path / "run").exists()
