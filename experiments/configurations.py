"""Configs: one per matcher x dataset, composed from a matcher base and a dataset base.

``<matcher>/<dataset>`` names the config that inherits from ``configs/runtime.py``,
``configs/matchers/<matcher>.py`` and ``configs/datasets/<dataset>.py``; so a new matcher is one
config file that works on every dataset, and the other way round. A path to a config file of one's
own (which may inherit from these through ``_base_``) works everywhere a name does.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mmengine.config import Config

from nemf.errors import NemfError, WeightsNotFound

CONFIGS = Path(__file__).parent / "configs"


def config_names(kind: str) -> list[str]:
    """Names of the "matchers" or "datasets" bases, or of the "training" recipes."""
    return sorted(path.stem for path in (CONFIGS / kind).glob("[!_]*.py"))


def load_config(name: str, options: dict[str, Any] | None = None) -> Config:
    """A config by ``<matcher>/<dataset>`` or by path, with ``--cfg-options`` merged in.

    NemfError for an unknown name, a file that does not parse, or an option that does not fit.
    """
    if name.endswith(".py"):
        config = _from_file(Path(name))
    else:
        matcher, _, dataset = name.partition("/")
        parts = {"matchers": matcher, "datasets": dataset}
        for kind, part in parts.items():
            if part not in config_names(kind):
                raise NemfError(
                    f"unknown config {name!r}: expected <matcher>/<dataset> with matcher one of "
                    f"{', '.join(config_names('matchers'))} and dataset one of "
                    f"{', '.join(config_names('datasets'))}, or a path ending in .py"
                )
        bases = [CONFIGS / "runtime.py", *(CONFIGS / k / f"{p}.py" for k, p in parts.items())]
        config = _parse(lambda: _inherit(bases), name)
    return _merged(config, options, name)


def training_config(name: str, options: dict[str, Any] | None = None) -> Config:
    """A training config by its name in ``configs/training`` or by path. Errors as for
    :func:`load_config`."""
    path = Path(name) if name.endswith(".py") else CONFIGS / "training" / f"{name}.py"
    if not name.endswith(".py") and name not in config_names("training"):
        known = ", ".join(config_names("training"))
        raise NemfError(f"unknown training config {name!r}: choose {known}, or a path in .py")
    return _merged(_from_file(path), options, name)


def trained_file(recipe: str, out: Path) -> Path:
    """Where the weights of a training config of that name end up."""
    return out / "training" / recipe / f"{recipe}.pth"


def fill_weights(config: Config, out: Path) -> None:
    """Gives a matcher config with a ``recipe`` the weights of that training: from ``out``, else
    ``<recipe>.pth`` in ``$NEMF_WEIGHTS``. Weights named in the config win. WeightsNotFound if there
    are none."""
    recipe = config.get("recipe")
    if recipe is None or config.model.get("weights") or config.model.get("init"):
        return
    places = [trained_file(recipe, out)]
    if os.environ.get("NEMF_WEIGHTS"):
        places.append(Path(os.environ["NEMF_WEIGHTS"]) / f"{recipe}.pth")
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise WeightsNotFound(
            f"no weights for {config.label}: run `nemf train {recipe}`, or put {recipe}.pth into "
            "the folder of --weights"
        )
    config.model.weights = str(found)


def _from_file(path: Path) -> Config:
    if not path.is_file():
        raise NemfError(f"{path}: no such config file")
    return _parse(lambda: Config.fromfile(path), str(path))


def _merged(config: Config, options: dict[str, Any] | None, name: str) -> Config:
    """``config`` with ``--cfg-options``."""
    for key in options or {}:
        _check_key(config, key, name)
    try:
        config.merge_from_dict(options or {})
    except (TypeError, KeyError, AssertionError, IndexError) as problem:
        raise NemfError(f"--cfg-options {options} do not fit {name}: {problem}") from None
    return config


def relabel(config: Config, options: dict[str, Any], label: str | None = None) -> None:
    """Gives the row of a table its name: ``label``, or the config's own plus every ``model``
    option, so that a changed matcher never stands under the unchanged one's name."""
    changed = ", ".join(
        # of a path only the file's name: the label goes into tables
        f"{key.removeprefix('model.')}={Path(str(value)).name if 'weights' in key else value}"
        for key, value in options.items()
        if key.startswith("model.")
    )
    config.label = label or (f"{config.label} [{changed}]" if changed else config.label)


def _check_key(config: Config, key: str, name: str) -> None:
    """NemfError if an option names an entry the config lacks. Below an entry with a ``type`` any
    keyword of the constructor may be given; the constructor refuses the others."""
    node: Any = config.to_dict()
    for part in key.split("."):
        if isinstance(node, dict) and "type" in node and part not in node:
            return
        if isinstance(node, dict) and part not in node:
            known = ", ".join(map(str, node))
            raise NemfError(f"--cfg-options {key}: {name} has no {part!r} there (it has {known})")
        node = node[part] if isinstance(node, dict) else None


def _inherit(bases: list[Path]) -> Config:
    text = "_base_ = " + repr([str(base) for base in bases]) + "\n"
    return Config.fromstring(text, ".py")


def _parse(build: Any, name: str) -> Config:
    try:
        return build()
    except NemfError:
        raise
    except Exception as problem:  # a config is Python: anything can happen in it
        raise NemfError(
            f"{name}: cannot be read as a config ({type(problem).__name__}: {problem})"
        ) from None
