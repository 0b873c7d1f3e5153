"""What every scheme has to pass, as functions that raise AssertionError and say what was promised.

    for check in CHECKS:
        check(Scheme("mine", owner=..., worker=..., matrix=...))

They look at a scheme through `interface.py` alone, and import no scheme: an honest worker's answer
opens, whatever else arrives does not, and neither can make the owner do anything but refuse it.
`case` is what is tried, `results`, `secrecy` and `answers` are the checks.
"""

from backends.he.conformance.answers import (
    a_lie_anywhere_is_found,
    garbage_is_refused,
    honest_workers_stay_trusted,
    lies_are_found,
    nothing_unchecked_is_delivered,
    old_answers_are_refused,
    wrong_lengths_are_refused,
)
from backends.he.conformance.case import Case, Scheme
from backends.he.conformance.results import (
    bad_input_is_refused,
    errors_are_predicted,
    memory_is_its_owners,
    nothing_gets_mixed_up,
    products_are_right,
    products_are_right_at_any_scale,
    sizes_are_as_declared,
    workers_are_exact,
)
from backends.he.conformance.secrecy import (
    a_sealed_value_opens_once,
    errors_tell_nothing,
    requests_are_fresh,
)

CHECKS = (
    products_are_right, products_are_right_at_any_scale, errors_are_predicted,
    sizes_are_as_declared, bad_input_is_refused, memory_is_its_owners, nothing_gets_mixed_up,
    workers_are_exact, a_sealed_value_opens_once, requests_are_fresh, errors_tell_nothing,
    wrong_lengths_are_refused, garbage_is_refused, lies_are_found, a_lie_anywhere_is_found,
    old_answers_are_refused, nothing_unchecked_is_delivered, honest_workers_stay_trusted,
)  # fmt: skip
"""All of it, each of one scheme."""

__all__ = ["CHECKS", "Case", "Scheme", *(check.__name__ for check in CHECKS)]
