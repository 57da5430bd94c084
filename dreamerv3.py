# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch>=2.11,<2.14", "numpy>=2", "tyro>=1", "tensorboard>=2.20", "pillow>=10", "ale-py>=0.11", "minatar>=1.0.15",
#     "gymnasium[box2d,classic-control]>=1.2,<2", "dm_control==1.0.50", "mujoco==3.17.0",
# ]
# ///
"""DreamerV3: Mastering Diverse Control Tasks through World Models.
Hafner, Pasukonis, Ba, Lillicrap. Nature 640:647-653 (2025); equations as in arXiv:2301.04104v2 (2024).

A recurrent state-space model (RSSM) learns from replayed sequences to compress observations into discrete latents and
to predict them, the reward and the end of the episode. An actor and a critic learn only from rollouts that the model
imagines. One set of hyperparameters for all domains; only the model size and the train ratio vary.

    python dreamerv3.py --env-id ALE/Pong-v5                          # the 200M model at full settings, on a GPU
    python dreamerv3.py --preset cpu                                  # CartPole-v1 on a laptop, minutes
    python dreamerv3.py --preset atari100k --env-id ALE/Boxing-v5     # other presets: see PRESETS
    python dreamerv3.py --resume runs/NAME                            # go on, bit for bit on a CPU
    python dreamerv3.py --evaluate runs/NAME                          # returns of fresh episodes
    python dreamerv3.py --play runs/NAME                              # play inside the learned world

Measured: see the README's result table; every row has its command, commit, hardware and seeds.

Differences from the paper and the authors' code, each with its reason:
  * Unfinished episodes are cut (stored as truncated) at every scheduled checkpoint, so that a resumed run repeats the
    unbroken one exactly. `--save-every` sets how often.
  * A finished episode adds its last observation as one more row, so environments advance at different rates in replay;
    the authors' driver spends a step on it. Agent steps are counted without that row.
  * Nearest x2 upsampling followed by a 5x5 convolution is computed as one 3x3 convolution (same function, see UpConv).
  * Latents are written back to replay in the same update; the authors' come one update late (asynchronous transfers).
  * `actor_unimix` is 1 % as in the paper; the authors' code has 0 for discrete policies. `--actor-unimix 0` mirrors it.
  * The default replay holds 2M rows instead of 5M, which no single GPU can hold beside the 200M model.
  * The first update comes after `--learning-starts` agent steps; the authors wait for as many sequences in replay.
  * Atari's limit of 108,000 frames is a truncation here; the authors store it as a terminal state.
  * Acting runs in float32, the authors' in bfloat16.
  * Presets follow the authors' configuration where it differs from the paper's table: see PRESETS.

What the earlier versions did differently. DreamerV1 (2020): 30 Gaussian latents, plain GRU, one KL with 3 free nats,
the actor trained by backpropagation through the dynamics, no target critic. DreamerV2 (2021): 32x32 categorical
latents without unimix, KL balancing 0.8/0.2, REINFORCE on Atari and dynamics backpropagation on control, MSE heads, a
hard-copied target critic. The 2023 preprint of V3: dense LayerNorm GRU, Adam with global clipping, bins uniform in
symlog space, no replay critic loss, no latents in replay. This file is the current algorithm.

The algorithm is in the parts Maths, Networks, Losses and Replay and in the loop of `train`; a reader may stop there.
The rest of the file makes it usable alone: environments, evaluation and dreams, checkpoints, checked flags.

Symbols in shape comments:
  B  batch (replayed sequences)       A  action dimensions             D  deterministic state h (deter)
  T  time (replayed steps)            E  encoder output (tokens)       S  groups of the stochastic state z (stoch)
  N  imagined rollouts, environments  U  units of an MLP               C  classes per group
  H  imagination horizon              K  bins of a two-hot head        G  blocks of the block-diagonal GRU
  F  feature = D + S*C                X  hidden width of the RSSM
Time convention, everywhere: row t holds observation t, the reward that came WITH it, its flags, and the action taken
AFTER seeing it. The action that led to row t is therefore action[t-1]; `is_first[t]` means that nothing before t
counts.
"""

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
from dataclasses import asdict, dataclass, fields
from typing import Literal, Optional

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import nn

# ---- Args and presets ------------------------------------------------------------------------------------------------


# A default without an equation is the authors' configuration of May 2026, which is the paper's hyperparameter table
# unless the docstring above lists the difference.
@dataclass
class Args:
    # ---- Experiment
    exp_name: str = "dreamerv3"
    """name of the experiment, part of the run directory"""
    preset: Literal["full", "cpu", "cpu_pixels", "atari100k", "atari", "dmc_proprio", "dmc_vision", "crafter"] = "full"
    """named settings; explicit flags win over them"""
    seed: int = 1
    """seed of everything random: networks, noise, replay, environments"""
    torch_deterministic: bool = True
    """deterministic cuDNN kernels"""
    cuda: bool = True
    """use the GPU if there is one"""
    compile: bool = True
    """torch.compile the recurrent steps, and on a GPU capture the whole update in a CUDA graph"""
    bf16: bool = True
    """compute in bfloat16 on a GPU (parameters, losses, statistics stay float32); on a CPU always float32"""
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
    save_every: int = 100_000
    """agent steps between checkpoints; unfinished episodes are cut there (see the docstring)"""
    save_replay: bool = True
    """keep the replay in the checkpoint; without it --resume starts with an empty one and is not bit-exact"""
    resume: Optional[str] = None
    """run directory to continue"""
    evaluate: Optional[str] = None
    """run directory to evaluate, nothing is trained"""
    play: Optional[str] = None
    """run directory whose dream is played with the keyboard"""
    target_return: Optional[float] = None
    """exit with code 1 if the final evaluation stays below this"""

    # ---- Environment
    env_id: str = "ALE/Pong-v5"
    """any gymnasium id, `module:Id-v0`, `dm_control/<domain>-<task>-v0`, `Crafter-v1`"""
    env_kwargs: str = "{}"
    """JSON object passed to gymnasium.make"""
    total_timesteps: int = 10_000_000
    """agent steps, summed over environments"""
    num_envs: int = 16
    """environments in lockstep"""
    action_repeat: Optional[int] = None
    """environment steps per agent step (default: 4 for Atari, else 1)"""
    pixels: bool = False
    """observe rendered images instead of the environment's own observation"""
    image_size: int = 64
    """images are resized to this many pixels per side"""
    grayscale: bool = False
    """Atari in grey instead of RGB"""
    sticky_actions: float = 0.25
    """Atari: probability that the emulator repeats the previous action"""
    full_action_space: bool = False
    """Atari: all 18 actions instead of the game's minimal set"""
    noop_max: int = 30
    """Atari: up to this many no-ops at the start of an episode"""
    max_episode_steps: Optional[int] = None
    """agent steps after which an episode is truncated, at most the environment's own limit (default: that limit)"""

    # ---- World model
    size: Literal["1m", "12m", "25m", "50m", "100m", "200m", "400m"] = "200m"
    """model size (the paper's table of model sizes); the flags below that are None come from it"""
    deter: Optional[int] = None
    """D, units of the recurrent state"""
    hidden: Optional[int] = None
    """X, hidden width of the RSSM"""
    units: Optional[int] = None
    """U, width of encoder, decoder and heads"""
    cnn_depth: Optional[int] = None
    """channel multiplier of the convolutions"""
    classes: Optional[int] = None
    """C, classes per latent"""
    stoch: int = 32
    """S, number of categorical latents"""
    blocks: int = 8
    """G, blocks of the GRU"""
    mlp_layers: int = 3
    """layers of the vector encoder and decoder"""
    bins: int = 255
    """K, atoms of the reward and value distributions (odd)"""
    unimix: float = 0.01
    """share of the uniform distribution in every latent"""
    kl_free: float = 1.0
    """free nats per time step (eq. 3)"""
    dyn_scale: float = 1.0
    """weight of the dynamics loss (eq. 2)"""
    rep_scale: float = 0.1
    """weight of the representation loss (eq. 2)"""

    # ---- Behavior
    gamma: float = 1 - 1 / 333
    """discount, learned into the continue head (horizon 333)"""
    return_lambda: float = 0.95
    """lambda of the returns (eq. 5)"""
    imag_horizon: int = 15
    """H, imagined steps"""
    imag_starts: Optional[int] = None
    """replayed states to imagine from, drawn at random (default: all B*T)"""
    ent_coef: float = 3e-4
    """entropy scale of the actor (eq. 6)"""
    actor_unimix: float = 0.01
    """share of the uniform distribution in a discrete policy"""
    retnorm_rate: float = 0.01
    """update rate of the return percentiles (eq. 7)"""
    retnorm_limit: float = 1.0
    """returns are never scaled up beyond this range (eq. 7)"""
    tau: float = 0.02
    """update rate of the slow critic"""
    slow_reg: float = 1.0
    """weight of the critic's regulariser towards the slow critic"""
    repval_scale: float = 0.3
    """weight of the critic loss on replayed states"""

    # ---- Optimization
    buffer_size: int = 2_000_000
    """replay capacity in rows, summed over environments (the paper has 5M, 143 GB at 200M parameters and 64x64 images);
    never more is allocated than --total-timesteps can fill"""
    replay_cuda: bool = True
    """keep the replay on the GPU if it fits there, otherwise in host memory"""
    learning_starts: int = 1024
    """agent steps before the first update"""
    train_ratio: float = 32.0
    """replayed rows trained on per agent step (B*T rows per update)"""
    batch_size: int = 16
    """B"""
    batch_length: int = 64
    """T; one more row is drawn as context"""
    learning_rate: float = 4e-5
    """of the one LaProp optimizer"""
    warmup_updates: int = 1000
    """linear learning-rate warm-up from 0"""
    agc_clip: float = 0.3
    """adaptive gradient clipping: gradient norm at most this times the parameter norm"""
    beta1: float = 0.9
    """LaProp momentum"""
    beta2: float = 0.999
    """LaProp second moment"""

    # ---- Evaluation and logging
    eval_episodes: int = 10
    """episodes of the final evaluation, of --evaluate and of the random baseline"""
    eval_greedy: bool = False
    """evaluate the most likely action; the published scores are of sampled actions"""
    log_every: int = 1000
    """agent steps between log lines"""
    report_every: int = 50_000
    """agent steps between open-loop reports on fresh episodes (0: never)"""


