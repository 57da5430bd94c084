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
    python muzero.py --preset cpu --env-id my_module:MyEnv-v0   # your environment, on a laptop
    python muzero.py --preset cpu_tictactoe                     # tic-tac-toe by self-play, minutes
    python muzero.py --preset atari100k --env-id ALE/Pong-v5    # EfficientZero's size and budget; more: see PRESETS
    python muzero.py --search gumbel --num-simulations 8        # Gumbel MuZero: few simulations are enough
    python muzero.py --resume runs/NAME                         # go on, bit for bit on a CPU

Deviations, each with its reason (more: docs/muzero.md):
  * One process: a lockstep search over N environments, one environment step each, then the updates that are due.
  * The root counts its own evaluation as a visit, so the first simulation follows the prior; ties: lowest action.
  * Q is normalised among a node's value and its visited children (`--q-norm siblings`). The paper's range over the
    whole tree is `--q-norm tree`, slower; board games have known bounds.
  * Two players: states are seen from the player to move and the search discounts by -gamma; nothing else changes.
  * Board games predict the reward of the winning move, and value 0 after the end, instead of the outcome for ever.
  * A truncated episode bootstraps from the network's value of its true last observation; the paper has no such case.
  * New rows are replayed with the highest priority so far, then with |predicted value - target| (EfficientZero).
  * EfficientZero's value prefix (an LSTM) and its shortened n for old data are left out; latents are scaled there too.
  * Reanalyse searches without noise, at update time; its values come from a target network.

Symbols in shape comments:
  B  batch (trees, replayed rows)      A  actions                      s  latent state, any shape after B
  N  environments                      S  simulations per search       D  longest path in the trees so far
  K  unrolled steps                    n  steps of a value target      M  nodes of all trees: B * (S + 2)
  F  stacked frames                    Z  atoms of a categorical head  P  nodes of all trees' newest paths
Time: row t holds observation t, the reward that came WITH it, its flags, and the action taken AFTER seeing it together
with the search's policy and value for observation t. An episode's last observation has a row without an action.
"""

import copy
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
from dataclasses import asdict, dataclass, replace
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
Preset = Literal["full", "cpu", "cpu_tictactoe", "atari100k", "reanalyse", "minatar", "connect4"]


@dataclass
class Args:
    # Experiment
    env_id: str = "ALE/MsPacman-v5"  # any gymnasium id with Discrete actions, my_module:MyEnv-v0, TicTacToe, Connect4
    preset: Preset = "full"  # named settings, see the commands above; explicit flags win over them
    total_timesteps: int = 50_000_000  # agent steps (moves) over all environments; 200M frames, those of Reanalyse
    seed: int = 1  # seed of everything random: networks, noise, replay, environments
    resume: Optional[str] = None  # run directory to continue
    target_return: Optional[float] = None  # exit with code 1 if the final evaluation stays below this
    cuda: bool = True  # use the GPU if there is one
    compile: bool = True  # on a GPU: compile the networks, searches and updates as CUDA graphs
    bf16: bool = True  # convolutions in bfloat16 on a GPU (heads, losses, statistics stay float32)
    num_threads: Optional[int] = None  # CPU threads (None: torch's own choice)
    exp_name: str = "muzero"  # part of the run directory's name
    torch_deterministic: bool = True  # deterministic kernels
    track: Optional[str] = None  # project of Weights and Biases that gets the curves too (needs wandb)
    log_every: int = 10_000  # agent steps between log lines
    save_every: int = 100_000  # agent steps between checkpoints
    eval_episodes: int = 10  # episodes of the final evaluation and of the random baseline
    # Environment
    num_envs: int = 256  # environments in lockstep, each with its own tree
    env_kwargs: str = "{}"  # JSON object passed to gymnasium.make; Atari: all 18 actions, not sticky, unless it says so
    action_repeat: Optional[int] = None  # environment steps per agent step (None: 4 for Atari, else 1)
    max_episode_steps: Optional[int] = None  # agent steps after which an episode is truncated (None: the environment's)
    pixels: bool = False  # observe rendered images instead of the environment's own observation
    image_size: int = 96  # images are resized to this many pixels per side
    grayscale: bool = False  # Atari in grey instead of RGB
    clip_rewards: bool = False  # train on the sign of the reward (EfficientZero)
    episodic_life: bool = False  # Atari: a lost life ends a training episode, the game goes on (EfficientZero)
    frame_stack: int = 32  # F, observations the network sees at once (paper: 32 for Atari, 1 elsewhere: see presets)
    action_planes: bool = True  # images: also show the last F actions, one constant plane each (app. E)
    random_opening: int = 0  # board games: self-play begins after 0 to this many random moves (paper: none)
    # World model
    network: Literal["auto", "mlp", "conv", "efficientzero", "paper"] = "auto"  # auto: paper for images, else mlp
    channels: Optional[int] = None  # planes of the convolutions (None: paper 256, efficientzero 64, conv 32)
    blocks: Optional[int] = None  # residual blocks of h and of g (None: paper 16, else 1)
    hidden: int = 128  # units of the MLPs
    latent: int = 64  # numbers of the MLPs' latent state
    dyn_layers: int = 1  # hidden layers of the MLP g
    support: int = 300  # value, reward: categorical over the integers -support..support of h(x) (app. F); 0: a number
    unroll_steps: int = 5  # K, unrolled steps (app. G)
    # Search
    search: Literal["puct", "gumbel"] = "puct"  # the paper's pUCT, or Gumbel MuZero's sequential halving
    num_simulations: int = 50  # S, simulations per move
    q_norm: Literal["siblings", "tree", "bounds"] = "siblings"  # range to which pUCT scales Q; bounds: (-1, 1)
    max_considered_actions: int = 16  # actions that a Gumbel root considers
    gumbel_scale: float = 0.1  # c_scale of the Gumbel search's sigma (0.1 with rescaled Q)
    gamma: float = 0.997  # discount per agent step
    td_steps: int = 10  # n, rewards in a value target before it bootstraps (0, board games: to the end of the game)
    dirichlet_alpha: float = 0.25  # concentration of the root noise
    dirichlet_fraction: float = 0.25  # share of the noise in the root prior
    temperature_decay: bool = True  # temperature 1, 0.5, 0.25 from 0, 50, 75 % of the run (app. D); off: always 1
    temperature_moves: Optional[int] = None  # moves with that temperature, then the most visited one (None: all)
    # Learning
    buffer_size: int = 1_000_000  # replay capacity in rows, over all environments (the paper's 25M frames are 691 GB)
    learning_starts: int = 10_000  # agent steps before the first update
    train_ratio: float = 0.02  # updates per agent step (paper: 1M on 20 billion frames; Reanalyse: on 200M, 0.02)
    batch_size: int = 1024  # B, rows that an update unrolls from
    optimizer: Literal["sgd", "adamw"] = "sgd"  # SGD with momentum 0.9 and L2 (paper), or AdamW (small networks)
    learning_rate: float = 0.05  # at the start (app. G)
    lr_decay: float = 0.1  # factor on the learning rate every --lr-decay-updates
    lr_decay_updates: float = 350e3  # updates per factor --lr-decay
    lr_steps: bool = False  # the learning rate falls in steps (EfficientZero) instead of exponentially
    warmup_updates: int = 0  # linear warm-up of the learning rate (EfficientZero: 1 % of the updates)
    weight_decay: float = 1e-4  # L2 (SGD), decoupled (AdamW)
    max_grad_norm: float = 1e9  # clip the global gradient norm (EfficientZero: 5)
    value_scale: float = 1.0  # weight of the value loss (Reanalyse: 0.25)
    per_alpha: float = 1.0  # exponent of replay priorities (app. G); 0: uniform
    per_beta: float = 1.0  # exponent of the importance weights at the start
    per_beta_end: float = 1.0  # the same at the end of the run, linearly in between (EfficientZero: from 0.4 to 1)
    reanalyse: float = 0.0  # share of a batch searched anew (app. H: 0.8); above 0 values come from a target network
    target_updates: int = 200  # updates between copies into that target network
    consistency_scale: float = 0.0  # weight of EfficientZero's consistency loss (its value: 2)
    augment: bool = False  # images: random shifts of 4 pixels and 5 % of intensity in updates (EfficientZero)


ADAMW = dict(optimizer="adamw", max_grad_norm=5.0, value_scale=0.25, per_alpha=0.0)
# What every board game shares: outcome targets, known bounds, no categorical heads, uniform replay.
# NOTE: outcomes are noisy targets, and what they do to the shared latent keeps the reward head from learning what wins:
# after 5,750 updates on random games it knew 72 % of the winning moves with --value-scale 1, 92 % without value loss.
# And without random openings self-play visits a sixth of all positions. Not lost to a perfect player, seed 2: 8 % with
# neither, 55 % with --value-scale 0.25, 48 % with random openings, 92 % with both.
BOARD = dict(
    frame_stack=1, support=0, gamma=1.0, td_steps=0, q_norm="bounds", temperature_decay=False, action_planes=False,
    random_opening=4)
# NOTE: without the consistency loss CartPole's latents say little of what moves slowly: two of four seeds let the cart
# drift away after 170 to 390 steps.
CPU = ADAMW | dict(
    env_id="CartPole-v1", total_timesteps=10_000, num_envs=16, frame_stack=1, support=20, num_simulations=16,
    td_steps=50, buffer_size=20_000, learning_starts=500, train_ratio=0.25, batch_size=128, learning_rate=3e-3,
    lr_decay_updates=2_400, consistency_scale=2.0, num_threads=1, log_every=400, save_every=5_000, image_size=16,
    action_planes=False)
PRESETS = dict(
    full=dict(),  # the paper's Atari networks and settings with Reanalyse's frames: 200M, 1M updates
    cpu=CPU,  # a laptop: MLPs of 63 thousand parameters
    cpu_tictactoe=CPU | BOARD | dict(
        env_id="TicTacToe", total_timesteps=48_000, num_envs=32, num_simulations=25, unroll_steps=3, dyn_layers=2,
        buffer_size=24_000, learning_starts=2_000, train_ratio=0.125, lr_decay_updates=5_750, consistency_scale=0.0,
        dirichlet_alpha=0.5, eval_episodes=100, log_every=2_000, save_every=24_000),
    # EfficientZero (2111.00210v2) without its value prefix: 100k agent steps, 120k updates.
    atari100k=dict(
        env_id="ALE/Pong-v5", env_kwargs='{"full_action_space": false}', total_timesteps=100_000, num_envs=4,
        network="efficientzero", frame_stack=4, action_planes=False, clip_rewards=True, episodic_life=True,
        max_episode_steps=3_000, gamma=0.997**4, td_steps=5, dirichlet_alpha=0.3, buffer_size=110_000,
        learning_starts=2_000, train_ratio=1.2, batch_size=256, learning_rate=0.2, lr_decay_updates=1e5, lr_steps=True,
        warmup_updates=1_000, max_grad_norm=5.0, value_scale=0.25, per_alpha=0.6, per_beta=0.4, reanalyse=1.0,
        consistency_scale=2.0, augment=True, eval_episodes=32, log_every=1_000, save_every=20_000),
    reanalyse=dict(td_steps=5, value_scale=0.25, reanalyse=0.8),  # MuZero Reanalyse (app. H)
    minatar=ADAMW | dict(
        env_id="MinAtar/Breakout-v1", network="conv", total_timesteps=1_000_000, num_envs=64, frame_stack=1, support=20,
        search="gumbel", num_simulations=8, td_steps=5, buffer_size=500_000, learning_starts=2_000, train_ratio=0.1,
        batch_size=256, learning_rate=2e-3, lr_decay_updates=1e5, gamma=0.99, log_every=5_000),
    connect4=ADAMW | BOARD | dict(
        env_id="Connect4", network="conv", channels=64, blocks=3, total_timesteps=1_000_000, num_envs=128,
        search="gumbel", num_simulations=32, buffer_size=500_000, learning_starts=5_000, train_ratio=0.05,
        batch_size=512, learning_rate=2e-3, lr_decay_updates=5e4, eval_episodes=100, log_every=5_000),
)
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
    return q_norm + prior * exploration(N.unsqueeze(-1) if N.dim() else N, c1, c2) / (1 + visits)


def exploration(N, c1=1.25, c2=19652):
    """Eq. 2's factor of a node that was visited N times."""
    return N.sqrt() * (c1 + ((N + c2 + 1) / c2).log())


