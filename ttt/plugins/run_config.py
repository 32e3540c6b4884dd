"""The config of a run with a plugin's own options and defaults in it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field, create_model

from ttt.config.evaluation import EvalConfig, ScoreOptions
from ttt.config.schema import BackboneOptions, DataOptions, RunConfig
from ttt.dotted import dotted
from ttt.plugins.backbone import Backbone
from ttt.plugins.capabilities import Scoring
from ttt.plugins.capability_base import has_capability
from ttt.plugins.declared import require_options

_OF_THE_INNER_MODEL = ("mlp_layers", "mlp_expansion_factor", "mlp_hidden_dims", "base_lr")


@functools.cache
def _with_options(
    options: type[BackboneOptions], data_options: type[DataOptions], score_options: type[ScoreOptions], name: str
) -> type[RunConfig]:
    score: Any = (score_options, Field(default_factory=score_options))
    evaluation = create_model("EvalConfig", __base__=EvalConfig, __doc__=EvalConfig.__doc__, score=score)
    return create_model(
        f"{name.title().replace('-', '')}RunConfig",
        __base__=RunConfig,
        __doc__=RunConfig.__doc__,
        backbone=(options, ...),
        data=(data_options, Field(default_factory=dict, validate_default=True)),
        eval=(evaluation, Field(default_factory=evaluation)),
    )


def run_config_model(backbone: Backbone) -> type[RunConfig]:
    """`RunConfig` whose sections `backbone`, `data` and `eval.score` have a plugin's options; one class per backbone.

    Raises:
        PluginError: the plugin's options are not pydantic models of the kind asked for.
    """
    require_options(backbone)
    scored = backbone.score_options if has_capability(backbone, Scoring) else ScoreOptions
    return _with_options(backbone.options, backbone.data_options, scored, backbone.name)


def with_defaults(ttt: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The `ttt` section with the backbone's defaults under it, unless the user starts from a preset.

    A default that belongs to another inner model than the user's is left out.
    """
    if "preset" in ttt:
        return dict(ttt)
    usual = dict(defaults)
    if ttt.get("layer_type", usual.get("layer_type", "linear")) != usual.get("layer_type", "linear"):
        usual = {key: value for key, value in usual.items() if key not in _OF_THE_INNER_MODEL}
    return {**usual, **ttt}


def default_values(model: type[BaseModel], above: str = "") -> dict[str, Any]:
    """The defaults of a config's fields by dotted name, as JSON has them; of one that is required there is none.

    A config that was written before a key was added did what the key's default does.
    """
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        key, inner = f"{above}{name}", field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found.update(default_values(inner, f"{key}."))
        elif not field.is_required():
            found.update(dotted({key: _plain(field.get_default(call_default_factory=True))}))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return list(value) if isinstance(value, tuple) else value
