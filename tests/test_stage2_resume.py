"""A run that is stopped, killed or moved to other ranks goes on as if nothing had happened."""

from __future__ import annotations

import importlib
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from stage2_runs import (
    assert_same_state,
    files_of,
    make_recipe,
    on_ranks,
    records,
    run_alone,
    run_ranks,
    start,
    state_of,
    step_records,
    teacher_of,
    validation_records,
)

from shared.errors import (
    CacheFormatError,
    CheckpointError,
    DataError,
    RecipeError,
    TeachonceError,
    TrainingError,
)
from shared.finished import run_is_finished
from shared.recipes import Recipe, load_recipe, recipe_text
from shared.runtime import World, distributed
from shared.stopping import INTERRUPTED_STATUS
from stage2_student.runs.identity import BY_SHARDS, CACHE, ORDER, OWN, require_same
from stage2_student.runs.run_folder import RunFolder
from stage2_student.train import train
from stage2_student.training.export import export_checkpoint
from stage2_student.training.validate import validate

NUM_STEPS = 20  # of 3 to an epoch
# At, before and after the end of an epoch, of the warm-up and of a validation's interval, early and late; the last.
STOPS = (1, 2, 3, 4, 5, 6, 10, 11, 15, 18, 19, 20)


@pytest.fixture(scope="module")
def tree(
    tmp_path_factory: pytest.TempPathFactory, vqa_folder: Path, student_folder: Path, teacher_cache: Path
) -> dict[str, Any]:
    return {
        "data": {"source": str(vqa_folder), "max_answer_tokens": 64, "limit": 9},
        "teacher": teacher_of(teacher_cache),
        "cache": {"path": str(teacher_cache), "temperatures": [1.0, 2.0]},
        "student": {"model": str(student_folder), "compute_dtype": "float32"},
        "loss": {"kd_ratio": 0.5},
        "optimization": {
            "global_batch_size": 4,
            "microbatch_size": 2,
            "max_steps": NUM_STEPS,
            "learning_rate": 1e-2,
            "num_warmup_steps": 4,
        },
        "run": {
            "name": "unbroken",
            "root": str(tmp_path_factory.mktemp("runs")),
            "num_workers": 0,
            "checkpoint_every": 1,
            "validate_every": 5,
            "keep_checkpoints": 100,
            "export": False,
        },
    }


@pytest.fixture(scope="module")
def unbroken(tree: dict[str, Any]) -> Recipe:
    """A run that nothing has stopped, with a checkpoint of each step."""
    recipe = make_recipe(tree)
    assert run_alone(recipe) == 0
    return recipe


def stopped_after(unbroken: Recipe, tree: dict[str, Any], step: int, name: str, **overrides: Any) -> Recipe:
    """The run as it was on disk when that step was done."""
    recipe = make_recipe(tree, run__name=name, **overrides)
    shutil.copytree(unbroken.run.path, recipe.run.path)
    (recipe.run.path / "results.json").unlink()
    for later in range(step + 1, NUM_STEPS + 1):
        shutil.rmtree(recipe.run.path / "checkpoints" / f"step-{later:06d}")
    return recipe


def assert_same_run(ours: Recipe, theirs: Recipe) -> None:
    assert step_records(ours) == step_records(theirs)
    assert validation_records(ours) == validation_records(theirs)
    assert_same_state(state_of(ours, NUM_STEPS), state_of(theirs, NUM_STEPS))


def test_the_same_recipe_again_shows_its_results_and_touches_nothing(
    unbroken: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in unbroken.run.path.rglob("*")}
    assert run_alone(unbroken) == 0
    said = capsys.readouterr().out
    assert f"run {unbroken.run.path} is finished" in said
    assert f"{NUM_STEPS} steps" in said
    assert before == {path: path.stat().st_mtime_ns for path in unbroken.run.path.rglob("*")}


def test_what_a_run_chose_by_itself_makes_no_other_recipe(tmp_path: Path) -> None:
    """The day of its prompts, and the window of its order, are written into its recipe when it begins."""
    given = ("run.export=false", f"run.root={tmp_path}", "run.name=run")
    recipe = load_recipe("phantom", overrides=given)
    recipe.run.path.mkdir()
    (recipe.run.path / "results.json").write_text("{}")
    for chosen in (
        recipe,
        recipe.of_window(0),
        recipe.of_window(3),
        recipe.of_day("2026-01-31").of_window(0),
    ):
        (recipe.run.path / "recipe.yaml").write_text(recipe_text(chosen))
        assert run_is_finished(recipe)
    text = recipe_text(recipe)
    lacking = [
        line for line in text.splitlines(keepends=True) if "reverse_kl" not in line and "rounds:" not in line
    ]
    assert len(lacking) == text.count("\n") - 2
    (recipe.run.path / "recipe.yaml").write_text("".join(lacking))  # of a release that did not know these
    assert run_is_finished(recipe)
    for other in ("cache.shuffle_window=2", "data.date=2026-02-01", "run.seed=1"):
        assert not run_is_finished(load_recipe("phantom", overrides=(*given, other)))


