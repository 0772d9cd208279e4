"""Models: folders, the hub's cache and checkpoints; what is refused, counted, and loaded."""

from __future__ import annotations

import http.server
import json
import os
import pickle
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from crdiff_core import pruning
from crdiff_core.errors import ModelError, RenderError
from crdiff_core.models import EMBEDDED, Model
from crdiff_core.poa import apply
from crdiff_core.prompts import Prompt
from crdiff_core.ratios import BlockRatios, Resolution
from crdiff_core.replica import Replica
from tests.core.conftest import CPU
from tests.pipelines import hub_cache, save_checkpoint

# Diffusers' scheduler calls np.array on a tensor, which torch has not yet adapted to numpy 2.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

DTYPES = ["float32", "float16", "bfloat16"]
HUB_ID = "stabilityai/small"
COMMIT = "462165984030d82259a11f4367a4eed129e94a7b"
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def copied(sd_folder: Path, tmp_path: Path) -> Path:
    """A model folder that a test may break."""
    return Path(shutil.copytree(sd_folder, tmp_path / "model"))


@pytest.fixture
def copied_of_each(folder: Path, tmp_path: Path) -> Path:
    """Such a folder of each kind in turn."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


@pytest.fixture
def copied_xl(sdxl_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sdxl_folder, tmp_path / "model"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def checkpoint(folder: Path, cache: Path, tmp_path: Path) -> Model:
    """A single-file checkpoint of each kind, its configuration in the cache."""
    hub_cache(cache, HUB_ID, COMMIT, folder, only=["*.json", "*.txt"])
    return on_hub(path=str(save_checkpoint(folder, tmp_path / "small.safetensors")))


def model(folder: Path, dtype: str = "float32") -> Model:
    return Model("small", str(folder), dtype)


def on_hub(dtype: str = "float32", revision: str = COMMIT, path: str = "") -> Model:
    return Model("small", path, dtype, HUB_ID, revision)


def weights_file(folder: Path, part: str) -> Path:
    return next((folder / part).glob("*.safetensors"))


def refusal(action: Callable[[], object]) -> str:
    """The one line with which something is refused."""
    with pytest.raises(ModelError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def command_in(message: str) -> list[str]:
    """The command line that a message advises."""
    match = re.search(r"fetch it with: (hf download .+?) \(", message)
    assert match is not None
    return shlex.split(match[1])


def patterns_in(command: list[str]) -> list[str]:
    return [pattern for option, pattern in pairwise(command) if option == "--include"]


def change(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; `...` removes one."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: value for k, value in content.items() if value is not ...}))


def change_weights(file: Path, alter: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(file)
    alter(weights)
    save_file(weights, file)


def mark(folder: Path, part: str, value: float, file: str = "") -> None:
    """Write a number into a part's weights by which one knows the file again."""

    def alter(weights: dict[str, Tensor]) -> None:
        weights[min(weights)].view(-1)[0] = value

    change_weights(folder / part / file if file else weights_file(folder, part), alter)


def marked(part: torch.nn.Module) -> float:
    state = part.state_dict()
    return float(state[min(state)].view(-1)[0])


def add_halves(folder: Path, *parts: str) -> None:
    """Add half-precision files, each marked with a 7, to parts of a folder."""
    for part in parts:
        full = weights_file(folder, part)
        half = full.with_name(full.name.replace(".safetensors", ".fp16.safetensors"))
        save_file({name: weight.half() for name, weight in load_file(full).items()}, half)
        mark(folder, part, 7, half.name)


def parts_of(folder: Path) -> list[str]:
    return sorted(file.parent.name for file in folder.glob("*/*.safetensors"))


def same_bits(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype
        for name in ours
    )


def draw(pipe: Any, resolution: str = "16x24") -> Tensor:
    replica = Replica(
        pipe, Resolution.parse(resolution), num_steps=2, guidance_scale=3.0, poa_weight=1.5
    )
    replica.set_ratios(BlockRatios(0.4, 0.6, 0.5))
    return replica.render([Prompt("a cat", "t0", 11)])


# Loading a folder


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_loads_in_the_dtype_asked_for(sd_folder, dtype):
    assert model(sd_folder, dtype).load(CPU).unet.dtype == getattr(torch, dtype)


def test_a_loaded_model_only_draws(pipe):
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert not part.training
        assert not any(weight.requires_grad for weight in part.parameters())


def test_attention_runs_by_sdpa(pipe):
    assert {type(each) for each in pipe.unet.attn_processors.values()} == {AttnProcessor2_0}


@pytest.mark.parametrize("name", ["a folder with spaces", "dotted-1.0", "~tilde", "ünï"])
def test_a_folder_of_any_name_loads(sd_folder, tmp_path, name):
    shutil.copytree(sd_folder, tmp_path / name)
    assert model(tmp_path / name).load(CPU).unet is not None


def test_a_tilde_is_the_home_folder(copied, monkeypatch):
    monkeypatch.setenv("HOME", str(copied.parent))
    assert Model("small", "~/model").load(CPU).unet is not None
    assert Model("small", "~/model").revision == model(copied).revision


def test_the_safety_checker_is_neither_loaded_nor_needed(copied):
    change(
        copied / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
        requires_safety_checker=True,
    )
    pipe = model(copied).load(CPU)
    assert pipe.safety_checker is pipe.feature_extractor is pipe.image_encoder is None


def test_sdxl_draws_without_a_watermark(sdxl_folder):
    assert model(sdxl_folder).load(CPU).watermark is None


def test_an_unknown_name_without_a_path_is_refused():
    with pytest.raises(
        ModelError, match=r"model sdxl is neither embedded nor on the hub: set model.path"
    ):
        _ = Model("sdxl").folder


@pytest.mark.parametrize("path", ["absent", "~no-such-user/model", "x" * 300, "a\0b"])
def test_a_missing_folder_is_refused(tmp_path, path):
    message = refusal(lambda: Model("small", path).load(CPU))
    assert message == (
        f"{path} does not exist: set model.path to a diffusers folder or a .safetensors checkpoint"
    )


def test_a_folder_without_an_index_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"is not a diffusers folder \(no model_index.json\)"):
        model(tmp_path).load(CPU)


def test_a_pipeline_of_another_class_is_refused(copied):
    change(copied / "model_index.json", _class_name="FluxPipeline")
    with pytest.raises(ModelError, match="holds a FluxPipeline: CR-Diff draws with Stable"):
        model(copied).load(CPU)


@pytest.mark.parametrize("content", ["", "{"], ids=["empty", "cut"])
def test_a_broken_index_is_refused(copied, content):
    (copied / "model_index.json").write_text(content)
    with pytest.raises(ModelError, match=r"model_index.json is broken: fetch the model again$"):
        model(copied).load(CPU)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("size", [0, 1000], ids=["empty", "cut"])
