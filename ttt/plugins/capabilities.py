"""What a backbone may do beside being trained: classes that it inherits in addition to `Backbone`.

    class MyBackbone(Backbone[MyOptions, MyData], Sampling[MyOptions, MyData], Streaming): ...

`ttt.plugins.capability(backbone, Sampling)` returns the backbone as a `Sampling`, or raises an error that says what it
lacks. `has_capability` only tells whether it has it. If a class has a method of a capability but does not inherit the
capability, that is an error when the plugin is loaded. The methods are guarded like those of `Backbone`. This module
imports no torch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, NamedTuple

from ttt.config.evaluation import ScoreOptions
from ttt.config.lora import Linears
from ttt.config.schema import DataT, OptionsT, RunConfig
from ttt.errors import UsageError
from ttt.plugins.capability_base import Capability

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from torch import Tensor, nn

    from ttt.plugins.data import Batch, WindowDataset
    from ttt.plugins.denoising import SegmentLosses, WindowSource
    from ttt.plugins.lora_site import LoraSite
    from ttt.plugins.sampling import AnswerRequest, SamplePlan, SampleRequest
    from ttt.plugins.scoring import ClipReader, ScoreFacts, Scores, ScoreStream


class Sampling(Capability, Generic[OptionsT, DataT]):
    """Making something from prompts with the adapted model: `ttt sample`."""

    sample_suffix: ClassVar[str] = ""
    """The ending of its samples' names, as `.mp4`. Without it, `ttt sample` makes only one sample at a time."""

    @abstractmethod
    def plan_sample(self, config: RunConfig[OptionsT, DataT], *, seconds: float, out: Path) -> SamplePlan:
        """What a sample of so many seconds needs, and which files it writes. Must work without torch.

        Raises:
            ttt.errors.UsageError: a sample cannot be that long, or cannot be written to such a file.
        """

    def check_sample(self, config: RunConfig[OptionsT, DataT], request: SampleRequest) -> None:
        """Refuse a request that `sample` could not fulfil, as far as that is known before the model is built.

        Args:
            config: resolved.
            request: the request.

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
            request: the request, accepted by `check_sample`.
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
        """A function that makes one sample after another, so that what all of them need is loaded only once.

        By default it calls `sample` for each.

        Args:
            model: as for `sample`.
            requests: all requests, accepted by `check_sample`.
            config: resolved.
            console: where to report.

        Returns:
            The function. It is called with each request in order; only the folder of `out` may differ. It returns the
            files written, all of them in that folder, and makes the same sample as `sample`, whatever came before.
            Global generators are seeded from the request's seed before each call.

        Raises:
            ttt.errors.TTTError: weights are missing.
        """
        return lambda request: self.sample(model, request, config, console=console)


class Answering(Capability, Generic[OptionsT, DataT]):
    """Answering a recording with the adapted model, which listens while it speaks: `ttt sample --audio`."""

    @abstractmethod
    def plan_answer(self, config: RunConfig[OptionsT, DataT], request: AnswerRequest) -> Sequence[Path]:
        """The files that an answer leaves, the sound first, all in the folder of `out`. Must work without torch.

        Raises:
            ttt.errors.UsageError: it cannot be written to such a file.
        """

    def check_answer(self, config: RunConfig[OptionsT, DataT], request: AnswerRequest) -> None:
        """Refuse a request that could not be fulfilled, as far as that is known before the model is built.

        Raises:
            ttt.errors.UsageError: a number is out of its range; the message names which.
            ttt.errors.EnvironmentProblem: the recording is missing or broken, or its answer does not fit on the disk.
        """

    @abstractmethod
    def prepare_answers(
        self, model: nn.Module, config: RunConfig[OptionsT, DataT], *, console: Console
    ) -> Callable[[AnswerRequest], Sequence[Path]]:
        """A function that answers one recording after another, each from fresh fast weights, which it then keeps.

        Args:
            model: what `build` made, injected, weights loaded, in eval mode.
            config: resolved.
            console: where to report.

        Returns:
            The function. It is called with each request, accepted by `check_answer`, whose `out` is in a temporary
            folder, and returns the files that `plan_answer` named. Global generators are seeded from the request's seed
            before each call.

        Raises:
            ttt.errors.TTTError: weights are missing.
        """


class Precomputing(Capability, Generic[OptionsT, DataT]):
    """Making the training data from its sources: `ttt precompute`."""

    precomputed_data: ClassVar[str] = "train_data"
    """The key of the section `data` that names what it makes."""

    @abstractmethod
    def precompute(self, config: RunConfig[OptionsT, DataT], *, console: Console) -> None:
        """Make the data. After an interruption, finished parts stay and are not made again.

        Args:
            config: resolved; its `data` section names the sources and the place of the result.
            console: where to report.

        Raises:
            ttt.errors.TTTError: sources are missing or broken.
        """


class Indexing(Capability):
    """Making the list of recordings that training reads, of a folder of sound files: `ttt index`."""

    @abstractmethod
    def find_recordings(self, folder: Path) -> Sequence[Path]:
        """The files in a folder, at any depth, that may be recordings, in an order that depends on names alone."""

    @abstractmethod
    def measure_recording(self, file: Path) -> float:
        """Length of a recording in seconds, as training would measure it.

        Raises:
            ttt.errors.EnvironmentProblem: the file is not a recording that training can read; the message names it.
        """


class DataReading(Capability, Generic[OptionsT, DataT]):
    """Reading all data of a config to find what is wrong with them: `ttt check --data`.

    Of a backbone without it, every window is made as training would make it.
    """

    @abstractmethod
    def read_data(self, config: RunConfig[OptionsT, DataT], *, split: str, console: Console) -> Sequence[str]:
        """Read the data of a split wholly: everything that training would decode.

        Args:
            config: resolved.
            split: `train`, or `eval` if it has data of its own.
            console: where to tell how far it is.

        Returns:
            What trains, but hardly as it was meant, with the way out: a sentence for each kind, with its count.

        Raises:
            ttt.errors.TTTError: data that cannot be used, all of them named.
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
        """The same as `Backbone.outputs`, `[B, T, …]`, computed by feeding the model pieces of the given lengths."""


