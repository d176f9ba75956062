"""The processes of one job: torchrun and SLURM start several, numbered by rank.

Ranks work on parts of a cell or of a training's batches and end with what one process would have
made. Rank 0 alone claims and writes; what only it can know it tells the others.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.distributed
import torch.multiprocessing as multiprocessing
from mmengine.device import get_device
from mmengine.dist import (
    all_gather_object,
    barrier,
    broadcast_object_list,
    get_rank,
    get_world_size,
    init_dist,
    is_distributed,
    is_main_process,
    master_only,
)
from mmengine.registry import DATA_SAMPLERS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import BatchSampler, Sampler

from nemf import progress
from nemf.claims import Busy, Claim
from nemf.errors import NemfError
from nemf.files import write_whole

T = TypeVar("T")
_TORCHRUN = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
# A rank may wait for another one's last chunk. That one died is noticed at once all the same: its
# connection breaks, and its launcher ends the job.
_PATIENCE_S = 7 * 24 * 3600
_ASK_AGAIN_S = 5.0


def launcher() -> str:
    """MMEngine's name of what started this process: "pytorch" (torchrun), "slurm" or "none".

    Of SLURM only ``srun`` counts: a batch script is one process, however many tasks it may start.
    """
    if set(os.environ) >= _TORCHRUN:
        return "pytorch"
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in os.environ:
        return "slurm"
    return "none"


def is_first() -> bool:
    """Whether this is rank 0, which alone claims, writes and reports."""
    return is_main_process()


def join() -> str:
    """Meets the other ranks of this job, once; returns :func:`launcher`."""
    found = launcher()
    if found != "none" and not is_distributed():
        cuda = torch.cuda.is_available()
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # MMEngine would set it, with a warning
            os.environ.setdefault(name, str(torch.get_num_threads()))
        if multiprocessing.get_start_method(allow_none=True) is None:
            multiprocessing.set_start_method("fork")  # as MMEngine's runner does in one process
        # MMEngine chooses a GPU in any case, which torch without CUDA refuses.
        choose = torch.cuda.set_device if cuda else lambda _: None
        with patch.object(torch.cuda, "set_device", choose), broken_connections():
            init_dist(found, backend="nccl" if cuda else "gloo", timeout=_PATIENCE_S)
        atexit.register(torch.distributed.destroy_process_group)
        if not is_first():
            progress.silence()
    return found


@contextmanager
def broken_connections() -> Iterator[None]:
    """NemfError where the other ranks cannot be reached (any more)."""
    try:
        yield
    except RuntimeError as problem:
        text = " ".join(str(problem).split())
        ours = isinstance(problem, torch.distributed.DistError)
        if not ours and not any(word in text for word in ("gloo", "NCCL", "TCPStore")):
            raise
        raise NemfError(
            f"another process of this job ended or cannot be reached ({text[:200]}); the same "
            "command goes on where it was"
        ) from problem


def from_first(function: Callable[[], T]) -> T:
    """What ``function`` gives on rank 0, on every rank; the NemfError that it raises too."""
    if not is_distributed():
        return function()
    told: list[Any] = [None]
    if is_first():
        try:
            told = [(function(), None)]
        except NemfError as problem:
            told = [(None, problem)]
    broadcast_object_list(told)
    value, problem = told[0]
    if problem is not None:
        raise problem
    return value


@contextmanager
def first_goes_first() -> Iterator[None]:
    """Rank 0 runs the block before the others do, so that they find what it wrote."""
    if not is_first():
        barrier()
    try:
        yield
    finally:
        if is_first():
            barrier()


@contextmanager
def held_for_all(
    claim: Callable[[float], AbstractContextManager[Claim]], wait: bool
) -> Iterator[Claim | None]:
    """Rank 0 holds ``claim(timeout_s)`` for all ranks, and has it in the block. Where another job
    holds it: with ``wait`` they wait for it, else all raise Busy."""
    with ExitStack() as stack:
        held: list[Claim] = []

        def take() -> None:
            held.append(stack.enter_context(claim(_ASK_AGAIN_S if wait else 0)))

        while True:
            try:
                from_first(take)
                break
            except Busy:
                if not wait:
                    raise
        yield held[0] if held else None


def share(items: Sequence[T]) -> list[T]:
    """This rank's part: contiguous, first ranks get one more where it does not come out even."""
    size, rest = divmod(len(items), get_world_size())
    rank = get_rank()
    start = rank * size + min(rank, rest)
    return list(items[start : start + size + (rank < rest)])


def all_alike(facts: dict[str, Any]) -> None:
    """NemfError naming the facts in which the ranks differ: then they do not do one job."""
    everybody = all_gather_object(facts)
    differing = [name for name in facts if any(e.get(name) != facts[name] for e in everybody)]
    if differing:
        name = differing[0]
        values = " and ".join(sorted({str(e.get(name))[:200] for e in everybody}))
        raise NemfError(
            f"the processes of this job differ in {', '.join(differing)} ({name}: {values}): give "
            "all of them the same code, libraries, data, threads and kind of device"
        )


class RankRunner(Runner):
    """MMEngine's runner for this job's ranks. The model is not wrapped: losses and gradients are
    summed in :class:`experiments.matcher_training.MatcherTraining`."""

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        if not self.distributed:
            return super().wrap_model(model_wrapper_cfg, model)
        return model.to(get_device())

    @master_only
    def save_checkpoint(self, out_dir: str, filename: str, *arguments: Any, **more: Any) -> None:
        """As MMEngine's, but whole or not at all."""
        save = super().save_checkpoint
        write_whole(
            Path(out_dir) / filename,
            lambda draft: save(str(draft.parent), draft.name, *arguments, **more),
        )


@DATA_SAMPLERS.register_module()
class WholeOrder(Sampler):
    """The order of the whole dataset, the same on every rank. Shuffled as MMEngine's
    ``DefaultSampler`` shuffles in one process, by seed and epoch."""

    def __init__(self, dataset: Any, shuffle: bool = False, seed: int | None = None) -> None:
        if shuffle and seed is None:
            raise NemfError("shuffled training needs a seed: set randomness=dict(seed=...)")
        self.dataset, self.shuffle, self.seed, self.epoch = dataset, shuffle, seed, 0

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            return iter(range(len(self.dataset)))
        generator = torch.Generator()
        generator.manual_seed(self.seed + self.epoch)
        return iter(torch.randperm(len(self.dataset), generator=generator).tolist())

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


@DATA_SAMPLERS.register_module()
class ShareOfBatch(BatchSampler):
    """This rank's part of each batch, in order; empty if a batch has fewer samples than ranks."""

    def __iter__(self) -> Iterator[list[int]]:
        return (share(batch) for batch in super().__iter__())
