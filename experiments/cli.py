"""The command line: ``nemf <verb>``. Heavy imports wait until a verb needs them."""

from __future__ import annotations

import ast
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from nemf.errors import NemfError

_DATA = click.option(
    "--data", "data", type=click.Path(path_type=Path), envvar="NEMF_DATA", show_envvar=True,
    help="Folder that holds the datasets.",
)  # fmt: skip
_OUT = click.option(
    "--out", type=click.Path(path_type=Path), default=Path("outputs"), show_default=True,
    help="Where predictions, scores, tables and mlflow.db go.",
)  # fmt: skip
_WEIGHTS = click.option(
    "--weights", type=click.Path(path_type=Path), envvar="NEMF_WEIGHTS", show_envvar=True,
    help="Folder of backbones and checkpoints.",
)  # fmt: skip
_DOWNLOAD = click.option(
    "--download", is_flag=True, help="Fetch published backbone weights (hash checked) if missing."
)
_OPTIONS = click.option(
    "--cfg-options", "options", multiple=True, metavar="KEY=VALUE",
    help="Override a config entry, e.g. model.layers=(4,6). Repeatable.",
)  # fmt: skip
_JSON = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
_ALPHAS = click.option("--alphas", metavar="A,B,...", help="Thresholds, e.g. 0.05,0.1.")
_MLFLOW = click.option(
    "--mlflow/--no-mlflow", "use_mlflow", default=True, show_default=True,
    help="Mirror the results to $MLFLOW_TRACKING_URI, or else to mlflow.db in --out.",
)  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show tracebacks and debug messages.")
@click.version_option(package_name="nemf")
def main_group(debug: bool) -> None:
    """Benchmark suite for semantic correspondence."""
    level = logging.DEBUG if debug else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for package in ("nemf", "baselines", "experiments", "reports"):
        logging.getLogger(package).setLevel(level)


def main() -> None:
    """Entry point. Problems that a user can act on end in one line and status 2."""
    debug = "--debug" in sys.argv
    try:
        main_group(standalone_mode=False)
    except click.exceptions.Abort:
        _fail("stopped; the same command goes on where it was", 130)
    except click.ClickException as problem:
        problem.show()
        sys.exit(problem.exit_code)
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except KeyboardInterrupt:
        _fail("stopped; the same command goes on where it was", 130)
    except NemfError as problem:
        if debug:
            raise
        _fail(str(problem), 2)
    except BrokenPipeError:
        sys.exit(141)
    except OSError as problem:
        if debug:
            raise
        where = f"{problem.filename}: " if problem.filename else ""
        _fail(f"{where}{problem.strerror or problem}", 2)
    except Exception as problem:
        if debug:
            raise
        _fail(f"unexpected {type(problem).__name__}: {problem} (--debug shows where)", 1)


def _fail(message: str, status: int) -> None:
    click.echo(f"nemf: {' '.join(message.split())}", err=True)
    sys.exit(status)


# -- list -----------------------------------------------------------------------------------------


@main_group.command("list")
@click.argument(
    "what", type=click.Choice(["matchers", "datasets", "protocols", "configs"]), required=False
)
@_JSON
def list_command(what: str | None, as_json: bool) -> None:
    """Matchers, datasets, protocols and configs with their cards."""
    import dataclasses

    from nemf.cards import available_matchers
    from nemf.datasets import available_datasets
    from nemf.scoring import available_protocols

    listing: dict[str, dict[str, Any]] = {
        "matchers": {name: card.as_dict() for name, card in available_matchers().items()},
        "datasets": available_datasets(),
        "protocols": {
            name: dataclasses.asdict(p) | {"threshold_side": p.threshold_side}
            for name, p in available_protocols().items()
        },
        "configs": _config_listing() if what == "configs" else {},
    }
    shown = {what: listing[what]} if what else {k: v for k, v in listing.items() if v}
    if as_json:
        click.echo(json.dumps(shown, indent=1))
        return
    for kind, entries in shown.items():
        click.echo(click.style(kind, bold=True))
        for name, entry in entries.items():
            click.echo(f"  {name:<16} {_summary(kind, entry)}")


def _config_listing() -> dict[str, Any]:
    from experiments.configurations import config_names

    return {f"{m}/{d}": {} for m in config_names("matchers") for d in config_names("datasets")}


