"""A recipe on a page: what is not as by default, and the whole of it where somebody asks.

recipe_pieces("phantom", yaml.safe_load((run / "recipe.yaml").read_bytes()))
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from shared.errors import RecipeError
from shared.recipes import Recipe, yaml12
from shared.recipes.files import validate_tree
from shared.recipes.schema import sections_in
from shared.reports.pieces import folded, paragraph, preformatted, table


def recipe_pieces(name: str, tree: Mapping[str, Any]) -> list[str]:
    """The settings that differ from the defaults, folded, and the whole recipe, folded as well."""
    whole = folded(f"{name}: the whole recipe", [preformatted(yaml12.dump(dict(tree)))])
    try:
        rows = differences(tree)
    except RecipeError as error:  # of a run of before, whose keys have changed since
        return [paragraph(f"{name}: which settings differ from the defaults cannot be told: {error}"), whole]
    differing = table(["setting", "value", "default"], rows, caption=f"{name}: settings unlike the defaults")
    return [folded(f"{name}: {len(rows)} settings unlike the defaults", [differing]), whole]


def differences(tree: Mapping[str, Any]) -> list[list[str]]:
    """Key, value and default of each setting unlike its default; ``(none)`` for a default that there is not.

    Raises   RecipeError  when it is no recipe by the rules of now
    """
    recipe = validate_tree(Recipe, dict(tree), origin="recipe")
    given = _flat(recipe.model_dump(mode="json", exclude_defaults=True))
    defaults = dict(_defaults(Recipe))
    return [[key, _plain(value), _plain(defaults.get(key, "(none)"))] for key, value in given]


def _defaults(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        sections = list(sections_in(field))
        for section in sections:
            yield from _defaults(section, f"{prefix}{name}.")
        if not sections and not field.is_required():
            yield f"{prefix}{name}", field.get_default(call_default_factory=True)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
