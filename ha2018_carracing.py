# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch>=2.11,<2.14", "numpy>=2", "tyro>=1", "tensorboard>=2.20", "pillow>=10", "cma>=4", "ale-py>=0.11",
#     "minatar>=1.0.15", "gymnasium[box2d,classic-control]>=1.3,<2", "dm_control==1.0.50", "mujoco==3.17.0",
#     "vizdoom>=1.3",
# ]
# ///
"""World Models (Recurrent World Models Facilitate Policy Evolution).
Ha, Schmidhuber. NeurIPS 2018; sections and appendices as in arXiv:1803.10122v4.

V, a variational autoencoder, compresses each frame to a vector z. M, an LSTM with a mixture density output, foresees
the next z. C, one linear layer on what V and M know, is evolved by CMA-ES: on CarRacing in the real environment
(section 3), on VizDoom Take Cover entirely inside M's dream, whose temperature keeps C from exploiting its mistakes
(section 4).

    python ha2018_carracing.py                                        # CarRacing, the paper's setting, on a GPU
    python ha2018_carracing.py --preset takecover                     # VizDoom Take Cover, evolved inside the dream
    python ha2018_carracing.py --preset cpu                           # CarRacing on a laptop, minutes
    python ha2018_carracing.py --preset cpu_dream                     # CartPole from pixels, evolved inside the dream
    python ha2018_carracing.py --stage vae                            # stop after V; --resume RUN goes on with M
    python ha2018_carracing.py --from-run runs/NAME --temperature 1.3 # another C in the world of a finished run
    python ha2018_carracing.py --evaluate runs/NAME --tau-table       # the paper's table: dream and real score by tau
    python ha2018_carracing.py --resume runs/NAME                     # go on, bit for bit on a CPU
    python ha2018_carracing.py --evaluate runs/NAME                   # returns of fresh episodes
    python ha2018_carracing.py --play runs/NAME                       # play inside the dream

Measured: see the README's result table; every row has its command, commit, hardware and seeds.

Paper [P], authors' code [O] (hardmaru/WorldModelsExperiments) and this file, where they are not all the same:
  * V is trained for 10 epochs and M for 40 (CarRacing) or 400 (Doom), as [O]; [P] says 1 and 20.
  * V's KL is free up to half a nat per dimension of z, summed, per frame: in [O], not in [P].
  * Doom's dream has temperature 1.15, the best of [P]'s table; [O] has 1.25.
  * A frame is cropped, resized with antialiasing and divided by 255. [O]'s image library stretched the contrast of each
    frame and the inversion after it wrapped around; that was an accident.
  * An episode ends where its environment says so; [O] drives on for 1000 frames while it collects.
  * The state is zeroed at the beginning of an episode; [O] put the state of the previous batch there.
  * Doom's end has no picture (the screen is black): M foresees the end there, not the frame.
  * All 64 candidates play the same 16 episodes of a generation; in [O] pairs of them do.
  * [O]'s wrapper of CMA-ES added 0.01 times the mean square of the weights to the fitness (meant as a penalty).
  * Log standard deviations of M are at least -7.
  * Only an episode that terminated teaches the done head an end; [O] also counts timeouts.
  * The noise of M's target z is not that of the same z as the next input; the expected loss is the same.
  * The reward head, which lets C be evolved in the dream of any environment, and --iterations (collect with C, train V
    and M on all of it, evolve C again, after [P]'s section 5, where M also predicts rewards and ends) are not in [O].

Symbols in shape comments:
  T  time                              Z  size of z                     H  units of the LSTM (h and c)
  B  batch                             K  components of a mixture       A  numbers that describe an action
  P  candidates of a generation        R  rollouts of each              N  rows of a dataset
Time convention, everywhere: z[t] is what was seen, action[t] what was done then, reward[t] and done[t] what followed,
z[t+1] is what was seen next; restart[t] is 1 if z[t] is the first of its episode. C acts on the h and c from before M
saw (z[t], action[t]).
"""

import atexit
import contextlib
import ctypes
import functools
import io
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
import tempfile
import threading
import time
import traceback
import types
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal, Optional

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from PIL import Image, ImageDraw
from torch import nn

# ---- Args and presets ------------------------------------------------------------------------------------------------


# A default without a source is both the paper's and the authors' code's, for CarRacing.
@dataclass
class Args:
    # ---- Experiment
    exp_name: str = "ha2018_carracing"
    """name of the experiment, part of the run directory"""
    preset: Literal["full", "takecover", "cpu", "cpu_dream"] = "full"
    """named settings; explicit flags win over them"""
    seed: int = 1
    """seed of everything random: networks, noise, evolution, environments"""
    torch_deterministic: bool = True
    """deterministic cuDNN kernels"""
    cuda: bool = True
    """use the GPU if there is one"""
    compile: bool = True
    """torch.compile V, and on a GPU capture the updates of V and M and the dream in CUDA graphs"""
    bf16: bool = True
    """V in bfloat16 on a GPU (M and the likelihoods stay float32); on a CPU always float32"""
    num_threads: Optional[int] = None
    """CPU threads of torch (default: torch's own choice)"""
    num_workers: Optional[int] = None
    """processes that step environments (default: one per CPU core; 1: none but this one)"""
    env_timeout: float = 120.0
    """seconds after which an environment process that does not answer is given up"""
    track: Optional[Literal["wandb", "trackio"]] = None
    """also send the curves to this tracker (needs its package)"""
    wandb_project_name: str = "world-models"
    """project name for --track"""
    wandb_entity: Optional[str] = None
    """team for --track wandb"""
    capture_video: bool = False
    """write one episode of the final evaluation as a GIF"""
    stage: Literal["all", "collect", "vae", "rnn", "controller"] = "all"
    """stop after this stage; --resume goes on"""
    save_every: int = 1_000
    """updates of V and M between checkpoints"""
    save_generations: int = 5
    """generations of C between checkpoints"""
    from_run: Optional[str] = None
    """run directory whose episodes, V and M are taken: only C is evolved"""
    resume: Optional[str] = None
    """run directory to continue"""
    evaluate: Optional[str] = None
    """run directory to evaluate, nothing is trained"""
    play: Optional[str] = None
    """run directory whose dream is played with the keyboard"""
    tau_table: bool = False
    """with --evaluate: evolve a C inside the run's dream at each of --temperatures; writes the paper's table"""
    target_return: Optional[float] = None
    """exit with code 1 if the final evaluation stays below this"""

    # ---- Environment
    env_id: str = "CarRacing-v3"
    """any gymnasium id with one image to see (or --pixels) and Discrete or Box actions, `module:Id-v0`,
    VizdoomTakeCover-v1, or SmallCartPole-v0: CartPole drawn small"""
    env_kwargs: str = "{}"
    """JSON object passed to gymnasium.make"""
    action_repeat: int = 1
    """environment steps per agent step"""
    pixels: bool = False
    """observe rendered images instead of the environment's own observation"""
    image_size: int = 64
    """pixels per side; V is built for 64"""
    fast_render: bool = True
    """CarRacing: draw small pictures directly, ten times faster, physics and rewards the same. The reported evaluation
    always uses the environment's own pictures"""
    max_episode_steps: Optional[int] = None
    """agent steps after which an episode, real or dreamed, is truncated (default: the environment's own limit)"""
    num_envs: int = 256
    """environments in lockstep; episodes beyond that wait for a free one"""

    # ---- World model: data
    collect_episodes: int = 10_000
    """episodes to collect"""
    collect_policy: Literal["agent", "hold", "momentum"] = "agent"
    """who plays them. agent: V, M and C with random weights, new ones for each episode (authors' CarRacing); hold:
    uniform actions, each held for 1 to 10 steps (authors' Doom); momentum: a random walk"""
    min_episode_steps: int = 1
    """episodes with fewer steps are dropped (authors' Doom: 101)"""
    data_gb: float = 60.0
    """most that the compressed episodes may take on the disk; collecting stops there"""
    buffer_size: int = 1_000_000
    """frames in memory (12 kB each) while V is trained; if there are more, groups of episodes take turns"""
    iterations: int = 1
    """1: the paper's experiments; more: collect as many episodes again with C, train V and M on all, evolve C again"""
    explore: float = 0.05
    """in half of the later episodes: chance per step that C gives way to random actions, held as in `hold`"""

    # ---- World model: V and M
    latent_size: int = 32
    """Z"""
    vae_depth: int = 32
    """channels of V's first convolution; the following ones have 2, 4 and 8 times as many"""
    kl_tolerance: float = 0.5
    """free nats per dimension of z; they are summed and free per frame (authors' code)"""
    vae_epochs: int = 10
    """passes over all frames (authors' code; the paper says 1)"""
    vae_batch_size: int = 100
    """frames per update"""
    vae_learning_rate: float = 1e-4
    """of Adam"""
    rnn_size: int = 256
    """H"""
    num_mixtures: int = 5
    """K, Gaussians per dimension of z"""
    rnn_epochs: int = 40
    """passes over all steps (authors' code: 4,000 updates; the paper says 20 epochs)"""
    rnn_batch_size: int = 100
    """B, rows into which the stream of all episodes is cut"""
    rnn_batch_length: int = 999
    """T, steps of a row per update; the state is carried over to the next ones"""
    rnn_learning_rate: float = 1e-3
    """of Adam"""
    rnn_lr_decay: float = 1.0
    """the learning rate falls towards 1e-5 by this factor per update (authors' Doom: 0.99999)"""
    rnn_grad_clip: float = 1.0
    """each element of M's gradient is clipped to this (authors' code)"""
    train_rnn: bool = True
    """--no-train-rnn leaves M's weights random: on CarRacing a reservoir of recent z does nearly as well"""
    predict_done: bool = False
    """M foresees the end of an episode, and is told where one begins"""
    predict_reward: bool = False
    """M foresees the reward; without it every step of a dream counts 1, as in Take Cover"""
    done_weight: float = 10.0
    """weight of ends in the loss of the done head (authors' code)"""

    # ---- Behavior
    dream: bool = False
    """evolve C inside the dream"""
    temperature: float = 1.15
    """tau of the dream (table 2)"""
    temperatures: str = "0.1,0.5,1.0,1.15,1.3"
    """those of --tau-table"""
    sample_latent: bool = True
    """in the real environment C and M see a sample of z (authors' code); --no-sample-latent: its mean"""
    controller_input: Literal["z", "zh", "zch"] = "zh"
    """what C sees of z, M's cell state c and M's output h (Doom: zch)"""
    controller_hidden: int = 0
    """tanh units of a hidden layer of C; 0: none. The paper's ablation has 40, on z"""
    controller_bias: bool = True
    """C has a bias (Doom: none)"""
    generations: int = 1_800
    """generations of CMA-ES; 200 are nearly as good"""
    popsize: int = 64
    """P, candidates per generation"""
    rollouts: int = 16
    """R, episodes per candidate, the same for all"""
    sigma_init: float = 0.1
    """first standard deviation of CMA-ES"""

    # ---- Evaluation and logging
    eval_every: int = 25
    """generations between evaluations of the mean of the distribution; the best of them is the result"""
    eval_rollouts: int = 1_024
    """episodes of such an evaluation"""
    eval_episodes: int = 100
    """real episodes of the final evaluation, of --evaluate and of the random baseline"""
    log_every: int = 100
    """updates between log lines"""


# fmt: off
PRESETS = {
    "full": {},
    # The paper's second experiment (section 4). An episode of 2018 had at most 2100 steps.
    "takecover": dict(
        env_id="VizdoomTakeCover-v1", max_episode_steps=2_100, collect_policy="hold", min_episode_steps=101,
        latent_size=64, rnn_size=512, rnn_epochs=400, rnn_batch_length=500, rnn_lr_decay=0.99999, dream=True,
        predict_done=True, controller_input="zch", controller_bias=False,
    ),
    # A laptop: CarRacing with four frames per step and 300 frames per episode, all networks small.
    "cpu": dict(
        action_repeat=4, max_episode_steps=75, num_envs=48, num_workers=1, num_threads=1, compile=False,
        collect_episodes=120, collect_policy="momentum", latent_size=16, vae_depth=8, vae_epochs=4, vae_batch_size=64,
        vae_learning_rate=1e-3, rnn_size=64, rnn_epochs=80, rnn_batch_size=32, rnn_batch_length=75,
        rnn_learning_rate=3e-3, generations=16, popsize=16, rollouts=3, eval_every=4, eval_rollouts=12,
        eval_episodes=24, save_every=200, sample_latent=False,
    ),
}
# A laptop, learning inside the dream: CartPole from pixels. Its velocities are in no frame, so M has to find them. A
# hundred random episodes of a dozen steps make a world with mistakes: see what --tau-table says of it.
PRESETS["cpu_dream"] = PRESETS["cpu"] | dict(
    env_id="SmallCartPole-v0", action_repeat=1, max_episode_steps=200, num_envs=64, collect_episodes=100,
    collect_policy="hold", vae_epochs=24, rnn_epochs=200, rnn_batch_size=8, rnn_batch_length=20, dream=True,
    predict_done=True, controller_input="zch", sample_latent=True, generations=40, popsize=32, rollouts=16,
    eval_every=10, eval_rollouts=64, eval_episodes=50, temperature=1.15,
)
# Allowed values, both ends included; checked before anything is created. Fields that are None are skipped.
RANGES = {
    **dict.fromkeys(
        "num_threads num_workers save_every save_generations action_repeat max_episode_steps num_envs "
        "collect_episodes min_episode_steps buffer_size iterations latent_size vae_depth vae_batch_size rnn_size "
        "num_mixtures rnn_batch_size generations rollouts eval_every eval_rollouts eval_episodes log_every".split(),
        (1, math.inf),
    ),
    **dict.fromkeys("vae_epochs rnn_epochs controller_hidden".split(), (0, 10**9)),
    **dict.fromkeys("vae_learning_rate rnn_learning_rate".split(), (1e-12, 1)),
    **dict.fromkeys("env_timeout data_gb rnn_grad_clip sigma_init".split(), (1e-9, 1e9)),
    **dict.fromkeys("kl_tolerance done_weight".split(), (0, 1e9)),
    **{"seed": (0, 2**32 - 1), "image_size": (64, 64), "rnn_lr_decay": (0, 1), "explore": (0, 1)},
    **{"popsize": (4, math.inf), "rnn_batch_length": (2, math.inf), "temperature": (1e-3, 10)},
    **{"target_return": (-1e300, 1e300)},
}
# fmt: on


# ---- Maths -----------------------------------------------------------------------------------------------------------


def process_frame(frame, crop=None):
    """A frame (height, width, 3) uint8 -> (64, 64, 3) uint8. crop: rows that are kept, `n` for the first n or a pair
    (first, end); None: all."""
    if crop is not None:
        frame = frame[slice(*crop)] if isinstance(crop, (tuple, list)) else frame[:crop]
    # NOTE: PIL's bilinear resize averages over all pixels that fall into one (antialiasing). One that interpolates
    # between four neighbours drops fireballs and kerbs of one pixel.
    return np.asarray(Image.fromarray(np.ascontiguousarray(frame)).resize((64, 64), Image.BILINEAR))


