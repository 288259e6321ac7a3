"""Hard concrete gates (§2.2, App. F) and how they are put into a running denoiser.

A gate z in [0, 1] multiplies one unit. Its distribution is a stretched and clipped concrete variable (Louizos et al.,
2018), so that z is exactly 0 and exactly 1 with positive probability and still has a gradient in between.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ecodiff.errors import EcoDiffError
from ecodiff.pipelines.forward_hooks import hooked, never_ran
from ecodiff.pipelines.loading import Experts, experts
from ecodiff.storage.paths import write_whole

from .sites import KINDS, Site, find_sites


@dataclass(frozen=True)
class HardConcrete:
    """The hard concrete distribution with the paper's constants.

    With u uniform in (0, 1), noise log((u + δ) / (1 - u + δ)) and location λ = log α,

        s = sigmoid((λ + noise) / temperature),        z = clip(s (ζ - γ) + γ, 0, 1).

    δ > 0 bounds the noise by ± log((1 + δ) / δ). Everything is computed in fp32, whatever dtype λ arrives in.
    """

    temperature: float = 0.83
    gamma: float = -0.1
    zeta: float = 1.1
    delta: float = 0.5

    def __post_init__(self):
        if not (self.temperature > 0 and self.gamma < 0 and self.zeta > 1 and self.delta >= 0):
            raise EcoDiffError(f"{self}: needs temperature > 0, gamma < 0, zeta > 1 and delta >= 0.")

    def sample(self, log_alpha: Tensor, u: Tensor) -> Tensor:
        """The gate for uniform noise `u` of `log_alpha`'s shape; differentiable in `log_alpha`."""
        u = u.float()
        return self._gate(log_alpha.float() + torch.log((u + self.delta) / (1 - u + self.delta)))

    def deterministic(self, log_alpha: Tensor) -> Tensor:
        """The gate without noise, which is the median of `sample`."""
        return self._gate(log_alpha.float())

    def prob_open(self, log_alpha: Tensor) -> Tensor:
        """P(z > 0), the term of Eq. 4 in closed form for any δ:

            clip((1 + 2δ) sigmoid(λ - temperature log(-γ / ζ)) - δ, 0, 1)

        since noise > x exactly when u > (1 + 2δ) sigmoid(x) - δ. Above `l0_saturation` it is 1 and has no gradient.
        """
        return ((1 + 2 * self.delta) * torch.sigmoid(log_alpha.float() - self._closed) - self.delta).clamp(0, 1)

    def expected_l0(self, log_alpha: Tensor) -> Tensor:
        """Expected number of open gates (Eq. 4), a scalar: the sum of `prob_open`."""
        return self.prob_open(log_alpha).sum()

    @property
    def saturation(self) -> float:
        """λ at and above which the gate is 1 for any noise, so that the reconstruction's gradient is exactly 0.

        3.089 for δ = 0.5, 4.388 for δ = 0.1, infinite for δ = 0.
        """
        return self._open + self._noise_bound

    @property
    def l0_saturation(self) -> float:
        """λ at and above which P(z > 0) is 1, so that the closed-form L0 has no gradient (-0.892 for δ = 0.5)."""
        return self._closed + self._noise_bound

    @property
    def always_closed(self) -> float:
        """λ at and below which the gate is 0 for any noise, so that nothing has a gradient; -inf for δ = 0."""
        return self._closed - self._noise_bound

    @property
    def _noise_bound(self) -> float:
        return math.log((1 + self.delta) / self.delta) if self.delta else math.inf

    @property
    def _closed(self) -> float:
        """λ + noise at and below which z is 0."""
        return self.temperature * math.log(-self.gamma / self.zeta)

    @property
    def _open(self) -> float:
        """λ + noise at and above which z is 1."""
        return self.temperature * math.log((1 - self.gamma) / (self.zeta - 1))

    def _gate(self, location: Tensor) -> Tensor:
        s = torch.sigmoid(location / self.temperature)
        return (s * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)


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
        if set(self.log_alpha) != set(self.sites):
            missing = next(name for name in self.sites if name not in self.log_alpha)
            raise EcoDiffError(f"gates: no λ for site {missing!r}; λ of another model?")
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
        found = find_sites(denoiser, KINDS)
        check_units(log_alpha, found, "gates")
        sites = {name: site for name, site in found.items() if name in log_alpha}
        return cls(sites, {name: log_alpha[name] for name in sites}, distribution or HardConcrete())

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
        device = generator.device if generator is not None else "cpu"
        units = [site.units for site in self.sites.values()]
        shape = (sum(units),) if samples is None else (samples, sum(units))
        parts = torch.rand(shape, generator=generator, device=device).split(units, dim=-1)
        return {
            name: self.distribution.sample(value, u.to(value.device))
            for (name, value), u in zip(self.log_alpha.items(), parts, strict=True)
        }

    def deterministic(self) -> dict[str, Tensor]:
        """The gates without noise, {site name: fp32 tensor [units]}."""
        return {name: self.distribution.deterministic(value) for name, value in self.log_alpha.items()}

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file with the distribution, the sites and a checksum in its metadata; all or nothing."""
        from safetensors.torch import save

        tensors = {name: value.detach().cpu().contiguous() for name, value in self.log_alpha.items()}
        metadata = {
            "format": "ecodiff.method.gates.1",
            "distribution": json.dumps(asdict(self.distribution)),
            "sites": json.dumps({name: [site.kind, site.units] for name, site in self.sites.items()}),
            "history": json.dumps(self.history),
        }
        metadata["sha256"] = _digest(tensors, metadata)
        path = Path(path)
        try:
            write_whole(path, save(tensors, metadata))
        except OSError as error:
            raise EcoDiffError(f"{path}: the gates could not be saved ({error}); nothing was written.") from error

    @classmethod
    def load(cls, path: str | os.PathLike, denoiser: nn.Module) -> "Gates":
        """Read what `save` wrote and check it against the denoiser.

        Raises EcoDiffError for a missing, truncated or changed file and for λ of another model.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise EcoDiffError(f"{path}: not a readable safetensors file ({error}); save the gates again.") from error
        if metadata.get("format") != "ecodiff.method.gates.1":
            raise EcoDiffError(f"{path}: not written by Gates.save; for λ of another origin use Gates.from_tensors.")
        if metadata.pop("sha256", None) != _digest(tensors, metadata):
            raise EcoDiffError(f"{path}: the contents do not fit their checksum; the file was changed or damaged.")
        for name, (kind, units) in json.loads(metadata["sites"]).items():
            if tuple(tensors[name].shape) != (units,):
                raise EcoDiffError(f"{path}: {name}: {list(tensors[name].shape)} λ for {units} units ({kind}).")
        try:
            gates = cls.from_tensors(tensors, denoiser, HardConcrete(**json.loads(metadata["distribution"])))
        except EcoDiffError as error:
            raise EcoDiffError(f"{path}: λ of another model: {error}") from error
        gates.history = json.loads(metadata["history"])
        return gates


