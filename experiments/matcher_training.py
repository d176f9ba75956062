"""What the runner trains a matcher with: annotated pairs, exact accumulation, validation by PCK."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.registry import DATASETS, FUNCTIONS, LOOPS, MODELS, OPTIM_WRAPPERS
from mmengine.runner import BaseLoop, Runner
from torch import Tensor
from torch.utils.data import Dataset

from experiments.jobs import open_dataset
from experiments.prediction import FeatureCache, predict_pairs
from nemf.augmentation import Augmentation, mirrored, training_frame
from nemf.backbones import normalise
from nemf.errors import NemfError
from nemf.matcher import build_matcher
from nemf.predictions import Predictions, dataset_meta, prediction_table
from nemf.scoring import Protocol, get_protocol
from nemf.supervision import PairBatch, collate_pairs
from reports.records import PairScores, alpha_name, score_pairs

FUNCTIONS.register_module(module=collate_pairs)


@DATASETS.register_module()
class TrainingPairs(Dataset):
    """Annotated pairs as training frames: (src, trg, src_kps, trg_kps, seed) of each.

    ``dataset``: a dataset of the suite (``type``, ``split`` and its keywords) below ``root``;
    ``side_px`` of the square frames; ``augmentation``: keywords of
    :class:`nemf.augmentation.Augmentation`, None for none. ``pairs_per_epoch``: how many pairs
    count as an epoch, so that a long pass is validated and saved on the way (None: all); the pairs
    are taken from one random order of the dataset after the other. Everything random is a function
    of ``seed``, the pass and the pair; ``TellEpoch`` sets ``epoch``.
    """

    def __init__(
        self,
        root: str,
        dataset: dict[str, Any],
        side_px: int,
        augmentation: dict[str, Any] | None = None,
        pairs_per_epoch: int | None = None,
        seed: int = 0,
    ) -> None:
        keywords = dict(dataset)
        self.pairs = open_dataset(
            keywords.pop("type"), root, keywords.pop("split", "trn"), **keywords
        )
        self.side_px, self.seed, self.epoch = side_px, seed, 0
        self.pairs_per_epoch = pairs_per_epoch or len(self.pairs)
        if self.pairs_per_epoch < 1:
            raise NemfError(f"pairs_per_epoch must be at least 1, not {pairs_per_epoch}")
        self.augmentation = None if augmentation is None else Augmentation(**augmentation)

    def __len__(self) -> int:
        return self.pairs_per_epoch

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        turn, place = divmod(self.epoch * self.pairs_per_epoch + index, len(self.pairs))
        number = int(_order(self.seed, turn, len(self.pairs))[place])
        pair = self.pairs[number]
        rng = np.random.default_rng((self.seed, turn, number))
        drawn_seed = int(rng.integers(2**63))
        mirror = self.augmentation is not None and rng.uniform() < self.augmentation.mirror
        frames, points = [], []
        for record, kps, bbox in (
            (pair.src, pair.src_kps, pair.src_bbox),
            (pair.trg, pair.trg_kps, pair.trg_bbox),
        ):
            pixels = self.pairs.pixels(record)
            if mirror:
                pixels, kps = mirrored(pixels, kps)
                if bbox is not None:
                    width = pixels.shape[1] - 1
                    bbox = np.array([width - bbox[2], bbox[1], width - bbox[0], bbox[3]])
            frame, moved = training_frame(pixels, kps, bbox, self.side_px, self.augmentation, rng)
            frames.append(normalise(frame)[0])
            points.append(torch.from_numpy(moved))
        return (*frames, *points, drawn_seed)


@lru_cache(maxsize=4)
def _order(seed: int, turn: int, count: int) -> np.ndarray:
    """The random order of all pairs in one pass; an epoch touches one or two."""
    return np.random.default_rng((seed, turn)).permutation(count)


@MODELS.register_module()
class MatcherTraining(BaseModel):
    """A matcher under training. ``matcher``: its name as ``type`` and its keywords.

    A batch is computed ``pairs_at_once`` pairs at a time; every loss is divided by what the whole
    batch (over all ranks) has of its supervision, so the gradient is the whole batch's whatever
    that number.
    """

    def __init__(self, matcher: dict[str, Any], pairs_at_once: int) -> None:
        super().__init__()
        if pairs_at_once < 1:
            raise NemfError(f"pairs_at_once must be at least 1, not {pairs_at_once}")
        keywords = dict(matcher)
        self.matcher = build_matcher(keywords.pop("type"), **keywords)
        self.pairs_at_once = pairs_at_once

    def forward(self, batch: PairBatch, mode: str = "loss") -> dict[str, Tensor]:
        """The losses of a batch computed at once."""
        return self.matcher.loss(batch.to(self.matcher.device))

    def train_step(self, batch: PairBatch, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """One step of the optimiser; returns the losses of the batch, ``loss`` their sum.

        NemfError if the loss is not finite: no number comes from such a training.
        """
        batch = batch.to(self.matcher.device)
        counts = self.matcher.supervised(batch)
        for count in counts.values():
            all_reduce(count, "sum")
        # Gradients are averaged over the ranks.
        counts = {name: count / get_world_size() for name, count in counts.items()}
        logged: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=batch.src.device))
        for part in batch.split(self.pairs_at_once):
            with optim_wrapper.optim_context(self):
                losses = self.matcher.loss(part, counts)
            total = torch.stack(list(losses.values())).sum()
            optim_wrapper.backward(total)
            for name, value in {**losses, "loss": total}.items():
                logged[name] += value.detach()
        if not torch.isfinite(logged["loss"]):
            values = ", ".join(f"{name} {float(value)}" for name, value in logged.items())
            raise NemfError(
                f"the training's loss is not finite ({values}): lower the learning rate"
            )
        optim_wrapper.step()
        optim_wrapper.zero_grad()
        return dict(logged)


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(OptimWrapper):
    """Forward passes under autocast to bfloat16 where the device computes in it, in float32 where
    it only could emulate it. bfloat16 has float32's range, so nothing is scaled. For float16 on a
    GPU take MMEngine's ``AmpOptimWrapper``."""

    @contextmanager
    def optim_context(self, model: torch.nn.Module) -> Iterator[None]:
        device = next(model.parameters()).device.type
        fast = computes_in_bfloat16(device)
        with super().optim_context(model), torch.autocast(device, torch.bfloat16, enabled=fast):
            yield


