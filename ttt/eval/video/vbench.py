"""The task `vbench`: VBench's dimensions of the samples that the model makes under each arm.

VBench (Huang et al. 2024, arXiv:2311.17982; the package `vbench`) measures a video by pretrained networks: how alike a
subject (DINO) and the background (CLIP) stay, how smooth motion is (AMT), whether there is much of it (RAFT), how
frames are liked (LAION's aesthetic predictor) and how sharp they are (MUSIQ). These are the six dimensions that it
offers for samples of one's own prompts (`mode="custom_input"`); its published totals need all sixteen, on its own
prompts. It downloads these networks when it first needs them. Where it is not installed, nothing takes its place.

This task was written against the source of vbench 0.1.5 and was not run with it: VBench asks for CUDA 11.6 to 12.1 and
pins transformers 4.33.2 and numpy below 2, which this project is not tested on. So it is no extra of this project. What
it reads of VBench is `VBench(device, full_info_dir, output_path)`, `evaluate(videos_path, name, prompt_list,
dimension_list, mode)` and the file `NAME_eval_results.json`, which holds `{dimension: [score, …]}`. This module imports
no torch.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from ttt.config.tasks import TaskOptions
from ttt.errors import EnvironmentProblem
from ttt.eval.items import Item
from ttt.eval.tasks import Setup
from ttt.eval.video.samples import Samples, SamplesOptions

if TYPE_CHECKING:
    from ttt.eval.bench import Bench

Dimension = Literal[
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
]
Dimensions = Annotated[
    tuple[Dimension, ...],
    Field(min_length=1),
    BeforeValidator(lambda value: tuple(value) if type(value) is list else value),
]
PACKAGE = "vbench"


class VBenchOptions(SamplesOptions):
    """Options of the task."""

    dimensions: Dimensions = ("subject_consistency",)
    """What is measured; the first is the task's own number."""


class VBenchTask(Samples):
    """Samples, and VBench's dimensions of each; needs the package vbench."""

    name = "vbench"
    options: ClassVar[type[TaskOptions]] = VBenchOptions

    def items(self, setup: Setup) -> Sequence[Item]:
        """An item for each prompt set.

        Raises:
            EnvironmentProblem: VBench is not installed.
        """
        require_vbench()
        return super().items(setup)

    def is_ready(self, setup: Setup) -> bool:
        """Whether it has prompts and a length, and VBench is installed."""
        return super().is_ready(setup) and importlib.util.find_spec(PACKAGE) is not None

    def numbers_of(self, bench: Bench, item: Item, files: Sequence[Path]) -> Mapping[str, float]:
        """The dimensions of a sample, 0 … 1 each."""
        prompts = self.requests(Setup(bench.config, bench.backbone, bench.options))[item.id][0].prompts
        return scores_of(files[0], " ".join(prompts), bench.options.dimensions, bench.device)


def require_vbench() -> None:
    """Refuse to go on without VBench.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        raise EnvironmentProblem(
            "the task vbench measures samples by the package vbench, which is not installed, and nothing else can take "
            "its place",
            fix="install it beside transformers 4.33.2 and numpy below 2, which it pins; or take the task `samples`, "
            "and measure what it makes by VBench in an environment of its own",
        )


def scores_of(video: Path, prompt: str, dimensions: Sequence[str], device: Any) -> dict[str, float]:
    """VBench's scores of one video by dimension.

    Raises:
        EnvironmentProblem: VBench left no results, or not those of every dimension.
    """
    from vbench import VBench  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as folder:
        bench = VBench(device, "", folder)
        bench.evaluate(
            videos_path=str(video),
            name="sample",
            prompt_list=[prompt],
            dimension_list=list(dimensions),
            mode="custom_input",
            imaging_quality_preprocessing_mode="longer",
        )
        try:
            written = json.loads((Path(folder) / "sample_eval_results.json").read_text(encoding="utf-8"))
            return {dimension: float(written[dimension][0]) for dimension in dimensions}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise EnvironmentProblem(
                f"{video}: VBench left no results that can be read ({type(error).__name__}: {error}); this task was "
                f"written for vbench 0.1.5"
            ) from error
