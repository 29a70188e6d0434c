"""Show texts of strangers (tokens, prompts, names and errors), and count in words."""

from __future__ import annotations

_SHOWN = {"\n": "↵", "\r": "␍", "\t": "⇥", "\xa0": "⍽"}
_JOINERS = "\u200c\u200d"  # invisible, but they shape the letters and emoji around them


def visible(text: str) -> str:
    """Replace line breaks, control and invisible characters by visible signs.

    No text then looks empty, reorders the characters around it (bidirectional controls), or commands a terminal.
    """

    def shown(char: str) -> str:
        if char.isprintable() or (char in _JOINERS and len(text) > 1):
            return char
        return _SHOWN.get(char) or f"\\u{{{ord(char):x}}}"

    return "".join(map(shown, text)) or "∅"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: ``"1 token"``, ``"2 tokens"``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
