"""Vision towers: golden features, geometry, and files that do not fit."""
import numpy as np
import pytest

from helpers_golden import EXECUTORS
from helpers_vision import N_TEXT, Maker, blocks, load_seen, worst
from tinychat.errors import ModelFileError
from tinychat.gguf_file import open_gguf
from tinychat.models.vision import KNOWN, VisionEncoder, projector_of
from tinychat.models.vision.pixels import Tile, fitted_size, patches, windows

GOLDEN = ("qwen3vl-a", "qwen2.5vl-a", "gemma3-vision-a")


def open_encoder(path, n_embd, kind="reference"):
    name, _, isa = kind.partition(" ")
    if isa:
        native = pytest.importorskip("tinychat.ops.native", exc_type=ImportError)
        if isa not in native.isa_levels():
            pytest.skip(f"this machine has no {isa}")
    with open_gguf(path) as file:
        return VisionEncoder(file, n_embd=n_embd, kind=name, isa=isa or None, threads=2)


@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("name", GOLDEN)
def test_features_of_a_golden_image_agree(name, kind):
    seen = load_seen(name)
    encoder = open_encoder(seen.mmproj, seen.data["image_embeds"].shape[2], kind)
    told = []
    image = encoder.encode(seen.image, told.append)
    (block,) = blocks(image)
    difference, cosine = worst(block.rows, seen.embeds)
    assert difference < 0.001 and cosine > 0.9999
    assert encoder.width == seen.embeds.shape[1]
    assert encoder.count(*seen.image.shape[1::-1]) == len(block.rows)
    assert told == sorted(told) and told[-1] == 1.0
    encoder.close()


@pytest.mark.parametrize("name", GOLDEN)
def test_pixels_of_a_golden_image_agree(name):
    seen = load_seen(name)
    encoder = open_encoder(seen.mmproj, seen.data["image_embeds"].shape[2])
    tower = encoder._tower
    found = patches(seen.image, tower.config.patch_size, tower.config.mean, tower.config.std)
    expected = seen.data["in_pixel_values"]
    if name.startswith("qwen"):  # both moments of it, patches in squares of 2 x 2
        grid = seen.data["in_image_grid_thw"][0][1:]
        found = windows(found, tuple(grid), 2).reshape(found.shape)
        found = np.repeat(found.reshape(len(found), 3, 1, -1), 2, 2)
    else:
        side, patch = tower.config.image_size // tower.config.patch_size, tower.config.patch_size
        found = found.reshape(side, side, 3, patch, patch).transpose(2, 0, 3, 1, 4)
    assert np.abs(found.reshape(expected.shape) - expected).max() < 1e-5


@pytest.mark.parametrize("name, n_positions", [("qwen3vl-a", 4), ("qwen2.5vl-a", 6)])
def test_tokens_turn_by_row_and_column(name, n_positions):
    seen = load_seen(name)
    (block,) = blocks(open_encoder(seen.mmproj, 64).encode(seen.image))
    at, count = seen.data["image_first"], seen.data["image_count"]
    expected = seen.data["position_ids"][:, at:at + count].T
    assert np.array_equal(block.axes, expected - expected.min(0))
    assert block.n_positions == n_positions
    after = seen.data["position_ids"][:, at + count]
    assert (after == expected.min() + n_positions).all()


# Sizes

@pytest.mark.parametrize("height, width, expected", [
    (100, 100, (112, 112)),     # to the nearest multiple
    (350, 70, (336, 56)),       # halves go to the even one
    (1000, 500, (784, 392)),    # shrunk, downwards
    (10, 10, (84, 84)),         # grown, upwards
    (1, 4000, (28, 4004)),      # narrow
    (1, 40000, (28, 11760)),    # and no larger than what is taken
])
def test_sizes_that_fit_are_those_of_the_image_processor(height, width, expected):
    assert fitted_size(height, width, 28, 6 * 784, 420 * 784) == expected


@pytest.mark.parametrize("size", [(1, 1), (1, 30_000), (30_000, 1), (8000, 8000), (17, 2311)])
def test_any_size_becomes_whole_tokens_within_the_limit(size):
    for name in GOLDEN:
        tower = open_encoder(load_seen(name).mmproj, 64)._tower
        for tile in (part for part in tower.layout(*size) if isinstance(part, Tile)):
            height, width = tower.grid(tile)
            assert height % tower.n_merge == width % tower.n_merge == 0
            assert 1 <= height * width <= tower.max_rows


# Files

def test_a_projector_is_known_by_its_metadata():
    seen = load_seen("gemma3-vision-a")
    with open_gguf(seen.mmproj) as file:
        assert projector_of(file.metadata) == "gemma3" and "gemma3" in KNOWN
    with open_gguf(seen.model) as file:
        assert projector_of(file.metadata) is None


@pytest.mark.parametrize("how, says", [
    (dict(metadata={"clip.projector_type": "nonesuch"}), "'nonesuch' is not supported; known are"),
    (dict(metadata={"clip.has_vision_encoder": False}), "no vision tower"),
    (dict(drop=("v.blk.1.attn_k.weight",)), "'v.blk.1.attn_k.weight' is missing"),
    (dict(drop=("v.patch_embd.weight",)), "'v.patch_embd.weight' is missing"),
    (dict(drop=("mm.model.fc.weight",)), "'mm.model.fc.weight' is missing"),
    (dict(change={"v.position_embd.weight": (15, 32)}), "v.position_embd.weight.*expected shape"),
    (dict(change={"v.blk.0.ffn_down.weight": (32, 47)}), "v.blk.0.ffn_down.weight"),
    (dict(change={"mm.model.fc.weight": (41, 128)}), "makes 41 values a token, the model takes 40"),
    (dict(metadata={"clip.vision.image_size": 36}), "clip.vision.image_size"),
    (dict(metadata={"clip.vision.image_size": 8192}), "clip.vision.image_size"),
    (dict(metadata={"clip.vision.patch_size": 0}), "clip.vision.patch_size"),
    (dict(metadata={"clip.vision.attention.head_count": 5}), "clip.vision.embedding_length"),
    (dict(metadata={"clip.vision.image_mean": [0.5, 0.5]}), "clip.vision.image_mean"),
    (dict(metadata={"clip.vision.image_std": [0.5, 0.5, 0.0]}), "clip.vision.image_std"),
    (dict(metadata={"clip.vision.projector.scale_factor": 3}), "clip.vision.image_size"),
    (dict(metadata={"clip.vision.preproc_image_size": 4000}), "clip.vision.preproc_image_size"),
    (dict(metadata={"clip.vision.block_count": 2}), "no use for tensor 'v.blk.2"),
    (dict(metadata={"clip.vision.block_count": None}), "clip.vision.block_count is missing"),
])
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, how, says):
    Maker(tmp_path / "m.gguf", "idefics3", **how)
    with pytest.raises(ModelFileError, match=says):
        open_encoder(tmp_path / "m.gguf", N_TEXT)
