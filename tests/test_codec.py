"""Payloads: round trips, an independent reader written from docs/targets.md, and damage of every kind."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from payload_reader import read_payload, spec_dictionary, spec_grid

from shared.codec import decode, encode, encode_many
from shared.codec.dictionary import DICTIONARY
from shared.errors import CacheFormatError, RecipeError
from shared.recipes.policies import Policy, Random, Threshold, TopK, TopP
from shared.sparse import SparseTargets, position_seeds, sparsify

VOCAB_SIZE = 5000
_CASES: list[tuple[Policy, tuple[float, ...]]] = [
    (Threshold(tau=1 / 64), (1.0,)),
    (Threshold(tau=1 / 512), (1.0,)),
    (Threshold(tau=1.0), (1.0,)),
    (Threshold(tau=1e-6), (1.0,)),
    (Threshold(tau=1 / 64, values="fp16"), (1.0,)),
    (Threshold(tau=1 / 64), (2.0,)),
    (Threshold(tau=1 / 64), (1.0, 2.0, 0.5)),
    (TopK(k=9), (1.0,)),
    (TopK(k=9), (1.0, 3.0)),
    (TopP(p=0.7, max_k=40), (1.0,)),
    (Random(draws=60), (1.0,)),
    (Random(draws=60), (1.0, 2.0)),
    (Random(draws=3000), (1.0,)),
]


def _targets(
    policy: Policy,
    temperatures: tuple[float, ...],
    num_positions: int,
    *,
    seed: int = 0,
    vocab_size: int = VOCAB_SIZE,
) -> SparseTargets:
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.rand(num_positions, 1, generator=generator) * 8
    logprobs = (torch.randn(num_positions, vocab_size, generator=generator) * sharpness).log_softmax(-1)
    seeds = position_seeds(seed, b"codec", num_positions)
    return sparsify(logprobs, policy, temperatures=temperatures, seeds=seeds)


def _assert_same_but_entropy(left: SparseTargets, right: SparseTargets) -> None:
    for name in ("offsets", "ids", "logprobs", "log_normalizers", "draw_counts"):
        found, wanted = getattr(left, name), getattr(right, name)
        assert found.dtype == wanted.dtype, name
        assert torch.equal(found, wanted), name


@pytest.mark.parametrize(("policy", "temperatures"), _CASES)
def test_the_specification_suffices_to_read_a_payload(
    policy: Policy, temperatures: tuple[float, ...]
) -> None:
    targets = _targets(policy, temperatures, 11)
    is_random = isinstance(policy, Random)
    grid = spec_grid(policy.model_dump(), temperatures)
    max_level = policy.draws - 1 if is_random else len(grid) - 1
    positions, plain = read_payload(encode(targets), max_level=max_level, has_plain=temperatures != (1.0,))
    assert [len(entries) for entries in positions] == targets.counts.tolist()
    ids, levels = zip(*[entry for entries in positions for entry in entries], strict=True)
    assert list(ids) == targets.ids.tolist()
    num_others = targets.log_normalizers.numel()
    assert np.array_equal(np.frombuffer(plain, "<f4", num_others), targets.log_normalizers.numpy().ravel())
    if is_random:
        assert [level + 1 for level in levels] == targets.draw_counts.tolist()
        if len(temperatures) > 1:
            assert np.array_equal(np.frombuffer(plain, "<f2", -1, 4 * num_others), targets.logprobs.numpy())
    else:
        assert np.array_equal(grid[list(levels)], targets.logprobs.numpy())


def test_the_specification_prints_the_dictionary() -> None:
    assert spec_dictionary() == DICTIONARY


# Round trips.


@pytest.mark.parametrize(("policy", "temperatures"), _CASES)
def test_decode_gives_back_what_was_encoded(policy: Policy, temperatures: tuple[float, ...]) -> None:
    targets = _targets(policy, temperatures, 40)
    found = decode([encode(targets)], policy=policy, temperatures=temperatures, vocab_size=VOCAB_SIZE)
    _assert_same_but_entropy(found, targets)
    assert found.entropy.shape == targets.entropy.shape
    assert found.entropy.isnan().all()
    for temperature in temperatures:
        assert torch.equal(found.weights(temperature), targets.weights(temperature))


@settings(max_examples=30)
@given(
    st.sampled_from(_CASES),
    st.lists(st.integers(0, 9), min_size=1, max_size=8),
    st.sampled_from([1, 2, 31, 256, 1000]),
    st.integers(0, 1000),
)
def test_rows_encoded_together_are_rows_encoded_apart(
    case: tuple[Policy, tuple[float, ...]], lengths: list[int], vocab_size: int, seed: int
) -> None:
    policy, temperatures = case
    offsets = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    targets = _targets(policy, temperatures, offsets[-1], seed=seed, vocab_size=vocab_size)
    payloads = encode_many(targets, offsets)
    rows = [targets.slice(start, start + size) for start, size in zip(offsets[:-1], lengths, strict=True)]
    assert payloads == [encode(row) for row in rows]
    found = decode(payloads, policy=policy, temperatures=temperatures, vocab_size=vocab_size)
    _assert_same_but_entropy(found, targets)


@settings(max_examples=60)
@given(
    st.lists(st.dictionaries(st.integers(0, (1 << 30) - 1), st.integers(1, 65535), max_size=12), max_size=6)
)
def test_any_sorted_ids_and_counts_survive(positions: list[dict[int, int]]) -> None:
    """Ids, gaps and levels from everywhere in their ranges, and positions without entries."""
    entries = [entry for position in positions for entry in sorted(position.items())]
    counts = torch.tensor([len(position) for position in positions], dtype=torch.int64)
    draw_counts = torch.tensor([count for _, count in entries], dtype=torch.int32)
    policy = Random(draws=65535)
    targets = SparseTargets(
        offsets=torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        ids=torch.tensor([token for token, _ in entries], dtype=torch.int32),
        logprobs=(draw_counts.double() / 65535).log().half(),
        policy=policy,
        temperatures=(1.0,),
        log_normalizers=torch.zeros(len(positions), 0),
        entropy=torch.zeros(len(positions), 1),
        draw_counts=draw_counts,
    )
    with pytest.MonkeyPatch.context() as patch:  # no policy draws just these
        patch.setattr("shared.codec.payload.require_possible", lambda targets, vocab_size: None)
        found = decode([encode(targets)], policy=policy, vocab_size=1 << 30)
    _assert_same_but_entropy(found, targets)


def test_no_payloads_and_empty_payloads() -> None:
    for policy, temperatures in _CASES:
        nothing = decode([], policy=policy, temperatures=temperatures, vocab_size=10)
        assert (nothing.num_positions, nothing.num_entries) == (0, 0)
        empty = encode(_targets(policy, temperatures, 0))
        assert len(empty) < 16
        found = decode([empty] * 3, policy=policy, temperatures=temperatures, vocab_size=10)
        assert (found.num_positions, found.num_entries) == (0, 0)


def test_a_long_row() -> None:
    targets = _targets(Threshold(tau=1 / 512), (1.0,), 3000, vocab_size=600)
    payload = encode(targets)
    assert targets.num_entries > 1 << 17  # more symbols than a zstd block holds
    found = decode([payload], policy=targets.policy, vocab_size=600)
    _assert_same_but_entropy(found, targets)


def test_an_example_beyond_the_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.codec.payload._MAX_SYMBOLS", 50)
    targets = _targets(TopK(k=10), (1.0,), 6)
    with pytest.raises(RecipeError, match="60 entries found, at most 50"):
        encode(targets)
    assert encode(targets.slice(0, 5))


def test_equal_targets_give_equal_bytes_in_another_process() -> None:
    """No hash order, thread or history of the compressor shows."""
    targets = _targets(Threshold(tau=1 / 64), (1.0,), 30)
    first = encode(targets)
    encode(_targets(Threshold(tau=1 / 512), (1.0,), 50, seed=3))
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert pool.apply(encode, (targets,)) == first
    assert encode(targets) == first


def test_a_confident_answer_is_nearly_free() -> None:
    """What temperature 1 does not need is not there: sixteen certain positions take a few bytes each."""
    logprobs = torch.full((16, 1000), -torch.inf)
    logprobs[torch.arange(16), torch.arange(16) * 50] = 0.0
    targets = sparsify(logprobs, Threshold(), seeds=position_seeds(0, b"", 16))
    assert len(encode(targets)) <= 16 * 4


# Damage.


def _decode_damaged(payload: bytes, policy: Policy, temperatures: tuple[float, ...]) -> None:
    """Either the error for damage, or targets that nothing downstream can trip over."""
    try:
        found = decode([payload], policy=policy, temperatures=temperatures, vocab_size=VOCAB_SIZE)
    except CacheFormatError:
        return
    ids, counts = found.ids.long(), found.counts
    assert int(counts.sum()) == found.num_entries
    assert ((ids >= 0) & (ids < VOCAB_SIZE)).all()
    is_next = found.position_index.diff() == 0
    assert (ids.diff()[is_next] > 0).all()
    assert ((found.logprobs <= 0) & found.logprobs.isfinite()).all()
    assert found.log_normalizers.isfinite().all()
    if isinstance(policy, Random):
        assert ((found.draw_counts >= 1) & (found.draw_counts <= policy.draws)).all()


@pytest.mark.parametrize(("policy", "temperatures"), _CASES)
def test_every_truncation_is_noticed(policy: Policy, temperatures: tuple[float, ...]) -> None:
    payload = encode(_targets(policy, temperatures, 9, seed=2))
    step = max(1, len(payload) // 300)
    for size in [*range(0, len(payload) - 1, step), len(payload) - 1]:
        with pytest.raises(CacheFormatError):
            decode([payload[:size]], policy=policy, temperatures=temperatures, vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize(("policy", "temperatures"), _CASES)
def test_more_bytes_are_noticed(policy: Policy, temperatures: tuple[float, ...]) -> None:
    payload = encode(_targets(policy, temperatures, 9, seed=2))
    for extra in (b"\0", b"\xff", bytes(1000)):
        with pytest.raises(CacheFormatError):
            decode([payload + extra], policy=policy, temperatures=temperatures, vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize(("policy", "temperatures"), _CASES)
def test_flipped_bits_never_do_worse_than_an_error(policy: Policy, temperatures: tuple[float, ...]) -> None:
    payload = encode(_targets(policy, temperatures, 6, seed=4))
    generator = random.Random(0)
    for bit in generator.sample(range(8 * len(payload)), min(8 * len(payload), 400)):
        damaged = bytearray(payload)
        damaged[bit // 8] ^= 1 << bit % 8
        _decode_damaged(bytes(damaged), policy, temperatures)


@pytest.mark.parametrize(("policy", "temperatures"), _CASES[:1] + _CASES[-2:])
def test_random_bytes_never_do_worse_than_an_error(policy: Policy, temperatures: tuple[float, ...]) -> None:
    generator = random.Random(1)
    for _ in range(400):
        _decode_damaged(generator.randbytes(generator.randrange(60)), policy, temperatures)
    for _ in range(400):  # a sound beginning
        head = bytes([1 << 5 | 13, generator.randrange(40)])
        _decode_damaged(head + generator.randbytes(generator.randrange(60)), policy, temperatures)


def _payload_of_symbols(symbols: bytes, bits: bytes, *, id_bits: int = 13) -> bytes:
    compressor = zstandard.ZstdCompressor(dict_data=zstandard.ZstdCompressionDict(DICTIONARY))
    frame = compressor.compress(symbols)[4:]
    return bytes([1 << 5 | id_bits, len(frame) & 127 | 128, len(frame) >> 7]) + frame + bits


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "no byte"),
        (bytes([2 << 5, 0]), "version 2 found, 1 needed"),
        (bytes([1 << 5]), "length"),
        (bytes([1 << 5, 0x80, 0x80, 0x80, 0x80, 0x80]), "length"),
        (bytes([1 << 5, 9, 1, 2]), "length"),
        (_payload_of_symbols(bytes([0]), b""), "begin with a position"),
        (_payload_of_symbols(bytes([128 + 14]), bytes(2)), "impossible symbol"),
        (_payload_of_symbols(bytes([128 + 31, 0]), b""), "impossible symbol"),
        (_payload_of_symbols(bytes([128 + 32 + 31]), b""), "impossible symbol"),
        (_payload_of_symbols(bytes([128 + 13]), b"\0"), "bits"),
        (_payload_of_symbols(bytes([128 + 13]), bytes(3)), "bits"),
        (_payload_of_symbols(bytes([128 + 13]), b"\xff\xff"), "bits after"),
        (_payload_of_symbols(bytes([128 + 13]), b"\xff\x0f"), "vocabulary"),
        (_payload_of_symbols(bytes([128 + 3, 3]), b"\x0f", id_bits=3), "more bits than it announces"),
        (_payload_of_symbols(bytes([128 + 64]), b"\x3f", id_bits=0), "level above"),
        (_payload_of_symbols(bytes(2**24 + 1), b""), "length"),
    ],
)
def test_each_fault_is_told(payload: bytes, message: str) -> None:
    with pytest.raises(CacheFormatError, match=message):
        decode([payload], policy=Threshold(tau=1 / 16), vocab_size=VOCAB_SIZE)


def test_a_fault_is_told_with_its_row() -> None:
    policy = Threshold(tau=1 / 64)
    sound = encode(_targets(policy, (1.0,), 5))
    for damaged, row in ((b"", 2), (sound + b"\0", 2), (sound[:-1], 2)):
        with pytest.raises(CacheFormatError, match=rf"\b{row} of the batch"):
            decode([sound, sound, damaged], policy=policy, vocab_size=VOCAB_SIZE)


def test_a_payload_of_other_settings_is_noticed_where_it_can_be() -> None:
    targets = _targets(Threshold(tau=1 / 64), (1.0, 2.0), 20)
    payload = encode(targets)
    with pytest.raises(CacheFormatError):
        decode([payload], policy=targets.policy, temperatures=(1.0,), vocab_size=VOCAB_SIZE)
    with pytest.raises(CacheFormatError):
        decode([payload], policy=targets.policy, temperatures=(1.0, 2.0, 3.0), vocab_size=VOCAB_SIZE)
    with pytest.raises(CacheFormatError, match="vocabulary"):
        decode([payload], policy=targets.policy, temperatures=(1.0, 2.0), vocab_size=100)
