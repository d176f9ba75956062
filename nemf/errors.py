"""The exceptions whose message is meant for the person at the keyboard."""

from __future__ import annotations

from collections.abc import Iterable


class NemfError(ValueError):
    """A problem that the user can act on.

    The message is one line: it names the offending file or value and says what to do. The command
    line prints it without a traceback (unless ``--debug``) and exits with status 2.
    """


class WeightsNotFound(NemfError):
    """Weights that a matcher needs were not given and are not where they are looked for.

    A table leaves such a matcher out and says so; anything else about weights is an error.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" with the names that look like a mistyped one, else "". A name that is
    the other's beginning (hpf, hpf_resnet18) looks like it."""
    import difflib

    names = list(known)
    begun = [n for n in names if name and (n.startswith(f"{name}_") or name.startswith(f"{n}_"))]
    close = list(dict.fromkeys(begun + difflib.get_close_matches(name, names, n=3)))[:4]
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
