"""What `ttt check` finds in the folder of codes (MSH506), without torch or a codec."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

from ttt.config import Blame, Code, Finding, Severity
from ttt.config.sources import DATA_KEYS, DataSource, sources_of
from ttt.errors import EnvironmentProblem
from ttt.jsonl import Line, parse_object, path_in, read_excerpt
from ttt.plugins import rule
from ttt.words import first_few
from ttt_moshi import demo
from ttt_moshi.codes import CodeSettings, Content, channel_in_words, codec_identity, missing
from ttt_moshi.options import MoshiRun, model_config_of, reads_with_the_demos

_code = partial(Code, of_training=True, home=__name__)
MSH506 = _code("MSH506", "codes that are missing, or of something else", Severity.ERROR, blames=Blame.MACHINE)

# A check is instant: the run looks at every recording, and compares the weights of a Mimi.
_MOST_LINES: Final = 20
_MOST_BYTES: Final = 1 << 20


@rule(MSH506, reads=("data", "backbone"))
def codes_are_of_the_recordings(config: MoshiRun) -> Iterator[Finding]:
    """A folder of codes has those of the recordings that the config names, in its windows."""
    if config.data.codes is None:
        return
    folder = Path(config.data.codes)
    sources = [source for key in DATA_KEYS for source in sources_of(config.data, key)]
    if config.data.train_data is None and reads_with_the_demos(config.backbone):  # then the demo's own are read
        own = (demo.TRAIN_DATA, demo.EVAL_DATA) if config.data.eval_data is None else (demo.TRAIN_DATA,)
        sources += [config.data.source(str(file)) for file in own]
    problems = [told for source in sources for told in _missing(config, source, folder)]
    if problems:
        yield MSH506.at(
            "data.codes",
            f"{first_few(problems, separator='; ')}; the run stops before its first step",
            "run ttt precompute with this config, or write codes: null",
            value=len(problems),
        )


def _missing(config: MoshiRun, source: DataSource, folder: Path) -> Iterator[str]:
    """What is missing of the first recordings that the lines of a source name."""
    data = config.data
    read = read_excerpt(source.path, most_lines=_MOST_LINES, most_bytes=_MOST_BYTES)
    channel = channel_in_words(data.format_of(source) == "transcribed", data.channel_of(source))
    settings = CodeSettings(_codec(config), data.duration_sec, channel)
    for line in () if read is None else read.lines:
        audio = _audio(line)
        if audio is None:
            continue
        try:
            wrong = missing(folder, Content.of(audio), settings)
        except (EnvironmentProblem, ValueError):  # it cannot be read, which another rule says
            continue
        if wrong is not None:
            yield f"{line.short_place} ({audio.name}: {wrong})"


def _codec(config: MoshiRun) -> str:
    """Which codec makes codes in the run; empty if that would take long to find out."""
    if not reads_with_the_demos(config.backbone):
        return ""
    try:
        return codec_identity(model_config_of(config.backbone).codebooks, demo.CODEC, own=True)
    except EnvironmentProblem:
        return ""


def _audio(line: Line) -> Path | None:
    try:
        path = path_in(parse_object(line.content), "path")
    except ValueError:
        return None
    return None if path is None else line.folder / path


CODES_RULES = (codes_are_of_the_recordings,)
