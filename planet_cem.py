# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch>=2.11,<2.14", "numpy>=2", "tyro>=1", "tensorboard>=2.20", "pillow>=10", "matplotlib>=3.9", "ale-py>=0.11",
#     "minatar>=1.0.15", "gymnasium[box2d,classic-control]>=1.3,<2", "dm_control==1.0.50", "mujoco==3.17.0",
# ]
# ///
"""PlaNet: Learning Latent Dynamics for Planning from Pixels.
Hafner, Lillicrap, Fischer, Villegas, Ha, Lee, Davidson. ICML 2019; equations and appendices as in arXiv:1811.04551v5.

A recurrent state-space model (RSSM: a deterministic and a stochastic path) learns from pixels to compress, to predict
and to foresee rewards. There is no policy and no value: at every step the agent searches for the best action sequence
in the latent space with the cross-entropy method (CEM), executes its first action and plans again.

    python planet_cem.py --env-id dm_control/cheetah-run-v0           # the paper's setting, on a GPU
    python planet_cem.py --preset cpu                                 # cartpole swing-up from its state, minutes
    python planet_cem.py --env-id Pendulum-v1 --reward-scale 0.1      # any gymnasium environment with Box actions
    python planet_cem.py --resume runs/NAME                           # go on, bit for bit on a CPU
    python planet_cem.py --evaluate runs/NAME                         # returns of fresh episodes without exploration
    python planet_cem.py --play runs/NAME                             # play inside the learned world

Measured: see the README's result table; every row has its command, commit, hardware and seeds.

Paper [P], authors' released code [O] (google-research/planet) and this file, where they are not all the same:
  * The dynamics have one hidden layer of 200 units in prior and posterior, as [O]; [P] says two layers everywhere.
  * The reward head has 3 layers of 300 units and its loss weighs 10, as [O]; [P] says 2 layers of 200 and no weights.
    `--reward-layers 2 --reward-units 200 --reward-loss-scale 1` is [P].
  * [P]'s Algorithm 2 refits the CEM with a mean absolute deviation; [O] and this file use the standard deviation.
  * Exploration noise has standard deviation 0.3, as [O]; [P] writes Normal(0, 0.3).
  * Latent overshooting is off as in [P] (`--overshooting 50` is the first version of the paper); it slightly hurts.
  * Replay draws episodes uniformly; [O] does so up to 500 episodes and then gives recent ones half of the draws.
  * Observations without pixels (`--no-pixels`) pass through two dense layers; neither [P] nor [O] has this mode.
  * Smaller images have fewer convolutions and a larger image loss, (64 / size)^2: else the KL would outweigh them.
  * Adam is torch's, whose eps is added after the bias correction; TensorFlow's comes before it and is larger early on.
  * Episodes shorter than a chunk are padded and the padding is masked; the paper's tasks have none.
  * [O] has a phase machine with 5 random test episodes; here each report plays one test episode with the planner.

PlaNet plans over 12 steps of predicted reward, without a value beyond them and without a model of early ends: it suits
dense rewards and episodes of fixed length. For a stronger planner with a learned value see TD-MPC2.

The algorithm is in the parts Maths, Networks, Losses and Replay and in the loop of `train`; a reader may stop there.
The rest of the file makes it usable alone: environments, evaluation and dreams, checkpoints, checked flags.

Symbols in shape comments:
  T  time (rows of a chunk)            A  action dimensions             S  stochastic state s (sample)
  B  batch (chunks, environments)      E  encoder output (embedding)    D  deterministic state h (belief)
  H  planning horizon                  J  candidate action sequences    K  elites among them
  N  = B * J                           X  hidden width of the RSSM      F  feature = D + S
Time comes first, batch second. Time convention, everywhere: row t holds observation t, and the action and the reward
that LED to it. The first row of an episode has action 0 and reward 0.
"""

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
from dataclasses import asdict, dataclass, fields
from typing import Literal, NamedTuple, Optional

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import nn

# ---- Args and presets ------------------------------------------------------------------------------------------------


# A default without a source is both the paper's (appendix A) and the authors' released code's.
@dataclass
class Args:
    # ---- Experiment
    exp_name: str = "planet_cem"
    """name of the experiment, part of the run directory"""
    preset: Literal["full", "cpu", "cpu_pixels"] = "full"
    """named settings; explicit flags win over them"""
    seed: int = 1
    """seed of everything random: networks, noise, replay, environments"""
    torch_deterministic: bool = True
    """deterministic cuDNN kernels"""
    cuda: bool = True
    """use the GPU if there is one"""
    compile: bool = True
    """torch.compile recurrent steps, encoder and decoder, and on a GPU capture update and planner in CUDA graphs"""
    bf16: bool = True
    """convolutions in bfloat16 on a GPU (dynamics, losses and planning stay float32); on a CPU always float32"""
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
    save_every: int = 12_500
    """agent steps between checkpoints, which are written between episodes"""
    save_replay: bool = True
    """keep the replay in the checkpoint; without it --resume starts with new random episodes and is not bit-exact"""
    resume: Optional[str] = None
    """run directory to continue"""
    evaluate: Optional[str] = None
    """run directory to evaluate, nothing is trained"""
    play: Optional[str] = None
    """run directory whose dream is played with the keyboard"""
    target_return: Optional[float] = None
    """exit with code 1 if the final evaluation stays below this"""

    # ---- Environment
    env_id: str = "dm_control/cartpole-swingup-v0"
    """`dm_control/<domain>-<task>-v0`, any gymnasium id with Box actions, `module:Id-v0`"""
    env_kwargs: str = "{}"
    """JSON object passed to gymnasium.make"""
    total_timesteps: Optional[int] = None
    """agent steps, summed over environments; the last episode is finished (default: 1,000,000 / action repeat, which
    is the paper's 1000 episodes of the control suite)"""
    num_envs: int = 1
    """environments in lockstep: this many episodes are collected, then --updates-per-episode times as many updates"""
    action_repeat: Optional[int] = None
    """environment steps per agent step (default: the paper's for its six tasks, see ACTION_REPEAT, else 1)"""
    pixels: bool = True
    """observe rendered images; --no-pixels: the environment's own observation, vectors or images"""
    image_size: int = 64
    """pixels per side: 16, 32 or 64"""
    bits: int = 5
    """colour depth the model sees, per channel"""
    fast_render: bool = False
    """control suite without shadows, reflections and multisampling: seven times faster without a GPU, other images"""
    reward_scale: float = 1.0
    """factor on the rewards that the model learns; bring one agent step's reward to the order of 1"""
    max_episode_steps: Optional[int] = None
    """agent steps after which an episode is truncated, at most the environment's own limit (default: that limit)"""

    # ---- World model
    belief_size: int = 200
    """D, deterministic state, units of the GRU"""
    state_size: int = 30
    """S, stochastic state"""
    hidden_size: int = 200
    """X, hidden width of the dynamics, and of the networks for vectors"""
    min_stddev: float = 0.1
    """least standard deviation of prior and posterior (authors' code)"""
    cnn_depth: int = 32
    """channels of the first convolution; the following ones double them"""
    reward_layers: int = 3
    """hidden layers of the reward head (authors' code; the paper has 2)"""
    reward_units: int = 300
    """their width (authors' code; the paper has 200)"""
    kl_free: float = 3.0
    """free nats per time step"""
    kl_scale: float = 1.0
    """weight of the KL"""
    recon_scale: Optional[float] = None
    """weight of the observation loss (default: (64 / image size)^2 for images, 1 for vectors)"""
    reward_loss_scale: float = 10.0
    """weight of the reward loss (authors' code; the paper has 1)"""
    overshooting: int = 0
    """longest distance of latent overshooting (appendix D); 0 and 1: none"""
    overshooting_scale: float = 1.0
    """its weight beta, shared by all distances"""

    # ---- Behavior
    plan_horizon: int = 12
    """H, steps of a plan"""
    plan_iterations: int = 10
    """refits of the cross-entropy method"""
    plan_candidates: int = 1000
    """J, action sequences per refit"""
    plan_elites: int = 100
    """K, best sequences, to which the next distribution is fitted"""
    plan_bf16: bool = False
    """roll candidates out in bfloat16: faster on CPUs that have its instructions; plans differ in late digits"""
    action_noise: float = 0.3
    """standard deviation of the exploration noise while collecting"""

    # ---- Optimization
    buffer_size: int = 2_000_000
    """replay capacity in rows; never more is allocated than --total-timesteps can fill with episodes of full length"""
    replay_cuda: bool = True
    """keep the replay on the GPU if it fits there, otherwise in host memory"""
    seed_episodes: int = 5
    """episodes of random actions at the start"""
    initial_updates: int = 100
    """updates before the first planned episode"""
    updates_per_episode: int = 100
    """updates after each further episode"""
    batch_size: int = 50
    """B, chunks per update"""
    batch_length: int = 50
    """T, rows of a chunk"""
    learning_rate: float = 1e-3
    """of Adam"""
    adam_eps: float = 1e-4
    """of Adam"""
    max_grad_norm: float = 1000.0
    """clip the global gradient norm"""

    # ---- Evaluation and logging
    eval_episodes: int = 10
    """episodes of the final evaluation, of --evaluate and of the random baseline"""
    log_every: int = 1
    """agent steps between log lines, which come between episodes"""
    report_every: int = 2_500
    """agent steps between test episodes without exploration: return, prediction errors, open-loop video (0: never)"""


