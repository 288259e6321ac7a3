"""The nodes for ComfyUI, without ComfyUI: that they load the folder that others load, and give images in its form."""

import importlib.util
import sys
import types

import pytest
import torch
from tiny import random_mask, tiny_sd

import ecodiff
from ecodiff import EcoDiffError, prune
from ecodiff.storage.paths import root


@pytest.fixture(scope="module")
def nodes():
    spec = importlib.util.spec_from_file_location("comfyui_ecodiff", root() / "book" / "_extra" / "comfyui_ecodiff.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_pruned_folder_is_loaded_by_path_or_name_and_generates(nodes, tmp_path, monkeypatch):
    pipe = tiny_sd()
    small = prune(pipe, random_mask(pipe.unet))
    small.save_pretrained(tmp_path / "small")
    # ComfyUI has a module of this name, which says where its models lie.
    comfyui = types.ModuleType("folder_paths")
    comfyui.get_folder_paths = {"diffusers": [str(tmp_path / "elsewhere"), str(tmp_path)]}.__getitem__
    monkeypatch.setitem(sys.modules, "folder_paths", comfyui)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    load, generate = (nodes.NODE_CLASS_MAPPINGS[name] for name in ("EcoDiffLoad", "EcoDiffGenerate"))
    assert load.INPUT_TYPES()["required"].keys() == {"folder", "dtype"}
    for name in ("small", str(tmp_path / "small")):
        (loaded,) = getattr(load(), load.FUNCTION)(folder=name, dtype="fp32")
        assert all(torch.equal(value, loaded.unet.state_dict()[key]) for key, value in small.unet.state_dict().items())
    inputs = {"prompt": "a cat", "seed": 3, "width": 16, "height": 16, "steps": 2, "guidance": 2.0}
    assert {"pipeline", *inputs} == generate.INPUT_TYPES()["required"].keys()
    (image,) = getattr(generate(), generate.FUNCTION)(pipeline=loaded, **inputs)
    call = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 16, "width": 16}
    expected = ecodiff.generate(small, ["a cat"], [3], **call, progress=False)
    assert image.shape == (1, 16, 16, 3) and torch.equal((image * 255).round().byte().permute(0, 3, 1, 2), expected)
    with pytest.raises(EcoDiffError, match="no embedded pipeline"):
        getattr(load(), load.FUNCTION)(folder="nothing", dtype="fp32")
