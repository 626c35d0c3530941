"""The tiny model: its recipe's parts as laws, and the shipped files against the bars that they were made for."""

import pytest
import torch
from tqdm import tqdm

from scenes.scene import caption, make_scene
from tests.commands.conftest import TINY
from tools.tiny_wan.clips import FIRST_TRAINING_SCENE, held_out_clips, psnr, scene_clips, to_video
from tools.tiny_wan.dit import Material, generate, train_dit
from tools.tiny_wan.stages import EXPERT_FOLDERS, TEXT_FILE, VAE_FILE, VARIANT, contexts
from tools.tiny_wan.vae_start import principal_start
from wan_ext.dit import WanDiT, init_weights
from wan_ext.flow import add_noise, velocity_target
from wan_ext.loading import load_dit
from wan_ext.text_encoder import load_text_encoder
from wan_ext.vae import WanVAE, build_vae, load_vae
from wan_ext.whole_vae import WholeClip


@pytest.fixture(scope="module")
def videos():
    return to_video(scene_clips(0, 2))


@pytest.fixture(scope="module")
def vae():
    return load_vae(TINY / VAE_FILE, VARIANT.vae)


@pytest.fixture(scope="module")
def text():
    return load_text_encoder(
        TINY / TEXT_FILE, VARIANT.text_encoder, tokenizer=None, text_len=VARIANT.dit.text_len, dtype=torch.float32
    )


# --- the autoencoder's recipe ----------------------------------------------------------------------------------------


def test_a_whole_clip_at_once_equals_the_chunks(vae, videos):
    whole = WholeClip(vae.network)
    with torch.no_grad():
        latents = whole.encode(videos[:1])
        torch.testing.assert_close(latents, vae.encode(videos[:1]), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(whole.decode(latents).clamp(-1, 1), vae.decode(latents), atol=1e-4, rtol=1e-4)


def test_the_start_encodes_principal_components(videos):
    """A linear map from the start's latents recovers a clip nearly as well as 16 components found directly."""
    network = build_vae(VARIANT.vae)
    principal_start(network, videos, torch.Generator().manual_seed(0))
    vae = WanVAE(network, VARIANT.vae)
    latents = vae.encode(videos)[:, :, 1:].permute(0, 2, 3, 4, 1).reshape(-1, 16)
    blocks = videos[:, :, 1:].unflatten(2, (4, 4)).unflatten(4, (8, 8)).unflatten(6, (12, 8))
    blocks = blocks.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(len(latents), -1)
    known = torch.cat([latents, torch.ones(len(latents), 1)], dim=1)
    error = (known @ torch.linalg.lstsq(known, blocks).solution - blocks).square().mean()
    best = torch.linalg.svdvals(blocks - blocks.mean(0))[16:].square().sum() / blocks.numel()
    assert best <= error * (1 + 1e-4)
    assert error < 1.05 * best


def test_the_start_gives_a_still_clip_the_same_latents_in_every_frame(videos):
    network = build_vae(VARIANT.vae)
    principal_start(network, videos, torch.Generator().manual_seed(0))
    still = videos[:1, :, :1].expand(-1, -1, 9, -1, -1)
    latents = WanVAE(network, VARIANT.vae).encode(still)
    torch.testing.assert_close(latents, latents[:, :, :1].expand_as(latents), atol=2e-3, rtol=0)


# --- the experts' recipe ---------------------------------------------------------------------------------------------


def material() -> Material:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 16, 2, 2, 2, generator=generator)
    return Material(
        latents=latents, context=torch.randn(4, 48, 64, generator=generator), empty_context=torch.zeros(48, 64)
    )


