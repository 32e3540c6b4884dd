"""The plugin, importable without torch: modules that need torch are imported inside the methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ttt.config import BackboneOptions, DataOptions
from ttt.packaged import packaged_presets
from ttt.plugins import Backbone, BackboneFacts, Batch, LossOutput, Streaming, WindowDataset, hookimpl
from ttt_example.options import ExampleData, ExampleOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ttt.config import RunConfig
    from ttt.plugins import Site

    ExampleRun = RunConfig[ExampleOptions, ExampleData]


class ExampleBackbone(Backbone[ExampleOptions, ExampleData], Streaming):
    """A transformer that predicts each byte of a text from the bytes before it; a batch is bytes, `[B, T+1]`."""

    name: ClassVar[str] = "example"
    causal: ClassVar[bool] = True
    options: ClassVar[type[BackboneOptions]] = ExampleOptions
    data_options: ClassVar[type[DataOptions]] = ExampleData

    def presets(self) -> Mapping[str, str]:
        """The commented config that ships."""
        return packaged_presets("ttt_example", ("demo",))

    # CHANGE 5: how wide and deep your model is
    def facts(self, config: ExampleRun) -> BackboneFacts:
        """Widths and lengths, straight from the options."""
        options, length = config.backbone, config.data.window_bytes
        return BackboneFacts(
            dim=options.dim,
            num_heads=options.num_heads,
            num_layers=options.num_layers,
            tokens_per_window=length,
            window=f"{length} bytes of text",
        )

    def build(self, options: ExampleOptions, *, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
        """The model, the same for the same seed."""
        from ttt_example.model import build

        return build(options).to(device=device, dtype=dtype).eval()

    def sites(self, model: nn.Module) -> Sequence[Site]:
        """One for each layer, after its attention."""
        from ttt_example.model import sites

        return sites(model)

    # CHANGE 6, where your model reads something else: its data, its loss, and what a batch is
    def dataset(self, config: ExampleRun, *, split: str, device: torch.device | str) -> WindowDataset:
        """Windows of the text that the config names, or of the demo's."""
        from ttt_example.data import DEMO, TextWindows

        file = config.data.eval_data if split == "eval" else config.data.train_data
        return TextWindows(DEMO if file is None else Path(file), config.data.window_bytes)

    def loss(self, model: nn.Module, batch: Batch, config: ExampleRun) -> LossOutput:
        """Cross-entropy of each next byte. If some did not count, as padding, `loss_weights` would say how many do."""
        from torch.nn.functional import cross_entropy

        logits = model(batch[:, :-1])
        return LossOutput(cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten()), batch[:, 1:].numel())

    # --- for the laws ---

    # CHANGE 5: the smallest model
    def tiny(self) -> ExampleOptions:
        """Two narrow layers."""
        return ExampleOptions(dim=16, num_heads=2, num_layers=2)

    # CHANGE 6, with its data
    def example_batch(self, model: nn.Module, *, batch_size: int, tokens: int, seed: int) -> Batch:
        """Random bytes."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(256, (batch_size, tokens + 1), generator=generator)
        return drawn.to(next(model.parameters()).device)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """The logits, `[B, T, 256]`."""
        return model(batch[:, :-1])

    def perturb(self, batch: Batch, *, token: int, row: int | None = None) -> Batch:
        """Other bytes from a token on."""
        changed = batch.clone()
        changed[slice(None) if row is None else row, token:] ^= 1
        return changed

    def stream(self, model: nn.Module, batch: Batch, *, pieces: Sequence[int]) -> Tensor:
        """The logits, with a memory from piece to piece."""
        from ttt_example.model import stream

        return stream(model, batch[:, :-1], pieces)


@hookimpl
def ttt_backbone() -> Backbone:
    """The hook: this plugin's backbone."""
    return ExampleBackbone()
