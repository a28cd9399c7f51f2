"""A student with another tokenizer: trained from a cache, checked, resumed and evaluated, alone and on two ranks."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from stage2_runs import (
    make_recipe,
    records,
    run_alone,
    run_ranks,
    state_of,
    step_records,
    validation_records,
)

from shared.cache import CacheReader
from shared.completeness import cache_covers
from shared.data.processing import ExampleProcessor, open_processor
from shared.data.rows import open_split
from shared.errors import CacheMismatchError, DataError, RecipeError
from shared.other_vocabulary import StudentOfAnother, student_of_another
from shared.recipes import DataConfig, WriteConfig
from shared.runtime import distributed
from shared.same_prompts import open_student_processor_of
from shared.small_models import TOKENIZER_FILES, make_small_model, train_tokenizer
from shared.sparse import RegroupedTargets
from shared.stopping import StopRequest
from stage1_teacher.capture import capture
from stage1_teacher.check import check_recipe as check_capture
from stage2_student.check import check_recipe
from stage2_student.evaluation.answers import ModelSource
from stage2_student.evaluation.compare import results
from stage2_student.evaluation.evaluate import show
from stage2_student.evaluation.evaluated import Evaluated
from stage2_student.evaluation.model_losses import losses_of
from stage2_student.evaluation.run_records import read_run
from stage2_student.training.feed import MicrobatchSource
from stage2_student.training.order import Slot
from stage2_student.write import _require_texts


@pytest.fixture(scope="module")
def other_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokenizer has 310 ids instead of 384, was trained on other texts, and begins a turn otherwise."""
    folder = tmp_path_factory.mktemp("other")
    texts = ["hyperintense lesions in the frontal lobe", "an axial slice, and a plane of the chest"] * 8
    tokenizer = train_tokenizer(texts, folder / "tokenizer", vocab_size=310)
    template = tokenizer / "chat_template.jinja"
    template.write_text(template.read_text().replace("message.role +", "message.role + ':' +"))
    return make_small_model(
        folder / "student",
        tokenizer=tokenizer,
        hidden_size=64,
        num_layers=2,
        vision_hidden_size=32,
        vision_depth=1,
        seed=3,
    )


@pytest.fixture(scope="module")
def tree(distillation_tree: dict[str, Any], other_student: Path) -> dict[str, Any]:
    student = distillation_tree["student"] | {"model": str(other_student), "other_vocabulary": True}
    return distillation_tree | {"student": student}


@pytest.fixture(scope="module")
def teacher_processor(teacher_folder: Path, data_config: DataConfig) -> ExampleProcessor:
    return open_processor(str(teacher_folder), data_config)


@pytest.fixture(scope="module")
def own_processor(
    other_student: Path, data_config: DataConfig, teacher_processor: ExampleProcessor
) -> StudentOfAnother:
    found = student_of_another(str(other_student), data_config, teacher_processor)
    assert isinstance(found, StudentOfAnother)
    return found


def test_rows_with_the_teacher_s_ids_are_not_asked_of_a_student(
    tree: dict[str, Any], mixed_folder: Path, tmp_path: Path
) -> None:
    """A prompt has no last answer, and what is written has ids of the student: the two are kept apart."""
    kept = shutil.copytree(mixed_folder, tmp_path / "rows")
    for file in kept.glob("*.jsonl"):
        rows = [json.loads(line) | {"answer_ids": [1, 2]} for line in file.read_text().splitlines()]
        file.write_text("\n".join(map(json.dumps, rows)))
    recipe = make_recipe(tree | {"run": {"name": "asked"}}, data__source=str(kept))
    with pytest.raises(RecipeError, match=r"token ids of the teacher \(column answer_ids\).*as data\.source"):
        _require_texts(recipe, WriteConfig())


