"""Pruned models remember which units of the original they kept."""

import copy
import json
import random

import pytest
import torch
from safetensors.torch import load_file
from test_surgery import keep_first
from tiny import random_mask, tiny_flux, tiny_sd, tiny_sdxl

import ecodiff
from ecodiff import EcoDiffError, denoiser, find_sites, mask_of, prune
from ecodiff.method.kept import packed, unpacked
from ecodiff.method.sites import KINDS


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def some_and_none(model, kinds=KINDS):
    """A mask in which two attentions lose all heads, one site nothing, and all others some units."""
    mask = random_mask(model, kinds=kinds)
    attentions = [name for name, site in find_sites(model, ("attention",)).items() if site.min_units == 0]
    for name in attentions[:2]:
        mask[name] = torch.zeros_like(mask[name])
    whole = list(mask)[-1]
    mask[whole] = torch.ones_like(mask[whole])
    return mask


@pytest.mark.parametrize("build", [tiny_sdxl, tiny_flux])
def test_the_mask_comes_back_also_from_a_folder_and_from_copies(build, tmp_path):
    pipe = build()
    mask = some_and_none(denoiser(pipe))
    small = prune(pipe, mask)
    assert same(mask_of(small), mask) and same(mask_of(denoiser(small)), mask)
    small.save_pretrained(tmp_path)
    loaded = ecodiff.load(tmp_path)
    assert same(mask_of(loaded), mask)
    assert same(mask_of(copy.deepcopy(denoiser(loaded))), mask)
    again = prune(pipe, mask_of(loaded))
    for name, value in denoiser(small).state_dict().items():
        assert torch.equal(denoiser(again).state_dict()[name], value)


def test_pruned_twice_is_one_mask_of_the_original():
    pipe = tiny_flux()
    first = some_and_none(denoiser(pipe), ("attention", "feed_forward"))
    once = prune(pipe, first)
    second = random_mask(denoiser(once), ratio=0.3, seed=3)
    twice = prune(once, second)
    at_once = prune(pipe, mask_of(twice))
    state = denoiser(at_once).state_dict()
    for name, value in denoiser(twice).state_dict().items():
        assert torch.equal(state[name], value), name
    sites = find_sites(denoiser(pipe))
    assert all(len(keep) == sites[name].units for name, keep in mask_of(twice).items())


def older(folder, part):
    """Take from a folder what an earlier version did not write."""
    path = folder / part / "config.json"
    config = json.loads(path.read_text())
    del config["kept_units"]
    path.write_text(json.dumps(config))


def test_a_folder_of_an_earlier_version_says_that_its_mask_is_not_known(tmp_path):
    pipe = tiny_sd()
    small = prune(pipe, random_mask(pipe.unet))
    small.save_pretrained(tmp_path)
    older(tmp_path, "unet")
    loaded = ecodiff.load(tmp_path)
    for name, value in small.unet.state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[name], value)
    with pytest.raises(EcoDiffError, match="mask_of: this PrunedUNet2DConditionModel was pruned by an earlier version"):
        mask_of(loaded)
    # What is removed from now on does not make the rest known.
    with pytest.raises(EcoDiffError, match="earlier version"):
        mask_of(prune(loaded, random_mask(loaded.unet, seed=2)))


def test_what_is_not_pruned_has_no_mask():
    pipe = tiny_sd()
    for model in (pipe, pipe.unet):
        with pytest.raises(EcoDiffError, match="mask_of: this UNet2DConditionModel is not pruned"):
            mask_of(model)
    assert mask_of(prune(pipe, {})) == {}


def test_a_model_made_from_its_config_alone_has_channels_in_their_places():
    """EMA models are made so: buffers that say where channels belong come from the config, not from a file."""
    pipe = tiny_flux()
    small = denoiser(prune(pipe, some_and_none(pipe.transformer)))
    fresh = type(small).from_config(small.config)
    for name, buffer in small.named_buffers():
        assert torch.equal(dict(fresh.named_buffers())[name], buffer), name


def test_masks_are_packed_eight_units_to_a_byte():
    generator = torch.Generator().manual_seed(0)
    mask = {str(units): torch.rand(units, generator=generator) < 0.5 for units in (1, 7, 8, 9, 1000)}
    entries = json.loads(json.dumps(packed(mask)))
    assert same(unpacked(entries), mask)
    assert len(entries["1000"][1]) == -(-125 // 3) * 4


def test_changed_masks_do_not_load(tmp_path):
    pipe = tiny_sd()
    small = prune(pipe, keep_first(pipe.unet, 1, ("attention",)))
    config = json.loads(json.dumps(dict(small.unet.config)))
    name, entry = next(iter(config["kept_units"].items()))
    draw = random.Random(0)
    broken = [
        None,
        3,
        "gA==",
        [],
        [2],
        [2, 3],
        [True, "gA=="],
        [-1, ""],
        [2, "gA"],
        [2, "~~"],
        [2, "gP8="],
        [2, "AA=="],
    ]
    broken += [[2, "//8="], [10**12, "gA=="], [2, "/w=="], {"a": 1}, [2.0, "gA=="], [entry[0] + 1, entry[1]]]
    broken += [[draw.randrange(-3, 99), "".join(draw.choices("Ag/=+~ ", k=draw.randrange(9)))] for _ in range(300)]
    for value in broken:
        if value == entry:
            continue
        with pytest.raises(EcoDiffError, match="config.json"):
            unpacked_like_loading(pipe.unet, {**config, "kept_units": {**config["kept_units"], name: value}})
    for value in (None, [], "all", {"nowhere": [2, "gA=="]}):
        with pytest.raises(EcoDiffError, match="config.json"):
            unpacked_like_loading(pipe.unet, {**config, "kept_units": value})


def unpacked_like_loading(original, config):
    from ecodiff.method.kept import mask_of_config

    return mask_of_config(config, find_sites(original, KINDS))


def test_the_saved_files_of_an_earlier_version_have_no_mask():
    from pathlib import Path

    saved = Path(__file__).parents[1] / "fixtures" / "saved" / "sdxl"
    pipe = ecodiff.load(saved / "pipeline")
    stored = load_file(saved / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(pipe.unet.state_dict()[name], value) for name, value in stored.items())
    with pytest.raises(EcoDiffError, match="prune the original again"):
        mask_of(pipe)
