"""Claims: each is placed and decided by a rule, rules decide rightly on rows made for them, and counts are exact."""

import re
import shutil
from dataclasses import replace

import pytest
import torch
from tiny import tiny_sd

from ecodiff.errors import EcoDiffError
from ecodiff.lab import claims, studies
from ecodiff.lab.claims import (
    comparisons,
    cost,
    memory,
    method,
    on_embedded,
    on_full_size,
    page,
    published,
    results,
    reviewers,
    rules,
)
from ecodiff.lab.studies import cell as cell_module
from ecodiff.lab.studies import measure, protocol
from ecodiff.lab.studies import results as rows_of
from ecodiff.lab.studies.cell import Cell, describe_cell
from ecodiff.lab.studies.plan import judging
from ecodiff.lab.studies.protocol import Protocol
from ecodiff.method.config import LearnConfig
from ecodiff.metrics.intervals import Interval
from ecodiff.pipelines import loading
from ecodiff.pipelines.contents import weights_hash
from ecodiff.pipelines.identity import Identity
from ecodiff.storage import records
from ecodiff.storage.paths import data_file, root

MODEL = on_embedded.SDXL
SMALL = Protocol(model="tiny", pictures=100, num_inference_steps=1, guidance_scale=1.0, features=False)
CONFIG = LearnConfig(updates=1, num_inference_steps=1, guidance_scale=1.0)
A, B = ("toy", "a"), ("toy", "b")
OPEN_VERDICTS = {rules.CHECKPOINT, rules.MISSING}


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Records in an empty folder."""
    for module in (records, rows_of, protocol, on_embedded):
        monkeypatch.setattr(module, "data_dir", lambda: tmp_path)
    monkeypatch.setattr(cell_module, "judge_hash", lambda: None)
    monkeypatch.delenv("ECODIFF_RECORDS", raising=False)
    monkeypatch.delenv("ECODIFF_RECOMPUTE", raising=False)
    return tmp_path


@pytest.fixture
def family(store, monkeypatch):
    """A tiny pipeline in the place of every embedded one, and a study "toy" with two rows."""
    pipe = tiny_sd()
    for module in (on_embedded, reviewers):
        monkeypatch.setattr(module, "identity", lambda model: Identity.of(pipe))
    monkeypatch.setattr(loading, "load_once", lambda model: pipe)
    monkeypatch.setattr(on_embedded, "trained", lambda model: True)
    toy = {name: Cell("random", ratio, protocol=SMALL, config=CONFIG) for name, ratio in (("a", 0.2), ("b", 0.3))}
    study = studies.Study("A toy", "no table", lambda model: toy, varies=("ratio",), reference=("a",))
    monkeypatch.setitem(studies.STUDIES, "toy", study)
    return pipe


def record(pipe, place, seed=0, model=MODEL, **values):
    """Write a row as if it had been measured."""
    cell = studies.cells(place[0], model, seed)[place[1]]
    values = {"parameters": 1, "ssim": [0.9] * 100, **values}
    records.measure(describe_cell(Identity.of(pipe), cell), lambda: values, name="compare")


def hits(number):
    return [1] * number + [0] * (100 - number)


def ssim(mean):
    return [mean + 0.001 * (i % 5) for i in range(100)]


@pytest.mark.parametrize(
    "function", [*claims.CLAIMS, *claims.PUBLISHED, *claims.REVIEWERS], ids=lambda function: function.__name__
)
def test_a_claim_has_a_place_a_test_and_a_verdict_whether_rows_are_there_or_not(function, store):
    (claim,) = claims.check([function], presets=())
    assert claim.where and claim.says.endswith(".") and claim.test.endswith((".", "?")) and claim.decisions
    assert any((root() / "notebooks" / f"{stem}.md").is_file() for stem in claim.shown)
    for decision in claim.decisions:
        assert decision.verdict in claims.VERDICTS and decision.on
        assert decision.evidence or (decision.verdict in OPEN_VERDICTS and decision.command.split()[0] in COMMANDS)
        assert decision.verdict not in (rules.REPRODUCED, rules.NOT_REPRODUCED)  # nothing is recorded


COMMANDS = ("python", "papermill")


def test_there_are_claims_of_every_part_of_the_paper_and_none_twice(store):
    found = claims.check(presets=())
    assert len(found) == len({claim.says for claim in found}) >= 30
    places = " ".join(claim.where for claim in found)
    assert all(part in places for part in ("Abstract", "§1", "§2.3", "§3.2", "§4", "App. A", "App. N"))
    assert all(f"Table {n}" in places for n in (1, 6, 7, 8, 11, 12)) and "Tables 4, 9" in places
    tally = claims.tally(found)
    assert sum(tally.values()) == sum(len(claim.decisions) for claim in found)
    assert tally[rules.COUNTED] == 0 < tally[rules.PRINTED]


@pytest.mark.slow
def test_rows_of_studies_are_the_ones_that_are_named(family):
    """A row that a study does not have is an error, not a row that is missing."""
    claims.check([*claims.CLAIMS, *claims.PUBLISHED], presets=())
    with pytest.raises(EcoDiffError, match="has no row 'nonsense'"):
        on_embedded.better(MODEL, A, ("toy", "nonsense"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mean", "right", "expected"),
    [
        (0.97, 70, rules.REPRODUCED),  # closer, and as many right
        (0.84, 70, rules.NOT_REPRODUCED),
        (0.9, 70, rules.NOT_REPRODUCED),  # the same by both
        (0.92, 70, rules.NOT_REPRODUCED),  # closer by less than what matters, although the interval excludes zero
        (0.97, 30, rules.DISAGREE),  # closer, and fewer right
        (0.97, 67, rules.UNDECIDED),  # closer, and fewer right or not
        (0.9, 90, rules.REPRODUCED),
        (0.9, 76, rules.UNDECIDED),  # more right, by more or less than what matters
    ],
)
def test_better_is_more_of_something_and_less_of_nothing(family, mean, right, expected):
    record(family, A, ssim=ssim(mean), object=hits(right))
    record(family, B, ssim=ssim(0.9), object=hits(70))
    found = on_embedded.better(MODEL, A, B)
    assert found.verdict == expected and found.command == ""
    assert "a minus b: SSIM" in found.evidence and "100 images, 1 seed" in found.evidence
    assert "small, for SDXL" in found.on


@pytest.mark.slow
@pytest.mark.parametrize(
    ("right", "expected"),
    [
        (95, rules.REPRODUCED),
        (97, rules.REPRODUCED),
        (91, rules.UNDECIDED),
        (30, rules.NOT_REPRODUCED),
    ],
)
def test_kept_is_less_lost_than_matters(family, right, expected):
    for seed in range(3):
        record(family, A, seed, object=hits(right))
        record(family, B, seed, object=hits(95))
    assert on_embedded.kept(MODEL, A, B).verdict == expected


def test_nothing_can_be_kept_where_nearly_nothing_is_right(family):
    for place, right in ((A, 8), (B, 8)):
        for seed in range(3):
            record(family, place, seed, object=hits(right))
    found = on_embedded.kept(MODEL, A, B)
    assert found.verdict == rules.UNDECIDED and found.evidence.endswith("b itself is right in 8.0 of 100 only")


def test_rows_of_a_published_checkpoint_decide_what_waits_for_it(family, monkeypatch):
    def rule(model):
        return on_embedded.better(model, A, B, label="rule")

    monkeypatch.setattr(on_embedded, "trained", lambda model: model in on_embedded.FAMILY)
    toy = studies.STUDIES["toy"].rows(MODEL)

    def of(m):
        return {name: judging(cell, model=m) for name, cell in toy.items()}

    of_model = replace(studies.STUDIES["toy"], rows=of)
    monkeypatch.setitem(studies.STUDIES, "toy", of_model)
    waiting = on_embedded.real(MODEL, "toy", rule)
    assert waiting.verdict == rules.CHECKPOINT
    assert waiting.command == f"python -m ecodiff study toy --model {on_embedded.HUB[MODEL]}"
    record(family, A, model=on_embedded.HUB[MODEL], ssim=ssim(0.95))
    assert on_embedded.real(MODEL, "toy", rule).verdict == rules.CHECKPOINT  # one row alone
    record(family, B, model=on_embedded.HUB[MODEL], ssim=ssim(0.85))
    found = on_embedded.real(MODEL, "toy", rule)
    assert found.verdict == rules.COUNTED and on_embedded.HUB[MODEL] in found.on and "small" not in found.on


def test_verdicts_are_in_favour_against_or_between():
    assert {*claims.IN_FAVOUR, *claims.AGAINST, rules.UNDECIDED, rules.DISAGREE} == set(claims.DECIDED)
    assert all("not" in name.split() for name in claims.AGAINST)
    assert not any("not" in name.split() for name in claims.IN_FAVOUR)


def test_facts_of_the_judge_come_before_the_probe_and_ssim_stands_in_for_both(family):
    record(family, A, ssim=ssim(0.7), object=hits(25), facts=hits(95))
    record(family, B, ssim=ssim(0.9), object=hits(95), facts=hits(95))
    assert on_embedded.kept(MODEL, A, B).verdict == rules.REPRODUCED
    for place, mean in ((A, 0.7), (B, 0.9)):
        record(family, place, seed=1, ssim=ssim(mean))
    found = on_embedded.kept(MODEL, A, B)
    assert found.verdict == rules.NOT_REPRODUCED and "SSIM -0.200" in found.evidence


def test_seeds_are_paired_and_those_of_one_row_alone_left_out(family):
    record(family, A, seed=0, object=hits(40))
    record(family, B, seed=1, object=hits(0))
    found = on_embedded.better(MODEL, A, B)
    assert found.verdict == rules.MISSING and found.command == f"python -m ecodiff study toy --model {MODEL}"
    record(family, B, seed=0, object=hits(40))
    assert on_embedded.better(MODEL, A, B).verdict == rules.NOT_REPRODUCED


def test_records_that_are_off_are_not_read(family, monkeypatch):
    record(family, A)
    record(family, B)
    assert on_embedded.better(MODEL, A, B).verdict == rules.NOT_REPRODUCED
    monkeypatch.setenv("ECODIFF_RECORDS", "off")
    assert on_embedded.better(MODEL, A, B).verdict == rules.MISSING


def test_a_model_that_is_not_trained_is_trained_first(store):
    found = on_embedded.kept(on_embedded.DEV, on_embedded.LEARNED, on_embedded.ORIGINAL)
    assert found.command.startswith("python -m ecodiff zoo train openmoji-flux-dev && python -m ecodiff study main")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        ([10.0, 10.2, 9.9], rules.REPRODUCED),
        ([31.0, 30.0, 30.5], rules.NOT_REPRODUCED),
        ([20.0, 25.0, 15.0], rules.UNDECIDED),
        ([1.0], rules.UNDECIDED),
    ],
)
def test_fid_is_lower_by_an_interval_over_seeds(family, ours, expected):
    for seed, value in enumerate(ours):
        record(family, A, seed, fid=value)
        record(family, B, seed, fid=20.0)
    assert on_embedded.lower_fid(MODEL, A, B).verdict == expected


def test_all_of_several_is_as_bad_as_the_worst():
    yes, no, unclear = (rules.Decision("x", v, "1") for v in (rules.REPRODUCED, rules.NOT_REPRODUCED, rules.UNDECIDED))
    missing = rules.Decision("x", rules.MISSING, command="python")
    for group, expected in (
        ((yes, yes), yes),
        ((yes, no, missing), no),
        ((yes, unclear), unclear),
        ((yes, unclear, missing), missing),
    ):
        assert rules.together(group, "x").verdict == expected.verdict  # fmt: skip


def test_rules_at_their_edges():
    def interval(low, high):
        return Interval((low + high) / 2, low, high, 0.95)

    assert rules.better([interval(0.0, 0.1)]) == rules.UNDECIDED
    assert rules.better([interval(0.01, 0.04)]) == rules.NOT_REPRODUCED  # above zero, and below what matters
    assert rules.better([interval(0.1, 0.2), interval(-0.2, -0.1)]) == rules.DISAGREE
    assert rules.better([interval(0.1, 0.2), interval(-0.08, -0.02)]) == rules.UNDECIDED
    assert rules.better([interval(0.1, 0.2), interval(-0.04, -0.02)]) == rules.REPRODUCED
    assert rules.better([interval(-0.01, 0.01), interval(-0.2, -0.1)]) == rules.NOT_REPRODUCED
    assert rules.kept([interval(-0.04, 0.1), interval(-0.06, 0.1)]) == rules.UNDECIDED
    assert rules.kept([interval(-0.04, 0.1)], smallest=0.02) == rules.UNDECIDED
    assert rules.kept([interval(-0.2, -0.06), interval(0.1, 0.2)]) == rules.DISAGREE
    assert rules.kept([interval(-0.2, -0.06), interval(-0.1, 0.2)]) == rules.NOT_REPRODUCED


@pytest.mark.parametrize("low", [k / 100 for k in range(-12, 12, 3)])
@pytest.mark.parametrize("width", [0.0, 0.04, 0.09, 0.2])
def test_no_difference_is_both_a_gain_and_nothing(low, width):
    """Better one way excludes that nothing was lost the other way."""
    there = Interval(low + width / 2, low, low + width, 0.95)
    back = Interval(-there.mean, -there.high, -there.low, 0.95)
    if rules.better([there]) == rules.REPRODUCED:
        assert there.word == "more" and rules.kept([back]) == rules.NOT_REPRODUCED
    if there.word == "no difference that matters":
        assert rules.better([there]) == rules.better([back]) == rules.NOT_REPRODUCED
        assert rules.kept([there]) == rules.kept([back]) == rules.REPRODUCED


@pytest.mark.parametrize(
    "arguments", [("x", "true"), ("x", rules.PRINTED), ("x", rules.COUNTED, "", "python"), ("x", rules.MISSING)]
)
def test_a_verdict_is_one_of_the_list_and_has_its_evidence(arguments):
    with pytest.raises(EcoDiffError, match="is no verdict|needs its evidence"):
        rules.Decision(*arguments)


def decisions(function, presets=()):
    (claim,) = claims.check([function], presets=presets)
    return claim.decisions


def on_family(function):
    return [d for d in decisions(function) if d.on.startswith(f"`{MODEL}`")]


@pytest.mark.slow
def test_main_claims_on_rows_of_the_main_study(family):
    for seed in range(3):
        record(family, on_embedded.ORIGINAL, seed, ssim=[1.0] * 100, object=hits(95), fid=20.0)
        record(family, on_embedded.LEARNED, seed, ssim=ssim(0.97), object=hits(95), fid=25.0 + seed / 10)
    for name in studies.METHODS[1:]:
        record(family, ("main", f"{name}, 20%"), 0, ssim=ssim(0.8), object=hits(50))
    assert on_family(results.a_fifth_of_sdxl)[0].verdict == rules.REPRODUCED
    assert on_family(results.pruned_draws_better)[1].verdict == rules.NOT_REPRODUCED
    assert on_family(comparisons.beats_diff_pruning)[0].verdict == rules.REPRODUCED
    assert on_family(comparisons.best_of_all)[0].verdict == rules.REPRODUCED
    assert on_family(comparisons.no_mimicry)[0].verdict == rules.NOT_REPRODUCED
    assert {d.verdict for d in on_family(reviewers.baselines)} == {rules.REPRODUCED}
    no_gates = [rules.MISSING, rules.MISSING]  # no λ is kept, nothing drawn with soft gates
    assert [d.verdict for d in on_family(reviewers.binary)] == no_gates
    for seed in range(3):
        record(family, ("soft", "cut, the rest times its gates"), seed, ssim=ssim(0.97), object=hits(95))
    assert [d.verdict for d in on_family(reviewers.binary)][1] == rules.REPRODUCED
    record(family, ("main", "obs, 20%"), 0, ssim=ssim(0.8), object=hits(50))
    assert results.PAIRS == ("pairs", "learned, 20%")
    assert on_family(results.a_fifth_of_sdxl)[1].verdict == rules.MISSING  # two objects are another study


@pytest.mark.slow
@pytest.mark.parametrize(
    ("after", "expected", "text"),
    [
        (90, rules.REPRODUCED, "40 mended, 0 spoiled"),
        (50, rules.NOT_REPRODUCED, "0 mended, 0 spoiled"),
        (56, rules.UNDECIDED, "6 mended, 0 spoiled"),
        (10, rules.NOT_REPRODUCED, "0 mended, 40 spoiled"),
    ],
)
def test_mended_pictures_are_weighed_against_spoiled_ones(family, after, expected, text):
    record(family, ("pairs", "learned, 10%"), facts=hits(after))
    record(family, ("pairs", "original"), facts=hits(50))
    found = on_family(comparisons.mends_semantics)[0]
    assert found.verdict == expected and found.evidence.startswith(text)


def updates(pipe, times, peaks, equal=True, published=1.8):
    """Rows of ``benchmark mask-update`` for T = 2, 4, 8."""
    for steps in (2, 4, 8):
        variants = [
            {"variant": "plain", "peak_bytes": 100 * steps, "times_plain": 1.0, "bit_equal": True},
            {"variant": "checkpointed", "peak_bytes": peaks(steps), "times_plain": times, "bit_equal": equal},
            {"variant": "published", "peak_bytes": 110, "times_plain": published, "bit_equal": equal},
        ]
        config = {"what": "mask_step", "T": steps, "weights": weights_hash(pipe.unet)}
        records.measure(config, lambda v=variants: {"variants": v}, name="mask_step", recompute=True)


def test_memory_and_time_of_recorded_updates(family):
    assert on_family(memory.constant_memory)[0].verdict == rules.MISSING
    updates(family, 1.4, lambda steps: 100 + steps // 4)
    flat, slow, exact = (
        on_family(f)[0] for f in (memory.constant_memory, memory.twice_the_time, method.exact_gradient)
    )
    assert {flat.verdict, slow.verdict, exact.verdict} == {rules.REPRODUCED}
    assert "plain 4.0 times" in flat.evidence and "the published loop 1.80 to 1.80" in slow.evidence
    updates(family, 2.1, lambda steps: 50 * steps, equal=False)
    again = (on_family(f)[0] for f in (memory.constant_memory, memory.twice_the_time, method.exact_gradient))
    assert {d.verdict for d in again} == {rules.NOT_REPRODUCED}


def test_updates_of_other_weights_say_nothing(family):
    updates(family, 1.4, lambda steps: 100)
    with torch.no_grad():
        next(family.unet.parameters()).add_(1)
    assert on_family(memory.constant_memory)[0].verdict == rules.MISSING


def test_times_at_full_size_that_differ_by_clock_and_by_processor_decide_nothing(store):
    def row(ratio, cpu_ratio, device="cpu"):
        flops = {name: {"total": 1e12} for name in ("original", "pruned")}
        variants = {"pruned": {"ratio": ratio, "cpu_ratio": cpu_ratio}, "original": {"seconds": 0.01}}
        values = {"variants": variants, "flops": flops}
        config = {
            "what": "full_size_inference",
            "model": "sd2",
            "ratio": 0.2,
            "round_to": 1,
            "device": device,
            "samples": 2,
            "turns": 3,
        }
        records.measure(config, lambda: values, name="full_size", recompute=True)
        return decisions(cost.faster)[0 if device == "cpu" else 2].verdict

    assert row(0.9, 0.8) == rules.COUNTED
    assert row(1.1, 1.2) == rules.NOT_COUNTED
    assert row(1.1, 0.9) == rules.UNDECIDED
    assert decisions(cost.faster)[1].verdict == decisions(cost.faster)[2].verdict == rules.MISSING
    assert row(0.9, 1.1, "a GPU") == rules.COUNTED
    assert row(1.1, 0.9, "a GPU") == rules.NOT_COUNTED
    assert decisions(cost.faster)[2].evidence.endswith("2 samples per call, 100 TFLOP/s")


def test_updates_on_a_gpu_are_decided_apart_from_those_on_a_cpu(store):
    def row(model, steps, device, **variants):
        samples = {"sd2": 1, "sdxl": 2}[model]
        config = {"what": "full_size_update", "model": model, "T": steps, "device": device, "samples": samples}
        values = {"variants": variants, "weight_bytes": 5e9}
        records.measure(config, lambda: values, name="full_size")

    row("sdxl", 1, "a GPU", plain={"peak_bytes": 1e9, "ratio": 1})  # nothing to recompute
    assert decisions(memory.memory_of_an_update)[3].verdict == rules.MISSING
    for steps in (2, 10):
        plain = {"peak_bytes": 1e9 * steps, "ratio": 1}
        row("sd2", steps, "cpu", plain=plain, checkpointed={"peak_bytes": 1e9, "ratio": 1.2})
        row("sdxl", steps, "a GPU", plain=plain, checkpointed={"peak_bytes": 1e9, "ratio": 2.5})
    row("sdxl", 50, "a GPU", checkpointed={"peak_bytes": 12e9, "ratio": 1})  # plain did not fit
    flat, slow = decisions(memory.constant_memory), decisions(memory.twice_the_time)
    assert [d.verdict for d in flat[1:]] == [rules.COUNTED, rules.MISSING, rules.COUNTED]
    assert [d.verdict for d in slow[1:]] == [rules.COUNTED, rules.MISSING, rules.NOT_COUNTED]
    assert "2.50 to 2.50 times plain at 2 values of T up to 10" in slow[3].evidence
    limit = decisions(memory.memory_of_an_update)[3]
    assert limit.verdict == rules.COUNTED and limit.evidence.startswith("17.0 GB")


@pytest.fixture
def counts_kept(store):
    """The recorded counts, in a folder of the test's own: with other versions they are counted anew there."""
    (store / "results").mkdir()
    shutil.copy(data_file("results/cost.jsonl"), store / "results")