def test_keys_are_the_teacher_s_and_labels_the_student_s(
    own_processor: StudentOfAnother,
    teacher_processor: ExampleProcessor,
    other_student: Path,
    data_config: DataConfig,
) -> None:
    alone = open_processor(str(other_student), data_config)
    for example in open_split(data_config, "train"):
        encoded, plain = own_processor.encode(example), alone.encode(example)
        assert encoded.key == own_processor.key(example) == teacher_processor.key(example) != plain.key
        assert encoded.labels.tolist() == plain.labels.tolist()
        aligned = own_processor.aligned(example)
        assert aligned.teacher_ids == teacher_processor.encode(example).answer_ids.tolist()
        assert len(aligned.alignment.teacher_N) == encoded.num_positions
        assert aligned.alignment.teacher_N[0] == 0  # both begin with the answer
        assert aligned.alignment.teacher_N[-1] == len(aligned.teacher_ids) - 1  # and end with the turn


def test_learned_answers_are_the_labels(mixed_folder: Path, teacher_folder: Path) -> None:
    data = DataConfig(source=str(mixed_folder), max_answer_tokens=5)
    processor = open_processor(str(teacher_folder), data)
    for example in open_split(data, "train"):
        found = processor.learned(example)
        ids = [number for one in found for number in one.labels(processor.end_of_turn)]
        assert ids == processor.encode(example).answer_ids.tolist()
        assert [one.num_positions for one in found] == [len(ids)]


def test_every_answer_of_a_conversation_has_its_own_targets(
    tmp_path: Path, teacher_folder: Path, other_student: Path
) -> None:
    turns = [
        {"role": "user", "content": "Which plane?"},
        {"role": "assistant", "content": "The axial plane."},
        {"role": "user", "content": "And which side?"},
        {
            "role": "assistant",
            "content": "An answer that is longer than the limit of tokens: left, frontal lobe.",
        },
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes"},
    ]
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": turns}))
    data = DataConfig(source=str(tmp_path), max_answer_tokens=24)
    teacher = open_processor(str(teacher_folder), data)
    own = student_of_another(str(other_student), data, teacher)
    assert isinstance(own, StudentOfAnother)
    example = open_split(data, "train")[0]
    for processor in (teacher, own):
        found = processor.learned(example)
        assert [one.is_ended for one in found] == [True, False, True]
        assert len(found[1].ids) == 24
        ids = [number for one in found for number in one.labels(processor.end_of_turn)]
        assert ids == processor.encode(example).answer_ids.tolist()
    aligned = own.aligned(example)
    assert aligned.teacher_ids == teacher.encode(example).answer_ids.tolist()
    begins = np.cumsum([0, *(one.num_positions for one in own.learned(example))])[:-1]
    their_begins = np.cumsum([0, *(one.num_positions for one in teacher.learned(example))])[:-1]
    assert aligned.alignment.teacher_N[begins].tolist() == their_begins.tolist()


def test_an_answer_given_by_the_teacher_s_ids_is_learned_as_its_text(
    own_processor: StudentOfAnother, teacher_processor: ExampleProcessor, data_config: DataConfig
) -> None:
    plain = open_split(data_config, "train")[0]
    ids = [*teacher_processor.learned(plain)[0].ids]
    written = replace(plain, answer_ids=tuple(ids))
    own_processor.require_usable(written)
    assert own_processor.key(written) == teacher_processor.key(written) != own_processor.key(plain)
    assert own_processor.encode(written).labels.tolist() == own_processor.encode(plain).labels.tolist()
    assert own_processor.aligned(written).teacher_ids == [*ids, teacher_processor.end_of_turn]
    with pytest.raises(DataError, match="answer_ids"):
        own_processor.require_usable(replace(plain, answer_ids=(ids[0], 10_000)))


@pytest.mark.parametrize("text", ["A mass \u4e2d\u6587", "A mass\u20ac", "A mass \u20ac"])
def test_an_answer_that_was_cut_within_a_character_is_learned_up_to_it(
    own_processor: StudentOfAnother, teacher_processor: ExampleProcessor, data_config: DataConfig, text: str
) -> None:
    plain = open_split(data_config, "train")[0]
    ids = tuple(teacher_processor.tokenizer(text, add_special_tokens=False)["input_ids"][:-1])
    told = teacher_processor.written.text(ids)
    assert told.endswith("\ufffd")
    answer = replace(plain.turns[-1], parts=(told,))
    cut = replace(plain, turns=(*plain.turns[:-1], answer), answer_ids=ids, answer_end=False)
    own_processor.require_usable(cut)
    (learned,) = own_processor.learned(cut)
    assert own_processor.tokenizer.decode(learned.ids) == text[:-1].rstrip()
    assert not learned.is_ended
    labels = own_processor.encode(cut).answer_ids.tolist()
    assert labels == list(learned.ids)
    alignment = own_processor.aligned(cut).alignment
    assert alignment.num_unlike == 0
    assert alignment.teacher_N[0] == 0
    whole = replace(cut, answer_ids=None)  # a text that says it all the same is learned as it is
    assert "\ufffd" in own_processor.tokenizer.decode(own_processor.learned(whole)[0].ids)


