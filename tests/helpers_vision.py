"""Vision towers for tests: the golden ones, and tiny random ones of the other families."""
from dataclasses import dataclass

import gguf
import numpy as np
import pytest

from helpers_golden import FOLDERS
from tinychat.models.vision import ImageBlock


@dataclass(frozen=True, eq=False)
class Seen:
    """image uint8 (h, w, 3), embeds float32 (n, width), the normalised pixels, and what else the
    npz has."""

    mmproj: object
    model: object
    data: dict

    @property
    def image(self):
        return self.data["image"]

    @property
    def embeds(self):
        return np.concatenate(list(self.data["image_embeds"]), 1)


def load_seen(name):
    for folder in FOLDERS:
        if (folder / f"{name}.mmproj.gguf").is_file():
            with np.load(folder / f"{name}.npz") as data:
                return Seen(folder / f"{name}.mmproj.gguf", folder / f"{name}.gguf", dict(data))
    pytest.skip(f"{name} is neither in tests/golden nor in the developers' shared folder")


def blocks(image):
    return [part for part in image.parts if isinstance(part, ImageBlock)]


def worst(found, expected):
    """(largest difference in units of their standard deviation, smallest cosine of a row)"""
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = (found.astype(np.float64) * expected).sum(1) / norms
    return np.abs(found - expected).max() / expected.std(), cosines.min()


