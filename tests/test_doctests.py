"""The examples in docstrings and documents do what they show."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
PACKAGES = ("nemf", "baselines", "experiments", "reports")
MODULES = [
    path
    for package in PACKAGES
    for path in sorted((REPO / package).rglob("*.py"))
    if "configs" not in path.parts and ">>> " in path.read_text(encoding="utf-8")
]
DOCUMENTS = [
    path
    for path in (REPO / "README.md", *sorted((REPO / "docs").glob("*.md")))
    if ">>> " in path.read_text(encoding="utf-8")
]


def examples_in_docstrings(path: Path) -> int:
    """Prompts in docstrings, counted without importing the module."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, kinds)]
    return sum((ast.get_docstring(node) or "").count(">>> ") for node in nodes)


def test_there_are_examples() -> None:
    assert sum(map(examples_in_docstrings, MODULES)) >= 2
    assert len(DOCUMENTS) >= 2


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(REPO)))
def test_of_a_module(path: Path) -> None:
    name = ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
    expected = examples_in_docstrings(path)
    module = importlib.import_module(name)
    globs = vars(module) | {"np": importlib.import_module("numpy")}
    failed, tried = doctest.testmod(module, extraglobs=globs)
    assert failed == 0
    assert tried == expected  # none is hidden from the module's walk


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_of_a_document(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"```pycon\n(.*?)```", text, re.DOTALL)
    assert sum(block.count(">>> ") for block in blocks) == text.count(">>> "), "not in ```pycon"
    source = "\n".join(blocks)
    parsed = doctest.DocTestParser().get_doctest(source, {}, path.name, str(path), 0)
    runner = doctest.DocTestRunner()
    runner.run(parsed)
    assert runner.failures == 0
    assert runner.tries == text.count(">>> ")
