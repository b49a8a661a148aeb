"""What is built is what works: a wheel, unpacked elsewhere, imports alone and brings its data and its C kernels."""

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "platform" / "expunge", ROOT / "unlearn_kernels")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built where there is no compiler, from a copy: the build leaves its library in the sources."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("platform", "unlearn_kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    return _build(copy, tmp_path_factory.mktemp("pure"), CC="no-such-compiler")


def _build(root: Path, out: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(root)]
    run = subprocess.run(
        command, cwd=out, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (built,) = out.glob("expunge-*.whl")
    return built


def _install(wheel: Path, target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def _sources() -> set[str]:
    """Every file of the packages, as it is named in the wheel."""
    return {
        str(file.relative_to(package.parent))
        for package in PACKAGES
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def test_it_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == _sources()


@pytest.mark.parametrize(
    "name",
    [
        "expunge/py.typed",
        "unlearn_kernels/py.typed",
        "expunge/testbed/data/flags.npz",
        "expunge/evaluation/templates/report.html.j2",
        "expunge/requests/migrations/script.py.mako",
        "expunge/requests/migrations/versions/0001_requests.py",
    ],
)
def test_the_data_arrives(wheel: Path, name: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        source = ROOT / ("platform" if name.startswith("expunge") else ".") / name
        assert archive.read(name) == source.read_bytes()


def test_it_says_what_it_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
        scripts = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
        licences = [n for n in archive.namelist() if n.endswith("/licenses/LICENSE")]
    assert metadata["Name"] == "expunge"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert len(licences) == 1
    assert metadata["Requires-Python"] == "<3.13,>=3.11"
    assert "torch<2.14,>=2.9" in metadata.get_all("Requires-Dist", [])
    assert set(metadata.get_all("Provides-Extra", [])) == {
        "arcface",
        "dev",
        "faces",
        "postgres",
        "s3",
        "serve",
        "surgeries",
        "testbed",
    }
    assert "expunge = expunge.cli:main" in scripts


IMPORTS = """
import sys
sys.path.insert(0, sys.argv[1])
import expunge.settings, expunge.surrogates, unlearn_kernels
from importlib.resources import files
assert expunge.__file__.startswith(sys.argv[1]) and unlearn_kernels.__file__.startswith(sys.argv[1])
import numpy
with files("expunge.testbed").joinpath("data/flags.npz").open("rb") as file:
    print(numpy.load(file)["images"].shape[0])
"""


def test_it_imports_outside_of_the_repository(wheel: Path, tmp_path: Path) -> None:
    """The path of the installed copy stands first, so that the editable install cannot help out."""
    target = tmp_path / "site"
    _install(wheel, target)
    run = subprocess.run(
        [sys.executable, "-c", IMPORTS, str(target)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["256"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["expunge", "--help"], "night"),
        (["expunge.jobs.nightly", "--help"], "--batch"),
        (["expunge.jobs.replay", "--help"], "--source"),
        (["expunge.jobs.submit_rayjob", "--help"], "--template"),
    ],
)
def test_a_night_needs_no_checkout(wheel: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    """From / and with nothing but the installed copy on the path: these are the commands of Ray and of the chart."""
    _install(wheel, tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout


KERNELS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from unlearn_kernels import gram
from unlearn_kernels.backends import backend_name, why_absent
assert gram([torch.ones(3), torch.ones(3)]).tolist() == [[3, 3], [3, 3]]
print(backend_name([torch.ones(1)]), why_absent("native") or "")
"""


@pytest.mark.parametrize(
    ("built", "tag", "says"),
    [
        ("wheel", "py3-none-linux_x86_64", "native"),
        ("pure_wheel", "py3-none-any", "reference libunlearn_kernels.so was not built"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="the names are of one platform")
def test_kernels_with_and_without_a_compiler(
    built: str, tag: str, says: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    wheel: Path = request.getfixturevalue(built)
    assert wheel.stem.endswith(tag)
    _install(wheel, tmp_path / "site")
    command = [sys.executable, "-c", KERNELS, str(tmp_path / "site")]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(says)
