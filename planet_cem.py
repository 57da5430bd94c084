# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch>=2.11,<2.14", "numpy>=2", "tyro>=1", "tensorboard>=2.20", "pillow>=10",
#     "gymnasium[box2d,classic-control]>=1.3,<2", "shimmy>=2.0.1,<3", "imageio", "packaging", "dm_control==1.0.50",
#     "mujoco==3.17.0",
# ]
# ///
"""PlaNet: Learning Latent Dynamics for Planning from Pixels.
Hafner, Lillicrap, Fischer, Villegas, Ha, Lee, Davidson. ICML 2019; equations and appendices as in arXiv:1811.04551v5.

A recurrent state-space model (RSSM: a deterministic and a stochastic path) learns from pixels to compress, to predict
and to foresee rewards. There is no policy and no value: at every step the agent searches for the best action sequence
in the latent space with the cross-entropy method (CEM), executes its first action and plans again.

    python planet_cem.py --env-id dm_control/cheetah-run-v0           # the paper's setting, on a GPU
    python planet_cem.py --preset cpu                                 # cartpole swing-up from its state, two minutes
    python planet_cem.py --preset cpu --env-id my_module:MyEnv-v0     # your environment, on a laptop
    python planet_cem.py --env-id Pendulum-v1 --reward-scale 0.1      # any gymnasium environment with Box actions
    python planet_cem.py --resume runs/NAME                           # go on, bit for bit on a CPU

Deviations; paper [P], the authors' released code [O] (google-research/planet) (more: docs/planet_cem.md):
  * The dynamics have one hidden layer of 200 units in prior and posterior, as [O]; [P] says two layers everywhere.
  * The reward head has 3 layers of 300 units and its loss weighs 10, as [O]; [P] says 2 layers of 200 and no weights.
  * [P]'s algorithm 2 refits the CEM with a mean absolute deviation; [O] and this file use the standard deviation.
  * Latent overshooting is off as in [P] (`--overshooting 50` is the first version of the paper); it slightly hurts.
  * Replay draws episodes uniformly; [O] does so up to 500 episodes and then gives recent ones half of the draws.
  * Observations without pixels (`--no-pixels`) pass through two dense layers; neither [P] nor [O] has this mode.
  * Adam is torch's, whose eps is added after the bias correction; TensorFlow's comes before it and is larger early on.
PlaNet plans over 12 steps of predicted reward, without a value beyond them and without a model of early ends: it suits
dense rewards and episodes of fixed length. For a stronger planner with a learned value see tdmpc2.py.

To copy the model alone take Maths, Networks and `model_loss`: they need torch and the flags of the world model.

Symbols in shape comments:
  T  time (rows of a chunk)            A  action dimensions             S  stochastic state s (sample)
  B  batch (chunks, environments)      E  encoder output (embedding)    D  deterministic state h (belief)
  H  planning horizon                  J  candidate action sequences    K  elites among them
  N  = B * J                           X  hidden width of the RSSM      F  feature = D + S
Time comes first, batch second: the recurrence takes one contiguous row of the chunk after the other. Row t holds
observation t, and the action and the reward that LED to it. The first row of an episode has action 0 and reward 0.
"""

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


# A default without a source is both the paper's (appendix A) and the authors' released code's.
# fmt: off
@dataclass
class Args:
    # Experiment
    env_id: str = "dm_control/cartpole-swingup-v0"  # any gymnasium id with Box actions: dm_control/, my_module:MyEnv-v0
    preset: Literal["full", "cpu", "cpu_pixels"] = "full"  # named settings, see above; explicit flags win over them
    total_timesteps: Optional[int] = None  # agent steps over all environments (None: 1M / action repeat, 1000 episodes)
    seed: int = 1  # seed of everything random: networks, noise, replay, environments
    resume: Optional[str] = None  # run directory to continue
    target_return: Optional[float] = None  # exit with code 1 if the final evaluation stays below this
    cuda: bool = True  # use the GPU if there is one
    compile: bool = True  # on a GPU: compile the networks, updates and plans as CUDA graphs
    bf16: bool = True  # convolutions in bfloat16 on a GPU (dynamics, losses and planning stay float32)
    num_threads: Optional[int] = None  # CPU threads (None: torch's own choice)
    exp_name: str = "planet_cem"  # part of the run directory's name
    torch_deterministic: bool = True  # deterministic kernels
    track: Optional[str] = None  # project of Weights and Biases that gets the curves too (needs wandb)
    log_every: int = 1000  # agent steps between log lines
    save_every: int = 12_500  # agent steps between checkpoints
    eval_episodes: int = 10  # episodes of the final evaluation and of the random baseline
    # Environment
    num_envs: int = 1  # environments in lockstep, planned as one batch; updates follow each of their episodes
    env_kwargs: str = "{}"  # JSON object passed to gymnasium.make
    action_repeat: Optional[int] = None  # environment steps per agent step (None: the paper's, ACTION_REPEAT, else 1)
    max_episode_steps: Optional[int] = None  # agent steps after which an episode is truncated (None: the environment's)
    pixels: bool = True  # observe rendered images; --no-pixels: the environment's own observation, vector or image
    image_size: int = 64  # images are resized to this many pixels per side: 16, 32 or 64
    bits: int = 5  # colour depth the model sees, per channel
    reward_scale: float = 1.0  # factor on the rewards that the model learns; bring an agent step's to the order of 1
    # World model
    belief_size: int = 200  # D, deterministic state, units of the GRU
    state_size: int = 30  # S, stochastic state
    hidden_size: int = 200  # X, hidden width of the dynamics, and of the networks for vectors
    min_stddev: float = 0.1  # least standard deviation of prior and posterior (authors' code)
    cnn_depth: int = 32  # channels of the first convolution; the following ones double them
    reward_layers: int = 3  # hidden layers of the reward head (authors' code; the paper has 2)
    reward_units: int = 300  # their width (authors' code; the paper has 200)
    kl_free: float = 3.0  # free nats per time step
    kl_scale: float = 1.0  # weight of the KL
    reward_loss_scale: float = 10.0  # weight of the reward loss (authors' code; the paper has 1)
    overshooting: int = 0  # longest distance of latent overshooting (appendix D); 0 and 1: none
    overshooting_scale: float = 1.0  # its weight beta, shared by all distances
    # Planning
    plan_horizon: int = 12  # H, steps of a plan
    plan_iterations: int = 10  # refits of the cross-entropy method
    plan_candidates: int = 1000  # J, action sequences per refit
    plan_elites: int = 100  # K, best sequences, to which the next distribution is fitted
    action_noise: float = 0.3  # standard deviation of the exploration noise; [P]'s Normal(0, 0.3) means this
    # Learning
    buffer_size: int = 2_000_000  # replay capacity in rows; no more is allocated than the run can fill
    seed_episodes: int = 5  # episodes of random actions at the start
    initial_updates: int = 100  # updates before the first planned episode
    updates_per_episode: int = 100  # updates after each further episode
    batch_size: int = 50  # B, chunks per update
    batch_length: int = 50  # T, rows of a chunk
    learning_rate: float = 1e-3  # of Adam
    adam_eps: float = 1e-4  # of Adam
    max_grad_norm: float = 1000.0  # clip the global gradient norm


