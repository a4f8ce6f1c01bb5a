"""Every type of model in transformers that has an encoder and a decoder, and decoders that look
like one that fastvlm knows: how to build each small, and a batch for it.

`TYPES` is the list. What has no batch is built without memory for its weights: it must be refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import models
import torch
import transformers as tf
from batches import (
    Batch,
    Batches,
    acting,
    answer,
    caption,
    causal,
    formula,
    generating,
    image,
    numbers,
    page,
    spectrogram,
    text,
    typed,
    waveform,
)
from llama_models import LLAMAS
from models import FAMILIES, RELATIVES
from pix2struct_models import PIX2STRUCT
from sizes import EOS, PAD, VOCAB, small
from torch import nn


@dataclass(frozen=True)
class ModelType:
    """One class of transformers; settings go over the toy's sizes (`sizes.SMALL`).

    batches: what it is run on; None where nothing of it may be patched.
    build: where the class alone does not do it.
    """

    name: str
    batches: Batches | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    build: Callable[[], nn.Module] | None = None

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        if self.build is not None:
            return spread(self.build())
        model_class = getattr(tf, self.name)
        config = small(model_class.config_class, **self.settings)
        if self.batches is None:
            with torch.device("meta"):
                return model_class(config)
        return spread(model_class(config))


def spread(model: nn.Module) -> nn.Module:
    """Weights wide enough that what is left out shows, zero gates and unit norms too."""
    return models._spread(model, 0.15)


def _of(names: str, batches: Batches | None = None, **settings: Any) -> dict[str, ModelType]:
    """name=Class of transformers, in one string, all with the same settings."""
    pairs = (pair.split("=") for pair in names.split())
    return {key: ModelType(name, batches, settings) for key, name in pairs}


def _family(name: str) -> ModelType:
    family = {**FAMILIES, **RELATIVES, **LLAMAS, **PIX2STRUCT}[name]

    def batches() -> tuple[Batch, Batch]:
        return family.inputs(nn.Module()), family.training(nn.Module())

    return ModelType(name, batches, build=family.build)


def _decoder(config_class: Any, **settings: Any) -> Any:
    config = small(config_class, is_decoder=True, add_cross_attention=True, **settings)
    config.is_encoder_decoder = False
    return config


def _pair(kind: str, encoder: Any, decoder: Any, batches: Batches, size: Any = None) -> ModelType:
    """An encoder and a decoder of different types, in transformers' wrapper for such."""

    def build() -> nn.Module:
        enc = small(encoder, **(size or {}))
        whole = getattr(tf, f"{kind}Config").from_encoder_decoder_configs(enc, decoder())
        ends = {"pad_token_id": PAD, "decoder_start_token_id": EOS, "eos_token_id": EOS}
        for name, value in ends.items():
            setattr(whole, name, value)
        return getattr(tf, f"{kind}Model")(config=whole)

    return ModelType(f"{kind}Model", batches, build=build)


def _pairs(
    name: str, kind: str, encoder: Any, batches: Batches, **decoders: Any
) -> dict[str, ModelType]:
    return {
        f"{name}+{key}": _pair(kind, encoder, partial(_decoder, decoder), batches)
        for key, decoder in decoders.items()
    }


def _music(kind: str) -> ModelType:
    """T5 reads the text; nothing else is known."""

    def build() -> nn.Module:
        parts = {
            "text_encoder": small(tf.T5Config),
            "audio_encoder": tf.EncodecConfig(**ENCODEC),
            "decoder": small(getattr(tf, f"{kind}DecoderConfig"), num_codebooks=2),
        }
        config = getattr(tf, f"{kind}Config")(**{n: c.to_dict() for n, c in parts.items()})
        for each in (config, config.decoder):
            each.decoder_start_token_id, each.pad_token_id = EOS, PAD
        return getattr(tf, f"{kind}ForConditionalGeneration")(config)

    return ModelType(f"{kind}ForConditionalGeneration", sung, build=build)


