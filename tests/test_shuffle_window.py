"""A student of a remote cache that does not fit into its staging folder: shards come one window after another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from stage2_runs import make_recipe, on_ranks, run_alone, step_records

from shared.cache import CacheReader, Staging
from shared.errors import CheckpointError
from shared.recipes import Recipe, load_recipe
from shared.runtime import World, distributed
from shared.shard_order import window_of
from shared.stopping import StopRequest
from stage1_teacher.capture import capture
from stage2_student.train import train

CACHE = "memory://window/cache"


@pytest.fixture
def recipe(
    tmp_path: Path,
    vqa_folder: Path,
    student_folder: Path,
    teacher_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Recipe]:
    """Of six shards of two training rows each; the staging folder holds three shards."""
    monkeypatch.setenv("TEACHONCE_STAGING", str(tmp_path / "staging"))
    tree: dict[str, Any] = {
        "data": {"source": str(vqa_folder), "max_answer_tokens": 64},
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "cache": {"path": CACHE, "examples_per_shard": 2, "num_workers": 0},
        "student": {"model": str(student_folder), "compute_dtype": "float32"},
        "optimization": {"global_batch_size": 2, "max_steps": 12, "learning_rate": 1e-3},
        "run": {"name": "run", "root": str(tmp_path / "runs"), "num_workers": 0, "export": False},
    }
    recipe = make_recipe(tree)
    assert capture_here(recipe) == 8
    manifest = CacheReader(CACHE).manifest
    room = 5 * max(shard.bytes for shard in manifest.shards) + sum(file.bytes for file in manifest.files)
    monkeypatch.setenv("TEACHONCE_STAGING_BYTES", str(room))
    yield recipe
    fsspec.filesystem("memory").rm("/window", recursive=True)


def capture_here(recipe: Recipe) -> int:
    """Shards.  In this process, whose memory the file system is."""
    with distributed(device="cpu") as world:
        capture(recipe, world, StopRequest())
    return len(CacheReader(CACHE).manifest.shards)


def test_each_shard_is_fetched_once_an_epoch(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetched: Counter[str] = Counter()
    download = Staging._download

    def counted(self: Staging, source: Any, name: str, *args: Any, **options: Any) -> None:
        fetched[name] += 1
        download(self, source, name, *args, **options)

    monkeypatch.setattr(Staging, "_download", counted)
    assert run_alone(recipe) == 0
    assert "the examples of 2 of the cache's 8 shards are mixed at a time" in capsys.readouterr().out
    of_training = CacheReader(CACHE).manifest.shards[:6]
    assert max(fetched[shard.name] for shard in of_training) <= 2  # of two epochs


def test_a_run_goes_on_in_the_order_that_it_began_with(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_alone(recipe) == 0
    whole = step_records(recipe)
    other = make_recipe(
        recipe.model_dump(mode="json"), run__root=str(tmp_path / "others"), optimization__max_steps=5
    )
    assert run_alone(other) == 0
    monkeypatch.delenv("TEACHONCE_STAGING_BYTES")  # another machine, with more room
    longer = make_recipe(other.model_dump(mode="json"), optimization__max_steps=12)
    assert run_alone(longer, resume=True) == 0
    assert load_recipe(longer.run.path / "recipe.yaml").cache.shuffle_window == 2  # type: ignore[union-attr]
    assert [step["num_positions"] for step in step_records(longer)] == [
        step["num_positions"] for step in whole
    ]
    with pytest.raises(CheckpointError, match=r"(?s)windows of 2 shards.*cache\.shuffle_window back"):
        run_alone(
            make_recipe(longer.model_dump(mode="json"), optimization__max_steps=14, cache__shuffle_window=3),
            resume=True,
        )


def test_a_local_cache_has_no_window_unless_one_is_given(recipe: Recipe, tmp_path: Path) -> None:
    local = make_recipe(recipe.model_dump(mode="json"), cache__path=str(tmp_path / "cache"))

    def both(world: World) -> None:
        capture(local, world, StopRequest())
        train(local, world, resume=False)

    on_ranks(1, both)
    assert load_recipe(local.run.path / "recipe.yaml").cache.shuffle_window == 0  # type: ignore[union-attr]
    given = make_recipe(local.model_dump(mode="json"), cache__shuffle_window=3, run__name="given")
    losses = []
    for num_ranks in (1, 2):
        run = make_recipe(given.model_dump(mode="json"), run__name=f"given-{num_ranks}")
        on_ranks(num_ranks, lambda world, run=run: train(run, world, resume=False))
        losses.append([step["loss"] for step in step_records(run)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("sizes", "room", "window"),
    [([10] * 10, 100, 0), ([10] * 10, 99, 3), ([10] * 10, 20, 1), ([10] * 9 + [40], 100, 1)],
)
def test_two_windows_fit_into_the_staging_folder(sizes: list[int], room: int, window: int) -> None:
    assert window_of(sizes, room=room) == window
