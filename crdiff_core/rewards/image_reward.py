"""ImageReward-v1.0, a learned human preference, on transformers' own BLIP classes."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crdiff_core.errors import RewardError
from crdiff_core.rewards import Resize, checked_resize, resize_suffix

if TYPE_CHECKING:
    from transformers import BertTokenizer

MAX_TOKENS = 35
"""Longer texts are cut here, [CLS] and [SEP] included."""

# By which its authors normalise the network's raw output.
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
_PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
_PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
# Pictures scored at once, so that they need less than 1 GiB beside the weights.
_CHUNK = 32

_WEIGHTS, _VOCABULARY = "ImageReward.pt", "vocab.txt"
# Without these it is no vocabulary of BERT's.
_MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# What ImageReward.pt calls its weights -> what transformers calls them, applied in this order.
_RENAMED = (
    ("blip.text_encoder.", "text."),
    ("blip.visual_encoder.cls_token", "vision.embeddings.class_embedding"),
    ("blip.visual_encoder.pos_embed", "vision.embeddings.position_embedding"),
    ("blip.visual_encoder.patch_embed.proj.", "vision.embeddings.patch_embedding."),
    ("blip.visual_encoder.blocks.", "vision.encoder.layers."),
    ("blip.visual_encoder.norm.", "vision.post_layernorm."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
    ("mlp.layers.", "head."),
)
# BLIP's contrastive projections, and positions that are counted anyway: the score uses neither.
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")


@dataclass(frozen=True)
class Architecture:
    """Sizes of the network; the defaults are ImageReward-v1.0's.

    vocab_size: the vocabulary's tokens and two more, [DEC] and [ENC].
    image_size: pixels each way; patch_size divides it.
    """

    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 1024
    vision_mlp_width: int = 4096
    num_vision_layers: int = 24
    num_vision_heads: int = 16
    vocab_size: int = 30524
    text_width: int = 768
    text_mlp_width: int = 3072
    num_text_layers: int = 12
    num_text_heads: int = 12
    head_widths: tuple[int, ...] = (1024, 128, 64, 16)


class Network(nn.Module):
    """A vision transformer, a text encoder that looks at the picture, and a head.

    Its weights are not initialised: they are to be loaded.
    Source: ImageReward (arXiv:2304.05977), section 3.1; BLIP (arXiv:2201.12086).
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        # They take seconds to import, and the driver only asks for the version.
        from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
        from transformers.initialization import no_init_weights
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        self.image_size = architecture.image_size
        with no_init_weights():
            self.vision = BlipVisionModel(
                BlipVisionConfig(
                    hidden_size=architecture.vision_width,
                    intermediate_size=architecture.vision_mlp_width,
                    num_hidden_layers=architecture.num_vision_layers,
                    num_attention_heads=architecture.num_vision_heads,
                    image_size=architecture.image_size,
                    patch_size=architecture.patch_size,
                    layer_norm_eps=1e-6,
                )
            )
            self.text = BlipTextModel(
                BlipTextConfig(
                    vocab_size=architecture.vocab_size,
                    hidden_size=architecture.text_width,
                    encoder_hidden_size=architecture.vision_width,
                    intermediate_size=architecture.text_mlp_width,
                    num_hidden_layers=architecture.num_text_layers,
                    num_attention_heads=architecture.num_text_heads,
                    is_decoder=True,  # Otherwise it has no cross-attention to the picture.
                ),
                add_pooling_layer=False,
            )
            self.head = _head(architecture.text_width, architecture.head_widths)
        for name, values in (("pixel_mean", _PIXEL_MEAN), ("pixel_std", _PIXEL_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def preprocess(self, images: Tensor, resize: Resize) -> Tensor:
        """Squash the pictures if asked to, then do as the image-reward package does.

        images: (N, 3, H, W), float32 in [0, 1].
        resize: 256 squashes the whole picture to 256x256 first; none does not.
        Returns (N, 3, S, S), normalised: the shorter side is scaled to S, the longer cropped.
        Source: CR-Diff's reference implementation, then the transforms of the package.
        """
        images = (images * 255).round().clamp(0, 255)
        if resize != "none":
            images = resized_as_pil(images, resize, resize)
        sides = images.shape[2:]
        height, width = (int(self.image_size * side / min(sides)) for side in sides)
        images = resized_as_pil(images, height, width)
        top, left = (round((side - self.image_size) / 2) for side in (height, width))
        images = images[..., top : top + self.image_size, left : left + self.image_size]
        return (images / 255 - self.pixel_mean) / self.pixel_std

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """Score preprocessed pictures.

        pixels: (N, 3, S, S), from preprocess.
        tokens: (N, 2, T), integers: token ids, and 1 where there is a token, 0 for padding.
        Returns (N,).
        """
        ids, present = tokens.unbind(1)
        # As an additive mask it is taken as it is; from a plain one transformers builds its own,
        # for which the host may wait for the GPU.
        mask = (present[:, None, None, :] - 1) * 10000.0
        features = self.text(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=self.vision(pixels).last_hidden_state,
            is_decoder=False,  # Every token sees the whole text.
        ).last_hidden_state[:, 0]
        raw: Tensor = self.head(features)
        return (raw[:, 0] - _MEAN) / _STD


def resized_as_pil(images: Tensor, height: int, width: int) -> Tensor:
    """Resize 8-bit pictures as PIL's bicubic filter does, without aliases.

    images: (N, 3, h, w), float32, whole numbers in [0, 255]. Returns (N, 3, height, width), alike.
    PIL resizes along the width and then along the height, with 8 bits between: so does this.
    Since 13, Pillow begins with the height where that shrinks most.
    """
    for size in ((images.shape[2], width), (height, width)):
        images = F.interpolate(images, size, mode="bicubic", antialias=True)
        images = images.round().clamp(0, 255)  # Bicubic overshoots at edges.
    return images


class ImageReward:
    """How well people would like the picture for its prompt, as a number of either sign.

    The score of ImageReward-v1.0, for a whole batch at once, on the pictures' device, in float32
    whatever the model's dtype: bfloat16 is off by up to 0.03. It agrees with the PyPI package
    image-reward to 1e-3 on random weights of full size (tests/core/test_image_reward_parity.py).
    The network sees 224x224 pixels. With resize=256, as in CR-Diff's reference implementation,
    they show the whole picture, squashed to a square. With none, as in the package, they show its
    middle in true proportions: at 400x560 the outer 27% of the columns are never seen, at 480x360
    the outer 24% of the rows.

    path:               an ImageReward.pt, or the same weights as .safetensors, not the hub's.
    hub_id:             hub repository of ImageReward.pt.
    hub_revision:       branch, tag or commit of it.
    tokenizer:          hub repository, or a folder, that holds bert-base-uncased's vocab.txt.
    tokenizer_revision: branch, tag or commit of it.
    resize:             256 or none.
    Nothing is downloaded: what the hub has is looked for in the local Hugging Face cache.
    Nothing is read before the first version or score; both raise RewardError, in one line, for a
    file that is missing or is not ImageReward-v1.0.
    Source: ImageReward (arXiv:2304.05977).
    """

    name = "image_reward"
    _architecture = Architecture()

    def __init__(
        self,
        path: str = "",
        hub_id: str = "zai-org/ImageReward",
        hub_revision: str = "main",
        tokenizer: str = "google-bert/bert-base-uncased",
        tokenizer_revision: str = "main",
        resize: Resize = 256,
    ) -> None:
        self.path = path
        self.hub_id = hub_id
        self.hub_revision = hub_revision
        self.tokenizer = tokenizer
        self.tokenizer_revision = tokenizer_revision
        self.resize = checked_resize(resize)
        self._device: torch.device | None = None
        # On the device, so that a prompt is tokenised and sent there once for the whole search.
        self._tokens: dict[str, Tensor] = {}

    @cached_property
    def version(self) -> str:
        """Which weights, vocabulary and pictures: `v1.0-<weights>-<vocabulary>[-resize256]`.

        The weights are named by the hub's commit, those of a path by their SHA-256, and the
        vocabulary by its SHA-256.
        """
        file = self._weights_file()
        weights = _sha256(file) if self.path else file.parent.name
        vocabulary = _sha256(self._vocabulary_file())
        return f"v1.0-{weights[:12]}-{vocabulary[:8]}{resize_suffix(self.resize)}"

    def check(self, prompts: Sequence[str]) -> None:
        """Accept every text: it was trained on whatever people write."""

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> list[float]:
        """Score pictures of any size; the first call loads the network onto their device.

        images:  (N, 3, H, W), float in [0, 1], on any device.
        prompts: N texts; what is beyond 35 tokens is not seen.
        Raises RewardError if the shapes do not fit or the weights do not load.
        """
        if (
            images.ndim != 4
            or images.shape[1] != 3
            or not images.shape[2] * images.shape[3]
            or len(images) != len(prompts)
        ):
            raise RewardError(
                f"image_reward got pictures of shape {tuple(images.shape)} for {len(prompts)} "
                f"prompts: give it (N, 3, H, W) and N prompts"
            )
        if not prompts:
            return []
        if self._device != images.device:
            self._network.to(images.device)
            self._tokens.clear()
            self._device = images.device
        tokens = torch.stack([self._tokenise(prompt) for prompt in prompts])
        with torch.autocast(images.device.type, enabled=False):
            scores = [
                self._network(self._network.preprocess(some.float(), self.resize), these)
                for some, these in zip(
                    torch.split(images, _CHUNK), torch.split(tokens, _CHUNK), strict=True
                )
            ]
        rewards: list[float] = torch.cat(scores).tolist()
        return rewards

    def _tokenise(self, text: str) -> Tensor:
        """Token ids of a text and which of them are no padding: (2, T), on the device."""
        if text not in self._tokens:
            encoded = self._tokenizer(
                text, padding="max_length", truncation=True, max_length=MAX_TOKENS
            )
            tokens = torch.tensor([encoded["input_ids"], encoded["attention_mask"]])
            self._tokens[text] = tokens.to(self._device)
        return self._tokens[text]

    @cached_property
    def _tokenizer(self) -> BertTokenizer:
        from transformers import BertTokenizer

        file = self._vocabulary_file()
        try:
            tokens = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except (OSError, ValueError) as error:
            raise RewardError(f"{file} is unreadable ({error}): set reward.tokenizer") from error
        vocabulary = {token: position for position, token in enumerate(tokens)}
        # [DEC] and [ENC] come after the vocabulary's own.
        size = self._architecture.vocab_size - 2
        if len(tokens) != size or not vocabulary.keys() >= set(_MARKS):
            raise RewardError(
                f"{file} holds {len(tokens)} tokens, not the {size} of bert-base-uncased with "
                f"{' '.join(_MARKS)}: set reward.tokenizer=google-bert/bert-base-uncased"
            )
        tokenizer = BertTokenizer(vocab=vocabulary)
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        tokenizer.add_special_tokens({"extra_special_tokens": ["[ENC]"]})
        return tokenizer

    @cached_property
    def _network(self) -> Network:
        file = self._weights_file()
        weights: dict[str, Tensor] = {}
        unexpected = []
        network = Network(self._architecture)
        expected = network.state_dict()
        for name, tensor in self._read(file).items():
            if not name.startswith(_UNUSED):
                renamed = _rename(name)
                weights[renamed] = tensor
                if renamed not in expected:
                    unexpected.append(name)
        missing = [name for name in expected if name not in weights]
        misshapen = [
            f"{name} {tuple(weights[name].shape)}"
            for name, tensor in expected.items()
            if name in weights and weights[name].shape != tensor.shape
        ]
        for what, names in (
            ("lacks", missing),
            ("has unknown", unexpected),
            ("has misshapen", misshapen),
        ):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise self._broken(file, f"it {what} {', '.join(names[:3])}{more}")
        # Assigned, not copied: a move to the GPU is then the only copy ever made.
        weights = {name: tensor.float() for name, tensor in weights.items()}
        network.load_state_dict(weights, assign=True)
        return network.requires_grad_(False)

    def _read(self, file: Path) -> dict[str, Tensor]:
        """Weights as the file names them. Raises RewardError for whatever else it holds."""
        try:
            if file.suffix == ".safetensors":
                from safetensors.torch import load_file

                return load_file(file)
            # weights_only refuses a pickle that would run code; mmap reads only zip files.
            weights: Any = torch.load(
                file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
            )
        # A damaged pickle can raise nearly anything.
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise self._broken(file, reason) from error
        if not isinstance(weights, dict) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor)
            for name, tensor in weights.items()
        ):
            raise self._broken(file, "it is no table of tensors by name")
        return weights

    def _broken(self, file: Path, reason: str) -> RewardError:
        if self.path:
            remedy = f"set reward.path to {_WEIGHTS} of {self.hub_id}"
        else:
            remedy = f"{_download(self.hub_id, _WEIGHTS, self.hub_revision)} --force-download"
        return RewardError(f"{file} is not ImageReward-v1.0: {reason}: {remedy}")

    def _weights_file(self) -> Path:
        if not self.path:
            return _cached(self.hub_id, _WEIGHTS, self.hub_revision)
        file = Path(os.path.expanduser(self.path))
        if not os.path.isfile(file):
            raise RewardError(f"{file} is no file: set reward.path to {_WEIGHTS}, or to nothing")
        return file

    def _vocabulary_file(self) -> Path:
        folder = Path(os.path.expanduser(self.tokenizer))
        if not os.path.isdir(folder):
            return _cached(self.tokenizer, _VOCABULARY, self.tokenizer_revision)
        if not (folder / _VOCABULARY).is_file():
            raise RewardError(
                f"{folder} holds no {_VOCABULARY}: set reward.tokenizer to a folder that does"
            )
        return folder / _VOCABULARY


