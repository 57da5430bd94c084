"""Every formula of planet_cem.py against closed forms, hand-computed values and slow explicit references.

Facts are those of PlaNet (Hafner et al., ICML 2019; arXiv:1811.04551v5) and of its authors' code. Where a plausible
wrong variant exists, the test also checks that the variant would give another number."""

import io
import itertools
import math
import os
import signal
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium.utils.env_checker import check_env
from test_environments import renders
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

import planet_cem as p

VECTOR = gym.spaces.Dict(observation=gym.spaces.Box(-np.inf, np.inf, (3,), np.float32))
MIXED = gym.spaces.Dict(
    image=gym.spaces.Box(0, 255, (16, 16, 3), np.uint8), vector=gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
)
SIZES = dict(belief_size=12, state_size=5, hidden_size=10, cnn_depth=4, reward_layers=2, reward_units=9)
CPU = torch.device("cpu")


class Linear(gym.Env):
    """x' = decay x + a, observed without noise, reward x'. Episodes of `length` steps, plus up to `spread` drawn from
    the seed: rows of different episodes can be told apart and every row can be checked against the one before it."""

    observation_space, action_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32), gym.spaces.Box(-1, 1, (1,))

    def __init__(self, decay=0.9, length=6, spread=0, terminal=False, render_mode=None):
        self.decay, self.length, self.spread, self.terminal = decay, length, spread, terminal

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.x = 0, float(self.np_random.uniform(-1, 1))
        self.last = self.length + int(self.np_random.integers(self.spread + 1))
        return np.float32([self.x]), {}

    def step(self, action):
        self.t, self.x = self.t + 1, self.decay * self.x + float(action[0])
        end = self.t == self.last
        return np.float32([self.x]), self.x, end and self.terminal, end and not self.terminal, {}


gym.register("PlanetLinear-v0", entry_point=Linear, disable_env_checker=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)


def make_args(**overrides):
    return p.Args(**(dict(env_id="PlanetLinear-v0", pixels=False, cuda=False, compile=False, kl_free=0.0) | overrides))


def config_of(**overrides):
    return {k: getattr(make_args(**(SIZES | overrides)), k) for k in p.SHAPES}


def tiny_model(space=VECTOR, actions=2, **overrides):
    """A small model whose biases are random too."""
    model = p.Planet(space, actions, config_of(**overrides))
    with torch.no_grad():
        for x in model.parameters():
            if x.dim() == 1:
                x.add_(0.3 * torch.randn_like(x))
    return model


def full_model(actions=1, size=64, device="meta", **overrides):
    """The model of the paper, by default without memory."""
    config = {k: getattr(p.Args(**overrides), k) for k in p.SHAPES}
    with torch.device(device):
        space = gym.spaces.Dict(observation=gym.spaces.Box(0, 255, (size, size, 3), np.uint8))
        return p.Planet(space, actions, config)


# Explicit formulas of the dynamics, from the reference card, for rows (n, .).


def slow_gru(rssm, x, h):
    gates = torch.sigmoid(torch.cat([x, h], -1) @ rssm.w + rssm.b)
    reset, update = gates[:, : rssm.belief], gates[:, rssm.belief :]
    candidate = torch.tanh(torch.cat([x, reset * h], -1) @ rssm.w_c + rssm.b_c)
    return update * h + (1 - update) * candidate


def slow_belief(rssm, s, h, a):
    return slow_gru(rssm, torch.relu(torch.cat([s, a], -1) @ rssm.inp.weight.T + rssm.inp.bias), h)


def slow_normal(rssm, x, first, last):
    out = torch.relu(x @ first.weight.T + first.bias) @ last.weight.T + last.bias
    return Normal(out[:, : rssm.sample], torch.log1p(out[:, rssm.sample :].exp()) + rssm.min_stddev)


def slow_prior(rssm, h):
    return slow_normal(rssm, h, rssm.prior_net[0], rssm.prior_net[2])


def slow_posterior(rssm, h, embed):
    return slow_normal(rssm, torch.cat([h, embed], -1), rssm.post_in, rssm.post_out)


