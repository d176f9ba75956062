"""``nemf regress`` on small repositories that keep the command line's contract without a network:
states of a repository that must end in a clear answer, the gate, bisection."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from experiments.benchmarks import random_predictions
from experiments.checkouts import Repository
from experiments.cli import main_group
from experiments.measured_commits import PROBE
from experiments.regression import Regressions
from nemf.claims import claimed
from nemf.errors import NemfError

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="needs git")
REPO = Path(__file__).resolve().parent.parent
POLICY = """
suite:
  data: {folder: data}
  threads: 1
  matchers: [offset]
  datasets: [fixed]
  real: [fixed]
  protocols: [canonical]
  renamed: {}
guard: ["*"]
accuracy: {alphas: [0.05, 0.1], level: 0.05, least_change: 0.005, least_class_change: 0.02}
exactness: {tolerance_px: 0.001, shift_px: 0.1, unexplained_share: 0.02}
cost: {predictions: [], rounds: 2, most_rounds: 2, blocks: 1, pairs: 1, level: 0.9,
       seconds_ratio: 1.15, memory_ratio: 1.15}
"""
CLI = '''
"""The contract of the suite's command line: list, predict, score."""

import hashlib
import json
import sys
from pathlib import Path

import pyarrow as pa

ROOT = Path(__file__).resolve().parent.parent


def option(name):
    return [value for flag, value in zip(sys.argv, sys.argv[1:]) if flag == name]


def predict():
    from nemf.predictions import Predictions

    matcher = sys.argv[2].partition("/")[0]
    config = json.loads((ROOT / "experiments/configs/matchers" / f"{matcher}.py").read_text())
    if "problem" in config:
        sys.exit("nemf: " + config["problem"])
    asked = Predictions.read(Path(option("--data")[0]) / "questions.parquet")
    points = asked.points("true") + config["off_px"]
    points[:: config.get("lost_each", 10**9)] += 500
    table = asked.table
    for axis, values in zip("xy", points.T):
        at = table.column_names.index(f"pred_{axis}")
        table = table.set_column(at, table.field(at), pa.array(values, pa.float32()))
    key = hashlib.sha256(json.dumps([config, asked.meta]).encode()).hexdigest()[:24]
    facts = {"seed": config.get("seed", 0), "code": None}
    matcher = {"name": "offset", "label": "offset", "config": config, "weights_sha256": "w"}
    meta = asked.meta | {"key": key, "matcher": matcher, "facts": facts, "code": None}
    file = Path(option("--out")[0]) / "predictions" / key / "predictions.parquet"
    if not file.exists():
        Predictions(table, meta).write(file)
    print(file)


def score():
    from nemf.predictions import Predictions
    from nemf.scoring import get_protocol
    from reports.records import make_record, score_pairs

    predictions, records = Predictions.read(Path(sys.argv[2])), []
    alphas = [float(alpha) for alpha in option("--alphas")[0].split(",")]
    for name in option("--protocol"):
        scores = score_pairs(predictions, get_protocol(name), alphas)
        records.append(make_record(scores, "", {}))
    print(json.dumps(records, default=float))


def listing():
    import dataclasses

    from nemf.scoring import available_protocols

    protocols = {name: dataclasses.asdict(p) for name, p in available_protocols().items()}
    print(json.dumps({"protocols": protocols}))


if __name__ == "__main__":
    {"list": listing, "predict": predict, "score": score}[sys.argv[1]]()
