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
    python diamond.py --resume runs/NAME                            # go on, bit for bit on a CPU
    python diamond.py --evaluate runs/NAME                          # returns of fresh episodes
    python diamond.py --play runs/NAME                              # play inside the dream; dream and reality as a GIF
    python diamond.py --record play.npz --env-id ALE/Pong-v5 --total-timesteps 10000   # frames and actions to a file
    python diamond.py --dataset play.npz                            # the world model alone, on such a file of yours
    python diamond.py --init-from Breakout.pt                       # start from the authors' weights (their names)
    python diamond.py --model-free --num-envs 32                    # the same actor-critic on the real game

Measured: see the README's result table; every row has its command, commit, hardware and seeds.

Differences between paper and authors' code, where this file follows the code: offset noise, two loss terms per denoiser
update, initial sampling noise of variance 1, gradient clipping, quarter-weighted replay, the long first epoch, rewards
and ends that are sampled. Differences of this file from both, each with its reason:
  * A stored episode has one frame more than actions. So the true next frame is known at every transition; the authors'
    reward/end model sees mid-grey there when an episode was truncated or is still going on.
  * `--terminal-targets` lets the denoiser learn the last frame of an episode too (off as in the code; the cpu preset
    has it on: in MinAtar only the last frame shows that the game is lost, and without it dreams hardly ever end).
  * Start segments are drawn, and both LSTMs burnt in, for every update anew; the authors keep 8192 of them and their
    reward/end states for hundreds of updates. If one update needs more than --start-pool, they are used again.
  * No gradient flows through the policy's burn-in; it is a constant of the update.
  * Unfinished episodes are cut at every scheduled checkpoint, so that a resumed run repeats the unbroken one exactly.
  * Exploration noise is drawn per environment, the authors draw it once for all (they collect with one).
  * The denoiser's loss has a masked mean; in the code a batch whose targets are all padding gives NaN.
  * On a GPU convolutions run in bfloat16 (theirs in TF32); noise, coefficients, pixels, LSTMs, losses are float32.
  * Everything is seeded; the authors' seed option is never read.

The algorithm is in the parts Maths, Networks, Losses, Imagination and Replay and in the loop of `train`; a reader may
stop there. The rest makes the file usable alone: environments, evaluation and dreams, checkpoints, checked flags.

Symbols in shape comments:
  B  batch (replayed segments)         L  frames of context (4)         C  channels of an image or a layer
  N  environments, real or imagined    S  frames of a segment           E  features of an encoder
  H  imagination horizon (images: height and width are h, w)            A  actions
  P  start segments of an update       T  transitions of an episode     K  width of the conditioning vector
Time convention, everywhere: row t holds frame t, the action taken AFTER seeing it, and the reward and the end flag that
this action LED to, together with frame t+1. The last frame of an episode has a row of its own, without an action.
"""

import contextlib
import ctypes
import functools
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
from typing import Literal, Optional

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import nn

# ---- Args and presets ------------------------------------------------------------------------------------------------


# A default without a source is the authors' configuration; "code" marks what the paper does not mention.
@dataclass
class Args:
    # ---- Experiment
    exp_name: str = "diamond"
    """name of the experiment, part of the run directory"""
    preset: Literal["full", "cpu"] = "full"
    """named settings; explicit flags win over them"""
    seed: int = 1
    """seed of everything random: networks, noise, replay, environments"""
    torch_deterministic: bool = True
    """deterministic cuDNN kernels"""
    cuda: bool = True
    """use the GPU if there is one"""
    compile: bool = True
    """torch.compile the networks, and on a GPU capture each whole update in a CUDA graph"""
    bf16: bool = True
    """convolutions in bfloat16 on a GPU (see the docstring); on a CPU always float32"""
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
    """keep the replay in the checkpoint; without it --resume collects anew and is not bit-exact"""
    resume: Optional[str] = None
    """run directory to continue"""
    evaluate: Optional[str] = None
    """run directory to evaluate, nothing is trained"""
    play: Optional[str] = None
    """run directory whose dream is played with the keyboard"""
    target_return: Optional[float] = None
    """exit with code 1 if the final evaluation stays below this"""
    init_from: Optional[str] = None
    """state dict (.pt) to start from, with the authors' names: denoiser.*, rew_end_model.*, actor_critic.*"""
    dataset: Optional[str] = None
    """.npz to train the world model alone on: frames (n, h, w, C) uint8, actions (n,); optional rewards (n,), ends (n,)
    of each action, and lasts (n,), true for the last frame of an episode, whose action, reward and end are ignored"""
    record: Optional[str] = None
    """write --total-timesteps random steps (or those of --evaluate RUN's agent) as such an .npz, train nothing"""

    # ---- Environment
    env_id: str = "ALE/Breakout-v5"
    """any gymnasium id with images (or --pixels) and Discrete actions, `module:Id-v0`"""
    env_kwargs: str = "{}"
    """JSON object passed to gymnasium.make"""
    total_timesteps: int = 100_000
    """agent steps, summed over environments"""
    num_envs: int = 1
    """environments in lockstep (code: 1; 32 with --model-free)"""
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
    """Atari: 1 to this many no-ops at the start of an episode"""
    episodic_life: bool = True
    """Atari: a lost life ends a training episode (charts/episodic_return is per life); test episodes are whole games"""
    max_episode_steps: Optional[int] = None
    """agent steps after which an episode is truncated, at most the environment's own limit (default: that limit)"""

    # ---- World model
    frame_stack: int = 4
    """L, frames and actions that the next frame depends on (table 3)"""
    denoiser_channels: str = "64,64,64,64"
    """widths of the U-Net's levels (table 2)"""
    denoiser_depths: str = "2,2,2,2"
    """residual blocks per level on the way down; one more on the way up (table 2)"""
    denoiser_cond: int = 256
    """K, width of its conditioning vector (table 2)"""
    rew_end_channels: str = "32,32,32,32"
    """widths of the reward/end model's levels (table 2)"""
    rew_end_depths: str = "2,2,2,2"
    """residual blocks per level (table 2)"""
    rew_end_cond: int = 128
    """width of its action embedding (table 2)"""
    rew_end_lstm: int = 512
    """units of its LSTM (table 2)"""
    sigma_data: float = 0.5
    """standard deviation that pixels are taken to have (app. C)"""
    sigma_offset: float = 0.3
    """offset noise, one number per image and channel (code; 0: as in the paper's comparison with DDPM)"""
    p_mean: float = -0.4
    """mean of the log of the training noise levels (app. C)"""
    p_std: float = 1.2
    """its standard deviation (app. C)"""
    autoregressive_steps: int = 1
    """further denoiser targets per segment, with the model's own prediction in the context (code)"""
    terminal_targets: bool = False
    """also train the denoiser on the last frame of episodes"""
    denoising_steps: int = 3
    """network passes per imagined frame (table 3)"""
    sigma_min: float = 0.002
    """lowest noise level of the sampler (app. A)"""
    sigma_max: float = 5.0
    """highest noise level of the sampler (app. A)"""
    rho: float = 7.0
    """spacing of the levels between them (app. A)"""
    heun: bool = False
    """second-order sampler. It ruins frames on the 8-bit grid: see `euler_sampler`"""
    churn: float = 0.0
    """stochastic sampler: noise added back per step (0: deterministic)"""
    scale_initial_noise: bool = False
    """start sampling from noise of size --sigma-max instead of 1 (textbook, but drifts more: see `imagine_frame`)"""

    # ---- Behavior
    actor_channels: str = "32,32,64,64"
    """widths of the policy's convolutions, each followed by 2x2 pooling (table 2)"""
    actor_lstm: int = 512
    """units of the policy's LSTM (table 2)"""
    imag_envs: int = 32
    """N, imagined environments (table 3: batch size)"""
    imag_horizon: int = 15
    """H, imagined steps per update, after which imagined episodes are truncated (table 3)"""
    start_pool: int = 64
    """P, real segments drawn per update to restart imagined episodes from"""
    gamma: float = 0.985
    """discount (table 3)"""
    return_lambda: float = 0.95
    """lambda of the returns (table 3)"""
    ent_coef: float = 0.001
    """entropy weight (table 3)"""
    vf_coef: float = 1.0
    """weight of the value loss"""
    epsilon: float = 0.01
    """probability of a uniform action while collecting (table 3)"""
    temperature_collect: float = 1.0
    """softmax temperature while collecting (Freeway needs a low one, IRIS has 0.01; authors, issue 34)"""
    model_free: bool = False
    """train the actor-critic on the real environments, without a world model"""

    # ---- Optimization
    buffer_size: int = 200_000
    """replay capacity in frames; never more is allocated than --total-timesteps can fill"""
    replay_cuda: bool = True
    """keep the replay on the GPU if it fits there, otherwise in host memory"""
    learning_starts: int = 5_100
    """agent steps before the first update (code: 5,000, and then the 100 of the first epoch)"""
    learning_starts_max: int = 10_100
    """more are collected, up to this many, until 10 of the two rarer reward signs were seen (code)"""
    collect_steps: int = 100
    """agent steps per epoch (table 3)"""
    final_epochs: int = 50
    """epochs without collection at the end (code); with --dataset: epochs after the first"""
    denoiser_updates: int = 400
    """denoiser updates per epoch (table 3)"""
    rew_end_updates: int = 400
    """reward/end updates per epoch (table 3)"""
    actor_updates: int = 400
    """actor-critic updates per epoch (table 3)"""
    first_denoiser_updates: int = 10_000
    """denoiser updates in the first epoch (code)"""
    first_rew_end_updates: int = 10_000
    """reward/end updates in the first epoch (code)"""
    first_actor_updates: int = 5_000
    """actor-critic updates in the first epoch (code)"""
    batch_size: int = 32
    """B, segments per denoiser and per reward/end update (table 3)"""
    rew_end_length: int = 19
    """frames of a reward/end segment, L + H (table 3)"""
    learning_rate: float = 1e-4
    """of denoiser and reward/end model (table 3)"""
    actor_learning_rate: float = 1e-4
    """of the actor-critic (table 3)"""
    weight_decay: float = 1e-2
    """of denoiser and reward/end model; none for the actor-critic (table 3)"""
    warmup_updates: int = 100
    """linear learning-rate warm-up from 0 of each of the three (code)"""
    max_grad_norm: float = 1.0
    """gradient clipping of the denoiser; 100 for the other two (code)"""

    # ---- Evaluation and logging
    eval_episodes: int = 100
    """episodes of the final evaluation, of --evaluate and of the random baseline"""
    test_episodes: int = 4
    """test episodes per report"""
    log_every: int = 1_000
    """agent steps between log lines"""
    report_every: int = 1_000
    """agent steps between reports: test episodes, errors of the world model on them, a dream (0: never)"""


