"""The prepared tensors of a job as sealed safetensors: written by the prepare stage, read by every worker."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor

from expunge.families.base import Conditioning
from expunge.requests.blobs import BlobStore
from expunge.types import BlobId, PreparedJob


@dataclass(frozen=True)
class ForgetSet:
    """N rows: every view of every target image of every request, once per prompt it is removed under."""

    x_f: Tensor
    """float32 [N, C, H, W]: target latents."""
    x_s: Tensor
    """float32 [N, C, H, W]: surrogate latents."""
    prompt: Tensor
    """int64 [N]: row of the conditioning."""
    request: Tensor
    """int64 [N]: index into the job's requests."""

    def without(self, requests: Collection[int]) -> "ForgetSet":
        """Return the rows of the other requests."""
        kept = ~torch.isin(self.request, torch.tensor(sorted(requests), dtype=torch.long))
        return ForgetSet(self.x_f[kept], self.x_s[kept], self.prompt[kept], self.request[kept])


@dataclass(frozen=True)
class RetainSet:
    """M rows of images that the model must keep generating."""

    x_0: Tensor
    """float32 [M, C, H, W]: latents."""
    prompt: Tensor
    """int64 [M]: row of the conditioning."""


Set = TypeVar("Set", ForgetSet, RetainSet)


def join(parts: Sequence[ForgetSet]) -> ForgetSet:
    """Concatenate the rows of several requests."""
    return ForgetSet(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(ForgetSet)))


def store_set(blobs: BlobStore, data: ForgetSet | RetainSet) -> BlobId:
    """Seal a set as one blob and return its id. Raises StorageError."""
    return store_tensors(blobs, {field.name: getattr(data, field.name) for field in fields(data)})


def store_tensors(blobs: BlobStore, tensors: Conditioning) -> BlobId:
    """Seal named tensors as one blob and return its id. Raises StorageError."""
    return blobs.put(save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def load_tensors(blobs: BlobStore, blob: BlobId) -> Conditioning:
    """Load what `store_tensors` stored. Raises NotFoundError, StorageError."""
    return load(blobs.get(blob))


def load_set(blobs: BlobStore, blob: BlobId, kind: type[Set]) -> Set:
    """Load what `store_set` stored. Raises NotFoundError, StorageError."""
    return kind(**load_tensors(blobs, blob))


def load_job(blobs: BlobStore, prepared: PreparedJob) -> tuple[ForgetSet, RetainSet, Conditioning]:
    """Load everything that training reads. Raises NotFoundError, StorageError."""
    return (
        load_set(blobs, prepared.forget, ForgetSet),
        load_set(blobs, prepared.retain, RetainSet),
        load_tensors(blobs, prepared.conditioning),
    )
