"""Small pipelines of the real diffusers classes, with random weights, saved as real folders."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

HIDDEN = 16


def small_unet(**changes: Any) -> UNet2DConditionModel:
    """A UNet with down, mid and up transformer blocks, of a few thousand weights."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": HIDDEN,
            "attention_head_dim": 8,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            **changes,
        }
    )


def _tokenizer(folder: Path) -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>"]
    tokens.append("<|endoftext|>")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16)


def _text_config(num_tokens: int, hidden: int = HIDDEN) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=num_tokens,
        hidden_size=hidden,
        projection_dim=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=num_tokens - 2,
        eos_token_id=num_tokens - 1,
        pad_token_id=num_tokens - 1,
    )


def _vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )


def save_sd(folder: Path) -> Path:
    """Save a StableDiffusionPipeline; one latent is 2x2 pixels."""
    tokenizer = _tokenizer(folder / "_tokenizer")
    torch.manual_seed(2)
    StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config(len(tokenizer))),
        tokenizer=tokenizer,
        unet=small_unet(),
        scheduler=DPMSolverMultistepScheduler(steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def save_sdxl(folder: Path) -> Path:
    """Save a StableDiffusionXLPipeline; one latent is 2x2 pixels."""
    tokenizer = _tokenizer(folder / "_tokenizer")
    torch.manual_seed(2)
    StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config(len(tokenizer))),
        # As in the real one the wider: diffusers tells a checkpoint's two by their widths.
        text_encoder_2=CLIPTextModelWithProjection(_text_config(len(tokenizer), 2 * HIDDEN)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=small_unet(
            cross_attention_dim=3 * HIDDEN,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=2 * HIDDEN + 6 * 8,
        ),
        scheduler=DPMSolverMultistepScheduler(steps_offset=1),
    ).save_pretrained(folder)
    return folder


# --- one original-format checkpoint of a whole pipeline ----------------------------------------


def save_checkpoint(folder: Path, file: Path, *, openclip: bool = False) -> Path:
    """Write a saved pipeline as one .safetensors file, as Stable Diffusion's own code named it.

    openclip: name the first text encoder's weights as Stable Diffusion 2's are.
    With the tensors that such files have besides: those of the noise schedule, position ids and
    what nobody asks of a text encoder.
    """
    is_xl = (folder / "text_encoder_2").is_dir()
    embedder = "conditioner.embedders.0" if is_xl else "cond_stage_model"
    config = json.loads((folder / "unet" / "config.json").read_text())
    weights = {
        f"model.diffusion_model.{_original_unet_name(name, config)}": tensor
        for name, tensor in _weights(folder / "unet").items()
    }
    for name, tensor in _weights(folder / "vae").items():
        original = _original_vae_name(name, folder)
        # Attention was a convolution of 1x1 then.
        is_projection = "attentions" in name and tensor.ndim == 2
        weights[f"first_stage_model.{original}"] = (
            tensor[:, :, None, None] if is_projection else tensor
        )
    text = {
        f"text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in _weights(folder / "text_encoder").items()
    }
    if openclip:
        unused = {"text_projection": torch.eye(HIDDEN), "logit_scale": torch.tensor(4.6)}
        text = {f"model.{name}": tensor for name, tensor in (_openclip(text) | unused).items()}
    else:
        text["text_model.embeddings.position_ids"] = torch.arange(16).unsqueeze(0)
        text = {f"transformer.{name}": tensor for name, tensor in text.items()}
    weights |= {f"{embedder}.{name}": tensor for name, tensor in text.items()}
    if is_xl:
        text = _openclip(_weights(folder / "text_encoder_2"))
        text["logit_scale"] = torch.tensor(4.6)
        weights |= {f"conditioner.embedders.1.model.{name}": each for name, each in text.items()}
    weights["alphas_cumprod"] = torch.linspace(1, 0, 1000)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)
    return file


def _weights(part: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in sorted(part.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def _rename(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        name = name.replace(ours, theirs)
    return name


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def _original_unet_name(name: str, config: dict[str, Any]) -> str:
    """Number a UNet's layers from the first to the last, as the original does, not by level."""
    match = re.match(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", name)
    if match is None:
        return _rename(name, _UNET_ENDS)
    side, level, kind, layer, rest = match.groups()
    is_attention = kind == "attentions"
    if kind == "resnets":
        rest = _rename(rest, _RESNET)
    if side == "mid":  # Resnet, attention, resnet.
        return f"middle_block.{2 * int(layer) + is_attention}.{rest}"
    num_layers = config["layers_per_block"]
    # Both sides have one more than num_layers on each level: on the way down a downsampler.
    first = int(level) * (num_layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + num_layers + 1}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        has_attention = "CrossAttn" in config["up_block_types"][int(level)]
        return f"output_blocks.{first + num_layers}.{1 + has_attention}.{rest}"
    if side == "down":
        return f"input_blocks.{1 + first + int(layer)}.{int(is_attention)}.{rest}"
    return f"output_blocks.{first + int(layer)}.{int(is_attention)}.{rest}"


_VAE_LAYERS = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "resnets": "block",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "down_blocks": "down",
}


def _original_vae_name(name: str, folder: Path) -> str:
    num_levels = len(json.loads((folder / "vae" / "config.json").read_text())["up_block_types"])
    # The original's decoder counts its levels from the finest.
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{num_levels - 1 - int(match[1])}", name)
    return _rename(name, _VAE_LAYERS)


_OPENCLIP_LAYERS = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
}


def _openclip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name a text encoder's weights as OpenCLIP does, whose queries, keys and values are one."""
    found = {}
    for name, tensor in weights.items():
        original = _rename(name, _OPENCLIP_LAYERS)
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T
        elif "q_proj" in name:
            parts = [
                weights[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")
            ]
            found[original.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            found[original] = tensor
    return found


# --- the Hugging Face cache ----------------------------------------------------------------------


def hub_cache(
    cache: Path, repo_id: str, commit: str, folder: Path, only: Sequence[str] = ("*",)
) -> Path:
    """Lay a folder into a Hugging Face cache as `hf download` does; returns its snapshot.

    only: the files that were asked for (--include); the listing names the others too.
    """
    home = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    names = [str(each.relative_to(folder)) for each in sorted(folder.rglob("*")) if each.is_file()]
    listing = {}
    for name in names:
        content = (folder / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        listing[name] = {"size": len(content), "blob_id": digest[:40]}
        if not any(fnmatchcase(name, pattern) for pattern in only):
            continue
        blob, link = home / "blobs" / digest, snapshot / name
        for parent in (blob.parent, link.parent):
            parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.unlink(missing_ok=True)
        link.symlink_to(Path(*[".."] * (len(Path(name).parts) + 1)) / "blobs" / digest)
    for file, text in {
        home / "refs" / "main": commit,
        home / "trees" / f"{commit}.json": json.dumps({"format_version": 1, "files": listing}),
    }.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return snapshot