def test_broken_weights_are_refused_in_one_line(copied, part, size):
    file = weights_file(copied, part)
    file.write_bytes(file.read_bytes()[:size])
    message = refusal(lambda: model(copied).load(CPU))
    assert re.fullmatch(rf"{file} is broken \(.*\): fetch the model again", message)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_missing_weights_are_refused_in_one_line(copied, part):
    file = weights_file(copied, part)
    file.unlink()
    message = refusal(lambda: model(copied).load(CPU))
    assert message == f"{file} is missing: fetch the model again"


# Damaged folders


def edit(name: str, **changes: Any) -> Callable[[Path], object]:
    return lambda folder: change(folder / name, **changes)


def index(**changes: Any) -> Callable[[Path], object]:
    return edit("model_index.json", **changes)


def write(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    )


def replace(name: str, weight: str, tensor: Tensor | None) -> Callable[[Path], object]:
    """Put another tensor in a weight's place, or none."""

    def alter(weights: dict[str, Tensor]) -> None:
        found = next(each for each in sorted(weights) if weight in each)
        weights.pop(found)
        if tensor is not None:
            weights[found] = tensor

    return lambda folder: change_weights(folder / name, alter)


def swap(folder: Path) -> None:
    (folder / "unet").rename(folder / "aside")
    (folder / "vae").rename(folder / "unet")
    (folder / "aside").rename(folder / "vae")


CONFIG = {"unet": "unet/config.json", "vae": "vae/config.json", "text": "text_encoder/config.json"}
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    # What is damaged, and what the message says of it.
    "index: a list": (write("model_index.json", "[]"), "model_index.json is broken"),
    "index: null": (write("model_index.json", "null"), "model_index.json is broken"),
    "index: nested": (write("model_index.json", "[" * 99999), "model_index.json is broken"),
    "index: no unet": (index(unet=...), "names no unet"),
    "index: a null unet": (index(unet=[None, None]), "names no unet"),
    "index: a number as unet": (index(unet=5), "names no unet"),
    "index: a string as unet": (index(unet="UNet2DConditionModel"), "names no unet"),
    "index: an object as unet": (index(unet={"diffusers": 1}), "names no unet"),
    "index: half a unet": (index(unet=["diffusers"]), "names no unet"),
    "index: numbers as unet": (index(unet=[5, 6]), "names no unet"),
    "index: unknown unet": (index(unet=["diffusers", "No"]), "has a diffusers.No as its unet"),
    "index: another VAE": (index(vae=["diffusers", "AutoencoderTiny"]), "Tiny as its vae"),
    "index: a null encoder": (index(text_encoder=[None, None]), "names no text_encoder"),
    "index: no tokenizer": (index(tokenizer=...), "names no tokenizer"),
    "index: T5": (index(tokenizer=["transformers", "T5Tokenizer"]), "T5Tokenizer as its token"),
    "index: no scheduler": (index(scheduler=...), "names no scheduler"),
    "index: a pipeline as scheduler": (
        index(scheduler=["diffusers", "DiffusionPipeline"]),
        "as its scheduler: CR-Diff knows the schedulers of diffusers",
    ),
    "index: a custom pipeline": (index(_class_name=["mine", "Mine"]), "holds a ['mine', 'Mine']"),
    "index: a class of no name": (index(_class_name={}), "holds a {}"),
    "unet: gone": (remove("unet"), "unet/config.json is missing"),
    "unet: a file": (lambda f: (remove("unet")(f), write("unet", "")(f)), "unet/config.json is"),
    "unet: no config": (remove(CONFIG["unet"]), "unet/config.json is missing"),
    "unet: a list": (write(CONFIG["unet"], "[]"), "unet/config.json is broken"),
    "unet: an empty config": (write(CONFIG["unet"], "{}"), "does not load: "),
    "unet: no blocks": (edit(CONFIG["unet"], down_block_types=...), "does not load: "),
    "unet: unknown blocks": (edit(CONFIG["unet"], down_block_types=["A", "B"]), "does not load: "),
    "unet: no widths": (edit(CONFIG["unet"], block_out_channels=None), "does not load: TypeErr"),
    "unet: no head": (edit(CONFIG["unet"], attention_head_dim=0), "does not load: ZeroDivision"),
    "unet: text width": (edit(CONFIG["unet"], cross_attention_dim="16"), "does not load: TypeErr"),
    "unet: a weight gone": (replace(UNET, "attn1.to_q", None), "lacks weights of its unet"),
    "unet: a bias gone": (replace(UNET, "conv_out.bias", None), "lacks weights of its unet"),
    "unet: a larger weight": (
        replace(UNET, "attn2.to_k", torch.zeros(99, 99)),
        "does not load: ValueError: Cannot load because",
    ),
    "unet: a number as weight": (replace(UNET, "conv_in.w", torch.zeros(())), "does not load: "),
    "unet: no tensors": (
        lambda folder: save_file({}, folder / UNET),
        "unet has no self-attention or feed-forward weights in its down and mid and up blocks",
    ),
    "unet: the VAE's": (swap, "has no self-attention"),
    "unet: a web page": (write(UNET, "<html>401</html>"), "unet/diffusion_pytorch_model.safet"),
    "unet: an LFS pointer": (write(UNET, "version https://git-lfs"), ".safetensors is broken"),
    "unet: a folder of that name": (
        lambda folder: (remove(UNET)(folder), (folder / UNET).mkdir()),
        f"{UNET} is missing",
    ),
    "unet: an index of nothing": (
        write(f"{UNET}.index.json", '{"weight_map": []}'),
        "lists no files",
    ),
    "unet: an index without its files": (
        write(f"{UNET}.index.json", '{"weight_map": {"a": "absent.safetensors"}}'),
        "unet/absent.safetensors is missing",
    ),
    "vae: gone": (remove(VAE), f"{VAE} is missing"),
    "vae: cut": (cut(VAE, 5000), f"{VAE} is broken"),
    "vae: no blocks": (edit(CONFIG["vae"], block_out_channels=[]), "does not load: IndexError"),
    "vae: a weight gone": (replace(VAE, "decoder.conv_out", None), "lacks weights of its vae"),
    "vae: a larger weight": (replace(VAE, "decoder.conv_in.w", torch.zeros(9)), "does not load"),
    "text: no config": (remove(CONFIG["text"]), "text_encoder/config.json is missing"),
    "text: a wrong type": (edit(CONFIG["text"], hidden_size="wide"), "Field 'hidden_size' expect"),
    "text: no head": (edit(CONFIG["text"], num_attention_heads=0), "does not load: ZeroDivision"),
    "text: unknown activation": (edit(CONFIG["text"], hidden_act="no"), "does not load: KeyError"),
    "text: a weight gone": (
        replace(TEXT, "layers.0.mlp.fc1.weight", None),
        "lacks weights of its text_encoder",
    ),
    "text: a larger weight": (replace(TEXT, "mlp.fc1.w", torch.zeros(9, 9)), "does not load: "),
    "tokenizer: gone": (remove("tokenizer"), "tokenizer/tokenizer_config.json is missing"),
    "tokenizer: no config": (
        remove("tokenizer/tokenizer_config.json"),
        "tokenizer/tokenizer_config.json is missing",
    ),
    "tokenizer: no words": (remove("tokenizer/tokenizer.json"), "tokenizer has no vocabulary"),
    "tokenizer: half its words": (
        lambda folder: (
            remove("tokenizer/tokenizer.json")(folder),
            write("tokenizer/vocab.json", "{}")(folder),
        ),
        "tokenizer has no vocabulary",
    ),
    "tokenizer: cut": (cut("tokenizer/tokenizer.json", 50), "does not load: JSONDecodeError"),
    "tokenizer: a list": (write("tokenizer/tokenizer.json", "[]"), "does not load: "),
    "scheduler: gone": (remove("scheduler"), "scheduler_config.json is missing"),
    "scheduler: no steps": (
        edit("scheduler/scheduler_config.json", num_train_timesteps="many"),
        "does not load: TypeError",
    ),
    "scheduler: unknown betas": (
        edit("scheduler/scheduler_config.json", beta_schedule="no"),
        "does not load: NotImplementedError",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(copied_of_each, damage, message):
    damage(copied_of_each)
    refused = refusal(lambda: model(copied_of_each, "float16").load(CPU))
    assert message in refused
    assert len(refused) < 700
    # Diffusers builds a model with this set and forgets to set it back when that fails.
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (index(text_encoder_2=[None, None]), "names no text_encoder_2"),
        (remove("text_encoder_2/config.json"), "text_encoder_2/config.json is missing"),
        (remove("text_encoder_2/model.safetensors"), "model.safetensors is missing"),
        (remove("tokenizer_2"), "tokenizer_2/tokenizer_config.json is missing"),
        (
            replace("text_encoder_2/model.safetensors", "text_projection", None),
            "text_encoder_2 lacks weights of its text_encoder_2",
        ),
    ],
)
def test_damage_of_what_only_sdxl_has_is_refused_in_one_line(copied_xl, damage, message):
    damage(copied_xl)
    assert message in refusal(lambda: model(copied_xl).load(CPU))


