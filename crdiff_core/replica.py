"""A loaded model that draws the same prompts under many ratios, redoing only what they change."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from torch import Tensor

from crdiff_core.errors import ModelError, RenderError
from crdiff_core.models import Model
from crdiff_core.poa import POADenoiser, apply
from crdiff_core.prompts import Prompt
from crdiff_core.ratios import BlockRatios, Group, Resolution

# What encode_prompt returns, in its order; the pooled ones are SDXL's.
_EMBEDDINGS = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)


def choose_device(name: str = "auto") -> torch.device:
    """Return the device of that name; `auto` is the GPU if there is one. Raises ModelError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device {name!r} is unknown: set cluster.device=auto or cpu") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("device cuda is not there: set cluster.device=auto or cpu")
    return device


class Replica:
    """One loaded pipeline with CR-Diff applied; it lives as long as the search.

    Prompt embeddings and initial noise are made once for each prompt; a trial changes three
    numbers and draws.
    """

    def __init__(
        self,
        model: Model,
        resolution: Resolution,
        *,
        num_steps: int,
        guidance_scale: float,
        poa_weight: float,
        device: torch.device,
    ) -> None:
        model.check_resolution(resolution)
        self.resolution = resolution
        self.num_steps = num_steps
        self.guidance_scale = guidance_scale
        self.poa_weight = poa_weight
        self.device = device
        self.pipe = apply(model.load(device), BlockRatios(), poa_weight)
        factor = model.vae_factor
        self._noise_shape = (
            self.denoiser.config.in_channels,
            resolution.height // factor,
            resolution.width // factor,
        )
        self._embeddings: dict[str, dict[str, Tensor]] = {}
        self._noise: dict[int, Tensor] = {}

    @property
    def denoiser(self) -> POADenoiser:
        """The UNet pair."""
        denoiser = self.pipe.unet
        assert isinstance(denoiser, POADenoiser)
        return denoiser

    def set_ratios(self, ratios: BlockRatios) -> None:
        """Prune the replica's UNet; only groups whose ratio changed are rewritten."""
        self.denoiser.configure(ratios, self.poa_weight)

    def sparsity(self) -> dict[Group, float]:
        """Return the measured sparsity of each block group."""
        return self.denoiser.replica.sparsity()

    @torch.no_grad()
    def render(self, prompts: Sequence[Prompt]) -> Tensor:
        """Draw the prompts as one batch.

        Returns (N, 3, H, W), float32 in [0, 1], on the replica's device.
        Raises RenderError if a picture is not finite or is of one single colour.
        """
        embeddings = [self._embed(prompt.text) for prompt in prompts]
        images: Tensor = self.pipe(
            **{name: torch.cat([each[name] for each in embeddings]) for name in embeddings[0]},
            latents=torch.stack([self._initial_noise(prompt.seed) for prompt in prompts]),
            height=self.resolution.height,
            width=self.resolution.width,
            num_inference_steps=self.num_steps,
            guidance_scale=self.guidance_scale,
            output_type="pt",
        ).images
        images = images.float()
        flat = images.flatten(1)
        broken = ~flat.isfinite().all(1) | (flat.amax(1) == flat.amin(1))
        if broken.any():
            first = prompts[int(broken.nonzero()[0])].text
            raise RenderError(
                f"{int(broken.sum())} of {len(prompts)} pictures are NaN or of one colour, the "
                f"first for {first!r} at ratios {self.denoiser.ratios}: try model.dtype=float32"
            )
        return images

    def close(self) -> None:
        """Free the model and everything cached."""
        self._embeddings.clear()
        self._noise.clear()
        del self.pipe
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _embed(self, text: str) -> dict[str, Tensor]:
        # One text at a time, so that an embedding does not depend on its neighbours.
        if text not in self._embeddings:
            encoded = self.pipe.encode_prompt(
                prompt=text,
                device=self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=self.guidance_scale > 1,
            )
            named = zip(_EMBEDDINGS, encoded, strict=False)
            self._embeddings[text] = {name: part for name, part in named if part is not None}
        return self._embeddings[text]

    def _initial_noise(self, seed: int) -> Tensor:
        # Drawn on the CPU in float32: the same noise on every device and in every dtype.
        if seed not in self._noise:
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(self._noise_shape, generator=generator)
            self._noise[seed] = noise.to(self.device, self.denoiser.dtype)
        return self._noise[seed]
