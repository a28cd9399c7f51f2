"""Recipe files as trees of plain values: YAML, ``extends``, overrides, and errors worth reading.

A recipe may begin with ``extends: NAME``; it is then laid over that recipe, key by key (lists are replaced).
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from shared.errors import RecipeError

CHOICE = "policy"  # the one key whose mapping is a tagged union
RECIPE_FOLDER = Path(__file__).parent
Model = TypeVar("Model", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML whose scalars are those of YAML 1.2's core schema, and whose keys are unique."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise yaml.YAMLError(f"key {key!r} stands twice in the mapping that begins in line {line}")
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Decimal, as in YAML 1.2; 1.1 reads 010 as 8."""
        return int(self.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in [
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
]:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def read_recipe_tree(name_or_path: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """The recipe's tree with ``extends`` and overrides applied, and what to call it in messages."""
    path = _find(name_or_path)
    tree = _read(path.resolve(), seen=())
    apply_overrides(tree, overrides)
    return tree, f"recipe {path.name}"


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Lays each ``section.key=value`` over the tree, in place; values are YAML.

    Raises   RecipeError  when one has another form
    """
    for override in overrides:
        _apply(tree, override)


def validate_tree(model: type[Model], tree: dict[str, Any], *, origin: str) -> Model:
    """The tree as a ``model``.

    Raises   RecipeError  with one line for each problem.
    """
    try:
        return model.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        problems = [line for item in error.errors() for line in _explain(item, model)]
    except (TypeError, ValueError) as error:
        problems = [str(error)]
    raise RecipeError("\n".join(f"{origin}, {problem}" for problem in problems))


def _find(name_or_path: str | Path) -> Path:
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        if path.is_file():
            return path
        raise RecipeError(f"recipe {path}: there is no such file")
    packaged = RECIPE_FOLDER / f"{name_or_path}.yaml"
    if packaged.is_file():
        return packaged
    near = difflib.get_close_matches(str(name_or_path), recipe_names(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(recipe_names())}."
    raise RecipeError(
        f"recipe {name_or_path!r}: unknown; {hint} A recipe of your own is given as a .yaml file."
    )


def _read(path: Path, *, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise RecipeError(f"recipe {path.name}: extends itself by way of {seen[-1].name}")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(f"recipe {path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"recipe {path}: found {type(tree).__name__}, needs a mapping of sections")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise RecipeError(f"recipe {path}: extends needs the name or the file of one recipe")
    beside = (path.parent / base).resolve()
    base_path = beside if beside.suffix in {".yaml", ".yml"} and beside.is_file() else _find(base)
    return _merge(_read(base_path, seen=(*seen, path)), tree)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        mine = merged.get(key)
        if isinstance(value, dict) and isinstance(mine, dict):
            # A policy is one choice: keys of another kind of policy must not shine through.
            other_choice = key == CHOICE and "kind" in value and value["kind"] != mine.get("kind")
            merged[key] = value if other_choice else _merge(mine, value)
        else:
            merged[key] = value
    return merged


def _apply(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {override!r}: needs the form section.key=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override!r}: the value is not YAML") from error
    node: dict[str, Any] = {keys[-1]: value}
    for key in reversed(keys[:-1]):
        node = {key: node}
    merged = _merge(tree, node)
    tree.clear()
    tree.update(merged)


def _explain(item: Any, model: type[BaseModel]) -> list[str]:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        key = str(item["loc"][-1])
        section = _section_keys(model, item["loc"][:-1])
        near = difflib.get_close_matches(key, section, n=1) or [
            path for path in _key_paths(model) if path.rpartition(".")[2] == key
        ]
        hint = f"did you mean {near[0]!r}?" if len(near) == 1 else f"known keys: {', '.join(sorted(section))}"
        return [f"{where}: unknown key; {hint}"]
    if item["type"] == "missing":
        return [f"{where}: is required"]
    if item["type"] == "value_error":
        text = str(item["ctx"]["error"])
        return [f"{where}: {line}" if where else line for line in text.split("\n")]
    found = item.get("input")
    shown = f"; found {found!r}" if not isinstance(found, dict) else ""
    return [f"{where or 'recipe'}: {item['msg'][0].lower()}{item['msg'][1:]}{shown}"]


def _section_keys(model: type[BaseModel], loc: Sequence[int | str]) -> set[str]:
    """Keys known at ``loc``; pydantic puts the tag of a union into it, which is no field."""
    models = [model]
    for part in loc:
        stepped = [m for parent in models for m in _models_in(parent, part)]
        models = stepped or models
    return {name for m in models for name in m.model_fields}


def _key_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of the recipe with its section, such as ``loss.kd_ratio``."""
    for name in model.model_fields:
        yield prefix + name
        for part in _models_in(model, name):
            yield from _key_paths(part, f"{prefix}{name}.")


def _models_in(parent: type[BaseModel], part: int | str) -> Iterator[type[BaseModel]]:
    field = parent.model_fields.get(str(part))
    if field is not None:
        pending = [field.annotation]
        while pending:
            kind = pending.pop()
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield kind
            pending.extend(get_args(kind))
