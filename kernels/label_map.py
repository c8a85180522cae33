"""Label maps: a chunk's logits become probabilities of pixels, and meet the best ones so far.

With sliding-window crops n of the picture at R x S, bilinear resizes `up` (corners not aligned) from a crop's
logits to its pixels, and N(r, s) the crops over a pixel (r, s):

    p(r, s) = (mean over n in N(r, s) of sigmoid(up(logits_n)) + whole(r, s)) / 2
    whole = the last crop's sigmoid(up(logits)), resized to R x S
    score = p resized to H x W;  label = argmax over classes, the first of equal ones

Without a window there is one crop, and score = the visible part of sigmoid(logits), resized to H x W. Logits
are `[B, t, h, w]`; scores and labels `[H, W]`. p is made for a few classes at a time; probabilities of crops
and of H x W pixels never reach memory. All positions are exact: a resize computes them from integers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from catseg_fast.inference.readout import LabelMap, Readout
from catseg_fast.kernels.launch.checks import check_runnable
from catseg_fast.kernels.launch.compile_target import CompileTarget

# Pixels a program; in the interpreter, few large programs are faster.
BLOCK, INTERPRETER_BLOCK = 256, 16384

# Of the merged maps that exist at a time.
SCRATCH_BYTES = 2**25


@triton.jit
def _taps(position, size, resized):
    """The two positions of `size` around a position of `resized`, and the second one's weight; exact."""
    numerator = tl.maximum((2 * position + 1) * size - resized, 0)  # over 2 * resized
    first = numerator // (2 * resized)
    weight = (numerator - first * 2 * resized).to(tl.float32) / (2 * resized)
    return first, tl.minimum(first + 1, size - 1), weight


@triton.jit
def _mix(top_left, top_right, bottom_left, bottom_right, down, across):
    """Bilinear interpolation."""
    upper = top_left * (1 - across) + top_right * across
    lower = bottom_left * (1 - across) + bottom_right * across
    return upper * (1 - down) + lower * down


