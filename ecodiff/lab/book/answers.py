"""The right answers of the exercises, computed, and beside them what readers often answer in their place.

Each function belongs to the exercise of its name and returns values by names, which ``book/exercises.yaml`` calls right
or wrong. Arguments are what the chapter hands over; each is called as in the chapter. Numbers have the units that the
exercise asks for. Where the exercise is about a run with other parameters, another run raises EcoDiffError.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from ecodiff.cost import Cost, cost, usable
from ecodiff.errors import EcoDiffError
from ecodiff.method.gates import Gates
from ecodiff.method.hard_concrete import HardConcrete
from ecodiff.method.sites import Site
from ecodiff.metrics import bootstrap_interval, difference_interval, share_interval, ssim
from ecodiff.metrics.intervals import Interval, difference


def ex_intro_ratio(images, ratio):
    """Numbers of the three images (from 1) that are least like the original's, and those that are most like it."""
    _asked_run("ratio", ratio, 0.7)
    closeness = ssim(images["learned"], images["original"]).tolist()
    order = sorted(range(len(closeness)), key=closeness.__getitem__)
    return {
        "least_like": _counted(order[:3], 1),
        "from_zero": _counted(order[:3], 0),
        "most_like": _counted(order[-3:], 1),
    }


def ex_models_ceiling(pairs):
    """Per cent of the images that are the model's fault; ``pairs`` is a number of the cards, with real scenes'."""
    return {
        "own_fault": 100 * (1 - pairs.value / pairs.real),
        "all_wrong": 100 - pairs.value,
        "points_below": pairs.real - pairs.value,
        "judge": 100 - pairs.real,
    }


def ex_pairs(chosen, change, one_off):
    """Changes, in per cent, without the two least and without the two most important heads of one site."""
    single = [change(one_off(chosen, unit)) for unit in range(chosen.units)]
    order = sorted(range(chosen.units), key=single.__getitem__)
    least, most = order[:2], order[-2:]
    return {
        "least": change(one_off(chosen, least)),
        "most": change(one_off(chosen, most)),
        "least_summed": sum(single[unit] for unit in least),
        "most_summed": sum(single[unit] for unit in most),
    }


def ex_all_heads(sites, change, one_off):
    """Changes, in per cent, without nine and without all ten heads of one site."""
    ten = sites["down_blocks.2.attentions.0.transformer_blocks.1.attn2"]
    single = [change(one_off(ten, unit)) for unit in range(ten.units)]
    order = sorted(range(ten.units), key=single.__getitem__)
    return {
        "nine": change(one_off(ten, order[:9])),
        "ten": change(one_off(ten, order)),
        "nine_summed": sum(single) - max(single),
        "ten_summed": sum(single),
    }


def ex_prob_open():
    """P(z > 0) as a function of λ and δ, with the paper's other constants."""

    def opened(log_alpha, delta):
        return HardConcrete(delta=delta).prob_open(torch.tensor(float(log_alpha))).item()

    def closed(log_alpha, delta):
        return 1 - opened(log_alpha, delta)

    def without_delta(log_alpha, delta):
        return opened(log_alpha, 0.0)

    def unclipped(log_alpha, delta):
        return (1 + 2 * delta) * opened(log_alpha, 0.0) - delta

    points = [(-2.0, 0.0), (0.0, 0.1), (1.0, 0.5), (3.5, 0.5), (-4.0, 0.5)]
    return {
        "opened": opened,
        "closed": closed,
        "without_delta": without_delta,
        "unclipped": unclipped,
        "points": points,
    }


def ex_never_closed():
    """Shares of draws in which a gate with λ = 0 is closed, and the λ from which one with δ = 0.5 never is."""
    free, bounded = HardConcrete(delta=0.0), HardConcrete(delta=0.5)
    zero = torch.tensor(0.0)
    return {
        "closed_free": 1 - free.prob_open(zero).item(),
        "closed_bounded": 1 - bounded.prob_open(zero).item(),
        "never_closed": bounded.l0_saturation,
        "open_free": free.prob_open(zero).item(),
        "open_bounded": bounded.prob_open(zero).item(),
        "stuck_at_one": bounded.saturation,
    }


