"""A Kubernetes API server for RayJobs, as far as the trigger asks it: real HTTP, on a port that may go away."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Json = dict[str, Any]
PATH = re.compile(r"/apis/ray\.io/v1/namespaces/(?P<namespace>[^/]+)/rayjobs(/(?P<name>[^/]+))?")


class KubeApi:
    """`statuses` is what a RayJob goes through, a status for each time it is asked for; the last one stays."""

    def __init__(self, statuses: list[Json]) -> None:
        self.statuses = statuses
        self.jobs: dict[str, Json] = {}
        self.calls: list[str] = []
        self.refuse: tuple[int, Json] | None = None
        """Answer every request with this."""
        self.lose_answers = 0
        """So many requests are carried out, and their answer is cut off."""
        self.asked: Callable[[str], None] = lambda name: None
        self._server: ThreadingHTTPServer | None = None
        self._port = 0
        self._seen: dict[str, int] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                api.answer(self)

            do_POST = do_GET

            def log_message(self, format: str, *args: object) -> None:
                """Tests look at `calls`."""

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Connections are refused from here on, until it is started again on the same port."""
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    @contextmanager
    def running(self) -> Iterator["KubeApi"]:
        self.start()
        try:
            yield self
        finally:
            self.stop()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        self.calls.append(f"{request.command} {request.path}")
        status, answer = self.refuse or self._serve(request.command, request.path, body)
        if self.lose_answers:
            self.lose_answers -= 1
            request.close_connection = True
            return
        data = json.dumps(answer).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def _serve(self, method: str, path: str, body: bytes) -> tuple[int, Json]:
        match = PATH.fullmatch(path)
        if match is None:
            return failure(404, "NotFound", "the server could not find the requested resource")
        if method == "POST":
            job = json.loads(body)
            name = job["metadata"]["name"]
            if name in self.jobs:
                return failure(409, "AlreadyExists", f'rayjobs.ray.io "{name}" already exists')
            self.jobs[name] = job
            return 201, job
        name = match["name"]
        if name not in self.jobs:
            return failure(404, "NotFound", f'rayjobs.ray.io "{name}" not found')
        at = self._seen.get(name, 0)
        self._seen[name] = at + 1
        self.asked(name)
        known = self.jobs[name]
        return 200, {"status": self.statuses[min(at, len(self.statuses) - 1)], **known}


def failure(code: int, reason: str, message: str) -> tuple[int, Json]:
    """As the API server words it."""
    return code, {"kind": "Status", "status": "Failure", "reason": reason, "message": message, "code": code}


def status(job: str, deployment: str, **more: str) -> Json:
    return {"jobStatus": job, "jobDeploymentStatus": deployment, **more}
