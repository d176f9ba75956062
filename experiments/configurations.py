"""Configs: one per matcher x dataset, composed from a matcher base and a dataset base.

``<matcher>/<dataset>`` names the config that inherits from ``configs/runtime.py``,
``configs/matchers/<matcher>.py`` and ``configs/datasets/<dataset>.py``; so a new matcher is one
config file that works on every dataset, and the other way round. ``path/to/mine.py/<dataset>`` does
the same with a matcher file of one's own. A path to a whole config (which may inherit from these
through ``_base_``) works everywhere a name does.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemf.errors import NemfError, WeightsNotFound, did_you_mean

if TYPE_CHECKING:
    from mmengine.config import Config

CONFIGS = Path(__file__).parent / "configs"
_ENTRIES = ("label", "model", "batch", "recipe", "checkpoints", "dataset", "predict", "seed")


def config_names(kind: str) -> list[str]:
    """Names of the "matchers" or "datasets" bases, or of the "training" recipes."""
    return sorted(path.stem for path in (CONFIGS / kind).glob("[!_]*.py"))


def load_config(name: str, options: dict[str, Any] | None = None) -> Config:
    """A config by ``<matcher>/<dataset>``, the matcher by name or path, or a whole config by path;
    with ``--cfg-options`` merged in.

    NemfError for an unknown name, a file that does not parse, or an option that does not fit.
    """
    if name.endswith(".py"):
        config = _from_file(Path(name))
    else:
        matcher, slash, dataset = name.rpartition("/")
        if not slash:
            _base("matchers", name, name)
            raise NemfError(
                f"unknown config {name!r}: it names a matcher only; give <matcher>/<dataset>, e.g. "
                f"{name}/folder, with one of the datasets {', '.join(config_names('datasets'))}"
            )
        parts = (("matchers", matcher), ("datasets", dataset))
        bases = [CONFIGS / "runtime.py", *(_base(kind, part, name) for kind, part in parts)]
        config = _parse(lambda: _inherit(bases), name)
    _check_entries(config, name)
    return _merged(config, options, name)


def names_of(name: str) -> tuple[str, ...]:
    """The name as typed and, if a matcher config is called so, the label of its predictions."""
    if name not in config_names("matchers"):
        return (name,)
    return name, load_config(f"{name}/spair").label


def row_order(matchers: tuple[str, ...]) -> dict[str, int]:
    """Position of each matcher config's label."""
    return {load_config(f"{m}/spair").label: i for i, m in enumerate(matchers)}


def training_config(name: str, options: dict[str, Any] | None = None) -> Config:
    """A training config by its name in ``configs/training`` or by path. Errors as for
    :func:`load_config`."""
    path = Path(name) if name.endswith(".py") else CONFIGS / "training" / f"{name}.py"
    if not name.endswith(".py") and name not in config_names("training"):
        known = config_names("training")
        raise NemfError(
            f"unknown training config {name!r}{did_you_mean(name, known)}: choose "
            f"{', '.join(known)}, or a path in .py"
        )
    return _merged(_from_file(path), options, name)


def trained_file(recipe: str, out: Path) -> Path:
    """Where the weights of a training config of that name end up."""
    return out / "training" / recipe / f"{recipe}.pth"


def fill_weights(config: Config, out: Path) -> None:
    """Gives a matcher config its weights: with a ``recipe`` those of that training, from ``out`` or
    ``<recipe>.pth`` in ``$NEMF_WEIGHTS``; with ``checkpoints`` the file that they name for the
    dataset's type (SPair-71k's where they name none), below ``$NEMF_WEIGHTS``. Weights named in
    the config win. WeightsNotFound if there are none."""
    recipe, checkpoints = config.get("recipe"), config.get("checkpoints")
    if config.model.get("weights") or config.model.get("init") or not (recipe or checkpoints):
        return
    folder = os.environ.get("NEMF_WEIGHTS")
    places = [trained_file(recipe, out)] if recipe else []
    wanted = f"{recipe}.pth" if recipe else checkpoints.get(config.dataset.type, checkpoints.spair)
    if folder:
        places.append(Path(folder) / wanted)
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        known = config_names("training")
        train = ""
        if recipe in known:
            train = f"run `nemf train {recipe}`, or "
        elif recipe:
            train = (
                f"no recipe of the suite is called {recipe!r}{did_you_mean(recipe, known)}; one of "
                f"your own is trained by `nemf train PATH/{recipe}.py`; or "
            )
        raise WeightsNotFound(
            f"no weights for {config.label}: {train}put {wanted} into the folder of --weights "
            f"({folder or 'not given'})"
        )
    config.model.weights = str(found)


def _base(kind: str, part: str, name: str) -> Path:
    """The file of a ``part`` of the config ``name``, by its own name or, of a matcher, by path."""
    if kind == "matchers" and part.endswith(".py"):
        if not Path(part).is_file():
            raise NemfError(f"{part}: no such matcher config")
        return Path(part).resolve()
    known = config_names(kind)
    if part not in known:
        meant = did_you_mean(part, known)
        listed = "" if meant else f" with one of the {kind} {', '.join(known)}"
        raise NemfError(
            f"unknown config {name!r}{meant}: expected <matcher>/<dataset>{listed}, or a path "
            "ending in .py"
        )
    return CONFIGS / kind / f"{part}.py"


def _from_file(path: Path) -> Config:
    from mmengine.config import Config

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


def _check_entries(config: Config, name: str) -> None:
    """NemfError for an entry that looks like a mistyped one, which nobody would read, and for a
    label that names no row. Other entries are the config's own: it is Python and may compute."""
    for entry in config:
        close = difflib.get_close_matches(entry, _ENTRIES, n=1, cutoff=0.75)
        if entry not in _ENTRIES and close:
            raise NemfError(
                f"{name}: unknown entry {entry!r} (did you mean {close[0]!r}?); an entry of your "
                "own needs a name that looks like none of them"
            )
    label = config.get("label")
    if not isinstance(label, str) or not label.strip():
        raise NemfError(
            f"{name}: label must be a text, the name of its row in tables, not {label!r}"
        )


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
    from mmengine.config import Config

    text = "_base_ = " + repr([str(base) for base in bases]) + "\n"
    return Config.fromstring(text, ".py")


def _parse(build: Any, name: str) -> Config:
    try:
        return build()
    except NemfError:
        raise
    except FileNotFoundError as problem:
        raise NemfError(
            f"{name}: {problem.filename or problem} is not there; _base_ is relative to the config "
            f"or absolute, and the suite's own lie in {CONFIGS}"
        ) from None
    except Exception as problem:  # a config is Python: anything can happen in it
        raise NemfError(
            f"{name}: cannot be read as a config ({type(problem).__name__}: {problem})"
        ) from None
