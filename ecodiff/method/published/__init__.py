"""λ that the authors of EcoDiff have published: masks without learning.

`published` gives those that come with this package (MIT licence, in the file LICENSE beside them); `import_published`
reads the files that the authors' own code writes.

Such a file is a bare list of tensors without names, one a module, in the order in which the network *calls* its
modules: down, middle, up for a U-Net. That is not the order of `named_modules`, in which `find_sites` lists them and
where the middle comes last, so the two must not be zipped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ecodiff.errors import EcoDiffError
from ecodiff.pipelines.parts import denoiser as find_denoiser
from ecodiff.pipelines.parts import experts, plain_module

from ..gates import Gates
from ..hard_concrete import HardConcrete
from ..mask import make_mask
from ..sites import KINDS, Site, find_sites, network_order

# SHA-256 of the files in this folder.
_FILES = {"sdxl": "9c87e9412188e21c7b92f8d119c2a51f0a413958e957113566efa7001a3c5454"}

_HEAD_CHANNELS = {"sdxl": 64}

NAMES = tuple(_FILES)
"""The models of which λ come with this package."""


@dataclass(frozen=True)
class Published:
    """λ of a model that need no pipeline to become a mask.

    log_alpha: {site name: fp32 tensor [units]}; distribution: the one that they were learned with; origin: where they
    are from, and their licence; sites: what is known of them without the model, which is not where their layers are.
    """

    name: str
    log_alpha: Mapping[str, Tensor]
    distribution: HardConcrete
    origin: str
    sites: Mapping[str, Site]

    def scores(self) -> dict[str, Tensor]:
        """λ as scores (App. K.2): the higher, the more useful the unit."""
        return dict(self.log_alpha)

    def mask(self, ratio, scope: str = "kind", count: str = "units", round_to=1) -> dict[str, Tensor]:
        """`make_mask` of the scores. `prune` checks that a pipeline has these sites with as many units.

        count: "units" or "parameters"; for "flops" give `gates(denoiser)` and sites that were measured to `make_mask`.
        """
        return make_mask(self.scores(), self.sites, ratio, scope=scope, count=count, round_to=round_to)

    def gates(self, denoiser: nn.Module) -> Gates:
        """λ as what learning returns, checked against the denoiser; raises EcoDiffError for another model's."""
        return Gates.from_tensors(self.log_alpha, denoiser, self.distribution)


def published(name: str) -> Published:
    """The published λ of a model, such as "sdxl": ``ecodiff.prune(pipe, ecodiff.published("sdxl").mask(0.2))``.

    Raises EcoDiffError where none were published, and where the file that came with the package was changed.
    """
    if name not in _FILES:
        raise EcoDiffError(
            f"published: published masks exist for: {', '.join(NAMES)}; not for {name!r}. ecodiff.learn learns one, "
            "and import_published reads files of the authors' code."
        )
    from safetensors import safe_open

    path = Path(__file__).with_name(f"{name}.safetensors")
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise EcoDiffError(f"published: {path} cannot be read ({error}): install the package again.") from error
    if digest != _FILES[name]:
        raise EcoDiffError(f"published: {path} is not the file that came with the package: install it again.")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        log_alpha = {site: file.get_tensor(site).float() for site in file.keys()}
    log_alpha = {site: log_alpha[site] for site in sorted(log_alpha, key=network_order)}
    facts = json.loads(metadata["sites"])
    sites = {}
    for site, value in log_alpha.items():
        kind, params_per_unit = facts[site]
        channels = _HEAD_CHANNELS[name] if kind == "attention" else 1
        sites[site] = Site(site, kind, value.numel(), channels, (), (), params_per_unit)
    distribution = HardConcrete(**json.loads(metadata["distribution"]))
    return Published(name, log_alpha, distribution, metadata["source"], sites)


