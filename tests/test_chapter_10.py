"""Chapter 10 on a network, files and pictures that it has never seen."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import agree, picture_folder, terms

from mcnotes import checkpoints, data, train
from tools import chapters

ROOT = Path(__file__).resolve().parents[1]


def readme_command() -> list[str]:
    """The words of the command by which the README makes a report."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text("utf8"), re.DOTALL)
    (line,) = re.findall(r"^mcnotes report .*$", "\n".join(blocks), re.M)
    return shlex.split(line)


class TestChapter:
    """Chapter 10, on a network, files and pictures that it has never seen."""

    def test_runs_on_a_pair_of_the_users(self, user: Path) -> None:
        """By the README's command, from the user's folder; only the training is made shorter."""
        picture_folder(user / "photos", {"train": 30, "val": 10, "test": 10})
        task = data.dataset(str(user / "photos"), device="cpu")
        net = checkpoints.normalised(
            checkpoints.build("users_net:Net", {"classes": 3}), [0.4], [0.2]
        )
        recipe = train.Recipe(4, 16, lr=0.02, schedule="linear", augment=False)
        one, two = (train.fit(net, task, recipe, seed=seed).theta for seed in (1, 2))
        lightning = {f"net.{n}": x for n, x in one.items()} | {"loss.weight": torch.ones(3)}
        torch.save({"state_dict": lightning, "epoch": 4}, user / "a.ckpt")
        save_file(two, user / "b.safetensors")

        (user / "mynets.py").write_text("from users_net import Net\n")
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # as if installed
        environment = {"PYTHONPATH": os.pathsep.join(paths), "MCNOTES_STORE": str(user / "store")}
        environment |= chapters.ENVIRONMENT
        tool, *arguments = readme_command()
        arguments += ["--arguments", '{"classes": 3}', "--mean", "0.4", "--std", "0.2"]
        arguments += ["--epochs", "1", "--points", "3", "--batch-size", "16", "--samples", "60"]
        command = [sys.executable, "-m", tool, *arguments]
        run = subprocess.run(command, cwd=user, env=os.environ | environment, capture_output=True)
        assert run.returncode == 0, run.stderr.decode()[-2000:]

        names = {"aligned_b.safetensors", "average.safetensors", "best_point.safetensors"}
        assert {path.name for path in (user / "report").iterdir()} == names
        fresh = checkpoints.build("users_net:Net", {"classes": 3})  # the class itself, no hook
        x = (task.test.images / 255 - 0.4) / 0.2
        outputs = {}
        for name in ("aligned_b", "average", "best_point"):
            path = user / "report" / f"{name}.safetensors"
            fresh.load_state_dict(load_file(path))
            outputs[name] = fresh(x)
            with safe_open(path, framework="pt") as file:
                made_from = json.loads(file.metadata()["made_from"])
            assert made_from["a"] == checkpoints.load(user / "a.ckpt", net).sha256
        fresh.load_state_dict(two)
        agree(outputs["aligned_b"], fresh(x), terms(fresh))
        assert not torch.allclose(outputs["average"], fresh(x), atol=1e-2)
        page = (user / "report.html").read_text("utf8")
        (line,) = re.findall(r"<li>[^<]*<code>a\.ckpt</code>.*?</li>", page, re.DOTALL)
        assert "state_dict/net." in line, "where it stood"
        assert "1 left outside" in line
