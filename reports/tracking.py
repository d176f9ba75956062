"""What MLflow shows: the records on disk mirrored as runs, again and again without duplicates.

The files below the output folder are the truth. Each current prediction file with its score
records is a run, found again by the tag ``nemf.cell``; each finished training one with the tag
``nemf.training``; each version of a table one with the tag ``nemf.table``. A training and the cells
predicted with its weights share the tag ``weights_sha256``. docs/mlflow.md describes the runs.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from nemf.datasets import dataset_class
from nemf.errors import NemfError
from nemf.pairs import FLAGS
from nemf.predictions import Predictions
from nemf.reading import read_json
from reports.mlflow_store import Run, Store, open_store
from reports.records import alpha_name, current_predictions, read_record
from reports.score_figures import draw_scores
from reports.table_files import Table
from reports.wording import is_part

LAST_PUBLISHED = "nemf.last_published"  # tag of tables: UTC, ISO 8601
_NOTE_LIMIT = 8000  # characters that MLflow keeps of a tag


def publish_cells(out: Path) -> dict[str, str]:
    """Mirrors every current prediction file and its score records; cell id -> run id.

    A cell's id is its folder below ``<out>/predictions``. A run that already mirrors its cell is
    left untouched; otherwise it is completed or updated. A metric that no record holds any more is
    logged as NaN, since MLflow can delete none.

    NemfError if a record scores another file than the one beside it, or the store does not answer.
    """
    files = current_predictions(out)
    if not files:
        return {}
    with open_store(out) as store:
        runs = [_cell_run(out, file, store) for file in files]
        return {run.tags["nemf.cell"]: store.publish(run) for run in runs}


def publish_trainings(out: Path) -> dict[str, str]:
    """Mirrors every finished training (``<out>/training/<name>/<name>.json`` and what lies beside
    it, but not the weights); name -> run id.

    A run stands for these very weights, so training anew with another result makes a new run and
    keeps the old one. NemfError if the weights are not those that the file tells of, or if the
    store does not answer.
    """
    stories = [p for p in sorted((out / "training").glob("*/*.json")) if p.stem == p.parent.name]
    if not stories:
        return {}
    with open_store(out) as store:
        runs = {path.stem: _training_run(path, store) for path in stories}
        return {name: store.publish(run) for name, run in runs.items()}


def publish_table(out: Path, table: Table, files: list[Path], cells: dict[str, str]) -> str:
    """Mirrors a table as a run of its own and returns the run's id.

    ``files`` become artifacts below ``table/``, the table's Markdown the description, ``cells``
    (cell id -> run id, from :func:`publish_cells`) links and ``cells.json``. The same content is
    the same run; other content is a new one, so the runs of one name are the table's history. The
    tag ``nemf.last_published`` tells which one was last. NemfError if the store does not answer.
    """
    markdown = table.markdown()
    tags = _table_tags(table.cells) | {"nemf.table": table.name, "nemf.cells": str(len(cells))}
    kind = " SYNTHETIC" if tags["synthetic"] == "true" else ""
    with open_store(out) as store:
        links = [f"- [{cell}]({store.link(run_id)})" for cell, run_id in sorted(cells.items())]
        note = f"{markdown}\n**Runs of its cells**\n\n" + "\n".join(links) if links else markdown
        run = Run(
            name=f"{table.name}{kind}",
            tags=tags,
            note=fit_note(note, "table/"),
            artifacts=[(file, "table") for file in files],
            texts={"cells.json": json.dumps(cells, indent=1, sort_keys=True) + "\n"},
            datasets=_table_datasets(table.cells),
        )
        run_id = store.publish(run)
        last = store.newest({"nemf.table": table.name, LAST_PUBLISHED: None}, LAST_PUBLISHED)
        if last is None or last.info.run_id != run_id:
            now = datetime.now(UTC)
            if last is not None:  # by somebody whose clock is ahead, or before ours was put back
                before = datetime.fromisoformat(last.data.tags[LAST_PUBLISHED])
                now = max(now, before + timedelta(microseconds=1))
            store.set_tag(run_id, LAST_PUBLISHED, now.isoformat(timespec="microseconds"))
        return run_id


# -- a cell -------------------------------------------------------------------------------------


def _cell_run(out: Path, file: Path, store: Store) -> Run:
    meta = Predictions.read(file, ["pair"]).meta
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    records = {p.stem: (p, read_record(p)) for p in sorted((file.parent / "scores").glob("*.json"))}
    for path, record in records.values():
        if record["predictions_sha256"] != digest:
            raise NemfError(f"{path}: scores an older {file.name}; run `nemf score {file}` again")
    cell = file.parent.relative_to(out / "predictions").as_posix()
    scores = {stem: record for stem, (_, record) in records.items()}
    extra = file.parent / "cell.json"
    synthetic = "SYNTHETIC " if meta["synthetic"] else ""
    label = meta["matcher"]["label"]
    return Run(
        key=("nemf.cell", cell),
        name=f"{label} / {synthetic}{meta['title']} {meta['split']} / {meta['plan']}",
        tags={"nemf.cell": cell, **_cell_tags(meta, scores)},
        note=fit_note(_cell_note(meta, scores, store), "scores/"),
        artifacts=[
            (file, None),
            *([(extra, None)] if extra.exists() else []),
            *((path, "scores") for path, _ in records.values()),
        ],
        pictures={"pck.png": partial(draw_scores, scores)} if scores else {},
        params=_cell_params(meta),
        metrics=_metrics(scores),
        datasets=[
            _dataset_input(meta["title"], meta, pairs=meta["n_pairs"], layout=meta["layout"])
        ],
    )


def _cell_tags(meta: dict[str, Any], scores: dict[str, dict[str, Any]]) -> dict[str, str]:
    matcher, code = meta["matcher"], meta["code"] or {}
    tags = {
        "commit": code.get("commit"),
        "dirty": code.get("dirty"),
        "dataset": meta["dataset"],
        "split": meta["split"],
        "fingerprint": meta["fingerprint"],
        "synthetic": meta["synthetic"],
        "plan": meta["plan"],
        "protocols": ", ".join(scores) or "none yet",
        "matcher": matcher["label"],
        "external": matcher.get("external", False),
        "seed": meta.get("facts", {}).get("seed"),
    }
    if code.get("commit"):
        tags["mlflow.source.git.commit"] = code["commit"]
    if matcher.get("external"):
        tags["external_file_sha256"] = matcher["file_sha256"]
    else:
        tags["matcher_card"] = json.dumps(matcher["card"], sort_keys=True)
        tags["weights_sha256"] = matcher["weights_sha256"]
        tags["random_weights"] = matcher["random_weights"]
    return {name: _text(value) for name, value in tags.items()}


def _cell_params(meta: dict[str, Any]) -> dict[str, str]:
    """Few, and functions of the cell's id: MLflow never changes a parameter."""
    params = {name: meta[name] for name in ("dataset", "split", "plan")}
    params["matcher"] = meta["matcher"]["label"]
    if "facts" in meta:
        params["seed"] = meta["facts"]["seed"]
    if "backbone" in meta["matcher"].get("config", {}):
        params["backbone"] = meta["matcher"]["config"]["backbone"]
    return {name: _text(value) for name, value in params.items()}


