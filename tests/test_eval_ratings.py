"""Pairwise ratings by people: sheets that hide the arms, what they say, and strengths with their errors."""

from __future__ import annotations

import csv
import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ttt.errors import EnvironmentProblem, TTTError, UsageError
from ttt.eval.ratings import Comparison, Rating, read_ratings, write_sheet
from ttt.eval.statistics import estimate
from ttt.eval.strengths import ELO_SCALE, bradley_terry, win_shares

ARMS = ("closed", "ttt")


def comparisons(folder: Path, prompts: int = 12) -> list[Comparison]:
    found = []
    for number in range(prompts):
        files = {arm: folder / arm / f"{number:03d}.mp4" for arm in ARMS}
        for arm, file in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{arm} {number}")
        found.append(Comparison(f'a "cat", number {number}\nand a dog', files))
    return found


def written(folder: Path, *, seed: int = 0, name: str = "raters") -> tuple[Path, Path]:
    sheet, key = folder / name / "ratings.csv", folder / f"{name}-key.csv"
    write_sheet(sheet.parent, key, comparisons(folder), seed=seed)
    return sheet, key


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as text:
        return list(csv.DictReader(text))


def fill(sheet: Path, winner: Callable[[dict[str, str]], str], *, to: Path | None = None) -> Path:
    """What a rater does: write a winner in each row, here by what the clips hold."""
    rows = rows_of(sheet)
    for row in rows:
        row["winner"] = winner({side: (sheet.parent / row[side]).read_text() for side in ("left", "right")})
    target = to or sheet
    with target.open("w", encoding="utf-8", newline="") as text:
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return target


def likes(arm: str) -> Callable[[dict[str, str]], str]:
    return lambda clips: next(side for side, clip in clips.items() if clip.startswith(arm))


# --- sheets ---


def test_a_rater_sees_no_arm(tmp_path: Path) -> None:
    sheet, _ = written(tmp_path)
    assert not any(arm in sheet.read_text() for arm in ARMS)
    names = [str(path.relative_to(sheet.parent)) for path in sheet.parent.rglob("*")]
    assert not any(arm in name for name in names for arm in ARMS)
    assert len([name for name in names if name.endswith(".mp4")]) == 24
    assert [row["winner"] for row in rows_of(sheet)] == [""] * 12


def test_sides_and_order_are_drawn_by_the_seed(tmp_path: Path) -> None:
    keys = {}
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        keys[name] = rows_of(written(tmp_path, seed=seed, name=name)[1])
    assert keys["one"] == keys["two"] != keys["three"]
    assert {row["left_arm"] for row in keys["one"]} == set(ARMS)
    assert [row["prompt"] for row in keys["one"]] != [one.prompt for one in comparisons(tmp_path)]


def test_who_wins_is_the_arm_that_the_rater_liked(tmp_path: Path) -> None:
    sheet, key = written(tmp_path)
    for arm, share in (("ttt", 0.0), ("closed", 1.0)):
        found = read_ratings(key, [fill(sheet, likes(arm), to=tmp_path / f"{arm}.csv")], arms=ARMS)
        assert len(found) == 12
        assert {one.left for one in found} == set(ARMS)
        assert win_shares(found)["closed", "ttt"].mean == share
    ties = read_ratings(key, [fill(sheet, lambda _: " Tie ", to=tmp_path / "ties.csv")])
    assert win_shares(ties)["closed", "ttt"].mean == 0.5
    two = read_ratings(key, [tmp_path / "ttt.csv", tmp_path / "closed.csv"])
    shares = win_shares(two)["closed", "ttt"]
    assert (shares.mean, shares.items, shares.units, shares.stderr) == (0.5, 24, 12, 0.0)
    alone = read_ratings(key, [fill(sheet, lambda _: "left", to=tmp_path / "side.csv")])
    assert 0 < win_shares(alone)["closed", "ttt"].mean < 1  # who likes a side likes no arm


def test_what_a_spreadsheet_saves_is_read(tmp_path: Path) -> None:
    sheet, key = written(tmp_path)
    fill(sheet, likes("ttt"))
    expected = read_ratings(key, [sheet])
    rows = rows_of(sheet)
    random.Random(0).shuffle(rows)  # sorted by another column, whole rows
    for delimiter, encoding in ((";", "utf-8-sig"), ("\t", "utf-8"), (",", "utf-8")):
        with sheet.open("w", encoding=encoding, newline="") as text:
            writer = csv.writer(text, delimiter=delimiter, lineterminator="\r\n")
            writer.writerow(["Comparison", "Prompt", "Left", "Right", "Winner", "Remarks"])
            writer.writerows([*row.values(), "nice"] for row in rows)
            writer.writerow([""] * 6)
        assert sorted(read_ratings(key, [sheet]), key=str) == sorted(expected, key=str)


