"""What all tests share: reproducible property tests without time limits, no progress bars."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("TQDM_DISABLE", "1")
settings.register_profile("book", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("book")


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on Python's path, with a module of the user's, `small.USERS_NET`."""
    import small  # not before TQDM_DISABLE is set

    (tmp_path / "users_net.py").write_text(small.USERS_NET)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "users_net", raising=False)
    return tmp_path
