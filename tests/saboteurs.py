"""Plugins that are wrong in ways a tired researcher would be, each caught by one law or one check."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from toy import (
    Attention,
    Block,
    BlockWithTTT,
    Cache,
    ToyBackbone,
    ToyDataset,
    ToyModel,
    TwoWayAdapter,
    TwoWayToy,
    WholeToy,
)

from ttt.adapter import TTTAdapter, gates_closed
from ttt.layer import TTTLayer
from ttt.plugins import Batch, LossOutput, ScoreFacts, Scores, Scoring, Site
from ttt.state import TTTState

# --- adapters and blocks ---


class KeepsFastWeights(BlockWithTTT):
    """Fast weights kept on the block, in place of a state that comes in and goes out."""

    fast: TTTState | None = None

    def after_attention(self, x: Tensor, cache: Cache | None) -> Tensor:
        if cache is not None:
            return super().after_attention(x, cache)
        port = self.ttt.port
        x, state = self.ttt.adapt(x, port.incoming if port else self.fast)
        self.fast = state.detach()
        if port is not None:
            port.outgoing = self.fast
        return x


class CheckpointsInTraining(ToyModel):
    """Recomputes in training mode alone, as Hugging Face's models do; every pass starts with fresh fast weights."""

    def forward(self, tokens: Tensor, caches: Sequence[Cache] | None = None) -> Tensor:
        x = self.embedding(tokens)
        for index, layer in enumerate(self.layers):
            layer.fast = None
            if self.checkpointing and self.training:
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x, caches[index] if caches is not None else None)
        return self.head(self.norm(x))


class FastWeightsOnTheLayer(ToyBackbone):
    """README's villain in a model that checkpoints in training mode only."""

    model: ClassVar[type[ToyModel]] = CheckpointsInTraining
    adapted: ClassVar[type[Block]] = KeepsFastWeights


class SwitchesNothing(ToyBackbone):
    """Switches activation checkpointing by an attribute that its model does not read."""

    def set_gradient_checkpointing(self, model: nn.Module, enabled: bool) -> None:
        model.gradient_checkpointing = enabled


class DropsByNumpy(Block):
    """Dropout from numpy's generator, which no recomputation sets back."""

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        if self.training:
            x = x * torch.from_numpy(np.random.rand(*x.shape) > 0.1).to(x)
        return super().forward(x, cache)


class LooksAheadInTraining(Attention):
    """Forgets its mask where it trains."""

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        self.causal = not self.training
        return super().forward(x, cache)


class ForgetsItsMask(Block):
    attention = LooksAheadInTraining


class OnlyInEvaluation(BlockWithTTT):
    """TTT that training never meets."""

    def after_attention(self, x: Tensor, cache: Cache | None) -> Tensor:
        return x if self.training else super().after_attention(x, cache)


class KeepsTheState(BlockWithTTT):
    """Calls the adapter beside its forward, and drops the state."""

    def after_attention(self, x: Tensor, cache: Cache | None) -> Tensor:
        return self.ttt.adapt(x)[0] if cache is None else super().after_attention(x, cache)


class KeepsTheStateIfAsked(KeepsTheState):
    asked = False

    def after_attention(self, x: Tensor, cache: Cache | None) -> Tensor:
        return super().after_attention(x, cache) if self.asked or cache is not None else self.ttt(x)


class StartsFresh(TTTAdapter):
    """Hands its state on, and starts from none."""

    def forward(self, x: Tensor, *, rotary: Any = None) -> Tensor:
        if self.port is not None:
            self.port.incoming = None
        return super().forward(x, rotary=rotary)


class StartsFreshInTraining(TTTAdapter):
    """Sure that states are for inference."""

    def forward(self, x: Tensor, *, rotary: Any = None) -> Tensor:
        if self.training and self.port is not None:
            self.port.incoming = None
        return super().forward(x, rotary=rotary)


class GroupsOfSixteen(TTTAdapter):
    """Sure of the literature's group size."""

    def __init__(self, dim, num_heads, config, **keywords):
        super().__init__(dim, num_heads, config.model_copy(update={"scan_checkpoint_group_size": 16}), **keywords)


