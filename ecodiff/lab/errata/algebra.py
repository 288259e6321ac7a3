"""Errata of formulas and algorithms: each is evaluated as printed and as it has to be, on the paper's constants.

Plain arithmetic on purpose, independent of the package's own gates and trajectories.
"""

from __future__ import annotations

import math

from ecodiff.lab.paper import claim, setting

from .shown import Erratum, Line

# An even grid in place of random draws: shares are the same in every run, and exact to 1 / 4000.
U = [(i + 0.5) / 4_000 for i in range(4_000)]


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

    def loss(m: float) -> float:
        return (m - 1) ** 2

    start, rate = 0.5, 0.1
    slope = 2 * (start - 1)
    lines = []
    for sign, word in ((1, "M + η dL/dM, as printed"), (-1, "M - η dL/dM")):
        after = loss(start + sign * rate * slope)
        lines.append(Line(f"L after {word}", f"below {loss(start):g}", f"{after:g}", after < loss(start)))
    return Erratum("Alg. 1, line 6", "The update goes up the gradient: the sign must be minus.", tuple(lines))


def step_order() -> Erratum:
    """Eq. 1 for T = 4 and an f that writes down its step."""

    def f(z: list[int], t: int) -> list[int]:
        return [*z, t]

    nested = f(f(f(f([], 1), 2), 3), 4)  # f(f(... f(z, y, 1), y, 2) ..., y, T)
    needed: list[int] = []
    for t in (4, 3, 2, 1):  # Alg. 2, line 2: for t = T, ..., 1
        needed = f(needed, t)
    printed, wanted = " ".join(map(str, nested)), " ".join(map(str, needed))
    line = Line("steps in the order in which they run, T = 4", printed, wanted, nested == needed)
    return Erratum("Eq. 1", "The composition runs backwards: step T is innermost, step 1 outermost.", (line,))


def log_of_lambda() -> Erratum:
    """Eq. 4's term against the share of gates that are open."""
    c = shift(claim("temperature"))
    lines = []
    for value in (-1.0, 0.5, 1.0, 3.0):
        counted = open_gates(value)
        what = f"P(gate > 0) at λ = {value:g}"
        if value > 0:
            lines.append(_share(f"{what}, as printed", sigmoid(math.log(value) + c), counted))
        else:  # the logarithm that is printed does not exist
            lines.append(Line(f"{what}, as printed", "undefined", f"{counted:.3f}", False))
        lines.append(_share(f"{what}, λ for log λ", sigmoid(value + c), counted))
    return Erratum("Eq. 4", "The sampler's λ is a log α already: the term is σ(λ - α log(-γ/ζ)).", tuple(lines))


def _share(what: str, formula: float, counted: float) -> Line:
    """A line that agrees where a formula gives the share of gates that was counted, to the width of the grid ``U``."""
    return Line(what, f"{formula:.3f}", f"{counted:.3f}", abs(formula - counted) < 2e-3)


def constant_factor() -> Erratum:
    """App. D: g(λ) = 1 / (λ + C) is treated as constant 'for larger C'."""
    c = math.exp(-shift(claim("temperature")))

    def g(x: float) -> float:
        return 1 / (x + c)

    start = claim("lambda_start")
    ratio, slope, term = g(0) / g(start), -1 / c**2, start * g(start)
    lines = (
        Line("the new C = exp(-C)", "large", f"{c:.3f}", c > 1),
        Line(f"g(0) / g({start:g})", "about 1", f"{ratio:.1f}", ratio < 1.2),
        Line("g'(0)", "about 0", f"{slope:.1f}", abs(slope) < 0.1),
        Line(
            f"one term of the sum at λ = {start:g}",
            f"{start:g} (Eq. 19)",
            f"{term:.3f} (Eq. 17)",
            math.isclose(start, term),
        ),
    )
    return Erratum("App. D, Eq. 18-19", "C is small, so g is far from constant: the sum is no multiple of ‖λ‖₁.", lines)


