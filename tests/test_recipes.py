"""Recipes: all that come with the package load; every mistake is named, all of them at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import RecipeError
from shared.recipes import Recipe, dump_recipe, load_recipe
from shared.recipes.files import recipe_names, validate_tree

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
    assert (steps.global_batch_size, steps.microbatch_size, steps.max_steps) == (16, 1, 300)
    assert (recipe.run.validate_every, recipe.run.checkpoint_every, recipe.run.seed) == (50, 200, 42)
    assert (steps.learning_rate, steps.weight_decay, steps.betas, steps.eps) == (
        5e-5,
        0.01,
        (0.9, 0.95),
        1e-8,
    )
    assert (steps.schedule, steps.num_warmup_steps, steps.max_grad_norm) == ("cosine", 30, 1.0)
    assert (recipe.loss.kd_ratio, recipe.loss.temperature, recipe.loss.chunk_size) == (0.5, 1.0, 512)
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
        ("parallel.pipeline=2", "pipeline parallelism is not supported"),
        ("optimization.max_steps=5", "give either max_steps or num_epochs"),
        ("optimization.microbatch_size=3", "global_batch_size 16 is not a multiple of microbatch_size 3"),
        ("cache.temperatures=[1.0, 1.0]", "one or more different values"),
        ("run.name=a/b", "is not a folder name"),
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
        ("loss", "needs the form section.key=value"),
        ("loss.=1", "needs the form section.key=value"),
        ("loss.kd_ratio=[", "the value is not YAML"),
    ],
)
def test_impossible_settings_are_refused(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("(", r"\(").replace(".", r"\.")):
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


def test_another_policy_replaces_the_whole_policy() -> None:
    recipe = load_recipe("phantom", overrides=["cache.policy={kind: top_k, k: 8}"])
    assert recipe.cache is not None
    assert recipe.cache.policy.kind == "top_k"


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
