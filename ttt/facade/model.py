"""`TTTModel`: what a model with TTT can do beside what its own class can."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from ttt.adapter import gates_closed
from ttt.config import TTTConfig
from ttt.errors import UsageError
from ttt.facade.attached import Attached, attach, attached_to, detach
from ttt.facade.counting import count, trainable_in_words
from ttt.facade.loading import load
from ttt.facade.recognising import inner_model
from ttt.facade.saving import save
from ttt.inject import Injection


class TTTModel(nn.Module):
    """A model with TTT in it, made by `ttt.get_ttt_model` or loaded by `TTTModel.from_pretrained`.

    It is an instance of its own class as well, with the same parameters under the same names, so whatever works with
    that works with it: `generate`, `transformers.Trainer`, `accelerate`, `torch.compile`.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuse to be made from nothing."""
        if cls is TTTModel:
            raise UsageError("a TTTModel is made by ttt.get_ttt_model(model, config) or TTTModel.from_pretrained")
        return super().__new__(cls)

    @property
    def injection(self) -> Injection:
        """TTT in the model: its adapters and sites."""
        return self._attached().injection

    @property
    def ttt_config(self) -> TTTConfig:
        """The settings of its TTT."""
        return self.injection.config

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many values are trained, and how many there are."""
        return count(self.parameters())

    def print_trainable_parameters(self) -> None:
        """Print how much is trained, what that is, and that the rest is frozen."""
        adapters = self._attached().adapter_parameters().values()
        print(trainable_in_words(self, adapters, len(self.injection.adapters)))

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run with the gates closed: bit for bit the model that `get_ttt_model` was given.

        What PEFT has put into that model stays. A cache that was filled before is refused inside, and one that is
        filled inside is refused after it.
        """
        self._attached()
        with gates_closed(self):
            yield

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the adapter's files, and none of the backbone's weights; see `ttt.facade.saving.save`."""
        save(self._attached(), save_directory, options)

    @classmethod
    def from_pretrained(
        cls, base: nn.Module, name: str | Path, *, revision: str | None = None, is_trainable: bool = False
    ) -> Any:
        """Put the TTT of an adapter's files into a model, in place; the model is returned.

        Args:
            base: the backbone that it was trained on, plain.
            name: folder of `save_pretrained`, of an adapter or a run; or the id of a repository on the hub.
            revision: branch, tag or commit there.
            is_trainable: train it further; else everything is frozen.

        Raises:
            AdapterMismatchError: it belongs to another model; the message names each difference.
            AdapterFileError: it is missing or damaged.
            EnvironmentProblem: the hub cannot be reached, or has no such repository.
        """
        attached = load(base, name, revision=revision, is_trainable=is_trainable)
        return as_ttt_model(attached)

    def unload(self) -> Any:
        """Take TTT out again; returns the model as it was before, of its own class."""
        return unload(self._attached())

    def _attached(self) -> Attached:
        return attached_to(inner_model(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__setstate__(copy.deepcopy(vars(self), memo))
        return made

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UsageError(
            f"a {type(self).__name__} with TTT is not pickled; write model.save_pretrained(folder), or keep "
            f"model.state_dict()"
        )


def as_ttt_model(attached: Attached) -> Any:
    """Make the model of an injection a `TTTModel`; if that fails, TTT is taken out again."""
    try:
        attach(attached.model, attached, TTTModel)
    except BaseException:
        restore(attached)
        raise
    return attached.model


def unload(attached: Attached) -> nn.Module:
    """Take TTT out of a model, which becomes what it was."""
    detach(attached.model)
    restore(attached)
    return attached.model


def restore(attached: Attached) -> None:
    """Take the adapters out and give the backbone's parameters their flags and values back."""
    attached.injection.eject()
    for parameter, flag in attached.flags:
        parameter.requires_grad_(flag)
    put_back(attached.model, attached.before)


def put_back(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Copy values into parameters of a model."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
