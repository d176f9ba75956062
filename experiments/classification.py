"""Training a small backbone by classifying rendered objects, as ImageNet backbones are made.

The synthetic job needs a backbone that any machine can run and whose origin is known. It is trained
on objects rendered for this purpose alone: their seeds never occur in a synthetic dataset.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from PIL import Image as PILImage
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from nemf.backbones import IMAGENET_MEAN, IMAGENET_STD, ResNet, tap_table
from nemf.datasets.synthetic_objects import OBJECT_CLASSES
from nemf.datasets.synthetic_scenes import Framing, take_photograph

_SEED_SPACE = 7_640_891  # first word of every seed here; datasets begin with a user's small seed
_STORED_PX = 144  # side of the stored squares, a little more than what is trained on


@DATASETS.register_module()
class RenderedObjects(Dataset):
    """Squares around rendered objects with their class number, rendered once, kept in memory.

    ``per_class`` images of each class; ``split`` keeps training and validation seeds apart;
    ``side_px`` of the squares returned; ``augment``: random crop, mirror, colour and contrast,
    drawn from (seed, ``epoch``, index), see ``TellEpoch``.
    """

    def __init__(
        self,
        per_class: int,
        split: str,
        side_px: int,
        augment: bool,
        workers: int = 2,
        seed: int = 0,
    ) -> None:
        self.side_px, self.augment, self.seed = side_px, augment, seed
        names = list(OBJECT_CLASSES)
        number = {"trn": 0, "val": 1}[split]
        keys = [(seed, number, c, i) for i in range(per_class) for c in range(len(names))]
        with ProcessPoolExecutor(workers) as pool:
            bar = tqdm(total=len(keys), desc=f"rendering {split} objects", unit="image", delay=2)
            squares = []
            for square in pool.map(render_square, keys, chunksize=16):
                squares.append(square)
                bar.update()
        self.squares = np.stack(squares)
        self.labels = np.array([key[2] for key in keys])
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        square, side = self.squares[index], self.side_px
        left = top = (square.shape[0] - side) // 2
        if self.augment:
            rng = np.random.default_rng((_SEED_SPACE, self.seed, self.epoch, index))
            zoom = rng.uniform(0.55, 1.0)
            cut = max(8, round(square.shape[0] * zoom))
            top, left = rng.integers(0, square.shape[0] - cut + 1, 2)
            part = PILImage.fromarray(square[top : top + cut, left : left + cut])
            square = np.asarray(part.resize((side, side), PILImage.Resampling.BILINEAR), np.float32)
            if rng.uniform() < 0.5:
                square = square[:, ::-1]
            gain, shift = rng.uniform(0.7, 1.3, 3) * rng.uniform(0.8, 1.2), rng.uniform(-20, 20)
            square = np.clip((square - 128) * gain + 128 + shift, 0, 255)
        else:
            square = square[top : top + side, left : left + side].astype(np.float32)
        scaled = (square / 255 - IMAGENET_MEAN) / IMAGENET_STD
        inputs = torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1), np.float32))
        return {"inputs": inputs, "labels": int(self.labels[index])}


def render_square(key: tuple[int, int, int, int]) -> np.ndarray:
    """uint8 (144, 144, 3): the object of (seed, split, class, index) with some surroundings."""
    rng = np.random.default_rng(np.random.SeedSequence((_SEED_SPACE, *key)))
    subject = list(OBJECT_CLASSES.values())[key[2]]
    low, high = subject.azimuth_deg
    bounds = (low, high) if rng.uniform() < 0.5 else (-high, -low)
    shot = take_photograph(subject, Framing(subject.keypoints, bounds, fewest_visible=3), rng)
    x1, y1, x2, y2 = shot.box_px
    half = max(x2 - x1, y2 - y1) * rng.uniform(0.5, 0.8) + 4
    cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
    box = (math.floor(cx - half), math.floor(cy - half), math.ceil(cx + half), math.ceil(cy + half))
    height, width = shot.pixels.shape[:2]
    box = (max(box[0], 0), max(box[1], 0), min(box[2], width), min(box[3], height))
    part = PILImage.fromarray(shot.pixels).crop(box)
    return np.asarray(part.resize((_STORED_PX, _STORED_PX), PILImage.Resampling.BILINEAR))


@MODELS.register_module()
class BackboneClassifier(BaseModel):
    """A trunk of :mod:`nemf.backbones`, average pooling and one linear layer."""

    def __init__(self, backbone: str, n_classes: int, label_smoothing: float = 0.1) -> None:
        super().__init__(data_preprocessor={"type": "BaseDataPreprocessor"})
        taps = tap_table(backbone)
        self.last, self.label_smoothing = len(taps) - 1, label_smoothing
        self.backbone = ResNet(backbone)
        for module in self.backbone.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.head = nn.Linear(taps[-1].channels, n_classes)

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        """``inputs`` float32 (B, 3, H, W) normalised, ``labels`` int64 (B,)."""
        (features,) = self.backbone.taps(inputs, [self.last])
        logits = self.head(features.relu().mean((2, 3)))
        if mode == "loss":
            return {"loss": F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)}
        if mode == "predict":
            return [{"hit": bool(hit)} for hit in logits.argmax(1) == labels]
        return logits


@METRICS.register_module()
class TopOne(BaseMetric):
    """Share of images whose most likely class is the right one."""

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        self.results += [sample["hit"] for sample in data_samples]

    def compute_metrics(self, results: list[bool]) -> dict[str, float]:
        return {"top1": float(np.mean(results))}
