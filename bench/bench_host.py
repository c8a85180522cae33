"""The host's work in a call: GPU operations and time, with only the driver's launch replaced.

    python -m bench.bench_host [--record FILE]

Operations are counted at the published size, with tensors on the meta device (`fake_gpu.py`). Times are
taken with tensors on the CPU, on small maps with the chunks of the published size, so that PyTorch's
operations take about as long as it takes to order them from a GPU; convolutions, products with weights and
resizing, which would not, only allocate. Kernels go through Triton's own launchers to a CUDA library whose
launches do nothing (`fake_driver.py`); that needs a C compiler. The unit is one `torch.add` of two small
tensors in the same run.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Case, make_call
from bench.fake_driver import fake_launches
from bench.measure import device_name, versions
from bench.meter import commit
from catseg_fast import VARIANTS, CATSeg, SlidingWindow
from catseg_fast.engine.engine import Engine
from catseg_fast.engine.launches.prepared_calls import PreparedCalls
from catseg_fast.engine.recording import GraphCache
from catseg_fast.engine.schedule import usual_chunk
from catseg_fast.engine.triton_stages import TritonStages
from catseg_fast.files import write_text
from catseg_fast.kernels.label_map import op as label_map

VARIANT, CROPS = "v2-vitl", 5
CLASSES = (150, 1203)
COUNTED = ("150:0", "1203:0", "847:256")
STAGES = ("as_one", "class_collect")  # what a call's launches are in
SIDE = 12  # of the small maps
RATIO = 8  # by which pictures are smaller for CLIP, which does not see them
PICTURE = (480, 640)
ROUNDS = 30
BUDGET = "64GiB"  # a GPU with that much to spare is not asked for its free memory at each call
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt


def least_seconds(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Return the least time of a call that has been made before."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def addition_seconds() -> float:
    """Return the time of one addition of two small tensors."""
    one = torch.ones(4)

    def many() -> None:
        for _ in range(100):
            one + one

    return least_seconds(many) / 100


@contextmanager
def cheap_operations() -> Iterator[None]:
    """Let operations that are large on small maps only allocate, and keep memory as PyTorch does on a GPU."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    with (
        mock.patch.object(F, "conv2d", _conv2d),
        mock.patch.object(F, "linear", _linear),
        mock.patch.object(F, "conv_transpose2d", _conv_transpose2d),
        mock.patch.object(F, "interpolate", _interpolate),
    ):
        yield


def _conv2d(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty(len(x), len(weight), *x.shape[2:])


def _linear(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def _conv_transpose2d(x: Tensor, weight: Tensor, _: Any, stride: tuple[int, int], *__: Any) -> Tensor:
    return x.new_empty(len(x), weight.shape[1], x.shape[2] * stride[0], x.shape[3] * stride[1])


def _interpolate(x: Tensor, size: tuple[int, int], **_: Any) -> Tensor:
    return x.new_empty(*x.shape[:2], *size)


def aggregator_call(classes: int) -> Callable[[], Tensor]:
    """Return a call of the aggregator on one crop's small maps, in the steps of `CROPS` crops on a GPU."""
    call = make_call(Case(VARIANT, classes, 1, torch.float16))
    call.aggregator.backend = "triton"
    call.aggregator.engine.chunk = usual_chunk(classes, CROPS, torch.device("cuda"))
    call.aggregator.engine.memory_budget = BUDGET
    image = torch.randn(1, call.img_feats.shape[1], SIDE, SIDE)
    maps = [
        torch.randn(1, x.shape[1], k * SIDE, k * SIDE) for x, k in zip(call.guidance, (1, 2, 4), strict=True)
    ]
    return partial(call.aggregator, image, call.text_feats, maps)


def measure_call(classes: int, library: ctypes.CDLL, rounds: int = ROUNDS) -> dict[str, float]:
    """Return the launches and the host's time of an aggregator's call."""
    call = aggregator_call(classes)
    for _ in range(3):
        call()
    before = library.fake_launches()
    call()
    launches = library.fake_launches() - before
    return {"launches": launches, "milliseconds": 1e3 * least_seconds(call, rounds)}


def measure_launch(classes: int, library: ctypes.CDLL, owner: type, *methods: str) -> float:
    """Return the host's time per launch of some methods in a call, in additions."""
    call, spent = aggregator_call(classes), list[list[float]]()

    def timed(original: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*arguments, **options)
            finally:
                spent[-1].append(time.perf_counter() - start)

        return run

    with ExitStack() as stack:
        for name in methods:
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name))))
        for _ in range(10 * ROUNDS):
            spent.append([])
            before = library.fake_launches()
            call()
    launches = library.fake_launches() - before
    seconds = sum(map(min, zip(*spent[4:], strict=True)))  # of each, in the call in which it was shortest
    return seconds / launches / addition_seconds()


