"""Rounds: the student writes, the teacher is captured on that, the student trains on the mixture, and again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from stage2_runs import files_of, make_recipe, records, run_ranks, step_records
from test_write import rows_of

from shared.cache import CacheReader
from shared.completeness import cache_covers
from shared.data.processing import ExampleProcessor, open_processor
from shared.data.rows import open_split
from shared.data.written import WRITTEN, is_students
from shared.errors import CheckpointError, RecipeError
from shared.finished import run_is_finished
from shared.pipeline import make_rounds
from shared.recipes import Recipe, WriteConfig, load_recipe, recipe_text
from shared.rounds import Rounds, go_through, require_possible, settings_of_round_0, table_of
from shared.rounds.plan import keep
from shared.rounds.students import require_same_student
from shared.rounds.table import _new_positions, captured_so_far, outcomes
from shared.runtime import distributed
from shared.stopping import StopRequest
from shared.surveying import survey_keys
from shared.vouched import opened, vouched
from shared.writing.loop import asked
from stage1_teacher.__main__ import commands as stage1
from stage1_teacher.capture import capture
from stage2_student.__main__ import commands as stage2
from stage2_student.runs.identity import OWN
from stage2_student.training.inputs import open_inputs
from stage2_student.training.optim import learning_rate
from stage2_student.training.order import Slot, step_examples, step_shape, total_steps
from stage2_student.training.own_answers import require_samples
from stage2_student.training.step import forward
from stage2_student.training.student import build_student

DIED = 137
STAGES = {"stage1_teacher": stage1, "stage2_student": stage2}


@pytest.fixture(scope="module")
def tree(vqa_folder: Path, teacher_folder: Path, student_folder: Path) -> dict[str, Any]:
    return {
        "data": {"source": str(vqa_folder), "max_answer_tokens": 64},
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "cache": {"num_workers": 0, "label_log_prob": True},
        "student": {"model": str(student_folder), "compute_dtype": "float32"},
        "optimization": {"global_batch_size": 6, "microbatch_size": 6, "max_steps": 2, "learning_rate": 1e-2},
        "loss": {"reverse_kl": 0.5},
        "run": {"name": "own", "num_workers": 0, "async_checkpoints": False},
        "evaluation": {"max_examples": 3, "max_new_tokens": 4},
        "write": {
            "temperature": 1.0,
            "max_new_tokens": 6,
            "num_workers": 0,
            "seed": 1,
        },  # own rows in each step
        "rounds": {"number": 2},
    }


def recipe_in(tree: dict[str, Any], folder: Path, **overrides: Any) -> Recipe:
    places = {"cache__path": str(folder / "cache"), "run__root": str(folder / "runs")}
    return make_recipe(tree, **places | overrides)


class Commands:
    """Runs the stages' own commands in this process, and notes them."""

    def __init__(self, *, dies_at: int | None = None) -> None:
        self.ran: list[tuple[str, str]] = []
        self.dies_at = dies_at

    def __call__(self, module: str, verb: str, about: str, arguments: Sequence[str], *, what: str) -> int:
        if len(self.ran) == self.dies_at:
            return DIED
        self.ran.append((module, verb))
        done = CliRunner().invoke(STAGES[module], [verb, about, *arguments], standalone_mode=False)
        if done.exception is not None:
            raise done.exception
        return int(done.return_value)


def begun(recipe: Recipe) -> Rounds:
    """With round 0 finished."""
    path = Path(recipe.run.root).parent / "recipe.yaml"
    path.write_text(recipe_text(Rounds(recipe, num_rows=12).of(0).training))
    for module, verb in (("stage1_teacher", "capture"), ("stage2_student", "run")):
        assert Commands()(module, verb, str(path), (), what="") == 0
    return Rounds.of_recipe(recipe)


ROUND = [("stage2_student", "write"), ("stage1_teacher", "capture"), ("stage2_student", "run")]
MEASURE = [("stage2_student", "write"), ("stage1_teacher", "capture"), ("stage2_student", "evaluate")]


