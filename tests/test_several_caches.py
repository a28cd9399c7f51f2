"""Several caches as one: a list equals its merge, a mix adds up, and what cannot be read together is told."""

from __future__ import annotations

import json
import os
import pickle
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from cache_examples import VERSIONS, capture, make_identity, make_key, make_row
from click.testing import CliRunner
from stage2_runs import make_recipe

from shared.cache import (
    CacheList,
    CacheMix,
    CacheReader,
    CacheWriter,
    Identity,
    PromptIdentity,
    Row,
    SkippedRow,
    Staging,
    cache_list,
    open_caches,
    overlap,
    together,
)
from shared.cache import reader as reader_module
from shared.cache.merge import merge
from shared.errors import CacheFormatError, CacheMismatchError, RecipeError
from shared.recipes import CacheConfig
from shared.recipes.policies import Random, Threshold, TopK
from shared.shard_order import ShardLayout, ShardOrder
from stage1_teacher.__main__ import commands
from stage2_student.training.inputs import shuffle_window

PARTS = {"a": range(12), "b": range(12, 19), "c": range(19, 31)}


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    for name, numbers in PARTS.items():
        capture(tmp_path / name, numbers)
    return [str(tmp_path / name) for name in PARTS]


@pytest.fixture(params=[None, 7], ids=["at once", "in ranges"])
def keys_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(overlap, "KEYS_AT_ONCE", request.param)


