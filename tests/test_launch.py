"""What is run without an activated environment: make, and the launchers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = """#!/bin/sh
echo "$0 $*" >>calls
case "$*" in
-c*) echo {modern} ;;
"-m venv --clear .venv") mkdir -p .venv/bin && cp new .venv/bin/python ;;
esac
"""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


def make(folder: Path, python: Path) -> subprocess.CompletedProcess:
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    return subprocess.run(["make", "lint", f"PYTHON={python}"], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("answer", ["False", ""])
def test_make_refuses_an_old_python_in_one_line(tmp_path, answer):
    done = make(tmp_path, script(tmp_path / "old", PYTHON.format(modern=answer)))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "is not Python 3.11 or newer: make PYTHON=python3.11" in done.stderr and not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("stale", [None, "#!/nowhere\n", PYTHON.format(modern="False"), PYTHON.format(modern="True")])
def test_make_builds_a_stale_environment_again_and_keeps_a_good_one(tmp_path, stale):
    new = script(tmp_path / "new", PYTHON.format(modern="True"))
    script(tmp_path / ".venv" / "bin" / "ruff", "#!/bin/sh\n")
    if stale is not None:
        script(tmp_path / ".venv" / "bin" / "python", stale)
        (tmp_path / "requirements.txt").write_text("")
        (tmp_path / ".venv" / ".ready").touch()
    done = make(tmp_path, new)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text()
    good = stale is not None and "True" in stale
    assert ("-m venv --clear .venv" in calls) is not good
    assert ".venv/bin/python -m pip install" in calls


@pytest.mark.parametrize("name", ["train_packforcing_dmd_hr_8gpu.sh", "train_tiny.sh"])
@pytest.mark.parametrize("activated", [False, True])
def test_launchers_take_the_environment_of_the_folder_where_none_is_activated(tmp_path, name, activated):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "runs" / "story").mkdir(parents=True)  # put together already
    script(tmp_path / ".venv" / "bin" / "torchrun", "#!/bin/sh\necho from the folder\n")
    script(tmp_path / "path" / "torchrun", "#!/bin/sh\necho from PATH\n")
    environment = {"PATH": f"{tmp_path / 'path'}:{os.environ['PATH']}"} | ({"VIRTUAL_ENV": "x"} if activated else {})
    done = subprocess.run(["bash", f"scripts/{name}"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("from PATH" if activated else "from the folder") in done.stdout