def test_a_run_that_goes_on_is_not_finished(unbroken: Recipe, tree: dict[str, Any]) -> None:
    """The results of its fewer steps are gone before the recipe asks for more."""
    longer = make_recipe(tree, run__name="longer", optimization__max_steps=NUM_STEPS + 1)
    shutil.copytree(unbroken.run.path, longer.run.path)
    folder = RunFolder(longer.run.path)
    with distributed(device="cpu") as world:
        folder.begin(longer, folder.checkpoints.latest(), world)
    assert folder.recipe.read_text() == recipe_text(longer)
    assert not run_is_finished(longer)


@pytest.mark.parametrize(
    "step",
    [pytest.param(s, marks=() if s == 3 else pytest.mark.slow) for s in STOPS],
)
def test_a_resumed_run_is_the_unbroken_run_bit_for_bit(
    unbroken: Recipe, tree: dict[str, Any], step: int
) -> None:
    recipe = stopped_after(unbroken, tree, step, f"from-{step}")
    assert run_alone(recipe, resume=True) == 0
    assert_same_run(recipe, unbroken)
    assert not [*recipe.run.path.rglob("*.partial"), *recipe.run.path.rglob(".tmp-*")]


def test_a_run_that_is_to_be_as_long_as_it_is_ends_with_a_validation(
    unbroken: Recipe, tree: dict[str, Any]
) -> None:
    recipe = stopped_after(unbroken, tree, 7, "as-long", optimization__max_steps=7)
    assert run_alone(recipe, resume=True) == 0
    results = RunFolder(recipe.run.path).read_results()
    assert results is not None
    assert results["step"] == 7
    last = validation_records(recipe)[-1]
    assert (last["step"], last["ce_loss"]) == (7, results["after"]["ce_loss"])
    saved = RunFolder(recipe.run.path).checkpoints.at(7)
    assert saved.facts.validation_loss == last["loss"]  # it may be the best one


def test_a_run_is_not_made_shorter_than_it_is(unbroken: Recipe, tree: dict[str, Any]) -> None:
    recipe = stopped_after(unbroken, tree, 7, "shorter", optimization__max_steps=6)
    before = files_of(recipe.run.path)
    with pytest.raises(CheckpointError, match="7 steps are done, 6 are asked for"):
        run_alone(recipe, resume=True)
    assert files_of(recipe.run.path) == before


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_run_goes_on_with_more_ranks_and_then_with_one(
    unbroken: Recipe, tree: dict[str, Any], num_ranks: int
) -> None:
    recipe = stopped_after(unbroken, tree, 7, f"to-{num_ranks}-ranks", optimization__microbatch_size=1)
    assert run_ranks(recipe, num_ranks, resume=True) == [0] * num_ranks
    assert_close_run(recipe, unbroken)
    for later in range(14, NUM_STEPS + 1):
        shutil.rmtree(recipe.run.path / "checkpoints" / f"step-{later:06d}")
    (recipe.run.path / "results.json").unlink()
    assert run_alone(recipe, resume=True) == 0
    assert_close_run(recipe, unbroken)


def assert_close_run(ours: Recipe, theirs: Recipe) -> None:
    for mine, other in zip(step_records(ours), step_records(theirs), strict=True):
        assert mine.pop("event") == other.pop("event")
        assert mine == pytest.approx(other, rel=2e-4)  # rounding, grown over up to 13 updates


def test_sigterm_saves_and_leaves_with_its_own_status(unbroken: Recipe, tree: dict[str, Any]) -> None:
    recipe = make_recipe(tree, run__name="terminated", run__checkpoint_every=None)
    process = start(recipe, resume=False)
    wait_for_steps(recipe, 4)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == INTERRUPTED_STATUS
    done = RunFolder(recipe.run.path).checkpoints.latest()
    assert done is not None
    assert 4 <= done.facts.step < NUM_STEPS
    assert run_alone(recipe, resume=True) == 0
    assert_same_run(recipe, unbroken)


