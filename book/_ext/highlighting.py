"""Highlighted code without a tag around every name, comma and bracket.

Names and punctuation have the colour of plain text in the book's styles, so that a tag around each of them changes
nothing a reader sees, and is a third of all the elements of a page with much code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from pygments.formatters import HtmlFormatter
from pygments.token import Name, Punctuation, Text, Whitespace, _TokenType
from sphinx.application import Sphinx
from sphinx.highlighting import PygmentsBridge

PLAIN = frozenset({Name, Name.Namespace, Punctuation, Whitespace})
"""The kinds of token that the styles of `_config.yml` write in the colour of plain text."""


def plain(tokens: Iterable[tuple[_TokenType, str]]) -> Iterator[tuple[_TokenType, str]]:
    """Hand the tokens on, those that look like plain text as plain text."""
    return ((Text if kind in PLAIN else kind, value) for kind, value in tokens)


class PlainNamesFormatter(HtmlFormatter[str]):
    """HTML that marks only what has a colour of its own."""

    def format_unencoded(self, tokensource: Iterable[tuple[_TokenType, str]], outfile: TextIO) -> None:
        super().format_unencoded(plain(tokensource), outfile)


def setup(app: Sphinx) -> dict[str, Any]:
    PygmentsBridge.html_formatter = PlainNamesFormatter
    return {"version": "1.0", "parallel_read_safe": True, "parallel_write_safe": True}
