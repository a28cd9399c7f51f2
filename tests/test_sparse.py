"""Sparse targets against slow references in plain Python, which import nothing of ours.

Shapes: N positions, V vocabulary, E entries, S seeds.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import struct
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from shared.errors import CacheMismatchError, DataError, RecipeError
from shared.recipes.policies import Policy, Random, Threshold, TopK, TopP
from shared.sparse import SparseTargets, position_seeds, sampling_version, sparsifier, sparsify
from shared.sparse.draws import substream
from shared.sparse.grid import grid_on, logprob_grid
from shared.sparse.targets import threshold_log_inclusion

_POLICIES: list[Policy] = [
    Threshold(tau=1 / 64),
    Threshold(tau=1 / 64, values="fp16"),
    Random(draws=37),
    TopK(k=5),
    TopP(p=0.8, max_k=20),
]
_MASK = (1 << 64) - 1


# The references.


def _reference_hash(seed: int, counter: int) -> int:
    """Output ``counter`` of splitmix64 (Steele, Lea, Flood 2014) started at ``seed``."""
    z = (seed + (counter + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _reference_uniform(seed: int, counter: int) -> float:
    return (_reference_hash(seed & _MASK, counter) >> 11) / (1 << 53)


def _reference_tempered(logprobs: list[float], temperature: float) -> list[float]:
    """log p_T by the definition."""
    total = math.fsum(math.exp(x / temperature) for x in logprobs)
    return [x / temperature - math.log(total) for x in logprobs]


def _reference_walk(mass: list[float], points: list[float]) -> dict[int, int]:
    """How many of the rising points fall on each token, tokens being laid out by id."""
    counts: dict[int, int] = defaultdict(int)
    below, at = 0.0, 0
    for token, width in enumerate(mass):
        below = below + width
        while at < len(points) and points[at] < below:
            counts[token] += 1
            at += 1
    return dict(counts)


def _reference_threshold(
    logprobs: list[float], temperatures: tuple[float, ...], log_tau: float, seed: int
) -> set[int]:
    tempered = [_reference_tempered(logprobs, t) for t in temperatures]
    heaviest = [max(column) for column in zip(*tempered, strict=True)]
    kept = {token for token, value in enumerate(heaviest) if value >= log_tau}
    mass = [0.0 if token in kept else math.exp(value - log_tau) for token, value in enumerate(heaviest)]
    offset = _reference_uniform(seed, 0)
    return kept | set(_reference_walk(mass, [offset + i for i in range(math.ceil(sum(mass)) + 1)]))


def _reference_threshold_at_several(
    logprobs: list[float], temperatures: tuple[float, ...], log_tau: float, seed: int
) -> dict[int, float]:
    """Ids and stored log-probs: drawn with the most that rounding can make of a token, rounded, thinned."""
    tempered = [_reference_tempered(logprobs, t) for t in temperatures]
    normalizers = [math.log(math.fsum(math.exp(x / t) for x in logprobs)) for t in temperatures]
    most = [
        max(row[v] + (abs(x) / 1024 + 2**-24) / t for row, t in zip(tempered, temperatures, strict=True))
        for v, x in enumerate(logprobs)
    ]
    step = math.exp(log_tau)
    mass = [math.exp(value) * (1 + 1e-5) / step for value in most]
    chosen = {v: 1.0 for v, share in enumerate(mass) if share >= 1}
    mass = [0.0 if v in chosen else share for v, share in enumerate(mass)]
    offset = _reference_uniform(seed, 0)
    walked = _reference_walk(mass, [offset + i for i in range(math.ceil(sum(mass)) + 1)])
    chosen |= {v: mass[v] for v in walked}
    kept, unit = {}, 1.0 if 1.0 in temperatures else temperatures[0]
    for v, probability in chosen.items():
        low, high = _fp16_neighbours(logprobs[v])
        share = math.expm1((logprobs[v] - low) / unit) / math.expm1((high - low) / unit)
        stored = high if _reference_uniform(_reference_hash(seed & _MASK, 1), v) < share else low
        heaviest = max(stored / t - z for t, z in zip(temperatures, normalizers, strict=True))
        included = math.exp(min(0.0, heaviest - log_tau))
        if _reference_uniform(_reference_hash(seed & _MASK, 2), v) * probability < included:
            kept[v] = stored
    return kept


def _fp16_neighbours(value: float) -> tuple[float, float]:
    near = np.float16(value)
    low = near if float(near) <= value else np.nextafter(near, np.float16(-np.inf))
    return float(low), float(np.nextafter(low, np.float16(np.inf)))


def _reference_random(logprobs: list[float], draws: int, seed: int) -> dict[int, int]:
    mass = [math.exp(x) for x in logprobs]
    total = math.fsum(mass)
    return _reference_walk(mass, sorted(_reference_uniform(seed, i) * total for i in range(draws)))


def _random_logprobs(
    num_positions: int, vocab_size: int, *, spread: float = 3.0, seed: int = 0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_positions, vocab_size, generator=generator) * spread).log_softmax(-1)


def _ids(targets: SparseTargets, position: int) -> list[int]:
    return targets.slice(position, position + 1).ids.tolist()


def _dense(targets: SparseTargets, vocab_size: int, temperature: float = 1.0) -> torch.Tensor:
    dense = torch.zeros(targets.num_positions, vocab_size, dtype=torch.float64)
    weights = targets.weights(temperature).double()
    return dense.index_put_((targets.position_index, targets.ids.long()), weights, accumulate=True)


# Seeds.


def test_the_hash_is_splitmix64() -> None:
    # The generator's published first outputs for the state 1234567.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [_reference_hash(1234567, i) for i in range(4)] == published


@pytest.mark.parametrize(("seed", "key"), [(0, b""), (7, b"k" * 16), ((1 << 63) - 1, bytes(range(16)))])
def test_position_seeds_are_their_definition(seed: int, key: bytes) -> None:
    digest = hashlib.blake2b(key, digest_size=8, key=struct.pack("<q", seed)).digest()
    (state,) = struct.unpack("<Q", digest)
    assert [x & _MASK for x in position_seeds(seed, key, 5).tolist()] == [
        _reference_hash(state, i) for i in range(5)
    ]


def test_position_seeds_depend_on_seed_key_and_position_alone() -> None:
    seeds = position_seeds(3, b"key", 40)
    assert torch.equal(position_seeds(3, b"key", 17), seeds[:17])
    everything = torch.cat([seeds, position_seeds(4, b"key", 40), position_seeds(3, b"kez", 40)])
    assert len(everything.unique()) == 120
    assert position_seeds(3, b"key", 0).shape == (0,)


class _Constants(TorchFunctionMode):
    """Counts tensors that are made of Python's numbers: on a GPU each is a copy, for which the host waits."""

    num_made = 0

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> torch.Tensor:
        self.num_made += function in (torch.tensor, torch.as_tensor)
        return function(*arguments, **(options or {}))