def fresh_gates(gates: Gates, samples: int) -> Callable[[str], Tensor]:
    """A gate sample for each sample of the batch, drawn anew each time a site's module runs, from torch's own CPU
    random state (as published): ``values`` for `apply_gates`."""

    def draw(name: str) -> Tensor:
        value = gates.log_alpha[name]
        return gates.distribution.sample(value, torch.rand(samples, *value.shape).to(value.device))

    return draw


@contextmanager
def apply_gates(
    denoiser: nn.Module,
    values: Mapping[str, Tensor] | Callable[[str], Tensor],
    sites: Mapping[str, Site] | None = None,
    learned: Iterable[Tensor] = (),
    must_run: bool = True,
) -> Iterator[None]:
    """While the context is open every forward of the denoiser is multiplied by these gates (Eq. 9, 10); hooks only.

    Args:
        denoiser: the network; its weights do not change.
        values: {site name: tensor [units]}, float or bool; or tensors [samples, units], the gates of each sample of the
            batch, which guidance may repeat as a whole; or a function of the site's name that is asked once for each
            call of the site's module (a fresh sample a call, as the original code does).
        sites: the sites to gate when `values` is a function, all attentions and feed-forwards by default.
        learned: when `values` is a function: the tensors it makes gates from (λ). Time-step checkpointing returns
            gradients to these, and refuses to run on to a wrong gradient where they are left out.
        must_run: False allows gated layers that never run while the context is open.

    A gate multiplies the input of the layers that read its units, in the activations' dtype; joint attention's image
    and text outputs read the same heads and share their gates. The hooks are removed on exit, also after an error.
    A compiled denoiser runs eagerly inside, since compiled code does not see hooks.

    Raises EcoDiffError for gates that do not fit the sites, and on leaving for a gated layer that never ran, whose gate
    had no effect: leave its site out of ``values`` (or ``sites``) where that is meant.
    """
    if callable(values):
        sites = find_sites(denoiser) if sites is None else sites
        chosen, current, learned = dict(sites), {}, tuple(learned)
    else:
        sites = find_sites(denoiser, KINDS) if sites is None else sites
        check_units(values, sites, "apply_gates", samples=True)
        chosen, current, learned = {name: sites[name] for name in values}, dict(values), None

    opened = (current, learned)
    _OPEN.setdefault(denoiser, []).append(opened)
    try:
        with hooked(denoiser, "apply_gates", must_run) as hooks:
            for name, site in chosen.items():
                if callable(values):
                    hooks.before(name, _draw_hook(values, name, current), site=name)
                for span in site.gated:
                    if site.readers:
                        hooks.before(span.layer, _input_hook(current, name, span), site=name)
                    else:
                        hooks.after(span.layer, _output_hook(current, name, span), site=name)
            yield
    finally:
        _OPEN[denoiser] = [entry for entry in _OPEN[denoiser] if entry is not opened]


