"""A `Cost` as a table that a person can read, and what it means for a GPU."""

from __future__ import annotations

from .counting import Cost
from .units import gb, usable

_NAMES = {"attention": "attention heads", "feed_forward": "feed-forward neurons", "modulation": "modulation channels"}


def table(cost: Cost, budget: int | None = None) -> str:
    """The figures of the model and, beside them, of the pruned one; with a budget (bytes) a star marks what fits."""
    pruned = cost.pruned
    frames = f" x {cost.frames} frames" if cost.frames else ""
    lines = [
        f"{cost.model} ({cost.denoiser}), {cost.size[0]} x {cost.size[1]}{frames}, batch {cost.batch}, "
        f"{cost.steps} steps, guidance {cost.guidance:g}, {cost.text_tokens} text tokens, {cost.dtype}"
    ]
    if pruned:
        lines.append(f"pruned: {pruned.pruning}")
    lines += ["", f"{'':58}{'original':>16}" + (f"{'pruned':>16}" if pruned else "")]

    def row(text, value, show, fits=False):
        cells = [f"  {text:56}"]
        for one in (cost, pruned) if pruned else (cost,):
            amount = value(one)
            mark = "" if not (fits and budget) else " *" if amount <= usable(budget) else "  "
            cells.append(f"{'-' if amount is None else show(amount) + mark:>16}")
        lines.append("".join(cells).rstrip())

    def group(title):
        lines.append(title)

    def million(count):
        return f"{count / 1e6:,.1f} M"

    def giga(count):
        return f"{count / 1e9:,.0f}"

    group("Parameters of the denoiser")
    row("all", lambda c: c.parameters["total"], million)
    for kind, units in cost.units.items():
        if units:
            row(f"{_NAMES[kind]} ({units:,})", lambda c, kind=kind: c.parameters[kind], million)
    group("GFLOP a picture (2 a multiply-add)")
    row("linear layers", lambda c: c.picture_flops.linear, giga)
    row("convolutions", lambda c: c.picture_flops.convolution, giga)
    row("sum of these (the paper's count)", lambda c: c.picture_flops.paper, giga)
    row("attention's products", lambda c: c.picture_flops.attention, giga)
    row("all", lambda c: c.picture_flops.total, giga)
    group("Weights")
    row("denoiser", lambda c: c.weights, gb)
    row("text encoders and VAE", lambda c: c.text_encoders + c.vae, gb)
    if cost.call.update:
        group("One mask update, peak" + (" (* fits)" if budget else ""))
        row("saved for backward, a denoiser call", lambda c: c.saved, gb)
        row("plain: every step kept", lambda c: c.update_peak(checkpoint=False), gb, True)
        row("time-step checkpointed", lambda c: c.update_peak(), gb, True)
        if budget and (best := cost.max_keep_last(budget)) and best > 1:
            row(f"time-step checkpointed, keep_last={best}", lambda c: c.update_peak(keep_last=best), gb, True)
        row("time-step checkpointed, other components offloaded", lambda c: c.update_peak(offload=True), gb, True)
        if cost.call.inner:
            row("checkpointed inside the denoiser too", lambda c: c.update_peak(inner=True), gb, True)
            row("inside too, other components offloaded", lambda c: c.update_peak(inner=True, offload=True), gb, True)
    group("Drawing pictures, peak" + (" (* fits)" if budget else ""))
    row("all components on the device", lambda c: c.inference_peak(), gb, True)
    row("with CPU offload", lambda c: c.inference_peak(offload=True), gb, True)
    return "\n".join(lines)


def verdict(cost: Cost, budget: int) -> list[str]:
    """Sentences: does learning fit, does drawing fit, and what to change if not."""
    room = usable(budget)
    said = [f"Of {gb(budget)}, {gb(room)} are counted as usable (less 0.5 GB for the CUDA context and 3 %, assumed)."]
    if cost.call.update:
        said.append(f"Learning a mask: {_learning(cost, budget, room)}")
    for name, one in (("Drawing", cost), ("Drawing after pruning", cost.pruned)):
        if one is not None:
            said.append(f"{name}: {_drawing(one, room)}")
    return said


def _learning(cost: Cost, budget: int, room: int) -> str:
    if (best := cost.max_keep_last(budget)) is not None:
        kept = "no checkpointing is needed" if best == cost.steps else f"fits with keep_last={best}"
        return f"{kept} ({gb(cost.update_peak(keep_last=best))})."
    if (best := cost.max_keep_last(budget, offload=True)) is not None:
        need = cost.update_peak(keep_last=best, offload=True)
        return f"fits with pipe.enable_model_cpu_offload() and keep_last={best} ({gb(need)})."
    for offload in (False, True) if cost.call.inner else ():
        if (need := cost.update_peak(inner=True, offload=offload)) <= room:
            how = " and pipe.enable_model_cpu_offload()" if offload else ""
            return f"fits with enable_gradient_checkpointing() on the denoiser{how} ({gb(need)})."
    least = cost.update_peak(inner=cost.call.inner is not None, offload=True)
    if cost.weights > room:
        return f"does not fit: the denoiser's weights alone are {gb(cost.weights)}. Take a larger GPU."
    if cost.batch > 1:
        return f"does not fit ({gb(least)} at the least): set micro_batch_size=1, or draw smaller pictures."
    return f"does not fit ({gb(least)} at the least): draw smaller pictures, or take a larger GPU."


def _drawing(cost: Cost, room: int) -> str:
    if cost.inference_peak() <= room:
        return f"fits with all components on the device ({gb(cost.inference_peak())})."
    if (need := cost.inference_peak(offload=True)) <= room:
        return f"fits with pipe.enable_model_cpu_offload() ({gb(need)})."
    if cost.weights > room:
        return f"does not fit: the denoiser's weights alone are {gb(cost.weights)}; quantise them."
    if cost.largest_encoder > room:
        return (
            f"does not fit: the largest text encoder is {gb(cost.largest_encoder)}; quantise it, or encode on the CPU."
        )
    return (
        f"does not fit ({gb(cost.inference_peak(offload=True))}): lower the batch, or decode with vae.enable_tiling()."
    )
