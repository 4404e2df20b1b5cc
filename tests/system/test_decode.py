"""Decoders: answers token for token those of transformers, sampling, limits, storing, weights held once."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import graphwright as gw
from graphwright import reporting
from graphwright.decode import race
from graphwright.decode.convention import Prompt

transformers = pytest.importorskip("transformers")

TEXT = {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64, **TEXT}
GROUPED = {**SMALL, "num_key_value_heads": 1}
GPT2 = ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, **TEXT})
LLAMA = ("LlamaForCausalLM", "LlamaConfig", GROUPED)
MORE = [
    ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 6}),
    ("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 16}),
    ("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "head_dim": 16, "sliding_window": 6}),
    ("PhiForCausalLM", "PhiConfig", SMALL),
    ("OPTForCausalLM", "OPTConfig", {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                                     "word_embed_proj_dim": 32, "max_position_embeddings": 64, **TEXT}),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL),
]  # fmt: skip


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    """The optimized programs stand, whatever the stopwatch says on the machine that runs the tests."""
    monkeypatch.setattr(reporting, "_declined", lambda job, variant, report: False)
    monkeypatch.setattr(race, "_revert", lambda halves, report: None)


def build(model, config, options):
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**options)).eval()


def prompt(batch=2, length=8, padding=3, seed=1):
    """Prompts whose first row has ``padding`` empty places on the left."""
    ids = torch.randint(3, 100, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def agree(decoder, model, given, new=16, **options):
    expected = model.generate(**given, do_sample=False, max_new_tokens=new, **options)
    assert torch.equal(decoder.generate(given, new, **options), expected)


@pytest.fixture(scope="module")
def gpt2():
    return build(*GPT2)


@pytest.fixture(scope="module")
def decoder(gpt2):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "_declined", lambda job, variant, report: False)
        patch.setattr(race, "_revert", lambda halves, report: None)
        return gw.optimize_decoder(gpt2, prompt())


@pytest.fixture(scope="module")
def static(gpt2):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting, "_declined", lambda job, variant, report: False)
        patch.setattr(race, "_revert", lambda halves, report: None)
        return gw.optimize_decoder(gpt2, prompt(), cache="static", max_length=32)


# -- answers ---------------------------------------------------------------------------------------------------------


def test_greedy_answers_are_those_of_transformers(decoder, gpt2):
    for given in (prompt(), prompt(1, 5, 0), prompt(3, 11, 1), prompt(1, 1, 0)):
        agree(decoder, gpt2, given)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repeated_tokens_are_penalized_as_in_transformers(decoder, static, gpt2, penalty):
    given = prompt()
    agree(decoder, gpt2, given, 12, repetition_penalty=penalty)
    agree(static, gpt2, given, 12, repetition_penalty=penalty)
    if penalty > 1:  # a model that repeats itself anyway can't be encouraged
        assert not torch.equal(decoder.generate(given, 12, repetition_penalty=penalty, eos_token_id=None), decoder.generate(given, 12, eos_token_id=None))
    with pytest.raises(gw.InputError, match="repetition_penalty=0"):
        decoder.generate(given, 2, repetition_penalty=0)


def test_a_static_cache_gives_the_same_answers(static, gpt2):
    for given in (prompt(), prompt(2, 3, 1), prompt(2, 16, 0)):
        agree(static, gpt2, given)
    agree(static, gpt2, prompt(2, 31, 5), new=1)
    shapes = [tuple(p.meta["val"].shape) for p in static.programs["step"].placeholders]
    assert all(isinstance(s, int) for shape in shapes for s in shape) and (2, 2, 31, 16) in shapes


@pytest.mark.soak
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", [LLAMA, *MORE], ids=lambda f: f[0])
def test_families(family, cache):
    """Grouped queries, windows that the answer outgrows, rotary, learned and ALiBi-free positions; both kinds of cache."""
    model = build(*family)
    decoder = gw.optimize_decoder(model, prompt(), cache=cache, max_length=32)
    for given in (prompt(), prompt(2, 12, 2, seed=3)):
        agree(decoder, model, given)
    step = next(r for r in decoder.report.step.passes if r.name == "append-cache")
    assert len(step.result.changes) == 4 and not step.result.refusals


def test_a_row_ends_at_its_own_eos_and_is_padded(decoder, gpt2):
    given = prompt()
    free = decoder.generate(given, 12, eos_token_id=None)
    assert free.shape == (2, 20)
    stop = int(free[1, 11])
    first = [int((row[8:] == stop).nonzero()[0]) if bool((row[8:] == stop).any()) else 12 for row in free]
    got = decoder.generate(given, 12, eos_token_id=stop, return_dict=True)
    assert torch.equal(got.sequences, gpt2.generate(**given, do_sample=False, max_new_tokens=12, eos_token_id=stop))
    assert got.lengths.tolist() == [min(f + 1, 12) for f in first] and got.prefill_ms > 0
    agree(decoder, gpt2, given, new=12, eos_token_id=[stop, int(free[0, 13])], pad_token_id=7)


def test_streamers(decoder):
    seen = []
    out = decoder.generate(prompt(), 6, streamer=seen.append, eos_token_id=None)
    assert torch.equal(torch.stack(seen, 1), out[:, 8:])
    cut = decoder.generate(prompt(), 6, streamer=lambda t: True, eos_token_id=None)
    assert torch.equal(cut, out[:, :9])

    class Printer:
        def __init__(self):
            self.given, self.ended = [], 0

        def put(self, value):
            self.given.append(value)

        def end(self):
            self.ended += 1

    printer = Printer()
    decoder.generate(prompt(), 3, streamer=printer, eos_token_id=None)
    assert [t.shape for t in printer.given] == [(2, 8), (2,), (2,), (2,)] and printer.ended == 1


def test_equal_seeds_draw_equal_answers(decoder):
    draw = lambda **more: decoder.generate(prompt(), 8, do_sample=True, top_p=0.9, temperature=1.5, eos_token_id=None, **more)
    assert torch.equal(draw(seed=3), draw(seed=3))
    assert not torch.equal(draw(seed=3), draw(seed=4))
    assert torch.equal(draw(seed=3), draw(generator=torch.Generator().manual_seed(3)))
    state = torch.get_rng_state()
    draw(seed=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_two_answers_from_one_decoder_do_not_disturb_each_other(decoder):
    """The cache belongs to one call: answers begun in between leave it alone."""
    given, other = prompt(), prompt(2, 6, 0, seed=9)
    alone = decoder.generate(given, 10)
    seen = []
    within = decoder.generate(given, 10, streamer=lambda t: seen.append(decoder.generate(other, 3)))
    assert torch.equal(within, alone) and all(torch.equal(s, seen[0]) for s in seen)


# -- weights ---------------------------------------------------------------------------------------------------------


def storages(*programs):
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for p in programs for t in p.tensors().values()}


@pytest.mark.parametrize("recipe", ["default", pytest.param("int8-dynamic", marks=pytest.mark.soak), pytest.param("w8", marks=pytest.mark.soak)])
def test_both_programs_hold_their_weights_once(recipe, gpt2, decoder):
    made = decoder if recipe == "default" else gw.optimize_decoder(gpt2, prompt(), recipe)
    prefill, step = made.programs["prefill"], made.programs["step"]
    matrices = {n: t for n, t in prefill.tensors().items() if t.ndim == 2 and t.numel() > 1000}
    assert matrices
    together, alone = sum(storages(prefill, step).values()), sum(storages(prefill).values())
    assert together <= 1.02 * alone, (together, alone)
    assert made.size_bytes() == together
    assert made.report.bytes_after == together
    if recipe != "default":
        assert together < 0.5 * made.report.bytes_before
        out = made.generate(prompt(), 8)
        assert out.shape[0] == 2 and out.shape[1] > 8


def closure_values(built):
    """What the kernels of a build hold on to: packed weights by their address, and bytes."""
    found = {}

    def look(value, depth):
        if isinstance(value, torch.Tensor) and value.is_mkldnn:
            found[id(value)] = value.numel() * value.element_size()
        elif type(value).__name__ == "Packed":
            found[id(value)] = value.weight.nbytes
        elif callable(value) and getattr(value, "__closure__", None) and depth:
            for cell in value.__closure__:
                look(cell.cell_contents, depth - 1)

    for step in built.lowered.runner.steps:
        look(step.call, 3)
    return found


@pytest.mark.parametrize("kind", ["decoder", pytest.param("w8", marks=pytest.mark.soak)])
def test_packed_forms_are_held_once_where_both_programs_chose_the_same_kernel(kind, request, gpt2, tmp_path):
    made = request.getfixturevalue(kind) if kind == "decoder" else gw.optimize_decoder(gpt2, prompt(), kind)
    made.save(tmp_path / "model.gw")
    for one in (made, gw.load(tmp_path / "model.gw")):
        prefill, step = (half.fast._first().built for half in (one._prefill, one._step))
        same = {n for n, k in prefill.lowered.plan.items() if step.lowered.plan.get(n) == k and (k.startswith(("onednn", "llvm.w8", "llvm.int8")))}
        first, second = closure_values(prefill), closure_values(step)
        assert not same or first.keys() & second.keys(), (same, first, second)


@pytest.mark.soak
def test_int8_is_calibrated_with_prompts(gpt2):
    batches = [prompt(2, 8, k, seed=k) for k in range(4)]
    made = gw.optimize_decoder(gpt2, prompt(), "int8", calibration=batches)
    for report in (made.report.prefill, made.report.step):
        assert any(r.decision == "int8" for r in report.sites), report.decisions()
    assert made.report.prefill.sqnr_db > 15 and made.report.step.sqnr_db > 15
    with pytest.raises(gw.CalibrationError, match="calibration"):
        gw.optimize_decoder(gpt2, prompt(), "int8")
    with pytest.raises(gw.CalibrationError, match="two tokens"):
        gw.optimize_decoder(gpt2, prompt(), "int8", calibration=[torch.tensor([[5]])])


# -- storing ---------------------------------------------------------------------------------------------------------

LOADS = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "transformers":
            raise ImportError("transformers is blocked")
sys.meta_path.insert(0, Blocked())
import torch, graphwright as gw
decoder = gw.load(sys.argv[1])
given = torch.load(sys.argv[2])
torch.save([decoder.generate(given, 12), decoder.generate(given, 9, do_sample=True, seed=7)], sys.argv[3])
assert "transformers" not in sys.modules
print(decoder.report.verdict, decoder)
"""


