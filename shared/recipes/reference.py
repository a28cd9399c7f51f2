"""``docs/recipes.md``, made from the sections' types, defaults and docstrings.

python -m shared.recipes > docs/recipes.md
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from shared.recipes import yaml12
from shared.recipes.files import RECIPE_FOLDER, recipe_names
from shared.recipes.recipe import Recipe
from shared.recipes.schema import sections_in

TITLE = """\
# Recipes: every key

One YAML file describes a whole experiment. Both stages read it. Unknown keys are errors. All problems are shown
at once.

This page is made from the code: `python -m shared.recipes > docs/recipes.md`. To see a recipe with every default
written out, run `train-student recipe phantom`.

- `extends: NAME` in the first line lays a recipe over another one, key by key. NAME is a recipe that comes with the
  package, or a file.
- `--set section.key=value` lays one value over the recipe. The value is YAML. It may be given many times; the
  last one counts.
- A list may be given as one value: `--set cache.temperatures=2.0`.
- Of two alternative keys, such as `max_steps` and `num_epochs`, the one laid over replaces the other.
- `~` in a path is your home folder, `$NAME` an environment variable, which must be set. Relative paths start
  where the command is run.
"""
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def reference() -> str:
    """The page: the recipes that come with the package, then one table for each section."""
    lines = [TITLE, "Recipes that come with the package:", "", "| recipe | what it is |", "|---|---|"]
    lines += [f"| `{name}` | {_comment(name)} |" for name in recipe_names()]
    for name, field in Recipe.model_fields.items():
        for model in sections_in(field):
            lines += _section(name, model, optional=field.default is None)
    return "\n".join(lines) + "\n"


def _comment(name: str) -> str:
    """The comment that a packaged recipe begins with."""
    lines = (RECIPE_FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return " ".join(comment)


def _section(path: str, model: type[BaseModel], *, optional: bool = False) -> Iterator[str]:
    """Heading and table of a section, then those of the sections in it."""
    meaning = (inspect.getdoc(model) or "").replace("``", "`")
    yield from ["", f"## {path}", "", meaning + (" Optional." if optional else ""), ""]
    yield from ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if name != "kind" or get_origin(field.annotation) is not Literal:  # stands in the heading
            yield f"| `{name}` | {_type(field)} | {_default(field)} | {_meaning(field)} |"
    for name, field in model.model_fields.items():
        for part in sections_in(field):
            tag = f", kind {part.model_fields['kind'].default}" if _is_choice(field) else ""
            yield from _section(f"{path}.{name}{tag}", part, optional=field.default is None)


def _meaning(field: FieldInfo) -> str:
    below = ["See below."] if any(sections_in(field)) else []
    return " ".join([*(field.description or "").split(), *below])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, BaseModel):
        return f"kind `{value.model_dump()['kind']}`" if _is_choice(field) else ""
    return f"`{yaml12.dump_value(list(value) if isinstance(value, tuple) else value)}`"


def _is_choice(field: FieldInfo) -> bool:
    """Whether sections of several kinds may stand there."""
    return field.discriminator == "kind"


def _type(field: FieldInfo) -> str:
    return _type_name(field.annotation, field.metadata).replace("|", "\\|")


def _type_name(kind: Any, metadata: Any = ()) -> str:
    """A type as a user would say it: ``integer > 0``, ``list of number``, ``train | validation | test``."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type_name(arguments[0], arguments[1:])
    if origin in (Union, types.UnionType):
        rest = [part for part in arguments if part is not type(None)]
        named = ["section" if _is_section(part) else _type_name(part) for part in rest]
        return " | ".join(dict.fromkeys([*named, *(["null"] if len(rest) < len(arguments) else [])]))
    if origin is Literal:
        return " | ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        if Ellipsis in arguments:
            return f"list of {_type_name(arguments[0])}"
        return f"list of {len(arguments)}: {_type_name(arguments[0])}"
    if _is_section(kind):
        return "section"
    name = {str: "text", int: "integer", float: "number", bool: "true or false"}[kind]
    return " ".join([name, *_bounds(metadata)])


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _bounds(metadata: Any) -> Iterator[str]:
    for item in metadata:
        parts = item.metadata if isinstance(item, FieldInfo) else [item]
        for part in parts:
            for name, sign in BOUNDS.items():
                if isinstance(part, annotated_types.BaseMetadata) and hasattr(part, name):
                    yield f"{sign} {_number(getattr(part, name))}"


def _number(value: float) -> str:
    return "2^63" if value == 2**63 else f"{value:g}"
