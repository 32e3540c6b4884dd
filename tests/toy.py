"""A backbone for tests: a small causal transformer on synthetic streams of tokens, with everything a plugin can have.

Each file of its data repeats a motif of its own, so a model that learns while it reads does better than one that
only knows the statistics of all files together.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BeforeValidator, Field
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ttt.adapter import Gate, TTTAdapter
from ttt.config.lora import Linears
from ttt.config.schema import BackboneOptions, DataOptions, RunConfig, TTTConfig
from ttt.errors import EnvironmentProblem, UsageError
from ttt.files import read_tensors, write_tensors, write_text
from ttt.layer import TTTLayer
from ttt.ops.rotary import rotary_angles
from ttt.plugins import (
    Answering,
    AnswerRequest,
    Backbone,
    BackboneFacts,
    Batch,
    DataReading,
    DiffusionScoring,
    Indexing,
    LoraSite,
    LossOutput,
    LowRank,
    Precomputing,
    SamplePlan,
    SampleRequest,
    Sampling,
    SegmentLosses,
    SegmentReset,
    Site,
    Streaming,
    WeightImport,
)
from ttt.state import TTTState


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Numbers = Annotated[tuple[int, ...], BeforeValidator(_as_tuple)]


class ToyOptions(BackboneOptions):
    """The `backbone` section."""

    name: str = "toy"
    num_layers: Annotated[int, Field(ge=1)] = 3
    dim: Annotated[int, Field(ge=2)] = 32
    num_heads: Annotated[int, Field(ge=1)] = 4
    vocabulary: Annotated[int, Field(ge=2)] = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: Annotated[int, Field(ge=0)] = 0


class ToyData(DataOptions):
    """The `data` section: `train_data` is a text file with a line of token numbers for each file."""

    window: Annotated[int, Field(ge=1)] = 24
    """Tokens of a window."""
    windows_of_files: Numbers = (5, 2, 1, 4)
    """How many windows each synthetic file has."""
    poisoned: Numbers = ()
    """Windows whose loss is not a number, as a broken recording's would be."""


class Cache:
    """What one layer keeps of the tokens that it has read: keys, values, and where TTT stands."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.ttt: TTTState | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], 2)
        self.values = values if self.values is None else torch.cat([self.values, values], 2)
        return self.keys, self.values


class Attention(nn.Module):
    """Causal attention with relative positions as a bias that falls with distance (ALiBi)."""

    causal: ClassVar[bool] = True

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.in_proj(x).chunk(3, -1))
        if cache is not None:
            k, v = cache.append(k, v)
        asked, known = q.shape[2], k.shape[2]
        distance = torch.arange(known - asked, known, device=x.device)[:, None] - torch.arange(known, device=x.device)
        slope = 2.0 ** -torch.arange(1, self.num_heads + 1, device=x.device)
        hidden = (distance < 0) & self.causal
        bias = (-slope[:, None, None] * distance.abs()).masked_fill(hidden, float("-inf")).to(x.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then a feed-forward, each as a residual; TTT goes between the two."""

    attention: ClassVar[type[Attention]] = Attention

    def __init__(self, options: ToyOptions) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(options.dim)
        self.self_attn = self.attention(options.dim, options.num_heads)
        self.norm2 = nn.LayerNorm(options.dim)
        self.linear1 = nn.Linear(options.dim, 4 * options.dim)
        self.linear2 = nn.Linear(4 * options.dim, options.dim)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        x = self.after_attention(x + self.dropout(self.self_attn(self.norm1(x), cache)), cache)
        return x + self.dropout(self.linear2(F.gelu(self.linear1(self.norm2(x)))))

    def after_attention(self, x: Tensor, cache: Cache | None) -> Tensor:
        return x


