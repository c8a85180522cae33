"""Package layout: `kernels/` and `reference/` of the checkout install inside `catseg_fast`."""

from setuptools import setup

setup(
    packages=[
        "catseg_fast",
        "catseg_fast.kernels",
        "catseg_fast.reference",
        "catseg_fast.scenes",
        "catseg_fast.training",
    ],
    package_dir={"catseg_fast.kernels": "kernels", "catseg_fast.reference": "reference"},
    package_data={
        "catseg_fast": [
            "py.typed",
            "configs/*/*.json",
            "checkpoints/*.safetensors",
            "class_lists/*.json",
            "page/*",
        ]
    },
)
