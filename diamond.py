# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch>=2.11,<2.14", "numpy>=2", "tyro>=1", "tensorboard>=2.20", "pillow>=10", "ale-py>=0.11", "minatar>=1.0.15",
#     "gymnasium[box2d,classic-control]>=1.3,<2",
# ]
# ///
"""DIAMOND: Diffusion for World Modeling: Visual Details Matter in Atari.
Alonso, Jelley, Micheli, Kanervisto, Storkey, Pearce, Fleuret. NeurIPS 2024; sections, tables and appendices as in
arXiv:2405.12399v2.

The world is a diffusion model: from the last 4 frames and actions it draws the next frame, pixel by pixel. A second
network predicts reward and end. A recurrent actor-critic learns only from rollouts that these two imagine.

    python diamond.py --env-id ALE/Breakout-v5                      # the paper's Atari 100k run, on a GPU
    python diamond.py --preset cpu                                  # MinAtar Breakout on a laptop, minutes
    python diamond.py --dataset play.npz                            # the world model alone, on recorded frames of yours
    python diamond.py --init-from Breakout.pt                       # start from the authors' weights (their names)
    python diamond.py --resume runs/NAME                            # go on, bit for bit on a CPU

Deviations between paper and authors' code, where this file follows the code: offset noise, two loss terms per denoiser
update, initial sampling noise of variance 1, gradient clipping, quarter-weighted replay, the long first epoch, rewards
and ends that are sampled. Of this file from both, each with its reason (more: docs/diamond.md):
  * A stored episode has one frame more than actions. So the true next frame is known at every transition; the authors'
    reward/end model sees mid-grey there when an episode was truncated or is still going on.
  * `--terminal-targets` lets the denoiser learn the last frame of an episode too (off as in the code; the cpu preset
    has it on: in MinAtar only the last frame shows that the game is lost, and without it dreams hardly ever end).
  * Start segments are drawn, and both LSTMs burnt in, for every update anew; the authors keep 8192 of them and their
    reward/end states for hundreds of updates. If one update needs more than --start-pool, they are used again.
  * No gradient flows through the policy's burn-in; it is a constant of the update.
  * On a GPU convolutions run in bfloat16 (theirs in TF32); noise, coefficients, pixels, LSTMs, losses are float32.

Symbols in shape comments:
  B  batch (replayed segments)         L  frames of context (4)         C  channels of an image or a layer
  N  environments, real or imagined    S  frames of a segment           E  features of an encoder
  H  imagination horizon (images: height and width are h, w)            A  actions
  P  start segments of an update       T  transitions of an episode     K  width of the conditioning vector
Time: row t holds frame t, the action taken AFTER seeing it, and the reward and the end flag that this action LED to,
together with frame t+1. The last frame of an episode has a row of its own, without an action.
"""

import ctypes
import functools
import importlib
import json
import math
import os
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
from typing import Literal, Optional

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


# fmt: off
@dataclass
class Args:
    # Experiment
    env_id: str = "ALE/Breakout-v5"  # any gymnasium id with images (or --pixels), Discrete actions; my_module:MyEnv-v0
    preset: Literal["full", "cpu"] = "full"  # named settings; explicit flags win over them
    total_timesteps: int = 100_000  # agent steps, summed over environments
    seed: int = 1  # seed of everything random: networks, noise, replay, environments
    resume: Optional[str] = None  # run directory to continue
    target_return: Optional[float] = None  # exit with code 1 if the final evaluation stays below this
    init_from: Optional[str] = None  # weights with the authors' names: denoiser.*, rew_end_model.*, actor_critic.*
    dataset: Optional[str] = None  # .npz of benchmarks/record.py: train the world model alone on its frames
    cuda: bool = True  # use the GPU if there is one
    compile: bool = True  # on a GPU: compile the networks, capture each whole update in a CUDA graph
    bf16: bool = True  # convolutions in bfloat16 on a GPU (see above)
    num_threads: Optional[int] = None  # CPU threads (None: torch's own choice)
    exp_name: str = "diamond"  # part of the run directory's name
    torch_deterministic: bool = True  # deterministic kernels
    track: Optional[str] = None  # project of Weights and Biases that gets the curves too (needs wandb)
    log_every: int = 1_000  # agent steps between log lines
    save_every: int = 10_000  # agent steps between checkpoints
    eval_episodes: int = 100  # episodes of the final evaluation and of the random baseline
    # Environment
    num_envs: int = 1  # environments in lockstep
    env_kwargs: str = "{}"  # JSON object passed to gymnasium.make; Atari is not sticky unless it says so
    action_repeat: Optional[int] = None  # environment steps per agent step (None: 4 for Atari, else 1)
    max_episode_steps: Optional[int] = None  # agent steps after which an episode is truncated (None: the environment's)
    pixels: bool = False  # observe rendered images instead of the environment's own observation
    image_size: int = 64  # images are resized to this many pixels per side
    episodic_life: bool = True  # Atari: a lost life ends a training episode, the game goes on
    # World model
    frame_stack: int = 4  # L, frames and actions that the next frame depends on (table 3)
    denoiser_channels: str = "64,64,64,64"  # widths of the U-Net's levels (table 2)
    denoiser_depths: str = "2,2,2,2"  # residual blocks per level on the way down; one more on the way up (table 2)
    denoiser_cond: int = 256  # K, width of its conditioning vector (table 2)
    rew_end_channels: str = "32,32,32,32"  # widths of the reward/end model's levels (table 2)
    rew_end_depths: str = "2,2,2,2"  # residual blocks per level (table 2)
    rew_end_cond: int = 128  # width of its action embedding (table 2)
    rew_end_lstm: int = 512  # units of its LSTM (table 2)
    sigma_data: float = 0.5  # standard deviation that pixels are taken to have (app. C)
    sigma_offset: float = 0.3  # offset noise, per image and channel (code; 0: the paper's comparison with DDPM)
    p_mean: float = -0.4  # mean of the log of the training noise levels (app. C)
    p_std: float = 1.2  # its standard deviation (app. C)
    autoregressive_steps: int = 1  # further denoiser targets per segment, with the own prediction in the context (code)
    terminal_targets: bool = False  # also train the denoiser on the last frame of episodes
    denoising_steps: int = 3  # network passes per imagined frame (table 3)
    sigma_min: float = 0.002  # lowest noise level of the sampler (app. A)
    sigma_max: float = 5.0  # highest noise level of the sampler (app. A)
    rho: float = 7.0  # spacing of the levels between them (app. A)
    heun: bool = False  # second-order sampler (app. A). It ruins frames on the 8-bit grid: see euler_sampler
    churn: float = 0.0  # stochastic sampler: noise added back per step (0: deterministic)
    # Behavior
    actor_channels: str = "32,32,64,64"  # widths of the policy's convolutions, each with 2x2 pooling (table 2)
    actor_lstm: int = 512  # units of the policy's LSTM (table 2)
    imag_envs: int = 32  # N, imagined environments (table 3: batch size)
    imag_horizon: int = 15  # H, imagined steps per update, after which imagined episodes are truncated (table 3)
    start_pool: int = 64  # P, real segments drawn per update to restart imagined episodes from
    gamma: float = 0.985  # discount (table 3)
    return_lambda: float = 0.95  # lambda of the returns (table 3)
    ent_coef: float = 0.001  # entropy weight (table 3)
    vf_coef: float = 1.0  # weight of the value loss
    epsilon: float = 0.01  # probability of a uniform action while collecting (table 3)
    temperature_collect: float = 1.0  # while collecting (Freeway needs a low one, IRIS has 0.01; authors, issue 34)
    # Learning
    buffer_size: int = 200_000  # replay capacity in frames; no more is allocated than the run can fill
    learning_starts: int = 5_100  # agent steps before the first update (code: 5,000, then the 100 of the first epoch)
    learning_starts_max: int = 10_100  # up to this many until 10 of the two rarer reward signs were seen (code)
    collect_steps: int = 100  # agent steps per epoch (table 3)
    final_epochs: int = 50  # epochs without collection at the end (code); with --dataset: epochs after the first
    denoiser_updates: int = 400  # denoiser updates per epoch (table 3)
    rew_end_updates: int = 400  # reward/end updates per epoch (table 3)
    actor_updates: int = 400  # actor-critic updates per epoch (table 3)
    first_denoiser_updates: int = 10_000  # denoiser updates in the first epoch (code)
    first_rew_end_updates: int = 10_000  # reward/end updates in the first epoch (code)
    first_actor_updates: int = 5_000  # actor-critic updates in the first epoch (code)
    batch_size: int = 32  # B, segments per denoiser and per reward/end update (table 3)
    rew_end_length: int = 19  # frames of a reward/end segment, L + H (table 3)
    learning_rate: float = 1e-4  # of denoiser and reward/end model (table 3)
    actor_learning_rate: float = 1e-4  # of the actor-critic (table 3)
    weight_decay: float = 1e-2  # of denoiser and reward/end model; none for the actor-critic (table 3)
    warmup_updates: int = 100  # linear learning-rate warm-up from 0 of each of the three (code)
    max_grad_norm: float = 1.0  # gradient clipping of the denoiser; 100 for the other two (code)


PRESETS = dict(
    full=dict(),  # the paper's Atari 100k run
    # A laptop: MinAtar Breakout drawn as 10x10 RGB, 640 thousand parameters, learning rates for hundreds of updates.
    cpu=dict(
        env_id="MinAtar/Breakout-v1", pixels=True, image_size=10, total_timesteps=4_200, denoiser_channels="32,32",
        denoiser_depths="1,1", denoiser_cond=64, rew_end_channels="16,16", rew_end_depths="1,1", rew_end_cond=32,
        rew_end_lstm=64, terminal_targets=True, denoising_steps=2, actor_channels="16,32", actor_lstm=128, imag_envs=24,
        imag_horizon=10, start_pool=60, ent_coef=0.01, buffer_size=20_000, learning_starts=3_000,
        learning_starts_max=3_000, collect_steps=300, final_epochs=0, first_denoiser_updates=900,
        first_rew_end_updates=400, first_actor_updates=200, denoiser_updates=60, rew_end_updates=30, actor_updates=100,
        rew_end_length=14, learning_rate=1e-3, actor_learning_rate=1e-3, warmup_updates=20, log_every=300,
        save_every=1_500, num_threads=1),
)
# fmt: on
QUARTERS = (0.1, 0.1, 0.1, 0.7)  # share of the draws that go to each quarter of the episodes, newest last (code)


# ---- Maths -----------------------------------------------------------------------------------------------------------