def test_interrupted_training_equals_uninterrupted(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.tiny_wan.dit.SAVE_EVERY", 2)
    common = {"expert": None, "start": None, "steps": 4, "batch_size": 2, "learning_rate": 1e-3, "seed": 0}
    whole = train_dit(VARIANT, material(), tmp_path / "whole.pt", **common)

    class Interrupted(tqdm):
        def write(self, text):  # said after a checkpoint
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("tools.tiny_wan.dit.tqdm", Interrupted)
        train_dit(VARIANT, material(), tmp_path / "cut.pt", **common)
    assert torch.load(tmp_path / "cut.pt", weights_only=True)["step"] == 2
    resumed = train_dit(VARIANT, material(), tmp_path / "cut.pt", **common)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_generation_asks_each_expert_on_its_own_side_of_the_boundary():
    asked: dict[str, list[float]] = {"high": [], "low": []}

    class Recorder(WanDiT):
        def __init__(self, name):
            super().__init__(VARIANT.dit)
            init_weights(self, torch.Generator().manual_seed(0))
            self.name = name

        def forward(self, noised, *, timestep, context, condition=None):
            asked[self.name].append(float(timestep[0]))
            return torch.zeros_like(noised)

    experts = {name: Recorder(name) for name in asked}
    empty = torch.zeros(48, 64)
    latents = generate(VARIANT, experts, torch.zeros(2, 48, 64), empty, shape=(16, 2, 2, 2), seed=0)
    assert latents.shape == (2, 16, 2, 2, 2)
    assert min(asked["high"]) >= 1000 * VARIANT.boundary > max(asked["low"])
    assert len(asked["high"]) + len(asked["low"]) == VARIANT.steps


# --- the shipped files -----------------------------------------------------------------------------------------------


def test_all_files_together_are_small():
    assert sum(file.stat().st_size for file in TINY.rglob("*") if file.is_file()) <= 20e6


def test_the_autoencoder_reconstructs_rooms_it_never_saw(vae):
    videos = to_video(held_out_clips(3)[0])
    assert videos.shape[1:] == (3, VARIANT.num_frames, VARIANT.height, VARIANT.width)
    assert FIRST_TRAINING_SCENE > 3
    assert psnr(vae.decode(vae.encode(videos)), videos).mean() >= 24


def test_latents_need_no_normalisation(vae):
    latents = vae.encode(to_video(held_out_clips(3)[0]))
    assert latents.mean().abs() < 0.2
    assert 0.8 < latents.square().mean().sqrt() < 1.25


def test_every_caption_fits_and_has_no_unknown_word(text):
    captions = [caption(make_scene(seed)) for seed in range(200)]
    for line in captions:
        ids = text.tokenizer(line, max_length=10_000)
        assert len(ids) <= VARIANT.dit.text_len
        assert all(token == 1 or token > 258 for token in ids), line  # neither unknown nor a byte
    assert max(text.tokenizer(captions[0], max_length=10_000)) < VARIANT.text_encoder.vocab_size


def test_a_word_knows_its_neighbours(text):
    """The same word in another place has another context, so that "red" belongs to its ball."""
    one, other = text.encode(["a red ball and a blue box.", "a blue ball and a red box."])
    assert (one[1] - other[5]).norm() > 0.2 * one[1].norm()


@pytest.mark.parametrize("expert", list(EXPERT_FOLDERS))
def test_an_expert_predicts_better_with_the_caption_of_the_clip(vae, text, expert):
    """On rooms that it never saw: far below the error of predicting nothing, and lowest with the right caption."""
    clips, captions = held_out_clips(8)
    latents = vae.encode(to_video(clips))
    context, _ = contexts(text, captions)
    dit = load_dit(TINY / EXPERT_FOLDERS[expert], VARIANT, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator)
    sigma = torch.full((len(latents),), 0.9 if expert == "high" else 0.6)
    target = velocity_target(latents, noise)

    def error(context):
        with torch.no_grad():
            velocity = dit(add_noise(latents, noise, sigma), timestep=1000 * sigma, context=context)
        return (velocity - target).square().mean()

    right, wrong = error(context), error(context.roll(1, 0))
    assert right < 0.6 * target.square().mean()
    assert right < wrong