def test_hashes_copy_no_constants_to_a_device() -> None:
    seeds = position_seeds(1, b"key", 5)
    with _Constants() as constants:
        for counter in (0, 1, 2**40):
            assert torch.equal(substream(seeds, counter), substream(seeds, torch.tensor(counter)))
            want = [_reference_hash(seed & _MASK, counter) for seed in seeds.tolist()]
            assert [found & _MASK for found in substream(seeds, counter).tolist()] == want
    assert constants.num_made == 3  # this test's own


@pytest.mark.parametrize("policy", [Threshold(tau=1 / 64), Random(draws=37)])
def test_a_grid_is_copied_to_a_device_once(policy: Policy) -> None:
    device = torch.device("cpu")
    grid = grid_on(policy, (1.0, 2.0), device)
    assert grid is grid_on(policy, (1.0, 2.0), device)
    assert grid.tolist() == logprob_grid(policy, (1.0, 2.0)).tolist()


# What is kept.


@pytest.mark.parametrize("vocab_size", [1, 2, 3, 255, 256, 257, 1000, 2049])
@pytest.mark.parametrize("temperatures", [(1.0,), (2.0,), (1.0, 0.5, 3.0)])
def test_threshold_keeps_what_the_walk_keeps(vocab_size: int, temperatures: tuple[float, ...]) -> None:
    policy = Threshold(tau=1 / 20)
    logprobs = _random_logprobs(6, vocab_size, spread=1.5, seed=vocab_size)
    seeds = position_seeds(1, b"walk", 6)
    targets = sparsify(logprobs, policy, temperatures=temperatures, seeds=seeds)
    for n in range(6):
        row, seed = logprobs[n].tolist(), int(seeds[n])
        if temperatures == (1.0,):
            assert set(_ids(targets, n)) == _reference_threshold(row, temperatures, policy.log_tau, seed)
        elif vocab_size > 1:  # of one token the log-prob is 0, which has no neighbour above
            kept = _reference_threshold_at_several(row, temperatures, policy.log_tau, seed)
            stored = targets.slice(n, n + 1).logprobs.tolist()
            assert dict(zip(_ids(targets, n), stored, strict=True)) == kept


