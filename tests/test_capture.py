"""Stage one on a real small teacher: what it stores, what it does not do twice, what ends it and what does not."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest
import torch
from changed_models import with_text_config
from transformers import AutoModelForImageTextToText

from shared.cache import CacheReader, CacheWriter
from shared.cache.claimant import Claimant
from shared.cache.index import as_key_array, split_keys
from shared.cache.layout import PLAN_NAME
from shared.cache.storage import LocalFolder, open_folder
from shared.cache.verify import verify
from shared.completeness import cache_covers
from shared.data.processing import ExampleProcessor, open_processor
from shared.data.rows import open_split
from shared.errors import CacheMismatchError, DataError
from shared.recipes import Recipe
from shared.recipes.files import validate_tree
from shared.runtime import distributed
from shared.stopping import INTERRUPTED_STATUS, StopRequest
from shared.surveying import survey_keys
from stage1_teacher.capture import capture


@pytest.fixture
def tree(tmp_path: Path, vqa_folder: Path, teacher_folder: Path, student_folder: Path) -> dict[str, Any]:
    """A recipe over 16 examples, two of them in each shard."""
    return {
        "data": {"source": str(vqa_folder), "max_answer_tokens": 64},
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "cache": {
            "path": str(tmp_path / "cache"),
            "policy": {"kind": "threshold", "tau": 2.0**-9},
            "seed": 3,
            "examples_per_shard": 2,
            "batch_tokens": 512,
            "num_workers": 0,
        },
        "student": {"model": str(student_folder)},
        "optimization": {"max_steps": 1, "global_batch_size": 2},
        "run": {"name": "mine"},
    }


def run(tree: dict[str, Any], stop: StopRequest | None = None) -> int:
    recipe = validate_tree(Recipe, tree, origin="recipe test")
    with distributed(device="cpu") as world:
        return capture(recipe, world, stop or StopRequest())


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a cache that must not depend on how it was captured."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    logs = {"log.jsonl", "capture.log"}
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.name not in logs}


def with_values(tree: dict[str, Any], section: str, **values: Any) -> dict[str, Any]:
    return tree | {section: tree[section] | values}


def live_logprobs(
    folder: Path, processor: ExampleProcessor, split: Any
) -> list[tuple[bytes, torch.Tensor, Any]]:
    """(key, log-probs at the answer positions, answer ids) from the model's own forward, one row at a time."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for example in split:
        one = processor.encode(example)
        batch = processor.collate([one])
        with torch.no_grad():
            logits = model(**batch.inputs).logits[0, -one.num_positions - 1 : -1]
        found.append((one.key, logits[:, : processor.num_token_ids].log_softmax(-1), one.answer_ids))
    return found


def test_the_cache_holds_the_teachers_distributions(
    tree: dict[str, Any], teacher_folder: Path, processor: ExampleProcessor, tmp_path: Path
) -> None:
    tree = with_values(tree, "cache", policy={"kind": "threshold", "tau": 2.0**-19})  # every token is kept
    assert run(tree) == 0
    reader = CacheReader(str(tmp_path / "cache"))
    split = open_split(validate_tree(Recipe, tree, origin="r").data, "train")
    for key, logprobs, answer in live_logprobs(teacher_folder, processor, split):
        (row,) = reader.rows([key])
        assert row.answer_ids.tolist() == answer.tolist()
        targets = reader.targets([row])
        dense = torch.zeros_like(logprobs)
        dense[targets.position_index, targets.ids.long()] = targets.weights()
        torch.testing.assert_close(dense, logprobs.exp(), atol=1e-3, rtol=1e-2)
        ce = -logprobs.gather(1, answer[:, None]).sum()
        entropy = -(logprobs.exp() * logprobs).sum()
        assert row.ce_sum == pytest.approx(ce.item(), abs=1e-3)
        assert row.entropy_sums[0] == pytest.approx(entropy.item(), abs=1e-3)


def test_the_cache_holds_the_teachers_log_probs_of_the_labels(
    tree: dict[str, Any], teacher_folder: Path, processor: ExampleProcessor, tmp_path: Path
) -> None:
    asked = with_values(tree, "cache", label_log_prob=True)
    assert run(asked) == 0
    reader = CacheReader(str(tmp_path / "cache"))
    assert verify(str(tmp_path / "cache")).faults == ()
    split = open_split(validate_tree(Recipe, tree, origin="r").data, "train")
    for key, logprobs, answer in live_logprobs(teacher_folder, processor, split):
        found = reader.label_log_probs(reader.rows([key]))
        torch.testing.assert_close(found, logprobs.gather(1, answer[:, None])[:, 0], atol=1e-3, rtol=2e-3)
    assert run(asked) == 0  # nothing to capture
    with pytest.raises(CacheMismatchError, match="label_log_prob: true in the cache, false asked for"):
        run(tree)


