"""A kernel with one argument of each kind, compiled as the gate does: `python -m support.launch_probe`.

It prints Triton's signature of the kernel, and whether the tensor descriptor became a TMA load.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from catseg_fast.kernels.launch.config import LaunchConfig
from catseg_fast.kernels.launch.launcher import record, run
from support import aot
from support.compiling import compile_launch


@triton.jit(do_not_specialize=["free"])
def probe_kernel(
    x_desc, x_ptr, out_ptr, one, sixteen, odd, free, nothing, SIZE: tl.constexpr
):  # fmt: skip
    tile = x_desc.load([0, 0])
    o = tl.arange(0, SIZE)
    if nothing is not None:
        tile += tl.load(nothing)
    tile += tl.load(x_ptr + o[:, None] * sixteen + o[None, :] * one)
    tl.store(out_ptr + o[:, None] * odd + o[None, :] + free, tile)


def main() -> None:
    """The program."""
    x = torch.empty(64, 64, dtype=torch.float16, device="meta")
    with record(execute=False) as launches:
        descriptor = TensorDescriptor.from_tensor(x, [64, 64])
        run(probe_kernel, (1,), descriptor, x, x, 1, 48, 7, 16, None, SIZE=64, config=LaunchConfig())
    (launch,) = launches
    compiled = compile_launch(launch, aot.gpu(90))
    print(next(line for line in compiled.asm["ttir"].splitlines() if "tt.func public" in line))
    print("cp.async.bulk.tensor" in compiled.asm["ptx"])


if __name__ == "__main__":
    main()
