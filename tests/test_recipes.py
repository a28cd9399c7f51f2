"""Recipes: all that come with the package load; every mistake is named, all of them at once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from documents import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared.errors import RecipeError
from shared.phantom.__main__ import main as phantom_command
from shared.recipes import Recipe, dump_recipe, load_recipe, recipe_text, yaml12
from shared.recipes.files import recipe_names, validate_tree
from shared.recipes.policies import Threshold, TopK
from shared.recipes.reference import reference
from shared.recipes.schema import Section, sections_in
from stage1_teacher.__main__ import commands as teacher_commands
from stage2_student.__main__ import commands as student_commands

MINIMAL = """
data: {source: somewhere}
student: {model: small}
loss: {kd_ratio: 0.0}
optimization: {max_steps: 3}
run: {name: mine}
"""


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", recipe_names())
def test_packaged_recipes_load_and_survive_a_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    assert validate_tree(Recipe, dump_recipe(recipe), origin=name) == recipe


def test_reference_recipe_has_the_figures_of_the_reference_example() -> None:
    recipe = load_recipe("qwen3_5_9b_to_4b_medpix")
    steps = recipe.optimization
    assert recipe.data.source == "mmoukouba/MedPix-VQA"
    assert (recipe.teacher and recipe.teacher.model) == "Qwen/Qwen3.5-9B"
    assert recipe.student.model == "Qwen/Qwen3.5-4B"
    assert (steps.global_batch_size, steps.microbatch_size, steps.max_steps) == (16, None, 300)
    assert (recipe.run.validate_every, recipe.run.checkpoint_every, recipe.run.seed) == (50, 200, 42)
    assert (steps.learning_rate, steps.weight_decay, steps.betas, steps.eps) == (
        5e-5,
        0.01,
        (0.9, 0.95),
        1e-8,
    )
    assert (steps.schedule, steps.num_warmup_steps, steps.max_grad_norm) == ("cosine", 30, 1.0)
    assert (recipe.loss.kd_ratio, recipe.loss.temperature, recipe.loss.chunk_size) == (0.5, 1.0, "auto")
    assert recipe.student.freeze.vision
    assert recipe.student.freeze.audio


def test_all_problems_are_shown_at_once_each_with_its_place(tmp_path: Path) -> None:
    text = """
