"""How a step is cut into ranks and microbatches changes its losses and gradients by rounding only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stage2_runs import (
    assert_same_state,
    make_recipe,
    on_ranks,
    run_alone,
    run_ranks,
    state_of,
    step_records,
    teacher_of,
    validation_records,
)

from shared.recipes import Recipe
from shared.runtime import World
from stage2_student.train import train
from stage2_student.training import step
from stage2_student.training.feed import Microbatch
from stage2_student.training.student import Forwarded


@pytest.fixture(scope="module")
def tree(
    tmp_path_factory: pytest.TempPathFactory, vqa_folder: Path, student_folder: Path, teacher_cache: Path
) -> dict[str, Any]:
    """Two epochs of 9 examples in steps of 4, 4 and 1."""
    return {
        "data": {"source": str(vqa_folder), "max_answer_tokens": 64, "limit": 9},
        "teacher": teacher_of(teacher_cache),
        "cache": {"path": str(teacher_cache), "temperatures": [1.0, 2.0]},
        "student": {"model": str(student_folder), "compute_dtype": "float32"},
        "loss": {"kd_ratio": 0.5, "chunk_size": 16},
        "optimization": {
            "global_batch_size": 4,
            "microbatch_size": 4,
            "max_steps": 6,
            "learning_rate": 1e-2,
            "num_warmup_steps": 2,
        },
        "run": {
            "name": "one",
            "root": str(tmp_path_factory.mktemp("runs")),
            "num_workers": 0,
            "export": False,
        },
    }


def assert_same_losses(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.pop("event") == other.pop("event")
        assert mine == pytest.approx(other, rel=2e-5)


@pytest.fixture(scope="module")
def one(tree: dict[str, Any]) -> Recipe:
    """The run of one rank and one microbatch."""
    recipe = make_recipe(tree)
    run_alone(recipe)
    return recipe


def test_cutting_a_step_does_not_change_it(tree: dict[str, Any], one: Recipe) -> None:
    for size in (2, 1):
        accumulated = make_recipe(tree, run__name=f"of-{size}", optimization__microbatch_size=size)
        run_alone(accumulated)
        assert_same_losses(step_records(accumulated), step_records(one))
        assert_same_losses(validation_records(accumulated), validation_records(one))


@pytest.mark.parametrize(
    ("num_ranks", "microbatch_size"), [(2, 2), (2, 1), pytest.param(4, 1, marks=pytest.mark.slow)]
)
def test_ranks_equal_one_rank(
    tree: dict[str, Any], one: Recipe, num_ranks: int, microbatch_size: int
) -> None:
    """The last step of an epoch has one example: the other ranks forward one that does not count."""
    many = make_recipe(
        tree, run__name=f"{num_ranks}-{microbatch_size}", optimization__microbatch_size=microbatch_size
    )
    assert run_ranks(many, num_ranks) == [0] * num_ranks
    assert_same_losses(step_records(many), step_records(one))
    assert_same_losses(validation_records(many), validation_records(one))


def test_blocks_that_are_sharded_together_change_nothing(tree: dict[str, Any], one: Recipe) -> None:
    """The default for blocks as small as these; also of one rank, bit for bit."""
    for num_ranks, settings in ((1, {}), (2, {"optimization__microbatch_size": 2})):
        together = make_recipe(
            tree, run__name=f"together-{num_ranks}", parallel__min_block_params=1_000_000, **settings
        )
        statuses = [run_alone(together)] if num_ranks == 1 else run_ranks(together, num_ranks)
        assert statuses == [0] * num_ranks
        assert_same_losses(step_records(together), step_records(one))
        assert_same_losses(validation_records(together), validation_records(one))
        if num_ranks == 1:
            assert_same_state(state_of(together, 6), state_of(one, 6))


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_groups_that_hold_a_whole_copy_each_equal_one_rank(
    tree: dict[str, Any], one: Recipe, num_ranks: int
) -> None:
    """Hybrid sharding: two replicas, each sharded over one rank or two."""
    hybrid = make_recipe(
        tree,
        run__name=f"hybrid-{num_ranks}",
        optimization__microbatch_size=1,
        parallel__dp_replicate=2,
    )
    assert run_ranks(hybrid, num_ranks) == [0] * num_ranks
    assert_same_losses(step_records(hybrid), step_records(one))
    assert_same_losses(validation_records(hybrid), validation_records(one))


def test_offloading_changes_where_parameters_lie_and_nothing_else(tree: dict[str, Any], one: Recipe) -> None:
    """Without a GPU the policy's own path, which copies nothing."""
    offloaded = make_recipe(
        tree, run__name="offloaded", optimization__microbatch_size=2, parallel__cpu_offload=True
    )
    assert run_ranks(offloaded, 2) == [0, 0]
    assert_same_losses(step_records(offloaded), step_records(one))
    assert_same_losses(validation_records(offloaded), validation_records(one))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_rank_that_runs_out_of_memory_in_a_step_ends_the_others_at_once(
    where: str, tree: dict[str, Any], tmp_path: Path
) -> None:
    recipe = make_recipe(tree, run__root=str(tmp_path))

    def fail(*_: object) -> None:
        raise MemoryError

    def work(world: World) -> int:
        forward = step.forward

        def failing(
            student: torch.nn.Module, microbatch: Microbatch, world: World, **options: Any
        ) -> Forwarded:
            layer = [one for one in student.modules() if type(one).__name__.endswith("DecoderLayer")][-1]
            if where == "forward":
                layer.register_forward_pre_hook(fail)
            losses, router = forward(student, microbatch, world, **options)
            losses.loss.register_hook(fail)
            return losses, router

        if world.rank == 1:
            step.forward = failing
        return train(recipe, world, resume=False)

    ended = on_ranks(2, work, errors=True)  # whose time limit for collectives is ten minutes
    assert "another process of this job has ended" in str(ended[0])
    assert "tokens do not fit into memory together" in str(ended[1])
