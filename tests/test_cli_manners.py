"""How the command line behaves: help with examples, hints, completion, quiet, a quick start."""

from __future__ import annotations

import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from experiments.cli import main_group
from nemf import progress
from nemf.errors import did_you_mean
from tests.conftest import REPO, save_image
from tests.test_docs import code_of

HEAVY = ("torch", "mmengine", "mlflow", "pandas", "scipy", "matplotlib", "seaborn")


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command that is no group, by what one types."""
    todo: list[tuple[str, click.Command]] = [("nemf", main_group)]
    while todo:
        name, command = todo.pop()
        if isinstance(command, click.Group):
            todo += [(f"{name} {part}", sub) for part, sub in command.commands.items()]
        else:
            yield name, command


COMMANDS = dict(commands())


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What --quiet and --verbose change is put back."""
    monkeypatch.setenv("TQDM_DISABLE", "0")
    packages = [logging.getLogger(name) for name in ("nemf", "baselines", "experiments", "reports")]
    levels = [logger.level for logger in packages]
    yield
    for logger, level in zip(packages, levels, strict=True):
        logger.setLevel(level)


# -- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_exist(name: str, nemf: Any) -> None:
    shown = nemf(*name.split()[1:], "--help").out
    assert "Examples:\n" in shown
    examples = [line.strip() for line in shown.partition("Examples:\n")[2].splitlines()]
    mine = [line for line in examples if line.startswith((name, f'eval "$({name}'))]
    assert mine
    for line in examples:
        words = shlex.split(line.partition(" # ")[0])
        if words[0] != "nemf":
            continue
        command: click.Command = main_group
        while isinstance(command, click.Group):
            command = command.commands[words[1]]
            del words[1]
        known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        assert {word for word in words if word.startswith("-")} <= known, line


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    silent = [
        parameter.opts[-1]
        for parameter in COMMANDS[name].params
        if isinstance(parameter, click.Option) and not parameter.help
    ]
    assert set(silent) <= {"--dataset", "--protocol", "--by", "--split", "--alpha", "--seed"}, (
        silent
    )


def test_an_option_is_called_alike_everywhere() -> None:
    homes = {"--data": "data", "--weights": "weights", "--json": "as_json", "--out": "out"}
    for name, command in COMMANDS.items():
        for parameter in command.params:
            for option, variable in homes.items():
                assert (option in parameter.opts) == (
                    isinstance(parameter, click.Option) and parameter.name == variable
                ), f"{name} {option}"


def test_the_exit_status_is_documented(nemf: Any) -> None:
    shown = nemf("--help").out
    documented = (REPO / "docs" / "cli.md").read_text(encoding="utf-8")
    for status in (0, 1, 2, 130, 141):
        assert re.search(rf"^ +{status}  ", shown, re.MULTILINE)
        assert re.search(rf"^\| {status} \|", documented, re.MULTILINE)


def test_the_list_of_commands_cuts_no_sentence_short(nemf: Any) -> None:
    for group in ((), ("data",)):
        listed = nemf(*group, "--help").out.partition("Commands:\n")[2].partition("\n\n")[0]
        assert listed
        assert "..." not in listed


