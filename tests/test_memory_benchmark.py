"""The experiment of memory beyond attention: its parts do what the table says they do."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import memory_backbone as backbone
import memory_beyond_attention as experiment
import memory_texts as texts
import memory_training
import pytest
import torch
from memory_results import buckets, compare, report, table
from memory_start import find_start, sharpened
from memory_training import NO_MEMORY, Prediction, Texts, Upper, losses_by_bin, reset_every

from ttt.adapter import TTTAdapter
from ttt.config import TTTConfig

QUICK = experiment.QUICK


@pytest.fixture(scope="module")
def model() -> Any:
    return backbone.tiny()[0]


def _tokens(rows: int = 2, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (rows, QUICK.length), generator=torch.Generator().manual_seed(seed))


# --- the backbone in two parts ---


def test_the_parts_are_the_whole(model: Any, tmp_path: Path) -> None:
    tokens = _tokens()
    with QUICK.limited(model):
        whole = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        states = backbone.hidden_states(model, [1, 3], tokens.tolist(), batch=1, kept=tmp_path / "states.pt")
    for begin, state in states.items():
        upper = Upper(model, experiment.dataclasses.replace(QUICK, sites=(begin,)), {})
        torch.testing.assert_close(upper.hidden(state.float()), whole, rtol=2e-3, atol=2e-3)  # states are float16
    full = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    assert (full - whole).abs().max() > 0.01, "the window hides nothing"


def test_what_is_put_into_a_part_leaves_the_whole_as_it_was(model: Any) -> None:
    names, tokens = [name for name, _ in model.named_modules()], _tokens()
    before = model(input_ids=tokens).logits
    upper = Upper(model, QUICK, {})
    upper.inject(0, drawn=True)
    size = sum(p.numel() for p in upper.learning.values())
    upper.clear()
    rank = upper.add_lora(0, size)
    assert rank >= 1
    assert sum(p.numel() for p in upper.learning.values()) == pytest.approx(size, rel=0.2)
    assert all("lora" in name for name in upper.learning)
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(model(input_ids=tokens).logits, before)


# --- a start as a memory ---

WIDTH, VOCABULARY = 64, 24


def _stream(length: int) -> torch.Tensor:
    """A random passage of tokens that all differ, twice."""
    order = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(1))[: length // 2]
    return torch.cat([order, order])[None]


def _hidden(tokens: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """Hidden states as previous-token heads leave them: this token in one place, the one before in another."""
    before = torch.roll(torch.eye(WIDTH), WIDTH // 2, 0)
    x = embedding[tokens]
    x[:, 1:] += embedding[tokens[:, :-1]] @ before
    return x


@pytest.fixture(scope="module")
def memory() -> tuple[TTTAdapter, torch.Tensor]:
    """An adapter that starts as a memory, and embeddings."""
    draw = torch.Generator().manual_seed(0)
    embedding = torch.zeros(VOCABULARY, WIDTH)
    embedding[:, : WIDTH // 2] = torch.randn(VOCABULARY, WIDTH // 2, generator=draw)
    read = torch.randint(0, VOCABULARY, (8, 400), generator=draw)
    start = find_start(_hidden(read, embedding), read, embedding, None, eps=1e-6)
    config = TTTConfig(**{**experiment.MEMORY, "mini_batch_size": 1, "base_lr": 8.0, "initial_gating_alpha": 1.0})
    adapter = TTTAdapter(WIDTH, 1, config)
    torch.manual_seed(0)
    start(adapter, gain=1.0)
    return adapter, embedding


def _recalled(adapter: Any, embedding: torch.Tensor, tokens: torch.Tensor, begin: int) -> float:
    """How often the answer is nearest to the embedding of the token that comes next."""
    with torch.no_grad():
        x = _hidden(tokens, embedding)
        answer = adapter(x) - x
    centred = embedding - embedding.mean(0)
    found = (answer[0, begin:-1] @ centred.T).argmax(-1)
    return (found == tokens[0, begin + 1 :]).float().mean().item()


def test_an_adapter_starts_as_a_memory_of_what_followed_what(memory: tuple[TTTAdapter, torch.Tensor]) -> None:
    adapter, embedding = memory
    tokens = _stream(40)
    assert _recalled(adapter, embedding, tokens, 20) >= 0.8
    assert _recalled(adapter, embedding, tokens[:, :20], 0) <= 0.2, "it cannot know a passage that it reads first"


def test_without_inner_learning_it_recalls_nothing(memory: tuple[TTTAdapter, torch.Tensor]) -> None:
    adapter, embedding = memory
    still = TTTAdapter(WIDTH, 1, TTTConfig(**{**dict(adapter.layer.config), "base_lr": NO_MEMORY}))
    still.load_state_dict(adapter.state_dict())
    assert _recalled(still, embedding, _stream(40), 20) <= 0.2
    _, state = still.layer(torch.randn(1, 64, WIDTH))
    for name, after in zip(still.layer.weight_names, state.weights, strict=True):
        torch.testing.assert_close(after[0], getattr(still.layer, name), rtol=0, atol=1e-5)


def test_queries_and_keys_learn_to_meet_where_they_should() -> None:
    draw = torch.Generator().manual_seed(0)
    embedding = torch.randn(VOCABULARY, WIDTH, generator=draw)
    cycle = torch.randperm(VOCABULARY, generator=draw)  # each token is followed by one other, most of the time
    rows = [[0] for _ in range(6)]
    for row in rows:
        while len(row) < 48:
            row.append(
                int(cycle[row[-1]])
                if torch.rand(1, generator=draw) < 0.8
                else int(torch.randint(24, (1,), generator=draw))
            )
    tokens = torch.tensor(rows)
    hidden = _hidden(tokens, embedding)
    start = find_start(hidden, tokens, embedding, None, eps=1e-6)
    start.key = start.key + torch.randn(start.key.shape, generator=draw)  # else there is nothing to learn here
    found = sharpened(start, hidden, tokens, window=4, steps=60, eps=1e-6)
    assert found.value is start.value

    def contrast(one: Any) -> float:
        wide = torch.cat([torch.nn.functional.rms_norm(hidden, (WIDTH,)), torch.ones(*hidden.shape[:2], 1)], -1)
        scores = (
            torch.nn.functional.normalize(wide @ one.query, dim=-1)
            @ torch.nn.functional.normalize(wide @ one.key, dim=-1).mT
        )
        right = torch.zeros_like(scores, dtype=torch.bool)
        right[:, :-1] = tokens[:, None] == tokens[:, 1:, None]
        return ((scores[right].mean() - scores[~right].mean()) / scores[~right].std()).item()

    assert contrast(found) > 1.1 * contrast(start) > 0


# --- arms ---


def test_what_has_no_rate_does_not_learn(model: Any) -> None:
    upper = Upper(model, QUICK, {})
    upper.inject(0, drawn=True, matrix_lr=0.0)
    (adapter,) = upper.adapters.values()
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    tokens = _tokens()
    some = Texts(tokens, torch.randn(2, QUICK.length, 32), torch.ones_like(tokens, dtype=torch.bool))
    Prediction(upper, some, some).train(0, 2)
    moved = {name for name, p in adapter.named_parameters() if not torch.equal(p, before[name])}
    assert "gate.gating_alpha" in moved
    assert "layer.learnable_ttt_lr_bias" in moved
    assert not moved & {"layer.q_proj.weight", "layer.o_proj.weight", "layer.W1"}
    assert all(p.grad is None for p in model.parameters())


def test_training_minds_the_whole_vocabulary(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    upper = Upper(model, QUICK, {})
    tokens = _tokens() % 100  # so that 156 tokens and more do not occur
    states = torch.randn(2, QUICK.length, 32, generator=torch.Generator().manual_seed(4))
    some = Texts(tokens[:1], states[:1].half(), torch.ones(1, QUICK.length, dtype=torch.bool))
    made = Prediction(upper, some, some)
    with torch.no_grad():
        logits = upper.hidden(some.states.float())[:, :-1] @ model.lm_head.weight.T
        whole = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:])
        torch.testing.assert_close(made._loss(0, 0), whole)
        monkeypatch.setattr(memory_training, "OTHERS", 40)
        sampled = torch.stack([made._loss(0, step) for step in range(30)])
    assert len(sampled.unique()) > 1
    assert sampled.mean().item() == pytest.approx(whole.item(), abs=0.02)


def test_the_reset_arm_forgets_at_every_window(model: Any) -> None:
    upper = Upper(model, QUICK, {})
    upper.inject(0, drawn=True, base_lr=64.0, initial_gating_alpha=1.0)
    states = torch.randn(1, QUICK.length, 32, generator=torch.Generator().manual_seed(1))
    other = states.clone()
    other[:, : QUICK.window] = 0
    (adapter,) = upper.adapters.values()
    with torch.no_grad(), reset_every(upper, QUICK.window):
        reset = adapter(states)
        assert torch.equal(adapter(other)[:, QUICK.window :], reset[:, QUICK.window :])
    with torch.no_grad():
        assert torch.equal(adapter(states)[:, : QUICK.window], reset[:, : QUICK.window])
        assert not torch.equal(adapter(states)[:, QUICK.window :], reset[:, QUICK.window :])
        assert not torch.equal(adapter(other)[:, QUICK.window :], adapter(states)[:, QUICK.window :])


def test_losses_are_those_of_the_tokens_in_each_bin() -> None:
    head, tokens = torch.eye(4), torch.tensor([[0, 1, 2, 3, 1, 1]])
    scored = torch.tensor([[True, True, False, False, True, False]])
    some = Texts(tokens, torch.zeros(1, 6, 4), scored)
    hidden = torch.zeros(1, 6, 4)
    hidden[0, 3, 1] = 10.0  # the fifth token is foreseen; the first has nothing before it
    (found,) = losses_by_bin(lambda _: hidden, head, some, 2)
    assert found == [pytest.approx(1.38629, abs=1e-4), None, pytest.approx(0.00014, abs=1e-4)]


def test_differences_are_of_pairs_with_errors_by_work() -> None:
    losses = {
        "closed": {"0": [[1.0, 3.0], [2.0, 4.0]]},
        "ttt": {"0": [[1.0, 2.0], [2.0, 2.0]], "1": [[1.0, 2.5], [2.0, 3.5]]},
    }
    found = compare(losses, ["a", "b"], range(1, 2))
    difference = found["closed − ttt"]
    assert difference["mean"] == pytest.approx((0.75 + 1.25) / 2)
    assert difference["stderr"] == pytest.approx(0.25)
    assert difference["by_seed"] == pytest.approx([1.5, 0.5])
    assert "+1.0000 ± 0.2500" in table({"beyond": found})
    assert buckets(64, 512)["beyond 2 windows"] == (128, 512)
    assert list(buckets(64, 512).values())[:-1] == [(0, 64), (64, 128), (128, 256), (256, 512)]


# --- documents ---


def _wheel(folder: Path) -> None:
    with zipfile.ZipFile(folder / "some_work-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_work-1.0.dist-info/METADATA", "Metadata-Version: 2.4\nLicense-Expression: MIT\n")
        wheel.writestr("some_work/long.py", "abcdefgh" * 40)
        wheel.writestr("some_work/short.py", "abc")
        wheel.writestr("some_work/data.txt", "x" * 999)


def test_documents_are_long_source_files_with_their_licence(tmp_path: Path) -> None:
    _wheel(tmp_path)
    found = list(texts.documents("some-work==1.0", tmp_path, lambda text: list(text.encode()), length=100, at_most=5))
    assert [(one.file, one.licence, len(one.tokens)) for one in found] == [("some_work/long.py", "MIT", 100)]


def test_works_of_training_choosing_and_measuring_differ() -> None:
    names = [one.partition("==")[0] for one in (*texts.TRAIN, *texts.DEV, *texts.HELD_OUT)]
    assert len(set(names)) == len(names)


def test_a_repeated_passage_is_one_and_lies_beyond_the_window() -> None:
    some = [texts.Document(f"w{n}", "f", "MIT", tuple(range(1000 * n, 1000 * n + 128))) for n in range(4)]
    for one in texts.recalls(some, 20, window=16, length=128, seed=1):
        assert len(one.tokens) == 128
        assert one.spans
        for begin, end in one.spans:
            first = one.tokens.index(one.tokens[begin])
            assert one.tokens[first : first + end - begin] == one.tokens[begin:end]
            earlier = max(place for place in range(begin) if one.tokens[place] == one.tokens[begin])
            assert begin - (earlier + end - begin) >= 16


# --- a run ---


def test_a_quick_run_measures_all_arms_and_goes_on_from_what_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--quick", "--no-ablations", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "found.json")]
    experiment.main(arguments)
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert "| beyond 2 windows |" in capsys.readouterr().out
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    assert set(found["by_position"]) == {"closed", "full", "ttt", "reset", "no memory", "lora"}
    assert found["held_out"]["within the window"]["reset − ttt"]["mean"] == 0
    assert found["held_out"]["beyond 2 windows"]["reset − ttt"]["mean"] != 0
    assert str(tmp_path) not in json.dumps(found)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("it was measured before")

    monkeypatch.setattr(experiment.Experiment, "trained", never)
    experiment.main(arguments)
    again = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert again == found


def test_the_results_that_are_kept_can_be_read() -> None:
    folder = Path(experiment.__file__).parent / "results"
    for path in folder.glob("memory_beyond_attention_*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        assert not found["quick"]
        assert "| beyond 2 windows |" in report(found)
        assert path.with_suffix(".png").exists()


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        experiment.main(["--device", "cuda"])
