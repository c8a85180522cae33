"""Golden vectors of upstream CAT-Seg: weights and inputs by rule, and the comparison (golden/GOLDEN.md)."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parents[1] / "golden"
GAIN = {
    "predictor.transformer.conv1.weight": 8.0,
    "predictor.transformer.text_guidance_projection.0.weight": 20.0,
    "predictor.transformer.head.weight": 3.0,
    "_proj_weight": 1.5,
    "mlp.c_proj.weight": 0.5,
}
NOT_FILLED = ("attn_mask", "relative_position_index", "num_batches_tracked")

Meta = dict[str, Any]
Case = tuple[dict[str, np.ndarray], Meta]


def uni(key: str, shape: Sequence[int]) -> Tensor:
    """Return uniform float32 numbers in [0, 1), seeded with the crc32 of `key`."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")


def det(key: str, shape: Sequence[int]) -> Tensor:
    """Return uniform float32 numbers of mean 0 and variance 1."""
    return (uni(key, shape) * 2 - 1) * 3**0.5


def weight(key: str, shape: Sequence[int], seed: int = 0) -> Tensor:
    """Return the weight whose full name in upstream's whole model is `key`."""
    r, leaf = det(f"{seed}:{key}", shape), key.rsplit(".", 1)[-1]
    if leaf == "logit_scale":
        return 1 + 0.1 * r
    if leaf == "running_var":
        return 1 + 0.3 * r
    if leaf in ("padding_tokens", "padding_guidance"):
        return 0.5 * r
    if leaf in (
        "positional_embedding",
        "class_embedding",
        "absolute_pos_embed",
        "relative_position_bias_table",
    ):
        return 0.3 * r
    if len(shape) <= 1:
        return 1 + 0.1 * r if leaf == "weight" else 0.05 * r
    if key.endswith("token_embedding.weight"):
        return r
    gain = next((value for suffix, value in GAIN.items() if key.endswith(suffix)), 1.0)
    return r * (gain / (r.numel() / shape[0]) ** 0.5)


def is_filled(name: str) -> bool:
    """Check whether the rule sets this state_dict entry; others keep their computed values."""
    return name.rsplit(".", 1)[-1] not in NOT_FILLED


def fill(module: nn.Module, prefix: str = "", seed: int = 0) -> None:
    """Set every floating entry of the state_dict; `prefix` makes local names full ones."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        if is_filled(name):
            tensor.data.copy_(weight(prefix + name, tensor.shape, seed))


def make_input(key: str, rule: str, shape: Sequence[int]) -> Tensor:
    """Return an input by its rule: "det", "text[_per_batch]" [B, T, P, C], or "image" [3, H, W] in 0..255."""
    if rule == "det":
        return det(key, shape)
    if rule.startswith("text"):
        B, T, P, C = shape
        lead = (B,) if rule == "text_per_batch" else ()
        t = det(key + ":base", (*lead, T, 1, C)) + 0.5 * det(key + ":noise", (*lead, T, P, C))
        return t if lead else t.expand(B, T, P, C).contiguous()
    if rule != "image":
        raise ValueError(f"unknown input rule {rule!r} of {key}")
    _, H, W = shape
    coarse = (uni(key + ":coarse", (3, H // 32 + 2, W // 32 + 2)) * 251).floor().long()
    i, fi = torch.arange(H) // 32, (torch.arange(H) % 32)[:, None]
    j, fj = torch.arange(W) // 32, (torch.arange(W) % 32)[None]

    def at(di: int, dj: int) -> Tensor:
        return coarse[:, i + di][:, :, j + dj]

    v = (32 - fi) * ((32 - fj) * at(0, 0) + fj * at(0, 1)) + fi * ((32 - fj) * at(1, 0) + fj * at(1, 1))
    return (v // 1024 + (uni(key + ":fine", (3, H, W)) * 5).floor().long()).float()


def _bytes(tensor: Tensor) -> bytes:
    """Return little-endian bytes in C order, of float32 or int64."""
    dtype = "<f4" if tensor.is_floating_point() else "<i8"
    return np.ascontiguousarray(tensor.detach().cpu().numpy(), dtype=dtype).tobytes()


def sha(tensor: Tensor) -> str:
    """Return the hash that the metadata has for an input."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()[:16]


def load_case(name: str) -> Case:
    """Return the arrays and the metadata of golden/`name`.npz."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files if key != "meta"}
        return arrays, json.loads(str(file["meta"]))


def load_meta(name: str) -> Meta:
    """Return the metadata of golden/`name`.npz."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        meta: Meta = json.loads(str(file["meta"]))
        return meta


def make_inputs(meta: Meta) -> dict[str, Tensor]:
    """Return every input of a case by name, checked against its stored hash."""
    inputs = {}
    for name, spec in meta["inputs"].items():
        inputs[name] = make_input(spec["key"], spec["rule"], spec["shape"])
        if (found := sha(inputs[name])) != spec["sha"]:
            raise AssertionError(f"{meta['case']}: input {name} hashes to {found}, not {spec['sha']}")
    return inputs


def check_sha_weights(state: Mapping[str, Tensor], meta: Meta) -> None:
    """Raise unless the filled entries of `state` (upstream's local names) hash to `sha_weights`."""
    digest = hashlib.sha256()
    for name in sorted(filter(is_filled, state)):
        digest.update(name.encode())
        digest.update(_bytes(state[name]))
    if (found := digest.hexdigest()[:16]) != meta["sha_weights"]:
        raise AssertionError(f"{meta['case']}: weights hash to {found}, not {meta['sha_weights']}")


def assert_output(case: Case, name: str, tensor: Tensor, factor: float = 4.0, floor: float = 2e-6) -> float:
    """Compare with output `name`, within `factor` times upstream's own float32 noise plus `floor`.

    Integer outputs must be equal. Returns the largest error.
    """
    arrays, meta = case
    spec = meta["outputs"][name]
    where = f"{meta['case']}: output {name}"
    if list(tensor.shape) != spec["shape"]:
        raise AssertionError(f"{where} has shape {list(tensor.shape)}, not {spec['shape']}")
    expected = torch.from_numpy(arrays[f"out_{name}"])
    actual = tensor.detach().cpu().contiguous().flatten()[:: spec["stride"]]
    tolerance = factor * spec["fp32_noise_max"] + floor if expected.is_floating_point() else 0.0
    error = (actual.double() - expected.double()).abs().max().item()
    if not error <= tolerance:  # NaN fails too
        raise AssertionError(f"{where}: max error {error:.3e} > {tolerance:.3e}")
    return error
