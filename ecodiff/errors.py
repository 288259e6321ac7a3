"""The one error a reader of this package meets, and how a command tells it."""

import sys
from collections.abc import Callable


class EcoDiffError(ValueError):
    """Something the caller can put right: one sentence that says what, where and what to do."""


def exit_status(run: Callable[[], int]) -> int:
    """What a command returns: ``run()``, or 2 where it raises EcoDiffError, after one line on standard error."""
    try:
        return run()
    except EcoDiffError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
