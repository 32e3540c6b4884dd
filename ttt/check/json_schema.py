"""The JSON schema of configs, plugins' options included, for editors: completion, hover texts, errors while typing.

The schema describes each key by itself. How keys must fit together, only `ttt check` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from ttt.config.schema import RunConfig, TTTConfig
from ttt.errors import PluginError
from ttt.plugins import run_config_model
from ttt.plugins.run_config import with_defaults

if TYPE_CHECKING:
    from ttt.plugins import Backbone

SCHEMA_FILE = "ttt.schema.json"
"""The name of the schema's file. Configs refer to it in their own folder."""
EDITOR_LINE = f"# yaml-language-server: $schema={SCHEMA_FILE}\n"
"""The first line of a config, by which editors with yaml-language-server find the schema."""
COMMENT = "Made by `ttt schema`, which makes it anew when plugins come or go."
_NULL = {"type": "null"}
_KEYWORDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


class _Generator(GenerateJsonSchema):
    """Leaves out titles, which would only repeat a key's name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Return False for every field."""
        return False


def json_schema(backbones: Sequence[Backbone]) -> dict[str, Any]:
    """The schema of a config for any of the backbones. If there are several, their options are alternatives.

    Args:
        backbones: at least one.

    Raises:
        PluginError: a plugin's options have no JSON schema.
    """
    models = []
    for backbone in backbones:
        try:
            models.append(run_config_model(backbone))
            models_json_schema([(models[-1], "validation")])
        except PluginError:
            raise
        except Exception as error:  # a third party's types may raise anything
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            raise PluginError(f"the options of the plugin {backbone.name} have no JSON schema: {cause}") from error
    references, schema = models_json_schema([(model, "validation") for model in models], schema_generator=_Generator)
    definitions: dict[str, Any] = _in_keywords(schema["$defs"])
    runs = [definitions.pop(_target(references[model, "validation"])) for model in models]
    options = {_target(run["properties"]["backbone"]) for run in runs}
    for backbone, run in zip(backbones, runs, strict=True):
        name = f"backbone {backbone.name}"  # two backbones may have the same options
        definitions[name] = _named(backbone, definitions[_target(run["properties"]["backbone"])])
        run["properties"]["backbone"] = run["properties"]["backbone"] | {"$ref": f"#/$defs/{name}"}
    for name in options:
        del definitions[name]
    _set_defaults(definitions["TTTConfig"]["properties"], backbones)
    properties = {key: _property(key, [run["properties"][key] for run in runs]) for key in RunConfig.model_fields}
    whole: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": COMMENT,
        "title": "A config of ttt",
        "description": "A training run with TTT layers: `ttt check` it, then `ttt train` it.",
        "type": "object",
        "properties": properties,
        "required": ["backbone"],
        "additionalProperties": False,
    }
    if len(runs) > 1:
        whole["allOf"] = [
            _data_of(backbone, run["properties"]["data"]) for backbone, run in zip(backbones, runs, strict=True)
        ]
    return whole | {"$defs": definitions}


def _in_keywords(value: Any) -> Any:
    """The schema with bounds in JSON Schema's keywords, where pydantic writes its own."""
    if isinstance(value, Mapping):
        bounded = value.get("type") in ("integer", "number")
        return {_KEYWORDS.get(key, key) if bounded else key: _in_keywords(item) for key, item in value.items()}
    return [_in_keywords(item) for item in value] if isinstance(value, list) else value


def _target(reference: Mapping[str, Any]) -> str:
    """The name of the definition that a property refers to."""
    return str(reference["$ref"]).rpartition("/")[2]


def _named(backbone: Backbone, options: Mapping[str, Any]) -> dict[str, Any]:
    """A plugin's options, with `name` required and its own name as the only value."""
    name = {"const": backbone.name, "description": options["properties"]["name"].get("description", "")}
    required = ["name", *(key for key in options.get("required", []) if key != "name")]
    return {**options, "properties": {**options["properties"], "name": name}, "required": required}


def _set_defaults(properties: dict[str, Any], backbones: Sequence[Backbone]) -> None:
    """Give each key of the `ttt` section its default for these backbones; no default if they differ."""
    resolved = [
        TTTConfig.model_validate(with_defaults({}, backbone.ttt_defaults)).model_dump(mode="json")
        for backbone in backbones
    ]
    for key, described in properties.items():
        described.pop("default", None)
        if all(values[key] == resolved[0][key] for values in resolved):
            described["default"] = resolved[0][key]


def _property(key: str, alternatives: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The schema of one top-level key. A section may also be null: all its keys commented out."""
    described = {"description": alternatives[0].get("description", "")}
    if key in ("adapter", "run_dir"):
        return dict(alternatives[0])
    references = [{"$ref": f"#/$defs/{_target(each)}"} for each in alternatives]
    distinct = [reference for at, reference in enumerate(references) if reference not in references[:at]]
    if key == "backbone":
        return described | (distinct[0] if len(distinct) == 1 else {"anyOf": distinct})
    return described | {"anyOf": [*distinct, _NULL]}


def _data_of(backbone: Backbone, data: Mapping[str, Any]) -> dict[str, Any]:
    """The condition that a config with this backbone has this backbone's `data` section."""
    named = {"properties": {"backbone": {"properties": {"name": {"const": backbone.name}}, "required": ["name"]}}}
    section = {"anyOf": [{"$ref": f"#/$defs/{_target(data)}"}, _NULL]}
    return {"if": {**named, "required": ["backbone"]}, "then": {"properties": {"data": section}}}