@pytest.mark.parametrize(
    ("damage", "asked"),
    [
        ("index: a number as unet", ["check", "num_bytes", "revision", "scheduler"]),
        ("index: a list", ["check", "num_bytes", "revision", "scheduler"]),
        ("unet: gone", ["check", "num_bytes", "revision", "num_prunable", "is_size_conditioned"]),
    ],
)
def test_whatever_is_asked_of_a_damaged_folder_is_refused_in_one_line(copied, damage, asked):
    DAMAGES[damage][0](copied)
    for ask in asked:
        refusal(lambda ask=ask: getattr(model(copied), ask)())


@pytest.mark.parametrize("channels", [[], 3, None, ...])
def test_a_vae_of_no_known_depth_is_refused(copied, channels):
    change(copied / CONFIG["vae"], block_out_channels=channels)
    message = refusal(lambda: model(copied).check_resolution(Resolution(24, 40)))
    assert message.endswith("vae/config.json has no block_out_channels: fetch the model again")


# Nothing is downloaded, unpickled or run


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Path]:
    """A file that must not come into being."""
    trap = tmp_path / "trapped"
    yield trap
    assert not trap.exists()


class Bomb:
    def __init__(self, trap: Path) -> None:
        self._trap = trap

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self._trap), "w")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".CKPT"])
def test_a_pickled_checkpoint_is_refused_and_never_read(tmp_path, cache, trap, suffix, sd_folder):
    hub_cache(cache, HUB_ID, COMMIT, sd_folder)
    file = tmp_path / f"model{suffix}"
    file.write_bytes(pickle.dumps({"state_dict": Bomb(trap)}))
    for found in (on_hub(path=str(file)), Model.find(str(file), "float32", HUB_ID, COMMIT)):
        message = refusal(lambda found=found: found.load(CPU))
        assert message == (
            f"{file} is a pickle, which can run code: convert it to .safetensors and give that"
        )