# -- did you mean ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["predictt"], "predict"),
        (["data", "verfy"], "verify"),
        (["score", "x", "--protocl", "a"], "--protocol"),
        (["data", "stats", "spiar", "--data", "."], "spair"),
        (["data", "queries", "pfwillow", "q.csv", "--protocol", "canonic@1", "--data", "."],
         "canonical@1"),
        (["predict", "hpf_resnt18/spair", "--data", "."], "hpf_resnet18"),
        (["predict", "copy/pfwilow", "--data", "."], "pfwillow"),
        (["match", "a.png", "a.png", "--matcher", "hpf_smal"], "hpf_small"),
        (["train", "cats_smal"], "cats_small"),
        (["figure", "transfr"], "transfer"),
        (["verify", "spair"], "data verify"),
    ],
)  # fmt: skip
def test_a_mistyped_name_is_answered_with_the_likely_one(
    words: list[str], hint: str, nemf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_image(tmp_path / "a.png", 0, 20, 30)
    result = nemf(*words)
    assert result.status == 2
    assert re.search(rf"(?i)did you mean '{hint}'", result.err), result.err


def test_a_name_like_no_other_gets_no_hint() -> None:
    assert did_you_mean("zebra", ["spair", "pfwillow"]) == ""
    assert did_you_mean("spiar", ["spair", "pfwillow"]) == " (did you mean 'spair'?)"
    assert did_you_mean("ab1", ["ab2", "ab3"]) == " (did you mean 'ab3' or 'ab2'?)"
    assert did_you_mean("hpf", ["copy", "hpf_resnet18"]) == " (did you mean 'hpf_resnet18'?)"
    assert did_you_mean("hpf_resnet18", ["copy", "hpf"]) == " (did you mean 'hpf'?)"
    assert did_you_mean("", ["_copy", "hpf"]) == ""


# -- completion -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell(shell: str, nemf: Any) -> None:
    script = nemf("completion", shell).out
    assert f"_NEMF_COMPLETE={shell}_complete" in script
    assert nemf("completion", "tcsh").status == 2


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("nemf pre", ["predict"]),
        ("nemf predict hpf_small/", ["hpf_small/pfwillow", "hpf_small/folder"]),
        ("nemf match a b --matcher nearest_", ["nearest_small", "nearest_resnet18"]),
        ("nemf data verify p", ["pfpascal", "pfwillow"]),
        ("nemf score x --protocol can", ["canonical@1"]),
        ("nemf train cats_s", ["cats_small"]),
        ("nemf score --alp", ["--alphas"]),
    ],
)
def test_what_the_shell_offers(typed: str, offered: list[str]) -> None:
    words = typed.split(" ")
    environment = os.environ | {
        "_NEMF_COMPLETE": "bash_complete",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(words) - 1),
    }
    code = (
        "import sys; sys.argv = ['nemf']\nfrom experiments.cli import main\n"
        "try:\n    main()\nfinally:\n"
        f"    print('HEAVY', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, env=environment, capture_output=True, text=True
    )
    *items, heavy = done.stdout.splitlines()
    assert heavy == "HEAVY []"
    names = [item.partition(",")[2] for item in items]
    assert set(offered) <= set(names)
    assert all(name.startswith(words[-1]) for name in names)


# -- quiet and verbose ----------------------------------------------------------------------------


def test_quiet_leaves_results_and_errors(nemf: Any, tiny_pfwillow: Any, tmp_path: Path) -> None:
    arguments = ("predict", "copy/pfwillow", "--data", tiny_pfwillow(), "--out")
    script = "import sys; from experiments.cli import main; sys.argv[0] = 'nemf'; main()"

    def run(*before: str) -> Any:
        words = [*before, *map(str, arguments), str(tmp_path / f"out{len(before)}{before[-1:]}")]
        return subprocess.run(
            [sys.executable, "-c", script, *words], cwd=REPO, capture_output=True, text=True
        )

    plain, quiet, verbose = run(), run("-q"), run("--verbose")
    assert plain.returncode == quiet.returncode == verbose.returncode == 0
    assert plain.stderr
    assert quiet.stderr == ""
    assert quiet.stdout.strip().endswith("predictions.parquet")
    assert len(verbose.stderr) >= len(plain.stderr)


def test_bars_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch, nemf: Any) -> None:
    assert not progress.shown()  # no terminal here
    monkeypatch.setattr(sys, "stderr", type("Terminal", (), {"isatty": lambda self: True})())
    assert progress.shown()
    progress.silence()
    assert not progress.shown()


# -- a quick start --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["list"], ["list", "matchers"], ["list", "configs"],
              ["predict", "--help"], ["match", "--help"], ["completion", "bash"]],
)  # fmt: skip
def test_nothing_heavy_is_loaded_for_a_question(words: list[str]) -> None:
    code = (
        "import sys; from experiments.cli import main\n"
        "try:\n    main()\nfinally:\n"
        f"    print('HEAVY', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=REPO, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []", done.stderr


def test_documented_shells_are_those_there_are() -> None:
    lines = [line for line in code_of(REPO / "docs" / "cli.md") if "nemf completion" in line]
    assert {re.search(r"completion (\w+)", line)[1] for line in lines} == {"bash", "zsh", "fish"}
