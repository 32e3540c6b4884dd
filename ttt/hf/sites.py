"""The sites of a causal language model: the output of each decoder layer."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ttt.adapter import TTTAdapter
from ttt.errors import InjectionError, UsageError
from ttt.hf.passes import Pass, Passes
from ttt.hf.states import find_cache, read_on, stateful
from ttt.hf.structure import Decoder, cache_index, describe_call, find_decoder, own_class
from ttt.plugins.site import Site


class _Made(nn.Module):
    """What the classes made here have in common."""

    ttt_class: type[nn.Module]
    """The class of which this one is a subclass with TTT."""
    ttt_mixin: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so that a pickle cannot name it.
        return _restored, (self.ttt_class, self.ttt_mixin), vars(self)


class _DecoderWithTTT(_Made):
    """Tells the layers of each forward pass which tokens count."""

    ttt_passes: Passes

    # Compiled, it would be one frame with a context around a break; so the frames below it are compiled instead.
    @torch.compiler.disable(recursive=False)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.ttt_passes.opened(args, kwargs):
            return super().forward(*args, **kwargs)


class _LayerWithTTT(_Made):
    """Applies TTT to the tokens that a decoder layer returns."""

    ttt: TTTAdapter
    ttt_passes: Passes
    ttt_cache_index: int

    @torch.compiler.disable(recursive=False)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # The pass is handed on as an argument: if the layer is recomputed in backward, it is given the same again.
        return super().__call__(*args, ttt_pass=self.ttt_passes.required(), **kwargs)

    def forward(self, *args: Any, ttt_pass: Pass, **kwargs: Any) -> Any:
        cache = self._cache(args, kwargs, ttt_pass)
        out = super().forward(*args, **kwargs)
        hidden = out[0] if isinstance(out, tuple) else out
        self._require_tokens(hidden, ttt_pass)
        if cache is None or self.ttt.gate.closed:
            hidden = self.ttt(hidden, mask=ttt_pass.mask)
        else:
            hidden = self._read_on(hidden, cache, ttt_pass)
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    def _cache(self, args: tuple[Any, ...], kwargs: dict[str, Any], ttt_pass: Pass) -> Cache | None:
        cache = find_cache(args, kwargs)
        if ttt_pass.cache is not None and cache is not ttt_pass.cache:
            given = "no cache" if cache is None else "another cache"
            raise UsageError(
                f"the model was given a cache, but its {own_class(self).__name__} was given {given}, so that TTT would "
                f"lose its state (it was given {describe_call(args, kwargs)}); under activation checkpointing write "
                f"use_cache=False"
            )
        return cache

    def _require_tokens(self, hidden: Any, ttt_pass: Pass) -> None:
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[:2] != ttt_pass.shape:
            returned = list(hidden.shape) if isinstance(hidden, Tensor) else f"a {type(hidden).__name__}"
            raise UsageError(
                f"{own_class(self).__name__} returned {returned} where TTT needs its tokens, {list(ttt_pass.shape)} "
                f"and a width; the layers of such a model are not understood"
            )

    # What a compiled function returns may be overwritten by its next call, and states are kept.
    @torch.compiler.disable
    def _read_on(self, hidden: Tensor, cache: Cache, ttt_pass: Pass) -> Tensor:
        states = stateful(cache, ttt_pass.owner).ttt_states
        known = states.get(self.ttt_cache_index)
        read = 0 if known is None else known.positions
        if read != ttt_pass.past:
            raise UsageError(
                f"the cache holds {ttt_pass.past} tokens, of which the TTT layer {self.ttt_cache_index} has read "
                f"{read}: it was filled with the gates closed, by another model or prefix tuning, or copied without "
                f"its TTT states; start from a new cache"
            )
        port = self.ttt.port
        start = (port.incoming if port else None) if known is None else known.current_state(self.ttt)
        hidden, states[self.ttt_cache_index] = read_on(self.ttt, hidden, ttt_pass.mask, start, read)
        after = states[self.ttt_cache_index].state
        if port is not None and after is not None:
            port.outgoing = after.detach()
        return hidden


_MADE: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def _with_ttt(kind: type[nn.Module], mixin: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a class of modules, made once, so that two layers of one class stay of one class."""
    if (kind, mixin) not in _MADE:
        # Whoever asks for the signature of a forward is told the model's own.
        own: dict[str, Any] = {"forward": functools.wraps(kind.forward)(_calling(mixin.forward))}
        own |= {"__module__": kind.__module__, "ttt_class": kind, "ttt_mixin": mixin}
        _MADE[kind, mixin] = cast("type[nn.Module]", type(f"{kind.__name__}WithTTT", (mixin, kind), own))
    return _MADE[kind, mixin]


