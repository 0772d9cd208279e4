"""Train the shapes model from nothing: `python -m crdiff_core.shapes.train --out DIR`.

First the VAE, then UNet and text encoder together on its latents. Every random number is keyed by
(seed, step), so a run that was stopped goes on from its checkpoint to the same weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from crdiff_core.errors import ModelError
from crdiff_core.shapes import grammar

NATIVE = 32
"""Height and width of every picture the UNet is trained on."""

NUM_TOKENS = 16
"""Length every caption is padded to; the longest takes 14."""

# The VAE sees other sizes too, so that what breaks there is the denoising.
VAE_SIZES = ((32, 32), (24, 40), (32, 32), (40, 24), (24, 24))


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights; the defaults made the shipped ones.

    down_layers, up_layers: transformer blocks at each inner-level block; `mid` has as many as
    `down_layers`. The outer level only convolves, so what text and attention do is done inside.
    cycle, restart: steps of one cosine of the learning rate, and the next one's peak against its.
    object_weight:  of the loss where an object is, against 1 for background.
    noise_skew:     timesteps are drawn as 1000 u ** noise_skew: 1 is uniform, less is noisier.
    """

    seed: int = 0
    vae_steps: int = 3000
    vae_batch: int = 16
    vae_lr: float = 3e-3
    vae_channels: tuple[int, ...] = (16, 32, 32)
    kl_weight: float = 1e-5
    pictures: int = 32768
    steps: int = 3400
    cycle: int = 1700
    restart: float = 0.75
    batch: int = 48
    lr: float = 2e-3
    warmup: int = 150
    ema: float = 0.995
    object_weight: float = 5.0
    noise_skew: float = 0.6
    caption_dropout: float = 0.1
    channels: tuple[int, int] = (48, 80)
    down_layers: int = 2
    up_layers: int = 2
    heads: int = 4
    text_width: int = 64
    text_layers: int = 2


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer with one token for each word of the grammar; its files go to `folder`."""
    texts = " ".join(scene.caption for scene in grammar.scenes())
    # Longest first: "green" must be built before "red" makes a merge of its r and e.
    words = sorted(set(texts.split()), key=lambda word: (-len(word), word))
    letters = sorted(set("".join(words)))
    vocab = dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters)])
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        # Byte-pair merges that build the word from left to right; a shared start is shared.
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        start = symbols[0]
        for symbol in symbols[1:]:
            merges[start, symbol] = None
            start += symbol
            vocab[start] = None
    tokens = [*vocab, "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n"
    )
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=NUM_TOKENS)
    split = [word for word in words if len(tokenizer.tokenize(word)) != 1]
    if split:
        raise ModelError(f"tokenizer splits {split}: their merges collide, rename the words")
    return tokenizer


def build_vae(recipe: Recipe) -> AutoencoderKL:
    """An untrained VAE of factor 4."""
    num = len(recipe.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * num,
        up_block_types=("UpDecoderBlock2D",) * num,
        block_out_channels=recipe.vae_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=NATIVE,
        # Attention over the whole frame would tie the VAE to the size it was trained at.
        mid_block_add_attention=False,
    )


def build_unet(recipe: Recipe) -> UNet2DConditionModel:
    """An untrained UNet."""
    return UNet2DConditionModel(
        sample_size=NATIVE // 4,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=recipe.channels,
        layers_per_block=1,
        transformer_layers_per_block=(1, recipe.down_layers),
        reverse_transformer_layers_per_block=(recipe.up_layers, 1),
        cross_attention_dim=recipe.text_width,
        attention_head_dim=recipe.heads,
        norm_num_groups=8,
    )


def build_text_encoder(recipe: Recipe, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text encoder."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.text_width,
            intermediate_size=4 * recipe.text_width,
            num_hidden_layers=recipe.text_layers,
            num_attention_heads=4,
            max_position_embeddings=NUM_TOKENS,
            projection_dim=recipe.text_width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ over a cosine schedule, predicting v."""
    return DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        lambda_min_clipped=-5.1,
        steps_offset=1,
    )


def generator(*key: int) -> torch.Generator:
    """A generator for one purpose, whatever was drawn before."""
    state = np.random.SeedSequence(key).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


def scenes_for(seed: int, num: int) -> list[grammar.Scene]:
    """Training scenes, one in four of two things (they are one in ten of the grammar)."""
    rng = np.random.default_rng(seed)
    pool = grammar.scenes_of(held_out=False)
    kinds = [
        [scene for scene in pool if scene.relation],
        [scene for scene in pool if scene.place],
    ]
    chosen = [kinds[int(rng.random() < 0.75)] for _ in range(num)]
    return [kind[int(rng.integers(len(kind)))] for kind in chosen]


