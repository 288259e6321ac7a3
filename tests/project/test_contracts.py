"""What must stay when files move: the keys of recorded rows, and the folders and files that users have saved.

A row's key is a hash of its configuration, so every name and value in a configuration is a contract: change one and
hours of measuring are not found any more. A saved pipeline names the class ``ecodiff.Pruned…``, a file of gates names
its format. None of them names a module of ecodiff, and these tests hold it to that.

The keys in ``fixtures/golden_keys.json`` and the files in ``fixtures/saved`` were written before the files moved. They
must never be written again to make a test pass: where one fails, the code has to be mended.
"""

import hashlib
import json
from argparse import Namespace
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import diffusers
import matplotlib
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import ecodiff
from ecodiff.cost import presets
from ecodiff.lab import openmoji, studies
from ecodiff.lab.benchmarks import bits, command, full_size, generation
from ecodiff.lab.book import build
from ecodiff.lab.claims import cost as cost_claims
from ecodiff.lab.claims import memory, on_full_size
from ecodiff.lab.identities import identity
from ecodiff.lab.studies import measure, metric_checks, redrawn, redundancy
from ecodiff.lab.studies.cell import Cell, describe_cell
from ecodiff.lab.studies.plan import DEV, SDXL, WAN
from ecodiff.lab.studies.protocol import Protocol
from ecodiff.lab.studies.results import gates_file
from ecodiff.lab.studies.run import seeds_of
from ecodiff.method.gates import Gates
from ecodiff.method.hard_concrete import HardConcrete
from ecodiff.method.surgery import prune
from ecodiff.pipelines.contents import weights_hash
from ecodiff.pipelines.loading import load_once
from ecodiff.pipelines.parts import denoiser, with_denoiser
from ecodiff.storage import records
from ecodiff.storage.fingerprint import key
from ecodiff.storage.paths import data_dir, embedded, root

FIXTURES = Path(__file__).parents[1] / "fixtures"
GOLDEN = json.loads((FIXTURES / "golden_keys.json").read_text(encoding="utf-8"))
"""{file of ``data/results``: {what is measured: its key}}. Under "gates" there are names of files in the place of
keys."""
RESULTS = sorted(path.stem for path in (data_dir() / "results").glob("*.jsonl"))

ORPHANS: dict[str, dict[str, str]] = {}
"""{file of ``data/results``: {key: reason}} of rows that no code asks for any more and that are kept all the same.
There are none."""


# The measurements that rows are recorded of, by the code that records them. Each function returns {what is measured in
# words: key of its row}.


def keys_of_compare() -> dict[str, str]:
    """All cells of the plan of all embedded pipelines."""
    return {name: key(describe_cell(identity(cell.protocol.model), cell)) for name, cell in planned()}


def keys_of_bits() -> dict[str, str]:
    """All cells of the comparison of fewer units with fewer bits."""
    found = {}
    with asked() as keys:
        for row in bits.rows("openmoji-flux-schnell", 100):
            found[f"openmoji-flux-schnell, {row['config']['ratio']:.0%}, {row['config']['bits']} bits"] = keys[-1]
    return found


def keys_of_gates() -> dict[str, str]:
    """Names of the files in which the learned gates of the plan are kept."""
    found = {}
    for name, cell in planned():
        if cell.method.startswith("learned"):
            found[name] = gates_file(cell).stem
    return found


def planned():
    """Each cell of the plan as ("model, study, row, seed", cell)."""
    for model in embedded():
        for study, seeds in seeds_of((), model).items():
            for seed in range(seeds):
                for row, cell in studies.cells(study, model, seed).items():
                    yield f"{model}, {study}, {row}, seed {seed}", cell


