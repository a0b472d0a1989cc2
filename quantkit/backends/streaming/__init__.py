"""Quantization without a model: read safetensors, quantize row blocks, write (`rtn_*` methods).

From the command down: `quantkit/pipeline/stream.py` (stream, seal, verify, publish) calls `run.py`
(one resumable run: tasks, state, index), which calls `execute.py` (put each shard together) or
`ray_executor.py`; these give single works to a `crew.py` of processes, where `worker.py` receives
them and `perform.py` does them: `rows_in.py` reads, `rtn.py` quantizes, `encode.py` packs,
`rows_out.py` writes.
"""