'''


def git(root: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=Test", "-c", "user.email=test@localhost", "-c", "gc.auto=0"]
    done = subprocess.run(
        ["git", *settings, *arguments], cwd=root, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def configure(root: Path, name: str = "offset", **config: Any) -> None:
    folder = root / "experiments" / "configs" / "matchers"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(json.dumps(config))


def commit(root: Path, subject: str) -> str:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--allow-empty", "--message", subject)
    return git(root, "rev-parse", "HEAD")


@pytest.fixture(scope="module")
def _template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with two commits of the same behaviour."""
    root = tmp_path_factory.mktemp("template") / "suite"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPO / "nemf", root / "nemf", ignore=ignore)
    for name in ("__init__.py", "records.py", "statistics.py"):
        (root / "reports").mkdir(exist_ok=True)
        shutil.copy(REPO / "reports" / name, root / "reports" / name)
    for package in ("baselines", "experiments"):
        (root / package).mkdir()
        (root / package / "__init__.py").write_text("")
    (root / "experiments" / "cli.py").write_text(CLI)
    (root / "experiments" / "regress.yaml").write_text(POLICY)
    (root / ".gitignore").write_text("outputs/\n__pycache__/\n")
    configure(root, off_px=1.0)
    (root / "experiments" / "configs" / "datasets").mkdir()
    (root / "experiments" / "configs" / "datasets" / "fixed.py").write_text("")
    write_questions(root)
    git(root, "init", "--quiet", "--initial-branch=main")
    commit(root, "first")
    (root / "notes.txt").write_text("no code")
    commit(root, "second")
    return root


def write_questions(root: Path, n_pairs: int = 120) -> None:
    predictions = random_predictions(n_pairs, 2, 20)
    predictions.meta |= {"fingerprint": f"{n_pairs:064d}", "n_pairs": n_pairs}
    (root / "data").mkdir(exist_ok=True)
    predictions.write(root / "data" / "questions.parquet")


@pytest.fixture
def root(_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in [name for name in os.environ if name.startswith("NEMF_W")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    copy = tmp_path / "suite"
    shutil.copytree(_template, copy)
    yield copy
    assert len(git(copy, "worktree", "list").splitlines()) == 1


def tracked(root: Path, **options: Any) -> Regressions:
    return Regressions(root, root / "outputs", **options)


def only(report: Any) -> dict[str, Any]:
    (cell,) = report.content["cells"]
    return cell


# -- what is compared -----------------------------------------------------------------------------


def test_a_dirty_tree_is_compared_as_it_is_and_not_touched(root: Path) -> None:
    configure(root, off_px=1.5)
    (root / "new.txt").write_text("untracked")
    before = git(root, "status", "--porcelain"), git(root, "count-objects", "-v")
    report = tracked(root).compare("HEAD")
    assert report.failed
    cell = only(report)
    assert cell["verdict"] == "worse"
    assert cell["exactness"]["shift"] == pytest.approx([0.5, 0.5], abs=1e-3)
    assert [cause["what"] for cause in cell["causes"]] == ["config off_px"]
    assert report.content["head"]["dirty"] is True
    assert report.content["head"]["label"].startswith("working tree on ")
    assert (git(root, "status", "--porcelain"), git(root, "count-objects", "-v")) == before
    written = json.loads((report.files[1]).read_text())
    assert written == report.content
    assert report.files[0].read_text() == report.markdown


@pytest.mark.long
def test_a_seed_that_changes_nothing_is_named_and_not_paged(root: Path) -> None:
    configure(root, off_px=1.0, seed=5)
    cell = only(tracked(root).compare("HEAD"))
    assert cell["verdict"] == "same"
    assert cell["exactness"]["status"] == "byte-equal"
    assert {cause["what"] for cause in cell["causes"]} == {"config seed", "seed"}


@pytest.mark.long
def test_a_detached_head_and_a_clean_tree_are_commits(root: Path) -> None:
    sha = git(root, "rev-parse", "HEAD~1")
    git(root, "checkout", "--quiet", "--detach", sha)
    report = tracked(root).compare("main")
    assert report.content["head"] == {
        "label": git(root, "rev-parse", "--short=8", sha),
        "commit": sha,
        "dirty": False,
        "tree": git(root, "rev-parse", f"{sha}^{{tree}}"),
        "subject": "first",
    }
    assert only(report)["verdict"] == "same"


@pytest.mark.long
def test_another_dataset_is_not_comparable_and_no_failure(root: Path) -> None:
    write_questions(root, 100)
    report = tracked(root).compare("HEAD")
    assert only(report)["verdict"] == "not comparable"
    assert "dataset version differs" in only(report)["reasons"][0]["text"]
    assert not report.failed


@pytest.mark.long
def test_a_renamed_config_is_found_if_the_policy_says_so(root: Path) -> None:
    git(
        root,
        "mv",
        "experiments/configs/matchers/offset.py",
        "experiments/configs/matchers/moved.py",
    )
    policy = root / "experiments" / "regress.yaml"
    policy.write_text(POLICY.replace("[offset]", "[moved]"))
    cell = only(tracked(root).compare("HEAD"))
    assert cell["verdict"] == "not comparable"
    assert "base has no prediction: it has no config moved/fixed" in cell["reasons"][0]["text"]
    policy.write_text(
        POLICY.replace("[offset]", "[moved]").replace("renamed: {}", "renamed: {moved: offset}")
    )
    assert only(tracked(root).compare("HEAD"))["verdict"] == "same"


@pytest.mark.long
@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        ({"problem": "weights.pth: no such file"}, "weights.pth: no such file"),
        (None, "does not run (SyntaxError"),
    ],
)
def test_a_head_that_does_not_run_fails(
    root: Path, break_it: dict[str, str] | None, reason: str
) -> None:
    if break_it is None:
        (root / "nemf" / "errors.py").write_text("def broken(\n")
    else:
        configure(root, **break_it)
    report = tracked(root).compare("HEAD")
    assert report.failed
    assert reason in only(report)["reasons"][0]["text"]
    assert report.markdown.startswith("## NOT COMPARED: 1 not comparable of 1 cells")


@pytest.mark.long
def test_a_package_that_a_commit_lacks_is_not_borrowed(root: Path) -> None:
    git(root, "rm", "-r", "--quiet", "reports")
    shutil.rmtree(root / "reports", ignore_errors=True)
    text = only(tracked(root).compare("HEAD"))["reasons"][0]["text"]
    assert "has no package reports" in text or "No module named 'reports'" in text


# -- states of a repository -----------------------------------------------------------------------


def test_a_missing_base_is_named(root: Path) -> None:
    with pytest.raises(NemfError, match="'main~10' is no commit here; give a commit"):
        tracked(root).compare("main~10")


def test_a_shallow_clone_says_what_to_do(root: Path, tmp_path: Path) -> None:
    clone = tmp_path / "shallow"
    git(tmp_path, "clone", "--quiet", "--depth", "1", f"file://{root}", str(clone))
    with pytest.raises(NemfError, match=r"shallow \(1 commit deep\).*git fetch --unshallow"):
        Regressions(clone, clone / "outputs").compare("main~1")


def test_outside_of_git_and_before_the_first_commit(tmp_path: Path) -> None:
    with pytest.raises(NemfError, match="not inside a git checkout"):
        Repository(tmp_path)
    git(tmp_path, "init", "--quiet")
    with pytest.raises(NemfError, match="the repository has no commit yet"):
        Repository(tmp_path).commit("HEAD")
    with pytest.raises(NemfError, match="commit first"):
        Repository(tmp_path).working_tree(tmp_path / "out")


@pytest.mark.long
def test_what_a_killed_comparison_left_is_cleared(root: Path) -> None:
    worktrees = root / "outputs" / "regress" / "worktrees"
    git(root, "worktree", "add", "--quiet", "--detach", str(worktrees / "old"), "HEAD")
    sha = git(root, "rev-parse", "--short=12", "HEAD~1")
    (worktrees / sha).mkdir()
    (worktrees / sha / "half").write_text("half a checkout")
    assert only(tracked(root).compare("HEAD~1"))["verdict"] == "same"
    assert not list(worktrees.glob("*"))


@pytest.mark.long
def test_a_comparison_that_was_killed_is_run_again(root: Path) -> None:
    configure(root, off_px=1.5)
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    command = [sys.executable, "-P", "-m", "experiments.cli", "regress", "--base", "HEAD"]
    process = subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 120
    while not list((root / "outputs" / "regress" / "worktrees").glob("*/nemf")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert len(git(root, "worktree", "list").splitlines()) == 2
    assert only(tracked(root).compare("HEAD"))["verdict"] == "worse"


def test_the_second_of_two_comparisons_is_told(root: Path) -> None:
    with (
        claimed(root / "outputs" / "regress", ".lock", "held"),
        pytest.raises(NemfError, match="another comparison is running here; wait for it"),
    ):
        tracked(root).compare("HEAD~1")


def test_files_that_change_meanwhile_spoil_the_comparison(root: Path) -> None:
    (root / "a.txt").write_text("1")
    comparison = tracked(root)
    head = comparison._head(None)
    comparison._check_still(head)
    (root / "a.txt").write_text("2")
    with pytest.raises(NemfError, match="files changed while they were compared; run again"):
        comparison._check_still(head)


def test_the_output_folder_is_no_part_of_the_tree(root: Path) -> None:
    inside = root / "results"
    repository = Repository(root)
    before = repository.working_tree(inside)
    inside.mkdir()
    (inside / "x").write_text("x")
    assert repository.working_tree(inside) == before
    assert repository.working_tree(root / "outputs") != before


@pytest.mark.long
def test_another_writer_of_the_store_is_no_fault_of_the_commit(root: Path) -> None:
    configure(root, problem="outputs/x: another process is predicting this cell")
    with pytest.raises(NemfError, match="another process is predicting this cell"):
        tracked(root).compare("HEAD")


# -- the gate -------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_gate_compares_with_what_was_accepted(root: Path) -> None:
    with pytest.raises(NemfError, match=r"no accepted scores; run `nemf regress --accept"):
        tracked(root).gate()
    with pytest.raises(NemfError, match="no accepted scores"):
        tracked(root).gate("HEAD~1")
    with pytest.raises(NemfError, match="give the reason"):
        tracked(root).accept(" ")
    accepted = tracked(root).accept("the first one")
    names = sorted(path.name for path in (root / "experiments" / "accepted").iterdir())
    assert names == ["accepted.json", "offset-fixed-src2trg-own.parquet"]
    assert "1 cells" in accepted.markdown
    assert "Commit experiments/accepted together" in accepted.markdown
    assert "No longer" not in accepted.markdown
    commit(root, "accepted")
    report = tracked(root).gate()
    assert only(report)["verdict"] == "same"
    assert only(report)["exactness"]["status"] == "byte-equal"
    assert "the first one" in report.markdown

    configure(root, off_px=1.0, lost_each=10)
    report = tracked(root).gate()
    assert report.failed
    assert only(report)["verdict"] == "worse"
    assert [reason["watch"] for reason in only(report)["reasons"]] == ["accuracy"] * len(
        only(report)["reasons"]
    )
    (root / "experiments" / "accepted" / "gone.parquet").write_bytes(b"")
    accepted = tracked(root).accept("one in ten is lost on purpose")
    assert "No longer accepted, as the policy runs them no more: gone.parquet" in accepted.markdown
    assert not tracked(root).gate().failed

    write_questions(root, 100)
    report = tracked(root).gate()
    assert report.failed  # nothing would be watched from now on
    assert "dataset version differs" in report.markdown
    (root / "experiments" / "accepted" / "accepted.json").write_text("{")
    with pytest.raises(NemfError, match=r"accepted\.json: cannot be read"):
        tracked(root).gate()


@pytest.mark.long
def test_scoring_that_gives_other_numbers_fails_the_gate(root: Path) -> None:
    tracked(root).accept("start")
    records = root / "reports" / "records.py"
    text = records.read_text()
    assert text.count('pred = predictions.points("pred")') == 1
    records.write_text(
        text.replace(
            'pred = predictions.points("pred")', 'pred = predictions.points("pred")[:, ::-1]'
        )
    )
    report = tracked(root).gate()
    assert report.failed
    assert [reason["watch"] for reason in only(report)["reasons"]] == ["scoring"]
    assert only(report)["exactness"]["status"] == "byte-equal"


# -- bisection ------------------------------------------------------------------------------------


@pytest.mark.long
def test_bisect_names_the_commit_or_those_that_cannot_tell(root: Path) -> None:
    good = git(root, "rev-parse", "HEAD")
    subjects = []
    for number in range(6):
        config = {"off_px": 1.0 if number < 4 else 1.5, "step": number}
        configure(root, **({"problem": "no weights"} if number == 3 else config))
        commit(root, f"step {number}")
        subjects.append(f"step {number}")
    report = tracked(root).bisect(f"{good}..HEAD")
    (culprit,) = report.content["culprits"]
    assert culprit["first_bad"]["subject"] == "step 4"
    assert [c["subject"] for c in culprit["or_one_of"]] == ["step 3"]
    assert culprit["worse"] == [{"cell": "offset/fixed/canonical", "watch": "exactness"}]
    assert len(report.content["runs"]) <= 5
    assert "First bad commit: `" in report.markdown
    with pytest.raises(NemfError, match="no guarded cell is worse"):
        tracked(root).bisect(f"{good}..HEAD~3")


@pytest.mark.parametrize(
    ("range_", "complaint"),
    [
        ("main", "expected good..bad"),
        ("main...HEAD", "expected good..bad"),
        ("HEAD..HEAD~1", "is no ancestor"),
        ("HEAD..HEAD", "is no ancestor"),
        ("nowhere..HEAD", "'nowhere' is no commit here"),
    ],
)
def test_a_range_that_is_none_is_refused(root: Path, range_: str, complaint: str) -> None:
    with pytest.raises(NemfError, match=complaint):
        tracked(root).bisect(range_)


# -- the command ----------------------------------------------------------------------------------


def nemf(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    command = [sys.executable, "-P", "-m", "experiments.cli", "regress", *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@pytest.mark.long
def test_the_command_prints_markdown_or_json_and_ends_with_a_status(root: Path) -> None:
    done = nemf(root, "--base", "HEAD~1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("## No regression: 1 same of 1 cells")
    configure(root, off_px=1.5)
    done = nemf(root, "--base", "HEAD", "--json")
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["failed"] is True


@pytest.mark.long
def test_a_history_is_rebuilt_from_mlflow_without_the_repository(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(root, off_px=1.5)
    commit(root, "half a pixel")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/store/mlflow.db")
    done = nemf(root, "--history", "3")
    assert done.returncode == 0, done.stderr
    assert f"MLflow: sqlite:///{tmp_path}/store/mlflow.db" in done.stderr
    assert "exactness: most points moved the same way" in done.stdout
    (folder,) = (root / "outputs" / "regress").glob("history-*")
    shutil.move(folder, tmp_path / "published")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = nemf(elsewhere, "--history", "3", "--from-mlflow")
    assert done.returncode == 0, done.stderr
    (again,) = (elsewhere / "outputs" / "regress").glob("history-*")
    names = sorted(path.name for path in again.iterdir())
    assert names == ["history.json", "history.md", "history.pdf", "history.png"]
    for name in names:
        assert (again / name).read_bytes() == (tmp_path / "published" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--base", "HEAD", "--history", "3"), "do not go together"),
        (("--from-mlflow",), "--from-mlflow goes with --history N"),
        (("--history", "3", "--from-mlflow", "--head", "HEAD"), "do not go with it"),
        (("--history", "3", "--from-mlflow"), "needs MLFLOW_TRACKING_URI"),
        (("--accept", "why", "--head", "HEAD"), "takes no --head"),
        (("--base", "HEAD", "--cell", "other"), "--cell 'other' fits none"),
        (("--history", "1"), "at least 2 commits"),
        (("--base", "HEAD", "--policy", "none.yaml"), "none.yaml: no such policy file"),
    ],
)
def test_wrong_options_are_refused_in_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], complaint: str
) -> None:
    monkeypatch.chdir(root)
    done = CliRunner().invoke(main_group, ["regress", *arguments])
    assert isinstance(done.exception, NemfError)
    assert complaint in str(done.exception)
    assert "\n" not in str(done.exception)


# -- what names the stand-ins ----------------------------------------------------------------------


def generator_of(root: Path) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-P", str(PROBE), "generator"],
        env=os.environ | {"PYTHONPATH": str(root)},
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout)


def test_only_sources_that_make_pixels_name_the_rendering(tmp_path: Path) -> None:
    """Another lock or another comment must not take the gate's patience with other processors."""
    ignore = shutil.ignore_patterns("__pycache__", "accepted*", "weights")
    for package in ("nemf", "experiments"):
        shutil.copytree(REPO / package, tmp_path / package, ignore=ignore)
    first = generator_of(tmp_path)
    scenes = tmp_path / "nemf" / "datasets" / "synthetic_scenes.py"
    for file in (tmp_path / "nemf" / "claims.py", tmp_path / "nemf" / "__init__.py"):
        file.write_text(file.read_text() + "\nANOTHER = 1\n")
    scenes.write_text(scenes.read_text() + "\n# a comment\n")
    second = generator_of(tmp_path)
    assert second["rendering"] == first["rendering"]
    assert second["fingerprint"] != first["fingerprint"]
    scenes.write_text(scenes.read_text() + "\nANOTHER = 1\n")
    assert generator_of(tmp_path)["rendering"] != first["rendering"]


def test_the_accepted_stand_ins_are_those_of_this_renderer() -> None:
    """Else the gate passes only where every pixel comes out as it did when they were accepted."""
    listing = json.loads((REPO / "experiments" / "accepted" / "accepted.json").read_text())
    preset, _, rendering = listing["stand_ins"].rpartition("-")
    assert preset == "table1"
    assert generator_of(REPO)["rendering"].startswith(rendering)
