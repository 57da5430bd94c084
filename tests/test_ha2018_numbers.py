"""Every formula of ha2018_carracing.py against closed forms, hand-computed values and slow explicit references.

Facts are those of World Models (Ha & Schmidhuber, NeurIPS 2018; arXiv:1803.10122v4) and of its authors' code. Where a
plausible wrong variant exists, the test also checks that the variant would give another number."""

import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium.utils.env_checker import check_env
from torch import nn

import ha2018_carracing as w

CPU = torch.device("cpu")
SMALL = dict(latent_size=3, vae_depth=1, rnn_size=6, num_mixtures=2, predict_done=True)


class Toy(gym.Env):
    """Episodes of 1 to 9 steps, drawn from the seed; the colour of the picture tells the seed, the time and the last
    action, and the reward depends on all of them: nothing can be exchanged between episodes without being seen."""

    observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)

    def __init__(self, discrete=False, terminal=True, black=False, longest=9, render_mode=None):
        self.action_space = gym.spaces.Discrete(3) if discrete else gym.spaces.Box(-1, 1, (2,), np.float32)
        self.terminal, self.black, self.longest = terminal, black, longest

    def see(self, action):
        level = 128 + 50 * np.ravel(action)[0]
        return np.broadcast_to(np.array([self.x, 20 * self.t + 10, level], np.uint8), (64, 64, 3)).copy()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.x = 0, int(self.np_random.integers(10, 250))
        self.last = int(self.np_random.integers(1, self.longest + 1))
        return self.see(0), {}

    def step(self, action):
        self.t += 1
        reward, end = self.x + self.t * float(np.ravel(action)[0]), self.t == self.last
        obs = np.zeros((64, 64, 3), np.uint8) if end and self.black else self.see(action)
        return obs, reward, end and self.terminal, end and not self.terminal, {}


gym.register("HaToy-v0", entry_point=Toy, disable_env_checker=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)


def make_args(**overrides):
    base = dict(env_id="HaToy-v0", cuda=False, compile=False, num_workers=1, max_episode_steps=300, env_timeout=20.0)
    return w.Args(**(base | overrides))


def tiny(scale=1.0, **overrides):
    """A small world whose biases and controller are random too."""
    plain = w.config_of(w.Args(env_id="HaToy-v0", **SMALL), gym.spaces.Box(-1, 1, (2,)))
    model = w.VMC(plain | overrides)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.3 * torch.randn_like(x)) if x.dim() == 1 else x.mul_(scale)
    return model


def close(a, b, rtol=1e-4, atol=1e-5):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=rtol, atol=atol, check_dtype=False)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numbers(parameter):
    return parameter.detach().numpy().astype(np.float64)


def slow_lstm(rnn, x, c, h):
    """One step of one row in numpy, gates in the order input, candidate, forget, output."""
    pre, H = np.concatenate([x, h]) @ numbers(rnn.weight) + numbers(rnn.bias), rnn.H
    i, j, f, o = (pre[n * H : (n + 1) * H] for n in range(4))
    c = c * sigmoid(f + 1) + sigmoid(i) * np.tanh(j)
    return c, np.tanh(c) * sigmoid(o)


def slow_heads(rnn, h):
    """Done logit, reward and, for each dimension of z, K logits, K means and K log-stds."""
    out = numbers(rnn.out.weight) @ h + numbers(rnn.out.bias)
    logit = out[0] if rnn.done else None
    reward = out[int(rnn.done)] if rnn.reward else None
    blocks = out[rnn.done + rnn.reward :].reshape(rnn.Z, 3, rnn.K)
    return logit, reward, blocks[:, 0], blocks[:, 1], np.maximum(blocks[:, 2], -7)


def slow_sample(logits, means, logstds, tau, uniform, eps):
    z = np.zeros(len(logits))
    for d in range(len(logits)):
        p = np.exp(logits[d] - logits[d].max())
        p = (p / p.sum()) ** (1 / tau)
        k = min(int((np.cumsum(p / p.sum()) < uniform[d]).sum()), len(p) - 1)
        z[d] = means[d, k] + np.exp(logstds[d, k]) * math.sqrt(tau) * eps[d]
    return z


def slow_nll(logits, means, logstds, target):
    """Mean over the dimensions of one step."""
    total = 0.0
    for d in range(len(target)):
        p = np.exp(logits[d]) / np.exp(logits[d]).sum()
        sigma = np.exp(logstds[d])
        density = np.exp(-0.5 * ((target[d] - means[d]) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
        total -= math.log((p * density).sum())
    return total / len(target)


# ---- Frames ----------------------------------------------------------------------------------------------------------


def test_process_frame_constant_crop_dtype():
    out = w.process_frame(np.full((96, 96, 3), 137, np.uint8))
    assert out.shape == (64, 64, 3) and out.dtype == np.uint8 and (out == 137).all()
    frame = np.zeros((96, 90, 3), np.uint8)
    frame[:84], frame[84:] = (10, 20, 30), 255
    assert (w.process_frame(frame, 84) == (10, 20, 30)).all()
    assert w.process_frame(frame)[-1].max() > 200  # without the crop the bar is seen
    frame[:7] = 99
    assert (w.process_frame(frame, (7, 84)) == (10, 20, 30)).all() and (w.process_frame(frame, (0, 7)) == 99).all()


def test_process_frame_is_antialiased_and_upright():
    board = (np.indices((480, 640)).sum(0) % 2 * 255).astype(np.uint8)
    out = w.process_frame(np.repeat(board[..., None], 3, 2), 400).astype(float)
    assert np.abs(out - 127.5).max() < 10
    column = np.repeat(np.linspace(0, 255, 96).astype(np.uint8)[:, None], 96, 1)
    out = w.process_frame(np.stack([column, column.T, 0 * column], -1)).astype(int)
    assert (np.diff(out[:, 5, 0]) > 0).all() and (np.diff(out[5, :, 1]) > 0).all() and out[..., 2].max() == 0


def test_to_images_scales_and_moves_channels():
    frames = torch.randint(0, 256, (2, 3, 64, 64, 3), dtype=torch.uint8)
    out = w.unit_images(frames)
    assert out.shape == (2, 3, 3, 64, 64) and out.dtype == torch.float32
    assert out[1, 2, 0, 5, 7] == frames[1, 2, 5, 7, 0].float() / 255 and out.max() <= 1


# ---- V ---------------------------------------------------------------------------------------------------------------


def test_vae_loss_closed_forms():
    x, mu = torch.rand(4, 3, 64, 64), torch.zeros(4, 32)
    r, kl = w.vae_loss(x, x - 0.1, mu, mu)
    close(r, 122.88)
    close(kl, 16.0)
    for value, expected in ((1.0, 16.0), (2.0, 64.0)):
        close(w.vae_loss(x, x, mu + value, mu)[1], expected)
    close(w.vae_loss(x, x, mu, mu + 1.0, 0.0)[1], 32 * 0.5 * (math.e - 2))
    close(w.vae_loss(x, x, torch.zeros(4, 64), torch.zeros(4, 64))[1], 32.0)


def test_vae_loss_floor_is_per_frame_on_the_sum():
    """Frame 0 has 2 nats, all in one dimension, frame 1 has 50: with a floor of 16 that is (16 + 50) / 2. Per dimension
    it would be another number, as would the floor under the mean of the batch."""
    mu = torch.zeros(2, 32)
    mu[0, 0], mu[1] = 2.0, math.sqrt(100 / 32)
    close(w.vae_loss(torch.zeros(2, 3, 64, 64), torch.zeros(2, 3, 64, 64), mu, torch.zeros(2, 32))[1], 33.0)


def test_vae_loss_gradient_below_the_floor():
    x = torch.zeros(2, 3, 64, 64)
    for value, moves in ((0.9, False), (1.1, True)):
        mu = torch.full((2, 32), value, requires_grad=True)
        logvar = torch.zeros(2, 32, requires_grad=True)
        w.vae_loss(x, x, mu, logvar - 0.01)[1].backward()
        assert bool(mu.grad.any()) == moves and bool(logvar.grad.any()) == moves


def test_sample_z():
    eps = torch.randn(200_000)
    z = w.sample_z(torch.tensor(3.0), torch.tensor(math.log(4.0)), eps)
    close(z, 3 + 2 * eps)


@pytest.mark.parametrize(("latent", "total"), [(32, 4_348_547), (64, 4_446_915)])
def test_vae_parameters(latent, total):
    with torch.device("meta"):
        vae = w.Vae(latent)
    assert w.count_params(vae) == total
    encoder = sum(w.count_params(m) for m in (vae.encoder, vae.mu, vae.logvar))
    assert encoder == 690_144 + 2 * (1024 * latent + latent)
    assert [w.count_params(m) for m in vae.encoder] == [1_568, 32_832, 131_200, 524_544]
    assert [w.count_params(m) for m in vae.decoder] == [3_276_928, 204_864, 73_760, 3_459]


def test_vae_against_the_table():
    """Kernels 4 and 5, 5, 6, 6, stride 2, no padding; ReLU after all but the latents, the dense layer, the picture."""
    vae = w.Vae(5, 2)
    for layer in (*vae.encoder, *vae.decoder, vae.dense, vae.mu, vae.logvar):
        nn.init.normal_(layer.bias, std=0.1)
    x, z = torch.rand(3, 3, 64, 64), 3 * torch.randn(3, 5)
    y, sides = x, []
    for layer in vae.encoder:
        y = F.conv2d(y, layer.weight, layer.bias, stride=2).relu()
        sides.append(y.shape[-1])
    assert sides == [31, 14, 6, 2]
    y = y.reshape(3, -1)
    mu, logvar = vae.encode(x)
    close(mu, y @ vae.mu.weight.T + vae.mu.bias)
    close(logvar, y @ vae.logvar.weight.T + vae.logvar.bias)
    dense = z @ vae.dense.weight.T + vae.dense.bias
    pictures = []
    for start in (dense, dense.relu()):
        y, sides = start.reshape(3, 64, 1, 1), []
        for i, layer in enumerate(vae.decoder):
            y = F.conv_transpose2d(y, layer.weight, layer.bias, stride=2)
            y = y.relu() if i < 3 else y.sigmoid()
            sides.append(y.shape[-1])
        pictures.append(y)
    assert sides == [5, 13, 30, 64]
    out = vae.decode(z)
    close(out, pictures[0])
    assert (out - pictures[1]).abs().max() > 1e-3 and 0 < out.min() and out.max() < 1
    eps = torch.randn(3, 5)
    close(vae(x, eps)[0], vae.decode(mu + (0.5 * logvar).exp() * eps))


def test_glorot_limits():
    vae, rnn = w.Vae(32, 16), w.MdnRnn(32, 3, 64)
    expected = [(vae.encoder[1].weight, 16 * (16 + 32)), (vae.decoder[0].weight, 25 * (512 + 64))]
    expected += [(vae.dense.weight, 32 + 512), (rnn.weight, 35 + 64 + 256), (rnn.out.weight, 64 + 480)]
    expected += [(rnn.bias, 2 * 256)]
    for x, fans in expected:
        limit = math.sqrt(6 / fans)
        assert 0.97 * limit < x.abs().max() <= limit * (1 + 1e-6)
        assert abs(x.std() / (limit / math.sqrt(3)) - 1) < 0.1
    assert not any(layer.bias.any() for layer in (*vae.encoder, *vae.decoder, vae.mu, vae.logvar, vae.dense))


def test_fit_vae_is_the_loss_of_its_sample():
    model, args = tiny(), make_args(kl_tolerance=0.1)
    frames, eps = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8), torch.randn(3, 3)
    losses, _ = w.fit_vae(model, dict(frames=frames, eps=eps), args)
    x = frames.permute(0, 3, 1, 2) / 255
    mu, logvar = model.vae.encode(x)
    recon = model.vae.decode(mu + (logvar / 2).exp() * eps)
    close(losses["vae_reconstruction"], ((recon - x) ** 2).sum((1, 2, 3)).mean())
    close(losses["vae_kl"], (0.5 * (logvar.exp() + mu**2 - 1 - logvar)).sum(1).clamp(min=0.3).mean())
    assert len(losses) == 2
    close(sum(losses.values()), sum(w.vae_loss(x, recon, mu, logvar, 0.1)))


def test_world_model_encode_and_show_round_trip_scaling():
    model = tiny()
    frames = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    close(model.encode(frames)[0], model.vae.encode(frames.permute(0, 3, 1, 2) / 255)[0])
    z = torch.randn(2, 3)
    picture = model.show(z)
    assert picture.shape == (2, 64, 64, 3) and picture.dtype == torch.uint8
    expected = model.vae.decode(z).permute(0, 2, 3, 1) * 255
    assert (picture.float() - expected).abs().max() <= 0.5 + 1e-3


# ---- M ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "done", "total"), [((32, 3, 256, 5), False, 422_368), ((64, 1, 512, 5), True, 1_678_785)]
)
def test_rnn_parameters(sizes, done, total):
    with torch.device("meta"):
        rnn = w.MdnRnn(*sizes, done=done)
    assert w.count_params(rnn) == total
    assert rnn.weight.shape == (sum(sizes[:2]) + done + sizes[2], 4 * sizes[2]) and rnn.bias.shape == (4 * sizes[2],)


