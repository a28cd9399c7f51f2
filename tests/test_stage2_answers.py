"""``train-student evaluate``: what an answer is worth, how sure a mean is, and the command on a real small run."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from stage2_runs import make_recipe, on_ranks, run_alone
from transformers import AutoTokenizer

from shared.data.processing import open_processor
from shared.data.rows import open_split
from shared.errors import DataError, RecipeError
from shared.models.vlm import load_vlm
from shared.recipes import load_recipe
from shared.runtime import distributed
from shared.vouched import opened
from stage2_student.__main__ import commands
from stage2_student.evaluation import answers, model_losses
from stage2_student.evaluation.answer_metrics import exact_match, mean_interval, rouge_l, token_f1
from stage2_student.evaluation.answers import ModelSource, answer, answers_of
from stage2_student.evaluation.evaluate import Subject, models
from stage2_student.evaluation.run_records import read_run
from stage2_student.training.student import build_student

# --- metrics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "match", "f1", "rouge"),
    [
        ("Axial.", " axial", True, 1.0, 1.0),
        ("axial CT", "CT", False, 2 / 3, 2 / 3),
        ("CT axial", "axial CT", False, 1.0, 0.5),  # the order counts in ROUGE-L
        ("a a a", "a", False, 0.5, 0.5),
        ("mass in the lung", "a small mass in the left lung", False, 8 / 11, 8 / 11),
        ("", "yes", False, 0.0, 0.0),
        ("?!", "...", True, 1.0, 1.0),
        ("Bösartig", "bösartig", True, 1.0, 1.0),
        ("腫瘤 左", "左 腫瘤", False, 1.0, 0.5),
        ("की", "का", False, 0.0, 0.0),  # vowel signs are marks, not letters
        ("น้ำ", "นำ", False, 0.0, 0.0),
        ("HER2+", "HER2-", False, 2 / 3, 2 / 3),
        ("<5 mm", "> 5 mm", False, 2 / 3, 2 / 3),
        ("-5", "5", False, 2 / 3, 2 / 3),
        ("1.5 cm", "15 cm", False, 0.5, 0.5),
        (".5 cm", "5 cm", False, 0.5, 0.5),
        ("(.5 cm)", "0.5 cm", True, 1.0, 1.0),
        ("5 cm...3", "5 cm 3", True, 1.0, 1.0),
        ("-.5", "0.5", False, 2 / 3, 2 / 3),
        ("\u22125 to \u20133", "-5 to -3", True, 1.0, 1.0),  # as it is typeset
        ("5\u201310", "5-10", True, 1.0, 1.0),
        ("T1-weighted, 5-10", "t1 weighted 5 10", True, 1.0, 1.0),
        ("• mass- liver", "mass; liver.", True, 1.0, 1.0),
    ],
)
def test_by_hand(answer: str, reference: str, match: bool, f1: float, rouge: float) -> None:
    assert exact_match(answer, reference) is match
    assert token_f1(answer, reference) == pytest.approx(f1)
    assert rouge_l(answer, reference) == pytest.approx(rouge)


@given(st.text(max_size=30), st.text(max_size=30))
def test_shares_symmetric_and_one_for_equals(one: str, other: str) -> None:
    for metric in (token_f1, rouge_l):
        assert 0 <= metric(one, other) <= 1
        assert metric(one, other) == pytest.approx(metric(other, one))
        assert metric(one, one) == 1


def test_intervals() -> None:
    generator = np.random.default_rng(1)
    values = generator.random(400).tolist()
    few, many = mean_interval(values[:40], range(40)), mean_interval(values, range(400))
    assert few is not None
    assert many is not None
    assert few == mean_interval(values[:40], [f"picture {i}" for i in range(40)])  # names do not matter
    assert few.low < few.mean < few.high
    assert many.high - many.low < 0.5 * (few.high - few.low)
    # Of a mean of uniform numbers: 1.96 x sqrt(1 / 12 / n) on either side.
    assert many.high - many.low == pytest.approx(2 * 1.96 * math.sqrt(1 / 12 / 400), rel=0.15)


def test_questions_about_one_picture_stand_or_fall_together() -> None:
    values = [float(i % 2) for i in range(20) for _ in range(5)]
    apart = mean_interval(values, range(100))
    together = mean_interval(values, [i // 5 for i in range(100)])
    assert apart is not None
    assert together is not None
    assert together.high - together.low > 1.8 * (apart.high - apart.low)


def test_nothing_to_average_and_a_single_value() -> None:
    assert mean_interval([], []) is None
    alone = mean_interval([0.25], ["p"])
    assert alone is not None
    assert (alone.low, alone.mean, alone.high, alone.count) == (0.25, 0.25, 0.25, 1)


# --- the command -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, distillation_tree: dict[str, Any]) -> dict[str, Any]:
    return distillation_tree | {
        "run": {"name": "run", "root": str(tmp_path_factory.mktemp("runs")), "num_workers": 0},
        "evaluation": {"max_new_tokens": 4, "batch_size": 3},
    }


@pytest.fixture(scope="module")
def run(tree: dict[str, Any]) -> Path:
    recipe = make_recipe(tree)
    assert run_alone(recipe) == 0
    return recipe.run.path


def command(*arguments: str) -> Result:
    return CliRunner().invoke(commands, ["evaluate", *arguments], standalone_mode=False)


def test_a_run_beside_its_references(run: Path) -> None:
    shown = command(str(run))
    assert shown.return_value == 0, shown.output
    for words in ("student", "teacher", "untrained", "exact, all", "ROUGE-L", "token F1", "from caption"):
        assert words in shown.stdout
    lines = pq.read_table(run / "evaluation" / "validation.parquet").to_pylist()
    assert [(line["model"], line["row"]) for line in lines] == [
        (model, row) for model in ("student", "teacher", "untrained") for row in range(4)
    ]
    assert {"kind", "case", "image_sha256", "question", "reference", "answer", "rouge_l"} <= set(lines[0])
    student, teacher, untrained = json.loads((run / "evaluation" / "validation.json").read_text())
    # What validation said of the trained student, and of the untrained one before the first step.
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validations = [record for record in logged if record["event"] == "validation"]
    for scores, record in ((untrained, validations[0]), (student, validations[-1])):
        assert scores["ce"] == pytest.approx(record["ce_loss"], rel=1e-5)
        assert scores["kl"] == pytest.approx(record["kd_loss"], rel=1e-5)
    # This teacher's head is 384 wide and knows nothing: its padding ids, which targets leave out, have their share.
    num_ids = len(AutoTokenizer.from_pretrained(run / "export"))
    assert teacher["kl"] == pytest.approx(math.log(384 / num_ids), abs=0.01)
    assert teacher["kl"] < untrained["kl"]
    assert set(student["by_kind"]) == {line["kind"] for line in lines}
    assert read_run(run).scores == opened(student)  # in ``compare`` and in the report
    own = [line for line in lines if line["model"] == "student"]
    assert student["exact_match"]["count"] == len(own)
    assert student["accuracy"]["count"] == sum(line["is_short"] for line in own)


def test_a_model_s_folder_and_a_recipe(run: Path, tree: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    options = ("--no-references", "--json", "--examples", "2", "--split", "train")
    by_run = json.loads(command(str(run), *options).stdout)
    by_recipe = json.loads(command(str(recipe), *options).stdout)
    by_model = json.loads(
        command(
            str(run / "export"), "--recipe", str(recipe), *options, "--out", str(tmp_path / "x.parquet")
        ).stdout
    )
    assert by_run == by_recipe == by_model
    assert by_run[0]["num_examples"] == 2
    assert pq.read_table(tmp_path / "x.parquet")["row"].to_pylist() == [0, 6]  # of twelve
    assert pq.read_table(tmp_path / "x.parquet").num_rows == 2


def test_fewer_questions_leave_the_more_where_they_are(run: Path) -> None:
    assert command(str(run)).return_value == 0
    whole = (run / "evaluation" / "validation.parquet").read_bytes()
    shown = command(str(run), "--no-references", "--examples", "2")
    assert "validation-2.parquet" in shown.stdout
    assert (run / "evaluation" / "validation.parquet").read_bytes() == whole
    assert read_run(run).scores["num_examples"] == 4


def test_answers_to_shuffled_pictures_are_kept_as_others_are(run: Path) -> None:
    shuffled = (str(run), "--shuffle-pictures", "--no-references")
    assert command(*shuffled).return_value == 0
    path = run / "evaluation" / "shuffled-pictures-validation.parquet"
    whole = path.read_bytes()
    assert "predictions" not in command(*shuffled, "--no-answers").stdout
    assert "shuffled-pictures-validation-2.parquet" in command(*shuffled, "--examples", "2").stdout
    assert path.read_bytes() == whole


def test_answers_that_were_cut_are_counted_and_told(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.parquet"
    shown = command(str(run), "--no-references", "--out", str(out))
    lines = pq.read_table(out).to_pylist()
    (scores,) = json.loads(out.with_suffix(".json").read_text())
    assert scores["num_cut"] == sum(line["is_cut"] for line in lines) > 0
    assert (
        f"{scores['num_cut']} of 4 answers of student were cut at evaluation.max_new_tokens" in shown.stdout
    )


def test_an_answer_that_ends_at_its_last_token_is_whole(
    run: Path, tree: dict[str, Any], examples: list[Any]
) -> None:
    options = {"revision": None, "attn_implementation": None, "dtype": torch.float32}
    model = load_vlm(str(run / "export"), **options).eval()
    processor = open_processor(str(run / "export"), make_recipe(tree).data)
    prompt = processor.collate([processor.encode_prompt(examples[0])], padding_side="left")
    first = int(model(**prompt.inputs).logits[0, -1].argmax())
    assert answer(model, processor, examples[:1], max_new_tokens=1)[0].is_cut
    processor._prompt.end_of_turn = first  # as if the model ended its turn at once
    for max_new_tokens in (1, 3):  # and by a token that the tokenizer does not call special
        found = answer(model, processor, examples[:1], max_new_tokens=max_new_tokens)[0]
        assert (found.text, found.is_cut) == ("", False)


def test_an_answer_ends_by_each_token_that_the_model_s_folder_names(
    run: Path, tree: dict[str, Any], tmp_path: Path
) -> None:
    """As for who calls ``generate``: a base or a teacher may end its answers by another token than its turns."""
    recipe, folder = make_recipe(tree), shutil.copytree(run / "export", tmp_path / "model")
    processor = open_processor(str(folder), recipe.data)
    model = load_vlm(str(folder), revision=None, attn_implementation=None, dtype=torch.float32).eval()
    asked = processor.encode_prompt(open_split(recipe.data, "validation")[0])
    first = int(model(**processor.collate([asked], padding_side="left").inputs).logits[0, -1].argmax())
    ends = {"eos_token_id": [processor.end_of_turn, first]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    with distributed(device="cpu") as world:
        source = ModelSource.student(recipe, str(folder))
        (found,) = answers_of(recipe, source, world, split="validation", num_examples=1)
    assert (found.answer, found.is_cut) == ("", False)


def test_without_a_cache_there_is_no_kl(run: Path, tmp_path: Path) -> None:
    shown = command(str(run), "--set", f"cache.path={tmp_path}/gone", "--no-references", "--json")
    assert shown.return_value == 0, shown.output
    (student,) = json.loads(shown.stdout)
    assert student["kl"] is None
    assert student["ce"] > 0
    assert "no KL" in shown.stderr


def test_a_reference_that_is_gone_is_left_out_and_named(run: Path, tmp_path: Path) -> None:
    shown = command(str(run), "--set", f"teacher.model={tmp_path}/gone", "--json")
    assert [one["model"] for one in json.loads(shown.stdout)] == ["student", "untrained"]
    assert "teacher is left out" in shown.stderr


def test_a_reference_for_which_memory_does_not_suffice_costs_nothing_else(
    run: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = {
        tree["teacher"]["model"]: torch.OutOfMemoryError("the teacher is large"),
        tree["student"]["model"]: RuntimeError("Triton Error [CUDA]: out of memory"),
    }

    def load(name: str, **options: Any) -> Any:
        if name in errors:
            raise errors[name]
        return load_vlm(name, **options)

    monkeypatch.setattr(answers, "load_vlm", load)
    shown = command(str(run), "--json")
    assert [one["model"] for one in json.loads(shown.stdout)] == ["student"]
    assert "teacher is left out: the teacher is large" in shown.stderr
    assert "untrained is left out: Triton Error [CUDA]: out of memory" in shown.stderr


def test_one_model_is_gone_before_the_next_one_is_opened(
    run: Path, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    counts = []

    def build(*arguments: Any, **options: Any) -> Any:
        counts.append(len(alive))
        student = build_student(*arguments, **options)
        alive.add(student)
        return student

    monkeypatch.setattr(model_losses, "build_student", build)
    assert command(str(run), "--json").return_value == 0
    assert counts == [0, 0, 0]


def test_references_are_those_that_the_recipe_pins(tree: dict[str, Any]) -> None:
    recipe = make_recipe(
        tree,
        teacher__revision="a",
        teacher__dtype="bfloat16",
        teacher__attn_implementation="eager",
        student__revision="b",
    )
    found = models(recipe, "runs/one/export", references=True)
    teacher, student = tree["teacher"]["model"], tree["student"]["model"]
    assert found["student"] == ModelSource("runs/one/export", None, "float32", "float32", None)
    assert found["teacher"] == ModelSource(teacher, "a", "bfloat16", "bfloat16", "eager")
    assert found["untrained"] == ModelSource(student, "b", "float32", "float32", None)


def test_answers_are_greedy_whatever_the_folder_asks_for(run: Path, tmp_path: Path) -> None:
    options = ("--no-references", "--out", str(tmp_path / "a.parquet"))
    assert command(str(run), *options).return_value == 0
    picky = shutil.copytree(run / "export", tmp_path / "picky")
    (picky / "generation_config.json").write_text(json.dumps({"repetition_penalty": 9.0, "do_sample": True}))
    given = ("--recipe", str(run / "recipe.yaml"), "--no-references", "--out", str(tmp_path / "b.parquet"))
    assert command(str(picky), *given).return_value == 0
    first, second = (
        pq.read_table(tmp_path / name)["answer"].to_pylist() for name in ("a.parquet", "b.parquet")
    )
    assert first == second


def test_another_model_leaves_the_run_s_own_predictions_alone(run: Path, tree: dict[str, Any]) -> None:
    assert command(str(run), "--no-references").return_value == 0
    before = (run / "evaluation" / "validation.parquet").read_bytes()
    assert command(str(run), "--model", tree["student"]["model"], "--no-references").return_value == 0
    assert (run / "evaluation" / "validation.parquet").read_bytes() == before


def test_settings_of_training_do_not_stand_in_the_way(run: Path) -> None:
    """Two replicas on one process; labels alone, at a temperature that no cache has."""
    own = ("--no-references", "--json")
    (expected,) = json.loads(command(str(run), *own).stdout)
    for setting in (("parallel.dp_replicate=2",), ("loss.kd_ratio=0", "loss.temperature=7")):
        options = [part for item in setting for part in ("--set", item)]
        (found,) = json.loads(command(str(run), *own, *options).stdout)
        assert found["kl"] == pytest.approx(expected["kl"])


def test_a_folder_that_has_a_recipe_s_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "phantom").mkdir()
    Path("work/runs/phantom/export").mkdir(parents=True)
    found = Subject.find("phantom", recipe=load_recipe, given=None, model=None)
    assert found.run == Path("work/runs/phantom")
    hub = Subject.find("someone/model", recipe=load_recipe, given="phantom", model=None)
    assert (hub.model, hub.run) == ("someone/model", None)


def test_what_cannot_be_evaluated(run: Path, tmp_path: Path) -> None:
    for arguments, error, message in [
        ((str(tmp_path),), RecipeError, "neither a run"),
        ((str(run / "export"),), RecipeError, "--recipe"),
        ((str(run), "--split", "test"), DataError, "names no test split"),
        ((str(run), "--model", str(tmp_path / "none")), RecipeError, "none"),
        ((str(run / "export"), "--recipe", "phantom", "--model", "m"), RecipeError, "is a model already"),
        ((str(run), "--out", "scores.json"), click.UsageError, "name a .parquet file"),
        (("phantom", "--set", f"run.root={tmp_path}"), RecipeError, "no export in it"),
    ]:
        found = command(*arguments)
        assert isinstance(found.exception, error), (arguments, found.exception)
        assert message in str(found.exception)


def test_two_ranks_answer_as_one(run: Path, tree: dict[str, Any]) -> None:
    recipe = make_recipe(tree)
    source = ModelSource.student(recipe, str(run / "export"))
    alone = on_ranks(1, lambda world: answers_of(recipe, source, world, split="train"))
    shared = on_ranks(2, lambda world: answers_of(recipe, source, world, split="train"))
    assert shared == [alone[0], alone[0]]


def test_where_answers_cannot_be_saved_nothing_is_asked(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stage2_student.evaluation.evaluate.answers_of", None)
    with pytest.raises(RecipeError, match=r"predictions, into /proc/no: nothing can be written there"):
        CliRunner().invoke(
            commands, ["evaluate", str(run), "--out", "/proc/no/x.parquet"], catch_exceptions=False
        )
