"""What the reviewers asked, as statements that are decided in the same way as the paper's claims."""

from __future__ import annotations

from pathlib import Path

from ecodiff.lab import studies
from ecodiff.lab.errata import algebra
from ecodiff.lab.identities import identity
from ecodiff.lab.studies.results import gates_file

from . import on_embedded
from .method import l1_against_l0
from .on_embedded import BOTH, DEV, LEARNED, SDXL, better, kept
from .rules import NOT_REPRODUCED, REPRODUCED, Claim, Decision, contradicted


def rigour() -> Claim:
    return Claim(
        "L0 to L1",
        "L1 can stand for L0, by more than a heuristic.",
        "Appendix D's step with its own constants; masks learned with L1, at the best of several β, keep SSIM and "
        "right images of those learned with the closed form σ(λ + c), which needs no such step.",
        ("04_l0_to_l1", "11_settings"),
        (contradicted(algebra.constant_factor()), l1_against_l0(SDXL), l1_against_l0(DEV)),
    )


def binary() -> Claim:
    return Claim(
        "masks that are not binary",
        "Learned gates may lie between 0 and 1, and cutting them to 0 and 1 costs nothing.",
        "Share of learned gates, without noise, between 0 and 1: above zero. The same units cut, those that stay at 1 "
        "minus those that stay at their gates: SSIM and right images above minus the smallest effect.",
        ("11_settings", "02_where_masks_go"),
        (
            gates_between(SDXL),
            _cut_against_gates(SDXL),
            _cut_against_gates(DEV),
        ),
    )


def _cut_against_gates(model: str) -> Decision:
    places = ("soft", "cut"), ("soft", "cut, the rest times its gates")
    return kept(model, *places, BOTH, "0 and 1 against gates")


def gates_between(model: str) -> Decision:
    """The decision on the share of stored gates that are neither 0 nor 1 without noise. Nothing is learned here."""
    files = []
    if on_embedded.readable(model):
        files = [kept_gates(model, seed) for seed in range(studies.SEEDS)]
        files = [path for path in files if path.is_file()]
    if not files:
        return on_embedded.missing(model, "main", "learned gates")
    import torch

    from ecodiff.method.gates import Gates
    from ecodiff.pipelines.loading import load_once
    from ecodiff.pipelines.parts import denoiser

    between, closed = [], []
    for path in files:
        gates = Gates.load(path, denoiser(load_once(model)))
        values = torch.cat(list(gates.deterministic().values()))
        between.append(((values > 0) & (values < 1)).float().mean().item())
        closed.append((values == 0).float().mean().item())
    evidence = f"{min(between):.1%} to {max(between):.1%} between 0 and 1, "
    evidence += f"{min(closed):.1%} to {max(closed):.1%} at 0; seeds: {len(files)}"
    verdict = REPRODUCED if min(between) > 0 else NOT_REPRODUCED
    return Decision(on_embedded.on(model, "learned gates"), verdict, evidence)


def kept_gates(model: str, seed: int) -> Path:
    """The file with λ of the main study."""
    study, row = LEARNED
    return gates_file(studies.cells(study, model, seed)[row], identity(model))


def baselines() -> Claim:
    rivals = {"magnitude": "magnitude", "wanda": "WANDA", "occlusion": "LD-Pruner's occlusion"}
    decisions = []
    for model in (SDXL, DEV):
        for method, name in rivals.items():
            decisions.append(better(model, LEARNED, ("main", f"{method}, 20%"), label=f"against {name}"))
    return Claim(
        "missing baselines",
        "Learned masks are better than magnitude, WANDA and LD-Pruner's criterion.",
        "Learned minus each of them at 20 %, paired: more SSIM or more right images, less of neither.",
        ("10_every_method",),
        tuple(decisions),
    )


REVIEWERS = (rigour, binary, baselines)