# fmt: off
PRESETS = {
    # The paper's Atari 100k run.
    "full": {},
    # A laptop: MinAtar Breakout drawn as 10x10 RGB, 640 thousand parameters, learning rates for hundreds of updates.
    "cpu": dict(
        env_id="MinAtar/Breakout-v1", pixels=True, image_size=10, total_timesteps=4_200, denoiser_channels="32,32",
        denoiser_depths="1,1", denoiser_cond=64, rew_end_channels="16,16", rew_end_depths="1,1", rew_end_cond=32,
        rew_end_lstm=64, terminal_targets=True, denoising_steps=2, actor_channels="16,32", actor_lstm=128, imag_envs=24,
        imag_horizon=10, start_pool=60, ent_coef=0.01, buffer_size=20_000, learning_starts=3_000,
        learning_starts_max=3_000, collect_steps=300, final_epochs=0, first_denoiser_updates=900,
        first_rew_end_updates=400, first_actor_updates=120, denoiser_updates=60, rew_end_updates=30, actor_updates=50,
        rew_end_length=14, learning_rate=1e-3, actor_learning_rate=2e-3, warmup_updates=20, log_every=300,
        report_every=1_500, test_episodes=40, save_every=1_500, compile=False, num_threads=1,
    ),
}
# Allowed values, both ends included; checked before anything is created. Fields that are None are skipped.
RANGES = {
    **dict.fromkeys(
        "num_threads save_every total_timesteps num_envs action_repeat max_episode_steps frame_stack denoiser_cond "
        "rew_end_cond rew_end_lstm denoising_steps actor_lstm imag_envs imag_horizon start_pool buffer_size "
        "learning_starts learning_starts_max collect_steps batch_size rew_end_length eval_episodes test_episodes "
        "log_every".split(), (1, math.inf),
    ),
    **dict.fromkeys(
        "autoregressive_steps final_epochs denoiser_updates rew_end_updates actor_updates first_denoiser_updates "
        "first_rew_end_updates first_actor_updates warmup_updates report_every".split(), (0, 10**12),
    ),
    **dict.fromkeys("ent_coef vf_coef churn sigma_offset".split(), (0, 1e9)),
    **dict.fromkeys("sticky_actions gamma return_lambda epsilon weight_decay".split(), (0, 1)),
    **dict.fromkeys("sigma_data sigma_min sigma_max p_std max_grad_norm rho temperature_collect".split(), (1e-9, 1e9)),
    **dict.fromkeys("learning_rate actor_learning_rate".split(), (1e-12, 1)),
    **{"seed": (0, 2**32 - 1), "noop_max": (0, 1000), "image_size": (8, 256), "p_mean": (-100, 100)},
    **{"target_return": (-1e300, 1e300)},
}
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
    x = torch.randn(N, *shape, device=past.device, generator=generator) * sampler["initial_noise"]
    denoise = lambda x, sigma: denoiser.denoise(x, sigma, past, actions)  # noqa: E731
    return euler_sampler(denoise, x, sampler["sigmas"], sampler["heun"], sampler["churn"])


def sampler_settings(args):
    """What `imagine_frame` needs, as plain numbers."""
    sigmas = karras_sigmas(args.denoising_steps, args.sigma_min, args.sigma_max, args.rho).tolist()
    noise = args.sigma_max if args.scale_initial_noise else 1.0
    return dict(sigmas=sigmas, heun=args.heun, churn=args.churn, initial_noise=noise)


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
            for t, again in enumerate(reset.unsqueeze(-1)):
                h, c = torch.where(again, h_reset[t], h), torch.where(again, c_reset[t], c)
                h, c = self.cell(gates[t], h, c)
                out.append(h)
            return self.heads(torch.stack(out))


class Diamond(nn.Module):
    """The three networks. `image`: (h, w, C)."""

    def __init__(self, image, actions, config):
        super().__init__()
        c, self.image, self.actions, self.frames = config, tuple(image), actions, config["frame_stack"]
        sizes = {k: [int(n) for n in c[k].split(",")] for k in c if isinstance(c[k], str)}
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


def policy_loss(model, rollout, args):
    """Sec. 3.3, app. F on a rollout {name: (H, N, ...)}, imagined or real. Returns ({name: loss}, metrics)."""
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
    """AdamW with gradient clipping and warm-up; no step if told so, without waiting for the device."""

    def __init__(self, model, lr, weight_decay, clip, warmup, device):
        self.lr, self.clip, self.warmup, self.params = lr, clip, warmup, list(model.parameters())
        # NOTE: no decay of biases, norms and embeddings.
        embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        decayed = [p for p in self.params if p.dim() > 1 and id(p) not in embeddings]
        rest = [p for p in self.params if p.dim() <= 1 or id(p) in embeddings]
        groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]
        self.rate, self.count = torch.zeros((), device=device), torch.zeros((), device=device)
        self.cuda = device.type == "cuda"
        self.opt = torch.optim.AdamW(groups, lr=self.rate, eps=1e-8, fused=True, capturable=self.cuda)

    def backward(self, loss):
        """Gradients, clipped; returns their norm before."""
        self.opt.zero_grad()
        loss.backward()
        return nn.utils.clip_grad_norm_(self.params, self.clip)

    def step(self, bad):
        """One step unless bad (0-dim bool)."""
        self.rate.copy_(self.lr * warmup_factor(self.count, self.warmup))
        self.opt.found_inf = bad.float()  # the fused kernel then leaves parameters and moments alone
        self.opt.step()
        self.count += ~bad

    def state_dict(self):
        return {"opt": self.opt.state_dict(), "count": self.count}

    def load_state_dict(self, state):
        self.opt.load_state_dict(state["opt"])
        for group in self.opt.param_groups:  # the run may have begun on another kind of device
            group["capturable"], group["lr"] = self.cuda, self.rate
        self.count.copy_(state["count"])


class DiamondLearner:
    """The networks, an optimizer for each, the imagined environments, and one update of each kind."""

    def __init__(self, model, args, device):
        self.model, self.args, self.device = model, args, device
        world = dict(lr=args.learning_rate, weight_decay=args.weight_decay, warmup=args.warmup_updates, device=device)
        actor = world | dict(lr=args.actor_learning_rate, weight_decay=0.0)
        self.opts = {
            "denoiser": WarmAdamW(model.denoiser, clip=args.max_grad_norm, **world),
            "rew_end": WarmAdamW(model.rew_end_model, clip=100.0, **world),
            "actor": WarmAdamW(model.actor_critic, clip=100.0, **actor),
        }
        self.params = [p for opt in self.opts.values() for p in opt.params]
        self.steps = {"denoiser": self.denoiser_step, "rew_end": self.rew_end_step, "actor": self.actor_step}
        self.bf16 = args.bf16 and device.type == "cuda"
        self.dream = None  # state of the imagined environments; they live on from update to update
        self.bad = {}  # by kind: which loss terms, or the gradient norm, were not finite; set once, on the device
        self.names = {}

    def update(self, kind, batch):
        """One optimizer step of one network. Returns metrics as tensors on the device."""
        return self.steps[kind](batch)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def denoiser_step(self, batch):
        with self.autocast():
            losses, metrics = denoiser_loss(self.model, batch, self.args)
        return self.descend("denoiser", losses, metrics)

    def rew_end_step(self, batch):
        with self.autocast():
            losses, metrics = rew_end_loss(self.model, batch)
        return self.descend("rew_end", losses, metrics)

    def actor_step(self, batch):
        """`batch`: start segments, or, model-free, a rollout in the real environments."""
        with self.autocast():
            if self.args.model_free:
                rollout = batch
            else:
                rollout, state = imagine_rollout(self.model, self.dream, batch, self.args)
                for k, v in self.dream.items():
                    v.copy_(state[k])
                torch.clear_autocast_cache()  # NOTE: bfloat16 copies of weights made above carry no gradients
            losses, metrics = policy_loss(self.model, rollout, self.args)
        return self.descend("actor", losses, metrics)

    def begin(self, batch):
        """The very first start of the imagined environments, from N segments."""
        with self.autocast():
            start, _ = burn_in_starts(self.model, batch)
        # NOTE: here, and only here, the policy's state is zero, not burnt in.
        start["h"], start["c"] = torch.zeros_like(start["h"]), torch.zeros_like(start["c"])
        start["lengths"] = torch.zeros(len(start["h"]), dtype=torch.int64, device=self.device)
        self.dream = {k: v.clone(memory_format=torch.contiguous_format) for k, v in start.items()}

    def descend(self, kind, losses, metrics):
        opt, values = self.opts[kind], [v.float() for v in losses.values()]
        norm = opt.backward(sum(values))
        # No step on bad numbers, decided on the device. The main loop looks at `bad` when it reads metrics.
        bad = ~torch.isfinite(torch.stack([*values, norm]).detach())
        if kind not in self.bad:
            self.bad[kind], self.names[kind] = torch.zeros_like(bad), [*losses, "gradient norm"]
        self.bad[kind].copy_(torch.where(self.bad[kind].any(), self.bad[kind], bad))
        opt.step(self.bad[kind].any())
        metrics = {k: v.detach() for k, v in (losses | metrics).items()}
        return metrics | {f"grad_norm_{kind}": norm, f"learning_rate_{kind}": opt.rate.clone()}

    def check(self, where=""):
        """Raise FloatingPointError naming what was not finite. Waits for the device."""
        for kind, bad in self.bad.items():
            if bad.any():
                names = ", ".join(n for n, b in zip(self.names[kind], bad.tolist(), strict=True) if b)
                raise FloatingPointError(f"not finite at {where}: {names}; no optimizer step was taken")

    def state_dict(self):
        opts = {k: v.state_dict() for k, v in self.opts.items()}
        return {"model": self.model.state_dict(), "optimizers": opts, "dream": self.dream}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        for k, v in self.opts.items():
            v.load_state_dict(state["optimizers"][k])
        self.dream = state["dream"] and {k: v.clone().to(self.device) for k, v in state["dream"].items()}


