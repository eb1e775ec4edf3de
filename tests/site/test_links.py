"""Every link and anchor of every page, followed without a browser."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

from .conftest import SITE

LOADED = ("script", "link", "img", "iframe", "source")


class Tags(HTMLParser):
    """The tags of a page that have a name, lead somewhere or load something; a tree is not needed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        kept = {name: value or "" for name, value in attrs if name in ("id", "href", "src")}
        if kept:
            self.found.append((tag, kept))


@cache
def tags(path: str) -> list[tuple[str, dict[str, str]]]:
    return Tags((SITE / path).read_text(encoding="utf-8")).found


@cache
def anchors(path: str) -> frozenset[str]:
    return frozenset(given["id"] for _, given in tags(path) if "id" in given)


def broken(path: str, address: str) -> str | None:
    """Say what is wrong with an address on a page, if anything is."""
    parts = urlsplit(address)
    if parts.scheme or parts.netloc:
        return None
    target = SITE / path if not parts.path else (SITE / path).parent / unquote(parts.path)
    if not target.resolve().is_file():
        return f"{address}: no such file"
    if parts.fragment and target.suffix == ".html":
        name = target.resolve().relative_to(SITE.resolve()).as_posix()
        if unquote(parts.fragment) not in anchors(name):
            return f"{address}: no such anchor"
    return None


def test_no_link_is_broken(path: str) -> None:
    addresses = {given[key] for _, given in tags(path) for key in ("href", "src") if key in given}
    problems = [problem for address in sorted(addresses) if (problem := broken(path, address))]
    assert addresses and problems == []


def test_only_readers_leave_the_site(path: str) -> None:
    """Scripts, styles, fonts and images are local; other sites are reached by links alone, and over https."""
    for tag, given in tags(path):
        if tag in LOADED:
            address = given.get("src") or given.get("href") or ""
            assert not urlsplit(address).netloc, f"{tag} loads {address}"
        elif tag == "a" and "href" in given:
            assert urlsplit(given["href"]).scheme in ("", "https", "mailto"), given["href"]


def test_no_id_stands_twice(path: str) -> None:
    counts = Counter(given["id"] for _, given in tags(path) if "id" in given)
    assert [name for name, count in counts.items() if count > 1] == []


def test_styles_load_only_what_is_there() -> None:
    sheets = list((SITE / "_static").rglob("*.css"))
    assert sheets
    for sheet in sheets:
        text = re.sub(r"/\*.*?\*/", "", sheet.read_text(encoding="utf-8"), flags=re.DOTALL)
        for address in re.findall(r"url\(\s*['\"]?([^'\")]+)", text):
            parts = urlsplit(address)
            if parts.scheme == "data" or address.startswith("#"):
                continue
            assert not parts.netloc, f"{sheet.name} loads {address}"
            assert (sheet.parent / unquote(parts.path)).resolve().is_file(), f"{sheet.name} misses {address}"