@pytest.mark.parametrize("kind", ["decoder", "static"])
def test_a_saved_decoder_answers_alike_without_transformers(kind, request, tmp_path):
    made = request.getfixturevalue(kind)
    given = prompt()
    made.save(tmp_path / "model.gw")
    size = (tmp_path / "model.gw").stat().st_size
    reports = 500_000  # the two graphs and their reports, as text
    assert size < made.size_bytes() + reports and made.report.file_bytes == size
    torch.save(given, tmp_path / "given.pt")
    run = subprocess.run([sys.executable, "-c", LOADS, *(str(tmp_path / n) for n in ("model.gw", "given.pt", "found.pt"))],
                         capture_output=True, text=True, check=False)  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = torch.load(tmp_path / "found.pt")
    assert torch.equal(found[0], made.generate(given, 12))
    assert torch.equal(found[1], made.generate(given, 9, do_sample=True, seed=7))


def test_a_loaded_decoder_holds_weights_once_and_computes_the_same_bits(decoder, tmp_path):
    decoder.save(tmp_path / "model.gw")
    again = gw.load(tmp_path / "model.gw")
    assert isinstance(again, gw.Decoder) and again.traits == decoder.traits and again.size_bytes() == decoder.size_bytes()
    given = Prompt.of(prompt())
    (a, cache), (b, other) = decoder.begin(given), again.begin(given)
    assert torch.equal(a, b) and all(map(torch.equal, cache, other))
    token = a.argmax(-1)
    steps, more = decoder.steps(given, cache, 3), again.steps(given, other, 3)
    for _ in range(3):
        a, b = steps(token), more(token)
        assert torch.equal(a, b)
        token = a.argmax(-1)
    assert str(again.report.verdict) == decoder.report.verdict and again.report.rows()[:3] == decoder.report.rows()[:3]


