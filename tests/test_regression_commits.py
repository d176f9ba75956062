"""Regression tracking on a repository of twelve commits whose verdicts are written down beforehand.

The repository holds copies of the real packages and a stand-in dataset; ``nearest_small`` runs as
it is, ``recorded`` answers what its weights say, so that a checkpoint can be worse by design.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from experiments.regression import Regressions, Report
from nemf.datasets.spair import SPair71k
from tests.conftest import save_image, write_json

pytestmark = [pytest.mark.long, pytest.mark.skipif(not shutil.which("git"), reason="needs git")]
REPO = Path(__file__).resolve().parent.parent
NEAREST = ("nearest_small/spair/canonical", "nearest_small/spair/hpf-paper")
RECORDED = ("recorded/spair/canonical", "recorded/spair/hpf-paper")
CELLS = (*NEAREST, *RECORDED)
POLICY = """
suite:
  data: {folder: data}
  threads: 1
  matchers: [nearest_small, recorded]
  datasets: [spair]
  real: [spair]
  protocols: [canonical, hpf-paper]
  renamed: {}
guard: ["*"]
accuracy: {alphas: [0.05, 0.1], level: 0.05, least_change: 0.005, least_class_change: 0.02}
exactness: {tolerance_px: 0.001, shift_px: 0.1, unexplained_share: 0.02}
cost: {predictions: [nearest_small/spair], rounds: 5, most_rounds: 20, blocks: 4, pairs: 6,
       level: 0.9, seconds_ratio: 1.15, memory_ratio: 1.15}
