"""Two ways to get a sampler's steps from CogVideoX's noise schedule, and the choice between them.

Both are DPM-Solver++ (2M) as an SDE, and both shift and scale √ᾱ so that the last timestep leaves no signal. They
differ in which table they scale. diffusers scales the table of all timesteps, with which the model was trained, and
steps on some of its entries. TTT-Video chooses some timesteps first and scales only their table: so its noise at a
timestep differs a little from that in training. With fewer steps the difference is larger.

Source: `ZeroSNRDDPMDiscretization`, `DiscreteDenoiser` and `VPSDEDPMPP2MSampler` of TTT-Video's
`ttt/models/cogvideo/utils.py`.
"""

from __future__ import annotations

from typing import Any, cast

import ttt_videodit.diffusers_alone  # noqa: F401

import numpy as np
import torch
from diffusers import CogVideoXDPMScheduler
from diffusers.schedulers.scheduling_dpm_cogvideox import rescale_zero_terminal_snr
from torch import Tensor

from ttt_videodit.diffusion import schedule_of
from ttt_videodit.options import DIFFUSERS, TTT_VIDEO, VideoDiTOptions

IMPORTED_FROM = "TTT-Video"
"""The origin in the header of an adapter that `ttt import-weights` made from published weights."""


class TTTVideoScheduler(CogVideoXDPMScheduler):
    """TTT-Video's sampler with the methods of diffusers' scheduler of CogVideoX.

    The solver is diffusers' own, over a table of as many timesteps as there are steps. The clean latents that a
    prediction implies are taken at the entry of the whole table that is nearest to the step's noise, as published.
    """

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps, and scale their noise so that the first step starts without signal.

        Args:
            num_inference_steps: 1 … the number of timesteps.
            device: of `timesteps`.
        """
        whole = self.config.num_train_timesteps
        chosen = np.linspace(whole - 1, 0, num_inference_steps, endpoint=False).astype(np.int64)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.from_numpy(chosen).to(device)
        unscaled = CogVideoXDPMScheduler.from_config(self.config, rescale_betas_zero_snr=False).alphas_cumprod
        self.solver = CogVideoXDPMScheduler(num_train_timesteps=num_inference_steps, prediction_type="sample")
        self.solver.set_timesteps(num_inference_steps)
        self.solver.alphas_cumprod = _scaled(unscaled[torch.from_numpy(chosen[::-1].copy())])
        table = self.alphas_cumprod.cpu()
        distances = table.sqrt() - self.solver.alphas_cumprod.sqrt()[:, None]
        self.signal = table[distances.abs().argmin(dim=1)]
        self.places = {timestep: num_inference_steps - 1 - step for step, timestep in enumerate(chosen.tolist())}

    def step(
        self,
        model_output: Tensor,
        old_pred_original_sample: Tensor | None,
        timestep: int,
        timestep_back: int | None,
        sample: Tensor,
        **settings: Any,
    ) -> Any:
        """One step from x_t towards less noise; arguments and results are those of diffusers' scheduler."""
        place = self.places[int(timestep)]
        signal = self.signal[place]
        clean = signal.sqrt() * sample - (1 - signal).sqrt() * model_output
        back = None if timestep_back is None else self.places[int(timestep_back)]
        return self.solver.step(clean, old_pred_original_sample, place, back, sample, **settings)


def _scaled(alphas_cumprod: Tensor) -> Tensor:
    """ᾱ of the chosen timesteps, in rising order, with none left at the last; a single timestep has none."""
    if len(alphas_cumprod) == 1:
        return torch.zeros_like(alphas_cumprod)
    return cast(Tensor, rescale_zero_terminal_snr(alphas_cumprod))


def sampling_schedule(options: VideoDiTOptions, imported_from: str | None) -> tuple[str, str]:
    """The schedule of a sample, and why it is that one.

    Args:
        options: of the backbone.
        imported_from: the program that what was learned comes from; see `ttt.plugins.backbone.SampleRequest`.
    """
    if options.sampling_schedule is not None:
        return options.sampling_schedule, "as backbone.sampling_schedule says"
    if imported_from == IMPORTED_FROM:
        return TTT_VIDEO, f"the adapter was imported from {IMPORTED_FROM}"
    return DIFFUSERS, "backbone.sampling_schedule is null"


def sampler_of(options: VideoDiTOptions, name: str) -> CogVideoXDPMScheduler:
    """The solver of that name, over the noise schedule of the model that the options ask for."""
    kind = {DIFFUSERS: CogVideoXDPMScheduler, TTT_VIDEO: TTTVideoScheduler}[name]
    return cast(CogVideoXDPMScheduler, kind.from_config(schedule_of(options).config))


def trained_on_zeros(options: VideoDiTOptions, imported_from: str | None) -> bool:
    """Whether the sampled model was trained with zeros in place of text.

    Published weights of TTT-Video were not, whatever `options` say: the dropout of texts in its `train.py` is never
    reached, because its branch is for texts that are not tensors, and all are.
    """
    return options.text_dropout > 0 and imported_from != IMPORTED_FROM