def _summary(kind: str, entry: dict[str, Any]) -> str:
    if kind == "matchers":
        source = f"{entry['paper']}; {entry['official_protocol']}"
        return f"{entry['title']}: {entry['description']} ({source})"
    if kind == "datasets":
        counts = ", ".join(f"{s} {n:,}" for s, n in entry["official_pairs"].items())
        return f"{entry['title']}; splits {', '.join(entry['splits'])}" + (
            f" ({counts} pairs)" if counts else ""
        )
    if kind == "protocols":
        return f"{entry['note']} ({entry['source']})"
    return ""


# -- data -----------------------------------------------------------------------------------------


@main_group.group("data")
def data_group() -> None:
    """Check, describe and make datasets."""


def _need(path: Path | None, what: str) -> Path:
    if path is None:
        raise NemfError(f"give {what} (or set it in the environment); see --help")
    return path


@data_group.command("verify")
@click.argument("dataset")
@click.option("--split", multiple=True, help="Only these splits (all that are there).")
@_DATA
@_JSON
def verify_command(dataset: str, split: tuple[str, ...], data: Path | None, as_json: bool) -> None:
    """Check every file of a dataset; exit status 1 if there is a problem."""
    from nemf.datasets.verification import verify

    report = verify(dataset, _need(data, "--data"), list(split) or None, progress=not as_json)
    click.echo(json.dumps(report.as_dict(), indent=1) if as_json else str(report))
    sys.exit(0 if report.ok else 1)


@data_group.command("stats")
@click.argument("dataset")
@click.option("--split", default="test", show_default=True)
@_DATA
@_JSON
def stats_command(dataset: str, split: str, data: Path | None, as_json: bool) -> None:
    """Print a dataset's card: pairs, images, keypoints per class, sizes, difficulty flags."""
    from experiments.jobs import open_dataset
    from nemf.datasets.statistics import card, render

    described = card(open_dataset(dataset, _need(data, "--data"), split))
    click.echo(json.dumps(described, indent=1) if as_json else render(described))


@data_group.command("make-synthetic")
@click.argument("root", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True)
@click.option("--preset", default="table1", show_default=True, help="table1 or tiny.")
def make_synthetic_command(root: Path, seed: int, preset: str) -> None:
    """Render the synthetic stand-ins of the three benchmarks into ROOT."""
    from nemf.datasets.synthetic import make_synthetic

    workers = len(os.sched_getaffinity(0))
    for folder in make_synthetic(root, seed=seed, preset=preset, workers=workers, progress=True):
        click.echo(folder)


@data_group.command("queries")
@click.argument("dataset")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--split", default="test", show_default=True)
@click.option("--protocol", default="canonical@1", show_default=True, help="Decides the direction.")
@_DATA
def queries_command(dataset: str, file: Path, split: str, protocol: str, data: Path | None) -> None:
    """Write the questions of a dataset as CSV, for a method outside this suite to answer."""
    from experiments.jobs import open_dataset
    from nemf.files import write_text
    from nemf.predictions import query_list
    from nemf.scoring import get_protocol

    opened = open_dataset(dataset, _need(data, "--data"), split)
    table = query_list(opened, get_protocol(protocol).plan)
    write_text(file, table.to_csv(index=False, lineterminator="\n"))
    click.echo(f"{len(table)} queries of {len(opened)} pairs: {file}")
    click.echo("add the answers as columns x and y, then `nemf score`")


# -- predict, score, table ------------------------------------------------------------------------