def assert_same_targets(ours: Any, theirs: Any) -> None:
    for name in ("offsets", "ids", "logprobs", "log_normalizers", "entropy", "draw_counts"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.mark.parametrize("policy", [Threshold(tau=1 / 16), Random(draws=9), TopK(k=4)], ids=str)
def test_a_list_gives_what_the_merged_cache_gives_bit_for_bit(
    tmp_path: Path, policy: Any, keys_at_once: None
) -> None:
    identity = make_identity(policy=policy, temperatures=(1.0,))
    for name, numbers in PARTS.items():
        capture(tmp_path / name, numbers, identity=identity)
    places = [str(tmp_path / name) for name in PARTS]
    merge(places, str(tmp_path / "merged"), created_by=VERSIONS)
    cache, merged = CacheList(places), CacheReader(str(tmp_path / "merged"))
    keys = [make_key(number) for number in (30, 0, 13, 5, 18, 19, 29)]
    (ids, targets), (merged_ids, merged_targets) = cache.read(keys), merged.read(keys)
    assert [one.tolist() for one in ids] == [one.tolist() for one in merged_ids]
    assert_same_targets(targets, merged_targets)
    assert len(cache) == len(merged) == 31
    assert list(cache.keys()) == list(merged.keys())
    assert cache.num_positions(keys).tolist() == merged.num_positions(keys).tolist()
    assert cache.shards(keys).tolist() == merged.shards(keys).tolist()
    assert cache.shards(keys).dtype == np.int64
    asked = [*keys, make_key(99)]
    assert cache.contains(asked).tolist() == merged.contains(asked).tolist() == [True] * 7 + [False]
    assert keys[0] in cache
    assert make_key(99) not in cache
    assert cache.read([])[1].num_positions == 0


def test_a_list_has_the_log_probs_of_written_tokens_that_its_caches_have(
    tmp_path: Path, places: list[str]
) -> None:
    identity = make_identity(label_log_prob=True)
    for name, numbers in PARTS.items():
        capture(tmp_path / f"{name}-told", numbers, identity=identity)
    told = [str(tmp_path / f"{name}-told") for name in PARTS]
    cache = CacheList(told)
    rows = cache.rows([make_key(number) for number in (30, 0, 13)])
    wanted = np.concatenate([make_row(number, identity).label_log_prob for number in (30, 0, 13)])
    assert cache.has_label_log_prob
    assert cache.label_log_probs(rows).tolist() == wanted.tolist()
    assert not CacheList(places).has_label_log_prob
    with pytest.raises(CacheMismatchError, match=r"targets\.label_log_prob: true in .*a-told, false in .*b"):
        CacheList([told[0], places[1]])
    inputs = identity.inputs
    assert CacheMix([told[0], places[0]]).require_student(inputs, temperature=1.0) == ()
    with pytest.raises(CacheMismatchError, match=r"targets\.label_log_prob"):
        CacheList(places).require_student(inputs, temperature=1.0, label_log_prob=True)


def test_a_row_of_two_caches_is_refused_or_the_first_one_s(tmp_path: Path, keys_at_once: None) -> None:
    """The shared rows differ in what the teacher's loss was, so that it shows whose they are."""
    for name, numbers, shift in (
        ("a", range(10), 0.0),
        ("b", range(7, 15), 100.0),
        ("c", range(9, 12), 200.0),
    ):
        rewritten(tmp_path / name, numbers, shift=shift)
    a, b, c = (str(tmp_path / name) for name in "abc")
    with pytest.raises(CacheMismatchError) as refused:
        CacheList([a, b, c])
    told = str(refused.value)
    assert f"caches {a}, {b}, {c}: 5 example(s) are in more than one of them" in told
    assert f"3 in {a} and in {b}" in told
    assert f"3 in {b} and in {c}" in told
    assert "cache.duplicates to first" in told
    keys = [make_key(number) for number in (6, 8, 9, 11, 14)]
    for order, owners in (([a, b, c], "aaabb"), ([b, a, c], "abbbb"), ([c, a, b], "aaccb")):
        cache = CacheList(order, duplicates="first")
        shifts = {"a": 0.0, "b": 100.0, "c": 200.0}
        found = [row.ce_sum for row in cache.rows(keys)]
        wanted = [make_row(n).ce_sum + shifts[o] for n, o in zip((6, 8, 9, 11, 14), owners, strict=True)]
        assert found == pytest.approx(wanted, rel=1e-6)
        assert len(cache) == 15
        assert sorted(cache.keys()) == sorted(make_key(number) for number in range(15))


def rewritten(folder: Path, numbers: range, *, shift: float, identity: Identity | None = None) -> None:
    identity = identity or make_identity()
    with CacheWriter.open(str(folder), identity, created_by=VERSIONS) as writer:
        plan = writer.plan([(make_key(number), number) for number in numbers], examples_per_shard=4)
        for unit in plan.units:
            with writer.unit(unit) as shard:
                for number in unit.rows.tolist():
                    row = make_row(number, identity)
                    values = vars(row) | {"ce_sum": row.ce_sum + shift}
                    shard.add(Row(**values))
        writer.commit(plan)


def test_a_list_of_one_is_that_cache(places: list[str]) -> None:
    keys = [make_key(number) for number in (3, 0, 11)]
    assert_same_targets(CacheList(places[:1]).read(keys)[1], CacheReader(places[0]).read(keys)[1])


def test_caches_are_compared_in_pairs_with_both_names_and_every_difference(tmp_path: Path) -> None:
    capture(tmp_path / "a", range(5))
    capture(tmp_path / "b", range(5, 10))
    capture(
        tmp_path / "c",
        range(10, 15),
        identity=make_identity(weights_fingerprint="w1", template_fingerprint="c1"),
    )
    capture(tmp_path / "d", range(15, 20), identity=make_identity(policy=Threshold(tau=1 / 4)))
    a, b, c, d = (str(tmp_path / name) for name in "abcd")
    with pytest.raises(CacheMismatchError) as refused:
        CacheList([a, b, c, d])
    told = str(refused.value)
    assert f"cache {c} beside cache {a}: 2 difference(s):" in told
    assert f'teacher.weights_fingerprint: "w0" in {a}, "w1" in {c}' in told
    assert f'inputs.template_fingerprint: "c0" in {a}, "c1" in {c}' in told
    assert f"cache {d} beside cache {a}: 1 difference(s):" in told
    assert "targets.policy: " in told
    assert f"cache {b} beside" not in told
    with pytest.raises(CacheMismatchError) as allowed:
        CacheList([a, b, c, d], teachers="many")
    assert "weights_fingerprint" not in str(allowed.value)
    assert "template_fingerprint" in str(allowed.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_fingerprint": "t1"},
        {"vocab_size": 96},
        {"max_answer_tokens": 16},
        {"dtype": "bfloat16"},
        {"image_processor_fingerprint": "i1"},
        {"policy": Random(draws=3)},
        {"temperatures": (1.0, 2.0), "policy": Threshold(tau=1 / 16, values="fp16")},
    ],
    ids=str,
)
def test_what_makes_other_rows_keeps_a_list_apart(tmp_path: Path, changes: dict[str, Any]) -> None:
    capture(tmp_path / "a", range(5))
    with CacheWriter.open(str(tmp_path / "b"), make_identity(**changes), created_by=VERSIONS) as writer:
        writer.commit(writer.plan([], examples_per_shard=5))
    with pytest.raises(CacheMismatchError, match=f"in {tmp_path}/a, .* in {tmp_path}/b"):
        CacheList([str(tmp_path / "a"), str(tmp_path / "b")])


