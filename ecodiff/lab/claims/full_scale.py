"""The commands that compute the paper's items on the published models, and what they need: hours and gigabytes.

Nothing here was run at that size. Operations and memory are counted from shapes (`ecodiff.cost`, recorded rows). Hours
are operations over the speed that recorded rows of one GPU show for SDXL with random weights, once for generating and
once for an update of a mask. FLUX and Stable Diffusion 2 are taken to run at the same operations a second, which is an
assumption. Loading, decoding and judging are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median

from ecodiff.errors import EcoDiffError
from ecodiff.lab import paper
from ecodiff.method import published as published_masks
from ecodiff.method.config import LearnConfig

from .cost import UPDATE_OF, update_on_gpu
from .items import ITEMS, Item
from .on_full_size import ONE, SD2_UPDATE, counted, measured

PROGRAM = "python -m ecodiff"
PROMPTS = "--prompts Validation_GCC-1.1.0-Validation.tsv"
EVALUATED = "--prompts captions_val2017.json"
UPDATES = 400  # of a mask, Tables 2 and 3
PASSES = 3  # of the denoiser in a checkpointed step of an update: forward, again, and backward (chapter on memory)


@dataclass(frozen=True)
class Model:
    """A published model, the presets of its counts, and how the paper runs it."""

    id: str
    short: str
    preset: str  # of `ecodiff.cost`
    settings: str  # of `learn`
    steps: int
    halves: int  # samples that the denoiser sees for one: guidance doubles them

    @property
    def forward(self) -> float:
        """Operations of one forward pass of one sample."""
        return self._count["flops_total"]

    @property
    def image(self) -> float:
        """Operations of one trajectory of one sample."""
        return self.steps * self.halves * self.forward

    @property
    def update_bytes(self) -> int:
        """Peak of an update with one sample at a time, its steps checkpointed, all components on the device."""
        return self._count["update"]

    @property
    def generate_bytes(self) -> int:
        """Peak of generating one image, all components on the device."""
        return self._count["generate"]

    @property
    def _count(self) -> dict:
        options = {"sd2": SD2_UPDATE[1], "sdxl": {"batch": 1, "guidance": 5.0, "steps": 50}}.get(self.preset, ONE)
        return _figures(self.preset, tuple(options.items()))


@cache
def _figures(preset: str, options: tuple) -> dict:
    """Operations of a forward pass and peaks in bytes, of a recorded count."""
    count = counted(preset, **dict(options))
    assert count is not None, "these presets may be counted"
    return {
        "flops_total": sum(count["flops"].values()),
        "update": count["update_peak"]["checkpointed"],
        "generate": count["inference_peak"]["all_on_device"],
    }


SDXL = Model("stabilityai/stable-diffusion-xl-base-1.0", "sdxl", "sdxl", "sdxl", 50, 2)
SD2 = Model("stabilityai/stable-diffusion-2-base", "sd2", "sd2", "sdxl", 50, 2)
SCHNELL = Model("black-forest-labs/FLUX.1-schnell", "schnell", "flux-schnell", "flux", 5, 1)
DEV = Model("black-forest-labs/FLUX.1-dev", "dev", "flux-schnell", "flux", 28, 1)


@dataclass(frozen=True)
class Run:
    """A command (without ``python -m ecodiff``), how often it runs with other values, and its operations and bytes."""

    command: str
    times: int = 1
    learning: float = 0.0  # operations at the speed of updates
    generating: float = 0.0  # operations at the speed of forward passes
    bytes: int = 0


def learn(model: Model, more: str = "", prompts: int = 100, times: int = 1) -> Run:
    """A mask, learned as the paper's settings say."""
    command = (
        f"learn {model.id} --preset {model.settings} {PROMPTS} --count {prompts} --dtype bf16 --micro-batch-size 1"
        f"{more} --out {model.short}.safetensors"
    )
    batch = int(paper.setting("table3" if model.settings == "sdxl" else "table2", "batch_size"))
    # The unmasked model runs once for each prompt, whose noise is the same in all updates.
    return Run(command, times, PASSES * UPDATES * batch * model.image, prompts * model.image, model.update_bytes)


def folder(model: Model, ratio: float) -> str:
    """The name of the smaller model's folder."""
    return f"{model.short}-{100 * ratio:.0f}"


def prune(model: Model, ratio: float, more: str = "", name: str | None = None) -> Run:
    """The smaller model, which is cut on the CPU in minutes."""
    name = name or folder(model, ratio)
    return Run(f"prune {model.id} --scores {model.short}.safetensors --ratio {ratio}{more} --dtype bf16 --out {name}")


def generate(model: Model, name: str) -> Run:
    """The images of the paper's evaluation by the original, or by a folder."""
    images = int(paper.claim("evaluation_pairs"))
    what = f"generate {name} {EVALUATED} --count {images} --steps {model.steps} --dtype bf16 --batch-size 1"
    work = images * model.image  # of the original: pruned models do less
    return Run(f"{what} --out {name.rpartition('/')[2]}-images", 1, 0.0, work, model.generate_bytes)


