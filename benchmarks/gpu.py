"""Kernels and whole models on one CUDA GPU, every ratio taken in one run; tables in Markdown.

    python benchmarks/gpu.py [--parts operators models demo] [--size 8] [--demo DIR …] [--json FILE]

operators  matrix products at the shapes of an 8 B Llama: rates against the measured bfloat16 rate
           and the measured copy bandwidth (bytes read and written), weights rotated so that the
           cache holds none of them.
models     a Llama of random weights made on the device (--size, see random_llama.py), BF16 and
           quantized: prefill, decoding, memory, kernels.
demo       checkpoints on disk (--demo, the first one in 16 bit): perplexity on held-out text,
           divergence from the first, text, speed.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_llama import GPU, build, largest_inputs, quantized

from quantkit.checkpoint.schemes import SCHEMES
from quantkit.runtime.linear.description import describe
from quantkit.runtime.linear.kernels.base import Kernel
from quantkit.runtime.linear.kernels.select import KERNELS
from quantkit.runtime.model import Runtime

SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
OPERATORS = (
    "fp8", "fp8_dynamic", "fp8_block", "w8a8_dynamic", "w4a16", "w8a16", "nvfp4", "nvfp4a16",
    "mxfp4", "mxfp4a16", "fp8_block_weight_only",
)  # fmt: skip
MODELS = (
    "bf16", "fp8", "fp8_dynamic", "w8a8_dynamic", "w4a16", "w8a16", "nvfp4", "fp8_block", "mxfp4",
)  # fmt: skip
CACHE_BYTES = 200e6
PREFILLS = ((8, 512), (1, 4096))
DECODES = (1, 8, 32)
PROMPT, NEW = 128, 64


def graph_seconds(calls: Sequence[Callable[[], Any]], repeats: int = 7) -> float:
    """Median seconds of one of the calls, which are captured together and replayed."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return float(median(times))


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 2 GiB: by the driver or by a kernel, whichever
    is faster."""
    source = torch.empty(1 << 30, dtype=torch.int16, device=GPU).random_()
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.bitwise_not(source, out=target))
    return 2 * source.nbytes / min(graph_seconds([way] * 4) for way in ways)


@torch.inference_mode()
def operators(rows_many: int = 4096) -> list[dict[str, Any]]:
    found = []
    for shape in SHAPES:
        weight = torch.randn(shape, device=GPU).bfloat16() * 0.02
        x = {m: torch.randn(m, shape[1], device=GPU).bfloat16() for m in (1, 8, 64, rows_many)}
        clones = [weight.clone() for _ in range(max(1, round(CACHE_BYTES / weight.nbytes)))]
        products = [partial(_linear, clone) for clone in clones]
        found += _timed("bf16", "torch", shape, x, products, weight.nbytes)
        del clones, products
        for name in OPERATORS:
            canonical = quantized(weight, SCHEMES[name], 6.0)
            layer = describe("l", SCHEMES[name], canonical, torch.bfloat16)
            for kernel in KERNELS:
                if kernel.unavailable(GPU) or kernel.rejects(layer) or kernel.NAME in PLAIN:
                    continue
                packed = kernel.prepare(canonical, layer)
                size = sum(part.nbytes for part in packed if isinstance(part, torch.Tensor))
                products = []
                for _ in range(max(1, round(CACHE_BYTES / size))):
                    copy = replace(canonical, q=canonical.q.clone())
                    products.append(partial(_apply, kernel, kernel.prepare(copy, layer)))
                found += _timed(name, kernel.NAME, shape, x, products, size)
                del packed, products
    return found


def _linear(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight)


def _apply(kernel: Kernel, packed: Any, x: torch.Tensor) -> torch.Tensor:
    return kernel.apply(x, packed)


PLAIN = ("reference", "dequantized")


def _timed(
    scheme: str,
    kernel: str,
    shape: tuple[int, int],
    inputs: dict[int, torch.Tensor],
    products: Sequence[Callable[[torch.Tensor], Any]],
    weight_bytes: int,
) -> list[dict[str, Any]]:
    """One entry a number of rows: microseconds, and what they mean as a rate."""
    found = []
    for rows, x in inputs.items():
        entry: dict[str, Any] = {
            "scheme": scheme, "kernel": kernel, "out": shape[0], "in": shape[1], "rows": rows,
        }  # fmt: skip
        try:
            used = products if rows < 512 else products[:2]
            seconds = graph_seconds([partial(product, x) for product in used])
            entry["microseconds"] = seconds * 1e6
            entry["tera_operations_s"] = 2 * rows * shape[0] * shape[1] / seconds / 1e12
            entry["weight_gigabytes_s"] = weight_bytes / seconds / 1e9
        except Exception as error:  # one kernel's failure is a result too
            entry["error"] = f"{type(error).__name__}: {error}"[:300]
            torch.cuda.synchronize()
        found.append(entry)
    return found


def _clock(call: Callable[[], Any], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times)


@torch.inference_mode()
def speed(model: Runtime) -> dict[str, Any]:
    """Prefill and decoding in tokens/s, and what of a decoding step is not the captured graph."""
    vocabulary = model.network.embed.shape[0]
    result: dict[str, Any] = {}
    for batch, length in PREFILLS:
        ids = torch.randint(vocabulary, (batch, length), device=GPU)
        seconds = _clock(lambda ids=ids: model(ids, logits_to_keep=1), 5)  # type: ignore[misc]
        result[f"prefill {batch} × {length}"] = ids.numel() / seconds
    for batch in DECODES:
        ids = torch.randint(vocabulary, (batch, PROMPT), device=GPU)

        def run(new: int, ids: torch.Tensor = ids) -> None:
            model.generate(ids, max_new_tokens=new, eos_token_id=[])

        run(NEW)
        first, whole = _clock(lambda: run(1), 3), _clock(lambda: run(NEW + 1), 3)
        step = (whole - first) / NEW
        result[f"decode {batch}"] = batch / step
        graph = model._graph
        if graph is not None:

            def replays(graph: Any = graph) -> None:
                graph.position.fill_(PROMPT)
                for _ in range(NEW):
                    graph.graph.replay()

            alone = _clock(replays, 3) / NEW
            result[f"outside the graph {batch}"] = 1 - alone / step
    return result


@torch.inference_mode()
def models(size: str, names: Sequence[str], layers: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    ids = torch.randint(32000, (2, 512), generator=torch.Generator().manual_seed(0)).to(GPU)
    amax = None
    for name in names:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        entry: dict[str, Any] = {"scheme": name}
        before = torch.cuda.memory_allocated()
        try:
            model = build(name, size, amax, layers)
            gc.collect()
            entry["weights_gigabytes"] = (torch.cuda.memory_allocated() - before) / 1e9
            if name == "bf16":
                amax = largest_inputs(model, ids)
            torch.cuda.reset_peak_memory_stats()
            entry["kernels"] = model.kernels()
            entry |= speed(model)
            entry["peak_gigabytes"] = (torch.cuda.max_memory_allocated() - before) / 1e9
            del model
        except Exception as error:
            entry["error"] = f"{type(error).__name__}: {error}"[:500]
        found.append(entry)
        print(json.dumps(entry), flush=True)
    return found


@torch.inference_mode()
def demo(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Perplexity of checkpoints on held-out text, and their speed; the first is the baseline."""
    from quantkit.calibration.heldout import held_out_texts
    from quantkit.calibration.tokenizer import load_tokenizer, read_tokenizer_info
    from quantkit.runtime.load import load

    tokenizer = load_tokenizer(read_tokenizer_info(paths[0]))
    tokens = [token for text in held_out_texts() for token in tokenizer.encode(text, False)]
    ids = torch.tensor(tokens[: 64 * 1024], device=GPU).view(-1, 1024)
    found: list[dict[str, Any]] = []
    base, first = 0.0, None
    for path in paths:
        entry: dict[str, Any] = {"checkpoint": path.name}
        try:
            start = time.perf_counter()
            model = load(path, device="cuda")
            torch.cuda.synchronize()
            entry["load_seconds"] = time.perf_counter() - start
            loss = 0.0
            for row in range(0, len(ids), 8):
                batch = ids[row : row + 8]
                logits = model(batch).logits[:, :-1].float()
                loss += float(
                    torch.nn.functional.cross_entropy(
                        logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
                    )
                )
            entry["perplexity"] = 2.718281828459045 ** (loss / (ids.shape[0] * 1023))
            base = base or entry["perplexity"]
            logits = model(ids[:8]).logits.float().log_softmax(-1)
            first = logits if first is None else first
            entry["kl"] = float((first.exp() * (first - logits)).sum(-1).mean())
            entry["top1"] = float((first.argmax(-1) == logits.argmax(-1)).float().mean())
            del logits
            entry["ratio"] = entry["perplexity"] / base
            entry["kernels"] = model.kernels()
            prompt = tokenizer.encode("The capital of France is", False)
            answer = model.generate(torch.tensor([prompt], device=GPU), max_new_tokens=12)
            entry["text"] = tokenizer.decode(answer[0].tolist())
            entry |= speed(model)
        except Exception as error:
            entry["error"] = f"{type(error).__name__}: {error}"[:500]
        found.append(entry)
        print(json.dumps(entry), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--parts", nargs="+", default=["operators", "models"])
    parser.add_argument("--size", default="8")
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--demo", nargs="+", type=Path, default=[])
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"), "copy_gigabytes_s": copy_bandwidth() / 1e9,
    }  # fmt: skip
    torch.cuda.empty_cache()
    parts: dict[str, Callable[[], Any]] = {
        "operators": operators,
        "models": lambda: models(chosen.size, chosen.models, chosen.layers),
        "demo": lambda: demo(chosen.demo),
    }
    for name in chosen.parts:
        found[name] = parts[name]()
        if chosen.json:
            chosen.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
