"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from nemf.errors import NemfError

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def examples(*lines: str) -> str:
    """The end of a command's help: examples, one a line."""
    return "\b\n" + "\n".join(["Examples:", *(f"  {line}" for line in lines)])


def completed_by(names: Callable[[], Iterable[str]]) -> Completer:
    """What the shell offers for a value: those of ``names`` that begin as it does."""

    def complete(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in names() if name.startswith(begun)]

    return complete


def matcher_configs() -> list[str]:
    from experiments.configurations import config_names

    return config_names("matchers")


def matcher_dataset_configs() -> list[str]:
    from experiments.configurations import config_names

    return [f"{m}/{d}" for m in config_names("matchers") for d in config_names("datasets")]


def training_configs() -> list[str]:
    from experiments.configurations import config_names

    return config_names("training")


def datasets() -> list[str]:
    from nemf.datasets import CATALOGUE

    return list(CATALOGUE)


def protocols() -> list[str]:
    from nemf.scoring import PROTOCOLS

    return list(PROTOCOLS)


DATA = click.option(
    "--data", "data", type=click.Path(path_type=Path), envvar="NEMF_DATA", show_envvar=True,
    help="Folder that holds the datasets.",
)  # fmt: skip
OUT = click.option(
    "--out", type=click.Path(path_type=Path), default=Path("outputs"), show_default=True,
    help="Where predictions, scores, tables and mlflow.db go.",
)  # fmt: skip
WEIGHTS = click.option(
    "--weights", type=click.Path(path_type=Path), envvar="NEMF_WEIGHTS", show_envvar=True,
    help="Folder of backbones and checkpoints.",
)  # fmt: skip
DOWNLOAD = click.option(
    "--download", is_flag=True, help="Fetch published backbone weights (hash checked) if missing."
)
CONFIG_OPTIONS = click.option(
    "--cfg-options", "options", multiple=True, metavar="KEY=VALUE",
    help="Override a config entry, e.g. model.layers=(4,6). Repeatable.",
)  # fmt: skip
JSON = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
ALPHAS = click.option("--alphas", metavar="A,B,...", help="Thresholds, e.g. 0.05,0.1.")
MLFLOW = click.option(
    "--mlflow/--no-mlflow", "use_mlflow", default=True, show_default=True,
    help="Mirror the results to $MLFLOW_TRACKING_URI, or else to mlflow.db in --out.",
)  # fmt: skip


def need(path: Path | None, what: str) -> Path:
    if path is None:
        raise NemfError(f"give {what} (or set it in the environment); see --help")
    return path


def check_fetching() -> None:
    """NemfError if --from-mlflow has no store to fetch from."""
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        raise NemfError("--from-mlflow needs MLFLOW_TRACKING_URI: the store to fetch from")


def find_weights(weights: Path | None, data: Path | None, download: bool) -> None:
    """Tells the backbones where to look: --weights or $NEMF_WEIGHTS, else a folder ``weights`` in
    or beside the data root."""
    if weights is not None and not weights.is_dir():
        file = f" (it is a file: give its folder, {weights.parent})" if weights.is_file() else ""
        raise NemfError(f"{weights}: no such folder of weights{file}")
    beside = [data / "weights", data.parent / "weights"] if data else []
    candidates = [weights] if weights else beside
    for folder in candidates:
        if folder.is_dir():
            os.environ["NEMF_WEIGHTS"] = str(folder)
            break
    if download:
        os.environ["NEMF_DOWNLOAD"] = "1"


def parse_options(options: tuple[str, ...]) -> dict[str, Any]:
    """``a.b=(1,2)`` pairs; a value that is no Python literal is taken as text."""
    parsed = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or not key:
            raise NemfError(f"--cfg-options {option!r}: expected KEY=VALUE")
        try:
            parsed[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            parsed[key] = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    return parsed