def test_a_blank_winner_is_no_rating(tmp_path: Path) -> None:
    sheet, key = written(tmp_path)
    fill(sheet, lambda clips: "left" if clips["left"].endswith("3") else "")
    assert len(read_ratings(key, [sheet])) == 1
    fill(sheet, lambda _: "")
    with pytest.raises(UsageError, match="nothing is rated; write left, right or tie under `winner`"):
        read_ratings(key, [sheet])


def edit(file: Path, line: int, old: str, new: str) -> None:
    """Replace text on a line of the file, counted from 1."""
    lines = file.read_text(encoding="utf-8").split("\n")
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new)
    file.write_text("\n".join(lines), encoding="utf-8")


def drop(file: Path, *lines: int) -> None:
    kept = [line for number, line in enumerate(file.read_text().split("\n"), 1) if number not in lines]
    file.write_text("\n".join(kept))


BROKEN: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    # prompts have two lines, so that the third comparison is on lines 6 and 7
    "a winner": (
        lambda sheet, _: edit(sheet, 7, ",left", ",ttt"),
        "SHEET:6: the winner is 'ttt'; write left, right or",
    ),
    "no winner column": (lambda sheet, _: edit(sheet, 1, "winner", "best"), "SHEET:1: there is no column 'winner'"),
    "two of a column": (lambda sheet, _: edit(sheet, 1, "winner", "winner,winner"), "SHEET:1: the column 'winner' st"),
    "an arm": (lambda _, key: edit(key, 7, "ttt", "reset"), "KEY:6: there is no arm 'reset'; the arms are closed, ttt"),
    "no arm": (lambda _, key: edit(key, 7, "ttt", ""), "KEY:6: there is no arm ''; the arms are closed, ttt"),
    "one arm": (lambda _, key: edit(key, 7, "ttt", "closed"), "KEY:6: both sides are of arm 'closed'"),
    "no row in the key": (lambda _, key: drop(key, 6, 7), "SHEET:6: comparison '3' is not in KEY; read the sheet with"),
    "no row in the sheet": (
        lambda sheet, _: drop(sheet, 6, 7),
        "SHEET: has no row for comparison '3' (KEY:6); put the",
    ),
    "twice": (lambda sheet, _: edit(sheet, 6, "3,", "2,"), "SHEET:6: comparison '2' stands in SHEET:4 too; leave one"),
    "twice in the key": (lambda _, key: edit(key, 6, "3,", "2,"), "KEY:6: comparison '2' stands in KEY:4 too; leave"),
    "sorted apart": (lambda sheet, _: edit(sheet, 7, "0003-left", "0004-left"), "SHEET:6: `left` is 'clips/0004-left"),
    "a short row": (lambda sheet, _: edit(sheet, 7, ",left", ""), "SHEET:6: has 4 cells, the first line 5; mend the"),
    "a quote": (lambda sheet, _: edit(sheet, 7, '",', '"x,'), "SHEET:7: is not CSV: "),
    "no text": (
        lambda sheet, _: sheet.write_bytes(b"\xff\xfe\x00"),
        "SHEET: it is text in UTF-16; save it as UTF-8: iconv",
    ),
    "nothing": (lambda sheet, _: sheet.write_text(""), "SHEET: is empty; its first line names the columns comparison"),
    "no key": (lambda _, key: key.unlink(), "KEY: no such file"),
    "a folder": (lambda sheet, _: (sheet.unlink(), sheet.mkdir()), "SHEET: cannot be read: a folder, not a file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, name: str) -> None:
    sheet, key = written(tmp_path)
    fill(sheet, lambda _: "left")
    sheet.write_text(sheet.read_text())  # lines end as Python writes them
    assert len(read_ratings(key, [sheet], arms=ARMS)) == 12
    broken, told = BROKEN[name]
    broken(sheet, key)
    with pytest.raises(TTTError) as caught:
        read_ratings(key, [sheet], arms=ARMS)
    message = str(caught.value).replace(str(key), "KEY").replace(str(sheet), "SHEET")
    assert message.startswith(told)
    assert "\n" not in message


def test_a_sheet_is_not_written_over_another_or_beside_its_key(tmp_path: Path) -> None:
    sheet, key = written(tmp_path)
    some = comparisons(tmp_path)
    with pytest.raises(UsageError, match="holds files already; name a new folder"):
        write_sheet(sheet.parent, key, some, seed=0)
    with pytest.raises(UsageError, match="raters would see the key; write it outside"):
        write_sheet(tmp_path / "new", tmp_path / "new" / "x" / "key.csv", some, seed=0)
    with pytest.raises(UsageError, match="there is nothing to compare"):
        write_sheet(tmp_path / "new", tmp_path / "key.csv", [], seed=0)
    three = Comparison("a cat", {**some[0].files, "reset": tmp_path / "x.mp4"})
    with pytest.raises(UsageError, match="'a cat' has clips of closed, reset, ttt; a comparison is of two arms"):
        write_sheet(tmp_path / "new", tmp_path / "key.csv", [three], seed=0)
    some[3].files["ttt"].unlink()
    with pytest.raises(EnvironmentProblem, match=r"ttt/003\.mp4: no such file; make the clips of both arms first"):
        write_sheet(tmp_path / "new", tmp_path / "key.csv", some, seed=0)
    assert not (tmp_path / "new").exists()


# --- strengths ---


def rated(strengths: dict[str, float], *, prompts: int, raters: int, seed: int) -> list[Rating]:
    """Ratings as the model has them, with a taste for each prompt that raters share; every tenth or so is a tie."""
    generator, arms = np.random.default_rng(seed), sorted(strengths)
    ratings = []
    for prompt in range(prompts):
        taste = {arm: generator.normal(0, 1.5) for arm in arms}
        left, right = (arms[n] for n in generator.permutation(len(arms))[:2])
        ahead = strengths[left] + taste[left] - strengths[right] - taste[right]
        for _ in range(raters):
            won = float(generator.random() < 1 / (1 + math.exp(-ahead)))
            score = 0.5 if generator.random() < 0.1 else won
            ratings.append(Rating(str(prompt), f"prompt {prompt}", left, right, score))
    return ratings


def test_two_arms_have_the_closed_form() -> None:
    ratings = rated({"ttt": 0.6, "closed": 0.0}, prompts=40, raters=3, seed=0)
    share = win_shares(ratings)["closed", "ttt"]
    found = bradley_terry(ratings)
    odds = math.log(share.mean / (1 - share.mean))
    assert found.strengths["closed"] - found.strengths["ttt"] == pytest.approx(odds, rel=1e-9)
    assert list(found.strengths) == ["ttt", "closed"]
    ahead, stderr = found.elo_difference("ttt", "closed")
    assert ahead == pytest.approx(-400 * math.log10(share.mean / (1 - share.mean)))
    assert share.stderr is not None
    assert stderr == pytest.approx(ELO_SCALE * share.stderr / (share.mean * (1 - share.mean)), rel=1e-9)
    assert found.elo("ttt") + found.elo("closed") == pytest.approx(2000)
    assert found.elo_stderr("ttt") == pytest.approx((stderr or 0) / 2)
    assert (found.ratings, found.prompts) == (120, 40)


def test_errors_of_strengths_are_those_of_a_bootstrap_over_prompts() -> None:
    true = {"a": 0.8, "b": 0.0, "c": -0.5}
    ratings = rated(true, prompts=100, raters=3, seed=1)
    found = bradley_terry(ratings)
    by_prompt: dict[str, list[Rating]] = {}
    for one in ratings:
        by_prompt.setdefault(one.prompt, []).append(one)
    prompts, generator = list(by_prompt.values()), random.Random(0)
    draws = []
    for _ in range(400):
        sample = [one for _ in prompts for one in generator.choice(prompts)]
        strengths = bradley_terry(sample).strengths
        draws.append([strengths[arm] for arm in sorted(true)])
    spread = ELO_SCALE * np.std(draws, axis=0)
    ours = [found.elo_stderr(arm) for arm in sorted(true)]
    assert ours == pytest.approx(spread, rel=0.12)  # 400 draws know it within 3.5 %
    alone = [Rating(one.comparison, f"{number}", one.left, one.right, one.score) for number, one in enumerate(ratings)]
    naive = [bradley_terry(alone).elo_stderr(arm) for arm in sorted(true)]
    assert all((a or 0) < 0.85 * b for a, b in zip(naive, spread, strict=True))


def test_strengths_are_found_again() -> None:
    true = {"a": 0.6, "b": 0.0, "c": -0.6}
    generator, arms = np.random.default_rng(2), sorted(true)
    ratings = []
    for prompt in range(6000):
        left, right = (arms[n] for n in generator.permutation(3)[:2])
        won = generator.random() < 1 / (1 + math.exp(true[right] - true[left]))
        ratings.append(Rating(str(prompt), str(prompt), left, right, float(won)))
    found = bradley_terry(ratings)
    for arm, strength in true.items():
        error = (found.elo_stderr(arm) or math.nan) / ELO_SCALE
        assert error < 0.03
        assert abs(found.strengths[arm] - strength) < 4 * error
    a, b = found.elo_difference("a", "c"), found.elo_difference("c", "a")
    assert a == (-b[0], b[1])


def test_a_tie_is_half_a_win_of_either_and_sides_do_not_matter() -> None:
    half = [Rating(str(n), str(n), "a", "b", score) for n, score in enumerate([1.0, 1.0, 0.5, 0.5, 0.0])]
    whole = [Rating(str(n), str(n), "a", "b", score) for n, score in enumerate([1.0, 1.0, 1.0, 0.0, 0.0])]
    assert bradley_terry(half).strengths == pytest.approx(bradley_terry(whole).strengths)
    turned = [Rating(one.comparison, one.prompt, one.right, one.left, 1 - one.score) for one in half]
    assert bradley_terry(turned).strengths == pytest.approx(bradley_terry(half).strengths)
    assert win_shares(turned) == win_shares(half)
    even = bradley_terry([Rating("1", "1", "a", "b", 0.5), Rating("2", "2", "a", "b", 0.5)])
    assert even.elo("a") == even.elo("b") == pytest.approx(1000)


def test_one_prompt_has_strengths_without_an_error() -> None:
    found = bradley_terry([Rating("1", "a cat", "a", "b", score) for score in (1.0, 0.0, 1.0)])
    assert found.elo("a") > 1000
    assert found.elo_stderr("a") is None
    assert found.elo_difference("a", "b")[1] is None


def test_an_arm_that_never_lost_has_no_finite_strength() -> None:
    ratings = [Rating(str(n), str(n), "ttt", other, 1.0) for n, other in enumerate(["closed", "reset"] * 3)]
    ratings += [Rating("9", "9", "closed", "reset", 0.5)]
    told = "closed, reset never won or tied against ttt, so that strengths have no finite value"
    with pytest.raises(UsageError, match=told):
        bradley_terry(ratings)
    assert win_shares(ratings)["closed", "ttt"].mean == 0
    bradley_terry([*ratings, Rating("10", "10", "reset", "ttt", 1.0)])
    apart = [Rating("1", "1", "a", "b", 0.5), Rating("2", "2", "c", "d", 0.5)]
    with pytest.raises(UsageError, match="a, b never won or tied against c, d"):
        bradley_terry(apart)
    with pytest.raises(UsageError, match="there are no ratings"):
        bradley_terry([])


def test_strengths_that_do_not_settle_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ratings = rated({"a": 0.6, "b": 0.0, "c": -0.6}, prompts=30, raters=1, seed=4)
    bradley_terry(ratings)
    monkeypatch.setattr("ttt.eval.strengths._MOST_STEPS", 1)
    with pytest.raises(UsageError, match="the strengths of a, b, c do not settle in 1 steps"):
        bradley_terry(ratings)


def test_shares_of_wins_are_clustered_by_prompt() -> None:
    ratings = rated({"ttt": 0.3, "closed": 0.0}, prompts=30, raters=4, seed=3)
    scores = [one.score if one.left == "closed" else 1 - one.score for one in ratings]
    prompts = [one.prompt for one in ratings]
    assert win_shares(ratings)["closed", "ttt"] == estimate(scores, prompts, prompts)


def test_without_choix_the_way_out_is_told() -> None:
    program = """
import sys
sys.modules["choix"] = None
from ttt.errors import EnvironmentProblem
from ttt.eval.ratings import Rating
from ttt.eval.strengths import bradley_terry, win_shares
ratings = [Rating("1", "1", "a", "b", 0.5)]
print(win_shares(ratings)["a", "b"].mean)
try:
    bradley_terry(ratings)
except EnvironmentProblem as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    told = "Bradley–Terry strengths need choix, which is not installed; pip install 'ttt-adapters[ratings]'"
    assert result.stdout.splitlines() == ["0.5", told]
