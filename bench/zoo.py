"""The survey's architectures: models of transformers with tiny configurations, random weights and written-out attention.

Each entry says how to build the model, what to call it with, and how often each fusion is to be found in it, as a formula of
its configuration (layers times what one layer holds). ``bench/architectures.py`` holds the default pipeline to that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench import expected as E
from bench.models import _roughen as roughen

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """One model of the survey.

    Attributes:
        family: ``text``, ``decoder``, ``seq2seq``, ``vision``, ``audio`` or ``both`` (text and images).
        model, config: names of transformers' classes.
        options: the configuration's keyword arguments, where they differ from its defaults.
        inputs: makes one call's keyword arguments from the (seeded) configuration.
        expect: the number of each fusion, from the configuration; a fusion that is left out is expected nowhere.
    """

    name: str
    family: str
    model: str
    config: str
    options: dict[str, Any]
    inputs: Callable[[Any], Inputs]
    expect: E.Formula

    def build(self, attention: str = "eager") -> nn.Module:
        """The model in eval mode, seeded; its attention written out (``eager``) or as transformers chooses (``default``)."""
        import transformers

        config = getattr(transformers, self.config)(**self.options)
        config.return_dict = True
        if attention != "default":
            config._attn_implementation = attention
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, self.model)(config)
            roughen(model)
        return model.eval().requires_grad_(False)

    def example(self, config: Any, seed: int = 1) -> Inputs:
        """One call, the same for equal seeds in every process."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.inputs(config)

    def expected(self, config: Any) -> dict[str, int]:
        """How often each fusion is to be found; zeros left out."""
        return {k: n for k, n in self.expect(config).items() if n}


# -- inputs ----------------------------------------------------------------------------------------------------------


def ids(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, 90, (batch, length))


def text(config: Any) -> Inputs:
    """Two sentences, the second shorter: its last two words are padding."""
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, -2:] = 0
    return {"input_ids": ids(), "attention_mask": mask}


def pair(config: Any) -> Inputs:
    """Source and target; caches are left to the tests of decoding."""
    return {**text(config), "decoder_input_ids": ids(2, 5), "use_cache": False}


def prompt(config: Any) -> Inputs:
    """Two prompts of one length."""
    return {"input_ids": ids(), "use_cache": False}


def padded(config: Any) -> Inputs:
    return {**text(config), "use_cache": False}


def image(config: Any) -> Inputs:
    size = getattr(config, "image_size", None) or 32
    size = size if isinstance(size, int) else size[0]
    return {"pixel_values": torch.randn(2, getattr(config, "num_channels", 3), size, size)}


def wave(config: Any) -> Inputs:
    return {"input_values": torch.randn(2, 400)}


def picture_and_text(config: Any) -> Inputs:
    size = config.vision_config.image_size
    return {**text(config), "pixel_values": torch.randn(2, 3, size, size)}


# -- configurations --------------------------------------------------------------------------------------------------

