"""Ways to score units. A method is a function `scores(pipe, prompts, ...) -> {site name: float tensor [units]}`.

The higher the score, the later the unit goes (`ecodiff.mask.make_mask`). A new method is one file and one line here.
"""

from .magnitude import scores as magnitude
from .random import scores as random

METHODS = {"random": random, "magnitude": magnitude}
