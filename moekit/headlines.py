"""Errors and other people's texts on one line, for messages, logs and tables."""

from __future__ import annotations

# Characters: no sentence of moekit's own is longer.
MOST = 1000


def headline(error: BaseException, most: int = MOST) -> str:
    """The kind of an error, and what it says as :func:`first_line` has it: ``KeyError: 'x'``."""
    kind, text = type(error).__name__, first_line(error, most)
    return kind if text == kind else f"{kind}: {text}"


def first_line(error: BaseException | str, most: int = MOST) -> str:
    """The first line of what an error says, at most ``most`` characters of it; its kind where it says nothing."""
    try:
        said = str(error)
    except Exception:
        # What makes an error's text may fail itself.
        said = ""
    lines = said.strip().splitlines() or [type(error).__name__]
    return folded(lines[0], most)


def folded(text: object, most: int = MOST) -> str:
    """All lines of a text as one, cut to ``most`` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else line[: most - 3] + "..."