def library(x):
    """numpy or torch. A search on a CPU uses numpy, whose calls cost a fifth of torch's on arrays this small."""
    return torch if torch.is_tensor(x) else np


def qtransform_by_parent_and_siblings(q, visits, node_value):
    """Q (..., A) scaled to [0, 1] by the range of the node's own value (...) and its visited children's; unvisited
    children get 0."""
    xp, seen, value = library(q), visits > 0, node_value[..., None]
    near = xp.where(seen, q, value)
    low, high = (f(near, -1, keepdims=True) for f in (xp.amin, xp.amax))
    low, high = xp.minimum(low, value), xp.maximum(high, value)
    return xp.where(seen, (q - low) / (high - low).clip(min=1e-8), 0)


def complete_by_mix_value(q, visits, prior, raw_value, value_scale=0.1, maxvisit_init=50):
    """sigma of Gumbel MuZero: completed Q, rescaled to [0, 1] per node, times (c_visit + max n) c_scale: (..., A).
    Unvisited children are completed by a mix of the node's network value and its visited children's Q."""
    xp, seen = library(q), visits > 0
    total, mass = visits.sum(-1), (prior * seen).sum(-1)
    mean_q = (prior * q * seen).sum(-1) / mass.clip(min=xp.finfo(q.dtype).tiny)
    completed = xp.where(seen, q, ((raw_value + total * mean_q) / (1 + total))[..., None])
    low, high, most = (
        f(x, -1, keepdims=True) for f, x in ((xp.amin, completed), (xp.amax, completed), (xp.amax, visits))
    )
    return (maxvisit_init + most) * value_scale * ((completed - low) / (high - low).clip(min=1e-8))