def karras_sigmas(num_steps, sigma_min=0.002, sigma_max=5.0, rho=7.0):
    """Noise levels of the sampler from sigma_max down to sigma_min, then 0 (app. A): (num_steps + 1,)."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    levels = (high + torch.linspace(0, 1, num_steps, dtype=torch.float64) * (low - high)) ** rho
    return torch.cat([levels, levels.new_zeros(1)]).float()


def edm_preconditioning(sigma, sigma_data=0.5, sigma_offset=0.3):
    """c_in, c_out, c_skip, c_noise (sec. 3.1, app. C) of noise levels (B,), each (B,)."""
    # NOTE: all four use the effective level, sqrt(sigma^2 + offset^2). Levels below 0.1 look the same to the network,
    # so a schedule with many more steps wastes them there.
    s2, d2 = sigma**2 + sigma_offset**2, sigma_data**2
    return 1 / (s2 + d2).sqrt(), sigma_data * (s2 / (s2 + d2)).sqrt(), d2 / (s2 + d2), s2.log() / 8


def sample_training_sigma(n, mean=-0.4, std=1.2, sigma_min=0.002, sigma_max=20.0, device=None):
    """Log-normal noise levels for training (app. C): (n,)."""
    return (mean + std * torch.randn(n, device=device)).exp().clamp(sigma_min, sigma_max)


def add_noise(x, sigma, offset=0.3):
    """x (B, C, h, w) with noise of level sigma (B,) on each pixel and of level `offset` on each channel as a whole."""
    # NOTE: offset noise is not in the paper. It makes the network learn the mean of an image, which noise on pixels
    # hardly hides (authors, issue 36).
    common = torch.randn(*x.shape[:2], 1, 1, device=x.device)
    return x + offset * common + sigma.view(-1, 1, 1, 1) * torch.randn_like(x)


def frames_to_float(frames):
    """uint8 -> [-1, 1]."""
    return frames.float().div(255).mul(2).sub(1)


def float_to_frames(x):
    """The inverse, for values on the 8-bit grid: [-1, 1] -> uint8."""
    return (x.clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8)


def quantize(x):
    """Clamp to [-1, 1] and cut to 8 bits."""
    # NOTE: truncates, so frames get half a grey level darker; and in float32 63 of the 256 levels lose one more when
    # they are quantised again. So a frame is quantised once: real ones are kept as uint8, imagined ones as they are.
    return x.clamp(-1, 1).add(1).div(2).mul(255).floor().div(255).mul(2).sub(1)


def euler_sampler(denoise_fn, x0, sigmas, heun=False, churn=0.0):
    """Integrate dx/dsigma = (x - D(x, sigma)) / sigma over the levels (app. A; Karras et al. 2022, alg. 2), down to 0,
    which the last of `sigmas` must be. denoise_fn(x, sigma): D for a number sigma."""
    x, levels = x0, [float(s) for s in sigmas]
    gamma = min(churn / (len(levels) - 1), math.sqrt(2) - 1)
    for sigma, following in zip(levels, levels[1:]):
        hat = sigma * (1 + gamma)
        if gamma > 0:
            x = x + math.sqrt(hat**2 - sigma**2) * torch.randn_like(x)
        denoised = denoise_fn(x, sigma)  # NOTE: at sigma, not at the raised level: the authors' code
        if following == 0:
            return denoised  # x + (x - D) / hat * (0 - hat), without its rounding: the frame stays on the 8-bit grid
        slope = (x - denoised) / hat
        x_next = x + slope * (following - hat)
        if heun:
            # NOTE: useless here. At sigma 0.002 the network takes the noise to be 0.3 (the offset), so D is not x, and
            # this slope enters with a weight of 0.5 * 0.281 / 0.002 = 70.
            slope = (slope + (x_next - denoise_fn(x_next, following)) / following) / 2
            x_next = x + slope * (following - hat)
        x = x_next
    return x


def ada_group_norm(x, scale, shift):
    """Group norm whose scale and shift (B, C) come from the condition: (B, C, h, w) -> (B, C, h, w)."""
    x = F.group_norm(x, max(1, x.shape[1] // 32), eps=1e-5)
    scale, shift = (v.reshape(*v.shape[:2], 1, 1) for v in (scale, shift))
    return torch.addcmul(shift, x, 1 + scale)


def masked_average(x, mask):
    """Mean of x (B, ...) over the samples where mask (B,) is true."""
    weight = mask.float()
    return (x.flatten(1).mean(1) * weight).sum() / weight.sum().clamp(min=1)


def draw_class(logits, generator=None):
    """Sample from categoricals: (..., n) -> (...). One random number each, inverse CDF."""
    cdf = torch.softmax(logits.float(), -1).cumsum(-1)
    u = torch.rand(*logits.shape[:-1], 1, device=logits.device, generator=generator)
    return (cdf[..., :-1] <= u).sum(-1)


def lambda_returns(rew, end, trunc, val_bootstrap, gamma=0.985, lam=0.95):
    """Lambda returns (app. F): all (B, T) -> (B, T). val_bootstrap[t] is the value of the frame that step t led to, the
    true final frame of an imagined episode included."""
    end, trunc = end.float(), trunc.float()
    # NOTE: the value counts after a truncation, not after an end; the recursion is cut at both.
    base = rew.sign() + gamma * (1 - end) * ((1 - trunc) * (1 - lam) + trunc) * val_bootstrap
    flow = gamma * lam * (1 - end) * (1 - trunc)
    following, returns = val_bootstrap[:, -1], []
    for b, f in zip(reversed(base.unbind(1)), reversed(flow.unbind(1)), strict=True):
        following = b + f * following
        returns.append(following)
    return torch.stack(returns[::-1], 1)


def reinforce_loss(logits, act, val, returns, ent_coef=0.001, vf_coef=1.0):
    """REINFORCE with a value baseline (app. F): logits (B, T, A), the rest (B, T) -> loss terms, entropy in nats."""
    assert act.shape == val.shape == returns.shape == logits.shape[:-1], "act, val and returns are (B, T)"
    logp, returns = torch.log_softmax(logits.float(), -1), returns.detach()
    entropy = -(logp.exp() * logp).sum(-1).mean()
    chosen = logp.gather(-1, act.unsqueeze(-1)).squeeze(-1)  # (B, T)
    # NOTE: no advantage normalisation, no target network, and no 1/2 on the squared error.
    policy = (-chosen * (returns - val.detach())).mean()
    value = vf_coef * F.mse_loss(val, returns)
    return {"policy": policy, "value": value, "entropy_bonus": -ent_coef * entropy}, entropy


def warmup_factor(step, warmup=100):
    """Factor on the learning rate of update number `step` (from 0): linear from exactly 0. Number or tensor."""
    share = step / warmup if warmup else step * 0 + 1.0
    return share.clamp(max=1) if torch.is_tensor(share) else min(share, 1.0)


def episode_probabilities(num_episodes, weights=QUARTERS, lengths=None):
    """Probability of each stored episode, oldest first: (num_episodes,). Fewer than 4: in proportion to `lengths`."""
    # NOTE: within a quarter every EPISODE is equally likely, so frames of short episodes are drawn more often.
    if num_episodes < len(weights):
        lengths = np.ones(num_episodes) if lengths is None else np.asarray(lengths, np.float64)
        return lengths / lengths.sum()
    size = num_episodes // len(weights)
    sizes = np.array([size] * (len(weights) - 1) + [num_episodes - size * (len(weights) - 1)])
    return np.repeat(np.asarray(weights) / np.sum(weights) / sizes, sizes)


def segment_rows(rng, lengths, size, right_padding=False):
    """Rows of a random segment of each of n episodes with `lengths` (n,) rows: (n, size), and which of them exist.

    Around a uniform row. Without right padding a segment ends at the episode's end at the latest, so its last row
    always exists; the first ones may lie before the beginning."""
    lengths = np.asarray(lengths)
    row, shift = rng.integers(lengths), rng.integers(size, size=len(lengths))
    start = row - shift if right_padding else np.minimum(lengths, row + 1 + shift) - size
    rows = start[:, None] + np.arange(size)
    return rows, (rows >= 0) & (rows < lengths[:, None])


# ---- Networks --------------------------------------------------------------------------------------------------------
# Attributes have the authors' names, so that their state dicts load (`--init-from`).


def conv(i, o, size=3):
    return nn.Conv2d(i, o, size, padding=size // 2)


class ChannelNorm(nn.Module):
    """Group norm with its own scale and shift, 32 channels per group."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(max(1, channels // 32), channels, eps=1e-5)

    def forward(self, x):
        return self.norm(x)


class AdaNorm(nn.Module):
    """Group norm with scale and shift from the condition (B, K)."""

    def __init__(self, channels, cond):
        super().__init__()
        # NOTE: neither zero-initialised nor behind an activation, unlike in most diffusion models.
        self.linear = nn.Linear(cond, 2 * channels)

    def forward(self, x, cond):
        return ada_group_norm(x, *self.linear(cond).chunk(2, 1))


class Attention2d(nn.Module):
    """Self-attention over the pixels of a feature map, heads of 8 channels."""

    def __init__(self, channels):
        super().__init__()
        self.heads = max(1, channels // 8)
        self.norm, self.qkv_proj = ChannelNorm(channels), conv(channels, 3 * channels, 1)
        self.out_proj = conv(channels, channels, 1)
        nn.init.zeros_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x):  # (B, C, h, w)
        # NOTE: the residual starts from the normalised input, so an untrained layer is a group norm, not the identity.
        x = self.norm(x)
        # As matrix products over tokens, pixels last in memory: for images this small a fused attention kernel
        # and 1x1 convolutions are slower. Channels of qkv: all heads of q, then of k, then of v.
        tokens = x.flatten(2).transpose(1, 2)  # (B, hw, C)
        qkv = F.linear(tokens, self.qkv_proj.weight.flatten(1), self.qkv_proj.bias)  # (B, hw, 3 * C)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, hw, 8)
        weights = torch.softmax(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, -1)  # (B, heads, hw, hw)
        y = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)  # (B, hw, C)
        y = F.linear(y, self.out_proj.weight.flatten(1), self.out_proj.bias)
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


class AdaResBlock(nn.Module):
    """Two convolutions with conditioned norms around a shortcut, then attention if wanted."""

    def __init__(self, i, o, cond, attention=False):
        super().__init__()
        self.proj = conv(i, o, 1) if i != o else nn.Identity()
        self.norm1, self.conv1 = AdaNorm(i, cond), conv(i, o)
        self.norm2, self.conv2 = AdaNorm(o, cond), conv(o, o)
        self.attn = Attention2d(o) if attention else nn.Identity()
        nn.init.zeros_(self.conv2.weight)  # a new block is its shortcut, plus a bias

    def forward(self, x, cond):
        y = self.conv1(F.silu(self.norm1(x, cond)))
        y = self.conv2(F.silu(self.norm2(y, cond)))
        return self.attn(y + self.proj(x))