def sung() -> tuple[Batch, Batch]:
    """Labels of two codebooks; what generate() gives is sound, and no tokens."""
    codes = torch.randint(3, 60, (3, 6, 2), generator=torch.Generator().manual_seed(3))
    return {}, {**text()[0], "labels": codes}


ENCODEC = {
    "num_filters": 4,
    "hidden_size": 16,
    "codebook_size": 64,
    "codebook_dim": 16,
    "num_lstm_layers": 1,
    "upsampling_ratios": [2, 2],
}
SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "patch_size": 4}
WAVES = {
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
}
BACKBONE = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 16],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}
WORDS = {
    "model_type": "clip_text_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
FORMULA = {
    "mlp_dim": 64,
    "output_channels": 16,
    "post_conv_in_channels": 16,
    "post_conv_mid_channels": 16,
    "post_conv_out_channels": 32,
    "global_attn_indexes": [1],
}
# as its checkpoints for printed text have it
TROCR_WAVES = {
    "use_learned_position_embeddings": False,
    "layernorm_embedding": False,
    "scale_embedding": True,
    "activation_function": "relu",
}
FULL = {"attention_type": "original_full"}
MOE = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}


def _bart(**settings: Any) -> Any:
    return lambda: _decoder(tf.BartConfig, **settings)


BLIP = {"text_config": {"sep_token_id": EOS, "label_smoothing": 0.1}}

PAIRS = {
    **_pairs(
        "vit",
        "VisionEncoderDecoder",
        tf.ViTConfig,
        image,
        trocr=tf.TrOCRConfig,
        mbart=tf.MBartConfig,
        gpt2=tf.GPT2Config,
        bert=tf.BertConfig,
        roberta=tf.RobertaConfig,
    ),
    "vit+trocr of waves": _pair(
        "VisionEncoderDecoder", tf.ViTConfig, lambda: _decoder(tf.TrOCRConfig, **TROCR_WAVES), image
    ),
    "vit+bart": _pair("VisionEncoderDecoder", tf.ViTConfig, _bart(), image),
    "swin+mbart": _pair(
        "VisionEncoderDecoder", tf.SwinConfig, lambda: _decoder(tf.MBartConfig), image, SWIN
    ),
    "vit+wide bart": _pair("VisionEncoderDecoder", tf.ViTConfig, _bart(d_model=48), image),
    **_pairs(
        "bert",
        "EncoderDecoder",
        tf.BertConfig,
        text,
        bert=tf.BertConfig,
        gpt2=tf.GPT2Config,
        bert_generation=tf.BertGenerationConfig,
        electra=tf.ElectraConfig,
        xlm_roberta=tf.XLMRobertaConfig,
        data2vec=tf.Data2VecTextConfig,
    ),
    "bert+bart": _pair("EncoderDecoder", tf.BertConfig, _bart(), text),
    "wav2vec2+bart": _pair("SpeechEncoderDecoder", tf.Wav2Vec2Config, _bart(), waveform, WAVES),
    "wav2vec2+mbart": _pair(
        "SpeechEncoderDecoder", tf.Wav2Vec2Config, lambda: _decoder(tf.MBartConfig), waveform, WAVES
    ),
}