def keys_of_removed_units() -> dict[str, str]:
    """Masks whose units the chapter on who keeps what counts by groups of sites."""
    found = {}
    for method in ("learned", "gauss-newton", "fisher", "diff-pruning", "taylor"):
        for study in ("main", "parameters"):
            cell = studies.cells(study, DEV)[f"{method}, 20%"]
            with asked() as keys:
                measure.removed_units(load_once(DEV), cell)
            found[f"{DEV}, {study}, {method}, 20%"] = only(keys)
    return found


def keys_of_spared() -> dict[str, str]:
    """The mask of that chapter that spares the large heads."""
    pipe, cell = load_once(DEV), studies.cells("parameters", DEV)["learned, 20%"]
    large = []
    with asked():
        for name in measure.removed_units(pipe, cell):
            if name.startswith("transformer_blocks.") and name.endswith(".attn"):
                large.append(name)
    with asked() as keys:
        measure.sparing(pipe, cell, large)
    return {f"{DEV}, parameters, learned, 20%, large heads spared": only(keys)}


def keys_of_quality() -> dict[str, str]:
    """The rows of the chapter on quality, with its default parameters."""
    asks = build.parameters(chapter("how_quality_is_measured"))
    pipe = load_once(asks["model"])
    protocol = Protocol.of(
        asks["model"], pictures=asks["set_size"], num_inference_steps=asks["draw_steps"], guidance_scale=2.0
    )
    cell = Cell(asks["removal"], asks["ratio"], asks["seed"], protocol)
    with asked() as keys:
        metric_checks.halves(asks["real_scenes"], asks["half_sizes"], asks["half_draws"], asks["seed"])
        metric_checks.known_sets(pipe, cell)
        metric_checks.judged_sets(pipe, cell)
    return dict(zip(("halves", "known sets", "judged sets"), keys, strict=True))


def of_images() -> list[str]:
    """The embedded pipelines that generate images."""
    return [model for model in embedded() if model != WAN]


def keys_of_redundancy() -> dict[str, str]:
    """Single removals of each embedded pipeline, as the models in detail ask for them."""
    asks = build.parameters(chapter("model_cards"))
    found = {}
    for model in of_images():
        with asked() as keys:
            redundancy.measure(
                load_once(model),
                Protocol.of(model),
                per_kind=asks["removed_per_kind"],
                prompts=asks["removal_prompts"],
            )
        found[model] = only(keys)
    return found


def keys_of_redrawn() -> dict[str, str]:
    """The gradients of the chapter on learning whose gates are drawn anew in recomputation."""
    asks = build.parameters(chapter("learning_a_mask"))
    pipe, protocol = load_once(asks["model"]), Protocol.of(asks["model"])
    captions = openmoji.prompts("train", asks["prompts"])
    found = {}
    for steps in (1, 2, asks["num_inference_steps"]):
        for start, delta in ((0.0, 0.5), (3.0, 0.5), (3.0, 0.0)):
            with asked() as keys:
                redrawn.cosines(
                    pipe,
                    captions,
                    steps=steps,
                    log_alpha=start,
                    delta=delta,
                    seeds=asks["cosine_seeds"],
                    guidance_scale=protocol.guidance_scale,
                    call=protocol.call,
                )
            found[f"{steps} steps, λ = {start:g}, δ = {delta:g}"] = only(keys)
    return found


def keys_of_mask_step() -> dict[str, str]:
    """Mask updates of the chapter on memory, whose own cell records them."""
    asks = build.parameters(chapter("memory_and_time"))
    names = {**asks, "pipe": load_once(asks["model"]), "torch": torch, "records": records}
    names |= {"weights_hash": weights_hash}
    with asked() as keys, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", threads(2))
        exec(code_with(chapter("memory_and_time"), 'name="mask_step"'), names)
    return {f"T = {steps}": found for steps, found in zip(asks["memory_steps"], keys, strict=True)}


