"""What a result depends on of a pipeline and of a run, as plain values: what results are filed under.

An ``Identity`` has hashes in the place of weights. So where it is known, a recorded result is found without the
pipeline, and without torch. `contents` has the description of everything else that an image may depend on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ecodiff.errors import EcoDiffError
from ecodiff.storage.files import write_whole
from ecodiff.storage.fingerprint import key

_DEFAULTS = "_use_default_values"
# These change how far or how a run is computed, not its result: checkpointing is exact.
_FREE = ("updates", "save_every", "snapshot_every", "checkpoint", "keep_last")


@dataclass(frozen=True)
class Identity:
    """A pipeline as results know it. Hashes are those of ``contents.weights_hash``."""

    pipeline: str
    """Name of its class."""
    denoiser: str
    vae: str | None
    scheduler: Mapping[str, Any]
    """Class and configuration."""
    text_encoders: Mapping[str, str]

    @classmethod
    def of(cls, pipe, vae: bool = True) -> Identity:
        """The identity of a pipeline as it is now; this reads all weights, about a second a gigabyte.

        ``vae``: read those of the VAE, too, on which no latents depend. Raises EcoDiffError for weights that are not
        there (meta device).
        """
        from .contents import weights_hash
        from .parts import denoiser

        encoders = {n: part for n, part in pipe.components.items() if n.startswith("text_encoder") and part is not None}
        with_vae = vae and getattr(pipe, "vae", None) is not None
        scheduler = {"class": type(pipe.scheduler).__name__, **pipe.scheduler.config}
        if _DEFAULTS in scheduler:  # diffusers makes this list from a set, whose order is another in every process
            scheduler[_DEFAULTS] = sorted(scheduler[_DEFAULTS])
        return cls(
            pipeline=type(pipe).__name__,
            denoiser=weights_hash(denoiser(pipe)),
            vae=weights_hash(pipe.vae) if with_vae else None,
            scheduler=json.loads(json.dumps(scheduler, default=_by_value)),  # equal to one that was written and read
            text_encoders={name: weights_hash(part) for name, part in sorted(encoders.items())},
        )

    @property
    def conditions(self) -> dict:
        """What a sampling trajectory depends on beside the denoiser."""
        return {"scheduler": dict(self.scheduler), "text_encoders": dict(self.text_encoders)}

    def write(self, path: Path) -> None:
        """Write it as JSON that ``read`` takes."""
        write_whole(path, (json.dumps(asdict(self), indent=1, sort_keys=True) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> Identity:
        """An identity that was written. Raises EcoDiffError for a file that holds none."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise EcoDiffError(f"{path} holds no identity of a pipeline ({error}): write it again.") from error


def describe_run(identity: Identity, prompts: Sequence, config) -> dict:
    """All that determines the result of learning (Alg. 1), as plain JSON values; weights and prompts by their hashes.

    ``config``: a ``LearnConfig``. Raises EcoDiffError for an argument that has no description by value.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in _FREE}
    if settings["objective"] == "final":  # so runs that began before there was a choice go on
        del settings["objective"]
    if settings["target_open"] is None:
        del settings["target_open"]
    else:  # the straight line to it depends on their number
        settings["updates"] = config.updates
    if config.gate_draw == "call":
        settings["version"] = 2  # each sample has gates of its own
    if config.gate_draw == "call" and config.recompute == "redraw":  # what is drawn in recomputation depends on these
        settings |= {"checkpoint": config.checkpoint, "keep_last": config.keep_last}
    described = {
        "config": settings,
        "prompts": key(list(prompts)),
        "pipeline": identity.pipeline,
        "weights": identity.denoiser,
        **identity.conditions,
    }
    return json.loads(json.dumps(described, default=_by_value))


def _by_value(value):
    """What JSON cannot hold (a tensor, an image), by its contents: its text may be shortened or be an address."""
    from .contents import Undescribed, describe

    try:
        return describe(value)
    except Undescribed as error:
        raise EcoDiffError(
            f"An argument of the run cannot be told apart from others in a later process ({error}): take plain values, "
            "tensors or images, or learn without resume_dir."
        ) from error
