"""Every rank is sent its partition in order, whatever the layout and however few numbers travel at once."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from expunge.unlearning.engine.buckets import Bucket, buckets_of

SIZES = st.lists(st.integers(0, 12), min_size=1, max_size=6)


@given(
    sizes=SIZES,
    gaps=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    ranks=st.integers(1, 4),
    most=st.integers(1, 40),
)
def test_buckets_are_the_partitions_of_the_flat_gradient(
    sizes: list[int], gaps: list[int], ranks: int, most: int
) -> None:
    gradients, flat, offsets = [], [], []
    for number, (size, gap) in enumerate(zip(sizes, gaps, strict=False), 1):
        offsets.append(sum(map(len, flat)))
        gradients.append(number + torch.arange(size) / 100)
        flat += [gradients[-1], torch.zeros(gap)]
    whole = torch.cat(flat)
    length = -(-len(whole) // ranks)
    whole = torch.nn.functional.pad(whole, (0, ranks * length - len(whole)))

    buckets = buckets_of(sizes, offsets, length, ranks, most)
    assert [bucket.begin for bucket in buckets] == [0, *(bucket.end for bucket in buckets)][: len(buckets)]
    assert all(ranks * (bucket.end - bucket.begin) <= max(most, ranks) for bucket in buckets)
    sent = [filled(bucket, gradients, ranks) for bucket in buckets]
    assert torch.equal(torch.cat(sent, 1) if sent else whole.view(ranks, 0), whole.view(ranks, length))


def filled(bucket: Bucket, gradients: list[torch.Tensor], ranks: int) -> torch.Tensor:
    out = torch.full((ranks, bucket.end - bucket.begin), torch.nan)
    bucket.fill(out.view(-1), gradients)
    return out
