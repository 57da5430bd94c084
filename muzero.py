# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch>=2.11,<2.14", "numpy>=2", "tyro>=1", "tensorboard>=2.20", "pillow>=10", "ale-py>=0.11", "minatar>=1.0.15",
#     "gymnasium[box2d,classic-control]>=1.3,<2",
# ]
# ///
"""MuZero: Mastering Atari, Go, Chess and Shogi by Planning with a Learned Model.
Schrittwieser et al. Nature 588:604-609 (2020); equations and appendices as in arXiv:1911.08265v2.

A model that never reconstructs observations: representation h, dynamics g and prediction f are trained, unrolled K
steps, to foresee reward, value and policy. A tree search over these three improves the policy; its visit counts and
its root value are what the networks learn from. One algorithm for single-player environments and board games.

    python muzero.py --env-id ALE/MsPacman-v5                   # the paper's networks and settings, on a GPU
    python muzero.py --preset cpu                               # CartPole-v1 on a laptop, a minute
    python muzero.py --preset cpu_tictactoe                     # tic-tac-toe by self-play, minutes
    python muzero.py --preset atari100k --env-id ALE/Pong-v5    # EfficientZero's size and budget; more: see PRESETS
    python muzero.py --search gumbel --num-simulations 8        # Gumbel MuZero: few simulations are enough
    python muzero.py --resume runs/NAME                         # go on, bit for bit on a CPU
    python muzero.py --evaluate runs/NAME                       # games or episodes without any noise
    python muzero.py --play runs/NAME                           # board games: you against it, with its visit counts

Measured: see the README's result table; every row has its command, commit, hardware and seeds.

Choices where paper, its pseudocode and later work differ, each with its reason:
  * One process: a lockstep search over N environments, one environment step each, then the updates that are due.
  * The root counts its own evaluation as a visit, so the first simulation follows the prior; ties: lowest action.
  * Q is normalised among a node's value and its visited children (`--q-norm siblings`). The paper's range over the
    whole tree is `--q-norm tree`, slower; board games have known bounds.
  * Two players: states are seen from the player to move and the search discounts by -gamma; nothing else changes.
  * Board games predict the reward of the winning move, and value 0 after the end, instead of the outcome for ever.
  * Board games of self-play begin after a few random moves, and their value loss counts a quarter: see BOARD_GAME.
  * A truncated episode bootstraps from the network's value of its true last observation; the paper has no such case.
  * A row is learned from when all rewards of its targets are known, or its episode is over.
  * New rows are replayed with the highest priority so far, then with |predicted value - target| (EfficientZero).
  * Latents are scaled to [0, 1] over all numbers of a sample; EfficientZero's network does so too here.
  * EfficientZero's value prefix (an LSTM), its shortened n for old data and two layers that its code builds and never
    uses are left out. Actions are one-hot planes in every convolutional network.
  * Reanalyse searches without noise, at update time; its values come from a target network.

The algorithm is in the parts Maths, Search, Networks, Losses and Replay and in the loop of `train`; a reader may stop
there. The rest makes the file usable alone: games, environments, evaluation, checkpoints, checked flags.

Symbols in shape comments:
  B  batch (trees, replayed rows)      A  actions                      s  latent state, any shape after B
  N  environments                      S  simulations per search       D  longest path in the trees so far
  K  unrolled steps                    n  steps of a value target      M  nodes of all trees: B * (S + 2)
  F  stacked frames                    Z  atoms of a categorical head, 2 * support + 1
Time convention, everywhere: row t holds observation t, the reward that came WITH it, its flags, and the action taken
AFTER seeing it together with the search's policy and value for observation t. An episode's last observation has a row
of its own, without an action.
"""

import contextlib
import copy
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


@dataclass
class Args:
    # ---- Experiment
    exp_name: str = "muzero"
    """name of the experiment, part of the run directory"""
    preset: Literal["full", "cpu", "cpu_tictactoe", "atari100k", "reanalyse", "minatar", "connect4"] = "full"
    """named settings; explicit flags win over them"""
    seed: int = 1
    """seed of everything random: networks, noise, replay, environments"""
    torch_deterministic: bool = True
    """deterministic cuDNN kernels"""
    cuda: bool = True
    """use the GPU if there is one"""
    compile: bool = True
    """torch.compile the networks, and on a GPU capture search and update in CUDA graphs"""
    bf16: bool = True
    """convolutions in bfloat16 on a GPU (heads, losses, statistics stay float32); on a CPU always float32"""
    num_threads: Optional[int] = None
    """CPU threads of torch (default: torch's own choice)"""
    track: Optional[Literal["wandb", "trackio"]] = None
    """also send the curves to this tracker (needs its package)"""
    wandb_project_name: str = "world-models"
    """project name for --track"""
    wandb_entity: Optional[str] = None
    """team for --track wandb"""
    capture_video: bool = False
    """write one episode of the final evaluation as a GIF (not for board games)"""
    save_every: int = 100_000
    """agent steps between checkpoints; unfinished episodes are cut there"""
    save_replay: bool = True
    """keep the replay in the checkpoint; without it --resume starts with an empty one and is not bit-exact"""
    resume: Optional[str] = None
    """run directory to continue"""
    evaluate: Optional[str] = None
    """run directory to evaluate, nothing is trained"""
    play: Optional[str] = None
    """run directory to play against (board games) or to watch"""
    target_return: Optional[float] = None
    """exit with code 1 if the final evaluation stays below this"""

    # ---- Environment
    env_id: str = "ALE/MsPacman-v5"
    """any gymnasium id with Discrete actions, `module:Id-v0`, `TicTacToe`, `Connect4`"""
    env_kwargs: str = "{}"
    """JSON object passed to gymnasium.make"""
    total_timesteps: int = 50_000_000
    """agent steps (moves), summed over environments; the paper's 200M frames of Reanalyse"""
    num_envs: int = 256
    """environments in lockstep, each with its own tree"""
    action_repeat: Optional[int] = None
    """environment steps per agent step (default: 4 for Atari, else 1)"""
    pixels: bool = False
    """observe rendered images instead of the environment's own observation"""
    image_size: int = 96
    """images are resized to this many pixels per side (paper: 96)"""
    grayscale: bool = False
    """Atari in grey instead of RGB"""
    sticky_actions: float = 0.0
    """Atari: probability that the emulator repeats the previous action"""
    full_action_space: bool = True
    """Atari: all 18 actions instead of the game's minimal set"""
    noop_max: int = 30
    """Atari: up to this many no-ops at the start of an episode"""
    clip_rewards: bool = False
    """train on the sign of the reward (EfficientZero)"""
    episodic_life: bool = False
    """Atari: a lost life ends a training episode (EfficientZero)"""
    frame_stack: int = 32
    """F, observations the network sees at once (paper: 32 for Atari, 1 elsewhere: see the presets)"""
    action_planes: bool = True
    """images: also show the last F actions, one constant plane each (paper, app. E)"""
    max_episode_steps: Optional[int] = None
    """agent steps after which an episode is truncated, at most the environment's own limit (default: that limit)"""

    # ---- World model
    network: Literal["auto", "mlp", "conv", "efficientzero", "paper"] = "auto"
    """auto: `paper` for images, `mlp` for vectors; `conv` keeps the resolution (boards, MinAtar)"""
    channels: Optional[int] = None
    """planes of the convolutional networks (default: paper 256, efficientzero 64, conv 32)"""
    blocks: Optional[int] = None
    """residual blocks of h and of g (default: paper 16, else 1)"""
    hidden: int = 128
    """units of the MLPs"""
    latent: int = 64
    """numbers of the MLPs' latent state"""
    dyn_layers: int = 1
    """hidden layers of the MLP g"""
    support: int = 300
    """value and reward: categorical over the integers -support..support of h(x) (app. F); 0: one number in [-1, 1]"""
    unroll_steps: int = 5
    """K, unrolled steps (app. G)"""

    # ---- Behavior
    search: Literal["puct", "gumbel"] = "puct"
    """tree policy: the paper's pUCT, or Gumbel MuZero's sequential halving"""
    num_simulations: int = 50
    """S, simulations per move"""
    q_norm: Literal["siblings", "tree", "bounds"] = "siblings"
    """range to which pUCT scales Q: node and its children, the whole tree (paper), or the known bounds (-1, 1)"""
    max_considered_actions: int = 16
    """actions that a Gumbel root considers"""
    gumbel_scale: float = 0.1
    """c_scale of the Gumbel search's sigma (0.1 with rescaled Q)"""
    gamma: float = 0.997
    """discount per agent step"""
    td_steps: int = 10
    """n, rewards in a value target before it bootstraps (0, board games: to the end of the game)"""
    dirichlet_alpha: float = 0.25
    """concentration of the root noise"""
    dirichlet_fraction: float = 0.25
    """share of the noise in the root prior"""
    temperature_decay: bool = True
    """temperature 1, 0.5, 0.25 from 0, 50, 75 % of the run (app. D); off: always 1"""
    random_opening: int = 0
    """board games: self-play games begin after 0 to this many random moves (paper: none)"""
    temperature_moves: Optional[int] = None
    """board games: moves with temperature 1, then the most visited one (30 in the paper; default: all)"""

    # ---- Optimization
    buffer_size: int = 1_000_000
    """replay capacity in rows, summed over environments (the paper's 25M frames are 691 GB)"""
    replay_cuda: bool = True
    """keep the replay on the GPU if it fits there, otherwise in host memory"""
    learning_starts: int = 10_000
    """agent steps before the first update"""
    train_ratio: float = 0.02
    """updates per agent step (paper: 1M updates on 20 billion frames; Reanalyse: 1M on 200M frames, 0.02)"""
    batch_size: int = 1024
    """B, rows that an update unrolls from"""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum 0.9 and L2 (paper), or AdamW (small networks)"""
    learning_rate: float = 0.05
    """at the start (app. G)"""
    lr_decay: float = 0.1
    """factor on the learning rate every --lr-decay-updates"""
    lr_decay_updates: float = 350e3
    """updates per factor --lr-decay"""
    lr_steps: bool = False
    """the learning rate falls in steps (EfficientZero) instead of exponentially"""
    warmup_updates: int = 0
    """linear learning-rate warm-up from 0 (EfficientZero: 1 % of the updates)"""
    weight_decay: float = 1e-4
    """L2 (SGD), decoupled (AdamW)"""
    max_grad_norm: float = 1e9
    """clip the global gradient norm (EfficientZero: 5)"""
    value_scale: float = 1.0
    """weight of the value loss (Reanalyse: 0.25)"""
    per_alpha: float = 1.0
    """exponent of replay priorities (app. G); 0: uniform"""
    per_beta: float = 1.0
    """exponent of the importance weights at the start"""
    per_beta_end: float = 1.0
    """the same at the end of the run, linearly in between (EfficientZero: from 0.4 to 1)"""
    reanalyse: float = 0.0
    """share of a batch whose policies are searched anew (app. H: 0.8); above 0 values come from a target network"""
    target_updates: int = 200
    """updates between copies into that target network"""
    consistency_scale: float = 0.0
    """weight of EfficientZero's consistency loss (its value: 2)"""
    augment: bool = False
    """images: random shifts of 4 pixels and 5 % of intensity in updates (EfficientZero)"""

    # ---- Evaluation and logging
    eval_episodes: int = 10
    """episodes of the final evaluation, of --evaluate and of the random baseline; board games: games per seat"""
    log_every: int = 10_000
    """agent steps between log lines"""
    report_every: int = 500_000
    """agent steps between prediction errors on fresh episodes (0: never; not for board games)"""


# fmt: off
# total_timesteps counts agent steps: frames / action_repeat.
PRESETS = {
    # The paper's Atari networks and settings with Reanalyse's frames: 200M, 1M updates.
    "full": {},
    # A laptop: MLPs of 63 thousand parameters on CartPole. NOTE: without the consistency loss its latents say little of
    # what moves slowly: two of four seeds let the cart drift away after 170 to 390 steps.
    "cpu": dict(
        env_id="CartPole-v1", total_timesteps=10_000, num_envs=16, frame_stack=1, support=20, num_simulations=16,
        td_steps=50, buffer_size=20_000, learning_starts=500, train_ratio=0.25, batch_size=128, optimizer="adamw",
        learning_rate=3e-3, lr_decay=0.1, lr_decay_updates=2_400, max_grad_norm=5.0, value_scale=0.25, per_alpha=0.0,
        consistency_scale=2.0, compile=False, num_threads=1, log_every=400, report_every=5_000, save_every=5_000,
        image_size=16, action_planes=False,
    ),
    # EfficientZero (2111.00210v2) without its value prefix: 100k agent steps, 120k updates.
    "atari100k": dict(
        env_id="ALE/Pong-v5", total_timesteps=100_000, num_envs=4, network="efficientzero", frame_stack=4,
        action_planes=False, full_action_space=False, clip_rewards=True, episodic_life=True, max_episode_steps=3_000,
        gamma=0.997**4, td_steps=5, dirichlet_alpha=0.3, buffer_size=110_000, learning_starts=2_000, train_ratio=1.2,
        batch_size=256, learning_rate=0.2, lr_decay_updates=1e5, lr_steps=True, warmup_updates=1_000, max_grad_norm=5.0,
        value_scale=0.25, per_alpha=0.6, per_beta=0.4, reanalyse=1.0, consistency_scale=2.0, augment=True,
        eval_episodes=32, log_every=1_000, report_every=20_000, save_every=20_000,
    ),
    # MuZero Reanalyse (app. H).
    "reanalyse": dict(td_steps=5, value_scale=0.25, reanalyse=0.8),
    "minatar": dict(
        env_id="MinAtar/Breakout-v1", network="conv", total_timesteps=1_000_000, num_envs=64, frame_stack=1, support=20,
        search="gumbel", num_simulations=8, td_steps=5, buffer_size=500_000, learning_starts=2_000, train_ratio=0.1,
        batch_size=256, optimizer="adamw", learning_rate=2e-3, lr_decay_updates=1e5, max_grad_norm=5.0, gamma=0.99,
        value_scale=0.25, per_alpha=0.0, log_every=5_000, report_every=100_000, save_every=100_000,
    ),
    "connect4": dict(
        env_id="Connect4", network="conv", channels=64, blocks=3, total_timesteps=1_000_000, num_envs=128,
        search="gumbel", num_simulations=32, buffer_size=500_000, learning_starts=5_000, train_ratio=0.05,
        batch_size=512, optimizer="adamw", learning_rate=2e-3, lr_decay_updates=5e4, max_grad_norm=5.0,
        eval_episodes=100, log_every=5_000, save_every=100_000,
    ),
}
# What every board game shares: outcome targets, known bounds, no categorical heads, uniform replay.
# NOTE: outcomes are noisy targets, and what they do to the shared latent keeps the reward head from learning what wins:
# after 5,750 updates on random games it knew 72 % of the winning moves with --value-scale 1, 92 % without value loss.
# And without random openings self-play visits a sixth of all positions. Not lost to a perfect player, seed 2: 8 % with
# neither, 55 % with --value-scale 0.25, 48 % with random openings, 92 % with both.
BOARD_GAME = dict(
    frame_stack=1, support=0, gamma=1.0, td_steps=0, q_norm="bounds", per_alpha=0.0, temperature_decay=False,
    action_planes=False, value_scale=0.25, random_opening=4,
)
PRESETS["connect4"] |= BOARD_GAME
PRESETS["cpu_tictactoe"] = PRESETS["cpu"] | BOARD_GAME | dict(
    env_id="TicTacToe", total_timesteps=48_000, num_envs=32, num_simulations=25, unroll_steps=3, dyn_layers=2,
    buffer_size=24_000, learning_starts=2_000, train_ratio=0.125, lr_decay_updates=5_750, consistency_scale=0.0,
    dirichlet_alpha=0.5, eval_episodes=50, log_every=2_000, save_every=24_000,
)
# Allowed values, both ends included; checked before anything is created. Fields that are None are skipped.
RANGES = {
    **dict.fromkeys(
        "num_threads save_every total_timesteps num_envs action_repeat max_episode_steps frame_stack channels blocks "
        "hidden latent dyn_layers unroll_steps num_simulations max_considered_actions buffer_size learning_starts "
        "batch_size target_updates eval_episodes log_every".split(), (1, math.inf),
    ),
    **dict.fromkeys("value_scale consistency_scale gumbel_scale report_every".split(), (0, 1e9)),
    **dict.fromkeys("sticky_actions gamma dirichlet_fraction reanalyse".split(), (0, 1)),
    **dict.fromkeys("per_alpha per_beta per_beta_end".split(), (0, 1)),
    **dict.fromkeys("td_steps temperature_moves random_opening warmup_updates".split(), (0, 10**9)),
    **{"seed": (0, 2**32 - 1), "noop_max": (0, 1000), "image_size": (8, 256), "support": (0, 10_000)},
    **{"learning_rate": (1e-12, 10), "lr_decay": (1e-9, 1), "lr_decay_updates": (1, 1e12), "weight_decay": (0, 1)},
    **{"dirichlet_alpha": (1e-3, 1e3), "train_ratio": (1e-9, 1e9), "max_grad_norm": (1e-9, 1e12)},
    **{"target_return": (-1e300, 1e300)},
}
# fmt: on


