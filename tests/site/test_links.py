"""Every link and anchor of every page, followed without a browser."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup

from .conftest import SITE


@cache
def parsed(path: str) -> BeautifulSoup:
    return BeautifulSoup((SITE / path).read_text(encoding="utf-8"), "html.parser")


@cache
def anchors(path: str) -> frozenset[str]:
    return frozenset(tag["id"] for tag in parsed(path).find_all(id=True))


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
    addresses = {tag[key] for key in ("href", "src") for tag in parsed(path).find_all(**{key: True})}
    problems = [problem for address in sorted(addresses) if (problem := broken(path, address))]
    assert addresses and problems == []


def test_only_readers_leave_the_site(path: str) -> None:
    """Scripts, styles, fonts and images are local; other sites are reached by links alone, and over https."""
    for tag in parsed(path).find_all(["script", "link", "img", "iframe", "source"]):
        address = tag.get("src") or tag.get("href") or ""
        assert not urlsplit(address).netloc, f"{tag.name} loads {address}"
    for tag in parsed(path).find_all("a", href=True):
        assert urlsplit(tag["href"]).scheme in ("", "https", "mailto"), tag["href"]


def test_no_id_stands_twice(path: str) -> None:
    counts = Counter(tag["id"] for tag in parsed(path).find_all(id=True))
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
