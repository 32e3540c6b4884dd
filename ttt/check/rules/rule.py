"""What a rule of the core may read. `ttt.plugins.rules` defines what a rule is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ttt.check.estimate import Estimate, estimate, written_layout
from ttt.check.recordings import Lines, Recordings, is_folder_of, read_lines_of, read_recordings
from ttt.config.schema import RunConfig
from ttt.config.sources import DataSource, places_of
from ttt.errors import EnvironmentProblem
from ttt.plugins.rules import rule

if TYPE_CHECKING:
    from ttt.adapter_file import AdapterInfo
    from ttt.plugins import Backbone, BackboneFacts, NeededFile

FACTS = "facts"
"""In `reads`: the rule uses `Context.facts`, which depend on the sections `backbone` and `data`."""


NEEDED = "needs"
"""In `reads`: the rule uses `Context.needs`. It is left out if the layers cannot exist in the backbone."""
NEEDS = (FACTS, NEEDED, "ttt", "train")
"""Everything that `Context.needs` depends on."""

__all__ = ["FACTS", "NEEDED", "NEEDS", "Context", "rule"]


@dataclass(frozen=True)
class Context:
    """What a rule may read."""

    config: RunConfig
    """The resolved config, defaults included."""
    known_backbone: Backbone | None
    known_facts: BackboneFacts | None
    is_written: Callable[[str], bool]
    """Whether the user wrote a key, given as `section.key`."""
    memory_bytes: int | None = None
    """Bytes of memory of the run's device; None if the caller does not know it."""
    devices: int | None = None
    """How many devices the caller asks about; None if only about the one of `memory_bytes`."""
    resuming: bool = False
    """Whether an interrupted run goes on. It does not read `train.init_from` again."""
    tells_cost: bool = False
    """Whether the caller asks what the run costs."""
    training: bool = True
    """Whether the config is for training. If not, its tasks are not listed: the command that measures them does."""
    needed_files: Mapping[str, NeededFile] = field(default_factory=dict)
    """The files that the backbone's options name, by option; only for rules that read `backbone`."""
    _lines: dict[str, Mapping[str, Lines]] = field(default_factory=dict)

    @property
    def backbone(self) -> Backbone:
        """The backbone; only for rules that read `backbone`."""
        assert self.known_backbone is not None
        return self.known_backbone

    @property
    def facts(self) -> BackboneFacts:
        """The backbone's facts; only for rules that read `FACTS`."""
        assert self.known_facts is not None
        return self.known_facts

    @functools.cached_property
    def needs(self) -> Estimate:
        """What the run needs, one process of it if `train.parallel` says how many; for rules that read `NEEDS`."""
        return estimate(self.config, self.facts, self.lora_shapes, written_layout(self.config.train))

    @functools.cached_property
    def lora_shapes(self) -> Mapping[tuple[int, int], int] | None:
        """The linear layers of LoRA by width; None if there is none, or only the built model tells."""
        from ttt.plugins.capabilities import LowRank
        from ttt.plugins.capability_base import has_capability

        backbone = self.known_backbone
        if not self.config.has_lora or not has_capability(backbone, LowRank):
            return None
        return backbone.lora_shapes(self.config.backbone, self.config.lora.linears)

    @functools.cached_property
    def can_be_built(self) -> bool:
        """Whether the backbone has the layers that the config names, and heads that divide its width."""
        layers, facts = self.config.ttt.layers, self.facts
        exist = isinstance(layers, str) or all(layer < facts.num_layers for layer in layers)
        return exist and facts.dim % (self.config.ttt.num_heads or facts.num_heads) == 0

    @property
    def has_layers(self) -> bool:
        """Whether the config has TTT layers at all."""
        return self.config.injected.layers not in ("none", ())

    def recordings(self, key: str) -> Recordings | None:
        """What the lines of `data.train_data` or `data.eval_data` say; only for rules that read `data` and `FACTS`.

        Of several sources, those of all together; None if none of them can be read.
        """
        read = [lines for lines in self.lines(key).values() if isinstance(lines, Recordings)]
        return Recordings.together(read) if read else None

    def lines(self, key: str) -> Mapping[str, Lines]:
        """The lines of each source of that data that can be read, by the key that names it.

        They name recordings, or hold the data themselves; empty if the backbone's data have no lines.
        """
        if key not in self._lines:
            named = places_of(self.config.data, key).items()
            read = {place: self._read(source) for place, source in named}
            self._lines[key] = {place: lines for place, lines in read.items() if lines is not None}
        return self._lines[key]

    def _read(self, source: DataSource) -> Lines | None:
        form, of_lines = self.facts.recordings, self.facts.lines
        if of_lines is not None:
            return read_lines_of(source.path, of_lines)
        if form is None:
            return None
        if source not in form.bare:
            return read_recordings(source.path, beside=form.beside)
        return None if is_folder_of(source.path, form.suffixes) else read_recordings(source.path)

    @functools.cached_property
    def start(self) -> AdapterInfo | EnvironmentProblem | None:
        """What `train.init_from` names, or why it cannot be read; None if the run does not start from anything."""
        path = self.config.train.init_from
        if path is None or self.resuming:
            return None
        from ttt.adapter_file import read_info, trained_backbone

        try:
            info = read_info(path)
            trained_backbone(info)
        except EnvironmentProblem as problem:
            return problem
        except (OSError, ValueError) as error:  # a name that no file can have
            return EnvironmentProblem(f"{path}: {getattr(error, 'strerror', None) or error}")
        return info

    def first_written(self, *keys: str) -> str:
        """The first of the keys that the user wrote, as the place of a finding; if none is written, the first key."""
        return next(filter(self.is_written, keys), keys[0])
