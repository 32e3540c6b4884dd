"""Text from elsewhere made safe to show: in one line, without what would steer a terminal."""


def printable(text: str) -> str:
    """The text in one line and without what would steer a terminal."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else " " if character.isspace() else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )
