"""Package layout: `catseg_fast/kernels` and `catseg_fast/reference` link to the folders beside it."""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["catseg_fast", "catseg_fast.*"]),
    package_data={
        "catseg_fast": ["py.typed", "configs/*/*.json"],
        "catseg_fast.app": ["static/*"],
        "catseg_fast.checkpoints": ["*.safetensors"],
        "catseg_fast.text": ["lists/*.json"],
    },
)
