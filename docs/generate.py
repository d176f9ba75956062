"""Pages of the site that are made, not written: cards, command line, reference, changelog.

A hook of MkDocs (mkdocs.yml names it); :func:`pages` itself needs no MkDocs, so tests read what it
makes without building the site.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import click

from experiments.cli import main_group
from nemf.cards import MatcherCard, available_matchers, matcher_entry_point
from nemf.datasets import CATALOGUE, available_datasets, dataset_class
from nemf.scoring import PROTOCOLS

REPO = Path(__file__).resolve().parent.parent
PACKAGES = {
    "nemf": "The library: pairs, datasets, geometry, protocols and PCK, matchers' interface, NeMF",
    "baselines": "Every other matcher, one file each",
    "experiments": "How a run happens: configs, prediction store, command line, training",
    "reports": "What came out: records, statistics, tables, figures, pages",
}
# Files outside docs/ that the site holds, by their page; links to them are led there.
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "LICENSE": "licence.md",
}
# Searches should find what is written for readers before what is made from docstrings.
_MODULE = "---\ntitle: {module}\nsearch:\n  boost: 0.2\n---\n\n::: {module}\n"
_LINK = re.compile(r"\]\(([^)\s]+)\)")


# -- what MkDocs calls ----------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """Adds the made pages to the navigation of mkdocs.yml."""
    made = list(pages())
    config["nav"] += [
        {"Matchers": [page for page in made if page.startswith("cards/matchers/")]},
        {"Datasets": [page for page in made if page.startswith("cards/datasets/")]},
        {"Reference": _reference_nav(made)},
        {"About": list(OUTSIDE.values())},
    ]
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for uri, content in pages().items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return led(markdown, page.file.src_uri)


# -- the pages ------------------------------------------------------------------------------------


@cache
def pages() -> dict[str, str]:
    """Markdown of every made page by its address below docs/, in the order of the navigation."""
    return _matcher_pages() | _dataset_pages() | _reference_pages() | _outside_pages()


def led(markdown: str, uri: str) -> str:
    """A page's text with its links out of docs/ led to the pages of :data:`OUTSIDE`."""
    up = "../" * uri.count("/")

    def target(match: re.Match[str]) -> str:
        path, hash_, anchor = match[1].partition("#")
        name = path.removeprefix("../") if path.startswith("../") and "/" not in uri else ""
        if name not in OUTSIDE:
            return match[0]
        return f"]({up}{OUTSIDE[name]}{hash_}{anchor})"

    return _LINK.sub(target, markdown)


def _outside_pages() -> dict[str, str]:
    made = {}
    for name, uri in OUTSIDE.items():
        text = (REPO / name).read_text(encoding="utf-8")
        if name == "LICENSE":
            text = f"# Licence\n\n```\n{text}```\n"
        made[uri] = _LINK.sub(_from_root, text)
    return made


def _from_root(match: re.Match[str]) -> str:
    """A link of a file in the repository's root, as a page of the site has it."""
    path, hash_, anchor = match[1].partition("#")
    return f"]({OUTSIDE.get(path, path.removeprefix('docs/'))}{hash_}{anchor})"


def _matcher_pages() -> dict[str, str]:
    cards = available_matchers()
    configs = _configs_by_matcher()
    lines = ["# Matchers", "", "Every registered matcher, from its card.", ""]
    lines += ["| matcher | what it does | paper | year | training |", "|---|---|---|---|---|"]
    made = {"cards/matchers/index.md": ""}
    for name, card in cards.items():
        facts = (f"[{card.title}]({name}.md)", card.description, card.paper, card.year or "–")
        lines.append(_row(*facts, card.training))
        made[f"cards/matchers/{name}.md"] = _matcher_page(name, card, configs.get(name, []))
    made["cards/matchers/index.md"] = "\n".join(lines) + "\n"
    return made


def _matcher_page(name: str, card: MatcherCard, configs: list[tuple[str, str]]) -> str:
    module = matcher_entry_point(name).module
    paper = card.paper
    if card.arxiv:
        paper += f", [arXiv {card.arxiv}](https://arxiv.org/abs/{card.arxiv})"
    rows = [
        ("name", f"`{name}`"),
        ("paper", paper),
        ("year", card.year or "–"),
        ("licence of the original code", card.licence_of_original),
        ("backbone", card.backbone),
        ("input size", card.input_size),
        ("training", card.training),
        ("weights", card.weights_at or "–"),
        ("protocol of its paper", f"[`{card.official_protocol}`](../../protocols.md)"),
        ("in published tables as", card.published_as or "–"),
        ("is told the true class", "yes: tables mark it" if card.oracle_class else "no"),
    ]
    if module.partition(".")[0] in PACKAGES:
        rows.append(("source", f"[`{module}`](../../{_module_uri(module)})"))
    lines = [f"# {card.title}", "", card.description, "", *_facts(rows)]
    if configs:
        lines += ["", "## Configs", "", "| config | row in tables |", "|---|---|"]
        lines += [_row(f"`{config}`", label) for config, label in configs]
        lines += ["", "```", f"nemf predict {configs[0][0]}/spair --data DATA", "```"]
    return "\n".join(lines) + "\n"


