"""What the documents promise is there: commands, options, targets, protocols, links."""

from __future__ import annotations

import re
import shlex
import unicodedata
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from experiments.cli import main_group
from nemf.scoring import PROTOCOLS
from tests.test_site import generate

REPO = Path(__file__).resolve().parent.parent
ROOT_DOCUMENTS = [REPO / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
MADE = generate.pages()
DOCUMENTS = [*ROOT_DOCUMENTS, *sorted((REPO / "docs").glob("*.md"))]


def code_of(document: Path) -> list[str]:
    """Lines of fenced blocks and inline code of a document."""
    text = document.read_text(encoding="utf-8")
    blocks = re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL)
    rest = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line.strip() for line in lines] + re.findall(r"`([^`]+)`", rest.replace("\n", " "))


COMMANDS = sorted(
    {(d.name, line) for d in DOCUMENTS for line in code_of(d) if line.startswith("nemf ")}
)
TARGETS = sorted(
    {
        target
        for d in DOCUMENTS
        for line in code_of(d)
        if line.startswith("make ")
        for target in re.findall(r"^make ([a-z0-9-]+)", line)
    }
)


def test_there_is_something_to_check() -> None:
    assert len(COMMANDS) > 8
    assert {"reproduce-table1", "test", "setup", "ui"} <= set(TARGETS)


@pytest.mark.parametrize(("document", "line"), COMMANDS)
def test_every_documented_command_exists_with_its_options(document: str, line: str) -> None:
    words = shlex.split(line.partition(" # ")[0].replace("[", "").replace("]", ""))[1:]
    command: click.Command = main_group
    while isinstance(command, click.Group) and words and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    assert command is not main_group or words[0].startswith("-"), f"{document}: {line}"
    known = {"--help"} | {name for parameter in command.params for name in parameter.opts}
    known |= {name for parameter in command.params for name in parameter.secondary_opts}
    unknown = [word for word in words if word.startswith("--") and word not in known]
    assert not unknown, f"{document}: {line}"


@pytest.mark.parametrize("target", TARGETS)
def test_every_documented_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (REPO / "Makefile").read_text(), re.MULTILINE)


def test_every_protocol_is_documented() -> None:
    for document in ("docs/protocols.md", "CHANGELOG.md"):
        text = (REPO / document).read_text(encoding="utf-8")
        assert not [p for p in PROTOCOLS if f"`{p}`" not in text], document


def without_code(document: Path) -> str:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"`[^`]*`", "", text)


def anchors(document: Path) -> set[str]:
    """Those of a document's headings that the site and a code host agree on."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", heading).replace("`", "")
        kept = re.sub(r"[^\w\s-]", "", plain).strip().lower()
        hosted = kept.replace(" ", "-")
        ascii_only = unicodedata.normalize("NFKD", kept).encode("ascii", "ignore").decode()
        if re.sub(r"[-\s]+", "-", ascii_only) == hosted:
            found.add(hosted)
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(document))
    wrong = []
    for link in links:
        if "://" in link or link.startswith("mailto:"):
            continue
        path, hash_, anchor = link.partition("#")
        target = document.parent / path if path else document
        if document.parent.name == "docs" and path in MADE:
            continue
        if not target.exists() or (hash_ and anchor not in anchors(target)):
            wrong.append(link)
    assert not wrong


def test_anchors_by_hand(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    page.write_text(
        "# Per image, `and` per point\n```\n# no\n```\n## See [this](x.md)\n### a – b\n"
    )
    assert anchors(page) == {"per-image-and-per-point", "see-this"}  # hosts differ on the third


def nav_pages(entry: Any) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    below = entry.values() if isinstance(entry, dict) else entry
    return [page for part in below for page in nav_pages(part)]


def test_every_document_is_in_the_navigation_of_the_site() -> None:
    listed = nav_pages(yaml.safe_load((REPO / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(listed) == sorted(d.name for d in (REPO / "docs").glob("*.md"))


def test_the_first_screen_of_the_readme_holds_both_commands() -> None:
    first = (REPO / "README.md").read_text(encoding="utf-8").splitlines()[:25]
    assert any(line.startswith("make reproduce-table1") for line in first)
    assert any(line.startswith("make test") for line in first)