def close(a, b, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def states_close(a, b):
    for x, y in zip(a, b, strict=True):
        close(x, y)


# ---- Preprocessing ---------------------------------------------------------------------------------------------------


def test_preprocess_without_noise_is_the_lower_end_of_the_level():
    """32 levels of 8 colours each, level / 32 - 0.5; dividing by 255 or leaving out the -0.5 gives other numbers."""
    img = torch.tensor([0, 7, 8, 127, 128, 248, 255], dtype=torch.uint8)
    expected = [-0.5, -0.5, 1 / 32 - 0.5, 15 / 32 - 0.5, 0.0, 31 / 32 - 0.5, 31 / 32 - 0.5]
    out = p.preprocess(img, 5, False)
    assert out.tolist() == expected and out.dtype == torch.float32


@pytest.mark.parametrize("bits", range(1, 9))
def test_preprocess_stays_in_half_open_intervals(bits):
    """Whatever the noise in [0, 1), also the largest float below 1, a colour stays within its level's interval."""
    img = torch.arange(256, dtype=torch.uint8)
    width = 2 ** (8 - bits)
    for noise in (0.0, 0.5, 1 - 2.0**-24):
        x = p.preprocess(img, bits, torch.full((256,), noise))
        low = (img // width).double() / 2**bits - 0.5
        assert (x.double() >= low).all() and (x.double() < low + 2.0**-bits).all()
        assert x.min() >= -0.5 and x.max() < 0.5
        assert torch.equal(((x + 0.5) * 2**bits).floor().int() * width, img.int() // width * width)


def test_preprocess_ends_of_the_range():
    """0 -> [-0.5, -0.5 + 1/32), 255 -> [31/32 - 0.5, 0.5), and with 5 bits the floor gives (img // 8) * 8 back."""
    black, white = p.preprocess(torch.zeros(100_000)), p.preprocess(torch.full((100_000,), 255))
    assert -0.5 <= black.min() and black.max() < -0.5 + 1 / 32
    assert 31 / 32 - 0.5 <= white.min() and white.max() < 0.5
    img = torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(((p.preprocess(img) + 0.5) * 32).floor() * 8, (img // 8 * 8).float())


def test_preprocess_noise_is_uniform_and_new_at_every_use():
    """U(0, 1) / 32: mean 1/64, standard deviation 1 / (32 sqrt 12); a second call draws again."""
    img = torch.full((200_000,), 128, dtype=torch.uint8)
    a, b = p.preprocess(img), p.preprocess(img)
    assert (a != b).float().mean() > 0.99
    assert float(a.mean()) == pytest.approx(1 / 64, abs=1e-4)
    assert float(a.std()) == pytest.approx(1 / 32 / math.sqrt(12), rel=0.01)
    assert abs(float(((a - 1 / 64) * (b - 1 / 64)).mean())) < 1e-6


def test_acting_sees_the_same_preprocessing_as_training():
    """`filter`, used when acting, encodes 5-bit colours with fresh noise, channels first."""
    model, seen = tiny_model(MIXED), []
    model.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    obs = {"image": torch.randint(256, (2, 16, 16, 3), dtype=torch.uint8), "vector": torch.randn(2, 2)}
    for _ in range(2):
        model.filter(obs, torch.ones(2), model.rssm.initial(2), torch.zeros(2, 2))
    a, b = (x["image"] for x in seen)
    assert a.shape == (2, 3, 16, 16) and (a != b).float().mean() > 0.99
    for x in (a, b):
        assert torch.equal(((x + 0.5) * 32).floor().movedim(1, -1) * 8, (obs["image"] // 8 * 8).float())
    assert torch.equal(seen[0]["vector"], obs["vector"])  # vectors are taken as they are


# ---- KL, free nats, log-likelihoods ----------------------------------------------------------------------------------


def test_kl_closed_forms():
    """Equal: 0. N(1, 1) from N(0, 1) in 30 dimensions: 30 / 2. Standard deviation 2 from 1: 1.5 - ln 2 each."""
    zero, one = torch.zeros(30), torch.ones(30)
    assert float(p.kl_divergence(one, 3 * one, one, 3 * one)) == 0
    assert float(p.kl_divergence(one, one, zero, one)) == pytest.approx(15.0, abs=1e-5)
    assert float(p.kl_divergence(zero, 2 * one, zero, one)) == pytest.approx(30 * 0.8068528, rel=1e-6)
    assert float(p.kl_divergence(zero, one, zero, 2 * one)) == pytest.approx(30 * (math.log(2) - 0.375), rel=1e-6)


def test_kl_against_torch():
    """Sum over the last axis only, q first."""
    mq, mp = torch.randn(2, 4, 3, 6, dtype=torch.float64)
    sq, sp = torch.rand(2, 4, 3, 6, dtype=torch.float64) + 0.1
    kl = p.kl_divergence(mq, sq, mp, sp)
    assert kl.shape == (4, 3)
    close(kl, torch_kl(Normal(mq, sq), Normal(mp, sp)).sum(-1), rtol=1e-12, atol=1e-12)
    assert (kl - p.kl_divergence(mp, sp, mq, sq)).abs().max() > 0.1


def test_kl_gradients_flow_into_both_sides():
    """d/dmq = (mq - mp) / sp^2 = -d/dmp;  d/dsq = sq / sp^2 - 1 / sq;  d/dsp = 1 / sp - (sq^2 + (mq - mp)^2) / sp^3."""
    mq, sq, mp, sp = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (1.0, 0.5, -1.0, 2.0))
    grads = torch.autograd.grad(p.kl_divergence(mq, sq, mp, sp), (mq, sq, mp, sp))
    assert [float(g) for g in grads] == pytest.approx([0.5, 0.125 - 2.0, -0.5, 0.5 - 4.25 / 8])


@pytest.mark.parametrize("kl,free,loss,gradient", [(2.0, 3.0, 0.0, 0.0), (5.0, 3.0, 2.0, 1.0), (5.0, 0.0, 5.0, 1.0)])
def test_free_nats_of_equal_steps(kl, free, loss, gradient):
    """Below the free nats neither loss nor gradient; above it the excess."""
    x = torch.full((4, 3), kl, requires_grad=True)
    out = p.free_nats_loss(x, free)
    out.backward()
    assert float(out.detach()) == pytest.approx(loss)
    close(x.grad, torch.full((4, 3), gradient / 12))


def test_free_nats_are_per_step():
    """Steps of 1 and 7 nats: (0 + 4) / 2 and no gradient into the first. Clamping their mean of 4 would give 1."""
    x = torch.tensor([[1.0], [7.0]], requires_grad=True)
    out = p.free_nats_loss(x, 3.0)
    out.backward()
    assert float(out.detach()) == 2.0 and x.grad.tolist() == [[0.0], [0.5]]


def test_free_nats_with_mask():
    """Masked steps neither add nor count: (2 + 0 + 4) / 3."""
    kl = torch.tensor([[5.0, 1.0], [7.0, 100.0]])
    assert float(p.free_nats_loss(kl, 3.0, torch.tensor([[1.0, 1.0], [1.0, 0.0]]))) == pytest.approx(2.0)


def test_masked_mean():
    """All steps without a mask; of nothing it is 0, not a division by zero."""
    x = torch.tensor([1.0, 2.0, 30.0])
    assert float(p.masked_mean(x)) == 11.0
    assert float(p.masked_mean(x, torch.tensor([1.0, 1.0, 0.0]))) == 1.5
    assert float(p.masked_mean(x, torch.zeros(3))) == 0.0


def test_image_log_prob_closed_forms():
    """12,288 numbers, each -0.5 ln(2 pi) = -0.9189385 when exact; an error of 0.1 everywhere costs 61.44 more."""
    image = torch.rand(2, 5, 3, 64, 64) - 0.5
    exact = p.image_log_prob(image, image)
    assert exact.shape == (2, 5)
    close(exact, torch.full((2, 5), -12_288 * 0.9189385332), rtol=1e-5, atol=0)
    close(p.image_log_prob(image + 0.1, image), exact - 61.44, rtol=1e-6, atol=0.05)
    reference = Normal(image[0, 0] + 0.3, 1.0).log_prob(image[1, 1]).sum()
    close(p.image_log_prob(image[0, 0] + 0.3, image[1, 1]), reference, rtol=1e-6, atol=0.01)


def test_reward_log_prob_closed_forms():
    """Exact: -0.9189385; an error of 1: half a nat more. It is not summed."""
    out = p.reward_log_prob(torch.tensor([0.0, 1.0, -2.0]), torch.tensor([0.0, 0.0, 0.0]))
    assert out.tolist() == pytest.approx([-0.9189385, -1.4189385, -2.9189385], abs=1e-6)


# ---- GRU -------------------------------------------------------------------------------------------------------------


def gru_weights(x=4, h=3, dtype=torch.float64):
    return [torch.randn(s, dtype=dtype) for s in ((x + h, 2 * h), (2 * h,), (x + h, h), (h,))]


def test_gru_cell_closed_form():
    """Zero weights, gate bias 1: candidate tanh(0) = 0, update gate sigmoid(1): h' = 0.7310586 h."""
    h = torch.randn(5, 3)
    out = p.gru_cell(torch.randn(5, 4), h, torch.zeros(7, 6), torch.ones(6), torch.zeros(7, 3), torch.zeros(3))
    close(out, 0.7310586 * h, rtol=1e-6, atol=1e-7)


def test_gru_cell_gates_by_hand():
    """The first half of the gates resets, the second half keeps: with biases of +-100 they are 0 or 1 exactly."""
    x, h = torch.zeros(1, 4), torch.full((1, 3), 0.5)
    w, w_c = torch.zeros(7, 6), torch.zeros(7, 3)
    w_c[4:] = 2 * torch.eye(3)  # candidate tanh(2 r h)
    for r, u, expected in [(1, 1, 0.5), (0, 1, 0.5), (1, 0, math.tanh(1.0)), (0, 0, 0.0)]:
        b = torch.tensor([200.0 * r - 100] * 3 + [200.0 * u - 100] * 3)
        out = p.gru_cell(x, h, w, b, w_c, torch.zeros(3))
        assert out[0].tolist() == pytest.approx([expected] * 3, abs=1e-6)


def test_gru_cell_against_the_explicit_formula():
    """Joined inputs, tanh, any leading axes, values and gradients."""
    weights = gru_weights()
    rssm = SimpleNamespace(belief=3, **dict(zip(("w", "b", "w_c", "b_c"), weights)))
    x, h = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    inputs = [v.requires_grad_() for v in (x, h, *weights)]
    out = p.gru_cell(*inputs)
    expected = slow_gru(rssm, x.flatten(0, 1), h.flatten(0, 1)).view(2, 5, 3)
    close(out, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(2, 5, 3, dtype=torch.float64)
    pairs = zip(*(torch.autograd.grad((weight * y).sum(), inputs, retain_graph=True) for y in (out, expected)))
    for a, b in pairs:
        close(a, b, rtol=1e-10, atol=1e-12)


def test_gru_cell_is_not_the_one_of_torch():
    """torch applies the reset gate after the product and its update gate is this one: with equal weights the two cells
    differ, and the reset gate is the whole difference."""
    w, b, w_c, b_c = gru_weights(dtype=torch.float32)
    cell = torch.nn.GRUCell(4, 3)
    with torch.no_grad():
        cell.weight_ih.copy_(torch.cat([w[:4], w_c[:4]], 1).T)
        cell.weight_hh.copy_(torch.cat([w[4:], w_c[4:]], 1).T)
        cell.bias_ih.copy_(torch.cat([b, b_c]))
        cell.bias_hh.zero_()
        x, h = torch.randn(6, 4), torch.randn(6, 3)
        assert (p.gru_cell(x, h, w, b, w_c, b_c) - cell(x, h)).abs().max() > 0.01
        b[:3] = cell.bias_ih[:3] = 100.0  # reset gate 1 everywhere
        close(p.gru_cell(x, h, w, b, w_c, b_c), cell(x, h))


def test_gru_cell_leaves_its_inputs_alone():
    """It works in place inside; what it was given must survive, as states are used again."""
    x, h, weights = torch.randn(5, 4), torch.randn(5, 3), gru_weights(dtype=torch.float32)
    kept = [v.clone() for v in (x, h, *weights)]
    p.gru_cell(x, h, *weights)
    assert all(torch.equal(a, b) for a, b in zip((x, h, *weights), kept))


# ---- Cross-entropy method --------------------------------------------------------------------------------------------


def toward(goal_state, action):
    """s' = 0.9 s + a; the goal is part of the state and stays."""
    return 0.9 * goal_state[0] + action, goal_state[1]


def distance(states):
    return -((states[0] - states[1]) ** 2).sum(-1)


def slow_cem(start, goal, noise, elites):
    """One state, numpy loops: start, goal (A,), noise (I, J, H, A)."""
    iterations, candidates, H, A = noise.shape
    mean, std = np.zeros((H, A)), np.ones((H, A))
    for i in range(iterations):
        sequences = [np.clip(mean + std * noise[i, j], -1, 1) for j in range(candidates)]
        returns = []
        for sequence in sequences:
            s, total = start.copy(), 0.0
            for a in sequence:
                s = 0.9 * s + a
                total -= ((s - goal) ** 2).sum()
            returns.append(total)
        best = np.stack([sequences[j] for j in sorted(range(candidates), key=lambda j: -returns[j])[:elites]])
        mean = best.mean(0)
        std = np.sqrt(((best - mean) ** 2).mean(0) + 1e-6)
    return mean, std


def test_cem_against_explicit_loops():
    """Three states with goals of their own, the same noise: means and standard deviations of every step."""
    B, J, H, A, K, iterations = 3, 40, 4, 2, 6, 4
    noise = np.random.randn(iterations, B, J, H, A)
    start, goal = np.random.uniform(-1, 1, (2, B, A))
    state = torch.tensor(start), torch.tensor(goal)
    mean, std = p.cem(toward, distance, state, A, H, J, iterations, K, torch.tensor(noise))
    assert mean.shape == std.shape == (B, H, A)
    for b in range(B):
        expected = slow_cem(start[b], goal[b], noise[:, b], K)
        close(mean[b].double(), torch.tensor(expected[0]))
        close(std[b].double(), torch.tensor(expected[1]))


def test_cem_one_refit_by_hand():
    """Two elites 0.2 and 0.6 of four: mean 0.4, population deviation 0.2. A sample variance would give 0.283, the mean
    absolute deviation over K - 1 of the paper's print 0.4."""
    noise = torch.tensor([0.2, -0.9, 0.6, 5.0]).view(1, 1, 4, 1, 1)
    reward = {0.2: 3.0, -0.9: 1.0, 0.6: 4.0, 1.0: 2.0}  # 5.0 is clipped to 1.0

    def rewards(states):
        return torch.tensor([[reward[round(float(x), 4)] for x in states[0, :, 0]]])

    mean, std = p.cem(lambda s, a: a, rewards, torch.zeros(1, 1), 1, 1, 4, 1, 2, noise)
    assert float(mean) == pytest.approx(0.4, abs=1e-6)
    assert float(std) == pytest.approx(math.sqrt(0.04 + 1e-6), abs=1e-6)


def test_cem_of_equal_elites_has_the_floor_as_deviation():
    """Variance 0: sqrt(1e-6)."""
    noise = torch.full((3, 2, 5, 4, 2), 0.3)
    mean, std = p.cem(lambda s, a: s, lambda x: x.sum(-1), torch.zeros(2, 1), 2, 4, 5, 1, 3, noise)
    close(std, torch.full((2, 4, 2), 1e-3), rtol=1e-4, atol=0)
    close(mean, torch.full((2, 4, 2), 0.3))


def test_cem_adds_up_the_rewards_of_all_steps_without_discount():
    """Three candidates of the state's own value s_t = a_t: (1, 0, 0), (0, 0, 1.001) and (0.5, 0.5, 0). Equal weights
    prefer the second, a discount the first; the state before the first action does not count."""
    draw = torch.tensor([[0.99, 0, 0], [0, 0, 1.0], [0.5, 0.4, 0]]).view(1, 1, 3, 3, 1)
    mean, _ = p.cem(lambda s, a: a, lambda x: x[..., 0], torch.full((1, 1), 9.0), 1, 3, 3, 1, 1, draw)
    assert mean.flatten().tolist() == [0, 0, 1]


@pytest.mark.parametrize("goal", [0.3, -0.75, 2.0, -5.0])
def test_cem_converges_to_the_clipped_optimum(goal):
    """Reward -(a - goal)^2 at every step: clip(goal, -1, 1), and never outside of the box."""
    mean, std = p.cem(lambda s, a: a, lambda x: -((x[..., 0] - goal) ** 2), torch.zeros(1, 1), 1, horizon=3)
    assert mean.flatten().tolist() == pytest.approx([min(max(goal, -1), 1)] * 3, abs=0.02)
    assert mean.abs().max() <= 1 and (std < 0.1).all()


def test_cem_candidates_are_clipped_before_they_are_scored():
    """No action outside of [-1, 1] reaches the model, in any refit; the first draw is N(0, 1), so a third of its
    values stand at the bounds."""
    seen = []

    def step(state, action):
        seen.append(action.clone())
        return action

    p.cem(step, lambda x: x[..., 0], torch.zeros(1, 1), 1, horizon=2, candidates=2000, iterations=4, elites=50)
    actions = torch.stack(seen)
    assert len(actions) == 8 and actions.min() == -1 and actions.max() == 1
    assert float((actions[:2].abs() == 1).float().mean()) == pytest.approx(0.3173, abs=0.03)
    assert float(actions[:2].mean()) == pytest.approx(0, abs=0.05)


def test_cem_reaches_opposite_goals_of_two_states():
    """States 0 with goals +0.8 and -0.8: the plans drive to +-0.8 at once and stay there. If candidates of the two
    states were mixed up, both would be scored for a blend of the goals."""
    goal = torch.tensor([[0.8], [-0.8]])
    mean, _ = p.cem(toward, distance, (torch.zeros(2, 1), goal), 1)
    s, path = torch.zeros(2, 1), []
    for a in mean.unbind(1):
        s = 0.9 * s + a
        path.append(s)
    assert mean.shape == (2, 12, 1)
    assert mean[:, 0, 0].tolist() == pytest.approx([0.8, -0.8], abs=0.15)
    assert float((torch.stack(path) - goal).abs().mean()) < 0.1 and float((path[-1] - goal).abs().max()) < 0.3


def test_cem_goal_out_of_reach_at_first():
    """From 0 to 3.0, 1 per step at most: full actions until the goal is near (0.9 s + 1: 1, 1.9, 2.71, then 3)."""
    mean, _ = p.cem(toward, distance, (torch.zeros(1, 1), torch.full((1, 1), 3.0)), 1, horizon=8)
    assert mean[0, :3, 0].min() > 0.95
    assert mean[0, 3, 0] < 0.8  # 3 - 0.9 * 2.71 = 0.56 brings it there
    assert mean[0, 4:, 0].tolist() == pytest.approx([0.3] * 4, abs=0.25)


def test_cem_of_a_batch_equals_plans_of_single_states():
    """The same noise for each state, in a batch or alone, tensor state as well as tuple."""
    noise = torch.randn(5, 4, 60, 3, 2)
    start, goal = torch.randn(2, 4, 2)
    options = dict(action_dim=2, horizon=3, candidates=60, iterations=5, elites=8)
    together = p.cem(toward, distance, (start, goal), noise=noise, **options)
    for b in range(4):
        alone = p.cem(toward, distance, (start[b : b + 1], goal[b : b + 1]), noise=noise[:, b : b + 1], **options)
        states_close([x[b : b + 1] for x in together], alone)

    def tensor_step(s, a):
        return torch.cat(toward((s[:, :2], s[:, 2:]), a), -1)

    joined = p.cem(
        tensor_step, lambda x: distance((x[..., :2], x[..., 2:])), torch.cat([start, goal], -1), noise=noise, **options
    )
    states_close(joined, together)


def test_cem_is_reproducible_by_its_generator():
    """Equal generators, equal plans; it starts from N(0, 1) each time, whatever was planned before."""
    state = torch.zeros(1, 1), torch.full((1, 1), 0.4)
    plans = [
        p.cem(toward, distance, state, 1, 4, 50, 3, 5, generator=torch.Generator().manual_seed(s))[0] for s in (3, 3, 4)
    ]
    assert torch.equal(plans[0], plans[1]) and not torch.equal(plans[0], plans[2])


# ---- Networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("actions,total", [(1, 5_292_220), (2, 5_292_420), (6, 5_293_220)])
def test_parameter_counts_of_the_paper_s_size(actions, total):
    """The authors' sizes: transition and prior, posterior, encoder, decoder, reward head."""
    model = full_model(actions)
    parts = {n: p.count_params(getattr(model, n)) for n in ("encoder", "rssm", "decoder", "reward")}
    prior = 299_260 + 200 * (actions - 1)
    assert parts == dict(encoder=690_144, rssm=prior + 257_060, decoder=3_795_555, reward=250_201)
    assert p.count_params(model) == total == sum(parts.values())
    posterior = p.count_params(model.rssm.post_in) + p.count_params(model.rssm.post_out)
    assert posterior == 257_060 and p.count_params(model.rssm) - posterior == prior


def test_parameter_count_of_the_paper_s_reward_head():
    """2 layers of 200 instead of 3 of 300."""
    assert p.count_params(full_model(reward_layers=2, reward_units=200).reward) == 86_601


def test_intermediate_image_sizes():
    """Encoder 31, 14, 6, 2; decoder 5, 13, 30, 64; 1024 numbers between, without a dense layer behind the encoder, and
    the decoder ends and begins linearly."""
    model, sizes, x = full_model(device="cpu", cnn_depth=2), [], torch.zeros(1, 3, 64, 64)
    for module in (*model.encoder.convs, *model.decoder.ups):
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d)):
            module.register_forward_hook(lambda m, i, out: sizes.append(tuple(out.shape[1:])))
    embed = model.encoder({"observation": x})
    out = model.decoder(torch.zeros(1, 230))["observation"]
    assert sizes == [
        *((2, 31, 31), (4, 14, 14), (8, 6, 6), (16, 2, 2)),
        *((8, 5, 5), (4, 13, 13), (2, 30, 30), (3, 64, 64)),
    ]
    assert embed.shape == (1, 64) and out.shape == (1, 3, 64, 64) and full_model().encoder.out_dim == 1024
    kinds = [type(m).__name__ for m in (*model.encoder.convs, *model.decoder.ups)]
    assert kinds == ["Conv2d", "ReLU"] * 4 + ["Deconv", "ReLU"] * 3 + ["Deconv"]
    assert [m.kernel_size[0] for m in model.decoder.ups if hasattr(m, "stride")] == [5, 5, 6, 6]
    assert isinstance(model.decoder.start, torch.nn.Linear) and embed.min() >= 0


@pytest.mark.parametrize("side, kernel", [(1, 5), (5, 5), (13, 6), (3, 8), (2, 2)])
def test_deconv_is_the_transposed_convolution(side, kernel):
    """Values and all gradients are those of torch's own layer, to rounding in float64."""
    torch.manual_seed(0)
    mine, theirs = p.Deconv(3, 4, kernel).double(), torch.nn.ConvTranspose2d(3, 4, kernel, 2).double()
    theirs.load_state_dict(mine.state_dict())
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    outs, grads = [], []
    for layer in (mine, theirs):
        x_ = x.clone().requires_grad_(True)
        outs.append(layer(x_))
        (outs[-1] ** 3).sum().backward()
        grads.append([x_.grad, layer.weight.grad, layer.bias.grad])
    assert outs[0].shape == outs[1].shape == (2, 4, 2 * side + kernel - 2, 2 * side + kernel - 2)
    torch.testing.assert_close(outs[0], outs[1])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size,stages", [(16, 2), (32, 3), (64, 4)])
def test_decoder_gives_the_encoder_s_image_size(size, stages):
    """Every allowed image size comes out as it went in; 2x2 pixels are left between."""
    model = full_model(size=size, device="cpu", cnn_depth=2)
    embed = model.encoder({"observation": torch.rand(2, 3, 3, size, size) - 0.5})
    assert embed.shape == (2, 3, 4 * (2 << stages - 1))
    assert model.decoder(torch.randn(2, 3, 230))["observation"].shape == (2, 3, 3, size, size)


def test_encoder_and_decoder_against_explicit_layers():
    """Convolutions of stride 2 with ReLU behind each, taken flat; a linear layer to a 1 x 1 image and transposed
    convolutions with ReLU between them. A ReLU behind the linear layer or at the end would be seen."""
    model = full_model(device="cpu", cnn_depth=2)
    image, feat = torch.rand(2, 3, 64, 64) - 0.5, torch.randn(2, 230)
    x = image
    for layer in list(model.encoder.convs)[::2]:
        x = F.conv2d(x, layer.weight, layer.bias, stride=2).clamp(min=0)
    close(model.encoder({"observation": image}), x.reshape(2, 64))
    start, layers = model.decoder.start, list(model.decoder.ups)[::2]
    x = (feat @ start.weight.T + start.bias).reshape(2, 64, 1, 1)
    for i, layer in enumerate(layers):
        x = F.conv_transpose2d(x if i < 1 else x.clamp(min=0), layer.weight, layer.bias, stride=2)
    close(model.decoder(feat)["observation"], x)
    assert x.min() < 0 < x.max()


def test_encoder_takes_the_image_of_each_row():
    """Time and batch are folded together and unfolded in the same order, also for images beside vectors."""
    model = tiny_model(MIXED)
    obs = {"image": torch.rand(4, 3, 3, 16, 16) - 0.5, "vector": torch.randn(4, 3, 2)}
    embed = model.encoder(obs)
    feat = torch.randn(4, 3, 17)
    out = model.decoder(feat)
    assert embed.shape == (4, 3, model.encoder.out_dim) and out["vector"].shape == (4, 3, 2)
    for t, b in itertools.product(range(4), range(3)):
        close(embed[t, b], model.encoder({k: v[t, b][None] for k, v in obs.items()})[0])
        for k, v in model.decoder(feat[t, b][None]).items():
            close(out[k][t, b], v[0])


def test_initial_weights():
    """Glorot uniform weights, zero biases, gate biases of 1."""
    model = full_model(device="cpu", cnn_depth=4)
    r = model.rssm
    assert (r.b == 1).all() and (r.b_c == 0).all()
    biases = [x for n, x in model.named_parameters() if n.endswith("bias")]
    assert len(biases) == 18 and all((x == 0).all() for x in biases)
    for weight in (r.w, r.w_c, r.inp.weight, r.prior_net[0].weight, r.post_in.weight, model.reward[0].weight):
        bound = math.sqrt(6 / sum(weight.shape))
        assert weight.abs().max() <= bound and weight.abs().max() > 0.95 * bound
        assert float(weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    conv, up = model.encoder.convs[2].weight, model.decoder.ups[2].weight  # (out, in, 4, 4), (in, out, 5, 5)
    for weight in (conv, up):
        bound = math.sqrt(6 / ((weight.shape[0] + weight.shape[1]) * weight.shape[2] ** 2))
        assert 0.9 * bound < weight.abs().max() <= bound


def test_defaults_are_the_published_ones():
    """The card's table of full-scale defaults."""
    a = p.Args()
    assert (a.belief_size, a.state_size, a.hidden_size, a.min_stddev) == (200, 30, 200, 0.1)
    assert (a.reward_layers, a.reward_units, a.batch_size, a.batch_length) == (3, 300, 50, 50)
    assert (a.image_size, a.bits, a.reward_loss_scale, a.kl_scale, a.kl_free) == (64, 5, 10.0, 1.0, 3.0)
    assert (a.learning_rate, a.adam_eps, a.max_grad_norm) == (1e-3, 1e-4, 1000.0)
    assert (a.seed_episodes, a.updates_per_episode, a.action_noise, a.overshooting) == (5, 100, 0.3, 0)
    assert (a.plan_horizon, a.plan_iterations, a.plan_candidates, a.plan_elites) == (12, 10, 1000, 100)


def test_standard_deviation_has_a_floor():
    """Softplus + 0.1: a zero head gives ln 2 + 0.1, no input less than 0.1."""
    rssm = tiny_model().rssm
    mean, std = rssm.stats(torch.zeros(2, 10))
    assert mean.abs().max() == 0
    close(std, torch.full((2, 5), 0.7931472), rtol=1e-6, atol=0)
    _, std = rssm.stats(torch.full((2, 10), -1e4))
    close(std, torch.full((2, 5), 0.1), rtol=1e-6, atol=0)
    _, std = rssm.stats(30 * torch.randn(1000, 10))
    assert std.min() >= 0.1


def test_zero_heads_of_prior_and_posterior():
    """With zero output layers both are N(0, (ln 2 + 0.1)^2) whatever went in."""
    rssm = tiny_model().rssm
    for layer in (rssm.prior_net[2], rssm.post_out):
        torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    state, action = rssm.initial(3), torch.randn(3, 2)
    for out in (rssm.prior(state, action), rssm.posterior(state, action, torch.randn(3, 10))):
        close(out.stddev, torch.full((3, 5), 0.7931472))
        close(out.mean, torch.zeros(3, 5))


def test_prior_and_posterior_against_explicit_formulas():
    """One hidden layer each, the posterior sees the belief of the same step, which is that of the prior."""
    rssm = tiny_model().rssm
    state = p.State(torch.randn(4, 5), None, None, torch.randn(4, 12))
    action, embed, noise = torch.randn(4, 2), torch.randn(4, 10), torch.randn(4, 5)
    prior, post = rssm.prior(state, action, noise), rssm.posterior(state, action, embed, noise)
    h = slow_belief(rssm, state.sample, state.belief, action)
    assert torch.equal(prior.belief, post.belief)
    for out, dist in ((prior, slow_prior(rssm, h)), (post, slow_posterior(rssm, h, embed))):
        states_close(out, (dist.mean + dist.stddev * noise, dist.mean, dist.stddev, h))
    assert torch.equal(prior.feat, torch.cat([prior.sample, prior.belief], -1))


def test_samples_have_the_stated_distribution():
    """Mean and standard deviation of many draws of one state, without noise given."""
    rssm = tiny_model().rssm
    out = rssm.draw(torch.randn(1, 10).expand(100_000, 10), torch.zeros(100_000, 12))
    close(out.sample.mean(0), out.mean[0], rtol=0, atol=0.03)
    close(out.sample.std(0), out.stddev[0], rtol=0.03, atol=0)


def test_observe_against_a_loop():
    """Row t: belief from the posterior's sample of row t-1 and the action of row t; embedding of row t."""
    rssm = tiny_model().rssm
    T, B = 6, 3
    embed, action = torch.randn(T, B, 10), torch.randn(T, B, 2)
    start = p.State(torch.randn(B, 5), torch.randn(B, 5), torch.rand(B, 5), torch.randn(B, 12))
    for state in (None, start):
        prior, post = rssm.observe(embed, action, state, torch.Generator().manual_seed(5))
        noise = torch.randn(T, B, 5, generator=torch.Generator().manual_seed(5))
        assert all(x.shape[:2] == (T, B) for x in (*prior, *post))
        s, h = (start.sample, start.belief) if state else (torch.zeros(B, 5), torch.zeros(B, 12))
        for t in range(T):
            h = slow_belief(rssm, s, h, action[t])
            q, pr = slow_posterior(rssm, h, embed[t]), slow_prior(rssm, h)
            s = q.mean + q.stddev * noise[t]
            states_close([x[t] for x in post], (s, q.mean, q.stddev, h))
            states_close([x[t] for x in prior[1:]], (pr.mean, pr.stddev, h))


def test_observe_uses_action_and_embedding_of_the_same_row():
    """A change of the action of row 3 is felt by the belief of row 3, of the embedding by the posterior of row 3 but
    only the belief of row 4; nothing before. One row off would be seen here."""
    rssm = tiny_model().rssm
    embed, action = torch.randn(6, 1, 10), torch.randn(6, 1, 2)
    other_action, other_embed = action.clone(), embed.clone()
    other_action[3] += 1
    other_embed[3] += 1

    def run(embed, action):
        return rssm.observe(embed, action, generator=torch.Generator().manual_seed(1))

    prior, post = run(embed, action)

    def changed(a, b):
        return [bool((x - y).abs().max() > 1e-6) for x, y in zip(a, b)]

    prior_a, post_a = run(embed, other_action)
    assert changed(prior.belief, prior_a.belief) == [False] * 3 + [True] * 3
    assert changed(prior.mean, prior_a.mean) == changed(post.mean, post_a.mean) == [False] * 3 + [True] * 3
    prior_e, post_e = run(other_embed, action)
    assert changed(post.mean, post_e.mean) == [False] * 3 + [True] * 3
    assert changed(prior.mean, prior_e.mean) == changed(prior.belief, prior_e.belief) == [False] * 4 + [True] * 2


def test_observe_of_pieces_equals_observe_of_the_whole():
    """Filtering goes on from a given state."""
    rssm = tiny_model().rssm
    embed, action = torch.randn(7, 2, 10), torch.randn(7, 2, 2)
    with torch.no_grad():
        rssm.post_out.weight[5:] = 0
        rssm.post_out.bias[5:] = -100
    rssm.min_stddev = 1e-9  # no randomness
    _, whole = rssm.observe(embed, action)
    _, first = rssm.observe(embed[:4], action[:4])
    _, second = rssm.observe(embed[4:], action[4:], p.State(*(x[-1] for x in first)))
    states_close([torch.cat(x) for x in zip(first, second)], whole)


def test_imagine_one_step_equals_the_prior_of_observe():
    """From the posterior of row t-1 with the action of row t: mean, deviation and belief of the prior of row t."""
    rssm = tiny_model().rssm
    embed, action = torch.randn(6, 3, 10), torch.randn(6, 3, 2)
    prior, post = rssm.observe(embed, action)
    for t in range(1, 6):
        dream = rssm.imagine(p.State(*(x[t - 1] for x in post)), action[t : t + 1])
        states_close([x[0] for x in dream[1:]], [x[t] for x in prior[1:]])
    states_close([x[0] for x in rssm.imagine(rssm.initial(3), action[:1])[1:]], [x[0] for x in prior[1:]])


def test_imagine_against_a_loop():
    """Goes on from its own samples, one action per step."""
    rssm = tiny_model().rssm
    state = p.State(torch.randn(4, 5), None, None, torch.randn(4, 12))
    actions, noise = torch.randn(7, 4, 2), torch.randn(7, 4, 5)
    dream = rssm.imagine(state, actions, noise)
    assert [tuple(x.shape) for x in dream] == [(7, 4, 5)] * 3 + [(7, 4, 12)]
    s, h = state.sample, state.belief
    for t in range(7):
        h = slow_belief(rssm, s, h, actions[t])
        d = slow_prior(rssm, h)
        s = d.mean + d.stddev * noise[t]
        states_close([x[t] for x in dream], (s, d.mean, d.stddev, h))


def test_predict_reward_in_blocks():
    """Any leading axes, more rows than one block: the head of each row."""
    model, feat = tiny_model(), torch.randn(3, 700, 17)
    out = model.predict_reward(feat)
    assert out.shape == (3, 700)
    close(out, model.reward(feat)[..., 0])


@pytest.mark.parametrize("bf16", [False, True])
def test_plan_of_a_batch_drives_each_state_to_its_own_goal(bf16):
    """Planet.plan on hand-made dynamics: sample 0.9 s + a, goal in the belief. The first action of opposite goals, in
    both precisions."""
    model = tiny_model(actions=1)
    kinds = set()

    def step(rssm, state, action):
        kinds.add((state[0].dtype, state[1].dtype, rssm.w.dtype))
        return (0.9 * state[0] + action).to(state[0].dtype), state[1]

    model.plan_step = step
    model.predict_reward = lambda feat, head: -((feat[..., 0] - feat[..., 1]) ** 2)
    settings = dict(plan_horizon=5, plan_candidates=500, plan_iterations=8, plan_elites=50, plan_bf16=bf16)
    action = model.plan(torch.zeros(2, 1), torch.tensor([[0.7], [-0.7]]), settings)
    assert action.shape == (2, 1) and action[:, 0].tolist() == pytest.approx([0.7, -0.7], abs=0.15)
    assert kinds == {(torch.bfloat16 if bf16 else torch.float32,) * 3} and action.dtype == torch.float32


def test_plan_is_the_cem_of_prior_and_reward_head(monkeypatch):
    """Planning rolls the prior out from sample and belief, scores all predicted states, takes the first mean action
    and passes the settings on."""
    model, calls, real = tiny_model(), [], p.cem
    settings = dict(plan_horizon=3, plan_candidates=20, plan_iterations=2, plan_elites=4, plan_bf16=False)
    monkeypatch.setattr(p, "cem", lambda *a, **k: calls.append((a, real(*a, **k))) or calls[-1][1])
    sample, belief = torch.randn(2, 5), torch.randn(2, 12)
    action = model.plan(sample, belief, settings)
    (step, reward, state, *rest), (mean, _) = calls[0]
    assert rest == [2, 3, 20, 2, 4] and action.shape == (2, 2) and torch.equal(action, mean[:, 0])
    assert torch.equal(state[0], sample) and torch.equal(state[1], belief) and action.abs().max() <= 1
    a = torch.randn(2, 2)
    close(step(state, a)[1], slow_belief(model.rssm, sample, belief, a))
    close(reward((sample, belief)), model.reward(torch.cat([sample, belief], -1))[..., 0])


def test_bfloat16_rollout_is_close_to_float32_and_follows_the_weights():
    """Rewards predicted along one rollout with the same noise. The copies hold the weights of the present update, and
    are no parameters of the model."""
    model = tiny_model(belief_size=64, hidden_size=64, state_size=16)
    names, count = set(model.state_dict()), p.count_params(model)
    sample, belief, actions = torch.randn(50, 16), torch.randn(50, 64).tanh(), torch.rand(12, 50, 2) * 2 - 1
    noise = torch.randn(12, 50, 16)

    def rollout(rssm, reward, dtype):
        state = p.State(sample.to(dtype), None, None, belief.to(dtype))
        states = rssm.imagine(state, actions.to(dtype), noise.to(dtype))
        assert states.feat.dtype == dtype
        return model.predict_reward(states.feat, reward).float()

    for _ in range(2):
        with torch.no_grad():
            exact = rollout(*model.plan_networks(False), torch.float32)
            rough = rollout(*model.plan_networks(True), torch.bfloat16)
            assert (exact - rough).abs().mean() < 0.05 * exact.std() and exact.std() > 0.1
            assert (exact - rough).abs().max() > 0  # it is another precision
            for x in model.parameters():
                x.mul_(1.2)
    assert set(model.state_dict()) == names and p.count_params(model) == count
    settings = dict(plan_horizon=3, plan_candidates=20, plan_iterations=2, plan_elites=4, plan_bf16=True)
    assert model.plan(sample, belief, settings).dtype == torch.float32


def test_filter_forgets_state_and_action_where_an_episode_begins():
    """first = 1: as from the zero state with action 0; 0: from the given state and executed action."""
    model = tiny_model()
    state = p.State(torch.randn(2, 5), torch.randn(2, 5), torch.rand(2, 5), torch.randn(2, 12))
    obs, action = {"observation": torch.randn(2, 3)}, torch.randn(2, 2)
    out = model.filter(obs, torch.tensor([True, False]), state, action)
    embed, rssm = model.encoder(obs), model.rssm
    zero = slow_belief(rssm, torch.zeros(1, 5), torch.zeros(1, 12), torch.zeros(1, 2))
    h = torch.cat([zero, slow_belief(rssm, state.sample, state.belief, action)[1:]])
    q = slow_posterior(rssm, h, embed)
    states_close(out[1:], (q.mean, q.stddev, h))
    assert not out.mean.requires_grad


# ---- Losses ----------------------------------------------------------------------------------------------------------


def mean_draw(noise):
    """Rssm.draw with one number as noise: nothing random is left, and the samples still depend on the deviations."""

    def draw(self, x, belief, _=None):
        mean, std = self.stats(x)
        return p.State(mean + noise * std, mean, std, belief)

    return draw


def tiny_batch(space, T=5, B=3, masked=False):
    batch = {"action": torch.rand(T, B, 2) * 2 - 1, "reward": torch.randn(T, B), "mask": torch.ones(T, B)}
    if masked:
        batch["mask"][3:, 0] = batch["mask"][1:, 1] = 0
    for k, s in space.items():
        image = s.dtype == np.uint8
        shape = (T, B, *s.shape)
        batch[f"obs/{k}"] = torch.randint(256, shape, dtype=torch.uint8) if image else torch.randn(shape)
    return batch


def slow_loss(model, batch, args, noise):
    """The terms of the loss by loops over chunks, rows, distances and steps."""
    rssm, (T, B) = model.rssm, batch["reward"].shape
    S, D = rssm.sample, rssm.belief
    terms, far = {"reward": [], "kl": []}, {d: [] for d in range(2, min(args.overshooting, T) + 1)}
    for b in range(B):
        before, posts = [(torch.zeros(1, S), torch.zeros(1, D))], []
        for t in range(T):
            obs = {}
            for k in model.encoder.images:
                level = (batch[f"obs/{k}"][t, b] // 8).float().permute(2, 0, 1)
                obs[k] = ((level + 0.25) / 32 - 0.5)[None]
            for k in model.encoder.vectors:
                obs[k] = batch[f"obs/{k}"][t, b][None]
            h = slow_belief(rssm, *before[-1], batch["action"][t, b][None])
            prior, post = slow_prior(rssm, h), slow_posterior(rssm, h, model.encoder(obs))
            s = post.mean + noise * post.stddev
            before.append((s, h))
            posts.append(post)
            if not batch["mask"][t, b]:
                continue
            feat = torch.cat([s, h], -1)
            target = batch["reward"][t, b] * args.reward_scale
            terms["reward"].append(-args.reward_loss_scale * Normal(model.reward(feat)[0, 0], 1.0).log_prob(target))
            excess = torch_kl(post, prior).sum() - args.kl_free
            terms["kl"].append(args.kl_scale * torch.relu(excess))
            for k, x in model.decoder(feat).items():
                scale = args.recon_scale or ((64 / x.shape[-1]) ** 2 if x.dim() == 4 else 1)
                terms.setdefault(f"recon_{k}", []).append(-scale * Normal(x, 1.0).log_prob(obs[k]).sum())
        for d in far:
            for t in range(T - d + 1):
                row = t + d - 1
                if not batch["mask"][row, b]:
                    continue
                s, h = before[t]
                for j in range(d):
                    h = slow_belief(rssm, s, h, batch["action"][t + j, b][None])
                    foreseen = slow_prior(rssm, h)
                    s = foreseen.mean + noise * foreseen.stddev
                fixed = Normal(posts[row].mean.detach(), posts[row].stddev.detach())
                far[d].append(torch.relu(torch_kl(fixed, foreseen).sum() - args.kl_free))
    losses = {k: torch.stack(v).mean() for k, v in terms.items()}
    if far:
        total = sum(torch.stack(v).mean() if v else torch.zeros(()) for v in far.values())
        losses["overshooting"] = args.overshooting_scale / min(args.overshooting, T) * total
    return losses


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("overshooting", [0, 3, 50])
@pytest.mark.parametrize("space", [VECTOR, MIXED], ids=["vector", "image+vector"])
def test_model_loss_against_slow_loops(space, overshooting, masked, monkeypatch):
    """All terms and the gradients of their sum for every parameter: gradients through both sides of the KL and through
    samples, none into the targets of overshooting, rows that do not count."""
    model, batch = tiny_model(space), tiny_batch(space, masked=masked)
    args = make_args(kl_free=0.4, reward_scale=0.5, kl_scale=0.7, overshooting=overshooting, overshooting_scale=1.3)
    real = p.preprocess
    monkeypatch.setattr(p, "preprocess", lambda img, bits, noise: real(img, bits, torch.full(img.shape, 0.25)))
    monkeypatch.setattr(p.Rssm, "draw", mean_draw(0.7))
    losses, metrics = p.model_loss(model, batch, args)
    expected = slow_loss(model, batch, args, 0.7)
    assert set(losses) == set(expected) and ("overshooting" in losses) == (overshooting > 1)
    for k, v in expected.items():
        close(losses[k], v, rtol=1e-4, atol=1e-4)
    assert 0 < losses["kl"] and metrics["kl_nats"] > 0.4
    names, params = zip(*model.named_parameters())
    found = torch.autograd.grad(sum(losses.values()), params)
    wanted = torch.autograd.grad(sum(expected.values()), params)
    for name, a, b in zip(names, found, wanted):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3 * float(b.abs().max()), msg=lambda m, n=name: f"{n}: {m}")


def test_model_loss_draws_a_sample_for_every_row():
    """With sampling, two calls differ, and the posterior's sample is what heads and decoder see."""
    model, batch = tiny_model(), tiny_batch(VECTOR)
    a, b = (p.model_loss(model, batch, make_args())[0]["recon_observation"] for _ in range(2))
    assert a != b
    torch.manual_seed(4)
    losses, _ = p.model_loss(model, batch, make_args())
    torch.manual_seed(4)
    _, post = model.rssm.observe(model.encoder({"observation": batch["obs/observation"]}), batch["action"])
    x = model.decoder(post.feat)["observation"]
    close(losses["recon_observation"], -Normal(x, 1.0).log_prob(batch["obs/observation"]).sum(-1).mean())


def test_model_loss_gives_the_kl_gradient_to_prior_and_posterior():
    """The KL alone moves both networks: no stop-gradient on either side. One row, as the samples of earlier rows would
    carry gradients into the posterior by themselves."""
    model, batch = tiny_model(), tiny_batch(VECTOR, T=1)
    losses, _ = p.model_loss(model, batch, make_args())
    layers = model.rssm.prior_net[2].weight, model.rssm.post_out.weight
    grads = torch.autograd.grad(losses["kl"], layers)
    assert all(g.abs().max() > 1e-4 for g in grads)


def test_model_loss_below_the_free_nats_has_no_kl_gradient():
    """A KL loss of 0 without gradient, while the metric shows the nats."""
    model, batch = tiny_model(), tiny_batch(VECTOR)
    losses, metrics = p.model_loss(model, batch, make_args(kl_free=1e6))
    grads = torch.autograd.grad(losses["kl"], list(model.rssm.parameters()), allow_unused=True)
    assert float(losses["kl"].detach()) == 0 and metrics["kl_nats"] > 0
    assert all(g is None or g.abs().max() == 0 for g in grads)


def test_model_loss_closed_forms_of_zero_networks():
    """Decoder and reward head that predict 0: 16 x 16 x 3 numbers at -0.5 + 0.5/32 and a reward of 2, weights 16 (the
    image loss grows as (64 / size)^2), 1 and 10."""
    model, batch = tiny_model(MIXED), tiny_batch(MIXED)
    for net in (model.decoder.ups[-1], model.decoder.mlp[-1], model.reward[-1]):
        torch.nn.init.zeros_(net.weight), torch.nn.init.zeros_(net.bias)
    batch["obs/image"].zero_(), batch["obs/vector"].fill_(3.0), batch["reward"].fill_(2.0)
    c, real = 0.5 * math.log(2 * math.pi), p.preprocess
    p.preprocess = lambda img, bits, noise: real(img, bits, torch.full(img.shape, 0.5))
    try:
        losses, metrics = p.model_loss(model, batch, make_args())
        scaled, _ = p.model_loss(model, batch, make_args(recon_scale=2.0, reward_scale=0.5, reward_loss_scale=1.0))
    finally:
        p.preprocess = real
    pixel = 0.5 * (0.5 - 1 / 64) ** 2 + c
    assert float(losses["recon_image"].detach()) == pytest.approx(16 * 768 * pixel, rel=1e-5)
    assert float(losses["recon_vector"].detach()) == pytest.approx(2 * (4.5 + c), rel=1e-5)
    assert float(losses["reward"].detach()) == pytest.approx(10 * (2 + c), rel=1e-5)
    assert float(metrics["reward_mse"]) == pytest.approx(4.0, rel=1e-4)
    assert float(scaled["recon_image"].detach()) == pytest.approx(2 * 768 * pixel, rel=1e-5)
    assert float(scaled["recon_vector"].detach()) == pytest.approx(4 * (4.5 + c), rel=1e-5)
    assert float(scaled["reward"].detach()) == pytest.approx(0.5 + c, rel=1e-5)


def test_model_loss_ignores_what_stands_in_masked_rows():
    """Other observations, rewards and actions behind the end of an episode change nothing, also for overshooting."""
    model, batch = tiny_model(), tiny_batch(VECTOR, masked=True)
    args, other = make_args(overshooting=4), {k: v.clone() for k, v in batch.items()}
    for k in ("action", "reward", "obs/observation"):
        other[k][3:, 0] += 5
        other[k][1:, 1] += 5
    results = []
    for x in (batch, other):
        torch.manual_seed(3)
        results.append(p.model_loss(model, x, args)[0])
    for k, v in results[0].items():
        close(v, results[1][k], rtol=1e-6, atol=1e-6)
    other["reward"][0, 0] += 5
    torch.manual_seed(3)
    assert p.model_loss(model, other, args)[0]["reward"] != results[0]["reward"]


def test_chunks_start_from_the_zero_state_and_feed_their_first_action():
    """No row is left out and the first action of a chunk is used: changing it changes the loss of that row."""
    model, batch = tiny_model(), tiny_batch(VECTOR, T=1)
    _, post = model.rssm.observe(model.encoder({"observation": batch["obs/observation"]}), batch["action"])
    close(post.belief[0], slow_belief(model.rssm, torch.zeros(3, 5), torch.zeros(3, 12), batch["action"][0]))
    assert (post.belief != 0).any()


def test_overshooting_first_distance_is_the_ordinary_prior():
    """Entry [0] has the means, deviations and beliefs of the prior of `observe`, at every row."""
    rssm = tiny_model().rssm
    prior, post = rssm.observe(torch.randn(5, 3, 10), action := torch.randn(5, 3, 2))
    far, mask = p.overshooting(rssm, post, action, 4)
    assert [tuple(x.shape) for x in far] == [(4, 5, 3, 5)] * 3 + [(4, 5, 3, 12)]
    states_close([x[0] for x in far[1:]], prior[1:])
    assert mask[0].all()


@pytest.mark.parametrize("distance,rows", [(3, 3), (5, 5), (50, 5)])
def test_overshooting_mask_is_a_triangle_at_the_end(distance, rows):
    """Distance d reaches the last row d - 1 rows earlier; no more distances than rows."""
    rssm = tiny_model().rssm
    _, post = rssm.observe(torch.randn(5, 2, 10), action := torch.randn(5, 2, 2))
    far, mask = p.overshooting(rssm, post, action, distance)
    assert mask.tolist() == [[t + d < 5 for t in range(5)] for d in range(rows)] and len(far.mean) == rows
    assert mask.sum() == sum(5 - d for d in range(rows))


def test_overshooting_entries_by_loops(monkeypatch):
    """Entry [d-1, t]: d steps of the prior from the posterior of row t-1 with the actions of rows t to t+d-1."""
    monkeypatch.setattr(p.Rssm, "draw", mean_draw(0.7))
    rssm = tiny_model().rssm
    _, post = rssm.observe(torch.randn(5, 2, 10), action := torch.randn(5, 2, 2))
    far, mask = p.overshooting(rssm, post, action, 4)
    for d, t in itertools.product(range(4), range(5)):
        if not mask[d, t]:
            continue
        s, h = (post.sample[t - 1], post.belief[t - 1]) if t else (torch.zeros(2, 5), torch.zeros(2, 12))
        for j in range(d + 1):
            h = slow_belief(rssm, s, h, action[t + j])
            dist = slow_prior(rssm, h)
            s = dist.mean + 0.7 * dist.stddev
        states_close([x[d, t] for x in far], (s, dist.mean, dist.stddev, h))


@pytest.mark.parametrize("distance", [0, 1])
def test_overshooting_off(distance):
    """0 and 1 are the plain bound."""
    losses, _ = p.model_loss(tiny_model(), tiny_batch(VECTOR), make_args(overshooting=distance))
    assert set(losses) == {"recon_observation", "reward", "kl"}


# ---- Optimizer -------------------------------------------------------------------------------------------------------


def snapshot(learner):
    state = learner.opt.state_dict()["state"]
    moments = [v.clone() for s in state.values() for k, v in sorted(s.items())]
    return [x.detach().clone() for x in learner.params] + moments


@pytest.mark.parametrize("max_norm", [1000.0, 1e-3])
def test_first_adam_step_closed_form(max_norm):
    """lr g / (|g| + eps) with lr 1e-3 and eps 1e-4, after clipping the global norm. The clipped gradients are smaller
    than eps: with the usual 1e-8 each step would be the whole learning rate."""
    model, batch = tiny_model(), tiny_batch(VECTOR)
    learner = p.ModelLearner(model, make_args(max_grad_norm=max_norm), CPU)
    before = [x.detach().clone() for x in learner.params]
    torch.manual_seed(1)
    grads = torch.autograd.grad(sum(p.model_loss(model, batch, learner.args)[0].values()), learner.params)
    torch.manual_seed(1)
    metrics = learner.update(batch)
    norm = torch.stack([(g**2).sum() for g in grads]).sum().sqrt()
    close(metrics["grad_norm"], norm)
    factor = min(1.0, max_norm / float(norm))
    assert (factor == 1) == (max_norm == 1000)
    for old, new, g in zip(before, learner.params, grads):
        g = g * factor
        close(old - new.detach(), 1e-3 * g / (g.abs() + 1e-4), rtol=1e-2, atol=2e-7)


@pytest.mark.parametrize("key,value,name", [("reward", math.nan, "reward"), ("obs/observation", math.inf, "recon")])
@pytest.mark.parametrize("warm", [False, True])
def test_no_step_is_taken_on_bad_numbers(warm, key, value, name):
    """Parameters and moments stay as they were, bit for bit, and also in all later updates; `check` names the term."""
    learner = p.ModelLearner(tiny_model(), make_args(), CPU)
    good = tiny_batch(VECTOR)
    if warm:
        learner.update(good)
        learner.check()
    params = [x.detach().clone() for x in learner.params]
    before = snapshot(learner)
    learner.update(good | {key: torch.full_like(good[key], value)})
    after = snapshot(learner)
    assert all(torch.equal(a, b) for a, b in zip(params, learner.params))
    if warm:
        assert len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after))
    assert all((x == 0).all() for x in after[len(params) :]) or warm
    learner.update(good)
    assert all(torch.equal(a, b) for a, b in zip(params, learner.params))
    with pytest.raises(FloatingPointError, match=name):
        learner.check("step 7")


def test_updates_lower_the_loss():
    """A few steps on one batch; nothing is flagged."""
    learner, batch = p.ModelLearner(tiny_model(), make_args(learning_rate=1e-2), CPU), tiny_batch(VECTOR)
    losses = [sum(float(v) for k, v in learner.update(batch).items() if k in ("reward", "kl")) for _ in range(60)]
    learner.check()
    assert np.mean(losses[-10:]) < 0.95 * np.mean(losses[:10])


def test_learner_state_round_trip():
    """Weights and moments of a saved learner continue exactly."""
    a, batch = p.ModelLearner(tiny_model(), make_args(), CPU), tiny_batch(VECTOR)
    a.update(batch)
    torch.save(a.state_dict(), file := io.BytesIO())
    file.seek(0)
    b = p.ModelLearner(tiny_model(), make_args(), CPU)
    b.load_state_dict(torch.load(file))
    for learner in (a, b):
        torch.manual_seed(9)
        learner.update(batch)
    assert all(torch.equal(x, y) for x, y in zip(a.params, b.params))


# ---- Replay ----------------------------------------------------------------------------------------------------------


SPECS = {"obs/x": ((2,), torch.float32), "action": ((1,), torch.float32), "reward": ((), torch.float32)}


def episode(number, length):
    """Rows that say where they come from: observation (episode, t), action and reward of t = 0 are 0."""
    t = np.arange(length, dtype=np.float32)
    obs = np.stack([np.full(length, number, np.float32), t], -1)
    return {"obs/x": obs, "action": t[:, None] / 100, "reward": t}


def filled(lengths, capacity=100, seed=0):
    replay = p.ReplayBuffer(capacity, SPECS, seed=seed)
    for number, length in enumerate(lengths):
        replay.add(episode(number, length))
    return replay


def test_chunks_are_consecutive_rows_of_one_episode():
    """Time first; every chunk counts up by one within one episode, actions and rewards in the observation's row."""
    chunk = filled([10, 7, 20, 8, 13]).sample(400, 6)
    assert chunk["obs/x"].shape == (6, 400, 2) and chunk["reward"].shape == chunk["mask"].shape == (6, 400)
    number, t = chunk["obs/x"].unbind(-1)
    assert (number == number[0]).all() and torch.equal(t, t[0] + torch.arange(6.0)[:, None])
    assert torch.equal(chunk["reward"], t) and torch.equal(chunk["action"][..., 0], t / 100)
    assert (chunk["mask"] == 1).all() and set(number[0].tolist()) == {0, 1, 2, 3, 4}


def test_every_offset_is_reachable_and_equally_likely():
    """0 to length - L, both included: 0..4 of 10 rows in chunks of 6, the only one of 6 rows."""
    number, t = filled([10, 6]).sample(20_000, 6)["obs/x"][0].unbind(-1)
    offsets = t[number == 0].long()
    assert set(t[number == 1].tolist()) == {0.0}
    assert (torch.bincount(offsets) / len(offsets)).tolist() == pytest.approx([0.2] * 5, abs=0.02)


def test_episodes_are_drawn_uniformly_whatever_their_length():
    """A third each for episodes of 8, 30 and 50 rows; drawing rows uniformly would favour the long ones."""
    number = filled([8, 30, 50]).sample(20_000, 5)["obs/x"][0, :, 0].long()
    assert (torch.bincount(number) / 20_000).tolist() == pytest.approx([1 / 3] * 3, abs=0.02)


def test_short_episodes_are_masked():
    """4 rows in a chunk of 7: mask 1, 1, 1, 1, 0, 0, 0 and the last row repeated; long ones are complete."""
    chunk = filled([4, 9]).sample(200, 7)
    number, t = chunk["obs/x"].unbind(-1)
    short = number[0] == 0
    assert 0 < short.sum() < 200
    assert (chunk["mask"][:, short] == torch.tensor([1.0] * 4 + [0] * 3)[:, None]).all()
    assert (t[:, short] == torch.tensor([0.0, 1, 2, 3, 3, 3, 3])[:, None]).all() and (number[:, short] == 0).all()
    assert (chunk["mask"][:, ~short] == 1).all()


def test_the_oldest_episodes_make_room():
    """20 rows: after episodes of 8, 7, 5 it is full; another of 6 takes the place of the first alone, one of 9 that of
    the next; rows are intact across the seam of the ring."""
    replay = filled([8, 7, 5], capacity=20)
    assert list(replay.episodes) == [(0, 8), (8, 7), (15, 5)]
    replay.add(episode(3, 6))
    assert list(replay.episodes) == [(8, 7), (15, 5), (0, 6)]
    replay.add(episode(4, 9))
    assert list(replay.episodes) == [(15, 5), (0, 6), (6, 9)]
    replay.add(episode(5, 8))  # 5 + 6 + 9 + 8 > 20, without the first: 23, without the second: 17
    assert list(replay.episodes) == [(6, 9), (15, 8)]
    number, t = replay.sample(500, 4)["obs/x"].unbind(-1)
    assert set(number.flatten().tolist()) == {4, 5} and torch.equal(t, t[0] + torch.arange(4.0)[:, None])
    assert set(t[0, number[0] == 5].tolist()) == {0, 1, 2, 3, 4}  # its rows 5 to 7 lie at the ring's beginning


def test_an_episode_longer_than_the_ring_loses_its_beginning():
    """Its last rows stay, alone."""
    replay = filled([5, 30], capacity=12)
    assert [n for _, n in replay.episodes] == [12]
    number, t = replay.sample(300, 3)["obs/x"].unbind(-1)
    assert (number == 1).all() and set(t[0].tolist()) == set(range(18, 28))


@pytest.mark.parametrize("lengths", [[], [6, 9], [8, 7, 5, 6, 9, 8], [5, 30]])
def test_replay_state_round_trip(lengths):
    """The same episodes in the same order, and the same chunks from then on, also after a seam."""
    a, b = filled(lengths, capacity=20, seed=1), p.ReplayBuffer(20, SPECS, seed=2)
    b.load_state_dict(a.state_dict())
    assert [n for _, n in a.episodes] == [n for _, n in b.episodes]
    if not lengths:
        return
    for _ in range(3):
        x, y = a.sample(8, 4), b.sample(8, 4)
        assert set(x) == set(y) and all(torch.equal(x[k], y[k]) for k in x)
        for replay in (a, b):
            replay.add(episode(10, 7))


def test_replay_rows():
    """A 64 x 64 image, one action and a reward: 12,288 + 4 + 4 bytes, raw uint8."""
    specs = p.ReplayBuffer.specs(gym.spaces.Dict(observation=gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)), 1)
    assert specs["obs/observation"] == ((64, 64, 3), torch.uint8) and p.ReplayBuffer.row_bytes(specs) == 12_296
    replay = p.ReplayBuffer(4, specs)
    assert sum(v.numel() * v.element_size() for v in replay.data.values()) == 4 * 12_296


def test_sampling_by_another_generator_leaves_the_own_one_alone():
    """What a checkpoint takes for dreams does not change the training."""
    a, b = filled([10, 9]), filled([10, 9])
    a.sample(5, 4, np.random.default_rng(3))
    assert torch.equal(a.sample(9, 4)["obs/x"], b.sample(9, 4)["obs/x"])


# ---- Acting ----------------------------------------------------------------------------------------------------------

ACT = dict(plan_horizon=3, plan_candidates=20, plan_iterations=2, plan_elites=4)
LINE = gym.spaces.Dict(observation=gym.spaces.Box(-np.inf, np.inf, (1,), np.float32))


def play(args, policy, n=1, key=0):
    envs = p.make_envs(args, n, key)
    episodes, ended = p.collect(args, envs, policy)
    envs.close()
    return episodes, ended


def random_actions(seed=0):
    return p.random_policy(gym.spaces.Box(-1, 1, (1,)), seed)


@pytest.mark.parametrize("terminal", [False, True])
def test_rows_hold_the_action_and_reward_that_led_to_their_observation(terminal):
    """x_t = 0.9 x_{t-1} + a_t and r_t = x_t hold row by row, for episodes of different lengths in lockstep, including
    the true last observation; the first row has action 0 and reward 0. Shifted by one row the law breaks."""
    args = make_args(env_kwargs=f'{{"spread": 9, "terminal": {str(terminal).lower()}}}')
    episodes, ended = play(args, random_actions(), n=5)
    assert ended.tolist() == [terminal] * 5
    lengths = [len(e["reward"]) - 1 for e in episodes]
    assert len(set(lengths)) > 2 and min(lengths) >= 6 and max(lengths) <= 15
    for e in episodes:
        x, a, r = e["obs/observation"][:, 0], e["action"][:, 0], e["reward"]
        assert a[0] == 0 and r[0] == 0 and len(x) == len(a) == len(r)
        np.testing.assert_allclose(x[1:], 0.9 * x[:-1] + a[1:], atol=1e-5)
        np.testing.assert_allclose(r[1:], x[1:], atol=1e-5)
        assert np.abs(x[1:] - 0.9 * x[:-1] - a[:-1]).max() > 0.1


def test_first_row_of_an_episode_in_the_replay_has_no_action():
    """From the environment through `collect` and the buffer: the law holds within every chunk, and chunks that begin
    an episode begin with action 0."""
    replay = p.ReplayBuffer(200, p.ReplayBuffer.specs(LINE, 1))
    for e in play(make_args(env_kwargs='{"spread": 9}'), random_actions(), n=6)[0]:
        replay.add(e)
    chunk = replay.sample(300, 4)
    x, a = chunk["obs/observation"][..., 0], chunk["action"][..., 0]
    close(x[1:], 0.9 * x[:-1] + a[1:])
    starts = a[0] == 0
    assert starts.sum() > 20 and (chunk["reward"][0, starts] == 0).all() and (~starts).sum() > 20


def test_model_learns_a_linear_system_only_with_aligned_actions():
    """x' = 0.5 x + a with random actions: who knows the action foresees x' and the reward, who does not errs by at
    least Var(a) = 1/3. With actions stored a row early the model could still remember them, but then the first action
    of a dream would move nothing; it has to move x' by itself. The whole path: environment, collect, replay, updates,
    open-loop errors."""
    args = make_args(
        env_kwargs='{"decay": 0.5, "length": 30}', **SIZES | dict(belief_size=32, hidden_size=32, reward_units=32),
        recon_scale=30.0, learning_rate=5e-3, batch_size=16, batch_length=8,
    )  # fmt: skip
    replay = p.ReplayBuffer(1000, p.ReplayBuffer.specs(LINE, 1))
    for e in play(args, random_actions(), n=10)[0]:
        replay.add(e)
    model = p.Planet(LINE, 1, {k: getattr(args, k) for k in p.SHAPES})
    learner = p.ModelLearner(model, args, CPU)
    for _ in range(150):
        learner.update(replay.sample(args.batch_size, args.batch_length))
    fresh = play(args, random_actions(1), n=5, key=1)[0]
    errors = p.open_loop(model, fresh)
    shifted = [e | {"action": np.concatenate([e["action"][1:], e["action"][:1]])} for e in fresh]
    assert errors["posterior_mse_1"] < 0.05
    assert errors["open_loop_mse_1"] < 0.1 and errors["open_loop_mse_5"] < 0.15 and errors["reward_mse_1"] < 0.15
    assert 0.3 < errors["copy_last_mse_1"] < 0.6  # 2 Var(x) (1 - 0.5) = 4/9
    assert p.open_loop(model, shifted)["open_loop_mse_1"] > 0.25
    obs, previous = (torch.as_tensor(fresh[0][k][:10, None]) for k in ("obs/observation", "action"))
    with torch.no_grad():
        _, post = model.rssm.observe(model.encoder({"observation": obs}), previous)
        state, actions = p.State(*(x[-1].expand(2, -1) for x in post)), torch.tensor([[[-0.5], [0.5]]])
        low, high = model.decoder(model.rssm.imagine(state, actions, torch.zeros(1, 2, 5)).feat)[
            "observation"
        ].flatten()
    assert float(high - low) == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize("noise", [0.0, 0.3, 5.0])
def test_the_executed_action_is_fed_back(noise):
    """Planned action plus noise, clipped; this, not the planned mean, enters the next belief and the replay."""
    model = tiny_model(LINE, 1)
    fed, plans = [], []
    real = model.filter
    model.filter = lambda obs, first, state, previous: (
        fed.append((previous.clone(), first.clone())) or real(obs, first, state, previous)
    )
    model.plan = lambda sample, belief, settings: plans.append(torch.full((len(sample), 1), 0.4)) or plans[-1]
    (e,), _ = play(make_args(env_kwargs='{"length": 40}'), p.agent_policy(model, CPU, make_args(**ACT), noise))
    executed = e["action"]
    assert [float(x[0]) for x, _ in fed] == executed[:-1, 0].tolist()
    assert [bool(first) for _, first in fed] == [True] + [False] * 39
    assert np.abs(executed).max() <= 1 and executed[0] == 0
    deviation = executed[1:, 0] - np.float32(0.4)
    if noise == 0:
        assert (deviation == 0).all()
    elif noise == 0.3:
        inside = executed[1:, 0] < 1
        assert 0.15 < deviation.std() < 0.4 and inside.sum() > 30 and len(set(executed[1:, 0][inside])) == inside.sum()
    else:
        assert (np.abs(executed[1:]) == 1).mean() > 0.6  # almost every one is clipped


def test_exploration_noise_is_a_standard_deviation():
    """0.3 is not a variance: 4000 actions around 0 have deviation 0.3, not 0.55."""
    model = tiny_model(LINE, 1)
    model.plan = lambda sample, belief, settings: torch.zeros(len(sample), 1)
    action, _ = p.agent_policy(model, CPU, make_args(**ACT), 0.3)(
        {"observation": np.zeros((4000, 1), np.float32)}, np.ones(4000, bool), None
    )
    assert action.std() == pytest.approx(0.3, abs=0.01)


def test_policy_plans_from_a_sample_of_the_posterior():
    """The planner gets the sample and belief that `filter` gave, with the settings of the arguments."""
    model, seen = tiny_model(LINE, 1), []
    model.plan = lambda *inputs: seen.append(inputs) or torch.zeros(2, 1)
    policy = p.agent_policy(model, CPU, make_args(**ACT))
    _, (state, action) = policy({"observation": np.ones((2, 1), np.float32)}, np.ones(2, bool), None)
    assert torch.equal(seen[0][0], state.sample) and torch.equal(seen[0][1], state.belief)
    assert seen[0][2] == ACT | dict(plan_bf16=False) and (state.sample != state.mean).all()


def test_act_loop_is_reproducible():
    """Same seeds: the same episode with noise and without, bit for bit; another seed of the planner: another one."""
    model, args = tiny_model(LINE, 1), make_args(env_kwargs='{"spread": 3}', **ACT)

    def act(seed, noise):
        torch.manual_seed(seed)
        return play(args, p.agent_policy(model, CPU, args, noise), n=2)[0]

    for noise in (0.0, 0.3):
        a, b, c = act(1, noise), act(1, noise), act(2, noise)
        for x, y in zip(a, b):
            assert all(np.array_equal(x[k], y[k]) for k in x)
        assert all(np.array_equal(x["obs/observation"][0], y["obs/observation"][0]) for x, y in zip(a, c))
        assert not np.array_equal(a[0]["action"], c[0]["action"])


# ---- Prediction errors -----------------------------------------------------------------------------------------------


class Oracle:
    """A model whose state is the observation itself: the posterior sees it, the prior adds the action. reward = 3 x.
    `bias` is added by every dreamed step, `near` to what the posterior decodes."""

    config = dict(bits=5)

    def __init__(self, bias=0.0, near=0.0, scale=1.0):
        self.rssm, self.bias, self.near, self.scale = self, bias, near, scale

    def inputs(self, obs, noise=True):
        return obs

    def encoder(self, obs):
        return obs["observation"]

    def observe(self, embed, action):
        post = p.State(embed, embed, embed, torch.ones_like(embed))
        return post, post

    def imagine(self, state, actions):
        x = state.sample + actions.cumsum(0) + self.bias * torch.arange(1, len(actions) + 1)[:, None, None]
        return p.State(x, x, x, torch.zeros_like(x))

    def decoder(self, feat):
        return {"observation": feat[..., :1] + self.near * feat[..., 1:]}

    def predict_reward(self, feat):
        return 3 * feat[..., 0] * self.scale


def walk(rows, start=0.0):
    """x_t = x_{t-1} + a_t with growing actions: x_t = start + t (t + 1) / 2."""
    action = np.arange(rows, dtype=np.float32)[:, None]
    x = start + action.cumsum(0)
    return {"obs/observation": x, "action": action, "reward": np.where(np.arange(rows) > 0, 3.0 * x[:, 0], 0)}


def test_open_loop_of_an_exact_dream_has_no_error():
    """A prior that adds the right actions is exact at all horizons; one that used the actions a row off would not be.
    All five horizons fit into 60 rows."""
    errors = p.open_loop(Oracle(), [walk(60)])
    for h in (1, 5, 10, 20, 50):
        assert errors[f"open_loop_mse_{h}"] == errors[f"posterior_mse_{h}"] == errors[f"reward_mse_{h}"] == 0
        assert errors[f"copy_last_mse_{h}"] > 0
    assert errors["open_loop_mse"] == errors["posterior_mse"] == 0
    late = walk(60)
    late["action"] = np.roll(late["action"], 1, 0)
    assert p.open_loop(Oracle(), [late])["open_loop_mse_1"] == pytest.approx(1.0)


def test_open_loop_errors_by_horizon():
    """A dream that drifts by 0.5 per step errs by (0.5 h)^2; a posterior that is off by 2 errs by 4 everywhere; the
    reward by 9 times the drift's square."""
    errors = p.open_loop(Oracle(bias=0.5, near=2.0), [walk(60)])
    for h in (1, 5, 10, 20, 50):
        assert errors[f"open_loop_mse_{h}"] == pytest.approx((0.5 * h) ** 2, rel=1e-4)
        assert errors[f"posterior_mse_{h}"] == pytest.approx(4.0, rel=1e-4)
        assert errors[f"reward_mse_{h}"] == pytest.approx(9 * (0.5 * h) ** 2, rel=1e-3)
    mean = np.mean([(0.5 * h) ** 2 for h in (1, 5, 10, 20, 50)])
    assert errors["open_loop_mse"] == pytest.approx(mean, rel=1e-4)


def test_open_loop_starts_horizons_and_copies_by_hand():
    """12 rows x_t = t (t + 1) / 2 and 5 rows of context: starts at rows 4 to 10. One step ahead the copied row errs by
    t + 1 = 5 to 11; five ahead, from rows 4, 5 and 6 only, by 35, 40 and 45; ten steps do not fit."""
    errors = p.open_loop(Oracle(), [walk(12)])
    assert errors["copy_last_mse_1"] == pytest.approx(np.mean([n * n for n in range(5, 12)]))
    assert errors["copy_last_mse_5"] == pytest.approx((35**2 + 40**2 + 45**2) / 3)
    assert "copy_last_mse_10" not in errors and "open_loop_mse_10" not in errors
    assert errors["copy_last_mse"] == pytest.approx((errors["copy_last_mse_1"] + errors["copy_last_mse_5"]) / 2)
    x = walk(12)["obs/observation"][:, 0]
    targets = np.concatenate([x[5:12], x[9:12]])  # of one step and of five
    assert errors["mean_frame_mse"] == pytest.approx(((targets - x.mean()) ** 2).mean(), rel=1e-5)


def test_open_loop_with_other_context_and_several_episodes():
    """Errors are means over all starts of all episodes: 2 of the episode with 7 rows (context 5), 5 of the one with 10;
    an episode without a row behind the context does not count."""
    errors = p.open_loop(Oracle(), [walk(7), walk(10, 3.0), walk(5)])
    assert errors["copy_last_mse_1"] == pytest.approx(np.mean([25, 36, 25, 36, 49, 64, 81]))
    errors = p.open_loop(Oracle(), [walk(4)], context=1)
    assert errors["copy_last_mse_1"] == pytest.approx((1 + 4 + 9) / 3)
    assert p.open_loop(Oracle(), [walk(5)]) == {} and "too short" in p.horizon_table({})


def test_open_loop_takes_starts_from_the_whole_episode():
    """At most 4 starts of 15 possible ones: every fourth, rows 4, 8, 12, 16 of 20."""
    errors = p.open_loop(Oracle(), [walk(20)], max_starts=4)
    assert errors["copy_last_mse_1"] == pytest.approx(np.mean([25, 81, 169, 289]))


def test_open_loop_reward_is_in_the_environment_s_units():
    """The model learns rewards times the scale; errors and variance are of unscaled rewards."""
    e = walk(10, -20.0)
    e["reward"] -= e["reward"].mean()  # 10 rows with mean 0, and so is that of ...
    e["reward"][1:] += e["reward"][0] / 9  # ... the nine that count
    e["reward"][0] = 0
    errors = p.open_loop(Oracle(scale=0.1), [e], reward_scale=0.1)
    predicted = 3 * e["obs/observation"][5:, 0]
    assert errors["reward_mse_1"] == pytest.approx(((predicted - e["reward"][5:]) ** 2).mean(), rel=1e-4)
    assert errors["reward_variance"] == pytest.approx(e["reward"][1:].var(), rel=1e-4)


def test_open_loop_against_a_real_model(monkeypatch):
    """A learned model with sampling replaced by means, image observations: loops over starts and horizons, decoded
    images against the middles of the colours' intervals."""
    monkeypatch.setattr(p.Rssm, "draw", mean_draw(0.3))
    monkeypatch.setattr(p, "HORIZONS", (1, 2, 4))
    real = p.preprocess
    monkeypatch.setattr(
        p, "preprocess", lambda i, b, n: real(i, b, torch.full(i.shape, 0.25) if n is True else torch.full((), 0.5))
    )
    model, rows = tiny_model(MIXED), 9
    e = {
        "obs/image": np.random.randint(256, size=(rows, 16, 16, 3), dtype=np.uint8),
        "obs/vector": np.random.randn(rows, 2).astype(np.float32),
        "action": np.random.uniform(-1, 1, (rows, 2)).astype(np.float32), "reward": np.random.randn(rows),
    }  # fmt: skip
    errors = p.open_loop(model, [e], context=3, reward_scale=2.0)
    rssm, actions = model.rssm, torch.as_tensor(e["action"])
    image, vector = torch.as_tensor(e["obs/image"]).movedim(-1, -3), torch.as_tensor(e["obs/vector"])
    levels = (image // 8).float()
    truth = {"image": (levels + 0.5) / 32 - 0.5, "vector": vector}
    with torch.no_grad():
        s, h, post = torch.zeros(1, 5), torch.zeros(1, 12), []
        for t in range(rows):
            h = slow_belief(rssm, s, h, actions[t : t + 1])
            embed = model.encoder({"image": ((levels + 0.25) / 32 - 0.5)[t : t + 1], "vector": vector[t : t + 1]})
            q = slow_posterior(rssm, h, embed)
            s = q.mean + 0.3 * q.stddev
            post.append((s, h))
        for horizon in (1, 2, 4):
            found = {"open_loop": [], "posterior": [], "reward": []}
            for start in range(2, rows - horizon):
                s, h = post[start]
                for j in range(horizon):
                    h = slow_belief(rssm, s, h, actions[start + 1 + j][None])
                    d = slow_prior(rssm, h)
                    s = d.mean + 0.3 * d.stddev
                row = start + horizon
                for name, (a, b) in (("open_loop", (s, h)), ("posterior", post[row])):
                    decoded = model.decoder(torch.cat([a, b], -1))
                    found[name] += [float(((decoded[k][0] - truth[k][row]) ** 2).mean()) for k in truth]
                reward = float(model.reward(torch.cat([s, h], -1))) / 2
                found["reward"].append((reward - e["reward"][row]) ** 2)
            for name, values in found.items():
                assert errors[f"{name}_mse_{horizon}"] == pytest.approx(np.mean(values), rel=1e-4)


def test_targets_and_decoded_observations():
    """A perfect decoder predicts the middle of the reduced colour's interval, which is drawn as (img // 8) * 8 + 4."""
    model = tiny_model(MIXED)
    raw = {"image": torch.randint(256, (5, 16, 16, 3), dtype=torch.uint8), "vector": torch.randn(5, 2)}
    wanted = p.targets(model, raw)
    close(wanted["image"], (raw["image"] // 8).float().movedim(-1, 1) / 32 + 1 / 64 - 0.5)
    out = p.decoded_obs(wanted, MIXED)
    assert out["image"].dtype == np.uint8 and out["image"].shape == (5, 16, 16, 3)
    assert np.array_equal(out["image"], (raw["image"] // 8 * 8 + 4).numpy())
    assert np.array_equal(out["vector"], raw["vector"].numpy())
    bright = p.decoded_obs({"image": torch.tensor([-3.0, 3.0]).view(2, 1, 1, 1), "vector": torch.zeros(2, 2)}, MIXED)
    assert bright["image"].flatten().tolist() == [0, 255]


def test_dream_clips_show_the_rows_they_stand_beside():
    """An exact model shows the truth, while it sees it and while it dreams: posterior and actions of the same rows."""
    e = walk(30)
    truth, shown, context = p.dream_clips(Oracle(), LINE, e, context=4, length=10, clips=3)
    assert context == 4 and truth["observation"].shape == shown["observation"].shape == (3, 10, 1)
    np.testing.assert_array_equal(truth["observation"], shown["observation"])
    assert truth["observation"][:, 0, 0].tolist() == e["obs/observation"][[0, 10, 20], 0].tolist()
    _, shown, _ = p.dream_clips(Oracle(bias=1.0), LINE, e, context=4, length=10, clips=3)
    drift = (shown["observation"] - truth["observation"])[..., 0]
    assert drift.tolist() == [[0] * 4 + [1, 2, 3, 4, 5, 6]] * 3  # the dream begins behind the context
    assert p.dream_clips(Oracle(), LINE, walk(5))[2] == 2


# ---- The dream as an environment -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["vector", "image"])
def run(request, tmp_path_factory):
    """The run directory of a tiny training of the stub environment, and its arguments. The process is left as it was
    found."""
    home, argv, environ = os.getcwd(), sys.argv, dict(os.environ)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    others = [getattr(signal, s) for s in ("SIGUSR1", "SIGHUP") if hasattr(signal, s)]
    handlers |= {s: signal.getsignal(s) for s in others}
    folder = tmp_path_factory.mktemp("dream")
    os.chdir(folder)
    kwargs = {"vector": '{"action": "box"}', "image": '{"action": "box", "obs": "image"}'}[request.param]
    flags = (
        "--env-id stub_env:Stub-v0 --no-pixels --no-cuda --no-compile --total-timesteps 30 --seed-episodes 2 "
        "--initial-updates 3 --updates-per-episode 2 --batch-size 4 --batch-length 6 --eval-episodes 1 "
        "--report-every 0 --max-episode-steps 5 --image-size 16 --plan-candidates 10 --plan-elites 3 "
        "--plan-horizon 3 --plan-iterations 2 --reward-scale 0.5 --belief-size 12 --state-size 5 --hidden-size 10 "
        "--cnn-depth 4 --reward-units 9"
    ).split()
    try:
        sys.argv = ["planet_cem.py", *flags, "--env-kwargs", kwargs]
        result = p.main(p.parse_args(p.Args, p.PRESETS, ""))
        return os.path.join(folder, result["run"]), result
    finally:
        os.chdir(home)
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environ)
        for s, handler in handlers.items():
            signal.signal(s, handler)
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.set_float32_matmul_precision("highest")


def test_updates_and_episodes_of_a_run(run):
    """2 random episodes of 5 steps, 3 updates, then episodes and 2 updates in turn until 30 steps and after the last
    one: 4 planned episodes with 2 updates each."""
    _, result = run
    assert (result["global_step"], result["episodes"], result["updates"]) == (30, 6, 3 + 4 * 2)


@pytest.mark.filterwarnings("ignore:.*A Box observation space")
def test_dream_passes_gymnasium_s_checks(run):
    """Spaces, dtypes, determinism after a seed, shapes of the results."""
    env = p.DreamEnv(run[0])
    check_env(env, skip_render_check=True)
    assert env.action_space == gym.spaces.Box(-1, 1, (2,), np.float32)
    frame = env.render()
    assert frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3


def dream(env, seed, options=None, steps=5):
    out, rng = [env.reset(seed=seed, options=options)[0]], np.random.default_rng(0)
    for _ in range(steps):
        obs, reward, terminated, truncated, _ = env.step(rng.uniform(-1, 1, 2).astype(np.float32))
        assert not terminated
        out += [obs, reward, truncated]
    return out


def test_dream_is_reproducible_by_its_seed(run):
    """Equal seeds, equal dreams, whatever else drew random numbers; the dream ends after as many steps as an episode
    has."""
    a, b = (p.DreamEnv(run[0]) for _ in range(2))
    first = dream(a, 3)
    torch.rand(100)
    again, other = dream(b, 3), dream(b, 4)
    assert all(np.array_equal(x, y) for x, y in zip(first, again, strict=True))
    assert first[2] != other[2]
    assert first[3::3] == [False] * 4 + [True]
    assert p.DreamEnv(run[0], max_steps=2).max_steps == 2


def context_of(env, T=4):
    rng = np.random.default_rng(1)
    space = env.space["observation"]
    image = space.dtype == np.uint8
    obs = rng.integers(256, size=(T, *space.shape)).astype(np.uint8) if image else rng.normal(size=(T, *space.shape))
    return {"observations": obs, "actions": rng.uniform(-1, 1, (T, 2)).astype(np.float32)}


def test_dream_context_is_filtered_with_the_shifted_actions(run):
    """Action t follows observation t: inside, row t gets action t-1, row 0 none, the last one is not used. The state is
    that of filtering row by row with the generator's noise; then one step of the prior, reward in real units."""
    env = p.DreamEnv(run[0])
    options = context_of(env)
    random_state = torch.get_rng_state()
    env.reset(seed=3, options=options)
    assert torch.equal(random_state, torch.get_rng_state())  # a dream draws from its own generator only
    generator = torch.Generator().manual_seed(int(gym.utils.seeding.np_random(3)[0].integers(2**31)))
    obs = torch.as_tensor(options["observations"])
    if obs.dtype == torch.uint8:
        noise = torch.rand(4, 1, 3, 16, 16, generator=generator)
        obs = p.preprocess(obs.movedim(-1, -3), 5, noise[:, 0])
    noise, rssm = torch.randn(4, 1, 5, generator=generator), env.model.rssm
    s, h = torch.zeros(1, 5), torch.zeros(1, 12)
    with torch.no_grad():
        for t in range(4):
            previous = torch.as_tensor(options["actions"][t - 1][None]) if t else torch.zeros(1, 2)
            h = slow_belief(rssm, s, h, previous)
            q = slow_posterior(rssm, h, env.model.encoder({"observation": obs[t : t + 1].float()}))
            s = q.mean + q.stddev * noise[t]
        states_close(env.state, (s, q.mean, q.stddev, h))
        torch.randn(4, 1, 5, generator=generator)  # the samples of the priors, which nobody looks at here
        action = torch.tensor([[0.5, -1.0]])
        h = slow_belief(rssm, s, h, action)
        d = slow_prior(rssm, h)
        s = d.mean + d.stddev * torch.randn(1, 5, generator=generator)
        _, reward, *_ = env.step(np.float32([0.5, -7.0]))  # clipped to -1
        states_close(env.state, (s, d.mean, d.stddev, h))
        assert reward == pytest.approx(float(env.model.reward(torch.cat([s, h], -1))) / 0.5, rel=1e-4)


def test_dream_context_uses_all_actions_but_the_last(run):
    """Changing the last action changes nothing, changing any other one does; actions are clipped as outside."""
    env = p.DreamEnv(run[0])
    options = context_of(env)
    before = env.reset(seed=3, options=options)[0]
    belief = env.state.belief
    for t in range(4):
        actions = options["actions"].copy()
        actions[t] = -actions[t]
        env.reset(seed=3, options=options | {"actions": actions})
        assert torch.equal(belief, env.state.belief) == (t == 3)
    large = options["actions"].copy()
    large[1] = [9, -9]
    small = options["actions"].copy()
    small[1] = [1, -1]
    a, b = (env.reset(seed=3, options=options | {"actions": x})[0] for x in (large, small))
    assert np.array_equal(a, b) and not np.array_equal(a, before)


def test_dream_refuses_a_context_that_does_not_fit(run):
    """Observations and actions must be of one length, which is not 0."""
    env = p.DreamEnv(run[0])
    options = context_of(env)
    for bad in ({"actions": options["actions"][:3]}, {"actions": options["actions"][:0]}):
        with pytest.raises(ValueError, match="must all have T > 0"):
            env.reset(options=options | bad)


def test_checkpoint_s_context_is_real_experience(run):
    """Rows kept for dreams hold the stub's vectors (t, start, 0) in order."""
    context = p.DreamEnv(run[0]).context
    assert context["action"].shape[0] == 6 and "reward" not in context
    if context["obs/observation"].dtype == torch.float32:
        t = context["obs/observation"][..., 0]
        assert torch.equal(t, torch.arange(6.0)[:, None].expand_as(t))
    assert (context["action"][0] == 0).all() and (context["action"][1:] != 0).any()


# ---- DeepMind Control ------------------------------------------------------------------------------------------------


def control_args(task="cartpole-swingup", **overrides):
    return make_args(**(dict(env_id=f"dm_control/{task}-v0") | overrides))


def test_action_repeats_of_the_paper_s_tasks():
    """The table of appendix A; a flag wins; other tasks are not repeated."""
    table = {
        "cartpole-swingup": 8, "cartpole-balance": 8, "reacher-easy": 4, "cheetah-run": 4, "finger-spin": 2,
        "ball_in_cup-catch": 4, "walker-walk": 2, "hopper-hop": 1,
    }  # fmt: skip
    assert {t: p.repeat_of(control_args(t)) for t in table} == table
    assert p.repeat_of(control_args(action_repeat=3)) == 3 and p.repeat_of(make_args()) == 1


CASES = [("cartpole-swingup", None, 125), ("reacher-easy", None, 250), ("cartpole-swingup", 3, 334)]


@pytest.mark.parametrize("task,repeat,decisions", CASES)
def test_decisions_per_episode(task, repeat, decisions):
    """1000 physics steps in 1000 / R decisions, rounded up: with R = 3 the last one is cut short."""
    args = control_args(task, action_repeat=repeat)
    envs = p.make_envs(args, 1)
    episodes, ended = p.collect(args, envs, p.random_policy(envs.single_action_space, 0), keep=False)
    assert len(episodes[0]["reward"]) - 1 == decisions and not ended[0]
    assert p.probe_env(args)[2] == decisions
    envs.close()


@pytest.mark.parametrize("repeat", [None, 3])
def test_reward_is_the_sum_over_the_repeats(repeat):
    """Against the suite itself: the same start, every action R times, rewards added up, last observation."""
    suite = pytest.importorskip("dm_control.suite")
    env, raw = p.make_env(control_args(action_repeat=repeat), 0)(), suite.load("cartpole", "swingup")
    env.reset(), raw.reset()
    start = env.unwrapped.env.physics.data
    with raw.physics.reset_context():
        raw.physics.data.qpos[:], raw.physics.data.qvel[:] = start.qpos, start.qvel
    rng, total = np.random.default_rng(0), 0.0
    for _ in range(20):
        action = rng.uniform(-1, 1, 1).astype(np.float32)
        obs, reward, terminated, truncated, _ = env.step(action)
        steps = [raw.step(action) for _ in range(repeat or 8)]
        assert reward == pytest.approx(sum(s.reward for s in steps), rel=1e-6)
        np.testing.assert_allclose(obs["velocity"], steps[-1].observation["velocity"], rtol=1e-5, atol=1e-6)
        assert 0 <= reward <= (repeat or 8) and not terminated and not truncated
        total += reward
    assert total > 0
    env.close()


def test_control_episodes_are_reproducible():
    """Episode k of an environment begins from a seed of its own: the same in every run, another one for k + 1, for
    another environment and another purpose."""
    starts = {}
    for name, (index, key) in {"a": (0, 0), "b": (0, 0), "c": (1, 0), "d": (0, 1)}.items():
        env = p.make_env(control_args(), index, key)()
        starts[name] = [np.concatenate(list(env.reset()[0].values())).tolist() for _ in range(2)]
        env.close()
    assert starts["a"] == starts["b"]
    assert len({tuple(x) for name in "acd" for x in starts[name]}) == 6


def test_frames_of_the_control_suite(monkeypatch):
    """64 x 64 x 3 bytes, contiguous although the suite's array runs backwards; one picture per decision."""
    if not renders():
        pytest.skip("MuJoCo finds no EGL library to render with (Debian: libegl1)")
    calls, real = [], p.DMControl.render
    monkeypatch.setattr(p.DMControl, "render", lambda self: calls.append(1) or real(self))
    args = control_args(pixels=True, fast_render=True, max_episode_steps=5)
    envs = p.make_envs(args, 1)
    (e,), _ = p.collect(args, envs, p.random_policy(envs.single_action_space, 0))
    frames = e["obs/observation"]
    assert envs.single_observation_space["observation"] == gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    assert frames.shape == (6, 64, 64, 3) and frames.dtype == np.uint8 and frames.flags.c_contiguous
    assert len(calls) == 7  # two resets (SAME_STEP begins the next episode) and five decisions
    obs, _ = envs.reset()
    assert obs["observation"].flags.c_contiguous and obs["observation"].dtype == np.uint8
    assert torch.as_tensor(obs["observation"]).shape == (1, 64, 64, 3)
    assert all((a != b).any() for a, b in zip(frames, frames[1:])) and frames.std() > 10
    envs.close()


@pytest.mark.parametrize("distance", [0, 3])
def test_losses_under_autocast(distance):
    """What a GPU does with --bf16: convolutions in bfloat16, dynamics, KL and all losses in float32; gradients reach
    every parameter."""
    args = p.Args(**p.PRESETS["cpu_pixels"] | dict(overshooting=distance, image_size=16))
    space = gym.spaces.Dict(o=gym.spaces.Box(0, 255, (16, 16, 3), np.uint8))
    model = p.Planet(space, 2, {k: getattr(args, k) for k in p.SHAPES})
    batch = {"obs/o": torch.randint(0, 256, (5, 3, 16, 16, 3), dtype=torch.uint8), "action": torch.rand(5, 3, 2)}
    batch |= {"reward": torch.rand(5, 3), "mask": torch.ones(5, 3)}
    losses = {}
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses[enabled], _ = p.model_loss(model, batch, args)
    assert all(v.dtype == torch.float32 for v in losses[True].values())
    assert ("overshooting" in losses[True]) == (distance > 1)
    for k, v in losses[True].items():
        assert v.item() == pytest.approx(losses[False][k].item(), rel=0.02, abs=0.02), k
    sum(losses[True].values()).backward()
    assert all(x.grad is not None and torch.isfinite(x.grad).all() for x in model.parameters())


def test_heads_of_mean_and_deviation_are_initialised_alone():
    """Glorot limits are those of two layers of S units, not of one of 2S: sqrt(6 / 230) = 0.1615, not 0.1519."""
    torch.manual_seed(0)
    rssm = p.Rssm(8, 2)
    for weight in (rssm.prior_net[-1].weight, rssm.post_out.weight):
        for half in weight.chunk(2):
            assert 0.1580 < half.abs().max() <= math.sqrt(6 / 230)
