# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch>=2.11,<2.14", "numpy>=2", "tyro>=1", "tensorboard>=2.20", "pillow>=10", "ale-py>=0.11", "minatar>=1.0.15",
#     "gymnasium[box2d,classic-control]>=1.3,<2", "shimmy>=2.0.1,<3", "imageio", "packaging", "dm_control==1.0.50",
#     "mujoco==3.17.0",
# ]
# ///
"""DreamerV3: Mastering Diverse Control Tasks through World Models.
Hafner, Pasukonis, Ba, Lillicrap. Nature 640:647-653 (2025); equations as in arXiv:2301.04104v2 (2024).

A recurrent state-space model (RSSM) learns from replayed sequences to compress observations into discrete latents and
to predict them, the reward and the end of the episode. An actor and a critic learn only from rollouts that the model
imagines. One set of hyperparameters for all domains; only the model size and the train ratio vary.

    python dreamerv3.py --env-id ALE/Pong-v5                      # the 200M model at full settings, on a GPU
    python dreamerv3.py --preset cpu                              # CartPole-v1 on a laptop, minutes
    python dreamerv3.py --preset cpu --env-id my_module:MyEnv-v0  # your environment, on a laptop
    python dreamerv3.py --preset cpu_pixels                       # MinAtar Breakout from 16x16 pixels, on a laptop
    python dreamerv3.py --preset atari100k --env-id ALE/Krull-v5  # 400K frames; atari: 200M frames
    python dreamerv3.py --preset dmc_proprio                      # walker-walk from its state; dmc_vision: from pixels
    python dreamerv3.py --resume runs/NAME                        # go on, bit for bit on a CPU
    python benchmarks/evaluate.py runs/NAME                       # then dreams.py, play.py: what it dreams

Deviations from the paper and the authors' code (reasons and details: docs/dreamerv3.md):
  * The last observation of an episode is one more row of replay; the authors' driver spends an agent step on it.
  * Nearest x2 upsampling and 5x5 convolution are computed as one 3x3 convolution (same function, see UpConv).
  * Latents are written back to replay in the same update; the authors' come one update late (asynchronous transfers).
  * `actor_unimix` is 1 % as in the paper; the authors' code has 0 for discrete policies (`--actor-unimix 0`).
  * Replay holds 2M rows instead of 5M, which no single GPU can hold beside the 200M model.
  * The first update comes after `--learning-starts` agent steps; the authors wait for as many sequences in replay.
  * Atari's limit of 108,000 frames is a truncation here; the authors store it as a terminal state.
  * Acting runs in float32, the authors' in bfloat16.
The 2023 preprint of V3 was another algorithm: dense LayerNorm GRU, Adam with global clipping, bins uniform in symlog
space, no replay critic loss, no latents in replay. V1 and V2: see docs/dreamerv3.md.

Symbols in shape comments:
  B  batch (replayed sequences)       A  action dimensions             D  deterministic state h (deter)
  T  time (replayed steps)            E  encoder output (tokens)       S  groups of the stochastic state z (stoch)
  N  imagined rollouts, environments  U  units of an MLP               C  classes per group
  H  imagination horizon              K  bins of a two-hot head        G  blocks of the block-diagonal GRU
  F  feature = D + S*C                X  hidden width of the RSSM
Time: row t holds observation t, the reward that came WITH it, its flags, and the action taken AFTER seeing it. The
action that led to row t is therefore action[t-1]; `is_first[t]` means that nothing before t counts.
"""

import copy
import ctypes
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
from collections import deque
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


# A default without an equation is the authors' configuration of May 2026, which is the paper's table of hyperparameters
# unless the docstring lists the difference.
# fmt: off
Preset = Literal["full", "cpu", "cpu_pixels", "atari100k", "atari", "dmc_proprio", "dmc_vision"]
Size = Literal["1m", "12m", "25m", "50m", "100m", "200m", "400m"]


@dataclass
class Args:
    # Experiment
    env_id: str = "ALE/Pong-v5"  # any gymnasium id: ALE/, MinAtar/, dm_control/walker-walk-v0, my_module:MyEnv-v0
    preset: Preset = "full"  # named settings, see the commands above; explicit flags win over them
    total_timesteps: int = 10_000_000  # agent steps, summed over environments
    seed: int = 1  # seed of everything random: networks, noise, replay, environments
    resume: Optional[str] = None  # run directory to continue
    target_return: Optional[float] = None  # exit with code 1 if the final evaluation stays below this
    size: Size = "200m"  # model size (the paper's table of sizes); deter, hidden, units ... come from it where None
    train_ratio: float = 32.0  # replayed rows trained on per agent step (B*T rows per update)
    cuda: bool = True  # use the GPU if there is one
    compile: bool = True  # torch.compile the recurrent steps, and on a GPU capture the whole update in a CUDA graph
    bf16: bool = True  # compute in bfloat16 on a GPU (parameters, losses, statistics stay float32)
    num_threads: Optional[int] = None  # CPU threads (None: torch's own choice)
    exp_name: str = "dreamerv3"  # part of the run directory's name
    torch_deterministic: bool = True  # deterministic kernels
    track: Optional[str] = None  # project of Weights and Biases that gets the curves too (needs wandb)
    log_every: int = 1000  # agent steps between log lines
    save_every: int = 100_000  # agent steps between checkpoints
    eval_episodes: int = 10  # episodes of the final evaluation and of the random baseline
    # Environment
    num_envs: int = 16  # environments in lockstep
    env_kwargs: str = "{}"  # JSON object passed to gymnasium.make: '{"repeat_action_probability": 0}' for Atari
    action_repeat: Optional[int] = None  # environment steps per agent step (None: 4 for Atari, else 1)
    max_episode_steps: Optional[int] = None  # agent steps after which an episode is truncated (None: the environment's)
    pixels: bool = False  # observe rendered images instead of the environment's own observation
    image_size: int = 64  # images are resized to this many pixels per side
    grayscale: bool = False  # Atari in grey instead of RGB
    # World model
    deter: Optional[int] = None  # D, units of the recurrent state
    hidden: Optional[int] = None  # X, hidden width of the RSSM
    units: Optional[int] = None  # U, width of encoder, decoder and heads
    cnn_depth: Optional[int] = None  # channel multiplier of the convolutions
    classes: Optional[int] = None  # C, classes per latent
    stoch: int = 32  # S, number of categorical latents
    blocks: int = 8  # G, blocks of the GRU
    mlp_layers: int = 3  # layers of the vector encoder and decoder
    bins: int = 255  # K, atoms of the reward and value distributions (odd)
    unimix: float = 0.01  # share of the uniform distribution in every latent
    kl_free: float = 1.0  # free nats per time step (eq. 3)
    dyn_scale: float = 1.0  # weight of the dynamics loss (eq. 2)
    rep_scale: float = 0.1  # weight of the representation loss (eq. 2)
    # Behavior
    gamma: float = 1 - 1 / 333  # discount, learned into the continue head (horizon 333)
    return_lambda: float = 0.95  # lambda of the returns (eq. 5)
    imag_horizon: int = 15  # H, imagined steps
    imag_starts: Optional[int] = None  # replayed states to imagine from, drawn at random (None: all B*T)
    ent_coef: float = 3e-4  # entropy scale of the actor (eq. 6)
    actor_unimix: float = 0.01  # share of the uniform distribution in a discrete policy
    tau: float = 0.02  # update rate of the slow critic
    repval_scale: float = 0.3  # weight of the critic loss on replayed states
    # Optimization
    buffer_size: int = 2_000_000  # replay capacity in rows, summed over environments (the paper: 5M, 143 GB)
    learning_starts: int = 1024  # agent steps before the first update
    batch_size: int = 16  # B
    batch_length: int = 64  # T; one more row is drawn as context
    learning_rate: float = 4e-5  # of the one LaProp optimizer
    warmup_updates: int = 1000  # linear learning-rate warm-up from 0
    agc_clip: float = 0.3  # adaptive gradient clipping: gradient norm at most this times the parameter norm


