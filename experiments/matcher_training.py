"""What the runner trains a matcher with: annotated pairs, exact accumulation, validation by PCK."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, all_reduce, get_rank, get_world_size
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.registry import DATASETS, FUNCTIONS, LOOPS, MODELS, OPTIM_WRAPPERS
from mmengine.runner import BaseLoop, Runner
from torch import Tensor, nn
from torch.utils.data import Dataset

from experiments.feature_cache import FeatureCache
from experiments.jobs import open_dataset
from experiments.prediction import predict_pairs
from experiments.ranks import share
from nemf.augmentation import Augmentation, mirrored, training_frame
from nemf.backbones import normalise
from nemf.errors import NemfError
from nemf.matcher import build_matcher
from nemf.predictions import Predictions, dataset_meta, prediction_table
from nemf.scoring import Protocol, get_protocol
from nemf.supervision import PairBatch, collate_pairs
from reports.records import PairScores, alpha_name, score_pairs

FUNCTIONS.register_module(module=collate_pairs)


@FUNCTIONS.register_module()
def collate_share(samples: Sequence[Any]) -> PairBatch | None:
    """A rank's share of a batch; None if the batch has no sample for it."""
    return collate_pairs(samples) if samples else None


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

    A batch is computed ``pairs_at_once`` pairs at a time, each rank its share; every loss is
    divided by what the whole batch has of its supervision and gradients are added up, so they are
    the whole batch's however it is divided.
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

    def train_step(self, batch: PairBatch | None, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """One step of the optimiser; returns the losses of the whole batch, ``loss`` their sum.
        ``batch``: this rank's share of it.

        NemfError if the loss is not finite: no number comes from such a training.
        """
        device = self.matcher.device
        batch, counts = self._whole(None if batch is None else batch.to(device))
        logged: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))
        for part in [] if batch is None else batch.split(self.pairs_at_once):
            with optim_wrapper.optim_context(self):
                losses = self.matcher.loss(part, counts)
            total = torch.stack(list(losses.values())).sum()
            optim_wrapper.backward(total)
            for name, value in {**losses, "loss": total}.items():
                logged[name] += value.detach()
        if get_world_size() > 1:
            add_up_gradients(self.parameters())
            logged = _added_up(logged, device)
        if not torch.isfinite(logged["loss"]):
            values = ", ".join(f"{name} {float(value)}" for name, value in logged.items())
            raise NemfError(
                f"the training's loss is not finite ({values}): lower the learning rate"
            )
        optim_wrapper.step()
        optim_wrapper.zero_grad()
        return dict(logged)

    def _whole(self, batch: PairBatch | None) -> tuple[PairBatch | None, dict[str, Tensor]]:
        """The share with the source that follows it in the whole batch, and the whole's counts."""
        counts = {} if batch is None else self.matcher.supervised(batch)
        if get_world_size() == 1:
            return batch, counts
        mine = None if batch is None else (len(batch), batch.src[:1].cpu())
        shares = all_gather_object(mine)
        after = shares[get_rank() + 1 :] + shares[: get_rank() + 1]  # in a circle
        first = next(share[1] for share in after if share is not None)
        if batch is not None and sum(share[0] for share in shares if share is not None) > 1:
            batch = dataclasses.replace(batch, following=first.to(batch.src.device))
        return batch, _added_up(counts, self.matcher.device)


def _added_up(values: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Numbers by name, each added up over the ranks that have it."""
    everybody = all_gather_object({name: value.item() for name, value in values.items()})
    names = dict.fromkeys(name for held in everybody for name in held)
    sums = {name: sum(held.get(name, 0) for held in everybody) for name in names}
    return {name: torch.tensor(value, device=device) for name, value in sums.items()}


def add_up_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Adds gradients up over the ranks. A parameter that has none on any rank keeps none, so that
    an optimiser leaves it alone."""
    parameters = list(parameters)
    there = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device)
    there = there.to(torch.int32)
    all_reduce(there, "max")
    used = [p for p, has in zip(parameters, there.tolist(), strict=True) if has]
    if not used:
        return
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([p.grad.reshape(-1) for p in used])
    all_reduce(flat, "sum")
    for parameter, part in zip(used, flat.split([p.numel() for p in used]), strict=True):
        parameter.grad.copy_(part.view_as(parameter))


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(OptimWrapper):
    """Forward passes under autocast to bfloat16 where the device computes in it, in float32 where
    it only could emulate it. bfloat16 has float32's range, so nothing is scaled. For float16 on a
    GPU take MMEngine's ``AmpOptimWrapper``."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
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
    """The cache's matcher scored on ``pairs`` pairs spread evenly over its dataset (None: all).
    The ranks of a job share the batches, and all have the scores."""
    dataset = cache.dataset
    plan = protocol.plan.for_layout(dataset.layout)
    count = min(pairs or len(dataset), len(dataset))
    chosen = np.linspace(0, len(dataset) - 1, count).round().astype(int)
    oriented = [dataset[int(i)].oriented(plan) for i in chosen]
    batches = [oriented[i : i + batch] for i in range(0, count, batch)]
    mine = [predict_pairs(cache.matcher, cache, part, batch) for part in share(batches)]
    answers = [answer for held in all_gather_object(mine) for part in held for answer in part]
    rows = [
        (int(i), pair, *answer) for i, pair, answer in zip(chosen, oriented, answers, strict=True)
    ]
    predictions = Predictions(prediction_table(rows), dataset_meta(dataset, plan))
    return score_pairs(predictions, protocol, alphas)
