"""The tuner: its ranking, what it remembers, and when it holds still. No GPU: devices and clocks are made up."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from graphwright import cache
from graphwright.errors import InternalError
from graphwright.kernel import Cost
from graphwright.kernels.gpu import families, launch, machine, tuning
from graphwright.kernels.gpu.launch import Config, Estimate, Family, Plan

H200 = machine.KNOWN["H200"]


def product(m: int, n: int, k: int, config: Config) -> Estimate:
    """An int8 product, as a kernel would describe it."""
    bm, bn, bk = config["BM"], config["BN"], config["BK"]
    tiles = launch.cdiv(m, bm) * launch.cdiv(n, bn)
    return Estimate(2 * tiles * bm * bn * k, "int8", m * k + n * k + 2 * m * n, tiles * (bm + bn) * k, tiles,
                    (bm + bn) * bk * config.stages, launch.cdiv(k, bk))  # fmt: skip


LARGE = Config.of(BM=128, BN=256, BK=128, warps=8, stages=3)
SMALL = Config.of(BM=16, BN=64, BK=128, warps=4, stages=4)


def test_large_tiles_for_large_products_small_ones_for_few_rows() -> None:
    times = {c: tuning.predict(c, product(8192, 8192, 8192, c), H200) for c in (LARGE, SMALL)}
    assert times[LARGE] < times[SMALL]
    assert 2 * 8192**3 / 1979e12 < times[LARGE] < 2 * 2 * 8192**3 / 1979e12
    times = {c: tuning.predict(c, product(16, 4096, 4096, c), H200) for c in (LARGE, SMALL)}
    assert times[SMALL] < times[LARGE]


def test_no_prediction_beats_the_hardware() -> None:
    for m in (1, 100, 4096):
        for config in (LARGE, SMALL):
            work = product(m, 4096, 4096, config)
            assert tuning.predict(config, work, H200) >= max(work.ops / H200.rate("int8"), work.dram / H200.dram)


def test_an_empty_batch_is_predicted_too() -> None:
    assert 0 < tuning.predict(LARGE, product(0, 4096, 4096, LARGE), H200) < 1e-3


def make(fits=lambda config, *args: None) -> Family:  # type: ignore[no-untyped-def]
    def plan(x, *, config):  # type: ignore[no-untyped-def]
        return Plan((config, x), ())

    return Family("graphwright.quantize_rows", plan, (LARGE, SMALL), lambda x: None, lambda c, x: product(x.shape[0], 4096, 4096, c),
                  lambda x: (launch.bucket(x.shape[0]),), lambda x: Cost(1, 1), lambda: iter(()), lambda: iter(()), fits, name="made_up")  # fmt: skip


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path) -> list[str]:  # type: ignore[no-untyped-def]
    """An H200 on which LARGE measures faster, whatever is predicted; gives the list of what was timed."""
    timed: list[str] = []

    def fastest(family, args, configs, clock=None):  # type: ignore[no-untyped-def]
        timed.extend(map(str, configs))
        return LARGE

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "here", lambda: H200)
    monkeypatch.setattr(tuning, "fastest", fastest)
    monkeypatch.setattr(tuning, "_chosen", {})
    fresh = cache.JsonCache("triton")
    monkeypatch.setattr(tuning, "_cache", lambda: fresh)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return timed


def test_a_choice_is_timed_once_per_bucket_and_remembered(pretend: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    family = make()
    assert tuning.choose(family, [torch.empty(5, 1)]) == LARGE and len(pretend) == 2
    assert tuning.choose(family, [torch.empty(7, 1)]) == LARGE and len(pretend) == 2  # the same bucket
    monkeypatch.setattr(tuning, "_chosen", {})
    assert tuning.choose(family, [torch.empty(8, 1)]) == LARGE and len(pretend) == 2  # from the disk
    tuning.choose(family, [torch.empty(9, 1)])
    assert len(pretend) == 4


def test_nothing_is_timed_in_frozen_or_captured_regions(pretend: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with tuning.frozen():
        assert tuning.choose(make(), [torch.empty(5, 1)]) == SMALL
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.choose(make(), [torch.empty(5, 1)]) == SMALL
    assert pretend == [] and tuning._chosen == {}


def test_a_remembered_config_that_does_not_fit_is_not_taken(pretend: list[str]) -> None:
    family = make(lambda config, x: "too large" if config == LARGE and x.shape[0] == 7 else None)
    assert tuning.choose(family, [torch.empty(5, 1)]) == LARGE
    tuning.choose(family, [torch.empty(7, 1)])
    assert pretend[2:] == [str(SMALL)]


def test_fastest_passes_over_what_fails_and_keeps_to_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    family, x = make(), torch.empty(1, 1)

    def clock(call):  # type: ignore[no-untyped-def]
        config = call()[0]
        if config == LARGE:
            raise RuntimeError("out of resources")
        return 1.0

    assert tuning.fastest(family, [x], [LARGE, SMALL], clock) == SMALL
    with pytest.raises(InternalError, match="out of resources"):
        tuning.fastest(family, [x], [LARGE], clock)
    monkeypatch.setattr(tuning, "SECONDS", -1.0)
    seen = []
    assert tuning.fastest(family, [x], [SMALL, LARGE], lambda call: seen.append(call()) or 1.0) == SMALL
    assert len(seen) == 1


def test_every_family_has_an_estimate_for_every_config() -> None:
    for family in families().values():
        for _, args in family.ahead():
            for config in family.configs:
                if family.fits(config, *args) is None:
                    seconds = tuning.predict(config, family.estimate(config, *args), H200)
                    assert 0 < seconds < 1, f"{family.name} under {config}"
            hash(family.bucket(*args))
