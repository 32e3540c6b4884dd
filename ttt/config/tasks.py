"""The entries of `eval.tasks`: the name of an evaluation task, and options that this task defines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, SerializeAsAny

from ttt.config.section import Section


class TaskOptions(Section):
    """Base of an evaluation task's options, an entry of `eval.tasks`."""

    name: str
    """Which task, as `ttt plugins` lists them."""


class AnyTask(TaskOptions):
    """Options of a task that has not been looked up."""

    model_config = ConfigDict(extra="allow")


def _as_task(value: object) -> object:
    return AnyTask.model_validate(value) if isinstance(value, Mapping) else value


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


_Task = Annotated[SerializeAsAny[TaskOptions], BeforeValidator(_as_task, json_schema_input_type=AnyTask)]
Tasks = Annotated[tuple[_Task, ...], BeforeValidator(_as_tuple, json_schema_input_type=list[_Task])]
"""The type of `eval.tasks`. Each entry is an `AnyTask` until `ttt.check` replaces it by the task's own options."""