# A laptop: cartpole swing-up from its state instead of pixels, 66 thousand parameters, 8 planned episodes.
CPU = dict(
    pixels=False, total_timesteps=1_625, belief_size=64, state_size=16, hidden_size=64, reward_layers=2,
    reward_units=64, kl_free=1.0, plan_iterations=5, plan_candidates=300, plan_elites=30, batch_size=32,
    batch_length=25, initial_updates=500, updates_per_episode=150, eval_episodes=5, num_threads=1, log_every=125,
    save_every=500)
# Without shadows and reflections, which a machine without a GPU draws slowly.
CHEAP = ('{"render_kwargs": {"height": 32, "width": 32, "camera_id": 0, "render_flag_overrides": '
         '{"shadow": false, "reflection": false}}}')
PRESETS = dict(
    full=dict(),
    cpu=CPU,
    # The image path on a laptop, from end to end. NOTE: it does not learn to control: that takes thousands of updates
    # of full batches, hours without a GPU. It shows losses falling and dreams.
    cpu_pixels=CPU | dict(
        pixels=True, image_size=32, cnn_depth=8, batch_size=16, batch_length=20, eval_episodes=2, env_kwargs=CHEAP),
)
# The paper's action repeats (appendix A; balance: its first version), in environment steps per agent step.
ACTION_REPEAT = {
    "cartpole-swingup": 8, "cartpole-balance": 8, "reacher-easy": 4, "cheetah-run": 4, "finger-spin": 2,
    "ball_in_cup-catch": 4, "walker-walk": 2}
# fmt: on


def repeat_of(args):
    """Environment steps per agent step."""
    return args.action_repeat or ACTION_REPEAT.get(args.env_id.removeprefix("dm_control/").removesuffix("-v0"), 1)


# ---- Maths -----------------------------------------------------------------------------------------------------------


def preprocess(img, bits=5, noise=True):
    """Integers 0..255 of any shape -> reduced to `bits` bits, dequantised, float32 in [-0.5, 0.5). noise: True draws
    U(0, 1) anew, False adds none, a tensor (of the image's shape, or one number) is taken as it is."""
    # NOTE: the noise is part of the model's input, also when acting: a Gaussian decoder fits a continuous density, and
    # without it the density at the 32 levels could grow without bound.
    level = (img.int() >> (8 - bits)).float()
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


def masked_mean(x, mask=None):
    """Mean of x (...) over the steps where mask (...) is 1."""
    return x.mean() if mask is None else (x * mask).sum() / mask.sum().clamp(min=1)


def free_nats_loss(kl, free=3.0, mask=None):
    """Mean over all steps of max(0, kl - free): (...) -> scalar. `mask` (...): steps that count."""
    # NOTE: per step, after the sum over dimensions; clamping the mean would let some steps collapse.
    return masked_mean((kl - free).clamp(min=0), mask)


def reward_log_prob(mean, reward):
    """log N(reward; mean, 1) of each number: (...) -> (...)."""
    return -0.5 * (mean - reward) ** 2 - 0.5 * math.log(2 * math.pi)


def image_log_prob(mean, image):
    """log N(image; mean, 1) summed over the last three axes: (..., C, H, W) -> (...)."""
    constant = 0.5 * math.log(2 * math.pi) * math.prod(image.shape[-3:])
    return -0.5 * ((mean - image) ** 2).sum((-3, -2, -1)) - constant


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
    mean = torch.zeros(batch, horizon, action_dim, device=device)
    std = torch.ones_like(mean)
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


class ObsEncoder(nn.Sequential):
    """Observations, images (..., C, H, W) preprocessed or vectors (..., n) -> embedding (..., E). The space's shape is
    (H, W, C) or (n,)."""

    def __init__(self, shape, hidden=200, depth=32):
        if len(shape) == 3:
            widths = [shape[2], *(depth << i for i in range(len(KERNELS[shape[0]])))]
            convs = [glorot_(nn.Conv2d(a, b, 4, 2)) for a, b in zip(widths, widths[1:])]
            super().__init__(*(m for conv in convs for m in (conv, nn.ReLU())))
        else:
            super().__init__(*relu_mlp(shape[0], hidden, 1, hidden), nn.ReLU())
        self.out_dim = 4 * widths[-1] if len(shape) == 3 else hidden

    def forward(self, x):
        lead = x.dim() - (3 if isinstance(self[0], nn.Conv2d) else 1)
        # NOTE: 2x2 pixels are left and taken flat, without a dense layer. A movedim of stored images (..., H, W, C) is
        # what torch calls channels_last: a CPU convolves it in two thirds of the time.
        return super().forward(x.flatten(0, lead - 1)).flatten(1).unflatten(0, x.shape[:lead]).float()


