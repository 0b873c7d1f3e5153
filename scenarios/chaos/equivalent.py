"""Mutants that no test can find, because nothing that is promised changes; each with its reason.

Keyed by file, function, line, what was there and what is there now: an entry that fits no mutant of
the present text is an error (`mutants.outdated`), so none outlives what it speaks of.
"""

from __future__ import annotations

_MOVED = "self._move(call, CallInput.FAILED)"
EQUIVALENT: dict[tuple[str, str, str, str, str], str] = {
    ("protocol/owner.py", "Owner._fail", _MOVED, _MOVED, "pass"): (
        "the next line forgets the call, and nobody looks at the state of one that is forgotten"
    ),
    ("protocol/owner.py", "Owner.__init__", "self._now = 0.0", "0.0", "(-1.0)"): (
        "the later of it and a clock's first word, which is not negative"
    ),
    ("protocol/owner_memory.py", "Peer", "attempts: int = 0", "0", "(-1)"): (
        "the first greeting, and the close, set it before anything is counted"
    ),
}
