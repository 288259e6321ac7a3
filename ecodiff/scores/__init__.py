"""Ways to score units. A method is a function `scores(pipe, prompts, *, kinds, **sampling) -> {site: fp32 [units]}`.

The higher the score, the later the unit goes (`ecodiff.make_mask`). All take the fields of `Sampling` (seed,
num_inference_steps, guidance_scale, batch_size, call, progress), whether they run the pipeline or not, so that one loop
calls them all. Those that run it do so on accelerate's device, as `ecodiff.learn` does, and bring the pipeline back. A
new method is one file and one line here.

Beside them, what the paper compares with and is no score of units: `deepcache` (calls are reused), `sparse24` (2:4
weights), `blocks` (whole blocks go).
"""

from .calibration import Sampling
from .compensation import prune_adapted, prune_compensated, second_moments
from .fisher import scores as fisher
from .gauss_newton import scores as gauss_newton
from .magnitude import scores as magnitude
from .obs import scores as obs
from .occlusion import scores as occlusion
from .random import scores as random
from .taylor import diff_pruning
from .taylor import scores as taylor
from .wanda import scores as wanda

METHODS = {
    "random": random,
    "magnitude": magnitude,
    "wanda": wanda,
    "taylor": taylor,
    "diff-pruning": diff_pruning,
    "fisher": fisher,
    "gauss-newton": gauss_newton,
    "occlusion": occlusion,
    "obs": obs,
}

__all__ = [
    "METHODS",
    "Sampling",
    "diff_pruning",
    "fisher",
    "gauss_newton",
    "magnitude",
    "obs",
    "occlusion",
    "prune_adapted",
    "prune_compensated",
    "random",
    "second_moments",
    "taylor",
    "wanda",
]