def test_a_loaded_static_decoder_refuses_other_batches(static, gpt2, tmp_path):
    agree(static, gpt2, prompt(3, 8, 1))  # captured anew while the model is there
    static.save(tmp_path / "model.gw")
    again = gw.load(tmp_path / "model.gw")
    assert again.generate(prompt(3), 4).shape[0] == 3
    with pytest.raises(gw.CoverageError, match="batch"):
        again.generate(prompt(5), 4)


def test_the_command_line_takes_a_saved_decoder(decoder, tmp_path):
    from typer.testing import CliRunner

    from graphwright.cli import app

    file = str(tmp_path / "model.gw")
    decoder.save(file)
    for words, said in ((["inspect", file], "tokens/s"), (["inspect", file, "--sites", "*h.0*"], "h.0"), (["verify", file], "2 programs")):
        out = CliRunner().invoke(app, words)
        assert out.exit_code == 0 and said in out.output, (words, out.output, out.exception)
    for words in (["profile", file], ["bench", file]):
        out = CliRunner().invoke(app, words)
        assert out.exit_code and "decoder is not" in out.output + str(out.exception), (words, out.output, out.exception)


# -- refusals --------------------------------------------------------------------------------------------------------


def test_prompts_that_are_none(decoder):
    ids = prompt()["input_ids"]
    cases = [
        ((ids[0], 4), {}, "int64 tensor"), ((ids.float(), 4), {}, "float32"), ((ids[:, :0], 4), {}, "empty"), ((ids, 0), {}, "max_new_tokens"),
        ((ids, True), {}, "max_new_tokens"), ((ids + 100, 4), {}, "0 to 99"), ((ids - 200, 4), {}, "tokens go from 0"),
        ((ids, 4), {"attention_mask": torch.ones(2, 5)}, "same shape"), ((ids, 4), {"attention_mask": torch.ones(1, 8)}, "same shape"),
        ((ids, 4), {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]] * 2)}, "padded on the left"),
        ((ids, 4), {"attention_mask": torch.full((2, 8), 2)}, "0 and 1"), ((ids, 4), {"top_p": 0.5}, "do_sample=True"),
        ((ids, 4), {"do_sample": True, "top_p": 1.5}, "top_p"), ((ids, 4), {"do_sample": True, "temperature": 0.0}, "temperature"),
        ((ids, 4), {"do_sample": True, "top_k": 0}, "top_k"), ((ids, 4), {"eos_token_id": "stop"}, "eos_token_id"),
        ((ids, 4), {"do_sample": True, "seed": 1, "generator": torch.Generator()}, "one of them"), ((ids, 4), {"streamer": 3}, "streamer"),
        (({"inputs": ids}, 4), {}, "entries"),
    ]  # fmt: skip
    for args, kwargs, said in cases:
        with pytest.raises(gw.InputError, match=said):
            decoder.generate(*args, **kwargs)