data: {source: 5, max_answer_tokens: 0}
student: {model: small, learning_rte: 1}
optimization: {max_steps: true, learning_rat: 5e-5}
loss: {kd_ratio: 1.5}
run: {}
"""
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    message = str(caught.value)
    for part in [
        "recipe mine.yaml, data.source: ",
        "data.max_answer_tokens: input should be greater than 0; found 0",
        "student.learning_rte: unknown key",
        "optimization.learning_rat: unknown key; did you mean 'learning_rate'?",
        "optimization.max_steps: input should be a valid integer; found True",
        "loss.kd_ratio: input should be less than or equal to 1; found 1.5",
        "run.name: is required",
    ]:
        assert part in message


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("student.kd_ratio=1", "did you mean 'loss.kd_ratio'"),
        ("student.rank=8", "did you mean 'student.lora.rank'"),
        ("student.seed=8", "known keys: "),  # more than one section has it
    ],
)
def test_a_key_in_another_section_is_found(setting: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=hint):
        load_recipe("phantom", overrides=[setting])


def test_unknown_key_inside_a_policy_names_the_policys_keys(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'tau'"):
        load_recipe("phantom", overrides=["cache.policy.taus=0.1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.temperature=2.0", "loss.temperature 2.0 is not among cache.temperatures"),
        ("loss.tail=ghost", "loss.tail is for top_k and top_p caches"),
        ("cache=null", "loss.kd_ratio above 0 needs a cache section"),
        ("teacher=null", "a cache section needs a teacher section"),
        ("teacher={model: m, shard: true, tensor: 2}", "shard beside tensor or expert"),
        ("teacher={model: m, expert: 4, tensor: 2}", "tensor 2 and expert 4: the same ranks"),
        ("parallel.pipeline=2", "pipeline parallelism is not supported"),
        ("optimization={max_steps: 5, num_epochs: 1}", "optimization: give either max_steps or num_epochs"),
        ("optimization.num_epochs=null", "optimization: give either max_steps or num_epochs"),
        ("cache.temperatures=[1.0, 1.0]", "one or more different values"),
        ("run.name=a/b", "is not a folder name"),
        ("run.name=' '", "is not a folder name"),
        ('run.name="a\\0b"', "is not a folder name"),
        (f"run.name={'x' * 300}", "a name of 300 bytes"),
        (f"data.max_answer_tokens={10**30}", "a number of 31 digits"),
        ("cache.path=''", "cache.path: '' is no path and no name"),
        ('run.root="a\\0b"', "is no path and no name"),
        ("data.source=' '", "data.source: ' ' is no path and no name"),
        ("cache.path=['', mine]", "cache.path.0: '' is no path and no name"),
        ("cache.chunk_size=foo", "cache.chunk_size: input should be a valid integer"),
        ("cache.chunk_size=-1", "cache.chunk_size: input should be greater than 0"),
        ("cache.path=$NOT_SET_HERE/cache", "the environment variable $NOT_SET_HERE is not set"),
        ("loss.kd_ratio=nan", "loss.kd_ratio"),
        ("optimization.learning_rate=.inf", "optimization.learning_rate"),
        ("optimization.betas=[1.0, 0.9]", "optimization.betas.0: input should be less than 1"),
        ("optimization.betas=[0.9, 1.0]", "optimization.betas.1: input should be less than 1"),
        ("cache.temperatures=[1e-30]", "cache.temperatures.0: input should be greater than or equal to 0.01"),
        ("cache.temperatures=[1e30]", "cache.temperatures.0: input should be less than or equal to 100"),
        ("loss.temperature=1e-3", "loss.temperature: input should be greater than or equal to 0.01"),
        ("loss.temperature=101", "loss.temperature: input should be less than or equal to 100"),
        ("student.lora={target_modules: []}", "student.lora.target_modules"),
        ("optimization.num_epochs=1e308", "optimization.num_epochs: input should be less than or equal to"),
        ("run.num_workers=100000000", "run.num_workers: input should be less than or equal to 1024"),
        ("cache.num_workers=1025", "cache.num_workers: input should be less than or equal to 1024"),
        ("loss", "needs the form section.key=value"),
        ("loss.=1", "needs the form section.key=value"),
        ("loss.kd_ratio=[", "the value is not YAML"),
    ],
)
def test_impossible_settings_are_refused(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe("phantom", overrides=[override])


def test_numbers_are_read_as_yaml_1_2_reads_them(tmp_path: Path) -> None:
    text = MINIMAL + "cache: null\n"
    recipe = load_recipe(write(tmp_path, text), overrides=["optimization.learning_rate=5e-5", "run.name=no"])
    assert recipe.optimization.learning_rate == 5e-5
    assert recipe.run.name == "no"


def test_a_key_given_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'loss' stands twice"):
        load_recipe(write(tmp_path, MINIMAL + "loss: {kd_ratio: 0.0}\n"))


def test_extends_lays_a_recipe_over_another(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "base.yaml")
    over = write(tmp_path, "extends: base.yaml\nrun: {name: other}\n", "over.yaml")
    recipe = load_recipe(over)
    assert (recipe.run.name, recipe.data.source) == ("other", "somewhere")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("cache.policy.k=8", "cache.policy.k: unknown key; k belongs to kind top_k"),
        ("cache.policy.max_k=8", "cache.policy.max_k: unknown key; max_k belongs to kind top_p"),
        ("cache.policy.tua=0.1", "cache.policy.tua: unknown key; did you mean 'tau'?"),
        ("cache.policy.tau=2", "cache.policy.tau: input should be less than or equal to 1; found 2"),
    ],
)
def test_a_wrong_key_of_a_policy_is_told_by_its_kind(setting: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("phantom", overrides=[setting])
    assert str(caught.value) == f"recipe phantom.yaml, {message}"


def test_the_home_of_nobody_is_a_missing_file(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: ~nobody_of_that_name/base.yaml\n")
    for name in ("~nobody_of_that_name/mine.yaml", mine):
        with pytest.raises(
            RecipeError, match=r"recipe ~nobody_of_that_name/\w+\.yaml: there is no such file"
        ):
            load_recipe(name)


def test_another_policy_replaces_the_whole_policy() -> None:
    recipe = load_recipe("phantom", overrides=["cache.policy={kind: top_k, k: 8}"])
    assert recipe.cache is not None
    assert recipe.cache.policy.kind == "top_k"


def test_a_policy_without_a_kind_is_of_the_kind_that_it_is_by_default(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    models = "teacher: {model: large}\nstudent: {model: small}\n"
    rest = "data: {source: data}\ncache: {path: cache}\noptimization: {max_steps: 1}\nrun: {name: run}\n"
    file.write_text(models + rest)
    recipe = load_recipe(file, overrides=("cache.policy.tau=0.0625",))
    assert recipe.cache is not None
    assert recipe.cache.policy == Threshold(tau=0.0625)
    with pytest.raises(RecipeError, match=r"cache\.policy.*k: unknown key"):
        load_recipe(file, overrides=("cache.policy.k=3",))


OWN_TAU = """
data: {source: data}
teacher: {model: large}
student: {model: small}
cache: {path: cache, policy: {tau: 0.0625}}
optimization: {max_steps: 1}
run: {name: run}
"""


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["cache.policy.kind=threshold"], Threshold(tau=0.0625)),
        (["cache.policy={kind: threshold, values: fp16}"], Threshold(tau=0.0625, values="fp16")),
        (["cache.policy={tau: 0.5}", "cache.policy.kind=threshold"], Threshold(tau=0.5)),
        (["cache.policy={kind: top_k, k: 8}"], TopK(k=8)),
    ],
)
def test_a_kind_that_a_policy_has_by_default_replaces_nothing(
    tmp_path: Path, overrides: list[str], expected: Section
) -> None:
    recipe = load_recipe(write(tmp_path, OWN_TAU), overrides=overrides)
    assert recipe.cache is not None
    assert recipe.cache.policy == expected


def test_nor_does_it_in_a_recipe_that_extends_another(tmp_path: Path) -> None:
    write(tmp_path, OWN_TAU, "base.yaml")
    over = "extends: base.yaml\ncache: {policy: {kind: threshold, values: fp16}}\n"
    recipe = load_recipe(write(tmp_path, over))
    assert recipe.cache is not None
    assert recipe.cache.policy == Threshold(tau=0.0625, values="fp16")


@pytest.mark.parametrize("name", ["x" * 300, f"{'x' * 300}.yaml", "x\0", "x\0.yaml"])
def test_a_name_that_no_file_can_have_is_unknown(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"unknown|no such file"):
        load_recipe(name)
    with pytest.raises(RecipeError, match=r"unknown|no such file"):
        load_recipe(write(tmp_path, f"extends: {json.dumps(name)}\n"))


def test_extends_in_a_circle_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\n", "b.yaml")
    with pytest.raises(RecipeError, match="extends itself"):
        load_recipe(tmp_path / "a.yaml")


def test_unknown_recipes_get_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'phantom'"):
        load_recipe("phantm")
    with pytest.raises(RecipeError, match="there is no such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="needs a mapping of sections"):
        load_recipe(write(tmp_path, "- a\n- b\n"))
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(write(tmp_path, "a: [\n"))


def test_overriding_one_column_leaves_the_others(tmp_path: Path) -> None:
    columns = "{image: picture, question: frage, answer: antwort, kind: null, case: null}"
    base = write(tmp_path, MINIMAL.replace("source: somewhere", f"source: somewhere, columns: {columns}"))
    recipe = load_recipe(base, overrides=["data.columns.kind=type"])
    assert (recipe.data.columns.question, recipe.data.columns.kind) == ("frage", "type")


def test_integers_are_decimal() -> None:
    recipe = load_recipe("phantom", overrides=["cache.seed=010", "run.seed=08"])
    assert recipe.cache is not None
    assert (recipe.cache.seed, recipe.run.seed) == (10, 8)


def test_extending_itself_by_another_path_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, f"extends: ../{tmp_path.name}/mine.yaml\n")
    with pytest.raises(RecipeError, match="extends itself"):
        load_recipe(path)


def test_a_cache_must_hold_the_splits_that_the_student_needs() -> None:
    with pytest.raises(RecipeError, match=r"cache\.splits lacks validation"):
        load_recipe("phantom", overrides=["cache.splits=[train]"])
    with pytest.raises(RecipeError, match="names a split twice"):
        load_recipe("phantom", overrides=["cache.splits=[train, train, validation]"])


@pytest.mark.parametrize("key", ["cache.seed", "run.seed", "bootstrap.phantom.seed"])
def test_seeds_have_63_bits(key: str) -> None:
    """Beyond 64 they would be a seed that another number has, or an overflow in the first step."""
    load_recipe("phantom", overrides=[f"{key}={2**63 - 1}"])
    for wrong in (2**63, 2**64, -1):
        with pytest.raises(RecipeError, match=key.replace(".", r"\.")):
            load_recipe("phantom", overrides=[f"{key}={wrong}"])


# --- alternatives, lists, home folders -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "max_steps", "num_epochs"),
    [
        (["optimization.max_steps=8"], 8, None),
        (["optimization={max_steps: 8}"], 8, None),
        (["optimization.max_steps=8", "optimization.num_epochs=2"], None, 2.0),  # the last one counts
        (["optimization.max_steps=8", "optimization.num_epochs=null"], 8, None),
        (["optimization.max_steps=null"], None, 3.5),
    ],
)
def test_an_alternative_replaces_the_other(
    overrides: list[str], max_steps: int | None, num_epochs: float | None
) -> None:
    steps = load_recipe("phantom", overrides=overrides).optimization
    assert (steps.max_steps, steps.num_epochs) == (max_steps, num_epochs)


def test_an_alternative_replaces_the_other_of_the_recipe_that_is_extended(tmp_path: Path) -> None:
    over = write(tmp_path, "extends: phantom\noptimization: {max_steps: 8}\n", "over.yaml")
    assert load_recipe(over).optimization.num_epochs is None
    again = write(tmp_path, "extends: over.yaml\noptimization: {num_epochs: 0.5}\n", "again.yaml")
    assert load_recipe(again).optimization.max_steps is None
    resolved = write(tmp_path, recipe_text(load_recipe(again)), "resolved.yaml")  # as a run's folder has it
    assert load_recipe(resolved, overrides=["optimization.max_steps=8"]).optimization.num_epochs is None


def test_a_list_takes_one_value(tmp_path: Path) -> None:
    settings = ["cache.temperatures=2.0", "loss.temperature=2.0", "run.trackers=wandb"]
    recipe = load_recipe("phantom", overrides=[*settings, "student.lora={target_modules: q_proj}"])
    assert recipe.cache is not None
    assert recipe.student.lora is not None
    assert recipe.cache.temperatures == (2.0,)
    assert recipe.run.trackers == ("wandb",)
    assert recipe.student.lora.target_modules == ("q_proj",)
    model = "{path: m, hidden_size: 32, num_layers: 1, vision_hidden_size: 32, vision_depth: 1}"
    one = load_recipe("phantom", overrides=[f"bootstrap.small_models.models={model}"])
    assert one.bootstrap.small_models is not None
    assert [entry.path for entry in one.bootstrap.small_models.models] == ["m"]
    with pytest.raises(RecipeError, match=r"optimization\.betas"):  # exactly two, not any number
        load_recipe("phantom", overrides=["optimization.betas=0.9"])


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, MINIMAL, "base.yaml")
    write(tmp_path, "extends: ~/base.yaml\n", "over.yaml")
    model = "{path: ~/m, hidden_size: 32, num_layers: 1, vision_hidden_size: 32, vision_depth: 1}"
    settings = [
        *("data.source=~/data", "student.model=~/s", "run.root=~/runs", "cache={path: ~/cache}"),
        *("teacher={model: ~/t, trained_by: ~/over.yaml}", f"bootstrap.small_models.models={model}"),
    ]
    text = recipe_text(load_recipe("~/over.yaml", overrides=settings))
    assert "~" not in text
    assert text.count(str(tmp_path)) == len(settings) + 1


MODEL_AT_A_URL = "{path: 's3://b/m', hidden_size: 32, num_layers: 1, vision_hidden_size: 32, vision_depth: 1}"


def test_environment_variables_stand_in_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    overrides = ("cache.path=$SCRATCH/cache", "data.source=${SCRATCH}/data", "run.root='$SCRATCH'")
    recipe = load_recipe("phantom", overrides=overrides)
    assert (recipe.cache and recipe.cache.path) == "/scratch/me/cache"
    assert (recipe.data.source, recipe.run.root) == ("/scratch/me/data", "/scratch/me")


@pytest.mark.parametrize(
    "setting",
    ["run.root=s3://b/runs", "write.path=s3://b/a", f"bootstrap.small_models.models={MODEL_AT_A_URL}"],
)
def test_a_url_is_no_folder_to_write(setting: str) -> None:
    """It would become a local folder ``s3:``."""
    with pytest.raises(RecipeError, match=r"'s3://b/\w+' is a URL, a local folder is needed"):
        load_recipe("phantom", overrides=[setting])


@pytest.mark.parametrize(
    ("commands", "arguments"),
    [
        (teacher_commands, ["write", "phantom", "--out"]),
        (teacher_commands, ["inspect", "cache", "--plots"]),
        (teacher_commands, ["report", "cache"]),
        (student_commands, ["evaluate", "run", "--out"]),
        (student_commands, ["export", "run", "--out"]),
        (student_commands, ["write", "run", "--out"]),
        (student_commands, ["compare", "run", "--json"]),
        (phantom_command, []),
    ],
)
def test_a_url_is_no_place_for_what_a_command_writes(
    commands: click.Command, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(commands, [*arguments, "s3://bucket/out"])
    assert isinstance(result.exception, RecipeError)
    assert str(result.exception).startswith("s3://bucket/out: a local path is needed")
    assert not list(tmp_path.iterdir())


# --- the resolved recipe, and the reference --------------------------------------------------------------


@settings(max_examples=50, derandomize=True)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda part: st.lists(part) | st.dictionaries(st.text(), part),
        max_leaves=8,
    )
)
@example({"\x85": "\u2028 \x85 a"})
def test_yaml_is_read_as_it_was_written(value: object) -> None:
    assert yaml12.load(yaml12.dump({"key": value})) == {"key": value}
    assert yaml12.load(yaml12.dump_value(value)) == value


@pytest.mark.parametrize("commands", [teacher_commands, student_commands])
def test_the_resolved_recipe_is_printed_and_loads_again(commands: object, tmp_path: Path) -> None:
    overrides = ["run.name='1e5'", "data.columns.image=no"]
    words = ["recipe", "phantom", *(word for one in overrides for word in ("--set", one))]
    shown = CliRunner().invoke(commands, words)  # type: ignore[arg-type]
    assert shown.exit_code == 0
    assert load_recipe(write(tmp_path, shown.output)) == load_recipe("phantom", overrides=overrides)


@pytest.mark.parametrize("stage", ["stage1_teacher", "stage2_student"])
def test_a_screen_that_lacks_characters_shows_the_recipe_all_the_same(stage: str, tmp_path: Path) -> None:
    overrides = ["data.system_prompt=R\u00e9ponds, \u4e2d\u6587 \U0001fac1", "run.name=caf\u00e9"]
    words = ["recipe", "phantom", *(word for one in overrides for word in ("--set", one))]
    screen = os.environ | {"PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", stage, *words], env=screen, cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    shown = write(tmp_path, done.stdout.decode("latin-1"))
    assert load_recipe(shown) == load_recipe("phantom", overrides=overrides)


def test_every_key_has_its_line_in_the_reference_and_the_page_is_current() -> None:
    pending = [("", Recipe)]
    while pending:
        place, model = pending.pop()
        for name, field in model.model_fields.items():
            inner = list(sections_in(field))
            assert inner or field.description or name == "kind", f"{place}{name} has no docstring"
            pending += [(f"{place}{name}.", part) for part in inner]
    assert (ROOT / "docs" / "recipes.md").read_text() == reference(), (
        "run `python -m shared.recipes > docs/recipes.md`"
    )