def test_microbatches_have_targets_of_the_student_s_positions_and_ids(
    own_processor: StudentOfAnother, data_config: DataConfig, teacher_cache: Path
) -> None:
    split = open_split(data_config, "train")
    source = MicrobatchSource(split, np.arange(len(split)), own_processor, CacheReader(str(teacher_cache)))
    found = source.microbatch(Slot(0, (0, 1, 2)), [0, 1, 2])
    assert isinstance(found.targets, RegroupedTargets)
    assert found.targets.num_positions == found.num_positions
    assert found.coverage is not None
    assert found.coverage.positions == found.num_positions
    assert found.coverage.shared == found.targets.is_shared_N.sum() > 0.3 * found.num_positions
    assert 0.9 < found.coverage.share_of_mass <= 1
    assert found.targets.temperatures == (1.0, 2.0)
    idle = source.microbatch(Slot(0, (3,), counts=False), [3])
    assert isinstance(idle.targets, RegroupedTargets)
    assert idle.num_positions == idle.targets.num_positions == 0
    assert isinstance(source.blank_microbatch(Slot(0, ())).targets, RegroupedTargets)


class OtherAnswers(CacheReader):
    """A cache whose row for every key holds another answer: the first token is off by one."""

    def rows(self, keys: Any, *, names: Any = ()) -> Any:
        return [replace(row, answer_ids=row.answer_ids + 1) for row in super().rows(keys, names=names)]


def test_messages_on_answers_and_prompts_name_the_teacher_whose_they_are(
    own_processor: StudentOfAnother, data_config: DataConfig, teacher_cache: Path, tree: dict[str, Any]
) -> None:
    split = open_split(data_config, "train")
    source = MicrobatchSource(split, np.arange(1), own_processor, OtherAnswers(str(teacher_cache)))
    with pytest.raises(
        CacheMismatchError, match=r"(?s)the teacher's labels are .* capture the cache with this teacher's"
    ):
        source.microbatch(Slot(0, (0,)), [0])
    recipe = make_recipe(tree | {"run": {"name": "no"}}, data__system_prompt="Answer.")
    (problem,) = check_recipe(recipe, num_ranks=1).problems
    assert "the teacher's chat template" in problem
    plain = tree | {"student": {"model": tree["teacher"]["model"]}, "run": {"name": "no"}}
    (problem,) = check_recipe(make_recipe(plain, data__system_prompt="Answer."), num_ranks=1).problems
    assert "the student's chat template" in problem


def test_the_same_tokenizer_gives_the_ordinary_processor(
    student_folder: Path, data_config: DataConfig, teacher_processor: ExampleProcessor
) -> None:
    assert type(student_of_another(str(student_folder), data_config, teacher_processor)) is ExampleProcessor


def test_a_run_with_the_same_tokenizer_is_the_same_run(
    distillation_tree: dict[str, Any], tmp_path: Path
) -> None:
    found = []
    for allowed in (False, True):
        student = distillation_tree["student"] | {"other_vocabulary": allowed}
        run = {"name": str(allowed), "root": str(tmp_path), "num_workers": 0, "export": False}
        recipe = make_recipe(distillation_tree | {"student": student, "run": run}, optimization__max_steps=1)
        assert run_alone(recipe) == 0
        found.append((step_records(recipe), validation_records(recipe)))
    assert found[0] == found[1]
    facts = json.loads((tmp_path / "False" / "checkpoints" / "step-000001" / "facts.json").read_text())
    assert not [key for key in facts["identity"] if "other_vocabulary" in key]  # as runs before it have it