def unit_images(frames):
    """(..., 64, 64, 3) uint8 -> (..., 3, 64, 64) float32 in 0..1."""
    # NOTE: frames are stored as integers and scaled here and nowhere else: a phase that sees 0..255 where another saw
    # 0..1 fails without a word.
    return frames.movedim(-1, -3).float() / 255


def vae_loss(x, recon, mu, logvar, kl_tolerance=0.5):
    """x, recon (B, 3, 64, 64), mu, logvar (B, Z) -> squared error and KL from N(0, 1), both summed per frame and
    averaged over frames. Up to kl_tolerance * Z nats are free."""
    r_loss = ((x - recon) ** 2).flatten(1).sum(1).mean()
    kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(1)  # (B,)
    # NOTE: the floor is under the sum over z of each frame; not per dimension, not under the mean of the batch.
    return r_loss, kl.clamp(min=kl_tolerance * mu.shape[1]).mean()


def sample_z(mu, logvar, eps):
    """z ~ N(mu, exp(logvar)) from standard normal eps, all (..., Z)."""
    return mu + (logvar / 2).exp() * eps


def lstm_step(x, c, h, weight, bias):
    """One step: x (B, X), c, h (B, H), weight (X + H, 4 H), bias (4 H) -> c', h'."""
    return lstm_gates(torch.addmm(bias, torch.cat([x, h], -1), weight), c)


def lstm_gates(gates, c):
    """Pre-activations (B, 4 H) and c (B, H) -> c', h'. One bias per gate, forget bias 1 inside the sigmoid (as in
    TensorFlow's layer-norm LSTM without the layer norm)."""
    i, j, f, o = gates.chunk(4, -1)
    # NOTE: nn.LSTM has two biases and adds no 1: another number of parameters and, at first, a much shorter memory.
    c = c * (f + 1).sigmoid() + i.sigmoid() * j.tanh()
    return c, c.tanh() * o.sigmoid()


def mdn_log_prob(logmix, mean, logstd, target):
    """log sum_k pi_k N(target; mean_k, exp(logstd_k)): parameters (..., Z, K), target (..., Z) -> (..., Z)."""
    # NOTE: a mixture of its own for every dimension of z. One mixture over the whole vector is another model, whose
    # temperature would act on K numbers only.
    normal = -0.5 * ((target.unsqueeze(-1) - mean) * (-logstd).exp()) ** 2 - logstd - 0.5 * math.log(2 * math.pi)
    return (logmix.log_softmax(-1) + normal).logsumexp(-1)


def mdn_nll(logmix, mean, logstd, target, mask=None):
    """Negative log-likelihood in nats per dimension of z, a scalar: the mean over dimensions and over all steps or,
    with mask (...), over those where it is 1."""
    nll = -mdn_log_prob(logmix, mean, logstd, target).mean(-1)
    return nll.mean() if mask is None else (nll * mask).sum() / mask.sum().clamp(min=1)


def sample_mdn(logmix, mean, logstd, temperature=1.0, uniform=None, eps=None, generator=None):
    """Draw z (..., Z) from mixtures (..., Z, K) at temperature tau, a number or (...) broadcastable to (..., Z, 1).
    uniform, eps (..., Z): the random numbers, drawn here if they are missing."""
    shape, device = mean.shape[:-1], mean.device
    uniform = torch.rand(shape, device=device, generator=generator) if uniform is None else uniform
    eps = torch.randn(shape, device=device, generator=generator) if eps is None else eps
    # NOTE: tau divides the log weights BEFORE the softmax, and its square root multiplies the noise (section 4.2).
    cdf = (logmix.log_softmax(-1) / temperature).softmax(-1).cumsum(-1)
    k = (uniform.unsqueeze(-1) > cdf[..., :-1]).sum(-1, keepdim=True)  # inverse of the distribution function
    mean, std = mean.gather(-1, k).squeeze(-1), logstd.gather(-1, k).squeeze(-1).exp()
    root = temperature.sqrt().squeeze(-1) if torch.is_tensor(temperature) else math.sqrt(temperature)
    return mean + std * root * eps


def done_loss(logit, done, weight=10.0, mask=None):
    """Cross entropy of the done head, ends weighted: logit, done (...) -> scalar."""
    loss = F.binary_cross_entropy_with_logits(logit, done, reduction="none") * (1 + (weight - 1) * done)
    return loss.mean() if mask is None else (loss * mask).sum() / mask.sum().clamp(min=1)


def car_action(pre):
    """CarRacing's action from C's three outputs (..., 3): steering in [-1, 1], gas and brake in [0, 1]."""
    steer, gas, brake = pre.tanh().unbind(-1)
    return torch.stack([steer, (gas + 1) / 2, brake.clamp(0, 1)], -1)


def doom_buttons(a):
    """Take Cover's Discrete action from C's one output in [-1, 1]: 2 (left) below -1/3, 1 (right) above 1/3, else 0."""
    return np.where(np.asarray(a) < -1 / 3, 2, np.where(np.asarray(a) > 1 / 3, 1, 0))


def unflatten(theta, pop, outputs=3, bias=True):
    """Parameter vectors of `pop` linear controllers (pop, n) -> biases (pop, outputs) or None, weights (pop, inputs,
    outputs). The vector has the biases first, then the weights row by row."""
    theta = theta.view(pop, -1)
    return (theta[:, :outputs] if bias else None), theta[:, outputs * bias :].unflatten(1, (-1, outputs))


# ---- Networks --------------------------------------------------------------------------------------------------------


def glorot(*weights):
    """TensorFlow's default: uniform with variance 2 / (fan in + fan out), of a vector 1 / its length."""
    for w in weights:
        limit = math.sqrt(6 / (2 * w.numel())) if w.dim() == 1 else None
        nn.init.xavier_uniform_(w) if limit is None else nn.init.uniform_(w, -limit, limit)


class Vae(nn.Module):
    """V (appendix A.1, figure 22): images (B, 3, 64, 64) in 0..1. No padding, stride 2 everywhere."""

    def __init__(self, latent_size=32, depth=32):
        super().__init__()
        d, Z = depth, latent_size
        sizes = [(3, d), (d, 2 * d), (2 * d, 4 * d), (4 * d, 8 * d)]
        self.encoder = nn.ModuleList(nn.Conv2d(i, o, 4, 2) for i, o in sizes)  # 64 -> 31 -> 14 -> 6 -> 2
        self.mu, self.logvar = nn.Linear(32 * d, Z), nn.Linear(32 * d, Z)
        self.dense = nn.Linear(Z, 32 * d)
        sizes = [(32 * d, 4 * d, 5), (4 * d, 2 * d, 5), (2 * d, d, 6), (d, 3, 6)]
        self.decoder = nn.ModuleList(nn.ConvTranspose2d(i, o, k, 2) for i, o, k in sizes)  # 1 -> 5 -> 13 -> 30 -> 64
        for layer in (*self.encoder, *self.decoder, self.mu, self.logvar, self.dense):
            glorot(layer.weight)
            nn.init.zeros_(layer.bias)

    def encode(self, x):
        """-> mu, logvar (B, Z)"""
        for layer in self.encoder:
            x = layer(x).relu()
        x = x.flatten(1)  # (B, 32 depth)
        return self.mu(x), self.logvar(x)

    def decode(self, z):
        """(B, Z) -> images (B, 3, 64, 64) in 0..1"""
        x = self.dense(z)[..., None, None]  # NOTE: no ReLU here, unlike in most re-implementations
        for layer in self.decoder[:-1]:
            x = layer(x).relu()
        return self.decoder[-1](x).sigmoid()

    def forward(self, x, eps):
        """x, eps (B, Z) -> reconstruction, mu, logvar"""
        mu, logvar = self.encode(x)
        return self.decode(sample_z(mu, logvar, eps)), mu, logvar


class MdnRnn(nn.Module):
    """M (appendix A.2): an LSTM whose output is a mixture of K Gaussians for each dimension of the next z and, if
    wanted, the logit of the end of the episode and the reward. With a done head it is told where episodes begin."""

    def __init__(self, latent_size=32, action_size=3, hidden_size=256, num_mixtures=5, done=False, reward=False):
        super().__init__()
        self.Z, self.H, self.K, self.done, self.reward = latent_size, hidden_size, num_mixtures, done, reward
        self.inputs = latent_size + action_size + done
        self.weight = nn.Parameter(torch.empty(self.inputs + self.H, 4 * self.H))
        self.bias = nn.Parameter(torch.empty(4 * self.H))
        self.out = nn.Linear(self.H, 3 * self.K * self.Z + done + reward)
        glorot(self.weight, self.bias, self.out.weight, self.out.bias)

    def initial(self, *shape, device=None):
        """c, h of zeros"""
        return torch.zeros(*shape, self.H, device=device), torch.zeros(*shape, self.H, device=device)

    def join(self, z, action, restart):
        """The input of a step: z (..., Z), action (..., A), restart (...) -> (..., inputs)"""
        return torch.cat([z, action] + ([restart.unsqueeze(-1)] if self.done else []), -1)

    def lstm_step(self, x, c, h):
        return lstm_step(x, c, h, self.weight, self.bias)

    def forward(self, x, c, h, restart):
        """x (T, B, inputs), c, h (B, H) from before, restart (T, B) -> all h' (T, B, H), the last c', h'."""
        gates = x @ self.weight[: self.inputs] + self.bias  # (T, B, 4H): all inputs at once, only h has to wait
        keep, recurrent, hidden = (1 - restart).unsqueeze(-1), self.weight[self.inputs :], []
        for t in range(len(x)):
            c, h = lstm_gates(torch.addmm(gates[t], h * keep[t], recurrent), c * keep[t])  # zeros at each beginning
            hidden.append(h)
        return torch.stack(hidden), c, h

    def heads(self, h):
        """h (..., H) -> logmix, mean, logstd (..., Z, K), done logit (...) or None, reward (...) or None."""
        out = self.out(h)
        extra = out[..., : self.done + self.reward]  # NOTE: the done logit is column 0, as in the authors' code
        logmix, mean, logstd = out[..., self.done + self.reward :].unflatten(-1, (self.Z, 3 * self.K)).chunk(3, -1)
        # NOTE: the floor changes nothing but for NaN: a log-std without one runs away in long sequences.
        logits = extra[..., 0] if self.done else None
        return logmix, mean, logstd.clamp(min=-7.0), logits, extra[..., -1] if self.reward else None


class Controller(nn.Module):
    """C (section 2.3): linear, or with a hidden layer of tanh units. Acts as `pop` controllers at once: theta (P, n) is
    the flat parameters of all; the module itself holds none of them."""

    def __init__(self, inputs=288, outputs=3, hidden=0, bias=True):
        super().__init__()
        self.inputs, self.outputs, self.hidden, self.bias = inputs, outputs, hidden, bias
        self.theta = nn.Parameter(torch.zeros(self.count()), requires_grad=False)  # the result of the evolution

    def count(self):
        layers = (
            [(self.inputs, self.hidden), (self.hidden, self.outputs)] if self.hidden else [(self.inputs, self.outputs)]
        )
        return sum(o * (i + self.bias) for i, o in layers)

    def forward(self, x, theta=None):
        """x (P, R, inputs), theta (P, n) -> (P, R, outputs); without theta the module's own: x (..., inputs)."""
        if theta is None:
            return self(x.reshape(1, -1, self.inputs), self.theta[None]).view(*x.shape[:-1], self.outputs)
        pop = len(theta)
        if self.hidden:
            split = self.hidden * (self.inputs + self.bias)
            x = affine(x, *unflatten(theta[:, :split], pop, self.hidden, self.bias)).tanh()
            theta = theta[:, split:]
        return affine(x, *unflatten(theta, pop, self.outputs, self.bias))


def affine(x, bias, weight):
    """Batched layers: x (P, R, I), bias (P, O) or None, weight (P, I, O) -> (P, R, O)."""
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight)


class VMC(nn.Module):
    """V, M and C. kind: what C's outputs mean. "car": car_action; "box": tanh, a number in [-1, 1] per output;
    "discrete": the largest one is the action, which M sees as one-hot."""

    def __init__(self, config):
        super().__init__()
        c = self.config = dict(config)
        self.kind, self.A = c["kind"], c["actions"]
        self.vae = Vae(c["latent_size"], c["vae_depth"])
        self.rnn = MdnRnn(
            c["latent_size"], self.A, c["rnn_size"], c["num_mixtures"], c["predict_done"], c["predict_reward"]
        )
        width = c["latent_size"] + c["rnn_size"] * (len(c["controller_input"]) - 1)
        self.controller = Controller(width, self.A, c["controller_hidden"], c["controller_bias"])
        self.register_buffer("reward_scale", torch.ones(()))  # standard deviation of the rewards that were collected
        self.act = functools.partial(act_step, self)

    def features(self, z, c, h):
        """What C sees (..., inputs): z, and c and h from before M sees this step."""
        # NOTE: updating M first would give C an h in the real environment that it never has in the dream.
        return torch.cat([{"z": z, "c": c, "h": h}[k] for k in self.config["controller_input"]], -1)

    def to_action(self, pre):
        """C's outputs (..., A) -> the action as M sees it (..., A)."""
        if self.kind == "discrete":
            return F.one_hot(pre.argmax(-1), self.A).float()
        return car_action(pre) if self.kind == "car" else pre.tanh()

    def env_action(self, action):
        """The same as the environment wants it: numpy (..., A) floats, or (...) integers."""
        return action.argmax(-1).astype(np.int64) if self.kind == "discrete" else action

    def encode(self, frames):
        """(n, 64, 64, 3) uint8 -> mu, logvar (n, Z) float32"""
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=self.config["bf16"] and frames.is_cuda):
            mu, logvar = self.vae.encode(unit_images(frames))
        return mu.float(), logvar.float()

    def show(self, z):
        """(n, Z) -> pictures (n, 64, 64, 3) uint8"""
        return (self.vae.decode(z).movedim(-3, -1) * 255).round().byte()


def count_params(model):
    """Parameters of a module, those of C too, which have no gradient."""
    return sum(p.numel() for p in model.parameters())


# ---- Losses ----------------------------------------------------------------------------------------------------------


def fit_vae(model, batch, args):
    """V's loss on batch: frames (B, 64, 64, 3), eps (B, Z). Returns the terms and metrics."""
    recon, mu, logvar = model.vae(unit_images(batch["frames"]), batch["eps"])
    with torch.autocast(recon.device.type, enabled=False):
        r_loss, kl = vae_loss(
            unit_images(batch["frames"]), recon.float(), mu.float(), logvar.float(), args.kl_tolerance
        )
    return {"vae_reconstruction": r_loss, "vae_kl": kl}, {}


