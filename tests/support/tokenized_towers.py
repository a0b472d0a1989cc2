"""Tiny random multi-modal models of many families, with a tokenizer that their vocabulary fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from tests.support.tokenizer import VOCABULARY, byte_tokenizer

LAYERS = 2
IMAGE, START, END, VIDEO, AUDIO = 6, 7, 8, 9, 10
"""Ids of the words for pictures, their ends, films and sounds."""

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_SIGHT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
_LARGE = {**_SIGHT, "image_size": 56}
_QWEN_SIGHT: dict[str, Any] = {
    "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 128,
    "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
_QWEN_IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START,
    "vision_end_token_id": END,
}  # fmt: skip
_IMAGE = {"image_token_id": IMAGE, "image_token_index": IMAGE}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
_DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_DEEPSEEK = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
    "v_head_dim": 32, "num_key_value_heads": 4, "num_nextn_predict_layers": 0,
}  # fmt: skip


def _text(family: object = "", **more: Any) -> dict[str, Any]:
    return {**_TEXT, **({"model_type": family} if family else {}), **more}


def _three_axes(*section: int, **more: Any) -> dict[str, Any]:
    """Positions in time, height and width: how many pairs of a head's channels each turns."""
    return {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": list(section), **more,
        }
    }  # fmt: skip


_PIXTRAL = {**_LARGE, "model_type": "pixtral", "head_dim": 32}
_SIGLIP = {**_SIGHT, "model_type": "siglip_vision_model"}
_CLIP = {**_SIGHT, "model_type": "clip_vision_model"}

