"""Every command of README.md, CONTRIBUTING.md and docs/ is run: here, page by page, in a miniature
world, or by another test that is named here. What can run in no test is listed with its reason.

A command is a line of a block in a shell's or no language, a block in Python, or code in a
sentence that begins with a program (`make ui`). The bare name of a verb in a sentence (`nemf
predict`) is a mention; it is enough that some command with that beginning is run.
"""

from __future__ import annotations

import ast
import importlib.util
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import click
import pytest
import torch

from experiments.cli import main_group
from nemf.backbones import build_backbone
from nemf.datasets.synthetic import make_synthetic
from tests.conftest import save_image

log = logging.getLogger(__name__)
REPO = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "CONTRIBUTING.md"]
PAGES += sorted(p.relative_to(REPO).as_posix() for p in (REPO / "docs").glob("*.md"))
# What begins a command in a sentence, where other code stands as well.
PROGRAMS = {
    *("apt-get", "createdb", "git", "initdb", "make", "mlflow", "nemf", "pip", "postgres"),
    *("pre-commit", "pytest", "python", "sbatch", "srun", "sudo", "torchrun"),
}
SHELLS = ("", "sh", "bash", "shell", "console")
DATA_LANGUAGES = ("pycon", "json", "toml", "yaml", "text")  # `pycon`: tests/test_doctests.py


# -- what the documents say -----------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    page: str
    text: str
    python: bool = False
    mention: bool = False

    @property
    def key(self) -> str:
        """Its text; a page's Python together is "python"."""
        return "python" if self.python else self.text

    def __str__(self) -> str:
        return f"{self.page}: {self.text.splitlines()[0]}"


def commands_of(page: str, text: str) -> list[Command]:
    """In the order of the page, each once. AssertionError for a block of unknown language."""
    found = []
    for fence, code in re.findall(
        r"^ *```(.*?)^ *```|(?<!`)`([^`]+)`(?!`)", text, re.DOTALL | re.MULTILINE
    ):
        if code:
            code = " ".join(code.split())
            first, _, rest = code.partition(" ")
            if first.rpartition("/")[2] in PROGRAMS and rest:
                found.append(Command(page, code, mention=is_mention(code)))
            continue
        language, _, block = fence.partition("\n")
        assert language in (*SHELLS, *DATA_LANGUAGES, "python"), f"{page}: a block of {language!r}"
        if language == "python":
            found.append(Command(page, block, python=True))
        elif language in SHELLS:
            for line in block.replace("\\\n", " ").splitlines():
                line = " ".join(re.sub(r"(^|\s)# .*", "", line).split())
                if line:
                    found.append(Command(page, line))
    return list(dict.fromkeys(found))


def is_mention(code: str) -> bool:
    """Only the name of one of our verbs: in a sentence it refers to commands, and is none."""
    program, *words = code.split()
    at: click.Command = main_group
    while isinstance(at, click.Group) and words and words[0] in at.commands:
        at = at.commands[words.pop(0)]
    return program == "nemf" and not words


DOCUMENTED = [c for p in PAGES for c in commands_of(p, (REPO / p).read_text(encoding="utf-8"))]
COMMANDS = [c for c in DOCUMENTED if not c.mention]


# -- where they are run, if not here --------------------------------------------------------------

# Page (any, if empty), pattern of the whole command, file and name of the test.
ELSEWHERE = [
    ("docs/training.md", r"python",
     "test_configurations.py", "test_the_documented_recipe_starts_from_another"),
    ("docs/adding-a-matcher.md", r"pip .*",
     "test_packaging.py", "test_it_works_from_the_unpacked_wheel"),
    ("docs/adding-a-matcher.md", r"pytest .*",
     "test_adding_a_matcher.py", "test_the_example_keeps_the_contract"),
    ("docs/adding-a-matcher.md", r".*",
     "test_adding_a_matcher.py", "test_from_file_and_config_to_the_table"),
    ("docs/adding-a-dataset.md", r".*",
     "test_adding_things.py", "test_a_dataset"),
    ("docs/adding-a-protocol.md", r".*",
     "test_adding_things.py", "test_a_protocol"),
    ("docs/own-data.md", r"nemf annotate .*",
     "test_annotation.py", "test_a_killed_server_loses_nothing"),
    ("docs/own-data.md", r"nemf .*",
     "test_own_data.py", "test_the_tutorial_runs"),
    ("docs/worked-examples.md", r"python .*",
     "test_worked_examples.py", "test_the_tables_are_made_again"),
    ("docs/cluster.md", r"(mlflow server|initdb|postgres|createdb) .*",
     "test_cluster.py", "test_many_hosts_and_a_server_that_vanishes"),
    ("", r"git fetch --unshallow",
     "test_regression_commands.py", "test_a_shallow_clone_says_what_to_do"),
    ("", r"make reproduce-table1",
     "test_jobs.py", "test_the_job_without_data_is_synthetic_and_says_so"),
    ("", r"make reproduce-table2",
     "test_jobs.py", "test_table_2_is_made_from_the_predictions_of_table_1"),
    ("", r"pip install \.",
     "test_packaging.py", "test_it_works_from_the_unpacked_wheel"),
]  # fmt: skip

