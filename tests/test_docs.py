"""What the documents promise is there: commands, options, targets, protocols, links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from experiments.cli import main_group
from nemf.scoring import PROTOCOLS

REPO = Path(__file__).resolve().parent.parent
DOCUMENTS = [REPO / "README.md", REPO / "CHANGELOG.md", *sorted((REPO / "docs").glob("*.md"))]


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
    assert command is not main_group, f"{document}: {line}"
    known = {name for parameter in command.params for name in parameter.opts}
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


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert not [link for link in local if not (document.parent / link).exists()]


def test_the_first_screen_of_the_readme_holds_both_commands() -> None:
    first = (REPO / "README.md").read_text(encoding="utf-8").splitlines()[:25]
    assert any(line.startswith("make reproduce-table1") for line in first)
    assert any(line.startswith("make test") for line in first)
