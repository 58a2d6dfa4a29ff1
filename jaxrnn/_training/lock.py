"""One at a time: who trains a run holds a lock on it, which ends with the process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxrnn._api import checks


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock on a file of the run, as long as the block lasts.

    Raises:
      InputError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # not everywhere
        yield
        return
    # A lock is of what can be written, on NFS.
    with file.open("r+b" if os.access(file, os.W_OK) else "rb") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise checks.InputError(
                f"{file.parent}: expected a run that nobody is training, another process is"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
