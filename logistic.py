"""Multinomial logistic regression, for many L2 penalties at once."""

import torch


class Problems:
    """P softmax regressions on the same features x [N, d], in coordinates u [P, C, d + 1] in which L-BFGS needs few
    steps: along the principal components of x, each scaled so that no curvature is above 1. The Hessian of the cross-
    entropy of C classes is at most half of the covariance (Boehning 1992), to which the penalty adds its own."""

    def __init__(self, x, y, classes, penalties):
        self.mean, self.y, self.classes = x.mean(0), y.expand(len(penalties), -1)[:, None], classes
        self.x = (
            x - self.mean
        )  # a copy: where the spread is small beside the mean, products of x itself lose its digits
        variances, self.basis = torch.linalg.eigh(self.x.T @ self.x / len(x))
        variances = variances.clamp(min=1e-7 * variances.max() + 1e-12)
        half = torch.cat([variances, x.new_ones(1)]) / 2  # the last one is the bias
        self.decay = penalties.view(-1, 1, 1).expand(-1, 1, x.shape[1]).contiguous()  # [P, 1, d]
        self.scale = (half + torch.cat([self.decay, torch.zeros_like(self.decay[..., :1])], 2)).rsqrt()  # [P, 1, d + 1]

    def pick(self, rows):
        self.y, self.decay, self.scale = (t[rows] for t in (self.y, self.decay, self.scale))

    def weights(self, u, rows=slice(None)):
        """Weights w [P, C, d] along the components, the same in the coordinates of x, and biases b [P, C, 1]."""
        w, b = (u * self.scale[rows]).split([len(self.mean), 1], 2)
        return w, w @ self.basis.T, b

    def loss(self, u, rows=slice(None)):
        """Mean cross-entropy + penalty / 2 |w|^2 [P] in fp64, and its gradient by u."""
        (w, turned, b), true = self.weights(u, rows), self.y[rows]
        p = (turned.flatten(0, 1) @ self.x.T).view(len(u), self.classes, -1).add_(b)  # logits [P, C, N]
        # By the odds against the true class, not by its probability: close to 1 it would have no digits left.
        p.sub_(p.gather(1, true)).clamp_(max=80).exp_().scatter_(1, true, 0)
        odds = p.sum(1, keepdim=True)
        loss = odds[:, 0].log1p().mean(1, dtype=torch.float64)
        p.scatter_(1, true, -odds).div_(1 + odds)  # softmax - one-hot
        decayed = self.decay[rows] * w
        by_w = (p.flatten(0, 1) @ self.x / len(self.x)).view(w.shape) @ self.basis + decayed
        loss += (decayed * w).sum((1, 2), dtype=torch.float64) / 2
        return loss, torch.cat([by_w, p.mean(2, keepdim=True)], 2).mul_(self.scale[rows])


def dot(a, b):
    return (a * b).sum((1, 2))


def times(factors, tensors):
    """Each of P tensors times its own factor."""
    return factors[:, None, None] * tensors


def minimize(problems, iterations, memory, tolerance):
    """The minima u [P, C, d + 1] of all problems by L-BFGS (Nocedal and Wright 2006, algorithm 7.4), each with its own
    memory and line search. One is left alone when neither the step that it made nor the one to come lowers its loss by
    more than a share of `tolerance`."""
    result = problems.x.new_zeros(len(problems.scale), problems.classes, problems.x.shape[1] + 1)
    at, u = torch.arange(len(result), device=result.device), result.clone()
    loss, g = problems.loss(u)
    gained, pairs, gamma = loss, [], torch.ones_like(g[:, 0, 0])
    for _ in range(iterations):
        # The direction q = H g; H is what the last steps s and changes of gradient t tell of the inverse Hessian.
        q, factors = g.clone(), []
        for s, t, rho in reversed(pairs):
            factors.append(rho * dot(s, q))
            q -= times(factors[-1], t)
        q = times(gamma, q)
        for (s, t, rho), factor in zip(pairs, reversed(factors), strict=True):
            q += times(factor - rho * dot(t, q), s)
        slope = dot(g, q)

        least = tolerance * loss.clamp(min=0.01)  # separable classes have a minimum near 0, of no use to anyone
        going = ((slope / 2 > least) | (gained > least)).nonzero()[:, 0]
        if len(going) < len(u):
            result[at] = u
            u, g, q, loss, slope, gained, at, gamma = (t[going] for t in (u, g, q, loss, slope, gained, at, gamma))
            pairs = [[t[going] for t in pair] for pair in pairs]
            problems.pick(going)
            if not len(going):
                break

        new = u - q
        new_loss, new_g = problems.loss(new)
        for tries in range(1, 11):  # a quarter of the step where it does not pay
            worse = (new_loss > loss - 1e-4 * slope).nonzero()[:, 0]
            if not len(worse):
                break
            new[worse] = u[worse] - q[worse] / 4**tries
            new_loss[worse], new_g[worse] = problems.loss(new[worse], worse)
        s, t = new - u, new_g - g
        st, tt = dot(s, t), dot(t, t)
        sound = st > 1e-10 * tt
        gamma = torch.where(sound, st / tt, gamma)
        pairs = [*pairs, [s, t, torch.where(sound, 1 / st, 0)]][-memory:]
        u, g, gained, loss = new, new_g, (loss - new_loss).abs(), new_loss
    result[at] = u
    return result


def fit(x, y, classes, penalties, iterations=200, memory=10, tolerance=2e-7, most=2**28):
    """Weights [P, d, C] and biases [P, C] that minimize mean cross-entropy + penalty / 2 |W|^2 for each of P
    `penalties`. x [N, d]; y int64 [N], or [P, N] where each has labels of its own. So many problems are solved together
    that they take `most` numbers (1 GB), or one; beside them there is a copy of x."""
    if x.device.type == "mps":  # which has neither fp64 nor eigenvalues
        return tuple(t.to(x.device) for t in fit(x.cpu(), y.cpu(), classes, penalties, iterations, memory, tolerance))
    penalties = torch.as_tensor(penalties, dtype=x.dtype, device=x.device)
    found, each = [], classes * (3 * len(x) + (2 * memory + 6) * (x.shape[1] + 1))
    for some in penalties.split(max(1, most // each)):
        at = slice(done := sum(len(w) for w, _ in found), done + len(some))
        problems = Problems(x, y[at] if y.ndim == 2 else y, classes, some)
        scale, u = problems.scale, minimize(problems, iterations, memory, tolerance)
        problems.scale = scale  # of those that were left alone, too
        _, w, b = problems.weights(u)
        found.append((w, b[..., 0] - w @ problems.mean))  # as b is on centered features
    w, b = (torch.cat(parts) for parts in zip(*found, strict=True))
    return w.mT, b
