"""On what does a person read?"""

from __future__ import annotations

from rich.console import Console


def stderr_console() -> Console:
    """A console that neither colours numbers nor wraps lines in a log file."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        console = Console(stderr=True, highlight=False, width=160)
    return console


def best_mark(encoding: str | None) -> str:
    """The guide's cup for the best epoch so far, or a word where the terminal cannot show it.

    >>> best_mark("ascii")
    '(best)'
    """
    try:
        "🏆".encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "(best)"
    return "🏆"
