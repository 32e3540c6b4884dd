"""What learns: the `ttt:` section of moshi-finetune's fork, `lora:`, what is unfrozen, and what a run starts from."""

from __future__ import annotations

from typing import Any

from ttt.config.schema import TTTConfig, select_layers
from ttt.plugins import Import
from ttt.plugins.imported import number
from ttt_moshi.importing_values import drop_the_rest, figure, flag, is_on, move_figure, move_flag
from ttt_moshi.options import MOSHI_7B

LAYERS_WITHOUT_A_SECTION = (29, 30, 31)
"""The layers with TTT in this project's own 7B config."""

_SAME_TTT = {
    "base_lr": "ttt.base_lr",
    "mini_batch_size": "ttt.mini_batch_size",
    "initial_gating_alpha": "ttt.initial_gating_alpha",
    "rope_theta": "ttt.rope_theta",
    "weight_lr_multiplier": "train.weight_lr_multiplier",
    "alpha_lr_multiplier": "train.alpha_lr_multiplier",
}
_CONTEXTS = ("ttt_layer_context", "non_ttt_layer_context")
_DEFAULTS: dict[str, tuple[str, Any]] = {
    "layers": ("ttt.layers", "middle"),
    "base_lr": ("ttt.base_lr", 1.0),
    "persistent_states": ("ttt.persistent_states", True),
    "weight_lr_multiplier": ("train.weight_lr_multiplier", 10.0),
    "alpha_lr_multiplier": ("train.alpha_lr_multiplier", 100.0),
    "use_rope": ("ttt.rope", "none"),
}
"""The defaults of the fork's `TTTArgs` that differ from this project's."""
_PIECES = "the fork's code never passed it on to its evaluation; here the result of a stream depends on no piece size"
_EVERY_RUN = "every run measures the inner losses and draws them: metrics.jsonl and inner_loss.png in its folder"
_NO_SUCH = "no key of the fork's args.py, which refuses it"
_NOT_HERE = {
    "optimize_chunk_size": _PIECES,
    "chunk_size": _PIECES,
    "max_chunk_size": _PIECES,
    "prefer_efficiency": _PIECES,
    "log_inner_loop_losses": _EVERY_RUN,
    "save_inner_loop_plots": _EVERY_RUN,
    "inner_loop_plot_dir": "pictures lie in the run's folder",
    "inner_loop_log_interval": "it counted mini-batches, but nothing read it; train.evidence_freq counts steps, and a "
    "measurement is the mean over all mini-batches of its step",
    "enable_training_diagnostics": "every run measures each layer's gate, inner loss and movement",
    "training_diagnostic_frequency": "it counted forward passes; train.evidence_freq counts steps",
    "gradient_checkpointing": f"{_NO_SUCH}; train.gradient_checkpointing covers the backbone, and "
    "ttt.scan_checkpoint_group_size the TTT layers",
    "disable_compile": f"{_NO_SUCH}; TTT layers are compiled only with train.compile: true",
    "sequential_processing": f"{_NO_SUCH}; ttt.scan_checkpoint_group_size is what saves memory in the TTT layers",
}
_OUTPUT_NORM = "a learned scale on the layer's output; here the output projection, which is trained, has that scale"


def move_adapters(moving: Import) -> None:
    """Move which adapters there are, what they are, and what else learns."""
    section = moving.source.data.get("ttt")
    section = section if isinstance(section, dict) else {}
    lora = is_on(moving, "lora.enable", default=False)
    whole = is_on(moving, "full_finetuning", default=False)
    has_ttt = bool(section) and is_on(moving, "ttt.enable", default=True)
    lora_alone = lora and not has_ttt and not whole
    _move_lora(moving, lora=lora and not whole, has_ttt=has_ttt, whole=whole)
    _move_ttt(moving, section, has_ttt=has_ttt, lora_alone=lora_alone)
    _move_what_learns(moving, has_ttt=has_ttt, whole=whole, frozen=bool(section) and not (has_ttt or lora or whole))
    _move_rate(moving, has_ttt=has_ttt or not (section or lora), lora=lora and not whole)
    _move_start(moving)


def _move_lora(moving: Import, *, lora: bool, has_ttt: bool, whole: bool) -> None:
    """`lora:`, all of whose layers are moshi-finetune's own: every linear layer of the model."""
    if not lora:
        why = "lora.enable: false, so it was not read"
        if whole and is_on(moving, "lora.enable", default=False):
            why = "full_finetuning: true trains the weights themselves; moshi-finetune refuses LoRA beside it"
            moving.drop("lora.enable", why)
        else:
            moving.move("lora.enable", "adapter", value="ttt", note="false: no LoRA")
        drop_the_rest(moving, "lora", why)
        return
    adapter = "ttt+lora" if has_ttt else "lora"
    moving.move("lora.enable", "adapter", value=adapter, note="true" if has_ttt else "true, and no layer has TTT")
    for old, default in (("rank", 64), ("scaling", 2.0)):
        move_figure(moving, f"lora.{old}", f"lora.{old}")
        if not moving.has(f"lora.{old}"):
            moving.add(f"lora.{old}", default, "moshi-finetune's default, which the file left to it")
    embeddings = "false: embeddings stay frozen, as LoRA's linears are all that learns here"
    if is_on(moving, "lora.ft_embed", default=False):
        embeddings = "true: embeddings learned too; here they stay frozen, or write train.trainable: all"
    moving.drop("lora.ft_embed", embeddings)
    drop_the_rest(moving, "lora", "no key of moshi-finetune's LoraArgs, which refuses it")