@pytest.mark.parametrize("vocab_size", [1, 2, 256, 257, 1000])
@pytest.mark.parametrize("draws", [1, 2, 50])
def test_random_keeps_what_the_walk_keeps(vocab_size: int, draws: int) -> None:
    logprobs = _random_logprobs(6, vocab_size, spread=1.5, seed=vocab_size)
    seeds = position_seeds(1, b"walk", 6)
    targets = sparsify(logprobs, Random(draws=draws), seeds=seeds)
    for n in range(6):
        part = targets.slice(n, n + 1)
        kept = dict(zip(part.ids.tolist(), part.draw_counts.tolist(), strict=True))
        assert kept == _reference_random(logprobs[n].tolist(), draws, int(seeds[n]))


@pytest.mark.parametrize("k", [1, 3, 300, 1000])
def test_top_k_keeps_the_k_largest(k: int) -> None:
    logprobs = _random_logprobs(5, 300)
    targets = sparsify(logprobs, TopK(k=k), seeds=position_seeds(0, b"", 5))
    for n in range(5):
        by_value = sorted(range(300), key=lambda v: -logprobs[n, v].item())
        assert _ids(targets, n) == sorted(by_value[:k])
        assert torch.equal(targets.slice(n, n + 1).logprobs, logprobs[n, sorted(by_value[:k])].half())


@pytest.mark.parametrize(("p", "max_k"), [(0.01, 50), (0.5, 50), (0.9, 7), (0.999, 1000)])
def test_top_p_keeps_the_fewest_that_reach_p(p: float, max_k: int) -> None:
    logprobs = _random_logprobs(5, 300)
    targets = sparsify(logprobs, TopP(p=p, max_k=max_k), seeds=position_seeds(0, b"", 5))
    for n in range(5):
        expected, mass = [], 0.0
        for v in sorted(range(300), key=lambda v: -logprobs[n, v].item()):
            if mass >= p or len(expected) == max_k:
                break
            expected.append(v)
            mass += math.exp(logprobs[n, v].item())
        assert _ids(targets, n) == sorted(expected)


@pytest.mark.parametrize("policy", _POLICIES)
@pytest.mark.parametrize("temperatures", [(1.0,), (2.0, 1.0)])
def test_padding_ids_are_never_kept(policy: Policy, temperatures: tuple[float, ...]) -> None:
    logits = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    logits[:, 50:] = -torch.inf
    logits[0, 3:] = -torch.inf
    targets = sparsify(
        logits.log_softmax(-1), policy, temperatures=temperatures, seeds=position_seeds(0, b"p", 40)
    )
    assert int(targets.ids.max()) < 50
    assert set(_ids(targets, 0)) <= {0, 1, 2}
    assert torch.isfinite(targets.logprobs).all()
    assert torch.isfinite(targets.entropy).all()


# Canonical order.


@pytest.mark.parametrize("policy", _POLICIES)
@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 2.0)])
def test_entries_are_in_canonical_order(policy: Policy, temperatures: tuple[float, ...]) -> None:
    targets = sparsify(
        _random_logprobs(30, 500), policy, temperatures=temperatures, seeds=position_seeds(0, b"o", 30)
    )
    for n in range(30):
        assert _ids(targets, n) == sorted(set(_ids(targets, n)))