class BlockWithTTT(Block):
    """What a block becomes."""

    ttt: TTTAdapter
    resets = False
    """Start the second half of a window with fresh fast weights."""

    def after_attention(self, x: Tensor, cache: Cache | None) -> Tensor:
        if self.resets:
            return torch.cat([self.ttt(half) for half in x.chunk(2, 1)], 1)
        if cache is None:
            return self.ttt(x)
        x, cache.ttt = self.ttt.adapt(x, cache.ttt)
        return x


class ToyModel(nn.Module):
    """Tokens `[B,T]` to logits `[B,T,vocabulary]`."""

    block: ClassVar[type[Block]] = Block

    def __init__(self, options: ToyOptions) -> None:
        super().__init__()
        self.checkpointing = False
        self.embedding = nn.Embedding(options.vocabulary, options.dim)
        self.layers = nn.ModuleList(self.block(options) for _ in range(options.num_layers))
        self.norm = nn.LayerNorm(options.dim)
        self.head = nn.Linear(options.dim, options.vocabulary, bias=False)

    def forward(self, tokens: Tensor, caches: Sequence[Cache] | None = None) -> Tensor:
        x = self.embedding(tokens)
        for index, layer in enumerate(self.layers):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x, caches[index] if caches is not None else None)
        return self.head(self.norm(x))


class ToyDataset:
    """Windows of token streams; window i predicts each token's successor."""

    notice: str | None = None

    def __init__(self, streams: Sequence[Tensor], options: ToyData) -> None:
        self._streams = list(streams)
        self._window = options.window
        self._poisoned = set(options.poisoned)
        self.files: list[range] = []
        for stream in self._streams:
            first = self.files[-1].stop if self.files else 0
            self.files.append(range(first, first + (len(stream) - 1) // options.window))

    def __len__(self) -> int:
        return self.files[-1].stop if self.files else 0

    def _place(self, index: int) -> tuple[int, int]:
        number = next(number for number, file in enumerate(self.files) if index in file)
        return number, (index - self.files[number].start) * self._window

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number, start = self._place(index)
        tokens = self._streams[number][start : start + self._window + 1]
        weight = torch.tensor(float("nan") if index in self._poisoned else 1.0)
        return {"inputs": tokens[:-1], "targets": tokens[1:], "weight": weight}

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}

    def describe(self, index: int) -> str:
        number, start = self._place(index)
        return f"stream {number}, tokens {start}-{start + self._window}"


class WholeToy(Backbone):
    """The toy as a plugin would bring it, as far as both directions share it: it reads sequences whole."""

    name: ClassVar[str] = "toy"
    causal: ClassVar[bool] = True
    options: ClassVar[type[BackboneOptions]] = ToyOptions
    data_options: ClassVar[type[DataOptions]] = ToyData
    ttt_defaults: ClassVar[dict[str, Any]] = {"preset": "lm", "mini_batch_size": 4}
    model: ClassVar[type[ToyModel]] = ToyModel
    adapted: ClassVar[type[Block]] = BlockWithTTT
    adapter: ClassVar[type[nn.Module]] = TTTAdapter

    def presets(self) -> dict[str, str]:
        return {"demo": f"backbone:\n  name: {self.name}\ntrain:\n  max_steps: 8\n  lr: 0.003\n"}

    def facts(self, config: RunConfig) -> BackboneFacts:
        options, data = config.backbone, config.data
        assert isinstance(options, ToyOptions)
        assert isinstance(data, ToyData)
        return BackboneFacts(
            dim=options.dim,
            num_heads=options.num_heads,
            num_layers=options.num_layers,
            tokens_per_window=data.window,
            window=f"a window of {data.window} tokens",
        )

    def build(self, options: BackboneOptions, *, device: torch.device | str, dtype: torch.dtype) -> ToyModel:
        assert isinstance(options, ToyOptions)
        if torch.device(device).type == "meta":
            with torch.device("meta"):
                return self.model(options).to(dtype).eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            model = self.model(options)
        return model.to(device=device, dtype=dtype).eval()

    def sites(self, model: nn.Module) -> list[Site]:
        assert isinstance(model, ToyModel)
        return [
            Site(
                layer=number,
                path=f"layers.{number}",
                module=block,
                dim=model.embedding.embedding_dim,
                num_heads=block.self_attn.num_heads,
                subclass=self.adapted,
                adapter=self.adapter,
            )
            for number, block in enumerate(model.layers)
            if isinstance(block, Block)
        ]

    def dataset(self, config: RunConfig, *, split: str, device: torch.device | str) -> ToyDataset:
        options, data = config.backbone, config.data
        assert isinstance(options, ToyOptions)
        assert isinstance(data, ToyData)
        path = data.eval_data if split == "eval" else data.train_data
        if path is not None:
            return ToyDataset(_read_streams(Path(path), options.vocabulary), data)
        return ToyDataset(
            [
                motif_stream(windows * data.window + 1, options.vocabulary, seed=number)
                for number, windows in enumerate(data.windows_of_files)
            ],
            data,
        )

    def loss(self, model: nn.Module, batch: Batch, config: RunConfig) -> LossOutput:
        logits = model(batch["inputs"])
        losses = F.cross_entropy(logits.flatten(0, 1).float(), batch["targets"].flatten(), reduction="none")
        loss = (losses.view_as(batch["targets"]).mean(1) * batch["weight"]).mean()
        hits = (logits.detach().argmax(-1) == batch["targets"]).float().mean()
        return LossOutput(loss, tokens=batch["inputs"].numel(), metrics={"accuracy": hits})

    def set_gradient_checkpointing(self, model: nn.Module, enabled: bool) -> None:
        assert isinstance(model, ToyModel)
        model.checkpointing = enabled

    def tiny(self) -> ToyOptions:
        return self.options(name=self.name, num_layers=2, dim=16, num_heads=2)

    def example_batch(self, model: nn.Module, *, batch_size: int, tokens: int, seed: int) -> Batch:
        assert isinstance(model, ToyModel)
        generator = torch.Generator().manual_seed(seed)
        vocabulary = model.embedding.num_embeddings
        drawn = torch.randint(vocabulary, (batch_size, tokens + 1), generator=generator)
        drawn = drawn.to(model.embedding.weight.device)
        weight = torch.ones(batch_size, device=drawn.device)
        return {"inputs": drawn[:, :-1], "targets": drawn[:, 1:], "weight": weight}

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["inputs"])

    def perturb(self, batch: Batch, *, token: int, row: int | None = None) -> Batch:
        inputs = batch["inputs"].clone()
        rows = slice(None) if row is None else slice(row, row + 1)
        inputs[rows, token:] = (inputs[rows, token:] + 1) % 2  # both are in every vocabulary, and never the same
        return {**batch, "inputs": inputs}


