"""What trainable matchers learn from: batches of annotated pairs, and flow labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

CELL_REACH = 17 / 16  # a cell is taught by keypoints within so many cell widths of its centre


@dataclass(frozen=True, eq=False)
class PairBatch:
    """B annotated pairs, each image in a square frame of S pixels a side.

    ``src``, ``trg`` float32 (B, 3, S, S) as :func:`nemf.backbones.normalise` makes them;
    ``src_kps``, ``trg_kps`` float32 (B, K, 2) px of the frames, pixel centres at integers;
    ``valid`` bool (B, K), at least one a pair; ``seeds`` int64 (B,): whatever a loss draws for a
    pair, it draws from the pair's own seed, so that a batch equals its pairs one by one.
    """

    src: Tensor
    trg: Tensor
    src_kps: Tensor
    trg_kps: Tensor
    valid: Tensor
    seeds: Tensor

    def __len__(self) -> int:
        return len(self.valid)

    @property
    def side_px(self) -> int:
        return self.src.shape[-1]

    def to(self, device: torch.device) -> PairBatch:
        return PairBatch(*(getattr(self, f.name).to(device) for f in fields(self)))

    def split(self, pairs: int) -> list[PairBatch]:
        """The batch in parts of at most ``pairs`` pairs, in order."""
        parts = zip(*(getattr(self, f.name).split(pairs) for f in fields(self)), strict=True)
        return [PairBatch(*part) for part in parts]


def collate_pairs(samples: Sequence[tuple[Tensor, Tensor, Tensor, Tensor, int]]) -> PairBatch:
    """A batch of (src, trg, src_kps (N, 2), trg_kps (N, 2), seed); keypoints are padded with zeros
    that ``valid`` leaves out."""
    src, trg, src_kps, trg_kps, seeds = zip(*samples, strict=True)
    most = max(len(kps) for kps in src_kps)
    valid = torch.zeros(len(samples), most, dtype=torch.bool)
    for row, kps in zip(valid, src_kps, strict=True):
        row[: len(kps)] = True
    padded = [
        torch.nn.utils.rnn.pad_sequence(list(kps), batch_first=True) for kps in (src_kps, trg_kps)
    ]
    return PairBatch(torch.stack(src), torch.stack(trg), *padded, valid, torch.tensor(seeds))


def flow_labels(
    batch: PairBatch, feature_size: int, official: bool = False
) -> tuple[Tensor, Tensor]:
    """What keypoints say of the flow on the target's grid: (B, 2, h, w) cells and bool (B, h, w).

    A cell is taught by all target keypoints no further than ``CELL_REACH`` cell widths from its
    centre on either axis (CATs' boxes, of the trunk's nominal receptive field): mean source minus
    mean target keypoint. ``official`` takes the source keypoint of the last of them instead of
    their mean, and a displacement of exactly (0, 0) as no label, as CATs' code does.

    Convention: the centre of cell c of jump j is at pixel (c + 1/2) j; displacements are x, y in
    cells.
    """
    jump = batch.side_px / feature_size
    kps = batch.trg_kps / jump
    centres = torch.arange(feature_size, device=kps.device) + 0.5
    near_x, near_y = ((kps[..., None, k] - centres).abs() <= CELL_REACH for k in (0, 1))
    inside = (near_y[..., :, None] & near_x[..., None, :]) & batch.valid[..., None, None]
    share = inside / inside.sum(1, keepdim=True).clamp_min(1)  # (B, K, h, w)
    target = torch.einsum("bkhw,bkc->bchw", share, kps)
    if official:
        number = torch.arange(1, inside.shape[1] + 1, device=kps.device)[:, None, None]
        last = (inside * number).amax(1, keepdim=True) == number
        share = (last & inside).to(share)
    flow = torch.einsum("bkhw,bkc->bchw", share, batch.src_kps / jump) - target
    labelled = inside.any(1)
    if official:
        labelled &= (flow != 0).any(1)
    return flow * labelled[:, None], labelled


def end_point_error(flow: Tensor, labels: Tensor, labelled: Tensor) -> Tensor:
    """Sum over ``labelled`` (B, h, w) cells of the distance between ``flow`` and ``labels``
    (B, 2, h, w). Its gradient is zero where they agree exactly."""
    apart = (flow.float() - labels).permute(0, 2, 3, 1)[labelled]
    return torch.linalg.vector_norm(apart, dim=1).sum()
