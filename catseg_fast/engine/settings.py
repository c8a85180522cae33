"""Settings of an engine, which are checked when they are set."""

from __future__ import annotations

import torch

from catseg_fast.backend import check_backend
from catseg_fast.engine.class_parallel import ClassShare
from catseg_fast.engine.precision import check_input_precision, check_precision
from catseg_fast.engine.recording import GraphCache, check_graphs
from catseg_fast.engine.schedule import check_chunk, check_policy, parse_bytes


class EngineSettings:
    """The settings of an engine's calls.

    Attributes:
        checkpoint: whether calls that need gradients compute activations again when their gradient is taken,
            a chunk of classes at a time, to keep little of them; None: where they would not fit.
        share: where other processes hold the rest of the classes, this one's share; all must call together.
        recordings: recorded calls, which are dropped when `graphs` is set.
    """

    recordings: GraphCache

    def __init__(self) -> None:
        self.checkpoint: bool | None = None
        self.share: ClassShare | None = None
        self._backend = "auto"
        self._precision: torch.dtype | None = None
        self._input_precision = "ieee"
        self._graphs = "auto"
        self._chunk: int | None = None
        self._policy: str | None = None
        self._memory_budget: int | None = None

    @property
    def backend(self) -> str:
        """ "auto", "triton", "torch" or "reference"; calls that need gradients never run on Triton."""
        return self._backend

    @backend.setter
    def backend(self, backend: str) -> None:
        self._backend = check_backend(backend)

    @property
    def precision(self) -> torch.dtype | None:
        """Type in which the stages compute.

        None: autocast's (on a CPU, where that type is the faster one, see `catseg_fast.engine.precision`);
        without autocast the weights' own, but fp16 in place of fp32 on a GPU where no gradients are recorded.
        On a GPU CLIP's image tower follows, if its weights are in fp32 and this type has 16 bits.
        """
        return self._precision

    @precision.setter
    def precision(self, dtype: torch.dtype | None) -> None:
        self._precision = check_precision(dtype)

    @property
    def input_precision(self) -> str:
        """Precision of products of fp32 numbers in Triton: "ieee", or on tensor cores "tf32x3" or "tf32"."""
        return self._input_precision

    @input_precision.setter
    def input_precision(self, precision: str) -> None:
        self._input_precision = check_input_precision(precision)

    @property
    def graphs(self) -> str:
        """ "auto", which records equal calls on a GPU as a CUDA graph at the third one, or "off"."""
        return self._graphs

    @graphs.setter
    def graphs(self, setting: str) -> None:
        self._graphs = check_graphs(setting)
        self.recordings.clear()

    @property
    def chunk(self) -> int | None:
        """Classes per step; None lets the engine choose."""
        return self._chunk

    @chunk.setter
    def chunk(self, chunk: int | None) -> None:
        self._chunk = check_chunk(chunk)

    @property
    def policy(self) -> str | None:
        """ "resident", "offload" or "recompute"; None lets the engine choose."""
        return self._policy

    @policy.setter
    def policy(self, policy: str | None) -> None:
        self._policy = check_policy(policy)

    @property
    def memory_budget(self) -> int | None:
        """Bytes that a call may take besides weights and inputs; may be set as "2GiB". None: free memory."""
        return self._memory_budget

    @memory_budget.setter
    def memory_budget(self, budget: int | str | None) -> None:
        self._memory_budget = None if budget is None else parse_bytes(budget)
