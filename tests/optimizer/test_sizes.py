"""Conditions on sizes as functions: what sympy says of them, for every number."""

from __future__ import annotations

import sympy
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._sympy.functions import FloorDiv, Max, Mod

from graphwright.ir import Span
from graphwright.sizes import always, as_function

A, B = sympy.symbols("s0 s1", integer=True, positive=True)
TERMS = [A, B, sympy.Integer(3), FloorDiv(A, 2), FloorDiv(A * B, 3), Mod(A, 4), Max(A, 5), A**2 - B]


@given(st.sampled_from(TERMS), st.sampled_from(TERMS), st.sampled_from([sympy.Eq, sympy.Ne, sympy.Lt, sympy.Ge]), st.integers(1, 40), st.integers(1, 40))
def test_a_function_says_what_sympy_says(left, right, relation, a, b):
    expression = relation(left, right)
    assert as_function(expression, (A, B))(a, b) == bool(expression.subs({A: a, B: b}))


def test_what_divides_by_zero_does_not_hold():
    test = as_function(sympy.Ne(FloorDiv(A**2, FloorDiv(A, 8)), 5), (A,))
    assert not test(7) and test(8)


def test_conditions_together_and_constants():
    both = sympy.And(A < 5, sympy.Or(sympy.Eq(B, 2), A > 3))
    assert [as_function(both, (A, B))(a, b) for a, b in ((4, 1), (3, 1), (3, 2), (5, 2))] == [True, False, True, False]
    assert as_function(sympy.true, ())() and not as_function(sympy.false, ())()
    assert as_function(sympy.Eq(A / 2, 2), (A,))(4)  # a half is left to sympy


def test_the_name_of_a_size_is_never_run(tmp_path):
    """Names may come from a file."""
    evil = sympy.Symbol(f"open({str(tmp_path / 'ran')!r}, 'w')", integer=True, positive=True)
    assert as_function(evil > 1, (evil,))(2) and always(evil >= 1, {str(evil): Span(1, None, 1)})
    assert not (tmp_path / "ran").exists()


def test_a_function_without_a_form_here_is_left_to_sympy():
    own = sympy.Function("own")
    assert as_function(sympy.Eq(own(A), own(3)), (A,))(3)


def test_what_holds_for_all_sizes_that_are_covered():
    assert always(Mod(A, 4).func(A, 4) >= 0, {"s0": Span(1, None, 1)})
    assert always(sympy.Eq(Mod(A, 4), 0), {"s0": Span(4, None, 4)}) and not always(sympy.Eq(Mod(A, 4), 0), {"s0": Span(4, None, 2)})
    assert not always(A < B, {"s0": Span(1, None, 1)})  # nothing is known of the other
