"""Token buckets: how often one caller may come. They are kept in this process: N processes let N times as many in."""

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

_MOST = 10_000  # buckets kept; one that is dropped was full, or belongs to whoever has not come for longest


class RateLimit:
    """Each name may come `burst` times at once, and `rate` times per second in the long run. Safe between threads."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, name: str) -> int:
        """Returns 0 if `name` may come, which counts, or else the whole seconds until it may."""
        with self._lock:
            now = self._clock()
            level, at = self._buckets.pop(name, (float(self._burst), now))
            level = min(float(self._burst), level + (now - at) * self._rate)
            allowed = level >= 1
            self._buckets[name] = (level - 1 if allowed else level, now)
            if len(self._buckets) > _MOST:
                self._buckets.popitem(last=False)
            return 0 if allowed else max(1, math.ceil((1 - level) / self._rate))
