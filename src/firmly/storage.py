"""Files that are either complete or absent: written beside their target, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from firmly.errors import StorageError


def write_atomically(path: Path | str, content: bytes | str | Iterable[bytes]) -> Path:
    """Write `content` to `path` so that a reader sees the old file or the new one, never a part of it.

    The bytes go to a temporary file in the same folder, are flushed to the disk and renamed over the target. If
    anything fails the old file stays as it was; a full or unwritable disk raises `StorageError`.
    """
    path = Path(path)
    if isinstance(content, str):
        content = content.encode("utf-8")
    chunks = [content] if isinstance(content, bytes) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(explain(error, path)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return path


def explain(error: OSError, path: Path) -> str:
    """One sentence for a write that failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full: {path} was not written and its old version, if any, is intact; "
            "free some space and try again"
        )
    return f"cannot write {path}: {error.strerror or error}"