# fmt: off
# Budgets, ratios and preprocessing of the published benchmarks, as in the authors' configuration (May 2026); the
# paper's table has ratio 128 for Atari100k. total_timesteps counts agent steps: frames / action_repeat.
PRESETS = {
    "full": {},
    # A laptop: 176 thousand parameters, a learning rate for hundreds of updates instead of millions, short sequences
    # because the recurrent steps are the cost on a CPU.
    "cpu": dict(
        env_id="CartPole-v1", total_timesteps=8_000, num_envs=4, deter=128, hidden=64, units=64, cnn_depth=8, classes=8,
        stoch=8, mlp_layers=2, bins=63, batch_size=16, batch_length=16, imag_starts=128, learning_rate=5e-4,
        warmup_updates=100, train_ratio=64, learning_starts=400, buffer_size=50_000, compile=False, num_threads=1,
        image_size=16, log_every=400, report_every=4_000, save_every=4_000,
    ),
    "atari100k": dict(
        env_id="ALE/Boxing-v5", total_timesteps=100_000, num_envs=1, train_ratio=256, sticky_actions=0.0,
        buffer_size=110_000, save_every=25_000, report_every=10_000,
    ),
    # NOTE: 3M rows instead of the published 5M: 77 GB (25.6 KB per row), which leaves room on a GPU of 139 GiB.
    "atari": dict(
        total_timesteps=50_000_000, num_envs=16, train_ratio=32, image_size=96, grayscale=True, full_action_space=True,
        buffer_size=3_000_000, save_every=1_000_000, report_every=500_000,
    ),
    "dmc_proprio": dict(
        env_id="dm_control/walker-walk-v0", size="1m", total_timesteps=1_000_000, train_ratio=1024, action_repeat=1,
        buffer_size=1_050_000,
    ),
    "dmc_vision": dict(
        env_id="dm_control/walker-walk-v0", pixels=True, total_timesteps=1_000_000, train_ratio=256, action_repeat=1,
        buffer_size=1_050_000,
    ),
    "crafter": dict(
        env_id="Crafter-v1", total_timesteps=1_000_000, num_envs=1, train_ratio=512, buffer_size=1_050_000,
    ),
}
# The image path on a laptop: MinAtar drawn as 16x16 RGB, so two convolution stages instead of four.
PRESETS["cpu_pixels"] = PRESETS["cpu"] | dict(
    env_id="MinAtar/Breakout-v1", env_kwargs='{"difficulty_ramping": false}', pixels=True, num_envs=8, train_ratio=32,
    total_timesteps=18_000, learning_starts=1_000, learning_rate=4e-4, ent_coef=3e-3, log_every=1_000,
    report_every=6_000, save_every=9_000, eval_episodes=20,
)
# Allowed values, both ends included; checked before anything is created. Fields that are None are skipped.
RANGES = {
    **dict.fromkeys(
        "num_threads save_every total_timesteps num_envs action_repeat max_episode_steps deter hidden units cnn_depth "
        "classes stoch blocks mlp_layers imag_horizon imag_starts buffer_size learning_starts batch_size batch_length "
        "eval_episodes log_every".split(), (1, math.inf),
    ),
    **dict.fromkeys("kl_free dyn_scale rep_scale ent_coef slow_reg repval_scale report_every".split(), (0, 1e9)),
    **dict.fromkeys("sticky_actions unimix actor_unimix gamma return_lambda tau retnorm_rate".split(), (0, 1)),
    **dict.fromkeys("beta1 beta2".split(), (0, 0.999999)),
    **{"seed": (0, 2**32 - 1), "noop_max": (0, 1000), "image_size": (8, 256), "bins": (3, 4095)},
    **{"learning_rate": (1e-12, 1), "train_ratio": (1e-9, 1e9), "agc_clip": (1e-9, 1e9), "retnorm_limit": (1e-9, 1e9)},
    **{"target_return": (-1e300, 1e300), "warmup_updates": (0, 10**9)},
}
# fmt: on


def make_config(size="200m", **overrides):
    """Sizes of the networks: a dict for `Dreamer`. Overrides that are None are ignored."""
    units = {"1m": 64, "12m": 256, "25m": 384, "50m": 512, "100m": 768, "200m": 1024, "400m": 1536}[size]
    # D = 8U, depth = classes = U/16. NOTE: for 1M and 12M the paper's table has other numbers; these are the code's.
    config = dict(
        deter=8 * units, hidden=units, units=units, cnn_depth=units // 16, classes=units // 16, stoch=32, blocks=8
    )
    config |= dict(mlp_layers=3, bins=255, unimix=0.01, actor_unimix=0.01)
    return config | {k: v for k, v in overrides.items() if v is not None}


# ---- Maths -----------------------------------------------------------------------------------------------------------


def symlog(x):
    """sign(x) ln(|x| + 1), eq. 9: compresses large values, identity near 0."""
    return torch.log1p(x.clamp(min=0)) - torch.log1p(torch.relu(-x))  # with slope 1 at 0, where sign(x) would give 0


def symexp(x):
    """sign(x) (exp(|x|) - 1), the inverse of symlog."""
    return torch.expm1(x.clamp(min=0)) - torch.expm1(torch.relu(-x))


