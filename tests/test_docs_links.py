"""The pages hang together: links and anchors lead somewhere, and the README stays a front page."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from dus_edge.cli.main import cli

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (
    README,
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
    ROOT / "interop" / "README.md",
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)


def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```$", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    found: set[str] = set()
    for heading in HEADING.findall(prose(path)):
        text = LINK.sub(lambda m: m[0][1 : m[0].index("]")], heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        n = 0
        while (name := f"{slug}-{n}" if n else slug) in found:
            n += 1
        found.add(name)
    return found


def links(path: Path) -> list[str]:
    text = re.sub(r"(`+).*?\1", "", prose(path))
    return [x for x in LINK.findall(text) if not re.match(r"[a-z]+:", x)]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for link in links(path):
        target, _, anchor = link.partition("#")
        there = (path.parent / target).resolve() if target else path
        assert there.is_relative_to(ROOT.resolve()), f"{link} leads out of the project"
        assert there.exists(), f"{link}: there is no {there.relative_to(ROOT.resolve())}"
        if anchor:
            assert anchor in anchors(there), f"{link}: no heading of that page gives #{anchor}"


def test_an_anchor_is_that_of_the_heading(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# RTX 20, desktop\n## llama.cpp\n### [a](b.md) `c`\n## llama.cpp\n```\n# x\n```"
    )
    assert anchors(page) == {"rtx-20-desktop", "llamacpp", "a-c", "llamacpp-1"}


def test_links_are_found():
    assert len(links(README)) >= 10
    assert all(links(ROOT / "docs" / "README.md"))


def test_every_page_of_docs_is_in_its_index():
    index = ROOT / "docs" / "README.md"
    pages = {p.name for p in (ROOT / "docs").glob("*.md")} - {index.name}
    assert pages <= set(links(index))


def test_the_readme_is_a_front_page():
    lines = README.read_text("utf-8").splitlines()
    assert len(lines) <= 130
    # What a user must not miss.
    assert "worse than its base until it is healed (trained further)" in " ".join(lines[:10])


def test_the_readme_lists_every_command():
    text = README.read_text("utf-8")
    listed = set(re.findall(r"^\| `dus-edge ([a-z]+(?: [a-z]+)?)\b", text, re.MULTILINE))
    context = click.Context(cli)
    names = set()
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        group = isinstance(command, click.Group)
        names |= {f"{name} {x}" for x in command.list_commands(context)} if group else {name}
    assert names == listed


def test_the_readme_names_every_target_of_make():
    text = README.read_text("utf-8")
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(targets) > 5
    for target in set(targets) - {"help"}:
        assert re.search(rf"`make {target}\b(?!-)", text) or f"\nmake {target} " in text, target
