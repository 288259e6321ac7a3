"""What a model card states: quality measured on fresh noise, and how the weights came about."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from string import Template

import torch

from .. import data, metrics, records
from ..experiments import judge_pictures
from ..generate import generate
from ..paths import data_dir

PROBE_PICTURES = 12  # real one-object scenes a class


def fit_probe() -> float:
    """Fit the object probe on real one-object scenes, keep it in ``data/models/openmoji-probe``, return its ceiling."""
    scenes = list(data.scenes("train", PROBE_PICTURES * len(data.object_names()), start=20_000_000, count=1))
    probe = metrics.ObjectProbe.fit(data.images(scenes), [scene.objects[0] for scene in scenes])
    folder = data_dir() / "models" / "openmoji-probe"
    folder.mkdir(parents=True, exist_ok=True)
    probe.save(folder / "probe.safetensors")
    text = _template("probe.md").substitute(
        pictures=len(scenes), ceiling=f"{100 * probe.ceiling:.1f}", objects=len(probe.names), commit=records.commit()
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    return probe.ceiling


@torch.no_grad()
def measure_quality(pipe, sampling: dict, prompts: int = 200) -> dict:
    """Numbers of the card: VAE PSNR in dB on 256 real scenes; share (%) of one-object prompts whose object the probe
    names and whose background is right, with 95 % intervals over prompts; the same on real scenes, the ceiling."""
    real = list(data.scenes("seen", 256, start=5_000_000))
    pixels = data.images(real)
    decoded = torch.cat(
        [pipe.vae.decode(pipe.vae.encode(x.float() / 127.5 - 1).latent_dist.mean).sample for x in pixels.split(32)]
    )
    rebuilt = ((decoded + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    scenes = list(data.scenes("seen", prompts, start=6_000_000, count=1))
    drawn = generate(pipe, [scene.caption for scene in scenes], range(7_000_000, 7_000_000 + prompts), **sampling)
    shares = judge_pictures(drawn, scenes)
    ceiling = judge_pictures(data.images(scenes), scenes)
    percent = lambda hits: _percent(metrics.bootstrap_interval([100.0 * hit for hit in hits]))  # noqa: E731
    return {
        "VAE PSNR (dB)": f"{metrics.psnr(rebuilt, pixels).mean().item():.2f}",
        "object named (%)": percent(shares["object"]),
        "background right (%)": percent(shares["colour"]),
        "object named, real scenes (%)": percent(ceiling["object"]),
        "background right, real scenes (%)": percent(ceiling["colour"]),
        "prompts": str(prompts),
        "sampling": f"{sampling['num_inference_steps']} steps, guidance {sampling['guidance_scale']}",
    }


def _percent(interval: metrics.Interval) -> str:
    return f"{interval.mean:.1f} (95 % interval {interval.low:.1f} to {interval.high:.1f})"


def _template(name: str) -> Template:
    return Template((resources.files(__package__) / "templates" / name).read_text(encoding="utf-8"))


def write_card(folder: Path, trained: dict, measured: dict) -> None:
    """Write ``README.md`` of a stored pipeline in the Hub's form."""
    recipe, log = trained["recipe"], trained["log"]
    rows = "\n".join(f"| {name} | {value} |" for name, value in measured.items())
    stages = "\n".join(
        f"- {stage}: {recipe[stage]['train']['steps']} steps of {recipe[stage]['train']['batch_size']} scenes, "
        f"{log[stage]['seconds'] / 60:.0f} minutes, final loss {log[stage]['loss']:.4f}"
        for stage in ("vae", "denoiser", "decoder")
    )
    text = _template("pipeline.md").substitute(
        {key: recipe[key] for key in ("id", "pipeline", "stands_for", "seed")},
        steps=recipe["sampling"]["num_inference_steps"],
        guidance=recipe["sampling"]["guidance_scale"],
        stages=stages,
        machine=", ".join(f"{name} {value}" for name, value in log["machine"].items()),
        commit=log["commit"],
        rows=rows,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
