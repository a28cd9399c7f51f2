"""The base of a recipe's sections, and questions to their types: what may stand at a key, what a key shuts out.

    class OptimizationConfig(Section):
        alternatives = (("max_steps", "num_epochs"),)     # exactly one; a new one replaces the other

The docstring under a field is its line in ``docs/recipes.md``.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.fields import FieldInfo


class Section(BaseModel):
    """Immutable, and an unknown key is an error.

    alternatives  groups of keys, of each of which exactly one is given
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = ()

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        for group in self.alternatives:
            if sum(getattr(self, name) is not None for name in group) != 1:
                raise ValueError(f"give either {' or '.join(group)}")
        return self


def fields_of(models: Iterable[type[BaseModel]], key: str) -> list[FieldInfo]:
    """The fields called ``key``; several where the models are the choices of a union."""
    return [model.model_fields[key] for model in models if key in model.model_fields]


def sections_in(field: FieldInfo) -> Iterator[type[BaseModel]]:
    """The sections that a field may hold, alone, in a list, or as choices of a union."""
    pending: list[Any] = [field.annotation]
    while pending:
        kind = pending.pop(0)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield kind
        pending.extend(get_args(kind))


def default_tag(fields: Iterable[FieldInfo]) -> dict[str, str]:
    """What says of which kind of a union a field's default is: ``{"kind": "threshold"}``; else nothing."""
    return {
        field.discriminator: getattr(field.default, field.discriminator)
        for field in fields
        if isinstance(field.discriminator, str) and isinstance(field.default, BaseModel)
    }


def kind_of(section: type[BaseModel]) -> str | None:
    """Of a choice of a union: what its ``kind`` says."""
    return section.model_fields["kind"].default if "kind" in section.model_fields else None


def takes_a_list(field: FieldInfo) -> bool:
    """Whether any number of values may stand there, and no single one."""
    kinds = list(_choices(field.annotation))
    return bool(kinds) and all(get_origin(kind) is tuple and Ellipsis in get_args(kind) for kind in kinds)


def shut_out(models: Iterable[type[BaseModel]], keys: Iterable[str]) -> set[str]:
    """The alternatives to these keys."""
    given = set(keys)
    groups = [set(group) for model in models for group in getattr(model, "alternatives", ())]
    return {name for group in groups if group & given for name in group - given}


def _choices(kind: Any) -> Iterator[Any]:
    """The types that a union is of, but null."""
    if get_origin(kind) is Annotated:
        yield from _choices(get_args(kind)[0])
    elif get_origin(kind) in (Union, types.UnionType):
        for part in get_args(kind):
            yield from _choices(part)
    elif kind is not type(None):
        yield kind