def ex_rerun():
    """The probability that a gate with λ = 0 is closed at δ = 0.1."""
    zero = torch.tensor(0.0)
    return {
        "closed": 1 - HardConcrete(delta=0.1).prob_open(zero).item(),
        "opened": HardConcrete(delta=0.1).prob_open(zero).item(),
        "closed_at_sdxls": 1 - HardConcrete(delta=0.5).prob_open(zero).item(),
        "closed_free": 1 - HardConcrete(delta=0.0).prob_open(zero).item(),
    }


def ex_large_k():
    """The smallest -γ for which k = (-γ/ζ)^α is 1."""
    paper = HardConcrete()
    return {"as_large_as_zeta": paper.zeta, "one": 1.0, "papers": -paper.gamma}


def ex_l1_drift(learning_rate):
    """Updates of the learning rate's length from λ = 5 to where the image has a gradient."""
    saturation = HardConcrete(delta=0.5).saturation
    return {
        "to_saturation": math.ceil((5 - saturation) / learning_rate),
        "to_zero": math.ceil(5 / learning_rate),
        "rest_of_the_way": math.ceil(saturation / learning_rate),
    }


def ex_toy(runs, weight):
    """Where two units end: the gate, without noise, of a useless one, and λ of one that matters a little."""
    _asked_run("weight", weight, 2)
    (sdxl, by_size), (_, by_l0) = runs["|λ|, δ = 0.5"], runs["P(open), δ = 0"]
    return {
        "useless_gate": sdxl.deterministic(by_size[-1, 2]).item(),
        "useless_log_alpha": by_size[-1, 2].item(),
        "matters_a_little": by_l0[-1, 1].item(),
        "matters_much": by_l0[-1, 0].item(),
    }


def ex_weight(gates: Gates):
    """Mean λ of the neurons, and of the heads, after the short run."""
    means = {}
    for kind in ("feed_forward", "attention"):
        scores = [values for name, values in gates.scores().items() if gates.sites[name].kind == kind]
        means[kind] = torch.cat(scores).mean().item()
    return {"neurons": means["feed_forward"], "heads": means["attention"]}


def ex_steps(rows, minus):
    """Differences of SSIM between masks that were learned in 4 and 8 steps, and for 180 and 60 updates."""
    steps = ("learned in 4 steps", "learned in 8 steps")
    longer, usual = "learned three times as long", "learned"
    return {
        "steps": minus(rows("transfer"), *steps, "ssim").mean,
        "steps_facts": minus(rows("transfer"), *steps, "facts").mean,
        "updates": minus(rows("best"), f"{longer}, 20%", f"{usual}, 20%", "ssim").mean,
        "updates_at_30": minus(rows("best"), f"{longer}, 30%", f"{usual}, 30%", "ssim").mean,
        "updates_facts": minus(rows("best"), f"{longer}, 20%", f"{usual}, 20%", "facts").mean,
    }


def _above_weights(update: Cost, keep_last: int, inner: bool = False) -> float:
    """Peak memory of an update of 50 steps above all weights, in GB."""
    update = replace(update, calls=50, steps=50)
    weights = update.weights + update.text_encoders + update.vae
    return (update.update_peak(keep_last=keep_last, inner=inner) - weights) / 1e9


def ex_sqrt():
    """Memory above the weights (GB) and time (calls of the denoiser) where seven of fifty steps are kept."""
    steps, stretch = 50, 7
    counted = cost("sd2", guidance=1.0, dtype="fp32", inner=False)
    return {
        "seven_calls": _above_weights(counted, stretch),
        "one_call": _above_weights(counted, 1),
        "with_weights": replace(counted, calls=steps, steps=steps).update_peak(keep_last=stretch) / 1e9,
        "one_stretch_kept": 3 * steps - stretch,
        "one_step_kept": 3 * steps - 1,
        "nothing_kept": 3 * steps,
        "plain": 2 * steps,
    }


def ex_inner():
    """Memory above the weights (GB) with checkpoints inside the denoiser, too."""
    counted = cost("sd2", guidance=1.0, dtype="fp32", inner=True)
    return {"one_block": _above_weights(counted, 1, inner=True), "one_call": _above_weights(counted, 1)}


