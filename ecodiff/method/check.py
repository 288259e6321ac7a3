"""What of a pipeline can be pruned, and whether learning through its loop is exact: tried in seconds, on two steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from ecodiff.errors import EcoDiffError
from ecodiff.pipelines.parts import denoiser as find_denoiser
from ecodiff.pipelines.prompts import checked_prompts, encoding_once
from ecodiff.pipelines.running import on_device

from .checkpointing import undisturbed
from .config import LearnConfig
from .exact import limits, measure
from .learn import Task, refuse_unfit
from .sites import find_sites, share_reached, skipped_modules
from .trial import failing_sites


@dataclass(frozen=True)
class Checked:
    """What `check` found.

    reached: share of the denoiser's parameters that goes with its units.  units: by kind.  failing: {site: why its
    units cannot be removed}.  skipped: {module: why it has no units}.  open_loss: the loss with every gate open, over
    the variance of the latents; 0 where a sample is the same each time.  gradient: relative difference between the
    gradient with time-step checkpointing and without.  slope: relative difference between the gradient and a finite
    difference.  problem: the sentence with which the loop refuses to be learned through, or None.
    """

    pipeline: str
    reached: float
    units: dict[str, int]
    failing: dict[str, str]
    skipped: dict[str, str]
    open_loss: float | None = None
    gradient: float | None = None
    slope: float | None = None
    problem: str | None = None
    limits: Mapping[str, float] = field(default_factory=dict)
    """The most that ``open_loss``, ``gradient`` and ``slope`` may be (`ecodiff.method.exact`)."""

    @property
    def learns(self) -> bool:
        """Whether a mask can be learned through the pipeline's loop, with exact gradients."""
        numbers = {"open_loss": self.open_loss, "gradient": self.gradient, "slope": self.slope}
        if self.problem is not None or None in numbers.values():
            return False
        return all(number <= self.limits[name] for name, number in numbers.items() if number is not None)

    def __str__(self) -> str:
        units = ", ".join(f"{count:,} of kind {kind}" for kind, count in self.units.items() if count)
        lines = [f"{self.pipeline}: units with {self.reached:.1%} of the denoiser's parameters ({units or 'none'})."]
        for name, why in list(self.failing.items())[:3]:
            lines.append(f"Cannot be pruned: {name}: {why}.")
        for name, why in list(self.skipped.items())[:3]:
            lines.append(f"Has no units: {name}: {why}.")
        if self.problem is not None:
            lines.append(f"Cannot be learned through: {self.problem}")
        elif self.learns:
            lines.append(
                "Learning through its loop is exact: with checkpointing as without, and as finite differences."
            )
        else:
            lines.append(
                f"Learning is not exact: loss {self.open_loss:.3g} with open gates, gradient off by "
                f"{self.gradient:.3g} with checkpointing, and by {self.slope:.3g} against a finite difference."
            )
        return "\n".join(lines)


def check(pipe, prompts: Sequence, config: LearnConfig | None = None) -> Checked:
    """Try a pipeline before hours of work: which units can go, and whether gradients through its loop are exact.

    Args:
        pipe: a diffusers pipeline with weights.
        prompts: as for `learn`; the first is used.
        config: guidance, size and the like as for `learn`. Two denoising steps are made in place of its own number,
            where the loop makes a step of two.

    Prints nothing; ``print`` the result for a summary. Raises EcoDiffError for prompts that are none.
    """
    prompts = list(checked_prompts(prompts, "check"))[:1]
    config = replace(config or LearnConfig(), batch_size=1)
    network = find_denoiser(pipe)
    sites = find_sites(network)
    left = sites
    failing: dict[str, str] = {}
    measured: dict = {}
    with on_device(pipe, "check") as device, undisturbed(device):
        try:
            refuse_unfit(network, "learn")
            task = Task(encoding_once(pipe), prompts, config, device)
            failing = failing_sites(network, sites, partial(task.latents, [0], gradients=False))
            left = {name: site for name, site in sites.items() if name not in failing}
            if not left:
                raise EcoDiffError("no site of its denoiser can be pruned.")
            measured = {**measure(task, left), "limits": limits(task)}
        except EcoDiffError as error:
            measured = {"problem": str(error)}
    units: dict[str, int] = {}
    for site in left.values():
        units[site.kind] = units.get(site.kind, 0) + site.units
    share = share_reached(network, left)
    return Checked(type(pipe).__name__, share, units, failing, skipped_modules(network), **measured)