# Weights.


@pytest.mark.parametrize(
    ("policy", "temperatures"),
    [
        (Threshold(tau=1 / 8), (1.0,)),
        (Threshold(tau=1 / 64), (1.0,)),
        (Threshold(tau=1 / 64, values="fp16"), (1.0,)),
        (Threshold(tau=1.0), (1.0,)),
        (Threshold(tau=1 / 16), (2.0,)),
        (Threshold(tau=1 / 16), (1.0, 2.0, 0.7)),
        (Random(draws=9), (1.0,)),
        (Random(draws=9), (1.5,)),
        (Random(draws=9), (1.0, 2.0)),
    ],
)
def test_sampled_weights_are_unbiased(policy: Policy, temperatures: tuple[float, ...]) -> None:
    """The mean over many seeds is p_T, token by token, within 5 standard errors of the mean."""
    num_seeds, vocab_size = 12_000, 60
    logprobs = _random_logprobs(1, vocab_size, spread=1.5, seed=5)
    seeds = position_seeds(11, b"unbiased", num_seeds)
    targets = sparsify(logprobs.expand(num_seeds, -1), policy, temperatures=temperatures, seeds=seeds)
    for temperature in temperatures:
        sampled_SV = _dense(targets, vocab_size, temperature)
        expected_V = torch.tensor(_reference_tempered(logprobs[0].tolist(), temperature)).exp()
        error_V = sampled_SV.std(0) / math.sqrt(num_seeds)
        # Rounding is exact at one temperature, and nearly so at others.
        allowed_V = 5 * error_V + (1e-6 if len(temperatures) == 1 else 2e-5) * expected_V
        assert ((sampled_SV.mean(0) - expected_V).abs() <= allowed_V + 1e-7).all()


@pytest.mark.parametrize("shape", ["flat", "peaked", "nearly flat"])
@pytest.mark.parametrize("temperatures", [(1.0, 2.0), (2.0, 1.0, 0.5), (3.0,), (1.0, 0.05)])
def test_the_expectation_at_several_temperatures_is_exact(
    temperatures: tuple[float, ...], shape: str
) -> None:
    """Over offset, rounding and thinning together, token by token, without a single draw.

    Systematic sampling chooses a token with its mass over tau; thinning makes of that the inclusion of the
    rounded log-prob, if it is not above it; the weight divides by just this.
    """
    policy, vocab_size = Threshold(tau=1 / 16, values="fp16"), 1500
    spread = {"flat": 0.0, "peaked": 4.0, "nearly flat": 1e-3}[shape]
    logprobs = _random_logprobs(1, vocab_size, spread=spread)
    tempered = [sparsifier._temper(logprobs, t) for t in temperatures]
    chosen = sparsifier._most_mass(logprobs, tempered, temperatures)[0, :vocab_size].double()
    chosen = (chosen / math.exp(policy.log_tau)).clamp_max(1)
    normalizers = torch.stack([at.log_normalizer for at in tempered]).double()
    low, high = torch.tensor([_fp16_neighbours(x) for x in logprobs[0].tolist()], dtype=torch.float64).T
    unit = 1.0 if 1.0 in temperatures else temperatures[0]
    share = torch.expm1((logprobs[0].double() - low) / unit) / torch.expm1((high - low) / unit)
    means = torch.zeros(len(temperatures), vocab_size, dtype=torch.float64)
    for stored, chance in ((low, 1 - share), (high, share)):
        at_all = stored / torch.tensor(temperatures)[:, None] - normalizers
        inclusion = threshold_log_inclusion(at_all, policy).exp()
        assert bool((inclusion <= chosen * (1 + 1e-12)).all())
        means += chance * inclusion * (at_all.exp() / inclusion)
    for mean, temperature, normalizer in zip(means, temperatures, normalizers, strict=True):
        exact = (logprobs[0].double() / temperature - normalizer).exp()
        gap = (high - low) * abs(1 / temperature - 1 / unit) * max(1 / temperature, 1 / unit)
        assert bool(((mean - exact).abs() <= (gap * (high - low) / 8 * 1.1 + 1e-6) * exact).all())


