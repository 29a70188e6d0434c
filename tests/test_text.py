"""Texts of strangers: what the eye or a terminal would take for something else is escaped."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tlcoupling.text import visible


def test_invisible_characters_are_shown() -> None:
    assert visible(" a\n\t\u202e\u200b") == " a↵⇥\\u{202e}\\u{200b}"
    assert visible("") == "∅"
    assert visible("\u200d") == "\\u{200d}"
    assert visible("🏳️‍🌈") == "🏳️‍🌈"


@given(st.text())
def test_no_text_commands_a_terminal(text: str) -> None:
    shown = visible(text)
    assert shown and not any(char < " " or "\x7f" <= char <= "\x9f" for char in shown)
    assert all(char.isprintable() or char in "\u200c\u200d" for char in shown)
