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
    python iris.py --evaluate runs/NAME                      # returns of fresh episodes
    python iris.py --play runs/NAME                          # play inside the learned world

Measured: see the README's result table; every row has its command, commit, hardware and seeds.

Differences from the authors' code, each with its reason:
  * The tokenizer's reconstruction loss is the one of the authors' later Delta-IRIS, times `--recon-scale`, because the
    perceptual loss (LPIPS) needs weights that a script cannot carry. All published scores are with LPIPS:
    `--lpips-weights FILE` is the published loss, but without the dropout in its heads that the authors' trainer leaves
    active.
  * The frames of the replay are encoded and decoded once per epoch, not once per use; decoded ones are kept as uint8.
    That saves two thirds of this work at the paper's batches and 100,000 frames, and costs more at batches below 12.
  * The last token of a frame enters the GPT together with the action that follows it: 306 calls per rollout, not 325.
  * The rollout is made without gradients; policy and value are computed again on its frames, in one batch, with them.
  * Unfinished episodes are cut at every scheduled checkpoint, so that a resumed run repeats the unbroken one exactly.
    `--save-every` sets how often.
  * bfloat16 on a GPU where the authors compute in float32; `--no-bf16` mirrors them.
  * The time limit of training games is the emulator's own counter of raw frames.
  * With several environments each of them acts at random with probability epsilon by itself.
Not the paper's, off by default: `--target-critic` and `--mask-after-end` of Delta-IRIS (arXiv:2406.19320);
`--tok-patch`, `--tok-tiles`, `--revive-codes`, `--tokenizer-stop` for tokenizers that learn in seconds,
`--wm-init-gain`, `--skip-first-frame` for narrow GPTs that do.

The algorithm is in the parts Maths, Networks, Losses and Replay and in the loop of `train`; a reader may stop there.
The rest of the file makes it usable alone: environments, evaluation and dreams, checkpoints, checked flags.

Symbols in shape comments:
  B  batch (segments, rollouts)        K  tokens of a frame            C  channels of an image
  T  time (steps of a segment)         V  vocabulary                   S  pixels per side of an image
  H  imagination horizon               D  width of a code              U  units of the LSTM
  N  frames, environments              E  width of the GPT             A  actions
