"""The engine in models that were built elsewhere: read exactly, compared, and watched at each call."""

from catseg_fast.acceleration.accelerate import Acceleration, accelerate

__all__ = ["Acceleration", "accelerate"]
