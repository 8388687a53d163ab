"""What all tests share: reproducible property tests without time limits, no progress bars."""

import os
import tempfile
from pathlib import Path

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
