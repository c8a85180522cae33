"""CAT-Seg as detectron2's meta-architecture `CATSegFast`: importing this module registers it.

With the line `import catseg_fast.detectron2` in upstream's `train_net.py`, its evaluation runs on this
package, with upstream's configurations and checkpoints:

    python train_net.py --config configs/vitl_336.yaml --eval-only \\
        MODEL.WEIGHTS model_final.pth MODEL.META_ARCHITECTURE CATSegFast
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from catseg_fast.checkpoints.checkpoint import IGNORED_KEYS
from catseg_fast.checkpoints.upstream_config import model_arguments
from catseg_fast.errors import MissingPackageError, RunError
from catseg_fast.model import CATSeg

try:
    from detectron2.config import configurable
    from detectron2.modeling import META_ARCH_REGISTRY
except ImportError as error:
    raise MissingPackageError(
        f"catseg_fast.detectron2: detectron2 cannot be imported ({error}); it registers a model there and is "
        "of use only in upstream's own project. catseg_fast.CATSeg needs no detectron2"
    ) from error

__all__ = ["CATSegFast"]


@META_ARCH_REGISTRY.register()
class CATSegFast(CATSeg):
    """`CATSeg` built from upstream's configuration: `CATSegFast(cfg)`, or as `CATSeg`.

    It does not run before a checkpoint has filled all its weights: detectron2 loads the matching
    ones, and ignores the others.
    """

    @configurable
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unloaded: set[str] | None = None
        self.register_load_state_dict_post_hook(_note_missing)

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        """See `catseg_fast.checkpoints.upstream_config.model_arguments`."""
        return model_arguments(cfg)

    def forward(
        self, batched_inputs: Sequence[dict[str, Any]]
    ) -> list[dict[str, Tensor]] | dict[str, Tensor]:
        """Run `CATSeg`'s call.

        Raises:
            RunError: if weights were not in the checkpoint, or none was loaded.
        """
        if self._unloaded is None:
            raise RunError("MODEL.WEIGHTS: no checkpoint was loaded; the weights would be random")
        if self._unloaded:
            raise RunError(
                f"MODEL.WEIGHTS: {len(self._unloaded)} weights were not in the checkpoint, or of another "
                f"shape, such as {min(self._unloaded)}; it is not one of {self.variant.name}"
            )
        return super().forward(batched_inputs)


def _note_missing(model: CATSegFast, incompatible_keys: Any) -> None:
    missing = {key for key in incompatible_keys.missing_keys if not IGNORED_KEYS.search(key)}
    model._unloaded = missing if model._unloaded is None else model._unloaded & missing
