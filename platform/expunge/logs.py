"""Logs go to stderr: readable on a terminal, otherwise one JSON object per line. They never hold what people sent."""

import sys

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

from expunge.text import masked

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}

# The fields of a request that may be personal. Whoever holds the sealing key can look them up by the request's id.
PRIVATE = frozenset(
    {"image", "images", "surrogate", "surrogates", "mask", "prompt", "prompts", "reason", "external_id", "edit", "path"}
)


def configure(level: str = "info") -> None:
    """Set the level (debug, info, warning, error) for this process. It may be called again."""
    terminal = sys.stderr.isatty()
    last = structlog.dev.ConsoleRenderer(colors=True) if terminal else structlog.processors.JSONRenderer(sort_keys=True)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            redact,
            last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        # Look stderr up for each line, because it may have been closed and replaced.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        cache_logger_on_first_use=False,
    )


def get_logger(name: str) -> FilteringBoundLogger:
    """Return a logger whose lines carry `component=name`. Without `configure`, the level is info."""
    if not structlog.is_configured():
        configure()
    return structlog.get_logger(component=name)


def redact(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Blank private fields and mask passwords in URLs: the last line of defence against a careless log call."""
    return {key: "[private]" if key in PRIVATE else _masked(value) for key, value in event.items()}


def _masked(value: object) -> object:
    match value:
        case dict():
            return {key: "[private]" if key in PRIVATE else _masked(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_masked(inner) for inner in value]
        case None | bool() | int() | float():
            return value
        case _:
            return masked(str(value))
