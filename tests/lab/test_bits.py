"""Weights rounded to few bits, the bytes they take, and the table that a page shows of them."""

import pytest
import torch

from ecodiff.lab.benchmarks import bits
from ecodiff.storage import records
from ecodiff.storage.paths import root


@pytest.mark.parametrize("number", [8, 4, 2])
def test_weights_have_as_many_values_as_bits_allow_in_each_channel(number):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(300, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 0, bias=False))
    before = network[0].weight.clone()
    small = bits.rounded(network, number)
    assert torch.equal(network[0].weight, before) and torch.equal(small[1].weight, network[1].weight)
    last = 2 ** (number - 1) - 1
    for channel, original in zip(small[0].weight, before, strict=True):
        assert 1 < len(channel.unique()) <= 2 * last + 1
        step = original.abs().max() / last
        assert (channel - original).abs().max() <= 0.501 * step + last * step * 2**-11  # the scale has 16 bits


def test_bytes_are_those_of_weights_scales_and_the_rest():
    network = torch.nn.Sequential(torch.nn.Linear(300, 5), torch.nn.LayerNorm(5))
    rest = 5 + 5 + 5  # biases of both, weights of the norm
    assert bits.size(network, 6) == (300 * 5 * 6 + 5 * 16 + rest * 16) // 8


def test_the_table_of_the_page_is_that_of_the_recorded_rows():
    text = (root() / "book" / "how-to-use.md").read_text(encoding="utf-8")
    lines = [bits.line(row) for row in records.rows("bits")]
    assert len(lines) >= 7 and all(line in text for line in (*bits.HEADER, *lines))
    assert text.count("| 0% | ") == sum(line.startswith("| 0% |") for line in lines)
