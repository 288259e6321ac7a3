"""Whether a published model fits is said before it is loaded, with what would make it fit."""

import json

import pytest
import torch

import ecodiff
from ecodiff import EcoDiffError, LearnConfig
from ecodiff.cost import presets
from ecodiff.cost.room import Machine, check_room, known

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
FLUX = "black-forest-labs/FLUX.1-dev"
GB = 10**9


def folder_of(path, preset, **changes):
    """A folder with the configuration of a preset's denoiser, without weights."""
    (path / preset.component).mkdir()
    config = {"_class_name": preset.denoiser_class, "_diffusers_version": "0.30.0", **preset.config, **changes}
    (path / preset.component / "config.json").write_text(json.dumps(config))
    return path


def test_ids_and_folders_of_presets_are_known(tmp_path):
    assert known(SDXL).name == "sdxl" and known("stabilityai/sdxl-turbo").name == "sdxl"
    assert known(folder_of(tmp_path, presets.preset("flux-schnell"))).name == "flux-schnell"


def test_others_are_not_and_nothing_is_said_of_them(tmp_path):
    nothing = Machine(device=1, host=1)
    other = folder_of(tmp_path, presets.preset("sdxl"), cross_attention_dim=1024)
    for model in ("someone/some-model", "openmoji-sdxl", tmp_path / "missing", other):
        assert known(model) is None
        check_room(model, machine=nothing)


@pytest.mark.parametrize(
    ("model", "options", "machine", "words"),
    [
        (SDXL, {}, Machine(12 * GB, 64 * GB), r"has 13\.9 GB of weights in float32 on the device.*: offload would fit"),
        (SDXL, {}, Machine(8 * GB, 12 * GB), r"13\.9 GB of weights in float32.*memory: dtype bfloat16 would fit"),
        (FLUX, {"dtype": "bf16"}, Machine(24 * GB, 64 * GB), r"33\.7 GB.*and neither bfloat16 nor offload is enough"),
        (FLUX, {"dtype": "bf16"}, Machine(32 * GB, 64 * GB), r"33\.7 GB.*: offload would fit"),
        (FLUX, {"dtype": "bf16"}, Machine(None, 16 * GB), "this machine has 16.0 GB of memory, and neither"),
    ],
)
def test_what_cannot_fit_is_one_sentence_with_what_would(model, options, machine, words):
    with pytest.raises(EcoDiffError, match=words) as error:
        check_room(model, machine=machine, **options)
    assert "\n" not in str(error.value)


def test_what_fits_is_no_error():
    check_room(SDXL, dtype="bf16", machine=Machine(8 * GB, 16 * GB))
    check_room(SDXL, dtype={"unet": "bf16"}, machine=Machine(1, 1))  # one a component: nothing simple is known
    check_room(FLUX, dtype=torch.bfloat16, machine=Machine(None, 64 * GB))


def test_an_update_needs_more_than_the_weights():
    machine = Machine(24 * GB, 64 * GB)
    config = LearnConfig(batch_size=4, num_inference_steps=2, guidance_scale=5.0)
    check_room(SDXL, dtype="bf16", machine=machine)
    with pytest.raises(EcoDiffError, match=r"needs for an update of the mask .* 1 sample at once .* would fit"):
        check_room(SDXL, dtype="bf16", config=config, machine=machine)


def test_offload_changes_nothing_on_a_cpu():
    if torch.cuda.is_available():
        pytest.skip("a device is there")
    pipe = ecodiff.load("openmoji-sdxl", offload=True)
    assert not getattr(pipe, "_all_hooks", None)
