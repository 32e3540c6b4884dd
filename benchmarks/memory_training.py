"""The layers that `memory_beyond_attention.py` runs again and again, what is put into them, and how it learns."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from memory_backbone import cut
from memory_start import Start
from torch import Tensor, nn
from torch.nn import functional as F

import ttt.hf
import ttt.inject
from ttt.adapter import TTTAdapter
from ttt.config import TTTConfig
from ttt.seeds import words_of

NO_MEMORY = 1e-9
"""`base_lr` of the control without memory: its fast weights stay where they are, and all else is the same."""


OTHERS = 4096
"""Tokens that do not occur in training, of which each step's softmax has so many."""


@dataclass(frozen=True)
class Size:
    """How much is done, and with which settings."""

    window: int
    """Tokens that attention sees."""
    sinks: int
    """First tokens of a document that it sees as well."""
    length: int
    """Tokens of a document."""
    sites: tuple[int, ...]
    """The layers after which TTT sits."""
    train: tuple[int, int]
    """Documents for each work of training, and how many have repeated passages, made of these."""
    held_out: tuple[int, int, int]
    """Documents for each held-out work, works, and documents with repeated passages."""
    steps: int
    batch: int
    """Documents in each step."""
    seeds: int
    ablation_steps: int
    sharpening_steps: int = 120
    """By which queries and keys of the start learn to meet."""
    gate_lr: float = 1e-2
    """Of gates and inner learning rates."""
    vector_lr: float = 2e-3
    """Of the adapter's norms, biases and step sizes."""
    matrix_lr: float = 0.0
    """Of its projections and `W₀`, which stay where they start at 0: there are too few tokens for a million weights."""
    drawn_lr: float = 5e-4
    """Of the projections of an adapter that is drawn at random."""
    lora_lr: float = 5e-4
    repeated: float = 0.3
    """How often a step is of documents with repeated passages."""
    gain: float = 0.5
    """How loud the adapter's answer is at the start."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of TTT."""

    def limited(self, model: nn.Module) -> Any:
        """A context in which attention sees `window` and `sinks`."""
        return ttt.hf.limit_attention(model, window=self.window, sinks=self.sinks)


