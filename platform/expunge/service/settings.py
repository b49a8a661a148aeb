"""The settings of the HTTP service: what one caller may send, and how much at a time."""

from pydantic import Field

from expunge.section import Section


class ServiceSettings(Section):
    """Limits of one process. Bodies are held in memory, so `max_body` times `concurrent` is what they may take."""

    max_body: int = Field(default=64_000_000, ge=1000, description="the largest body of an HTTP request, in bytes")
    max_files: int = Field(default=1000, ge=1, description="the most pictures in one HTTP request")
    body_seconds: float = Field(default=60.0, gt=0, description="seconds in which a body must have arrived")
    concurrent: int = Field(default=32, ge=1, le=1000, description="HTTP requests at a time; more get status 503")
    rate: float = Field(
        default=20.0, gt=0, description="HTTP requests per second and token, on average, in each process"
    )
    burst: int = Field(default=100, ge=1, description="HTTP requests that a token may make at once")