"""
MATCHER = '''
"""Answers what its weights say, pair by pair."""

import torch

from nemf.cards import MatcherCard
from nemf.matcher import Matcher
from nemf.pairs import Matches

CARD = MatcherCard(
    name="recorded", title="recorded", paper="this project", year=None, arxiv=None,
    licence_of_original="Apache-2.0", backbone="none", input_size="any", training="none",
    official_protocol="canonical@1", description="Answers what its weights say.",
)


class Recorded(Matcher):
    card = CARD

    def __init__(self, weights):
        super().__init__()
        stored = torch.load(weights, weights_only=True)
        self.places = stored["places"]
        self.register_buffer("answers", stored["answers"])

    def encode(self, images, role):
        return [image.hash for image in images]

    def match(self, queries, references, points):
        found = []
        for query, reference, asked in zip(queries, references, points, strict=True):
            start = self.places[f"{query} {reference}"]
            found.append(Matches(self.answers[start : start + len(asked)].clone()))
        return found
'''
CONFIG = (
    'label = "recorded"\n'
    'model = dict(type="recorded", weights="{{ fileDirname }}/../../weights/recorded.pth")\n'
    "batch = 8\n"
)


@dataclass
class Expected:
    """What a commit is, how it is made, and its verdict against the commit before it."""

    subject: str
    make: Callable[[Path], None]
    verdicts: dict[str, str] = field(default_factory=dict)  # cells that are not the same
    watches: dict[str, set[str]] = field(default_factory=dict)
    causes: dict[str, set[str]] = field(default_factory=dict)  # of all cells of a matcher
    exactness: dict[str, str] = field(default_factory=dict)  # where not byte-equal
    fails: bool = False
    cost: bool = False  # whether both are timed


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        path = root / name
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{name}: {text.count(old)} times {old!r}"
        path.write_text(text.replace(old, new), encoding="utf-8")

    return make


def every(cells: tuple[str, ...], value: object) -> dict:
    return dict.fromkeys(cells, value)


def recorded_answers(root: Path, *, worse: bool) -> None:
    """Weights of ``recorded``: six keypoints of ten right at 0.05 already. The worse ones lose 3 %
    of all keypoints and gain 1 %."""
    import torch

    rng = np.random.default_rng(1)
    dataset = SPair71k(root / "data", "test", cache_dir=root.parent / "cache")
    images = {image.hash: rng.normal(0, 0.7) for image in dataset.images}
    places, answers, count = {}, [], 0
    for pair in dataset:
        truth, box = pair.trg_kps, pair.trg_bbox
        side = max(box[2] - box[0], box[3] - box[1])
        n = len(truth)
        logit = 0.45 + images[pair.src.hash] + images[pair.trg.hash]
        right = rng.random(n) < 1 / (1 + np.exp(-logit))
        fate = rng.random(n)
        if worse:
            right = np.where(fate < 0.03, False, np.where(fate > 0.99, True, right))
        angle = rng.uniform(0, 2 * np.pi, n)
        distance = np.where(right, rng.uniform(0, 0.04, n), rng.uniform(0.2, 0.5, n)) * side
        offset = distance[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
        places[f"{pair.src.hash} {pair.trg.hash}"] = count
        answers.append((truth + offset).astype(np.float32))
        count += n
    stored = {"places": places, "answers": torch.from_numpy(np.concatenate(answers))}
    torch.save(stored, root / "experiments" / "weights" / "recorded.pth")


def small_spair(base: Path) -> None:
    """320 pairs of 64 images in four classes, ten keypoints each."""
    rng, lines = np.random.default_rng(0), []
    for category in ("boat", "bottle", "cat", "cup"):
        points = {}
        for k in range(16):
            save_image(base / "JPEGImages" / category / f"{k}.jpg", len(lines) + k, 96, 120)
            points[k] = rng.uniform([4, 4], [115, 91], (10, 2)).round(1).tolist()
            own = {str(i): point for i, point in enumerate(points[k])}
            write_json(base / "ImageAnnotation" / category / f"{k}.json", {"kps": own})
        ordered = [(a, b) for a in range(16) for b in range(16) if a != b]
        for at in rng.choice(len(ordered), 80, replace=False):
            a, b = ordered[at]
            lines.append(f"{len(lines):06d}-{a}-{b}:{category}")
            fields = {"src_imname": f"{a}.jpg", "trg_imname": f"{b}.jpg", "category": category}
            fields |= {f"{side}_imsize": [120, 96, 3] for side in ("src", "trg")}
            fields |= {f"{side}_bndbox": [2, 2, 117, 93] for side in ("src", "trg")}
            fields |= {"src_kps": points[a], "trg_kps": points[b]}
            fields |= {"kps_ids": list(map(str, range(10))), "viewpoint_variation": 0}
            fields |= {"scale_variation": 0, "truncation": 0, "occlusion": 0}
            write_json(base / "PairAnnotation" / "test" / f"{lines[-1]}.json", fields)
    (base / "Layout" / "large").mkdir(parents=True)
    (base / "Layout" / "large" / "test.txt").write_text("\n".join(lines) + "\n")


def first(root: Path) -> None:
    """The suite, ``recorded``, the policy, and a dataset."""
    ignore = shutil.ignore_patterns("__pycache__")
    for package in ("nemf", "baselines", "experiments", "reports"):
        shutil.copytree(REPO / package, root / package, ignore=ignore)
    shutil.copy(REPO / "pyproject.toml", root)
    group = '[project.entry-points."nemf.matchers"]\n'
    edit("pyproject.toml", group, f'{group}recorded = "baselines.recorded:Recorded"\n')(root)
    (root / "baselines" / "recorded.py").write_text(MATCHER)
    (root / "experiments" / "configs" / "matchers" / "recorded.py").write_text(CONFIG)
    (root / "experiments" / "regress.yaml").write_text(POLICY)
    (root / ".gitignore").write_text("outputs/\n__pycache__/\n")
    small_spair(root / "data" / "SPair-71k")
    recorded_answers(root, worse=False)


def move_a_keypoint(root: Path) -> None:
    path = min((root / "data/SPair-71k/PairAnnotation/test").glob("*.json"))
    annotation = json.loads(path.read_text())
    annotation["trg_kps"][0][0] += 1
    path.write_text(json.dumps(annotation))


BROKEN = "from __future__ import annotations\n\nfrom collections.abc import Sequence"
HALF = "first_px=(ratio_x * self.jump_px / 2 - 0.5, ratio_y * self.jump_px / 2 - 0.5)"
COMMITS = [
    Expected("The suite", first),
    Expected(
        "A comment",  # the key does not change: nothing is predicted again
        edit(
            "baselines/nearest.py",
            "height, width = image.canvas",
            "height, width = image.canvas  # px",
        ),
    ),
    Expected(
        "Refactoring that changes nothing",
        edit(
            "baselines/nearest.py",
            "return Matches(answer * step + first, confidence)",
            "found = answer * step + first\n        return Matches(found, confidence)",
        ),
        causes={"nearest_small": {"code"}},
        cost=True,
    ),
    Expected(
        "Another seed",  # neither matcher draws
        edit("experiments/configs/runtime.py", "seed = 2022", "seed = 7"),
        causes={"nearest_small": {"seed"}, "recorded": {"seed"}},
    ),
    Expected(
        "Cells begin half a pixel off",
        edit("baselines/nearest.py", HALF, HALF.replace(" - 0.5", "")),
        verdicts=every(NEAREST, "worse"),
        watches=every(NEAREST, {"exactness"}),
        causes={"nearest_small": {"code"}},
        exactness=every(NEAREST, "changed"),
        fails=True,
    ),
    Expected(
        "Does not import",
        edit("nemf/scoring.py", BROKEN, BROKEN.replace("Sequence", "Sequenze")),
        verdicts=every(CELLS, "not comparable"),
        fails=True,
    ),
    Expected(
        "Imports again",
        edit("nemf/scoring.py", BROKEN.replace("Sequence", "Sequenze"), BROKEN),
        verdicts=every(CELLS, "not comparable"),  # the base is what has no prediction
    ),
    Expected(
        "x and y swapped in one protocol",
        edit(
            "reports/records.py",
            '        pred = predictions.points("pred")\n',
            '        pred = predictions.points("pred")\n'
            "        pred = pred[:, ::-1] if protocol.name == 'hpf-paper' else pred\n",
        ),
        verdicts=every((NEAREST[1], RECORDED[1]), "worse"),
        watches=every((NEAREST[1], RECORDED[1]), {"scoring"}),
        fails=True,
    ),
    Expected(
        "A checkpoint that is 2 % worse",
        lambda root: recorded_answers(root, worse=True),
        verdicts=every(RECORDED[:1], "worse"),  # the other protocol's numbers are spoiled
        watches=every(RECORDED[:1], {"accuracy"}),
        causes={"recorded": {"weights"}},
        exactness=every(RECORDED, "changed"),
        fails=True,
    ),
    Expected(
        "Every other image is encoded twice",
        edit(
            "baselines/nearest.py",
            "pixels = normalise(image.on_canvas()).to(self.device)",
            "self.count = getattr(self, 'count', 0) + 1\n"
            "        if self.count % 3 == 1:\n            self.encode_one(image, role)\n"
            "        pixels = normalise(image.on_canvas()).to(self.device)",
        ),
        verdicts=every(NEAREST, "worse"),
        watches=every(NEAREST, {"cost"}),
        causes={"nearest_small": {"code"}},
        fails=True,
        cost=True,
    ),
    Expected("A keypoint is corrected", move_a_keypoint, verdicts=every(CELLS, "not comparable")),
    Expected(
        "The old checkpoint again",
        lambda root: recorded_answers(root, worse=False),
        verdicts=every(RECORDED[:1], "improved"),
        watches=every(RECORDED[:1], {"accuracy"}),
        causes={"recorded": {"weights"}},
        exactness=every(RECORDED, "changed"),
    ),
]


def git(root: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=Test", "-c", "user.email=test@localhost", "-c", "gc.auto=0"]
    done = subprocess.run(
        ["git", *settings, *arguments], cwd=root, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("regression") / "suite"
    root.mkdir()
    git(root, "init", "--quiet", "--initial-branch=main")
    for number, expected in enumerate(COMMITS):
        expected.make(root)
        git(root, "add", "--all")
        git(root, "commit", "--quiet", "--message", expected.subject)
        git(root, "tag", f"c{number}")
    return root


@pytest.fixture(scope="module")
def tracked(repository: Path) -> Regressions:
    """All commands of this file share an output folder, so each commit is run once."""
    for name in [name for name in os.environ if name.startswith("NEMF_")]:
        os.environ.pop(name)
    return Regressions(repository, repository / "outputs")


@pytest.mark.parametrize("number", range(1, len(COMMITS)))
def test_every_commit_gets_the_verdict_that_was_written_down(
    tracked: Regressions, number: int
) -> None:
    expected = COMMITS[number]
    report = tracked.compare(f"c{number - 1}", f"c{number}", cost=expected.cost)
    cells = {cell["cell"]: cell for cell in report.content["cells"]}
    text = report.markdown
    assert {n: c["verdict"] for n, c in cells.items()} == every(
        CELLS, "same"
    ) | expected.verdicts, text
    assert report.failed == expected.fails, text
    for name, cell in cells.items():
        if cell["exactness"] is None:
            continue
        watches = {reason["watch"] for reason in cell["reasons"]}
        assert watches == expected.watches.get(name, set()), name
        causes = {cause["what"] for cause in cell["causes"]}
        assert causes == expected.causes.get(name.partition("/")[0], set()), name
        assert cell["exactness"]["status"] == expected.exactness.get(name, "byte-equal"), name


def test_what_the_half_pixel_moved_is_measured(tracked: Regressions) -> None:
    report = tracked.compare("c3", "c4", cost=False)
    (cell,) = (c for c in report.content["cells"] if c["cell"] == NEAREST[0])
    moved = cell["exactness"]
    assert moved["n_moved"] == moved["n_keypoints"]
    assert moved["shift"] == pytest.approx([0.5, 0.5], abs=0.01)
    assert moved["median_px"] == pytest.approx(0.5**0.5, abs=0.01)
    assert all(abs(test["difference"]) < 0.02 for test in cell["accuracy"]["tests"][:2])
    assert "(+0.50, +0.50) px" in report.markdown


def test_an_unchanged_key_is_not_predicted_again(tracked: Regressions) -> None:
    tracked.compare("c0", "c1", cost=False)
    files = list((tracked.scratch / "store").glob("predictions/nearest*/*/*/*/predictions.parquet"))
    sources = {  # c1 shares with c0; c2, c3 and c4 have keys of their own
        json.loads((f.parent / "cell.json").read_text())["code"]["commit"] for f in files
    }
    commits = {git(tracked.repository.root, "rev-parse", f"c{k}"): k for k in range(12)}
    assert 1 not in {commits[sha] for sha in sources}
    assert {0, 2, 3, 4} <= {commits[sha] for sha in sources}


def restricted(tracked: Regressions, *cells: str, cost: bool) -> Regressions:
    """The same folders; some cells only, timed or not."""
    part = Regressions(tracked.repository.root, tracked.out, cells=cells)
    if not cost:
        untimed = dataclasses.replace(part.policy.cost, predictions=())
        part.policy = dataclasses.replace(part.policy, cost=untimed)
    return part


def culprits(report: Report) -> dict[str, set[tuple[str, str]]]:
    assert not any(found["or_one_of"] for found in report.content["culprits"])
    return {
        found["first_bad"]["subject"]: {(hit["cell"], hit["watch"]) for hit in found["worse"]}
        for found in report.content["culprits"]
    }


def test_bisect_names_every_culprit(tracked: Regressions) -> None:
    report = restricted(tracked, cost=False).bisect("c0..c9")
    assert culprits(report) == {
        COMMITS[4].subject: {(cell, "exactness") for cell in NEAREST},
        COMMITS[7].subject: {(NEAREST[1], "scoring"), (RECORDED[1], "scoring")},
        COMMITS[8].subject: {(RECORDED[0], "accuracy")},
    }, report.markdown


def test_bisect_finds_a_slow_down(tracked: Regressions) -> None:
    report = restricted(tracked, NEAREST[0], cost=True).bisect("c6..c9")
    assert culprits(report) == {COMMITS[9].subject: {(NEAREST[0], "cost")}}, report.markdown


def test_bisect_skips_what_does_not_run_and_takes_few_runs(tracked: Regressions) -> None:
    report = restricted(tracked, NEAREST[0], cost=False).bisect("c1..c9")  # c5 in the middle
    assert set(culprits(report)) == {COMMITS[4].subject}
    runs = report.content["runs"]
    assert len(runs) <= 5  # of 8 commits: the last, log2(8) = 3, and the one that is skipped
    skipped = [run for run in runs if run["problems"]]
    assert [run["subject"] for run in skipped] == [COMMITS[5].subject]
    assert "does not run (unexpected ImportError" in skipped[0]["problems"][0]


def test_the_history_marks_the_changes(tracked: Regressions) -> None:
    report = tracked.history(len(COMMITS), "c11")
    changes = {
        (change["at"], change["cell"], change["verdict"]) for change in report.content["changes"]
    }
    assert changes == {
        *((4, cell, "worse") for cell in NEAREST),
        *((7, cell, "worse") for cell in (NEAREST[1], RECORDED[1])),
        (8, RECORDED[0], "worse"),
        *((10, cell, "not comparable") for cell in CELLS),
        (11, RECORDED[0], "improved"),
    }, report.markdown
    series = report.content["series"][RECORDED[0]]
    assert [k for k, point in enumerate(series) if point["pck"] is None] == [5]
    assert all(p["low"] < p["pck"] < p["high"] for p in series if p["pck"] is not None)
    drawn = [file for file in report.files if file.suffix in (".png", ".pdf")]
    assert len(drawn) == 2
    assert all(file.stat().st_size > 5000 for file in drawn)


def test_no_worktree_is_left(tracked: Regressions) -> None:
    assert len(git(tracked.repository.root, "worktree", "list").splitlines()) == 1
    assert git(tracked.repository.root, "status", "--porcelain") == ""