def verdicts(function, presets=on_full_size.PRESETS):
    return [d.verdict for d in decisions(function, presets)]


HOLDS, FAILS = rules.COUNTED, rules.NOT_COUNTED


def test_counted_claims_are_exact(counts_kept):
    sdxl, flux, share = decisions(cost.parameters, on_full_size.PRESETS)
    assert (sdxl.verdict, flux.verdict, share.verdict) == (HOLDS, HOLDS, FAILS)
    assert "2.343 B (2.3 B printed), 2.114 B" in sdxl.evidence and "17.7%" in share.evidence
    assert "10.707 B (10.7 B printed), 10.116 B (10.1 B printed)" in flux.evidence
    operations = decisions(cost.operations, on_full_size.PRESETS)
    assert [d.verdict for d in operations] == [HOLDS, FAILS, HOLDS, FAILS]
    assert operations[0].evidence.startswith("281,004;") and operations[1].evidence.startswith("298,866 or 597,732;")
    assert verdicts(memory.memory_of_an_update) == [FAILS, HOLDS, FAILS, rules.MISSING, rules.NOT_PRINTED]
    assert verdicts(memory.memory_of_table_12) == [HOLDS] * 4
    assert verdicts(cost.small_gpus) == [HOLDS, FAILS, HOLDS, rules.UNDECIDED]
    assert verdicts(method.occlusion_is_slow) == [HOLDS]
    assert decisions(method.occlusion_is_slow, on_full_size.PRESETS)[0].evidence.startswith("335,400 units")


