"""What a plugin provides, how it is found, and how it is asked. Imports no torch.

Every name is imported on first use, so that one name does not cost the time of all.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttt.plugins.backbone import Backbone
    from ttt.plugins.capabilities import (
        CAPABILITIES,
        Answering,
        DataReading,
        DiffusionScoring,
        Indexing,
        LowRank,
        Precomputing,
        Sampling,
        Scoring,
        SegmentReset,
        Streaming,
        WeightImport,
    )
    from ttt.plugins.capability_base import Capability, has_capability
    from ttt.plugins.capable import capability
    from ttt.plugins.data import (
        Batch,
        LossOutput,
        SourceFiles,
        StagedDataset,
        WindowDataset,
        WindowReader,
        files_of_sources,
    )
    from ttt.plugins.denoising import SegmentLosses, WindowSource
    from ttt.plugins.discovery import GROUP, PluginInfo, discover, find, forget, get_backbone, names
    from ttt.plugins.eval_tasks import AnyEvalTask, EvalContext, EvalTask
    from ttt.plugins.facts import BackboneFacts, LineFormat, NeededFile, RecordingFormat
    from ttt.plugins.hookspecs import hookimpl
    from ttt.plugins.imported import Import, ImportedConfig
    from ttt.plugins.loggers import Logger
    from ttt.plugins.lora_site import LoraSite
    from ttt.plugins.part import Part
    from ttt.plugins.rows import StepRows, rows_of_step
    from ttt.plugins.rules import Rule, rule
    from ttt.plugins.run_config import run_config_model
    from ttt.plugins.sampling import AnswerRequest, SamplePlan, SampleRequest
    from ttt.plugins.scoring import ClipReader, ScoreFacts, Scores, ScoreStream, SoundReader
    from ttt.plugins.site import Site

_EXPORTS = {
    "CAPABILITIES": "ttt.plugins.capabilities",
    "AnswerRequest": "ttt.plugins.sampling",
    "Answering": "ttt.plugins.capabilities",
    "Backbone": "ttt.plugins.backbone",
    "BackboneFacts": "ttt.plugins.facts",
    "Batch": "ttt.plugins.data",
    "Capability": "ttt.plugins.capability_base",
    "AnyEvalTask": "ttt.plugins.eval_tasks",
    "DataReading": "ttt.plugins.capabilities",
    "DiffusionScoring": "ttt.plugins.capabilities",
    "EvalContext": "ttt.plugins.eval_tasks",
    "EvalTask": "ttt.plugins.eval_tasks",
    "GROUP": "ttt.plugins.discovery",
    "Import": "ttt.plugins.imported",
    "Indexing": "ttt.plugins.capabilities",
    "ImportedConfig": "ttt.plugins.imported",
    "Logger": "ttt.plugins.loggers",
    "LineFormat": "ttt.plugins.facts",
    "LoraSite": "ttt.plugins.lora_site",
    "LowRank": "ttt.plugins.capabilities",
    "LossOutput": "ttt.plugins.data",
    "NeededFile": "ttt.plugins.facts",
    "PluginInfo": "ttt.plugins.discovery",
    "Precomputing": "ttt.plugins.capabilities",
    "RecordingFormat": "ttt.plugins.facts",
    "Rule": "ttt.plugins.rules",
    "SamplePlan": "ttt.plugins.sampling",
    "SampleRequest": "ttt.plugins.sampling",
    "Sampling": "ttt.plugins.capabilities",
    "ClipReader": "ttt.plugins.scoring",
    "ScoreFacts": "ttt.plugins.scoring",
    "ScoreStream": "ttt.plugins.scoring",
    "Scores": "ttt.plugins.scoring",
    "Scoring": "ttt.plugins.capabilities",
    "SoundReader": "ttt.plugins.scoring",
    "SegmentLosses": "ttt.plugins.denoising",
    "SegmentReset": "ttt.plugins.capabilities",
    "Site": "ttt.plugins.site",
    "SourceFiles": "ttt.plugins.data",
    "StepRows": "ttt.plugins.rows",
    "Streaming": "ttt.plugins.capabilities",
    "WeightImport": "ttt.plugins.capabilities",
    "StagedDataset": "ttt.plugins.data",
    "files_of_sources": "ttt.plugins.data",
    "WindowDataset": "ttt.plugins.data",
    "WindowReader": "ttt.plugins.data",
    "Part": "ttt.plugins.part",
    "WindowSource": "ttt.plugins.denoising",
    "capability": "ttt.plugins.capable",
    "discover": "ttt.plugins.discovery",
    "find": "ttt.plugins.discovery",
    "forget": "ttt.plugins.discovery",
    "get_backbone": "ttt.plugins.discovery",
    "has_capability": "ttt.plugins.capability_base",
    "hookimpl": "ttt.plugins.hookspecs",
    "names": "ttt.plugins.discovery",
    "rows_of_step": "ttt.plugins.rows",
    "rule": "ttt.plugins.rules",
    "run_config_model": "ttt.plugins.run_config",
}

__all__ = [
    "CAPABILITIES",
    "GROUP",
    "AnswerRequest",
    "Answering",
    "AnyEvalTask",
    "Backbone",
    "BackboneFacts",
    "Batch",
    "Capability",
    "ClipReader",
    "DataReading",
    "DiffusionScoring",
    "EvalContext",
    "EvalTask",
    "Import",
    "ImportedConfig",
    "Indexing",
    "LineFormat",
    "Logger",
    "LoraSite",
    "LossOutput",
    "LowRank",
    "NeededFile",
    "Part",
    "PluginInfo",
    "Precomputing",
    "RecordingFormat",
    "Rule",
    "SamplePlan",
    "SampleRequest",
    "Sampling",
    "ScoreFacts",
    "ScoreStream",
    "Scores",
    "Scoring",
    "SegmentLosses",
    "SegmentReset",
    "Site",
    "SoundReader",
    "SourceFiles",
    "StagedDataset",
    "StepRows",
    "Streaming",
    "WeightImport",
    "WindowDataset",
    "WindowReader",
    "WindowSource",
    "capability",
    "discover",
    "files_of_sources",
    "find",
    "forget",
    "get_backbone",
    "has_capability",
    "hookimpl",
    "names",
    "rows_of_step",
    "rule",
    "run_config_model",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'ttt.plugins' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
