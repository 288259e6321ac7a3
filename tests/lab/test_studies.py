"""Studies: what each needs, and that what is recorded is read, missing is found, and a wrong row is noticed."""

import json
import re
import statistics
from dataclasses import replace

import pytest
import torch
from tiny import latents, tiny_sd

from ecodiff.__main__ import main
from ecodiff.cost.counting import cost
from ecodiff.errors import EcoDiffError
from ecodiff.lab import studies
from ecodiff.lab.claims.on_embedded import HUB
from ecodiff.lab.studies import cell as cell_module
from ecodiff.lab.studies import images, measure, plan, protocol, results, run
from ecodiff.lab.studies.cell import Cell, describe_cell, sampling_of
from ecodiff.lab.studies.protocol import Protocol
from ecodiff.method.config import LearnConfig
from ecodiff.method.hooks import apply_gates
from ecodiff.method.surgery import prune
from ecodiff.metrics import intervals
from ecodiff.pipelines.identity import Identity
from ecodiff.retraining.config import RetrainConfig
from ecodiff.storage import cache, records

CALL = {"height": 16, "width": 16}
SMALL = Protocol(model="tiny", pictures=3, num_inference_steps=1, guidance_scale=1.0, call=CALL, features=False)
CONFIG = LearnConfig(updates=1, batch_size=1, num_inference_steps=1, guidance_scale=1.0, call=CALL)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Records, gates and pictures in an empty folder."""
    for module in (records, results, protocol, cache):
        monkeypatch.setattr(module, "data_dir", lambda: tmp_path)
    measure.learned_here.clear()
    return tmp_path


def only(monkeypatch, study):
    """There is no other study, and this one is called "toy"."""
    for module in (studies, plan):
        monkeypatch.setattr(module, "STUDIES", {"toy": study})


@pytest.fixture
def toy(store, monkeypatch):
    """A pipeline and a study "toy" of it with three rows."""
    rows = {
        "original": Cell("original", protocol=SMALL, config=CONFIG, prompts=2),
        "random": Cell("random", 0.5, protocol=SMALL, config=CONFIG, prompts=2),
        "learned": Cell("learned", 0.5, protocol=SMALL, config=CONFIG, prompts=2),
    }
    study = studies.Study("A toy", "no table", lambda model: rows, varies=("method", "ratio"), reference=("original",))
    only(monkeypatch, study)
    pipe = tiny_sd()
    for module in (results, run, cell_module):
        monkeypatch.setattr(module, "identity", lambda model: Identity.of(pipe))
    monkeypatch.setattr(measure, "load_once", lambda model: pipe)
    return pipe


@pytest.mark.parametrize("study", list(plan.STUDIES))
@pytest.mark.parametrize("model", ["openmoji-sdxl", "openmoji-flux-schnell", "somebody/model"])
def test_a_study_has_rows_that_differ_and_share_what_they_do_not_vary(study, model):
    rows = studies.cells(study, model, seed=2)
    assert all(cell.seed == 2 and cell.protocol.model == model for cell in rows.values())
    assert len({json.dumps(str(cell)) for cell in rows.values()}) == len(rows)  # no row stands twice
    steps = {cell.protocol.num_inference_steps for cell in rows.values()}
    assert len(steps) == 1


@pytest.mark.parametrize(
    ("rows", "study", "message"),
    [
        ({"a": {}, "b": {}}, {}, "row 'b' is the same cell as 'a'"),
        ({"a": {}, "b": {"seed": 1}}, {}, "differs from 'a' in seed, which the study holds fixed"),
        ({"a": {}, "b": {"delta": 0.1}}, {}, "row 'b' cannot show anything: λ starts at 3, above 0.408"),
        ({"a": {}, "b": {"delta": 0.1, "log_alpha_start": 0.0}}, {}, "differs from 'a' in config.log_alpha_start"),
        ({"a": {"weight": 0.0}}, {}, "row 'a' cannot show anything: weight"),
        ({"a": {"log_alpha_start": -8.0, "delta": 0.5, "regulariser": "l1"}}, {}, "every gate is 0 for any noise"),
        ({"a": {"log_alpha_start": 0.0, "regulariser": "l1"}}, {}, "has no slope"),
        ({"a": {}, "b": {"delta": 0.1}}, {"dead": {"b": "a reason"}}, None),
        ({"a": {}, "b": {"delta": 0.1}, "c": {"delta": 0.1}}, {"dead": dict.fromkeys("bc", "?"), "against": {"c": "b"}},
         "row 'c' is the same cell as 'b'"),
        ({"a": {"regulariser": "l1"}, "b": {"delta": 0.1, "regulariser": "l1"}}, {}, None),
    ],
)  # fmt: skip
def test_a_row_that_does_not_test_what_its_study_says_is_refused(rows, study, message):
    def cell(seed=0, **settings):
        return Cell("learned", config=replace(CONFIG, **settings), seed=seed)

    study = studies.Study("A toy", "", lambda m: {}, varies=("config.delta",), reference=("a",), **study)
    made = {name: cell(**settings) for name, settings in rows.items()}
    if message is None:
        studies.check(study, made)
        return
    with pytest.raises(EcoDiffError, match=re.escape(message)):
        studies.check(study, made)


@pytest.mark.parametrize("model", [*studies.MAIN, "somebody/model", "black-forest-labs/FLUX.1-schnell"])
@pytest.mark.parametrize("name", list(plan.STUDIES))
def test_each_row_varies_what_its_study_says_and_is_alive_where_learning_starts(name, model):
    study = plan.STUDIES[name]
    rows = study.rows(model)
    studies.check(study, rows)
    assert any(reference in rows for reference in study.reference)
    assert set(study.dead) <= set(rows) and set(study.against) <= set(rows)
    for row, cell in rows.items():
        reference = study.reference_of(row, rows)
        if reference is not None:
            assert set(studies.changed(cell, rows[reference])) <= set(study.varies)


def test_a_gradient_that_is_said_to_be_zero_is_zero_and_others_are_not():
    """What ``zero_at_start`` says, against gradients of both parts of the loss."""
    dead = ((0.5, 3.0, "l0"), (0.1, 3.0, "l0"), (0.1, 5.0, "l1"), (0.5, -4.0, "l0"), (0.0, 0.0, "l1"))
    alive = ((0.5, 3.0, "l1"), (0.0, 5.0, "l0"), (0.1, 0.2, "l0"))
    for delta, start, regulariser in (*dead, *alive):
        config = replace(CONFIG, delta=delta, log_alpha_start=start, regulariser=regulariser)
        value = torch.full((4001,), start, requires_grad=True)
        gates = config.distribution.sample(value, torch.linspace(1e-6, 1 - 1e-6, 4001))
        by_gates = torch.autograd.grad(gates.sum(), value)[0].abs().max().item()
        price = config.distribution.prob_open(value) if regulariser == "l0" else value.abs()
        by_price = torch.autograd.grad(price.sum(), value)[0].abs().max().item()
        assert (min(by_gates, by_price) == 0) == bool(config.zero_at_start()), config


def test_redrawn_gates_are_redrawn_in_every_step():
    """As in the published loop: a step whose activations are kept would have the exact gradient."""
    for model in (studies.SDXL, studies.DEV):
        rows = plan.STUDIES["choices"].rows(model)
        for name in ("gates drawn anew when recomputing", "as the published code"):
            assert rows[name].config.recompute == "redraw" and rows[name].config.keep_last == 0


@pytest.mark.parametrize("model", [studies.SDXL, studies.DEV])
def test_l1_has_the_beta_that_is_best_on_captions_of_no_table(model):
    """Read from the rows that are recorded, so that a new measurement cannot leave an old choice behind."""
    if not records.enabled():
        pytest.skip("ECODIFF_RECORDS=off")
    found = studies.recorded("l1", model, seeds=1)
    means = {name: statistics.mean(cells[0]["ssim"]) for name, cells in found.items() if name.startswith("L1")}
    assert len(means) == len(plan.L1_BETAS)
    assert max(means, key=means.get) == f"L1, β = {studies.tuned_l1(model):g}"
    for name in ("main", "pairs", "choices"):
        assert all(cell.protocol.split != "train" for cell in studies.cells(name, model).values())
    assert all(cell.protocol.split == "train" for cell in studies.cells("l1", model).values())


def test_further_seeds_can_have_fewer_rows_and_no_inception(toy, monkeypatch):
    study = replace(plan.STUDIES["toy"], plan={"tiny": 3}, further={"tiny": ("learned",)})
    only(monkeypatch, study)
    assert list(studies.cells("toy", "tiny")) == ["original", "random", "learned"]
    later = studies.cells("toy", "tiny", 1)
    assert list(later) == ["learned"] and later["learned"].seed == 1 and not later["learned"].protocol.features
    todo = [(row, cell.seed) for _, row, cell in run.missing({"toy": 3}, "tiny")]
    assert todo[3:] == [("learned", 1), ("learned", 2)]


def test_two_rows_are_compared_in_both_measures_and_losses_are_said():
    rows = {
        "learned": [{"ssim": [0.9] * 100, "facts": [1] * 60 + [0] * 40}],
        "fisher": [{"ssim": [0.8] * 100, "facts": [1] * 80 + [0] * 20}],
        "old": [{"ssim": [0.8] * 100}],
    }
    assert studies.in_words(rows, "learned") == "less: fisher (-0.100), old (-0.100)"
    assert studies.in_words(rows, "learned", "facts") == "more: fisher (+20.0)"
    assert studies.minus(rows, "old", "learned", "facts") == studies.minus(rows, "learned", "learned") == "–"
    assert studies.minus(rows, "fisher", "learned", "facts").startswith("+20.0 (")


def test_an_interval_without_a_difference_is_not_without_width():
    same = [[1] * 60 + [0] * 4]
    interval = intervals.difference(same, same)
    assert interval.mean == 0 and interval.high == -interval.low == pytest.approx(1 - 0.05 ** (1 / 64))
    closeness = intervals.difference([[0.9, 0.8]], [[0.8, 0.7]])
    assert closeness.low == pytest.approx(0.1) and closeness.high == pytest.approx(0.1)


def test_a_chapter_scales_learning_and_keeps_what_learns_longer():
    rows = studies.cells("best", "openmoji-flux-dev")
    short, long = (rows[f"{name}, 20%"] for name in ("learned", "learned three times as long"))
    for updates in (2, LearnConfig().updates):
        asked = [studies.smaller(c, updates=updates, most_prompts=8, pictures=3) for c in (short, long)]
        assert [c.config.updates for c in asked] == [updates, 3 * updates] and asked[0].protocol.pictures == 3
    assert studies.smaller(long, updates=LearnConfig().updates, most_prompts=10_000, pictures=200) == long


def test_a_model_is_drawn_as_its_recipe_says(store):
    folder = store / "models" / "mine"
    folder.mkdir(parents=True)
    sampling = {"num_inference_steps": 3, "guidance_scale": 0.0, "height": 64}
    (folder / "recipe.json").write_text(json.dumps({"recipe": {"sampling": sampling}}))
    drawn = Protocol.of("mine", pictures=7)
    assert drawn.sampling == sampling and drawn.pictures == 7
    cell = studies.base("mine")
    assert cell.config.num_inference_steps == 3 and cell.config.call == {"height": 64}
    assert Protocol.of("another").sampling == {}


@pytest.mark.slow
def test_missing_cells_are_measured_once_and_then_read(toy):
    todo = run.missing({"toy": 2}, "tiny")
    assert [(row, cell.seed) for _, row, cell in todo] == [
        (row, seed) for seed in (0, 1) for row in ("original", "random", "learned")
    ]
    assert results.find(todo[0][2]) is None
    first = [measure.run(cell) for _, _, cell in todo]
    assert first[0]["ssim"] == [1.0] * 3 and first[1]["parameters"] < first[0]["parameters"]
    assert run.missing({"toy": 2}, "tiny") == []
    assert [results.find(cell) for _, _, cell in todo] == first
    found = studies.recorded("toy", "tiny", seeds=3, only=["random", "learned"])
    assert {name: len(values) for name, values in found.items()} == {"random": 2, "learned": 2}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["blocks", "sparse24", "original+deepcache", "random+compensation+deepcache"])
def test_methods_beside_unit_scores_have_cells_too(toy, method):
    cell = Cell(method, 0.5, protocol=SMALL, config=CONFIG, prompts=2)
    steps = replace(cell, protocol=replace(SMALL, num_inference_steps=3))
    values, whole = (measure.run(one) for one in (steps, replace(steps, method="original")))
    assert len(values["ssim"]) == 3 and min(values["ssim"]) < 1
    fewer = method.startswith(("blocks", "random"))
    assert (values["parameters"] < whole["parameters"]) == fewer
    if method == "sparse24":
        assert values["gflop"] == whole["gflop"]
    else:
        assert 0 < values["gflop"] < whole["gflop"]


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_operations_counted_while_a_picture_is_drawn_are_those_of_the_cost_model(toy, guidance):
    drawn = replace(SMALL, num_inference_steps=3, guidance_scale=guidance)
    counted = cost(toy, size=CALL["height"], steps=3, guidance=guidance)
    assert measure.picture_gflop(toy, drawn) == pytest.approx(counted.picture_flops.total / 1e9, rel=1e-12)


@pytest.mark.slow
def test_a_cell_can_retrain_what_it_pruned(toy):
    protocol = replace(SMALL, guidance_scale=None, num_inference_steps=3)
    cell = Cell("random", 0.5, protocol=protocol, config=CONFIG, prompts=2)
    trained = replace(cell, retrain=RetrainConfig(method="full", steps=3, batch_size=2, lr=0.1))
    before, after = (measure.run(one) for one in (cell, trained))
    assert before["parameters"] == after["parameters"] and before["ssim"] != after["ssim"]


@pytest.mark.slow
def test_a_table_gives_means_with_intervals_and_says_what_is_not_there(toy):
    for _, _, cell in run.missing({"toy": 1}, "tiny"):
        measure.run(cell)
    lines = studies.table(studies.recorded("toy", "tiny"), ["SSIM to the original", "object named (%)", "FID"])
    assert [line[""] for line in lines] == ["original", "random", "learned"]
    assert lines[0]["SSIM to the original"] == "1.000 (1.000 to 1.000)" and lines[0]["seeds"] == "1"
    assert lines[1]["object named (%)"] == lines[1]["FID"] == "–"
    values = studies.recorded("toy", "tiny")["random"][0]["ssim"]
    assert lines[1]["SSIM to the original"].startswith(f"{statistics.mean(values):.3f} (")


def test_rows_are_told_apart_in_words():
    ssim = [0.5, 0.6, 0.7, 0.55, 0.65]
    rows = {
        "default": [{"ssim": ssim}],
        "worse": [{"ssim": [value - 0.1 for value in ssim]}],
        "better": [{"ssim": [value + 0.2 for value in ssim]}],
        "alike": [{"ssim": ssim[::-1]}],
        "the same cell": [{"ssim": ssim}],
    }
    told = "more: better (+0.200); less: worse (-0.100); no difference that matters: the same cell (+0.000); "
    told += "undecided: alike (+0.000)"
    assert studies.in_words(rows, "default") == told
    assert studies.in_words(rows, None) == studies.in_words({"default": rows["default"]}, "default") == ""
    assert studies.minus(rows, "default", "default") == "–" and studies.minus(rows, "worse", "default")[:6] == "-0.100"


@pytest.mark.slow
def test_verify_passes_what_is_right_and_names_what_is_not(toy, store):
    cell = studies.cells("toy", "tiny")["random"]
    assert run.verify(toy, ["toy"], "tiny", 1, seed=0) == []
    measure.run(cell)
    path = store / "results" / "compare.jsonl"
    row = json.loads(path.read_text())
    outcome = {"study": "toy", "row": "random", "model": "tiny", "key": row["key"]}
    assert run.verify(toy, ["toy"], "tiny", 5, seed=0) == [outcome | {"differs": []}]
    row["values"]["ssim"] = [value - 0.5 for value in row["values"]["ssim"]]
    row["values"]["gflop"] *= 1.02
    del row["checksum"]  # a row that was altered and still has its own is refused when it is read
    path.write_text(json.dumps(row) + "\n")
    told = run.verify(toy, ["toy"], "tiny", 1, seed=0)[0]["differs"]
    assert re.match("ssim is .* and was recorded as", told[0]) and re.match("gflop is .* and was recorded as", told[1])


def test_outputs_that_differ_are_counted_written_and_an_error(tmp_path, capsys):
    right = {"study": "ratios", "row": "random, 20%", "model": "tiny", "key": "a", "differs": []}
    wrong = right | {"row": "learned, 20%", "key": "b", "differs": ["ssim is 0.500 now and was recorded as 0.900"]}
    run.report_verified([right, right], None)
    assert "2 of 2 outputs reproduced" in capsys.readouterr().out
    file = tmp_path / "folder" / "reproduced.json"
    with pytest.raises(EcoDiffError, match="1 outputs differ from what is recorded; .* study ratios --model tiny"):
        run.report_verified([right, wrong], str(file))
    out = capsys.readouterr().out
    assert "1 of 2 outputs reproduced" in out and "learned, 20%, tiny: ssim is 0.500 now" in out
    written = json.loads(file.read_text())
    assert (written["reproduced"], written["of"]) == (1, 2) and written["outputs"] == [right, wrong]


@pytest.mark.slow
def test_what_is_verified_is_drawn_again(toy, store, monkeypatch):
    measure.run(studies.cells("toy", "tiny")["random"])
    drawn, real = [], images.generate
    monkeypatch.setattr(images, "generate", lambda *a, **k: drawn.append(k["cache_dir"]) or real(*a, **k))
    kept = {path: path.stat().st_mtime_ns for path in (store / ".cache").rglob("*") if path.is_file()}
    assert kept and run.verify(toy, ["toy"], "tiny", 1, seed=0)
    drawn = [folder for folder in drawn if folder]  # the picture whose operations are counted is not kept
    assert len(drawn) == 2 and not any(folder.is_relative_to(store) for folder in drawn)
    assert kept == {path: path.stat().st_mtime_ns for path in (store / ".cache").rglob("*") if path.is_file()}


@pytest.mark.slow
def test_seeds_after_one_that_is_missing_do_not_take_its_place(toy):
    for seed in (0, 2):
        measure.run(studies.cells("toy", "tiny", seed)["random"])
    found = studies.recorded("toy", "tiny")
    assert len(found["random"]) == 1
    measure.run(studies.cells("toy", "tiny", 1)["random"])
    assert len(studies.recorded("toy", "tiny")["random"]) == 3


def test_a_flux_model_is_one_on_the_hub_too():
    for model in HUB.values():
        rows = studies.cells("main", model)
        assert ("deepcache" in rows) != ("FLUX" in model)


@pytest.mark.parametrize("option", ["--seeds=0", "--verify=-1", "--minutes=-1"])
def test_the_command_names_a_number_that_cannot_be(option, capsys):
    assert main(["study", option]) == 2
    assert f"{option.replace('=', ' ')}: give" in capsys.readouterr().err


def test_a_row_depends_on_what_its_method_sees_and_on_nothing_else():
    pipe = tiny_sd()

    def differ(method, **changes):
        cell = Cell(method, 0.5, protocol=SMALL, config=CONFIG, prompts=2)
        return describe_cell(Identity.of(pipe), cell) != describe_cell(Identity.of(pipe), replace(cell, **changes))

    assert not differ("random", prompts=3) and not differ("magnitude", config=replace(CONFIG, weight=9.0))
    assert differ("learned", prompts=3) and differ("learned", config=replace(CONFIG, weight=9.0))
    assert differ("wanda", prompts=3) and differ("magnitude+compensation", prompts=3)
    assert differ("random", config=replace(CONFIG, kinds=("attention",)))
    assert all(differ("random", **{name: value}) for name, value in {"ratio": 0.4, "scope": "local"}.items())


def test_a_row_and_its_gates_depend_on_text_encoders_and_scheduler():
    pipe = tiny_sd()
    cells = [Cell(method, 0.5, protocol=SMALL, config=CONFIG, prompts=2) for method in ("random", "learned")]

    def described():
        return [describe_cell(Identity.of(pipe), cell) for cell in cells], results.gates_file(
            cells[1], Identity.of(pipe)
        )

    before = described()
    pipe.text_encoder.get_input_embeddings().weight.data.add_(0.1)
    other_words = described()
    pipe.scheduler.register_to_config(beta_end=0.0345)
    for a, b in ((before, other_words), (other_words, described())):
        assert all(x != y for x, y in zip(a[0], b[0], strict=True)) and a[1] != b[1]


def test_the_command_names_a_study_that_is_none(capsys):
    assert main(["study", "nonsense"]) == 2
    assert "There is no study 'nonsense': take one of main, pairs" in capsys.readouterr().err


@pytest.mark.slow
def test_one_command_measures_all_models_seed_0_of_all_first(toy, monkeypatch, capsys):
    small = {"original": Cell("original", protocol=SMALL, config=CONFIG, prompts=2)}

    def rows(model):
        return {name: replace(cell, protocol=replace(SMALL, model=model)) for name, cell in small.items()}

    only(monkeypatch, replace(plan.STUDIES["toy"], rows=rows))
    monkeypatch.setattr(run, "embedded", lambda: ["first", "second"])
    assert main(["study", "--model", "all", "--seeds", "2"]) == 0
    told = capsys.readouterr().out
    assert "first: 2 cells to go" in told and "together 4 cells, about 0.1 hours" in told
    order = [line.split("] ")[1].split(":")[0] for line in told.splitlines() if line.startswith("[")]
    assert order == [f"{m}, toy, original, seed {s}" for s in (0, 1) for m in ("first", "second")]
    assert main(["study", "--model", "all", "--seeds", "2"]) == 0
    assert "together 0 cells" in capsys.readouterr().out


def test_the_plan_has_each_table_on_the_model_that_stands_for_the_papers():
    seeds = run.seeds_of([], "openmoji-sdxl")
    assert seeds["main"] == studies.SEEDS and seeds["beta"] == 1 and "best" not in seeds
    assert run.seeds_of([], "openmoji-sd2") == {"main": 1, "pairs": 1}
    assert run.seeds_of([], "openmoji-sdxl", most=1) == dict.fromkeys(seeds, 1)
    # What is named is measured, in the plan or not; and a model of nobody's plan has all.
    assert run.seeds_of(["main", "best"], "openmoji-sdxl") == {"main": studies.SEEDS, "best": 1}
    assert run.seeds_of(["main"], "openmoji-sdxl", most=2) == {"main": 2}
    of_images = [name for name, study in plan.STUDIES.items() if not study.of_clips]
    assert run.seeds_of([], "stabilityai/stable-diffusion-xl-base-1.0") == dict.fromkeys(of_images, studies.SEEDS)
    for name in of_images:
        assert any(studies.planned(name, model) for model in (studies.SDXL, studies.DEV))
    assert run.seeds_of([], plan.WAN) == {"video": 1}


def test_the_plan_can_have_fewer_rows_of_a_model(toy, monkeypatch):
    short = {"tiny": ("original", "random")}
    study = replace(plan.STUDIES["toy"], plan={"tiny": 2}, short=short)
    only(monkeypatch, study)
    assert [list(studies.cells("toy", model)) for model in ("tiny", "other")] == [
        ["original", "random"],
        ["original", "random", "learned"],
    ]
    again = [("original", 1), ("random", 1)]
    assert [(row, cell.seed) for row, cell in studies.cells("toy", "tiny", 1).items()] == again
    assert [(row, cell.seed) for _, row, cell in run.missing({"toy": 2}, "tiny")][2:] == again
    assert studies.progress({"original": [{}]}, "toy", "tiny").startswith("1 of 4 cells of this table")


@pytest.mark.parametrize("name", list(plan.STUDIES))
def test_every_row_that_a_plan_names_is_a_row_of_the_study(name):
    study = plan.STUDIES[name]
    for model, named in study.short.items():
        assert set(named) <= set(study.rows(model)) and model in study.plan


def test_what_is_left_is_counted_by_the_plan(toy, monkeypatch):
    only(monkeypatch, replace(plan.STUDIES["toy"], plan={"tiny": 2, "other": 0}))
    assert studies.progress({"random": [{}]}, "toy", "tiny").startswith("1 of 6 cells of this table")
    assert studies.progress({"random": [{}] * 3}, "toy", "tiny", seeds=1).startswith("1 of 3")
    assert studies.progress({}, "toy", "other").startswith("0 of 3")
    assert studies.progress({name: [{}] * 2 for name in ("original", "random", "learned")}, "toy", "tiny") == ""


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_parts_share_all_cells_and_keep_those_of_one_mask_together(toy, monkeypatch, parts):
    rows = {}
    for ratio in (0.2, 0.5):
        for method in ("random", "magnitude", "learned", "learned+compensation"):
            rows[f"{method} {ratio}"] = Cell(method, ratio, protocol=SMALL, config=CONFIG, prompts=2)
    only(monkeypatch, replace(plan.STUDIES["toy"], rows=lambda model: rows))
    found = [[name for _, name, _ in run.missing({"toy": 1}, "tiny", part, parts)] for part in range(parts)]
    assert sorted(sum(found, [])) == sorted(rows)
    assert [sum("learned" in name for name in names) for names in found if any("learned" in n for n in names)] == [4]
    # A cell that another job has recorded meanwhile moves none to another part.
    monkeypatch.setattr(run, "find", lambda cell, of: {} if cell == rows["random 0.2"] else None)
    for part, names in enumerate(found):
        left = [name for _, name, _ in run.missing({"toy": 1}, "tiny", part, parts)]
        assert left == [name for name in names if name != "random 0.2"]


@pytest.mark.parametrize("part", ["0/8", "9/8", "2", "a/b", "1/0"])
def test_the_command_names_a_part_that_is_none(part, capsys):
    with pytest.raises(SystemExit):
        main(["study", "--part", part])
    assert "is no part: write 2/8 for the second of eight" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_ends_when_its_time_is_up_and_goes_on_later(toy, monkeypatch, capsys):
    assert main(["study", "--model", "tiny", "--seeds", "1"]) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]) == 3
    assert run.missing({"toy": 1}, "tiny") == []
    assert main(["study", "--model", "tiny", "--seeds", "2", "--minutes", "0"]) == 0
    assert "3 cells left; run again to go on" in capsys.readouterr().out


@pytest.mark.slow
def test_the_estimate_knows_what_each_method_took_and_which_masks_are_kept(toy, store):
    todo = run.missing({"toy": 1}, "tiny")
    assert run.estimate(todo) == 45 + 45 + 180  # nothing measured yet
    for _, _, cell in todo:
        measure.run(cell)
    took = {row["config"]["method"]: row["seconds"] for row in records.rows("compare")}
    again = run.missing({"toy": 2}, "tiny")
    assert run.estimate(again) == pytest.approx(sum(took.values()))
    learned = [item for item in again if item[1] == "learned"]
    measure.learned_gates(toy, learned[0][2].captions(), replace(CONFIG, seed=1))
    assert run.estimate(learned) == took["original"]


@pytest.mark.slow
def test_gates_of_units_that_stay_can_stay_too(toy):
    config = replace(CONFIG, log_alpha_start=0.5)  # where gates are neither 0 nor 1
    cut = Cell("learned", 0.5, protocol=SMALL, config=config, prompts=2)
    soft = replace(cut, method="learned+soft")
    gates = measure.learned_gates(toy, cut.captions(), config)
    mask = gates.mask(0.5)
    by_hand = {name: gate * mask[name] for name, gate in gates.deterministic().items()}
    assert any(((gate > 0) & (gate < 1)).any() for gate in by_hand.values())
    small = measure.smaller_model(toy, soft)
    assert sum(p.numel() for p in small.unet.parameters()) == measure.run(cut)["parameters"]
    with apply_gates(toy.unet, by_hand):
        torch.testing.assert_close(latents(small), latents(toy), rtol=1e-4, atol=1e-5)
    whole = measure.run(replace(soft, ratio=0.0))
    assert whole["parameters"] == sum(p.numel() for p in toy.unet.parameters())
    for method in ("random+soft", "learned+soft+compensation", "learned+magic"):
        with pytest.raises(EcoDiffError, match=f"Method '{re.escape(method)}'"):
            measure.run(replace(cut, method=method))


def test_the_units_that_go_are_recorded_and_depend_on_no_image(toy, monkeypatch):
    cell = Cell("magnitude", 0.5, protocol=SMALL, config=CONFIG, prompts=2)
    assert results.find_removed(cell) is None
    found = measure.removed_units(toy, cell)
    smaller = measure.smaller_model(toy, cell)
    gone = sum(site["removed"] * site["params_per_unit"] for site in found.values())
    sizes = [sum(p.numel() for p in pipe.unet.parameters()) for pipe in (toy, smaller)]
    assert sizes[0] - sizes[1] == gone > 0
    monkeypatch.setattr(measure, "scores_of", None)  # read, for any protocol
    other = replace(cell, protocol=replace(SMALL, pictures=7, split="heldout"))
    assert measure.removed_units(toy, other) == found


@pytest.mark.slow
def test_sites_can_be_spared_and_as_much_goes_elsewhere(toy, monkeypatch):
    cell = Cell("magnitude", 0.5, protocol=SMALL, config=CONFIG, prompts=2, count="parameters")
    before = {name: site["removed"] for name, site in measure.removed_units(toy, cell).items()}
    spared = max((name for name in before if "attn" in name), key=before.get)
    usual, masks = measure.run(cell), []
    monkeypatch.setattr(measure, "prune", lambda pipe, mask: masks.append(mask) or prune(pipe, mask))
    values = measure.sparing(toy, cell, [spared])
    assert before[spared] > 0 and masks[0][spared].all()
    assert values["parameters"] == pytest.approx(usual["parameters"], rel=0.02)
    assert results.find_sparing(cell, [spared]) == values
    with pytest.raises(EcoDiffError, match="'nowhere' is no site of this model"):
        measure.sparing(toy, cell, ["nowhere"])


@pytest.mark.slow
def test_a_mask_can_come_from_another_model(toy, monkeypatch):
    other = tiny_sd()
    with torch.no_grad():
        other.unet.conv_in.weight.mul_(1.5)
    monkeypatch.setattr(measure, "load_once", {"other": other}.__getitem__)
    monkeypatch.setattr(cell_module, "identity", lambda model: Identity.of({"other": other}[model]))
    own = Cell("learned", 0.5, protocol=SMALL, config=CONFIG, prompts=2)
    borrowed = replace(own, learned_on="other")
    mask = measure.learned_gates(other, own.captions(), CONFIG).mask(0.5)
    small = measure.smaller_model(toy, borrowed)
    assert torch.equal(latents(small), latents(prune(toy, mask)))
    assert describe_cell(Identity.of(toy), own) != describe_cell(Identity.of(toy), borrowed)
    schnell = plan.transfer("openmoji-flux-schnell")["learned on the model it was distilled from"]
    assert schnell.learned_on == "openmoji-flux-dev" and schnell.config == studies.base("openmoji-flux-dev").config


def test_scores_are_computed_once_for_all_ratios(store, monkeypatch):
    pipe, calls = tiny_sd(), []
    real = measure.METHODS["wanda"]
    monkeypatch.setitem(measure.METHODS, "wanda", lambda *a, **k: calls.append(1) or real(*a, **k))
    scores = [measure.scores_of(pipe, "wanda", ["a cat", "a pizza"], CONFIG, seed) for seed in (0, 0, 1)]
    assert len(calls) == 2
    for name, value in real(pipe, ["a cat", "a pizza"], **sampling_of(CONFIG, 0), kinds=CONFIG.kinds).items():
        assert torch.equal(scores[0].pop(name), value) and torch.equal(scores[1].pop(name), value)
    assert not scores[0] and not scores[1]