def _calling(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return call


def _restored(kind: type[nn.Module], mixin: type[nn.Module]) -> nn.Module:
    made = _with_ttt(kind, mixin)
    return made.__new__(made)


@dataclass(frozen=True, eq=False)
class DecoderSite(Site):
    """The output of a decoder layer. With the first adapter, the decoder too becomes one that knows of TTT."""

    decoder: nn.Module = field(kw_only=True)
    """What calls the layer."""

    def attach(self, adapter: nn.Module) -> None:
        """Make the layer call the adapter.

        Raises:
            InjectionError: something has replaced the forward of one object, so that TTT would never be called.
        """
        with _unhooked(self.module, self.path), _unhooked(self.decoder, self.path):
            passes = vars(self.decoder).get("ttt_passes")
            if passes is None:
                passes = vars(self.decoder)["ttt_passes"] = Passes(type(self.decoder).forward)
                self.decoder.__class__ = _with_ttt(type(self.decoder), _DecoderWithTTT)
            passes.layers += 1
            vars(self.module)["ttt_passes"] = passes
            vars(self.module)["ttt_cache_index"] = cache_index(self.module)
            super().attach(adapter)
        adapter.register_load_state_dict_pre_hook(passes.renew)

    def detach(self, original: type[nn.Module]) -> None:
        """Undo `attach`."""
        passes = vars(self.module).pop("ttt_passes", None)
        vars(self.module).pop("ttt_cache_index", None)
        if passes is None:
            super().detach(original)
            return
        with _unhooked(self.module, self.path), _unhooked(self.decoder, self.path):
            super().detach(original)
            passes.layers -= 1
            if not passes.layers:
                del vars(self.decoder)["ttt_passes"]
                self.decoder.__class__ = own_class(self.decoder)


@contextlib.contextmanager
def _unhooked(module: nn.Module, path: str) -> Iterator[None]:
    """Take accelerate's hook off a module while its class changes: it holds the forward of the class that it found.

    Raises:
        InjectionError: the forward of the object itself is replaced by something else.
    """
    hook = vars(module).get("_hf_hook")
    if hook is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(module)
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del vars(module)["forward"]  # the hook is gone, but it puts back what the class has as the object's own
    try:
        if "forward" in vars(module):
            raise InjectionError(
                f"{path}: the forward of its {type(module).__name__} is replaced on the object itself, so that TTT "
                f"would never be called; inject TTT before that"
            )
        yield
    finally:
        if hook is not None:
            add_hook_to_module(module, hook)


def causal_lm_sites(model: nn.Module) -> Sequence[Site]:
    """One site for each decoder layer of a causal language model of `transformers`: its output.

    TTT reads the residual stream after the layer. It gets the padding from `attention_mask`, and its state travels with
    the cache.

    Raises:
        InjectionError: the model's structure is not understood; the message says what was looked for and found.
    """
    decoder: Decoder = find_decoder(model)
    return [
        DecoderSite(
            layer=number,
            path=f"{decoder.layers_path}.{number}",
            module=layer,
            dim=decoder.dim,
            num_heads=decoder.num_heads,
            subclass=_with_ttt(own_class(layer), _LayerWithTTT),
            decoder=decoder.module,
        )
        for number, layer in enumerate(decoder.layers)
    ]
