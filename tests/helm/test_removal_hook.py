"""What `helm test` runs, with the trigger, against an API server whose RayJob does what a night would."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from expunge.batch.outcome import NightOutcome
from expunge.requests.store import open_store
from expunge.settings import load_settings
from tests.helm.charts import CHART, Ended, Rendered
from tests.helm.kube import KubeApi, status

Hook = Callable[[KubeApi, str], Ended]


@pytest.fixture
def hook(rendered: dict[str, Rendered], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hook:
    """Runs the pod's command with its arguments: the mounted files are the chart's own."""
    config = rendered["dev"].one("ConfigMap", "-config")["data"]
    (tmp_path / "config.toml").write_text(config["config.toml"])
    (tmp_path / "rayjob.json").write_text(config["rayjob.json"])
    monkeypatch.setenv("EXPUNGE_CONFIG", str(tmp_path / "config.toml"))
    (container,) = rendered["dev"].one("Pod")["spec"]["containers"]
    assert container["command"] == ["python", "/test/removal.py"]

    def run(api: KubeApi, night: str) -> Ended:
        given = [a.replace("/etc/expunge", str(tmp_path)).replace("$(NIGHT)", night) for a in container["args"]]
        environment = {
            **os.environ,
            "NIGHT": night,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        done = subprocess.run(
            [sys.executable, str(CHART / "files" / "removal.py"), *given, f"--server={api.url}", "--poll=0.05"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


def finish(name: str) -> None:
    """The night's last step, for a batch whose job failed: a verdict that did not pass."""
    settings = load_settings()
    batch = name.removeprefix("expunge-")
    outcome = NightOutcome(batch=batch, jobs=(), refused={"req-1": "only a test"}, outcomes=())
    (settings.runs / batch).mkdir(parents=True, exist_ok=True)
    (settings.runs / batch / "night.json").write_text(outcome.model_dump_json())


def test_it_drains_its_own_request_and_ends_as_the_verdict(hook: Hook) -> None:
    with KubeApi([status("RUNNING", "Running"), status("SUCCEEDED", "Complete")]).running() as api:
        api.asked = finish
        done = hook(api, "0b5c")
    assert done.code == 3, done.err
    assert "only a test" in done.out
    (record,) = open_store(load_settings()).list()
    assert (record.request.model, record.request.external_id) == ("helm-test", "helm-test-0b5c")
    (job,) = api.jobs.values()
    assert f"expunge.jobs.nightly --batch {record.batch} " in job["spec"]["entrypoint"]


def test_a_night_that_fails_fails_the_test(hook: Hook) -> None:
    with KubeApi([status("FAILED", "Failed", message="no GPU")]).running() as api:
        done = hook(api, "0b5d")
    assert done.code == 1
    assert "is FAILED: no GPU" in done.err
