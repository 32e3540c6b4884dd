"""The synthetic speech benchmark: its gates, its texts, and the subset that ships with ttt-moshi."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import make_speech_benchmark
import numpy as np
import pytest
import torch
from speech_benchmark import balance, book, gating, layouts, making, reading, sentences, speaking, stories, words

from ttt.eval.speech import gates
from ttt_moshi import demo
from ttt_moshi.audio import inspect_audio, read_audio

SUBSET = demo.FOLDER / "tasks"
MANIFEST = json.loads((SUBSET / "manifest.json").read_text(encoding="utf-8"))
LEXICON = {word: tuple(phones.split()) for word, phones in MANIFEST["swuggy"]["lexicon"].items()}
BIGRAMS = words.Bigrams.of(LEXICON)


def gold(task: str, split: str) -> list[dict[str, str]]:
    folder = layouts.zerospeech_folder(SUBSET, task, split)
    with (folder / "gold.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


SPLITS = [(task, split) for task in layouts.ZEROSPEECH for split in layouts.SPLITS]


@pytest.fixture(autouse=True)
def threads():
    """The script takes one thread; what other tests have is put back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- the gates themselves ---


def test_sound_gates_are_length_loudness_and_energy():
    sound = np.array([3.0, -4.0, 0.0, 0.0])
    assert {name: gate(sound) for name, gate in gates.SOUND_GATES.items()} == {"length": 4, "rms": 2.5, "energy": 25}
    assert gates.rms([]) == gates.energy([]) == gates.length([]) == 0


@pytest.mark.parametrize("gate", gates.SOUND_GATES.values())
def test_a_sound_gate_takes_one_channel(gate):
    with pytest.raises(ValueError, match=r"a waveform \[samples\], not \[2, 3\]"):
        gate(np.zeros((2, 3)))


def test_unigrams_leave_the_clip_out():
    """Against the definition, clip by clip."""
    chance = np.random.default_rng(0)
    clips = [chance.integers(0, 9, size) ** 2 for size in (1, 5, 30, 7)]
    codes = sorted({int(code) for clip in clips for code in clip})
    found = {how: gates.unigram_scores(clips, normalise=how, smoothing=0.25) for how in ("mean", "sum")}
    for i, clip in enumerate(clips):
        others = Counter(int(code) for j, other in enumerate(clips) for code in other if j != i)
        whole = others.total() + 0.25 * len(codes)
        logs = [math.log((others[int(code)] + 0.25) / whole) for code in clip]
        assert found["sum"][i] == pytest.approx(sum(logs))
        assert found["mean"][i] == pytest.approx(sum(logs) / len(clip))


def test_a_clip_does_not_vouch_for_itself():
    """Counted in, the long clip of one rare code would be the likeliest."""
    common, odd = [1, 2, 3, 1, 2, 3], [7] * 50
    scores = gates.unigram_scores([common, common, odd])
    assert scores[2] < scores[0]


@pytest.mark.parametrize("clip", [[], [[1, 2]], [1.5, 2.0]])
def test_unigrams_are_of_one_stream_of_integers(clip):
    with pytest.raises(ValueError, match=r"clip 1 is .*; clips are one stream of integers, \[T\], T >= 1"):
        gates.unigram_scores([[1, 2], clip])


def test_unigrams_of_nothing_are_nothing():
    assert gates.unigram_scores([]) == []
    with pytest.raises(ValueError, match="smoothing is 0; it must be above 0"):
        gates.unigram_scores([[1]], smoothing=0)


def heard(length: float, codes: Sequence[int]) -> balance.Heard:
    return balance.Heard({"length": length, "rms": 1.0, "energy": length}, np.array(codes))


