"""Cut, resize and flip all crops of many images at once, as two batched matrix products.

Pillow's antialiased filter, the box and the flips are all in the weights, so that nothing is cut
out or turned. Written for accelerators; it works on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Filter values and weights are whole multiples of these. In float32 their sums with pixels are
# then exact, whatever their order: padding, grouping and the library behind the product change
# no bit of a crop. Against unrounded weights a level moves by 0.01.
_FILTER_STEP, _WEIGHT_STEP = 2.0**-16, 2.0**-15


def padded_images(pixels: Tensor, starts: Tensor, sizes: Tensor, side: tuple[int, int]) -> Tensor:
    """Images of different sizes from one row of pixels, below and right of each anything at all.

    Args:
        pixels: uint8 [P, 3], the images' rows one behind the other.
        starts: int64 [n], the first pixel of each image.
        sizes: int64 [n, 2], heights and widths.
        side: height and width H, W of the result, at least those of every image.

    Returns:
        uint8 [n, 3, H, W], a view.
    """
    rows = torch.arange(side[0], device=pixels.device)[:, None]
    columns = torch.arange(side[1], device=pixels.device)
    places = starts[:, None, None] + rows * sizes[:, 1, None, None] + columns  # [n, H, W]
    places = places.clamp_(max=len(pixels) - 1).flatten()
    return pixels.index_select(0, places).view(len(sizes), *side, 3).permute(0, 3, 1, 2)


def resized_crops(
    images: Tensor,
    boxes: Tensor,
    flips: Tensor,
    size: tuple[int, int],
    interpolation: str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The crops of n images, S of each, along rows, then along columns, as Pillow before 13.

    Args:
        images: uint8 [n, 3, H, W].
        boxes: int64 [n, S, 4]: top, left, height, width in pixels, inside the image.
        flips: bool [n, S, 2]: left-right, upside down.
        size: height and width h, w of the crops in pixels.
        interpolation: "bicubic" or "bilinear".
        dtype: of the products. float32 is exact; half precision rounds weights and results.

    Returns:
        float32 [n * S, 3, h, w], whole levels 0..255; the crops of an image are neighbours.
    """
    count, num_crops = boxes.shape[:2]
    height, width = size
    top, left, box_height, box_width = boxes.unbind(-1)
    mirrored, upside_down = flips.unbind(-1)
    across, down = (
        filter_weights(*line, interpolation).to(dtype)
        for line in (
            (left, box_width, mirrored, width, images.shape[3]),
            (top, box_height, upside_down, height, images.shape[2]),
        )
    )  # [n, S, w, W], [n, S, h, H]
    lines = images.to(dtype).flatten(1, 2)  # [n, 3 * H, W]
    narrow = _levels(lines @ across.flatten(1, 2).mT)  # [n, 3 * H, S * w]
    narrow = narrow.to(dtype).view(count, 3, -1, num_crops, width).permute(0, 3, 2, 1, 4)
    narrow = narrow.reshape(count * num_crops, -1, 3 * width)  # [n * S, H, 3 * w]
    crops = _levels(down.flatten(0, 1) @ narrow)  # [n * S, h, 3 * w]
    return crops.view(-1, height, 3, width).transpose(1, 2).contiguous()


def filter_weights(
    begins: Tensor, lengths: Tensor, flipped: Tensor, size: int, image_size: int, interpolation: str
) -> Tensor:
    """How much of each pixel of an image's line is in each pixel of the resized piece of it.

    Args:
        begins: int64 [...], the first pixel of the piece.
        lengths: int64 [...], its pixels.
        flipped: bool [...], whether the result is turned round.
        size: pixels of the result.
        image_size: pixels of the whole line.
        interpolation: "bicubic" or "bilinear".

    Returns:
        float32 [..., size, image_size]. Rows sum to one; pixels outside of the piece have no part.
    """
    made = torch.arange(size, device=begins.device)
    made = torch.where(flipped[..., None], size - 1 - made, made)[..., None]  # [..., size, 1]
    seen = (torch.arange(image_size, device=begins.device) - begins[..., None])[..., None, :]
    lengths = lengths[..., None, None]
    # The distance of two pixels' centres in units that make it whole, so exact up to 2**24.
    distance = (2 * seen + 1).float() * size - ((2 * made + 1) * lengths).float()
    unit = 2 * lengths.clamp(min=size)  # a smaller result has a wider filter, which averages
    values = _FILTERS[interpolation](distance.abs_().div_(unit))  # [..., size, image_size]
    values = values.mul_((seen >= 0) & (seen < lengths)).div_(_FILTER_STEP).round_()
    total = values.sum(-1, keepdim=True)
    return values.div_(total).div_(_WEIGHT_STEP).round_().mul_(_WEIGHT_STEP)


def _bicubic(x: Tensor) -> Tensor:
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((x - 5) * x + 8) * x * -0.5 + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _bilinear(x: Tensor) -> Tensor:
    return (1 - x).clamp_(min=0)


_FILTERS = {"bicubic": _bicubic, "bilinear": _bilinear}


def _levels(sums: Tensor) -> Tensor:
    """Rounded and cut off as a byte is: float32, whole levels 0..255."""
    return sums.float().add_(0.5).floor_().clamp_(0, 255)