def keys_of_cost() -> dict[str, str]:
    """What is counted of full-size models: by the claims, and by the calculator of the chapter on cost.

    A key names the versions of torch and diffusers that a row was counted with. They are set to those of the rows.
    """
    presets = ("sdxl", "flux-schnell")
    settings = [(preset, on_full_size.ONE) for preset in presets]
    settings += [on_full_size.SD2_UPDATE, *memory.UPDATES]
    settings += [cost_claims.published_mask(percent) for percent in (10, 20)]
    settings += [cost_claims.drawing("sdxl", 0.2), cost_claims.drawing("flux-schnell", 0.15)]
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_full_size, "version", counted_with)
        for preset, options in settings:
            with asked() as keys:
                on_full_size.counted(preset, **options)
            shown = {name: value for name, value in options.items() if name != "mask"}
            kept = sum(options.get("mask", {}).values())
            found[f"{preset}, {shown}, {kept} units"] = only(keys)
        patch.setattr("importlib.metadata.version", counted_with)
        names = build.parameters(chapter("what_it_costs"))
        with asked() as keys, matplotlib.rc_context():
            exec(code_with(chapter("what_it_costs"), "def counted("), names)
        for preset in names["present_presets"]:
            # Those without a row are counted by whoever runs the chapter first.
            with suppress(AssertionError), asked() as one:
                names["counted"](preset, ratio=0.2, inner=False)
            found |= {f"{preset}, a fifth of its units": key for key in one}
    for preset, one in zip(names["cost_presets"], keys, strict=True):
        found[f"{preset}, calculator"] = one
    return found


def counted_with(library: str) -> str:
    """The version of a library that the rows of ``cost`` were counted with."""
    return {"torch": "2.13.0", "diffusers": "0.42.1"}[library]


def keys_of_generation() -> dict[str, str]:
    """Seconds of drawing, on the machine that was measured."""
    options = Namespace(dtypes=list(generation.DTYPES), batch_sizes=[32, 128], pictures=512, recompute=False)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", threads(2))
        patch.setattr(records, "machine", two_cores)
        for model in of_images():
            with asked() as keys:
                rows = list(generation.rows(model, options))
            for row, one in zip(rows, keys, strict=True):
                c = row["config"]
                found[f"{model}, {c['pictures']} images, {c['batch_size']} at once, {c['dtype']}"] = one
    return found


def two_cores() -> dict:
    """The machine on which drawing was timed."""
    return {"cores": 2, "cpu": "AMD EPYC", "memory_gib": 24, "system": "Linux"}


def threads(number: int):
    """A function that stands for ``torch.get_num_threads`` where so many threads were at work."""

    def get_num_threads() -> int:
        return number

    return get_num_threads


@dataclass(frozen=True)
class Run:
    """A call of ``ecodiff/lab/benchmarks/full_size.py`` and the machine on which it ran."""

    model: str
    samples: int
    device: str
    dtype: torch.dtype
    threads: int
    turns: int
    fitting: int
    """So many steps' activations fit into the memory of the device; the variants of an update depend on it."""


GPU = "NVIDIA H200"
RUNS = (
    Run("sd2", 1, "cpu", torch.float32, 2, turns=1, fitting=5),
    Run("sd2", 1, "cpu", torch.float32, 2, turns=3, fitting=5),
    Run("sdxl", 1, "cpu", torch.bfloat16, 2, turns=2, fitting=1),
    Run("sd2", 1, GPU, torch.bfloat16, 16, turns=3, fitting=50),
    Run("sd2", 8, GPU, torch.bfloat16, 16, turns=9, fitting=50),
    Run("sdxl", 2, GPU, torch.bfloat16, 16, turns=2, fitting=10),
    Run("sdxl", 2, GPU, torch.bfloat16, 16, turns=9, fitting=10),
    Run("flux-dev", 1, GPU, torch.bfloat16, 16, turns=3, fitting=1),
)