# ---- Maths -----------------------------------------------------------------------------------------------------------


def signed_hyperbolic(x, eps=1e-3):
    """h(x) = sign(x) (sqrt(|x| + 1) - 1) + eps x (app. F): compresses values of any scale."""
    return x / ((x.abs() + 1).sqrt() + 1) + eps * x  # the same without a difference that cancels near 0


def signed_parabolic(y, eps=1e-3):
    """The inverse: sign(y) (w^2 - 1), w = (sqrt(1 + 4 eps (|y| + 1 + eps)) - 1) / (2 eps)."""
    root = (1 + 4 * eps * (y.abs() + 1 + eps)).sqrt()
    w = 2 * (y.abs() + 1 + eps) / (root + 1)
    # sign(y) (w - 1) written as y times a positive factor: both differences would cancel in float32.
    return y * (2 - 4 * eps / (root + 1 + 2 * eps)) / (root + 1) * (w + 1)


def scalar_to_support(x, support_size):
    """Two-hot encoding over the integers -s..s: (...) -> (..., 2s+1), the two atoms around x (3.7: 0.3 on 3, 0.7 on
    4)."""
    x = x.clamp(-support_size, support_size)
    low = x.floor()
    low_index = (low + support_size).long().clamp(min=0)  # NaN has no place of its own; its weights stay NaN
    # NOTE: at x = s there is no atom above; its weight is 0 and may go anywhere.
    index = torch.stack([low_index, (low_index + 1).clamp(max=2 * support_size)], -1)  # (..., 2)
    weight = torch.stack([1 - (x - low), x - low], -1)
    return torch.zeros(*x.shape, 2 * support_size + 1, dtype=x.dtype, device=x.device).scatter_add(-1, index, weight)


def support_to_scalar(logits, support_size):
    """Expectation over the integers -s..s: (..., 2s+1) -> (...)."""
    # NOTE: the expectation is taken in h's space; the caller inverts h afterwards, as targets were made.
    p = torch.softmax(logits, -1)
    atoms = torch.arange(1, support_size + 1, dtype=p.dtype, device=p.device)
    # Pairs +a, -a first: uniform logits then give exactly 0.
    return ((p[..., support_size + 1 :] - p[..., :support_size].flip(-1)) * atoms).sum(-1)


def renormalize(s):
    """Scale each sample (B, ...) to [0, 1] (app. G): the range of the action planes beside it."""
    flat = s.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    return ((flat - low) / (high - low).clamp(min=1e-5)).view_as(s)


def scale_gradient(x, factor):
    """x, whose gradient is multiplied by `factor`."""
    return x.detach() + factor * (x - x.detach())


def negative_cosine_similarity(a, b):
    """-cos(a, stopgrad(b)) over the last axis (EfficientZero eq. 3): (..., n) -> (...)."""
    return -F.cosine_similarity(a, b.detach(), dim=-1)  # a moves towards b, never b towards a


def n_step_matrix(steps, columns, discount, n, device=None, dtype=torch.float32):
    """(steps, columns): weights discount^(i - j) for 0 <= i - j < n, so that rewards @ matrix sums n rewards from each
    column on."""
    lag = torch.arange(steps, device=device)[:, None] - torch.arange(columns, device=device)
    weight = torch.tensor(discount, device=device, dtype=torch.float64) ** lag.clamp(min=0)
    return torch.where((lag >= 0) & (lag < n), weight, 0).to(dtype)


def n_step_targets(rewards, values, discount, n):
    """z_t = sum_{i<n} discount^i rewards[t+i] + discount^n values[t+n] (app. G): (..., T) -> (..., T), where rewards[t]
    follows state t and everything after the last row is 0."""
    T = rewards.shape[-1]
    returns = rewards @ n_step_matrix(T, T, discount, n, rewards.device, rewards.dtype)
    later = torch.zeros_like(values)
    if n < T:
        later[..., : T - n] = values[..., n:]
    return returns + discount**n * later


def visit_softmax(visits, temperature):
    """Action probabilities N^(1/T) / sum N^(1/T) (app. D): (..., A) -> (..., A). T: a number, 0 for the most visited,
    or (..., 1), all above 0."""
    if not torch.is_tensor(temperature) and temperature == 0:
        return F.one_hot(visits.argmax(-1), visits.shape[-1]).to(visits.dtype)
    power = (visits / visits.amax(-1, keepdim=True).clamp(min=1e-12)) ** (1 / temperature)  # cannot overflow
    return power / power.sum(-1, keepdim=True)


def visit_softmax_temperature(step, total):
    """1, 0.5, 0.25 from 0, 50, 75 % of the run (app. D)."""
    return 1.0 if step < 0.5 * total else 0.5 if step < 0.75 * total else 0.25


def per_weights(priorities, idx, beta):
    """Importance weights (1 / (M P(i)))^beta of rows `idx` (B,), the largest scaled to 1 (app. G); `priorities` (any
    shape, M of them above 0) as sampled from, P(i) in proportion to them."""
    p = priorities.flatten()
    share = p[idx] / p.sum()
    weights = (1 / ((p > 0).sum() * share.clamp(min=1e-30))) ** beta
    return weights / weights.max()


