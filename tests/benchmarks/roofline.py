"""Estimate the cost of surgery on an H100, by arithmetic from bytes moved and published peak figures.

`python -m tests.benchmarks.roofline` prints the table. Nothing here has run on a GPU.
"""

from dataclasses import dataclass

BANDWIDTH = 3.35e12
"""Bytes per second of an H100 SXM's HBM3, as published."""
FLOPS = 989e12
"""Dense bfloat16 tensor-core operations per second, as published."""
UTILISATION = 0.40
"""The share of FLOPS that a training step is assumed to reach."""

VECTORS = {"eager": 21, "foreach": 13, "fused": 5}
"""Vectors of N read or written by one surgery of a forget and a retain gradient, counted in `kernel_peers`; fused: the
Gram reads two, the combination reads two and writes one."""


@dataclass(frozen=True)
class Transformer:
    """The published shape of an MMDiT at 1024 x 1024, with 4096 latent tokens and 333 text tokens."""

    name: str
    parameters: float
    layers: int
    width: int
    tokens: int = 4096 + 333

    def flops(self) -> float:
        """Operations of a forward and backward pass over one sample: 6 per weight and token that meet, and attention.

        A layer has 36 width^2 weights: two streams of 18, of which 6 make a sample's modulation. A token meets the 12
        that are left of its own stream.
        """
        met = 12 * self.layers * self.width**2
        return 6 * met * self.tokens + 12 * self.layers * self.width * self.tokens**2


MODELS = (Transformer("SD3-medium", 2.03e9, 24, 1536), Transformer("SD3.5-large", 8.06e9, 38, 2432))


def main() -> None:
    print(
        f"Arithmetic, not measured: H100 at {BANDWIDTH / 1e12} TB/s, bf16 gradients, {UTILISATION:.0%} of peak assumed."
    )
    print("A step is one forward and backward pass over B forget and B retain samples, unsharded.\n")
    print("| model | surgery | bytes moved | floor, ms | share of a step, B = 1 | B = 4 | B = 16 |")
    print("|---|---|---|---|---|---|---|")
    for model in MODELS:
        for name, vectors in VECTORS.items():
            moved = 2 * vectors * model.parameters
            floor = moved / BANDWIDTH
            shares = []
            for batch in (1, 4, 16):
                step = 2 * batch * model.flops() / (UTILISATION * FLOPS)
                shares.append(f"{floor / (step + floor):.1%}")
            print(f"| {model.name} | {name} | {moved / 1e9:.0f} GB | {1e3 * floor:.1f} | {' | '.join(shares)} |")


if __name__ == "__main__":
    main()
