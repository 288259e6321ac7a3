"""Numbers that the chapters on settings and on what comes after pruning state in prose, against the recorded rows."""

import re

import pytest

from ecodiff.lab import studies
from ecodiff.lab.book import build

CHAPTERS = {source.stem[3:]: source for source in build.sources()}
SDXL, DEV, SCHNELL = studies.SDXL, studies.DEV, studies.SCHNELL
LORA, FULL = ", LoRA", ", all weights"

# chapter, study, model, row, the row it is compared with, measure, the size of the difference as it is stated
DIFFERENCES = [
    ("settings", "beta", SCHNELL, "β = 0.5", "β until 80 % are open", "ssim", "0.117"),
    ("settings", "beta", SCHNELL, "β = 0.5", "β until 80 % are open", "facts", "16.0"),
    ("settings", "beta", SCHNELL, "β = 8", "β until 80 % are open", "ssim", "0.039"),
    ("settings", "beta", SCHNELL, "β = 8", "β until 80 % are open", "facts", "24.0"),
    ("settings", "data_size", SCHNELL, "1 prompts", "100 prompts", "ssim", "0.090"),
    ("settings", "data_size", SDXL, "1 prompts", "100 prompts", "ssim", "0.052"),
    ("settings", "scope", SDXL, "local", "kind", "ssim", "0.079"),
    ("settings", "scope", DEV, "local", "kind", "ssim", "0.085"),
    ("settings", "scope", DEV, "local", "kind", "facts", "13.5"),
    ("settings", "kinds", DEV, "neurons only", "both", "ssim", "0.090"),
    ("settings", "kinds", DEV, "neurons only", "both", "facts", "16.5"),
    ("settings", "l1", DEV, "L1, β = 0.5", "L0, β = 4", "ssim", "0.223"),
    ("settings", "l1", DEV, "L1, β = 0.5", "L0, β = 4", "facts", "46.0"),
    ("settings", "choices", DEV, "and shared by all samples", "corrected", "ssim", "0.070"),
    ("settings", "choices", DEV, "one step at a time", "corrected", "ssim", "0.061"),
    ("settings", "choices", DEV, "as the published code", "corrected", "ssim", "0.057"),
    ("settings", "choices", DEV, "gates kept through all steps", "corrected", "ssim", "0.038"),
    ("settings", "choices", DEV, "one noise for all prompts", "corrected", "ssim", "0.018"),
    ("settings", "relaxation", DEV, "temperature 1.5", "default", "ssim", "0.138"),
    ("settings", "relaxation", DEV, "L1, δ = 0.1, λ starts at 5", "L1, δ = 0.1", "ssim", "0.044"),
    ("settings", "relaxation", DEV, "L1, δ = 0.1, λ starts at 5", "L1, δ = 0.1", "facts", "12.5"),
    ("settings", "relaxation", DEV, "L1, δ = 0.1", "L1, δ = 0", "facts", "11.0"),
    ("settings", "soft", SDXL, "times their gates, none cut", "cut", "ssim", "0.022"),
    ("settings", "soft", DEV, "times their gates, none cut", "cut", "ssim", "0.021"),
    (
        "settings",
        "transfer",
        SCHNELL,
        "learned on the model it was distilled from",
        "learned in 4 steps",
        "ssim",
        "0.004",
    ),
    ("settings", "transfer", DEV, "learned in 4 steps", "learned in 8 steps", "ssim", "0.024"),
    ("settings", "transfer", SCHNELL, "learned in 2 steps", "learned in 4 steps", "ssim", "0.019"),
    ("settings", "transfer", SCHNELL, "learned in 1 steps", "learned in 4 steps", "ssim", "0.054"),
    ("settings", "transfer", DEV, "learned on held-out pairs", "learned in 8 steps", "ssim", "0.057"),
    ("after_pruning", "retraining", SDXL, f"original{LORA}", "original", "ssim", "0.231"),
    ("after_pruning", "retraining", SDXL, f"original{FULL}", "original", "ssim", "0.325"),
    ("after_pruning", "retraining", DEV, f"original{LORA}", "original", "ssim", "0.185"),
    ("after_pruning", "retraining", SDXL, f"learned, 30%{LORA}", "learned, 30%", "ssim", "0.227"),
    ("after_pruning", "retraining", SDXL, f"learned, 30%{LORA}, a tenth of the rate", "learned, 30%", "ssim", "0.050"),
    ("after_pruning", "retraining", SDXL, f"learned, 50%{LORA}", "learned, 50%", "ssim", "0.222"),
    ("after_pruning", "retraining", SDXL, f"random, 50%{LORA}", "random, 50%", "facts", "16.5"),
    ("after_pruning", "retraining", DEV, f"learned, 50%{LORA}", "learned, 50%", "ssim", "0.131"),
    ("after_pruning", "retraining", DEV, f"learned, 50%{LORA}", "learned, 50%", "facts", "50.5"),
    ("after_pruning", "retraining", DEV, f"learned, 30%{LORA}", "learned, 30%", "facts", "39.0"),
    ("after_pruning", "retraining", DEV, f"learned, 30%{LORA}", "learned, 30%", "ssim", "0.046"),
    ("after_pruning", "retraining", DEV, f"learned, 30%{FULL}", f"random, 30%{FULL}", "facts", "18.0"),
    ("after_pruning", "retraining", DEV, f"learned, 50%{FULL}", f"random, 50%{FULL}", "facts", "25.5"),
    ("after_pruning", "main", studies.SD2, "learned, 20%", "original", "ssim", "0.003"),
    ("after_pruning", "main", DEV, "learned, 20%", "original", "ssim", "0.139"),
    ("after_pruning", "main", SCHNELL, "learned, 20%", "original", "ssim", "0.128"),
    ("after_pruning", "main", DEV, "learned, 20%", "original", "facts", "13.0"),
    ("after_pruning", "main", SCHNELL, "learned, 20%", "original", "facts", "17.7"),
]


def prose(chapter: str) -> str:
    """What a chapter says outside of its code."""
    return re.sub(r"^```\{code-cell\}.*?^```$", "", CHAPTERS[chapter].read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.mark.parametrize(("chapter", "study", "model", "row", "reference", "measure", "stated"), DIFFERENCES)
def test_a_difference_in_prose_is_the_recorded_one(chapter, study, model, row, reference, measure, stated):
    rows = studies.recorded(study, model, only=[row, reference])
    shown = studies.minus(rows, row, reference, measure)
    assert shown.split()[0].lstrip("+-") == stated, shown
    assert stated in prose(chapter)


def test_no_fact_decides_about_a_choice():
    rows = studies.recorded("choices", DEV)
    words = [studies.paired(rows, row, "corrected", "facts").word for row in rows if row != "corrected"]
    assert set(words) == {"undecided"} and len(words) == 7
    assert "no interval excludes an irrelevant one" in prose("settings")


def test_the_best_beta_of_l1_differs_between_the_models():
    """That is why the chapter says that no β serves both."""
    best = {}
    for model in (SDXL, DEV):
        rows = studies.recorded("l1", model, 1)
        means = {row: sum(cells[0]["ssim"]) for row, cells in rows.items() if row.startswith("L1")}
        best[model] = max(means, key=means.get)
    assert best == {SDXL: "L1, β = 0.01", DEV: "L1, β = 0.05"}