TYPES: dict[str, ModelType] = {
    **{name: _family(name) for name in FAMILIES if name not in ("florenz", "whisper")},
    "mllama": _family("mllama"),
    **_of(
        "whisper=WhisperForConditionalGeneration",
        numbers("input_features", 3, 8, 24),
        **models._sound(),
    ),
    **PAIRS,
    **_of("blip=BlipForConditionalGeneration", caption, **BLIP),
    "pix2struct": _family("pix2struct"),
    **_of("blip-vqa=BlipForQuestionAnswering", answer, **BLIP),
    **_of(
        "mvp=MvpForConditionalGeneration plbart=PLBartForConditionalGeneration "
        "blenderbot=BlenderbotForConditionalGeneration "
        "blenderbot-small=BlenderbotSmallForConditionalGeneration "
        "bigbird_pegasus=BigBirdPegasusForConditionalGeneration led=LEDForConditionalGeneration "
        "m2m_100=M2M100ForConditionalGeneration "
        "marian=MarianMTModel mt5=MT5ForConditionalGeneration "
        "pegasus=PegasusForConditionalGeneration pegasus_x=PegasusXForConditionalGeneration "
        "prophetnet=ProphetNetForConditionalGeneration "
        "switch_transformers=SwitchTransformersForConditionalGeneration "
        "umt5=UMT5ForConditionalGeneration",
        text,
    ),
    **_of(
        "t5=T5ForConditionalGeneration longt5=LongT5ForConditionalGeneration",
        text,
        decoder_start_token_id=EOS,
    ),
    **_of("bigbird_pegasus-full=BigBirdPegasusForConditionalGeneration", text, **FULL),
    **_of("nllb-moe=NllbMoeForConditionalGeneration", text, **MOE),
    **_of("fsmt=FSMTForConditionalGeneration", text, src_vocab_size=VOCAB, tgt_vocab_size=VOCAB),
    **_of("seamless_m4t=SeamlessM4TForTextToText", text),
    **_of("seamless_m4t_v2=SeamlessM4Tv2ForTextToText", text),
    **_of("mvp-prompts=MvpForConditionalGeneration", text, use_prompt=True, prompt_length=4),
    # decoders alone
    **_of(
        "bart-decoder=BartForCausalLM mbart-decoder=MBartForCausalLM mvp-decoder=MvpForCausalLM "
        "plbart-decoder=PLBartForCausalLM blenderbot-decoder=BlenderbotForCausalLM "
        "blenderbot-small-decoder=BlenderbotSmallForCausalLM pegasus-decoder=PegasusForCausalLM "
        "bigbird_pegasus-decoder=BigBirdPegasusForCausalLM trocr=TrOCRForCausalLM "
        "marian-decoder=MarianForCausalLM prophetnet-decoder=ProphetNetForCausalLM "
        "whisper-decoder=WhisperForCausalLM opt=OPTForCausalLM gpt2=GPT2LMHeadModel "
        "gpt_bigcode=GPTBigCodeForCausalLM bert=BertLMHeadModel roberta=RobertaForCausalLM "
        "xglm=XGLMForCausalLM biogpt=BioGptForCausalLM gemma=GemmaForCausalLM "
        "gemma3_text=Gemma3ForCausalLM gemma4_unified_text=Gemma4UnifiedForCausalLM "
        "vaultgemma=VaultGemmaForCausalLM llama=LlamaForCausalLM mistral=MistralForCausalLM "
        "qwen2=Qwen2ForCausalLM qwen3=Qwen3ForCausalLM phi3=Phi3ForCausalLM olmo2=Olmo2ForCausalLM "
        "olmo3=Olmo3ForCausalLM exaone4=Exaone4ForCausalLM "
        "beam=BeamForCausalLM glm4=Glm4ForCausalLM cohere2=Cohere2ForCausalLM "
        "smollm3=SmolLM3ForCausalLM",
        causal,
    ),
    **_of("flex_olmo=FlexOlmoForCausalLM", generating),
    # the decoders of BERT's relatives, which take an encoder's states; nothing of them is known
    **_of(
        "bert-generation=BertGenerationDecoder big_bird=BigBirdForCausalLM "
        "camembert=CamembertForCausalLM data2vec-text=Data2VecTextForCausalLM "
        "electra=ElectraForCausalLM ernie=ErnieForCausalLM megatron-bert=MegatronBertForCausalLM "
        "rembert=RemBertForCausalLM roberta-prelayernorm=RobertaPreLayerNormForCausalLM "
        "roc_bert=RoCBertForCausalLM roformer=RoFormerForCausalLM xlm=XLMWithLMHeadModel "
        "xlm-roberta=XLMRobertaForCausalLM xlm-roberta-xl=XLMRobertaXLForCausalLM "
        "xmod=XmodForCausalLM flaubert=FlaubertWithLMHeadModel tapas=TapasForMaskedLM "
        "imagegpt=ImageGPTForCausalImageModeling"
    ),
    # a copy of GPT-2 inside; what it gives is compared in tests/patching/test_gpt2.py
    **_of("decision_transformer=DecisionTransformerModel", acting),
    # of images, speech and text
    **_of(
        "speech_to_text=Speech2TextForConditionalGeneration speecht5=SpeechT5ForSpeechToText "
        "speecht5-tts=SpeechT5ForTextToSpeech moonshine=MoonshineForConditionalGeneration "
        "canary=CanaryForConditionalGeneration cohere_asr=CohereAsrForConditionalGeneration "
        "dia=DiaForConditionalGeneration "
        "udop=UdopForConditionalGeneration blip-2=Blip2ForConditionalGeneration "
        "instructblip=InstructBlipForConditionalGeneration idefics=IdeficsForVisionText2Text "
        "instructblipvideo=InstructBlipVideoForConditionalGeneration "
        "evolla=EvollaForProteinText2Text kosmos-2=Kosmos2ForConditionalGeneration "
        "blt=BltForCausalLM git=GitForCausalLM "
        "musicgen-decoder=MusicgenForCausalLM musicgen_melody-decoder=MusicgenMelodyForCausalLM "
        "seamless_m4t-speech=SeamlessM4TForSpeechToText "
        "seamless_m4t_v2-speech=SeamlessM4Tv2ForSpeechToText "
        "audioflamingo3=AudioFlamingo3ForConditionalGeneration "
        "fastspeech2_conformer=FastSpeech2ConformerModel nemotron3_5_asr=Nemotron3_5AsrForRNNT "
        "nemotron_asr_streaming=NemotronAsrStreamingForRNNT parakeet_rnnt=ParakeetForRNNT "
        "parakeet_tdt=ParakeetForTDT"
    ),
    **_of("kosmos-2.5=Kosmos2_5ForConditionalGeneration", page, latent_query_num=4),
    **_of("pop2piano=Pop2PianoForConditionalGeneration", spectrogram, decoder_start_token_id=EOS),
    **_of("moonshine_streaming=MoonshineStreamingForConditionalGeneration", num_key_value_heads=2),
    "musicgen": _music("Musicgen"),
    "musicgen_melody": _music("MusicgenMelody"),
    **_of("t5gemma2=T5Gemma2ForConditionalGeneration", text, encoder={"vision_config": SIGLIP}),
    **_of("gemma3=Gemma3ForConditionalGeneration", typed, vision_config=SIGLIP),
    **_of("pp_formulanet=PPFormulaNetForConditionalGeneration", formula, vision_config=FORMULA),
    # objects and time series
    **_of(
        "conditional_detr=ConditionalDetrForObjectDetection detr=DetrForObjectDetection "
        "dab-detr=DabDetrForObjectDetection deformable_detr=DeformableDetrForObjectDetection "
        "table-transformer=TableTransformerForObjectDetection",
        backbone_config=BACKBONE,
    ),
    **_of(
        "d_fine=DFineForObjectDetection "
        "deimv2=Deimv2ForObjectDetection rt_detr=RTDetrForObjectDetection "
        "rt_detr_v2=RTDetrV2ForObjectDetection pp_doclayout_v2=PPDocLayoutV2ForObjectDetection "
        "pp_doclayout_v3=PPDocLayoutV3ForObjectDetection "
        "pp_doclayout_v4=PPDocLayoutV4ForObjectDetection "
        "grounding-dino=GroundingDinoForObjectDetection "
        "mm-grounding-dino=MMGroundingDinoForObjectDetection"
    ),
    **_of("omdet-turbo=OmDetTurboForObjectDetection", backbone_config=BACKBONE, text_config=WORDS),
    **_of(
        "autoformer=AutoformerModel informer=InformerModel "
        "time_series_transformer=TimeSeriesTransformerModel",
        prediction_length=4,
    ),
}
# types that read two encoders and have no decoder; whose file defines, for others, what reads an
# encoder; and another name for one above
NONE_OF_THESE = {
    "audioflamingo3_encoder",
    "bridgetower",
    "data2vec-audio",
    "data2vec-vision",
    "gpt-sw3",
    "t5gemma2_encoder",
}
