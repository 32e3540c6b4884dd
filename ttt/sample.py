"""Makes samples: builds a config's model, loads what it has learned, and has the backbone sample or answer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from torch import nn

from ttt.adapter import gates_closed
from ttt.adapter_file import (
    AdapterInfo,
)
from ttt.config.schema import RunConfig
from ttt.errors import NonFiniteError, UsageError
from ttt.files import replaced_file, require_place, writing
from ttt.learned import fitting, imported_from, learned_model
from ttt.plugins import Answering, AnswerRequest, Backbone, SampleRequest, Sampling, capability
from ttt.printable import say
from ttt.samples import SampleFolder, put_in_place, remove_unfinished, shared_origin, staged
from ttt.train.passes import seed_pass


def sample(
    config: RunConfig,
    backbone: Backbone,
    request: SampleRequest,
    *,
    adapter: str | Path | None = None,
    console: Console | None = None,
    verify: bool = True,
) -> list[Path]:
    """Make a sample with a config's model.

    Args:
        config: the model's config; for a run, its resolved config.
        backbone: the plugin that `config.backbone` names.
        request: the sample to make, with as many prompts as its `plan_sample` says.
        adapter: an adapter's file or folder, or a run's folder, whose last checkpoint is used. None samples the model
            as training would start it.
        console: the console for reports; standard output by default.
        verify: compare the adapter with its checksums.

    Returns:
        The files written, the sample first.

    Raises:
        UsageError: the backbone cannot sample, or cannot make this sample.
        AdapterMismatchError: the adapter belongs to another model; the message names each difference.
        EnvironmentProblem: weights, a device, memory, disk space or a writable folder is missing.
    """
    console = console or Console()
    sampler = capability(backbone, Sampling)
    config, [request], info = _looked_at(config, backbone, [request], adapter=adapter, verify=verify)
    with learned_model(config, backbone, info, as_start=adapter is None, ways=_ways(config)) as (model, injection):
        injection.for_inference()
        make = sampler.prepare_samples(model, [request], config, console=console)
        seed_pass(request.seed, "sample", 0)
        return list(make(request))


def sample_many(
    config: RunConfig,
    backbone: Backbone,
    requests: Sequence[SampleRequest],
    *,
    adapter: str | Path | None = None,
    console: Console | None = None,
    verify: bool = True,
    overwrite: bool = False,
) -> list[Path]:
    """Make the samples of a folder that do not exist yet, one after another.

    Each gets a record of what it was made from; see `ttt.samples`. A sample whose numbers are not finite is not
    written, and the others are still made.

    Args:
        config: as for `sample`.
        backbone: as for `sample`.
        requests: the samples to make, each with its own `out` in one folder.
        adapter: as for `sample`.
        console: as for `sample`.
        verify: compare the adapter and the existing samples with their checksums.
        overwrite: make existing samples again if they were made from something else.

    Returns:
        The files written; existing samples are left out.

    Raises:
        UsageError: as for `sample`; or another file has the name of a sample.
        AdapterMismatchError: as for `sample`.
        EnvironmentProblem: as for `sample`; the samples made so far stay.
        NonFiniteError: some samples are not finite; it is raised after all others were made.
    """
    console = console or Console()
    as_start = adapter is None
    config, requests, info = _looked_at(config, backbone, requests, adapter=adapter, verify=verify)
    sampler = capability(backbone, Sampling)
    files = [sampler.plan_sample(config, seconds=each.seconds, out=each.out).files for each in requests]
    _require_apart(requests, files)
    origin = shared_origin(config, info, as_start=as_start)
    folder = SampleFolder(requests, files, origin=origin, adapter=None if info is None else info.path)
    with folder.held():
        missing = folder.missing(overwrite=overwrite, verify=verify)
        if len(missing) < len(requests):
            say(console, f"{folder.path}: {len(requests) - len(missing)} of {len(requests)} samples are there already")
        if not missing:
            return []
        with learned_model(config, backbone, info, as_start=as_start, ways=_ways(config)) as (model, injection):
            injection.for_inference()
            return _made(model, config, sampler, requests, missing, folder, console)


def answer(
    config: RunConfig,
    backbone: Backbone,
    requests: Sequence[AnswerRequest],
    *,
    adapter: str | Path | None = None,
    console: Console | None = None,
    verify: bool = True,
) -> list[Path]:
    """Answer recordings with a config's model, one after another. Each is heard from fresh fast weights on.

    An answer is moved to its place when it is complete; one that is interrupted leaves nothing.

    Args:
        config: as for `sample`.
        backbone: as for `sample`.
        requests: the recordings. Files that are there are replaced.
        adapter: as for `sample`.
        console: as for `sample`.
        verify: compare the adapter with its checksums.

    Returns:
        The files written: of each recording the sound first.

    Raises:
        UsageError: the backbone cannot answer, or cannot make such an answer.
        AdapterMismatchError: as for `sample`.
        EnvironmentProblem: as for `sample`; or a recording is missing or broken.
    """
    console = console or Console()
    answering = capability(backbone, Answering)
    for request in requests:
        answering.check_answer(config, request)
        for file in answering.plan_answer(config, request):
            require_place(file)
            replaced_file(file)
    config, info = fitting(config, backbone, adapter=adapter, verify=verify)
    written: list[Path] = []
    with learned_model(config, backbone, info, as_start=adapter is None, ways=_ways(config)) as (model, injection):
        injection.for_inference()
        make = answering.prepare_answers(model, config, console=console)
        for request in requests:
            files = _answered(model, make, request)
            say(console, f"wrote {', '.join(map(str, files))}")
            written += files
    return written


def _answered(model: nn.Module, make: Callable[[AnswerRequest], Sequence[Path]], request: AnswerRequest) -> list[Path]:
    folder = request.out.parent
    with writing(request.out):
        folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder, {request.out.stem})
    seed_pass(request.seed, "sample", 0)
    closed = gates_closed(model) if request.gates == "closed" else contextlib.nullcontext()
    with staged(request.out) as place, closed:
        files = make(replace(request, out=place))
        return put_in_place(files, folder)


def _made(
    model: nn.Module,
    config: RunConfig,
    sampler: Sampling,
    requests: Sequence[SampleRequest],
    missing: Sequence[SampleRequest],
    folder: SampleFolder,
    console: Console,
) -> list[Path]:
    make = sampler.prepare_samples(model, missing, config, console=console)
    written: list[Path] = []
    failed: list[str] = []
    numbers = {request.out: number for number, request in enumerate(requests, 1)}
    for request in missing:
        say(console, f"sample {numbers[request.out]} of {len(requests)}: {request.out}, seed {request.seed}")
        seed_pass(request.seed, "sample", 0)
        try:
            with folder.making(request) as moved:
                files = [request.out.with_name(file.name) for file in make(moved)]
        except NonFiniteError as error:
            failed.append(f"{request.out}: {error}")
            say(
                console, f"{failed[-1]}; the others are made all the same" if request is not missing[-1] else failed[-1]
            )
            continue
        written += files
        say(console, f"wrote {', '.join(map(str, files))}")
    if failed:
        raise NonFiniteError.about(
            failed,
            f"of {len(requests)} samples could not be made; the others are whole, and the same command tries anew",
        )
    return written


def _require_apart(requests: Sequence[SampleRequest], files: Sequence[Sequence[Path]]) -> None:
    """Refuse samples with the same file, or in different folders.

    Raises:
        UsageError: two samples have the same file, or are in different folders.
    """
    seen: set[Path] = set()
    for request, several in zip(requests, files, strict=True):
        for file in (*several, request.out.with_suffix(".json")):
            if file in seen or file.parent != requests[0].out.parent:
                raise UsageError(f"{file}: two files of these samples would be it, or it is in another folder")
            seen.add(file)


def _looked_at(
    config: RunConfig,
    backbone: Backbone,
    requests: Sequence[SampleRequest],
    *,
    adapter: str | Path | None,
    verify: bool,
) -> tuple[RunConfig, list[SampleRequest], AdapterInfo | None]:
    """Check all that needs no model; returns the config with the backbone's options, the requests, the adapter."""
    sampler = capability(backbone, Sampling)
    for request in requests:
        sampler.check_sample(config, request)
    require_place(requests[0].out)
    config, info = fitting(config, backbone, adapter=adapter, verify=verify)
    return config, [replace(request, imported_from=imported_from(info)) for request in requests], info


def _ways(config: RunConfig) -> list[str]:
    return ["a shorter sample"] + ["train.param_dtype: bfloat16"] * (config.train.param_dtype == "float32")
