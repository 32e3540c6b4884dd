"""A checkpoint of TTT-Video becomes this project's files, and the function stays what it was.

The published model is defined here once more, straight from its equations and over a state dict with its names; the
inner steps take their gradients from autograd.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp
from torch.nn import functional as F

from ttt.adapter_file import backbone_identity, load_adapter, read_info
from ttt.errors import EnvironmentProblem, TTTError, UsageError
from ttt_cli.main import main
from ttt_videodit import weights
from ttt_videodit.building import build
from ttt_videodit.diffusion import training_loss
from ttt_videodit.model import VideoDiT, sites
from ttt_videodit.options import VideoDiTOptions
from ttt_videodit.options import sizes as sizes_of
from ttt_videodit.plugin import VideoDiTBackbone

D, HEADS, BLOCKS, TEXT, CHANNELS, TIME = 32, 2, 2, 12, 16, 24
WIDTH = D // HEADS
State = dict[str, Tensor]
import_weights = functools.partial(weights.import_weights, backbone=VideoDiTBackbone())


# --- the published model ---


def published_state(layer_type: str, *, blocks: int = BLOCKS, seed: int = 0) -> State:
    """A state dict with TTT-Video's names, far from its initial values so that every tensor matters."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 0.2, mean: float = 0.0) -> Tensor:
        return mean + std * torch.randn(shape, generator=generator, dtype=torch.float64)

    state: State = {}

    def linear(name: str, outputs: int, *inputs: int) -> None:
        state[f"{name}.weight"] = normal(outputs, *inputs, std=1 / math.sqrt(math.prod(inputs)))
        state[f"{name}.bias"] = normal(outputs)

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = normal(width, mean=1.0), normal(width)

    linear("dit.time_embed.0", TIME, D)
    linear("dit.time_embed.2", TIME, TIME)
    linear("dit.patch_embedding.vid_proj", D, CHANNELS, 2, 2)
    linear("dit.patch_embedding.text_proj", D, TEXT)
    for index in range(blocks):
        block = f"dit.layers.{index}"
        for part in ("pre_seq", "pre_mlp"):
            norm(f"{block}.{part}_layernorm", D)
            linear(f"{block}.{part}_adaLN_modulation.1", 6 * D, TIME)
        linear(f"{block}.mlp.layer1", 4 * D, D)
        linear(f"{block}.mlp.layer2", D, 4 * D)
        for part in ("q_norm", "k_norm"):
            norm(f"{block}.seq_modeling_block.{part}", WIDTH)
        for part in "qkvo":
            linear(f"{block}.seq_modeling_block.{part}", D, D)
            linear(f"{block}.seq_modeling_block.ssm.ttt.w{part}", D, D)
        ttt = f"{block}.seq_modeling_block.ssm.ttt"
        norm(f"{ttt}.post_norm", D)
        widths = (WIDTH, 4 * WIDTH, WIDTH) if layer_type == "mlp" else (WIDTH, WIDTH)
        for number, (fan_in, fan_out) in enumerate(itertools.pairwise(widths), 1):
            state[f"{ttt}.W{number}"] = normal(HEADS, fan_in, fan_out)
            state[f"{ttt}.b{number}"] = normal(HEADS, 1, fan_out)
        state[f"{ttt}.ttt_norm_weight"] = normal(HEADS, WIDTH, mean=1.0)
        state[f"{ttt}.ttt_norm_bias"] = normal(HEADS, WIDTH)
        state[f"{ttt}.learnable_ttt_lr_weight"] = normal(HEADS, 1, D)
        state[f"{ttt}.learnable_ttt_lr_bias"] = normal(HEADS, 1)
        for way, part in itertools.product(("forward", "backward"), ("video", "text")):
            state[f"{block}.seq_modeling_block.{way}_ssm_gating_{part}.gating_alpha"] = normal(D, std=0.5)
    norm("dit.transformer_norm", D)
    linear("dit.final_layer.adaLN_modulation.1", 2 * D, TIME)
    norm("dit.final_layer.norm", D)
    linear("dit.final_layer.linear", 4 * CHANNELS, D)
    return state


