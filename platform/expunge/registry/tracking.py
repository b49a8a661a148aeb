"""MLflow runs: one experiment per model, one run per job. The only module that imports MLflow's client.

Only ids, numbers and files without personal data are logged: never prompts, external ids or images of requests.
"""

import logging
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote

from expunge.errors import ExpungeError, InputError, NotFoundError, StorageError, UnavailableError, first_line
from expunge.files import make_private
from expunge.registry.embedded import ensure_database

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

JOB_TAG = "expunge.job"
Status = Literal["FINISHED", "FAILED", "KILLED"]

# By default MLflow waits minutes for an absent server (7 retries of 120 s). That is too long for metrics, but too short
# for weights: their server may be silent while it passes gigabytes on to its store. An operator's own values are kept.
RECORDS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "4",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
}
TRANSFERS = {
    **RECORDS,
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "7",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "3600",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "3600",
}
PARAMS_PER_CALL = 100  # MLflow's own limit


class Tracker:
    """One tracking server, or the embedded SQLite one, whose folder it creates.

    `uri` is `sqlite:///PATH` (artifacts then go to `artifacts/` beside the database) or `http(s)://HOST` (the
    server's own artifact store). Raises InputError for any other scheme; every method raises
    UnavailableError if nothing answers.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._artifacts: Path | None = None
        self._database: Path | None = None
        scheme, _, rest = uri.partition("://")
        match scheme:
            case "sqlite" if rest.startswith("/") and rest.strip("/") not in ("", ":memory:"):
                self._database = Path(unquote(rest[1:].partition("?")[0])).absolute()
                self._artifacts = _embedded_folder(self._database) / "artifacts"
            case "http" | "https" if rest:
                pass
            case _:
                raise InputError(
                    f"tracking_uri: {uri!r} is not supported",
                    hint="use sqlite:///PATH, or start `mlflow server` and use http://HOST:PORT",
                )

    @property
    def embedded(self) -> bool:
        """True if the artifacts are files on this machine."""
        return self._artifacts is not None

    @cached_property
    def client(self) -> "MlflowClient":
        for name, value in RECORDS.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # it would tear our own output
        from mlflow import MlflowClient

        for chatty in ("alembic", "mlflow.store.db.utils", "mlflow.tracking"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        with self.reaching():
            if self._database is not None:
                ensure_database(self._database)
            return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    @contextmanager
    def transferring(self) -> Iterator[None]:
        """Do what `reaching` does, with timeouts that are long enough to upload or download weights."""
        client = self.client  # first, because it sets the defaults that are replaced here
        assert client is not None
        before = dict(os.environ)
        os.environ.update({name: value for name, value in TRANSFERS.items() if before.get(name) == RECORDS.get(name)})
        try:
            with self.reaching():
                yield
        except ExpungeError:
            raise
        except Exception as error:  # the disk, requests, boto3: every artifact store raises its own
            raise self._not_transferred(error) from error
        finally:
            for name in TRANSFERS:
                os.environ.pop(name, None)
            os.environ.update({name: before[name] for name in TRANSFERS if name in before})

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """Turn what MLflow raises inside the block into a one-line ExpungeError."""
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except MlflowException as error:
            raise self._explained(error) from error
        except SQLAlchemyError as error:
            raise self._unavailable(error) from error

    def ensure_run(self, model: str, job_id: str, *, params: Mapping[str, object], tags: Mapping[str, str]) -> str:
        """Find the job's run by its tag, or create it; mark it as running and return its id.

        Params that the run already has are kept, because MLflow refuses to change them.
        """
        from mlflow.entities import Param

        client = self.client
        with self.reaching():
            experiment = self._experiment(f"expunge/{model}", model)
            run_id = self._find(experiment, job_id) or self._create(experiment, job_id, tags)
            run = client.get_run(run_id)
            for key, value in tags.items():
                if run.data.tags.get(key) != value:
                    client.set_tag(run_id, key, value)
            fresh = [Param(key, str(value)) for key, value in params.items() if key not in run.data.params]
            for start in range(0, len(fresh), PARAMS_PER_CALL):
                client.log_batch(run_id, params=fresh[start : start + PARAMS_PER_CALL])
            if run.info.status != "RUNNING":
                client.update_run(run_id, status="RUNNING")
        return run_id

    def log_metrics(self, run_id: str, step: int, metrics: Mapping[str, float]) -> None:
        """Log all metrics of a step in one call."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        client = self.client
        with self.reaching():
            client.log_batch(run_id, metrics=[Metric(key, float(value), now, step) for key, value in metrics.items()])

    def curves(self, run_id: str, keys: Iterable[str]) -> dict[str, list[tuple[int, float]]]:
        """Return the (step, value) pairs of each logged metric, in order; a step logged twice counts once."""
        client = self.client
        found: dict[str, list[tuple[int, float]]] = {}
        with self.reaching():
            for key in keys:
                history = sorted(client.get_metric_history(run_id, key), key=lambda metric: metric.timestamp)
                points = {metric.step: metric.value for metric in history}
                if points:
                    found[key] = sorted(points.items())
        return found

    def log_artifact_bytes(self, run_id: str, name: str, data: bytes) -> None:
        """Store `data` as the run's artifact `name`, a relative path with forward slashes."""
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.name:
            raise ValueError(f"an artifact's name is a relative path, not {name!r}")
        client = self.client
        with tempfile.TemporaryDirectory() as folder, self.transferring():
            file = Path(folder) / path.name
            file.write_bytes(data)
            parent = str(path.parent)
            client.log_artifact(run_id, str(file), None if parent == "." else parent)

    def log_folder(self, run_id: str, name: str, folder: Path) -> str:
        """Store the files of `folder` under the run's artifact folder `name`; return that folder's URI."""
        client = self.client
        with self.transferring():
            client.log_artifacts(run_id, str(folder), name)
            return f"{client.get_run(run_id).info.artifact_uri}/{name}"

    def fetch(self, uri: str, to: Path | None = None) -> Path:
        """Return a local copy of the artifacts at `uri`, or the stored files if they are local and `to` is None."""
        from mlflow.artifacts import download_artifacts

        with self.transferring():
            return Path(
                download_artifacts(artifact_uri=uri, dst_path=None if to is None else str(to), tracking_uri=self.uri)
            )

    def read(self, uri: str) -> bytes:
        """Return the content of a small artifact. Raises NotFoundError, StorageError."""
        with tempfile.TemporaryDirectory() as folder, self.transferring():
            return self.fetch(uri, Path(folder)).read_bytes()

    def finish(self, run_id: str, status: Status) -> None:
        """End the run with `status`."""
        client = self.client
        with self.reaching():
            client.set_terminated(run_id, status)

    def _experiment(self, name: str, model: str) -> str:
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            location = None if self._artifacts is None else (self._artifacts / model).as_uri()
            try:
                return self.client.create_experiment(name, artifact_location=location)
            except self._exceptions as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            experiment = self.client.get_experiment_by_name(name)  # another process was faster
            assert experiment is not None
        if experiment.lifecycle_stage == "deleted":
            self.client.restore_experiment(experiment.experiment_id)
        return experiment.experiment_id

    def _find(self, experiment: str, job_id: str) -> str | None:
        runs = self.client.search_runs(
            [experiment],
            f"tags.`{JOB_TAG}` = '{job_id}'",
            max_results=1,
            order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
        )
        return runs[0].info.run_id if runs else None

    def _create(self, experiment: str, job_id: str, tags: Mapping[str, str]) -> str:
        created = self.client.create_run(experiment, tags={**tags, JOB_TAG: job_id}, run_name=job_id).info.run_id
        oldest = self._find(experiment, job_id)
        if oldest is None or oldest == created:
            return created
        self.client.delete_run(created)  # two processes raced: both keep the older run
        return oldest

    @property
    def _exceptions(self) -> "type[MlflowException]":
        from mlflow.exceptions import MlflowException

        return MlflowException

    def _explained(self, error: "MlflowException") -> ExpungeError:
        from mlflow.exceptions import RestException

        answered = isinstance(error, RestException) or error.error_code not in (
            "INTERNAL_ERROR",
            "TEMPORARILY_UNAVAILABLE",
        )
        if not answered:
            return self._unavailable(error)
        said = first_line(error)
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return NotFoundError(f"MLflow at {self.uri}: {said}")
        if error.error_code in ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"):
            return UnavailableError(
                f"MLflow at {self.uri} refuses ({error.error_code})",
                hint="check MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
            )
        return ExpungeError(f"MLflow at {self.uri}: {said}")

    def _not_transferred(self, error: Exception) -> ExpungeError:
        if isinstance(error, OSError) and error.errno is not None:
            return StorageError(
                f"an MLflow artifact cannot be stored or read ({error.strerror}: {error.filename})",
                hint="free space or check its permissions, then repeat",
            )
        return UnavailableError(
            f"the artifact store of MLflow at {self.uri} failed ({first_line(error)})",
            hint="check it, then repeat",
        )

    def _unavailable(self, error: Exception) -> UnavailableError:
        if self._artifacts is None:
            return UnavailableError(
                f"MLflow at {self.uri} does not answer", hint="start it, or set EXPUNGE_TRACKING_URI"
            )
        return UnavailableError(
            f"MLflow's database {self.uri} cannot be used ({first_line(error)})",
            hint="check the file and its permissions",
        )


def _embedded_folder(database: Path) -> Path:
    folder = database.parent
    try:
        make_private(folder)
    except OSError as error:
        raise UnavailableError(
            f"tracking_uri: cannot create {folder} ({error.strerror})",
            hint="set EXPUNGE_HOME or EXPUNGE_TRACKING_URI to a writable place",
        ) from None
    return folder
