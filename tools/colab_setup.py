# In Colab: get the book's code and data. Elsewhere this cell does nothing.
import sys

REPOSITORY = ""

if "google.colab" in sys.modules:
    import os
    import subprocess

    if not REPOSITORY:
        raise RuntimeError(
            "This notebook does not know where its repository is: set REPOSITORY "
            "in this cell to the address to clone, and run it again."
        )
    if not os.path.isdir("mcnotes"):
        folder = "mode-connectivity-book"
        if not os.path.isdir(folder):
            clone = ["git", "clone", "--quiet", "--depth=1", REPOSITORY, folder]
            subprocess.run(clone, check=True)
        os.chdir(folder)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "-e", "."]
    subprocess.run(install, check=True)
    sys.path.insert(0, os.getcwd())