# fmt: off
PRESETS = {
    "full": {},
    # A laptop: cartpole swing-up from its state instead of pixels, 66 thousand parameters, 8 planned episodes.
    "cpu": dict(
        pixels=False, total_timesteps=1_625, belief_size=64, state_size=16, hidden_size=64, reward_layers=2,
        reward_units=64, kl_free=1.0, plan_iterations=5, plan_candidates=300, plan_elites=30, batch_size=32,
        batch_length=25, initial_updates=500, updates_per_episode=150, eval_episodes=5, compile=False, num_threads=1,
        report_every=500, save_every=500,
    ),
}
# The image path on a laptop, from end to end. NOTE: it does not learn to control: that takes thousands of updates of
# full batches, hours without a GPU. It shows losses falling and dreams.
PRESETS["cpu_pixels"] = PRESETS["cpu"] | dict(
    pixels=True, image_size=32, cnn_depth=8, fast_render=True, batch_size=16, batch_length=20, eval_episodes=2,
)
# The paper's action repeats (appendix A; balance: its first version), in environment steps per agent step.
ACTION_REPEAT = {
    "cartpole-swingup": 8, "cartpole-balance": 8, "reacher-easy": 4, "cheetah-run": 4, "finger-spin": 2,
    "ball_in_cup-catch": 4, "walker-walk": 2,
}
# Allowed values, both ends included; checked before anything is created. Fields that are None are skipped.
RANGES = {
    **dict.fromkeys(
        "num_threads save_every total_timesteps num_envs action_repeat max_episode_steps belief_size state_size "
        "hidden_size cnn_depth reward_layers reward_units plan_horizon plan_iterations plan_candidates plan_elites "
        "buffer_size seed_episodes initial_updates updates_per_episode batch_size batch_length eval_episodes "
        "log_every".split(), (1, math.inf),
    ),
    **dict.fromkeys("kl_free kl_scale recon_scale reward_loss_scale overshooting_scale".split(), (0, 1e9)),
    **dict.fromkeys("reward_scale min_stddev max_grad_norm".split(), (1e-9, 1e9)),
    **{"seed": (0, 2**32 - 1), "image_size": (8, 256), "bits": (1, 8), "action_noise": (0, 10)},
    **{"learning_rate": (1e-12, 1), "adam_eps": (1e-20, 1), "overshooting": (0, 10_000), "report_every": (0, 10**12)},
    **{"target_return": (-1e300, 1e300)},
}
# fmt: on


# ---- Maths -----------------------------------------------------------------------------------------------------------


def preprocess(img, bits=5, noise=True):
    """Integers 0..255 of any shape -> reduced to `bits` bits, dequantised, float32 in [-0.5, 0.5). noise: True draws
    U(0, 1) anew, False adds none, a tensor (of the image's shape, or one number) is taken as it is."""
    # NOTE: the noise is part of the model's input, also when acting: a Gaussian decoder fits a continuous density, and
    # without it the density at the 32 levels could grow without bound.
    level = torch.div(img.int(), 2 ** (8 - bits), rounding_mode="floor").float()
    if noise is True:
        noise = torch.rand(img.shape, device=img.device)
    if torch.is_tensor(noise):
        # NOTE: float32 rounds level + 0.99999999 up to the next level; the interval must stay open.
        level = level + noise.clamp(max=1 - 2.0 ** (bits - 23))
    return level / 2**bits - 0.5


def kl_divergence(mean_q, std_q, mean_p, std_p):
    """KL[q || p] of diagonal Gaussians in nats, summed over the last axis: (..., S) -> (...)."""
    ratio, shift = std_q / std_p, (mean_q - mean_p) / std_p
    return 0.5 * (ratio**2 + shift**2 - 1 - 2 * ratio.log()).sum(-1)


def free_nats_loss(kl, free=3.0, mask=None):
    """Mean over all steps of max(0, kl - free): (...) -> scalar. `mask` (...): steps that count."""
    # NOTE: per step, after the sum over dimensions; clamping the mean would let some steps collapse.
    return masked_mean((kl - free).clamp(min=0), mask)


def masked_mean(x, mask=None):
    """Mean of x (...) over the steps where mask (...) is 1."""
    return x.mean() if mask is None else (x * mask).sum() / mask.sum().clamp(min=1)


def image_log_prob(mean, image):
    """log N(image; mean, 1) summed over the last three axes: (..., C, H, W) -> (...)."""
    return reward_log_prob(mean, image).flatten(-3).sum(-1)


def reward_log_prob(mean, reward):
    """log N(reward; mean, 1) of each number: (...) -> (...)."""
    return -0.5 * (mean - reward) ** 2 - 0.5 * math.log(2 * math.pi)


def gru_cell(x, h, w, b, w_c, b_c):
    """One step of a GRU: x (..., X), h (..., D), w (X + D, 2D), b (2D,), w_c (X + D, D), b_c (D,) -> h' (..., D).

    [r, u] = sigmoid([x, h] w + b);  c = tanh([x, r h] w_c + b_c);  h' = u h + (1 - u) c."""
    # NOTE: torch.nn.GRUCell multiplies with r after its matrix product and has two biases: another cell.
    n, d, shape = x.shape[-1], h.shape[-1], h.shape
    x, h = x.reshape(-1, n), h.reshape(-1, d)
    # Two products per layer instead of joining x and h: no copies in the innermost loop of the planner.
    r, u = torch.addmm(b, x, w[:n]).addmm_(h, w[n:]).sigmoid_().split(d, -1)
    c = torch.addmm(b_c, x, w_c[:n]).addmm_(r * h, w_c[n:])
    c = torch.sigmoid(c.mul_(2)).mul(2).sub_(1)  # tanh(c): the same function, several times faster on a CPU
    return torch.lerp(c, h, u).view(shape)


def cem(
    step_fn, reward_fn, state, action_dim, horizon=12, candidates=1000, iterations=10, elites=100, noise=None,
    generator=None,
):  # fmt: skip
    """Cross-entropy method (appendix B) for a batch of states at once: mean and standard deviation of the last fitted
    distribution over action sequences, each (B, H, A).

    state: tensor (B, ...) or a tuple of them; step_fn(state (N, ...), action (N, A)) -> next state;
    reward_fn(states (H, N, ...)) -> rewards (H, N); noise: standard normal (iterations, B, J, H, A) or None."""
    single = torch.is_tensor(state)
    # NOTE: all candidates of one state stand together, in `state` and in `sequence` alike. Tiling the states instead
    # (candidate by candidate) would score them under the wrong states as soon as there are two.
    parts = [x.repeat_interleave(candidates, 0) for x in ((state,) if single else state)]  # (N, ...)
    batch, device = len(parts[0]) // candidates, parts[0].device
    mean, std = torch.zeros(2, batch, horizon, action_dim, device=device).unbind()
    std = std + 1
    for i in range(iterations):
        shape = batch, candidates, horizon, action_dim
        draw = torch.randn(shape, device=device, generator=generator) if noise is None else noise[i]
        # NOTE: clipped before they are scored and refitted; otherwise the mean saturates outside of the box.
        sequence = torch.addcmul(mean.unsqueeze(1), std.unsqueeze(1), draw).clamp(-1, 1)  # (B, J, H, A)
        current, visited = parts[0] if single else tuple(parts), []
        for action in sequence.flatten(0, 1).unbind(1):  # (N, A)
            current = step_fn(current, action)
            visited.append(current)
        # Rewards of all steps in one call: on a GPU the planner is bound by the number of kernels.
        states = torch.stack(visited) if single else tuple(torch.stack(x) for x in zip(*visited, strict=True))
        returns = reward_fn(states).sum(0).view(batch, candidates)  # no discount, no value at the end
        best = returns.topk(elites, sorted=False).indices  # (B, K)
        chosen = sequence.gather(1, best[..., None, None].expand(-1, -1, horizon, action_dim))  # (B, K, H, A)
        # NOTE: population variance, as in the authors' code; the paper's Algorithm 2 prints an absolute deviation.
        var, mean = torch.var_mean(chosen, 1, correction=0)
        std = (var + 1e-6).sqrt()
    return mean, std


# ---- Networks --------------------------------------------------------------------------------------------------------


def glorot_(layer):
    """Glorot uniform weights and zero biases (TensorFlow's defaults, as in the authors' code)."""
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def dense(i, o):
    return glorot_(nn.Linear(i, o))


def relu_mlp(i, units, layers, o):
    """`layers` x (dense, ReLU) and a plain dense layer."""
    widths = [i] + [units] * layers
    hidden = [m for a, b in zip(widths, widths[1:]) for m in (dense(a, b), nn.ReLU(inplace=True))]
    return nn.Sequential(*hidden, dense(widths[-1], o))


# Kernels of the transposed convolutions by image size; the encoder has as many stages. 64: the paper's (World Models').
KERNELS = {16: (5, 8), 32: (5, 5, 8), 64: (5, 5, 6, 6)}


class ObsEncoder(nn.Module):
    """Observations {key: (..., C, H, W) preprocessed or (..., n)} -> embedding (..., E)."""

    def __init__(self, obs_space, hidden=200, depth=32):
        super().__init__()
        self.images = [k for k, s in sorted(obs_space.items()) if len(s.shape) == 3]
        self.vectors = [k for k in sorted(obs_space) if k not in self.images]
        self.out_dim = 0
        if self.images:
            stages = len(KERNELS[obs_space[self.images[0]].shape[0]])
            widths = [sum(obs_space[k].shape[2] for k in self.images), *(depth << i for i in range(stages))]
            pairs = zip(widths, widths[1:])
            self.convs = nn.Sequential(*(m for a, b in pairs for m in (glorot_(nn.Conv2d(a, b, 4, 2)), nn.ReLU())))
            self.out_dim += 4 * widths[-1]  # NOTE: 2x2 pixels are left and taken flat, without a dense layer
        if self.vectors:
            n = sum(obs_space[k].shape[0] for k in self.vectors)
            self.mlp = nn.Sequential(relu_mlp(n, hidden, 1, hidden), nn.ReLU())
            self.out_dim += hidden

    def forward(self, obs):
        out = []
        if self.images:
            x = torch.cat([obs[k] for k in self.images], -3) if len(self.images) > 1 else obs[self.images[0]]
            out.append(self.convs(x.flatten(0, -4)).reshape(*x.shape[:-3], -1).float())
        if self.vectors:
            out.append(self.mlp(torch.cat([obs[k] for k in self.vectors], -1)).float())
        return torch.cat(out, -1)


