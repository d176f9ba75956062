"""Docstrings as the reference shows them: roles become links, examples become code blocks.

An extension of griffe, which reads the sources for mkdocstrings (mkdocs.yml names it).
"""

from __future__ import annotations

import re
from typing import Any

import griffe

import nemf

PACKAGES = ("nemf", "baselines", "experiments", "reports")
# `nemf.match` and its like are fetched when asked for; the reference has them where they live.
_AT_HOME = {f"nemf.{name}": f"{home}.{name}" for name, home in nemf._HOMES.items()}
_ROLE = re.compile(r":[a-z]+:`~?([^`]+)`")


class DocstringMarkup(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(docstring: str) -> str:
    """A docstring of this project as Markdown."""
    lines: list[str] = []
    in_example = False
    for line in _ROLE.sub(_link, docstring).split("\n"):
        begins, ends = line.lstrip().startswith(">>> "), in_example and not line.strip()
        if begins and not in_example:
            lines += ["", "```pycon"]
            in_example = True
        elif ends:
            lines.append("```")
            in_example = False
        lines.append(line)
    return "\n".join([*lines, "```"] if in_example else lines)


def _link(match: re.Match[str]) -> str:
    """Full names of public things are in the reference; short ones are only set as code."""
    name = match[1]
    first, *others = name.split(".")
    public = first in PACKAGES and others and not any(part.startswith("_") for part in others)
    return f"[`{name}`][{_AT_HOME.get(name, name)}]" if public else f"`{name}`"