def lr_schedule(step, lr=0.05, decay=0.1, decay_updates=350e3, warmup=0, steps=False):
    """Learning rate of update number `step` (from 0): lr * decay^(step / decay_updates), with a linear warm-up;
    `steps`: with the exponent rounded down. Number or tensor."""
    rate = lr * decay ** (step // decay_updates if steps else step / decay_updates)
    if warmup:
        share = (step + 1) / warmup
        rate = rate * (share.clamp(max=1) if torch.is_tensor(share) else min(share, 1))
    return rate


# ---- Search ----------------------------------------------------------------------------------------------------------


def puct_score(prior, visits, q_norm, node_visits, c1=1.25, c2=19652):
    """Eq. 2: Qn + P sqrt(N) / (1 + n) (c1 + log((N + c2 + 1) / c2)), all (..., A); node_visits: number or (...)."""
    N = torch.as_tensor(node_visits, dtype=prior.dtype, device=prior.device)
    N = N.unsqueeze(-1) if N.dim() else N
    return q_norm + prior * (N.sqrt() * (c1 + ((N + c2 + 1) / c2).log())) / (1 + visits)


def qtransform_by_parent_and_siblings(q, visits, node_value):
    """Q (..., A) scaled to [0, 1] by the range of the node's own value (...) and its visited children's; unvisited
    children get 0."""
    seen, value = visits > 0, node_value.unsqueeze(-1)
    low, high = torch.where(seen, q, value).aminmax(dim=-1, keepdim=True)
    low, high = torch.minimum(low, value), torch.maximum(high, value)
    return torch.where(seen, (q - low) / (high - low).clamp(min=1e-8), 0)


def qtransform_completed_by_mix_value(q, visits, prior_logits, raw_value, value_scale=0.1, maxvisit_init=50):
    """sigma of Gumbel MuZero: completed Q, rescaled to [0, 1] per node, times (c_visit + max n) c_scale: (..., A).
    Unvisited children are completed by a mix of the node's network value and its visited children's Q."""
    seen, prior = visits > 0, torch.softmax(prior_logits, -1)
    total, mass = visits.sum(-1), (prior * seen).sum(-1)
    mean_q = (prior * q * seen).sum(-1) / mass.clamp(min=torch.finfo(q.dtype).tiny)
    mixed = (raw_value + total * mean_q) / (1 + total)
    completed = torch.where(seen, q, mixed.unsqueeze(-1))
    low, high = completed.amin(-1, keepdim=True), completed.amax(-1, keepdim=True)
    rescaled = (completed - low) / (high - low).clamp(min=1e-8)
    return (maxvisit_init + visits.amax(-1, keepdim=True)) * value_scale * rescaled


def get_sequence_of_considered_visits(m, n):
    """Sequential halving of n simulations over m actions: at simulation t the root chooses among the actions that were
    visited seq[t] times. List of n numbers."""
    if m <= 1:
        return list(range(n))
    sequence, counts, left = [], [0] * m, m
    rounds = math.ceil(math.log2(m))
    while len(sequence) < n:
        for _ in range(max(1, int(n / (rounds * left)))):
            sequence.extend(counts[:left])
            counts[:left] = [c + 1 for c in counts[:left]]
        left = max(2, left // 2)
    return sequence[:n]


@functools.cache
def sequence_table(m, n, device):
    """The sequences for 0 to m actions: (m + 1, n). Kept, because a CUDA graph cannot copy from the host."""
    return torch.tensor([get_sequence_of_considered_visits(i, n) for i in range(m + 1)], device=device)


def add_root_noise(prior_logits, noise, fraction, invalid=None):
    """Logits of (1 - fraction) P + fraction * noise (app. C): (B, A). `noise` sums to 1 over the legal actions."""
    logits = prior_logits if invalid is None else prior_logits.masked_fill(invalid, -math.inf)
    return torch.log((1 - fraction) * torch.softmax(logits, -1) + fraction * noise)


def dirichlet(alpha, legal, generator=None):
    """Dirichlet(alpha) over the legal actions (B, A) bool -> (B, A)."""
    gamma = torch._standard_gamma(torch.full(legal.shape, alpha, device=legal.device), generator)
    gamma = (gamma + 1e-20) * legal  # float32 underflows for small alpha
    return gamma / gamma.sum(-1, keepdim=True)


class Trees:
    """B search trees as arrays; all of them grow by one node per simulation, without a loop over trees or depths.

    Node i of tree b has the flat index b * (S + 2) + i; node 0 is the root, node i was made by simulation i, the last
    one is a bin for masked writes. Where Q is normalised within a node (or by known bounds), a node's best action can
    change only when the node is on the path just backed up. So `best` is kept per node, and beside it `leaf`: the node
    that following `best` from here leads to. Selection is then a single lookup at the root; the price is that a backup
    refreshes both for the whole path, all depths at once.

    `static`: keep all shapes as they are in the deepest case, as a CUDA graph needs it; a CPU saves that work."""

    static = False

    def __init__(self, prior_logits, value, latent, simulations, discount, invalid=None, q_norm="siblings", gumbel=None,
                 considered=16, gumbel_scale=0.1, c1=1.25, c2=19652):  # fmt: skip
        (B, A), dtype, device = prior_logits.shape, value.dtype, value.device
        self.A, self.S, self.discount, self.q_norm, self.c = A, simulations, discount, q_norm, (c1, c2)
        self.invalid, self.gumbel, self.gumbel_scale = invalid, gumbel, gumbel_scale
        size = simulations + 2
        M = B * size
        self.root = torch.arange(B, device=device) * size  # (B,)
        self.trash = (self.root + size - 1).unsqueeze(1)  # (B, 1)
        logits = prior_logits.to(dtype) if invalid is None else prior_logits.to(dtype).masked_fill(invalid, -math.inf)
        # Per edge (M, A): prior, visits, Q, side by side because they are read together, and the child's flat index.
        self.edges = torch.zeros(M, 3, A, dtype=dtype, device=device)
        self.prior, self.visits, self.q = self.edges.unbind(1)
        self.child = torch.full((M, A), -1, device=device)
        # Per node (M,): mean value, visits, reward on entering it, its network value, depth.
        self.value, self.count, self.reward, self.raw = (torch.zeros(M, dtype=dtype, device=device) for _ in range(4))
        self.depth, self.best, self.leaf = (torch.zeros(M, dtype=torch.long, device=device) for _ in range(3))
        self.path = self.trash.expand(B, size).reshape(M, 1).repeat(1, simulations + 1)  # (M, S+1) nodes from the root
        self.act = torch.zeros(M, simulations, dtype=torch.long, device=device)  # (M, S) actions on the way
        self.latents = latent.new_zeros(M, *latent.shape[1:])
        self.latents[self.root], self.prior[self.root] = latent, torch.softmax(logits, -1)
        # NOTE: the root's own evaluation counts as a visit: else the first simulation ignores the prior.
        self.value[self.root], self.raw[self.root], self.count[self.root] = value, value, 1
        self.path[self.root, 0], self.leaf[self.root] = self.root, self.root
        lag = torch.arange(simulations + 1, device=device)[:, None] - torch.arange(simulations + 1, device=device)
        self.powers = torch.where(lag >= 0, torch.pow(float(discount), lag.clamp(min=0).to(dtype)), 0)
        self.static = Trees.static or device.type != "cpu"
        self.deepest = simulations if self.static else 0
        if gumbel is not None:
            self.logits = torch.zeros(M, A, dtype=dtype, device=device)
            self.logits[self.root], self.root_logits = logits, logits - logits.amax(-1, keepdim=True)
            legal = torch.full((B,), A, device=device) if invalid is None else (~invalid).sum(-1)
            table = sequence_table(min(considered, A), simulations, device)
            self.sequence = table[legal.clamp(max=len(table) - 1)]  # (B, S)
        self.best[self.root] = self.root_scores(self.scores(self.root), 0).argmax(-1)

    def scores(self, nodes, low=-1.0, high=1.0):
        """What a node maximises over its actions: (...) flat indices -> (..., A)."""
        # (index_select is several times faster than indexing)
        prior, visits, q = self.edges.index_select(0, nodes.flatten()).unflatten(0, nodes.shape).unbind(-2)
        if self.gumbel is not None:
            sigma = self.sigma(nodes, visits, q)
            share = visits / (1 + visits.sum(-1, keepdim=True))
            return torch.softmax(self.logits[nodes] + sigma, -1) - share
        if self.q_norm == "siblings":
            q = qtransform_by_parent_and_siblings(q, visits, self.value[nodes])
        else:  # NOTE: unvisited actions count as the worst known outcome, as among siblings
            q = torch.where(visits > 0, (q - low) / (high - low), 0)
        return puct_score(prior, visits, q, self.count[nodes], *self.c)

    def sigma(self, nodes, visits, q):
        logits, raw = self.logits[nodes], self.raw[nodes]
        return qtransform_completed_by_mix_value(q, visits, logits, raw, self.gumbel_scale)

    def root_scores(self, scores, simulation):
        """The root's scores (B, A): legal actions only; with Gumbel, sequential halving."""
        if self.gumbel is not None:
            visits = self.visits[self.root]
            wanted = self.sequence[:, min(simulation, self.S - 1)].unsqueeze(-1)
            if simulation >= self.S:  # the action to take: best of the most visited
                wanted = visits.amax(-1, keepdim=True)
            scores = self.gumbel + self.root_logits + self.sigma(self.root, visits, self.q[self.root])
            scores = scores.clamp(min=-1e9).masked_fill(visits != wanted, -math.inf)
        return scores if self.invalid is None else scores.masked_fill(self.invalid, -math.inf)

    def select(self):
        """The node and its action that the next simulation expands: (B,) flat indices, (B,)."""
        if self.q_norm != "tree" or self.gumbel is not None:
            parent = self.leaf[self.root]
            return parent, self.best[parent]
        # The range over the whole tree moves with every backup, so all best actions may: descend, all trees in step.
        B = len(self.root)
        q, seen = self.q.reshape(B, -1), self.visits.reshape(B, -1, self.A) > 0
        seen = torch.cat([seen[:, :-1], torch.zeros_like(seen[:, :1])], 1).view(B, -1)  # not the bin
        low = q.masked_fill(~seen, math.inf).amin(-1, keepdim=True)
        high = q.masked_fill(~seen, -math.inf).amax(-1, keepdim=True)
        low, high = torch.where(seen.any(-1, keepdim=True), low, 0), torch.where(seen.any(-1, keepdim=True), high, 0)
        node, going = self.root, torch.ones_like(self.root, dtype=torch.bool)
        for depth in range(self.S):
            scores = self.scores(node, low, torch.maximum(high, low + 1e-8))
            action = (self.root_scores(scores, 0) if depth == 0 else scores).argmax(-1)
            following = self.child[node, action]
            going = following >= 0
            if not (self.static or going.any()):
                break
            node = torch.where(going, following, node)
        return node, action

    def grow(self, i, parent, action, reward, prior_logits, value, latent):
        """Simulation i (from 1) reached `action` in `parent` (both (B,)): add the new node, back its value up."""
        new, depth = self.root + i, self.depth[parent]
        logits = prior_logits.to(self.prior.dtype)
        self.latents[new], self.prior[new] = latent, torch.softmax(logits, -1)
        if self.gumbel is not None:
            self.logits[new] = logits
        self.reward[new], self.raw[new] = reward.to(self.value.dtype), value.to(self.value.dtype)
        self.depth[new] = depth + 1
        self.child[parent, action] = new
        self.path[new], self.act[new] = self.path[parent], self.act[parent]
        self.path[new, depth + 1], self.act[new, depth] = new, action
        self.best[new], self.leaf[new] = self.prior[new].argmax(-1), new
        if not self.static:
            self.deepest = max(self.deepest, int(depth.max()) + 1)
        D = self.deepest
        nodes, actions = self.path[new, : D + 1], self.act[new, :D]  # (B, D+1), (B, D)
        live = nodes[:, 1:] != self.trash  # (B, D): this edge exists
        rewards = self.reward[nodes[:, 1:]]  # (B, D), 0 beyond the path

        # Backup (app. B): G_j = sum_i discount^i r_(j+1+i) + discount^(length - j) v, all depths at once.
        chain = F.pad(rewards, (0, 1)).scatter(1, (depth + 1).unsqueeze(1), value.to(rewards.dtype).unsqueeze(1))
        returns = chain @ self.powers[: D + 1, : D + 1]  # (B, D+1)
        count = self.count[nodes]
        values = (self.value[nodes] * count + returns) / (count + 1)
        self.value[nodes], self.count[nodes] = values, count + 1
        parents = torch.where(live, nodes[:, :-1], self.trash)  # (B, D)
        self.q[parents, actions] = rewards + self.discount * values[:, 1:]
        self.visits[parents, actions] += 1
        if self.q_norm == "tree" and self.gumbel is None:
            return

        # Refresh the best actions of the path, then where they lead: a node whose best action stays on the path shares
        # the leaf of the first node below it whose best action leaves the path.
        if self.static:
            best = self.scores(parents).argmax(-1)
        else:  # one deep path makes D large: look only at nodes that there are
            some, best = live.flatten().nonzero().squeeze(1), torch.zeros_like(actions).flatten()
            best[some] = self.scores(parents.flatten()[some]).argmax(-1)
            best = best.view_as(actions)
        best[:, 0] = self.root_scores(self.scores(self.root), i).argmax(-1)  # (B, D)
        self.best[parents] = best
        following = self.child[parents, best]
        leaf = torch.where(following < 0, parents, self.leaf[following.clamp(min=0)])
        leaf = torch.cat([torch.where(live, leaf, new.unsqueeze(1)), new.unsqueeze(1)], 1)  # (B, D+1)
        level = torch.arange(D, device=leaf.device).expand_as(best).masked_fill(live & (best == actions), D)
        first = level.flip(1).cummin(1)[0].flip(1)  # (B, D)
        self.leaf[parents] = leaf.gather(1, first)


@torch.no_grad()
def mcts(prior_logits, value, latent, recurrent_fn, num_simulations, discount, invalid=None, **settings):
    """Search from B roots: prior_logits (B, A), value (B,), latent (B, ...), invalid (B, A) bool.

    recurrent_fn(latent (B, ...), action (B,)) -> reward (B,), prior_logits (B, A), value (B,), latent (B, ...).
    Returns visits (B, A), root_value (B,) and a dict: `policy` (B, A), the target for learning, `action` (B,), the one
    to take with Gumbel, `q` (B, A)."""
    trees = Trees(prior_logits, value, latent, num_simulations, discount, invalid, **settings)
    for i in range(1, num_simulations + 1):
        parent, action = trees.select()
        trees.grow(i, parent, action, *recurrent_fn(trees.latents[parent], action))
    visits, q = trees.visits[trees.root], trees.q[trees.root]
    if trees.gumbel is None:
        policy, action = visits / visits.sum(-1, keepdim=True), visits.argmax(-1)
    else:
        # NOTE: the improved policy, not the visits: sound for any number of simulations.
        policy = torch.softmax(trees.logits[trees.root] + trees.sigma(trees.root, visits, q), -1)
        action = trees.root_scores(None, num_simulations).argmax(-1)
    return visits, trees.value[trees.root], {"policy": policy, "action": action, "q": q}


# ---- Networks --------------------------------------------------------------------------------------------------------


def dense_net(i, hidden, o, layers=1, zero=False):
    """`layers` x (Linear, LayerNorm, ReLU), then a Linear; `zero`: it starts at exactly 0."""
    # NOTE: LayerNorm, not BatchNorm: search (evaluation mode) and training then see the same function.
    widths, parts = [i] + [hidden] * layers, []
    for a, b in zip(widths, widths[1:], strict=False):
        parts += [nn.Linear(a, b), nn.LayerNorm(b), nn.ReLU()]
    parts.append(nn.Linear(hidden, o))
    if zero:
        nn.init.zeros_(parts[-1].weight)
        nn.init.zeros_(parts[-1].bias)
    return nn.Sequential(*parts)


def conv3x3(i, o, stride=1):
    return nn.Conv2d(i, o, 3, stride, 1, bias=False)


class ResidualBlock(nn.Module):
    """conv - BN - ReLU - conv - BN - (+ x) - ReLU; with `stride`, the skip is a strided convolution."""

    def __init__(self, i, o=None, stride=1):
        super().__init__()
        o = o or i
        self.conv1, self.bn1 = conv3x3(i, o, stride), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = conv3x3(o, o), nn.BatchNorm2d(o)
        self.skip = nn.Identity() if i == o and stride == 1 else conv3x3(i, o, stride)

    def forward(self, x):  # (B, i, H, W) -> (B, o, H / stride, W / stride)
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.skip(x))


def tower(channels, blocks):
    return nn.Sequential(*(ResidualBlock(channels) for _ in range(blocks)))


def stem(i, o):
    return nn.Sequential(conv3x3(i, o), nn.BatchNorm2d(o), nn.ReLU())


def paper_downsampler(i, channels=256):
    """96x96 -> 6x6 (app. F): strided convolutions and average pooling between residual blocks."""
    half = channels // 2
    return nn.Sequential(
        conv3x3(i, half, 2), *(ResidualBlock(half) for _ in range(2)),
        conv3x3(half, channels, 2), *(ResidualBlock(channels) for _ in range(3)),
        nn.AvgPool2d(3, 2, 1), *(ResidualBlock(channels) for _ in range(3)), nn.AvgPool2d(3, 2, 1),
    )  # fmt: skip


def small_downsampler(i, channels=64):
    """96x96 -> 6x6, EfficientZero's."""
    half = channels // 2
    return nn.Sequential(
        conv3x3(i, half, 2), nn.BatchNorm2d(half), nn.ReLU(), ResidualBlock(half), ResidualBlock(half, channels, 2),
        ResidualBlock(channels), nn.AvgPool2d(3, 2, 1), ResidualBlock(channels), nn.AvgPool2d(3, 2, 1),
    )  # fmt: skip


class ConvHead(nn.Module):
    """1x1 convolution to a few planes, then to the output, through a hidden layer if `units`."""

    def __init__(self, channels, area, planes, units, o):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, planes, 1), nn.BatchNorm2d(planes)
        self.hidden = nn.Sequential()
        if units:
            self.hidden = nn.Sequential(nn.Linear(area * planes, units), nn.BatchNorm1d(units), nn.ReLU())
        self.out = nn.Linear(units or area * planes, o)
        # NOTE: reward and value start at exactly 0, the policy uniform (EfficientZero).
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        x = self.hidden(F.relu(self.bn(self.conv(x))).flatten(1))
        with torch.autocast(x.device.type, enabled=False):  # NOTE: bfloat16 cannot tell 601 close logits apart
            return self.out(x.float())


class ConvDynamics(nn.Module):
    """g: one-hot action planes beside the state, a convolution, residual blocks (app. F)."""

    def __init__(self, channels, actions, blocks, residual):
        super().__init__()
        self.actions, self.residual = actions, residual
        self.conv, self.bn = conv3x3(channels + actions, channels), nn.BatchNorm2d(channels)
        self.blocks = tower(channels, blocks)

    def forward(self, s, a):  # (B, C, H, W), (B,) -> (B, C, H, W)
        planes = F.one_hot(a, self.actions).to(s.dtype)[:, :, None, None].expand(-1, -1, *s.shape[2:])
        x = self.bn(self.conv(torch.cat([s, planes], 1)))
        return self.blocks(F.relu(x + s if self.residual else x))  # NOTE: adding s is EfficientZero's, not the paper's


class DenseDynamics(nn.Module):
    """g as an MLP that predicts the change of the state."""

    def __init__(self, latent, actions, hidden, layers):
        super().__init__()
        self.actions, self.net = actions, dense_net(latent + actions, hidden, latent, layers)

    def forward(self, s, a):  # (B, latent), (B,) -> (B, latent)
        return s + self.net(torch.cat([s, F.one_hot(a, self.actions).to(s.dtype)], -1))


# Defaults of the three convolutional networks: channels, residual blocks of h and g, blocks of f, (planes, units) of
# the policy head and of the value and reward heads. The paper's heads are AlphaZero's.
CONV = {
    "paper": dict(channels=256, blocks=16, head_blocks=0, policy=(2, 0), scalar=(1, 256)),
    "efficientzero": dict(channels=64, blocks=1, head_blocks=1, policy=(16, 32), scalar=(16, 32)),
    "conv": dict(channels=32, blocks=1, head_blocks=0, policy=(16, 32), scalar=(16, 32)),
}