def keys_of_full_size() -> dict[str, str]:
    """What the benchmark of full-size denoisers measures in its runs so far. The networks themselves are not built."""
    found = {}

    def record(config: dict, measured) -> None:
        told = {name: value for name, value in config.items() if name in ("T", "ratio", "round_to", "turns")}
        about = f"{config['model']}, {config['samples']} samples, {config['device']}, {config['what']}, {told}"
        found[about] = key(json.loads(json.dumps(config)))

    for run in RUNS:
        bench = object.__new__(full_size.Bench)
        bench.name, bench.samples, bench.dtype, bench.device = run.model, run.samples, run.dtype, run.device
        bench.size, bench.sites = presets.preset(run.model).size, {}
        bench.network = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1))
        bench.counted, bench.room = SimpleNamespace(update=SimpleNamespace(peak=0, held=1)), run.fitting - 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "get_num_threads", threads(run.threads))
            patch.setattr(full_size, "_device", str)
            patch.setattr(full_size, "make_mask", no_mask)
            full_size.saved_row(bench, record)
            full_size.workspace_row(bench, record)
            full_size.update_rows(bench, command.STEPS, run.turns, "both", record)
            full_size.inference_rows(bench, command.RATIOS, (1,), run.turns, "both", record)
            full_size.inference_rows(bench, (0.3,), full_size.MULTIPLES[1:], run.turns, "both", record)
    return found


def no_mask(*arguments, **options) -> dict:
    """In the place of ``make_mask``: a key depends on how a mask is made, not on the mask."""
    return {}


@contextmanager
def asked():
    """Inside, nothing is measured: ``records.measure`` gives the recorded row, and its key is added to this list.

    A measurement that no row has is an error.
    """
    keys = []

    def measure(config, function, *, name, recompute=False, folder=None) -> dict:
        row = records.find(config, name=name)
        assert row is not None, f"data/results/{name}.jsonl has no row of {json.dumps(config, default=str)[:300]}"
        keys.append(row["key"])
        return row | {"recorded": True}

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ECODIFF_RECORDS", raising=False)
        patch.setattr(records, "measure", measure)
        yield keys


def only(keys: list[str]) -> str:
    """The one key of a list of one."""
    (found,) = keys
    return found


def chapter(name: str) -> Path:
    """The source of the chapter whose file has this name after its number."""
    (source,) = (root() / "notebooks").glob(f"[0-9][0-9]_{name}.md")
    return source


def code_with(source: Path, text: str) -> str:
    """The code of the one cell of a chapter that has this text."""
    cells = [cell.source for cell in build.read(source).cells if cell.cell_type == "code"]
    (found,) = [code for code in cells if text in code]
    return found


KEYS_OF = {
    "bits": keys_of_bits,
    "compare": keys_of_compare,
    "cost": keys_of_cost,
    "full_size": keys_of_full_size,
    "gates": keys_of_gates,
    "generation": keys_of_generation,
    "mask_step": keys_of_mask_step,
    "quality": keys_of_quality,
    "redrawn": keys_of_redrawn,
    "redundancy": keys_of_redundancy,
    "removed_units": keys_of_removed_units,
    "spared": keys_of_spared,
}


@pytest.fixture(scope="module")
def keys_of():
    """A function from a file of ``data/results`` to {what is measured: key}; each file is worked out once."""
    known = {}

    def look_up(name: str) -> dict[str, str]:
        if name not in known:
            known[name] = KEYS_OF[name]()
        return known[name]

    return look_up


def test_every_file_of_results_is_asked_for_by_code_that_is_known_here():
    assert set(RESULTS) | {"gates"} == set(KEYS_OF) == set(GOLDEN)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_a_measurement_has_the_key_that_it_had_before_files_moved(name, keys_of):
    keys = keys_of(name)
    for measured, golden in GOLDEN[name].items():
        assert keys[measured] == golden, f"{name}: the configuration of {measured!r} is not what it was"


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_a_golden_key_is_that_of_a_recorded_row(name):
    if name == "gates":
        recorded = kept_gates()
    else:
        recorded = {row["key"] for row in records.rows(name)}
    assert set(GOLDEN[name].values()) <= recorded