def test_structure_of_one_architecture(store):
    outer = decisions(method.outer_widths, ("sd2",))
    assert [d.verdict for d in outer] == [HOLDS, rules.MISSING, rules.MISSING]
    assert outer[0].evidence.startswith("0 outer widths change at 48 sites")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (method.exact_gates, "yes"),
        (method.steeper_by_delta, "no"),
        (method.start_at_five, "no"),
        (results.a_fifth_of_sdxl, "yes"),
        (results.a_fifth_of_flux, "no yes yes"),
        (results.no_loss, "no"),
        (results.drops_beyond_a_fifth, "no yes"),
        (results.distilled, "yes yes"),
        (results.stable_diffusion_2, "yes no"),
        (comparisons.beats_diff_pruning, "yes"),
        (comparisons.no_mimicry, "yes no"),
        (comparisons.light_retraining, "yes"),
        (cost.carbon, ""),
        (cost.retraining_is_dear, "yes yes"),
        *zip(claims.GROUPS["ablations"], ("yes no", "yes yes", "", "yes", "", "yes"), strict=True),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_papers_own_numbers(function, expected, store):
    words = {rules.PRINTED: "yes", rules.NOT_PRINTED: "no"}
    assert " ".join(words[d.verdict] for d in decisions(function) if d.verdict in words) == expected


