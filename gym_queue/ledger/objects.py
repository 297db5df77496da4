"""``Files`` of ``payloads.py`` on any file system that fsspec has a driver for: S3, GCS, Azure, SFTP."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import fsspec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Objects:
    """``Files`` on a file system of fsspec. Writing an object is atomic and durable where its service says
    so.

    Raises:
        ImportError: the driver of this kind of URL is not installed (``s3fs`` for ``s3://``).
        ValueError: fsspec knows no such kind of URL.
    """

    def __init__(self, url: str) -> None:
        self._fs: Any
        self._fs, root = fsspec.url_to_fs(url)
        self._root = root.rstrip("/")
        if set(self._root) & set("*?["):  # fsspec would take them for a pattern, and delete what matches
            msg = f"{url} has one of * ? [ in it"
            raise ValueError(msg)

    def _paths(self, folder: str, names: Sequence[str]) -> list[str]:
        return [f"{self._root}/{folder}/{name}" for name in names]

    def make(self, folder: str) -> None:
        """See ``Files.make``."""
        self._fs.makedirs(f"{self._root}/{folder}", exist_ok=True)

    def write(self, folder: str, files: Mapping[str, bytes]) -> None:
        """See ``Files.write``."""
        self._fs.pipe(dict(zip(self._paths(folder, [*files]), files.values(), strict=True)))

    def read(self, folder: str, names: Sequence[str]) -> list[bytes | Exception]:
        """See ``Files.read``."""
        found: list[bytes | Exception] = self._fs.cat_ranges(self._paths(folder, names), None, None)
        return found

    def delete(self, folder: str, names: Sequence[str]) -> None:
        """See ``Files.delete``."""
        paths = self._paths(folder, names)
        try:
            self._fs.rm(paths)
        except FileNotFoundError:
            for path in paths:
                with suppress(FileNotFoundError):
                    self._fs.rm_file(path)

    def remove(self, folder: str) -> None:
        """See ``Files.remove``."""
        self._fs.invalidate_cache()
        with suppress(FileNotFoundError):
            self._fs.rm(f"{self._root}/{folder}", recursive=True)

    def folders(self) -> list[str]:
        """See ``Files.folders``."""
        self._fs.invalidate_cache()
        try:
            return [path.rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []
