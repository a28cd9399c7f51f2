"""Recipe files as trees of plain values: YAML, ``extends``, overrides, and errors worth reading.

A recipe may begin with ``extends: NAME``; it is then laid over that recipe, key by key.  Lists are replaced, and so
is what the types of a recipe declare as one choice: alternative keys, and the kinds of a union.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from os.path import exists, expanduser, isfile
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from shared.errors import NotAFileError, RecipeError, shortened
from shared.recipes import yaml12
from shared.recipes.schema import default_tag, fields_of, kind_of, sections_in, shut_out, takes_a_list
from shared.regular_files import read_regular

RECIPE_FOLDER = Path(__file__).parent
Model = TypeVar("Model", bound=BaseModel)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def read_recipe_tree(
    name_or_path: str | Path, overrides: Sequence[str], model: type[BaseModel]
) -> tuple[dict[str, Any], str]:
    """The tree of a ``model`` with ``extends`` and overrides applied, and what to call it in messages."""
    path = _find(name_or_path)
    tree = _read(path.resolve(), model, seen=())
    return apply_overrides(tree, overrides, model), f"recipe {path.name}"


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str], model: type[BaseModel]) -> dict[str, Any]:
    """The tree of a ``model`` with each ``section.key=value`` laid over it; values are YAML.

    Raises   RecipeError  when one has another form
    """
    for override in overrides:
        tree = _lay(tree, _branch(override), [model])
    return tree


def validate_tree(model: type[Model], tree: dict[str, Any], *, origin: str) -> Model:
    """The tree as a ``model``.

    Raises   RecipeError  with one line for each problem.
    """
    try:
        return model.model_validate_json(json.dumps(_with_lists(tree, [model])), strict=True)
    except ValidationError as error:
        problems = [line for item in _told(error.errors(), model) for line in _explain(item, model)]
    except (TypeError, ValueError) as error:
        problems = [str(error)]
    raise RecipeError("\n".join(f"{origin}, {problem}" for problem in problems))


def _find(name_or_path: str | Path) -> Path:
    path = Path(expanduser(name_or_path))
    if path.suffix in {".yaml", ".yml"}:
        if exists(path):
            return path
        raise RecipeError(f"recipe {path}: there is no such file")
    packaged = RECIPE_FOLDER / f"{name_or_path}.yaml"
    if isfile(packaged):
        return packaged
    near = difflib.get_close_matches(str(name_or_path), recipe_names(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(recipe_names())}."
    raise RecipeError(
        f"recipe {name_or_path!r}: unknown; {hint} A recipe of your own is given as a .yaml file."
    )


def _read(path: Path, model: type[BaseModel], *, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise RecipeError(f"recipe {path.name}: extends itself by way of {seen[-1].name}")
    try:
        tree = yaml12.load(read_regular(path).decode())
    except (YAMLError, UnicodeDecodeError, OSError, NotAFileError) as error:
        raise RecipeError(f"recipe {path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"recipe {path}: found {type(tree).__name__}, needs a mapping of sections")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise RecipeError(f"recipe {path}: extends needs the name or the file of one recipe")
    beside = path.parent / expanduser(base)
    is_beside = beside.suffix in {".yaml", ".yml"} and exists(beside)
    base_path = beside.resolve() if is_beside else _find(base)
    return _lay(_read(base_path, model, seen=(*seen, path)), tree, [model])


def _lay(base: dict[str, Any], over: dict[str, Any], models: Sequence[type[BaseModel]]) -> dict[str, Any]:
    """``over`` laid over ``base``, both trees of one of the ``models``."""
    replaced = shut_out(models, [key for key, value in over.items() if value is not None])
    merged = {key: value for key, value in base.items() if key not in replaced}
    for key, value in over.items():
        fields = fields_of(models, key)
        mine = merged.get(key)
        if isinstance(value, dict) and isinstance(mine, dict):
            # Keys of another kind of policy must not shine through.
            tags = default_tag(fields) | mine
            another = any(tag in value and value[tag] != tags[tag] for tag in default_tag(fields))
            inner = [part for field in fields for part in sections_in(field)]
            merged[key] = value if another else _lay(mine, value, inner)
        else:
            merged[key] = value
    return merged


def _branch(override: str) -> dict[str, Any]:
    """``section.key=value`` as a tree."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {override!r}: needs the form section.key=value")
    try:
        node = yaml12.load(text)
    except YAMLError as error:
        reason = shortened(" ".join(str(error).split()))
        raise RecipeError(f"--set {shortened(override)!r}: the value is not YAML ({reason})") from error
    for key in reversed(keys):
        node = {key: node}
    return node


