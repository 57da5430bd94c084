"""planet_cem.py: closed forms, slow references, the sizes of the paper, what plans and updates silently break on.

Facts are those of PlaNet (Hafner et al., ICML 2019; arXiv:1811.04551v5) and of its authors' code. Where a plausible
wrong variant exists, the test also checks that the variant would give another number."""

import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

import planet_cem as p

VECTOR = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
IMAGE = gym.spaces.Box(0, 255, (16, 16, 3), np.uint8)
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
    return p.Args(**(dict(env_id="PlanetLinear-v0", pixels=False, cuda=False, kl_free=0.0) | overrides))


def tiny_model(space=VECTOR, actions=2, **overrides):
    """A small model whose biases are random too."""
    model = p.Planet(space, actions, make_args(**SIZES | overrides))
    with torch.no_grad():
        for x in model.parameters():
            if x.dim() == 1:
                x.add_(0.3 * torch.randn_like(x))
    return model


def full_model(actions=1, size=64, device="meta", **overrides):
    """The model of the paper, by default without memory."""
    with torch.device(device):
        return p.Planet(gym.spaces.Box(0, 255, (size, size, 3), np.uint8), actions, p.Args(**overrides))


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


# ---- Maths -----------------------------------------------------------------------------------------------------------


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


def test_preprocess_noise_is_uniform_and_new_at_every_use():
    """U(0, 1) / 32: mean 1/64, standard deviation 1 / (32 sqrt 12); a second call draws again."""
    img = torch.full((200_000,), 128, dtype=torch.uint8)
    a, b = p.preprocess(img), p.preprocess(img)
    assert (a != b).float().mean() > 0.99
    assert float(a.mean()) == pytest.approx(1 / 64, abs=1e-4)
    assert float(a.std()) == pytest.approx(1 / 32 / math.sqrt(12), rel=0.01)
    assert abs(float(((a - 1 / 64) * (b - 1 / 64)).mean())) < 1e-6


def test_kl_closed_forms():
    """Equal: 0. N(1, 1) from N(0, 1) in 30 dimensions: 30 / 2. Standard deviation 2 from 1: 1.5 - ln 2 each."""
    zero, one = torch.zeros(30), torch.ones(30)
    assert float(p.kl_divergence(one, 3 * one, one, 3 * one)) == 0
    assert float(p.kl_divergence(one, one, zero, one)) == pytest.approx(15.0, abs=1e-5)
    assert float(p.kl_divergence(zero, 2 * one, zero, one)) == pytest.approx(30 * 0.8068528, rel=1e-6)
    assert float(p.kl_divergence(zero, one, zero, 2 * one)) == pytest.approx(30 * (math.log(2) - 0.375), rel=1e-6)


def test_kl_gradients_flow_into_both_sides():
    """d/dmq = (mq - mp) / sp^2 = -d/dmp;  d/dsq = sq / sp^2 - 1 / sq;  d/dsp = 1 / sp - (sq^2 + (mq - mp)^2) / sp^3."""
    mq, sq, mp, sp = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (1.0, 0.5, -1.0, 2.0))
    grads = torch.autograd.grad(p.kl_divergence(mq, sq, mp, sp), (mq, sq, mp, sp))
    assert [float(g) for g in grads] == pytest.approx([0.5, 0.125 - 2.0, -0.5, 0.5 - 4.25 / 8])


def test_free_nats_are_per_step():
    """Steps of 1 and 7 nats: (0 + 4) / 2 and no gradient into the first. Clamping their mean of 4 would give 1."""
    x = torch.tensor([[1.0], [7.0]], requires_grad=True)
    out = p.free_nats_loss(x, 3.0)
    out.backward()
    assert float(out.detach()) == 2.0 and x.grad.tolist() == [[0.0], [0.5]]


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


def gru_weights(x=4, h=3, dtype=torch.float64):
    return [torch.randn(s, dtype=dtype) for s in ((x + h, 2 * h), (2 * h,), (x + h, h), (h,))]


def test_gru_cell_closed_form():
    """Zero weights, gate bias 1: candidate tanh(0) = 0, update gate sigmoid(1): h' = 0.7310586 h."""
    h = torch.randn(5, 3)
    out = p.gru_cell(torch.randn(5, 4), h, torch.zeros(7, 6), torch.ones(6), torch.zeros(7, 3), torch.zeros(3))
    close(out, 0.7310586 * h, rtol=1e-6, atol=1e-7)


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