@pytest.mark.parametrize("policy", [Threshold(tau=1 / 4096), Random(draws=5)])
@pytest.mark.parametrize("vocab_size", [700, 1000, 100_003])
def test_flat_teachers_of_any_size_are_unbiased(policy: Policy, vocab_size: int) -> None:
    """All temperatures cross at the same token here: inclusion before rounding was off by 2e-3."""
    logprobs = torch.full((40, vocab_size), -math.log(vocab_size))
    seeds = position_seeds(0, b"flat", 40)
    targets = sparsify(logprobs, policy, temperatures=(1.0, 2.0), seeds=seeds)
    for temperature in (1.0, 2.0):
        totals = _dense(targets, vocab_size, temperature).sum(-1)
        assert abs(float(totals.mean()) - 1) < 4 * float(totals.std()) / 40**0.5 + 1e-6
        assert float(totals.std()) / 40**0.5 < 4e-4  # what the mean is held to


def test_ways_of_sampling_have_numbers() -> None:
    assert sampling_version(Threshold(), (1.0,)) == sampling_version(Random(draws=2), (2.0,)) == 1
    assert sampling_version(TopK(k=2), (1.0, 2.0)) == 1
    assert sampling_version(Threshold(), (2.0,)) == sampling_version(Random(draws=2), (1.0, 2.0)) == 2


def test_threshold_draws_spread_like_the_steps_they_are() -> None:
    """A drawn token's weight is tau with probability p / tau: its variance is p (tau - p)."""
    policy = Threshold(tau=1 / 16)
    logprobs = torch.full((1, 64), 1 / 64).log()
    targets = sparsify(logprobs.expand(20_000, -1), policy, seeds=position_seeds(0, b"var", 20_000))
    variance = _dense(targets, 64).var(0)
    assert variance.mean().item() == pytest.approx((1 / 16 - 1 / 64) / 64, rel=0.02)


def test_threshold_weights_sum_to_one_within_a_step() -> None:
    """They sum to one in expectation; at a position they are off by less than tau, and by rounding."""
    for values, rounding in (("fp16", 0.003), ("levels", 0.03)):
        policy = Threshold(tau=1 / 32, values=values)
        targets = sparsify(_random_logprobs(2000, 300), policy, seeds=position_seeds(0, b"sum", 2000))
        sums = _dense(targets, 300).sum(-1)
        assert (sums - 1).abs().max() < math.exp(policy.log_tau) + rounding
        assert abs(sums.mean() - 1) < 5 * sums.std() / math.sqrt(2000)


def test_random_weights_sum_to_one() -> None:
    targets = sparsify(_random_logprobs(300, 300), Random(draws=50), seeds=position_seeds(0, b"sum", 300))
    assert torch.allclose(_dense(targets, 300).sum(-1), torch.ones(300, dtype=torch.float64))


def test_kept_logprobs_are_fp16_neighbours() -> None:
    policy = Threshold(tau=1 / 512, values="fp16")
    logprobs = _random_logprobs(200, 300)
    targets = sparsify(logprobs, policy, seeds=position_seeds(0, b"near", 200))
    exact = logprobs[targets.position_index, targets.ids.long()].double().numpy()
    stored = targets.logprobs.numpy()
    own = stored != np.float16(policy.log_tau)
    below = np.nextafter(stored, np.float16(-np.inf)).astype(np.float64)
    above = np.nextafter(stored, np.float16(np.inf)).astype(np.float64)
    assert ((below < exact) & (exact < above))[own].all()
    assert (exact[~own] < above[~own]).all()


def test_deterministic_weights_are_the_kept_probabilities() -> None:
    logprobs = _random_logprobs(20, 300)
    targets = sparsify(logprobs, TopK(k=7), temperatures=(1.0, 2.0), seeds=position_seeds(0, b"", 20))
    for temperature in (1.0, 2.0):
        expected = (logprobs.double() / temperature).softmax(-1)[targets.position_index, targets.ids.long()]
        assert torch.allclose(targets.weights(temperature).double(), expected, rtol=3e-3)


