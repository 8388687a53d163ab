"""What pytest needs to know when it runs the chapters by nbval."""

import pytest

OUTPUT_SECONDS = 120.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Wait longer for a cell's output than nbval's five seconds.

    They are no option of it, and a busy machine may hold output back.
    """
    for item in items:
        if hasattr(item, "output_timeout"):
            item.output_timeout = OUTPUT_SECONDS