def test_encoder_and_decoder_against_explicit_layers():
    """Convolutions of stride 2 with ReLU behind each, taken flat; a linear layer to a 1 x 1 image and transposed
    convolutions with ReLU between them. A ReLU behind the linear layer or at the end would be seen."""
    model = full_model(device="cpu", cnn_depth=2)
    image, feat = torch.rand(2, 3, 64, 64) - 0.5, torch.randn(2, 230)
    x = image
    for layer in list(model.encoder)[::2]:
        x = F.conv2d(x, layer.weight, layer.bias, stride=2).clamp(min=0)
    close(model.encoder(image), x.reshape(2, 64))
    start, layers = model.decoder.start, list(model.decoder.net)[::2]
    x = (feat @ start.weight.T + start.bias).reshape(2, 64, 1, 1)
    for i, layer in enumerate(layers):
        x = F.conv_transpose2d(x if i < 1 else x.clamp(min=0), layer.weight, layer.bias, stride=2)
    close(model.decoder(feat), x)
    assert x.min() < 0 < x.max()


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
    conv, up = model.encoder[2].weight, model.decoder.net[2].weight  # (out, in, 4, 4), (in, out, 5, 5)
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


# ---- Losses and learner ----------------------------------------------------------------------------------------------


def mean_draw(noise):
    """RSSM.draw with one number as noise: nothing random is left, and the samples still depend on the deviations."""
    real = p.RSSM.draw
    return lambda self, x, belief, _=None: real(self, x, belief, torch.full((*x.shape[:-1], self.sample), noise))


def tiny_batch(space, T=5, B=3, masked=False):
    batch = {"action": torch.rand(T, B, 2) * 2 - 1, "reward": torch.randn(T, B), "mask": torch.ones(T, B)}
    if masked:
        batch["mask"][3:, 0] = batch["mask"][1:, 1] = 0
    shape = (T, B, *space.shape)
    return batch | {"obs": torch.randn(shape) if space is VECTOR else torch.randint(256, shape).byte()}


