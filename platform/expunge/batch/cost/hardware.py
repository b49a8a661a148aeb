"""What the operations of a night take on given hardware: hours and money."""

from dataclasses import dataclass

from expunge.batch.settings import PEAK_TFLOPS, Gpu, NightSettings


@dataclass(frozen=True)
class Hardware:
    """GPUs, or CPU cores where there are none, that share a night's work."""

    units: int
    """How many GPUs or cores."""
    rate: float
    """Operations per second of one of them."""
    name: str
    price: float = 0.0
    """Of one unit for one hour."""
    utilisation: float = 1.0
    """The share of its peak that `rate` is."""

    @classmethod
    def gpus(cls, count: int, kind: Gpu, utilisation: float, price: float, precision: str = "bf16") -> "Hardware":
        """precision: bf16 or fp32, of which the latter is reckoned as TF32."""
        return cls(count, 1e12 * PEAK_TFLOPS[kind][precision] * utilisation, kind.upper(), price, utilisation)

    @classmethod
    def of(cls, gpus: int, cores: int, night: NightSettings, precision: str) -> "Hardware":
        """Return the GPUs that a cluster has; where there are none, its CPU cores."""
        if gpus:
            return cls.gpus(gpus, night.gpu, night.utilisation, night.price, precision)
        return cls(max(1, cores), 1e12 * night.cpu_tflops, "CPU core")

    def unit_hours(self, operations: float) -> float:
        """Return the hours that one unit takes alone, which is also what is paid for."""
        return operations / self.rate / 3600

    def hours(self, operations: float) -> float:
        """Return the hours that all units take together, as if they divided the work evenly."""
        return self.unit_hours(operations) / self.units

    def money(self, operations: float) -> float:
        return self.price * self.unit_hours(operations)
