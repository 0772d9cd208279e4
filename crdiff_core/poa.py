"""Pruned output amplification (POA), and apply, applied and remove for any loaded pipeline."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from reprlib import repr as shown
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from crdiff_core.errors import ModelError, PruningError, RatiosError
from crdiff_core.pruning import PrunedReplica, num_prunable
from crdiff_core.ratios import (
    DEFAULT_POA_WEIGHT,
    FAMILY_OF_TEXT_WIDTH,
    BlockRatios,
    RatiosFile,
    check_poa_weight,
)

# Of a UNet, by diffusers' pipelines, at each step.
_READ_WHILE_DRAWING = {"config", "dtype", "device"}


class POADenoiser(nn.Module):
    """A dense UNet and its pruned replica, called as the one UNet that a pipeline expects.

    z = k * z_pruned + (1 - k) * z_dense, with k = poa_weight; k = 1 skips the dense pass and
    k = 0, or ratios of 0, the pruned one. Everything but the call is the dense UNet's.
    Source: CR-Diff (arXiv:2604.05524), section 3.4, equation 2.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        ratios: BlockRatios,
        poa_weight: float = DEFAULT_POA_WEIGHT,
    ) -> None:
        super().__init__()
        if _is_offloaded(unet):
            raise PruningError(
                "the UNet is offloaded, which swaps its weights: apply CR-Diff to a pipeline "
                "without enable_model_cpu_offload, enable_sequential_cpu_offload or "
                "enable_group_offload"
            )
        replica = PrunedReplica(unet)
        self.dense, self.pruned = replica.dense, replica.pruned
        self.replica = replica
        self.expected_latents: tuple[int, int] | None = None
        self._cuda_graphs = False
        self.__module__ = type(unet).__module__
        # The text that is being drawn for, since the UNets were last compared.
        self._text: weakref.ref[Tensor] | None = None
        self.configure(ratios, poa_weight)

    def configure(self, ratios: BlockRatios, poa_weight: float) -> None:
        """Change the ratios and k; only groups whose ratio changed are rewritten."""
        self.replica.set_ratios(ratios)
        self.ratios = ratios
        self.poa_weight = float(poa_weight)

    def compile_unets(self, *, cuda_graphs: bool) -> None:
        """Compile both UNets; no ratio ever compiles them anew, since no address changes.

        cuda_graphs: capture whole UNets, which spares the launches that bound small batches; else
                     each kind of transformer block is compiled once, in seconds.
        """
        # Each width of a UNet is a version of the same block's code, and so is each batch size.
        # Left to itself, torch would take the second width as a sign that widths vary.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        unets: tuple[Any, Any] = (self.dense, self.pruned)
        for unet in unets:
            if cuda_graphs:
                unet.compile(mode="reduce-overhead", fullgraph=True, dynamic=False)
            else:
                unet.compile_repeated_blocks(fullgraph=True, dynamic=False)
        self._cuda_graphs = cuda_graphs

    def forward(
        self, sample: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Denoise as UNet2DConditionModel.forward does. sample: (N, C, h, w).

        Raises PruningError if something was done to the UNet that the pruned one did not see.
        """
        self._check_latents(sample)
        self._check_unchanged(kwargs.get("encoder_hidden_states", args[1] if args[1:] else None))

        def denoise(unet: nn.Module) -> Tensor:
            # A UNet empties the list of a T2I adapter's residuals.
            own = {k: list(v) if isinstance(v, list) else v for k, v in kwargs.items()}
            output: Tensor = unet(sample, *args, return_dict=False, **own)[0]
            # A graph's next run would write over it.
            return output.clone() if self._cuda_graphs else output

        if self._cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        if self.poa_weight == 0 or self.ratios.is_dense:
            combined = denoise(self.dense)
        elif self.poa_weight == 1:
            combined = denoise(self.pruned)
        else:
            combined = torch.lerp(denoise(self.dense), denoise(self.pruned), self.poa_weight)
        return UNet2DConditionOutput(sample=combined) if return_dict else (combined,)

    def _check_unchanged(self, text: Tensor | None) -> None:
        """Compare the UNets at the first step of a drawing, which has a text of its own."""
        if text is not None and self._text is not None and self._text() is text:
            return
        if changed := self.replica.change():
            raise PruningError(
                f"the UNet changed after CR-Diff was applied ({changed}), and its pruned copy "
                "knows nothing of that: call crdiff_core.remove(pipe), make the change, and apply "
                "CR-Diff again"
            )
        self._text = None if text is None else weakref.ref(text)

    def _check_latents(self, sample: Tensor) -> None:
        found = (sample.shape[-2], sample.shape[-1])
        if self.expected_latents is not None and found != self.expected_latents:
            warnings.warn(
                f"CR-Diff ratios searched for latents of {self.expected_latents[0]}x"
                f"{self.expected_latents[1]} are drawing latents of {found[0]}x{found[1]} (height "
                "x width): the best ratios differ by resolution; search this one, or pass "
                "height= and width= of the ratios file",
                stacklevel=3,
            )
            self.expected_latents = None  # Once is enough.

    def __getattr__(self, name: str) -> Any:
        """Answer as the dense UNet for everything that is not ours (config, dtype, ...)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            dense = super().__getattr__("dense")
        if name not in _READ_WHILE_DRAWING:
            self._text = None  # Whoever asks for anything else may change it.
        return getattr(dense, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        """The dense UNet's: by it, pipelines know what they may hand a LoRA to, and save."""
        return type(self.__dict__.get("_modules", {}).get("dense", self))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> POADenoiser:
        """Move the dense UNet, then rebuild the replica's buffers from it: .to(), .half()."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.replica.pack()
        return self


def _is_offloaded(unet: nn.Module) -> bool:
    for module in unet.modules():
        if hasattr(module, "_hf_hook"):  # Accelerate's.
            return True
        hooks = getattr(module, "_diffusers_hook", None)
        if hooks is not None and hooks.get_hook("group_offloading") is not None:
            return True
    return False


def apply(
    pipe: Any,
    ratios: BlockRatios | str | os.PathLike[str],
    poa_weight: float | None = None,
) -> Any:
    """Turn a loaded pipeline into its CR-Diff version, in place; applying again changes it.

    pipe:       any diffusers pipeline with a UNet2DConditionModel (StableDiffusion, SDXL, ...).
    ratios:     BlockRatios, or the path of an exported best_ratios.json.
    poa_weight: k of equation 2, in [0, 10]; by default the file's, else 1.5.
    What the pipeline was given before (LoRA, IP-Adapter, FreeU, attention processors) is in both
    passes, and a LoRA is not pruned. What is done to its UNet afterwards is a PruningError when it
    next draws, until CR-Diff is removed and applied again.
    Returns the pipeline. Raises ModelError if it has no such UNet, RatiosError if the file is
    broken or was made for another model, PruningError if the UNet cannot be pruned. Drawing at
    another resolution than the file's gives one UserWarning.
    Source: CR-Diff (arXiv:2604.05524), sections 3.3 and 3.4.
    """
    unet = getattr(pipe, "unet", None)
    if not isinstance(unet, UNet2DConditionModel | POADenoiser):
        raise ModelError(
            f"{type(pipe).__name__} has no UNet2DConditionModel: CR-Diff prunes the UNets of "
            "Stable Diffusion 1.5, 2.1 and XL pipelines"
        )
    expected_latents = None
    if not isinstance(ratios, BlockRatios):
        file = RatiosFile.read(ratios)
        _check_made_for(file, unet)
        scale = pipe.vae_scale_factor
        expected_latents = (file.resolution.height // scale, file.resolution.width // scale)
        ratios = file.ratios
        poa_weight = file.poa_weight if poa_weight is None else poa_weight
    if poa_weight is None:
        poa_weight = DEFAULT_POA_WEIGHT
    check_poa_weight(poa_weight)
    if isinstance(unet, POADenoiser):
        unet.configure(ratios, poa_weight)
    else:
        pipe.unet = unet = POADenoiser(unet, ratios, poa_weight)
    unet.expected_latents = expected_latents
    return pipe


def remove(pipe: Any) -> Any:
    """Undo `apply`, in place and bit for bit; a pipeline without CR-Diff stays as it is."""
    if isinstance(pipe.unet, POADenoiser):
        denoiser = pipe.unet
        pipe.unet = denoiser.dense
        denoiser.replica.release()
    return pipe


@contextmanager
def applied(
    pipe: Any,
    ratios: BlockRatios | str | os.PathLike[str],
    poa_weight: float | None = None,
) -> Iterator[Any]:
    """`apply` for a `with` block, which yields the pipeline and leaves it as it was before.

    Also if an exception ends the block. Where CR-Diff was applied before, its ratios come back.
    """
    unet = getattr(pipe, "unet", None)
    before = None
    if isinstance(unet, POADenoiser):
        before = (unet.ratios, unet.poa_weight, unet.expected_latents)
    apply(pipe, ratios, poa_weight)
    try:
        yield pipe
    finally:
        if before is None:
            remove(pipe)
        else:
            own_ratios, own_weight, expected_latents = before
            apply(pipe, own_ratios, own_weight).unet.expected_latents = expected_latents


def bake(pipe: Any, ratios: BlockRatios | str | os.PathLike[str]) -> Any:
    """Prune a loaded pipeline's own UNet, in place and for good, and return the pipeline.

    It draws, bit for bit, what `apply` with poa_weight=1 draws, with one UNet in memory and
    nothing of ours in it: POA, which needs the dense one too, is no longer to be had.
    Raises what `apply` does. Source: CR-Diff (arXiv:2604.05524), section 3.3.
    """
    apply(pipe, ratios, poa_weight=1.0).unet.replica.keep_pruned()
    return remove(pipe)


def _check_made_for(file: RatiosFile, unet: Any) -> None:
    remedy = "search this model, or pass BlockRatios to use these ratios all the same"
    searched = file.provenance.get("num_prunable")
    found = num_prunable(unet.dense if isinstance(unet, POADenoiser) else unet)
    if searched is not None and searched != found:
        raise RatiosError(
            f"these ratios are of {file.model}, whose groups have {shown(searched)} prunable "
            f"weights, and this UNet's have {found}: {remedy}"
        )
    # The reference's files have no counts, and SD1.5's and SD2.1's are equal.
    width = unet.config.cross_attention_dim
    family = FAMILY_OF_TEXT_WIDTH.get(width) if isinstance(width, int) else None
    is_papers = file.model in FAMILY_OF_TEXT_WIDTH.values()
    if is_papers and family != file.model and (family or searched is None):
        raise RatiosError(
            f"these ratios are of {file.model}, and this UNet attends to text of {width} "
            f"channels, as {family or 'no model of the paper'} does: {remedy}"
        )
