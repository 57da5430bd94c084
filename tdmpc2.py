# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#     "torch>=2.11,<2.14", "numpy>=2", "tyro>=1", "tensorboard>=2.20", "pillow>=10",
#     "gymnasium[box2d,classic-control]>=1.3,<2", "shimmy>=2.0.1,<3", "imageio", "packaging", "dm_control==1.0.50",
#     "mujoco==3.17.0",
# ]
# ///
"""TD-MPC2: Scalable, Robust World Models for Continuous Control.
Hansen, Su, Wang. ICLR 2024; arXiv:2310.16828v2. One task, state or pixels.

A world model without a decoder: it learns a latent in which the next latent, the reward and the value can be predicted,
and nothing else. At every step the agent plans in it: MPPI improves sequences of three actions, valued by predicted
rewards and a Q ensemble, starting from the last plan and from a policy that is learned beside it.

    python tdmpc2.py --env-id dm_control/walker-walk-v0            # the 5M model at full settings, on a GPU
    python tdmpc2.py --preset cpu                                  # Pendulum-v1 on a laptop, two minutes
    python tdmpc2.py --preset cpu --env-id my_module:MyEnv-v0      # your environment, on a laptop
    python tdmpc2.py --preset cpu_cartpole                         # DeepMind Control's cartpole-swingup, on a laptop
    python tdmpc2.py --env-id dm_control/cup-catch-v0 --pixels     # from three stacked frames of 64x64
    python tdmpc2.py --env-id BipedalWalker-v3 --episodic          # episodes that end: a termination head
    python tdmpc2.py --init-from walker-walk-1.pt                  # weights of the authors' checkpoints
    python tdmpc2.py --resume runs/NAME                            # go on, bit for bit on a CPU

Deviations from the paper and the authors' code (reasons and details: docs/tdmpc2.md):
  * Only the two members of the Q ensemble that are drawn are computed where two are drawn (same distribution).
  * Several environments are planned as one batch; an update follows each decision, as with one.
  * An episode can be replayed while it is still going on; the authors' buffer waits for its end.
Multi-task training (task embeddings, the 317M offline runs) is not here; the sizes are.

Symbols in shape comments:
  B  batch of sub-trajectories        L  latent                     S  sampled action sequences of a plan
  H  horizon                          A  action dimensions          E  elites of a plan
  N  environments                     K  bins of a two-hot head     Q  members of the ensemble
Time: row t holds observation t, the reward that came WITH it, whether the episode terminated there, and the action
taken AFTER seeing it. A transition of a batch is (obs[t], action[t]) -> (reward[t+1], terminated[t+1], obs[t+1]).
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


# A default without an equation is the authors' configuration, the same for all 104 tasks of the paper.
# fmt: off
Preset = Literal["full", "cpu", "cpu_cartpole"]
Size = Literal["1m", "5m", "19m", "48m", "317m"]


@dataclass
class Args:
    # Experiment
    env_id: str = "dm_control/walker-walk-v0"  # any gymnasium id with Box actions: dm_control/, my_module:MyEnv-v0
    preset: Preset = "full"  # named settings, see the commands above; explicit flags win over them
    total_timesteps: int = 500_000  # decisions, summed over environments (1M environment steps at action repeat 2)
    seed: int = 1  # seed of everything random: networks, noise, replay, environments
    resume: Optional[str] = None  # run directory to continue
    target_return: Optional[float] = None  # exit with code 1 if the final evaluation stays below this
    init_from: Optional[str] = None  # file with weights to start from: the authors' (dmcontrol) or a ckpt.pt
    size: Size = "5m"  # model size (table of sizes); latent_dim, mlp_dim ... come from it where None
    cuda: bool = True  # use the GPU if there is one
    compile: bool = True  # on a GPU: plans and updates as CUDA graphs
    bf16: bool = False  # compute in bfloat16 on a GPU; the published runs use TF32
    num_threads: Optional[int] = None  # CPU threads (None: torch's own choice)
    exp_name: str = "tdmpc2"  # part of the run directory's name
    torch_deterministic: bool = True  # deterministic kernels
    track: Optional[str] = None  # project of Weights and Biases that gets the curves too (needs wandb)
    log_every: int = 1000  # decisions between log lines
    save_every: int = 50_000  # decisions between checkpoints
    eval_episodes: int = 10  # episodes of the final evaluation and of the random baseline
    # Environment
    num_envs: int = 1  # environments in lockstep, planned as one batch
    env_kwargs: str = "{}"  # JSON object passed to gymnasium.make
    action_repeat: Optional[int] = None  # environment steps per decision (None: 2 for dm_control, else 1)
    max_episode_steps: Optional[int] = None  # decisions after which an episode is truncated (None: the environment's)
    pixels: bool = False  # observe three stacked rendered images instead of the environment's own observation
    image_size: int = 64  # images are resized to this many pixels per side
    episodic: bool = False  # episodes can terminate: learn and plan with a termination head
    # World model
    enc_dim: Optional[int] = None  # width of the encoder's hidden layers
    enc_layers: Optional[int] = None  # layers of the encoder
    mlp_dim: Optional[int] = None  # width of all other hidden layers
    latent_dim: Optional[int] = None  # L
    num_q: Optional[int] = None  # Q, members of the ensemble
    # Learning
    batch_size: int = 256  # B
    horizon: int = 3  # H, of training and planning
    rho: float = 0.5  # weight of a step relative to the one before
    consistency_coef: float = 20.0  # weight of the latent prediction loss
    reward_coef: float = 0.1  # weight of the reward loss
    value_coef: float = 0.1  # weight of the Q loss
    termination_coef: float = 1.0  # weight of the termination loss
    entropy_coef: float = 1e-4  # entropy bonus of the policy
    learning_rate: float = 3e-4  # of both Adams
    enc_lr_scale: float = 0.3  # the encoder's learning rate relative to it
    grad_clip: float = 20.0  # norm of all gradients of an optimizer
    tau: float = 0.01  # update rate of the target Qs and of the Q scale
    learning_starts: Optional[int] = None  # random decisions, then as many updates (None: max(1000, 5 episodes))
    buffer_size: int = 1_000_000  # replay capacity in rows, summed over environments
    # Planning
    iterations: int = 6  # of MPPI; 2 more where there are 20 action dimensions
    num_samples: int = 512  # S
    num_elites: int = 64  # E
    num_pi_trajs: int = 24  # sequences that come from the policy
    min_std: float = 0.05  # least deviation of the sampled actions
    max_std: float = 2.0  # largest deviation, and that of the first iteration
    temperature: float = 0.5  # of the elites' weights


SMALL = dict(
    size="1m", enc_dim=128, mlp_dim=128, latent_dim=64, num_q=2, batch_size=128, iterations=3, num_samples=128,
    num_elites=16, num_pi_trajs=8, learning_rate=1e-3, num_threads=1, compile=False)
PRESETS = dict(
    full=dict(),
    # A laptop: 184 thousand parameters, a quarter of the samples, half of the iterations, a larger learning rate.
    cpu=SMALL | dict(
        env_id="Pendulum-v1", action_repeat=2, total_timesteps=1_500, learning_starts=500, log_every=100,
        save_every=500),
    # As many decisions as planet_cem.py has in its CPU preset: action repeat 8, 125 an episode, 5 episodes at random.
    cpu_cartpole=SMALL | dict(
        env_id="dm_control/cartpole-swingup-v0", action_repeat=8, total_timesteps=1_625, learning_starts=625,
        log_every=125, save_every=1_000),
)
# fmt: on


def make_config(size="5m", **overrides):
    """Sizes of the networks: a dict for `WorldModel`. Overrides that are None are ignored."""
    names = ("enc_dim", "mlp_dim", "latent_dim", "enc_layers", "num_q")
    table = {"1m": (256, 384, 128, 2, 2), "5m": (256, 512, 512, 2, 5), "19m": (1024, 1024, 768, 3, 5)}
    table |= {"48m": (1792, 1792, 768, 4, 5), "317m": (4096, 4096, 1376, 5, 8)}
    config = dict(zip(names, table[size], strict=True)) | dict(episodic=False)
    return config | {k: v for k, v in overrides.items() if v is not None}


def model_config(args):
    """make_config of the flags of a run."""
    return make_config(**{k: getattr(args, k) for k in ("size", *make_config())})


GROUP, DROPOUT, BINS = 8, 0.01, 101  # size of SimNorm's groups; dropout in the first layer of each Q; bins of the heads


# ---- Maths -----------------------------------------------------------------------------------------------------------


def symlog(x):
    """sign(x) ln(|x| + 1) (DreamerV3, eq. 9): compresses large values, identity near 0."""
    return torch.log1p(x.clamp(min=0)) - torch.log1p(torch.relu(-x))  # with slope 1 at 0, where sign(x) would give 0


def symexp(x):
    """sign(x) (exp(|x|) - 1), the inverse of symlog."""
    return torch.expm1(x.clamp(min=0)) - torch.expm1(torch.relu(-x))


def two_hot(x, bins):
    """Two-hot encoding of symlog(x), x (...): (..., K) with weight on the two bins around it. bins (K,)."""
    x = symlog(x).clamp(bins[0], bins[-1])
    index = (torch.searchsorted(bins, x.contiguous(), right=True) - 1).clamp(max=len(bins) - 2)
    weight, index = ((x - bins[index]) / (bins[index + 1] - bins[index])).unsqueeze(-1), index.unsqueeze(-1)
    target = torch.zeros(*x.shape, len(bins), device=x.device)
    return target.scatter_(-1, index, 1 - weight).scatter_(-1, index + 1, weight)


def two_hot_inv(logits, bins):
    """Expectation of a two-hot head in symlog space, then symexp: (..., K) -> (...)."""
    return symexp(torch.softmax(logits.float(), -1) @ bins)


def soft_ce(logits, target, bins):
    """Cross entropy with two_hot(target): (..., K), (...) -> (...). `target` may lack leading axes of the logits."""
    return -(two_hot(target, bins) * torch.log_softmax(logits.float(), -1)).sum(-1)


def simnorm(x, dim=8):
    """Softmax inside groups of `dim` neighbours: latents are many small simplices. (..., L) -> (..., L)."""
    # NOTE: over a short last axis torch's softmax is ten times slower on a CPU than over one before it.
    groups = x.unflatten(-1, (-1, dim)).transpose(-1, -2).contiguous()
    return torch.softmax(groups, -2).transpose(-1, -2).flatten(-2)


class Mish(torch.autograd.Function):
    """x tanh(softplus(x)) = x - 2 x / ((1 + e^x)^2 + 1), three times faster on a CPU than torch's own."""

    @staticmethod
    def forward(ctx, x):
        if ctx:
            ctx.save_for_backward(x)
        u = x.exp().add_(1)  # an infinite one gives x
        return torch.addcdiv(x, x, torch.addcmul(x.new_ones(()), u, u), value=-2)

    @staticmethod
    def backward(ctx, grad):
        return torch.ops.aten.mish_backward(grad, *ctx.saved_tensors)


