"""An image at several sizes through a tower that takes one: tiles going in, pooled features coming out.

This is S2 (Shi et al. 2024, arXiv 2403.13043) as CuMo uses it. Shape letters: N images, R the tower's image side, n tiles
along a side, P patches along a side of a tile, D features.
"""

import torch
import torch.nn.functional as F


def resize_and_tile(pixel_values: torch.Tensor, scale: int) -> torch.Tensor:
    """Images [N, 3, R, R], bicubically enlarged `scale` times and cut into squares of the old size.

    Returns:
        [n * n * N, 3, R, R] with n = `scale`: the first tile (top left) of every image, then the second, row by row.
    """
    if scale == 1:
        return pixel_values
    side = pixel_values.shape[-1]
    # In float32 and without antialiasing, as the original resizes.
    enlarged = F.interpolate(pixel_values.float(), size=side * scale, mode="bicubic", align_corners=False)
    rows = enlarged.to(pixel_values.dtype).split(side, dim=2)
    return torch.cat([tile for row in rows for tile in row.split(side, dim=3)])


def merge_tiles(features: torch.Tensor, scale: int) -> torch.Tensor:
    """Features of tiles put together and averaged down to the grid of one tile: the inverse order of `resize_and_tile`.

    Args:
        features: [n * n * N, P * P, D], row by row within a tile.
        scale: n.

    Returns:
        [N, P * P, D].
    """
    if scale == 1:
        return features
    patches = round(features.shape[1] ** 0.5)
    grid = features.unflatten(1, (patches, patches)).unflatten(0, (scale, scale, -1))
    # [n, n, N, P, P, D]: tile row, tile column, image -> the image's rows and columns, D in front.
    whole = grid.permute(2, 5, 0, 3, 1, 4).flatten(4, 5).flatten(2, 3)
    pooled = F.interpolate(whole.float(), size=(patches, patches), mode="area").to(features.dtype)
    return pooled.flatten(2).transpose(1, 2)