def evaluate(model: Model, name: str) -> Run:
    """FID, CLIP score and SSIM of both folders of images."""
    original = model.id.rpartition("/")[2]
    return Run(f"evaluate {name}-images {original}-images --fid --clip openai/clip-vit-base-patch16")


def quality(model: Model, ratios: Iterable[float], more: str = "") -> list[Run]:
    """One mask, cut at several ratios, each of which is judged beside the original."""
    runs = [learn(model), generate(model, model.id)]
    for ratio in ratios:
        name = folder(model, ratio)
        runs += [prune(model, ratio, more), generate(model, name), evaluate(model, name)]
    return runs


def varied(model: Model, option: str, values: Sequence, ratio: float = 0.2) -> list[Run]:
    """A mask and its images for each value of an option of `learn`; the command shows the first value."""
    name = folder(model, ratio)
    if option == "--count":
        masks = [learn(model, prompts=int(value)) for value in values]
    else:
        masks = [learn(model, f" {option} {values[0]}", times=len(values))]
    judged = (prune(model, ratio), generate(model, name), evaluate(model, name))
    return [*masks, generate(model, model.id), *(replace(run, times=len(values)) for run in judged)]


def retrained(ratios: Iterable[float]) -> list[Run]:
    """Pruned SDXL, then a LoRA on images of the original."""
    runs = quality(SDXL, ratios)
    pictures, steps = int(paper.claim("retraining_pictures")), int(paper.claim("retraining_steps"))
    images = f"generate {SDXL.id} {PROMPTS} --count {pictures} --dtype bf16 --batch-size 1 --out own"
    runs.append(Run(images, 1, 0.0, pictures * SDXL.image, SDXL.generate_bytes))
    for ratio in ratios:
        name = folder(SDXL, ratio)
        # One forward and one backward pass of one sample a step.
        command = f"retrain {name} --images own --steps {steps} --dtype bf16 --out {name}-retrained"
        runs.append(Run(command, 1, 2 * steps * SDXL.forward, 0.0, 0))
        runs += [generate(SDXL, f"{name}-retrained"), evaluate(SDXL, f"{name}-retrained")]
    return runs


def column(table: str, name: str) -> list:
    """The different values of a column of the paper's tables, in order."""
    return list(dict.fromkeys(row[name] for row in paper.table(table) if row[name]))


def commands(item: Item) -> list[Run]:
    """What computes an item at full scale; nothing where it needs no published model."""
    return _by_name().get(item.name, [])


@cache
def _by_name() -> dict[str, list[Run]]:
    table1 = [*quality(SDXL, (0.1, 0.2)), *quality(SCHNELL, (0.1, 0.15))]
    ratios = {"SDXL": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3), "FLUX": (0.05, 0.1, 0.15, 0.2)}
    # Folders of their own: images of another model would be refused.
    name = "sdxl-20-local"
    local = [prune(SDXL, 0.2, " --scope local", name), generate(SDXL, name), evaluate(SDXL, name)]
    return {
        "Table 1": table1,
        "Table 2": [learn(SCHNELL)],
        "Table 3": [learn(SDXL)],
        "Table 4": varied(SDXL, "--weight", column("table4", "beta")),
        "Table 5": varied(SDXL, "--count", column("table5", "size")),
        "Table 6": quality(SD2, (0.1, 0.2)),
        "Table 7": [generate(DEV, DEV.id), *quality(SCHNELL, (0.1, 0.15))],
        "Table 8": retrained((0.25, 0.3)),
        "Table 9": varied(SCHNELL, "--weight", column("table9", "beta"), 0.15),
        "Table 10": varied(SCHNELL, "--count", column("table10", "size"), 0.15),
        "Table 11": [*quality(SDXL, (0.2,), " --scope global"), *local],
        "Table 12": [learn(SD2), learn(SDXL), learn(SCHNELL)],
        "Figure 6": table1,
        "Figure 7": quality(SDXL, ratios["SDXL"]),
        "Figure 8": [learn(SDXL)],
        "Figure 9": [*quality(SDXL, ratios["SDXL"]), *quality(SCHNELL, ratios["FLUX"])],
        "Figure 11": retrained((0.25, 0.3)),
        "Figure 12": [*quality(SDXL, (0.2,), " --scope global"), *local],
        "Figure 13": varied(SDXL, "--kinds", ["attention", "feed_forward"]),
        "Figure 14": quality(SDXL, ratios["SDXL"]),
        "Figure 15": quality(SCHNELL, ratios["FLUX"]),
        "Algorithm 1": [learn(SDXL)],
        "Algorithm 2": [learn(SDXL)],
    }