@pytest.mark.slow
@pytest.mark.parametrize("name", RESULTS)
def test_every_recorded_row_is_asked_for_by_the_plan_or_is_a_known_orphan(name, keys_of):
    recorded = {row["key"]: row["config"] for row in records.rows(name)}
    left = set(recorded) - set(keys_of(name).values())
    unknown = sorted(left - set(ORPHANS.get(name, {})))
    shown = [json.dumps(recorded[found], ensure_ascii=False)[:500] for found in unknown]
    assert not shown, f"{len(shown)} of {len(recorded)} rows are not found any more, such as {shown[0]}"


def test_every_known_orphan_is_a_row_that_nothing_asks_for(keys_of):
    for name, reasons in ORPHANS.items():
        recorded = {row["key"] for row in records.rows(name)}
        assert set(reasons) <= recorded - set(keys_of(name).values())


def test_every_file_of_gates_is_that_of_a_planned_mask(keys_of):
    assert kept_gates() <= set(keys_of("gates").values())


def kept_gates() -> set[str]:
    """Names of the files of learned gates, without their ending."""
    return {path.stem for path in (data_dir() / "results" / "gates").glob("*.safetensors")}


def test_recorded_gates_load_for_the_model_that_they_were_learned_on():
    for model in (SDXL, DEV):
        name = GOLDEN["gates"][f"{model}, main, learned, 20%, seed 0"]
        gates = Gates.load(data_dir() / "results" / "gates" / f"{name}.safetensors", denoiser(load_once(model)))
        cell = studies.cells("main", model)["learned, 20%"]
        assert gates.distribution == cell.config.distribution and len(gates.history) == cell.config.updates


# Folders and files that were saved before the move. `fixtures/make.py` says what they are. It is a record of how they
# were made and is not imported here, so that nothing is made anew by mistake.

SAVED = FIXTURES / "saved"
RATIO = {"sdxl": 0.3, "flux": 0.6}
SHA256 = "92579b0c1a4d8250b0a91ce49c76d1cfb3acb5fd0f04aeddb373cc00363cbebb"