class Deconv(nn.ConvTranspose2d):
    """Transposed convolution with stride 2, computed as a convolution with stride 1 that gives all four parities of
    output pixels as channels: the same function and the same products, a quarter faster on a CPU."""

    def __init__(self, i, o, kernel):
        super().__init__(i, o, kernel, 2)

    def forward(self, x):  # (N, i, H, W) -> (N, o, 2H + k - 2, 2W + k - 2)
        (i, o, k, _), side = self.weight.shape, x.shape[-1]
        if side == 1:
            return (x.flatten(1) @ self.weight.flatten(1)).view(-1, o, k, k) + self.bias[:, None, None]
        n, odd = (k + 1) // 2, k % 2
        w = F.pad(self.weight, (0, odd, 0, odd)).view(i, o, n, 2, n, 2)  # taps by distance and parity, both axes
        w = w.flip(2, 4).permute(1, 3, 5, 0, 2, 4).reshape(4 * o, i, n, n)  # as pixel_shuffle wants it
        y = F.pixel_shuffle(F.conv2d(x, w, self.bias.repeat_interleave(4), padding=n - 1), 2)
        return y[..., : 2 * side + k - 2, : 2 * side + k - 2]


class ObsDecoder(nn.Module):
    """Features (..., F) -> {key: mean of the observation}: images (..., C, H, W) in [-0.5, 0.5), vectors (..., n)."""

    def __init__(self, obs_space, feature, hidden=200, depth=32):
        super().__init__()
        self.images = [k for k, s in sorted(obs_space.items()) if len(s.shape) == 3]
        self.vectors = [k for k in sorted(obs_space) if k not in self.images]
        self.channels = [obs_space[k].shape[2] for k in self.images]
        self.widths = [obs_space[k].shape[0] for k in self.vectors]
        if self.images:
            kernels = KERNELS[obs_space[self.images[0]].shape[0]]
            n = len(kernels)
            widths = [depth << (n + 1), *(depth << i for i in reversed(range(n - 1))), sum(self.channels)]
            self.start = dense(feature, widths[0])  # NOTE: linear; a 1x1 image with this many channels
            ups = [glorot_(Deconv(a, b, k)) for a, b, k in zip(widths, widths[1:], kernels)]
            self.ups = nn.Sequential(*(m for up in ups for m in (up, nn.ReLU())))[:-1]
        if self.vectors:
            self.mlp = relu_mlp(feature, hidden, 2, sum(self.widths))

    def forward(self, feat):
        out = {}
        if self.images:
            x = self.ups(self.start(feat).flatten(0, -2)[..., None, None])
            x = x.float().view(*feat.shape[:-1], *x.shape[1:])
            out |= dict(zip(self.images, x.split(self.channels, -3)))
        if self.vectors:
            out |= dict(zip(self.vectors, self.mlp(feat).float().split(self.widths, -1)))
        return out


class State(NamedTuple):
    """State of the RSSM: a sample of the stochastic part, its distribution, and the belief."""

    sample: torch.Tensor  # (..., S)
    mean: torch.Tensor  # (..., S)
    stddev: torch.Tensor  # (..., S)
    belief: torch.Tensor  # (..., D)

    @property
    def feat(self):
        return torch.cat([self.sample, self.belief], -1)  # (..., F)


class Rssm(nn.Module):
    """Recurrent state-space model (eq. 4): h_t = f(h_{t-1}, s_{t-1}, a_{t-1}), prior p(s_t | h_t), posterior
    q(s_t | h_t, o_t). Two paths: h remembers, s can express that the future is open; both are needed."""

    def __init__(self, embed, actions, belief=200, sample=30, hidden=200, min_stddev=0.1):
        super().__init__()
        self.belief, self.sample, self.min_stddev = belief, sample, min_stddev
        self.inp = dense(sample + actions, hidden)
        self.w, self.b = nn.Parameter(torch.empty(hidden + belief, 2 * belief)), nn.Parameter(torch.ones(2 * belief))
        self.w_c, self.b_c = nn.Parameter(torch.empty(hidden + belief, belief)), nn.Parameter(torch.zeros(belief))
        nn.init.xavier_uniform_(self.w)  # NOTE: and gate biases of 1: the cell begins by remembering
        nn.init.xavier_uniform_(self.w_c)
        # NOTE: one hidden layer in prior and posterior, as in the authors' code; the paper says two.
        self.prior_net = relu_mlp(belief, hidden, 1, 2 * sample)
        self.post_in, self.post_out = dense(belief + embed, hidden), dense(hidden, 2 * sample)
        for head in (self.prior_net[-1], self.post_out):  # mean and deviation are layers of their own: so is their init
            for half in head.weight.chunk(2):
                nn.init.xavier_uniform_(half)

    def initial(self, n, device=None):
        """Zero state of n environments."""
        zero = torch.zeros(n, self.sample, device=device)
        return State(zero, zero, zero, torch.zeros(n, self.belief, device=device))

    def stats(self, x):
        """(..., 2S) -> mean and standard deviation (..., S)."""
        mean, raw = x.chunk(2, -1)
        return mean, F.softplus(raw.contiguous()) + self.min_stddev  # strided input is 20 times slower on a CPU

    def draw(self, x, belief, noise=None):
        """Reparameterised sample from (..., 2S), as a State."""
        mean, std = self.stats(x)
        return State(torch.addcmul(mean, std, torch.randn_like(std) if noise is None else noise), mean, std, belief)

    def core(self, sample, belief, action):
        """The deterministic path: s (N, S), h (N, D), a (N, A) -> h' (N, D)."""
        return self.core_step(sample, belief, F.linear(action, self.inp.weight[:, self.sample :], self.inp.bias))

    def core_step(self, sample, belief, action_in):
        x = (action_in + F.linear(sample, self.inp.weight[:, : self.sample])).relu_()  # (N, X)
        return gru_cell(x, belief, self.w, self.b, self.w_c, self.b_c)

    def prior(self, state, action, noise=None):
        """One step without an observation: state (N, .), the action (N, A) taken in it -> State."""
        belief = self.core(state.sample, state.belief, action)
        return self.draw(self.prior_net(belief), belief, noise)

    def posterior(self, state, action, embed, noise=None):
        """One step with an observation: state (N, .), the action (N, A) that led to it, embedding (N, E) -> State."""
        action_in = F.linear(action, self.inp.weight[:, self.sample :], self.inp.bias)
        token = F.linear(embed, self.post_in.weight[:, self.belief :], self.post_in.bias)
        return self.post_step(state.sample, state.belief, action_in, token, noise)

    def post_step(self, sample, belief, action_in, token, noise=None):
        """`posterior` with the shares of action and embedding in their layers already computed, (N, X) each."""
        belief = self.core_step(sample, belief, action_in)  # NOTE: the posterior sees the belief of the same step
        x = torch.relu(token + F.linear(belief, self.post_in.weight[:, : self.belief]))
        return self.draw(self.post_out(x), belief, noise)

    def observe(self, embed, prev_action, state=None, generator=None):
        """Filter a sequence: embed (T, B, E), prev_action (T, B, A), the state before row 0 (default: zero). Returns
        prior and posterior, States (T, B, .)."""
        state = self.initial(embed.shape[1], embed.device) if state is None else state
        # Only what depends on the state stays in the loop; embeddings and actions go through their layers as one batch.
        token = F.linear(embed, self.post_in.weight[:, self.belief :], self.post_in.bias)  # (T, B, X)
        action_in = F.linear(prev_action, self.inp.weight[:, self.sample :], self.inp.bias)  # (T, B, X)
        options = dict(size=(*embed.shape[:2], self.sample), device=embed.device, generator=generator)
        states = []
        for inputs in zip(action_in.unbind(0), token.unbind(0), torch.randn(**options).unbind(0)):
            state = self.post_step(state.sample, state.belief, *inputs)  # NOTE: goes on from the posterior's sample
            states.append(state)
        post = State(*(torch.stack(x) for x in zip(*states)))  # (T, B, .)
        return self.draw(self.prior_net(post.belief), post.belief, torch.randn(**options)), post

    def imagine(self, state, actions, noise=None):
        """Roll the prior out: state (B, .), actions (H, B, A) -> States (H, B, .). noise: (H, B, S) or None."""
        states = []
        for t, action in enumerate(actions.unbind(0)):
            state = self.prior(state, action, None if noise is None else noise[t])
            states.append(state)
        return State(*(torch.stack(x) for x in zip(*states)))