def picture(height, width):
    """uint8 (height, width, 3): waves of several lengths."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x * 0.7) + np.cos(y * 0.3), np.sin(x * y * 0.01), np.cos(x * 0.2 - y)],
                     2)
    return ((waves / 4 + 0.5) * 255).astype(np.uint8)


# Random towers, as llama.cpp's converter writes them

N_EMBD, N_FF, N_TEXT = 32, 48, 64
FAMILIES = {
    "idefics3": dict(image_size=32, patch_size=8, merge=2, biases=True),
    "mlp": dict(image_size=32, patch_size=8, pre_ln=True, class_embd=True, biases=True),
    "internvl": dict(image_size=32, patch_size=8, merge=2, class_embd=True, biases=True, ls=True),
    "pixtral": dict(image_size=64, patch_size=8, biases=False),
    "qwen2vl_merger": dict(image_size=56, patch_size=8, biases=True, two_moments=True),
}


class Maker:
    """Writes the file; `drop` leaves tensors out, `change` gives others instead.

    class_last: the table of positions in the order that llama.cpp (of mid 2026) has the rows in: it
    appends the class row to the patches, where the models have it in front.
    """

    def __init__(self, path, kind, *, seed=1, n_layer=3, metadata=None, drop=(), change=None,
                 **how):
        self.rng = np.random.default_rng(seed)
        self.how = {"merge": 1, "pre_ln": False, "class_embd": False, "ls": False,
                    "two_moments": False, "class_last": False, **FAMILIES[kind], **how}
        self.drop, self.change, self.n_layer = drop, change or {}, n_layer
        self.writer = gguf.GGUFWriter(path, "clip")
        self._metadata(kind, metadata or {})
        self._tower()
        getattr(self, f"_{kind.removesuffix('_merger')}")()
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()

    def _metadata(self, kind, changed):
        how = self.how
        values = {"clip.has_vision_encoder": True, "clip.projector_type": kind,
                  "clip.vision.image_size": how["image_size"],
                  "clip.vision.patch_size": how["patch_size"],
                  "clip.vision.embedding_length": N_EMBD, "clip.vision.feed_forward_length": N_FF,
                  "clip.vision.block_count": self.n_layer, "clip.vision.projection_dim": N_TEXT,
                  "clip.vision.attention.head_count": 4,
                  "clip.vision.attention.layer_norm_epsilon": 1e-5,
                  "clip.vision.image_mean": [0.48, 0.45, 0.4],
                  "clip.vision.image_std": [0.27, 0.26, 0.28]}
        if kind == "pixtral":
            values["clip.use_silu"] = True
        elif kind != "mlp":
            values["clip.use_gelu"] = True
        if how["merge"] > 1:
            values["clip.vision.projector.scale_factor"] = how["merge"]
        for key, value in {**values, **changed}.items():
            if value is None:
                continue
            if isinstance(value, bool):
                self.writer.add_bool(key, value)
            elif isinstance(value, int):
                self.writer.add_uint32(key, value)
            elif isinstance(value, float):
                self.writer.add_float32(key, value)
            elif isinstance(value, str):
                self.writer.add_string(key, value)
            else:
                self.writer.add_array(key, value)

    def add(self, name, *shape, around=0.0, scale=None, dtype=np.float32):
        if name in self.drop:
            return
        if name in self.change:
            shape = self.change[name]
        scale = scale or 1.5 / np.sqrt(shape[-1] if len(shape) == 2 else 10)
        values = self.rng.normal(around, scale, shape)
        if name == "v.position_embd.weight" and self.how["class_last"] and self.how["class_embd"]:
            values = np.roll(values, -1, 0)
        self.writer.add_tensor(name, values.astype(dtype))

    def linear(self, name, n_out, n_in, bias=True):
        self.add(f"{name}.weight", n_out, n_in, dtype=np.float16)
        if bias:
            self.add(f"{name}.bias", n_out)

    def norm(self, name, n, bias=True):
        self.add(f"{name}.weight", n, around=1.0)
        if bias:
            self.add(f"{name}.bias", n)

    def _tower(self):
        how, patch = self.how, self.how["patch_size"]
        rope = how["image_size"] == 64 or how["two_moments"]
        for name in ("v.patch_embd.weight", "v.patch_embd.weight.1")[:1 + how["two_moments"]]:
            self.add(name, N_EMBD, 3, patch, patch, scale=0.1, dtype=np.float16)
        if how["biases"] and not how["class_embd"] and not rope:
            self.add("v.patch_embd.bias", N_EMBD)
        if how["class_embd"]:
            self.add("v.class_embd", N_EMBD)
        if not rope:
            side = how["image_size"] // patch
            self.add("v.position_embd.weight", side * side + how["class_embd"], N_EMBD)
        biases = how["biases"]
        if how["pre_ln"] or not biases:
            self.norm("v.pre_ln", N_EMBD, biases)
        for i in range(self.n_layer):
            at = f"v.blk.{i}"
            self.norm(f"{at}.ln1", N_EMBD, biases)
            self.norm(f"{at}.ln2", N_EMBD, biases)
            for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
                self.linear(f"{at}.{name}", N_EMBD, N_EMBD, biases)
            self.linear(f"{at}.ffn_up", N_FF, N_EMBD, biases)
            self.linear(f"{at}.ffn_down", N_EMBD, N_FF, biases)
            if not biases:
                self.linear(f"{at}.ffn_gate", N_FF, N_EMBD, biases)
            if how["ls"]:
                self.add(f"{at}.ls1.weight", N_EMBD, around=1.0)
                self.add(f"{at}.ls2.weight", N_EMBD, around=1.0)
        if biases and not how["class_embd"]:
            self.norm("v.post_ln", N_EMBD)

    def _idefics3(self):
        self.linear("mm.model.fc", N_TEXT, N_EMBD * self.how["merge"] ** 2, bias=False)

    def _mlp(self):
        self.linear("mm.0", N_TEXT, N_EMBD)
        self.linear("mm.2", N_TEXT, N_TEXT)

    def _internvl(self):
        width = N_EMBD * self.how["merge"] ** 2
        self.norm("mm.model.mlp.0", width)
        self.linear("mm.model.mlp.1", N_TEXT, width)
        self.linear("mm.model.mlp.3", N_TEXT, N_TEXT)

    def _pixtral(self):
        if self.how["merge"] > 1:
            self.norm("mm.input_norm", N_EMBD, bias=False)
            self.linear("mm.patch_merger", N_EMBD, N_EMBD * self.how["merge"] ** 2, bias=False)
        self.linear("mm.1", N_TEXT, N_EMBD, bias=False)
        self.linear("mm.2", N_TEXT, N_TEXT, bias=False)
        self.add("v.token_embd.img_break", N_TEXT)

    def _qwen2vl(self):
        self.linear("mm.0", 4 * N_EMBD, 4 * N_EMBD)
        self.linear("mm.2", N_TEXT, 4 * N_EMBD)


# What llama.cpp makes of some of them: (kind, how it is made, picture's height and width)
PEER_CASES = {
    "idefics3": ("idefics3", dict(metadata={"clip.vision.preproc_image_size": 128}), (70, 173)),
    "internvl": ("internvl", {}, (64, 64)),
    "mlp": ("mlp", dict(metadata={"clip.vision.feature_layer": [2]}), (32, 32)),
    "mlp without class": ("mlp", dict(metadata={"clip.vision.feature_layer": [2]},
                                      class_embd=False), (40, 40)),
    "pixtral": ("pixtral", {}, (64, 64)),
    "pixtral merged": ("pixtral", dict(metadata={"clip.vision.spatial_merge_size": 2}, merge=2),
                       (64, 64)),
    "qwen2vl": ("qwen2vl_merger", {}, (64, 96)),
}