class Replays:
    """Stands in for a recorder of CUDA graphs: a replay does nothing."""

    bytes, limit = 0, 1
    turn = staticmethod(nullcontext)

    def __init__(self, device: torch.device) -> None:
        pass

    def __call__(self, run: Callable[[], Any]) -> Callable[[], Any]:
        answer = run()
        return lambda: answer


def small_model() -> CATSeg:
    """Return a published model whose CLIP sees small crops; weights that are not read take no memory."""
    variant = VARIANTS[VARIANT]
    crop = 384 // RATIO
    variant = replace(variant, clip=replace(variant.clip, input_size=crop))
    window = SlidingWindow(crop_size=crop, resolution=(640 // RATIO, 640 // RATIO))
    classes = [f"class {number}" for number in range(CLASSES[0])]
    with torch.device("meta"):
        model = CATSeg(variant, classes, window=window, text_cache=False)
    return model.to_empty(device="cpu").eval()


def measure_segment(recorded: bool) -> float:
    """Return the host's milliseconds of `CATSeg.segment` outside CLIP and the aggregator."""
    model = small_model()
    model.backend = "triton"
    model.engine.precision = torch.float16
    model.engine.memory_budget = BUDGET
    if recorded:
        model.engine.recordings = GraphCache(Replays, device_type="cpu")
    clip, total = model.variant.clip, len(model.classes)
    text = torch.randn(total, 1, clip.embed_dim)
    features = torch.randn(CROPS, 1 + SIDE**2, clip.embed_dim)
    layers = [torch.randn(CROPS, clip.vision_width, SIDE, SIDE) for _ in range(2)]
    logits = torch.randn(CROPS, total, 4 * SIDE, 4 * SIDE, dtype=torch.float16)

    def stream(engine: Engine, *arguments: Any) -> None:
        arguments[4]()(slice(0, total), logits)

    picture = np.random.default_rng(0).integers(0, 256, (*PICTURE, 3), dtype=np.uint8)
    with (
        mock.patch.object(type(model), "_encode_text", return_value=text),
        mock.patch.object(type(model.clip_model), "encode_dense", return_value=(features, layers)),
        mock.patch.object(Engine, "stream", stream),
        mock.patch.object(label_map, "SCRATCH_BYTES", label_map.SCRATCH_BYTES // RATIO**2),
    ):
        for _ in range(4):
            model.segment(picture)
        assert not recorded or model.engine.recordings.replays
        return 1e3 * least_seconds(lambda: model.segment(picture), 10 * ROUNDS)


def count_operations() -> dict[str, int]:
    """Return the GPU operations of an aggregator's call by case; they need a process of their own."""
    command = [
        sys.executable,
        "-m",
        "bench.fake_gpu",
        "--variant",
        VARIANT,
        "--crops",
        str(CROPS),
        "--cases",
        *COUNTED,
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {case: found["total"] for case, found in json.loads(done.stdout.splitlines()[-1]).items()}


def measure() -> dict[str, Any]:
    """Return all figures, of one thread."""
    counted = count_operations()
    with fake_launches() as library, cheap_operations(), torch.no_grad():
        return {
            "operations": counted,
            "launch_adds": {
                str(classes): {
                    "stages": measure_launch(classes, library, TritonStages, *STAGES),
                    "prepared calls": measure_launch(classes, library, PreparedCalls, "__call__"),
                }
                for classes in CLASSES
            },
            "calls": {str(classes): measure_call(classes, library) for classes in CLASSES},
            "segment_milliseconds": {"plain": measure_segment(False), "replayed": measure_segment(True)},
            "addition_microseconds": 1e6 * addition_seconds(),
        }


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the figures there, as JSON")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set: interpreted kernels are not launched")
    torch.set_num_threads(1)
    ran = {"device": device_name(torch.device("cpu")), "versions": versions(), "commit": commit()}
    found = {**measure(), **ran}
    text = json.dumps(found, indent=1)
    print(text)
    if options.record is not None:
        write_text(options.record, text + "\n")


if __name__ == "__main__":
    main()
