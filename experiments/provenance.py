"""Where a number comes from: code commit, sources on the prediction path, library versions."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import platform
import subprocess
import sys
import sysconfig
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "numpy", "pillow", "mmengine")
_ROOTS = ("nemf", "baselines", "experiments")
_NOT_ON_THE_PATH = ("reports",)  # what scores and draws makes no prediction stale
_distributions = cache(packages_distributions)  # reads the records of all that is installed


@cache
def code_state() -> dict[str, Any]:
    """``commit`` of the source tree and whether it is ``dirty``; both None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    commit = _git(root, "rev-parse", "HEAD")
    top = _git(root, "rev-parse", "--show-toplevel")
    if commit is None or top is None or Path(top).resolve() != root:
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(_git(root, "status", "--porcelain"))}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that can change a prediction."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


@cache
def code_fingerprint(*modules: str) -> str:
    """Hex SHA-256 over the modules and all that they import, directly or not: of this project, of
    their own top-level packages, and of every other package that lies in a folder of its user's
    (research code beside a matcher). Of an installed package that such code imports, the version.

    Sources are compared as syntax trees without docstrings: comments and layout do not count. What
    is imported under a computed name is not seen.
    """
    roots = {*_ROOTS, *(name.partition(".")[0] for name in modules)}
    seen: dict[str, str] = {}
    queue = [(name, name) for name in modules]
    while queue:
        name, importer = queue.pop()
        root = name.partition(".")[0]
        if name in seen:
            continue
        if root not in roots and not _is_the_users(root):
            if importer.partition(".")[0] not in _ROOTS:
                seen |= _installed(root)
            continue
        path = _source(name)
        if path is None:
            continue
        if path.suffix != ".py":
            seen[name] = hashlib.sha256(path.read_bytes()).hexdigest()
            continue
        tree = ast.parse(path.read_bytes())
        seen[name] = hashlib.sha256(ast.dump(_without_docstrings(tree)).encode()).hexdigest()
        imported = imported_modules(tree, name, is_package=path.name == "__init__.py")
        queue.extend((other, name) for other in [*imported, name.rpartition(".")[0]])
    text = "\n".join(f"{name} {digest}" for name, digest in sorted(seen.items()))
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _is_the_users(root: str) -> bool:
    """Whether a top-level package is neither Python's, nor installed, nor of this project."""
    if not root or root in sys.stdlib_module_names or root in (*_ROOTS, *_NOT_ON_THE_PATH):
        return False
    try:
        spec = importlib.util.find_spec(root)
    except (ModuleNotFoundError, ValueError):
        return False
    places = [spec.origin, *(spec.submodule_search_locations or [])] if spec else []
    installed = {
        sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")
    }
    return any(
        place is not None
        and Path(place).exists()  # neither "built-in" nor "frozen"
        and not any(Path(place).is_relative_to(folder) for folder in installed)
        and not {"site-packages", "dist-packages"} & {*Path(place).parts}
        for place in places
    )


@cache
def _installed(root: str) -> dict[str, str]:
    """Version of each distribution that a top-level package is from; of Python's own, nothing."""
    if not root or root in sys.stdlib_module_names or root in _NOT_ON_THE_PATH:
        return {}
    return {f"{name}==": version(name) for name in _distributions().get(root, [])}


def imported_modules(tree: ast.AST, module: str, *, is_package: bool = False) -> list[str]:
    """Names that a module's source imports, wherever it does; ``from a import b`` gives both
    ``a`` and ``a.b``, since b may be a module."""
    package = module if is_package else module.rpartition(".")[0]
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parts, *([base] if base else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return names


def _source(module: str) -> Path | None:
    if not module:
        return None
    try:
        spec = importlib.util.find_spec(module)
    except (ModuleNotFoundError, AttributeError, ValueError):
        return None
    origin = spec.origin if spec else None
    return Path(origin) if origin and origin.endswith((".py", ".so", ".pyd")) else None


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
    return tree
