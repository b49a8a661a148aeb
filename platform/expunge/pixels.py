"""The one picture codec: uint8 pixels, float tensors in [-1, 1], PNG."""

from collections.abc import Sequence
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_tensor(pictures: np.ndarray | Sequence[np.ndarray]) -> Tensor:
    """Turn uint8 [B, h, w, C] into float32 [B, C, h, w] in [-1, 1]."""
    return torch.from_numpy(np.asarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(tensor: Tensor) -> np.ndarray:
    """Turn floats [B, C, h, w], clipped to [-1, 1], into uint8 [B, h, w, C]."""
    pixels = ((tensor.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def to_png(picture: np.ndarray) -> bytes:
    """Encode uint8 [h, w, 3] as PNG."""
    buffer = BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()
