"""The base class of every section of a config, and the descriptions of fields.

A field's docstring is its description in the JSON schema, in the comments of `ttt init` and in the docs.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from pydantic import GetJsonSchemaHandler
    from pydantic_core import CoreSchema


class Section(BaseModel):
    """Base of every config section: unknown keys are errors, types are strict, values cannot be changed."""

    # For a fast start of `ttt check`, validators are built at the first validation, and descriptions are read when they
    # are first needed. (`use_attribute_docstrings` would parse every class when it is made.)
    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        defer_build=True,
        protected_namespaces=(),
    )

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The JSON schema, with the fields' docstrings as descriptions."""
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        for name, text in descriptions(cls).items():
            if name in properties:
                properties[name].setdefault("description", text)
        return schema


@functools.cache
def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """The description of each field of a model, by name: its `description`, or the docstring below it in the source."""
    found: dict[str, str] = {}
    for parent in reversed(model.__mro__):
        if issubclass(parent, BaseModel) and parent is not BaseModel:
            found |= _attribute_docstrings(parent)
    given = {name: info.description for name, info in model.model_fields.items() if info.description}
    return {name: text for name, text in (found | given).items() if name in model.model_fields}


def _attribute_docstrings(model: type[BaseModel]) -> dict[str, str]:
    """The strings below annotated names in a class's body, by name; empty if its source cannot be read."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(model)))
    except (OSError, TypeError, SyntaxError):
        return {}
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef))
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
