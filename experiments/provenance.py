"""Where a number comes from: code commit, sources on the prediction path, library versions."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "numpy", "pillow", "mmengine")
_ROOTS = ("nemf", "baselines", "experiments")


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
    """Hex SHA-256 over the modules and everything of this project (and of their own top-level
    packages) that they import, directly or not.

    Sources are compared as syntax trees without docstrings: comments and layout do not count.
    """
    roots = {*_ROOTS, *(name.partition(".")[0] for name in modules)}
    seen: dict[str, str] = {}
    queue = list(modules)
    while queue:
        name = queue.pop()
        if name in seen or name.partition(".")[0] not in roots:
            continue
        path = _source(name)
        if path is None:
            continue
        tree = ast.parse(path.read_bytes())
        seen[name] = hashlib.sha256(ast.dump(_without_docstrings(tree)).encode()).hexdigest()
        queue.extend(imported_modules(tree, name, is_package=path.name == "__init__.py"))
        queue.append(name.rpartition(".")[0])
    text = "\n".join(f"{name} {digest}" for name, digest in sorted(seen.items()))
    return hashlib.sha256(text.encode()).hexdigest()


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
    return Path(origin) if origin and origin.endswith(".py") else None


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
