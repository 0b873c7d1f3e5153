"""The root of all errors that a user can mend, so that commands need to import none of them.

What derives from these has a text of one line that says what is wrong and what to do. A module that
raises one defines it; `scenarios.cli.clean_exit` turns any of them into `error: ...`.
"""

from __future__ import annotations


class UserError(Exception):
    """Something outside this program is not as it must be; the text says what to do about it."""


class Interrupted(Exception):
    """The user asked to stop, and the work so far is kept; the text says how much."""