def _metrics(scores: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Every number of the records by its name in MLflow, e.g.
    ``canonical-1/per-image/car_G/pck-0.10``."""
    rules = _words(scores)
    metrics: dict[str, float] = {}
    for stem, record in scores.items():
        entries = record["metrics"]
        values = {(entry["group"], entry["value"]) for entry in entries}
        flags = {(g, v): f"{g}-{v}" for g, v in values if g in FLAGS}
        classes = _words((v for g, v in values if g == "class"), {"all", *flags.values()})
        for entry in entries:
            group, value = entry["group"], entry["value"]
            word = classes[value] if group == "class" else flags.get((group, value), "all")
            folder = f"{rules[stem]}/per-{entry['averaging']}/{word}"
            name = f"{folder}/{alpha_name(entry['alpha'])}"
            metrics[name] = entry["pck"]
            if group == "all":
                for bound in ("low", "high"):
                    if entry[bound] is not None:
                        metrics[f"{name}-{bound}"] = entry[bound]
                metrics[f"{folder}/n-pairs"] = float(entry["n_pairs"])
                metrics[f"{folder}/n-images"] = float(entry["n_images"])
    return metrics


def _words(texts: Iterable[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """Each text as a word that may stand in a metric's name: ``canonical@1`` is ``canonical-1``,
    ``car(G)`` is ``car_G``.

    Texts that would share a word with each other or with ``taken`` get a hash of their own text,
    so that a name depends on no order. Case does not tell words apart (in some databases).
    """
    plain = {}
    for text in sorted(set(texts)):
        word = re.sub(r"[^\w.-]+", "_", text.replace("@", "-")).strip("._")
        plain[text] = word[:80] or "unnamed"
    uses = Counter(word.casefold() for word in [*plain.values(), *taken])
    return {
        text: f"{word}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        if uses[word.casefold()] > 1
        else word
        for text, word in plain.items()
    }


def _dataset_input(
    title: str, facts: dict[str, Any], *, pairs: int, context: str | None = None, **more: str
) -> dict[str, str]:
    """Fields of MLflow's Dataset and the ``context`` it was used in."""
    kind = " (synthetic)" if facts["synthetic"] else ""
    source = {name: facts[name] for name in ("fingerprint", "split")} | more
    return {
        "name": f"{title}{kind}",
        "digest": facts["fingerprint"][:12],
        "source_type": "local",
        "source": json.dumps({"uri": facts["dataset"], **source}),
        "profile": json.dumps({"num_rows": pairs, "rows": "image pairs"}),
        "context": context or facts["split"],
    }


def _cell_note(meta: dict[str, Any], scores: dict[str, dict[str, Any]], store: Store) -> str:
    """The run's description: main numbers, then where they come from."""
    matcher, facts = meta["matcher"], meta.get("facts", {})
    part = f" of {meta['official_pairs']}" if is_part(meta) else ""
    kind = "real images"
    if meta["synthetic"]:
        kind = "**SYNTHETIC stand-in, says nothing about real images**"
    images = "".join(f" of {r['n_images']} distinct images" for r in list(scores.values())[:1])
    dataset = f"{meta['title']} {meta['split']} ({meta['n_pairs']}{part} pairs{images})"
    lines = [
        f"**{matcher['label']}** on {dataset}, {kind}; queries {meta['plan']}.",
        "",
        *_score_lines(scores),
        "",
        *(
            f"- {description}"
            for description in dict.fromkeys(r["protocol"]["description"] for r in scores.values())
        ),
        f"- Dataset fingerprint `{meta['fingerprint']}`",
    ]
    if matcher.get("external"):
        lines.append(f"- Predictions made elsewhere, file SHA-256 `{matcher['file_sha256']}`")
    else:
        card = matcher["card"]
        year = f", {card['year']}" if card["year"] else ""
        random = " (**random weights**)" if matcher["random_weights"] else ""
        oracle = "; **oracle class**" if card["oracle_class"] else ""
        libraries = ", ".join(f"{name} {v}" for name, v in facts["libraries"].items())
        lines += [
            f"- {card['title']}: {card['description']} ({card['paper']}{year}{oracle})",
            f"- Code {_commit(meta['code'])}; seed {facts['seed']}; on {facts['device']}",
            f"- {libraries}",
            f"- Weights SHA-256 {_weights(matcher['weights_sha256'], store)}{random}",
        ]
    scored_by = dict.fromkeys(_commit(record["scored_by"]) for record in scores.values())
    if scored_by:
        lines.append(f"- Scored by code {', '.join(scored_by)}")
    lines.append(f"- Prediction key `{meta['key']}`")
    return "\n".join(lines)


def _score_lines(scores: dict[str, dict[str, Any]]) -> list[str]:
    if not scores:
        return ["Not scored yet."]
    columns, head = [], ["PCK at"]
    for stem, record in scores.items():
        averaging = record["protocol"]["averaging"]
        head.append(f"{stem}, per {averaging}")
        columns.append(
            {
                entry["alpha"]: _interval(entry)
                for entry in record["metrics"]
                if (entry["group"], entry["averaging"]) == ("all", averaging)
            }
        )
    rows = [head, ["---"] + ["---:"] * len(columns)]
    for alpha in sorted({alpha for column in columns for alpha in column}):
        rows.append([f"{alpha:g}", *(column.get(alpha, "–") for column in columns)])
    levels = ", ".join(f"{level:.0%}" for level in sorted({r["level"] for r in scores.values()}))
    table = [f"| {' | '.join(row)} |" for row in rows]
    return [*table, "", f"Percent, with {levels} intervals."]


def _interval(entry: dict[str, Any]) -> str:
    if entry["low"] is None or entry["high"] is None:
        return f"{entry['pck'] * 100:.1f}"
    return f"{entry['pck'] * 100:.1f} [{entry['low'] * 100:.1f}, {entry['high'] * 100:.1f}]"


# -- a training ---------------------------------------------------------------------------------


def _training_run(path: Path, store: Store) -> Run:
    """The training that a story (``<name>.json``) tells of."""
    try:
        return _told_training(path, read_json(path, "a training's story"), store)
    except NemfError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise NemfError(
            f"{path}: cannot be read as what `nemf train` writes ({problem!r}); run it again or "
            "move the file away"
        ) from None


def _told_training(path: Path, story: dict[str, Any], store: Store) -> Run:
    weights = path.with_suffix(".pth")
    if not weights.is_file():
        raise NemfError(f"{weights}: is missing; run `nemf train {path.stem}` again")
    if hashlib.sha256(weights.read_bytes()).hexdigest() != story["sha256"]:
        raise NemfError(f"{path}: tells of other weights; run `nemf train {path.stem}` again")
    datasets = {
        context: (dataset_class(facts["dataset"]).title, facts)
        for context, part in (("train", "train_dataloader"), ("validation", "val_dataloader"))
        if (facts := story["datasets"].get(part))
    }
    kinds = {facts["synthetic"] for _, facts in datasets.values()}
    synthetic = "SYNTHETIC " if True in kinds else ""
    trained_on = "".join(f" / {synthetic}{t} {f['split']}" for t, f in [*datasets.values()][:1])
    picture = path.with_suffix(".png")
    settings = story["settings"]
    code, matcher = story["code"], settings["model"].get("matcher", settings["model"])
    # the validation may choose the same weights in a shorter and in a longer training
    training = f"{story['name']}/{story['key']}/{story['epochs']}-epochs/{story['sha256'][:12]}"
    tags = {
        "nemf.training": training,
        "commit": code.get("commit"),
        "dirty": code.get("dirty"),
        "recipe": story["name"],
        "matcher": matcher.get("type"),
        "seed": settings.get("seed"),
        "synthetic": kinds.pop() if len(kinds) == 1 else None,
        "weights_sha256": story.get("weights_hash"),
        "weights_file_sha256": story["sha256"],
        **{f"{context}_fingerprint": f["fingerprint"] for context, (_, f) in datasets.items()},
    }
    if code.get("commit"):
        tags["mlflow.source.git.commit"] = code["commit"]
    return Run(
        key=("nemf.training", training),
        name=f"training {story['name']}{trained_on}",
        tags={name: _text(value) for name, value in tags.items()},
        note=fit_note(_training_note(story, datasets, store), path.name),
        artifacts=[(path, None), *([(picture, None)] if picture.exists() else [])],
        texts={"settings.json": json.dumps(settings, indent=1, sort_keys=True) + "\n"},
        params=_training_params(story),
        curves=_curves(story),
        datasets=[
            _dataset_input(title, facts, pairs=facts["pairs"], context=context)
            for context, (title, facts) in datasets.items()
        ],
    )


def _training_params(story: dict[str, Any]) -> dict[str, str]:
    settings = story["settings"]
    optimizer = settings.get("optim_wrapper", {}).get("optimizer", {})
    params = {
        "recipe": story["name"],
        "epochs": story["epochs"],
        "optimizer": optimizer.get("type"),
        "lr": optimizer.get("lr"),
        "weight_decay": optimizer.get("weight_decay"),
        "batch_size": settings.get("train_dataloader", {}).get("batch_size"),
        "seed": settings.get("seed"),
    }
    return {name: _text(value) for name, value in params.items() if value is not None}


def _curves(story: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Values by epoch, ``train/…`` and ``validation/…``."""
    curves: dict[str, dict[int, float]] = {}
    for entry in story.get("curve", []):
        for name, value in entry.items():
            if name != "epoch":
                part = "train" if name == "lr" or name.startswith("loss") else "validation"
                word = re.sub(r"[^\w./-]", "_", name)
                curves.setdefault(f"{part}/{word}", {})[entry["epoch"]] = value
    return curves


def _training_note(
    story: dict[str, Any], datasets: dict[str, tuple[str, dict[str, Any]]], store: Store
) -> str:
    lines = [f"**Training {story['name']}**, {story['epochs']} epochs.", ""]
    names = list(dict.fromkeys(name for entry in story.get("curve", []) for name in entry))
    if names:
        rows = [names, ["---:"] * len(names)]
        rows += [
            [f"{entry[name]:.4g}" if name in entry else "–" for name in names]
            for entry in _thinned(story["curve"])
        ]
        lines += [*(f"| {' | '.join(row)} |" for row in rows), ""]
    if story["validation"]:
        best = story["validation"]
        lines.append(
            f"- Weights of epoch {best['epoch']}, chosen by validation: {best['score']:.4f}"
        )
    for context, (title, facts) in datasets.items():
        kind = "real images"
        if facts["synthetic"]:
            kind = "**SYNTHETIC stand-in, says nothing about real images**"
        split = f"{title} {facts['split']} ({facts['pairs']} pairs), {kind}"
        lines.append(f"- {context}: {split}; fingerprint `{facts['fingerprint']}`")
    libraries = ", ".join(f"{name} {v}" for name, v in story["libraries"].items())
    lines += [
        f"- Code {_commit(story['code'])}; seed {story['settings'].get('seed')}",
        f"- {libraries}",
    ]
    if story.get("weights_hash"):
        lines.append(f"- Weights SHA-256 {_weights(story['weights_hash'], store)}")
    lines.append(f"- File `{story['name']}.pth` SHA-256 `{story['sha256']}` (kept on disk only)")
    return "\n".join(lines)


def _thinned(curve: list[dict[str, float]], most: int = 20) -> list[dict[str, float]]:
    """At most about ``most`` entries, spread evenly, the last among them."""
    step = -(-len(curve) // most)
    return curve[::-1][::step][::-1]


# -- a table ------------------------------------------------------------------------------------


def _table_tags(cells: pd.DataFrame) -> dict[str, str]:
    """What the measured numbers of a table have in common, or the list of what they have."""
    measured = cells[cells["origin"] != "published"].convert_dtypes()  # whole numbers as such
    tags = {
        name: ", ".join(dict.fromkeys(measured[column].dropna().map(_text)))
        for name, column in (
            ("protocols", "protocol"),
            ("split", "split"),
            ("dataset", "dataset"),
            ("fingerprint", "fingerprint"),
            ("matcher", "method"),
            ("seed", "seed"),
            ("commit", "commit"),
            ("scored_by", "scored_by"),
        )
    }
    dirty = [bool(measured[column].any()) for column in ("dirty", "scored_dirty")]
    tags |= {"dirty": _text(any(dirty)), "synthetic": _text(bool(measured["synthetic"].any()))}
    return {name: value or "unknown" for name, value in tags.items()}


def _table_datasets(cells: pd.DataFrame) -> list[dict[str, str]]:
    measured = cells[(cells["origin"] != "published") & (cells["group"] == "all")]
    firsts = measured.drop_duplicates("fingerprint").to_dict("records")
    return [
        _dataset_input(dataset_class(row["dataset"]).title, row, pairs=int(row["n_pairs"]))
        for row in firsts
    ]


# -- words they share ---------------------------------------------------------------------------


def _weights(digest: str, store: Store) -> str:
    """The hash, and where the training and all cells with these weights are found."""
    found = store.search_link(f"tags.weights_sha256 = '{digest}'")
    return f"`{digest}` ([training and cells with these weights]({found}))"


def _commit(code: dict[str, Any] | None) -> str:
    if not code or not code.get("commit"):
        return "of an unknown commit"
    return f"`{code['commit'][:12]}`" + (" (with uncommitted changes)" if code.get("dirty") else "")


def _text(value: Any) -> str:
    if value is None:
        return "unknown"
    return str(value).lower() if isinstance(value, bool) else str(value)


def fit_note(note: str, where: str) -> str:
    """The note, cut after a whole line if MLflow would not keep all of it."""
    if len(note) <= _NOTE_LIMIT:
        return note
    rest = f"\n\n… the rest is in the artifacts below `{where}`."
    return note[: _NOTE_LIMIT - len(rest)].rpartition("\n")[0] + rest