# Pattern of the whole command, why no test runs it.
EXCEPTIONS = [
    (r"srun .*", "needs SLURM; tried by hand (docs/cluster.md), its variables are tested"),
    (r"(sudo|apt-get) .*", "changes the system"),
    (r"pip install mlflow psycopg2-binary", "asks a package index"),
    (r"\.venv/bin/pip install .*", "asks a package index; the extras are tested to exist"),
    (r"\.venv/bin/pre-commit install", "is not among what the tests need; its hooks are tested"),
]


# -- how they are run here ------------------------------------------------------------------------

# Text in a command, what stands for it. The world has folders DATA and WEIGHTS: those words stay.
PLACEHOLDERS = [
    (r" \[--[^]]*\]", ""),  # said to be optional
    (r"/path/to/datasets|(?<=DATA=)\.\.\.", "DATA"),
    (r"/path/to/backbones|(?<=WEIGHTS=)\.\.\.", "WEIGHTS"),
    (r"/shared/", "shared/"),
    (r"http://tracking:5000", "http://127.0.0.1:$MLFLOW_PORT"),
    (r"outputs/\S*(\.\.\.|KEY)\S*/predictions\.parquet|(?<=score )FILE", "$(newest)"),
    (r"\bDATASET\b(?!=)", "spair"),
    (r"\bROOT\b", "rendered"),
    (r"(?<=figure )NAME\.\.\.", "classes curves"),
    (r"(nemf|cats)_resnet101", r"\1_tiny"),  # the authors' weights are not at hand
    (r"--nproc-per-node 4", "--nproc-per-node 2"),
]


@dataclass(frozen=True)
class Run:
    """How a documented command is run, and what it must do. ``instead``: a shorter command, {} is
    the documented one; ``before``: run just before it; ``writes``: patterns of files below the
    page's folder; ``prints``: a regular expression; ``until``: it goes on until it is stopped, this
    address answers then, or this was printed; ``once``: it is run on that page."""

    prints: str = ""
    writes: tuple[str, ...] = ()
    instead: str = "{}"
    before: str = ""
    until: str = ""
    once: str = ""


@dataclass(frozen=True)
class Setting:
    """What a page presupposes, and its commands."""

    runs: dict[str, Run]
    first: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    server: bool = False  # an MLflow server is there


def options(**entries: object) -> str:
    """--cfg-options; __ is a dot."""
    given = (f"{key.replace('__', '.')}={value}" for key, value in entries.items())
    return " ".join(f"--cfg-options {shlex.quote(text)}" for text in given)


BRIEFLY = "{} " + options(
    train_dataloader__dataset__pairs_per_epoch=2, train_dataloader__batch_size=2,
    train_dataloader__num_workers=0, train_cfg__max_epochs=1, train_cfg__val_interval=1,
    val_cfg__pairs=2,
)  # fmt: skip
SMALLER = f"{BRIEFLY} " + options(
    model__matcher__backbone="resnet18", model__matcher__layers="(4,6)"
)
FEW = '{} --matchers "copy nearest_small"'
SIMULATE = "python -c 'from tests.benchmarks import {} as b; {}; print(*b.table())'"
CELL = "nemf score $(nemf predict {} --data DATA)"
PREDICTED = ("outputs/predictions/*/*/*/*/predictions.parquet",)
TABLE1 = tuple(f"outputs/table1/table1.{kind}" for kind in ("md", "tex", "csv", "html"))
COMMIT = "git -c user.name=A -c user.email=a@b commit -q"
HISTORY = (  # a policy of one cell, and commits enough
    (
        "sed -i -e 's/matchers: .*/matchers: [copy]/' -e 's/  datasets: .*/  datasets: [pfwillow]/'"
        " -e 's/data: {synthetic.*/data: {folder: DATA}/' -e 's/predictions: .*/predictions: []/'"
        " experiments/regress.yaml"
    ),
    "git init -q -b main && git add -A",
    f"{COMMIT} -m first && git tag v1.0",
    f"for k in $(seq 10); do {COMMIT} --allow-empty -m $k; done",
)
WORSE = (  # half a pixel off, in a further commit
    "sed -i 's/query, reference))/query, reference) + 0.5)/' baselines/copy.py"
    f" && ! git diff --quiet baselines/copy.py && {COMMIT} -am worse"
)
SERVER = "mlflow server --backend-store-uri sqlite:///server.db --artifacts-destination ./artifacts"
ANSWERS = "http://127.0.0.1:$MLFLOW_PORT/health"
ANSWER = (  # every point stays where it is
    "python -c \"import pandas as pd; q = pd.read_csv('queries.csv');"
    " q['x'], q['y'] = q.query_x, q.query_y; q.to_csv('mine.csv', index=False)\""
)