def test_accuracy_is_of_pairs_not_of_voices():
    """Four voices of a pair that all agree are one observation, and a tie is half."""
    longer, shorter, equal = (heard(2, [1]), heard(1, [1])), (heard(1, [1]), heard(2, [1])), (heard(1, [1]),) * 2
    found = balance.accuracies([[longer] * 4, [shorter] * 4, [equal] * 4, [longer, shorter, longer, longer]])
    values = np.array([1, 0, 0.5, 0.75])
    assert found["length"].mean == values.mean()
    assert found["length"].stderr == pytest.approx(values.std(ddof=1) / 2)
    assert (found["rms"].mean, found["rms"].stderr, found["rms"].pairs) == (0.5, 0, 4)


def test_choosing_balances_what_chance_would_not():
    """Three of four choices of a slot have the longer member right; taken blindly, length scores 75 %."""
    chance = random.Random(0)
    slots = [
        [[(heard(8 + (i != 0), [chance.randrange(6)]), heard(8 + (i == 0), [chance.randrange(6)]))] for i in range(4)]
        for _ in range(24)
    ]
    blind = balance.accuracies([slot[1] for slot in slots])["length"]
    assert blind.mean == 1
    assert not blind.honest
    chosen = balance.choose(slots, seed=0)
    assert chosen == balance.choose(slots, seed=0)
    found = balance.accuracies([slot[i] for slot, i in zip(slots, chosen, strict=True)])
    assert all(accuracy.honest and abs(accuracy.mean - 0.5) < 0.03 for accuracy in found.values())


# --- the texts, without espeak-ng ---


def test_the_lists_are_of_distinct_words():
    assert set(LEXICON) == {*words.WORDS, *words.OTHER_WORDS}
    assert len(words.WORDS) + len(words.OTHER_WORDS) == len(LEXICON)
    assert len(words.WORDS) > 300


def test_swaps_match_bigrams_and_sound_like_no_word():
    known = {words.plain(phones) for phones in LEXICON.values()}
    count = 0
    for word in words.WORDS[::24]:
        for non in words.choose_swaps(word, LEXICON, BIGRAMS, count=6, seed=0):
            count += 1
            assert words.plain(non.phones) not in known
            assert all(BIGRAMS.pairs[pair] > 0 for pair in words.bigrams_of(non.phones))
            others = words.Bigrams.of({w: phones for w, phones in LEXICON.items() if w != word})
            own, other = others.score(LEXICON[word]), others.score(non.phones)
            assert abs(other - own) <= words.TOLERANCE
            changed = [(a, b) for a, b in zip(LEXICON[word], non.phones, strict=True) if a != b]
            assert len(changed) == (2 if len(non.phones) >= 7 else 1)
            assert all(
                words.is_vowel(a) == words.is_vowel(b) and words.stress(a) == words.stress(b) for a, b in changed
            )
    assert count > 30


def test_a_swap_that_makes_another_word_is_left_out(monkeypatch):
    """Words that differ in stress alone sound the same here."""
    monkeypatch.setattr(words, "TOLERANCE", math.inf)
    lexicon = {"cat": ("k", "'a", "t"), "tab": ("t", "'a", "b"), "back": ("b", "a", "k")}
    assert ("b", "a", "t") in _sounds_of_swaps("cat", lexicon)
    assert ("b", "a", "t") not in _sounds_of_swaps("cat", lexicon | {"bat": ("b", "a", "t")})


def _sounds_of_swaps(word: str, lexicon: dict[str, words.Phones]) -> set[words.Phones]:
    return {words.plain(non.phones) for non in words.swaps(word, lexicon, words.Bigrams.of(lexicon))}


@pytest.mark.parametrize("times", [1, 2])
def test_all_ways_to_replace_are_found(times):
    """Against trying everything."""
    phones = LEXICON["garden"]
    kin = [[words.stress(p) + q for q in BIGRAMS.phones if words.is_vowel(q) == words.is_vowel(p)] for p in phones]
    tried = []
    for places in itertools.combinations(range(len(phones)), times):
        for new in itertools.product(*(kin[place] for place in places)):
            way = list(phones)
            for place, phone in zip(places, new, strict=True):
                way[place] = phone
            if sum(a != b for a, b in zip(phones, way, strict=True)) == times and BIGRAMS.attested(way):
                tried.append(tuple(way))
    assert sorted(words.replaced(phones, BIGRAMS, times)) == sorted(tried)