# [optional: compile
def compile_diamond(model, learner):
    """Compile the convolutional networks; on a GPU capture each kind of update, imagination included, in a CUDA
    graph."""
    try:
        torch.compile(lambda x: torch.sin(x) + 1)(torch.zeros(8, device=learner.device))  # is there a working compiler?
    except Exception as e:
        return say(f"warning: torch.compile does not work here ({type(e).__name__}); going on without it")
    say("compiling: the first steps take a minute or more (--no-compile starts at once)")
    for network in (model.denoiser.inner_model, model.rew_end_model.encoder, model.actor_critic.encoder):
        network.compile(dynamic=False)  # in place: parameter names in checkpoints stay as they are
    if learner.device.type == "cuda":
        learner.steps = {kind: Graphed(step) for kind, step in learner.steps.items()}


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


def uncompiled(args):  # shared
    """Run what is compiled eagerly inside: other batch sizes and lengths are not worth a compilation each."""
    return torch.compiler.set_stance("force_eager") if args.compile else contextlib.nullcontext()


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

    @staticmethod
    def row_bytes(image):
        return math.prod(image) + 4 + 4 + 1

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


def resize(image, size):  # shared
    """(H, W, C) uint8 -> (size, size, C), bilinear."""
    if image.shape[:2] == (size, size):
        return image
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    return np.asarray(picture.resize((size, size), Image.BILINEAR)).reshape(size, size, -1)


@functools.cache
def area_weights(n, size):  # shared
    """(size, n): shares of n pixels in each of `size` cells of equal length, as OpenCV's INTER_AREA when it shrinks."""
    edges = np.arange(size + 1) * (n / size)
    low, high = np.maximum(edges[:-1, None], np.arange(n)), np.minimum(edges[1:, None], np.arange(n) + 1)
    return (np.maximum(high - low, 0) * (size / n)).astype(np.float32)