class Deconv(nn.ConvTranspose2d):
    """Transposed convolution with stride 2, computed as a convolution with stride 1 that gives all four parities of
    output pixels as channels: the same function and the same products, a third faster on a CPU."""

    def __init__(self, i, o, kernel):
        super().__init__(i, o, kernel, 2)

    def forward(self, x):  # (N, i, H, W) -> (N, o, 2H + k - 2, 2W + k - 2), channels last in memory
        (i, o, k, _), side = self.weight.shape, x.shape[-1]
        if side == 1:
            y = x.flatten(1) @ self.weight.permute(0, 2, 3, 1).flatten(1)
            return y.view(-1, k, k, o).permute(0, 3, 1, 2) + self.bias[:, None, None]
        n, odd = (k + 1) // 2, k % 2
        w = F.pad(self.weight, (0, odd, 0, odd)).view(i, o, n, 2, n, 2)  # taps by distance and parity, both axes
        w = w.flip(2, 4).permute(3, 5, 1, 0, 2, 4).reshape(4 * o, i, n, n)  # channels: row parity, column parity, o
        y = F.conv2d(x, w, self.bias.repeat(4), padding=n - 1).permute(0, 2, 3, 1)  # (N, rows, columns, 4o)
        y = y.unflatten(3, (2, 2, o)).permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)  # parities interleaved
        return y[:, : 2 * side + k - 2, : 2 * side + k - 2].permute(0, 3, 1, 2)


class ObsDecoder(nn.Module):
    """Features (..., F) -> mean of the observation: images (..., C, H, W) in [-0.5, 0.5), or vectors (..., n)."""

    def __init__(self, shape, feature, hidden=200, depth=32):
        super().__init__()
        self.image = len(shape) == 3
        if self.image:
            kernels = KERNELS[shape[0]]
            n = len(kernels)
            widths = [depth << (n + 1), *(depth << i for i in reversed(range(n - 1))), shape[2]]
            self.start = dense(feature, widths[0])  # NOTE: linear; a 1x1 image with this many channels
            ups = [glorot_(Deconv(a, b, k)) for a, b, k in zip(widths, widths[1:], kernels)]
            self.net = nn.Sequential(*(m for up in ups for m in (up, nn.ReLU())))[:-1]
        else:
            self.net = relu_mlp(feature, hidden, 2, shape[0])

    def forward(self, feat):
        if not self.image:
            return self.net(feat).float()
        return self.net(self.start(feat).flatten(0, -2)[..., None, None]).float().unflatten(0, feat.shape[:-1])


class State(NamedTuple):
    """State of the RSSM: a sample of the stochastic part, its distribution, and the belief."""

    sample: torch.Tensor  # (..., S)
    mean: torch.Tensor  # (..., S)
    stddev: torch.Tensor  # (..., S)
    belief: torch.Tensor  # (..., D)

    @property
    def feat(self):
        return torch.cat([self.sample, self.belief], -1)  # (..., F)


class RSSM(nn.Module):
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

    def draw(self, x, belief, noise=None):
        """Reparameterised sample from a head's output (..., 2S), as a State."""
        mean, raw = x.chunk(2, -1)
        std = F.softplus(raw.contiguous()) + self.min_stddev  # strided input is 20 times slower on a CPU
        return State(torch.addcmul(mean, std, torch.randn_like(std) if noise is None else noise), mean, std, belief)

    def action_in(self, action):
        """The action's share of the first layer, for any number of steps at once: (..., A) -> (..., X)."""
        return F.linear(action, self.inp.weight[:, self.sample :], self.inp.bias)

    def embed_in(self, embed):
        """The embedding's share of the posterior's first layer: (..., E) -> (..., X)."""
        return F.linear(embed, self.post_in.weight[:, self.belief :], self.post_in.bias)

    def core(self, sample, belief, action_in):
        """The deterministic path: s (N, S), h (N, D), action_in (N, X) -> h' (N, D)."""
        x = (action_in + F.linear(sample, self.inp.weight[:, : self.sample])).relu_()
        return gru_cell(x, belief, self.w, self.b, self.w_c, self.b_c)

    def prior(self, state, action, noise=None):
        """One step without an observation: state (N, .), the action (N, A) taken in it -> State."""
        belief = self.core(state.sample, state.belief, self.action_in(action))
        return self.draw(self.prior_net(belief), belief, noise)

    def posterior(self, state, action, embed, noise=None):
        """One step with an observation: state (N, .), the action (N, A) that led to it, embedding (N, E) -> State."""
        return self.post_step(state.sample, state.belief, self.action_in(action), self.embed_in(embed), noise)

    def post_step(self, sample, belief, action_in, embed_in, noise=None):
        """`posterior` with the shares of action and embedding in their layers already computed."""
        belief = self.core(sample, belief, action_in)  # NOTE: the posterior sees the belief of the same step
        x = torch.relu(embed_in + F.linear(belief, self.post_in.weight[:, : self.belief]))
        return self.draw(self.post_out(x), belief, noise)

    def observe(self, embed, prev_action, state=None, generator=None):
        """Filter a sequence: embed (T, B, E), prev_action (T, B, A), the state before row 0 (default: zero). Returns
        prior and posterior, States (T, B, .)."""
        state, states = self.initial(embed.shape[1], embed.device) if state is None else state, []
        noise = torch.randn(*embed.shape[:2], self.sample, device=embed.device, generator=generator)
        # Only what depends on the state stays in the loop; embeddings and actions go through their layers as one batch.
        for inputs in zip(self.action_in(prev_action).unbind(), self.embed_in(embed).unbind(), noise.unbind()):
            state = self.post_step(state.sample, state.belief, *inputs)  # NOTE: goes on from the posterior's sample
            states.append(state)
        post = State(*(torch.stack(x) for x in zip(*states)))  # (T, B, .)
        noise = torch.randn(noise.shape, device=embed.device, generator=generator)
        return self.draw(self.prior_net(post.belief), post.belief, noise), post

    def imagine(self, state, actions, noise=None):
        """Roll the prior out: state (B, .), actions (H, B, A) -> States (H, B, .). noise: (H, B, S) or None."""
        states = []
        for t, action in enumerate(actions.unbind()):
            state = self.prior(state, action, None if noise is None else noise[t])
            states.append(state)
        return State(*(torch.stack(x) for x in zip(*states)))


