"""MkDocs hook: lets mkdocstrings read the modules where they lie once installed, without importing any."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority

ROOT = Path(__file__).parent.parent
installed = tempfile.TemporaryDirectory(prefix="catseg-fast-docs.")


@event_priority(100)  # before mkdocstrings looks at its paths
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    package = Path(installed.name) / "catseg_fast"
    if not package.exists():  # `mkdocs serve` comes here again and again
        package.mkdir()
        for path in (ROOT / "catseg_fast").iterdir():  # reference and kernels are links there
            (package / path.name).symlink_to(path.resolve())
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [installed.name]
    return config