def test_lstm_step_closed_forms():
    zeros = torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 4)
    c, h = w.lstm_step(*zeros, torch.zeros(7, 16), torch.zeros(16))
    assert not c.any() and not h.any()
    c, h = w.lstm_step(zeros[0], torch.ones(2, 4), zeros[2], torch.zeros(7, 16), torch.zeros(16))
    close(c, torch.full((2, 4), 0.7310586))  # sigmoid(1): forget bias 1
    close(h, torch.full((2, 4), math.tanh(0.7310586) / 2))


def test_lstm_step_against_numpy_and_nn_lstm():
    """nn.LSTM has its gates in the order i, f, g, o: rearranged, with the 1 put into its bias, it is the same cell."""
    rnn, T, B, H = tiny().rnn, 5, 3, 6
    x, c0, h0 = torch.randn(T, B, rnn.inputs), torch.randn(B, H), torch.randn(B, H)
    torch_rnn = nn.LSTM(rnn.inputs, H)
    i, j, f, o = rnn.weight.detach().chunk(4, 1)
    bi, bj, bf, bo = rnn.bias.detach().chunk(4)
    mine = torch.cat([i, f, j, o], 1).T
    with torch.no_grad():
        torch_rnn.weight_ih_l0.copy_(mine[:, : rnn.inputs])
        torch_rnn.weight_hh_l0.copy_(mine[:, rnn.inputs :])
        torch_rnn.bias_ih_l0.copy_(torch.cat([bi, bf + 1, bj, bo]))
        torch_rnn.bias_hh_l0.zero_()
    hidden, (h_last, c_last) = torch_rnn(x, (h0[None], c0[None]))
    out, c, h = rnn(x, c0, h0, torch.zeros(T, B))
    close(out, hidden)
    close(c, c_last[0])
    close(h, h_last[0])
    slow = slow_lstm(rnn, x[0, 1].double().numpy(), c0[1].double().numpy(), h0[1].double().numpy())
    close(rnn.lstm_step(x[0], c0, h0)[0][1], slow[0])
    close(rnn.lstm_step(x[0], c0, h0)[1][1], slow[1])


def test_rnn_forward_resets_to_real_zeros():
    rnn, T, B = tiny().rnn, 7, 4
    x, c, h = torch.randn(T, B, rnn.inputs), torch.randn(B, 6), torch.randn(B, 6)
    restart = torch.zeros(T, B)
    restart[0, 0] = restart[3, 1] = restart[6, 2] = restart[2, 2] = 1
    out, c_last, h_last = rnn(x, c, h, restart)
    for b in range(B):
        cb, hb = c[b].double().numpy(), h[b].double().numpy()
        for t in range(T):
            if restart[t, b]:
                cb, hb = np.zeros(6), np.zeros(6)
            cb, hb = slow_lstm(rnn, x[t, b].double().numpy(), cb, hb)
            close(out[t, b], hb)
        close(c_last[b], cb)
        close(h_last[b], hb)


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("reward", [False, True])
def test_layout_of_the_output(done, reward):
    """The done logit is column 0, the reward comes next, then for each dimension K logits, K means, K log-stds."""
    rnn = w.MdnRnn(2, 1, 4, 3, done, reward)
    with torch.no_grad():
        rnn.out.weight.zero_()
        rnn.out.bias.copy_(torch.arange(len(rnn.out.bias)))
    logmix, mean, logstd, logit, gain = rnn.heads(torch.randn(5, 4))
    assert logmix.shape == mean.shape == logstd.shape == (5, 2, 3)
    n = done + reward
    for x, start in ((logmix, 0), (mean, 3), (logstd, 6)):
        assert x[0].tolist() == [[n + start + 9 * d + k for k in range(3)] for d in range(2)]
    assert (logit[0] == 0 if done else logit is None) and (gain[0] == done if reward else gain is None)
    with torch.no_grad():
        rnn.out.bias.fill_(-20)
    assert rnn.heads(torch.zeros(4))[2].tolist() == [[-7.0] * 3] * 2  # only log-stds have a floor
    assert (rnn.heads(torch.zeros(4))[1] == -20).all()


def test_restart_flag_is_the_last_input_of_a_world_with_ends():
    z, a, restart = torch.randn(4, 3), torch.randn(4, 2), torch.tensor([1.0, 0, 0, 1])
    assert torch.equal(tiny().rnn.join(z, a, restart), torch.cat([z, a, restart[:, None]], 1))
    assert torch.equal(tiny(predict_done=False).rnn.join(z, a, restart), torch.cat([z, a], 1))


def test_mdn_nll_closed_forms():
    zero = torch.zeros(7, 4, 5)
    close(w.mdn_nll(zero, zero, zero, torch.zeros(7, 4)), 0.9189385)
    close(w.mdn_nll(zero[..., :1], zero[..., :1], zero[..., :1], torch.zeros(7, 4)), 0.9189385)
    close(w.mdn_nll(zero, zero, zero, torch.full((7, 4), 2.0)), 0.9189385 + 2)
    close(w.mdn_nll(zero, zero, zero + math.log(3), torch.full((7, 4), 3.0)), 0.9189385 + math.log(3) + 0.5)


def test_mdn_nll_against_loops_and_its_invariances():
    logmix, mean, logstd, target = *torch.randn(3, 4, 2, 3, 5).unbind(), torch.randn(4, 2, 3)
    mask = torch.tensor([[1.0, 1], [0, 1], [1, 0], [0, 0]])
    slow = np.array([
        [slow_nll(*(x[t, b].double().numpy() for x in (logmix, mean, logstd, target))) for b in range(2)]
        for t in range(4)
    ])  # fmt: skip
    close(w.mdn_nll(logmix, mean, logstd, target), slow.mean(), 1e-5)
    close(w.mdn_nll(logmix, mean, logstd, target, mask), slow[mask.numpy() > 0].mean(), 1e-5)
    assert w.mdn_nll(logmix, mean, logstd, target, 0 * mask) == 0
    close(w.mdn_nll(logmix + 7 * torch.randn(4, 2, 3, 1), mean, logstd, target), slow.mean(), 1e-4)
    twice = (torch.cat([x, x], 2) for x in (logmix, mean, logstd, target))
    close(w.mdn_nll(*twice), slow.mean(), 1e-5)  # the mean over dimensions: independent of their number


def test_mdn_log_prob_of_far_targets_is_finite():
    """Each component's density is 0 in float32 there: only a sum of logarithms has a gradient."""
    mean = torch.tensor([[0.0, 1.0]], requires_grad=True)
    out = w.mdn_log_prob(torch.zeros(1, 2), mean, torch.zeros(1, 2) - 2, torch.tensor([50.0]))
    out.sum().backward()
    assert torch.isfinite(out).all() and mean.grad[0, 1] > 1


def test_sample_mdn_inverts_the_distribution_function():
    logmix, mean, logstd = torch.randn(3, 6, 4, 5).unbind()
    uniform, eps = torch.rand(6, 4), torch.randn(6, 4)
    for tau in (0.3, 1.0, 1.15):
        out = w.sample_mdn(logmix, mean, logstd, tau, uniform, eps)
        for n in range(6):
            parts = (x[n].double().numpy() for x in (logmix, mean, logstd))
            close(out[n], slow_sample(*parts, tau, uniform[n].numpy(), eps[n].numpy()))


def test_sample_mdn_temperature():
    n = 40_000
    logmix = torch.tensor([[0.0, 1.5, -1.0]]).expand(n, 1, 3)
    mean, logstd = torch.tensor([[-100.0, 0.0, 100.0]]).expand(n, 1, 3), torch.zeros(n, 1, 3)
    cold = w.sample_mdn(logmix, mean, logstd, 1e-3)
    assert cold.abs().max() < 0.2  # the mean of the likeliest component
    for tau in (0.5, 1.0, 1.3):
        z = w.sample_mdn(logmix, mean, logstd, tau).squeeze(1)
        found = [float(((z - m).abs() < 50).float().mean()) for m in (-100, 0, 100)]
        weights = np.exp(np.array([0.0, 1.5, -1.0]) / tau)
        assert np.abs(np.array(found) - weights / weights.sum()).max() < 0.01
    one = w.sample_mdn(torch.zeros(n, 1, 1), torch.zeros(n, 1, 1) + 2, torch.zeros(n, 1, 1) + math.log(3), 0.25)
    assert abs(one.mean() - 2) < 0.05 and abs(one.var() / (0.25 * 9) - 1) < 0.05  # tau sigma^2, not tau^2 sigma^2


