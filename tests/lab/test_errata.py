"""Errata: all are confirmed by their computation, and the ones that are known in detail have the known numbers."""

import pytest

from ecodiff.lab import errata, paper
from ecodiff.lab.errata import algebra, arithmetic, versions


@pytest.mark.parametrize("erratum", errata.ERRATA, ids=lambda function: function.__name__)
def test_computation_confirms_it(erratum):
    found = erratum()
    assert found.confirmed and found.where and found.conclusion.endswith(".")
    for line in found.rows():
        assert all(line.values()) and line["agrees"] in ("yes", "no")


def agreeing(erratum):
    return [line.agrees for line in erratum().lines]


def test_two_of_the_eight_differences_are_wrong():
    wrong = {line.what: line.computed for line in arithmetic.fid_differences().lines if not line.agrees}
    assert wrong == {"SDXL 20%, flickr: FID drop": "6.50", "FLUX 10%, coco: FID rise": "1.17"}


def test_lines_for_comparison_agree():
    assert agreeing(arithmetic.one_cell) == [True, False, False]
    assert agreeing(arithmetic.beta_of_flux) == [True, True, False]
    assert agreeing(arithmetic.without_loss) == [True, False, False]
    assert agreeing(arithmetic.table_of_retraining) == [False, True]
    assert agreeing(algebra.update_sign) == [False, True]
    assert agreeing(algebra.log_of_lambda) == [False, True] * 4
    assert agreeing(algebra.two_betas) == [False, True]
    assert agreeing(algebra.checkpointing) == [False, False, True]
    assert agreeing(algebra.gated_activation) == [True, False]


def test_what_does_not_fit_between_the_versions():
    assert len(errata.VERSIONS) == 5
    assert agreeing(versions.schnell_twice) == [True, True, True, False, False, False]
    assert agreeing(versions.two_protocols) == [False] * 4 + [True] * 2
    assert agreeing(versions.speedups) == [True] * 9 + [False]
    assert not any(agreeing(versions.rebuilt_baseline))
    assert [(line.published, line.computed) for line in versions.changed_sign().lines] == [
        ("-1.09", "+4.76"),
        ("-6.50", "+6.96"),
    ]
    assert all("second-hand" in erratum().where for erratum in errata.VERSIONS)


def test_an_error_that_is_corrected_is_no_longer_confirmed(monkeypatch):
    corrected = {"sdxl_flickr_fid_drop_20": 6.5, "flux_coco_fid_rise_10": 1.17}
    monkeypatch.setattr(arithmetic, "claim", lambda name: corrected.get(name, paper.claim(name)))
    assert not arithmetic.fid_differences().confirmed


def test_the_formulas_are_those_of_the_package():
    torch = pytest.importorskip("torch")
    from ecodiff.method.hard_concrete import HardConcrete

    free, sdxl = HardConcrete(delta=0.0), HardConcrete(delta=0.5)
    for value in (-1.0, 0.0, 2.0):
        at = torch.tensor([value])
        assert algebra.open_gates(value) == pytest.approx(free.prob_open(at).item(), abs=1e-3)
        for u in (0.1, 0.7):
            mine = algebra.gate(value + algebra.noise(u, 0.5))
            assert mine == pytest.approx(sdxl.sample(at, torch.tensor([u])).item(), abs=1e-5)
    assert algebra.stretched(sdxl.saturation - algebra.noise(1.0, 0.5)) == pytest.approx(1.0, abs=1e-6)
