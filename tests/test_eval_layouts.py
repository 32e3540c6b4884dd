"""The published layouts of pairs: read by key, whatever the order of rows, and every fault told with its line."""

from __future__ import annotations

import csv
import io
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ttt.check import check_config, load_config
from ttt.config.findings import Severity, blames_environment
from ttt.errors import ConfigEnvironmentError, EnvironmentProblem, TTTError
from ttt.eval.speech.layouts import Pair, frequency_band, lexical_pairs, story_pairs, syntactic_pairs

LEXICAL = ("filename", "id", "voice", "frequency", "word", "phones", "length", "correct")
SYNTACTIC = ("filename", "id", "voice", "type", "subtype", "transcription", "correct")
Row = tuple[str, ...]


def words(ids: int = 3, voices: Sequence[str] = ("A", "B")) -> list[Row]:
    """Rows of a lexical table: a word and a non-word for each id and voice."""
    return [
        (f"{number}{voice}{correct}", str(number), voice, str(number * 7), f"w{number}", "w er d", "5", str(correct))
        for number in range(ids)
        for voice in voices
        for correct in (1, 0)
    ]


def sentences() -> list[Row]:
    return [
        (
            f"{kind}{number}{voice}{correct}.wav",
            str(number),
            voice,
            kind,
            "sub",
            'he said, "no"\nand left',
            str(correct),
        )
        for kind in ("agreement", "binding")
        for number in (1, 2)
        for voice in ("x", "y")
        for correct in (1, 0)
    ]


def table(columns: Sequence[str], rows: Sequence[Row]) -> str:
    out = io.StringIO(newline="")
    csv.writer(out).writerows([columns, *rows])
    return out.getvalue()


