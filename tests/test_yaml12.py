"""YAML of strangers: whatever it holds, reading it ends soon, in values or in one error."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from shared.errors import RecipeError
from shared.recipes import load_recipe, yaml12


def bomb(levels: int) -> str:
    """Nine aliases a level, each to the level before: 9 ** levels values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


HOSTILE = {
    "aliases": bomb(12),
    "an alias of itself": "a: &a [*a]",
    "brackets": "a: " + "[" * 5_000,
    "closed brackets": "a: " + "[" * 500 + "]" * 500,
    "indentation": "\n".join(" " * n + f"k{n}:" for n in range(400)),
    "characters": "a: " + "x" * 2**21,
    "values": "a: [" + "1," * 20_000 + "]",
    "digits": "a: " + "9" * 5_000,
    "a list as a key": "? [a, b]\n: 1",
    "a mapping as a key": "? {a: b}\n: 1",
    "keys": "\n".join(f"k{n}: 1" for n in range(20_000)),
    "a tag that runs code": "a: !!python/object/apply:os.system ['true']",
    **{f"no {tag}": f"a: !!{tag} x" for tag in ("int", "float", "bool")},
    "a day that is none": "a: !!timestamp x",
    "a tag of a type that recipes lack": "a: !!timestamp 2026-01-31",
    "a tag of bytes": "a: !!binary aGk=",
    "a set": "a: !!set {b, c}",
    "a control character": "a: \x07",
    "half of a surrogate pair": 'a: "\\ud800"',
    "half of a pair in a key": '"\\udcff": 1',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_one_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(yaml.YAMLError):
        yaml12.load(HOSTILE[name])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(HOSTILE[name])
    with pytest.raises(RecipeError, match=r"recipe\.yaml: cannot be read") as found:
        load_recipe(recipe)
    assert len(str(found.value)) < 500
    with pytest.raises(RecipeError, match="--set"):
        load_recipe("phantom", overrides=[f"run.name={HOSTILE[name]}"])


def test_aliases_within_the_bounds_are_values(tmp_path: Path) -> None:
    assert yaml12.load("a: &rate 5e-5\nb: *rate") == {"a": 5e-5, "b": 5e-5}
