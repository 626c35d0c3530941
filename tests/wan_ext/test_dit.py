"""Laws of the DiT beside parity: how it is built, what may and what may not change its result, what it refuses."""

from dataclasses import replace

import pytest
import torch

from core.errors import InputError
from memory.runners import run_checkpointed, run_plain
from tests.wan_ext.models import CONFIGS, SMALL, lively_dit, random_inputs, stored_in
from wan_ext.condition import CameraCondition
from wan_ext.dit import WanDiT, init_weights, storage_dtype


@pytest.fixture(scope="module")
def dit():
    return lively_dit(SMALL).requires_grad_(False)


@pytest.fixture
def inputs():
    return random_inputs(SMALL)


def test_one_timestep_a_clip_equals_the_same_timestep_in_every_frame(dit, inputs):
    per_frame = inputs.timestep[:, None].expand(-1, inputs.noised.shape[2])
    once = dit(inputs.noised, **inputs.keywords())
    often = dit(inputs.noised, **(inputs.keywords() | {"timestep": per_frame}))
    torch.testing.assert_close(often, once, rtol=0, atol=1e-5)


@pytest.mark.parametrize("per_frame", [False, True])
def test_the_head_may_take_any_number_of_tokens_at_a_time(inputs, monkeypatch, per_frame):
    results = []
    for tokens in (10**6, 5, 1):
        monkeypatch.setattr("wan_ext.dit.HEAD_TOKENS", tokens)
        dit = lively_dit(SMALL)
        timestep = inputs.timestep[:, None] - torch.arange(3) if per_frame else inputs.timestep
        out = dit(inputs.noised, **(inputs.keywords() | {"timestep": timestep}))
        (out * inputs.weights).sum().backward()
        results.append([out.detach(), *(parameter.grad for parameter in dit.parameters())])
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_each_frame_gets_its_own_timestep(dit, inputs):
    per_frame = inputs.timestep[:, None].repeat(1, inputs.noised.shape[2])
    before = dit(inputs.noised, **(inputs.keywords() | {"timestep": per_frame}))
    per_frame[:, 1] = 0
    change = dit(inputs.noised, **(inputs.keywords() | {"timestep": per_frame})) - before
    assert change.abs().amax(dim=(0, 1, 3, 4)).argmax() == 1  # through attention the others change too, but less


