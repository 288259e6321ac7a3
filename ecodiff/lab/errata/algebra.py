"""Errata of formulas and algorithms: each is evaluated as printed and as it has to be, on the paper's constants.

Plain arithmetic on purpose, independent of the package's own gates and trajectories.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ecodiff.lab.paper import claim, setting

from .shown import Erratum, Line

U = [(i + 0.5) / 4_000 for i in range(4_000)]  # an even grid in place of random draws


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def noise(u: float, delta: float) -> float:
    """log(u + δ) - log(1 - u + δ), §2.2."""
    return math.log(u + delta) - math.log(1 - u + delta)


def stretched(location: float) -> float:
    """s̄ of §2.2 for λ + noise; the gate is this, clipped to [0, 1]."""
    zeta, gamma = claim("zeta"), claim("gamma")
    return sigmoid(location / claim("temperature")) * (zeta - gamma) + gamma


def gate(location: float) -> float:
    return min(1.0, max(0.0, stretched(location)))


def shift(temperature: float) -> float:
    """-β log(-γ / ζ) of Eq. 4, with this number as β."""
    return -temperature * math.log(-claim("gamma") / claim("zeta"))


def open_gates(value: float) -> float:
    """Share of the sampler's gates that are above 0 at λ = value, δ = 0: what L0 counts."""
    return sum(stretched(value + noise(u, 0.0)) > 0 for u in U) / len(U)


def update_sign() -> Erratum:
    """Alg. 1, line 6, on L(M) = (M - 1)², M = 0.5, η = 0.1."""
    loss, start, rate = (lambda m: (m - 1) ** 2), 0.5, 0.1
    slope = 2 * (start - 1)
    lines = []
    for sign, word in ((1, "M + η dL/dM, as printed"), (-1, "M - η dL/dM")):
        after = loss(start + sign * rate * slope)
        lines.append(Line(f"L after {word}", f"below {loss(start):g}", f"{after:g}", after < loss(start)))
    return Erratum("Alg. 1, line 6", "The update goes up the gradient: the sign must be minus.", tuple(lines))


def step_order() -> Erratum:
    """Eq. 1 for T = 4 and an f that writes down its step."""
    f: Callable[[list, int], list] = lambda z, t: [*z, t]  # noqa: E731
    nested = f(f(f(f([], 1), 2), 3), 4)  # f(f(... f(z, y, 1), y, 2) ..., y, T)
    needed: list[int] = []
    for t in (4, 3, 2, 1):  # Alg. 2, line 2: for t = T, ..., 1
        needed = f(needed, t)
    line = Line("steps in the order in which they run, T = 4", " ".join(map(str, nested)), " ".join(map(str, needed)),
                nested == needed)  # fmt: skip
    return Erratum("Eq. 1", "The composition runs backwards: step T is innermost, step 1 outermost.", (line,))


def log_of_lambda() -> Erratum:
    """Eq. 4's term against the share of gates that are open."""
    c = shift(claim("temperature"))
    lines = []
    for value in (-1.0, 0.5, 1.0, 3.0):
        counted = open_gates(value)
        printed = sigmoid(math.log(value) + c) if value > 0 else None
        shown = "undefined" if printed is None else f"{printed:.3f}"
        lines.append(Line(f"P(gate > 0) at λ = {value:g}, as printed", shown, f"{counted:.3f}",
                          printed is not None and abs(printed - counted) < 2e-3))  # fmt: skip
        corrected = sigmoid(value + c)
        lines.append(Line(f"P(gate > 0) at λ = {value:g}, λ for log λ", f"{corrected:.3f}", f"{counted:.3f}",
                          abs(corrected - counted) < 2e-3))  # fmt: skip
    return Erratum("Eq. 4", "The sampler's λ is a log α already: the term is σ(λ - α log(-γ/ζ)).", tuple(lines))


def constant_factor() -> Erratum:
    """App. D: g(λ) = 1 / (λ + C) is treated as constant 'for larger C'."""
    c = math.exp(-shift(claim("temperature")))
    g = lambda x: 1 / (x + c)  # noqa: E731
    start = claim("lambda_start")
    lines = (
        Line("the new C = exp(-C)", "large", f"{c:.3f}", c > 1),
        Line(f"g(0) / g({start:g})", "about 1", f"{g(0) / g(start):.1f}", g(0) / g(start) < 1.2),
        Line("g'(0)", "about 0", f"{-1 / c**2:.1f}", 1 / c**2 < 0.1),
        Line(f"one term of the sum at λ = {start:g}", f"{start:g} (Eq. 19)", f"{start * g(start):.3f} (Eq. 17)",
             math.isclose(start, start * g(start))),
    )  # fmt: skip
    return Erratum("App. D, Eq. 18-19", "C is small, so g is far from constant: the sum is no multiple of ‖λ‖₁.", lines)