def test_sample_mdn_has_a_temperature_for_each_candidate():
    logmix, mean, logstd = torch.randn(3, 3, 7, 4, 5).unbind()
    uniform, eps = torch.rand(3, 7, 4), torch.randn(3, 7, 4)
    taus = torch.tensor([0.1, 1.0, 1.3])
    out = w.sample_mdn(logmix, mean, logstd, taus.view(3, 1, 1, 1), uniform, eps)
    for i, tau in enumerate(taus.tolist()):
        close(out[i], w.sample_mdn(logmix[i], mean[i], logstd[i], tau, uniform[i], eps[i]))
    same = [w.sample_mdn(logmix, mean, logstd, 1.0, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4)]
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])


def test_done_loss():
    zero, one = torch.zeros(3), torch.ones(3)
    close(w.done_loss(zero, zero), 0.6931472)
    close(w.done_loss(zero, one), 6.931472)
    close(w.done_loss(zero, one, 1.0), 0.6931472)
    close(w.done_loss(torch.tensor([2.0, 2.0]), torch.tensor([1.0, 0.0])), (10 * 0.1269280 + 2.1269280) / 2)
    close(w.done_loss(torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0]), 10.0, torch.tensor([1.0, 0.0])), 1.269280)


def rnn_batch(model, T=5, B=3):
    Z, H = model.rnn.Z, model.rnn.H
    batch = {k: torch.randn(T, B, Z) for k in ("mu", "logvar", "next_mu", "next_logvar")}
    batch |= dict(action=torch.randn(T, B, model.A), reward=torch.randn(T, B), eps=torch.randn(2, T, B, Z))
    batch |= {k: (torch.rand(T, B) < 0.4).float() for k in ("done", "restart", "seen")}
    return batch | dict(c=torch.randn(B, H), h=torch.randn(B, H))


def test_fit_rnn_against_loops():
    model = tiny(predict_reward=True)
    model.reward_scale.fill_(2.5)
    batch = rnn_batch(model)
    losses, state = w.fit_rnn(model, batch, make_args(done_weight=4.0))
    b = {k: v.double().numpy() for k, v in batch.items()}
    z_nll, done, reward = [], [], []
    for n in range(3):
        c, h = b["c"][n], b["h"][n]
        for t in range(5):
            z = b["mu"][t, n] + np.exp(b["logvar"][t, n] / 2) * b["eps"][0, t, n]
            target = b["next_mu"][t, n] + np.exp(b["next_logvar"][t, n] / 2) * b["eps"][1, t, n]
            keep = 1 - b["restart"][t, n]
            x = np.concatenate([z, b["action"][t, n], b["restart"][t, n : n + 1]])
            c, h = slow_lstm(model.rnn, x, keep * c, keep * h)
            logit, gain, *mixture = slow_heads(model.rnn, h)
            z_nll += [slow_nll(*mixture, target)] if b["seen"][t, n] else []
            p, d = sigmoid(logit), b["done"][t, n]
            done.append(-(4 * d * math.log(p) + (1 - d) * math.log(1 - p)))
            reward.append((gain - b["reward"][t, n] / 2.5) ** 2)
        close(state["c"][n], c)
        close(state["h"][n], h)
    assert 0 < len(z_nll) < 15 and sum(b["done"].ravel()) > 0
    close(losses["rnn_z"], np.mean(z_nll))
    close(losses["rnn_done"], np.mean(done))
    close(losses["rnn_reward"], np.mean(reward))
    assert not state["c"].requires_grad and not state["h"].requires_grad


def test_fit_rnn_has_only_the_heads_that_are_wanted():
    model = tiny(predict_done=False)
    assert list(w.fit_rnn(model, rnn_batch(model), make_args())[0]) == ["rnn_z"]


def learner_of(loss, clip=math.inf, rate=0.1):
    network = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(network.weight)
    return network, w.FitLearner(network, network, loss, make_args(), CPU, rate, clip)


def test_gradient_is_clipped_element_by_element():
    def loss(model, batch, args):
        return {"x": (model.weight * torch.tensor([[30.0, -0.5]])).sum()}, {}

    network, learner = learner_of(loss, 1.0)
    metrics = learner.update({})
    assert network.weight.grad.tolist() == [[1.0, -0.5]]  # by norm it would be (1.0, -0.017)
    close(metrics["grad_norm"], math.hypot(30, 0.5))  # what is logged is from before
    close(network.weight.detach(), torch.tensor([[-0.1, 0.1]]))  # Adam's first step
    network, learner = learner_of(loss)
    learner.update({})
    assert network.weight.grad.tolist() == [[30.0, -0.5]]


def test_no_step_on_bad_numbers():
    def loss(model, batch, args):
        return {"good": model.weight.sum(), "bad": (model.weight * batch["x"]).sum()}, {}

    network, learner = learner_of(loss)
    learner.update(dict(x=torch.tensor(1.0)))
    before = network.weight.detach().clone()
    learner.check()
    for x in (math.nan, 1.0):  # once bad, no later step either
        learner.update(dict(x=torch.tensor(x)))
        assert torch.equal(network.weight, before)
    with pytest.raises(FloatingPointError, match="here: bad, gradient norm"):
        learner.check("here")


def test_set_lr_is_the_step():
    network, learner = learner_of(lambda m, b, a: ({"x": m.weight.sum()}, {}))
    learner.set_lr(0.25)
    learner.update({})
    close(network.weight.detach(), torch.full((1, 2), -0.25))


def test_m_learns_to_obey_actions():
    """z' = 0.8 z + 0.5 a + noise. After training, dreams under constant left and right part, and with the likelihood
    of the truth; a model that was fed the previous action instead would know nothing of the present one."""
    model = tiny(latent_size=1, actions=1, rnn_size=16, predict_done=False)
    args, T, B = make_args(), 12, 64
    learner = w.FitLearner(model, model.rnn, w.fit_rnn, args, CPU, 1e-2, 1.0)
    for _ in range(150):
        a, z = torch.rand(T, B, 1) * 2 - 1, [torch.randn(B, 1)]
        for t in range(T):
            z.append(0.8 * z[-1] + 0.5 * a[t] + 0.1 * torch.randn(B, 1))
        z = torch.stack(z)
        first = torch.zeros(T, B)
        first[0] = 1
        batch = dict(mu=z[:-1], next_mu=z[1:], action=a, restart=first, seen=torch.ones(T, B), done=first)
        batch |= {k: torch.full((T, B, 1), -9.0) for k in ("logvar", "next_logvar")}
        batch |= dict(c=torch.zeros(B, 16), h=torch.zeros(B, 16), eps=torch.randn(2, T, B, 1), reward=first)
        nll = float(learner.update(batch)["rnn_z"])
    entropy = 0.5 * math.log(2 * math.pi * math.e * 0.01)
    blind = 0.5 * math.log(2 * math.pi * math.e * (0.01 + 0.25 / 3))
    assert entropy < nll < (entropy + blind) / 2
    ends = {}
    for action in (-1.0, 1.0):
        z, (c, h) = torch.zeros(200, 1), model.rnn.initial(200)
        for _ in range(4):
            c, h = model.rnn.lstm_step(model.rnn.join(z, torch.full((200, 1), action), None), c, h)
            z = w.sample_mdn(*model.rnn.heads(h)[:3])
        ends[action] = float(z.detach().mean())
    expected = 0.5 * (1 - 0.8**4) / 0.2  # 1.476
    assert abs(ends[1.0] - expected) < 0.4 and abs(ends[-1.0] + expected) < 0.4


# ---- C ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "outputs", "hidden", "bias", "total"),
    [(288, 3, 0, True, 867), (1088, 1, 0, False, 1_088), (32, 3, 0, True, 99), (32, 3, 40, True, 1_443)],
)
def test_controller_parameters(inputs, outputs, hidden, bias, total):
    controller = w.Controller(inputs, outputs, hidden, bias)
    assert controller.count() == w.count_params(controller) == total
    assert controller(torch.ones(2, inputs)).tolist() == [[0.0] * outputs] * 2  # an untrained C does nothing


def test_presets_have_the_published_sizes():
    for overrides, sizes in (
        ({}, (4_348_547, 422_368, 867)),
        (w.PRESETS["takecover"], (4_446_915, 1_678_785, 1_088)),
        (dict(controller_input="z"), (4_348_547, 422_368, 99)),
        (dict(controller_input="z", controller_hidden=40), (4_348_547, 422_368, 1_443)),
    ):
        args = w.Args(**overrides)
        space = gym.spaces.Box(-1, 1, (3 if args.env_id == "CarRacing-v3" else 1,))
        with torch.device("meta"):
            model = w.VMC(w.config_of(args, space))
        assert tuple(w.count_params(getattr(model, k)) for k in ("vae", "rnn", "controller")) == sizes


def test_car_action():
    inf = math.inf
    out = w.car_action(torch.tensor([[0.0, 0, 0], [inf, inf, inf], [-inf, -inf, -inf], [1.0, 1.0, -0.3]]))
    close(out, torch.tensor([[0, 0.5, 0], [1, 1, 1], [-1, 0, 0], [0.7615942, 0.8807971, 0]]))
    assert w.car_action(torch.tensor([0.0, 0.0, 0.5]))[2] == math.tanh(0.5)


def test_doom_buttons():
    """Gymnasium's Take Cover: 0 nothing, 1 right, 2 left."""
    assert [int(w.doom_buttons(a)) for a in (-1.0, -0.34, -0.33, 0.0, 0.33, 0.34, 1.0)] == [2, 2, 0, 0, 0, 1, 1]
    assert w.doom_buttons(np.array([-0.5, 0.5])).tolist() == [2, 1]


def test_take_cover_presses_the_buttons():
    env = SimpleNamespace(step=lambda a: ({"screen": screen}, a, False, False, {}))
    screen = np.zeros((120, 160, 3), np.uint8)
    screen[:100], screen[100:] = 77, 255
    cover = w.TakeCover.__new__(w.TakeCover)
    cover.env = env
    for a, button in ((-0.9, 2), (0.9, 1), (0.1, 0)):
        obs, pressed, *_ = cover.step(np.float32([a]))
        assert pressed == button and obs.shape == (64, 64, 3) and (obs == 77).all()  # 100 of 120 rows