@pytest.fixture
def few_words(monkeypatch):
    """The lists shortened, or the many swaps of long words take seconds."""
    monkeypatch.setattr(words, "WORDS", words.WORDS[::16])


def test_texts_are_the_same_every_time_and_other_with_another_seed(few_words):
    counts = making.frequencies(0)
    for texts in (
        lambda seed: making.word_hands(LEXICON, counts, making.SUBSET, seed),
        lambda seed: making.sentence_hands(making.SUBSET, seed),
        lambda seed: making.story_hands("sstory", making.SUBSET, seed),
        lambda seed: list(itertools.islice(reading.prose(seed=seed, book="a"), 40)),
    ):
        assert texts(0) == texts(0)
        assert texts(0) != texts(1)


@pytest.mark.parametrize("size", [making.FULL, making.SUBSET])
def test_every_pair_has_choices_of_its_own(size):
    """No sentence or story is a candidate of two pairs."""
    for made, wanted in (
        (making.sentence_hands(size, 0), sum(size.sentences.values())),
        (making.story_hands("tstory", size, 0), size.stories),
        (making.story_hands("sstory", size, 0), size.stories),
    ):
        texts = [text for hand in made for text in {(pair.correct, pair.incorrect) for pair in hand}]
        assert all(made)
        assert (len(made), len(texts)) == (wanted, len(set(texts)))


def test_no_word_is_a_candidate_of_two_pairs(few_words):
    hands = making.word_hands(LEXICON, making.frequencies(0), making.SUBSET, 0)
    assert len(hands) == sum(making.SUBSET.words.values())
    assert all(hands)
    owners = Counter(word for hand in hands for word in {non.word for non in hand})
    assert set(owners.values()) == {1}


def test_sentence_pairs_have_mirrored_halves():
    made = sentences.sentence_pairs(seed=0)
    assert Counter(kind for kind, _ in made) == dict.fromkeys(sentences.TEMPLATES, 2)
    for pair in itertools.chain.from_iterable(made.values()):
        assert pair.correct != pair.incorrect
        right, wrong = (re.findall(r"\w+", text) for text in (pair.correct, pair.incorrect))
        assert abs(len(right) - len(wrong)) <= 1
        if pair.type == "word_order":
            assert Counter(right) == Counter(wrong)
    singular, plural = (made["subject_verb_agreement", half] for half in ("singular_subject", "plural_subject"))
    assert all(len(pair.correct) > len(pair.incorrect) for pair in singular)
    assert all(len(pair.correct) < len(pair.incorrect) for pair in plural)


def test_wrong_endings_are_of_another_topic_or_another_story():
    for kind, same in (("tstory", False), ("sstory", True)):
        told = list(itertools.chain.from_iterable(stories.stories(kind, seed=0)))
        assert all((s.topic == s.wrong_topic) == same and s.ending != s.wrong_ending for s in told)
        assert {s.ending for s in told} == {s.wrong_ending for s in told}
        assert not any("{" in s.correct + s.incorrect for s in told)


def spoken_as_noise(seconds_a_word: float):
    """Instead of espeak-ng: noise that depends on the text alone, long as its words are."""

    class Speaker:
        voice, rate = "noise", 8000

        def say(self, text: str) -> np.ndarray:
            samples = round(self.rate * seconds_a_word * len(text.split()))
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
            return (np.random.default_rng(seed).standard_normal(samples) * 0.05).astype(np.float32)

    return Speaker()