def test_gates_that_lie_between_are_counted_from_kept_ones(family, monkeypatch):
    from ecodiff.method.gates import Gates
    from ecodiff.method.sites import find_sites

    gates = Gates.start(find_sites(family.unet), 1.0)
    path = reviewers.kept_gates(MODEL, 0)
    path.parent.mkdir(parents=True)
    gates.save(path)
    found = reviewers.gates_between(MODEL)
    assert found.verdict == rules.REPRODUCED and found.evidence.startswith("100.0% to 100.0% between 0 and 1")
    learned = []
    monkeypatch.setattr(measure, "learn", lambda *a, **k: learned.append(1) or gates)
    cell = studies.cells("main", MODEL, 0)["learned, 20%"]
    measure.learned_gates(family, cell.captions(), replace(cell.config, seed=0))
    assert not learned  # the file is where learned_gates looks


def test_a_card_has_number_word_and_place_and_groups_what_is_open(store):
    found = claims.check([results.a_fifth_of_sdxl, results.no_loss], presets=())
    text = page.cards(found, first=7, prefix="R")
    assert re.findall(r":::\{dropdown\} (R\d+) \{bdg-\w+\}`(\S) (\w+)` \S", text) == [
        ("R7", "✓", "holds"),
        ("R8", "✗", "fails"),
    ]
    assert re.findall(r"^\((.*)\)=$", text, re.M) == ["claim-a-fifth-of-sdxl", "claim-no-loss"]
    assert text.count("**not measured here yet:**") == 1 and ".ipynb)" in text and "20 %" in text
    assert "1 verdict for, 3 open" in text
    waiting = page.waiting(found, first=7)
    assert all(line["decides claims"] == "7" and line["command"].startswith("`python") for line in waiting)


