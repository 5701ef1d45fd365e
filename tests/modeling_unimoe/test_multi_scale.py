"""Tiles of an enlarged image, and their features put together again."""

import pytest
import torch

from unimoe.modeling_unimoe.multi_scale import merge_tiles, resize_and_tile


def test_first_scale_is_the_image_itself():
    images = torch.randn(2, 3, 8, 8)
    assert resize_and_tile(images, 1) is images
    features = torch.randn(2, 16, 5)
    assert merge_tiles(features, 1) is features


@pytest.mark.parametrize("scale", [2, 3])
def test_tiles_lie_row_by_row_with_the_images_inside(scale):
    images = torch.randn(2, 3, 8, 8)
    whole = torch.nn.functional.interpolate(images, size=8 * scale, mode="bicubic", align_corners=False)
    tiles = resize_and_tile(images, scale)
    assert tiles.shape == (scale * scale * 2, 3, 8, 8)
    for row in range(scale):
        for column in range(scale):
            expected = whole[:, :, 8 * row : 8 * (row + 1), 8 * column : 8 * (column + 1)]
            start = 2 * (row * scale + column)
            torch.testing.assert_close(tiles[start : start + 2], expected)


@pytest.mark.parametrize("scale", [2, 3])
def test_merged_features_are_means_over_squares(scale):
    """A feature that is its own place in the whole grid comes back as the mean of the places in its square."""
    patches, images = 4, 2
    side = scale * patches
    places = torch.arange(images * side * side, dtype=torch.float32).reshape(images, 1, side, side)
    tiles = torch.cat([part for row in places.split(patches, dim=2) for part in row.split(patches, dim=3)])
    merged = merge_tiles(tiles.flatten(2).transpose(1, 2), scale)
    expected = torch.nn.functional.avg_pool2d(places, scale).flatten(2).transpose(1, 2)
    torch.testing.assert_close(merged, expected)
