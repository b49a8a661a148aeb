"""The Dockerfiles: linted, held to our own rules, and their steps run as far as they need no container engine."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.deploy.dockerfile import Dockerfile, parse

ROOT = Path(__file__).parents[2]
KINDS = ("cpu", "cuda")
COMPILERS = {"gcc", "g++", "clang", "cc", "build-essential", "nvcc", "cuda-nvcc", "libc6-dev"}
ENGINE_ONLY = re.compile(r"apt-get update")


def dockerfile(kind: str) -> Path:
    return ROOT / "deploy" / f"Dockerfile.{kind}"


@pytest.fixture(params=KINDS)
def file(request: pytest.FixtureRequest) -> Dockerfile:
    return parse(dockerfile(request.param))


@pytest.mark.parametrize("kind", KINDS)
def test_the_linter_has_no_word_to_say(kind: str) -> None:
    lint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([lint, str(dockerfile(kind))], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_linter_would_say_one(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python:latest\nRUN cd /tmp\n")
    lint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([lint, str(tmp_path / "Dockerfile")], capture_output=True, text=True, check=False, timeout=60)
    assert "DL3007" in done.stdout


def test_every_base_can_be_pinned(file: Dockerfile) -> None:
    assert file.arguments["BASE_DIGEST"] == ""
    assert {stage.base for stage in file.stages} == {"${BASE}${BASE_DIGEST:+@${BASE_DIGEST}}"}
    assert not file.arguments["BASE"].endswith(":latest")


def test_it_runs_as_nobody_special_and_is_asked_for_its_health(file: Dockerfile) -> None:
    final = file.stages[-1]
    assert final.of("USER") == ["1000:1000"]
    assert final.instructions.index(next(i for i in final.instructions if i.name == "USER")) > max(
        index for index, i in enumerate(final.instructions) if i.name == "RUN"
    )
    (check,) = final.of("HEALTHCHECK")
    assert "$HEALTH_URL" in check
    assert not final.of("ADD")


def test_the_compiler_stays_behind(file: Dockerfile) -> None:
    build, final = file.stages
    assert "gcc" in " ".join(build.of("RUN"))
    words = {word for run in final.of("RUN") for word in shlex.split(run)}
    assert not words & COMPILERS
    assert final.variables().get("EXTRA_PACKAGES", "") == ""
    assert {copy.split()[0] for copy in final.of("COPY")} == {"--from=build"}


def test_the_two_differ_in_nothing_but_the_gpu() -> None:
    cpu, cuda = (dockerfile(kind).read_text().splitlines() for kind in KINDS)
    ignored = re.compile(r"^#|TORCH_INDEX=|NVIDIA|EXTRA_PACKAGES")
    assert [line for line in cpu if not ignored.search(line) and "wget &&" not in line] == [
        line for line in cuda if not ignored.search(line)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_sources_goes_to_the_daemon(kind: str) -> None:
    lines = dockerfile(kind).with_name(f"Dockerfile.{kind}.dockerignore").read_text().splitlines()
    rules = [line for line in lines if not line.startswith("#")]
    allowed = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    copied = {
        source for stage in parse(dockerfile(kind)).stages[:1] for c in stage.of("COPY") for source in c.split()[:-1]
    }
    assert rules[0] == "*"
    assert {source.removeprefix("./") for source in copied} == allowed


@dataclass(frozen=True)
class Built:
    """What the build stage leaves, under a folder instead of /."""

    root: Path
    ran: list[str]
    left_out: list[str]


@pytest.fixture(scope="module", params=KINDS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Runs the build stage in an environment of its own: its paths moved, its RUN steps to the letter, in bash.

    The installing step is told to leave dependencies out (PIP_NO_DEPS): gigabytes of them prove nothing more.
    """
    root = tmp_path_factory.mktemp(request.param)
    stage = parse(dockerfile(request.param)).stages[0]
    environment = {
        name: value for name, value in os.environ.items() if name.startswith(("PIP_", "HTTP", "http", "SSL", "HOME"))
    }
    environment |= {"PATH": f"{_python(root)}:/usr/bin:/bin", "PIP_RETRIES": "1"}
    here, ran, left_out = root, [], []

    def moved(text: str) -> str:
        return re.sub(r"(?<![\w.])/(src|wheels|opt)(?=[/\s\")]|$)", rf"{root}/\1", text)

    for instruction in stage.instructions:
        match instruction.name:
            case "ENV" | "ARG":
                words = (word.split("=", 1) for word in shlex.split(instruction.value))
                environment |= {word[0]: moved(word[1]) for word in words if len(word) == 2}
            case "WORKDIR":
                here = Path(moved(instruction.value))
                here.mkdir(parents=True, exist_ok=True)
            case "COPY":
                _copy(instruction.value.split(), here, moved, dockerfile(request.param))
            case "RUN" if ENGINE_ONLY.match(instruction.value):
                left_out.append(instruction.value)
            case "RUN":
                command = ["bash", "-euo", "pipefail", "-c", moved(instruction.value)]
                own = {**environment, "PIP_NO_DEPS": "1"} if "pip install" in instruction.value else environment
                done = subprocess.run(
                    command, cwd=here, env=own, capture_output=True, text=True, check=False, timeout=500
                )
                assert done.returncode == 0, f"{instruction.value}\n{done.stdout}\n{done.stderr}"
                ran.append(instruction.value)
    return Built(root, ran, left_out)