@pytest.mark.parametrize("policy", _POLICIES)
def test_another_temperature_is_refused_with_the_list(policy: Policy) -> None:
    targets = sparsify(
        _random_logprobs(2, 30), policy, temperatures=(1.0, 2.5), seeds=position_seeds(0, b"", 2)
    )
    with pytest.raises(CacheMismatchError, match=r"temperature 3 was not captured.*1, 2\.5"):
        targets.weights(3.0)


@pytest.mark.parametrize("policy", _POLICIES)
def test_temperature_one_alone_stores_no_normalisers(policy: Policy) -> None:
    targets = sparsify(_random_logprobs(4, 30), policy, seeds=position_seeds(0, b"", 4))
    assert targets.log_normalizers.shape == (4, 0)


def test_normalisers_and_entropies_are_those_of_the_whole_distribution() -> None:
    logprobs = _random_logprobs(9, 700)
    logprobs[:, -7:] = -torch.inf
    logprobs = logprobs.log_softmax(-1)
    temperatures = (2.0, 1.0, 0.5)
    targets = sparsify(logprobs, TopK(k=1), temperatures=temperatures, seeds=position_seeds(0, b"", 9))
    for n in range(9):
        row = [x for x in logprobs[n].tolist() if x > -math.inf]
        for i, temperature in enumerate(temperatures):
            tempered = _reference_tempered(row, temperature)
            entropy = -math.fsum(math.exp(x) * x for x in tempered)
            assert targets.entropy[n, i].item() == pytest.approx(entropy, rel=1e-5)
        for column, temperature in enumerate((2.0, 0.5)):
            log_z = math.log(math.fsum(math.exp(x / temperature) for x in row))
            assert targets.log_normalizers[n, column].item() == pytest.approx(log_z, rel=1e-5, abs=1e-6)


# Edges.


@pytest.mark.parametrize("policy", [*_POLICIES, Threshold(tau=1.0), Threshold(tau=1e-6)])
@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 4.0)])
def test_a_certain_teacher_costs_one_entry(policy: Policy, temperatures: tuple[float, ...]) -> None:
    logprobs = torch.full((3, 257), -torch.inf)
    logprobs[:, 256] = 0.0
    targets = sparsify(logprobs, policy, temperatures=temperatures, seeds=position_seeds(0, b"", 3))
    assert targets.ids.tolist() == [256] * 3
    for temperature in temperatures:
        assert targets.weights(temperature).tolist() == pytest.approx([1.0] * 3)
    assert targets.entropy.abs().max() == 0


@pytest.mark.parametrize("policy", _POLICIES)
def test_a_vocabulary_of_one(policy: Policy) -> None:
    targets = sparsify(torch.zeros(3, 1), policy, seeds=position_seeds(0, b"", 3))
    assert targets.ids.tolist() == [0, 0, 0]
    assert targets.weights().tolist() == [1.0, 1.0, 1.0]


def test_no_positions() -> None:
    for policy in _POLICIES:
        targets = sparsify(
            torch.zeros(0, 30), policy, temperatures=(1.0, 2.0), seeds=position_seeds(0, b"", 0)
        )
        assert (targets.num_positions, targets.num_entries) == (0, 0)
        assert targets.weights(2.0).shape == (0,)
        assert targets.log_normalizers.shape == (0, 1)


def test_a_flat_teacher_is_drawn_evenly() -> None:
    """Uniform over more tokens than fp32 sums can walk: every draw falls in its own step."""
    vocab_size, policy = 248_320, Threshold(tau=1 / 512)
    logprobs = torch.full((2, vocab_size), -math.log(vocab_size))
    targets = sparsify(logprobs, policy, seeds=position_seeds(0, b"flat", 2))
    step = vocab_size * math.exp(policy.log_tau)
    for n in range(2):
        ids = torch.tensor(_ids(targets, n))
        assert abs(len(ids) - vocab_size / step) <= 1
        assert ((ids.diff() - step).abs() <= 1).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.1])
