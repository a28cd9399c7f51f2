"""What a template renders belongs to a cache's identity: its day is kept, and a student is told what differs."""

from __future__ import annotations

import json
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from stage2_runs import make_recipe, run_alone
from test_conversation_prompts import DATED

from shared.cache import CacheReader, Identity, PromptIdentity
from shared.completeness import cache_covers
from shared.data.processing import open_processor
from shared.errors import CacheMismatchError, RecipeError
from shared.recipes import DataConfig, Recipe, load_recipe
from shared.runtime import distributed
from shared.small_models import CHAT_TEMPLATE
from shared.stopping import INTERRUPTED_STATUS, StopRequest
from stage1_teacher.capture import capture
from stage2_student.check import check_recipe


def on_day(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    class Today(date):
        @classmethod
        def today(cls) -> date:
            return date.fromisoformat(day)

    monkeypatch.setattr("shared.data.templates.Date", Today)


def with_template(folder: Path, out: Path, template: str) -> Path:
    shutil.copytree(folder, out)
    (out / "chat_template.jinja").write_text(template)
    return out


@pytest.fixture
def tree(tmp_path: Path, vqa_folder: Path, teacher_folder: Path, student_folder: Path) -> dict[str, Any]:
    """Of models whose template prints the day."""
    return {
        "data": {"source": str(vqa_folder), "max_answer_tokens": 64, "limit": 4},
        "teacher": {
            "model": str(with_template(teacher_folder, tmp_path / "teacher", DATED)),
            "dtype": "float32",
        },
        "cache": {"path": str(tmp_path / "cache"), "num_workers": 0, "examples_per_shard": 2},
        "student": {
            "model": str(with_template(student_folder, tmp_path / "student", DATED)),
            "compute_dtype": "float32",
        },
        "optimization": {"max_steps": 1, "global_batch_size": 4},
        "run": {"name": "run", "root": str(tmp_path / "runs"), "num_workers": 0, "export": False},
    }


def captured(recipe: Recipe, stop: StopRequest | None = None) -> int:
    with distributed(device="cpu") as world:
        return capture(recipe, world, stop or StopRequest())


def prompt_of(recipe: Recipe) -> PromptIdentity:
    assert recipe.cache is not None
    prompt = CacheReader(recipe.cache.path).manifest.identity.prompt
    assert prompt is not None
    return prompt


def test_a_student_of_another_day_asks_as_the_capture_did(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = make_recipe(tree)
    on_day(monkeypatch, "2026-01-31")
    assert captured(recipe) == 0
    assert prompt_of(recipe).date == "2026-01-31"
    on_day(monkeypatch, "2026-03-05")
    assert cache_covers(recipe)
    report = check_recipe(recipe, num_ranks=1)
    assert not report.problems
    assert ("  date", "2026-01-31, which the chat template prints (data.date)") in report.facts
    assert captured(recipe) == 0  # and captures nothing
    assert len(CacheReader(str(tmp_path / "cache")).manifest.shards) == 4
    assert run_alone(recipe) == 0
    assert load_recipe(recipe.run.path / "recipe.yaml").data.date == "2026-01-31"


def test_a_cache_grows_with_the_day_it_has(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    on_day(monkeypatch, "2026-01-31")
    captured(make_recipe(tree))
    on_day(monkeypatch, "2026-03-05")
    grown = make_recipe(tree, data__limit=6)
    assert captured(grown) == 0
    assert prompt_of(grown).date == "2026-01-31"
    with pytest.raises(
        CacheMismatchError, match=r'prompt\.date: "2026-01-31" in the cache, "2026-03-05" asked for'
    ):
        captured(make_recipe(tree, data__date="2026-03-05"))


def test_an_interrupted_capture_goes_on_with_its_day(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(tree)
    stop = StopRequest()
    stop.received = True
    on_day(monkeypatch, "2026-01-31")
    assert captured(recipe, stop) == INTERRUPTED_STATUS
    on_day(monkeypatch, "2026-03-05")
    assert captured(recipe) == 0
    assert prompt_of(recipe).date == "2026-01-31"


def test_a_run_without_a_cache_goes_on_with_its_day(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {name: part for name, part in tree.items() if name not in ("cache", "teacher")}
    recipe = make_recipe(plain, loss__kd_ratio=0.0, run__name="plain")
    on_day(monkeypatch, "2026-01-31")
    assert run_alone(recipe) == 0
    assert load_recipe(recipe.run.path / "recipe.yaml").data.date == "2026-01-31"
    on_day(monkeypatch, "2026-03-05")
    longer = make_recipe(plain, loss__kd_ratio=0.0, run__name="plain", optimization__max_steps=2)
    assert run_alone(longer, resume=True) == 0
    assert load_recipe(recipe.run.path / "recipe.yaml").data.date == "2026-01-31"


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"date": "2026-03-05"}, 'prompt.date: "2026-01-31" in the cache, "2026-03-05" asked for'),
        ({"system_prompt": "Be brief."}, 'prompt.system_prompt: null in the cache, "Be brief." asked for'),
        ({"max_answer_tokens": 32}, "inputs.max_answer_tokens: 64 in the cache, 32 asked for"),
    ],
)
def test_a_student_is_told_what_differs(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch, data: dict[str, Any], told: str
) -> None:
    on_day(monkeypatch, "2026-01-31")
    captured(make_recipe(tree))
    recipe = make_recipe(tree, **{f"data__{name}": value for name, value in data.items()})
    with pytest.raises(CacheMismatchError) as caught:
        run_alone(recipe)
    assert told in str(caught.value)
    assert any(told in problem for problem in check_recipe(recipe, num_ranks=1).problems)


def test_another_template_is_told_by_its_fingerprint(
    tree: dict[str, Any], student_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured(make_recipe(tree, data__date="2026-01-31"))
    with pytest.raises(
        CacheMismatchError, match=r"inputs\.template_fingerprint: .* in the cache, .* asked for"
    ):
        run_alone(make_recipe(tree, student__model=str(student_folder)))


def test_rows_that_are_merely_missing_are_said_to_be_missing(tree: dict[str, Any]) -> None:
    captured(make_recipe(tree, data__date="2026-01-31"))
    with pytest.raises(CacheMismatchError, match="only what is missing is captured"):
        run_alone(make_recipe(tree, data__limit=8))


def test_a_manifest_of_before_says_nothing_of_prompts_and_is_read(
    teacher_cache: Path, tmp_path: Path
) -> None:
    manifest = CacheReader(str(teacher_cache)).manifest
    tree = json.loads(manifest.identity.model_dump_json())
    assert tree.pop("prompt")["date"] is None
    older = Identity.model_validate_json(json.dumps(tree))
    assert older.prompt is None
    assert "prompt" not in older.model_dump(mode="json")
    assert older.digest() == manifest.identity.digest()
    assert not older.compare_capture(manifest.identity).refusals


def test_a_prompt_has_differences_by_name() -> None:
    one = PromptIdentity(system_prompt=None, date=None, thinking=False, train_on="all", rendered="ab")
    same = one.model_copy(update={"rendered": "cd"})
    assert one.differences(one) == []
    assert one.differences(same) == ['prompt.rendered: "ab" in the cache, "cd" asked for']
    other = same.model_copy(update={"thinking": None})
    assert one.differences(other) == ["prompt.thinking: false in the cache, null asked for"]


def test_the_same_settings_that_write_another_text_are_refused(
    tree: dict[str, Any], student_folder: Path, tmp_path: Path
) -> None:
    """The template names a special token, which two tokenizers of the same vocabulary may set differently."""
    template = "{{- bos_token -}}" + CHAT_TEMPLATE
    for name in ("teacher", "student"):
        (tmp_path / name / "chat_template.jinja").write_text(template)
    captured(make_recipe(tree))
    settings = tmp_path / "student" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"bos_token": "<|endoftext|>"}))
    recipe = make_recipe(tree)
    with pytest.raises(
        CacheMismatchError, match=r"the same template writes another text(.|\n)*prompt\.rendered"
    ):
        run_alone(recipe)
    assert any("another text" in problem for problem in check_recipe(recipe, num_ranks=1).problems)


@pytest.mark.parametrize("day", ["31.1.2026", "2026-13-01", "", "today"])
def test_a_date_that_is_none_is_refused(tree: dict[str, Any], day: str) -> None:
    with pytest.raises(RecipeError, match=r"data\.date: .* is no date of the form 2026-01-31"):
        make_recipe(tree, data__date=day)


def test_the_library_s_processor_is_told_the_day_by_its_data(tree: dict[str, Any]) -> None:
    processor = open_processor(tree["student"]["model"], DataConfig(source="x", date="2026-01-31"))
    assert processor.date == "2026-01-31"