def qtransform_completed_by_mix_value(q, visits, prior_logits, raw_value, value_scale=0.1, maxvisit_init=50):
    """`complete_by_mix_value` for the prior's logits (..., A)."""
    prior = torch.softmax(prior_logits, -1)
    return complete_by_mix_value(q, visits, prior, raw_value, value_scale, maxvisit_init)


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

    On a CPU the arrays are numpy's and cropped to the nodes that there are; `static`: torch's, and all shapes stay as
    they are in the deepest case, as a CUDA graph needs it. The text is the same for both."""

    static = False

    def __init__(self, prior_logits, value, latent, simulations, discount, invalid=None, q_norm="siblings", gumbel=None,
                 considered=16, gumbel_scale=0.1, c1=1.25, c2=19652):  # fmt: skip
        (B, A), dtype, device, size = prior_logits.shape, value.dtype, value.device, simulations + 2
        self.static = Trees.static or device.type != "cpu"
        self.own = (lambda x: x) if self.static else lambda x: x.numpy()
        self.xp, self.dtype = (torch if self.static else np), dtype
        self.B, self.A, self.S, self.discount, self.q_norm = B, A, simulations, discount, q_norm
        zeros = lambda *n, kind=dtype: self.own(torch.zeros(B, size, *n, dtype=kind, device=device))  # noqa: E731
        # Per edge: (prior, visits, Q), actions first: a CPU then adds and compares along the long axis; the child.
        self.edges = self.own(torch.zeros(3, A, B, size, dtype=dtype, device=device))
        self.child = zeros(A, kind=torch.long) - 1
        # Per node: mean value, visits, reward on entering it, its network value, logits; depth, the action into it.
        self.value, self.count, self.reward, self.raw = (zeros() for _ in range(4))
        self.depth, self.via, self.best, self.leaf = (zeros(kind=torch.long) for _ in range(4))
        self.logits, self.latents = zeros(A), latent.new_zeros(B, size, *latent.shape[1:])
        index = torch.arange(B * size, device=device).view(B, size)
        self.root, self.trash, self.trees = (self.own(x) for x in (index[:, 0], index[:, -1:], index[:, 0] // size))
        self.path = self.own(index[:, -1:, None].repeat(1, size, size))  # (B, S+2, S+2) nodes from the root to each
        self.path[:, 0, 0], self.leaf[:, 0] = self.root, self.root
        lag = torch.arange(size, device=device)[:, None] - torch.arange(size, device=device)
        self.powers = self.own(torch.where(lag >= 0, torch.pow(float(discount), lag.clamp(min=0).to(dtype)), 0))
        self.bonus = self.own(exploration(torch.arange(size + 1, device=device).to(dtype), c1, c2))
        logits = prior_logits.to(dtype) if invalid is None else prior_logits.to(dtype).masked_fill(invalid, -math.inf)
        # NOTE: the root's own evaluation counts as a visit: else the first simulation ignores the prior.
        self.latents[:, 0], self.logits[:, 0], self.edges[0, :, :, 0] = latent, self.own(logits), self.softmax(logits).T
        self.value[:, 0] = self.raw[:, 0] = self.own(value)
        self.count[:, 0] = 1
        self.invalid = None if invalid is None else self.own(invalid)
        self.gumbel, self.gumbel_scale = gumbel, gumbel_scale
        if gumbel is not None:
            self.gumbel = self.own(gumbel + logits - logits.amax(-1, keepdim=True))
            legal = torch.full((B,), A, device=device) if invalid is None else (~invalid).sum(-1)
            table = sequence_table(min(considered, A), simulations, device)
            self.sequence = self.own(table[legal.clamp(max=len(table) - 1)])  # (B, S)
        self.nodes = {k: v.reshape(B * size, *v.shape[2:]) for k, v in vars(self).items() if k in NODES}  # views, flat
        self.flat_edges = self.edges.reshape(3, A, -1)
        self.best[:, 0] = self.root_scores(self.scores(self.root), 0).argmax(-1)

    def softmax(self, x):
        """By torch, so that both kinds of arrays hold the same numbers."""
        return self.own(torch.softmax(x if torch.is_tensor(x) else torch.from_numpy(x), -1))

    def scores(self, nodes, low=-1.0, high=1.0):
        """What a node maximises over its actions: (P,) flat indices -> (P, A)."""
        edges = self.flat_edges.index_select(2, nodes) if self.static else self.flat_edges.take(nodes, 2)
        prior, visits, q = edges[0].T, edges[1].T, edges[2].T
        if self.gumbel is not None:
            sigma = complete_by_mix_value(q, visits, prior, self.nodes["raw"][nodes], self.gumbel_scale)
            share = visits / (1 + visits.sum(-1)[:, None])
            return self.softmax(self.nodes["logits"][nodes] + sigma) - share
        if self.q_norm == "siblings":
            q = qtransform_by_parent_and_siblings(q, visits, self.nodes["value"][nodes])
        else:  # NOTE: unvisited actions count as the worst known outcome, as among siblings
            q = self.xp.where(visits > 0, (q - low) / (high - low), 0)
        count = self.nodes["count"][nodes]
        return q + prior * self.bonus[count.long() if self.static else count.astype(int)][:, None] / (1 + visits)

    def root_sigma(self):
        prior, visits, q = (self.edges[i, :, :, 0].T for i in range(3))
        return complete_by_mix_value(q, visits, prior, self.raw[:, 0], self.gumbel_scale)

    def root_scores(self, scores, simulation):
        """The root's scores (B, A): legal actions only; with Gumbel, sequential halving."""
        if self.gumbel is not None:
            visits = self.edges[1, :, :, 0].T
            wanted = self.sequence[:, min(simulation, self.S - 1)][:, None]
            if simulation >= self.S:  # the action to take: best of the most visited
                wanted = self.xp.amax(visits, -1, keepdims=True)
            scores = (self.gumbel + self.root_sigma()).clip(min=-1e9)
            scores = self.xp.where(visits != wanted, -math.inf, scores)
        return scores if self.invalid is None else self.xp.where(self.invalid, -math.inf, scores)

    def select(self):
        """The node and its action that the next simulation expands: (B,) flat indices, (B,)."""
        if self.q_norm != "tree" or self.gumbel is not None:
            return self.leaf[:, 0], self.nodes["best"][self.leaf[:, 0]]
        # The range over the whole tree moves with every backup, so all best actions may: descend, all trees in step.
        xp, q, seen = self.xp, self.edges[2, :, :, :-1], self.edges[1, :, :, :-1] > 0  # (A, B, S+1): without the bin
        low, high = (f(xp.where(seen, q, x), (0, 2)) for f, x in ((xp.amin, math.inf), (xp.amax, -math.inf)))
        low, high = (xp.where(low > high, 0, x)[:, None] for x in (low, high))  # (B, 1), 0 before the first visit
        node = self.root
        for depth in range(self.S):
            scores = self.scores(node, low, xp.maximum(high, low + 1e-8))
            action = (self.root_scores(scores, 0) if depth == 0 else scores).argmax(-1)
            following = self.nodes["child"][node, action]
            going = following >= 0
            if not (self.static or going.any()):
                break
            node = xp.where(going, following, node)
        return node, action

    def grow(self, i, parent, action, reward, prior_logits, value, latent):
        """Simulation i (from 1) reached `action` in `parent` (both (B,)): add the new node, back its value up."""
        xp, nodes, logits = self.xp, self.nodes, prior_logits.to(self.dtype)
        reward, value = self.own(reward.to(self.dtype)), self.own(value.to(self.dtype))
        new, length, prior = self.root + i, nodes["depth"][parent] + 1, self.softmax(logits)
        self.latents[:, i], self.edges[0, :, :, i], self.logits[:, i] = latent, prior.T, self.own(logits)
        self.reward[:, i], self.raw[:, i], self.depth[:, i], self.via[:, i] = reward, value, length, action
        self.best[:, i], self.leaf[:, i] = prior.argmax(-1), new
        nodes["child"][parent, action] = new
        path = nodes["path"][parent]
        path[self.trees, length] = new
        self.path[:, i] = path

        # Backup (app. B): G_j = sum_i discount^i r_(j+1+i) + discount^(length - j) v, all depths at once.
        D = self.S if self.static else int(length.max())
        path = path[:, : D + 1]  # (B, D+1)
        rewards = nodes["reward"][path[:, 1:]]  # (B, D), 0 beyond the path
        chain = xp.concatenate([rewards, rewards[:, :1]], 1)
        chain[:, D] = 0
        chain[self.trees, length] = value
        returns = chain @ self.powers[: D + 1, : D + 1]  # (B, D+1)
        count = nodes["count"][path]
        values = (nodes["value"][path] * count + returns) / (count + 1)
        nodes["value"][path], nodes["count"][path] = values, count + 1
        live = (path[:, 1:] != self.trash).reshape(-1)  # this edge exists
        if self.static:
            tree, parents = self.trees.repeat_interleave(D), torch.where(live, path[:, :-1].reshape(-1), self.trash[0])
            some, ends = slice(None), D * (self.trees + 1)
        else:  # one deep path makes D large: look only at nodes that there are
            tree, some, ends = self.trees.repeat(length), live.nonzero()[0], length.cumsum()
            parents = path[:, :-1].reshape(-1)[some]
        actions = nodes["via"][path[:, 1:].reshape(-1)[some]]  # (P,)
        self.flat_edges[2, actions, parents] = (rewards + self.discount * values[:, 1:]).reshape(-1)[some]
        self.flat_edges[1, actions, parents] += 1
        if self.q_norm == "tree" and self.gumbel is None:
            return

        # Refresh the best actions of the path, then where they lead: a node whose best action stays on the path shares
        # the leaf of the first node below it whose best action leaves the path.
        scores = self.scores(parents)
        if self.gumbel is not None or self.invalid is not None:
            starts = xp.concatenate([ends[:1] * 0, ends[:-1]])  # of each path: its root
            scores[starts] = self.root_scores(scores[starts], i)
        best = scores.argmax(-1)
        following = nodes["child"][parents, best]
        leaf = xp.where(following < 0, parents, nodes["leaf"][following])
        order = torch.arange(len(tree), device=self.root.device) if self.static else np.arange(len(tree))
        leaves = xp.where((best != actions) & live[some], order, len(tree))
        first = leaves.flip(0).cummin(0)[0].flip(0) if self.static else np.minimum.accumulate(leaves[::-1])[::-1]
        inside = first < ends[tree]
        nodes["best"][parents] = best
        nodes["leaf"][parents] = xp.where(inside, leaf[first.clip(max=len(tree) - 1)], new[tree])


NODES = "child value count reward raw depth via best leaf logits path".split()


@torch.no_grad()
def mcts(prior_logits, value, latent, recurrent_fn, num_simulations, discount, invalid=None, **settings):
    """Search from B roots: prior_logits (B, A), value (B,), latent (B, ...), invalid (B, A) bool.

    recurrent_fn(latent (B, ...), action (B,)) -> reward (B,), prior_logits (B, A), value (B,), latent (B, ...).
    Returns visits (B, A), root_value (B,) and a dict: `policy` (B, A), the target for learning, `action` (B,), the one
    to take with Gumbel, `q` (B, A)."""
    trees = Trees(prior_logits, value, latent, num_simulations, discount, invalid, **settings)
    latents = trees.latents.flatten(0, 1)
    for i in range(1, num_simulations + 1):
        parent, action = trees.select()
        index, moves = torch.as_tensor(parent), torch.as_tensor(action)
        trees.grow(i, parent, action, *recurrent_fn(latents.index_select(0, index), moves))
    visits, q, root_value = (
        torch.as_tensor(x) for x in (trees.edges[1, :, :, 0].T, trees.edges[2, :, :, 0].T, trees.value[:, 0])
    )
    if trees.gumbel is None:
        policy, action = visits / visits.sum(-1, keepdim=True), visits.argmax(-1)
    else:
        # NOTE: the improved policy, not the visits: sound for any number of simulations.
        policy = torch.as_tensor(trees.softmax(trees.logits[:, 0] + trees.root_sigma()))
        action = torch.as_tensor(trees.root_scores(None, num_simulations).argmax(-1))
    return visits, root_value, {"policy": policy, "action": action, "q": q}


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