@cache
def computes_in_bfloat16(device: str) -> bool:
    """Whether a "cpu" or "cuda" device here has instructions for bfloat16."""
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    # The operating system's list of features; elsewhere than on Linux nothing is assumed.
    cpuinfo = Path("/proc/cpuinfo")
    features = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return device == "cpu" and not {"avx512_bf16", "amx_bf16"}.isdisjoint(features)


@LOOPS.register_module()
class ValidatePCK(BaseLoop):
    """Validation: PCK under ``protocol`` on ``pairs`` pairs spread over the dataset (None: all).

    Metrics are fractions named ``pck-0.10`` and so on, the mean over pairs of a pair's share.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: Any,
        evaluator: Any = None,
        protocol: str = "canonical@1",
        alphas: tuple[float, ...] = (0.01, 0.03, 0.05, 0.1),
        pairs: int | None = None,
        cache_mib: int = 1024,
    ) -> None:
        super().__init__(runner, dataloader)
        self.protocol, self.alphas, self.pairs = get_protocol(protocol), alphas, pairs
        self.budget_bytes = cache_mib * 2**20

    def run(self) -> dict[str, float]:
        self.runner.call_hook("before_val")
        self.runner.call_hook("before_val_epoch")
        self.runner.model.eval()
        metrics = self.evaluate()
        self.runner.call_hook("after_val_epoch", metrics=metrics)
        self.runner.call_hook("after_val")
        return metrics

    def evaluate(self) -> dict[str, float]:
        """The metrics of the model as it is."""
        loader = self.dataloader
        cache = FeatureCache(self.runner.model.matcher, loader.dataset, self.budget_bytes)
        scores = score_spread_pairs(
            cache, self.protocol, self.alphas, self.pairs, loader.batch_size
        )
        names = [alpha_name(alpha) for alpha in scores.alphas]
        shares = scores.frame[names].div(scores.frame["n"], axis=0)
        return {name: float(value) for name, value in shares.mean().items()}


@torch.no_grad()
def score_spread_pairs(
    cache: FeatureCache,
    protocol: Protocol,
    alphas: Sequence[float],
    pairs: int | None,
    batch: int,
) -> PairScores:
    """The cache's matcher scored on ``pairs`` pairs spread evenly over its dataset (None: all)."""
    dataset = cache.dataset
    plan = protocol.plan.for_layout(dataset.layout)
    count = min(pairs or len(dataset), len(dataset))
    chosen = np.linspace(0, len(dataset) - 1, count).round().astype(int)
    oriented = [dataset[int(i)].oriented(plan) for i in chosen]
    answers = predict_pairs(cache.matcher, cache, oriented, batch)
    rows = [
        (int(i), pair, *answer) for i, pair, answer in zip(chosen, oriented, answers, strict=True)
    ]
    predictions = Predictions(prediction_table(rows), dataset_meta(dataset, plan))
    return score_pairs(predictions, protocol, alphas)
