"""The processes of a run that a launcher started, such as ``accelerate launch`` or ``torchrun``.

Work is dealt out by number: of n processes, process r takes the items r, r + n, r + 2n, and so on. The first process
writes files and tells the user what happens. A run of one process pays nothing for any of this, and torch is loaded
only where processes exchange something.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from .errors import EcoDiffError

if TYPE_CHECKING:
    from torch import Tensor

# Processes wait for the slowest one, which may have hours more to do. A process that fails does not keep the others
# waiting, since the launcher ends them.
_PATIENCE = timedelta(days=7)


def count() -> int:
    """How many processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK") or 0)


def is_first() -> bool:
    """Whether this process writes files and tells the user what happens."""
    return rank() == 0


def own(items: Sequence) -> Sequence:
    """The items of this process: each ``count()``-th one, from number ``rank()`` on."""
    return items[rank() :: count()]


def gathered(part: Sequence) -> list:
    """The items of all processes in their order, in each process; ``part`` holds those that `own` gave to this one."""
    if count() == 1:
        return list(part)
    from accelerate.utils import gather_object

    state()
    parts = gather_object([list(part)])
    items: list = [None] * sum(map(len, parts))
    for number, each in enumerate(parts):
        items[number :: len(parts)] = each
    return items


def summed(tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors, which have one shape; the same bits in each process."""
    if count() == 1:
        return tensor
    from accelerate.utils import reduce

    state()
    return reduce(tensor, "sum")


def of_first(function: Callable[[], Any]) -> Any:
    """What the function returns or raises in the first process, in all processes; the others do not call it."""
    if count() == 1:
        return function()
    from accelerate.utils import broadcast_object_list

    state()
    result, error = None, None
    if is_first():
        try:
            result = function()
        except Exception as raised:  # noqa: BLE001 (the others wait for whatever comes out)
            error = raised
    result, error = broadcast_object_list([result, error])
    if error is not None:
        raise error
    return result


def wait() -> None:
    """Return when all processes have come as far as here."""
    if count() > 1:
        state().wait_for_everyone()


def state():
    """accelerate's state of this process; with a launcher, the processes know each other once it is made."""
    from accelerate import PartialState

    if count() == 1:
        return PartialState()
    for library in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{library}", "").lower() == "true":
            raise EcoDiffError(
                f"The launcher was told to use {library}, which shards weights that are trained. Here weights are "
                "frozen and each process holds the whole pipeline: launch without it. For a denoiser that no GPU "
                "holds, see the page 'More than one machine'."
            )
    # Without being told so, accelerate does not look for other processes on a CPU.
    made = PartialState(cpu=_on_cpu(), timeout=_PATIENCE)
    if made.num_processes != count():
        raise EcoDiffError(
            f"The launcher started {count()} processes, and accelerate's PartialState was made earlier for "
            f"{made.num_processes}: make it with PartialState(cpu=True), or leave that to the functions here."
        )
    return made


def _on_cpu() -> bool:
    """Whether the processes compute on CPUs."""
    import torch

    if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return True
    return not (torch.accelerator if hasattr(torch, "accelerator") else torch.cuda).is_available()


def leave() -> None:
    """Say good-bye to the other processes, at the end of a run."""
    if count() > 1 and "accelerate" in sys.modules:
        from accelerate import PartialState

        if PartialState._shared_state:
            PartialState().destroy_process_group()


def work_alone() -> tuple[int, int]:
    """From now on this process works as if no launcher had started it, on the device that it was given.

    Returns what ``rank()`` and ``count()`` were. For processes that have nothing to tell each other.
    """
    was = rank(), count()
    if count() > 1:
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or 0) % torch.cuda.device_count())
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
    return was
