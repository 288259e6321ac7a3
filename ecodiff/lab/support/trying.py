"""What holds for one class of diffusers: each stage tried on a tiny random instance, and what failed in its own words.

A stage is True, or the sentence or exception with which it failed; a stage that could not be tried is absent.
"""

from __future__ import annotations

import inspect
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ecodiff.errors import EcoDiffError
from ecodiff.method.check import check
from ecodiff.method.config import LearnConfig
from ecodiff.method.hooks import apply_gates
from ecodiff.method.learn import learn
from ecodiff.method.mask import make_mask
from ecodiff.method.sites import Site, find_sites, share_reached, skipped_modules
from ecodiff.method.surgery import prune, prune_denoiser
from ecodiff.method.trial import failing_sites
from ecodiff.pipelines.endings import missing_name
from ecodiff.pipelines.parts import denoiser as find_denoiser
from ecodiff.pipelines.parts import experts, sampling_loop

from . import build

RATIO = 0.4  # of the units that a random mask removes
# Largest differences, as shares of the largest output: of one call of a denoiser, and of a whole sampling loop.
SAME, SAME_IN_A_LOOP = 1e-4, 1e-3
# Modules of blocks whose parameters are those of attentions and feed-forwards, by the names of their classes.
PARTS = re.compile(r"(Attention|Attn|FeedForward|FFN|MLP|Mlp|SwiGLU|GLUMBConv|Expert|MoE)")
NO_PARTS = re.compile(r"(Block|Layer|Processor|Embed|Norm|Transformer\w*Model)\w*$")
PROMPTS = ("a red apple", "a cat")