def test_unflatten_order():
    """Biases first, then the weights row by row (inputs x outputs)."""
    theta = torch.arange(22.0).view(2, 11)
    bias, weight = w.unflatten(theta[:, :9], 2, 3)
    assert bias.tolist() == [[0, 1, 2], [11, 12, 13]]
    assert weight[0].tolist() == [[3, 4, 5], [6, 7, 8]]
    bias, weight = w.unflatten(theta[:, :6], 2, 3, False)
    assert bias is None and weight[1].tolist() == [[11, 12, 13], [14, 15, 16]]


@pytest.mark.parametrize("hidden", [0, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_controllers_batched_equal_a_loop(hidden, bias):
    P, R, I, O = 4, 3, 6, 2  # noqa: E741
    controller = w.Controller(I, O, hidden, bias)
    theta, x = torch.randn(P, controller.count()), torch.randn(P, R, I)
    out = controller(x, theta)
    for p in range(P):
        rest, y = theta[p], x[p]
        for i, o in [(I, hidden), (hidden, O)] if hidden else [(I, O)]:
            b, weight = (rest[:o], rest[o : o + i * o]) if bias else (torch.zeros(o), rest[: i * o])
            y, rest = y @ weight.view(i, o) + b, rest[i * o + o * bias :]
            y = y.tanh() if o == hidden else y
        close(out[p], y, atol=1e-6)
        with torch.no_grad():
            controller.theta.copy_(theta[p])
        close(controller(x[p]), y, atol=1e-6)
        close(controller(x[p, 0]), y[0], atol=1e-6)


def test_features_and_actions():
    z, c, h = torch.randn(2, 3), torch.randn(2, 6), torch.randn(2, 6)
    for what, parts in (("z", [z]), ("zh", [z, h]), ("zch", [z, c, h])):
        assert torch.equal(tiny(controller_input=what).features(z, c, h), torch.cat(parts, -1))
    pre = torch.tensor([[0.3, -2.0]])
    close(tiny().to_action(pre), pre.tanh())
    discrete = tiny(kind="discrete", actions=2)
    assert discrete.to_action(pre).tolist() == [[1.0, 0.0]]
    assert discrete.env_action(np.float32([[0, 1], [1, 0]])).tolist() == [1, 0]
    assert torch.equal(tiny(kind="car", actions=3).to_action(torch.ones(1, 3)), w.car_action(torch.ones(1, 3)))


# ---- Dreams ----------------------------------------------------------------------------------------------------------


def dream_world(spread=10.0, bias=-2.0, **overrides):
    """A world whose dreams end at many different times."""
    model = tiny(1.5, **overrides)
    with torch.no_grad():
        if model.rnn.done:
            model.rnn.out.weight[0].mul_(spread)
            model.rnn.out.bias[0] = bias
    starts = torch.randn(9, 3).half(), torch.randn(9, 3).half() - 1
    return model, starts, torch.randn(5, model.controller.count())


def slow_dreams(theta, model, starts, R, tau, cap, seed):
    """One dream after the other, one step after the other, with the same random numbers."""
    g, Z = torch.Generator().manual_seed(seed), model.rnn.Z
    pick = torch.randint(len(starts[0]), (R,), generator=g)
    noise = torch.randn(R, Z, generator=g).double().numpy()
    chunks = [
        (torch.rand(w.CHUNK, R, Z, generator=g).numpy(), torch.randn(w.CHUNK, R, Z, generator=g).double().numpy())
        for _ in range(-(-cap // w.CHUNK))
    ]
    uniform, eps = (np.concatenate(x) for x in zip(*chunks))
    scores, length, config = np.zeros((len(theta), R)), np.zeros((len(theta), R), int), model.config
    for p in range(len(theta)):
        for r in range(R):
            mu, logvar = (x[pick[r]].double().numpy() for x in starts)
            z, c, h = mu + np.exp(logvar / 2) * noise[r], np.zeros(model.rnn.H), np.zeros(model.rnn.H)
            for t in range(cap):
                seen = np.concatenate([{"z": z, "c": c, "h": h}[k] for k in config["controller_input"]])
                weights, A = theta[p].double().numpy(), model.A
                pre = weights[:A] + seen @ weights[A:].reshape(-1, A)
                a = np.eye(A)[pre.argmax()] if model.kind == "discrete" else np.tanh(pre)
                x = np.concatenate([z, a] + ([[float(t == 0)]] if model.rnn.done else []))
                c, h = slow_lstm(model.rnn, x, c, h)
                logit, gain, *mixture = slow_heads(model.rnn, h)
                scores[p, r] += 1 if gain is None else gain * float(model.reward_scale)
                length[p, r] += 1
                z = slow_sample(*mixture, tau if np.isscalar(tau) else tau[p], uniform[t, r], eps[t, r])
                if logit is not None and logit > 0:
                    break
    return scores, length


@pytest.mark.parametrize(
    "overrides", [{}, dict(controller_input="zch"), dict(spread=8.0, bias=-1.5, kind="discrete", actions=3)]
)
def test_dream_rollout_against_loops(overrides):
    model, starts, theta = dream_world(**overrides)
    slow, length = slow_dreams(theta, model, starts, 6, 1.15, 47, 3)
    assert 1 <= slow.min() < 10 and slow.max() == 47 and len(np.unique(slow)) > 4
    assert (length > w.CHUNK).mean() < 0.75  # so the dead were left out of the batch for a while
    out = w.dream_rollout(theta, model, starts, 6, 1.15, 47, torch.Generator().manual_seed(3))
    assert out.shape == (5, 6) and out.tolist() == slow.tolist()


def test_dream_rollout_with_rewards():
    model, starts, theta = dream_world(8.0, -1.0, predict_reward=True)
    model.reward_scale.fill_(3.0)
    slow, length = slow_dreams(theta, model, starts, 4, 1.0, 30, 1)
    assert len(np.unique(length)) > 3
    close(w.dream_rollout(theta, model, starts, 4, 1.0, 30, torch.Generator().manual_seed(1)), slow, 1e-3, 1e-3)
    model, starts, theta = dream_world(predict_done=False, predict_reward=True)
    slow, length = slow_dreams(theta, model, starts, 2, 1.0, 25, 1)
    assert (length == 25).all()
    close(w.dream_rollout(theta, model, starts, 2, 1.0, 25, torch.Generator().manual_seed(1)), slow, 1e-3, 1e-3)


@pytest.mark.parametrize("cap", [1, 19, 20, 21, 50])
def test_dream_that_never_ends_scores_exactly_the_cap(cap):
    model, starts, theta = dream_world(bias=-1e9)
    assert (w.dream_rollout(theta, model, starts, 3, 1.0, cap) == cap).all()
    with torch.no_grad():
        model.rnn.out.bias[0] = 1e9
    assert (w.dream_rollout(theta, model, starts, 3, 1.0, cap) == 1).all()


def test_the_end_is_cut_off_and_not_drawn():
    """A logit a little below 0 all the time: drawn, no dream of 200 steps would survive."""
    model, starts, theta = dream_world(spread=0.0, bias=-0.05)
    assert (w.dream_rollout(theta, model, starts, 8, 1.0, 200) == 200).all()
    model.rnn.out.bias.data[0] = 0.0  # probability one half is not above the cut
    assert (w.dream_rollout(theta, model, starts, 8, 1.0, 200) == 200).all()


def test_same_generator_same_scores_and_candidates_one_at_a_time():
    model, starts, theta = dream_world()

    def scores(theta, seed, tau=1.15):
        return w.dream_rollout(theta, model, starts, 6, tau, 60, torch.Generator().manual_seed(seed))

    together = scores(theta, 5)
    assert torch.equal(together, scores(theta, 5)) and not torch.equal(together, scores(theta, 6))
    assert torch.equal(together, torch.cat([scores(t[None], 5) for t in theta]))
    same = scores(theta[:1].repeat(3, 1), 5)
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])  # common first frames and noise
    assert len(same[0].unique()) > 1
    taus = torch.tensor([0.1, 0.5, 1.0, 1.15, 1.3])
    vector = scores(theta, 5, taus)
    assert torch.equal(vector, torch.cat([scores(theta[i : i + 1], 5, float(taus[i])) for i in range(5)]))
    assert not torch.equal(vector, together)


def gate_world():
    """Dreams go on as long as the first action is above 0.05 and the second one below -0.05. z is noise."""
    model = tiny(rnn_size=2, actions=2)
    rnn = model.rnn
    with torch.no_grad():
        for x in rnn.parameters():
            x.zero_()
        i, j, f, o = rnn.bias.view(4, 2)
        i.fill_(10), f.fill_(-11), o.fill_(10)
        j.copy_(torch.tensor([-1.0, -1.0]))  # j = 20 (a - 0.05), saturated
        rnn.weight[3, 2], rnn.weight[4, 3] = 20.0, -20.0
        rnn.out.weight[0], rnn.out.bias[0] = -1.0, 0.8  # alive while h1 + h2 > 0.8, and tanh(1) = 0.76
    return model, (torch.zeros(4, 3), torch.zeros(4, 3))


def test_evolution_learns_to_survive_a_dream():
    model, starts = gate_world()
    n = model.controller.count()
    evolution = w.Evolution(n, 16, 0.1, 1)
    theta = torch.zeros(3, n)
    theta[0, :2], theta[1, :2] = torch.tensor([0.5, -0.5]), torch.tensor([-0.5, 0.5])
    assert w.dream_rollout(theta, model, starts, 2, 1.0, 40).tolist() == [[40.0] * 2, [1.0] * 2, [1.0] * 2]
    for g in range(12):
        scores = w.dream_rollout(
            torch.from_numpy(evolution.ask()), model, starts, 8, 1.0, 40, torch.Generator().manual_seed(g)
        )
        evolution.tell(scores.mean(1).numpy())
    mean = torch.from_numpy(evolution.mean())[None]
    assert w.dream_rollout(mean, model, starts, 64, 1.0, 40).mean() > 30


# ---- Evolution -------------------------------------------------------------------------------------------------------


def test_evolution_maximises_and_returns_its_mean():
    target = np.array([0.5, -0.3, 0.2, 0.0])
    evolution = w.Evolution(4, 12, 0.1, 7)
    for _ in range(40):
        theta = evolution.ask()
        assert theta.shape == (12, 4) and theta.dtype == np.float32
        assert np.array_equal(theta, np.round(theta.astype(float), 4).astype(np.float32))
        evolution.tell(-((theta - target) ** 2).sum(1))
    assert np.abs(evolution.mean() - target).max() < 0.01
    assert np.array_equal(evolution.mean(), np.round(evolution.es.mean, 4).astype(np.float32))
    assert not any(np.array_equal(evolution.mean(), t) for t in theta)  # not the best sample


def test_evolution_starts_at_zero_with_its_sigma():
    theta = w.Evolution(300, 64, 0.1, 1).ask()
    assert abs(theta.std() / 0.1 - 1) < 0.03 and np.abs(theta.mean(0)).max() < 0.06
    assert not w.Evolution(5, 8, 0.1, 1).mean().any()


def test_evolution_replays_bit_for_bit_and_leaves_global_numbers_alone():
    before, fitness = np.random.get_state()[1].copy(), np.random.default_rng(0).normal(size=(7, 10))
    one = w.Evolution(20, 10, 0.1, [1, 3, 0])
    asked = []
    for f in fitness:
        asked.append(one.ask())
        one.tell(f)
    two = w.Evolution(20, 10, 0.1, [1, 3, 0])
    np.random.rand(5)
    two.replay(one.told[:4])
    assert two.told == one.told[:4]
    for g in range(4, 7):
        assert np.array_equal(two.ask(), asked[g])
        two.tell(fitness[g])
    assert np.array_equal(one.mean(), two.mean()) and one.es.sigma == two.es.sigma
    assert not np.array_equal(asked[0], w.Evolution(20, 10, 0.1, [1, 3, 1]).ask())
    np.random.seed(0)
    assert np.array_equal(np.random.get_state()[1], before)
    state = np.random.get_state()[2]
    w.Evolution(20, 10, 0.1, 1).replay(one.told[:2])
    assert np.random.get_state()[2] == state  # no number was drawn from it


def experiment(tmp_path, model, **overrides):
    silent = SimpleNamespace(scalars=lambda *a: None, close=lambda: None)
    spaces = dict(action=gym.spaces.Box(-1, 1, (2,)), observation=gym.spaces.Dict())
    stop = SimpleNamespace(signum=0)
    return w.Experiment(make_args(**overrides), str(tmp_path), model, spaces, 30, CPU, silent, stop)


def test_the_result_is_the_best_evaluated_mean(tmp_path):
    """Generations of four, evaluated every second one: kept is the mean that scored most, not the last one, not a
    candidate."""
    model = tiny()
    e = experiment(tmp_path, model, popsize=4, rollouts=2, generations=6, eval_every=2, eval_rollouts=5)
    means, calls = [], []

    def real(pool, theta, n, kind, generation):
        calls.append((kind, generation, n, len(theta)))
        if kind == 3:
            means.append(theta[0].copy())
            return np.full((1, n), [10.0, 30.0, 20.0][len(means) - 1])
        return theta[:, :1].repeat(n, 1)

    e.pool, e.real = lambda *a: None, real
    e.controller()
    assert calls == [
        *((2, 0, 2, 4), (2, 1, 2, 4), (3, 1, 5, 1)),
        *((2, 2, 2, 4), (2, 3, 2, 4), (3, 3, 5, 1)),
        *((2, 4, 2, 4), (2, 5, 2, 4), (3, 5, 5, 1)),
    ]
    assert np.array_equal(model.controller.theta.numpy(), means[1]) and e.best[1] == 30.0 and len(e.told) == 6


@pytest.mark.parametrize("when", [(2, 2), (3, 1), (3, 3)])
def test_a_stop_at_any_rollout_of_the_evolution_loses_nothing(tmp_path, when):
    """Also in the middle of the evaluation of a mean: what is saved then must not count the generation as finished, or
    its evaluation would never be made up for."""
    results = []
    for interrupted in (False, True):
        model, told, best = tiny(), [], None
        for attempt in range(2 if interrupted else 1):
            e = experiment(tmp_path, model, popsize=4, rollouts=2, generations=4, eval_every=2, eval_rollouts=5)
            e.told, e.best = told, best

            def real(pool, theta, n, kind, generation, stops=interrupted and attempt == 0):
                if stops and (kind, generation) == when:
                    raise KeyboardInterrupt  # the state that `stopped` would save is the experiment's as it is now
                return theta[:, :1].repeat(n, 1)

            e.pool, e.real = lambda *a: None, real
            try:
                e.controller()
            except KeyboardInterrupt:
                told, best = [list(f) for f in e.told], e.best
        results.append((model.controller.theta.tolist(), e.told, e.best))
    assert results[0] == results[1] and any(results[0][0])


# ---- Data ------------------------------------------------------------------------------------------------------------


def write_episodes(tmp_path, lengths, extra=None):
    """Frames whose colour is their number; action[t] is 1000 episodes + t, so that shifts are seen."""
    files, number = [], 0
    for i, T in enumerate(lengths):
        n = T + (1 if extra is None else extra[i])
        numbers = np.arange(number, number + n)
        frames = np.zeros((n, 64, 64, 3), np.uint8)
        frames[:, 0, 0, 0], frames[:, 0, 0, 1] = numbers // 256, numbers % 256
        rows = dict(action=np.float32(1000 * i + np.arange(T))[:, None], reward=np.arange(T) * 0.5 + i)
        rows |= dict(terminated=i % 2 == 0, length=n)
        files.append(str(tmp_path / f"0-{i:06d}.npz"))
        w.save_episode(files[-1], dict(frames=frames) | rows)
        number += n
    return files, number


def numbers_of(frames):
    return (frames[:, 0, 0, 0].int() * 256 + frames[:, 0, 0, 1]).tolist()


@pytest.mark.parametrize("capacity", [1000, 60])
def test_frame_store_epochs(tmp_path, capacity):
    lengths = [7, 20, 3, 11, 19, 8, 14, 9]
    files, total = write_episodes(tmp_path, lengths)
    store = w.FrameStore(files, capacity, CPU)
    assert store.lengths.tolist() == [n + 1 for n in lengths]
    groups = store.groups(np.random.default_rng(3))
    assert sorted(np.concatenate(groups)) == list(range(8)) and (len(groups) > 1) == (capacity < total)
    assert all(store.lengths[g].sum() <= capacity for g in groups)
    one = [numbers_of(b) for b in store.batches([1, 2], 10)]
    seen = sum(one, [])
    assert len(seen) == len(set(seen)) and all(len(b) == 10 for b in one)
    assert len(seen) == 10 * sum(store.lengths[g].sum() // 10 for g in store.groups(np.random.default_rng([1, 2])))
    assert seen != sorted(seen) and seen[:10] != sum([numbers_of(b) for b in store.batches([1, 3], 10)], [])[:10]
    for skip in range(len(one) + 1):
        assert [numbers_of(b) for b in w.FrameStore(files, capacity, CPU).batches([1, 2], 10, skip)] == one[skip:]


def latent_store(tmp_path, lengths, extra=None):
    """V replaced by one whose mu is the number of the frame and whose logvar is minus that."""
    files, total = write_episodes(tmp_path, lengths, extra)

    def encode(frames):
        mu = (frames[:, 0, 0, 0].float() * 256 + frames[:, 0, 0, 1])[:, None]
        return mu, -mu

    return w.LatentStore(SimpleNamespace(encode=encode), files, CPU), total


def test_latent_store_plan(tmp_path):
    lengths = [7, 20, 3, 11, 1, 8, 14, 9]
    store, _ = latent_store(tmp_path, lengths)
    assert store.length.tolist() == lengths
    plan = store.plan([1, 2], 4, 5)
    assert plan.shape == (sum(lengths) // 20, 5, 4)
    steps = plan.ravel()
    assert len(set(steps.tolist())) == len(steps) and 0 <= steps.min() and steps.max() < sum(lengths)
    episode = np.repeat(np.arange(8), lengths)
    place = np.concatenate([np.arange(n) for n in lengths])
    for row in plan.transpose(2, 0, 1).reshape(4, -1):  # along a row, through the windows
        for a, b in zip(row[:-1], row[1:]):
            if episode[a] == episode[b]:
                assert b == a + 1
            else:
                assert place[b] == 0 and place[a] == lengths[episode[a]] - 1
    assert not np.array_equal(plan, store.plan([1, 3], 4, 5)) and np.array_equal(plan, store.plan([1, 2], 4, 5))
    assert store.plan(0, 1000, 1000).size >= sum(lengths) - 1  # more than there is: as much as there is


def test_latent_store_batches_are_aligned(tmp_path):
    """(z[t], a[t]) -> z[t + 1] of the same episode; the last step of an episode without a last frame is not seen."""
    lengths, extra = [4, 6, 3], [1, 0, 0]
    store, total = latent_store(tmp_path, lengths, extra)
    index = np.arange(13)[:, None]
    b = {k: v[:, 0] for k, v in store.batch(index).items()}
    episode, place = np.repeat(np.arange(3), lengths), np.concatenate([np.arange(n) for n in lengths])
    frame = np.array([0, 5, 11])[episode] + place
    assert b["mu"][:, 0].tolist() == frame.tolist() and b["logvar"][:, 0].tolist() == (-frame).tolist()
    assert b["action"][:, 0].tolist() == (1000 * episode + place).tolist()
    assert b["reward"].tolist() == (0.5 * place + episode).tolist()
    assert b["restart"].tolist() == (place == 0).astype(float).tolist()
    last = place == np.array(lengths)[episode] - 1
    assert b["done"].tolist() == (last & (episode % 2 == 0)).astype(float).tolist()
    seen = ~last | (episode == 0)
    assert b["seen"].tolist() == seen.astype(float).tolist()
    for t in np.flatnonzero(seen):
        assert b["next_mu"][t, 0] == frame[t] + 1 and b["next_logvar"][t, 0] == -frame[t] - 1
    assert [x[:, 0].tolist() for x in store.starts] == [[0.0, 5.0, 11.0], [0.0, -5.0, -11.0]]
    assert store.starts[0].dtype == torch.float16 and b["mu"].dtype == torch.float32


def test_padded_episodes():
    model = tiny()
    episodes = []
    for T, frames, ended in ((3, 4, False), (5, 5, True)):
        rows = dict(action=np.random.rand(T, 2).astype(np.float32), reward=np.random.rand(T), terminated=ended)
        episodes.append(rows | dict(frames=np.random.randint(0, 256, (frames, 64, 64, 3)).astype(np.uint8)))
    b = {k: v.numpy() for k, v in w.padded(episodes, model, CPU).items()}
    assert b["frames"].shape == (6, 2, 64, 64, 3) and b["mask"].T.tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert b["seen"].T.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]] and b["done"].T.tolist() == [
        [0] * 5,
        [0] * 4 + [1],
    ]
    assert np.array_equal(b["frames"][:4, 0], episodes[0]["frames"]) and np.allclose(
        b["action"][:3, 0], episodes[0]["action"]
    )
    assert np.allclose(b["reward"][:, 1], episodes[1]["reward"])


# ---- Random play -----------------------------------------------------------------------------------------------------


def run_lengths(actions):
    change = np.flatnonzero(np.any(actions[1:] != actions[:-1], -1)) + 1
    return np.diff(np.concatenate([[0], change, [len(actions)]]))


def test_held_actions():
    a = w.held_actions("box", 1, 20_000, np.random.default_rng(1))
    holds = run_lengths(a)[:-1]
    assert a.shape == (20_000, 1) and a.dtype == np.float32 and sorted(set(holds.tolist())) == list(range(1, 11))
    assert np.abs(np.bincount(holds, minlength=11)[1:] / len(holds) - 0.1).max() < 0.03
    buttons = np.bincount(w.doom_buttons(a[:, 0]), minlength=3) / len(a)
    assert np.abs(buttons - 1 / 3).max() < 0.03
    assert set(run_lengths(w.held_actions("box", 2, 500, np.random.default_rng(1), 1))) == {1}
    one_hot = w.held_actions("discrete", 3, 3000, np.random.default_rng(1))
    assert (one_hot.sum(1) == 1).all() and np.abs(one_hot.mean(0) - 1 / 3).max() < 0.06
    car = w.held_actions("car", 3, 5000, np.random.default_rng(1), 1)
    assert car[:, 0].min() < -0.99 and car[:, 1:].min() >= 0 and car.max() > 0.99


def test_random_policy():
    policy, state, seen = w.random_policy(gym.spaces.Box(-1, 1, (1,)), 3), None, []
    first = np.array([True, True])
    for t in range(1500):
        if t == 700:
            first = np.array([True, False])
        action, state = policy(None, first, state)
        seen.append(action.copy())
        first = np.array([False, False])
    seen = np.stack(seen)
    assert seen.shape == (1500, 2, 1) and not np.array_equal(seen[:, 0], seen[:, 1])
    for i, begin in ((0, 700), (1, 1000)):  # a new table at an episode's beginning or after a thousand steps
        assert run_lengths(seen[begin:, i]).max() <= 10 and 4 < run_lengths(seen[begin:, i]).mean() < 7
    buttons = np.bincount(w.doom_buttons(seen[..., 0].ravel()), minlength=3) / seen.size
    assert np.abs(buttons - 1 / 3).max() < 0.08
    actions = [w.random_policy(gym.spaces.Discrete(3), 1)(None, np.ones(600, bool), None)[0] for _ in range(2)]
    assert np.abs(np.bincount(actions[0]) / 600 - 1 / 3).max() < 0.06 and np.array_equal(*actions)


def test_walk_actions():
    a = w.walk_actions("car", 3, 20_000, np.random.default_rng(0))
    assert np.abs(a).max() <= 1 and a[:, 1:].min() == 0 and a[:, 0].min() == -1
    steps = np.diff(a, axis=0)
    inside = (np.abs(a[:-1, 1] - 0.5) < 0.05) & (np.abs(steps[:, 1]) < 0.5)
    assert np.abs(steps[inside, 1]).max() > 0.3 and abs(np.corrcoef(a[:-1, 0], a[1:, 0])[0, 1] - 0.85) < 0.1
    box = w.walk_actions("box", 2, 5000, np.random.default_rng(0))
    assert box.shape == (5000, 2) and box.min() == -1 and box.max() == 1 and abs(box.mean()) < 0.1


# ---- Environments ----------------------------------------------------------------------------------------------------


def env_seed(*key):
    return int(np.random.SeedSequence((*key, 0)).generate_state(1)[0])


def car_pair(repeat, draw):
    """The fast environment and the class as it is, on the same track."""
    args = make_args(env_id="CarRacing-v3", action_repeat=repeat, max_episode_steps=None)
    fast = w.make_env(args, 0)()
    stock = gym.make("CarRacing-v3", lap_complete_percent=1.0, disable_env_checker=True)
    (obs,) = fast.reset()[0].values()
    first = stock.reset(seed=env_seed(args.seed, 0, 0))[0]
    if not draw:
        stock.unwrapped._render = lambda mode: None
    return fast, stock, obs, first


def test_fast_car_racing_is_the_class_step_by_step():
    fast, stock, obs, first = car_pair(1, True)
    assert fast.action_space.shape == (3,) and obs.shape == (64, 64, 3)
    rng, differences, total = np.random.default_rng(0), [], 0.0
    for t in range(250):
        action = np.array([0.4 * math.sin(t / 9), 0.6, 0.0 if t % 50 < 40 else 0.3]) + 0.05 * rng.normal(size=3)
        (obs,), reward, *ends, _ = (x.values() if i == 0 else x for i, x in enumerate(fast.step(action)))
        low = np.array([-1, 0, 0], np.float32)
        frame, expected, *stock_ends, _ = stock.step(np.clip(action, low, 1).astype(np.float32))
        assert reward == float(expected) and ends == stock_ends
        total += reward
        differences.append(np.abs(obs.astype(int) - w.process_frame(frame, 84)).mean())
    assert total > 0  # tiles were visited
    assert max(differences[50:]) < 4 and np.mean(differences[50:]) < 3
    blank = np.abs(w.process_frame(frame, 84).astype(int) - np.full((64, 64, 3), (102, 229, 102))).mean()
    assert blank > 6  # a picture of nothing but grass would not do
    fast.reset(), stock.reset(seed=int(np.random.SeedSequence((1, 0, 0, 1)).generate_state(1)[0]))  # another track
    for _ in range(60):
        (obs,), (frame, *_) = fast.step(action)[0].values(), stock.step(action.astype(np.float32))
    assert np.abs(obs.astype(int) - w.process_frame(frame, 84)).mean() < 4


def test_action_repeat_adds_rewards_and_stops_at_the_end():
    """Straight ahead, off the playfield: both end in the same frame, with -100."""
    fast, stock, *_ = car_pair(4, False)
    action, steps = np.array([0.0, 0.3, 0.0], np.float32), 0
    while steps < 250:
        steps += 1
        _, reward, terminated, truncated, _ = fast.step(action)
        total = 0.0
        for _ in range(4):
            _, expected, *ends, _ = stock.step(action)
            total += float(expected)
            if any(ends):
                break
        assert reward == total and [terminated, truncated] == ends
        if terminated:
            break
    assert terminated and reward <= -90 and 50 < steps < 100


def test_a_lap_is_over_when_all_tiles_are_visited():
    fast, stock, *_ = car_pair(1, False)
    assert fast.unwrapped.lap_complete_percent == 1.0
    assert w.make_env(make_args(env_id="CarRacing-v3", fast_render=False), 0)().unwrapped.lap_complete_percent == 1.0
    assert w.reporting(make_args(env_id="CarRacing-v3")).fast_render is False


def test_limits_of_episodes():
    for args, limit in (
        (make_args(env_id="CarRacing-v3", max_episode_steps=None), 1000),
        (make_args(env_id="CarRacing-v3", max_episode_steps=None, action_repeat=4), 250),
        (make_args(env_id="CarRacing-v3", max_episode_steps=75, action_repeat=4), 75),
        (make_args(env_id="SmallCartPole-v0", max_episode_steps=None), 500),
    ):
        assert w.probe_env(args)[2] == limit
    takecover = w.Args(**w.PRESETS["takecover"])
    assert takecover.max_episode_steps == 2100 and takecover.temperature == 1.15 and w.Args().generations == 1800


def test_small_cart_pole_shows_the_pole():
    env = gym.make("SmallCartPole-v0").unwrapped
    obs, _ = env.reset(seed=1)
    assert obs.shape == (64, 64, 3) and obs.dtype == np.uint8
    check_env(env, skip_render_check=True)
    plain = gym.make("CartPole-v1").unwrapped
    plain.reset(seed=5), env.reset(seed=5)
    for t in range(8):
        assert env.step(t % 2)[1:3] == plain.step(t % 2)[1:3] and np.array_equal(env.state, plain.state)
    pictures = []
    for angle in (-0.1, 0.0, math.radians(1), 0.1):
        env.state = (0.0, 0.0, angle, 0.0)
        pictures.append(env.render().astype(int))
    assert (np.abs(pictures[2] - pictures[1]).max(-1) > 20).sum() >= 10  # one degree moves pixels
    yellow = [np.average(np.arange(64), weights=(p[..., 0] > 150).sum(0)) for p in pictures]
    assert yellow[0] < yellow[1] < yellow[2] < yellow[3]  # to the right is to the right


# ---- Lockstep --------------------------------------------------------------------------------------------------------

SEEDS = [(1, 77, i) for i in range(7)]


def toy_episode(seed, act, **kwargs):
    """One episode, played without a pool: return, length, frames."""
    env = Toy(**kwargs)
    obs, total, t, frames = *env.reset(seed=env_seed(*seed))[:1], 0.0, 0, []
    frames.append(obs)
    while True:
        obs, reward, *ends, _ = env.step(act(t, obs))
        total, t = total + reward, t + 1
        frames.append(obs)
        if any(ends):
            return total, t, frames


def random_episode(seed, kind="box", A=2, **kwargs):
    table = w.held_actions(kind, A, 300, w.episode_rng(seed, 1))
    return toy_episode(seed, lambda t, obs: table[t].argmax() if kind == "discrete" else table[t], **kwargs)


@pytest.mark.parametrize("n", [1, 3, 7])
@pytest.mark.parametrize("workers", [1, 2])
def test_every_seed_is_played_once_whoever_plays_it(n, workers):
    slow = [random_episode(s) for s in SEEDS]
    assert len({e[0] for e in slow}) == 7 and len({e[1] for e in slow}) > 2
    model, args = tiny(), make_args(num_workers=workers)
    pool = w.EnvPool(args, n, Toy().action_space)
    try:
        assert len(pool.workers) == (0 if workers == 1 or n == 1 else 2)
        for seeds in (SEEDS, SEEDS[4:]):  # the second time some environments idle, and none is new
            told = []
            policy = w.RandomPlay(model, "hold", n, 300)
            returns, lengths = w.rollouts(pool, seeds, policy, tell=told.append)
            expected = slow[-len(seeds) :]
            assert returns.tolist() == pytest.approx([e[0] for e in expected]) and told[-1] == len(seeds)
            assert lengths.tolist() == [e[1] for e in expected]
    finally:
        pool.close()
    assert not pool.workers


def test_idle_rows_are_left_alone():
    pool = w.EnvPool(make_args(), 5, Toy().action_space)
    pool.frames[:], pool.reward[:] = 9, 7.0
    returns, _ = w.rollouts(pool, SEEDS[:2], w.RandomPlay(tiny(), "hold", 5, 300))
    assert returns.tolist() == pytest.approx([random_episode(s)[0] for s in SEEDS[:2]])
    assert (pool.frames[2:] == 9).all() and (pool.reward[2:] == 7).all() and not pool.op.any()
    pool.close()


def test_discrete_actions_arrive_as_numbers():
    args = make_args(env_kwargs='{"discrete": true}')
    pool = w.EnvPool(args, 3, Toy(True).action_space)
    model = tiny(kind="discrete", actions=3)
    returns, _ = w.rollouts(pool, SEEDS, w.RandomPlay(model, "hold", 3, 300))
    expected = [random_episode(s, "discrete", 3, discrete=True)[0] for s in SEEDS]
    assert returns.tolist() == pytest.approx(expected)
    pool.close()


@pytest.mark.parametrize(("terminal", "black"), [(True, False), (True, True), (False, True), (False, False)])
def test_stored_episodes(terminal, black):
    """frames[t], action[t] -> reward[t], frames[t + 1]. A black frame at a true end is no frame; at a truncation it is
    one."""
    args = make_args(env_kwargs=f'{{"terminal": {str(terminal).lower()}, "black": {str(black).lower()}}}')
    pool, kept = w.EnvPool(args, 3, Toy().action_space), {}
    w.rollouts(pool, SEEDS, w.RandomPlay(tiny(), "hold", 3, 300), store=lambda e, data: kept.update({e: data}))
    pool.close()
    assert sorted(kept) == list(range(7))
    for e, data in kept.items():
        total, T, frames = random_episode(SEEDS[e], terminal=terminal, black=black)
        frames = frames[:-1] if terminal and black else frames
        assert np.array_equal(data["frames"], np.stack(frames)) and data["length"] == len(frames)
        assert np.array_equal(data["action"], w.held_actions("box", 2, 300, w.episode_rng(SEEDS[e], 1))[:T])
        assert len(data["reward"]) == T and sum(data["reward"]) == pytest.approx(total)
        assert data["terminated"] is terminal
        for t in range(1, T - 1):  # the picture after action[t] tells it
            assert abs(int(frames[t + 1][0, 0, 2]) - (128 + 50 * data["action"][t, 0])) < 1


@pytest.mark.parametrize("workers", [1, 2])
def test_stop_and_enough(workers):
    pool = w.EnvPool(make_args(num_workers=workers), 4, Toy().action_space)
    stop = SimpleNamespace(signum=0)

    def tell(finished):
        stop.signum = 15

    assert w.rollouts(pool, SEEDS, w.RandomPlay(tiny(), "hold", 4, 300), stop, tell=tell) is None
    returns, _ = w.rollouts(pool, SEEDS, w.RandomPlay(tiny(), "hold", 4, 300))  # the pool can be used again
    assert returns.tolist() == pytest.approx([random_episode(s)[0] for s in SEEDS])
    kept = []
    w.rollouts(pool, SEEDS, w.RandomPlay(tiny(), "hold", 4, 300), store=lambda e, data: kept.append(e) or True)
    assert kept and set(kept) <= {0, 1, 2, 3}  # those that had begun are finished, no other one begins
    pool.close()


def slow_agent(model, theta, seed, block, **kwargs):
    """V, C and M, one after the other: C sees the h from before M's step."""
    state = SimpleNamespace(c=np.zeros(model.rnn.H), h=np.zeros(model.rnn.H), noise=None)

    def act(t, obs):
        if t % block == 0:
            rng = w.episode_rng(seed, 2, t)
            state.noise = rng.standard_normal((block, model.rnn.Z), dtype=np.float32)
        with torch.no_grad():
            mu, logvar = (
                x[0].double().numpy() for x in model.vae.encode(torch.tensor(obs[None]).permute(0, 3, 1, 2) / 255)
            )
        z = mu + np.exp(logvar / 2) * state.noise[t % block]
        weights = theta.astype(np.float64)
        a = np.tanh(weights[: model.A] + np.concatenate([z, state.h]) @ weights[model.A :].reshape(-1, model.A))
        x = np.concatenate([z, a, [float(t == 0)]])
        state.c, state.h = slow_lstm(model.rnn, x, state.c, state.h)
        return a

    return toy_episode(seed, act, **kwargs)


def test_agent_play_against_one_episode_at_a_time(monkeypatch):
    """Each episode has its own controller and its own noise, whatever the number of environments: a run with 2 and one
    with 5, or with two processes, give the same returns. The block of noise is made short so that it is drawn anew."""
    monkeypatch.setattr(w.AgentPlay, "BLOCK", 4)
    model = tiny()
    theta = np.random.default_rng(1).normal(size=(7, model.controller.count())).astype(np.float32)
    slow = [slow_agent(model, theta[e], SEEDS[e], 4) for e in range(7)]
    assert max(e[1] for e in slow) > 4
    for n, workers in ((2, 1), (5, 1), (5, 2)):
        pool = w.EnvPool(make_args(num_workers=workers), n, Toy().action_space)
        returns, lengths = w.rollouts(pool, SEEDS, w.AgentPlay(model, theta, n))
        pool.close()
        assert returns.tolist() == pytest.approx([e[0] for e in slow], abs=1e-3)
        assert lengths.tolist() == [e[1] for e in slow]


def test_candidates_meet_the_same_episodes(tmp_path):
    model = tiny()
    e = experiment(tmp_path, model)
    pool = w.EnvPool(make_args(), 4, Toy().action_space)
    theta = np.random.default_rng(1).normal(size=(3, model.controller.count())).astype(np.float32)
    theta[2] = theta[0]
    out = e.real(pool, theta, 5, 2, 11)
    pool.close()
    assert out.shape == (3, 5) and np.allclose(out[0], out[2]) and not np.allclose(out[0], out[1])
    seeds = e.seeds(2, 11, 5)
    assert out[1].tolist() == pytest.approx([slow_agent(model, theta[1], s, 256)[0] for s in seeds], abs=1e-3)
    everything = [s for k in range(6) for g in (0, 1) for s in e.seeds(k, g, 5)]
    assert len(set(everything)) == 60  # no episode has two purposes


def test_act_step_uses_h_from_before_m_sees_the_step():
    model = tiny()
    frames = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    s = dict(frames=frames, eps=torch.randn(2, 3), first=torch.tensor([0.0, 1.0]), theta=torch.randn(2, 20))
    s |= dict(c=torch.randn(2, 6), h=torch.randn(2, 6), instead=torch.full((2, 2), math.nan))
    s["instead"][1] = torch.tensor([0.25, -0.5])
    with torch.no_grad():
        out = w.act_step(model, s)
        mu, logvar = model.encode(frames)
    z = (mu + (logvar / 2).exp() * s["eps"]).double().numpy()
    theta, h = s["theta"].double().numpy(), s["h"].double().numpy()
    a = np.tanh(theta[0, :2] + np.concatenate([z[0], h[0]]) @ theta[0, 2:].reshape(9, 2))
    close(out["action"][0], a)
    assert out["action"][1].tolist() == [0.25, -0.5]
    for n, action in enumerate((a, [0.25, -0.5])):
        c_next, h_next = slow_lstm(
            model.rnn, np.concatenate([z[n], action, [float(n)]]), s["c"][n].double().numpy(), h[n]
        )
        close(out["c"][n], c_next)
        close(out["h"][n], h_next)
    late = np.tanh(theta[0, :2] + np.concatenate([z[0], out["h"][0]]) @ theta[0, 2:].reshape(9, 2))
    assert np.abs(late - a).max() > 0.01  # what C would do with the h of after


def test_exploration_belongs_to_the_episode():
    """Half of the episodes explore, and which ones depends on their seeds: a collection that is interrupted goes on
    with other numbers in its queue."""
    model, theta = tiny(), np.zeros((8, 20), np.float32)

    def explored(e, seed, explore=1.0):
        policy = w.AgentPlay(model, theta, 1, explore)
        policy.begin(0, e, seed)
        policy.places(np.zeros(1, int))
        return policy.random[0].copy()

    some = [np.isfinite(explored(i, (1, 5, i))).all() for i in range(8)]
    assert sum(some) == 4
    assert not np.isfinite(explored(1, (1, 5, 1), 0.0)).any()
    few = explored(1, (1, 5, 1), 0.05)
    used = np.isfinite(few).all(1)
    assert 0.05 < used.mean() < 0.5 and np.abs(few[used]).max() <= 1 and (~used).any()
    odd = some.index(True)
    for e in (0, 1):
        assert np.array_equal(explored(e, (1, 5, odd)), explored(odd, (1, 5, odd)), equal_nan=True)


def test_random_agents_are_new_for_each_episode_and_repeatable():
    model, results = tiny(predict_done=False), []
    for n in (2, 3):
        pool, kept = w.EnvPool(make_args(), n, Toy().action_space), {}
        w.rollouts(
            pool, SEEDS, w.RandomAgents(model, "agent", n, 300), store=lambda e, data, kept=kept: kept.update({e: data})
        )
        pool.close()
        results.append([kept[e]["action"] for e in range(7)])
    for a, b in zip(*results):
        assert np.allclose(a, b, atol=1e-5) and np.abs(a).max() <= 1
    firsts = [a[0] for a in results[0]]
    assert len({tuple(x) for x in firsts}) == 7


def test_random_agents_against_one_at_a_time():
    """Each row is a whole agent of its own: its V, its M with its own h, its C."""
    model, rng = tiny(), np.random.default_rng(0)
    policy = w.RandomAgents(model, "agent", 3, 300)
    for i in range(3):
        policy.begin(i, i, SEEDS[i])
    for p in policy.params.values():  # drawn with a tiny scale; larger, so that h matters
        p.copy_(torch.from_numpy(rng.normal(size=tuple(p.shape)) * 0.3))
    agents, c, h = [], np.zeros((3, 6)), np.zeros((3, 6))
    for i in range(3):
        agents.append(tiny())
        agents[i].load_state_dict({k: v[i] for k, v in policy.params.items()}, strict=False)
    for t, rows in enumerate(([0, 1, 2], [0, 2], [0, 1, 2])):
        frames = rng.integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
        acting = np.isin(np.arange(3), rows)
        out, _ = policy.act(0, np.arange(3), acting, frames, np.full(3, t == 0))
        for a, i in zip(out, rows):
            with torch.no_grad():
                mu, logvar = (x[0].double().numpy() for x in agents[i].encode(torch.from_numpy(frames[i : i + 1])))
            z = mu + np.exp(logvar / 2) * policy.noise[i, policy.t[i] - 1]
            theta = numbers(agents[i].controller.theta)
            expected = np.tanh(theta[:2] + np.concatenate([z, h[i]]) @ theta[2:].reshape(-1, 2))
            close(a, expected)
            c[i], h[i] = slow_lstm(agents[i].rnn, np.concatenate([z, expected, [float(t == 0)]]), c[i], h[i])
    policy.begin(1, 1, SEEDS[1])
    assert not policy.h[1].any() and policy.h[0].any()


def test_random_agents_have_cauchy_weights_of_a_scale_of_their_own():
    policy, scales = w.RandomAgents(tiny(vae_depth=4, rnn_size=32), "agent", 1, 300), []
    for i in range(40):
        policy.begin(0, i, (1, 3, i))
        values = torch.cat([policy.params[k].flatten() for k in ("rnn.weight", "vae.encoder.3.weight")]).abs()
        quarter, half = torch.quantile(values, 0.25), values.median()  # of |Cauchy|: tan(pi / 8) and 1
        scales.append(float(half))
        assert abs(quarter / half - math.tan(math.pi / 8)) < 0.05 and values.max() > 100 * half
    assert 0 < min(scales) < 0.002 and 0.008 < max(scales) < 0.0103 and abs(np.mean(scales) - 0.005) < 0.0015


# ---- The dream as an environment -------------------------------------------------------------------------------------


def saved_world(path, model, temperature=1.15, starts=True, limit=12, space=None):
    space = space or gym.spaces.Box(-1, 1, (2,), np.float32)
    given = torch.randn(5, model.rnn.Z).half(), torch.randn(5, model.rnn.Z).half() - 2
    state = dict(script="ha2018_carracing", config=model.config, model=model.state_dict(), limit=limit)
    state |= dict(args=dict(temperature=temperature), starts=given if starts else None)
    torch.save(state | dict(spaces=dict(action=w.space_to(space))), path / "ckpt.pt")
    return given


def test_dream_env_is_an_environment(tmp_path):
    saved_world(tmp_path, dream_world()[0])
    env = w.DreamEnv(str(tmp_path))
    check_env(env, skip_render_check=True)
    assert env.action_space == gym.spaces.Box(-1, 1, (2,), np.float32)
    assert env.temperature == 1.15 and w.DreamEnv(str(tmp_path), temperature=0.5).temperature == 0.5
    env.reset(seed=1)
    assert env.render().shape == (256, 256, 3)


def walk(env, actions, **options):
    out = [env.reset(**options)[0]]
    for a in actions:
        obs, reward, terminated, truncated, info = env.step(a)
        out.append((obs, reward, terminated, truncated))
        if terminated or truncated:
            break
    return out


def test_dream_env_mechanics(tmp_path):
    model = dream_world(bias=-1e9)[0]
    given = saved_world(tmp_path, model)
    env = w.DreamEnv(str(tmp_path))
    actions = np.random.default_rng(0).uniform(-1, 1, (20, 2)).astype(np.float32)
    one, two, other = (walk(env, actions, seed=s) for s in (4, 4, 5))
    assert len(one) == 13 and one[-1][3] and not one[-2][3]  # truncated at the limit
    assert all(r == 1.0 and not t for _, r, t, _ in one[1:])
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(one[1:], two[1:])) and not np.array_equal(one[0], other[0])
    changed = walk(env, -actions, seed=4)
    assert np.array_equal(changed[0], one[0]) and not np.array_equal(changed[5][0], one[5][0])
    # The state: c and h advance with (z, action, first), z is drawn from the mixture.
    env.reset(seed=4)
    first = [float(((env.z[0] - m.float()) ** 2 / v.float().exp()).max()) for m, v in zip(*given)]
    assert min(first) < 16  # z is a draw around one of the kept first frames
    c, h = np.zeros(6), np.zeros(6)
    for t in range(3):
        z = env.z[0].double().numpy()
        env.step(actions[t])
        c, h = slow_lstm(model.rnn, np.concatenate([z, actions[t], [float(t == 0)]]), c, h)
        close(env.c[0], c)
        close(env.h[0], h)
        close(torch.tensor(env.obs), model.show(env.z)[0])


def test_dream_env_ends_where_the_logit_is_positive(tmp_path):
    saved_world(tmp_path, dream_world(bias=0.0, spread=2.0)[0], limit=1000)
    env, lengths = w.DreamEnv(str(tmp_path)), []
    for seed in range(12):
        env.reset(seed=seed)
        for _t in range(200):
            _, _, terminated, _, info = env.step(np.zeros(2, np.float32))
            assert terminated == (info["continue"] < 0.5)
            logit = slow_heads(env.model.rnn, env.h[0].double().numpy())[0]
            assert info["continue"] == pytest.approx(sigmoid(-logit), abs=1e-5)
            if terminated:
                break
        lengths.append(_t)
    assert len(set(lengths)) > 2


def test_dream_env_sees_context(tmp_path):
    """With logvar very small z is mu. T frames and T - 1 of the actions are seen; the first one has the flag."""
    model = tiny()
    with torch.no_grad():
        model.vae.logvar.weight.zero_(), model.vae.logvar.bias.fill_(-40)
    saved_world(tmp_path, model)
    env = w.DreamEnv(str(tmp_path))
    obs = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3)).astype(np.uint8)
    actions = np.random.default_rng(1).uniform(-1, 1, (4, 2)).astype(np.float32)
    env.reset(seed=1, options=dict(observations=obs, actions=actions))
    with torch.no_grad():
        mu = model.encode(torch.from_numpy(obs))[0].double().numpy()
    c, h = np.zeros(6), np.zeros(6)
    for t in range(3):
        c, h = slow_lstm(model.rnn, np.concatenate([mu[t], actions[t], [float(t == 0)]]), c, h)
    close(env.z[0], mu[3])
    close(env.c[0], c)
    close(env.h[0], h)
    env.step(actions[3])
    close(env.h[0], slow_lstm(model.rnn, np.concatenate([mu[3], actions[3], [0.0]]), c, h)[1])
    env.reset(seed=1, options=dict(observations=obs[:1], actions=actions[:1]))
    assert not env.h.any() and float(env.first) == 1
    for bad in (dict(observations=obs, actions=actions[:3]), dict(observations=obs[..., :32, :], actions=actions)):
        with pytest.raises(ValueError, match="observations"):
            env.reset(options=bad)