def test_answers_beyond_the_limit(decoder, static):
    with pytest.raises(gw.InputError, match=r"exceed max_length=32\n  Ask for max_new_tokens=24"):
        static.generate(prompt(), 25)
    with pytest.raises(gw.InputError, match="Shorten the prompt"):
        static.generate(prompt(2, 40), 1)
    with pytest.raises(gw.InputError, match="max_length=64"):
        decoder.generate(prompt(), 60)
    assert static.generate(prompt(), 24, eos_token_id=None).shape == (2, 32)


def test_models_that_do_not_decode():
    wrong = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(gw.UnsupportedError, match="input_ids"):
        gw.optimize_decoder(wrong, prompt())

    class NoCache(nn.Module):
        def forward(self, input_ids, attention_mask=None):
            return input_ids

    with pytest.raises(gw.UnsupportedError, match="no cache"):
        gw.optimize_decoder(NoCache(), prompt())
    t5 = build("T5ForConditionalGeneration", "T5Config", {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 50})
    with pytest.raises(gw.UnsupportedError, match="encoder"):
        gw.optimize_decoder(t5, prompt())


def test_arguments_of_optimize_decoder(gpt2, decoder):
    for given, said in (({"cache": "static"}, "needs max_length"), ({"cache": "ring"}, "dynamic"), ({"max_length": 1}, "max_length"),
                        ({"max_length": 65}, "64 positions"), ({"goal": gw.Goal(max_drop=0.1)}, "evaluate"), ({"max_length": 8}, "8 tokens")):  # fmt: skip
        with pytest.raises(gw.InputError, match=said):
            gw.optimize_decoder(gpt2, prompt(), **given)
    with pytest.raises(gw.InputError, match="optimized already"):
        gw.optimize_decoder(decoder, prompt())
    with pytest.raises(gw.RecipeError):
        gw.optimize_decoder(gpt2, prompt(), "int9")


def test_what_a_decoder_does_not_offer(decoder):
    import copy
    import pickle

    for act in (lambda: decoder(torch.zeros(1)), lambda: decoder.train(), lambda: decoder.half(), lambda: copy.deepcopy(decoder), lambda: pickle.dumps(decoder)):
        with pytest.raises(gw.UnsupportedError):
            act()
    assert decoder.eval() is decoder and decoder.to("cpu") is decoder and decoder.config.n_embd == 32
    assert any(k.startswith("step.") for k in decoder.state_dict()) and "Decoder(GPT2LMHeadModel" in repr(decoder)
    with pytest.raises(AttributeError):
        _ = decoder.no_such_thing


# -- reports ---------------------------------------------------------------------------------------------------------


def test_the_report_shows_both_programs_side_by_side(decoder):
    report = decoder.report
    text = str(report)
    assert all(word in text for word in ("tokens/s", "prefill ms", "step ms", "--- Prefill ---", "--- Step ---", "append-cache"))
    first, second = report.tokens_per_second()
    assert first > 0 and second > 0 and report.tokens == 16 and report.batch == 2
    assert "h.0" in decoder.explain("*h.0*") and "Prefill" in decoder.explain("*h.0*")
    assert type(report).from_dict(report.to_dict()).to_dict() == report.to_dict()


