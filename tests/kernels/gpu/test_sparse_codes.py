"""The bytes that tell places of a 2:4 weight, as NVIDIA's byte permutation takes them: that path runs only on a GPU."""

from __future__ import annotations

from graphwright.kernels.gpu.linear_sparse24 import spread_code


def test_every_code_picks_the_inputs_that_it_names() -> None:
    inputs = [10, 11, 12, 13, 24, 25, 26, 27]  # eight neighbours: two registers of four
    for code in range(256):
        selector = spread_code.fn(code)
        halves = [selector >> 4 * k & 15 for k in range(4)]
        assert selector >> 16 == 0 and max(halves) < 8  # the highest bit would repeat a sign
        places = [code >> 2 * k & 3 for k in range(4)]
        assert [inputs[h] for h in halves] == [inputs[places[0]], inputs[places[1]], inputs[4 + places[2]], inputs[4 + places[3]]]
