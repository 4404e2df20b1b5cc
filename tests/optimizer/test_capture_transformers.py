"""transformers' models with tiny configurations and random weights: encoders, images, audio, and caches in and out."""

import pytest
import torch

from graphwright.capture import Guard, capture
from graphwright.structure import flatten, flatten_call

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {**SMALL, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {**TEXT, "num_key_value_heads": 1}
WHISPER = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2, "num_mel_bins": 8,
           "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 100, "pad_token_id": 0,
           "max_source_positions": 20, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 100,
      "decoder_start_token_id": 0}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 100, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}


def build(model, config, options):
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**options)).eval()


def ids(batch=2, length=7):
    return torch.randint(3, 100, (batch, length))


def text(batch=2, length=7):
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, -2:] = 0
    return {"input_ids": ids(batch, length), "attention_mask": mask}


def image():
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def agree(found, model, kwargs, *, exact=True):
    """Verify, and compare with eager through the structures: type, attributes, entries, numbers."""
    assert found.program is not None, [str(r) for r in found.regions]
    leaves, spec = flatten_call((), kwargs)
    assert spec == found.program.signature.inputs, (spec, found.program.signature.inputs)
    assert Guard(found.program).check(leaves) is None, Guard(found.program).check(leaves)
    with torch.no_grad():
        got = found.program.signature.outputs.unflatten(found.program(*leaves))
        expected = model(**kwargs)
    a, ours = flatten(expected), flatten(got)
    assert type(got) is type(expected) and ours[1] == a[1]
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-5}
    for x, y in zip(a[0], ours[0], strict=True):
        torch.testing.assert_close(y, x, **tolerance)
    return expected, got


