"""The exceptions whose message is meant for the person at the keyboard."""


class NemfError(ValueError):
    """A problem that the user can act on.

    The message is one line: it names the offending file or value and says what to do. The command
    line prints it without a traceback (unless ``--debug``) and exits with status 2.
    """


class WeightsNotFound(NemfError):
    """Weights that a matcher needs were not given and are not where they are looked for.

    A table leaves such a matcher out and says so; anything else about weights is an error.
    """
