"""The layout's promises: imports point one way, and light entry points stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.provenance import imported_modules

REPO = Path(__file__).resolve().parent.parent
PACKAGES = ("nemf", "baselines", "experiments", "reports")
ALLOWED = {
    "nemf": {"nemf"},
    "baselines": {"baselines", "nemf"},
    "reports": {"reports", "nemf"},
    "experiments": set(PACKAGES),
}
HEAVY = {"torch", "mmengine", "torchvision"}
SOURCES = sorted(
    path
    for package in PACKAGES
    for path in (REPO / package).rglob("*.py")
    if "configs" not in path.parts
)


def module_name(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return imported_modules(tree, module_name(path), is_package=path.name == "__init__.py")


def test_sources_are_found() -> None:
    assert len(SOURCES) > 20


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(REPO)))
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(REPO).parts[0]
    wrong = {
        name
        for name in imports_of(path)
        if name.partition(".")[0] in PACKAGES and name.partition(".")[0] not in ALLOWED[package]
    }
    assert not wrong, f"{path.relative_to(REPO)} imports {wrong}"


@pytest.mark.parametrize(
    "path",
    [p for p in SOURCES if p.relative_to(REPO).parts[0] != "experiments"],
    ids=lambda p: str(p.relative_to(REPO)),
)
def test_mmengine_is_used_in_experiments_and_the_interface_only(path: Path) -> None:
    uses = any(name.partition(".")[0] == "mmengine" for name in imports_of(path))
    seams = {"nemf/registry.py", "nemf/matcher.py"}
    assert not uses or str(path.relative_to(REPO)) in seams


def test_no_module_is_called_utils() -> None:
    assert not [p for p in SOURCES if p.stem in {"utils", "util", "helpers", "common", "misc"}]


@pytest.mark.parametrize(
    "statement",
    [
        "import nemf; nemf.available_matchers(), nemf.available_datasets()",
        "import nemf; nemf.available_protocols()",
        "import nemf; assert nemf.pck([1.0], [10.0], 0.1) == 1.0",
        "import reports.records, reports.tables, reports.statistics",
        "import nemf.match_pictures, reports.tracking",
        "import reports.field_pictures, reports.pck_figures, reports.training_figure",
        "import reports.transfer_figure",
        "import experiments.cli, nemf.predictions",
    ],
)
def test_light_imports_stay_light(statement: str) -> None:
    code = f"{statement}\nimport sys; print(sorted({HEAVY | {'mlflow'}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_walk_sees_relative_and_late_imports() -> None:
    tree = ast.parse("from . import x\ndef f():\n    from ..b import y\n    import a.c")
    found = imported_modules(tree, "p.q.r")
    assert {"p.q", "p.q.x", "p.b", "p.b.y", "a.c"} <= set(found)
