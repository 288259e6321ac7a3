"""Decisions at full size: counts that need shapes and no weights, and what was measured there with random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version

from ecodiff.storage import records

from .rules import COUNTED, MISSING, NOT_COUNTED, UNDECIDED, Decision, Question

PRESETS = ("sd2", "sdxl", "flux-schnell")
ONE = {"guidance": 1.0, "steps": 1, "inner": False}
"""One forward pass of one sample, as chapter 7 counts it."""
SD2_UPDATE = ("sd2", {"inner": False})
"""Preset and options of SD2's mask update, one guided sample."""


def counted(preset: str, presets: Sequence[str] = PRESETS, **options) -> dict | None:
    """`cost(preset, **options)` as a dictionary, recorded or counted now (which takes seconds).

    None for a model that is none of ``presets``.
    """
    if preset not in presets:
        return None
    settings = {"what": "cost", "version": 1, "preset": preset, **options}
    for library in ("torch", "diffusers"):
        settings[library] = version(library).split("+")[0]  # without the build, such as "+cpu": it changes no count

    def count() -> dict:
        from ecodiff.cost.counting import cost

        return cost(preset, **options).to_dict()

    return records.measure(settings, count, name="cost")["values"]


def by_count(on: str, test: Callable[..., tuple[bool | None, str]], *settings: tuple[str, dict]) -> Question:
    """A decision on counts, reached once it is known which models may be counted.

    ``test`` takes the counts in order and says whether the claim holds (None: readings of it differ), and by which
    numbers. ``settings`` are preset and options of each count.
    """

    def decide(presets: Sequence[str]) -> Decision:
        counts = [counted(preset, presets, **options) for preset, options in settings]
        if None in counts:
            return _left_out(on, settings[0][0])
        return decided(on, *test(*counts))

    return Question(decide)


def decided(on: str, holds: bool | None, evidence: str) -> Decision:
    """A decision at full size; ``holds`` is None where the numbers do not decide."""
    verdict = {True: COUNTED, False: NOT_COUNTED, None: UNDECIDED}[holds]
    return Decision(on, verdict, evidence)


def _left_out(on: str, preset: str) -> Decision:
    return Decision(on, MISSING, command=f"python -m ecodiff cost {preset}")


def by_structure(on: str, test: Callable[..., tuple[bool, str]], *names: str) -> Question:
    """A decision on denoisers that are built without weights; ``test`` takes them in order."""

    def decide(presets: Sequence[str]) -> Decision:
        if not set(names) <= set(presets):
            return _left_out(on, names[0])
        from ecodiff.cost.presets import preset

        return decided(on, *test(*(preset(name).build() for name in names)))

    return Question(decide)


def widths_stay(*networks) -> tuple[bool, str]:
    """Whether all linear layers keep their widths, but for the inner ones of sites, when every second unit goes."""
    from torch import nn

    from ecodiff.method.sites import find_sites
    from ecodiff.method.surgery import prune_denoiser

    changed = sites_seen = 0
    for network in networks:
        sites = find_sites(network)
        smaller = prune_denoiser(network, {n: _every_second(site.units) for n, site in sites.items()})
        inner = {}
        for site in sites.values():
            inner |= {span.layer: "out_features" for span in site.writers}
            inner |= {span.layer: "in_features" for span in site.readers}
        before, after = (dict(model.named_modules()) for model in (network, smaller))
        for name, layer in before.items():
            if not isinstance(layer, nn.Linear):
                continue
            for width in ("in_features", "out_features"):
                if inner.get(name) != width:  # the inner width has to change: the units are gone
                    changed += getattr(layer, width) != getattr(after[name], width)
        sites_seen += len(sites)
    return not changed, f"{changed} outer widths change at {sites_seen} sites that lose every second unit"


def _every_second(units: int):
    import torch

    return torch.arange(units) % 2 == 0


def measured(what: str, *, on_gpu: bool = False, **config) -> list[dict]:
    """Recorded rows of full-size denoisers with random weights (``benchmark full-size``), of a CPU or of GPUs.

    ``config`` holds the values that their configuration must have.
    """
    if not records.enabled():
        return []
    wanted = {"what": f"full_size_{what}", **config}
    rows = []
    for row in records.rows("full_size"):
        same_kind_of_device = (row["config"]["device"] != "cpu") == on_gpu
        if same_kind_of_device and wanted.items() <= row["config"].items():
            rows.append(row)
    return rows