def _move_ttt(moving: Import, section: dict[str, Any], *, has_ttt: bool, lora_alone: bool) -> None:
    """The `ttt:` section; its MLP is the inner model."""
    if not section:
        why = "the file has no TTT; these are the layers of this project's own 7B config"
        if lora_alone:
            why += ", for `lora.rank: match` or another `adapter`"
        moving.add("ttt.layers", list(LAYERS_WITHOUT_A_SECTION), why)
        return
    _move_layers(moving, has_ttt=has_ttt, lora_alone=lora_alone)
    for old, new in _SAME_TTT.items():
        note = "" if has_ttt or new.startswith("ttt.") else "ttt.enable: false"
        move_figure(moving, f"ttt.{old}", new, note=note)
    _move_contexts(moving, named=has_ttt or lora_alone)
    move_flag(moving, "ttt.persistent_states", "ttt.persistent_states")
    rope = is_on(moving, "ttt.use_rope", default=False)
    moving.move("ttt.use_rope", "ttt.rope", value="mini_batch" if rope else "none")
    _move_inner_model(moving, section)
    handled = {"enable", "layers", "persistent_states", "use_rope", *_SAME_TTT, *_CONTEXTS}
    for key in section:
        if key in TTTConfig.model_fields and key not in handled:
            moving.move(f"ttt.{key}", f"ttt.{key}")
    _add_defaults(moving, has_ttt=has_ttt)
    _drop_the_rest(moving)


def _move_contexts(moving: Import, *, named: bool) -> None:
    """What attention sees, unless `ttt.layers` leaves no layer that would."""
    layers = flag(moving.get("ttt.layers"))
    for key in _CONTEXTS:
        if key == "ttt_layer_context" and (not named or layers == "none"):
            moving.drop(f"ttt.{key}", "no layer has TTT")
        elif key == "non_ttt_layer_context" and named and layers == "all":
            moving.drop(f"ttt.{key}", "every layer has TTT")
        else:
            move_figure(moving, f"ttt.{key}", f"backbone.{key}")


def _move_layers(moving: Import, *, has_ttt: bool, lora_alone: bool) -> None:
    if has_ttt:
        moving.drop("ttt.enable", "true: what ttt.layers names has TTT")
        if not moving.has("ttt.enable"):
            told = "ttt.enable is not written, with which the fork left TTT off; here the layers have it"
            moving.move("ttt.layers", "ttt.layers", note=told)
        else:
            moving.move("ttt.layers", "ttt.layers")
    elif lora_alone:
        moving.drop("ttt.enable", "false: `adapter: lora` adds no TTT")
        told = "not there with `adapter: lora`; `lora.rank: match` counts them"
        if flag(moving.get("ttt.layers")) in (None, "none", ""):
            moving.drop("ttt.layers", "ttt.enable: false, and it names no layer")
            moving.add("ttt.layers", list(LAYERS_WITHOUT_A_SECTION), told)
        else:
            moving.move("ttt.layers", "ttt.layers", note=told)
    else:
        moving.move("ttt.enable", "ttt.layers", value="none", note="false: no layer has TTT")
        moving.drop("ttt.layers", "ttt.enable: false")


def _add_defaults(moving: Import, *, has_ttt: bool) -> None:
    """What the fork's `TTTArgs` takes for keys that its section leaves out."""
    if not has_ttt:
        return
    for old, (new, value) in _DEFAULTS.items():
        if not moving.has(f"ttt.{old}"):
            moving.add(new, value, f"the fork's default {old}, which the file left to it")


def _drop_the_rest(moving: Import) -> None:
    if is_on(moving, "ttt.normalize_ttt_output", default=False):
        moving.drop("ttt.normalize_ttt_output", f"true: {_OUTPUT_NORM}")
        moving.drop("ttt.target_output_norm", f"where that scale started; {_OUTPUT_NORM}")
    else:
        moving.drop("ttt.normalize_ttt_output", "false: the output has no scale of its own, as here")
        moving.drop("ttt.target_output_norm", "without normalize_ttt_output: true it was not read")
    for key, why in _NOT_HERE.items():
        moving.drop(f"ttt.{key}", why)


