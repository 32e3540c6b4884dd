"""Checks of the first step: the run ends if a TTT layer is not reached, does not learn or gets no gradient."""

from __future__ import annotations

from collections.abc import Mapping

from ttt.errors import InactiveLayerError
from ttt.evidence import LayerEvidence, Observation
from ttt.parallel.gradients import is_zero
from ttt.plugins import Backbone, LossOutput
from ttt.plugins.asking import WrongAnswer, asked
from ttt.train.parts import Parts


def require_reached(evidence: Observation, parts: Parts) -> None:
    """Require that the first forward pass called every adapter; backward would only report a missing gradient.

    Raises:
        InactiveLayerError: an adapter was not called.
    """
    for site in parts.injection.adapters:
        if site not in evidence.reached:
            raise InactiveLayerError(
                f"{site}: the TTT layer was injected, but the backbone's forward pass never reached it; the site "
                f"that the backbone {parts.backbone.name} offers there is not on its path"
            )


def require_gradient(output: LossOutput, backbone: Backbone) -> None:
    """Require that the loss has a gradient.

    Raises:
        PluginError: the loss was detached, or computed without gradients.
    """
    if not output.loss.requires_grad:
        with asked(backbone, "`loss`", type(backbone).loss):
            raise WrongAnswer(
                "a loss that no gradient leads back from to what learns; it was detached, or computed without "
                "gradients, on the way"
            )


def require_active(layers: Mapping[str, LayerEvidence], parts: Parts) -> None:
    """Require that every adapter's fast weights moved, as its evidence says, and that it got a gradient.

    Raises:
        InactiveLayerError: fast weights did not move, or no gradient arrived.
    """
    touched: dict[str, bool] = {}
    of_lora = parts.injection.lora_parameters
    for name, gradient in parts.optimizer.gradients():
        if gradient is None and name in of_lora:
            raise InactiveLayerError(
                f"{name}: no gradient reaches this LoRA: the backbone {parts.backbone.name} reads the weight of the "
                f"linear layer without calling it, or the loss does not depend on it; write another lora.linears"
            )
        for site in parts.injection.adapters:
            if name.startswith(f"{site}."):
                arrived = gradient is not None and not is_zero(gradient)
                touched[site] = touched.get(site, False) or arrived
    for site in parts.injection.adapters:
        if not layers[site].movement > 0:
            raise InactiveLayerError(
                f"{site}: the fast weights of the TTT layer did not move (‖W_T − W_0‖ / ‖W_0‖ = "
                f"{layers[site].movement}) over a whole batch; its inner learning rate or its tokens are zero"
            )
        if not touched.get(site, True):
            raise InactiveLayerError(
                f"{site}: no gradient reaches the TTT layer or its gate, so neither could learn; with "
                f"ttt.initial_gating_alpha: 0 the gate must learn first (train.alpha_lr_multiplier above 0)"
            )
