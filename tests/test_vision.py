"""Vision towers: golden features, geometry, and files that do not fit."""
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers_golden import EXECUTORS
from helpers_vision import (
    FAMILIES, N_TEXT, PEER_CASES, Maker, blocks, load_seen, picture, worst)
from tinychat.errors import ModelFileError
from tinychat.gguf_file import open_gguf
from tinychat.models import build_program
from tinychat.models.vision import encoder as encoder_module
from tinychat.models.vision import KNOWN, VisionEncoder, projector_of
from tinychat.models.vision.pixels import (MAX_SQUARE, Tile, fitted_size, padded_square, patches,
                                           windows)
from tinychat.models.weights import Weights
from tinychat.ops import open_executor
from tinychat.ops.batch import Batch

GOLDEN_FOLDER = Path(__file__).parent / "golden"
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
    assert encoder.count(*seen.image.shape[:2]) == len(block.rows)
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


def layout_of(path, size):
    """Texts as they are, tiles as their (box, sizes)."""
    return [part if isinstance(part, str) else (part.box, part.sizes)
            for part in open_encoder(path, N_TEXT)._tower.layout(*size)]


def test_idefics3_sees_tiles_row_by_row_and_then_the_whole(tmp_path):
    Maker(tmp_path / "m.gguf", "idefics3", metadata={"clip.vision.preproc_image_size": 64})
    sizes = ((64, 32), (64, 32))
    assert layout_of(tmp_path / "m.gguf", (200, 100)) == [
        "<fake_token_around_image><row_1_col_1>", ((0, 0, 32, 32), sizes),
        "\n<fake_token_around_image><row_2_col_1>", ((32, 0, 64, 32), sizes),
        "\n\n<fake_token_around_image><global-img>", (None, (*sizes, (32, 32))),
        "<fake_token_around_image>"]


def test_idefics3_sees_a_picture_of_one_tile_once(tmp_path):
    Maker(tmp_path / "m.gguf", "idefics3", metadata={"clip.vision.preproc_image_size": 32})
    assert layout_of(tmp_path / "m.gguf", (20, 30)) == [
        "<fake_token_around_image><global-img>", (None, ((22, 32), (32, 32))),
        "<fake_token_around_image>"]


@pytest.mark.parametrize("size, n_rows, n_columns", [
    ((32, 32), 1, 1), ((320, 320), 3, 3), ((100, 200), 2, 4), ((10, 1000), 1, 12),
    ((30, 60), 1, 2), ((1000, 750), 4, 3)])
def test_internvl_takes_the_tiling_nearest_to_the_pictures_shape(tmp_path, size, n_rows, n_columns):
    Maker(tmp_path / "m.gguf", "internvl")
    found = layout_of(tmp_path / "m.gguf", size)
    tiles = [part for part in found if not isinstance(part, str) and part[0]]
    whole = [part for part in found if not isinstance(part, str) and not part[0]]
    assert len(tiles) == n_rows * n_columns and tiles[-1][1] == ((n_rows * 32, n_columns * 32),)
    assert whole == [(None, ((32, 32),))] * (len(tiles) > 1)


def test_llava_sees_the_picture_in_a_square_of_the_mean_colour(tmp_path):
    Maker(tmp_path / "m.gguf", "mlp")
    low = picture(16, 32)
    square = np.full((32, 32, 3), (122, 116, 104), np.uint8)
    square[8:24] = low
    assert np.array_equal(encoded(tmp_path / "m.gguf", low), encoded(tmp_path / "m.gguf", square))


