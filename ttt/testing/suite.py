"""The laws as a pytest class."""

from __future__ import annotations

from typing import Any

from ttt.laws import CHECKS, LAWS, Bench, MethodBrokenError
from ttt.plugins import Backbone, get_backbone

INNER_MODELS: dict[str, dict[str, Any]] = {
    "linear": {"layer_type": "linear"},
    "mlp": {"layer_type": "mlp"},
}


def laws(backbone: Backbone | str, **settings: Any) -> type:
    """Make a pytest class with a case for each law and inner model, and for each check of the plugin's other methods.

    Assign it to a name that starts with `Test`, so that pytest finds it.

    Args:
        backbone: the plugin, or its name.
        settings: settings of the `Bench`: `options`, `bare`, `ttt`, `tokens`, `batch_size`, `device`, `tolerance`.
    """
    import pytest

    plugin = get_backbone(backbone) if isinstance(backbone, str) else backbone
    own = settings.pop("ttt", None) or {}

    class TestLaws:
        """The laws for one backbone."""

        @pytest.mark.parametrize("inner_model", INNER_MODELS)
        @pytest.mark.parametrize("law", LAWS, ids=[f"law{n}-{check.__name__}" for n, check in LAWS.items()])
        def test_law(self, law: int, inner_model: str) -> None:
            bench = Bench(plugin, ttt={**INNER_MODELS[inner_model], **own}, **settings)
            LAWS[law](bench)

        @pytest.mark.parametrize("check", CHECKS)
        def test_plugin(self, check: str) -> None:
            try:
                CHECKS[check](Bench(plugin, ttt=own or None, **settings))
            except MethodBrokenError as error:
                if check != "presets" and error.method.endswith(".presets"):
                    pytest.skip(f"needs the presets, which fail by themselves: {error}")
                raise

    TestLaws.__doc__ = f"The laws for the backbone {plugin.name}."
    return TestLaws