SETTINGS = {
    "README.md": Setting(
        {
            "make reproduce-table1 DATA=/path/to/datasets WEIGHTS=/path/to/backbones": Run(
                writes=TABLE1
            ),
            "make reproduce-table1 DATA=...": Run(writes=TABLE1),
            "make setup": Run(once="docs/tutorial.md"),
            "make ui": Run(once="docs/mlflow.md"),
            "make test": Run(once="CONTRIBUTING.md"),
            "make test-long": Run(once="CONTRIBUTING.md"),
            "make docs": Run(once="CONTRIBUTING.md"),
            "nemf list": Run("canonical@1"),
            "nemf data verify spair --data DATA": Run("SPair-71k"),
            "nemf predict hpf_resnet18/pfwillow --data DATA": Run(writes=PREDICTED),
            "nemf score outputs/predictions/.../predictions.parquet --protocol canonical@1"
            " --alphas 0.05,0.1": Run(r"all \(4\)", ("outputs/predictions/*/*/*/*/scores/*.json",)),
            "nemf compare nemf_resnet101 cats_resnet101 --dataset spair": Run(
                writes=("outputs/compare/*/comparison.md",),
                before="nemf predict nemf_tiny/spair --data DATA;"
                " nemf predict cats_tiny/spair --data DATA",
            ),
            "nemf train nemf_spair --data DATA": Run(
                writes=("outputs/training/nemf_spair/nemf_spair.pth",),
                instead=f"{SMALLER} {options(train_dataloader__dataset__side_px=128)}",
            ),
            "nemf figure all --data DATA": Run(writes=("outputs/figures/*/classes.pdf",)),
            "nemf export results; nemf leaderboard results": Run(writes=("results/*.json",)),
            "nemf regress --base main~10": Run(once="docs/regressions.md"),
            "nemf match cat1.jpg cat2.jpg": Run("->", ("outputs/match/cat1-cat2.png",)),
            "nemf annotate photos/": Run(until="annotate at "),
            "nemf published NeMF --dataset pfwillow": Run("NeMF"),
            "nemf bench": Run("pairs", instead="{} --quick"),
            "python": Run(instead="{}print(matches.points.shape)", prints=r"\(2, 2\)|\[2, 2\]"),
        },
        environment={"MATCHERS": "copy nearest_resnet18"},
    ),
    "CONTRIBUTING.md": Setting(
        {
            "make setup": Run(once="docs/tutorial.md"),
            "make lint": Run("All checks passed"),
            "make test": Run("1 passed"),
            "make test-long": Run("1 passed"),
            "make docs": Run(writes=("outputs/site/index.html",)),
            "make regress BASE=main": Run("same", ("outputs/regress/*/regress.md",)),
        },
        first=HISTORY,
        environment={
            "JOBS": "0",
            "PYTEST_ADDOPTS": "-p no:cacheprovider -k 'anchors_by_hand or second_time_does'",
        },
    ),
    "docs/benchmarks.md": Setting(
        {
            "make bench": Run(  # what it consists of is run on its own, smaller
                r"nemf bench\n\S*python -m tests\.benchmarks\.nemf_search 375 500",
                instead="make --dry-run bench",
            ),
            "nemf bench matchers": Run(
                before=f"{CELL.format('copy/spair')}; {CELL.format('nearest_small/spair')}",
                writes=("outputs/costs/*",),
                instead='{} --matchers "copy nearest_small" --size 64x64',
            ),
            "python -m tests.benchmarks.nemf_search 375 500": Run(
                instead="python -m tests.benchmarks.nemf_search 24 32"
            ),
            "nemf published SCOT --dataset spair": Run("35.6"),
        }
    ),
    "docs/cli.md": Setting(
        {
            "nemf --help": Run("Usage"),
            "nemf -q": Run("", instead="{} list"),
            "nemf -v": Run("", instead="{} list"),
            "nemf --debug": Run("", instead="{} list"),
            'eval "$(nemf completion bash)"': Run(),
            "nemf completion zsh > ~/.zfunc/_nemf": Run(writes=("../home/.zfunc/_nemf",)),
            "nemf completion fish > ~/.config/fish/completions/nemf.fish": Run(
                writes=("../home/.config/fish/completions/nemf.fish",)
            ),
            "python -X importtime -m experiments.cli list": Run("nemf.cards"),
        },
        first=("mkdir -p ~/.zfunc ~/.config/fish/completions",),
    ),
    "docs/cluster.md": Setting(
        {
            "torchrun --nproc-per-node 4 $(which nemf) predict nemf_resnet101/spair --data DATA"
            " --out outputs": Run(writes=PREDICTED),
            "nemf predict --table 1 --data DATA --out /shared/outputs --train": Run(
                writes=("shared/outputs/predictions/*/*/*/*/predictions.parquet",), instead=FEW
            ),
            "export MLFLOW_TRACKING_URI=http://tracking:5000": Run(),
            "nemf table 1 --out /shared/outputs": Run(
                writes=("shared/outputs/table1/table1.md",),
                before="nemf score --table 1 --out shared/outputs",
            ),
            "nemf table 1 --from-mlflow --out elsewhere": Run(
                writes=("elsewhere/table1/table1.md",)
            ),
        },
        server=True,
    ),
    "docs/comparisons.md": Setting(
        {
            "nemf compare hpf_resnet18 nearest_resnet18 --dataset pfwillow --data DATA": Run(
                writes=("outputs/compare/*/comparison.json", "outputs/compare/*/pictures/*.png")
            ),
            'nemf compare "HPF, ResNet-18 (4,6)" mine.parquet other.parquet --all-pairs': Run(
                writes=("outputs/compare/*/per_pair.csv",)
            ),
            'make compare MATCHERS="nemf cats" DATASET=spair DATA=...': Run(
                writes=("outputs/compare/spair*/curves.png",)
            ),
        },
        first=(
            *(CELL.format(f"{m}/pfwillow") for m in ("hpf_resnet18", "nearest_resnet18", "copy")),
            "mv outputs/predictions/copy*/*/*/*/predictions.parquet mine.parquet",
            "cp outputs/predictions/nearest*/*/*/*/predictions.parquet other.parquet",
            *(CELL.format(f"{m}/spair") for m in ("nemf_tiny", "cats_tiny")),
        ),
    ),
    "docs/datasets.md": Setting(
        {
            "nemf predict nearest_resnet18/folder --data my_pairs": Run(writes=PREDICTED),
            "nemf data verify DATASET": Run("SPair-71k"),
            "nemf data stats DATASET": Run("pairs"),
            "nemf data make-synthetic ROOT": Run(
                writes=tuple(
                    f"rendered/{name}/SYNTHETIC.json"
                    for name in ("SPair-71k", "PF-PASCAL", "PF-WILLOW")
                )
            ),
            "make backbone": Run(
                r"cp outputs/training/resnet_small/resnet_small\.pth",
                ("outputs/training/resnet_small/resnet_small.pth",),
                instead="make --dry-run backbone && nemf train"
                " experiments/configs/training/resnet_small.py --out outputs "
                + options(
                    train_cfg__max_epochs=1,
                    train_dataloader__dataset__per_class=2,
                    val_dataloader__dataset__per_class=1,
                ),
            ),
        },
        environment={"NEMF_DATA": "DATA"},
    ),
    "docs/figures.md": Setting(
        {
            "make figures": Run(writes=("outputs/figures/*/classes.png",)),
            "nemf figure all --data DATA": Run(writes=("outputs/figures/*/transfer.json",)),
            "nemf figure NAME...": Run(writes=("outputs/figures/*/curves.pdf",)),
            "nemf train nemf_small": Run(
                writes=("outputs/training/nemf_small/nemf_small.pth",), instead=BRIEFLY
            ),
        },
        first=(CELL.format("copy/spair"),),
        environment={"NEMF_DATA": "DATA"},
    ),
    "docs/leaderboard.md": Setting(
        {
            "nemf export results": Run(writes=("results/*.json",)),
            "nemf export results --matcher hpf_resnet18 --protocol canonical@1"
            ' --contact "A. Author"': Run(writes=("results/*.json",)),
            "nemf leaderboard results --out board": Run(writes=("board/index.html",)),
        },
        first=(CELL.format("hpf_resnet18/pfwillow"),),
    ),
    "docs/long-tests.md": Setting(
        {
            "make test-long": Run(once="CONTRIBUTING.md"),
            "make test": Run(once="CONTRIBUTING.md"),
        }
    ),
    "docs/mlflow.md": Setting(
        {
            "make ui": Run(until=ANSWERS),
            "export MLFLOW_TRACKING_URI=http://tracking:5000": Run(),
            "nemf table 1 --out outputs": Run(writes=TABLE1),
            "mlflow server --backend-store-uri sqlite:///server.db"
            " --artifacts-destination ./artifacts": Run(writes=("server.db", "artifacts")),
            "nemf table 1 --from-mlflow --out elsewhere": Run(
                writes=("elsewhere/table1/table1.md",)
            ),
        },
        first=(FEW.format("nemf predict --table 1 --data DATA"), "nemf score --table 1"),
        server=True,
    ),
    "docs/official-files.md": Setting(
        {
            "nemf data verify spair --data DATA": Run("SPair-71k"),
            "nemf data stats spair --data DATA": Run("fingerprint"),
            "nemf list matchers --json": Run('"weights_at"'),
        }
    ),
    "docs/own-data.md": Setting(
        {"python": Run(instead='{}matches.plot().savefig("cats.png")', writes=("cats.png",))}
    ),
    "docs/predictions.md": Setting(
        {
            "nemf data queries pfwillow queries.csv --data DATA [--protocol nemf-paper@1]": Run(
                writes=("queries.csv",)
            ),
            'nemf score mine.csv --dataset pfwillow --name "My method" --data DATA'
            " --protocol canonical@1": Run("My method", before=ANSWER),
            "nemf table 1": Run("My method", TABLE1),
        }
    ),
    "docs/protocols.md": Setting(
        {
            "nemf score FILE --protocol canonical@1 --protocol hpf-paper@1": Run(
                r"canonical@1[\s\S]*hpf-paper@1"
            ),
            "nemf list protocols --json": Run('"nemf-paper@1"'),
        },
        first=(CELL.format("copy/spair"),),
    ),
    "docs/regressions.md": Setting(
        {
            "nemf regress": Run(
                "same", before='rm -r experiments/accepted; nemf regress --accept "first"'
            ),
            "nemf regress --base main~10": Run("same", ("outputs/regress/*/regress.json",)),
            "nemf regress --base v1.0 --head main": Run("same"),
            'nemf regress --accept "why"': Run(writes=("experiments/accepted/accepted.json",)),
            "nemf regress --data DATA": Run("same"),
            "nemf regress --history 30": Run(
                writes=("outputs/regress/*/history.png",), instead="nemf regress --history 2"
            ),
            "nemf regress --history 30 --from-mlflow": Run(
                before="export MLFLOW_TRACKING_URI=sqlite:///$PWD/outputs/mlflow.db",
                writes=("outputs/regress/*/history.md",),
            ),
            "nemf regress --bisect v1.0..main": Run(
                "first bad|worse", ("outputs/regress/bisect-*/bisect.md",), before=WORSE
            ),
            "python -m tests.benchmarks.regression_power": Run(
                "1,000 / 120", instead=SIMULATE.format("regression_power", "b.REPETITIONS = 2")
            ),
        },
        first=HISTORY,
    ),
    "docs/reliability.md": Setting(
        {
            "make test-long": Run(once="CONTRIBUTING.md"),
            "python -m tests.benchmarks.load [--times 10]": Run("table", instead="{} --pairs 300"),
            "python -m tests.benchmarks.cache_order": Run("optimum", instead="{} --pairs 300"),
        }
    ),
    "docs/statistics.md": Setting(
        {
            "python -m tests.benchmarks.coverage": Run(
                "4 hubs x 10",
                instead=SIMULATE.format("coverage", "b.REPETITIONS, b.BOOTSTRAPPED = 4, 2"),
            ),
        }
    ),
    "docs/tables.md": Setting(
        {
            "nemf predict --table 2": Run(writes=PREDICTED, instead=FEW),
            "nemf score --table 2": Run(writes=("outputs/predictions/*/*/*/*/scores/*.json",)),
            "nemf table 2": Run(writes=("outputs/table2/table2.html",)),
            "nemf table my_table.yaml": Run(
                writes=TABLE1, before="cp experiments/tables/table1.yaml my_table.yaml"
            ),
            "nemf table 2-animalpose": Run(
                writes=("outputs/table2-animalpose/table2-animalpose.md",),
                before="cp -r DATA/SPair-71k DATA/AnimalPose; " + CELL.format("copy/animalpose"),
            ),
        },
        environment={"NEMF_DATA": "DATA"},
    ),
    "docs/training.md": Setting(
        {
            "nemf train cats_spair --data DATA --weights WEIGHTS --out outputs": Run(
                writes=tuple(
                    f"outputs/training/cats_spair/cats_spair.{kind}"
                    for kind in ("pth", "json", "png")
                ),
                instead=SMALLER,
            ),
            "nemf predict nemf_small/spair": Run(
                writes=PREDICTED, before=BRIEFLY.format("nemf train nemf_small")
            ),
            "python -m tests.benchmarks.nemf_ablation animalpose DATA outputs/training"
            "/nemf_animalpose/nemf_animalpose.pth resnet18 4,6 100": Run(
                "encoder alone",
                instead="python -m tests.benchmarks.nemf_ablation spair DATA"
                " outputs/training/nemf_small/nemf_small.pth resnet_small 4,6 2",
            ),
        },
        environment={"NEMF_DATA": "DATA"},
    ),
    "docs/tutorial.md": Setting(
        {
            "make setup": Run(),
            "source .venv/bin/activate": Run(),
            "nemf list matchers": Run("HPF"),
            "nemf data make-synthetic synthetic": Run(
                writes=("synthetic/SPair-71k/SYNTHETIC.json",)
            ),
            "nemf data stats spair --data synthetic": Run("fingerprint"),
            "nemf predict hpf_small/spair --data synthetic": Run(
                writes=("outputs/predictions/HPF-small-CNN-4-6/spair-test-synthetic/src2trg-own/*",)
            ),
            "nemf score outputs/predictions/HPF-small-CNN-4-6/spair-test-synthetic/src2trg-own/KEY"
            "/predictions.parquet": Run("canonical@1"),
            "nemf predict --table 1 --data synthetic --matchers"
            ' "copy nearest_small hpf_small"': Run(writes=PREDICTED),
            "nemf score --table 1": Run(),
            "nemf table 1 --data synthetic": Run("SYNTHETIC", TABLE1),
            "nemf compare hpf_small nearest_small --dataset spair": Run(
                writes=("outputs/compare/*/comparison.md",)
            ),
            'nemf match cat1.jpg cat2.jpg --points "120,80 64,33" --matcher nearest_small'
            " --out cats.png": Run("->", ("cats.png",)),
            'nemf match cat1.jpg cat2.jpg --points "120,80 64,33" --matcher hpf_resnet18'
            " --download": Run("->", ("outputs/match/cat1-cat2.png",)),
            "python": Run(),
            "nemf data verify folder --data my_photos": Run("own pairs"),
            "nemf predict hpf_resnet18/folder --data my_photos --download": Run(
                writes=("outputs/predictions/HPF-ResNet-18-4-6/folder*/*/*/predictions.parquet",)
            ),
            "make reproduce-table1 DATA=... WEIGHTS=...": Run(
                writes=("real/table1/table1.html",), instead="{} OUT=real"
            ),
        },
        environment={"MATCHERS": "copy nearest_resnet18"},
    ),
}


