"""Budgets exact to one unit, ties, scopes, rounding, bad input, and the published SDXL masks."""

import csv
from dataclasses import replace

import pytest
import torch
from tiny import SDXL, full_size

from ecodiff import EcoDiffError, Gates, find_sites, make_mask
from ecodiff.method.multiples import MULTIPLES
from ecodiff.method.sites import Site, Span


def site(name, kind, units, params=1, flops=None):
    return Site(name, kind, units, 1, (Span(name, 0, 1),), (), params, flops)


SITES = {
    s.name: s
    for s in (
        site("block.0.attn", "attention", 4, params=100, flops=700),
        site("block.1.attn", "attention", 6, params=50, flops=900),
        site("block.0.ff", "feed_forward", 40, params=7, flops=30),
        site("block.10.ff", "feed_forward", 20, params=11, flops=10),
        site("block.2.ff", "feed_forward", 30, params=3, flops=20),
    )
}
COST = {"units": lambda s: 1, "parameters": lambda s: s.params_per_unit, "flops": lambda s: s.flops_per_unit}


def scores(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(s.units, generator=generator) for name, s in SITES.items()}


def groups(scope):
    key = {"global": lambda s: 0, "kind": lambda s: s.kind, "local": lambda s: s.name}[scope]
    found = {}
    for s in SITES.values():
        found.setdefault(key(s), []).append(s)
    return found.values()


@pytest.mark.parametrize("scope", ["global", "kind", "local"])
@pytest.mark.parametrize("count", COST)
@pytest.mark.parametrize("ratio", [0, 0.1, 0.29, 0.5, 0.83, 0.999])
def test_budget_is_met_to_one_unit_and_the_lowest_go(scope, count, ratio):
    values = scores()
    mask = make_mask(values, SITES, ratio, scope=scope, count=count)
    assert list(mask) == list(values) and all(keep.dtype == torch.bool for keep in mask.values())
    for members in groups(scope):
        removed = sum(COST[count](s) * int((~mask[s.name]).sum()) for s in members)
        budget = ratio * sum(COST[count](s) * s.units for s in members)
        flat = sorted(
            (values[s.name][i].item(), bool(mask[s.name][i]), COST[count](s)) for s in members for i in range(s.units)
        )
        kept = [keep for _, keep, _ in flat]
        assert kept == sorted(kept)  # everything removed scores below everything kept
        next_cost = next(cost for _, keep, cost in flat if keep)
        assert removed <= budget + 1e-6 < removed + next_cost


def test_ratio_is_a_decimal_number_not_its_float():
    s = {"ff": site("ff", "feed_forward", 100)}
    for percent in range(100):
        mask = make_mask({"ff": torch.arange(100.0)}, s, percent / 100)
        assert int((~mask["ff"]).sum()) == percent


def test_ties_go_from_the_end_whatever_the_order_of_the_scores():
    equal = {name: torch.zeros(s.units) for name, s in SITES.items()}
    mask = make_mask(equal, SITES, 0.25)
    backwards = make_mask(dict(reversed(equal.items())), SITES, 0.25)
    assert all(torch.equal(mask[name], backwards[name]) for name in SITES)
    # 22 of 90 neurons: all of block.10 and the last two of block.2 (numbers by value, not by letter)
    assert [int(mask[f"block.{i}.ff"].sum()) for i in (0, 2, 10)] == [40, 28, 0]
    assert mask["block.2.ff"][:28].all()
    assert mask["block.1.attn"].tolist() == [True] * 4 + [False] * 2


def test_ratio_per_kind():
    mask = make_mask(scores(), SITES, {"attention": 0.5})
    kept = {
        kind: sum(int(mask[s.name].sum()) for s in SITES.values() if s.kind == kind)
        for kind in ("attention", "feed_forward")
    }
    assert kept == {"attention": 5, "feed_forward": 90}