Rssm = RSSM  # its name in the first edition


class Planet(nn.Module):
    """World model. obs_space: a Box of uint8 images (H, W, C) or of float vectors (n,); args: the flags of the world
    model."""

    def __init__(self, obs_space, action_dim, args):
        super().__init__()
        self.bits, self.action_dim, shape = args.bits, action_dim, obs_space.shape
        feature = args.belief_size + args.state_size
        self.encoder = ObsEncoder(shape, args.hidden_size, args.cnn_depth)
        sizes = args.belief_size, args.state_size, args.hidden_size, args.min_stddev
        self.rssm = RSSM(self.encoder.out_dim, action_dim, *sizes)
        self.decoder = ObsDecoder(shape, feature, args.hidden_size, args.cnn_depth)
        self.reward = relu_mlp(feature, args.reward_units, args.reward_layers, 1)

    def inputs(self, obs, noise=True):
        """Raw observations (..., H, W, C) uint8 or (..., n) -> what encoder and losses see, (..., C, H, W)."""
        return preprocess(obs, self.bits, noise).movedim(-1, -3) if obs.dtype == torch.uint8 else obs

    def predict_reward(self, feat):
        """(..., F) -> (...)."""
        if feat.device.type != "cpu":
            return self.reward(feat).squeeze(-1)
        # Blocks whose activations stay in the cache: twice as fast on a CPU.
        return torch.cat([self.reward(x) for x in feat.flatten(0, -2).split(1024)]).view(feat.shape[:-1])

    def plan_step(self, state, action):
        """One step of the planner's rollout: (sample (N, S), belief (N, D)), action (N, A) -> the next two."""
        state = self.rssm.prior(State(state[0], None, None, state[1]), action)
        return state.sample, state.belief