FAMILIES: dict[str, dict[str, Any]] = {
    "aria": {
        "text_config": _text(
            "aria_text", moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1,
            intermediate_size=128,
        ),
        "vision_config": _SIGHT,
        "projector_patch_to_query_dict": {4: 4},
        **_IMAGE,
    },
    "aya_vision": {"text_config": _text("cohere2"), "vision_config": _SIGLIP, **_IMAGE},
    "ernie4_5_vl_moe": {
        "text_config": _text(
            moe_num_experts=4, moe_k=2, moe_intermediate_size=[128, 64], moe_num_shared_experts=1,
            mlp_layer_types=["dense", "sparse"], **_three_axes(6, 6, 4),
        ),
        "vision_config": {**_QWEN_SIGHT, "out_hidden_size": 64},
        "image_token_id": IMAGE,
    },
    "gemma3": {
        "text_config": _text(), "vision_config": _SIGHT, "mm_tokens_per_image": 4, **_IMAGE,
        "boi_token_index": START, "eoi_token_index": END,
    },
    "gemma4": {
        "text_config": _text(
            vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=32,
            num_kv_shared_layers=0, layer_types=["sliding_attention", "full_attention"],
            global_head_dim=32,
        ),
        "vision_config": {
            **_SIGHT, "num_key_value_heads": 2, "head_dim": 32, "global_head_dim": 32,
        },
        "audio_config": None, "image_token_id": IMAGE, "video_token_id": VIDEO,
        "audio_token_id": AUDIO, "boi_token_id": START, "eoi_token_id": END,
    },
    "glm4v": {
        "text_config": _text(**_three_axes(4, 6, 6)),
        "vision_config": {**_QWEN_SIGHT, "image_size": 56},
        "image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": START,
        "image_end_token_id": END, "video_start_token_id": START, "video_end_token_id": END,
    },
    "idefics3": {
        "text_config": _text("llama"), "vision_config": _LARGE, "image_token_id": IMAGE,
        "scale_factor": 2, "pad_token_id": 0,
    },
    "internvl": {
        "text_config": _text("qwen2"),
        "vision_config": {**_LARGE, "image_size": [56, 56], "patch_size": [14, 14]},
        "image_token_id": IMAGE, "image_seq_length": 4,
    },
    "kimi_k25": {
        "text_config": _text("deepseek_v3", **_DEEPSEEK),
        "vision_config": {**_SIGHT, "pos_emb_height": 4, "pos_emb_width": 4},
        "projection_hidden_size": 64, "image_token_id": IMAGE, "video_token_id": VIDEO,
        "vision_start_token_id": START, "vision_end_token_id": END,
    },
    "lfm2_vl": {
        "text_config": _text("lfm2", layer_types=["conv", "full_attention"]),
        "vision_config": {**_SIGHT, "model_type": "siglip2_vision_model"}, "image_token_id": IMAGE,
    },
    "lighton_ocr": {
        "text_config": _text("qwen3"), "vision_config": _PIXTRAL, "image_token_id": IMAGE,
    },
    "llama4": {
        "text_config": _text(
            num_local_experts=4, num_experts_per_tok=1, intermediate_size=128,
            intermediate_size_mlp=128, interleave_moe_layer_step=1, attention_chunk_size=128,
        ),
        "vision_config": {
            **_LARGE, "intermediate_size": 256, "vision_output_dim": 64, "projector_input_dim": 64,
            "projector_output_dim": 64, "pixel_shuffle_ratio": 0.5,
        },
        "boi_token_index": START, "eoi_token_index": END, **_IMAGE,
    },
    "llava": {
        "text_config": _text("llama"), "vision_config": _CLIP, "image_seq_length": 4, **_IMAGE,
    },
    "llava_next": {
        "text_config": _text("llama"), "vision_config": _CLIP,
        "image_grid_pinpoints": [[28, 56]], **_IMAGE,
    },
    "llava_onevision": {
        "text_config": _text("qwen2"), "vision_config": _SIGLIP, "video_token_id": VIDEO,
        "video_token_index": VIDEO, **_IMAGE,
    },
    "minicpmv4_6": {
        "text_config": _text("qwen3_5_text", **_DELTA), "vision_config": _LARGE,
        "image_token_id": IMAGE,
    },
    "mistral3": {"text_config": _text("mistral"), "vision_config": _PIXTRAL, **_IMAGE},
    "mllama": {
        "text_config": _text(
            num_hidden_layers=3, cross_attention_layers=[1],
            rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        ),
        "vision_config": {
            **_SIGHT, "num_global_layers": 1, "attention_heads": 2, "vision_output_dim": 128,
            "intermediate_layers_indices": [0], "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        "image_token_index": IMAGE,
    },
    "ovis2": {
        "text_config": _text("qwen2"), "vision_config": _LARGE, "image_token_id": IMAGE,
        "visual_indicator_token_ids": [START, END, 11, 12, 13], "hidden_size": 128,
        "vocab_size": VOCABULARY,
    },
    "paddleocr_vl": {
        "text_config": _text(**_three_axes(4, 6, 6)), "vision_config": _LARGE, **_QWEN_IDS,
    },
    "paligemma": {
        "text_config": _text("gemma2"), "vision_config": _SIGLIP, "projection_dim": 128, **_IMAGE,
    },
    "phi4_multimodal": {
        **{key: value for key, value in _TEXT.items() if key != "head_dim"},
        "vision_config": {**_LARGE, "crop_size": 56},
        "audio_config": {
            "hidden_size": 64, "intermediate_size": 64, "num_blocks": 2, "num_attention_heads": 2,
            "ext_pw_out_channel": 64, "nemo_conv_channels": 64, "input_size": 80,
        },
    },
    "qwen2_5_vl": {
        "text_config": _text(**_three_axes(4, 6, 6)),
        "vision_config": {**_QWEN_SIGHT, "window_size": 56, "fullatt_block_indexes": [1]},
        **_QWEN_IDS,
    },
    "qwen2_audio": {
        "text_config": _text("qwen2"),
        "audio_config": {
            "model_type": "qwen2_audio_encoder", "d_model": 64, "encoder_ffn_dim": 128,
            "encoder_layers": 2, "encoder_attention_heads": 2,
        },
        "audio_token_index": AUDIO,
    },
    "qwen2_vl": {
        "text_config": _text(**_three_axes(4, 6, 6)),
        "vision_config": {
            **_QWEN_SIGHT, "embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2,
        },
        **_QWEN_IDS,
    },
    "qwen3_5": {
        "text_config": _text(**_DELTA),
        "vision_config": {**_QWEN_SIGHT, "num_position_embeddings": 64},
        **_QWEN_IDS,
    },
    "qwen3_5_moe": {
        "text_config": _text(**_DELTA, **_EXPERTS, shared_expert_intermediate_size=128),
        "vision_config": {**_QWEN_SIGHT, "num_position_embeddings": 64},
        **_QWEN_IDS,
    },
    "qwen3_vl": {
        "text_config": _text(**_three_axes(6, 5, 5, mrope_interleaved=True)),
        "vision_config": {
            **_QWEN_SIGHT, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
        },
        **_QWEN_IDS,
    },
    "qwen3_vl_moe": {
        "text_config": _text(**_three_axes(6, 5, 5, mrope_interleaved=True), **_EXPERTS),
        "vision_config": {
            **_QWEN_SIGHT, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
        },
        **_QWEN_IDS,
    },
    "smolvlm": {
        "text_config": _text("llama"), "vision_config": _LARGE, "image_token_id": IMAGE,
        "scale_factor": 2, "pad_token_id": 0,
    },
    "video_llama_3": {
        "text_config": _text("qwen2"), "vision_config": _SIGHT, "image_token_id": IMAGE,
        "video_token_id": VIDEO,
    },
    "voxtral": {
        "text_config": _text("llama"),
        "audio_config": {
            "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 2, "max_source_positions": 1500,
        },
        "audio_token_id": AUDIO,
    },
}  # fmt: skip


def multimodal(family: str, out: Path) -> Path:
    """A model of that family saved by Transformers, a byte tokenizer and files as of a processor.
    The random weights are as large as those of `mixtures.mixture`."""
    torch.manual_seed(0)
    config = hf.AutoConfig.for_model(family, **FAMILIES[family])
    make: Any = hf.AutoModelForMultimodalLM.from_config
    network = make(config, dtype=torch.bfloat16)
    head = network.get_output_embeddings().weight
    for name, weight in network.named_parameters():
        if weight.dim() > 1 and "conv" not in name:
            weight.data.normal_(std=(2 if weight is head else 0.5) / weight.shape[-1] ** 0.5)
    for module in network.modules():
        bias = getattr(module, "e_score_correction_bias", None)
        if bias is not None:
            bias.data = bias.data.float()  # as published
    network.save_pretrained(out)
    byte_tokenizer().save_pretrained(out)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (out / name).write_text(json.dumps({"of": family}))
    return out