def place(command: Command) -> tuple[str, str]:
    """("here", page), ("elsewhere", test), ("exception", reason) or ("nowhere", "")."""
    key = command.key
    if key in SETTINGS.get(command.page, NOTHING).runs:
        return "here", SETTINGS[command.page].runs[key].once or command.page
    for page, pattern, file, test in ELSEWHERE:
        if page in ("", command.page) and re.fullmatch(pattern, key):
            return "elsewhere", f"{file}::{test}"
    for pattern, reason in EXCEPTIONS:
        if re.fullmatch(pattern, key):
            return "exception", reason
    return "nowhere", ""


NOTHING = Setting({})


# -- nothing is left out --------------------------------------------------------------------------


def test_commands_are_found() -> None:
    page = (
        "Run `make  x` or\n`nemf list`, see `nemf/`, `makes it`, `nemf`.\n\n"
        "```\nnemf a  # why\n# nothing\nmlflow b \\\n  --c\n```\n"
        '1. x\n   ```sh\n   nemf d --e "#f"\n   ```\n'
        "```python\nx = 1\n```\n```pycon\n>>> 1\n```\n"
    )
    texts = ["make x", "nemf list", "nemf a", "mlflow b --c", 'nemf d --e "#f"', "x = 1\n"]
    found = commands_of("a.md", page)
    assert [c.text for c in found] == texts
    assert [c.text for c in found if c.python] == ["x = 1\n"]
    assert [c.text for c in found if c.mention] == ["nemf list"]
    with pytest.raises(AssertionError, match="powershell"):
        commands_of("a.md", "```powershell\nnemf list\n```\n")


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_is_run_or_excused(command: Command) -> None:
    where, what = place(command)
    assert where != "nowhere", (
        f"{command}: no test runs it. Say in SETTINGS[{command.page!r}] how it is run and what it "
        "must do, or name the test that runs it in ELSEWHERE"
    )
    if where == "here":
        assert command.key in SETTINGS[what].runs
        assert not SETTINGS[what].runs[command.key].once
        assert Command(what, command.text, command.python) in COMMANDS


