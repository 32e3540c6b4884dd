"""What a file is that should be text, or a list with a JSON object on each line, and is something else.

What is recognised here is named, wherever a text is read, instead of being refused as a letter that does not fit. The
signatures are in `ttt.file_kinds`; this module imports nothing else of the rest.
"""

from __future__ import annotations

import codecs

from ttt.file_kinds import ENOUGH, PAGES, RECORDINGS, TEXTS, FileKind, kind_of_start

__all__ = ["ENOUGH", "FileKind", "foreign", "foreign_list", "foreign_page", "not_utf8"]


def foreign(start: bytes, file: object = "FILE") -> FileKind | None:
    """What begins so, if it is not text in UTF-8; None if it may be.

    Args:
        start: the first bytes of a file, `ENOUGH` of them, or all.
        file: its name, for the commands that make a text of it.
    """
    kind = kind_of_start(start, file)
    return None if kind is None or kind.name in TEXTS else kind


def foreign_page(start: bytes, file: object = "FILE") -> FileKind | None:
    """What begins so, if it is a page, as a server sends in place of a file."""
    kind = kind_of_start(start, file)
    return kind if kind is not None and kind.name in PAGES else None


def foreign_list(start: bytes, file: object = "FILE") -> FileKind | None:
    """What begins so, if it has no JSON object on each line; None if it may have.

    Args:
        start: as for `foreign`.
        file: as for `foreign`.
    """
    kind = foreign(start, file) or foreign_page(start, file)
    if kind is not None:
        return kind._replace(to_text="name the list of the files instead") if kind.name in RECORDINGS else kind
    other = _other_text(start)
    return None if other is None else other.of(file)


def _other_text(start: bytes) -> FileKind | None:
    """Text of another layout."""
    text = start.removeprefix(codecs.BOM_UTF8).lstrip()
    first, _, _ = text.partition(b"\n")
    first = first.strip()
    if text.startswith(b"[") and _is_array(text):
        return FileKind("JSON array", "one JSON array", "write an object on each line: jq -c '.[]' {file}")
    if first == b"{" and b"\n" in text:
        return FileKind("JSON text", "JSON laid out over several lines", "write an object on each line: jq -c . {file}")
    if _is_header(first):
        return FileKind(
            "CSV table", "a table of separated values", "write each row as a JSON object on a line of its own"
        )
    return None


def not_utf8(content: bytes, error: UnicodeDecodeError, file: object) -> str:
    """Why content cannot be decoded, as the end of a sentence with the way out."""
    line = content.count(b"\n", 0, error.start) + 1
    return (
        f"it is not text in UTF-8: byte {error.start + 1:,}, in line {line:,}, is 0x{content[error.start]:02x}; save "
        f"it as UTF-8, if it is Latin-1: iconv -f LATIN1 -t UTF-8 {file}"
    )


def _is_array(text: bytes) -> bool:
    """Whether a text that begins with a bracket is an array of objects, or one that goes on in the next line."""
    if text[1:].lstrip()[:1] == b"{":
        return True
    first, newline, _ = text.partition(b"\n")
    return bool(newline) and first.strip() == b"["


def _is_header(first: bytes) -> bool:
    """Whether a first line names the columns of a table."""
    cells = [cell.strip().strip(b'"') for cell in first.translate(bytes.maketrans(b"\t;", b",,")).split(b",")]
    return len(cells) > 1 and all(cell.replace(b"_", b"").isalpha() for cell in cells)
