"""Random programs, and PyTorch's operators: whatever symmetry is found holds.

`make sound` tries many more programs, and all operators.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, example, given, settings

from tools.programs import PROGRAMS, around, check_program, outcome


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(PROGRAMS)
@example(([("attention", 0, 0), ("edges", 0, 0)], False))  # sorts times, of which none are equal
def test_what_is_found_in_random_programs_holds(
    program: tuple[list[tuple[str, int, int]], bool],
) -> None:
    check_program(*program)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["special.legendre_polynomial_p", "cumprod", "frexp", "topk"])
def test_operators(name: str) -> None:
    """Of polynomials outputs reach 1e10 and change by 1 with the inputs: rounding is no harm."""
    from torch.testing._internal.common_methods_invocations import op_db

    found = [outcome(net) for op in op_db if op.name == name for net in around(op)]
    assert found
    assert not [text for word, text in found if word in ("unsound", "crashes")]