@main_group.command("predict")
@click.argument("config", required=False)
@click.option("--table", "table_name", help="Every cell of that table instead of one config.")
@click.option("--matchers", help="With --table: only these matcher configs (comma or space).")
@click.option(
    "--train", "train_missing", is_flag=True, help="With --table: first train its recipes."
)
@click.option("--protocol", default=None, help="Decides the plan [default: canonical@1].")
@click.option("--label", help="Name of the row in tables.")
@_DATA
@_OUT
@_WEIGHTS
@_DOWNLOAD
@_OPTIONS
def predict_command(
    config: str | None,
    table_name: str | None,
    matchers: str | None,
    train_missing: bool,
    protocol: str | None,
    label: str | None,
    data: Path | None,
    out: Path,
    weights: Path | None,
    download: bool,
    options: tuple[str, ...],
) -> None:
    """Predict CONFIG (<matcher>/<dataset> or a file), resuming what a killed run left."""
    data = _need(data, "--data")
    _find_weights(weights, data, download)
    parsed = _parse_options(options)
    if (config is None) == (table_name is None):
        raise NemfError("give either a CONFIG (e.g. hpf_resnet18/pfwillow) or --table 1")
    if table_name is not None:
        from experiments.jobs import predict_table, table_spec

        chosen = tuple((matchers or "").replace(",", " ").split()) or None
        predict_table(table_spec(table_name), data, out, chosen, parsed, train_missing)
        return
    from experiments.configurations import load_config, relabel
    from experiments.prediction import predict
    from nemf.scoring import get_protocol

    loaded = load_config(config, parsed)
    relabel(loaded, parsed, label)
    plan = get_protocol(protocol or "canonical@1").plan
    progress = config if sys.stderr.isatty() else None  # a bar has no place in a log
    click.echo(predict(loaded, data=data, out=out, plan=plan, progress=progress))


def _find_weights(weights: Path | None, data: Path | None, download: bool) -> None:
    """Tells the backbones where to look: --weights or $NEMF_WEIGHTS, else a folder ``weights`` in
    or beside the data root."""
    if weights is not None and not weights.is_dir():
        raise NemfError(f"{weights}: no such folder of weights")
    beside = [data / "weights", data.parent / "weights"] if data else []
    candidates = [weights] if weights else beside
    for folder in candidates:
        if folder.is_dir():
            os.environ["NEMF_WEIGHTS"] = str(folder)
            break
    if download:
        os.environ["NEMF_DOWNLOAD"] = "1"


def _parse_options(options: tuple[str, ...]) -> dict[str, Any]:
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


@main_group.command("score")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--table", "table_name", help="Score everything that table needs in --out.")
@click.option(
    "--protocol", "protocols", multiple=True,
    help="Repeatable [default: all of the file's plan; canonical@1 with --dataset].",
)  # fmt: skip
@_ALPHAS
@click.option("--by", type=click.Choice(["image", "point"]), default="image", show_default=True)
@click.option("--oracle-grid", type=int, help="Score the truth snapped to a GxG grid (a ceiling).")
@click.option("--dataset", help="FILE was made elsewhere (CSV or parquet) for this dataset.")
@click.option("--name", help="Name of the method that made FILE.")
@click.option("--split", default="test", show_default=True)
@_DATA
@_OUT
@_JSON
def score_command(
    file: Path | None,
    table_name: str | None,
    protocols: tuple[str, ...],
    alphas: str | None,
    by: str,
    oracle_grid: int | None,
    dataset: str | None,
    name: str | None,
    split: str,
    data: Path | None,
    out: Path,
    as_json: bool,
) -> None:
    """Score a prediction file: ours, or one made elsewhere (pair, keypoint, x, y)."""
    from experiments.jobs import score_file, score_table, table_spec
    from nemf.predictions import Predictions
    from nemf.scoring import available_protocols, check_alphas, get_protocol

    if (file is None) == (table_name is None):
        raise NemfError("give either a prediction FILE or --table 1")
    if table_name is not None:
        click.echo(f"{score_table(table_spec(table_name), out)} score records written below {out}")
        return
    chosen = [get_protocol(p) for p in protocols]
    values = check_alphas(alphas.split(",")) if alphas else ()
    if dataset is not None:
        chosen = chosen or [get_protocol("canonical@1")]
        file = _adopt(file, dataset, name, split, _need(data, "--data"), out, chosen)
    meta = Predictions.read(file, ["pair"]).meta
    if not chosen:
        chosen = [
            p
            for p in available_protocols().values()
            if str(p.plan.for_layout(meta["layout"])) == meta["plan"]
        ]
    grids = (oracle_grid,) if oracle_grid else ()
    records = list(score_file(file, chosen, values, grids))
    if as_json:
        click.echo(json.dumps(records, indent=1, default=float))
        return
    for record in records:
        _print_record(record, by, values or record["protocol"]["alphas"])