class OwnTargetEps(TTTAdapter):
    """Sure of an epsilon of its own."""

    def __init__(self, dim, num_heads, config, **keywords):
        super().__init__(dim, num_heads, config.model_copy(update={"target_eps": 1e-8}), **keywords)


class AlwaysCausal(TwoWayAdapter):
    """Sure that TTT is causal."""

    def __init__(self, dim, num_heads, config, **keywords):
        super().__init__(dim, num_heads, config.model_copy(update={"causal": True}), **keywords)


class ReadsDetached(TTTAdapter):
    """No gradient through TTT to what is before it."""

    def adapt(self, x, state=None, *, rotary=None):
        y, state = self.layer(x.detach(), state, rotary=rotary)
        return self.gate(x, y), state


class GatedTwice(TTTAdapter):
    """tanh(α)² where tanh(α) is told."""

    def adapt(self, x, state=None, *, rotary=None):
        y, state = self.layer(x, state, rotary=rotary)
        return self.gate(x, self.gate(torch.zeros_like(x), y)), state


class ReadsTheBeginning(TwoWayAdapter):
    """The first eight tokens of any sequence."""

    def read(self, x: Tensor, reverse: bool) -> Tensor:
        return torch.cat([super().read(x[:, :8], reverse), torch.zeros_like(x[:, 8:])], 1)


class AddsTheBatch(TTTAdapter):
    """Shows every row the mean of all."""

    def adapt(self, x, state=None, *, rotary=None):
        y, state = self.layer(x + x.mean(0, keepdim=True), state, rotary=rotary)
        return self.gate(x, y), state


class ReadsPadding(TTTLayer):
    """A layer from before there were masks."""

    def forward(self, x, state=None, *, rotary=None, mask=None):
        return super().forward(x, state, rotary=rotary)


class CountsPadding(TTTLayer):
    """Sure that a token at zero rate is as good as none: it teaches nothing, but moves the boundary."""

    def forward(self, x, state=None, *, rotary=None, mask=None):
        if mask is None:
            return super().forward(x, state, rotary=rotary)
        y, state = super().forward(torch.where(mask[..., None], x, torch.nan), state, rotary=rotary)
        return y * mask[..., None], state


def with_layer(layer: type[TTTLayer], **settings: Any) -> type[TTTAdapter]:
    """The adapter around another layer."""

    class Adapter(TTTAdapter):
        def __init__(self, dim, num_heads, config, **keywords):
            super().__init__(dim, num_heads, config, **keywords)
            self.layer = layer(dim, num_heads, config.model_copy(update=settings), **keywords)

    return Adapter


class StreamsAnew(BlockWithTTT):
    """Every piece of a stream starts fresh."""

    def after_attention(self, x: Tensor, cache: Cache | None) -> Tensor:
        return self.ttt(x)


class ScoringToy(ToyBackbone, Scoring):
    """Scores each token but the first by the logits before it: an honest plugin."""

    def score_facts(self, config: Any) -> ScoreFacts:
        return ScoreFacts(medium="text", streams=("token",), weights={"token": (1.0,)}, chosen="token")

    def clip_reader(self, config: Any, *, device: Any) -> Any:
        raise NotImplementedError

    def example_clips(self, model: nn.Module, *, batch_size: int, tokens: int, seed: int) -> Tensor:
        return self.example_batch(model, batch_size=batch_size, tokens=tokens, seed=seed)["inputs"][:, None]

    def score(self, model: nn.Module, clips: Tensor) -> Scores:
        return ToyStream(model).read(clips)

    @contextlib.contextmanager
    def score_stream(self, model: nn.Module, *, batch_size: int) -> Iterator[ToyStream]:
        yield self.stream_of(model)

    def stream_of(self, model: nn.Module) -> ToyStream:
        return ToyStream(model)