def test_round_to_gives_the_best_removed_units_back():
    values = scores()
    plain = make_mask(values, SITES, 0.4)
    rounded = make_mask(values, SITES, 0.4, round_to={"feed_forward": 8})
    for name, s in SITES.items():
        assert (rounded[name] | ~plain[name]).all()
        if s.kind == "attention":
            assert torch.equal(rounded[name], plain[name])
        else:
            kept, before = int(rounded[name].sum()), int(plain[name].sum())
            assert kept == min(s.units, -(-before // 8) * 8)
            if not rounded[name].all():
                assert values[name][rounded[name]].min() > values[name][~rounded[name]].max()
    assert make_mask(values, SITES, 0.4, round_to=1000)["block.0.ff"].all()


def test_round_to_by_name_counts_channels():
    wide = {"ff": site("ff", "feed_forward", 200)}
    heads = {"attn": replace(site("attn", "attention", 200), unit_size=40)}
    for name, channels in MULTIPLES.items():
        for sites in (wide, heads):
            values = {key: torch.rand(200, generator=torch.Generator().manual_seed(0)) for key in sites}
            plain, rounded = make_mask(values, sites, 0.43), make_mask(values, sites, 0.43, round_to=name)
            for key, one in sites.items():
                before, kept = (int(mask[key].sum()) for mask in (plain, rounded))
                assert kept >= before and kept * one.unit_size % channels == 0
                # No smaller number of units would do.
                assert all(units * one.unit_size % channels for units in range(before, kept))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 1.0}, r"in \[0, 1\)"),
        ({"ratio": -0.1}, r"in \[0, 1\)"),
        ({"ratio": float("nan")}, r"in \[0, 1\)"),
        ({"ratio": "0.2"}, r"in \[0, 1\)"),
        ({"ratio": {"heads": 0.2}}, "unknown kind"),
        ({"ratio": {"attention": 0.2}, "scope": "global"}, "one ratio"),
        ({"scope": "layer"}, "scope is one of"),
        ({"count": "bytes"}, "count one of"),
        ({"round_to": 0}, "round_to"),
        ({"round_to": "int4"}, "one of tensor-cores, int8, fp8, 2:4; not 'int4'"),
        ({"scores": {}}, "no scores"),
        ({"scores": {"elsewhere": torch.ones(3)}}, "another model"),
        ({"scores": {"block.0.ff": torch.ones(3)}}, "40 units"),
        ({"scores": {"block.0.ff": torch.full((40,), float("nan"))}}, "not a number"),
    ],
)
def test_bad_input(change, message):
    arguments = {"scores": scores(), "sites": SITES, "ratio": 0.2, **change}
    with pytest.raises(EcoDiffError, match=message):
        make_mask(**arguments)


def test_flops_need_measured_sites():
    s = {"ff": site("ff", "feed_forward", 4)}
    with pytest.raises(EcoDiffError, match="with_flops"):
        make_mask({"ff": torch.ones(4)}, s, 0.5, count="flops")


def test_published_sdxl_masks(shared_file):
    from safetensors.torch import load_file

    published = load_file(shared_file("data/sdxl_published_lambda.safetensors"))
    gates = Gates.from_tensors(published, full_size("UNet2DConditionModel", **SDXL))
    with open(shared_file("data/sdxl_published_masks.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 210
    for ratio, column in ((0.1, "kept_at_0.9"), (0.2, "kept_at_0.8")):
        mask = gates.mask(ratio)
        assert {row["module"]: int(row[column]) for row in rows} == {
            name: int(keep.sum()) for name, keep in mask.items()
        }
        # The authors' loader clamps negative λ of neurons to 0; at these ratios that changes no module's count.
        clamped = {n: v.clamp(min=0) if gates.sites[n].kind == "feed_forward" else v for n, v in gates.scores().items()}
        again = make_mask(clamped, gates.sites, ratio)
        assert [int(keep.sum()) for keep in again.values()] == [int(keep.sum()) for keep in mask.values()]


def test_sites_of_a_model_without_scores_are_left_out():
    model = full_size("UNet2DConditionModel", **SDXL)
    sites = find_sites(model)
    one = next(iter(sites))
    assert list(make_mask({one: torch.rand(sites[one].units)}, sites, 0.5)) == [one]