def network_config(args, obs_space):
    """What the networks are made of, in plain types. `grid`: a vector that is really (H, W, planes)."""
    image = any(len(s.shape) == 3 for s in obs_space.values())
    name = args.network if args.network != "auto" else "paper" if image else "mlp"
    config = {"network": name} | {k: getattr(args, k) for k in ("hidden", "latent", "dyn_layers", "support")}
    config |= dict(frame_stack=args.frame_stack, action_planes=args.action_planes and image, grid=None)
    config |= dict(consistency=args.consistency_scale > 0)
    if args.env_id in GAMES:
        config["grid"] = [*GAMES[args.env_id].shape, 2]
    elif env_family(args) == "MinAtar" and not args.pixels:
        config["grid"] = [10, 10, obs_space["observation"].shape[0] // 100]
    if name != "mlp":
        config |= CONV[name] | {k: v for k in ("channels", "blocks") if (v := getattr(args, k)) is not None}
    return config


class MuZero(nn.Module):
    """h: observations -> s; g: s, a -> s'; f: s -> policy, value; reward head on s'. `predict` and what uses it give
    plain numbers: search and replay never see the categorical heads."""

    def __init__(self, obs_space, actions, config):
        super().__init__()
        self.actions, self.config, self.support, self.bf16 = actions, config, config["support"], False
        self.spaces = dict(sorted(obs_space.items()))
        stack, Z = config["frame_stack"], 2 * config["support"] + 1
        if config["network"] == "mlp":
            spaces = self.spaces.values()
            sizes = [int(s.n) if isinstance(s, gym.spaces.Discrete) else math.prod(s.shape) for s in spaces]
            hidden, latent = config["hidden"], config["latent"]
            self.h = dense_net(stack * sum(sizes), hidden, latent)
            self.g = DenseDynamics(latent, actions, hidden, config["dyn_layers"])
            self.f = nn.Identity()
            self.policy, self.value, self.reward = (dense_net(latent, hidden, n, zero=True) for n in (actions, Z, Z))
        else:
            height, width, planes = config["grid"] or next(iter(self.spaces.values())).shape
            planes, name, C = stack * (planes + config["action_planes"]), config["network"], config["channels"]
            down, self.scale = stem(planes, C), 1
            if not config["grid"] and name != "conv":
                down, self.scale = (paper_downsampler if name == "paper" else small_downsampler)(planes, C), 16
            self.h = nn.Sequential(down, tower(C, config["blocks"]))
            self.g = ConvDynamics(C, actions, config["blocks"], name != "paper")
            self.f, area = tower(C, config["head_blocks"]), -(-height // self.scale) * -(-width // self.scale)
            self.policy = ConvHead(C, area, *config["policy"], actions)
            self.value, self.reward = (ConvHead(C, area, *config["scalar"], Z) for _ in range(2))
            latent = C * area
        if config["consistency"]:  # EfficientZero's projection and prediction networks
            wide, narrow = (1024, 512) if config["network"] != "mlp" else (128, 64)
            self.project = nn.Sequential(
                nn.Flatten(), nn.Linear(latent, wide), nn.BatchNorm1d(wide), nn.ReLU(),
                nn.Linear(wide, wide), nn.BatchNorm1d(wide), nn.ReLU(), nn.Linear(wide, wide), nn.BatchNorm1d(wide),
            )  # fmt: skip
            self.foresee = nn.Sequential(
                nn.Linear(wide, narrow), nn.BatchNorm1d(narrow), nn.ReLU(), nn.Linear(narrow, wide)
            )

    def mixed(self):
        """bfloat16 for what is inside, if `bf16`. NOTE: networks only; the sums of a search need float32."""
        return torch.autocast("cuda", torch.bfloat16, enabled=self.bf16)

    def represent(self, obs, past=None):
        """h. obs: {key: (B, F, ...)} stacked observations, past (B, F): actions before each, -1 for none -> s."""
        parts = []
        for k, space in self.spaces.items():
            x = obs[k]
            if isinstance(space, gym.spaces.Discrete):
                parts.append(F.one_hot(x, int(space.n)).float().flatten(1))
            elif len(space.shape) == 3 or self.config["grid"] and self.config["network"] != "mlp":
                x = x.float() / 255 if len(space.shape) == 3 else x.float().unflatten(2, self.config["grid"])
                x = x.permute(0, 1, 4, 2, 3).flatten(1, 2)  # (B, F * planes, H, W)
                if self.config["action_planes"]:
                    a = ((past + 1) / self.actions)[:, :, None, None].expand(-1, -1, *x.shape[2:])
                    x = torch.cat([x, a.to(x.dtype)], 1)
                parts.append(x)
            else:
                parts.append(x.float().flatten(1))
        with self.mixed():
            s = self.h(torch.cat(parts, 1))
        return renormalize(s.float())

    def dynamics(self, s, a):
        """g. s (B, ...), actions (B,) -> s' (B, ...)."""
        with self.mixed():
            s = self.g(s, a)
        return renormalize(s.float())

    def to_scalar(self, logits):
        """Output of the value or reward head (..., Z) -> numbers (...)."""
        if self.support == 0:
            return torch.tanh(logits.float().squeeze(-1))
        return signed_parabolic(support_to_scalar(logits.float(), self.support))

    def head_loss(self, logits, target):
        """Value or reward loss (...): cross-entropy on h(target), or the squared error of board games (app. G)."""
        if self.support == 0:
            return (self.to_scalar(logits) - target) ** 2
        target = scalar_to_support(signed_hyperbolic(target), self.support)
        return -(target * torch.log_softmax(logits.float(), -1)).sum(-1)

    def predict(self, s):
        """f: s -> policy logits (B, A), value (B,)."""
        with self.mixed():
            x = self.f(s)
            policy, value = self.policy(x), self.value(x)
        return policy.float(), self.to_scalar(value)

    def foretell(self, s):
        """The reward (B,) that came with an imagined state."""
        with self.mixed():
            return self.to_scalar(self.reward(s))

    def initial(self, obs, past=None):
        """Observations -> policy logits (B, A), value (B,), s."""
        s = self.represent(obs, past)
        return *self.predict(s), s

    def recurrent(self, s, a):
        """One imagined step, as `mcts` wants it: reward (B,), policy logits (B, A), value (B,), s'."""
        s = self.dynamics(s, a)
        return self.foretell(s), *self.predict(s), s


def count_params(model):
    """Trained parameters of a module."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ---- Losses ----------------------------------------------------------------------------------------------------------


def augment_images(x, shift=4, intensity=0.05):
    """Random shifts and intensity (EfficientZero): (B, ..., H, W, C) uint8 -> the same, one shift per sample."""
    B, H, W = len(x), *x.shape[-3:-1]
    flat = x.reshape(B, -1, H, W, x.shape[-1])
    padded = F.pad(flat.float().movedim(-1, 2).flatten(1, 2), [shift] * 4, mode="replicate")  # (B, planes, H', W')
    rows = torch.randint(0, 2 * shift + 1, (B, 1), device=x.device) + torch.arange(H, device=x.device)
    columns = torch.randint(0, 2 * shift + 1, (B, 1), device=x.device) + torch.arange(W, device=x.device)
    padded = padded.gather(2, rows[:, None, :, None].expand(-1, padded.shape[1], -1, padded.shape[3]))
    padded = padded.gather(3, columns[:, None, None, :].expand(-1, padded.shape[1], H, -1))
    gain = 1 + intensity * torch.randn(B, 1, 1, 1, device=x.device).clamp(-2, 2)
    out = (padded * gain).clamp(0, 255).to(torch.uint8)
    return out.unflatten(1, (-1, x.shape[-1])).movedim(2, -1).reshape(x.shape)


def unroll(model, s, actions):
    """s^0 and the K states that g makes of it with actions (B, K): (B, K+1, ...)."""
    states = [s]
    for a in actions.unbind(1):
        # NOTE: half the gradient through the state that is handed on (app. G), and only there: a hook on the state
        # itself would also halve the gradients of its heads.
        states.append(model.dynamics(scale_gradient(states[-1], 0.5), a))
    return torch.stack(states, 1)


def muzero_loss(model, batch, args):
    """Eq. 1 on a batch of `TrajectoryReplay.sample`: loss (B,) without L2, metrics {name: scalar}, values (B,) for
    priorities."""
    K = args.unroll_steps
    obs = {k[4:]: v for k, v in batch.items() if k.startswith("obs/")}  # (B, K+1 or 1, F, ...)
    s = model.represent({k: v[:, 0] for k, v in obs.items()}, batch["past"][:, 0])
    states = unroll(model, s, batch["action"])  # (B, K+1, ...)
    # All heads once, on all steps: the same loss as inside the loop, several times fewer operations.
    with model.mixed():
        x = model.f(states.flatten(0, 1))
        policy, value, reward = model.policy(x), model.value(x), model.reward(states[:, 1:].flatten(0, 1))
    policy, value = (y.float().unflatten(0, (-1, K + 1)) for y in (policy, value))
    reward = reward.float().unflatten(0, (-1, K))
    terms = {
        "value": model.head_loss(value, batch["z"]) * batch["value_mask"],  # (B, K+1)
        "policy": -(batch["pi"] * torch.log_softmax(policy, -1)).sum(-1) * batch["policy_mask"],  # (B, K+1)
        "reward": model.head_loss(reward, batch["u"]) * batch["reward_mask"],  # (B, K)
    }
    if args.consistency_scale:
        # The true later observations through h; only the imagined side is trained (EfficientZero eq. 3).
        later = {k: v[:, 1:].flatten(0, 1) for k, v in obs.items()}
        with model.mixed():
            with torch.no_grad():
                truth = model.project(model.represent(later, batch["past"][:, 1:].flatten(0, 1))).float()
            dreamed = model.foresee(model.project(states[:, 1:].flatten(0, 1))).float()
        terms["consistency"] = negative_cosine_similarity(dreamed, truth).unflatten(0, (-1, K)) * batch["exists"][:, 1:]
    for name, term in terms.items():
        assert term.shape[1] == K + (name in ("value", "policy")), f"{name} has the shape {tuple(term.shape)}"
    # NOTE: steps 1..K share one weight, step 0 has its own (app. G): it is the only one used without imagination.
    weight = torch.full((K + 1,), 1 / K, device=value.device)
    weight[0] = 1.0
    scales = {"value": args.value_scale, "consistency": args.consistency_scale}
    totals = {k: (v * weight[K + 1 - v.shape[1] :]).sum(1) for k, v in terms.items()}  # (B,)
    loss = sum(scales.get(k, 1.0) * v for k, v in totals.items())  # eq. 1
    metrics = {k: v.detach().mean() for k, v in totals.items()}
    metrics["value_mean"] = model.to_scalar(value[:, 0]).detach().mean()
    metrics["target_mean"] = batch["z"][:, 0].mean()
    entropy = -(batch["pi"] * batch["pi"].clamp(min=1e-12).log()).sum(-1) * batch["policy_mask"]
    metrics["target_entropy"] = entropy.sum() / batch["policy_mask"].sum().clamp(min=1)
    return loss, metrics, model.to_scalar(value[:, 0]).detach()


class MuZeroLearner:
    """Model, target network and optimizer, and the one update of everything."""

    def __init__(self, model, args, device):
        self.model, self.args, self.device = model, args, device
        self.target = copy.deepcopy(model).requires_grad_(False).eval() if args.reanalyse else None
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.updates = torch.zeros((), dtype=torch.float64, device=device)
        options = dict(lr=torch.zeros((), device=device), weight_decay=args.weight_decay, fused=True)
        if args.optimizer == "sgd":  # NOTE: SGD's weight decay is the L2 term of eq. 1, AdamW's is decoupled
            self.opt = torch.optim.SGD(self.params, momentum=0.9, **options)
        else:
            self.opt = torch.optim.AdamW(self.params, capturable=device.type == "cuda", **options)
        self.bad = None  # which loss terms, or the gradient norm, were not finite; set once, on the device

    def update(self, batch):
        """One optimizer step on a batch {name: (B, ...)}: metrics, values (B,) for priorities."""
        args = self.args
        self.model.train()
        if args.augment:  # the first observation and the later ones differently (EfficientZero)
            images = [k for k, v in batch.items() if k.startswith("obs/") and v.dim() == 6]
            views = {k: [augment_images(v) for v in batch[k].split([1, batch[k].shape[1] - 1], 1)] for k in images}
            batch = batch | {k: torch.cat(v, 1) for k, v in views.items()}
        loss, metrics, values = muzero_loss(self.model, batch, args)
        loss = (loss * batch["weight"]).mean()
        self.opt.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.params, args.max_grad_norm)
        # No step on bad numbers, decided on the device. The main loop looks at `bad` when it reads metrics.
        terms = {k: v for k, v in metrics.items() if k in ("value", "policy", "reward", "consistency")}
        bad = ~torch.isfinite(torch.stack([*terms.values(), norm]).detach())
        if self.bad is None:
            self.bad, self.names = torch.zeros_like(bad), [*terms, "gradient norm"]
        self.bad.copy_(torch.where(self.bad.any(), self.bad, bad))
        ok = ~self.bad.any()
        schedule = args.lr_decay, args.lr_decay_updates, args.warmup_updates, args.lr_steps
        rate = self.opt.param_groups[0]["lr"]
        rate.copy_(lr_schedule(self.updates, args.learning_rate, *schedule))
        self.opt.found_inf = (~ok).float()  # the fused kernel then leaves parameters and moments alone
        self.opt.step()
        self.updates += ok
        if self.target is not None:  # every so many updates the target network becomes a copy of the model
            fresh = (self.updates % args.target_updates == 0) & ok
            for old, new in zip(self.target.state_dict().values(), self.model.state_dict().values(), strict=True):
                old.copy_(torch.where(fresh, new, old))
        self.model.eval()
        return metrics | {"loss": loss.detach(), "grad_norm": norm, "learning_rate": rate.clone()}, values

    def check(self, where=""):
        """Raise FloatingPointError naming what was not finite. Waits for the device."""
        if self.bad is not None and self.bad.any():
            names = ", ".join(n for n, b in zip(self.names, self.bad.tolist(), strict=True) if b)
            raise FloatingPointError(f"not finite at {where}: {names}; no optimizer step was taken")

    def state_dict(self):
        target = self.target.state_dict() if self.target is not None else None
        state = {"model": self.model.state_dict(), "target": target, "optimizer": self.opt.state_dict()}
        return state | {"updates": self.updates}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        if self.target is not None:
            self.target.load_state_dict(state["target"])
        self.opt.load_state_dict(state["optimizer"])
        for group in self.opt.param_groups:  # the run may have begun on another kind of device
            group["lr"] = torch.as_tensor(group["lr"], device=self.device)
            if "capturable" in group and self.args.optimizer == "adamw":
                group["capturable"] = self.device.type == "cuda"
        self.updates.copy_(state["updates"])


@torch.no_grad()
def plan(model, obs, past, args, legal, noise=None, gumbel=None):
    """Search from observations {key: (B, F, ...)}: visits (B, A), root value (B,), {policy, action, q}. `noise` (B, A):
    Dirichlet, or `gumbel` (B, A), zeros to evaluate."""
    logits, value, s = model.initial(obs, past)
    invalid = None if legal is None else ~legal
    if noise is not None:
        logits = add_root_noise(logits, noise, args.dirichlet_fraction, invalid)
    settings = dict(q_norm=args.q_norm, considered=args.max_considered_actions, gumbel_scale=args.gumbel_scale)
    if args.search == "gumbel":
        settings["gumbel"] = torch.zeros_like(logits) if gumbel is None else gumbel
    # NOTE: seen from the player to move, the next state belongs to the opponent: its value counts negative.
    discount = -args.gamma if args.env_id in GAMES else args.gamma
    return mcts(logits, value, s, model.recurrent, args.num_simulations, discount, invalid, **settings)


# [optional: compile
def compile_networks(model, learner):
    """Compile h, g and f; on a GPU capture each whole update in a CUDA graph (the search: see `Searcher`)."""
    try:
        torch.compile(lambda x: torch.sin(x) + 1)(torch.zeros(8, device=learner.device))  # is there a working compiler?
    except Exception as e:
        return say(f"warning: torch.compile does not work here ({type(e).__name__}); going on without it")
    say("compiling: the first steps take a minute or more (--no-compile starts at once)")
    for network in (model.h, model.g, model.f):
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


class Searcher:
    """Acting: stacks frames for N environments and searches; with noise and temperature, or greedily."""

    def __init__(self, model, args, device, n, explore=True):
        self.model, self.args, self.device, self.n, self.explore = model, args, device, n, explore
        self.obs, self.past = None, None
        self.search = lambda inputs: self.run(inputs)
        # [optional: compile
        if args.compile and device.type == "cuda" and args.q_norm != "tree":
            self.search = Graphed(self.run)
        # compile]

    def see(self, obs, first, actions=None):
        """Push observations {key: (N, ...)} into the stacks; `first` (N,): an episode begins; `actions` before them."""
        F_, new = self.args.frame_stack, to_torch(obs, self.device)
        first = torch.as_tensor(first, device=self.device)
        if self.obs is None:
            self.obs = {k: torch.stack([v] * F_, 1) for k, v in new.items()}  # (N, F, ...)
            self.past = torch.full((self.n, F_), -1, device=self.device)
        if actions is not None:
            self.past = torch.cat([self.past[:, 1:], torch.as_tensor(actions, device=self.device).long()[:, None]], 1)
        for k, v in new.items():
            # An episode begins with copies of its first frame, before which nothing was done.
            rolled = torch.cat([self.obs[k][:, 1:], v.unsqueeze(1)], 1)
            start = first.view(-1, *[1] * (rolled.dim() - 1))
            self.obs[k] = torch.where(start, v.unsqueeze(1), rolled)
        self.past = self.past.masked_fill(first[:, None], -1)

    @torch.no_grad()
    def value(self, obs=None, past=None):
        """The network's value of the stacked observations: (N,) array."""
        self.model.eval()
        obs, past = (self.obs, self.past) if obs is None else (obs, past)
        with uncompiled(self.args):
            return self.model.initial(obs, past)[1].cpu().numpy()

    def value_after(self, before, envs, last, actions):
        """Values of the last observations {key: (n, ...)} that `actions` (N,) led to from the stacks `before`."""
        (obs, past), last = before, to_torch(last, self.device)
        envs, actions = (torch.as_tensor(x, device=self.device) for x in (envs, actions))
        obs = {k: torch.cat([v[envs, 1:], last[k].unsqueeze(1)], 1) for k, v in obs.items()}
        return self.value(obs, torch.cat([past[envs, 1:], actions.long()[envs, None]], 1))

    def run(self, inputs):
        obs = {k[4:]: v for k, v in inputs.items() if k.startswith("obs/")}
        noise, gumbel = inputs.get("noise"), inputs.get("gumbel")
        return plan(self.model, obs, inputs["past"], self.args, inputs.get("legal"), noise, gumbel)

    @torch.no_grad()
    def act(self, legal=None, temperature=1.0):
        """Search: actions (N,), policies (N, A), root values (N,), visits (N, A). `temperature`: number, or (N,)."""
        args, A = self.args, self.model.actions
        self.model.eval()  # NOTE: batch statistics would make a tree depend on its neighbours
        inputs = {f"obs/{k}": v for k, v in self.obs.items()} | {"past": self.past}
        allowed = torch.ones(self.n, A, dtype=torch.bool, device=self.device)
        if legal is not None:
            inputs["legal"] = allowed = torch.as_tensor(legal, device=self.device)
        if self.explore and args.search == "puct":
            inputs["noise"] = dirichlet(args.dirichlet_alpha, allowed)
        elif self.explore:
            u = torch.rand(self.n, A, device=self.device).clamp(1e-20, 1 - 1e-7)
            inputs["gumbel"] = -torch.log(-torch.log(u))
        visits, value, extra = self.search(inputs)
        action = extra["action"]
        if self.explore and args.search == "puct":
            hot = torch.as_tensor(temperature, device=self.device, dtype=visits.dtype).expand(self.n)[:, None]
            probs = torch.where(hot > 0, visit_softmax(visits, hot.clamp(min=1e-3)), visit_softmax(visits, 0))
            cdf = probs.cumsum(-1)  # inverse CDF: one random number per environment
            u = torch.rand(self.n, 1, device=self.device) * cdf[:, -1:] * (1 - 1e-6)  # never past the last legal one
            action = (cdf <= u).sum(-1).clamp(max=A - 1)
        return action, extra["policy"], value, visits


# ---- Replay ----------------------------------------------------------------------------------------------------------


class TrajectoryReplay:
    """Ring buffers (environment, row), allocated once on `device`; single frames, stacked when they are sampled."""

    def __init__(self, capacity, num_envs, specs, args, actions, device="cpu"):
        """capacity: rows per environment; specs: {name: (shape, dtype)}."""
        self.capacity, self.args, self.actions, self.device = capacity, args, actions, torch.device(device)
        self.data = {k: torch.zeros(num_envs, capacity, *s, dtype=d, device=device) for k, (s, d) in specs.items()}
        self.priority = torch.zeros(num_envs, capacity, dtype=torch.float64, device=device)  # 0: never drawn
        self.top = torch.ones((), dtype=torch.float64, device=device)  # the highest priority so far, of new rows
        self.count, self.begun = np.zeros(num_envs, np.int64), np.zeros(num_envs, np.int64)  # rows ever added; episode
        self.drawable, self.rng = False, torch.Generator(device).manual_seed(args.seed)  # is there a row to draw?
        self.game = GAMES.get(args.env_id)
        self.n = args.td_steps or self.game.cells
        self.search = None  # of Reanalyse, see `fresh_policies`
        self.horizon = min(self.n + args.unroll_steps, capacity - 1)  # rows after a row that its targets reach
        self.discount = -args.gamma if self.game else args.gamma

    @staticmethod
    def specs(obs_space, actions, config):
        kinds = {np.dtype(np.uint8): torch.uint8, np.dtype(np.float32): torch.float32, np.dtype(np.int64): torch.int64}
        kind = lambda s: torch.uint8 if config["grid"] else kinds[s.dtype]  # noqa: E731 (grids hold zeros and ones)
        specs = {f"obs/{k}": (s.shape, kind(s)) for k, s in obs_space.items()}
        specs |= {"action": ((), torch.int64), "reward": ((), torch.float32), "begun": ((), torch.int64)}
        specs |= dict.fromkeys(("is_first", "is_last", "is_terminal"), ((), torch.bool))
        return specs | {"policy": ((actions,), torch.float32), "value": ((), torch.float32)}

    @staticmethod
    def row_bytes(specs):
        return 8 + sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values())

    def add(self, envs, rows):
        """Append one row to each environment in `envs` (n,): rows {name: (n, ...)} as arrays or tensors."""
        first, last = np.asarray(rows["is_first"]), np.asarray(rows["is_last"])
        self.begun[envs[first]] = self.count[envs[first]]
        index = torch.as_tensor(envs * self.capacity + self.count[envs] % self.capacity, device=self.device)
        for name, value in (rows | {"begun": self.begun[envs]}).items():
            data = self.data[name]
            data.flatten(0, 1)[index] = torch.as_tensor(value, device=self.device).to(data.dtype)
        flat = self.priority.view(-1)
        flat[index] = 0.0
        # The oldest rows of a full ring have lost the frames and actions before them.
        full, ahead = (
            envs[self.count[envs] >= self.capacity],
            np.arange(1, self.args.frame_stack + self.args.action_planes),
        )
        old = full[:, None] * self.capacity + (self.count[full][:, None] + ahead) % self.capacity
        flat[torch.as_tensor(old.ravel(), device=self.device)] = 0.0
        # NOTE: a row may be drawn when all rewards of its targets are known or its episode is over. Bootstrapping
        # earlier, from the newest row, would hold back just those episodes that live longer than expected.
        reached = self.count[envs] - self.horizon
        known = envs * self.capacity + reached % self.capacity
        oldest = np.maximum(self.begun, self.count - self.horizon + 1)
        rest = [e * self.capacity + np.arange(oldest[e], self.count[e]) % self.capacity for e in envs[last]]
        ready = np.concatenate([known[reached >= self.begun[envs]], *rest])
        flat[torch.as_tensor(ready, device=self.device)] = self.top
        self.drawable |= len(ready) > 0
        self.count[envs] += 1

    def truncate(self):
        """End all unfinished episodes with the row they have."""
        newest = torch.as_tensor(np.arange(len(self.count)) * self.capacity + (self.count - 1) % self.capacity)
        self.data["is_last"].view(-1)[newest.to(self.device)] = True

    def windows(self, env, row):
        """Stacked observations of rows (...,): {key: (..., F, ...)} and the actions before each frame (..., F)."""
        begun = self.data["begun"].view(-1)[env * self.capacity + row % self.capacity].unsqueeze(-1)
        back = torch.arange(1 - self.args.frame_stack, 1, device=self.device)
        rows = row.unsqueeze(-1) + back  # (..., F)
        inside = rows.clamp(min=begun)
        ids = env.unsqueeze(-1) * self.capacity + inside % self.capacity
        before = env.unsqueeze(-1) * self.capacity + (rows - 1) % self.capacity
        past = torch.where(rows > begun, self.data["action"].view(-1)[before], -1)
        return {k[4:]: v.flatten(0, 1)[ids] for k, v in self.data.items() if k.startswith("obs/")}, past

    def draw(self, batch_size):
        """Rows in proportion to their priorities: flat indices (B,), environments, absolute row numbers."""
        cumulative = self.priority.view(-1).cumsum(0)
        u = torch.rand(batch_size, dtype=torch.float64, device=self.device, generator=self.rng) * cumulative[-1]
        index = torch.searchsorted(cumulative, u, right=True).clamp(max=len(cumulative) - 1)
        env = torch.div(index, self.capacity, rounding_mode="floor")
        count = torch.as_tensor(self.count, device=self.device)[env]
        place = index % self.capacity
        row = count - 1 - (count - 1 - place) % self.capacity  # the newest row number that lies at this place
        return index, env, row

    def sample(self, batch_size, learner=None, progress=0.0):
        """A batch for `muzero_loss` and its flat indices (B,). `learner`: for Reanalyse, the model to search with and
        its target network; `progress`: share of the run that is over, for the exponent of the weights."""
        args, K, n = self.args, self.args.unroll_steps, self.n
        index, env, row = self.draw(batch_size)
        newest = torch.as_tensor(self.count, device=self.device)[env, None] - 1
        steps = row[:, None] + torch.arange(K + n + 1, device=self.device)  # (B, K+n+1) absolute rows
        ids = env[:, None] * self.capacity + torch.minimum(steps, newest) % self.capacity
        field = lambda k, ids=ids: self.data[k].flatten(0, 1)[ids]  # noqa: E731
        last, terminal = field("is_last"), field("is_terminal")
        # A window stops at the end of its episode or at the newest row.
        stop = last | (steps >= newest)
        exists = (stop.cumsum(1) - stop.long()) == 0  # rows of the same episode
        over = (terminal & exists).cumsum(1) > 0  # the terminal row and, absorbing, everything after it
        values = field("value")
        if learner is not None and args.reanalyse:
            values = self.fresh_values(learner.target, env, steps, stop, values)
        # Value targets. A window that stops without a terminal state bootstraps there: gamma times that value is added
        # to the reward of its last transition, and what follows is 0.
        cut = exists & stop & ~over
        gain = (field("reward") + self.discount * torch.where(cut, values, 0)) * exists  # of entering each row
        ahead = torch.where(exists & ~stop, values, 0)
        weights = n_step_matrix(K + n, K + 1, self.discount, n, self.device)
        z = gain[:, 1:] @ weights + self.discount**n * ahead[:, n : n + K + 1]  # (B, K+1), app. G
        ids, exists, over, last = ids[:, : K + 1], exists[:, : K + 1], over[:, : K + 1], last[:, : K + 1]
        decided = exists & ~last
        random = torch.randint(self.actions, (batch_size, K), device=self.device, generator=self.rng)
        batch = {
            # NOTE: after the end actions are random, rewards and values 0: absorbing states. After a truncation nobody
            # knows, and nothing is learned.
            "action": torch.where(decided[:, :K], field("action", ids[:, :K]), random),
            "z": z, "u": (field("reward", ids) * exists)[:, 1:],
            "value_mask": ((exists & ~stop[:, : K + 1]) | over).float(),
            "reward_mask": (exists | over)[:, 1:].float(),
            "policy_mask": decided.float(), "exists": exists.float(), "pi": field("policy", ids),
        }  # fmt: skip
        batch["weight"] = torch.ones(batch_size, device=self.device)
        if args.per_alpha:
            beta = args.per_beta + progress * (args.per_beta_end - args.per_beta)
            batch["weight"] = per_weights(self.priority, index, beta).float()
        depth = K + 1 if args.consistency_scale else 1
        rows = torch.minimum(steps[:, : K + 1], row[:, None] + exists.sum(1, keepdim=True) - 1)
        obs, past = self.windows(env[:, None].expand_as(rows)[:, :depth], rows[:, :depth])
        batch |= {f"obs/{k}": v for k, v in obs.items()} | {"past": past}
        if learner is not None and args.reanalyse:
            some = round(args.reanalyse * batch_size)
            batch["pi"] = self.fresh_policies(learner.model, env[:some], rows[:some], decided[:some], batch["pi"])
        return batch, index

    def fresh_values(self, target, env, steps, stop, values):
        """Reanalyse (app. H): the values that are bootstrapped from, by the target network."""
        K, n = self.args.unroll_steps, self.n
        width = stop.shape[1]
        end = torch.where(stop.any(1), stop.int().argmax(1), width - 1)  # (B,)
        places = torch.minimum(torch.arange(n, n + K + 1, device=self.device), end[:, None])  # (B, K+1)
        rows = steps.gather(1, places)
        obs, past = self.windows(env[:, None].expand_as(rows), rows)
        device = next(target.parameters()).device  # the replay may lie in host memory
        obs = to_torch({k: v.flatten(0, 1) for k, v in obs.items()}, device)
        with torch.no_grad():
            _, fresh, _ = target.initial(obs, past.flatten(0, 1).to(device))
        return values.scatter(1, places, fresh.view_as(places).to(values))

    def fresh_policies(self, model, env, rows, decided, policies):
        """Reanalyse: policies of the first rows of a batch from a search with the newest weights."""
        obs, past = self.windows(env[:, None].expand_as(rows), rows)
        inputs = {f"obs/{k}": v.flatten(0, 1) for k, v in obs.items()} | {"past": past.flatten(0, 1)}
        if self.game:
            legal = self.game.legal(self.game.from_obs(inputs["obs/observation"][:, -1].cpu().numpy()))
            inputs["legal"] = torch.as_tensor(legal | ~legal.any(-1, keepdims=True))  # a full board: anything
        device = next(model.parameters()).device  # the replay may lie in host memory
        if self.search is None:
            searcher = Searcher(model, self.args, device, len(past), explore=False)
            self.search = searcher.search  # on a GPU captured in a graph: the shapes are always the same
        model.eval()
        _, _, extra = self.search(to_torch(inputs, device))
        fresh = extra["policy"].to(policies).view(*rows.shape, -1)
        fresh = torch.where(decided.unsqueeze(-1), fresh, policies[: len(rows)])
        return torch.cat([fresh, policies[len(rows) :]])

    def refresh(self, index, errors):
        """New priorities |predicted value - target|^alpha of sampled rows."""
        fresh = (errors.abs().to(self.priority) + 1e-6) ** self.args.per_alpha
        self.priority.view(-1)[index] = fresh
        self.top = torch.maximum(self.top, fresh.max())

    def state_dict(self):
        filled = int(min(self.count.max(), self.capacity))
        rows = {k: v[:, :filled].cpu().clone() for k, v in self.data.items()}
        state = {"rows": rows, "priority": self.priority[:, :filled].cpu().clone(), "top": float(self.top)}
        return state | {"count": self.count.tolist(), "begun": self.begun.tolist(), "rng": self.rng.get_state()}

    def load_state_dict(self, state):
        # NOTE: a resumed run has a larger capacity only if the smaller one had not wrapped yet; then rows keep places.
        for k, v in state["rows"].items():
            self.data[k][:, : v.shape[1]] = v.to(self.device)
        self.priority[:, : state["priority"].shape[1]] = state["priority"].to(self.device)
        self.top = torch.tensor(state["top"], dtype=torch.float64, device=self.device)
        self.count, self.begun = np.array(state["count"]), np.array(state["begun"])
        self.drawable = bool((self.priority > 0).any())
        self.rng.set_state(state["rng"].cpu())


# ---- Games and environments ------------------------------------------------------------------------------------------


class BoardGame:
    """Rules over arrays of boards (..., cells): 1 own stone, -1 the opponent's, 0 empty, always seen by the player to
    move. Subclasses say where the stone of an action falls."""

    shape, connect, actions = (3, 3), 3, 9

    def __init_subclass__(cls):
        H, W = cls.shape
        cls.cells, lines = H * W, []  # the most moves a game can have
        for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
            for y in range(H):
                for x in range(W):
                    line = [(y + i * dy, x + i * dx) for i in range(cls.connect)]
                    if all(0 <= a < H and 0 <= b < W for a, b in line):
                        lines.append([a * W + b for a, b in line])
        cls.lines = np.array(lines)  # (lines, connect)

    @classmethod
    def step(cls, board, action):
        """board (..., cells), action (...) -> board as the opponent sees it, the mover's reward (1: it wins), done."""
        board, action = np.asarray(board), np.asarray(action)
        after = np.where(np.arange(cls.cells) == cls.cell(board, action)[..., None], 1, board).astype(np.int8)
        won = (after[..., cls.lines] == 1).all(-1).any(-1)
        return -after, won.astype(np.float32), won | (after != 0).all(-1)

    @classmethod
    def observe(cls, board):
        """Boards (N, cells) -> {"observation": (N, cells * 2)}: planes of own and opposing stones, channels last."""
        return {"observation": np.stack([board == 1, board == -1], -1).astype(np.float32).reshape(len(board), -1)}

    @classmethod
    def from_obs(cls, obs):
        """The inverse of `observe`: (N, cells * 2) -> (N, cells)."""
        planes = obs.reshape(len(obs), cls.cells, 2).astype(np.int8)
        return planes[..., 0] - planes[..., 1]

    @classmethod
    def draw(cls, board, mine="X", other="O"):
        cells = np.array([".", mine, other])[np.asarray(board).reshape(cls.shape)]
        return "\n".join(" ".join(row) for row in cells)


class TicTacToe(BoardGame):
    shape, connect, actions = (3, 3), 3, 9

    @staticmethod
    def legal(board):
        return np.asarray(board) == 0

    @staticmethod
    def cell(board, action):
        return action

    @classmethod
    def solve(cls, board=None, table=None):
        """Minimax: {board bytes: (value for the player to move, best actions)} of all positions after `board`."""
        board, table = np.zeros(cls.cells, np.int8) if board is None else board, {} if table is None else table
        if board.tobytes() not in table:
            values = {}
            for action in np.flatnonzero(cls.legal(board)):
                following, reward, done = cls.step(board, action)
                if not done:
                    cls.solve(following, table)
                values[int(action)] = float(reward) if done else -table[following.tobytes()][0]
            best = max(values.values())
            table[board.tobytes()] = best, [a for a, v in values.items() if v == best]
        return table


class Connect4(BoardGame):
    """Six rows, seven columns; row 0 is the top."""

    shape, connect, actions = (6, 7), 4, 7

    @classmethod
    def legal(cls, board):
        return np.asarray(board)[..., :7] == 0

    @classmethod
    def cell(cls, board, action):
        columns = np.asarray(board).reshape(*np.shape(board)[:-1], *cls.shape)
        height = (columns == 0).sum(-2)  # (..., 7) empty cells of each column
        return (np.take_along_axis(height, action[..., None], -1)[..., 0] - 1) * 7 + action


GAMES = {"TicTacToe": TicTacToe, "Connect4": Connect4}


def random_player(game, rng):
    """Uniform legal moves: boards (N, cells) -> actions (N,)."""
    return lambda boards: (game.legal(boards) * rng.random((len(boards), game.actions))).argmax(1)


def one_ply_player(game, rng):
    """Wins if it can, else prevents an immediate loss if it can, else moves at random."""

    def move(boards):
        legal = game.legal(boards)
        score = rng.random(legal.shape) * legal - ~legal
        for a in range(game.actions):
            for bonus, view in ((4, boards), (2, -boards)):  # the same move by the opponent: a threat
                won = game.step(view, np.full(len(view), a))[1]
                score[:, a] += bonus * won * legal[:, a]
        return score.argmax(1)

    return move


def perfect_player(game, rng):
    """Uniform among the optimal moves."""
    table = game.solve()
    return lambda boards: np.array([rng.choice(table[b.astype(np.int8).tobytes()][1]) for b in boards])


# Whom the agent meets in an evaluation; the first one makes the score.
OPPONENTS = {
    "TicTacToe": {"perfect": perfect_player, "random": random_player},
    "Connect4": {"one_ply": one_ply_player, "random": random_player},
}


class BoardEnvs:
    """N games of self-play in lockstep, with the interface of a vector environment (autoreset in the same step). Game k
    of a board begins after 0 to `opening` random moves, the same in every run: without them self-play soon visits a
    few lines of play only, and meets the others unprepared."""

    def __init__(self, game, n, opening=0, seed=0):
        self.game, self.n, self.opening, self.seed = game, n, opening, seed
        self.boards, self.moves = np.zeros((n, game.cells), np.int8), np.zeros(n, np.int64)
        self.begun = np.zeros(n, np.int64)  # games of each board so far

    def begin(self, i):
        """Put the next game on board i."""
        rng, board, moves = np.random.default_rng([self.seed, 4, i, self.begun[i]]), np.zeros_like(self.boards[i]), 0
        for _ in range(rng.integers(self.opening + 1)):
            after, _, done = self.game.step(board, rng.choice(np.flatnonzero(self.game.legal(board))))
            if done:
                break  # it begins before the move that would have ended it
            board, moves = after, moves + 1
        self.boards[i], self.moves[i], self.begun[i] = board, moves, self.begun[i] + 1

    def reset(self, **_):
        for i in range(self.n):
            self.begin(i)
        return self.game.observe(self.boards), {}

    def legal(self):
        return self.game.legal(self.boards)

    def step(self, actions):
        assert self.legal()[np.arange(self.n), actions].all(), "an illegal move was chosen"
        first = self.moves % 2 == 0  # the first player has just moved
        self.boards, reward, done = self.game.step(self.boards, actions)
        self.moves += 1
        final, infos = self.game.observe(self.boards), {}
        if done.any():
            outcome = np.where(first, reward, -reward)  # for the first player
            infos = {"final_obs": [{k: v[i] for k, v in final.items()} for i in range(self.n)]}
            infos["final_info"] = {"episode": {"r": outcome, "l": self.moves.copy()}}
            for i in np.flatnonzero(done):
                self.begin(i)
        return self.game.observe(self.boards), reward, done, np.zeros(self.n, bool), infos

    def close(self):
        pass


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


class AtariGame(gym.Wrapper):
    """Frame skip with the maximum of the last two frames, random no-ops, area resizing, and, if wanted, episodes of one
    life."""

    complete = True  # no further wrapper repeats actions or draws

    def __init__(self, env, repeat, size, grayscale, noop_max, episodic_life):
        super().__init__(env)
        self.repeat, self.size, self.grayscale, self.noop_max = repeat, size, grayscale, noop_max
        self.episodic_life, self.over, self.lives = episodic_life, True, 0
        self.observation_space = gym.spaces.Box(0, 255, (size, size, 1 if grayscale else 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        if self.episodic_life and not self.over and not (options or {}).get("full"):
            frame, _, terminated, truncated, info = self.env.step(0)  # the game goes on with the next life
            if not (terminated or truncated):
                self.lives = self.unwrapped.ale.lives()
                return self.picture(frame), info
        frame, info = self.env.reset(seed=seed)
        for _ in range(np.random.default_rng(seed).integers(self.noop_max + 1)):
            frame, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                frame, info = self.env.reset()
        self.over, self.lives = False, self.unwrapped.ale.lives()
        return self.picture(frame), info

    def step(self, action):
        total, frames = 0.0, []
        for _ in range(self.repeat):
            frame, reward, terminated, truncated, info = self.env.step(action)
            total, frames = total + float(reward), [*frames[-1:], frame]
            if terminated or truncated:
                break
        self.over, lives = terminated or truncated, self.unwrapped.ale.lives()
        terminated = terminated or (self.episodic_life and lives < self.lives)
        self.lives = lives
        return self.picture(np.max(frames, axis=0)), total, terminated, truncated, info

    def picture(self, frame):
        if self.grayscale:
            frame = (frame @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)[..., None]
        rows, columns = (area_weights(n, self.size) for n in frame.shape[:2])
        # NOTE: not Pillow's box filter, which takes whole pixels only: up to 32 grey levels off on Breakout's frames.
        image = np.tensordot(rows, np.tensordot(columns, frame.astype(np.float32), (1, 1)), (1, 1))  # (size, size, C)
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


def atari_game(args):
    # NOTE: the v5 ids skip frames by themselves and without max-pooling; the skip is ours, and it is the only one.
    settings = dict(repeat_action_probability=args.sticky_actions, full_action_space=args.full_action_space)
    env = registered_env(args, frameskip=1, **settings)
    settings = (args.action_repeat or 4, args.image_size, args.grayscale, args.noop_max, args.episodic_life)
    return AtariGame(env, *settings)


def no_control(args):
    raise ValueError("a tree search needs Discrete actions; DeepMind Control has Box actions")


# Environments that are not built by gymnasium.make alone.
FAMILIES = {"ALE": atari_game, "dm_control": no_control}


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


def agent_policy(model, device, args):
    """The search without noise, the most visited action, as a policy for play_episodes."""

    def policy(obs, first, state):
        searcher = state or Searcher(model, replace(args, compile=False), device, len(first), explore=False)
        searcher.see(obs, first, None if state is None else searcher.taken)
        searcher.taken = searcher.act()[0].cpu().numpy()
        return searcher.taken, searcher

    return policy


def whole_games(args):
    """Evaluation plays whole games with the environment's own rewards: EfficientZero's training limits are off."""
    limit = 27_000 if env_family(args) == "ALE" else args.max_episode_steps
    return replace(args, episodic_life=False, max_episode_steps=limit)


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


def play_match(game, player, opponent, games, seat, stop=None):
    """Outcomes for `player` (1 win, 0 draw, -1 loss) of `games` games in which it moves first (seat 0) or second.
    Players: boards (N, cells) -> actions (N,)."""
    boards, alive, outcome = np.zeros((games, game.cells), np.int8), np.ones(games, bool), np.zeros(games)
    for move in range(game.cells):
        if not alive.any() or (stop and stop.signum):
            break
        ours = move % 2 == seat
        live = np.flatnonzero(alive)
        actions = (player if ours else opponent)(boards[live])
        boards[live], reward, done = game.step(boards[live], actions)
        outcome[live] += reward if ours else -reward
        alive[live] = ~done
    return outcome


def board_policy(model, args, device):
    """The search without noise as a player: boards (N, cells) -> actions (N,)."""
    game = GAMES[args.env_id]

    def move(boards):
        searcher = Searcher(model, replace(args, compile=False), device, len(boards), explore=False)
        searcher.see(game.observe(boards), np.ones(len(boards), bool))
        return searcher.act(game.legal(boards))[0].cpu().numpy()

    return move


def play_matches(args, player, stop=None):
    """Outcomes against every opponent from both seats: {opponent: {"first": [...], "second": [...]}}."""
    game, out = GAMES[args.env_id], {}
    for name, make in OPPONENTS[args.env_id].items():
        opponent = make(game, np.random.default_rng([args.seed, 3]))
        out[name] = {
            s: play_match(game, player, opponent, args.eval_episodes, i, stop).tolist()
            for i, s in enumerate(("first", "second"))
        }
    return out


def match_lines(matches):
    for name, seats in matches.items():
        for seat, outcomes in seats.items():
            wins, draws, losses = (sum(x == v for x in outcomes) / len(outcomes) for v in (1, 0, -1))
            say(f"against {name}, moving {seat}: won {wins:.2f}, drawn {draws:.2f}, lost {losses:.2f}")


def evaluate_agent(model, args, device, video=None, stop=None):
    """Returns of the final evaluation, and more for result.json: board games, whose returns are outcomes against the
    first opponent from both seats, add all matches."""
    if args.env_id not in GAMES:
        policy = agent_policy(model, device, args)
        return play_episodes(whole_games(args), policy, args.eval_episodes, 1, video, stop), {}
    matches = play_matches(args, board_policy(model, args, device), stop)
    if not (stop and stop.signum):
        match_lines(matches)
    main = next(iter(matches.values()))
    not_lost = {k: float(np.mean([x >= 0 for s in v.values() for x in s])) for k, v in matches.items()}
    return [*main["first"], *main["second"]], {"matches": matches, "not_lost": not_lost}


def random_baseline(args, action_space, stop=None):
    """Returns of the same evaluation for random moves."""
    if args.env_id not in GAMES:
        return play_episodes(
            whole_games(args), random_policy(action_space, args.seed), args.eval_episodes, 2, stop=stop
        )
    game = GAMES[args.env_id]
    main = next(iter(play_matches(args, random_player(game, np.random.default_rng([args.seed, 2])), stop).values()))
    return [*main["first"], *main["second"]]


def foresight_frames(pictures, value, ahead):
    """An episode with its values below, up to each frame: white, of the true observation; coloured, as foreseen k steps
    before it (green, yellow, red: ever further ahead)."""
    curves = [*zip(ahead.values(), ((220, 60, 60), (220, 200, 60), (80, 200, 90))[::-1]), (value, (255, 255, 255))]
    numbers = [x for curve, _ in curves for x in curve]
    low, high, (height, width), frames = min(numbers), max(numbers), pictures[0].shape[:2], []
    strip = np.full((height // 2, width, 3), 24, np.uint8)
    for t, picture in enumerate(pictures):
        for curve, color in curves:
            y = (len(strip) - 3) * (high - curve[t]) / max(high - low, 1e-6)
            strip[int(y) : int(y) + 2, t * width // len(pictures)] = color
        frames.append(np.concatenate([picture, strip]))
    return frames


def foresight_ratios(errors):
    """["reward 5 steps ahead 0.12", ...] of `prediction_errors`; 1 is as good as a constant."""
    names = [k for k in errors if "_mse_" in k and errors[k.replace("mse", "variance")] > 0]
    ratio = lambda k: errors[k] / errors[k.replace("mse", "variance")]  # noqa: E731
    return ["{} {} steps ahead {:.2g}".format(*k.split("_mse_"), ratio(k)) for k in names]


@torch.no_grad()
def prediction_errors(model, args, device, key, n=8, length=200, horizons=(1, 5, 10)):
    """How far the model foresees, on fresh episodes of which the first half follow its own policy, the others random
    actions: squared errors of the rewards it predicts k steps ahead with the true actions, and of its values there
    (against those it sees in the true observation), each beside the variance, the error of a constant. After the end
    of an episode rewards are 0: whoever foresees ends foresees that. Also frames of the first episode
    (`foresight_frames`)."""
    envs, policy = make_envs(whole_games(args), n, key), agent_policy(model, device, args)
    state, first, rows, pictures, rng = None, np.ones(n, bool), [], [], np.random.default_rng(key)
    try:
        obs, _ = envs.reset()
        for _ in range(length):
            pictures.append(draw({k: v[0] for k, v in obs.items()}))
            actions, state = policy(obs, first, state)
            s = model.represent(state.obs, state.past)  # of all steps at once: too much memory with large stacks
            actions[n // 2 :] = rng.integers(model.actions, size=n - n // 2)  # the searcher sees these as its own
            obs, reward, terminated, truncated, _ = envs.step(actions)
            first = terminated | truncated
            told = (torch.as_tensor(x, device=device) for x in (actions.copy(), reward, terminated, truncated))
            rows.append((s, model.predict(s)[1], *told))
    finally:
        envs.close()
    far = max(horizons)
    T = length - far
    latents, *columns = zip(*rows, strict=True)
    true_value, actions, rewards, ends, cuts = (torch.stack(x) for x in columns)  # (length, n)
    s, out, foreseen = torch.cat(latents[:T]), {}, {}  # (T * n, ...)
    over, known = (torch.zeros(T, n, dtype=torch.bool, device=device) for _ in range(2))
    known[:] = True  # whether the truth is known: until a truncation, and for ever after an end

    def compare(name, k, guess, truth, where):
        guess, truth = guess[where].double(), truth[where].double()
        if len(truth):
            out[f"{name}_mse_{k}"] = float((guess - truth).square().mean())
            out[f"{name}_variance_{k}"] = float(truth.var(correction=0))

    for k in range(1, far + 1):
        here = slice(k - 1, k - 1 + T)
        s = model.dynamics(s, actions[here].flatten())
        if k in horizons:
            compare("reward", k, model.foretell(s).view(T, n), torch.where(over, 0.0, rewards[here]), known)
        over = over | (ends[here] & known)
        known = known & (over | ~cuts[here])
        if k in horizons:
            foreseen[k] = model.predict(s)[1].view(T, n)
            compare("value", k, foreseen[k], true_value[k : k + T], known & ~over)
    end = (ends | cuts)[:, 0]
    end = min(int(end.nonzero()[0]) + 1 if end.any() else length, T + min(horizons))  # as far as every curve goes
    ahead = {k: torch.cat([true_value[:k, 0], v[:, 0]])[:end].tolist() for k, v in foreseen.items()}
    return out, foresight_frames(pictures[:end], true_value[:end, 0].tolist(), ahead)


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
    state = load_checkpoint(path, "muzero")
    if state["random_return"] is None:
        fail(f"{path} was stopped before it began: go on with --resume {path}")
    actions = space_from(state["spaces"]["action"]).n
    model = MuZero(space_from(state["spaces"]["observation"]), int(actions), state["config"])
    model.load_state_dict(state["learner"]["model"])
    return model.to(device).eval(), state


class DreamEnv(gym.Env):
    """The learned world as an environment. `path`: run directory.

    NOTE: MuZero's model has no decoder and no notion of an end: the observation is the latent state as a flat vector,
    rewards are predicted, `info` has the predicted `value` and `policy`, and the end of an episode looks like a state
    without further reward or value. `absorbed`: terminate when both stay below this size (0: never). In board games
    the reward is the mover's, who changes with every step.

    reset(options={"observations": {key: (T, ...)}, "actions": (T, ...)}) starts after real observations from the
    beginning of an episode (action t follows observation t; the last one is not used); without options from context
    kept in the checkpoint."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}

    def __init__(self, path, render_mode="rgb_array", max_steps=1000, device="cpu", absorbed=0.0):
        self.model, state = load_agent(path, device)
        self.device, self.render_mode = torch.device(device), render_mode
        self.max_steps, self.absorbed = max_steps, absorbed
        self.space, self.context = space_from(state["spaces"]["observation"]), state["context"]
        self.stack = self.model.config["frame_stack"]
        blank = {k: np.zeros((1, self.stack, *s.shape), s.dtype) for k, s in self.space.items()}
        with torch.no_grad():
            s = self.model.represent(to_torch(blank, device), torch.full((1, self.stack), -1, device=device))
        self.observation_space = gym.spaces.Box(0, 1, (s[0].numel(),), np.float32)
        self.action_space = space_from(state["spaces"]["action"])

    @torch.no_grad()
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if options and "observations" in options:
            obs = options["observations"]
            obs = {"observation": obs} if not isinstance(obs, dict) else obs
            obs = {k: np.asarray(v, self.space[k].dtype) for k, v in obs.items()}
            T, actions = len(next(iter(obs.values()))), np.asarray(options.get("actions", ()), np.int64)
            if not T or any(v.shape != (T, *self.space[k].shape) for k, v in obs.items()) or len(actions) != T:
                found = {k: v.shape for k, v in obs.items()}
                raise ValueError(f"observations and actions must all have T > 0 entries, got {found}, {len(actions)}")
            rows = np.arange(T - self.stack, T)  # frames before the first one are copies of it
            obs = {k: torch.as_tensor(v[rows.clip(min=0)])[None] for k, v in obs.items()}
            past = torch.as_tensor(np.where(rows > 0, actions[rows - 1], -1))[None]
        else:
            if self.context is None:
                raise ValueError("this checkpoint was saved before any row was stored: pass options")
            i = int(self.np_random.integers(len(self.context["past"])))
            obs = {k[4:]: v[i : i + 1] for k, v in self.context.items() if k.startswith("obs/")}
            past = self.context["past"][i : i + 1]
        self.s, self.steps = self.model.represent(to_torch(obs, self.device), past.to(self.device)), 0
        return self.look()

    def look(self):
        logits, value = self.model.predict(self.s)
        policy = torch.softmax(logits[0], -1).cpu().numpy()
        return self.s[0].flatten().cpu().numpy(), {"value": float(value[0]), "policy": policy}

    @torch.no_grad()
    def step(self, action):
        self.s = self.model.dynamics(self.s, torch.as_tensor([int(action)], device=self.device))
        self.steps += 1
        reward = float(self.model.foretell(self.s)[0])
        obs, info = self.look()
        ended = abs(reward) < self.absorbed and abs(info["value"]) < self.absorbed
        return obs, reward, ended, self.steps >= self.max_steps, info

    def render(self):
        return draw({"latent": self.s[0].flatten().cpu().numpy() * 4 - 2}, 256)


# [optional: play
def play(args):
    """Board games: you against the search, which shows its visits. Else: one rendered episode as a GIF."""
    check_ranges(args, RANGES)
    model, _ = load_agent(args.play)
    if args.env_id not in GAMES:
        kwargs = json.loads(args.env_kwargs)
        if env_family(args) != "MinAtar":
            kwargs["render_mode"] = "rgb_array"
        path = os.path.join(args.play, "eval-play.gif")
        shown = replace(args, env_kwargs=json.dumps(kwargs), compile=False)
        returns = play_episodes(whole_games(shown), agent_policy(model, torch.device("cpu"), shown), 1, 4, path)
        return say(f"return {returns[0]:g}; wrote the episode to {path}")
    game, board = GAMES[args.env_id], np.zeros(GAMES[args.env_id].cells, np.int8)
    numbers = f"0 to {game.actions - 1}, " + ("cells row by row" if game is TicTacToe else "columns from the left")

    def ask(question):
        try:
            return input(question).strip()
        except EOFError:
            return ""

    say(f"you are O; moves are {numbers}; an empty line ends")
    mine, done = not ask("do you want to begin? (y/n) ").lower().startswith("y"), False  # mine: the agent's turn
    while not done:
        if mine:
            searcher = Searcher(model, replace(args, compile=False), torch.device("cpu"), 1, explore=False)
            searcher.see(game.observe(board[None]), np.ones(1, bool))
            actions, _, value, visits = searcher.act(game.legal(board[None]))
            action = int(actions[0])
            counts = " ".join(f"{a}:{int(v)}" for a, v in enumerate(visits[0]))
            say(f"X plays {action}; visits {counts}; expects {float(value[0]):+.2f}")
        else:
            word = ask("your move: ")
            if not word:
                return None
            if not word.isdecimal() or int(word) >= game.actions or not game.legal(board)[int(word)]:
                say(f"not a legal move: {word}")
                continue
            action = int(word)
        board, reward, done = game.step(board, action)
        say(game.draw(-board if mine else board))  # the board is seen by whoever moves next
        mine = not mine
    return say(("you win" if mine else "X wins") if reward else "a draw")


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


def check_args(args):
    """Everything that can be said before an environment is built."""
    check_ranges(args, RANGES)
    game = GAMES.get(args.env_id)
    least = args.num_envs * (args.unroll_steps + args.frame_stack + 2)
    starts = f"--learning-starts {args.learning_starts}"
    for wrong, message in [
        (args.total_timesteps <= args.learning_starts, f"--total-timesteps {args.total_timesteps} must be more than "
         f"{starts}: nothing would be trained"),
        (args.buffer_size < least, f"--buffer-size {args.buffer_size} is less than --num-envs x (--unroll-steps + "
         f"--frame-stack + 2) = {least}"),
        (re.search(r"[/\\\0]", args.exp_name), f"--exp-name must not contain a slash, got {args.exp_name!r}"),
        (args.td_steps == 0 and not game, "--td-steps 0 (to the end of the game) is for board games; this is "
         f"--env-id {args.env_id}"),
        (args.temperature_moves is not None and not game, f"--temperature-moves is for board games; this is --env-id "
         f"{args.env_id}"),
        (args.random_opening and not game, f"--random-opening is for board games; this is --env-id {args.env_id}"),
        (args.support == 0 and not game, f"--support 0 (values in [-1, 1]) is for board games; this is --env-id "
         f"{args.env_id}"),
        (args.q_norm == "bounds" and not game, f"--q-norm bounds is for board games; this is --env-id {args.env_id}"),
        (game and args.pixels, f"--pixels is not for board games; this is --env-id {args.env_id}"),
        (game and args.capture_video, f"--capture-video is not for board games; this is --env-id {args.env_id}"),
        (game and args.frame_stack > 1, f"--frame-stack must be 1 for --env-id {args.env_id}, got {args.frame_stack}"),
        (game and args.gamma != 1, f"--gamma must be 1 for --env-id {args.env_id}, got {args.gamma}"),
    ]:  # fmt: skip
        if wrong:
            fail(message)
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
    if args.env_id in GAMES:
        game = GAMES[args.env_id]
        box = gym.spaces.Box(-np.inf, np.inf, (2 * game.cells,), np.float32)
        return gym.spaces.Dict(observation=box), gym.spaces.Discrete(game.actions)
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
        fail(f"{flag}: a tree search needs Discrete actions, found {action_space}")
    images, network = [k for k, s in obs_space.items() if len(s.shape) == 3], args.network
    network = "paper" if network == "auto" and images else network
    if images and len(obs_space) > 1:
        fail(f"{flag}: observations must be one image or any number of vectors, found the keys {sorted(obs_space)}")
    if images and args.network == "mlp" or not images and args.network in ("paper", "efficientzero"):
        fail(f"--network {args.network} does not fit {flag}: it observes {'images' if images else 'vectors'}")
    if not images and args.network == "conv" and family != "MinAtar":
        fail(f"--network conv does not fit {flag}: it observes vectors")
    if images and args.network != "conv" and args.image_size % 16:
        fail(f"--image-size must be a multiple of 16 for --network {network}, got {args.image_size}")
    if not limited:
        say(f"warning: {args.env_id} has no time limit; evaluation stops after 27000 steps (set --max-episode-steps)")
    return obs_space, action_space


def evaluate_run(args):
    """--evaluate RUN: returns of fresh episodes, or matches, of a trained agent. Writes only RUN/eval-*."""
    check_ranges(args, RANGES)
    state = load_checkpoint(args.evaluate, "muzero")
    for found, name in zip(probe_env(args), ("observation", "action"), strict=True):
        if space_to(found) != state["spaces"][name]:
            trained = space_from(state["spaces"][name])
            fail(f"--env-id {args.env_id} has the {name} space {found}, {args.evaluate} was trained on {trained}")
    model, state = load_agent(args.evaluate)
    device = choose_device(args)
    seed_everything(args, device)
    video = os.path.join(args.evaluate, "eval-episode.gif") if args.capture_video else None
    returns, more = evaluate_agent(model.to(device), args, device, video)
    score, std, random_return = float(np.mean(returns)), float(np.std(returns)), state["random_return"]
    result = dict(episodic_return=score, std=std, returns=returns, random_return=random_return, **more)
    result |= dict(global_step=state["global_step"], num_simulations=args.num_simulations)
    write_json(result, os.path.join(args.evaluate, f"eval-{state['global_step']}.json"))
    say(f"returns of {len(returns)} episodes: " + " ".join(f"{r:g}" for r in returns))
    finish(args, score, random_return, f" +- {std:.1f}")
    return result


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
    """The whole algorithm: search and act in all environments, store, learn from unrolled replay, repeat. Returns the
    metrics."""
    # Set up, in an order that finds every mistake of the user's before the first file is made.
    check_args(args)
    state = None
    if args.resume:
        for name, value in load_args(args.resume).items():
            if name not in CHANGEABLE and getattr(args, name, value) != value:
                flag = "--" + name.replace("_", "-")
                fail(f"{flag} is {value} in {args.resume}, got {getattr(args, name)}: a run cannot change it")
        state, result = load_checkpoint(args.resume, "muzero"), os.path.join(args.resume, "result.json")
        if state["global_step"] >= args.total_timesteps and os.path.exists(result):
            say(f"nothing to do: step {state['global_step']} of {args.total_timesteps}")
            with open(result, encoding="utf-8") as f:
                return json.load(f)
        lock = lock_run(args.resume)
        state = load_checkpoint(args.resume, "muzero", repair=True)  # nobody else writes from here on
    obs_space, action_space = probe_env(args)
    device, game = choose_device(args), GAMES.get(args.env_id)
    N, A, config = args.num_envs, int(action_space.n), network_config(args, obs_space)
    specs = TrajectoryReplay.specs(obs_space, A, config)
    # Rows per environment. A run can fill two per agent step: an episode's end takes one more.
    capacity = -(-min(args.buffer_size, 2 * args.total_timesteps + 2 * N) // N)
    capacity = max(capacity, args.unroll_steps + args.frame_stack + 2, game.cells + 2 if game else 0)
    size = N * capacity * TrajectoryReplay.row_bytes(specs) / 1e9
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
    envs = BoardEnvs(game, N, args.random_opening, args.seed) if game else make_envs(args, N)
    with torch.device(device):
        model = MuZero(obs_space, A, config)
    model.eval()
    if device.type == "cuda" and config["network"] != "mlp":
        model.bf16 = args.bf16
        model.to(memory_format=torch.channels_last)  # the layout of bfloat16 convolutions
    learner, searcher = MuZeroLearner(model, args, device), Searcher(model, args, device, N)
    replay = TrajectoryReplay(capacity, N, specs, args, A, store)
    parts = ", ".join(f"{n} {count_params(getattr(model, n)):,}" for n in "h g f policy value reward".split())
    say(f"run: {run}\nparameters: {count_params(model):,} ({parts})")
    say(f"replay: {N} x {capacity:,} rows, {size:.2f} GB on {store}; {1 / args.train_ratio:g} agent steps per update")
    # NOTE: the outcome of self-play for whoever moves first says nothing about strength: it must not pass for a return.
    return_tag = "self_play_outcome" if game else "episodic_return"
    # due: updates before the next action (None: act first); owed: fractions of updates carried over; history: actions
    # since all environments were reset; marks: their episode numbers then.
    global_step, updates, due, owed, random_return, learning_starts = 0, 0, None, 0.0, None, args.learning_starts
    recent, metrics, history = deque(maxlen=100), {}, []
    everyone = np.arange(N)

    def numbers():
        return envs.begun.tolist() if game else [e.env.episode for e in envs.envs]

    def fresh():
        """Start new episodes everywhere: observations, is_first, rewards, episode numbers before it."""
        marks, first = numbers(), np.ones(N, bool)
        options = {"full": True} if args.episodic_life and env_family(args) == "ALE" else None
        obs = envs.reset(options=options)[0]
        searcher.see(obs, first)
        return obs, first, np.zeros(N), marks

    def move(actions):
        """One step of all environments: observations, rewards to learn from, flags, infos; the searcher looks on."""
        obs, reward, terminated, truncated, infos = envs.step(actions)
        reward = np.sign(reward) if args.clip_rewards else reward
        before = dict(searcher.obs), searcher.past
        searcher.see(obs, terminated | truncated, actions)
        return obs, reward, terminated, truncated, infos, before

    if state:
        learner.load_state_dict(state["learner"])
        if state["replay"]:
            replay.load_state_dict(state["replay"])
        else:
            say("warning: this run was saved without its replay (--no-save-replay): it is collected anew")
            learning_starts += state["global_step"]
        global_step, updates, random_return = state["global_step"], state["updates"], state["random_return"]
        recent.extend(state["recent"])
        if game:
            envs.begun[:] = state["episodes"]
        else:
            for env, episode in zip(envs.envs, state["episodes"], strict=True):
                env.env.episode = episode
        say(f"resumed at step {global_step} of {args.total_timesteps}, update {updates}")
    if random_return is None:
        returns = random_baseline(args, action_space, stop)
        random_return = None if stop.signum else float(np.mean(returns))
        say(f"random policy: {np.mean(returns):.1f} +- {np.std(returns):.1f} over {len(returns)} episodes")
    # [optional: compile
    if args.compile:
        compile_networks(model, learner)
    # compile]

    obs, is_first, reward, marks = fresh()
    if state:
        # Stopped by a signal between two scheduled checkpoints: the same actions from the same resets lead back to
        # where the environments were, so that the run goes on as if it had not been stopped.
        for actions in state["history"].numpy():
            history.append(actions)
            obs, reward, terminated, truncated, *_ = move(actions)
            is_first = terminated | truncated
            reward = np.where(is_first, 0.0, reward)
        if state["replay"]:
            due, owed, metrics = state["due"], state["owed"], state["metrics"]
        if any(not np.array_equal(v, state["obs"][k].numpy()) for k, v in obs.items()) and history:
            say(f"warning: {args.env_id} does not repeat itself; its unfinished episodes are cut")
            replay.truncate()
            history, (obs, is_first, reward, marks) = [], fresh()
        set_rng_state(state["rng"])

    def save():
        context = None
        if replay.drawable:  # a few real situations for dreams to start from
            backup = replay.rng.get_state()
            _, env, row = replay.draw(8)
            replay.rng.set_state(backup)
            seen, past = replay.windows(env, row)
            context = {f"obs/{k}": v.cpu() for k, v in seen.items()} | {"past": past.cpu()}
        spaces = {"observation": space_to(obs_space), "action": space_to(action_space)}
        plain = dict(script="muzero", args=asdict(args), config=config, spaces=spaces, context=context)
        plain |= dict(global_step=global_step, updates=updates, random_return=random_return, recent=list(recent))
        plain |= dict(due=due, owed=owed, episodes=marks, rng=rng_state())
        plain |= dict(metrics={k: float(v) for k, v in metrics.items()})
        acted = np.stack(history) if history else np.zeros((0, N), np.int64)
        plain |= dict(history=torch.as_tensor(acted), obs={k: torch.as_tensor(v) for k, v in obs.items()})
        plain |= dict(learner=learner.state_dict(), replay=replay.state_dict() if args.save_replay else None)
        atomic_save(plain, os.path.join(run, "ckpt.pt"))

    def last_rows(obs, reward, terminal, value):
        """Rows that end an episode: without action and policy."""
        n = len(reward)
        rows = dict(action=np.zeros(n, np.int64), policy=np.zeros((n, A), np.float32), value=value)
        rows |= dict(reward=reward, is_first=np.zeros(n, bool), is_last=np.ones(n, bool), is_terminal=terminal)
        return rows | {f"obs/{k}": v for k, v in obs.items()}

    def stopped():
        """Leave after a stop signal, when the checkpoint is written."""
        logger.close()
        again = f"python {shlex.quote(sys.argv[0])} --resume {shlex.quote(run)}"
        say(f"stopped by signal {stop.signum} at step {global_step}; to go on: {again}")
        raise SystemExit(128 + stop.signum)

    if stop.signum:
        save()
        stopped()
    start, act_seconds, update_seconds = (time.time(), global_step, updates), 0.0, 0.0
    mark, clock = start, time.process_time if device.type == "cpu" else time.time
    while global_step < args.total_timesteps or due is not None:
        # Act: search from every environment's observation, take one step, store what was seen, done and concluded.
        if due is None:
            began = clock()
            heat = visit_softmax_temperature(global_step, args.total_timesteps) if args.temperature_decay else 1.0
            if args.temperature_moves is not None:
                played = np.where(is_first, 0, replay.count - replay.begun)
                heat = np.where(played < args.temperature_moves, heat, 0.0)
            action, policy, value, _ = searcher.act(envs.legal() if game else None, heat)
            actions = action.cpu().numpy()
            rows = dict(reward=reward, is_first=is_first, is_last=np.zeros(N, bool), is_terminal=np.zeros(N, bool))
            rows |= dict(action=action, policy=policy, value=value) | {f"obs/{k}": v for k, v in obs.items()}
            replay.add(everyone, rows)
            act_seconds += clock() - began
            history.append(actions)
            obs, reward, terminated, truncated, infos, before = move(actions)
            global_step += N
            is_first = terminated | truncated
            if is_first.any():
                # NOTE: an episode's last observation is a row of its own; only `terminated` makes it terminal. After a
                # truncation the return goes on: its estimate is the network's value of that observation.
                ended, final = np.flatnonzero(is_first), infos["final_obs"]
                last = {k: np.stack([final[i][k] for i in ended]) for k in obs}
                values = np.zeros(len(ended), np.float32)
                if truncated.any():
                    values = searcher.value_after(before, ended, last, actions) * ~terminated[ended]
                replay.add(ended, last_rows(last, reward[ended], terminated[ended], values))
                episodes = infos["final_info"]["episode"]
                for i in ended:
                    recent.append(float(episodes["r"][i]))
                    tags = {f"charts/{return_tag}": recent[-1], "charts/episodic_length": int(episodes["l"][i])}
                    logger.scalars(tags, global_step)
            reward = np.where(is_first, 0.0, reward)
            due = 0
            if global_step >= learning_starts and replay.drawable:
                owed += N * args.train_ratio
                due, owed = int(owed), owed - int(owed)

        # Learn: unroll the model from replayed rows.
        began = clock()
        while due and not stop.signum:
            batch, index = replay.sample(args.batch_size, learner, min(1.0, global_step / args.total_timesteps))
            try:
                metrics, values = learner.update(to_torch(batch, device))
            except torch.cuda.OutOfMemoryError:
                where, hint = f"step {global_step} (batch {args.batch_size})", "--batch-size or --unroll-steps"
                raise SystemExit(f"out of GPU memory at {where}: lower {hint}") from None
            if args.per_alpha:
                replay.refresh(index, values.to(store) - batch["z"][:, 0])
            updates, due = updates + 1, due - 1
            if device.type == "cpu":  # on a GPU this would wait for the device: there, when metrics are read
                learner.check(f"step {global_step}, update {updates}")
        update_seconds += clock() - began
        if stop.signum:
            learner.check(f"step {global_step}, update {updates}")
            save()
            stopped()
        due = None

        # Log, measure predictions on fresh episodes, save. Metrics are read here only: reading waits for the device.
        ending = global_step >= args.total_timesteps
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
            say(f"global_step={global_step}, {return_tag}={shown}, {pace}")
        if passed(args.report_every, global_step, N) and not game:
            with uncompiled(args):
                errors, frames = prediction_errors(model, args, device, 1000 + global_step)
            logger.scalars({f"eval/{k}": v for k, v in errors.items()}, global_step)
            path = os.path.join(run, "videos", f"foresight-{global_step}.gif")
            logger.video("eval/foresight", frames, global_step, path)
        if passed(args.save_every, global_step, N) or ending:
            learner.check(f"step {global_step}, update {updates}")
            # NOTE: unfinished episodes end at scheduled checkpoints as truncated ones, interrupted or not: that is what
            # makes a resumed run repeat the unbroken one.
            cut = np.flatnonzero(~is_first)
            rows = last_rows({k: v[cut] for k, v in obs.items()}, reward[cut], is_first[cut], searcher.value()[cut])
            replay.add(cut, rows)
            history, marks = [], numbers()
            save()
            if stop.signum:
                stopped()
            obs, is_first, reward, marks = fresh()
    envs.close()

    # Final evaluation on fresh episodes, and the self-check against --target-return.
    seconds, steps, count = (a - b for a, b in zip((time.time() + 1e-9, global_step, updates), start, strict=True))
    pace = f"{steps / seconds:.0f} agent steps/s, {count / seconds:.2f} updates/s"
    kind = "CPU " if device.type == "cpu" else ""
    say(f"{seconds / 60:.1f} minutes, {pace}; {kind}seconds: search {act_seconds:.1f}, updates {update_seconds:.1f}")
    video = os.path.join(run, "videos", "episode.gif") if args.capture_video and not game else None
    with uncompiled(args):
        returns, more = evaluate_agent(model, args, device, video, stop)
        if not (game or stop.signum):
            more["prediction_errors"], _ = prediction_errors(model, args, device, 1000 + global_step)
    if stop.signum:
        stopped()
    if "prediction_errors" in more:
        say("error / variance: " + ", ".join(foresight_ratios(more["prediction_errors"])))
    score, std = float(np.mean(returns)), float(np.std(returns))
    logger.scalars({"eval/episodic_return": score, "eval/episodic_return_std": std}, global_step)
    logger.close()
    result = dict(episodic_return=score, episodic_return_std=std, returns=returns, random_return=random_return)
    result |= dict(global_step=global_step, updates=updates, minutes=seconds / 60, run=run, **more)
    result |= dict(peak_memory_gb=peak_memory(device))
    result |= dict(train_return=float(np.mean(list(recent)[-10:])) if recent else None)
    write_json(result, os.path.join(run, "result.json"))
    finish(args, score, random_return)
    return result


if __name__ == "__main__":
    main(parse_args(Args, PRESETS, __doc__.split("\n\n    python")[0]))