class Planet(nn.Module):
    """World model. `obs_space`: a Dict of uint8 images (H, W, C) and float vectors (n,)."""

    def __init__(self, obs_space, action_dim, config):
        super().__init__()
        c, self.config, self.action_dim = config, config, action_dim
        feature = c["belief_size"] + c["state_size"]
        self.encoder = ObsEncoder(obs_space, c["hidden_size"], c["cnn_depth"])
        sizes = [c[k] for k in ("belief_size", "state_size", "hidden_size", "min_stddev")]
        self.rssm = Rssm(self.encoder.out_dim, action_dim, *sizes)
        self.decoder = ObsDecoder(obs_space, feature, c["hidden_size"], c["cnn_depth"])
        self.reward = relu_mlp(feature, c["reward_units"], c["reward_layers"], 1)
        self.low = None  # see plan_networks

    def inputs(self, obs, noise=True):
        """Raw observations {key: (..., H, W, C) uint8 or (..., n)} -> what encoder and losses see."""
        bits = self.config["bits"]
        return {k: preprocess(v.movedim(-1, -3), bits, noise) if v.dtype == torch.uint8 else v for k, v in obs.items()}

    def predict_reward(self, feat, head=None):
        """(..., F) -> (...)."""
        head = head or self.reward
        if feat.device.type != "cpu":
            return head(feat).squeeze(-1)
        # Blocks whose activations stay in the cache: twice as fast on a CPU.
        return torch.cat([head(x) for x in feat.flatten(0, -2).split(1024)]).view(feat.shape[:-1])

    def plan_step(self, rssm, state, action):
        """One step of the planner's rollout: (sample (N, S), belief (N, D)), action (N, A) -> the next two."""
        state = rssm.prior(State(state[0], None, None, state[1]), action.to(state[1].dtype))
        return state.sample, state.belief

    def plan_networks(self, bf16):
        """Dynamics and reward head, or copies of them in bfloat16 with the present weights."""
        if not bf16:
            return self.rssm, self.reward
        if self.low is None:
            self.low = [copy.deepcopy(x).bfloat16() for x in (self.rssm, self.reward)]
        for low, net in zip(self.low, (self.rssm, self.reward)):
            torch._foreach_copy_(list(low.parameters()), list(net.parameters()))  # a thousandth of a plan's time
        return self.low

    @torch.no_grad()
    def plan(self, sample, belief, settings):
        """First actions (B, A) of the best plans from sample (B, S), belief (B, D)."""
        rssm, reward = self.plan_networks(settings["plan_bf16"])
        # NOTE: every step plans from scratch, from N(0, 1), from one sample of the posterior.
        mean, _ = cem(
            lambda state, action: self.plan_step(rssm, state, action),
            lambda states: self.predict_reward(torch.cat(states, -1), reward).float(),
            tuple(x.to(rssm.w.dtype) for x in (sample, belief)), self.action_dim, settings["plan_horizon"],
            settings["plan_candidates"], settings["plan_iterations"], settings["plan_elites"],
        )  # fmt: skip
        return mean[:, 0]

    @torch.no_grad()
    def filter(self, obs, first, state, previous):
        """One step of filtering: obs {key: (B, ...)}, first (B,): an episode begins, the state before, the executed
        action (B, A). Returns the posterior State (B, .)."""
        keep = 1 - first.float().unsqueeze(-1)
        embed = self.encoder(self.inputs(obs))  # (B, E)
        return self.rssm.posterior(State(*(x * keep for x in state)), previous * keep, embed)


def count_params(model):
    """Trained parameters of a module."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---- Losses ----------------------------------------------------------------------------------------------------------


def overshooting(rssm, posterior, prev_action, distance):
    """Priors of several steps (appendix D). Entry [d-1, t] foresees row t+d-1 from the posterior d rows before it (the
    zero state before row 0), so [0] is the ordinary prior. posterior: States (T, B, .), prev_action (T, B, A).
    Returns States (distances, T, B, .) and a mask (distances, T) of the entries that lie inside the chunk; there are
    at most T distances."""
    T, B = prev_action.shape[:2]
    zero = rssm.initial(B, prev_action.device)
    start = State(*(torch.cat([z.unsqueeze(0), x[:-1]]).flatten(0, 1) for z, x in zip(zero, posterior)))  # (T*B, .)
    padded = torch.cat([prev_action, torch.zeros_like(prev_action)])  # past the end, where the mask is 0
    actions = torch.stack([padded[d : d + T].flatten(0, 1) for d in range(min(distance, T))])  # (distances, T*B, A)
    states = rssm.imagine(start, actions)
    rows = torch.arange(T, device=prev_action.device)
    mask = torch.stack([rows + d < T for d in range(len(actions))])
    return State(*(x.unflatten(1, (T, B)) for x in states)), mask


def model_loss(model, batch, args):
    """Negative of the variational bound (eq. 3) on chunks {name: (T, B, ...)}. Returns the weighted terms, each a
    scalar: observations, reward and KL, and metrics."""
    mask = batch["mask"]  # (T, B): rows of episodes that are shorter than a chunk are repeated and do not count
    obs = model.inputs({k[4:]: v for k, v in batch.items() if k.startswith("obs/")})
    embed = model.encoder(obs)  # (T, B, E)
    with torch.autocast(embed.device.type, enabled=False):  # dynamics, KL and reward in float32
        # NOTE: every chunk starts from the zero state, wherever it lies in its episode, and all its rows count: that
        # teaches filtering from nothing, which acting needs at the beginning of an episode.
        prior, post = model.rssm.observe(embed, batch["action"])
        feat = post.feat  # (T, B, F)
        reward = reward_log_prob(model.reward(feat).squeeze(-1), batch["reward"] * args.reward_scale)  # (T, B)
        # NOTE: gradients into both sides, no balancing, no stop-gradient.
        kl = kl_divergence(post.mean, post.stddev, prior.mean, prior.stddev)  # (T, B)
        if args.overshooting > 1:
            far, inside = overshooting(model.rssm, post, batch["action"], args.overshooting)
            distances, T = inside.shape
            # NOTE: the posterior is a fixed target here: only the priors learn to see further.
            target = [torch.cat([x.detach(), x.detach()]).unfold(0, T, 1)[:distances].movedim(-1, 1) for x in post[1:3]]
            excess = (kl_divergence(*target, far.mean, far.stddev) - args.kl_free).clamp(min=0)  # (distances, T, B)
            valid = inside.unsqueeze(-1) * torch.cat([mask, 0 * mask]).unfold(0, T, 1)[:distances].movedim(-1, 1)
            # Distances from 2 on, each with its own mean and the weight beta / distances; distance 1 is the KL above.
            far_kl = ((excess * valid).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1))[1:].sum() / distances
    recon, losses = model.decoder(feat), {}
    for k, x in obs.items():
        image = x.dim() == 5
        log_prob = image_log_prob(recon[k], x) if image else reward_log_prob(recon[k], x).sum(-1)  # (T, B)
        scale = args.recon_scale if args.recon_scale is not None else (64 / x.shape[-1]) ** 2 if image else 1.0
        losses[f"recon_{k}"] = -scale * masked_mean(log_prob, mask)
    losses["reward"] = -args.reward_loss_scale * masked_mean(reward, mask)
    losses["kl"] = args.kl_scale * free_nats_loss(kl, args.kl_free, mask)
    if args.overshooting > 1:
        losses["overshooting"] = args.overshooting_scale * far_kl
    metrics = {"kl_nats": masked_mean(kl, mask), "reward_mse": masked_mean(-2 * reward - math.log(2 * math.pi), mask)}
    return losses, {k: v.detach() for k, v in metrics.items()}


class ModelLearner:
    """The model, its optimizer and the one update."""

    def __init__(self, model, args, device):
        self.model, self.args, self.device = model, args, device
        self.params = [p for p in model.parameters() if p.requires_grad]
        # NOTE: eps 1e-4, not 1e-8: it matters at the scale of summed log-likelihoods.
        options = dict(lr=args.learning_rate, eps=args.adam_eps, fused=True, capturable=device.type == "cuda")
        self.opt = torch.optim.Adam(self.params, **options)
        self.bf16 = args.bf16 and device.type == "cuda"
        self.bad = None  # which loss terms, or the gradient norm, were not finite; set once, on the device

    def update(self, batch):
        """One optimizer step on chunks {name: (T, B, ...)}. Returns metrics as tensors on the device."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            losses, metrics = model_loss(self.model, batch, self.args)
        self.opt.zero_grad()
        sum(losses.values()).backward()
        norm = nn.utils.clip_grad_norm_(self.params, self.args.max_grad_norm)
        # No step on bad numbers, decided on the device. The main loop looks at `bad` when it reads metrics.
        bad = ~torch.isfinite(torch.stack([*losses.values(), norm]).detach())
        if self.bad is None:
            self.bad, self.names = torch.zeros_like(bad), [*losses, "gradient norm"]
        self.bad.copy_(torch.where(self.bad.any(), self.bad, bad))
        self.opt.found_inf = self.bad.any().float()  # the fused kernel then leaves parameters and moments alone
        self.opt.step()
        return {k: v.detach() for k, v in losses.items()} | metrics | {"grad_norm": norm}

    def check(self, where=""):
        """Raise FloatingPointError naming what was not finite. Waits for the device."""
        if self.bad is not None and self.bad.any():
            names = ", ".join(n for n, b in zip(self.names, self.bad.tolist(), strict=True) if b)
            raise FloatingPointError(f"not finite at {where}: {names}; no optimizer step was taken")

    def state_dict(self):
        return {"model": self.model.state_dict(), "optimizer": self.opt.state_dict()}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.opt.load_state_dict(state["optimizer"])
        for group in self.opt.param_groups:  # the run may have begun on another kind of device
            group["capturable"] = self.device.type == "cuda"