@pytest.mark.parametrize("name", ["model.safetensors", "model.SAFETENSORS", "model"])
def test_a_pickle_of_another_name_is_refused_and_never_read(
    tmp_path, cache, trap, name, sd_folder
):
    hub_cache(cache, HUB_ID, COMMIT, sd_folder)
    torch.save({"state_dict": Bomb(trap)}, tmp_path / name)
    message = refusal(lambda: on_hub(path=str(tmp_path / name)).load(CPU))
    assert "is broken (" in message or "is not a diffusers folder" in message


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("unet", "diffusion_pytorch_model.bin"),
        ("vae", "diffusion_pytorch_model.bin"),
        ("text_encoder", "pytorch_model.bin"),
        ("text_encoder", "pytorch_model.fp16.bin"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_folder_of_pickles_is_refused_and_never_read(copied, trap, part, name, dtype):
    weights_file(copied, part).unlink()
    torch.save({"state_dict": Bomb(trap)}, copied / part / name)
    message = refusal(lambda: model(copied, dtype).load(CPU))
    assert message == (
        f"{copied / part} holds only pickled weights (.bin), which can run code: save the model "
        "with safetensors"
    )


def test_pickles_beside_safetensors_are_never_read(copied, trap):
    for part, name in (
        ("unet", "diffusion_pytorch_model.bin"),
        ("unet", "diffusion_pytorch_model.fp16.bin"),
        ("text_encoder", "pytorch_model.bin"),
    ):
        torch.save({"state_dict": Bomb(trap)}, copied / part / name)
    assert model(copied, "float16").load(CPU).unet is not None


@pytest.mark.parametrize(
    ("files", "changes"),
    [
        # A file of a part's library in the part's folder is what diffusers would import.
        (["unet/diffusers.py", "text_encoder/transformers.py", "unet/unet.py"], {}),
        (["None.py", "pipeline.py"], {}),  # Diffusers looks for the first, by mistake.
        (["pipeline.py"], {"_class_name": ["pipeline", "Evil"]}),
        (["unet/evil.py"], {"unet": ["evil", "Evil"]}),
        # With the model's folder as the working folder, an importable name.
        (["unet/evil.py"], {"unet": ["unet.evil", "Evil"]}),
        (["evil.py"], {"scheduler": ["evil", "EvilScheduler"]}),
        (["evil.py"], {"tokenizer": ["evil", "CLIPTokenizer"]}),
        (["evil.py"], {"image_encoder": ["evil", "Evil"], "feature_extractor": ["evil", "Evil"]}),
        (["evil.py"], {"safety_checker": ["evil", "Evil"], "extra": ["evil", "Evil"]}),
    ],
)
def test_the_code_of_a_model_is_never_run(
    copied, trap, monkeypatch, files, changes, cache, tmp_path
):
    file = save_checkpoint(copied, tmp_path / "small.safetensors")
    for name in files:
        code = f"open({str(trap)!r}, 'w')\nclass Evil: pass\n"
        (copied / name).write_text(code)
    change(copied / "model_index.json", **changes)
    hub_cache(cache, HUB_ID, COMMIT, copied)
    monkeypatch.chdir(copied)
    monkeypatch.syspath_prepend(str(copied))
    for given in (model(copied), on_hub(path=str(file))):
        with suppress(ModelError):
            given.load(CPU)


def test_the_code_that_a_configuration_names_is_never_run(copied, trap):
    named = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil"]}
    for part, config in (("text_encoder", "config"), ("tokenizer", "tokenizer_config")):
        (copied / part / "evil.py").write_text(f"open({str(trap)!r}, 'w')\nclass Evil: pass\n")
        change(copied / part / f"{config}.json", auto_map=named)
    assert model(copied).load(CPU).text_encoder is not None


@pytest.mark.parametrize("source", ["folder", "hub", "checkpoint"])
def test_nothing_is_asked_of_the_network(source, folder, cache, checkpoint, monkeypatch):
    asked = []

    def connect(_: Any, address: Any) -> None:
        asked.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    if source == "hub":
        hub_cache(cache, HUB_ID, COMMIT, folder)
    given = {"folder": model(folder), "hub": on_hub(), "checkpoint": checkpoint}[source]
    given.load(CPU)
    assert not asked


# The hub's cache


@pytest.mark.parametrize("revision", [COMMIT, "main"])
def test_a_model_in_the_hubs_cache_loads(folder, cache, revision):
    hub_cache(cache, HUB_ID, COMMIT, folder)
    found = on_hub(revision=revision)
    found.check()
    assert same_bits(found.load(CPU).unet, model(folder).load(CPU).unet)


@pytest.mark.parametrize("revision", [COMMIT, "main"])
def test_the_revision_of_a_hub_model_is_its_commit(sd_folder, cache, revision):
    hub_cache(cache, HUB_ID, COMMIT, sd_folder)
    assert on_hub(revision=revision).revision == COMMIT[:16]


def test_another_commit_is_another_model(sd_folder, cache):
    hub_cache(cache, HUB_ID, COMMIT, sd_folder)
    hub_cache(cache, HUB_ID, "f" * 40, sd_folder)
    assert on_hub(revision=COMMIT).revision == COMMIT[:16]
    assert on_hub(revision="main").revision == "f" * 16


def test_a_model_that_is_not_in_the_cache_is_refused_with_the_command_to_fetch_it(cache):
    assert refusal(lambda: on_hub().load(CPU)) == (
        f"{HUB_ID} at revision {COMMIT[:12]} is not in this machine's "
        f"Hugging Face cache: fetch it with: hf download {HUB_ID} --revision {COMMIT} "
        "--include '*.json' --include '*.txt' "
        "--include unet/diffusion_pytorch_model.safetensors "
        "--include vae/diffusion_pytorch_model.safetensors "
        "--include text_encoder/model.safetensors --include text_encoder_2/model.safetensors "
        "--include '*/*-of-*.safetensors' (if it is gated, accept its licence at "
        f"https://huggingface.co/{HUB_ID} and hf auth login first)"
    )


@pytest.mark.parametrize("revision", ["f" * 40, "fp16", ""])
def test_another_revision_than_the_cached_is_refused(sd_folder, cache, revision):
    hub_cache(cache, HUB_ID, COMMIT, sd_folder)
    message = refusal(lambda: on_hub(revision=revision).load(CPU))
    assert "is not in this machine's Hugging Face cache: fetch it with: hf download" in message


@pytest.mark.parametrize("hub_id", ["a/b/c", "-a/b", "a b/c", "../c", "a/b.git"])
def test_a_malformed_hub_id_is_refused(cache, hub_id):
    message = refusal(lambda: Model("small", hub_id=hub_id).load(CPU))
    assert message == f"model.hub_id {hub_id!r} is not OWNER/NAME: see https://huggingface.co"


@pytest.mark.parametrize("dangling", [True, False], ids=["dangling", "absent"])
@pytest.mark.parametrize(
    "name",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "unet/config.json",
        "text_encoder_2/model.safetensors",
        "text_encoder_2/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer_2/tokenizer_config.json",
        "tokenizer/tokenizer.json",
        "vae",
    ],
)
def test_an_incomplete_download_is_refused_with_the_command_to_complete_it(
    sdxl_folder, cache, name, dangling
):
    snapshot = hub_cache(cache, HUB_ID, COMMIT, sdxl_folder)
    remove(name)(snapshot)
    if dangling:
        (snapshot / name).symlink_to("../../../blobs/absent")
    for ask in (on_hub().check, lambda: on_hub().load(CPU)):
        message = refusal(ask)
        assert str(snapshot / name) in message or "tokenizer has no vocabulary" in message
        assert command_in(message)[:5] == ["hf", "download", HUB_ID, "--revision", COMMIT]
        assert "--force-download" not in message


def test_a_broken_file_of_the_hub_is_refused_with_the_command_to_fetch_it_again(sd_folder, cache):
    snapshot = hub_cache(cache, HUB_ID, COMMIT, sd_folder)
    (snapshot / UNET).resolve().write_bytes(b"<html>")
    assert command_in(refusal(lambda: on_hub().load(CPU)))[-1] == "--force-download"


