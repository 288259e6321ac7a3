"""What the chapters say in prose, against the recorded rows and the published files that it is said of."""

import json
import re

import pytest

from ecodiff.lab import errata, paper
from ecodiff.lab.book import build
from ecodiff.storage import records
from ecodiff.storage.paths import data_dir, root

CHAPTERS = {source.stem[3:]: source for source in build.sources()}
PROSE = ("introduction", "the_models", "hard_concrete", "l0_to_l1", "where_masks_go", "a_smaller_model",
         "what_it_costs", "how_quality_is_measured", "model_cards")  # fmt: skip
"""Chapters whose prose says *the authors' code* where code is meant."""
CARDS = ("openmoji-sdxl", "openmoji-sd2", "openmoji-flux-dev", "openmoji-flux-schnell")


def text(chapter: str) -> str:
    """The source of the chapter whose file has this name after its number."""
    return CHAPTERS[chapter].read_text(encoding="utf-8")


def card(model: str) -> dict:
    return json.loads((data_dir() / "models" / model / "measured.json").read_text())


def originals(model: str) -> list[dict]:
    """Values of the unpruned model on the table set, one for each seed."""
    found = {}
    for row in records.rows("compare"):
        config = row["config"]
        judged_on = config["protocol"]
        plain = config["method"] == "original" and "retrain" not in config
        table_set = (judged_on["split"], judged_on["count"], judged_on["pictures"]) == ("seen", 1, 200)
        if plain and table_set and judged_on["model"] == model:
            found[config["seed"]] = row["values"]
    return [found[seed] for seed in sorted(found)]


def percent(cells: list[dict], measure: str) -> float:
    hits = [hit for cell in cells for hit in cell[measure]]
    return 100 * sum(hits) / len(hits)


def test_found_is_the_judges_word_and_named_the_probes():
    said = text("introduction")
    sdxl = card("openmoji-sdxl")
    assert f"the judge finds {sdxl['one object: objects found (%)']['value']:.0f} in 100" in said
    assert f"the probe names {sdxl['one object: object named by the probe (%)']['value']:.0f}" in said
    assert "can be named" not in said


@pytest.mark.parametrize("model", CARDS)
def test_readme_states_both_sets_of_each_model(model):
    readme = (root() / "README.md").read_text(encoding="utf-8")
    on_card = card(model)["one object: object named by the probe (%)"]["value"]
    on_tables = percent(originals(model), "object")
    assert f"{on_card:.1f} %" in readme and f"{on_tables:.1f} %" in readme
    assert abs(on_card - on_tables) < 5, "captions and noise move objects named by up to five points, it is said"


def test_a_line_with_a_share_of_objects_says_of_which_set():
    readme = (root() / "README.md").read_text(encoding="utf-8")
    lines = [line for line in readme.splitlines() if "by the probe" in line]
    assert lines and all("card set" in line or "table set" in line for line in lines)
    for chapter in ("a_smaller_model", "how_quality_is_measured", "the_models"):
        assert "*table set*" in text(chapter) and "*card set*" in text(chapter), chapter


def test_published_masks_empty_no_module_at_ten_and_twenty_per_cent():
    released = paper.table("sdxl_lambda")
    assert not [r for r in released if r["kept_10"] == 0 or r["kept_20"] == 0]
    assert "none of the SDXL masks that its authors published has such a site at 20 %" in text("where_masks_go")


def test_factors_in_time_of_the_introduction_are_the_recorded_ones():
    small = [v["times_plain"] for row in records.rows("mask_step") for v in row["values"]["variants"]
             if v["variant"] == "checkpointed"]  # fmt: skip
    large = [
        row["values"]["variants"]["checkpointed"]["ratio"]
        for row in records.rows("full_size")
        if row["config"]["what"] == "full_size_update"
        and row["config"]["device"] != "cpu"
        and row["config"].get("measured") == "both"
        and {"plain", "checkpointed"} <= row["values"]["variants"].keys()
    ]
    said = text("introduction")
    assert f"{min(small):.2f} to {max(small):.2f} as measured on a CPU" in said
    assert f"{min(large):.2f} to {max(large):.2f} on a GPU" in said


