"""What all tests share: reproducible property tests without time limits, no progress bars."""

import os

from hypothesis import settings

os.environ.setdefault("TQDM_DISABLE", "1")
settings.register_profile("book", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("book")