def fit_rnn(model, batch, args):
    """M's loss on batch: mu, logvar and those of the next frame, each (T, B, Z); action (T, B, A); reward, done,
    restart and seen (the next frame exists) (T, B); c, h (B, H); eps (2, T, B, Z). Returns the terms and metrics, with
    the state for the next T steps among them."""
    # NOTE: z is drawn anew for every batch from V's mu and logvar: a fixed z, or mu, would let M learn the noise by
    # heart. The target's noise is independent of the input's, which leaves the expected loss as it is.
    z = sample_z(batch["mu"], batch["logvar"], batch["eps"][0])
    target = sample_z(batch["next_mu"], batch["next_logvar"], batch["eps"][1])
    # NOTE: (z[t], action[t]) foresees z[t+1]. Off by one, M learns the previous action and the dream obeys nobody.
    x = model.rnn.join(z, batch["action"], batch["restart"])
    hidden, c, h = model.rnn(x, batch["c"], batch["h"], batch["restart"])
    logmix, mean, logstd, logit, reward = model.rnn.heads(hidden)
    losses = {"rnn_z": mdn_nll(logmix, mean, logstd, target, batch["seen"])}
    if logit is not None:
        losses["rnn_done"] = done_loss(logit, batch["done"], args.done_weight)
    if reward is not None:
        losses["rnn_reward"] = ((reward - batch["reward"] / model.reward_scale) ** 2).mean()
    return losses, {"c": c.detach(), "h": h.detach()}


class FitLearner:
    """An optimizer for one of the networks, and its update."""

    def __init__(self, model, network, loss, args, device, learning_rate, clip=math.inf):
        self.model, self.loss, self.args, self.device, self.clip = model, loss, args, device, clip
        self.params = list(network.parameters())
        lr = torch.tensor(learning_rate, device=device) if device.type == "cuda" else learning_rate
        self.opt = torch.optim.Adam(self.params, lr=lr, fused=True, capturable=device.type == "cuda")
        self.bf16 = args.bf16 and device.type == "cuda" and loss is fit_vae
        self.bad = None  # which loss terms, or the gradient norm, were not finite; set once, on the device

    def update(self, batch):
        """One optimizer step. Returns metrics as tensors on the device."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            losses, metrics = self.loss(self.model, batch, self.args)
        self.opt.zero_grad()
        sum(losses.values()).backward()
        norm = nn.utils.get_total_norm([p.grad for p in self.params])
        if self.clip < math.inf:  # NOTE: element by element, not by norm
            nn.utils.clip_grad_value_(self.params, self.clip)
        # No step on bad numbers, decided on the device. The main loop looks at `bad` when it reads metrics.
        bad = ~torch.isfinite(torch.stack([*losses.values(), norm]).detach())
        if self.bad is None:
            self.bad, self.names = torch.zeros_like(bad), [*losses, "gradient norm"]
        self.bad.copy_(torch.where(self.bad.any(), self.bad, bad))
        self.opt.found_inf = self.bad.any().float()  # the fused kernel then leaves parameters and moments alone
        self.opt.step()
        return {k: v.detach() for k, v in losses.items()} | metrics | {"grad_norm": norm}

    def set_lr(self, value):
        for group in self.opt.param_groups:
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(value)
            else:
                group["lr"] = value

    def check(self, where=""):
        """Raise FloatingPointError naming what was not finite. Waits for the device."""
        if self.bad is not None and self.bad.any():
            names = ", ".join(n for n, b in zip(self.names, self.bad.tolist(), strict=True) if b)
            raise FloatingPointError(f"not finite at {where}: {names}; no optimizer step was taken")


# ---- Dreams for learning ---------------------------------------------------------------------------------------------

CHUNK = 20  # dream steps between two looks at who is still alive


def dream_chunk(model, s):
    """CHUNK steps of P x R dreams at once. s: z, c, h (P, R, .), alive, restart, score (P, R), theta (P, n), tau (P),
    uniform, eps (CHUNK, R, Z), count (CHUNK), 1 for steps that are still to be made. Returns the new state."""
    (P, R), rnn, z, c, h, alive, score = s["alive"].shape, model.rnn, *(s[k] for k in "z c h alive score".split())
    restart, tau = s["restart"], s["tau"].view(P, 1, 1, 1)
    for t in range(len(s["eps"])):
        action = model.to_action(model.controller(model.features(z, c, h), s["theta"]))  # (P, R, A)
        x, uniform, eps = rnn.join(z, action, restart), s["uniform"][t].expand(P, R, -1), s["eps"][t].expand(P, R, -1)
        rows, temperature = None, tau
        if not x.is_cuda and float(alive.mean()) < 0.7:  # most are dead: compute the rest only (a GPU keeps its shapes)
            rows = alive.flatten().nonzero().squeeze(1)
            x, c, h, uniform, eps = (v.flatten(0, 1)[rows] for v in (x, c, h, uniform, eps))
            temperature = tau.expand(P, R, 1, 1).flatten(0, 1)[rows]
        c, h = (v.unflatten(0, x.shape[:-1]) for v in rnn.lstm_step(*(v.flatten(0, -2) for v in (x, c, h))))
        logmix, mean, logstd, logit, reward = rnn.heads(h)
        z = sample_mdn(logmix, mean, logstd, temperature, uniform, eps)
        if rows is not None:  # back to their places; what is dead is never looked at again
            whole = lambda v, i=rows: v.new_zeros(P * R, *v.shape[1:]).index_copy(0, i, v)  # noqa: E731
            place = lambda v, whole=whole: None if v is None else whole(v).unflatten(0, (P, R))  # noqa: E731
            z, c, h, logit, reward = (place(v) for v in (z, c, h, logit, reward))
        gain = 1.0 if reward is None else reward * model.reward_scale
        score = score + alive * s["count"][t] * gain
        if logit is not None:
            # NOTE: the end is cut off at probability one half, never drawn: drawn, small chances summed over hundreds
            # of steps would kill every dream.
            alive = alive * (logit <= 0)
        restart = torch.zeros_like(restart)
    return s | dict(z=z, c=c, h=h, alive=alive, restart=restart, score=score)


@torch.no_grad()
def dream_rollout(theta, model, starts, rollouts=16, temperature=1.15, max_steps=2_100, generator=None):
    """Scores (P, R) of `rollouts` dreams for each of the controllers theta (P, n): sums of rewards, without a reward
    head the number of steps, 1 to max_steps. starts: mu, logvar (S, Z) of first frames; temperature: a number or (P,).
    All controllers meet the same first frames and the same noise."""
    P, R, Z, device = len(theta), rollouts, model.rnn.Z, theta.device
    pick = torch.randint(len(starts[0]), (R,), device=device, generator=generator)
    z = sample_z(*(x[pick].float() for x in starts), torch.randn(R, Z, device=device, generator=generator))
    (c, h), ones = model.rnn.initial(P, R, device=device), torch.ones(P, R, device=device)
    tau = torch.as_tensor(temperature, dtype=torch.float32, device=device).expand(P)
    s = dict(z=z.expand(P, R, Z), c=c, h=h, alive=ones, restart=ones, score=0 * ones, theta=theta, tau=tau)
    chunk = getattr(model, "dream_graph", None) or functools.partial(dream_chunk, model)
    for step in range(0, max_steps, CHUNK):
        noise = dict(uniform=torch.rand(CHUNK, R, Z, device=device, generator=generator))
        noise["eps"] = torch.randn(CHUNK, R, Z, device=device, generator=generator)
        noise["count"] = (torch.arange(step, step + CHUNK, device=device) < max_steps).float()
        s = chunk({k: s[k] for k in "z c h alive restart score theta tau".split()} | noise)
        if not s["alive"].any():  # the only wait for the device
            break
    return s["score"].clone()


# [optional: compile
def compile_world(model, device):
    """Compile V; on a GPU capture dreams and acting in CUDA graphs, one for each shape."""
    try:
        torch.compile(lambda x: torch.sin(x) + 1)(torch.zeros(8, device=device))  # is there a working compiler?
    except Exception as e:
        return say(f"warning: torch.compile does not work here ({type(e).__name__}); going on without it")
    say("compiling: the first steps take a minute or more (--no-compile starts at once)")
    model.vae.encode, model.vae.decode = (torch.compile(f, dynamic=False) for f in (model.vae.encode, model.vae.decode))
    if device.type == "cuda":

        def graphed(function):
            graphs = {}

            def call(inputs):
                key = tuple(v.shape for v in inputs.values())
                if key not in graphs:
                    graphs[key] = Graphed(function)
                return graphs[key](inputs)

            return call

        model.dream_graph = graphed(functools.partial(dream_chunk, model))
        model.act = graphed(model.act)


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


# ---- Evolution -------------------------------------------------------------------------------------------------------


class Evolution:
    """CMA-ES from pycma, maximising, with a random generator of its own. Its state is the fitness it was told: a
    strategy that is told the same again is the same, bit for bit."""

    def __init__(self, size, popsize, sigma, seed):
        import cma

        rng = np.random.default_rng(seed)
        options = dict(popsize=popsize, randn=lambda *shape: rng.standard_normal(shape), verbose=-9, seed=float("nan"))
        self.es, self.told = cma.CMAEvolutionStrategy(np.zeros(size), sigma, options), []

    def ask(self):
        """Candidates (P, n) float32."""
        self.asked = self.es.ask()
        return np.round(np.stack(self.asked), 4).astype(np.float32)  # rounded as in the authors' code

    def tell(self, fitness):
        # NOTE: no bonus and no penalty for large weights, see the docstring.
        fitness = [float(f) for f in fitness]
        self.es.tell(self.asked, [-f for f in fitness])
        self.told.append(fitness)

    def mean(self):
        """Mean of the distribution (n,) float32."""
        # NOTE: this is what is evaluated and kept. The best sample of a generation was mostly lucky.
        return np.round(self.es.mean, 4).astype(np.float32)

    def replay(self, told):
        """Repeat what a strategy with the same arguments was told."""
        for fitness in told:
            self.ask()
            self.tell(fitness)


# ---- Data: episodes on the disk, frames in memory, their latents -----------------------------------------------------


def save_episode(path, episode):
    """One compressed file: frames (T or T + 1, 64, 64, 3) uint8, action (T, A), reward (T,), terminated."""
    try:
        with open(path + ".tmp", "wb") as f:
            np.savez_compressed(f, **episode)
        os.replace(path + ".tmp", path)
    except OSError as e:
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        raise SystemExit(f"could not write {path} ({type(e).__name__}: {e})") from None


HEADERS = threading.Lock()


def load_episode(path, *names):
    try:
        with zipfile.ZipFile(path) as f:
            raw = {k: f.read(k + ".npy") for k in names}  # zlib lets other threads run
        # NOTE: numpy parses headers with `ast`, which Python 3.11 must not do in two threads at once (SystemError).
        with HEADERS:
            return {k: np.lib.format.read_array(io.BytesIO(v), allow_pickle=False) for k, v in raw.items()}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise SystemExit(f"{path} is damaged ({type(e).__name__}): delete it and go on with --stage collect") from None


def episode_files(run):
    """All episodes of a run in the order of their numbers."""
    folder = os.path.join(run, "data")
    return [os.path.join(folder, n) for n in sorted(os.listdir(folder)) if n.endswith(".npz")]


class EpisodeWriter:
    """Writes episodes with other threads, since compressing one takes longer than many steps. Short episodes are only
    marked. names: the path of each number, without its ending."""

    def __init__(self, names, shortest, most_bytes, size, most_waiting):
        self.names, self.shortest, self.most_bytes, self.size = names, shortest, most_bytes, size
        self.most_waiting, self.threads, self.jobs = most_waiting, ThreadPoolExecutor(4), []

    def __call__(self, number, episode):
        """Keep this episode. True if the disk space that may be used is used up."""
        name = self.names[number]
        if len(episode["reward"]) < self.shortest:
            open(name + ".short", "w").close()
        else:
            self.jobs.append((self.threads.submit(save_episode, name + ".npz", episode), name + ".npz"))
        while self.jobs and (self.jobs[0][0].done() or len(self.jobs) > self.most_waiting):
            job, path = self.jobs.pop(0)
            job.result()  # waits, and says what could not be written
            self.size += os.path.getsize(path)
        return self.size > self.most_bytes

    def close(self):
        """Wait for what is left."""
        self.threads.shutdown()
        for job, path in self.jobs:
            job.result()
            self.size += os.path.getsize(path)
        return self.size > self.most_bytes


class FrameStore:
    """All frames of all episodes in random order, at most `capacity` of them in memory on `device`."""

    def __init__(self, files, capacity, device):
        self.files, self.capacity, self.device, self.loaded = files, capacity, device, (None, None)
        with ThreadPoolExecutor(8) as pool:
            self.lengths = np.array(list(pool.map(lambda p: int(load_episode(p, "length")["length"]), files)))

    def groups(self, rng):
        """The files in groups that fit into memory; new groups in every epoch if there are several."""
        if self.lengths.sum() <= self.capacity:
            return [np.arange(len(self.files))]
        order = rng.permutation(len(self.files))
        place = (np.cumsum(self.lengths[order]) - 1) // max(1, self.capacity - self.lengths.max())
        return [order[place == g] for g in np.unique(place)]

    def load(self, group):
        key = tuple(group)
        if self.loaded[0] != key:
            self.loaded = None, None  # first let the old ones go
            frames = torch.empty(int(self.lengths[group].sum()), 64, 64, 3, dtype=torch.uint8, device=self.device)
            ends = np.cumsum(self.lengths[group])
            with ThreadPoolExecutor(8) as pool:  # zlib lets other threads run

                def one(i):
                    data = load_episode(self.files[group[i]], "frames")["frames"]
                    frames[ends[i] - len(data) : ends[i]] = torch.from_numpy(data).to(self.device)

                list(pool.map(one, range(len(group))))
            self.loaded = key, frames
        return self.loaded[1]

    def batches(self, seed, batch, skip=0):
        """One epoch: (B, 64, 64, 3) uint8. The last batch of a group is dropped if it is not full. skip: batches that
        were used before an interruption."""
        rng = np.random.default_rng(seed)
        for group in self.groups(rng):
            count = int(self.lengths[group].sum())
            # All batches have one size, which CUDA graphs need; only if there is less than one, it is what there is.
            order, batches = torch.from_numpy(rng.permutation(count)), count // batch
            batches = batches or int(count == self.lengths.sum())
            if skip >= batches:
                skip -= batches
                continue
            frames = self.load(group)
            order = order.to(self.device)
            for i in range(skip, batches):
                yield frames[order[i * batch : (i + 1) * batch]]
            skip = 0


class LatentStore:
    """mu and logvar of every frame, with actions, rewards and ends, as one stream of steps."""

    @torch.no_grad()
    def __init__(self, model, files, device):
        parts = {k: [] for k in "mu logvar action reward done seen frame restart".split()}
        frames, self.length = 0, []
        names = "frames", "action", "reward", "terminated"
        with ThreadPoolExecutor(8) as pool:
            for i in range(0, len(files), 16):
                episodes = list(pool.map(lambda p: load_episode(p, *names), files[i : i + 16]))
                pictures = torch.from_numpy(np.concatenate([e["frames"] for e in episodes]))
                for chunk in pictures.split(512):
                    # NOTE: mu and logvar are stored, not z: M has to see a new z every time.
                    shape = (512 if device.type == "cuda" else len(chunk), *chunk.shape[1:])  # one shape if compiled
                    full = torch.zeros(shape, dtype=torch.uint8)
                    full[: len(chunk)] = chunk
                    for k, v in zip(("mu", "logvar"), model.encode(full.to(device))):
                        parts[k].append(v[: len(chunk)].half())
                for e in episodes:
                    T, last = len(e["reward"]), np.arange(len(e["reward"])) == len(e["reward"]) - 1
                    rows = dict(action=e["action"], reward=e["reward"], done=last & e["terminated"])
                    rows |= dict(seen=~last | (len(e["frames"]) > T), frame=frames + np.arange(T))
                    for k, v in (rows | dict(restart=np.arange(T) == 0)).items():
                        parts[k].append(torch.as_tensor(v))
                    frames, self.length = frames + len(e["frames"]), [*self.length, T]
        data = {k: torch.cat(v).to(device) for k, v in parts.items()}
        self.data = {k: v.float() if k not in ("mu", "logvar", "frame") else v for k, v in data.items()}
        self.length = np.array(self.length)
        self.starts = tuple(self.data[k][self.data["frame"][self.data["restart"] > 0][:1000]] for k in ("mu", "logvar"))

    def plan(self, seed, B, L):
        """The stream of one epoch: episodes in random order, one after the other, cut into B rows and these into
        windows of L steps: indices (windows, L, B)."""
        order = np.random.default_rng(seed).permutation(len(self.length))
        first, n = (np.cumsum(self.length) - self.length)[order], self.length[order]
        steps = np.repeat(first - (np.cumsum(n) - n), n) + np.arange(n.sum())
        B = max(1, min(B, len(steps) // 2))
        L = min(L, len(steps) // B)
        windows = len(steps) // (B * L)
        row = steps[: B * (len(steps) // B)].reshape(B, -1)[:, : windows * L]  # (B, windows * L)
        return row.reshape(B, windows, L).transpose(1, 2, 0)

    def batch(self, index):
        """index (L, B) -> what fit_rnn wants, but for the state and the noise."""
        index = torch.as_tensor(index, device=self.data["frame"].device)
        out = {k: self.data[k][index] for k in ("action", "reward", "done", "seen", "restart")}
        frame = self.data["frame"][index]
        following = (frame + 1).clamp(max=len(self.data["mu"]) - 1)  # the last frame of all may have none
        latents = {k: self.data[k][i].float() for k, i in (("mu", frame), ("logvar", frame))}
        return out | latents | {f"next_{k}": self.data[k][following].float() for k in ("mu", "logvar")}


# ---- Environment -----------------------------------------------------------------------------------------------------


class SmallCartPole(CartPoleEnv):
    """CartPole-v1, physics untouched, seen as a picture of 64x64: a longer and thicker pole than gymnasium draws, so
    that a tilt of one degree moves pixels. One picture shows no velocities."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = "rgb_array"
        self.observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        _, info = super().reset(seed=seed, options=options)
        return self.render(), info

    def step(self, action):
        _, reward, terminated, truncated, info = super().step(action)
        return self.render(), reward, terminated, truncated, info

    def render(self):
        if self.state is None:
            return None
        scale = 4  # drawn large, then reduced: edges are smooth
        image = Image.new("RGB", (64 * scale, 64 * scale), (16, 16, 24))
        pen, x, angle = ImageDraw.Draw(image), (32 + self.state[0] / 2.4 * 28) * scale, self.state[2]
        dx, dy = 44 * scale * math.sin(angle), 44 * scale * math.cos(angle)
        px, py, y = 2 * scale * math.cos(angle), 2 * scale * math.sin(angle), 54 * scale
        pen.rectangle([x - 7 * scale, y, x + 7 * scale, y + 6 * scale], (90, 140, 250))
        pen.polygon(
            [(x - px, y - py), (x + px, y + py), (x + dx + px, y - dy + py), (x + dx - px, y - dy - py)], (250, 200, 60)
        )
        return np.asarray(image.reduce(scale))