def test_days_that_differ_keep_caches_apart(tmp_path: Path) -> None:
    for name, day in (("a", "2026-01-31"), ("b", "2026-02-01")):
        prompt = PromptIdentity(system_prompt=None, date=day, thinking=None, train_on="all", rendered="r")
        capture(tmp_path / name, PARTS[name], identity=make_identity().model_copy(update={"prompt": prompt}))
    for opened in (CacheList, CacheMix):
        with pytest.raises(
            CacheMismatchError, match=r"prompt\.date: \"2026-01-31\" in .*a, \"2026-02-01\" in .*b"
        ):
            opened([str(tmp_path / "a"), str(tmp_path / "b")])


def test_a_row_s_teacher_is_known(tmp_path: Path) -> None:
    """The same weights under another name are one teacher; other weights of one name are two."""
    named = [("large", "w0"), ("renamed", "w0"), ("large", "w1")]
    for number, (name, weights) in enumerate(named):
        identity = make_identity(name=name, weights_fingerprint=weights)
        capture(tmp_path / str(number), range(5 * number, 5 * number + 5), identity=identity)
    places = [str(tmp_path / str(number)) for number in range(3)]
    keys = [make_key(number) for number in (12, 1, 7)]
    cache = CacheList(places, teachers="many")
    assert cache.teachers(keys) == ["large (weights w1)", "large (weights w0)", "large (weights w0)"]
    assert cache.teacher_names == ("large (weights w0)", "large (weights w1)")
    alike = CacheList(places[:2])
    assert alike.teacher_names == ("large",)
    assert any("teacher.name" in notice for notice in alike.notices)
    assert CacheReader(places[2]).teachers(keys[:1]) == ["large"]
    digests = [cache.teachers_digest(some) for some in (keys, keys[1:], keys[:1])]
    assert digests[1:] == ["w0", "w1"]
    assert digests[0] != CacheList(places[::-1], teachers="many").teachers_digest(keys[::-1])
    assert digests[0] == CacheList(places[::-1], teachers="many").teachers_digest(keys)
    assert alike.teachers_digest(keys[1:]) == CacheReader(places[0]).teachers_digest(keys[1:2]) == "w0"


def test_missing_rows_are_named_and_counted(places: list[str]) -> None:
    cache = CacheList(places)
    keys = [make_key(number) for number in (3, 77, 78)]
    names = ["train[0]", "train[1]", "train[2]"]
    with pytest.raises(
        CacheMismatchError, match=r"none of them has example train\[1\] \(key .*\), nor 1 others of the 3"
    ):
        cache.rows(keys, names=names)
    ((lacking, missing),) = cache.lacking(keys)
    assert lacking is cache
    assert missing.tolist() == [1, 2]
    assert cache.lacking(keys[:1]) == []


def test_all_caches_that_cannot_be_opened_are_named(places: list[str], tmp_path: Path) -> None:
    with pytest.raises(CacheFormatError) as refused:
        CacheList([places[0], str(tmp_path / "x"), str(tmp_path / "y")])
    assert str(refused.value).count("no manifest.json") == 2
    with pytest.raises(CacheMismatchError, match="no cache is named"):
        CacheList([])


