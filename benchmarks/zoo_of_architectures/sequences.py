"""Networks of language, speech, sound, and several kinds of input at once."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from zoo_of_architectures.entry import (
    Architecture,
    Built,
    both,
    configured,
    image,
    named,
    noise,
    pairs,
    tokens,
    wave,
    words,
)


class Tagger(nn.Module):
    """Tags of a sentence by a recurrent network over both directions."""

    def __init__(self, recurrent: Callable[..., nn.Module], **settings: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(512, 128)
        self.recurrent = recurrent(128, 128, num_layers=2, batch_first=True, bidirectional=True, **settings)
        self.head = nn.LazyLinear(16)
        self(words())

    def forward(self, sentence: Tensor) -> Tensor:
        out: Tensor = self.head(self.recurrent(self.embedding(sentence))[0])
        return out


class PaddedEncoder(nn.Module):
    """nn.TransformerEncoder over sentences of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(512, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(128, 16)

    def forward(self, sentence: Tensor, padding: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(self.embedding(sentence), src_key_padding_mask=padding))
        return out


class Translator(nn.Module):
    """nn.Transformer whose two embeddings and head are one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(512, 128)
        self.transformer = nn.Transformer(128, 4, 2, 2, 256, batch_first=True)
        self.head = nn.Linear(128, 512, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        hidden = self.transformer(self.embedding(source), self.embedding(target), tgt_mask=mask, tgt_is_causal=True)
        out: Tensor = self.head(hidden)
        return out


def padded() -> Built:
    """The encoder, and two sentences of which the second is padded."""
    padding = torch.zeros(2, 16, dtype=torch.bool)
    padding[1, 10:] = True
    return PaddedEncoder(), (words(batch=2), padding)


def hf(name: str, inputs: Any = tokens, **settings: Any) -> Any:
    """A builder of a transformers class that keeps nothing of a pass for the next."""
    return configured(name, inputs, use_cache=False, **settings)


def spoken() -> dict[str, Tensor]:
    """Keyword arguments of a text-to-speech model that is given the frames before."""
    return {"input_ids": words(), "decoder_input_values": noise(1, 8, 80), "speaker_embeddings": noise(1, 512)}


def heard(*sizes: int) -> Callable[[], dict[str, Tensor]]:
    """Maker of keyword arguments of a speech-to-text model that is given the words before."""
    return lambda: {"input_features": noise(1, *sizes), "decoder_input_ids": words(12)}


def llava() -> Built:
    """LLaVA of a small CLIP and a small Llama."""
    transformers = import_module("transformers")
    settings = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**WIDE, image_size=32, patch_size=8),
        text_config=transformers.LlamaConfig(**DECODER, use_cache=False),
        image_token_id=3,
        vision_feature_layer=-1,
    )
    sentence = torch.cat([torch.full((1, 16), 3), words()], dim=1)
    return transformers.LlavaForConditionalGeneration(settings), {
        "input_ids": sentence,
        "pixel_values": noise(1, 3, 32, 32),
    }


WIDE: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
SIZES = {**WIDE, "vocab_size": 512}
ENCODER = {**SIZES, "max_position_embeddings": 64}
DECODER = {**ENCODER, "num_key_value_heads": 2, "pad_token_id": 0}
HEADS = {**DECODER, "head_dim": 32}
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
T5: dict[str, Any] = {"vocab_size": 512, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4}
BART: dict[str, Any] = {
    "vocab_size": 512, "d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256,
}  # fmt: skip
SPEECH: dict[str, Any] = {
    **WIDE, "conv_dim": (64, 64, 64), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
TWO_TOWERS: dict[str, Any] = {
    "text_config": {**ENCODER, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "vision_config": {**WIDE, "image_size": 32, "patch_size": 8},
}

ENCODERS = (
    Architecture("bert", "BERT", "transformers", hf("BertForSequenceClassification", **ENCODER), tested=True),
    Architecture("distilbert", "DistilBERT", "transformers", hf(
        "DistilBertForSequenceClassification", vocab_size=512, dim=128, n_layers=2, n_heads=4, hidden_dim=256,
        max_position_embeddings=64)),
    Architecture("roberta", "RoBERTa", "transformers", hf("RobertaForMaskedLM", **ENCODER)),
    Architecture("albert", "ALBERT", "transformers", hf("AlbertModel", **ENCODER, embedding_size=64), tested=True),
    Architecture("electra", "ELECTRA", "transformers", hf("ElectraModel", **ENCODER, embedding_size=64)),
    Architecture("deberta", "DeBERTa", "transformers", hf(
        "DebertaModel", **ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"])),
    Architecture("deberta_v2", "DeBERTa", "transformers", hf(
        "DebertaV2Model", **ENCODER, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=16,
        norm_rel_ebd="layer_norm", share_att_key=True)),
    Architecture("mobilebert", "MobileBERT", "transformers", hf(
        "MobileBertModel", **ENCODER, embedding_size=64, true_hidden_size=64, intra_bottleneck_size=64)),
    Architecture("squeezebert", "SqueezeBERT", "transformers", hf("SqueezeBertModel", **ENCODER, embedding_size=128)),
    Architecture("convbert", "ConvBERT", "transformers", hf(
        "ConvBertModel", **ENCODER, embedding_size=64, head_ratio=2)),
    Architecture("modernbert", "ModernBERT", "transformers", hf("ModernBertModel", **ENCODER, pad_token_id=0)),
    Architecture("xlnet", "XLNet", "transformers", configured(
        "XLNetModel", lambda: {**tokens(), "use_mems": False}, vocab_size=512, d_model=128, n_layer=2, n_head=4,
        d_inner=256)),
    Architecture("fnet", "FNet", "transformers", hf("FNetModel", **ENCODER)),
    Architecture("longformer", "Longformer", "transformers", hf("LongformerModel", **ENCODER, attention_window=8)),
)  # fmt: skip
"""Encoders of text."""

DECODERS = (
    Architecture("gpt2", "GPT-2", "transformers", hf(
        "GPT2LMHeadModel", vocab_size=512, n_positions=64, n_embd=128, n_layer=2, n_head=4), tested=True),
    Architecture("gpt_neo", "GPT-Neo", "transformers", hf(
        "GPTNeoForCausalLM", vocab_size=512, hidden_size=128, num_layers=2, num_heads=4, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]])),
    Architecture("gpt_neox", "GPT-NeoX", "transformers", hf("GPTNeoXForCausalLM", **ENCODER)),
    Architecture("gptj", "GPT-J", "transformers", hf(
        "GPTJForCausalLM", vocab_size=512, n_positions=64, n_embd=128, n_layer=2, n_head=4, rotary_dim=16)),
    Architecture("opt", "OPT", "transformers", hf(
        "OPTForCausalLM", vocab_size=512, hidden_size=128, ffn_dim=256, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=64)),
    Architecture("bloom", "BLOOM", "transformers", hf(
        "BloomForCausalLM", vocab_size=512, hidden_size=128, n_layer=2, n_head=4)),
    Architecture("falcon", "Falcon", "transformers", hf("FalconForCausalLM", **SIZES)),
    Architecture("mpt", "MPT", "transformers", hf(
        "MptForCausalLM", vocab_size=512, d_model=128, n_layers=2, n_heads=4, max_seq_len=64, expansion_ratio=2)),
    Architecture("llama", "Llama", "transformers", hf("LlamaForCausalLM", **DECODER), tested=True),
    Architecture("llama_tied", "Llama", "transformers", hf("LlamaForCausalLM", **DECODER, tie_word_embeddings=True)),
    Architecture("mistral", "Mistral", "transformers", hf("MistralForCausalLM", **DECODER, sliding_window=8)),
    Architecture("qwen2", "Qwen", "transformers", hf("Qwen2ForCausalLM", **DECODER)),
    Architecture("qwen3", "Qwen", "transformers", hf("Qwen3ForCausalLM", **HEADS)),
    Architecture("gemma2", "Gemma", "transformers", hf(
        "Gemma2ForCausalLM", **HEADS, query_pre_attn_scalar=32, sliding_window=8)),
    Architecture("gemma3", "Gemma", "transformers", hf(
        "Gemma3ForCausalLM", **HEADS, query_pre_attn_scalar=32, sliding_window=8)),
    Architecture("phi", "Phi", "transformers", hf("PhiForCausalLM", **ENCODER)),
    Architecture("phi3", "Phi", "transformers", hf("Phi3ForCausalLM", **DECODER)),
    Architecture("olmo2", "OLMo", "transformers", hf("Olmo2ForCausalLM", **DECODER)),
    Architecture("stablelm", "StableLM", "transformers", hf("StableLmForCausalLM", **DECODER)),
    Architecture("cohere", "Cohere", "transformers", hf("CohereForCausalLM", **DECODER)),
    Architecture("mixtral", "Mixtral", "transformers", hf(
        "MixtralForCausalLM", **DECODER, num_local_experts=4, num_experts_per_tok=2)),
    Architecture("qwen2_moe", "Qwen MoE", "transformers", hf(
        "Qwen2MoeForCausalLM", **DECODER, **EXPERTS, shared_expert_intermediate_size=128)),
    Architecture("qwen3_moe", "Qwen MoE", "transformers", hf("Qwen3MoeForCausalLM", **HEADS, **EXPERTS)),
    Architecture("deepseek_v3", "DeepSeek", "transformers", hf(
        "DeepseekV3ForCausalLM", **{**DECODER, "num_key_value_heads": 4}, moe_intermediate_size=64, n_routed_experts=4,
        num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, kv_lora_rank=32, q_lora_rank=48,
        qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32)),
    Architecture("gpt_oss", "GPT-OSS", "transformers", hf(
        "GptOssForCausalLM", **HEADS, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)),
    Architecture("mamba", "Mamba", "transformers", hf(
        "MambaForCausalLM", vocab_size=512, hidden_size=128, num_hidden_layers=2, state_size=8)),
    Architecture("mamba2", "Mamba", "transformers", hf(
        "Mamba2ForCausalLM", vocab_size=512, hidden_size=128, num_hidden_layers=2, state_size=16, head_dim=32,
        num_heads=8, n_groups=1, chunk_size=8)),
    Architecture("recurrent_gemma", "Griffin", "transformers", hf(
        "RecurrentGemmaForCausalLM", **{**DECODER, "num_hidden_layers": 3}, lru_width=128, attention_window_size=8)),
    Architecture("rwkv", "RWKV", "transformers", hf(
        "RwkvForCausalLM", vocab_size=512, context_length=64, hidden_size=128, num_hidden_layers=2)),
)  # fmt: skip
"""Language models."""

PAIRS = (
    Architecture("t5", "T5", "transformers", hf("T5ForConditionalGeneration", pairs, **T5)),
    Architecture("flan_t5", "T5", "transformers", hf(
        "T5ForConditionalGeneration", pairs, **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    Architecture("bart", "BART", "transformers", hf(
        "BartForConditionalGeneration", pairs, **BART, max_position_embeddings=64)),
    Architecture("marian", "Marian", "transformers", hf(
        "MarianMTModel", pairs, **BART, max_position_embeddings=64, pad_token_id=0, decoder_start_token_id=0)),
    Architecture("whisper", "Whisper", "transformers", hf(
        "WhisperForConditionalGeneration", heard(80, 128), **BART, max_source_positions=64, max_target_positions=32,
        num_mel_bins=80, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)),
    Architecture("speech_to_text", "Speech2Text", "transformers", hf(
        "Speech2TextForConditionalGeneration", heard(64, 80), **BART, max_source_positions=64, max_target_positions=32,
        conv_channels=128)),
    Architecture("translator", "nn.Transformer", "torch", lambda: (Translator(), (words(), words(12)))),
)  # fmt: skip
"""Encoders and decoders together."""

SOUND = (
    Architecture("wav2vec2", "wav2vec 2", "transformers", configured("Wav2Vec2ForCTC", wave, **SPEECH, vocab_size=32)),
    Architecture("wav2vec2_stable", "wav2vec 2", "transformers", configured(
        "Wav2Vec2Model", wave, **SPEECH, do_stable_layer_norm=True, feat_extract_norm="layer")),
    Architecture("hubert", "HuBERT", "transformers", configured("HubertModel", wave, **SPEECH)),
    Architecture("wavlm", "WavLM", "transformers", configured("WavLMModel", wave, **SPEECH)),
    Architecture("ast", "AST", "transformers", configured(
        "ASTForAudioClassification", named("input_values", lambda: noise(1, 64, 64)), **WIDE, max_length=64,
        num_mel_bins=64)),
    Architecture("encodec", "EnCodec", "transformers", configured(
        "EncodecModel", named("input_values", lambda: noise(1, 1, 4000)), num_filters=8, hidden_size=64,
        codebook_dim=64, codebook_size=64, upsampling_ratios=[8, 5, 4, 2])),
    Architecture("vits", "VITS", "transformers", configured(
        "VitsModel", tokens, vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, ffn_dim=128,
        flow_size=64, spectrogram_bins=65, upsample_initial_channel=64, prior_encoder_num_flows=2,
        posterior_encoder_num_wavenet_layers=2, prior_encoder_num_wavenet_layers=2,
        duration_predictor_filter_channels=64), ragged=True),
    Architecture("hifigan", "HiFi-GAN", "transformers", configured(
        "SpeechT5HifiGan", named("spectrogram", lambda: noise(20, 80)), upsample_initial_channel=128)),
    Architecture("speecht5", "SpeechT5", "transformers", configured(
        "SpeechT5ForTextToSpeech", spoken, vocab_size=512, hidden_size=128, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=256, decoder_ffn_dim=256,
        speech_decoder_prenet_units=64, speech_decoder_postnet_units=64,
        use_cache=False)),
)  # fmt: skip
"""Speech and sound."""

TOGETHER = (
    Architecture("clip_vision", "CLIP", "transformers", configured(
        "CLIPVisionModel", named("pixel_values", image(32)), **WIDE, image_size=32, patch_size=8)),
    Architecture("clip_text", "CLIP", "transformers", configured(
        "CLIPTextModel", tokens, **ENCODER, bos_token_id=1, eos_token_id=2)),
    Architecture("clip", "CLIP", "transformers", configured("CLIPModel", both, **TWO_TOWERS, projection_dim=64)),
    Architecture("siglip", "SigLIP", "transformers", configured("SiglipModel", both, **TWO_TOWERS)),
    Architecture("vilt", "ViLT", "transformers", configured(
        "ViltModel", both, **ENCODER, image_size=32, patch_size=8)),
    Architecture("llava", "LLaVA", "transformers", llava),
    Architecture("perceiver", "Perceiver", "transformers", configured(
        "PerceiverModel", named("inputs", lambda: noise(1, 16, 64)), d_model=64, d_latents=128, num_latents=16,
        num_blocks=1, num_self_attends_per_block=2, num_self_attention_heads=4, num_cross_attention_heads=4)),
)  # fmt: skip
"""Text and images together."""

PLAIN = (
    Architecture("lstm_tagger", "LSTM", "torch", lambda: (Tagger(nn.LSTM), words()), tested=True),
    Architecture("lstm_projected", "LSTM", "torch", lambda: (Tagger(nn.LSTM, proj_size=48), words())),
    Architecture("gru_tagger", "GRU", "torch", lambda: (Tagger(nn.GRU), words())),
    Architecture("padded_encoder", "nn.Transformer", "torch", padded, tested=True),
    Architecture("patchtst", "PatchTST", "transformers", configured(
        "PatchTSTForPrediction", named("past_values", lambda: noise(1, 64, 3)), num_input_channels=3,
        context_length=64, patch_length=8, patch_stride=8, num_hidden_layers=2, d_model=128, num_attention_heads=4,
        ffn_dim=256, prediction_length=16)),
)  # fmt: skip
"""Plain torch modules, and time series."""

SEQUENCES = (*ENCODERS, *DECODERS, *PAIRS, *SOUND, *TOGETHER, *PLAIN)