def test_dream_env_rewards_and_missing_starts(tmp_path):
    model = tiny(predict_done=False, predict_reward=True)
    model.reward_scale.fill_(4.0)
    saved_world(tmp_path, model)
    env = w.DreamEnv(str(tmp_path))
    assert env.temperature == 1.0  # without ends there was no dream with a temperature
    env.reset(seed=0)
    _, reward, terminated, *_ = env.step(np.float32([0.5, 0.5]))
    assert reward == pytest.approx(4 * slow_heads(model.rnn, env.h[0].double().numpy())[1], rel=1e-4)
    assert not terminated
    saved_world(tmp_path, tiny(predict_done=False), starts=False)
    env = w.DreamEnv(str(tmp_path))
    with pytest.raises(ValueError, match="before V was trained"):
        env.reset()
    env.reset(options=dict(observations=np.zeros((1, 64, 64, 3), np.uint8), actions=np.zeros((1, 2), np.float32)))
    assert env.step(np.zeros(2, np.float32))[1] == 0.0


def test_dream_env_takes_the_environments_actions(tmp_path):
    saved_world(tmp_path, tiny(kind="discrete", actions=3), space=gym.spaces.Discrete(3))
    env = w.DreamEnv(str(tmp_path))
    assert env.action_space == gym.spaces.Discrete(3) and env.as_seen([2, 0]).tolist() == [[0, 0, 1], [1, 0, 0]]
    saved_world(tmp_path, tiny(kind="car", actions=3), space=gym.spaces.Box(-1, 1, (3,), np.float32))
    assert w.DreamEnv(str(tmp_path)).as_seen([[-2, -1, 0.5]]).tolist() == [[-1, 0, 0.5]]