class ToyBackbone(WholeToy, Streaming):
    """The toy with a cache for each layer, which reads token by token as well."""

    def stream(self, model: nn.Module, batch: Batch, *, pieces: Sequence[int]) -> Tensor:
        assert isinstance(model, ToyModel)
        caches = [Cache() for _ in model.layers]
        return torch.cat([model(piece, caches) for piece in batch["inputs"].split(list(pieces), 1)], 1)


# --- the same in both directions ---


class TwoWayOptions(ToyOptions):
    """The `backbone` section."""

    name: str = "twoway"
    recompute_forward: bool = False
    """Checkpoint what TTT reads in order."""
    recompute_reverse: bool = False
    """Checkpoint what it reads in reverse."""


class TwoWayAttention(Attention):
    """Every token sees every other."""

    causal: ClassVar[bool] = False


class TwoWayBlock(Block):
    """A block that looks ahead as well as back."""

    attention: ClassVar[type[Attention]] = TwoWayAttention

    def __init__(self, options: ToyOptions) -> None:
        super().__init__(options)
        assert isinstance(options, TwoWayOptions)
        self.recompute = (options.recompute_forward, options.recompute_reverse)


class TwoWayAdapter(nn.Module):
    """One TTT layer over the sequence, then over the reversed one, each with a gate of its own."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        config: TTTConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.layer = TTTLayer(dim, num_heads, config, device=device, dtype=dtype)
        self.forward_gate = Gate(dim, config.initial_gating_alpha, device=device, dtype=dtype)
        self.backward_gate = Gate(dim, config.initial_gating_alpha, device=device, dtype=dtype)

    def forward(self, x: Tensor, recompute: tuple[bool, bool] = (False, False)) -> Tensor:
        for gate, again, reverse in (
            (self.forward_gate, recompute[0], False),
            (self.backward_gate, recompute[1], True),
        ):
            if gate.closed:
                continue
            y = checkpoint(self.read, x, reverse, use_reentrant=False) if again else self.read(x, reverse)
            x = gate(x, y)
        return x

    def read(self, x: Tensor, reverse: bool) -> Tensor:
        """What the layer answers, in the order of the tokens."""
        rotary = None
        if self.layer.config.rope == "backbone":
            positions = torch.arange(x.shape[1], device=x.device)
            wide = torch.promote_types(x.dtype, torch.float32)
            rotary = rotary_angles(positions, self.layer.head_width, theta=self.layer.config.rope_theta, dtype=wide)
        if not reverse:
            return self.layer(x, rotary=rotary)[0]
        if rotary is not None:
            rotary = (rotary[0].flip(0), rotary[1].flip(0))
        return self.layer(x.flip(1), rotary=rotary)[0].flip(1)


class TwoWayBlockWithTTT(TwoWayBlock):
    """What a block becomes."""

    ttt: TwoWayAdapter

    def after_attention(self, x: Tensor, cache: Cache | None) -> Tensor:
        return self.ttt(x, self.recompute)


class TwoWayModel(ToyModel):
    """Tokens `[B,T]` to logits of the tokens before noise."""

    block: ClassVar[type[Block]] = TwoWayBlock


class TwoWayToy(WholeToy):
    """The toy as a bidirectional backbone: no streaming, its own positions, two scans and two gates in each layer."""

    name: ClassVar[str] = "twoway"
    causal: ClassVar[bool] = False
    options: ClassVar[type[BackboneOptions]] = TwoWayOptions
    non_identity_options: ClassVar[frozenset[str]] = frozenset({"recompute_forward", "recompute_reverse"})
    ttt_defaults: ClassVar[dict[str, Any]] = {"preset": "video", "mini_batch_size": 4}
    model: ClassVar[type[ToyModel]] = TwoWayModel
    adapted: ClassVar[type[Block]] = TwoWayBlockWithTTT
    adapter: ClassVar[type[nn.Module]] = TwoWayAdapter

    def facts(self, config: RunConfig) -> BackboneFacts:
        options, around = config.backbone, int(config.train.gradient_checkpointing)
        assert isinstance(options, TwoWayOptions)
        scans = (around + options.recompute_forward, around + options.recompute_reverse)
        return replace(super().facts(config), checkpoints_around_scans=scans, gates=2)

    def tiny_like(self, options: BackboneOptions) -> BackboneOptions:
        assert isinstance(options, TwoWayOptions)
        kept = {name: getattr(options, name) for name in ("recompute_forward", "recompute_reverse")}
        return self.tiny().model_copy(update=kept)


# --- the same with everything that a plugin may have ---


class MakingToy(
    ToyBackbone, Sampling, Precomputing, DataReading, Indexing, WeightImport, DiffusionScoring, SegmentReset, LowRank
):
    """The toy that makes its data, samples, and reads weights of a program that calls the same things otherwise."""

    sample_suffix: ClassVar[str] = ".txt"

    def lora_sites(self, model: nn.Module, linears: Linears) -> Sequence[LoraSite]:
        inside = {"transformer": ("layers.",), "attention": ("self_attn.",), "feed_forward": ("linear1", "linear2")}
        return [
            LoraSite(path, module)
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and any(part in path for part in inside.get(linears, ("",)))
        ]

    def lora_shapes(self, options: BackboneOptions, linears: Linears) -> Mapping[tuple[int, int], int]:
        assert isinstance(options, ToyOptions)
        dim = options.dim
        widths = {"attention": [(dim, 3 * dim), (dim, dim)], "feed_forward": [(dim, 4 * dim), (4 * dim, dim)]}
        chosen = widths.get(linears, [*widths["attention"], *widths["feed_forward"]]) * options.num_layers
        return Counter([*chosen, (dim, options.vocabulary)] if linears == "all" else chosen)

    def plan_sample(self, config: RunConfig, *, seconds: float, out: Path) -> SamplePlan:
        if seconds % 2 or out.suffix != ".txt":
            raise UsageError("the toy samples segments of 2 s into a .txt")
        return SamplePlan(int(seconds // 2), (out, out.with_suffix(".log")))

    def check_sample(self, config: RunConfig, request: SampleRequest) -> None:
        super().check_sample(config, request)
        if request.guidance_scale > 20:
            raise UsageError(f"guidance of {request.guidance_scale:g} leads nowhere")

    def sample(
        self, model: nn.Module, request: SampleRequest, config: RunConfig, *, console: Console
    ) -> Sequence[Path]:
        """For each segment, tokens drawn one by one after those of its prompt, guided away from the other's."""
        assert isinstance(model, ToyModel)
        negative = request.negative_prompts or ("-",) * len(request.prompts)
        lines = []
        for prompt, avoided in zip(request.prompts, negative, strict=True):
            read = [self._tokens(model, text or "-") for text in (prompt, avoided)]
            for _ in range(request.steps):
                wanted, unwanted = (model(tokens)[:, -1] for tokens in read)
                logits = unwanted + request.guidance_scale * (wanted - unwanted)
                token = torch.multinomial(logits.softmax(-1), 1)
                read = [torch.cat([tokens, token], 1) for tokens in read]
            lines.append(" ".join(map(str, read[0][0, -request.steps :].tolist())))
        files = self.plan_sample(config, seconds=request.seconds, out=request.out).files
        write_text(files[0], "\n".join(lines) + "\n")
        write_text(files[1], f"{request}\n")
        return files

    def _tokens(self, model: ToyModel, text: str) -> Tensor:
        return torch.tensor([[ord(letter) % model.embedding.num_embeddings for letter in text]])

    def precompute(self, config: RunConfig, *, console: Console) -> None:
        """Write the synthetic streams to `data.train_data`."""
        options, data = config.backbone, config.data
        assert isinstance(options, ToyOptions)
        assert isinstance(data, ToyData)
        if data.train_data is None:
            raise UsageError("data.train_data: says where the data go; write a file")
        streams = [
            motif_stream(windows * data.window + 1, options.vocabulary, seed=number)
            for number, windows in enumerate(data.windows_of_files)
        ]
        write_text(Path(data.train_data), "".join(" ".join(map(str, s.tolist())) + "\n" for s in streams))
        console.print(f"{len(streams)} streams")

    def find_recordings(self, folder: Path) -> Sequence[Path]:
        return sorted(folder.rglob("*.txt"))

    def measure_recording(self, file: Path) -> float:
        return float(len(file.read_text().split()))

    def read_data(self, config: RunConfig, *, split: str, console: Console) -> Sequence[str]:
        """Streams of a single token are odd."""
        windows = self.dataset(config, split=split, device="cpu")
        odd = [
            windows.describe(number) for number in range(len(windows)) if len(windows[number]["inputs"].unique()) == 1
        ]
        console.print(f"{len(windows)} windows")
        return [f"{len(odd)} of {len(windows)} windows hold one token: {odd[0]}; write more"] if odd else []

    def num_timesteps(self, config: RunConfig) -> int:
        return 10

    def diffusion_losses(
        self, model: nn.Module, batch: Batch, config: RunConfig, *, timesteps: Tensor, seeds: Sequence[int]
    ) -> SegmentLosses:
        """The loss if each token is replaced with probability (t + 1)/10; the halves of a window are its segments."""
        assert isinstance(model, ToyModel)
        inputs, targets = batch["inputs"], batch["targets"]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        found = []
        for times in timesteps.unbind(1):
            replaced = torch.stack([torch.rand(inputs.shape[1], generator=each) for each in generators])
            others = [torch.randint(model.head.out_features, inputs.shape[1:], generator=each) for each in generators]
            noised = torch.where(replaced < (times[:, None] + 1) / 10, torch.stack(others), inputs)
            losses = F.cross_entropy(model(noised).transpose(1, 2).float(), targets, reduction="none")
            found.append(torch.stack([half.mean(1) for half in losses.chunk(2, 1)], 1))
        return SegmentLosses(torch.stack(found, 1), (0.5, 0.5))

    @contextlib.contextmanager
    def reset_at_segments(self, model: nn.Module) -> Iterator[None]:
        blocks = [module for module in model.modules() if isinstance(module, BlockWithTTT)]
        for block in blocks:
            block.resets = True
        try:
            yield
        finally:
            for block in blocks:
                block.resets = False

    def import_weights(self, source: Path, out: Path, *, console: Console) -> Sequence[Path]:
        """Tensors named `net.NAME` become `NAME`."""
        tensors = read_tensors(source)
        strange = [name for name in tensors if not name.startswith("net.")]
        if strange:
            raise UsageError(f"{source}: tensor {strange[0]}: not of the toy")
        for name in tensors:
            console.print(f"{name} -> {name.removeprefix('net.')}")
        out.mkdir(parents=True)
        named = {name.removeprefix("net."): tensor for name, tensor in tensors.items()}
        write_tensors(out / "model.safetensors", named, {})
        return [out / "model.safetensors"]


