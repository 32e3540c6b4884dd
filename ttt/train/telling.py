"""The report before a run's first step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ttt.adapter_file import AdapterInfo, changed_at_start, trained_backbone
from ttt.plugins.data import SourceFiles, source_files
from ttt.train.lora import lora_in_words
from ttt.train.parts import Parts
from ttt.train.progress import Progress
from ttt.train.setup import device_in_words


def announce(parts: Parts, progress: Progress) -> None:
    """Report what is trained, on which data and device, and from which weights."""
    config, dataset = parts.config, parts.dataset
    added = sum(tensor.numel() for tensor in parts.injection.state_dict().values())
    of_backbone = sum(parameter.numel() for parameter in parts.model.parameters()) - added
    files = len(dataset.files)
    by_file = ", in random order, the windows of each in order" if config.data.shuffle == "files" else ""
    accumulated = f" × {config.train.num_microbatches}" if config.train.num_microbatches > 1 else ""
    world = parts.world
    several = "" if world.alone else f", in {world.size} processes ({world.layout.in_words()})"
    resumed = f", resumed after step {progress.done} of {config.train.max_steps}" if progress.done else ""
    parts.say(
        f"backbone {parts.backbone.name}: {of_backbone:,} parameters ({config.train.param_dtype}); "
        f"{_added_in_words(parts)}; learning: {parts.learned_parameters:,}"
    )
    for sentence in parts.backbone.describe_model(parts.model):
        parts.say(sentence)
    parts.say(
        f"data: {len(dataset)} windows in {files} {'file' if files == 1 else 'files'}{by_file}; "
        f"batches of {config.train.batch_size}{accumulated}; on {device_in_words(parts.device)}{several}"
    )
    _announce_sources(source_files(dataset), parts)
    parts.say(f"run: {parts.directory.path}{resumed}")
    if parts.start is not None:
        _announce_start(parts, parts.start)
    if parts.config.lora.init_from is not None and parts.injection.lora is not None and not progress.done:
        parts.say(f"LoRA starts from {parts.config.lora.init_from}")
    notices = (dataset.notice or "", parts.eval_dataset.notice or "")
    for line in dict.fromkeys("\n".join(notices).split("\n")):
        if line:
            parts.say(line)


def _announce_sources(sources: Sequence[SourceFiles], parts: Parts) -> None:
    """If the data are of several sources, report what each holds and gives."""
    total, files = math.fsum(source.weight for source in sources), parts.dataset.files
    for source in sources if len(sources) > 1 else ():
        windows = sum(len(files[number]) for number in source.files)
        parts.say(
            f"data: of these, {windows} windows in {len(source.files)} "
            f"{'file' if len(source.files) == 1 else 'files'} are of {source.name}, which gives "
            f"{source.weight / total:.1%} of what is read"
        )


def _added_in_words(parts: Parts) -> str:
    """What was added to the backbone, with its parameters."""
    injection, told = parts.injection, []
    if injection.sites or injection.lora is None:
        layers = ", ".join(str(site.layer) for site in injection.sites) or "none"
        of_ttt = sum(tensor.numel() for each in injection.adapters.values() for tensor in each.state_dict().values())
        told.append(f"TTT-{parts.config.ttt.layer_type} in layers {layers}: {of_ttt:,}")
    if injection.lora is not None:
        told.append(lora_in_words(injection.lora))
    return "; ".join(told)


def _announce_start(parts: Parts, start: AdapterInfo) -> None:
    along = sum(math.prod(facts.shape) for facts in trained_backbone(start).values())
    included = f", {along:,} parameters of the backbone included" if along else ""
    parts.say(f"starts from {start.path}{included}")
    for setting in changed_at_start(start, parts.config.ttt):
        parts.say(f"changed at its start: {setting}")
