"""A cell of a comparison: everything that its values depend on, and the key that they are recorded under."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

from ecodiff.errors import EcoDiffError
from ecodiff.lab import openmoji
from ecodiff.lab.identities import identity, judge_hash
from ecodiff.lab.openmoji.moving import JUDGE_VERSION
from ecodiff.method.config import LearnConfig
from ecodiff.pipelines.identity import Identity, describe_run
from ecodiff.retraining.config import RetrainConfig
from ecodiff.storage.fingerprint import key

from .protocol import Protocol


@dataclass(frozen=True)
class Cell:
    """One cell of a table: how the units to go are chosen, and how the smaller model is judged.

    ``method`` is "original" (nothing goes), "learned", one of ``ecodiff.scores`` (with "blocks", "blocks-clip" and
    "sparse24"), or any of these with "+compensation" (the weights that stay are adapted), "+soft" (learned: the units
    that stay keep their gates as factors) and "+deepcache" (every other step reuses deep features; U-Nets only).
    ``seed`` is that of learning (or of the method's scores) and of the noise pictures are drawn from. ``prompts``
    captions of ``split`` are what learning or calibration sees. ``scope`` and ``count`` are ``make_mask``'s.
    """

    method: str = "learned"
    ratio: float = 0.2
    seed: int = 0
    protocol: Protocol = Protocol()
    config: LearnConfig = LearnConfig()
    prompts: int = 100
    split: str = "train"
    scope: str = "kind"
    count: str = "units"
    retrain: RetrainConfig | None = None
    """Retrain the smaller model so, on pictures that the original draws for the same captions."""
    learned_on: str = ""
    """Id of another model with the same sites, whose scores are taken; ``config`` is then for drawing with that one."""

    @property
    def seeded(self) -> LearnConfig:
        """``config`` with the cell's own seed: what a mask is learned with."""
        return replace(self.config, seed=self.seed)

    def captions(self) -> list[str]:
        """The captions that learning or calibration sees."""
        return list(_captions(self.split, self.prompts, self.protocol.of_clips))


@lru_cache(maxsize=16)
def _captions(split: str, number: int, of_clips: bool) -> tuple[str, ...]:
    """Made once: pages describe hundreds of cells."""
    if of_clips:
        return tuple(clip.caption for clip in openmoji.clips(split, number))
    return tuple(openmoji.prompts(split, number))


def _judge_of(protocol: Protocol) -> str | None:
    """What names the judge of a protocol in keys: the weights of the embedded one, or the version of that of clips."""
    if protocol.of_clips:
        return f"clips, version {JUDGE_VERSION}"
    return judge_hash()


UNSEEING = ("random", "magnitude", "sparse24")  # methods that look at no image: their rows depend on no captions
EXTRAS = ("compensation", "soft", "deepcache")  # what a method's name may have after it


def apart(method: str) -> tuple[str, list[str]]:
    """A method's name and its extras. Raises EcoDiffError for an extra that is none, or one that does not fit."""
    name, *extras = method.split("+")
    for extra in extras:
        if extra not in EXTRAS:
            raise EcoDiffError(f"Method {method!r}: +{extra} is not known: take +{', +'.join(EXTRAS)}.")
    if "soft" in extras and (name != "learned" or "compensation" in extras):
        raise EcoDiffError(f"Method {method!r}: only learned masks have gates to keep, without compensation.")
    return name, extras


def calibration(method: str, captions: Sequence[str]) -> list[str]:
    """The captions a method of ``ecodiff.scores`` watches: the first 32; 8 for occlusion, which draws them anew for
    every part; all for Gauss-Newton, which makes one backward pass with each, as a learned mask makes many."""
    number = {"occlusion": 8, "gauss-newton": len(captions)}.get(method, 32)
    return list(captions[:number])


def sampling_of(config: LearnConfig, seed: int) -> dict:
    """How scores generate images: arguments of the methods of ``ecodiff.scores``."""
    return {
        "seed": seed,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "call": config.call,
    }


def describe_cell(model: Identity, cell: Cell) -> dict:
    """Everything that the values of a cell of a model depend on: what its row is found by. No model is loaded."""
    captions, config = cell.captions(), cell.seeded
    base, extras = apart(cell.method)
    # Names and values here are in the keys of all recorded rows: whatever changes one of them orphans those rows.
    described = {
        "weights": model.denoiser,
        "vae": model.vae,
        "conditions": key(model.conditions),
        "judge": _judge_of(cell.protocol),
        "method": cell.method,
        "ratio": 0.0 if base == "original" else cell.ratio,
        "scope": cell.scope,
        "count": cell.count,
        "seed": cell.seed,
        "protocol": asdict(cell.protocol),
    }
    if base in UNSEEING and config.kinds != LearnConfig().kinds:  # rows with the default's kinds do not name them
        described["kinds"] = config.kinds
    if base == "learned":
        described["learned"] = describe_learning(model, cell)
    elif cell.learned_on:
        described["scores of"] = identity(cell.learned_on).denoiser
    if cell.retrain:
        described["retrain"] = {**asdict(cell.retrain), "captions": key(captions)}
    if "compensation" in extras or base not in ("original", "learned", *UNSEEING):
        described["calibration"] = {
            **sampling_of(config, cell.seed),
            # Compensation sees the captions that "obs" sees, whatever the method.
            "captions": key({name: calibration(name, captions) for name in (base, "obs")}),
            "kinds": config.kinds,
            "version": 1,
        }
    return described


def describe_learning(model: Identity, cell: Cell) -> dict:
    """Everything that the learned gates of a cell depend on: what their file is named by."""
    source = model
    if cell.learned_on:
        source = identity(cell.learned_on)
    return {**describe_run(source, cell.captions(), cell.seeded), "updates": cell.seeded.updates}


BLOCKS = ("blocks", "blocks-clip")  # whole blocks by the prediction's error (LAPTOP-Diff), by CLIP score (SnapFusion)
