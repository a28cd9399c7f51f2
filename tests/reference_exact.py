"""Losses of one position in 100 digits, with gradients by central differences: nothing cancels.

Imports nothing of the project.  ``student`` are the logits as floats; the gradient is by them.
"""

from __future__ import annotations

from collections.abc import Callable

from mpmath import mp, mpf

DIGITS = 100
STEP = "1e-32"


def loss_and_gradient(
    student: list[float],
    label: int,
    ids: list[int],
    masses: list[mpf],
    *,
    kd_ratio: float,
    temperature: float,
    tail: str,
    kind: str = "forward_kl",
) -> tuple[float, list[float]]:
    """(1 - kd_ratio) * CE + kd_ratio * KD, with a rest of at least 2**-24, and its gradient."""
    with mp.workdps(DIGITS):
        rest = max(1 - sum(masses), mpf(2) ** -24) if len(ids) < len(student) else mpf(0)

        def loss(logits: list[mpf]) -> mpf:
            ce = -mp.log(_softmax(logits, 1)[label])
            q = _softmax(logits, temperature)
            kd = mpf(temperature) ** 2 * _kd(q, ids, masses, rest, tail, kind)
            return (1 - mpf(kd_ratio)) * ce + mpf(kd_ratio) * kd

        exact = [mpf(z) for z in student]
        return float(loss(exact)), [float(_slope(loss, exact, i)) for i in range(len(exact))]


def _slope(loss: Callable[[list[mpf]], mpf], logits: list[mpf], index: int) -> mpf:
    above, below = list(logits), list(logits)
    above[index] += mpf(STEP)
    below[index] -= mpf(STEP)
    return (loss(above) - loss(below)) / (2 * mpf(STEP))


def _softmax(logits: list[mpf], temperature: float) -> list[mpf]:
    powers = [mp.exp(z / mpf(temperature)) for z in logits]
    return [power / sum(powers) for power in powers]


def _kd(q: list[mpf], ids: list[int], masses: list[mpf], rest: mpf, tail: str, kind: str) -> mpf:
    others = [i for i in range(len(q)) if i not in ids]
    kept = [q[i] for i in ids]
    if tail == "renormalize":
        return _divergence([mass / sum(masses) for mass in masses], kept, kind)
    if tail == "drop" or not others:
        return _divergence(masses, kept, kind)
    if tail == "uniform":
        return _divergence(
            [*masses, *[rest / len(others)] * len(others)], kept + [q[i] for i in others], kind
        )
    return _divergence([*masses, rest], [*kept, sum(q[i] for i in others)], kind)


def _divergence(p: list[mpf], q: list[mpf], kind: str) -> mpf:
    pairs = list(zip(p, q, strict=True))
    if kind == "forward_kl":
        return sum((a * mp.log(a / b) for a, b in pairs), mpf(0))
    if kind == "reverse_kl":
        return sum((b * mp.log(b / a) for a, b in pairs), mpf(0))
    if kind == "jensen_shannon":
        mixed = [(a, b, (a + b) / 2) for a, b in pairs]
        return sum((a * mp.log(a / m) / 2 + b * mp.log(b / m) / 2 for a, b, m in mixed), mpf(0))
    return sum((abs(a - b) / 2 for a, b in pairs), mpf(0))
