"""Encoders, encoder-decoders, speech and vision models of transformers."""

from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional

from benchmarks.common import Batch
from benchmarks.zoo.entries import (
    CLASSES,
    HEADS,
    HIDDEN,
    LAYERS,
    PIXELS,
    ROWS,
    TOKENS,
    VOCABULARY,
    WIDE,
    Entry,
    images,
    padded_classes,
    text,
)

_ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 2 * TOKENS,
    "pad_token_id": 0,
}
_SEQ2SEQ: dict[str, Any] = {
    "d_model": HIDDEN,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": WIDE,
    "decoder_ffn_dim": WIDE,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "use_cache": False,
}


def _bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**_ENCODER))


def _roberta() -> nn.Module:
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**_ENCODER, type_vocab_size=1))


def _deberta() -> nn.Module:
    settings: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "share_att_key": True}
    norm: dict[str, Any] = {"norm_rel_ebd": "layer_norm", "position_biased_input": False}
    config = transformers.DebertaV2Config(**_ENCODER, **settings, **norm)
    config.problem_type = "single_label_classification"  # else the loss branches on how many labels are negative
    return transformers.DebertaV2ForSequenceClassification(config)


def _modernbert() -> nn.Module:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    special: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**_ENCODER, **special, local_attention=6, layer_types=kinds))


def _distilbert() -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "dim": HIDDEN, "hidden_dim": WIDE, "n_layers": LAYERS, "n_heads": HEADS}
    return transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(**sizes, max_position_embeddings=TOKENS))


def _t5() -> nn.Module:
    sizes: dict[str, Any] = {"num_layers": 2, "num_decoder_layers": 2, "d_model": HIDDEN, "d_kv": 8, "d_ff": WIDE, "num_heads": HEADS}
    config = transformers.T5Config(**sizes, vocab_size=VOCABULARY, use_cache=False)
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


def _bart() -> nn.Module:
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**_SEQ2SEQ, max_position_embeddings=2 * TOKENS))


def _whisper() -> nn.Module:
    sizes: dict[str, Any] = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": TOKENS, "suppress_tokens": None}
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**_SEQ2SEQ, **sizes, begin_suppress_tokens=None))


def _speech() -> Batch:
    return {"input_features": torch.randn(ROWS, 8, 32), "labels": torch.randint(3, VOCABULARY, (ROWS, 6))}


_VISION: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": PIXELS,
    "patch_size": 8,
}


def _vit() -> nn.Module:
    config = transformers.ViTConfig(**_VISION)
    config.num_labels = CLASSES
    return transformers.ViTForImageClassification(config)


def _dinov2() -> nn.Module:
    sizes: dict[str, Any] = {**_VISION, "mlp_ratio": 2, "layerscale_value": 0.5, "drop_path_rate": 0.0}
    config = transformers.Dinov2Config(**sizes)
    config.num_labels = CLASSES
    model = transformers.Dinov2ForImageClassification(config)
    model.get_parameter("dinov2.embeddings.mask_token").requires_grad_(False)  # only read where patches are masked
    return model


def _convnext() -> nn.Module:
    config = transformers.ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 2], num_stages=2, patch_size=4, image_size=PIXELS)
    config.num_labels = CLASSES
    config.layer_scale_init_value = 0.5
    return transformers.ConvNextForImageClassification(config)


def _resnet() -> nn.Module:
    sizes: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "layer_type": "basic"}
    config = transformers.ResNetConfig(**sizes)
    config.num_labels = CLASSES
    return transformers.ResNetForImageClassification(config)


def _clip() -> nn.Module:
    texts = {**_ENCODER, "bos_token_id": 1, "eos_token_id": 2, "projection_dim": HIDDEN}
    config = transformers.CLIPConfig(text_config=texts, vision_config={**_VISION, "projection_dim": HIDDEN}, projection_dim=HIDDEN)
    return transformers.CLIPModel(config)


def _pairs() -> Batch:
    ids = torch.cat([torch.randint(3, VOCABULARY, (ROWS, TOKENS - 1)), torch.full((ROWS, 1), 2)], 1)
    return {"input_ids": ids, "pixel_values": torch.randn(ROWS, 3, PIXELS, PIXELS), "attention_mask": torch.ones_like(ids)}


class _Contrastive(nn.Module):
    """CLIP with its loss: the model computes it only when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = _clip()

    def forward(self, **batch: torch.Tensor) -> Any:
        """Token ids, pixel values and attention mask of pairs."""
        return self.clip(**batch, return_loss=True)


def _wav2vec2() -> nn.Module:
    features: dict[str, Any] = {"conv_dim": [16, 16], "conv_stride": [4, 2], "conv_kernel": [8, 4], "num_feat_extract_layers": 2}
    positions: dict[str, Any] = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}
    sizes = {name: value for name, value in _ENCODER.items() if name != "max_position_embeddings"}
    config = transformers.Wav2Vec2Config(**sizes, **features, **positions, layerdrop=0.0, ctc_loss_reduction="mean")
    model = transformers.Wav2Vec2ForCTC(config)
    model.freeze_feature_encoder()  # as everybody does; trained, it sets `requires_grad` inside forward
    return model


def _waves() -> Batch:
    return {"input_values": torch.randn(ROWS, 320)}


def _ctc(output: Any) -> torch.Tensor:
    """Outside the model: with labels, it branches on the largest of them."""
    scores = output.logits.log_softmax(-1).transpose(0, 1)
    labels = torch.arange(3, 3 + 4).repeat(ROWS, 1)
    return functional.ctc_loss(scores, labels, torch.full((ROWS,), len(scores)), torch.full((ROWS,), 4))


OTHERS = (
    Entry("BERT", "classifier, pooler, three embeddings, dropout", _bert, padded_classes),
    Entry("RoBERTa", "masked language model, tied head with a bias of its own", _roberta, text),
    Entry("DeBERTa-v3", "disentangled attention, relative positions shared by all layers", _deberta, padded_classes),
    Entry("ModernBERT", "local and global attention, no biases", _modernbert, text),
    Entry("DistilBERT", "classifier", _distilbert, padded_classes),
    Entry("T5", "two stacks, relative position biases shared by the blocks", _t5, text),
    Entry("BART", "two stacks, one embedding for both and the head", _bart, text),
    Entry("Whisper", "1-D convolutions over audio, two stacks", _whisper, _speech),
    Entry("Wav2Vec2", "1-D convolutions, weight norm, CTC loss outside the model", _wav2vec2, _waves, _ctc),
    Entry("CLIP", "two towers, one scalar temperature", _Contrastive, _pairs),
    Entry("ViT", "patch convolution, class token", _vit, images),
    Entry("DINOv2", "layer scale", _dinov2, images),
    Entry("ConvNeXt", "depthwise convolutions, layer scale", _convnext, images),
    Entry("ResNet", "convolutions, BatchNorm buffers", _resnet, images),
)