def test_a_damaged_row_is_told_with_its_own_cache(places: list[str], tmp_path: Path) -> None:
    shards = Path(places[1]) / "shards"
    victim = sorted(shards.iterdir())[0]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    cache = CacheList(places)
    with pytest.raises(CacheFormatError, match=f"cache {places[1]}"):
        cache.rows([make_key(number) for number in PARTS["b"]])
    cache.rows([make_key(number) for number in PARTS["a"]])


def test_a_payload_that_cannot_be_decoded_is_told_with_its_own_cache(places: list[str]) -> None:
    cache = CacheList(places)
    rows = cache.rows([make_key(number) for number in (0, 14, 20)])
    broken = Row(**(vars(rows[1]) | {"payload": b"nonsense"}))
    with pytest.raises(CacheFormatError, match=f"cache {places[1]}, example {make_key(14).hex()}"):
        cache.targets([rows[0], broken, rows[2]])


def test_rows_skipped_in_one_cache_and_held_by_another_are_not_skipped(tmp_path: Path) -> None:
    for name, numbers, skipped in (("a", range(3), (4, 8)), ("b", range(3, 6), (8,))):
        identity = make_identity()
        rows = [
            SkippedRow(row=f"train[{n}]", reason=f"no {n} in {name}", key=make_key(n).hex()) for n in skipped
        ]
        with CacheWriter.open(str(tmp_path / name), identity, created_by=VERSIONS) as writer:
            plan = writer.plan([(make_key(n), n) for n in numbers], examples_per_shard=3, skipped=rows)
            for unit in plan.units:
                with writer.unit(unit) as shard:
                    for number in unit.rows:
                        shard.add(make_row(int(number)))
            writer.commit(plan)
    places = [str(tmp_path / name) for name in "ab"]
    assert CacheList(places).skipped == {make_key(8).hex(): "no 8 in a"}
    assert CacheReader(places[0]).skipped == {make_key(4).hex(): "no 4 in a", make_key(8).hex(): "no 8 in a"}
    assert set(CacheMix(places).skipped) == {make_key(n).hex() for n in (4, 8)}
    assert CacheMix(places).skipped[make_key(8).hex()] == f"{places[0]}: no 8 in a"


