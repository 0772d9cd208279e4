"""Models: where one lies, whether it is all there, which revision it is, and how it loads."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from crdiff_core.errors import ModelError
from crdiff_core.ratios import (
    FAMILY_OF_TEXT_WIDTH,
    GROUPS,
    Group,
    Resolution,
    group_of,
)
from crdiff_core.shapes import WEIGHTS

if TYPE_CHECKING:
    import torch

# A name -> folder table: models that the package carries.
EMBEDDED: dict[str, Path] = {"shapes": WEIGHTS}
# Only these are known to work; a class is never taken from the folder's own word, since loading
# it would import the module that the folder names.
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_CLASSES = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
}
DTYPES = ("float32", "float16", "bfloat16")
# They refuse a height or width that 8 does not divide, even if the VAE could draw it.
_PIPELINE_FACTOR = 8
# The parts with weights, and how diffusers and transformers call their files.
_WEIGHT_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
_CONFIGS = ("*.json", "*.txt")
# A single-file checkpoint keeps its parts, and its UNet's blocks, under the original code's names.
_CHECKPOINT_PARTS = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}
_CHECKPOINT_BLOCKS = {
    "model.diffusion_model.input_blocks.": "down_blocks.",
    "model.diffusion_model.middle_block.": "mid_block.",
    "model.diffusion_model.output_blocks.": "up_blocks.",
}
# What tells the paper's models apart, with the width of the text that they attend to.
_FAMILY_CLASSES = {
    "sdxl": "StableDiffusionXLPipeline",
    "sd15": "StableDiffusionPipeline",
    "sd21": "StableDiffusionPipeline",
}
_PICKLES = {".ckpt", ".pt", ".pth", ".bin"}
# In old files; diffusers and transformers make the one themselves and need no other.
_NOT_LOADED = ("position_ids", "logit_scale")
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Model:
    """A text-to-image model: a diffusers folder, a hub repository or a single-file checkpoint.

    name:         how it is called in conf, in folders and in exported files.
    path:         a local diffusers folder or a .safetensors checkpoint; empty for the embedded
                  model of that name, else the hub's.
    dtype:        float32, float16 or bfloat16; it changes the pictures.
    hub_id:       its repository on the Hugging Face hub, looked up in the local cache alone. A
                  checkpoint takes its configuration from there.
    hub_revision: a commit, so that everybody draws with the same weights.
    Every method raises ModelError, in one line, for a model that is missing, incomplete or of
    another kind. Nothing is ever downloaded, no pickle read and no code of a model run.
    """

    name: str
    path: str = ""
    dtype: str = "float32"
    hub_id: str = ""
    hub_revision: str = "main"

    @classmethod
    def find(cls, source: str, dtype: str, hub_id: str = "", hub_revision: str = "main") -> Model:
        """Return the model that a person means by an embedded name, a path or a hub id."""
        if source in EMBEDDED:
            return cls(source, dtype=dtype)
        path = _expanded(source)
        is_file = path.suffix in {".safetensors", *_PICKLES}
        if not os.path.exists(path) and not is_file and HUB_ID.fullmatch(source):
            return cls(path.name, "", dtype, source, hub_revision if source == hub_id else "main")
        return cls(
            path.stem if is_file else path.absolute().name, source, dtype, hub_id, hub_revision
        )

    def __getstate__(self) -> dict[str, Any]:
        # Without what has been looked up: the machine that it is sent to looks for itself.
        return {each.name: getattr(self, each.name) for each in fields(self)}

    # --- where it lies -----------------------------------------------------------------------

    @property
    def checkpoint(self) -> Path | None:
        """The single-file checkpoint, if that is what `path` is."""
        path = _expanded(self.path)
        if not self.path or os.path.isdir(path):
            return None
        if path.suffix.lower() in _PICKLES:
            raise ModelError(
                f"{path} is a pickle, which can run code: convert it to .safetensors and give that"
            )
        if path.suffix != ".safetensors":
            return None
        if not os.path.isfile(path):
            raise ModelError(f"{path} does not exist: set model.path to a checkpoint or folder")
        return path

    @cached_property
    def folder(self) -> Path:
        """The diffusers folder on this machine; of a checkpoint, the one with its configuration.

        Only model_index.json is sure to be in it: `check` looks at the rest.
        """
        if self.path and self.checkpoint is None:
            folder = _expanded(self.path)
        elif self.name in EMBEDDED and not self.path:
            folder = EMBEDDED[self.name]
        elif self.hub_id:
            folder = self._snapshot()
        elif self.path:
            raise ModelError(
                f"{self.path} is a single file, whose configuration is its family's: choose "
                "model=sdxl, sd15 or sd21 with it"
            )
        else:
            raise ModelError(
                f"model {self.name} is neither embedded nor on the hub: set model.path to its "
                "diffusers folder"
            )
        if not os.path.exists(folder):
            raise ModelError(
                f"{folder} does not exist: set model.path to a diffusers folder or a .safetensors "
                "checkpoint"
            )
        if not os.path.isfile(folder / "model_index.json"):
            raise ModelError(
                f"{folder} is not a diffusers folder (no model_index.json): set model.path to one"
            )
        return folder

    def _snapshot(self) -> Path:
        # Seconds to import, and only the hub's models need it.
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            # Not snapshot_download: it refuses a repository of which some files were left out.
            index = try_to_load_from_cache(
                self.hub_id, "model_index.json", revision=self.hub_revision
            )
        except HFValidationError as error:
            raise ModelError(
                f"model.hub_id {self.hub_id!r} is not OWNER/NAME: see https://huggingface.co"
            ) from error
        if not isinstance(index, str):
            what = f"{self.hub_id} at revision {self.hub_revision[:12]}"
            if self.checkpoint:
                what = f"a checkpoint's configuration is its family's, and that of {what}"
            raise ModelError(
                f"{what} is not in this machine's Hugging Face cache: {self._remedy()}"
            )
        return Path(index).parent

    @property
    def _on_hub(self) -> bool:
        is_local = self.path or self.name in EMBEDDED
        return bool(self.hub_id) and (not is_local or self.checkpoint is not None)

    def _remedy(self, *, is_there: bool = False) -> str:
        """How to come by what is missing, or is there and broken."""
        if not self._on_hub:
            return "fetch the model again"
        patterns = list(_CONFIGS)
        if self.checkpoint is None and self.dtype == "float16":
            patterns += [
                f"{part}/{stem}.fp16*.safetensors" for part, stem in _WEIGHT_STEMS.items()
            ]
        elif self.checkpoint is None:
            patterns += [f"{part}/{stem}.safetensors" for part, stem in _WEIGHT_STEMS.items()]
            patterns.append("*/*-of-*.safetensors")
        command = ["hf", "download", self.hub_id, "--revision", self.hub_revision]
        for pattern in patterns:
            command += ["--include", pattern]
        if is_there:
            command.append("--force-download")
        return (
            f"fetch it with: {shlex.join(command)} (if it is gated, accept its licence at "
            f"https://huggingface.co/{self.hub_id} and hf auth login first)"
        )

    # --- what it is, from configurations and headers alone -------------------------------------

    def check(self) -> None:
        """Raise ModelError unless it is a kind we can prune and draw with, and complete."""
        if self.dtype not in DTYPES:
            raise ModelError(f"dtype {self.dtype!r} is unknown: choose {', '.join(DTYPES)}")
        if self.checkpoint is not None:
            self.num_prunable()  # Before a configuration is asked for: it may be no model at all.
        name = self._pipeline_class()
        self._check_family(name)
        self._config("scheduler", "scheduler_config.json")
        for part in self._parts:
            self._config(part, "config.json")
        for part in ("tokenizer", "tokenizer_2"):
            if not _is_part(part, name):
                continue
            self._config(part, "tokenizer_config.json")
            files = {file.name for file in (self.folder / part).glob("*") if file.is_file()}
            if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files:
                # transformers would make one that knows no word.
                raise ModelError(f"{self.folder / part} has no vocabulary: {self._remedy()}")
        self.num_bytes()  # Reads every header.
        if self.checkpoint is not None:
            self._check_checkpoint(self.checkpoint)

    @cached_property
    def revision(self) -> str:
        """The hub's commit, or a SHA-256 of the weights and configs; another is another model."""
        if self._on_hub and self.checkpoint is None:
            return self.folder.name[:16]
        if self.checkpoint is not None:
            digest = hashlib.sha256(self.folder.name.encode())
            digest.update(_file_digest(self.checkpoint))
            return digest.hexdigest()[:16]
        digest = hashlib.sha256()
        weights = {file for part in self._parts for file in self._weight_files(part)}
        configs = {
            file
            for part in (*_CLASSES, "scheduler")
            for pattern in _CONFIGS
            for file in (self.folder / part).glob(pattern)
            # An index says nothing of its shards that they do not say themselves.
            if file.is_file() and ".index." not in file.name
        }
        files = sorted({self.folder / "model_index.json", *configs, *weights})
        # Gigabytes: hashlib lets go of the interpreter's lock.
        with ThreadPoolExecutor() as pool:
            for file, content in zip(files, pool.map(_file_digest, files), strict=True):
                digest.update(str(file.relative_to(self.folder)).encode())
                digest.update(content)
        return digest.hexdigest()[:16]

    @property
    def scheduler(self) -> str:
        """The name of the scheduler's class."""
        self._pipeline_class()
        # The index's, which is the one that is loaded, whatever its configuration was saved by.
        return str(self._config("", "model_index.json")["scheduler"][1])

    @property
    def vae_factor(self) -> int:
        """How many pixels, each way, one latent stands for."""
        channels = self._config("vae", "config.json").get("block_out_channels")
        if not isinstance(channels, list) or not channels:
            raise ModelError(
                f"{self.folder / 'vae' / 'config.json'} has no block_out_channels: "
                f"{self._remedy(is_there=True)}"
            )
        return 1 << (len(channels) - 1)

    @property
    def is_size_conditioned(self) -> bool:
        """Whether the UNet is told a picture's size, as SDXL's is."""
        return self._config("unet", "config.json").get("addition_embed_type") == "text_time"

    def check_resolution(self, resolution: Resolution) -> None:
        """Raise ModelError unless the pipeline and its VAE can draw this size."""
        check_divisible(resolution, self.vae_factor, self.name)

    def num_prunable(self) -> dict[Group, int]:
        """Return how many weights each group's ratio is a fraction of; reads only headers."""
        counts: dict[Group, int] = dict.fromkeys(GROUPS, 0)
        for name, shape in self._unet_shapes.items():
            group = group_of(name)
            if group is not None and len(shape) > 1:  # A layer's weight, not a bias or a norm.
                counts[group] += math.prod(shape)
        empty = [group for group, count in counts.items() if not count]
        if empty:
            raise ModelError(
                f"{self.checkpoint or self.folder / 'unet'} has no self-attention or feed-forward "
                f"weights in its {' and '.join(empty)} blocks: give a whole Stable Diffusion 1.5, "
                "2.1 or XL model, not a LoRA, a VAE or another kind"
            )
        return counts

    def num_bytes(self) -> int:
        """Return what it takes in memory once CR-Diff is applied; reads only headers.

        All its weights, and the prunable ones once more for the pruned replica.
        """
        size = 4 if self.dtype == "float32" else 2
        num_bytes = sum(self.num_prunable().values()) * size
        for part in self._parts:
            is_upcast = part == "vae" and self._upcasts_vae
            num_bytes += self._num_weights(part) * (4 if is_upcast else size)
        return num_bytes

    def _num_weights(self, part: str) -> int:
        """Return how many weights the files of a part hold."""
        in_checkpoint = self.checkpoint is not None
        files = [self.checkpoint] if self.checkpoint else self._weight_files(part)
        return sum(
            math.prod(shape)
            for file in files
            for name, shape in self._shapes(file).items()
            if not name.endswith(_NOT_LOADED)
            and (not in_checkpoint or name.startswith(_CHECKPOINT_PARTS[part]))
        )

    @property
    def _upcasts_vae(self) -> bool:
        """Whether the VAE overflows in float16; only SDXL's pipeline asks its configuration."""
        return (
            self.dtype == "float16"
            and self._pipeline_class() == "StableDiffusionXLPipeline"
            and bool(self._config("vae", "config.json").get("force_upcast", True))
        )

    def _pipeline_class(self) -> str:
        """Return the pipeline's class. Raises ModelError if it or a part's is not one we know."""
        index = self._config("", "model_index.json")
        name = index.get("_class_name")
        if name not in PIPELINES:
            raise ModelError(
                f"{self.folder} holds a {name}: CR-Diff draws with {' or '.join(PIPELINES)}"
            )
        known = {part: each for part, each in _CLASSES.items() if _is_part(part, name)}
        for part in (*known, "scheduler"):
            found = index.get(part)
            if not isinstance(found, list) or [type(each) for each in found] != [str, str]:
                raise ModelError(
                    f"{self.folder / 'model_index.json'} names no {part}: "
                    f"{self._remedy(is_there=True)}"
                )
            library, kind = found
            if part == "scheduler":
                is_known = library == "diffusers" and kind.endswith("Scheduler")
            else:
                is_known = [library, kind.removesuffix("Fast")] == known[part]
            if not is_known:
                raise ModelError(
                    f"{self.folder} has a {library}.{kind} as its {part}: CR-Diff knows "
                    f"{'.'.join(known.get(part, ['the schedulers of diffusers']))}"
                )
        return str(name)

    @property
    def _parts(self) -> list[str]:
        name = self._pipeline_class()
        return [part for part in _WEIGHT_STEMS if _is_part(part, name)]

    @cached_property
    def _variant(self) -> str | None:
        """Return fp16 if that is what is wanted and every part has it in half precision."""
        if self.dtype != "float16":
            return None
        halves = all(
            any(file.is_file() for file in self._candidates(part, ".fp16")) for part in self._parts
        )
        return "fp16" if halves else None

    def _candidates(self, part: str, dotted: str) -> list[Path]:
        """Return where a part's weights may lie, in the order in which it is looked there."""
        folder, stem = self.folder / part, _WEIGHT_STEMS[part]
        single = folder / f"{stem}{dotted}.safetensors"
        index = folder / f"{stem}.safetensors.index{dotted}.json"  # Of several files.
        # diffusers prefers the index, transformers the single file.
        return [index, single] if stem == "diffusion_pytorch_model" else [single, index]

    def _weight_files(self, part: str) -> list[Path]:
        """Return a part's files. Raises ModelError for one that is missing or not safetensors."""
        candidates = self._candidates(part, f".{self._variant}" if self._variant else "")
        single = next(file for file in candidates if file.suffix == ".safetensors")
        found = next((file for file in candidates if file.is_file()), single)
        files = [found]
        if found != single:
            names = self._config(part, found.name).get("weight_map")
            if not isinstance(names, dict) or not all(
                isinstance(name, str) and os.path.basename(name) == name for name in names.values()
            ):
                raise ModelError(f"{found} lists no files: {self._remedy(is_there=True)}")
            files = [found.parent / name for name in sorted(set(names.values()))]
        for file in files:
            if not os.path.isfile(file):
                if any(file.parent.glob("*pytorch_model*.bin")):
                    raise ModelError(
                        f"{file.parent} holds only pickled weights (.bin), which can run code: "
                        "save the model with safetensors"
                    )
                raise ModelError(f"{file} is missing: {self._remedy()}")
        return files

    @cached_property
    def _unet_shapes(self) -> dict[str, list[int]]:
        if self.checkpoint is None:
            files = self._weight_files("unet")
            return {name: shape for file in files for name, shape in self._shapes(file).items()}
        found = {}
        for name, shape in self._shapes(self.checkpoint).items():
            for prefix, block in _CHECKPOINT_BLOCKS.items():
                if name.startswith(prefix):
                    found[block + name.removeprefix(prefix)] = shape
        return found

    def _check_family(self, pipeline: str) -> None:
        """Raise ModelError for a model of another family than its name says."""
        expected = _FAMILY_CLASSES.get(self.name)
        width = self._config("unet", "config.json").get("cross_attention_dim")
        family = FAMILY_OF_TEXT_WIDTH.get(width) if isinstance(width, int) else None
        if expected is None or (pipeline == expected and family in {None, self.name}):
            return
        others = [name for name, kind in _FAMILY_CLASSES.items() if kind == pipeline]
        raise ModelError(
            f"{self.folder} is no {self.name} model but a {pipeline} that attends to text of "
            f"{width} channels: choose model={family or ' or '.join(others)} with it"
        )

    def _check_checkpoint(self, checkpoint: Path) -> None:
        """Raise ModelError if it lacks a part or is of another family than its configuration."""
        expected = self._config("unet", "config.json").get("cross_attention_dim")
        widths = {
            shape[-1]
            for name, shape in self._unet_shapes.items()
            if name.endswith("attn2.to_k.weight") and shape
        }
        if any(width != expected for width in widths):
            raise ModelError(
                f"{checkpoint} is no {self.name} model: it attends to text of "
                f"{'/'.join(map(str, sorted(widths)))} channels and {self.name} to {expected}: "
                "choose its family (768: model=sd15, 1024: model=sd21, 2048: model=sdxl)"
            )
        for part in self._parts:
            if not self._num_weights(part):
                raise ModelError(
                    f"{checkpoint} has no {part}: give one with the text encoders and the VAE in "
                    "it, or a diffusers folder"
                )

    def _shapes(self, file: Path) -> dict[str, list[int]]:
        """Return the tensors' shapes from a safetensors file's header."""
        try:
            with safe_open(file, framework="numpy") as tensors:
                return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
        except (OSError, SafetensorError) as error:
            remedy = "fetch it again" if self.checkpoint else self._remedy(is_there=True)
            raise ModelError(f"{file} is broken ({error}): {remedy}") from error

    def _config(self, part: str, file: str) -> dict[str, Any]:
        path = self.folder / part / file
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise ValueError("not an object")
        except FileNotFoundError as error:
            raise ModelError(f"{path} is missing: {self._remedy()}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"{path} is broken: {self._remedy(is_there=True)}") from error
        return config

    # --- loading -----------------------------------------------------------------------------

    def load(self, device: torch.device) -> Any:
        """Load the pipeline for drawing by a Replica: evaluation mode, no gradients or bars.

        A VAE that overflows in float16, as SDXL's does, is kept in float32. The safety checker,
        which would blacken pictures, and the watermark stay out.
        """
        self.check()
        # These take seconds to import, and who only looks at a model needs neither.
        import diffusers
        import torch

        name = self._pipeline_class()
        options: dict[str, Any] = {"dtype": getattr(torch, self.dtype), "local_files_only": True}
        options |= {"feature_extractor": None, "image_encoder": None}
        if name == "StableDiffusionPipeline":
            options |= {"safety_checker": None, "requires_safety_checker": False}
        else:
            options |= {"add_watermarker": False}
        cls = getattr(diffusers, name)
        checkpoint = self.checkpoint
        remedy = "fetch it again" if checkpoint else self._remedy(is_there=True)
        default_dtype = torch.get_default_dtype()
        try:
            _hide_bars()
            if checkpoint is not None:
                pipe = cls.from_single_file(str(checkpoint), config=str(self.folder), **options)
            else:
                options |= {"use_safetensors": True, "variant": self._variant}
                pipe = cls.from_pretrained(self.folder, **options)
        except Exception as error:  # Of broken files the libraries raise anything.
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ModelError(
                f"{checkpoint or self.folder} does not load: {reason}: {remedy}"
            ) from error
        finally:
            # A broken configuration makes diffusers leave it at ours.
            torch.set_default_dtype(default_dtype)
        for part in self._parts:
            # transformers would draw what is missing at random, and diffusers fail later.
            num_expected = sum(weight.numel() for weight in getattr(pipe, part).parameters())
            if self._num_weights(part) < num_expected:
                raise ModelError(
                    f"{checkpoint or self.folder / part} lacks weights of its {part}: {remedy}"
                )
        pipe.set_progress_bar_config(disable=True)
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.requires_grad_(False).eval()
        if self._upcasts_vae:
            pipe.vae.float()
        return pipe.to(device)


def check_divisible(resolution: Resolution, vae_factor: int, name: str) -> None:
    """Raise ModelError unless a pipeline with such a VAE can draw this size."""
    factor = math.lcm(vae_factor, _PIPELINE_FACTOR)
    if resolution.height % factor or resolution.width % factor:
        nearest = Resolution(
            *(
                max(factor, round(size / factor) * factor)
                for size in (resolution.height, resolution.width)
            )
        )
        raise ModelError(
            f"resolution {resolution} is not divisible by {factor}, as {name} needs: the nearest "
            f"is res={nearest}"
        )


def _is_part(name: str, pipeline: str) -> bool:
    return not name.endswith("_2") or pipeline == "StableDiffusionXLPipeline"


def _expanded(path: str) -> Path:
    # Of a user who does not exist, pathlib's own raises.
    return Path(os.path.expanduser(path))


def _hide_bars() -> None:
    # Of reading a local file: a worker has nobody to see them, and a person sees ours.
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _file_digest(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