def _python(root: Path) -> Path:
    """The base image's `python`: this interpreter's own, outside of any environment."""
    folder = root / "base"
    folder.mkdir()
    (folder / "python").symlink_to(Path(sysconfig.get_config_var("BINDIR")) / "python3.11")
    return folder


def _copy(words: list[str], here: Path, moved: Callable[[str], str], file: Path) -> None:
    """From the context, without what is ignored."""
    *sources, target = words
    lines = file.with_name(f"{file.name}.dockerignore").read_text().splitlines()
    hidden = [line.removeprefix("**/") for line in lines if line.startswith("**/")]

    def ignored(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if any(fnmatch(name, pattern) for pattern in hidden)]

    for source in sources:
        there = Path(moved(target)) if target.startswith("/") else here / target
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, there, ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copy(ROOT / source, there)


@pytest.mark.slow
def test_only_debians_packages_were_left_out(built: Built) -> None:
    assert len(built.left_out) == 1
    assert len(built.ran) == 2


@pytest.mark.slow
def test_the_wheel_brings_the_kernels_compiled(built: Built) -> None:
    (wheel,) = (built.root / "wheels").glob("*.whl")
    assert re.fullmatch(r"expunge-[\d.]+-py3-none-linux_x86_64\.whl", wheel.name)
    assert list((built.root / "opt/venv/lib/python3.11/site-packages/unlearn_kernels").glob("libunlearn_kernels.*"))


INSTALLED = """
import json, sys, sysconfig
sys.path.append(sys.argv[1])  # the dependencies that pip left out, behind what is installed
import expunge
from importlib.util import find_spec
from unlearn_kernels import native
from expunge.commands.config import installed_version
print(json.dumps([expunge.__file__, find_spec("boto3").origin, native.__file__, installed_version()]))
"""


@pytest.mark.slow
def test_what_is_installed_works_without_the_checkout(built: Built, tmp_path: Path) -> None:
    python = built.root / "opt/venv/bin/python"
    command = [python, "-I", "-c", INSTALLED, sysconfig.get_path("purelib")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    *files, version = json.loads(done.stdout)
    assert all(file.startswith(str(built.root)) for file in files)
    assert version == "0.1.0"


@pytest.mark.slow
def test_the_jobs_are_where_the_chart_looks_for_them(built: Built) -> None:
    jobs = built.root / "opt/venv/lib/python3.11/site-packages/expunge/jobs"
    assert {"nightly.py", "submit_rayjob.py"} <= {path.name for path in jobs.iterdir()}
