# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch>=2.11,<2.14", "numpy>=2", "tyro>=1", "tensorboard>=2.20", "pillow>=10", "ale-py>=0.11", "minatar>=1.0.15",
#     "gymnasium[box2d,classic-control]>=1.3,<2",
# ]
# ///
"""IRIS: Transformers are Sample-Efficient World Models.
Micheli, Alonso, Fleuret. ICLR 2023; equations as in arXiv:2209.00588v2. Authors' code: github.com/eloialonso/iris.

A discrete autoencoder turns each frame into 16 tokens of a vocabulary of 512. A GPT over 20 steps of (16 frame tokens,
1 action token) predicts the next token, the sign of the reward and the end of the episode. A convolutional LSTM actor
and critic learns only from 20-step rollouts of that GPT, looking at decoded frames; it sees decoded frames in the real
environment too.

    python iris.py --env-id ALE/Breakout-v5                  # Atari 100k as in the paper, on a GPU
    python iris.py --preset cpu                              # Catch on a laptop, minutes
    python iris.py --preset minatar --env-id MinAtar/Breakout-v1     # other presets: see PRESETS
    python iris.py --env-id ALE/Freeway-v5 --temperature 0.01        # collect with an almost greedy policy
    python iris.py --init-from last.pt --env-id ALE/Pong-v5  # start from a checkpoint of the authors' code
    python iris.py --resume runs/NAME                        # go on, bit for bit on a CPU

Deviations from the authors' code, each with its reason (more: docs/iris.md):
  * The tokenizer's reconstruction loss is the one of the authors' later Delta-IRIS, times `--recon-scale`, because the
    perceptual loss (LPIPS) needs weights that a script cannot carry. All published scores are with LPIPS:
    `--lpips-weights FILE` is the published loss, without the dropout in its heads that the authors leave active.
  * The frames of the replay are encoded and decoded once per epoch, not once per use; decoded ones are kept as uint8.
  * The last token of a frame enters the GPT together with the action that follows it: 306 calls per rollout, not 325.
  * The rollout is made without gradients; policy and value are computed again on its frames, in one batch, with them.
  * bfloat16 on a GPU where the authors compute in float32; `--no-bf16` mirrors them.
Not the paper's, off by default: `--mask-after-end` of Delta-IRIS (arXiv:2406.19320); `--tok-patch`, `--tok-tiles`,
`--revive-codes`, `--tokenizer-stop` for tokenizers that learn in seconds, `--wm-init-gain`, `--skip-first-frame` for
narrow GPTs that do.

Symbols in shape comments:
  B  batch (segments, rollouts)        K  tokens of a frame            C  channels of an image
  T  time (steps of a segment)         V  vocabulary                   S  pixels per side of an image
  H  imagination horizon               D  width of a code              U  units of the LSTM
  N  frames, environments              E  width of the GPT             A  actions
Time: row t holds observation t, the action taken AFTER seeing it, and the reward and the end that FOLLOWED. An
episode's last observation, which nothing follows, is not stored. A block of the GPT is the K tokens of frame t and then
action t, so reward t, end t and the first token of frame t+1 are predicted at the action's position.
"""

import bisect
import ctypes
import importlib
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple, Optional

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium import spaces
from PIL import Image
from torch import nn
from torch.utils.tensorboard import SummaryWriter

# ---- Args and presets ------------------------------------------------------------------------------------------------


# Defaults are the authors' configuration; the paper's tables agree with it.
# fmt: off
@dataclass
class Args:
    # Experiment
    env_id: str = "ALE/Pong-v5"  # any gymnasium id with Discrete actions and images, my_module:MyEnv-v0
    preset: Literal["full", "cpu", "atari100k", "minatar"] = "full"  # named settings; explicit flags win over them
    total_timesteps: int = 100_000  # agent steps, summed over environments (paper: 500 epochs of 200)
    seed: int = 1  # seed of everything random: networks, noise, replay, environments
    resume: Optional[str] = None  # run directory to continue
    target_return: Optional[float] = None  # exit with code 1 if the final evaluation stays below this
    init_from: Optional[str] = None  # checkpoint of the authors' code (its `last.pt`) to start from
    cuda: bool = True  # use the GPU if there is one
    compile: bool = True  # on a GPU: compile the networks, capture each whole update, rollout included, in a CUDA graph
    bf16: bool = True  # compute in bfloat16 on a GPU (parameters, codebook lookup, losses stay float32)
    num_threads: Optional[int] = None  # CPU threads (None: torch's own choice)
    exp_name: str = "iris"  # part of the run directory's name
    torch_deterministic: bool = True  # deterministic kernels
    track: Optional[str] = None  # project of Weights and Biases that gets the curves too (needs wandb)
    log_every: int = 1000  # agent steps between log lines, which come between epochs
    save_every: int = 10_000  # agent steps between checkpoints, which come between epochs
    eval_episodes: int = 100  # episodes of the final evaluation and of the random baseline
    eval_temperature: float = 0.5  # of the policy when it is evaluated (0: the most likely action)
    # Environment
    num_envs: int = 1  # environments in lockstep
    env_kwargs: str = "{}"  # JSON object passed to gymnasium.make; Atari is not sticky unless it says so
    action_repeat: Optional[int] = None  # environment steps per agent step (None: 4 for Atari, else 1)
    max_episode_steps: Optional[int] = None  # agent steps after which an episode is cut (None: the environment's)
    max_frames: int = 20_000  # Atari: raw frames after which a training game is cut; 108,000 in evaluation
    pixels: bool = False  # observe rendered images instead of the environment's own observation
    image_size: int = 64  # images are resized to this many pixels per side
    episodic_life: bool = True  # Atari: a lost life ends a training episode, the game goes on
    # Schedule
    steps_per_epoch: int = 200  # agent steps collected per epoch, summed over environments
    extra_epochs: int = 100  # epochs after the last agent step, which only learn
    tokenizer_start: int = 5  # epochs before the tokenizer's first update
    tokenizer_stop: Optional[int] = None  # the tokenizer is frozen after this epoch (None: never)
    world_model_start: int = 25  # epochs before the world model's first update
    actor_critic_start: int = 50  # epochs before the actor-critic's first update
    tokenizer_updates: int = 200  # per epoch
    world_model_updates: int = 200  # per epoch
    actor_critic_updates: int = 200  # per epoch
    # World model
    vocab_size: int = 512  # V, words of the tokenizer's vocabulary
    code_dim: int = 512  # D, width of a code word
    tok_channels: int = 64  # channels of the tokenizer's convolutions
    tok_levels: int = 5  # resolutions of the tokenizer; each halves the one before
    tok_blocks: int = 2  # residual blocks per resolution of the encoder; the decoder has one more
    tok_attention: str = "8 16"  # resolutions (pixels per side) with attention
    tok_latent: int = 512  # channels between the convolutions and the codebook
    tok_groups: int = 32  # groups of the tokenizer's group norms
    tok_patch: int = 1  # the first convolution takes patches of this many pixels per side (1: the paper's 3x3)
    tok_tiles: int = 1  # the image is cut into tiles x tiles parts that are encoded apart (1: the whole image)
    beta: float = 1.0  # weight of the commitment term (VQ-VAE has 0.25)
    recon_scale: float = 10.0  # weight of the loss without LPIPS (Delta-IRIS: 1, with a commitment of 0.02)
    lpips_weights: Optional[str] = None  # VGG16 and LPIPS heads, one file or two with a comma: L1 + LPIPS as the paper
    revive_codes: int = 0  # tokenizer updates in which unused code words are moved where the codebook fits worst
    batch_length: int = 20  # T, steps of a training sequence and of the GPT's memory
    embed_dim: int = 256  # E, width of the GPT
    num_layers: int = 10  # blocks of the GPT
    num_heads: int = 4  # attention heads of a block
    dropout: float = 0.1  # of embeddings, attention weights and residual branches of the GPT
    wm_init_gain: float = 0.0  # the GPT's linear weights from N(0, gain^2 / inputs) (0: N(0, 0.02^2) as the paper)
    skip_first_frame: bool = False  # no loss on the tokens of a segment's first frame, which no dream predicts
    # Behavior
    imag_horizon: int = 20  # H, imagined steps
    burn_in: int = 20  # real steps that warm up the LSTM before a rollout and before acting
    gamma: float = 0.995  # discount
    return_lambda: float = 0.95  # lambda of the returns
    ent_coef: float = 0.001  # entropy scale of the actor
    ac_channels: str = "32 32 64 64"  # channels of the actor-critic's convolutions, each with a 2x2 max-pooling
    lstm_size: int = 512  # U, units of the actor-critic's LSTM
    temperature: float = 1.0  # of the policy when it collects (0.01 for Freeway: the paper's recipe against dithering)
    epsilon: float = 0.01  # probability of a uniform random action when it collects
    mask_after_end: bool = False  # no loss on imagined steps after the first imagined end (Delta-IRIS)
    # Learning
    buffer_size: int = 100_000  # replay capacity in rows, summed over environments
    tokenizer_batch_size: int = 256  # frames per update of the tokenizer
    batch_size: int = 64  # segments per update of the world model
    ac_batch_size: int = 64  # B, rollouts per update of the actor-critic
    learning_rate: float = 1e-4  # of all three optimizers
    tokenizer_lr: Optional[float] = None  # of the tokenizer (None: --learning-rate)
    world_model_lr: Optional[float] = None  # of the world model (None: --learning-rate)
    actor_critic_lr: Optional[float] = None  # of the actor-critic (None: --learning-rate)
    weight_decay: float = 0.01  # of the weights of the world model's linear layers
    max_grad_norm: float = 10.0  # global gradient norm at which each of the three is clipped


PRESETS = dict(
    full=dict(),
    atari100k=dict(),  # the default, under the name that the other scripts give to this benchmark
    # A laptop: Catch, 32x32 pixels in 16 tokens that see one 8x8 patch each; learning rates for hundreds of updates.
    # NOTE: at a rate of 3e-3 for the tokenizer single updates undid hundreds of others; in one run of a dozen such a
    # fall came after --revive-codes, and five code words were left when the tokenizer was frozen.
    # NOTE: arrivals of the ball in the paddle's row of tokens that the GPT foresees, on true tokens: with the paper's
    # initial weights and the loss of first frames 3 % after 1000 updates; without that loss 1 % after 400; with wider
    # weights 64 % after 600; with both changes 93 % after 600.
    cpu=dict(
        env_id="Catch-v0", image_size=32, total_timesteps=12_800, num_envs=16, steps_per_epoch=320, extra_epochs=0,
        tokenizer_start=5, tokenizer_stop=13, world_model_start=13, actor_critic_start=24, tokenizer_updates=150,
        world_model_updates=50, actor_critic_updates=20, vocab_size=64, code_dim=16, tok_channels=64, tok_levels=1,
        tok_blocks=1, tok_attention="", tok_latent=32, tok_groups=1, tok_patch=8, tok_tiles=4, revive_codes=1000,
        batch_length=2, embed_dim=64, num_layers=2, num_heads=4, dropout=0.0, wm_init_gain=1.0, skip_first_frame=True,
        imag_horizon=8, burn_in=2, gamma=0.95, ent_coef=0.01, ac_channels="8 16", lstm_size=128, mask_after_end=True,
        tokenizer_batch_size=32, batch_size=64, ac_batch_size=64, tokenizer_lr=1e-3, world_model_lr=1e-3,
        actor_critic_lr=3e-3, num_threads=1, log_every=640, save_every=6_400),
    # A GPU or patience: MinAtar drawn as 20x20 RGB in 5x5 tokens of two cells each.
    minatar=dict(
        env_id="MinAtar/Breakout-v1", pixels=True, image_size=20, num_envs=4, tok_channels=128, tok_levels=1,
        tok_attention="", tok_groups=1, tok_patch=4, tok_tiles=5, vocab_size=256, code_dim=64, tok_latent=64,
        revive_codes=2000, tokenizer_lr=1e-3, world_model_lr=3e-4, ac_channels="32 64", lstm_size=256,
        tokenizer_stop=25, mask_after_end=True, embed_dim=128, num_layers=4),
)
# fmt: on


