"""Policies: what a recipe may say, and what is read out of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from shared.recipes.policies import TAIL_MODES, Policy, Random, Threshold, TopK, TopP

_POLICY: TypeAdapter[Policy] = TypeAdapter(Policy)


@pytest.mark.parametrize(
    "policy", [Threshold(), Threshold(tau=0.25), TopK(k=3), TopP(p=0.9, max_k=7), Random(draws=50)]
)
def test_a_policy_survives_its_own_json(policy: Policy) -> None:
    assert _POLICY.validate_json(_POLICY.dump_json(policy)) == policy
    assert hash(_POLICY.validate_json(_POLICY.dump_json(policy))) == hash(policy)


def test_the_default_is_the_designs() -> None:
    assert _POLICY.validate_python({"kind": "threshold"}) == Threshold(tau=1 / 512)


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "threshold", "tau": 0.0},
        {"kind": "threshold", "tau": 1.5},
        {"kind": "threshold", "tau": math.nan},
        {"kind": "threshold", "k": 3},
        {"kind": "top_k"},
        {"kind": "top_k", "k": 0},
        {"kind": "top_p", "p": 0.0},
        {"kind": "top_p", "p": 1.1},
        {"kind": "top_p", "p": 0.9, "max_k": 0},
        {"kind": "random"},
        {"kind": "random", "draws": 0},
        {"kind": "nucleus", "p": 0.9},
        {"tau": 0.1},
    ],
)
def test_nonsense_is_refused(entry: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        _POLICY.validate_python(entry)


def test_only_drawn_targets_are_sampled() -> None:
    assert Threshold().is_sampled
    assert Random(draws=1).is_sampled
    assert not TopK(k=1).is_sampled
    assert not TopP(p=0.5).is_sampled
    assert set(TAIL_MODES) == {"ghost", "uniform", "renormalize", "drop"}


@pytest.mark.parametrize("tau", [1.0, 0.5, 1 / 3, 1 / 64, 1 / 512, 1e-6])
def test_the_step_is_tau_as_fp16_can_hold_its_log(tau: float) -> None:
    log_tau = Threshold(tau=tau).log_tau
    assert float(np.float16(log_tau)) == log_tau
    assert math.exp(log_tau) == pytest.approx(tau, rel=0.004)