# For each denoiser the gates that are open on it: what its hooks multiply by, and what drawn gates are made from (None
# where gates are not drawn but given).
_OPEN: WeakKeyDictionary = WeakKeyDictionary()


class OpenGates:
    """The gates open on a denoiser as inputs of one of its calls, so that a call can be run again with others.

    ``values`` are the gates given to `apply_gates` that require gradients, ``learned`` what drawn gates are made from.
    """

    def __init__(self, denoiser: nn.Module):
        self.denoiser, self.checked = denoiser, False
        # Gates may be open on all experts of a pipeline, or on one of them alone.
        owners = [denoiser, *experts(denoiser)] if isinstance(denoiser, Experts) else [denoiser]
        entries = [entry for owner in owners for entry in _OPEN.get(owner, ())]
        self._places = [
            (current, name)
            for current, learned in entries
            if learned is None
            for name, value in current.items()
            if value.requires_grad
        ]
        self.values: list[Tensor] = [current[name] for current, name in self._places]
        drawn_from = [tensor for _, learned in entries for tensor in learned or ()]
        self.learned: list[Tensor] = [tensor for tensor in drawn_from if tensor.requires_grad]

    @contextmanager
    def replaced(self, values: Iterable[Tensor]) -> Iterator[None]:
        """Inside, hooks multiply by these in the place of ``values``, one each."""
        before = [current[name] for current, name in self._places]
        for (current, name), value in zip(self._places, values, strict=True):
            current[name] = value
        try:
            yield
        finally:
            for (current, name), value in zip(self._places, before, strict=True):
                current[name] = value


def _draw_hook(draw, name, current):
    def hook(x):
        current[name] = draw(name)

    return hook


def _input_hook(current, name, span):
    def hook(x):
        if name not in current:  # gates are drawn as the site's module is called
            raise never_ran("apply_gates", [name], 1, name)
        return _multiply(x, current[name], span)

    return hook


def _output_hook(current, name, span):
    def hook(args, kwargs, output):
        return _multiply(output, current[name], span)

    return hook


def _multiply(x: Tensor, gate: Tensor, span) -> Tensor:
    """x [..., channels] with the channels of each unit multiplied by its gate [units]; other channels unchanged. With
    gates [samples, units] the batch of x holds these samples in this order, once or repeated as a whole."""
    channels = gate.to(x.device, torch.float32).repeat_interleave(span.size, dim=-1)
    rest = x.shape[-1] - span.offset - channels.shape[-1]
    channels = nn.functional.pad(channels, (span.offset, rest), value=1.0).to(x.dtype)
    if gate.dim() == 1:
        return x * channels
    if x.shape[0] % len(gate):
        raise EcoDiffError(
            f"{len(gate)} samples have gates of their own, but {span.layer} was called with a batch of {x.shape[0]}: "
            "this pipeline splits its batch otherwise; learn with micro_batch_size=1."
        )
    return x * channels.repeat(x.shape[0] // len(gate), 1).view(x.shape[0], *[1] * (x.dim() - 2), -1)


def check_units(values: Mapping[str, Tensor], sites: Mapping[str, Site], where: str, samples: bool = False) -> None:
    """Raises EcoDiffError, beginning with ``where``, for a name that is no site or a number of units that is wrong.
    ``samples``: tensors [samples, units] are right, too."""
    for name, value in values.items():
        if name not in sites:
            raise EcoDiffError(f"{where}: {name!r} is not a site of this denoiser; find_sites lists them.")
        right = value.dim() == 1 or (samples and value.dim() == 2 and len(value))
        if not right or value.shape[-1] != sites[name].units:
            raise EcoDiffError(f"{where}: {name!r} has {sites[name].units} units, not {list(value.shape)}.")


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(sorted(metadata.items()))).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