class ToyStream:
    """A stream of tokens, with the logits of the last."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.caches = [Cache() for _ in model.layers]
        self.before: Tensor | None = None

    def read(self, piece: Tensor) -> Scores:
        mask = torch.ones_like(piece, dtype=torch.bool)
        logits = self.model(piece[:, 0], self.caches)
        if self.before is None:
            self.before, mask[:, :, 0] = torch.zeros_like(logits[:, :1]), False
        predicted = torch.cat([self.before, logits[:, :-1]], 1)
        self.before = logits[:, -1:]
        nll = F.cross_entropy(predicted.transpose(1, 2), piece[:, 0], reduction="none")[:, None]
        return Scores(nll * mask, mask)

    def finish(self) -> Scores:
        empty = self.before.new_zeros(len(self.before), 1, 0)
        return Scores(empty, empty.bool())

    def learn_anew(self) -> None:
        for cache in self.caches:
            cache.ttt = None


class LearnsAnewEachPiece(ToyStream):
    """Loses its fast weights between pieces."""

    def read(self, piece: Tensor) -> Scores:
        self.learn_anew()
        return super().read(piece)


class MasksEachStart(ToyStream):
    """Leaves out the first token of each piece, as if nothing had come before."""

    def read(self, piece: Tensor) -> Scores:
        self.before = None
        return super().read(piece)


class NarrowSite(Site):
    """Casts the adapter to the backbone's own type."""

    def attach(self, adapter: nn.Module) -> None:
        super().attach(adapter.to(self.module.linear1.weight.dtype))


# --- sites, facts, batches ---


class NarrowAdapters(ToyBackbone):
    def sites(self, model: nn.Module) -> list[Site]:
        return [NarrowSite(**vars(site)) for site in super().sites(model)]


class PathToNowhere(ToyBackbone):
    """Paths of the model as it was called once."""

    def sites(self, model: nn.Module) -> list[Site]:
        return [dataclasses.replace(site, path=f"blocks.{site.layer}") for site in super().sites(model)]


class OtherHeads(ToyBackbone):
    """Facts of another model."""

    def facts(self, config):
        return dataclasses.replace(super().facts(config), num_heads=8)


class OneSeed(ToyBackbone):
    """A batch that the seed does not change."""

    def example_batch(self, model, *, batch_size, tokens, seed):
        return super().example_batch(model, batch_size=batch_size, tokens=tokens, seed=0)


class PerturbsInPlace(ToyBackbone):
    """Writes to the batch that it should copy."""

    def perturb(self, batch, *, token, row=None):
        changed = super().perturb(batch, token=token, row=row)
        batch["weight"] *= 0.5
        return changed


class IgnoresDtype(ToyBackbone):
    """Builds in float32 whatever is asked: bfloat16 takes twice the memory that the check promised."""

    def build(self, options, *, device, dtype):
        return super().build(options, device=device, dtype=torch.float32)


class LeftInTraining(ToyBackbone):
    """Builds a model that still drops."""

    def build(self, options, *, device, dtype):
        return super().build(options, device=device, dtype=dtype).train()


class MisspeltDemo(ToyBackbone):
    """A demo with a key of another version."""

    def presets(self):
        return {"demo": super().presets()["demo"] + "  max_step: 9\n"}


class MoreGatesThanSaid(TwoWayToy):
    def facts(self, config):
        return dataclasses.replace(super().facts(config), gates=1)


# --- data ---


class Overlapping(ToyDataset):
    """Each file's windows begin with the last one of the file before."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.files = [range(max(file.start - 1, 0), file.stop) for file in self.files]


class RandomCrops(ToyDataset):
    """Another crop each time, as in vision."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        shift = int(torch.randint(1, 8, ()))
        return {key: value.roll(shift) if value.dim() else value for key, value in item.items()}


class Unordered(ToyDataset):
    """No `files`."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.spans = self.files
        del self.files

    def _place(self, index):
        number = next(number for number, file in enumerate(self.spans) if index in file)
        return number, (index - self.spans[number].start) * self._window

    def __len__(self):
        return self.spans[-1].stop


class Nameless(ToyDataset):
    def describe(self, index):
        return "a stream"


class CollatesTheFirst(ToyDataset):
    """Stacks one window as often as there are windows."""

    def collate(self, samples):
        return super().collate([samples[0]] * len(samples))


class OneBuffer(ToyDataset):
    """Fills one buffer anew for each window, as in C."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        if not hasattr(self, "_buffer"):
            self._buffer = {key: value.clone() for key, value in item.items()}
        for key, value in item.items():
            self._buffer[key].copy_(value)
        return dict(self._buffer)


