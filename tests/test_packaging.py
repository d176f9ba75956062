"""What an installed nemf is made of: the wheel holds every file it needs and works without us."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGES = ("nemf", "baselines", "experiments", "reports")


def shipped() -> set[str]:
    """Every file of the packages."""
    return {
        path.relative_to(REPO).as_posix()
        for package in PACKAGES
        for path in (REPO / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


def test_the_version_is_in_one_place() -> None:
    import nemf

    number = re.escape(PROJECT["version"])
    assert nemf.__version__ == PROJECT["version"]
    for file in (REPO / "CITATION.cff", *(REPO / p / "__init__.py" for p in PACKAGES)):
        assert not re.search(rf"version\W*{number}\b", file.read_text(encoding="utf-8"))


def test_every_package_says_that_it_is_typed() -> None:
    assert all((REPO / package / "py.typed").is_file() for package in PACKAGES)


def test_extras_are_documented() -> None:
    text = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert set(PROJECT["optional-dependencies"]) >= {"dino", "docs", "dev", "test"}
    assert not [e for e in PROJECT["optional-dependencies"] if f"| `{e}` |" not in text]


def test_the_citation_file_has_what_its_format_requires() -> None:
    content = yaml.safe_load((REPO / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(content)
    assert content["license"] == PROJECT["license"] == "Apache-2.0"
    assert all({"type", "title", "authors"} <= set(r) for r in content["references"])


def test_the_hooks_before_a_commit_lint_as_make_does() -> None:
    hooks = yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    pins = {
        dependency
        for repository in hooks["repos"]
        for hook in repository["hooks"]
        for dependency in hook["additional_dependencies"]
    }
    (pin,) = pins
    asked = next(d for d in PROJECT["optional-dependencies"]["test"] if d.startswith("ruff"))
    low = asked.partition(">=")[2].partition(",")[0]
    assert pin.startswith(f"ruff=={low}.")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of what git would hand out."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in sorted(shipped()) + ["pyproject.toml", "README.md", "LICENSE"]:
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((REPO / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*pip, "--no-index", "--wheel-dir", str(folder), str(folder / "source")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("nemf-*.whl")
    return file


@pytest.mark.long
def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == shipped()
    assert [name for name in names if name.endswith("licenses/LICENSE")]
    for needed in (
        "experiments/configs/matchers/hpf_small.py", "experiments/tables/table1.yaml",
        "experiments/weights/resnet_small.pth", "experiments/regress.yaml",
        "experiments/accepted/accepted.json", "reports/published/nemf_table1.yaml",
        "reports/templates/page.html", "reports/templates/board.js",
        "reports/schemas/result-1.json", "nemf/py.typed",
    ):  # fmt: skip
        assert needed in inside


@pytest.mark.long
def test_it_works_from_the_unpacked_wheel(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    work = tmp_path / "work"
    work.mkdir()
    code = (
        "import sys, experiments; assert experiments.__file__.startswith(sys.argv.pop(1));"
        " from experiments.cli import main; main()"
    )

    def nemf(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, str(site), *arguments],
            cwd=work, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "hpf_small/spair" in nemf("list", "configs")
    assert "NeMF" in nemf("list", "matchers")
    nemf("data", "make-synthetic", "data", "--preset", "tiny")
    file = nemf("predict", "hpf_small/pfwillow", "--data", "data").splitlines()[-1]
    assert "canonical@1" in nemf("score", file)
    nemf("table", "1", "--no-mlflow")
    assert (work / "outputs" / "table1" / "table1.html").is_file()
    nemf("export", "results")
    nemf("leaderboard", "results")
    assert (work / "board" / "index.html").is_file()


def test_data_files_are_found_beside_their_module() -> None:
    """No module reaches out of its package for a file, which an installed one would not have."""
    for package in PACKAGES:
        for path in (REPO / package).rglob("*.py"):
            depth = len(path.relative_to(REPO).parts) - 1
            text = ast.unparse(ast.parse(path.read_bytes()))
            for found in re.findall(r"__file__\)(?:\.resolve\(\))?((?:\.parent)+)", text):
                climbs = found.count(".parent")
                allowed = climbs <= depth or path.name == "provenance.py"  # asks git of the root
                assert allowed, str(path.relative_to(REPO))