def drawn(pipe, output_type: str) -> torch.Tensor:
    """What a pipeline draws for one prompt in two steps, from the noise of a fixed seed: "latent", or "pt" (images)."""
    pipe.set_progress_bar_config(disable=True)
    settings = {"prompt": "a red apple", "num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16}
    if hasattr(pipe, "transformer"):
        settings["max_sequence_length"] = 12
    with torch.no_grad():
        return pipe(**settings, generator=torch.Generator().manual_seed(0), output_type=output_type).images


def load_plainly(folder: Path):
    """A pipeline as a user of diffusers loads it, who has imported ecodiff."""
    return diffusers.DiffusionPipeline.from_pretrained(folder)


def dense_network(name: str, pruned: torch.nn.Module) -> torch.nn.Module:
    """The denoiser before it was pruned: the weights that surgery changed are in a file, the others in the pruned
    one."""
    cls = getattr(diffusers, type(pruned).__name__.removeprefix("Pruned"))
    config = {entry: value for entry, value in pruned.config.items() if entry != "pruned_units"}
    network = cls.from_config(config)
    before = load_file(SAVED / name / "dense.safetensors")
    state = {part: value for part, value in pruned.state_dict().items() if part in network.state_dict()}
    network.load_state_dict({**state, **before})
    return network.eval()


@pytest.fixture(scope="module", params=sorted(RATIO))
def saved(request):
    """One of the two saved pipelines: its name, the pipeline as diffusers loads it, its denoiser before it was pruned,
    and what was stored of it {name: tensor}."""
    name = request.param
    pipe = load_plainly(SAVED / name / "pipeline")
    expected = load_file(SAVED / name / "expected.safetensors")
    return SimpleNamespace(name=name, pipe=pipe, dense=dense_network(name, denoiser(pipe)), expected=expected)


def stored(saved, kind: str) -> dict[str, torch.Tensor]:
    """What was stored of each site: its "mask" or its "gate"."""
    start = f"{kind}/"
    return {name.removeprefix(start): value for name, value in saved.expected.items() if name.startswith(start)}


def test_the_saved_files_are_those_that_were_saved_before_files_moved():
    total = hashlib.sha256()
    for path in sorted(path for path in SAVED.rglob("*") if path.is_file()):
        total.update(path.relative_to(SAVED).as_posix().encode() + b"\n" + path.read_bytes())
    assert total.hexdigest() == SHA256


@pytest.mark.slow
@pytest.mark.parametrize("loader", [load_plainly, ecodiff.load])
def test_a_pipeline_that_was_pruned_and_saved_before_draws_what_it_drew(saved, loader):
    pipe = loader(SAVED / saved.name / "pipeline")
    # To a tolerance, since another processor rounds otherwise.
    torch.testing.assert_close(drawn(pipe, "latent"), saved.expected["latents"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn(pipe, "pt"), saved.expected["images"], rtol=1e-4, atol=1e-4)


def test_a_saved_denoiser_has_the_hash_that_recorded_rows_have(saved):
    """Layers without units had tensors without entries, which hashes of weights count."""
    (folder,) = [path for path in (SAVED / saved.name / "pipeline").iterdir() if path.name in ("unet", "transformer")]
    state = load_file(next(folder.glob("*.safetensors")))
    assert any(value.numel() == 0 for value in state.values())
    as_saved = hashlib.sha256()
    for name, value in sorted(state.items()):
        as_saved.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode() + value.numpy().tobytes())
    assert weights_hash(denoiser(saved.pipe)) == as_saved.hexdigest()
    assert all(parameter.numel() for parameter in denoiser(saved.pipe).parameters())


def test_a_saved_pipeline_knows_what_its_sites_kept(saved):
    network = denoiser(saved.pipe)
    assert type(network) is getattr(ecodiff, type(network).__name__)
    kept = {name: int(keep.sum()) for name, keep in stored(saved, "mask").items() if not keep.all()}
    assert network.config["pruned_units"] == kept and 0 in kept.values()


def test_pruning_the_same_weights_again_gives_the_saved_pipeline_bit_for_bit(saved):
    dense = with_denoiser(saved.pipe, saved.dense)
    again = prune(dense, stored(saved, "mask"))
    before, now = denoiser(saved.pipe).state_dict(), denoiser(again).state_dict()
    assert before.keys() == now.keys()
    for name, value in before.items():
        assert torch.equal(value, now[name]), name
    assert torch.equal(drawn(again, "latent"), drawn(saved.pipe, "latent"))
    assert not torch.allclose(drawn(dense, "latent"), drawn(saved.pipe, "latent"), atol=0.01)


def test_a_file_of_gates_that_was_saved_before_gives_the_same_gates_and_mask(saved):
    gates = Gates.load(SAVED / saved.name / "gates.safetensors", saved.dense)
    assert gates.distribution == HardConcrete(delta=0.0) and gates.history == [{"update": 1, "loss": 0.5}]
    mask, expected = gates.mask(RATIO[saved.name]), stored(saved, "mask")
    assert mask.keys() == expected.keys()
    for name, keep in mask.items():
        assert torch.equal(keep, expected[name]), name
    torch.testing.assert_close(gates.deterministic(), stored(saved, "gate"), rtol=1e-5, atol=1e-6)


def test_gates_saved_today_hold_what_the_file_that_was_saved_before_holds(saved, tmp_path):
    file = SAVED / saved.name / "gates.safetensors"
    Gates.load(file, saved.dense).save(tmp_path / "gates.safetensors")
    with safe_open(file, "pt") as before, safe_open(tmp_path / "gates.safetensors", "pt") as now:
        assert before.metadata() == now.metadata() and before.keys() == now.keys()
        for name in before.keys():
            assert torch.equal(before.get_tensor(name), now.get_tensor(name)), name
