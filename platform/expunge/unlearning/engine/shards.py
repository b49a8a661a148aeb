"""A shard: the part of a reduced gradient, or of the weights, that this rank keeps."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

Shard = list[Tensor]
"""One tensor for each parameter of which this rank holds a part, always in the same order."""


class ReducedGradients(ABC):
    """Finds this rank's shard after the backward pass of an objective's last micro-batch."""

    parameters: list[nn.Parameter]
    """The parameter that each piece of a shard belongs to."""
    disjoint: bool
    """True if every number is on exactly one rank, so that dot products add up over the ranks; false if every rank
    holds all of them."""

    boundary = True
    """Whether DeepSpeed is told which micro-batch is an objective's last: it then finishes a reduction of its own."""

    def reduce(self) -> None:  # noqa: B027  # some stages have nothing to do
        """Start averaging over the ranks what the backward passes have accumulated."""

    def wait(self) -> None:  # noqa: B027
        """Block until every reduction has finished; shards must not be read before."""

    @abstractmethod
    def current(self) -> Shard:
        """Return the gradient in place: the optimizer steps with whatever is written into it."""

    @abstractmethod
    def stash(self) -> Shard:
        """Return the gradient to keep until the step ends, and let the next backward pass start from zero.

        It occupies one shard of memory and nothing else.
        """

    @abstractmethod
    def clear(self) -> None:
        """Drop the gradient, so that the next backward pass starts from zero."""

    def hand_over(self) -> None:  # noqa: B027
        """Copy `current` to an optimizer on the host, which reads it elsewhere. Call it right before the step."""

    def before_forward(self) -> None:  # noqa: B027
        """Do what DeepSpeed's own forward does first: the families call their network directly."""

    @abstractmethod
    def second_moment(self) -> tuple[Shard, int]:
        """Return AdamW's running mean of squared gradients, in place, and the number of steps in it.

        Its pieces are those of `current`, which must be there; before the first step there are none.
        """

    @abstractmethod
    def masters(self) -> Shard:
        """Return the float32 weights that the optimizer steps: this rank's part of them, or all of them."""

    @abstractmethod
    def set_masters(self, values: Mapping[nn.Parameter, Tensor]) -> None:
        """Set the float32 copies of whole parameters; the network's own weights follow at the next step."""


def held_bytes(pieces: Shard) -> int:
    """Count the bytes of all memory that these tensors keep alive."""
    storages = {piece.untyped_storage().data_ptr(): piece.untyped_storage().nbytes() for piece in pieces}
    return sum(storages.values())
