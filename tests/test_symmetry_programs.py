"""Random programs, and PyTorch's operators: whatever symmetry is found holds.

`make sound` tries many more programs, and all operators.
"""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings

from tools.programs import PROGRAMS, check_program


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(PROGRAMS)
def test_what_is_found_in_random_programs_holds(
    program: tuple[list[tuple[str, int, int]], bool],
) -> None:
    check_program(*program)
