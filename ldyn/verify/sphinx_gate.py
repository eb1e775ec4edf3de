"""Sphinx extension: badges beside statements, the ledger, and a build that fails when evidence is missing.

Claims are read from the outputs of the executed notebooks, statements from the blocks of `sphinx_proof`. Pages may
use two directives: ``verify-ledger`` (a table, a graph or a summary) and ``erratum`` (a row of the errata).
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import SphinxError
from sphinx.util.docutils import SphinxDirective

from . import graph, ledger
from .display import badge

_CLAIM = re.compile(r'<div class="ldyn-claim" data-claim="([^"]*)">')
_STATE = "ldyn_verify_pages"


class VerificationGate(SphinxError):
    """The build stops: the book holds a statement without evidence."""

    category = "Verification gate"


class ledger_node(nodes.General, nodes.Element):
    """Where the ledger is drawn once every page has been read."""


class LedgerDirective(SphinxDirective):
    """Place of a part of the ledger: its ``table``, its ``graph`` or its ``summary`` in one sentence."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the placeholder that is filled when the page is written.

        Returns:
            One node.
        """
        part = self.arguments[0]
        if part not in ("table", "graph", "summary"):
            raise self.error(f"verify-ledger: expected table, graph or summary, got {part}")
        _page(self.env, self.env.docname)["ledger"].append(part)
        return [ledger_node(part=part)]


class ErratumDirective(SphinxDirective):
    """A row of the errata: what a source says, what is true, and the claim whose control refutes it."""

    required_arguments = 1
    has_content = True
    option_spec: ClassVar[dict[str, Any]] = {
        "where": directives.unchanged_required,
        "claim": directives.unchanged,
    }

    def run(self) -> list[nodes.Node]:
        """Build the row and remember it for the gate.

        Returns:
            One container.
        """
        name, claim = self.arguments[0], self.options.get("claim", "").strip()
        if not self.options.get("where"):
            raise self.error("erratum: expected the option where, got none")
        errata = _page(self.env, self.env.docname)["errata"]
        errata.append({"name": name, "claim": claim})
        anchor = nodes.make_id(f"erratum-{name}")
        row = nodes.container(ids=[anchor], classes=["ldyn-erratum"])
        heading = nodes.paragraph(classes=["ldyn-erratum-head"])
        heading += nodes.strong(name, name)
        heading += nodes.Text(" ")
        parsed, messages = self.state.inline_text(self.options["where"], self.lineno)
        heading += nodes.inline("", "", *parsed, classes=["ldyn-erratum-where"])
        row += [heading, *messages]
        self.state.nested_parse(self.content, self.content_offset, row)
        row += _refutation(claim)
        return [row]


def _refutation(claim: str) -> nodes.paragraph:
    line = nodes.paragraph(classes=["ldyn-erratum-claim"])
    if not claim:
        line += nodes.Text("A slip of the pen; there is nothing to compute.")
        return line
    line += nodes.Text("Refuted in ")
    reference = addnodes.pending_xref(
        "", refdomain="prf", reftype="ref", reftarget=claim, refexplicit=False, refwarn=True
    )
    reference += nodes.inline(claim, claim)
    line += [reference, nodes.Text(".")]
    return line


def _page(env: BuildEnvironment, name: str) -> dict[str, Any]:
    """Return what is remembered of a page."""
    pages: dict[str, dict[str, Any]] = getattr(env, _STATE, {})
    setattr(env, _STATE, pages)
    return pages.setdefault(name, {"blocks": [], "claims": [], "errata": [], "ledger": []})


def _forget(app: Sphinx, env: BuildEnvironment, docname: str) -> None:
    getattr(env, _STATE, {}).pop(docname, None)


def _merge(app: Sphinx, env: BuildEnvironment, docnames: list[str], other: BuildEnvironment) -> None:
    for name in docnames:
        if name in getattr(other, _STATE, {}):
            _page(env, name).update(getattr(other, _STATE)[name])


def _collect(app: Sphinx, doctree: nodes.document) -> None:
    """Read the statements and the claims of a page; take the claims' own output away."""
    page = _page(app.env, app.env.docname)
    page["blocks"], page["claims"] = [], []
    kinds = set(app.config.verify_blocks)
    found: list[nodes.Node] = []
    for position, node in enumerate(doctree.findall()):
        if isinstance(node, nodes.Element) and node.get("realtype") in kinds:
            page["blocks"].append(_block(node, app.env.docname, position))
        elif isinstance(node, nodes.raw) and node.get("format") == "html":
            match = _CLAIM.search(node.astext())
            if match:
                record = json.loads(html.unescape(match.group(1)))
                page["claims"].append({"record": record, "page": app.env.docname, "position": position})
                found.append(node)
    for node in found:
        _remove_output(node)


def _block(node: nodes.Element, page: str, position: int) -> dict[str, Any]:
    title = next((t.astext() for t in node.findall(nodes.title)), "").strip().removeprefix("(").removesuffix(")")
    kind = str(node["realtype"])
    return {"label": node["label"], "kind": kind, "title": title, "page": page, "position": position}


def _remove_output(node: nodes.Node) -> None:
    """Remove the bundle that a claim was displayed in, and its cell's output area if nothing else is left."""
    while isinstance(node.parent, nodes.container) and node.parent.get("nb_element") != "cell_code_output":
        node = node.parent
    parent = node.parent
    parent.remove(node)
    if isinstance(parent, nodes.container) and not parent.children and parent.parent is not None:
        parent.parent.remove(parent)


