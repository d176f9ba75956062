"""Features of images, each encoded once: a least-recently-used cache under a byte budget.

A class of SPair-71k has 680 test pairs of 27 images: a budget that holds 27 images' features
encodes each image once, whatever the order. Below that :func:`visiting_order` decides how often an
image is encoded again (docs/reliability.md has the hit rates).
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemf.datasets.index import PairDataset
from nemf.matcher import Features, Matcher, Role
from nemf.pairs import Image, ImageRecord, OrientedPair
from nemf.processes import draft_beside

Key = tuple[Any, ...]
_AHEAD = 4  # images that are decoded before they are asked for
_WINDOW = 512  # pairs that are put into order together: the time grows with its square


class FeatureCache:
    """Features by image, canvas, category (where the matcher uses it) and role (likewise).

    Within ``budget_bytes`` of memory, or of files in a folder of its own below ``folder``, which
    goes when the cache does. ``asked``, ``encoded``: requests so far and those that were not held.
    ``waited_s``: seconds that a request waited for a picture to be decoded.
    """

    def __init__(
        self,
        matcher: Matcher,
        dataset: PairDataset,
        budget_bytes: int,
        folder: Path | None = None,
    ) -> None:
        self.matcher, self.dataset, self.budget_bytes = matcher, dataset, budget_bytes
        self.asked = self.encoded = 0
        self.waited_s = 0.0
        self._held: OrderedDict[Key, tuple[Features, int]] = OrderedDict()
        self._bytes = 0
        self._disk = None if folder is None else _Disk(folder)
        self._expected: list[tuple[Key, ImageRecord]] = []
        self._ahead: dict[Key, Future[np.ndarray]] = {}
        self._decoder = ThreadPoolExecutor(1, "decode")

    def get(self, oriented: OrientedPair, role: Role) -> Features:
        """Features of the pair's query or reference image on its canvas."""
        record, canvas, category, key = self._request(oriented, role)
        self.asked += 1
        if key in self._held:
            self._held.move_to_end(key)
            held = self._held[key][0]
            return held if self._disk is None else self._disk.load(held)
        image = Image(self._pixels(key, record), record.hash, canvas, category)
        (features,) = self.matcher.encode([image], role)
        self.encoded += 1
        self._keep(key, features)
        return features

    def expect(self, pairs: Iterable[OrientedPair]) -> None:
        """Says what will be asked for next, in this order: pictures are decoded ahead."""
        wanted: dict[Key, ImageRecord] = {}
        for oriented in pairs:
            for role in ("query", "reference"):
                record, _, _, key = self._request(oriented, role)
                wanted.setdefault(key, record)
        self._ahead.clear()
        self._expected = list(wanted.items())[::-1]
        self._decode_ahead()

    def _request(self, oriented: OrientedPair, role: Role) -> tuple[ImageRecord, Any, Any, Key]:
        record = oriented.query if role == "query" else oriented.reference
        canvas = oriented.canvases[0 if role == "query" else 1]
        category = oriented.pair.category if self.matcher.card.oracle_class else None
        key = (record.hash, canvas, category, role if self.matcher.uses_role else None)
        return record, canvas, category, key

    def _pixels(self, key: Key, record: ImageRecord) -> np.ndarray:
        began = time.perf_counter()
        coming = self._ahead.pop(key, None)
        pixels = self.dataset.pixels(record) if coming is None else coming.result()
        self.waited_s += time.perf_counter() - began
        self._decode_ahead()
        return pixels

    def _decode_ahead(self) -> None:
        while self._expected and len(self._ahead) < _AHEAD:
            key, record = self._expected.pop()
            if key not in self._held:
                self._ahead[key] = self._decoder.submit(self.dataset.pixels, record)

    def _keep(self, key: Key, features: Features) -> None:
        size = n_bytes(features)
        if size > self.budget_bytes:
            return
        while self._bytes + size > self.budget_bytes:
            _, (dropped, freed) = self._held.popitem(last=False)
            self._bytes -= freed
            if self._disk is not None:
                self._disk.drop(dropped)
        self._held[key] = (features if self._disk is None else self._disk.save(features)), size
        self._bytes += size


