"""Models with towers or projectors under names of their own; their language models are others'."""

from quantkit.checkpoint.network.families.base import Family

FAMILIES = (
    Family(
        types=("blip-2", "instructblip", "instructblipvideo"),
        towers=frozenset({"qformer", "language_projection", "video_projection"}),
    ),
    Family(types=("kosmos-2", "kosmos-2.5"), towers=frozenset({"image_to_text_projection"})),
    Family(types=("janus",), towers=frozenset({"generation_aligner", "generation_head"})),
    Family(types=("lighton_ocr",), towers=frozenset({"vision_projection"})),
    Family(types=("muse_glimmer",), towers=frozenset({"vision_adapter", "vision_projection"})),
    Family(types=("ernie4_5_vl_moe",), towers=frozenset({"resampler_model"})),
    Family(types=("minicpmv4_6",), towers=frozenset({"merger", "resampler_model"})),
    Family(
        types=("paddleocr_vl", "video_llama_3", "cosmos3_edge"),
        towers=frozenset({"projector", "mlp_AR"}),
    ),
    Family(types=("video_llava",), towers=frozenset({"image_tower", "video_tower"})),
)