@pytest.fixture(scope="module")
def finished(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Rounds, list[Any]]:
    """Two rounds that died after each of their commands, and went on; and these commands."""
    rounds = begun(recipe_in(tree, tmp_path_factory.mktemp("rounds")))
    ran: list[Any] = []
    status = DIED
    while status == DIED:
        commands = Commands(dies_at=1)
        status = go_through(rounds, commands, cache_covers)
        ran += commands.ran
    assert status == 0
    return rounds, ran


@pytest.mark.slow
def test_two_rounds_from_the_first_answer_to_the_table(finished: tuple[Rounds, list[Any]]) -> None:
    rounds, ran = finished
    assert ran == [*MEASURE, *ROUND, *MEASURE, *ROUND, *MEASURE]
    first, second = rounds.of(1), rounds.of(2)
    asked = [{row["source_row"] for row in rows_of(one.answers)} for one in (first, second)]
    assert [len(one) for one in asked] == [6, 6]
    assert asked[0] | asked[1] == set(range(12))  # each round asks other prompts
    for one in (first, second):
        told = json.loads(rows_of(one.answers)[0]["written_by"])
        assert (told["role"], told["run"]) == ("student", str(one.before.run))
        own = [row for row in open_split(one.training.data, "train") if row.written_by]
        assert {row.index for row in own} == asked[one.number - 1]
        recipe = load_recipe(one.folder / "train.yaml")
        assert recipe == one.training
        assert recipe.student.model == str(one.before.run / "export")
    assert len(open_split(second.training.data, "train")) == 12


@pytest.mark.slow
def test_the_table_has_all_rounds_and_what_they_took_of_the_teacher(
    finished: tuple[Rounds, list[Any]],
) -> None:
    rounds, _ = finished
    lines = table_of(rounds)
    assert [line.split()[:2] for line in lines[1:4]] == [["0", "0"], ["1", "6"], ["2", "6"]]
    told = json.loads((rounds.folder / "rounds.json").read_text())["rounds"]
    found = list(outcomes(rounds))
    assert [one["own_kl"] for one in told] == [one.own_kl for one in found]
    for one, each in zip(found, rounds.all, strict=True):
        results = json.loads((each.run / "results.json").read_text())
        assert (one.ce, one.kl) == (results["after"]["ce_loss"], results["after"]["kl"])
        assert one.own_kl is not None
        assert one.own_kl > 0
        kept = opened(json.loads(each.losses.read_text())[0])
        counts = opened(json.loads((each.greedy / WRITTEN).read_text()))["counts"]
        assert kept["by_row"]["rows"] == counts["answers"] > 1
        assert one.own_row_kl == kept["by_row"]["kl"]
        assert one.right is not None
    steps = [sum(one["num_positions"] for one in step_records(each.training)) for each in rounds.all]
    assert [one.live for one in found] == [steps[0], steps[0] + steps[1], sum(steps)]
    assert rounds.recipe.cache is not None
    manifest = CacheReader(rounds.recipe.cache.location).manifest
    assert found[2].captured == manifest.totals.positions
    new = [
        sum(len(row["answer_ids"]) + row["answer_end"] for row in rows_of(rounds.of(n).answers))
        for n in (1, 2)
    ]
    assert [found[1].captured - found[0].captured, found[2].captured - found[1].captured] == new
    assert manifest.totals.examples == 16 + 6 + 6  # nothing of the measures


@pytest.mark.slow
def test_reverse_kl_counts_at_the_students_own_answers(finished: tuple[Rounds, list[Any]]) -> None:
    """Of a round's microbatches those positions have the teacher's log-prob; two ranks train as one."""
    rounds, _ = finished
    assert [one for one in records(rounds.recipe) if "reverse_kl" in one] == []  # round 0 has none
    one = rounds.of(1)
    reader = CacheReader(str(rounds.recipe.cache.location if rounds.recipe.cache else None))
    with distributed(device="cpu") as world:
        source = open_inputs(one.training, world).training_source()
    number = len(source.rows)
    batch = source.microbatch(Slot(0, tuple(range(number))), source.rows.tolist())
    assert batch.label_logprobs is not None
    parts = batch.label_logprobs.split(list(batch.lengths))
    for row, part in zip(source.rows.tolist(), parts, strict=True):
        example = source.split[row]
        if not example.written_by:
            assert bool(part.isnan().all())
            continue
        (held,) = reader.rows([source.processor.key(example)])
        assert held.label_log_prob is not None
        assert part.tolist() == held.label_log_prob.astype(float).tolist()
    together = make_recipe(
        one.training.model_dump(mode="json", exclude={"write", "rounds"}), run__name="ranks"
    )
    assert run_ranks(together, 2) == [0, 0]
    alone, ranks = (
        [(line["loss"], line["reverse_kl"]) for line in records(each) if line["event"] == "step"]
        for each in (one.training, together)
    )
    assert len(alone) == 2
    for ours, theirs in zip(ranks, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)


