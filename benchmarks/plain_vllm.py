"""The vLLM side of `runtime.py` and `gpu_throughput.py`: an engine that answers each line on stdin
with seconds on stdout.

    VLLM_PYTHON benchmarks/plain_vllm.py CHECKPOINT [--sequences 8] [--length 1024] [--dummy]

It is compiled and captured as a server's is. With --dummy CHECKPOINT is a config.json alone, whose
weights the engine makes up. A line is "BATCH PROMPT NEW"; the answer the wall seconds of that
greedy generation from random prompts, none of which is found in a cache.
"""

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--dummy", action="store_true")
    chosen = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(chosen.checkpoint), dtype="bfloat16", max_model_len=chosen.length,
        enable_prefix_caching=False, max_num_batched_tokens=4096, max_num_seqs=chosen.sequences,
        disable_log_stats=True, skip_tokenizer_init=True,
        load_format="dummy" if chosen.dummy else "auto",
    )  # fmt: skip
    vocabulary = json.loads((chosen.checkpoint / "config.json").read_text())["vocab_size"]
    source = random.Random(0)
    for line in sys.stdin:
        batch, prompt, new = map(int, line.split())
        prompts = [
            {"prompt_token_ids": [source.randrange(3, vocabulary) for _ in range(prompt)]}
            for _ in range(batch)
        ]
        sampling = SamplingParams(
            temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        engine.generate(prompts, sampling, use_tqdm=False)
        print(time.perf_counter() - start, file=answers, flush=True)


if __name__ == "__main__":
    main()
