"""Kubernetes' API server, as far as a night needs it: create a RayJob, and look at it.

The standard library speaks to it: the official client would add eight packages and 74 MB to the image, and it, too,
knows RayJobs only as dictionaries.
"""

import json
import os
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from expunge.errors import ExpungeError, InputError, UnavailableError
from expunge.logs import get_logger

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
REQUEST_TIMEOUT_S = 30

Json = dict[str, Any]


@dataclass(frozen=True)
class Api:
    """The RayJobs of one namespace.

    A server that is down, overloaded or failing is asked again every `pause` seconds, for `patience` seconds in all.
    """

    server: str
    namespace: str
    patience: float
    pause: float

    def create(self, manifest: Json) -> bool:
        """Create a RayJob; return False if one of that name exists, as after a create whose answer was lost.

        Raises InputError if the server refuses it, UnavailableError if it does not answer.
        """
        status, answer = self._ask("POST", "", manifest)
        if status in (200, 201):
            return True
        if status == 409 and answer.get("reason") == "AlreadyExists":
            return False
        raise _refusal(status, answer)

    def get(self, name: str) -> Json | None:
        """Return a RayJob, or None if there is none. Raises InputError and UnavailableError as `create` does."""
        status, answer = self._ask("GET", f"/{name}")
        if status == 404:
            return None
        if status != 200:
            raise _refusal(status, answer)
        return answer

    def _ask(self, method: str, path: str, body: Json | None = None) -> tuple[int, Json]:
        url = f"{self.server}/apis/ray.io/v1/namespaces/{self.namespace}/rayjobs{path}"
        until = time.monotonic() + self.patience
        while True:
            try:
                return self._once(method, url, body)
            except (OSError, HTTPException, ValueError) as error:  # refused, reset, timed out, or cut short
                reason = str(getattr(error, "reason", None) or error)
            if time.monotonic() > until:
                raise UnavailableError(
                    f"the Kubernetes API at {self.server} did not answer for {self.patience:g} s ({reason})",
                    hint="the night itself continues: start the trigger again, and it waits for the same RayJob",
                )
            get_logger("trigger").warning("the Kubernetes API does not answer", why=reason)
            time.sleep(self.pause)

    def _once(self, method: str, url: str, body: Json | None) -> tuple[int, Json]:
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        token = ACCOUNT / "token"
        if token.exists():  # read each time: Kubernetes renews it
            headers["Authorization"] = f"Bearer {token.read_text().strip()}"
        authority = ACCOUNT / "ca.crt"
        context = ssl.create_default_context(cafile=str(authority)) if authority.exists() else None
        request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers, method=method)
        # A pod's proxy leads out of the cluster, and the API server is inside.
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        try:
            with opener.open(request, timeout=REQUEST_TIMEOUT_S) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            if error.code == 429 or error.code >= 500:
                raise OSError(f"it answers {error.code}") from None
            return error.code, _status_of(error)


def in_cluster() -> str:
    """Return the URL of the API server of the cluster that this pod runs in."""
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    return f"https://[{host}]:{port}" if host and ":" in host else f"https://{host or 'kubernetes.default.svc'}:{port}"


def _refusal(status: int, answer: Json) -> ExpungeError:
    said = str(answer.get("message") or f"HTTP {status}")
    hints = {
        401: "check that the trigger's service account token is mounted",
        403: "let the trigger's service account create and get rayjobs",
        404: "install the KubeRay operator and its definitions (ray.io/v1)",
    }
    hint = hints.get(status, "correct the chart's values and upgrade")
    return InputError(f"the Kubernetes API refuses the RayJob ({said})", hint=hint)


def _status_of(error: urllib.error.HTTPError) -> Json:
    try:
        answer = json.load(error)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}