def motif_stream(length: int, vocabulary: int, *, seed: int) -> Tensor:
    """A motif of 5 to 8 random tokens, repeated, with one token in ten replaced at random."""
    generator = torch.Generator().manual_seed(1000 + seed)
    motif = torch.randint(vocabulary, (5 + seed % 4,), generator=generator)
    stream = motif.repeat(-(-length // len(motif)))[:length]
    noise = torch.rand(length, generator=generator) < 0.1
    return torch.where(noise, torch.randint(vocabulary, (length,), generator=generator), stream)


def _read_streams(path: Path, vocabulary: int) -> list[Tensor]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise EnvironmentProblem(f"{path}: {error.strerror}") from None
    streams = []
    for number, line in enumerate(lines, 1):
        tokens = [int(word) for word in line.split() if word.isdigit()]
        if len(tokens) != len(line.split()) or not all(token < vocabulary for token in tokens):
            raise EnvironmentProblem(f"{path}:{number}: tokens are whole numbers below {vocabulary}")
        streams.append(torch.tensor(tokens, dtype=torch.int64))
    return streams


class AnsweringToy(ToyBackbone, Answering):
    """The toy that answers a recording, which is a text of token numbers, with as many numbers."""

    def plan_answer(self, config: RunConfig, request: AnswerRequest) -> Sequence[Path]:
        return [request.out]

    def prepare_answers(
        self, model: nn.Module, config: RunConfig, *, console: Console
    ) -> Callable[[AnswerRequest], Sequence[Path]]:
        assert isinstance(model, ToyModel)

        def answer(request: AnswerRequest) -> Sequence[Path]:
            """Writes each number as soon as it is drawn."""
            tokens = torch.tensor([[int(word) for word in request.audio.read_text().split()]])
            with request.out.open("w") as file:
                for logits in model(tokens)[0]:
                    token = int(torch.multinomial(logits.softmax(-1), 1))
                    print(token, f"{float(logits.sum()):.3f}", file=file, flush=True)
                    if request.stereo:
                        raise OSError(28, "No space left on device")
            return [request.out]

        return answer
