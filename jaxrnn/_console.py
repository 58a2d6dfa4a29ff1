"""Where the commands print, by rich."""

from typing import Any

from rich.console import Console as RichConsole


class Console(RichConsole):
    """rich's, in plain words: it neither colours what it is given nor reads markup in it."""

    def __init__(self, **options: Any):
        super().__init__(**{"highlight": False, "markup": False, **options})

    def on_broken_pipe(self) -> None:
        """Raise what it is: rich would end the process without a word."""
        raise  # the BrokenPipeError that is being handled
