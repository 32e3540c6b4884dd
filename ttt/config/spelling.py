"""The known word that is nearest to an unknown one."""

from __future__ import annotations

from collections.abc import Iterable

_ALIKE = 0.75


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was most likely meant; None if none is close.

    Words that differ only in case, `-` and `_` are the same. After that, the word with the fewest edits wins (a letter
    added, removed or replaced, or two swapped), then the only word with this beginning, then the most similar word.
    """
    written = _plain(word)
    plain = {candidate: _plain(candidate) for candidate in known}
    if len(written) < 2:
        return next((candidate for candidate, letters in plain.items() if letters == written != ""), None)
    within = {candidate: max(1, len(letters) // 4) for candidate, letters in plain.items()}
    edits = {
        candidate: _edits(written, letters)
        for candidate, letters in plain.items()
        if abs(len(letters) - len(written)) <= within[candidate]
    }
    near = [candidate for candidate, count in edits.items() if count <= within[candidate]]
    if near:
        fewest = min(edits[candidate] for candidate in near)
        return max(
            (candidate for candidate in near if edits[candidate] == fewest),
            key=lambda candidate: _likeness(written, plain[candidate]),
        )
    begun = [candidate for candidate, letters in plain.items() if letters.startswith(written)]
    if len(begun) == 1 and len(written) >= 3:
        return begun[0]
    likest = max(plain, key=lambda candidate: _likeness(written, plain[candidate]), default=None)
    return likest if likest is not None and _likeness(written, plain[likest]) >= _ALIKE else None


def _plain(word: str) -> str:
    return word.casefold().replace("-", "").replace("_", "").replace(" ", "")[:200]


def _likeness(first: str, second: str) -> float:
    """Twice the common letters, divided by the letters of both; 0 if it is certainly below `_ALIKE`."""
    import difflib  # only a misspelt key needs it

    matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
    if matcher.real_quick_ratio() < _ALIKE or matcher.quick_ratio() < _ALIKE:
        return 0.0
    return matcher.ratio()


def _edits(first: str, second: str) -> int:
    """Insertions, deletions, replacements and swaps of neighbours that turn one word into the other."""
    before: list[int] = []
    row = list(range(len(second) + 1))
    for i, letter in enumerate(first, 1):
        above_before, before, row = before, row, [i]
        for j, other in enumerate(second, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == second[j - 2] and first[i - 2] == other:
                cost = min(cost, above_before[j - 2] + 1)
            row.append(cost)
    return row[-1]
