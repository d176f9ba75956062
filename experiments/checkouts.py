"""Commits of a repository of this suite, and their own command line run in a process of its own.

A commit other than the working tree is checked out into a git worktree below the output folder,
which is removed again. What runs there sees that commit's packages and that commit's entry points,
whatever is installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nemf.errors import NemfError
from nemf.files import write_text

PACKAGES = ("nemf", "baselines", "experiments", "reports")
_IMPORT = (
    "import sys, importlib; "
    "found = [importlib.import_module(name).__file__ for name in sys.argv[1:]]; "
    "importlib.import_module('experiments.cli'); "
    "print(*found, sep='\\n')"
)


class DoesNotRun(NemfError):
    """A commit's own code failed: it does not import, or a command of it ended in an error."""


@dataclass(frozen=True)
class Commit:
    """``sha`` None: the working tree (``tree`` is then the tree its files would make, untracked
    ones included), on the commit ``parent``. ``label``: for people."""

    sha: str | None
    tree: str
    label: str
    subject: str
    parent: str | None = None

    def as_dict(self) -> dict[str, str | None]:
        return {
            "label": self.label,
            "commit": self.sha or self.parent,
            "dirty": self.sha is None,
            "tree": self.tree,
            "subject": self.subject,
        }


class Repository:
    """The git checkout around ``start``; NemfError if there is none."""

    def __init__(self, start: Path) -> None:
        if shutil.which("git") is None:
            raise NemfError("git is not installed: comparing commits needs it")
        try:
            top = _git(start, "rev-parse", "--show-toplevel")
        except NemfError as problem:
            if "dubious ownership" in str(problem):
                raise
            raise NemfError(
                f"{start}: not inside a git checkout; `nemf regress` compares commits of one"
            ) from None
        self.root = Path(top)

    def _has_any_commit(self) -> bool:
        return _git(self.root, "rev-list", "-n", "1", "--all") != ""

    @property
    def shallow(self) -> bool:
        return _git(self.root, "rev-parse", "--is-shallow-repository") == "true"

    def commit(self, name: str) -> Commit:
        """The commit of that name. NemfError saying what to do if there is none here."""
        try:
            sha = _git(self.root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
        except NemfError:
            advice = "give a commit, branch or tag of this repository"
            if self.shallow:
                depth = _git(self.root, "rev-list", "--count", "HEAD")
                advice = (
                    f"this clone is shallow ({depth} commit{'s' * (depth != '1')} deep): run "
                    "`git fetch --unshallow` (in CI: fetch-depth: 0)"
                )
            elif not self._has_any_commit():
                advice = "the repository has no commit yet"
            raise NemfError(f"{name!r} is no commit here; {advice}") from None
        tree, subject = _git(self.root, "show", "-s", "--format=%T%n%s", sha).split("\n", 1)
        label = _git(self.root, "rev-parse", "--short=8", sha)
        return Commit(sha, tree, label, subject)

    def working_tree(self, out: Path) -> Commit:
        """The files as they are now, without what git ignores and without ``out``. Nothing is
        written into the repository: index and objects are temporary."""
        try:
            head = self.commit("HEAD")
        except NemfError:
            raise NemfError(f"{self.root}: has no commit yet; commit first") from None
        with tempfile.TemporaryDirectory() as folder:
            index = Path(folder) / "index"
            own = self.root / _git(self.root, "rev-parse", "--git-path", "index")
            if own.is_file():
                shutil.copy2(own, index)  # with its times, so that unchanged files are not read
            objects = self.root / _git(self.root, "rev-parse", "--git-path", "objects")
            environment = {
                "GIT_INDEX_FILE": str(index),
                "GIT_OBJECT_DIRECTORY": str(Path(folder) / "objects"),
                "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(objects),
            }
            (Path(folder) / "objects").mkdir()
            paths = ["."]
            # git refuses a path that is named and ignored, be it to exclude it
            if out.resolve().is_relative_to(self.root.resolve()) and not self._ignores(out):
                paths.append(f":(exclude){out.resolve().relative_to(self.root.resolve())}")
            try:
                _git(self.root, "add", "--all", "--", *paths, environment=environment)
                tree = _git(self.root, "write-tree", environment=environment)
            except NemfError as problem:
                raise NemfError(
                    f"{self.root}: the working tree cannot be read as a commit ({problem}); "
                    "resolve conflicts and unreadable files, or give --head HEAD"
                ) from None
        if tree == head.tree:
            return head
        label = f"working tree on {head.label}"
        return Commit(None, tree, label, "uncommitted changes", parent=head.sha)

    def _ignores(self, path: Path) -> bool:
        try:
            _git(self.root, "check-ignore", "--quiet", str(path.resolve()))
        except NemfError:
            return False
        return True

    def first_parents(self, range_: str, limit: int | None = None) -> list[Commit]:
        """The commits of a range along first parents, oldest first, at most the last ``limit``."""
        count = ["-n", str(limit)] if limit else []
        text = _git(self.root, "rev-list", "--first-parent", *count, range_)
        return [self.commit(sha) for sha in reversed(text.split())]

    def first_parent(self, commit: Commit) -> str | None:
        """Its SHA, None if there is none here."""
        try:
            return _git(self.root, "rev-parse", "--verify", "--quiet", f"{commit.sha}^")
        except NemfError:
            return None

    def has(self, commit: Commit, path: Path) -> bool:
        """Whether a file is in a commit."""
        try:
            _git(self.root, "cat-file", "-e", f"{commit.sha}:{path.as_posix()}")
        except NemfError:
            return False
        return True

    def is_ancestor(self, old: Commit, new: Commit) -> bool:
        try:
            _git(self.root, "merge-base", "--is-ancestor", str(old.sha), str(new.sha))
        except NemfError:
            return False
        return True

    @contextmanager
    def checkout(self, commit: Commit, scratch: Path, threads: int) -> Iterator[Checkout]:
        """The commit's files, for as long as the context lasts: in place if it is what the working
        tree holds, else in a worktree below ``scratch``.

        DoesNotRun if its packages cannot be imported.
        """
        in_place = commit.sha is None
        if in_place:
            root = self.root
        else:
            root = scratch / "worktrees" / f"{commit.sha[:12]}"
            self._remove(root)
            _git(
                self.root, "-c", "core.hooksPath=/dev/null",
                "worktree", "add", "--detach", "--force", str(root.resolve()), commit.sha,
            )  # fmt: skip
        try:
            checkout = Checkout(commit, root, scratch / "environments" / commit.tree[:16], threads)
            checkout.check_imports()
            yield checkout
        finally:
            if not in_place:
                self._remove(root)

    def _remove(self, root: Path) -> None:
        shutil.rmtree(root, ignore_errors=True)
        _git(self.root, "worktree", "prune")

    def forget_leftovers(self, scratch: Path) -> None:
        """Removes the worktrees that a killed comparison left."""
        if (scratch / "worktrees").exists():
            self._remove(scratch / "worktrees")


class Checkout:
    """A commit's files and the means to run them: ``root`` is the folder, ``own`` one for what is
    kept about this tree (entry points, index of the datasets)."""

    def __init__(self, commit: Commit, root: Path, own: Path, threads: int) -> None:
        self.commit, self.root, self.own, self.threads = commit, root.resolve(), own, threads
        self._write_entry_points()

    def _write_entry_points(self) -> None:
        """Matchers are found through installed entry points; the commit's own may be others."""
        try:
            text = (self.root / "pyproject.toml").read_text(encoding="utf-8")
            project = tomllib.loads(text)["project"]
        except (OSError, ValueError, KeyError):
            return
        lines = []
        for group, points in project.get("entry-points", {}).items():
            lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items()), ""]
        folder = self.own / f"{project['name']}-0.dist-info"
        write_text(folder / "entry_points.txt", "\n".join(lines))
        version = project.get("version", "0")
        write_text(
            folder / "METADATA",
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version}\n",
        )

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
        path = [str(self.own.resolve()), str(self.root), kept.get("PYTHONPATH", "")]
        return kept | {
            "PYTHONPATH": os.pathsep.join(p for p in path if p),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
            # an index that another commit's reader made would hide a change of the reader
            "NEMF_CACHE": str((self.own / "cache").resolve()),
        }

    def command(self, arguments: Sequence[str]) -> list[str]:
        # -P: the current folder is not on the path, only what PYTHONPATH says.
        return [sys.executable, "-P", *arguments]

    def python(self, *arguments: str, text: str = "") -> str:
        """Standard output of that commit's Python, given ``text``. DoesNotRun with the last line of
        its errors."""
        done = subprocess.run(
            self.command(arguments),
            cwd=self.root,
            env=self.environment(),
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode != 0:
            raise DoesNotRun(last_line(done.stderr) or f"ended with status {done.returncode}")
        return done.stdout

    def nemf(self, *arguments: str) -> str:
        """Standard output of ``nemf <arguments>`` of that commit."""
        try:
            return self.python("-m", "experiments.cli", *arguments)
        except DoesNotRun as problem:
            text = str(problem).removeprefix("nemf: ").removesuffix(" (--debug shows where)")
            raise DoesNotRun(text) from None

    def check_imports(self) -> None:
        try:
            found = self.python("-c", _IMPORT, *PACKAGES).split("\n")
        except DoesNotRun as problem:
            raise DoesNotRun(f"does not import ({problem})") from None
        for name, file in zip(PACKAGES, found, strict=False):
            if not Path(file).resolve().is_relative_to(self.root):
                raise DoesNotRun(f"has no package {name}")


def last_line(text: str) -> str:
    """The last line that is not blank: of a traceback, the exception."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _git(root: Path, *arguments: str, environment: dict[str, str] | None = None) -> str:
    """Standard output of git; NemfError with its complaint."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    done = subprocess.run(
        ["git", "-C", str(root), *arguments],
        env=kept | (environment or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if not line.startswith("hint:")]
        complaint = last_line("\n".join(lines)) or f"status {done.returncode}"
        raise NemfError(f"git {arguments[0]}: {complaint}")
    return done.stdout.strip()