def count_params(model):
    """Trained parameters of a module."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def plan(model, sample, belief, args):
    """First actions (B, A) of the best plans from sample (B, S), belief (B, D)."""
    reward = lambda states: model.predict_reward(torch.cat(states, -1))  # noqa: E731
    settings = args.plan_horizon, args.plan_candidates, args.plan_iterations, args.plan_elites
    # NOTE: every step plans from scratch, from N(0, 1), from one sample of the posterior.
    return cem(model.plan_step, reward, (sample, belief), model.action_dim, *settings)[0][:, 0]


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


def overshooting_loss(rssm, post, prev_action, mask, distance, free):
    """KL of the posterior from priors of 2 to `distance` steps, each distance with its own mean and the weight
    1 / distances; distance 1 is the ordinary KL."""
    far, inside = overshooting(rssm, post, prev_action, distance)
    distances, T = inside.shape
    shifted = lambda x: torch.cat([x, x]).unfold(0, T, 1)[:distances].movedim(-1, 1)  # noqa: E731 (row t+d-1)
    # NOTE: the posterior is a fixed target here: only the priors learn to see further.
    kl = kl_divergence(shifted(post.mean.detach()), shifted(post.stddev.detach()), far.mean, far.stddev)
    valid = inside.unsqueeze(-1) * shifted(mask)
    excess = (kl - free).clamp(min=0) * valid  # (distances, T, B)
    return (excess.sum((1, 2)) / valid.sum((1, 2)).clamp(min=1))[1:].sum() / distances


def model_loss(model, batch, args):
    """Negative of the variational bound (eq. 3) on chunks {name: (T, B, ...)}. Returns the weighted terms, each a
    scalar: observations, reward and KL, and metrics."""
    mask = batch["mask"]  # (T, B): rows of episodes that are shorter than a chunk are repeated and do not count
    obs = model.inputs(batch["obs"])
    embed = model.encoder(obs)  # (T, B, E)
    losses = {}
    with torch.autocast(embed.device.type, enabled=False):  # dynamics, KL and reward in float32
        # NOTE: every chunk starts from the zero state, wherever it lies in its episode, and all its rows count: that
        # teaches filtering from nothing, which acting needs at the beginning of an episode.
        prior, post = model.rssm.observe(embed, batch["action"])
        reward = reward_log_prob(model.reward(post.feat).squeeze(-1), batch["reward"] * args.reward_scale)  # (T, B)
        # NOTE: gradients into both sides, no balancing, no stop-gradient.
        kl = kl_divergence(post.mean, post.stddev, prior.mean, prior.stddev)  # (T, B)
        if args.overshooting > 1:
            far = overshooting_loss(model.rssm, post, batch["action"], mask, args.overshooting, args.kl_free)
            losses["overshooting"] = args.overshooting_scale * far
    recon, image = model.decoder(post.feat), batch["obs"].dtype == torch.uint8
    log_prob = image_log_prob(recon, obs) if image else reward_log_prob(recon, obs).sum(-1)  # (T, B)
    # NOTE: smaller images have a larger loss, else the KL would outweigh them.
    losses["recon"] = -((64 / obs.shape[-1]) ** 2 if image else 1.0) * masked_mean(log_prob, mask)
    losses["reward"] = -args.reward_loss_scale * masked_mean(reward, mask)
    losses["kl"] = args.kl_scale * free_nats_loss(kl, args.kl_free, mask)
    metrics = {"kl_nats": masked_mean(kl, mask), "reward_mse": masked_mean(-2 * reward - math.log(2 * math.pi), mask)}
    return losses, {k: v.detach() for k, v in metrics.items()}


class Learner:
    """The model, its optimizer and the one update."""

    def __init__(self, model, args, device):
        self.model, self.args, self.device, self.params = model, args, device, list(model.parameters())
        # NOTE: eps 1e-4, not 1e-8: it matters at the scale of summed log-likelihoods.
        options = dict(eps=args.adam_eps, fused=True, capturable=device.type == "cuda")
        self.opt = torch.optim.Adam(self.params, args.learning_rate, **options)
        self.bf16 = args.bf16 and device.type == "cuda"
        self.bad = torch.zeros((), dtype=torch.bool, device=device)  # whether something was not finite, from then on

    def update(self, batch):
        """One optimizer step on chunks {name: (T, B, ...)}. Returns metrics as tensors on the device."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            losses, metrics = model_loss(self.model, batch, self.args)
        self.opt.zero_grad()
        sum(losses.values()).backward()
        norm = nn.utils.clip_grad_norm_(self.params, self.args.max_grad_norm)
        self.bad |= ~torch.isfinite(norm)
        self.opt.found_inf = self.bad.float()  # no step any more, decided on the device: nothing waits for it
        self.opt.step()
        return {k: v.detach() for k, v in losses.items()} | metrics | {"grad_norm": norm}

    def check(self, metrics, where):
        """Ends the run naming what was not finite, if something was. Waits for the device."""
        if self.bad:
            names = ", ".join(k for k, v in metrics.items() if not math.isfinite(v))
            names = names.replace("grad_norm", "gradient norm")
            raise SystemExit(f"not finite at {where}: {names}; no step was taken, ckpt.pt is from before it")

    def state_dict(self):
        return {"model": self.model.state_dict(), "opt": self.opt.state_dict()}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.opt.load_state_dict(state["opt"])
        self.opt.param_groups[0]["capturable"] = self.device.type == "cuda"  # the run may have begun on another device


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
    """Compile what runs step by step and the networks around it; capture whole updates and plans in CUDA graphs."""
    print("compiling: the first steps take a minute or more (--no-compile starts at once)", flush=True)
    model.rssm.post_step = torch.compile(model.rssm.post_step, dynamic=False)
    model.plan_step = torch.compile(model.plan_step, dynamic=False)
    for network in (model.encoder, model.decoder):
        network.compile(dynamic=False)  # in place: parameter names in checkpoints stay as they are
    learner.update, agent.plan = Graphed(learner.update), Graphed(agent.plan)


# ---- Replay ----------------------------------------------------------------------------------------------------------


