"""Peak memory of one call above weights and inputs, measured in a process of its own.

    python -m bench.peak_memory '{"variant": "v1-vitl-swinb", "classes": 150, "crops": 5, "run": "torch"}'

prints a JSON object with `peak_bytes` and `seconds`. `run` is "reference", "torch", or "label_map": the
engine with `policy`, read out into a label map of `size`. With `pooling`, "reference" and "torch" are the
forward and backward pass of a training step with that pooling; `checkpoint` is the engine's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
STATUS = Path("/proc/self/status")


def measure(**request: Any) -> dict[str, float]:
    """Run a request in a child process.

    Raises:
        RuntimeError: if it fails; the message holds what it printed.
    """
    command = [sys.executable, "-m", "bench.peak_memory", json.dumps(request)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"{request} failed:\n{child.stderr}")
    answer: dict[str, float] = json.loads(child.stdout.splitlines()[-1])
    return answer


def memory(field: str) -> int:
    """A field of this process's status in bytes: VmRSS is what it holds, VmHWM the most it held."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def run(request: dict[str, Any]) -> dict[str, float]:
    """Run a request in this process."""
    import torch

    from bench.cases import Case, make_call
    from catseg_fast import SlidingWindow
    from catseg_fast.label_map import READOUT_BYTES, LabelMap, Readout, reader

    torch.set_num_threads(2)
    call = make_call(Case(request["variant"], request["classes"], request["crops"]))
    for layer in call.aggregator.layers if "pooling" in request else ():
        layer.attention.pool = torch.nn.AvgPool2d(request["pooling"])
    engine = call.aggregator.engine
    engine.policy = request.get("policy")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    before, start = memory("VmRSS"), time.perf_counter()
    if request["run"] == "label_map":
        size = (request["size"][0], request["size"][1])
        readout, target = Readout(size, SlidingWindow()), LabelMap(size, torch.device("cpu"))
        with torch.no_grad():
            vocabulary = engine.vocabulary(call.text_feats, None)
            engine.stream(
                call.img_feats, vocabulary, call.guidance, None,
                lambda: reader(readout, target), READOUT_BYTES,
            )  # fmt: skip
    elif "pooling" in request:
        call.aggregator.backend = request["run"]
        engine.checkpoint = request.get("checkpoint")
        call.aggregator(call.img_feats, call.text_feats, call.guidance).square().mean().backward()
    else:
        call.aggregator.backend = request["run"]
        call()
    return {"peak_bytes": memory("VmHWM") - before, "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
