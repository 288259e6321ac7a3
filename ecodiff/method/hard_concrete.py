"""The hard concrete distribution (§2.2, App. F): a gate that can be exactly 0 or 1 and still has a gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ecodiff.errors import EcoDiffError

if TYPE_CHECKING:  # settings name a distribution before any tensor is there
    from torch import Tensor


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
        return self._gate(log_alpha.float() + ((u + self.delta) / (1 - u + self.delta)).log())

    def deterministic(self, log_alpha: Tensor) -> Tensor:
        """The gate without noise, which is the median of `sample`."""
        return self._gate(log_alpha.float())

    def prob_open(self, log_alpha: Tensor) -> Tensor:
        """P(z > 0), the term of Eq. 4 in closed form for any δ:

            clip((1 + 2δ) sigmoid(λ - temperature log(-γ / ζ)) - δ, 0, 1)

        since noise > x exactly when u > (1 + 2δ) sigmoid(x) - δ. Above `l0_saturation` it is 1 and has no gradient.
        """
        return ((1 + 2 * self.delta) * (log_alpha.float() - self._closed).sigmoid() - self.delta).clamp(0, 1)

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
        """The largest noise: u = 1. Noise without δ is logistic and has no bound."""
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
        # Stretched beyond [0, 1] before it is clipped: that is what makes exact zeros and ones likely.
        s = (location / self.temperature).sigmoid()
        return (s * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)
