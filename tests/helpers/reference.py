"""A second derivation of the shared formulas: Python floats, loops, ``math``; no torch."""

import math


def softmax(row):
    top = max(row)
    powers = [math.exp(z - top) for z in row]
    return [x / sum(powers) for x in powers]


def entropy(p):
    return -sum(x * math.log(x) for x in p if x > 0)


def cross_entropy(q, p):
    return -sum(a * math.log(b) for a, b in zip(q, p, strict=True) if a)


def sure(p):
    return 1 - entropy(p) / math.log(len(p))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def onehot(y, classes):
    return [1.0 if c == y else 0.0 for c in range(classes)]


def refined(kind, q, p, p_const, eps=0.3, g=0.5):
    """q~ of one sample. ``p`` may carry a gradient, trust is read from ``p_const``."""
    if kind == "ce":
        return q
    if kind == "ls":
        return [(1 - eps) * a + eps / len(q) for a in q]
    if kind == "cp":
        return [(1 - eps) * a - eps * b for a, b in zip(q, p, strict=True)]
    if kind == "boot_hard":
        p = onehot(p_const.index(max(p_const)), len(q))
    if kind == "trust":  # ProSelfLC and MyLC differ only in g
        eps = g * sure(p_const)
    return [(1 - eps) * a + eps * b for a, b in zip(q, p, strict=True)]


def slope(f, zs, h=1e-5):
    """Central differences of f(zs) for nested lists zs [K][B][C]: the gradient in the same
    nesting."""

    def at(k, i, c, step):
        return f(
            [
                [
                    [z + step * ((k, i, c) == (a, b, d)) for d, z in enumerate(row)]
                    for b, row in enumerate(rows)
                ]
                for a, rows in enumerate(zs)
            ]
        )

    return [
        [
            [(at(k, i, c, h) - at(k, i, c, -h)) / (2 * h) for c in range(len(row))]
            for i, row in enumerate(rows)
        ]
        for k, rows in enumerate(zs)
    ]