def test_a_head_wider_than_the_tokenizer_stores_no_padding_ids(
    tree: dict[str, Any], teacher_folder: Path, processor: ExampleProcessor, tmp_path: Path
) -> None:
    width = json.loads((teacher_folder / "config.json").read_text())["text_config"]["vocab_size"]
    assert width > processor.num_token_ids  # or this test would not test anything
    run(tree)
    reader = CacheReader(str(tmp_path / "cache"))
    _, targets = reader.read(list(reader.keys()))
    assert int(targets.ids.max()) < processor.num_token_ids


def test_a_complete_cache_is_recognised_without_the_weights(
    tree: dict[str, Any], teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = shutil.copytree(teacher_folder, tmp_path / "teacher")
    tree = with_values(tree, "teacher", model=str(teacher))
    assert run(tree) == 0
    before = files(tmp_path / "cache")
    for weights in teacher.glob("*.safetensors"):
        weights.unlink()
    assert run(tree) == 0
    assert files(tmp_path / "cache") == before
    assert "nothing to capture" in capsys.readouterr().out


def test_a_grown_data_set_needs_only_its_new_rows(tree: dict[str, Any], tmp_path: Path) -> None:
    run(with_values(tree, "data", limit=4))
    small = files(tmp_path / "cache")
    run(tree)
    grown = files(tmp_path / "cache")
    old_shards = {name: data for name, data in small.items() if name.startswith("shards/")}
    assert old_shards.items() <= grown.items()
    reader = CacheReader(str(tmp_path / "cache"))
    assert len(reader) == reader.manifest.totals.examples == 16


def test_rows_do_not_depend_on_when_they_were_captured(tree: dict[str, Any], tmp_path: Path) -> None:
    run(with_values(tree, "data", limit=4))
    run(tree)
    run(with_values(tree, "cache", path=str(tmp_path / "at_once")))
    grown, at_once = CacheReader(str(tmp_path / "cache")), CacheReader(str(tmp_path / "at_once"))
    keys = list(at_once.keys())
    for one, other in zip(grown.rows(keys), at_once.rows(keys), strict=True):
        assert one.payload == other.payload
        assert one.ce_sum == pytest.approx(other.ce_sum, rel=1e-5)


def test_another_policy_on_the_same_folder_is_refused_with_both_sides(tree: dict[str, Any]) -> None:
    run(tree)
    other = with_values(tree, "cache", policy={"kind": "top_k", "k": 4})
    with pytest.raises(CacheMismatchError, match=r"threshold(.|\n)*top_k"):
        run(other)


def spoiled(
    tree: dict[str, Any], folder: Path, *, content: bytes | None = None, rows: Sequence[int] = (5,)
) -> dict[str, Any]:
    """The same data with pictures that are cut in the middle, or with other bytes in their place."""
    source = tree["data"]["source"]
    table = datasets.load_dataset("parquet", data_files=f"{source}/train-*.parquet", split="train")
    table = table.cast_column("image_id", datasets.Image(decode=False))

    def cut(row: dict[str, Any], index: int) -> dict[str, Any]:
        if index in rows:
            row["image_id"] = {"bytes": content or row["image_id"]["bytes"][:60], "path": None}
        return row

    folder.mkdir()
    table.map(cut, with_indices=True).to_parquet(str(folder / "train-00000-of-00001.parquet"))
    shutil.copy(f"{source}/validation-00000-of-00001.parquet", folder)
    return with_values(tree, "data", source=str(folder))


def test_an_unusable_picture_stops_the_capture_with_its_row(tree: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 5.*max_dropped allows 0"):
        run(spoiled(tree, tmp_path / "spoiled"))
    assert not (tmp_path / "cache" / "manifest.json").exists()


def test_unusable_pictures_up_to_the_limit_are_left_out_and_counted(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    allowed = with_values(spoiled(tree, tmp_path / "spoiled"), "data", max_dropped=1)
    allowed["data"]["source"] = str(tmp_path / "spoiled")
    assert run(allowed) == 0
    manifest = CacheReader(str(tmp_path / "cache")).manifest
    assert (manifest.totals.examples, manifest.totals.skipped) == (15, 1)
    assert manifest.skipped[0].row == "train[5]"


def test_two_captures_of_a_set_with_rows_left_out_are_the_same(tree: dict[str, Any], tmp_path: Path) -> None:
    """What a library says of a picture that it cannot identify has an object's address in it."""
    allowed = with_values(spoiled(tree, tmp_path / "spoiled", content=b"no picture"), "data", max_dropped=1)
    for name in ("one", "two"):
        assert run(with_values(allowed, "cache", path=str(tmp_path / name))) == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")
    reason = CacheReader(str(tmp_path / "one")).manifest.skipped[0].reason
    assert "cannot identify image file" in reason
    assert "0x" not in reason


def test_where_no_row_can_be_used_the_first_reason_is_told(tree: dict[str, Any]) -> None:
    marked = with_values(tree, "data", system_prompt="You see <|image_pad|>.", max_dropped=100)
    with pytest.raises(DataError, match=r"no row can be used; the first: .*row 0 .*(image_pad|placeholders)"):
        run(marked)


def test_rows_longer_than_the_teachers_context_are_told(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = with_text_config(tree["teacher"]["model"], tmp_path / "short", max_position_embeddings=40)
    assert run(with_values(tree, "teacher", model=short)) == 0
    told = re.findall(r"note: .* split (\w+): .* of teacher .*, 40; row \d+ has", capsys.readouterr().out)
    assert told == ["train", "validation"]


def test_a_stop_request_ends_early_and_the_next_start_finishes(tree: dict[str, Any], tmp_path: Path) -> None:
    assert run(tree, StopRequest(received=True)) == INTERRUPTED_STATUS
    assert not (tmp_path / "cache" / "manifest.json").exists()
    assert run(tree) == 0
    run(with_values(tree, "cache", path=str(tmp_path / "unbroken")))
    assert files(tmp_path / "cache") == files(tmp_path / "unbroken")


def test_a_full_disk_is_reported_before_it_is_met(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(ValueError, match=r"units that are left need about .* finished units are kept"):
        run(tree)
    monkeypatch.undo()
    assert len(list((tmp_path / "cache" / "shards").glob("*.arrow"))) == 1
    assert run(tree) == 0


def command(tree: dict[str, Any], tmp_path: Path, *, nproc: int = 1) -> list[str]:
    path = tmp_path / f"recipe{nproc}.yaml"
    path.write_text(json.dumps(tree))  # JSON is YAML
    launcher = (
        ["torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}", "-m"] if nproc > 1 else []
    )
    return [sys.executable, "-m", *launcher, "stage1_teacher", "capture", str(path)]


def start(tree: dict[str, Any], tmp_path: Path, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(tree, tmp_path, **options),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_shards(process: subprocess.Popen[str], folder: Path, number: int) -> None:
    while process.poll() is None and len(list(folder.glob("shards/*.arrow"))) < number:
        time.sleep(0.002)


@pytest.mark.slow
def test_killed_at_any_moment_the_cache_becomes_the_unbroken_runs(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    for number in (1, 3, 6):
        process = start(tree, tmp_path)
        wait_for_shards(process, cache, number)
        process.kill()
        process.communicate()
        assert not (cache / "manifest.json").exists()
    assert run(tree) == 0
    run(with_values(tree, "cache", path=str(tmp_path / "unbroken")))
    assert files(cache) == files(tmp_path / "unbroken")


@pytest.mark.slow
def test_sigterm_finishes_the_batch_in_hand_and_says_how_to_go_on(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    process = start(tree, tmp_path)
    wait_for_shards(process, tmp_path / "cache", 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == INTERRUPTED_STATUS, output
    assert "are captured and kept. To go on: " in output


@pytest.mark.slow
def test_two_ranks_write_the_bytes_of_one(tree: dict[str, Any], tmp_path: Path) -> None:
    process = start(tree, tmp_path, nproc=2)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    run(with_values(tree, "cache", path=str(tmp_path / "one")))
    assert files(tmp_path / "cache") == files(tmp_path / "one")


@pytest.mark.slow
def test_a_teacher_sharded_over_two_ranks_writes_the_bytes_of_a_whole_one(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    """Seven units for two ranks: one of them idles at the end."""
    tree = with_values(tree, "data", limit=7)
    process = start(with_values(tree, "teacher", shard=True), tmp_path, nproc=2)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    run(with_values(tree, "cache", path=str(tmp_path / "whole")))
    assert files(tmp_path / "cache") == files(tmp_path / "whole")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


BREAKS = {
    "deleted": Path.unlink,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "flipped": flip_a_bit,
}


@pytest.mark.parametrize("how", BREAKS)
def test_a_broken_shard_alone_is_captured_again(
    tree: dict[str, Any], tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tree)
    whole = files(tmp_path / "cache")
    broken = sorted((tmp_path / "cache" / "shards").iterdir())[3]
    BREAKS[how](broken)
    recipe = validate_tree(Recipe, tree, origin="recipe test")
    assert not cache_covers(recipe)
    assert run(tree) == 0
    assert cache_covers(recipe)
    assert files(tmp_path / "cache") == whole
    assert broken.name in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "cache" / "log.jsonl").read_text().splitlines()]
    assert [record["examples"] for record in records if record["event"] == "captured"] == [16, 2]


def test_a_lost_shard_whose_examples_were_all_refused_is_captured_again(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    allowed = with_values(spoiled(tree, tmp_path / "spoiled", rows=(4, 5)), "data", max_dropped=2)
    allowed["data"]["source"] = str(tmp_path / "spoiled")
    assert run(allowed) == 0
    (lost,) = (one for one in CacheReader(str(tmp_path / "cache")).manifest.shards if not one.examples)
    (tmp_path / "cache" / lost.name).unlink()
    assert verify(str(tmp_path / "cache")).faults
    assert run(allowed) == 0
    assert not verify(str(tmp_path / "cache")).faults
    assert CacheReader(str(tmp_path / "cache")).manifest.totals.skipped == 2


def test_a_broken_shard_without_wanted_examples_is_no_work(tree: dict[str, Any], tmp_path: Path) -> None:
    run(tree)
    fewer = with_values(tree, "data", limit=4)
    recipe = validate_tree(Recipe, fewer, origin="recipe test")
    reader = CacheReader(str(tmp_path / "cache"))
    wanted = {key for name in ("train", "validation") for key in keys_of(recipe, name)}
    holding = {shard for shard, keys in enumerate(shards_of(reader)) if wanted & keys}
    for shard, info in enumerate(reader.manifest.shards):
        if shard not in holding:
            (tmp_path / "cache" / info.name).unlink()
    assert len(holding) < len(reader.manifest.shards)
    assert cache_covers(recipe)


def keys_of(recipe: Recipe, name: Any) -> list[bytes]:
    assert recipe.teacher is not None
    found = survey_keys(recipe.data, name, open_processor(recipe.teacher.model, recipe.data))
    return split_keys(as_key_array(found.keys))


def shards_of(reader: CacheReader) -> list[set[bytes]]:
    return [set(split_keys(keys)) for keys, _ in reader.index.shard_columns()]


def test_a_remote_cache_is_asked_for_its_shards_sizes(tree: dict[str, Any]) -> None:
    filesystem = fsspec.filesystem("memory")
    tree = with_values(tree, "cache", path="memory://capture-sizes")
    recipe = validate_tree(Recipe, tree, origin="recipe test")
    run(tree)
    assert cache_covers(recipe)
    first, second = filesystem.ls("/capture-sizes/shards", detail=False)[:2]
    filesystem.rm_file(first)
    filesystem.pipe_file(second, filesystem.cat_file(second)[:-8])
    assert not cache_covers(recipe)
    assert run(tree) == 0
    assert cache_covers(recipe)
    filesystem.rm("/capture-sizes", recursive=True)


def test_killed_right_after_its_commit_a_capture_has_its_log_line_and_leaves_no_plan(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    remove = LocalFolder.remove

    def killed(folder: LocalFolder, name: str) -> None:
        if name == PLAN_NAME:
            raise Killed
        remove(folder, name)

    monkeypatch.setattr(LocalFolder, "remove", killed)
    with pytest.raises(Killed):
        run(tree)
    monkeypatch.undo()
    cache = tmp_path / "cache"
    assert (cache / "manifest.json").exists()
    (record,) = map(json.loads, (cache / "log.jsonl").read_text().splitlines())
    assert (record["event"], record["examples"]) == ("captured", 16)
    assert {"recipe", "seconds", "ranks", "positions", "teacher_ms"} <= record.keys()
    assert run(tree) == 0
    assert not (cache / PLAN_NAME).exists()
    assert len((cache / "log.jsonl").read_text().splitlines()) == 1


def test_a_repair_that_is_killed_before_its_commit_leaves_no_plan(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: object, **__: object) -> None:
        raise Killed

    run(tree)
    cache = tmp_path / "cache"
    whole = files(cache)
    sorted((cache / "shards").iterdir())[3].unlink()
    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "commit", killed)
        with pytest.raises(Killed):
            run(tree)
    assert files(cache).keys() - whole.keys() == {PLAN_NAME}
    with Claimant(open_folder(str(cache)), timeout_s=60):
        assert run(tree) == 0
        assert (cache / PLAN_NAME).exists()  # somebody may be about to commit it
    assert run(tree) == 0
    assert files(cache) == whole


def test_the_plan_of_a_capture_that_goes_on_is_left_alone(tree: dict[str, Any], tmp_path: Path) -> None:
    smaller = with_values(tree, "data", limit=4)
    run(smaller)
    assert run(tree, StopRequest(received=True)) == INTERRUPTED_STATUS
    plan = (tmp_path / "cache" / PLAN_NAME).read_bytes()
    assert run(smaller) == 0
    assert (tmp_path / "cache" / PLAN_NAME).read_bytes() == plan
