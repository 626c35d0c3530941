"""What a file holds is said of every spelling, and what is still zero is called untrained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from core.errors import InputError
from core.files import read_safetensors
from networks.files import save_network
from networks.inspection import inspect, lora_norm
from networks.lora_linear import block_linears
from networks.lora_names import diffusers_lora_key, parse_lora_key
from networks.mechanisms.registry import INJECTIONS
from tests.networks.cases import NETWORKS, VARIANTS, disturb, make_dit, make_network, small
from tests.wan_ext.models import diffusers_names

T2V = VARIANTS["T2V"]
FUN = small("fun-camera-A14B", in_dim=36, control_downscale=8)
with_camera = pytest.mark.parametrize("kind", [kind for kind in NETWORKS if kind != "lora"])


def saved(folder: Path, kind: str, *, trained: bool = True, **changes) -> Path:
    network = make_network(make_dit(T2V), T2V, kind, **changes)
    if trained:
        disturb(network)
    return save_network(network, folder, "mine", {"prompt": "a room"})[0]


# ---- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["T2V", "I2V with CLIP"])
def test_every_linear_is_found_again_behind_every_spelling(task: str) -> None:
    dit = make_dit(VARIANTS[task])
    for module in block_linears(dit):
        for key in (
            f"diffusion_model.{module}.lora_A.weight",
            f"lora_unet_{module.replace('.', '_')}.lora_down.weight",
            f"lora_unet__{module.replace('.', '_')}.lora_down.weight",
            diffusers_lora_key(module, "down"),
            f"base_model.model.{module}.lora_A.weight",
            f"{module}.lora_A.default.weight",
        ):
            found = parse_lora_key(key)
            assert found is not None and (found.module, found.part) == (module, "down"), key


def test_the_diffusers_spelling_is_that_of_its_own_converter() -> None:
    dit = make_dit(VARIANTS["I2V with CLIP"])
    names = list(dit.state_dict())
    numbered = {name: torch.full_like(t, float(i)) for i, (name, t) in enumerate(dit.state_dict().items())}
    theirs = {int(tensor.flatten()[0]): name for name, tensor in diffusers_names(numbered).items()}
    for module in block_linears(dit):
        expected = theirs[names.index(f"{module}.weight")].removesuffix(".weight")
        assert diffusers_lora_key(module, "up") == f"transformer.{expected}.lora_B.weight"


def test_what_is_no_lora_is_not_taken_for_one() -> None:
    for key in ("blocks.0.self_attn.q.weight", "camera_encoder.mlp.last.weight", "diffusion_model.blocks.0.norm3.diff"):
        assert parse_lora_key(key) is None


# ---- norms and verdicts -------------------------------------------------------------------------------------------


def test_the_norm_is_that_of_what_a_lora_adds() -> None:
    down, up = torch.randn(3, 40), torch.randn(50, 3)
    assert lora_norm(down, up, torch.tensor(6.0)) == pytest.approx((2 * up @ down).norm().item(), rel=1e-5)
    assert lora_norm(down, up, torch.tensor(-6.0)) == lora_norm(down, up, torch.tensor(6.0))
    assert lora_norm(down, up, None) == pytest.approx((up @ down).norm().item(), rel=1e-5)


@with_camera
def test_a_trained_camera_is_there_and_a_new_one_is_called_untrained(kind: str, tmp_path: Path) -> None:
    found = inspect(saved(tmp_path / "trained", kind))
    assert found.answer.startswith("yes, and trained") and found.camera_parts
    assert not any(part.untrained for part in (*found.parts, *found.companion.parts))
    assert {part.name for part in found.parts} == {"LoRA self_attn", "LoRA cross_attn", "LoRA ffn"}
    assert all(part.ranks == (4,) for part in found.parts)

    new = inspect(saved(tmp_path / "new", kind, trained=False))
    assert new.answer.startswith("yes, but UNTRAINED")
    assert all(part.untrained and part.norm == 0 for part in new.parts)


def test_a_line_is_the_norm_of_all_its_tensors_and_is_untrained_where_all_of_a_lora_is(tmp_path: Path) -> None:
    weights, squares = {}, 0.0
    for module, live in (("blocks.0.ffn.0", 0.0), ("blocks.0.ffn.2", 1.0), ("blocks.1.ffn.2", 1.0)):
        down, up = torch.randn(4, 96), live * torch.randn(96, 4)
        weights |= {f"diffusion_model.{module}.lora_A.weight": down, f"diffusion_model.{module}.lora_B.weight": up}
        squares += (up @ down).square().sum().item()
    weights["diffusion_model.blocks.0.ffn.1.lora_A.weight"] = torch.randn(4, 96)  # half a pair, in the middle
    weights |= {
        "camera_encoder.mlp.first.weight": torch.full((3, 4), 2.0),
        "camera_encoder.mlp.first.bias": torch.zeros(3),
    }
    weights |= {"camera_encoder.mlp.last.weight": torch.zeros(3, 4), "somebody.else": torch.ones(1)}
    save_file(weights, tmp_path / "theirs.safetensors", {"ss_network_module": "theirs.lora"})
    found = inspect(tmp_path / "theirs.safetensors")
    parts = {part.name: part for part in found.parts}
    assert parts["LoRA ffn"].norm == pytest.approx(squares**0.5, rel=1e-5) and not parts["LoRA ffn"].untrained
    first, last = parts["camera_encoder.mlp.first"], parts["camera_encoder.mlp.last"]
    assert first.norm == pytest.approx(48**0.5) and not first.untrained  # a bias may be zero
    assert last.untrained and "UNTRAINED" in found.answer and "mlp.last" in found.answer
    assert found.others == ("somebody.else",)
    assert found.kind == "LoRA in the names of ComfyUI, made by theirs.lora"


def test_an_expert_that_is_not_to_hear_the_camera_says_so(tmp_path: Path) -> None:
    args = {"injection": "bias", "camera_hidden": "16", "camera_experts": "high"}
    deaf = inspect(saved(tmp_path / "low", "bias", expert="low", network_args=args))
    assert deaf.answer == "no: only the high-noise expert of this network hears the camera"
    heard = inspect(saved(tmp_path / "high", "bias", expert="high", network_args=args))
    assert heard.answer.startswith("yes, and trained")
    assert heard.companion.kind.startswith("camera file of this trainer")
    heard.companion.path.unlink()
    assert inspect(heard.path).answer.startswith("not here: ")


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_parameter_is_counted_once(kind: str, tmp_path: Path) -> None:
    network = make_network(make_dit(T2V), T2V, kind)
    found = inspect(save_network(network, tmp_path, "mine", {})[0])
    parts = [*found.parts, *(found.companion.parts if found.companion else ())]
    assert sum(part.parameters for part in parts) == sum(parameter.numel() for parameter in network.parameters())


def test_every_injection_is_inspected() -> None:
    assert {args.get("injection") for _, args in NETWORKS.values()} >= INJECTIONS.keys()


def test_a_lora_without_camera(tmp_path: Path) -> None:
    found = inspect(saved(tmp_path, "lora"))
    assert found.answer == "no" and found.companion is None
    assert found.kind == "LoRA of this trainer (networks.lora), low-noise expert of t2v-A14B"


def test_the_companion_is_missed_where_it_belongs(tmp_path: Path) -> None:
    path = saved(tmp_path, "bias")
    companion = tmp_path / "mine_low_noise_camera.safetensors"
    assert "belongs to mine_low_noise.safetensors" in inspect(companion).companion_note
    assert inspect(companion).answer.startswith("yes, and trained")
    other = saved(tmp_path / "other", "bias", seed=9)
    companion.write_bytes((other.parent / companion.name).read_bytes())
    assert inspect(path).answer.startswith("not here: the camera file mine_low_noise_camera.safetensors is of another")
    companion.unlink()
    assert inspect(path).answer.startswith("not here: the camera file mine_low_noise_camera.safetensors is missing")


@pytest.mark.parametrize(
    ("rename", "spelling"),
    [
        (lambda module, part: f"lora_unet_{module.replace('.', '_')}.lora_{part}.weight", "kohya"),
        (lambda module, part: diffusers_lora_key(module, part), "diffusers"),
        (lambda module, part: f"diffusion_model.{module}.lora_{'A' if part == 'down' else 'B'}.weight", "ComfyUI"),
    ],
)
def test_loras_of_other_tools(rename, spelling: str, tmp_path: Path) -> None:
    weights: dict[str, Tensor] = {}
    for module in ("blocks.0.self_attn.q", "blocks.1.ffn.2", "blocks.1.cross_attn.o"):
        weights[rename(module, "down")], weights[rename(module, "up")] = torch.randn(8, 96), torch.randn(96, 8)
    save_file(weights, tmp_path / "theirs.safetensors")
    found = inspect(tmp_path / "theirs.safetensors")
    assert found.kind == f"LoRA in the names of {spelling}" and found.answer == "no"
    assert {part.name: part.modules for part in found.parts} == {
        "LoRA self_attn": 1,
        "LoRA ffn": 1,
        "LoRA cross_attn": 1,
    }


def test_camera_parts_of_other_trainers_are_seen(tmp_path: Path) -> None:
    weights = {
        "blocks.0.cam_encoder.weight": torch.ones(4, 12),
        "blocks.1.cam_encoder.weight": torch.ones(4, 12),
        "blocks.0.self_attn.q.weight": torch.ones(4, 4),
    }
    save_file(weights, tmp_path / "theirs.safetensors")
    found = inspect(tmp_path / "theirs.safetensors")
    (part,) = found.camera_parts
    assert part.name == "blocks.*.cam_encoder" and part.modules == 2 and found.base_tensors == 1


def test_a_whole_checkpoint_with_an_adapter_is_not_read_whole(tmp_path: Path, monkeypatch) -> None:
    weights = make_dit(FUN).state_dict()
    save_file({f"model.diffusion_model.{name}": t for name, t in weights.items()}, tmp_path / "fun.safetensors")
    read: list[str] = []
    from wan_ext.tensor_files import SafetensorsFile

    get = SafetensorsFile.get
    monkeypatch.setattr(SafetensorsFile, "get", lambda self, name: read.append(name) or get(self, name))
    found = inspect(tmp_path / "fun.safetensors")
    assert found.answer.startswith("yes, and trained") and found.kind.startswith("Wan transformer")
    assert {part.name for part in found.parts} == {
        "control_adapter.conv",
        "control_adapter.residual_blocks.0.conv1",
        "control_adapter.residual_blocks.0.conv2",
    }
    assert found.base_tensors == len(weights) - 6
    assert {name.split(".")[2] for name in read} == {"control_adapter"}


def test_what_is_nothing_of_wan_is_refused(tmp_path: Path) -> None:
    save_file({"encoder.conv1.bias": torch.ones(1)}, tmp_path / "vae.safetensors")
    with pytest.raises(InputError, match="vae.safetensors: expected a LoRA, a camera file or a Wan transformer"):
        inspect(tmp_path / "vae.safetensors")
    with pytest.raises(InputError, match="expected a checkpoint file or folder, found nothing"):
        inspect(tmp_path / "none.safetensors")


def test_the_names_in_the_camera_file_are_those_that_the_table_shows(tmp_path: Path) -> None:
    path = saved(tmp_path, "plucker")
    names = read_safetensors(tmp_path / "mine_low_noise_camera.safetensors")[0]
    shown = {part.name for part in inspect(path).companion.parts}
    assert shown == {name.rpartition(".")[0] for name in names}
