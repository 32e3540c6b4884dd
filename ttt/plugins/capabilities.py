"""What a backbone may do beside being trained: classes that it inherits beside `Backbone`.

    class MyBackbone(Backbone[MyOptions, MyData], Sampling[MyOptions, MyData], Streaming): ...

Whoever needs one asks for it: `ttt.plugins.capability(backbone, Sampling)` gives the backbone as a `Sampling`, or says
what it lacks; `has_capability` only looks. If a class has such a method and does not inherit the capability, that is an
error when the plugin is loaded. The methods are guarded as those of `Backbone` are. This module imports no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeGuard, TypeVar

from ttt.config.schema import DataT, OptionsT, RunConfig
from ttt.errors import UsageError
from ttt.plugins.guarding import guard

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, nn

    from ttt.plugins.data import Batch
    from ttt.plugins.sampling import SamplePlan, SampleRequest


class Capability(ABC):  # noqa: B024 - each capability has abstract methods of its own
    """Base of what a backbone may do. A capability is a class that names this one as its base."""

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        for kind in kinds_of(cls):
            guard(cls, kind)


def kinds_of(cls: type) -> list[type[Capability]]:
    """The capabilities that a class inherits, in the order in which Python looks at them."""
    return [kind for kind in cls.__mro__ if Capability in kind.__bases__]


CapabilityT = TypeVar("CapabilityT", bound=Capability)


class Sampling(Capability, Generic[OptionsT, DataT]):
    """Making something from prompts with the adapted model: `ttt sample`."""

    sample_suffix: ClassVar[str] = ""
    """What the names of its samples end in, `.mp4`; without it `ttt sample` makes one sample at a time."""

    @abstractmethod
    def plan_sample(self, config: RunConfig[OptionsT, DataT], *, seconds: float, out: Path) -> SamplePlan:
        """What a sample of so many seconds takes and leaves. Works without torch.

        Raises:
            ttt.errors.UsageError: it cannot be that long, or not go into such a file.
        """

    def check_sample(self, config: RunConfig[OptionsT, DataT], request: SampleRequest) -> None:
        """Refuse what `sample` could not honour, before anything large is built; all that can be told without it.

        Args:
            config: resolved.
            request: what is asked for.

        Raises:
            ttt.errors.UsageError: a number is out of its range, or prompts are missing; the message names which.
            ttt.errors.EnvironmentProblem: a file that sampling reads is missing.
        """
        wanted = self.plan_sample(config, seconds=request.seconds, out=request.out).prompts
        if len(request.prompts) != wanted:
            raise UsageError(f"{request.seconds:g} s take {wanted} prompts, but {len(request.prompts)} were given")

    @abstractmethod
    def sample(
        self, model: nn.Module, request: SampleRequest, config: RunConfig[OptionsT, DataT], *, console: Console
    ) -> Sequence[Path]:
        """Make a sample with the adapted model.

        Args:
            model: what `build` made, injected, weights loaded, in eval mode.
            request: what is asked for, which `check_sample` has let pass.
            config: resolved.
            console: where to report.

        Returns:
            The files written, the sample first.

        Raises:
            ttt.errors.TTTError: weights are missing, or the disk is full.
        """

    def prepare_samples(
        self,
        model: nn.Module,
        requests: Sequence[SampleRequest],
        config: RunConfig[OptionsT, DataT],
        *,
        console: Console,
    ) -> Callable[[SampleRequest], Sequence[Path]]:
        """What makes one sample after another with the adapted model, so that what all of them need is loaded once.

        By default each is made by `sample`, alone.

        Args:
            model: as for `sample`.
            requests: all that will be asked for, which `check_sample` has let pass.
            config: resolved.
            console: where to report.

        Returns:
            What is then called with each request in that order, but with an `out` of the same name in another folder,
            and returns the files written, all of them in that folder. It answers to a request as `sample` does,
            whatever came before it. Global generators are seeded from the request's seed before each call.

        Raises:
            ttt.errors.TTTError: weights are missing.
        """
        return lambda request: self.sample(model, request, config, console=console)


class Precomputing(Capability, Generic[OptionsT, DataT]):
    """Making the training data from what it is made of: `ttt precompute`."""

    @abstractmethod
    def precompute(self, config: RunConfig[OptionsT, DataT], *, console: Console) -> None:
        """Make the data, resumable: what is done stays, and is not done again.

        Args:
            config: resolved; its `data` section says from what, and where to.
            console: where to report.

        Raises:
            ttt.errors.TTTError: sources are missing or broken.
        """


class WeightImport(Capability):
    """Reading another program's checkpoints: `ttt import-weights`."""

    @abstractmethod
    def import_weights(self, source: Path, out: Path, *, console: Console) -> Sequence[Path]:
        """Turn another program's checkpoint into this project's files.

        Each tensor is accounted for on the console: where it went, or why it was left out.

        Args:
            source: the checkpoint, a file or a folder.
            out: folder for the files, made if need be; holds nothing yet.
            console: where to report.

        Returns:
            The files and folders written.

        Raises:
            ttt.errors.TTTError: the backbone does not know such checkpoints, a tensor is missing or does not fit;
                nothing was written then.
        """


class Streaming(Capability):
    """Being fed piece by piece, so that law 4 is proved on the whole model too."""

    @abstractmethod
    def stream(self, model: nn.Module, batch: Batch, *, pieces: Sequence[int]) -> Tensor:
        """What `Backbone.outputs` gives, computed by feeding the model pieces of the given lengths, `[B, T, …]`."""


class InWords(NamedTuple):
    """A capability in words."""

    verb: str
    """What such a backbone can do, as `ttt plugins` lists it; where there is a command for it, the command."""
    lacking: str
    """What a backbone without it has not, and what that means."""


CAPABILITIES: Mapping[type[Capability], InWords] = {
    Sampling: InWords("sample", "sampling: it cannot make anything from prompts"),
    Precomputing: InWords("precompute", "precomputation: it reads its data as they are"),
    WeightImport: InWords("import-weights", "import of weights: it knows no other program's checkpoints"),
    Streaming: InWords("stream", "streaming: it reads sequences whole"),
}
"""The capabilities that this project asks for."""


def members_of(kind: type[Capability]) -> list[str]:
    """The public names that a capability brings."""
    return [name for name in vars(kind) if not name.startswith("_")]


def has_capability(backbone: object, kind: type[CapabilityT]) -> TypeGuard[CapabilityT]:
    """Whether a backbone can do something."""
    return isinstance(backbone, kind)