def test_agent_policy_starts_anew_at_each_beginning():
    model = tiny()
    with torch.no_grad():
        model.vae.logvar.weight.zero_(), model.vae.logvar.bias.fill_(-40)
    policy, frames = w.agent_policy(model, CPU), np.random.default_rng(0).integers(0, 256, (3, 2, 64, 64, 3))
    frames, state, out = frames.astype(np.uint8), None, []
    for t, first in enumerate(([True, True], [False, False], [True, False])):
        action, state = policy({"observation": frames[t]}, np.array(first), state)
        out.append((action, state[1].clone()))
    fresh = policy({"observation": frames[2]}, np.array([True, True]), None)
    close(out[2][0][0], fresh[0][0])
    close(out[2][1][0], fresh[1][1][0])
    assert np.abs(out[2][0][1] - fresh[0][1]).max() > 1e-3


# ---- Errors of the model ---------------------------------------------------------------------------------------------


def test_open_loop_numbers():
    """A V that knows the colour of a frame exactly, and episodes of one colour: nothing is left to err about in copies
    of the last frame, while the mean of all frames is wrong by the variance of the colours."""
    model, rng = tiny(), np.random.default_rng(0)
    episodes, levels = [], (50, 200)
    for level in levels:
        frames = np.full((9, 64, 64, 3), level, np.uint8)
        rows = dict(action=rng.uniform(-1, 1, (8, 2)).astype(np.float32), reward=np.ones(8), terminated=True)
        episodes.append(rows | dict(frames=frames))
    errors, (real, recon, dream, context) = w.open_loop(model, episodes, 3, 4)
    assert errors["copy_last_mse"] == 0 and context == 3
    assert errors["mean_frame_mse"] == pytest.approx((75 / 255) ** 2, rel=1e-4)
    expected = ((recon.astype(float) - real) / 255) ** 2
    assert real.shape == recon.shape == dream.shape == (2, 7, 64, 64, 3) and np.array_equal(
        real[0], episodes[0]["frames"][:7]
    )
    assert np.array_equal(dream[:, :3], recon[:, :3])
    assert errors["posterior_mse"] == pytest.approx(expected.mean(), rel=1e-3)
    assert errors["open_loop_mse"] == pytest.approx(
        (((dream[:, 3:].astype(float) - real[:, 3:]) / 255) ** 2).mean(), rel=1e-3
    )
    assert errors["copy_latent_mse"] == 0


def test_three_rows_of_the_video():
    real, recon, dream = (np.full((2, 4, 64, 64, 3), v, np.uint8) for v in (10, 20, 30))
    frames = w.truth_recon_dream(real, recon, dream, 2)
    assert len(frames) == 4 and frames[0].shape == (3 * 70, 2 * 70, 3)
    assert [int(frames[0][70 * i + 35, 35, 0]) for i in range(3)] == [10, 20, 30]
    assert frames[1][140, 5].tolist() == [0, 180, 0] and frames[2][140, 5].tolist() == [220, 0, 0]