def mish(x):
    """x tanh(softplus(x))."""
    return Mish.apply(x) if torch.is_grad_enabled() else Mish.forward(None, x)


def discount(length, denominator=5, least=0.95, most=0.995):
    """Discount for episodes of `length` decisions: 0.99 for 500, within 0.95 and 0.995."""
    return min(max((length / denominator - 1) / (length / denominator), least), most)


def log_std(raw, low=-10.0, high=2.0):
    """Log standard deviation of the policy within its bounds: 0 -> -4."""
    return low + 0.5 * (high - low) * (torch.tanh(raw) + 1)


def gaussian_logprob(eps, log_std):
    """Log density of mean + eps * std under the Gaussian, summed over the actions: (..., A) -> (...)."""
    return (-0.5 * eps.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def td_target(reward, terminated, value, discount):
    """reward + discount (1 - terminated) value."""
    return reward + discount * (1 - terminated) * value


def mppi_update(actions, values, n_elites, temperature=0.5, min_std=0.05, max_std=2.0, choose=False):
    """One MPPI step: action sequences (..., H, S, A) and values (..., S) -> mean, std (..., H, A) of the elites,
    weighted by exp(temperature * (value - best)). choose: also their weights (..., E) and the elites (..., H, E, A)."""
    values, index = values.topk(n_elites, dim=-1)  # (..., E)
    elites = actions.gather(-2, index[..., None, :, None].expand(*actions.shape[:-2], n_elites, actions.shape[-1]))
    weights = torch.softmax(temperature * values, -1)
    score = weights[..., None, :, None]
    mean = (score * elites).sum(-2)
    std = (score * (elites - mean.unsqueeze(-2)).square()).sum(-2).sqrt().clamp(min_std, max_std)
    return (mean, std, weights, elites) if choose else (mean, std)


class RunningScale(nn.Module):
    """Scale of Q in the policy's loss: running range of the 5th to 95th percentile, starts at 1, never below."""

    def __init__(self, tau=0.01):
        super().__init__()
        self.tau = tau
        self.register_buffer("value", torch.ones(()))
        self.register_buffer("percentiles", torch.tensor([0.05, 0.95]), persistent=False)

    @torch.no_grad()
    def update(self, q):
        low, high = torch.quantile(q.float().flatten(), self.percentiles)
        self.value.lerp_((high - low).clamp(min=1), self.tau)


# ---- Networks --------------------------------------------------------------------------------------------------------


def joint(z, a, weight, bias):
    """A linear layer on [z, a], or on z alone. z may be common to many actions: z (N, 1, L), a (N, S, A)."""
    if a is None or z.shape[:-1] == a.shape[:-1]:
        return F.linear(z if a is None else torch.cat([z, a], -1), weight, bias)
    z_weight, a_weight = weight.tensor_split([z.shape[-1]], 1)
    return F.linear(z, z_weight, bias) + F.linear(a, a_weight)


class NormedLinear(nn.Linear):
    """Linear, LayerNorm, then Mish, or SimNorm in groups of `groups`."""

    def __init__(self, i, o, groups=None):
        super().__init__(i, o)
        self.ln, self.groups = nn.LayerNorm(o), groups

    def forward(self, z, a=None):
        x = self.ln(joint(z, a, self.weight, self.bias))
        return mish(x) if self.groups is None else simnorm(x, self.groups)


class NormedMLP(nn.Sequential):
    """NormedLinear layers and a plain Linear, or a last NormedLinear with SimNorm."""

    def __init__(self, i, widths, o, groups=None):
        sizes = [i, *widths]
        last = NormedLinear(sizes[-1], o, groups) if groups else nn.Linear(sizes[-1], o)
        super().__init__(*(NormedLinear(a, b) for a, b in zip(sizes, sizes[1:])), last)

    def forward(self, z, a=None):
        """z (..., L), and for functions of both a (..., A) -> (..., o)."""
        first, *rest = self
        x = first(z, a)
        for layer in rest:
            x = layer(x)
        return x


class EnsembleLinear(nn.Module):
    """n linear layers side by side: weight (n, o, i), bias (n, o), with LayerNorm if `norm`."""

    def __init__(self, n, i, o, norm=True):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(n, o, i)), nn.Parameter(torch.zeros(n, o))
        self.ln = nn.ParameterDict({"weight": torch.ones(n, o), "bias": torch.zeros(n, o)}) if norm else None

    def activate(self, x, pick, axis):
        """LayerNorm and Mish of x (rows, members, o), axis 0, or (members, rows, o), axis 1."""
        weight, bias = (self.ln[k][pick].unsqueeze(axis) for k in ("weight", "bias"))
        return mish(torch.addcmul(bias, F.layer_norm(x, x.shape[-1:]), weight))


