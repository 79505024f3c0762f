"""Files and folders that have their name when they are complete, and are what was written."""

import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from kvpass.errors import PackageError


@contextmanager
def new_target(path: str | Path) -> Iterator[Path]:
    """A path to write a file or a folder to, which becomes `path` in the end, or nothing at all.

    It has the name that it will have, in another folder. Raises `PackageError` if `path` exists or cannot be written.
    """
    target = Path(path)
    if target.exists():
        raise PackageError(f"{target} exists; give another path, or remove it first")
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise PackageError(f"{target.parent} cannot be written to: {error}") from error
    try:
        yield scratch / target.name
        os.rename(scratch / target.name, target)
    except OSError as error:
        raise PackageError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of all files in a folder, by their paths in it."""
    return {str(path.relative_to(folder)): digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def check_files(folder: Path, expected: dict[str, str]) -> None:
    """Raises `PackageError` if a file is missing or is another one."""
    for name, wanted in expected.items():
        if not (folder / name).is_file() or digest(folder / name) != wanted:
            raise PackageError(f"{folder / name} is missing or is not what was saved; copy the folder again")


def versions() -> dict[str, str]:
    """The releases that what is written belongs to."""
    return {"kvpass": importlib.metadata.version("kvpass"), "torch": ".".join(torch.__version__.split(".")[:2])}


def write_texts(texts: Mapping[str, str], folder: Path) -> None:
    """Text files by their paths in a folder."""
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def bytes_of(path: Path) -> int:
    """The size of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
