"""The engine in models that were built elsewhere: read exactly, compared, and watched at each call."""

from catseg_fast.acceleration.acceleration import Acceleration, accelerate
from catseg_fast.acceleration.adapters import Adapter

__all__ = ["Acceleration", "Adapter", "accelerate"]