def test_a_stop_during_a_validation_keeps_its_loss(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminated(*args: Any, **kwargs: Any) -> Any:
        if (losses := validate(*args, **kwargs)) and len(step_records(recipe)) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses

    recipe = make_recipe(tree, run__name="terminated-in-validation", run__checkpoint_every=None)
    monkeypatch.setattr("stage2_student.training.trainer.validate", terminated)
    process = start(recipe, resume=False)
    process.join(60)
    assert process.exitcode == INTERRUPTED_STATUS
    best = RunFolder(recipe.run.path).checkpoints.best()
    assert best is not None
    assert best.facts.validation_loss == validation_records(recipe)[-1]["loss"]


@pytest.mark.parametrize(
    "work", ["train.open_inputs", "training.trainer.build_student", "training.trainer.validate"]
)
def test_sigterm_before_the_first_step_leaves_with_its_own_status(
    unbroken: Recipe, tree: dict[str, Any], work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, name = f"stage2_student.{work}".rpartition(".")
    original = getattr(importlib.import_module(module), name)

    def terminated(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    recipe = make_recipe(tree, run__name=f"terminated-in-{work}")
    with monkeypatch.context() as patched:
        patched.setattr(f"stage2_student.{work}", terminated)
        process = start(recipe, resume=False)
        process.join(60)
    assert process.exitcode == INTERRUPTED_STATUS
    assert run_alone(recipe, resume=True) == 0
    assert_same_run(recipe, unbroken)


def test_sigterm_after_the_last_step_leaves_the_rest_to_the_next_attempt(
    unbroken: Recipe, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = stopped_after(unbroken, tree, NUM_STEPS, "terminated-late", run__export=True)

    def terminated(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return export_checkpoint(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr("stage2_student.train.export_checkpoint", terminated)
        process = start(recipe, resume=True)
        process.join(60)
    assert process.exitcode == INTERRUPTED_STATUS
    assert not (recipe.run.path / "results.json").exists()
    assert run_alone(recipe, resume=True) == 0
    assert_same_run(recipe, unbroken)


def wait_for_steps(recipe: Recipe, count: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (recipe.run.path / "metrics.jsonl").exists() and len(step_records(recipe)) >= count:
            return
        time.sleep(0.005)
    raise TimeoutError("the run does not get on")


def test_a_killed_loader_worker_costs_no_step(tree: dict[str, Any]) -> None:
    recipe = make_recipe(
        tree,
        run__name="worker-killed",
        run__checkpoint_every=None,
        run__num_workers=1,
        optimization__max_steps=100_000,
    )
    process = start(recipe, resume=False)
    wait_for_steps(recipe, 4)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    process.join(60)
    assert process.exitcode == 1  # of a test's process; a command has status 8
    saved = RunFolder(recipe.run.path).checkpoints.latest()
    assert saved is not None
    assert saved.facts.step == step_records(recipe)[-1]["step"]


@pytest.mark.parametrize("error", [TrainingError, CacheFormatError])
def test_an_error_of_a_validation_costs_no_step(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, error: type[TeachonceError]
) -> None:
    """As a loader worker that dies, or a cache that goes; a row's own error is in test_data_change.py."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        if len(step_records(recipe)) == 5:
            raise error("a worker died")
        return validate(*args, **kwargs)

    recipe = make_recipe(tree, run__name=f"validation-{error.__name__}", run__checkpoint_every=None)
    monkeypatch.setattr("stage2_student.training.trainer.validate", fail)
    with pytest.raises(error, match="a worker died"):
        run_alone(recipe)
    saved = RunFolder(recipe.run.path).checkpoints.latest()
    assert saved is not None
    assert saved.facts.step == 5


def test_an_error_that_one_rank_meets_alone_ends_all_at_once(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As memory that does not suffice for its part of a validation: to save, it would wait for the others."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == 1 and len(step_records(recipe)) == 5:
            raise TrainingError("too many tokens")
        return validate(*args, **kwargs)

    recipe = make_recipe(tree, run__name="one-rank", run__checkpoint_every=None)
    monkeypatch.setattr("stage2_student.training.trainer.validate", fail)
    monkeypatch.setattr("stage2_student.training.trainer.PATIENCE_S", 0.1)
    ended = on_ranks(2, lambda world: train(recipe, world, resume=False), errors=True)
    assert "another process of this job has ended" in str(ended[0])
    assert "too many tokens" in str(ended[1])
    assert RunFolder(recipe.run.path).checkpoints.latest() is None


def test_answers_that_fail_cost_nothing_that_is_finished(
    unbroken: Recipe, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = stopped_after(
        unbroken, tree, NUM_STEPS, "unanswered", run__export=True, evaluation__max_examples=2
    )

    def fail(*_: Any) -> None:
        raise RuntimeError("pictures of two sizes")

    with monkeypatch.context() as patched:
        patched.setattr("stage2_student.evaluation.summary._answering", fail)
        with pytest.raises(RuntimeError, match="two sizes"):
            run_alone(recipe, resume=True)
    results = RunFolder(recipe.run.path).read_results()
    assert results is not None
    assert (results["step"], results["unanswered"]) == (NUM_STEPS, "pictures of two sizes")
    assert run_alone(recipe, resume=True) == 0
    results = RunFolder(recipe.run.path).read_results()
    assert results is not None
    assert results["answers"]["num_examples"] == 2
    assert results["unanswered"] is None


def test_checkpoints_are_written_by_the_clock_too(tree: dict[str, Any]) -> None:
    """Of two ranks, whose clocks differ; here it is always time."""
    recipe = make_recipe(
        tree,
        run__name="by-the-clock",
        run__checkpoint_every=None,
        run__checkpoint_minutes=1e-9,
        optimization__max_steps=2,
    )
    assert run_ranks(recipe, 2) == [0, 0]
    assert [found.facts.step for found in RunFolder(recipe.run.path).checkpoints.all()] == [1, 2]


@pytest.mark.parametrize("num_kills", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_kill_9_at_any_moment_costs_no_more_than_the_last_steps(
    unbroken: Recipe, tree: dict[str, Any], num_kills: int
) -> None:
    """Kills fall anywhere: reading the data, between steps, while a checkpoint is written or removed."""
    chance = random.Random(num_kills)
    recipe = make_recipe(tree, run__name=f"killed-{num_kills}", run__keep_checkpoints=1)
    killed = 0
    while killed < num_kills:
        process = start(recipe, resume=True)
        process.join(chance.uniform(0.02, 1.2))
        if process.exitcode is None:
            process.kill()
            process.join()
            killed += 1
        else:  # it had finished: begin anew
            assert process.exitcode == 0
            assert_same_run(recipe, unbroken)
            shutil.rmtree(recipe.run.path)
    assert run_alone(recipe, resume=True) == 0
    assert_same_run(recipe, unbroken)
    assert not [*recipe.run.path.rglob("*.partial"), *recipe.run.path.rglob(".tmp-*")]


def test_a_folder_belongs_to_the_process_that_trains_in_it(unbroken: Recipe, tree: dict[str, Any]) -> None:
    recipe = make_recipe(tree, run__name="busy")

    def refused(world: World) -> str:
        with pytest.raises(RecipeError) as error:
            train(recipe, world, resume=True)
        return str(error.value)

    process = start(recipe, resume=False)
    wait_for_steps(recipe, 1)
    os.kill(process.pid, signal.SIGSTOP)
    there = files_of(recipe.run.path)
    messages = on_ranks(2, refused)  # on all ranks, and none waits for another
    for resume in (True, False):
        with pytest.raises(RecipeError) as error:
            run_alone(recipe, resume=resume)
        messages.append(str(error.value))
    assert files_of(recipe.run.path) == there
    os.kill(process.pid, signal.SIGCONT)
    process.join(60)
    assert process.exitcode == 0
    for message in messages:
        assert f"another process is training in this folder (process {process.pid} on " in message
    assert_same_run(recipe, unbroken)
    assert not list(recipe.run.path.glob("*.lock"))


def test_a_run_that_cannot_begin_leaves_no_folder(tree: dict[str, Any]) -> None:
    recipe = make_recipe(tree, run__name="nothing", data__source="nowhere/at/all")
    with pytest.raises(DataError, match="nowhere/at/all"):
        run_alone(recipe)
    assert not recipe.run.path.exists()


def test_a_run_folder_is_not_taken_over_without_being_asked(unbroken: Recipe, tree: dict[str, Any]) -> None:
    """Neither by another recipe of the same name, nor where this one is not finished."""
    other = make_recipe(tree, optimization__learning_rate=1e-3)
    for recipe in (other, stopped_after(unbroken, tree, 2, "unfinished")):
        with pytest.raises(RecipeError, match=r"run of this name already.*--resume.*run\.name"):
            run_alone(recipe)


def test_a_finished_run_says_what_came_out(unbroken: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    before = records(unbroken)
    assert run_alone(unbroken, resume=True) == 0
    assert "short answers right" in capsys.readouterr().out
    assert records(unbroken) == before


@pytest.fixture
def without_checkpoints(unbroken: Recipe, tree: dict[str, Any]) -> Recipe:
    """A finished run whose checkpoints were deleted to save space."""
    recipe = make_recipe(tree, run__name="without-checkpoints")
    shutil.rmtree(recipe.run.path, ignore_errors=True)
    shutil.copytree(unbroken.run.path, recipe.run.path)
    shutil.rmtree(recipe.run.path / "checkpoints")
    return recipe


def test_a_finished_run_without_checkpoints_keeps_what_it_has(
    without_checkpoints: Recipe, tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(without_checkpoints.run.path)
    changed = make_recipe(tree, run__name="without-checkpoints", optimization__learning_rate=0.5)
    assert run_alone(changed, resume=True) == 0
    assert "short answers right" in capsys.readouterr().out
    assert files_of(without_checkpoints.run.path) == before


def test_a_finished_run_without_checkpoints_cannot_be_lengthened(
    without_checkpoints: Recipe, tree: dict[str, Any]
) -> None:
    before = files_of(without_checkpoints.run.path)
    longer = make_recipe(tree, run__name="without-checkpoints", optimization__max_steps=NUM_STEPS + 1)
    with pytest.raises(CheckpointError, match=r"finished after 20 steps.*21 are asked for.*no checkpoint"):
        run_alone(longer, resume=True)
    assert files_of(without_checkpoints.run.path) == before


def test_lines_of_the_log_that_are_no_records_do_not_keep_a_run_from_going_on(
    unbroken: Recipe, tree: dict[str, Any]
) -> None:
    recipe = stopped_after(unbroken, tree, 18, "foreign-lines")
    with open(recipe.run.path / "metrics.jsonl", "ab") as log:
        log.write(b'5\n[]\n{}\n\xff\n{"event": "step", "step": "3"}\n{"event": "st')
    assert run_alone(recipe, resume=True) == 0
    assert_same_run(recipe, unbroken)


def test_another_recipe_cache_or_data_set_is_refused_with_both_sides(
    unbroken: Recipe, tree: dict[str, Any]
) -> None:
    other = make_recipe(tree, optimization__learning_rate=0.5, loss__kd_ratio=0.0, data__limit=8)
    with pytest.raises(CheckpointError) as refused:
        run_alone(other, resume=True)
    message = str(refused.value)
    assert "recipe.optimization.learning_rate: the run has 0.01, now it is 0.5" in message
    assert "cache.manifest: the run has" in message
    assert "data.train: the run has" in message
    assert "What may change: " in message
    assert "run.validate_every" in message


def test_what_may_change_may_change(unbroken: Recipe, tree: dict[str, Any]) -> None:
    stopped = stopped_after(unbroken, tree, 18, "changed")
    other = make_recipe(
        tree,
        run__name="changed",
        run__validate_every=1,
        optimization__microbatch_size=1,
        optimization__max_steps=19,
        loss__chunk_size=7,
    )
    assert other.run.path == stopped.run.path
    assert run_alone(other, resume=True) == 0
    assert step_records(other)[-1]["step"] == 19


def test_which_rows_are_the_students_own_is_part_of_a_run() -> None:
    """A release before did not write it down; alone it is no change of the data that could be accepted."""
    now = {"data.train": "a", OWN: "b"}
    require_same({"data.train": "a"}, now, where="here")
    other = now | {OWN: "c"}
    with pytest.raises(CheckpointError, match=r"data\.own: the run has 'c', now it is 'b'"):
        require_same(other, now, where="here", accept_data_change=True)
    require_same(other | {"data.train": "d"}, now, where="here", accept_data_change=True)


def test_a_run_whose_examples_came_in_another_order_says_which_release_goes_on_with_it() -> None:
    with pytest.raises(
        CheckpointError, match=r"(?s)1 thing\(s\) differ.*else finish the run with the release that began it"
    ):
        require_same({"step": 1}, {"step": 1, ORDER: "another"}, where="run x")


def test_rows_cannot_change_under_an_order_by_shards() -> None:
    by_shards = f"2, {BY_SHARDS} 2 shards, layout "
    now = {"data.train": "a", CACHE: "c", ORDER: by_shards + "e"}
    then = {"data.train": "b", CACHE: "d", ORDER: by_shards + "f"}
    with pytest.raises(CheckpointError, match=r"follow the cache's shards \(cache\.shuffle_window\)"):
        require_same(then, now, where="run x", accept_data_change=True)