def _move_inner_model(moving: Import, section: dict[str, Any]) -> None:
    mlp = [key for key in section if key.startswith("ttt_mlp_")]
    if figure(section.get("ttt_mlp_layers")) == 1:
        moving.move("ttt.ttt_mlp_layers", "ttt.layer_type", value="linear", note="one matrix is the linear inner model")
        for key in mlp:
            if key != "ttt_mlp_layers":
                moving.drop(f"ttt.{key}", "a linear inner model has no hidden layer")
        return
    if mlp and "layer_type" not in section:
        moving.add("ttt.layer_type", "mlp", "the inner model that ttt_mlp_… describe")
    move_figure(moving, "ttt.ttt_mlp_layers", "ttt.mlp_layers")
    if section.get("ttt_mlp_hidden_dims"):
        moving.move("ttt.ttt_mlp_hidden_dims", "ttt.mlp_hidden_dims")
        moving.drop("ttt.ttt_mlp_expansion_factor", "ttt_mlp_hidden_dims gives the widths")
    else:
        moving.drop("ttt.ttt_mlp_hidden_dims", "it names no width; the factor gives them")
        move_figure(moving, "ttt.ttt_mlp_expansion_factor", "ttt.mlp_expansion_factor")


def _move_what_learns(moving: Import, *, has_ttt: bool, whole: bool, frozen: bool) -> None:
    if whole:
        moving.move("full_finetuning", "train.trainable", value="all", note="true: everything learns")
        moving.drop("ttt.unfrozen_attention_layers", "full_finetuning: true trains all attention")
        return
    trainable, why = _unfrozen(moving, has_ttt=has_ttt)
    told = "false: the backbone is frozen"
    if frozen:
        told += "; nothing learned there at all: measure the backbone as it is with `ttt eval` on this config"
    if trainable == "ttt":
        moving.move("full_finetuning", "train.trainable", value="ttt", note=told)
        moving.drop("ttt.unfrozen_attention_layers", why)
    else:
        moving.drop("full_finetuning", "false: train.trainable says what else learns")
        moving.move("ttt.unfrozen_attention_layers", "train.trainable", value=trainable, note=why)


def _unfrozen(moving: Import, *, has_ttt: bool) -> tuple[str, str]:
    """What `unfrozen_attention_layers` makes learn, in this project's terms, and why."""
    attention, layers = (
        _layers(moving.get("ttt.unfrozen_attention_layers")),
        _layers(moving.get("ttt.layers", "middle")),
    )
    if not has_ttt:
        return "ttt", "without TTT it was not read"
    if not attention:
        return "ttt", "it names no layer: attention stays frozen"
    if attention == layers:
        return "ttt+ttt_layer_attention", "attention of the layers that have TTT"
    if len(attention) == MOSHI_7B["num_layers"]:
        return "ttt+attention", "attention of all layers"
    told = "attention of {} learned, which are not the layers with TTT; here attention learns in these "
    told += "(trainable: ttt+ttt_layer_attention), in all layers (ttt+attention) or in none"
    return "ttt", told.format("layers " + ", ".join(map(str, attention)))


def _layers(written: Any) -> tuple[int, ...]:
    """The layers of Moshi that a value of the fork names; none if it names something else."""
    if isinstance(written, str) and written not in ("all", "middle", "none"):
        written = [figure(part) for part in written.split(",")]
    if isinstance(written, int) and not isinstance(written, bool):
        written = [written]
    if isinstance(written, list):
        numbers = [number(part, whole=True) for part in written]
        return tuple(sorted({each for each in numbers if each is not None}))
    return select_layers(written, MOSHI_7B["num_layers"]) if written in ("all", "middle", "none") else ()


def _move_rate(moving: Import, *, has_ttt: bool, lora: bool) -> None:
    """The peak learning rate, that of LoRA and of the backbone; TTT layers have multipliers of it."""
    note = ""
    if has_ttt and lora:
        note = "LoRA's; TTT layers learn at weight_lr_multiplier times it"
    elif has_ttt:
        note = "chosen for LoRA? new TTT layers want 1e-4 or more, times weight_lr_multiplier"
    elif lora:
        note = "LoRA's; new TTT layers want 1e-4 or more"
    rate = number(figure(moving.get("optim.lr")))
    move_figure(moving, "optim.lr", "train.lr", note=note if rate is not None and rate < 1e-4 else "")


def _move_start(moving: Import) -> None:
    """What a run starts from. A checkpoint of the fork's is not an adapter of this project's."""
    checkpoint = moving.get("resume_from")
    if checkpoint:
        moving.move(
            "resume_from",
            "train.init_from",
            value=None,
            note="the fork's checkpoint is in a format of its own: import and train the config that made it, and "
            "write that run's folder here",
        )
    else:
        moving.drop("resume_from", "it names nothing: the run starts anew, as without train.init_from")
    unread = "without resume_from it was not read"
    for key, off, on in (
        (
            "reset_optimizer",
            "false: optimiser and step went on there; here --resume goes on with an interrupted run",
            "true: train.init_from takes the weights alone, the optimiser starts anew",
        ),
        (
            "reset_step",
            "false: steps were counted on there; here --resume does so, train.init_from starts at step 0",
            "true: with train.init_from steps are counted from 0",
        ),
        (
            "ttt.override_gating_alpha_on_resume",
            "false: gates start as the checkpoint has them, as with train.init_from",
            "true: gates were set to initial_gating_alpha; with train.init_from they start where the earlier run ended",
        ),
    ):
        moving.drop(key, (on if is_on(moving, key, default=False) else off) if checkpoint else unread)