# ---- Maths -----------------------------------------------------------------------------------------------------------


def lambda_return(rewards, values, ends, gamma, lam):
    """Lambda returns (eq. 6 and 7): all (B, T) -> (B, T). G_T = V_T; the last step only bootstraps."""
    returns = [values[:, -1]]
    # NOTE: the bootstrap is V of the NEXT step, and reward and end are those that follow step t.
    steps = zip(rewards.unbind(1)[:-1], (gamma * (1 - ends.float())).unbind(1), values.unbind(1)[1:])
    for reward, live, value in reversed(list(steps)):
        returns.append(reward + live * ((1 - lam) * value + lam * returns[-1]))
    return torch.stack(returns[::-1], 1)


def vector_quantize(z, codebook):
    """Nearest code words: z (N, D), codebook (V, D) -> tokens (N,), z_q (N, D) with gradients for the codebook only."""
    # NOTE: rounded distances (bfloat16, TF32, even float32's square roots) pick other tokens; float64 costs little.
    with torch.autocast(z.device.type, enabled=False):
        x, codes = z.detach().double(), codebook.detach().double()
        # |x - c|^2 without |x|^2, which is the same for all code words
        tokens = torch.addmm(codes.square().sum(-1), x, codes.t(), alpha=-2).argmin(-1)
    return tokens, F.embedding(tokens, codebook)


def vq_loss(z, z_q, beta=1.0):
    """Codebook and commitment terms, means over all elements: z and z_q of one shape -> 0-dim."""
    # NOTE: beta is 1 and not VQ-VAE's 0.25; there is no moving-average codebook.
    return ((z.detach() - z_q) ** 2).mean() + beta * ((z - z_q.detach()) ** 2).mean()


def recon_loss(x, x_hat):
    """Delta-IRIS's reconstruction loss: images (N, ...) in [0, 1] -> 0-dim."""
    # NOTE: never L1 alone. Its optimum is a median, which deletes small moving objects, and what the tokenizer drops
    # does not exist for the policy. The square and the largest error of an image keep them.
    d = (x - x_hat).abs().flatten(1)
    return 0.1 * d.mean() + (d**2).mean() + 0.01 * (d**2).amax(1).mean()


def world_model_labels(tokens, rewards, ends, mask):
    """Targets of the GPT: tokens (B, T, K), rewards, ends, mask (B, T) -> frame tokens (B, T*K - 1), sign of the reward
    as 0, 1, 2 (B, T), end as 0, 1 (B, T); -100 where the mask says padding."""
    # NOTE: nothing predicts the first token of a segment, so it is dropped; everything else is shifted by one.
    frames = tokens.masked_fill(~mask.unsqueeze(-1), -100).flatten(1)[:, 1:]  # (B, T*K - 1)
    signs = (rewards.sign() + 1).long().masked_fill(~mask, -100)
    return frames, signs, ends.long().masked_fill(~mask, -100)


def sample_categorical(logits, temperature=1.0, generator=None):
    """Draw from softmax(logits / temperature): (..., n) -> (...), without waiting for the device."""
    if temperature == 0:
        return logits.argmax(-1)
    probs = torch.softmax(logits.float() / temperature, -1)
    # A race of exponential clocks: the first one to ring is drawn.
    return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(-1)


def sample_segments(lengths, batch_size, length, from_start, rng):
    """Segments of episodes that are `lengths` (n,) long: episode (B,), steps (B, length), mask (B, length) where the
    steps exist. An episode is drawn uniformly, then a step of it: the segment's first (padded on the right) or its last
    (padded on the left)."""
    # NOTE: uniform over episodes, not over steps: with lives as episodes this prefers short ones, as in the paper.
    episode = rng.integers(len(lengths), size=batch_size)
    anchor = rng.integers(lengths[episode])[:, None]  # (B, 1)
    steps = anchor + (np.arange(length) if from_start else np.arange(1 - length, 1))  # (B, length)
    mask = (steps >= 0) & (steps < lengths[episode][:, None])
    return episode, np.clip(steps, 0, lengths[episode][:, None] - 1), mask


def ints(text):
    """ "8 16" -> [8, 16]."""
    return [int(word) for word in text.replace(",", " ").split()]


def schedule(args, epoch):
    """Updates of (tokenizer, world model, actor-critic) in an epoch, counted from 1."""
    return {
        "tokenizer": args.tokenizer_updates * (args.tokenizer_start < epoch <= (args.tokenizer_stop or math.inf)),
        "world_model": args.world_model_updates * (args.world_model_start < epoch),
        "actor_critic": args.actor_critic_updates * (args.actor_critic_start < epoch),
    }


# ---- Networks --------------------------------------------------------------------------------------------------------


def init_weights(module, gain=0.0):
    """The GPT's initialisation, for `module.apply`: N(0, 0.02) for linear layers and embeddings."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        # NOTE: at width 64 a spread of 0.02 leaves attention flat and branches silent for hundreds of updates.
        wide = gain and isinstance(module, nn.Linear)
        nn.init.normal_(module.weight, std=gain / module.in_features**0.5 if wide else 0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def same_conv(i, o, side):
    """3x3 convolution; 1x1 on a single pixel, where the other eight taps would only see padding."""
    return nn.Conv2d(i, o, 3 if side > 1 else 1, padding=int(side > 1))


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, plus the input. Names as in the authors' checkpoints."""

    def __init__(self, channels, groups, side):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, channels, eps=1e-6), same_conv(channels, channels, side)
        self.norm2, self.conv2 = nn.GroupNorm(groups, channels, eps=1e-6), same_conv(channels, channels, side)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class AttnBlock(nn.Module):
    """One head of attention over all pixels, plus the input."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):  # (N, C, S, S)
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))  # (N, 1, S*S, C)
        h = F.scaled_dot_product_attention(q, k, v)  # scaled by 1 / sqrt(C)
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # NOTE: zeros below and on the right, none elsewhere


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention if the resolution has it, then a resampling."""

    def __init__(self, channels, groups, side, blocks, attention, resample=None):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(channels, groups, side) for _ in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(channels, groups) for _ in range(blocks if attention else 0))
        for name, module in (resample or {}).items():
            self.add_module(name, module)
        self.resample = next(iter(resample), None) if resample else None

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if len(self.attn) else x
        return getattr(self, self.resample)(x) if self.resample else x


class Middle(nn.Module):
    def __init__(self, channels, groups, side):
        super().__init__()
        self.block_1, self.block_2 = ResnetBlock(channels, groups, side), ResnetBlock(channels, groups, side)
        self.attn_1 = AttnBlock(channels, groups)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class FrameEncoder(nn.Module):
    """Tiles (N, C, S, S) -> latents (N, latent, s, s) with s = S / patch / 2^(levels - 1)."""

    def __init__(self, side, image_channels, channels, levels, blocks, attention, latent, groups, patch):
        super().__init__()
        side //= patch
        kernel = dict(kernel_size=3, padding=1) if patch == 1 else dict(kernel_size=patch, stride=patch)
        self.conv_in, self.down = nn.Conv2d(image_channels, channels, **kernel), nn.ModuleList()
        for level in range(levels):
            resample = {"downsample": Downsample(channels)} if level < levels - 1 else None
            self.down.append(Level(channels, groups, side, blocks, side in attention, resample))
            side = side // 2 if resample else side
        self.mid, self.norm_out = Middle(channels, groups, side), nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv_out = same_conv(channels, latent, side)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class FrameDecoder(nn.Module):
    """Latents (N, latent, s, s) -> tiles (N, C, S, S)."""

    def __init__(self, side, image_channels, channels, levels, blocks, attention, latent, groups, patch):
        super().__init__()
        self.patch, sides = patch, [side // patch >> level for level in range(levels)]
        self.conv_in, self.mid = same_conv(latent, channels, sides[-1]), Middle(channels, groups, sides[-1])
        self.up = nn.ModuleList()  # NOTE: from the largest resolution to the smallest, as in checkpoints; run backwards
        for level, s in enumerate(sides):
            resample = {"upsample": Upsample(channels)} if level else None
            self.up.append(Level(channels, groups, s, blocks + 1, s in attention, resample))
        self.norm_out = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv_out = same_conv(channels, image_channels * patch**2, sides[0])

    def forward(self, x):
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.patch)