def make_bins(n=255):
    """Atoms of the two-hot distributions, eq. 10: symexp of -20..20, (n,) float32, exactly antisymmetric."""
    half = symexp(torch.linspace(-20, 0, (n + 1) // 2)) if n % 2 else symexp(torch.linspace(-20, 20, n)[: n // 2])
    return torch.cat([half, -half.flip(0)[n % 2 :]]) + 0.0  # + 0.0 turns the -0.0 in the middle into 0.0


def two_hot_weights(y, bins):
    """The two atoms around each target and their weights: indices (..., 2) and weights (..., 2) for y (...)."""
    below = (torch.searchsorted(bins, y.contiguous(), right=True) - 1).clamp(0, len(bins) - 1)  # last atom <= y
    above = (below + 1).clamp(max=len(bins) - 1)
    # NOTE: weights are linear in raw value space, not in symlog space. Outside the range the end atom takes everything.
    gap = (bins[above] - bins[below]).clamp(min=1e-8)
    upper = ((y - bins[below]) / gap).clamp(0, 1)
    return torch.stack([below, above], -1), torch.stack([1 - upper, upper], -1)


def two_hot(y, bins):
    """Two-hot encoding (eq. 12) of y (...): (..., n) with weight on the two atoms around y."""
    index, weight = two_hot_weights(y, bins)
    return torch.zeros(*y.shape, len(bins), device=y.device).scatter_add(-1, index, weight)


def two_hot_mean(logits, bins):
    """Expectation of a two-hot head (eq. 10): (..., n) -> (...). `bins` must be antisymmetric, as from make_bins."""
    # NOTE: atoms go up to 4.85e8. Summed from left to right, uniform probabilities give a mean far from 0 in float32
    # and the untrained model dreams of rewards. Pairing +b with -b first makes it exactly 0.
    p, half = torch.softmax(logits.float(), -1), len(bins) // 2
    return ((p[..., -half:] - p[..., :half].flip(-1)) * bins[-half:]).sum(-1)


def two_hot_loss(logits, y, bins):
    """Cross entropy between two_hot(y) and the logits (eq. 11): (..., n) and (...) -> (...)."""
    return two_hot_nll(torch.log_softmax(logits.float(), -1), [(y, 1.0)], bins)


def two_hot_nll(logp, targets, bins):
    """Weighted cross entropies of the log-probabilities logp (..., n) with several targets [(y (...), weight), ...],
    summed."""
    # Two entries per target are read; a dense (..., n) target costs ten times as much.
    pairs = [(index, scale * weight) for y, scale in targets for index, weight in [two_hot_weights(y, bins)]]
    index, weight = (torch.cat(x, -1) for x in zip(*pairs, strict=True))  # (..., 2 per target)
    return -(weight * logp.gather(-1, index)).sum(-1)


def unimix_probs(logits, eps=0.01):
    """Softmax mixed with eps of the uniform distribution (..., C): no probability is 0, so no KL is infinite."""
    return (1 - eps) * torch.softmax(logits.float(), -1) + eps / logits.shape[-1]


def sample_onehot(probs, u=None):
    """Straight-through sample: exactly one-hot forward, gradient of probs backward. u: uniform noise, probs' shape
    without C."""
    # Inverse CDF: one random number per group, not one per class; several times faster than Gumbel or multinomial.
    u = torch.rand(probs.shape[:-1], device=probs.device) if u is None else u
    index = (probs.detach().cumsum(-1)[..., :-1] <= u.unsqueeze(-1)).sum(-1, keepdim=True)  # (..., 1)
    onehot = torch.zeros_like(probs).scatter_(-1, index, 1.0)
    # NOTE: through the mixed probabilities, not through a Gumbel softmax.
    return onehot + (probs - probs.detach()) if probs.requires_grad else onehot


def kl_categorical(p_logits, q_logits):
    """KL[p || q] of categoricals over the last axis, from logits or log-probabilities: (..., C) -> (...)."""
    p, q = torch.log_softmax(p_logits.float(), -1), torch.log_softmax(q_logits.float(), -1)
    return (p.exp() * (p - q)).sum(-1)


def kl_loss(post, prior, free=1.0):
    """Dynamics and representation losses (eq. 3) from logits (B, T, S, C), each (B, T)."""
    # NOTE: free nats clip each time step after the sum over groups; clipping the batch mean is another (the V2) loss.
    dyn = kl_categorical(post.detach(), prior).sum(-1).clamp(min=free)  # trains the prior towards the posterior
    rep = kl_categorical(post, prior.detach()).sum(-1).clamp(min=free)  # and, weakly, the posterior towards the prior
    return dyn, rep


def lambda_return(last, term, rew, val, boot, disc, lam):
    """Lambda returns (eq. 5): all (B, T) -> (B, T-1). Row t's return starts with the reward of row t+1.

    last: the episode ends at this row, the return bootstraps there; term: it ends for good, nothing follows. Bootstrap
    values come from `boot`; `val` is only checked for its shape (the authors' signature)."""
    assert last.shape == term.shape == rew.shape == val.shape == boot.shape, "all inputs of lambda_return are (B, T)"
    live, cont = (1 - term.float())[:, 1:] * disc, (1 - last.float())[:, 1:] * lam
    base = rew[:, 1:] + live * (1 - cont) * boot[:, 1:]
    out, returns = boot[:, -1], []
    for b, weight in zip(reversed(base.unbind(1)), reversed((live * cont).unbind(1)), strict=True):
        out = b + weight * out
        returns.append(out)
    return torch.stack(returns[::-1], 1)


def bounded_normal(mean, std_raw):
    """Mean in (-1, 1) and standard deviation in (0.1, 1) of the continuous policy."""
    return torch.tanh(mean), 0.9 * torch.sigmoid(std_raw + 2) + 0.1


def lr_at(step, lr, warmup):
    """Learning rate of update number `step` (from 0): linear warm-up that starts at exactly 0. Number or tensor."""
    share = step / max(1, warmup)
    return lr * (share.clamp(max=1) if torch.is_tensor(share) else min(share, 1))


class ReturnNorm(nn.Module):
    """Scale of the returns (eq. 7): running range of the 5th to 95th percentile, never below `limit`."""

    def __init__(self, rate=0.01, limit=1.0, lo=5.0, hi=95.0):
        super().__init__()
        self.rate, self.limit = rate, limit
        self.register_buffer("percentiles", torch.tensor([lo / 100, hi / 100]), persistent=False)
        self.register_buffer("range", torch.zeros(2))  # lo, hi

    lo = property(lambda self: self.range[0])
    hi = property(lambda self: self.range[1])

    def scale(self):
        # NOTE: no debiasing and no offset: the range starts at 0, so the scale starts at the limit.
        return (self.hi - self.lo).clamp(min=self.limit)

    @torch.no_grad()
    def update(self, returns):
        """Move the percentiles towards those of these returns, then give the scale (0-dim)."""
        self.range.lerp_(torch.quantile(returns.flatten(), self.percentiles), self.rate)
        return self.scale()


@torch.no_grad()
def agc_(grads, params, clip=0.3, pmin=1e-3):
    """Adaptive gradient clipping, in place: |g| <= clip * max(pmin, |p|) for each whole tensor. Returns the norms
    before."""
    norms = torch.stack(torch._foreach_norm(grads))
    # NOTE: pmin keeps zero-initialised tensors trainable.
    limit = clip * torch.stack(torch._foreach_norm(params)).clamp(min=pmin)
    torch._foreach_mul_(grads, list((limit / torch.maximum(norms, limit)).unbind()))
    return norms


class LaProp:
    """LaProp: normalise the gradient by its second moment first, then apply momentum. No weight decay."""

    def __init__(self, params, lr=4e-5, betas=(0.9, 0.999), eps=1e-20):
        # NOTE: eps must stay tiny; the usual 1e-8 would freeze tensors whose gradients AGC has made small.
        self.params, self.lr, self.betas, self.eps = list(params), lr, betas, eps
        self.mu = [torch.zeros_like(p) for p in self.params]  # momentum, of normalised gradients
        self.nu = [torch.zeros_like(p) for p in self.params]  # second moment
        self.count = torch.zeros(
            (), dtype=torch.float64, device=self.params[0].device
        )  # on the device: no sync, graphable

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self, lr=None, ok=None):
        """One step with learning rate `lr`. `ok`: 0-dim bool; if false nothing changes, and nothing waits for it."""
        ok = torch.ones_like(self.count, dtype=torch.bool) if ok is None else ok
        grads = [torch.where(ok, p.grad, 0) for p in self.params]
        # Decay rates of 1 and gradients of 0 leave every number as it is.
        b1, b2 = (torch.where(ok, torch.full_like(self.count, b), 1).float() for b in self.betas)
        self.count += ok
        fix1, fix2 = ((1 - b**self.count).clamp(min=1e-12).float() for b in self.betas)  # bias corrections
        squares = torch._foreach_mul(grads, grads)
        torch._foreach_mul_(squares, 1 - b2)
        torch._foreach_mul_(self.nu, b2)
        torch._foreach_add_(self.nu, squares)  # nu <- b2 nu + (1 - b2) g^2
        scale = torch._foreach_sqrt(self.nu)
        torch._foreach_mul_(scale, fix2.rsqrt())
        torch._foreach_add_(scale, self.eps)
        torch._foreach_div_(grads, scale)
        torch._foreach_mul_(grads, 1 - b1)
        torch._foreach_mul_(self.mu, b1)
        torch._foreach_add_(self.mu, grads)  # mu <- b1 mu + (1 - b1) g / (sqrt(nu_hat) + eps)
        # NOTE: the learning rate multiplies last; folding it into mu would differ while it warms up.
        rate = (self.lr if lr is None else lr) / fix1 * ok
        torch._foreach_sub_(self.params, torch._foreach_mul(self.mu, rate.float()))

    def state_dict(self):
        return {"mu": self.mu, "nu": self.nu, "count": self.count}

    def load_state_dict(self, state):
        torch._foreach_copy_(self.mu, state["mu"])
        torch._foreach_copy_(self.nu, state["nu"])
        self.count.copy_(state["count"])


# ---- Networks --------------------------------------------------------------------------------------------------------


def trunc_normal_(weight, fan_in, scale=1.0):
    """Normal truncated at two standard deviations, of variance scale^2 / fan_in after truncation (hence 1.1368)."""
    std = 1.1368 * math.sqrt(1 / fan_in)
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    with torch.no_grad():
        weight.mul_(scale)


class Linear(nn.Linear):
    """Linear layer with the paper's initialisation; `outscale` multiplies the kernel."""

    def __init__(self, i, o, outscale=1.0):
        super().__init__(i, o)
        trunc_normal_(self.weight, i, outscale)
        nn.init.zeros_(self.bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32; no mean subtraction, no bias."""

    def __init__(self, n, eps=1e-4):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(n))

    def forward(self, x):  # (..., n)
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


class BlockLinear(nn.Module):
    """Block-diagonal linear layer: output group g sees only input group g. Weight (G, i/G, o/G), bias (o,)."""

    def __init__(self, i, o, blocks):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, i // blocks, o // blocks))
        self.bias = nn.Parameter(torch.zeros(o))
        # NOTE: fan-in is the whole input width, not one block's, which would make initial weights sqrt(G) too large.
        trunc_normal_(self.weight, i)

    def forward(self, x, shared=None):
        """(N, i') -> (N, o). `shared` (N, m): inputs that every block sees after its own, so that i = i' + G*m."""
        g = self.weight.shape[0]
        x = x.view(x.shape[0], g, -1).transpose(0, 1)  # (G, N, i'/G), a view
        own, rest = self.weight[:, : x.shape[2]], self.weight[:, x.shape[2] :]
        y = torch.baddbmm(self.bias.view(g, 1, -1), x, own)  # (G, N, o/G)
        if shared is not None:
            y = y + torch.matmul(shared, rest)  # without G copies of the shared input
        return y.transpose(0, 1).reshape(y.shape[1], -1)


class MLP(nn.Module):
    """`layers` x (Linear, RMSNorm, SiLU) and, if `out` is given, a plain Linear."""

    def __init__(self, i, units, layers, out=None, outscale=1.0):
        super().__init__()
        widths = [i] + [units] * layers
        self.linears = nn.ModuleList(Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.norms = nn.ModuleList(RMSNorm(units) for _ in range(layers))
        self.out = Linear(widths[-1], out, outscale) if out else nn.Identity()

    def forward(self, x):
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = F.silu(norm(linear(x)))
        return self.out(x)


def image_stages(size):
    """Depth multipliers of the convolution stages: (2, 3, 4, 4) for 48 pixels and more, fewer for tiny images."""
    return (2, 3, 4, 4)[: min(4, int(math.log2(size / 3)))]


class Encoder(nn.Module):
    """Observations {key: (..., *shape)} -> tokens (..., E): symlog MLP for vectors, convolutions for images."""

    def __init__(self, obs_space, units=1024, depth=64, layers=3):
        super().__init__()
        self.images = [k for k, s in sorted(obs_space.items()) if len(s.shape) == 3]
        self.vectors = [k for k in sorted(obs_space) if k not in self.images]
        self.numbers = {k: int(s.n) for k, s in obs_space.items() if isinstance(s, gym.spaces.Discrete)}
        self.out_dim = 0
        if self.vectors:
            self.mlp = MLP(sum(self.numbers.get(k) or obs_space[k].shape[0] for k in self.vectors), units, layers)
            self.out_dim += units
        if self.images:
            side, channels = obs_space[self.images[0]].shape[0], sum(obs_space[k].shape[2] for k in self.images)
            widths = [channels] + [m * depth for m in image_stages(side)]
            self.convs = nn.ModuleList(nn.Conv2d(a, b, 5, padding=2) for a, b in zip(widths, widths[1:], strict=False))
            self.norms = nn.ModuleList(RMSNorm(b) for b in widths[1:])
            for conv in self.convs:
                trunc_normal_(conv.weight, 25 * conv.in_channels)
                nn.init.zeros_(conv.bias)
            self.out_dim += (side >> len(self.convs)) ** 2 * widths[-1]

    def forward(self, obs):
        out = []
        if self.vectors:
            # Integers become one-hot, real vectors are compressed by symlog (eq. 9).
            sizes = self.numbers
            parts = [F.one_hot(obs[k], sizes[k]).float() if k in sizes else symlog(obs[k]) for k in self.vectors]
            out.append(self.mlp(torch.cat(parts, -1)).float())
        if self.images:
            x = torch.cat([obs[k] for k in self.images], -1) if len(self.images) > 1 else obs[self.images[0]]
            lead = x.shape[:-3]
            x = (
                x.flatten(0, -4).float().div_(255).sub_(0.5).permute(0, 3, 1, 2)
            )  # (BT, channels, H, W), channels last in memory
            for conv, norm in zip(self.convs, self.norms, strict=True):
                # NOTE: stride 1, then 2x2 max-pooling, then the norm: the authors' code. The paper's text says strided.
                x = F.max_pool2d(conv(x), 2)
                x = F.silu(norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
            out.append(x.permute(0, 2, 3, 1).reshape(*lead, -1))  # features in H, W, C order
        return torch.cat(out, -1)


class RSSM(nn.Module):
    """Recurrent state-space model (eq. 1): h' = core(h, z, a), prior p(z | h), posterior q(z | h, tokens)."""

    def __init__(self, embed, actions, deter=8192, hidden=1024, stoch=32, classes=64, blocks=8, unimix=0.01):
        super().__init__()
        self.deter, self.stoch, self.classes, self.blocks, self.unimix = deter, stoch, classes, blocks, unimix
        self.in_h, self.in_z, self.in_a = (MLP(n, hidden, 1) for n in (deter, stoch * classes, actions))
        self.core_in, self.core_norm = BlockLinear(deter + blocks * 3 * hidden, deter, blocks), RMSNorm(deter)
        self.core_gates = BlockLinear(deter, 3 * deter, blocks)
        self.prior_net = MLP(deter, hidden, 2, stoch * classes)
        self.post_in, self.post_norm = Linear(deter + embed, hidden), RMSNorm(hidden)
        self.post_out = Linear(hidden, stoch * classes)

    def embed_action(self, a):
        """The share of the core that needs no state and so is computed for all steps at once: (..., A) -> (..., X)."""
        return self.in_a(a / a.abs().clamp(min=1).detach())

    def core(self, h, z, a):
        """Next recurrent state: h (N, D), z (N, S, C) or (N, S*C), a (N, A) -> (N, D)."""
        return self.core_step(h, z, self.embed_action(a))

    def core_step(self, h, z, embedded_action):
        shared = torch.cat([self.in_h(h), self.in_z(z.reshape(h.shape[0], -1)), embedded_action], -1)  # (N, 3X)
        x = F.silu(self.core_norm(self.core_in(h, shared)))  # (N, D)
        # NOTE: the gates are split inside each block; splitting the flat (N, 3D) in three would mix blocks.
        gates = self.core_gates(x).float().view(h.shape[0], self.blocks, 3, -1)  # (N, G, 3, D/G)
        reset, cand, update = (g.reshape(h.shape) for g in gates.unbind(2))
        return torch.lerp(h, torch.tanh(torch.sigmoid(reset) * cand), torch.sigmoid(update - 1))

    def prior(self, h):
        """Probabilities of the latents before the observation is seen: (..., D) -> (..., S, C)."""
        return unimix_probs(self.prior_net(h).view(*h.shape[:-1], self.stoch, self.classes), self.unimix)

    def initial(self, n, device=None):
        """Zero state: h (n, D), z (n, S, C)."""
        return torch.zeros(n, self.deter, device=device), torch.zeros(n, self.stoch, self.classes, device=device)

    def post_step(self, h, z, embedded_action, token, keep, u):
        """One step with an observation. token (N, X): its share of the posterior layer; keep (N, 1): 0 resets."""
        h = self.core_step(h * keep, z * keep.unsqueeze(-1), embedded_action)
        x = F.silu(self.post_norm(token + F.linear(h, self.post_in.weight[:, : self.deter])))
        probs = unimix_probs(self.post_out(x).view(-1, self.stoch, self.classes), self.unimix)
        return h, sample_onehot(probs, u), probs

    def observe(self, tokens, actions, is_first, h, z, generator=None):
        """Filter a sequence: tokens (B, T, E), actions (B, T, A) that led to each row, is_first (B, T), state before
        row 0. Returns h (B, T, D), z (B, T, S, C) and the posterior's log-probabilities (B, T, S, C)."""
        keep = 1 - is_first.float().unsqueeze(-1)  # (B, T, 1)
        # Only what depends on h or z stays in the loop; tokens and actions go through their layers as one batch.
        token = F.linear(tokens, self.post_in.weight[:, self.deter :], self.post_in.bias).float()  # (B, T, X)
        action = self.embed_action(actions * keep)  # (B, T, X). NOTE: a reset zeroes the previous action too
        noise = torch.rand(*is_first.T.shape, self.stoch, device=tokens.device, generator=generator)  # (T, B, S)
        steps = []
        for inputs in zip(action.unbind(1), token.unbind(1), keep.unbind(1), noise.unbind(0), strict=True):
            h, z, probs = self.post_step(h, z, *inputs)
            steps.append((h, z, probs))
        h, z, probs = (torch.stack(x, 1) for x in zip(*steps, strict=True))
        return h, z, probs.log()


class UpConv(nn.Conv2d):
    """Nearest-neighbour x2 upsampling, then a 5x5 'same' convolution, computed on the small image.

    An output pixel's 5x5 window covers only 3x3 distinct input pixels; which taps fall together depends on its parity.
    So four 3x3 kernels (sums of the 5x5 taps) give the same numbers with 9 products instead of 25, and no upsampled
    copy."""

    def __init__(self, i, o):
        super().__init__(i, o, 5, padding=2)
        trunc_normal_(self.weight, 25 * i)
        nn.init.zeros_(self.bias)

    @staticmethod
    def fold(w, dim):
        """Taps -2..2 on the upsampled axis -> -1..1 on the small one, for even and odd output pixels (new axis 1)."""
        a, b, c, d, e = w.unbind(dim)
        return torch.stack([torch.stack([a + b, c + d, e], dim), torch.stack([a, b + c, d + e], dim)], 1)

    def forward(self, x):  # (N, i, H, W) -> (N, o, 2H, 2W)
        w = self.fold(self.fold(self.weight, 2), 4)  # (o, 2 column parities, 2 row parities, i, 3, 3)
        w = w.transpose(1, 2).flatten(0, 2)  # (4o, i, 3, 3) in the order of pixel_shuffle
        return F.pixel_shuffle(F.conv2d(x, w, self.bias.repeat_interleave(4), padding=1), 2)


class Decoder(nn.Module):
    """Model state -> {key: prediction}: images in [0, 1], vectors in symlog space, logits for integers."""

    def __init__(self, obs_space, deter, latent, units=1024, depth=64, layers=3, blocks=8):
        super().__init__()
        self.images = [k for k, s in sorted(obs_space.items()) if len(s.shape) == 3]
        self.vectors = [k for k in sorted(obs_space) if k not in self.images]
        self.channels = [obs_space[k].shape[2] for k in self.images]
        if self.vectors:
            self.mlp = MLP(deter + latent, units, layers)
            widths = [
                obs_space[k].n if isinstance(obs_space[k], gym.spaces.Discrete) else obs_space[k].shape[0]
                for k in self.vectors
            ]
            self.outs = nn.ModuleList(Linear(units, int(n)) for n in widths)
        if self.images:
            mults = [m * depth for m in image_stages(obs_space[self.images[0]].shape[0])]
            self.side, self.blocks, self.width = obs_space[self.images[0]].shape[0] >> len(mults), blocks, mults[-1]
            self.in_h = BlockLinear(deter, self.side**2 * self.width, blocks)
            self.in_z = MLP(latent, 2 * units, 1, self.side**2 * self.width)
            widths = mults[::-1] + [sum(self.channels)]
            self.ups = nn.ModuleList(UpConv(a, b) for a, b in zip(widths, widths[1:], strict=False))
            self.norms = nn.ModuleList(RMSNorm(a) for a in widths[:-1])

    def forward(self, h, z):
        """h (..., D), z (..., S, C)."""
        z, out = z.flatten(-2), {}
        if self.vectors:
            x = self.mlp(torch.cat([h, z], -1))
            out = {k: layer(x).float() for k, layer in zip(self.vectors, self.outs, strict=True)}
        if self.images:
            lead, h, z = h.shape[:-1], h.flatten(0, -2), z.flatten(0, -2)
            # Each block of h owns some of the channels, at all positions.
            x = self.in_h(h).view(-1, self.blocks, self.side**2, self.width // self.blocks).transpose(1, 2)
            x = x.reshape(-1, self.side, self.side, self.width) + self.in_z(z).view(
                -1, self.side, self.side, self.width
            )
            for norm, up in zip(self.norms, self.ups, strict=True):
                x = up(F.silu(norm(x)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (BT, 2H, 2W, channels)
            x = torch.sigmoid(x.float()).unflatten(0, lead)
            out |= dict(zip(self.images, x.split(self.channels, -1), strict=True))
        return out


class Policy(nn.Module):
    """Actor: categorical for Discrete actions, Normal for Box actions. Its parameters are a tuple of tensors."""

    def __init__(self, i, units, action_space, unimix=0.01, layers=3):
        super().__init__()
        self.discrete, self.unimix = isinstance(action_space, gym.spaces.Discrete), unimix
        self.out_dim = int(action_space.n) if self.discrete else action_space.shape[0]
        self.trunk = MLP(i, units, layers)
        self.outs = nn.ModuleList(Linear(units, self.out_dim, 0.01) for _ in range(1 if self.discrete else 2))

    def forward(self, feat):
        """(..., F) -> (probs,) or (mean, std), each (..., A)."""
        x = self.trunk(feat)
        out = [layer(x).float() for layer in self.outs]
        return (unimix_probs(out[0], self.unimix),) if self.discrete else bounded_normal(*out)

    def sample(self, params, greedy=False):
        """Actions (..., A): one-hot, or real numbers that the environment wrapper clips to [-1, 1]."""
        if self.discrete:
            return (
                F.one_hot(params[0].argmax(-1), self.out_dim).float() if greedy else sample_onehot(params[0].detach())
            )
        return params[0] if greedy else params[0] + params[1] * torch.randn_like(params[1])

    def log_prob(self, params, action):
        """(..., A) -> (...), of the unclipped action."""
        if self.discrete:
            return (action * params[0].log()).sum(-1)
        mean, std = params
        return (-0.5 * ((action - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self, params):
        """(...), in nats."""
        if self.discrete:
            return -(params[0] * params[0].log()).sum(-1)
        return (params[1].log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


class Dreamer(nn.Module):
    """World model, actor and critic. `obs_space`: a Dict of uint8 images (H, W, C), float vectors (n,) and Discrete."""

    def __init__(self, obs_space, action_space, config):
        super().__init__()
        c = self.config = config
        latent = c["stoch"] * c["classes"]
        width = c["deter"] + latent
        self.enc = Encoder(obs_space, c["units"], c["cnn_depth"], c["mlp_layers"])
        self.pol = Policy(width, c["units"], action_space, c["actor_unimix"])
        sizes = [c[k] for k in ("deter", "hidden", "stoch", "classes", "blocks", "unimix")]
        self.dyn = RSSM(self.enc.out_dim, self.pol.out_dim, *sizes)
        self.dec = Decoder(obs_space, c["deter"], latent, c["units"], c["cnn_depth"], c["mlp_layers"], c["blocks"])
        # NOTE: reward and value start at exactly 0 (outscale 0): no imagined rewards before the first real one.
        self.rew = MLP(width, c["units"], 1, c["bins"], outscale=0.0)
        self.con = MLP(width, c["units"], 1, 1)
        self.val = MLP(width, c["units"], 3, c["bins"], outscale=0.0)
        self.slow = copy.deepcopy(self.val).requires_grad_(False)  # follows by averaging, not by gradients
        self.register_buffer("bins", make_bins(c["bins"]), persistent=False)

    def feat(self, h, z):
        return torch.cat([h, z.flatten(-2)], -1)  # (..., F)

    def imag_step(self, h, z, feat):
        """Act, then move one step in the dream: h (N, D), z (N, S, C), feat (N, F) -> the next three, action (N, A)."""
        action = self.pol.sample(self.pol(feat))
        h = self.dyn.core(h, z, action)
        z = sample_onehot(self.dyn.prior(h))
        return h, z, self.feat(h, z), action

    @torch.no_grad()
    def imagine(self, h, z, horizon):
        """Roll the policy out in the model from h (N, D), z (N, S, C): features (H+1, N, F), actions (H, N, A). Time
        comes first here, so that "all but the last step" is a contiguous block and not a copy of the largest
        tensors."""
        feat = self.feat(h, z)
        feats, actions = [feat], []
        for _ in range(horizon):  # no action is drawn in the last state: nothing would use it
            h, z, feat, action = self.imag_step(h, z, feat)
            feats.append(feat)
            actions.append(action)
        return torch.stack(feats), torch.stack(actions)

    @torch.no_grad()
    def act(self, obs, is_first, h, z, previous, greedy=False):
        """One acting step: obs {key: (N, ...)}, is_first (N,), state, previous action -> h, z, action (N, A)."""
        tokens = self.enc({k: v.unsqueeze(1) for k, v in obs.items()})  # (N, 1, E)
        h, z, _ = self.dyn.observe(tokens, previous.unsqueeze(1), is_first.unsqueeze(1), h, z)
        h, z = h[:, 0], z[:, 0]
        return h, z, self.pol.sample(self.pol(self.feat(h, z)), greedy)


def count_params(model, obs_space=None, action_space=None):
    """Trained parameters of a module, or of the model that a `make_config` dict or a size name describes (built on the
    meta device; by default with the spaces of the published counts: one 64x64x3 image, 6 discrete actions)."""
    if not isinstance(model, nn.Module):
        config = make_config(model) if isinstance(model, str) else model
        image = gym.spaces.Dict(image=gym.spaces.Box(0, 255, (64, 64, 3), np.uint8))
        with torch.device("meta"):
            model = Dreamer(obs_space or image, action_space or gym.spaces.Discrete(6), config)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---- Losses ----------------------------------------------------------------------------------------------------------


def recon_loss(prediction, target):
    """Negative log-likelihood of one observation key up to constants: (B, T, ...) -> (B, T)."""
    # NOTE: sums over pixels and dimensions, not means; means would drown the reconstruction in reward and KL.
    if target.dtype == torch.uint8:
        return F.mse_loss(prediction, target.float().div_(255), reduction="none").flatten(2).sum(-1)
    if target.dtype == torch.int64:
        return F.cross_entropy(prediction.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
    return F.mse_loss(prediction, symlog(target), reduction="none").sum(-1)  # eq. 8


def world_model_loss(model, batch, args):
    """Eq. 2 and 3 on rows 1..T of a batch of T+1 rows. Returns {name: (B, T)}, h (B, T, D), z (B, T, S, C)."""
    # NOTE: row 0 is context only, not trained on: its latents start the recurrence, its action leads to row 1.
    rows = {k: v[:, 1:] for k, v in batch.items()}
    obs = {k[4:]: v for k, v in rows.items() if k.startswith("obs/")}
    z0 = F.one_hot(batch["stoch"][:, 0].long(), model.config["classes"]).float()  # (B, S, C)
    tokens = model.enc(obs)  # (B, T, E)
    h, z, post = model.dyn.observe(tokens, batch["action"][:, :-1], rows["is_first"], batch["deter"][:, 0].float(), z0)
    prior = model.dyn.prior(h).log()  # (B, T, S, C)
    recon, feat = model.dec(h, z), model.feat(h, z)  # feat (B, T, F)
    losses = {f"recon_{k}": recon_loss(recon[k], obs[k]) for k in obs}
    losses["reward"] = two_hot_loss(model.rew(feat), rows["reward"], model.bins)
    # NOTE: contdisc: the discount lives in the continue head. Only a true end counts, not a truncated episode.
    alive = (1 - rows["is_terminal"].float()) * args.gamma
    losses["continue"] = F.binary_cross_entropy_with_logits(
        model.con(feat).float().squeeze(-1), alive, reduction="none"
    )
    losses["dynamics"], losses["representation"] = kl_loss(post, prior, args.kl_free)
    return losses, h, z


def critic_loss(logits, returns, slow, model, args):
    """Cross entropy with the returns and, as a regulariser, with the slow critic's mean (eq. 5): (..., K) -> (...)."""
    # NOTE: the slow critic regularises; the targets come from the fast one.
    return two_hot_nll(torch.log_softmax(logits.float(), -1), [(returns, 1.0), (slow, args.slow_reg)], model.bins)


def behavior_loss(model, norm, batch, h, z, args):
    """Eq. 4 to 7: actor and critic on imagined rollouts, critic on replay. Returns {name: (H, N) or (B, T-1)}."""
    B, T = h.shape[:2]
    pick = slice(None) if args.imag_starts is None else torch.rand(B * T, device=h.device).argsort()[: args.imag_starts]
    with torch.no_grad():
        # NOTE: imagination starts from every replayed state and carries no gradient into the world model.
        feats, actions = model.imagine(
            h.detach().flatten(0, 1)[pick], z.detach().flatten(0, 1)[pick], args.imag_horizon
        )
        reward = two_hot_mean(model.rew(feats), model.bins)  # (H+1, N)
        live = torch.sigmoid(model.con(feats).float().squeeze(-1))  # (H+1, N), the discount included
        slow = two_hot_mean(model.slow(feats[:-1]), model.bins)  # (H, N)
        # NOTE: the weight includes c_0, so that a rollout that starts in a terminal state counts for nothing.
        weight = live.cumprod(0)[:-1]  # (H, N)
        end_value = two_hot_mean(model.val(feats[-1:]), model.bins)  # (1, N)
    torch.clear_autocast_cache()  # NOTE: bfloat16 copies of actor and critic weights made above carry no gradients
    value_logits = model.val(feats[:-1])  # (H, N, K)
    with torch.no_grad():
        value = torch.cat([two_hot_mean(value_logits, model.bins), end_value])  # (H+1, N)
        returns = lambda_return(
            torch.zeros_like(live.T), 1 - live.T, reward.T, value.T, value.T, 1.0, args.return_lambda
        ).T
        scale = norm.update(returns)  # NOTE: updated before it is used
        advantage = (returns - value[:-1]) / scale  # (H, N)
    params = model.pol(feats[:-1])
    entropy = model.pol.entropy(params)  # (H, N)
    # NOTE: REINFORCE for discrete and continuous actions alike; no gradient flows back through the dynamics.
    objective = model.pol.log_prob(params, actions) * advantage + args.ent_coef * entropy  # eq. 6, to be maximised
    losses = {"policy": -weight * objective, "value": weight * critic_loss(value_logits, returns, slow, model, args)}

    feat = model.feat(h, z)  # (B, T, F). NOTE: with gradients: the replayed critic loss shapes the world model too
    value_logits = model.val(feat)  # (B, T, K)
    with torch.no_grad():
        value, slow = two_hot_mean(value_logits, model.bins), two_hot_mean(model.slow(feat), model.bins)  # (B, T)
        boot = value.flatten().clone()
        boot[pick] = returns[0]  # imagined returns bootstrap the replayed ones
        last, term, reward = (batch[k][:, 1:].float() for k in ("is_last", "is_terminal", "reward"))
        target = lambda_return(last, term, reward, value, boot.view(B, T), args.gamma, args.return_lambda)  # (B, T-1)
    losses["replay_value"] = (1 - last[:, :-1]) * critic_loss(value_logits[:, :-1], target, slow[:, :-1], model, args)
    stats = {"entropy": entropy.mean().detach(), "return_scale": scale, "imagined_return": returns.mean()}
    return losses, stats | {"value_mean": value.mean()}


class Learner:
    """Model, optimizer and return statistics, and the one update of everything."""

    def __init__(self, model, args, device):
        self.model, self.args, self.device = model, args, device
        self.norm = ReturnNorm(args.retnorm_rate, args.retnorm_limit).to(device)
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.opt = LaProp(self.params, args.learning_rate, (args.beta1, args.beta2))
        self.bf16 = args.bf16 and device.type == "cuda"
        self.scales = {"dynamics": args.dyn_scale, "representation": args.rep_scale, "replay_value": args.repval_scale}
        self.bad = None  # which loss terms, or the gradient norm, were not finite; set once, on the device

    def update(self, batch):
        """One optimizer step on a batch {name: (B, T+1, ...)}. Returns metrics, new latents (B, T, D) and (B, T, S)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            losses, h, z = world_model_loss(self.model, batch, self.args)
            more, stats = behavior_loss(self.model, self.norm, batch, h, z, self.args)
        losses = {k: v.float().mean() for k, v in (losses | more).items()}
        loss = sum(self.scales.get(k, 1.0) * v for k, v in losses.items())  # eq. 2, 5, 6 in one backward
        self.opt.zero_grad()
        loss.backward()
        norms = agc_([p.grad for p in self.params], self.params, self.args.agc_clip)
        # No step on bad numbers, decided on the device. The main loop looks at `bad` when it reads metrics.
        bad = ~torch.isfinite(torch.stack([*losses.values(), norms.norm()]).detach())
        if self.bad is None:
            self.bad, self.names = torch.zeros_like(bad), [*losses, "gradient norm"]
        self.bad.copy_(torch.where(self.bad.any(), self.bad, bad))
        rate = lr_at(self.opt.count, self.args.learning_rate, self.args.warmup_updates)
        self.opt.step(rate, ~self.bad.any())
        slow, fast = list(self.model.slow.parameters()), [p.detach() for p in self.model.val.parameters()]
        torch._foreach_lerp_(slow, fast, self.args.tau)
        metrics = (
            {k: v.detach() for k, v in losses.items()} | stats | {"grad_norm": norms.norm(), "learning_rate": rate}
        )
        return metrics, h.detach().to(torch.bfloat16), z.detach().argmax(-1).to(torch.uint8)

    def check(self, where=""):
        """Raise FloatingPointError naming what was not finite. Waits for the device."""
        if self.bad is not None and self.bad.any():
            names = ", ".join(n for n, b in zip(self.names, self.bad.tolist(), strict=True) if b)
            raise FloatingPointError(f"not finite at {where}: {names}; no optimizer step was taken")

    def state_dict(self):
        return {"model": self.model.state_dict(), "optimizer": self.opt.state_dict(), "return_range": self.norm.range}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.opt.load_state_dict(state["optimizer"])
        self.norm.range.copy_(state["return_range"])


# [optional: compile
def compile_model(model, learner):
    """Compile the recurrent steps and the networks around them; on a GPU capture each whole update in a CUDA graph."""
    try:
        torch.compile(lambda x: torch.sin(x) + 1)(torch.zeros(8, device=learner.device))  # is there a working compiler?
    except Exception as e:
        return say(f"warning: torch.compile does not work here ({type(e).__name__}); going on without it")
    say("compiling: the first steps take a minute or more (--no-compile starts at once)")
    model.dyn.post_step = torch.compile(model.dyn.post_step, dynamic=False)
    model.imag_step = torch.compile(model.imag_step, dynamic=False)
    for network in (model.enc, model.dec):
        network.compile(dynamic=False)  # in place: parameter names in checkpoints stay as they are
    if learner.device.type == "cuda":
        learner.update = Graphed(learner.update)


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


class Replay:
    """Ring buffers (environment, row), allocated once on `device`. A sequence is `length` + 1 consecutive rows of one
    environment; it may cross episodes (is_first resets the model inside). Latents are stored beside the
    observations."""

    def __init__(self, capacity, num_envs, specs, length, device="cpu", seed=0):
        """capacity: rows per environment; specs: {name: (shape, dtype)}; length: T."""
        self.capacity, self.length, self.device = capacity, length, torch.device(device)
        self.data = {k: torch.zeros(num_envs, capacity, *s, dtype=d, device=device) for k, (s, d) in specs.items()}
        self.count = np.zeros(num_envs, np.int64)  # rows ever added, per environment
        self.queue = deque()  # fresh, non-overlapping sequences (env, first row) that were not trained on yet
        self.rng = np.random.default_rng(seed)

    @staticmethod
    def specs(obs_space, action_dim, config):
        """What one row holds. Latents: deter in bfloat16, stoch as class numbers, a fifth of their size in float32."""
        kinds = {np.dtype(np.uint8): torch.uint8, np.dtype(np.float32): torch.float32, np.dtype(np.int64): torch.int64}
        specs = {f"obs/{k}": (s.shape, kinds[s.dtype]) for k, s in obs_space.items()}
        specs |= {"action": ((action_dim,), torch.float32), "reward": ((), torch.float32)}
        specs |= dict.fromkeys(("is_first", "is_last", "is_terminal"), ((), torch.bool))
        return specs | {"deter": ((config["deter"],), torch.bfloat16), "stoch": ((config["stoch"],), torch.uint8)}

    @staticmethod
    def row_bytes(specs):
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values())

    def add(self, envs, rows):
        """Append one row to each environment in `envs` (n,): rows {name: (n, ...)} as arrays or tensors."""
        index = torch.as_tensor(envs * self.capacity + self.count[envs] % self.capacity, device=self.device)
        for name, data in self.data.items():
            data.flatten(0, 1)[index] = torch.as_tensor(rows[name], device=self.device).to(data.dtype)
        self.count[envs] += 1
        # Online queue: every stretch of T+1 new rows is trained on once, soon after it was collected.
        self.queue.extend(
            (int(e), int(self.count[e]) - self.length - 1) for e in envs if not self.count[e] % (self.length + 1)
        )

    def sequences(self):
        """Number of stored sequences per environment."""
        return np.maximum(np.minimum(self.count, self.capacity) - self.length, 0)

    def uniform(self, n, rng):
        """n sequences drawn uniformly: (n, 2) environment and first row."""
        lengths = self.sequences()
        bounds = np.cumsum(lengths)
        draws = rng.integers(bounds[-1], size=n)
        envs = np.searchsorted(bounds, draws, side="right")
        return np.stack([envs, np.maximum(self.count - self.capacity, 0)[envs] + draws - (bounds - lengths)[envs]], 1)

    def gather(self, starts):
        """Sequences that begin at `starts` (B, 2): {name: (B, T+1, ...)} and their flat indices (B, T+1)."""
        rows = (starts[:, 1:] + np.arange(self.length + 1)) % self.capacity
        ids = torch.as_tensor(starts[:, :1] * self.capacity + rows, device=self.device)  # (B, T+1)
        return {k: v.flatten(0, 1)[ids] for k, v in self.data.items()}, ids

    def sample(self, batch_size):
        """A batch for training: first the online queue, then uniform over all sequences."""
        fresh = []
        while self.queue and len(fresh) < batch_size:
            env, start = self.queue.popleft()
            if start >= self.count[env] - self.capacity:  # not yet overwritten
                fresh.append((env, start))
        starts = np.array(fresh, np.int64).reshape(-1, 2)
        return self.gather(np.concatenate([starts, self.uniform(batch_size - len(fresh), self.rng)]))

    def write_back(self, ids, deter, stoch):
        """Refresh the stored latents of rows 1..T with the newest posteriors (B, T, D) and (B, T, S)."""
        # NOTE: without it sequences start from latents of an ever older model. Nothing was added since `sample`, so no
        # row can have been overwritten in between. Where sequences of a batch overlap, one of them wins.
        self.data["deter"].flatten(0, 1)[ids[:, 1:]] = deter.to(self.device, torch.bfloat16)
        self.data["stoch"].flatten(0, 1)[ids[:, 1:]] = stoch.to(self.device, torch.uint8)

    def state_dict(self):
        filled = int(min(self.count.max(), self.capacity))
        whole = (
            filled == self.capacity or self.device.type != "cpu"
        )  # a part must be copied: a view would save everything
        rows = {k: v[:, :filled].cpu() if whole else v[:, :filled].clone() for k, v in self.data.items()}
        counters = {"count": self.count.tolist(), "queue": list(self.queue), "rng": self.rng.bit_generator.state}
        return counters | {"rows": rows}

    def load_state_dict(self, state):
        # NOTE: a resumed run has a larger capacity only if the smaller one had not wrapped yet; then rows keep places.
        for k, v in state["rows"].items():
            self.data[k][:, : v.shape[1]] = v.to(self.device)
        self.count, self.queue = np.array(state["count"]), deque(state["queue"])
        self.rng.bit_generator.state = state["rng"]


class Ratio:
    """How many updates are due after `step` agent steps; fractions are carried over, the first call gives 1."""

    def __init__(self, ratio):
        self.ratio, self.previous = ratio, None

    def __call__(self, step):
        if self.previous is None:
            self.previous = step
            return 1
        due = int((step - self.previous) * self.ratio)
        self.previous += due / self.ratio
        return due


# ---- Environment -----------------------------------------------------------------------------------------------------


def resize(image, size):  # shared
    """(H, W, C) uint8 -> (size, size, C), bilinear."""
    if image.shape[:2] == (size, size):
        return image
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    return np.asarray(picture.resize((size, size), Image.BILINEAR)).reshape(size, size, -1)


class Atari(gym.Wrapper):
    """Frame skip with the maximum of the last two frames, random no-ops; no reward clipping, no life signal."""

    complete = True  # no further wrapper repeats actions or draws

    def __init__(self, env, repeat, size, grayscale, noop_max):
        super().__init__(env)
        self.repeat, self.size, self.grayscale, self.noop_max = repeat, size, grayscale, noop_max
        self.observation_space = gym.spaces.Box(0, 255, (size, size, 1 if grayscale else 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        frame, info = self.env.reset(seed=seed, options=options)
        noops = np.random.default_rng(seed).integers(self.noop_max + 1)
        for _ in range(noops):
            frame, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                frame, info = self.env.reset(options=options)
        # NOTE: a fresh episode must not see the frame before it: nothing is pooled here.
        return self.picture(frame), info

    def step(self, action):
        total, frames = 0.0, []
        for _ in range(self.repeat):
            frame, reward, terminated, truncated, info = self.env.step(action)
            total, frames = total + float(reward), [*frames[-1:], frame]
            if terminated or truncated:
                break
        return self.picture(np.max(frames, axis=0)), total, terminated, truncated, info

    def picture(self, frame):
        image = resize(frame, self.size)
        if self.grayscale:  # NOTE: grey after resizing, as the authors do
            image = (image @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)[..., None]
        return image


class DMControl(gym.Env):  # shared
    """DeepMind Control suite: all proprioception as float vectors, pixels by `render`."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 40}

    def __init__(self, name, size, fast=False):
        """size: pixels per side of `render`; fast: no shadows, reflections and multisampling."""
        from dm_control import suite

        match = re.fullmatch(r"dm_control/(\w+)-(\w+)-v0", name)
        if not match:
            raise ValueError("wanted dm_control/<domain>-<task>-v0, for example dm_control/walker-walk-v0")
        self.domain, self.size, self.render_mode = match[1], size, "rgb_array"
        self.env, self.looks = suite.load(match[1], match[2]), {}
        if fast:
            self.looks = dict(render_flag_overrides={"shadow": False, "reflection": False})
            visual = self.env.physics.model.vis  # read at the first render
            visual.quality.offsamples, visual.global_.offwidth, visual.global_.offheight = 0, size, size
        shapes = {k: int(np.prod(v.shape)) or 1 for k, v in self.env.observation_spec().items()}
        boxes = {k: gym.spaces.Box(-np.inf, np.inf, (n,), np.float32) for k, n in shapes.items()}
        self.observation_space, spec = gym.spaces.Dict(boxes), self.env.action_spec()
        self.action_space = gym.spaces.Box(spec.minimum.astype(np.float32), spec.maximum.astype(np.float32))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.env.task._random = np.random.RandomState(seed)  # the generator the suite hands to every task
        return self.pack(self.env.reset()), {}

    def step(self, action):
        step = self.env.step(action)
        # NOTE: only discount 0 is a true end; the suite's 1000-step limit has discount 1.
        terminated = step.last() and step.discount == 0
        return self.pack(step), float(step.reward or 0.0), terminated, step.last() and not terminated, {}

    def pack(self, step):
        return {k: np.asarray(v, np.float32).reshape(-1) for k, v in step.observation.items()}

    def render(self):
        camera = 2 if self.domain == "quadruped" else 0
        image = self.env.physics.render(self.size, self.size, camera_id=camera, **self.looks)
        return np.ascontiguousarray(image)  # NOTE: the suite's is a flipped view, which torch does not take

    def close(self):
        self.env.close()


# [optional: crafter
class Crafter(gym.Env):
    """Crafter as a gymnasium environment (64x64 RGB, 17 actions, rewarded by achievements and health)."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space, action_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8), gym.spaces.Discrete(17)
    render_mode = "rgb_array"

    def reset(self, *, seed=None, options=None):
        import crafter

        super().reset(seed=seed)
        self.env = crafter.Env(size=(64, 64), seed=seed)
        return self.env.reset(), {}

    def step(self, action):
        obs, reward, done, info = self.env.step(action)
        # NOTE: a time-out is not terminal: the info's discount is 0 only when the player died.
        return obs, float(reward), done and info["discount"] == 0, done and info["discount"] != 0, {}

    def render(self):
        return self.env.render()


# crafter]


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


PACKAGES = {"ALE": ("ale_py", "ale-py"), "MinAtar": ("minatar", "minatar"), "dm_control": ("dm_control", "dm_control")}


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


def atari_env(args):
    # NOTE: the v5 ids skip frames by themselves and without max-pooling; the skip is ours.
    settings = dict(repeat_action_probability=args.sticky_actions, full_action_space=args.full_action_space)
    env = registered_env(args, frameskip=1, **settings)
    return Atari(env, args.action_repeat or 4, args.image_size, args.grayscale, args.noop_max)


# Environments that are not built by gymnasium.make alone.
FAMILIES = {"ALE": atari_env, "dm_control": lambda args: DMControl(args.env_id, args.image_size)}
# [optional: crafter
FAMILIES["Crafter-v1"] = lambda args: Crafter()
# crafter]


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


def env_actions(action, discrete):
    """(N, A) one-hot or real -> what the environments take."""
    return action.argmax(-1).cpu().numpy() if discrete else action.cpu().numpy()


# ---- Evaluation and dreams -------------------------------------------------------------------------------------------


def random_policy(action_space, seed):  # shared
    """Uniform actions, as a policy: observations, is_first, its state -> actions, its state."""
    rng, n = np.random.default_rng(seed), getattr(action_space, "n", None)
    shape = () if n else action_space.shape

    def policy(obs, first, state):
        size = (len(first), *shape)
        return (rng.integers(n, size=size) if n else rng.uniform(-1, 1, size).astype(np.float32)), state

    return policy


def agent_policy(model, device, greedy=False):
    """The trained actor, with its recurrent state, as a policy for play_episodes."""

    def policy(obs, first, state):
        if state is None:
            state = *model.dyn.initial(len(first), device), torch.zeros(len(first), model.pol.out_dim, device=device)
        state = model.act(to_torch(obs, device), torch.as_tensor(first, device=device), *state, greedy)
        return env_actions(state[2], model.pol.discrete), state

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


def record_clips(args, policy, action_space, n, length, key, skip=0):
    """n clips of `length` rows from fresh environments under `policy`, after `skip` steps: {name: (n, length, ...)}.
    Rows follow the file's time convention; an agent's latents and action before the first row come along as h, z,
    previous."""
    envs, rows, state, first = make_envs(args, n, key), [], None, np.ones(n, bool)
    try:
        obs, _ = envs.reset()
        for t in range(skip + length):
            if t == skip:
                before = state
            actions, state = policy(obs, first, state)
            stored = np.eye(action_space.n, dtype=np.float32)[actions] if hasattr(action_space, "n") else actions
            if t >= skip:
                rows.append({f"obs/{k}": v for k, v in obs.items()} | {"action": stored, "is_first": first})
            obs, _, terminated, truncated, _ = envs.step(actions)
            first = terminated | truncated
    finally:
        envs.close()
    clips = {k: torch.as_tensor(np.stack([r[k] for r in rows], 1)) for k in rows[0]}
    return clips | (dict(zip(("h", "z", "previous"), before, strict=True)) if before else {})


@torch.no_grad()
def open_loop(model, clips, context):
    """The world model on clips {name: (N, L, ...)} it did not train on. It sees `context` rows, then dreams on with
    the true actions. Returns metrics (mean squared errors per number, images in [0, 1], vectors in symlog space)
    beside those of the trivial predictors, and the decoded (N, L, ...) observations: posterior before `context`, dream
    after it."""
    obs = {k[4:]: v for k, v in clips.items() if k.startswith("obs/")}
    first, actions = clips["is_first"], clips["action"]
    h, z = model.dyn.initial(len(first), first.device)
    # NOTE: a clip from the middle of an episode needs the latents before it. Zeros there mean "an episode begins", and
    # a model that has learned how episodes begin then believes its memory more than the images.
    h, z, before = clips.get("h", h), clips.get("z", z), clips.get("previous", torch.zeros_like(actions[:, 0]))
    previous = torch.cat([before.unsqueeze(1), actions[:, :-1]], 1)  # (N, L, A)
    h, z, _ = model.dyn.observe(model.enc(obs), previous, first, h, z)
    posterior, one_step = model.dec(h, z), model.dec(h, sample_onehot(model.dyn.prior(h)))
    hd, zd, states = h[:, context - 1], z[:, context - 1], []
    for action in previous[:, context:].unbind(1):
        hd = model.dyn.core(hd, zd, action)
        zd = sample_onehot(model.dyn.prior(hd))
        states.append((hd, zd))
    dream = model.dec(*(torch.stack(s, 1) for s in zip(*states, strict=True)))
    same = (first[:, context:].cumsum(1) == 0).float()  # (N, L - context): rows before the next episode begins
    flow = (~first[:, 1:]).float()  # (N, L - 1)
    errors = {}

    def add(name, prediction, target, mask):
        error = ((prediction - target) ** 2).flatten(2).mean(-1)
        errors.setdefault(name, []).append((error * mask).sum() / mask.sum().clamp(min=1))

    for k, v in obs.items():
        if v.dtype == torch.int64:
            continue
        x = v.float() / 255 if v.dtype == torch.uint8 else symlog(v)
        add("posterior_mse", posterior[k], x, torch.ones_like(first, dtype=torch.float32))
        add("mean_frame_mse", x.mean((0, 1), keepdim=True), x, torch.ones_like(first, dtype=torch.float32))
        add("one_step_mse", one_step[k][:, 1:], x[:, 1:], flow)
        add("copy_previous_mse", x[:, :-1], x[:, 1:], flow)
        add("open_loop_mse", dream[k], x[:, context:], same)
        add("copy_last_mse", x[:, context - 1 : context], x[:, context:], same)
    shown = {k: torch.cat([posterior[k][:, :context], dream[k]], 1) for k in obs}
    return {k: float(torch.stack(v).mean()) for k, v in errors.items()}, to_obs(shown, obs)


def to_obs(decoded, like):
    """Decoder outputs -> numpy observations of the environment's own types."""
    out = {}
    for k, v in decoded.items():
        kind = like[k].dtype
        if kind in (torch.uint8, np.uint8):
            out[k] = (v.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        else:
            out[k] = v.argmax(-1).cpu().numpy() if kind in (torch.int64, np.int64) else symexp(v).float().cpu().numpy()
    return out


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
    state = load_checkpoint(path, "dreamerv3")
    model = Dreamer(space_from(state["spaces"]["observation"]), space_from(state["spaces"]["action"]), state["config"])
    model.load_state_dict(state["learner"]["model"])
    return model.to(device).eval(), state


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
    """The learned world as an environment. `path`: run directory. Observations are a Dict, or the only entry by itself.

    reset(options={"observations": {key: (T, ...)}, "actions": (T, ...)}) filters real context from the beginning of an
    episode (action t follows observation t; the last one is not used) and dreams on from it; without options it starts
    from context kept in the checkpoint."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}

    def __init__(self, path, render_mode="rgb_array", max_steps=1000, device="cpu"):
        self.model, state = load_agent(path, device)
        self.device, self.render_mode, self.max_steps = torch.device(device), render_mode, max_steps
        self.space, self.context = space_from(state["spaces"]["observation"]), state["context"]
        self.single, self.gamma = list(self.space) == ["observation"], state["args"]["gamma"]
        self.observation_space = self.space["observation"] if self.single else self.space
        self.action_space, self.noise = space_from(state["spaces"]["action"]), torch.Generator(device)

    def one_hot(self, actions):
        """Actions of the environment (T, ...) -> (1, T, A)."""
        actions = torch.as_tensor(np.asarray(actions), device=self.device)
        actions = F.one_hot(actions.long(), self.model.pol.out_dim) if self.model.pol.discrete else actions.clamp(-1, 1)
        return actions.float()[None]

    def sample(self, probs):
        return sample_onehot(probs, torch.rand(probs.shape[:-1], device=self.device, generator=self.noise))

    @torch.no_grad()
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.noise.manual_seed(int(self.np_random.integers(2**31)))
        if options and "observations" in options:
            obs = options["observations"]
            obs = {"observation": obs} if self.single and not isinstance(obs, dict) else obs
            obs = {k: np.asarray(v, self.space[k].dtype) for k, v in obs.items()}
            T = len(options.get("actions", ()))
            if not T or any(v.shape != (T, *self.space[k].shape) for k, v in obs.items()):
                found = {k: v.shape for k, v in obs.items()}
                raise ValueError(f"observations and actions must all have T > 0 entries, got {found} and {T} actions")
            obs = to_torch({k: v[None] for k, v in obs.items()}, self.device)
            actions, (h, z) = self.one_hot(options["actions"]), self.model.dyn.initial(1, self.device)
            previous = torch.cat([torch.zeros_like(actions[:, :1]), actions[:, :-1]], 1)
            first = torch.arange(actions.shape[1], device=self.device)[None] == 0
        else:
            if self.context is None or not len(self.context["action"]):
                raise ValueError("this checkpoint was saved before any sequence was complete: pass options")
            clip = int(self.np_random.integers(len(self.context["action"])))
            rows = {k: v[clip : clip + 1].to(self.device) for k, v in self.context.items()}
            obs = {k[4:]: v[:, 1:] for k, v in rows.items() if k.startswith("obs/")}
            previous, first, h = rows["action"][:, :-1], rows["is_first"][:, 1:], rows["deter"][:, 0].float()
            z = F.one_hot(rows["stoch"][:, 0].long(), self.model.dyn.classes).float()
        h, z, _ = self.model.dyn.observe(self.model.enc(obs), previous, first, h, z, self.noise)
        self.h, self.z, self.steps = h[:, -1], z[:, -1], 0
        return self.decode(), {}

    @torch.no_grad()
    def step(self, action):
        self.h = self.model.dyn.core(self.h, self.z, self.one_hot(np.asarray(action)[None])[0])
        self.z, self.steps = self.sample(self.model.dyn.prior(self.h)), self.steps + 1
        feat = self.model.feat(self.h, self.z)
        reward = float(two_hot_mean(self.model.rew(feat), self.model.bins))
        alive = min(1.0, float(torch.sigmoid(self.model.con(feat))) / self.gamma)  # the head predicts gamma times this
        return self.decode(), reward, alive < 0.5, self.steps >= self.max_steps, {"continue": alive}

    def decode(self):
        out = to_obs(self.model.dec(self.h, self.z), self.space)
        self.obs = {k: np.int64(v[0]) if np.ndim(v[0]) == 0 else v[0] for k, v in out.items()}
        return self.obs["observation"] if self.single else dict(self.obs)

    def render(self):
        return draw(self.obs, 256)


# [optional: play
def play(args):
    """Play inside the dream: digits and letters choose Discrete actions, pairs of keys move the dimensions of a Box."""
    check_ranges(args, RANGES)
    env = DreamEnv(args.play)
    if env.context is None or not len(env.context["action"]):
        fail(f"{args.play} has no sequence to start a dream from: go on with --resume first")
    headless = sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    if headless or os.environ.get("SDL_VIDEODRIVER") == "dummy":
        path = os.path.join(args.play, "eval-dream.gif")
        obs, _ = env.reset(seed=args.seed)
        frames, policy, state = [env.render()], agent_policy(env.model, "cpu"), None
        for t in range(100):
            obs = {"observation": obs} if env.single else obs
            action, state = policy({k: np.asarray(v)[None] for k, v in obs.items()}, np.array([t == 0]), state)
            obs, _, terminated, truncated, _ = env.step(action[0])
            frames.append(env.render())
            if terminated or truncated:
                break
        save_gif(frames, path)
        return say(f"no display to play on: wrote the policy's dream to {path}")
    from gymnasium.utils.play import play as play_env

    keys, n = "1234567890abcdefghijklmnopqrstuvwxyz", env.model.pol.out_dim
    if env.model.pol.discrete:
        mapping, noop = {keys[i]: i for i in range(min(n, len(keys)))}, 0
    else:
        units = np.concatenate([-np.eye(n, dtype=np.float32), np.eye(n, dtype=np.float32)])
        mapping, noop = {keys[i]: units[i // 2 + n * (i % 2)] for i in range(2 * min(n, 18))}, np.zeros(n, np.float32)
    say("keys: " + ", ".join(f"{k} = {v}" for k, v in mapping.items()) + "; Escape ends")
    play_env(env, keys_to_action=mapping, noop=noop, zoom=2, fps=10)


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
    words, defaults = [w for a in sys.argv[1:] for w in a.split("=", 1)], {}
    given = {w: words[i + 1] for i, w in enumerate(words[:-1]) if w.startswith("--")}
    run = next((given[f] for f in ("--resume", "--evaluate", "--play") if f in given), None)
    if run is not None:
        defaults = load_args(run)
        defaults |= {"resume": None, "evaluate": None, "play": None}
    elif given.get("--preset") in presets:
        defaults = {"preset": given["--preset"], **presets[given["--preset"]]}
    known = {f.name for f in fields(cls)}
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
    "evaluate play target_return total_timesteps eval_episodes eval_greedy log_every replay_cuda".split()
)
# Flags that shape the networks, for make_config.
SHAPES = "deter hidden units cnn_depth classes stoch blocks mlp_layers bins unimix actor_unimix".split()


def check_args(args, config):
    """Everything that can be said before an environment is built."""
    check_ranges(args, RANGES)
    T, c, rows = args.batch_length, config, args.num_envs * (args.batch_length + 1)
    rows_flags, starts = f"--num-envs x (--batch-length + 1) = {rows}", f"--learning-starts {args.learning_starts}"
    batch = f"--batch-size x --batch-length = {args.batch_size * T}"
    for wrong, message in [
        (args.gamma >= 1, f"--gamma must be below 1, got {args.gamma}"),
        (args.bins % 2 == 0, f"--bins must be odd so that one atom is 0, got {args.bins}"),
        (c["classes"] > 256, f"--classes must be at most 256, got {c['classes']}"),
        (c["deter"] % c["blocks"], f"--deter {c['deter']} is not a multiple of --blocks {c['blocks']}: "
         f"remainder {c['deter'] % c['blocks']}"),
        (args.total_timesteps <= max(args.learning_starts, rows), f"--total-timesteps {args.total_timesteps} must be "
         f"more than {starts} and {rows_flags}: nothing would be trained"),
        (args.buffer_size < rows, f"--buffer-size {args.buffer_size} is less than {rows_flags}: no sequence fits"),
        ((args.imag_starts or 0) > args.batch_size * T, f"--imag-starts {args.imag_starts} is more than {batch}"),
        (re.search(r"[/\\\0]", args.exp_name), f"--exp-name must not contain a slash, got {args.exp_name!r}"),
    ]:  # fmt: skip
        if wrong:
            fail(message)
    try:
        assert isinstance(json.loads(args.env_kwargs), dict)
    except (ValueError, AssertionError):
        fail(f"--env-kwargs must be a JSON object, got {args.env_kwargs!r}")
    if env_family(args) == "dm_control" and json.loads(args.env_kwargs):
        fail(f"--env-kwargs has no meaning for {args.env_id}, got {args.env_kwargs}")
    if args.track:
        try:
            __import__(args.track)
        except ImportError:
            fail(f"--track {args.track} needs {args.track}: pip install {args.track}")


def probe_env(args, config):
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
        reason = " ".join(str(cause).split() or [type(cause).__name__])
        if family == "dm_control" and re.search("GL|glGet", reason):
            reason += f" (MUJOCO_GL={os.environ.get('MUJOCO_GL')}; it can be egl, osmesa or glfw)"
        fail(f"{flag}: {reason}")
    images = [k for k, s in env.observation_space.items() if len(s.shape) == 3]
    side, stages = args.image_size, image_stages(args.image_size)
    rest, channels = side % 2 ** len(stages), stages[-1] * config["cnn_depth"]
    if images and (rest or not 3 <= side >> len(stages) <= 16):
        fail(f"--image-size must be a multiple of {2 ** len(stages)}, 8 to 256, got {side}: remainder {rest}")
    if images and channels % config["blocks"]:
        fail(f"--cnn-depth: {channels} channels are not a multiple of --blocks {config['blocks']}")
    limited = (
        args.max_episode_steps
        or (env.spec and env.spec.max_episode_steps)
        or family in ("ALE", "dm_control", "Crafter-v1")
    )
    if not limited:
        say(f"warning: {args.env_id} has no time limit; evaluation stops after 27000 steps (set --max-episode-steps)")
    env.close()
    return env.observation_space, env.action_space


def evaluate_run(args):
    """--evaluate RUN: returns of fresh episodes of a trained agent. Writes only RUN/eval-*."""
    check_ranges(args, RANGES)
    state = load_checkpoint(args.evaluate, "dreamerv3")
    if state["random_return"] is None:
        fail(f"{args.evaluate} was stopped before its first episode: go on with --resume first")
    for found, name in zip(probe_env(args, state["config"]), ("observation", "action"), strict=True):
        if space_to(found) != state["spaces"][name]:
            trained = space_from(state["spaces"][name])
            fail(f"--env-id {args.env_id} has the {name} space {found}, {args.evaluate} was trained on {trained}")
    device = choose_device(args)
    seed_everything(args, device)
    model, state = load_agent(args.evaluate, device)
    video = os.path.join(args.evaluate, "eval-episode.gif") if args.capture_video else None
    returns = play_episodes(args, agent_policy(model, device, args.eval_greedy), args.eval_episodes, 1, video)
    score, std, random_return = float(np.mean(returns)), float(np.std(returns)), state["random_return"]
    result = dict(episodic_return=score, std=std, returns=returns, random_return=random_return)
    result |= dict(global_step=state["global_step"], greedy=args.eval_greedy)
    name = f"eval-{state['global_step']}{'-greedy' if args.eval_greedy else ''}.json"
    write_json(result, os.path.join(args.evaluate, name))
    say(f"returns of {len(returns)} episodes: " + " ".join(f"{r:g}" for r in returns))
    finish(args, score, random_return, f" +- {std:.1f}")
    return result


def report(args, model, run, step, action_space, device, logger):
    """Let the model dream about fresh episodes: errors beside the trivial predictors', and the open-loop video."""
    clips = record_clips(args, agent_policy(model, device), action_space, 4, 48, key=1000 + step, skip=30)
    errors, shown = open_loop(model, to_torch(clips, device), context=16)
    logger.scalars({f"eval/{k}": v for k, v in errors.items()}, step)
    truth = {k[4:]: v.numpy() for k, v in clips.items() if k.startswith("obs/")}
    path = os.path.join(run, "videos", f"open_loop-{step}.gif")
    logger.video("eval/open_loop", dream_frames(truth, shown, 16), step, path)


def main(args):  # shared
    """Returns the final metrics; raises SystemExit with the exit codes of the README."""
    try:
        return play(args) if args.play else evaluate_run(args) if args.evaluate else train(args)
    except EnvFault as e:
        traceback.print_exc()
        raise SystemExit(f"{e}; checkpoints are untouched") from None
    except FloatingPointError as e:
        raise SystemExit(f"{e}; ckpt.pt, if there is one, is from before it") from None


def train(args):
    """The whole algorithm: act in the environments, store, learn from replay and imagination, repeat. Returns the
    metrics."""
    # Set up, in an order that finds every mistake of the user's before the first file is made.
    config = make_config(args.size, **{k: getattr(args, k) for k in SHAPES})
    check_args(args, config)
    state = None
    if args.resume:
        for name, value in load_args(args.resume).items():
            if name not in CHANGEABLE and getattr(args, name, value) != value:
                flag = "--" + name.replace("_", "-")
                fail(f"{flag} is {value} in {args.resume}, got {getattr(args, name)}: a run cannot change it")
        state, result = load_checkpoint(args.resume, "dreamerv3"), os.path.join(args.resume, "result.json")
        if state["global_step"] >= args.total_timesteps and os.path.exists(result):
            say(f"nothing to do: step {state['global_step']} of {args.total_timesteps}")
            with open(result, encoding="utf-8") as f:
                return json.load(f)
        lock = lock_run(args.resume)
        state = load_checkpoint(args.resume, "dreamerv3", repair=True)  # nobody else writes from here on
    obs_space, action_space = probe_env(args, config)
    device = choose_device(args)
    N, T, discrete = args.num_envs, args.batch_length, isinstance(action_space, gym.spaces.Discrete)
    A = int(action_space.n) if discrete else action_space.shape[0]
    specs = Replay.specs(obs_space, A, config)
    # Rows per environment. A run can fill two per agent step: an episode's end takes one more.
    capacity = -(-min(args.buffer_size, 2 * args.total_timesteps + N * (T + 1)) // N)
    size = N * capacity * Replay.row_bytes(specs) / 1e9
    # On the GPU if it fits and leaves a fifth of the memory to the update, else in host memory; a checkpoint copies it.
    cpu = torch.device("cpu")
    store = device if args.replay_cuda and size <= 0.8 * free_memory(device) / 1e9 else cpu
    host, free = size * (args.save_replay + (store == cpu)), free_memory(cpu) / 1e9
    if host > free:
        hint = f"lower --buffer-size, now {args.buffer_size}" + (
            ", or try --no-save-replay" if args.save_replay else ""
        )
        fail(f"replay needs {host:.1f} GB, {free:.1f} GB free: {hint}")

    run = args.resume or new_run_dir(args)
    lock = lock if args.resume else lock_run(run)  # noqa: F841 (held until the process ends)
    seed_everything(args, device)
    write_run_info(run, args, __file__, device)
    logger = Logger(run, args, purge_step=state["global_step"] + 1 if state else None)
    stop = StopSignal()
    envs = make_envs(args, N)
    with torch.device(device):
        model = Dreamer(obs_space, action_space, config)
    learner, replay = Learner(model, args, device), Replay(capacity, N, specs, T, store, args.seed)
    ratio = Ratio(args.train_ratio / (args.batch_size * T))  # updates per agent step
    parts = ", ".join(f"{n} {count_params(getattr(model, n)):,}" for n in "enc dyn dec rew con pol val".split())
    say(f"run: {run}\nparameters: {count_params(model):,} ({parts})")
    say(f"replay: {N} x {capacity:,} rows, {size:.2f} GB on {store}; {1 / ratio.ratio:g} agent steps per update")
    global_step, updates, random_return, learning_starts = 0, 0, None, args.learning_starts
    recent = deque(maxlen=100)  # returns of the last training episodes
    if state:
        learner.load_state_dict(state["learner"])
        if state["replay"]:
            replay.load_state_dict(state["replay"])
            ratio.previous = state["ratio_previous"]
        else:
            say("warning: this run was saved without its replay (--no-save-replay): it is collected anew")
            learning_starts += state["global_step"]
        global_step, updates, random_return = state["global_step"], state["updates"], state["random_return"]
        recent.extend(state["recent"])
        for env, episode in zip(envs.envs, state["episodes"], strict=True):
            env.env.episode = episode
        set_rng_state(state["rng"])
        say(f"resumed at step {global_step} of {args.total_timesteps}, update {updates}")
    if random_return is None:
        returns = play_episodes(args, random_policy(action_space, args.seed), args.eval_episodes, 2, stop=stop)
        random_return = None if stop.signum else float(np.mean(returns))
        say(f"random policy: {np.mean(returns):.1f} +- {np.std(returns):.1f} over {len(returns)} episodes")
    # [optional: compile
    if args.compile:
        compile_model(model, learner)
    # compile]

    def save():
        context = None
        if replay.sequences().sum():  # a few stretches of real experience for dreams to start from
            rows, _ = replay.gather(replay.uniform(64, np.random.default_rng(0)))
            going = (~rows["is_last"][:, -1]).nonzero().flatten()[:8]  # not those that stop at an episode's end
            names = ("action", "is_first", "deter", "stoch")
            context = {k: v[going].cpu() for k, v in rows.items() if k.startswith("obs/") or k in names}
        spaces = {"observation": space_to(obs_space), "action": space_to(action_space)}
        plain = dict(script="dreamerv3", args=asdict(args), config=config, spaces=spaces, context=context)
        plain |= dict(global_step=global_step, updates=updates, random_return=random_return, recent=list(recent))
        plain |= dict(ratio_previous=ratio.previous, episodes=[e.env.episode for e in envs.envs], rng=rng_state())
        plain |= dict(learner=learner.state_dict(), replay=replay.state_dict() if args.save_replay else None)
        atomic_save(plain, os.path.join(run, "ckpt.pt"))

    def last_rows(obs, reward, terminal):
        """Rows that end an episode: the action is masked, the latents are never read (a reset follows)."""
        n = len(reward)
        rows = dict(action=torch.zeros(n, A), deter=torch.zeros(n, config["deter"]), stoch=torch.zeros(n, args.stoch))
        rows |= dict(reward=reward, is_first=np.zeros(n, bool), is_last=np.ones(n, bool), is_terminal=terminal)
        return rows | {f"obs/{k}": v for k, v in obs.items()}

    def stopped():
        """Leave after a stop signal, when the checkpoint is written."""
        logger.close()
        again = f"python {shlex.quote(sys.argv[0])} --resume {shlex.quote(run)}"
        say(f"stopped by signal {stop.signum} at step {global_step}; to go on: {again}")
        raise SystemExit(128 + stop.signum)

    def fresh():
        """Start new episodes everywhere: observations, is_first, rewards, recurrent state and previous action."""
        return envs.reset()[0], np.ones(N, bool), np.zeros(N), (*model.dyn.initial(N, device), blank_action)

    everyone, nowhere, blank_action, metrics = np.arange(N), np.zeros(N, bool), torch.zeros(N, A, device=device), {}
    start = time.time(), global_step, updates
    mark, update_seconds, clock = start, 0.0, time.process_time if device.type == "cpu" else time.time
    obs, is_first, reward, carry = fresh()
    while global_step < args.total_timesteps:
        # Act: filter the observation into the latent state, sample an action; store both with what came before.
        carry = model.act(to_torch(obs, device), torch.as_tensor(is_first, device=device), *carry)
        rows = dict(reward=reward, is_first=is_first, is_last=nowhere, is_terminal=nowhere)
        rows |= dict(deter=carry[0], stoch=carry[1].argmax(-1), action=carry[2])
        replay.add(everyone, rows | {f"obs/{k}": v for k, v in obs.items()})
        obs, reward, terminated, truncated, infos = envs.step(env_actions(carry[2], discrete))
        global_step += N
        is_first = terminated | truncated
        if is_first.any():
            # NOTE: an episode's last observation is a row of its own; only `terminated` makes it terminal.
            ended, final = np.flatnonzero(is_first), infos["final_obs"]
            last = {k: np.stack([final[i][k] for i in ended]) for k in obs}
            replay.add(ended, last_rows(last, reward[ended], terminated[ended]))
            episodes = infos["final_info"]["episode"]
            for i in ended:
                recent.append(float(episodes["r"][i]))
                tags = {"charts/episodic_return": recent[-1], "charts/episodic_length": int(episodes["l"][i])}
                logger.scalars(tags, global_step)
        reward = np.where(is_first, 0.0, reward)

        # Learn: one update per B*T/train_ratio agent steps.
        began = clock()
        due = ratio(global_step) if global_step >= learning_starts and replay.sequences().sum() else 0
        for k in range(due):
            batch, ids = replay.sample(args.batch_size)
            try:
                metrics, deter, stoch = learner.update(to_torch(batch, device))
            except torch.cuda.OutOfMemoryError:
                where, hint = f"step {global_step} (batch {args.batch_size} x {T})", "--batch-size or --batch-length"
                raise SystemExit(f"out of GPU memory at {where}: lower {hint}") from None
            replay.write_back(ids, deter, stoch)
            updates += 1
            # [optional: compile
            if (
                args.compile and updates == 4
            ):  # what was not compiled by now (other batch sizes: evaluation) runs eagerly
                torch.compiler.set_stance("eager_on_recompile")
            # compile]
            if device.type == "cpu":  # on a GPU this would wait for the device: there, when metrics are read
                learner.check(f"step {global_step}, update {updates}")
            if stop.signum:
                ratio.previous -= (due - k - 1) / ratio.ratio  # what was not done yet stays due
                break
        update_seconds += clock() - began

        # Log, let the model dream about fresh episodes, save. Metrics are read here only: reading waits for the device.
        ending = stop.signum or global_step >= args.total_timesteps
        if passed(args.log_every, global_step, N) or ending:
            learner.check(f"step {global_step}, update {updates}")
            seconds, steps, count = (a - b for a, b in zip((time.time(), global_step, updates), mark, strict=True))
            mark = time.time(), global_step, updates
            repeat = args.action_repeat or (4 if env_family(args) == "ALE" else 1)
            tags = {"SPS": steps / max(seconds, 1e-9), "updates_per_s": count / max(seconds, 1e-9), "updates": updates}
            tags = {f"charts/{k}": v for k, v in (tags | {"env_frames": global_step * repeat}).items()}
            tags |= {("charts/" if k == "learning_rate" else "losses/") + k: float(v) for k, v in metrics.items()}
            logger.scalars(tags, global_step)
            shown = f"{np.mean(list(recent)[-10:]):.1f}" if recent else "none yet"
            pace = f"updates={updates}, SPS={tags['charts/SPS']:.0f}"
            say(f"global_step={global_step}, episodic_return={shown}, {pace}")
        if passed(args.report_every, global_step, N) and not stop.signum:
            report(args, model, run, global_step, action_space, device, logger)
        if passed(args.save_every, global_step, N) or ending:
            learner.check(f"step {global_step}, update {updates}")
            # NOTE: unfinished episodes end at scheduled checkpoints as truncated ones, interrupted or not: that is what
            # makes a resumed run repeat the unbroken one. (A stop signal cuts where the unbroken run would not.)
            cut = np.flatnonzero(~is_first)
            replay.add(cut, last_rows({k: v[cut] for k, v in obs.items()}, reward[cut], nowhere[cut]))
            save()
            if stop.signum:
                stopped()
            obs, is_first, reward, carry = fresh()
    envs.close()

    # Final evaluation on fresh episodes, and the self-check against --target-return.
    seconds, steps, count = (a - b for a, b in zip((time.time() + 1e-9, global_step, updates), start, strict=True))
    pace = f"{steps / seconds:.0f} agent steps/s, {count / seconds:.2f} updates/s, {update_seconds / max(1, count):.4f}"
    say(f"{seconds / 60:.1f} minutes, {pace} {'CPU ' if device.type == 'cpu' else ''}seconds per update")
    video = os.path.join(run, "videos", "episode.gif") if args.capture_video else None
    returns = play_episodes(args, agent_policy(model, device, args.eval_greedy), args.eval_episodes, 1, video, stop)
    if stop.signum:
        stopped()
    score, std = float(np.mean(returns)), float(np.std(returns))
    logger.scalars({"eval/episodic_return": score, "eval/episodic_return_std": std}, global_step)
    logger.close()
    result = dict(episodic_return=score, episodic_return_std=std, returns=returns, random_return=random_return)
    result |= dict(global_step=global_step, updates=updates, minutes=seconds / 60, run=run)
    result |= dict(peak_memory_gb=peak_memory(device))
    result |= dict(train_return=float(np.mean(list(recent)[-10:])) if recent else None)
    write_json(result, os.path.join(run, "result.json"))
    finish(args, score, random_return)
    return result


if __name__ == "__main__":
    main(parse_args(Args, PRESETS, __doc__.split("\n\n    python")[0]))