class Scoring(Capability, Generic[OptionsT, DataT]):
    """Telling how likely the model finds what it reads. Evaluation tasks ask for it, as those of `ttt.eval` do."""

    score_options: ClassVar[type[ScoreOptions]] = ScoreOptions
    """The section `eval.score`: how clips are read and their scores chosen."""

    own_tasks_notice: ClassVar[str] = ""
    """What a user must know of the data that ships with the plugin, such as that it is synthetic; a sentence."""

    @abstractmethod
    def score_facts(self, config: RunConfig[OptionsT, DataT]) -> ScoreFacts:
        """What the scores are of. Must work without torch."""

    def own_tasks_data(self, config: RunConfig[OptionsT, DataT]) -> Path | None:
        """A folder that ships with the plugin and holds data for tasks, a folder for each by the task's name."""
        return None

    @abstractmethod
    def clip_reader(self, config: RunConfig[OptionsT, DataT], *, device: torch.device | str) -> ClipReader:
        """What turns files into clips. Loads the codec or tokenizer.

        Raises:
            ttt.errors.EnvironmentProblem: its files are missing or broken.
        """

    @abstractmethod
    def score(self, model: nn.Module, clips: Tensor) -> Scores:
        """The scores of clips `[B,S,T]` on the model's device, each a stream of its own that starts fresh."""

    @abstractmethod
    def score_stream(self, model: nn.Module, *, batch_size: int) -> AbstractContextManager[ScoreStream]:
        """A context in which the model reads B streams in pieces, without gradients. They start fresh."""

    def example_clips(self, model: nn.Module, *, batch_size: int, tokens: int, seed: int) -> Tensor:
        """Random clips `[B,S,T]` with which law 4 is proved: `Backbone.example_batch`, if that makes such clips."""
        example: Callable[..., Tensor] = self.example_batch  # type: ignore[attr-defined]
        return example(model, batch_size=batch_size, tokens=tokens, seed=seed)