def test_what_is_mentioned_is_run() -> None:
    run = [c.text for c in COMMANDS if place(c)[0] in ("here", "elsewhere")]
    mentions = [c for c in DOCUMENTED if c.mention]
    assert mentions
    assert not [str(c) for c in mentions if not any(f"{r} ".startswith(f"{c.text} ") for r in run)]


def test_no_entry_is_left_of_a_command_that_is_gone() -> None:
    keys = {page: {c.key for c in COMMANDS if c.page == page} for page in PAGES}
    assert not [(p, k) for p, s in SETTINGS.items() for k in s.runs if k not in keys[p]]
    placed = {place(c) for c in COMMANDS}
    assert not [row for row in ELSEWHERE if ("elsewhere", "::".join(row[2:])) not in placed]
    assert not [row for row in EXCEPTIONS if ("exception", row[1]) not in placed]


@pytest.mark.parametrize(("file", "name"), sorted({row[2:] for row in ELSEWHERE}))
def test_tests_that_run_commands_are_there(file: str, name: str) -> None:
    tree = ast.parse((REPO / "tests" / file).read_text(encoding="utf-8"))
    assert name in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


# -- they work ------------------------------------------------------------------------------------


class World:
    """A copy of the checkout with data, weights and photographs; commands run in it as in one
    shell, whose environment lasts."""

    def __init__(self, folder: Path, parts: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        ignored = shutil.ignore_patterns(
            "outputs", ".git", ".venv", "*.egg-info", "__pycache__", ".*_cache", "build", "dist",
            ".hypothesis", "mlruns",
        )  # fmt: skip
        shutil.copytree(REPO, folder, ignore=ignored)
        shutil.copytree(parts, folder, dirs_exist_ok=True)
        (folder.parent / "home").mkdir()
        virtual = folder / ".venv"  # this interpreter's environment stands in for it
        virtual.mkdir()
        for path in Path(sys.prefix).iterdir():
            (virtual / path.name).symlink_to(path)
        for stamp in (".ready", ".docs"):
            (virtual / stamp).unlink(missing_ok=True)
            (virtual / stamp).touch()
        kept = {
            k: v for k, v in os.environ.items()
            if not k.startswith(("NEMF_", "MLFLOW_", "PYTEST_", "MAKE"))
        }  # fmt: skip
        path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent)])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.environment = kept | {
            "HOME": str(folder.parent / "home"), "PATH": f"{path}{os.pathsep}{kept['PATH']}",
            "PYTHONPATH": str(folder), "NEMF_CACHE": str(folder.parent / "cache"),
            "BROWSER": "true",
            "MLFLOW_PORT": str(port), "MLFLOW_WORKERS": "1", "MLFLOW_DISABLE_TELEMETRY": "true",
            "MPLCONFIGDIR": str(parts.parent / "matplotlib"), "OMP_NUM_THREADS": "1", **environment,
        }  # fmt: skip

    def run(self, line: str) -> str:
        """What it printed. AssertionError unless it ends with status 0."""
        left, begun = self.folder.parent / "environment", time.monotonic()
        done = subprocess.run(
            ["bash", "-c", f"{{ {line}\n}} && env -0 > {shlex.quote(str(left))}"],
            cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=900,
            check=False,
        )  # fmt: skip
        said = done.stdout + done.stderr
        log.info("%.0f s for %s", time.monotonic() - begun, line)
        if done.returncode:
            raise AssertionError(f"{line}\nended with {done.returncode}:\n{said[-2000:]}")
        pairs = (entry.partition("=") for entry in left.read_text().split("\0") if entry)
        self.environment = {key: value for key, _, value in pairs}
        return said

    def follow(self, command: Command, run: Run) -> None:
        """Does what the document says. AssertionError if that does not work or nothing comes of
        it."""
        text = run.instead.replace("{}", command.text)
        if command.python:
            (self.folder / "snippet.py").write_text(text, encoding="utf-8")
            text = "python snippet.py"
        text = in_the_world(text)
        if run.before:
            self.run(run.before)
        if run.until:
            stop(self.start(text, run.until))
            return
        said = "" if text == SERVER else self.run(text)
        if not re.search(run.prints, said):
            raise AssertionError(f"{text}\nprinted no {run.prints!r}:\n{said[-2000:]}")
        missing = [pattern for pattern in run.writes if not list(self.folder.glob(pattern))]
        if missing:
            raise AssertionError(f"{text}\nwrote no {', '.join(missing)}:\n{said[-2000:]}")

    def start(self, line: str, until: str) -> subprocess.Popen[bytes]:
        """A server that goes on; returns when it answers at the address ``until`` or printed it."""
        until = until.replace("$MLFLOW_PORT", self.environment["MLFLOW_PORT"])
        output = self.folder.parent / "log"
        with output.open("wb") as stream:
            process = subprocess.Popen(
                ["bash", "-c", line], cwd=self.folder, stdout=stream, stderr=stream,
                env=self.environment | {"PYTHONUNBUFFERED": "1"}, start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + 300
        while not (answers(until) if "://" in until else until in output.read_text()):
            assert process.poll() is None, f"{line}\n{output.read_text()[-4000:]}"
            assert time.monotonic() < end, line
            time.sleep(0.2)
        return process


def answers(address: str) -> bool:
    try:
        return urlopen(address, timeout=1).status == 200
    except (URLError, OSError):
        return False


def stop(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every world starts from."""
    root = tmp_path_factory.mktemp("documented") / "parts"
    make_synthetic(root / "DATA", preset="tiny")
    weights = root / "WEIGHTS" / "resnet18.pth"
    weights.parent.mkdir()
    torch.save(build_backbone("resnet18", init="random", upto=8).state_dict(), weights)
    (root / "weights").mkdir()
    shutil.copy(weights, root / "weights")
    shutil.copy(weights, root / "resnet18-f37072fd.pth")
    for folder in ("", "photos", "my_photos", "my_pairs"):
        for seed in (1, 2):
            save_image(root / folder / f"cat{seed}.jpg", seed, 180, 240)
    page = (REPO / "docs" / "tutorial.md").read_text(encoding="utf-8")
    (pairs,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    for folder in ("my_photos", "my_pairs"):
        (root / folder / "pairs.json").write_text(pairs)
    programs = {
        "nemf": f"#!{sys.executable}\nfrom experiments.cli import main\n"
        'if __name__ == "__main__":\n    main()\n',  # workers import it
        "newest": "#!/bin/sh\nls -t outputs/predictions/*/*/*/*/predictions.parquet | head -n 1\n",
    }
    (root / "bin").mkdir()
    for name, text in programs.items():
        (root / "bin" / name).write_text(text)
        (root / "bin" / name).chmod(0o755)
    return root


def in_the_world(text: str) -> str:
    """A documented command with its placeholders filled in."""
    for pattern, value in PLACEHOLDERS:
        text = re.sub(pattern, value, text)
    return text


def problems_of(page: str, parts: Path, folder: Path) -> list[str]:
    """Follows a page from its first command to its last; what did not work."""
    setting, problems, servers = SETTINGS[page], [], []
    commands = [c for c in COMMANDS if c.page == page and place(c) == ("here", page)]
    if not commands:
        return []
    world = World(folder / "world", parts, setting.environment)
    try:
        if setting.server:
            servers.append(world.start(SERVER, ANSWERS))
        for line in setting.first:
            world.run(line)
        for command in commands:
            if command.key == "make docs" and importlib.util.find_spec("mkdocs") is None:
                continue
            try:
                world.follow(command, setting.runs[command.key])
            except AssertionError as problem:
                problems.append(f"{command}\n{problem}")
    finally:
        for process in servers:
            stop(process)
    if not problems:
        shutil.rmtree(folder)
    return problems


@pytest.fixture(scope="session")
def followed(
    request: pytest.FixtureRequest, parts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], list[str]]]:
    """:func:`problems_of` a page; the pages that are tested are followed two at a time, as the
    commands hardly use more than one core."""
    alone = "PYTEST_XDIST_WORKER" in os.environ  # which of the pages are ours is not known then
    items = [i for i in request.session.items if "followed" in getattr(i, "fixturenames", ())]
    pages = [item.callspec.params["page"] for item in items]
    with ThreadPoolExecutor(2) as pool:
        begun: dict[str, Future[list[str]]] = {}

        def follow(page: str) -> list[str]:
            for other in [page] if alone else pages:
                if other not in begun:
                    folder = tmp_path_factory.mktemp("page")
                    begun[other] = pool.submit(problems_of, other, parts, folder)
            return begun[page].result()

        yield follow
        pool.shutdown(cancel_futures=True)


@pytest.mark.long
@pytest.mark.skipif(not (shutil.which("make") and shutil.which("git")), reason="make, git")
@pytest.mark.parametrize("page", SETTINGS)
def test_the_commands_of_a_page_work(page: str, followed: Callable[[str], list[str]]) -> None:
    problems = followed(page)
    assert not problems, "\n\n".join(problems)
