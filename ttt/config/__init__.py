"""What a run is, where each of its keys was written, and what is wrong with it. Imports no torch."""

from ttt.config.schema import (
    BackboneOptions,
    DataOptions,
    EvalConfig,
    RunConfig,
    TrainConfig,
    TTTConfig,
)

__all__ = ["BackboneOptions", "DataOptions", "EvalConfig", "RunConfig", "TTTConfig", "TrainConfig"]