def make(folder: Path, columns: Sequence[str], rows: Sequence[Row], text: str | bytes | None = None) -> Path:
    """A split's folder: its recordings, empty, and its table."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        (folder / f"{row[0].removesuffix('.wav')}.wav").touch()
    content = table(columns, rows) if text is None else text
    (folder / "gold.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def lexical(data: Path, split: str = "dev", gold: str | None = None) -> list[Pair]:
    return list(lexical_pairs(data, split, gold))


def told(call: Callable[[], object]) -> str:
    with pytest.raises(EnvironmentProblem) as caught:
        call()
    assert caught.value.exit_code == 3
    return str(caught.value)


# --- what is paired ---


def test_a_word_is_paired_with_the_non_word_of_its_id_and_voice(tmp_path: Path) -> None:
    make(tmp_path / "lexical" / "dev", LEXICAL, words())
    pairs = lexical(tmp_path)
    assert [pair.id for pair in pairs] == [f"{number}/{voice}" for number in range(3) for voice in "AB"]
    for pair in pairs:
        number, voice = pair.id.split("/")
        assert (pair.correct.stem, pair.incorrect.stem) == (f"{number}{voice}1", f"{number}{voice}0")
        assert (pair.unit, pair.cluster) == (number, number)
    assert pairs[0].tags == {"vocabulary": "oov", "frequency": "oov", "length": "5"}
    assert pairs[2].tags == {"vocabulary": "in", "frequency": "5-19", "length": "5"}


def test_the_order_of_rows_and_columns_changes_nothing(tmp_path: Path) -> None:
    rows = words(5, ("A", "B", "C", "D"))
    folder = make(tmp_path / "dev", LEXICAL, rows)
    expected = lexical(tmp_path)
    for seed in range(3):
        order = random.Random(seed)
        shuffled, columns = order.sample(rows, len(rows)), order.sample(LEXICAL, len(LEXICAL))
        turned = [tuple(row[LEXICAL.index(name)] for name in columns) for row in shuffled]
        (folder / "gold.csv").write_text(table(columns, turned), newline="")
        assert lexical(tmp_path) == expected
    rows[0], rows[1] = (*rows[0][:-1], "0"), (*rows[1][:-1], "1")  # what is told apart is only told by the table
    (folder / "gold.csv").write_text(table(LEXICAL, rows), newline="")
    assert lexical(tmp_path) != expected


def test_several_non_words_of_a_word_are_several_pairs_of_its_unit(tmp_path: Path) -> None:
    rows = [*words(1, ("A",)), ("other", "0", "A", "0", "v0", "p", "5", "0")]
    make(tmp_path, LEXICAL, rows)
    pairs = lexical(tmp_path)
    assert [(pair.id, pair.incorrect.stem) for pair in pairs] == [("0/A/0", "0A0"), ("0/A/1", "other")]
    assert {pair.unit for pair in pairs} == {"0"}


def test_sentences_are_paired_within_type_subtype_id_and_voice(tmp_path: Path) -> None:
    make(tmp_path / "syntactic" / "test", SYNTACTIC, sentences())
    pairs = list(syntactic_pairs(tmp_path, "test", None))
    assert len(pairs) == 8
    assert {pair.unit for pair in pairs} == {
        f"{kind}/sub/{number}" for kind in ("agreement", "binding") for number in "12"
    }
    assert all(pair.correct.stem[:-1] == pair.incorrect.stem[:-1] for pair in pairs)
    assert pairs[0].tags == {"type": "agreement", "subtype": "sub"}


def test_names_of_several_parts_never_meet(tmp_path: Path) -> None:
    one = [(f"a{c}", "1/2", "3", "0", "w", "p", "1", str(c)) for c in (1, 0)]
    two = [(f"b{c}", "1", "2/3", "0", "w", "p", "1", str(c)) for c in (1, 0)]
    three = [(f"c{c}", "1%2F2", "3", "0", "w", "p", "1", str(c)) for c in (1, 0)]
    make(tmp_path, LEXICAL, [*one, *two, *three])
    pairs = lexical(tmp_path)
    assert len({pair.id for pair in pairs}) == len({pair.unit for pair in pairs}) == 3


@pytest.mark.parametrize(
    ("frequency", "band"),
    [
        ("oov", "oov"),
        ("OOV ", "oov"),
        ("0", "oov"),
        ("1", "1-4"),
        ("5", "5-19"),
        ("6", "5-19"),
        ("20.0", "20-99"),
        ("21", "20-99"),
        ("100", ">=100"),
        ("101", ">=100"),
        ("²", "²"),
        ("", ""),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_bands_of_frequency(frequency: str, band: str) -> None:
    assert frequency_band(frequency) == band


def test_a_table_elsewhere_reads_the_recordings_of_the_folder(tmp_path: Path) -> None:
    make(tmp_path / "lexical" / "dev", LEXICAL, words())
    expected = lexical(tmp_path)
    gold = (tmp_path / "lexical" / "dev" / "gold.csv").rename(tmp_path / "mine.csv")
    assert lexical(tmp_path, gold=str(gold)) == expected
    assert lexical(tmp_path / "lexical" / "dev", gold=str(gold)) == expected


def test_stories_are_paired_by_their_name(tmp_path: Path) -> None:
    for name in ("2_b_correct", "2_b_incorrect", "10_a_incorrect", "10_a_correct", "._10_a_correct", "notes", "11_a_x"):
        (tmp_path / f"{name}.wav").touch()
    pairs = list(story_pairs(tmp_path))
    assert [(pair.id, pair.unit, pair.cluster) for pair in pairs] == [("10_a", "10_a", "a"), ("2_b", "2_b", "b")]
    assert [(pair.correct.name, pair.incorrect.name) for pair in pairs][1] == ("2_b_correct.wav", "2_b_incorrect.wav")


# --- tables as other programs write them ---


@pytest.mark.parametrize(
    "written",
    {
        "a mark of byte order": lambda text: b"\xef\xbb\xbf" + text.encode(),
        "line ends of Windows": lambda text: text.replace("\r\n", "\n").replace("\n", "\r\n").encode(),
        "line ends of Unix": lambda text: text.replace("\r\n", "\n").encode(),
        "no line end at the end": lambda text: text.rstrip().encode(),
        "blank lines": lambda text: ("\n".join([*text.splitlines(), "", ""])).encode(),
        "quotes everywhere": lambda text: "\n".join(
            ",".join(f'"{cell}"' for cell in line.split(",")) for line in text.splitlines()
        ).encode(),
        "blanks around": lambda text: text.replace(",", " , ").encode(),
        "line separators of Unicode": lambda text: text.replace("w er d", "w\u2028er\x85d\x0cx").encode(),
    }.items(),
    ids=lambda written: written[0],
)
def test_a_table_written_otherwise_is_the_same(tmp_path: Path, written: tuple[str, Callable[[str], bytes]]) -> None:
    folder = make(tmp_path, LEXICAL, words())
    expected = lexical(tmp_path)
    (folder / "gold.csv").write_bytes(written[1](table(LEXICAL, words())))
    assert lexical(tmp_path) == expected


def test_lines_are_counted_as_an_editor_counts_them(tmp_path: Path) -> None:
    rows = sentences()
    rows[4] = (*rows[4][:-1], "yes")  # the fifth row; those before it have two lines each
    make(tmp_path, SYNTACTIC, rows)
    assert told(lambda: list(syntactic_pairs(tmp_path, "dev", None))).startswith(
        f"{tmp_path}/gold.csv:10: correct is 'yes', not 0 or 1; "
    )


# --- what is refused ---

WORDS = table(LEXICAL, words(1, ("A",)))
BROKEN: dict[str, tuple[str | bytes, str]] = {
    "no rows": (",".join(LEXICAL), "gold.csv: has no rows"),
    "nothing": ("", "gold.csv: has no column filename, id, voice"),
    "a column is missing": (WORDS.replace("voice", "speaker"), "gold.csv: has no column voice; a gold.csv begins with"),
    "a column stands twice": (WORDS.replace("phones", "phones,id"), "gold.csv: has the column id twice"),
    "another encoding": (
        WORDS.replace("w0", "é").encode("latin-1"),
        "gold.csv: cannot be read: it is not text in UTF-8: byte ",
    ),
    "UTF-16": (WORDS.encode("utf-16"), "gold.csv: cannot be read: it is text in UTF-16; save it as UTF-8: iconv"),
    "UTF-16 without its mark": (WORDS.encode("utf-16-le"), "gold.csv: cannot be read: it is text in UTF-16"),
    "a NUL": (WORDS.replace("w0", "w\0"), "gold.csv:2: holds a NUL"),
    "a field without end": (
        WORDS.replace("w er d", "w" * 200_000, 1),
        "gold.csv:2: is no row of a table: field larger",
    ),
    "too few columns": (WORDS.replace("w0,w er d", "w0", 1), "gold.csv:2: has 7 columns, and the first line has 8"),
    "too many columns": (WORDS.replace("w er d", "w,er", 1), "gold.csv:2: has 9 columns, and the first line has 8"),
    "a quote that never ends": (WORDS.replace("w0", '"w0', 1), "gold.csv:2: has 5 columns, and the first line has 8"),
    "no recording": (WORDS.replace("0A0", "gone"), "gold.csv:3: there is no file "),
    "a recording twice": (WORDS.replace("0A0", "0A1"), "gold.csv:3: names the recording of line 2 again"),
    "a row twice": (WORDS + WORDS.splitlines()[2] + "\n", "gold.csv:4: names the recording of line 3 again"),
    "no name": (WORDS.replace("0A0", " "), "gold.csv:3: names no file"),
    "no id": (WORDS.replace("0A1,0,A", "0A1,,A"), "gold.csv:2: has no id"),
    "no voice": (WORDS.replace("0A1,0,A", "0A1,0, "), "gold.csv:2: has no voice"),
    "an absolute path": (WORDS.replace("0A0", "/etc/passwd"), "gold.csv:3: the filename '/etc/passwd' leads out of"),
    "a path upwards": (WORDS.replace("0A0", "../0A0"), "gold.csv:3: the filename '../0A0' leads out of the folder"),
    "a name too long": (WORDS.replace("0A0", "x" * 5000), "File name too long"),
    "a folder in its place": (WORDS.replace("0A0", "folder"), "a folder, not a file"),
    "another judgement": (WORDS.replace("5,1", "5,yes"), "gold.csv:2: correct is 'yes', not 0 or 1"),
    "no judgement": (WORDS.replace("5,1", "5,"), "gold.csv:2: correct is '', not 0 or 1"),
    "one side": (WORDS.rsplit("0A0", 1)[0], "gold.csv:2: no row with correct 0 has the same id, voice; add the other"),
    "both right": (WORDS.replace("5,0", "5,1"), "gold.csv:2: no row with correct 0 has the same id, voice"),
    "voices that differ": (WORDS.replace("0A0,0,A", "0A0,0,B"), "gold.csv: 2 pairs lack one side; add the other row"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_table_is_told_with_its_line(tmp_path: Path, fault: str) -> None:
    content, words_told = BROKEN[fault]
    folder = make(tmp_path, LEXICAL, words(1, ("A",)), content)
    (folder / "folder.wav").mkdir()
    sentence = told(lambda: lexical(tmp_path))
    assert words_told in sentence
    assert len(sentence) < 6000
    assert ";" in sentence  # the way out


def test_many_faults_are_one_message_with_the_first_few(tmp_path: Path) -> None:
    folder = make(tmp_path, LEXICAL, words(10))
    for file in folder.glob("*0.wav"):
        file.unlink()
    first, *lines = told(lambda: lexical(tmp_path)).splitlines()
    assert first.endswith("gold.csv: 20 rows cannot be used; mend the table, or name the folder of its recordings")
    assert lines[0].endswith(f"gold.csv:3: there is no file {folder}/0A0.wav")
    assert lines[-1].strip() == "and 15 more"


def test_a_folder_that_is_none_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    (tmp_path / "dev").mkdir()
    for name, words_told in {
        "nowhere": f"nowhere: there is no such folder in {tmp_path}, from where relative paths are read",
        "/nowhere": "/nowhere: there is no such folder; write",
        "~/x": "~/x: there is no such folder in",
        "file": "file: is a file, not a folder",
        "/dev/null": "/dev/null: is a device, not a folder",
        "x" * 5000: "there is no such folder",
        "a\0b": "there is no such folder",
        ".": ".: has no gold.csv in lexical/dev, in dev or itself; name the folder of the published set",
    }.items():
        assert words_told in told(lambda name=name: lexical(Path(name))), name
        if name != ".":
            assert words_told in told(lambda name=name: list(story_pairs(Path(name)))), name


def test_the_other_split_is_never_taken_for_this_one(tmp_path: Path) -> None:
    folder = make(tmp_path / "lexical" / "dev", LEXICAL, words())
    assert len(lexical(folder)) == 6
    sentence = told(lambda: lexical(folder, "test"))
    assert (
        sentence
        == f"{folder}: is the split dev, and the task measures test; write split: dev, or name the folder of test"
    )
    assert "has no gold.csv in lexical/test" in told(lambda: lexical(tmp_path, "test"))


def test_a_table_that_is_named_and_cannot_be_read(tmp_path: Path) -> None:
    make(tmp_path, LEXICAL, words())
    for name, words_told in {
        "no.csv": "No such file",
        str(tmp_path): "a folder, not a file",
        "/dev/zero": "a device",
    }.items():
        assert f"{name}: cannot be read: {words_told}" in told(lambda name=name: lexical(tmp_path, gold=name))


def test_stories_that_lack_an_ending_are_told(tmp_path: Path) -> None:
    assert "holds no stories" in told(lambda: list(story_pairs(tmp_path)))
    inside = tmp_path / "tSC"
    inside.mkdir()
    (inside / "1_a_correct.wav").touch()
    assert told(lambda: list(story_pairs(tmp_path))).endswith(f"; write data: {inside}")
    sentence = told(lambda: list(story_pairs(inside)))
    assert sentence.startswith(f"{inside}/1_a_correct.wav: the other ending of this story is missing; add it")
    (inside / "1_a_incorrect.wav").mkdir()
    assert "the other ending of this story is missing" in told(lambda: list(story_pairs(inside)))


# --- in a check ---


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "words" / "lexical" / "dev", LEXICAL, words())
    for number in range(3):
        for member in ("correct", "incorrect"):
            (tmp_path / "stories").mkdir(exist_ok=True)
            (tmp_path / "stories" / f"{number}_s_{member}.wav").touch()
    return tmp_path


def findings(tasks: str, *, backbone: str = "moshi", more: str = "", cost: bool = False) -> list[tuple[str, str, str]]:
    text = f"backbone: {{name: {backbone}}}\neval:\n  tasks: [{tasks}]\n{more}"
    found = check_config("c.yaml", text=text, cost=cost).findings
    return [(each.code, each.path, each.message) for each in found if each.path.startswith("eval")]


def test_a_check_holds_a_tasks_data(here: Path) -> None:
    assert findings("{name: swuggy, data: words}, {name: sstory, data: stories, limit: 3}") == []
    ((code, path, message),) = findings("{name: swuggy, data: words}, {name: sstory, data: story}")
    assert (code, path) == ("TTT513", "eval.tasks.1.data")
    assert message == f"story: there is no such folder in {here}, from where relative paths are read"
    (here / "words" / "lexical" / "dev" / "1A0.wav").unlink()
    ((code, path, message),) = findings("{name: swuggy, data: words}")
    assert (code, path) == ("TTT513", "eval.tasks.0.data")
    assert message == "words/lexical/dev/gold.csv:7: there is no file words/lexical/dev/1A0.wav"
    ((code, path, message),) = findings("{name: sblimp}", backbone="moshi, preset: 7b")
    assert (code, path) == ("TTT513", "eval.tasks.0.name")
    assert "the task sblimp has no data" in message


def test_a_check_counts_pairs_and_what_a_limit_draws(here: Path) -> None:
    ((code, path, message),) = findings(
        "{name: swuggy, data: words, limit: 2}, {name: sstory, data: stories}", cost=True
    )
    assert (code, path) == ("TTT516", "eval.tasks")
    assert "swuggy: 4 items of 2 units, drawn from 3; sstory: 3 items" in message
    ((code, path, message),) = findings("{name: swuggy, data: words, limit: 4}")
    assert (code, path) == ("TTT514", "eval.tasks.0.limit")
    assert message == "the task swuggy has 3 units, fewer than its limit of 4"


def test_a_check_says_what_the_backbone_lacks(here: Path) -> None:
    ((code, path, message),) = findings("{name: swuggy, data: words}", backbone="videodit")
    assert (code, path) == ("TTT512", "eval.tasks.0.name")
    assert message.startswith("the task swuggy: the backbone videodit has no scoring")


def test_options_that_nothing_reads_are_refused(here: Path) -> None:
    assert findings("", more="  score: {normalise: sum}\n  reset_sec: 3\n") == []
    assert findings("", backbone="videodit", more="  score: {normalise: mean}\n") == []  # as a stored config has it
    (found,) = findings("", backbone="videodit", more="  score: {normalise: sum}\n")
    assert found[:2] == ("TTT515", "eval.score")
    (found,) = findings("", backbone="videodit", more="  reset_tokens: 9\n")
    assert found[:2] == ("TTT515", "eval.reset_tokens")
    (found,) = findings("", more="  reset_tokens: 9\n  reset_sec: 3\n")
    assert found[0] == "TTT106"
    text = "backbone: {name: videodit}\neval: {score: {normalise: sum}}\n"
    with pytest.raises(TTTError, match="has no scoring"):
        load_config("c.yaml", text=text, training=False)


def test_a_check_of_every_task_imports_no_torch(here: Path) -> None:
    for book in ("one", "two"):
        (here / "light" / "reader" / book).mkdir(parents=True)
        (here / "light" / "reader" / book / "1.flac").touch()
    make(here / "words" / "syntactic" / "dev", SYNTACTIC, sentences())
    named = {"swuggy": "words", "sblimp": "words", "tstory": "stories", "sstory": "stories"}
    named |= dict.fromkeys(("librilight", "recall", "inner_loss"), "light")
    tasks = ", ".join(f"{{name: {name}, data: {data}}}" for name, data in named.items())
    text = f"backbone: {{name: moshi}}\neval: {{tasks: [{tasks}]}}\n"
    code = (
        "import sys\nfrom ttt.check import check_config\n"
        f"found = check_config('c.yaml', text={text!r}, cost=True).findings\n"
        "told, = [each.message for each in found if each.code == 'TTT516']\n"
        "assert not {'torch', 'matplotlib', 'numpy', 'transformers'} & set(sys.modules), 'it does'\n"
        "print(told)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"{name}: " in done.stdout for name in named)


def test_data_that_are_missing_stop_a_run_and_no_sample(here: Path) -> None:
    text = "backbone: {name: moshi}\neval: {tasks: [{name: sstory, data: nowhere}]}\n"
    with pytest.raises(ConfigEnvironmentError, match="nowhere: there is no such folder") as caught:
        load_config("c.yaml", text=text)
    assert caught.value.exit_code == 3
    (error,) = [finding for finding in caught.value.findings if finding.severity is Severity.ERROR]
    assert blames_environment(error)
    assert load_config("c.yaml", text=text, training=False).config.eval.tasks  # of another command
