"""Models: where one lies on disk, what it is, which revision, and how it loads."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from crdiff_core.errors import ModelError
from crdiff_core.ratios import GROUPS, Group, Resolution, group_of
from crdiff_core.shapes import WEIGHTS

if TYPE_CHECKING:
    import torch

# A name -> folder table: models that the package carries.
EMBEDDED: dict[str, Path] = {"shapes": WEIGHTS}
# Only these are known to work; the class is never taken from the folder's own word.
PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
DTYPES = ("float32", "float16", "bfloat16")
# They refuse a height or width that 8 does not divide, even if the VAE could draw it.
_PIPELINE_FACTOR = 8


@dataclass(frozen=True)
class Model:
    """A text-to-image model in a diffusers folder.

    name:  how it is called in conf, in folders and in exported files.
    path:  a local diffusers folder, or empty for the embedded model of that name.
    dtype: float32, float16 or bfloat16; it changes the pictures.
    Every method raises ModelError, in one line, for a folder that is missing or incomplete.
    """

    name: str
    path: str = ""
    dtype: str = "float32"

    @property
    def folder(self) -> Path:
        """The diffusers folder on this machine."""
        if self.path:
            folder = Path(self.path).expanduser()
        elif self.name in EMBEDDED:
            folder = EMBEDDED[self.name]
        else:
            raise ModelError(
                f"model {self.name} is not embedded: set model.path to its diffusers folder"
            )
        if not (folder / "model_index.json").is_file():
            raise ModelError(
                f"{folder} is not a diffusers folder (no model_index.json): set model.path to one"
            )
        return folder

    @cached_property
    def revision(self) -> str:
        """A SHA-256 of the folder's weights and configs; a change of either is another model."""
        digest = hashlib.sha256()
        for file in sorted(self.folder.rglob("*")):
            if file.suffix in {".safetensors", ".json", ".txt"}:
                digest.update(str(file.relative_to(self.folder)).encode())
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()[:16]

    @property
    def scheduler(self) -> str:
        """The name of the scheduler's class."""
        return str(self._config("scheduler", "scheduler_config.json").get("_class_name", ""))

    @property
    def vae_factor(self) -> int:
        """How many pixels, each way, one latent stands for."""
        return 1 << (len(self._config("vae", "config.json").get("block_out_channels", [0])) - 1)

    def check_resolution(self, resolution: Resolution) -> None:
        """Raise ModelError unless the pipeline and its VAE can draw this size."""
        factor = math.lcm(self.vae_factor, _PIPELINE_FACTOR)
        if resolution.height % factor or resolution.width % factor:
            nearest = Resolution(
                *(
                    max(factor, round(size / factor) * factor)
                    for size in (resolution.height, resolution.width)
                )
            )
            raise ModelError(
                f"resolution {resolution} is not divisible by {factor}, as {self.name} needs: the "
                f"nearest is res={nearest}"
            )

    def num_prunable(self) -> dict[Group, int]:
        """Return how many weights each group's ratio is a fraction of; reads only headers."""
        shapes: dict[str, list[int]] = {}
        for file in (self.folder / "unet").glob("*.safetensors"):
            try:
                with safe_open(file, framework="numpy") as tensors:
                    names = tensors.keys()
                    shapes |= {name: tensors.get_slice(name).get_shape() for name in names}
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{file} is broken ({error}): fetch the model again") from error
        if not shapes:
            raise ModelError(
                f"{self.folder / 'unet'} holds no safetensors weights: fetch the model again"
            )
        counts: dict[Group, int] = dict.fromkeys(GROUPS, 0)
        for name, shape in shapes.items():
            group = group_of(name)
            if group is not None and len(shape) > 1:  # A layer's weight, not a bias or a norm.
                counts[group] += math.prod(shape)
        return counts

    def load(self, device: torch.device) -> Any:
        """Load the pipeline for drawing: evaluation mode, no gradients, no progress bar."""
        # These take seconds to import, and who only looks at a model needs neither.
        import diffusers
        import torch

        folder = self.folder
        name = self._config("", "model_index.json").get("_class_name")
        if name not in PIPELINES:
            raise ModelError(
                f"{folder} holds a {name}: CR-Diff draws with {' or '.join(PIPELINES)}"
            )
        try:
            pipe = getattr(diffusers, name).from_pretrained(
                folder,
                dtype=getattr(torch, self.dtype),
                use_safetensors=True,
                local_files_only=True,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"{folder} does not load: {reason}: fetch it again") from error
        pipe.set_progress_bar_config(disable=True)
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.requires_grad_(False).eval()
        return pipe.to(device)

    def _config(self, part: str, file: str) -> dict[str, Any]:
        path = self.folder / part / file
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} is missing or broken: fetch the model again") from error
        assert isinstance(config, dict)
        return config