def test_the_report_names_settings_that_generate_does_not_follow(gpt2):
    model = copy.deepcopy(gpt2)
    config = model.generation_config
    config.forced_eos_token_id, config.do_sample, config.temperature, config.num_beams = 7, True, 0.7, 1
    notes = gw.optimize_decoder(model, prompt()).report.notes
    (passed,) = [n for n in notes if "pass that to generate" in n]
    assert "do_sample=True, temperature=0.7" in passed and "forced" not in passed
    (left,) = [n for n in notes if "does not follow" in n]
    assert "forced_eos_token_id=7" in left and "num_beams" not in left


def test_the_report_has_no_such_notes_without_such_settings(decoder):
    assert not [n for n in decoder.report.notes if "generate" in n]


def test_a_result_that_is_not_faster_says_so_and_runs_as_captured(gpt2, monkeypatch):
    monkeypatch.undo()
    slower = lambda calls, **options: [type(_timing())(1.0 + k, 1.0 + k, 1.0 + k, 3) for k in range(len(calls))]
    monkeypatch.setattr(race, "interleaved", slower)
    monkeypatch.setattr(reporting, "interleaved", slower)
    made = gw.optimize_decoder(gpt2, prompt())
    assert "not faster" in made.report.verdict and "unchanged" in made.report.verdict
    assert all(half.fast._first().built.unchanged for half in (made._prefill, made._step))
    agree(made, gpt2, prompt())


def _timing():
    from graphwright.measure import Timing

    return Timing(1.0, 1.0, 1.0, 1)


# -- plain modules ---------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, size, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x, mask, past):
        batch, length, _ = x.shape
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        total = k.shape[2]
        causal = torch.arange(total)[None, :] <= (torch.arange(length) + total - length)[:, None]
        y = nn.functional.scaled_dot_product_attention(q, k, v, causal[None, None] & mask[:, None, None, :].bool())
        return self.out(y.transpose(1, 2).flatten(2)), (k, v)


class Plain(nn.Module):
    """A language model by nobody's library: the cache is a tuple of pairs, what comes back a dict or a tuple."""

    def __init__(self, size=32, layers=2, positional=True, as_dict=False):
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, size), nn.Embedding(64, size)
        self.layers = nn.ModuleList(Attention(size, 4) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(layers))
        self.head, self.positional, self.as_dict = nn.Linear(size, 50), positional, as_dict

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None):
        past = past_key_values or (None,) * len(self.layers)
        seen = 0 if past[0] is None else past[0][0].shape[2]
        places = position_ids if self.positional else torch.arange(input_ids.shape[1])[None] + seen
        x, new = self.tokens(input_ids) + self.places(places), []
        for layer, norm, before in zip(self.layers, self.norms, past, strict=True):
            y, kv = layer(norm(x), attention_mask, before)
            x = x + y
            new.append(kv)
        logits = self.head(x)
        return {"logits": logits, "past_key_values": tuple(new)} if self.as_dict else (logits, tuple(new))


def plainly(model, given, new):
    """Greedy, without a cache: every answer anew from the whole text."""
    ids, mask = given["input_ids"], given["attention_mask"]
    for _ in range(new):
        with torch.no_grad():
            out = model(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0))
        logits = (out["logits"] if isinstance(out, dict) else out[0])[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, mask.new_ones(len(ids), 1)], 1)
    return ids


@pytest.mark.parametrize("cache,as_dict", [("dynamic", False), ("static", True)])
def test_a_plain_module_of_the_stated_convention(cache, as_dict):
    torch.manual_seed(0)
    model = Plain(as_dict=as_dict).eval()
    given = prompt()
    given["input_ids"] %= 50
    made = gw.optimize_decoder(model, given, cache=cache, max_length=32)
    assert made.traits.eos == () and made.traits.vocabulary is None
    for other in (given, {k: v[:, 2:] for k, v in given.items()}):
        assert torch.equal(made.generate(other, 12), plainly(model, other, 12))
    changed = next(r for r in made.report.step.passes if r.name == "append-cache").result.changes
    assert len(changed) == 4


def test_a_static_cache_is_refused_where_positions_come_from_its_length():
    torch.manual_seed(0)
    model = Plain(positional=False).eval()
    given = prompt(padding=0)
    given["input_ids"] %= 50
    with pytest.raises(gw.UnsupportedError, match="something else"):
        gw.optimize_decoder(model, given, cache="static", max_length=32)
