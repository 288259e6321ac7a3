"""Which units a pruned model kept, by the names and numbers of the original's units.

They stand in the pruned model's config beside `pruned_units`, as `kept_units`: {site name: [units of the original, bit
mask]}, where the mask is packed eight units to a byte, the first unit in the highest bit, and written in base64. All of
SDXL takes some 60 kB. In the config, since that goes wherever a model goes: into copies, EMA models, shards and
variants, and to the Hub, from where diffusers fetches by id the files that it knows and no others.

Models that were pruned before this was so have `pruned_units` alone, and load as they did.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ecodiff.errors import EcoDiffError

from .sites import Site

ENTRIES = ("pruned_units", "kept_units")
"""What a pruned model's config has beside that of its original."""


def packed(mask: Mapping[str, Tensor]) -> dict[str, list]:
    """The entry `kept_units` of a config for a mask {site name: bool tensor [units]}."""
    entries = {}
    for name, keep in mask.items():
        bits = np.packbits(keep.cpu().numpy())
        entries[name] = [keep.numel(), base64.b64encode(bits.tobytes()).decode()]
    return entries


def unpacked(entries: Mapping) -> dict[str, Tensor]:
    """The mask that `packed` wrote; raises EcoDiffError for anything else."""
    if not isinstance(entries, Mapping):
        raise EcoDiffError("config.json: kept_units does not name sites; was the file changed?")
    return {name: _unpacked(name, entry) for name, entry in entries.items()}


def _unpacked(name: str, entry) -> Tensor:
    damaged = EcoDiffError(f"config.json: kept_units: {name!r} has no bit mask of its units; was the file changed?")
    if not isinstance(entry, (list, tuple)) or len(entry) != 2:
        raise damaged
    units, text = entry
    if isinstance(units, bool) or not isinstance(units, int) or not isinstance(text, str):
        raise damaged
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise damaged from None
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
    if units < 0 or len(data) != -(-units // 8) or bits[units:].any():
        raise damaged
    return torch.from_numpy(bits[:units].astype(bool))


def mask_of_config(config: Mapping, sites: Mapping[str, Site]) -> tuple[dict[str, Tensor], set[str]]:
    """The mask [units of the original] that a pruned model's config tells, and the sites of which it tells too little.

    sites: those of the model before anything was removed. Of models that were pruned before `kept_units` was written
    the config tells how many units a site has kept, but not which: the mask keeps the first ones, which is enough for
    shapes, and the site is among those of the second result. Raises EcoDiffError where the config contradicts itself.
    """
    numbers, mask = config.get("pruned_units", {}), unpacked(config.get("kept_units", {}))
    if not isinstance(numbers, Mapping):
        raise EcoDiffError("config.json: pruned_units does not name sites; was the file changed?")
    for name, units in numbers.items():
        whole = isinstance(units, int) and name in sites
        if not (whole and sites[name].min_units <= units <= sites[name].units):
            raise EcoDiffError(
                f"config.json: pruned_units: {name!r} cannot keep {units!r} units; was the file changed?"
            )
    for name, keep in mask.items():
        if name not in sites or keep.numel() != sites[name].units:
            raise EcoDiffError(f"config.json: kept_units: {name!r} is no site of so many units; was the file changed?")
        if int(keep.sum()) != numbers.get(name, keep.numel()):
            raise EcoDiffError(
                f"config.json: {name!r} keeps {int(keep.sum())} units by kept_units, and another number by "
                "pruned_units; was the file changed?"
            )
    unknown = set(numbers) - set(mask)
    for name in unknown:
        mask[name] = torch.arange(sites[name].units, device="cpu") < numbers[name]
    return mask, unknown


def composed(before: Mapping[str, Tensor], mask: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mask of the original's units for a model that was pruned by ``before`` and then by ``mask``.

    before: {site name: bool tensor [units of the original]}; mask: {site name: bool tensor [units that were left]}.
    """
    result = dict(before)
    for name, keep in mask.items():
        if name in before:
            result[name] = before[name].clone()
            result[name][before[name]] = keep.cpu()
        else:
            result[name] = keep.cpu().clone()
    return result


def kept_entries(
    model: nn.Module, sites: Mapping[str, Site], mask: Mapping[str, Tensor]
) -> dict[tuple[str, int], Tensor]:
    """{(layer, dimension of its weight): bool tensor, which rows (0) or columns (1) stay} for a mask of the sites.

    model: the one that the sites are of, before anything of the mask is removed. Over all sites, since a layer can
    belong to several: heads and neurons of FLUX's single blocks share their proj_out.
    """
    kept: dict[tuple[str, int], Tensor] = {}
    for name, keep in mask.items():
        for dimension, spans in enumerate((sites[name].writers, sites[name].readers)):
            for span in spans:
                width = model.get_submodule(span.layer).weight.shape[dimension]
                entries = kept.setdefault((span.layer, dimension), torch.ones(width, dtype=torch.bool, device="cpu"))
                entries[span.offset : span.offset + keep.numel() * span.size] = keep.repeat_interleave(span.size)
    return kept