LAYERS = 3  # so that "twice a layer" and "once a layer, and three more" are not the same number
SMALL = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {**SMALL, "vocab_size": 99, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ROBERTA = {**TEXT, "pad_token_id": 1}
GROUPED = {**TEXT, "num_key_value_heads": 2}
EQUAL = {**TEXT, "num_key_value_heads": 4}
IMAGE = {**SMALL, "image_size": 32, "patch_size": 8}
WAV2VEC = {**SMALL, "vocab_size": 32, "conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3],
           "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": LAYERS, "num_decoder_layers": 2, "num_heads": 4, "vocab_size": 99,
      "decoder_start_token_id": 0}  # fmt: skip
BART = {"d_model": 32, "encoder_layers": LAYERS, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 99,
        "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
        "decoder_start_token_id": 2}  # fmt: skip

ARCHITECTURES: tuple[Architecture, ...] = (
    # text encoders
    Architecture("bert", "text", "BertModel", "BertConfig", TEXT, text, E.encoder()),
    Architecture("roberta", "text", "RobertaModel", "RobertaConfig", ROBERTA, text, E.encoder()),
    Architecture("xlm-roberta", "text", "XLMRobertaModel", "XLMRobertaConfig", ROBERTA, text, E.encoder()),
    Architecture("camembert", "text", "CamembertModel", "CamembertConfig", ROBERTA, text, E.encoder()),
    Architecture("electra", "text", "ElectraModel", "ElectraConfig", {**TEXT, "embedding_size": 16}, text, E.encoder(pooler=False)),
    Architecture("distilbert", "text", "DistilBertModel", "DistilBertConfig",
                 {"dim": 32, "n_layers": LAYERS, "n_heads": 4, "hidden_dim": 64, "vocab_size": 99}, text, E.encoder(pooler=False)),
    Architecture("albert", "text", "AlbertModel", "AlbertConfig", {**TEXT, "embedding_size": 16}, text, E.encoder(raised_activations=1)),
    Architecture("mpnet", "text", "MPNetModel", "MPNetConfig", ROBERTA, text, E.encoder()),
    Architecture("deberta-v2", "text", "DebertaV2Model", "DebertaV2Config",
                 {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
                  "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False}, text, E.encoder(pooler=False)),
    Architecture("modernbert", "text", "ModernBertModel", "ModernBertConfig",
                 {**TEXT, "local_attention": 4, "global_attn_every_n_layers": 2}, text, E.encoder(pooler=False, activations=0, merged=0, gates=1)),
    Architecture("funnel", "text", "FunnelBaseModel", "FunnelConfig",
                 {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "block_sizes": [2, 1], "vocab_size": 99}, text, E.funnel),
    Architecture("fnet", "text", "FNetModel", "FNetConfig", {**TEXT, "type_vocab_size": 2},
                 lambda c: {"input_ids": ids()}, E.mixed_by_fourier),
    Architecture("layoutlm", "text", "LayoutLMModel", "LayoutLMConfig", TEXT, text, E.encoder()),
    Architecture("squeezebert", "text", "SqueezeBertModel", "SqueezeBertConfig",
                 {**TEXT, "embedding_size": 32, "q_groups": 2, "k_groups": 2, "v_groups": 1, "post_attention_groups": 1,
                  "intermediate_groups": 2, "output_groups": 2}, text, E.squeezed),
    Architecture("esm", "text", "EsmModel", "EsmConfig",
                 {**TEXT, "position_embedding_type": "rotary", "token_dropout": False, "mask_token_id": 4}, text, E.encoder(raised_activations=1)),
    # decoders
    Architecture("gpt2", "decoder", "GPT2LMHeadModel", "GPT2Config",
                 {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "vocab_size": 99, "n_positions": 64}, prompt, E.decoder(merged=0, raised_activations=1)),
    Architecture("gpt-neo", "decoder", "GPTNeoForCausalLM", "GPTNeoConfig",
                 {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]],
                  "vocab_size": 99, "window_size": 4, "max_position_embeddings": 64}, prompt, E.decoder(raised_activations=1)),
    Architecture("gpt-j", "decoder", "GPTJForCausalLM", "GPTJConfig",
                 {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "rotary_dim": 4, "vocab_size": 99, "n_positions": 64}, prompt, E.decoder(norms=1, raised_activations=1)),
    Architecture("gpt-neox", "decoder", "GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT, prompt, E.decoder(merged=0)),
    Architecture("opt", "decoder", "OPTForCausalLM", "OPTConfig",
                 {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "ffn_dim": 64, "vocab_size": 99,
                  "word_embed_proj_dim": 32, "max_position_embeddings": 64}, padded, E.decoder()),
    Architecture("bloom", "decoder", "BloomForCausalLM", "BloomConfig",
                 {"hidden_size": 32, "n_layer": LAYERS, "n_head": 4, "vocab_size": 99}, padded, E.decoder(first=1, merged=0, raised_activations=1)),
    Architecture("mpt", "decoder", "MptForCausalLM", "MptConfig",
                 {"d_model": 32, "n_layers": LAYERS, "n_heads": 4, "vocab_size": 99, "max_seq_len": 64}, prompt, E.decoder(merged=0)),
    Architecture("llama", "decoder", "LlamaForCausalLM", "LlamaConfig", GROUPED, padded, E.decoder(rms=True, **E.GATED)),
    Architecture("mistral", "decoder", "MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 4}, prompt, E.decoder(rms=True, **E.GATED)),
    Architecture("qwen2", "decoder", "Qwen2ForCausalLM", "Qwen2Config", GROUPED, prompt, E.decoder(rms=True, **E.GATED)),
    Architecture("qwen3", "decoder", "Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 16}, prompt, E.decoder(rms=True, norms=4, **E.GATED)),
    Architecture("gemma", "decoder", "GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 16}, prompt, E.decoder(rms=True, **E.GATED)),
    Architecture("gemma2", "decoder", "Gemma2ForCausalLM", "Gemma2Config",
                 {**GROUPED, "head_dim": 16, "sliding_window": 4}, prompt, E.soft_capped),
    Architecture("phi", "decoder", "PhiForCausalLM", "PhiConfig", EQUAL, prompt, E.decoder(norms=1, raised_activations=1)),
    Architecture("phi3", "decoder", "Phi3ForCausalLM", "Phi3Config", GROUPED, prompt, E.decoder(rms=True, activations=0, merged=0, gates=1)),
    Architecture("falcon", "decoder", "FalconForCausalLM", "FalconConfig",
                 {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "vocab_size": 99}, prompt, E.decoder(norms=1, merged=0)),
    Architecture("stablelm", "decoder", "StableLmForCausalLM", "StableLmConfig", GROUPED, prompt, E.decoder(**E.GATED)),
    Architecture("olmo", "decoder", "OlmoForCausalLM", "OlmoConfig", GROUPED, prompt, E.decoder(**E.GATED)),
    Architecture("olmo2", "decoder", "Olmo2ForCausalLM", "Olmo2Config", GROUPED, prompt, E.decoder(rms=True, norms=4, residuals=0, **E.GATED)),
    Architecture("cohere", "decoder", "CohereForCausalLM", "CohereConfig", GROUPED, prompt, E.decoder(rms=True, norms=1, **E.GATED)),
    Architecture("starcoder2", "decoder", "Starcoder2ForCausalLM", "Starcoder2Config", GROUPED, prompt, E.decoder()),
    Architecture("codegen", "decoder", "CodeGenForCausalLM", "CodeGenConfig",
                 {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "rotary_dim": 4, "vocab_size": 99, "n_positions": 64}, prompt, E.decoder(norms=1, merged=0, raised_activations=1)),
    Architecture("mamba", "decoder", "MambaForCausalLM", "MambaConfig",
                 {"hidden_size": 32, "num_hidden_layers": LAYERS, "vocab_size": 99, "state_size": 4}, prompt, E.state_space),
    # encoder and decoder
    Architecture("t5", "seq2seq", "T5Model", "T5Config", T5, pair, E.t5),
    Architecture("t5-gated", "seq2seq", "T5Model", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"}, pair, E.t5),
    Architecture("bart", "seq2seq", "BartModel", "BartConfig", BART, pair, E.bart(2)),
    Architecture("pegasus", "seq2seq", "PegasusModel", "PegasusConfig", BART, pair, E.bart(2)),
    Architecture("marian", "seq2seq", "MarianModel", "MarianConfig", BART, pair, E.bart(0)),
    Architecture("whisper", "seq2seq", "WhisperModel", "WhisperConfig",
                 {**BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32},
                 lambda c: {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": ids(2, 5), "use_cache": False}, E.bart(2, convolutions=2)),
    # images
    Architecture("vit", "vision", "ViTModel", "ViTConfig", IMAGE, image, E.encoder()),
    Architecture("deit", "vision", "DeiTModel", "DeiTConfig", IMAGE, image, E.encoder()),
    Architecture("beit", "vision", "BeitModel", "BeitConfig", {**IMAGE, "use_relative_position_bias": True}, image, E.encoder(pooler=False)),
    Architecture("dinov2", "vision", "Dinov2Model", "Dinov2Config", {**IMAGE, "mlp_ratio": 2}, image, E.encoder(pooler=False)),
    Architecture("swin", "vision", "SwinModel", "SwinConfig",
                 {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}, image, E.windows(residuals=1)),
    Architecture("swinv2", "vision", "Swinv2Model", "Swinv2Config",
                 {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4}, image, E.windows(residuals=0)),
    Architecture("segformer", "vision", "SegformerModel", "SegformerConfig",
                 {"num_encoder_blocks": 2, "depths": [2, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
                  "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]}, image, E.pyramid(lambda stages: stages, "sr_ratios")),
    Architecture("poolformer", "vision", "PoolFormerModel", "PoolFormerConfig",
                 {"depths": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [7, 3], "strides": [4, 2], "padding": [2, 1],
                  "num_encoder_blocks": 2}, image, E.pooled),
    Architecture("pvt", "vision", "PvtModel", "PvtConfig",
                 {"image_size": 32, "num_encoder_blocks": 2, "depths": [2, 1], "sequence_reduction_ratios": [2, 1],
                  "hidden_sizes": [16, 32], "patch_sizes": [4, 2], "strides": [4, 2], "num_attention_heads": [2, 4],
                  "mlp_ratios": [2, 2]}, image, E.pyramid(lambda stages: 1, "sequence_reduction_ratios")),
    Architecture("cvt", "vision", "CvtModel", "CvtConfig",
                 {"embed_dim": [16, 32], "num_heads": [2, 4], "depth": [1, 2], "patch_sizes": [7, 3], "patch_stride": [4, 2],
                  "patch_padding": [2, 1], "mlp_ratio": [2.0, 2.0], "attention_drop_rate": [0.0, 0.0], "drop_rate": [0.0, 0.0],
                  "drop_path_rate": [0.0, 0.0], "qkv_bias": [True, True], "cls_token": [False, True],
                  "qkv_projection_method": ["dw_bn", "dw_bn"], "kernel_qkv": [3, 3], "padding_kv": [1, 1],
                  "stride_kv": [2, 2], "padding_q": [1, 1], "stride_q": [1, 1]}, image, E.cvt),
    Architecture("levit", "vision", "LevitModel", "LevitConfig",
                 {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4], "depths": [2, 1, 1],
                  "key_dim": [8, 8, 8], "mlp_ratio": [2, 2, 2], "attention_ratio": [2, 2, 2]}, image, E.levit),
    Architecture("mobilevit", "vision", "MobileViTModel", "MobileViTConfig",
                 {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 12, 16, 20, 24, 32],
                  "num_attention_heads": 4, "mlp_ratio": 2.0}, image, E.mobilevit),
    Architecture("convnext", "vision", "ConvNextModel", "ConvNextConfig",
                 {"hidden_sizes": [8, 16], "depths": [2, 1], "num_stages": 2}, image, E.convnext),
    Architecture("convnextv2", "vision", "ConvNextV2Model", "ConvNextV2Config",
                 {"hidden_sizes": [8, 16], "depths": [2, 1], "num_stages": 2}, image, E.convnext),
    Architecture("resnet", "vision", "ResNetModel", "ResNetConfig",
                 {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 1]}, image, E.resnet),
    Architecture("regnet", "vision", "RegNetModel", "RegNetConfig",
                 {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 1], "groups_width": 8}, image, E.regnet),
    Architecture("mobilenet-v1", "vision", "MobileNetV1Model", "MobileNetV1Config",
                 {"image_size": 64, "depth_multiplier": 0.25}, image, E.mobilenet_v1),
    Architecture("mobilenet-v2", "vision", "MobileNetV2Model", "MobileNetV2Config", {"image_size": 64}, image, E.mobilenet_v2),
    Architecture("efficientnet", "vision", "EfficientNetModel", "EfficientNetConfig",
                 {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320}, image, E.efficientnet),
    # audio
    Architecture("wav2vec2", "audio", "Wav2Vec2Model", "Wav2Vec2Config", WAV2VEC, wave, E.wav2vec2),
    Architecture("hubert", "audio", "HubertModel", "HubertConfig", WAV2VEC, wave, E.wav2vec2),
    Architecture("wavlm", "audio", "WavLMModel", "WavLMConfig", WAV2VEC, wave, E.wavlm),
    Architecture("ast", "audio", "ASTModel", "ASTConfig",
                 {**SMALL, "max_length": 40, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 8, "time_stride": 8},
                 lambda c: {"input_values": torch.randn(2, 40, 16)}, E.encoder(pooler=False)),
    # text and images
    Architecture("clip", "both", "CLIPModel", "CLIPConfig", {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 16},
                 picture_and_text, E.clip),
    Architecture("siglip", "both", "SiglipModel", "SiglipConfig", {"text_config": TEXT, "vision_config": IMAGE}, picture_and_text, E.siglip),
    Architecture("blip-text", "both", "BlipTextModel", "BlipTextConfig",
                 {**TEXT, "encoder_hidden_size": 32, "projection_dim": 16}, text, E.encoder()),
)  # fmt: skip


def get(name: str) -> Architecture:
    """The entry of that name; raises KeyError that lists the names where there is none."""
    found = next((a for a in ARCHITECTURES if a.name == name), None)
    if found is None:
        raise KeyError(f"no architecture {name!r}; known: {', '.join(a.name for a in ARCHITECTURES)}")
    return found