class OtherData(ToyBackbone):
    data: ClassVar[type[ToyDataset]] = ToyDataset

    def dataset(self, config, *, split, device):
        made = super().dataset(config, split=split, device=device)
        return self.data(made._streams, config.data)


# --- losses ---


class TensorLoss(ToyBackbone):
    def loss(self, model: nn.Module, batch: Batch, config: Any) -> Any:
        return super().loss(model, batch, config).loss


class DetachedLoss(ToyBackbone):
    def loss(self, model, batch, config):
        output = super().loss(model, batch, config)
        return LossOutput(output.loss.detach(), output.tokens)


class SummedLoss(ToyBackbone):
    """A sum over the batch, which learns faster the larger the batch is."""

    def loss(self, model, batch, config):
        output = super().loss(model, batch, config)
        return LossOutput(output.loss * len(batch["inputs"]), output.tokens)


class WarmsUp(ToyBackbone):
    """Weighs its loss by how often it was asked, which a resumed run does not know."""

    calls = 0

    def loss(self, model, batch, config):
        self.calls += 1
        output = super().loss(model, batch, config)
        return LossOutput(output.loss * min(1.0, self.calls / 100), output.tokens)


class CountsRows(ToyBackbone):
    def loss(self, model, batch, config):
        return LossOutput(super().loss(model, batch, config).loss, len(batch["inputs"]))


class LossWithoutTTT(ToyBackbone):
    """Left over from a comparison."""

    def loss(self, model, batch, config):
        with gates_closed(model):
            return super().loss(model, batch, config)


class LossKeepsTheState(ToyBackbone):
    """Hands states on in `outputs`, where the laws look, and not in the loss."""

    adapted: ClassVar[type[Block]] = KeepsTheStateIfAsked

    def loss(self, model, batch, config):
        for layer in model.layers:
            layer.asked = True
        try:
            return super().loss(model, batch, config)
        finally:
            for layer in model.layers:
                layer.asked = False


class LossInEvaluationMode(ToyBackbone):
    """Left over from a notebook: nothing drops, and nothing that asks for training recomputes."""

    def loss(self, model, batch, config):
        return super().loss(model.eval(), batch, config)


class LossInTrainingMode(ToyBackbone):
    """Evaluations that drop."""

    def loss(self, model, batch, config):
        return super().loss(model.train(), batch, config)


class MetricsWithGraph(ToyBackbone):
    def loss(self, model, batch, config):
        output = super().loss(model, batch, config)
        return LossOutput(output.loss, output.tokens, {"nats": output.loss})


class CountsSomeTokens(ToyBackbone):
    """Two means, over the tokens that are even and over those that are odd; some windows have more of one kind."""

    def loss(self, model, batch, config):
        losses = self._losses(model, batch)
        even, odd = ((losses * kind).sum() / kind.sum().clamp_min(1) for kind in self._kinds(batch))
        means = torch.stack((even, 3 * odd))
        metrics = {"even_loss": even.detach(), "odd_loss": odd.detach()}
        over = {"even_loss": 0, "odd_loss": 1}
        return LossOutput(means.sum(), batch["inputs"].numel(), metrics, means=means, metrics_over=over)

    def loss_weights(self, batch, config):
        return torch.stack([kind.sum(dtype=torch.float64) for kind in self._kinds(batch)])

    def _losses(self, model, batch):
        logits = model(batch["inputs"]).flatten(0, 1)
        return F.cross_entropy(logits, batch["targets"].flatten(), reduction="none").view_as(batch["targets"])

    def _kinds(self, batch):
        return batch["targets"] % 2 == 0, batch["targets"] % 2 == 1


class WeighsRows(CountsSomeTokens):
    """Left out when padding was left out of the loss."""

    def loss_weights(self, batch, config):
        return torch.full((2,), float(len(batch["inputs"])))


class WeighsBatches(ToyBackbone):
    def loss_weights(self, batch, config):
        return torch.ones(1)