def test_of_a_conversation_only_what_the_student_wrote_counts_as_its_own(
    tree: dict[str, Any], tmp_path: Path, processor: ExampleProcessor
) -> None:
    """Earlier answers are the data set's: no samples of the student, though they are learned, as labels too."""
    ids = processor.tokenizer("axial", add_special_tokens=False)["input_ids"]
    writer = json.dumps({"role": "student", "run": "runs/own", "temperature": 1.0, "top_p": 1.0})
    turns = [
        ("user", "Which modality?"),
        ("assistant", "MR"),
        ("user", "Which plane?"),
        ("assistant", "axial"),
    ]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    rows = [row | {"answer_ids": ids, "answer_end": True, "written_by": writer}, row]
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = {"train": "train", "validation": None}
    recipe = recipe_in(
        tree,
        tmp_path,
        data__source=str(data),
        data__splits=splits,
        rounds__number=1,
        loss__kd_ratio=0.25,
        loss__own_kd_ratio=1.0,
    )
    unnamed = recipe_in(recipe.model_dump(mode="json"), tmp_path, data__columns={"written_by": None})
    with distributed(device="cpu") as world:
        assert capture(recipe, world, StopRequest()) == 0
        inputs = open_inputs(recipe, world)
        assert inputs.identity(recipe)[OWN] != open_inputs(unnamed, world).identity(unnamed)[OWN]
    source = inputs.training_source()
    batch = source.microbatch(Slot(0, (0, 1)), [0, 1])
    assert batch.label_logprobs is not None
    own, given = (~batch.label_logprobs.isnan()).split(list(batch.lengths))
    measuring = Rounds(recipe, num_rows=2).of(1).measuring
    measured = open_processor(str(tree["student"]["model"]), measuring.data).encode(source.split[0])
    assert measured.answer_ids.tolist()[:-1] == ids  # along the student's own answer alone
    assert own.tolist() == [False] * (len(own) - len(ids) - 1) + [True] * (len(ids) + 1)
    assert len(own) > len(ids) + 1
    assert not bool(given.any())
    assert batch.weighing is not None
    assert batch.weighing.kd_ratio_N is not None
    assert batch.weighing.kd_ratio_N.tolist() == [1.0 if one else 0.25 for one in [*own, *given]]
    with distributed(device="cpu") as world:
        student = build_student(recipe, world, num_token_ids=source.processor.num_token_ids).eval()
        losses, _ = forward(student, batch, world)
        fed = (batch.inputs, batch.position_index, batch.labels, batch.targets, batch.num_rows)
        found = student.measure(*fed)
        del student
        world.release_memory()
    assert found.kl_N is not None
    ratio_N = batch.weighing.kd_ratio_N
    want = ((1 - ratio_N) * found.ce_N + ratio_N * found.kl_N).sum() + 0.5 * losses.reverse_kl
    torch.testing.assert_close(losses.loss.detach(), want)
    without = source.microbatch(Slot(0, (1,)), [1])
    assert without.weighing is not None
    assert without.weighing.kd_ratio_N is None  # nothing of its own