def _head(width: int, widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with no activations between them, as ImageReward was trained."""
    # Weights are named by position, and in training the first three were followed by dropout.
    layers: list[nn.Module] = []
    for outputs in (*widths, 1):
        layers.append(nn.Linear(width, outputs))
        if len(layers) < 6:
            layers.append(nn.Identity())
        width = outputs
    return nn.Sequential(*layers)


def _rename(name: str) -> str:
    for old, new in _RENAMED:
        name = name.replace(old, new)
    return name


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise RewardError(f"{file} is unreadable ({error}): let this user read it") from error


def _download(repo: str, filename: str, revision: str) -> str:
    return f"run hf download {repo} {filename} --revision {revision}"


def _cached(repo: str, filename: str, revision: str) -> Path:
    """Path of a hub file in the local Hugging Face cache, its folder named after the commit."""
    import huggingface_hub
    from huggingface_hub import constants

    try:
        file = huggingface_hub.try_to_load_from_cache(repo, filename, revision=revision)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise RewardError(
            f"{repo!r} is neither a folder nor a hub repository: {reason}: "
            f"set reward.hub_id or reward.tokenizer"
        ) from error
    # The third possibility is a marker that the hub has no such file.
    if not isinstance(file, str):
        raise RewardError(
            f"{filename} of {repo} at {revision} is not in the Hugging Face cache "
            f"{constants.HF_HUB_CACHE}: {_download(repo, filename, revision)}"
        )
    return Path(file)
