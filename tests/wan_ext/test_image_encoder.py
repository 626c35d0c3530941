"""Laws of the image encoder: parity with an independent ViT, one encoder in every file, frames squashed whole."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from core.errors import InputError
from wan_ext.configs import CLIP_VIT_H, ImageEncoderConfig
from wan_ext.image_encoder import MEAN, STD, build_image_encoder, load_image_encoder, preprocess

TINY = ImageEncoderConfig(dim=32, ffn_dim=48, num_layers=3, num_heads=4, patch_size=4, image_size=16)


def native_weights(config: ImageEncoderConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the names of the published open-clip XLM-R file, its text half included."""
    generator = torch.Generator().manual_seed(seed)
    dim, num_positions = config.dim, (config.image_size // config.patch_size) ** 2 + 1
    shapes = {
        "visual.cls_embedding": (1, 1, dim),
        "visual.pos_embedding": (1, num_positions, dim),
        "visual.patch_embedding.weight": (dim, 3, config.patch_size, config.patch_size),
        "visual.head": (dim, 24),
        "log_scale": (),
        "textual.token_embedding.weight": (5, 7),
    }
    for norm in ("pre_norm", "post_norm"):
        shapes |= {f"visual.{norm}.weight": (dim,), f"visual.{norm}.bias": (dim,)}
    for i in range(config.num_layers):
        layers = {"attn.to_qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
        layers |= {"mlp.0": (config.ffn_dim, dim), "mlp.2": (dim, config.ffn_dim), "norm1": (dim,), "norm2": (dim,)}
        for name, shape in layers.items():
            shapes[f"visual.transformer.{i}.{name}.weight"] = shape
            shapes[f"visual.transformer.{i}.{name}.bias"] = shape[:1]
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def penultimate(weights: dict[str, Tensor], pixels: Tensor, config: ImageEncoderConfig) -> Tensor:
    """A ViT written out from its equations, stopped one layer early. pixels [B, 3, S, S] -> [B, tokens, D]"""
    w = {name.removeprefix("visual."): tensor for name, tensor in weights.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (config.dim,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    patches = F.conv2d(pixels, w["patch_embedding.weight"], stride=config.patch_size).flatten(2).mT  # [B, n, D]
    x = torch.cat((w["cls_embedding"].expand(len(pixels), 1, -1), patches), dim=1) + w["pos_embedding"]
    x = norm(x, "pre_norm")
    for i in range(config.num_layers - 1):
        layer = f"transformer.{i}"
        qkv = linear(norm(x, f"{layer}.norm1"), f"{layer}.attn.to_qkv").chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (config.num_heads, -1)).transpose(1, 2) for t in qkv)  # [B, N, L, d]
        scores = (q @ k.mT) / q.shape[-1] ** 0.5
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(attended, f"{layer}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{layer}.norm2"), f"{layer}.mlp.0")), f"{layer}.mlp.2")
    return x


@pytest.fixture
def native(tmp_path):
    weights = native_weights(TINY)
    torch.save(weights, tmp_path / "clip.pth")
    return weights, tmp_path / "clip.pth"


def test_agrees_with_an_independent_vit(native):
    weights, path = native
    torch.manual_seed(1)
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    expected = penultimate(weights, (image / 2 + 0.5 - mean) / std, TINY)
    found = load_image_encoder(path, TINY).encode(image)
    assert found.shape == (2, 17, 32)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_every_format_is_the_same_encoder(native, tmp_path):
    _, path = native
    reference = load_image_encoder(path, TINY)
    image = torch.linspace(-1, 1, 3 * 9 * 20).view(1, 3, 9, 20)
    names = {f"vision_model.{n.removeprefix('vision_model.')}": t for n, t in reference.network.state_dict().items()}
    save_file({**names, "visual_projection.weight": torch.zeros(2, 2)}, tmp_path / "clip_vision_h.safetensors")
    (tmp_path / "image_encoder").mkdir()
    save_file(
        {n.removeprefix("vision_model."): t.clone() for n, t in names.items()},
        tmp_path / "image_encoder" / "model.safetensors",
    )
    for other in (tmp_path / "clip_vision_h.safetensors", tmp_path / "image_encoder"):
        assert torch.equal(load_image_encoder(other, TINY).encode(image), reference.encode(image))


def test_parts_of_a_packed_tensor_do_not_keep_it_alive(native):
    parameters = list(load_image_encoder(native[1], TINY).network.parameters())
    assert sum(p.untyped_storage().nbytes() for p in parameters) == sum(p.nbytes for p in parameters)


def test_frames_are_squashed_not_cropped():
    flat = torch.zeros(1, 3, 16, 64)
    flat[..., :8] = 1  # a bar on the left edge, which a centre crop would lose
    pixels = preprocess(flat, 16)
    assert pixels.shape == (1, 3, 16, 16)
    assert pixels[0, 0, 8, 0] > pixels[0, 0, 8, 8] + 1


def test_the_real_tower_has_257_tokens_of_1280():
    with torch.device("meta"):
        network = build_image_encoder(CLIP_VIT_H)
    assert abs(sum(p.numel() for p in network.parameters()) - 630.8e6) < 1e5
    shapes = {name.rpartition("position_embedding")[1]: tuple(p.shape) for name, p in network.named_parameters()}
    assert shapes["position_embedding"] == (257, 1280)


def test_another_model_and_missing_tensors_are_refused(native, tmp_path):
    weights, path = native
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="expected a CLIP image encoder"):
        load_image_encoder(tmp_path / "other.safetensors", TINY)
    del weights["visual.transformer.0.attn.to_qkv.bias"]
    torch.save(weights, path)
    with pytest.raises(InputError, match=r"1 tensors missing \(visual\.transformer\.0\.attn\.to_qkv\.bias\)"):
        load_image_encoder(path, TINY)
