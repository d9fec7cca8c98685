"""Makes names that users give safe to show."""

from typing import Optional

__all__ = ["drawable", "printable"]

# Not printable by itself, but part of words in Persian and in Indian scripts, and of emoji.
_JOINERS = "\u200c\u200d"


def printable(text: str, limit: Optional[int] = None) -> str:
    """``text`` on one line, with only characters that can be seen, encoded and drawn.

    Control characters, lone surrogates and marks that change the direction of writing become
    escapes such as ``\\x1b``; white space becomes a blank.

    Args:
        text: Any text, for example the name of a norm or a category.
        limit: Maximum number of characters; the middle of a longer text is left out.
    """
    shown = "".join(map(_shown, text))
    if limit is not None and len(shown) > limit:
        half = (limit - 1) // 2
        shown = f"{shown[:half]}…{shown[-half:]}"
    return shown


def drawable(text: str) -> str:
    """``text`` for matplotlib, which would read text between two dollar signs as a formula."""
    return printable(text).replace("$", r"\$")


def _shown(character: str) -> str:
    if character.isprintable() or character in _JOINERS:
        return character
    if character.isspace():
        return " "
    return character.encode("unicode_escape").decode()
