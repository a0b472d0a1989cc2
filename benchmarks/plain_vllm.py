"""One side of `runtime.py`: a vLLM engine that answers each line on stdin with seconds on stdout.

    VLLM_PYTHON benchmarks/plain_vllm.py CHECKPOINT

A line is "BATCH PROMPT NEW"; the answer the wall seconds of that greedy generation from random
prompts, none of which is found in a cache.
"""

import os
import random
import sys
import time

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    from vllm import LLM, SamplingParams

    engine = LLM(
        sys.argv[1], dtype="bfloat16", max_model_len=1024, enable_prefix_caching=False,
        max_num_batched_tokens=4096, max_num_seqs=8, disable_log_stats=True,
    )  # fmt: skip
    vocabulary = engine.get_tokenizer().vocab_size
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