# Budgets, ratios and preprocessing of the published benchmarks as in the authors' configuration; the paper's table has
# ratio 128 for Atari100k. total_timesteps counts agent steps: frames / action_repeat.
WALKER = dict(env_id="dm_control/walker-walk-v0", total_timesteps=1_000_000, action_repeat=1, buffer_size=1_050_000)
PRESETS = dict(
    full=dict(),
    # A laptop: 176 thousand parameters, a learning rate for hundreds of updates instead of millions, short sequences
    # because the recurrent steps are the cost on a CPU.
    # NOTE: not the paper's: imag_starts and few bins. Many updates per step, since the few last rows of episodes must
    # be seen often enough: at half the ratio some seeds settle for a cart that drifts out of sight after 160 steps.
    cpu=dict(
        env_id="CartPole-v1", total_timesteps=8_000, num_envs=4, deter=128, hidden=64, units=64, cnn_depth=8, classes=8,
        stoch=8, mlp_layers=2, bins=63, batch_length=16, imag_starts=128, learning_rate=1e-3, warmup_updates=100,
        train_ratio=128, ent_coef=1e-3, learning_starts=400, buffer_size=50_000, compile=False, num_threads=1,
        image_size=16, log_every=400, save_every=4_000),
    atari100k=dict(
        env_id="ALE/Boxing-v5", env_kwargs='{"repeat_action_probability": 0}', total_timesteps=100_000, num_envs=1,
        train_ratio=256, buffer_size=110_000, save_every=25_000),
    # NOTE: 3M rows instead of the published 5M: 77 GB (25.6 KB per row), which leaves room on a GPU of 139 GiB.
    atari=dict(
        env_kwargs='{"full_action_space": true}', total_timesteps=50_000_000, image_size=96, grayscale=True,
        buffer_size=3_000_000, save_every=1_000_000),
    dmc_proprio=WALKER | dict(size="1m", train_ratio=1024),
    dmc_vision=WALKER | dict(pixels=True, train_ratio=256),
)
# The image path on a laptop: MinAtar drawn as 16x16 RGB, so two convolution stages instead of four.
PRESETS["cpu_pixels"] = PRESETS["cpu"] | dict(
    env_id="MinAtar/Breakout-v1", env_kwargs='{"difficulty_ramping": false}', pixels=True, num_envs=8, train_ratio=32,
    total_timesteps=18_000, learning_starts=1_000, learning_rate=4e-4, ent_coef=3e-3, log_every=1_000,
    save_every=9_000, eval_episodes=20)
# Flags that shape the networks, for make_config.
SHAPES = "deter hidden units cnn_depth classes stoch blocks mlp_layers bins unimix actor_unimix".split()
# fmt: on


def make_config(size="200m", **overrides):
    """Sizes of the networks: a dict for `Dreamer`. Overrides that are None are ignored."""
    units = {"1m": 64, "12m": 256, "25m": 384, "50m": 512, "100m": 768, "200m": 1024, "400m": 1536}[size]
    # NOTE: D = 8U, depth = classes = U/16; for 1M and 12M the paper's table has other numbers, these are the code's.
    config = dict(deter=8 * units, hidden=units, units=units, cnn_depth=units // 16, classes=units // 16, stoch=32)
    config |= dict(blocks=8, mlp_layers=3, bins=255, unimix=0.01, actor_unimix=0.01)
    return config | {k: v for k, v in overrides.items() if v is not None}


def model_config(args):
    """make_config of the flags of a run."""
    return make_config(args.size, **{k: getattr(args, k) for k in SHAPES})


# ---- Maths -----------------------------------------------------------------------------------------------------------


def symlog(x):
    """sign(x) ln(|x| + 1) (DreamerV3, eq. 9): compresses large values, identity near 0."""
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
    upper = ((y - bins[below]) / (bins[above] - bins[below]).clamp(min=1e-8)).clamp(0, 1)
    return torch.stack([below, above], -1), torch.stack([1 - upper, upper], -1)


def two_hot(y, bins):
    """Two-hot encoding (eq. 12) of y (...): (..., n) with weight on the two atoms around y."""
    index, weight = two_hot_weights(y, bins)
    return torch.zeros(*y.shape, len(bins), device=y.device).scatter_add(-1, index, weight)


def bins_mean(probs, bins):
    """Expectation of a two-hot distribution (eq. 10): (..., n) -> (...). `bins` antisymmetric, as from make_bins."""
    # NOTE: atoms go up to 4.85e8. Summed from left to right, uniform probabilities give a mean far from 0 in float32
    # and the untrained model dreams of rewards. Pairing +b with -b first makes it exactly 0.
    half = len(bins) // 2
    return (probs[..., -half:] - probs[..., :half].flip(-1)) @ bins[-half:]


def two_hot_mean(logits, bins):
    """Expectation of a two-hot head from its logits: (..., n) -> (...)."""
    return bins_mean(torch.softmax(logits.float(), -1), bins)


def two_hot_nll(logp, targets, bins):
    """Weighted cross entropies of log-probabilities (..., n) with several targets [(y (...), weight), ...], summed."""
    # Two entries per target are read; a dense (..., n) target costs ten times as much.
    pairs = [(index, scale * weight) for y, scale in targets for index, weight in [two_hot_weights(y, bins)]]
    index, weight = (torch.cat(x, -1) for x in zip(*pairs, strict=True))  # (..., 2 per target)
    return -(weight * logp.gather(-1, index)).sum(-1)


def two_hot_loss(logits, y, bins):
    """Cross entropy between two_hot(y) and the logits (eq. 11): (..., n) and (...) -> (...)."""
    return two_hot_nll(torch.log_softmax(logits.float(), -1), [(y, 1.0)], bins)


def unimix_probs(logits, eps=0.01):
    """Softmax mixed with eps of the uniform distribution (..., C): no probability is 0, so no KL is infinite."""
    if logits.shape[-1] < 16 and logits.device.type == "cpu":
        # NOTE: on rows of fewer than 16 numbers torch's CPU softmax is several times slower than its parts.
        probs = (logits - logits.detach().amax(-1, keepdim=True)).float().exp()
        probs = probs / probs.sum(-1, keepdim=True)
    else:
        probs = torch.softmax(logits.float(), -1)
    return (1 - eps) * probs + eps / logits.shape[-1]


def sample_onehot(probs, u=None):
    """Straight-through sample: exactly one-hot forward, gradient of probs backward. u: uniform noise, probs' shape
    without C."""
    # Inverse CDF: one random number per group, not one per class; several times faster than Gumbel or multinomial.
    u = torch.rand(probs.shape[:-1], device=probs.device) if u is None else u
    cdf = probs.detach().cumsum(-1)
    index = torch.searchsorted(cdf, u.unsqueeze(-1), right=True).clamp_(max=probs.shape[-1] - 1)  # (..., 1)
    onehot = torch.zeros_like(probs).scatter_(-1, index, 1.0)
    # NOTE: through the mixed probabilities, not through a Gumbel softmax.
    return onehot + (probs - probs.detach()) if probs.requires_grad else onehot


def kl_categorical(p_logits, q_logits, normalized=False):
    """KL[p || q] of categoricals over the last axis, from logits or log-probabilities: (..., C) -> (...). normalized:
    they are known to be log-probabilities."""
    p, q = (x if normalized else torch.log_softmax(x.float(), -1) for x in (p_logits, q_logits))
    return (p.exp() * (p - q)).sum(-1)


def kl_loss(post, prior, free=1.0, normalized=False):
    """Dynamics and representation losses (eq. 3) from logits (B, T, S, C), each (B, T)."""
    # NOTE: free nats clip each time step after the sum over groups; clipping the batch mean is another (the V2) loss.
    dyn = kl_categorical(post.detach(), prior, normalized).sum(-1).clamp(min=free)  # trains the prior
    rep = kl_categorical(post, prior.detach(), normalized).sum(-1).clamp(min=free)  # and, weakly, the posterior
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
    """Adaptive gradient clipping in place: |g| <= clip * max(pmin, |p|) for each whole tensor. Returns old norms."""
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
        # All parameters become views of one vector, so that a step is ten operations and not ten per tensor.
        self.flat = torch.cat([p.detach().flatten() for p in self.params])
        for p, view in zip(self.params, self.flat.split([p.numel() for p in self.params]), strict=True):
            p.data = view.view(p.shape)
        count = torch.zeros((), dtype=torch.float64, device=self.flat.device)  # there: no sync, graphable
        self.state = {"mu": torch.zeros_like(self.flat), "nu": torch.zeros_like(self.flat), "count": count}

    @torch.no_grad()
    def step(self, lr=None, ok=None):
        """One step with learning rate `lr`. `ok`: 0-dim bool; if false nothing changes, and nothing waits for it."""
        (mu, nu, count), ok = self.state.values(), torch.tensor(True) if ok is None else ok
        grad = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in self.params])
        grad = torch.where(ok, grad, 0)  # gradients and rates of 0 leave every number as it is
        rate1, rate2 = (((1 - b) * ok).float() for b in self.betas)
        count += ok
        fix1, fix2 = ((1 - b**count).clamp(min=1e-12).float() for b in self.betas)  # bias corrections
        nu.lerp_(grad * grad, rate2)  # nu <- b2 nu + (1 - b2) g^2
        mu.lerp_(grad.div_((nu / fix2).sqrt_().add_(self.eps)), rate1)  # mu <- b1 mu + (1 - b1) g / sqrt(nu / fix2)
        # NOTE: the learning rate multiplies last; folding it into mu would differ while it warms up.
        self.flat.sub_(mu * ((self.lr if lr is None else lr) / fix1 * ok).float())


