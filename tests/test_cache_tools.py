"""verify, merge, export and inspect."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from cache_examples import (
    VERSIONS,
    VOCAB_SIZE,
    capture,
    files_of,
    keys_and_rows,
    make_example,
    make_identity,
    make_key,
    make_row,
)
from click.testing import CliRunner
from PIL import Image

from shared import codec
from shared.cache import CacheReader, CacheWriter, DataSource, Row, SkippedRow
from shared.cache.export import export
from shared.cache.format import sha256_hex
from shared.cache.inspect import inspect
from shared.cache.layout import list_name
from shared.cache.manifest import Manifest, content_hash
from shared.cache.merge import merge
from shared.cache.segments import FileInfo
from shared.cache.shard_list import ShardList
from shared.cache.verify import verify
from shared.errors import CacheFormatError, CacheMismatchError
from shared.recipes.policies import Random, Threshold, TopK, TopP
from shared.sparse import SparseTargets
from shared.temporaries import temporary_name
from stage1_teacher.__main__ import commands
from stage1_teacher.inspection.plots import plot_cache
from stage1_teacher.inspection.report import write_cache_report


def capture_changed(path: Path, change: Callable[[Row], Row], numbers: Sequence[int] = range(9)) -> None:
    """A cache in which example 4 was written wrong, so that every hash fits."""
    with CacheWriter.open(str(path), make_identity(), created_by=VERSIONS) as writer:
        plan = writer.plan(keys_and_rows(numbers), examples_per_shard=6)
        for unit in plan.units:
            with writer.unit(unit) as shard:
                for number in unit.rows:
                    row = make_row(int(number))
                    shard.add(change(row) if number == 4 else row)
        writer.commit(plan)


def keep_first_entries(row: Row) -> Row:
    targets = make_example(4)[1]
    first = targets.offsets[:-1]
    offsets = torch.arange(len(first) + 1)
    kept = replace(targets, offsets=offsets, ids=targets.ids[first], logprobs=targets.logprobs[first])
    return replace(row, payload=codec.encode(kept), num_entries=kept.num_entries)


def cut_last_position(row: Row) -> Row:
    targets: SparseTargets = make_example(4)[1]
    return replace(row, payload=codec.encode(targets.slice(0, targets.num_positions - 1)))


@pytest.mark.parametrize(
    "policy", [Threshold(tau=1 / 16), Threshold(), TopK(k=5), TopP(p=0.8), Random(draws=20)]
)
@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 2.0), (3.0,)])
def test_a_sound_cache_has_no_faults(tmp_path: Path, policy, temperatures) -> None:
    capture(tmp_path, range(40), identity=make_identity(policy=policy, temperatures=temperatures))
    seen = []
    verification = verify(str(tmp_path), on_shard=seen.append)
    assert verification.faults == verification.notes == ()
    assert len(seen) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: replace(row, answer_ids=row.answer_ids[:-1]), "5 positions, 4 needed"),
        (lambda row: replace(row, answer_ids=np.full(5, VOCAB_SIZE, np.int32)), "outside the vocabulary"),
        (lambda row: replace(row, answer_ids=np.full(5, -1, np.int32)), "outside the vocabulary"),
        (lambda row: replace(row, ce_sum=-0.5), "ce_sum is negative"),
        (lambda row: replace(row, entropy_sums=np.array([99.0])), "entropy sum is not between"),
        (lambda row: replace(row, entropy_sums=np.array([-1.0])), "entropy sum is not between"),
        (lambda row: replace(row, num_entries=row.num_entries + 1), "another number of entries"),
        (lambda row: replace(row, payload=b"nonsense"), "payload"),
        (lambda row: replace(row, payload=row.payload[:-3]), "payload"),
        (cut_last_position, "4 positions, 5 needed"),
        (keep_first_entries, "weights do not sum to"),
    ],
)
def test_a_row_that_was_written_wrong_is_found(
    tmp_path: Path, change: Callable[[Row], Row], message: str
) -> None:
    capture_changed(tmp_path, change)
    faults = verify(str(tmp_path)).faults
    assert any(message in fault for fault in faults), faults
    assert all(f"row 4 (key {make_key(4).hex()})" in fault for fault in faults)


@pytest.mark.parametrize(
    ("policy", "temperatures"),
    [
        (Threshold(tau=1 / 16), (1.0, 1e-30)),  # at 1e-30 alone it keeps one token, whose weight is 1
        *(
            (policy, temperatures)
            for policy in (TopK(k=5), TopP(p=0.8))
            for temperatures in ((1e-30,), (1.0, 1e-30))
        ),
    ],
)
def test_weights_that_are_not_finite_are_found_at_every_temperature(
    tmp_path: Path, policy, temperatures
) -> None:
    capture(tmp_path, range(9), identity=make_identity(policy=policy, temperatures=temperatures))
    faults = verify(str(tmp_path)).faults
    assert faults
    assert all("weights at temperature 1e-30 are not finite" in fault for fault in faults)


def test_every_fault_is_listed_not_only_the_first(tmp_path: Path) -> None:
    manifest = capture(tmp_path, range(30))
    flipped, cut, gone, _, _, _ = (tmp_path / shard.name for shard in manifest.shards)
    data = bytearray(flipped.read_bytes())
    data[300] ^= 1
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-9])
    gone.unlink()
    (tmp_path / "shards" / "0123456789abcdef-00.arrow").write_bytes(b"?")
    (tmp_path / "notes.txt").write_text("?")
    (tmp_path / manifest.segments[0].index.name).write_bytes(b"?")
    found = verify(str(tmp_path))
    faults = found.faults
    assert len(faults) == 4
    for number, name in enumerate((flipped.name, cut.name, gone.name)):
        assert any(f"shard {number:05d}" in fault and name in fault for fault in faults)
    assert any(manifest.segments[0].index.name in fault for fault in faults)
    assert len(found.notes) == 2
    for name in ("notes.txt", "0123456789abcdef-00.arrow"):  # a reader ignores what nothing names
        assert any(f"{name} is not in the manifest" in note for note in found.notes)


def rewrite_manifest(path: Path, **changes) -> None:
    manifest = CacheReader(str(path)).manifest
    shards = ShardList.of(changes.get("shards", manifest.shards))
    data = shards.encode()
    file = FileInfo(name=list_name(sha256_hex(data)), sha256=sha256_hex(data), bytes=data.size)
    (path / file.name).write_bytes(data)
    segment = manifest.segments[0].model_copy(update={"list": file, "examples": shards.total("examples")})
    built = Manifest.build(
        identity=changes.get("identity", manifest.identity),
        segments=[segment],
        shards=shards,
        skipped=manifest.skipped,
        duplicates=0,
        created_by=manifest.created_by,
    )
    (path / "manifest.json").write_bytes(built.dumps())


def test_shards_in_another_order_than_the_index_are_found(tmp_path: Path) -> None:
    manifest = capture(tmp_path, range(10))
    rewrite_manifest(tmp_path, shards=manifest.shards[::-1])
    faults = verify(str(tmp_path)).faults
    assert len(faults) == 2
    assert all("not those of the index" in fault for fault in faults)


def test_counts_and_identities_that_disagree_are_found(tmp_path: Path) -> None:
    manifest = capture(tmp_path, range(10))
    first = manifest.shards[0].model_copy(
        update={"examples": 4, "positions": 1, "entries": 2, "truncated": 3}
    )
    rewrite_manifest(
        tmp_path, shards=(first, manifest.shards[1]), identity=make_identity(weights_fingerprint="w1")
    )
    faults = "\n".join(verify(str(tmp_path)).faults)
    for name in ("examples", "positions", "entries", "truncated"):
        assert f"{name} found, {getattr(first, name)} in the manifest" in faults
    assert faults.count("another identity than the manifest") == 2


def test_an_unfinished_growth_is_no_fault(tmp_path: Path) -> None:
    capture(tmp_path, range(6))
    with CacheWriter.open(str(tmp_path), make_identity(), created_by=VERSIONS) as writer:
        plan = writer.plan(keys_and_rows(range(9)), examples_per_shard=5)
        with writer.unit(plan.units[0]) as shard:
            for number in plan.units[0].rows:
                shard.add(make_row(int(number)))
        verification = verify(str(tmp_path))
    assert verification.faults == ()
    assert len(verification.notes) == 1
    assert "a capture goes on" in verification.notes[0]


def test_a_capture_that_commits_meanwhile_leaves_nothing_to_note(tmp_path: Path) -> None:
    capture(tmp_path, range(10))
    found = verify(str(tmp_path), on_shard=lambda _: capture(tmp_path, range(20)))
    assert (found.faults, found.notes, found.num_shards) == ((), (), 2)


@pytest.mark.parametrize("changed", ["index", "list", "totals"])
def test_sizes_that_disagree_are_found(tmp_path: Path, changed: str) -> None:
    capture(tmp_path, range(10))
    tree = json.loads((tmp_path / "manifest.json").read_text())
    (tree["totals"] if changed == "totals" else tree["segments"][0][changed])["bytes"] += 4
    (tmp_path / "manifest.json").write_text(json.dumps(tree | {"sha256": content_hash(tree)}))
    faults = verify(str(tmp_path)).faults
    assert faults
    assert any(("in its totals" if changed == "totals" else "bytes found") in fault for fault in faults)


def test_without_a_manifest_there_is_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(CacheFormatError, match=r"no manifest\.json"):
        verify(str(tmp_path))


# merge


def data_of(split: str) -> tuple[DataSource, ...]:
    return (DataSource(name="drawn", split=split, fingerprint=split, rows=10),)


def test_merged_caches_hold_the_examples_of_all(tmp_path: Path) -> None:
    a, b, out = (str(tmp_path / name) for name in ("a", "b", "out"))
    first = capture(a, range(12), identity=make_identity(data=data_of("train")))
    second = capture(b, range(10, 25), identity=make_identity(data=data_of("test"), name="renamed"))
    merged = merge([a, b], out, created_by=VERSIONS)
    assert merged.totals.examples == 25
    assert merged.totals.duplicates == 2
    assert [source.split for source in merged.identity.data] == ["train", "test"]
    assert merged.shards[:3] == first.shards
    assert merged.shards[-2:] == second.shards[-2:]  # copied byte for byte
    assert verify(out).faults == ()
    reader = CacheReader(out)
    for number in range(25):
        assert reader.rows([make_key(number)])[0].payload == make_row(number).payload
    again = merge([a, b], str(tmp_path / "again"), created_by=VERSIONS)
    assert again == merged
    assert files_of(tmp_path / "out") == files_of(tmp_path / "again")


def test_merging_the_same_cache_twice_changes_nothing_but_counts(tmp_path: Path) -> None:
    a, out = str(tmp_path / "a"), str(tmp_path / "out")
    manifest = capture(a, range(12))
    merged = merge([a, a], out, created_by=VERSIONS)
    assert (merged.segments, merged.totals.duplicates) == (manifest.segments, 12)


def test_an_interrupted_merge_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, out = (str(tmp_path / name) for name in ("a", "b", "out"))
    capture(a, range(12))
    manifest = capture(b, range(12, 20))
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "dumps", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge([a, b], out, created_by=VERSIONS)
    with pytest.raises(CacheFormatError):
        CacheReader(out)
    (tmp_path / "out" / manifest.shards[0].name).write_bytes(b"damaged meanwhile")
    (Path(out) / "shards" / temporary_name("half")).write_bytes(b"of a process that was killed")
    assert merge([a, b], out, created_by=VERSIONS).totals.examples == 20
    assert not list(Path(out).rglob(".tmp-*"))
    before = files_of(Path(out))
    assert merge([a, b], out, created_by=VERSIONS).totals.examples == 20  # killed before it could say so
    assert files_of(Path(out)) == before
    assert verify(out).faults == ()


def test_a_killed_merge_of_other_caches_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, out = (str(tmp_path / name) for name in ("a", "b", "out"))
    capture(a, range(12))
    capture(b, range(12, 20))
    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "dumps", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge([a, b], out, created_by=VERSIONS)
    merge([b], out, created_by=VERSIONS)
    merge([b], str(tmp_path / "whole"), created_by=VERSIONS)
    assert files_of(Path(out)) == files_of(tmp_path / "whole")
    assert verify(out).faults == verify(out).notes == ()


def test_caches_captured_differently_are_not_merged(tmp_path: Path) -> None:
    a, b, out = (str(tmp_path / name) for name in ("a", "b", "out"))
    capture(a, range(3))
    capture(b, range(3, 6), identity=make_identity(policy=TopK(k=2), template_fingerprint="c1"))
    with pytest.raises(CacheMismatchError, match=r"2 difference\(s\)"):
        merge([a, b], out, created_by=VERSIONS)
    assert not Path(out).exists()
    with pytest.raises(CacheFormatError, match="already"):
        merge([a], b, created_by=VERSIONS)


def test_a_row_skipped_in_one_and_held_by_another_is_not_skipped(tmp_path: Path) -> None:
    a, b, out = (str(tmp_path / name) for name in ("a", "b", "out"))
    with CacheWriter.open(a, make_identity(), created_by=VERSIONS) as writer:
        lost = SkippedRow(row="train[9]", reason="no picture")
        plan = writer.plan(keys_and_rows([1, 2, 3]), examples_per_shard=3, skipped=[lost])
        with writer.unit(plan.units[0]) as shard:
            shard.add(make_row(1))
            shard.skip(make_key(2), row="train[2]", reason="NaN")
            shard.skip(make_key(3), row="train[3]", reason="NaN")
        writer.commit(plan)
    capture(b, [2])
    merged = merge([a, b], out, created_by=VERSIONS)
    assert [row.row for row in merged.skipped] == ["train[9]", "train[3]"]


# export


@pytest.mark.parametrize("policy", [Threshold(tau=1 / 16), Random(draws=20), TopK(k=3)])
def test_an_export_is_plain_parquet(tmp_path: Path, policy) -> None:
    identity = make_identity(policy=policy, temperatures=(1.0, 2.0))
    manifest = capture(tmp_path / "cache", range(12), identity=identity)
    out = tmp_path / "out"
    assert export(CacheReader(str(tmp_path / "cache")), out) == 12
    table = datasets.load_dataset("parquet", data_dir=str(out), split="train", cache_dir=str(tmp_path / "hf"))
    assert len(table) == 12
    for number, found in enumerate(table):
        row, targets = make_example(number, identity)
        assert found["key"] == row.key.hex()
        assert found["answer_ids"] == row.answer_ids.tolist()
        assert (found["ce_sum"], found["truncated"]) == (row.ce_sum, row.truncated)
        assert found["entropy_sums"] == row.entropy_sums.tolist()
        bounds = targets.offsets.tolist()
        spans = [slice(start, stop) for start, stop in pairwise(bounds)]
        assert found["ids"] == [targets.ids[span].tolist() for span in spans]
        assert found["logprobs"] == [targets.logprobs[span].float().tolist() for span in spans]
        assert found["weights"] == [targets.weights()[span].tolist() for span in spans]
        assert found["weights_2"] == [targets.weights(2.0)[span].tolist() for span in spans]
    metadata = json.loads(pq.read_schema(out / "part-00000.parquet").metadata[b"teachonce"])
    assert metadata["cache"] == manifest.sha256
    assert metadata["identity"] == identity.model_dump(mode="json")


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    manifest = capture(tmp_path / "cache", range(12))
    (tmp_path / "cache" / manifest.shards[2].name).unlink()
    with pytest.raises(CacheFormatError, match="missing"):
        export(CacheReader(str(tmp_path / "cache")), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    with pytest.raises(CacheFormatError, match="is there already"):
        export(CacheReader(str(tmp_path / "cache")), tmp_path / "out")


@pytest.mark.parametrize("place", ["x", "shards/x", "../link/x"])
def test_nothing_is_exported_or_merged_into_a_cache(tmp_path: Path, place: str) -> None:
    capture(tmp_path / "cache", range(6))
    capture(tmp_path / "other", range(6, 9))
    (tmp_path / "link").symlink_to("cache")
    before = files_of(tmp_path / "cache")
    sources = [str(tmp_path / "other"), str(tmp_path / "cache")]
    for source in sources:
        with pytest.raises(CacheFormatError, match=r"lies in the cache .*Name a folder outside of it"):
            export(CacheReader(source), tmp_path / "cache" / place)
    with pytest.raises(CacheFormatError, match="lies in the cache"):
        merge(sources, str(tmp_path / "cache" / place), created_by=VERSIONS)
    assert files_of(tmp_path / "cache") == before
    assert {path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()} == {"shards"}


def test_an_empty_cache_is_exported(tmp_path: Path) -> None:
    capture(tmp_path / "cache", [])
    assert export(CacheReader(str(tmp_path / "cache")), tmp_path / "out") == 0
    assert pq.read_table(tmp_path / "out").num_rows == 0


def test_a_large_shard_is_exported_in_parts(tmp_path: Path) -> None:
    capture(tmp_path / "cache", range(600), examples_per_shard=600)
    export(CacheReader(str(tmp_path / "cache")), tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "part-00000.parquet")
    assert [bytes.fromhex(key) for key in table.column("key").to_pylist()] == [
        make_key(n) for n in range(600)
    ]


# inspect


def test_a_summary_says_who_what_and_how_large(tmp_path: Path) -> None:
    manifest = capture(tmp_path, range(40))
    summary = inspect(CacheReader(str(tmp_path)))
    assert json.loads(json.dumps(summary)) == summary
    examples = [make_example(number) for number in range(40)]
    positions = sum(row.num_positions for row, _ in examples)
    sample = summary["sample"]
    assert summary["sha256"] == manifest.sha256
    assert summary["identity"]["teacher"]["weights_fingerprint"] == "w0"
    assert summary["totals"]["positions"] == sample["positions"] == positions
    assert summary["bytes_per_position"] == pytest.approx(manifest.totals.bytes / positions)
    assert sample["cross_entropy"] == pytest.approx(sum(row.ce_sum for row, _ in examples) / positions)
    entropy = torch.cat([targets.entropy for _, targets in examples]).double().mean()
    assert sample["entropy"]["1.0"] == pytest.approx(float(entropy))
    counts = torch.cat([targets.counts for _, targets in examples])
    assert sample["entries_per_position"]["100%"] == int(counts.max())
    assert sample["entries_per_position"]["50%"] == pytest.approx(float(np.median(counts.numpy())))
    assert sample["kept_mass"]["1.0"]["mean"] == pytest.approx(1, abs=0.05)
    assert summary["positions_per_example"]["100%"] == 7


def test_a_summary_of_a_sample_and_of_nothing(tmp_path: Path) -> None:
    capture(tmp_path / "some", range(40))
    assert inspect(CacheReader(str(tmp_path / "some")), sampled_rows=16)["sample"]["rows"] == 16
    capture(tmp_path / "none", [])
    summary = inspect(CacheReader(str(tmp_path / "none")))
    assert summary["sample"] is None
    assert summary["bytes_per_position"] is None


def without_positions(row: Row) -> Row:
    targets = make_example(4)[1].slice(0, 0)
    answer = row.answer_ids[:0]
    empty = {"answer_ids": answer, "num_entries": 0, "ce_sum": 0.0, "entropy_sums": np.zeros(1)}
    return replace(row, payload=codec.encode(targets), **empty)


def test_rows_without_positions_are_no_part_of_a_summary(tmp_path: Path) -> None:
    capture_changed(tmp_path / "some", without_positions)
    sample = inspect(CacheReader(str(tmp_path / "some")))["sample"]
    rows = [make_row(number) for number in range(9) if number != 4]
    positions = sum(row.num_positions for row in rows)
    assert (sample["rows"], sample["positions"]) == (8, positions)
    assert sample["cross_entropy"] == pytest.approx(sum(row.ce_sum for row in rows) / positions)
    assert sample["payload_bytes_per_position"] == pytest.approx(
        sum(len(row.payload) for row in rows) / positions
    )
    assert sample["entropy"]["1.0"] == pytest.approx(sum(row.entropy_sums[0] for row in rows) / positions)
    capture_changed(tmp_path / "none", without_positions, [4])
    reader = CacheReader(str(tmp_path / "none"))
    assert inspect(reader)["sample"] is None
    with pytest.raises(CacheFormatError, match="has no positions, there is nothing to report"):
        write_cache_report(reader, None, tmp_path / "report.html")
    with pytest.raises(CacheFormatError, match="has no positions, there is nothing to draw"):
        plot_cache(reader, tmp_path / "plots")


def test_pictures_of_a_cache(tmp_path: Path) -> None:
    capture_changed(tmp_path / "cache", without_positions, range(20))
    arguments = ["inspect", str(tmp_path / "cache"), "--plots", str(tmp_path / "plots")]
    result = CliRunner().invoke(commands, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    drawn = sorted((tmp_path / "plots").iterdir())
    names = ["by_place", "bytes", "calibration", "certainty", "entries", "kept_mass"]
    assert [one.stem for one in drawn] == names
    for one in drawn:
        with Image.open(one) as picture:
            assert picture.size == (832, 544)
            assert len(set(picture.convert("L").resize((64, 36)).tobytes())) > 10
        assert one.name in result.output


def test_a_capture_by_command_mends_index_and_plan_as_its_errors_say(
    tmp_path: Path, vqa_folder: Path, teacher_folder: Path, student_folder: Path
) -> None:
    cache = tmp_path / "cache"
    tree = {
        "data": {"source": str(vqa_folder), "max_answer_tokens": 64},
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "cache": {"path": str(cache), "examples_per_shard": 5, "num_workers": 0},
        "student": {"model": str(student_folder)},
        "optimization": {"max_steps": 1},
        "run": {"name": "mine"},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(tree))

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(commands, arguments, standalone_mode=False)
        if isinstance(result.exception, CacheFormatError):
            return result.exception.exit_status, str(result.exception)
        assert result.exception is None
        return result.return_value, result.output

    assert run("capture", str(recipe))[0] == 0
    before = files_of(cache)
    files = [cache / file.name for file in CacheReader(str(cache)).manifest.files]
    for path, damage in itertools.product(files, (None, b"damaged")):
        path.unlink() if damage is None else path.write_bytes(damage)
        status, output = run("verify", str(cache))
        assert status != 0
        assert "Run teacher-cache again: it makes the file again from the shards" in output
        assert run("capture", str(recipe))[0] == 0
        assert files_of(cache) == before
    # a plan stands beside shards alone while a first capture is under way
    (cache / "manifest.json").unlink()
    (cache / "plan.arrow").write_bytes(b"damaged")
    status, message = run("capture", str(recipe))
    assert status != 0
    assert "Delete the file and run teacher-cache again" in message
    (cache / "plan.arrow").unlink()
    inodes = {path.stat().st_ino for path in (cache / "shards").iterdir()}
    assert run("capture", str(recipe))[0] == 0
    assert files_of(cache) == before
    assert {path.stat().st_ino for path in (cache / "shards").iterdir()} == inodes
