"""What the figures of NeMF's search and of matching fields show, computed (NeMF, figs. 5 and 6).

:mod:`reports.field_pictures` draws it. The query image is the paper's target, the reference image
its source.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from baselines.cats import CATs
from nemf.aggregation import SOFTMAX_TEMPERATURE
from nemf.datasets.index import PairDataset
from nemf.errors import NemfError
from nemf.field.nemf import NeMF
from nemf.field.search import read_field
from nemf.geometry import squash, to_norm, to_pixels
from nemf.matcher import Matcher
from nemf.pairs import Image, OrientedPair
from nemf.predictions import Predictions, dataset_meta, prediction_table
from nemf.scoring import Protocol
from reports.field_pictures import KeypointField, SearchState
from reports.records import alpha_name, keypoint_errors, pair_scores

GRID_POINTS = 128  # along the longer side of the reference image


class EncodedPair:
    """A pair of a dataset under a plan, encoded by a matcher, with the images it was made from."""

    def __init__(self, matcher: Matcher, dataset: PairDataset, oriented: OrientedPair) -> None:
        self.matcher, self.dataset, self.oriented = matcher, dataset, oriented
        category = oriented.pair.category if matcher.card.oracle_class else None
        self.query, self.reference = (
            Image(dataset.pixels(record), record.hash, canvas, category)
            for record, canvas in zip(
                (oriented.query, oriented.reference), oriented.canvases, strict=True
            )
        )
        (self.query_features,) = matcher.encode([self.query], "query")
        (self.reference_features,) = matcher.encode([self.reference], "reference")

    def answers(self) -> np.ndarray:
        """float32 (N, 2) px: what the matcher answers to the pair's queries."""
        points = torch.from_numpy(self.oriented.query_kps.copy()).to(self.matcher.device)
        features = [self.query_features], [self.reference_features]
        (found,) = self.matcher.match(*features, [points])
        return found.points.detach().cpu().numpy().astype(np.float32)


def search_states(
    pair: EncodedPair, iterations: Sequence[int]
) -> list[tuple[SearchState, np.ndarray]]:
    """The dense field of a NeMF after each of so many ``iterations``, and float32 (N, 2) px, what
    it answers to the pair's queries; both before the gradient steps.

    Random numbers depend on the iteration and the pixel only, so each state is one that the longer
    searches pass through. NemfError for another matcher, or one that draws official random
    numbers, which has no such states.
    """
    matcher = pair.matcher
    if not isinstance(matcher, NeMF):
        raise NemfError(f"{matcher.card.title} does not search a field: choose a NeMF")
    if matcher.official:
        raise NemfError("official=True draws new random numbers in each search: leave it out")
    canvas, (height, width) = pair.reference.canvas, pair.query.size
    queries = torch.from_numpy(pair.oriented.query_kps.copy()).to(matcher.device)
    states = []
    with torch.no_grad():
        encoded = matcher.encode_pairs([pair.reference_features], [pair.query_features])
        for count in iterations:
            shorter = copy.copy(matcher)  # shares the weights
            shorter.iterations = count
            (field,) = shorter.search(
                encoded, [pair.query_features], [pair.reference_features], [None]
            )
            answers = to_pixels(read_field(field, to_norm(queries, pair.query.canvas)), canvas)
            pixels = to_pixels(field, canvas)[:height, :width]
            states.append((SearchState(count, pixels.cpu().numpy()), answers.cpu().numpy()))
    return states