def test_passages_come_again_with_the_same_samples_where_the_manifest_says(tmp_path):
    size = book.BookSize(120, 25, (10, 20), 2)
    repeats = book.write_book(tmp_path, 1, spoken_as_noise(0.1), size, seed=0)
    assert len(repeats) >= 3
    assert len({repeat["passage"] for repeat in repeats}) == len(repeats)
    folder = tmp_path / repeats[0]["book"]
    chapters = sorted(folder.glob("*.flac"))
    ends = itertools.accumulate(inspect_audio(chapter).seconds for chapter in chapters)
    starts = dict(zip([chapter.stem for chapter in chapters], [0, *ends][:-1], strict=True))
    for repeat, gap in zip(repeats, itertools.cycle(size.gaps_sec), strict=False):
        first, second = (_span(folder, repeat[which]) for which in ("first", "second"))
        np.testing.assert_array_equal(first, second)
        between = starts[repeat["second"]["chapter"]] + repeat["second"]["start"]
        between -= starts[repeat["first"]["chapter"]] + repeat["first"]["end"]
        assert repeat["gap_sec"] == pytest.approx(between, abs=0.3)
        assert gap <= repeat["gap_sec"] < gap + 5
        for which in ("first", "second"):  # so that codecs of 12.5 frames a second give the same codes
            assert (repeat[which]["start"] / book.FRAME_SEC) % 1 == pytest.approx(0, abs=1e-6)


def _span(folder: Path, place: dict[str, float | str]) -> np.ndarray:
    file = folder / f"{place['chapter']}.flac"
    info = inspect_audio(file)
    begin, end = (round(float(place[key]) * info.sample_rate) for key in ("start", "end"))
    return read_audio(file, info, begin, end)[0].numpy()


@pytest.mark.parametrize("rates", [(22050, 16000), (22050, 8000), (8000, 16000)])
def test_resampling_keeps_a_tone_and_its_time(rates):
    """A faded tone at both rates is the same function of time."""

    def tone(rate: int) -> np.ndarray:
        at = np.arange(round(0.3 * rate)) / rate
        return np.sin(2 * np.pi * 900 * at) * np.sin(np.pi * at / 0.3) ** 2

    source, target = rates
    found = speaking.resampled(tone(source), source, target)
    assert len(found) == len(tone(target))
    np.testing.assert_allclose(found, tone(target), atol=1e-4)


def test_resampling_lets_nothing_through_from_above_the_new_band():
    above = np.sin(2 * np.pi * 7000 * np.arange(22050) / 22050) * np.hanning(22050)
    assert gates.rms(speaking.resampled(above, 22050, 8000)) < 1e-3 * gates.rms(above)


def test_speech_is_trimmed_and_equally_loud():
    sound = np.zeros(4000, np.float32)
    sound[1000:3000] = 0.3 * np.sin(np.arange(2000)).astype(np.float32)
    cut = speaking.equally_loud(speaking.trimmed(sound, 8000))
    assert 2000 <= len(cut) <= 2000 + 2 * 0.02 * 8000
    assert 20 * math.log10(gates.rms(cut)) == pytest.approx(speaking.LOUDNESS_DB, abs=1e-3)


def test_without_espeak_the_script_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"^espeak-ng is not installed.*`apt-get install espeak-ng`"):
        make_speech_benchmark.main([str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a folder to write, or --gates FOLDER"),
        (["{full}"], "is not empty; give a new folder"),
        (["{new}", "--books", "0"], "--books is 1 or more"),
        (["{new}", "--hours", "-1"], "--hours is above 0"),
        (["{new}", "--hours", "nan"], "--hours is above 0"),
        (["--gates", "{new}"], "holds none of"),
    ],
)
def test_wrong_arguments_are_told(tmp_path, capsys, arguments, said):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    filled = [a.format(full=tmp_path / "full", new=tmp_path / "new") for a in arguments]
    with pytest.raises(SystemExit) as ended:
        make_speech_benchmark.main(filled)
    assert said in f"{ended.value} {capsys.readouterr().err}"


# --- the subset that ships ---