@triton.jit
def _logit(p_map, row, column, m, WIDTH: tl.constexpr):
    return tl.load(p_map + row * WIDTH + column, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _crop(p_map, row, column, m, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SIDE: tl.constexpr):
    """Probability at a pixel of a SIDE x SIDE crop with logits of HEIGHT x WIDTH."""
    top, bottom, down = _taps(row, HEIGHT, SIDE)
    left, right, across = _taps(column, WIDTH, SIDE)
    logit = _mix(
        _logit(p_map, top, left, m, WIDTH),
        _logit(p_map, top, right, m, WIDTH),
        _logit(p_map, bottom, left, m, WIDTH),
        _logit(p_map, bottom, right, m, WIDTH),
        down,
        across,
    )
    return _sigmoid(logit)


@triton.jit
def _merge_kernel(
    logits_ptr,  # [N + 1, t, h, w]: of N crops, row by row, and of the whole picture
    out_ptr,  # [t, R, S] fp32
    stride_b,
    stride_t,
    HEIGHT: tl.constexpr,  # h
    WIDTH: tl.constexpr,  # w
    ROWS: tl.constexpr,  # R
    COLUMNS: tl.constexpr,  # S
    SIDE: tl.constexpr,  # pixels of a crop
    STRIDE: tl.constexpr,  # pixels from a crop to the next
    BLOCK: tl.constexpr,
):
    DOWN: tl.constexpr = (ROWS - SIDE + STRIDE - 1) // STRIDE + 1  # crops one under the other
    ACROSS: tl.constexpr = (COLUMNS - SIDE + STRIDE - 1) // STRIDE + 1
    parts: tl.constexpr = (ROWS * COLUMNS + BLOCK - 1) // BLOCK
    t = (tl.program_id(0) // parts).to(tl.int64)
    pixel = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    m = pixel < ROWS * COLUMNS
    row, column = pixel // COLUMNS, pixel % COLUMNS
    p_map = logits_ptr + t * stride_t

    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    for n in tl.static_range(DOWN * ACROSS):
        r = row - tl.minimum(n // ACROSS * STRIDE, ROWS - SIDE)
        s = column - tl.minimum(n % ACROSS * STRIDE, COLUMNS - SIDE)
        inside = m & (r >= 0) & (r < SIDE) & (s >= 0) & (s < SIDE)
        crop = _crop(p_map, r, s, inside, HEIGHT, WIDTH, SIDE)
        total += tl.where(inside, crop, 0.0)
        count += tl.where(inside, 1.0, 0.0)
        p_map += stride_b

    top, bottom, down = _taps(row, SIDE, ROWS)
    left, right, across = _taps(column, SIDE, COLUMNS)
    whole = _mix(
        _crop(p_map, top, left, m, HEIGHT, WIDTH, SIDE),
        _crop(p_map, top, right, m, HEIGHT, WIDTH, SIDE),
        _crop(p_map, bottom, left, m, HEIGHT, WIDTH, SIDE),
        _crop(p_map, bottom, right, m, HEIGHT, WIDTH, SIDE),
        down,
        across,
    )
    tl.store(out_ptr + t * (ROWS * COLUMNS) + pixel, (total / tl.maximum(count, 1) + whole) / 2, mask=m)


@triton.jit(do_not_specialize=["classes", "first", "H", "W", "rows", "columns"])
def _update_kernel(
    maps_ptr,  # [t, rows or more, row_stride or less]: probabilities, or logits
    scores_ptr,  # [H, W] fp32: the best so far
    labels_ptr,  # [H, W] int32
    new_scores_ptr,  # [H, W] fp32, output
    new_labels_ptr,  # [H, W] int32, output
    classes,  # t
    first,  # number of the first class
    H,
    W,
    rows,  # of a map that count
    columns,
    stride_t,
    row_stride,
    ARE_LOGITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = pixel < H * W
    top, bottom, down = _taps(pixel // W, rows, H)
    left, right, across = _taps(pixel % W, columns, W)
    best = tl.load(scores_ptr + pixel, mask=m, other=0.0)
    label = tl.load(labels_ptr + pixel, mask=m, other=0)
    p_map = maps_ptr
    for t in range(classes):
        top_left = tl.load(p_map + top * row_stride + left, mask=m, other=0.0).to(tl.float32)
        top_right = tl.load(p_map + top * row_stride + right, mask=m, other=0.0).to(tl.float32)
        bottom_left = tl.load(p_map + bottom * row_stride + left, mask=m, other=0.0).to(tl.float32)
        bottom_right = tl.load(p_map + bottom * row_stride + right, mask=m, other=0.0).to(tl.float32)
        if ARE_LOGITS:
            top_left, top_right = _sigmoid(top_left), _sigmoid(top_right)
            bottom_left, bottom_right = _sigmoid(bottom_left), _sigmoid(bottom_right)
        score = _mix(top_left, top_right, bottom_left, bottom_right, down, across)
        # As in a maximum over all classes, NaN beats every number, and the first NaN every later one.
        better = (score > best) | ((score != score) & (best == best))
        best = tl.where(better, score, best)
        label = tl.where(better, first + t, label)
        p_map += stride_t
    tl.store(new_scores_ptr + pixel, best, mask=m)
    tl.store(new_labels_ptr + pixel, label, mask=m)


# Computes in fp32; autocast changes nothing.
@torch.library.custom_op("catseg_fast::update_label_map", mutates_args=())
def update_label_map(
    logits: Tensor,
    scores: Tensor,
    labels: Tensor,
    first: int,
    window: Sequence[int],
    visible: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """New scores and labels `[H, W]`.

    Args:
        logits: `[B, t, h, w]`, the last two dimensions contiguous.
        scores, labels: the best so far.
        first: number of the chunk's first class.
        window: (R, S, crop size, stride), or nothing.
        visible: (rows, columns) of the only crop that count, where there is no window.
    """
    (_, classes, h, w), (H, W) = logits.shape, scores.shape
    block = BLOCK if logits.is_cuda else INTERPRETER_BLOCK
    options = {"num_warps": 4, "enable_fp_fusion": True}
    step = max(1, SCRATCH_BYTES // (4 * window[0] * window[1])) if window else classes
    for start in range(0, classes, step):
        maps, row_stride, (rows, columns) = logits[0], w, visible
        if window:
            rows, columns, side, stride = window
            part = logits[:, start : start + step]
            maps, row_stride = part.new_empty((part.shape[1], rows, columns), dtype=torch.float32), columns
            _merge_kernel[(len(maps) * triton.cdiv(rows * columns, block),)](
                part,
                maps,
                *part.stride()[:2],
                HEIGHT=h,
                WIDTH=w,
                ROWS=rows,
                COLUMNS=columns,
                SIDE=side,
                STRIDE=stride,
                BLOCK=block,
                **options,
            )
        new_scores, new_labels = scores.new_empty((H, W)), labels.new_empty((H, W))
        _update_kernel[(triton.cdiv(H * W, block),)](
            maps,
            scores,
            labels,
            new_scores,
            new_labels,
            len(maps),
            first + start,
            H,
            W,
            rows,
            columns,
            maps.stride(0),
            row_stride,
            ARE_LOGITS=not window,
            BLOCK=block,
            **options,
        )
        scores, labels = new_scores, new_labels
    return scores, labels


@update_label_map.register_fake
def _(
    logits: Tensor,
    scores: Tensor,
    labels: Tensor,
    first: int,
    window: Sequence[int],
    visible: Sequence[int],
) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape), labels.new_empty(labels.shape)


def update(readout: Readout, target: LabelMap, first: int, logits: Tensor) -> None:
    """Take a chunk's logits into a label map, as `target.update(first, readout(logits))` does.

    Args:
        readout: how logits become probabilities.
        target: the best so far; its tensors are replaced, when nothing can fail any more.
        first: number of the chunk's first class.
        logits: `[B, t, h, w]` of all crops.

    Raises:
        ValueError: for shapes, types or devices that do not fit.
        RuntimeError: if the GPU is too old.
    """
    check_runnable("logits", logits, "ieee")
    window = readout.window
    crops = 1 if window is None else len(window.corners()) + 1
    if logits.ndim != 4 or 0 in logits.shape or len(logits) != crops:
        raise ValueError(f"logits: has shape {list(logits.shape)}; wanted [{crops}, t, h, w], all above 0")
    rows, columns = readout.visible or logits.shape[2:]
    if rows <= 0 or columns <= 0:
        raise ValueError(f"readout: visible {readout.visible} are not rows and columns above 0")
    visible = (min(rows, logits.shape[2]), min(columns, logits.shape[3]))
    if target.scores.device != logits.device:
        raise ValueError(f"target: is on {target.scores.device}; wanted {logits.device}, as logits")
    if logits.stride()[2:] != (logits.shape[3], 1):
        logits = logits.contiguous()
    description = () if window is None else (*window.resolution, window.crop_size, window.stride)
    target.scores, target.labels = update_label_map(
        logits, target.scores, target.labels, first, description, visible
    )


def compile_targets(capability: int) -> list[CompileTarget]:
    """Both kernels at upstream's sliding window, and the second on logits; the same for all capabilities."""
    targets = [
        CompileTarget(
            name="merge fp16",
            kernel=_merge_kernel,
            signature={"logits_ptr": "*fp16", "out_ptr": "*fp32", "stride_b": "i32", "stride_t": "i32"},
            constexprs={
                "HEIGHT": 96,
                "WIDTH": 96,
                "ROWS": 640,
                "COLUMNS": 640,
                "SIDE": 384,
                "STRIDE": 256,
                "BLOCK": BLOCK,
            },
            num_warps=4,
            num_stages=3,
            divisible=("stride_b", "stride_t"),
        )
    ]
    for name, dtype in (("update", "fp32"), ("update from logits", "fp16")):
        integers = ("classes", "first", "H", "W", "rows", "columns", "stride_t", "row_stride")
        targets.append(
            CompileTarget(
                name=name,
                kernel=_update_kernel,
                signature={
                    "maps_ptr": f"*{dtype}",
                    **dict.fromkeys(("scores_ptr", "new_scores_ptr"), "*fp32"),
                    **dict.fromkeys(("labels_ptr", "new_labels_ptr"), "*i32"),
                    **dict.fromkeys(integers, "i32"),
                },
                constexprs={"ARE_LOGITS": dtype != "fp32", "BLOCK": BLOCK},
                num_warps=4,
                num_stages=3,
                divisible=("stride_t", "row_stride"),
            )
        )
    return targets
