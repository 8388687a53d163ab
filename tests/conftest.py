"""What all tests share: reproducible property tests without time limits, no progress bars."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("TQDM_DISABLE", "1")
# PyTorch keeps compiled kernels and asks no more for which instruction set they are: kernels of one
# setting, taken up under another, corrupt memory. So each setting has a folder of its own.
_SETTING = os.environ.get("ATEN_CPU_CAPABILITY", "best")
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    str(Path(tempfile.gettempdir()) / f"mcnotes-tests-inductor-{_SETTING}"),
)
settings.register_profile("book", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("book")


def shared() -> dict[str, object]:
    """What a test could change for all that come after it."""
    return {
        "threads": torch.get_num_threads(),
        "type": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "folder": os.getcwd(),
    }


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Each test draws the same numbers, whichever ran before it, and leaves no trace."""
    torch.manual_seed(0)
    before = shared()
    yield
    assert shared() == before, "the test changed what others share"


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on Python's path, with a module of the user's, `small.USERS_NET`."""
    import small  # not before TQDM_DISABLE is set

    (tmp_path / "users_net.py").write_text(small.USERS_NET)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "users_net", raising=False)
    return tmp_path
