"""The wheel holds all that runs: built, installed into an environment of its own, and used from there."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
PACKAGES = ("gym_queue", "workers", "beat")


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without any of this process's Python settings; fail with what it printed."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "HOME": str(cwd)},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from the checkout, with the backend that is installed here: nothing is downloaded."""
    target = tmp_path_factory.mktemp("wheel")
    build = (*PIP, "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation")
    run(*build, "--wheel-dir", target, ROOT, cwd=target)
    (built,) = target.glob("gym_queue-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a fresh environment that borrows this one's dependencies; return its folder."""
    home = tmp_path_factory.mktemp("installed") / "env"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    run(*PIP, "--python", python, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=home)
    # A path named in a .pth file is searched last, and .pth files in it are not followed: the checkout, which
    # this environment may know as an editable install, stays out of sight.
    site_packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home)
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(site_packages.strip(), "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    return home


def test_the_wheel_holds_every_file_of_the_three_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    source = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert shipped == source
    assert {f"{package}/py.typed" for package in PACKAGES} <= shipped
    assert any(name.startswith("gym_queue/ledger/lua/") and name.endswith(".lua") for name in shipped)


def test_the_packages_are_imported_from_the_wheel(installed: Path) -> None:
    show = f"import {', '.join(PACKAGES)}; print(*(m.__file__ for m in ({', '.join(PACKAGES)})), sep='\\n')"
    files = run(installed / "bin" / "python", "-c", show, cwd=installed).split()
    assert len(files) == len(PACKAGES)
    assert all(Path(file).is_relative_to(installed) for file in files)


def test_submit_rollouts_runs_from_the_wheel(installed: Path) -> None:
    said = run(installed / "bin" / "submit-rollouts", "--help", cwd=installed)
    assert "--samples" in said
    assert "--model" in said


def test_gym_queue_runs_from_the_wheel(installed: Path) -> None:
    said = run(installed / "bin" / "gym-queue", "--help", cwd=installed)
    assert said.startswith("Usage: gym-queue ")
    assert "Say what ROLLOUT waits for" in said
