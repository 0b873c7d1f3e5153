"""File descriptors for a prepared model: every mapped array holds one for as long as it is used."""

from __future__ import annotations

import os
import resource

from backends.he.manifest import PreparationError

_SPARE = 64  # for sockets, files of the moment and threads that write


def require_descriptors(count: int, what: str = "") -> None:
    """Let this process hold so many more files open, by raising its soft limit if it must.

    Asked before hours of work as well as when they are mapped: a model that cannot be opened should
    not be prepared first.

    what  needs them, for a message ("a model of so many arrays needs")

    Raises PreparationError when the hard limit does not allow it.
    """
    what = what or f"a model of {count} arrays needs"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/dev/fd")) + count + _SPARE
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    try:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise ValueError(f"the hard limit is {hard}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (ValueError, OSError) as error:
        raise PreparationError(
            f"{what} {needed} files open at once, and this process may have {soft} ({error}); "
            f"raise it first, as with `ulimit -n {needed}`, which may take an administrator"
        ) from error
