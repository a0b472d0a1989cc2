"""Quantization without a model: read safetensors, quantize row blocks, write (`rtn_*` methods)."""
