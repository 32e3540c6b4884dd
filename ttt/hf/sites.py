"""The sites of a causal language model: the output of each decoder layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn
from transformers.cache_utils import Cache

from ttt.adapter import TTTAdapter
from ttt.errors import InjectionError, UsageError
from ttt.hf.passes import Pass, Passes
from ttt.hf.states import Remembered, find_cache, stateful
from ttt.hf.structure import Decoder, cache_index, describe_call, find_decoder
from ttt.plugins.site import Site


class _DecoderWithTTT(nn.Module):
    """Tells the layers of each forward pass which tokens count."""

    ttt_passes: Passes

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.ttt_passes.opened(super().forward, args, kwargs):
            return super().forward(*args, **kwargs)


class _LayerWithTTT(nn.Module):
    """Applies TTT to the tokens that a decoder layer returns."""

    ttt: TTTAdapter
    ttt_passes: Passes
    ttt_cache_index: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # The pass is handed on as an argument: if the layer is recomputed in backward, it is given the same again.
        return super().__call__(*args, ttt_pass=self.ttt_passes.required(), **kwargs)

    def forward(self, *args: Any, ttt_pass: Pass, **kwargs: Any) -> Any:
        cache = find_cache(args, kwargs)
        if cache is None and ttt_pass.cache is not None:
            raise UsageError(
                f"the model was given a cache, but its {type(self).__name__} was not, so that TTT would lose its state "
                f"(it was given {describe_call(args, kwargs)}); the layers of such a model are not understood"
            )
        before = 0 if cache is None else cache.get_seq_length(self.ttt_cache_index)
        out = super().forward(*args, **kwargs)
        hidden = out[0] if isinstance(out, tuple) else out
        hidden = self._adapted(hidden, cache, before, ttt_pass.mask)
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    def _adapted(self, hidden: Tensor, cache: Cache | None, before: Any, mask: Tensor | None) -> Tensor:
        if cache is None or self.ttt.gate.closed:
            return self.ttt(hidden, mask=mask)
        states = stateful(cache).ttt_states
        known = states.get(self.ttt_cache_index)
        read = 0 if known is None else known.positions
        if isinstance(before, int) and before != read:
            raise UsageError(
                f"the cache holds {before} tokens, of which the TTT layer {self.ttt_cache_index} has read {read}: it "
                f"was filled with the gates closed, by another model, or copied without its TTT states; start from a "
                f"new cache"
            )
        hidden, state = self.ttt.adapt(hidden, None if known is None else known.state, mask=mask)
        states[self.ttt_cache_index] = Remembered(state, read + hidden.shape[1])
        return hidden


_MADE: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def _with_ttt(kind: type[nn.Module], mixin: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a class of modules, made once, so that two layers of one class stay of one class."""
    if (kind, mixin) not in _MADE:
        made = type(f"{kind.__name__}WithTTT", (mixin, kind), {"__module__": kind.__module__})
        _MADE[kind, mixin] = cast("type[nn.Module]", made)
    return _MADE[kind, mixin]


@dataclass(frozen=True, eq=False)
class DecoderSite(Site):
    """The output of a decoder layer. With the first adapter, the decoder too becomes one that knows of TTT."""

    decoder: nn.Module = field(kw_only=True)
    """What calls the layer."""

    def attach(self, adapter: nn.Module) -> None:
        """Make the layer call the adapter."""
        for module in (self.module, self.decoder):
            if "forward" in vars(module):
                raise InjectionError(
                    f"{self.path}: the forward of its {type(module).__name__} is replaced on the object itself, as by "
                    f"hooks of accelerate (device_map), so that TTT would never be called; inject TTT before that"
                )
        passes = vars(self.decoder).get("ttt_passes")
        if passes is None:
            passes = vars(self.decoder)["ttt_passes"] = Passes()
            self.decoder.__class__ = _with_ttt(type(self.decoder), _DecoderWithTTT)
        passes.layers += 1
        vars(self.module)["ttt_passes"] = passes
        vars(self.module)["ttt_cache_index"] = cache_index(self.module)
        super().attach(adapter)

    def detach(self, original: type[nn.Module]) -> None:
        """Undo `attach`."""
        super().detach(original)
        passes = vars(self.module).pop("ttt_passes", None)
        vars(self.module).pop("ttt_cache_index", None)
        if passes is None:
            return
        passes.layers -= 1
        if not passes.layers:
            del vars(self.decoder)["ttt_passes"]
            self.decoder.__class__ = type(self.decoder).__mro__[2]


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
            subclass=_with_ttt(type(layer), _LayerWithTTT),
            decoder=decoder.module,
        )
        for number, layer in enumerate(decoder.layers)
    ]
