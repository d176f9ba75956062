"""Writes the measured tables of worked-examples.md: one matcher, scored under every protocol.

    python docs/worked_examples.py [FOLDER]

FOLDER (default: a temporary one) receives the synthetic stand-ins and the predictions.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nemf.predictions import Predictions
from nemf.scoring import PROTOCOLS, Protocol
from reports.records import current_predictions, score_pairs
from reports.statistics import dyadic_mean
from reports.wording import STAND_INS

PAGE = Path(__file__).with_name("worked-examples.md")
MATCHER, ALPHA = "hpf_small", 0.1
DATASETS = {"spair": "SPair-71k", "pfpascal": "PF-PASCAL", "pfwillow": "PF-WILLOW"}
PLANS = {
    "src2trg-own": "Queries in the source, each image on its own canvas",
    "trg2src-own": "Queries in the target, each image on its own canvas",
    "trg2src-pair": "Queries in the target, both images padded to the pair's common size",
}
_BLOCK = re.compile(r"(<!-- measured:begin -->\n).*(<!-- measured:end -->)", re.DOTALL)


def predict(folder: Path) -> None:
    """Renders the stand-ins into ``folder`` and predicts them once for every plan."""
    nemf("data", "make-synthetic", folder / "data")
    for protocol in first_of_plans().values():
        for dataset in DATASETS:
            name = f"{MATCHER}/{dataset}"
            where = ("--data", folder / "data", "--out", folder)
            nemf("predict", name, "--protocol", protocol.id, *where)


def first_of_plans() -> dict[str, Protocol]:
    """A protocol for every plan."""
    found: dict[str, Protocol] = {}
    for protocol in PROTOCOLS.values():
        found.setdefault(str(protocol.plan), protocol)
    if found.keys() != PLANS.keys():
        raise SystemExit(f"{__file__}: describe the plans {', '.join(found)} in PLANS")
    return found


def nemf(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "experiments.cli", *map(str, arguments)], check=True)


def tables(folder: Path) -> Iterator[str]:
    """Lines of Markdown: a table for every plan, the protocols of that plan below each other."""
    files = {}
    for file in current_predictions(folder):
        predictions = Predictions.read(file)
        files[predictions.meta["dataset"], predictions.meta["plan"]] = predictions
    yield f"{STAND_INS}, `{MATCHER}`, PCK@{ALPHA:g} in percent: per image / per point."
    for plan, title in PLANS.items():
        yield from ("", f"**{title}** (`{plan}`)", "")
        yield f"| protocol | {' | '.join(DATASETS.values())} |"
        yield "|---|" + "---:|" * len(DATASETS)
        for protocol in PROTOCOLS.values():
            if str(protocol.plan) == plan:
                cells = []
                for dataset in DATASETS:
                    layout_plan = str(protocol.plan.for_layout(dataset))
                    cells.append(cell(files[dataset, layout_plan], protocol))
                yield f"| `{protocol.id}` | {' | '.join(cells)} |"


def cell(predictions: Predictions, protocol: Protocol) -> str:
    """Per-image and per-point PCK."""
    frame = score_pairs(predictions, protocol, [ALPHA]).frame
    n = frame["n"].to_numpy()
    fractions = frame[f"pck-{ALPHA:.2f}"].to_numpy() / n
    images = frame["image_a"].to_numpy(), frame["image_b"].to_numpy()
    means = [dyadic_mean(fractions, *images, weights=w).mean for w in (None, n)]
    return " / ".join(f"{100 * mean:.1f}" for mean in means)


def main() -> None:
    if len(sys.argv) > 1:
        predict(folder := Path(sys.argv[1]))
        lines = list(tables(folder))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            predict(Path(temporary))
            lines = list(tables(Path(temporary)))
    text = PAGE.read_text(encoding="utf-8")
    block = "\n".join(lines) + "\n"
    PAGE.write_text(_BLOCK.sub(lambda m: m[1] + block + m[2], text), encoding="utf-8")


if __name__ == "__main__":
    main()