def test_the_subset_is_small_whole_and_says_what_it_is():
    files = {f.relative_to(SUBSET).as_posix(): f for f in SUBSET.rglob("*") if f.is_file()}
    assert sum(f.stat().st_size for f in files.values()) <= 2_000_000
    assert {
        name: hashlib.sha256(f.read_bytes()).hexdigest() for name, f in files.items() if name != "manifest.json"
    } == (MANIFEST["sha256"])
    assert MANIFEST["synthetic"] is True
    assert re.fullmatch(r"\d+\.\d+.*", MANIFEST["espeak_ng"])
    assert "synthetic" in (SUBSET / "NOTICE.md").read_text(encoding="utf-8").lower()
    assert {path.name for path in SUBSET.iterdir() if path.is_dir()} == set(making.TASKS)


def test_the_subset_is_what_the_script_would_take():
    """Pairs come from the candidates of today's texts, and sizes are today's."""
    assert MANIFEST["size"] == json.loads(json.dumps(dataclasses.asdict(making.SUBSET)))
    seed, count = MANIFEST["seed"], making.SUBSET.candidates
    rows = [row for split in layouts.SPLITS for row in gold("swuggy", split)]
    word_of = {row["id"]: row["word"] for row in rows if row["correct"] == "1"}
    for row in rows:
        if row["correct"] == "0" and row["voice"] == speaking.VOICES[0]:
            made = words.choose_swaps(word_of[row["id"]], LEXICON, BIGRAMS, count=count, seed=seed)
            assert row["phones"] in {" ".join(non.phones) for non in made}
    candidates = {
        p for hand in making.sentence_hands(making.SUBSET, MANIFEST["seed"]) for p in (x.incorrect for x in hand)
    }
    rows = [row for split in layouts.SPLITS for row in gold("sblimp", split)]
    assert {row["transcription"] for row in rows if row["correct"] == "0"} <= candidates


@pytest.mark.parametrize(("task", "split"), SPLITS)
def test_gold_names_every_file_and_each_voice_says_both_members(task, split):
    folder, rows = layouts.zerospeech_folder(SUBSET, task, split), gold(task, split)
    assert tuple(rows[0]) == layouts.ZEROSPEECH[task][1]
    assert sorted(row["filename"] for row in rows) == sorted(file.stem for file in folder.glob("*.wav"))
    members = Counter((row["id"], row["voice"], row["correct"]) for row in rows)
    ids = {row["id"] for row in rows}
    assert members == Counter(itertools.product(ids, speaking.VOICES[:2], ("0", "1")))
    wanted = making.SUBSET.words if task == "swuggy" else making.SUBSET.sentences
    assert len(ids) == wanted[split]
    order = [(row["id"], row["voice"]) for row in rows]
    assert order != sorted(order)  # pairing by the order of rows is wrong here


@pytest.mark.parametrize("split", layouts.SPLITS)
def test_words_of_the_subset(split):
    known = {words.plain(phones) for phones in LEXICON.values()}
    counts = making.frequencies(MANIFEST["seed"])
    for row in gold("swuggy", split):
        phones = tuple(row["phones"].split())
        assert int(row["length"]) == len(phones)
        assert (words.plain(phones) in known) == (row["correct"] == "1")
        if row["correct"] == "1":
            assert LEXICON[row["word"]] == phones
            assert int(row["frequency"]) == counts[row["word"]]
        else:
            assert BIGRAMS.attested(phones)
    assert {row["frequency"] == "0" for row in gold("swuggy", split)} == {True, False}


@pytest.mark.parametrize("task", layouts.STORIES)
def test_stories_of_the_subset(task):
    told, names = MANIFEST[task]["stories"], {file.name for file in (SUBSET / task).iterdir()}
    assert names == {f"{name}_{ending}.wav" for name in told for ending in ("correct", "incorrect")}
    assert len(told) == making.SUBSET.stories
    assert [int(name.split("_")[0]) for name in told] == list(range(len(told)))
    assert all(re.fullmatch(r"\d+_[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", name) for name in told)
    assert all((s["topic"] == s["wrong_topic"]) == (task == "sstory") for s in told.values())


