"""Whether what is added to the backbone, TTT layers and LoRA, can be added and acts (TTT72x)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ttt.check.rules.rule import NEEDS, Context, rule
from ttt.config.findings import Blame, Code, Family, Finding, Severity
from ttt.config.lora import LoraConfig
from ttt.errors import EnvironmentProblem
from ttt.lora_file import LoraFile, read_lora_file

_code = partial(Code, family=Family.OPTIMISATION, home=__name__)
TTT721 = _code("TTT721", "LoRA in a backbone that has none", Severity.ERROR)
TTT722 = _code("TTT722", "TTT layers that are asked for and not named", Severity.ERROR)
TTT723 = _code("TTT723", "a rank without anything to match", Severity.ERROR)
TTT724 = _code("TTT724", "what acts on LoRA, in a run without LoRA", Severity.WARNING)
TTT725 = _code(
    "TTT725", "a LoRA to start from that is not there", Severity.ERROR, blames=Blame.MACHINE, of_training=True
)
TTT726 = _code("TTT726", "a LoRA to start from that does not fit", Severity.ERROR, of_training=True)
TTT727 = _code("TTT727", "a rank above what a layer can have", Severity.WARNING)


@rule(TTT721, reads=("adapter", "backbone"))
def backbone_has_lora(context: Context) -> Iterator[Finding]:
    """The backbone can have LoRA, if the run asks for it."""
    from ttt.plugins import CAPABILITIES, LowRank, has_capability

    if context.config.has_lora and context.known_backbone and not has_capability(context.backbone, LowRank):
        yield TTT721.at(
            "adapter",
            message=f"the backbone {context.backbone.name} has no {CAPABILITIES[LowRank].lacking}",
            fix="write adapter: ttt",
            value=context.config.adapter,
        )


@rule(TTT722, reads=("adapter", "ttt.layers", "train.trainable"))
def layers_are_named(context: Context) -> Iterator[Finding]:
    """What needs TTT layers has some."""
    config = context.config
    if context.has_layers:
        return
    if config.adapter == "ttt+lora":
        yield TTT722.at(
            context.first_written("ttt.layers", "adapter"),
            message="adapter: ttt+lora puts TTT beside LoRA, and ttt.layers names no layer",
            fix="name layers in ttt.layers, or write adapter: lora",
        )
    if config.train.trainable == "ttt+ttt_layer_attention":
        yield TTT722.at(
            "train.trainable",
            message="trainable: ttt+ttt_layer_attention unfreezes the attention of layers that have TTT, and none has",
            fix=f"write trainable: {'ttt' if config.has_lora else 'all'}, or name layers in ttt.layers"
            + (" with adapter: ttt+lora" if config.adapter == "lora" else ""),
        )


@rule(TTT723, reads=("adapter", "lora.rank", "ttt.layers"))
def rank_has_something_to_match(context: Context) -> Iterator[Finding]:
    """`rank: match` has TTT layers to match."""
    config = context.config
    if config.has_lora and config.lora.rank == "match" and config.ttt.layers in ("none", ()):
        yield TTT723.at(
            "lora.rank",
            message="rank: match counts the parameters of the TTT layers in ttt.layers, and that names none",
            fix="write a number, or name the layers whose parameters LoRA should have",
        )


@rule(TTT724, reads=("adapter", "lora", "train.lora_lr_multiplier"))
def lora_acts(context: Context) -> Iterator[Finding]:
    """Nothing is set for LoRA in a run that has none."""
    config = context.config
    if config.has_lora:
        return
    changed = [f"lora.{key}" for key in LoraConfig.model_fields if getattr(config.lora, key) != _DEFAULTS[key]]
    changed += ["train.lora_lr_multiplier"] if config.train.lora_lr_multiplier != 1 else []
    for key in changed[:1]:
        others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        yield TTT724.at(
            key,
            message=f"{key}{others} does nothing: adapter: ttt adds no LoRA to the backbone",
            fix="write adapter: lora or ttt+lora, or leave it out",
        )


_DEFAULTS = {key: info.default for key, info in LoraConfig.model_fields.items()}


@rule(TTT725, TTT726, reads=("adapter", "lora", "train.init_from"))
def lora_start_fits(context: Context) -> Iterator[Finding]:
    """What LoRA starts from is there, and has the config's rank and scaling."""
    config, path = context.config, context.config.lora.init_from
    if path is None or not config.has_lora or context.resuming:
        return
    found = _read(path)
    if isinstance(found, EnvironmentProblem):
        yield TTT725.at(
            "lora.init_from", message=found.told, fix="write the path of a lora.safetensors, or null", value=path
        )
        return
    problem = found.problem_with(config.lora.rank, config.lora.scaling)
    if problem is not None:
        key = f"lora.{problem.keys[0]}"
        yield TTT726.at(context.first_written(key, "lora.init_from"), problem.message, problem.fix)
    if config.train.init_from is not None:
        yield TTT726.at(
            "lora.init_from",
            message="train.init_from and lora.init_from both say what LoRA starts from",
            fix="leave one of them out",
        )


def _read(path: str) -> LoraFile | EnvironmentProblem:
    try:
        return read_lora_file(Path(path))
    except EnvironmentProblem as problem:
        return problem
    except (OSError, ValueError) as error:  # a name that no file can have
        return EnvironmentProblem(f"{path}: {getattr(error, 'strerror', None) or error}")


@rule(TTT727, reads=("adapter", "lora", *NEEDS))
def rank_is_low(context: Context) -> Iterator[Finding]:
    """The rank is below the smaller width of every linear layer."""
    shapes, rank, matched = context.lora_shapes, context.needs.lora_rank, context.config.lora.rank == "match"
    narrow = [] if not shapes or rank is None else [shape for shape in shapes if rank > min(shape)]
    if not shapes or not narrow or (matched and context.config.ttt.layers in ("none", ())):
        return
    count, least = sum(shapes[shape] for shape in narrow), min(map(min, narrow))
    yield TTT727.at(
        "lora.rank",
        message=(
            f"{'rank: match is' if matched else 'a rank of'} {rank}, and {count} of {sum(shapes.values())} linear "
            f"layers are narrower (the narrowest {least}): there LoRA has more parameters than it has freedom"
        ),
        fix="write a smaller rank, other lora.linears, or match fewer or narrower TTT layers",
        value=rank,
    )
