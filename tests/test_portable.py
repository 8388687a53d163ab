"""The tests as on other processors: settings reach the process, failures reach the exit status."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools import chapters, portable

SHOW = "import torch; print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())"


def test_a_setting_reaches_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert "ATEN_CPU_CAPABILITY" not in portable.environment("best-1", tmp_path)
    given = portable.environment("default-2", tmp_path)
    assert given["MCNOTES_STORE"] == str(tmp_path)
    assert set.union(*map(set, portable.INSTRUCTIONS.values())) < {*chapters.KERNELS}
    shown = subprocess.run([sys.executable, "-c", SHOW], env=given, check=True, capture_output=True)
    assert shown.stdout.split() == [b"DEFAULT", b"2"]


@pytest.mark.parametrize("setting", ["avx1024-1", "best", "best-3", ""])
def test_an_unknown_setting_is_refused_before_anything_runs(setting: str) -> None:
    with pytest.raises(ValueError, match=r"got setting .* expected one of best-1, .*default-2"):
        portable.main(portable.options(["--settings", "best-1", setting]))


def test_an_instruction_set_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(ValueError, match="has no AVX2"):
        portable.main(portable.options(["--settings", "avx2-1"]))


def test_failures_are_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "test_some.py"
    file.write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2\n")
    given = portable.options(
        ["--settings", "default-1", "--parts", "tests", "--jobs", "1", "--tests", str(file)]
    )
    assert portable.main(given) == 1
    line, failure = capsys.readouterr().out.splitlines()
    assert line.startswith("default-1  tests     1 passed, 1 failed in ")
    assert "test_bad" in failure
    file.write_text("def test_good(): pass\n")
    assert portable.main(given) == 0


def test_everything_that_ci_runs_is_tried() -> None:
    assert [*portable.options([]).parts] == ["tests", "chapters", "smoke"]
    tests, chapters, smoke = (
        portable.command("default-2", part, ["tests"], ["07", "09"], 4) for part in portable.PARTS
    )
    assert "-n 2" in " ".join(tests)
    assert len([x for x in chapters if x.endswith(".ipynb")]) == 2
    assert " ".join(smoke) == "tools.book run 07 09 --preset smoke --force --jobs 2"


def test_a_chapter_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="no chapter matches"):
        portable.main(portable.options(["--settings", "best-1", "--chapters", "99"]))
