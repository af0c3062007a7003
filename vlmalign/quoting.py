"""What stands in the user's files, inside messages: short, and without characters that steer a terminal or reorder others."""

from __future__ import annotations

#: characters of a value that a message quotes; of a path, of a library's own words, of a line of several
MOST, MOST_OF_LINE = 80, 1000


def quoted(value: object, most: int = MOST) -> str:
    """A text in quotes, or another value, as Python writes it, cut to `most` characters.

    >>> quoted("a\\x1b[31m"), quoted("x" * 100) == f"'{'x' * 77}..."
    ("'a\\\\x1b[31m'", True)
    """
    written = repr(value[: most + 1] if isinstance(value, str) else value)  # a cell may have millions of characters
    return written if len(written) <= most + 2 else f"{written[: most - 2]}..."


def shown(value: object, most: int = MOST) -> str:
    """A text as it stands, but for characters that cannot be printed, which become escapes; cut to `most` characters.

    >>> shown("00000001_000.png"), shown("a\\u202eb")
    ('00000001_000.png', 'a\\\\u202eb')
    """
    text = str(value)[: most + 1]
    if not text.isprintable():
        text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    return text if len(text) <= most else f"{text[: most - 3]}..."
