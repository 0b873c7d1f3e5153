"""Mutants that no test can find, because nothing that is promised changes; each with its reason.

Keyed by file, function, line, what was there and what is there now: an entry that fits no mutant of
the present text is an error (`mutants.outdated`), so none outlives what it speaks of.
"""

from __future__ import annotations

EQUIVALENT: dict[tuple[str, str, str, str, str], str] = {}