def import_published(path: str | os.PathLike, pipe) -> Gates:
    """λ that the authors' code saved, with their names: a ``.pt`` file, or a folder with several (attn.pt, ff.pt ...).

    pipe: the pipeline (or denoiser) that they were learned for. Which modules a list is of is told by its numbers of
    units, which must agree with those of the modules in the order of calls. Nothing in the files is run
    (``weights_only``).

    Raises EcoDiffError for files that are no such lists, truncated or with other things in them than tensors, and for
    λ of another model.
    """
    network = plain_module(pipe) if isinstance(pipe, nn.Module) else find_denoiser(pipe)
    if len(experts(network)) > 1:
        raise EcoDiffError(
            "import_published: give one of the pipeline's denoisers; λ of the authors are of one network."
        )
    lists = _lists_in_call_order(network)
    log_alpha: dict[str, Tensor] = {}
    of_file: dict[str, Path] = {}
    for file in _files(Path(path)):
        kind, named = _named(file, _read(file), lists)
        if kind in of_file:
            raise EcoDiffError(
                f"{path}: {of_file[kind].name} and {file.name} are both λ of the {kind} sites; keep one."
            )
        of_file[kind] = file
        log_alpha |= named
    return Gates.from_tensors(log_alpha, network)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.pt"))
    if not files:
        raise EcoDiffError(
            f"{path}: no .pt file is in this folder; the authors' code writes attn.pt, ff.pt and norm.pt."
        )
    return files


def _read(file: Path) -> list[Tensor]:
    """The list of λ in a file, each [units] and finite."""
    if not file.is_file():
        raise EcoDiffError(f"{file}: there is no such file; give a .pt file of the authors' code, or their folder.")
    try:
        content = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # whatever is in it: unpickling, a broken archive, and torch's own checks
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise EcoDiffError(
            f"{file}: is damaged, or holds more than tensors, and was not read ({reason[0][:200]})."
        ) from error
    if not isinstance(content, (list, tuple)) or not content:
        raise EcoDiffError(
            f"{file}: holds a {type(content).__name__} in the place of a list of λ, one tensor a module."
        )
    for number, value in enumerate(content):
        right = isinstance(value, Tensor) and value.ndim == 1 and value.is_floating_point() and value.numel()
        if not right or value.is_meta or not torch.isfinite(value).all():
            raise EcoDiffError(f"{file}: entry {number} is no tensor of finite λ, one a unit of a module.")
    return [value.detach().float() for value in content]


def _named(file: Path, values: list[Tensor], lists: Mapping[str, list[list[tuple[str, int]]]]) -> tuple[str, dict]:
    """The kind of sites that λ are of, and λ by their names."""
    units = [value.numel() for value in values]
    for kind, candidates in lists.items():
        for modules in candidates:
            if [size for _, size in modules] == units:
                named = {name: value for (name, _), value in zip(modules, values, strict=True) if name}
                return kind, named
    expected = []
    for kind, candidates in lists.items():
        if candidates[0]:
            sizes = [size for _, size in candidates[0]]
            expected.append(f"{len(sizes)} {kind} modules with {sum(sizes)} units")
    raise EcoDiffError(
        f"{file}: λ of another model, or in another order: {len(units)} modules with {sum(units)} units, where this "
        f"one has, in the order of calls, {', '.join(expected) or 'none that the authors prune'}."
    )


def _lists_in_call_order(network: nn.Module) -> dict[str, list[list[tuple[str, int]]]]:
    """{kind: the lists that the authors' code may have made}, each of (site name, units) in the order of calls.

    A module that their code masks and that is no site here has no name. Their lists of FLUX leave out the neurons of
    single blocks, and all but the context's modulation, in what they call legacy mode.
    """
    sites = find_sites(network, KINDS)
    modules = sorted(network.named_modules(), key=lambda named: network_order(named[0]))
    found: dict[str, list[tuple[str, int]]] = {kind: [] for kind in KINDS}
    legacy: dict[str, list[tuple[str, int]]] = {"feed_forward": [], "modulation": []}

    def add(kind: str, name: str, units: int) -> None:
        found[kind].append((name if name in sites else "", sites[name].units if name in sites else units))

    for name, module in modules:
        leaf = name.rpartition(".")[2]
        if "attn" in leaf and hasattr(module, "heads"):
            add("attention", name, module.heads)
        elif "ff" in leaf and hasattr(module, "net"):
            add("feed_forward", name, module.net[-1].in_features)
            legacy["feed_forward"].append(found["feed_forward"][-1])
        elif leaf == "proj_mlp" and name.startswith("single_transformer_blocks."):
            add("feed_forward", name, module.out_features)
        elif isinstance(getattr(module, "linear", None), nn.Linear) and _is_modulation(name):
            add("modulation", name, module.linear.out_features)
            if leaf == "norm1_context":
                legacy["modulation"].append(found["modulation"][-1])
    return {kind: [entries, *([legacy[kind]] if legacy.get(kind) else [])] for kind, entries in found.items()}


def _is_modulation(name: str) -> bool:
    leaf = name.rpartition(".")[2]
    return "norm1" in leaf or (leaf == "norm" and name.count(".") == 2)