def test_own_rows_are_found_among_any_number_of_writers(
    tree: dict[str, Any], tmp_path: Path, processor: ExampleProcessor
) -> None:
    """Which a manifest names in part, and each shortened."""
    student = json.dumps({"role": "student", "run": "r" * 3000, "temperature": 0.0, "top_p": 1.0})
    writers = [f"annotator {number}" for number in range(101) for _ in range(2)]
    lines = [
        {"question": "Which plane?", "answer": f"axial {number}", "image": None, "written_by": writer}
        for number, writer in enumerate([*writers[:90], student, *writers[90:]])
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    splits = {"train": "train", "validation": None}
    source = {"data__source": str(tmp_path), "data__text_only": True, "data__splits": splits}
    recipe = recipe_in(tree, tmp_path, **source)
    found = survey_keys(recipe.data, "train", processor)
    assert found.own.nonzero()[0].tolist() == [90]
    assert found.own_writers == (student,)
    with pytest.raises(RecipeError, match="they are no samples of the student"):
        require_samples(recipe, found.own_writers)


@pytest.mark.slow
def test_finished_rounds_run_nothing(finished: tuple[Rounds, list[Any]]) -> None:
    rounds, _ = finished
    before = files_of(rounds.folder)
    again = Commands(dies_at=0)
    assert go_through(rounds, again, cache_covers) == 0
    assert again.ran == []
    assert files_of(rounds.folder) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimization__max_steps": 3}, r"max_steps: 2 there, 3 now"),
        ({"rounds__number": 3}, r"not the first part of one for all rounds"),
    ],
)
def test_rounds_of_another_length_are_refused_before_anything_runs(
    finished: tuple[Rounds, list[Any]], settings: dict[str, Any], message: str
) -> None:
    """Answers and losses that are there would be of students that are no more."""
    rounds, _ = finished
    other = make_recipe(rounds.recipe.model_dump(mode="json"), **settings)
    again = Commands(dies_at=0)

    def as_make_rounds() -> None:
        settings_of_round_0(other)
        go_through(Rounds(other, rounds.num_rows), again, cache_covers)

    with pytest.raises(RecipeError, match=message):
        as_make_rounds()
    assert again.ran == []


@pytest.mark.slow
def test_another_number_of_held_out_prompts_is_for_rounds_that_are_all_asked(
    finished: tuple[Rounds, list[Any]],
) -> None:
    """Losses of all rounds must be along the same prompts; what is finished is shown as it is."""
    rounds, _ = finished
    other = make_recipe(rounds.recipe.model_dump(mode="json"), evaluation__max_examples=2)
    planned, again = Rounds(other, rounds.num_rows), Commands()
    assert go_through(planned, again, cache_covers) == 0
    assert set(again.ran) == {("stage2_student", "run")}  # each shows that it is finished
    last = planned.all[-1].losses
    told = last.read_bytes()
    last.unlink()
    with pytest.raises(RecipeError, match=r"evaluation\.max_examples: 3 there, 2 now"):
        go_through(planned, Commands(dies_at=0), cache_covers)
    last.write_bytes(told)


@pytest.mark.slow
def test_rounds_are_added_with_schedules_of_their_own(finished: tuple[Rounds, list[Any]]) -> None:
    rounds, _ = finished
    more = {"number": 3, "one_schedule": False}
    longer = make_recipe(rounds.recipe.model_dump(mode="json") | {"rounds": more})
    assert settings_of_round_0(longer) == [f"optimization.schedule_part=[0.0, {1 / 3}]"]
    planned = Rounds(longer, rounds.num_rows)
    assert [run_is_finished(one.training) for one in planned.all] == [True, True, True, False]
    assert planned.of(3).training.optimization.schedule_part is None
    again = Commands(dies_at=0)
    assert go_through(planned, again, cache_covers) == DIED  # at the first command of round 3


@pytest.mark.slow
def test_a_stopped_capture_is_counted_in_its_round(finished: tuple[Rounds, list[Any]]) -> None:
    """The log of a cache has what its last session captured."""
    rounds, _ = finished
    assert rounds.recipe.cache is not None
    log = Path(rounds.recipe.cache.location) / "log.jsonl"
    before, text = captured_so_far(rounds), log.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    log.write_text("\n".join(json.dumps(line | {"positions": 1}) for line in lines) + "\n")
    found = captured_so_far(rounds)
    log.write_text(text)
    assert found == before