def try_denoiser(name: str) -> dict:
    """The row of a denoiser class: parameters, shares of units, and the stages.

    Keys: parameters (of the full size where `counted_on` says so), in_parts (share in attentions and feed-forwards),
    reached ({kind: share of those}), skipped (reasons), stages.
    """
    row: dict[str, Any] = {"kind": "denoiser", "stages": {}}
    row |= counted(name)
    network, inputs = attempt(row, "build", partial(build.denoiser, name)) or (None, None)
    if network is None:
        return row

    def outputs(of: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return _floats(of(**_fresh(inputs)))

    if attempt(row, "runs", partial(outputs, network)) is None:
        return row
    sites = attempt(row, "sites", partial(_removable, network, partial(outputs, network), row))
    if sites:
        _try_masks(row, network, sites, outputs, partial(prune_denoiser, network), _saved_denoiser, SAME)
    return row


def try_pipeline(name: str) -> dict:
    """The row of a pipeline class: its denoiser, whether and how it can be learned through, and the stages."""
    row: dict[str, Any] = {"kind": "pipeline", "stages": {}}
    pipe, call = attempt(row, "build", partial(build.pipeline, name)) or (None, None)
    if pipe is None:
        return row
    network = attempt(row, "denoiser", partial(find_denoiser, pipe))
    if network is None:
        return row
    row["denoiser"] = ", ".join(dict.fromkeys(type(part).__name__ for part in experts(network)))
    if attempt(row, "runs", partial(_calls_of, pipe, call)) is None:
        return row
    sites = attempt(row, "sites", partial(_removable, network, partial(_calls_of, pipe, call), row))
    if not sites:
        return row
    _try_learning(row, pipe, call)
    outputs = partial(_calls_of, call=call)
    small = _try_masks(row, pipe, sites, outputs, partial(prune, pipe), _saved_pipeline, SAME_IN_A_LOOP)
    if small is not None:
        attempt(row, "retrain", partial(_retrained, small, call))
    return row


def attempt(row: dict, stage: str, do: Callable) -> Any:
    """What ``do`` returns, noted as True; or None, and the reason noted. `_Failed` and EcoDiffError are sentences."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = do()
    except (EcoDiffError, _Failed) as error:
        row["stages"][stage] = _short(str(error))
        return None
    except Exception as error:
        missing = missing_name(error)
        row["stages"][stage] = _short(f"needs {missing}" if missing else f"unexpected {type(error).__name__}: {error}")
        return None
    row["stages"][stage] = True
    return result


class _Failed(Exception):
    """A stage that ran and gave something wrong; the text says what."""


def _short(text: str) -> str:
    return " ".join(text.split())[:300]


def counted(name: str) -> dict:
    """Parameters and shares, without weights: of the defaults of the class, else of the tiny configuration."""
    cls = getattr(diffusers, name)
    configurations = build.configurations()
    given = configurations["full_size"].get(name, {})
    tiny = configurations["denoisers"].get(name, {}).get("config")
    for counted_on, config in (("its own defaults" if not given else "a published size", given), ("a tiny size", tiny)):
        if config is None:
            continue
        try:
            with torch.device("meta"):
                network = cls(**config)
            sites = find_sites(network)
        except Exception as error:  # some classes have defaults with which they cannot be built
            failure = _short(f"{type(error).__name__}: {error}")
            continue
        return {"counted_on": counted_on, **_shares(network, sites)}
    return {"counted_on": f"nothing ({failure})"}


def _shares(network: nn.Module, sites: Mapping[str, Site]) -> dict:
    """Counts of parameters: of all, of attentions and feed-forwards, and of units by kind."""
    total = sum(parameter.numel() for parameter in network.parameters())
    parts = _parts(network)
    layers = {span.layer for site in sites.values() for span in site.writers + site.readers}
    for layer in layers:  # such as the two linear layers beside the attention of a parallel block
        if not any(layer == part or layer.startswith(f"{part}.") for part in parts):
            parts.append(layer)
    counted = {id(p): p.numel() for part in parts for p in network.get_submodule(part).parameters()}
    in_parts = sum(counted.values())
    reached = {}
    for kind in ("attention", "feed_forward"):
        units = sum(site.units * site.params_per_unit for site in sites.values() if site.kind == kind)
        reached[kind] = round(units / max(in_parts, 1), 4)
    skipped: dict[str, int] = {}
    for reason in skipped_modules(network).values():
        skipped[reason] = skipped.get(reason, 0) + 1
    share = round(in_parts / max(total, 1), 4)
    return {"parameters": total, "in_parts": share, "reached": reached, "skipped": skipped}


def _parts(network: nn.Module) -> list[str]:
    """Names of the outermost attentions and feed-forwards inside numbered blocks."""
    parts: list[str] = []
    for name, module in network.named_modules():
        class_name = type(module).__name__
        if not any(piece.isdigit() for piece in name.split(".")) or isinstance(module, nn.ModuleList):
            continue
        if PARTS.search(class_name) and not NO_PARTS.search(class_name):
            if not any(name.startswith(f"{part}.") for part in parts):
                parts.append(name)
    return parts


def _removable(network: nn.Module, run: Callable, row: dict) -> dict[str, Site]:
    """The sites whose trial succeeds; raises _Failed where there is none."""
    sites = find_sites(network)
    failing = failing_sites(network, sites, run)
    row["sites"] = len(sites)
    if failing:
        row["failing"] = {"sites": len(failing), "reason": _short(next(iter(failing.values())))}
    left = {name: site for name, site in sites.items() if name not in failing}
    if not left:
        raise _Failed("no site of its denoiser can be pruned")
    row["share_of_tiny"] = round(share_reached(network, left), 4)
    return left


def _try_masks(row: dict, whole, sites, outputs, pruned, saved, tolerance: float) -> Any:
    """The stages removed, emptied and saved; returns what is pruned by a random mask, or None."""
    generator = torch.Generator().manual_seed(3)
    scores = {name: torch.rand(site.units, generator=generator) for name, site in sites.items()}
    half = make_mask(scores, sites, RATIO)
    least = {name: torch.arange(site.units) < site.min_units for name, site in sites.items()}
    network = whole if isinstance(whole, nn.Module) else find_denoiser(whole)

    def removed(mask):
        with apply_gates(network, mask, sites, must_run=False):
            wanted = outputs(whole)
        small = pruned(mask)
        _check_same(outputs(small), wanted, tolerance)
        return small

    def loaded(small):
        with tempfile.TemporaryDirectory() as folder:
            again = saved(small, folder)
            for given, wanted in zip(outputs(again), outputs(small), strict=True):
                if not torch.equal(given, wanted):
                    raise _Failed("what is loaded does not return what was saved")
        return True

    small = attempt(row, "removed", partial(removed, half))
    attempt(row, "emptied", partial(removed, least))
    if small is not None:
        attempt(row, "saved", partial(loaded, small))
    return small


def _check_same(given: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    if [tensor.shape for tensor in given] != [tensor.shape for tensor in wanted]:
        raise _Failed("removed and masked units give outputs of different shapes")
    largest = max(tensor.abs().max().item() for tensor in wanted)
    differences = [(a - b).abs().max().item() for a, b in zip(given, wanted, strict=True)]
    if not max(differences) <= tolerance * largest:  # also where one is not a number
        raise _Failed(f"removed and masked units differ by {max(differences) / max(largest, 1e-30):.1g} of the output")


def _saved_denoiser(small: nn.Module, folder: str) -> nn.Module:
    small.save_pretrained(folder)
    return type(small).from_pretrained(folder).eval()


def _saved_pipeline(small, folder: str):
    """The pipeline, saved and loaded. All but its denoiser is handed on: tiny tokenizers may not survive, which says
    nothing of pruning."""
    small.save_pretrained(folder)
    networks = experts(find_denoiser(small))
    others = {name: part for name, part in small.components.items() if part not in networks}
    again = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **others)
    again.set_progress_bar_config(disable=True)
    return again


def _try_learning(row: dict, pipe, call: Mapping) -> None:
    """The stages gradient (exact, through the whole loop) and learn: with images in `call`, else in each sample."""
    reasons = []
    for form, (prompts, rest) in _forms(pipe, call).items():
        guidance = rest.pop("guidance_scale", None)
        config = LearnConfig(updates=1, batch_size=2, num_inference_steps=2, guidance_scale=guidance, call=rest)
        tried: dict[str, Any] = {"stages": {}}
        if attempt(tried, "gradient", partial(_exact, pipe, prompts, config)):
            attempt(tried, "learn", partial(learn, pipe, prompts, config, progress=False))
        stages = tried["stages"]
        if set(stages.values()) == {True}:
            row["form"] = form
            row["stages"] |= stages
            return
        reasons.append(stages)
    row["stages"] |= reasons[0]


def _exact(pipe, prompts: list, config: LearnConfig) -> bool:
    found = check(pipe, prompts, config)
    if found.problem is not None:
        raise _Failed(found.problem)
    if not found.learns:
        raise _Failed(str(found).splitlines()[-1])
    return True


def _forms(pipe, call: Mapping) -> dict[str, tuple[list, dict]]:
    """Ways of giving this pipeline two samples: (prompts, further arguments of the call)."""
    rest = dict(call)
    prompt = rest.pop("prompt", None)
    prompts = list(PROMPTS) if isinstance(prompt, (str, list)) else []
    forms = {}
    if prompts:
        forms["prompts"] = (prompts, dict(rest))
    per_sample = {name: value for name, value in rest.items() if not isinstance(value, (bool, int, float, str))}
    if per_sample:
        samples = [{**per_sample, **({"prompt": text} if prompts else {})} for text in PROMPTS]
        forms["mappings"] = (samples, {name: value for name, value in rest.items() if name not in per_sample})
    if not forms:
        forms["settings only"] = ([], rest)
    return forms


def _retrained(small, call: Mapping) -> Any:
    from ecodiff.method.generate import generate
    from ecodiff.retraining.config import RetrainConfig
    from ecodiff.retraining.retrain import retrain

    prompts, rest = next(iter(_forms(small, call).values()))
    pictures = generate(small, prompts, range(len(prompts)), num_inference_steps=2, progress=False, **rest)
    rest = {name: given for name, given in rest.items() if name not in ("height", "width", "num_frames")}
    config = RetrainConfig(steps=1, batch_size=2, rank=2, lr=1e-4, call=rest)
    return retrain(small, pictures, prompts, config, progress=False)


def _calls_of(pipe, call: Mapping) -> list[Tensor]:
    """What the denoiser returns in each call of two steps of the pipeline's own loop."""
    seen: list[Tensor] = []

    def note(module, args, output):
        seen.extend(tensor.clone() for tensor in _floats(output))

    known = inspect.signature(sampling_loop(pipe)).parameters
    options = _fresh(call)
    if "num_inference_steps" in known:
        options.setdefault("num_inference_steps", 2)
    if "generator" in known:
        options["generator"] = torch.Generator().manual_seed(0)
    handles = [network.register_forward_hook(note) for network in experts(find_denoiser(pipe))]
    try:
        torch.manual_seed(0)  # some loops draw without a generator
        with torch.no_grad():
            pipe(**options)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise _Failed("its sampling loop does not call the denoiser")
    return seen


def _floats(output: Any) -> list[Tensor]:
    """Tensors of floating-point numbers in what a model returns."""
    content = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [leaf for leaf in tree_leaves(content) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _fresh(arguments: Mapping) -> dict:
    """A copy of the arguments of a call: some models and loops write into what they are given."""
    return tree_map_only(Tensor, _clone, dict(arguments))


def _clone(tensor: Tensor) -> Tensor:
    return tensor.clone()