def two_betas() -> Erratum:
    """β in Eq. 4: the regulariser's weight of Eq. 2, or the temperature of Figure 4?"""
    counted = open_gates(0.0)
    lines = []
    for value, word in ((setting("table3", "beta"), "Table 3"), (claim("temperature"), "Figure 4")):
        what = f"P(gate > 0) where the rest is 0, β = {value:g} ({word})"
        lines.append(_share(what, sigmoid(shift(value)), counted))
    return Erratum("Eq. 4, Fig. 4", "β names two things; in Eq. 4 it is §2.2's temperature α.", tuple(lines))


def checkpointing() -> Erratum:
    """Alg. 2 on ẑ_{t-1} = λ ẑ_t, T = 3, ẑ_T = 1, L = (ẑ_0 - 2)² / 2 + β λ, at λ = 0.8 and β = 0.5."""
    steps, at, beta, target = 3, 0.8, 0.5, 2.0

    def loss(x: float) -> float:
        return (x**steps - target) ** 2 / 2 + beta * x

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

    def slope(delta: float) -> float:
        differences = (gate(h + noise(u, delta)) - gate(-h + noise(u, delta)) for u in U)
        return sum(differences) / len(U) / (2 * h)

    def extreme(delta: float) -> float:
        return sum(gate(noise(u, delta)) in (0.0, 1.0) for u in U) / len(U)

    limit = slope(1e6)  # so large a δ leaves no noise at all
    low, high = 0.05, 2.0
    share_low, share_high = extreme(low), extreme(high)
    lines = (
        Line("slope of the mean gate at λ = 0 for δ = 10⁶", "a step's: no bound", f"{limit:.3f}", limit > 10),
        Line(
            f"share of gates that are 0 or 1 at λ = 0, δ = {high:g} against {low:g}",
            "more",
            f"{share_high:.3f} against {share_low:.3f}",
            share_high > share_low,
        ),
    )
    return Erratum("§2.2, App. F", "A higher δ takes noise away: what is left is a ramp whose slope α sets.", lines)


def start_value() -> Erratum:
    """λ = 5 'to facilitate smoother training' (App. E)."""
    start = claim("lambda_start")
    lines = []
    for name, model in (("table3", "SDXL"), ("table2", "FLUX")):
        delta = setting(name, "delta")
        lowest = stretched(start + noise(0.0, delta))  # the smallest noise there is
        what = f"{model}, δ = {delta:g}: gates below 1, which alone have a gradient"
        lines.append(Line(what, "some", f"none: s̄ is at least {lowest:.3f}", lowest < 1))
    return Erratum("App. E", "At λ = 5 every gate is 1, and the reconstruction has no gradient at all.", tuple(lines))


def output_matrix() -> Erratum:
    """Shapes in Eq. 7 and 9, for SDXL's 10 heads of 64."""
    heads, size = 10, 64
    columns = heads * size
    line = Line(
        "rows of W^o for 10 heads of d_v = 64", f"d_v = {size}", f"{columns} columns to multiply", size == columns
    )
    return Erratum("Eq. 7", "W^o is (h · d_v) × d_model.", (line,))


def gated_activation() -> Erratum:
    """Shapes in Eq. 8: an activation over W1's d_ff outputs, then W2 with d_ff rows."""
    width = 8
    lines = []
    for name, left in (("GELU", width), ("GEGLU", width // 2)):  # GEGLU, a · gelu(b), halves its input
        what = f"σ = {name}: channels that W2 is given, d_ff = {width}"
        lines.append(Line(what, str(width), str(left), left == width))
    return Erratum("Eq. 8", "With GEGLU, W1 must be d_model × 2 d_ff, as it is in SDXL.", tuple(lines))


ALGEBRA = (
    update_sign,
    step_order,
    log_of_lambda,
    constant_factor,
    two_betas,
    checkpointing,
    delta_as_steepness,
    start_value,
    output_matrix,
    gated_activation,
)