def _with_lists(tree: Any, models: Sequence[type[BaseModel]]) -> Any:
    """The tree with a list of one where a value stands for a list, and the default's kind where a union has none."""
    if not isinstance(tree, dict):
        return tree
    found = {}
    for key, value in tree.items():
        fields = fields_of(models, key)
        inner = [part for field in fields for part in sections_in(field)]
        if value is not None and not isinstance(value, list) and any(map(takes_a_list, fields)):
            value = [value]
        if isinstance(value, dict):
            value = default_tag(fields) | value
        parts = value if isinstance(value, list) else [value]
        parts = [_with_lists(part, inner) for part in parts] if inner else parts
        found[key] = parts if isinstance(value, list) else parts[0]
    return found


def _told(items: Sequence[Any], model: type[BaseModel]) -> list[Any]:
    """Without what other choices of a union say of a value that is of the right type for one of them."""

    def is_of_type(item: Any) -> bool:
        return item["type"].endswith("_type") or item["type"] == "literal_error"

    fitting = {_place(model, item["loc"])[0] for item in items if not is_of_type(item)}
    return [item for item in items if not is_of_type(item) or _place(model, item["loc"])[0] not in fitting]


def _explain(item: Any, model: type[BaseModel]) -> list[str]:
    where, found_in, other_kinds = _place(model, item["loc"])
    if item["type"] == "extra_forbidden":
        key = str(item["loc"][-1])
        section = {name for one in found_in for name in one.model_fields}
        kinds = [kind_of(one) for one in other_kinds if key in one.model_fields]
        near = difflib.get_close_matches(key, section, n=1) or [
            path for path in _key_paths(model) if path.rpartition(".")[2] == key
        ]
        hint = f"did you mean {near[0]!r}?" if len(near) == 1 else f"known keys: {', '.join(sorted(section))}"
        if kinds:
            hint = f"{key} belongs to kind {' and '.join(map(str, kinds))}"
        return [f"{where}: unknown key; {hint}"]
    if item["type"] == "missing":
        return [f"{where}: is required"]
    if item["type"] == "value_error":
        text = str(item["ctx"]["error"])
        return [f"{where}: {line}" if where else line for line in text.split("\n")]
    found = item.get("input")
    shown = f"; found {found!r}" if not isinstance(found, dict) else ""
    return [f"{where or 'recipe'}: {item['msg'][0].lower()}{item['msg'][1:]}{shown}"]


def _place(
    model: type[BaseModel], loc: Sequence[int | str]
) -> tuple[str, list[type[BaseModel]], list[type[BaseModel]]]:
    """What a recipe calls ``loc``, the sections that its last key may be of, and those of other kinds.

    pydantic puts the kind of a union into ``loc``, or its type behind a key of values, which are no keys.
    """
    keys: list[str] = []
    inner, others = [model], list[type[BaseModel]]()
    models, is_value = inner, False
    for part in loc:
        if is_value and isinstance(part, str):
            continue
        of_kind = [one for one in inner if kind_of(one) == part]
        if of_kind:
            inner, others = of_kind, [one for one in inner if one not in of_kind]
            continue
        keys.append(str(part))
        fields = fields_of(inner, str(part))
        stepped = [section for field in fields for section in sections_in(field)]
        models, is_value = inner, bool(fields) and not stepped
        if stepped:
            inner, others = stepped, []
    return ".".join(keys), models, others


def _key_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of the recipe with its section, such as ``loss.kd_ratio``."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for part in sections_in(field):
            yield from _key_paths(part, f"{prefix}{name}.")