# [optional: compile
def compile_planner(model, learner):
    """Compile the recurrent steps; on a GPU capture each whole update and each whole plan in a CUDA graph."""
    try:
        torch.compile(lambda x: torch.sin(x) + 1)(torch.zeros(8, device=learner.device))  # is there a working compiler?
    except Exception as e:
        return say(f"warning: torch.compile does not work here ({type(e).__name__}); going on without it")
    say("compiling: the first steps take a minute or more (--no-compile starts at once)")
    model.rssm.post_step = torch.compile(model.rssm.post_step, dynamic=False)
    model.plan_step = torch.compile(model.plan_step, dynamic=False)
    for network in (model.encoder, model.decoder):
        network.compile(dynamic=False)  # in place: parameter names in checkpoints stay as they are
    if learner.device.type == "cuda":
        learner.update, plan, graphs = Graphed(learner.update), model.plan, {}

        def graphed_plan(sample, belief, settings):
            key = len(sample), *settings.values()
            if key not in graphs:
                graphs[key] = Graphed(lambda x: plan(x["sample"], x["belief"], settings))
            return graphs[key](dict(sample=sample, belief=belief))

        model.plan = graphed_plan


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


class ReplayBuffer:
    """Whole episodes, one after the other in a ring of rows on `device`; the oldest make room."""

    def __init__(self, capacity, specs, device="cpu", seed=0):
        """capacity: rows; specs: {name: (shape, dtype)}."""
        self.capacity, self.device = capacity, torch.device(device)
        self.data = {k: torch.zeros(capacity, *s, dtype=d, device=device) for k, (s, d) in specs.items()}
        self.episodes, self.end = deque(), 0  # (first row, length) of each, and where the next one goes
        self.rng = np.random.default_rng(seed)

    @staticmethod
    def specs(obs_space, action_dim):
        """What one row holds: the raw observation; the action and the reward that led to it."""
        kinds = {np.dtype(np.uint8): torch.uint8, np.dtype(np.float32): torch.float32}
        specs = {f"obs/{k}": (s.shape, kinds[s.dtype]) for k, s in obs_space.items()}
        return specs | {"action": ((action_dim,), torch.float32), "reward": ((), torch.float32)}

    @staticmethod
    def row_bytes(specs):
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values())

    def add(self, episode):
        """Append an episode {name: (length, ...)}; of one that is longer than the ring the beginning is dropped."""
        episode = {k: v[-self.capacity :] for k, v in episode.items()}
        length = len(episode["reward"])
        while self.episodes and sum(n for _, n in self.episodes) + length > self.capacity:
            self.episodes.popleft()
        rows = torch.arange(self.end, self.end + length, device=self.device) % self.capacity
        for name, data in self.data.items():
            data[rows] = torch.as_tensor(episode[name], device=self.device).to(data.dtype)
        self.episodes.append((self.end, length))
        self.end = (self.end + length) % self.capacity

    def sample(self, B, L, rng=None):
        """B chunks of L rows of one episode each, time first: {name: (L, B, ...)}, episodes uniformly, then offsets
        uniformly. In an episode that is shorter its last row is repeated, and "mask" (L, B) is 0 there."""
        rng = self.rng if rng is None else rng
        table = np.array(self.episodes)  # (episodes, 2)
        first, length = table[rng.integers(len(table), size=B)].T
        offset = rng.integers(np.maximum(length - L, 0) + 1)
        rows = offset + np.arange(L)[:, None]  # (L, B)
        mask = torch.as_tensor((rows < length).astype(np.float32), device=self.device)
        rows = torch.as_tensor((first + np.minimum(rows, length - 1)) % self.capacity, device=self.device)
        return {k: v[rows] for k, v in self.data.items()} | {"mask": mask}

    def state_dict(self):
        kept = {}
        total = sum(n for _, n in self.episodes)
        for k, v in self.data.items():  # one episode at a time: a replay on a GPU may fill most of it
            kept[k], at = torch.empty(total, *v.shape[1:], dtype=v.dtype), 0
            for first, n in self.episodes:
                rows = torch.arange(first, first + n, device=self.device) % self.capacity
                kept[k][at : at + n] = v[rows].cpu()
                at += n
        return {"rows": kept, "lengths": [n for _, n in self.episodes], "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state):
        self.episodes, self.end, start = deque(), 0, 0
        for n in state["lengths"]:
            self.add({k: v[start : start + n] for k, v in state["rows"].items()})
            start += n
        self.rng.bit_generator.state = state["rng"]


# ---- Environment -----------------------------------------------------------------------------------------------------


def resize(image, size):  # shared
    """(H, W, C) uint8 -> (size, size, C), bilinear."""
    if image.shape[:2] == (size, size):
        return image
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    return np.asarray(picture.resize((size, size), Image.BILINEAR)).reshape(size, size, -1)


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


def repeat_of(args):
    """Environment steps per agent step."""
    return args.action_repeat or ACTION_REPEAT.get(args.env_id.removeprefix("dm_control/").removesuffix("-v0"), 1)


def control_env(args):
    env = DMControl(args.env_id, args.image_size, args.fast_render)
    # NOTE: the repeat lies inside of `Pixels`: one picture per agent step, drawing is the expensive part.
    return env if args.action_repeat else Repeat(env, repeat_of(args))


# Environments that are not built by gymnasium.make alone.
FAMILIES = {"dm_control": control_env}


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


def agent_policy(model, device, args, noise=0.0):
    """Filter and plan, as a policy for `collect`: actions (B, A) with exploration noise, clipped to [-1, 1]."""
    names = "plan_horizon", "plan_candidates", "plan_iterations", "plan_elites", "plan_bf16"
    settings = {k: getattr(args, k) for k in names}

    def policy(obs, first, carry):
        n = len(first)
        state, previous = carry or (model.rssm.initial(n, device), torch.zeros(n, model.action_dim, device=device))
        state = model.filter(to_torch(obs, device), torch.as_tensor(first, device=device), state, previous)
        action = model.plan(state.sample, state.belief, settings)
        # NOTE: the next belief is computed from what was executed: with noise, clipped.
        action = (action + noise * torch.randn_like(action)).clamp(-1, 1)
        return action.cpu().numpy(), (state, action)

    return policy


def collect(args, envs, policy, stop=None, keep=True):
    """One whole episode in each environment: [{name: (length + 1, ...)}, ...], rows in the file's time convention, and
    which of them were terminated (B,). None, None after a stop signal. keep: with observations."""
    (obs, _), n, state = envs.reset(), envs.num_envs, None
    first, alive, ended, lengths = np.ones(n, bool), np.ones(n, bool), np.zeros(n, bool), np.ones(n, int)
    # NOTE: the first row has neither action nor reward: nothing led to it.
    rows = [dict(action=np.zeros((n, *envs.single_action_space.shape), np.float32), reward=np.zeros(n), obs=obs)]
    for _ in range(args.max_episode_steps or 27_000):  # an environment without a limit ends here
        action, state = policy(obs, first, state)
        obs, reward, terminated, truncated, infos = envs.step(action)
        first = terminated | truncated
        seen = obs
        if first.any():  # NOTE: the last observation of the old episode, not the first of the next one
            seen, final = {k: v.copy() for k, v in obs.items()}, infos["final_obs"]
            for i in np.flatnonzero(first):
                for k, v in seen.items():
                    v[i] = final[i][k]
        rows.append(dict(action=action, reward=reward, obs=seen if keep else {}))
        lengths, ended = lengths + alive, ended | (alive & terminated)
        alive &= ~first
        if stop and stop.signum:
            return None, None
        if not alive.any():
            break
    names = ("action", "reward")
    episodes = [{k: np.stack([r[k][i] for r in rows[: lengths[i]]]) for k in names} for i in range(n)]
    if keep:
        for i, episode in enumerate(episodes):
            episode |= {f"obs/{k}": np.stack([r["obs"][k][i] for r in rows[: lengths[i]]]) for k in obs}
    return episodes, ended


HORIZONS = (1, 5, 10, 20, 50)


@torch.no_grad()
def open_loop(model, episodes, device="cpu", context=5, reward_scale=1.0, max_starts=64):
    """The world model on episodes (see `collect`) it did not train on. It filters them, and from many of their rows
    (the first after `context` observations) it dreams on with the true actions. Returns mean squared errors by horizon,
    per number (images in 0..1), beside those of the posterior, which sees the frame, and of the trivial predictors."""
    sums = {}

    def add(name, prediction, target):
        error = ((prediction - target) ** 2).flatten(1).mean(1)
        total, count = sums.get(name, (0.0, 0))
        sums[name] = total + float(error.sum()), count + len(error)

    for episode in episodes:
        rows, batch = len(episode["reward"]), {k: torch.as_tensor(v, device=device) for k, v in episode.items()}
        if rows <= context:
            continue
        raw = {k[4:]: v.unsqueeze(1) for k, v in batch.items() if k.startswith("obs/")}  # (rows, 1, ...)
        _, post = model.rssm.observe(model.encoder(model.inputs(raw)), batch["action"].unsqueeze(1))
        truth = {k: v[:, 0] for k, v in targets(model, raw).items()}
        stride = -(-(rows - context) // max_starts)
        starts = torch.arange(context - 1, rows - 1, stride, device=device)  # (M,)
        ahead = starts + torch.arange(1, max(HORIZONS) + 1, device=device)[:, None]  # (50, M)
        actions = batch["action"][ahead.clamp(max=rows - 1)]  # (50, M, A)
        dream = model.rssm.imagine(State(*(x[starts, 0] for x in post)), actions).feat  # (50, M, F)
        reward, seen = batch["reward"].float(), post.feat[:, 0]
        for h in HORIZONS:
            inside = ahead[h - 1] < rows
            rows_h, here, feat = ahead[h - 1][inside], starts[inside], dream[h - 1][inside]
            if len(rows_h) == 0:
                break
            far, near = model.decoder(feat), model.decoder(seen[rows_h])
            for k, x in truth.items():
                for name, prediction in [("open_loop", far[k]), ("posterior", near[k]), ("copy_last", x[here])]:
                    add(f"{name}_mse_{h}", prediction, x[rows_h])
                add("mean_frame_mse", x.mean(0, keepdim=True), x[rows_h])
            add(f"reward_mse_{h}", model.predict_reward(feat)[:, None] / reward_scale, reward[rows_h, None])
        add("reward_variance", reward[1:].mean(), reward[1:, None])  # the first row's reward is always 0
    errors = {name: total / count for name, (total, count) in sums.items()}
    for name in ("open_loop", "posterior", "copy_last"):  # over all horizons that fit
        found = [errors[f"{name}_mse_{h}"] for h in HORIZONS if f"{name}_mse_{h}" in errors]
        errors |= {f"{name}_mse": float(np.mean(found))} if found else {}
    return errors


def targets(model, raw):
    """Raw observations -> what a perfect decoder predicts: the middle of the reduced colour's interval."""
    return {
        k: preprocess(v.movedim(-1, -3), model.config["bits"], torch.full((), 0.5)) if v.dtype == torch.uint8 else v
        for k, v in raw.items()
    }


def decoded_obs(decoded, space):
    """Decoder outputs (..., C, H, W) or (..., n) -> numpy observations of the environment's own types."""
    out = {}
    for k, v in decoded.items():
        image = len(space[k].shape) == 3
        out[k] = (((v + 0.5) * 256).clamp(0, 255).byte().movedim(-3, -1) if image else v.float()).cpu().numpy()
    return out


@torch.no_grad()
def dream_clips(model, obs_space, episode, device="cpu", context=8, length=48, clips=4):
    """Parts of an episode as it was and as the model sees them: `context` rows of its posterior, then its dream with
    the true actions. Returns truth and model {key: (clips, rows, ...)} and the context, shorter if the episode is."""
    batch = {k: torch.as_tensor(v, device=device) for k, v in episode.items()}
    rows = len(batch["reward"])
    context = min(context, max(1, rows // 2))
    length = min(length, rows)
    raw = {k[4:]: v.unsqueeze(1) for k, v in batch.items() if k.startswith("obs/")}
    _, post = model.rssm.observe(model.encoder(model.inputs(raw)), batch["action"].unsqueeze(1))
    begin = torch.linspace(0, rows - length, clips, device=device).long()  # (clips,)
    part = begin + torch.arange(length, device=device)[:, None]  # (length, clips)
    state = State(*(x[part[context - 1], 0] for x in post))
    feat = post.feat[part[:context], 0]  # (context, clips, F)
    if length > context:
        feat = torch.cat([feat, model.rssm.imagine(state, batch["action"][part[context:]]).feat])
    shown = decoded_obs({k: v.transpose(0, 1) for k, v in model.decoder(feat).items()}, obs_space)
    index = part.T.cpu().numpy()
    return {k[4:]: v[index] for k, v in episode.items() if k.startswith("obs/")}, shown, context


def plot_horizons(errors, path):
    """Prediction error against horizon as a PNG file and as an array (H, W, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), dpi=90, layout="constrained")
    frames, rewards = figure.subplots(1, 2)
    found = [h for h in HORIZONS if f"open_loop_mse_{h}" in errors]
    for name, label, style in [
        ("open_loop", "prior, open loop", "o-"), ("posterior", "posterior, sees the frame", "s-"),
        ("copy_last", "copy of the last frame", "x--"),
    ]:  # fmt: skip
        frames.plot(found, [errors[f"{name}_mse_{h}"] for h in found], style, label=label)
    frames.axhline(errors["mean_frame_mse"], color="gray", linestyle=":", label="mean frame")
    rewards.plot(found, [errors[f"reward_mse_{h}"] for h in found], "o-", label="prior, open loop")
    rewards.axhline(errors["reward_variance"], color="gray", linestyle=":", label="variance of the reward")
    for axis, title in ((frames, "observations"), (rewards, "reward")):
        axis.set(xscale="log", yscale="log", xlabel="steps ahead", ylabel="mean squared error", title=title)
        axis.set_xticks(found, [str(h) for h in found])
        axis.set_xticks([], minor=True)
        axis.legend(frameon=False, fontsize=8)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    Image.fromarray(picture).save(path)
    return picture


def horizon_table(errors):
    """The errors as lines of text."""
    found = [h for h in HORIZONS if f"open_loop_mse_{h}" in errors]
    if not found:
        return "prediction error: episodes are too short"
    lines = ["prediction error, steps ahead".ljust(30) + "".join(f"{h:>10}" for h in found)]
    for name, label in [
        ("open_loop", "prior, open loop"), ("posterior", "posterior"), ("copy_last", "copy of the last frame"),
        ("reward", "reward, open loop"),
    ]:  # fmt: skip
        lines.append(f"  {label:<28}" + "".join(f"{errors[f'{name}_mse_{h}']:10.5f}" for h in found))
    lines.append(f"  mean frame {errors['mean_frame_mse']:.5f}, variance of the reward {errors['reward_variance']:.5f}")
    return "\n".join(lines)


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
    state = load_checkpoint(path, "planet_cem")
    spaces = state["spaces"]
    model = Planet(space_from(spaces["observation"]), space_from(spaces["action"]).shape[0], state["config"])
    model.load_state_dict(state["learner"]["model"])
    return model.to(device).eval(), state


class DreamEnv(gym.Env):
    """The learned world as an environment. `path`: run directory. Observations are a Dict, or the only entry by itself.

    reset(options={"observations": {key: (T, ...)}, "actions": (T, ...)}) filters real context (action t follows
    observation t; the last one is not used) and dreams on from it; without options it starts from context kept in the
    checkpoint. The dream has no end of its own: it is truncated after as many steps as real episodes have."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}

    def __init__(self, path, render_mode="rgb_array", max_steps=None, device="cpu"):
        self.model, state = load_agent(path, device)
        self.max_steps = max_steps or state["episode_length"] or 1000
        self.device, self.render_mode, self.context = torch.device(device), render_mode, state["context"]
        self.space, self.reward_scale = space_from(state["spaces"]["observation"]), state["args"]["reward_scale"]
        self.single = list(self.space) == ["observation"]
        self.observation_space = self.space["observation"] if self.single else self.space
        self.action_space, self.noise = space_from(state["spaces"]["action"]), torch.Generator(device)

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
            obs = to_torch({k: v[:, None] for k, v in obs.items()}, self.device)
            actions = torch.as_tensor(np.asarray(options["actions"], np.float32), device=self.device).clamp(-1, 1)
            # NOTE: outside, action t follows observation t; inside, a row holds the action that led to it.
            previous = torch.cat([torch.zeros_like(actions[:1]), actions[:-1]]).unsqueeze(1)
        else:
            if self.context is None:
                raise ValueError("this checkpoint was saved before any episode was complete: pass options")
            clip = int(self.np_random.integers(self.context["action"].shape[1]))
            rows = {k: v[:, clip : clip + 1].to(self.device) for k, v in self.context.items()}
            obs, previous = {k[4:]: v for k, v in rows.items() if k.startswith("obs/")}, rows["action"]
        inputs = {k: v if v.dtype != torch.uint8 else self.dequantise(v) for k, v in obs.items()}
        _, post = self.model.rssm.observe(self.model.encoder(inputs), previous, generator=self.noise)
        self.state, self.steps = State(*(x[-1] for x in post)), 0
        return self.decode(), {}

    def dequantise(self, image):
        noise = torch.rand(image.movedim(-1, -3).shape, device=self.device, generator=self.noise)
        return preprocess(image.movedim(-1, -3), self.model.config["bits"], noise)

    @torch.no_grad()
    def step(self, action):
        action = torch.as_tensor(np.asarray(action, np.float32), device=self.device).clamp(-1, 1)[None]
        noise = torch.randn(1, self.model.rssm.sample, device=self.device, generator=self.noise)
        self.state, self.steps = self.model.rssm.prior(self.state, action, noise), self.steps + 1
        reward = float(self.model.predict_reward(self.state.feat)) / self.reward_scale
        return self.decode(), reward, False, self.steps >= self.max_steps, {}

    def decode(self):
        self.obs = {k: v[0] for k, v in decoded_obs(self.model.decoder(self.state.feat), self.space).items()}
        return self.obs["observation"] if self.single else dict(self.obs)

    def render(self):
        return draw(self.obs, 256)


# [optional: play
def play(args):
    """Play inside the dream: pairs of keys move the dimensions of the action."""
    check_args(args)
    device = choose_device(args)
    env = DreamEnv(args.play, device=device)
    n = env.model.action_dim
    if env.context is None:
        fail(f"{args.play} has no episode to start a dream from: go on with --resume first")
    headless = sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    if headless or os.environ.get("SDL_VIDEODRIVER") == "dummy":
        path = os.path.join(args.play, "eval-dream.gif")
        torch.manual_seed(args.seed)
        obs, _ = env.reset(seed=args.seed)
        frames, policy, state = [env.render()], agent_policy(env.model, device, args), None
        say(f"no display to play on: the planner dreams {min(100, env.max_steps)} steps")
        for t in range(min(100, env.max_steps)):
            obs = {"observation": obs} if env.single else obs
            action, state = policy({k: v[None] for k, v in obs.items()}, np.array([t == 0]), state)
            obs = env.step(action[0])[0]
            frames.append(env.render())
        save_gif(frames, path)
        return say(f"wrote {path}")
    from gymnasium.utils.play import play as play_env

    keys = "1234567890abcdefghijklmnopqrstuvwxyz"
    units = np.concatenate([-np.eye(n, dtype=np.float32), np.eye(n, dtype=np.float32)])
    mapping = {keys[i]: units[i // 2 + n * (i % 2)] for i in range(2 * min(n, 18))}
    say("keys: " + ", ".join(f"{k} = {v}" for k, v in mapping.items()) + "; Escape ends")
    play_env(env, keys_to_action=mapping, noop=np.zeros(n, np.float32), zoom=2, fps=10)


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
    "evaluate play target_return total_timesteps eval_episodes log_every replay_cuda".split()
)
# Flags that shape the networks and their input.
SHAPES = "belief_size state_size hidden_size min_stddev cnn_depth reward_layers reward_units bits".split()


def check_args(args):
    """Everything that can be said before an environment is built."""
    check_ranges(args, RANGES)
    elites, candidates = f"--plan-elites {args.plan_elites}", f"--plan-candidates {args.plan_candidates}"
    for wrong, message in [
        (args.plan_elites > args.plan_candidates, f"{elites} is more than {candidates}"),
        (args.buffer_size < args.batch_length, f"--buffer-size {args.buffer_size} is less than --batch-length "
         f"{args.batch_length}: no chunk fits"),
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


def probe_env(args):
    """Build the environment once, to find out now whether it can be used: observation space, action space, agent steps
    of the longest episode (None: unlimited)."""
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
            gl = os.environ.get("MUJOCO_GL")
            reason += f" (MUJOCO_GL={gl}; egl needs libegl1 and libgl1-mesa-dri, osmesa needs libosmesa6)"
        fail(f"{flag}: {reason}")
    obs_space, action_space = env.observation_space, env.action_space
    if not isinstance(action_space, gym.spaces.Box):
        fail(f"{flag}: planning by the cross-entropy method needs Box actions, found {action_space}")
    for k, s in obs_space.items():
        if isinstance(s, gym.spaces.Discrete):
            fail(f"{flag}: observations must be images or vectors, {k!r} is {s} (Discrete)")
        if len(s.shape) == 3 and args.image_size not in KERNELS:
            fail(f"--image-size must be one of {', '.join(map(str, KERNELS))}, got {args.image_size}")
    suite_limit = env.unwrapped.env._step_limit if family == "dm_control" else math.inf  # inf: none
    limit = int(suite_limit) if suite_limit < math.inf else env.spec.max_episode_steps if env.spec else None
    limit = -(-limit // repeat_of(args)) if limit else None
    limit = min(limit or args.max_episode_steps, args.max_episode_steps) if args.max_episode_steps else limit
    if not limit:
        say(f"warning: {args.env_id} has no time limit; episodes stop after 27000 steps (set --max-episode-steps)")
    env.close()
    return obs_space, action_space, limit


def evaluate_run(args):
    """--evaluate RUN: returns of fresh episodes of a trained agent. Writes only RUN/eval-*."""
    check_args(args)
    state = load_checkpoint(args.evaluate, "planet_cem")
    if state["random_return"] is None:
        fail(f"{args.evaluate} was stopped before its first episode: go on with --resume first")
    for name in SHAPES:
        if getattr(args, name) != state["config"][name]:
            flag, trained = "--" + name.replace("_", "-"), state["config"][name]
            fail(f"{flag} is {trained} in {args.evaluate}, got {getattr(args, name)}: a trained model cannot change it")
    for found, name in zip(probe_env(args), ("observation", "action")):
        if space_to(found) != state["spaces"][name]:
            trained = space_from(state["spaces"][name])
            fail(f"--env-id {args.env_id} has the {name} space {found}, {args.evaluate} was trained on {trained}")
    device = choose_device(args)
    seed_everything(args, device)
    model, state = load_agent(args.evaluate, device)
    envs = make_envs(args, args.eval_episodes, 1)
    episodes, _ = collect(args, envs, agent_policy(model, device, args))
    envs.close()
    if args.capture_video:
        save_gif(episode_frames(episodes[0]), os.path.join(args.evaluate, "eval-episode.gif"))
    returns = [float(e["reward"].sum()) for e in episodes]
    score, std, random_return = float(np.mean(returns)), float(np.std(returns)), state["random_return"]
    errors = open_loop(model, episodes, device, reward_scale=args.reward_scale)
    result = dict(episodic_return=score, std=std, returns=returns, random_return=random_return)
    result |= dict(global_step=state["global_step"], prediction_errors=errors)
    write_json(result, os.path.join(args.evaluate, f"eval-{state['global_step']}.json"))
    say(horizon_table(errors))
    say(f"returns of {len(returns)} episodes: " + " ".join(f"{r:g}" for r in returns))
    finish(args, score, random_return, f" +- {std:.1f}")
    return result


def episode_frames(episode):
    """Pictures of a real episode."""
    obs = {k[4:]: v for k, v in episode.items() if k.startswith("obs/")}
    return [draw({k: v[t] for k, v in obs.items()}) for t in range(len(episode["reward"]))]


def report(model, obs_space, episode, args, run, step, device, logger):
    """Prediction errors on a fresh episode, as numbers and as a plot, and the open-loop video."""
    errors = open_loop(model, [episode], device, reward_scale=args.reward_scale)
    logger.scalars({f"eval/{k}": v for k, v in errors.items()}, step)
    truth, shown, context = dream_clips(model, obs_space, episode, device)
    path = os.path.join(run, "videos", f"open_loop-{step}.gif")
    logger.video("eval/open_loop", dream_frames(truth, shown, context), step, path)
    if "open_loop_mse" in errors:
        try:
            picture = plot_horizons(errors, os.path.join(run, "videos", f"horizon-{step}.png"))
            logger.attempt(logger.writer and logger.writer.add_image, "eval/horizon", picture, step, None, "HWC")
        except OSError as e:
            say(f"warning: could not write the plot ({e})")


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
    """The whole algorithm (Algorithm 1): collect episodes, fit the model to them, plan with it, repeat. Returns the
    metrics."""
    # Set up, in an order that finds every mistake of the user's before the first file is made.
    check_args(args)
    total = args.total_timesteps or 1_000_000 // repeat_of(args)
    state = None
    if args.resume:
        for name, value in load_args(args.resume).items():
            if name not in CHANGEABLE and getattr(args, name, value) != value:
                flag = "--" + name.replace("_", "-")
                fail(f"{flag} is {value} in {args.resume}, got {getattr(args, name)}: a run cannot change it")
        state, result = load_checkpoint(args.resume, "planet_cem"), os.path.join(args.resume, "result.json")
        if state["global_step"] >= total and os.path.exists(result):
            say(f"nothing to do: step {state['global_step']} of {total}")
            with open(result, encoding="utf-8") as f:
                return json.load(f)
        lock = lock_run(args.resume)
        state = load_checkpoint(args.resume, "planet_cem", repair=True)  # nobody else writes from here on
    obs_space, action_space, limit = probe_env(args)
    device, B = choose_device(args), args.num_envs  # B: environments, and so episodes per collection
    seeds = -(-args.seed_episodes // B) * B * (limit or 1)
    if total <= seeds:
        seeds = f"--seed-episodes {args.seed_episodes} ({seeds} agent steps in {B} environments)"
        fail(f"--total-timesteps {total} must be more than {seeds}: nothing would be planned")
    specs = ReplayBuffer.specs(obs_space, action_space.shape[0])
    # Rows that the run can fill: agent steps, a first row per episode, and the steps by which the last episodes exceed
    # the total. With a known limit most episodes are taken to reach it; if not, the oldest ones make room.
    most = 2 * total + 2 * B if limit is None else total + B * (limit + 1) + total // limit
    capacity = min(args.buffer_size, most)
    size = capacity * ReplayBuffer.row_bytes(specs) / 1e9
    # On the GPU if it fits and leaves a fifth of the memory to the update, else in host memory; a checkpoint copies it.
    cpu = torch.device("cpu")
    store = device if args.replay_cuda and size <= 0.8 * free_memory(device) / 1e9 else cpu
    host, free = size * (args.save_replay + (store == cpu)), free_memory(cpu) / 1e9
    if host > free:
        hint = f"lower --buffer-size, now {args.buffer_size}"
        hint += ", or try --no-save-replay" if args.save_replay else ""
        fail(f"replay needs {host:.1f} GB, {free:.1f} GB free: {hint}")

    run = args.resume or new_run_dir(args)
    lock = lock if args.resume else lock_run(run)  # noqa: F841 (held until the process ends)
    seed_everything(args, device)
    write_run_info(run, args, __file__, device)
    logger = Logger(run, args, purge_step=state["global_step"] + 1 if state else None)
    stop = StopSignal()
    envs, tests = make_envs(args, B), make_envs(args, 1, key=3) if args.report_every else None
    vectors = [v for v in (envs, tests) if v]
    config = {k: getattr(args, k) for k in SHAPES}
    with torch.device(device):
        model = Planet(obs_space, action_space.shape[0], config)
    learner, replay = ModelLearner(model, args, device), ReplayBuffer(capacity, specs, store, args.seed)
    parts = ", ".join(f"{n} {count_params(getattr(model, n)):,}" for n in ("encoder", "rssm", "decoder", "reward"))
    say(f"run: {run}\nparameters: {count_params(model):,} ({parts})")
    say(f"replay: {capacity:,} rows, {size:.2f} GB on {store}; {repeat_of(args)} environment steps per agent step")

    def rewind(before):
        """Random states, and the number of episodes that each environment has begun (which seeds the next one)."""
        set_rng_state(before["rng"])
        for v, numbers in zip(vectors, before["episodes"], strict=True):
            for env, number in zip(v.envs, numbers, strict=True):
                env.env.episode = number

    # due: updates before the next collection; pending: the last collection was not tested and logged yet; stride: its
    # agent steps; longest: agent steps of the longest episode so far.
    global_step, updates, episodes, due, pending, stride, longest, random_return = 0, 0, 0, 0, False, 0, 0, None
    recent, returns, metrics, warned = deque(maxlen=100), [], {}, False  # `recent` has the planned episodes only
    seed_episodes = args.seed_episodes
    if state:
        learner.load_state_dict(state["learner"])
        if state["replay"]:
            replay.load_state_dict(state["replay"])
        else:
            say("warning: this run was saved without its replay (--no-save-replay): it starts with random episodes")
            seed_episodes, state["due"], state["pending"] = seed_episodes + state["count"], 0, False
        global_step, updates, episodes, due = (state[k] for k in ("global_step", "updates", "count", "due"))
        pending, stride, longest = state["pending"], state["stride"], state["episode_length"]
        random_return, returns, metrics = state["random_return"], state["returns"], state["metrics"]
        recent.extend(state["recent"])
        rewind(state)
        say(f"resumed at step {global_step} of {total}, update {updates}")
    if random_return is None:
        trial = make_envs(args, args.eval_episodes, 2)
        found, _ = collect(args, trial, random_policy(action_space, args.seed), stop, keep=False)
        trial.close()
        if found:
            scores = [float(e["reward"].sum()) for e in found]
            random_return = float(np.mean(scores))
            say(f"random policy: {random_return:.1f} +- {np.std(scores):.1f} over {len(scores)} episodes")
    # [optional: compile
    if args.compile:
        compile_planner(model, learner)
    # compile]

    def save():
        context = None
        if replay.episodes:  # a few stretches of real experience for dreams to start from
            context = replay.sample(8, min(args.batch_length, longest + 1), np.random.default_rng(0))
            whole = context.pop("mask").all(0).cpu()
            context = {k: v.cpu()[:, whole] for k, v in context.items() if k != "reward"} if whole.any() else None
        spaces = {"observation": space_to(obs_space), "action": space_to(action_space)}
        plain = dict(script="planet_cem", args=asdict(args), config=config, spaces=spaces, context=context)
        plain |= dict(global_step=global_step, updates=updates, count=episodes, due=due, pending=pending)
        plain |= dict(stride=stride, episode_length=longest, random_return=random_return, recent=list(recent))
        plain |= dict(returns=returns, metrics={k: float(v) for k, v in metrics.items()})
        plain |= now() | dict(learner=learner.state_dict())
        atomic_save(plain | dict(replay=replay.state_dict() if args.save_replay else None), f"{run}/ckpt.pt")

    def now():
        """Everything that playing an episode changes."""
        return dict(rng=rng_state(), episodes=[[e.env.episode for e in v.envs] for v in vectors])

    def stopped(before=None):
        """Leave after a stop signal, if an episode was in progress as if it had not begun: save, say how to go on."""
        if before:
            rewind(before)
        save()
        logger.close()
        again = f"python {shlex.quote(sys.argv[0])} --resume {shlex.quote(run)}"
        say(f"stopped by signal {stop.signum} at step {global_step}; to go on: {again}")
        raise SystemExit(128 + stop.signum)

    if stop.signum:
        stopped()
    start, clock = (time.time(), global_step, updates), time.process_time if device == cpu else time.time
    mark, update_seconds, plan_seconds = start, 0.0, 0.0
    # Algorithm 1 fits first and then collects; here a round begins with the collection, since the random episodes at
    # the start are collections too. The order of events is the same.
    while global_step < total or due or pending:
        # Collect one episode per environment: random ones at first, then by planning with exploration noise.
        if not due and not pending:
            before, began = now(), clock()
            random_phase = episodes < seed_episodes
            explore = agent_policy(model, device, args, args.action_noise)
            policy = random_policy(action_space, [args.seed, episodes, 1]) if random_phase else explore
            found, terminated = collect(args, envs, policy, stop)
            if found is None:  # NOTE: episodes in progress are dropped and, from the same random state, played again
                stopped(before)
            lengths = [len(e["reward"]) - 1 for e in found]
            stride, longest = sum(lengths), max(longest, *lengths)
            global_step, episodes, pending = global_step + stride, episodes + B, True
            plan_seconds = (clock() - began) / max(lengths)
            returns = [float(e["reward"].sum()) for e in found]
            recent.extend([] if random_phase else returns)
            for episode, score, length in zip(found, returns, lengths):
                replay.add(episode)
                logger.scalars({"charts/episodic_return": score, "charts/episodic_length": length}, global_step)
            if terminated.any() and not warned:
                say(f"warning: {args.env_id} ends episodes early; the model does not foresee that, only their rewards")
                warned = True
            if random_phase and episodes >= seed_episodes:
                due = args.initial_updates
            elif not random_phase:
                due = args.updates_per_episode * B

        # Fit the model to chunks of past episodes.
        began = clock()
        while due and not stop.signum:
            batch = replay.sample(args.batch_size, args.batch_length)
            try:
                metrics = learner.update(to_torch(batch, device))
            except torch.cuda.OutOfMemoryError:
                where = f"step {global_step} (batch {args.batch_size} x {args.batch_length})"
                raise SystemExit(f"out of GPU memory at {where}: lower --batch-size or --batch-length") from None
            updates, due = updates + 1, due - 1
            if device == cpu:  # on a GPU this would wait for the device: there, when metrics are read
                learner.check(f"step {global_step}, update {updates}")
        update_seconds += clock() - began
        if stop.signum:
            learner.check(f"step {global_step}, update {updates}")
            stopped()

        # Test, log, save. Metrics are read here only: reading waits for the device.
        ending = global_step >= total
        if passed(args.report_every, global_step, stride) and updates:
            before = now()
            with uncompiled(args):
                found, _ = collect(args, tests, agent_policy(model, device, args), stop)
                if found is None:
                    stopped(before)
                test_return = float(found[0]["reward"].sum())
                logger.scalars({"eval/episodic_return": test_return}, global_step)
                say(f"test episode at step {global_step}, without exploration: {test_return:.1f}")
                report(model, obs_space, found[0], args, run, global_step, device, logger)
        if passed(args.log_every, global_step, stride) or ending:
            learner.check(f"step {global_step}, update {updates}")
            seconds, steps, count = (a - b for a, b in zip((time.time(), global_step, updates), mark))
            mark = time.time(), global_step, updates
            tags = {"SPS": steps / max(seconds, 1e-9), "updates_per_s": count / max(seconds, 1e-9), "updates": updates}
            tags |= {"env_frames": global_step * repeat_of(args), "episodes": episodes}
            tags |= {"plan_seconds": plan_seconds}
            tags = {f"charts/{k}": v for k, v in tags.items()}
            logger.scalars(tags | {f"losses/{k}": float(v) for k, v in metrics.items()}, global_step)
            pace = f"episodes={episodes}, updates={updates}, SPS={tags['charts/SPS']:.0f}"
            kind = " (random actions)" if episodes - B < seed_episodes else ""
            say(f"global_step={global_step}, episodic_return={np.mean(returns):.1f}{kind}, {pace}")
        pending = False
        if passed(args.save_every, global_step, stride) or ending:
            learner.check(f"step {global_step}, update {updates}")
            save()
    for v in vectors:
        v.close()

    # Final evaluation on fresh episodes without exploration, and the self-check against --target-return.
    seconds, steps, count = (a - b for a, b in zip((time.time() + 1e-9, global_step, updates), start))
    unit = "CPU seconds" if device == cpu else "seconds"
    pace = f"{update_seconds / max(1, count):.4f} {unit} per update"
    pace += f", {plan_seconds:.4f} per agent step, planning included" if plan_seconds else ""
    say(f"{seconds / 60:.1f} minutes, {steps / seconds:.0f} agent steps/s, {count / seconds:.2f} updates/s, {pace}")
    finals, before = make_envs(args, args.eval_episodes, 1), now()
    with uncompiled(args):
        found, _ = collect(args, finals, agent_policy(model, device, args), stop)
    finals.close()
    if found is None:
        stopped(before)
    if args.capture_video:
        save_gif(episode_frames(found[0]), os.path.join(run, "videos", "episode.gif"))
    returns = [float(e["reward"].sum()) for e in found]
    with uncompiled(args):
        errors = open_loop(model, found, device, reward_scale=args.reward_scale)
    say(horizon_table(errors))
    score, std = float(np.mean(returns)), float(np.std(returns))
    logger.scalars({"eval/episodic_return": score, "eval/episodic_return_std": std}, global_step)
    logger.close()
    result = dict(episodic_return=score, episodic_return_std=std, returns=returns, random_return=random_return)
    result |= dict(global_step=global_step, updates=updates, episodes=episodes, minutes=seconds / 60, run=run)
    result |= dict(peak_memory_gb=peak_memory(device))
    result |= dict(train_return=float(np.mean(list(recent)[-10:])) if recent else None, prediction_errors=errors)
    write_json(result, os.path.join(run, "result.json"))
    finish(args, score, random_return)
    return result


if __name__ == "__main__":
    main(parse_args(Args, PRESETS, __doc__.split("\n\n    python")[0]))