# As https://huggingface.co lists them; what load needs comes first.
SDXL_FILES = {
    "config": [
        "model_index.json",
        "scheduler/scheduler_config.json",
        *(f"{part}/config.json" for part in ("text_encoder", "text_encoder_2", "unet", "vae")),
        *(
            f"{part}/{name}"
            for part in ("tokenizer", "tokenizer_2")
            for name in ("merges.txt", "tokenizer_config.json", "vocab.json")
        ),
    ],
    "float32": [
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ],
    "float16": [
        "text_encoder/model.fp16.safetensors",
        "text_encoder_2/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ],
    "other": [
        *(".gitattributes", "01.png", "LICENSE.md", "README.md", "comparison.png"),
        *("sd_xl_base_1.0.safetensors", "sd_xl_base_1.0_0.9vae.safetensors"),
        "sd_xl_offset_example-lora_1.0.safetensors",
        *(
            f"{part}/{name}"
            for part in ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder")
            for name in ("model.onnx", "model.onnx_data", "openvino_model.bin")
        ),
        *("text_encoder/flax_model.msgpack", "unet/diffusion_flax_model.msgpack"),
        *("unet/openvino_model.xml", "vae/diffusion_flax_model.msgpack"),
        *(
            f"vae_1_0/diffusion_pytorch_model{dotted}.safetensors"
            for dotted in ("", ".fp16", ".non_ema")
        ),
    ],
    # Next to nothing, and in nobody's way.
    "small": [
        *(f"{part}/config.json" for part in ("vae_1_0", "vae_decoder", "vae_encoder")),
        *(f"{part}/special_tokens_map.json" for part in ("tokenizer", "tokenizer_2")),
    ],
}
SD15_FILES = {
    "config": [
        name for name in SDXL_FILES["config"] if "_2/" not in name and "tokens_map" not in name
    ],
    "float32": [name for name in SDXL_FILES["float32"] if "_2/" not in name],
    "float16": [name for name in SDXL_FILES["float16"] if "_2/" not in name],
    "other": [
        *("v1-5-pruned-emaonly.ckpt", "v1-5-pruned-emaonly.safetensors", "v1-5-pruned.ckpt"),
        *("v1-5-pruned.safetensors", "v1-inference.yaml", ".gitattributes", "README.md"),
        *(
            f"{part}/diffusion_pytorch_model{dotted}"
            for part in ("unet", "vae")
            for dotted in (".bin", ".fp16.bin", ".non_ema.bin", ".non_ema.safetensors")
        ),
        *(
            f"{part}/{name}"
            for part in ("safety_checker", "text_encoder")
            for name in ("pytorch_model.bin", "pytorch_model.fp16.bin")
        ),
        *("safety_checker/model.safetensors", "safety_checker/model.fp16.safetensors"),
    ],
    "small": [
        *("safety_checker/config.json", "feature_extractor/preprocessor_config.json"),
        "tokenizer/special_tokens_map.json",
    ],
}
SHARDED_FILES = {
    "config": [*SDXL_FILES["config"], f"{UNET}.index.json"],
    "float32": [
        *(name for name in SDXL_FILES["float32"] if "unet" not in name),
        *(f"unet/diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)),
    ],
    "other": [],
    "small": [],
}


@pytest.mark.parametrize(
    ("files", "dtype"),
    [
        *((SDXL_FILES, dtype) for dtype in DTYPES),
        *((SD15_FILES, dtype) for dtype in DTYPES),
        (SHARDED_FILES, "float32"),
    ],
)
def test_the_command_fetches_exactly_the_weights_that_load_reads(cache, files, dtype):
    precision = "float16" if dtype == "float16" else "float32"
    patterns = patterns_in(command_in(refusal(on_hub(dtype).check)))
    listing = sorted({name for names in files.values() for name in names})
    fetched = set(filter_repo_objects(listing, allow_patterns=patterns))
    assert fetched == {*files["config"], *files[precision], *files["small"]}


def test_a_checkpoints_command_fetches_no_weights(cache, tmp_path, sd_folder):
    file = save_checkpoint(sd_folder, tmp_path / "small.safetensors")
    patterns = patterns_in(command_in(refusal(on_hub(path=str(file)).check)))
    listing = sorted({name for names in SDXL_FILES.values() for name in names})
    fetched = set(filter_repo_objects(listing, allow_patterns=patterns))
    assert fetched == {*SDXL_FILES["config"], *SDXL_FILES["small"]}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as `hf download` asks for."""

    folder: Path

    def do_GET(self) -> None:
        path = urllib.parse.urlparse(self.path).path
        if path == f"/api/models/{HUB_ID}/tree/{COMMIT}":
            files = (file for file in self.folder.rglob("*") if file.is_file())
            listing = [
                {
                    "type": "file",
                    "path": str(file.relative_to(self.folder)),
                    "size": file.stat().st_size,
                    "oid": f"{number:040x}",
                }
                for number, file in enumerate(files)
            ]
            self.answer(json.dumps(listing).encode())
        elif path.startswith(f"/{HUB_ID}/resolve/{COMMIT}/"):
            name = path.removeprefix(f"/{HUB_ID}/resolve/{COMMIT}/")
            self.answer((self.folder / name).read_bytes(), etag=name.replace("/", "-"))
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def answer(self, content: bytes, etag: str = "listing") -> None:
        self.send_response(200)
        for name, value in {
            "ETag": f'"{etag}"',
            "X-Repo-Commit": COMMIT,
            "Content-Length": str(len(content)),
            "Content-Type": "application/json",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(sdxl_folder: Path, tmp_path: Path) -> Iterator[str]:
    """A hub's address, with one repository: the small SDXL and what else such ones hold."""
    folder = Path(shutil.copytree(sdxl_folder, tmp_path / "repository"))
    add_halves(folder, *parts_of(folder))
    for name in SDXL_FILES["other"]:
        if not (folder / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"unused: {name}")
    handler = type("Repository", (Hub,), {"folder": folder})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def fetch(command: list[str], hub: str, cache: Path) -> None:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    program = str(Path(sys.executable).with_name(command[0]))
    done = subprocess.run(
        [program, *command[1:]], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_after_the_command_the_model_loads(hub, cache, dtype):
    fetch(command_in(refusal(on_hub(dtype).check)), hub, cache)
    pipe = on_hub(dtype).load(CPU)
    assert (marked(pipe.unet) == 7) == (dtype == "float16")
    snapshot = cache / "models--stabilityai--small" / "snapshots" / COMMIT
    assert len(list(snapshot.rglob("*.safetensors"))) == 4
    assert not list(snapshot.rglob("*.onnx"))


def test_after_the_command_an_incomplete_or_broken_model_loads(hub, cache):
    fetch(command_in(refusal(on_hub("float16").check)), hub, cache)
    snapshot = cache / "models--stabilityai--small" / "snapshots" / COMMIT
    half = UNET.replace(".safe", ".fp16.safe")
    (snapshot / "text_encoder_2" / "config.json").unlink()
    fetch(command_in(refusal(on_hub("float16").check)), hub, cache)
    on_hub("float16").check()
    (snapshot / half).resolve().write_bytes(b"<html>")
    fetch(command_in(refusal(on_hub("float16").check)), hub, cache)
    assert marked(on_hub("float16").load(CPU).unet) == 7


def test_after_the_command_a_checkpoint_loads(hub, cache, sdxl_folder, tmp_path):
    path = str(save_checkpoint(sdxl_folder, tmp_path / "small.safetensors"))
    fetch(command_in(refusal(on_hub(path=path).check)), hub, cache)
    assert on_hub(path=path).load(CPU).unet is not None


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_the_cache_lies_where_the_environment_says_and_looking_needs_no_torch(
    sd_folder, tmp_path, variable
):
    hub_cache(tmp_path / "hub", HUB_ID, COMMIT, sd_folder)
    environment = {name: each for name, each in os.environ.items() if name != "HF_HUB_CACHE"}
    environment[variable] = str(tmp_path if variable == "HF_HOME" else tmp_path / "hub")
    code = (
        "import sys; from crdiff_core.models import Model\n"
        f"model = Model('small', hub_id={HUB_ID!r}); model.check(); print(model.revision)\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == f"{COMMIT[:16]}\n", done.stderr


# Half-precision files


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_files_are_for_float16_alone(copied_of_each, dtype):
    add_halves(copied_of_each, *parts_of(copied_of_each))
    pipe = model(copied_of_each, dtype).load(CPU)
    read = {part: marked(getattr(pipe, part)) == 7 for part in parts_of(copied_of_each)}
    assert set(read.values()) == {dtype == "float16"}


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_half_precision_files_of_only_some_parts_are_not_read(copied_xl, part):
    full = sorted(copied_xl.glob("*/*.safetensors"))
    add_halves(copied_xl, *(set(parts_of(copied_xl)) - {part}))
    found = model(copied_xl, "float16")
    pipe = found.load(CPU)
    assert all(marked(getattr(pipe, each)) != 7 for each in parts_of(copied_xl))
    assert found.revision == model(copied_xl).revision
    for file in full:
        file.rename(file.with_suffix(".unused"))
    assert "safetensors is missing: fetch" in refusal(model(copied_xl, "float16").check)


def test_half_precision_files_are_enough_for_float16(copied_of_each):
    full = sorted(copied_of_each.glob("*/*.safetensors"))
    add_halves(copied_of_each, *parts_of(copied_of_each))
    for file in full:
        file.unlink()
    assert model(copied_of_each, "float16").load(CPU).unet.dtype == torch.float16
    for dtype in ("float32", "bfloat16"):
        assert "is missing: fetch the model again" in refusal(model(copied_of_each, dtype).check)


def test_pickled_half_precision_files_do_not_count(copied, trap):
    for part, name in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        torch.save({"state_dict": Bomb(trap)}, copied / part / f"{name}.fp16.bin")
    assert model(copied, "float16").load(CPU).unet.dtype == torch.float16


# Weights in several files


@pytest.fixture
def sharded(copied_of_each: Path) -> Path:
    """A folder whose UNet and text encoder lie in several files."""
    for part, cls, size in (
        ("unet", UNet2DConditionModel, "100KB"),
        ("text_encoder", CLIPTextModel, "4KB"),
    ):
        folder = copied_of_each / part
        loaded = cls.from_pretrained(folder)
        weights_file(copied_of_each, part).unlink()
        loaded.save_pretrained(folder, max_shard_size=size)
        assert len(list(folder.glob("*.safetensors"))) > 1
    return copied_of_each


def test_weights_in_several_files_load_and_count(sharded, folder):
    pipe, whole = model(sharded).load(CPU), model(folder).load(CPU)
    assert same_bits(pipe.unet, whole.unet)
    assert same_bits(pipe.text_encoder, whole.text_encoder)
    assert model(sharded).num_prunable() == pruning.num_prunable(pipe.unet)
    assert model(sharded).num_bytes() == model(folder).num_bytes()


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_one_missing_file_of_several_is_refused(sharded, part):
    file = max((sharded / part).glob("*.safetensors"))
    file.unlink()
    message = refusal(lambda: model(sharded).load(CPU))
    assert message == f"{file} is missing: fetch the model again"


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_every_file_of_several_is_of_the_revision(sharded, part):
    before = model(sharded).revision
    for file in sorted((sharded / part).glob("*.safetensors")):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert model(sharded).revision != before
        file.write_bytes(content)


@pytest.mark.parametrize(("part", "is_read"), [("unet", False), ("text_encoder", True)])
def test_beside_several_files_a_single_one_counts_as_it_is_loaded(sharded, folder, part, is_read):
    # Diffusers then reads the several, and transformers the one.
    shutil.copy(weights_file(folder, part), sharded / part)
    name = weights_file(folder, part).name
    before = model(sharded).revision
    mark(sharded, part, 7, name)
    assert (marked(getattr(model(sharded).load(CPU), part)) == 7) == is_read
    assert (model(sharded).revision != before) == is_read
    assert model(sharded).num_bytes() == model(folder).num_bytes()


# Checkpoints


def test_a_checkpoint_loads_bit_for_bit_as_its_folder(folder, checkpoint):
    whole, single = model(folder).load(CPU), checkpoint.load(CPU)
    for part in parts_of(folder):
        assert same_bits(getattr(whole, part), getattr(single, part))


def test_a_checkpoint_with_an_openclip_text_encoder_loads_bit_for_bit(sd_folder, cache, tmp_path):
    hub_cache(cache, HUB_ID, COMMIT, sd_folder)
    file = save_checkpoint(sd_folder, tmp_path / "small.safetensors", openclip=True)
    whole, single = model(sd_folder).load(CPU), on_hub(path=str(file)).load(CPU)
    assert same_bits(whole.text_encoder, single.text_encoder)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checkpoint_loads_in_the_dtype_asked_for(checkpoint, dtype):
    pipe = on_hub(dtype, path=checkpoint.path).load(CPU)
    assert pipe.unet.dtype == pipe.text_encoder.dtype == getattr(torch, dtype)
    is_upcast = dtype == "float16" and isinstance(pipe, StableDiffusionXLPipeline)
    assert pipe.vae.dtype == (torch.float32 if is_upcast else getattr(torch, dtype))


@pytest.mark.parametrize("cls", [StableDiffusionPipeline, StableDiffusionXLPipeline])
def test_diffusers_itself_reads_our_checkpoints(cls, sd_folder, sdxl_folder, tmp_path):
    folder = sd_folder if cls is StableDiffusionPipeline else sdxl_folder
    file = save_checkpoint(folder, tmp_path / "small.safetensors")
    whole, single = cls.from_pretrained(folder), cls.from_single_file(file, config=str(folder))
    for part in parts_of(folder):
        assert same_bits(getattr(whole, part), getattr(single, part))


def test_folder_hub_and_checkpoint_draw_the_same_bits(folder, cache, checkpoint):
    hub_cache(cache, HUB_ID, COMMIT, folder)
    first, *others = (draw(each.load(CPU)) for each in (model(folder), on_hub(), checkpoint))
    for other in others:
        assert torch.equal(first, other)


def test_a_checkpoints_revision_is_its_bytes_and_its_configurations_commit(
    checkpoint, folder, cache, tmp_path
):
    copy = shutil.copy(checkpoint.path, tmp_path / "copy.safetensors")
    assert on_hub(path=copy).revision == checkpoint.revision
    hub_cache(cache, HUB_ID, "f" * 40, folder)
    assert on_hub(path=copy, revision="f" * 40).revision != checkpoint.revision
    content = bytearray(Path(copy).read_bytes())
    content[-1] ^= 1
    Path(copy).write_bytes(content)
    assert on_hub(path=copy).revision != checkpoint.revision


def test_a_checkpoint_without_a_family_is_refused(tmp_path, sd_folder):
    file = save_checkpoint(sd_folder, tmp_path / "small.safetensors")
    assert refusal(Model("small", str(file)).check) == (
        f"{file} is a single file, whose configuration is its family's: choose model=sdxl, sd15 "
        "or sd21 with it"
    )


def test_a_missing_checkpoint_is_refused(tmp_path, cache):
    file = tmp_path / "absent.safetensors"
    assert refusal(on_hub(path=str(file)).check) == (
        f"{file} does not exist: set model.path to a checkpoint or folder"
    )


@pytest.mark.parametrize(
    ("name", "kind", "choose"),
    [
        ("sdxl", "sd", "choose model=sd15 or sd21 with it"),
        ("sd15", "sdxl", "choose model=sdxl with it"),
        ("sd21", "sdxl", "choose model=sdxl with it"),
    ],
)
def test_a_folder_of_another_familys_class_is_refused(sd_folder, sdxl_folder, name, kind, choose):
    path = {"sd": sd_folder, "sdxl": sdxl_folder}[kind]
    with pytest.raises(ModelError, match=f"is no {name} model but a .*: {choose}"):
        Model(name, str(path)).check()


@pytest.mark.parametrize(("name", "width"), [("sd15", 1024), ("sd21", 768)])
def test_a_folder_of_the_other_sd_model_is_refused(copied, name, width):
    change(copied / CONFIG["unet"], cross_attention_dim=width)
    other = {"sd15": "sd21", "sd21": "sd15"}[name]
    with pytest.raises(ModelError, match=f"is no {name} model .*: choose model={other} with it"):
        Model(name, str(copied)).check()


def test_a_checkpoint_of_another_family_is_refused_with_the_one_to_choose(
    sd_folder, sdxl_folder, cache, tmp_path
):
    file = save_checkpoint(sd_folder, tmp_path / "small.safetensors")
    hub_cache(cache, HUB_ID, COMMIT, sdxl_folder)
    for ask in (on_hub(path=str(file)).check, lambda: on_hub(path=str(file)).load(CPU)):
        assert refusal(ask) == (
            f"{file} is no small model: it attends to text of 16 channels and small to 48: "
            "choose its family (768: model=sd15, 1024: model=sd21, 2048: model=sdxl)"
        )


def only(*prefixes: str) -> Callable[[dict[str, Tensor]], object]:
    def alter(weights: dict[str, Tensor]) -> None:
        for name in [name for name in weights if not name.startswith(prefixes)]:
            del weights[name]

    return alter


def as_lora(weights: dict[str, Tensor]) -> None:
    weights.clear()
    for number in range(3):
        layer = f"lora_unet_down_blocks_{number}_attentions_0_transformer_blocks_0_attn1_to_q"
        weights[f"{layer}.lora_down.weight"] = torch.zeros(4, 16)
        weights[f"{layer}.lora_up.weight"] = torch.zeros(16, 4)


def without(name: str) -> Callable[[dict[str, Tensor]], object]:
    def alter(weights: dict[str, Tensor]) -> None:
        del weights[next(each for each in sorted(weights) if name in each)]

    return alter


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (as_lora, "give a whole Stable Diffusion 1.5, 2.1 or XL model, not a LoRA, a VAE or"),
        (only("first_stage_model."), "model, not a LoRA, a VAE or another kind"),
        (only("alphas"), "has no self-attention or feed-forward weights in its down and mid and"),
        (only("model.diffusion_model."), "has no vae: give one with the text encoders and the"),
        (only("model.", "first_"), "has no text_encoder: give one with the text encoders and the"),
        (without("attn1.to_q"), ": fetch it again"),
        (without("time_embed.0.weight"), ": fetch it again"),
        (without("out.2.bias"), ": fetch it again"),
        (without("decoder.conv_out.bias"), ": fetch it again"),
        (without("layers.0.mlp.fc1.weight"), ": fetch it again"),
        (without("embeddings.position_embedding"), ": fetch it again"),
        (
            lambda weights: weights.update(
                {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)}
            ),
            "does not load: ",
        ),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(checkpoint, alter, message):
    change_weights(Path(checkpoint.path), alter)
    refused = refusal(lambda: checkpoint.load(CPU))
    assert message in refused
    assert refused.startswith(checkpoint.path)
    assert len(refused) < 700
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", ["resblocks.0.mlp.c_fc.weight", "text_projection", "ln_final"])
def test_a_damaged_second_text_encoder_is_refused_in_one_line(sdxl_folder, cache, tmp_path, name):
    hub_cache(cache, HUB_ID, COMMIT, sdxl_folder, only=["*.json", "*.txt"])
    file = save_checkpoint(sdxl_folder, tmp_path / "small.safetensors")
    change_weights(file, without(name))
    assert refusal(lambda: on_hub(path=str(file)).load(CPU)).endswith(": fetch it again")


@pytest.mark.parametrize("size", [0, 4, 1000, 300_000])
def test_a_cut_checkpoint_is_refused_in_one_line(checkpoint, size):
    file = Path(checkpoint.path)
    file.write_bytes(file.read_bytes()[:size])
    refused = refusal(lambda: checkpoint.load(CPU))
    assert re.fullmatch(rf"{file} is broken \(.*\): fetch it again", refused)


# A VAE that overflows in half precision


@pytest.fixture
def overflowing(copied_xl: Path) -> Path:
    """SDXL with a VAE whose activations are too large for float16, though its weights are not."""

    def enlarge(weights: dict[str, Tensor]) -> None:
        weights["decoder.conv_in.weight"] *= 1e5
        assert weights["decoder.conv_in.weight"].half().isfinite().all()

    change_weights(weights_file(copied_xl, "vae"), enlarge)
    change(copied_xl / CONFIG["vae"], force_upcast=True)
    return copied_xl


def test_a_vae_that_overflows_in_float16_draws_all_the_same(overflowing):
    pipe = model(overflowing, "float16").load(CPU)
    assert (pipe.unet.dtype, pipe.vae.dtype) == (torch.float16, torch.float32)
    assert draw(pipe).isfinite().all()


def test_without_upcasting_it_would_not(overflowing):
    pipe = StableDiffusionXLPipeline.from_pretrained(
        overflowing, dtype=torch.float16, add_watermarker=False
    )
    with pytest.raises(RenderError, match="are NaN or of one colour"):
        draw(pipe)


def test_in_bfloat16_the_vae_needs_no_upcasting(overflowing):
    pipe = model(overflowing, "bfloat16").load(CPU)
    assert pipe.vae.dtype == torch.bfloat16
    assert draw(pipe).isfinite().all()


def test_a_vae_that_does_not_overflow_stays_in_float16(copied_xl):
    change(copied_xl / CONFIG["vae"], force_upcast=False)
    assert model(copied_xl, "float16").load(CPU).vae.dtype == torch.float16


def test_the_vae_of_other_models_stays_in_float16_whatever_its_configuration_says(copied):
    # diffusers' default is to upcast, but only SDXL's pipeline reads it.
    change(copied / CONFIG["vae"], force_upcast=True)
    assert model(copied, "float16").load(CPU).vae.dtype == torch.float16


# Resolutions


def test_a_resolution_that_the_pipeline_can_draw_passes(sd_folder, deep_vae_folder):
    for folder in (sd_folder, deep_vae_folder):
        model(folder).check_resolution(Resolution(24, 40))


@pytest.mark.parametrize(
    ("asked", "nearest"), [("25x40", "24x40"), ("24x44", "24x48"), ("2x2", "8x8")]
)
def test_a_resolution_that_8_does_not_divide_is_refused_with_the_nearest(
    sd_folder, asked, nearest
):
    with pytest.raises(ModelError) as caught:
        model(sd_folder).check_resolution(Resolution.parse(asked))
    assert str(caught.value) == (
        f"resolution {asked} is not divisible by 8, as small needs: the nearest is res={nearest}"
    )


def test_the_vae_factor_is_read_from_its_config(sd_folder, deep_vae_folder):
    assert model(sd_folder).vae_factor == 2
    assert model(deep_vae_folder).vae_factor == 8


def test_the_vae_factor_is_that_of_the_loaded_pipeline(folder, pipe):
    assert model(folder).vae_factor == pipe.vae_scale_factor


# What is known without loading


def test_the_prunable_weights_of_the_file_are_those_of_the_loaded_unet(folder, checkpoint):
    loaded = model(folder).load(CPU).unet
    assert model(folder).num_prunable() == pruning.num_prunable(loaded)
    assert checkpoint.num_prunable() == pruning.num_prunable(loaded)


@pytest.mark.parametrize("size", [0, 4, 1000])
def test_the_prunable_weights_of_a_broken_file_are_refused(copied, size):
    file = weights_file(copied, "unet")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ModelError, match=r"safetensors is broken .*: fetch the model again"):
        model(copied).num_prunable()


def test_the_prunable_weights_of_no_file_are_refused(copied):
    weights_file(copied, "unet").unlink()
    with pytest.raises(ModelError, match="safetensors is missing: fetch the model again"):
        model(copied).num_prunable()


def in_memory(pipe: Any) -> int:
    """The bytes of all weights of a pipeline, each once."""
    storages = {
        storage.data_ptr(): storage.nbytes()
        for part in pipe.components.values()
        if isinstance(part, torch.nn.Module)
        for storage in (weight.untyped_storage() for weight in part.parameters())
    }
    return sum(storages.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("force_upcast", [True, False])
def test_its_bytes_are_those_in_memory_once_cr_diff_is_applied(
    copied_of_each, dtype, force_upcast
):
    change(copied_of_each / CONFIG["vae"], force_upcast=force_upcast)
    found = model(copied_of_each, dtype)
    pipe = found.load(CPU)
    apply(pipe, BlockRatios(0.4, 0.6, 0.5))
    assert found.num_bytes() == in_memory(pipe)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checkpoints_bytes_are_those_in_memory_whatever_else_is_in_it(checkpoint, dtype):
    change_weights(
        Path(checkpoint.path),
        lambda weights: weights.update({"model_ema.conv_inweight": torch.zeros(1000)}),
    )
    found = on_hub(dtype, path=checkpoint.path)
    pipe = found.load(CPU)
    apply(pipe, BlockRatios(0.4, 0.6, 0.5))
    assert found.num_bytes() == in_memory(pipe)


def test_its_bytes_are_those_of_the_half_precision_files_if_these_are_loaded(copied):
    before = model(copied, "float16").num_bytes()
    add_halves(copied, *parts_of(copied))
    assert model(copied, "float16").num_bytes() == before


def test_the_schedulers_name_is_its_class(sd_folder):
    assert model(sd_folder).scheduler == "DPMSolverMultistepScheduler"


def test_the_schedulers_name_is_that_of_the_one_that_is_loaded(copied):
    # Published models often name another in the scheduler's own file.
    change(copied / "model_index.json", scheduler=["diffusers", "EulerDiscreteScheduler"])
    found = model(copied)
    assert type(found.load(CPU).scheduler).__name__ == found.scheduler == "EulerDiscreteScheduler"


def test_only_sdxl_is_told_a_pictures_size(sd_folder, sdxl_folder):
    assert not model(sd_folder).is_size_conditioned
    assert model(sdxl_folder).is_size_conditioned


def test_the_embedded_model_is_whole():
    Model("shapes").check()


# Revisions


def test_a_copy_has_the_same_revision(sd_folder, copied):
    assert model(copied).revision == model(sd_folder).revision


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_one_changed_weight_byte_is_another_revision(sd_folder, copied, part):
    file = weights_file(copied, part)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert model(copied).revision != model(sd_folder).revision


def test_one_changed_byte_of_whatever_is_loaded_is_another_revision(copied_xl):
    before = model(copied_xl).revision
    files = [file for file in sorted(copied_xl.glob("*/*")) if file.parent.name != "_tokenizer"]
    assert len(files) == 4 * 2 + 1 + 2 * 2
    for file in [copied_xl / "model_index.json", *files]:
        content = file.read_bytes()
        file.write_bytes(content + b" ")
        assert model(copied_xl).revision != before, file
        file.write_bytes(content)
    assert model(copied_xl).revision == before


def test_a_changed_config_is_another_revision(sd_folder, copied):
    config = copied / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.02", "0.03"))
    assert model(copied).revision != model(sd_folder).revision


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/model.onnx",
        "vae_1_0/diffusion_pytorch_model.safetensors",
        "vae_1_0/config.json",
        "safety_checker/model.safetensors",
        "safety_checker/config.json",
        "sd_xl_base_1.0.safetensors",
        ".cache/huggingface/trees/main.json",
    ],
)
def test_what_is_not_loaded_is_not_of_the_revision(sd_folder, copied, name):
    (copied / name).parent.mkdir(parents=True, exist_ok=True)
    (copied / name).write_text("fetched in November")
    assert model(copied).revision == model(sd_folder).revision


def test_half_precision_files_are_of_the_revision_of_float16_alone(sd_folder, copied):
    add_halves(copied, *parts_of(copied))
    assert model(copied).revision == model(sd_folder).revision
    assert model(copied, "float16").revision != model(sd_folder, "float16").revision


def test_a_model_sent_elsewhere_looks_for_itself_there(copied):
    found = model(copied)
    before = found.revision
    mark(copied, "unet", 7)
    sent = pickle.loads(pickle.dumps(found))
    assert sent == found
    assert vars(sent).keys() == {"name", "path", "dtype", "hub_id", "hub_revision"}
    assert sent.revision != before


# Finding a model


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("shapes", Model("shapes", dtype="float16")),
        (HUB_ID, Model("small", "", "float16", HUB_ID, COMMIT)),
        ("other/sd-2.1", Model("sd-2.1", "", "float16", "other/sd-2.1", "main")),
        ("models/a.safetensors", Model("a", "models/a.safetensors", "float16", HUB_ID, COMMIT)),
        ("models/a.ckpt", Model("a", "models/a.ckpt", "float16", HUB_ID, COMMIT)),
        ("./absent", Model("absent", "./absent", "float16", HUB_ID, COMMIT)),
        ("../absent", Model("absent", "../absent", "float16", HUB_ID, COMMIT)),
        ("/a/b/sdxl-1.0/", Model("sdxl-1.0", "/a/b/sdxl-1.0/", "float16", HUB_ID, COMMIT)),
        ("~/sdxl", Model("sdxl", "~/sdxl", "float16", HUB_ID, COMMIT)),
    ],
)
def test_a_person_means_an_embedded_name_a_path_or_a_hub_id(source, expected):
    assert Model.find(source, "float16", HUB_ID, COMMIT) == expected


def test_an_existing_folder_is_meant_rather_than_a_hub_id(copied, monkeypatch):
    monkeypatch.chdir(copied.parent.parent)
    source = f"{copied.parent.name}/model"
    assert Model.find(source, "float32") == Model("model", source)
    monkeypatch.chdir(copied)
    found = Model.find(".", "float32")
    assert found.name == "model"
    assert found.load(CPU).unet is not None


def test_an_embedded_model_is_not_the_hubs(cache):
    found = Model("shapes", hub_id=HUB_ID)
    assert found.folder == EMBEDDED["shapes"]
    assert found.revision == Model("shapes").revision


def test_every_part_of_the_loaded_pipeline_is_of_its_usual_class(pipe):
    assert isinstance(pipe.unet, UNet2DConditionModel)
    assert isinstance(pipe.vae, AutoencoderKL)
    assert isinstance(pipe.text_encoder, CLIPTextModel)
