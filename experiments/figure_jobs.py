"""Which figures can be made of an output folder, and making them (``nemf figure``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.configurations import config_names, fill_weights, load_config
from experiments.jobs import open_dataset, table_spec
from experiments.provenance import code_state
from experiments.store import slug
from nemf.datasets import CATALOGUE, dataset_class
from nemf.datasets.index import PairDataset
from nemf.errors import NemfError, WeightsNotFound
from nemf.predictions import dataset_folder, dataset_meta
from nemf.scoring import Protocol
from reports.comparison import Run
from reports.figure_files import CannotDraw
from reports.figure_sources import find_sources
from reports.pck_figures import (
    class_figure,
    curve_figure,
    difficulty_figure,
    draw_classes,
    draw_difficulty,
    draw_pck_curves,
)
from reports.training_figure import draw_training, finished_trainings, training_figure
from reports.transfer_figure import draw_transfer, transfer_figure
from reports.wording import dataset_title

if TYPE_CHECKING:
    from experiments.field_figures import EncodedPair
    from nemf.matcher import Matcher

FIGURES = ("classes", "curves", "difficulty", "transfer", "training", "search", "field")
ITERATIONS = (0, 1, 2, 5, 10, 20)
SIGMA = 0.02  # of the Gaussian over a matching field, in longer sides of the reference image
_SCORES = {
    "classes": (class_figure, draw_classes),
    "curves": (curve_figure, draw_pck_curves),
    "difficulty": (difficulty_figure, draw_difficulty),
}


@dataclass(frozen=True)
class FigureRequest:
    """What figures are wanted of ``out``.

    ``data``: root of the datasets, or None. ``dataset``: a dataset, or a folder of predictions such
    as ``spair-test-synthetic``; all by default. ``matchers``: per row the names it may go by
    (config, label or matcher), the typed one first; by default all that were predicted, and for
    "search" and "field" the configs of Table 1 whose weights are there. ``order``: labels as rows
    come by default. ``pairs``: ids; ``keypoint``: of the "field", its number within the pair.
    ``options``: ``--cfg-options`` of the matchers that "search" and "field" run.
    """

    out: Path
    protocol: Protocol
    data: Path | None = None
    dataset: str | None = None
    matchers: tuple[tuple[str, ...], ...] = ()
    order: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    alpha: float = 0.1
    keypoint: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def base(self, folder: str, name: str) -> Path:
        """Where a figure goes, without an ending."""
        return self.out / "figures" / slug(f"{folder}_{self.protocol.id}") / slug(name)


def make_figures(name: str, request: FigureRequest) -> Iterator[tuple[str, list[Path] | NemfError]]:
    """Makes the figures of one of :data:`FIGURES`; yields what each is and its files, or why it
    could not be made (a :class:`CannotDraw` where something is not there, else an error)."""
    try:
        yield from _MAKERS.get(name, _score_figures)(name, request)
    except WeightsNotFound as problem:
        yield name, CannotDraw(str(problem))
    except NemfError as problem:
        yield name, problem


# -- of predictions -------------------------------------------------------------------------------


def _sources(request: FigureRequest) -> dict[str, list[Run]]:
    return find_sources(
        request.out,
        request.protocol,
        dataset=request.dataset,
        names=request.matchers,
        order=request.order,
    )


def _score_figures(
    name: str, request: FigureRequest
) -> Iterator[tuple[str, list[Path] | NemfError]]:
    content_of, draw = _SCORES[name]
    for folder, runs in _sources(request).items():
        try:
            content = content_of(runs, request.protocol, request.alpha) | _drawn_by()
            yield f"{name} {folder}", draw(content, request.base(folder, name))
        except NemfError as problem:
            yield f"{name} {folder}", problem


def _transfer(name: str, request: FigureRequest) -> Iterator[tuple[str, list[Path] | NemfError]]:
    for folder, runs in _sources(request).items():
        try:
            content = transfer_figure(runs, request.protocol, request.alpha, request.pairs)
            meta = runs[0].predictions.meta
            dataset = _open(request, meta["dataset"], meta["split"])
            images = {image.hash: image for image in dataset.images}
            wanted = {e[s] for e in content["pairs"] for s in ("query_hash", "reference_hash")}
            pixels = {digest: dataset.pixels(images[digest]) for digest in wanted & set(images)}
            base = request.base(folder, name)
            yield f"{name} {folder}", draw_transfer(content | _drawn_by(), pixels, base)
        except NemfError as problem:
            yield f"{name} {folder}", problem


def _open(request: FigureRequest, dataset: str, split: str) -> PairDataset:
    reader = dataset_class(dataset)
    if request.data is None:
        raise CannotDraw("it shows images: give the root of the datasets with --data or DATA=")
    if reader.find(request.data) is None:
        raise CannotDraw(f"it shows images, but {request.data} holds no {reader.title}")
    return open_dataset(dataset, request.data, split)


def _drawn_by() -> dict[str, Any]:
    return {"drawn_by": code_state()}


# -- of trainings ---------------------------------------------------------------------------------


def _training(name: str, request: FigureRequest) -> Iterator[tuple[str, list[Path] | NemfError]]:
    for file in finished_trainings(request.out):
        base = request.out / "figures" / slug(f"{name}_{file.stem}")
        yield f"{name} {file.stem}", draw_training(training_figure(file) | _drawn_by(), base)


# -- of matchers at work --------------------------------------------------------------------------


def _search(name: str, request: FigureRequest) -> Iterator[tuple[str, list[Path] | NemfError]]:
    from experiments.field_figures import EncodedPair, score_answers, search_states
    from reports.field_pictures import draw_search, full_colour_px

    dataset, numbers = _pairs(request)
    folder = dataset_folder(dataset_meta(dataset, request.protocol.plan))
    label, matcher = next(_built(request, dataset, ("nemf",)))
    for number in numbers:
        pair = EncodedPair(matcher, dataset, dataset[number].oriented(_plan(request, dataset)))
        found = search_states(pair, ITERATIONS)
        states = [
            {"iterations": state.iterations}
            | score_answers(pair, answers, request.protocol, request.alpha)
            for state, answers in found
        ]
        full = full_colour_px([state for state, _ in found])
        final = score_answers(pair, pair.answers(), request.protocol, request.alpha)
        answered = ", ".join(_score_text(final).splitlines())
        for entry in states:
            entry["text"] = _score_text(entry)
        caption = (
            f"Search of {label}. Top: the reference image warped to the query by the field after "
            "so many iterations (start: soft-argmax of the coarse costs). Below: displacement, "
            f"blue left, orange right, dark up, light down, full colour at {full:.0f} px (edges of "
            "the key). "
            f"Numbers: keypoints right at alpha {request.alpha:g} and mean error, read from the "
            f"field; the matcher's answer, after its last step, is {answered}. "
            f"{_pair_text(pair, request)}"
        )
        content = {"figure": name, "caption": caption, "states": states, "answer": final}
        content["full_colour_px"] = full
        content |= _pair_facts(pair, request) | {"matchers": [_matcher_facts(label, matcher)]}
        images = pair.query.pixels, pair.reference.pixels
        base = request.base(folder, f"{name}_{pair.oriented.pair.id}")
        yield (
            f"{name} {pair.oriented.pair.id}",
            draw_search(content, [state for state, _ in found], *images, base),
        )


def _field(name: str, request: FigureRequest) -> Iterator[tuple[str, list[Path] | NemfError]]:
    from experiments.field_figures import EncodedPair, keypoint_field, score_answers
    from reports.field_pictures import draw_keypoint_fields

    dataset, numbers = _pairs(request)
    folder = dataset_folder(dataset_meta(dataset, request.protocol.plan))
    matchers = list(_built(request, dataset, ("nemf", "cats")))
    for number in numbers:
        oriented = dataset[number].oriented(_plan(request, dataset))
        fields, entries = [], []
        for label, matcher in matchers:
            pair = EncodedPair(matcher, dataset, oriented)
            found = keypoint_field(pair, request.keypoint, label)
            scores = score_answers(pair, pair.answers(), request.protocol, request.alpha)
            error = scores["errors_px"][request.keypoint]
            text = "no answer" if error is None else f"error {error:.1f} px"
            fields.append(found)
            entries.append(
                {"label": label, "what": found.what, "text": text, "error_px": error}
                | {"answer_px": [float(v) if np.isfinite(v) else None for v in found.answer]}
                | {"lowest": float(found.values.min()), "highest": float(found.values.max())}
                | {"grid": list(found.values.shape)}
            )
        sigma_px = SIGMA * max(oriented.reference.size)
        caption = (
            f"Matching field of keypoint {oriented.pair.kp_names[request.keypoint]!r} (number "
            f"{request.keypoint}) over the reference image, as contours and as a surface. NeMF: "
            "the score of every grid point; CATs: softmax of its refined correlation over the "
            "cells, for the query cell that the keypoint lies in. Both under a Gaussian of sigma = "
            f"{sigma_px:.1f} px ({SIGMA:g} of the longer side), each on a scale of its own. The "
            "answers are the matchers' own, after search or from the flow of the cells around. "
            f"{_pair_text(pair, request)}"
        )
        content = {"figure": name, "caption": caption, "fields": entries, "sigma_px": sigma_px}
        content |= _pair_facts(pair, request) | {
            "keypoint": request.keypoint,
            "query_px": oriented.query_kps[request.keypoint].tolist(),
            "true_px": oriented.reference_kps[request.keypoint].tolist(),
            "matchers": [_matcher_facts(label, matcher) for label, matcher in matchers],
        }
        images = pair.query.pixels, pair.reference.pixels
        base = request.base(folder, f"{name}_{oriented.pair.id}_{request.keypoint}")
        yield (
            f"{name} {oriented.pair.id}",
            draw_keypoint_fields(content, fields, *images, base),
        )


def _pairs(request: FigureRequest) -> tuple[PairDataset, list[int]]:
    """The dataset and the numbers of its wanted pairs, the first one by default."""
    name, _, rest = (request.dataset or "").partition("-")
    if not name:
        there = [n for n in CATALOGUE if request.data and dataset_class(n).find(request.data)]
        name = there[0] if there else "spair"
    dataset = _open(request, name, rest.removesuffix("-synthetic") or "test")
    if not request.pairs:
        return dataset, [0]
    ids = dataset.ids
    for pair in request.pairs:
        if pair not in ids:
            raise NemfError(
                f"there is no pair {pair!r} in {dataset.title} {dataset.split} (the first one is "
                f"{ids[0]!r})"
            )
    return dataset, [ids.index(pair) for pair in request.pairs]


def _built(
    request: FigureRequest, dataset: PairDataset, kinds: Sequence[str]
) -> Iterator[tuple[str, Matcher]]:
    """Label and matcher of the wanted configs of the given kinds, one of each kind by default:
    the first of the table's whose weights are there. WeightsNotFound if there are none."""
    import torch

    from nemf.matcher import build_matcher

    rows = table_spec("1").rows(synthetic=dataset.synthetic, full=True)
    names = [alternatives[0] for alternatives in request.matchers] or rows
    configs = {
        name: load_config(f"{name}/{dataset.name}", request.options)
        for name in names
        if name in config_names("matchers")
    }
    lacking: dict[str, WeightsNotFound] = {}
    built = []
    for kind in kinds:
        for config in configs.values():
            if config.model.type != kind:
                continue
            try:
                fill_weights(config, request.out)
                model = dict(config.model)
                matcher = build_matcher(model.pop("type"), **model)
            except WeightsNotFound as problem:
                if request.matchers:
                    raise
                lacking.setdefault(kind, problem)
                continue
            if torch.cuda.is_available():
                matcher = matcher.cuda()
            marks = " [random weights]" if matcher.random_weights else ""
            built.append((config.label + marks, matcher))
            if not request.matchers:
                break
    if lacking and not built:
        raise next(iter(lacking.values()))
    if not built:
        raise CannotDraw(
            f"no config of {' or '.join(kinds)} among {', '.join(names)}: name one by --matchers"
        )
    yield from built