def test_what_is_no_distribution_is_refused(bad: float) -> None:
    logprobs = _random_logprobs(5, 40)
    logprobs[3, 7] = bad
    for policy in _POLICIES:
        for temperatures in [(1.0,), (2.0,)]:
            with pytest.raises(DataError, match="position 3"):
                sparsify(logprobs, policy, temperatures=temperatures, seeds=position_seeds(0, b"", 5))
    with pytest.raises(DataError, match="position 0"):
        sparsify(torch.full((1, 4), -torch.inf), Threshold(), seeds=position_seeds(0, b"", 1))


def test_log_probs_may_have_a_graph() -> None:
    logprobs, seeds = _random_logprobs(5, 40), position_seeds(0, b"", 5)
    found = sparsify(logprobs.clone().requires_grad_(), Threshold(), seeds=seeds)
    _assert_equal(found, sparsify(logprobs, Threshold(), seeds=seeds))


def test_other_seeds_than_positions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"seeds.*\[4\].*5 positions"):
        sparsify(_random_logprobs(5, 40), Threshold(), seeds=position_seeds(0, b"", 4))


def test_log_probs_of_a_narrow_softmax_are_told_what_is_needed() -> None:
    logprobs = _random_logprobs(5, 5000).bfloat16().log_softmax(-1)
    with pytest.raises(DataError, match="normalised in fp32"):
        sparsify(logprobs, Threshold(), seeds=position_seeds(0, b"", 5))


@pytest.mark.parametrize("temperatures", [(), (1.0, 1.0), (0.0,), (-1.0,), (math.nan,), (math.inf,)])
def test_impossible_temperatures_are_refused(temperatures: tuple[float, ...]) -> None:
    with pytest.raises(RecipeError, match="temperatures"):
        sparsify(torch.zeros(1, 1), Threshold(), temperatures=temperatures, seeds=position_seeds(0, b"", 1))


# Reproducibility.


