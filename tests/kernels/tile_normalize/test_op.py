"""The public operator tile_normalize: against the published transform; what it refuses, how it traces."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")

from wsi_rt.kernels.errors import KernelInputError  # noqa: E402
from wsi_rt.kernels.tile_normalize import tile_normalize  # noqa: E402
from wsi_rt.kernels.tile_normalize.library import tile_normalize_op  # noqa: E402

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TILES = torch.randint(0, 256, (2, 256, 256, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def normalized(tiles=TILES, mean=MEAN, std=STD, crop=224, **more):
    return tile_normalize(tiles, mean, std, crop, **more)


def test_equals_the_transform_of_the_tile_encoder():
    """timm's evaluation transform for this network, on one tile as an image file decodes to."""
    timm_data = pytest.importorskip("timm.data", reason="timm is not installed")
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    transform = timm_data.create_transform(
        (3, 224, 224), interpolation="bicubic", crop_pct=224 / 256, crop_mode="center", mean=MEAN, std=STD
    )
    expected = transform(image.fromarray(TILES[0].numpy()))
    assert (normalized()[0] - expected).abs().max() <= 1e-6


def test_both_layouts_and_tiles_cropped_before_agree():
    chw = TILES.permute(0, 3, 1, 2).contiguous()
    cropped = TILES[:, 16:240, 16:240].contiguous()
    ours = normalized()
    assert ours.shape == (2, 3, 224, 224)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, normalized(chw))
    assert torch.equal(ours, normalized(cropped))
    assert torch.equal(ours.half(), normalized(dtype=torch.float16))


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        (r"tiles are torch.float32, expected torch.uint8", {"tiles": TILES.float()}),
        (r"tiles are \[0, 256, 256, 3\], expected \[B >= 1", {"tiles": TILES[:0]}),
        (r"tiles are \[256, 256, 3\], expected \[B >= 1", {"tiles": TILES[0]}),
        (r"tiles are \[2, 256, 256, 4\], expected", {"tiles": torch.zeros(2, 256, 256, 4, dtype=torch.uint8)}),
        (r"tiles are \[2, 256, 250, 3\], expected", {"tiles": TILES[:, :, :250].contiguous()}),
        (r"tiles are \[1, 3, 3, 3\], expected", {"tiles": torch.zeros(1, 3, 3, 3, dtype=torch.uint8), "crop": 3}),
        (
            r"tiles are 240 px, expected 256 px .*does not resample.* or 224 px",
            {"tiles": TILES[:, :240, :240].contiguous()},
        ),
        (r"tiles are 256 px, expected 512 px", {"resize": 512}),
        (r"tiles are 256 px, expected 256 px .* or 300 px", {"crop": 300}),
        (r"expected contiguous memory", {"tiles": TILES[:, :224, :224]}),
        (r"mean \[0.5\], std .*, expected three numbers each", {"mean": (0.5,)}),
        (r"mean holds nan, expected finite numbers", {"mean": (0.5, float("nan"), 0.5)}),
        (r"std holds inf, expected finite numbers", {"std": (0.2, float("inf"), 0.2)}),
        (r"every std above 0", {"std": (0.2, 0.0, 0.2)}),
        (r"dtype is torch.uint8, expected", {"dtype": torch.uint8}),
    ],
)
def test_refuses(message, changed):
    with pytest.raises(KernelInputError, match=message):
        normalized(**changed)


@pytest.mark.parametrize(
    "tiles", [TILES[:, :16, :16].contiguous(), torch.zeros(2, 3, 16, 16, dtype=torch.uint8)], ids=["hwc", "chw"]
)
def test_is_a_well_formed_operator(tiles):
    torch.library.opcheck(tile_normalize_op, (tiles, list(MEAN), list(STD), 12, torch.bfloat16))


def test_exports_with_any_number_of_tiles():
    class Prepare(torch.nn.Module):
        def forward(self, x):
            return tile_normalize(x, MEAN, STD, 224)

    program = torch.export.export(Prepare(), (TILES,), dynamic_shapes=({0: torch.export.Dim("tiles", min=2)},))
    assert "wsi_rt.tile_normalize" in str(program.graph)
    more = TILES.flip(0).repeat(2, 1, 1, 1)
    assert torch.equal(program.module()(more), normalized(more))
