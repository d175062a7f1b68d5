"""Schedules, parameter groups and optimizers."""

import functools
import math

import torch


def cosine(step, total, start, end, warmup=0):
    """Linear from 0 to `start` over `warmup` steps, then half a cosine from `start` to `end` at step `total`."""
    if step < warmup:
        return start * step / warmup
    return end + (start - end) * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def rate(step, total, lr, warmup, drop_at):
    """Linear warm-up, then a tenth after each share of the run in `drop_at`, or a cosine to 0 where there is none."""
    if not drop_at or step < warmup:
        return cosine(step, total, lr, 0.0, warmup)
    return lr * 0.1 ** sum(step >= at * total for at in drop_at)


def param_groups(module, weight_decay, **settings):
    """Two groups: weights, with weight decay and LARS adaptation, and all other parameters (biases, norms, class
    tokens, position embeddings), with neither. A weight has two or more dimensions and a name that ends in "weight", as
    in torch's linear, convolution and attention layers. `settings` go into both groups."""
    params = [(name.endswith("weight") and p.ndim >= 2, p) for name, p in module.named_parameters() if p.requires_grad]
    weights, rest = ([p for is_weight, p in params if is_weight == kind] for kind in (True, False))
    weights = {"params": weights, "weight_decay": weight_decay, "adapt": True, **settings}
    return [weights, {"params": rest, "weight_decay": 0.0, "adapt": False, **settings}]


def count(optimizer):
    """How many tensors the optimizer updates, decays and (LARS only) adapts, in words."""
    groups, lars = optimizer.param_groups, isinstance(optimizer, LARS)
    moved, decayed, adapted = (
        sum(len(g["params"]) for g in groups if g[k]) for k in ("params", "weight_decay", "adapt")
    )
    return f"{moved} tensors, {decayed} decayed, {adapted * lars} adapted"


class LARS(torch.optim.Optimizer):
    """LARS (You et al. 2017, https://arxiv.org/abs/1708.03888) as in BYOL's code, the learning rate outside of the
    momentum buffer v:

        u = g + lambda w;  q = eta |w| / |u|;  v <- mu v + q u;  w <- w - lr v

    q = 1 where a norm is 0 and in groups with adapt=False: SGD with momentum, as in torch. inside=True, as in SimCLR's
    code:  v <- mu v + lr q u;  w <- w - v.  The two differ only while the learning rate changes."""

    def __init__(self, params, lr=0.0, weight_decay=0.0, momentum=0.9, eta=1e-3, inside=False):
        self.inside = inside
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, eta=eta, adapt=True))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            w = [p for p in group["params"] if p.grad is not None]
            if not w:
                continue
            u = torch._foreach_add([p.grad for p in w], w, alpha=group["weight_decay"])
            if group["adapt"]:
                w_norm, u_norm = torch.stack(torch._foreach_norm(w)), torch.stack(torch._foreach_norm(u))
                q = torch.where((w_norm > 0) & (u_norm > 0), group["eta"] * w_norm / u_norm, 1.0)
                torch._foreach_mul_(u, list(q.unbind()))
            v = [s["momentum"] if (s := self.state[p]) else s.setdefault("momentum", torch.zeros_like(p)) for p in w]
            torch._foreach_mul_(v, group["momentum"])
            inner, outer = (group["lr"], 1.0) if self.inside else (1.0, group["lr"])
            torch._foreach_add_(v, u, alpha=inner)
            torch._foreach_add_(w, v, alpha=-outer)


def adamw(groups, **settings):
    """torch's, on a GPU in one kernel for all tensors. (Its SGD in one kernel fails where a tensor, once frozen, has no
    momentum yet.)"""
    return torch.optim.AdamW(groups, fused=groups[0]["params"][0].is_cuda or None, **settings)


# What --optimizer chooses from.
OPTIMIZERS = {"lars": LARS, "sgd": functools.partial(torch.optim.SGD, momentum=0.9), "adamw": adamw}
