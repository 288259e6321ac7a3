"""2:4 masks: two of every four, the largest; the estimator's gradient; the original stays whole."""

import pytest
import torch
from tiny import latents, tiny_flux, tiny_sd
from torch import nn

from ecodiff.errors import EcoDiffError
from ecodiff.pipelines.parts import denoiser
from ecodiff.retraining.two_four import layers_2_4, mask_2_4, sparsify, trainable


def test_two_of_every_four_and_the_largest():
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0]])
    assert mask_2_4(weight).tolist() == [[False, True, False, True, True, True, False, False]]
    for shape in ((6, 8), (3, 12, 3, 3)):
        weight = torch.randn(shape)
        mask = mask_2_4(weight)
        groups = mask.movedim(1, -1).reshape(-1, 4)
        assert (groups.sum(1) == 2).all()
        values = weight.abs().movedim(1, -1).reshape(-1, 4)
        kept = values[groups].view(-1, 2)
        assert (kept.min(1).values >= values[~groups].view(-1, 2).max(1).values).all()


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_sd, tiny_flux])
def test_a_sparse_pipeline_draws_and_the_original_is_whole(make):
    pipe = make()
    before = latents(pipe)
    sparse = sparsify(pipe)
    for name, layer in layers_2_4(denoiser(sparse)).items():
        original = denoiser(pipe).get_submodule(name).weight
        assert torch.equal(layer.weight, original * mask_2_4(original))
    assert len(layers_2_4(denoiser(sparse))) > 10
    assert torch.isfinite(latents(sparse)).all() and not torch.equal(latents(sparse), before)
    assert torch.equal(latents(pipe), before)
    assert sparse.vae is pipe.vae


def test_gradient_of_the_straight_through_estimator():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 3))
    weight = model[0].weight.detach().clone()
    mask = mask_2_4(weight)
    x = torch.randn(5, 8)
    with trainable(model, pull=0.5):
        assert torch.equal(model[0].weight, weight * mask)
        model(x).square().sum().backward()
        gradient = next(p for p in model.parameters() if p.shape == (3, 8)).grad
    y = x @ (weight * mask).T + model[0].bias
    torch.testing.assert_close(gradient, (2 * y).T.detach() @ x + 0.5 * weight * ~mask)
    assert torch.equal(model[0].weight, weight * mask)


def test_training_can_bring_a_masked_weight_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 1.0, 0.1, 0.1]])
    x = torch.randn(64, 4)
    target = x @ torch.tensor([0.0, 0.0, 2.0, 2.0])
    with trainable(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(200):
            optimizer.zero_grad()
            (model(x)[:, 0] - target).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), torch.tensor([[0.0, 0.0, 2.0, 2.0]]), atol=0.05, rtol=0)


def test_bad_input_is_named():
    with pytest.raises(EcoDiffError, match="no groups of four input channels"):
        mask_2_4(torch.randn(3, 6))
    with pytest.raises(EcoDiffError, match="pull=-1 must be at least 0"), trainable(nn.Linear(4, 4), pull=-1):
        pass