def _adopt(
    file: Path, dataset: str, name: str | None, split: str, data: Path, out: Path, chosen: list[Any]
) -> Path:
    """Takes predictions made elsewhere into the store, as the current cell of that method; what the
    ``chosen`` protocols cannot score is refused before anything is written."""
    from experiments.jobs import open_dataset
    from experiments.store import Cell, slot_folder
    from nemf.predictions import dataset_folder, read_external
    from reports.records import keypoint_errors

    label = name or file.stem
    opened = open_dataset(dataset, data, split)
    predictions = read_external(file, opened, chosen[0].plan, label)
    for protocol in chosen:
        keypoint_errors(predictions, protocol)
    meta = predictions.meta
    cell = Cell(
        slot_folder(out, f"external-{label}", dataset_folder(meta), meta["plan"]), meta["key"]
    )
    predictions.write(cell.file)
    cell.make_current()
    return cell.file


def _print_record(record: dict[str, Any], by: str, alphas: Sequence[float]) -> None:
    meta = record["predictions"]
    kind = "SYNTHETIC " if meta["synthetic"] else ""
    click.echo(
        f"{meta['matcher']['label']} on {kind}{meta['title']} {meta['split']} "
        f"({record['n_pairs']} pairs of {record['n_images']} distinct images, "
        f"{record['n_keypoints']} keypoints, {record['n_unanswered']} unanswered; "
        f"fingerprint {meta['fingerprint'][:12]})"
    )
    click.echo(f"{record['protocol']['description'].replace('per-image', f'per-{by}')}")
    click.echo(f"{'':<28}" + "".join(f"{f'@{a:g}':>20}" for a in alphas))
    rows: dict[str, dict[float, dict[str, Any]]] = {}
    for entry in record["metrics"]:
        if entry["averaging"] == by:
            label = (
                entry["value"]
                if entry["group"] in ("all", "class")
                else f"{entry['group']} {entry['value']}"
            )
            rows.setdefault(f"{label} ({entry['n_pairs']})", {})[entry["alpha"]] = entry
    for label, entries in rows.items():
        click.echo(f"{label:<28}" + "".join(f"{_interval(entries[a]):>20}" for a in alphas))


def _interval(entry: dict[str, Any]) -> str:
    if entry["low"] is None:
        return f"{entry['pck'] * 100:.1f} [?]"
    return f"{entry['pck'] * 100:.1f} [{entry['low'] * 100:.1f}, {entry['high'] * 100:.1f}]"


@main_group.command("table")
@click.argument("name")
@click.option("--synthetic/--real", "synthetic", default=None, help="If both lie in --out.")
@click.option(
    "--from-mlflow", is_flag=True,
    help="First fetch predictions and scores from $MLFLOW_TRACKING_URI into --out.",
)  # fmt: skip
@_MLFLOW
@_DATA
@_OUT
def table_command(
    name: str,
    synthetic: bool | None,
    from_mlflow: bool,
    use_mlflow: bool,
    data: Path | None,
    out: Path,
) -> None:
    """Make table NAME (1, 2, or a specification file) from the records in --out, and a page to look
    at it with; with --data the page shows the pictures."""
    from experiments.jobs import last_job, missing_sentences, rescorer, table_spec
    from reports.page import write_page
    from reports.records import current_records
    from reports.tables import build_table

    spec = table_spec(name)
    fetched = _fetched(out, spec.name, synthetic) if from_mlflow else None
    if fetched is not None:
        synthetic = fetched.synthetic
    found = current_records(out)
    records = [record for _, record in found]
    kinds = {record["predictions"]["synthetic"] for record in records}
    job = last_job(spec, out)
    if synthetic is None:
        synthetic = job["synthetic"] if len(kinds) > 1 else True in kinds
        if synthetic is None:
            raise NemfError(f"{out} holds real and synthetic records: say --real or --synthetic")
    order = _row_order(spec.matchers["synthetic" if synthetic else "real"])
    records.sort(key=lambda r: order.get(r["predictions"]["matcher"]["label"], len(order)))
    shown = [record for record in records if record["predictions"]["synthetic"] == synthetic]
    missing = missing_sentences(job, shown)
    scores_of = rescorer(found, spec.alphas)
    table = build_table(spec, records, synthetic=synthetic, missing=missing, scores_of=scores_of)
    files = [*table.write(out / spec.name), out / spec.name / f"{spec.name}.html"]
    write_page(files[-1], table, found, data=data)
    click.echo(table.markdown())
    if use_mlflow and fetched is None:
        from reports.mlflow_store import tracking_uri, without_password
        from reports.tracking import publish_cells, publish_table, publish_trainings

        job_file = out / spec.name / "job.json"
        published = [*files, *([job_file] if job_file.exists() else [])]
        publish_table(out, table, published, publish_cells(out))
        publish_trainings(out)
        click.echo(f"MLflow: {without_password(tracking_uri(out))}")
    differing = fetched.differing(files) if fetched is not None and fetched.published else []
    for file in files:
        click.echo(f"{file}{' (differs from the published file)' if file in differing else ''}")
    if fetched is not None and data is None and files[-1] in differing:
        click.echo("the published page may show pictures: give --data to rebuild it with them")


