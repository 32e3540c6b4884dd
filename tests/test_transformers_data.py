"""Texts for causal language models: documents, tokens, windows, loss and scores; and what is said of broken ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_language_model import save_tiny_model
from torch import Tensor
from torch.nn import functional as F

from ttt import inject
from ttt.adapter import carried
from ttt.check import check_config
from ttt.config import RunConfig
from ttt.errors import EnvironmentProblem, TTTError, UsageError
from ttt.hf import TextData
from ttt.hf.clips import TextClips
from ttt.hf.documents import find_source, read_documents
from ttt.hf.rules import RULES
from ttt.hf.running import as_batch
from ttt.hf.scoring import score, score_stream
from ttt.hf.tokens import ByteTokenizer, DocumentTokens, load_tokenizer
from ttt.hf.windows import text_windows
from ttt.plugins import get_backbone, run_config_model
from ttt.train.setup import order

BACKBONE = get_backbone("transformers")
CONFIG = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


def _run(data: Mapping[str, Any], **backbone: Any) -> RunConfig[Any, Any]:
    options = {"name": "transformers", "config": CONFIG, **backbone}
    return run_config_model(BACKBONE).model_validate({"backbone": options, "data": dict(data)})


def _windows(source: Path | str, *, length: int = 8, **data: Any) -> Any:
    config = _run({"train_data": str(source), "window_tokens": length, **data})
    return text_windows(config, split="train", own=None)


def _lines(file: Path, *entries: Any) -> Path:
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return file


# --- windows ---


def _require_documents(windows: Any, documents: Sequence[str]) -> None:
    """Every token of every document is read once and predicted once, by windows of that document alone."""
    assert [len(file) for file in windows.files] == [-(-(len(text) - 1) // 8) for text in documents]
    for file, text in zip(windows.files, documents, strict=True):
        batch = windows.collate([windows[index] for index in file])
        there = batch["attention_mask"].bool()
        assert bytes(batch["input_ids"][there].tolist()).decode() == text[:-1]
        assert bytes(batch["shift_labels"][there].tolist()).decode() == text[1:]
        assert bool((batch["shift_labels"][~there] == -100).all())
        assert bool(there[:-1].all())


def test_windows_hold_each_document_whole_and_apart(tmp_path: Path) -> None:
    documents = ["a text of some length", "two", "exactly 17 letter", "exactly 9"]
    windows = _windows(_lines(tmp_path / "a.jsonl", *({"text": text} for text in documents)))
    _require_documents(windows, documents)
    assert len(windows) == 3 + 1 + 2 + 1
    assert windows.describe(1) == f"{tmp_path}/a.jsonl:1, tokens 8-16"
    assert windows.files[-1] == range(6, 7)
    assert windows.files[1:3] == [range(3, 4), range(4, 6)]
    with pytest.raises(IndexError):
        windows[len(windows)]
    # Saboteurs: documents run together, and a rest that is dropped.
    with pytest.raises(AssertionError):
        _require_documents(_windows(_lines(tmp_path / "b.jsonl", {"text": "".join(documents)})), documents)
    with pytest.raises(AssertionError):
        _require_documents(_windows(_lines(tmp_path / "c.jsonl", *({"text": t[:8]} for t in documents))), documents)


def test_several_sources_with_weights_are_read_by_their_shares(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    for name in "ab":
        (tmp_path / "books" / f"{name}.txt").write_text(f"a book named {name}")
    web = _lines(
        tmp_path / "web.jsonl", *({"text": f"page {number}, nothing more"} for number in range(5)), {"text": ""}
    )
    named = [{"path": str(web), "weight": 3}, {"path": str(tmp_path / "books")}]
    config = _run({"train_data": named, "window_tokens": 8})
    windows = text_windows(config, split="train", own=None)
    assert [(source.name, source.files, source.weight) for source in windows.sources] == [
        (str(web), range(5), 3.0),
        (str(tmp_path / "books"), range(5, 7), 1.0),
    ]
    alone = [_windows(source["path"]) for source in named]
    assert len(windows) == sum(map(len, alone))
    for number in range(len(alone[1])):
        found, expected = windows[len(alone[0]) + number], alone[1][number]
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert windows.describe(len(alone[0]) + number) == alone[1].describe(number)
    assert windows.notice == alone[0].notice
    reading = order(config, windows)
    read = [window for number in range(40) for window in reading.at(number).windows]
    assert sum(window < len(alone[0]) for window in read) == 30
    assert text_windows(config, split="eval", own=None).sources == windows.sources


@pytest.mark.parametrize(
    ("data", "key", "message"),
    [
        ("[{path: a.txt}, {path: nothing.txt}]", "data.train_data.1.path", "'nothing.txt' does not exist"),
        ("[{path: a.txt}, {path: b.txt, weight: 2}]", "data.train_data.1.path", "b.txt is empty"),
        ("[{path: a.txt}, {path: a.txt, weight: 2}]", "data.train_data", "names 'a.txt' twice"),
        ("null\n  eval_data: [{path: a.txt, weight: 2}]", "data.eval_data", "an evaluation reads each window once"),
        ("a.txt:2", "data.train_data", "write a list, [{path: a.txt, weight: 2}]"),
        ("'a.txt:2,b.txt'", "data.train_data", "write a list, [{path: a.txt, weight: 2}, {path: b.txt, weight: 1}]"),
    ],
)
def test_sources_that_cannot_be_read_are_found_at_their_place(
    data: str, key: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "b.txt").touch()
    text = f"backbone: {{name: transformers, config: {{model_type: llama}}}}\ndata:\n  train_data: {data}\n"
    findings = check_config("config.yaml", text=text).findings
    assert any(each.path == key and message in f"{each.message}; {each.fix}" for each in findings), findings


def test_documents_of_a_single_token_are_told_and_left_out(tmp_path: Path) -> None:
    windows = _windows(_lines(tmp_path / "a.jsonl", {"text": "x"}, {"text": "long enough"}, {"text": ""}))
    assert windows.notice == f"2 documents are empty or a single token, and not read: {tmp_path}/a.jsonl:1, " + (
        f"{tmp_path}/a.jsonl:3"
    )
    assert len(windows.files) == 1


def test_tokens_are_kept_in_four_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 1000, encoding="utf-8")
    windows = _windows(tmp_path / "a.txt")
    held = windows._corpus._tokens
    assert held.itemsize * len(held) == 4 * 5000


def test_folders_hold_texts_lines_and_rows_in_order_of_their_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.txt").write_bytes("\ufeffthe second, é".encode())
    _lines(folder / "deep" / "c.jsonl", {"body": "the third"}, {"body": "the fourth"})
    datasets.Dataset.from_dict({"body": ["the fifth", "the sixth"], "id": [1, 2]}).to_parquet(folder / "e.parquet")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "a.md").write_text("# the first", encoding="utf-8")
    source = find_source(folder, field="data.train_data")
    found = list(read_documents(source, text_key="body", field="data.train_data"))
    assert [document.text for document in found] == [
        *("# the first", "the second, é", "the third", "the fourth", "the fifth", "the sixth")
    ]
    assert [document.number for document in found] == [None, None, 1, 2, 1, 2]
    assert source.notice == "1 other files there are not read (.png)"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.txt", None, "none.txt does not exist; name a text file"),
        ("empty.txt", b"", "empty.txt is empty, or a single token, so that there is nothing to predict"),
        (
            "latin.txt",
            "é è".encode("latin-1"),
            "latin.txt: cannot be read: it is not text in UTF-8: byte 1, in line 1, is 0xe9; save it as UTF-8",
        ),
        ("a.jsonl", b"", "a.jsonl holds no document"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": fine}\n', "a.jsonl:2: no JSON ("),
        ("a.jsonl", b'{"text": "fine"}\n["fine"]\n', "a.jsonl:2: not an object; write lines such as {"),
        ("a.jsonl", b'{"body": "fine", "id": 1}\n', "a.jsonl:1: has no 'text' (it has body, id); write data.text_key"),
        ("a.jsonl", b'{"text": ["fine"]}\n', "a.jsonl:1: 'text' is ['fine'], not a text"),
        ("a.jsonl", b'\xff{"text": "fine"}\n', "a.jsonl:1: no JSON ("),
        ("a.jsonl", b'{"text": "x"}\n{"text": ""}\n', "none of the 2 documents has two tokens"),
        ("a.parquet", b"not Parquet", "a.parquet: cannot be read as Parquet: "),
        ("folder", "", "folder holds no .txt or .md or .jsonl or .parquet file; it is empty; name a file"),
    ],
)
def test_what_is_no_text_is_told_with_its_place(tmp_path: Path, name: str, content: Any, told: str) -> None:
    if content == "":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(EnvironmentProblem) as error:
        _windows(tmp_path / name)
    assert str(error.value).startswith("data.train_data: ")
    assert told in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_every_bad_line_is_told_before_a_token_is_made(tmp_path: Path) -> None:
    _lines(tmp_path / "a.jsonl", {"text": "fine"}, {"text": 3})
    _lines(tmp_path / "b.jsonl", {"txt": "not fine"})
    source = find_source(tmp_path, field="data.train_data")
    with pytest.raises(EnvironmentProblem, match=r"2 lines cannot be used:\n.*a\.jsonl:2: .*\n.*b\.jsonl:1: "):
        next(read_documents(source, text_key="text", field="data.train_data"))


def test_a_column_that_is_not_there_is_told(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"body": ["fine"], "id": [1]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(EnvironmentProblem, match=r"has no column 'text', but body, id; write data\.text_key: COLUMN"):
        _windows(tmp_path / "a.parquet")
    with pytest.raises(EnvironmentProblem, match="row 1: 'id' is 1, not a text"):
        _windows(tmp_path / "a.parquet", text_key="id")


# --- tokens ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_the_models_own_tokenizer_begins_a_document_as_it_is_used_to(folder: Path) -> None:
    options = _run({}, model=str(folder), config=None).backbone
    tokenizer = load_tokenizer(options)
    assert tokenizer.adds == (True, False)
    plain = tokenizer.encode("the boat")
    assert plain.dtype == np.uint32
    for data, begin, end in (
        (TextData(), [0], []),
        (TextData(add_bos=False), [], []),
        (TextData(add_eos=True), [0], [1]),
    ):
        assert DocumentTokens(tokenizer, data).encode("the boat").tolist() == [*begin, *plain.tolist(), *end]
    assert DocumentTokens(ByteTokenizer(), TextData()).encode("hi").tolist() == [104, 105]
    assert DocumentTokens(ByteTokenizer(), TextData(add_bos=True, add_eos=True)).encode("h").tolist() == [257, 104, 258]


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the harbour book of the spring", encoding="utf-8")
    config = _run({"train_data": str(tmp_path / "a.txt")}, config={**CONFIG, "vocab_size": 260}, tokenizer=str(folder))
    with pytest.raises(UsageError, match=r"backbone\.tokenizer: .* makes a token \d+, and the model has 260"):
        text_windows(config, split="train", own=None)


# --- loss and scores ---


def _adapted(**options: Any) -> Any:
    config = _run({}, **options)
    model = BACKBONE.build(config.backbone, device="cpu", dtype=torch.float32)
    settings = config.ttt.model_copy(update={"mini_batch_size": 4, "initial_gating_alpha": 0.5})
    return inject.apply(model, BACKBONE.sites(model), settings, causal=True, seed=1)


def _plain_nll(model: Any, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens[None, :-1], use_cache=False).logits[0]
    return F.cross_entropy(logits, tokens[1:], reduction="none")


def test_the_loss_is_that_of_the_real_tokens_alone(tmp_path: Path) -> None:
    documents = ["a text of some length, not a multiple of eight", "two"]
    source = _lines(tmp_path / "a.jsonl", *({"text": text} for text in documents))
    windows = _windows(source, length=64)
    model = _adapted().model
    batch = windows.collate([windows[0], windows[1]])
    counted = {**batch, "shift_labels": batch["shift_labels"].clamp_min(0)}  # a saboteur: padding counts
    with torch.no_grad():
        found, wrong = (float(BACKBONE.loss(model, each, _run({})).loss) for each in (batch, counted))
        parts = [_plain_nll(model, torch.tensor(list(text.encode()))) for text in documents]
    expected = float(torch.cat(parts).mean())
    assert abs(found - expected) < 1e-5
    assert abs(wrong - expected) > 1e-3


def test_a_padded_window_hands_on_the_state_of_its_real_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("eleven more", encoding="utf-8")
    windows = _windows(tmp_path / "a.txt", length=32)
    injection = _adapted()
    batch = windows.collate([windows[0]])
    alone = as_batch(batch["input_ids"][:, :10], batch["shift_labels"][:, :10])
    with torch.no_grad():
        with carried(injection) as padded:
            BACKBONE.loss(injection.model, batch, _run({}))
        with carried(injection) as bare:
            BACKBONE.loss(injection.model, alone, _run({}))
    unmasked = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}  # a saboteur: TTT reads padding
    with torch.no_grad(), carried(injection) as all_read:
        BACKBONE.loss(injection.model, unmasked, _run({}))
    for name, state in bare.states.items():
        other, wrong = (each.states[name].opened().tensors() for each in (padded, all_read))
        for key, value in state.opened().tensors().items():
            torch.testing.assert_close(other[key], value, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(wrong["W1"], state.opened().tensors()["W1"], rtol=1e-3)


def test_scores_are_the_cross_entropy_of_each_token_but_the_first() -> None:
    model = _adapted().model
    tokens = torch.randint(259, (2, 1, 20), generator=torch.Generator().manual_seed(0))
    tokens[1, 0, 12:] = -1
    found = score(model, tokens)
    assert found.mask[:, 0].sum(1).tolist() == [19, 11]
    for row, length in enumerate((20, 12)):
        with torch.no_grad():
            expected = _plain_nll(model, tokens[row, 0, :length])
        torch.testing.assert_close(found.nll[row, 0, 1:length], expected, rtol=1e-4, atol=1e-5)
    assert float(found.nll[1, 0, 12:].abs().sum()) == 0


def test_learning_anew_forgets_fast_weights_and_nothing_else() -> None:
    model = _adapted().model
    tokens = torch.randint(259, (1, 1, 24), generator=torch.Generator().manual_seed(0))
    rest: dict[str, Tensor] = {}
    for what in ("kept", "anew", "anew from nothing"):
        with score_stream(model, batch_size=1) as stream:
            if what == "anew from nothing":
                stream.learn_anew()
            stream.read(tokens[:, :, :16])
            if what == "anew":
                stream.learn_anew()
            rest[what] = stream.read(tokens[:, :, 16:]).nll
            assert stream.finish().nll.shape[2] == 0
            with pytest.raises(UsageError, match="the streams have ended"):
                stream.read(tokens)
    assert torch.equal(rest["kept"], rest["anew from nothing"])
    assert not torch.equal(rest["kept"], rest["anew"])
    # The first token's score comes from logits before the restart.
    assert torch.equal(rest["kept"][..., 0], rest["anew"][..., 0])


def test_what_is_no_stream_of_tokens_is_refused() -> None:
    gpt2 = _adapted(config={**CONFIG, "model_type": "gpt2", "max_position_embeddings": 16}).model
    zeros = torch.zeros(1, 1, 17, dtype=torch.int64)
    with pytest.raises(UsageError, match="the model has learned 16 positions, and the stream is longer"):
        score(gpt2, zeros)
    with pytest.raises(UsageError, match="a window of 17 tokens, and the model has learned 16 positions"):
        BACKBONE.loss(gpt2, as_batch(zeros[0], zeros[0]), _run({}))
    with pytest.raises(UsageError, match="tokens of this model are 0 to 258"):
        score(gpt2, zeros + 259)
    with pytest.raises(UsageError, match=r"1 streams of tokens are \[1, 1, T\] integers"):
        score(gpt2, zeros[0])


def test_clips_are_the_tokens_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("é" * 3000, encoding="utf-8")
    reader = TextClips.of(_run({}))
    assert reader.positions(tmp_path / "a.txt") == 6000
    pieces = list(reader.stream(tmp_path / "a.txt"))
    assert [piece.shape[1] for piece in pieces] == [4096, 1904]
    assert torch.equal(torch.cat(pieces, 1), reader.read(tmp_path / "a.txt"))
    assert reader.identity != TextClips.of(_run({"add_bos": True})).identity
    (tmp_path / "b.txt").write_text("", encoding="utf-8")
    for name, told in (("b.txt", "is empty"), ("c.txt", "cannot be read: No such file or directory")):
        with pytest.raises(EnvironmentProblem, match=told):
            reader.read(tmp_path / name)


# --- ttt check ---


def test_a_check_reads_lines_by_their_keys(tmp_path: Path) -> None:
    fine = _lines(tmp_path / "fine.jsonl", {"text": "a text"}, {"text": "x" * (2 << 20)})
    other = _lines(tmp_path / "other.jsonl", {"text": "another"})
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": 3}\nno JSON\n{"txt": "fine"}\n', encoding="utf-8")

    def found(source: Path, text_key: str = "text") -> list[tuple[str, str]]:
        text = json.dumps(
            {
                "backbone": {"name": "transformers", "config": CONFIG},
                "data": {"train_data": str(source), "eval_data": str(other), "text_key": text_key},
            }
        )
        return [(each.code, each.message) for each in check_config("a.yaml", text=text).findings]

    assert found(fine) == []
    stops = "; the run stops before its first step"
    assert found(bad) == [
        ("TTT504", f"1 of 4 lines is not a JSON object: bad.jsonl:3{stops}"),
        ("TTT505", f"2 of 4 lines are without a text `text`: bad.jsonl:2, bad.jsonl:4{stops}"),
    ]
    assert [code for code, _ in found(fine, "body")] == ["TTT505", "TTT505"]
    (tmp_path / "none.jsonl").write_text("\n", encoding="utf-8")
    assert [code for code, _ in found(tmp_path / "none.jsonl")] == ["TTT501"]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a text", encoding="utf-8")
    assert found(tmp_path / "texts") == []


@pytest.mark.parametrize(
    ("name", "content", "told", "fix"),
    [
        ("a.txt", b"", "a.txt is empty", "name a text file, a .jsonl, a .parquet, or a folder of them"),
        ("a.txt", b"\xff", "a.txt is not text in UTF-8 (byte 1)", "save it as text in UTF-8"),
        ("a.parquet", b"text", "a.parquet is no Parquet file", "write it anew, or give it the ending of what it is"),
        ("a.parquet", b"", "a.parquet is no Parquet file", "write it anew, or give it the ending of what it is"),
    ],
)
def test_a_check_looks_at_the_beginning_of_files(
    name: str, content: bytes, told: str, fix: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "fine.txt").write_text("fine", encoding="utf-8")
    data = {"train_data": str(tmp_path / name), "eval_data": str(tmp_path / "fine.txt")}
    text = json.dumps({"backbone": {"name": "transformers", "config": CONFIG}, "data": data})
    found = [each for each in check_config("a.yaml", text=text).findings if each.code == "HF502"]
    assert [(each.message, each.fix) for each in found] == [
        (f"{tmp_path}/{told}; the run stops before its first step", fix)
    ]


@pytest.mark.parametrize("code", sorted({code.number for rule in RULES for code in rule.codes} - {"HF601"}))
def test_each_rule_finds_its_bad_config_alone(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    entry = BACKBONE.explanations()[code]
    for name, text in entry.files.items():
        Path(name).write_text(text, encoding="utf-8")
    found = {kind: check_config("a.yaml", text=getattr(entry, kind)).findings for kind in ("bad", "good")}
    assert [(each.code, each.severity.value) for each in found["bad"]] == [(code, entry.severity)]
    assert found["good"] == ()


def test_packages_that_are_missing_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    text = json.dumps(
        {
            "backbone": {"name": "transformers", "model": "a/b", "gguf_file": "c.gguf", "config": CONFIG},
            "data": {"train_data": str(tmp_path / "a.parquet")},
        }
    )
    monkeypatch.setattr("ttt.hf.rules.find_spec", lambda name: None)
    told = [each.message for each in check_config("a.yaml", text=text).findings if each.code == "HF601"]
    assert told == [
        "reading the model needs the package transformers, which is not installed",
        "reading a GGUF file needs the package gguf and accelerate, which is not installed",
        "reading Parquet needs the package datasets, which is not installed",
    ]
    monkeypatch.setattr("ttt.hf.documents.find_spec", lambda name: None)
    with pytest.raises(TTTError, match="reading Parquet needs the package datasets; pip install datasets"):
        _windows(tmp_path / "a.parquet")
