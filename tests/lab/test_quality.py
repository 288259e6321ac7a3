"""How the measures behave, on features and pictures with a known answer; no network runs here."""

from types import SimpleNamespace

import pytest
import torch

from ecodiff import metrics
from ecodiff.errors import EcoDiffError
from ecodiff.lab import openmoji
from ecodiff.lab.openmoji import judges
from ecodiff.lab.studies import metric_checks
from ecodiff.lab.studies.cell import Cell
from ecodiff.lab.studies.protocol import Protocol


class Probe:
    """Names the object rightly for every second picture."""

    weight = torch.zeros(2, 2)

    def correct(self, features, labels):
        assert len(features) == len(labels)
        return torch.arange(len(labels)) % 2 == 0


@pytest.fixture(autouse=True)
def without_networks(monkeypatch):
    monkeypatch.setenv("ECODIFF_RECORDS", "off")
    monkeypatch.setattr(metric_checks, "probe", Probe)
    monkeypatch.setattr(judges, "_known_features", {})
    monkeypatch.setattr(metric_checks, "describe_cell", lambda model, cell: {"judge": None})
    monkeypatch.setattr(metric_checks, "Identity", SimpleNamespace(of=lambda pipe: None))
    thumbnails = lambda images, progress: torch.nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)  # noqa: E731
    monkeypatch.setattr(metrics, "inception_features", thumbnails)


def test_changes_are_what_they_say():
    scenes = list(openmoji.scenes("seen", 6, count=1)) + list(openmoji.scenes("seen", 2, count=2))
    found = metric_checks.changed(scenes)
    real = openmoji.images(scenes)
    assert torch.equal(found["nothing"], real)
    assert all(x.shape == real.shape and x.dtype == torch.uint8 for x in found.values())
    assert torch.equal(found["moved by 3 pixels"][..., 3:], real[..., :-3])
    expected = [scene.colour for scene in scenes]
    assert openmoji.background_correct(found["no object"], expected, openmoji.COLOURS).all()
    assert not openmoji.background_correct(found["another background"], expected, openmoji.COLOURS).any()
    assert (found["no object"].flatten(2).amax(2) == found["no object"].flatten(2).amin(2)).all()
    for change in list(found)[1:]:
        assert (metrics.ssim(found[change], real) < 0.999).all(), change
    assert all(torch.equal(x, found[change]) for change, x in metric_checks.changed(scenes).items())


def test_features_of_real_scenes_are_computed_once(monkeypatch):
    scenes = list(openmoji.scenes("seen", 8, count=1))
    first = judges.real_features(scenes[:5])
    seen = []
    compute = metrics.inception_features
    monkeypatch.setattr(metrics, "inception_features", lambda x, progress: seen.append(len(x)) or compute(x, progress))
    more = judges.real_features(scenes)
    assert seen == [3] and torch.equal(more[:5], first)
    assert torch.equal(judges.real_features(scenes[:4][::-1]), first[:4].flip(0)) and seen == [3]
    assert torch.equal(more, compute(openmoji.images(scenes), False))


def test_between_halves_fid_is_biased_and_kid_is_not(monkeypatch):
    features = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(metric_checks, "real_features", lambda scenes: features[: len(scenes)])
    row = metric_checks.halves(400, [25, 50, 100], draws=20)["values"]
    fid, kid = ({n: torch.tensor(v) for n, v in row[name].items()} for name in ("fid", "kid"))
    assert list(fid) == list(kid) == ["25", "50", "100"] and len(row["object"]) == 400
    assert fid["25"].min() > fid["50"].max() and fid["50"].min() > fid["100"].max() > 1
    for n in kid:
        assert kid[n].min() < 0 < kid[n].max() and kid[n].mean().abs() < 2 * kid[n].std()
    with pytest.raises(EcoDiffError, match="at most 200"):
        metric_checks.halves(400, [201], draws=2)


@pytest.fixture
def drawn(monkeypatch):
    """A pipeline that draws the real scenes, after pruning others, and with other noise real scenes that are darker."""

    def draw(pipe, scenes, seed, protocol):
        images = openmoji.images(scenes if pipe == "whole" else scenes[1:] + scenes[:1])
        return (images.int() - (seed > 0) * 10).clamp(0).to(torch.uint8)

    monkeypatch.setattr(metric_checks, "draw", draw)
    monkeypatch.setattr(metric_checks, "smaller_model", lambda pipe, cell, recompute: "pruned")
    monkeypatch.setattr(metric_checks, "through_vae", lambda vae, images: images)
    return type("Pipe", (str,), {"vae": None})("whole"), Cell("random", protocol=Protocol(pictures=6))


def test_known_sets(drawn):
    row = metric_checks.known_sets(*drawn)["values"]
    assert set(row) == {"real", "vae", "bicubic", "original", "again", "pruned"}
    assert row["vae"]["ssim"] == pytest.approx([1] * 6, abs=2e-3)  # single precision
    assert row["original"]["fid"] == pytest.approx(0, abs=1e-4)
    assert row["pruned"]["fid"] == pytest.approx(0, abs=1e-4)  # the same set of pictures, under other captions
    assert max(row["pruned"]["ssim"]) < 0.9 and sum(row["pruned"]["colour"]) < 6 == sum(row["real"]["colour"])
    assert 0 < row["again"]["fid"] and 0.9 < min(row["again"]["ssim"]) < max(row["again"]["ssim"]) < 1
    assert row["real"]["fid"] > 1 and row["original"]["fid_others"] == pytest.approx(row["real"]["fid"], rel=1e-5)
    assert row["original"]["kid"] < row["original"]["kid_others"]  # a set's own scenes are not independent of it
    assert row["real"]["object"] == [1, 0] * 3


@pytest.mark.slow
def test_judged_sets(drawn, monkeypatch):
    monkeypatch.setattr(metric_checks, "judge", lambda: None)
    assert metric_checks.judged_sets(*drawn) is None
    from ecodiff.lab.zoo import build, recipes

    recipe = recipes.load_recipe("openmoji-clip", smoke=True)
    recipe["tokenizer"]["captions"] = 50
    tiny = build.build(recipe)
    monkeypatch.setattr(metric_checks, "judge", lambda: tiny)
    row = metric_checks.judged_sets(*drawn)["values"]
    assert set(row) == {"real", "real, others' captions", "original", "again", "pruned"}
    assert row["original"] == row["real"] != row["pruned"]
    for scores in row.values():
        assert scores["score"] == pytest.approx(max(0, sum(scores["each"]) / 6), abs=0.01)


def test_resized_keeps_flat_pictures():
    flat = torch.full((1, 3, 64, 64), 99, dtype=torch.uint8)
    assert (metric_checks.resized(flat, 96) == 99).all() and metric_checks.resized(flat, 96).shape == (1, 3, 96, 96)