# ---- Networks --------------------------------------------------------------------------------------------------------


def trunc_normal_(weight, fan_in, scale=1.0):
    """Normal truncated at two standard deviations, of variance scale^2 / fan_in after truncation (hence 1.1368)."""
    std = 1.1368 * math.sqrt(1 / fan_in)
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    with torch.no_grad():
        weight.mul_(scale)


def inverse_rms(x, eps):
    """1 / sqrt(mean(x^2) + eps) over the last axis, in float32: (..., n) -> (..., 1). eps: 0-dim tensor."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.addcmul(eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()


class NormSiLU(torch.autograd.Function):
    """norm_silu with its gradient by hand: half of the passes over memory of the chain."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        inverse = inverse_rms(x, eps)
        if ctx:
            ctx.save_for_backward(x, weight, inverse)
        return F.silu((x * inverse).mul_(weight), inplace=True).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, inverse = ctx.saved_tensors
        normed = x * inverse
        grad = torch.ops.aten.silu_backward(grad.float(), normed * weight)
        product = grad * normed
        mean = (product * weight).sum(-1, keepdim=True)
        dx = grad.mul_(weight).addcmul_(normed, mean, value=-1 / weight.shape[-1]).mul_(inverse)
        return dx.to(x.dtype), product.sum_to_size(weight.shape), None


def norm_silu(x, weight, eps):
    """SiLU(RMSNorm(x)), the norm in float32: x (..., n) or (..., k, n), weight (n,) or (k, n)."""
    return NormSiLU.apply(x, weight, eps) if torch.is_grad_enabled() else NormSiLU.forward(None, x, weight, eps)