slow = pytest.mark.slow
MODELS = [
    ("BertModel", "BertConfig", TEXT, text),
    ("ViTForImageClassification", "ViTConfig", {**SMALL, "image_size": 32, "patch_size": 8}, image),
    pytest.param("ResNetForImageClassification", "ResNetConfig",
                 {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "num_labels": 3}, image, marks=slow),
    pytest.param("DistilBertForSequenceClassification", "DistilBertConfig",
                 {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 100}, text, marks=slow),
    pytest.param("RobertaForTokenClassification", "RobertaConfig", {**TEXT, "pad_token_id": 1}, text, marks=slow),
    pytest.param("T5EncoderModel", "T5Config", T5, text, marks=slow),
    pytest.param("ConvNextForImageClassification", "ConvNextConfig",
                 {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, image, marks=slow),
    pytest.param("MobileNetV2ForImageClassification", "MobileNetV2Config", {"image_size": 32}, image, marks=slow),
    pytest.param("SwinModel", "SwinConfig",
                 {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
                 image, marks=slow),
    pytest.param("Wav2Vec2Model", "Wav2Vec2Config",
                 {**SMALL, "conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2,
                  "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
                 lambda: {"input_values": torch.randn(2, 400)}, marks=slow),
]  # fmt: skip


@pytest.mark.parametrize("model,config,options,inputs", MODELS)
def test_encoders(model, config, options, inputs):
    model = build(model, config, options)
    kwargs = inputs()
    found = capture(model, (), kwargs)
    found.program.verify()
    expected, got = agree(found, model, kwargs)
    first = next(iter(expected))
    assert torch.equal(got[0], expected[0]) and torch.equal(getattr(got, first), getattr(expected, first))
    assert not found.regions


@slow
def test_whisper_encoder():
    model = build("WhisperModel", "WhisperConfig", WHISPER).encoder
    agree(capture(model, (), {"input_features": torch.randn(2, 8, 40)}), model, {"input_features": torch.randn(2, 8, 40)})


def test_bert_varies_in_batch_and_length_from_a_batch_of_one():
    model = build("BertModel", "BertConfig", TEXT)
    found = capture(model, (), text(1, 5), dynamic="auto")
    assert found.notes == []
    for batch, length in ((1, 5), (3, 9), (2, 1), (1, 33)):
        agree(found, model, text(batch, length), exact=False)


CAUSAL = [
    ("GPT2LMHeadModel", "GPT2Config", GPT2),
    pytest.param("LlamaForCausalLM", "LlamaConfig", GROUPED, marks=slow),
    pytest.param("Qwen2ForCausalLM", "Qwen2Config", GROUPED, marks=slow),
    pytest.param("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 16}, marks=slow),
    pytest.param("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT, marks=slow),
    pytest.param("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 64}, marks=slow),
    pytest.param("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "head_dim": 16, "sliding_window": 64}, marks=slow),
]


@pytest.mark.parametrize("model,config,options", CAUSAL)
def test_causal_models_prefill_and_decode_with_their_cache(model, config, options):
    """The cache goes out of the first call and into the next, as explicit tensors; the model is used as it comes."""
    model = build(model, config, options)
    assert model.config.use_cache
    prompt = {"input_ids": ids(2, 5)}
    prefill = capture(model, (), prompt)
    expected, got = agree(prefill, model, prompt)
    assert got.past_key_values.get_seq_length() == 5
    step = {"input_ids": ids(2, 1), "past_key_values": expected.past_key_values}
    decode = capture(model, (), step)
    assert step["past_key_values"].get_seq_length() == 5, "capture wrote into the user's cache"
    assert decode.program.placeholders[1].name == "past_key_values_0_keys"
    leaves, _ = flatten_call((), step)
    with torch.no_grad():
        ours = decode.program.signature.outputs.unflatten(decode.program(*leaves))
        theirs = model(**step)  # this one does write into the cache
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=0)
    assert ours.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length() == 6
    for a, b in zip(ours.past_key_values.layers, theirs.past_key_values.layers, strict=True):
        torch.testing.assert_close((a.keys, a.values), (b.keys, b.values), rtol=0, atol=0)


@slow
@pytest.mark.parametrize("model,config,options", [CAUSAL[0], CAUSAL[1].values])
def test_one_decode_program_serves_a_whole_generation(model, config, options):
    model = build(model, config, options)
    prompt = ids(1, 4)
    with torch.no_grad():
        expected = model.generate(prompt, max_new_tokens=6, do_sample=False)[0, 4:]
        first = model(input_ids=prompt)
    mask = torch.ones(1, 5, dtype=torch.long)
    token = first.logits[:, -1:].argmax(-1)
    step = {"input_ids": token, "attention_mask": mask, "past_key_values": first.past_key_values}
    found = capture(model, (), step, dynamic="auto")
    assert found.program is not None and found.program.signature.symbols, found.notes
    guard, cache, tokens = Guard(found.program), first.past_key_values, [token]
    for length in range(5, 10):
        step = {"input_ids": tokens[-1], "attention_mask": torch.ones(1, length, dtype=torch.long), "past_key_values": cache}
        leaves, spec = flatten_call((), step)
        assert spec == found.program.signature.inputs and guard.check(leaves) is None, guard.check(leaves)
        with torch.no_grad():
            out = found.program.signature.outputs.unflatten(found.program(*leaves))
        cache = out.past_key_values
        tokens.append(out.logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(tokens, 1)[0], expected)


@slow
@pytest.mark.parametrize("model,config,options", [("T5ForConditionalGeneration", "T5Config", T5)])
def test_encoder_and_decoder_with_a_pair_of_caches(model, config, options):
    model = build(model, config, options)
    call = {"input_ids": ids(2, 6), "decoder_input_ids": ids(2, 3)}
    expected, got = agree(capture(model, (), call), model, call)
    assert got.past_key_values.get_seq_length() == 3
    assert type(got.past_key_values) is type(expected.past_key_values)


@slow
def test_sliding_window_cache_in_its_steady_state():
    model = build("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 4})
    prompt = {"input_ids": ids(2, 7)}
    expected, _ = agree(capture(model, (), prompt), model, prompt)
    step = {"input_ids": ids(2, 1), "past_key_values": expected.past_key_values}
    found = capture(model, (), step)
    leaves, _ = flatten_call((), step)
    with torch.no_grad():
        ours, theirs = found.program(*leaves)[0], model(**step).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@slow
def test_a_mixture_of_experts_is_captured_whole_or_in_parts():
    model = build("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1})
    call = {"input_ids": ids(2, 5)}
    found = capture(model, (), call)
    with torch.no_grad():
        torch.testing.assert_close(found.run(**call).logits, model(**call).logits)
    assert found.program is not None or found.pieces