def test_an_answer_given_twice_is_captured_once(tree: dict[str, Any], tmp_path: Path) -> None:
    """Where rounds ask the same prompts, short answers often come out alike."""
    rounds = rounds_of(tree, tmp_path, own_share=1.0)
    names, seen = rounds.recipe.data.columns, set[tuple[Any, ...]]()
    answers = {1: [("k", [5, 6, 7], True)], 2: [("k", [5, 6, 7], True), ("k", [5], False)]}
    for number, rows in answers.items():
        rounds.of(number).answers.mkdir(parents=True)
        keys, ids, ends = (list(column) for column in zip(*rows, strict=True))
        table = pa.table({"source_key": keys, str(names.answer_ids): ids, str(names.answer_end): ends})
        pq.write_table(table, rounds.of(number).answers / "train-00000-of-00001.parquet")
    assert [_new_positions(one, seen) for one in rounds.all] == [0, 4, 1]


@pytest.mark.slow
def test_round_0_is_shown_by_the_ordinary_command(finished: tuple[Rounds, list[Any]]) -> None:
    rounds, _ = finished
    assert run_is_finished(rounds.recipe)
    assert not run_is_finished(rounds.recipe.of_a_run())  # whose schedule is a whole one


@pytest.mark.slow
def test_other_answers_for_a_round_that_was_begun_are_refused(finished: tuple[Rounds, list[Any]]) -> None:
    rounds, _ = finished
    config = rounds.config.model_copy(update={"own_share": 0.25})
    other = Rounds(rounds.recipe.model_copy(update={"rounds": config}), rounds.num_rows)
    with pytest.raises(RecipeError, match=r"write\.prompts: 6 there, 3 now\nGive these back"):
        go_through(other, Commands(), cache_covers)


def rounds_of(tree: dict[str, Any], tmp_path: Path, **settings: Any) -> Rounds:
    recipe = recipe_in(tree, tmp_path, **{f"rounds__{name}": value for name, value in settings.items()})
    return Rounds(recipe, num_rows=12)


def test_shares_prompts_and_earlier_rounds(tree: dict[str, Any], tmp_path: Path) -> None:
    fresh = rounds_of(tree, tmp_path, own_share=0.25)
    assert fresh.num_prompts == 3
    assert [len(one.sets) for one in fresh.all[1:]] == [1, 1]
    kept = rounds_of(tree, tmp_path, own_share=0.5, earlier="keep", number=3)
    assert kept.num_prompts == 2  # a half of the rows in the last round
    assert [[path.parent.name for path in one.sets] for one in kept.all[1:]] == [
        ["round-1"],
        ["round-1", "round-2"],
        ["round-1", "round-2", "round-3"],
    ]
    assert rounds_of(tree, tmp_path, prompts=5).num_prompts == 5
    assert rounds_of(tree, tmp_path, prompts=100).num_prompts == 12
    none = rounds_of(tree, tmp_path, own_share=0.0)
    assert (none.num_prompts, none.of(1).training.data.written) == (0, None)
    assert [one.writing.write.part for one in fresh.all[1:] if one.writing.write] == [0, 1]
    short = tree | {"optimization": tree["optimization"] | {"global_batch_size": 2}}  # of 4 of the 12 rows
    assert [rounds_of(short, tmp_path, **one).num_prompts for one in ({}, {"earlier": "keep"})] == [2, 2]
    assert rounds_of(short, tmp_path, prompts=5).num_prompts == 4


