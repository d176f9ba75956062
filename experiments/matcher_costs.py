"""What each matcher costs: parameters, arithmetic, time and memory, for ``nemf bench matchers``.

Every matcher is measured in a process of its own, one after the other, on the same two pictures.
"""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.configurations import fill_weights, load_config
from experiments.provenance import code_state
from nemf.cards import available_matchers
from nemf.errors import NemfError
from nemf.pairs import Size

N_POINTS = 10
_REPEATS = 3
_ENOUGH_S = 20.0  # no further repeat after this long


def paper_settings() -> list[dict[str, Any]]:
    """Every registered matcher as its constructor builds it, which is its paper's setting, on
    random weights: they cost what trained ones do, except where the search depends on them."""
    tasks = []
    for name, card in available_matchers().items():
        model = {"type": name} if card.backbone == "none" else {"type": name, "init": "random"}
        tasks.append({"label": card.title, "published_as": card.published_as, "model": model})
    return tasks


def of_configs(names: Sequence[str], out: Path) -> list[dict[str, Any]]:
    """Matcher configs by name, with their weights (from ``out`` where they were trained there).

    NemfError for an unknown name, WeightsNotFound where there are none.
    """
    tasks = []
    for name in names:
        config = load_config(f"{name}/spair")  # a matcher's part is the same for every dataset
        fill_weights(config, out)
        tasks.append({"label": config.label, "published_as": None, "model": dict(config.model)})
    return tasks


def measure(
    tasks: Sequence[dict[str, Any]], *, size: Size = (375, 500), device: str = "cpu"
) -> dict[str, Any]:
    """The costs of every task: the content of ``costs.json`` but for the accuracies.

    ``size`` (height, width) of both pictures; ``device`` as torch names it. Per row ``parameters``,
    ``image_gflop`` and ``pair_gflop`` (a multiplication with its addition counts as two; matrix
    products, convolutions and attention only), ``image_ms`` to encode one image, ``pair_ms`` to
    match two encoded ones (the shortest of some runs) and ``peak_mib``: what the process holds at
    most beyond its libraries; on a GPU what torch holds there. NemfError naming the matcher that
    cannot be measured.
    """
    rows, machine = [], {}
    for task in tqdm(tasks, unit="matcher", disable=None):
        wanted = task | {"size": size, "device": device}
        child = subprocess.run(
            [sys.executable, "-m", "experiments.matcher_costs"],
            input=json.dumps(wanted),
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode != 0:
            reason = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise NemfError(f"{task['label']} cannot be measured: {reason}")
        row, machine = json.loads(child.stdout.splitlines()[-1])
        rows.append({key: task[key] for key in ("label", "published_as")} | row)
    return {
        "machine": machine,
        "size": list(size),
        "n_points": N_POINTS,
        "code": code_state(),
        "rows": rows,
    }


def measure_one(task: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """One row, measured in this process, which should be fresh, and on what it was measured."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import nemf
    from nemf.pairs import Image

    device = torch.device(task["device"])
    gpu = device.type == "cuda"
    with suppress(OSError):  # Linux: forget what importing the libraries took for a moment
        Path("/proc/self/clear_refs").write_text("5")
    before = _peak_bytes()
    model = dict(task["model"])
    matcher = nemf.build_matcher(model.pop("type"), **model).to(device)
    height, width = task["size"]
    images = [Image.from_pixels(_picture(seed, height, width), "cat") for seed in (0, 1)]
    places = np.random.default_rng(2).uniform(0, [width - 1, height - 1], (N_POINTS, 2))
    points = torch.from_numpy(places.astype(np.float32)).to(device)

    def encode() -> list[Any]:
        with torch.no_grad():
            roles = ("query", "reference")
            return [
                matcher.encode([image], role)[0] for image, role in zip(images, roles, strict=True)
            ]

    def match() -> None:
        with torch.no_grad():
            matcher.match([encoded[0]], [encoded[1]], [points])

    encoded = encode()
    match()  # what only the first one pays for
    wait = torch.cuda.synchronize if gpu else lambda: None
    image_s, pair_s = _shortest(encode, wait) / len(images), _shortest(match, wait)
    peak = torch.cuda.max_memory_allocated() if gpu else _peak_bytes() - before
    gflop = []
    for work in (encode, match):
        counter = FlopCounterMode(display=False)
        with counter:
            work()
        gflop.append(counter.get_total_flops() / 1e9)
    row = {
        "parameters": sum(p.numel() for p in matcher.parameters()),
        "image_gflop": gflop[0] / len(images),
        "pair_gflop": gflop[1],
        "image_ms": 1000 * image_s,
        "pair_ms": 1000 * pair_s,
        "peak_mib": peak / 2**20,
        "random_weights": matcher.random_weights,
    }
    machine = {
        "device": torch.cuda.get_device_name() if gpu else f"CPU {platform.machine()}",
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }
    return row, machine


def _picture(seed: int, height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3): smooth random patches, alike on every machine."""
    import PIL.Image

    coarse = np.random.default_rng(seed).integers(0, 256, (height // 25, width // 25, 3), np.uint8)
    smooth = PIL.Image.Resampling.BICUBIC
    return np.asarray(PIL.Image.fromarray(coarse).resize((width, height), smooth))


def _shortest(work: Callable[[], object], wait: Callable[[], object]) -> float:
    taken: list[float] = []
    while len(taken) < _REPEATS and sum(taken) < _ENOUGH_S:
        wait()
        start = time.perf_counter()
        work()
        wait()
        taken.append(time.perf_counter() - start)
    return min(taken)


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure_one(json.load(sys.stdin))) + "\n")
