"""Settings of all tests; without a GPU, kernels run in Triton's interpreter."""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import pytest

# Read when torch and numpy are imported, here and in the processes that tests start. Threads that spin while
# they wait take ten times as long if processes share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    threads = str(max(1, len(os.sched_getaffinity(0)) // int(workers)))
    os.environ.setdefault("OMP_NUM_THREADS", threads)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", threads)

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

pytest_plugins = ["support.fixtures"]

GPU = torch.cuda.is_available()
_numbers = itertools.count()

if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

from support import interpreter  # noqa: E402

# The kernels are compared with plain torch.
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

os.environ.pop(
    "COLUMNS", None
)  # which pytest-xdist sets to the terminal's; tables are made for a fixed width


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--upstream", metavar="FOLDER", help="a checkout of upstream, for the tests marked so")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse names of tests that hold an address, which differ among the processes of pytest-xdist."""
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(f"{item.nodeid}: give this case an id; its name holds an address")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Give each test an empty cache folder of the user, which is made when something is written."""
    folder = tmp_path_factory.getbasetemp() / f"cache-{next(_numbers)}"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter() -> Iterator[None]:
    """Leave out what the interpreter does besides running the kernels, and let it treat NaN as a GPU does."""
    with interpreter.overflow_checks(False), interpreter.quick(), interpreter.nan_as_on_gpu():
        yield


@pytest.fixture
def overflow_checks() -> Iterator[None]:
    """Let the interpreter check 32-bit integers for overflow."""
    with interpreter.overflow_checks(True):
        yield


@pytest.fixture
def on_gpu() -> Iterator[None]:
    """Let new tensors be on the GPU, if there is one."""
    with torch.device("cuda" if GPU else "cpu"):
        yield


# Larger tensors are left as they are, so that the system need not find memory for them.
MOST_POISONED = 2**26


@pytest.fixture(autouse=True)
def _poison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill allocated tensors with NaN in tests of all modules that import something of the kernels."""
    names = (getattr(value, "__module__", None) or value.__name__ for value in imported(request.module))
    if not any(name.startswith("catseg_fast.kernels") for name in names):
        return
    from torch._dynamo.trace_rules import get_torch_obj_rule_map
    from torch.utils._device import _device_constructors

    # Lists of torch's functions, made when they are first used, and again after a process group has ended.
    get_torch_obj_rule_map()
    _device_constructors()
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def imported(module: ModuleType) -> list[Any]:
    """Modules, functions and classes among a module's names."""
    return [value for value in vars(module).values() if isinstance(value, (ModuleType, FunctionType, type))]


def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return an allocating function whose floating tensors hold NaN, except while graphs are made."""

    @functools.wraps(allocate)
    def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
        x = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or isinstance(x, FakeTensor) or x.is_meta:
            return x
        if not x.is_floating_point() or x.numel() > MOST_POISONED:
            return x
        with _disable_current_modes():  # what is tested does not fill its buffers
            return x.fill_(math.nan)

    return allocate_poisoned


@pytest.fixture
def default_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels in the interpreter take a GPU's default configs (`capability.assume`)."""
    from catseg_fast.kernels.launch.kernel import Kernel  # triton exists for Linux only

    def keep(kernel: Kernel[Any], value: Any) -> None:  # of a kernel that is imported meanwhile
        vars(kernel)["interpreter_config"] = value

    unset = property(lambda self: None, keep)
    monkeypatch.setattr(Kernel, "interpreter_config", unset, raising=False)