def test_it_is_sent_to_workers_without_comparing_again(
    places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = CacheList(places)
    mixed = CacheMix([places[0]])
    monkeypatch.setattr(cache_list.Overlap, "of", pytest.fail)
    monkeypatch.setattr(together, "beside", pytest.fail)
    keys = [make_key(number) for number in (3, 14, 30)]
    received = pickle.loads(pickle.dumps(cache))
    assert_same_targets(received.read(keys)[1], cache.read(keys)[1])
    assert received.fingerprint == cache.fingerprint
    assert torch.equal(
        pickle.loads(pickle.dumps(mixed)).read(keys[:1])[1].weights(), mixed.read(keys[:1])[1].weights()
    )


def test_the_fingerprint_depends_on_contents_and_order_and_not_on_places(
    places: list[str], tmp_path: Path
) -> None:
    Path(places[0]).rename(tmp_path / "moved")
    moved = [str(tmp_path / "moved"), *places[1:]]
    found = [
        CacheList(moved).fingerprint,
        CacheList(moved[::-1]).fingerprint,
        CacheList(moved[:2]).fingerprint,
        CacheMix(moved[:1]).fingerprint,
        CacheReader(moved[0]).fingerprint,
    ]
    assert len(set(found)) == len(found)
    (tmp_path / "moved").rename(places[0])
    assert CacheList(places).fingerprint == found[0]


def test_together_they_map_no_more_than_one(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "MAX_OPEN_SHARDS", 6)
    cache = CacheList(places)
    cache.rows([make_key(number) for number in range(31)])
    assert [len(part._shards) for part in cache.parts] == [2, 2, 2]
    received = pickle.loads(pickle.dumps(cache))
    received.rows([make_key(number) for number in range(31)])
    assert [len(part._shards) for part in received.parts] == [2, 2, 2]


def test_shards_are_counted_in_64_bits(places: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As of caches with more shards, and places, together than 32 bits hold."""
    monkeypatch.setattr(CacheReader, "num_shards", 3_000_000_000)
    cache = CacheList(places)
    assert cache.shards([make_key(number) for number in (0, 14, 30)]).tolist() == [
        0,
        3_000_000_000,
        6_000_000_002,
    ]


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """One local, two in a remote storage."""
    monkeypatch.setenv("TEACHONCE_STAGING", str(tmp_path / "staging"))
    root = f"memory://several-{time.time_ns()}"
    places = [str(tmp_path / "a"), f"{root}/b", f"{root}/c"]
    for place, numbers in zip(places, PARTS.values(), strict=True):
        capture(place, numbers)
    yield places
    fsspec.filesystem("memory").rm(root.removeprefix("memory:/"), recursive=True)


def test_remote_and_local_caches_share_one_staging_folder_and_one_bound(
    remote: list[str], tmp_path: Path
) -> None:
    local = CacheReader(remote[0])
    sizes = [shard.bytes for place in remote[1:] for shard in CacheReader(place).manifest.shards]
    tables = [file.bytes for place in remote[1:] for file in CacheReader(place).manifest.files]
    bound = sum(tables) + 2 * max(sizes)
    staging = Staging(tmp_path / "bounded", max_bytes=bound)
    cache = CacheList(remote, staging=staging)
    assert cache.staging_bytes == bound
    assert CacheList(remote[:1]).staging_bytes is None
    keys = [make_key(number) for number in (0, 14, 30, 12, 19, 22, 27, 5)]
    for _ in range(2):
        cache.rows(keys)
        held = sum(path.stat().st_size for path in (tmp_path / "bounded").glob("*.arrow"))
        assert held <= bound
    names = {path.stem for path in (tmp_path / "bounded").glob("*.arrow")}
    assert not names & {shard.sha256 for shard in local.manifest.shards}


@pytest.mark.parametrize("kind", ["list", "mix"])
def test_an_order_by_shards_fetches_each_shard_once(
    remote: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Of a list the remote ones', of a mix those of all that are remote, one of each at a time."""
    if kind == "mix":
        for place in (remote[1].replace("/b", "/d"), remote[1].replace("/b", "/e")):
            capture(place, range(40))
    places = remote if kind == "list" else [remote[1].replace("/b", "/d"), remote[1].replace("/b", "/e")]
    manifests = [CacheReader(place).manifest for place in places if "://" in place]
    together = sum(max(shard.bytes for shard in one.shards) for one in manifests) if kind == "mix" else 0
    largest = together or max(shard.bytes for one in manifests for shard in one.shards)
    monkeypatch.setenv("TEACHONCE_STAGING", str(tmp_path / "bounded"))
    monkeypatch.setenv(
        "TEACHONCE_STAGING_BYTES",
        str(sum(file.bytes for one in manifests for file in one.files) + 5 * largest // 2),
    )
    config = {"path": places} if kind == "list" else {"mix": [{"path": place} for place in places]}
    recipe = make_recipe(
        {
            "data": {"source": "nowhere"},
            "teacher": {"model": "teacher"},
            "cache": config,
            "student": {"model": "student"},
            "optimization": {"max_steps": 1},
            "run": {"name": "run"},
        }
    )
    assert recipe.cache is not None
    cache = open_caches(recipe.cache)
    window = shuffle_window(recipe, cache)
    assert window == 1
    fetched: Counter[str] = Counter()
    download = Staging._download

    def counted(self: Staging, source: Any, name: str, *args: Any, **options: Any) -> None:
        fetched[name] += 1
        download(self, source, name, *args, **options)

    monkeypatch.setattr(Staging, "_download", counted)
    keys = list(cache.keys())
    fetched.clear()
    order = ShardOrder(ShardLayout.of(cache.shards(keys)), window=window, key=3)
    for place in order[np.arange(len(keys))].tolist():
        cache.rows([keys[place]])
    assert max(fetched.values()) == 1
    assert len(fetched) > len(manifests)
    assert sum(path.stat().st_size for path in (tmp_path / "bounded").glob("*.arrow")) <= int(
        os.environ["TEACHONCE_STAGING_BYTES"]
    )


# --- mixes -----------------------------------------------------------------------------------------------


@pytest.fixture
def mixable(tmp_path: Path) -> list[str]:
    """Two teachers' caches: rows 0 to 11 are in both."""
    for name, numbers in (("one", range(12)), ("two", range(14))):
        identity = make_identity(name=name, weights_fingerprint=name)
        identity = identity.model_copy(
            update={"targets": identity.targets.model_copy(update={"seed": len(numbers)})}
        )
        rewritten(tmp_path / name, numbers, shift=10.0 * len(numbers), identity=identity)
    return [str(tmp_path / name) for name in ("one", "two")]


def test_a_mix_adds_up_what_its_caches_give(mixable: list[str], keys_at_once: None) -> None:
    cache = CacheMix(mixable, weights=[0.7, 0.3])
    keys = [make_key(number) for number in (11, 0, 4)]
    answer_ids, targets = cache.read(keys)
    (ids, one), (_, other) = (CacheReader(place).read(keys) for place in mixable)
    assert [a.tolist() for a in answer_ids] == [a.tolist() for a in ids]
    total = torch.zeros(targets.num_positions, 97, dtype=torch.float64)
    for part, share in ((one, 0.7), (other, 0.3)):
        total[part.position_index, part.ids.long()] += share * part.weights(1.0, torch.float64)
    ours = torch.zeros_like(total)
    ours[targets.position_index, targets.ids.long()] = targets.weights(1.0, torch.float64)
    torch.testing.assert_close(ours, total, rtol=1e-14, atol=0)
    rows = cache.rows(keys)
    assert [row.ce_sum for row in rows] == pytest.approx([make_row(n).ce_sum + 126.0 for n in (11, 0, 4)])
    assert len(cache) == 12
    assert sorted(cache.keys()) == sorted(make_key(number) for number in range(12))
    assert cache.teacher_names == ("0.7 one + 0.3 two",)
    assert cache.num_positions(keys).tolist() == [row.num_positions for row in rows]
    assert cache.shards(keys).tolist() == CacheReader(mixable[0]).shards(keys).tolist()
    assert cache.targets([]).num_positions == 0


def test_rows_that_one_cache_of_a_mix_lacks_are_refused_with_their_number(mixable: list[str]) -> None:
    cache = CacheMix(mixable)
    keys = [make_key(number) for number in (1, 12, 13)]
    assert cache.contains(keys).tolist() == [True, False, False]
    ((part, missing),) = cache.lacking(keys)
    assert (part.location, missing.tolist()) == (mixable[0], [1, 2])
    with pytest.raises(
        CacheMismatchError,
        match=rf"cache {mixable[0]} has not example b \(key .*\), nor 1 others of the 3 asked for",
    ):
        cache.rows(keys, names=["a", "b", "c"])


def test_answers_that_differ_between_the_caches_of_a_mix_are_refused(
    mixable: list[str], tmp_path: Path
) -> None:
    identity = make_identity(weights_fingerprint="three")
    with CacheWriter.open(str(tmp_path / "three"), identity, created_by=VERSIONS) as writer:
        plan = writer.plan([(make_key(3), 3)], examples_per_shard=4)
        with writer.unit(plan.units[0]) as shard:
            row = make_row(3, identity)
            shard.add(Row(**(vars(row) | {"answer_ids": row.answer_ids[::-1] + 1})))
        writer.commit(plan)
    cache = CacheMix([mixable[0], str(tmp_path / "three")])
    with pytest.raises(
        CacheMismatchError, match=rf"tokens in cache {tmp_path}/three and .* in cache {mixable[0]}"
    ):
        cache.rows([make_key(3)])


def test_a_mix_of_other_policies_or_without_a_common_temperature_is_refused(tmp_path: Path) -> None:
    warm = make_identity(policy=Random(draws=5), temperatures=(2.0,))
    capture(tmp_path / "a", range(3), identity=make_identity(policy=Random(draws=5)))
    capture(tmp_path / "b", range(3), identity=warm)
    capture(tmp_path / "c", range(3))
    capture(tmp_path / "d", range(3), identity=make_identity(policy=Random(draws=5), temperatures=(1.0, 2.0)))
    a, b, c, d = (str(tmp_path / name) for name in "abcd")
    with pytest.raises(CacheMismatchError, match=rf"no temperature is in all of them: {a} 1\.0; {b} 2\.0"):
        CacheMix([a, b])
    with pytest.raises(CacheMismatchError, match=rf"(?s)cache {c} beside cache {a}.*targets\.policy"):
        CacheMix([a, c])
    assert CacheMix([a, d]).temperatures == (1.0,)
    assert CacheMix([d, b]).read([make_key(1)])[1].temperatures == (2.0,)


@pytest.mark.parametrize("weights", [[0.5], [0.5, 0.6], [1.5, -0.5], []])
def test_weights_of_a_mix_are_as_many_and_sum_to_one(mixable: list[str], weights: list[float]) -> None:
    with pytest.raises(CacheMismatchError, match="sum to 1"):
        CacheMix(mixable, weights=weights)


def test_a_student_is_compared_with_each(mixable: list[str], tmp_path: Path) -> None:
    inputs = make_identity().inputs
    for cache in (CacheMix(mixable), CacheList([mixable[0]])):
        other = inputs.model_copy(update={"tokenizer_fingerprint": "t9"})
        with pytest.raises(CacheMismatchError) as refused:
            cache.require_student(other, temperature=3.0)
        assert str(refused.value).count("inputs.tokenizer_fingerprint") == len(cache.parts)
    assert CacheMix(mixable).require_student(inputs, temperature=1.0, seed=0) == ()  # whatever their seeds
    with pytest.raises(CacheMismatchError, match=r"targets\.seed"):
        CacheList(mixable[:1]).require_student(inputs, temperature=1.0, seed=0)
    seen = inputs.model_copy(update={"image_processor_fingerprint": "i9"})
    notices = CacheMix(mixable).require_student(seen, temperature=1.0)
    assert [notice.split(":")[0] for notice in notices] == [f"cache {place}" for place in mixable]


# --- what recipes and tools name ---------------------------------------------------------------------------


def test_a_recipe_names_one_a_list_or_a_mix(places: list[str], mixable: list[str]) -> None:
    assert isinstance(open_caches(CacheConfig(path=places[0])), CacheReader)
    assert isinstance(open_caches(CacheConfig(path=(places[0],))), CacheReader)
    assert isinstance(open_caches(CacheConfig(path=tuple(places))), CacheList)
    mixed = CacheConfig.model_validate({"mix": [{"path": one} for one in mixable]})
    opened = open_caches(mixed)
    assert isinstance(opened, CacheMix)
    assert opened.weights == (0.5, 0.5)
    assert mixed.has_many_teachers
    with pytest.raises(RecipeError, match=r"cache\.path names .* a capture writes one"):
        CacheConfig(path=tuple(places)).location  # noqa: B018


def test_inspect_tells_of_each_and_of_all_together(places: list[str], mixable: list[str]) -> None:
    alone = CliRunner().invoke(commands, ["inspect", places[0]], catch_exceptions=False)
    shown = CliRunner().invoke(commands, ["inspect", *places[:2]], catch_exceptions=False)
    assert alone.output.rstrip() in shown.output
    assert shown.output.count("holds      ") == 2
    assert "cache.path, a list         19 examples; teacher" in shown.output
    shown = CliRunner().invoke(commands, ["inspect", *mixable, "--json"], catch_exceptions=False)
    told = json.loads(shown.output)
    assert [one["totals"]["examples"] for one in told["caches"]] == [12, 14]
    assert "weights_fingerprint" in told["together"]["list"]["refused"]
    assert "seed" in told["together"]["list_of_many_teachers"]["refused"]
    assert told["together"]["mix"]["examples"] == 12


def test_verify_reads_all(places: list[str]) -> None:
    victim = sorted((Path(places[1]) / "shards").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:-1])
    done = CliRunner().invoke(commands, ["verify", *places], standalone_mode=False)
    assert done.return_value == CacheFormatError.exit_status
    assert f"{places[0]}: 0 fault(s)" in done.output
    assert f"{places[1]}: 0 fault(s)" not in done.output
    assert f"{places[2]}: 0 fault(s)" in done.output
