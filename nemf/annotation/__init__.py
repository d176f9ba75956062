"""Annotating one's own photographs by hand: a list of pairs on disk, a local server, one page."""