if "SmallCartPole-v0" not in gym.registry:
    gym.register("SmallCartPole-v0", entry_point=SmallCartPole, max_episode_steps=500)


class SmallScene:
    """Mixed into gymnasium's CarRacing: draws the observation at twice its size instead of at 1000x800, ten times
    faster. Physics, rewards and all other pictures are the class's own. Without the bar of instruments, which the crop
    removes."""

    SIZE = 192  # pixels; reduced to 96

    def _render(self, mode):
        if mode != "state_pixels":
            return super()._render(mode)
        if "t" not in self.__dict__:
            return None  # before the first reset, as in the class
        from gymnasium.envs.box2d import car_dynamics
        from gymnasium.envs.box2d import car_racing as cr

        if getattr(self, "scene", (None,))[0] is not self.car:  # a new episode: collect what does not change
            squares = [(i, j) for i in range(-20, 20, 2) for j in range(-20, 20, 2)]
            corner = cr.GRASS_DIM * np.array([(1, 0), (0, 0), (0, 1), (1, 1)])
            grass = cr.GRASS_DIM * np.array(squares)[:, None] + corner  # (400, 4, 2)
            field = cr.PLAYFIELD * np.array([[(1, 1), (1, -1), (-1, -1), (-1, 1)]])
            polygons = np.concatenate([field, grass, np.array([p for p, _ in self.road_poly])])
            middle = polygons.mean(1)
            radius = np.linalg.norm(polygons - middle[:, None], axis=2).max(1)
            colors = [tuple(int(v) for v in c) for c in [self.bg_color] + [self.grass_color] * len(grass)]
            parts = [(b, np.array(f.shape.vertices)) for b in self.car.drawlist for f in b.fixtures]
            self.scene = self.car, polygons, middle, radius, colors, parts
        _, polygons, middle, radius, colors, parts = self.scene
        hull = self.car.hull
        # The camera of the class: zoomed in during the first second, turned and moved with the car, upside down.
        angle, t = -hull.angle, self.t
        zoom = 0.1 * cr.SCALE * max(1 - t, 0) + cr.ZOOM * cr.SCALE * min(t, 1)
        cos, sin = math.cos(angle), math.sin(angle)
        shrink = np.array([self.SIZE / cr.WINDOW_W, -self.SIZE / cr.WINDOW_H])
        turn = zoom * np.array([[cos, sin], [-sin, cos]]) * shrink  # for row vectors
        move = np.array([cr.WINDOW_W / 2, cr.WINDOW_H / 4]) * shrink + [0, self.SIZE] - 0.5  # pixel centres
        move = move - np.array(hull.position) @ turn

        place, reach = middle @ turn + move, (radius * zoom * self.SIZE / cr.WINDOW_H)[:, None]  # at least its circle
        near = np.flatnonzero(np.logical_and(*((place > -reach) & (place < self.SIZE + reach)).T))
        image, points = Image.new("RGB", (self.SIZE, self.SIZE)), (polygons[near] @ turn + move).reshape(-1, 8).tolist()
        pen, fixed = ImageDraw.Draw(image), len(colors)
        for i, corners in zip(near, points):
            # NOTE: a tile of the road changes its colour when the car reaches it.
            color = colors[i] if i < fixed else tuple(int(c) for c in self.road_poly[i - fixed][1])
            pen.polygon(corners, color)
        for body, vertices in parts:
            c, s = math.cos(body.angle), math.sin(body.angle)
            local, position = np.array([[c, s], [-s, c]]), np.array(body.position)
            shapes = [(vertices, tuple(int(v * 255) for v in body.color))]
            if "phase" in body.__dict__:  # the white stripe of a turning wheel
                (s1, s2), (c1, c2) = ([f(body.phase), f(body.phase + 1.2)] for f in (math.sin, math.cos))
                if not (s1 > 0 and s2 > 0):
                    c1, c2 = (np.sign(c1) if s1 > 0 else c1), (np.sign(c2) if s2 > 0 else c2)
                    w, r = car_dynamics.WHEEL_W * car_dynamics.SIZE, car_dynamics.WHEEL_R * car_dynamics.SIZE
                    stripe = np.array([(-w, r * c1), (w, r * c1), (w, r * c2), (-w, r * c2)])
                    shapes.append((stripe, car_dynamics.WHEEL_WHITE))
            for shape, color in shapes:
                pen.polygon((((shape @ local + position) @ turn) + move).ravel().tolist(), color)
        return np.asarray(image.reduce(2))


class CarRepeat(gym.Wrapper):
    """CarRacing with its rows 0 to 83, without the bar of instruments, actions in the ranges of `car_action`, each
    repeated; the class draws after every frame, here only the picture that is seen is drawn."""

    complete = True  # make_env adds no repeat of its own

    def __init__(self, env, repeat):
        super().__init__(env)
        self.repeat = repeat
        self.observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
        self.action_space = gym.spaces.Box(-1, 1, (3,), np.float32)  # gas and brake are in its upper half

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        return process_frame(obs, 84), info

    def step(self, action):
        car, total = self.env.unwrapped, 0.0
        action = np.clip(action, [-1, 0, 0], 1).astype(np.float32)
        car._render = lambda mode: None
        try:
            for _ in range(self.repeat):
                _, reward, terminated, truncated, info = self.env.step(action)
                total += float(reward)
                if terminated or truncated:
                    break
        finally:
            del car._render
        return process_frame(car._render("state_pixels"), 84), total, terminated, truncated, info