def _fetched(out: Path, name: str, synthetic: bool | None) -> Any:
    """The published table, its cells in ``out``."""
    from reports.rebuilding import fetch_table

    if not os.environ.get("MLFLOW_TRACKING_URI"):
        raise NemfError("--from-mlflow needs MLFLOW_TRACKING_URI: the store to fetch from")
    return fetch_table(out, name, synthetic)


def _row_order(matchers: tuple[str, ...]) -> dict[str, int]:
    """Position of each matcher config's label."""
    from experiments.configurations import load_config

    return {load_config(f"{m}/spair").label: i for i, m in enumerate(matchers)}


# -- compare --------------------------------------------------------------------------------------


@main_group.command("compare")
@click.argument("runs", nargs=-1, metavar="A B [C ...]")
@click.option("--dataset", help="Dataset, or a folder's name such as spair-test-synthetic.")
@click.option("--protocol", default="canonical@1", show_default=True)
@click.option("--alpha", default=0.1, show_default=True, help="The one the conclusion is about.")
@_ALPHAS
@click.option("--by", type=click.Choice(["image", "point"]), default="image", show_default=True)
@click.option("--all-pairs", is_flag=True, help="All with all, not only the first with each.")
@_DATA
@_OUT
@_JSON
def compare_command(
    runs: tuple[str, ...],
    dataset: str | None,
    protocol: str,
    alpha: float,
    alphas: str | None,
    by: Any,
    all_pairs: bool,
    data: Path | None,
    out: Path,
    as_json: bool,
) -> None:
    """Compare A with B on the same pairs. Each is a label, matcher or matcher config among the
    current predictions in --out, or a prediction file. With --data: pictures too."""
    from experiments.provenance import code_state
    from experiments.store import slug
    from nemf.scoring import check_alphas, get_protocol
    from reports.comparison import ALPHAS, compare, find_runs

    rule = get_protocol(protocol)
    comparison = compare(
        find_runs(out, [_names_of(name) for name in runs], rule, dataset),
        rule,
        alphas=check_alphas(alphas.split(",")) if alphas else ALPHAS,
        alpha=alpha,
        by=by,
        all_pairs=all_pairs,
        data=data,
        code=code_state(),
    )
    folder = out / "compare" / slug(comparison.name)
    files = comparison.write(folder)
    if as_json:
        click.echo(comparison.json(), nl=False)
        return
    click.echo(comparison.markdown())
    for file in dict.fromkeys(f if f.parent == folder else f.parent for f in files):
        click.echo(file)


def _names_of(name: str) -> tuple[str, ...]:
    """The name as typed and, if a matcher config is called so, the label of its predictions."""
    from experiments.configurations import config_names, load_config

    if name not in config_names("matchers"):
        return (name,)
    return name, load_config(f"{name}/spair").label


# -- figure ---------------------------------------------------------------------------------------