class Ensemble(nn.ModuleList):
    """n MLPs of two hidden layers as batched matrix products; dropout in the first layer only."""

    def __init__(self, n, i, width, o):
        super().__init__(
            [EnsembleLinear(n, i, width), EnsembleLinear(n, width, width), EnsembleLinear(n, width, o, False)]
        )

    def forward(self, z, a, pick=slice(None), dropout=0.0):
        """z (..., L), a (..., A) -> (members, ..., o). pick: indices of the members to compute."""
        lead, (first, *rest) = z.shape[:-1], self
        weight = first.weight[pick]  # the input is common to all members: one matrix product
        x = joint(z.flatten(0, -2), a.flatten(0, -2), weight.flatten(0, 1), first.bias[pick].flatten())
        x = first.activate(F.dropout(x, dropout).unflatten(1, (len(weight), -1)), pick, 0).transpose(0, 1)
        for layer in rest:
            x = torch.baddbmm(layer.bias[pick].unsqueeze(1), x, layer.weight[pick].mT)  # (members, rows, o)
            x = x if layer.ln is None else layer.activate(x, pick, 1)
        return x.unflatten(1, lead)


class PixelEncoder(nn.Sequential):
    """Images (..., 64, 64, C) uint8 -> latents (..., L), L from the size of the images."""

    def __init__(self, shape, channels, groups):
        sizes, convs = [(shape[2], 7, 2), (channels, 5, 2), (channels, 3, 2), (channels, 3, 1)], []
        for i, kernel, stride in sizes:
            convs += [nn.Conv2d(i, channels, kernel, stride), nn.ReLU()]
        super().__init__(*convs[:-1], nn.Flatten())
        self.groups = groups

    def forward(self, x):
        lead, x = x.shape[:-3], x.flatten(0, -4).permute(0, 3, 1, 2).float()
        # Random shift by up to 3 pixels. NOTE: when acting, too, as in the authors' code.
        n, side, pad = len(x), x.shape[-1], F.pad(x, (3, 3, 3, 3), "replicate")
        rows, columns = torch.randint(7, (2, n, 1), device=x.device) + torch.arange(side, device=x.device)  # (n, side)
        x = pad[torch.arange(n, device=x.device)[:, None, None], :, rows[:, :, None], columns[:, None]].movedim(-1, 1)
        return simnorm(super().forward(x / 255 - 0.5), self.groups).unflatten(0, lead)