@dataclass(frozen=True)
class Speed:
    """Operations a second of one device, from recorded rows of SDXL with random weights in bf16."""

    device: str
    generating: float
    learning: float

    @classmethod
    def recorded(cls) -> Speed:
        calls = measured("inference", on_gpu=True, model="sdxl")
        update = update_on_gpu("SDXL")
        if not calls or update is None:
            raise EcoDiffError("The page of full-scale commands needs the recorded rows of SDXL on a GPU.")
        rates = []
        for row in calls:
            operations = row["values"]["flops"]["original"]["total"]
            rates.append(operations / row["values"]["variants"]["original"]["seconds"])
        seconds, device = update
        # One guided sample is two of the denoiser's; a step that is kept is not computed again.
        _, samples, steps = UPDATE_OF["SDXL"]
        return cls(device, median(rates), PASSES * steps * samples * SDXL.forward / seconds)

    def hours(self, run: Run) -> float:
        """Hours of a command in all its variations."""
        return run.times * (run.learning / self.learning + run.generating / self.generating) / 3600


def all_items() -> list[Item]:
    """The items that have a full scale, in the order of the paper."""
    return [item for group in ITEMS.values() for item in group if commands(item)]


def page() -> str:
    """The items, each with hours, gigabytes and commands (MyST). Items with the same commands stand together."""
    speed = Speed.recorded()
    together: dict[tuple[Run, ...], list[str]] = {}
    for item in all_items():
        together.setdefault(tuple(commands(item)), []).append(item.name)
    lines = ["| item | commands | hours | GB |", "|---|---:|---:|---:|"]
    blocks = []
    for runs, names in together.items():
        hours, most = sum(map(speed.hours, runs)), max(run.bytes for run in runs)
        title = ", ".join(names)
        lines.append(f"| {title} | {sum(run.times for run in runs)} | {hours:.1f} | {most / 1e9:.1f} |")
        blocks.append(f":::{{dropdown}} {title}\n```bash\n{_block(runs, speed)}\n```\n:::")
    rates = (
        f"Speeds of one {speed.device}, from recorded rows of SDXL: {speed.generating / 1e12:.0f} TFLOP a second "
        f"while generating, {speed.learning / 1e12:.0f} in updates of a mask."
    )
    return "\n".join([rates, "", *lines, "", *(f"{block}\n" for block in blocks)])


def _block(runs: Sequence[Run], speed: Speed) -> str:
    lines = []
    for run in runs:
        needs = []
        if run.times > 1:
            needs.append(f"{run.times} times, with other values")
        if speed.hours(run):
            needs.append(f"{speed.hours(run):.1f} h")
        if run.bytes:
            needs.append(f"{run.bytes / 1e9:.1f} GB")
        comment = f"  # {', '.join(needs)}" if needs else ""
        lines.append(f"{PROGRAM} {run.command}{comment}")
    return "\n".join(lines)


def own_model_costs(ratio: float = 0.2) -> str:
    """What the steps of pruning SDXL without and with learning need, as a table (MyST)."""
    speed = Speed.recorded()
    count = counted("sdxl", inner=False, ratio=ratio)
    assert count is not None, "the preset is one that may be counted"
    small = count["pruned"]
    published, updates = learn(SDXL), LearnConfig().updates
    mask = replace(published, learning=published.learning * updates / UPDATES)  # with a batch of four, as the page has
    whole, left = (each["parameters"]["total"] / 1e9 for each in (count, small))
    image = SDXL.image / speed.generating
    disk = (small["weights"] + small["text_encoders"] + small["vae"]) / 1e9
    on_device = [each["inference_peak"]["all_on_device"] / 1e9 for each in (count, small)]
    bf16, peak = small["weights"] / 1e9, mask.bytes / 1e9
    megabytes = (Path(published_masks.__file__).parent / "sdxl.safetensors").stat().st_size / 1e6
    dense = (count["weights"] + count["text_encoders"] + count["vae"]) / 1e9
    offloaded = small["inference_peak"]["offload"] / 1e9
    rows = [
        ("the weights", f"{dense:.1f} GB in bf16, twice as much in float32"),
        ("a published mask", f"{megabytes:.1f} MB, which come with the package"),
        ("a mask of your own", f"{updates} updates: {speed.hours(mask):.1f} h on one {speed.device}, {peak:.1f} GB"),
        ("prune", f"minutes on the CPU; {whole:.2f} B parameters of the denoiser become {left:.2f} B"),
        ("the smaller folder", f"{disk:.1f} GB of disk in bf16"),
        ("generate an image", f"about {image:.0f} s there; {on_device[1]:.1f} GB, the original {on_device[0]:.1f} GB"),
        ("generate with offload", f"{offloaded:.1f} GB"),
        ("quantised to int8", f"{left:.1f} GB for the denoiser's weights, which are {bf16:.1f} GB in bf16"),
    ]
    return "\n".join(["| step | what it needs |", "|---|---|", *(f"| {step} | {needs} |" for step, needs in rows)])
