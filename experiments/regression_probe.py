"""Questions that only a commit's own code can answer; run as a script with that commit's packages.

``python -P regression_probe.py scores|generator|cost``, asked by :mod:`experiments.regression`. The
file is the asking commit's, what it imports is the asked one's, so it keeps to functions that every
commit with a prediction store has.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any


def scores() -> None:
    """Scores prediction files pair by pair. Standard input: JSON list of ``file``, ``protocol``,
    ``alphas``, ``to`` (the parquet file to write)."""
    from pathlib import Path

    from nemf.predictions import Predictions
    from nemf.scoring import get_protocol
    from reports.records import score_pairs

    for task in json.load(sys.stdin):
        predictions = Predictions.read(Path(task["file"]))
        found = score_pairs(predictions, get_protocol(task["protocol"]), task["alphas"])
        found.frame.astype({"pair": str, "category": str}).to_parquet(task["to"])


def generator() -> None:
    """Answers what the stand-ins depend on: ``fingerprint``, a hash of every source that takes part
    in writing them, and ``rendering``, one of those alone that make pixels."""
    from experiments.provenance import code_fingerprint

    _say({"fingerprint": code_fingerprint("nemf.datasets.synthetic"), "rendering": _rendering()})


def _rendering() -> str:
    """Hex SHA-256 of the renderer, without comments and docstrings. Imports are not followed: how
    folders are locked or JSON is read changes no pixel. The same under every version of Python."""
    import ast
    import hashlib
    from importlib.util import find_spec
    from pathlib import Path

    def shape(node: Any) -> Any:
        if isinstance(node, list):
            return [shape(item) for item in node if not is_text(item)]
        if not isinstance(node, ast.AST):
            return repr(node)
        # ast.dump would show fields that only newer versions have, all of them empty here.
        fields = [(k, shape(v)) for k, v in ast.iter_fields(node) if v is not None and v != []]
        return [type(node).__name__, *fields]

    def is_text(node: Any) -> bool:
        is_constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        return is_constant and isinstance(node.value.value, str)

    digest = hashlib.sha256()
    for name in ("rendering", "synthetic_objects", "synthetic_scenes"):
        spec = find_spec(f"nemf.datasets.{name}")
        tree = ast.parse(Path(spec.origin).read_bytes()) if spec and spec.origin else None
        digest.update(repr((name, shape(tree))).encode())
    return digest.hexdigest()


def cost() -> None:
    """Predicts the same pairs again and again, a block for every line of standard input.

    Arguments: config, data root, output folder, protocol, number of pairs. Answers one JSON line
    when ready, one per block (``seconds`` per pair: of the processor, which other processes
    disturb little, or by the clock where a GPU works), and with the end of the input ``peak_mib``:
    the most that the process held, or that torch held on the GPU.
    """
    from pathlib import Path

    import torch

    import nemf
    from experiments import configurations
    from experiments.feature_cache import FeatureCache
    from experiments.jobs import open_dataset
    from experiments.prediction import predict_pairs
    from nemf.scoring import get_protocol

    name, data, out, protocol, n_pairs = sys.argv[2:7]
    config = configurations.load_config(name)
    if hasattr(configurations, "fill_weights"):  # commits before training have no recipes
        configurations.fill_weights(config, Path(out))
    model, options = dict(config.model), dict(config.dataset)
    dataset = open_dataset(options.pop("type"), Path(data), options.pop("split"), **options)
    plan = get_protocol(protocol).plan.for_layout(dataset.layout)
    matcher = nemf.build_matcher(model.pop("type"), **model)
    gpu = torch.cuda.is_available()
    now = time.perf_counter if gpu else time.process_time
    if gpu:
        matcher = matcher.cuda()
    step = max(1, len(dataset) // int(n_pairs))  # spread over the classes
    pairs = [dataset[i].oriented(plan) for i in range(0, len(dataset), step)][: int(n_pairs)]

    def block() -> float:
        cache = FeatureCache(matcher, dataset, config.predict.cache_mib * 2**20)
        start = now()
        with torch.no_grad():
            predict_pairs(matcher, cache, pairs, config.batch)
        if gpu:
            torch.cuda.synchronize()
        return (now() - start) / len(pairs)

    block()  # what only the first one pays for: lazy initialisation, file caches
    _say({"ready": True})
    for _ in sys.stdin:
        _say({"seconds": block()})
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if gpu:
        peak = torch.cuda.max_memory_allocated()
    _say({"peak_mib": peak / 2**20})


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    {"scores": scores, "generator": generator, "cost": cost}[sys.argv[1]]()