@main_group.command("figure")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--dataset", help="Dataset, or a folder's name such as spair-test-synthetic.")
@click.option(
    "--matchers", help="Only these configs or matchers (comma or space), or labels (semicolon)."
)
@click.option("--protocol", default="canonical@1", show_default=True)
@click.option("--alpha", default=0.1, show_default=True)
@click.option("--pair", "pairs", multiple=True, help="Id of a pair to show. Repeatable.")
@click.option("--keypoint", default=0, show_default=True, help="Its number; of the figure field.")
@_DATA
@_OUT
@_WEIGHTS
@_OPTIONS
def figure_command(
    names: tuple[str, ...],
    dataset: str | None,
    matchers: str | None,
    protocol: str,
    alpha: float,
    pairs: tuple[str, ...],
    keypoint: int,
    data: Path | None,
    out: Path,
    weights: Path | None,
    options: tuple[str, ...],
) -> None:
    """Draw figures (PNG, PDF and the numbers as JSON) of what lies in --out.

    NAME: classes (heat map), curves (PCK over alpha), difficulty, transfer (keypoints on images),
    training, search (NeMF's flow by iteration), field (matching field of a keypoint), or all, which
    leaves out what cannot be made and says why.
    """
    from experiments.figure_jobs import FIGURES, FigureRequest, make_figures
    from experiments.jobs import table_spec
    from nemf.scoring import check_alphas, get_protocol
    from reports.figure_files import CannotDraw

    for name in names:
        if name not in (*FIGURES, "all"):
            raise NemfError(f"unknown figure {name!r}: choose {', '.join(FIGURES)} or all")
    _find_weights(weights, data, False)
    rows = table_spec("1").matchers
    request = FigureRequest(
        out=out,
        protocol=get_protocol(protocol),
        data=data,
        dataset=dataset,
        matchers=tuple(_names_of(name) for name in _listed(matchers)),
        order=tuple(_row_order((*rows["synthetic"], *rows["real"]))),
        pairs=pairs,
        alpha=check_alphas([alpha])[0],
        keypoint=keypoint,
        options=_parse_options(options),
    )
    failed = False
    for name in FIGURES if "all" in names else dict.fromkeys(names):
        for what, result in make_figures(name, request):
            if not isinstance(result, NemfError):
                for file in result:
                    click.echo(file)
            elif isinstance(result, CannotDraw) and "all" in names:
                click.echo(f"not made: {what}: {result}")
            else:
                click.echo(f"nemf: {what}: {result}", err=True)
                failed = True
    sys.exit(2 if failed else 0)


def _listed(names: str | None) -> list[str]:
    """Names separated by commas or spaces; by semicolons if there is one (labels hold both)."""
    if names and ";" in names:
        return [name.strip() for name in names.split(";") if name.strip()]
    return (names or "").replace(",", " ").split()


# -- regress --------------------------------------------------------------------------------------


@main_group.command("regress")
@click.option("--base", metavar="COMMIT", help="Compare with it [default: the accepted scores].")
@click.option("--head", metavar="COMMIT", help="What is compared [default: the working tree].")
@click.option("--accept", metavar="REASON", help="Renew the accepted scores.")
@click.option("--history", type=int, metavar="N", help="The metric over the last N commits.")
@click.option("--bisect", metavar="GOOD..BAD", help="Find the first bad commit.")
@click.option("--cell", "cells", multiple=True, metavar="MATCHER[/DATASET[/PROTOCOL]]",
              help="Only these cells of the policy. Repeatable.")  # fmt: skip
@click.option("--cost/--no-cost", default=True, show_default=True, help="Time both sides (--base).")
@click.option("--policy", type=click.Path(path_type=Path),
              help="[default: experiments/regress.yaml of the repository]")  # fmt: skip
@click.option("--data", type=click.Path(path_type=Path),
              help="Folder of datasets in place of the policy's.")  # fmt: skip