@dataclass
class Checkpoint:
    """Modules and optimizer of one phase, in one file of the working folder."""

    path: Path
    modules: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer

    def save(self, step: int) -> None:
        """Write atomically, so that a run killed here still has the one before."""
        state = {name: module.state_dict() for name, module in self.modules.items()}
        part = self.path.with_suffix(".part")
        torch.save({"step": step, "optimizer": self.optimizer.state_dict(), **state}, part)
        part.replace(self.path)

    def load(self) -> int:
        """Return the number of steps done, 0 if there is no file."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        self.optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to 1 per cent of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def progress(start: int, steps: int, title: str, every: int = 100) -> Iterator[tuple[int, Any]]:
    """Steps still to do, each with a function that shows the loss: a bar, or lines without one."""
    if sys.stderr.isatty():
        with tqdm(range(start, steps), initial=start, total=steps, desc=title) as bar:
            for step in bar:
                yield step, lambda loss: bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        return
    began = time.perf_counter()

    def line(loss: float) -> None:
        if (step + 1) % every == 0 or step + 1 == steps:
            took = time.perf_counter() - began
            left = took / (step + 1 - start) * (steps - step - 1)
            print(
                f"{title} {step + 1}/{steps} loss {loss:.4f} {took:.0f} s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    for step in range(start, steps):
        yield step, line


def train_vae(
    recipe: Recipe, work: Path, device: torch.device, save_every: int, stop: int | None = None
) -> AutoencoderKL:
    """Train the VAE on pictures drawn as it goes, at VAE_SIZES; about 6 minutes on 2 cores."""
    torch.manual_seed(recipe.seed)
    vae = build_vae(recipe).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.vae_lr, weight_decay=0, fused=True)
    checkpoint = Checkpoint(work / "vae.pt", {"vae": vae}, optimizer)
    average = 0.0
    for step, show in progress(checkpoint.load(), min(recipe.vae_steps, stop or 2**31), "vae"):
        key = [recipe.seed, 1, step]
        scenes = scenes_for(
            int(np.random.SeedSequence(key).generate_state(1)[0]), recipe.vae_batch
        )
        size = VAE_SIZES[step % len(VAE_SIZES)]
        images = torch.from_numpy(grammar.pictures(scenes, step, *size)).to(device) * 2 - 1
        posterior = vae.encode(images).latent_dist
        # No sampling: with the standard deviation of 1 that an untrained encoder has, noise drowns
        # the signal for a thousand steps, and rendering only ever decodes.
        decoded = vae.decode(posterior.mean).sample
        loss = F.smooth_l1_loss(decoded, images, beta=0.2)
        optimizer.param_groups[0]["lr"] = learning_rate(step, recipe.vae_steps, 50, recipe.vae_lr)
        (loss + recipe.kl_weight * posterior.kl().mean()).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average += (loss.item() - average) * max(0.02, 1 / (step + 1))
        show(average)
        if (step + 1) % save_every == 0 or step + 1 == recipe.vae_steps:
            checkpoint.save(step + 1)
    return vae.requires_grad_(False).eval()


@torch.no_grad()
def encode_pictures(
    recipe: Recipe, vae: AutoencoderKL, tokenizer: CLIPTokenizer
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw and encode the pictures the UNet is trained on, and set the VAE's scaling factor.

    Returns latents (N, 4, 8, 8) of standard deviation 1, where objects are (N, 1, 8, 8), 0 or 1,
    and token ids (N, NUM_TOKENS).
    """
    scenes = scenes_for(recipe.seed, recipe.pictures)
    device = vae.device
    parts, masks = [], []
    for start in range(0, len(scenes), 512):
        images = torch.from_numpy(
            grammar.pictures(scenes[start : start + 512], start, NATIVE, NATIVE)
        ).to(device)
        parts.append(vae.encode(images * 2 - 1).latent_dist.mean)
        # The last corner is always background.
        painted = (images != images[:, :, -1:, -1:]).any(1, keepdim=True)
        masks.append(F.max_pool2d(painted.float(), 4))
    latents = torch.cat(parts)
    vae.register_to_config(scaling_factor=1 / float(latents.std()))
    texts = [scene.caption for scene in scenes]
    latents *= vae.config.scaling_factor
    return latents, torch.cat(masks), tokenize(tokenizer, texts).to(device)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids, (N, NUM_TOKENS)."""
    ids: Tensor = tokenizer(
        texts, padding="max_length", max_length=NUM_TOKENS, return_tensors="pt"
    ).input_ids
    return ids


def train_unet(
    recipe: Recipe,
    latents: Tensor,
    objects: Tensor,
    ids: Tensor,
    tokenizer: CLIPTokenizer,
    work: Path,
    save_every: int,
    stop: int | None = None,
    watch: Callable[[int, UNet2DConditionModel, CLIPTextModel], None] | None = None,
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Train UNet and text encoder together on encoded pictures.

    stop:  end after this step, as if interrupted.
    watch: called with the averaged models after each checkpoint.
    Returns the exponential averages of both.
    """
    device = latents.device
    torch.manual_seed(recipe.seed + 1)
    unet = build_unet(recipe).to(device)
    text = build_text_encoder(recipe, tokenizer).to(device)
    models = nn.ModuleDict({"unet": unet, "text": text})
    unet_ema, text_ema = build_unet(recipe).to(device), build_text_encoder(recipe, tokenizer)
    ema = nn.ModuleDict({"unet": unet_ema, "text": text_ema.to(device)}).requires_grad_(False)
    ema.load_state_dict(models.state_dict())
    ema.eval()
    params = list(models.parameters())
    latest = [param.detach() for param in params]  # The same memory, so always the latest.
    averages: list[Tensor] = list(ema.parameters())
    optimizer = torch.optim.AdamW(
        params, lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0, fused=True
    )
    checkpoint = Checkpoint(work / "unet.pt", {"models": models, "ema": ema}, optimizer)
    noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    empty = tokenize(tokenizer, [""]).to(device)
    average = 0.0
    models.train()
    start = checkpoint.load()
    for step, show in progress(start, min(recipe.steps, stop or 2**31), "unet"):
        random = generator(recipe.seed, 2, step)
        rows = torch.randint(len(latents), (recipe.batch,), generator=random).to(device)
        # Where things go and of which colour is decided while there is mostly noise.
        level = torch.rand(recipe.batch, generator=random) ** recipe.noise_skew
        times = (1000 * level).long().clamp(max=999).to(device)
        noise = torch.randn((recipe.batch, *latents.shape[1:]), generator=random).to(device)
        dropped = torch.rand((recipe.batch, 1), generator=random) < recipe.caption_dropout
        clean = latents[rows]
        tokens = torch.where(dropped.to(device), empty, ids[rows])
        words = text(tokens)[0]
        predicted = unet(noising.add_noise(clean, noise, times), times, words).sample
        weight = 1 + (recipe.object_weight - 1) * objects[rows]
        error = (predicted - noising.get_velocity(clean, noise, times)) ** 2
        loss = (weight * error).mean() / weight.mean()
        cycle, within = divmod(step, recipe.cycle)
        peak = recipe.lr * recipe.restart**cycle
        optimizer.param_groups[0]["lr"] = learning_rate(within, recipe.cycle, recipe.warmup, peak)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        # A short memory at first: the average must not start from untrained weights.
        decay = min(recipe.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(averages, latest, 1 - decay)
        average += (loss.item() - average) * max(0.01, 1 / (step + 1 - start))
        show(average)
        if (step + 1) % save_every == 0 or step + 1 == recipe.steps:
            checkpoint.save(step + 1)
            if watch:
                watch(step + 1, unet_ema, text_ema)
    return unet_ema, text_ema


def save_pipeline(
    out: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> StableDiffusionPipeline:
    """Write a folder that `StableDiffusionPipeline.from_pretrained` reads."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(out, safe_serialization=True)
    # Half precision is enough for the VAE, and keeps the folder under 10 MB; it loads as float32.
    copy.deepcopy(vae).half().save_pretrained(out / "vae", safe_serialization=True)
    return pipe


def train(
    recipe: Recipe,
    out: Path,
    work: Path,
    device: torch.device,
    save_every: int = 250,
    stop: int | None = None,
) -> None:
    """Train the whole pipeline and write it to `out`; what `work` has is not done again.

    stop: end each phase after this step, as if interrupted.
    Raises ModelError if `work` holds another recipe.
    """
    work.mkdir(parents=True, exist_ok=True)
    note = work / "recipe.json"
    text = json.dumps(asdict(recipe), indent=1)
    if note.exists() and note.read_text() != text:
        raise ModelError(f"{work} was begun with another recipe: choose another --work folder")
    note.write_text(text)
    tokenizer = build_tokenizer(work / "tokenizer")
    vae = train_vae(recipe, work, device, save_every, stop)
    data = encode_pictures(recipe, vae, tokenizer)
    unet, text_encoder = train_unet(recipe, *data, tokenizer, work, save_every, stop)
    save_pipeline(out, vae, unet, text_encoder, tokenizer)


def main(argv: Sequence[str] | None = None) -> None:
    """Train with the recipe, any of whose numbers can be set."""
    parser = argparse.ArgumentParser(
        description="Train the shapes model. The same command again goes on where it was.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished pipeline")
    parser.add_argument("--work", type=Path, help="folder of checkpoints; OUT.work if not given")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of torch; its own choice if not given")
    parser.add_argument("--save-every", type=int, default=250, help="steps between checkpoints")
    for field in fields(Recipe):
        default: Any = field.default
        many = isinstance(default, tuple)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(default[0] if many else default),
            nargs="+" if many else None,
            default=default,
        )
    options = vars(parser.parse_args(argv))
    out, work, threads = options.pop("out"), options.pop("work"), options.pop("threads")
    device, save_every = torch.device(options.pop("device")), options.pop("save_every")
    if threads:
        torch.set_num_threads(threads)
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }
    recipe = Recipe(**values)
    train(recipe, out, work or out.with_name(f"{out.name}.work"), device, save_every)


if __name__ == "__main__":
    main()
