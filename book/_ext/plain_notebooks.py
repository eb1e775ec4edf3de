"""Executed chapters as notebooks for any Jupyter: MyST directives and roles become plain Markdown.

Run as `python plain_notebooks.py EXECUTED TARGET` it writes every notebook under the first folder into the
second, one beside the other.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import nbformat

_FENCE = re.compile(r"^\s*(?P<fence>`{3,}|:{3,}|~{3,})\s*(?:\{(?P<name>[\w:.-]+)\}[ ]*(?P<argument>.*))?$")
_CODE = re.compile(r"^\s*(?P<fence>`{3,}|~{3,})(?!\s*\{)")
_OPTION = re.compile(r"^\s*:(?P<key>[\w-]+):\s*(?P<value>.*)$")
_ROLE = re.compile(r"\{(?P<name>[\w:.-]+)\}`(?P<content>[^`]+)`")
_EXPLICIT = re.compile(r"^(?P<text>.*\S)\s*<(?P<target>[^<>]+)>$", re.DOTALL)
_LABELLED_MATH = re.compile(r"\$\$(?P<body>(?:[^$]|\\\$)+?)\s*\$\$[ ]*\((?P<label>[\w:.-]+)\)")
_LINK = re.compile(r"\[(?P<text>[^\]\[]*)\]\(#(?P<target>[\w:.-]+)\)")
_TARGET = re.compile(r"^\([\w:.-]+\)=\s*$")
_SILENT = {
    "tableofcontents",
    "bibliography",
    "eval-rst",
    "explorable",
    "toctree",
    "raw",
    "autofunction",
    "automodule",
    "autoclass",
}
_ENDS = {"solution-end", "exercise-end"}


def plain_notebook(source: Path, target: Path, labels: Mapping[str, str] | None = None) -> None:
    """Write an executed notebook with its Markdown made plain; `labels` names other chapters' blocks."""
    notebook = nbformat.read(source, as_version=4)
    names = {**(labels or {}), **dict(labelled(markdown_of(notebook)))}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = plain(cell.source, names)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, target)


def plain(text: str, names: Mapping[str, str]) -> str:
    """Turn the MyST Markdown of a cell into plain Markdown."""
    lines = "\n".join(blocks(text.splitlines(), names))
    lines = _LABELLED_MATH.sub(lambda match: f"$${match['body']} \\tag{{{match['label']}}}$$", lines)
    lines = _ROLE.sub(lambda match: role(match["name"], match["content"], names), lines)
    lines = _LINK.sub(lambda match: match["text"] or names.get(match["target"], match["target"]), lines)
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


def blocks(lines: list[str], names: Mapping[str, str]) -> Iterator[str]:
    """Yield plain lines, directives unfolded, code blocks as they are."""
    position = 0
    while position < len(lines):
        line = lines[position]
        opened = _FENCE.match(line)
        if opened and opened["name"]:
            end = closing(lines, position, opened["fence"])
            yield from directive(opened["name"], opened["argument"].strip(), lines[position + 1 : end], names)
            position = end + 1
        elif code := _CODE.match(line):
            end = closing(lines, position, code["fence"])
            yield from lines[position : end + 1]
            position = end + 1
        else:
            if not (_TARGET.match(line) or line.startswith("%") or line.strip() == "+++"):
                yield line
            position += 1


def closing(lines: list[str], position: int, fence: str) -> int:
    """Find the line that closes the fence opened at `position` (or the last line)."""
    for index in range(position + 1, len(lines)):
        stripped = lines[index].strip()
        if len(stripped) >= len(fence) and set(stripped) == {fence[0]}:
            return index
    return len(lines) - 1


def directive(name: str, argument: str, body: list[str], names: Mapping[str, str]) -> Iterator[str]:
    """Yield the plain lines of a directive."""
    options, content = split_options(body)
    if name == "math":
        yield from ("$$", *content, f"\\tag{{{options['label']}}}" if "label" in options else "", "$$")
    elif name in ("figure", "image"):
        yield from ("", *(f"*{line}*" for line in blocks(content, names) if line.strip()), "")
    elif name in _SILENT or name in _ENDS:
        return
    elif name.startswith(("code", "literalinclude")):
        yield from ("```", *content, "```")
    else:
        heading = title(name, argument)
        yield from ("", f"**{heading}**", "") if heading else ("",)
        yield from blocks(content, names)
        yield ""


def split_options(body: list[str]) -> tuple[dict[str, str], list[str]]:
    """Split a directive's body into its options and its content."""
    options: dict[str, str] = {}
    index = 0
    while index < len(body) and (option := _OPTION.match(body[index])):
        options[option["key"]] = option["value"]
        index += 1
    return options, body[index:]


def title(name: str, argument: str) -> str:
    """Say what a block is: its kind and its own title."""
    kind = name.rpartition(":")[2].removesuffix("-start").replace("-", " ").capitalize()
    if kind == "Solution":
        return kind
    if kind in ("Admonition", "Topic", "Rubric"):
        return argument
    return f"{kind} ({argument})" if argument else kind


def role(name: str, content: str, names: Mapping[str, str]) -> str:
    """Turn a role into the text a reader would see, as far as one chapter knows it."""
    if explicit := _EXPLICIT.match(content):
        return explicit["text"]
    if name == "math":
        return f"${content}$"
    if name == "eq":
        return f"({content})"
    if name.startswith("cite"):
        return f"[{content}]"
    if name.startswith(("code", "py:", "file", "kbd")) or name in ("func", "class", "mod", "meth"):
        return f"`{content}`"
    return names.get(content, content)


def labelled(text: str) -> Iterator[tuple[str, str]]:
    """Yield the labels of the blocks in a text with what they are called."""
    lines = text.splitlines()
    for index, line in enumerate(lines):
        opened = _FENCE.match(line)
        if opened and opened["name"]:
            options, _ = split_options(lines[index + 1 : index + 8])
            if label := options.get("label") or options.get("name"):
                yield label, title(opened["name"], opened["argument"].strip())


def markdown_of(notebook: nbformat.NotebookNode) -> str:
    """Join the Markdown cells of a notebook."""
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def names_in(paths: list[Path]) -> dict[str, str]:
    """Collect what the labelled blocks of several notebooks are called."""
    texts = (markdown_of(nbformat.read(path, as_version=4)) for path in paths)
    return {label: name for text in texts for label, name in labelled(text)}


def write_all(executed: Path, target: Path) -> list[Path]:
    """Write every notebook under `executed` into the folder `target`, each named after its place."""
    sources = sorted(path for path in executed.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
    names = names_in(sources)
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for source in sources:
        written.append(target / "-".join(source.relative_to(executed).parts))
        plain_notebook(source, written[-1], names)
    return written


if __name__ == "__main__":
    for path in write_all(Path(sys.argv[1]), Path(sys.argv[2])):
        print(path)
