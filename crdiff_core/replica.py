"""A loaded model that draws the same prompts under many ratios, redoing only what they change."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from crdiff_core.errors import ModelError, RenderError, TooLittleMemoryError
from crdiff_core.models import check_divisible
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

COMPILE_MODES = ("none", "blocks", "graphs")
_NO_LIMIT = 1 << 30
_PIXELS_DECODED_AT_ONCE = 1 << 20
# Prompts whose embeddings and noise stay on the device: those of a search's three sets. For SDXL
# in half precision they are .3 GiB.
_NUM_CACHED = 512
# What CUDA, cuBLAS, cuDNN and the CPU's allocator say. A compiler wraps their errors and quotes
# them.
_OUT_OF_MEMORY = ("out of memory", "_STATUS_ALLOC_FAILED", "can't allocate memory")

_T = TypeVar("_T")


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


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that the memory did not suffice."""
    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and any(said in str(error) for said in _OUT_OF_MEMORY):
            return True
        error = error.__cause__
    return False


def if_it_fits(work: Callable[[], _T]) -> _T | None:
    """Return what the work gives; None if the memory did not suffice for it."""
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return None  # Only here has the exception let go of the tensors in its frames.


class Replica:
    """One loaded pipeline with CR-Diff applied; it lives as long as the search.

    Prompt embeddings and initial noise are made once for each prompt; a trial changes three
    numbers and draws.

    pipe:              a Stable Diffusion (XL) pipeline, which becomes the replica's own.
    resolution:        of the pictures; latents of odd height or width are fine.
    size_conditioning: what SDXL is told of a picture's original and target size; None: the
                       resolution (the paper's way). Others have no such condition.
    negative_prompt:   what guidance leads away from; None: the pipeline's own, which is the empty
                       text, but zeros where SDXL's configuration has force_zeros_for_empty_prompt.
                       "": the empty text, encoded.
    compile:           none, blocks (torch.compile of each transformer block, quick to compile) or
                       graphs (of whole UNets, as CUDA graphs: for small batches).
    Raises ModelError for a resolution or option that the pipeline does not have.
    """

    def __init__(
        self,
        pipe: Any,
        resolution: Resolution,
        *,
        num_steps: int,
        guidance_scale: float,
        poa_weight: float,
        size_conditioning: Resolution | None = None,
        negative_prompt: str | None = None,
        compile: str = "none",
    ) -> None:
        if compile not in COMPILE_MODES:
            raise ModelError(f"compile {compile!r} is unknown: give {', '.join(COMPILE_MODES)}")
        check_divisible(resolution, pipe.vae_scale_factor, type(pipe).__name__)
        self.pipe = apply(pipe, BlockRatios(), poa_weight)
        self.own_resolution = resolution
        self.resolution = resolution
        """That of the pictures being drawn: its own, but within `at`."""
        self.num_steps = num_steps
        self.guidance_scale = guidance_scale
        self.poa_weight = poa_weight
        self.negative_prompt = negative_prompt
        self.device = self.denoiser.device
        self.batch_limit = _NO_LIMIT
        """How many pictures are drawn at once; memory lowers it."""
        self._sizes: dict[str, tuple[int, int]] = {}
        if size_conditioning is not None:
            if self.denoiser.config.addition_embed_type != "text_time":
                raise ModelError(
                    f"{type(pipe).__name__} is not told a picture's size: leave "
                    "render.size_conditioning=requested"
                )
            size = (size_conditioning.height, size_conditioning.width)
            self._sizes = {"original_size": size, "target_size": size}
        self.num_shortages = 0
        """How often fewer pictures had to be decoded or scored at once for want of memory."""
        self._embedding = lru_cache(_NUM_CACHED)(self._embed)
        self._noise = lru_cache(_NUM_CACHED)(self._draw_noise)
        if compile != "none":
            self.denoiser.compile_unets(cuda_graphs=compile == "graphs")

    @property
    def denoiser(self) -> POADenoiser:
        """The UNet pair."""
        denoiser = self.pipe.unet
        assert isinstance(denoiser, POADenoiser)
        return denoiser

    def set_ratios(self, ratios: BlockRatios) -> None:
        """Prune the replica's UNet; only groups whose ratio changed are rewritten."""
        self.denoiser.configure(ratios, self.poa_weight)

    @contextmanager
    def carefully(self) -> Iterator[None]:
        """Draw pictures singly, uncompiled, and decode them in float32: slower, and surer.

        Half-precision decoders overflow first; neighbours in a batch share their memory.
        """
        batch_limit, dtype = self.batch_limit, self.pipe.vae.dtype
        self._free_memory()
        try:
            self.batch_limit = 1
            self.pipe.vae.to(torch.float32)
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self.pipe.vae.to(dtype)
            self.batch_limit = batch_limit

    @contextmanager
    def at(self, resolution: Resolution) -> Iterator[None]:
        """Draw at another size. Raises ModelError where the model cannot."""
        check_divisible(resolution, self.pipe.vae_scale_factor, type(self.pipe).__name__)
        batch_limit = self.batch_limit
        self.resolution = resolution
        try:
            yield
        finally:
            self.resolution = self.own_resolution
            self.batch_limit = batch_limit

    def sparsity(self) -> dict[Group, float]:
        """Return the measured sparsity of each block group."""
        return self.denoiser.replica.sparsity()

    @torch.no_grad()
    def render(self, prompts: Sequence[Prompt]) -> Tensor:
        """Draw the prompts, as one batch if the memory allows, else in halves of it.

        Returns (N, 3, H, W), float32 in [0, 1], on the replica's device.
        Raises RenderError if a picture is not finite or is of one single colour, or if not even
        one fits into memory.
        """
        pictures: list[Tensor] = []
        done = 0
        while done < len(prompts):
            part = prompts[done : done + self.batch_limit]
            latents = if_it_fits(partial(self._denoise, part))
            if latents is not None:
                pictures.append(self._decode(latents))
                done += len(part)
                continue
            if len(part) == 1:
                raise self._too_large()
            self.batch_limit = len(part) // 2
            self._free_memory()
        images = torch.cat(pictures)
        flat = images.flatten(1)
        # As one sees them: in 8 bits.
        broken = ~flat.isfinite().all(1) | (flat.amax(1) - flat.amin(1) < 1 / 255)
        if broken.any():
            first = prompts[int(broken.nonzero()[0])].text
            raise RenderError(
                f"{int(broken.sum())} of {len(prompts)} pictures are NaN or of one colour, the "
                f"first for {first!r} at ratios {self.denoiser.ratios}: try model.dtype=float32"
            )
        return images

    def in_portions(
        self, work: Callable[[slice], _T], num_pictures: int, at_once: int
    ) -> list[_T]:
        """Do work on `at_once` pictures at a time, and on half as many when they do not fit.

        work: takes the places of the pictures.
        Returns what each portion gave, in order. Raises TooLittleMemoryError if not even one
        picture fits.
        """
        results: list[_T] = []
        done = 0
        while done < num_pictures:
            places = slice(done, min(done + at_once, num_pictures))
            result = if_it_fits(partial(work, places))
            if result is not None:
                results.append(result)
                done = places.stop
                continue
            num_tried = places.stop - done
            if num_tried == 1:
                raise self._too_large()
            at_once = num_tried // 2
            self.num_shortages += 1
            self._free_memory()
        return results

    def is_usable(self) -> bool:
        """Whether the device still answers: an illegal access ends a process's use of its GPU."""
        try:
            torch.ones(1, device=self.device).item()
        except RuntimeError as error:
            return is_out_of_memory(error)
        return True

    def close(self) -> None:
        """Free the model and everything cached."""
        self._embedding.cache_clear()
        self._noise.cache_clear()
        del self.pipe
        self._free_memory()

    def _free_memory(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _too_large(self) -> TooLittleMemoryError:
        return TooLittleMemoryError(
            f"one {self.resolution} picture does not fit into the memory of {self.device}: use a "
            "larger GPU, a half-precision model.dtype or a smaller res"
        )

    def _denoise(self, prompts: Sequence[Prompt]) -> Tensor:
        """Return the prompts' latents, (N, C, h, w)."""
        embeddings = [self._embedding(prompt.text) for prompt in prompts]
        latents: Tensor = self.pipe(
            **{name: torch.cat([each[name] for each in embeddings]) for name in embeddings[0]},
            latents=torch.stack([self._noise(self.resolution, each.seed) for each in prompts]),
            height=self.resolution.height,
            width=self.resolution.width,
            num_inference_steps=self.num_steps,
            guidance_scale=self.guidance_scale,
            output_type="latent",
            **self._sizes,
        ).images
        return latents

    def _decode(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, 3, H, W) in [0, 1], a megapixel at a time, or less if need be."""
        # A decoder needs far more memory for a picture than a UNet does. Tiles would need less,
        # and change the picture.
        pixels = self.resolution.height * self.resolution.width
        at_once = max(1, _PIXELS_DECODED_AT_ONCE // pixels)
        return torch.cat(
            self.in_portions(
                lambda places: self._decode_at_once(latents[places]), len(latents), at_once
            )
        )

    def _decode_at_once(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, 3, H, W) in [0, 1], in the precision of the VAE's own."""
        vae = self.pipe.vae
        latents = latents.to(vae.dtype)
        mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
        latents = latents / vae.config.scaling_factor
        if mean is not None and std is not None:
            per_channel = (1, -1, 1, 1)
            latents = latents * latents.new_tensor(std).view(per_channel)
            latents = latents + latents.new_tensor(mean).view(per_channel)
        pictures: Tensor = vae.decode(latents, return_dict=False)[0]
        return (pictures.float() / 2 + 0.5).clamp(0, 1)

    def _embed(self, text: str) -> dict[str, Tensor]:
        # One text at a time, so that an embedding does not depend on its neighbours.
        encoded = self.pipe.encode_prompt(
            prompt=text,
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=self.guidance_scale > 1,
            negative_prompt=self.negative_prompt,
        )
        named = zip(_EMBEDDINGS, encoded, strict=False)
        return {name: part for name, part in named if part is not None}

    def _draw_noise(self, resolution: Resolution, seed: int) -> Tensor:
        # Drawn on the CPU in float32: the same noise on every device and in every dtype.
        factor = self.pipe.vae_scale_factor
        shape = (
            self.denoiser.config.in_channels,
            resolution.height // factor,
            resolution.width // factor,
        )
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return noise.to(self.device, self.denoiser.dtype)
