"""Tables of what `accelerate` costs and gains, from `bench/results/acceleration.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.tables import markdown, seconds

NAMES = {
    "upstream's": "upstream's aggregator",
    "parallel blocks": "window blocks and class layer side by side, mixed by a router",
    "a fourth argument": "a fourth argument, by which the logits are divided",
    "rotated maps": "cost volumes of two rotated feature maps",
    "a second stack": "a second stack of two layers",
    "another cost volume": "distances in place of cosines, prompts weighted",
}


def own_time(folder: Path) -> str:
    """Return the time that `accelerate` takes, and what a call takes to see that nothing has changed."""
    content = _content(folder)
    rows = []
    for variant in ("v1-vitl-swinb", "v2-vitl"):
        before, now = content["before"][variant], content[variant]
        rows.append(
            {
                "": variant,
                "one call of the model's own code, T=2": seconds(now["call"]),
                "`accelerate`, before": _in_calls(before),
                "`accelerate`, now": _in_calls(now),
                "guards per call, before": seconds(before["look"]),
                "guards per call, now": seconds(now["look"]),
            }
        )
    return markdown(rows)


def derived(folder: Path) -> str:
    """Return the times of derived aggregators' calls."""
    content = _content(folder)
    return markdown(
        [
            {
                "aggregator": NAMES[name],
                "in the engine": "the whole"
                if content[name]["parts"] == ["aggregator"]
                else _parts(content[name]),
                "own code": seconds(content[name]["own"]),
                "accelerated": seconds(content[name]["accelerated"]),
                "": f"{content[name]['own'] / content[name]['accelerated']:.1f}x",
                "largest difference": f"{content[name]['error']:.0e}",
            }
            for name in NAMES
        ]
    )


def _content(folder: Path) -> Any:
    return json.loads((folder / "acceleration.json").read_text(encoding="utf-8"))


def _parts(found: dict[str, Any]) -> str:
    names = {"window blocks": "window blocks", "class layer": "class layers", "decoder": "decoder"}
    return ", ".join(name for part, name in names.items() if part in found["parts"])


def _in_calls(found: dict[str, float]) -> str:
    return f"{seconds(found['accelerate'])} ({found['accelerate'] / found['call']:.1f} calls)"
