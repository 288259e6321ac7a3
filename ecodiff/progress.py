"""What long work tells its user: lines, and bars where somebody looks at them. Of many processes the first tells."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from tqdm import tqdm

from . import processes


def say(text: str) -> None:
    """One line on standard error, above any bar."""
    if processes.is_first():
        tqdm.write(text, file=sys.stderr)


def progress_bar(work: Iterable | None = None, *, progress: bool = True, **settings) -> tqdm:
    """A bar of tqdm, with its settings, that shows on a terminal and in a notebook, and stays quiet in a log."""
    seen = sys.stderr.isatty() or _in_notebook()
    return tqdm(work, disable=not (progress and seen and processes.is_first()), **settings)


def _in_notebook() -> bool:
    """Whether this process is the kernel of a notebook; one that has merely imported ipykernel is not."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return "ipykernel" in sys.modules and shell is not None