def _assert_equal(left: SparseTargets, right: SparseTargets) -> None:
    for name in ("offsets", "ids", "logprobs", "log_normalizers", "entropy", "draw_counts"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name
    assert (left.policy, left.temperatures) == (right.policy, right.temperatures)


@pytest.mark.parametrize("policy", _POLICIES)
@pytest.mark.parametrize("temperatures", [(1.0,), (0.5, 1.0)])
def test_a_position_does_not_depend_on_its_neighbours(
    policy: Policy, temperatures: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    logprobs = _random_logprobs(23, 700)
    seeds = position_seeds(0, b"alone", 23)
    whole = sparsify(logprobs, policy, temperatures=temperatures, seeds=seeds)
    parts = [
        sparsify(logprobs[i : i + 5], policy, temperatures=temperatures, seeds=seeds[i : i + 5])
        for i in range(0, 23, 5)
    ]
    _assert_equal(SparseTargets.concat(parts), whole)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    shuffled = sparsify(logprobs[order], policy, temperatures=temperatures, seeds=seeds[order])
    _assert_equal(shuffled, whole.select(order))
    monkeypatch.setattr(
        "shared.sparse.sparsifier._MAX_GROUP_ELEMENTS", {"cpu": 2100}
    )  # three positions at a time
    _assert_equal(sparsify(logprobs, policy, temperatures=temperatures, seeds=seeds), whole)


def _check_threads() -> None:
    logprobs = _random_logprobs(8, 65_537)
    seeds = position_seeds(0, b"threads", 8)
    for temperatures in [(1.0,), (0.5, 2.0)]:
        torch.set_num_threads(1)
        want = sparsify(logprobs, Threshold(tau=1 / 64), temperatures=temperatures, seeds=seeds)
        torch.set_num_threads(2)
        for size in (8, 1):
            parts = [
                sparsify(rows, want.policy, temperatures=temperatures, seeds=row_seeds)
                for rows, row_seeds in zip(logprobs.split(size), seeds.split(size), strict=True)
            ]
            _assert_equal(SparseTargets.concat(parts), want)


def test_threads_do_not_show() -> None:
    """torch splits the sum over one long row between threads, but not those over several rows.

    In a process of its own: what is forked later from one whose threads have worked may hang.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(_check_threads)


@pytest.mark.parametrize("policy", _POLICIES)
@pytest.mark.parametrize("temperatures", [(1.0,), (0.5, 2.0)])
def test_strides_do_not_show(policy: Policy, temperatures: tuple[float, ...]) -> None:
    logprobs = _random_logprobs(40, 3001)
    seeds = position_seeds(0, b"strides", 40)
    want = sparsify(logprobs, policy, temperatures=temperatures, seeds=seeds)
    columns_first = logprobs.t().contiguous().t()
    part_of_wider = torch.nn.functional.pad(logprobs, (3, 5))[:, 3:-5]
    for laid_out in (columns_first, part_of_wider):
        assert not laid_out.is_contiguous()
        _assert_equal(sparsify(laid_out, policy, temperatures=temperatures, seeds=seeds), want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("policy", _POLICIES)
def test_a_gpu_draws_the_same(policy: Policy) -> None:
    logprobs = _random_logprobs(64, 5000)
    seeds = position_seeds(0, b"device", 64)
    there = sparsify(logprobs.cuda(), policy, temperatures=(1.0, 2.0), seeds=seeds.cuda()).to("cpu")
    here = sparsify(logprobs, policy, temperatures=(1.0, 2.0), seeds=seeds)
    _assert_nearly_equal(there, here)


def _assert_nearly_equal(there: SparseTargets, here: SparseTargets) -> None:
    """Of two devices, whose ``exp`` differs in the last bit: here and there a draw falls on the next token."""
    one, other = (
        dict(zip(zip(some.position_index.tolist(), some.ids.tolist(), strict=True), weights, strict=True))
        for some in (there, here)
        for weights in [some.weights(2.0).tolist()]
    )
    few = max(2, len(other) // 1000)  # one such draw makes two pairs differ
    assert len(one.keys() ^ other.keys()) <= few
    assert sum(not math.isclose(one[pair], other[pair], rel_tol=1e-2) for pair in one.keys() & other) <= few


def test_nearly_equal_is_a_draw_in_a_thousand() -> None:
    policy = Threshold(tau=1 / 64)
    logprobs, seeds = _random_logprobs(64, 5000), position_seeds(0, b"device", 64)
    here = sparsify(logprobs, policy, temperatures=(1.0, 2.0), seeds=seeds)
    _assert_nearly_equal(
        sparsify(logprobs.roll(1, 0).roll(-1, 0), policy, temperatures=(1.0, 2.0), seeds=seeds), here
    )
    one_off = sparsify(logprobs, policy, temperatures=(1.0, 2.0), seeds=torch.cat([seeds[1:2], seeds[1:]]))
    with pytest.raises(AssertionError):
        _assert_nearly_equal(one_off, here)


# Slicing.


@settings(max_examples=40)
@given(st.integers(0, 12), st.sampled_from(_POLICIES), st.data())
def test_slices_and_selections_are_those_of_lists(
    num_positions: int, policy: Policy, data: st.DataObject
) -> None:
    targets = sparsify(
        _random_logprobs(num_positions, 50),
        policy,
        temperatures=(1.0, 2.0),
        seeds=position_seeds(0, b"s", num_positions),
    )
    singles = [targets.slice(n, n + 1) for n in range(num_positions)]
    start = data.draw(st.integers(0, num_positions))
    stop = data.draw(st.integers(start, num_positions))
    if start < stop:
        _assert_equal(targets.slice(start, stop), SparseTargets.concat(singles[start:stop]))
    assert targets.slice(start, stop).num_positions == stop - start
    if num_positions:
        index = data.draw(st.lists(st.integers(0, num_positions - 1), min_size=1, max_size=9))
        selected = targets.select(torch.tensor(index))
        _assert_equal(selected, SparseTargets.concat([singles[i] for i in index]))
        assert torch.equal(selected.counts, torch.bincount(selected.position_index, minlength=len(index)))
