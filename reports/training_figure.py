"""Training curves as a figure, from what a training leaves beside its weights. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemf.datasets import dataset_class
from nemf.files import write_whole
from nemf.match_pictures import COLOURS
from nemf.reading import read_json
from reports.figure_files import PAGE_IN, CannotDraw, write_figure
from reports.wording import dataset_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def finished_trainings(out: Path) -> list[Path]:
    """The stories (``<name>.json``) of the finished trainings below ``out`` that have a curve.
    CannotDraw if there is none, NemfError for one that cannot be read."""
    files = sorted(out.glob("training/*/*.json"))
    files = [file for file in files if _story(file).get("curve")]
    if not files:
        raise CannotDraw(f"{out} holds no finished training with a curve: run `nemf train`")
    return files


def training_figure(file: Path) -> dict[str, Any]:
    """Content of the curves of one training: losses and validation PCK by epoch."""
    story = _story(file)
    sides = {side: story.get("datasets", {}).get(f"{side}_dataloader") for side in ("train", "val")}
    caption = f"Training of {file.stem}: losses (mean over an epoch) and validation PCK by epoch. "
    for side, name in (("train", "Trained on"), ("val", "validated on")):
        caption += f"{name} {_data_text(sides[side], story, side)}; "
    chosen = story.get("validation") or {}
    if chosen:
        caption += f"the weights are those of epoch {chosen['epoch']}, the best validation."
    else:
        caption += "the weights are those of the last epoch."
    return {
        "figure": "training",
        "caption": caption,
        "name": file.stem,
        "datasets": sides,
        "validation": chosen,
        "curve": story["curve"],
        "key": story.get("key"),
        "weights_file_sha256": story.get("sha256"),
        "code": story.get("code"),
    }


def _data_text(facts: dict[str, Any] | None, story: dict[str, Any], side: str) -> str:
    if not facts:
        return "data that the training does not name"
    title = dataset_title(
        {"title": dataset_class(facts["dataset"]).title}
        | {key: facts[key] for key in ("split", "synthetic")}
    )
    if side == "train":
        return f"{title} ({facts['pairs']:,} pairs)"
    rules = story.get("settings", {}).get("val_cfg") or {}
    pairs = min(rules.get("pairs") or facts["pairs"], facts["pairs"])
    return (
        f"{title} ({pairs:,} of {facts['pairs']:,} pairs, {rules.get('protocol', 'canonical@1')})"
    )


def _story(file: Path) -> dict[str, Any]:
    story = read_json(file, "a training's story")
    return story if isinstance(story, dict) else {}


def draw_training(content: dict[str, Any], base: Path) -> list[Path]:
    """Losses on the left, validation PCK on the right. NemfError if a file cannot be written."""

    def draw(figure: Figure) -> None:
        _plot(*figure.subplots(1, 2), {"": content["curve"]})

    return write_figure(base, content, (PAGE_IN, 2.4), draw)


def draw_curves(curves: Mapping[str, Sequence[Mapping[str, float]]], file: Path) -> None:
    """Training curves by label as PNG: losses (left) and validation PCK in % (right) over epochs.

    Each curve is a list of entries with ``epoch``, ``loss`` and the parts ``loss_*``, and, where a
    validation took place, ``pck-<alpha>`` fractions. NemfError if the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    _plot(*figure.subplots(1, 2), curves)
    write_whole(file, lambda temporary: figure.savefig(temporary, format="png"))


def _plot(left: Axes, right: Axes, curves: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    from matplotlib.ticker import MaxNLocator

    styles = ("-", "--", ":", "-.")
    for number, (label, entries) in enumerate(curves.items()):
        colour = COLOURS[(4, 5, 2, 6, 0, 1, 3)[number % len(COLOURS)]]
        for axes, prefix, scale in ((left, "loss", 1), (right, "pck-", 100)):
            names = sorted({name for entry in entries for name in entry if name.startswith(prefix)})
            if prefix == "loss" and len(names) == 2:
                names.remove("loss")  # a single part is the whole
            if prefix == "pck-":
                names.reverse()
            for name, style in zip(names, styles * len(names), strict=False):
                points = [
                    (entry["epoch"], scale * entry[name]) for entry in entries if name in entry
                ]
                axes.plot(
                    *zip(*points, strict=True), style, color=colour, marker=".",
                    label=f"{label} {name}".strip(),
                )  # fmt: skip
    left.set_title("training loss")
    right.set_title("validation PCK (%)")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