def keypoint_field(pair: EncodedPair, keypoint: int, label: str) -> KeypointField:
    """The matching field of one of the pair's queries over the reference image.

    NeMF: the score (a logit) of every grid point. CATs: the softmax of the refined correlation over
    the source cells, for the target cell that the keypoint lies in, constant in every cell.

    NemfError for another matcher, or a number that is no keypoint of the pair.
    """
    count = len(pair.oriented.query_kps)
    if not 0 <= keypoint < count:
        raise NemfError(
            f"pair {pair.oriented.pair.id} has no keypoint {keypoint}: it has 0 to {count - 1}"
        )
    height, width = pair.reference.size
    shape = [max(2, round(GRID_POINTS * side / max(height, width))) for side in (height, width)]
    ys, xs = (np.linspace(0, side - 1, n) for side, n in zip((height, width), shape, strict=True))
    x, y = np.meshgrid(xs, ys)
    grid = torch.from_numpy(np.stack([x, y], -1).reshape(-1, 2).astype(np.float32))
    query = torch.from_numpy(pair.oriented.query_kps[keypoint].copy())
    with torch.no_grad():
        if isinstance(pair.matcher, NeMF):
            what, values = "score (logit)", _nemf_scores(pair.matcher, pair, query, grid)
        elif isinstance(pair.matcher, CATs):
            what, values = "softmax over cells", _cats_softmax(pair.matcher, pair, query, grid)
        else:
            title = pair.matcher.card.title
            raise NemfError(f"{title} has no matching field to draw: choose NeMF or CATs")
    values = values.cpu().numpy().astype(np.float64).reshape(shape)
    return KeypointField(label, what, xs, ys, values, pair.answers()[keypoint])


def _nemf_scores(matcher: NeMF, pair: EncodedPair, query: Tensor, grid: Tensor) -> Tensor:
    device = matcher.device
    encoded = matcher.encode_pairs([pair.reference_features], [pair.query_features])
    target = to_norm(query.to(device)[None], pair.query.canvas)
    side = matcher.mlp_model.at_targets(target, matcher.feature_size)
    sources = to_norm(grid.to(device), pair.reference.canvas)
    rows = torch.zeros(len(sources), dtype=torch.long, device=device)
    return matcher.mlp_model.score(encoded.volume, sources, side, rows)


def _cats_softmax(matcher: CATs, pair: EncodedPair, query: Tensor, grid: Tensor) -> Tensor:
    sides = []
    for features in (pair.reference_features, pair.query_features):
        sides.append([level[None].to(matcher.device) for level in features.levels])
        sides.append(features.projected[None].to(matcher.device))
    (refined,) = matcher.refine(*sides)
    target = _cells(matcher, query[None], pair.query.canvas).to(matcher.device)
    weight = (refined[:, target[0]] / SOFTMAX_TEMPERATURE).softmax(0)
    return weight[_cells(matcher, grid, pair.reference.canvas).to(matcher.device)]


def _cells(matcher: CATs, points: Tensor, canvas: tuple[int, int]) -> Tensor:
    """(N,): the number of the cell that each of ``points`` (N, 2) px lies in. The cell in column c
    of jump j is centred on pixel c * j + (j - 1) / 2 of the squashed frame."""
    side, size = matcher.input_size, matcher.feature_size
    squashed = squash(points, canvas, (side, side))
    cell = ((squashed + 0.5) * (size / side)).floor().clamp(0, size - 1).long()
    return cell[:, 1] * size + cell[:, 0]


def score_answers(
    pair: EncodedPair, answers: np.ndarray, protocol: Protocol, alpha: float
) -> dict[str, Any]:
    """Scores answers (N, 2) px to the pair's queries as prediction files are scored: ``n_right`` of
    ``n``, their share ``pck``, and each error in px of the protocol's frame."""
    dataset, oriented = pair.dataset, pair.oriented
    rows = [(0, oriented, answers, None)]
    predictions = Predictions(prediction_table(rows), dataset_meta(dataset, oriented.plan))
    error, length = keypoint_errors(predictions, protocol)
    frame = pair_scores(predictions, protocol, error, length, [alpha]).frame
    right, n = int(frame[alpha_name(alpha)].iloc[0]), int(frame["n"].iloc[0])
    return {
        "n_right": right,
        "n": n,
        "pck": right / n,
        "errors_px": [None if np.isinf(e) else round(float(e), 4) for e in error],
    }