def test_without_the_setting_another_tokenizer_is_refused_and_the_setting_named(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    recipe = make_recipe(
        tree | {"run": {"name": "no", "root": str(tmp_path)}}, student__other_vocabulary=False
    )
    with pytest.raises(
        CacheMismatchError, match=r"tokenizer_fingerprint.*(?s:.*)student\.other_vocabulary: true"
    ):
        run_alone(recipe)


def test_a_teacher_without_a_tokenizer_is_told(
    tree: dict[str, Any], teacher_folder: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "teacher"
    shutil.copytree(teacher_folder, bare)
    for name in TOKENIZER_FILES:
        (bare / name).unlink()
    recipe = make_recipe(tree | {"run": {"name": "no", "root": str(tmp_path)}}, teacher__model=str(bare))
    with pytest.raises(RecipeError, match=r"student\.other_vocabulary: .*weights are not needed"):
        run_alone(recipe)


def test_a_teacher_whose_tokenizer_is_not_the_cache_s_is_named(
    tree: dict[str, Any], other_student: Path, tmp_path: Path
) -> None:
    """Also where it is the student's, so that both have the same."""
    own = tmp_path / "teacher"
    shutil.copytree(other_student, own)
    template = own / "chat_template.jinja"
    template.write_text(template.read_text().replace("message.role + ':'", "message.role + ' says:'"))
    for folder in (own, other_student):
        recipe = make_recipe(
            tree | {"run": {"name": "no", "root": str(tmp_path)}}, teacher__model=str(folder)
        )
        with pytest.raises(CacheMismatchError, match="tokenizer_fingerprint") as refused:
            run_alone(recipe)
        assert f"teacher.model {folder}" in str(refused.value)
        assert "other_vocabulary: true" not in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"cache__policy": {"kind": "top_k", "k": 4}},
            "tail ghost of a top_k cache and a student with another",
        ),
        ({"loss__own_kd_ratio": 1.0}, "student.other_vocabulary beside loss.own_kd_ratio"),
        ({"loss__visual_weight": 0.5}, "student.other_vocabulary beside loss.visual_weight"),
        ({"rounds": {"number": 1}}, "student.other_vocabulary beside loss.reverse_kl or rounds"),
        ({"teacher": None, "cache__teachers": "many"}, "student.other_vocabulary needs a teacher section"),
    ],
)
def test_what_cannot_be_is_refused_by_the_recipe(
    tree: dict[str, Any], overrides: dict[str, Any], message: str
) -> None:
    sections = {name: overrides.pop(name) for name in list(overrides) if "__" not in name}
    with pytest.raises(RecipeError, match=message):
        make_recipe(tree | sections | {"run": {"name": "no"}}, **overrides)


def test_the_cache_is_found_to_hold_the_data(tree: dict[str, Any], tmp_path: Path) -> None:
    recipe = make_recipe(tree | {"run": {"name": "no", "root": str(tmp_path)}})
    assert cache_covers(recipe)
    assert not cache_covers(make_recipe(tree | {"run": {"name": "no"}}, data__max_answer_tokens=32))


