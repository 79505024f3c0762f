"""Where kvpass keeps what it would have to compute again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/kvpass`, or `~/.cache/kvpass`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvpass"
