"""What a model with TTT remembers of itself, and how it becomes an instance of another class and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ttt.errors import UsageError
from ttt.eval.unchanged import weight_versions
from ttt.inject import Injection

_KEY = "_ttt_attached"

_MADE: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


@dataclass(eq=False)
class Attached:
    """TTT in a model, and what is needed to take it out again."""

    injection: Injection
    model: nn.Module
    """The model in which the sites are; inside PEFT's wrapper, if there is one."""
    kind: type[nn.Module]
    """Its own class."""
    backbone: Mapping[str, Any]
    """What adapter files say of the model."""
    flags: list[tuple[str, bool]]
    """The backbone's parameters by name, with the `requires_grad` that they had."""
    is_trainable: bool = True
    """Whether the adapters are to be trained."""
    replaced: dict[str, Tensor] = field(default_factory=dict)
    """What backbone parameters were before a file of trained ones was loaded, by name."""
    training: dict[str, Any] = field(default_factory=dict)
    """What adapter files say of its training."""
    loaded: Loaded | None = None
    """What it was loaded from."""
    wrapper: nn.Module | None = None
    """PEFT's wrapper, if it is a `TTTModel` too."""
    wrapper_kind: type[nn.Module] | None = None
    """The wrapper's own class."""
    guards: list[RemovableHandle] = field(default_factory=list)
    """Of the hooks that warn if a wrapper of PEFT's own loads its part alone, and keep it out of TTT."""

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The adapters' parameters by name in the model."""
        adapters = tuple(f"{name}." for name in self.injection.adapters)
        return {name: value for name, value in self.model.named_parameters() if name.startswith(adapters)}

    def train_adapters(self) -> None:
        """Thaw the adapters, which PEFT freezes with all that is not its own, if they are to be trained."""
        for parameter in self.adapter_parameters().values():
            parameter.requires_grad_(self.is_trainable)

    def trained_backbone(self) -> dict[str, nn.Parameter]:
        """The backbone's own parameters that are trained too, or were before; PEFT saves those that it trains."""
        own = set(map(id, self.adapter_parameters().values()))
        beside = beside_peft(self.model)
        return {
            name: value
            for name, value in self.model.named_parameters()
            if id(value) not in own and (name in self.replaced or (value.requires_grad and not beside))
        }


@dataclass(frozen=True)
class Loaded:
    """What holds of a loaded model as long as none of its weights is changed."""

    training: Mapping[str, Any]
    """How it was trained, as its file says."""
    figures: tuple[str, ...]
    """What was measured of it, as lines of a model card."""
    versions: Mapping[str, int]
    """How often each weight had been written to when it was loaded."""

    def is_still(self, model: nn.Module) -> bool:
        """Whether this is the model."""
        return weight_versions(model) == self.versions


def beside_peft(model: nn.Module) -> str | None:
    """What PEFT has put into a model, as "LORA"; None if nothing."""
    wrapped = any("base_layer" in module._modules for module in model.modules())
    configs = getattr(model, "peft_config", None)
    if not wrapped or not isinstance(configs, Mapping):
        return None
    kinds = {getattr(each.peft_type, "value", each.peft_type) for each in configs.values()}
    return "+".join(sorted(map(str, kinds)))


def attached_to(model: nn.Module) -> Attached:
    """What a model remembers of its TTT.

    Raises:
        UsageError: there is none: it was unloaded, or made in another way.
    """
    found = vars(model).get(_KEY)
    if found is None:
        raise UsageError(f"this {type(model).__name__} has no TTT in it; ttt.get_ttt_model(model) puts it in")
    return cast("Attached", found)


def is_attached(model: nn.Module) -> bool:
    """Whether a model has TTT by this module."""
    return _KEY in vars(model)


def attach(attached: Attached, mixin: type[nn.Module]) -> None:
    """Make its model an instance of a subclass of its own class that is a `mixin` too."""
    attached.model.__class__ = _with(attached.kind, mixin)
    vars(attached.model)[_KEY] = attached


def attach_wrapper(attached: Attached, wrapper: nn.Module, mixin: type[nn.Module]) -> None:
    """The same for PEFT's wrapper around it."""
    attached.wrapper, attached.wrapper_kind = wrapper, type(wrapper)
    wrapper.__class__ = _with(type(wrapper), mixin)


def detach(attached: Attached) -> None:
    """Undo both."""
    vars(attached.model).pop(_KEY, None)
    attached.model.__class__ = attached.kind
    if attached.wrapper is not None and attached.wrapper_kind is not None:
        attached.wrapper.__class__ = attached.wrapper_kind


def restore(attached: Attached) -> None:
    """Take the adapters out, and give the backbone's parameters their flags and values back."""
    attached.injection.eject()
    own = dict(attached.model.named_parameters())
    if not beside_peft(attached.model):  # what PEFT has frozen stays so
        for name, flag in attached.flags:
            if name in own:  # embeddings that were resized are another parameter, under their name
                own[name].requires_grad_(flag)
    with torch.no_grad():
        for name, value in attached.replaced.items():
            own[name].copy_(value)


def own_class(model: nn.Module) -> Any:
    """What a `TTTModel` was before."""
    kind: Any = type(model)
    return kind._ttt_own_class


def _with(kind: type[nn.Module], mixin: type[nn.Module]) -> type[nn.Module]:
    """Made once, and called like the class itself: transformers looks models up by the names of their classes.

    Python changes an object's class only to one of the same layout, which a subclass has whose first base is the class.
    So what the mixin defines is given to the subclass itself, or the model's own methods would come before it.
    """
    if (kind, mixin) not in _MADE:
        body: dict[str, Any] = {}
        for each in reversed(mixin.__mro__):
            if issubclass(each, nn.Module) and each is not nn.Module:
                body |= {name: value for name, value in vars(each).items() if name not in _OF_EVERY_CLASS}
        body |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        metaclass: Any = type(kind)
        made = metaclass(kind.__name__, (kind, mixin), {**body, "_ttt_own_class": kind})
        _MADE[kind, mixin] = cast("type[nn.Module]", made)
    return _MADE[kind, mixin]


_OF_EVERY_CLASS = frozenset(
    {"__new__", "__dict__", "__weakref__", "__annotations__", "__annotate__", "__firstlineno__"}
)