class ReplayBuffer:
    """Whole episodes, one after the other in a ring of rows on `device`; the oldest make room."""

    def __init__(self, capacity, specs, device="cpu", seed=0):
        """capacity: rows; specs: {name: (shape, dtype)}."""
        self.capacity, self.device = capacity, torch.device(device)
        self.data = {k: torch.zeros(capacity, *s, dtype=d, device=device) for k, (s, d) in specs.items()}
        self.episodes, self.end = deque(), 0  # (first row, length) of each, and where the next one goes
        self.rng = np.random.default_rng(seed)

    def add(self, episode):
        """Append an episode {name: (length, ...)}; of one that is longer than the ring the beginning is dropped."""
        length = min(len(episode["reward"]), self.capacity)
        while self.episodes and sum(n for _, n in self.episodes) + length > self.capacity:
            self.episodes.popleft()
        rows = torch.arange(self.end, self.end + length, device=self.device) % self.capacity
        for name, data in self.data.items():
            data[rows] = torch.as_tensor(episode[name][-length:], device=self.device).to(data.dtype)
        self.episodes.append((self.end, length))
        self.end = (self.end + length) % self.capacity

    def sample(self, B, L, rng=None):
        """B chunks of L rows of one episode each, time first: {name: (L, B, ...)}, episodes uniformly, then offsets
        uniformly. In an episode that is shorter its last row is repeated, and "mask" (L, B) is 0 there."""
        rng = self.rng if rng is None else rng
        table = np.array(self.episodes)  # (episodes, 2)
        first, length = table[rng.integers(len(table), size=B)].T
        rows = rng.integers(np.maximum(length - L, 0) + 1) + np.arange(L)[:, None]  # (L, B)
        mask = torch.as_tensor((rows < length).astype(np.float32), device=self.device)
        rows = torch.as_tensor((first + np.minimum(rows, length - 1)) % self.capacity, device=self.device)
        return {k: v[rows] for k, v in self.data.items()} | {"mask": mask}

    def state_dict(self):
        rows = [(first + np.arange(n)) % self.capacity for first, n in self.episodes]
        rows = torch.as_tensor(np.concatenate(rows or [np.zeros(0, int)]), device=self.device)
        kept = {k: v[rows].cpu() for k, v in self.data.items()}
        return {"rows": kept, "lengths": [n for _, n in self.episodes], "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state):
        at = 0
        for n in state["lengths"]:
            self.add({k: v[at : at + n] for k, v in state["rows"].items()})
            at += n
        self.rng.bit_generator.state = state["rng"]


# ---- Environment -----------------------------------------------------------------------------------------------------


def resize(image, size):
    """(H, W, C) uint8 of any number of channels -> (size, size, C), bilinear, always a copy."""
    planes = [Image.fromarray(p).resize((size, size), Image.BILINEAR) for p in np.moveaxis(image, 2, 0)]
    return np.stack([np.asarray(p) for p in planes], 2)


def make_env(args, seed):
    """The environment as the agent sees it. Observations: uint8 images (size, size, C), with --no-pixels those of the
    environment if it has some, else float32 vectors (n,), all entries of a Dict joined; actions: Box(-1, 1). Raises
    ValueError with what was wanted and what was found. Episodes are functions of the seed of their reset and of the
    actions; a first reset without a seed goes on from `seed`."""
    *modules, name = args.env_id.split(":")
    family, kwargs = name.split("/")[0], json.loads(args.env_kwargs)
    for module in modules:
        importlib.import_module(module)
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # draw without a display
        os.environ.setdefault("MUJOCO_GL", "egl")
    if family == "dm_control":
        import shimmy  # noqa: F401 (registers its ids)

        camera = dict(height=args.image_size, width=args.image_size, camera_id=2 if "quadruped" in args.env_id else 0)
        kwargs = dict(render_kwargs=camera, render_mode="rgb_array") | kwargs
    creator = gym.spec(name).entry_point
    creator = gym.envs.registration.load_env_creator(creator) if isinstance(creator, str) else creator
    if "rgb_array" in getattr(creator, "metadata", {}).get("render_modes", ()):
        kwargs = dict(render_mode="rgb_array") | kwargs
    env = gym.make(name, disable_env_checker=True, **kwargs)
    env = gym.wrappers.TransformReward(env, lambda r: float(np.asarray(r).item()))  # some send arrays of one number
    # NOTE: the repeat lies inside of the picture: one per agent step, drawing is the expensive part.
    env = gym.wrappers.RepeatAction(env, repeat_of(args)) if repeat_of(args) > 1 else env
    env = gym.wrappers.AddRenderObservation(env) if args.pixels else env
    space, numbers = env.observation_space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
    if isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3:
        axis = 0 if space.shape[0] < min(space.shape[1:]) else 2  # of the channels: some have them in front
        box = spaces.Box(0, 255, (args.image_size, args.image_size, space.shape[axis]), np.uint8)
        see = lambda x: resize(np.moveaxis(x, axis, 2), args.image_size)  # noqa: E731
    else:
        parts = space.values() if isinstance(space, spaces.Dict) else [space]
        if not all(isinstance(s, numbers) for s in parts) or spaces.flatdim(space) > 4096:
            raise ValueError(f"observations must be uint8 images or up to 4096 numbers (or --pixels), found {space}")
        box = spaces.Box(-np.inf, np.inf, (spaces.flatdim(space),), np.float32)
        see = lambda x: np.array(spaces.flatten(space, x), np.float32)  # noqa: E731
    env, a = gym.wrappers.TransformObservation(env, see, box), env.action_space
    if not (isinstance(a, spaces.Box) and a.dtype.kind == "f"):
        raise ValueError(f"actions must be a float Box, found {a}; dreamerv3.py and muzero.py take Discrete ones")
    bounded = np.isfinite(a.low) & np.isfinite(a.high)
    low, high = (np.where(bounded, x, d).astype(float) for x, d in ((a.low, -1), (a.high, 1)))

    def rescale(x):  # stretch to the bounds, and never round beyond them
        x = low + (np.clip(np.reshape(x, a.shape), -1, 1) + 1) / 2 * (high - low)
        return np.clip(x.astype(a.dtype), a.low, a.high)

    env = gym.wrappers.TransformAction(env, rescale, spaces.Box(-1, 1, (math.prod(a.shape),), np.float32))
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

    def __init__(self, model, args, obs_space, device="cpu"):
        self.model, self.args, self.space, self.device = model, args, obs_space, device
        self.plan = lambda x: plan(model, x["sample"], x["belief"], args)

    def seed(self, seed):
        """Its noise comes from torch's generator."""
        torch.manual_seed(int(seed))

    def tensor(self, x):
        return torch.as_tensor(np.asarray(x), device=self.device)

    def decode(self, feat):
        """What the decoder sees, as observations of the environment's own type."""
        out = self.model.decoder(feat)
        out = ((out + 0.5) * 256).clamp(0, 255).byte().movedim(-3, -1) if len(self.space.shape) == 3 else out
        return out.cpu().numpy()

    @torch.no_grad()
    def act(self, obs, state, first, greedy=False):
        """obs (N, ...), state None at the start, first (N,): a new episode begins -> actions (N, A), state: sample and
        belief, and the executed actions. greedy: without exploration noise."""
        first, model = self.tensor(first), self.model
        sizes = self.args.state_size, self.args.belief_size, model.action_dim
        state = state or [torch.zeros(len(first), n, device=self.device) for n in sizes]
        sample, belief, action = (x * ~first[:, None] for x in state)
        embed = model.encoder(model.inputs(self.tensor(obs)))
        now = model.rssm.posterior(State(sample, None, None, belief), action, embed)
        if greedy:
            action = plan(model, now.sample, now.belief, self.args)
        else:  # NOTE: the next belief is computed from what was executed: with noise, clipped.
            action = self.plan(dict(sample=now.sample, belief=now.belief))
            action = (action + self.args.action_noise * torch.randn_like(action)).clamp(-1, 1)
        return action.cpu().numpy(), (now.sample, now.belief, action)

    @torch.no_grad()
    def observe(self, obs, actions):
        """Filter episodes from their beginning: obs (N, T, ...), actions (N, T-1, A) -> state after the last one, and
        what the posterior makes of each observation (N, T, ...)."""
        embed = self.model.encoder(self.model.inputs(self.tensor(obs).transpose(0, 1)))
        previous = F.pad(self.tensor(actions).float(), (0, 0, 1, 0)).transpose(0, 1)
        _, post = self.model.rssm.observe(embed, previous)
        return (post.sample[-1], post.belief[-1]), self.decode(post.feat.transpose(0, 1))

    @torch.no_grad()
    def imagine(self, state, actions):
        """One imagined transition of N dreams -> state, reward (N,), alive (N,): ends are not modelled, obs."""
        after = self.model.rssm.prior(State(state[0], None, None, state[1]), self.tensor(actions).float())
        reward = self.model.predict_reward(after.feat) / self.args.reward_scale
        alive = np.ones(len(reward), np.float32)
        return (after.sample, after.belief), reward.cpu().numpy(), alive, self.decode(after.feat)


def load(run, device="cpu"):
    """The Agent of a run directory."""
    state = load_checkpoint(run)
    args = Args(**state["args"])
    env = make_env(args, args.seed)
    model = Planet(env.observation_space, env.action_space.shape[0], args).to(device)
    model.load_state_dict(state["learner"]["model"])
    agent = Agent(model.eval(), args, env.observation_space, torch.device(device))
    agent.global_step, agent.random_return = state["loop"]["global_step"], state["loop"]["random_return"]
    env.close()
    return agent


# ---- Main ------------------------------------------------------------------------------------------------------------


def check_args(args):
    """What would end in a wrong result or an obscure error, before anything is created. -> an environment, and how many
    agent steps its episodes have (None: it has no limit)."""
    names = "num_envs batch_size batch_length eval_episodes log_every save_every learning_rate seed_episodes bits "
    names += "initial_updates plan_horizon plan_iterations plan_elites total_timesteps"
    rules = {name: (getattr(args, name) > 0, "more than 0") for name in names.split()}
    most = args.plan_candidates
    rules["plan_elites"] = 0 < args.plan_elites <= most, f"within 1 and --plan-candidates {most}"
    rules["buffer_size"] = args.buffer_size >= args.batch_length, f"at least --batch-length {args.batch_length}"
    rules["image_size"] = args.image_size in KERNELS, f"one of {', '.join(map(str, KERNELS))}"
    for name, (good, wanted) in rules.items():
        if not good:
            fail(f"--{name.replace('_', '-')} must be {wanted}, got {getattr(args, name)}")
    try:
        env = make_env(args, args.seed)
    except Exception as e:  # whatever it is, the environment cannot be used: its own words, in one line
        words = " ".join(f"--env-kwargs {args.env_kwargs} --seed {args.seed}: {type(e).__name__}: {e}".split())
        fail(f"--env-id {args.env_id} {words}")
    limit = env.spec.max_episode_steps or (1000 if args.env_id.startswith("dm_control/") else None)
    limit = args.max_episode_steps or limit and -(-limit // repeat_of(args))
    if args.total_timesteps <= args.seed_episodes * (limit or 1):
        fail(f"--total-timesteps must be beyond {args.seed_episodes} --seed-episodes, got {args.total_timesteps}")
    print(f"{args.env_id} has observations {env.unwrapped.observation_space}")
    print(f"the agent sees {env.observation_space} (images: --image-size), acts in {env.action_space}")
    return env, limit


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
    """Algorithm 1: collect episodes, fit the model to them, plan with it, repeat. Returns the final metrics."""
    # Set up, in an order that finds every mistake of the user's before the first file is made.
    args.total_timesteps = 1_000_000 // repeat_of(args) if args.total_timesteps is None else args.total_timesteps
    state = load_checkpoint(args.resume) if args.resume else None
    env, limit = check_args(args)
    space, action_space, N = env.observation_space, env.action_space, args.num_envs
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    seed_everything(args, device)
    with torch.device(device):
        model = Planet(space, action_space.shape[0], args)
    specs = dict(obs=(space.shape, getattr(torch, space.dtype.name)), action=(action_space.shape, torch.float32))
    # Rows that the run can fill: a step each, and a first row per episode, most of which are taken to reach the limit.
    rows = min(args.buffer_size, args.total_timesteps + args.total_timesteps // (limit or 1) + (limit or 0) + 1)
    need = rows * math.prod(space.shape) * space.dtype.itemsize
    on_gpu = device.type == "cuda" and need < 0.8 * torch.cuda.mem_get_info()[0]
    replay = ReplayBuffer(rows, specs | dict(reward=((), torch.float32)), device if on_gpu else "cpu", args.seed)
    run, writer = start_run(args, args.env_id, device, state and state["loop"]["global_step"] + 1)
    stop, envs, learner = stop_signals(), make_envs(args, N, 0), Learner(model, args, device)
    agent = Agent(model, args, space, device)
    parts = ", ".join(f"{n} {count_params(getattr(model, n)):,}" for n in ("encoder", "rssm", "decoder", "reward"))
    print(f"run: {run} on {device}\nparameters: {count_params(model):,} ({parts})")
    print(f"replay: {replay.capacity:,} rows; {repeat_of(args)} environment steps per agent step", flush=True)
    carry = None
    if state:
        c, carry = SimpleNamespace(**state["loop"]), state["now"] and [x.to(device) for x in state["now"]]
        learner.load_state_dict(state["learner"])
        replay.load_state_dict(state["replay"])
        action_space.np_random.bit_generator.state = c.draws
        print(f"resumed at step {c.global_step} of {args.total_timesteps}, update {c.updates}", flush=True)
    else:
        action_space.seed(args.seed)
        draw = lambda obs, state, first: (np.stack([action_space.sample() for _ in first]), state)  # noqa: E731
        returns = evaluate(args, draw, 2, "random policy", stop)
        if stop:
            raise SystemExit(128 + stop[0])
        print(f"random policy: {returns.mean():.1f} +- {returns.std():.1f} over {len(returns)} episodes", flush=True)
        c = SimpleNamespace(global_step=0, updates=0, due=0, seconds=0.0, recent=[], metrics={})
        c.random_return, c.episode, c.history = float(returns.mean()), [0] * N, [[] for _ in range(N)]
    rows = []  # of the episodes in progress: a resumed run repeats them, from their seeds and the actions since then
    for i, env in enumerate(envs.envs):
        obs, _ = env.reset(seed=episode_seed(args, 0, i, c.episode[i]))
        rows.append([dict(obs=obs, action=np.zeros(action_space.shape, np.float32), reward=0.0)])
        for action in np.array(c.history[i], np.float32):
            obs, reward, *_ = env.step(action)
            rows[i].append(dict(obs=obs, action=action, reward=reward))
    obs, first = np.stack([past[-1]["obs"] for past in rows]), np.array([len(past) == 1 for past in rows])
    if state:
        set_rng_state(state["rng"])
    if args.compile and device.type == "cuda":
        compile_model(model, learner, agent)
    ended, start = [], time.time()
    mark = start, c.global_step, c.updates  # of the last log line

    while c.global_step < args.total_timesteps or c.due:
        # Collect: at random first, then by planning with exploration noise.
        if not c.due:
            if sum(c.episode) < args.seed_episodes:
                actions = np.stack([action_space.sample() for _ in range(N)])
            else:
                actions, carry = agent.act(obs, carry, first)
            obs, reward, terminated, truncated, infos = envs.step(actions)
            for i in range(N):
                rows[i].append(dict(obs=obs[i], action=actions[i], reward=reward[i]))
                c.history[i].append(actions[i].tolist())
            c.global_step, first = c.global_step + N, terminated | truncated
            for i in np.flatnonzero(first):
                replay.add({k: np.stack([row[k] for row in rows[i]]) for k in rows[i][0]})
                ended.append(float(infos["episode"]["r"][i]))
                writer.add_scalar("charts/episodic_return", ended[-1], c.global_step)
                writer.add_scalar("charts/episodic_length", int(infos["episode"]["l"][i]), c.global_step)
                c.episode[i], c.history[i] = c.episode[i] + 1, []
                beyond = sum(c.episode) - args.seed_episodes
                c.due += args.updates_per_episode if beyond > 0 else args.initial_updates if beyond == 0 else 0
                c.recent = [*c.recent[-9:], ended[-1]] if beyond > 0 else []
            if first.any():
                seeds = [episode_seed(args, 0, i, c.episode[i]) for i in range(N)]
                obs, _ = envs.reset(seed=seeds, options={"reset_mask": first})
                for i in np.flatnonzero(first):  # NOTE: nothing led to the first row
                    rows[i] = [dict(obs=obs[i], action=np.zeros_like(actions[i]), reward=0.0)]

        # Fit the model to chunks of past episodes. On a GPU metrics are not read here: reading waits for the device.
        clock = time.time()
        while c.due and not stop:
            batch = replay.sample(args.batch_size, args.batch_length)
            c.metrics = learner.update({k: v.to(device) for k, v in batch.items()})
            c.updates, c.due = c.updates + 1, c.due - 1
            if device.type == "cpu":
                learner.check(c.metrics, f"step {c.global_step}, update {c.updates}")
            if time.time() > clock + 10:
                print(
                    f"step {c.global_step}, {c.due} updates to go, reward_mse={c.metrics['reward_mse']:.3f}", flush=True
                )
                clock = time.time()

        # Log and save.
        over = c.global_step >= args.total_timesteps
        log, save = (not c.due and (over or c.global_step % e < N) for e in (args.log_every, args.save_every))
        if log or save or stop:
            learner.check(c.metrics, f"step {c.global_step}, update {c.updates}")
        if log:
            seconds = time.time() - mark[0]
            charts = dict(SPS=(c.global_step - mark[1]) / seconds, updates_per_s=(c.updates - mark[2]) / seconds)
            charts["episodes"] = sum(c.episode)
            for tag, value in (charts | c.metrics).items():
                writer.add_scalar(f"{'charts' if tag in charts else 'losses'}/{tag}", float(value), c.global_step)
            shown = f"{np.mean(ended):.1f} ({len(ended)} episodes)" if ended else "no episode ended since the last line"
            line = f"global_step={c.global_step}, episodic_return={shown}, updates={c.updates}, SPS={charts['SPS']:.0f}"
            print(line, flush=True)
            mark, ended = (time.time(), c.global_step, c.updates), []
        if save or stop:
            c.seconds, start = c.seconds + time.time() - start, time.time()
            c.draws, c.metrics = action_space.np_random.bit_generator.state, {k: float(v) for k, v in c.metrics.items()}
            parts = dict(learner=learner.state_dict(), replay=replay.state_dict(), now=carry, loop=vars(c))
            save_checkpoint(parts | dict(script="planet_cem", args=asdict(args)), run)
        leave(run, stop)
    envs.close()
    if not c.updates:
        print("--total-timesteps ended before the --seed-episodes: nothing was learned")
    return finish(args, c, agent, run, writer, stop)


if __name__ == "__main__":
    train(parse_args(Args, PRESETS, __doc__.split("\n\nDeviations")[0]))