class AdaResBlocks(nn.Module):
    """Residual blocks in a row; `skips`: a tensor beside the input of each. Gives the outputs of all."""

    def __init__(self, widths_in, widths_out, cond, attention=False):
        super().__init__()
        blocks = [AdaResBlock(i, o, cond, attention) for i, o in zip(widths_in, widths_out, strict=True)]
        self.resblocks = nn.ModuleList(blocks)

    def forward(self, x, cond, skips=None):
        outputs = []
        for k, block in enumerate(self.resblocks):
            x = block(x if skips is None else torch.cat([x, skips[k]], 1), cond)
            outputs.append(x)
        return outputs


class HalvingConv(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        nn.init.orthogonal_(self.conv.weight)

    def forward(self, x):
        return self.conv(x)


class DoublingConv(nn.Module):
    """Nearest-neighbour x2, then a 3x3 convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class FourierFeatures(nn.Module):
    """Fixed random features of a number: (B,) -> (B, K)."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("weight", torch.randn(1, width // 2))

    def forward(self, c):
        angle = 2 * math.pi * c.unsqueeze(1) * self.weight  # NOTE: no matrix product: autocast would round the angle
        return torch.cat([angle.cos(), angle.sin()], -1)


class CondUNet(nn.Module):
    """Levels of residual blocks, each half as large as the one before, and back up with skip connections."""

    def __init__(self, channels, depths, cond):
        super().__init__()
        down, up = [], []
        for k, (c, n) in enumerate(zip(channels, depths, strict=True)):
            before = channels[max(0, k - 1)]
            down.append(AdaResBlocks([before] + [c] * (n - 1), [c] * n, cond))
            # One block more than on the way down: its skip is the level's input.
            up.append(AdaResBlocks([2 * c] * n + [before + c], [c] * n + [before], cond))
        self.d_blocks, self.u_blocks = nn.ModuleList(down), nn.ModuleList(up[::-1])
        self.mid_blocks = AdaResBlocks([channels[-1]] * 2, [channels[-1]] * 2, cond, attention=True)
        self.downsamples = nn.ModuleList([nn.Identity(), *(HalvingConv(c) for c in channels[:-1])])
        self.upsamples = nn.ModuleList([nn.Identity(), *(DoublingConv(c) for c in channels[-2::-1])])

    def forward(self, x, cond):  # (B, C, h, w), (B, K) -> (B, C, h, w)
        (h, w), unit = x.shape[2:], 2 ** (len(self.d_blocks) - 1)
        if h % unit or w % unit:
            x = F.pad(x, (0, -w % unit, 0, -h % unit))
        skips = []
        for blocks, halve in zip(self.d_blocks, self.downsamples):
            x = halve(x)
            outputs = blocks(x, cond)
            skips.append([x, *outputs])
            x = outputs[-1]
        x = self.mid_blocks(x, cond)[-1]
        for blocks, double, skip in zip(self.u_blocks, self.upsamples, reversed(skips)):
            x = blocks(double(x), cond, skip[::-1])[-1]
        return x[..., :h, :w]


class DenoiserNet(nn.Module):
    """The network F of sec. 3.1: scaled noisy frame, noise level, past frames and actions -> (B, C, h, w)."""

    def __init__(self, image_channels, actions, frames, channels, depths, cond):
        super().__init__()
        self.noise_emb = FourierFeatures(cond)
        self.act_emb = nn.Sequential(nn.Embedding(actions, cond // frames), nn.Flatten())  # oldest action first
        self.cond_proj = nn.Sequential(nn.Linear(cond, cond), nn.SiLU(), nn.Linear(cond, cond))
        self.conv_in = conv((frames + 1) * image_channels, channels[0])
        self.unet = CondUNet(channels, depths, cond)
        self.norm_out, self.conv_out = ChannelNorm(channels[0]), conv(channels[0], image_channels)
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, noisy, c_noise, past, actions):
        """noisy (B, C, h, w), c_noise (B,) or (1,), past (B, L*C, h, w), actions (B, L)."""
        with torch.autocast(noisy.device.type, enabled=False):
            cond = self.cond_proj(self.noise_emb(c_noise) + self.act_emb(actions))  # (B, K)
        x = self.unet(self.conv_in(torch.cat([past, noisy], 1)), cond)
        return self.conv_out(F.silu(self.norm_out(x)))


class Denoiser(nn.Module):
    """D of sec. 3.1: an estimate of the next frame from a noisy version of it, past frames and past actions."""

    def __init__(self, network, sigma_data=0.5, sigma_offset=0.3):
        super().__init__()
        self.inner_model, self.sigma_data, self.sigma_offset = network, sigma_data, sigma_offset

    def forward(self, noisy, sigma, past, actions):
        """noisy (B, C, h, w), sigma (B,) or (1,), past (B, L, C, h, w), actions (B, L): network output F and the
        coefficients c_skip and c_out that make D of it, (B, 1, 1, 1)."""
        c_in, c_out, c_skip, c_noise = edm_preconditioning(sigma, self.sigma_data, self.sigma_offset)
        c_in, c_out, c_skip = (c.view(-1, 1, 1, 1) for c in (c_in, c_out, c_skip))
        # NOTE: the newest action must be in `actions` already: it is the one that leads to this frame.
        output = self.inner_model(c_in * noisy, c_noise, past.flatten(1, 2) / self.sigma_data, actions)
        # NOTE: float32 from here on; bfloat16 near 1 is as coarse as a grey level.
        return output.float(), c_skip, c_out

    @torch.no_grad()
    def denoise(self, noisy, sigma, past, actions):
        """D for one number sigma, as a frame of 8 bits."""
        # NOTE: quantised inside the sampler too, not only at its end.
        output, c_skip, c_out = self(noisy, torch.full((1,), sigma, device=noisy.device), past, actions)
        return quantize(c_skip * noisy + c_out * output)


@torch.no_grad()
def imagine_frame(denoiser, past, actions, sampler, generator=None):
    """The next frame (N, C, h, w) after past (N, L, C, h, w) and actions (N, L). `sampler`: see `sampler_settings`."""
    N, _, *shape = past.shape
    # NOTE: noise of variance 1, although sampling begins at sigma_max = 5. Deliberate: the first steps then lean on the
    # context, and dreams drift less (authors, issue 40).
    x = torch.randn(N, *shape, device=past.device, generator=generator)
    denoise = lambda x, sigma: denoiser.denoise(x, sigma, past, actions)  # noqa: E731
    return euler_sampler(denoise, x, sampler["sigmas"], sampler["heun"], sampler["churn"])


def sampler_settings(args):
    """What `imagine_frame` needs, as plain numbers."""
    sigmas = karras_sigmas(args.denoising_steps, args.sigma_min, args.sigma_max, args.rho).tolist()
    return dict(sigmas=sigmas, heun=args.heun, churn=args.churn)


def init_lstm_(lstm):
    """Xavier input weights, orthogonal recurrent ones, biases 0 except 1 for the forget gate."""
    for name, p in lstm.named_parameters():
        if "weight_ih" in name:
            nn.init.xavier_uniform_(p)
        elif "weight_hh" in name:
            nn.init.orthogonal_(p)
        else:
            nn.init.zeros_(p)
            if "bias_ih" in name:  # gates: input, forget, cell, output
                p.data[lstm.hidden_size : 2 * lstm.hidden_size] = 1


class TransitionEncoder(nn.Module):
    """Convolutions over a pair of frames, conditioned on the action between them."""

    def __init__(self, i, channels, depths, cond):
        super().__init__()
        self.conv_in = conv(i, channels[0])
        stages = [
            AdaResBlocks([channels[max(0, k - 1)]] + [c] * (n - 1), [c] * n, cond)
            for k, (c, n) in enumerate(zip(channels, depths, strict=True))
        ]
        stages.append(AdaResBlocks([channels[-1]] * 2, [channels[-1]] * 2, cond, attention=True))
        self.blocks = nn.ModuleList(stages)
        halve = [HalvingConv(c) for c in channels[:-1]]
        self.downsamples = nn.ModuleList([nn.Identity(), *halve, nn.Identity()])

    def forward(self, x, cond):
        x = self.conv_in(x)
        for blocks, halve in zip(self.blocks, self.downsamples):
            x = blocks(halve(x), cond)[-1]
        return x


class RewardEndModel(nn.Module):
    """Reward sign and end of each transition, with an LSTM over them."""

    def __init__(self, image, actions, channels, depths, cond, units):
        super().__init__()
        height, width, image_channels = image
        self.encoder = TransitionEncoder(2 * image_channels, channels, depths, cond)
        self.act_emb = nn.Embedding(actions, cond)
        area = math.prod(-(-n // 2 ** (len(channels) - 1)) for n in (height, width))
        self.lstm = nn.LSTM(channels[-1] * area, units, batch_first=True)
        self.head = nn.Sequential(nn.Linear(units, units), nn.SiLU(), nn.Linear(units, 3 + 2, bias=False))
        init_lstm_(self.lstm)

    def forward(self, frames, actions, next_frames, state=None):
        """frames, next_frames (B, T, C, h, w), actions (B, T), state (h, c), each (1, B, units): logits of the rewards
        -1, 0, 1 (B, T, 3), of going on and ending (B, T, 2), next state."""
        (B, T), x = actions.shape, torch.cat([frames, next_frames], 2).flatten(0, 1)
        x = self.encoder(x.contiguous(memory_format=torch.channels_last), self.act_emb(actions.flatten()))
        with torch.autocast(x.device.type, enabled=False):
            x, state = self.lstm(x.float().flatten(1).view(B, T, -1), state)
            logits = self.head(x)
        return logits[..., :3], logits[..., 3:], state


class SmallResBlock(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.f = nn.Sequential(ChannelNorm(i), nn.SiLU(), conv(i, o))
        self.skip_projection = conv(i, o, 1) if i != o else nn.Identity()

    def forward(self, x):
        return self.skip_projection(x) + self.f(x)


class PoolingEncoder(nn.Module):
    def __init__(self, i, channels):
        super().__init__()
        layers = [conv(i, channels[0])]
        for before, c in zip([channels[0], *channels], channels):
            layers += [SmallResBlock(before, c), nn.MaxPool2d(2)]
        self.encoder = nn.Sequential(*layers)

    def forward(self, x):
        return self.encoder(x)


class RecurrentActorCritic(nn.Module):
    """Convolutions and an LSTM that sees one frame at a time; policy logits and value."""

    def __init__(self, image, actions, channels, units):
        super().__init__()
        height, width, image_channels = image
        self.encoder, self.units = PoolingEncoder(image_channels, channels), units
        area = (height >> len(channels)) * (width >> len(channels))
        self.lstm = nn.LSTMCell(channels[-1] * area, units)
        self.critic_linear, self.actor_linear = nn.Linear(units, 1), nn.Linear(units, actions)
        init_lstm_(self.lstm)
        for head in (self.critic_linear, self.actor_linear):  # a uniform policy, values of 0
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def encode(self, x):
        """The LSTM's gates as far as frames alone decide them, all frames at once: (n, C, h, w) -> (n, 4*units)"""
        x = self.encoder(x.contiguous(memory_format=torch.channels_last)).float().flatten(1)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, self.lstm.weight_ih, self.lstm.bias_ih)

    def cell(self, gates, h, c):
        """The rest of the LSTM's step: gates (N, 4*units) from `encode`, state -> next state."""
        i, f, g, o = (gates + F.linear(h, self.lstm.weight_hh, self.lstm.bias_hh)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def heads(self, h):
        """Policy logits (..., A) and values (...)."""
        return self.actor_linear(h), self.critic_linear(h).squeeze(-1)

    def forward(self, frame, h, c):
        """One step: frame (N, C, h, w), state -> logits (N, A), value (N,), next state."""
        gates = self.encode(frame)
        with torch.autocast(frame.device.type, enabled=False):
            h, c = self.cell(gates, h, c)
            return *self.heads(h), h, c

    def unroll(self, frames, h, c, reset, h_reset, c_reset):
        """T steps: frames (T, N, C, h, w); where reset (T, N) the state before step t is h_reset[t], c_reset[t]. Logits
        (T, N, A), values (T, N)."""
        gates, out = self.encode(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]), []
        with torch.autocast(gates.device.type, enabled=False):
            for again, gate, h_new, c_new in zip(reset.unsqueeze(-1).unbind(), gates.unbind(), h_reset, c_reset):
                h, c = self.cell(gate, torch.where(again, h_new, h), torch.where(again, c_new, c))
                out.append(h)
            return self.heads(torch.stack(out))


class Diamond(nn.Module):
    """The three networks. `image`: (h, w, C); config: a dict with the flags of the networks."""

    def __init__(self, image, actions, config):
        super().__init__()
        c, self.image, self.actions, self.frames = config, tuple(image), actions, config["frame_stack"]
        sizes = {k: [int(n) for n in v.split(",")] for k, v in c.items() if k.endswith(("_channels", "_depths"))}
        widths, depths = sizes["denoiser_channels"], sizes["denoiser_depths"]
        network = DenoiserNet(image[2], actions, self.frames, widths, depths, c["denoiser_cond"])
        self.denoiser = Denoiser(network, c["sigma_data"], c["sigma_offset"])
        widths, depths = sizes["rew_end_channels"], sizes["rew_end_depths"]
        self.rew_end_model = RewardEndModel(image, actions, widths, depths, c["rew_end_cond"], c["rew_end_lstm"])
        self.actor_critic = RecurrentActorCritic(image, actions, sizes["actor_channels"], c["actor_lstm"])


def count_params(model):
    """Trained parameters of a module."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def load_authors_weights(model, path):
    """Load a state dict of the authors into a Diamond; exit code 2 if it does not fit."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {k: v for k, v in state.items() if k.split(".")[0] in ("denoiser", "rew_end_model", "actor_critic")}
        model.load_state_dict(state)
    except Exception as e:  # not a file, not a state dict, other sizes: whatever it is, in one line
        words = " ".join(str(e).split()) or type(e).__name__
        fail(f"--init-from {path}: {words if len(words) < 400 else words[:400] + ' ...'}")


# ---- Losses ----------------------------------------------------------------------------------------------------------


def segment_frames(batch):
    """Frames of a batch as the networks see them: uint8 (B, S, h, w, C), mask (B, S) -> (B, S, C, h, w) in [-1, 1]."""
    x = frames_to_float(batch["frames"]) * batch["mask"].view(*batch["mask"].shape, 1, 1, 1)  # padding is 0, mid-grey
    return x.permute(0, 1, 4, 2, 3)


def denoiser_loss(model, batch, args):
    """Sec. 3.1 on segments of L + 1 + autoregressive_steps frames. Returns ({name: loss}, metrics)."""
    frames, actions, mask, L = segment_frames(batch), batch["actions"], batch["mask"], model.frames
    terms = []
    for t in range(L, frames.shape[1]):
        past, target = frames[:, t - L : t], frames[:, t]
        sigma = sample_training_sigma(len(target), args.p_mean, args.p_std, device=target.device)  # (B,)
        noisy = add_noise(target, sigma, args.sigma_offset)
        output, c_skip, c_out = model.denoiser(noisy, sigma, past, actions[:, t - L : t])
        # The error of F, not of D: this IS the weighted loss of EDM, with unit weights for all noise levels.
        error = (output - (target - c_skip * noisy) / c_out) ** 2
        terms.append(masked_average(error, mask[:, t]))  # NOTE: padded frames are context, never targets
        # NOTE: "1 autoregressive step" means two terms in every update. The second has the model's own estimate of the
        # first target, from one pass at a random noise level, as its newest frame; no gradient flows through it.
        own = quantize((c_skip * noisy + c_out * output).detach())
        frames = torch.cat([frames[:, :t], own.unsqueeze(1), frames[:, t + 1 :]], 1)
    return {"denoiser": sum(terms) / len(terms)}, {}


def rew_end_loss(model, batch):
    """Reward classes and ends (sec. 3.2) on segments of S frames, S - 1 transitions; the LSTM starts from zero."""
    frames, mask = segment_frames(batch), batch["transition"].flatten()  # (B, S, C, h, w), (B * (S - 1),)
    rewards, ends, _ = model.rew_end_model(frames[:, :-1], batch["actions"][:, :-1], frames[:, 1:])
    rewards, ends = rewards.flatten(0, 1), ends.flatten(0, 1)
    # NOTE: the reward's sign is a class, without weights: where rewards are rare, look at recall, not at the loss.
    true_reward, true_end = batch["rewards"][:, :-1].flatten().sign().long() + 1, batch["ends"][:, :-1].flatten().long()
    losses = {
        "reward": masked_average(F.cross_entropy(rewards, true_reward, reduction="none").unsqueeze(1), mask),
        "end": masked_average(F.cross_entropy(ends, true_end, reduction="none").unsqueeze(1), mask),
    }
    with torch.no_grad():
        metrics = hits("reward", rewards.argmax(-1), true_reward, 1, mask) | hits(
            "end", ends.argmax(-1), true_end, 0, mask
        )
    return losses, metrics


def hits(name, found, truth, usual, mask):
    """Precision and recall of everything but the usual class, as tensors."""
    right = ((found == truth) & (truth != usual) & mask).sum()
    claimed, there = ((x != usual).logical_and(mask).sum() for x in (found, truth))
    return {f"{name}_precision": right / claimed.clamp(min=1), f"{name}_recall": right / there.clamp(min=1)}


def rollout_loss(model, rollout, args):
    """Sec. 3.3, app. F on an imagined rollout {name: (H, N, ...)}. Returns ({name: loss}, metrics)."""
    r = rollout
    # One pass over all frames with gradient, from the states of the rollout: the same gradient as a pass per step.
    inputs = (r["frame"], r["h"][0], r["c"][0], r["reset"], r["h"], r["c"])
    logits, value = model.actor_critic.unroll(*inputs)  # (H, N, A), (H, N)
    names = ("reward", "end", "trunc", "bootstrap")
    returns = lambda_returns(*(r[k].T for k in names), args.gamma, args.return_lambda)  # (N, H)
    terms = (logits.transpose(0, 1), r["action"].T, value.T, returns, args.ent_coef, args.vf_coef)
    losses, entropy = reinforce_loss(*terms)
    metrics = {"entropy": entropy, "value_mean": value.mean(), "imagined_return": returns.mean()}
    metrics |= {"imagined_reward": r["reward"].mean(), "imagined_end": r["end"].float().mean()}
    return losses, metrics


# ---- Imagination -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def burn_in_starts(model, batch):
    """Start segments {frames (P, L, h, w, C), ...} -> where imagination begins: frames, actions, the state of the
    reward/end model after the segment's transitions, of the policy before its last frame and after it."""
    frames, actions, policy = segment_frames(batch), batch["actions"], model.actor_critic
    P, L = actions.shape
    *_, (wm_h, wm_c) = model.rew_end_model(frames[:, :-1], actions[:, :-1], frames[:, 1:])
    h = c = torch.zeros(P, policy.units, device=frames.device)
    if L > 1:
        for gates in policy.encode(frames[:, :-1].flatten(0, 1)).unflatten(0, (P, L - 1)).unbind(1):
            h, c = policy.cell(gates, h, c)
    logits, _, h_after, c_after = policy(frames[:, -1], h, c)
    start = dict(frames=frames, actions=actions, wm_h=wm_h[0], wm_c=wm_c[0], h=h, c=c)
    return start, dict(logits=logits, h=h_after, c=c_after)


def where_rows(mask, new, old):
    """{name: (N, ...)}: rows of `new` where mask (N,) is true, else of `old`."""
    return {k: torch.where(mask.view(-1, *[1] * (v.dim() - 1)), new[k], v) for k, v in old.items()}


@torch.no_grad()
def imagine_rollout(model, state, batch, args):
    """H steps of the policy in N imagined environments from `state` (see `burn_in_starts`; and lengths so far). Dead
    ones go on from the start segments of `batch`. Returns the rollout {name: (H, N, ...)} and the next state.

    Without branches: every step computes what a restart would be and torch.where decides, so that all of it is one CUDA
    graph."""
    policy, sampler, P = model.actor_critic, sampler_settings(args), len(batch["actions"])
    pool, pool_after = burn_in_starts(model, batch)
    lengths, now = state["lengths"], {k: v for k, v in state.items() if k != "lengths"}
    logits, _, h, c = policy(now["frames"][:, -1], now["h"], now["c"])
    after, rows = dict(logits=logits, h=h, c=c), []
    dead, used = torch.zeros_like(lengths, dtype=torch.bool), torch.zeros_like(lengths[0])
    for _ in range(args.imag_horizon):
        row = dict(frame=now["frames"][:, -1], h=now["h"], c=now["c"], reset=dead)
        action = draw_class(after["logits"])  # (N,)
        # NOTE: the action goes into the buffer before its frame is drawn.
        actions = torch.cat([now["actions"][:, :-1], action.unsqueeze(1)], 1)  # (N, L)
        frame = imagine_frame(model.denoiser, now["frames"], actions, sampler).unsqueeze(1)  # (N, 1, C, h, w)
        wm = now["wm_h"].unsqueeze(0), now["wm_c"].unsqueeze(0)
        rewards, ends, (wm_h, wm_c) = model.rew_end_model(now["frames"][:, -1:], action.unsqueeze(1), frame, wm)
        # NOTE: sampled, not the most likely class.
        reward, end = draw_class(rewards[:, 0]) - 1.0, draw_class(ends[:, 0]).bool()
        lengths = lengths + 1
        trunc = lengths >= args.imag_horizon
        dead = end | trunc
        # NOTE: the order at a restart matters: first the value of the true imagined frame from the old LSTM state, then
        # the new state, burnt in on the older frames of the new segment, then its last frame.
        logits, value, h, c = policy(frame[:, 0], after["h"], after["c"])
        rows.append(row | dict(action=action, reward=reward, end=end, trunc=trunc, bootstrap=value))
        pick = (used + dead.cumsum(0) - 1) % P  # the next unused segments, in order of the environments
        used = used + dead.sum()
        frames, actions = torch.cat([now["frames"][:, 1:], frame], 1), torch.cat([actions[:, 1:], actions[:, :1]], 1)
        going = dict(frames=frames, actions=actions, wm_h=wm_h[0], wm_c=wm_c[0], h=after["h"], c=after["c"])
        now = where_rows(dead, {k: v[pick] for k, v in pool.items()}, going)
        after = where_rows(dead, {k: v[pick] for k, v in pool_after.items()}, dict(logits=logits, h=h, c=c))
        lengths = torch.where(dead, 0, lengths)
    return {k: torch.stack([r[k] for r in rows]) for k in rows[0]}, now | {"lengths": lengths}


class WarmAdamW:
    """AdamW with gradient clipping and warm-up."""

    def __init__(self, model, lr, weight_decay, clip, warmup, device):
        self.lr, self.clip, self.warmup, self.params = lr, clip, warmup, list(model.parameters())
        # NOTE: no decay of biases, norms and embeddings.
        embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        decayed = [p for p in self.params if p.dim() > 1 and id(p) not in embeddings]
        rest = [p for p in self.params if p.dim() <= 1 or id(p) in embeddings]
        groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]
        self.rate, self.count = torch.zeros((), device=device), torch.zeros((), device=device)
        self.options = dict(lr=self.rate, capturable=device.type == "cuda")
        self.opt = torch.optim.AdamW(groups, eps=1e-8, fused=True, **self.options)

    def step(self, loss, bad):
        """One step, and none any more once a gradient is not finite: `bad` (0-dim bool). -> norm of gradients."""
        self.opt.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.params, self.clip)
        bad |= ~torch.isfinite(norm)
        self.rate.copy_(self.lr * warmup_factor(self.count, self.warmup))
        self.opt.found_inf = bad.float()  # decided on the device, nothing waits for it
        self.opt.step()
        self.count += 1
        return norm

    def state_dict(self):
        return {"opt": self.opt.state_dict(), "count": self.count}

    def load_state_dict(self, state):
        self.opt.load_state_dict(state["opt"])
        for group in self.opt.param_groups:  # the run may have begun on another kind of device
            group |= self.options
        self.count.copy_(state["count"])


class Learner:
    """The networks, an optimizer for each, the imagined environments, and one update of each kind."""

    def __init__(self, model, args, device):
        self.model, self.args, self.device, self.params = model, args, device, list(model.parameters())
        world = dict(lr=args.learning_rate, weight_decay=args.weight_decay, warmup=args.warmup_updates, device=device)
        actor = world | dict(lr=args.actor_learning_rate, weight_decay=0.0)
        self.opts = {
            "denoiser": WarmAdamW(model.denoiser, clip=args.max_grad_norm, **world),
            "rew_end": WarmAdamW(model.rew_end_model, clip=100.0, **world),
            "actor": WarmAdamW(model.actor_critic, clip=100.0, **actor),
        }
        self.autocast = partial(
            torch.autocast, device.type, torch.bfloat16, enabled=args.bf16 and device.type == "cuda"
        )
        self.bad = torch.zeros((), dtype=torch.bool, device=device)  # whether something was not finite, from then on
        self.dream = None  # state of the imagined environments; they live on from update to update

    def begin(self, batch):
        """The very first start of the imagined environments, from N segments."""
        with self.autocast():
            start, _ = burn_in_starts(self.model, batch)
        # NOTE: here, and only here, the policy's state is zero, not burnt in.
        start["h"], start["c"] = torch.zeros_like(start["h"]), torch.zeros_like(start["c"])
        start["lengths"] = torch.zeros(len(start["h"]), dtype=torch.int64, device=self.device)
        self.dream = {k: v.clone(memory_format=torch.contiguous_format) for k, v in start.items()}

    def update(self, kind, batch):
        """One optimizer step of one network; of the actor on start segments. Returns metrics as tensors on the
        device."""
        with self.autocast():
            if kind == "actor":
                rollout, state = imagine_rollout(self.model, self.dream, batch, self.args)
                for k, v in self.dream.items():
                    v.copy_(state[k])
                torch.clear_autocast_cache()  # NOTE: bfloat16 copies of weights made above carry no gradients
                losses, metrics = rollout_loss(self.model, rollout, self.args)
            elif kind == "denoiser":
                losses, metrics = denoiser_loss(self.model, batch, self.args)
            else:
                losses, metrics = rew_end_loss(self.model, batch)
        norm = self.opts[kind].step(sum(v.float() for v in losses.values()), self.bad)
        metrics = {k: v.detach() for k, v in (losses | metrics).items()} | {f"grad_norm_{kind}": norm}
        return metrics | {f"learning_rate_{kind}": self.opts[kind].rate.clone()}

    def check(self, metrics, where):
        """Ends the run naming what was not finite, if something was. Waits for the device."""
        if self.bad:
            names = ", ".join(k for k, v in metrics.items() if not math.isfinite(v))
            names = names.replace("grad_norm", "gradient norm")
            raise SystemExit(f"not finite at {where}: {names}; no step was taken, ckpt.pt is from before it")

    def state_dict(self):
        opts = {k: v.state_dict() for k, v in self.opts.items()}
        return {"model": self.model.state_dict(), "opts": opts, "dream": self.dream}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        for k, v in self.opts.items():
            v.load_state_dict(state["opts"][k])
        self.dream = state["dream"] and {k: v.clone().to(self.device) for k, v in state["dream"].items()}


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
    """Compile the convolutional networks; capture each kind of update, imagination included, in a CUDA graph."""
    print("compiling: the first steps take a minute or more (--no-compile starts at once)", flush=True)
    for network in (model.denoiser.inner_model, model.rew_end_model.encoder, model.actor_critic.encoder):
        network.compile(dynamic=False)  # in place: parameter names in checkpoints stay as they are
    graphs = {kind: Graphed(partial(learner.update, kind)) for kind in learner.opts}
    learner.update = lambda kind, batch: graphs[kind](batch)


# ---- Replay ----------------------------------------------------------------------------------------------------------


class FrameReplay:
    """A ring of rows per environment on `device`, and the list of episodes in them, oldest first. An episode of T
    transitions has T + 1 rows; one that is still going on is in the list too. The oldest rows make room."""

    def __init__(self, capacity, num_envs, image, device="cpu", seed=0):
        """capacity: rows per environment; image: (h, w, C)."""
        self.capacity, self.device, rows = capacity, torch.device(device), (num_envs, capacity)
        kinds = dict(actions=torch.int32, rewards=torch.float32, ends=torch.bool)
        self.data = {k: torch.zeros(rows, dtype=d, device=device) for k, d in kinds.items()}
        self.data["frames"] = torch.zeros(*rows, *image, dtype=torch.uint8, device=device)
        self.count = np.zeros(num_envs, np.int64)  # rows ever begun, per environment
        self.episodes, self.open = [], {}  # [environment, first row, T]; {environment: its last episode if going on}
        self.table = None  # environments, first rows, T, cumulated probabilities of the episodes that can be drawn
        self.rng = np.random.default_rng(seed)

    def write(self, envs, rows, **values):
        index = torch.as_tensor(envs * self.capacity + rows % self.capacity, device=self.device)
        for name, value in values.items():
            data = self.data[name]
            data.flatten(0, 1)[index] = torch.as_tensor(value, device=self.device).to(data.dtype)
        self.table = None

    def begin(self, envs, frames):
        """New episodes in environments (n,) with first frames (n, h, w, C)."""
        for env in envs.tolist():
            self.open[env] = [env, int(self.count[env]), 0]
            self.episodes.append(self.open[env])
        self.write(envs, self.count[envs], frames=frames, actions=np.zeros(len(envs)), rewards=np.zeros(len(envs)),
                   ends=np.zeros(len(envs)))  # fmt: skip
        self.count[envs] += 1

    def add(self, envs, actions, rewards, ends, frames):
        """Complete the last rows with what was done and what it led to; append the frames (n, h, w, C) that came."""
        self.write(envs, self.count[envs] - 1, actions=actions, rewards=rewards, ends=ends)
        zeros = np.zeros(len(envs))
        self.write(envs, self.count[envs], frames=frames, actions=zeros, rewards=zeros, ends=zeros)
        self.count[envs] += 1
        for env in envs.tolist():
            self.open[env][2] += 1

    def close(self, envs):
        """The episodes of environments (n,) are over."""
        for env in envs.tolist():
            if not self.open.pop(env)[2]:
                self.episodes = [e for e in self.episodes if e[0] != env or e[2]]
        self.table = None

    def drawable(self):
        """Environments, first rows and transitions of the episodes that can be drawn, and their cumulated
        probabilities."""
        if self.table is None:
            env, first, length = np.array(self.episodes, np.int64).reshape(-1, 3).T
            lost = np.maximum(self.count[env] - self.capacity - first, 0)  # rows that were overwritten
            first, length = first + lost, length - lost
            keep = length > 0
            going = {id(e) for e in self.open.values()}
            self.episodes = [e for e, k in zip(self.episodes, keep) if k or id(e) in going]
            env, first, length = env[keep], first[keep], length[keep]
            chances = episode_probabilities(len(length), lengths=length) if len(length) else np.zeros(0)
            self.table = env, first, length, chances.cumsum()
        return self.table

    def segments(self, n, size, rng, final=False, right_padding=False):
        """n random segments of `size` rows, frames (n, size, h, w, C), actions and so on (n, size). "mask": the frame
        exists; `final`: the last frame of an episode, which no action follows, can be drawn too."""
        env, first, length, chances = self.drawable()
        pick = np.searchsorted(chances, rng.random(n) * chances[-1], side="right").clip(max=len(chances) - 1)
        env, first, length = env[pick], first[pick], length[pick]
        rows, mask = segment_rows(rng, length + final, size, right_padding)
        mask = (rows >= 0) & (rows <= length[:, None]) if right_padding else mask
        transition = (rows >= 0) & (rows < length[:, None])
        flat = env[:, None] * self.capacity + (first[:, None] + rows.clip(0, length[:, None])) % self.capacity
        index, transition = (torch.as_tensor(x, device=self.device) for x in (flat, transition))
        batch = {k: v.flatten(0, 1)[index] for k, v in self.data.items()}
        batch["actions"] = batch["actions"].long() * transition
        mask = torch.as_tensor(mask, device=self.device)
        return batch | {"mask": mask, "transition": transition[:, :-1]}

    def batch(self, kind, args, rng=None):
        """What one update of this kind takes."""
        rng, L = self.rng if rng is None else rng, args.frame_stack
        if kind == "denoiser":
            # NOTE: with `final` off, as in the code, the denoiser never sees how an episode ends.
            size = L + 1 + args.autoregressive_steps
            return self.segments(args.batch_size, size, rng, final=args.terminal_targets)
        if kind == "rew_end":
            return self.segments(args.batch_size, args.rew_end_length, rng, right_padding=True)
        return self.segments(args.imag_envs if kind == "begin" else args.start_pool, L, rng)

    def state_dict(self):
        filled = int(min(self.count.max(), self.capacity))
        whole = filled == self.capacity or self.device.type != "cpu"  # a part must be copied: a view would save all
        rows = {k: v[:, :filled].cpu() if whole else v[:, :filled].clone() for k, v in self.data.items()}
        going = [self.episodes.index(e) for e in self.open.values()]
        return {"rows": rows, "count": self.count.tolist(), "episodes": self.episodes, "open": going,
                "rng": self.rng.bit_generator.state}  # fmt: skip

    def load_state_dict(self, state):
        # NOTE: a resumed run has a larger capacity only if the smaller one had not wrapped yet; then rows keep places.
        for k, v in state["rows"].items():
            self.data[k][:, : v.shape[1]] = v.to(self.device)
        self.count, self.episodes = np.array(state["count"]), [list(e) for e in state["episodes"]]
        self.open = {self.episodes[i][0]: self.episodes[i] for i in state["open"]}
        self.rng.bit_generator.state, self.table = state["rng"], None


# ---- Environment -----------------------------------------------------------------------------------------------------


def resize(image, size):
    """(H, W, C) uint8 of any number of channels -> (size, size, C), bilinear, always a copy."""
    planes = [Image.fromarray(p).resize((size, size), Image.BILINEAR) for p in np.moveaxis(image, 2, 0)]
    return np.stack([np.asarray(p) for p in planes], 2)


@functools.cache
def area_weights(n, size):
    """(size, n): shares of n pixels in each of `size` cells of equal length, as OpenCV's INTER_AREA when it shrinks."""
    edges = np.arange(size + 1) * (n / size)
    low, high = np.maximum(edges[:-1, None], np.arange(n)), np.minimum(edges[1:, None], np.arange(n) + 1)
    return (np.maximum(high - low, 0) * (size / n)).astype(np.float32)


class AtariByLife(gym.Wrapper):
    """Frame skip with the maximum of the last two frames, 1 to 30 no-ops, area resizing; says when a life was lost."""

    def __init__(self, env, args):
        super().__init__(env)
        self.args, self.observation_space = args, spaces.Box(0, 255, (args.image_size, args.image_size, 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        frame, info = self.env.reset(seed=seed, options=options)
        for _ in range(np.random.default_rng(seed).integers(1, 31)):
            frame, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                frame, info = self.env.reset(options=options)
        self.lives = self.unwrapped.ale.lives()
        return self.picture(frame), info

    def step(self, action):
        total, frames = 0.0, []
        for _ in range(self.args.action_repeat or 4):
            frame, reward, terminated, truncated, info = self.env.step(action)
            total, frames = total + float(reward), [*frames[-1:], frame]
            if terminated or truncated:
                break
        # NOTE: a lost life is an episode's end for learning, but the game goes on; gymnasium's and ale-py's options
        # start a new game. A life that was won and lost again ends no episode: the authors' counter only falls.
        info, self.lives = info | {"life_lost": (n := self.unwrapped.ale.lives()) < self.lives}, min(n, self.lives)
        return self.picture(np.max(frames, axis=0)), total, terminated, truncated, info

    def picture(self, frame):
        rows, columns = (area_weights(n, self.args.image_size) for n in frame.shape[:2])
        # NOTE: not Pillow's box filter, which takes whole pixels only: up to 32 grey levels off on Breakout's frames.
        return np.rint(np.einsum("yh,xw,hwc->yxc", rows, columns, frame.astype(np.float32), optimize=True)).astype(
            np.uint8
        )


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


class Recording(gym.Env):
    """The episodes of a data set, whatever action is chosen: where the tools' dreams of a --dataset run start."""

    def __init__(self, path):
        self.episodes, _, actions = load_dataset(path)
        self.observation_space = spaces.Box(0, 255, self.episodes[0]["frames"].shape[1:], np.uint8)
        self.action_space = spaces.Discrete(actions)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episodes[self.np_random.integers(len(self.episodes))], 0
        return self.episode["frames"][0].copy(), {}

    def step(self, action):
        self.t += 1
        over, reward = self.t == len(self.episode["actions"]), float(self.episode["rewards"][self.t - 1])
        return self.episode["frames"][self.t].copy(), reward, over and self.episode["end"], over, {}


def make_env(args, seed):
    """The environment as the agent sees it. Observations: uint8 images (size, size, C); actions: Discrete(n). Raises
    ValueError with what was wanted and what was found. Episodes are functions of the seed of their reset and of the
    actions; a first reset without a seed goes on from `seed`. With --dataset: see Recording."""
    if args.dataset:
        env = Recording(args.dataset)
        env.reset(seed=int(seed))
        return env
    *modules, name = args.env_id.split(":")
    family, kwargs = name.split("/")[0], json.loads(args.env_kwargs)
    for module in modules:
        importlib.import_module(module)
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # draw without a display
    if family == "ALE":
        import ale_py  # noqa: F401 (registers its ids)

        # NOTE: the v5 ids skip frames by themselves and without max-pooling; the skip is ours, and it is the only one.
        kwargs = dict(frameskip=1, repeat_action_probability=0) | kwargs
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
        env = AtariByLife(env, args)
    elif (args.action_repeat or 1) > 1:
        env = gym.wrappers.RepeatAction(env, args.action_repeat)
    env = MinAtar(env, args.image_size if args.pixels else 160) if family == "MinAtar" else env
    env = gym.wrappers.AddRenderObservation(env) if args.pixels and family != "ALE" else env
    space, a = env.observation_space, env.action_space
    shape = (*space.shape, 1) if len(space.shape or ()) == 2 else space.shape
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8 or len(shape) != 3:
        raise ValueError(f"observations must be one uint8 image (or --pixels), found {space}")
    if not isinstance(a, spaces.Discrete):
        raise ValueError(f"actions must be Discrete, found {a}; dreamerv3.py takes a Box")
    axis = 0 if shape[0] < min(shape[1:]) else 2  # of the channels: frame stacks have them in front
    box = spaces.Box(0, 255, (args.image_size, args.image_size, shape[axis]), np.uint8)
    see = lambda x: resize(np.moveaxis(np.reshape(x, shape), axis, 2), args.image_size)  # noqa: E731
    env = gym.wrappers.TransformObservation(env, see, box)
    env = gym.wrappers.TransformAction(env, lambda x: int(x) + int(a.start), spaces.Discrete(a.n))
    env = gym.wrappers.TimeLimit(env, args.max_episode_steps) if args.max_episode_steps else env
    env = gym.wrappers.RecordEpisodeStatistics(env)
    env.reset(seed=int(seed))
    return env


# ---- Own data --------------------------------------------------------------------------------------------------------


def load_dataset(path):
    """An .npz with frames (n, h, w, C) uint8, actions (n,) and, if it has them, rewards and ends (n,) of each action
    and lasts (n,), true for the last frame of an episode, whose action, reward and end are ignored. -> episodes
    [{frames (T+1, h, w, C), actions (T,), rewards (T,), end}], whether it has rewards and ends, the number of actions.
    ValueError with what was wanted and what was found."""
    with np.load(path, allow_pickle=False) as f:
        data = {k: f[k] for k in f.files}
    found = ", ".join(f"{k} {v.dtype} {v.shape}" for k, v in data.items()) or "nothing"
    frames, actions, n = data.get("frames"), data.get("actions"), len(data.get("frames", ()))
    for good, wanted in (
        (frames is not None and actions is not None, "it needs frames and actions"),
        (
            n and frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[3] in (1, 3),
            "frames must be uint8 images",
        ),
        (n > 1 and all(v.shape == (n,) for k, v in data.items() if k != "frames"), "arrays must have equal lengths"),
        (n and actions.dtype.kind in "iu" and actions.min() >= 0, "actions must be integers from 0"),
        (("rewards" in data) == ("ends" in data), "rewards and ends belong together"),
        ("lasts" in data or "ends" not in data or not data["ends"].any(), "ends need lasts: the frame after an end"),
    ):
        if not good:
            raise ValueError(f"{wanted}, found {found}")
    lasts, begin, episodes = data.get("lasts", np.zeros(n, bool)).astype(bool), 0, []
    lasts[-1] = True
    rewards, ends = (data.get(k, np.zeros(n)) for k in ("rewards", "ends"))
    for last in np.flatnonzero(lasts):
        if ends[begin : max(begin, last - 1)].any():
            raise ValueError(f"an end before the last action of an episode, around row {begin}")
        if last > begin:
            parts = dict(frames=frames[begin : last + 1], actions=actions[begin:last].astype(np.int64))
            episodes.append(parts | dict(rewards=rewards[begin:last], end=bool(ends[last - 1])))
        begin = last + 1
    return episodes, "rewards" in data, int(actions.max()) + 1


def split_dataset(episodes, share=0.1):
    """Training and test episodes: every tenth is for testing, or the last tenth of the only one."""
    if len(episodes) > 1:
        stride = min(len(episodes), round(1 / share))
        return [e for i, e in enumerate(episodes) if (i + 1) % stride], episodes[stride - 1 :: stride]
    (e,), n = episodes, max(1, int((1 - share) * len(episodes[0]["actions"])))
    head = {k: v[: n + (k == "frames")] for k, v in e.items() if k != "end"} | {"end": False}
    tail = {k: v[n:] for k, v in e.items() if k != "end"} | {"end": e["end"]}
    return [head], [tail] if len(tail["actions"]) else [e]


@torch.no_grad()
def one_step_errors(model, replay, args, n=256):
    """One imagined frame after real context, on episodes that the model did not train on: squared error (pixels in
    0..1) beside those of repeating the frame and of a wrong action."""
    device, L, errors = next(model.parameters()).device, args.frame_stack, []
    batch = {k: v.to(device) for k, v in replay.segments(n, L + 1, np.random.default_rng(0), final=True).items()}
    frames, actions = segment_frames(batch), batch["actions"][:, :-1]
    wrong = torch.cat([actions[:, :-1], actions[torch.randperm(n), -1:]], 1)
    for a in (actions, wrong):
        drawn = [
            imagine_frame(model.denoiser, *x, sampler_settings(args))
            for x in zip(frames[:, :-1].split(64), a.split(64))
        ]
        errors.append(float(((torch.cat(drawn) - frames[:, -1]) / 2).square().mean()))
    copy = float(((frames[:, -2] - frames[:, -1]) / 2).square().mean())
    return dict(one_step_mse=errors[0], copy_previous_mse=copy, wrong_action_mse=errors[1])


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

    @torch.no_grad()
    def act(self, obs, state, first, greedy=False, temperature=1.0):
        """obs (N, ...), state None at the start, first (N,): an episode begins -> actions (N,), state of the LSTM."""
        policy, first = self.model.actor_critic, self.tensor(first)
        # NOTE: in real environments the LSTM starts from zero, without burn-in.
        state = torch.zeros(2, len(first), policy.units, device=self.device) if state is None else state
        h, c = (x * ~first[:, None] for x in state)
        logits, _, h, c = policy(frames_to_float(self.tensor(obs)).permute(0, 3, 1, 2), h, c)
        actions = logits.argmax(-1) if greedy else draw_class(logits / temperature)
        return actions.cpu().numpy(), (h, c)

    @torch.no_grad()
    def observe(self, obs, actions):
        """obs (N, T, ...), actions (N, T-1) -> the last L frames (N, L, C, h, w) and actions (N, L), the state of the
        reward/end model after them; and the frames as they are: nothing is compressed."""
        L, (N, T) = self.model.frames, np.shape(obs)[:2]
        missing = max(0, L - T)
        frames = F.pad(self.tensor(obs)[:, -L:], (0, 0) * 3 + (missing, 0))
        actions = F.pad(self.tensor(actions).long(), (max(0, L - T), 1))[:, -L:]
        mask = (torch.arange(L, device=self.device) >= missing).expand(N, L)
        start, _ = burn_in_starts(self.model, dict(frames=frames, actions=actions, mask=mask))
        return tuple(start[k] for k in ("frames", "actions", "wm_h", "wm_c")), np.array(obs)

    @torch.no_grad()
    def imagine(self, state, actions):
        """One imagined transition of N dreams -> state, reward (N,): its sign, alive (N,): chance that it goes on,
        frames."""
        frames, past, *wm = state
        action = self.tensor(actions).long()[:, None]
        past = torch.cat([past[:, :-1], action], 1)
        frame = imagine_frame(self.model.denoiser, frames, past, sampler_settings(self.args)).unsqueeze(1)
        rewards, ends, wm = self.model.rew_end_model(frames[:, -1:], action, frame, tuple(x[None] for x in wm))
        state = torch.cat([frames[:, 1:], frame], 1), torch.cat([past[:, 1:], past[:, :1]], 1), *(x[0] for x in wm)
        reward, alive = draw_class(rewards[:, 0]) - 1.0, torch.softmax(ends[:, 0], -1)[:, 0]
        seen = float_to_frames(frame[:, 0]).permute(0, 2, 3, 1).cpu().numpy()
        return state, reward.cpu().numpy(), alive.cpu().numpy(), seen


def load(run, device="cpu"):
    """The Agent of a run directory."""
    state = load_checkpoint(run)
    args, c = Args(**state["args"]), state["loop"]
    model = Diamond(c["image"], c["actions"], vars(args)).to(device)
    model.load_state_dict(state["learner"]["model"])
    agent = Agent(model.eval(), args, torch.device(device))
    agent.global_step, agent.random_return = c["global_step"], c["random_return"]
    return agent


# ---- Main ------------------------------------------------------------------------------------------------------------


def check_args(args):
    """What would end in a wrong result or an obscure error, before anything is created. -> an environment."""
    names = "num_envs batch_size imag_envs imag_horizon start_pool eval_episodes log_every save_every learning_rate "
    names += "collect_steps frame_stack denoising_steps total_timesteps sigma_min p_std"
    rules = {name: (getattr(args, name) > 0, "more than 0") for name in names.split()}
    rules |= {name: (0 <= getattr(args, name) <= 1, "within 0 and 1") for name in ("gamma", "return_lambda", "epsilon")}
    starts, most = args.learning_starts, args.sigma_max
    rules["total_timesteps"] = args.total_timesteps > starts or args.dataset, f"beyond --learning-starts {starts}"
    rules["learning_starts_max"] = args.learning_starts_max >= starts, f"at least --learning-starts {starts}"
    rules["rew_end_length"], rules["sigma_min"] = (
        (args.rew_end_length >= 2, "at least 2"),
        (0 < args.sigma_min <= most, f"within 0 and {most}"),
    )
    least = args.num_envs * (max(args.rew_end_length, args.frame_stack + 2) + 1)
    rules["buffer_size"] = args.buffer_size >= least, f"at least {least}"
    cond = 2 * args.frame_stack // math.gcd(2, args.frame_stack)
    rules["denoiser_cond"] = args.denoiser_cond % cond == 0, f"a multiple of {cond}"
    for name, (good, wanted) in rules.items():
        if not good:
            fail(f"--{name.replace('_', '-')} must be {wanted}, got {getattr(args, name)}")
    try:
        env = make_env(args, args.seed)
    except Exception as e:  # whatever it is, it cannot be used: its own words, in one line
        words = " ".join(f"--env-kwargs {args.env_kwargs} --seed {args.seed}: {type(e).__name__}: {e}".split())
        fail(
            f"--dataset {args.dataset}: {type(e).__name__}: {e}" if args.dataset else f"--env-id {args.env_id} {words}"
        )
    image, widths = env.observation_space.shape, {}
    for name in ("denoiser_channels", "denoiser_depths", "rew_end_channels", "rew_end_depths", "actor_channels"):
        flag = f"--{name.replace('_', '-')}"
        try:
            widths[name] = [int(n) for n in getattr(args, name).split(",")]
            odd = [n for n in widths[name] if n < 1 or "channels" in name and (n > 32 and n % 32 or n % max(1, n // 8))]
        except ValueError:
            odd = getattr(args, name)
        if odd:
            fail(f"{flag} must be numbers such as 32,64: at most 32 or multiples of 32, got {getattr(args, name)}")
        if len(widths[name]) != len(widths.get(name.replace("depths", "channels"), widths[name])):
            fail(f"{flag} must have as many numbers as --{flag[2:-6]}channels, got {getattr(args, name)}")
    if min(image[:2]) >> len(widths["actor_channels"]) < 1:
        fail(f"--actor-channels {args.actor_channels} halves images too often for --image-size {min(image[:2])}")
    name = args.dataset or args.env_id
    print(f"{name} has observations {env.unwrapped.observation_space}")
    print(f"the agent sees {env.observation_space} (images: --image-size), acts in {env.action_space}")
    return env


def episode_seed(args, key, index, episode=0):
    """Seed of an episode: no two of a run share one, nor do training, evaluation (key 1) and the baseline (key 2)."""
    return int(np.random.SeedSequence((args.seed, key, index, int(episode))).generate_state(1)[0])


def make_envs(args, n, key):
    """n environments in lockstep; the caller resets those that have ended, with seeds of its own."""
    thunks = [partial(make_env, args, episode_seed(args, key, i)) for i in range(n)]
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


def finish(args, c, agent, run, writer, stop):
    """Final evaluation on fresh episodes, result.json, and the self-check against --target-return."""
    print(f"look at its dreams: python benchmarks/dreams.py {run}", flush=True)
    returns = evaluate(args, agent.act, 1, "evaluation", stop)
    leave(run, stop)
    score, std, target = float(returns.mean()), float(returns.std()), args.target_return
    writer.add_scalar("eval/episodic_return", score, c.global_step)
    writer.close()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    memory = torch.cuda.max_memory_allocated() if agent.device.type == "cuda" else memory
    result = dict(run=run, episodic_return=score, episodic_return_std=std, returns=returns.tolist())
    result |= dict(random_return=c.random_return, train_return=float(np.mean(c.recent)) if c.recent else None)
    result |= dict(global_step=c.global_step, updates=c.updates, minutes=c.seconds / 60, peak_memory_gb=memory / 1e9)
    Path(run, "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    verdict = "" if target is None else f", target {target:g}: {'reached' if score >= target else 'missed'}"
    print(f"episodic_return {score:.1f} +- {std:.1f} over {len(returns)} (random {c.random_return:.1f}{verdict})")
    if target is not None and not score >= target:
        raise SystemExit(1)
    return result


def set_up(args, env, capacity, state, subject):
    """Model, learner, replay, run directory, writer, device, and the loop's counters."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    image, actions, N = env.observation_space.shape, int(env.action_space.n), 1 if args.dataset else args.num_envs
    seed_everything(args, device)
    with torch.device(device):
        model = Diamond(image, actions, vars(args))
    if args.init_from and not state:
        load_authors_weights(model, args.init_from)
    model.to(memory_format=torch.channels_last)
    on_gpu = device.type == "cuda" and N * capacity * math.prod(image) < 0.8 * torch.cuda.mem_get_info()[0]
    replay = FrameReplay(capacity, N, image, device if on_gpu else "cpu", args.seed)
    run, writer = start_run(args, subject, device, state and state["loop"]["global_step"] + 1)
    learner = Learner(model, args, device)
    parts = ", ".join(f"{n} {count_params(m):,}" for n, m in model.named_children())
    print(f"run: {run} on {device}\nparameters: {count_params(model):,} ({parts})")
    print(f"replay: {N} x {capacity:,} rows", flush=True)
    # due: updates of each kind that this epoch still owes; finals: epochs after the last collection; stepped: whether
    # this epoch collected; goal: agent steps at which it learns; signs: how often a reward was negative, 0, positive.
    c = SimpleNamespace(global_step=0, updates=0, due={}, epoch=0, finals=0, goal=args.learning_starts, signs=[0, 0, 0])
    c.seconds, c.recent, c.metrics, c.random_return, c.image, c.actions = 0.0, [], {}, None, list(image), actions
    c.stepped = False
    if state:
        c = SimpleNamespace(**state["loop"])
        learner.load_state_dict(state["learner"])
    if args.compile and device.type == "cuda":
        compile_model(model, learner)
    return model, learner, replay, run, writer, device, c


SHOWN = "denoiser", "reward", "end", "imagined_return"  # what tells whether to stop a run


def owe(c, args, kinds):
    """The updates of an epoch: many in the first one."""
    c.due = {kind: getattr(args, f"{'' if c.epoch else 'first_'}{kind}_updates") for kind in kinds}


def learn(c, args, learner, replay, device, stop):
    """Make the updates that are due, in order, unless a signal comes."""
    clock = time.time()
    for kind in c.due:
        while c.due[kind] and not stop:
            if kind == "actor" and learner.dream is None:
                learner.begin({k: v.to(device) for k, v in replay.batch("begin", args).items()})
            found = learner.update(kind, {k: v.to(device) for k, v in replay.batch(kind, args).items()})
            c.updates, c.due[kind], c.metrics = c.updates + 1, c.due[kind] - 1, c.metrics | found
            if device.type == "cpu":  # on a GPU this would wait for the device: there, when metrics are read
                learner.check(found, f"step {c.global_step}, update {c.updates}")
            if time.time() > clock + 10:
                shown = ", ".join(f"{k}={float(v):.4g}" for k, v in found.items() if k in SHOWN)
                print(f"epoch {c.epoch + 1}, {kind}: {c.due[kind]} updates to go, {shown}", flush=True)
                clock = time.time()
    if not stop:
        c.due, c.epoch = {}, c.epoch + 1


def save(c, args, learner, replay, run, now, start):
    """A checkpoint; -> the time."""
    c.seconds, c.metrics = c.seconds + time.time() - start, {k: float(v) for k, v in c.metrics.items()}
    parts = dict(learner=learner.state_dict(), replay=replay.state_dict(), now=now, loop=vars(c))
    save_checkpoint(parts | dict(script="diamond", args=asdict(args)), run)
    return time.time()


def fit(args):
    """--dataset: train the world model alone, on the data of a file. Returns the final metrics."""
    state = load_checkpoint(args.resume) if args.resume else None
    env = check_args(args)
    episodes, rewarded, _ = load_dataset(args.dataset)
    parts = split_dataset(episodes)
    rows = [sum(len(e["frames"]) for e in part) for part in parts]
    *_, run, writer, device, c = made = set_up(args, env, rows[0], state, Path(args.dataset).name)
    model, learner, replay, stop = *made[:3], stop_signals()
    tests = FrameReplay(rows[1], 1, replay.data["frames"].shape[2:], seed=args.seed)
    print(f"data: {len(parts[0])} episodes for training, {len(parts[1])} for testing", flush=True)
    for part, store in zip(parts, (replay, tests)):
        for e in part:
            store.begin(np.zeros(1, int), e["frames"][:1])
            ends = np.arange(1, len(e["actions"]) + 1) == (len(e["actions"]) if e["end"] else 0)
            for step in zip(*(x[:, None] for x in (e["actions"], e["rewards"], ends, e["frames"][1:]))):
                store.add(np.zeros(1, int), *step)
            store.close(np.zeros(1, int))
    if state:
        replay.rng.bit_generator.state = state["replay"]["rng"]
        set_rng_state(state["rng"])
    start = time.time()
    while c.epoch <= args.final_epochs:
        if not c.due:
            owe(c, args, ("denoiser", "rew_end") if rewarded else ("denoiser",))
        learn(c, args, learner, replay, device, stop)
        learner.check(c.metrics, f"update {c.updates}")
        if not stop:
            errors = one_step_errors(model, tests, args)
            tags = {f"eval/{k}": v for k, v in errors.items()} | {f"losses/{k}": v for k, v in c.metrics.items()}
            for tag, value in tags.items():
                writer.add_scalar(tag, float(value), c.updates)
            shown = ", ".join(f"{k}={v:.5f}" for k, v in errors.items())
            print(f"epoch {c.epoch} of {1 + args.final_epochs}, updates={c.updates}, {shown}", flush=True)
        start = save(c, args, learner, replay, run, None, start)
        leave(run, stop)
    result = dict(
        run=run, updates=c.updates, minutes=c.seconds / 60, prediction_errors=one_step_errors(model, tests, args)
    )
    Path(run, "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def train(args):
    """Algorithm 1: collect a few steps, train the denoiser, the reward/end model, and the actor-critic in imagination,
    repeat. Returns the final metrics."""
    if args.dataset:
        return fit(args)
    # Set up, in an order that finds every mistake of the user's before the first file is made.
    state = load_checkpoint(args.resume) if args.resume else None
    env, N = check_args(args), args.num_envs
    # Rows per environment. A run can fill two per agent step: an episode's end takes one more.
    capacity = -(-min(args.buffer_size, 2 * args.total_timesteps + 4 * N) // N)
    model, learner, replay, run, writer, device, c = set_up(args, env, capacity, state, args.env_id)
    stop, envs, agent = stop_signals(), make_envs(args, N, 0), Agent(model, args, device)
    if state:  # each environment is brought back to where it was by the seed of its episode and the actions since then
        replay.load_state_dict(state["replay"])
        obs, first, *carry = state["now"]
        obs, first, carry = obs.numpy(), first.numpy(), tuple(x.to(device) for x in carry) or None
        for i, env in enumerate(envs.envs):
            env.reset(seed=episode_seed(args, 0, i, c.episode[i]))
            for action in c.history[i]:
                env.step(action)
        set_rng_state(state["rng"])
        print(f"resumed at step {c.global_step} of {args.total_timesteps}, update {c.updates}", flush=True)
    else:
        env.action_space.seed(args.seed)
        draw = lambda obs, state, first: (np.array([env.action_space.sample() for _ in first]), state)  # noqa: E731
        returns = evaluate(args, draw, 2, "random policy", stop)
        if stop:
            raise SystemExit(128 + stop[0])
        print(f"random policy: {returns.mean():.1f} +- {returns.std():.1f} over {len(returns)} episodes", flush=True)
        c.random_return, c.episode, c.history = float(returns.mean()), [0] * N, [[] for _ in range(N)]
        obs, _ = envs.reset(seed=[episode_seed(args, 0, i) for i in range(N)])
        replay.begin(np.arange(N), obs)
        first, carry = np.ones(N, bool), None
    ended, start, mark = [], time.time(), (time.time(), c.global_step, c.updates)  # mark: of the last log line

    while c.due or c.global_step < args.total_timesteps or c.finals < args.final_epochs:
        # Alg. 1: collect_experience. The last epochs only learn.
        if not c.due:  # else resumed in the middle of an epoch's updates
            c.stepped = c.global_step < args.total_timesteps
        if not c.due and not c.stepped:
            c.finals += 1
            owe(c, args, learner.opts)
        elif not c.due:
            actions, carry = agent.act(obs, carry, first, temperature=args.temperature_collect)
            stray = torch.rand(N) < args.epsilon
            actions = torch.where(stray, torch.randint(c.actions, (N,)), torch.as_tensor(actions)).numpy()
            for past, action in zip(c.history, actions.tolist(), strict=True):
                past.append(action)
            obs, reward, terminated, truncated, infos = envs.step(actions)
            c.global_step, over = c.global_step + N, terminated | truncated
            # NOTE: a lost life ends the episode; the next one begins with the frame that ended this one.
            terminated = terminated | (infos["life_lost"] if args.episodic_life and "life_lost" in infos else False)
            replay.add(np.arange(N), actions, reward, terminated, obs)
            for sign in np.sign(reward).astype(int):
                c.signs[sign + 1] += 1
            first = over | terminated
            for i in np.flatnonzero(over):
                ended.append(float(infos["episode"]["r"][i]))
                writer.add_scalar("charts/episodic_return", ended[-1], c.global_step)
                writer.add_scalar("charts/episodic_length", int(infos["episode"]["l"][i]), c.global_step)
                c.episode[i], c.history[i], c.recent = c.episode[i] + 1, [], [*c.recent[-9:], ended[-1]]
            if over.any():
                seeds = [episode_seed(args, 0, i, c.episode[i]) for i in range(N)]
                obs, _ = envs.reset(seed=seeds, options={"reset_mask": over})
            if first.any():
                replay.close(np.flatnonzero(first))
                replay.begin(np.flatnonzero(first), obs[first])
            if c.global_step >= min(c.goal, args.total_timesteps):
                rare = sum(sorted(c.signs)[:2]) < 10  # both rarer reward signs together (code)
                if c.epoch == 0 and rare and c.global_step < min(args.learning_starts_max, args.total_timesteps):
                    c.goal = min(c.global_step + args.collect_steps, args.learning_starts_max)
                else:
                    owe(c, args, learner.opts)
                    c.goal = c.global_step + args.collect_steps

        # Alg. 1: update_diffusion_model, update_reward_end_model, update_actor_critic.
        learned = bool(c.due)
        if learned:
            learn(c, args, learner, replay, device, stop)

        # Log and save. On a GPU metrics are read here only: reading waits for the device.
        final = c.finals and learned or c.global_step >= args.total_timesteps and not c.due
        log, keep = (
            not c.due and (final or c.global_step % e < N and c.stepped) for e in (args.log_every, args.save_every)
        )
        if log or keep or stop:
            learner.check(c.metrics, f"step {c.global_step}, update {c.updates}")
        if log:
            seconds = time.time() - mark[0]
            charts = dict(SPS=(c.global_step - mark[1]) / seconds, updates_per_s=(c.updates - mark[2]) / seconds)
            charts["epochs"] = c.epoch
            for tag, value in (charts | c.metrics).items():
                part = "charts" if tag in charts or "learning_rate" in tag else "losses"
                writer.add_scalar(f"{part}/{tag}", float(value), c.global_step)
            shown = f"{np.mean(ended):.1f} ({len(ended)} episodes)" if ended else "no episode ended since the last line"
            line = f"global_step={c.global_step}, episodic_return={shown}, updates={c.updates}, SPS={charts['SPS']:.0f}"
            print(line + "".join(f", {k}={float(c.metrics[k]):.4g}" for k in SHOWN if k in c.metrics), flush=True)
            mark, ended = (time.time(), c.global_step, c.updates), []
        if keep or stop:
            now = [torch.as_tensor(obs), torch.as_tensor(first), *(carry or ())]
            start = save(c, args, learner, replay, run, now, start)
        leave(run, stop)
    envs.close()
    return finish(args, c, agent, run, writer, stop)


if __name__ == "__main__":
    train(parse_args(Args, PRESETS, __doc__.split("\n\nDeviations")[0]))
