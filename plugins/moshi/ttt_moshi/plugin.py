"""The plugin: options and presets need no torch; methods import the model and its data when they are called."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ttt.config import BackboneOptions, DataOptions, RunConfig, ScoreOptions
from ttt.config.sources import DATA_KEYS, sources_of
from ttt.packaged import packaged_presets
from ttt.plugins import (
    Answering,
    Backbone,
    BackboneFacts,
    Batch,
    DataReading,
    Indexing,
    LossOutput,
    LowRank,
    NeededFile,
    Precomputing,
    RecordingFormat,
    ScoreFacts,
    Scoring,
    Streaming,
    WindowDataset,
    hookimpl,
)
from ttt_moshi.contexts import attention_span, identifying
from ttt_moshi.interleave import frames_in
from ttt_moshi.memory import memory_facts
from ttt_moshi.options import (
    FRAME_RATE,
    NOTHING,
    PIECE,
    RECORDING_EXAMPLE,
    SOUND_FILES,
    MoshiData,
    MoshiOptions,
    MoshiRun,
    MoshiScoreOptions,
    context_and_codebooks,
    model_config_of,
    needed_files,
    reads_with_the_demos,
    sizes,
)
from ttt_moshi.rules import RULES
from ttt_moshi.weight_kinds import look_at_weights

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch
    from rich.console import Console
    from torch import Tensor, nn

    from ttt.config.lora import Linears
    from ttt.plugins import AnswerRequest, ClipReader, ImportedConfig, LoraSite, Scores, ScoreStream, Site


class MoshiBackbone(
    Backbone[MoshiOptions, MoshiData],
    Indexing,
    DataReading[MoshiOptions, MoshiData],
    Precomputing[MoshiOptions, MoshiData],
    Streaming,
    Scoring[MoshiOptions, MoshiData],
    Answering[MoshiOptions, MoshiData],
    LowRank[MoshiOptions],
):
    """Moshi: autoregressive over 12.5 frames a second of 17 streams (1 text, 8 own audio, 8 of the user)."""

    name: ClassVar[str] = "moshi"
    causal: ClassVar[bool] = True
    options: ClassVar[type[BackboneOptions]] = MoshiOptions
    data_options: ClassVar[type[DataOptions]] = MoshiData
    rules: ClassVar[Sequence[Callable[[RunConfig], Iterable[Any]]]] = RULES
    own_tasks_notice: ClassVar[str] = (
        "synthetic: a few recordings by espeak-ng, for trying an evaluation; near chance is expected of pairs"
    )
    score_options: ClassVar[type[ScoreOptions]] = MoshiScoreOptions
    non_identity_options: ClassVar[frozenset[str]] = frozenset(
        {"hf_repo", "revision", "moshi_path", "mimi_path", "tokenizer_path", "config_path", "lora_path"}
    )
    ttt_defaults: ClassVar[Mapping[str, Any]] = {
        "preset": "lm",
        "layer_type": "mlp",
        "qkvo_bias": True,
        "normalize_qk": True,
        "normalize_target": True,
        "learnable_token_idx": False,
        "input_norm": "rms",
    }

    def presets(self) -> Mapping[str, str]:
        """The commented configs that ship: `demo` and `7b`."""
        return packaged_presets("ttt_moshi", ("demo", "7b"))

    def facts(self, config: MoshiRun) -> BackboneFacts:
        """Widths by preset or config.json; tokens by `duration_sec`.

        Raises:
            EnvironmentProblem: the config.json or the weights are of another model than can be trained here.
        """
        options, data = config.backbone, config.data
        if options.preset == "7b":
            look_at_weights(needed_files(options), model_config_of(options))
        return BackboneFacts(
            **sizes(options),
            tokens_per_window=frames_in(data.duration_sec, FRAME_RATE),
            window=f"{data.duration_sec:g} s of Moshi",
            recordings=_recording_format(data),
            **memory_facts(config, frames_in(data.duration_sec, FRAME_RATE)),
        )

    def files(self, options: MoshiOptions) -> Mapping[str, NeededFile]:
        """The local files of 7b that the options have read: all of them, or with random weights those of the data."""
        return needed_files(options)

    def identity(self, options: MoshiOptions) -> Mapping[str, Any]:
        """The options that say which model it is; contexts that come to the same are the same."""
        return {**super().identity(options), **identifying(options)}

    def has_own_data(self, options: MoshiOptions) -> bool:
        """Only the demo has, and random weights that are read with the demo's codec."""
        return reads_with_the_demos(options)

    def has_own_eval_data(self, options: MoshiOptions) -> bool:
        """The demo's data have a held-out part."""
        return options.preset == "demo"

    def build(self, options: MoshiOptions, *, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
        """Make kyutai's `LMModel`, in eval mode."""
        _before_moshi_is_imported(device)
        from ttt_moshi.model import build

        return build(options, device=device, dtype=dtype)

    def provenance(self, options: MoshiOptions) -> Mapping[str, str]:
        """The repository, and the commit of it that the weights are of."""
        from ttt_moshi.weights import provenance

        return provenance(options)

    def describe_model(self, model: nn.Module) -> Sequence[str]:
        """What attention sees in each layer."""
        from ttt_moshi.contexts import describe

        return describe(model)

    def sites(self, model: nn.Module) -> Sequence[Site]:
        """One for each layer of the main transformer, after self-attention and before the feed-forward."""
        from ttt_moshi.model import sites

        return sites(model)

    def dataset(self, config: MoshiRun, *, split: str, device: torch.device | str) -> WindowDataset:
        """Windows of interleaved codes, `[17, T]` each."""
        _before_moshi_is_imported(device)
        from ttt_moshi.data import speech_windows

        return speech_windows(config.backbone, config.data, split=split, device=device)

    def read_data(self, config: MoshiRun, *, split: str, console: Console) -> Sequence[str]:
        """Decode every recording to its end, and read every transcript and all codes. No codec is loaded."""
        from ttt_moshi.reading_data import read_data

        codes = None
        if config.data.codes is not None:
            _before_moshi_is_imported("cpu")
            from ttt_moshi.data import stored_codes

            codes = stored_codes(config.backbone, Path(config.data.codes))
        return read_data(config.data, split=split, console=console, codes=codes)

    precomputed_data = "codes"

    def precompute(self, config: MoshiRun, *, console: Console) -> None:
        """Encode the recordings of `data.train_data` and `data.eval_data` by the codec, into `data.codes`."""
        _before_moshi_is_imported(config.train.device if config.train.device != "auto" else "cpu")
        from ttt_moshi.precompute import precompute

        precompute(config, console=console)

    def loss(self, model: nn.Module, batch: Batch, config: MoshiRun) -> LossOutput:
        """Text and audio cross-entropy, weighted as moshi-finetune does."""
        from ttt_moshi.model import loss

        # the section is not ours if the config was not made for this backbone
        data = config.data if isinstance(config.data, MoshiData) else MoshiData()
        return loss(model, batch, config.backbone, untranscribed_text_weight=data.untranscribed_text_weight)

    def loss_weights(self, batch: Batch, config: MoshiRun) -> Tensor:
        """The sums of weights of the text and of Moshi's own codebooks."""
        from ttt_moshi.model import loss_weights

        return loss_weights(batch, config.backbone)

    def set_gradient_checkpointing(self, model: nn.Module, enabled: bool) -> None:
        """Switch kyutai's own checkpointing, around every layer of both transformers."""
        from ttt_moshi.model import set_gradient_checkpointing

        set_gradient_checkpointing(model, enabled)

    def is_attention(self, parameter_name: str) -> bool:
        """The main transformer's self-attention."""
        return parameter_name.startswith("transformer.") and ".self_attn." in parameter_name

    def tiny(self) -> MoshiOptions:
        """The demo, smaller."""
        return MoshiOptions(preset="demo", dim=32, num_heads=2, num_layers=3)

    def tiny_like(self, options: MoshiOptions) -> MoshiOptions:
        """`tiny`, with attention that ends where it does."""
        return self.tiny().model_copy(update=identifying(options))

    def example_batch(self, model: nn.Module, *, batch_size: int, tokens: int, seed: int) -> Batch:
        """Random codes `[B,17,T]`."""
        from ttt_moshi.model import example_codes

        return example_codes(model, batch_size=batch_size, tokens=tokens, seed=seed)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The main transformer's output and text logits for each frame of codes, `[B,T,D+text_card]`."""
        from ttt_moshi.model import outputs

        return outputs(model, batch)

    def perturb(self, batch: Batch, *, token: int, row: int | None = None) -> Batch:
        """Other codes from a frame on."""
        from ttt_moshi.model import perturb

        return perturb(batch, token=token, row=row)

    def stream(self, model: nn.Module, batch: Batch, *, pieces: Sequence[int]) -> Tensor:
        """`outputs`, through kyutai's streaming state."""
        from ttt_moshi.model import stream

        return stream(model, batch, pieces=pieces)

    def lora_sites(self, model: nn.Module, linears: Linears) -> Sequence[LoraSite]:
        """The linear layers that moshi-finetune gives LoRA, or those of the main transformer."""
        from ttt_moshi.lora import lora_sites

        return lora_sites(model, linears)

    def lora_shapes(self, options: MoshiOptions, linears: Linears) -> Mapping[tuple[int, int], int] | None:
        """By preset or config.json."""
        from ttt_moshi.linears import linear_shapes

        return linear_shapes(options, linears)

    def read_lora(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A `lora.safetensors` of moshi-finetune."""
        from ttt_moshi.lora import read_lora

        return read_lora(model, tensors)

    def find_recordings(self, folder: Path) -> Sequence[Path]:
        """The sound files, by their endings."""
        from ttt_moshi.sources import sound_files

        return sound_files(folder)

    def measure_recording(self, file: Path) -> float:
        """By its header, and the end decoded."""
        from ttt_moshi.sources import measure

        return measure(file)

    def score_facts(self, config: MoshiRun) -> ScoreFacts:
        """The text stream and Moshi's own codebooks, of which the first is semantic."""
        _, codebooks = context_and_codebooks(config.backbone)
        acoustic = (1.0,) * (codebooks - 1)
        return ScoreFacts(
            medium="speech",
            streams=("text", "semantic", *(f"acoustic {number}" for number in range(1, codebooks))),
            weights={
                "weighted": (0.0, config.backbone.first_codebook_weight_multiplier, *acoustic),
                "semantic": (0.0, 1.0, *(0.0 for _ in acoustic)),
                "all": (0.0, 1.0, *acoustic),
                "text": (1.0, 0.0, *(0.0 for _ in acoustic)),
            },
            chosen=_score_options(config).streams,
            positions_per_second=FRAME_RATE,
            attention_span=attention_span(config),
            padding=NOTHING,
            piece=PIECE,
        )

    def own_tasks_data(self, config: MoshiRun) -> Path | None:
        """The demo's own small benchmark."""
        folder = Path(__file__).parent / "demo" / "tasks"
        return folder if config.backbone.preset == "demo" and folder.is_dir() else None

    def clip_reader(self, config: MoshiRun, *, device: torch.device | str) -> ClipReader:
        """Sound files as Moshi's own voice; its codec is Mimi, for the demo its own."""
        _before_moshi_is_imported(device)
        from ttt_moshi.clips import clip_reader

        return clip_reader(config.backbone, _score_options(config), device=device)

    def score(self, model: nn.Module, clips: Tensor) -> Scores:
        """Cross-entropy of codes `[B,17,T]` in each frame, `[B,9,T]`."""
        from ttt_moshi.scoring import score

        return score(model, clips)

    def score_stream(self, model: nn.Module, *, batch_size: int) -> AbstractContextManager[ScoreStream]:
        """The same in pieces, through kyutai's streaming state."""
        from ttt_moshi.scoring import score_stream

        return score_stream(model, batch_size=batch_size)

    def plan_answer(self, config: MoshiRun, request: AnswerRequest) -> Sequence[Path]:
        """A WAV, and a `.json` with the text beside it."""
        from ttt_moshi.request import plan

        return plan(request)

    def check_answer(self, config: MoshiRun, request: AnswerRequest) -> None:
        """That the recording can be heard, and the answer written."""
        _before_moshi_is_imported("cpu")
        from ttt_moshi.answers import check

        check(request, config.backbone)

    def prepare_answers(
        self, model: nn.Module, config: MoshiRun, *, console: Console
    ) -> Callable[[AnswerRequest], Sequence[Path]]:
        """Kyutai's `LMGen`, frame by frame."""
        from ttt_moshi.answers import Answerer

        return Answerer(model, config, console=console)


def _recording_format(data: MoshiData) -> RecordingFormat:
    """What the recordings of the sources are, which may differ in that."""
    named = [source for key in DATA_KEYS for source in sources_of(data, key)]
    bare = frozenset(source for source in named if data.format_of(source) == "audio")
    return RecordingFormat(RECORDING_EXAMPLE, data.duration_sec, beside=".json", bare=bare, suffixes=SOUND_FILES)


def _score_options(config: MoshiRun) -> MoshiScoreOptions:
    """The section `eval.score`; its defaults if the config was not made for this backbone."""
    score = config.eval.score
    return score if isinstance(score, MoshiScoreOptions) else MoshiScoreOptions(normalise=score.normalise)


def _before_moshi_is_imported(device: torch.device | str) -> None:
    """Keep moshi from compiling its norm on a CPU: that takes 20 s or more and saves no time.

    It sets an environment variable that moshi reads when it is first imported, for the model or for Mimi.
    """
    if str(device).startswith("cpu"):
        os.environ.setdefault("NO_TORCH_COMPILE", "1")


_BACKBONE = MoshiBackbone()


@hookimpl
def ttt_backbone() -> Backbone:
    """The hook: this plugin's backbone."""
    return _BACKBONE


@hookimpl
def ttt_import_config(text: str, file: str) -> ImportedConfig | None:
    """The hook: moshi-finetune's YAML, with or without a `ttt:` section."""
    from ttt_moshi.importing import import_config

    return import_config(text, file=file)
