"""`TTTModel`: what a model with TTT can do beside what its own class can."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from ttt.adapter import gates_closed
from ttt.config import TTTConfig
from ttt.errors import UsageError
from ttt.facade.attached import Attached, attach, attach_wrapper, attached_to, detach, is_attached, own_class, restore
from ttt.facade.counting import count, trainable_in_words
from ttt.facade.hub import fetched, pushed
from ttt.facade.loading import holds_ttt, load, load_into, place_of, require_nothing_attached
from ttt.facade.options import SaveOptions, read_options
from ttt.facade.peft_configs import keep_out_of_ttt, release, wrapped_by_peft
from ttt.facade.recognising import inner_model, is_peft_model, recognise, require_peft_outside
from ttt.facade.saving import BESIDE_PEFT, as_path, save
from ttt.inject import Injection
from ttt.plugins import Site


class TTTModel(nn.Module):
    """A model with TTT in it, made by `ttt.get_ttt_model` or loaded by `TTTModel.from_pretrained`.

    It is an instance of its own class as well, with the same parameters under the same names, so whatever works with
    that works with it: `generate`, `transformers.Trainer`, `accelerate`, `torch.compile`.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuse to be made from nothing."""
        if cls in (TTTModel, TTTPeftModel):
            raise UsageError("a TTTModel is made by ttt.get_ttt_model(model, config) or TTTModel.from_pretrained")
        return super().__new__(cls)

    @property
    def injection(self) -> Injection:
        """TTT in the model: its adapters and sites."""
        return self._attached().injection

    @property
    def ttt_config(self) -> TTTConfig:
        """The settings of its TTT."""
        return self._attached().injection.config

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many values are trained, and how many there are."""
        return count(self.parameters())

    def print_trainable_parameters(self) -> None:
        """Print how much is trained, what that is, and that the rest is frozen."""
        attached = self._attached()
        adapters = attached.adapter_parameters().values()
        print(trainable_in_words(self, adapters, len(attached.injection.adapters)))

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run with the gates closed: bit for bit the model that `get_ttt_model` was given, LoRA included.

        Backbone parameters that were trained along keep their values. A cache that was filled before is refused inside,
        and one that is filled inside is refused after it.
        """
        self._attached()
        with gates_closed(self):
            yield

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the adapter's files and a model card, and none of the backbone's frozen weights.

        Args:
            save_directory: made if need be.
            options: `is_main_process`, `state_dict`, `push_to_hub` and what goes with that, as `transformers` has them.
                What says there how a backbone's weights are written (`save_function`, `max_shard_size`) has no effect.

        Raises:
            UsageError: an option is unknown or cannot be honoured.
            EnvironmentProblem: the disk is full or cannot be written.
        """
        attached, folder = self._attached(), as_path(save_directory)
        chosen = read_options(options, beside_peft=False)
        require_peft_outside(self)
        save(attached, folder, chosen)
        self._push_if_asked(folder, chosen)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Write the adapter's files and its model card into a repository of the hub; returns the address.

        Args:
            repo_id: of the repository, which is made if need be.
            commit_message: of the commit.
            commit_description: of the commit.
            private: whether a new repository is private.
            token: as `hf auth login` keeps one, if none is given.
            revision: branch to push to.
            create_pr: open a pull request instead.

        Raises:
            EnvironmentProblem: the hub cannot be reached, or does not take it.
        """
        options = {
            "commit_message": commit_message,
            "commit_description": commit_description,
            "private": private,
            "token": token,
            "revision": revision,
            "create_pr": create_pr,
        }
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return pushed(Path(folder), repo_id, options)

    @classmethod
    def from_pretrained(
        cls,
        base: nn.Module,
        name: str | Path,
        *,
        revision: str | None = None,
        is_trainable: bool = False,
        sites: Sequence[Site] | None = None,
        causal: bool | None = None,
    ) -> Any:
        """Put the TTT of an adapter's files into a model, in place; the model is returned.

        If PEFT's files are in the folder too, and the model has no LoRA yet, they are loaded first, and PEFT's wrapper
        is returned.

        Args:
            base: the backbone that it was trained on, plain.
            name: folder of `save_pretrained`, of an adapter or a run; or the name of a repository on the hub.
            revision: branch, tag or commit there.
            is_trainable: train it further; else everything is frozen.
            sites: as `get_ttt_model` has them.
            causal: as `get_ttt_model` has it.

        Raises:
            AdapterMismatchError: it belongs to another model; the message names each difference.
            AdapterFileError: it is missing or damaged.
            EnvironmentProblem: the hub cannot be reached, or has no such repository.
        """
        model = require_nothing_attached(base)
        folder, of_peft = place_of(fetched(name, revision))
        found = recognise(inner_model(model), sites, causal)
        if of_peft is None or is_peft_model(model):
            return as_ttt_model(load(model, folder, found, is_trainable=is_trainable), model)
        return _loaded_with_peft(model, folder, of_peft, is_trainable=is_trainable)

    def unload(self) -> Any:
        """Take TTT out again; returns the model as it was before, of its own class."""
        attached = self._attached()
        release(attached)
        detach(attached)
        restore(attached)
        return self

    @property
    def _keys_to_ignore_on_save(self) -> list[str]:
        """Names of a state dict that are not saved; a `Trainer` that resumes warns of others that it misses."""
        attached = self._attached()
        saved = attached.injection.state_dict().keys() | attached.trained_backbone().keys()
        return [name for name in self.state_dict() if name not in saved]

    def _attached(self) -> Attached:
        return attached_to(inner_model(self))

    def _push_if_asked(self, folder: Path, chosen: SaveOptions) -> None:
        if chosen.push_to_hub and chosen.is_main_process:
            pushing = dict(chosen.pushing)
            pushed(folder, pushing.pop("repo_id", None) or folder.resolve().name, pushing)

    def __setattr__(self, name: str, value: Any) -> None:
        own_class(self).__setattr__(self, name, value)
        if name == "peft_config" and is_attached(self):
            wrapped_by_peft(attached_to(self), value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # For `copy`. A `__deepcopy__` would be found through PEFT's wrapper, and copy this model in its place.
        return _made_of, (_Copied(type(self)),), vars(self)


class _Copied:
    """The class of a copy; it can be copied, but not pickled, for it is made anew in each process."""

    def __init__(self, kind: type[nn.Module]) -> None:
        self.kind = kind

    def __deepcopy__(self, memo: dict[int, Any]) -> _Copied:
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UsageError(
            f"a {self.kind.__name__} with TTT is not pickled; write model.save_pretrained(folder), or keep "
            f"model.state_dict()"
        )


def _made_of(copied: _Copied) -> nn.Module:
    return copied.kind.__new__(copied.kind)


class TTTPeftModel(TTTModel):
    """PEFT's wrapper around a model with TTT: both are trained, saved and loaded."""

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write PEFT's files as PEFT does, and TTT's in the folder `ttt` among them; see `TTTModel.save_pretrained`."""
        attached, folder = self._attached(), as_path(save_directory)
        chosen = read_options(options, beside_peft=True)
        if BESIDE_PEFT in getattr(self, "peft_config", {}):
            raise UsageError(f"PEFT's adapter {BESIDE_PEFT!r} is saved where TTT's files go; give it another name")
        own_class(self).save_pretrained(
            self, str(folder), is_main_process=chosen.is_main_process, state_dict=chosen.state_dict, **chosen.of_peft
        )
        save(attached, folder / BESIDE_PEFT, chosen)
        self._push_if_asked(folder, chosen)

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **options: Any) -> Any:
        """Load PEFT's adapter and, if it is there, the TTT that was saved with it; or a folder of TTT's alone."""
        attached, folder = self._attached(), Path(model_id)
        if holds_ttt(folder):  # a Trainer takes every folder below for an adapter of PEFT
            return load_into(attached, folder)
        result = self._keeping_ttt("load_adapter", model_id, adapter_name, *args, **options)
        if holds_ttt(folder / BESIDE_PEFT):
            load_into(attached, folder / BESIDE_PEFT)
        return result

    def add_adapter(self, *args: Any, **options: Any) -> Any:
        """Add an adapter of PEFT, which would freeze TTT."""
        return self._keeping_ttt("add_adapter", *args, **options)

    def _keeping_ttt(self, method: str, *args: Any, **options: Any) -> Any:
        attached = self._attached()
        flags = [(each, each.requires_grad) for each in attached.adapter_parameters().values()]
        try:
            return getattr(own_class(self), method)(self, *args, **options)
        finally:
            keep_out_of_ttt(attached)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


def as_ttt_model(attached: Attached, given: nn.Module) -> Any:
    """Make a model a `TTTModel`, and PEFT's wrapper too if that is what was given; if that fails, TTT is taken out."""
    try:
        attach(attached, TTTModel)
        return given if given is attached.model else wrapper_as_ttt_model(attached, given)
    except BaseException:
        detach(attached)
        restore(attached)
        raise


def wrapper_as_ttt_model(attached: Attached, wrapper: nn.Module) -> Any:
    """Make PEFT's wrapper a `TTTModel`; the model inside is one."""
    release(attached)  # the wrapper saves both itself
    keep_out_of_ttt(attached)
    attach_wrapper(attached, wrapper, TTTPeftModel)
    attached.train_adapters()
    return wrapper


def _loaded_with_peft(base: nn.Module, folder: Path, of_peft: Path, *, is_trainable: bool) -> Any:
    from peft import PeftModel

    wrapper = PeftModel.from_pretrained(base, str(of_peft), is_trainable=is_trainable)
    try:
        found = recognise(inner_model(wrapper), None, None)
        return as_ttt_model(load(wrapper, folder, found, is_trainable=is_trainable), wrapper)
    except BaseException:
        wrapper.unload()
        raise