class WeighsInTheOtherOrder(CountsSomeTokens):
    def loss_weights(self, batch, config):
        return super().loss_weights(batch, config).flip(0)


class MetricOverTheOther(CountsSomeTokens):
    def loss(self, model, batch, config):
        return dataclasses.replace(super().loss(model, batch, config), metrics_over={})


class MeansOfOther(CountsSomeTokens):
    """Forgot a factor."""

    def loss(self, model, batch, config):
        output = super().loss(model, batch, config)
        return dataclasses.replace(output, means=output.means / 2)


class OneMeanTooFew(CountsSomeTokens):
    def loss(self, model, batch, config):
        return dataclasses.replace(super().loss(model, batch, config), means=None)


class MetricsAsTheyCome(ToyBackbone):
    """A metric only of batches with more than one window."""

    def loss(self, model, batch, config):
        output = super().loss(model, batch, config)
        return output if len(batch["inputs"]) > 1 else dataclasses.replace(output, metrics={})


class FailingLoss(ToyBackbone):
    def loss(self, model, batch, config):
        return super().loss(model, {"inputs": batch["tokens"]}, config)


# --- all of them ---


def toy(base: type[WholeToy] = ToyBackbone, **parts: Any) -> WholeToy:
    """The toy with another part: `model`, `adapted` (the block with TTT), `adapter`, `data`."""
    return type("Saboteur", (base,), parts)()


def with_block(plain: type[Block]) -> WholeToy:
    """The toy with other blocks, before and after injection."""
    adapted = type("Adapted", (BlockWithTTT, plain), {})
    return toy(model=type("Model", (ToyModel,), {"block": plain}), adapted=adapted)


def scoring(stream: type[ToyStream]) -> ScoringToy:
    """A toy whose scores in pieces are made by such a stream."""
    return type("Scoring", (ScoringToy,), {"stream_of": lambda self, model: stream(model)})()


