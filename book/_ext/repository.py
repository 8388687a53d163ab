"""Put the repository's address, which stands in one place, into the theme's options."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def repository_url(root: Path) -> str:
    """The address of the public repository, or "" where none is set.

    `$MCNOTES_REPO_URL` wins over `[project.urls] Repository` in `root/pyproject.toml`.
    """
    with (root / "pyproject.toml").open("rb") as file:
        urls: dict[str, str] = tomllib.load(file)["project"].get("urls", {})
    return os.environ.get("MCNOTES_REPO_URL", urls.get("Repository", "")).rstrip("/")


def set_options(app: Any, config: Any) -> None:
    """With an address: Colab and repository buttons; without one: neither.

    Left alone, the theme would point the Colab button at another project's repository.
    """
    url = repository_url(Path(app.confdir))
    options = config.html_theme_options
    if url:
        options.update(repository_url=url, use_repository_button=True)
    else:
        options["launch_buttons"] = {}
        options.pop("repository_url", None)


def setup(app: Any) -> dict[str, bool]:
    app.connect("config-inited", set_options)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