def visiting_order(pairs: Sequence[OrientedPair]) -> list[int]:
    """Positions of the pairs in an order that soon uses an image again: next comes the pair whose
    longer unused image was used last. It follows from the pairs alone, so that a run that is
    resumed batches them as an undisturbed one does."""
    order: list[int] = []
    for start in range(0, len(pairs), _WINDOW):
        part = range(start, min(start + _WINDOW, len(pairs)))
        images = {i: (pairs[i].query.hash, pairs[i].reference.hash) for i in part}
        left, used, clock = dict.fromkeys(part), {}, 0
        while left:
            best, latest = -1, (-2, -2)
            for i in left:
                a, b = used.get(images[i][0], -1), used.get(images[i][1], -1)
                recency = (a, b) if a < b else (b, a)
                if recency > latest:
                    best, latest = i, recency
            del left[best]
            order.append(best)
            for image in images[best]:
                clock += 1
                used[image] = clock
    return order


def n_bytes(features: Features) -> int:
    """Bytes of every tensor and array held in (nested) features."""
    sizes: list[int] = []
    _rebuilt(features, lambda values: sizes.append(int(values.nbytes)))
    return sum(sizes)


def _rebuilt(features: Features, change: Callable[[Any], Any]) -> Features:
    """Nested features with ``change`` applied to every tensor and array, or what stands for one."""
    if isinstance(features, torch.Tensor | np.ndarray | _Stored):
        return change(features)
    if isinstance(features, dict):
        return {key: _rebuilt(value, change) for key, value in features.items()}
    if isinstance(features, list | tuple):
        parts = [_rebuilt(value, change) for value in features]
        named = hasattr(features, "_fields")
        return type(features)(*parts) if named else type(features)(parts)
    if dataclasses.is_dataclass(features) and not isinstance(features, type):
        new = copy.copy(features)
        for field in dataclasses.fields(features):
            value = _rebuilt(getattr(features, field.name), change)
            object.__setattr__(new, field.name, value)  # frozen ones too
        return new
    return features


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor or array whose numbers lie in a file. ``device``: None for an array."""

    file: Path
    dtype: Any
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device | None


class _Disk:
    """Features as files, a tensor each, that only this process reads."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = draft_beside(folder / "features")  # removes those of killed processes
        self.folder.mkdir()
        self._number = 0
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def save(self, features: Features) -> Features:
        return _rebuilt(features, self._stored)

    def load(self, features: Features) -> Features:
        return _rebuilt(features, _loaded)

    def drop(self, features: Features) -> None:
        _rebuilt(features, lambda stored: stored.file.unlink())

    def _stored(self, values: torch.Tensor | np.ndarray) -> _Stored:
        self._number += 1
        file = self.folder / str(self._number)
        if isinstance(values, np.ndarray):
            np.ascontiguousarray(values).tofile(file)
            return _Stored(file, values.dtype, values.shape, (), None)
        tensor = values.detach()
        if not _is_dense(tensor):
            tensor = tensor.contiguous()
        flat = tensor.as_strided((tensor.numel(),), (1,)).cpu()
        flat.view(torch.uint8).numpy().tofile(file)
        shape, stride = tuple(tensor.shape), tensor.stride()
        return _Stored(file, tensor.dtype, shape, stride, tensor.device)


def _loaded(stored: _Stored) -> torch.Tensor | np.ndarray:
    if stored.device is None:
        return np.fromfile(stored.file, stored.dtype).reshape(stored.shape)
    if 0 in stored.shape:
        return torch.empty(stored.shape, dtype=stored.dtype, device=stored.device)
    flat = torch.from_numpy(np.fromfile(stored.file, np.uint8)).view(stored.dtype)
    return flat.as_strided(stored.shape, stored.stride).to(stored.device)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the numbers fill their place without gaps or overlaps, in whatever order."""
    expected = 1
    for stride, side in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if side > 1:
            if stride != expected:
                return False
            expected *= side
    return tensor.numel() > 0
