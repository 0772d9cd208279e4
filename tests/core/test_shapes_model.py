"""The shapes model: the shipped weights, and the script that trains them."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from crdiff_core.errors import ModelError
from crdiff_core.rewards.shapes import ShapesReward
from crdiff_core.shapes import WEIGHTS, grammar, train

TINY = train.Recipe(
    vae_steps=4,
    vae_batch=2,
    vae_channels=(8, 8, 8),
    pictures=16,
    steps=4,
    batch=4,
    warmup=2,
    channels=(8, 16),
    down_layers=1,
    up_layers=1,
    heads=2,
    text_width=16,
    text_layers=1,
)


def weights(folder):
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) == 3
    return {
        f"{file.parent.name}.{name}": tensor
        for file in files
        for name, tensor in load_file(file).items()
    }


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(WEIGHTS, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_shipped_folder_is_small():
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file()) <= 10e6


def test_shipped_recipe_is_the_scripts_default(pipe):
    recipe = train.Recipe()
    assert tuple(pipe.unet.config.block_out_channels) == recipe.channels
    assert pipe.unet.config.transformer_layers_per_block[-1] == recipe.down_layers
    assert tuple(pipe.vae.config.block_out_channels) == recipe.vae_channels


def test_each_word_is_one_known_token(pipe):
    for scene in grammar.scenes()[::50]:
        ids = pipe.tokenizer(scene.caption).input_ids
        assert len(ids) == len(scene.caption.split()) + 2
        assert len(ids) <= pipe.tokenizer.model_max_length
        assert pipe.tokenizer.decode(ids, skip_special_tokens=True).strip() == scene.caption


def test_it_draws_what_captions_say_at_its_native_size(pipe):
    captions = grammar.captions(16, seed=0)
    noise = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = pipe(
        captions, latents=noise, num_inference_steps=8, guidance_scale=3.0, output_type="pt"
    ).images
    assert images.shape == (16, 3, 32, 32)
    rewards = torch.tensor(ShapesReward()(images, captions))
    assert rewards.mean() > 0.75


def test_stopped_training_goes_on_to_the_same_bits(tmp_path):
    cpu = torch.device("cpu")
    train.train(TINY, tmp_path / "whole", tmp_path / "whole.work", cpu, save_every=2)
    whole = weights(tmp_path / "whole")
    # As after a kill: the last checkpoints are of step 2.
    torch.manual_seed(123)
    stopped = tmp_path / "stopped.work"
    tokenizer = train.build_tokenizer(stopped / "tokenizer")
    train.train_vae(TINY, stopped, cpu, 2, stop=2)
    vae = train.train_vae(TINY, stopped, cpu, 2)
    data = train.encode_pictures(TINY, vae, tokenizer)
    train.train_unet(TINY, *data, tokenizer, stopped, 2, stop=2)
    train.train(TINY, tmp_path / "resumed", stopped, cpu, save_every=2)
    resumed = weights(tmp_path / "resumed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_another_recipe_does_not_resume(tmp_path):
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(ModelError, match="another recipe"):
        train.train(TINY, tmp_path / "out", tmp_path, torch.device("cpu"))


def test_the_command_makes_a_folder_that_loads(tmp_path):
    arguments = ["--out", str(tmp_path / "out"), "--vae-steps", "1", "--steps", "1"]
    arguments += ["--pictures", "4", "--batch", "2", "--vae-batch", "1"]
    arguments += ["--channels", "8", "16", "--down-layers", "1", "--up-layers", "1"]
    train.main([*arguments, "--device", "cpu"])
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert pipe.unet.config.block_out_channels == [8, 16]
    assert pipe.vae.config.scaling_factor != 0.18215