def test_a_clip_does_not_see_the_rest_of_its_batch(dit, inputs):
    together = dit(inputs.noised, **inputs.keywords())
    for i in range(2):
        alone = dit(inputs.noised[i : i + 1], timestep=inputs.timestep[i : i + 1], context=inputs.context[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)


def test_text_is_padded_with_zeros_to_text_len(dit, inputs):
    padded = torch.nn.functional.pad(inputs.context, (0, 0, 0, SMALL.text_len - inputs.context.shape[1]))
    short = dit(inputs.noised, **inputs.keywords())
    assert torch.equal(short, dit(inputs.noised, **(inputs.keywords() | {"context": padded})))


@pytest.mark.parametrize("spread", [(1, 1), (2, 3)], ids=["one vector a frame", "one vector a token"])
def test_a_zero_camera_changes_no_bit_and_another_one_does(dit, inputs, spread):
    plain = dit(inputs.noised, **inputs.keywords())
    zeros = torch.zeros(2, 3, *spread, SMALL.dim)
    assert torch.equal(plain, dit(inputs.noised, **inputs.keywords(), camera=CameraCondition(tokens=zeros)))
    # Not a constant over the channels: the layer norms would remove it.
    camera = CameraCondition(tokens=torch.randn(zeros.shape, generator=torch.Generator().manual_seed(0)))
    moved = dit(inputs.noised, **inputs.keywords(), camera=camera)
    assert (moved - plain).abs().max() > 1e-2


def test_a_camera_vector_meets_the_token_of_its_frame_row_and_column(inputs):
    dit = lively_dit(replace(SMALL, num_layers=1)).requires_grad_(False)
    for parameter in (dit.blocks[0].self_attn.o.weight, dit.blocks[0].self_attn.o.bias):
        parameter.zero_()  # nothing travels from token to token
    tokens = torch.zeros(2, 3, 2, 3, SMALL.dim)
    tokens[1, 2, 1, 0] = 1
    change = dit(inputs.noised, **inputs.keywords(), camera=CameraCondition(tokens=tokens))
    change -= dit(inputs.noised, **inputs.keywords())
    changed = (change.abs().amax(dim=1) > 0).nonzero()  # [n, 4]: clip, frame, row, column of latents
    assert changed.unique(dim=0).tolist() == [[1, 2, row, column] for row in (2, 3) for column in (0, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_may_run_checkpointed(inputs, dtype):
    dit = stored_in(lively_dit(SMALL), dtype).requires_grad_(False)
    results = []
    for run_blocks in (run_plain, run_checkpointed):
        noised = inputs.noised.clone().requires_grad_()
        out = dit(noised, **inputs.keywords(), run_blocks=run_blocks)
        results.append((out.detach(), torch.autograd.grad((out * inputs.weights).sum(), noised)[0]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_result_and_residual_stream_are_float32_and_linears_are_not(inputs):
    dit = stored_in(lively_dit(SMALL), torch.bfloat16)
    seen = {}
    dit.blocks[1].register_forward_pre_hook(lambda module, args: seen.update(residual=args[0].dtype))
    dit.blocks[1].ffn[0].register_forward_hook(lambda module, args, out: seen.update(ffn=out.dtype))
    assert dit(inputs.noised, **inputs.keywords()).dtype == torch.float32
    assert seen == {"residual": torch.float32, "ffn": torch.bfloat16}
    assert dit.dtype == torch.bfloat16


def test_a_model_stored_wholly_in_bf16_runs_too(inputs):
    dit = lively_dit(SMALL)
    kept = stored_in(dit, torch.bfloat16)(inputs.noised, **inputs.keywords())
    whole = dit.to(torch.bfloat16)(inputs.noised, **inputs.keywords())
    assert (whole - kept).norm() < 0.02 * kept.norm()


def test_storage_keeps_float32_what_forward_uses_in_float32():
    names = [name for name, _ in lively_dit(CONFIGS["flf2v-14B with CLIP"]).named_parameters()]
    narrow = [name for name in names if storage_dtype(name, torch.bfloat16) == torch.bfloat16]
    assert all(name.endswith((".weight", ".bias")) and "norm" not in name for name in narrow)
    assert {name.split(".")[0] for name in narrow} == {"blocks", "text_embedding", "img_emb"}
    assert {"img_emb.proj.1.weight", "blocks.1.cross_attn.k_img.weight", "blocks.0.ffn.2.bias"} <= set(narrow)


def test_builds_on_the_meta_device_and_takes_tensors_by_assignment(inputs):
    source = lively_dit(SMALL)
    with torch.device("meta"):
        dit = WanDiT(SMALL)
    assert all(tensor.is_meta for tensor in dit.state_dict().values())
    dit.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(dit(inputs.noised, **inputs.keywords()), source(inputs.noised, **inputs.keywords()))


def test_parameter_names_are_those_of_the_official_checkpoints():
    # Shapes of the recorded official models are loaded strictly in test_dit_parity; here: the image branch.
    plain, clip = (set(WanDiT(CONFIGS[name]).state_dict()) for name in ("i2v-A14B", "i2v-14B with CLIP"))
    added = {f"img_emb.proj.{i}.{kind}" for i in (0, 1, 3, 4) for kind in ("weight", "bias")}
    for i in range(SMALL.num_layers):
        added |= {f"blocks.{i}.cross_attn.{name}.{kind}" for name in ("k_img", "v_img") for kind in ("weight", "bias")}
        added |= {f"blocks.{i}.cross_attn.norm_k_img.weight"}
    assert clip - plain == added
    assert plain <= clip


def test_training_from_scratch_starts_at_velocity_zero_and_can_leave_it(inputs):
    dit = WanDiT(SMALL)
    init_weights(dit, torch.Generator().manual_seed(3))
    out = dit(inputs.noised, **inputs.keywords())
    assert torch.equal(out, torch.zeros_like(out))
    (out * inputs.weights).sum().backward()
    assert dit.head.head.weight.grad.abs().max() > 0
    again = WanDiT(SMALL)
    init_weights(again, torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(dit.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noised": torch.zeros(2, 17, 3, 4, 6)}, "expected 16 channels"),
        ({"noised": torch.zeros(2, 16, 3, 5, 6)}, "multiples"),
        ({"timestep": torch.zeros(3)}, "timestep"),
        ({"timestep": torch.zeros(2, 4)}, "timestep"),
        ({"context": torch.zeros(2, 513, 48)}, "context"),
        ({"context": torch.zeros(2, 5, 64)}, "context"),
        ({"image_context": torch.zeros(2, 257, 1280)}, "no image branch"),
        ({"condition": torch.zeros(2, 20, 3, 4, 6)}, "expected 16 channels"),
    ],
)
def test_inputs_that_do_not_fit_are_named(dit, inputs, change, message):
    with pytest.raises(InputError, match=message):
        dit(**({"noised": inputs.noised} | inputs.keywords() | change))


def test_missing_conditions_are_named():
    config = CONFIGS["i2v-14B with CLIP"]
    inputs = random_inputs(config)
    dit = WanDiT(config)
    with pytest.raises(InputError, match="expected 36 channels"):
        dit(inputs.noised, **(inputs.keywords() | {"condition": None}))
    with pytest.raises(InputError, match="needs CLIP"):
        dit(inputs.noised, **(inputs.keywords() | {"image_context": None}))
    with pytest.raises(InputError, match="condition"):
        dit(inputs.noised, **(inputs.keywords() | {"condition": inputs.condition[:, :, :2]}))