def test_the_nine_choices_are_those_that_the_configurations_have():
    pytest.importorskip("torch")
    from ecodiff.method.learn import LearnConfig

    table = re.search(
        r"^\| \| here \| paper \| authors' code \|\n\|[-|]+\n((?:\|.*\n)+)", text("learning_a_mask"), re.M
    )[1]
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
    ours = {line[0]: line[1] for line in lines}
    papers = {line[0]: line[2] for line in lines}
    codes = {line[0]: line[3] for line in lines}
    assert "Nine choices" in text("learning_a_mask") and len(lines) == 9
    here, printed, code = LearnConfig(), LearnConfig.paper("sdxl"), LearnConfig.paper("sdxl", "code")
    assert (here.regulariser, printed.regulariser, code.regulariser) == ("l0", "l1", "l1")
    assert (here.reconstruction, printed.reconstruction, code.reconstruction) == ("mse", "norm", "mse")
    assert here.normalize and not printed.normalize and not code.normalize
    assert here.target_open and printed.target_open is None and code.target_open is None
    for cells, config in ((ours, here), (papers, printed), (codes, code)):
        assert cells["δ"].startswith(f"{config.delta:g}")
        assert cells["start of λ"] == f"{config.log_alpha_start:g}"
        assert cells["updates × prompts"] == f"{config.updates} × {config.batch_size}"
        assert cells["weight decay"] == (f"{config.weight_decay:g}" if config.weight_decay else "none")
        assert cells["noise $z_T$"].startswith("one for all") == config.fixed_noise
    assert (here.recompute, code.recompute) == ("restore", "redraw")


def test_openmoji_sd2_loses_heads_of_both_kinds_alike():
    torch = pytest.importorskip("torch")
    from ecodiff.lab import studies
    from ecodiff.lab.studies.measure import learned_gates
    from ecodiff.pipelines.loading import load_once

    pipe, cell = load_once("openmoji-sd2"), studies.base("openmoji-sd2")
    gates = learned_gates(pipe, cell.captions(), cell.seeded)
    mask = gates.mask(ratio=0.2)
    gone = {leaf: torch.cat([~mask[name] for name in mask if name.endswith(leaf)]) for leaf in ("attn1", "attn2")}
    self_heads, cross_heads = gone["attn1"], gone["attn2"]
    said = (f"loses {self_heads.sum()} of its {self_heads.numel()} self-attention heads and "
            f"{cross_heads.sum()} of its {cross_heads.numel()} cross-attention heads")  # fmt: skip
    assert said in text("learning_a_mask")
    middle = sum(int((~mask[name]).sum()) for name in mask if name.startswith("mid_block") and "attn" in name)
    assert middle == self_heads.sum() + cross_heads.sum() - 1, "nearly all of them in the middle block"


def test_what_a_fifth_of_the_units_costs_is_what_the_rows_say():
    """Means of seed 0 of both models in the chapter on the smaller model."""
    from ecodiff.lab import studies

    said = text("a_smaller_model")
    sdxl, flux = (studies.recorded("main", f"openmoji-{name}", seeds=1) for name in ("sdxl", "flux-dev"))

    def lost(rows):
        (ssim,) = (cell["ssim"] for cell in rows["learned, 20%"])
        return 1 - sum(ssim) / len(ssim)

    assert f"costs a learned mask {lost(sdxl):.3f} of SSIM and no facts that could be told from zero" in said
    facts = studies.paired(sdxl, "learned, 20%", "original", "facts")
    assert facts.low <= 0 <= facts.high
    assert f"it costs {lost(flux):.3f} of SSIM" in said
    original, learned, random, magnitude = (
        percent(flux[row], "facts") for row in ("original", "learned, 20%", "random, 20%", "magnitude, 20%")
    )
    assert f"fall from {original:.1f} to {learned:.1f} %" in said
    assert f"random removal leaves {random:.1f} % of the images right, and magnitude {magnitude:.1f} %" in said
    more = studies.paired(sdxl, "magnitude, 20%", "random, 20%").mean
    assert f"magnitude keeps {more:.3f} more SSIM than random removal at 20 %" in said


def test_published_says_whether_it_is_the_paper_or_the_code():
    """In prose, code is the authors' and not "published": what is published stands in the paper."""
    for chapter in PROSE:
        prose = re.sub(r"  # .*", "", text(chapter))
        assert not re.search(r"published (code|loop)\b", prose), chapter
    sources = (root() / "book" / "references.bib").read_text(encoding="utf-8")
    assert "zhang2025ecodiffcode" in sources and "00aa5f1" in sources and "openreview.net" in sources


def test_a_chapter_is_linked_and_not_numbered():
    for source in CHAPTERS.values():
        assert not re.search(r"\b[Cc]hapter \d", source.read_text(encoding="utf-8")), source.name


def test_what_depends_on_a_reading_is_no_erratum():
    """12 billion over 860 million is 14 times as many and 13 times more: the paper's 13 can be defended."""
    conclusions = " ".join(erratum().conclusion for erratum in errata.ERRATA)
    assert "times larger" not in conclusions and "exchanged rows" not in conclusions
    assert "80 GB GPUs that the paper uses" in conclusions
