"""Window attention with guidance and class attention at CAT-Seg's sizes, against plain PyTorch.

kernels benchmark FOLDER
"""

import torch
from kernels.benchmark import Benchmark

CROPS, CLASSES, SIDE, CHANNELS, HEADS, WINDOW, HIDDEN = 5, 51, 24, 128, 4, 12, 512


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape)


def weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns) * columns**-0.5


class AttentionBenchmark(Benchmark):
    seed = 0

    def setup(self) -> None:
        C, M, d, HW = CHANNELS, HIDDEN, CHANNELS // HEADS, SIDE * SIDE
        qkv = weight(3 * C, C)
        qkv[:C] *= d**-0.5
        mlp = [weight(M, C), normal(M) * 0.3, weight(C, M), normal(C) * 0.3]
        x, text = normal(CROPS, CLASSES, HW, C), normal(1, CLASSES, C)
        block = [x, normal(CROPS, HW, 2 * C), qkv, weight(C, C), normal(C) * 0.3, *mlp]
        self.block = self._on_device(block)
        self.collect = self._on_device([x, weight(2 * C, C), normal(2 * C) * 0.3, text])
        self.apply = self._on_device([weight(C, C), normal(C) * 0.3, *mlp])
        self.block_numbers = ((SIDE, SIDE), WINDOW, WINDOW // 2, HEADS)
        self.out: torch.Tensor | None = None

    def _on_device(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor.to(self.device, torch.float16) for tensor in tensors]

    def _class_attention(self, ops) -> torch.Tensor:
        shape, pooling = (SIDE, SIDE), (1, 1)
        x, keys, bias, text = self.collect
        means, key_sum = ops.class_collect(
            x, keys, bias, text, None, None, HEADS, CLASSES, shape, pooling, means=True
        )
        return ops.class_apply(x, text, means, key_sum, *self.apply, HEADS, CLASSES, 1e-6, shape, pooling)

    def benchmark_window_block(self) -> None:
        self.out = self.kernel.window_block(*self.block, *self.block_numbers)

    def verify_window_block(self) -> torch.Tensor:
        return self.kernel.plain.window_block(*self.block, *self.block_numbers)

    def benchmark_class_attention(self) -> None:
        self.out = self._class_attention(self.kernel)

    def verify_class_attention(self) -> torch.Tensor:
        return self._class_attention(self.kernel.plain)
