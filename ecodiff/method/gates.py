"""Hard concrete gates of all sites (§2.2, App. F): sampled, saved, read, and turned into a mask.

A gate z in [0, 1] multiplies one unit. Its distribution is a stretched and clipped concrete variable (Louizos et al.,
2018), so that z is exactly 0 and exactly 1 with positive probability and still has a gradient in between.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from ecodiff.errors import EcoDiffError
from ecodiff.storage.tensors import read_tensors, write_tensors

from .hard_concrete import HardConcrete
from .sites import KINDS, Site, check_units, find_sites

FORMAT = "ecodiff.gates.1"


@dataclass(eq=False)
class Gates:
    """What learning returns: one λ = log α per unit, the distribution it belongs to, and how it got there.

    log_alpha: {site name: fp32 tensor [units]}; history: one row (a dict of numbers) per update; snapshots: λ after
    some of the updates, {update: {site name: tensor [units]}} (in memory only, `save` leaves them out).
    """

    sites: dict[str, Site]
    log_alpha: dict[str, Tensor]
    distribution: HardConcrete = field(default_factory=HardConcrete)
    history: list[dict] = field(default_factory=list)
    snapshots: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self):
        check_units(self.log_alpha, self.sites, "gates")
        for name in self.sites:
            if name not in self.log_alpha:
                raise EcoDiffError(f"gates: no λ for site {name!r}; λ of another model?")
        # In the order of the sites, in which `sample` deals out its random numbers.
        self.log_alpha = {name: self.log_alpha[name].float() for name in self.sites}

    @classmethod
    def start(cls, sites: Mapping[str, Site], value: float, distribution: HardConcrete | None = None, device="cpu"):
        """Gates whose λ are all `value`, ready to learn (leaf tensors that require a gradient)."""
        log_alpha = {name: torch.full((site.units,), float(value), device=device) for name, site in sites.items()}
        for tensor in log_alpha.values():
            tensor.requires_grad_()
        return cls(dict(sites), log_alpha, distribution or HardConcrete())

    @classmethod
    def from_tensors(cls, log_alpha: Mapping[str, Tensor], denoiser: nn.Module, distribution=None) -> "Gates":
        """Gates from λ of any origin, checked against the denoiser: every name must be a site, every size its units."""
        all_sites = find_sites(denoiser, KINDS)
        check_units(log_alpha, all_sites, "gates")
        sites = {name: site for name, site in all_sites.items() if name in log_alpha}
        return cls(sites, dict(log_alpha), distribution or HardConcrete())

    def scores(self) -> dict[str, Tensor]:
        """λ as scores (App. K.2): the higher, the more useful the unit."""
        return {name: value.detach() for name, value in self.log_alpha.items()}

    def mask(self, ratio, scope: str = "kind", count: str = "units", round_to=1) -> dict[str, Tensor]:
        """`make_mask` of the scores."""
        from .mask import make_mask

        return make_mask(self.scores(), self.sites, ratio, scope=scope, count=count, round_to=round_to)

    def sample(self, generator: torch.Generator | None = None, samples: int | None = None) -> dict[str, Tensor]:
        """One gate per unit, {site name: fp32 tensor [units]}: one draw of `generator` for all sites, in order.

        ``samples``: so many draws, one after the other: tensors [samples, units].
        """
        # Drawn where the generator lies and sent to λ, so that the numbers do not depend on the device that learns.
        device = generator.device if generator is not None else "cpu"
        units = [site.units for site in self.sites.values()]
        shape = (sum(units),) if samples is None else (samples, sum(units))
        uniform = torch.rand(shape, generator=generator, device=device).split(units, dim=-1)
        gates = {}
        for (name, value), u in zip(self.log_alpha.items(), uniform, strict=True):
            gates[name] = self.distribution.sample(value, u.to(value.device))
        return gates

    def deterministic(self) -> dict[str, Tensor]:
        """The gates without noise, {site name: fp32 tensor [units]}."""
        return {name: self.distribution.deterministic(value) for name, value in self.log_alpha.items()}

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file with the distribution, the sites and a checksum in its metadata; all or nothing."""
        metadata = {
            "format": FORMAT,
            "distribution": json.dumps(asdict(self.distribution)),
            "sites": json.dumps({name: [site.kind, site.units] for name, site in self.sites.items()}),
            "history": json.dumps(self.history),
        }
        write_tensors(path, self.log_alpha, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike, denoiser: nn.Module) -> "Gates":
        """Read what `save` wrote and check it against the denoiser.

        Raises EcoDiffError for a missing, truncated or changed file and for λ of another model.
        """
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != FORMAT:
            raise EcoDiffError(f"{path}: not written by Gates.save; for λ of another origin use Gates.from_tensors.")
        try:
            for name, (kind, units) in json.loads(metadata["sites"]).items():
                if tuple(tensors[name].shape) != (units,):
                    raise EcoDiffError(f"{name} has {list(tensors[name].shape)} λ for {units} units ({kind}).")
            gates = cls.from_tensors(tensors, denoiser, HardConcrete(**json.loads(metadata["distribution"])))
            gates.history = json.loads(metadata["history"])
        except EcoDiffError as error:
            raise EcoDiffError(f"{path}: λ of another model: {error}") from error
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise EcoDiffError(f"{path}: its metadata are damaged ({error}); save the gates again.") from error
        return gates


def fresh_gates(gates: Gates, samples: int, rows: Sequence[int] | None = None) -> Callable[[str], Tensor]:
    """A function that draws gates [samples, units] for the site of a name: ``values`` for `apply_gates`.

    So each sample of the batch has gates of its own, drawn anew each time a site's module runs (as published), from
    torch's own CPU random state, which checkpointing can restore. ``rows``: the samples that run here (None: all); the
    gates of the others are drawn and left out, so that those of a sample do not depend on who runs the others.
    """

    def draw(name: str) -> Tensor:
        value = gates.log_alpha[name]
        uniform = torch.rand(samples, *value.shape)
        if rows is not None:
            uniform = uniform[rows]
        return gates.distribution.sample(value, uniform.to(value.device))

    return draw