@pytest.mark.parametrize(
    ("length", "settings"),
    [
        ({"max_steps": 1}, {}),
        ({"max_steps": 2}, {"one_schedule": False}),
        ({"num_epochs": 1.5}, {"earlier": "keep"}),
        ({"num_epochs": 2.0}, {"round_epochs": 0.4}),
    ],
    ids=json.dumps,
)
def test_rounds_share_one_pass_over_the_rows_and_ask_what_they_train_on(
    tree: dict[str, Any],
    tmp_path: Path,
    processor: ExampleProcessor,
    length: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """A round takes the rows that come after those of the round before, as one run of all their steps would."""
    optimization = {"global_batch_size": 4, "microbatch_size": 4, **length}
    rounds = rounds_of(tree | {"optimization": optimization}, tmp_path, **settings)
    taken: list[list[int]] = []
    with distributed(device="cpu") as world:
        for one in rounds.all:
            shape = step_shape(one.training, 12)
            steps = [step_examples(n, shape).tolist() for n in range(total_steps(one.training, shape))]
            taken += steps
            if one.number == 0:
                continue
            (part,) = asked(one.writing, processor, one.writing.write or WriteConfig(), world).keyed
            rows = {row for step in steps for row in step}
            assert set(part.rows.tolist()) <= rows
            assert len(part.rows) == rounds.num_prompts
    whole = step_shape(rounds.recipe, 12)
    assert taken == [step_examples(n, whole).tolist() for n in range(len(taken))]


def test_answers_of_a_run_that_was_trained_anew_are_refused(tree: dict[str, Any], tmp_path: Path) -> None:
    """Its settings may have changed between, or not."""
    rounds = rounds_of(tree, tmp_path)
    first = rounds.of(0)
    export = first.run / "export"

    def trained(weights: str) -> None:
        export.mkdir(parents=True, exist_ok=True)
        told = {"sha256": {"model.safetensors": weights, "config.json": "other settings of Transformers"}}
        (export / "teachonce.json").write_text(json.dumps(vouched(told)))

    trained("one")
    require_possible(rounds.recipe)
    require_same_student(first)
    require_same_student(first)
    trained("two")
    with pytest.raises(
        CheckpointError, match=r"has been trained anew since\. Answers and losses in .*-rounds are"
    ):
        require_same_student(first)
    shutil.rmtree(first.run)
    with pytest.raises(CheckpointError, match=r"this run is gone"):
        require_possible(rounds.recipe)


@pytest.mark.parametrize("column", ["answer_ids", "answer_end", "written_by"])
def test_rounds_without_columns_to_write_in_are_refused_before_they_begin(
    tree: dict[str, Any], tmp_path: Path, column: str
) -> None:
    recipe = recipe_in(tree, tmp_path, data__columns={column: None})
    with pytest.raises(RecipeError, match=rf"data\.columns\.{column} is null"):
        require_possible(recipe)


def test_later_rounds_may_be_shorter_and_slower(tree: dict[str, Any], tmp_path: Path) -> None:
    rounds = rounds_of(tree, tmp_path, one_schedule=False, round_epochs=0.5, round_learning_rate=1e-3)
    first, later = (rounds.of(number).training.optimization for number in (0, 1))
    assert (first.max_steps, first.num_epochs, first.learning_rate) == (2, None, 1e-2)
    assert (later.max_steps, later.num_epochs, later.learning_rate) == (None, 0.5, 1e-3)
    alike = rounds_of(tree, tmp_path, one_schedule=False).of(1).training.optimization
    assert alike == first.model_copy(update={"first_step": 2})


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, [(0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1)]),
        ({"rounds__round_epochs": 0.5}, [(0, 0.75), (0.75, 0.875), (0.875, 1)]),
    ],
    ids=["alike", "shorter"],
)
def test_all_rounds_go_through_one_schedule(
    tree: dict[str, Any], tmp_path: Path, settings: dict[str, Any], parts: list[tuple[float, float]]
) -> None:
    """As a run of all their steps has it, but for the warm-ups."""
    length = {"optimization__max_steps": None, "optimization__num_epochs": 3.0}
    rounds = Rounds(recipe_in(tree, tmp_path, **length | settings), num_rows=12)
    each = [one.training.optimization for one in rounds.all]
    for config, part in zip(each, parts, strict=True):
        assert config.schedule_part == pytest.approx(part)
    lengths = [round((config.num_epochs or 0) * 2) for config in each]
    rates = [
        learning_rate(config, step=step, num_steps=num_steps)
        for config, num_steps in zip(each, lengths, strict=True)
        for step in range(num_steps)
    ]
    whole = sum(lengths)
    plain = rounds.recipe.optimization
    assert rates == pytest.approx([learning_rate(plain, step=n, num_steps=whole) for n in range(whole)])


