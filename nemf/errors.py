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
    """ " (did you mean 'x'?)" with the names that look like a mistyped one, else ""."""
    import difflib

    close = difflib.get_close_matches(name, list(known), n=3)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""