class DiffusionScoring(Capability, Generic[OptionsT, DataT]):
    """Telling how well the model denoises a window, timestep by timestep: diffusion losses that can be compared."""

    @abstractmethod
    def num_timesteps(self, config: RunConfig[OptionsT, DataT]) -> int:
        """How many timesteps the noise schedule has; the first, 0, has the least noise.

        Raises:
            ttt.errors.EnvironmentProblem: the schedule cannot be read.
        """

    def window_source(self, dataset: WindowDataset, index: int) -> WindowSource:
        """What a window of the backbone's dataset is cut from. By default: its number among `dataset.files`."""
        from ttt.plugins.denoising import WindowSource

        number = next(number for number, windows in enumerate(dataset.files) if index in windows)
        return WindowSource(f"file {number}")

    @abstractmethod
    def diffusion_losses(
        self,
        model: nn.Module,
        batch: Batch,
        config: RunConfig[OptionsT, DataT],
        *,
        timesteps: Tensor,
        seeds: Sequence[int],
    ) -> SegmentLosses:
        """The training loss of each window at given timesteps, apart for each segment.

        The noise depends on a window's seed alone: not on the rest of its batch, the global generators, the device or
        the model. So losses of two models, or of one model with open and closed gates, are of the same noise.

        Args:
            model: what `build` made, injected, in eval mode.
            batch: B windows, as `dataset` collates them, on the model's device.
            config: resolved.
            timesteps: `[B,N]` int64, on the CPU.
            seeds: of the noise of each window, 0 … 2⁶³−1.
        """


class SegmentReset(Capability):
    """Starting fast weights anew inside a window that is read whole: the arm `reset` of evaluations.

    A backbone that scores streams does not need it: there the core starts fast weights anew between two pieces.
    """

    @abstractmethod
    def reset_at_segments(self, model: nn.Module) -> AbstractContextManager[None]:
        """A context in which every TTT layer starts each segment of a window with fresh fast weights.

        Nothing else changes: positions and attention are those of the whole window.
        """


class LowRank(Capability, Generic[OptionsT]):
    """LoRA in the backbone's linear layers: `adapter: lora` and `adapter: ttt+lora`. The core puts it in."""

    @abstractmethod
    def lora_sites(self, model: nn.Module, linears: Linears) -> Sequence[LoraSite]:
        """The linear layers that `lora.linears` names, in order; `all` is every one whose output the loss depends on.

        `model` is what `build` made, without TTT; it is not changed.
        """

    def lora_shapes(self, options: OptionsT, linears: Linears) -> Mapping[tuple[int, int], int] | None:
        """How many linear layers `lora_sites` has, by input and output width; None if only the built model tells.

        With it `ttt check` says the rank of `lora.rank: match`, and what LoRA takes. Must work without torch.
        """
        return None

    def read_lora(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors of a `lora.init_from` as `PATH.lora_A.weight` and `PATH.lora_B.weight`, if a file names them
        otherwise.

        Args:
            model: with LoRA.
            tensors: everything that the file holds.
        """
        return tensors


class InWords(NamedTuple):
    """A capability in words."""

    verb: str
    """What such a backbone can do, as `ttt plugins` lists it; the name of the command, if there is one."""
    lacking: str
    """Completes "the backbone has no …", and says what that means."""


CAPABILITIES: Mapping[type[Capability], InWords] = {
    Sampling: InWords("sample", "sampling: it cannot make anything from prompts"),
    Answering: InWords("answer", "answering: it cannot listen to a recording and speak"),
    Precomputing: InWords("precompute", "precomputation: it reads its data as they are"),
    Indexing: InWords("index", "index: it reads no recordings"),
    DataReading: InWords("read-data", "reading of data: what it reads is known once its windows are made"),
    WeightImport: InWords("import-weights", "import of weights: it knows no other program's checkpoints"),
    Streaming: InWords("stream", "streaming: it reads sequences whole"),
    Scoring: InWords("score", "scoring: it does not tell how likely it finds what it reads"),
    DiffusionScoring: InWords("score-diffusion", "scoring of diffusion: it does not tell how well it denoises"),
    LowRank: InWords("lora", "LoRA: its linear layers are not known"),
    SegmentReset: InWords("reset", "reset: its fast weights cannot start anew inside a window that is read whole"),
}
"""The capabilities that this project asks for."""