class Published:
    """TTT-Video's `DiffusionTransformer`, by a state dict.

    `rates_as_published`: a token of the interleaved sequence learns at a rate of the mini-batch that it was in before
    the interleaving, as in its `process_input` and kernels; else at its own.
    """

    def __init__(self, state: State, *, mini_batch_size: int, base_lr: float, rates_as_published: bool = False) -> None:
        self.state, self.size, self.base_lr = state, mini_batch_size, base_lr
        self.rates_as_published = rates_as_published

    def __call__(self, latents: Tensor, texts: Tensor, times: Tensor) -> Tensor:
        """Latents `[B,Fr,C,h,w]` and texts `[B,S,L,E]` to velocities."""
        self.lies_as(latents, texts, times)
        weight, bias = (self.state[f"dit.patch_embedding.vid_proj.{name}"] for name in ("weight", "bias"))
        patches = F.conv2d(latents.flatten(0, 1), weight, bias, stride=2)
        video = patches.flatten(2).transpose(1, 2).reshape(latents.shape[0], -1, D)
        text = self.linear("patch_embedding.text_proj", texts).flatten(1, 2)
        for index in range(BLOCKS):
            video, text = self.block(f"layers.{index}", video, text)
        video = self.norm("transformer_norm", video)
        shift, scale = self.linear("final_layer.adaLN_modulation.1", self.time)[:, None].chunk(2, dim=-1)
        video = self.linear("final_layer.linear", self.norm("final_layer.norm", video) * (1 + scale) + shift)
        video = video.reshape(-1, *self.sides, CHANNELS, 2, 2).permute(0, 1, 4, 2, 5, 3, 6)
        return video.reshape(latents.shape)

    def lies_as(self, latents: Tensor, texts: Tensor, times: Tensor) -> None:
        """Take the sizes of a video, and the embedding of its time."""
        frames, _, height, width = latents.shape[1:]
        self.sides, self.segments, self.text = (frames, height // 2, width // 2), texts.shape[1], texts.shape[2]
        # In float32 whatever the model is in, there and in diffusers: at t = 800 that shows in the fifth digit.
        angles = times[:, None].float() * torch.exp(-math.log(10000) * torch.arange(D // 2).float() / (D // 2))
        time = self.linear("time_embed.0", torch.cat((angles.cos(), angles.sin()), dim=-1).double())
        time = self.linear("time_embed.2", F.silu(time))
        self.time = F.silu(time)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"dit.{name}.weight"], self.state[f"dit.{name}.bias"])

    def heads(self, name: str, x: Tensor) -> Tensor:
        return self.linear(name, x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.state[f"dit.{name}.weight"], self.state[f"dit.{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, eps=1e-6)

    def block(self, name: str, video: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        def modulated(part: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            changes = self.linear(f"{name}.{part}_adaLN_modulation.1", self.time)[:, None].chunk(6, dim=-1)
            normed = [self.norm(f"{name}.{part}_layernorm", tokens) for tokens in (video, text)]
            return (
                normed[0] * (1 + changes[1]) + changes[0],
                normed[1] * (1 + changes[4]) + changes[3],
                changes[2],
                changes[5],
            )

        video_in, text_in, video_gate, text_gate = modulated("pre_seq")
        tokens = self.both_directions(name, self.attention(name, video_in, text_in))
        here = text.shape[1]
        video, text = video + video_gate * tokens[:, here:], text + text_gate * tokens[:, :here]
        video_in, text_in, video_gate, text_gate = modulated("pre_mlp")

        def feed_forward(x: Tensor) -> Tensor:
            return self.linear(f"{name}.mlp.layer2", F.gelu(self.linear(f"{name}.mlp.layer1", x), approximate="tanh"))

        return video + video_gate * feed_forward(video_in), text + text_gate * feed_forward(text_in)

    def turned(self, tokens: Tensor, frames: int) -> Tensor:
        """Video tokens `[…,V,F]`, adjacent pairs turned by time, height and width."""
        angles = []
        for axis, width in enumerate((WIDTH // 4, WIDTH // 8 * 3, WIDTH // 8 * 3)):
            places = torch.cartesian_prod(*(torch.arange(n) for n in (frames, *self.sides[1:])))[:, axis]
            waves = 10000 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
            angles.append(places[:, None] * waves)
        turn = torch.polar(torch.ones((), dtype=torch.float64), torch.cat(angles, dim=-1))
        pairs = torch.view_as_complex(tokens.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    def attention(self, name: str, video: Tensor, text: Tensor) -> Tensor:
        """Each segment alone; frames that two share are averaged."""
        block, per_frame = f"{name}.seq_modeling_block", self.sides[1] * self.sides[2]
        total, count = torch.zeros_like(video), torch.zeros(video.shape[1], 1, dtype=torch.float64)
        texts = []
        for segment in range(self.segments):
            seen = slice(12 * segment * per_frame, (12 * segment + 13) * per_frame)
            words = text[:, segment * self.text : (segment + 1) * self.text]
            tokens = torch.cat((words, video[:, seen]), dim=1)
            q, k, v = (self.heads(f"{block}.{part}", tokens) for part in "qkv")
            q, k = self.norm(f"{block}.q_norm", q), self.norm(f"{block}.k_norm", k)
            q, k = (torch.cat((x[:, :, : self.text], self.turned(x[:, :, self.text :], 13)), dim=2) for x in (q, k))
            weights = (q @ k.transpose(-1, -2) / math.sqrt(WIDTH)).softmax(dim=-1)
            answer = self.linear(f"{block}.o", (weights @ v).transpose(1, 2).flatten(2))
            texts.append(answer[:, : self.text])
            total[:, seen] += answer[:, self.text :]
            count[seen] += 1
        return torch.cat((*texts, total / count), dim=1)

    def both_directions(self, name: str, tokens: Tensor) -> Tensor:
        for way in ("forward", "backward"):
            reads = self.reversed(tokens) if way == "backward" else tokens
            answers = self.ttt(f"{name}.seq_modeling_block.ssm.ttt", reads)
            answers = self.reversed(answers) if way == "backward" else answers
            text, video = (
                torch.tanh(self.state[f"dit.{name}.seq_modeling_block.{way}_ssm_gating_{part}.gating_alpha"])
                for part in ("text", "video")
            )
            here = self.segments * self.text
            tokens = tokens + torch.cat((text * answers[:, :here], video * answers[:, here:]), dim=1)
        return tokens

    def reversed(self, tokens: Tensor) -> Tensor:
        """Texts in the other order, each as it was; video tokens last first."""
        here = self.segments * self.text
        texts = tokens[:, :here].split(self.text, dim=1)
        return torch.cat((*reversed(texts), tokens[:, here:].flip(1)), dim=1)

    def interleaving(self) -> Tensor:
        """Which token is read i-th."""
        per_frame, here = self.sides[1] * self.sides[2], self.segments * self.text
        order: list[int] = []
        for segment in range(self.segments):
            order += range(segment * self.text, (segment + 1) * self.text)
            first = here + (0 if segment == 0 else 12 * segment + 1) * per_frame
            order += range(first, here + (12 * (segment + 1) + 1) * per_frame)
        return torch.tensor(order)

    def ttt(self, name: str, tokens: Tensor, *, eps: float = 1e-6) -> Tensor:
        """One pass of the layer over the tokens; ε is that of the kernels, `ttt.cu` and `linear_forward.py`."""
        parameter = {key.removeprefix(f"dit.{name}."): value for key, value in self.state.items() if name in key}
        gamma, beta = parameter["ttt_norm_weight"][:, None], parameter["ttt_norm_bias"][:, None]
        here = self.segments * self.text
        q, k, v = (self.heads(f"{name}.w{part}", tokens) for part in "qkv")
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        q, k = (torch.cat((x[:, :, :here], self.turned(x[:, :, here:], self.sides[0])), dim=2) for x in (q, k))
        raw = v - k
        target = gamma * (raw - raw.mean(-1, keepdim=True)) / (raw.std(-1, keepdim=True) + 1e-8) + beta
        rate = torch.einsum("btd,hd->bht", tokens, parameter["learnable_ttt_lr_weight"][:, 0])
        rate = self.base_lr / WIDTH / self.size * torch.sigmoid(rate + parameter["learnable_ttt_lr_bias"])
        order = self.interleaving()
        q, k, target = (x[:, :, order] for x in (q, k, target))
        rate = rate[:, :, self.rates_of(order) if self.rates_as_published and self.segments > 1 else order]

        def inner(z: Tensor, fast: list[Tensor]) -> Tensor:
            z = z @ fast[0] + fast[1]
            return z if len(fast) == 2 else F.gelu(z, approximate="tanh") @ fast[2] + fast[3]

        def normed(z: Tensor) -> Tensor:
            centred = z - z.mean(-1, keepdim=True)
            return gamma * centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() + beta

        opening = [parameter[key] for key in ("W1", "b1", "W2", "b2") if key in parameter]
        fast = [w.expand(tokens.shape[0], *w.shape) for w in opening]
        answers = []
        for start in range(0, tokens.shape[1], self.size):
            batch = slice(start, start + self.size)
            followed = opening[0].requires_grad  # a gradient of the whole, through what was learned
            leaves = fast if followed else [w.detach().requires_grad_() for w in fast]
            error = (normed(inner(k[:, :, batch], leaves)) - target[:, :, batch]).square().sum(-1) / 2
            gradients = torch.autograd.grad((rate[:, :, batch] * error).sum(), leaves, create_graph=followed)
            fast = [w - g if followed else w.detach() - g for w, g in zip(leaves, gradients, strict=True)]
            answers.append(q[:, :, batch] + normed(inner(q[:, :, batch], fast)))
        whole = torch.cat(answers, dim=2).transpose(1, 2).flatten(2)
        answers_read = self.linear(f"{name}.wo", self.norm(f"{name}.post_norm", whole))
        lying = torch.empty_like(answers_read)
        lying[:, order] = answers_read
        return lying

    def rates_of(self, order: Tensor) -> Tensor:
        """Whose rate the i-th token that is read learns at: in every mini-batch, that of its last token's old one."""
        last = order.view(-1, self.size)[:, -1:]
        return (last // self.size * self.size + torch.arange(self.size)).flatten()


# --- the function ---


@pytest.fixture(scope="module")
def console() -> Console:
    return Console(width=200, record=True)


def save(state: Any, path: Path) -> Path:
    """As a `.pt`, or as safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def imported(source: Path, console: Console) -> VideoDiT:
    """The model of an imported checkpoint, in float64, on a grid of tokens that starts at 0 as the published one."""
    out = source.parent / "converted"
    assert import_weights(source, out, console=console) == [out / "transformer", out / "adapter"]
    options = VideoDiTOptions(preset="5b", pretrained=str(out))
    model = build(options, device="cpu", dtype=torch.float64)
    identity = backbone_identity(VideoDiTBackbone(), options)
    load_adapter(out / "adapter", model, sites=sites(model), backbone=identity, causal=False)
    return model


def video(segments: int, text_length: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(segments)
    latents = torch.randn(2, 12 * segments + 1, CHANNELS, height, width, generator=generator, dtype=torch.float64)
    texts = torch.randn(2, segments, text_length, TEXT, generator=generator, dtype=torch.float64)
    return latents, texts, torch.tensor([250, 800])


@pytest.mark.parametrize(
    ("layer_type", "segments", "text_length", "height", "width", "as_published"),
    [
        ("mlp", 1, 38, 4, 2, True),  # one segment is not interleaved
        ("mlp", 2, 64, 16, 16, True),  # segments of whole mini-batches
        ("mlp", 3, 30, 4, 6, False),  # 3 · 30 + 37 · 6 tokens: 4 mini-batches and 56 tokens of an open one
        ("linear", 1, 5, 4, 6, True),
        ("linear", 3, 10, 4, 4, False),
    ],
)
def test_the_imported_model_is_the_published_function(
    layer_type: str,
    segments: int,
    text_length: int,
    height: int,
    width: int,
    as_published: bool,
    tmp_path: Path,
    console: Console,
) -> None:
    state = published_state(layer_type)
    model = imported(save(state, tmp_path / "model.pt"), console)
    model.register_to_config(sample_height=height, sample_width=width)
    latents, texts, times = video(segments, text_length, height, width)
    size, base_lr = (64, 0.1) if layer_type == "mlp" else (16, 1.0)
    expected = Published(state, mini_batch_size=size, base_lr=base_lr, rates_as_published=as_published)(
        latents, texts, times
    )
    with torch.no_grad():
        answered = model(latents, texts, times).sample
    torch.testing.assert_close(answered, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("segments", "text_length", "height", "width", "least", "most"),
    [
        (1, 12, 8, 8, 0, 0),  # 12 + 13 · 16 tokens, not whole; one segment is not interleaved
        (3, 16, 8, 8, 1e-3, 4e-3),  # 3 · 16 + 37 · 16 = 10 · 64 tokens
        (6, 8, 8, 8, 1e-3, 4e-3),  # 6 · 8 + 73 · 16 = 19 · 64
    ],
)
def test_the_published_rates_of_segments_that_cut_mini_batches_are_those_of_other_tokens(
    segments: int,
    text_length: int,
    height: int,
    width: int,
    least: float,
    most: float,
    tmp_path: Path,
    console: Console,
) -> None:
    # Interleaving moves its rates by mini-batches of the order before; here a token has its own. Alike where segments
    # are whole mini-batches, which no published length has. How far the model's output is from the published one is
    # what docs/videodit.md says.
    state = published_state("mlp")
    model = imported(save(state, tmp_path / "model.pt"), console)
    model.register_to_config(sample_height=height, sample_width=width)
    latents, texts, times = video(segments, text_length, height, width)
    with torch.no_grad():
        answered = model(latents, texts, times).sample
    own, other = (
        Published(state, mini_batch_size=64, base_lr=0.1, rates_as_published=published)(latents, texts, times)
        for published in (False, True)
    )
    torch.testing.assert_close(answered, own, rtol=1e-6, atol=1e-6)
    assert least <= (other - own).norm() / own.norm() <= most


# --- the same, part by part, in float32 ---

MOST_AWAY = 1e-5


def away(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


class Recorded(torch.nn.Module):
    """A model, and what it was last asked and answered."""

    def __init__(self, model: VideoDiT) -> None:
        super().__init__()
        self.model = model

    def forward(self, **asked: Any) -> Any:
        self.asked, self.answer = asked, self.model(**asked)
        return self.answer


def signal_shares() -> Tensor:
    """ᾱ of CogVideoX's 1000 timesteps, rescaled so that the last leaves no signal."""
    roots = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64)
    signal = (1 - roots.square()).cumprod(0).sqrt()
    return ((signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])).square()


@pytest.mark.parametrize("segments", [1, 3, 6])
@pytest.mark.parametrize("layer_type", ["mlp", "linear"])
def test_layer_block_model_and_loss_are_the_published_ones_in_float32(
    layer_type: str, segments: int, tmp_path: Path, console: Console
) -> None:
    """Segments of 13 · 4 + 10 and 12 · 4 + 10 tokens, which cut mini-batches of 64 and of 16."""
    state = published_state(layer_type)
    model = imported(save(state, tmp_path / "model.pt"), console).float()
    model.register_to_config(sample_height=4, sample_width=4)
    size, base_lr = (64, 0.1) if layer_type == "mlp" else (16, 1.0)
    published = Published(state, mini_batch_size=size, base_lr=base_lr)
    latents, texts, _ = (x[:1] for x in video(segments, 10, 4, 4))
    seen: dict[str, tuple[Any, Any]] = {}

    def keep(name: str) -> Any:
        return lambda module, args, kwargs, result: seen.setdefault(name, (args or kwargs, result)) and None

    block = model.transformer_blocks[0]
    block.register_forward_hook(keep("block"), with_kwargs=True)
    block.attn1.ttt.layer.register_forward_hook(keep("layer"), with_kwargs=True)
    recorded = Recorded(model)
    recorded.get_parameter = model.get_parameter  # type: ignore[method-assign]
    batch = {"mean": latents.float(), "std": torch.zeros_like(latents).float(), "text": texts.float()}
    with torch.no_grad():
        torch.manual_seed(0)
        options = VideoDiTOptions(preset="5b", pretrained=str(tmp_path / "converted"))
        loss = training_loss(recorded, batch, options).loss

    # The model, and by its answer the loss: the error of x₀ by its weight.
    noisy, times = recorded.asked["hidden_states"].double(), recorded.asked["timestep"]
    expected = published(noisy, texts, times)
    assert away(recorded.answer[0], expected) <= MOST_AWAY
    signal = signal_shares()[times][:, None, None, None, None]
    found = signal.sqrt() * noisy - (1 - signal).sqrt() * expected
    errors = ((found - latents).square() / (1 - signal)).mean()
    assert away(loss, errors) <= MOST_AWAY

    # The block.
    asked, answered = seen["block"]
    tokens = published.block("layers.0", asked["hidden_states"].double(), asked["encoder_hidden_states"].double())
    assert max(away(a, b) for a, b in zip(answered, tokens, strict=True)) <= MOST_AWAY

    # The layer, read in order, and its gradients.
    (x, *_), (y, _) = seen["layer"]
    order = published.interleaving()
    lying = torch.empty_like(x, dtype=torch.float64)
    lying[:, order] = x.double()
    name = "dit.layers.0.seq_modeling_block.ssm.ttt"
    leaves = {key: value.requires_grad_() for key, value in state.items() if key.startswith(name)}
    expected = published.ttt(name.removeprefix("dit."), lying)[:, order]
    assert away(y, expected) <= MOST_AWAY
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64).view(y.shape)
    gradients = torch.autograd.grad((expected * weights).sum(), list(leaves.values()))
    layer = block.attn1.ttt.layer.requires_grad_()
    rotary = model.layout(noisy, texts).rotary(WIDTH, theta=10000.0, device=x.device, dtype=torch.float32)
    (layer(x, rotary=rotary)[0] * weights.float()).sum().backward()
    own = dict(layer.named_parameters())
    for key, gradient in zip(leaves, gradients, strict=True):
        module = key.removeprefix(f"{name}.").replace("wq.", "q_proj.").replace("wk.", "k_proj.")
        found = own[module.replace("wv.", "v_proj.").replace("wo.", "o_proj.")].grad
        assert away(found, gradient) <= 10 * MOST_AWAY, key


def test_the_other_epsilon_would_be_seen() -> None:
    """That the table tells the kernels' ε from that of the Python path which nothing takes: near the start."""
    state = published_state("mlp")
    for name, value in state.items():
        if ".W" in name or (".b" in name and ".ssm.ttt." in name):
            value.mul_(0.02 if ".W" in name else 0)
    published = Published(state, mini_batch_size=64, base_lr=0.1)
    latents, texts, times = video(1, 12, 4, 4)
    published.lies_as(latents, texts, times)
    tokens = torch.randn(1, 64, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    name = "layers.0.seq_modeling_block.ssm.ttt"
    one, other = (published.ttt(name, tokens, eps=eps) for eps in (1e-6, 1e-8))
    assert away(other, one) > 1e3 * MOST_AWAY


# --- files ---


def small() -> State:
    """A checkpoint in bfloat16, as published."""
    return {name: tensor.bfloat16() for name, tensor in published_state("mlp").items()}


def assert_converted(out: Path, state: State) -> None:
    """Both folders hold the checkpoint's own values, and diffusers loads the transformer."""
    model, told = CogVideoXTransformer3DModel.from_pretrained(
        out / "transformer", torch_dtype=torch.bfloat16, output_loading_info=True
    )
    assert told["missing_keys"] == told["unexpected_keys"] == [] == told["mismatched_keys"]
    assert torch.equal(model.transformer_blocks[1].attn1.to_q.weight, state["dit.layers.1.seq_modeling_block.q.weight"])
    assert torch.equal(model.proj_out.bias, state["dit.final_layer.linear.bias"])
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    ttt = "dit.layers.1.seq_modeling_block.ssm.ttt"
    assert torch.equal(adapter["transformer_blocks.1.attn1.ttt.layer.o_proj.weight"], state[f"{ttt}.wo.weight"])
    assert torch.equal(adapter["transformer_blocks.1.attn1.ttt.layer.W2"], state[f"{ttt}.W2"])
    assert sum(map(torch.numel, adapter.values())) + model.num_parameters() == sum(map(torch.numel, state.values()))


def rewrap(state: State, change: Callable[[str], str]) -> State:
    return {change(name): tensor for name, tensor in state.items()}


def in_shards(state: State, path: Path, *, index: bool) -> Path:
    """A folder of three safetensors files."""
    path.mkdir()
    names = sorted(state)
    files = {f"model-{number}.safetensors": names[number::3] for number in range(3)}
    for file, held in files.items():
        save_file({name: state[name] for name in held}, path / file)
    if index:
        weight_map = {name: file for file, held in files.items() for name in held}
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        save_file({"leftover": torch.ones(1)}, path / "another.safetensors")
    return path


FORMS: dict[str, Callable[[State, Path], Path]] = {
    "safetensors": lambda state, path: save(state, path / "model.safetensors"),
    "a folder of shards": lambda state, path: in_shards(state, path / "shards", index=False),
    "an index": lambda state, path: in_shards(state, path / "shards", index=True),
    "the index's file": lambda state, path: in_shards(state, path / "s", index=True) / "model.safetensors.index.json",
    "a folder with one .pt": lambda state, path: save(state, path / "one" / "weights.pth").parent,
    "torch.save of old": lambda state, path: (
        torch.save(state, path / "old.pt", _use_new_zipfile_serialization=False) or path / "old.pt"
    ),
    "compiled and wrapped": lambda state, path: save(
        rewrap(state, lambda name: "_orig_mod." + name.replace("layers.", "layers._fsdp_wrapped_module.")),
        path / "w.pt",
    ),
    "without its outer name": lambda state, path: save(
        rewrap(state, lambda name: name.replace("dit.", "module.model.", 1)), path / "bare.safetensors"
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_of_every_form(form: str, tmp_path: Path, console: Console) -> None:
    state = small()
    source = FORMS[form](state, tmp_path)
    import_weights(source, tmp_path / "out", console=console)
    assert_converted(tmp_path / "out", state)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_training_checkpoint_gives_its_model_and_tells_what_is_left_out(tmp_path: Path) -> None:
    state = small()
    tables = {
        f"dit.layers.{block}.seq_modeling_block.{table}": torch.ones(3, 2)
        for block in range(BLOCKS)
        for table in ("rotary.freqs_cos", "rotary.freqs_sin", "ssm.freqs_cis")
    }
    whole = {"model": {**state, **tables}, "optimizer": {"state": {}}, "metadata": {"wandb_id": None}}
    torch.save(whole, tmp_path / "step.pt")
    console = Console(width=60, record=True, quiet=False)
    import_weights(tmp_path / "step.pt", tmp_path / "out", console=console)
    assert_converted(tmp_path / "out", state)
    told = console.export_text()
    blocks = f"    N = 0 … {BLOCKS - 1}\n"
    assert f"  dit.layers.N.mlp.layer1.weight → transformer_blocks.N.ff.net.0.proj.weight{blocks}" in told
    assert "rotary.freqs_cos, " in told
    assert "left out, rotary tables are computed" in told
    assert "  optimizer, metadata: left out, no part of the model\n" in told
    lines = [line for line in told.splitlines() if " → " in line]
    numbered = sum("N = 0" in line for line in lines)
    assert numbered * BLOCKS + len(lines) - numbered == len(state)  # each tensor once


def test_what_the_files_say_of_themselves(tmp_path: Path, console: Console) -> None:
    import_weights(save(published_state("linear"), tmp_path / "linear.pt"), tmp_path / "out", console=console)
    info = read_info(tmp_path / "out" / "adapter")
    assert (info.ttt.layer_type, info.ttt.mini_batch_size, info.ttt.base_lr) == ("linear", 16, 1.0)
    assert (info.ttt.causal, info.ttt.rope, info.ttt.ln_eps) == (False, "backbone", 1e-6)
    assert [(site.layer, site.dim, site.num_heads) for site in info.sites] == [(0, D, HEADS), (1, D, HEADS)]
    assert info.backbone["name"] == "videodit"
    assert info.backbone_weights is not None
    assert info.training == {"imported_from": "TTT-Video", "checkpoint": "linear.pt"}
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    sizes = ("num_attention_heads", "attention_head_dim", "num_layers", "in_channels", "out_channels", "text_embed_dim")
    assert [config[key] for key in sizes] == [HEADS, WIDTH, BLOCKS, CHANNELS, CHANNELS, TEXT]
    assert config["norm_eps"] == 1e-6


def test_another_models_weights_refuse_the_adapter(tmp_path: Path, console: Console) -> None:
    states = [
        {name: tensor.bfloat16() for name, tensor in published_state("mlp", seed=seed).items()} for seed in (0, 1)
    ]
    for number, state in enumerate(states):
        import_weights(save(state, tmp_path / f"{number}.pt"), tmp_path / str(number), console=console)
    options = VideoDiTOptions(preset="5b", pretrained=str(tmp_path / "1"))
    model = build(options, device="cpu", dtype=torch.bfloat16)
    with pytest.raises(UsageError, match="other values here"):
        load_adapter(tmp_path / "0" / "adapter", model, sites=sites(model), causal=False)
    load_adapter(tmp_path / "1" / "adapter", model, sites=sites(model), causal=False)


def test_large_weights_are_written_in_shards_that_diffusers_loads(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    state = small()
    import_weights(save(state, tmp_path / "model.pt"), tmp_path / "out", console=console)
    files = sorted(path.name for path in (tmp_path / "out" / "transformer").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05}.safetensors"
    assert_converted(tmp_path / "out", state)


def test_a_distributed_checkpoint_is_refused_with_the_command_that_helps(tmp_path: Path, console: Console) -> None:
    state = small()
    torch_save_to_dcp(save({"model": state}, tmp_path / "plain.pt"), tmp_path / "step_5000")
    command = rf"python -m (\S+) dcp_to_torch {tmp_path / 'step_5000'} step_5000\.pt"
    with pytest.raises(UsageError, match=command):
        import_weights(tmp_path / "step_5000", tmp_path / "out", console=console)
    dcp_to_torch_save(tmp_path / "step_5000", tmp_path / "step_5000.pt")
    import_weights(tmp_path / "step_5000.pt", tmp_path / "out", console=console)
    assert_converted(tmp_path / "out", state)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    state = small()
    save(state, Path("step.pt"))
    command = ["import-weights", "--backbone", "videodit", "step.pt", "--out", "converted"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "  dit.final_layer.linear.bias → proj_out.bias\n" in out
    assert "converted/transformer: 64 tensors, 52,464 parameters" in out
    assert "write scaling_factor: 1.0 into converted/vae/config.json" in out
    assert "write backbone.text_dropout: 0, as `ttt import-config` does" in out
    assert_converted(Path("converted"), state)
    assert main(command) == 2
    assert "converted: is already there" in capsys.readouterr().err


def test_a_converted_checkpoint_trains_on_stage_by_stage(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    import_weights(save(small(), Path("step.pt")), Path("converted"), console=console)
    generator = torch.Generator().manual_seed(0)
    latents = {"mean": torch.randn(25, CHANNELS, 4, 4, generator=generator)}
    latents["std"] = 0.1 * latents["mean"].abs()
    latents |= {f"start_{name}": value[:2].clone() for name, value in latents.items()}
    save_file(latents, "latents.safetensors")
    save_file({"text": torch.randn(8, TEXT, generator=generator)}, "text.safetensors")
    segment = {"caption": "waves", "text": "text.safetensors"}
    sizes = {"frames": 25, "height": 32, "width": 32, "text_length": 8}
    line = {"video": "a.mp4", "start_sec": 0, "latents": "latents.safetensors", **sizes, "segments": [segment] * 2}
    Path("index.jsonl").write_text(json.dumps(line) + "\n")
    Path("stage.yaml").write_text(
        """
        backbone: {name: videodit, preset: 5b, pretrained: converted}
        ttt: {layer_type: mlp, mini_batch_size: 16}
        data: {train_data: index.jsonl, duration_sec: 6, height: 32, width: 32, text_length: 8}
        train: {init_from: converted/adapter, trainable: qkvo, max_steps: 1, param_dtype: bfloat16, cpu_threads: 1}
        run_dir: runs/6s
        """
    )
    assert main(["train", "stage.yaml"]) == 0
    assert "TTT-mlp in layers 0, 1: 17,604; learning: 26,180" in capsys.readouterr().out
    before = read_info("runs/6s")
    again = ["train", "stage.yaml", "--set", "train.init_from=runs/6s", "--set", "run_dir=runs/next"]
    assert main([*again, "--set", "backbone.remat_mlp=true"]) == 0
    assert "8,576 parameters of the backbone included" in capsys.readouterr().out
    assert read_info("runs/next").backbone_weights == before.backbone_weights  # the frozen part, the same


def test_sizes_are_read_off_the_folder(tmp_path: Path, console: Console) -> None:
    import_weights(save(small(), tmp_path / "step.pt"), tmp_path / "converted", console=console)
    options = VideoDiTOptions(preset="5b", pretrained=str(tmp_path / "converted"))
    assert sizes_of(options) == {"dim": D, "num_heads": HEADS, "num_layers": BLOCKS}
    config = tmp_path / "converted" / "transformer" / "config.json"
    config.write_text('{"num_layers": "two"}')
    with pytest.raises(EnvironmentProblem, match=r"config\.json: its .* are 30, 64 and 'two'"):
        sizes_of(options)
    config.write_text("{}")
    assert sizes_of(options) == {"dim": 1920, "num_heads": 30, "num_layers": 30}  # diffusers' defaults
    assert sizes_of(VideoDiTOptions(preset="5b", pretrained="someone/else"))["dim"] == 3072


def test_imported_weights_that_changed_since_are_told(tmp_path: Path, console: Console) -> None:
    import_weights(save(small(), tmp_path / "step.pt"), tmp_path / "converted", console=console)
    options = VideoDiTOptions(preset="5b", pretrained=str(tmp_path / "converted"))
    folder = tmp_path / "converted" / "transformer"
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        changed = whole[:-1] + b"w"
        if file.suffix == ".json":
            changed = whole.replace(b"num_layers", b"num_layerz").replace(b'"config', b'"konfig')
        assert changed != whole
        file.write_bytes(changed)
        with pytest.raises(EnvironmentProblem, match=rf"{file.name}: damaged"):
            VideoDiTBackbone().build(options, device="cpu", dtype=torch.float32)
        file.write_bytes(whole)
    VideoDiTBackbone().build(options, device="cpu", dtype=torch.float32)


# --- what does not fit ---

BLOCK = "dit.layers.1.seq_modeling_block"
DAMAGES: dict[str, tuple[Callable[[State], object], str]] = {
    "a tensor gone": (lambda state: state.pop(f"{BLOCK}.q_norm.bias"), rf"{BLOCK}\.q_norm\.bias is missing$"),
    "a gate gone": (
        lambda state: state.pop(f"{BLOCK}.forward_ssm_gating_text.gating_alpha"),
        "forward_ssm_gating_text.gating_alpha is missing$",
    ),
    "many gone": (
        lambda state: [state.pop(name) for name in list(state) if f"{BLOCK}.ssm" in name],
        r"post_norm\.bias|.* and \d+ more are missing$",
    ),
    "a block gone": (
        lambda state: [state.pop(name) for name in list(state) if "layers.0." in name and state],
        r"learnable_ttt_lr_weight is missing; without it",
    ),
    "a block far away": (
        lambda state: state.update({"dit.layers.4000000.mlp.layer1.bias": torch.ones(2)}),
        r"dit\.layers\.2 is missing$",
    ),
    "another shape": (
        lambda state: state.update({f"{BLOCK}.ssm.ttt.W1": torch.ones(HEADS, WIDTH, WIDTH)}),
        rf"{BLOCK}\.ssm\.ttt\.W1 is \[2, 16, 16\], not \[2, 16, 64\]",
    ),
    "another inner model": (
        lambda state: state.pop("dit.layers.0.seq_modeling_block.ssm.ttt.W2"),
        rf"{BLOCK}\.ssm\.ttt\.W2, .* no part of the inner model of block 0, which is linear",
    ),
    "whole numbers": (
        lambda state: state.update({"dit.transformer_norm.bias": torch.ones(D, dtype=torch.int32)}),
        r"dit\.transformer_norm\.bias is torch\.int32",
    ),
    "a stranger": (
        lambda state: state.update({"dit.layers.0.lora.weight": torch.ones(2)}),
        r"dit\.layers\.0\.lora\.weight is no part of TTT-Video's model that is known here",
    ),
    "twice": (
        lambda state: state.update({"_orig_mod.dit.transformer_norm.bias": torch.ones(D)}),
        r"_orig_mod\.dit\.transformer_norm\.bias and dit\.transformer_norm\.bias are the same tensor",
    ),
    "heads that do not fit": (
        lambda state: state.update(
            {"dit.layers.0.seq_modeling_block.ssm.ttt.learnable_ttt_lr_weight": torch.ones(4, 1, D)}
        ),
        r"learnable_ttt_lr_weight has 4 heads, which do not share the width 32",
    ),
    "no rank": (
        lambda state: state.update({"dit.patch_embedding.vid_proj.weight": torch.ones(D)}),
        r"vid_proj\.weight is \[32\], no 4-dimensional weight",
    ),
    "diffusers' own names": (
        lambda state: [state.clear(), state.update({"transformer_blocks.0.attn1.to_q.weight": torch.ones(2)})],
        r"no checkpoint of TTT-Video: it holds transformer_blocks\.0",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_named_and_nothing_is_written(damage: str, tmp_path: Path, console: Console) -> None:
    change, words = DAMAGES[damage]
    state = small()
    change(state)
    source = save(state, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=words) as caught:
        import_weights(source, tmp_path / "new" / "out", console=console)
    assert str(caught.value).startswith(f"{source}: ")
    assert list(tmp_path.iterdir()) == [source]


class Attack:
    """What a hostile pickle would call."""

    ran = False

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return attack, ()


def attack() -> None:
    Attack.ran = True


def hostile(path: Path) -> Path:
    torch.save({"model": Attack()}, path / "hostile.pt")
    return path / "hostile.pt"


def cut(path: Path, name: str) -> Path:
    file = save(small(), path / name)
    file.write_bytes(file.read_bytes()[:-1000])
    return file


def empty(path: Path) -> Path:
    (path / "empty").mkdir()
    return path / "empty"


def written(path: Path, name: str, text: str) -> Path:
    (path / name).write_text(text)
    return path / name


def two(path: Path) -> Path:
    save({"a": torch.ones(1)}, path / "two" / "a.pt")
    return save({"a": torch.ones(1)}, path / "two" / "b.pt").parent


def doubled(path: Path) -> Path:
    save(small(), path / "twice" / "a.safetensors")
    return save(small(), path / "twice" / "b.safetensors").parent


SOURCES: dict[str, tuple[Callable[[Path], Path], type[TTTError], str]] = {
    "nothing": (lambda path: path / "nowhere.pt", EnvironmentProblem, "no such file or folder"),
    "hostile": (hostile, UsageError, "no code in it was run"),
    "cut short": (lambda path: cut(path, "a.safetensors"), EnvironmentProblem, "damaged"),
    "cut short, torch": (lambda path: cut(path, "a.pt"), EnvironmentProblem, "or a damaged one"),
    "text": (lambda path: written(path, "a.pt", "hello"), EnvironmentProblem, "no file of torch.save"),
    "a list": (lambda path: save([torch.ones(1)], path / "a.pt"), UsageError, "holds no state_dict"),
    "no tensors": (lambda path: save({"epoch": 3}, path / "a.pt"), UsageError, "holds no state_dict, and none under"),
    "an empty folder": (empty, UsageError, "holds no .safetensors and no .pt file"),
    "two files": (two, UsageError, r"holds 2 \.pt files; name"),
    "the same tensors in two files": (doubled, UsageError, "which another file of the checkpoint holds too"),
    "an index of nothing": (
        lambda path: written(path, "m.safetensors.index.json", '{"weight_map": {}}'),
        EnvironmentProblem,
        "no weight_map",
    ),
    "an index that leaves its folder": (
        lambda path: written(path, "m.safetensors.index.json", '{"weight_map": {"a": "../a.safetensors"}}'),
        EnvironmentProblem,
        r"another folder: \.\./a",
    ),
    "an index of a file that is gone": (
        lambda path: written(path, "m.safetensors.index.json", '{"weight_map": {"a": "a.safetensors"}}'),
        EnvironmentProblem,
        r"a\.safetensors: no such file",
    ),
}


@pytest.mark.parametrize("source", SOURCES)
def test_sources_that_cannot_be_read(source: str, tmp_path: Path, console: Console) -> None:
    make, error, words = SOURCES[source]
    path = make(tmp_path)
    with pytest.raises(error, match=words):
        import_weights(path, tmp_path / "out", console=console)
    assert not (tmp_path / "out").exists()
    assert not Attack.ran


def test_a_folder_in_use_is_left_alone(tmp_path: Path, console: Console) -> None:
    source = save(small(), tmp_path / "model.pt")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    with pytest.raises(UsageError, match="is not empty"):
        import_weights(source, out, console=console)
    assert [path.name for path in out.iterdir()] == ["mine"]
    (out / "mine").unlink()
    import_weights(source, out, console=console)
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "transformer"]


def test_an_interrupted_import_leaves_nothing(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    source = save(small(), tmp_path / "model.pt")
    monkeypatch.setattr(weights, "save_adapter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_weights(source, tmp_path / "out", console=console)
    assert list(tmp_path.iterdir()) == [source]