class TakeCover(gym.Wrapper):
    """Take Cover as it was in 2018: the upper 5/6 of the picture, one number in [-1, 1] as the action."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
        self.action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
        self.folder = None

    def see(self, obs):
        screen = obs["screen"]
        return process_frame(screen, len(screen) * 5 // 6)

    def reset(self, *, seed=None, options=None):
        home = os.getcwd()
        if self.folder is None:  # NOTE: the engine, started here, writes its settings into the current directory
            self.folder = tempfile.TemporaryDirectory()
            os.chdir(self.folder.name)
        try:
            obs, info = self.env.reset(seed=seed, options=options)
        finally:
            os.chdir(home)
        return self.see(obs), info

    def step(self, action):
        obs, *rest = self.env.step(int(doom_buttons(action[0])))
        return self.see(obs), *rest

    def close(self):
        self.env.close()
        if self.folder is not None:
            self.folder.cleanup()


class OneImage(gym.ObservationWrapper):
    """The only image of a Dict observation."""

    def __init__(self, env, key):
        super().__init__(env)
        self.key, self.observation_space = key, env.observation_space[key]

    def observation(self, obs):
        return obs[self.key]


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


PACKAGES = {
    "ALE": ("ale_py", "ale-py"),
    "MinAtar": ("minatar", "minatar"),
    "dm_control": ("dm_control", "dm_control"),
    "VizdoomTakeCover-v1": ("vizdoom", "vizdoom"),
    "CarRacing-v3": ("Box2D", "'gymnasium[box2d]'"),
}


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


def car_racing(args):
    """CarRacing; with --fast-render with small drawings."""
    from gymnasium.envs.box2d import CarRacing

    # NOTE: in the version of the paper a lap ended only when all tiles had been visited.
    kwargs = dict(lap_complete_percent=1.0) | json.loads(args.env_kwargs)
    if not kwargs.get("continuous", True):
        raise ValueError("C steers with three numbers: continuous must be true")
    entry = type("SmallCarRacing", (SmallScene, CarRacing), {}) if args.fast_render else CarRacing
    # The checker of gymnasium would complain about the pictures that CarRepeat leaves out.
    spec = gym.envs.registration.EnvSpec(args.env_id, entry_point=entry, max_episode_steps=1000)
    return CarRepeat(gym.make(spec, disable_env_checker=True, **kwargs), args.action_repeat)


def take_cover(args):
    """Take Cover as the environment of 2018 set it up: 640x480 pixels, of which 400 rows are seen, drawn smaller."""
    import vizdoom.gymnasium_wrapper  # noqa: F401

    # NOTE: skill 4, whatever the 2018 source says: random play lives for 57 frames with 5 and for 207 with 4; the paper
    # has 210. Weapon, crosshair and decals were off; the timeout is ours to set; 160x120 is drawn ten times faster than
    # 640x480 and is large enough for 64x64.
    kwargs = dict(doom_skill=4, episode_timeout=2_100, episode_start_time=14, render_hud=True, render_weapon=False)
    kwargs |= dict(render_crosshair=False, render_decals=False, render_particles=False)
    kwargs |= dict(screen_resolution="RES_160X120") | json.loads(args.env_kwargs)
    return TakeCover(gym.make(args.env_id, **kwargs))


def any_env(args):
    """An environment of the registry; of a Dict observation with one image, that image."""
    env = registered_env(args)
    if isinstance(env.observation_space, gym.spaces.Dict) and not args.pixels:
        images = [k for k, s in env.observation_space.items() if len(s.shape or ()) == 3 and s.dtype == np.uint8]
        return OneImage(env, images[0]) if len(images) == 1 else env
    return env


def suite_env(args):
    return DMControl(args.env_id, args.image_size, args.fast_render)


class Families(dict):
    """Environments that are not built by gymnasium.make alone, and any_env for all others: make_env asks with get."""

    def get(self, key, default=None):
        return super().get(key, any_env)


FAMILIES = Families({"CarRacing-v3": car_racing, "VizdoomTakeCover-v1": take_cover, "dm_control": suite_env})


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


# ---- Lockstep: many environments, a few processes --------------------------------------------------------------------


def play_rows(envs, a, rows):
    """Do what a.op says to the environments of these rows: 1, a step; 2, a new episode."""
    for i in rows:
        if a.op[i] == 2:
            # NOTE: every episode has a seed of its own, whichever environment plays it.
            envs[i].env.key, envs[i].env.episode, a.flag[i] = tuple(int(k) for k in a.seed[i]), 0, 0
            obs, _ = envs[i].reset()
        elif a.op[i] == 1:
            action = int(a.action[i, 0]) if a.discrete else a.action[i].copy()
            obs, a.reward[i], terminated, truncated, _ = envs[i].step(action)
            a.flag[i] = 1 if terminated else 2 if truncated else 0
        else:
            continue
        (a.frames[i],) = obs.values()


def as_arrays(shared, discrete):
    """Tensors in shared memory as numpy arrays, by name."""
    return types.SimpleNamespace(**{k: v.numpy() for k, v in shared.items()}, discrete=discrete)


def worker_main(parent, pipe, args, rows, shared, discrete):
    """An environment process: for each message, a group, play its rows of that group."""
    arrays = as_arrays(shared, discrete)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):  # the main process stops us
        signal.signal(getattr(signal, name, signal.SIGINT), signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        envs = {i: make_env(args, i)() for group in rows for i in group}
        pipe.send(None)
        while True:
            while not pipe.poll(1.0):
                if os.getppid() != parent:  # it was killed
                    return
            message = pipe.recv()
            if message is None:
                break
            play_rows(envs, arrays, rows[message])
            pipe.send(None)
        for env in envs.values():
            env.close()
    except EnvFault as e:
        pipe.send((traceback.format_exc(), str(e)))
    except (EOFError, KeyboardInterrupt):
        pass


class EnvPool:
    """n environments in lockstep in two groups, whose frames, actions and rewards lie in shared memory. While one group
    is stepped by the worker processes, the caller computes the actions of the other."""

    def __init__(self, args, n, action_space):
        self.n, self.timeout, discrete = n, args.env_timeout, isinstance(action_space, gym.spaces.Discrete)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(args.num_workers or cores, n)
        shapes = dict(frames=((n, 64, 64, 3), torch.uint8), op=((n,), torch.uint8), flag=((n,), torch.uint8))
        width = 1 if discrete else action_space.shape[0]
        shapes |= dict(action=((n, width), torch.float32), reward=((n,), torch.float64), seed=((n, 3), torch.int64))
        shared = {k: torch.zeros(s, dtype=d).share_memory_() for k, (s, d) in shapes.items()}
        self.__dict__.update({k: v.numpy() for k, v in shared.items()})
        self.arrays = as_arrays(shared, discrete)
        self.groups = [np.arange(n)] if workers == 1 or n == 1 else np.array_split(np.arange(n), 2)
        self.workers = []
        if workers == 1:
            self.envs = {i: make_env(args, i)() for i in range(n)}
            return
        # NOTE: a fork takes no time but inherits no threads; MuJoCo's renderer, used by then, does not survive that.
        fork = sys.platform == "linux" and env_family(args) != "dm_control"
        context = torch.multiprocessing.get_context("fork" if fork else "spawn")
        atexit.register(self.close)
        for w in range(workers):
            rows = [np.array_split(group, workers)[w] for group in self.groups]
            ours, theirs = context.Pipe()
            inputs = os.getpid(), theirs, args, rows, shared, discrete
            process = context.Process(target=worker_main, args=inputs, daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))
        try:
            for w in range(workers):
                self.answer(w)
        except BaseException:
            self.close()
            raise

    def begin(self, g):
        """Start what `op` says for group g."""
        for w, (_, pipe) in enumerate(self.workers):
            try:
                pipe.send(g)
            except OSError:
                self.died(w)

    def wait(self, g):
        """Until it is done."""
        if not self.workers:
            return play_rows(self.envs, self.arrays, self.groups[g])
        for w in range(len(self.workers)):
            self.answer(w)

    def answer(self, w):
        process, pipe = self.workers[w]
        try:
            if not pipe.poll(self.timeout):
                process.kill()  # a process that hangs does not hear that it should close
                raise EnvFault(f"environment process {w} did not answer for {self.timeout:g} s (--env-timeout)")
            answer = pipe.recv()
        except (EOFError, OSError):
            self.died(w)
        if answer:
            print(answer[0], file=sys.stderr)
            raise EnvFault(answer[1])

    def died(self, w):
        process = self.workers[w][0]
        process.join(1)
        code = process.exitcode or 0
        how = f"signal {-code}; out of memory?" if code < 0 else f"exit code {code}"
        raise EnvFault(f"environment process {w} died ({how})") from None

    def close(self):
        for _, pipe in self.workers:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process, pipe in self.workers:
            process.join(10)  # a hundred Doom engines take a while
            if process.is_alive():
                process.kill()
            pipe.close()
        if not self.workers:
            for env in self.envs.values():
                env.close()
        self.workers, self.envs = [], {}
        atexit.unregister(self.close)


def rollouts(pool, seeds, policy, stop=None, store=None, tell=None):
    """Play one episode for each of `seeds` (each three integers): returns (E,) and lengths (E,), or None after a stop
    signal. store: a function of the episode's number and its data; if it answers True, no further episode begins.
    tell: a function of the number of finished episodes."""
    E, n = len(seeds), pool.n
    returns, lengths, waiting, finished = np.zeros(E), np.zeros(E, int), iter(range(E)), 0
    episode, kept = np.full(n, -1), [None] * n

    def refill(rows):
        for i in rows:
            e = next(waiting, None)
            pool.op[i] = 0 if e is None else 2
            if e is not None:
                episode[i], pool.seed[i], kept[i] = e, seeds[e], dict(frames=[], action=[], reward=[])
                policy.begin(i, e, seeds[e])

    busy = []
    for g, rows in enumerate(pool.groups):
        pool.op[rows] = 0
        refill(rows)
        busy.append(bool(pool.op[rows].any()))
        if busy[g]:
            pool.begin(g)
    while any(busy):
        for g, rows in enumerate(pool.groups):
            if not busy[g]:
                continue
            pool.wait(g)
            stepped, new = rows[pool.op[rows] == 1], pool.op[rows] == 2
            returns[episode[stepped]] += pool.reward[stepped]
            lengths[episode[stepped]] += 1
            ended = stepped[pool.flag[stepped] > 0]
            if store:
                for i in stepped:
                    kept[i]["reward"].append(pool.reward[i])
                for i in ended:
                    data, last = kept[i], pool.frames[i].copy()
                    terminated = bool(pool.flag[i] == 1)
                    # NOTE: an all black last frame is no picture (Doom shows one at death).
                    data["frames"] += [] if terminated and not last.any() else [last]
                    data = {k: np.stack(v) for k, v in data.items()} | dict(terminated=terminated)
                    if store(episode[i], data | dict(length=len(data["frames"]))):
                        waiting = iter(())
            finished += len(ended)
            if tell and len(ended):
                tell(finished)
            if stop and stop.signum:
                for other in range(len(pool.groups)):  # leave the processes ready for the next call
                    if other != g and busy[other]:
                        pool.wait(other)
                return None
            alive = np.isin(rows, stepped) & ~np.isin(rows, ended)
            acting = rows[alive | new]
            pool.op[rows] = 0
            if len(acting):
                seen, told = policy.act(g, rows, alive | new, pool.frames[rows], new)
                pool.action[acting] = told.reshape(len(acting), -1)
                pool.op[acting] = 1
                if store:
                    for i, action in zip(acting, seen):
                        kept[i]["frames"].append(pool.frames[i].copy())
                        kept[i]["action"].append(action)
            refill(rows[pool.op[rows] == 0])
            busy[g] = bool(pool.op[rows].any())
            if busy[g]:
                pool.begin(g)
    return returns, lengths


def episode_rng(seed, *what):
    return np.random.default_rng(np.random.SeedSequence((*(int(s) for s in seed), *what)))


def uniform_actions(kind, A, n, rng):
    """n uniform actions as M sees them (n, A) float32."""
    if kind == "discrete":
        return np.eye(A, dtype=np.float32)[rng.integers(A, size=n)]
    return rng.uniform([-1, 0, 0] if kind == "car" else [-1] * A, 1, (n, A)).astype(np.float32)


def held_actions(kind, A, length, rng, longest=10):
    """A whole episode of uniform actions, each held for 1 to `longest` steps: (length, A)."""
    holds = rng.integers(1, longest + 1, size=length)
    return np.repeat(uniform_actions(kind, A, length, rng), holds, 0)[:length]


def walk_actions(kind, A, length, rng):
    """A random walk in action space (length, A), whose steering falls back to the middle: arcs, seldom off the road."""
    std, low, a = np.full(A, 0.35), np.full(A, -1.0), np.zeros(A)
    if kind == "car":
        std, low, a = np.array([0.35, 0.35, 0.125]), np.array([-1, 0, 0]), np.array([0, 0.5, 0])
    noise, out = rng.normal(size=(length, A)) * std, np.empty((length, A), np.float32)
    for t in range(length):
        out[t] = a = np.clip(a + noise[t], low, 1)
        a = a * ([0.9, 1, 1] if kind == "car" else 0.9)
    return out


def random_policy(action_space, seed):
    """Uniform actions, each held for 1 to 10 steps (authors' Doom), as a policy: observations, is_first, its state ->
    actions, its state."""
    rng, n = np.random.default_rng(seed), getattr(action_space, "n", None)
    kind, A, block = "discrete" if n else "box", n or action_space.shape[0], 1000

    def policy(obs, first, state):
        t, table = state or (np.full(len(first), block), np.zeros((len(first), block, A), np.float32))
        for i in np.flatnonzero(first | (t == block)):
            t[i], table[i] = 0, held_actions(kind, A, block, rng)
        action = table[np.arange(len(first)), t]
        return (action.argmax(-1) if n else action), (t + 1, table)

    return policy


class RandomPlay:
    """Random actions for `rollouts`: `kind` is one of --collect-policy, or "uniform"."""

    def __init__(self, model, how, n, length):
        self.model, self.how, self.t = model, how, np.zeros(n, int)
        self.table, self.length = np.zeros((n, length, model.A), np.float32), length

    def begin(self, i, e, seed):
        kind, A, rng, self.t[i] = self.model.kind, self.model.A, episode_rng(seed, 1), 0
        if self.how == "momentum":
            self.table[i] = walk_actions(kind, A, self.length, rng)
        else:
            self.table[i] = held_actions(kind, A, self.length, rng, 10 if self.how == "hold" else 1)

    def act(self, g, rows, acting, frames, first):
        rows = rows[acting]
        action = self.table[rows, self.t[rows]]
        self.t[rows] += 1
        return action, self.model.env_action(action)


class EpisodeNoise:
    """Noise for z in n lockstep environments, drawn for some steps at a time. NOTE: it belongs to the episode, not to
    the order in which episodes are played: a run that was interrupted repeats it, and all candidates meet the same."""

    BLOCK = 256

    def __init__(self, model, n):
        self.model, self.device = model, model.reward_scale.device
        self.c, self.h = model.rnn.initial(n, device=self.device)
        self.t, self.seeds = np.zeros(n, int), [None] * n
        self.noise = np.zeros((n, self.BLOCK, model.rnn.Z), np.float32)

    def begin(self, i, e, seed):
        self.c[i], self.h[i], self.t[i], self.seeds[i] = 0, 0, 0, seed

    def draw(self, i, rng):
        rng.standard_normal(out=self.noise[i], dtype=np.float32)

    def places(self, rows):
        """Where in their blocks these rows are."""
        for i in rows[self.t[rows] % self.BLOCK == 0]:
            self.draw(i, episode_rng(self.seeds[i], 2, self.t[i]))
        return self.t[rows] % self.BLOCK


class RandomAgents(EpisodeNoise):
    """A fresh V, M and C with Cauchy distributed weights for each episode (authors' CarRacing): they drive in many
    ways, most of them steadily, where independent noise only trembles."""

    def __init__(self, model, how, n, length):
        super().__init__(model, n)
        acting = ("vae.encoder", "vae.mu", "vae.logvar", "rnn.weight", "rnn.bias", "controller")  # what it takes to act
        params = {k: p for k, p in model.named_parameters() if k.startswith(acting)}
        self.params = {k: torch.zeros(n, *p.shape, device=self.device) for k, p in params.items()}

    def begin(self, i, e, seed):
        super().begin(i, e, seed)
        rng = episode_rng(seed, 1)
        scale, generator = rng.uniform(0, 0.01), torch.Generator(self.device).manual_seed(int(rng.integers(2**62)))
        for p in self.params.values():
            p[i].cauchy_(generator=generator).mul_(scale)

    @torch.no_grad()
    def act(self, g, rows, acting, frames, first):
        rows = rows[acting]
        to = lambda x: torch.as_tensor(x, device=self.device)  # noqa: E731
        eps, first = to(self.noise[rows, self.places(rows)]), to(first[acting]).float()
        params, x = {k: v[rows] for k, v in self.params.items()}, unit_images(to(frames[acting]))
        action, c, h = torch.func.vmap(self.one)(params, x, eps, self.c[rows], self.h[rows], first)
        self.c[rows], self.h[rows] = c, h
        self.t[rows] += 1
        action = action.cpu().numpy()
        return action, self.model.env_action(action)

    def one(self, params, x, eps, c, h, first):
        """One step of one agent with its own weights, the same as act_step."""
        model, vae = self.model, {k: v for k, v in params.items() if k.startswith("vae.")}
        mu, logvar = torch.func.functional_call(EncoderOnly(model.vae), vae, x[None])
        # NOTE: such weights overflow now and then. The authors' agents were not guarded; NaN cannot steer.
        z = sample_z(mu[0], logvar[0], eps).nan_to_num().clamp(-1e3, 1e3)
        features = model.features(z, c, h)
        action = model.to_action(model.controller(features[None, None], params["controller.theta"][None])[0, 0])
        rnn = params["rnn.weight"], params["rnn.bias"]
        c, h = lstm_step(model.rnn.join(z, action, first)[None], c[None], h[None], *rnn)
        return action, c[0], h[0]


class EncoderOnly(nn.Module):
    """V's encoder as a module of its own, whose weights torch.func can exchange."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, x):
        return self.vae.encode(x)


class AgentPlay(EpisodeNoise):
    """V, M and C for `rollouts`. theta: parameters of C for each episode, by number (E, n); explore: chance per step
    that random actions take over for a while, in every second episode."""

    def __init__(self, model, theta, n, explore=0.0):
        super().__init__(model, n)
        self.explore, self.all = explore, torch.as_tensor(theta, device=self.device)
        self.theta = torch.zeros(n, self.all.shape[1], device=self.device)
        self.random = np.full((n, self.BLOCK, model.A), np.nan, np.float32)

    def begin(self, i, e, seed):
        super().begin(i, e, seed)
        self.theta[i] = self.all[e]

    def draw(self, i, rng):
        super().draw(i, rng)
        if self.explore and self.seeds[i][-1] % 2:
            takes, holds = rng.random(self.BLOCK) < self.explore, rng.integers(1, 11, self.BLOCK)
            actions, self.random[i] = uniform_actions(self.model.kind, self.model.A, self.BLOCK, rng), np.nan
            for t in np.flatnonzero(takes):
                self.random[i, t : t + holds[t]] = actions[t]
        else:
            self.random[i] = np.nan

    @torch.no_grad()
    def act(self, g, rows, acting, frames, first):
        self.places(rows[acting])
        if self.device.type != "cuda":  # a GPU keeps its shapes: rows that idle are computed too
            rows, frames, first, acting = rows[acting], frames[acting], first[acting], acting[acting]
        at = self.t[rows] % self.BLOCK
        to = lambda x: torch.as_tensor(x, device=self.device)  # noqa: E731
        inputs = dict(frames=to(frames), eps=to(self.noise[rows, at]), first=to(first).float())
        inputs |= dict(theta=self.theta[rows], c=self.c[rows], h=self.h[rows], instead=to(self.random[rows, at]))
        out = self.model.act(inputs)
        self.c[rows], self.h[rows] = out["c"], out["h"]
        self.t[rows] += 1
        action = out["action"].cpu().numpy()[acting]
        return action, self.model.env_action(action)


def act_step(model, s):
    """One step of V, C and M, in this order: frames (n, 64, 64, 3), eps (n, Z), first (n,), theta (n, .), c, h (n, H),
    instead (n, A), actions that replace C's where they are not NaN."""
    mu, logvar = model.encode(s["frames"])
    # NOTE: a sample, as in M's training and in the dream; the mean has less noise than C will have met in a dream.
    z = sample_z(mu, logvar, s["eps"]) if model.config["sample_latent"] else mu
    pre = model.controller(model.features(z, s["c"], s["h"]).unsqueeze(1), s["theta"]).squeeze(1)
    action = torch.where(s["instead"].isnan(), model.to_action(pre), s["instead"])
    # M's output layer is not needed to act.
    c, h = model.rnn.lstm_step(model.rnn.join(z, action, s["first"]), s["c"], s["h"])
    return dict(action=action, c=c, h=h)


# ---- Evaluation and dreams -------------------------------------------------------------------------------------------


def agent_policy(model, device):
    """V, M and the evolved C as a policy: observations, is_first, its state -> actions, its state."""

    def policy(obs, first, state):
        (frames,) = obs.values()
        keep = torch.as_tensor(~first, device=device).float().unsqueeze(-1)
        c, h = model.rnn.initial(len(first), device=device) if state is None else (x * keep for x in state)
        s = dict(
            frames=torch.as_tensor(np.broadcast_to(frames, (len(first), 64, 64, 3)).copy(), device=device), c=c, h=h
        )
        s |= dict(first=1 - keep.squeeze(-1), theta=model.controller.theta.expand(len(first), -1))
        s |= dict(eps=torch.randn(len(first), model.rnn.Z, device=device))
        with torch.no_grad():
            out = act_step(model, s | dict(instead=torch.full((len(first), model.A), math.nan, device=device)))
        return model.env_action(out["action"].cpu().numpy()), (out["c"], out["h"])

    return policy


def padded(episodes, model, device):
    """Episodes as one batch, time first: frames (T + 1, n, 64, 64, 3) uint8, action (T, n, A), reward, done, mask, seen
    (T, n); the last frame is repeated where there is none."""
    T, n = max(len(e["reward"]) for e in episodes), len(episodes)
    out = {k: np.zeros((T, n), np.float32) for k in "reward done mask seen".split()}
    out |= dict(frames=np.zeros((T + 1, n, 64, 64, 3), np.uint8), action=np.zeros((T, n, model.A), np.float32))
    for i, e in enumerate(episodes):
        L, frames = len(e["reward"]), e["frames"]
        out["frames"][: len(frames), i], out["frames"][len(frames) :, i] = frames, frames[-1]
        for k in ("action", "reward"):
            out[k][:L, i] = e[k]
        out["mask"][:L, i], out["seen"][: len(frames) - 1, i], out["done"][L - 1, i] = 1, 1, e["terminated"]
    return {k: torch.as_tensor(v, device=device) for k, v in out.items()}


@torch.no_grad()
def open_loop(model, episodes, context=5, horizon=30):
    """V and M on episodes that they did not learn from. Returns metrics beside those of trivial predictors and, for a
    video, frames, reconstructions and dreams (n, T, 64, 64, 3) uint8 of up to four of them: the dream sees `context`
    frames and then follows the true actions at temperature 1."""
    device = model.reward_scale.device
    batch, rnn = padded(episodes, model, device), model.rnn
    T, n = batch["reward"].shape
    mu, logvar = (torch.stack(x) for x in zip(*(model.encode(f) for f in batch["frames"])))  # (T + 1, n, Z)
    shown = torch.cat([batch["mask"][:1], batch["mask"]])  # (T + 1, n): the frames that exist
    shown[1:] *= batch["seen"]
    real, recon = batch["frames"], torch.stack([model.show(m) for m in mu])
    as_float = lambda x: x.float() / 255  # noqa: E731
    mean = lambda error, mask: float((error * mask).sum() / mask.sum().clamp(min=1))  # noqa: E731
    apart = lambda x, y: ((as_float(x) - as_float(y)) ** 2).flatten(1).mean(1)  # noqa: E731
    square = lambda a, b: torch.stack([apart(x, y) for x, y in zip(a, b)])  # noqa: E731
    total = sum((as_float(f) * m.view(-1, 1, 1, 1)).sum(0) for f, m in zip(real, shown)) / shown.sum()
    average = (total * 255).expand(T + 1, n, 64, 64, 3)
    errors = {"posterior_mse": mean(square(recon, real), shown), "mean_frame_mse": mean(square(average, real), shown)}

    # One step ahead, knowing the past: likelihood of the next z, beside two Gaussians per dimension that do not know M:
    # around the last z, and around the mean of all.
    eps = torch.randn(2, T + 1, n, rnn.Z, device=device)
    z, target, seen = sample_z(mu, logvar, eps[0]), sample_z(mu, logvar, eps[1])[1:], batch["seen"]
    first = torch.zeros(T, n, device=device)
    first[0] = 1
    hidden, c, h = rnn(rnn.join(z[:-1], batch["action"], first), *rnn.initial(n, device=device), first)
    logmix, mix_mean, logstd, logit, reward = rnn.heads(hidden)
    errors["rnn_nll"] = float(mdn_nll(logmix, mix_mean, logstd, target, seen))
    rows = seen.bool()
    for name, guess in (("copy_nll", z[:-1]), ("constant_nll", target[rows].mean(0).expand_as(target))):
        left = (target - guess)[rows]
        std = (left**2).mean(0).sqrt()
        errors[name] = float((0.5 * (left / std) ** 2 + std.log() + 0.5 * math.log(2 * math.pi)).mean())
    other = batch["action"].roll(1, 1) if n > 1 else batch["action"].flip(0)  # somebody else's actions
    wrong = rnn(rnn.join(z[:-1], other, first), *rnn.initial(n, device=device), first)[0]
    errors["wrong_action_nll"] = float(mdn_nll(*rnn.heads(wrong)[:3], target, seen))
    foreseen = (logmix.softmax(-1) * mix_mean).sum(-1)  # mean of the mixture
    errors["latent_mse"] = mean(((foreseen - mu[1:]) ** 2).mean(-1), seen)
    errors["copy_latent_mse"] = mean(((mu[:-1] - mu[1:]) ** 2).mean(-1), seen)
    if logit is not None:
        said, true = (logit > 0).float() * batch["mask"], batch["done"]
        errors["end_precision"] = float((said * true).sum() / said.sum().clamp(min=1))
        errors["end_recall"] = float((said * true).sum() / true.sum().clamp(min=1))
        errors["end_loss"] = float(done_loss(logit, true, 1.0, batch["mask"]))
    if reward is not None:
        errors["reward_mse"] = mean((reward * model.reward_scale - batch["reward"]) ** 2, batch["mask"])
        errors["reward_variance"] = float(batch["reward"][batch["mask"].bool()].var(unbiased=False))

    # Open loop from the first episodes that are long enough.
    context = max(1, min(context, T - 1))
    H = min(horizon, T - context)
    (c, h), dream, now = rnn.initial(n, device=device), [], z[0]
    for t in range(context + H - 1):
        c, h = rnn.lstm_step(rnn.join(now, batch["action"][t], first[t]), c, h)
        now = z[t + 1] if t + 1 < context else sample_mdn(*rnn.heads(h)[:3], 1.0)
        dream += [model.show(now)] if t + 1 >= context else []
    dream = torch.stack(dream)  # frames context .. context + H - 1
    truth, alive = real[context : context + H], shown[context : context + H]
    errors["open_loop_mse"] = mean(square(dream, truth), alive)
    errors["copy_last_mse"] = mean(square(real[context - 1].expand_as(truth), truth), alive)
    best = batch["mask"].sum(0).argsort(descending=True, stable=True)[:4]
    pictures = [x[: context + H, best].transpose(0, 1).cpu().numpy() for x in (real, recon)]
    pictures.append(np.concatenate([pictures[1][:, :context], dream[:, best].transpose(0, 1).cpu().numpy()], 1))
    return errors, (*pictures, context)


def truth_recon_dream(real, recon, dream, context):
    """Frames of the video: truth, V's reconstruction and the dream below each other, episodes side by side. The border
    is green while M sees frames and red while it dreams."""
    frames = []
    for t in range(real.shape[1]):
        columns = []
        for rows in zip(real[:, t], recon[:, t], dream[:, t]):
            tiles = []
            for i, image in enumerate(rows):
                color = (0, 0, 0) if i < 2 else (0, 180, 0) if t < context else (220, 0, 0)
                tiles.append(np.pad(image, ((3, 3), (3, 3), (0, 0))))
                tiles[-1][:3], tiles[-1][-3:], tiles[-1][:, :3], tiles[-1][:, -3:] = color, color, color, color
            columns.append(np.concatenate(tiles))
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
    state = load_checkpoint(path, "ha2018_carracing")
    model = VMC(state["config"])
    model.load_state_dict(state["model"])
    return model.to(device).eval(), state


class DreamEnv(gym.Env):
    """The learned world as an environment. `path`: run directory. Observations are V's pictures, 64x64x3.

    reset(options={"observations": (T, 64, 64, 3), "actions": (T, ...)}) lets M see real context (action t follows
    observation t; the last one is not used) and dreams on from it; without options it starts from a first frame kept in
    the checkpoint. Rewards are those of the reward head, without one 1 per step in a world with ends, else 0."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}

    def __init__(self, path, render_mode="rgb_array", temperature=None, max_steps=None, device="cpu"):
        self.model, state = load_agent(path, device)
        self.device, self.render_mode, self.starts = torch.device(device), render_mode, state["starts"]
        self.temperature = temperature or (state["args"]["temperature"] if self.model.rnn.done else 1.0)
        self.max_steps = max_steps or state["limit"] or 1000
        self.observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
        self.action_space, self.noise = space_from(state["spaces"]["action"]), torch.Generator(device)

    def as_seen(self, action):
        """(n, ...) actions of the environment -> (n, A) as M sees them"""
        if self.model.kind == "discrete":
            return F.one_hot(torch.as_tensor(np.asarray(action, np.int64), device=self.device), self.model.A).float()
        action = np.clip(np.asarray(action, np.float32), [-1, 0, 0] if self.model.kind == "car" else -1, 1)
        return torch.as_tensor(action, dtype=torch.float32, device=self.device)

    def randn(self, *shape):
        return torch.randn(*shape, device=self.device, generator=self.noise)

    @torch.no_grad()
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.noise.manual_seed(int(self.np_random.integers(2**31)))
        rnn, self.steps, self.first = self.model.rnn, 0, torch.ones(1, device=self.device)
        self.c, self.h = rnn.initial(1, device=self.device)
        if options and "observations" in options:
            obs = options["observations"]
            obs = np.asarray(next(iter(obs.values())) if isinstance(obs, dict) else obs, np.uint8)
            T = len(options.get("actions", ()))
            if not T or obs.shape[:3] != (T, 64, 64) or obs.ndim != 4:
                found = f"{obs.shape} and {T} actions"
                raise ValueError(f"observations (T, 64, 64, 3) and actions must have T > 0 entries, got {found}")
            frames = torch.as_tensor(np.broadcast_to(obs, (T, 64, 64, 3)).copy(), device=self.device)
            zs, actions = sample_z(*self.model.encode(frames), self.randn(T, rnn.Z)), self.as_seen(options["actions"])
            for t in range(T - 1):
                self.advance(zs[t : t + 1], actions[t : t + 1])
            self.z = zs[-1:]
        else:
            if self.starts is None:
                raise ValueError("this checkpoint was saved before V was trained: pass options")
            pick = int(self.np_random.integers(len(self.starts[0])))
            mu, logvar = (x[pick : pick + 1].float().to(self.device) for x in self.starts)
            self.z = sample_z(mu, logvar, self.randn(1, rnn.Z))
        self.obs = self.model.show(self.z)[0].cpu().numpy()
        return self.obs, {}

    def advance(self, z, action):
        self.c, self.h = self.model.rnn.lstm_step(self.model.rnn.join(z, action, self.first), self.c, self.h)
        self.first = torch.zeros_like(self.first)

    @torch.no_grad()
    def step(self, action):
        self.advance(self.z, self.as_seen(np.asarray(action)[None]))
        logmix, mean, logstd, logit, reward = self.model.rnn.heads(self.h)
        self.z, self.steps = sample_mdn(logmix, mean, logstd, self.temperature, generator=self.noise), self.steps + 1
        self.obs = self.model.show(self.z)[0].cpu().numpy()
        info = {} if logit is None else {"continue": float((-logit).sigmoid())}
        gain = float(reward * self.model.reward_scale) if reward is not None else float(logit is not None)
        return self.obs, gain, logit is not None and bool(logit > 0), self.steps >= self.max_steps, info

    def render(self):
        return self.obs.repeat(4, 0).repeat(4, 1)


# [optional: play
def play(args):
    """Play inside the dream with the keyboard; without a display write C's dream as a GIF."""
    check_args(args)
    env = DreamEnv(args.play, temperature=args.temperature if args.dream else None)
    if env.starts is None:
        fail(f"{args.play} has no V yet to dream with: go on with --resume first")
    headless = sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    if headless or os.environ.get("SDL_VIDEODRIVER") == "dummy":
        path = os.path.join(args.play, "eval-dream.gif")
        env.reset(seed=args.seed)
        frames, model, total = [env.render()], env.model, 0.0
        for _ in range(min(200, env.max_steps)):
            with torch.no_grad():  # C acts on the dream's own z, not on a picture of it
                action = model.to_action(model.controller(model.features(env.z, env.c, env.h)))
            _, reward, terminated, truncated, _ = env.step(model.env_action(action.cpu().numpy())[0])
            total += reward
            frames.append(env.render())
            if terminated or truncated:
                break
        save_gif(frames, path, fps=15)
        return say(f"no display to play on: C's dream of {len(frames) - 1} steps, score {total:g}, is in {path}")
    from gymnasium.utils.play import play as play_env

    if env.model.kind == "car":
        keys = {"a": (-1, 0.5, 0), "d": (1, 0.5, 0), "w": (0, 1, 0), "s": (0, 0, 0.8)}
        mapping, noop = {k: np.array(v, np.float32) for k, v in keys.items()}, np.array([0, 0.2, 0], np.float32)
    elif env.model.kind == "discrete":
        mapping, noop = {str(i): i for i in range(min(10, env.model.A))}, 0
    else:
        units = np.concatenate([-np.eye(env.model.A), np.eye(env.model.A)]).astype(np.float32)
        names = "adwsjlikfhtg"
        mapping = {names[i]: units[i // 2 + env.model.A * (i % 2)] for i in range(min(len(names), len(units)))}
        noop = np.zeros(env.model.A, np.float32)
    say("keys: " + ", ".join(f"{k} = {v}" for k, v in mapping.items()) + "; Escape ends")
    play_env(env, keys_to_action=mapping, noop=noop, zoom=2, fps=15)


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
    "exp_name preset cuda compile num_threads num_workers env_timeout track wandb_project_name wandb_entity "
    "capture_video stage save_every save_generations resume evaluate play tau_table temperatures target_return "
    "generations eval_episodes log_every from_run data_gb buffer_size".split()
)
# Flags that shape V and M, and C.
SHAPES = "latent_size vae_depth rnn_size num_mixtures predict_done predict_reward".split()
C_SHAPES = "controller_input controller_hidden controller_bias sample_latent".split()
STAGES = ("collect", "vae", "rnn", "controller")


def check_args(args):
    """Everything that can be said before an environment is built."""
    check_ranges(args, RANGES)
    try:
        taus = [float(t) for t in args.temperatures.split(",")]
        assert taus and all(1e-3 <= t <= 10 for t in taus) and len(set(taus)) == len(taus)
    except (ValueError, AssertionError):
        fail(
            f"--temperatures must be different numbers from 0.001 to 10 with commas between, got {args.temperatures!r}"
        )
    for wrong, message in [
        (args.dream and not (args.predict_done or args.predict_reward), "--dream needs an end or a reward to learn "
         "from: --predict-done or --predict-reward"),
        (args.from_run and args.iterations > 1, f"--from-run takes V and M as they are: --iterations must be 1, got "
         f"{args.iterations}"),
        (args.min_episode_steps > (args.max_episode_steps or math.inf), f"--min-episode-steps {args.min_episode_steps} "
         f"is more than --max-episode-steps {args.max_episode_steps}: every episode would be dropped"),
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
    of the longest episode."""
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
    env.close()
    own = make_env(replace(args, max_episode_steps=None), 0)()  # the environment's own limit, in its own steps
    suite_limit = own.unwrapped.env._step_limit if family == "dm_control" else math.inf  # inf: none
    limit = int(suite_limit) if suite_limit < math.inf else own.spec.max_episode_steps if own.spec else None
    own.close()
    if len(obs_space) != 1 or len(next(iter(obs_space.values())).shape) != 3:
        found = ", ".join(f"{k!r} {s}" for k, s in obs_space.items())
        fail(f"{flag}: observations must be one image, found {found}; --pixels observes what the environment draws")
    limit = -(-limit // args.action_repeat) if limit else None
    limit = min(limit or args.max_episode_steps, args.max_episode_steps) if args.max_episode_steps else limit
    if not limit:
        fail(f"{flag} has no time limit, so an episode could last for ever: set --max-episode-steps")
    return obs_space, action_space, limit


def config_of(args, action_space):
    """What shapes the networks."""
    discrete = isinstance(action_space, gym.spaces.Discrete)
    config = {k: getattr(args, k) for k in (*SHAPES, *C_SHAPES)}
    kind = "discrete" if discrete else "car" if env_family(args) == "CarRacing-v3" else "box"
    return config | dict(kind=kind, actions=int(action_space.n if discrete else action_space.shape[0]), bf16=args.bf16)


def reporting(args):
    """What is reported is played with the environment's own pictures."""
    return replace(args, fast_render=False) if env_family(args) == "CarRacing-v3" else args


class Progress:
    """A line every ten seconds: how far, and how long it will take."""

    def __init__(self, what, total, begin=0):
        self.what, self.total, self.first, self.start = what, total, begin, time.time()
        self.last = self.start

    def __call__(self, done):
        now = time.time()
        if now - self.last >= 10 and done < self.total - self.first:
            self.last, left = now, (self.total - self.first - done) * (now - self.start) / max(1, done)
            share = 100 * (self.first + done) // self.total
            say(f"{self.what}: {self.first + done} of {self.total}, {share} %, {left / 60:.1f} minutes left")


class Experiment:
    """One run: the stages, and what is remembered between them."""

    def __init__(self, args, run, model, spaces, limit, device, logger, stop):
        self.args, self.run, self.model, self.spaces, self.limit = args, run, model, spaces, limit
        self.device, self.logger, self.stop = device, logger, stop
        self.iteration, self.stage, self.epoch, self.batch = 0, "collect", 0, 0
        self.updates, self.ticks, self.steps, self.dream_steps = {"vae": 0, "rnn": 0}, 0, 0, 0
        self.told, self.best, self.optimizer, self.carry, self.starts = [], None, None, None, None
        self.random_return = self.train_return = self.dream_return = None
        self.path = functools.partial(os.path.join, run)

    REMEMBERED = (
        "iteration stage epoch batch updates ticks steps dream_steps told best optimizer carry starts random_return "
        "train_return dream_return limit".split()
    )

    def save(self, learner=None):
        self.optimizer = learner.opt.state_dict() if learner else None
        plain = dict(script="ha2018_carracing", args=asdict(self.args), config=self.model.config)
        plain |= dict(spaces={k: space_to(s) for k, s in self.spaces.items()}, rng=rng_state())
        plain |= {k: getattr(self, k) for k in self.REMEMBERED} | dict(model=self.model.state_dict())
        atomic_save(plain, self.path("ckpt.pt"))

    def restore(self, state):
        for k in self.REMEMBERED:
            setattr(self, k, state[k])
        self.model.load_state_dict(state["model"])
        if self.starts is not None:
            self.starts = tuple(x.to(self.device) for x in self.starts)
        set_rng_state(state["rng"])

    def stopped(self, learner=None):
        """Leave after a stop signal: save, say how to go on. What was begun and not finished is done again."""
        if learner:
            learner.check(self.where())
        self.save(learner)
        self.logger.close()
        again = f"python {shlex.quote(sys.argv[0])} --resume {shlex.quote(self.run)}"
        say(f"stopped by signal {self.stop.signum} at {self.where()}; to go on: {again}")
        raise SystemExit(128 + self.stop.signum)

    def where(self):
        what = dict(vae=f"update {self.updates['vae']} of V", rnn=f"update {self.updates['rnn']} of M")
        what |= dict(collect="collecting", controller=f"generation {len(self.told)} of C", done="the evaluation")
        return what[self.stage]

    def seeds(self, kind, a, n):
        """Seeds of n episodes that no other purpose has. kind: 0 baseline, 1 collecting, 2 a generation, 3 its mean, 4
        the final evaluation, 5 measuring the model."""
        return [(self.args.seed, kind * 10**9 + self.iteration * 10**7 + a, i) for i in range(n)]

    def pool(self, episodes, args=None):
        n = min(self.args.num_envs, episodes)
        return EnvPool(args or self.args, n, self.spaces["action"])

    def play(self, pool, seeds, policy, **options):
        out = rollouts(pool, seeds, policy, self.stop, **options)
        if out is None:
            pool.close()
            self.stopped()
        return out

    # ---- Random baseline and collection

    def baseline(self):
        E = self.args.eval_episodes
        pool = self.pool(E)
        with contextlib.closing(pool):
            returns, _ = self.play(pool, self.seeds(0, 0, E), RandomPlay(self.model, "uniform", pool.n, self.limit))
        self.random_return = float(np.mean(returns))
        say(f"random policy: {self.random_return:.1f} +- {np.std(returns):.1f} over {E} episodes")

    def collect(self):
        """Episodes of random play or, in later iterations, of C, one file each; more, if some are too short."""
        args, i, end, kept, full = self.args, self.iteration, self.args.collect_episodes, [], False
        os.makedirs(self.path("data"), exist_ok=True)
        while len(kept) < args.collect_episodes and not full:
            # NOTE: absolute, since threads write them: the current directory changes while a Doom engine starts.
            names = [os.path.abspath(self.path("data", f"{i}-{e:06d}")) for e in range(end)]
            missing = [e for e in range(end) if not any(os.path.exists(names[e] + x) for x in (".npz", ".short"))]
            if missing:
                full = self.play_and_write(missing, names)
            kept = [name + ".npz" for name in names if os.path.exists(name + ".npz")]
            if not kept:
                shortest = f"--min-episode-steps {args.min_episode_steps}"
                raise SystemExit(f"none of {end} episodes has {shortest} steps: nothing to learn from")
            end += args.collect_episodes - len(kept)
        if full:
            say(f"warning: the episodes have reached --data-gb {args.data_gb:g}; going on with {len(kept)} of them")
        files = episode_files(self.run)
        rewards = [load_episode(p, "reward")["reward"] for p in files]
        lengths = [len(load_episode(p, "reward")["reward"]) for p in kept]
        self.steps += sum(lengths)
        std = float(np.concatenate(rewards).std())
        self.model.reward_scale.fill_(max(std, 1e-3) if args.predict_reward else 1.0)
        tags = {"charts/episodes_collected": len(files), "charts/collected_length": float(np.mean(lengths))}
        self.logger.scalars(tags, self.ticks)
        gb = sum(os.path.getsize(p) for p in files) / 1e9
        say(f"collected {len(kept)} episodes of {np.mean(lengths):.1f} steps; {len(files)} in all, {gb:.3f} GB")

    def play_and_write(self, missing, names):
        """Play the episodes of these numbers and keep them. True if no more may be kept."""
        args, n = self.args, len(missing)
        size, seeds = sum(os.path.getsize(p) for p in episode_files(self.run)), self.seeds(1, 0, len(names))
        store = EpisodeWriter(
            [names[e] for e in missing], args.min_episode_steps, args.data_gb * 1e9, size, args.num_envs
        )
        with contextlib.closing(self.pool(n)) as pool:
            if self.iteration:
                theta = self.model.controller.theta.cpu().numpy()
                policy = AgentPlay(self.model, np.tile(theta, (n, 1)), pool.n, args.explore)
            else:
                policy = self.random_play(pool.n)
            tell = Progress("episodes", len(names), len(names) - n)
            try:
                done = rollouts(pool, [seeds[e] for e in missing], policy, self.stop, store, tell)
            finally:
                full = store.close()
        if done is None:
            self.stopped()
        return full

    def random_play(self, n):
        kind = RandomAgents if self.args.collect_policy == "agent" else RandomPlay
        return kind(self.model, self.args.collect_policy, n, self.limit)

    # ---- V and M

    def after_update(self, network, learner, metrics):
        """Count, look for bad numbers, log, save, stop. Metrics are read at log steps only: reading waits for the
        device."""
        self.updates[network], self.batch = self.updates[network] + 1, self.batch + 1
        n, self.ticks = self.updates[network], self.ticks + 1
        if self.device.type == "cpu" or n % self.args.log_every == 0:
            learner.check(self.where())
        if n % self.args.log_every == 0:
            found = {k: float(v) for k, v in metrics.items() if k not in ("c", "h")}
            found[f"{network}_grad_norm"] = found.pop("grad_norm")
            self.logger.scalars({f"losses/{k}": v for k, v in found.items()}, self.ticks)
            say(f"{network}_update={n}, " + ", ".join(f"{k}={v:.4g}" for k, v in found.items()))
        if self.stop.signum:
            self.stopped(learner)
        if n % self.args.save_every == 0:
            learner.check(self.where())
            self.save(learner)

    def learner(self, network, loss, learning_rate, clip=math.inf):
        learner = FitLearner(self.model, network, loss, self.args, self.device, learning_rate, clip)
        fresh = [group["lr"] for group in learner.opt.param_groups]
        if self.optimizer:
            learner.opt.load_state_dict(self.optimizer)
            for group, new in zip(learner.opt.param_groups, fresh):  # the run may have begun on another kind of device
                group["capturable"], group["lr"] = self.device.type == "cuda", new
        # [optional: compile
        if self.args.compile and self.device.type == "cuda":
            learner.update = Graphed(learner.update)
        # compile]
        return learner

    def vae(self):
        """V sees all frames in random order (appendix A.1)."""
        args = self.args
        store = FrameStore(episode_files(self.run), args.buffer_size, self.device)
        learner = self.learner(self.model.vae, fit_vae, args.vae_learning_rate)
        while self.epoch < args.vae_epochs:
            seed = [args.seed, 1, self.iteration, self.epoch]
            for frames in store.batches(seed, args.vae_batch_size, self.batch):
                eps = torch.randn(len(frames), args.latent_size, device=self.device)
                self.after_update("vae", learner, self.guarded(learner.update, dict(frames=frames, eps=eps)))
            self.epoch, self.batch = self.epoch + 1, 0
        learner.check(self.where())

    def rnn(self):
        """M follows the stream of all episodes (appendix A.2)."""
        args, rnn = self.args, self.model.rnn
        store = LatentStore(self.model, episode_files(self.run), self.device)
        self.starts = tuple(x.clone() for x in store.starts)
        if rnn.done and not store.data["done"].any():
            say("warning: no collected episode has ended by itself: M cannot learn what an end is")
        learner = self.learner(rnn, fit_rnn, args.rnn_learning_rate, args.rnn_grad_clip)
        while self.epoch < args.rnn_epochs and args.train_rnn:
            plan = store.plan([args.seed, 2, self.iteration, self.epoch], args.rnn_batch_size, args.rnn_batch_length)
            if not self.batch:
                self.carry = dict(zip("ch", rnn.initial(plan.shape[2], device=self.device)))
            while self.batch < len(plan):
                batch = store.batch(plan[self.batch]) | {k: v.to(self.device) for k, v in self.carry.items()}
                batch["eps"] = torch.randn(2, *batch["mu"].shape, device=self.device)
                floor = min(1e-5, args.rnn_learning_rate)
                decay = args.rnn_lr_decay ** self.updates["rnn"]
                learner.set_lr((args.rnn_learning_rate - floor) * decay + floor)
                metrics = self.guarded(learner.update, batch)
                self.carry = {k: metrics[k].clone() for k in "ch"}
                self.after_update("rnn", learner, metrics)
            self.epoch, self.batch = self.epoch + 1, 0
        learner.check(self.where())
        self.carry = None

    def guarded(self, update, batch):
        try:
            return update(batch)
        except torch.cuda.OutOfMemoryError:
            flags = "--vae-batch-size" if self.stage == "vae" else "--rnn-batch-size or --rnn-batch-length"
            raise SystemExit(f"out of GPU memory at {self.where()}: lower {flags}") from None

    # ---- C

    def dream(self, theta, rollouts, kind, generation):
        """Dream scores (P, rollouts) of controllers theta (P, n); the noise depends on nothing but the generation."""
        generator = torch.Generator(self.device)
        entropy = np.random.SeedSequence((self.args.seed, kind, self.iteration, generation))
        generator.manual_seed(int(entropy.generate_state(1)[0]))
        theta = torch.as_tensor(theta, device=self.device)
        a = self.args
        return (
            dream_rollout(theta, self.model, self.starts, rollouts, a.temperature, self.limit, generator).cpu().numpy()
        )

    def real(self, pool, theta, n, kind, generation, **options):
        """Real returns (P, n): the same n episodes for all candidates."""
        seeds = self.seeds(kind, generation, n) * len(theta)
        policy = AgentPlay(self.model, np.repeat(theta, n, 0), pool.n)
        returns, lengths = self.play(pool, seeds, policy, **options)
        self.steps += int(lengths.sum())
        return returns.reshape(len(theta), n)

    def controller(self):
        """CMA-ES (section 2.3 and appendix A.4), in the real environment or in the dream."""
        args, model = self.args, self.model
        evolution = Evolution(model.controller.count(), args.popsize, args.sigma_init, [args.seed, 3, self.iteration])
        evolution.replay(self.told)
        pool = None if args.dream else self.pool(args.popsize * args.rollouts)
        began, first = time.time(), len(self.told)
        try:
            while len(self.told) < args.generations:
                g = len(self.told)
                theta = evolution.ask()
                if args.dream:
                    scores = self.dream(theta, args.rollouts, 2, g)
                else:
                    scores = self.real(pool, theta, args.rollouts, 2, g)
                fitness = scores.mean(1)
                bad = ~np.isfinite(fitness)
                if bad.any():
                    raise FloatingPointError(f"not finite at {self.where()}: scores of {bad.sum()} candidates")
                if self.stop.signum:
                    self.stopped()
                self.dream_steps += int(scores.sum()) if args.dream and not model.rnn.reward else 0
                evolution.tell(fitness)
                tags = {"generation": g + 1, "generation_mean": fitness.mean(), "generation_best": fitness.max()}
                tags |= {"sigma": evolution.es.sigma, "seconds_per_generation": (time.time() - began) / (g + 1 - first)}
                line = f"generation={g + 1}, mean={fitness.mean():.1f}, best={fitness.max():.1f}"
                if (g + 1) % args.eval_every == 0 or g + 1 == args.generations:
                    mean = evolution.mean()[None]
                    n = args.eval_rollouts
                    score = (self.dream(mean, n, 3, g) if args.dream else self.real(pool, mean, n, 3, g)).mean()
                    if self.best is None or score > self.best[1]:
                        self.best = [mean[0].tolist(), float(score)]
                    tags["mean_controller"] = score
                    line += f", mean of the distribution={score:.1f} over {n} episodes"
                self.told, self.train_return, self.ticks = [*evolution.told], float(fitness.mean()), self.ticks + 1
                self.logger.scalars({f"charts/{k}": float(v) for k, v in tags.items()}, self.ticks)
                say(line + (" dreamed" if args.dream else ""))
                if (g + 1) % args.save_generations == 0 and g + 1 < args.generations:
                    self.save()
        finally:
            if pool:
                pool.close()
        if self.best:
            model.controller.theta.copy_(torch.tensor(self.best[0]))
            self.dream_return = self.best[1] if args.dream else None

    # ---- Evaluation

    def measure(self):
        """Errors of V and M on fresh episodes, half of them random, half C's, and the video."""
        episodes, n = [], 8
        pool = self.pool(n)
        with contextlib.closing(pool):
            for a, policy in enumerate([
                self.random_play(pool.n),
                AgentPlay(self.model, self.model.controller.theta.cpu().numpy()[None].repeat(n, 0), pool.n),
            ]):  # fmt: skip
                keep = lambda e, data: episodes.append(data)  # noqa: E731
                self.play(pool, self.seeds(5, a, n), policy, store=keep)
        torch.manual_seed(self.args.seed)
        return open_loop(self.model, episodes)

    def final(self):
        """Real episodes of the best C, drawn as the environment draws."""
        args, theta = reporting(self.args), self.model.controller.theta.cpu().numpy()[None]
        pool = self.pool(args.eval_episodes, args)
        with contextlib.closing(pool):
            tell = Progress("evaluation", args.eval_episodes)
            return [float(r) for r in self.real(pool, theta, args.eval_episodes, 4, 0, tell=tell)[0]]


def main(args):  # shared
    """Returns the final metrics; raises SystemExit with the exit codes of the README."""
    try:
        return play(args) if args.play else evaluate_run(args) if args.evaluate else train(args)
    except EnvFault as e:
        traceback.print_exc()
        raise SystemExit(f"{e}; checkpoints are untouched") from None
    except FloatingPointError as e:
        raise SystemExit(f"{e}; ckpt.pt, if there is one, is from before it") from None


def evaluate_run(args):
    """--evaluate RUN: returns of fresh episodes of a trained agent; with --tau-table the table of temperatures. Writes
    only RUN/eval-*."""
    check_args(args)
    state = load_checkpoint(args.evaluate, "ha2018_carracing")
    if state["starts"] is None:
        fail(f"{args.evaluate} was stopped before V and M were trained: go on with --resume {args.evaluate} first")
    obs_space, action_space, limit = probe_env(args)
    config = config_of(args, action_space)
    for name in (*SHAPES, *C_SHAPES):
        if config[name] != state["config"][name]:
            flag, trained = "--" + name.replace("_", "-"), state["config"][name]
            fail(f"{flag} is {trained} in {args.evaluate}, got {config[name]}: a trained model cannot change it")
    for found, name in ((obs_space, "observation"), (action_space, "action")):
        if space_to(found) != state["spaces"][name]:
            trained = space_from(state["spaces"][name])
            fail(f"--env-id {args.env_id} has the {name} space {found}, {args.evaluate} was trained on {trained}")
    device = choose_device(args)
    seed_everything(args, device)
    model, state = load_agent(args.evaluate, device)
    starts, spaces = tuple(x.to(device) for x in state["starts"]), dict(observation=obs_space, action=action_space)
    # [optional: compile
    if args.compile:
        compile_world(model, device)
    # compile]
    if args.tau_table:
        return tau_table(args, model, starts, spaces, limit)
    real, n, theta = reporting(args), args.eval_episodes, model.controller.theta.cpu().numpy()
    pool = EnvPool(real, min(args.num_envs, n), action_space)
    with contextlib.closing(pool):
        policy, pictures = AgentPlay(model, np.tile(theta, (n, 1)), pool.n), []
        store = lambda e, data: pictures.append(data["frames"]) if e == 0 else None  # noqa: E731
        options = dict(store=store) if args.capture_video else {}
        seeds = [(args.seed, 7 * 10**9, i) for i in range(n)]
        returns, _ = rollouts(pool, seeds, policy, tell=Progress("evaluation", n), **options)
    if pictures:
        save_gif(list(pictures[0].repeat(4, 1).repeat(4, 2)), os.path.join(args.evaluate, "eval-episode.gif"), 25)
    returns = [float(r) for r in returns]
    score, std, random_return = float(np.mean(returns)), float(np.std(returns)), state["random_return"]
    result = dict(episodic_return=score, std=std, returns=returns, random_return=random_return)
    if args.dream:
        generator = torch.Generator(device).manual_seed(args.seed)
        dreamed = dream_rollout(
            torch.from_numpy(theta[None]).to(device),
            model,
            starts,
            args.eval_rollouts,
            args.temperature,
            limit,
            generator,
        )
        result |= dict(dream_return=float(dreamed.mean()), temperature=args.temperature)
        say(f"in the dream at temperature {args.temperature:g}: {dreamed.mean():.1f} +- {dreamed.std():.1f}")
    write_json(result, os.path.join(args.evaluate, f"eval-{len(state['told'])}.json"))
    say(f"returns of {len(returns)} episodes: " + " ".join(f"{r:g}" for r in returns))
    finish(args, score, random_return, f" +- {std:.1f}")
    return result


def tau_table(args, model, starts, spaces, limit):
    """Table 2: a C evolved inside the dream at each temperature, its score there and in the real environment. The
    populations of all temperatures dream together, as one batch."""
    taus, device = [float(t) for t in args.temperatures.split(",")], model.reward_scale.device
    if not (model.rnn.done or model.rnn.reward):
        fail(f"--tau-table needs a world that foresees ends or rewards; {args.evaluate} was trained without --dream")
    evolutions = [Evolution(model.controller.count(), args.popsize, args.sigma_init, [args.seed, 3, 0]) for _ in taus]
    best, began, P = [(None, -math.inf, 0.0)] * len(taus), time.time(), args.popsize

    def scores(theta, each, rollouts, *seed):
        generator = torch.Generator(device).manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        tau, theta = torch.tensor(taus, device=device).repeat_interleave(each), torch.as_tensor(theta, device=device)
        out = dream_rollout(theta, model, starts, rollouts, tau, limit, generator)
        return out.unflatten(0, (len(taus), each)).cpu().numpy()  # (temperatures, each, rollouts)

    tell = Progress("generations", args.generations)
    for g in range(args.generations):
        found = scores(np.concatenate([e.ask() for e in evolutions]), P, args.rollouts, args.seed, 8, g)
        for evolution, fitness in zip(evolutions, found.mean(2)):
            evolution.tell(fitness)
        if (g + 1) % args.eval_every == 0 or g + 1 == args.generations:
            means = np.stack([e.mean() for e in evolutions])
            for i, s in enumerate(scores(means, 1, args.eval_rollouts, args.seed, 9, g)[:, 0]):
                if s.mean() > best[i][1]:
                    best[i] = means[i], float(s.mean()), float(s.std())
        tell(g + 1)
    n = args.eval_episodes
    pool = EnvPool(reporting(args), min(args.num_envs, n * len(taus)), spaces["action"])
    with contextlib.closing(pool):
        theta = np.stack([b[0] for b in best]).repeat(n, 0)
        seeds = [(args.seed, 7 * 10**9, i) for i in range(n)] * len(taus)
        returns, _ = rollouts(pool, seeds, AgentPlay(model, theta, pool.n), tell=Progress("episodes", len(seeds)))
    returns = returns.reshape(len(taus), n)
    rows = [
        dict(temperature=tau, dream=b[1], dream_std=b[2], real=float(r.mean()), real_std=float(r.std()))
        for tau, b, r in zip(taus, best, returns)
    ]
    random_return = load_checkpoint(args.evaluate, "ha2018_carracing")["random_return"]
    settings = {k: getattr(args, k) for k in "seed generations popsize rollouts eval_rollouts eval_episodes".split()}
    result = dict(rows=rows, random_return=random_return, minutes=(time.time() - began) / 60) | settings
    write_json(result, os.path.join(args.evaluate, "eval-temperatures.json"))
    say("| tau | score in the dream | score in the real environment |\n|---|---|---|")
    for r in rows:
        dreamed, real = (f"{r[k]:.1f} +- {r[k + '_std']:.1f}" for k in ("dream", "real"))
        say(f"| {r['temperature']:g} | {dreamed} | {real} |")
    say(f"| random policy | - | {random_return:.1f} |")
    return result


def inherit(args, action_space):
    """--from-run: episodes, V and M of another run."""
    state = load_checkpoint(args.from_run, "ha2018_carracing")
    if state["starts"] is None or state["stage"] in STAGES[:3]:
        fail(f"--from-run {args.from_run}: its V and M are not trained yet")
    config, theirs = config_of(args, action_space), state["config"]
    for name in (*SHAPES, "kind", "actions"):
        if config[name] != theirs[name]:
            flag = "--env-id: " if name in ("kind", "actions") else "--"
            flag += name.replace("_", "-")
            fail(f"--from-run {args.from_run}: {flag} is {theirs[name]} there, here {config[name]}")
    return state


def train(args):
    """The stages of the paper: collect, V, M, C; then real episodes. Returns the metrics."""
    # Set up, in an order that finds every mistake of the user's before the first file is made.
    check_args(args)
    state, world = None, None
    if args.resume:
        for name, value in load_args(args.resume).items():
            if name not in CHANGEABLE and getattr(args, name, value) != value:
                flag = "--" + name.replace("_", "-")
                fail(f"{flag} is {value} in {args.resume}, got {getattr(args, name)}: a run cannot change it")
        state, result = load_checkpoint(args.resume, "ha2018_carracing"), os.path.join(args.resume, "result.json")
        if state["stage"] == "done" and len(state["told"]) >= args.generations and os.path.exists(result):
            say(f"nothing to do: generation {len(state['told'])} of {args.generations}")
            with open(result, encoding="utf-8") as f:
                return json.load(f)
        lock = lock_run(args.resume)
        state = load_checkpoint(args.resume, "ha2018_carracing", repair=True)  # nobody else writes from here on
    obs_space, action_space, limit = probe_env(args)
    if args.from_run and not state:
        world = inherit(args, action_space)
    device, cpu = choose_device(args), torch.device("cpu")
    frames = min(args.buffer_size, args.collect_episodes * args.iterations * (limit + 1))
    need = {device: frames * 12_288 / 1e9}  # while V is trained; episodes in progress, with --num-envs, in host memory
    need[cpu] = need.get(cpu, 0) + min(args.num_envs, args.collect_episodes) * limit * 12_288 / 1e9
    for where, size in need.items():
        if size > free_memory(where) / 1e9:
            hint = f"lower --buffer-size, now {args.buffer_size}, or --num-envs, now {args.num_envs}"
            fail(f"frames need {size:.1f} GB, {free_memory(where) / 1e9:.1f} GB free: {hint}")

    run = args.resume or new_run_dir(args)
    lock = lock if args.resume else lock_run(run)  # noqa: F841 (held until the process ends)
    seed_everything(args, device)
    write_run_info(run, args, __file__, device)
    stop, config = StopSignal(), config_of(args, action_space)
    logger = Logger(run, args, purge_step=state["ticks"] + 1 if state else None)
    with torch.device(device):
        model = VMC(config)
    spaces = dict(observation=obs_space, action=action_space)
    experiment = Experiment(args, run, model, spaces, limit, device, logger, stop)
    parts = ", ".join(f"{n} {count_params(getattr(model, n)):,}" for n in ("vae", "rnn", "controller"))
    say(f"run: {run}\nparameters: {count_params(model):,} ({parts})")
    say(f"frames in memory: {need[device]:.2f} GB on {device}; {args.action_repeat} environment steps per agent step")
    if state:
        experiment.restore(state)
        say(f"resumed at {experiment.where()}")
    elif world:
        mine = model.state_dict()
        model.load_state_dict({k: mine[k] if k.startswith("controller") else v for k, v in world["model"].items()})
        experiment.starts, experiment.stage = tuple(x.to(device) for x in world["starts"]), "controller"
    # [optional: compile
    if args.compile:
        compile_world(model, device)
    # compile]
    start = time.time()
    e = experiment
    if e.random_return is None:
        e.baseline()
        e.save()
    if e.stage == "done" and len(e.told) < args.generations:
        e.stage = "controller"  # a finished run goes on with more --generations
    while e.stage != "done":
        stage = e.stage
        getattr(e, stage)()
        e.epoch, e.batch, e.optimizer = 0, 0, None
        last = e.iteration + 1 == args.iterations
        if stage == "controller" and not last:
            e.iteration, e.stage, e.told, e.best = e.iteration + 1, "collect", [], None
        else:
            e.stage = "done" if stage == "controller" else STAGES[STAGES.index(stage) + 1]
        e.save()
        if args.stage == stage and e.stage != "done":
            logger.close()
            again = f"python {shlex.quote(sys.argv[0])} --resume {shlex.quote(run)} --stage all"
            say(f"stage {stage} is done; to go on: {again}")
            return dict(run=run, stage=stage)
        if stop.signum:
            e.stopped()

    # Final evaluation in the real environment, and the self-check against --target-return.
    minutes = (time.time() - start) / 60
    with torch.no_grad():
        errors, pictures = e.measure()
    video = os.path.join(run, "videos", f"open_loop-{len(e.told)}.gif")
    logger.video("eval/open_loop", truth_recon_dream(*pictures), e.ticks + 1, video)
    logger.scalars({f"eval/{k}": v for k, v in errors.items()}, e.ticks + 1)
    say("on fresh episodes: " + ", ".join(f"{k}={v:.4g}" for k, v in errors.items()))
    returns = e.final()
    if args.capture_video:
        policy = AgentPlay(model, model.controller.theta.cpu().numpy()[None], 1)
        with contextlib.closing(e.pool(1, reporting(args))) as pool:
            keep = []
            e.play(pool, e.seeds(4, 0, 1), policy, store=lambda number, data: keep.append(data["frames"]))
        save_gif(list(keep[0].repeat(4, 1).repeat(4, 2)), os.path.join(run, "videos", "episode.gif"), 25)
    score, std = float(np.mean(returns)), float(np.std(returns))
    logger.scalars({"eval/episodic_return": score, "eval/episodic_return_std": std}, e.ticks + 1)
    logger.close()
    result = dict(episodic_return=score, episodic_return_std=std, returns=returns, random_return=e.random_return)
    result |= dict(global_step=e.steps, dream_steps=e.dream_steps, updates=sum(e.updates.values()), run=run)
    result |= dict(generations=len(e.told), train_return=e.train_return, dream_return=e.dream_return, minutes=minutes)
    result |= dict(temperature=args.temperature if args.dream else None, prediction_errors=errors)
    write_json(result | dict(peak_memory_gb=peak_memory(device)), os.path.join(run, "result.json"))
    if args.dream:
        say(f"in the dream at temperature {args.temperature:g}: {e.dream_return:.1f}; in the real environment:")
    finish(args, score, e.random_return)
    return result


if __name__ == "__main__":
    main(parse_args(Args, PRESETS, __doc__.split("\n\n    python")[0]))
