"""The language of the CPU kernels: its arithmetic is Python's, and what is outside it is refused with its line."""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.errors import InternalError
from graphwright.kernels import llvm
from graphwright.kernels.expressions import Text
from graphwright.kernels.native import unavailable
from graphwright.kernels.tile import apart, bits, device, f32, f64, from_bits, i8, i32, i64, real, u8
from graphwright.kernels.translate import translate

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
_SEVEN = np.int64(7)


def compiled(body: Callable[[int], None]) -> Callable[..., list[int]]:
    """Run a body on sixteen int64 slots that begin with the numbers given; gives the slots as they are afterwards."""
    name = body.__name__
    owner, address = llvm.linked(llvm.compiled(translate(body, name)), name)
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)

    def run(*numbers: int) -> list[int]:
        slots = np.zeros(16, np.int64)
        slots[: len(numbers)] = numbers
        call(slots.ctypes.data)
        assert owner
        return slots.tolist()

    return run


def _arithmetic(params):
    p = i64(params)
    x, y = p[0], p[1]
    p[2], p[3], p[4], p[5], p[6] = x // y, x % y, x // 8, x % 8, x // -8
    p[7], p[8], p[9] = x & y, x | y, x ^ y
    p[10], p[11], p[12] = min(x, y, 5), max(x, y), -x
    p[13] = 1 if x < y <= 100 and not (y == 50 or y == 51) else (2 if x == 3 or y == 3 else 3)
    p[14] = x // (y - y)  # no trap
    p[15] = np.int32(x * 65537)


@pytest.fixture(scope="module")
def arithmetic() -> Callable[..., list[int]]:
    return compiled(_arithmetic)


@settings(max_examples=60, deadline=None)
@given(st.integers(-10**6, 10**6), st.integers(-10**3, 10**3).filter(bool))
def test_integers_are_pythons(arithmetic: Any, x: int, y: int) -> None:
    got = arithmetic(x, y)[2:]
    choice = 1 if x < y <= 100 and y not in (50, 51) else (2 if x == 3 or y == 3 else 3)
    wrapped = (x * 65537 + 2**31) % 2**32 - 2**31
    assert got[:12] == [x // y, x % y, x // 8, x % 8, x // -8, x & y, x | y, x ^ y, min(x, y, 5), max(x, y), -x, choice]
    assert got[13] == wrapped


@device
def first_over(values, n, limit):
    for i in range(n):
        if values[i] > limit:
            return i
    return np.int64(-1)


@device
def both(x, y):
    return x + y, x - y


@device
def doubled(x):
    apart()
    return x * real(2)


def _control(params):
    p = i64(params)
    p[4] = first_over(p, 4, 10)
    total, k = 0, 0
    while True:
        k += 1
        if k % 2 == 0:
            continue
        if k > _SEVEN:
            break
        total += k
    p[5], p[6] = total, k
    for i in range(1, 10, 4):
        for j in range(i):
            if j == 3:
                break
            p[7] += 1
    p[8], p[9] = both(p[0], p[1])
    i = 100
    for i in range(3):
        i = i * 10  # what is done to the variable does not change how often it goes round
    p[10] = i


def test_loops_and_returns() -> None:
    got = compiled(_control)(3, 11, 50, 2)
    assert got[4] == 1 and got[5:7] == [1 + 3 + 5 + 7, 9]
    assert got[7] == sum(1 for i in range(1, 10, 4) for j in range(i) if j < 3)
    assert got[8:11] == [14, -8, 20]
    assert compiled(_control)(1, 2, 3, 4)[4] == -1


def _kinds(params):
    p = i64(params)
    f, d, b, s, w = f32(params + 64), f64(params + 80), u8(params + 96), i8(params + 104), i32(params + 112)
    f[0] = doubled(real(p[0])) / real(3)
    f[1] = from_bits(np.int32(bits(f[0]) | np.int32(1 << 31)))
    d[0] = d[1]
    b[0], s[0], w[0] = p[1], p[1], p[1]
    p[2], p[3], p[4] = b[0], s[0], np.int32(f[0])
    p[5] = 1 if f[1] < f[0] else 2
    p[6] = 1 if f[0] != f[0] else 2


def test_kinds_convert_as_they_say() -> None:
    slots = compiled(_kinds)(100, 200)
    f = np.array(slots, np.int64)[8:9].view(np.float32)
    assert f.tolist() == [np.float32(200) / np.float32(3), -np.float32(200) / np.float32(3)]
    assert slots[2:7] == [200, -56, 66, 1, 2]


def _decided(params):
    p = i64(params)
    if _SEVEN == 8:
        p[0] = no_such_name  # noqa: F821  never looked up: the test is decided before
    elif _SEVEN > 3 and _SEVEN < 10:
        p[0] = 1
    p[1] = _SEVEN * 6 if _SEVEN else no_such_name  # noqa: F821


def test_what_constants_decide_is_decided_beforehand() -> None:
    assert compiled(_decided)()[:2] == [1, 42]


def _mixed(params):
    f = f32(params)
    f[0] = f[0] * 2


def _rebound(params):
    x = i64(params)
    x = real(1)  # noqa: F841


def _strange(params):
    p = i64(params)
    p[0] = [1, 2]


def _unknown(params):
    i64(params)[0] = print(1)


def _widened(params):
    p = i64(params)
    p[0] = f32(params)[0]


def _steps(params):
    for i in range(10, 0, i64(params)[0]):  # noqa: B007
        pass


@pytest.mark.parametrize(("body", "line", "what"), [
    (_mixed, 2, "Mult of a float32 and a int64"), (_rebound, 2, "becomes a float32"), (_strange, 2, "not part of the language"),
    (_unknown, 1, "print"), (_widened, 2, "float32 where a int64"), (_steps, 1, "positive constant"),
])  # fmt: skip
def test_what_is_outside_the_language_is_refused_with_its_line(body: Any, line: int, what: str) -> None:
    with pytest.raises(InternalError) as caught:
        translate(body, "refused")
    assert what in str(caught.value)
    assert f"{__file__}:{body.__code__.co_firstlineno + line}" in str(caught.value)


def _many(params):
    p = i64(params)
    a, b, c, d, e = f32(p[0]), f32(p[1]), f32(p[2]), f32(p[3]), f32(p[4])
    for i in independent(p[5]):  # noqa: F821
        e[i] = a[i] * b[i] + c[i] * d[i]


def test_turns_that_are_independent_need_no_check_for_overlaps() -> None:
    marked = translate(_many, "many")
    assert str(marked).count("!llvm.access.group") == 5 and "llvm.loop.parallel_accesses" in str(marked)
    ranged = Text("many", inspect.getsource(_many).replace("independent(", "range(").replace("_many", "many"), _many.__globals__)
    compares = [_optimized(m).count("icmp ult") for m in (marked, translate(ranged, "many"))]
    assert compares[0] < compares[1]  # the addresses of what is written and read are compared before the loop


def _optimized(module: Any) -> str:
    from llvmlite import binding

    machine = llvm._machine()
    parsed = binding.parse_assembly(str(module))
    parsed.triple, parsed.data_layout = machine.triple, str(machine.target_data)
    builder = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=3))
    builder.getModulePassManager().run(parsed, builder)
    return str(parsed)


def test_a_kernel_may_be_a_text() -> None:
    text = Text("twice", "def twice(params):\n    p = i64(params)\n    p[0] = p[0] * 2\n", {"i64": i64})
    assert compiled(text)(21)[0] == 42
    with pytest.raises(InternalError, match="<wrong>:2"):
        translate(Text("wrong", "def wrong(params):\n    unknown(params)\n", {}), "wrong")
