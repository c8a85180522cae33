"""Times of `accelerate` itself, and of calls of aggregators in the manner of derived projects.

    PYTHONPATH=tests python -m bench.acceleration [--only NAME ...] [--record FILE]

Times are those that one thread computes, so that other processes on the machine matter little. Sizes are
those of the published variants; weights and features are random.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import device_name, versions
from bench.meter import commit
from catseg_fast import VARIANTS, accelerate, reference
from catseg_fast.acceleration.guards import Guard
from catseg_fast.files import write_text
from catseg_fast.text.prompts import PROMPT_ENSEMBLES
from support import derived, upstream_like

VARIANT = "v2-vitl"  # that derived projects start from
CLASSES = 60
DERIVED: dict[str, type[upstream_like.Aggregator]] = {
    "upstream's": upstream_like.Aggregator,
    "parallel blocks": derived.ParallelBlocks,
    "a fourth argument": derived.WithTemperature,
    "rotated maps": derived.RotatedMaps,
    "a second stack": derived.TwoStacks,
    "another cost volume": derived.OtherCostVolume,
}
OWN_TIME = ("v1-vitl-swinb", "v2-vitl")
ROUNDS = 5


def seconds(call: Callable[[], object], rounds: int) -> float:
    """Return the least CPU time of a call."""
    return min(timed(call)[0] for _ in range(rounds))


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU time of a call, and its answer."""
    start = time.process_time()
    answer = call()
    return time.process_time() - start, answer


def arguments(variant: str, prompts: int) -> dict[str, Any]:
    """Return an aggregator's arguments with the published sizes."""
    return VARIANTS[variant].aggregator_arguments(prompts)


def inputs(variant: str, classes: int, prompts: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return random arguments of a call on one crop."""
    sizes = arguments(variant, prompts)
    side = sizes["feature_resolution"][0]
    channels = (sizes["appearance_guidance_dim"], *sizes["decoder_guidance_dims"])
    maps = [torch.randn(1, c, k * side, k * side) for c, k in zip(channels, (1, 2, 4), strict=True)]
    width = sizes["text_guidance_dim"]
    return torch.randn(1, width, side, side), torch.randn(1, classes, prompts, width), maps


def own_time(variant: str) -> dict[str, float]:
    """Return the time of one call with two classes, of `accelerate`, and of what is looked at per call."""
    prompts = PROMPT_ENSEMBLES[VARIANTS[variant].prompt_ensemble]
    aggregator = reference.Aggregator(**arguments(variant, prompts)).eval()
    given = inputs(variant, 2, prompts)
    aggregator(*given)
    call = seconds(lambda: aggregator(*given), ROUNDS)
    whole = seconds(lambda: accelerate(aggregator).restore(), ROUNDS)
    guard = Guard(dict(aggregator.named_modules()), type(aggregator))
    looks = []
    for _ in range(1000):
        start = time.perf_counter()
        same = guard.same_code() and guard.same_weights()
        looks.append(time.perf_counter() - start)
        assert same
    return {"call": call, "accelerate": whole, "look": statistics.median(looks)}


def gain(name: str) -> dict[str, Any]:
    """Return the times of a derived aggregator's own code and of its parts in the engine."""
    kind, prompts = DERIVED[name], 2 if name == "rotated maps" else 1
    sizes = {k: v for k, v in arguments(VARIANT, prompts).items() if k in upstream_like.ARGUMENTS}
    sizes |= {"pad_len": VARIANTS[VARIANT].pad_len}
    aggregator = kind(**sizes).eval()
    image, text, guidance = inputs(VARIANT, CLASSES, 1)
    given: tuple[Any, ...] = (image, text, guidance)
    if kind is derived.WithTemperature:
        given = (*given, 0.5)
    if kind is derived.RotatedMaps:
        given = ([image, image.rot90(1, (2, 3))], text, guidance)
    own_code = copy.deepcopy(aggregator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        acceleration = accelerate(aggregator)
    own, expected = timed(lambda: own_code(*given))
    for part in acceleration.parts:
        part.verify = False  # at the first call; it is compared here
    accelerated, answer = timed(lambda: aggregator(*given))
    return {
        "own": own,
        "accelerated": accelerated,
        "parts": sorted({part.kind for part in acceleration.parts if part.refusal is None}),
        "error": _error(answer, expected),
    }


def _error(answer: Tensor, expected: Tensor) -> float:
    return ((answer - expected).abs().max() / expected.std()).item()


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=[*OWN_TIME, *DERIVED], metavar="NAME")
    parser.add_argument("--record", type=Path, metavar="FILE", help="add the figures to this file, as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    names = options.only or [*OWN_TIME, *DERIVED]
    with torch.no_grad():
        found = {name: own_time(name) if name in OWN_TIME else gain(name) for name in names}
    ran = {"device": device_name(torch.device("cpu")), "versions": versions(), "commit": commit()}
    for name, figures in found.items():
        print(name, json.dumps(figures))
    if options.record is not None:
        known = json.loads(options.record.read_text(encoding="utf-8")) if options.record.exists() else {}
        content = {**known, **{name: {**figures, **ran} for name, figures in found.items()}}
        write_text(options.record, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
