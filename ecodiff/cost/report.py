"""A `Cost` as a table that a person can read, and what it means for a GPU."""

from __future__ import annotations

from collections.abc import Callable

from .counting import Cost
from .units import gb, usable

_NAMES = {"attention": "attention heads", "feed_forward": "feed-forward neurons", "modulation": "modulation channels"}


def table(cost: Cost, budget: int | None = None) -> str:
    """The figures of the model and, beside them, of the pruned one; with a budget (bytes) a star marks what fits."""
    models, heads, lines = [cost], f"{'original':>16}", [_setting(cost)]
    if cost.pruned:
        models.append(cost.pruned)
        heads += f"{'pruned':>16}"
        lines.append(f"pruned: {cost.pruned.pruning}")
    lines += ["", f"{'':58}{heads}"]
    fits, fits_not, explained = (" *", "  ", " (* fits)") if budget else ("", "", "")

    def row(text: str, amounts: list, show: Callable) -> None:
        cells = [f"{show(amount):>16}" for amount in amounts]
        lines.append(f"  {text:56}{''.join(cells)}")

    def marked(amount: int) -> str:
        if budget and amount <= usable(budget):
            return gb(amount) + fits
        return gb(amount) + fits_not  # as wide, so that numbers stay below each other

    def peaks(text: str, amounts: list[int]) -> None:
        row(text, amounts, marked)

    lines.append("Parameters of the denoiser")
    row("all", [c.parameters["total"] for c in models], _million)
    for kind, units in cost.units.items():
        if units:
            row(f"{_NAMES[kind]} ({units:,})", [c.parameters[kind] for c in models], _million)
    lines.append("GFLOP per image (2 per multiply-add)")
    flops = [c.picture_flops for c in models]
    row("linear layers", [f.linear for f in flops], _giga)
    row("convolutions", [f.convolution for f in flops], _giga)
    row("sum of these (the paper's count)", [f.paper for f in flops], _giga)
    row("attention's products", [f.attention for f in flops], _giga)
    row("all", [f.total for f in flops], _giga)
    lines.append("Weights")
    row("denoiser", [c.weights for c in models], gb)
    row("text encoders and VAE", [c.text_encoders + c.vae for c in models], gb)
    if cost.call.update:
        lines.append(f"One mask update, peak{explained}")
        row("saved for backward, per denoiser call", [c.saved for c in models], gb)
        peaks("plain: every step kept", [c.update_peak(checkpoint=False) for c in models])
        peaks("time-step checkpointed", [c.update_peak() for c in models])
        if budget:
            most = cost.max_keep_last(budget) or 0
            if most > 1:  # keep_last=1 is free where a step is one call (see `counting`), so it says nothing new
                peaks(f"time-step checkpointed, keep_last={most}", [c.update_peak(keep_last=most) for c in models])
        offloaded = [c.update_peak(offload=True) for c in models]
        peaks("time-step checkpointed, other components offloaded", offloaded)
        if cost.call.inner:
            peaks("checkpointed inside the denoiser too", [c.update_peak(inner=True) for c in models])
            offloaded = [c.update_peak(inner=True, offload=True) for c in models]
            peaks("inside too, other components offloaded", offloaded)
    lines.append(f"Drawing pictures, peak{explained}")
    peaks("all components on the device", [c.inference_peak() for c in models])
    peaks("with CPU offload", [c.inference_peak(offload=True) for c in models])
    return "\n".join(line.rstrip() for line in lines)


def _setting(cost: Cost) -> str:
    """The model and the setting in one line."""
    size = f"{cost.size[0]} x {cost.size[1]}"
    if cost.frames:
        size += f" x {cost.frames} frames"
    return (
        f"{cost.model} ({cost.denoiser}), {size}, batch {cost.batch}, "
        f"{cost.steps} steps, guidance {cost.guidance:g}, {cost.text_tokens} text tokens, {cost.dtype}"
    )


def _million(count: int) -> str:
    return f"{count / 1e6:,.1f} M"


def _giga(count: int) -> str:
    return f"{count / 1e9:,.0f}"


def verdict(cost: Cost, budget: int) -> list[str]:
    """Sentences that say whether learning fits, whether generating fits, and what to change if not."""
    room = usable(budget)
    sentences = [
        f"Of {gb(budget)}, {gb(room)} are counted as usable (less 0.5 GB for the CUDA context and 3 %, assumed)."
    ]
    if cost.call.update:
        sentences.append(f"Learning a mask: {_learning(cost, budget, room)}")
    sentences.append(f"Drawing: {_drawing(cost, room)}")
    if cost.pruned:
        sentences.append(f"Drawing after pruning: {_drawing(cost.pruned, room)}")
    return sentences


def _learning(cost: Cost, budget: int, room: int) -> str:
    """What to do so that a mask update fits: the first that suffices of several measures, the cheapest first."""
    most = cost.max_keep_last(budget)
    if most is not None:
        fits = "no checkpointing is needed" if most == cost.steps else f"fits with keep_last={most}"
        return f"{fits} ({gb(cost.update_peak(keep_last=most))})."
    most = cost.max_keep_last(budget, offload=True)
    if most is not None:
        need = cost.update_peak(keep_last=most, offload=True)
        return f"fits with pipe.enable_model_cpu_offload() and keep_last={most} ({gb(need)})."
    if cost.call.inner:
        how = "enable_gradient_checkpointing() on the denoiser"
        need = cost.update_peak(inner=True)
        if need <= room:
            return f"fits with {how} ({gb(need)})."
        need = cost.update_peak(inner=True, offload=True)
        if need <= room:
            return f"fits with {how} and pipe.enable_model_cpu_offload() ({gb(need)})."
    if cost.weights > room:
        return f"does not fit: the denoiser's weights alone are {gb(cost.weights)}. Take a larger GPU."
    least = cost.update_peak(inner=cost.call.inner is not None, offload=True)
    if cost.batch > 1:
        return f"does not fit ({gb(least)} at the least): set micro_batch_size=1, or draw smaller pictures."
    return f"does not fit ({gb(least)} at the least): draw smaller pictures, or take a larger GPU."


def _drawing(cost: Cost, room: int) -> str:
    """What to do so that generating fits, likewise."""
    on_device, offloaded = cost.inference_peak(), cost.inference_peak(offload=True)
    if on_device <= room:
        return f"fits with all components on the device ({gb(on_device)})."
    if offloaded <= room:
        return f"fits with pipe.enable_model_cpu_offload() ({gb(offloaded)})."
    # With offloading one component at a time is on the device, so that one of them alone is too large.
    if cost.weights > room:
        return f"does not fit: the denoiser's weights alone are {gb(cost.weights)}; quantise them."
    if cost.largest_encoder > room:
        encoder = gb(cost.largest_encoder)
        return f"does not fit: the largest text encoder is {encoder}; quantise it, or encode on the CPU."
    return f"does not fit ({gb(offloaded)}): lower the batch, or decode with vae.enable_tiling()."