def _configs_by_matcher() -> dict[str, list[tuple[str, str]]]:
    """(config, label) of the matcher configs by the matcher they build, read without running."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted((REPO / "experiments" / "configs" / "matchers").glob("[!_]*.py")):
        values = {
            target.id: node.value
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        keywords = {k.arg: k.value for k in values["model"].keywords}  # type: ignore[attr-defined]
        matcher = ast.literal_eval(keywords["type"])
        label = ast.literal_eval(values["label"])
        found.setdefault(matcher, []).append((path.stem, label))
    return found


def _dataset_pages() -> dict[str, str]:
    lines = ["# Datasets", "", "Every dataset that a reader is there for, from its card.", ""]
    lines += ["| dataset | name | layout | splits | official test pairs |", "|---|---|---|---|---|"]
    made = {"cards/datasets/index.md": ""}
    for name, card in available_datasets().items():
        title = card["title"]
        official = card["official_pairs"].get("test")
        lines.append(
            _row(
                f"[{title}]({name}.md)",
                f"`{name}`",
                card["layout"] or "by its boxes",
                ", ".join(card["splits"]),
                f"{official:,}" if official else "–",
            )
        )
        made[f"cards/datasets/{name}.md"] = _dataset_page(name, card)
    lines += ["", "Layouts on disk, own pairs and stand-ins: [datasets](../../datasets.md)."]
    made["cards/datasets/index.md"] = "\n".join(lines) + "\n"
    return made


def _dataset_page(name: str, card: dict[str, Any]) -> str:
    module, _, reader = CATALOGUE[name].partition(":")
    sizes = ", ".join(f"{split} {n:,}" for split, n in card["official_pairs"].items())
    rows = [
        ("name", f"`{name}`"),
        ("folder", ", ".join(f"`{folder}`" for folder in card["folders"]) or "the root itself"),
        ("splits", ", ".join(card["splits"])),
        ("official pairs", sizes or "none stated"),
        ("reader", f"[`{module}.{reader}`](../../{_module_uri(module)}#{module}.{reader})"),
    ]
    lines = [f"# {card['title']}", "", *_facts(rows), ""]
    about = " ".join((dataset_class(name).__doc__ or "").split("\n\n")[0].split())
    lines += [about.replace("``", "`"), "", "## What alpha multiplies", ""]
    if card["layout"] is None:
        lines += ["The box where every pair has some, else the extent of the keypoints.", ""]
    else:
        lines += ["| protocol | in one line |", "|---|---|"]
        for protocol in PROTOCOLS.values():
            text = protocol.describe(card["layout"]).removeprefix(f"{protocol.id}: ")
            lines.append(_row(f"`{protocol.id}`", text))
    lines += ["", "```", f"nemf data verify {name} --data DATA"]
    lines += [f"nemf data stats {name} --data DATA", "```"]
    return "\n".join(lines) + "\n"


def _reference_pages() -> dict[str, str]:
    lines = [
        "# Python reference",
        "",
        "Made from the docstrings. Start with the calls of `nemf`:",
        "",
    ]
    lines += ["```python", "import nemf", *_top_calls(), "```", ""]
    made = {"reference/index.md": "", "reference/command-line.md": _command_line_page()}
    for package, about in PACKAGES.items():
        lines += [f"## {package}", "", about + ".", "", "| module | |", "|---|---|"]
        for module in modules(package):
            uri = _module_uri(module)
            first = _first_line(module)
            lines.append(_row(f"[`{module}`]({uri.removeprefix('reference/')})", first))
            made[uri] = _MODULE.format(module=module)
        lines.append("")
    made["reference/index.md"] = "\n".join(lines)
    return made


def modules(package: str) -> list[str]:
    """The public modules of a package, dotted."""
    names = []
    for path in sorted((REPO / package).rglob("*.py")):
        parts = path.relative_to(REPO).with_suffix("").parts
        if "configs" in parts or any(p.startswith("_") and p != "__init__" for p in parts):
            continue
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return sorted(names)


def _top_calls() -> list[str]:
    import nemf

    return [f"nemf.{name}" for name in nemf.__all__ if not name.startswith("_")]


def _first_line(module: str) -> str:
    path = REPO.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(file.read_bytes())) or ""
    first = " ".join(docstring.split("\n\n")[0].split())
    return re.sub(r":[a-z]+:`~?([^`]+)`", r"`\1`", first).replace("``", "`")


def _module_uri(module: str) -> str:
    path = REPO.joinpath(*module.split("."))
    name = "/".join(module.split("."))
    return f"reference/{name}/index.md" if path.is_dir() else f"reference/{name}.md"


def _reference_nav(made: list[str]) -> list[Any]:
    nav: list[Any] = ["reference/index.md", "reference/command-line.md"]
    for package in PACKAGES:
        below = [page for page in made if page.startswith(f"reference/{package}/")]
        nav.append({package: below})
    return nav


def _command_line_page() -> str:
    lines = ["# Command line", "", "As `--help` prints it."]

    def add(command: click.Command, name: str) -> None:
        context = click.Context(command, info_name=name, terminal_width=96)
        text = command.get_help(context).replace("\x08", "")
        lines.extend(["", f"## {name}", "", "```text", text, "```"])
        if isinstance(command, click.Group):
            for verb in sorted(command.commands):
                add(command.commands[verb], f"{name} {verb}")

    add(main_group, "nemf")
    return "\n".join(lines) + "\n"


def _facts(rows: list[tuple[str, object]]) -> list[str]:
    """A table of facts; the first row is its head."""
    first, *others = (_row(*row) for row in rows)
    return [first, "|---|---|", *others]


def _row(*cells: object) -> str:
    """A row of a Markdown table."""
    texts = (" ".join(str(cell).split()).replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(texts)} |"
