"""Students of several caches: a list trains as the merged cache does, a mix as the weighted mean of its teachers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from stage2_runs import (
    assert_same_state,
    make_recipe,
    records,
    run_alone,
    run_ranks,
    state_of,
    step_records,
    validation_records,
)

from shared.cache import CacheList, CacheReader, CacheWriter, Identity, open_caches
from shared.cache.merge import merge
from shared.errors import CacheMismatchError, CheckpointError, RecipeError
from shared.pipeline import covers
from shared.recipes import CacheConfig, Recipe, load_recipe, recipe_text
from shared.recipes.files import validate_tree
from shared.runtime import distributed
from shared.stopping import StopRequest
from stage1_teacher.capture import capture
from stage2_student.__main__ import commands
from stage2_student.check import check_recipe
from stage2_student.evaluation.cache_uses import CapturedTimes, captured_times, captured_together
from stage2_student.publishing.card import facts_of_caches
from stage2_student.runs.run_folder import RunFolder
from stage2_student.train import train
from stage2_student.training.cache_change import cache_changes


def part_of(source: Path, out: Path, places: Sequence[int]) -> str:
    """A cache of some of another one's rows, in shards of two."""
    reader = CacheReader(str(source))
    keys = [key for place, key in enumerate(reader.keys()) if place in places]
    identity: Identity = reader.manifest.identity
    with CacheWriter.open(str(out), identity, created_by=reader.manifest.created_by) as writer:
        plan = writer.plan([(key, number) for number, key in enumerate(keys)], examples_per_shard=2)
        for unit in plan.units:
            with writer.unit(unit) as shard:
                for row in reader.rows(unit.keys):
                    shard.add(row)
        writer.commit(plan)
    return str(out)


@pytest.fixture(scope="module")
def other_cache(tmp_path_factory: pytest.TempPathFactory, vqa_folder: Path, student_folder: Path) -> Path:
    """The same rows by another teacher."""
    path = tmp_path_factory.mktemp("other") / "cache"
    tree: dict[str, Any] = {
        "data": {"source": str(vqa_folder), "max_answer_tokens": 64},
        "teacher": {"model": str(student_folder), "dtype": "float32"},
        "cache": {"path": str(path), "num_workers": 0, "temperatures": [1.0, 2.0], "seed": 5},
        "student": {"model": str(student_folder)},
        "optimization": {"max_steps": 1},
        "run": {"name": "unused"},
    }
    with distributed(device="cpu") as world:
        assert capture(validate_tree(Recipe, tree, origin="fixture"), world, StopRequest()) == 0
    return path


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, teacher_cache: Path, other_cache: Path) -> dict[str, str]:
    """Rows 0 to 11 are of training, 12 to 15 of validation."""
    folder = tmp_path_factory.mktemp("parts")
    odd, even = [n for n in range(16) if n % 2], [n for n in range(16) if n % 2 == 0]
    whole = CacheReader(str(teacher_cache))
    assert len(whole) == 16
    found = {
        "odd": part_of(teacher_cache, folder / "odd", odd),
        "even": part_of(teacher_cache, folder / "even", even),
        "most": part_of(teacher_cache, folder / "most", [*even, 1, 3]),
        "other": str(other_cache),
        "whole": str(teacher_cache),
    }
    merge([found["odd"], found["even"]], str(folder / "merged"), created_by={})
    # Of the other teacher, with the seed of the first: rows of a list are drawn alike.
    return found | {"merged": str(folder / "merged"), "other_even": reseeded(other_cache, folder / "x", even)}


def reseeded(source: Path, out: Path, places: Sequence[int]) -> str:
    """As ``part_of``, under the seed 0 of the other caches: no test looks at the draws themselves."""
    reader = CacheReader(str(source))
    keys = [key for place, key in enumerate(reader.keys()) if place in places]
    targets = reader.manifest.identity.targets.model_copy(update={"seed": 0})
    identity = reader.manifest.identity.model_copy(update={"targets": targets})
    with CacheWriter.open(str(out), identity, created_by=reader.manifest.created_by) as writer:
        plan = writer.plan([(key, number) for number, key in enumerate(keys)], examples_per_shard=2)
        for unit in plan.units:
            with writer.unit(unit) as shard:
                for row in reader.rows(unit.keys):
                    shard.add(row)
        writer.commit(plan)
    return str(out)


