"""ImageReward on a small architecture: real tokenizer, real BLIP classes, random weights."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from crdiff_core.errors import RewardError
from crdiff_core.rewards import Resize, load_reward
from crdiff_core.rewards.image_reward import Architecture, ImageReward
from crdiff_core.rewards.image_reward_package import ImageRewardPackage

VOCABULARY = (
    "[PAD] [unused0] [UNK] [CLS] [SEP] [MASK] a red blue cat dog sits on the mat ##s ! , 1 2"
).split()
SMALL = Architecture(
    image_size=32,
    patch_size=8,
    vision_width=16,
    vision_mlp_width=32,
    num_vision_layers=2,
    num_vision_heads=2,
    vocab_size=len(VOCABULARY) + 2,
    text_width=12,
    text_mlp_width=24,
    num_text_layers=2,
    num_text_heads=3,
    head_widths=(10, 8, 6, 4),
)
COMMIT = "5736be03b2652728fb87788c9797b0570450ab72"
PROMPTS = ["a red cat", "the blue dogs sits on a mat!", "a cat, a dog"]


class SmallImageReward(ImageReward):
    _architecture = SMALL


def random_weights(
    seed: int = 0, size: Architecture = SMALL, scale: float = 0.4
) -> dict[str, Tensor]:
    """A state dict with the names and shapes that ImageReward.pt has, at these sizes."""
    patch = size.patch_size
    num_patches = (size.image_size // patch) ** 2
    vision, text, mlp = size.vision_width, size.text_width, size.text_mlp_width
    shapes: dict[str, tuple[int, ...]] = {
        "blip.visual_encoder.cls_token": (1, 1, vision),
        "blip.visual_encoder.pos_embed": (1, num_patches + 1, vision),
        "blip.visual_encoder.patch_embed.proj.weight": (vision, 3, patch, patch),
        "blip.visual_encoder.patch_embed.proj.bias": (vision,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (size.vocab_size, text),
        "blip.text_encoder.embeddings.position_embeddings.weight": (512, text),
    }

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    for n in range(size.num_vision_layers):
        block = f"blip.visual_encoder.blocks.{n}"
        norm(f"{block}.norm1", vision)
        linear(f"{block}.attn.qkv", vision, 3 * vision)
        linear(f"{block}.attn.proj", vision, vision)
        norm(f"{block}.norm2", vision)
        linear(f"{block}.mlp.fc1", vision, size.vision_mlp_width)
        linear(f"{block}.mlp.fc2", size.vision_mlp_width, vision)
    norm("blip.visual_encoder.norm", vision)
    norm("blip.text_encoder.embeddings.LayerNorm", text)
    for n in range(size.num_text_layers):
        layer = f"blip.text_encoder.encoder.layer.{n}"
        for attention, source in (("attention", text), ("crossattention", vision)):
            linear(f"{layer}.{attention}.self.query", text, text)
            linear(f"{layer}.{attention}.self.key", source, text)
            linear(f"{layer}.{attention}.self.value", source, text)
            linear(f"{layer}.{attention}.output.dense", text, text)
            norm(f"{layer}.{attention}.output.LayerNorm", text)
        linear(f"{layer}.intermediate.dense", text, mlp)
        linear(f"{layer}.output.dense", mlp, text)
        norm(f"{layer}.output.LayerNorm", text)
    linear("blip.vision_proj", vision, 5)
    linear("blip.text_proj", text, 5)
    widths = (text, *size.head_widths, 1)
    for position, inputs, outputs in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        linear(f"mlp.layers.{position}", inputs, outputs)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(shape, generator=generator) * (scale if len(shape) > 1 else scale / 4)
        for name, shape in shapes.items()
    }
    for name in weights:
        if "norm" in name.lower() and name.endswith(".weight"):
            weights[name] += 1
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    return weights


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights()


@pytest.fixture
def file(weights: dict[str, Tensor], tmp_path: Path) -> Path:
    torch.save(weights, tmp_path / "ImageReward.pt")
    return tmp_path / "ImageReward.pt"


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def reward(file: Path, vocabulary: Path) -> ImageReward:
    return SmallImageReward(path=str(file), tokenizer=str(vocabulary))


@pytest.fixture
def cropping(file: Path, vocabulary: Path) -> ImageReward:
    """The reward as the package gives it."""
    return SmallImageReward(path=str(file), tokenizer=str(vocabulary), resize="none")


@pytest.fixture
def images() -> Tensor:
    """Three smooth pictures; noise would all be averaged away."""
    coarse = torch.rand(3, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, (48, 64), mode="bilinear")


@pytest.fixture
def cache(file: Path, vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache with weights and vocabulary, as `hf download` leaves it."""
    for repo, source, commit in (
        ("models--zai-org--ImageReward", file, COMMIT),
        ("models--google-bert--bert-base-uncased", vocabulary / "vocab.txt", "b" * 40),
    ):
        snapshot = tmp_path / "hub" / repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        shutil.move(source, snapshot)
        (tmp_path / "hub" / repo / "refs").mkdir()
        (tmp_path / "hub" / repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def message(caught: pytest.ExceptionInfo[RewardError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The score


def score_by_hand(weights: dict[str, Tensor], pixels: Tensor, ids: list[int]) -> float:
    """ImageReward-v1.0 of one preprocessed picture, from the paper's formulas alone."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        width = q.shape[1] // heads
        mixed = []
        for part in range(heads):
            columns = slice(part * width, (part + 1) * width)
            share = (q[:, columns] @ k[:, columns].T / width**0.5).softmax(-1)
            mixed.append(share @ v[:, columns])
        return torch.cat(mixed, 1)

    vit = "blip.visual_encoder"
    patches = pixels.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).reshape(16, -1)
    x = patches @ weights[f"{vit}.patch_embed.proj.weight"].flatten(1).T
    x = torch.cat([weights[f"{vit}.cls_token"][0], x + weights[f"{vit}.patch_embed.proj.bias"]])
    x = x + weights[f"{vit}.pos_embed"][0]
    for n in range(SMALL.num_vision_layers):
        block = f"{vit}.blocks.{n}"
        q, k, v = linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, 1)
        x = x + linear(attend(q, k, v, SMALL.num_vision_heads), f"{block}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
        x = x + linear(hidden, f"{block}.mlp.fc2")
    picture = norm(x, f"{vit}.norm", 1e-6)

    bert = "blip.text_encoder"
    x = weights[f"{bert}.embeddings.word_embeddings.weight"][ids]
    x = x + weights[f"{bert}.embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x, f"{bert}.embeddings.LayerNorm", 1e-12)
    for n in range(SMALL.num_text_layers):
        layer = f"{bert}.encoder.layer.{n}"
        for attention, source in (("attention", None), ("crossattention", picture)):
            part = f"{layer}.{attention}"
            seen = x if source is None else source
            q = linear(x, f"{part}.self.query")
            k, v = linear(seen, f"{part}.self.key"), linear(seen, f"{part}.self.value")
            out = linear(attend(q, k, v, SMALL.num_text_heads), f"{part}.output.dense")
            x = norm(x + out, f"{part}.output.LayerNorm", 1e-12)
        hidden = F.gelu(linear(x, f"{layer}.intermediate.dense"))
        x = norm(x + linear(hidden, f"{layer}.output.dense"), f"{layer}.output.LayerNorm", 1e-12)
    x = x[:1]
    for position in (0, 2, 4, 6, 7):
        x = linear(x, f"mlp.layers.{position}")
    return (float(x) - 0.16717362830052426) / 1.0333394966054072


def test_score_is_the_one_computed_by_hand(cropping, weights, images):
    small = (F.interpolate(images, (32, 32), mode="area") * 255).round() / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    sentence = [VOCABULARY.index(word) for word in "[CLS] a red cat ##s [UNK] ! [SEP]".split()]
    expected = [score_by_hand(weights, (image - mean) / std, sentence) for image in small]
    assert cropping(small, ["A red cats zebra!"] * 3) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.1


def test_batch_scores_as_one_at_a_time(reward, images):
    alone = [reward(images[i : i + 1], PROMPTS[i : i + 1])[0] for i in range(3)]
    assert reward(images, PROMPTS) == pytest.approx(alone, abs=1e-5)


def test_more_pictures_than_one_chunk_score_alike(reward, images):
    expected = reward(images, PROMPTS) * 15
    assert reward(images.repeat(15, 1, 1, 1), PROMPTS * 15) == pytest.approx(expected, abs=1e-5)


def test_neighbours_do_not_change_a_score(reward, images):
    first = reward(images[:2], ["a red cat", "a dog"])[0]
    other = reward(torch.stack([images[0], images[2]]), ["a red cat", "the mat " * 20])[0]
    assert first == pytest.approx(other, abs=1e-5)


def test_prompt_matters(reward, images):
    same = images[:1].expand(3, -1, -1, -1)
    scores = reward(same, PROMPTS)
    assert min(abs(a - b) for i, a in enumerate(scores) for b in scores[:i]) > 0.01


def test_picture_matters(reward, images):
    scores = reward(images, ["a cat"] * 3)
    assert min(abs(a - b) for i, a in enumerate(scores) for b in scores[:i]) > 0.01


def test_text_beyond_35_tokens_is_not_seen(reward, images):
    # [CLS] and [SEP] are two of them.
    kept, cut = "a " * 33, "a " * 33 + "red dog"
    assert reward(images[:1], [kept]) == reward(images[:1], [cut])
    assert reward(images[:1], [kept]) != reward(images[:1], ["a " * 32])


def test_same_call_gives_the_same_scores(reward, images):
    assert reward(images, PROMPTS) == reward(images, PROMPTS)


def resized_by_pil(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Along the width first, as Pillow always did before 13."""
    for size in ((width, picture.height), (width, height)):
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    return picture


def as_picture(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def pixels_of_pil(image: Tensor, resize: Resize) -> Image.Image:
    """What the small network sees of a (3, H, W) picture, resized by PIL."""
    picture = as_picture(image)
    if resize == 256:
        picture = resized_by_pil(picture, 256, 256)
    width, height = (int(32 * side / min(picture.size)) for side in picture.size)
    left, top = round((width - 32) / 2), round((height - 32) / 2)
    return resized_by_pil(picture, width, height).crop((left, top, left + 32, top + 32))


@pytest.mark.parametrize("resize", [256, "none"])
@pytest.mark.parametrize("size", [(48, 64), (64, 48), (32, 32), (20, 31), (400, 560), (480, 360)])
def test_pixels_are_those_of_pil(reward, size, resize):
    generator = torch.Generator().manual_seed(2)
    coarse = torch.rand(1, 3, 7, 7, generator=generator)
    image = (F.interpolate(coarse, size, mode="nearest") * 255).round() / 255
    network = reward._network
    pixels = network.preprocess(image, resize)[0] * network.pixel_std + network.pixel_mean
    expected = np.asarray(pixels_of_pil(image[0], resize), np.float32)
    difference = (pixels * 255).permute(1, 2, 0).numpy() - expected
    # PIL counts in fixed point: at a tie the two may round apart, in any pass.
    assert abs(difference).max() < 2.01
    assert (abs(difference) > 0.01).mean() < 0.02


@pytest.mark.parametrize("size", [(400, 560), (480, 360)])
def test_squashed_pictures_score_as_those_that_pil_squashes(reward, cropping, size):
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(3, 3, 9, 9, generator=generator)
    images = (F.interpolate(coarse, size, mode="bicubic").clamp(0, 1) * 255).round() / 255
    squashed = [np.array(resized_by_pil(as_picture(image), 256, 256)) for image in images]
    expected = cropping(torch.from_numpy(np.stack(squashed)).permute(0, 3, 1, 2) / 255, PROMPTS)
    assert reward(images, PROMPTS) == pytest.approx(expected, abs=1.3e-3)
    assert min(abs(a - b) for i, a in enumerate(expected) for b in expected[:i]) > 0.01


# (size, axis of an edge, pixels there that the package's transforms cut off whole): 27% and 24%.
EDGES = [((400, 560), 3, 76), ((480, 360), 2, 57)]


@pytest.mark.parametrize(("size", "axis", "width"), EDGES)
@pytest.mark.parametrize("side", ["first", "last"])
def test_what_is_drawn_at_the_edges_is_seen_unless_the_picture_is_cropped(
    reward, size, axis, width, side
):
    network = reward._network
    network.image_size = 224  # As the real one.
    dark = torch.full((1, 3, *size), 0.2)
    drawn = dark.clone()
    drawn.narrow(axis, 0 if side == "first" else size[axis - 2] - width, width).fill_(1.0)

    cropped, squashed = (
        network.preprocess(drawn, resize) - network.preprocess(dark, resize)
        for resize in ("none", 256)
    )
    assert not cropped.any()
    share = squashed.abs().amax((0, 1)).gt(1).float().mean()
    assert float(share) == pytest.approx(width / size[axis - 2], abs=0.01)


def test_picture_scores_as_its_8_bit_file(reward, images):
    quantised = (images * 255).round() / 255
    assert reward(images, PROMPTS) == reward(quantised, PROMPTS)


def test_pictures_of_any_float_dtype_are_scored_in_float32(reward, images):
    quantised = (images * 255).round() / 255
    assert reward(quantised.half(), PROMPTS) == pytest.approx(reward(quantised, PROMPTS), abs=1e-5)


def test_autocast_around_it_changes_nothing(reward, images):
    expected = reward(images, PROMPTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert reward(images, PROMPTS) == expected


def test_nothing_to_score_gives_no_scores(reward):
    assert reward(torch.zeros(0, 3, 8, 8), []) == []


@pytest.mark.parametrize(
    ("shape", "num_prompts"),
    [((3, 8, 8), 3), ((2, 4, 8, 8), 2), ((2, 3, 8, 8), 1), ((1, 3, 0, 8), 1)],
)
def test_wrong_shapes_are_refused(reward, shape, num_prompts):
    with pytest.raises(RewardError, match=r"give it \(N, 3, H, W\) and N prompts") as caught:
        reward(torch.zeros(shape), ["a"] * num_prompts)
    message(caught)


def test_host_never_waits_for_the_device_while_it_scores(reward):
    # Meta tensors have no values: whatever needs one, as a wait for the GPU does, raises.
    network = reward._network.to("meta")
    pixels = network.preprocess(torch.zeros(2, 3, 48, 64, device="meta"), 256)
    tokens = torch.zeros(2, 2, 35, dtype=torch.long, device="meta")
    assert network(pixels, tokens).shape == (2,)


@pytest.mark.gpu
def test_gpu_scores_as_the_cpu(reward, images):
    expected = reward(images, PROMPTS)
    # cuDNN multiplies in TF32 in the patch embedding.
    assert reward(images.cuda(), PROMPTS) == pytest.approx(expected, abs=0.02)
    assert reward(images, PROMPTS) == pytest.approx(expected, abs=1e-5)


# Weights


def test_nothing_is_read_before_it_is_asked_for():
    reward = ImageReward(path="/nowhere/ImageReward.pt", tokenizer="/nowhere")
    assert reward.name == "image_reward"


def test_safetensors_score_as_the_pickle(reward, weights, images, vocabulary, tmp_path):
    save_file(weights, tmp_path / "weights.safetensors")
    other = SmallImageReward(str(tmp_path / "weights.safetensors"), tokenizer=str(vocabulary))
    assert other(images, PROMPTS) == reward(images, PROMPTS)


def test_half_precision_weights_are_scored_in_float32(weights, images, vocabulary, tmp_path):
    scores = []
    for name, dtype in (("half", torch.float16), ("whole", torch.float32)):
        rounded = {key: value.half().to(dtype) for key, value in weights.items()}
        torch.save(rounded, tmp_path / f"{name}.pt")
        other = SmallImageReward(str(tmp_path / f"{name}.pt"), tokenizer=str(vocabulary))
        scores.append(other(images, PROMPTS))
    assert scores[0] == scores[1]


def test_old_pickles_without_a_zip_load(reward, weights, images, vocabulary, tmp_path):
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    old = SmallImageReward(str(tmp_path / "old.pt"), tokenizer=str(vocabulary))
    assert old(images, PROMPTS) == reward(images, PROMPTS)


def test_weights_and_vocabulary_come_from_the_hub_cache(cache, images, weights, tmp_path):
    reward = SmallImageReward()
    assert reward.version.startswith(f"v1.0-{COMMIT[:12]}-")
    assert len(reward(images, PROMPTS)) == 3


def test_commit_finds_the_same_as_its_branch(cache):
    pinned = SmallImageReward(hub_revision=COMMIT, tokenizer_revision="b" * 40)
    assert pinned.version == SmallImageReward().version


def test_version_follows_the_weights(reward, vocabulary, tmp_path):
    torch.save(random_weights(seed=1), tmp_path / "other.pt")
    other = SmallImageReward(str(tmp_path / "other.pt"), tokenizer=str(vocabulary))
    assert other.version != reward.version
    assert other.version.split("-")[2] == reward.version.split("-")[2]


def test_version_without_a_resize_is_that_of_ledgers_from_before_it(cropping, file, vocabulary):
    weights, words = (
        hashlib.sha256(each.read_bytes()).hexdigest() for each in (file, vocabulary / "vocab.txt")
    )
    assert cropping.version == f"v1.0-{weights[:12]}-{words[:8]}"


def test_version_names_the_resize(reward, cropping):
    assert reward.version == f"{cropping.version}-resize256"


def test_version_follows_the_vocabulary(reward, file, vocabulary):
    before = reward.version
    words = [*VOCABULARY[:-1], "three"]
    (vocabulary / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    assert SmallImageReward(str(file), tokenizer=str(vocabulary)).version != before


def test_version_is_the_same_wherever_the_file_lies(reward, file, vocabulary, tmp_path):
    moved = shutil.copy(file, tmp_path / "renamed.pt")
    assert SmallImageReward(str(moved), tokenizer=str(vocabulary)).version == reward.version


# What cannot be used


@pytest.mark.parametrize("use", ["version", "score"])
def test_missing_hub_weights_name_the_command(use, tmp_path, monkeypatch, images, vocabulary):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    reward = SmallImageReward(hub_revision=COMMIT, tokenizer=str(vocabulary))
    with pytest.raises(RewardError) as caught:
        _ = reward.version if use == "version" else reward(images, PROMPTS)
    assert message(caught) == (
        f"ImageReward.pt of zai-org/ImageReward at {COMMIT} is not in the Hugging Face cache "
        f"{tmp_path / 'empty'}: run hf download zai-org/ImageReward ImageReward.pt "
        f"--revision {COMMIT}"
    )


def test_missing_hub_vocabulary_names_the_command(file, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    with pytest.raises(RewardError) as caught:
        _ = SmallImageReward(path=str(file)).version
    command = "hf download google-bert/bert-base-uncased vocab.txt --revision main"
    assert message(caught).endswith(command)


def test_impossible_hub_name_is_refused(file):
    with pytest.raises(RewardError, match=r"'/no/such/folder' is neither a folder nor a hub"):
        _ = SmallImageReward(path=str(file), tokenizer="/no/such/folder").version


def test_missing_file_is_named(vocabulary):
    with pytest.raises(
        RewardError, match=r"^/nowhere/x\.pt is no file: set reward\.path"
    ) as caught:
        _ = SmallImageReward(path="/nowhere/x.pt", tokenizer=str(vocabulary)).version
    message(caught)


def test_tokenizer_folder_without_vocabulary_is_refused(file, tmp_path):
    with pytest.raises(RewardError, match=r"holds no vocab\.txt: set reward\.tokenizer") as caught:
        _ = SmallImageReward(path=str(file), tokenizer=str(tmp_path)).version
    message(caught)


@pytest.mark.parametrize(
    "words",
    [VOCABULARY[:-1], [*VOCABULARY, "more"], ["[pad]", *VOCABULARY[1:]]],
    ids=["short", "long", "no [PAD]"],
)
def test_other_vocabulary_is_refused(reward, vocabulary, images, words):
    (vocabulary / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    with pytest.raises(RewardError, match=rf"not the {len(VOCABULARY)} of bert-base") as caught:
        reward(images, PROMPTS)
    message(caught)


def test_vocabulary_that_is_no_text_is_refused(reward, vocabulary, images):
    (vocabulary / "vocab.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RewardError, match=r"is unreadable .*: set reward\.tokenizer") as caught:
        reward(images, PROMPTS)
    message(caught)


def replace(weights: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    changed = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    both = {**weights, **changed}
    return {name: tensor for name, tensor in both.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mlp__layers__7__bias": None}, r"it lacks head\.7\.bias: set"),
        ({"extra__weight": torch.zeros(1)}, r"it has unknown extra\.weight: set"),
        ({"mlp__layers__7__bias": torch.zeros(2)}, r"it has misshapen head\.7\.bias \(2,\): set"),
    ],
    ids=["lacks", "unknown", "misshapen"],
)
def test_other_weights_are_refused(reward, file, weights, images, changes, reason):
    torch.save(replace(weights, **changes), file)
    with pytest.raises(RewardError, match=f"is not ImageReward-v1.0: {reason}") as caught:
        reward(images, PROMPTS)
    message(caught)


def test_only_the_first_few_wrong_names_are_listed(reward, file, weights, images):
    torch.save({name: tensor for name, tensor in weights.items() if "layer.1" not in name}, file)
    with pytest.raises(
        RewardError, match=r"lacks text\.encoder\.layer\.1\S+, \S+, \S+ and 23 more"
    ):
        reward(images, PROMPTS)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04"])
def test_file_that_is_no_checkpoint_is_refused(reward, file, images, content):
    file.write_bytes(content)
    with pytest.raises(
        RewardError, match=r"is not ImageReward-v1\.0: .*: set reward\.path"
    ) as caught:
        reward(images, PROMPTS)
    message(caught)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_truncated_file_is_refused(weights, tmp_path, vocabulary, images, kind, share):
    file = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pt")
    if kind == "safetensors":
        save_file(weights, file)
    else:
        torch.save(weights, file, _use_new_zipfile_serialization=kind == "zip")
    os.truncate(file, int(file.stat().st_size * share))
    with pytest.raises(RewardError, match=r"x\.\w+ is not ImageReward-v1\.0: ") as caught:
        SmallImageReward(str(file), tokenizer=str(vocabulary))(images, PROMPTS)
    message(caught)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {1: torch.zeros(1)}])
def test_checkpoint_of_something_else_is_refused(reward, file, images, content):
    torch.save(content, file)
    with pytest.raises(RewardError, match=r"it is no table of tensors by name") as caught:
        reward(images, PROMPTS)
    message(caught)


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("kind", ["zip", "old", "bare pickle"])
def test_code_in_a_pickle_is_refused_and_does_not_run(
    reward, file, weights, images, tmp_path, kind
):
    hostile = {**weights, "mlp.layers.7.bias": Hostile(tmp_path / "ran")}
    if kind == "bare pickle":
        file.write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    else:
        torch.save(hostile, file, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(RewardError, match=r"is not ImageReward-v1\.0: ") as caught:
        reward(images, PROMPTS)
    message(caught)
    assert not (tmp_path / "ran").exists()


def test_broken_hub_file_says_to_download_again(cache, images):
    (file,) = cache.rglob("ImageReward.pt")
    file.write_bytes(b"half a file")
    with pytest.raises(RewardError) as caught:
        SmallImageReward()(images, PROMPTS)
    assert message(caught).endswith(
        ": run hf download zai-org/ImageReward ImageReward.pt --revision main --force-download"
    )


# The table of rewards


def test_options_reach_the_reward():
    reward = load_reward("image_reward", path="/some/file", hub_revision="abc")
    assert isinstance(reward, ImageReward)
    assert (reward.path, reward.hub_revision) == ("/some/file", "abc")


@pytest.mark.parametrize("name", ["image_reward", "image_reward_package"])
@pytest.mark.parametrize("resize", [224, None, "256"])
def test_unknown_resize_is_refused(name, resize):
    with pytest.raises(RewardError, match=r"^resize .* is unknown: give 256, .* none") as caught:
        load_reward(name, resize=resize)
    message(caught)


@pytest.mark.parametrize(
    ("name", "remedy"), [("image_reward", "choose among path, hub_id"), ("shapes", "no options")]
)
def test_unknown_option_is_refused(name, remedy):
    with pytest.raises(RewardError, match=f"reward {name} takes no colour: .*{remedy}") as caught:
        load_reward(name, colour="red")
    message(caught)


# The package


class FakePackage:
    """What the package image-reward offers, with a score that can be foretold."""

    def __init__(self) -> None:
        self.loaded: list[tuple[str, str]] = []
        self.seen: list[Image.Image] = []

    def load(self, name: str, device: str) -> FakePackage:
        self.loaded.append((name, device))
        return self

    def score(self, prompt: str, image: Image.Image) -> float:
        assert image.mode == "RGB"
        self.seen.append(image)
        return len(prompt) + float(np.asarray(image)[0, 0, 0])


@pytest.mark.parametrize("use", ["version", "score"])
def test_package_that_does_not_import_says_what_to_use(use, images):
    # Here it is not installed; where it is, it does not import on this transformers.
    reward = load_reward("image_reward_package")
    assert reward.name == "image_reward_package"
    with pytest.raises(
        RewardError, match=r"does not import: .*: use reward=image_reward$"
    ) as caught:
        _ = reward.version if use == "version" else reward(images, PROMPTS)
    message(caught)


def test_package_scores_each_picture_with_its_prompt(images):
    reward = ImageRewardPackage(resize="none")
    reward._package = package = FakePackage()
    corner = (images[:, 0, 0, 0] * 255).round().tolist()
    expected = [value + len(prompt) for value, prompt in zip(corner, PROMPTS, strict=True)]
    assert reward(images, PROMPTS) == reward(images, PROMPTS) == expected
    assert package.loaded == [("ImageReward-v1.0", "cpu")]


@pytest.mark.parametrize(("resize", "size"), [(256, (256, 256)), ("none", (64, 48))])
def test_package_sees_the_picture_squashed_by_pil_or_as_it_is(images, resize, size):
    reward = ImageRewardPackage(resize)
    reward._package = package = FakePackage()
    reward(images[:1], PROMPTS[:1])
    assert package.seen == [resized_by_pil(as_picture(images[0]), *size)]


def test_package_version_names_the_resize(monkeypatch):
    versions = {"image-reward": "1.5"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    found = {}
    for resize in (256, "none"):
        reward = ImageRewardPackage(resize)
        reward._package = FakePackage()
        found[resize] = reward.version
    assert found == {"none": "1.5-ImageReward-v1.0", 256: "1.5-ImageReward-v1.0-resize256"}


def test_package_without_weights_says_what_to_use(images):
    def load(name: str, device: str) -> None:
        raise OSError("no route\nto the hub")

    reward = ImageRewardPackage()
    reward._package = FakePackage()
    reward._package.load = load
    with pytest.raises(RewardError, match=r"does not load: no route to the hub: use") as caught:
        reward(images, PROMPTS)
    message(caught)


def test_package_refuses_wrong_shapes():
    with pytest.raises(RewardError, match=r"give it \(N, 3, H, W\)"):
        ImageRewardPackage()(torch.zeros(1, 1, 8, 8), ["a"])