def _plan(request: FigureRequest, dataset: PairDataset) -> Any:
    return request.protocol.plan.for_layout(dataset.layout)


def _score_text(entry: dict[str, Any]) -> str:
    errors = [error for error in entry["errors_px"] if error is not None]
    text = f"{entry['n_right']} of {entry['n']} right"
    return f"{text}\nerror {np.mean(errors):.1f} px" if errors else f"{text}\nno answer"


def _pair_text(pair: EncodedPair, request: FigureRequest) -> str:
    dataset = pair.dataset
    data = {"title": dataset.title, "split": dataset.split, "synthetic": dataset.synthetic}
    return (
        f"One pair, {pair.oriented.pair.id}, of {dataset_title(data)}; "
        f"{request.protocol.describe(dataset.layout).rpartition(';')[0]}."
    )


def _pair_facts(pair: EncodedPair, request: FigureRequest) -> dict[str, Any]:
    dataset = pair.dataset
    keys = ("name", "title", "split", "synthetic", "fingerprint")
    rule = request.protocol
    return {
        "dataset": {key: getattr(dataset, key) for key in keys},
        "pair": pair.oriented.pair.id,
        "n_pairs": 1,
        "images": {"query": pair.query.hash, "reference": pair.reference.hash},
        "protocol": {"id": rule.id, "description": rule.describe(dataset.layout)},
        "alpha": request.alpha,
        **_drawn_by(),
    }


def _matcher_facts(label: str, matcher: Matcher) -> dict[str, Any]:
    return {
        "label": label,
        "name": matcher.card.name,
        "weights_sha256": matcher.weights_hash,
        "random_weights": matcher.random_weights,
        "device": matcher.device.type,
    }


_MAKERS = {"transfer": _transfer, "training": _training, "search": _search, "field": _field}
