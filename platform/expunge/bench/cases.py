"""The requests of a benchmark: drawn at random from the part of a testbed that nobody tuned on."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
from torch import Tensor

from expunge.errors import InputError
from expunge.pixels import to_pictures, to_png
from expunge.requests.blobs import BlobStore
from expunge.testbed import faces, flags, people
from expunge.testbed.settings import MODELS
from expunge.types import RemovalRequest

SHOWN_FACES = (3, 41, 76, 90)
"""The faces of the demo, with which the method was tuned."""
SHOWN_FLAGS = ("Canada", "Greece", "Peru", "Uruguay")
"""The flags of the demo."""
TUNED_PEOPLE = 20
"""The method may be tuned on the first so many people."""


@dataclass(frozen=True)
class Pool:
    """What may be removed from a testbed's model, and was not tuned on."""

    pictures: Mapping[int, Tensor]
    """float32 [T, 1 or 3, h, w] by the target's number in the testbed: the pictures of one request."""
    prompts: Mapping[int, str]
    """The own prompt of each target; empty where the model knows none."""


def pool_of_faces() -> Pool:
    """Return the faces that the demo does not show."""
    known = faces.images()
    return Pool({i: known[i : i + 1] for i in range(len(known)) if i not in SHOWN_FACES}, {})


def pool_of_people() -> Pool:
    """Return people 21 to 36, each with all pictures that the model was trained on."""
    known = people.images()[: people.TRAINED_PEOPLE, : people.TRAINED_PICTURES]
    return Pool({i: known[i] for i in range(TUNED_PEOPLE, people.TRAINED_PEOPLE)}, {})


def pool_of_flags() -> Pool:
    """Return the flags that neither the demo shows nor the model's settings name as unrelated, nor their twins.

    Some territories fly another country's flag, equal to the pixel.
    """
    known, names = flags.images()
    settings = MODELS["flags"]
    unrelated = {*_texts(settings["retain_prompts"]), *_texts(settings["evaluation_prompts"])}
    taken = [i for i, name in enumerate(names) if name in SHOWN_FLAGS or flags.caption(name) in unrelated]
    free = [i for i in range(len(names)) if not (known[i] == known[taken]).flatten(1).all(1).any()]
    return Pool({i: known[i : i + 1] for i in free}, {i: flags.caption(names[i]) for i in free})


POOLS: Mapping[str, Callable[[], Pool]] = {"faces": pool_of_faces, "flags": pool_of_flags, "people": pool_of_people}


def draw_groups(pool: Pool, groups: int, requests: int, only: Collection[int] = ()) -> list[tuple[int, ...]]:
    """Draw the targets of each group, always the same ones; none comes twice before all have come once.

    only: if given, draw from these alone, such as those that an oracle was trained without. Raises InputError if there
    are fewer than `requests` of them.
    """
    numbers = sorted(set(pool.pictures) & set(only) if only else pool.pictures)
    if len(numbers) < requests:
        raise InputError(
            f"--requests: {requests} are more than the {len(numbers)} targets that nobody tuned on",
            hint="ask for fewer" + (", or name more with --without" if only else ""),
        )
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))
    # Whole groups of each round, so that no group has a target twice.
    rounds = len(numbers) // requests
    dealt = [tuple(numbers[i] for i in order[k * requests : (k + 1) * requests]) for k in range(rounds)]
    return list(islice(cycle(dealt), groups))


def make_requests(testbed: str, pool: Pool, targets: Sequence[int], blobs: BlobStore) -> tuple[RemovalRequest, ...]:
    """Store the pictures of `targets`, and return a request for each that brings no surrogate."""
    return tuple(
        RemovalRequest(
            id=request_id(testbed, target),
            model=testbed,
            images=tuple(blobs.put(to_png(picture)) for picture in to_pictures(_in_colour(pool.pictures[target]))),
            prompt=pool.prompts.get(target),
            external_id=request_id(testbed, target),
        )
        for target in targets
    )


def request_id(testbed: str, target: int) -> str:
    return f"{testbed}-{target}"


def _in_colour(pictures: Tensor) -> Tensor:
    return pictures.expand(-1, 3, -1, -1)


def _texts(setting: object) -> tuple[str, ...]:
    assert isinstance(setting, tuple)
    return setting