SABOTEURS: dict[str, tuple[WholeToy, int | str, str]] = {
    # name: (plugin, the law or check that catches it, what it says)
    "fast weights on the layer": (
        FastWeightsOnTheLayer(),
        2,
        "away from what no checkpoint gives|recomputation differs",
    ),
    "checkpointing that is not switched": (SwitchesNothing(), 2, r"makes no further forward of layers.0.ttt"),
    "dropout of numpy": (with_block(DropsByNumpy), 2, "away from what no checkpoint gives"),
    "looks ahead in training": (with_block(ForgetsItsMask), 3, "changes the output at 0 in training mode"),
    "streams start anew": (toy(adapted=StreamsAnew), 4, "the streamed model is"),
    "scores learn anew": (scoring(LearnsAnewEachPiece), 4, "a stream's scores are .* away from the whole"),
    "scores start anew": (scoring(MasksEachStart), 4, "a stream's scores are inf away"),
    "rows meet": (toy(adapter=AddsTheBatch), 5, "changing row 0 of a batch changes another row"),
    "mask not read": (toy(adapter=with_layer(ReadsPadding)), 5, "with a mask .* is inf away"),
    "padding counts": (
        toy(adapter=with_layer(CountsPadding, skip_nonfinite_tokens=True)),
        5,
        r"with a mask layers.0.ttt is \d.* away from reading each row's counted tokens alone",
    ),
    "state kept back": (toy(adapted=KeepsTheState), 8, "no state of it reaches `ttt.adapter.carried`"),
    "state not taken up": (toy(adapter=StartsFresh), 8, "the layer does not start from the state"),
    "state not taken up in training": (
        toy(adapter=StartsFreshInTraining),
        8,
        "in training mode the layer does not start from the state",
    ),
    "group size not read": (toy(adapter=GroupsOfSixteen), 8, "scan_checkpoint_group_size: 1 changes nothing"),
    "an epsilon not read": (toy(adapter=OwnTargetEps), 8, "ttt.target_eps: 0.5 changes nothing"),
    "causal not read": (toy(TwoWayToy, adapter=AlwaysCausal), 8, "ttt.causal: True changes nothing"),
    "only in evaluation": (toy(adapted=OnlyInEvaluation), 10, "never reached in training mode"),
    "reads detached": (toy(adapter=ReadsDetached), 10, "the tokens that layers.0.ttt reads are detached"),
    "gated twice": (toy(adapter=GatedTwice), 10, "twice the gate has 4.0 times the effect"),
    "adapter in half precision": (NarrowAdapters(), 10, "is bfloat16 in a bfloat16 backbone"),
    "misspelt demo": (MisspeltDemo(), "presets", "TTT101 unknown key `max_step`"),
    "other heads": (OtherHeads(), "facts", "it says num_heads .* 8, but the model has 4"),
    "more gates than said": (MoreGatesThanSaid(), "facts", "it says gates 1, but the model has 2"),
    "one seed": (OneSeed(), "model", "example_batch: another seed gives the same batch"),
    "perturbs in place": (PerturbsInPlace(), "model", "perturb: it writes to the batch"),
    "left in training": (LeftInTraining(), "model", "build: .* in training mode; end with model.eval"),
    "dtype not read": (IgnoresDtype(), "model", "asked for dtype bfloat16, it makes no parameter of that type"),
    "one buffer": (toy(OtherData, data=OneBuffer), "dataset", "reading a window changes one that was read before"),
    "loss warms up": (WarmsUp(), "loss", "of one batch under one seed it is .*, then "),
    "files overlap": (
        toy(OtherData, data=Overlapping),
        "dataset",
        r"returned an Overlapping whose `files` has range\(4, 7\)",
    ),
    "random crops": (toy(OtherData, data=RandomCrops), "dataset", "window 0 is another one when it is read again"),
    "first window alone": (toy(OtherData, data=CollatesTheFirst), "dataset", "whatever its second window is"),
    "loss in evaluation mode": (LossInEvaluationMode(), "loss", "it switches the model to evaluation mode"),
    "loss in training mode": (LossInTrainingMode(), "loss", "it switches the model to training mode"),
    "no files": (toy(OtherData, data=Unordered), "dataset", "it returned an Unordered without `files`"),
    "nameless windows": (toy(OtherData, data=Nameless), "dataset", "says 'a stream' of windows 0 and"),
    "reads the beginning": (toy(TwoWayToy, adapter=ReadsTheBeginning), "loss", "tokens_per_window 24, but .* reads 8"),
    "loss is a tensor": (TensorLoss(), "loss", "it returned a Tensor, not a LossOutput"),
    "loss is detached": (DetachedLoss(), "loss", "`loss` is detached"),
    "loss is a sum": (SummedLoss(), "loss", "it is not a mean over the batch"),
    "loss counts rows": (CountsRows(), "loss", "`tokens` is 1 of 1 windows, but the facts say 24"),
    "loss without TTT": (LossWithoutTTT(), "loss", "TTT makes no difference"),
    "loss keeps the state": (LossKeepsTheState(), "loss", "hands no state of this TTT layer on"),
    "metrics with their graph": (MetricsWithGraph(), "loss", r"`metrics\['nats'\]` is not a detached scalar"),
    "weighs rows": (
        WeighsRows(),
        "loss",
        "WeighsRows.loss_weights: the loss of 4 windows is .* read at once, but .* read",
    ),
    "weighs batches": (WeighsBatches(), "loss", "the loss of 4 windows is .* read at once, but"),
    "weighs in the other order": (WeighsInTheOtherOrder(), "loss", "the loss of 4 windows is .* read at once, but"),
    "metric over the other": (MetricOverTheOther(), "loss", "the metric odd_loss of 4 windows is .* read at once, but"),
    "means of other": (MeansOfOther(), "loss", "`means` are .*, but `loss`, their sum, is"),
    "one mean too few": (OneMeanTooFew(), "loss", "a loss of 1 means, but `loss_weights` gives 2 sums of weights"),
    "metrics as they come": (MetricsAsTheyCome(), "loss", r"metrics are \['accuracy'\] of some windows and \[\] of"),
    "loss that fails": (
        FailingLoss(),
        "loss",
        r"FailingLoss.loss: the plugin toy .* failed in `loss`, .*saboteurs.py:\d+: KeyError: 'tokens'",
    ),
}