def ex_parameters(gates: Gates):
    """What two masks of 20 % remove: per cent of the maskable parameters, and heads."""
    by_units, by_parameters = gates.mask(ratio=0.2), gates.mask(ratio=0.2, count="parameters")
    sites = gates.sites
    maskable = sum(site.units * site.params_per_unit for site in sites.values())
    parameters = sum(int((~keep).sum()) * sites[name].params_per_unit for name, keep in by_units.items())
    return {
        "parameters": 100 * parameters / maskable,
        "ratio": 20.0,
        "heads_by_units": _removed(by_units, sites, "attention"),
        "neurons_by_units": _removed(by_units, sites, "feed_forward"),
        "heads_by_parameters": _removed(by_parameters, sites, "attention"),
    }


def ex_twice():
    """The share of what is left after 10 % that makes 20 % of the original."""
    first, both = 0.1, 0.2
    return {"of_what_is_left": (both - first) / (1 - first), "of_the_original": both - first, "both": both}


def ex_magnitude(rows, removed):
    """SSIM of magnitude minus random removal on the FLUX-class model, and heads that one of its sites loses."""
    gaps = {}
    for model in ("openmoji-flux-dev", "openmoji-sdxl"):
        found = rows(model)
        pair = ([cell["ssim"] for cell in found[f"{name}, 20%"]] for name in ("magnitude", "random"))
        gaps[model] = difference(*pair).mean
    heads = [gone for name, gone in removed().items() if name.endswith("attn")]
    return {
        "flux": gaps["openmoji-flux-dev"],
        "sdxl": gaps["openmoji-sdxl"],
        "one_site": max(heads),
        "all_sites": sum(heads),
    }


def ex_quality_extrapolate(halves, half_sizes):
    """FID between halves of one source for infinitely many images, from the two largest sizes."""
    below, large = half_sizes[-2:]
    fid = {size: float(halves["fid"][size].mean()) for size in (below, large)}
    return {
        "extrapolated": (large * fid[large] - below * fid[below]) / (large - below),
        "zero": 0.0,
        "largest": fid[large],
        "halved": fid[large] / 2,
    }


def ex_quality_removal(known):
    """Mean SSIM of the smaller model, and which of two measures tells it from the original."""
    values = known["pruned"]
    named = difference_interval(values["object"], known["original"]["object"])
    seen = {(True, True): "both", (True, False): "ssim", (False, True): "probe", (False, False): "neither"}
    below_one = bootstrap_interval(values["ssim"]).high < 1
    return {
        "ssim": sum(values["ssim"]) / len(values["ssim"]),
        "other_noise": sum(known["again"]["ssim"]) / len(known["again"]["ssim"]),
        "seen_by": seen[below_one, named.sign != 0],
        "both": "both",
        "neither": "neither",
    }


def ex_obs_wanda():
    """OBS's score of a neuron with these outgoing weights where H is diagonal, as a function."""

    def obs(weights, h):
        inverse = torch.linalg.inv(torch.diag(torch.tensor([h, 1.0])))
        return sum(weight**2 for weight in weights) / inverse[0, 0].item()

    def wanda(weights, h):
        return sum(abs(weight) for weight in weights) / len(weights) * math.sqrt(h)

    def divided(weights, h):
        return sum(weight**2 for weight in weights) / h

    points = [([1.0, -2.0], 4.0), ([0.5, 0.25, 3.0], 0.5)]
    return {"obs": obs, "wanda": wanda, "divided": divided, "points": points}


def ex_worse_than_chance(mask_of, sites: dict[str, Site]):
    """The site that magnitude empties, and how many heads go where each site loses its own fifth."""
    mask, local = mask_of(), mask_of("local")
    heads = {name: int((~keep).sum()) for name, keep in mask.items() if sites[name].kind == "attention"}
    neurons = {name: int((~keep).sum()) for name, keep in mask.items() if sites[name].kind == "feed_forward"}
    emptied = [name for name in mask if not mask[name].any()]
    return {
        "emptied": emptied[0].lower() if emptied else "none",
        "most_neurons": max(neurons, key=neurons.__getitem__).lower(),
        "none": "none",
        "local": _removed(local, sites, "attention"),
        "kind": sum(heads.values()),
    }


def ex_second_order():
    """The share of the units that go with one seed which also go with another, by chance."""
    ratio = 0.2
    return {"of_those_that_go": ratio, "of_all": ratio**2, "either": 1 - (1 - ratio) ** 2}