@_OUT
@_WEIGHTS
@_JSON
def regress_command(
    base: str | None,
    head: str | None,
    accept: str | None,
    history: int | None,
    bisect: str | None,
    cells: tuple[str, ...],
    cost: bool,
    policy: Path | None,
    data: Path | None,
    out: Path,
    weights: Path | None,
    as_json: bool,
) -> None:
    """Has a commit made a matcher worse, slower or hungrier? Exit status 1 if so."""
    from experiments.regression import Regressions

    modes = {"--base": base, "--accept": accept, "--history": history, "--bisect": bisect}
    given = [name for name, value in modes.items() if value is not None]
    if len(given) > 1:
        raise NemfError(f"{' and '.join(given)} do not go together: give one of them")
    if head is not None and given and given[0] in ("--accept", "--bisect"):
        raise NemfError(f"{given[0]} takes no --head")
    if weights is not None and not weights.is_dir():
        raise NemfError(f"{weights}: no such folder of weights")
    tracked = Regressions(Path.cwd(), out, policy=policy, data=data, weights=weights, cells=cells)
    if accept is not None:
        report = tracked.accept(accept)
    elif history is not None:
        report = tracked.history(history, head)
    elif bisect is not None:
        report = tracked.bisect(bisect)
    elif base is not None:
        report = tracked.compare(base, head, cost=cost)
    else:
        report = tracked.gate(head)
    if as_json:
        click.echo(json.dumps(report.content, indent=1))
    else:
        click.echo(report.markdown)
        for file in report.files:
            click.echo(file, err=True)
    sys.exit(1 if report.failed else 0)


# -- match, train, bench --------------------------------------------------------------------------


@main_group.command("match")
@click.argument("query", type=click.Path(path_type=Path))
@click.argument("reference", type=click.Path(path_type=Path))
@click.option("--points", required=True, metavar="X,Y X,Y ...", help="Pixels of the query image.")
@click.option("--matcher", default="nearest_resnet18", show_default=True, help="Matcher config.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw the matches into this PNG.")
@_WEIGHTS
@_DOWNLOAD
@_OPTIONS
@_JSON
def match_command(
    query: Path,
    reference: Path,
    points: str,
    matcher: str,
    picture: Path | None,
    weights: Path | None,
    download: bool,
    options: tuple[str, ...],
    as_json: bool,
) -> None:
    """Match points of QUERY in REFERENCE with any matcher; optionally draw a picture."""
    import nemf
    from experiments.configurations import load_config

    try:
        xy = [[float(v) for v in point.split(",")] for point in points.split()]
        if not xy or any(len(p) != 2 for p in xy):
            raise ValueError
    except ValueError:
        raise NemfError(f"--points {points!r}: expected e.g. '120,80 64.5,33'") from None
    _find_weights(weights, Path(), download)
    model = dict(load_config(f"{matcher}/folder", _parse_options(options)).model)
    built = nemf.build_matcher(model.pop("type"), **model)
    answers = nemf.match(built, query, reference, xy).points.detach().cpu().numpy()
    if as_json:
        rows = [[None if v != v else v for v in p] for p in answers.tolist()]
        click.echo(json.dumps({"matcher": matcher, "points": xy, "answers": rows}))
    else:
        for (x, y), (u, v) in zip(xy, answers, strict=True):
            click.echo(f"{x:.1f},{y:.1f} -> " + ("no answer" if u != u else f"{u:.1f},{v:.1f}"))
    if picture is not None:
        from nemf.datasets.index import decode_image
        from reports.figures import draw_matches

        draw_matches(decode_image(query), decode_image(reference), xy, answers, picture)
        click.echo(picture)


@main_group.command("train")
@click.argument("config")
@_MLFLOW
@_DATA
@_OUT
@_WEIGHTS
@_DOWNLOAD
@_OPTIONS
def train_command(
    config: str,
    use_mlflow: bool,
    data: Path | None,
    out: Path,
    weights: Path | None,
    download: bool,
    options: tuple[str, ...],
) -> None:
    """Train what CONFIG describes (a name in configs/training or a file), going on where a stopped
    run left off; prints the file of the trained weights."""
    from experiments.training import train

    _find_weights(weights, data, download)
    click.echo(train(config, out, _parse_options(options), data))
    if use_mlflow:
        from reports.mlflow_store import tracking_uri, without_password
        from reports.tracking import publish_trainings

        publish_trainings(out)
        click.echo(f"MLflow: {without_password(tracking_uri(out))}", err=True)


@main_group.command("bench")
@click.argument("names", nargs=-1)
@click.option("--quick", is_flag=True, help="Smaller sizes (a smoke test, no figures to quote).")
def bench_command(names: tuple[str, ...], quick: bool) -> None:
    """Measure the suite's own speed: scoring, index, encode-once. Ratios come from one run."""
    from experiments.benchmarks import run

    run(names, quick=quick)


if __name__ == "__main__":
    main()
