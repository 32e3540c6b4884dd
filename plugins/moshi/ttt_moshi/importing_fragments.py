"""Files beside moshi-finetune's configs that are parts of one: a section alone, or a list of examples of sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ttt.config.source import Source
from ttt.errors import UsageError
from ttt.words import first_few

_TTT_KEYS = frozenset(
    {
        *("enable", "ttt_mlp_layers", "ttt_mlp_hidden_dims", "ttt_mlp_expansion_factor", "use_rope", "chunk_size"),
        *("optimize_chunk_size", "max_chunk_size", "prefer_efficiency", "unfrozen_attention_layers"),
        *("ttt_layer_context", "non_ttt_layer_context", "override_gating_alpha_on_resume", "normalize_ttt_output"),
    }
)
"""Keys of the fork's section `ttt` that no section of this project has."""
_SECTIONS = ("ttt", "lora", "paper_metrics", "moshi_paths", "optim", "data", "wandb")
_WHOLE = "a whole config, with `data`, `moshi_paths` and `optim`, and import that"


def refuse_fragments(source: Source) -> None:
    """Say what a file is that is no config of a run, but a part of one of moshi-finetune's fork.

    Raises:
        UsageError: it is one; the message says what can be done with it.
    """
    data = source.data
    examples = {name: kind for name, kind in ((name, _holds(value)) for name, value in data.items()) if kind}
    own = [name for name in _SECTIONS if _is_section(name, data.get(name))]
    if own:
        others = [str(name) for name in data if name not in own]
        beside = f" (beside {first_few([f'`{name}`' for name in others])}, which no config has)" if others else ""
        raise UsageError(
            f"{source.file}: is a part of a config of moshi-finetune's fork with TTT, not a config: it has "
            f"{_listed(own)}{beside}, and says neither what is trained nor on which data",
            fix=f"copy {_listed(own)} into {_WHOLE}",
        )
    if examples:
        kinds = sorted(set(examples.values()))
        what = (
            f"the section `{kinds[0]}`" if len(kinds) == 1 else "the sections " + " and ".join(f"`{k}`" for k in kinds)
        )
        names = [f"`{name}`" for name in examples]
        told = "an example" if len(names) == 1 else f"a list of {len(names)} examples"
        raise UsageError(
            f"{source.file}: is {told} of {what} of moshi-finetune's fork with TTT, not a config: {first_few(names)}",
            fix=f"choose one, copy it as {what} into {_WHOLE}",
        )


def _is_section(name: str, value: Any) -> bool:
    """Whether a value is a section as only the fork writes it."""
    if not isinstance(value, Mapping) or not value:
        return False
    return bool(_TTT_KEYS & set(value)) if name == "ttt" else name == "paper_metrics"


def _holds(value: Any) -> str:
    """The section that an entry is, or holds, an example of; empty if of none."""
    if not isinstance(value, Mapping):
        return ""
    if _TTT_KEYS & set(value) and "mini_batch_size" in value:
        return "ttt"
    return next((name for name in ("ttt", "paper_metrics") if _is_section(name, value.get(name))), "")


def _listed(names: list[str]) -> str:
    return ("the section " if len(names) == 1 else "the sections ") + " and ".join(f"`{name}`" for name in names)
