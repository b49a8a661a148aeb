"""The folder `platform` must never hide the standard library's module of that name."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_platform_is_not_a_package() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()


def test_the_standard_library_wins_from_the_root() -> None:
    """From the root, with the root first on the path: the worst place there is."""
    code = "import platform, sys; print(sys.path[0] == '', platform.system(), platform.__file__)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    first, system, file = run.stdout.split()
    assert first == "True"
    assert system in ("Linux", "Darwin", "Windows")
    assert not Path(file).is_relative_to(ROOT / "platform")


def test_the_editable_install_finds_both_packages(tmp_path: Path) -> None:
    code = "import expunge, unlearn_kernels; print(expunge.__file__, unlearn_kernels.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
    )
    expected = [str(ROOT / "platform" / "expunge" / "__init__.py"), str(ROOT / "unlearn_kernels" / "__init__.py")]
    assert run.stdout.split() == expected