def test_books_of_the_subset():
    root = SUBSET / "librilight"
    flacs = sorted(root.glob("*/*/*.flac"))
    assert {f.with_suffix(".json") for f in flacs} == set(root.glob("*/*/*.json"))
    assert len({f.parts[-3] for f in flacs}) == making.SUBSET.books
    assert len({f.name for f in flacs}) < len(flacs)  # names repeat between folders
    for file in flacs:
        about = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        assert set(about) == {"speaker", "book_meta", "snr", "voice_activity"}
        assert about["speaker"] == file.parts[-3]
        ends = list(itertools.chain.from_iterable(about["voice_activity"]))
        assert ends == sorted(ends)
        assert ends[-1] <= inspect_audio(file).seconds
    repeats = MANIFEST["librilight"]["repeats"]
    assert {repeat["book"] for repeat in repeats} == {f.parent.relative_to(root).as_posix() for f in flacs}
    for repeat in repeats:
        first, second = (_span(root / repeat["book"], repeat[which]) for which in ("first", "second"))
        np.testing.assert_array_equal(first, second)


def test_no_gate_tells_the_subsets_pairs_apart():
    """Live, by the demo's codec. What the manifest says is what is found."""
    found = gating.gate_folder(SUBSET)
    assert list(found) == [f"{task} {split}" for task, split in SPLITS] + list(layouts.STORIES)
    for name, by_gate in found.items():
        for gate, accuracy in by_gate.items():
            assert accuracy.mean == pytest.approx(0.5, abs=0.5 / accuracy.pairs), (name, gate)
            assert accuracy.honest, (name, gate)
            assert MANIFEST["gates"][name][gate]["mean"] == pytest.approx(0.5, abs=0.5 / accuracy.pairs)
    assert "swuggy dev, 10 pairs (chance is 50 %)" in gating.table(found)


def test_a_gate_tells_of_a_set_that_is_not_honest(tmp_path):
    """Right words with silence after them: length alone knows all."""
    folder = layouts.zerospeech_folder(tmp_path, "swuggy", "dev")
    rows = []
    for i, correct in itertools.product(range(8), (0, 1)):
        name, length = f"{i}_{correct}", 4000 + 800 * correct
        layouts.write_sound(folder / f"{name}.wav", np.full(length, 1000 + i, np.int16), 8000)
        rows.append(dict.fromkeys(layouts.LEXICAL, "x") | {"filename": name, "id": i, "voice": "a", "correct": correct})
    layouts.write_gold(folder, layouts.LEXICAL, rows)
    found = gating.gate_folder(tmp_path)["swuggy dev"]
    assert found["length"].mean == 1
    assert not found["length"].honest
    assert "length          100.0 % ± 0.0   more than two standard errors from 50 %" in gating.table({"": found})


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("a file is missing", r"/1\.wav: No such file"),
        ("a file is no sound", r"/1\.wav: "),
        ("a file is empty", r"/1\.wav: holds no sound"),
        ("a member is missing", r"gold\.csv: id 7 in voice a is no pair"),
        ("a column is missing", r"gold\.csv: has no column voice"),
    ],
)
def test_a_broken_set_is_told_with_its_place(tmp_path, broken, said):
    folder = layouts.zerospeech_folder(tmp_path, "swuggy", "test")
    rows = [dict.fromkeys(layouts.LEXICAL, "7") | {"filename": i, "voice": "a", "correct": i} for i in (0, 1)]
    for i in (0, 1):
        samples = np.ones(0 if i and broken == "a file is empty" else 4000, np.int16)
        layouts.write_sound(folder / f"{i}.wav", samples, 8000)
    layouts.write_gold(folder, layouts.LEXICAL, rows[: 1 if broken == "a member is missing" else 2])
    if broken == "a file is missing":
        (folder / "1.wav").unlink()
    elif broken == "a file is no sound":
        (folder / "1.wav").write_text("no sound")
    elif broken == "a column is missing":
        gold = (folder / "gold.csv").read_text()
        (folder / "gold.csv").write_text(gold.replace("voice", "speaker"))
    with pytest.raises(SystemExit, match=said):
        make_speech_benchmark.main(["--gates", str(tmp_path)])