def network_config(args, space):
    """What the networks are made of, in plain types. `grid`: a vector that is really (H, W, planes)."""
    image, game = len(space.shape) == 3, GAMES.get(args.env_id)
    name = args.network if args.network != "auto" else "paper" if image else "mlp"
    config = {"network": name} | {
        k: getattr(args, k) for k in ("hidden", "latent", "dyn_layers", "support", "frame_stack")
    }
    config |= dict(action_planes=args.action_planes and image, consistency=args.consistency_scale > 0, grid=None)
    if name != "mlp":
        config["grid"] = [*game.shape, 2] if game else None if image else [10, 10, space.shape[0] // 100]  # MinAtar
        config |= CONV[name] | {k: v for k in ("channels", "blocks") if (v := getattr(args, k)) is not None}
    return config


class MuZero(nn.Module):
    """h: observations -> s; g: s, a -> s'; f: s -> policy, value; reward head on s'. `predict` and what uses it give
    plain numbers: search and replay never see the categorical heads. space: a Box of uint8 images (H, W, C) or of float
    vectors (n,)."""

    def __init__(self, space, actions, config):
        super().__init__()
        self.actions, self.config, self.support, self.bf16 = actions, config, config["support"], False
        stack, Z = config["frame_stack"], 2 * config["support"] + 1
        if config["network"] == "mlp":
            hidden, latent = config["hidden"], config["latent"]
            self.h = dense_net(stack * math.prod(space.shape), hidden, latent)
            self.g = DenseDynamics(latent, actions, hidden, config["dyn_layers"])
            self.f = nn.Identity()
            self.policy, self.value, self.reward = (dense_net(latent, hidden, n, zero=True) for n in (actions, Z, Z))
        else:
            height, width, planes = config["grid"] or space.shape
            planes, name, C = stack * (planes + config["action_planes"]), config["network"], config["channels"]
            down, scale = stem(planes, C), 1
            if not config["grid"] and name != "conv":
                down, scale = (paper_downsampler if name == "paper" else small_downsampler)(planes, C), 16
            self.h = nn.Sequential(down, tower(C, config["blocks"]))
            self.g = ConvDynamics(C, actions, config["blocks"], name != "paper")
            self.f, area = tower(C, config["head_blocks"]), -(-height // scale) * -(-width // scale)
            self.policy = ConvHead(C, area, *config["policy"], actions)
            self.value, self.reward = (ConvHead(C, area, *config["scalar"], Z) for _ in range(2))
            latent = C * area
        self.latent = latent
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

    def represent(self, obs, past):
        """h: stacked observations (B, F, ...), actions before each (B, F), -1 for none -> s."""
        x, grid = obs.float() / 255 if obs.dim() == 5 else obs.float(), self.config["grid"]
        x = x.unflatten(2, grid) if grid else x
        if x.dim() == 5:
            x = x.permute(0, 1, 4, 2, 3).flatten(1, 2)  # (B, F * planes, H, W)
            if self.config["action_planes"]:
                a = ((past + 1) / self.actions)[:, :, None, None].expand(-1, -1, *x.shape[2:])
                x = torch.cat([x, a.to(x.dtype)], 1)
        with self.mixed():
            s = self.h(x if x.dim() == 4 else x.flatten(1))
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

    def recurrent(self, s, a):
        """One imagined step, as `mcts` wants it: reward (B,), policy logits (B, A), value (B,), s'."""
        s = self.dynamics(s, a)
        return self.foretell(s), *self.predict(s), s


def count_params(model):
    """Trained parameters of a module."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def plan(model, args, inputs):
    """Search: visits (B, A), root value (B,), {policy, action, q}. inputs: stacked observations "obs" (B, F, ...) and
    "past" (B, F); if wanted "legal" (B, A) bool, "noise" (B, A), Dirichlet, or "gumbel" (B, A)."""
    s = model.represent(inputs["obs"], inputs["past"])
    (logits, value), invalid = model.predict(s), ~inputs["legal"] if "legal" in inputs else None
    if "noise" in inputs:
        logits = add_root_noise(logits, inputs["noise"], args.dirichlet_fraction, invalid)
    settings = dict(q_norm=args.q_norm, considered=args.max_considered_actions, gumbel_scale=args.gumbel_scale)
    if args.search == "gumbel":
        settings["gumbel"] = inputs.get("gumbel", torch.zeros_like(logits))
    # NOTE: seen from the player to move, the next state belongs to the opponent: its value counts negative.
    discount = -args.gamma if args.env_id in GAMES else args.gamma
    return mcts(logits, value, s, model.recurrent, args.num_simulations, discount, invalid, **settings)


def root_noise(args, n, actions, legal, device):
    """What makes n searches explore, as inputs of `plan`."""
    if args.search == "puct":
        legal = torch.ones(n, actions, dtype=torch.bool, device=device) if legal is None else legal
        return {"noise": dirichlet(args.dirichlet_alpha, legal)}
    return {"gumbel": -torch.log(-torch.log(torch.rand(n, actions, device=device).clamp(1e-20, 1 - 1e-7)))}


def sample_visits(visits, temperature):
    """Actions (N,) drawn by visits (N, A); temperature: a number, or (N,)."""
    hot = torch.as_tensor(temperature, device=visits.device, dtype=visits.dtype).expand(len(visits))[:, None]
    probs = torch.where(hot > 0, visit_softmax(visits, hot.clamp(min=1e-3)), visit_softmax(visits, 0))
    cdf = probs.cumsum(-1)  # inverse CDF: one random number per environment
    u = torch.rand(len(visits), 1, device=visits.device) * cdf[:, -1:] * (1 - 1e-6)  # never past the last legal one
    return (cdf <= u).sum(-1).clamp(max=visits.shape[1] - 1)


def stack_frames(obs, first, state, n):
    """The last n observations (N, n, ...) and the actions before them (N, n), -1: none. obs (N, ...): the newest; first
    (N,): an episode begins; state: both before, and the actions (N,) since then, None at the start."""
    new = obs.unsqueeze(1)
    frames, past = new.expand(-1, n, *new.shape[2:]), torch.full((len(obs), n), -1, device=obs.device)
    if state is None:
        return frames, past
    # An episode begins with copies of its first frame, before which nothing was done.
    rolled = torch.cat([state[0][:, 1:], new], 1)
    frames = torch.where(first.view(-1, *[1] * (new.dim() - 1)), frames, rolled)
    return frames, torch.where(first[:, None], past, torch.cat([state[1][:, 1:], state[2][:, None]], 1))


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
    K, obs, past = args.unroll_steps, batch["obs"], batch["past"]  # obs (B, K+1 or 1, F, ...)
    states = unroll(model, model.represent(obs[:, 0], past[:, 0]), batch["action"])  # (B, K+1, ...)
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
        with model.mixed():
            with torch.no_grad():
                truth = model.project(model.represent(obs[:, 1:].flatten(0, 1), past[:, 1:].flatten(0, 1))).float()
            dreamed = model.foresee(model.project(states[:, 1:].flatten(0, 1))).float()
        terms["consistency"] = negative_cosine_similarity(dreamed, truth).unflatten(0, (-1, K)) * batch["exists"][:, 1:]
    # NOTE: steps 1..K share one weight, step 0 has its own (app. G): it is the only one used without imagination.
    weight = torch.full((K + 1,), 1 / K, device=value.device)
    weight[0] = 1.0
    scales = {"value": args.value_scale, "consistency": args.consistency_scale}
    totals = {k: (v * weight[K + 1 - v.shape[1] :]).sum(1) for k, v in terms.items()}  # (B,)
    loss = sum(scales.get(k, 1.0) * v for k, v in totals.items())  # eq. 1
    values, metrics = model.to_scalar(value[:, 0]).detach(), {k: v.detach().mean() for k, v in totals.items()}
    entropy = -(batch["pi"] * batch["pi"].clamp(min=1e-12).log()).sum(-1) * batch["policy_mask"]
    metrics["target_entropy"] = entropy.sum() / batch["policy_mask"].sum().clamp(min=1)
    return loss, metrics | {"value_mean": values.mean(), "target_mean": batch["z"][:, 0].mean()}, values


class Learner:
    """Model, target network and optimizer, and the one update of everything."""

    def __init__(self, model, args, device):
        self.model, self.args, self.device = model.eval(), args, device
        self.target = copy.deepcopy(model).requires_grad_(False) if args.reanalyse else None
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.updates = torch.zeros((), dtype=torch.float64, device=device)
        options = dict(lr=torch.zeros((), device=device), weight_decay=args.weight_decay, fused=True)
        # NOTE: SGD's weight decay is the L2 term of eq. 1, AdamW's is decoupled.
        adamw = partial(torch.optim.AdamW, capturable=device.type == "cuda")
        self.opt = (adamw if args.optimizer == "adamw" else partial(torch.optim.SGD, momentum=0.9))(
            self.params, **options
        )
        self.bad = torch.zeros((), dtype=torch.bool, device=device)  # whether something was not finite, from then on

    def update(self, batch):
        """One optimizer step on a batch {name: (B, ...)}: metrics, values (B,) for priorities."""
        args = self.args
        self.model.train()
        if args.augment:  # the first observation and the later ones differently (EfficientZero)
            batch = batch | {"obs": torch.cat([augment_images(v) for v in batch["obs"].tensor_split([1], 1)], 1)}
        loss, metrics, values = muzero_loss(self.model, batch, args)
        self.opt.zero_grad()
        (loss * batch["weight"]).mean().backward()
        norm = nn.utils.clip_grad_norm_(self.params, args.max_grad_norm)
        self.bad |= ~torch.isfinite(norm)
        rate = self.opt.param_groups[0]["lr"]
        schedule = args.lr_decay, args.lr_decay_updates, args.warmup_updates, args.lr_steps
        rate.copy_(lr_schedule(self.updates, args.learning_rate, *schedule))
        self.opt.found_inf = self.bad.float()  # no step any more, decided on the device: nothing waits for it
        self.opt.step()
        self.updates += 1
        if self.target is not None:  # every so many updates the target network becomes a copy of the model
            fresh = self.updates % args.target_updates == 0
            for old, new in zip(self.target.state_dict().values(), self.model.state_dict().values(), strict=True):
                old.copy_(torch.where(fresh, new, old))
        self.model.eval()  # NOTE: batch statistics would make a tree depend on its neighbours
        return metrics | {"grad_norm": norm, "learning_rate": rate.clone()}, values

    def check(self, metrics, where):
        """Ends the run naming what was not finite, if something was. Waits for the device."""
        if self.bad:
            names = ", ".join(k for k, v in metrics.items() if not math.isfinite(v))
            names = names.replace("grad_norm", "gradient norm")
            raise SystemExit(f"not finite at {where}: {names}; no step was taken, ckpt.pt is from before it")

    def state_dict(self):
        state = {"model": self.model.state_dict(), "opt": self.opt.state_dict(), "updates": self.updates}
        return state | ({"target": self.target.state_dict()} if self.target is not None else {})

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        if self.target is not None:
            self.target.load_state_dict(state["target"])
        self.opt.load_state_dict(state["opt"])
        rate = torch.as_tensor(self.opt.param_groups[0]["lr"], device=self.device)
        self.opt.param_groups[0] |= dict(lr=rate, capturable=self.device.type == "cuda")  # on another device, perhaps
        self.updates.copy_(state["updates"])


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


def compile_model(model, learner, agent):
    """Compile h, g and f; capture whole searches and updates in CUDA graphs."""
    print("compiling: the first steps take a minute or more (--no-compile starts at once)", flush=True)
    for network in (model.h, model.g, model.f):
        network.compile(dynamic=False)  # in place: parameter names in checkpoints stay as they are
    learner.update = Graphed(learner.update)
    if agent.args.q_norm != "tree":
        agent.search = Graphed(agent.search)


# ---- Replay ----------------------------------------------------------------------------------------------------------


class TrajectoryReplay:
    """Ring buffers (environment, row), allocated once on `device`; single frames, stacked when they are sampled."""

    def __init__(self, capacity, args, space, actions, device="cpu"):
        """capacity: rows per environment."""
        self.capacity, self.args, self.actions, self.device = capacity, args, actions, torch.device(device)
        specs = {"obs": (space.shape, getattr(torch, space.dtype.name)), "policy": ((actions,), torch.float32)}
        specs |= dict.fromkeys(("reward", "value"), ((), torch.float32)) | {"action": ((), torch.int64)}
        specs |= {"begun": ((), torch.int64)} | dict.fromkeys(("is_first", "is_last", "is_terminal"), ((), torch.bool))
        size = args.num_envs, capacity
        self.data = {k: torch.zeros(*size, *s, dtype=d, device=device) for k, (s, d) in specs.items()}
        self.priority = torch.zeros(size, dtype=torch.float64, device=device)  # 0: never drawn
        self.top = torch.ones((), dtype=torch.float64, device=device)  # the highest priority so far, of new rows
        self.count, self.begun = np.zeros(size[0], np.int64), np.zeros(size[0], np.int64)  # rows ever added; episode
        self.drawable, self.rng = False, torch.Generator(device).manual_seed(args.seed)  # is there a row to draw?
        self.game = GAMES.get(args.env_id)
        self.n = args.td_steps or self.game.cells
        self.horizon = min(self.n + args.unroll_steps, capacity - 1)  # rows after a row that its targets reach
        self.discount = -args.gamma if self.game else args.gamma

    def add(self, envs, rows):
        """Append one row to each environment in `envs` (n,): rows {name: (n, ...)} as arrays or tensors; "action",
        "policy" and "value" may be missing."""
        first, last = np.asarray(rows["is_first"]), np.asarray(rows["is_last"])
        self.begun[envs[first]] = self.count[envs[first]]
        index = torch.as_tensor(envs * self.capacity + self.count[envs] % self.capacity, device=self.device)
        for name, data in self.data.items():
            value = (rows | {"begun": self.begun[envs]}).get(name, 0)
            data.flatten(0, 1)[index] = torch.as_tensor(value, device=self.device).to(data.dtype)
        flat = self.priority.view(-1)
        flat[index] = 0.0
        # The oldest rows of a full ring have lost the frames and actions before them.
        full = envs[self.count[envs] >= self.capacity]
        ahead = np.arange(1, self.args.frame_stack + self.args.action_planes)
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

    def windows(self, env, row):
        """Stacked observations of rows (...,): (..., F, ...) and the actions before each frame (..., F)."""
        begun = self.data["begun"].view(-1)[env * self.capacity + row % self.capacity].unsqueeze(-1)
        rows = row.unsqueeze(-1) + torch.arange(1 - self.args.frame_stack, 1, device=self.device)  # (..., F)
        ids = env.unsqueeze(-1) * self.capacity + rows.clamp(min=begun) % self.capacity
        before = env.unsqueeze(-1) * self.capacity + (rows - 1) % self.capacity
        return self.data["obs"].flatten(0, 1)[ids], torch.where(rows > begun, self.data["action"].view(-1)[before], -1)

    def draw(self, batch_size):
        """Rows in proportion to their priorities: flat indices (B,), environments, absolute row numbers."""
        cumulative = self.priority.view(-1).cumsum(0)
        u = torch.rand(batch_size, dtype=torch.float64, device=self.device, generator=self.rng) * cumulative[-1]
        index = torch.searchsorted(cumulative, u, right=True).clamp(max=len(cumulative) - 1)
        env = torch.div(index, self.capacity, rounding_mode="floor")
        newest = torch.as_tensor(self.count, device=self.device)[env] - 1
        return index, env, newest - (newest - index % self.capacity) % self.capacity  # the newest row at this place

    def sample(self, batch_size, learner=None, search=None, progress=0.0):
        """A batch for `muzero_loss` and its flat indices (B,). For Reanalyse: `learner`, whose target network gives
        values, and `search`. `progress`: share of the run that is over, for the exponent of the weights."""
        args, K, n = self.args, self.args.unroll_steps, self.n
        index, env, row = self.draw(batch_size)
        newest = torch.as_tensor(self.count, device=self.device)[env, None] - 1
        steps = row[:, None] + torch.arange(K + n + 1, device=self.device)  # (B, K+n+1) absolute rows
        ids = env[:, None] * self.capacity + torch.minimum(steps, newest) % self.capacity
        field = {k: v.flatten(0, 1)[ids] for k, v in self.data.items() if k not in ("obs", "policy")}
        # A window stops at the end of its episode or at the newest row.
        stop = field["is_last"] | (steps >= newest)
        exists = (stop.cumsum(1) - stop.long()) == 0  # rows of the same episode
        over = (field["is_terminal"] & exists).cumsum(1) > 0  # the terminal row and, absorbing, everything after it
        values = field["value"]
        if args.reanalyse and learner is not None:
            values = self.fresh_values(learner.target, env, steps, stop, values)
        # Value targets. A window that stops without a terminal state bootstraps there: gamma times that value is added
        # to the reward of its last transition, and what follows is 0.
        cut = exists & stop & ~over
        gain = (field["reward"] + self.discount * torch.where(cut, values, 0)) * exists  # of entering each row
        ahead = torch.where(exists & ~stop, values, 0)
        weights = n_step_matrix(K + n, K + 1, self.discount, n, self.device)
        z = gain[:, 1:] @ weights + self.discount**n * ahead[:, n : n + K + 1]  # (B, K+1), app. G
        ids, stop, exists, over = ids[:, : K + 1], stop[:, : K + 1], exists[:, : K + 1], over[:, : K + 1]
        decided = exists & ~field["is_last"][:, : K + 1]
        random = torch.randint(self.actions, (batch_size, K), device=self.device, generator=self.rng)
        batch = {
            # NOTE: after the end actions are random, rewards and values 0: absorbing states. After a truncation nobody
            # knows, and nothing is learned.
            "action": torch.where(decided[:, :K], field["action"][:, :K], random),
            "z": z, "u": (field["reward"][:, : K + 1] * exists)[:, 1:],
            "value_mask": ((exists & ~stop) | over).float(), "reward_mask": (exists | over)[:, 1:].float(),
            "policy_mask": decided.float(), "exists": exists.float(), "pi": self.data["policy"].flatten(0, 1)[ids],
            "weight": torch.ones(batch_size, device=self.device),
        }  # fmt: skip
        if args.per_alpha:
            beta = args.per_beta + progress * (args.per_beta_end - args.per_beta)
            batch["weight"] = per_weights(self.priority, index, beta).float()
        rows = torch.minimum(steps[:, : K + 1], row[:, None] + exists.sum(1, keepdim=True) - 1)
        env, depth = env[:, None].expand_as(rows), K + 1 if args.consistency_scale else 1
        batch["obs"], batch["past"] = self.windows(env[:, :depth], rows[:, :depth])
        if (some := round(args.reanalyse * batch_size)) and search is not None:
            batch["pi"] = self.fresh_policies(search, env[:some], rows[:some], decided[:some], batch["pi"])
        return batch, index

    def fresh_values(self, target, env, steps, stop, values):
        """Reanalyse (app. H): the values that are bootstrapped from, by the target network."""
        end = torch.where(stop.any(1), stop.int().argmax(1), stop.shape[1] - 1)  # (B,)
        places = torch.arange(self.n, self.n + self.args.unroll_steps + 1, device=self.device)
        places = torch.minimum(places, end[:, None])  # (B, K+1)
        rows, device = steps.gather(1, places), next(target.parameters()).device  # the replay may lie in host memory
        windows = (x.flatten(0, 1).to(device) for x in self.windows(env[:, None].expand_as(rows), rows))
        with torch.no_grad():
            fresh = target.predict(target.represent(*windows))[1]
        return values.scatter(1, places, fresh.view_as(places).to(values))

    def fresh_policies(self, search, env, rows, decided, policies):
        """Reanalyse: policies of the first rows of a batch from a search with the newest weights."""
        inputs = dict(zip(("obs", "past"), (x.flatten(0, 1) for x in self.windows(env, rows))))
        if self.game:
            legal = self.game.legal(self.game.from_obs(inputs["obs"][:, -1].cpu().numpy()))
            inputs["legal"] = torch.as_tensor(legal | ~legal.any(-1, keepdims=True))  # a full board: anything
        fresh = search(inputs)[2]["policy"].to(policies).view(*rows.shape, -1)
        fresh = torch.where(decided.unsqueeze(-1), fresh, policies[: len(rows)])
        return torch.cat([fresh, policies[len(rows) :]])

    def refresh(self, index, errors):
        """New priorities |predicted value - target|^alpha of sampled rows."""
        fresh = (errors.abs().to(self.priority) + 1e-6) ** self.args.per_alpha
        self.priority.view(-1)[index] = fresh
        self.top = torch.maximum(self.top, fresh.max())

    def state_dict(self):
        filled = int(min(self.count.max(), self.capacity))
        rows = {k: v[:, :filled].to("cpu", copy=True) for k, v in self.data.items()}  # a view would save all of it
        state = {"rows": rows, "priority": self.priority[:, :filled].to("cpu", copy=True), "top": float(self.top)}
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


# ---- Board games -----------------------------------------------------------------------------------------------------


class BoardGame:
    """Rules over arrays of boards (..., cells): 1 own stone, -1 the opponent's, 0 empty, always seen by the player to
    move. Subclasses say where the stone of an action falls."""

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
        """Boards (..., cells) -> (..., cells * 2): planes of own and opposing stones, channels last."""
        return np.stack([board == 1, board == -1], -1).astype(np.float32).reshape(*board.shape[:-1], -1)

    @classmethod
    def from_obs(cls, obs):
        """The inverse of `observe`."""
        planes = obs.reshape(*obs.shape[:-1], cls.cells, 2).astype(np.int8)
        return planes[..., 0] - planes[..., 1]


class TicTacToe(BoardGame):
    shape, connect, actions = (3, 3), 3, 9

    @staticmethod
    def legal(board):
        return np.asarray(board) == 0

    @staticmethod
    def cell(board, action):
        return action


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


def random_move(game, board, rng):
    """A legal move."""
    return int(rng.choice(np.flatnonzero(game.legal(board))))


class Board(gym.Env):
    """A game as an environment. `opponent(game, board, rng)`: who answers every move, and begins every other game;
    None: nobody, the moves of both players come from outside (self-play). Begins after 0 to `opening` random moves:
    without them self-play soon visits a few lines of play only, and meets the others unprepared."""

    def __init__(self, game, opponent=None, opening=0):
        self.game, self.opponent, self.opening, self.render_mode = game, opponent, opening, None
        self.observation_space = spaces.Box(0, 1, (2 * game.cells,), np.float32)
        self.action_space = spaces.Discrete(game.actions)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.board = np.zeros(self.game.cells, np.int8)
        for _ in range(self.np_random.integers(self.opening + 1)):
            after, _, done = self.game.step(self.board, random_move(self.game, self.board, self.np_random))
            if done:
                break  # it begins before the move that would have ended it
            self.board = after
        if self.opponent and self.np_random.random() < 0.5:
            self.board = self.game.step(self.board, self.opponent(self.game, self.board, self.np_random))[0]
        return self.game.observe(self.board), {}

    def step(self, action):
        """An illegal move, which only a player without knowledge of the rules chooses, becomes a random one."""
        legal = self.game.legal(self.board)[action]
        action = int(action) if legal else random_move(self.game, self.board, self.np_random)
        self.board, reward, done = self.game.step(self.board, action)
        if self.opponent and not done:
            answer = self.opponent(self.game, self.board, self.np_random)
            self.board, lost, done = self.game.step(self.board, answer)
            reward = -lost
        return self.game.observe(self.board), float(reward), bool(done), False, {}


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


class AtariGame(gym.Wrapper):
    """Frame skip with the maximum of the last two frames, up to 30 no-ops, area resizing; says when a life was lost."""

    def __init__(self, env, args):
        super().__init__(env)
        self.args, shape = args, (args.image_size, args.image_size, 1 if args.grayscale else 3)
        self.observation_space = spaces.Box(0, 255, shape, np.uint8)

    def reset(self, *, seed=None, options=None):
        frame, info = self.env.reset(seed=seed, options=options)
        for _ in range(np.random.default_rng(seed).integers(31)):
            frame, _, terminated, truncated, info = self.env.step(0)
            if terminated or truncated:
                frame, info = self.env.reset(options=options)
        return self.picture(frame), info

    def step(self, action):
        total, frames, lives = 0.0, [], self.unwrapped.ale.lives()
        for _ in range(self.args.action_repeat or 4):
            frame, reward, terminated, truncated, info = self.env.step(action)
            total, frames = total + float(reward), [*frames[-1:], frame]
            if terminated or truncated:
                break
        # NOTE: a lost life is an episode's end for learning, but the game goes on; gymnasium's and ale-py's options
        # start a new game, which would never show the later levels.
        info = info | {"life_lost": self.unwrapped.ale.lives() < lives}
        return self.picture(np.max(frames, axis=0)), total, terminated, truncated, info

    def picture(self, frame):
        x = (frame @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)[..., None] if self.args.grayscale else frame
        rows, columns = (area_weights(n, self.args.image_size) for n in x.shape[:2])
        # NOTE: by area, as EfficientZero; Pillow's box filter takes whole pixels only: up to 32 grey levels off.
        return np.rint(np.einsum("yh,xw,hwc->yxc", rows, columns, x.astype(np.float32), optimize=True)).astype(np.uint8)


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


def make_env(args, seed, opponent=random_move):
    """The environment as the agent sees it. Observations: uint8 images (size, size, C), or float32 vectors (n,): all
    entries of a Dict joined, numbers of a set as one-hot; actions: Discrete(n). Raises ValueError with what was wanted
    and what was found. Episodes are functions of the seed of their reset and of the actions; a first reset without a
    seed goes on from `seed`. opponent: see Board."""
    *modules, name = args.env_id.split(":")
    family, kwargs = name.split("/")[0], json.loads(args.env_kwargs)
    for module in modules:
        importlib.import_module(module)
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # draw without a display
    if family == "ALE":
        import ale_py  # noqa: F401 (registers its ids)

        # NOTE: the v5 ids skip frames by themselves and without max-pooling; the skip is ours, and it is the only one.
        kwargs = dict(frameskip=1, repeat_action_probability=0, full_action_space=True) | kwargs
    elif family == "MinAtar":
        import minatar.gym

        if name not in gym.registry:
            minatar.gym.register_envs()
        kwargs = dict(max_episode_steps=args.max_episode_steps or 2500) | kwargs  # it has no limit of its own
    if name in GAMES:
        env = Board(GAMES[name], opponent, args.random_opening if opponent is None else 0, **kwargs)
    else:
        creator = gym.spec(name).entry_point
        creator = gym.envs.registration.load_env_creator(creator) if isinstance(creator, str) else creator
        if "rgb_array" in getattr(creator, "metadata", {}).get("render_modes", ()):
            kwargs = dict(render_mode="rgb_array") | kwargs
        env = gym.make(name, disable_env_checker=True, **kwargs)
    env = gym.wrappers.TransformReward(env, lambda r: float(np.asarray(r).item()))  # some send arrays of one number
    if family == "ALE":
        env = AtariGame(env, args)
    elif (args.action_repeat or 1) > 1:
        env = gym.wrappers.RepeatAction(env, args.action_repeat)
    env = MinAtar(env, args.image_size if args.pixels else 160) if family == "MinAtar" else env
    env = gym.wrappers.AddRenderObservation(env) if args.pixels and family != "ALE" else env
    space, a = env.observation_space, env.action_space
    if isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3:
        axis = 0 if space.shape[0] < min(space.shape[1:]) else 2  # of the channels: some have them in front
        box = spaces.Box(0, 255, (args.image_size, args.image_size, space.shape[axis]), np.uint8)
        see = lambda x: resize(np.moveaxis(x, axis, 2), args.image_size)  # noqa: E731
    else:
        numbers = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
        parts = space.values() if isinstance(space, spaces.Dict) else [space]
        if not all(isinstance(s, numbers) for s in parts) or spaces.flatdim(space) > 4096:
            raise ValueError(f"observations must be a uint8 image or up to 4096 numbers (or --pixels), found {space}")
        box = spaces.Box(-np.inf, np.inf, (spaces.flatdim(space),), np.float32)
        see = lambda x: np.array(spaces.flatten(space, x), np.float32)  # noqa: E731
    env = gym.wrappers.TransformObservation(env, see, box)
    if not isinstance(a, spaces.Discrete):
        raise ValueError(f"a tree search needs Discrete actions, found {a}; tdmpc2.py and planet_cem.py take a Box")
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
    """A model behind the interface that all scripts share. Observations and actions are numpy, batch first; states are
    tuples of tensors, batch first. The model has no decoder: what it sees and dreams are latents, `dream_space`."""

    def __init__(self, model, args, device="cpu"):
        self.model, self.args, self.device, self.game = model, args, device, GAMES.get(args.env_id)
        self.search = self.again = partial(plan, model, args)
        self.dream_space = spaces.Box(0, 1, (model.latent,), np.float32)

    def seed(self, seed):
        """Its noise comes from torch's generator."""
        torch.manual_seed(int(seed))

    def tensor(self, x):
        return torch.as_tensor(np.asarray(x), device=self.device)

    @torch.no_grad()
    def value(self, obs, state):
        """The network's value (N,) of what follows `state`."""
        windows = stack_frames(self.tensor(obs), self.tensor(np.zeros(len(obs), bool)), state, self.args.frame_stack)
        return self.model.predict(self.model.represent(*windows))[1].cpu().numpy()

    @torch.no_grad()
    def decide(self, obs, state, first, explore=True, temperature=1.0):
        """Search from obs (N, ...): actions (N,), policies (N, A), root values (N,), state: the stacks and the actions.
        explore: with noise and the temperature, a number or (N,)."""
        args, obs = self.args, self.tensor(obs)
        frames, past = stack_frames(obs, self.tensor(first), state, args.frame_stack)
        inputs, legal = {"obs": frames, "past": past}, None
        if self.game:
            inputs["legal"] = legal = self.tensor(self.game.legal(self.game.from_obs(obs.cpu().numpy())))
        if explore:
            inputs |= root_noise(args, len(obs), self.model.actions, legal, self.device)
        visits, value, extra = self.search(inputs) if explore else self.again(inputs)
        action = sample_visits(visits, temperature) if explore and args.search == "puct" else extra["action"].clone()
        return action.cpu().numpy(), extra["policy"], value, (frames, past, action)

    def act(self, obs, state, first, greedy=False):
        """obs (N, ...), state None at the start, first (N,): a new episode begins -> actions (N,), state. greedy:
        without noise, the most visited action."""
        actions, _, _, state = self.decide(obs, state, first, explore=not greedy)
        return actions, state

    @torch.no_grad()
    def observe(self, obs, actions):
        """obs (N, T, ...), actions (N, T-1) from an episode's beginning -> latent of the last one, and of all."""
        obs, past = self.tensor(obs), F.pad(self.tensor(actions).long(), (1, 0), value=-1)  # (N, T): the action before
        rows = torch.arange(obs.shape[1])[:, None] + torch.arange(1 - self.args.frame_stack, 1)  # (T, F)
        past = torch.where(rows.to(self.device) > 0, past[:, rows.clamp(min=0)], -1)
        s = self.model.represent(obs[:, rows.clamp(min=0)].flatten(0, 1), past.flatten(0, 1))
        s = s.unflatten(0, obs.shape[:2])
        return (s[:, -1],), s.flatten(2).cpu().numpy()

    @torch.no_grad()
    def imagine(self, state, actions):
        """One imagined transition of N dreams -> state, reward (N,), alive (N,): ends are not modelled, latents."""
        s = self.model.dynamics(state[0], self.tensor(actions).long())
        return (s,), self.model.foretell(s).cpu().numpy(), np.ones(len(s), np.float32), s.flatten(1).cpu().numpy()


def load(run, device="cpu"):
    """The Agent of a run directory."""
    state = load_checkpoint(run)
    args = Args(**state["args"])
    env = make_env(args, args.seed)
    space = env.observation_space
    model = MuZero(space, int(env.action_space.n), network_config(args, space)).to(device)
    model.load_state_dict(state["learner"]["model"])
    agent = Agent(model.eval(), args, torch.device(device))
    agent.global_step, agent.random_return = state["loop"]["global_step"], state["loop"]["random_return"]
    env.close()
    return agent


# ---- Main ------------------------------------------------------------------------------------------------------------


def check_args(args):
    """What would end in a wrong result or an obscure error, before anything is created. -> spaces of the agent."""
    names = "num_envs batch_size unroll_steps eval_episodes log_every save_every learning_rate frame_stack "
    names += "num_simulations train_ratio total_timesteps target_updates"
    rules, game = {name: (getattr(args, name) > 0, "more than 0") for name in names.split()}, args.env_id in GAMES
    rules["gamma"] = (args.gamma == 1, "1 for board games") if game else (0 <= args.gamma <= 1, "within 0 and 1")
    rules["td_steps"] = args.td_steps > 0 or game, "more than 0; 0 is for board games"
    rules["support"] = args.support > 0 or game, "more than 0; 0 is for board games"
    rules["q_norm"] = args.q_norm != "bounds" or game, "siblings or tree; bounds is for board games"
    rules["frame_stack"] = args.frame_stack == 1 or args.frame_stack > 1 and not game, "more than 0, 1 for board games"
    least = args.num_envs * (args.unroll_steps + args.frame_stack + 2)
    rules["buffer_size"] = args.buffer_size >= least, f"at least {least}"
    starts = args.learning_starts
    rules["total_timesteps"] = args.total_timesteps > starts, f"beyond --learning-starts {starts}"
    for name, (good, wanted) in rules.items():
        if not good:
            fail(f"--{name.replace('_', '-')} must be {wanted}, got {getattr(args, name)}")
    try:
        env = make_env(args, args.seed)
    except Exception as e:  # whatever it is, the environment cannot be used: its own words, in one line
        words = " ".join(f"--env-kwargs {args.env_kwargs} --seed {args.seed}: {type(e).__name__}: {e}".split())
        fail(f"--env-id {args.env_id} {words}")
    image, network = len(env.observation_space.shape) == 3, network_config(args, env.observation_space)["network"]
    fits = {"mlp": not image, "conv": image or game or "MinAtar/" in args.env_id}.get(network, image)
    if not fits:
        fail(f"--network {network} does not fit --env-id {args.env_id}: it observes {env.observation_space}")
    if network in ("paper", "efficientzero") and args.image_size % 16:
        fail(f"--image-size must be a multiple of 16 for --network {network}, got {args.image_size}")
    print(f"{args.env_id} has observations {env.unwrapped.observation_space}")
    print(f"the agent sees {env.observation_space} (images: --image-size), acts in {env.action_space}")
    env.close()
    return env.observation_space, env.action_space


def episode_seed(args, key, index, episode=0):
    """Seed of an episode: no two of a run share one, nor do training, evaluation (key 1) and the baseline (key 2)."""
    return int(np.random.SeedSequence((args.seed, key, index, int(episode))).generate_state(1)[0])


def make_envs(args, n, key):
    """n environments in lockstep; the caller resets those that have ended, with seeds of its own. Training (key 0) is
    self-play; elsewhere boards meet a random opponent, and Atari's games are played whole."""
    if key and args.env_id.startswith("ALE/"):
        args = replace(args, max_episode_steps=27_000)
    thunks = [partial(make_env, args, episode_seed(args, key, i), random_move if key else None) for i in range(n)]
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
    returns = evaluate(args, partial(agent.act, greedy=True), 1, "evaluation", stop)
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
    """The whole algorithm: search and act in all environments, store, learn from unrolled replay, repeat. Returns the
    final metrics."""
    # Set up, in an order that finds every mistake of the user's before the first file is made.
    state = load_checkpoint(args.resume) if args.resume else None
    space, action_space = check_args(args)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    seed_everything(args, device)
    N, A, game = args.num_envs, int(action_space.n), GAMES.get(args.env_id)
    with torch.device(device):
        model = MuZero(space, A, network_config(args, space))
    if device.type == "cuda" and args.bf16 and model.config["network"] != "mlp":
        model.bf16 = True
        model.to(memory_format=torch.channels_last)  # the layout of bfloat16 convolutions
    # Rows per environment. A run can fill two per agent step: an episode's end takes one more.
    capacity = -(-min(args.buffer_size, 2 * args.total_timesteps + 2 * N) // N)
    capacity = max(capacity, args.unroll_steps + args.frame_stack + 2, game.cells + 2 if game else 0)
    need = N * capacity * math.prod(space.shape) * space.dtype.itemsize
    on_gpu = device.type == "cuda" and need < 0.8 * torch.cuda.mem_get_info()[0]
    replay = TrajectoryReplay(capacity, args, space, A, device if on_gpu else "cpu")
    run, writer = start_run(args, args.env_id, device, state and state["loop"]["global_step"] + 1)
    stop, envs = stop_signals(), make_envs(args, N, 0)
    learner, agent = Learner(model, args, device), Agent(model, args, device)
    parts = ", ".join(f"{n} {count_params(getattr(model, n)):,}" for n in "h g f policy value reward".split())
    print(f"run: {run} on {device}\nparameters: {count_params(model):,} ({parts})")
    print(f"replay: {N} x {capacity:,} rows; {1 / args.train_ratio:g} agent steps per update", flush=True)
    if state:  # each environment is brought back to where it was by the seed of its episode and the actions since then
        c, (obs, reward, first, *carry) = SimpleNamespace(**state["loop"]), state["now"]
        learner.load_state_dict(state["learner"])
        replay.load_state_dict(state["replay"])
        obs, reward, first, carry = obs.numpy(), reward.numpy(), first.numpy(), tuple(x.to(device) for x in carry)
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
        print(f"random policy: {returns.mean():.1f} +- {returns.std():.1f} over {len(returns)} episodes", flush=True)
        c = SimpleNamespace(global_step=0, updates=0, owed=0.0, seconds=0.0, recent=[], metrics={})
        c.random_return, c.episode, c.history = float(returns.mean()), [0] * N, [[] for _ in range(N)]
        obs, _ = envs.reset(seed=[episode_seed(args, 0, i) for i in range(N)])
        reward, first, carry = np.zeros(N), np.ones(N, bool), None
    if args.compile and device.type == "cuda":
        compile_model(model, learner, agent)
    again = lambda x: agent.again({k: v.to(device) for k, v in x.items()})  # noqa: E731 (Reanalyse's search)
    ended, never, start = [], np.zeros(N, bool), time.time()
    mark = start, c.global_step, c.updates  # of the last log line

    while c.global_step < args.total_timesteps:
        # Act: search from every environment's observation, take one step, store what was seen, done and concluded.
        heat = visit_softmax_temperature(c.global_step, args.total_timesteps) if args.temperature_decay else 1.0
        if args.temperature_moves is not None:
            heat = [heat * (len(past) < args.temperature_moves) for past in c.history]
        actions, policy, value, carry = agent.decide(obs, carry, first, temperature=heat)
        rows = dict(obs=obs, reward=reward, is_first=first, is_last=never, is_terminal=never, action=actions)
        replay.add(np.arange(N), rows | dict(policy=policy, value=value))
        for past, action in zip(c.history, actions.tolist(), strict=True):
            past.append(action)
        obs, reward, terminated, truncated, infos = envs.step(actions)
        c.global_step, over = c.global_step + N, terminated | truncated
        reward = np.sign(reward) if args.clip_rewards else reward
        # NOTE: with --episodic-life a lost life is a terminal state, but nothing is reset: the game goes on.
        terminated = terminated | (infos["life_lost"] if args.episodic_life else never)
        first = over | terminated
        if first.any():
            # NOTE: an episode's last observation is a row of its own; only `terminated` makes it terminal. After a
            # truncation the return goes on: its estimate is the network's value of that observation.
            e = np.flatnonzero(first)
            values = agent.value(obs, carry) * ~terminated if (first & ~terminated).any() else np.zeros(N)
            rows = dict(obs=obs[e], reward=reward[e], is_first=never[e], is_last=first[e], is_terminal=terminated[e])
            replay.add(e, rows | dict(value=values[e]))
            reward = np.where(first, 0.0, reward)
        for i in np.flatnonzero(over):
            # NOTE: the outcome of self-play says nothing about strength: it must not pass for a return.
            tag = "decided_game" if game else "episodic_return"
            ended.append(float(infos["episode"]["r"][i]))
            writer.add_scalar(f"charts/{tag}", ended[-1], c.global_step)
            writer.add_scalar("charts/episodic_length", int(infos["episode"]["l"][i]), c.global_step)
            c.episode[i], c.history[i], c.recent = c.episode[i] + 1, [], [] if game else [*c.recent[-9:], ended[-1]]
        if over.any():
            seeds = [episode_seed(args, 0, i, c.episode[i]) for i in range(N)]
            obs, _ = envs.reset(seed=seeds, options={"reset_mask": over})

        # Learn: unroll the model from replayed rows.
        c.owed += N * args.train_ratio if c.global_step >= args.learning_starts and replay.drawable else 0.0
        while c.owed >= 1:
            batch, index = replay.sample(args.batch_size, learner, again, c.global_step / args.total_timesteps)
            batch = {k: v.to(device) for k, v in batch.items()}
            c.metrics, values = learner.update(batch)
            if args.per_alpha:
                replay.refresh(index, (values - batch["z"][:, 0]).to(replay.device))
            c.updates, c.owed = c.updates + 1, c.owed - 1
            if device.type == "cpu":  # on a GPU this would wait for the device: there, when metrics are read
                learner.check(c.metrics, f"step {c.global_step}, update {c.updates}")

        # Log and save. On a GPU metrics are read here only: reading waits for the device.
        over = c.global_step >= args.total_timesteps
        log, save = (over or c.global_step % every < N for every in (args.log_every, args.save_every))
        save = save or stop
        if log or save:
            learner.check(c.metrics, f"step {c.global_step}, update {c.updates}")
        if log:
            seconds = time.time() - mark[0]
            charts = dict(SPS=(c.global_step - mark[1]) / seconds, updates_per_s=(c.updates - mark[2]) / seconds)
            for tag, value in (charts | c.metrics).items():
                part = "charts" if tag in charts or tag == "learning_rate" else "losses"
                writer.add_scalar(f"{part}/{tag}", float(value), c.global_step)
            shown = f"{np.mean(ended):.1f} ({len(ended)} episodes)" if ended else "no episode ended since the last line"
            shown = f"{'decided_games' if game else 'episodic_return'}={shown}"
            print(f"global_step={c.global_step}, {shown}, updates={c.updates}, SPS={charts['SPS']:.0f}", flush=True)
            mark, ended = (time.time(), c.global_step, c.updates), []
        if save:
            c.seconds, start = c.seconds + time.time() - start, time.time()
            c.metrics = {k: float(v) for k, v in c.metrics.items()}
            now = [*(torch.as_tensor(x) for x in (obs, reward, first)), *carry]
            parts = dict(learner=learner.state_dict(), replay=replay.state_dict(), now=now, loop=vars(c))
            save_checkpoint(parts | dict(script="muzero", args=asdict(args)), run)
        leave(run, stop)
    envs.close()
    return finish(args, c, agent, run, writer, stop)


if __name__ == "__main__":
    train(parse_args(Args, PRESETS, __doc__.split("\n\nDeviations")[0]))