def two_betas() -> Erratum:
    """β in Eq. 4: the regulariser's weight of Eq. 2, or the temperature of Figure 4?"""
    counted = open_gates(0.0)
    lines = []
    for value, word in ((setting("table3", "beta"), "Table 3"), (claim("temperature"), "Figure 4")):
        chance = sigmoid(shift(value))
        lines.append(Line(f"P(gate > 0) where the rest is 0, β = {value:g} ({word})", f"{chance:.3f}", f"{counted:.3f}",
                          abs(chance - counted) < 2e-3))  # fmt: skip
    return Erratum("Eq. 4, Fig. 4", "β names two things; in Eq. 4 it is §2.2's temperature α.", tuple(lines))


def checkpointing() -> Erratum:
    """Alg. 2 on ẑ_{t-1} = λ ẑ_t, T = 3, ẑ_T = 1, L = (ẑ_0 - 2)² / 2 + β λ, at λ = 0.8 and β = 0.5."""
    steps, at, beta, target = 3, 0.8, 0.5, 2.0
    loss = lambda x: (x**steps - target) ** 2 / 2 + beta * x  # noqa: E731
    true = (loss(at + 1e-5) - loss(at - 1e-5)) / 2e-5
    z = {t: at ** (steps - t) for t in range(steps + 1)}
    to_latent = {t: (z[0] - target) * at**t for t in range(steps + 1)}  # dL/dẑ_t
    part = {t: to_latent[t] * z[t + 1] for t in range(steps)}  # dL/dẑ_t ∂ẑ_t/∂λ
    as_printed = sum(part[t] for t in range(steps))  # line 7, then line 11 for t = 1 ... T-1
    available = sum(part[t - 1] for t in range(1, steps))  # line 9 recomputes ẑ_{t-1}, not ẑ_t
    complete = sum(part[t - 1] for t in range(1, steps + 1)) + beta

    def line(what: str, value: float) -> Line:
        return Line(what, f"{value:.4f}", f"{true:.4f}", abs(value - true) < 1e-6)

    lines = (
        line("dL/dλ by lines 7 and 11, all derivatives known", as_printed),
        line("dL/dλ by the graphs that line 9 makes, t = 1 ... T-1", available),
        line("the same for t = 1 ... T, with ∂(β L0)/∂λ", complete),
    )
    text = "Lines 8 to 11 need ∂ẑ_{t-1}/∂λ for t = 1 ... T, and the regulariser's own derivative is missing."
    return Erratum("Alg. 2", text, lines)


def delta_as_steepness() -> Erratum:
    """'A higher δ closely resembles a step function' (§2.2, App. F)."""
    h = 1e-3
    slope = lambda d: sum(gate(h + noise(u, d)) - gate(-h + noise(u, d)) for u in U) / len(U) / (2 * h)  # noqa: E731
    extreme = lambda d: sum(gate(noise(u, d)) in (0.0, 1.0) for u in U) / len(U)  # noqa: E731
    low, high = 0.05, 2.0
    lines = (
        Line("slope of the mean gate at λ = 0 for δ = 10⁶", "a step's: no bound", f"{slope(1e6):.3f}", slope(1e6) > 10),
        Line(f"share of gates that are 0 or 1 at λ = 0, δ = {high:g} against {low:g}", "more",
             f"{extreme(high):.3f} against {extreme(low):.3f}", extreme(high) > extreme(low)),
    )  # fmt: skip
    return Erratum("§2.2, App. F", "A higher δ takes noise away: what is left is a ramp whose slope α sets.", lines)


def start_value() -> Erratum:
    """λ = 5 'to facilitate smoother training' (App. E)."""
    start = claim("lambda_start")
    lines = []
    for name, model in (("table3", "SDXL"), ("table2", "FLUX")):
        delta = setting(name, "delta")
        lowest = stretched(start + noise(0.0, delta))  # the smallest noise there is
        lines.append(Line(f"{model}, δ = {delta:g}: gates below 1, which alone have a gradient", "some",
                          f"none: s̄ is at least {lowest:.3f}", lowest < 1))  # fmt: skip
    return Erratum("App. E", "At λ = 5 every gate is 1, and the reconstruction has no gradient at all.", tuple(lines))


def output_matrix() -> Erratum:
    """Shapes in Eq. 7 and 9, for SDXL's 10 heads of 64."""
    heads, size = 10, 64
    line = Line("rows of W^o for 10 heads of d_v = 64", f"d_v = {size}", f"{heads * size} columns to multiply",
                size == heads * size)  # fmt: skip
    return Erratum("Eq. 7", "W^o is (h · d_v) × d_model.", (line,))


def gated_activation() -> Erratum:
    """Shapes in Eq. 8: an activation over W1's d_ff outputs, then W2 with d_ff rows."""
    width = 8
    lines = tuple(
        Line(f"σ = {name}: channels that W2 is given, d_ff = {width}", str(width), str(left), left == width)
        for name, left in (("GELU", width), ("GEGLU", width // 2))  # a · gelu(b) halves its input
    )
    return Erratum("Eq. 8", "With GEGLU, W1 must be d_model × 2 d_ff, as it is in SDXL.", lines)


ALGEBRA = (
    update_sign, step_order, log_of_lambda, constant_factor, two_betas, checkpointing, delta_as_steepness, start_value,
    output_matrix, gated_activation,
)  # fmt: skip