class WorldModel(nn.Module):
    """Encoder, latent dynamics, reward, Q ensemble, policy and, if episodic, termination. obs_space: a Box of float
    vectors or of uint8 images (H, W, C)."""

    def __init__(self, obs_space, action_dim, config):
        super().__init__()
        c = self.config = config
        L, M, K, groups = c["latent_dim"], c["mlp_dim"], BINS, GROUP
        if len(obs_space.shape) == 3:
            with torch.device("meta"):
                L = PixelEncoder(obs_space.shape, 32, 1)(torch.zeros(1, *obs_space.shape)).shape[-1]
            self.encoder = PixelEncoder(obs_space.shape, 32, groups)
        else:
            hidden = [c["enc_dim"]] * max(c["enc_layers"] - 1, 1)
            self.encoder = NormedMLP(obs_space.shape[0], hidden, L, groups)
        self.latent_dim, self.action_dim = L, action_dim
        self.dynamics = NormedMLP(L + action_dim, [M, M], L, groups)
        self.reward = NormedMLP(L + action_dim, [M, M], K)
        self.termination = NormedMLP(L, [M, M], 1) if c["episodic"] else None
        self.pi = NormedMLP(L, [M, M], 2 * action_dim)
        self.Qs = Ensemble(c["num_q"], L + action_dim, M, K)
        for module in self.modules():
            if isinstance(module, (nn.Linear, EnsembleLinear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        # NOTE: reward and Q start at exactly 0; otherwise early plans exploit the noise of the heads.
        nn.init.zeros_(self.reward[-1].weight)
        nn.init.zeros_(self.Qs[-1].weight)
        self.target_Qs = copy.deepcopy(self.Qs).requires_grad_(False)  # follows by averaging
        self.register_buffer("bins_at", torch.linspace(-10, 10, K), persistent=False)

    def act(self, z, noise=None):
        """Policy: z (..., L) -> action (..., A), its entropy and the entropy scaled by the action dimensions (...)."""
        mean, raw = self.pi(z).float().chunk(2, -1)
        std, eps = log_std(raw), torch.randn_like(mean) if noise is None else noise
        action, logp = torch.tanh(mean + eps * std.exp()), gaussian_logprob(eps, std)
        scaled = logp * action.shape[-1]
        logp = logp - torch.log(torch.relu(1 - action.square()) + 1e-6).sum(-1)  # of the squashed action
        return action, -logp, -logp * scaled / (logp + 1e-8)

    def two_q(self, z, a, nets=None, dropout=0.0):
        """Values of two members that are drawn anew: z (..., L), a (..., A) -> (2, ...). Only these are computed."""
        pick = torch.rand(self.config["num_q"], device=z.device).topk(2).indices
        return two_hot_inv((nets or self.Qs)(z, a, pick, dropout), self.bins_at)


def count_params(model):
    """Trained parameters of a module, or of the model of a size name (meta device; walker's spaces: 24 numbers, 6
    actions)."""
    if not isinstance(model, nn.Module):
        with torch.device("meta"):
            model = WorldModel(spaces.Box(-1, 1, (24,), np.float32), 6, make_config(model))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def rename(state, model):
    """The authors' state dict (both of their formats), or that of a ckpt.pt, as one of `model`; ValueError if it does
    not fit."""
    names, own = ("weight", "bias", "ln.weight", "ln.bias"), {}
    for name, value in state.items():
        name = name.removeprefix("_").replace("encoder.state.", "encoder.").replace("encoder.rgb.", "encoder.")
        name = name.replace("target_Qs_params.", "target_Qs.").replace("Qs.params.", "Qs.")
        net, *rest = name.split(".")
        if "Qs" in net and len(rest) == 1 and rest[0].isdigit():  # the older format counts tensors, not layers
            name = f"{net}.{int(rest[0]) // 4}.{names[int(rest[0]) % 4]}"
        own[name] = value
    target = model.state_dict()
    wrong = [k for k, v in target.items() if k not in own or own[k].shape != v.shape]
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(target)} tensors are missing or of other shape, such as {wrong[0]}")
    return {k: own[k] for k in target}


# ---- Planning --------------------------------------------------------------------------------------------------------


def estimate_value(model, z, actions, gamma):
    """Value of action sequences: z (N, 1, L), actions (N, H, S, A) -> (N, S): rewards, then Q."""
    total, factor = 0.0, 1.0  # factor: discount, and whether the episode is predicted to go on
    for a in actions.unbind(1):
        total = total + factor * two_hot_inv(model.reward(z, a), model.bins_at)
        z, factor = model.dynamics(z, a), factor * gamma
        if model.termination is not None:
            factor = factor * (model.termination(z)[..., 0] <= 0)  # NOTE: once over, over: later rewards do not count
    return total + factor * model.two_q(z, model.act(z)[0]).mean(0)


@torch.no_grad()
def plan(model, z, mean, args, gamma, greedy=False):
    """MPPI: latents z (N, L), means (N, H, A) of the last plans -> actions (N, A), new means."""
    N, S, P = len(z), args.num_samples, args.num_pi_trajs
    prior, last = [], z.unsqueeze(1).expand(-1, P, -1)
    for _ in range(args.horizon):
        prior.append(model.act(last)[0])
        last = model.dynamics(last, prior[-1]) if len(prior) < args.horizon else last
    prior = torch.stack(prior, 1)  # (N, H, P, A): sequences of the policy take part in every iteration
    # NOTE: the mean starts from the last plan, shifted by one step; the deviation starts anew.
    mean, z = F.pad(mean[:, 1:], (0, 0, 0, 1)), z.unsqueeze(1)
    std = torch.full_like(mean, args.max_std)
    for _ in range(args.iterations + 2 * (mean.shape[-1] >= 20)):
        noise = torch.randn(N, args.horizon, S - P, mean.shape[-1], device=mean.device)
        actions = torch.cat([prior, (mean.unsqueeze(2) + std.unsqueeze(2) * noise).clamp(-1, 1)], 2)
        values = estimate_value(model, z, actions, gamma).nan_to_num(0)
        mean, std, weights, elites = mppi_update(
            actions, values, args.num_elites, args.temperature, args.min_std, args.max_std, choose=True
        )
    # NOTE: not the mean is executed but an elite, drawn by its weight; noise is added while training only.
    pick = (weights.log() + torch.empty_like(weights).exponential_().log().neg()).argmax(-1)  # (N,), Gumbel
    action = elites[torch.arange(N, device=z.device), 0, pick]  # (N, A)
    action = action if greedy else (action + std[:, 0] * torch.randn_like(action)).clamp(-1, 1)
    return action, mean


# ---- Losses ----------------------------------------------------------------------------------------------------------


def latent_loss(model, batch, args, gamma):
    """Consistency, reward, value and termination losses of a batch {name: (H+1, B, ...)}. Returns them
    and the latents (H+1, B, L)."""
    obs, action, (reward, terminated) = (
        batch["obs"],
        batch["action"][:-1],
        (batch[k][1:].float() for k in ("reward", "terminated")),
    )
    with torch.no_grad():
        # NOTE: targets are the online encoder's latents of the next observations; only the Qs have a slow copy.
        target_z = model.encoder(obs[1:])  # (H, B, L)
        value = model.two_q(target_z, model.act(target_z)[0], model.target_Qs).amin(0)
        target = td_target(reward, terminated, value, gamma)  # (H, B)
    torch.clear_autocast_cache()  # NOTE: bfloat16 copies of weights made above carry no gradients
    zs = [model.encoder(obs[0])]
    for a in action.unbind():
        zs.append(model.dynamics(zs[-1], a))
    zs = torch.stack(zs)
    rho = args.rho ** torch.arange(len(action), device=action.device) / len(action)
    q = model.Qs(zs[:-1], action, dropout=DROPOUT)  # (Q, H, B, K)
    losses = {"consistency": (zs[1:] - target_z).square().mean((1, 2)) @ rho}
    losses["reward"] = soft_ce(model.reward(zs[:-1], action), reward, model.bins_at).mean(1) @ rho
    losses["value"] = soft_ce(q, target, model.bins_at).mean((0, 2)) @ rho
    if model.termination is not None:
        losses["termination"] = F.binary_cross_entropy_with_logits(model.termination(zs[1:])[..., 0], terminated)
    return losses, zs


def policy_loss(model, zs, scale, args):
    """Maximum-entropy policy on latents zs (H+1, B, L), without gradients to them or to Q."""
    action, entropy, scaled = model.act(zs)
    q = model.two_q(zs, action, dropout=DROPOUT).mean(0)  # (H+1, B)
    scale.update(q[0])
    rho = args.rho ** torch.arange(len(zs), device=zs.device)
    return -((args.entropy_coef * scaled + q / scale.value).mean(1) * rho).mean(), entropy.mean()


class Learner:
    """Model, optimizers and Q scale, and the one update of everything."""

    def __init__(self, model, args, gamma, device):
        self.model, self.args, self.gamma, self.device = model, args, gamma, device
        self.scale = RunningScale(args.tau).to(device)
        encoder, self.pi_params = list(model.encoder.parameters()), list(model.pi.parameters())
        others = {id(p) for p in encoder + self.pi_params}
        self.params = encoder + [p for p in model.parameters() if p.requires_grad and id(p) not in others]
        groups = [
            dict(params=encoder, lr=args.learning_rate * args.enc_lr_scale),
            dict(params=self.params[len(encoder) :]),
        ]
        options = dict(fused=True, capturable=device.type == "cuda")
        self.opt = torch.optim.Adam(groups, args.learning_rate, **options)
        self.pi_opt = torch.optim.Adam(self.pi_params, args.learning_rate, eps=1e-5, **options)
        self.coefs = {k: getattr(args, f"{k}_coef") for k in ("consistency", "reward", "value", "termination")}
        self.bad = torch.zeros((), dtype=torch.bool, device=device)  # whether something was not finite, from then on
        self.autocast = partial(
            torch.autocast, device.type, torch.bfloat16, enabled=args.bf16 and device.type == "cuda"
        )

    def update(self, batch):
        """One step of both optimizers on a batch {name: (H+1, B, ...)}. Returns metrics."""
        with self.autocast():
            losses, zs = latent_loss(self.model, batch, self.args, self.gamma)
        metrics = {k: v.detach() for k, v in losses.items()}
        metrics["grad_norm"] = self.step(self.opt, self.params, sum(self.coefs[k] * v for k, v in losses.items()))
        self.model.Qs.requires_grad_(False)  # the policy's loss moves the policy alone
        with self.autocast():
            loss, entropy = policy_loss(self.model, zs.detach(), self.scale, self.args)
        metrics |= dict(policy=loss.detach(), entropy=entropy.detach())
        metrics["policy_grad_norm"] = self.step(self.pi_opt, self.pi_params, loss)
        self.model.Qs.requires_grad_(True)
        torch._foreach_lerp_(list(self.model.target_Qs.parameters()), list(self.model.Qs.parameters()), self.args.tau)
        return metrics | {"q_scale": self.scale.value}

    def step(self, opt, params, loss):
        """Backward and one step of an optimizer; none any more once a number is not finite. -> norm of gradients."""
        loss.backward()
        norm = nn.utils.clip_grad_norm_(params, self.args.grad_clip)
        self.bad |= ~torch.isfinite(norm)
        opt.found_inf = self.bad.float()  # decided on the device, nothing waits for it
        opt.step()
        opt.zero_grad()
        return norm.detach()

    def check(self, metrics, where):
        """Ends the run naming what was not finite, if something was. Waits for the device."""
        if self.bad:
            names = ", ".join(k for k, v in metrics.items() if not math.isfinite(v))
            names = names.replace("grad_norm", "gradient norm")
            raise SystemExit(f"not finite at {where}: {names}; no step was taken, ckpt.pt is from before it")

    def state_dict(self):
        return {k: getattr(self, k).state_dict() for k in ("model", "opt", "pi_opt", "scale")}

    def load_state_dict(self, state):
        for k, v in state.items():
            getattr(self, k).load_state_dict(v)
        for group in (*self.opt.param_groups, *self.pi_opt.param_groups):  # the run may have begun on another device
            group["capturable"] = self.device.type == "cuda"


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


# ---- Replay ----------------------------------------------------------------------------------------------------------


class Replay:
    """Ring buffers (environment, row), allocated once on `device`. A sample is `horizon` + 1 rows of one episode."""

    def __init__(self, capacity, num_envs, obs_space, action_dim, device="cpu", seed=0):
        """capacity: rows per environment."""
        specs = {
            "obs": (obs_space.shape, getattr(torch, obs_space.dtype.name)),
            "action": ((action_dim,), torch.float32),
        }
        specs |= {"reward": ((), torch.float32), "terminated": ((), torch.bool)}
        self.capacity, self.device = capacity, torch.device(device)
        self.data = {k: torch.zeros(num_envs, capacity, *s, dtype=d, device=device) for k, (s, d) in specs.items()}
        self.place = np.zeros((num_envs, capacity), np.int64)  # of a row in its episode
        self.count = np.zeros(num_envs, np.int64)  # rows ever added, per environment
        self.rng = np.random.default_rng(seed)

    def add(self, envs, place, rows):
        """Append one row to each environment in `envs` (n,): its place in the episode (n,), rows {name: (n, ...)}."""
        slots = self.count[envs] % self.capacity
        self.place[envs, slots] = place
        index = torch.as_tensor(envs * self.capacity + slots, device=self.device)
        for name, data in self.data.items():
            data.flatten(0, 1)[index] = torch.as_tensor(rows[name], device=self.device).to(data.dtype)
        self.count[envs] += 1

    def sample(self, batch_size, horizon):
        """Uniform over all stretches of `horizon` + 1 rows inside an episode: {name: (horizon+1, B, ...)}."""
        first = np.maximum(self.count - self.capacity, 0)
        lengths, starts = np.maximum(self.count - first - horizon, 0), np.zeros((0, 2), np.int64)
        for _ in range(1000):  # NOTE: stretches that cross episodes are drawn again
            envs = self.rng.choice(len(lengths), size=2 * batch_size, p=lengths / lengths.sum())
            rows = first[envs] + self.rng.integers(lengths[envs])
            a, b = (self.place[envs, (rows + n) % self.capacity] for n in (0, horizon))
            starts = np.concatenate([starts, np.stack([envs, rows], 1)[b == a + horizon]])
            if len(starts) >= batch_size:
                break
        else:
            raise SystemExit(f"episodes are too short for --horizon {horizon}")
        envs, rows = starts[:batch_size].T
        index = envs * self.capacity + (rows + np.arange(horizon + 1)[:, None]) % self.capacity  # (horizon+1, B)
        index = torch.as_tensor(index, device=self.device)
        return {k: v.flatten(0, 1)[index] for k, v in self.data.items()}

    def state_dict(self):
        filled = int(min(self.count.max(), self.capacity))
        rows = {k: v[:, :filled].to("cpu", copy=True) for k, v in self.data.items()}  # a view would save all of it
        counters = {"count": self.count.tolist(), "rng": self.rng.bit_generator.state}
        return counters | {"rows": rows, "place": torch.from_numpy(self.place[:, :filled].copy())}

    def load_state_dict(self, state):
        # NOTE: a resumed run has a larger capacity only if the smaller one had not wrapped yet; then rows keep places.
        for k, v in state["rows"].items():
            self.data[k][:, : v.shape[1]] = v.to(self.device)
        self.place[:, : state["place"].shape[1]] = state["place"].numpy()
        self.count, self.rng.bit_generator.state = np.array(state["count"]), state["rng"]


# ---- Environment -----------------------------------------------------------------------------------------------------


def resize(image, size):
    """(H, W, C) uint8 of any number of channels -> (size, size, C), bilinear, always a copy."""
    planes = [Image.fromarray(p).resize((size, size), Image.BILINEAR) for p in np.moveaxis(image, 2, 0)]
    return np.stack([np.asarray(p) for p in planes], 2)


def make_env(args, seed):
    """The environment as the agent sees it. Observations: float32 vectors (n,), all entries of a Dict joined, or with
    --pixels uint8 images (size, size, 9), three frames; actions: Box(-1, 1). Raises ValueError with what was wanted and
    what was found. Episodes are functions of the seed of their reset and of the actions; a first reset without a seed
    goes on from `seed`."""
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
    repeat = args.action_repeat or (2 if family == "dm_control" else 1)
    env = gym.wrappers.RepeatAction(env, repeat) if repeat > 1 else env
    if args.pixels:
        box = spaces.Box(0, 255, (args.image_size, args.image_size, 3), np.uint8)
        env = gym.wrappers.AddRenderObservation(env)
        env = gym.wrappers.TransformObservation(env, lambda x: resize(x, args.image_size), box)
        env = gym.wrappers.FrameStackObservation(env, 3)
        box = spaces.Box(0, 255, (args.image_size, args.image_size, 9), np.uint8)
        env = gym.wrappers.TransformObservation(env, lambda x: np.concatenate(x, -1), box)
    else:
        space, numbers = env.observation_space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
        parts = space.values() if isinstance(space, spaces.Dict) else [space]
        if not all(isinstance(s, numbers) for s in parts) or spaces.flatdim(space) > 4096:
            raise ValueError(f"observations must be up to 4096 numbers (or --pixels), found {space}")
        box = spaces.Box(-np.inf, np.inf, (spaces.flatdim(space),), np.float32)
        env = gym.wrappers.TransformObservation(env, lambda x: np.array(spaces.flatten(space, x), np.float32), box)
    a = env.action_space
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


def episode_length(args, env):
    """Decisions of an episode: the limit of the environment, or 1000 steps where it tells none (DeepMind Control's)."""
    repeat = args.action_repeat or (2 if args.env_id.startswith("dm_control/") else 1)
    return args.max_episode_steps or max(1, (env.spec.max_episode_steps or 1000) // repeat)


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

    def __init__(self, model, args, gamma, device="cpu"):
        self.model, self.args, self.gamma, self.device = model, args, gamma, device
        self.plan = lambda x: plan(model, model.encoder(x["obs"]), x["mean"], args, gamma)
        self.dream_space = spaces.Box(0, 1, (model.latent_dim,), np.float32)

    def seed(self, seed):
        """Its noise comes from torch's generator."""
        torch.manual_seed(int(seed))

    @torch.no_grad()
    def act(self, obs, state, first, greedy=False):
        """obs (N, ...), state None at the start, first (N,): a new episode begins -> actions (N, A), state: the plans'
        means (N, H, A)."""
        obs, first = (torch.as_tensor(np.asarray(x), device=self.device) for x in (obs, first))
        shape = (len(first), self.args.horizon, self.model.action_dim)
        mean = torch.zeros(shape, device=self.device) if state is None else state[0]
        mean = mean * ~first[:, None, None]
        if greedy:
            actions, mean = plan(self.model, self.model.encoder(obs), mean, self.args, self.gamma, greedy=True)
        else:
            actions, mean = self.plan({"obs": obs, "mean": mean})
        return actions.cpu().numpy(), (mean.clone(),)

    @torch.no_grad()
    def observe(self, obs, actions):
        """obs (N, T, ...) -> the latent of the last one (nothing is filtered: it has no memory), and of all."""
        z = self.model.encoder(torch.as_tensor(np.asarray(obs), device=self.device))
        return (z[:, -1],), z.cpu().numpy()

    @torch.no_grad()
    def imagine(self, state, actions):
        """One imagined transition of N dreams -> state, reward (N,), alive (N,), latents."""
        a, model = torch.as_tensor(np.asarray(actions), device=self.device).float(), self.model
        reward = two_hot_inv(model.reward(state[0], a), model.bins_at)
        z = model.dynamics(state[0], a)
        alive = torch.ones(len(z)) if model.termination is None else 1 - torch.sigmoid(model.termination(z)[..., 0])
        return (z,), reward.cpu().numpy(), alive.cpu().numpy(), z.cpu().numpy()


def load(run, device="cpu"):
    """The Agent of a run directory."""
    state = load_checkpoint(run)
    args = Args(**state["args"])
    env = make_env(args, args.seed)
    model = WorldModel(env.observation_space, env.action_space.shape[0], model_config(args)).to(device)
    model.load_state_dict(state["learner"]["model"])
    agent = Agent(model.eval(), args, discount(episode_length(args, env)), torch.device(device))
    agent.global_step, agent.random_return = state["loop"]["global_step"], state["loop"]["random_return"]
    env.close()
    return agent


# ---- Main ------------------------------------------------------------------------------------------------------------


def check_args(args):
    """What would end in a wrong result or an obscure error, before anything is created. -> an environment."""
    c = model_config(args)
    names = "num_envs batch_size horizon eval_episodes log_every save_every learning_rate iterations num_pi_trajs"
    rules = {name: (getattr(args, name) > 0, "more than 0") for name in names.split()}
    rules["latent_dim"] = c["latent_dim"] % GROUP == 0, f"a multiple of {GROUP}"
    rules["num_q"] = c["num_q"] >= 2, "at least 2"
    rules["num_samples"] = args.num_samples > args.num_pi_trajs, f"more than --num-pi-trajs {args.num_pi_trajs}"
    rules["num_elites"] = 0 < args.num_elites <= args.num_samples, f"within 1 and --num-samples {args.num_samples}"
    least = args.num_envs * (args.horizon + 2)
    rules["buffer_size"] = args.buffer_size >= 10 * least, f"at least {10 * least}"
    rules["learning_starts"] = args.learning_starts is None or args.learning_starts >= least, f"at least {least}"
    rules["image_size"] = not args.pixels or args.image_size >= 44, "at least 44"
    for name, (good, wanted) in rules.items():
        if not good:
            fail(f"--{name.replace('_', '-')} must be {wanted}, got {c.get(name, getattr(args, name))}")
    try:
        env = make_env(args, args.seed)
    except Exception as e:  # whatever it is, the environment cannot be used: its own words, in one line
        words = " ".join(f"--env-kwargs {args.env_kwargs} --seed {args.seed}: {type(e).__name__}: {e}".split())
        fail(f"--env-id {args.env_id} {words}")
    starts = args.learning_starts or max(1000, 5 * episode_length(args, env))
    if args.total_timesteps <= starts:
        fail(f"--total-timesteps must be beyond --learning-starts {starts}, got {args.total_timesteps}")
    print(f"{args.env_id} has observations {env.unwrapped.observation_space}")
    print(f"the agent sees {env.observation_space}, acts in {env.action_space}")
    return env, starts


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
    """The whole algorithm: plan and act, store, learn, repeat. Returns the final metrics."""
    # Set up, in an order that finds every mistake of the user's before the first file is made.
    state = load_checkpoint(args.resume) if args.resume else None
    env, starts = check_args(args)
    space, action_space, gamma, N = (
        env.observation_space,
        env.action_space,
        discount(episode_length(args, env)),
        args.num_envs,
    )
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    seed_everything(args, device)
    with torch.device(device):
        model = WorldModel(space, action_space.shape[0], model_config(args))
    if args.init_from and not args.resume:
        try:
            weights = torch.load(args.init_from, map_location="cpu", weights_only=True)
            weights = weights["learner"]["model"] if "learner" in weights else weights.get("model", weights)
            model.load_state_dict(rename(weights, model))
        except Exception as e:
            fail(f"--init-from {args.init_from}: {type(e).__name__}: {str(e).splitlines()[0]}")
    capacity = -(-min(args.buffer_size, 2 * args.total_timesteps + 10 * N) // N)
    replay = Replay(capacity, N, space, action_space.shape[0], device, args.seed)
    run, writer = start_run(args, args.env_id, device, state and state["loop"]["global_step"] + 1)
    stop, envs, learner = stop_signals(), make_envs(args, N, 0), Learner(model, args, gamma, device)
    agent = Agent(model, args, gamma, device)
    parts = [n for n in "encoder dynamics reward termination pi Qs".split() if getattr(model, n) is not None]
    parts = ", ".join(f"{n} {count_params(getattr(model, n)):,}" for n in parts)
    print(f"run: {run} on {device}\nparameters: {count_params(model):,} ({parts}); discount {gamma:g}", flush=True)
    if state:  # each environment is brought back to where it was by the seed of its episode and the actions since then
        c, (obs, reward, first, mean) = SimpleNamespace(**state["loop"]), state["now"]
        learner.load_state_dict(state["learner"])
        replay.load_state_dict(state["replay"])
        obs, reward, first, carry = obs.numpy(), reward.numpy(), first.numpy(), (mean.to(device),)
        for i, env in enumerate(envs.envs):
            env.reset(seed=episode_seed(args, 0, i, c.episode[i]))
            for action in c.history[i]:
                env.step(np.array(action, np.float32))
        set_rng_state(state["rng"])
        action_space.np_random.bit_generator.state = c.draws
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
    if args.compile and device.type == "cuda":
        learner.update, agent.plan = Graphed(learner.update), Graphed(agent.plan)
    never, ended, metrics, start = np.zeros(N, bool), [], {}, time.time()
    mark = start, c.global_step, c.updates  # of the last log line

    while c.global_step < args.total_timesteps:
        # Act: at random first, then by planning; store what was seen with what came before.
        if c.global_step < starts:
            actions = np.stack([action_space.sample() for _ in range(N)])
        else:
            actions, carry = agent.act(obs, carry, first)
        place = np.array([len(past) for past in c.history])
        replay.add(np.arange(N), place, dict(obs=obs, action=actions, reward=reward, terminated=never))
        for past, action in zip(c.history, actions.tolist(), strict=True):
            past.append(action)
        obs, reward, terminated, truncated, infos = envs.step(actions)
        c.global_step, first = c.global_step + N, terminated | truncated
        if first.any():
            if terminated.any() and not args.episodic:
                raise SystemExit(f"{args.env_id} has ended an episode as terminated: train it with --episodic")
            # NOTE: an episode's last observation is a row of its own; only `terminated` ends the return there.
            e = np.flatnonzero(first)
            rows = dict(obs=obs[e], action=np.zeros_like(actions[e]), reward=reward[e], terminated=terminated[e])
            replay.add(e, place[e] + 1, rows)
            for i in e:
                ended.append(float(infos["episode"]["r"][i]))
                writer.add_scalar("charts/episodic_return", ended[-1], c.global_step)
                writer.add_scalar("charts/episodic_length", int(infos["episode"]["l"][i]), c.global_step)
                c.episode[i], c.history[i], c.recent = c.episode[i] + 1, [], [*c.recent[-9:], ended[-1]]
            seeds = [episode_seed(args, 0, i, c.episode[i]) for i in range(N)]
            obs, _ = envs.reset(seed=seeds, options={"reset_mask": first})
            reward = np.where(first, 0.0, reward)

        # Learn: as many updates as decisions, those of the random phase all at its end.
        due = 0 if c.global_step < starts else N if c.updates else c.global_step
        if due > N:
            print(f"{due} updates on the random decisions", flush=True)
        for _ in range(due):
            batch = replay.sample(args.batch_size, args.horizon)
            metrics = learner.update({k: v.to(device) for k, v in batch.items()})
            c.updates += 1
            if device.type == "cpu":  # on a GPU this would wait for the device: there, when metrics are read
                learner.check(metrics, f"step {c.global_step}, update {c.updates}")

        # Log and save. On a GPU metrics are read here only: reading waits for the device.
        over = c.global_step >= args.total_timesteps
        log, save = (over or c.global_step % every < N for every in (args.log_every, args.save_every))
        save = save or stop
        if log or save:
            learner.check(metrics, f"step {c.global_step}, update {c.updates}")
        if log:
            seconds = time.time() - mark[0]
            charts = dict(SPS=(c.global_step - mark[1]) / seconds, updates_per_s=(c.updates - mark[2]) / seconds)
            for tag, value in (charts | metrics).items():
                writer.add_scalar(f"{'charts' if tag in charts else 'losses'}/{tag}", float(value), c.global_step)
            shown = f"{np.mean(ended):.1f} ({len(ended)} episodes)" if ended else "no episode ended since the last line"
            line = f"global_step={c.global_step}, episodic_return={shown}, updates={c.updates}, SPS={charts['SPS']:.0f}"
            print(line, flush=True)
            mark, ended = (time.time(), c.global_step, c.updates), []
        if save:
            c.seconds, start, c.draws = (
                c.seconds + time.time() - start,
                time.time(),
                action_space.np_random.bit_generator.state,
            )
            mean = torch.zeros(N, args.horizon, actions.shape[1]) if carry is None else carry[0]
            now = [*(torch.as_tensor(x) for x in (obs, reward, first)), mean]
            parts = dict(learner=learner.state_dict(), replay=replay.state_dict(), now=now, loop=vars(c))
            save_checkpoint(parts | dict(script="tdmpc2", args=asdict(args)), run)
        leave(run, stop)
    envs.close()
    return finish(args, c, agent, run, writer, stop)


if __name__ == "__main__":
    train(parse_args(Args, PRESETS, __doc__.split("\n\nDeviations")[0]))