def ex_calibration(against_fisher):
    """SSIM of learned masks minus Fisher's, from 100 and from 8 captions."""
    return {
        "many": against_fisher(100, "ssim").mean,
        "few": against_fisher(8, "ssim").mean,
        "some": against_fisher(64, "ssim").mean,
        "facts": against_fisher(100, "facts").mean,
    }


def ex_compensate(gain):
    """SSIM that adapting the weights brings to a learned mask, on a transformer and on a U-Net."""
    return {
        "transformer": gain("openmoji-flux-schnell", "ssim").mean,
        "unet": gain("openmoji-sdxl", "ssim").mean,
        "transformer_facts": gain("openmoji-flux-schnell", "facts").mean,
        "unet_facts": gain("openmoji-sdxl", "facts").mean,
    }


def ex_own_study(config):
    """Updates of 1 and of 24 samples that see as many samples as the default."""
    samples = config.updates * config.batch_size
    return {"ones": samples // 1, "large": samples // 24, "same": config.updates}


def ex_seeds_agree(learned, closeness):
    """SSIM with the mask of the mean of two seeds' λ, and with the mask of each."""
    first, second = (gates.scores() for gates, _ in learned[:2])
    mean = {name: (first[name] + second[name]) / 2 for name in first}
    return {"mean": closeness(mean), "first": closeness(first), "second": closeness(second)}


def ex_own_pictures():
    """Half the width, in points, of the interval of 90 % right images of 200, and the whole."""
    interval = share_interval([1] * 180 + [0] * 20)
    width = 100 * (interval.high - interval.low)
    return {"half": width / 2, "whole": width}


def ex_retrain_original(found):
    """SSIM that the control loses by retraining, and that the mask had cost before it."""
    rows = found["openmoji-sdxl"]

    def mean(row):
        values = [value for cell in rows[row] for value in cell["ssim"]]
        return sum(values) / len(values)

    return {
        "drift": 1 - mean("original, LoRA"),
        "damage": 1 - mean("learned, 50%"),
        "pruned_falls": mean("learned, 50%") - mean("learned, 50%, LoRA"),
        "retrained": 1 - mean("learned, 50%, LoRA"),
    }


def ex_cost(rows, table):
    """How many of the models fit into 24 GB while a mask is learned, with and without inner checkpoints."""
    room = usable("24GB") / 1e9

    def fitting(samples, line):
        count = 0
        for row in rows.values():
            shown = {label: before for label, before, _ in table(row, row["steps"], samples, 0.2, True)}
            count += float(shown[line].replace(" GB", "").replace(",", "")) <= room
        return count

    by_steps, inside = "Mask update, time-step checkpointed", "… and checkpointed inside the denoiser"
    return {
        "by_steps": fitting(2, by_steps),
        "inside": fitting(2, inside),
        "by_steps_one_sample": fitting(1, by_steps),
        "all": len(rows),
    }


def ex_cost_units(counted, released):
    """Per cent of SDXL's parameters that go with a tenth of its units."""
    mask = {row["site"]: row["kept_10"] for row in released}
    found = counted("sdxl", steps=40, guidance=5.0, mask=mask, inner=False)
    before, after = (values["parameters"]["total"] for values in (found, found["pruned"]))
    return {"gone": 100 * (1 - after / before), "left": 100 * after / before, "units": 10.0}


def ex_carbon(row):
    """Images until the mask has paid for itself, if an image takes 4 s and a tenth of it is saved."""
    saved = 0.4
    return {
        "gpu_hours": 3600 * row["gpu_hours"] / saved,
        "training_hours": 3600 * row["training_hours"] / saved,
        "whole_time": 3600 * row["gpu_hours"] / 4,
        "hours": row["gpu_hours"] / saved,
    }


def ex_items_figure(preprint, published):
    """The rise of FID (per cent) of the published FLUX-schnell at 20 %, and where the preprint has the same FID."""
    before, after = (_row(published, "FLUX-schnell", method)["coco_fid"] for method in ("Original", "EcoDiff"))
    same = [row["ratio"] for row in preprint if row["method"] == "EcoDiff" and row["coco_fid"] == after]
    return {"rise": 100 * (after / before - 1), "points": after - before, "ratio": 100 * same[0], "published": 20.0}


def ex_claims_margin(rules):
    """How many times as many images halve an interval, and what becomes of two verdicts at half the effect."""
    shown = Interval(-0.01, -0.035, 0.015, 0.95)  # the example of the exercise
    return {
        "square": (0.05 / 0.025) ** 2,
        "linear": 0.05 / 0.025,
        "stricter": _verdict(rules.kept([shown], smallest=0.025)),
        "as_before": _verdict(rules.kept([shown])),
        "refuted": _verdict(rules.NOT_REPRODUCED),
    }


def ex_claims_own(decide):
    """The verdict on masks that were learned in 4 steps against those in 12."""
    return {"verdict": _verdict(decide().verdict), "holds": "reproduced", "fails": "not reproduced"}


def ex_errata(table1):
    """The rise of COCO FID of FLUX at 10 % by Table 1, and the FID that the sentence of §3.2 would need."""
    original, pruned = (_row(table1, "FLUX", method)["coco_fid"] for method in ("Original", "EcoDiff"))
    flickr = [_row(table1, "FLUX", method)["flickr_fid"] for method in ("Original", "EcoDiff")]
    return {"rise": pruned - original, "flickr": flickr[1] - flickr[0], "printed": 1.77}


def ex_errata_prompts(table10):
    """FID of a FLUX mask from one prompt minus that from 100 prompts, by Table 10."""
    fid = {row["size"]: row["coco_fid"] for row in table10}
    return {"one_minus_hundred": fid[1] - fid[100], "most_minus_hundred": fid[256] - fid[100]}


def ex_versions_hours():
    """Updates of four samples in ten hours at 20 s per sample, and how much slower another GPU may be for 400."""
    seconds, sample = 10 * 3600, 20
    update = 4 * sample
    return {
        "updates": seconds / update,
        "of_one_sample": seconds / sample,
        "slower": seconds / 400 / update,
        "for_fifty": seconds / 50 / update,
    }


def ex_reviewers_steps():
    """Memory of two models that each keep 80 %, in units of the original's."""
    models, kept = 2, 0.8
    return {"both": models * kept, "one": kept, "whole": float(models)}


def ex_family_prompts(values, one_level):
    """Per cent of the sampled neurons that stay under one level, by the first prompt and by three."""

    def share(kind, prompts):
        of_kind = [rms for (_, _, k), rms in zip(values["units"], values["rms"], strict=True) if k == kind]
        return 100 * sum(max(rms[:prompts]) <= one_level for rms in of_kind) / len(of_kind)

    return {
        "neurons_one": share("feed_forward", 1),
        "neurons_three": share("feed_forward", 3),
        "heads_one": share("attention", 1),
        "heads_three": share("attention", 3),
    }


def ex_family_together(alone):
    """What several changes (levels) make together if they are unrelated, and if all push the same way."""
    return {"unrelated": math.hypot(*alone), "same_way": sum(alone), "largest": max(alone)}


def ex_80_calls(steps):
    """Calls of the denoiser in one update of the toy, without and with the last step kept."""
    return {"all": 2 * steps, "last_kept": 2 * steps - 1, "forward": steps, "in_units_of_work": 3 * steps}


def ex_80_price(found, weight):
    """Per cent of the removed neurons that are weak, and of the removed heads."""
    _asked_run("weight", weight, 1)
    shares = {kind: 100 * is_weak.float().mean().item() for kind, is_weak in found.items()}
    return {"neurons": shares["ff"], "heads": shares["attn"], "strong_neurons": 100 - shares["ff"]}


def _asked_run(name: str, value: Any, asked: float) -> None:
    if value != asked:
        raise EcoDiffError(
            f"the question is about {name} = {asked:g}, and this run has {value:g}: change it, and rerun."
        )


def _counted(indices: list[int], start: int) -> frozenset[int]:
    """These places, counted from 0 or from 1."""
    return frozenset(index + start for index in indices)


def _removed(mask: dict[str, torch.Tensor], sites: dict[str, Site], kind: str) -> int:
    """How many units of a kind a mask removes."""
    return sum(int((~keep).sum()) for name, keep in mask.items() if sites[name].kind == kind)


def _row(table: list[dict], model: str, method: str) -> dict:
    """The first row of a model and a method."""
    return next(row for row in table if (row["model"], row["method"]) == (model, method))


def _verdict(words: str) -> str:
    """A verdict without what it was reached on."""
    return words.removesuffix(" on the embedded family")
