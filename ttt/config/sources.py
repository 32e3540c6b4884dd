"""Where training data come from: one text in `data.train_data`, or several weighted sources. Imports no torch.

A backbone whose data can be of several sources gives `train_data` and `eval_data` of its `data` section the type
`str | Sources[DataSource] | None`, or a subclass of `DataSource` there. Whoever asks which data a config names asks
`sources_of`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, Field

from ttt.config.misfit import Misfit
from ttt.config.section import Section
from ttt.config.values import MOST_FACTOR, as_tuple

DATA_KEYS = ("train_data", "eval_data")
"""The keys of a `data` section that name data."""
MOST_SOURCES = 1000
"""Of one key."""


class DataSource(Section):
    """One of several sources of data."""

    path: Annotated[str, Field(min_length=1)]
    """The source, in the backbone's format."""
    weight: Annotated[float, Field(ge=1e-6, le=MOST_FACTOR)] = 1.0
    """Its share of the windows that training reads is its weight of the sum of all weights, whatever its length."""


SourceT = TypeVar("SourceT", bound=DataSource)
Sources = Annotated[tuple[SourceT, ...], Field(min_length=1, max_length=MOST_SOURCES), BeforeValidator(as_tuple)]
"""A list of sources in a config, as `Sources[MySource]`."""


def sources_of(data: BaseModel, key: str) -> tuple[DataSource, ...]:
    """The sources that `data.train_data` or `data.eval_data` names: none if it is null, one if it is a text.

    Args:
        data: the `data` section of a backbone.
        key: `train_data` or `eval_data`.
    """
    written: Any = getattr(data, key)
    if written is None:
        return ()
    return (_kind_of(type(data), key)(path=written),) if isinstance(written, str) else tuple(written)


@functools.cache
def _kind_of(section: type[BaseModel], key: str) -> type[DataSource]:
    """The class of the sources that a key may list; the base if it is always a text."""
    return _source_in(section.model_fields[key].annotation) or DataSource


def _source_in(annotation: Any) -> type[DataSource] | None:
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation if issubclass(annotation, DataSource) else None
    return next(filter(None, map(_source_in, get_args(annotation))), None)


def places_of(data: BaseModel, key: str) -> dict[str, DataSource]:
    """The same by the key of the config that names each: `data.train_data`, or `data.train_data.0.path`."""
    sources = sources_of(data, key)
    if isinstance(getattr(data, key), str):
        return {f"data.{key}": source for source in sources}
    return {f"data.{key}.{number}.path": source for number, source in enumerate(sources)}


def places_of_split(data: BaseModel, split: str) -> dict[str, DataSource]:
    """The same for a split, `train` or `eval`, which is the training data if no other is named.

    Empty if the config names none of either, so that it is the backbone's own.
    """
    of_its_own = split == "eval" and getattr(data, DATA_KEYS[1]) is not None
    return places_of(data, "eval_data" if of_its_own else "train_data")


def require_sources_fit(data: BaseModel) -> None:
    """Refuse lists of sources in which something would do nothing: a source twice, weights of an evaluation.

    Raises:
        Misfit: there is such a source.
    """
    for key in DATA_KEYS:
        written = getattr(data, key)
        if not isinstance(written, str | None):
            require_distinct(written, key)
            require_unweighted(written if key == "eval_data" else (), key)


def require_distinct(sources: Iterable[DataSource], key: str) -> None:
    """Refuse sources that differ in nothing but their weight.

    Raises:
        Misfit: there are two such sources.
    """
    seen: set[DataSource] = set()
    for source in sources:
        alone = source.model_copy(update={"weight": 1.0})
        if alone in seen:
            raise Misfit(
                f"{key} names {source.path!r} twice",
                keys=(key,),
                fix="name it once, with the sum of the weights",
            )
        seen.add(alone)


def require_unweighted(sources: Iterable[DataSource], key: str) -> None:
    """Refuse weights where they would do nothing: an evaluation reads every window once.

    Raises:
        Misfit: a source has a weight other than 1.
    """
    for source in sources:
        if source.weight != 1.0:
            raise Misfit(
                f"{key} gives {source.path!r} the weight {source.weight:g}, but an evaluation reads each window once",
                keys=(key,),
                fix="leave out weight",
            )