@pytest.fixture(scope="module")
def finished(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of four steps, with what it is asked at its end."""
    run = {"name": "run", "root": str(tmp_path_factory.mktemp("runs")), "num_workers": 0}
    run |= {"checkpoint_every": 2, "validate_every": 2}
    recipe = make_recipe(tree | {"run": run}, evaluation__max_examples=2, evaluation__max_new_tokens=4)
    assert run_alone(recipe) == 0
    return recipe


def test_every_step_and_the_results_say_how_much_is_covered(
    finished: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [one for one in records(finished) if one["event"] == "step"]
    assert len(steps) == 4
    for one in [*steps, *(record for record in records(finished) if record["event"] == "validation")]:
        assert 0.3 < one["shared_positions"] < 1
        assert 0.9 < one["shared_mass"] <= 1
        assert one["kl"] is None
    validations = [one for one in records(finished) if one["event"] == "validation"]
    assert validations[-1]["soft_ce"] < validations[0]["soft_ce"]
    assert validations[-1]["teacher_reliability"] is None
    found = json.loads((finished.run.path / "results.json").read_text())
    assert found["coverage"] == {name: validations[-1][name] for name in ("shared_positions", "shared_mass")}
    assert found["after"]["kl"] is None
    assert found["after"]["soft_ce"] == validations[-1]["soft_ce"]
    record = read_run(finished.run.path)
    assert record.losses["kl"] is None
    assert "soft CE" in results([record])[0]
    with distributed(device="cpu") as world:
        measured = losses_of(
            finished,
            ModelSource.student(finished, str(finished.run.path / "export")),
            world,
            split="validation",
        )
    assert measured.kl is None
    assert measured.soft_ce == pytest.approx(validations[-1]["soft_ce"], rel=1e-5)
    show([Evaluated("student", "export", (), measured.ce, None, soft_ce=measured.soft_ce)])
    assert f"cross-entropy with the teacher {measured.soft_ce:.4f}" in capsys.readouterr().out


def test_two_ranks_learn_what_one_learns(finished: Any, tree: dict[str, Any], tmp_path: Path) -> None:
    run = {"name": "two", "root": str(tmp_path), "num_workers": 1, "export": False}
    recipe = make_recipe(tree | {"run": run})
    assert run_ranks(recipe, 2) == [0, 0]
    for own, other in zip(step_records(finished), step_records(recipe), strict=True):
        for name in ("loss", "ce_loss", "kd_loss", "num_positions"):
            assert own[name] == pytest.approx(other[name], rel=2e-5)
    own, other = ([one for one in records(each) if one["event"] == "step"] for each in (finished, recipe))
    for a, b in zip(own, other, strict=True):
        assert a["shared_positions"] == pytest.approx(b["shared_positions"])
        assert a["shared_mass"] == pytest.approx(b["shared_mass"])


def test_ranks_that_share_each_layer_learn_what_one_learns(
    finished: Any, tree: dict[str, Any], tmp_path: Path
) -> None:
    run = {"name": "tensor", "root": str(tmp_path), "num_workers": 0, "export": False}
    recipe = make_recipe(tree | {"run": run, "parallel": {"tensor": 2}}, optimization__microbatch_size=4)
    assert run_ranks(recipe, 2) == [0, 0]
    for own, other in zip(step_records(finished), step_records(recipe), strict=True):
        for name in ("loss", "ce_loss", "kd_loss"):
            assert own[name] == pytest.approx(other[name], rel=5e-5)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    finished: Any, tree: dict[str, Any], tmp_path: Path
) -> None:
    run = {"name": "run", "root": str(tmp_path), "num_workers": 0, "export": False}
    run |= {"checkpoint_every": 2, "validate_every": 2}
    short = make_recipe(tree | {"run": run}, optimization__max_steps=4)
    shutil.copytree(finished.run.path, short.run.path)
    for name in ("results.json", "export", "evaluation"):
        target = short.run.path / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    checkpoints = short.run.path / "checkpoints"
    shutil.rmtree(checkpoints / "step-000004")
    (checkpoints / "latest").write_text("step-000002")
    (checkpoints / "best").unlink(missing_ok=True)
    assert run_alone(short, resume=True) == 0
    ours, theirs = state_of(finished, 4), state_of(short, 4)
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_check_says_how_much_is_covered(tree: dict[str, Any], tmp_path: Path) -> None:
    recipe = make_recipe(tree | {"run": {"name": "no", "root": str(tmp_path)}})
    report = check_recipe(recipe, num_ranks=1)
    assert report.problems == []
    told = dict(report.facts)
    assert "of positions are shared" in told["  of train"]
    assert "(12 examples looked at)" in told["  of train"]
    assert "(4 examples looked at)" in told["  of validation"]


def test_check_fetches_no_teacher(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    run = {"name": "no", "root": str(tmp_path)}
    report = check_recipe(make_recipe(tree | {"run": run}, teacher__model="nobody/teacher"), num_ranks=1)
    assert report.problems == []
    told = "nobody/teacher is not on this machine: its tokenizer is not looked at"
    assert dict(report.facts)["  teacher's"] == told


def test_check_tells_of_a_teacher_without_a_tokenizer_alone(
    tree: dict[str, Any], teacher_folder: Path, tmp_path: Path
) -> None:
    """Not also that rows are not in the cache, which the student's own tokenizer cannot know."""
    bare = tmp_path / "teacher"
    shutil.copytree(teacher_folder, bare, ignore=shutil.ignore_patterns(*TOKENIZER_FILES))
    run = {"name": "no", "root": str(tmp_path)}
    report = check_recipe(make_recipe(tree | {"run": run}, teacher__model=str(bare)), num_ranks=1)
    (problem,) = report.problems
    assert "its weights are not needed" in problem


def test_check_of_a_capture_takes_the_teacher_s_tokenizer(tree: dict[str, Any], tmp_path: Path) -> None:
    recipe = make_recipe(tree | {"run": {"name": "no", "root": str(tmp_path)}})
    report = check_capture(recipe, num_ranks=1)
    assert report.problems == []
    refused = check_capture(
        make_recipe(tree | {"run": {"name": "no"}}, student__other_vocabulary=False), num_ranks=1
    )
    assert any("or set student.other_vocabulary: true" in problem for problem in refused.problems)


def test_a_student_by_labels_alone_is_measured_against_the_same_teacher(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    run = {"name": "labels", "root": str(tmp_path), "num_workers": 0, "export": False}
    recipe = make_recipe(tree | {"run": run}, loss__kd_ratio=0.0, optimization__max_steps=1)
    assert run_alone(recipe) == 0
    last = [one for one in records(recipe) if one["event"] == "validation"][-1]
    assert last["soft_ce"] > 0
    assert last["shared_positions"] > 0.3
    assert last["kd_loss"] is None


def test_other_temperatures_are_taken_before_regrouping(tree: dict[str, Any], tmp_path: Path) -> None:
    run = {"name": "warm", "root": str(tmp_path), "num_workers": 0, "export": False}
    recipe = make_recipe(tree | {"run": run}, loss__temperature=2.0, optimization__max_steps=1)
    assert run_alone(recipe) == 0
    last = [one for one in records(recipe) if one["event"] == "validation"][-1]
    assert last["soft_ce"] > 0  # at temperature 1, whatever the loss's


def test_soft_ce_is_of_a_unit_of_the_mass_that_the_loss_takes(
    tree: dict[str, Any], other_student: Path, tmp_path: Path
) -> None:
    """A student without knowledge has the log of its vocabulary's size, whatever the tail mode."""
    uniform = tmp_path / "uniform"
    shutil.copytree(other_student, uniform)
    weights = load_file(uniform / "model.safetensors")
    (head,) = (name for name in weights if name.endswith("embed_tokens.weight"))
    weights[head].zero_()
    save_file(weights, uniform / "model.safetensors", metadata={"format": "pt"})
    cache = tree["cache"] | {"path": str(tmp_path / "cache"), "policy": {"kind": "top_k", "k": 3}}
    run = {"name": "run", "root": str(tmp_path), "num_workers": 0}
    for tail in ("drop", "renormalize"):
        recipe = make_recipe(tree | {"cache": cache, "run": run, "loss": {"tail": tail}})
        with distributed(device="cpu") as world:
            if tail == "drop":
                assert capture(recipe, world, StopRequest()) == 0
            source = ModelSource.student(recipe, str(uniform))
            found = losses_of(recipe, source, world, split="validation")
        assert found.soft_ce == pytest.approx(math.log(len(weights[head])), rel=1e-5)


def test_the_processor_of_a_recipe_is_the_student_s_or_the_teacher_s(
    tree: dict[str, Any], teacher_folder: Path, other_student: Path
) -> None:
    recipe = make_recipe(tree | {"run": {"name": "no"}})
    assert type(open_student_processor_of(recipe, str(teacher_folder), revision=None)) is ExampleProcessor
    found = open_student_processor_of(recipe, str(other_student), revision=None)
    assert isinstance(found, StudentOfAnother)
    assert found.num_token_ids != found.of_keys.num_token_ids
