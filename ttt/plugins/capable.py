"""Asking a backbone for a capability. If it lacks it, the error names the installed backbones that have it."""

from __future__ import annotations

from ttt.errors import UsageError
from ttt.plugins.backbone import Backbone
from ttt.plugins.capabilities import CAPABILITIES
from ttt.plugins.capability_base import Capability, CapabilityT, has_capability
from ttt.plugins.discovery import discover
from ttt.words import first_few


def capability(backbone: Backbone, kind: type[CapabilityT]) -> CapabilityT:
    """The backbone, typed as the capability: `capability(backbone, Sampling).sample(…)`.

    Raises:
        UsageError: the backbone lacks it; the message says which installed backbones have it.
    """
    if has_capability(backbone, kind):
        return backbone
    words = CAPABILITIES.get(kind)
    lacking = kind.__name__ if words is None else words.lacking
    raise UsageError(f"the backbone {backbone.name} has no {lacking}; {_who_has(kind)}")


def _who_has(kind: type[Capability]) -> str:
    able = [plugin.name for plugin in discover() if has_capability(plugin.backbone, kind)]
    if not able:
        return "no installed backbone has it"
    return f"of the installed backbones {first_few(able, 5)} {'has' if len(able) == 1 else 'have'} it"
