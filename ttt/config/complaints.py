"""Errors of YAML's parser, reworded for the author of the file."""

from __future__ import annotations


def explain_complaint(problem: str, context: str, line: str, column: int) -> tuple[str, str, bool]:
    """A parser's error in plain words, the fix, and whether its cause is at the start of the construct."""
    if "mapping values are not allowed" in problem:
        if ": " in line[:column]:
            return "a second `:` in one line", "quote a text with `: ` in it, or begin a new line", False
        return (
            "a key where none can be: it is indented deeper than the keys above, or the line above lacks its `:`",
            "give the keys of one section the same indentation, and each a `:`",
            False,
        )
    if "cannot start any token" in problem:
        character = line[column : column + 1]
        if character == "\t":
            return "a tab; YAML is indented with spaces only", "write spaces", False
        return f"a value cannot begin with {character!r}", "quote the text", False
    if "',' or" in problem:
        bracket = "[" if "]" in problem else "{"
        return (
            f"a `{bracket}` that is never closed, or a comma missing after it",
            "close it, commas between values",
            True,
        )
    if "quoted scalar" in context and "end of stream" in problem:
        return "a quotation mark that is never closed", "close it on the same line", True
    if "escape character" in problem:
        return "an unknown escape in double quotes", "use single quotes, in which a backslash is a backslash", False
    if "could not find expected ':'" in problem:
        return "a line without a `:` after its key", "write `key: value`, with a space after the colon", True
    if "alphabetic or numeric" in problem:
        return "a `*` or `&` begins an alias or anchor, but no name follows", "quote the text", True
    if any(words in problem for words in ("expected key", "<block end>", "'-' indicator", "block sequence entries")):
        return (
            "this line does not continue what is above it: its indentation fits no section, or a list and keys mix",
            "give the keys of one section the same indentation",
            False,
        )
    if "document start" in problem:
        return "something follows the end of the document", "remove the line `...` or what follows it", False
    return f"not YAML: {problem}" + (f" {context}" if context else ""), "write `key: value` lines", False