Time convention, everywhere: row t holds observation t, the action taken AFTER seeing it, and the reward and the end
that FOLLOWED. An episode's last observation, which nothing follows, is not stored. A block of the GPT is the K tokens
of frame t and then action t, so reward t and end t are predicted at the action's position, and so is the first token
of frame t+1.
"""

import bisect
import contextlib
import copy
import ctypes
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal, NamedTuple, Optional

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import nn

# ---- Args and presets ------------------------------------------------------------------------------------------------


# Defaults are the authors' configuration; the paper's tables agree with it.
@dataclass
class Args:
    # ---- Experiment
    exp_name: str = "iris"
    """name of the experiment, part of the run directory"""
    preset: Literal["full", "cpu", "atari100k", "minatar"] = "full"
    """named settings; explicit flags win over them"""
    seed: int = 1
    """seed of everything random: networks, noise, replay, environments"""
    torch_deterministic: bool = True
    """deterministic cuDNN kernels"""
    cuda: bool = True
    """use the GPU if there is one"""
    compile: bool = True
    """torch.compile the networks, and on a GPU capture each whole update, rollout included, in a CUDA graph"""
    bf16: bool = True
    """compute in bfloat16 on a GPU (parameters, codebook lookup, losses stay float32); on a CPU always float32"""
    num_threads: Optional[int] = None
    """CPU threads of torch (default: torch's own choice)"""
    track: Optional[Literal["wandb", "trackio"]] = None
    """also send the curves to this tracker (needs its package)"""
    wandb_project_name: str = "world-models"
    """project name for --track"""
    wandb_entity: Optional[str] = None
    """team for --track wandb"""
    capture_video: bool = False
    """write one episode of the final evaluation as a GIF"""
    save_every: int = 10_000
    """agent steps between checkpoints; unfinished episodes are cut there (see the docstring)"""
    save_replay: bool = True
    """keep the replay in the checkpoint; without it --resume starts with an empty one and is not bit-exact"""
    resume: Optional[str] = None
    """run directory to continue"""
    init_from: Optional[str] = None
    """checkpoint of the authors' code (its `last.pt`) whose weights the networks start with"""
    evaluate: Optional[str] = None
    """run directory to evaluate, nothing is trained"""
    play: Optional[str] = None
    """run directory whose dream is played with the keyboard"""
    target_return: Optional[float] = None
    """exit with code 1 if the final evaluation stays below this"""

    # ---- Environment
    env_id: str = "ALE/Pong-v5"
    """any gymnasium id with Discrete actions and images, `module:Id-v0`; others with --pixels"""
    env_kwargs: str = "{}"
    """JSON object passed to gymnasium.make"""
    total_timesteps: int = 100_000
    """agent steps, summed over environments (paper: 500 epochs of 200)"""
    num_envs: int = 1
    """environments in lockstep"""
    action_repeat: Optional[int] = None
    """environment steps per agent step (default: 4 for Atari, else 1)"""
    pixels: bool = False
    """observe rendered images instead of the environment's own observation"""
    image_size: int = 64
    """images are resized to this many pixels per side"""
    sticky_actions: float = 0.0
    """Atari: probability that the emulator repeats the previous action"""
    full_action_space: bool = False
    """Atari: all 18 actions instead of the game's minimal set"""
    noop_max: int = 30
    """Atari: 1 to this many no-ops at the start of a training game; exactly 1 in evaluation"""
    episodic_life: bool = True
    """Atari: a lost life ends a training episode"""
    max_frames: int = 20_000
    """Atari: raw frames after which a training game is cut; 108,000 in evaluation"""
    max_episode_steps: Optional[int] = None
    """agent steps after which an episode is cut, at most the environment's own limit (default: that limit)"""

    # ---- Schedule
    steps_per_epoch: int = 200
    """agent steps collected per epoch, summed over environments"""
    extra_epochs: int = 100
    """epochs after the last agent step, which only learn"""
    tokenizer_start: int = 5
    """epochs before the tokenizer's first update"""
    tokenizer_stop: Optional[int] = None
    """the tokenizer is frozen after this epoch (default: never)"""
    world_model_start: int = 25
    """epochs before the world model's first update"""
    actor_critic_start: int = 50
    """epochs before the actor-critic's first update"""
    tokenizer_updates: int = 200
    """per epoch"""
    world_model_updates: int = 200
    """per epoch"""
    actor_critic_updates: int = 200
    """per epoch"""

    # ---- World model
    vocab_size: int = 512
    """V, words of the tokenizer's vocabulary"""
    code_dim: int = 512
    """D, width of a code word"""
    tok_channels: int = 64
    """channels of the tokenizer's convolutions"""
    tok_levels: int = 5
    """resolutions of the tokenizer; each halves the one before"""
    tok_blocks: int = 2
    """residual blocks per resolution of the encoder; the decoder has one more"""
    tok_attention: str = "8 16"
    """resolutions (pixels per side) with attention"""
    tok_latent: int = 512
    """channels between the convolutions and the codebook"""
    tok_groups: int = 32
    """groups of the tokenizer's group norms"""
    tok_patch: int = 1
    """the first convolution takes patches of this many pixels per side, without overlap (1: the paper's 3x3)"""
    tok_tiles: int = 1
    """the image is cut into tiles x tiles parts that are encoded apart from each other (1: the whole image)"""
    beta: float = 1.0
    """weight of the commitment term (VQ-VAE has 0.25)"""
    recon_scale: float = 10.0
    """weight of the reconstruction loss without LPIPS (Delta-IRIS: 1, with a commitment of 0.02)"""
    lpips_weights: Optional[str] = None
    """file with VGG16 and LPIPS heads, or two files separated by a comma: train with L1 + LPIPS as in the paper"""
    revive_codes: int = 0
    """tokenizer updates during which unused code words are put where the codebook fits worst (0: never)"""
    batch_length: int = 20
    """T, steps of a training sequence and of the GPT's memory"""
    embed_dim: int = 256
    """E, width of the GPT"""
    num_layers: int = 10
    """blocks of the GPT"""
    num_heads: int = 4
    """attention heads of a block"""
    dropout: float = 0.1
    """of embeddings, attention weights and residual branches of the GPT"""
    wm_init_gain: float = 0.0
    """initial weights of the GPT's linear layers from N(0, gain^2 / inputs) (0: from N(0, 0.02^2) as in the paper)"""
    skip_first_frame: bool = False
    """no loss on the tokens of a segment's first frame, which nothing precedes and no dream predicts"""

    # ---- Behavior
    imag_horizon: int = 20
    """H, imagined steps"""
    burn_in: int = 20
    """real steps that warm up the LSTM before a rollout and before acting"""
    gamma: float = 0.995
    """discount"""
    return_lambda: float = 0.95
    """lambda of the returns"""
    ent_coef: float = 0.001
    """entropy scale of the actor"""
    ac_channels: str = "32 32 64 64"
    """channels of the actor-critic's convolutions, each followed by a 2x2 max-pooling"""
    lstm_size: int = 512
    """U, units of the actor-critic's LSTM"""
    temperature: float = 1.0
    """of the policy when it collects (0.01 for Freeway: the paper's recipe against dithering)"""
    epsilon: float = 0.01
    """probability of a uniform random action when it collects"""
    target_critic: bool = False
    """bootstrap from a slowly moving copy of the actor-critic (Delta-IRIS)"""
    tau: float = 0.005
    """update rate of that copy"""
    mask_after_end: bool = False
    """no loss on imagined steps after the first imagined end (Delta-IRIS)"""

    # ---- Optimization
    buffer_size: int = 100_000
    """replay capacity in rows, summed over environments; never more is allocated than --total-timesteps can fill"""
    replay_cuda: bool = True
    """keep the replay on the GPU if it fits there, otherwise in host memory"""
    tokenizer_batch_size: int = 256
    """frames per update of the tokenizer"""
    batch_size: int = 64
    """segments per update of the world model"""
    ac_batch_size: int = 64
    """B, rollouts per update of the actor-critic"""
    learning_rate: float = 1e-4
    """of all three optimizers"""
    tokenizer_lr: Optional[float] = None
    """learning rate of the tokenizer (default: --learning-rate)"""
    world_model_lr: Optional[float] = None
    """learning rate of the world model (default: --learning-rate)"""
    actor_critic_lr: Optional[float] = None
    """learning rate of the actor-critic (default: --learning-rate)"""
    weight_decay: float = 0.01
    """of the weights of the world model's linear layers"""
    max_grad_norm: float = 10.0
    """global gradient norm at which each of the three is clipped"""

    # ---- Evaluation and logging
    eval_episodes: int = 100
    """episodes of the final evaluation, of --evaluate and of the random baseline"""
    eval_temperature: float = 0.5
    """of the policy when it is evaluated (0: the most likely action)"""
    log_every: int = 1000
    """agent steps between log lines"""
    report_every: int = 10_000
    """agent steps between reports on fresh episodes: reconstructions, token accuracy, dreams (0: never)"""


# fmt: off
PRESETS = {
    "full": {},
    # A laptop: Catch, 32x32 pixels in 16 tokens that see one 8x8 patch each; learning rates for hundreds of updates.
    # Measured by stage, in CPU seconds of one thread of a busy machine (seeds 1 to 4): tokenizer 1200 updates, 45 s,
    # squared error of pixels 1e-5 to 2e-4; GPT 550 updates, 25 s, then 800 more beside the actor-critic: 99.5 to 100 %
    # of changed tokens on fresh episodes, and of dreamed rewards, of which one in seven is not zero, 97 to 99.8 %;
    # actor-critic 320 updates, 140 s, above random after 140 to 200; final return 1.0 on each, random -0.8.
    # NOTE: at a rate of 3e-3 for the tokenizer single updates undid hundreds of others; in one run of a dozen such a
    # fall came after --revive-codes, and five code words were left when the tokenizer was frozen.
    # NOTE: arrivals of the ball in the paddle's row of tokens that the GPT foresees, on true tokens: with the paper's
    # initial weights and the loss of first frames 3 % after 1000 updates; without that loss 1 % after 400; with wider
    # weights 64 % after 600; with both changes 93 % after 600.
    "cpu": dict(
        env_id="Catch-v0", image_size=32, total_timesteps=12_800, num_envs=16, steps_per_epoch=320, extra_epochs=0,
        tokenizer_start=5, tokenizer_stop=13, world_model_start=13, actor_critic_start=24, tokenizer_updates=150,
        world_model_updates=50, actor_critic_updates=20, vocab_size=64, code_dim=16, tok_channels=64, tok_levels=1,
        tok_blocks=1, tok_attention="", tok_latent=32, tok_groups=1, tok_patch=8, tok_tiles=4, revive_codes=1000,
        batch_length=2, embed_dim=64, num_layers=2, num_heads=4, dropout=0.0, wm_init_gain=1.0, skip_first_frame=True,
        imag_horizon=8, burn_in=2, gamma=0.95, ent_coef=0.01, ac_channels="8 16", lstm_size=128, mask_after_end=True,
        tokenizer_batch_size=32, batch_size=64, ac_batch_size=64, tokenizer_lr=1e-3, world_model_lr=1e-3,
        actor_critic_lr=3e-3, compile=False, num_threads=1, log_every=640, report_every=6_400, save_every=6_400,
    ),
    # The default, under the name that the other scripts give to this benchmark.
    "atari100k": {},
    # A GPU or patience: MinAtar drawn as 20x20 RGB in 5x5 tokens of two cells each.
    "minatar": dict(
        env_id="MinAtar/Breakout-v1", pixels=True, image_size=20, total_timesteps=100_000, num_envs=4, tok_channels=128,
        tok_levels=1, tok_attention="", tok_groups=1, tok_patch=4, tok_tiles=5, vocab_size=256, code_dim=64,
        tok_latent=64, revive_codes=2000, tokenizer_lr=1e-3, world_model_lr=3e-4, ac_channels="32 64", lstm_size=256,
        tokenizer_stop=25, mask_after_end=True, embed_dim=128, num_layers=4,
    ),
}
# Allowed values, both ends included; checked before anything is created. Fields that are None are skipped.
RANGES = {
    **dict.fromkeys(
        "num_threads save_every total_timesteps num_envs action_repeat max_episode_steps max_frames steps_per_epoch "
        "code_dim tok_channels tok_blocks tok_latent tok_groups tok_patch tok_tiles batch_length embed_dim num_layers "
        "num_heads lstm_size buffer_size tokenizer_batch_size batch_size ac_batch_size eval_episodes "
        "log_every".split(), (1, math.inf),
    ),
    **dict.fromkeys(
        "extra_epochs tokenizer_start world_model_start actor_critic_start tokenizer_updates "
        "world_model_updates actor_critic_updates revive_codes burn_in report_every".split(), (0, 10**9),
    ),
    **dict.fromkeys("sticky_actions gamma return_lambda epsilon tau weight_decay".split(), (0, 1)),
    **dict.fromkeys("beta recon_scale ent_coef wm_init_gain".split(), (0, 1e9)),
    **dict.fromkeys("learning_rate tokenizer_lr world_model_lr actor_critic_lr".split(), (1e-12, 1)),
    **{"seed": (0, 2**32 - 1), "noop_max": (0, 1000), "image_size": (8, 256), "vocab_size": (2, 32767)},
    **{"tokenizer_stop": (1, 10**9), "tok_levels": (1, 8)},
    **{"dropout": (0, 0.99), "imag_horizon": (2, 10**6), "max_grad_norm": (1e-9, 1e12)},
    **{"temperature": (0, 1e6), "eval_temperature": (0, 1e6), "target_return": (-1e300, 1e300)},
}
# fmt: on


# ---- Maths -----------------------------------------------------------------------------------------------------------


def lambda_values(rewards, values, ends, gamma, lam):
    """Lambda returns (eq. 6 and 7): all (B, T) -> (B, T). G_T = V_T; the last step only bootstraps."""
    live, out = gamma * (1 - ends.float()), values[:, -1]
    returns = [out]
    for t in reversed(range(rewards.shape[1] - 1)):
        # NOTE: the bootstrap is V of the NEXT step, and reward and end are those that follow step t.
        out = rewards[:, t] + live[:, t] * ((1 - lam) * values[:, t + 1] + lam * out)
        returns.append(out)
    return torch.stack(returns[::-1], 1)


lambda_return = lambda_values  # the name of the paper's quantity; dreamerv3.py has one with other arguments


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


def pixel_loss(x, x_hat):
    """Delta-IRIS's reconstruction loss: images (N, ...) in [0, 1] -> 0-dim."""
    # NOTE: never L1 alone. Its optimum is a median, which deletes small moving objects, and what the tokenizer drops
    # does not exist for the policy. The square and the largest error of an image keep them.
    d = (x - x_hat).abs().flatten(1)
    return 0.1 * d.mean() + (d**2).mean() + 0.01 * (d**2).amax(1).mean()


recon_loss = pixel_loss  # dreamerv3.py has one for all kinds of observations


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
        return self.conv(
            F.pad(x, (0, 1, 0, 1))
        )  # NOTE: one row of zeros below, one column on the right, none elsewhere


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
        for t in range(frames.shape[1]):
            gates = (x[:, t] + F.linear(h, self.lstm.weight_hh, self.lstm.bias_hh)).float()
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
    """Tokenizer, world model, actor-critic and, if wanted, the slow copy of the latter."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.tokenizer = Tokenizer(**c["tokenizer"])
        self.world_model = WorldModel(tokens_per_frame=self.tokenizer.num_tokens, **c["world_model"])
        self.actor_critic = ActorCritic(**c["actor_critic"])
        self.target = copy.deepcopy(self.actor_critic).requires_grad_(False) if c["target_critic"] else None

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
    return dict(
        tokenizer=tokenizer, world_model=world_model, actor_critic=actor_critic, target_critic=args.target_critic
    )


def count_params(model):
    """Trainable parameters of a module."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---- Losses ----------------------------------------------------------------------------------------------------------


# [optional: lpips
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


# lpips]


def tokenizer_loss(model, batch, args, lpips=None, revive=None):
    """Autoencoder and codebook on single frames {"obs": (N, S, S, C)}."""
    x = to_images(batch["obs"])
    z, z_q, x_hat, _ = model.tokenizer(x, revive)
    losses = {"commitment": vq_loss(z, z_q, args.beta)}
    if lpips is None:
        losses["reconstruction"] = args.recon_scale * pixel_loss(x, x_hat)
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
        boot = values if model.target is None else model.target(rollout.frames, burn_in(model.target, batch))[1]
        returns = lambda_values(rollout.rewards, boot, rollout.ends, args.gamma, args.return_lambda)[:, :-1]
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


class IrisLearner:
    """The networks, an optimizer for each of the three, and an update of each."""

    PARTS = "tokenizer", "world_model", "actor_critic"

    def __init__(self, model, args, device):
        self.model, self.args, self.device = model, args, device
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.bf16 = args.bf16 and device.type == "cuda"
        self.lpips = None
        # [optional: lpips
        self.lpips = LPIPS(args.lpips_weights).to(device) if args.lpips_weights else None
        # lpips]
        options, self.opt = dict(fused=True, capturable=device.type == "cuda"), {}
        for part in self.PARTS:
            rate = getattr(args, f"{part}_lr") or args.learning_rate
            if part == "world_model":
                self.opt[part] = configure_optimizer(model.world_model, rate, args.weight_decay, **options)
            else:
                self.opt[part] = torch.optim.Adam(getattr(model, part).parameters(), lr=rate, **options)
        self.bad, self.names = {}, {}  # per part: which terms were not finite; set once, on the device
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
                losses, metrics = tokenizer_loss(
                    model, batch, args, self.lpips, self.revive if args.revive_codes else None
                )
            elif part == "world_model":
                losses, metrics = gpt_loss(model, batch, args)
            else:
                losses, metrics = actor_critic_loss(model, batch, args)
        model.world_model.eval()
        opt.zero_grad()
        sum(losses.values()).backward()
        params = [p for group in opt.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(params, args.max_grad_norm)
        # No step on bad numbers, decided on the device. The main loop looks at `bad` when it reads metrics.
        bad = ~torch.isfinite(torch.stack([*losses.values(), norm]).detach())
        if part not in self.bad:
            self.bad[part], self.names[part] = torch.zeros_like(bad), [*losses, "gradient norm"]
        self.bad[part].copy_(torch.where(self.bad[part].any(), self.bad[part], bad))
        ok = ~self.bad[part].any()
        opt.found_inf = (~ok).float()  # the fused kernel then leaves parameters and moments alone
        opt.step()
        if part == "actor_critic" and model.target is not None:
            slow, fast = list(model.target.parameters()), [p.detach() for p in model.actor_critic.parameters()]
            torch._foreach_lerp_(slow, fast, args.tau * ok)
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

    def check(self, where=""):
        """Raise FloatingPointError naming what was not finite. Waits for the device."""
        for part, bad in self.bad.items():
            if bad.any():
                names = ", ".join(n for n, b in zip(self.names[part], bad.tolist(), strict=True) if b)
                raise FloatingPointError(f"not finite at {where}: {names}; no optimizer step was taken")

    def state_dict(self):
        state = {"model": self.model.state_dict(), "usage": self.usage, "count": self.count}
        return state | {"optimizers": {k: o.state_dict() for k, o in self.opt.items()}}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        for k, opt in self.opt.items():
            opt.load_state_dict(state["optimizers"][k])
            for group in opt.param_groups:  # the run may have begun on another kind of device
                group["capturable"] = self.device.type == "cuda"
        self.usage.copy_(state["usage"])
        self.count.copy_(state["count"])


# [optional: compile
def compile_iris(model, learner):
    """Compile convolutions and the GPT's blocks; on a GPU capture each whole update in a CUDA graph."""
    try:
        torch.compile(lambda x: torch.sin(x) + 1)(torch.zeros(8, device=learner.device))  # is there a working compiler?
    except Exception as e:
        return say(f"warning: torch.compile does not work here ({type(e).__name__}); going on without it")
    say("compiling: the first updates take a minute or more (--no-compile starts at once)")
    for network in (model.tokenizer.encoder, model.tokenizer.decoder):
        network.compile(dynamic=False)  # in place: parameter names in checkpoints stay as they are
    for block in model.world_model.transformer.blocks:
        # Around the attention, whose length grows with the memory: these have few shapes.
        block.project, block.finish = (torch.compile(f, dynamic=False) for f in (block.project, block.finish))
    if learner.device.type == "cuda":
        update = learner.update
        graphs = {part: Graphed(lambda batch, part=part: update(part, batch)) for part in learner.PARTS}
        learner.update = lambda part, batch: graphs[part](batch)


class Graphed:  # shared
    """A function of a dict of tensors, captured in a CUDA graph after three ordinary calls. Outputs are reused by
    later calls."""

    def __init__(self, function):
        self.function, self.calls, self.graph, self.stream = function, 0, None, torch.cuda.Stream()

    def __call__(self, inputs):
        self.calls += 1
        if self.calls <= 3:  # real calls that warm up kernels and allocator, on a side stream as capture wants it
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if self.graph is None:
            self.inputs, self.graph = {k: v.clone() for k, v in inputs.items()}, torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records, does not run
                self.outputs = self.function(self.inputs)
        torch._foreach_copy_(list(self.inputs.values()), list(inputs.values()))
        self.graph.replay()
        return self.outputs


# compile]


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

    @staticmethod
    def row_bytes(specs):
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values())

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

    def cut(self):
        """Close every open episode, without an end."""
        self.open = [False] * len(self.open)

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

    def forget_codes(self):
        """The tokenizer has changed: what was encoded is no longer valid."""
        self.encoded[:] = 0

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


# [optional: catch
class Catch(gym.Env):
    """A ball falls through 8x8 cells; move the paddle below it. +1 caught, -1 missed, 7 steps. 4 pixels per cell."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}
    observation_space, action_space = gym.spaces.Box(0, 255, (32, 32, 3), np.uint8), gym.spaces.Discrete(3)

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
# catch]


def resize(image, size):  # shared
    """(H, W, C) uint8 -> (size, size, C), bilinear."""
    if image.shape[:2] == (size, size):
        return image
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    return np.asarray(picture.resize((size, size), Image.BILINEAR)).reshape(size, size, -1)


class AtariLives(gym.Wrapper):
    """Frame skip with the maximum of the last two frames, 1 to `noop_max` no-ops, episodes of one life if wanted."""

    complete = True  # no further wrapper repeats actions or draws

    def __init__(self, env, repeat, size, noop_max, episodic_life):
        super().__init__(env)
        self.repeat, self.size, self.noop_max, self.episodic_life = repeat, size, noop_max, episodic_life
        self.over, self.lives = True, 0
        self.observation_space = gym.spaces.Box(0, 255, (size, size, 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        """After a lost life the game goes on, with one no-op; options={"full": True} begins a new game even then."""
        if not self.over and self.episodic_life and not (options or {}).get("full"):
            picture, _, _, _, info = self.step(0)
            if not self.over:  # whether or not that lost another life
                return picture, info
        frame, info = self.env.reset(seed=seed)
        noops = np.random.default_rng(seed).integers(1, self.noop_max + 1) if self.noop_max else 0
        for _ in range(noops):
            frame, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                frame, info = self.env.reset()
        self.over, self.lives = False, self.unwrapped.ale.lives()
        return resize(frame, self.size), info

    def step(self, action):
        total, frames = 0.0, []
        for _ in range(self.repeat):
            frame, reward, terminated, truncated, info = self.env.step(action)
            total, frames = total + float(reward), [*frames[-1:], frame]
            if terminated or truncated:
                break
        self.over, lives = terminated or truncated, self.unwrapped.ale.lives()
        # NOTE: not at 0 lives: there some games go on for a few frames, and the emulator says itself when it is over.
        if self.episodic_life and 0 < lives < self.lives:
            terminated = True
        self.lives = lives
        # NOTE: every frame is resized first and the maximum taken then, as the authors do.
        return np.max([resize(f, self.size) for f in frames], axis=0), total, terminated, truncated, info


def draw_minatar(state, size):  # shared
    """(10, 10, C) bool -> (size, size, 3) uint8: one hue per channel, whole pixels, black border."""
    hues = np.linspace(0, 1, state.shape[2], endpoint=False)[:, None] + np.array([0, 1 / 3, 2 / 3])
    colors = (255 * np.clip(np.abs(hues % 1 * 6 - 3) - 1, 0.15, 1)).astype(np.uint8)  # (C, 3)
    image = np.zeros((*state.shape[:2], 3), np.uint8)
    for channel, color in enumerate(colors):
        image[state[..., channel]] = color
    zoom = max(1, size // state.shape[0])
    image = image.repeat(zoom, 0).repeat(zoom, 1)[:size, :size]
    pad = [((size - n) // 2, size - n - (size - n) // 2) for n in image.shape[:2]]
    return np.pad(image, (*pad, (0, 0)))


class Pixels(gym.ObservationWrapper):  # shared
    """Observe what the environment draws (MinAtar: its state in colours) instead of its own observation."""

    def __init__(self, env, size):
        super().__init__(env)
        self.size, self.minatar = size, hasattr(env.unwrapped, "game") and hasattr(env.unwrapped.game, "state_shape")
        self.observation_space = gym.spaces.Box(0, 255, (size, size, 3), np.uint8)

    def observation(self, obs):
        if self.minatar:
            return draw_minatar(self.unwrapped.game.state(), self.size)
        image = self.env.render()
        if not isinstance(image, np.ndarray):
            raise ValueError(f"--pixels needs rgb_array images (H, W, 3) from render(), found {type(image).__name__}")
        return resize(image, self.size)


class Repeat(gym.Wrapper):  # shared
    """Repeat each action, add up the rewards, stop at the end of the episode."""

    def __init__(self, env, repeat):
        super().__init__(env)
        self.repeat = repeat

    def step(self, action):
        total = 0.0
        for _ in range(self.repeat):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


class Adapter(gym.Wrapper):  # shared
    """Any supported environment as: Dict observations (uint8 images (H, W, C), float32 vectors (n,), int64 numbers) and
    Discrete(n) or Box(-1, 1) actions. Raises ValueError with what was wanted and what was found."""

    def __init__(self, env, size):
        super().__init__(env)
        space, self.size, self.kinds = env.observation_space, size, {}
        self.single = not isinstance(space, gym.spaces.Dict)
        self.source = {"observation": space} if self.single else dict(space.spaces)
        out = {}
        for key, s in self.source.items():
            if isinstance(s, gym.spaces.Discrete):
                self.kinds[key], out[key] = "number", gym.spaces.Discrete(s.n)
            elif isinstance(s, gym.spaces.Box) and s.dtype == np.uint8 and len(s.shape) > 1:
                if len(s.shape) != 3 or s.shape[2] not in (1, 3):
                    raise ValueError(f"images must be uint8 (height, width, 1 or 3), {key!r} is {s.dtype} {s.shape}")
                self.kinds[key], out[key] = "image", gym.spaces.Box(0, 255, (size, size, s.shape[2]), np.uint8)
            elif isinstance(s, gym.spaces.Box) and math.prod(s.shape) <= 4096:
                n = math.prod(s.shape)
                self.kinds[key], out[key] = "vector", gym.spaces.Box(-np.inf, np.inf, (n,), np.float32)
            else:
                found = f"{s} in a Dict with the keys {sorted(self.source)}" if not self.single else str(s)
                wanted = "images, vectors of up to 4096 numbers or Discrete"
                raise ValueError(f"observations must be {wanted}, {key!r} is {found}")
        self.observation_space, a = gym.spaces.Dict(out), env.action_space
        if isinstance(a, gym.spaces.Discrete):
            self.action_space = gym.spaces.Discrete(a.n)
        elif isinstance(a, gym.spaces.Box) and len(a.shape) == 1 and a.dtype.kind == "f":
            self.action_space = gym.spaces.Box(-1, 1, a.shape, np.float32)
        else:
            raise ValueError(f"actions must be Discrete or a one-dimensional float Box, found {a}")

    def convert(self, obs):
        obs, out = {"observation": obs} if self.single else obs, {}
        for key, kind in self.kinds.items():
            value, space = np.asarray(obs[key]), self.source[key]
            if value.shape != space.shape or (kind == "image" and value.dtype != np.uint8):
                sent = f"{value.dtype} {value.shape}"
                raise ValueError(f"{key!r} is declared {space.dtype} {space.shape}, the environment sent {sent}")
            if kind == "image":
                out[key] = resize(value, self.size)
            elif kind == "number":
                out[key] = np.int64(value - space.start)
            else:
                out[key] = value.astype(np.float32).reshape(-1)
        return out

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        return self.convert(obs), info

    def step(self, action):
        space = self.env.action_space
        if isinstance(space, gym.spaces.Discrete):
            action = int(action) + int(space.start)
        else:  # the policy's Gaussian is unbounded: clip, then stretch to the environment's bounds where it has them
            action = np.clip(action, -1, 1)
            bounded = np.isfinite(space.low) & np.isfinite(space.high)
            low, high = np.where(bounded, space.low, -1), np.where(bounded, space.high, 1)
            action = (low + (action + 1) / 2 * (high - low)).astype(space.dtype)
        obs, reward, terminated, truncated, info = self.env.step(action)
        return self.convert(obs), float(reward), bool(terminated), bool(truncated), info


PACKAGES = {"ALE": ("ale_py", "ale-py"), "MinAtar": ("minatar", "minatar")}


def env_family(args):  # shared
    """ALE, MinAtar, dm_control, or whatever stands before the slash of an id."""
    return args.env_id.split(":")[-1].split("/")[0]


def registered_env(args, **kwargs):  # shared
    """An environment of gymnasium's registry, where those of ALE and MinAtar are put first; `kwargs` win over flags."""
    family, kwargs = env_family(args), json.loads(args.env_kwargs) | kwargs
    if family == "ALE":
        import ale_py

        gym.register_envs(ale_py)
    elif family == "MinAtar":
        import minatar.gym

        if args.env_id not in gym.registry:
            minatar.gym.register_envs()
        kwargs |= dict(max_episode_steps=2500) if not args.max_episode_steps else {}  # MinAtar has no limit
    if args.pixels and family != "MinAtar":
        kwargs |= dict(render_mode="rgb_array")
    return gym.make(args.env_id, **kwargs)


def atari_lives(args):
    # NOTE: the v5 ids skip frames by themselves and without max-pooling; the skip is ours, and it is the only one.
    settings = dict(repeat_action_probability=args.sticky_actions, full_action_space=args.full_action_space)
    env = registered_env(args, frameskip=1, max_num_frames_per_episode=args.max_frames, **settings)
    return AtariLives(env, args.action_repeat or 4, args.image_size, args.noop_max, args.episodic_life)


def box_actions_only(args):
    raise ValueError("tokens of actions need Discrete actions; DeepMind Control has Box actions")


# Environments that are not built by gymnasium.make alone.
FAMILIES = {"ALE": atari_lives, "dm_control": box_actions_only}


def make_env(args, index, key=0):  # shared
    """A function that builds environment `index`, with every wrapper. Episodes of different keys never share a seed."""

    def thunk():
        if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
            os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # draw without a display
            os.environ.setdefault("MUJOCO_GL", "egl")
        env = FAMILIES.get(env_family(args), registered_env)(args)
        if not getattr(env, "complete", False):  # Atari's wrapper repeats and draws by itself
            env = Repeat(env, args.action_repeat) if (args.action_repeat or 1) > 1 else env
            env = Pixels(env, args.image_size) if args.pixels else env
        env = Adapter(env, args.image_size)
        if args.max_episode_steps:
            env = gym.wrappers.TimeLimit(env, args.max_episode_steps)
        return CheckedEnv(SeededReset(gym.wrappers.RecordEpisodeStatistics(env), (args.seed, key, index)), index)

    return thunk


def make_envs(args, n, key=0):  # shared
    """n environments in lockstep. NOTE: SAME_STEP, so that the true last observation arrives with the end of its
    episode."""
    return gym.vector.SyncVectorEnv(
        [make_env(args, i, key) for i in range(n)], autoreset_mode=gym.vector.AutoresetMode.SAME_STEP
    )


def to_torch(obs, device):  # shared
    return {k: torch.as_tensor(v, device=device) for k, v in obs.items()}


# ---- Evaluation and dreams -------------------------------------------------------------------------------------------


def random_policy(action_space, seed):  # shared
    """Uniform actions, as a policy: observations, is_first, its state -> actions, its state."""
    rng, n = np.random.default_rng(seed), getattr(action_space, "n", None)
    shape = () if n else action_space.shape

    def policy(obs, first, state):
        size = (len(first), *shape)
        return (rng.integers(n, size=size) if n else rng.uniform(-1, 1, size).astype(np.float32)), state

    return policy


def eval_args(args):
    """Evaluation plays whole games from one no-op, up to half an hour, with the environment's own rewards."""
    return replace(args, episodic_life=False, noop_max=min(1, args.noop_max), max_frames=108_000)


def agent_policy(model, device, temperature=0.5):
    """The trained actor, with its recurrent state, as a policy for play_episodes."""

    def policy(obs, first, state):
        (frames,) = obs.values()
        keep = torch.as_tensor(~first, device=device).unsqueeze(-1)
        state = model.actor_critic.initial(len(first), device) if state is None else [s * keep for s in state]
        action, state = model.act(torch.as_tensor(frames, device=device), state, temperature)
        return action.cpu().numpy(), state

    return policy


def picture_of(env, obs):  # shared
    """What the environment renders, if it does, else its observation."""
    image = env.render() if getattr(env.unwrapped, "render_mode", None) == "rgb_array" else None
    return image if isinstance(image, np.ndarray) and image.ndim == 3 else draw(obs)


def play_episodes(args, policy, episodes, key, video=None, stop=None):  # shared
    """Returns of one episode in each of `episodes` fresh environments; `video`: path for a GIF of the first one;
    `stop`: a StopSignal that ends it early."""
    envs, frames, state, first = make_envs(args, episodes, key), [], None, np.ones(episodes, bool)
    returns, alive = np.zeros(episodes), np.ones(episodes, bool)
    try:
        obs, _ = envs.reset()
        for _ in range(args.max_episode_steps or 27_000):  # an environment without a limit ends here
            if video and alive[0]:
                frames.append(picture_of(envs.envs[0], {k: v[0] for k, v in obs.items()}))
            actions, state = policy(obs, first, state)
            obs, reward, terminated, truncated, _ = envs.step(actions)
            returns, first = returns + reward * alive, terminated | truncated
            alive &= ~first
            if not alive.any() or (stop and stop.signum):
                break
    finally:
        envs.close()
    if video:
        save_gif(frames, video)
    return [float(r) for r in returns]


def record(args, policy, obs_space, n, length, key, tokens):
    """`length` steps of n fresh environments under `policy`, as an EpisodeReplay."""
    envs, state, first, (name,) = make_envs(args, n, key), None, np.ones(n, bool), obs_space
    clips = EpisodeReplay(length, n, EpisodeReplay.specs(obs_space[name].shape, tokens))
    try:
        obs, _ = envs.reset()
        for _ in range(length):
            actions, state = policy(obs, first, state)
            frames = obs[name]
            obs, reward, terminated, truncated, _ = envs.step(actions)
            first = terminated | truncated
            clips.add({"obs": frames, "action": actions, "reward": reward, "end": first}, first)
    finally:
        envs.close()
    return clips


@torch.no_grad()
def open_loop(model, clips, args):
    """Tokenizer and world model on clips (an EpisodeReplay) that they did not learn from. Returns metrics beside those
    of trivial predictors and, for a video, frames, reconstructions and dreams, each (n, L, S, S, C) uint8: the dream
    sees the first frame and then follows the true actions."""
    device = next(model.parameters()).device
    clips.encode(model.tokenizer, device)
    x, recon = (to_images(clips.data[k].to(device)) for k in ("obs", "recon"))  # (n, L, C, S, S)
    n, length = x.shape[:2]
    tokens, action = clips.data["tokens"].long().to(device), clips.data["action"].to(device)
    reward, end = clips.data["reward"].to(device), clips.data["end"].to(device)
    alive = torch.cat([torch.ones(n, 1, device=device), (1 - end.float()).cumprod(1)[:, :-1]], 1)  # (n, L)
    flow = 1 - end[:, :-1].float()  # (n, L - 1): the next frame is of the same episode

    def mean(error, mask):
        error = error.flatten(2).mean(-1)
        return float((error * mask).sum() / mask.sum().clamp(min=1))

    metrics = {"posterior_mse": mean((recon - x) ** 2, torch.ones_like(alive))}
    metrics["mean_frame_mse"] = mean((x.mean((0, 1), keepdim=True) - x) ** 2, torch.ones_like(alive))
    if length > 1:  # NOTE: what moves is a small part of an image; an error of the whole hides that it is lost
        moved = (x[:, 1:] != x[:, :-1]).any(2, keepdim=True) * flow[..., None, None, None]
        error = ((recon - x)[:, 1:] ** 2 * moved).sum() / (moved.sum() * x.shape[2]).clamp(min=1)
        metrics["moving_pixels_mse"] = float(error)
    rng, clips.rng = clips.rng, np.random.default_rng(0)
    batch = {k: v.to(device) for k, v in clips.segments(clips.table(), 256, args.batch_length).items()}
    clips.rng = rng
    metrics |= {k: float(v) for k, v in gpt_loss(model, batch, args)[1].items()}
    now, then, both = batch["tokens"][:, :-1], batch["tokens"][:, 1:], batch["mask"][:, 1:]
    metrics["copy_token_accuracy"] = float(((now == then).float().mean(-1) * both).sum() / both.sum().clamp(min=1))

    kv, current, frames, right, imagined = model.world_model.cache(n), tokens[:, 0], [x[:, 0]], [], [recon[:, 0]]
    for t in range(length - 1):
        r, _, current = dream_step(model.world_model, kv, current, action[:, t])
        right.append((r == reward[:, t].sign()).float())
        imagined.append(model.tokenizer.show(current))
        frames.append(x[:, 0])
    dream, first = torch.stack(imagined, 1), torch.stack(frames, 1)
    metrics["open_loop_mse"] = mean((dream - x)[:, 1:] ** 2, alive[:, 1:])
    metrics["copy_last_mse"] = mean((first - x)[:, 1:] ** 2, alive[:, 1:])
    if right:
        metrics["open_loop_reward_accuracy"] = mean(torch.stack(right, 1).unsqueeze(-1), alive[:, :-1])
    shown = max(1, int(alive.all(0).sum()))  # the video ends with the first episode that does
    to_uint8 = lambda v: (v[:, :shown].movedim(-3, -1) * 255).round().to(torch.uint8).cpu().numpy()  # noqa: E731
    return metrics, tuple(map(to_uint8, (x, recon, dream)))


def draw(obs, size=96):  # shared
    """One observation {key: array} as an RGB picture: its first image, or else bars for its numbers."""
    for value in obs.values():
        if np.ndim(value) == 3:
            image = np.broadcast_to(value, (*value.shape[:2], 3))
            return np.ascontiguousarray(image.repeat(z := max(1, size // len(image)), 0).repeat(z, 1))
    numbers = np.concatenate([np.atleast_1d(v).astype(np.float32).ravel() for v in obs.values()])[: size // 3]
    image, width = np.full((size, size, 3), 24, np.uint8), size // len(numbers)
    for i, height in enumerate(size // 2 - (np.tanh(numbers) * (size // 2 - 4)).astype(int)):
        top, bottom = sorted((int(height), size // 2))
        image[top : bottom + 2, i * width + 1 : (i + 1) * width - 1] = (90, 170, 250)
    return image


def three_rows(real, recon, dream):
    """Frames of the report's video: real (grey border), reconstructed (green: the model sees the frame) and dreamed
    (red after the first frame) below each other, clips (n, L, S, S, C) side by side."""
    frames = []
    for t in range(real.shape[1]):
        columns = []
        for n in range(min(4, len(real))):
            rows = [(real, (90, 90, 90)), (recon, (60, 200, 90)), (dream, (230, 70, 70) if t else (60, 200, 90))]
            for i, (clips, border) in enumerate(rows):
                image = draw({"": clips[n, t]})
                rows[i] = np.full((len(image) + 6, image.shape[1] + 6, 3), border, np.uint8)
                rows[i][3:-3, 3:-3] = image
            columns.append(np.concatenate(rows))
        frames.append(np.concatenate(columns, 1))
    return frames


def space_to(space):  # shared
    """A space of Adapter in plain types."""
    if isinstance(space, gym.spaces.Dict):
        return {k: space_to(s) for k, s in space.items()}
    if isinstance(space, gym.spaces.Discrete):
        return int(space.n)
    return [list(space.shape), str(space.dtype), float(space.high.flat[0])]


def space_from(plain):  # shared
    if isinstance(plain, dict):
        return gym.spaces.Dict({k: space_from(v) for k, v in plain.items()})
    if isinstance(plain, int):
        return gym.spaces.Discrete(plain)
    shape, dtype, high = plain
    return gym.spaces.Box(0 if dtype == "uint8" else -high, high, tuple(shape), np.dtype(dtype).type)


def load_agent(path, device="cpu"):
    """Model and checkpoint of a run directory, to act or to dream: model, state."""
    state = load_checkpoint(path, "iris")
    model = Iris(state["config"])
    model.load_state_dict(state["learner"]["model"])
    return model.to(device).eval(), state


def official_state(state):
    """State dict of the authors' code -> that of `Iris` without the slow copy."""
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
        state = official_state({k: v for k, v in state.items() if torch.is_tensor(v)})
    except Exception as e:  # missing, damaged, or something else than tensors
        fail(f"--init-from {path} is not a state dict ({type(e).__name__})")
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("target.")}
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        fail(f"--init-from {path} has other names: {len(missing)} missing, {len(unknown)} unknown ({missing[:1]}, "
             f"{unknown[:1]})")  # fmt: skip
    for k, v in own.items():
        if v.shape != state[k].shape:
            fail(f"--init-from {path} has {k} of shape {tuple(state[k].shape)}, the flags want {tuple(v.shape)}")
    model.load_state_dict(state, strict=False)
    if model.target is not None:
        model.target.load_state_dict(model.actor_critic.state_dict())


class DreamEnv(gym.Env):
    """The learned world as an environment. `path`: run directory. Observations are a Dict, or the only entry by itself.

    reset(options={"observations": (T, S, S, C), "actions": (T,)}) puts real context into the GPT's memory (action t
    follows observation t; the last one is not used) and dreams on from the last frame; without options it starts from
    context kept in the checkpoint. Rewards are signs."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}

    def __init__(self, path, render_mode="rgb_array", max_steps=1000, device="cpu"):
        self.model, state = load_agent(path, device)
        self.device, self.render_mode, self.max_steps = torch.device(device), render_mode, max_steps
        self.space, self.context = space_from(state["spaces"]["observation"]), state["context"]
        (self.key,) = self.space
        self.single = self.key == "observation"
        self.observation_space = self.space[self.key] if self.single else self.space
        self.action_space, self.noise = space_from(state["spaces"]["action"]), torch.Generator(device)

    @torch.no_grad()
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.noise.manual_seed(int(self.np_random.integers(2**31)))
        if options and "observations" in options:
            frames = options["observations"]
            frames = np.asarray(frames[self.key] if isinstance(frames, dict) else frames, np.uint8)
            actions = np.asarray(options.get("actions", ()), np.int64)
            if not len(actions) or frames.shape != (len(actions), *self.space[self.key].shape):
                found = f"{frames.shape} and {len(actions)} actions"
                raise ValueError(f"observations and actions must have the same T > 0 entries, got {found}")
        else:
            if self.context is None:
                raise ValueError("this checkpoint was saved before any row was stored: pass options")
            clip = int(self.np_random.integers(len(self.context["length"])))
            frames, actions = (self.context[k][clip, : self.context["length"][clip]].numpy() for k in ("obs", "action"))
        world = self.model.world_model
        keep = max(1, world.max_tokens // world.block - 1)  # room for at least one step
        frames, actions = torch.as_tensor(frames[-keep:]), torch.as_tensor(actions[-keep:])
        tokens = self.model.tokenizer.encode(to_images(frames.to(self.device)))  # (T, K)
        self.kv, self.steps, self.tokens = world.cache(1), 0, tokens[-1:]
        past = torch.cat([tokens[:-1], actions[:-1, None].to(self.device)], 1).flatten()  # blocks of K + 1
        if len(past):
            world(torch.cat([past, tokens[-1, :-1]])[None], self.kv)
        return self.decode(), {}

    @torch.no_grad()
    def step(self, action):
        action = torch.as_tensor([int(action)], device=self.device)
        reward, end, self.tokens = dream_step(
            self.model.world_model, self.kv, self.tokens, action, generator=self.noise
        )
        self.steps += 1
        return self.decode(), float(reward), bool(end), self.steps >= self.max_steps, {}

    @torch.no_grad()
    def decode(self):
        image = self.model.tokenizer.show(self.tokens)[0].movedim(0, -1)
        self.image = np.ascontiguousarray((image * 255).round().to(torch.uint8).cpu().numpy())
        return self.image if self.single else {self.key: self.image}

    def render(self):
        return draw({self.key: self.image}, 256)


# [optional: play
def play(args):
    """Play inside the dream: digits and letters choose actions."""
    check_ranges(args, RANGES)
    env = DreamEnv(args.play)
    if env.context is None:
        fail(f"{args.play} has no frame to start a dream from: go on with --resume first")
    headless = sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    if headless or os.environ.get("SDL_VIDEODRIVER") == "dummy":
        path = os.path.join(args.play, "eval-dream.gif")
        torch.manual_seed(args.seed)
        env.reset(seed=args.seed)
        frames, policy, state = [env.render()], agent_policy(env.model, "cpu", args.eval_temperature), None
        for t in range(100):
            action, state = policy({env.key: env.image[None]}, np.array([t == 0]), state)
            _, _, terminated, truncated, _ = env.step(action[0])
            frames.append(env.render())
            if terminated or truncated:
                break
        save_gif(frames, path)
        return say(f"no display to play on: wrote the policy's dream to {path}")
    from gymnasium.utils.play import play as play_env

    keys = "1234567890abcdefghijklmnopqrstuvwxyz"
    mapping = {keys[i]: i for i in range(min(int(env.action_space.n), len(keys)))}
    say("keys: " + ", ".join(f"{k} = {v}" for k, v in mapping.items()) + "; Escape ends")
    play_env(env, keys_to_action=mapping, noop=0, zoom=2, fps=10)


# play]


# ---- Plumbing (shared by all scripts) --------------------------------------------------------------------------------


def fail(message):  # shared
    """The user's input is wrong: one line, exit code 2."""
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def say(text):  # shared
    """Print a line; if the reader of a pipe is gone, stop cleanly."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.kill(os.getpid(), signal.SIGTERM)


def parse_args(cls, presets, description):  # shared
    """Command line -> cls. Defaults: --preset, or the run given to --resume, --evaluate or --play. Flags win."""
    words = [w for a in sys.argv[1:] for w in a.split("=", 1)]
    given = {w.replace("_", "-"): v for w, v in zip(words, words[1:]) if w.startswith("--")}
    run = next((given[f] for f in ("--resume", "--evaluate", "--play") if f in given), None)
    defaults = {"preset": given["--preset"], **presets[given["--preset"]]} if given.get("--preset") in presets else {}
    known, names = {f.name for f in fields(cls)}, ("env_kwargs", "action_repeat", "episode_steps", "demonstrator")
    own = defaults.get("env_id", getattr(cls, "env_id", "")).split("/")[0]
    if given.get("--env-id", own).split("/")[0] != own:  # what a preset says about an environment is for its family
        defaults = {k: v for k, v in defaults.items() if not k.endswith(names)}
    defaults = load_args(run) | dict.fromkeys(("resume", "evaluate", "play")) if run is not None else defaults
    if hasattr(signal, "SIGPIPE"):  # `--help | head` ends quietly
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    args = tyro.cli(cls, description=description, default=cls(**{k: v for k, v in defaults.items() if k in known}))
    if hasattr(signal, "SIGPIPE"):  # but a training run must not die with its reader: see `say`
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    return args


def load_args(run):  # shared
    """The flags a run was started with, from its args.json."""
    path = os.path.join(run, "args.json")
    if not any(os.path.isfile(os.path.join(run, name)) for name in ("ckpt.pt", "ckpt.prev.pt")):
        fail(f"no checkpoint in {run}")
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)["args"]
    except (OSError, ValueError, KeyError) as e:
        fail(f"cannot read {path} ({type(e).__name__})")


def check_ranges(args, ranges):  # shared
    for name, (low, high) in ranges.items():
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        if value is not None and not low <= value <= high:  # NaN fails too
            fail(f"{flag} must be {f'at least {low}' if high == math.inf else f'{low} to {high}'}, got {value}")
        if value is not None and not math.isfinite(value):
            fail(f"{flag} must be finite, got {value}")


def choose_device(args):  # shared
    """The GPU if there is one and --cuda is on; says which and why."""
    if args.cuda and torch.cuda.is_available():
        say(f"device: cuda ({torch.cuda.get_device_name()})")
        return torch.device("cuda")
    say(f"device: cpu ({'no CUDA device' if args.cuda else '--no-cuda'})")
    return torch.device("cpu")


def free_memory(device):  # shared
    """Bytes that can still be allocated, or infinity where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo", encoding="utf-8") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable"))
    except OSError:
        return math.inf


def peak_memory(device):  # shared
    """Most memory used so far in GB, of the GPU's allocator or of this process; None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def passed(every, step, stride):  # shared
    """Whether the last `stride` steps went past a multiple of `every` (0: never)."""
    return bool(every) and step // every > (step - stride) // every


def finish(args, score, random_score, extra=""):  # shared
    """The last line of a run; exit code 1 if a target was set and missed."""
    line, target = f"episodic_return {score:.1f}{extra} (random {random_score:.1f}", args.target_return
    if target is None:
        return say(line + ")")
    say(f"{line}, target {target:g}): {'reached' if score >= target else 'missed'}")
    if not score >= target:
        raise SystemExit(1)


def seed_everything(args, device):  # shared
    """Seeds, determinism and the allocator of this process."""
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.set_float32_matmul_precision("high")
    if device.type == "cpu":  # repeated indices in an assignment: the last one wins, also with several threads
        torch.use_deterministic_algorithms(args.torch_deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False
        # glibc hands every large tensor back to the system when it is freed and faults its pages in again when the
        # next one is made: a third of the CPU time of image models. Keep freed memory instead (M_MMAP_MAX 0,
        # M_TRIM_THRESHOLD 2 GB).
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
        if mallopt:
            mallopt(-4, 0)
            mallopt(-1, 2**31 - 1)
    if getattr(args, "num_threads", None):
        torch.set_num_threads(args.num_threads)


def rng_state():  # shared
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    host = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest)}
    return host | {"torch": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state):  # shared
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def atomic_save(state, path):  # shared
    """Write a checkpoint; `path` is the new state or the old one, never half of either. Keeps the old as .prev.pt."""
    temp = path + ".tmp"
    try:
        with open(temp, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        if os.path.exists(path):
            os.replace(path, path.replace(".pt", ".prev.pt"))
        os.replace(temp, path)
    except (OSError, RuntimeError) as e:  # disk full, quota, file size limit
        if os.path.exists(temp):
            os.remove(temp)
        reason = f"({type(e).__name__}: {e})"
        raise SystemExit(f"could not write {path} {reason}; the previous checkpoint is untouched") from None


def write_json(data, path):  # shared
    """Write a JSON file; `path` is the new text or the old one."""
    try:
        with open(path + ".tmp", "w", encoding="utf-8") as f:
            json.dump(data, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except OSError as e:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        raise SystemExit(f"could not write {path} ({type(e).__name__}: {e})") from None


def load_checkpoint(run, script, repair=False):  # shared
    """The newest readable checkpoint of a run directory, plain types only; exit code 2 if there is none. `repair`:
    move a damaged ckpt.pt away, else the next save would put it in the place of the good older one."""
    problem = None
    for name in ("ckpt.pt", "ckpt.prev.pt"):
        path = os.path.join(run, name)
        if not os.path.isfile(path):
            continue
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)  # reads what is used, later
            if not isinstance(state, dict) or state.get("script") != script:
                fail(f"{path} is not a checkpoint of {script}.py")
            if problem:
                say(f"warning: {problem}; going on from {path}")
                if repair:
                    os.replace(path.replace(".prev.pt", ".pt"), path.replace(".prev.pt", ".damaged.pt"))
            return state
        except (RuntimeError, EOFError, OSError, ValueError, KeyError) as e:
            problem = f"{path} is damaged ({type(e).__name__})"
        except Exception as e:  # UnpicklingError: something else than tensors and plain types
            plain = "Weights only" not in str(e)
            problem = f"{path} is damaged ({type(e).__name__})" if plain else f"{path} is not a plain checkpoint"
    fail(problem or f"no checkpoint in {run}")


def new_run_dir(args):  # shared
    """Create runs/{env_id}__{exp_name}__{seed}__{time}, with a suffix if that exists already."""
    task = getattr(args, "env_id", None) or getattr(args, "dataset", "data")
    task = re.sub(r"[^A-Za-z0-9._-]", "-", task)
    base = os.path.join("runs", f"{task}__{args.exp_name}__{args.seed}__{int(time.time())}")
    for suffix in ["", *(f"-{i}" for i in range(1, 100))]:
        try:
            os.makedirs(base + suffix)
            os.mkdir(os.path.join(base + suffix, "videos"))
            break
        except FileExistsError as e:
            if not os.path.isdir(base + suffix):
                fail(f"cannot write runs: {e}")
        except OSError as e:
            fail(f"cannot write runs: {e}")
    return base + suffix


def write_run_info(run, args, script, device):  # shared
    """args.json (flags, command, commit, versions, hardware) and a copy of the script: enough to repeat the run."""
    git = ["git", "-C", os.path.dirname(os.path.abspath(script)), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            cpu = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), platform.machine())
    except (OSError, subprocess.TimeoutExpired):
        commit, cpu = "", platform.machine()
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{cpu}, {torch.get_num_threads()} threads"
    info = dict(script=os.path.basename(script)[:-3], command=sys.argv, commit=commit or "unknown", hardware=hardware)
    info["versions"] = {m.__name__: m.__version__ for m in (torch, gym, np)} | {"python": platform.python_version()}
    write_json(info | {"args": asdict(args) | {"resume": None}}, os.path.join(run, "args.json"))
    copy = os.path.join(run, os.path.basename(script))
    if not os.path.exists(copy):
        try:
            shutil.copy(script, copy)
        except OSError as e:
            raise SystemExit(f"could not write {copy} ({type(e).__name__}: {e})") from None


def lock_run(run):  # shared
    """Hold the run directory as long as this process lives; exit code 2 if another process holds it."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    try:
        handle = open(os.path.join(run, "lock"), "a+")
    except OSError as e:
        fail(f"cannot write {run}: {e}")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.seek(0)
        fail(f"{run} is being written by process {handle.read().strip()}")
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    return handle


def save_gif(frames, path, fps=10):  # shared
    """Frames [(H, W, 3) uint8, ...] -> GIF file."""
    pictures = [Image.fromarray(f).quantize(128, dither=Image.Dither.NONE) for f in frames]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=1000 // fps, loop=0)


class StopSignal:  # shared
    """Remembers the first stop signal so that the main loop can save and leave; a second one kills at once."""

    def __init__(self):
        self.signum = 0
        for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):
            number = getattr(signal, name, None)
            if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):  # nohup stays nohup
                signal.signal(number, self)

    def __call__(self, signum, frame):
        self.signum = signum
        signal.signal(signum, signal.SIG_DFL)


class SeededReset(gym.Wrapper):  # shared
    """Episode k starts from a seed made of (key, k): the same in every run, also after --resume."""

    def __init__(self, env, key):
        super().__init__(env)
        self.key, self.episode = key, 0

    def reset(self, *, seed=None, options=None):
        seed = int(np.random.SeedSequence((*self.key, self.episode)).generate_state(1)[0])
        self.episode += 1
        return self.env.reset(seed=seed, options=options)


class EnvFault(Exception):  # shared
    """An environment raised an exception or returned bad numbers."""


class CheckedEnv(gym.Wrapper):  # shared
    """Says which environment failed, at which of its steps, and what came."""

    def __init__(self, env, index):
        super().__init__(env)
        self.index, self.count = index, 0

    def checked(self, function, **inputs):
        try:
            obs, *rest = function(**inputs)
        except Exception as e:
            raise EnvFault(f"environment {self.index} failed at step {self.count}: {type(e).__name__}: {e}") from e
        parts = {f"observation {k!r}": v for k, v in obs.items()} if isinstance(obs, dict) else {"observation": obs}
        for what, value in (parts | ({"reward": rest[0]} if len(rest) > 1 else {})).items():
            value = np.asarray(value)
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                bad = value[~np.isfinite(value)].flat[0]
                raise EnvFault(f"environment {self.index} returned {what} {bad} at step {self.count}")
        return obs, *rest

    def reset(self, *, seed=None, options=None):
        return self.checked(self.env.reset, seed=seed, options=options)

    def step(self, action):
        self.count += 1
        return self.checked(self.env.step, action=action)


class Logger:  # shared
    """TensorBoard, the console and an optional tracker. If the disk is full it warns once and training goes on."""

    def __init__(self, run, args, purge_step=None):
        from torch.utils.tensorboard import SummaryWriter

        # [optional: track
        if args.track == "wandb":
            import wandb

            options = dict(project=args.wandb_project_name, entity=args.wandb_entity, sync_tensorboard=True)
            name = os.path.basename(run)
            wandb.init(**options, config=vars(args), name=name, id=name, resume="allow")
        self.tracker = None
        if args.track == "trackio":
            import trackio

            self.tracker = trackio
            trackio.init(project=args.wandb_project_name, name=os.path.basename(run), config=vars(args), resume="allow")
        # track]
        self.writer = SummaryWriter(run, purge_step=purge_step)
        # A full disk kills the writer's thread; the next call below reports it, in one line.
        hook = threading.excepthook
        threading.excepthook = lambda e: None if isinstance(e.exc_value, OSError) else hook(e)
        if purge_step is None:
            table = "\n".join(f"|{k}|{v}|" for k, v in vars(args).items())
            self.attempt(self.writer.add_text, "hyperparameters", f"|param|value|\n|-|-|\n{table}")

    def attempt(self, function, *args):
        try:
            if self.writer:
                function(*args)
        except OSError as e:
            say(f"warning: could not write the logs ({e}); training goes on without them")
            self.writer = None

    def scalars(self, values, step):
        for tag, value in values.items():
            self.attempt(self.writer and self.writer.add_scalar, tag, value, step)
        # [optional: track
        if self.tracker:
            self.tracker.log({k: float(v) for k, v in values.items()}, step=step)
        # track]

    def video(self, tag, frames, step, path):
        """A GIF in the run directory and, as an image summary, in TensorBoard (add_video needs a fitting moviepy)."""
        try:
            from tensorboard.compat.proto.summary_pb2 import Summary

            save_gif(frames, path)
            (height, width, _), gif = frames[0].shape, open(path, "rb").read()
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
            summary = Summary(value=[Summary.Value(tag=tag, image=image)])
            self.attempt(self.writer and self.writer._get_file_writer().add_summary, summary, step)
        except OSError as e:
            say(f"warning: could not write {path} ({e})")

    def close(self):
        self.attempt(self.writer and self.writer.close)
        # [optional: track
        if self.tracker:
            self.tracker.finish()
        # track]


# ---- Main ------------------------------------------------------------------------------------------------------------

# What --resume may change; everything else would make it another run.
CHANGEABLE = set(
    "exp_name preset cuda compile num_threads track wandb_project_name wandb_entity capture_video save_replay resume "
    "init_from evaluate play target_return total_timesteps eval_episodes eval_temperature log_every replay_cuda "
    "lpips_weights".split()
)


def check_args(args):
    """Everything that can be said before an environment is built."""
    check_ranges(args, RANGES)
    try:
        channels, attention = ints(args.ac_channels), ints(args.tok_attention)
        assert channels and min(channels) > 0 and all(a > 0 for a in attention)
    except (ValueError, AssertionError):
        found = f"got {args.ac_channels!r} and {args.tok_attention!r}"
        fail(f"--ac-channels and --tok-attention must be lists of positive numbers such as '8 16', {found}")
    unit = args.tok_tiles * args.tok_patch * 2 ** (args.tok_levels - 1)
    first = min(args.tokenizer_start, args.world_model_start, args.actor_critic_start)
    epochs = args.extra_epochs - (-args.total_timesteps // args.steps_per_epoch)
    rows = args.num_envs * args.batch_length
    for wrong, message in [
        (args.image_size % unit, f"--image-size must be a multiple of --tok-tiles x --tok-patch x 2^(--tok-levels - 1) "
         f"= {unit}, got {args.image_size}: remainder {args.image_size % unit}"),
        (not args.image_size >> len(channels), f"--ac-channels {args.ac_channels!r}: --image-size {args.image_size} "
         f"cannot be halved {len(channels)} times"),
        (args.tok_channels % args.tok_groups, f"--tok-channels {args.tok_channels} is not a multiple of --tok-groups "
         f"{args.tok_groups}: remainder {args.tok_channels % args.tok_groups}"),
        (args.embed_dim % args.num_heads, f"--embed-dim {args.embed_dim} is not a multiple of --num-heads "
         f"{args.num_heads}: remainder {args.embed_dim % args.num_heads}"),
        (args.batch_length < 2, f"--batch-length must be at least 2, got {args.batch_length}: nothing would follow"),
        (args.gamma >= 1, f"--gamma must be below 1, got {args.gamma}"),
        (args.buffer_size < rows, f"--buffer-size {args.buffer_size} is less than --num-envs x --batch-length = "
         f"{rows}"),
        (epochs <= first, f"--total-timesteps {args.total_timesteps} are {epochs} epochs of --steps-per-epoch "
         f"{args.steps_per_epoch}, --extra-epochs included, and the first update comes after {first}: nothing would be "
         "trained"),
        (re.search(r"[/\\\0]", args.exp_name), f"--exp-name must not contain a slash, got {args.exp_name!r}"),
    ]:  # fmt: skip
        if wrong:
            fail(message)
    try:
        assert isinstance(json.loads(args.env_kwargs), dict)
    except (ValueError, AssertionError):
        fail(f"--env-kwargs must be a JSON object, got {args.env_kwargs!r}")
    for name in ("init_from", "lpips_weights"):
        for path in (getattr(args, name) or "").split(",") if not args.resume else []:
            if path and not os.path.isfile(path):
                fail(f"--{name.replace('_', '-')} {path}: no such file")
    if args.track:
        try:
            __import__(args.track)
        except ImportError:
            fail(f"--track {args.track} needs {args.track}: pip install {args.track}")


def probe_env(args):
    """Build the environment once, to find out now whether it can be used: observation space, action space."""
    family, flag = env_family(args), f"--env-id {args.env_id}"
    try:
        env = make_env(args, 0)()
        env.reset()
    except ModuleNotFoundError as e:
        module, package = PACKAGES.get(family, (None, None))
        known = module and e.name and e.name.split(".")[0] == module
        fail(f"{args.env_id} needs {package}: pip install {package}" if known else f"{flag}: {e}")
    except Exception as e:  # whatever it is, the environment cannot be used: gymnasium's own words, in one line
        cause = e.__cause__ if isinstance(e, EnvFault) and e.__cause__ else e
        fail(f"{flag}: {' '.join(str(cause).split() or [type(cause).__name__])}")
    obs_space, action_space = env.observation_space, env.action_space
    limited = args.max_episode_steps or (env.spec and env.spec.max_episode_steps) or family == "ALE"
    env.close()
    if not isinstance(action_space, gym.spaces.Discrete):
        fail(f"{flag}: tokens of actions need Discrete actions, found {action_space}")
    if len(obs_space) != 1 or len(next(iter(obs_space.values())).shape) != 3:
        found = ", ".join(f"{k!r} {s}" for k, s in obs_space.items())
        fail(f"{flag}: observations must be one image, found {found}; --pixels observes what the environment draws")
    if not limited:
        say(f"warning: {args.env_id} has no time limit; evaluation stops after 27000 steps (set --max-episode-steps)")
    return obs_space, action_space


def evaluate_run(args):
    """--evaluate RUN: returns of fresh episodes of a trained agent. Writes only RUN/eval-*."""
    check_ranges(args, RANGES)
    state = load_checkpoint(args.evaluate, "iris")
    if state["random_return"] is None:
        fail(f"{args.evaluate} was stopped before its first episode: go on with --resume {args.evaluate} first")
    for found, name in zip(probe_env(args), ("observation", "action"), strict=True):
        if space_to(found) != state["spaces"][name]:
            trained = space_from(state["spaces"][name])
            fail(f"--env-id {args.env_id} has the {name} space {found}, {args.evaluate} was trained on {trained}")
    device = choose_device(args)
    seed_everything(args, device)
    model, state = load_agent(args.evaluate, device)
    video = os.path.join(args.evaluate, "eval-episode.gif") if args.capture_video else None
    policy = agent_policy(model, device, args.eval_temperature)
    returns = play_episodes(eval_args(args), policy, args.eval_episodes, 1, video)
    score, std, random_return = float(np.mean(returns)), float(np.std(returns)), state["random_return"]
    result = dict(episodic_return=score, std=std, returns=returns, random_return=random_return)
    result |= dict(global_step=state["global_step"], temperature=args.eval_temperature)
    write_json(result, os.path.join(args.evaluate, f"eval-{state['global_step']}.json"))
    say(f"returns of {len(returns)} episodes: " + " ".join(f"{r:g}" for r in returns))
    finish(args, score, random_return, f" +- {std:.1f}")
    return result


def report(args, model, run, step, obs_space, device, logger):
    """Tokenizer and world model on fresh episodes: errors beside those of trivial predictors, and the video."""
    policy = agent_policy(model, device, args.temperature)
    clips = record(args, policy, obs_space, 8, 32, 1000 + step, model.tokenizer.num_tokens)
    metrics, pictures = open_loop(model, clips, args)
    logger.scalars({f"eval/{k}": v for k, v in metrics.items()}, step)
    path = os.path.join(run, "videos", f"open_loop-{step}.gif")
    logger.video("eval/open_loop", three_rows(*pictures), step, path)


def main(args):  # shared
    """Returns the final metrics; raises SystemExit with the exit codes of the README."""
    try:
        return play(args) if args.play else evaluate_run(args) if args.evaluate else train(args)
    except EnvFault as e:
        traceback.print_exc()
        raise SystemExit(f"{e}; checkpoints are untouched") from None
    except FloatingPointError as e:
        raise SystemExit(f"{e}; ckpt.pt, if there is one, is from before it") from None


def uncompiled(args):  # shared
    """Run what is compiled eagerly inside: other batch sizes and lengths are not worth a compilation each."""
    return torch.compiler.set_stance("force_eager") if args.compile else contextlib.nullcontext()


def train(args):
    """The whole algorithm (Algorithm 1): epochs of collecting, then learning tokenizer, world model and behavior.
    Returns the metrics."""
    # Set up, in an order that finds every mistake of the user's before the first file is made.
    check_args(args)
    state = None
    if args.resume:
        for name, value in load_args(args.resume).items():
            if name not in CHANGEABLE and getattr(args, name, value) != value:
                flag = "--" + name.replace("_", "-")
                fail(f"{flag} is {value} in {args.resume}, got {getattr(args, name)}: a run cannot change it")
        state, result = load_checkpoint(args.resume, "iris"), os.path.join(args.resume, "result.json")
        if state["global_step"] >= args.total_timesteps and os.path.exists(result):
            say(f"nothing to do: step {state['global_step']} of {args.total_timesteps}")
            with open(result, encoding="utf-8") as f:
                return json.load(f)
        lock = lock_run(args.resume)
        state = load_checkpoint(args.resume, "iris", repair=True)  # nobody else writes from here on
    obs_space, action_space = probe_env(args)
    ((image_key, image_space),) = obs_space.items()
    device, N = choose_device(args), args.num_envs
    config = iris_config(args, image_space.shape[2], int(action_space.n))
    K = (args.image_size // args.tok_patch >> (args.tok_levels - 1)) ** 2
    specs = EpisodeReplay.specs(image_space.shape, K)
    capacity = -(-min(args.buffer_size, args.total_timesteps + N) // N)  # rows per environment
    size = N * capacity * EpisodeReplay.row_bytes(specs) / 1e9
    # On the GPU if it fits and leaves a fifth of the memory to the update, else in host memory; a checkpoint copies it.
    cpu = torch.device("cpu")
    store = device if args.replay_cuda and size <= 0.8 * free_memory(device) / 1e9 else cpu
    host, free = size * (args.save_replay + (store == cpu)), free_memory(cpu) / 1e9
    if host > free:
        hint = f"lower --buffer-size, now {args.buffer_size}"
        hint += ", or try --no-save-replay" if args.save_replay else ""
        fail(f"replay needs {host:.1f} GB, {free:.1f} GB free: {hint}")
    torch.manual_seed(args.seed)
    with torch.device(device):
        model = Iris(config).eval()
    if args.init_from and not args.resume:
        load_official(model, args.init_from)
    learner = IrisLearner(model, args, device)

    run = args.resume or new_run_dir(args)
    lock = lock if args.resume else lock_run(run)  # noqa: F841 (held until the process ends)
    seed_everything(args, device)
    write_run_info(run, args, __file__, device)
    logger = Logger(run, args, purge_step=state["progress"] + 1 if state else None)
    stop = StopSignal()
    envs, replay = make_envs(args, N), EpisodeReplay(capacity, N, specs, store, args.seed)
    parts = ", ".join(f"{n} {count_params(getattr(model, n)):,}" for n in learner.PARTS)
    say(f"run: {run}\nparameters: {count_params(model):,} ({parts}); {K} tokens per frame")
    say(f"replay: {N} x {capacity:,} rows, {size:.2f} GB on {store}; {args.steps_per_epoch} agent steps per epoch")
    # epoch: epochs that are complete; collected: agent steps of the current one; idle: complete epochs without steps;
    # due: updates of each part before the next epoch, None while it collects; progress: agent steps, and as many per
    # idle epoch (the time axis of the curves).
    global_step, epoch, collected, idle, due, updates, progress, random_return = 0, 0, 0, 0, None, 0, 0, None
    recent, metrics = deque(maxlen=100), {}  # returns of the last training episodes
    if state:
        learner.load_state_dict(state["learner"])
        if state["replay"]:
            replay.load_state_dict(state["replay"])
        else:
            say("warning: this run was saved without its replay (--no-save-replay): it is collected anew")
            state["due"] = None
        global_step, epoch, collected, idle = (state[k] for k in ("global_step", "epoch", "collected", "idle"))
        due, updates, progress, random_return = (state[k] for k in ("due", "updates", "progress", "random_return"))
        recent.extend(state["recent"])
        for env, episode in zip(envs.envs, state["episodes"], strict=True):
            env.env.episode = episode
        set_rng_state(state["rng"])
        say(f"resumed at step {global_step} of {args.total_timesteps}, update {updates}")

    def save():
        context = None
        if replay.episodes:  # a few stretches of real experience for dreams to start from
            table, rng = replay.table(), replay.rng
            replay.rng = np.random.default_rng(0)
            index, mask = replay.rows(table, 8, max(1, args.batch_length // 4), True)
            replay.rng = rng
            context = {k: replay.gather(k, index).cpu() for k in ("obs", "action")} | {"length": mask.sum(1).cpu()}
        spaces = {"observation": space_to(obs_space), "action": space_to(action_space)}
        plain = dict(script="iris", args=asdict(args), config=config, spaces=spaces, context=context)
        plain |= dict(global_step=global_step, epoch=epoch, collected=collected, idle=idle, due=due, updates=updates)
        plain |= dict(progress=progress, random_return=random_return, recent=list(recent), rng=rng_state())
        plain |= dict(episodes=[e.env.episode for e in envs.envs], learner=learner.state_dict())
        plain |= dict(replay=replay.state_dict() if args.save_replay else None)
        atomic_save(plain, os.path.join(run, "ckpt.pt"))

    def stopped():
        """Leave after a stop signal, when the checkpoint is written."""
        logger.close()
        again = f"python {shlex.quote(sys.argv[0])} --resume {shlex.quote(run)}"
        say(f"stopped by signal {stop.signum} at step {global_step}; to go on: {again}")
        raise SystemExit(128 + stop.signum)

    if random_return is None:
        policy = random_policy(action_space, args.seed)
        returns = play_episodes(eval_args(args), policy, args.eval_episodes, 2, stop=stop)
        random_return = None if stop.signum else float(np.mean(returns))
        say(f"random policy: {np.mean(returns):.2f} +- {np.std(returns):.2f} over {len(returns)} episodes")
    if stop.signum:
        save()
        stopped()
    # [optional: compile
    if args.compile:
        compile_iris(model, learner)
    # compile]

    def fresh():
        """Begin new episodes everywhere, and new games."""
        whole = {"full": True} if args.episodic_life and env_family(args) == "ALE" else None
        return envs.reset(options=whole)[0]

    def warm_up():
        """LSTM state from the last frames of the open episodes, as the networks of this epoch see them."""
        if not args.burn_in or not any(replay.open):
            return model.actor_critic.initial(N, device)
        steps = replay.count[:, None] - args.burn_in + np.arange(args.burn_in)  # (N, burn_in)
        first = [replay.episodes[i - 1][1] if i else n for i, n in zip(replay.open, replay.count, strict=True)]
        mask = torch.as_tensor(steps >= np.array(first)[:, None], device=device)
        index = np.arange(N)[:, None] * replay.capacity + steps % replay.capacity
        frames = replay.gather("obs", torch.as_tensor(index, device=store)).to(device)
        with torch.no_grad():
            seen = model.tokenizer.show(model.tokenizer.encode(to_images(frames.flatten(0, 1))))
            seen = seen.view(N, args.burn_in, *seen.shape[1:])
            return model.actor_critic(seen, model.actor_critic.initial(N, device), mask)[2]

    start = time.time(), global_step, updates
    mark, clock = start, time.process_time if device.type == "cpu" else time.time
    seconds = dict.fromkeys(("collect", "encode", *learner.PARTS), 0.0)
    counts = dict.fromkeys(learner.PARTS, 0)
    obs = fresh()
    while global_step < args.total_timesteps or idle < args.extra_epochs or due is not None:
        # Collect: the policy looks at reconstructions; a life is an episode, a time limit is an ordinary end.
        began, stride = clock(), 0
        if due is None and global_step < args.total_timesteps:
            with uncompiled(args):
                carry = warm_up()
            while collected < args.steps_per_epoch and global_step < args.total_timesteps and not stop.signum:
                frames = torch.as_tensor(obs[image_key], device=device)
                with uncompiled(args):
                    action, carry = model.act(frames, carry, args.temperature)
                actions, stray = action.cpu().numpy(), np.random.random(N) < args.epsilon
                actions = np.where(stray, np.random.randint(action_space.n, size=N), actions)
                before = obs[image_key]
                obs, reward, terminated, truncated, infos = envs.step(actions)
                last = terminated | truncated
                # NOTE: the reward is stored as it is; only the world model's label is its sign.
                replay.add({"obs": before, "action": actions, "reward": reward, "end": last}, last)
                global_step, collected, stride = global_step + N, collected + N, stride + N
                progress += N
                if last.any():
                    keep = torch.as_tensor(~last, device=device).unsqueeze(-1)
                    carry = [s * keep for s in carry]
                    episodes = infos["final_info"]["episode"]
                    for i in np.flatnonzero(last):
                        recent.append(float(episodes["r"][i]))
                        tags = {"charts/episodic_return": recent[-1], "charts/episodic_length": int(episodes["l"][i])}
                        logger.scalars(tags, progress)
        seconds["collect"] += clock() - began
        if stop.signum and due is None:
            replay.cut()
            save()
            stopped()

        # Learn: first the tokenizer, then the world model on its tokens, then the behavior in the world model's dreams.
        if due is None:
            due = schedule(args, epoch + 1)
            if not replay.episodes:  # resumed without a replay after the last agent step
                due = dict.fromkeys(due, 0)
        table = replay.table()
        for part in learner.PARTS:
            if part != "tokenizer" and due[part] and not stop.signum:
                began = clock()
                replay.encode(model.tokenizer, device)  # NOTE: once per epoch, not once per use
                seconds["encode"] += clock() - began
            began = clock()
            while due[part] and not stop.signum:
                if part == "tokenizer":
                    batch = replay.frames(table, args.tokenizer_batch_size)
                    replay.forget_codes()
                elif part == "world_model":
                    batch = replay.segments(table, args.batch_size, args.batch_length)
                else:
                    batch = replay.starts(table, args.ac_batch_size, args.burn_in)
                try:
                    found = learner.update(part, to_torch(batch, device))
                except torch.cuda.OutOfMemoryError:
                    where = f"step {global_step} (batch {args.batch_size} x {args.batch_length})"
                    raise SystemExit(f"out of GPU memory at {where}: lower --batch-size or --batch-length") from None
                due[part], updates, counts[part] = due[part] - 1, updates + 1, counts[part] + 1
                metrics |= found
                if device.type == "cpu":  # on a GPU this would wait for the device: there, when metrics are read
                    learner.check(f"step {global_step}, update {updates}")
            seconds[part] += clock() - began
        if stop.signum:
            learner.check(f"step {global_step}, update {updates}")
            due = due if any(due.values()) else None
            epoch, collected, idle = (epoch + 1, 0, idle + (not collected)) if due is None else (epoch, collected, idle)
            replay.cut()
            save()
            stopped()
        epoch, due = epoch + 1, None
        if not collected:  # an epoch that only learned: it counts as much as others on the curves' time axis
            idle, progress, stride = idle + 1, progress + args.steps_per_epoch, args.steps_per_epoch
        stride, collected = max(stride, collected), 0

        # Log, look at fresh episodes, save. Metrics are read here only: reading waits for the device.
        ending = global_step >= args.total_timesteps and idle >= args.extra_epochs
        if passed(args.log_every, progress, stride) or ending:
            learner.check(f"step {global_step}, update {updates}")
            elapsed, steps, count = (a - b for a, b in zip((time.time(), global_step, updates), mark, strict=True))
            mark = time.time(), global_step, updates
            repeat = args.action_repeat or (4 if env_family(args) == "ALE" else 1)
            tags = {"SPS": steps / max(elapsed, 1e-9), "updates_per_s": count / max(elapsed, 1e-9), "updates": updates}
            tags = {f"charts/{k}": v for k, v in (tags | {"env_frames": global_step * repeat, "epoch": epoch}).items()}
            logger.scalars(tags | {f"losses/{k}": float(v) for k, v in metrics.items()}, progress)
            shown = f"{np.mean(list(recent)[-10:]):.1f}" if recent else "none yet"
            named = {
                "pixel_mse": "pixel_mse",
                "changed_token_accuracy": "changed_tokens",
                "imagined_return": "imagined",
            }
            extra = "".join(f", {v}={float(metrics[k]):.4g}" for k, v in named.items() if k in metrics)
            pace = f"epoch={epoch}, updates={updates}, SPS={tags['charts/SPS']:.0f}"
            say(f"global_step={global_step}, episodic_return={shown}, {pace}{extra}")
        if passed(args.report_every, progress, stride) and not stop.signum:
            with uncompiled(args):
                report(args, model, run, progress, obs_space, device, logger)
        if passed(args.save_every, progress, stride) or ending:
            learner.check(f"step {global_step}, update {updates}")
            # NOTE: unfinished episodes are cut at scheduled checkpoints, interrupted or not: that is what makes a
            # resumed run repeat the unbroken one.
            replay.cut()
            save()
            if stop.signum:
                stopped()
            obs = fresh()
    envs.close()

    # Final evaluation on fresh episodes, and the self-check against --target-return.
    elapsed, steps, count = (a - b for a, b in zip((time.time() + 1e-9, global_step, updates), start, strict=True))
    kind = "CPU seconds" if device.type == "cpu" else "seconds"
    spent = ", ".join(f"{k} {v:.1f}" for k, v in seconds.items())
    each = ", ".join(f"{k} {seconds[k] / max(1, counts[k]):.4f}" for k in learner.PARTS)
    say(f"{elapsed / 60:.1f} minutes, {steps / elapsed:.0f} agent steps/s; {kind}: {spent}; per update: {each}")
    video = os.path.join(run, "videos", "episode.gif") if args.capture_video else None
    policy = agent_policy(model, device, args.eval_temperature)
    with uncompiled(args):
        returns = play_episodes(eval_args(args), policy, args.eval_episodes, 1, video, stop)
    if stop.signum:
        stopped()
    score, std = float(np.mean(returns)), float(np.std(returns))
    logger.scalars({"eval/episodic_return": score, "eval/episodic_return_std": std}, progress)
    logger.close()
    result = dict(episodic_return=score, episodic_return_std=std, returns=returns, random_return=random_return)
    result |= dict(global_step=global_step, updates=updates, minutes=elapsed / 60, run=run)
    result |= dict(peak_memory_gb=peak_memory(device))
    result |= dict(train_return=float(np.mean(list(recent)[-100:])) if recent else None)
    write_json(result, os.path.join(run, "result.json"))
    finish(args, score, random_return)
    return result


if __name__ == "__main__":
    main(parse_args(Args, PRESETS, __doc__.split("\n\n    python")[0]))
