"""The full-size UNets of SD1.5 and SDXL, and pipelines of SDXL's kind with random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

# Diffusers' defaults are SD1.5's.
SD15_UNET: Mapping[str, Any] = {"cross_attention_dim": 768}
SDXL_UNET: Mapping[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
UNETS = {"sd15": SD15_UNET, "sdxl": SDXL_UNET}

SDXL_VAE: Mapping[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}


@dataclass(frozen=True)
class SDXLArchitecture:
    """Configurations of SDXL's parts.

    text_widths: of the two text encoders; the UNet attends to both, and the second is pooled.
    num_tokens:  of an encoded prompt.
    """

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_widths: tuple[int, int]
    num_tokens: int


SDXL = SDXLArchitecture(SDXL_UNET, SDXL_VAE, (768, 1280), 77)

TOY_SDXL = SDXLArchitecture(
    unet={
        **SDXL_UNET,
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "transformer_layers_per_block": 1,
        "attention_head_dim": [2, 4],
        "cross_attention_dim": 16 + 24,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    },
    vae={
        **SDXL_VAE,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 64,
    },
    text_widths=(16, 24),
    num_tokens=16,
)


def meta_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """A UNet without memory for its weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


@torch.no_grad()
def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Give a module weights under which what flows through it neither grows nor vanishes.

    Norms become identities, biases zero, all other weights normal with a variance of 1 / fan-in.
    """
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        elif name.endswith("weight"):
            parameter.fill_(1)
        else:
            parameter.zero_()


def random_sdxl(
    architecture: SDXLArchitecture, dtype: torch.dtype, device: torch.device, folder: Path
) -> StableDiffusionXLPipeline:
    """A pipeline whose UNet and VAE get random weights directly on the device.

    The text encoders are tiny but of the right widths; prompts are letters and spaces.
    folder: for the tokenizer's files.
    """
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**architecture.unet)
        vae = AutoencoderKL(**architecture.vae)
    for part in (unet, vae):
        part.to(dtype).to_empty(device=device)
        randomise(part, generator)
    tokenizer = _letters(folder, architecture.num_tokens)
    torch.manual_seed(0)
    first, second = (
        _text_config(tokenizer, width, architecture.num_tokens)
        for width in architecture.text_widths
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(first).to(device, dtype),
        text_encoder_2=CLIPTextModelWithProjection(second).to(device, dtype),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return pipe


def _letters(folder: Path, num_tokens: int) -> CLIPTokenizer:
    """A tokenizer whose tokens are the letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>"]
    tokens.append("<|endoftext|>")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=num_tokens)


def _text_config(tokenizer: CLIPTokenizer, width: int, num_tokens: int) -> CLIPTextConfig:
    size = len(tokenizer)
    return CLIPTextConfig(
        vocab_size=size,
        hidden_size=width,
        projection_dim=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=num_tokens,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