def slow_loss(model, batch, args, noise):
    """The terms of the loss by loops over chunks, rows, distances and steps."""
    rssm, (T, B) = model.rssm, batch["reward"].shape
    S, D = rssm.sample, rssm.belief
    terms, far = {"recon": [], "reward": [], "kl": []}, {d: [] for d in range(2, min(args.overshooting, T) + 1)}
    for b in range(B):
        before, posts = [(torch.zeros(1, S), torch.zeros(1, D))], []
        for t in range(T):
            obs = batch["obs"][t, b][None]
            if obs.dtype == torch.uint8:
                obs = ((obs // 8).float().permute(0, 3, 1, 2) + 0.25) / 32 - 0.5
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
            scale, x = (64 / 16) ** 2 if obs.dim() == 4 else 1, model.decoder(feat)
            terms["recon"].append(-scale * Normal(x, 1.0).log_prob(obs).sum())
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
@pytest.mark.parametrize("space", [VECTOR, IMAGE], ids=["vector", "image"])
def test_model_loss_against_slow_loops(space, overshooting, masked, monkeypatch):
    """All terms and the gradients of their sum for every parameter: gradients through both sides of the KL and through
    samples, none into the targets of overshooting, rows that do not count."""
    model, batch = tiny_model(space), tiny_batch(space, masked=masked)
    args = make_args(kl_free=0.4, reward_scale=0.5, kl_scale=0.7, overshooting=overshooting, overshooting_scale=1.3)
    real = p.preprocess
    monkeypatch.setattr(p, "preprocess", lambda img, bits, noise: real(img, bits, torch.full(img.shape, 0.25)))
    monkeypatch.setattr(p.RSSM, "draw", mean_draw(0.7))
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


def test_model_loss_ignores_what_stands_in_masked_rows():
    """Other observations, rewards and actions behind the end of an episode change nothing, also for overshooting."""
    model, batch = tiny_model(), tiny_batch(VECTOR, masked=True)
    args, other = make_args(overshooting=4), {k: v.clone() for k, v in batch.items()}
    for k in ("action", "reward", "obs"):
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


@pytest.mark.parametrize("max_norm", [1000.0, 1e-3])
def test_first_adam_step_closed_form(max_norm):
    """lr g / (|g| + eps) with lr 1e-3 and eps 1e-4, after clipping the global norm. The clipped gradients are smaller
    than eps: with the usual 1e-8 each step would be the whole learning rate."""
    model, batch = tiny_model(), tiny_batch(VECTOR)
    learner = p.Learner(model, make_args(max_grad_norm=max_norm), CPU)
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


@pytest.mark.parametrize("key,value,name", [("reward", math.nan, "reward"), ("obs", math.inf, "recon")])
def test_no_step_is_taken_on_bad_numbers(key, value, name):
    """Parameters and moments stay as they were, bit for bit, and also in all later updates; `check` names the term."""
    learner, good = p.Learner(tiny_model(), make_args(), CPU), tiny_batch(VECTOR)
    learner.check(learner.update(good), "step 1")
    kept = lambda: [*learner.params, *(v for s in learner.opt.state.values() for v in s.values())]  # noqa: E731
    before = [x.detach().clone() for x in kept()]
    metrics = learner.update(good | {key: torch.full_like(good[key], value)})
    learner.update(good)
    assert len(before) > 20 and all(torch.equal(a, b) for a, b in zip(before, kept(), strict=True))
    with pytest.raises(SystemExit, match=name):
        learner.check(metrics, "step 7")


# ---- Replay ----------------------------------------------------------------------------------------------------------


SPECS = {"obs": ((2,), torch.float32), "action": ((1,), torch.float32), "reward": ((), torch.float32)}


def episode(number, length):
    """Rows that say where they come from: observation (episode, t), action and reward of t = 0 are 0."""
    t = np.arange(length, dtype=np.float32)
    obs = np.stack([np.full(length, number, np.float32), t], -1)
    return {"obs": obs, "action": t[:, None] / 100, "reward": t}


def filled(lengths, capacity=100, seed=0):
    replay = p.ReplayBuffer(capacity, SPECS, seed=seed)
    for number, length in enumerate(lengths):
        replay.add(episode(number, length))
    return replay


def test_chunks_are_consecutive_rows_of_one_episode():
    """Time first; every chunk counts up by one within one episode, actions and rewards in the observation's row."""
    chunk = filled([10, 7, 20, 8, 13]).sample(400, 6)
    assert chunk["obs"].shape == (6, 400, 2) and chunk["reward"].shape == chunk["mask"].shape == (6, 400)
    number, t = chunk["obs"].unbind(-1)
    assert (number == number[0]).all() and torch.equal(t, t[0] + torch.arange(6.0)[:, None])
    assert torch.equal(chunk["reward"], t) and torch.equal(chunk["action"][..., 0], t / 100)
    assert (chunk["mask"] == 1).all() and set(number[0].tolist()) == {0, 1, 2, 3, 4}


def test_short_episodes_are_masked():
    """4 rows in a chunk of 7: mask 1, 1, 1, 1, 0, 0, 0 and the last row repeated; long ones are complete."""
    chunk = filled([4, 9]).sample(200, 7)
    number, t = chunk["obs"].unbind(-1)
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
    number, t = replay.sample(500, 4)["obs"].unbind(-1)
    assert set(number.flatten().tolist()) == {4, 5} and torch.equal(t, t[0] + torch.arange(4.0)[:, None])
    assert set(t[0, number[0] == 5].tolist()) == {0, 1, 2, 3, 4}  # its rows 5 to 7 lie at the ring's beginning


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


# ---- Acting and environments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.3, 5.0])
def test_the_executed_action_is_fed_back(noise):
    """Planned action plus noise, clipped, is what the next belief is computed from; 0.3 is a standard deviation, not a
    variance. At the beginning of an episode state and action are forgotten; greedy adds nothing."""
    model, args = tiny_model(), make_args(**SIZES, action_noise=noise)
    agent, first = p.Agent(model, args, VECTOR, CPU), np.zeros(4000, bool)
    agent.plan = lambda x: torch.zeros(4000, 2)
    obs = np.zeros((4000, 3), np.float32)
    action, state = agent.act(obs, None, ~first)
    assert np.array_equal(state[2].numpy(), action) and np.abs(action).max() <= 1
    if noise == 0.3:
        assert action.std() == pytest.approx(0.3, abs=0.01)
    fed, real = [], model.rssm.posterior
    model.rssm.posterior = lambda state, action, embed: fed.append((state, action)) or real(state, action, embed)
    agent.act(obs, state, first)
    first[:7] = True
    agent.act(obs, state, first)
    (before, executed), (reset, none) = fed
    assert torch.equal(executed, state[2]) and torch.equal(before.belief, state[1])
    assert (reset.belief[:7] == 0).all() and (none[:7] == 0).all() and torch.equal(none[7:], state[2][7:])
    args.plan_candidates, args.plan_elites, args.plan_iterations = 20, 3, 2
    torch.manual_seed(3)
    one = agent.act(obs[:2], None, np.ones(2, bool), greedy=True)[1]
    torch.manual_seed(3)
    now = real(model.rssm.initial(2), torch.zeros(2, 2), model.encoder(torch.zeros(2, 3)))
    assert torch.equal(one[2], p.plan(model, now.sample, now.belief, args))


def test_a_run_learns_a_linear_system_only_with_aligned_actions(tmp_path, monkeypatch):
    """x' = 0.5 x + a. In the replay x_t = 0.5 x_{t-1} + a_t and r_t = x_t hold row by row, up to the true last
    observation, and first rows have action and reward 0. The trained model foresees x' from the action: with actions a
    row early it could still remember them, but the first action of a dream would move nothing."""
    monkeypatch.chdir(tmp_path)
    p.train(make_args(
        env_kwargs='{"decay": 0.5, "length": 20, "spread": 9}', **SIZES | dict(belief_size=32, hidden_size=32),
        total_timesteps=260, num_envs=2, seed_episodes=9, initial_updates=300, updates_per_episode=1, batch_size=16,
        batch_length=8, learning_rate=5e-3, plan_candidates=20, plan_elites=3, plan_iterations=2, eval_episodes=1,
        save_every=100,
    ))  # fmt: skip
    (run,) = (tmp_path / "runs").iterdir()
    state, agent = torch.load(run / "ckpt.pt", weights_only=True), p.load(run)
    rows, lengths = state["replay"]["rows"], state["replay"]["lengths"]
    assert len(lengths) > 9 and len(set(lengths)) > 2 and state["loop"]["global_step"] == 260
    assert sum(lengths) + sum(len(past) for past in state["loop"]["history"]) == 260 + len(lengths)
    for x, a, r in zip(*(rows[k].flatten().split(lengths) for k in ("obs", "action", "reward"))):
        assert a[0] == 0 and r[0] == 0
        close(x[1:], 0.5 * x[:-1] + a[1:])
        close(r[1:], x[1:])
    fresh, x = torch.rand(50, 11, 1) * 2 - 1, [torch.zeros(50, 1)]
    for a in fresh.unbind(1):
        x.append(0.5 * x[-1] + a)
    obs = torch.stack(x, 1)
    dream, seen = agent.observe(obs[:, :11].numpy(), fresh[:, :10].numpy())
    assert float(((torch.as_tensor(seen) - obs[:, :11]) ** 2).mean()) < 0.1
    _, reward, alive, after = agent.imagine(dream, fresh[:, 10].numpy())
    assert float(((torch.as_tensor(after) - obs[:, 11]) ** 2).mean()) < 0.15 < 0.3  # without the action: Var(a) = 1/3
    assert float(((torch.as_tensor(reward) - obs[:, 11, 0]) ** 2).mean()) < 0.15 and (alive == 1).all()
    both = [torch.cat([s[:1], s[:1]]) for s in dream]
    low, high = agent.imagine(both, np.float32([[-0.5], [0.5]]))[1]
    assert high - low == pytest.approx(1.0, abs=0.3)


def test_action_repeats_of_the_paper_s_tasks():
    """The table of appendix A; a flag wins; other tasks are not repeated."""
    table = {
        "cartpole-swingup": 8, "cartpole-balance": 8, "reacher-easy": 4, "cheetah-run": 4, "finger-spin": 2,
        "ball_in_cup-catch": 4, "walker-walk": 2, "hopper-hop": 1,
    }  # fmt: skip
    control = lambda t, **kw: make_args(env_id=f"dm_control/{t}-v0", **kw)  # noqa: E731
    assert {t: p.repeat_of(control(t)) for t in table} == table
    assert p.repeat_of(control("walker-walk", action_repeat=3)) == 3 and p.repeat_of(make_args()) == 1


@pytest.mark.parametrize("repeat", [None, 3])
def test_an_episode_of_the_control_suite(repeat):
    """1000 physics steps in 1000 / R decisions, rounded up; truncated, not terminated; against the suite itself: the
    same start, every action R times, rewards added up, the last observation."""
    suite = pytest.importorskip("dm_control.suite")
    args = make_args(env_id="dm_control/cartpole-swingup-v0", action_repeat=repeat)
    env, raw = p.make_env(args, 0), suite.load("cartpole", "swingup")
    env.reset(), raw.reset()
    start = env.unwrapped._env.physics.data
    with raw.physics.reset_context():
        raw.physics.data.qpos[:], raw.physics.data.qvel[:] = start.qpos, start.qvel
    rng = np.random.default_rng(0)
    for t in range(1, 1000):
        action = rng.uniform(-1, 1, 1).astype(np.float32)
        obs, reward, terminated, truncated, _ = env.step(action)
        steps = [raw.step(action) for _ in range(min(repeat or 8, 1001 - (t - 1) * (repeat or 8)))]
        if truncated:
            break
        if t < 20:
            assert reward == pytest.approx(sum(s.reward for s in steps), rel=1e-4, abs=1e-8)
            np.testing.assert_allclose(obs[3:], steps[-1].observation["velocity"], rtol=1e-5, atol=1e-6)
    assert t == math.ceil(1000 / (repeat or 8)) and not terminated
    env.close()