def _all_blocks(env: BuildEnvironment) -> list[ledger.Block]:
    pages = getattr(env, _STATE, {})
    names = sorted(pages, key=lambda name: (_toc_order(env).get(name, len(pages)), name))
    return [ledger.Block(**block) for name in names for block in pages[name]["blocks"]]


def _all_claims(env: BuildEnvironment) -> list[ledger.Placed]:
    pages = getattr(env, _STATE, {})
    return [ledger.Placed(**claim) for name in sorted(pages) for claim in pages[name]["claims"]]


def _toc_order(env: BuildEnvironment) -> dict[str, int]:
    """Return the reading order of the pages, from the table of contents."""
    order: dict[str, int] = {}

    def visit(name: str) -> None:
        if name not in order:
            order[name] = len(order)
            for child in env.toctree_includes.get(name, []):
                visit(child)

    visit(env.config.root_doc)
    return order


def _gate(app: Sphinx, env: BuildEnvironment) -> None:
    """Stop the build if anything is missing."""
    pages = getattr(env, _STATE, {})
    errata = [ledger.Erratum(**row) for name in sorted(pages) for row in pages[name]["errata"]]
    found = ledger.problems(_all_blocks(env), _all_claims(env), errata)
    if found:
        raise VerificationGate(f"{len(found)} problem(s)\n" + "\n".join(f"  - {line}" for line in found))


def _ledger_pages(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Have the parts of the ledger written again whenever any page has been read again."""
    return [name for name, page in getattr(env, _STATE, {}).items() if page["ledger"]]


def _number(env: BuildEnvironment, block: ledger.Block) -> str:
    entry = getattr(env, "proof_list", {}).get(block.label, {})
    numbers = env.toc_fignumbers.get(block.page, {}).get(entry.get("countertype", ""), {}).get(block.label, ())
    return ".".join(map(str, numbers))


class _Links:
    """Addresses and names of statements as seen from one page."""

    def __init__(self, app: Sphinx, page: str) -> None:
        self.blocks = {block.label: block for block in _all_blocks(app.env)}
        self.app, self.page = app, page

    def href(self, label: str) -> str:
        target = self.blocks[label].page
        path = "" if target == self.page else self.app.builder.get_relative_uri(self.page, target)
        return f"{path}#{label}"

    def name(self, label: str) -> str:
        block = self.blocks[label]
        return f"{block.kind.capitalize()} {_number(self.app.env, block)}".strip()

    def html(self, label: str) -> str:
        title = self.blocks[label].title or label
        return f'<a href="{html.escape(self.href(label))}">{self.name(label)}</a> {html.escape(title)}'


def _write_evidence(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Put each badge into its statement, and the ledger into its place."""
    page = _page(app.env, docname)
    links = _Links(app, docname)
    records = {claim["record"]["label"]: claim["record"] for claim in page["claims"]}
    foot = _foot(app, docname)
    for node in list(doctree.findall(nodes.Element)):
        if node.get("realtype") in set(app.config.verify_blocks) and node.get("label") in records:
            text = badge(records[node["label"]], links.html, foot=foot.replace("LABEL", node["label"]))
            node.insert(1, nodes.raw("", text, format="html"))
        elif isinstance(node, ledger_node):
            node.replace_self(nodes.raw("", _ledger_html(app, links, node["part"]), format="html"))


def _foot(app: Sphinx, docname: str) -> str:
    target = next((name for name, page in getattr(app.env, _STATE, {}).items() if "table" in page["ledger"]), None)
    if target is None:
        return ""
    uri = app.builder.get_relative_uri(docname, target)
    return f'<p class="ldyn-in-ledger"><a href="{uri}#ledger-LABEL">This claim in the ledger</a></p>'


def _entries(env: BuildEnvironment) -> list[dict[str, Any]]:
    return ledger.rows(_all_blocks(env), _all_claims(env), lambda block: _number(env, block))


def _ledger_html(app: Sphinx, links: _Links, part: str) -> str:
    entries = _entries(app.env)
    if part == "table":
        return ledger.table(entries, links.html)
    if part == "graph":
        return graph.draw(entries, links.href, links.name)
    return f'<p class="ldyn-summary">{html.escape(ledger.summary(entries))}</p>'


def _write_json(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        text = json.dumps(_entries(app.env), indent=1, ensure_ascii=False, sort_keys=True)
        Path(app.outdir, "ledger.json").write_text(text + "\n", encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension.

    Args:
        app: The Sphinx application.

    Returns:
        Its metadata.
    """
    app.add_config_value("verify_blocks", ["theorem", "lemma", "proposition", "corollary"], "env", [list])
    app.add_node(ledger_node)
    app.add_directive("verify-ledger", LedgerDirective)
    app.add_directive("erratum", ErratumDirective)
    app.connect("env-purge-doc", _forget)
    app.connect("env-merge-info", _merge)
    app.connect("doctree-read", _collect)
    app.connect("env-updated", _ledger_pages)
    app.connect("env-check-consistency", _gate)
    app.connect("doctree-resolved", _write_evidence)
    app.connect("build-finished", _write_json)
    return {"version": "1", "env_version": 1, "parallel_read_safe": True, "parallel_write_safe": True}