@pytest.mark.parametrize(
    ("verdicts", "word"),
    [
        ((rules.PRINTED, rules.REPRODUCED, rules.CHECKPOINT), rules.HOLDS),
        ((rules.NOT_PRINTED, rules.MISSING), rules.FAILS),
        ((rules.PRINTED, rules.NOT_REPRODUCED), rules.MIXED),
        ((rules.PRINTED, rules.UNDECIDED), rules.MIXED),
        ((rules.UNDECIDED, rules.DISAGREE), rules.UNSETTLED),
        ((rules.MISSING, rules.CHECKPOINT), rules.OPEN),
        ((), rules.OPEN),
    ],
)
def test_one_word_for_several_verdicts(verdicts, word):
    decisions = [rules.Decision("x", verdict, "1") for verdict in verdicts]
    assert rules.overall(decisions) == word and word in claims.OVERALL and word in page.BADGES


def test_published_claims_say_that_their_numbers_are_second_hand(store):
    for claim in claims.check(claims.PUBLISHED, presets=()):
        assert claim.where.startswith("Published version")
        for decision in claim.decisions:
            if decision.verdict in (rules.PRINTED, rules.NOT_PRINTED):
                assert "second-hand" in decision.on


def test_changes_between_the_versions_are_those_of_claims_that_are_there(store):
    preprint = claims.check(presets=())
    lines = published.changes(preprint)
    assert [line["name"] for line in lines] and {line["name"] for line in lines} == set(published.CHANGES)
    assert "rises by 4.76" in next(line["later"] for line in lines if line["name"] == "pruned_draws_better")


def test_the_sign_of_the_fid_claim_is_decided_by_version(store):
    preprint = [d.verdict for d in decisions(results.pruned_draws_better) if d.on.startswith("Table 1")]
    assert preprint == [rules.PRINTED, rules.PRINTED]
    assert decisions(published.minimal_loss_of_sdxl)[0].verdict == rules.NOT_PRINTED