class AtariByLife(gym.Wrapper):
    """Frame skip with the maximum of the last two frames, random no-ops, area resizing, and, if wanted, episodes of one
    life."""

    complete = True  # no further wrapper repeats actions or draws

    def __init__(self, env, repeat, size, noop_max, episodic_life):
        super().__init__(env)
        self.repeat, self.size, self.noop_max, self.episodic_life = repeat, size, noop_max, episodic_life
        self.over, self.lives, self.last = True, 0, None
        self.observation_space = gym.spaces.Box(0, 255, (size, size, 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        if self.episodic_life and not self.over and not (options or {}).get("full"):
            # NOTE: a lost life must not reset the emulator: the next episode begins with the frame that ended this one.
            return self.last, {}
        frame, info = self.env.reset(seed=seed)
        for _ in range(np.random.default_rng(seed).integers(1, self.noop_max + 1) if self.noop_max else 0):
            frame, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                frame, info = self.env.reset()
        self.over, self.lives = False, self.unwrapped.ale.lives()
        self.last = self.picture(frame)
        return self.last, info

    def step(self, action):
        total, frames = 0.0, []
        for _ in range(self.repeat):
            frame, reward, terminated, truncated, info = self.env.step(action)
            total, frames = total + float(reward), [*frames[-1:], frame]
            if terminated or truncated:
                break
        self.over, lives = terminated or truncated, self.unwrapped.ale.lives()
        terminated = terminated or (self.episodic_life and lives < self.lives)
        # NOTE: a life that was won and lost again ends no episode: the authors' counter only falls.
        self.lives, self.last = min(lives, self.lives), self.picture(np.max(frames, axis=0))
        return self.last, total, terminated, truncated, info

    def picture(self, frame):
        rows, columns = (area_weights(n, self.size) for n in frame.shape[:2])
        # NOTE: not Pillow's box filter, which takes whole pixels only: up to 32 grey levels off on Breakout's frames.
        image = np.tensordot(rows, np.tensordot(columns, frame.astype(np.float32), (1, 1)), (1, 1))  # (size, size, 3)
        return np.rint(image).astype(np.uint8)


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


def atari_by_life(args):
    # NOTE: the v5 ids skip frames by themselves and without max-pooling; the skip is ours, and it is the only one.
    settings = dict(repeat_action_probability=args.sticky_actions, full_action_space=args.full_action_space)
    env = registered_env(args, frameskip=1, **settings)
    return AtariByLife(env, args.action_repeat or 4, args.image_size, args.noop_max, args.episodic_life)


def refuse_control(args):
    raise ValueError("DIAMOND needs Discrete actions; DeepMind Control has Box actions")


# Environments that are not built by gymnasium.make alone.
FAMILIES = {"ALE": atari_by_life, "dm_control": refuse_control}


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


def agent_policy(model, device, temperature=1.0, epsilon=0.0):
    """The trained actor (sampled actions), with its recurrent state, as a policy for play_episodes."""

    @torch.no_grad()
    def policy(obs, first, state):
        frames = frames_to_float(torch.as_tensor(image_of(obs), device=device)).permute(0, 3, 1, 2)
        blank = torch.zeros(len(first), model.actor_critic.units, device=device)
        keep = torch.as_tensor(~first, device=device).unsqueeze(1)
        # NOTE: in real environments the LSTM starts from zero, without burn-in.
        h, c = (v * keep for v in (state or (blank, blank)))
        logits, _, h, c = model.actor_critic(frames, h, c)
        action = draw_class(logits / temperature)
        if epsilon:
            uniform = torch.randint(model.actions, action.shape, device=device)
            action = torch.where(torch.rand(action.shape, device=device) < epsilon, uniform, action)
        return action.cpu().numpy(), (h, c)

    return policy


def image_of(obs):
    """The one image of Adapter's observations."""
    return next(iter(obs.values()))


def full_game(args):
    """Test episodes end when the game is over, not when a life is lost."""
    return replace(args, episodic_life=False)


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


def play_tests(args, policy, episodes, key, stop=None, store=None, keep=2_000):
    """Returns of one episode in each of `episodes` fresh environments, and the first `store` of these episodes (all, if
    None): [{frames (T+1, h, w, C), actions (T,), rewards (T,), end}]; of long ones the first `keep` transitions."""
    envs, state, first = make_envs(args, episodes, key), None, np.ones(episodes, bool)
    store, returns, alive = min(store or episodes, episodes), np.zeros(episodes), set(range(episodes))
    played = [dict(frames=[], actions=[], rewards=[], end=False) for _ in range(store)]
    try:
        obs, _ = envs.reset()
        for i, p in enumerate(played):
            p["frames"].append(image_of(obs)[i].copy())
        for t in range(args.max_episode_steps or 27_000):
            actions, state = policy(obs, first, state)
            obs, reward, terminated, truncated, infos = envs.step(actions)
            first = terminated | truncated
            for i in sorted(alive):
                returns[i] += reward[i]
                if t < keep and i < store:
                    last = image_of(infos["final_obs"][i]) if first[i] else image_of(obs)[i].copy()
                    played[i]["frames"].append(last)
                    played[i]["actions"].append(int(actions[i]))
                    played[i]["rewards"].append(float(reward[i]))
                    played[i]["end"] = bool(terminated[i])
                if first[i]:
                    alive.remove(i)
            if not alive or (stop and stop.signum):
                break
    finally:
        envs.close()
    stored = [{k: np.stack(p[k]) if k != "end" else p[k] for k in p} for p in played if p["actions"]]
    return [float(r) for r in returns], stored


def context_rows(episodes, picks, L, device):
    """Segments of L rows that end at row t of an episode, for (episode, t) in picks, as burn_in_starts takes them."""
    frames, actions, mask = [], [], []
    for e, t in picks:
        rows = np.arange(t - L + 1, t + 1)
        frames.append(episodes[e]["frames"][rows.clip(min=0)])
        taken = np.append(episodes[e]["actions"], 0)  # the last frame has no action
        actions.append(np.where(rows >= 0, taken[rows.clip(min=0)], 0))
        mask.append(rows >= 0)
    return {k: torch.as_tensor(np.stack(v), device=device) for k, v in
            (("frames", frames), ("actions", actions), ("mask", mask))}  # fmt: skip


@torch.no_grad()
def world_model_errors(model, episodes, args, device, most=600):
    """One imagined step after real context, on transitions of episodes that the model did not train on: squared errors
    (pixels in 0..1) beside those of repeating the frame and of a wrong action; share of frames that are right
    everywhere (within a quarter of the range); precision and recall of rewards and ends (most likely class), judged
    from the imagined frame, which is what the policy lives on, and (`_real`) from the true one."""
    picks = [(e, t) for e, p in enumerate(episodes) for t in range(len(p["actions"]))]
    picks = [picks[i] for i in np.linspace(0, len(picks) - 1, min(most, len(picks))).astype(int)]
    if not picks:
        return {}
    sampler, rows = sampler_settings(args), []
    shuffled = [picks[i] for i in np.random.default_rng(0).permutation(len(picks))]
    for i in range(0, len(picks), 64):
        some, others = picks[i : i + 64], shuffled[i : i + 64]
        start, _ = burn_in_starts(model, context_rows(episodes, some, args.frame_stack, device))
        truth = np.stack([episodes[e]["frames"][t + 1] for e, t in some])
        truth = frames_to_float(torch.as_tensor(truth, device=device)).permute(0, 3, 1, 2)
        wrong = torch.as_tensor([int(episodes[e]["actions"][t]) for e, t in others], device=device)
        wrong = torch.cat([start["actions"][:, :-1], wrong.unsqueeze(1)], 1)
        own = imagine_frame(model.denoiser, start["frames"], start["actions"], sampler)
        other = imagine_frame(model.denoiser, start["frames"], wrong, sampler)
        wm = start["wm_h"].unsqueeze(0), start["wm_c"].unsqueeze(0)
        last = start["frames"][:, -1:], start["actions"][:, -1:]
        judged = [model.rew_end_model(*last, x.unsqueeze(1), wm)[:2] for x in (own, truth)]
        now, gap = start["frames"][:, -1], lambda x: ((x - truth) / 2).square().flatten(1).mean(1)  # noqa: B023
        row = dict(mse=gap(own), copy=gap(now), wrong=gap(other), exact=(own - truth).abs().flatten(1).amax(1) <= 0.5)
        for name, (reward, end) in zip(("", "_real"), judged):
            row |= {f"reward{name}": reward[:, 0].argmax(-1) - 1, f"end{name}": end[:, 0].argmax(-1)}
        row["true_reward"] = torch.as_tensor([np.sign(episodes[e]["rewards"][t]) for e, t in some], device=device)
        ends = [episodes[e]["end"] and t == len(episodes[e]["actions"]) - 1 for e, t in some]
        rows.append(row | {"true_end": torch.as_tensor(ends, device=device).long()})
    r = {k: torch.cat([row[k] for row in rows]).cpu() for k in rows[0]}
    out = dict(one_step_mse=r["mse"], copy_previous_mse=r["copy"], wrong_action_mse=r["wrong"], exact_frames=r["exact"])
    if r["true_end"].any():
        out["exact_last_frames"] = r["exact"][r["true_end"] == 1]
    out = {k: float(v.float().mean()) for k, v in out.items()}
    everything = torch.ones_like(r["true_end"], dtype=torch.bool)
    for what in ("reward", "reward_real", "end", "end_real"):
        found = hits(what, r[what], r["true_" + what.removesuffix("_real")], 0, everything)
        out |= {k: float(v) for k, v in found.items()}
    return out


HORIZONS = (1, 5, 10, 20, 50, 100)


@torch.no_grad()
def open_loop(model, episodes, args, device, length=100, clips=8):
    """Dreams with the true actions after L frames of context, on the longest episodes. Squared errors by horizon (in
    0..1) beside those of repeating the last frame of the context; truth and dream {key: (clips, frames, h, w, C)},
    where a clip that is shorter repeats its last frame."""
    L, sampler, key = args.frame_stack, sampler_settings(args), "observation"
    longest = sorted(episodes, key=lambda p: -len(p["actions"]))[:clips]
    starts = [min(L - 1, max(0, len(p["actions"]) - 1)) for p in longest]
    steps = min(length, max(len(p["actions"]) - t for p, t in zip(longest, starts)))
    now, _ = burn_in_starts(model, context_rows(longest, list(enumerate(starts)), L, device))
    frames, actions, dream = now["frames"], now["actions"], []
    for k in range(steps):
        taken = [int(p["actions"][min(t + k, len(p["actions"]) - 1)]) for p, t in zip(longest, starts)]
        actions = torch.cat([actions[:, :-1], torch.as_tensor(taken, device=device).unsqueeze(1)], 1)
        frame = imagine_frame(model.denoiser, frames, actions, sampler).unsqueeze(1)
        frames, actions = torch.cat([frames[:, 1:], frame], 1), torch.cat([actions[:, 1:], actions[:, :1]], 1)
        dream.append(float_to_frames(frame[:, 0]).permute(0, 2, 3, 1).cpu().numpy())
    truth = []
    for p, t in zip(longest, starts):
        rows = np.arange(t - L + 1, t + steps + 1).clip(0, len(p["actions"]))
        truth.append(p["frames"][rows])
    truth, dream = np.stack(truth), np.stack(dream, 1)  # (clips, L + steps, h, w, C), (clips, steps, h, w, C)
    shown, errors = np.concatenate([truth[:, :L], dream], 1), {}
    for k in range(1, steps + 1):
        there = [i for i, (p, t) in enumerate(zip(longest, starts)) if t + k <= len(p["actions"])]
        a, b, c = (x[there].astype(np.float32) / 255 for x in (truth[:, L - 1 + k], dream[:, k - 1], truth[:, L - 1]))
        errors[k] = float(((b - a) ** 2).mean()), float(((c - a) ** 2).mean())
    out = {
        "open_loop_mse": np.mean([e for e, _ in errors.values()]),
        "copy_last_mse": np.mean([e for _, e in errors.values()]),
    }
    for k in HORIZONS:
        if k in errors:
            out[f"open_loop_mse_{k}"], out[f"copy_last_mse_{k}"] = errors[k]
    return {k: float(v) for k, v in out.items()}, {key: truth}, {key: shown}


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


def dream_frames(truth, shown, context):  # shared
    """Frames of the open-loop video: truth, model, difference below each other, clips side by side. The border is green
    while the model sees the truth and red while it dreams."""
    (clips, length), frames = next(iter(shown.values())).shape[:2], []
    for t in range(length):
        columns, color = [], (0, 180, 0) if t < context else (220, 0, 0)
        for n in range(min(4, clips)):
            a, b = (draw({k: v[n, t] for k, v in x.items()}) for x in (truth, shown))
            rows = [(a, (0, 0, 0)), (b, color), (((b.astype(int) - a) // 2 + 128).astype(np.uint8), (0, 0, 0))]
            for i, (image, border) in enumerate(rows):
                rows[i] = np.full((len(image) + 6, image.shape[1] + 6, 3), border, np.uint8)
                rows[i][3:-3, 3:-3] = image
            columns.append(np.concatenate(rows))
        frames.append(np.concatenate(columns, 1))
    return frames


def load_agent(path, device="cpu"):
    """Model and checkpoint of a run directory, to act or to dream: model, state."""
    state = load_checkpoint(path, "diamond")
    image = image_of(space_from(state["spaces"]["observation"])).shape
    model = Diamond(image, int(space_from(state["spaces"]["action"]).n), state["config"])
    model.load_state_dict(state["learner"]["model"])
    return model.to(device, memory_format=torch.channels_last).eval(), state


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


class DreamEnv(gym.Env):
    """The learned world as an environment. `path`: run directory. Rewards are signs, sampled like the ends.

    reset(options={"observations": (T, h, w, C), "actions": (T,)}) starts from real context, the last L frames of it
    (action t follows observation t; the last one is not used); without options from context kept in the checkpoint."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}

    def __init__(self, path, render_mode="rgb_array", max_steps=1000, device="cpu"):
        self.model, state = load_agent(path, device)
        self.device, self.render_mode, self.max_steps = torch.device(device), render_mode, max_steps
        self.space, self.context = space_from(state["spaces"]["observation"]), state["context"]
        self.key, args = next(iter(self.space)), state["args"]
        self.single = list(self.space) == ["observation"]
        self.observation_space = self.space["observation"] if self.single else self.space
        self.action_space, self.noise = space_from(state["spaces"]["action"]), torch.Generator(device)
        self.sampler = sampler_settings(Args(**{f.name: args[f.name] for f in fields(Args) if f.name in args}))

    @torch.no_grad()
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.noise.manual_seed(int(self.np_random.integers(2**31)))
        L, shape = self.model.frames, self.space[self.key].shape
        if options and "observations" in options:
            obs = options["observations"]
            frames = np.asarray(obs[self.key] if isinstance(obs, dict) else obs, np.uint8)
            actions = np.asarray(options.get("actions", ()), np.int64)
            T = len(actions)
            if not T or frames.shape != (T, *shape):
                found = f"got {frames.shape} and {T} actions"
                raise ValueError(f"observations and actions must both have T > 0 entries of {shape}, {found}")
            episode = dict(frames=frames, actions=actions[:-1])
            batch = context_rows([episode], [(0, T - 1)], L, self.device)
        else:
            if self.context is None:
                raise ValueError("this checkpoint was saved before any frame was stored: pass options")
            i = int(self.np_random.integers(len(self.context["actions"])))
            batch = {k: v[i : i + 1].to(self.device) for k, v in self.context.items()}
        start, _ = burn_in_starts(self.model, batch)
        self.frames, self.actions, self.steps = start["frames"], start["actions"], 0
        self.wm = start["wm_h"].unsqueeze(0), start["wm_c"].unsqueeze(0)
        return self.observe(), {}

    @torch.no_grad()
    def step(self, action):
        taken = torch.as_tensor([[int(action)]], device=self.device)
        actions = torch.cat([self.actions[:, :-1], taken], 1)
        frame = imagine_frame(self.model.denoiser, self.frames, actions, self.sampler, self.noise).unsqueeze(1)
        rewards, ends, self.wm = self.model.rew_end_model(self.frames[:, -1:], taken, frame, self.wm)
        reward = float(draw_class(rewards[:, 0], self.noise)) - 1
        end = bool(draw_class(ends[:, 0], self.noise))
        self.frames = torch.cat([self.frames[:, 1:], frame], 1)
        self.actions, self.steps = torch.cat([actions[:, 1:], actions[:, :1]], 1), self.steps + 1
        alive = float(torch.softmax(ends[0, 0], -1)[0])
        return self.observe(), reward, end, self.steps >= self.max_steps, {"continue": alive}

    def observe(self):
        self.obs = float_to_frames(self.frames[0, -1]).permute(1, 2, 0).cpu().numpy()
        return self.obs if self.single else {self.key: self.obs}

    def render(self):
        return draw({self.key: self.obs}, 256)


# [optional: play
class Autopilot(gym.Wrapper):
    """One action more, which hands over to the policy or back to the human."""

    def __init__(self, env, policy):
        super().__init__(env)
        self.policy, self.on, self.state, self.first = policy, False, None, True

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.obs, self.first = obs, True
        return obs, info

    def step(self, action):
        if action == self.env.action_space.n:
            self.on, action = not self.on, 0
        obs = {"observation": np.asarray(image_of(self.obs) if isinstance(self.obs, dict) else self.obs)[None]}
        chosen, self.state = self.policy(obs, np.array([self.first]), self.state)  # looks on while the human plays
        self.obs, *rest = self.env.step(int(chosen[0]) if self.on else action)
        self.first = False
        return self.obs, *rest


def side_by_side(args, env, episodes=4, most=200):
    """Frames of real episodes of the policy (right) beside a dream of them (left) that sees only their first L frames
    and then the same actions."""
    args = replace(args, num_envs=1)
    policy, pictures = agent_policy(env.model, "cpu"), []
    for p in play_tests(full_game(args), policy, episodes, key=4, keep=most)[1]:
        begin = min(env.model.frames, len(p["actions"])) - 1
        rows = slice(begin + 1)
        dream, _ = env.reset(seed=args.seed, options=dict(observations=p["frames"][rows], actions=p["actions"][rows]))
        for t in range(len(p["frames"])):
            if t > begin:
                dream = env.step(p["actions"][t - 1])[0]
            shown = p["frames"][t] if t < begin else image_of(dream) if isinstance(dream, dict) else dream
            columns = []
            for image, color in ((shown, (0, 180, 0) if t <= begin else (220, 0, 0)), (p["frames"][t], (0, 0, 0))):
                image = draw({env.key: image}, 192)
                column = np.full((len(image) + 8, image.shape[1] + 8, 3), color, np.uint8)
                column[4:-4, 4:-4] = image
                columns.append(column)
            pictures.append(np.concatenate(columns, 1))
    return pictures


def play(args):
    """Play inside the dream: digits and letters choose actions, m hands over to the policy and back. Also writes the
    dream beside the real game, for the same actions, as a GIF."""
    check_ranges(args, RANGES)
    env = DreamEnv(args.play)
    if env.context is None:
        fail(f"{args.play} has no frame to start a dream from: go on with --resume first")
    path, policy = os.path.join(args.play, "eval-dream.gif"), agent_policy(env.model, "cpu")
    torch.manual_seed(args.seed)
    if args.dataset:  # there is no real game beside it
        obs, _ = env.reset(seed=args.seed)
        frames, piloted = [env.render()], Autopilot(env, policy)
        piloted.obs, piloted.on = obs, True
        for _ in range(100):
            piloted.step(0)
            frames.append(env.render())
        save_gif(frames, path)
    else:
        save_gif(side_by_side(args, env), path)
    headless = sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    if headless or os.environ.get("SDL_VIDEODRIVER") == "dummy":
        what = "the policy's dream" if args.dataset else "the dream (left) beside the game (right)"
        return say(f"no display to play on: wrote {what} to {path}")
    from gymnasium.utils.play import play as play_env

    keys, n = "1234567890abcdefghijklnopqrstuvwxyz", int(env.action_space.n)
    mapping = {keys[i]: i for i in range(min(n, len(keys)))}
    say(f"keys: {', '.join(f'{k} = {v}' for k, v in mapping.items())}, m = policy or human; Escape ends; see {path}")
    play_env(Autopilot(env, policy), keys_to_action=mapping | {"m": n}, noop=0, zoom=2, fps=10)


# play]


# ---- Own data --------------------------------------------------------------------------------------------------------


def record_dataset(args, model=None, device="cpu"):
    """--record PATH: play --total-timesteps steps, at random or with an agent, and write them as a data set."""
    if not args.record.endswith(".npz"):
        fail(f"--record must end in .npz, got {args.record}")
    folder = os.path.dirname(os.path.abspath(args.record))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        fail(f"--record {args.record}: cannot write to {folder}")
    _, action_space = probe_env(args)
    envs, N, state = make_envs(args, args.num_envs, 5), args.num_envs, None
    policy = agent_policy(model, device) if model else random_policy(action_space, args.seed)
    rows, first, returns = [[] for _ in range(N)], np.ones(N, bool), []
    try:
        obs, _ = envs.reset()
        for step in range(-(-args.total_timesteps // N)):
            actions, state = policy(obs, first, state)
            before = image_of(obs).copy()
            obs, reward, terminated, truncated, infos = envs.step(actions)
            first = terminated | truncated
            over = first | (step == -(-args.total_timesteps // N) - 1)
            for i in range(N):
                rows[i].append((before[i], actions[i], reward[i], terminated[i], False))
                if over[i]:
                    last = image_of(infos["final_obs"][i]) if first[i] else image_of(obs)[i]
                    rows[i].append((last, 0, 0.0, False, True))
            if first.any():
                returns += [float(infos["final_info"]["episode"]["r"][i]) for i in np.flatnonzero(first)]
    finally:
        envs.close()
    kinds = dict(frames=np.uint8, actions=np.int64, rewards=np.float32, ends=bool, lasts=bool)
    columns = zip(kinds.items(), zip(*[row for r in rows for row in r]))
    data = {name: np.stack(column).astype(kind) for (name, kind), column in columns}
    temp = args.record.removesuffix(".npz") + ".tmp.npz"
    try:
        np.savez_compressed(temp, **data)
        os.replace(temp, args.record)
    except OSError as e:
        if os.path.exists(temp):
            os.remove(temp)
        raise SystemExit(f"could not write {args.record} ({type(e).__name__}: {e})") from None
    steps, episodes = int((~data["lasts"]).sum()), int(data["lasts"].sum())
    mean = f", mean return {np.mean(returns):.1f}" if returns else ""
    say(f"wrote {steps} steps in {episodes} episodes{mean} to {args.record}")
    return dict(steps=steps, episodes=episodes)


def load_dataset(path):
    """A data set (see `Args.dataset`) as episodes [{frames (T+1, h, w, C), actions (T,), rewards (T,), end}], whether
    it has rewards and ends, and the number of actions."""
    flag = f"--dataset {path}"
    try:
        with np.load(path, allow_pickle=False) as f:
            data = {k: f[k] for k in f.files}
    except Exception as e:  # not there, not an archive, objects inside
        fail(f"{flag} is no readable .npz file of plain arrays ({type(e).__name__})")
    found = ", ".join(f"{k} {v.dtype} {v.shape}" for k, v in data.items()) or "nothing"
    frames, actions = data.get("frames"), data.get("actions")
    if frames is None or actions is None:
        fail(f"{flag} needs frames and actions, found {found}")
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] not in (1, 3):
        fail(f"{flag}: frames must be uint8 (n, height, width, 1 or 3), found {found}")
    if any(v.shape != frames.shape[:1] for k, v in data.items() if k != "frames") or len(frames) < 2:
        fail(f"{flag}: every array must have the length of frames, at least 2; found {found}")
    if actions.dtype.kind not in "iu" or actions.min() < 0:
        fail(f"{flag}: actions must be integers from 0, found {found}, least {actions.min()}")
    if ("rewards" in data) != ("ends" in data):
        fail(f"{flag}: rewards and ends belong together, found {found}")
    if "ends" in data and "lasts" not in data and data["ends"].any():
        fail(f"{flag}: ends without lasts: the frame after an end is needed too; found {found}")
    lasts = data.get("lasts", np.zeros(len(frames), bool)).astype(bool)
    lasts[-1], begin, episodes = True, 0, []
    rewards, ends = (data.get(k, np.zeros(len(frames))) for k in ("rewards", "ends"))
    for last in np.flatnonzero(lasts):
        rows = slice(begin, last)
        if ends[begin : max(begin, last - 1)].any():
            fail(f"{flag}: an end before the last action of an episode, around row {begin}")
        if last > begin:
            parts = dict(frames=frames[begin : last + 1], actions=actions[rows].astype(np.int64), rewards=rewards[rows])
            episodes.append(parts | {"end": bool(ends[last - 1])})
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
    "evaluate play target_return total_timesteps eval_episodes log_every replay_cuda init_from record dataset".split()
)
# Flags that shape the networks.
SHAPES = (
    "frame_stack denoiser_channels denoiser_depths denoiser_cond rew_end_channels rew_end_depths rew_end_cond "
    "rew_end_lstm sigma_data sigma_offset actor_channels actor_lstm"
).split()


def check_args(args):
    """Everything that can be said before an environment is built."""
    check_ranges(args, RANGES)
    for name in SHAPES:
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        if isinstance(value, str) and not re.fullmatch(r"[1-9]\d{0,4}(,[1-9]\d{0,4})*", value):
            fail(f"{flag} must be numbers of at least 1 with commas between them, got {value!r}")
    starts = f"--learning-starts {args.learning_starts}"
    untrained = args.total_timesteps <= args.learning_starts and not (args.model_free or args.dataset or args.record)
    least = args.num_envs * (max(args.rew_end_length, args.frame_stack + 2) + 1)
    levels = {k: (getattr(args, f"{k}_channels"), getattr(args, f"{k}_depths")) for k in ("denoiser", "rew_end")}
    uneven = [k.replace("_", "-") for k, (a, b) in levels.items() if a.count(",") != b.count(",")]
    widths = [int(n) for name in ("denoiser", "rew_end", "actor") for n in getattr(args, f"{name}_channels").split(",")]
    odd = [n for n in widths if n > 32 and n % 32 or n % max(1, n // 8)]
    deepest = args.actor_channels.count(",") + 1
    for wrong, message in [
        (untrained, f"--total-timesteps {args.total_timesteps} must be more than {starts}: nothing would be trained"),
        (args.learning_starts_max < args.learning_starts, f"--learning-starts-max {args.learning_starts_max} is less "
         f"than {starts}"),
        (args.buffer_size < least, f"--buffer-size {args.buffer_size} is less than --num-envs x (longest segment + 1) "
         f"= {least}"),
        (uneven, f"--{uneven and uneven[0]}-channels and --{uneven and uneven[0]}-depths must have the same length"),
        (odd, f"widths must be at most 32 or a multiple of 32, and fit heads of 8 channels, got {odd and odd[0]}"),
        (args.denoiser_cond % 2 or args.denoiser_cond % args.frame_stack, f"--denoiser-cond {args.denoiser_cond} must "
         f"be even and a multiple of --frame-stack {args.frame_stack}: remainder "
         f"{args.denoiser_cond % args.frame_stack}"),
        (args.image_size >> deepest < 1, f"--actor-channels halves images {deepest} times: too often for --image-size "
         f"{args.image_size}"),
        (args.sigma_min > args.sigma_max, f"--sigma-min {args.sigma_min} is more than --sigma-max {args.sigma_max}"),
        (args.rew_end_length < 2, f"--rew-end-length must be at least 2, got {args.rew_end_length}"),
        (args.model_free and (args.dataset or args.init_from), "--model-free has no world model: it does not go with "
         "--dataset or --init-from"),
        (re.search(r"[/\\\0]", args.exp_name), f"--exp-name must not contain a slash, got {args.exp_name!r}"),
    ]:  # fmt: skip
        if wrong:
            fail(message)
    for name in ("init_from", "dataset"):
        path = getattr(args, name)
        if path and not os.path.isfile(path):
            fail(f"--{name.replace('_', '-')} {path}: no such file")
    try:
        assert isinstance(json.loads(args.env_kwargs), dict)
    except (ValueError, AssertionError):
        fail(f"--env-kwargs must be a JSON object, got {args.env_kwargs!r}")
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
        fail(f"{flag}: DIAMOND needs Discrete actions, found {action_space}")
    if len(obs_space) != 1 or len(image_of(obs_space).shape) != 3:
        keys = ", ".join(f"{k!r} {s.dtype} {s.shape}" for k, s in obs_space.items())
        fail(f"{flag}: DIAMOND needs one image as its observation (--pixels draws one), found {keys}")
    if not limited:
        say(f"warning: {args.env_id} has no time limit; evaluation stops after 27000 steps (set --max-episode-steps)")
    return obs_space, action_space


def evaluate_run(args):
    """--evaluate RUN: returns of fresh episodes of a trained agent. Writes only RUN/eval-*, or with --record a data
    set."""
    check_ranges(args, RANGES)
    state = load_checkpoint(args.evaluate, "diamond")
    if state["random_return"] is None:
        reason = "was trained on a data set" if args.dataset else "was stopped before its first episode"
        fail(f"{args.evaluate} {reason}, there is no agent to evaluate; see --play and --resume")
    for found, name in zip(probe_env(args), ("observation", "action"), strict=True):
        if space_to(found) != state["spaces"][name]:
            trained = space_from(state["spaces"][name])
            fail(f"--env-id {args.env_id} has the {name} space {found}, {args.evaluate} was trained on {trained}")
    device = choose_device(args)
    seed_everything(args, device)
    model, state = load_agent(args.evaluate, device)
    if args.record:
        return record_dataset(args, model, device)
    video = os.path.join(args.evaluate, "eval-episode.gif") if args.capture_video else None
    returns = play_episodes(full_game(args), agent_policy(model, device), args.eval_episodes, 1, video)
    score, std, random_return = float(np.mean(returns)), float(np.std(returns)), state["random_return"]
    result = dict(episodic_return=score, std=std, returns=returns, random_return=random_return)
    result |= dict(global_step=state["global_step"])
    write_json(result, os.path.join(args.evaluate, f"eval-{state['global_step']}.json"))
    say(f"returns of {len(returns)} episodes: " + " ".join(f"{r:g}" for r in returns))
    finish(args, score, random_return, f" +- {std:.1f}")
    return result


def report(args, model, run, step, episodes, device, logger):
    """Errors of the world model on test episodes, and the open-loop video."""
    errors = world_model_errors(model, episodes, args, device)
    more, truth, shown = open_loop(model, episodes, args, device)
    errors |= more
    logger.scalars({f"eval/{k}": v for k, v in errors.items()}, step)
    path = os.path.join(run, "videos", f"open_loop-{step}.gif")
    logger.video("eval/open_loop", dream_frames(truth, shown, args.frame_stack), step, path)
    ratio = errors["one_step_mse"] / max(errors["copy_previous_mse"], 1e-12)
    words = [f"{k} {errors[f'{k}_precision']:.2f}/{errors[f'{k}_recall']:.2f}" for k in ("reward", "end")]
    say(f"next frame / copy {ratio:.3f}, exact {errors['exact_frames']:.2f}; precision/recall: {', '.join(words)}")
    return errors


def main(args):  # shared
    """Returns the final metrics; raises SystemExit with the exit codes of the README."""
    try:
        return play(args) if args.play else evaluate_run(args) if args.evaluate else train(args)
    except EnvFault as e:
        traceback.print_exc()
        raise SystemExit(f"{e}; checkpoints are untouched") from None
    except FloatingPointError as e:
        raise SystemExit(f"{e}; ckpt.pt, if there is one, is from before it") from None


def resumed(args):
    """Lock the run to continue and read its checkpoint: (lock, state, None), or the result if there is nothing to
    do."""
    for name, value in load_args(args.resume).items():
        if name not in CHANGEABLE and getattr(args, name, value) != value:
            flag = "--" + name.replace("_", "-")
            fail(f"{flag} is {value} in {args.resume}, got {getattr(args, name)}: a run cannot change it")
    state, result = load_checkpoint(args.resume, "diamond"), os.path.join(args.resume, "result.json")
    if state["global_step"] >= args.total_timesteps and os.path.exists(result):
        say(f"nothing to do: step {state['global_step']} of {args.total_timesteps}")
        with open(result, encoding="utf-8") as f:
            return None, None, json.load(f)
    lock = lock_run(args.resume)
    return lock, load_checkpoint(args.resume, "diamond", repair=True), None  # nobody else writes from here on


def place_replay(args, capacity, num_envs, image, device):
    """Where the replay goes and its size in GB; exit code 2 if it fits nowhere."""
    size = num_envs * capacity * FrameReplay.row_bytes(image) / 1e9
    # On the GPU if it fits and leaves a fifth of the memory to the update, else in host memory; a checkpoint copies it.
    cpu = torch.device("cpu")
    store = device if args.replay_cuda and size <= 0.8 * free_memory(device) / 1e9 else cpu
    host, free = size * (args.save_replay + (store == cpu)), free_memory(cpu) / 1e9
    if host > free:
        hint = f"lower --buffer-size, now {args.buffer_size}"
        hint += ", or try --no-save-replay" if args.save_replay else ""
        fail(f"replay needs {host:.1f} GB, {free:.1f} GB free: {hint}")
    return store, size


class Session:
    """What training in an environment and training on a data set have in common: networks, replay, logs, the updates
    that are due, checkpoints."""

    def __init__(self, args, obs_space, action_space, capacity, num_envs, state, lock):
        self.args, self.spaces = args, {"observation": space_to(obs_space), "action": space_to(action_space)}
        image, actions = image_of(obs_space).shape, int(action_space.n)
        self.config = {k: getattr(args, k) for k in SHAPES}
        self.device = device = choose_device(args)
        store, size = place_replay(args, capacity, num_envs, image, device)
        with torch.device("meta"):  # --init-from that does not fit is found before the first file is made
            model = Diamond(image, actions, self.config)
        if args.init_from and not state:
            load_authors_weights(model.to_empty(device="cpu"), args.init_from)
        named = replace(args, env_id=os.path.basename(args.dataset)) if args.dataset else args
        self.run = args.resume or new_run_dir(named)
        self.lock = lock or lock_run(self.run)  # held until the process ends
        seed_everything(args, device)
        write_run_info(self.run, args, __file__, device)
        axis = "updates" if args.dataset else "global_step"  # of the curves
        self.logger = Logger(self.run, args, purge_step=state[axis] + 1 if state else None)
        self.stop = StopSignal()
        with torch.device(device):
            self.model = Diamond(image, actions, self.config)
        if args.init_from and not state:
            load_authors_weights(self.model, args.init_from)
        self.model.to(memory_format=torch.channels_last)
        self.learner = DiamondLearner(self.model, args, device)
        self.replay = FrameReplay(capacity, num_envs, image, store, args.seed)
        # due: updates of each kind that this epoch still owes, None before; epoch: those completed; finals: those of
        # them, or this one, after the last collection; begun: agent steps when the epoch began; goal: when it learns.
        self.global_step, self.updates, self.random_return = 0, 0, None
        self.due, self.epoch, self.finals, self.begun, self.goal = None, 0, 0, 0, args.learning_starts
        self.signs, self.recent, self.metrics = [0, 0, 0], deque(maxlen=100), {}
        self.seconds = dict.fromkeys(self.learner.steps, 0.0)
        self.counts = dict.fromkeys(self.learner.steps, 0)
        parts = ("denoiser", "rew_end_model", "actor_critic")
        sizes = ", ".join(f"{n} {count_params(getattr(self.model, n)):,}" for n in parts)
        say(f"run: {self.run}\nparameters: {count_params(self.model):,} ({sizes})")
        say(f"replay: {num_envs} x {capacity:,} rows, {size:.2f} GB on {store}")

    COUNTERS = "global_step updates random_return due epoch finals begun goal signs".split()

    def load(self, state):
        self.learner.load_state_dict(state["learner"])
        for name in self.COUNTERS:
            setattr(self, name, state[name])
        self.recent.extend(state["recent"])
        self.metrics = dict(state["metrics"])
        if state["replay"]:
            self.replay.load_state_dict(state["replay"])
        set_rng_state(state["rng"])

    def save(self, episodes=()):
        """`episodes`: the number of episodes that each environment has begun, which seeds the next one."""
        context = None
        if len(self.replay.drawable()[1]):  # a few stretches of real experience for dreams to start from
            context = self.replay.segments(16, self.args.frame_stack, np.random.default_rng(0))
            context = {k: context[k].cpu() for k in ("frames", "actions", "mask")}
        plain = dict(script="diamond", args=asdict(self.args), config=self.config, spaces=self.spaces, context=context)
        plain |= {name: getattr(self, name) for name in self.COUNTERS}
        plain |= dict(recent=list(self.recent), metrics={k: float(v) for k, v in self.metrics.items()})
        plain |= dict(episodes=list(episodes), rng=rng_state(), learner=self.learner.state_dict())
        plain |= dict(replay=self.replay.state_dict() if self.args.save_replay else None)
        atomic_save(plain, os.path.join(self.run, "ckpt.pt"))

    def stopped(self):
        """Leave after a stop signal, when the checkpoint is written."""
        self.logger.close()
        again = f"python {shlex.quote(sys.argv[0])} --resume {shlex.quote(self.run)}"
        say(f"stopped by signal {self.stop.signum} at step {self.global_step}; to go on: {again}")
        raise SystemExit(128 + self.stop.signum)

    def owe(self, kinds):
        """The updates of an epoch: many in the first one."""
        prefix = "first_" if self.epoch == 0 else ""
        self.due = {kind: getattr(self.args, f"{prefix}{kind}_updates") for kind in kinds}

    def learn(self, rollout=None):
        """Make the updates that are due, in order, unless a signal comes. `rollout`: real experience, model-free."""
        args, learner = self.args, self.learner
        clock = time.process_time if self.device.type == "cpu" else time.time
        for kind in [k for k, n in self.due.items() if n]:
            began = clock()
            while self.due[kind] and not self.stop.signum:
                if kind == "actor" and not args.model_free and learner.dream is None:
                    learner.begin(to_torch(self.replay.batch("begin", args), self.device))
                batch = rollout or to_torch(self.replay.batch(kind, args), self.device)
                try:
                    self.metrics |= learner.update(kind, batch)
                except torch.cuda.OutOfMemoryError:
                    where = f"step {self.global_step} ({kind}, batch {args.batch_size})"
                    hint = "--imag-envs or --start-pool" if kind == "actor" else "--batch-size"
                    raise SystemExit(f"out of GPU memory at {where}: lower {hint}") from None
                self.updates, self.due[kind] = self.updates + 1, self.due[kind] - 1
                self.counts[kind] += 1
                if self.device.type == "cpu":  # on a GPU this would wait for the device: there, when metrics are read
                    learner.check(f"step {self.global_step}, update {self.updates}")
            self.seconds[kind] += clock() - began
        if not self.stop.signum:
            self.due, self.epoch = None, self.epoch + 1

    def where(self):
        return f"step {self.global_step}, update {self.updates}"

    def log(self, step, mark):
        """Scalars since `mark` (time, agent steps, updates). Metrics are read here only: reading waits for the
        device."""
        self.learner.check(self.where())
        seconds, steps, count = (a - b for a, b in zip((time.time(), self.global_step, self.updates), mark))
        repeat = self.args.action_repeat or (4 if env_family(self.args) == "ALE" else 1)
        tags = {"SPS": steps / max(seconds, 1e-9), "updates_per_s": count / max(seconds, 1e-9)}
        tags |= {"updates": self.updates, "epochs": self.epoch, "env_frames": self.global_step * repeat}
        tags = {f"charts/{k}": v for k, v in tags.items()}
        for k, v in self.metrics.items():
            tags[("charts/" if k.startswith("learning_rate") else "losses/") + k] = float(v)
        self.logger.scalars(tags, step)
        return tags

    def pace(self, start):
        """The line about time, and its numbers for result.json."""
        seconds, unit = time.time() - start[0], "CPU ms" if self.device.type == "cpu" else "ms"
        each = {k: 1000 * self.seconds[k] / n for k, n in self.counts.items() if n}
        words = ", ".join(f"{k} {v:.1f}" for k, v in each.items())
        say(f"{seconds / 60:.1f} minutes, {self.updates - start[2]} updates; {unit} per update: {words or 'none'}")
        return dict(minutes=seconds / 60, run=self.run, peak_memory_gb=peak_memory(self.device))


def train(args):
    """The whole algorithm (alg. 1): collect a few steps, train the denoiser, the reward/end model, and the actor-critic
    in imagination, repeat. Returns the metrics."""
    # Set up, in an order that finds every mistake of the user's before the first file is made.
    check_args(args)
    if args.record:
        return record_dataset(args)
    if args.dataset:
        return fit(args)
    lock, state, result = resumed(args) if args.resume else (None, None, None)
    if result:
        return result
    obs_space, action_space = probe_env(args)
    N, everyone = args.num_envs, np.arange(args.num_envs)
    # Rows per environment. A run can fill two per agent step: an episode's end takes one more.
    capacity = -(-min(args.buffer_size, 2 * args.total_timesteps + 4 * N) // N)
    s = Session(args, obs_space, action_space, capacity, N, state, lock)
    run, device, stop, learner, replay, logger = s.run, s.device, s.stop, s.learner, s.replay, s.logger
    model, kinds = s.model, ("actor",) if args.model_free else ("denoiser", "rew_end", "actor")
    envs = make_envs(args, N)
    if state:
        s.load(state)
        for env, episode in zip(envs.envs, state["episodes"], strict=True):
            env.env.episode = episode
        if not state["replay"] and not args.model_free:
            say("warning: this run was saved without its replay (--no-save-replay): it is collected anew")
            s.due, s.goal = None, s.global_step + args.learning_starts
            if s.global_step >= args.total_timesteps:
                s.finals = args.final_epochs  # nothing is left to learn from
        if args.model_free:
            s.due = None  # the rollout that an interrupted update was for is gone
        if s.global_step < args.total_timesteps:
            s.finals = 0  # --total-timesteps has grown
        say(f"resumed at step {s.global_step} of {args.total_timesteps}, update {s.updates}")
    if s.random_return is None:
        policy = random_policy(action_space, args.seed)
        returns = play_episodes(full_game(args), policy, args.eval_episodes, 2, stop=stop)
        s.random_return = None if stop.signum else float(np.mean(returns))
        say(f"random policy: {np.mean(returns):.1f} +- {np.std(returns):.1f} over {len(returns)} episodes")
    # [optional: compile
    if args.compile:
        compile_diamond(model, learner)
    # compile]

    def numbers():
        return [e.env.episode for e in envs.envs]

    def fresh():
        """Start new episodes everywhere, whole games: observations, is_first, the policy's state."""
        obs = envs.reset(options={"full": True} if env_family(args) == "ALE" else None)[0]
        replay.begin(everyone, image_of(obs))
        return obs, np.ones(N, bool), None

    def rare():
        """Whether both rarer reward signs together were still seen less than 10 times (code)."""
        return sum(sorted(s.signs)[:2]) < 10

    if stop.signum:
        s.save(numbers())
        s.stopped()
    explore = agent_policy(model, device, args.temperature_collect, 0.0 if args.model_free else args.epsilon)
    start = mark = time.time(), s.global_step, s.updates
    obs, is_first, carry = fresh()
    rollout = None
    while s.due is not None or s.global_step < args.total_timesteps or s.finals < args.final_epochs:
        # Alg. 1: collect_experience. The last epochs only learn.
        if s.due is None and s.global_step >= args.total_timesteps:
            s.finals += 1
            s.owe(kinds)
        rows = []
        while s.due is None and not stop.signum:
            with uncompiled(args):
                before = carry
                actions, carry = explore(obs, is_first, carry)
            frames, first = image_of(obs).copy(), is_first
            obs, reward, terminated, truncated, infos = envs.step(actions)
            s.global_step += N
            is_first = terminated | truncated
            following = image_of(obs)
            if is_first.any():
                ended = np.flatnonzero(is_first)
                following = following.copy()
                for i in ended:  # NOTE: the true last frame, not the first one of the next episode
                    following[i] = image_of(infos["final_obs"][i])
                    s.recent.append(float(infos["final_info"]["episode"]["r"][i]))
                    length = int(infos["final_info"]["episode"]["l"][i])
                    tags = {"charts/episodic_return": s.recent[-1], "charts/episodic_length": length}
                    logger.scalars(tags, s.global_step)
            replay.add(everyone, actions, reward, terminated, following)
            if is_first.any():
                replay.close(ended)
                replay.begin(ended, image_of(obs)[ended])
            for sign in np.sign(reward).astype(int):
                s.signs[sign + 1] += 1
            if args.model_free:
                rows.append(real_row(model, device, before, carry, frames, first, following, actions, reward,
                                     terminated, truncated))  # fmt: skip
                if len(rows) == args.imag_horizon:
                    rollout, rows = {k: torch.stack([r[k] for r in rows]) for k in rows[0]}, []
                    s.due = {"actor": 1}
            elif s.global_step >= min(s.goal, args.total_timesteps):
                if s.epoch == 0 and rare() and s.global_step < min(args.learning_starts_max, args.total_timesteps):
                    s.goal = min(s.global_step + args.collect_steps, args.learning_starts_max)
                else:
                    s.owe(kinds)

        # Alg. 1: update_diffusion_model, update_reward_end_model, update_actor_critic.
        if s.due is not None:
            s.learn(rollout)
        if stop.signum:
            learner.check(s.where())
            replay.close(np.array(sorted(replay.open)))
            s.save(numbers())
            s.stopped()
        stride, s.begun, s.goal = s.global_step - s.begun, s.global_step, s.global_step + args.collect_steps

        # Log, test, save.
        ending = s.global_step >= args.total_timesteps and (s.finals >= args.final_epochs or args.model_free)
        if args.model_free and ending:
            s.finals = args.final_epochs
        if passed(args.log_every, s.global_step, stride) or s.finals or ending:
            tags = s.log(s.global_step, mark)
            mark = time.time(), s.global_step, s.updates
            shown = f"{np.mean(list(s.recent)[-10:]):.1f}" if s.recent else "none yet"
            pace = f"updates={s.updates}, SPS={tags['charts/SPS']:.0f}"
            say(f"global_step={s.global_step}, episodic_return={shown}, {pace}")
        if passed(args.report_every, s.global_step, stride):
            with uncompiled(args):
                key = 1000 + s.global_step
                returns, tests = play_tests(full_game(args), agent_policy(model, device), args.test_episodes, key, stop)
                logger.scalars({"eval/episodic_return": float(np.mean(returns))}, s.global_step)
                say(f"test episodes at step {s.global_step}: {np.mean(returns):.2f} over {len(returns)}")
                if not args.model_free and not stop.signum:
                    report(args, model, run, s.global_step, tests, device, logger)
        if passed(args.save_every, s.global_step, stride) or ending or s.finals % 10 == 9:
            learner.check(s.where())
            # NOTE: unfinished episodes end at scheduled checkpoints as truncated ones, interrupted or not: that is what
            # makes a resumed run repeat the unbroken one. (A stop signal cuts where the unbroken run would not.)
            replay.close(everyone)
            s.save(numbers())
            if stop.signum:
                s.stopped()
            obs, is_first, carry = fresh()
    envs.close()

    # Final evaluation on fresh episodes, and the self-check against --target-return.
    more = s.pace(start)
    with uncompiled(args):
        policy = agent_policy(model, device)
        returns, tests = play_tests(full_game(args), policy, args.eval_episodes, 1, stop, store=args.test_episodes)
        if stop.signum:
            s.stopped()
        errors = {}
        if not args.model_free:
            errors = world_model_errors(model, tests, args, device) | open_loop(model, tests, args, device)[0]
    if args.capture_video:
        save_gif([draw({"frame": x}) for x in tests[0]["frames"]], os.path.join(run, "videos", "episode.gif"))
    score, std = float(np.mean(returns)), float(np.std(returns))
    logger.scalars({"eval/episodic_return": score, "eval/episodic_return_std": std}, s.global_step)
    logger.close()
    result = dict(episodic_return=score, episodic_return_std=std, returns=returns, random_return=s.random_return)
    result |= dict(global_step=s.global_step, updates=s.updates, prediction_errors=errors, **more)
    result |= dict(train_return=float(np.mean(list(s.recent)[-10:])) if s.recent else None)
    write_json(result, os.path.join(run, "result.json"))
    finish(args, score, s.random_return)
    return result


@torch.no_grad()
def real_row(model, device, before, after, frames, first, following, actions, reward, terminated, truncated):
    """One step in the real environments as a row of a rollout (see `imagine_rollout`), for --model-free."""
    blank = torch.zeros(len(first), model.actor_critic.units, device=device)
    keep = torch.as_tensor(~first, device=device).unsqueeze(1)
    h, c = (v * keep for v in (before or (blank, blank)))
    row = dict(action=actions, reward=reward.astype(np.float32), end=terminated, trunc=truncated, reset=first)
    row = {k: torch.as_tensor(v, device=device) for k, v in row.items()} | dict(h=h, c=c)
    row["frame"], last = (
        frames_to_float(torch.as_tensor(x, device=device)).permute(0, 3, 1, 2) for x in (frames, following)
    )
    return row | {"bootstrap": model.actor_critic(last, *after)[1]}


def fit(args):
    """--dataset: train the world model alone, on the data of a file. Returns the metrics."""
    lock, state, result = resumed(replace(args, total_timesteps=0)) if args.resume else (None, None, None)
    if result:
        return result
    episodes, rewarded, actions = load_dataset(args.dataset)
    image = episodes[0]["frames"].shape[1:]
    # NOTE: frames keep their size; a large one is a large network input. The actor is built, too, but never trained.
    if min(image[:2]) >> (args.actor_channels.count(",") + 1) < 1:
        fail(f"--dataset {args.dataset}: frames of {image[0]}x{image[1]} are too small for --actor-channels")
    obs_space = gym.spaces.Dict(observation=gym.spaces.Box(0, 255, image, np.uint8))
    training, tests = split_dataset(episodes)
    rows = sum(len(p["frames"]) for p in training)
    s = Session(args, obs_space, gym.spaces.Discrete(actions), rows, 1, state, lock)
    run, stop, learner, replay = s.run, s.stop, s.learner, s.replay
    kinds = ("denoiser", "rew_end") if rewarded else ("denoiser",)
    say(f"data: {len(training)} episodes, {rows - len(training)} steps, {actions} actions; {len(tests)} for testing")
    for p in training:
        replay.begin(np.array([0]), p["frames"][:1])
        T = len(p["actions"])
        for t in range(T):
            end = p["end"] and t == T - 1
            replay.add(
                np.array([0]), p["actions"][t : t + 1], p["rewards"][t : t + 1], [end], p["frames"][t + 1 : t + 2]
            )
        replay.close(np.array([0]))
    if state:
        generator = state["replay"] and state["replay"].pop("rng")
        s.load(state | {"replay": None})
        if generator:
            replay.rng.bit_generator.state = generator
        say(f"resumed at update {s.updates}")
    # [optional: compile
    if args.compile:
        compile_diamond(s.model, learner)
    # compile]
    start, errors = (time.time(), 0, s.updates), None
    mark = start
    while s.due is not None or s.epoch <= args.final_epochs:
        if s.due is None:
            s.owe(kinds)
        s.learn()
        if stop.signum:
            learner.check(s.where())
            s.save()
            s.stopped()
        s.log(s.updates, mark)
        mark = time.time(), 0, s.updates
        say(f"epoch {s.epoch} of {1 + args.final_epochs}, updates={s.updates}")
        with uncompiled(args):
            errors = report(args, s.model, run, s.updates, tests, s.device, s.logger)
        s.save()
    if errors is None:  # killed after its last checkpoint
        errors = report(args, s.model, run, s.updates, tests, s.device, s.logger)
    s.logger.close()
    result = dict(global_step=0, updates=s.updates, prediction_errors=errors, **s.pace(start))
    write_json(result, os.path.join(run, "result.json"))
    return result


if __name__ == "__main__":
    main(parse_args(Args, PRESETS, __doc__.split("\n\n    python")[0]))
