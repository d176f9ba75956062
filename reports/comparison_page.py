"""The page of a comparison: its conclusion in one sentence, tables in Markdown, curves.

Everything here reads the content of a comparison.json (:mod:`reports.comparison` makes it) and
computes nothing new.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemf.files import write_whole
from nemf.pairs import FLAGS
from reports.wording import FLAG_LEVELS, SAYS_NOTHING, code_text, dataset_title, is_part

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def headline(comparison: dict[str, Any], alpha: float) -> dict[str, Any]:
    """The cell of all pairs at ``alpha``, which the conclusion is about."""
    (cell,) = (
        c
        for c in comparison["cells"]
        if (c["measure"], c["group"], c["alpha"]) == ("pck", "all", alpha)
    )
    return cell


def conclusion(content: dict[str, Any], comparison: dict[str, Any]) -> str:
    """One sentence that can be quoted, with its evidence: which weights are ahead on what, by how
    much, how sure that is, and in how many classes; or that no difference is shown."""
    a, b, cell = comparison["a"], comparison["b"], headline(comparison, content["alpha"])
    difference, low, high = (cell[key] for key in ("difference", "low", "high"))
    where = f"On {_where(content)}"
    if cell["method"] == "identical":
        return f"{where} {a} and {b} score alike on every pair."
    shown = f"{_points(difference, sign=True)} points"
    if low is None:
        return (
            f"{where} nothing can be said of {a} against {b}: they differ by {shown}, but so few "
            "images determine no interval."
        )
    p, classes = _p_text(cell["p_conclusion"]), _class_clause(content, comparison)
    if len(content["comparisons"]) > 1:
        p += f" (Holm's correction over {len(content['comparisons'])} comparisons)"
    if not _is_below(cell["p_conclusion"], content):
        return (
            f"{where} no difference between {a} and {b} is shown: {shown} "
            f"[{_points(low)}, {_points(high)}], {p}{classes}; one may be there all the same."
        )
    word = "ahead of"
    if difference < 0:
        word, low, high = "behind", -high, -low
    return (
        f"{where} {a} is {word} {b} by {_points(abs(difference))} points "
        f"[{_points(low)}, {_points(high)}], {p}{classes}."
    )


def _where(content: dict[str, Any]) -> str:
    data, rule = content["dataset"], content["protocol"]["id"]
    pairs = f"{data['n_pairs']:,} pairs of {data['n_images']:,} images"
    if is_part(data):
        pairs = f"{data['n_pairs']:,} of its {data['official_pairs']:,} pairs, "
        pairs += f"{data['n_images']:,} images"
    return (
        f"{dataset_title(data)} ({pairs}, {rule}, PCK@{content['alpha']:.2f} per {content['by']})"
    )


def _class_clause(content: dict[str, Any], comparison: dict[str, Any]) -> str:
    """In how many classes a is ahead or behind; nothing where there is only one class."""
    wanted = ("pck", "class", content["alpha"])
    cells = [c for c in comparison["cells"] if (c["measure"], c["group"], c["alpha"]) == wanted]
    if len(cells) < 2:
        return ""
    # a mean of differences that cancel may miss zero by rounding
    sides = {
        "ahead": [c for c in cells if c["difference"] > 1e-12],
        "behind": [c for c in cells if c["difference"] < -1e-12],
    }
    proven = {s: sum(_is_below(c["p_holm"], content) for c in of) for s, of in sides.items()}
    cell = headline(comparison, content["alpha"])
    if not _is_below(cell["p_conclusion"], content):
        text = f"; ahead in {len(sides['ahead'])} and behind in {len(sides['behind'])}"
        each = f"significantly in {proven['ahead']} and {proven['behind']}"
        each = each if any(proven.values()) else "none of them significantly"
        return f"{text} of {len(cells)} classes, {each} after Holm's correction"
    word, other = ("ahead", "behind") if cell["difference"] > 0 else ("behind", "ahead")
    text = f"; {word} in {len(sides[word])} of {len(cells)} classes, {proven[word] or 'none'} of "
    text += "them significantly after Holm's correction"
    return text + (f", and significantly {other} in {proven[other]}" if proven[other] else "")


def _is_below(p: float | None, content: dict[str, Any]) -> bool:
    """Whether there is a p-value and it is below 1 - level."""
    return p is not None and p < 1 - content["level"]


def caveat(content: dict[str, Any]) -> str:
    """What the conclusions do not say."""
    text = (
        "A claim about these weights on images like these, not about the methods: that needs at "
        "least three training seeds a side."
    )
    if content["contamination"].get("n_images"):
        text += " Some of the images are training images too (see the notes)."
    if content["dataset"]["synthetic"]:
        text += " Synthetic stand-ins say nothing about photographs."
    return text


def markdown(content: dict[str, Any]) -> str:
    data = content["dataset"]
    letters = {run["label"]: run["letter"] for run in content["runs"]}
    title = f"{data['title']} {data['split']}"
    if data["synthetic"]:
        title += SAYS_NOTHING
    lines = [f"# {' against '.join(letters)} on {title}", ""]
    lines += [f"{content['protocol']['description']}.", "", *_run_table(content), ""]
    for comparison in content["comparisons"]:
        a, b = letters[comparison["a"]], letters[comparison["b"]]
        lines += [f"## {a} − {b}: {comparison['a']} less {comparison['b']}", ""]
        for alpha in content["alphas"]:
            lines += [*_cell_table(content, comparison, alpha, a, b), ""]
        lines += [*_other_measures(content, comparison, a, b), ""]
        lines += [*_pair_table(content, comparison, a, b), ""]
    lines += ["## Notes", "", *(f"- {note}" for note in _notes(content)), ""]
    lines += ["## Conclusion", ""]
    for comparison in content["comparisons"]:
        lines += [comparison["conclusion"], ""]
    return "\n".join([*lines, caveat(content)]) + "\n"


def _run_table(content: dict[str, Any]) -> list[str]:
    alpha = content["alpha"]
    head = ["", "Run", *(f"PCK@{x:g}" for x in content["alphas"])]
    area = f"Area 0–{content['area_range'][1]:g}"
    head += [f"PCK†@{alpha:g}", area, "Left/right confused", "Unanswered"]
    lines = [_row(head), _row(["---"] * 2 + ["---:"] * (len(head) - 2))]
    for run in content["runs"]:
        dagger = next((e for e in run["dagger"] or [] if e["alpha"] == alpha), None)
        values = [*run["pck"], dagger, run["area"], run["left_right"]]
        label = run["label"] + (" (made elsewhere)" if run["origin"] == "external" else "")
        cells = [_mean_text(value) for value in values]
        lines.append(_row([run["letter"], label, *cells, str(run["n_unanswered"])]))
    return lines


def _cell_table(
    content: dict[str, Any], comparison: dict[str, Any], alpha: float, a: str, b: str
) -> list[str]:
    head = [f"PCK@{alpha:g}", "pairs", "images", a, b, f"{a} − {b}", "p", "p (Holm)"]
    head.append("win / tie / loss")
    lines = [_row(head), _row(["---"] + ["---:"] * (len(head) - 1))]
    for cell in comparison["cells"]:
        if (cell["measure"], cell["alpha"]) != ("pck", alpha):
            continue
        counts = " / ".join(f"{cell[key]}" for key in ("wins", "ties", "losses"))
        lines.append(
            _row(
                [_group_text(cell), f"{cell['n_pairs']}", f"{cell['n_images']}"]
                + [_points(cell["a_mean"]), _points(cell["b_mean"]), *_tested(content, cell)]
                + [counts]
            )
        )
    return lines


def _other_measures(
    content: dict[str, Any], comparison: dict[str, Any], a: str, b: str
) -> list[str]:
    head = ["All pairs", "pairs", a, b, f"{a} − {b}", "p", "p (Holm)", "win / tie / loss"]
    lines = [_row(head), _row(["---"] + ["---:"] * (len(head) - 1))]
    for cell in comparison["cells"]:
        title = {
            "dagger": f"PCK†@{cell['alpha'] or 0:g}",
            "area": f"area under PCK, alpha 0–{content['area_range'][1]:g}",
            "left_right": "left/right confused (less is better)",
        }.get(cell["measure"])
        if title is None:
            continue
        wins, losses = cell["wins"], cell["losses"]
        if cell["measure"] == "left_right":  # a higher rate is no win
            wins, losses = losses, wins
        means = [_points(cell["a_mean"]), _points(cell["b_mean"])]
        counts = f"{wins} / {cell['ties']} / {losses}"
        lines.append(_row([title, f"{cell['n_pairs']}", *means, *_tested(content, cell), counts]))
    return lines


def _pair_table(content: dict[str, Any], comparison: dict[str, Any], a: str, b: str) -> list[str]:
    entries = comparison["most_different"]
    if not entries:
        return [f"No pair differs at alpha {content['alpha']:g}."]
    drawn = all("pictures" in entry for entry in entries)
    head = ["Differ most", "class", a, b] + ["truth", a, b] * drawn
    lines = [_row(head), _row(["---"] * len(head))]
    for entry in entries:
        cells = [f"`{entry['pair']}`", entry["category"]]
        cells += [_points(entry["a_pck"]), _points(entry["b_pck"])]
        if drawn:
            pictures = entry["pictures"]
            cells += [f"![{which}]({pictures[which]})" for which in ("truth", "a", "b")]
        lines.append(_row(cells))
    return lines


def _notes(content: dict[str, Any]) -> list[str]:
    data, level, n = content["dataset"], content["level"], len(content["comparisons"])
    kind = "SYNTHETIC " if data["synthetic"] else ""
    own = f"corrected over the {n} comparisons" if n > 1 else "not corrected"
    keypoints = ", counting its keypoints" if content["by"] == "point" else ""
    what = (
        f"{kind}{data['title']} {data['split']}: {data['n_pairs']} pairs of {data['n_images']} "
        f"images, {data['n_keypoints']} keypoints, fingerprint {data['fingerprint'][:12]}."
    )
    units = (
        f"PCK in percent, differences in percentage points, [{level:.0%} interval] that counts "
        "images, not pairs, as independent (docs/statistics.md). Win, tie and loss count pairs. "
        f"All pairs: every pair weighs the same{keypoints}; class mean: every class does."
    )
    correction = (
        f"p (Holm) is corrected over all {content['holm_tests']} tests of this page: every row of "
        f"every comparison, at every alpha. Bold: below {1 - level:.2g}. The conclusion is about "
        f"one cell fixed beforehand, all pairs at alpha {content['alpha']:g}; its p is {own}."
    )
    area = (
        f"Area: under the PCK curve for alpha from 0 to {content['area_range'][1]:g}, as a share "
        "of the area under a curve that is 1 throughout; exact, not a sum over some alphas. "
        "curves.png and curves.pdf show the curves; their bands are pointwise and not corrected."
    )
    notes = [what, units, correction, area, _dagger_text(content), _left_right_text(content)]
    notes.append(_contamination_text(content))
    if not content["pictures"]["available"]:
        notes.append(f"No pictures: {content['pictures']['reason']}.")
    for run in content["runs"]:
        notes.append(f"{run['letter']} = {run['label']}: {_origin_text(run)}.")
    if content["compared_by"]:
        notes.append(f"Compared by {code_text(content['compared_by'])}.")
    return notes


def _dagger_text(content: dict[str, Any]) -> str:
    if not content["dagger"]["available"]:
        return f"PCK†: not available ({content['dagger']['reason']})."
    return (
        "PCK†: a keypoint is wrong as well if its prediction is nearer to another annotated "
        "keypoint of the reference object than to its own (Aygün & Mac Aodha, ECCV 2022)."
    )


def _left_right_text(content: dict[str, Any]) -> str:
    sides = content["left_right"]
    if not sides["available"]:
        return f"Left/right confusions: not available ({sides['reason']})."
    return (
        f"Left/right confused: of {sides['n_keypoints']} keypoints whose mirrored keypoint is "
        "known in the reference image, the share predicted nearer to that one than to the true "
        "one; blind guessing confuses about half."
    )


def _contamination_text(content: dict[str, Any]) -> str:
    found = content["contamination"]
    if not found["checked"]:
        return f"Training images among these images: not checked ({found['reason']})."
    data = content["dataset"]
    if not found["n_images"]:
        return (
            f"None of the {data['n_images']} images is among the {found['n_training_images']} of "
            f"{data['title']}'s training split (by content hash)."
        )
    return (
        f"CONTAMINATION: {found['n_images']} of the {data['n_images']} images, in "
        f"{found['n_pairs']} pairs, are images of {data['title']}'s training split too "
        f"(by content hash; comparison.json lists them)."
    )


def _origin_text(run: dict[str, Any]) -> str:
    matcher = run["matcher"]
    parts = [f"predictions {run['predictions_sha256'][:12]}"]
    if run["origin"] == "external":
        parts.append(f"made elsewhere from file {matcher['file_sha256'][:12]}")
    elif matcher.get("weights_sha256"):
        parts.append(f"weights {matcher['weights_sha256'][:12]}")
    if run["code"]:
        parts.append(code_text(run["code"]))
    return ", ".join(parts)


def _group_text(cell: dict[str, Any]) -> str:
    if cell["group"] in FLAGS:
        return f"{cell['group']} {cell['value']} ({FLAG_LEVELS[cell['group']][int(cell['value'])]})"
    return "all pairs" if cell["group"] == "all" else cell["value"]


def _tested(content: dict[str, Any], cell: dict[str, Any]) -> list[str]:
    """Difference with interval, p, corrected p."""
    difference = _points(cell["difference"], sign=True)
    if cell["low"] is None:
        return [f"{difference} [no interval]", "–", "–"]
    interval = f"{difference} [{_points(cell['low'])}, {_points(cell['high'])}]"
    p, corrected = (_p_text(cell[key]).removeprefix("p = ") for key in ("p", "p_holm"))
    if _is_below(cell["p_holm"], content):
        corrected = f"**{corrected.removeprefix('p ')}**"
    return [interval, p.removeprefix("p "), corrected.removeprefix("p ")]


def _mean_text(value: dict[str, Any] | None) -> str:
    if value is None:
        return "–"
    if value["low"] is None:
        return f"{_points(value['mean'])} [no interval]"
    return f"{_points(value['mean'])} [{_points(value['low'])}, {_points(value['high'])}]"


def _points(fraction: float, *, sign: bool = False) -> str:
    """Percent (points) with one decimal; a minus sign that does not look like a dash in a range."""
    text = f"{100 * fraction:+.1f}" if sign else f"{100 * fraction:.1f}"
    return text.replace("-0.0", "0.0").replace("+0.0", "0.0").replace("-", "−")


def _p_text(p: float | None) -> str:
    if p is None:
        return "no test"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


# -- figure ---------------------------------------------------------------------------------------


def draw_curves(content: dict[str, Any], folder: Path) -> list[Path]:
    """``curves.png`` and ``curves.pdf``: PCK over alpha of every run (left) and the paired
    differences (right), each with its pointwise interval. ``content`` as in comparison.json.

    NemfError if they cannot be written.
    """
    import matplotlib
    import seaborn
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    data = content["dataset"]
    letters = {run["label"]: run["letter"] for run in content["runs"]}
    style = {"pdf.fonttype": 42, "font.size": 9, "axes.labelsize": 9, "axes.titlesize": 9}
    style |= {"legend.fontsize": 8, "grid.linewidth": 0.4}
    files = [folder / "curves.png", folder / "curves.pdf"]
    with matplotlib.rc_context(seaborn.axes_style("whitegrid") | style):
        rows = (len(content["runs"]) + len(content["comparisons"]) + 1) // 2
        figure = Figure(figsize=(7.2, 3.5 + 0.17 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        curves, differences = figure.subplots(1, 2)
        for k, run in enumerate(content["runs"]):
            name = f"{run['letter']}: {run['label']}"
            _draw_band(curves, run["curve"], "mean", name, k)
        for k, comparison in enumerate(content["comparisons"]):
            name = f"{letters[comparison['a']]} − {letters[comparison['b']]}"
            _draw_band(differences, comparison["curve"], "difference", name, k + 1)
        differences.axhline(0, color="black", lw=0.8)
        curves.set(ylabel="PCK (%)", ylim=(0, None), title="PCK of each run")
        differences.set(
            ylabel="difference (points)", title="paired differences (above 0: the first is ahead)"
        )
        for axes in (curves, differences):
            axes.set(xlabel="alpha", xlim=(0, content["area_range"][1]))
            axes.axvline(content["alpha"], color="0.3", lw=0.9, ls=":", zorder=1)
            axes.legend(loc="upper left", bbox_to_anchor=(0, -0.2), frameon=False)
            seaborn.despine(ax=axes)
        kind = "SYNTHETIC stand-ins for " if data["synthetic"] else ""
        figure.suptitle(
            f"{kind}{data['title']} {data['split']}, {content['protocol']['id']}, "
            f"per {content['by']}; {content['level']:.0%} bands, pointwise",
            fontsize=9,
        )
        for file in files:
            ending = file.suffix[1:]
            # no date, so that the same comparison gives the same bytes
            plain = {"metadata": {"CreationDate": None}} if ending == "pdf" else {"dpi": 200}
            write_whole(file, lambda to, e=ending, p=plain: figure.savefig(to, format=e, **p))
    return files


def _draw_band(axes: Axes, curve: dict[str, Any], what: str, name: str, number: int) -> None:
    """A line with its band, in percent; told apart by colour and, for grey print, by dashes."""
    import seaborn

    palette = seaborn.color_palette("colorblind")
    dashes = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
    colour, dash = palette[number % len(palette)], dashes[number % len(dashes)]
    x = np.array(curve["alphas"])
    middle, low, high = (
        100 * np.array([np.nan if v is None else v for v in curve[key]])
        for key in (what, "low", "high")
    )
    axes.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
    axes.plot(x, middle, color=colour, ls=dash, lw=1.6, label=name)