class Linear(nn.Linear):
    """Linear layer with the paper's initialisation; `outscale` multiplies the kernel."""

    def __init__(self, i, o, outscale=1.0):
        super().__init__(i, o)
        trunc_normal_(self.weight, i, outscale)
        nn.init.zeros_(self.bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32; no mean subtraction, no bias. `silu`: the activation after it."""

    def __init__(self, n, eps=1e-4):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.register_buffer("eps", torch.tensor(eps), persistent=False)  # adding a number costs twice as much on a CPU

    def forward(self, x):  # (..., n)
        return (x * inverse_rms(x, self.eps) * self.weight).to(x.dtype)

    def silu(self, x):
        return norm_silu(x, self.weight, self.eps)


class BlockLinear(nn.Module):
    """Block-diagonal linear layer: output group g sees only input group g. Weight (G, i/G, o/G), bias (o,)."""

    def __init__(self, i, o, blocks):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, i // blocks, o // blocks))
        self.bias = nn.Parameter(torch.zeros(o))
        # NOTE: fan-in is the whole input width, not one block's, which would make initial weights sqrt(G) too large.
        trunc_normal_(self.weight, i)

    def forward(self, x):  # (N, i) -> (N, o)
        x = x.unflatten(1, (len(self.weight), -1)).transpose(0, 1)  # (G, N, i/G)
        return torch.baddbmm(self.bias.view(len(x), 1, -1), x, self.weight).transpose(0, 1).flatten(1)


class MLP(nn.Module):
    """`layers` x (Linear, RMSNorm, SiLU) and, if `out` is given, a plain Linear."""

    def __init__(self, i, units, layers, out=None, outscale=1.0):
        super().__init__()
        widths = [i] + [units] * layers
        self.linears = nn.ModuleList(Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.norms = nn.ModuleList(RMSNorm(units) for _ in range(layers))
        self.out = Linear(widths[-1], out, outscale) if out else nn.Identity()

    def forward(self, x, start=0):
        """start: how many layers were done already, see `first_layers`."""
        for linear, norm in zip(self.linears[start:], self.norms[start:], strict=True):
            x = norm.silu(linear(x))
        return self.out(x)


def first_layers(nets, x):
    """The first layers of several MLPs that share an input x (..., n), as one matrix product: [(..., U), ...]."""
    weight, bias = (torch.cat([getattr(net.linears[0], k) for net in nets]) for k in ("weight", "bias"))
    norm = torch.stack([net.norms[0].weight for net in nets])  # (nets, U)
    return norm_silu(F.linear(x, weight, bias).unflatten(-1, norm.shape), norm, nets[0].norms[0].eps).unbind(-2)


def image_stages(size):
    """Depth multipliers of the convolution stages: (2, 3, 4, 4) for 48 pixels and more, fewer for tiny images."""
    return (2, 3, 4, 4)[: min(4, int(math.log2(size / 3)))]


def split_keys(obs_space):
    """Names of the images and of the vectors of a Dict, each sorted."""
    images = [k for k, s in sorted(obs_space.items()) if len(s.shape) == 3]
    return images, [k for k in sorted(obs_space) if k not in images]


class Encoder(nn.Module):
    """Observations {key: (..., *shape)} -> tokens (..., E): symlog MLP for vectors, convolutions for images."""

    def __init__(self, obs_space, units=1024, depth=64, layers=3):
        super().__init__()
        self.images, self.vectors = split_keys(obs_space)
        self.out_dim = 0
        if self.vectors:
            self.mlp, self.out_dim = MLP(sum(obs_space[k].shape[0] for k in self.vectors), units, layers), units
        if self.images:
            side = obs_space[self.images[0]].shape[0]
            widths = [sum(obs_space[k].shape[2] for k in self.images), *(m * depth for m in image_stages(side))]
            self.convs = nn.ModuleList(nn.Conv2d(a, b, 5, padding=2) for a, b in zip(widths, widths[1:]))
            self.norms = nn.ModuleList(RMSNorm(b) for b in widths[1:])
            for conv in self.convs:
                trunc_normal_(conv.weight, 25 * conv.in_channels)
                nn.init.zeros_(conv.bias)
            self.out_dim += (side >> len(self.convs)) ** 2 * widths[-1]

    def forward(self, obs):
        out = []
        if self.vectors:
            out.append(self.mlp(symlog(torch.cat([obs[k] for k in self.vectors], -1))).float())  # eq. 9
        if self.images:
            x = torch.cat([obs[k] for k in self.images], -1)
            lead = x.shape[:-3]
            x = x.flatten(0, -4).float().div_(255).sub_(0.5).permute(0, 3, 1, 2)  # (BT, channels, H, W), channels last
            for conv, norm in zip(self.convs, self.norms, strict=True):
                # NOTE: stride 1, then 2x2 max-pooling, then the norm: the authors' code. The paper's text says strided.
                x = norm.silu(F.max_pool2d(conv(x), 2).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
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

    def initial(self, n, device=None):
        """Zero state: h (n, D), z (n, S, C)."""
        return torch.zeros(n, self.deter, device=device), torch.zeros(n, self.stoch, self.classes, device=device)

    def weights(self):
        """The parts of core_in that see the block's own h, [h, z] and the action. Made once per sequence: slicing a
        weight inside the loop would cost its gradient a copy of the whole tensor at every step, and autocast, which
        remembers copies of whole parameters only, one in bfloat16."""
        x, kind = self.in_h.linears[0].out_features, self.core_in.weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        own, shared = self.core_in.weight.to(dtype).split([self.deter // self.blocks, 3 * x], 1)
        norm = torch.stack([self.in_h.norms[0].weight, self.in_z.norms[0].weight])  # (2, X)
        return own, *shared.transpose(0, 1).flatten(1).tensor_split([2 * x]), norm  # (2X, D), (X, D)

    def embed_action(self, a, w):
        """The share of the core that needs no state, for any number of steps at once: a (..., A) -> (..., D)."""
        return F.linear(self.in_a(a / a.abs().clamp(min=1).detach()), w[2].T, self.core_in.bias).float()

    def core(self, h, z, a):
        """Next recurrent state: h (N, D), z (N, S, C) or (N, S*C), a (N, A) -> (N, D)."""
        w = self.weights()
        return self.core_step(h, z, self.embed_action(a, w), w)

    def core_step(self, h, z, action, w):
        """As core, with action (N, D) from embed_action."""
        own, state, _, norm, *_ = w
        x = torch.cat([self.in_h.linears[0](h), self.in_z.linears[0](z.reshape(len(h), -1))], -1)
        x = norm_silu(x.unflatten(-1, norm.shape), norm, self.core_norm.eps).flatten(1)  # (N, 2X)
        x = torch.addmm(action, x, state).float()  # (N, D): what all blocks share, then each block's own
        x = x.unflatten(1, (self.blocks, -1)) + torch.bmm(
            h.unflatten(1, (self.blocks, -1)).transpose(0, 1), own
        ).transpose(0, 1)
        x = self.core_gates(self.core_norm.silu(x.flatten(1))).float()
        # NOTE: the gates are split inside each block; splitting the flat (N, 3D) in three would mix blocks.
        reset, cand, update = (y.flatten(1) for y in x.view(len(h), self.blocks, 3, -1).unbind(2))  # (N, D) each
        # NOTE: the update gate starts nearly closed, by the -1.
        return torch.lerp(h, torch.tanh(torch.sigmoid(reset) * cand), torch.sigmoid(update - 1))

    def prior(self, h):
        """Probabilities of the latents before the observation is seen: (..., D) -> (..., S, C)."""
        return unimix_probs(self.prior_net(h).unflatten(-1, (self.stoch, -1)), self.unimix)

    def post_step(self, h, z, action, token, keep, u, w):
        """One step with an observation: action (N, D), token (N, X) the observation's share of the posterior layer,
        keep (N, 1): 0 resets, u (N, S) noise. -> h, z (N, S*C), posterior (N, S, C)."""
        h = self.core_step(h * keep, z * keep, action, w)
        x = self.post_out(self.post_norm.silu(torch.addmm(token, h, w[4])))
        probs = unimix_probs(x.unflatten(1, (self.stoch, -1)), self.unimix)
        return h, sample_onehot(probs, u).flatten(1), probs

    def observe(self, tokens, actions, is_first, h, z, generator=None):
        """Filter a sequence: tokens (B, T, E), actions (B, T, A) that led to each row, is_first (B, T), state before
        row 0. Returns h (B, T, D), z (B, T, S, C) and the posterior's log-probabilities (B, T, S, C)."""
        w, keep, z, steps = self.weights(), 1 - is_first.float().unsqueeze(-1), z.flatten(1), []
        # Only what depends on h or z stays in the loop; tokens and actions go through their layers as one batch.
        post, token = self.post_in.weight.to(w[0].dtype).tensor_split([self.deter], 1)
        token = F.linear(tokens, token, self.post_in.bias).float()  # (B, T, X)
        action = self.embed_action(actions * keep, w)  # (B, T, D). NOTE: a reset zeroes the previous action too
        noise = torch.rand(*is_first.T.shape, self.stoch, device=tokens.device, generator=generator)  # (T, B, S)
        for inputs in zip(action.unbind(1), token.unbind(1), keep.unbind(1), noise.unbind(), strict=True):
            h, z, probs = self.post_step(h, z, *inputs, (*w, post.T))
            steps.append((h, z, probs))
        h, z, probs = (torch.stack(x, 1) for x in zip(*steps, strict=True))
        return h, z.unflatten(-1, (self.stoch, -1)), probs.log()


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
    """Model state -> {key: prediction}: images in [0, 1], vectors in symlog space."""

    def __init__(self, obs_space, deter, latent, units=1024, depth=64, layers=3, blocks=8):
        super().__init__()
        self.images, self.vectors = split_keys(obs_space)
        if self.vectors:
            self.mlp = MLP(deter + latent, units, layers)
            self.outs = nn.ModuleList(Linear(units, obs_space[k].shape[0]) for k in self.vectors)
        if self.images:
            self.channels, side = [obs_space[k].shape[2] for k in self.images], obs_space[self.images[0]].shape[0]
            widths = [*(m * depth for m in image_stages(side)[::-1]), sum(self.channels)]
            self.side, self.blocks = side >> len(widths) - 1, blocks
            self.in_h = BlockLinear(deter, self.side**2 * widths[0], blocks)
            self.in_z = MLP(latent, 2 * units, 1, self.side**2 * widths[0])
            self.ups = nn.ModuleList(UpConv(a, b) for a, b in zip(widths, widths[1:]))
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
            x = self.in_h(h).view(len(h), self.blocks, self.side**2, -1).transpose(1, 2).flatten(2)
            x = (x + self.in_z(z).view(x.shape)).unflatten(1, (self.side, self.side))  # (BT, H, W, channels)
            for norm, up in zip(self.norms, self.ups, strict=True):
                x = up(norm.silu(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            x = torch.sigmoid(x.float()).unflatten(0, lead)
            out |= dict(zip(self.images, x.split(self.channels, -1), strict=True))
        return out


class Policy(nn.Module):
    """Actor: categorical for Discrete actions, Normal for Box actions. Its parameters are a tuple of tensors."""

    def __init__(self, i, units, action_space, unimix=0.01, layers=3):
        super().__init__()
        self.discrete, self.unimix = isinstance(action_space, spaces.Discrete), unimix
        self.out_dim = int(action_space.n) if self.discrete else action_space.shape[0]
        self.trunk = MLP(i, units, layers)
        self.outs = nn.ModuleList(Linear(units, self.out_dim, 0.01) for _ in range(1 if self.discrete else 2))

    def forward(self, feat, start=0):
        """(..., F) -> (probs,) or (mean, std), each (..., A)."""
        x = self.trunk(feat, start)
        out = [layer(x).float() for layer in self.outs]
        return (unimix_probs(out[0], self.unimix),) if self.discrete else bounded_normal(*out)

    def sample(self, params, greedy=False, generator=None):
        """Actions (..., A): one-hot, or real numbers that the environment wrapper clips to [-1, 1]."""
        p, kw = params[0].detach(), dict(device=params[0].device, generator=generator)
        if self.discrete:
            u = torch.rand(p.shape[:-1], **kw)
            return F.one_hot(p.argmax(-1), self.out_dim).float() if greedy else sample_onehot(p, u)
        return p if greedy else p + params[1] * torch.randn(p.shape, **kw)

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
    """World model, actor and critic. `obs_space`: a Dict of uint8 images (H, W, C) and float vectors (n,)."""

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

    def imag_step(self, feat, w, table):
        """Act, then move one step in the dream: feat (N, F) = [h, z] -> the next feat, the action (N, A)."""
        action = self.pol.sample(self.pol(feat))
        h, z = feat.split([self.dyn.deter, self.dyn.stoch * self.dyn.classes], -1)
        h = self.dyn.core_step(h, z, self.dyn.embed_action(action, w) if table is None else action @ table, w)
        return self.feat(h, sample_onehot(self.dyn.prior(h))), action

    @torch.no_grad()
    def imagine(self, h, z, horizon):
        """Roll the policy out in the model from h (N, D), z (N, S, C): features (H+1, N, F), actions (H, N, A). Time
        comes first, so that "all but the last step" is a contiguous block and not a copy of the largest tensors."""
        feats, actions, w = [self.feat(h, z)], [], self.dyn.weights()
        # Discrete actions are few: what each adds to the core is looked up.
        table = self.dyn.embed_action(torch.eye(self.pol.out_dim, device=h.device), w) if self.pol.discrete else None
        with torch.inference_mode():  # the stacks below are ordinary tensors again
            for _ in range(horizon):  # no action is drawn in the last state: nothing would use it
                feat, action = self.imag_step(feats[-1], w, table)
                feats.append(feat)
                actions.append(action)
        return torch.stack(feats), torch.stack(actions)

    @torch.no_grad()
    def act(self, obs, is_first, h, z, previous, greedy=False, generator=None):
        """One acting step: obs {key: (N, ...)}, is_first (N,), state, previous action -> h, z, action (N, A)."""
        tokens = self.enc({k: v.unsqueeze(1) for k, v in obs.items()})  # (N, 1, E)
        h, z, _ = self.dyn.observe(tokens, previous.unsqueeze(1), is_first.unsqueeze(1), h, z, generator)
        h, z = h[:, 0], z[:, 0]
        return h, z, self.pol.sample(self.pol(self.feat(h, z)), greedy, generator)


def count_params(model, obs_space=None, action_space=None):
    """Trained parameters of a module, or of the model that a `make_config` dict or a size name describes (built on the
    meta device; by default with the spaces of the published counts: one 64x64x3 image, 6 discrete actions)."""
    if not isinstance(model, nn.Module):
        obs_space = obs_space or spaces.Dict(image=spaces.Box(0, 255, (64, 64, 3), np.uint8))
        with torch.device("meta"):
            config = make_config(model) if isinstance(model, str) else model
            model = Dreamer(obs_space, action_space or spaces.Discrete(6), config)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---- Losses ----------------------------------------------------------------------------------------------------------


def recon_loss(prediction, target):
    """Negative log-likelihood of one observation key up to constants: (B, T, ...) -> (B, T)."""
    # NOTE: sums over pixels and dimensions, not means; means would drown the reconstruction in reward and KL.
    if target.dtype == torch.uint8:
        return F.mse_loss(prediction, target.float().div_(255), reduction="none").flatten(2).sum(-1)
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
    recon = model.dec(h, z)
    reward, alive = first_layers([model.rew, model.con], model.feat(h, z))  # (B, T, U)
    losses = {f"recon_{k}": recon_loss(recon[k], obs[k]) for k in obs}
    losses["reward"] = two_hot_loss(model.rew(reward, 1), rows["reward"], model.bins)
    # NOTE: contdisc: the discount lives in the continue head. Only a true end counts, not a truncated episode.
    target = (1 - rows["is_terminal"].float()) * args.gamma
    alive = model.con(alive, 1).float().squeeze(-1)
    losses["continue"] = F.binary_cross_entropy_with_logits(alive, target, reduction="none")
    losses["dynamics"], losses["representation"] = kl_loss(post, prior, args.kl_free, True)
    return losses, h, z


def critic_loss(logp, returns, slow, bins):
    """Cross entropy with the returns and, as a regulariser, with the slow critic's mean (eq. 5): (..., K) -> (...)."""
    # NOTE: the slow critic regularises; the targets come from the fast one.
    return two_hot_nll(logp, [(returns, 1.0), (slow, 1.0)], bins)


def behavior_loss(model, norm, batch, h, z, args):
    """Eq. 4 to 7: actor and critic on imagined rollouts, critic on replay. Returns {name: (H, N) or (B, T-1)}."""
    B, T = h.shape[:2]
    pick = slice(None) if args.imag_starts is None else torch.rand(B * T, device=h.device).argsort()[: args.imag_starts]
    with torch.no_grad():
        # NOTE: imagination starts from every replayed state and carries no gradient into the world model.
        starts = (x.detach().flatten(0, 1)[pick] for x in (h, z))
        feats, actions = model.imagine(*starts, args.imag_horizon)
        reward, live, slow = first_layers([model.rew, model.con, model.slow], feats)  # (H+1, N, U)
        reward = two_hot_mean(model.rew(reward, 1), model.bins)  # (H+1, N)
        live = torch.sigmoid(model.con(live, 1).float().squeeze(-1))  # (H+1, N), the discount included
        slow = two_hot_mean(model.slow(slow[:-1], 1), model.bins)  # (H, N)
        # NOTE: the weight includes c_0, so that a rollout that starts in a terminal state counts for nothing.
        weight = live.cumprod(0)[:-1]  # (H, N)
        end_value = two_hot_mean(model.val(feats[-1:]), model.bins)  # (1, N)
    torch.clear_autocast_cache()  # NOTE: bfloat16 copies of actor and critic weights made above carry no gradients
    value, policy = first_layers([model.val, model.pol.trunk], feats[:-1])  # (H, N, U)
    logp = torch.log_softmax(model.val(value, 1).float(), -1)  # (H, N, K)
    with torch.no_grad():
        value = torch.cat([bins_mean(logp.exp(), model.bins), end_value])  # (H+1, N)
        inputs = (torch.zeros_like(live.T), 1 - live.T, reward.T, value.T, value.T)
        returns = lambda_return(*inputs, 1.0, args.return_lambda).T  # (H, N)
        scale = norm.update(returns)  # NOTE: updated before it is used
        advantage = (returns - value[:-1]) / scale  # (H, N)
    params = model.pol(policy, 1)
    entropy = model.pol.entropy(params)  # (H, N)
    # NOTE: REINFORCE for discrete and continuous actions alike; no gradient flows back through the dynamics.
    objective = model.pol.log_prob(params, actions) * advantage + args.ent_coef * entropy  # eq. 6, to be maximised
    losses = {"policy": -weight * objective, "value": weight * critic_loss(logp, returns, slow, model.bins)}

    feat = model.feat(h, z)  # (B, T, F). NOTE: with gradients: the replayed critic loss shapes the world model too
    logp = torch.log_softmax(model.val(feat).float(), -1)  # (B, T, K)
    with torch.no_grad():
        value, slow = bins_mean(logp.exp(), model.bins), two_hot_mean(model.slow(feat), model.bins)  # (B, T)
        boot = value.flatten().clone()
        boot[pick] = returns[0]  # imagined returns bootstrap the replayed ones
        last, term, reward = (batch[k][:, 1:].float() for k in ("is_last", "is_terminal", "reward"))
        target = lambda_return(last, term, reward, value, boot.view(B, T), args.gamma, args.return_lambda)  # (B, T-1)
    losses["replay_value"] = (1 - last[:, :-1]) * critic_loss(logp[:, :-1], target, slow[:, :-1], model.bins)
    stats = {"entropy": entropy.mean().detach(), "return_scale": scale, "imagined_return": returns.mean()}
    return losses, stats | {"value_mean": value.mean()}


class Learner:
    """Model, optimizer and return statistics, and the one update of everything."""

    def __init__(self, model, args, device):
        self.model, self.args, self.device, self.norm = model, args, device, ReturnNorm().to(device)
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.opt = LaProp(self.params, args.learning_rate)
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
        self.model.zero_grad()
        loss.backward()
        norms = agc_([p.grad for p in self.params], self.params, self.args.agc_clip)
        # No step on bad numbers, decided on the device. The main loop looks at `bad` when it reads metrics.
        bad = ~torch.isfinite(torch.stack([*losses.values(), norms.norm()]).detach())
        if self.bad is None:
            self.bad, self.names = torch.zeros_like(bad), [*losses, "gradient norm"]
        self.bad.copy_(torch.where(self.bad.any(), self.bad, bad))
        rate = lr_at(self.opt.state["count"], self.args.learning_rate, self.args.warmup_updates)
        self.opt.step(rate, ~self.bad.any())
        slow, fast = list(self.model.slow.parameters()), [p.detach() for p in self.model.val.parameters()]
        torch._foreach_lerp_(slow, fast, self.args.tau)
        stats |= {k: v.detach() for k, v in losses.items()} | {"grad_norm": norms.norm(), "learning_rate": rate}
        return stats, h.detach().to(torch.bfloat16), z.detach().argmax(-1).to(torch.uint8)

    def check(self, where=""):
        """Ends the run naming what was not finite, if something was. Waits for the device."""
        if self.bad is not None and self.bad.any():
            names = ", ".join(n for n, b in zip(self.names, self.bad.tolist(), strict=True) if b)
            raise SystemExit(f"not finite at {where}: {names}; no step was taken, ckpt.pt is from before it")

    def state_dict(self):
        return {"model": self.model.state_dict(), "optimizer": self.opt.state, "return_range": self.norm.range}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.norm.range.copy_(state["return_range"])
        for name, value in self.opt.state.items():
            value.copy_(state["optimizer"][name])


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
    """Compile the recurrent steps and the networks around them; on a GPU capture each whole update in a CUDA graph."""
    print("compiling: the first steps take a minute or more (--no-compile starts at once)", flush=True)
    model.dyn.post_step = torch.compile(model.dyn.post_step, dynamic=False)
    model.imag_step = torch.compile(model.imag_step, dynamic=False)
    model.enc.compile(dynamic=False)  # in place: parameter names in checkpoints stay as they are
    model.dec.compile(dynamic=False)
    if learner.device.type == "cuda":
        learner.update = Graphed(learner.update)


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
        specs = {f"obs/{k}": (s.shape, getattr(torch, s.dtype.name)) for k, s in obs_space.items()}
        specs |= {"action": ((action_dim,), torch.float32), "reward": ((), torch.float32)}
        specs |= dict.fromkeys(("is_first", "is_last", "is_terminal"), ((), torch.bool))
        return specs | {"deter": ((config["deter"],), torch.bfloat16), "stoch": ((config["stoch"],), torch.uint8)}

    def add(self, envs, rows):
        """Append one row to each environment in `envs` (n,): rows {name: (n, ...)} as arrays or tensors."""
        index = torch.as_tensor(envs * self.capacity + self.count[envs] % self.capacity, device=self.device)
        for name, data in self.data.items():
            data.flatten(0, 1)[index] = torch.as_tensor(rows[name], device=self.device).to(data.dtype)
        self.count[envs] += 1
        # Online queue: every stretch of T+1 new rows is trained on once, soon after it was collected.
        # NOTE: it begins at row 1, as the authors' does: rows 1, T+2, 2T+3 ... of an environment.
        size, count = self.length + 1, self.count[envs]
        self.queue.extend((int(e), int(n) - size) for e, n in zip(envs, count) if n > size and n % size == 1 % size)

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
        rows = {k: v[:, :filled].to("cpu", copy=True) for k, v in self.data.items()}  # a view would save all of it
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
        due = 1 if self.previous is None else int((step - self.previous) * self.ratio)
        self.previous = step if self.previous is None else self.previous + due / self.ratio
        return due


# ---- Environment -----------------------------------------------------------------------------------------------------


def resize(image, size):
    """(H, W, C) uint8 of any number of channels -> (size, size, C), bilinear, always a copy."""
    planes = [Image.fromarray(p).resize((size, size), Image.BILINEAR) for p in np.moveaxis(image, 2, 0)]
    return np.stack([np.asarray(p) for p in planes], 2)


class Atari(gym.Wrapper):
    """Frame skip with the maximum of the last two frames, up to 30 no-ops; no reward clipping, no lives."""

    # NOTE: gymnasium's AtariPreprocessing turns grey before it resizes (the authors after it), and shows a stale frame
    # where an episode ends inside a skip.
    noop_max = 30

    def __init__(self, env, args):
        super().__init__(env)
        self.args, shape = args, (args.image_size, args.image_size, 1 if args.grayscale else 3)
        self.observation_space = spaces.Box(0, 255, shape, np.uint8)

    def reset(self, *, seed=None, options=None):
        frame, info = self.env.reset(seed=seed, options=options)
        for _ in range(np.random.default_rng(seed).integers(self.noop_max + 1)):
            frame, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                frame, info = self.env.reset(options=options)
        return self.picture(frame), info  # NOTE: a fresh episode must not see the frame before it: nothing is pooled

    def step(self, action):
        total, frames = 0.0, []
        for _ in range(self.args.action_repeat or 4):
            frame, reward, terminated, truncated, info = self.env.step(action)
            total, frames = total + float(reward), [*frames[-1:], frame]
            if terminated or truncated:
                break
        return self.picture(np.max(frames, axis=0)), total, terminated, truncated, info

    def picture(self, frame):
        x = resize(frame, self.args.image_size)
        return (x @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)[..., None] if self.args.grayscale else x


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


def convert(space, size, name="observation"):
    """What the model sees of an observation: (space, function that brings values there, always as a copy). Images
    become uint8 (size, size, C), everything else a vector: float32 (n,), with numbers of a set as one-hot."""
    if isinstance(space, spaces.Dict) and not any(isinstance(s, spaces.Dict) for s in space.values()):
        parts = {k: convert(s, size, k) for k, s in space.items()}
        return spaces.Dict({k: p[0] for k, p in parts.items()}), lambda x: {k: p[1](x[k]) for k, p in parts.items()}
    shape = space.shape + (1,) if len(space.shape or ()) == 2 else space.shape
    if isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(shape) == 3 and space.high.max() == 255:
        axis = 0 if shape[0] < min(shape[1:]) else 2  # of the channels: frame stacks have them in front
        box = spaces.Box(0, 255, (size, size, shape[axis]), np.uint8)
        return box, lambda x: resize(np.moveaxis(np.reshape(x, shape), axis, 2), size)
    numbers = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
    if not isinstance(space, numbers) or spaces.flatdim(space) > 4096:
        raise ValueError(f"observations must be uint8 images or up to 4096 numbers, {name!r} is {space}")
    box = spaces.Box(-np.inf, np.inf, (spaces.flatdim(space),), np.float32)
    return box, lambda x: np.array(spaces.flatten(space, x), np.float32)


def make_env(args, seed):
    """The environment as the agent sees it. Observations: Box (uint8 images, float32 vectors), or a Dict of them;
    actions: Discrete(n), or Box(-1, 1). Raises ValueError with what was wanted and what was found. Episodes are
    functions of the seed of their reset and of the actions; a first reset without a seed goes on from `seed`."""
    *modules, name = args.env_id.split(":")
    family, kwargs = name.split("/")[0], json.loads(args.env_kwargs)
    for module in modules:
        importlib.import_module(module)
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # draw without a display
        os.environ.setdefault("MUJOCO_GL", "egl")
    if family == "ALE":
        import ale_py  # noqa: F401 (registers its ids)

        # NOTE: the v5 ids skip frames by themselves and without max-pooling; the skip is ours.
        kwargs = dict(frameskip=1) | kwargs
    elif family == "dm_control":
        import shimmy  # noqa: F401 (registers its ids)

        camera = dict(height=args.image_size, width=args.image_size, camera_id=2 if "quadruped" in args.env_id else 0)
        kwargs = dict(render_kwargs=camera, render_mode="rgb_array") | kwargs
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
        env = Atari(env, args)
    elif (args.action_repeat or 1) > 1:
        env = gym.wrappers.RepeatAction(env, args.action_repeat)
    env = MinAtar(env, args.image_size if args.pixels else 160) if family == "MinAtar" else env
    env = gym.wrappers.AddRenderObservation(env) if args.pixels and family != "ALE" else env
    space, function = convert(env.observation_space, args.image_size)
    env, a = gym.wrappers.TransformObservation(env, function, space), env.action_space
    if isinstance(a, spaces.Discrete):
        env = gym.wrappers.TransformAction(env, lambda x: int(x) + int(a.start), spaces.Discrete(a.n))
    elif isinstance(a, spaces.Box) and a.dtype.kind == "f":
        bounded = np.isfinite(a.low) & np.isfinite(a.high)
        low, high = (np.where(bounded, x, d).astype(float) for x, d in ((a.low, -1), (a.high, 1)))

        def rescale(x):  # the policy's Gaussian is unbounded: clip, stretch to the bounds, and never round beyond them
            x = low + (np.clip(np.reshape(x, a.shape), -1, 1) + 1) / 2 * (high - low)
            return np.clip(x.astype(a.dtype), a.low, a.high)

        env = gym.wrappers.TransformAction(env, rescale, spaces.Box(-1, 1, (math.prod(a.shape),), np.float32))
    else:
        raise ValueError(f"actions must be Discrete or a float Box, found {a}")
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


def as_dict(x):
    """An observation or a space as a dict with the keys that the networks know."""
    return x if isinstance(x, (dict, spaces.Dict)) else {"observation": x}


class Agent:
    """A model behind the interface that all scripts share. Observations and actions are numpy, batch first, with the
    types of `make_env`'s spaces; states are tuples of tensors, batch first."""

    def __init__(self, model, args, obs_space, device="cpu"):
        self.model, self.args, self.space, self.device, self.generator = model, args, obs_space, device, None

    def seed(self, seed):
        """Draw from a generator of its own from now on; in training it is torch's."""
        self.generator = torch.Generator(self.device).manual_seed(int(seed))

    def tensors(self, obs):
        return {k: torch.as_tensor(np.asarray(v), device=self.device) for k, v in as_dict(obs).items()}

    def one_hot(self, actions):
        x = torch.as_tensor(np.asarray(actions), device=self.device)
        return F.one_hot(x.long(), self.model.pol.out_dim).float() if self.model.pol.discrete else x.float()

    def decode(self, h, z):
        """What the decoder sees, as observations."""
        out = self.model.dec(h, z)
        for k, space in as_dict(self.space).items():
            x = (out[k] * 255).round() if space.dtype == np.uint8 else symexp(out[k])
            out[k] = x.cpu().numpy().astype(space.dtype)
        return out if isinstance(self.space, spaces.Dict) else out["observation"]

    @torch.no_grad()
    def act(self, obs, state, first, greedy=False):
        """obs (N, ...), state None at the start, first (N,): a new episode begins -> actions (N,) or (N, A), state."""
        if state is None:
            blank = torch.zeros(len(first), self.model.pol.out_dim, device=self.device)
            state = *self.model.dyn.initial(len(first), self.device), blank
        first = torch.as_tensor(first, device=self.device)
        state = self.model.act(self.tensors(obs), first, *state, greedy, self.generator)
        return (state[2].argmax(-1) if self.model.pol.discrete else state[2]).cpu().numpy(), state

    @torch.no_grad()
    def observe(self, obs, actions):
        """Filter episodes from their beginning: obs (N, T, ...), actions (N, T-1, ...) -> state after the last one, and
        what the model makes of each observation (N, T, ...)."""
        tokens, previous = self.model.enc(self.tensors(obs)), F.pad(self.one_hot(actions), (0, 0, 1, 0))
        first = torch.arange(tokens.shape[1], device=self.device).expand(len(tokens), -1) == 0
        start = self.model.dyn.initial(len(tokens), self.device)
        h, z, _ = self.model.dyn.observe(tokens, previous, first, *start, self.generator)
        return (h[:, -1], z[:, -1]), self.decode(h, z)

    @torch.no_grad()
    def imagine(self, state, actions):
        """One imagined transition of N dreams -> state, reward (N,), alive (N,): chance that it goes on, obs."""
        h = self.model.dyn.core(*state, self.one_hot(actions))
        probs = self.model.dyn.prior(h)
        z = sample_onehot(probs, torch.rand(probs.shape[:-1], device=self.device, generator=self.generator))
        feat = self.model.feat(h, z)
        alive = torch.sigmoid(self.model.con(feat)[:, 0]) / self.args.gamma  # the head predicts gamma times this
        reward = two_hot_mean(self.model.rew(feat), self.model.bins)
        return (h, z), reward.cpu().numpy(), alive.clamp(max=1).cpu().numpy(), self.decode(h, z)


def load(run, device="cpu"):
    """The Agent of a run directory."""
    state = load_checkpoint(run)
    args = Args(**state["args"])
    env = make_env(args, args.seed)
    model = Dreamer(spaces.Dict(as_dict(env.observation_space)), env.action_space, model_config(args)).to(device)
    model.load_state_dict(state["learner"]["model"])
    agent = Agent(model.eval(), args, env.observation_space, torch.device(device))
    agent.seed(args.seed)
    agent.global_step, agent.random_return = state["loop"]["global_step"], state["loop"]["random_return"]
    env.close()
    return agent


# ---- Main ------------------------------------------------------------------------------------------------------------


def check_args(args):
    """What would end in a wrong result or an obscure error, before anything is created. -> spaces of the agent."""
    c, rows = model_config(args), args.num_envs * (args.batch_length + 1)
    step = 2 ** len(image_stages(max(6, args.image_size)))
    names = "num_envs batch_size batch_length imag_horizon eval_episodes log_every save_every train_ratio learning_rate"
    rules = {name: (getattr(args, name) > 0, "more than 0") for name in names.split()}
    rules |= {name: (0 <= getattr(args, name) <= 1, "within 0 and 1") for name in ("gamma", "tau", "unimix")}
    rules["buffer_size"] = args.buffer_size >= rows, f"at least {rows}"
    rules["total_timesteps"] = args.total_timesteps > max(args.learning_starts, rows), "beyond --learning-starts"
    rules["deter"] = c["deter"] % c["blocks"] == 0, f"a multiple of --blocks {c['blocks']}"
    rules["classes"] = c["classes"] <= 256, "at most 256"
    rules["image_size"] = args.image_size % step == 0 and 3 <= args.image_size // step <= 16, f"a multiple of {step}"
    for name, (good, wanted) in rules.items():
        if not good:
            fail(f"--{name.replace('_', '-')} must be {wanted}, got {c.get(name, getattr(args, name))}")
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


def make_replay(args, specs, device):
    """The replay, on the GPU if it fits and leaves a fifth of the memory to the update; exits if it fits nowhere."""
    N, T = args.num_envs, args.batch_length
    # Rows per environment. A run can fill two per agent step: an episode's end takes one more.
    capacity = -(-min(args.buffer_size, 2 * args.total_timesteps + N * (T + 1)) // N)
    need = N * capacity * sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values())
    on_gpu = device.type == "cuda" and need < 0.8 * torch.cuda.mem_get_info()[0]
    memory, need = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), need * (2 - on_gpu)  # a checkpoint copies
    if need > memory:
        need = f"needs {need / 1e9:.0f} GB with its copy for a checkpoint, this machine has {memory / 1e9:.0f} GB"
        fail(f"--buffer-size {args.buffer_size} {need}: lower it, or on a laptop --preset cpu")
    return Replay(capacity, N, specs, T, device if on_gpu else "cpu", args.seed)


def finish(args, c, agent, run, writer, stop):
    """Final evaluation on fresh episodes, result.json, and the self-check against --target-return."""
    print(f"look at its dreams: python benchmarks/dreams.py {run}", flush=True)
    agent.seed(args.seed)
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


def train(args):
    """The whole algorithm: act in the environments, store, learn from replay and imagination, repeat. Returns the final
    metrics."""
    # Set up, in an order that finds every mistake of the user's before the first file is made.
    state = load_checkpoint(args.resume) if args.resume else None
    obs_space, action_space = check_args(args)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    seed_everything(args, device)
    with torch.device(device):
        model = Dreamer(spaces.Dict(as_dict(obs_space)), action_space, model_config(args))
    N, specs = args.num_envs, Replay.specs(as_dict(obs_space), model.pol.out_dim, model.config)
    replay = make_replay(args, specs, device)
    run, writer = start_run(args, args.env_id, device, state and state["loop"]["global_step"] + 1)
    stop, envs, learner = stop_signals(), make_envs(args, N, 0), Learner(model, args, device)
    agent, ratio = Agent(model, args, obs_space, device), Ratio(args.train_ratio / args.batch_size / args.batch_length)
    parts = ", ".join(f"{n} {count_params(getattr(model, n)):,}" for n in "enc dyn dec rew con pol val".split())
    print(f"run: {run} on {device}\nparameters: {count_params(model):,} ({parts})")
    print(f"replay: {N} x {replay.capacity:,} rows; {1 / ratio.ratio:g} agent steps per update", flush=True)
    if state:  # each environment is brought back to where it was by the seed of its episode and the actions since then
        c, (obs, reward, first, carry) = SimpleNamespace(**state["loop"]), state["now"]
        learner.load_state_dict(state["learner"])
        replay.load_state_dict(state["replay"])
        obs, reward, first = {k: v.cpu().numpy() for k, v in obs.items()}, reward.numpy(), first.numpy()
        obs, carry = obs if isinstance(obs_space, spaces.Dict) else obs["observation"], [x.to(device) for x in carry]
        for i, env in enumerate(envs.envs):
            env.reset(seed=episode_seed(args, 0, i, c.episode[i]))
            for action in c.history[i]:
                env.step(np.array(action, action_space.dtype))
        set_rng_state(state["rng"])
        ratio.previous = c.ratio
        print(f"resumed at step {c.global_step} of {args.total_timesteps}, update {c.updates}", flush=True)
    else:
        action_space.seed(args.seed)
        draw = lambda obs, state, first: (np.stack([action_space.sample() for _ in first]), state)  # noqa: E731
        returns = evaluate(args, draw, 2, "random policy", stop)
        if stop:
            raise SystemExit(128 + stop[0])
        print(f"random policy: {returns.mean():.1f} +- {returns.std():.1f} over {len(returns)} episodes", flush=True)
        c = SimpleNamespace(global_step=0, updates=0, seconds=0.0, recent=[], random_return=float(returns.mean()))
        c.episode, c.history = [0] * N, [[] for _ in range(N)]  # number of the episode, actions since it began
        obs, _ = envs.reset(seed=[episode_seed(args, 0, i) for i in range(N)])
        reward, first, carry = np.zeros(N), np.ones(N, bool), None
    if args.compile:
        compile_model(model, learner)
    never, ended, metrics, start = np.zeros(N, bool), [], {}, time.time()
    mark = start, c.global_step, c.updates  # of the last log line

    while c.global_step < args.total_timesteps:
        # Act: filter the observation into the latent state, sample an action; store both with what came before.
        actions, carry = agent.act(obs, carry, first)
        rows = {f"obs/{k}": v for k, v in as_dict(obs).items()} | dict(reward=reward, is_first=first, action=carry[2])
        rows |= dict(is_last=never, is_terminal=never, deter=carry[0], stoch=carry[1].argmax(-1))
        replay.add(np.arange(N), rows)
        for past, action in zip(c.history, actions.tolist(), strict=True):
            past.append(action)
        obs, reward, terminated, truncated, infos = envs.step(actions)
        c.global_step, first = c.global_step + N, terminated | truncated
        if first.any():
            # NOTE: an episode's last observation is a row of its own; only `terminated` makes it terminal. Its action
            # is masked, its latents are never read, for a reset follows.
            e = np.flatnonzero(first)
            rows = {k: torch.zeros(len(e), *specs[k][0]) for k in ("action", "deter", "stoch")}
            rows |= {f"obs/{k}": v[e] for k, v in as_dict(obs).items()} | dict(reward=reward[e], is_first=never[e])
            replay.add(e, rows | dict(is_last=first[e], is_terminal=terminated[e]))
            for i in e:
                ended.append(float(infos["episode"]["r"][i]))
                writer.add_scalar("charts/episodic_return", ended[-1], c.global_step)
                writer.add_scalar("charts/episodic_length", int(infos["episode"]["l"][i]), c.global_step)
                c.episode[i], c.history[i], c.recent = c.episode[i] + 1, [], [*c.recent[-9:], ended[-1]]
            seeds = [episode_seed(args, 0, i, c.episode[i]) for i in range(N)]
            obs, _ = envs.reset(seed=seeds, options={"reset_mask": first})
            reward = np.where(first, 0.0, reward)

        # Learn: one update per B*T / train_ratio agent steps.
        ready = c.global_step >= args.learning_starts and replay.sequences().sum()
        for _ in range(ratio(c.global_step) if ready else 0):
            batch, ids = replay.sample(args.batch_size)
            metrics, deter, stoch = learner.update({k: v.to(device) for k, v in batch.items()})
            replay.write_back(ids, deter, stoch)
            c.updates += 1

        # Log and save. On a GPU metrics are read here only: reading waits for the device.
        over = c.global_step >= args.total_timesteps
        log, save = (over or c.global_step % every < N for every in (args.log_every, args.save_every))
        save = save or stop
        if log or save or device.type == "cpu":
            learner.check(f"step {c.global_step}, update {c.updates}")
        if log:
            seconds = time.time() - mark[0]
            charts = dict(SPS=(c.global_step - mark[1]) / seconds, updates_per_s=(c.updates - mark[2]) / seconds)
            for tag, value in (charts | metrics).items():
                part = "charts" if tag in charts or tag == "learning_rate" else "losses"
                writer.add_scalar(f"{part}/{tag}", float(value), c.global_step)
            shown = f"{np.mean(ended):.1f} ({len(ended)} episodes)" if ended else "no episode ended since the last line"
            line = f"global_step={c.global_step}, episodic_return={shown}, updates={c.updates}, SPS={charts['SPS']:.0f}"
            print(line, flush=True)
            mark, ended = (time.time(), c.global_step, c.updates), []
        if save:
            c.ratio, c.seconds, start = ratio.previous, c.seconds + time.time() - start, time.time()
            now = agent.tensors(obs), torch.as_tensor(reward), torch.as_tensor(first), carry
            parts = dict(learner=learner.state_dict(), replay=replay.state_dict(), now=now, loop=vars(c))
            save_checkpoint(parts | dict(script="dreamerv3", args=asdict(args)), run)
        leave(run, stop)
    envs.close()
    return finish(args, c, agent, run, writer, stop)


if __name__ == "__main__":
    train(parse_args(Args, PRESETS, __doc__.split("\n\nDeviations")[0]))