@pytest.fixture
def tree(tmp_path: Path, distillation_tree: dict[str, Any]) -> dict[str, Any]:
    run = {"name": "run", "root": str(tmp_path / "runs"), "num_workers": 0, "export": False}
    steps = distillation_tree["optimization"] | {"max_steps": 2, "schedule": "constant"}
    return distillation_tree | {"run": run, "optimization": steps}


def with_mix(tree: dict[str, Any], mixed: list[dict[str, Any]], **overrides: Any) -> Recipe:
    cache = {name: value for name, value in tree["cache"].items() if name != "path"} | {"mix": mixed}
    return make_recipe(tree | {"cache": cache}, **overrides)


def test_a_list_trains_as_the_merged_cache_bit_for_bit(tree: dict[str, Any], parts: dict[str, str]) -> None:
    """In an order that follows shards, which are counted alike."""
    runs = []
    for name, path in (("list", [parts["odd"], parts["even"]]), ("merged", parts["merged"])):
        recipe = make_recipe(tree, run__name=name, cache__path=path, cache__shuffle_window=2)
        assert run_alone(recipe) == 0
        runs.append(recipe)
    assert step_records(runs[0]) == step_records(runs[1])
    assert validation_records(runs[0]) == validation_records(runs[1])
    assert_same_state(state_of(runs[0], 2), state_of(runs[1], 2))
    assert all("by_teacher" not in record for record in records(runs[0]))  # one has taught all
    found = [json.loads((run.run.path / "results.json").read_text())["cache"] for run in runs]
    assert found[0]["positions"] == found[1]["positions"]
    again = load_recipe(runs[0].run.path / "recipe.yaml")
    assert again.cache is not None
    assert again.cache.path == (parts["odd"], parts["even"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["list", "mix"])
def test_two_ranks_with_workers_read_as_one_does(
    tree: dict[str, Any], parts: dict[str, str], kind: str
) -> None:
    runs = []
    for name, num_ranks in (("one", 1), ("two", 2)):
        changes = {"run__name": name, "run__num_workers": num_ranks - 1}
        recipe = (
            make_recipe(
                tree, cache__path=[parts["odd"], parts["other_even"]], cache__teachers="many", **changes
            )
            if kind == "list"
            else with_mix(tree, [{"path": parts["whole"]}, {"path": parts["other"]}], **changes)
        )
        assert run_ranks(recipe, num_ranks) == [0] * num_ranks
        runs.append([one for one in records(recipe) if one["event"] in ("step", "validation")])
    for ours, theirs in zip(*runs, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        mine, others = ours.get("by_teacher", {}), theirs.get("by_teacher", {})
        assert (mine.get("names"), mine.get("positions")) == (others.get("names"), others.get("positions"))
        for figure in ("ce", "kl", "teacher_ce"):
            assert mine.get(figure, []) == pytest.approx(others.get(figure, []), rel=1e-4)


def test_rows_of_two_teachers_are_told_apart_in_metrics_and_reports(
    tree: dict[str, Any], parts: dict[str, str], tmp_path: Path
) -> None:
    paths = [parts["odd"], parts["other_even"]]
    with pytest.raises(CacheMismatchError, match=r"teacher\.weights_fingerprint: .* in .*odd, .* in .*x"):
        run_alone(make_recipe(tree, cache__path=paths))
    recipe = make_recipe(tree, cache__path=paths, cache__teachers="many", run__export=True)
    assert run_alone(recipe) == 0
    last = [record for record in records(recipe) if record["event"] == "validation"][-1]
    found = last["by_teacher"]
    names = [CacheReader(path).manifest.identity.teacher.name for path in paths]
    assert sorted(names) == found["names"]
    (begun,) = [record["splits"] for record in records(recipe) if record["event"] == "data"]
    assert begun["train"]["teachers"] == {names[0]: 6, names[1]: 6}
    assert begun["validation"]["teachers"] == {names[0]: 2, names[1]: 2}
    for name, total in (("ce", "ce_loss"), ("kl", "kl"), ("teacher_ce", "teacher_ce_loss")):
        weighted = sum(a * b for a, b in zip(found[name], found["positions"], strict=True))
        assert weighted / sum(found["positions"]) == pytest.approx(last[total], rel=1e-5)
    assert found["kl"][0] != pytest.approx(found["kl"][1], rel=0.01)
    card = (recipe.run.path / "export" / "README.md").read_text()
    assert all(f"`{name}`" in card for name in names)

    shown = CliRunner().invoke(commands, ["compare", str(recipe.run.path)], catch_exceptions=False).output
    assert "| run | teacher | positions | CE | KL | teacher's CE |" in shown
    assert shown.count(f"| {found['positions'][0]} |") >= 1
    page = tmp_path / "page.html"
    assert CliRunner().invoke(commands, ["report", str(recipe.run.path), str(page)]).exit_code == 0
    assert "By teacher" in page.read_text()
    asked = ["evaluate", str(recipe.run.path), "--no-references", "--json", "--examples", "4"]
    told = json.loads(CliRunner().invoke(commands, asked, catch_exceptions=False).stdout)
    (student,) = told["models"] if isinstance(told, dict) else told
    assert student["by_teacher"]["names"] == found["names"]
    assert student["by_teacher"]["kl"] == pytest.approx(found["kl"], rel=1e-4)


def test_what_several_captures_have_cost_is_added_up(parts: dict[str, str]) -> None:
    """For a list over the rows of all; the teachers of a mix have all seen the same rows."""
    both = [parts["whole"], parts["other"]]
    one, other = (captured_times(location) for location in both)
    assert one is not None
    assert other is not None
    listed, mixed = (captured_together(both, is_mix=is_mix) for is_mix in (False, True))
    assert listed == CapturedTimes(
        one.seconds + other.seconds,
        one.teacher_s + other.teacher_s,
        one.num_positions + other.num_positions,
    )
    assert mixed == replace(listed, num_positions=one.num_positions)
    assert captured_together([parts["whole"], parts["odd"]], is_mix=False) is None  # it has no log


def test_a_mix_is_the_weighted_mean_of_its_teachers(tree: dict[str, Any], parts: dict[str, str]) -> None:
    mixed = with_mix(
        tree,
        [{"path": parts["whole"], "weight": 0.7}, {"path": parts["other"], "weight": 0.3}],
        run__name="mix",
    )
    one = make_recipe(tree, run__name="whole", optimization__max_steps=1)
    teacher = {"model": CacheReader(parts["other"]).manifest.identity.teacher.name, "dtype": "float32"}
    other = make_recipe(
        tree | {"teacher": teacher},
        run__name="other",
        cache__path=parts["other"],
        cache__seed=5,
        optimization__max_steps=1,
    )
    first = []
    for recipe in (mixed, one, other):
        assert run_alone(recipe) == 0
        validation = next(record for record in records(recipe) if record["event"] == "validation")
        step = next(record for record in records(recipe) if record["event"] == "step")
        first.append(
            [validation[name] for name in ("kd_loss", "kl", "teacher_ce_loss", "ce_loss")] + [step["kd_loss"]]
        )
    for mine, left, right in zip(*first, strict=True):
        assert mine == pytest.approx(0.7 * left + 0.3 * right, rel=1e-5)
    shown = CliRunner().invoke(commands, ["compare", str(mixed.run.path)], catch_exceptions=False).output
    assert "KL of a mix of caches: the mean of the KLs to its teachers" in shown


def test_rows_that_a_cache_of_a_mix_lacks_are_counted(tree: dict[str, Any], parts: dict[str, str]) -> None:
    recipe = with_mix(tree, [{"path": parts["whole"]}, {"path": parts["most"]}])
    told = rf"cache {parts['most']}: 4 of 12 examples are not in it, .*row 5 first"
    with pytest.raises(CacheMismatchError, match=told):
        run_alone(recipe)
    report = check_recipe(recipe, num_ranks=1)
    assert f"cache {parts['most']}: 6 of 16 examples are not in it" in "\n".join(map(str, report.problems))
    covered = make_recipe(tree, cache__path=[parts["odd"], parts["most"]], cache__duplicates="first")
    assert covers(covered)
    assert not covers(make_recipe(tree, cache__path=[parts["most"]]))


def test_check_describes_each_cache(
    tree: dict[str, Any], parts: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    report = check_recipe(make_recipe(tree, cache__path=[parts["odd"], parts["even"]]), num_ranks=1)
    assert report.status == 0
    report.show()
    told = capsys.readouterr().out
    assert f"{parts['odd']}: 8 examples" in told
    assert f"{parts['even']}: 8 examples" in told
    report = check_recipe(make_recipe(tree, cache__path=[parts["odd"], parts["most"]]), num_ranks=1)
    assert "2 example(s) are in more than one of them" in "\n".join(map(str, report.problems))
    report = check_recipe(make_recipe(tree, cache__path=[parts["even"], "/nowhere"]), num_ranks=1)
    assert "cache /nowhere: no manifest.json" in "\n".join(map(str, report.problems))
    report = check_recipe(with_mix(tree, [{"path": parts["whole"]}, {"path": parts["other"]}]), num_ranks=1)
    assert report.status == 0
    report.show()
    assert "0.5 of the targets" in capsys.readouterr().out


def test_a_teacher_that_is_none_of_theirs_is_refused(
    tree: dict[str, Any], parts: dict[str, str], tmp_path: Path
) -> None:
    teacher = {"teacher": {"model": "gone/teacher", "dtype": "float32"}}
    recipe = with_mix(tree | teacher, [{"path": parts["whole"]}, {"path": parts["other"]}])
    with pytest.raises(CacheMismatchError) as refused:
        run_alone(recipe)
    assert str(refused.value).count("gone/teacher asked for") == 2
    nameless = {name: value for name, value in tree.items() if name != "teacher"}
    report = check_recipe(
        with_mix(nameless, [{"path": parts["whole"]}, {"path": parts["other"]}]), num_ranks=1
    )
    assert report.status == 0


def test_a_capture_writes_one_cache(tree: dict[str, Any], parts: dict[str, str]) -> None:
    recipe = make_recipe(tree, cache__path=[parts["odd"], parts["even"]])
    with (
        distributed(device="cpu") as world,
        pytest.raises(RecipeError, match=r"cache\.path names .*a capture writes one"),
    ):
        capture(recipe, world, StopRequest())


def test_labels_alone_do_without_a_list_that_is_not_whole(
    tree: dict[str, Any], parts: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(
        tree, cache__path=[parts["odd"], "/nowhere"], loss__kd_ratio=0.0, optimization__max_steps=1
    )
    assert run_alone(recipe) == 0
    assert [record["kl"] for record in records(recipe) if record["event"] == "validation"] == [None, None]
    assert "no KL to the teacher, its cache cannot be used: cache /nowhere" in capsys.readouterr().out


# --- going on ----------------------------------------------------------------------------------------------


def go_on(tree: dict[str, Any], path: Any, *, steps: int = 3, **overrides: Any) -> Recipe:
    recipe = make_recipe(tree, cache__path=path, optimization__max_steps=steps, **overrides)
    assert run_alone(recipe, resume=True) == 0
    return recipe


def told(before: Any, now: Any, **settings: Any) -> list[str]:
    """What ``--resume`` says of two ``cache.path``."""
    found = [
        facts_of_caches(open_caches(CacheConfig(path=path, duplicates="first", **settings)))
        for path in (before, now)
    ]
    return cache_changes(RunFolder(Path("run")), *found)


def test_caches_that_have_come_gone_grown_or_changed_places_are_told(
    parts: dict[str, str], tmp_path: Path
) -> None:
    odd, even, whole = parts["odd"], parts["even"], parts["whole"]
    moved = str(shutil.copytree(odd, tmp_path / "moved"))
    assert told((odd, even), (moved, even)) == []  # folders may move
    assert told((odd, even), (even, moved)) == [
        f"the caches are in another order: {odd}, {even} before, {even}, {odd} now"
    ]
    (new, gone, lost) = told((odd, even), (whole,))
    assert new.startswith(f"cache {whole}: it was not read before; 16 examples by ")
    assert (gone, lost) == (f"cache {odd}: it is no longer read", f"cache {even}: it is no longer read")
    grown = part_of(Path(whole), tmp_path / "grown", [0, 2])
    before = facts_of_caches(CacheList([odd, grown]))
    shutil.rmtree(grown)
    part_of(Path(whole), Path(grown), [0, 2, 4])
    (line,) = cache_changes(RunFolder(Path("run")), before, facts_of_caches(CacheList([odd, grown])))
    assert (
        line == f"cache {grown}: other examples are in it than before; its teacher and targets are the same"
    )
    with pytest.raises(CheckpointError, match="the cache is of another teacher"):
        told((odd, even), (parts["other_even"],))
    (line,) = told((odd, even), (odd, even, parts["other_even"]), teachers="many")
    assert line.endswith("a new teacher")


def test_a_run_says_it_and_rows_do_not_change_their_teacher_on_the_way(
    tree: dict[str, Any], parts: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tree | {"cache": tree["cache"] | {"teachers": "many", "duplicates": "first"}}
    odd, even, other = parts["odd"], parts["even"], parts["other_even"]
    assert run_alone(make_recipe(tree, cache__path=[odd, even, other])) == 0
    for paths in ([odd, other, even], [odd, other]):
        for limit in (None, 11):  # with all rows, and with the last one left out
            recipe = make_recipe(tree, cache__path=paths, data__limit=limit, optimization__max_steps=9)
            with (
                pytest.raises(
                    CheckpointError, match="rows would have the targets of other teachers than before"
                ),
                distributed(device="cpu") as world,
            ):
                train(recipe, world, resume=True, accept_data_change=True)
    capsys.readouterr()
    recipe = go_on(tree, [even, odd])
    shown = capsys.readouterr().out
    assert f"data change: cache {other}: it is no longer read" in shown
    assert f"the caches are in another order: {odd}, {even} before, {even}, {odd} now" in shown
    (change,) = [record for record in records(recipe) if record["event"] == "data_change"]
    assert (change["step"], len(change["changes"])) == (2, 2)


def test_a_mix_goes_on_with_its_weights_alone(tree: dict[str, Any], parts: dict[str, str]) -> None:
    def mixed(one: float, *, steps: int, turned: bool = False) -> Recipe:
        caches = [{"path": parts["whole"], "weight": one}, {"path": parts["other"], "weight": 1 - one}]
        return with_mix(tree, caches[::-1] if turned else caches, optimization__max_steps=steps)

    assert run_alone(mixed(0.75, steps=1)) == 0
    with pytest.raises(CheckpointError, match=r"cache\.mix: the run has .*0\.75.*, now it is .*0\.5"):
        run_alone(mixed(0.5, steps=2), resume=True)
    with pytest.raises(CheckpointError, match=r"cache\.mix"):
        run_alone(make_recipe(tree, optimization__max_steps=2), resume=True)
    assert run_alone(mixed(0.75, steps=2, turned=True), resume=True) == 0


# --- recipes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cache", "told"),
    [
        ({}, "give either path or mix"),
        ({"path": "a", "mix": [{"path": "b"}]}, "give either path or mix"),
        ({"path": []}, "at least 1 item"),
        ({"path": ["a", "b", "a"]}, "path names a more than once"),
        ({"mix": [{"path": "a"}, {"path": "a"}]}, "mix names a more than once"),
        ({"mix": [{"path": "a", "weight": 0.7}, {"path": "b", "weight": 0.4}]}, "0.7, 0.4 sum to 1.1"),
        ({"mix": [{"path": "a", "weight": 0.7}, {"path": "b"}]}, "Give all of them one, or none"),
        ({"mix": [{"path": "a", "weight": 0}, {"path": "b", "weight": 1}]}, "greater than 0"),
        ({"mix": [{"path": "a", "wieght": 1}]}, "did you mean 'weight'"),
        (
            {"mix": [{"path": "a"}], "duplicates": "first", "teachers": "many"},
            "duplicates and teachers beside mix",
        ),
        ({"path": ["a", "b"], "duplicates": "last"}, "'refuse' or 'first'"),
        ({"path": "a", "teachers": "two"}, "'one' or 'many'"),
    ],
    ids=str,
)
def test_what_a_recipe_must_not_say(tree: dict[str, Any], cache: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told.replace("(", r"\(")):
        make_recipe(tree | {"cache": cache})


def test_a_recipe_may_say_it_so(tree: dict[str, Any], tmp_path: Path) -> None:
    top_k = {"mix": [{"path": "a"}, {"path": "b"}, {"path": "c"}], "policy": {"kind": "top_k", "k": 4}}
    with pytest.raises(RecipeError, match="tail ghost of a mix of top_k caches"):
        make_recipe(tree | {"cache": top_k}, loss__tail="ghost")
    recipe = make_recipe(tree | {"cache": top_k}, loss__tail="uniform")
    assert recipe.cache is not None
    assert recipe.cache.weights == pytest.approx((1 / 3,) * 3)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe_text(recipe))
    assert load_recipe(file) == recipe
    laid = load_recipe(file, overrides=["cache.path=[a, b]"])
    assert laid.cache is not None
    assert (laid.cache.path, laid.cache.mix) == (("a", "b"), None)
    plain = make_recipe(tree, cache__path="~/cache")
    assert plain.cache is not None
    assert plain.cache.path == str(Path("~/cache").expanduser())
    assert make_recipe(tree, cache__path=["~/a", "b"]).cache.locations[0] == str(Path("~/a").expanduser())  # type: ignore[union-attr]