class Tokenizer(nn.Module):
    """Images (N, C, S, S) in [0, 1] <-> tokens (N, K), row by row."""

    def __init__(self, image_size=64, image_channels=3, vocab_size=512, code_dim=512, channels=64, levels=5, blocks=2,
                 attention=(8, 16), latent=512, groups=32, patch=1, tiles=1):  # fmt: skip
        super().__init__()
        self.tiles, self.side = tiles, image_size // patch >> (levels - 1)
        sizes = (image_size // tiles, image_channels, channels, levels, blocks, attention, latent, groups, patch)
        self.encoder, self.decoder = FrameEncoder(*sizes), FrameDecoder(*sizes)
        self.pre_quant_conv, self.post_quant_conv = nn.Conv2d(latent, code_dim, 1), nn.Conv2d(code_dim, latent, 1)
        self.embedding = nn.Embedding(vocab_size, code_dim)
        nn.init.uniform_(self.embedding.weight, -1 / vocab_size, 1 / vocab_size)

    @property
    def num_tokens(self):
        return self.side**2

    def cut(self, x):
        """(N, c, s, s) -> (N*tiles*tiles, c, s/tiles, s/tiles)."""
        (n, c, s, _), t = x.shape, self.tiles
        return x.view(n, c, t, s // t, t, s // t).permute(0, 2, 4, 1, 3, 5).reshape(n * t * t, c, s // t, s // t)

    def join(self, x):
        """The inverse of `cut`."""
        (_, c, s, _), t = x.shape, self.tiles
        return x.reshape(-1, t, t, c, s, s).permute(0, 3, 1, 4, 2, 5).reshape(-1, c, t * s, t * s)

    def latents(self, x):
        """What the codebook quantizes: (N, C, S, S) -> (N, K, D) float32."""
        x = x * 2 - 1
        z = self.encoder(self.cut(x) if self.tiles > 1 else x)
        z = self.pre_quant_conv(self.join(z) if self.tiles > 1 else z)  # (N, D, side, side)
        return z.flatten(2).transpose(1, 2).float()

    def encode(self, x):
        """(N, C, S, S) -> tokens (N, K)."""
        z = self.latents(x)
        return vector_quantize(z.flatten(0, 1), self.embedding.weight)[0].view(z.shape[:2])

    def embed(self, tokens):
        """Code words: (N, K) -> (N, K, D)."""
        return self.embedding(tokens)

    def decode(self, z_q):
        """Code words (N, K, D) -> images (N, C, S, S), near [0, 1] but not clamped."""
        z = z_q.transpose(1, 2).reshape(len(z_q), -1, self.side, self.side)
        z = self.post_quant_conv(z)
        x = self.decoder(self.cut(z) if self.tiles > 1 else z)
        return ((self.join(x) if self.tiles > 1 else x).float() + 1) / 2

    def show(self, tokens):
        """What the policy sees of frames: tokens (N, K) -> images in [0, 1]."""
        codes = self.embedding.weight
        if self.tiles < self.side or tokens.numel() < len(codes):
            return self.decode(self.embed(tokens)).clamp(0, 1)
        # Tokens that are drawn apart from each other look the same everywhere: draw each code word once.
        pieces = self.decoder(self.post_quant_conv(codes[:, :, None, None])).float()  # (V, C, S/tiles, S/tiles)
        return ((self.join(pieces[tokens.flatten()]) + 1) / 2).clamp(0, 1)

    def encode_decode(self, x):
        return self.decode(self.embed(self.encode(x)))

    def forward(self, x, revive=None):
        """Latents, their code words (both (N, K, D)), reconstruction, tokens (N, K). `revive`: a function of the
        latents (N*K, D) that may move code words before they are looked up."""
        z = self.latents(x)
        if revive:
            revive(z.detach().flatten(0, 1))
        tokens, z_q = vector_quantize(z.flatten(0, 1), self.embedding.weight)
        z_q = z_q.view(z.shape)
        # NOTE: straight-through: forward the code word, backward as if the decoder had seen z.
        return z, z_q, self.decode(z + (z_q - z).detach()), tokens.view(z.shape[:2])


class KeysValues:
    """Keys and values of all layers, (layers, B, heads, max_tokens, E/heads), filled from the left; allocated once."""

    def __init__(self, shape, device, dtype):
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.size = 0  # tokens seen; a number of the host, so that slices of exact length need no mask and no waiting

    def reset(self):
        self.size = 0


class GPTBlock(nn.Module):
    """x + attention(LN x), then x + MLP(LN x)."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def project(self, x):
        """(B, n, E) -> queries, keys, values (B, heads, n, E/heads)."""
        q, k, v = self.qkv(self.ln1(x)).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return q, k, v

    def finish(self, x, y):
        """Residual stream (B, n, E), attention output (B, heads, n, E/heads) -> (B, n, E)."""
        drop = self.dropout if self.training else 0.0
        x = x + F.dropout(self.proj(y.transpose(1, 2).reshape(x.shape)), drop)
        return x + F.dropout(self.mlp(self.ln2(x)), drop)

    def forward(self, x, keys=None, values=None, start=0):
        q, k, v = self.project(x)
        n = x.shape[1]
        if keys is not None:
            keys[:, :, start : start + n], values[:, :, start : start + n] = k, v
            k, v = keys[:, :, : start + n].to(q.dtype), values[:, :, : start + n].to(q.dtype)
        # A single new token may look at everything before it; only several new tokens need a mask.
        mask = None if n == 1 or start == 0 else torch.ones(n, start + n, dtype=torch.bool, device=x.device).tril(start)
        drop = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, drop, is_causal=n > 1 and start == 0)
        return self.finish(x, y)


class Transformer(nn.Module):
    """Embedded tokens (B, n, E) -> (B, n, E), each position from those before it and itself."""

    def __init__(self, width=256, layers=10, heads=4, dropout=0.1):
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(GPTBlock(width, heads, dropout) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)

    def forward(self, x, kv=None):
        x, start = self.drop(x), kv.size if kv else 0
        for i, block in enumerate(self.blocks):
            x = block(x, kv.keys[i], kv.values[i], start) if kv else block(x)
        if kv:
            kv.size += x.shape[1]
        return self.ln_f(x)


class Predictions(NamedTuple):
    """Logits of what follows, where it is predicted: frame tokens (B, positions, V), rewards (B, actions, 3), ends
    (B, actions, 2)."""

    observations: torch.Tensor
    rewards: torch.Tensor
    ends: torch.Tensor


class WorldModel(nn.Module):
    """GPT over blocks of K frame tokens and one action token."""

    def __init__(self, vocab_size=512, actions=18, tokens_per_frame=16, timesteps=20, embed_dim=256, num_layers=10,
                 num_heads=4, dropout=0.1, init_gain=0.0):  # fmt: skip
        super().__init__()
        self.block, self.max_tokens = tokens_per_frame + 1, timesteps * (tokens_per_frame + 1)
        self.vocab_size, self.actions = vocab_size, actions
        self.cache_shape = num_layers, num_heads, self.max_tokens, embed_dim // num_heads
        self.transformer = Transformer(embed_dim, num_layers, num_heads, dropout)
        self.pos_emb = nn.Embedding(self.max_tokens, embed_dim)
        # NOTE: tokens are embedded anew, the tokenizer's code words are not reused: the authors found no gain in it.
        self.act_emb, self.obs_emb = nn.Embedding(actions, embed_dim), nn.Embedding(vocab_size, embed_dim)
        sizes = {"observations": vocab_size, "rewards": 3, "ends": 2}
        for name, o in sizes.items():
            head = nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.ReLU(), nn.Linear(embed_dim, o))
            self.add_module(f"head_{name}", head)
        self.apply(lambda module: init_weights(module, init_gain))
        # NOTE: a frame token is predicted wherever one comes next: at the action (the next frame's first token) and at
        # every frame token but the last of its frame, which is followed by an action.
        self.at_action = tokens_per_frame
        places = range(self.max_tokens)
        self.obs_places = [p for p in places if p % self.block != self.at_action - 1]
        self.act_places = [p for p in places if p % self.block == self.at_action]
        self.register_buffer("obs_index", torch.tensor(self.obs_places), persistent=False)
        self.register_buffer("act_index", torch.tensor(self.act_places), persistent=False)

    def cache(self, n):
        """An empty memory for n rollouts."""
        weight = self.pos_emb.weight
        dtype = torch.get_autocast_dtype(weight.device.type) if torch.is_autocast_enabled(weight.device.type) else None
        layers, *rest = self.cache_shape
        return KeysValues((layers, n, *rest), weight.device, dtype or weight.dtype)

    def pick(self, x, start, index, places):
        """Those of x (B, n, E), which stands at positions from `start` on, that are in `places` (`index` on the
        device)."""
        low, high = bisect.bisect_left(places, start), bisect.bisect_left(places, start + x.shape[1])
        return x if high - low == x.shape[1] else x[:, index[low:high] - start]

    def embed(self, tokens, start):
        n = tokens.shape[1]
        position = self.pos_emb.weight[start : start + n]
        if start // self.block == (start + n) // self.block:  # no action among them
            return self.obs_emb(tokens) + position
        action = torch.arange(start, start + n, device=tokens.device) % self.block == self.at_action  # (n,)
        frame = self.obs_emb(tokens.clamp(max=self.vocab_size - 1))
        return torch.where(action[:, None], self.act_emb(tokens.clamp(max=self.actions - 1)), frame) + position

    def forward(self, tokens, kv=None):
        """tokens (B, n), which continue those in the memory `kv` if there is one -> Predictions at their positions."""
        # NOTE: positions go on where the memory ends; a memory must be reset, or new, for every rollout.
        start = kv.size if kv else 0
        assert start + tokens.shape[1] <= self.max_tokens, "the memory is full"
        x = self.transformer(self.embed(tokens, start), kv)
        obs = self.pick(x, start, self.obs_index, self.obs_places)
        act = self.pick(x, start, self.act_index, self.act_places)
        return Predictions(self.head_observations(obs), self.head_rewards(act), self.head_ends(act))


class ActorCritic(nn.Module):
    """Frames in [0, 1] -> policy and value: four times convolution, max-pooling, ReLU; one LSTM; two linear layers."""

    def __init__(self, actions=18, image_size=64, image_channels=3, channels=(32, 32, 64, 64), lstm_size=512):
        super().__init__()
        widths = [image_channels, *channels]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in zip(widths, widths[1:], strict=False))
        self.lstm_size = lstm_size
        self.lstm = nn.LSTMCell((image_size >> len(channels)) ** 2 * widths[-1], lstm_size)
        self.actor_linear, self.critic_linear = nn.Linear(lstm_size, actions), nn.Linear(lstm_size, 1)

    def initial(self, n, device=None):
        """LSTM state of n new episodes: h and c, each (n, U)."""
        return tuple(torch.zeros(n, self.lstm_size, device=device) for _ in range(2))

    def forward(self, frames, state, mask=None):
        """Frames (B, T, C, S, S), state -> logits (B, T, A), values (B, T), state after the last frame. Where the mask
        (B, T) is false a frame does not exist and the state stays as it is."""
        x = frames.flatten(0, 1) * 2 - 1
        for conv in self.convs:
            x = F.relu(F.max_pool2d(conv(x), 2))
        # Everything but the recurrence is one batch over all steps; LSTMCell's arithmetic is written out for that.
        x = F.linear(x.flatten(1), self.lstm.weight_ih, self.lstm.bias_ih).view(*frames.shape[:2], -1)  # (B, T, 4U)
        (h, c), outputs = state, []
        for t, x_t in enumerate(x.unbind(1)):
            gates = (x_t + F.linear(h, self.lstm.weight_hh, self.lstm.bias_hh)).float()
            i, f, g, o = gates.chunk(4, -1)
            c_new = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h_new = torch.sigmoid(o) * torch.tanh(c_new)
            if mask is not None:  # NOTE: padding is on the left; the LSTM must not be stepped on it
                keep = mask[:, t, None]
                h_new, c_new = torch.where(keep, h_new, h), torch.where(keep, c_new, c)
            h, c = h_new, c_new
            outputs.append(h)
        y = torch.stack(outputs, 1)  # (B, T, U)
        return self.actor_linear(y).float(), self.critic_linear(y).float().squeeze(-1), (h, c)


class Iris(nn.Module):
    """Tokenizer, world model and actor-critic."""

    def __init__(self, config):
        super().__init__()
        self.tokenizer = Tokenizer(**config["tokenizer"])
        self.world_model = WorldModel(tokens_per_frame=self.tokenizer.num_tokens, **config["world_model"])
        self.actor_critic = ActorCritic(**config["actor_critic"])

    @torch.no_grad()
    def act(self, frames, state, temperature=1.0):
        """Frames (N, S, S, C) uint8, LSTM state -> actions (N,), state. The policy sees reconstructions here too."""
        seen = self.tokenizer.show(self.tokenizer.encode(to_images(frames)))
        logits, _, state = self.actor_critic(seen.unsqueeze(1), state)
        return sample_categorical(logits[:, 0], temperature), state


def to_images(frames):
    """(..., S, S, C) uint8 -> (..., C, S, S) float in [0, 1]; channels last in memory."""
    return frames.movedim(-1, -3).float() / 255


def iris_config(args, image_channels, actions):
    """Sizes of the networks, in plain types, for `Iris`."""
    tokenizer = dict(
        image_size=args.image_size, image_channels=image_channels, vocab_size=args.vocab_size, code_dim=args.code_dim,
        channels=args.tok_channels, levels=args.tok_levels, blocks=args.tok_blocks, attention=ints(args.tok_attention),
        latent=args.tok_latent, groups=args.tok_groups, patch=args.tok_patch, tiles=args.tok_tiles,
    )  # fmt: skip
    world_model = dict(
        vocab_size=args.vocab_size, actions=actions, timesteps=args.batch_length, embed_dim=args.embed_dim,
        num_layers=args.num_layers, num_heads=args.num_heads, dropout=args.dropout, init_gain=args.wm_init_gain,
    )  # fmt: skip
    actor_critic = dict(actions=actions, image_size=args.image_size, image_channels=image_channels)
    actor_critic |= dict(channels=ints(args.ac_channels), lstm_size=args.lstm_size)
    return dict(tokenizer=tokenizer, world_model=world_model, actor_critic=actor_critic)


def count_params(model):
    """Trainable parameters of a module."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---- Losses ----------------------------------------------------------------------------------------------------------


class LPIPS(nn.Module):
    """Perceptual distance of images in [-1, 1]: differences of VGG16's features, weighted by learned 1x1 heads."""

    def __init__(self, paths):
        super().__init__()
        layers, i = [], 3
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
            layers += [nn.Conv2d(i, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
            i = width or i
        self.net = nn.Sequential(*layers)
        self.taps = 3, 8, 15, 22, 29  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
        try:
            state = {}
            for path in paths.split(","):
                state |= torch.load(path, map_location="cpu", weights_only=True)
            find = {re.sub(r"^(.*\.)?(net\.slice\d\.|features\.)(\d+\.)", r"\3", k): v for k, v in state.items()}
            heads = {m[1]: v for k, v in state.items() if (m := re.search(r"(lin\d)\.model\.1\.weight$", k))}
            self.net.load_state_dict({k: find[k] for k in self.net.state_dict()})
            self.heads = nn.ParameterList(heads[f"lin{i}"] for i in range(5))  # (1, C, 1, 1) each
        except Exception as e:  # damaged, or not these networks
            fail(f"--lpips-weights {paths}: no VGG16 with LPIPS heads in there ({type(e).__name__}: {str(e)[:60]!r})")
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.requires_grad_(False)

    def forward(self, x, y):
        """(N, 3, S, S) twice -> (N,)."""
        out, h = 0.0, (torch.cat([x, y]) - self.shift) / self.scale
        for i, layer in enumerate(self.net):
            h = layer(h)
            if i in self.taps:
                f = h.float() / (h.float().square().sum(1, keepdim=True).sqrt() + 1e-10)
                a, b = f.chunk(2)
                out = out + F.conv2d((a - b) ** 2, self.heads[self.taps.index(i)].float()).mean((1, 2, 3))
        return out


def tokenizer_loss(model, batch, args, lpips=None, revive=None):
    """Autoencoder and codebook on single frames {"obs": (N, S, S, C)}."""
    x = to_images(batch["obs"])
    z, z_q, x_hat, _ = model.tokenizer(x, revive)
    losses = {"commitment": vq_loss(z, z_q, args.beta)}
    if lpips is None:
        losses["reconstruction"] = args.recon_scale * recon_loss(x, x_hat)
    else:
        # NOTE: on the [-1, 1] scale, where L1 is twice as large; all three terms of the paper weigh 1.
        losses["reconstruction"] = 2 * (x - x_hat).abs().mean()
        losses["perceptual"] = lpips(x * 2 - 1, x_hat * 2 - 1).mean()
    return losses, {"pixel_mse": F.mse_loss(x_hat.detach(), x)}


def gpt_loss(model, batch, args):
    """Cross entropies of next frame tokens, reward signs and ends on segments {name: (B, T, ...)}."""
    tokens, mask, K = batch["tokens"], batch["mask"], batch["tokens"].shape[2]
    out = model.world_model(torch.cat([tokens, batch["action"].unsqueeze(-1)], -1).flatten(1))  # blocks of K + 1
    frames, rewards, ends = world_model_labels(tokens, batch["reward"], batch["end"], mask)
    if args.skip_first_frame:
        # NOTE: in segments of two frames its surprise, which cannot be learned, is all that is left of the loss.
        frames[:, : K - 1] = -100
    # NOTE: the last action's prediction is dropped: the frame after the segment is not known.
    logits = out.observations[:, :-1].float()  # (B, T*K - 1, V)
    known = (frames >= 0).sum().clamp(min=1)
    losses = {
        "tokens": F.cross_entropy(logits.flatten(0, 1), frames.flatten(), reduction="sum") / known,
        "rewards": F.cross_entropy(out.rewards.float().flatten(0, 1), rewards.flatten()),
        "ends": F.cross_entropy(out.ends.float().flatten(0, 1), ends.flatten()),
    }
    with torch.no_grad():
        # NOTE: most tokens never change, so plain accuracy is high before any motion is learned.
        before, after = tokens[:, :-1].flatten(1), tokens[:, 1:].flatten(1)  # (B, (T-1)*K)
        moved = (before != after) & mask[:, 1:].repeat_interleave(K, 1)
        right = logits[:, K - 1 :].argmax(-1) == after
        metrics = {
            "token_accuracy": (logits.argmax(-1) == frames).sum() / known,
            "changed_token_accuracy": (right & moved).sum() / moved.sum().clamp(min=1),
        }
    return losses, metrics


class Rollout(NamedTuple):
    """Imagined steps: frames (B, H, C, S, S) in [0, 1], actions, rewards in {-1, 0, 1} and ends, each (B, H)."""

    frames: torch.Tensor
    actions: torch.Tensor
    rewards: torch.Tensor
    ends: torch.Tensor


@torch.no_grad()
def imagine(model, tokens, state, horizon, temperature=1.0):
    """Roll the policy out in the world model, from the tokens of one frame (B, K) and the LSTM's state before it."""
    world_model = model.world_model
    # NOTE: the GPT begins with an empty memory: of the past it knows nothing but this one frame.
    kv, steps = world_model.cache(len(tokens)), []
    for step in range(horizon):
        frame = model.tokenizer.show(tokens)
        logits, _, state = model.actor_critic(frame.unsqueeze(1), state)
        action = sample_categorical(logits[:, 0], temperature)  # (B,)
        last = step == horizon - 1
        reward, end, tokens = dream_step(world_model, kv, tokens, action, predict_frame=not last)
        steps.append((frame, action, reward, end))
    return Rollout(*(torch.stack(x, 1) for x in zip(*steps, strict=True)))


def dream_step(world_model, kv, tokens, action, predict_frame=True, generator=None):
    """One imagined transition from the frame with tokens (B, K), of which all but the last are in the memory (or none,
    when it is empty), by an action (B,): reward (B,), end (B,), tokens of the next frame."""
    K = tokens.shape[1]
    # A frame's last token waits for the action that follows it, so the memory holds one token less than was dreamed.
    if kv.size and kv.size + 1 + (K + 1 if predict_frame else 1) > world_model.max_tokens:
        kv.reset()  # the memory is full: go on from the current frame alone
    if not kv.size and K > 1:
        world_model(tokens[:, :-1], kv)
    out = world_model(torch.stack([tokens[:, -1], action], 1), kv)
    reward = sample_categorical(out.rewards[:, -1], 1.0, generator).float() - 1
    end = sample_categorical(out.ends[:, -1], 1.0, generator).float()
    if not predict_frame:
        return reward, end, tokens
    logits, sampled = out.observations[:, -1], []
    for i in range(K):
        sampled.append(sample_categorical(logits, 1.0, generator))
        if i < K - 1:
            logits = world_model(sampled[-1].unsqueeze(1), kv).observations[:, -1]
    return reward, end, torch.stack(sampled, 1)


def burn_in(actor_critic, batch):
    """LSTM state after the frames before a segment's last one (B, T, S, S, C), which may be padding on the left."""
    frames, mask = batch["recon"], batch["mask"]
    state = actor_critic.initial(len(frames), frames.device)
    with torch.no_grad():
        return actor_critic(to_images(frames), state, mask)[2] if frames.shape[1] else state


def actor_critic_loss(model, batch, args):
    """Segments {"recon": reconstructed frames (B, burn_in, S, S, C), "mask": (B, burn_in), "tokens": of the frame after
    them (B, K)} -> losses of REINFORCE with a baseline and of the value, on imagined rollouts."""
    state = burn_in(model.actor_critic, batch)
    rollout = imagine(model, batch["tokens"], state, args.imag_horizon)
    torch.clear_autocast_cache()  # NOTE: bfloat16 copies of weights made without gradients would carry none
    # NOTE: the gradient flows through the LSTM over the whole rollout and stops at the frames and at the burn-in.
    logits, values, _ = model.actor_critic(rollout.frames, state)  # (B, H, A), (B, H)
    with torch.no_grad():
        returns = lambda_return(rollout.rewards, values, rollout.ends, args.gamma, args.return_lambda)[:, :-1]
        # NOTE: the paper trains on what the model dreams after an end, too; only the return stops there.
        weight = torch.ones_like(returns)  # (B, H-1)
        if args.mask_after_end:
            weight[:, 1:] = (1 - rollout.ends[:, :-2]).cumprod(1)
        advantage = returns - values[:, :-1]
    logp = torch.log_softmax(logits[:, :-1], -1)  # (B, H-1, A)
    entropy = -(logp.exp() * logp).sum(-1)
    taken = logp.gather(-1, rollout.actions[:, :-1, None]).squeeze(-1)

    def mean(x):
        return (weight * x).sum() / weight.sum()

    losses = {"policy": -mean(taken * advantage), "value": mean((values[:, :-1] - returns) ** 2)}
    losses["entropy_bonus"] = -args.ent_coef * mean(entropy)
    metrics = {"entropy": mean(entropy.detach()), "imagined_return": returns.mean(), "value_mean": values.mean()}
    metrics |= {"imagined_reward": rollout.rewards.mean(), "imagined_ends": rollout.ends.mean()}
    return losses, {k: v.detach() for k, v in metrics.items()}


def configure_optimizer(model, learning_rate, weight_decay, **options):
    """AdamW with weight decay on the weights of linear layers only: not on biases, layer norms, embeddings."""
    decay = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if id(p) in decay], "weight_decay": weight_decay},
        {"params": [p for p in params if id(p) not in decay], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, **options)


class Learner:
    """The networks, an optimizer for each of the three, and an update of each."""

    def __init__(self, model, args, device):
        self.model, self.args, self.device, self.params = model, args, device, list(model.parameters())
        self.bf16 = args.bf16 and device.type == "cuda"
        self.lpips, self.opt = LPIPS(args.lpips_weights).to(device) if args.lpips_weights else None, {}
        for part in ("tokenizer", "world_model", "actor_critic"):
            decay = args.weight_decay if part == "world_model" else 0.0  # at 0 AdamW is Adam
            rate = getattr(args, f"{part}_lr") or args.learning_rate
            options = dict(fused=True, capturable=device.type == "cuda")
            self.opt[part] = configure_optimizer(getattr(model, part), rate, decay, **options)
        self.bad = torch.zeros((), dtype=torch.bool, device=device)  # whether something was not finite, from then on
        # How often each code word was used since the last revival, and updates of the tokenizer.
        self.usage = torch.zeros(args.vocab_size, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, part, batch):
        """One optimizer step of one part. Returns its metrics, as tensors on the device."""
        model, args, opt = self.model, self.args, self.opt[part]
        # NOTE: dropout is on while the world model learns and off while it dreams.
        model.world_model.train(part == "world_model")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            if part == "tokenizer":
                revive = self.revive if args.revive_codes else None
                losses, metrics = tokenizer_loss(model, batch, args, self.lpips, revive)
            else:
                losses, metrics = (gpt_loss if part == "world_model" else actor_critic_loss)(model, batch, args)
        model.world_model.eval()
        opt.zero_grad()
        sum(losses.values()).backward()
        norm = nn.utils.clip_grad_norm_([p for g in opt.param_groups for p in g["params"]], args.max_grad_norm)
        self.bad |= ~torch.isfinite(norm)
        opt.found_inf = self.bad.float()  # no step any more, decided on the device: nothing waits for it
        opt.step()
        return {k: v.detach() for k, v in losses.items()} | metrics | {f"grad_norm_{part}": norm}

    @torch.no_grad()
    def revive(self, z, every=10):
        """Put code words that nothing used in the last updates where the codebook fits badly: z (N, D) of this update.
        At the first update all are unused, so the codebook is initialised from data."""
        # NOTE: plain VQ with the paper's initialisation uses a handful of codes after a few hundred updates. Positions
        # are drawn by their squared distance to the nearest code word: drawn uniformly, they would duplicate frequent
        # codes, whose meaning then flips to and fro. And it is done before the loss: pulled towards code words that are
        # all alike, latents collapse within ten updates.
        codes = self.model.tokenizer.embedding.weight
        due = ((self.count % every == 0) | (self.count < every)) & (self.count < self.args.revive_codes)
        tokens, z_q = vector_quantize(z, codes)
        race = (z - z_q).square().sum(-1) / torch.empty(len(z), device=z.device).exponential_()  # (N,)
        dead = (self.usage == 0) & due
        source = z[race.argsort(descending=True)[(dead.cumsum(0) - 1).clamp(min=0) % len(z)]]  # (V, D)
        codes.copy_(torch.where(dead[:, None], source.to(codes.dtype), codes))
        self.usage *= (~due).float()
        tokens, _ = vector_quantize(z, codes)
        self.usage.scatter_add_(0, tokens, torch.ones_like(tokens, dtype=torch.float32))
        self.count += 1

    def check(self, metrics, where):
        """Ends the run naming what was not finite, if something was. Waits for the device."""
        if self.bad:
            names = ", ".join(k for k, v in metrics.items() if not math.isfinite(v))
            names = names.replace("grad_norm", "gradient norm")
            raise SystemExit(f"not finite at {where}: {names}; no step was taken, ckpt.pt is from before it")

    def state_dict(self):
        state = {"model": self.model.state_dict(), "usage": self.usage, "count": self.count}
        return state | {"opt": {k: o.state_dict() for k, o in self.opt.items()}}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        for k, opt in self.opt.items():
            opt.load_state_dict(state["opt"][k])
            for group in opt.param_groups:  # the run may have begun on another kind of device
                group["capturable"] = self.device.type == "cuda"
        self.usage.copy_(state["usage"])
        self.count.copy_(state["count"])


class Graphed:
    """A function of a dict of tensors, captured in a CUDA graph after three ordinary calls. Outputs are reused by
    later calls."""

    def __init__(self, function):
        self.function, self.calls, self.stream = function, 0, torch.cuda.Stream()

    def __call__(self, inputs):
        self.calls += 1
        if self.calls <= 3:  # real calls that warm up kernels and allocator, on a side stream as capture wants it
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if self.calls == 4:
            self.inputs, self.graph = {k: v.clone() for k, v in inputs.items()}, torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records, does not run
                self.outputs = self.function(self.inputs)
        torch._foreach_copy_(list(self.inputs.values()), list(inputs.values()))
        self.graph.replay()
        return self.outputs


def compile_model(model, learner):
    """Compile convolutions and the GPT's blocks; capture each whole update in a CUDA graph."""
    print("compiling: the first updates take a minute or more (--no-compile starts at once)", flush=True)
    for network in (model.tokenizer.encoder, model.tokenizer.decoder):
        network.compile(dynamic=False)  # in place: parameter names in checkpoints stay as they are
    for block in model.world_model.transformer.blocks:
        # Around the attention, whose length grows with the memory: these have few shapes.
        block.project, block.finish = (torch.compile(f, dynamic=False) for f in (block.project, block.finish))
    graphs = {part: Graphed(partial(learner.update, part)) for part in learner.opt}
    learner.update = lambda part, batch: graphs[part](batch)


# ---- Replay ----------------------------------------------------------------------------------------------------------


class EpisodeReplay:
    """Ring buffers (environment, row) of uint8 frames, allocated once on `device`, and a list of episodes in them.
    Beside each frame stand its tokens and its reconstruction, as the tokenizer of this epoch makes them."""

    CHUNK = 64  # frames encoded at a time

    def __init__(self, capacity, num_envs, specs, device="cpu", seed=0):
        """capacity: rows per environment; specs: {name: (shape, dtype)}."""
        self.capacity, self.device = capacity, torch.device(device)
        self.data = {k: torch.zeros(num_envs, capacity, *s, dtype=d, device=device) for k, (s, d) in specs.items()}
        self.count = np.zeros(num_envs, np.int64)  # rows ever added, per environment
        self.encoded = np.zeros(num_envs, np.int64)  # of these, rows that were encoded by the current tokenizer
        self.episodes = []  # [environment, first row, row after the last one], rows counted as in `count`
        self.open = [False] * num_envs  # whether the environment's last episode goes on
        self.rng = np.random.default_rng(seed)

    DERIVED = "tokens", "recon"  # computed from frames, not saved

    @staticmethod
    def specs(shape, tokens):
        """What one row holds, for frames of `shape` (S, S, C)."""
        specs = {"obs": (shape, torch.uint8), "action": ((), torch.int64), "reward": ((), torch.float32)}
        return specs | {"end": ((), torch.bool), "tokens": ((tokens,), torch.int16), "recon": (shape, torch.uint8)}

    def add(self, rows, last):
        """Append one row to each environment: rows {name: (N, ...)}; last (N,): the episode ends here."""
        index = torch.as_tensor(np.arange(len(last)) * self.capacity + self.count % self.capacity, device=self.device)
        for name, values in rows.items():
            data = self.data[name]
            data.flatten(0, 1)[index] = torch.as_tensor(values, device=self.device).to(data.dtype)
        for e in range(len(last)):
            if not self.open[e]:
                self.episodes.append([e, int(self.count[e]), int(self.count[e])])
                self.open[e] = len(self.episodes)  # its place in the list, from 1
            self.episodes[self.open[e] - 1][2] += 1
        self.count += 1
        for e in np.flatnonzero(last):
            self.open[e] = False

    def table(self):
        """Episodes (n, 3) as far as they are still in the ring; forgets those that are not."""
        oldest = self.count - self.capacity
        if (oldest > 0).any() and any(stop <= oldest[e] for e, _, stop in self.episodes):
            kept = [i for i, (e, _, stop) in enumerate(self.episodes) if stop > oldest[e]]
            place = {old + 1: new + 1 for new, old in enumerate(kept)}
            self.episodes = [self.episodes[i] for i in kept]
            self.open = [place[i] if i else False for i in self.open]
        table = np.array(self.episodes, np.int64).reshape(-1, 3)
        table[:, 1] = np.maximum(table[:, 1], oldest[table[:, 0]])
        return table

    def rows(self, table, batch_size, length, from_start):
        """Flat indices (B, length) of drawn segments and their mask (B, length)."""
        episode, steps, mask = sample_segments(table[:, 2] - table[:, 1], batch_size, length, from_start, self.rng)
        env, first = table[episode, 0][:, None], table[episode, 1][:, None]
        index = env * self.capacity + (first + steps) % self.capacity
        return torch.as_tensor(index, device=self.device), torch.as_tensor(mask, device=self.device)

    def gather(self, name, index):
        return self.data[name].flatten(0, 1)[index]

    def frames(self, table, batch_size):
        """Single frames for the tokenizer: {"obs": (B, S, S, C)}."""
        return {"obs": self.gather("obs", self.rows(table, batch_size, 1, True)[0][:, 0])}

    def segments(self, table, batch_size, length):
        """Segments for the world model, padded on the right: {name: (B, T, ...)}."""
        index, mask = self.rows(table, batch_size, length, True)
        batch = {k: self.gather(k, index) for k in ("action", "reward", "end", "tokens")}
        return batch | {"tokens": batch["tokens"].long(), "mask": mask}

    def starts(self, table, batch_size, burn_in):
        """Segments for the actor-critic, padded on the left: reconstructions before the last frame, its tokens."""
        index, mask = self.rows(table, batch_size, burn_in + 1, False)
        batch = {"recon": self.gather("recon", index[:, :-1]), "mask": mask[:, :-1]}
        return batch | {"tokens": self.gather("tokens", index[:, -1]).long()}

    @torch.no_grad()
    def encode(self, tokenizer, device):
        """Tokens and reconstructions of all rows that have none from this tokenizer, in blocks of fixed places and
        sizes, so that the same rows give the same bits however often this is called."""
        size = min(self.CHUNK, self.capacity)
        for e in range(len(self.count)):
            first = max(self.encoded[e], self.count[e] - self.capacity)
            if first == self.count[e]:
                continue
            for begin in range(first // size * size, self.count[e], size):
                rows = torch.as_tensor((begin + np.arange(size)) % self.capacity, device=self.device)
                tokens = tokenizer.encode(to_images(self.data["obs"][e, rows].to(device)))
                recon = (tokenizer.show(tokens).movedim(-3, -1) * 255).round().to(torch.uint8)
                self.data["tokens"][e, rows] = tokens.to(self.device, torch.int16)
                self.data["recon"][e, rows] = recon.to(self.device)
        self.encoded = self.count.copy()

    def state_dict(self):
        filled = int(min(self.count.max(), self.capacity))
        rows = {k: v[:, :filled].cpu().clone() for k, v in self.data.items() if k not in self.DERIVED}
        counters = {"count": self.count.tolist(), "episodes": self.episodes, "open": self.open}
        return counters | {"rng": self.rng.bit_generator.state, "rows": rows}

    def load_state_dict(self, state):
        # NOTE: a resumed run has a larger capacity only if the smaller one had not wrapped yet; then rows keep places.
        for k, v in state["rows"].items():
            self.data[k][:, : v.shape[1]] = v.to(self.device)
        self.count, self.episodes = np.array(state["count"]), [list(e) for e in state["episodes"]]
        self.open, self.rng.bit_generator.state = list(state["open"]), state["rng"]


# ---- Environment -----------------------------------------------------------------------------------------------------


class Catch(gym.Env):
    """A ball falls through 8x8 cells; move the paddle below it. +1 caught, -1 missed, 7 steps. 4 pixels per cell."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}
    observation_space, action_space = spaces.Box(0, 255, (32, 32, 3), np.uint8), spaces.Discrete(3)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.ball, self.paddle = np.array([0, self.np_random.integers(8)]), int(self.np_random.integers(8))
        return self.render(), {}

    def step(self, action):
        self.paddle, self.ball[0] = int(np.clip(self.paddle + action - 1, 0, 7)), self.ball[0] + 1
        done = bool(self.ball[0] == 7)
        reward = (1.0 if self.ball[1] == self.paddle else -1.0) if done else 0.0
        return self.render(), reward, done, False, {}

    def render(self):
        image = np.zeros((8, 8, 3), np.uint8)
        image[7, self.paddle], image[tuple(self.ball)] = (80, 160, 255), (255, 220, 60)
        return image.repeat(4, 0).repeat(4, 1)


if "Catch-v0" not in gym.registry:
    gym.register("Catch-v0", entry_point=Catch, max_episode_steps=100)


def resize(image, size):
    """(H, W, C) uint8 of any number of channels -> (size, size, C), bilinear, always a copy."""
    planes = [Image.fromarray(p).resize((size, size), Image.BILINEAR) for p in np.moveaxis(image, 2, 0)]
    return np.stack([np.asarray(p) for p in planes], 2)


class AtariLives(gym.Wrapper):
    """Frame skip with the maximum of the last two frames, 1 to `noop_max` no-ops; says when a life was lost."""

    def __init__(self, env, args, noop_max):
        super().__init__(env)
        self.args, self.noop_max = args, noop_max
        self.observation_space = spaces.Box(0, 255, (args.image_size, args.image_size, 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        frame, info = self.env.reset(seed=seed, options=options)
        for _ in range(np.random.default_rng(seed).integers(1, self.noop_max + 1)):
            frame, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                frame, info = self.env.reset(options=options)
        return resize(frame, self.args.image_size), info

    def step(self, action):
        total, frames, lives = 0.0, [], self.unwrapped.ale.lives()
        for _ in range(self.args.action_repeat or 4):
            frame, reward, terminated, truncated, info = self.env.step(action)
            total, frames = total + float(reward), [*frames[-1:], frame]
            if terminated or truncated:
                break
        # NOTE: a lost life is an episode's end for learning, but the game goes on; gymnasium's and ale-py's options
        # start a new game. Not at 0 lives: there some games go on for a few frames, and the emulator says when.
        info = info | {"life_lost": 0 < self.unwrapped.ale.lives() < lives}
        # NOTE: every frame is resized first and the maximum taken then, as the authors do.
        picture = np.max([resize(f, self.args.image_size) for f in frames], axis=0)
        return picture, total, terminated, truncated, info


class MinAtar(gym.Wrapper):
    """MinAtar with a picture of its state: (10, 10, C) bool -> (size, size, 3), one hue per channel."""

    def __init__(self, env, size):
        super().__init__(env)
        hues = np.linspace(0, 1, env.unwrapped.game.n_channels, endpoint=False)[:, None] + np.array([0, 1 / 3, 2 / 3])
        self.size, self.colors = size, (255 * np.clip(np.abs(hues % 1 * 6 - 3) - 1, 0.15, 1)).astype(np.uint8)  # (C, 3)

    def reset(self, *, seed=None, options=None):
        self.unwrapped.game.last_action = 0  # NOTE: else the first sticky action comes from the episode before
        return self.env.reset(seed=seed, options=options)

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        clock = (
            self.unwrapped.game.env_name == "freeway"
        )  # NOTE: it ends by its clock alone, which is no terminal state
        return obs, reward, terminated and not clock, truncated or terminated and clock, info

    def render(self):  # NOTE: the package's own picture is float in 0..1
        image, scale = np.zeros((10, 10, 3), np.uint8), max(1, self.size // 10)
        for channel, color in enumerate(self.colors):
            image[self.unwrapped.game.state()[..., channel]] = color
        rest = max(0, self.size - 10 * scale)
        return np.pad(image.repeat(scale, 0).repeat(scale, 1), [(rest // 2, rest - rest // 2)] * 2 + [(0, 0)])


def make_env(args, seed, noop_max=1):
    """The environment as the agent sees it. Observations: uint8 images (size, size, C); actions: Discrete(n). Raises
    ValueError with what was wanted and what was found. Episodes are functions of the seed of their reset and of the
    actions; a first reset without a seed goes on from `seed`. noop_max: Atari's no-ops at a game's start, at most."""
    *modules, name = args.env_id.split(":")
    family, kwargs = name.split("/")[0], json.loads(args.env_kwargs)
    for module in modules:
        importlib.import_module(module)
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # draw without a display
    if family == "ALE":
        import ale_py  # noqa: F401 (registers its ids)

        # NOTE: the v5 ids skip frames by themselves and without max-pooling; the skip is ours, and it is the only one.
        frames = args.max_frames if noop_max > 1 else 108_000
        kwargs = dict(frameskip=1, repeat_action_probability=0, max_num_frames_per_episode=frames) | kwargs
    elif family == "MinAtar":
        import minatar.gym

        if name not in gym.registry:
            minatar.gym.register_envs()
        kwargs = dict(max_episode_steps=args.max_episode_steps or 2500) | kwargs  # it has no limit of its own
    creator = gym.spec(name).entry_point
    creator = gym.envs.registration.load_env_creator(creator) if isinstance(creator, str) else creator
    if "rgb_array" in getattr(creator, "metadata", {}).get("render_modes", ()):
        kwargs = dict(render_mode="rgb_array") | kwargs
    env = gym.make(name, disable_env_checker=True, **kwargs)
    env = gym.wrappers.TransformReward(env, lambda r: float(np.asarray(r).item()))  # some send arrays of one number
    if family == "ALE":
        env = AtariLives(env, args, noop_max)
    elif (args.action_repeat or 1) > 1:
        env = gym.wrappers.RepeatAction(env, args.action_repeat)
    env = MinAtar(env, args.image_size if args.pixels else 160) if family == "MinAtar" else env
    env = gym.wrappers.AddRenderObservation(env) if args.pixels and family != "ALE" else env
    space, a = env.observation_space, env.action_space
    shape = (*space.shape, 1) if len(space.shape or ()) == 2 else space.shape
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8 or len(shape) != 3:
        raise ValueError(f"observations must be one uint8 image (or --pixels), found {space}")
    if not isinstance(a, spaces.Discrete):
        raise ValueError(f"tokens of actions need Discrete actions, found {a}; dreamerv3.py takes a Box")
    axis = 0 if shape[0] < min(shape[1:]) else 2  # of the channels: frame stacks have them in front
    box = spaces.Box(0, 255, (args.image_size, args.image_size, shape[axis]), np.uint8)
    see = lambda x: resize(np.moveaxis(np.reshape(x, shape), axis, 2), args.image_size)  # noqa: E731
    env = gym.wrappers.TransformObservation(env, see, box)
    env = gym.wrappers.TransformAction(env, lambda x: int(x) + int(a.start), spaces.Discrete(a.n))
    env = gym.wrappers.TimeLimit(env, args.max_episode_steps) if args.max_episode_steps else env
    env = gym.wrappers.RecordEpisodeStatistics(env)
    env.reset(seed=int(seed))
    return env


# ---- Plumbing (shared by all scripts) --------------------------------------------------------------------------------


def fail(message):  # shared
    """The user's input is wrong: one line, exit code 2."""
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(cls, presets, description):  # shared
    """Command line -> cls. Defaults: --preset, or the run given to --resume, of which little may change. Flags win."""
    words = [w for a in sys.argv[1:] for w in a.split("=", 1)]
    given = {w.replace("_", "-"): v for w, v in zip(words, words[1:]) if w.startswith("--")}
    defaults, run = presets.get(given.get("--preset"), {}), given.get("--resume")
    own = defaults.get("env_id", getattr(cls, "env_id", ""))
    if given.get("--env-id", own).split("/")[0] != own.split("/")[0]:  # what a preset says belongs to its environments
        defaults = {k: v for k, v in defaults.items() if k not in ("env_kwargs", "action_repeat", "max_episode_steps")}
    if run is not None:
        try:
            info = json.loads(Path(run, "args.json").read_text(encoding="utf-8"))
            if info["script"] != Path(sys.modules[cls.__module__].__file__).stem:
                raise ValueError(f"it was made by {info['script']}.py")
            defaults = info["args"]
        except (OSError, ValueError, KeyError) as e:
            fail(f"--resume {run}: {e}")
    args = tyro.cli(cls, description=description, default=cls(**defaults))
    free = "resume exp_name cuda compile num_threads num_workers track target_return total_timesteps eval_episodes "
    free += "log_every save_every dataset"  # changing anything else would make it another run
    for name in defaults if run is not None else ():
        if (value := getattr(args, name)) != defaults[name] and name not in free.split():
            fail(f"--{name.replace('_', '-')} is {defaults[name]} in {run} and cannot change, got {value}")
    return args


def start_run(args, subject, device, step=None):  # shared
    """Run directory (runs/{subject}__{exp_name}__{seed}__{time}, or the resumed one) with args.json (flags, command,
    commit, versions, hardware) and the script, and its SummaryWriter. step: where a resumed run goes on."""
    script = Path(sys.modules[type(args).__module__].__file__).resolve()
    name = f"{subject}__{args.exp_name}__{args.seed}__{int(time.time())}".replace("/", "-").replace(":", "-")
    run = args.resume or os.path.join("runs", name)
    git = f"git -C {shlex.quote(str(script.parent))} describe --always --dirty 2>/dev/null"
    cpu = subprocess.getoutput("grep -m1 'model name' /proc/cpuinfo").split(": ")[-1]
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{cpu}, {torch.get_num_threads()} threads"
    info = dict(script=script.stem, command=sys.argv, args=asdict(args) | {"resume": None}, hardware=hardware)
    info |= dict(commit=subprocess.getoutput(git) or "unknown", versions={"torch": torch.__version__})
    try:
        os.makedirs(run, exist_ok=bool(args.resume))
        shutil.copy(script, run)
        Path(run, "args.json").write_text(json.dumps(info, indent=1), encoding="utf-8")
    except OSError as e:
        fail(f"cannot write {run}: {e}")
    if args.track:
        import wandb

        wandb.init(project=args.track, id=Path(run).name, resume="allow", config=vars(args), sync_tensorboard=True)
    return run, SummaryWriter(run, purge_step=step)


def seed_everything(args, device):  # shared
    """Seeds, determinism, threads and the allocator of this process."""
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.set_num_threads(args.num_threads or torch.get_num_threads())
    torch.backends.cudnn.deterministic = args.torch_deterministic
    if device.type == "cpu":  # repeated indices in an assignment: the last one wins, also with several threads
        torch.use_deterministic_algorithms(args.torch_deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False
    # NOTE: glibc hands every large tensor back to the system when it is freed and faults its pages in again when the
    # next one is made: a third of the CPU time of image models. Keep it (M_MMAP_MAX 0, M_TRIM_THRESHOLD 2 GB).
    for option, value in ((-4, 0), (-1, 2**31 - 1)) if sys.platform == "linux" and device.type == "cpu" else ():
        ctypes.CDLL(None).mallopt(option, value)


def save_checkpoint(state, run):  # shared
    """RUN/ckpt.pt is the new state or the old one, never half of either; the old one stays as ckpt.prev.pt."""
    path, cuda = os.path.join(run, "ckpt.pt"), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    torch.save(state | {"rng": [torch.get_rng_state(), *cuda]}, path + ".tmp")
    if os.path.exists(path):
        os.replace(path, os.path.join(run, "ckpt.prev.pt"))
    os.replace(path + ".tmp", path)


def load_checkpoint(run):  # shared
    """The newest checkpoint of a run; tensors and plain types only, so that a stranger's file runs no code."""
    path = os.path.join(run, "ckpt.pt")
    path = path if os.path.exists(path) else os.path.join(run, "ckpt.prev.pt")
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as e:
        fail(f"cannot read {path} ({type(e).__name__}: {str(e).split('.')[0]})")


def set_rng_state(state):  # shared
    """Go on with the random numbers of a checkpoint."""
    torch.set_rng_state(state[0])
    torch.cuda.set_rng_state_all(state[1 : 1 + torch.cuda.device_count()])


def stop_signals():  # shared
    """A list that gets the number of the first SIGTERM or Ctrl-C; a second one kills at once."""
    stop = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, frame: (stop.append(n), signal.signal(n, signal.SIG_DFL)))
    return stop


def leave(run, stop):  # shared
    """Exit as the signal asks for, if there was one. To be called after a checkpoint."""
    if stop:
        again = f"python {shlex.quote(sys.argv[0])} --resume {shlex.quote(run)}"
        print(f"stopped by signal {stop[0]}; to go on: {again}", flush=True)
        raise SystemExit(128 + stop[0])


# ---- Agent: what the tools in benchmarks/ use ------------------------------------------------------------------------


class Agent:
    """A model behind the interface that all scripts share. Observations and actions are numpy, batch first, with the
    types of `make_env`'s spaces; states are tuples of tensors, batch first."""

    def __init__(self, model, args, device="cpu"):
        self.model, self.args, self.device = model, args, device

    def seed(self, seed):
        """Its noise comes from torch's generator."""
        torch.manual_seed(int(seed))

    def tensor(self, x):
        return torch.as_tensor(np.asarray(x), device=self.device)

    def show(self, tokens):
        """Tokens (N, K) -> frames (N, S, S, C) uint8."""
        return (self.model.tokenizer.show(tokens) * 255).round().byte().movedim(1, -1).cpu().numpy()

    @torch.no_grad()
    def act(self, obs, state, first, greedy=False, temperature=None):
        """obs (N, ...), state None at the start, first (N,): a new episode begins -> actions (N,), state of the LSTM.
        temperature: of the policy (None: --eval-temperature)."""
        state = self.model.actor_critic.initial(len(first), self.device) if state is None else state
        state = tuple(s * ~self.tensor(first)[:, None] for s in state)
        temperature = 0 if greedy else self.args.eval_temperature if temperature is None else temperature
        actions, state = self.model.act(self.tensor(obs), state, temperature)
        return actions.cpu().numpy(), state

    @torch.no_grad()
    def observe(self, obs, actions):
        """obs (N, T, ...), actions (N, T-1) from an episode's beginning -> what the GPT remembers, a quarter of its
        memory: tokens of the last frames with the actions between them (N, n); reconstructions of all frames."""
        N, T = obs.shape[:2]
        tokens = self.model.tokenizer.encode(to_images(self.tensor(obs).flatten(0, 1)))
        seen = self.show(tokens).reshape(obs.shape)
        blocks = torch.cat([tokens.view(N, T, -1), F.pad(self.tensor(actions).long(), (0, 1))[..., None]], -1)
        return (blocks[:, -max(1, self.args.batch_length // 4) :].flatten(1)[:, :-1],), seen

    @torch.no_grad()
    def imagine(self, state, actions):
        """One imagined transition of N dreams -> state, reward (N,): its sign, alive (N,), frames."""
        (memory,), world_model, action = state, self.model.world_model, self.tensor(actions).long()
        K = world_model.block - 1
        if memory.shape[1] + world_model.block > world_model.max_tokens:
            memory = memory[:, -K:]  # the memory is full: go on from the current frame alone
        kv = world_model.cache(len(memory))
        if memory.shape[1] > K:
            world_model(memory[:, :-1], kv)
        reward, end, tokens = dream_step(world_model, kv, memory[:, -K:], action)
        after = (torch.cat([memory, action[:, None], tokens], 1),)
        return after, reward.cpu().numpy(), 1 - end.cpu().numpy(), self.show(tokens)


def official_state(state):
    """State dict of the authors' code -> that of `Iris`."""
    out = {}
    for key, value in state.items():
        if re.search(r"^tokenizer\.lpips\.|\.attn\.mask$|\.indices$", key):
            continue  # the frozen loss network, and constants
        key = re.sub(r"embedder\.embedding_tables\.0\.", "act_emb.", key)
        key = re.sub(r"embedder\.embedding_tables\.1\.", "obs_emb.", key)
        key = key.replace(".head_module.", ".")
        key = re.sub(r"(blocks\.\d+)\.attn\.", r"\1.", key)
        key = re.sub(r"actor_critic\.conv(\d)\.", lambda m: f"actor_critic.convs.{int(m[1]) - 1}.", key)
        out[key] = value
    for key in [k for k in out if re.search(r"blocks\.\d+\.query\.", k)]:  # three layers are one here
        parts = [out.pop(key.replace("query", name)) for name in ("query", "key", "value")]
        out[key.replace("query", "qkv")] = torch.cat(parts)
    return out


def load_official(model, path):
    """Put the weights of a checkpoint of the authors' code into `model`; exit code 2 if they do not fit."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(official_state({k: v for k, v in state.items() if torch.is_tensor(v)}))
    except Exception as e:  # missing, damaged, or of other networks
        fail(f"--init-from {path}: {type(e).__name__}: {' '.join(str(e).split())[:200]}")


def load(run, device="cpu"):
    """The Agent of a run directory."""
    state = load_checkpoint(run)
    args = Args(**state["args"])
    env = make_env(args, args.seed)
    model = Iris(iris_config(args, env.observation_space.shape[2], int(env.action_space.n))).to(device)
    model.load_state_dict(state["learner"]["model"])
    agent = Agent(model.eval(), args, torch.device(device))
    agent.global_step, agent.random_return = state["loop"]["global_step"], state["loop"]["random_return"]
    env.close()
    return agent


# ---- Main ------------------------------------------------------------------------------------------------------------


def check_args(args):
    """What would end in a wrong result or an obscure error, before anything is created. -> spaces of the agent."""
    names = "num_envs batch_size tokenizer_batch_size ac_batch_size eval_episodes log_every save_every learning_rate "
    names += "steps_per_epoch total_timesteps vocab_size lstm_size"
    rules = {name: (getattr(args, name) > 0, "more than 0") for name in names.split()}
    rules |= {name: (0 <= getattr(args, name) < 1, "at least 0 and below 1") for name in ("gamma", "dropout")}
    unit, rows = args.tok_tiles * args.tok_patch * 2 ** (args.tok_levels - 1), args.num_envs * args.batch_length
    rules["image_size"] = args.image_size % unit == 0 < args.image_size, f"a multiple of {unit}"
    rules["tok_groups"] = args.tok_channels % args.tok_groups == 0, f"a divisor of --tok-channels {args.tok_channels}"
    rules["num_heads"] = args.embed_dim % args.num_heads == 0, f"a divisor of --embed-dim {args.embed_dim}"
    rules["batch_length"], rules["imag_horizon"] = (
        (args.batch_length >= 2, "at least 2"),
        (args.imag_horizon >= 2, "at least 2"),
    )
    rules["buffer_size"] = args.buffer_size >= rows, f"at least {rows}"
    first = min(args.tokenizer_start, args.world_model_start, args.actor_critic_start) * args.steps_per_epoch
    steps = args.total_timesteps + args.extra_epochs * args.steps_per_epoch
    rules["total_timesteps"] = 0 < args.total_timesteps and steps > first, f"beyond the first update at step {first}"
    levels = len(ints(args.ac_channels))
    rules["ac_channels"] = 0 < levels <= math.log2(args.image_size), f"1 to {int(math.log2(args.image_size))} numbers"
    for name, (good, wanted) in rules.items():
        if not good:
            fail(f"--{name.replace('_', '-')} must be {wanted}, got {getattr(args, name)}")
    try:
        env = make_env(args, args.seed)
    except Exception as e:  # whatever it is, the environment cannot be used: its own words, in one line
        words = " ".join(f"--env-kwargs {args.env_kwargs} --seed {args.seed}: {type(e).__name__}: {e}".split())
        fail(f"--env-id {args.env_id} {words}")
    print(f"{args.env_id} has observations {env.unwrapped.observation_space}")
    print(f"the agent sees {env.observation_space} (images: --image-size), acts in {env.action_space}")
    env.close()
    return env.observation_space, env.action_space


def episode_seed(args, key, index, episode=0):
    """Seed of an episode: no two of a run share one, nor do training, evaluation (key 1) and the baseline (key 2)."""
    return int(np.random.SeedSequence((args.seed, key, index, int(episode))).generate_state(1)[0])


def make_envs(args, n, key):
    """n environments in lockstep; the caller resets those that have ended, with seeds of its own. Evaluation (not key
    0) plays whole games from one no-op, up to half an hour."""
    thunks = [partial(make_env, args, episode_seed(args, key, i), 1 if key else 30) for i in range(n)]
    return gym.vector.SyncVectorEnv(thunks, autoreset_mode=gym.vector.AutoresetMode.DISABLED)


def evaluate(args, act, key, name, stop):
    """Returns of an episode in each of --eval-episodes fresh environments. act: obs, state, first -> actions, state."""
    n, clock = args.eval_episodes, time.time()
    envs, state, first, alive, returns = make_envs(args, n, key), None, np.ones(n, bool), np.ones(n, bool), np.zeros(n)
    obs, _ = envs.reset(seed=[episode_seed(args, key, i) for i in range(n)])
    for t in range(args.max_episode_steps or 27_000):  # an environment without a limit ends here
        actions, state = act(obs, state, first)
        obs, reward, terminated, truncated, _ = envs.step(actions)
        returns, first = returns + reward * alive, terminated | truncated
        alive &= ~first
        if stop or not alive.any():
            break
        if first.any():
            obs, _ = envs.reset(options={"reset_mask": first})
        if time.time() > clock + 10:
            print(f"{name}: step {t}, {alive.sum()} of {n} episodes go on", flush=True)
            clock = time.time()
    envs.close()
    return returns


def warm_up(model, replay, n, device):
    """LSTM state from the last n frames of the open episodes, as the networks of this epoch see them."""
    N, state = len(replay.count), model.actor_critic.initial(len(replay.count), device)
    if not n or not any(replay.open):
        return state
    steps = replay.count[:, None] - n + np.arange(n)  # (N, n)
    first = [replay.episodes[i - 1][1] if i else end for i, end in zip(replay.open, replay.count, strict=True)]
    mask = torch.as_tensor(steps >= np.array(first)[:, None], device=device)
    index = torch.as_tensor(np.arange(N)[:, None] * replay.capacity + steps % replay.capacity, device=replay.device)
    frames = to_images(replay.gather("obs", index).to(device).flatten(0, 1))
    with torch.no_grad():
        seen = model.tokenizer.show(model.tokenizer.encode(frames))
        return model.actor_critic(seen.unflatten(0, (N, n)), state, mask)[2]


def finish(args, c, agent, run, writer, stop):
    """Final evaluation on fresh episodes, result.json, and the self-check against --target-return."""
    print(f"look at its dreams: python benchmarks/dreams.py {run}", flush=True)
    returns = evaluate(args, agent.act, 1, "evaluation", stop)
    leave(run, stop)
    score, std, target = float(returns.mean()), float(returns.std()), args.target_return
    writer.add_scalar("eval/episodic_return", score, c.progress)
    writer.close()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    memory = torch.cuda.max_memory_allocated() if agent.device.type == "cuda" else memory
    result = dict(run=run, episodic_return=score, episodic_return_std=std, returns=returns.tolist())
    result |= dict(random_return=c.random_return, train_return=float(np.mean(c.recent)) if c.recent else None)
    result |= dict(global_step=c.global_step, updates=c.updates, minutes=c.seconds / 60, peak_memory_gb=memory / 1e9)
    Path(run, "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    verdict = "" if target is None else f", target {target:g}: {'reached' if score >= target else 'missed'}"
    print(f"episodic_return {score:.2f} +- {std:.2f} over {len(returns)} (random {c.random_return:.2f}{verdict})")
    if target is not None and not score >= target:
        raise SystemExit(1)
    return result


SHOWN = "pixel_mse", "changed_token_accuracy", "imagined_return"  # what tells whether to stop a run


def train(args):
    """Algorithm 1: epochs of collecting, then learning of tokenizer, world model and behavior. -> the final metrics."""
    # Set up, in an order that finds every mistake of the user's before the first file is made.
    state = load_checkpoint(args.resume) if args.resume else None
    space, action_space = check_args(args)
    device, N = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu"), args.num_envs
    seed_everything(args, device)
    with torch.device(device):
        model = Iris(iris_config(args, space.shape[2], int(action_space.n))).eval()
    if args.init_from and not args.resume:
        load_official(model, args.init_from)
    learner, K = Learner(model, args, device), model.tokenizer.num_tokens
    capacity = -(-min(args.buffer_size, args.total_timesteps + N) // N)  # rows per environment
    on_gpu = device.type == "cuda" and 2 * N * capacity * math.prod(space.shape) < 0.8 * torch.cuda.mem_get_info()[0]
    replay = EpisodeReplay(capacity, N, EpisodeReplay.specs(space.shape, K), device if on_gpu else "cpu", args.seed)
    run, writer = start_run(args, args.env_id, device, state and state["loop"]["progress"] + 1)
    stop, envs, agent = stop_signals(), make_envs(args, N, 0), Agent(model, args, device)
    parts = ", ".join(f"{n} {count_params(getattr(model, n)):,}" for n in learner.opt)
    print(f"run: {run} on {device}\nparameters: {count_params(model):,} ({parts}); {K} tokens per frame")
    print(f"replay: {N} x {capacity:,} rows; {args.steps_per_epoch} agent steps per epoch", flush=True)
    if state:  # each environment is brought back to where it was by the seed of its episode and the actions since then
        c, (obs, *carry) = SimpleNamespace(**state["loop"]), state["now"]
        learner.load_state_dict(state["learner"])
        replay.load_state_dict(state["replay"])
        obs, carry = obs.numpy(), tuple(x.to(device) for x in carry) or None
        for i, env in enumerate(envs.envs):
            env.reset(seed=episode_seed(args, 0, i, c.episode[i]))
            for action in c.history[i]:
                env.step(action)
        set_rng_state(state["rng"])
        print(f"resumed at step {c.global_step} of {args.total_timesteps}, update {c.updates}", flush=True)
    else:
        action_space.seed(args.seed)
        draw = lambda obs, state, first: (np.array([action_space.sample() for _ in first]), state)  # noqa: E731
        returns = evaluate(args, draw, 2, "random policy", stop)
        if stop:
            raise SystemExit(128 + stop[0])
        print(f"random policy: {returns.mean():.2f} +- {returns.std():.2f} over {len(returns)} episodes", flush=True)
        c = SimpleNamespace(global_step=0, progress=0, epoch=0, collected=0, updates=0, seconds=0.0, due={}, metrics={})
        c.random_return, c.recent, c.episode, c.history = float(returns.mean()), [], [0] * N, [[] for _ in range(N)]
        (obs, _), carry = envs.reset(seed=[episode_seed(args, 0, i) for i in range(N)]), None
    if args.compile and device.type == "cuda":
        compile_model(model, learner)
    epochs = args.extra_epochs - (-args.total_timesteps // args.steps_per_epoch)
    ended, start, mark = [], time.time(), (time.time(), c.global_step, c.updates)  # mark: of the last log line

    def save():
        c.seconds, c.metrics = c.seconds + time.time() - start, {k: float(v) for k, v in c.metrics.items()}
        now = [torch.as_tensor(obs), *(carry or ())]
        parts = dict(learner=learner.state_dict(), replay=replay.state_dict(), now=now, loop=vars(c))
        save_checkpoint(parts | dict(script="iris", args=asdict(args)), run)
        return time.time()

    while c.epoch < epochs:
        # Collect: the policy looks at reconstructions; a life is an episode, a time limit is an ordinary end.
        goal = min(args.total_timesteps, c.global_step - c.collected + args.steps_per_epoch)
        if not c.due and c.global_step < goal and carry is None:
            carry = warm_up(model, replay, args.burn_in, device)
        while not c.due and c.global_step < goal and not stop:
            actions, carry = model.act(torch.as_tensor(obs, device=device), carry, args.temperature)
            stray = torch.rand(N) < args.epsilon
            actions = torch.where(stray, torch.randint(int(action_space.n), (N,)), actions.cpu()).numpy()
            for past, action in zip(c.history, actions.tolist(), strict=True):
                past.append(action)
            before = obs
            obs, reward, terminated, truncated, infos = envs.step(actions)
            over = terminated | truncated
            last = over | (infos["life_lost"] if args.episodic_life and "life_lost" in infos else False)
            # NOTE: the reward is stored as it is; only the world model's label is its sign.
            replay.add({"obs": before, "action": actions, "reward": reward, "end": last}, last)
            c.global_step, c.collected, c.progress = c.global_step + N, c.collected + N, c.progress + N
            carry = tuple(s * torch.as_tensor(~last, device=device)[:, None] for s in carry)
            for i in np.flatnonzero(over):
                ended.append(float(infos["episode"]["r"][i]))
                writer.add_scalar("charts/episodic_return", ended[-1], c.progress)
                writer.add_scalar("charts/episodic_length", int(infos["episode"]["l"][i]), c.progress)
                c.episode[i], c.history[i], c.recent = c.episode[i] + 1, [], [*c.recent[-99:], ended[-1]]
            if over.any():
                seeds = [episode_seed(args, 0, i, c.episode[i]) for i in range(N)]
                obs, _ = envs.reset(seed=seeds, options={"reset_mask": over})
        if stop and not c.due and c.global_step < goal:
            save()
            leave(run, stop)

        # Learn: first the tokenizer, then the world model on its tokens, then the behavior in the world model's dreams.
        c.due, table, clock = c.due or schedule(args, c.epoch + 1), replay.table(), time.time()
        for part in learner.opt:
            if part != "tokenizer" and c.due[part] and not stop:
                replay.encode(model.tokenizer, device)  # NOTE: once per epoch, not once per use
            while c.due[part] and not stop:
                if part == "tokenizer":
                    batch = replay.frames(table, args.tokenizer_batch_size)
                    replay.encoded[:] = 0  # what was encoded will no longer be valid
                elif part == "world_model":
                    batch = replay.segments(table, args.batch_size, args.batch_length)
                else:
                    batch = replay.starts(table, args.ac_batch_size, args.burn_in)
                found = learner.update(part, {k: v.to(device) for k, v in batch.items()})
                c.due[part], c.updates, c.metrics = c.due[part] - 1, c.updates + 1, c.metrics | found
                if device.type == "cpu":  # on a GPU this would wait for the device: there, when metrics are read
                    learner.check(found, f"step {c.global_step}, update {c.updates}")
                if time.time() > clock + 10:
                    shown = ", ".join(f"{k}={float(v):.4g}" for k, v in found.items() if k in SHOWN)
                    print(f"epoch {c.epoch + 1}, {part}: {c.due[part]} updates to go, {shown}", flush=True)
                    clock = time.time()
        if stop:
            learner.check(c.metrics, f"step {c.global_step}, update {c.updates}")
            save()
            leave(run, stop)
        if not c.collected:  # an epoch that only learned counts as much as others on the curves' time axis
            c.progress += args.steps_per_epoch
        c.epoch, c.due, c.collected, stride, carry = c.epoch + 1, {}, 0, c.collected or args.steps_per_epoch, None

        # Log and save. On a GPU metrics are read here only: reading waits for the device.
        log, keep = (c.epoch == epochs or c.progress % every < stride for every in (args.log_every, args.save_every))
        if log or keep:
            learner.check(c.metrics, f"step {c.global_step}, update {c.updates}")
        if log:
            seconds = time.time() - mark[0]
            charts = dict(SPS=(c.global_step - mark[1]) / seconds, updates_per_s=(c.updates - mark[2]) / seconds)
            charts["epoch"] = c.epoch
            for tag, value in (charts | c.metrics).items():
                writer.add_scalar(f"{'charts' if tag in charts else 'losses'}/{tag}", float(value), c.progress)
            shown = f"{np.mean(ended):.2f} ({len(ended)} episodes)" if ended else "no episode ended since the last line"
            line = f"global_step={c.global_step}, episodic_return={shown}, updates={c.updates}, SPS={charts['SPS']:.0f}"
            print(line + "".join(f", {k}={float(c.metrics[k]):.4g}" for k in SHOWN if k in c.metrics), flush=True)
            mark, ended = (time.time(), c.global_step, c.updates), []
        start = save() if keep else start
    envs.close()
    return finish(args, c, agent, run, writer, stop)


if __name__ == "__main__":
    train(parse_args(Args, PRESETS, __doc__.split("\n\nDeviations")[0]))