def test_a_run_of_its_own_schedule_is_no_round_of_one(tree: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_in(tree, tmp_path)
    assert settings_of_round_0(recipe) == [f"optimization.schedule_part=[0.0, {1 / 3}]"]
    recipe.run.path.mkdir(parents=True)
    (recipe.run.path / "recipe.yaml").write_text(recipe_text(recipe))
    with pytest.raises(RecipeError, match="not the first part of one for all rounds"):
        settings_of_round_0(recipe)
    assert settings_of_round_0(recipe_in(tree, tmp_path, rounds__one_schedule=False)) == []
    part = recipe_in(tree, tmp_path, optimization__schedule_part=[0, 0.5])
    with pytest.raises(RecipeError, match="the rounds set it"):
        settings_of_round_0(part)


@pytest.mark.parametrize(("role", "temperature"), [("student", 0.0), ("student", 0.7), ("teacher", 0.0)])
def test_reverse_kl_asks_for_samples(
    tree: dict[str, Any], tmp_path: Path, role: str, temperature: float
) -> None:
    recipe = recipe_in(tree, tmp_path)
    writer = json.dumps({"role": role, "run": "runs/own", "temperature": temperature, "top_p": 1.0})
    if role == "teacher":
        assert not is_students(writer)
        assert not is_students("another tool")
        alone = recipe.model_copy(update={"rounds": None})
        (note,) = require_samples(alone, [])
        assert "loss.reverse_kl counts at rows that a student wrote, and no training row is one" in note
        assert require_samples(recipe, []) == ()  # round 0 has none
        return
    with pytest.raises(
        RecipeError, match=r"runs/own were written at temperature .* no samples of the student"
    ):
        require_samples(recipe, [writer])
    assert require_samples(recipe, [writer.replace(str(temperature), "1.0", 1)]) == ()


def test_losses_alone_have_a_file_of_their_own_kind() -> None:
    arguments = ["evaluate", "phantom", "--no-answers", "--out", "x.parquet"]
    done = CliRunner().invoke(stage2, arguments, standalone_mode=False)
    assert "name a .json file; without answers there are scores alone" in str(done.exception)


def test_rounds_without_a_section_are_one_message() -> None:
    with pytest.raises(RecipeError, match="recipe phantom: it has no rounds section"):
        make_rounds("phantom", (), nproc=1)


@pytest.mark.parametrize(
    "loss",
    [
        {"reverse_kl": 0.5},
        {"own_kd_ratio": 1.0},
        {"reverse_kl": None, "visual_weight": 0.5},
        {"reverse_kl": None, "positions": {"keep": 0.5, "by": "kl"}},
        {"reverse_kl": None, "positions": {"keep": 0.5, "ce": "all"}},
    ],
    ids=json.dumps,
)
def test_a_rounds_recipe_loads_as_it_was(tree: dict[str, Any], tmp_path: Path, loss: dict[str, Any]) -> None:
    """That of the measuring too, which has no KD, and so none of what weighs it."""
    cache = tree["cache"] | {"visual_gain": "blurred"}
    one = rounds_of(tree | {"loss": loss, "cache": cache}, tmp_path).of(2)
    for name in ("training", "writing", "greedy_writing", "measuring"):
        recipe = getattr(one, name)
        assert load_recipe(keep(recipe, tmp_path / "kept" / f"{name}.yaml")) == recipe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss__kd_ratio": 0.0}, "rounds with loss.kd_ratio 0"),
        ({"run__export": False}, "rounds with run.export false"),
        ({"write__per_prompt": 2}, "rounds with write.per_prompt 2"),
        ({"data__written": ["set"]}, "rounds beside data.written"),
        ({"cache__path": ["a", "b"]}, "rounds beside several caches"),
        ({"rounds__round_learning_rate": 1e-3}, "rounds.one_schedule beside rounds.round_learning_rate"),
        ({"rounds__round_epochs": 1.0}, "give round 0's length as optimization.num_epochs"),
        ({"cache__label_log_prob": False}, "set cache.label_log_prob to true"),
        ({"write__temperature": 0.0}, "loss.reverse_kl in rounds with write.temperature 0"),
    ],
)
def test_what_does_not_go_with_rounds(
    tree: dict[str, Any], tmp_path: Path, settings: Any, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_in(tree, tmp_path, **settings)
