"""Downloads that are checked and never half done."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlparse
from urllib.request import urlopen

from firmly.errors import DataError
from firmly.storage import write_atomically


def cache_folder() -> Path:
    """Where downloads are kept: `FIRMLY_CACHE` if set, else `~/.cache/firmly`."""
    return Path(os.environ.get("FIRMLY_CACHE", Path.home() / ".cache" / "firmly"))


def download(url: str, sha256: str, folder: Path | None = None) -> Path:
    """The file at `url`, fetched once into `folder` (default: the cache) and compared with its checksum every time.

    A file with another checksum is never kept: `DataError`.
    """
    target = (folder or cache_folder()) / sha256[:12] / Path(urlparse(url).path).name
    if target.exists():
        if _digest(target) == sha256:
            return target
        target.unlink()
    try:
        with urlopen(url, timeout=60) as response:
            write_atomically(target, _checked(iter(lambda: response.read(1 << 20), b""), url, sha256))
    except (URLError, TimeoutError) as error:
        raise DataError(f"cannot download {url}: {getattr(error, 'reason', error)}") from error
    return target


def _checked(chunks: Iterator[bytes], url: str, sha256: str) -> Iterator[bytes]:
    """The same chunks; raises after the last one, before the file gets its name, if the checksum is wrong."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
        yield chunk
    if digest.hexdigest() != sha256:
        raise DataError(f"{url} has checksum {digest.hexdigest()}, expected {sha256}: it was not kept")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
