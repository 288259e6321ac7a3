"""Two pipelines side by side: the same prompts and noise, paired measures, cost, and one page that shows them."""

from .compare import compare
from .result import Comparison

__all__ = ["Comparison", "compare"]
