"""Lifetimes of values: runs in which dead memory is overwritten, and offsets in an arena."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import graphwright as gw
from graphwright.capture import capture
from graphwright.errors import InternalError
from graphwright.lower import lower
from graphwright.lower.arena import ALIGNMENT, Value, assign, figures, most, observe
from graphwright.lower.liveness import deaths, groups, run_poisoned
from graphwright.lower.runner import Step
from graphwright.manager import Pipeline
from graphwright.memory import peak
from graphwright.passes.pipeline import resolve

_spec = importlib.util.spec_from_file_location("random_programs", Path(__file__).parents[1] / "passes" / "programs.py")
_programs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_programs)


def runner_of(model, *xs, recipe="default", plan=None):
    """The runner of a recipe; with ``plan={}`` every op as it stands, and no stopwatch."""
    program = capture(model.eval(), xs).program
    program.example, program.calibration = xs, [xs]
    program = Pipeline(resolve(recipe)).run(program)[0]
    return lower(program, allowed={"f32", "int8"} if "int8" in recipe else {"f32"}, plan=plan).runner


def same(runner, *xs):
    """A poisoned run gives the very bits of a plain one."""
    plain, poisoned = runner(*xs), run_poisoned(runner, xs)
    assert len(plain) == len(poisoned)
    return all(torch.equal(a, b) or torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(plain, poisoned, strict=True))


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.pool = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.MaxPool2d(3, 2, 1)
        self.a, self.b, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x):
        x = self.pool(torch.relu(self.norm(self.stem(x))))
        x = torch.relu(x + self.b(torch.relu(self.a(x))))
        return self.head(x.mean((2, 3))), x


@pytest.mark.parametrize("recipe", ["default", "int8"])
def test_a_cnn_gives_the_same_bits_when_dead_memory_is_overwritten(recipe):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    assert same(runner_of(Cnn(), x, recipe=recipe), x)


@pytest.mark.parametrize("recipe", ["default", "int8", "int8-dynamic"])
def test_an_encoder_gives_the_same_bits(recipe):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=99, max_position_embeddings=32)
    ids = torch.randint(0, 99, (2, 12))
    fast = gw.optimize(transformers.BertModel(config).eval(), {"input_ids": ids}, recipe,
                       calibration=[{"input_ids": ids}] if recipe == "int8" else None)  # fmt: skip
    assert same(fast._variants[0].built.lowered.runner, ids)


def test_a_decoder_with_its_cache_gives_the_same_bits(monkeypatch):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100, n_positions=64, bos_token_id=1, eos_token_id=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 100, (1, 5))

    def answers():
        fast = gw.optimize(model, {"input_ids": ids}, recipe=())
        first = fast(input_ids=ids)
        step = {"input_ids": ids[:, :1], "past_key_values": first.past_key_values, "attention_mask": torch.ones(1, 6, dtype=torch.long)}
        return first.logits, fast(**step).logits

    plain = answers()
    monkeypatch.setenv("GRAPHWRIGHT_POISON", "1")
    for was, now in zip(plain, answers(), strict=True):
        torch.testing.assert_close(was, now, rtol=1e-4, atol=1e-5)  # another stopwatch may choose other kernels


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False), seed=st.integers(0, 9), recipe=st.sampled_from([(), "default"]))
def test_random_programs_give_the_same_bits(rng, seed, recipe):
    torch.manual_seed(seed)
    model, x = _programs.random_model(rng)
    assert same(runner_of(model, x, recipe=recipe, plan={}), x), repr(model)


def test_a_value_that_is_freed_too_early_is_found():
    """A step that claims to compute, and returns a look at its argument."""
    runner = runner_of(nn.Sequential(nn.Softmax(-1), nn.Softmax(-1), nn.Softmax(-1)), torch.randn(4, 4), recipe=(), plan={})
    steps = list(runner.steps)
    sly = Step(lambda x: x[:2], steps[1].reads, steps[1].writes, steps[1].frees, "sly", "sly")
    broken = type(runner)(runner.program, [steps[0], sly, steps[2]], runner._registers, runner._inputs, runner._buffers, runner._outputs)
    with pytest.raises(InternalError, match="a value that is still to be read"):
        run_poisoned(broken, (torch.randn(4, 4),))


def test_a_step_that_hands_out_a_weight_is_found():
    model = nn.Linear(4, 4)
    runner = runner_of(nn.Sequential(nn.Softmax(-1), model, nn.Softmax(-1)), torch.randn(4, 4), recipe=(), plan={})
    weight = next(iter(runner.program.tensors().values()))
    steps = list(runner.steps)
    sly = Step(lambda x: weight, steps[1].reads, steps[1].writes, steps[1].frees, "sly", "sly")
    broken = type(runner)(runner.program, [steps[0], sly, *steps[2:]], runner._registers, runner._inputs, runner._buffers, runner._outputs)
    before = weight.clone()
    with pytest.raises(InternalError, match="a weight, a buffer or an input"):
        run_poisoned(broken, (torch.randn(4, 4),))
    assert torch.equal(weight, before)


def test_an_input_that_is_written_is_found():
    runner = runner_of(nn.Softmax(-1), torch.randn(4, 4), recipe=(), plan={})
    sly = Step(torch.relu_, runner.steps[0].reads, runner.steps[0].writes, runner.steps[0].frees, "sly", "sly", clobbers=runner.steps[0].reads[0])
    broken = type(runner)(runner.program, [sly], runner._registers, runner._inputs, runner._buffers, runner._outputs)
    with pytest.raises(InternalError, match="a weight, a buffer or an input"):
        run_poisoned(broken, (torch.randn(4, 4),))


def test_memory_read_behind_the_steps_back_is_overwritten():
    """What an implementation hides and reads later is NaN by then."""
    hidden = []
    runner = runner_of(nn.Sequential(nn.Softmax(-1), nn.Softmax(-1), nn.Softmax(-1)), torch.randn(4, 4), recipe=(), plan={})
    steps = list(runner.steps)
    hide = Step(lambda x: hidden.append(torch.tanh(x)) or hidden[-1], steps[0].reads, steps[0].writes, (), "hide", "hide")
    late = Step(lambda x: x + hidden[-1], steps[2].reads, steps[2].writes, steps[2].frees, "late", "late")
    sly = type(runner)(runner.program, [hide, steps[1], late], runner._registers, runner._inputs, runner._buffers, runner._outputs)
    x = torch.randn(4, 4)
    assert not sly(x)[0].isnan().any() and run_poisoned(sly, (x,))[0].isnan().all()


def test_groups_follow_views_and_sums_in_place():
    call = lambda *a: None
    steps = [Step(call, (0,), (1,), (), "", "a"), Step(call, (1,), (2,), (), "", "view", shares=(1,)),
             Step(call, (2, 3), (4,), (), "", "add into", clobbers=2), Step(call, (4,), (5,), (), "", "last")]  # fmt: skip
    group = groups(steps)
    assert group[1] == group[2] == group[4] != group[5] and len({group[0], group[3], group[5], group[1]}) == 4
    dying = deaths(steps, {0, 5})
    assert dying == {2: {group[3]}, 3: {group[1]}}


def test_a_cast_that_casts_nothing_hands_its_argument_through():
    class Casting(nn.Module):
        def forward(self, x):
            y = torch.tanh(x)
            return y.to(torch.float32) * 2, torch.nn.functional.dropout(x.to(torch.float32), 0.5, self.training).relu()

    x = torch.randn(4, 8)
    runner = runner_of(Casting(), x, recipe=(), plan={})
    kept = x.clone()
    assert same(runner, x) and torch.equal(x, kept)


# -- offsets ---------------------------------------------------------------------------------------------------------

VALUES = st.lists(st.builds(lambda n, a, more: Value(n, a, a + more), st.integers(1, 5000), st.integers(0, 30), st.integers(0, 12)), max_size=40)


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_no_two_values_that_are_held_at_a_time_overlap(values):
    plan = assign(values)
    spans = [(o, o + v.nbytes) for o, v in zip(plan.offsets, values, strict=True)]
    for (a, v), (b, w) in itertools.combinations(zip(spans, values, strict=True), 2):
        together = v.first <= w.last and w.first <= v.last
        assert not together or a[1] <= b[0] or b[1] <= a[0]
    assert all(o % ALIGNMENT == 0 for o in plan.offsets)
    assert plan.least <= plan.size <= plan.without_reuse
    slow = max((sum(v.room for v in values if v.first <= k <= v.last) for k in range(50)), default=0)
    assert plan.least == slow == most(values, aligned=True)[0]


def test_a_chain_takes_two_values_however_long_it_is():
    plan = assign([Value(640, k, k + 1) for k in range(50)])
    assert (plan.size, plan.least, plan.without_reuse) == (1280, 1280, 50 * 640)


def test_the_better_of_two_assignments_counts():
    # by time, the small one sits where the large one would have to go later
    values = [Value(640, 0, 1), Value(64, 1, 5), Value(1280, 2, 3), Value(640, 2, 5)]
    assert assign(values).size <= min(2048, assign(values).without_reuse)


def test_what_is_observed_is_what_the_allocator_sees():
    class Chain(nn.Module):
        def forward(self, x):
            y = torch.sin(x)
            z = y.view(-1, 64)
            for _ in range(4):
                z = torch.cos(z * 1.5)
            return z.sum(1), y

    x = torch.randn(256, 256)
    runner = runner_of(Chain(), x, recipe=(), plan={})
    values = observe(runner, (x,))
    assert sum(v.returned for v in values) == 2  # y is returned, and its view is no value of its own
    assert most(values)[0] / 2**20 == pytest.approx(peak(lambda: runner(x)).mb, rel=0.02)
    told = figures(runner, (x,))
    assert told.least <= told.arena <= told.without_reuse and told.values == len(values) - 2
    assert told.results == pytest.approx((256 * 256 + 1024) * 4 / 2**20)
