"""What must also hold on a GPU, where kernels, generators and the allocator are others; skipped where there is none."""

from dataclasses import replace

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny import (
    QUICK,
    TINY,
    assert_removed_is_masked,
    latents,
    latents_and_gradient,
    quiet,
    random_mask,
    sized,
    tiny_sdxl,
)

from ecodiff.method.hooks import apply_gates
from ecodiff.pipelines.parts import denoiser
from ecodiff.pipelines.running import on_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (CUDA)"),
]


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    """Kernels whose sums have an order, so that equal work gives equal bits, and products in full fp32, not in TF32."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.allow_tf32
    cudnn.deterministic, cudnn.allow_tf32 = True, False
    yield
    cudnn.deterministic, cudnn.allow_tf32 = before


@pytest.mark.parametrize("model", TINY)
def test_checkpointing_is_exact(model):
    pipe = TINY[model]().to("cuda")
    plain, wanted = latents_and_gradient(pipe, checkpoint=False)
    assert wanted.abs().max() > 0
    for keep_last in (0, 1, 2):
        result, found = latents_and_gradient(pipe, keep_last=keep_last)
        assert torch.equal(result, plain)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6 * wanted.abs().max().item())


@pytest.mark.parametrize("model", TINY)
def test_learns_on_the_gpu_and_moves_back(model):
    pipe = TINY[model]()
    gates = quiet(pipe, config=replace(QUICK, updates=2, call=sized(pipe)))
    assert pipe.device.type == "cpu"
    assert all(value.device.type == "cpu" for value in gates.log_alpha.values())
    assert any((value != 3.0).any() for value in gates.log_alpha.values())


def test_a_run_goes_on_where_it_stopped(tmp_path):
    config = replace(QUICK, updates=4, target_open=None)
    whole = quiet(tiny_sdxl(), config=config)
    quiet(tiny_sdxl(), config=replace(config, updates=2), resume_dir=tmp_path)
    resumed = quiet(tiny_sdxl(), config=config, resume_dir=tmp_path)
    for name, value in whole.log_alpha.items():
        torch.testing.assert_close(resumed.log_alpha[name], value, rtol=1e-4, atol=1e-4)


def test_learns_in_bfloat16():
    pipe = tiny_sdxl().to(torch.bfloat16)
    gates = quiet(pipe)
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in gates.log_alpha.values())


def test_removed_is_masked_and_saved_is_loaded(tmp_path):
    pipe = tiny_sdxl().to("cuda")
    mask = random_mask(denoiser(pipe), ratio=0.3)
    pruned = assert_removed_is_masked(pipe, mask)
    with apply_gates(denoiser(pipe), mask):
        masked = latents(pipe)
    removed = latents(pruned)
    pruned.save_pretrained(tmp_path / "pruned")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "pruned").to("cuda")
    assert removed.is_cuda
    torch.testing.assert_close(removed, masked, rtol=1e-3, atol=1e-4)
    assert torch.equal(latents(loaded), removed)


def test_offloaded_pipelines_stay_offloaded():
    pipe = tiny_sdxl()
    pipe.enable_model_cpu_offload()
    with on_device(pipe, "here") as device:
        assert device.type == "cuda"
    gates = quiet(pipe, config=replace(QUICK, updates=1))
    assert next(denoiser(pipe).parameters()).device.type == "cpu"
    assert any((value != 3.0).any() for value in gates.log_alpha.values())
