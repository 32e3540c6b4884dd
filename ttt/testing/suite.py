"""The laws as a pytest class."""

from __future__ import annotations

from typing import Any

from ttt.backbone import Backbone
from ttt.plugins import get_backbone
from ttt.testing import checks
from ttt.testing.bench import Bench

LAWS = {
    1: checks.purity,
    2: checks.remat_invariance,
    3: checks.causality,
    4: checks.chunk_invariance,
    5: checks.stream_independence,
    6: checks.identity,
    7: checks.reversibility,
    8: checks.no_dead_field,
    9: checks.self_describing_files,
    10: checks.evidence,
}
"""The laws by number; each takes a `Bench`, returns what it measured, and raises `LawBrokenError`."""
INNER_MODELS: dict[str, dict[str, Any]] = {
    "linear": {"layer_type": "linear"},
    "mlp": {"layer_type": "mlp"},
}


def laws(backbone: Backbone | str, **settings: Any) -> type:
    """Make a pytest class with a case for each law and inner model, to be bound to a name `Test…`.

    Args:
        backbone: the plugin, or its name.
        settings: of the `Bench`: `options`, `ttt`, `tokens`, `batch_size`, `device`, `tolerance`.
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

    TestLaws.__doc__ = f"The laws for the backbone {plugin.name}."
    return TestLaws