@pytest.mark.parametrize("turn", [False, True])
def test_the_square_round_a_long_strip_stays_small(turn):
    strip = np.zeros((3, 4 * MAX_SQUARE, 3), np.uint8)
    square = padded_square(strip.swapaxes(0, 1) if turn else strip, (255, 255, 255))
    assert square.shape == (MAX_SQUARE, MAX_SQUARE, 3)
    line = square[:, 0, 0] if not turn else square[0, :, 0]
    assert np.flatnonzero(line == 0).tolist() == [MAX_SQUARE // 2 - 1]


def test_pixtral_never_enlarges_and_breaks_between_rows(tmp_path):
    Maker(tmp_path / "m.gguf", "pixtral")
    encoder = open_encoder(tmp_path / "m.gguf", N_TEXT)
    (block,) = blocks(encoder.encode(picture(20, 30)))  # 3 rows of 4 patches
    breaks = block.rows[[4, 9]]
    assert len(block.rows) == encoder.count(20, 30) == 3 * 4 + 2
    assert np.array_equal(breaks[0], breaks[1])
    assert encoder.count(1500, 3000) == 4 * 8 + 3


def test_pixels_behind_the_last_whole_patch_are_not_seen(tmp_path):
    Maker(tmp_path / "m.gguf", "idefics3", metadata={"clip.vision.image_size": 36})
    one = picture(36, 36)
    other = one.copy()
    other[32:] = other[:, 32:] = 0
    assert np.array_equal(encoded(tmp_path / "m.gguf", one), encoded(tmp_path / "m.gguf", other))


def test_each_image_is_encoded_by_itself(tmp_path):
    """Nothing of an image is left for the next one, whatever their sizes."""
    Maker(tmp_path / "m.gguf", "qwen2vl_merger")
    encoder = open_encoder(tmp_path / "m.gguf", N_TEXT)
    alone = blocks(encoder.encode(picture(64, 64)))[0].rows
    encoder.encode(picture(96, 160))
    assert np.array_equal(blocks(encoder.encode(picture(64, 64)))[0].rows, alone)


def test_a_report_that_raises_stops_the_encoding(tmp_path):
    Maker(tmp_path / "m.gguf", "internvl")
    told = []

    def report(part):
        told.append(part)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        open_encoder(tmp_path / "m.gguf", N_TEXT).encode(picture(100, 100), report)
    assert len(told) == 1 and 0 < told[0] < 0.2


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
    (dict(metadata={"clip.has_vision_encoder": [1, 2]}), "no vision tower"),
    (dict(drop=("v.blk.1.attn_k.weight",)), "'v.blk.1.attn_k.weight' is missing"),
    (dict(drop=("v.patch_embd.weight",)), "'v.patch_embd.weight' is missing"),
    (dict(drop=("mm.model.fc.weight",)), "'mm.model.fc.weight' is missing"),
    (dict(change={"v.position_embd.weight": (15, 32)}), "v.position_embd.weight.*expected shape"),
    (dict(change={"v.blk.0.ffn_down.weight": (32, 47)}), "v.blk.0.ffn_down.weight"),
    (dict(change={"mm.model.fc.weight": (41, 128)}), "makes 41 values a token, the model takes 64"),
    (dict(metadata={"clip.vision.image_size": 24}), "clip.vision.image_size"),
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


ODD_VALUES = (0, 1, 3, 7, 64, 8192, (1 << 32) - 1, 0.0, -1.0, float("nan"), "", "x", [], [1, 2, 3],
              [0.0, float("inf"), 1.0], True)
ODD_KEYS = ("clip.vision.image_size", "clip.vision.patch_size", "clip.vision.embedding_length",
            "clip.vision.block_count", "clip.vision.attention.head_count",
            "clip.vision.attention.head_dim", "clip.vision.attention.layer_norm_epsilon",
            "clip.vision.image_mean", "clip.vision.image_std", "clip.use_gelu", "clip.use_silu",
            "clip.vision.projector.scale_factor", "clip.vision.spatial_merge_size",
            "clip.vision.n_wa_pattern", "clip.vision.window_size", "clip.vision.feature_layer",
            "clip.vision.preproc_image_size", "clip.vision.preproc_min_tiles",
            "clip.vision.preproc_max_tiles")


@pytest.mark.parametrize("family", [*FAMILIES, "qwen2.5vl_merger"])
def test_odd_metadata_is_refused_or_makes_a_tower_that_works(tmp_path, family):
    made_as = family.replace("2.5", "2")
    Maker(tmp_path / "m.gguf", made_as)
    n_refused = 0
    with open_gguf(tmp_path / "m.gguf") as file:
        file.metadata["clip.projector_type"] = family
        for key in ODD_KEYS:
            for value in ODD_VALUES:
                metadata = {**file.metadata, key: value}
                try:
                    encoder = VisionEncoder(replace(file, metadata=metadata), n_embd=N_TEXT,
                                            kind="reference")
                except ModelFileError as error:
                    n_refused += 1
                    assert "\n" not in str(error)
                    continue
                (rows, *_) = blocks(encoder.encode(picture(40, 56)))
                assert rows.rows.shape[1] == N_TEXT
    assert n_refused > 100


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tensor_that_is_missing_or_misshapen_is_named(tmp_path, family):
    """But for those whose presence is a flag."""
    Maker(tmp_path / "m.gguf", family)
    with open_gguf(tmp_path / "m.gguf") as file:
        for name, tensor in file.tensors.items():
            others = {key: value for key, value in file.tensors.items() if key != name}
            wrong = {**others, name: replace(tensor, shape=(*tensor.shape[:-1], 0),
                                             data=tensor.data[:0])}
            with pytest.raises(ModelFileError, match=re.escape(name.removesuffix(".weight"))):
                VisionEncoder(replace(file, tensors=wrong), n_embd=N_TEXT, kind="reference")
            try:
                VisionEncoder(replace(file, tensors=others), n_embd=N_TEXT, kind="reference")
            except ModelFileError as error:
                assert "\n" not in str(error)


# With the text model

@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("name", GOLDEN)
def test_logits_of_a_golden_prompt_with_its_image_agree(name, kind):
    seen = load_seen(name)
    with open_gguf(seen.model) as file:
        program = build_program(file, sees=True)
    encoder = open_encoder(seen.mmproj, seen.data["image_embeds"].shape[2], kind)
    image = encoder.encode(seen.image)
    (block,) = blocks(image)
    tokens, first = seen.data["tokens"], int(seen.data["image_first"])
    n, at = len(tokens), np.arange(len(tokens), dtype=np.int32)
    rows, spans = np.full(n, -1, np.int32), np.repeat(at[:, None, None], 2, 2)
    rows[first:first + len(block.rows)] = np.arange(len(block.rows))
    if image.both_ways:
        spans[rows >= 0] = first, first + len(block.rows) - 1
    axes = None
    if program.n_axes:
        axes = np.repeat(at[:, None], 3, 1)
        axes[rows >= 0] = first + block.axes
        axes[first + len(block.rows):] += block.n_positions - len(block.rows)
        axes = np.ascontiguousarray(axes[:, :program.n_axes], np.int32)
    pages = np.arange(4, dtype=np.int32)[None]
    name, _, isa = kind.partition(" ")
    executor = open_executor(program, kind=name, isa=isa or None, kv_type="f32", n_pages=4,
                             max_tokens=128, max_outputs=128, max_sequences=1)
    logits = executor.step(Batch(tokens.astype(np.int32), at, np.zeros(n, np.int32), pages, at,
                                 inputs=block.rows, input_rows=rows, axes=axes, spans=spans
                                 if program.n_spans else None))
    difference, cosine = worst(logits, seen.data["logits"])
    strict = kind == "reference"
    assert difference < (0.02 if strict else 0.1) and cosine > (0.9999 if strict else 0.999)


# Families without golden files

@pytest.mark.parametrize("kind", EXECUTORS)
@pytest.mark.parametrize("case", PEER_CASES)
def test_features_agree_with_those_of_llama_cpp(tmp_path, case, kind):
    """Those of random towers, recorded by make_vision_peer.py. It takes GELU from a table, and in
    its tanh form also where a model has the exact one."""
    made_as, how, size = PEER_CASES[case]
    Maker(tmp_path / "m.gguf", made_as, **how)
    found = encoded(tmp_path / "m.gguf", picture(*size), kind)
    with np.load(GOLDEN_FOLDER / "vision-peer.npz") as data:
        expected = data[case]
    if case == "mlp":  # it leaves out the first row all the same, which is a patch then
        found, expected = found[1:], expected[:-1]
    difference, cosine = worst(found, expected)
    assert difference < 0.02 and cosine > 0.9999


def encoded(path, pixels, kind="reference"):
    return np.concatenate([block.rows for block in
                           blocks(open_encoder(path, N_TEXT, kind).encode(pixels))])


def test_an_image_of_more_tokens_than_a_projectors_step_is_projected_whole(tmp_path):
    Maker(tmp_path / "m.gguf", "qwen2vl_merger")
    encoder = open_encoder(tmp_path / "m.gguf", N_TEXT)
    pixels = picture(320, 288)
    found = blocks(encoder.encode(pixels))[0].rows
    assert len(found) == 360 > encoder_module.PROJECTOR_ROWS
    tower, (see, _) = encoder._tower, encoder._stages
    hidden = tower.merge(see.run(tower.rows(pixels, (40, 36))), (40, 36))
    with open_gguf(tmp_path / "m.gguf") as file:
        whole = encoder_module.Stage(encoder_module.record(type(tower)(
            tower.config, Weights(file.tensors)), "again")[1], 512, kind="reference")
    assert np.allclose(whole.run(encoder_module.Rows(hidden)), found, atol=1e-4)
