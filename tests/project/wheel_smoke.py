"""Prune a pipeline by an installed wheel alone; run by `test_wheel.py`, and by hand in an environment of its own:

python -m hatchling build -t wheel -d dist && pip install dist/*.whl && python tests/project/wheel_smoke.py
"""

import importlib
import importlib.util
import pkgutil
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

sys.path[0] = str(Path(__file__).parents[1])  # for the tiny pipelines; the repository itself must not be found

from tiny import PROMPTS, latents, tiny_sdxl  # noqa: E402

import ecodiff  # noqa: E402
from ecodiff.__main__ import commands, main  # noqa: E402

assert importlib.util.find_spec("ecodiff.lab") is None, "a wheel has no lab"
for module in pkgutil.walk_packages(ecodiff.__path__, "ecodiff."):
    if module.name != "ecodiff.__main__":
        importlib.import_module(module.name)

pipe = tiny_sdxl()
config = ecodiff.LearnConfig(
    updates=2, batch_size=1, num_inference_steps=2, guidance_scale=3.0, call={"height": 16, "width": 16}
)
gates = ecodiff.learn(pipe, PROMPTS[:2], config, progress=False)
small = ecodiff.prune(pipe, gates.mask(ratio=0.3))
dense, pruned = (sum(p.numel() for p in ecodiff.denoiser(each).parameters()) for each in (pipe, small))
assert pruned < dense
with tempfile.TemporaryDirectory() as folder:
    small.save_pretrained(folder)
    assert torch.equal(latents(small), latents(ecodiff.load(folder)))
    assert (latents(small) - latents(DiffusionPipeline.from_pretrained(folder))).abs().max() < 1e-5

assert {"learn", "prune", "cost"} <= commands().keys() and "study" not in commands()
assert main(["cost", "sdxl", "--ratio", "0.2"]) == 0
print(f"pruned from {dense} to {pruned} parameters by {ecodiff.__file__}")
