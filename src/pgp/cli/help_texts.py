"""Help texts of flags, from the docstrings of fields, wrapped to the width of the terminal."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
from typing import Any, get_type_hints

from tyro.constructors import (
    MISSING_NONPROP,
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

REGISTRY = ConstructorRegistry()
"""For `tyro.cli`, which by itself would keep the line breaks of docstrings."""


@REGISTRY.struct_rule
def with_help_texts(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Return the fields of a dataclass of pgp, each with its docstring as one paragraph; None for other types."""
    kind = info.type
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__.startswith("pgp.")):
        return None
    hints, texts = get_type_hints(kind, include_extras=True), field_texts(kind)
    given = info.default if isinstance(info.default, kind) else None
    fields = [
        StructFieldSpec(
            field.name,
            hints[field.name],
            _default(field) if given is None else getattr(given, field.name),
            texts.get(field.name),
        )
        for field in dataclasses.fields(kind)
        if field.init
    ]
    return StructConstructorSpec(kind, tuple(fields))


@functools.cache
def field_texts(kind: type) -> dict[str, str]:
    """Return the docstring of each field of a dataclass, as one paragraph."""
    texts: dict[str, str] = {}
    names = {field.name for field in dataclasses.fields(kind)}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if field.target.id not in names:
                continue
            if (
                isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                texts[field.target.id] = " ".join(text.value.value.split())
    return texts


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return MISSING_NONPROP if field.default_factory is dataclasses.MISSING else field.default_factory()
