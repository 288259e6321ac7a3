"""Single removals: the sample, the gates, the changes, and that a row is measured once."""

import pytest
import torch
from tiny import tiny_flux, tiny_sd

import ecodiff
from ecodiff.errors import EcoDiffError
from ecodiff.lab.studies import redundancy
from ecodiff.lab.studies.protocol import Protocol
from ecodiff.lab.studies.redundancy import ONE_LEVEL
from ecodiff.method.hooks import apply_gates
from ecodiff.pipelines.parts import denoiser
from ecodiff.storage import records

SAMPLING = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 16, "width": 16}
PROTOCOL = Protocol(
    model="tiny", num_inference_steps=1, guidance_scale=1.0, call={"height": 16, "width": 16}, features=False
)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "data_dir", lambda: tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def sites():
    return ecodiff.find_sites(denoiser(tiny_sd()))


def test_a_sample_is_fixed_by_its_seed_and_has_each_unit_once(sites):
    units = redundancy.sample_units(sites, 5, seed=1)
    assert units == redundancy.sample_units(sites, 5, seed=1) != redundancy.sample_units(sites, 5, seed=2)
    kinds = [sites[name].kind for name, _ in units]
    assert kinds.count("attention") == kinds.count("feed_forward") == 5 and len(set(units)) == 10
    everything = redundancy.sample_units(sites, 10**6)
    assert sorted(everything) == sorted((name, i) for name, site in sites.items() for i in range(site.units))
    with pytest.raises(EcoDiffError, match="at least one unit"):
        redundancy.sample_units(sites, 0)


def test_gates_are_zero_for_these_units_only(sites):
    first, second = list(sites)[:2]
    values = redundancy.without([(first, 0), (first, 1), (second, 1)], sites)
    assert set(values) == {first, second}
    assert values[first].tolist() == [0.0, 0.0] + [1.0] * (sites[first].units - 2)
    assert values[second].sum() == sites[second].units - 1


def test_change_is_in_levels():
    original = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    other = original.clone()
    other[1] += 3
    assert redundancy.change(other, original) == {"rms": [0.0, 3.0], "ssim": [1.0, pytest.approx(0.999, abs=2e-3)]}


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_sd, tiny_flux])
def test_removals_of_a_model_with_a_dead_unit(make):
    pipe = make()
    network = denoiser(pipe)
    found = ecodiff.find_sites(network)
    name, index = redundancy.sample_units(found, 2)[-1]  # a neuron
    for span in found[name].readers:  # nothing reads what it writes
        first = span.offset + index * span.size
        with torch.no_grad():
            network.get_submodule(span.layer).weight[:, first : first + span.size] = 0
    sampling = SAMPLING | ({"max_sequence_length": 12} if make is tiny_flux else {})
    values = redundancy.removals(pipe, ["a red apple", "a cat"], [0, 1], sampling, 2, 0)
    assert values["units"][-1] == [name, index, "feed_forward"] and len(values["units"]) == len(values["rms"]) == 4
    assert values["population"]["feed_forward"] == sum(s.units for s in found.values() if s.kind == "feed_forward")
    assert values["rms"][-1] == [0.0, 0.0] and max(redundancy.worst(values)) > 0
    limits = redundancy.limits(values)
    assert list(limits) == ["another batch shape", "bf16 arithmetic", "one level"]
    assert limits["one level"] == ONE_LEVEL and limits["another batch shape"] < 0.5
    hidden = [level <= ONE_LEVEL for level in redundancy.worst(values)]
    assert values["together"]["units"] == sum(hidden)
    assert redundancy.worst(values, "attention") == redundancy.worst(values)[:2]


@pytest.mark.slow
def test_a_removal_is_what_the_gate_of_that_unit_draws():
    pipe = tiny_sd()
    values = redundancy.removals(pipe, ["a red apple"], [3], SAMPLING, 1, 0)
    (name, index, _), found = values["units"][0], ecodiff.find_sites(denoiser(pipe))
    options = {"progress": False, **SAMPLING}
    whole = ecodiff.generate(pipe, ["a red apple"], [3], **options)
    with apply_gates(denoiser(pipe), redundancy.without([(name, index)], found)):
        gone = ecodiff.generate(pipe, ["a red apple"], [3], **options)
    assert redundancy.change(gone, whole) == {key: values[key][0] for key in ("rms", "ssim")}


def test_a_row_is_measured_once_and_again_for_other_settings(store, monkeypatch):
    pipe, runs = tiny_sd(), []
    monkeypatch.setattr(redundancy, "removals", lambda *arguments: runs.append(arguments) or {"units": []})
    first = redundancy.measure(pipe, PROTOCOL, per_kind=2, prompts=1)
    again = redundancy.measure(pipe, PROTOCOL, per_kind=2, prompts=1)
    assert len(runs) == 1 and again["recorded"] and first["values"] == again["values"]
    redundancy.measure(pipe, PROTOCOL, per_kind=2, prompts=1, seed=1)
    redundancy.measure(pipe, PROTOCOL, per_kind=2, prompts=1, recompute=True)
    assert len(runs) == 3 and len(records.rows("redundancy")) == 2
