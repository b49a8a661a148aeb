"""The metrics, as pure functions. Images are float [B, C, H, W] in [-1, 1], features are float [B, D]."""

import torch
from torch import Tensor

PEAK = 2.0  # the width of [-1, 1]
PSNR_CAP = 100.0
SSIM_WINDOW = 7


def psnr(before: Tensor, after: Tensor) -> Tensor:
    """Return each pair's peak signal-to-noise ratio, float64 [B] in dB: 10 log10(peak^2 / mean squared error), peak 2.

    Values are capped at 100 dB, which equal images get.
    """
    _same_shape(before, after)
    error = (before.double() - after.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(PEAK**2 / error)).clamp(max=PSNR_CAP)


def ssim(before: Tensor, after: Tensor) -> Tensor:
    """Return each pair's structural similarity, float64 [B] in [-1, 1]: the mean over pixels and channels.

    Wang et al. 2004. The window is uniform, 7 pixels wide, or the largest odd width that fits into a smaller image.
    Raises ValueError for images under 3 pixels.
    """
    from skimage.metrics import structural_similarity

    _same_shape(before, after)
    side = min(before.shape[-2:])
    if side < 3:
        raise ValueError(f"structural similarity needs images of at least 3 pixels per side, not {side}")
    window = min(SSIM_WINDOW, side if side % 2 else side - 1)
    values = [
        structural_similarity(
            a.double().cpu().numpy(), b.double().cpu().numpy(), win_size=window, channel_axis=0, data_range=PEAK
        )
        for a, b in zip(before, after, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def kid(features_a: Tensor, features_b: Tensor) -> float:
    """Return the kernel distance of two sets [A, D] and [B, D]: unbiased MMD^2 with k(x, y) = (x.y / D + 1)^3.

    Binkowski et al. 2018, over the whole sets rather than averaged over subsets. It is 0 on average if both sets come
    from one distribution, so a single value may be negative. Raises ValueError for fewer than two samples per set.
    """
    a, b = features_a.double(), features_b.double()
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"kid needs [A, D] and [B, D] with A, B >= 2, not {tuple(a.shape)} and {tuple(b.shape)}")

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        """Average over pairs of different samples: leaving out the diagonal makes the estimate unbiased."""
        gram = kernel(x, x)
        return (gram.sum() - gram.diagonal().sum()) / (len(x) * (len(x) - 1))

    return (within(a) + within(b) - 2 * kernel(a, b).mean()).item()


def centred_cosine(features: Tensor, reference: Tensor, centre: Tensor) -> Tensor:
    """Return the cosine, float64 [B], of `features` [B, D] and `reference` [D] or [B, D], relative to `centre` [D].

    An encoder's raw features share a large common part, which makes any two images look alike. Subtracting the centre,
    the mean feature of unrelated samples, removes it. A feature at the centre has cosine 0.
    """
    x, y = features.double() - centre.double(), reference.double() - centre.double()
    return torch.nn.functional.cosine_similarity(x, y.expand_as(x), dim=1)


def shift(features: Tensor, target: Tensor, surrogate: Tensor) -> Tensor:
    """Return how far each feature moved from target to surrogate: <z - z_f, z_s - z_f> / |z_s - z_f|^2, float64 [B].

    It is 0 at the target, 1 at the surrogate and 0.5 at equal distance; values below 0 or above 1 lie beyond them.
    `features` is [B, D], the others [D] or [B, D]. Raises ValueError if target and surrogate coincide.
    """
    origin = target.double()
    way = surrogate.double() - origin
    length = way.square().sum(-1)
    if bool((length <= 1e-12 * origin.square().sum(-1)).any()):
        raise ValueError("target and surrogate have the same features: a shift between them is not defined")
    return ((features.double() - origin) * way).sum(-1) / length


def _same_shape(before: Tensor, after: Tensor) -> None:
    if before.shape != after.shape or before.ndim != 4:
        raise ValueError(
            f"images must be two [B, C, H, W] of one shape, not {tuple(before.shape)} and {tuple(after.shape)}"
        )