@dataclass
class Texts:
    """Documents, as the input of the first layer that is run again and again."""

    tokens: Tensor
    """`[N,T]`"""
    states: Tensor
    """`[N,T,D]`, float16"""
    scored: Tensor
    """Which tokens are to be predicted, bool `[N,T]`."""

    def rows(self, index: list[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        return self.tokens[index].to(device), self.states[index].to(device).float(), self.scored[index].to(device)


class Upper:
    """The layers from the first site on, as a model of its own; with adapters or a LoRA inside, if it is given some."""

    def __init__(self, model: nn.Module, size: Size, starts: dict[int, Start]) -> None:
        self.size, self.starts = size, starts
        self.whole = model
        self.first = min(size.sites)
        self.device = next(model.parameters()).device
        self._matrix_lr = size.matrix_lr
        self.clear()

    def clear(self) -> None:
        """Take out what was put in."""
        injection: ttt.inject.Injection | None = getattr(self, "injection", None)
        if injection is not None:
            injection.eject()
        self.injection, self.adapters = None, {}
        self.model: Any = cut(self.whole, self.first)

    @property
    def learning(self) -> dict[str, nn.Parameter]:
        """The parameters that learn."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def rate(self, name: str) -> float:
        """The learning rate of a parameter, by its name."""
        if "lora" in name:
            return self.size.lora_lr
        if "gating_alpha" in name or "learnable_ttt_lr" in name:
            return self.size.gate_lr
        matrix = name.endswith("proj.weight") or name.rpartition(".")[2].startswith("W")
        return self._matrix_lr if matrix else self.size.vector_lr

    def inject(self, seed: int, *, drawn: bool = False, **changes: Any) -> None:
        """Put adapters in.

        Args:
            seed: of what is drawn.
            drawn: start as TTT layers do of themselves, not as a memory.
            changes: settings of TTT, `sites`, `gain` or `matrix_lr`.
        """
        self._matrix_lr = changes.pop("matrix_lr", self.size.drawn_lr if drawn else self.size.matrix_lr)
        sites = sorted(changes.pop("sites", self.size.sites))
        gain = changes.pop("gain", self.size.gain)
        numbers = tuple(one - self.first for one in sites)
        config = TTTConfig(**{**self.size.settings, "layers": numbers, **changes})
        self.injection = ttt.inject.apply(self.model, ttt.hf.causal_lm_sites(self.model), config, seed=seed)
        for site, adapter in zip(sites, self.injection.adapters.values(), strict=True):
            assert isinstance(adapter, TTTAdapter)
            self.adapters[site] = adapter
            if not drawn:
                torch.manual_seed(words_of(seed, "start", site)[0])
                self.starts[site](adapter, gain=gain * 0.1 / math.tanh(config.initial_gating_alpha))

    def add_lora(self, seed: int, parameters: int) -> int:
        """Put a LoRA of `peft` on every matrix of these layers; returns its rank, which makes it about as large."""
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(seed)
        matrices = [one for one in self.model.model.layers.modules() if isinstance(one, nn.Linear)]
        rank = max(1, round(parameters / sum(one.in_features + one.out_features for one in matrices)))
        names = sorted({name.rpartition(".")[2] for name, one in self.model.named_modules() if one in matrices})
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names), self.model)
        return rank

    def hidden(self, states: Tensor) -> Tensor:
        """The last hidden states `[B,T,D]` of these layers, with attention in its limits."""
        with self.size.limited(self.model):
            answer: Tensor = self.model.model(inputs_embeds=states, use_cache=False).last_hidden_state
        return answer


@contextlib.contextmanager
def reset_every(upper: Upper, window: int) -> Iterator[None]:
    """Start fast weights anew at every `window` tokens of a document; attention goes on as ever."""

    def anew(forward: Callable[..., Tensor], x: Tensor, **_: Any) -> Tensor:
        return forward(x.reshape(-1, window, x.shape[-1])).view_as(x)

    for adapter in upper.adapters.values():
        adapter.forward = functools.partial(anew, adapter.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for adapter in upper.adapters.values():
            del adapter.forward


class Prediction:
    """Next-token prediction through the frozen layers.

    The softmax runs over those tokens that occur in training and a sample of the others, which stand for all of them. A
    loss over the first alone would let an adapter add noise to all other tokens unseen: it looked like a gain, and over
    the whole vocabulary was none.
    """

    def __init__(self, upper: Upper, plain: Texts, repeated: Texts) -> None:
        self.upper, self.kinds = upper, (plain, repeated)
        self.head = upper.whole.get_parameter("lm_head.weight").detach()
        known = torch.zeros(len(self.head), dtype=torch.bool)
        for one in self.kinds:
            known[one.tokens.flatten()] = True
        self.known, self.others = known.nonzero().flatten(), (~known).nonzero().flatten()
        self.place = known.cumsum(0).to(upper.device) - 1

    def train(self, seed: int, steps: int) -> list[float]:
        """Teach what learns; returns each step's loss. The documents of a step depend on the seed alone."""
        parameters = self.upper.learning
        for name, parameter in parameters.items():
            parameter.requires_grad_(self.upper.rate(name) > 0)
        parameters = self.upper.learning
        groups = [{"params": [p], "lr": self.upper.rate(name)} for name, p in parameters.items()]
        optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: min(1.0, (n + 1) / 5) * (1 - 0.9 * n / steps))
        losses = []
        for step in range(steps):
            loss = self._loss(seed, step)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise SystemExit(f"the loss of step {step} is {losses[-1]}")
        return losses

    def _loss(self, seed: int, step: int) -> Tensor:
        size = self.upper.size
        texts = self.kinds[words_of(seed, "kind", step)[0] / 2**32 < size.repeated]
        draw = torch.Generator().manual_seed(words_of(seed, "documents", step)[0])
        rows = torch.randint(0, len(texts.tokens), (size.batch,), generator=draw).tolist()
        tokens, states, scored = texts.rows(rows, self.upper.device)
        hidden = self.upper.hidden(states)[:, :-1][scored[:, 1:]]
        sampled = torch.randperm(len(self.others), generator=draw)[:OTHERS]
        choice = torch.cat([self.known, self.others[sampled]]).to(self.upper.device)
        stands_for = torch.zeros(len(choice), device=self.upper.device)
        stands_for[len(self.known) :] = math.log(len(self.others) / max(1, len(sampled))) if len(sampled) else 0.0
        return F.cross_entropy(hidden @ self.head[choice].T + stands_for, self.place[tokens[:, 1:][scored[:, 1:]]])


@torch.no_grad()
def losses_by_bin(
    hidden_of: Callable[[int], Tensor], head: Tensor, texts: Texts, step: int
) -> list[list[float | None]]:
    """Each document's mean loss in bins of `step` positions, over all tokens of the vocabulary; None if none is scored.

    Args:
        hidden_of: the last hidden states `[1,T,D]` of a document, by number.
        head: `[V,D]`.
        texts: the documents.
        step: positions of a bin; it divides their length.
    """
    found = []
    for number in range(len(texts.tokens)):
        tokens, _, scored = texts.rows([number], head.device)
        losses = torch.zeros(tokens.shape[1], device=head.device)
        at = scored[0].clone()
        at[0] = False  # nothing is before it
        hidden = hidden_of(number)[0, :-1][at[1:]]
        losses[at] = F.cross_entropy(hidden @ head.T, tokens[0][at], reduction="none")
        sums, counts = losses.double().view(-1, step).sum(-1).tolist(), at.view(-1, step).sum(-1).tolist()
        found.append([round(s / c, 5) if c else None for s, c in zip(sums, counts, strict=True)])
    return found
