"""diamond.py by numbers: closed forms, slow references, counts of the published networks, losses, the sampler, replay
draws, the imagined environments and their restarts, own data."""

import copy
import json
import math
import os
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diamond as d

CPU = torch.device("cpu")
TINY = d.Args(
    **d.PRESETS["cpu"]
    | dict(denoiser_channels="8,8", denoiser_cond=16, rew_end_channels="8,8", rew_end_cond=8, rew_end_lstm=8)
    | dict(actor_channels="4,8", actor_lstm=8, imag_envs=4, imag_horizon=5, start_pool=6, batch_size=3)
    | dict(rew_end_length=6, warmup_updates=0, denoising_steps=3)
)


def tiny(seed=0, actions=3, side=10, args=TINY):
    """A small model whose weights are all random, so that nothing is zero by initialisation."""
    torch.manual_seed(seed)
    model = d.Diamond((side, side, 3), actions, vars(args))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


# ---- Noise levels and preconditioning --------------------------------------------------------------------------------


def test_karras_sigmas():
    assert torch.allclose(d.karras_sigmas(3), torch.tensor([5, 0.283082, 0.002, 0]), rtol=1e-5, atol=0)
    five = torch.tensor([5, 1.377025, 0.283082, 0.0365471, 0.002, 0])
    assert torch.allclose(d.karras_sigmas(5, 0.002, 5.0, 7), five, rtol=1e-5, atol=0)
    assert d.karras_sigmas(1).tolist() == [5.0, 0.0]
    linear = d.karras_sigmas(3, 1.0, 3.0, 1)
    assert torch.allclose(linear, torch.tensor([3.0, 2.0, 1.0, 0.0]))


@pytest.mark.parametrize(
    "sigma, expected",
    [
        (5.0, (0.198654, 0.497527, 0.00986582, 0.402809)),
        (1.0, (0.863868, 0.450953, 0.186567, 0.0107722)),
        (0.002, (1.714976, 0.257252, 0.735285, -0.300988)),
    ],
)
def test_preconditioning_numbers(sigma, expected):
    found = d.edm_preconditioning(torch.tensor([sigma]), 0.5, 0.3)
    assert [v.shape for v in found] == [(1,)] * 4
    assert np.allclose([float(v) for v in found], expected, rtol=1e-4)


@pytest.mark.parametrize("data, offset", [(0.5, 0.3), (0.5, 0.0), (0.8, 0.1)])
def test_preconditioning_identities(data, offset):
    sigma = torch.logspace(-2.5, 1.3, 50, dtype=torch.float64)
    c_in, c_out, c_skip, c_noise = d.edm_preconditioning(sigma, data, offset)
    s2 = sigma**2 + offset**2
    one = torch.ones_like(sigma)
    assert torch.allclose(c_in**2 * (s2 + data**2), one)  # the network's input has variance 1
    assert torch.allclose(c_out**2, s2 * c_skip)
    assert torch.allclose((1 - c_skip) ** 2 * data**2 + c_skip**2 * s2, c_out**2)  # and so has its target
    assert torch.allclose(c_noise, s2.sqrt().log() / 4)


def test_training_sigmas():
    torch.manual_seed(0)
    sigma = d.sample_training_sigma(100_000)
    assert sigma.shape == (100_000,) and abs(float(sigma.median()) - math.exp(-0.4)) < 0.01
    assert sigma.min() >= 0.002 and sigma.max() <= 20 and abs(float(sigma.log().std()) - 1.2) < 0.01
    wide = d.sample_training_sigma(1000, std=50.0)
    assert (wide.min(), wide.max()) == (torch.tensor(0.002), 20.0)


def test_noise_has_an_offset_per_channel():
    torch.manual_seed(0)
    x = torch.rand(4000, 3, 2, 2)
    sigma = torch.full((4000,), 0.4)
    n = d.add_noise(x, sigma, 0.3) - x
    assert abs(float(n.var()) - (0.16 + 0.09)) < 0.005
    pixels = n.flatten(2)
    together = float((pixels[..., 0] * pixels[..., 3]).mean())
    assert abs(together - 0.09) < 0.005  # covariance of two pixels of a channel
    assert abs(float((pixels[:, 0, 0] * pixels[:, 1, 0]).mean())) < 0.01  # channels are independent
    assert abs(float((n[0::2] * n[1::2]).mean())) < 0.01  # and so are images
    plain = d.add_noise(x, torch.tensor([0.5] * 2000 + [0.01] * 2000), 0.0) - x  # a level per sample
    assert abs(float(plain[:2000].std()) - 0.5) < 0.01 and abs(float(plain[2000:].std()) - 0.01) < 0.001


def test_quantize():
    x = torch.linspace(-1.5, 1.5, 200_001)
    q = d.quantize(x)
    levels = q.unique()
    assert len(levels) == 256 and torch.allclose(levels, torch.arange(256) / 127.5 - 1, atol=1e-6)
    assert q[0] == -1 and q[-1] == 1  # clamped
    assert torch.allclose(d.quantize(torch.zeros(1)), torch.tensor([-0.0039216]), atol=1e-6)  # truncated, not rounded
    inside = (x > -1) & (x < 1)
    error = (x - q)[inside]
    assert error.min() > -1e-6 and error.max() < 2 / 255 + 1e-6 and abs(float(error.mean()) - 1 / 255) < 1e-4
    official = x.clamp(-1, 1).add(1).div(2).mul(255).byte().div(255).mul(2).sub(1)
    assert torch.equal(q, official)
    assert int((d.quantize(levels) != levels).sum()) == 63  # why a frame is quantised once


def test_frames_to_float_and_back():
    frames = torch.arange(256, dtype=torch.uint8)
    x = d.frames_to_float(frames)
    assert x.min() == -1 and x.max() == 1 and torch.equal(d.float_to_frames(x), frames)
    grid = d.quantize(torch.linspace(-1, 1, 5000)).unique()
    assert torch.equal(grid, x)  # real and imagined frames lie on the same grid, bit for bit
    assert torch.equal(d.float_to_frames(grid), frames)


# ---- Sampler ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("extra", [{}, {"heun": True}, {"churn": 2.0}])
def test_sampler_returns_a_constant_prediction(steps, extra):
    torch.manual_seed(0)
    c = torch.randn(2, 3, 4, 4)
    x = d.euler_sampler(lambda x, s: c, 10 * torch.randn(2, 3, 4, 4), d.karras_sigmas(steps), **extra)
    assert torch.equal(x, c)


def test_sampler_with_one_step_is_one_prediction():
    x0, calls = torch.randn(2, 3, 4, 4), []

    def denoise(x, sigma):
        calls.append(sigma)
        return x.tanh()

    assert torch.equal(d.euler_sampler(denoise, x0, d.karras_sigmas(1)), x0.tanh()) and calls == [5.0]


def slow_sampler(denoise, x, sigmas, heun):
    for i in range(len(sigmas) - 1):
        slope = (x - denoise(x, sigmas[i])) / sigmas[i]
        step = sigmas[i + 1] - sigmas[i]
        ahead = x + slope * step
        if heun and sigmas[i + 1] > 0:
            other = (ahead - denoise(ahead, sigmas[i + 1])) / sigmas[i + 1]
            ahead = x + (slope + other) / 2 * step
        x = ahead
    return x


@pytest.mark.parametrize("heun", [False, True])
def test_sampler_against_the_formula(heun):
    torch.manual_seed(0)
    x0 = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    denoise = lambda x, s: x * 0.25 / (0.25 + s**2)  # noqa: E731 (exact for data of variance 0.25)
    sigmas = d.karras_sigmas(5).double()
    found = d.euler_sampler(denoise, x0, sigmas, heun)
    assert torch.allclose(found, slow_sampler(denoise, x0, sigmas, heun), atol=1e-9)
    sigmas = d.karras_sigmas(200, 0.002, 80.0).double()  # many steps: the exact flow, which scales x0 to the data
    found = d.euler_sampler(denoise, x0 * 80, sigmas, heun)
    assert torch.allclose(found, x0 * 80 * 0.5 / math.sqrt(80**2 + 0.25), rtol=1e-3 if heun else 5e-2)


def test_churn_adds_noise():
    torch.manual_seed(0)
    x0, sigmas, seen = torch.zeros(64, 3, 8, 8), d.karras_sigmas(3), []

    def denoise(x, sigma):
        seen.append((x, sigma))
        return torch.zeros_like(x)

    d.euler_sampler(denoise, x0, sigmas, churn=0.9)
    gamma = 0.3
    assert abs(float(seen[0][0].std()) - 5 * math.sqrt(1.3**2 - 1)) < 0.1
    assert [s for _, s in seen] == pytest.approx(sigmas[:3].tolist()) and gamma == 0.9 / 3


class Spy(nn.Module):
    """A denoiser that remembers what it was asked."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def denoise(self, x, sigma, past, actions):
        self.calls.append((x.clone(), sigma, past, actions))
        return torch.zeros_like(x)


def test_initial_noise():
    spy, past, actions = Spy(), torch.randn(50, 4, 3, 10, 10), torch.zeros(50, 4, dtype=torch.long)
    torch.manual_seed(0)
    d.imagine_frame(spy, past, actions, d.sampler_settings(TINY))
    assert abs(float(spy.calls[0][0].std()) - 1) < 0.1  # variance 1, although sigma is 5
    assert [c[1] for c in spy.calls] == pytest.approx([5, 0.283082, 0.002], rel=1e-5)
    assert all(c[2] is past and c[3] is actions for c in spy.calls)
    a, b = (d.imagine_frame(Echo(), past, actions, d.sampler_settings(TINY), torch.Generator().manual_seed(3))
            for _ in range(2))  # fmt: skip
    assert torch.equal(a, b)


class Echo(nn.Module):
    def denoise(self, x, sigma, past, actions):
        return x


# ---- Networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "actions, counts", [(18, (4_406_851, 5_902_656, 3_236_819)), (4, (4_405_955, 5_900_864, 3_229_637))]
)
def test_published_parameter_counts(actions, counts):
    with torch.device("meta"):
        model = d.Diamond((64, 64, 3), actions, vars(d.Args()))
    assert tuple(map(d.count_params, (model.denoiser, model.rew_end_model, model.actor_critic))) == counts
    if actions == 18:
        assert d.count_params(model) == 13_546_326
        net = model.denoiser.inner_model
        assert d.count_params(net.unet) == 4_263_552 and d.count_params(net.conv_in) == 8_704
        assert d.count_params(net.cond_proj) == 131_584 and d.count_params(net.act_emb) == 1_152
        assert d.count_params(net.unet.d_blocks) == 1_117_184 and d.count_params(net.unet.u_blocks) == 2_611_968
        assert d.count_params(net.unet.mid_blocks) == 312_832
        assert d.count_params(net.unet.downsamples) == d.count_params(net.unet.upsamples) == 110_784
        assert d.count_params(model.rew_end_model.encoder) == 388_160
        assert d.count_params(model.rew_end_model.lstm) == 5_246_976
        assert d.count_params(model.actor_critic.encoder) == 77_248
        assert d.count_params(model.actor_critic.lstm) == 3_149_824


def test_state_dict_has_the_official_names():
    with torch.device("meta"):
        found = {k: tuple(v.shape) for k, v in d.Diamond((64, 64, 3), 4, vars(d.Args())).state_dict().items()}
    unet, net = "denoiser.inner_model.unet.", "denoiser.inner_model."
    assert found[net + "noise_emb.weight"] == (1, 128) and found[net + "act_emb.0.weight"] == (4, 64)
    assert found[net + "cond_proj.2.weight"] == (256, 256) and found[net + "conv_in.weight"] == (64, 15, 3, 3)
    assert found[net + "norm_out.norm.weight"] == (64,) and found[net + "conv_out.weight"] == (3, 64, 3, 3)
    block = unet + "u_blocks.3.resblocks.2."
    assert found[block + "norm1.linear.weight"] == (256, 256) and found[block + "norm2.linear.weight"] == (128, 256)
    assert found[block + "proj.weight"] == (64, 128, 1, 1) and found[block + "conv1.weight"] == (64, 128, 3, 3)
    assert (
        unet + "d_blocks.0.resblocks.1.conv2.bias" in found and unet + "d_blocks.3.resblocks.0.proj.weight" not in found
    )
    attention = unet + "mid_blocks.resblocks.1.attn."
    assert found[attention + "qkv_proj.weight"] == (192, 64, 1, 1) and found[attention + "norm.norm.bias"] == (64,)
    assert found[attention + "out_proj.weight"] == (64, 64, 1, 1)
    assert found[unet + "downsamples.1.conv.weight"] == found[unet + "upsamples.3.conv.weight"] == (64, 64, 3, 3)
    assert not [k for k in found if "samples.0." in k]
    model = "rew_end_model."
    assert found[model + "encoder.conv_in.weight"] == (32, 6, 3, 3) and found[model + "act_emb.weight"] == (4, 128)
    assert found[model + "encoder.blocks.4.resblocks.1.attn.qkv_proj.weight"] == (96, 32, 1, 1)
    assert found[model + "encoder.downsamples.3.conv.weight"] == (32, 32, 3, 3)
    assert found[model + "lstm.weight_ih_l0"] == (2048, 2048) and found[model + "lstm.bias_hh_l0"] == (2048,)
    assert found[model + "head.0.weight"] == (512, 512) and found[model + "head.2.weight"] == (5, 512)
    assert model + "head.2.bias" not in found
    actor = "actor_critic."
    assert found[actor + "encoder.encoder.0.weight"] == (32, 3, 3, 3)
    assert found[actor + "encoder.encoder.5.f.2.weight"] == (64, 32, 3, 3)
    assert found[actor + "encoder.encoder.5.skip_projection.weight"] == (64, 32, 1, 1)
    assert found[actor + "encoder.encoder.5.f.0.norm.weight"] == (32,)
    assert found[actor + "lstm.weight_ih"] == (2048, 1024) and found[actor + "critic_linear.weight"] == (1, 512)
    assert found[actor + "actor_linear.bias"] == (4,)
    assert {k.split(".")[0] for k in found} == {"denoiser", "rew_end_model", "actor_critic"}


def test_group_norm():
    torch.manual_seed(0)
    for channels, groups in ((8, 1), (32, 1), (64, 2), (128, 4)):
        x, scale, shift = torch.randn(2, channels, 3, 5), torch.randn(2, channels), torch.randn(2, channels)
        plain = d.ada_group_norm(x, torch.zeros(2, channels), torch.zeros(2, channels))
        parts = plain.view(2, groups, -1)
        assert parts.mean(2).abs().max() < 1e-5 and (parts.var(2, unbiased=False) - 1).abs().max() < 1e-3
        expected = plain * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        assert torch.allclose(d.ada_group_norm(x, scale, shift), expected, atol=1e-5)
        norm = d.AdaNorm(channels, 6)
        cond = torch.randn(2, 6)
        scale, shift = norm.linear(cond).split(channels, 1)  # scale first
        assert torch.allclose(norm(x, cond), d.ada_group_norm(x, scale, shift), atol=1e-6)
        assert d.ChannelNorm(channels).norm.num_groups == groups and d.ChannelNorm(channels).norm.eps == 1e-5


def slow_attention(a, x):
    """Head by head, pixel by pixel."""
    B, C, h, w = x.shape
    x = a.norm(x)
    qkv = F.conv2d(x, a.qkv_proj.weight, a.qkv_proj.bias).flatten(2)  # (B, 3C, hw)
    out, heads = torch.zeros(B, C, h * w), C // 8
    for b in range(B):
        for n in range(heads):
            q, k, v = (qkv[b, part * C + 8 * n : part * C + 8 * (n + 1)] for part in range(3))  # (8, hw)
            for i in range(h * w):
                p = torch.softmax((q[:, i : i + 1] * k).sum(0) / math.sqrt(8), 0)
                out[b, 8 * n : 8 * (n + 1), i] = (p * v).sum(1)
    return x + F.conv2d(out.view(B, C, h, w), a.out_proj.weight, a.out_proj.bias)


@pytest.mark.parametrize("channels, side", [(16, 3), (32, 2), (8, 1)])
def test_attention(channels, side):
    torch.manual_seed(0)
    a, x = d.Attention2d(channels), torch.randn(2, channels, side, side + 1)
    assert torch.allclose(a(x), a.norm(x))  # untrained: the normalised input, not the input
    for p in a.parameters():
        nn.init.normal_(p)
    assert torch.allclose(a(x), slow_attention(a, x), atol=1e-3, rtol=1e-3)
    moved = x.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(a(moved), a(x), atol=1e-4)
    assert not torch.allclose(a(x), slow_attention(a, x) - a.norm(x) + x, atol=0.1)


def test_blocks_are_shortcuts_at_first():
    torch.manual_seed(0)
    x, cond = torch.randn(2, 8, 4, 4), torch.randn(2, 6)
    same, wider = d.AdaResBlock(8, 8, 6), d.AdaResBlock(8, 16, 6)
    assert torch.allclose(same(x, cond), x + same.conv2.bias.view(1, -1, 1, 1), atol=1e-6)
    assert torch.allclose(wider(x, cond), wider.proj(x) + wider.conv2.bias.view(1, -1, 1, 1), atol=1e-6)
    for p in wider.parameters():
        nn.init.normal_(p, std=0.3)
    y = wider.conv1(F.silu(wider.norm1(x, cond)))
    assert torch.allclose(wider(x, cond), wider.conv2(F.silu(wider.norm2(y, cond))) + wider.proj(x), atol=1e-5)
    assert isinstance(same.attn, nn.Identity) and isinstance(d.AdaResBlock(8, 8, 6, True).attn, d.Attention2d)
    small = d.SmallResBlock(8, 16)
    expected = small.skip_projection(x) + small.f[2](F.silu(small.f[0](x)))
    assert torch.allclose(small(x), expected, atol=1e-6)


def test_initialisation():
    torch.manual_seed(0)
    half = d.HalvingConv(8).conv
    w = half.weight.flatten(1)
    assert torch.allclose(w @ w.T, torch.eye(8), atol=1e-5) and half.stride == (2, 2)
    x = torch.randn(1, 8, 3, 3)
    double = d.DoublingConv(8)
    big = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(double(x), double.conv(big), atol=1e-6)
    model = d.Diamond((10, 10, 3), 3, vars(TINY))
    for lstm in (model.rew_end_model.lstm, model.actor_critic.lstm):
        p = dict(lstm.named_parameters())
        ih, hh = (next(v for k, v in p.items() if k.startswith(n)) for n in ("bias_ih", "bias_hh"))
        units = lstm.hidden_size
        assert (hh == 0).all() and (ih[units : 2 * units] == 1).all() and ih.sum() == units
        weight = next(v for k, v in p.items() if k.startswith("weight_hh"))
        assert torch.allclose(weight.T @ weight, torch.eye(units), atol=1e-4)
        weight = next(v for k, v in p.items() if k.startswith("weight_ih"))
        bound = math.sqrt(6 / sum(weight.shape))
        assert weight.abs().max() <= bound and weight.abs().max() > 0.9 * bound
    frames = torch.randn(2, 3, 10, 10)
    logits, value, _, _ = model.actor_critic(frames, torch.randn(2, 8), torch.randn(2, 8))
    assert (logits == 0).all() and (value == 0).all()
    net = model.denoiser
    output, c_skip, c_out = net(
        frames, torch.tensor([0.5, 2.0]), torch.randn(2, 4, 3, 10, 10), torch.zeros(2, 4).long()
    )
    assert torch.allclose(output, net.inner_model.conv_out.bias.view(1, -1, 1, 1).expand(2, 3, 10, 10), atol=1e-6)
    assert c_skip.shape == c_out.shape == (2, 1, 1, 1)


def test_fourier_features():
    f = d.FourierFeatures(8)
    assert "weight" in dict(f.named_buffers()) and not list(f.parameters())
    c = torch.tensor([0.3, -0.1])
    angle = 2 * math.pi * c[:, None] * f.weight
    assert torch.allclose(f(c), torch.cat([angle.cos(), angle.sin()], 1))


def slow_unet(u, x, cond, level=0):
    """By recursion: a level works on its input, asks the level below, and works on the answer."""
    x = u.downsamples[level](x)
    skips = [x]
    for block in u.d_blocks[level].resblocks:
        x = block(x, cond)
        skips.append(x)
    if level + 1 < len(u.d_blocks):
        x = slow_unet(u, x, cond, level + 1)
        x = u.upsamples[len(u.d_blocks) - 1 - level](x)
    else:
        for block in u.mid_blocks.resblocks:
            x = block(x, cond)
    for block in u.u_blocks[len(u.d_blocks) - 1 - level].resblocks:
        x = block(torch.cat([x, skips.pop()], 1), cond)
    assert not skips
    return x


@pytest.mark.parametrize("channels, depths, size", [([8, 16, 8], [1, 2, 2], (8, 12)), ([8, 8], [2, 1], (7, 10))])
def test_unet(channels, depths, size):
    torch.manual_seed(0)
    u = d.CondUNet(channels, depths, 6)
    for p in u.parameters():
        nn.init.normal_(p, std=0.2)
    x, cond = torch.randn(2, channels[0], *size), torch.randn(2, 6)
    unit = 2 ** (len(channels) - 1)
    padded = F.pad(x, (0, -size[1] % unit, 0, -size[0] % unit))
    expected = slow_unet(u, padded, cond)[..., : size[0], : size[1]]
    assert torch.allclose(u(x, cond), expected, atol=1e-4, rtol=1e-4) and u(x, cond).shape == x.shape


def test_denoiser_network():
    model = tiny()
    net, x = model.denoiser.inner_model, torch.randn(2, 3, 10, 10)
    past, actions = torch.randn(2, 4, 3, 10, 10), torch.tensor([[0, 1, 2, 0], [2, 2, 1, 1]])
    sigma = torch.tensor([0.5, 3.0])
    c_in, c_out, c_skip, c_noise = d.edm_preconditioning(sigma)
    emb = net.noise_emb(c_noise) + torch.cat([net.act_emb[0](actions[:, k]) for k in range(4)], 1)
    frames = torch.cat([past[:, k] / 0.5 for k in range(4)] + [c_in.view(-1, 1, 1, 1) * x], 1)
    y = slow_unet(net.unet, net.conv_in(frames), net.cond_proj(emb))
    y = net.conv_out(F.silu(net.norm_out(y)))
    output, skip, out = model.denoiser(x, sigma, past, actions)
    assert torch.allclose(output, y, atol=1e-4, rtol=1e-4)
    own = model.denoiser.denoise(x[:1], 0.5, past[:1], actions[:1])
    expected = d.quantize(skip[:1] * x[:1] + out[:1] * output[:1])
    assert (own - expected).abs().max() < 0.009 and torch.equal(own, d.frames_to_float(d.float_to_frames(own)))
    both = model.denoiser(x, torch.tensor([0.5]), past, actions)[0]  # one level for the whole batch
    assert torch.allclose(both[0], output[0], atol=1e-4)


def test_bfloat16_is_for_convolutions_only():
    """Noise features, conditions, LSTM states, logits and frames stay float32; frames stay on the 8-bit grid."""
    model, found = tiny(), {}
    net, frames = model.denoiser.inner_model, torch.rand(2, 4, 3, 10, 10) * 2 - 1
    net.cond_proj.register_forward_hook(lambda m, i, o: found.update(cond=(i[0], o)))
    net.conv_in.register_forward_hook(lambda m, i, o: found.update(conv=(o,)))
    actions, c_noise = torch.zeros(2, 4, dtype=torch.long), torch.tensor([0.31, -0.2])
    with torch.autocast("cpu", torch.bfloat16):
        net(frames[:, 0], c_noise, frames.flatten(1, 2), actions)
        frame = d.imagine_frame(model.denoiser, frames, actions, d.sampler_settings(TINY))
        rewards, ends, state = model.rew_end_model(frames[:, :1], actions[:, :1], frame.unsqueeze(1))
        logits, value, h, c = model.actor_critic(frame, torch.zeros(2, 8), torch.zeros(2, 8))
    assert found["conv"][0].dtype == torch.bfloat16
    assert {v.dtype for v in (*found["cond"], frame, rewards, ends, *state, logits, value, h, c)} == {torch.float32}
    assert torch.equal(frame, d.frames_to_float(d.float_to_frames(frame)))
    with torch.autocast("cpu", torch.bfloat16):
        angle = 2 * math.pi * c_noise[:, None] * net.noise_emb.weight
        assert torch.allclose(net.noise_emb(c_noise), torch.cat([angle.cos(), angle.sin()], 1), atol=1e-6)


def test_every_action_and_frame_of_the_context_matters():
    model = tiny()
    x, past, actions = torch.randn(1, 3, 10, 10), torch.randn(1, 4, 3, 10, 10), torch.zeros(1, 4, dtype=torch.long)
    base = model.denoiser(x, torch.ones(1), past, actions)[0]
    for k in range(4):
        other = actions.clone()
        other[0, k] = 2
        assert not torch.allclose(model.denoiser(x, torch.ones(1), past, other)[0], base, atol=1e-4)
        frames = past.clone()
        frames[0, k] += 0.5
        assert not torch.allclose(model.denoiser(x, torch.ones(1), frames, actions)[0], base, atol=1e-4)


def test_reward_end_model():
    model = tiny().rew_end_model
    frames, after = torch.randn(2, 5, 3, 10, 10), torch.randn(2, 5, 3, 10, 10)
    actions = torch.randint(3, (2, 5))
    rewards, ends, _ = model(frames, actions, after)
    assert rewards.shape == (2, 5, 3) and ends.shape == (2, 5, 2)
    state, encoder = None, model.encoder
    for t in range(5):  # step by step, pair by pair
        x, cond = encoder.conv_in(torch.cat([frames[:, t], after[:, t]], 1)), model.act_emb(actions[:, t])
        for k, blocks in enumerate(encoder.blocks):
            x = encoder.downsamples[k](x)
            for block in blocks.resblocks:
                x = block(x, cond)
        y, state = model.lstm(x.reshape(2, 1, -1), state)
        logits = model.head(y)[:, 0]
        assert torch.allclose(logits[:, :3], rewards[:, t], atol=1e-4) and torch.allclose(
            logits[:, 3:], ends[:, t], atol=1e-4
        )
    first = model(frames[:, :2], actions[:, :2], after[:, :2])
    rest = model(frames[:, 2:], actions[:, 2:], after[:, 2:], first[2])
    assert torch.allclose(torch.cat([first[0], rest[0]], 1), rewards, atol=1e-5)


def test_actor_critic_is_an_lstm():
    model = tiny().actor_critic
    x, h, c = torch.randn(3, 3, 10, 10), torch.randn(3, 8), torch.randn(3, 8)
    features = model.encoder(x).flatten(1)
    y, memory = model.lstm(features, (h, c))
    logits, value, h2, c2 = model(x, h, c)
    assert torch.allclose(h2, y, atol=1e-5) and torch.allclose(c2, memory, atol=1e-5)
    assert torch.allclose(logits, model.actor_linear(y), atol=1e-5)
    assert value.shape == (3,) and torch.allclose(value, model.critic_linear(y)[:, 0], atol=1e-5)


def test_unroll_is_step_by_step_with_resets():
    torch.manual_seed(0)
    model = tiny().actor_critic
    frames, reset = torch.randn(6, 3, 3, 10, 10), torch.rand(6, 3) < 0.4
    hr, cr = torch.randn(6, 3, 8), torch.randn(6, 3, 8)
    h, c = torch.randn(3, 8), torch.randn(3, 8)
    logits, values = model.unroll(frames, h, c, reset, hr, cr)
    assert reset[1:].any() and not reset.all()
    for t in range(6):
        for n in range(3):
            if reset[t, n]:
                h, c = h.clone(), c.clone()
                h[n], c[n] = hr[t, n], cr[t, n]
        a, v, h, c = model(frames[t], h, c)
        assert torch.allclose(a, logits[t], atol=1e-5) and torch.allclose(v, values[t], atol=1e-5)


# ---- Losses ----------------------------------------------------------------------------------------------------------


def a_batch(B=3, S=6, side=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    frames = torch.randint(256, (B, S, side, side, 3), generator=g, dtype=torch.uint8)
    batch = dict(frames=frames, actions=torch.randint(3, (B, S), generator=g))
    batch["rewards"] = torch.randint(-3, 4, (B, S), generator=g).float()
    batch["ends"] = torch.rand(B, S, generator=g) < 0.3
    batch["mask"] = torch.ones(B, S, dtype=torch.bool)
    batch["transition"] = torch.rand(B, S - 1, generator=g) < 0.7
    return batch


def test_segment_frames():
    batch = a_batch()
    batch["mask"][0, :3] = False
    x = d.segment_frames(batch)
    assert x.shape == (3, 6, 3, 10, 10) and (x[0, :3] == 0).all()  # padding is mid-grey
    assert torch.equal(x[1, 2, 0], batch["frames"][1, 2, :, :, 0].float() / 255 * 2 - 1)


@pytest.mark.parametrize("more", [0, 1, 2])
def test_denoiser_loss(monkeypatch, more):
    """Term by term and sample by sample, with the noise of the loss itself."""
    model, args, noises = tiny(), replace(TINY, autoregressive_steps=more), []
    real = d.add_noise

    def add_noise(x, sigma, offset):
        noises.append((sigma, real(x, sigma, offset) - x))
        return x + noises[-1][1]

    monkeypatch.setattr(d, "add_noise", add_noise)
    batch = a_batch(S=5 + more)
    batch["mask"][0, :4] = False
    if more:
        batch["mask"][1, :5] = False  # its first target is padding
    losses, _ = d.denoiser_loss(model, batch, args)
    assert list(losses) == ["denoiser"] and len(noises) == 1 + more
    frames, total = d.segment_frames(batch).clone(), 0.0
    for i, (sigma, noise) in enumerate(noises):
        assert len(sigma.unique()) == 3  # a level per sample and per term
        c_in, c_out, c_skip, c_noise = (c.view(-1, 1, 1, 1) for c in d.edm_preconditioning(sigma))
        target = frames[:, 4 + i].clone()
        noisy, past = target + noise, frames[:, i : 4 + i] / 0.5
        output = model.denoiser.inner_model(
            c_in * noisy, c_noise.flatten(), past.flatten(1, 2), batch["actions"][:, i : 4 + i]
        )
        error = (output - (target - c_skip * noisy) / c_out).square().mean((1, 2, 3))
        valid = batch["mask"][:, 4 + i]
        total = total + error[valid].mean() / (1 + more)
        frames[:, 4 + i] = d.quantize(c_skip * noisy + c_out * output).detach()
    assert torch.allclose(losses["denoiser"], total, rtol=1e-3)


def test_no_gradient_through_the_models_own_frame():
    """The gradient of two terms is the mean of the gradients of each, its context held fixed."""
    model, args, batch = tiny(), replace(TINY, autoregressive_steps=1), a_batch(S=6)
    weight = model.denoiser.inner_model.conv_in.weight
    seen, real = [], type(model.denoiser).forward

    def forward(self, *inputs):
        seen.append([x.detach() for x in inputs])
        return real(self, *inputs)

    model.denoiser.forward = forward.__get__(model.denoiser)
    torch.manual_seed(1)
    (g,) = torch.autograd.grad(d.denoiser_loss(model, batch, args)[0]["denoiser"], weight)
    assert not torch.equal(seen[1][2][:, -1], d.segment_frames(batch)[:, 4])  # the second term sees the model's frame
    own = seen[1][2][:, -1]
    assert torch.equal(own, d.frames_to_float(d.float_to_frames(own)))  # on the 8-bit grid
    assert torch.equal(seen[1][2][:, :3], d.segment_frames(batch)[:, 1:4])
    assert torch.equal(seen[1][3], batch["actions"][:, 1:5])
    alone = 0
    for k, (noisy, sigma, past, actions) in enumerate(seen[:2]):
        output, c_skip, c_out = real(model.denoiser, noisy, sigma, past, actions)
        target = d.segment_frames(batch)[:, 4 + k]
        alone = alone + ((output - (target - c_skip * noisy) / c_out) ** 2).mean() / 2
    (expected,) = torch.autograd.grad(alone, weight)
    assert torch.allclose(g, expected, rtol=1e-3, atol=1e-6)


def test_denoiser_loss_of_nothing_is_finite():
    batch = a_batch()
    batch["mask"][:] = False
    assert float(d.denoiser_loss(tiny(), batch, TINY)[0]["denoiser"].detach()) == 0.0


def test_rew_end_loss():
    model, batch = tiny(), a_batch()
    losses, metrics = d.rew_end_loss(model, batch)
    x = d.segment_frames(batch)
    rewards, ends, _ = model.rew_end_model(x[:, :-1], batch["actions"][:, :-1], x[:, 1:])
    reward, end, right, claimed, there = [], [], 0, 0, 0
    for b in range(3):
        for t in range(5):
            if batch["transition"][b, t]:
                label, over = int(batch["rewards"][b, t].sign()) + 1, int(batch["ends"][b, t])
                reward.append(-torch.log_softmax(rewards[b, t], 0)[label])
                end.append(-torch.log_softmax(ends[b, t], 0)[over])
                found = int(ends[b, t].argmax())
                right, claimed, there = right + (found and over), claimed + found, there + over
    assert torch.allclose(losses["reward"], torch.stack(reward).mean(), rtol=1e-4)
    assert torch.allclose(losses["end"], torch.stack(end).mean(), rtol=1e-4)
    assert float(metrics["end_recall"]) == pytest.approx(right / max(1, there))
    assert float(metrics["end_precision"]) == pytest.approx(right / max(1, claimed))


def test_hits():
    found, truth = torch.tensor([1, 2, 0, 1, 2, 0]), torch.tensor([1, 2, 2, 2, 0, 0])
    mask = torch.tensor([True, True, True, True, True, False])
    out = d.hits("x", found, truth, 1, mask)  # rewards: claimed 2, 0, 2; there 2, 2, 2, 0; right: one
    assert float(out["x_precision"]) == pytest.approx(1 / 3) and float(out["x_recall"]) == pytest.approx(1 / 4)


def slow_returns(rew, end, trunc, boot, gamma, lam):
    out = torch.zeros_like(boot)
    for b in range(rew.shape[0]):
        after = boot[b, -1]
        for t in reversed(range(rew.shape[1])):
            r = float(rew[b, t].sign())
            if end[b, t]:
                g = r
            elif trunc[b, t]:
                g = r + gamma * boot[b, t]
            else:
                g = r + gamma * ((1 - lam) * boot[b, t] + lam * after)
            out[b, t] = after = g
    return out


def test_lambda_returns():
    torch.manual_seed(0)
    rew = torch.tensor([5.0, -0.3, 0.0])[torch.randint(3, (8, 20))]
    end, trunc, boot = torch.rand(8, 20) < 0.2, torch.rand(8, 20) < 0.2, torch.randn(8, 20)
    for gamma, lam in ((0.985, 0.95), (0.9, 0.0), (1.0, 1.0)):
        found = d.lambda_returns(rew, end, trunc, boot, gamma, lam)
        assert torch.allclose(found, slow_returns(rew, end, trunc, boot, gamma, lam), atol=1e-5)
    no, yes = torch.zeros(1, 4), torch.ones(1, 4)
    three = torch.tensor([[5.0, -0.3, 0.0, 2.0]])
    assert d.lambda_returns(three, yes, no, yes * 9, 0.9, 0.5).tolist() == [[1.0, -1.0, 0.0, 1.0]]
    found = d.lambda_returns(no, no, no, yes * 2, 0.9, 0.5)
    assert float(found[0, -1]) == pytest.approx(1.8)
    assert float(found[0, -2]) == pytest.approx(0.9 * 0.5 * 2 + 0.81 * 0.5 * 2)
    once = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    for lam in (0.0, 0.7, 1.0):  # a truncation bootstraps fully, whatever lambda is
        assert float(d.lambda_returns(three, no, once, yes * 2, 0.9, lam)[0, 1]) == pytest.approx(-1 + 1.8)


def test_actor_critic_loss():
    torch.manual_seed(0)
    logits, act, val = (
        torch.randn(2, 5, 3, requires_grad=True),
        torch.randint(3, (2, 5)),
        torch.randn(2, 5, requires_grad=True),
    )
    returns = torch.randn(2, 5)
    losses, entropy = d.reinforce_loss(logits, act, val, returns, 0.01, 2.0)
    p = torch.softmax(logits, -1)
    policy = -sum(p[b, t, act[b, t]].log() * (returns - val.detach())[b, t] for b in range(2) for t in range(5)) / 10
    assert torch.allclose(losses["policy"], policy, atol=1e-5)
    assert torch.allclose(losses["value"], 2 * ((val - returns) ** 2).mean())
    assert torch.allclose(entropy, -(p * p.log()).sum(-1).mean())
    assert torch.allclose(losses["entropy_bonus"], -0.01 * entropy)
    (g,) = torch.autograd.grad(losses["policy"], val, retain_graph=True, allow_unused=True)
    assert g is None  # the baseline is a constant of the policy's loss
    losses, entropy = d.reinforce_loss(logits, act, val, val.detach(), 0.0)
    sum(losses.values()).backward()
    assert logits.grad.abs().max() < 1e-7  # no advantage, no gradient
    _, entropy = d.reinforce_loss(torch.zeros(1, 2, 6), torch.zeros(1, 2).long(), torch.zeros(1, 2), torch.zeros(1, 2))
    assert float(entropy) == pytest.approx(math.log(6))


def test_warmup():
    assert [d.warmup_factor(n) for n in (0, 50, 100, 1000)] == [0.0, 0.5, 1.0, 1.0]
    assert float(d.warmup_factor(torch.tensor(25.0))) == 0.25 and d.warmup_factor(0, 0) == d.warmup_factor(3, 0) == 1.0
    assert float(d.warmup_factor(torch.tensor(0.0), 0)) == 1.0


def test_masked_average():
    x, mask = torch.tensor([[1.0, 3.0], [10.0, 20.0], [5.0, 5.0]]), torch.tensor([True, False, True])
    assert float(d.masked_average(x, mask)) == 3.5 and float(d.masked_average(x, ~mask & False)) == 0.0


def test_draw_class():
    torch.manual_seed(0)
    p = torch.tensor([[0.5, 0.2, 0.3], [0.0, 1.0, 0.0]])
    draws = d.draw_class(p.log().expand(20_000, 2, 3))
    share = torch.stack([(draws[:, 0] == k).float().mean() for k in range(3)])
    assert torch.allclose(share, p[0], atol=0.02) and (draws[:, 1] == 1).all() and draws.dtype == torch.int64


# ---- Optimizer and learner -------------------------------------------------------------------------------------------


def test_decay_only_of_weights():
    model = tiny()
    opt = d.WarmAdamW(model, 1e-3, 0.1, 1.0, 0, CPU)
    groups = {g["weight_decay"]: {id(p) for p in g["params"]} for g in opt.opt.param_groups}
    for name, p in model.named_parameters():
        plain = name.endswith("weight") and "norm.weight" not in name and "act_emb" not in name
        plain = plain or "lstm.weight" in name
        assert (id(p) in groups[0.1]) == plain, name
    assert sum(map(len, groups.values())) == len(list(model.parameters()))


@pytest.mark.parametrize("warmup", [0, 4])
def test_optimizer_steps(warmup):
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    mine, theirs = copy.deepcopy(layer), copy.deepcopy(layer)
    opt = d.WarmAdamW(mine, 0.01, 0.1, 0.5, warmup, CPU)
    other = torch.optim.AdamW(
        [dict(params=[theirs.weight], weight_decay=0.1), dict(params=[theirs.bias], weight_decay=0)]
    )
    no = torch.tensor(False)
    for k in range(6):
        x = torch.randn(5, 3)
        before = [p.clone() for p in mine.parameters()]
        norm = opt.step((mine(x) * 10).square().mean(), no)
        for g in other.param_groups:
            g["lr"] = 0.01 * (min(1, k / warmup) if warmup else 1)
        other.zero_grad()
        (theirs(x) * 10).square().mean().backward()
        assert torch.allclose(norm, nn.utils.clip_grad_norm_(theirs.parameters(), 0.5))
        other.step()
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mine.parameters(), theirs.parameters()))
        if warmup and k == 0:
            assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), before))  # the first rate is 0
    again = d.WarmAdamW(mine, 0.01, 0.1, 0.5, warmup, CPU)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert float(again.count) == 6 and all(g["lr"] is again.rate for g in again.opt.param_groups)
    kept = [p.clone() for p in mine.parameters()]
    again.step(mine(torch.randn(2, 3)).sum() * float("nan"), no)
    assert no and all(torch.equal(a, b) for a, b in zip(mine.parameters(), kept))


def a_replay(episodes=30, seed=0, args=TINY, side=10):
    rng = np.random.default_rng(seed)
    replay, env = d.FrameReplay(5000, 1, (side, side, 3), seed=seed), np.array([0])
    for _ in range(episodes):
        frames = rng.integers(256, size=(rng.integers(3, 15), side, side, 3), dtype=np.uint8)
        replay.begin(env, frames[:1])
        for t in range(len(frames) - 1):
            end = t == len(frames) - 2
            replay.add(env, [rng.integers(3)], [rng.integers(-1, 2)], [end], frames[t + 1 : t + 2])
        replay.close(env)
    return replay


def test_learner_updates_one_network_at_a_time():
    torch.manual_seed(0)
    model, replay = tiny(), a_replay()
    learner = d.Learner(model, TINY, CPU)
    learner.begin(replay.batch("begin", TINY))
    for kind, part in (("denoiser", "denoiser"), ("rew_end", "rew_end_model"), ("actor", "actor_critic")):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        metrics = learner.update(kind, replay.batch(kind, TINY))
        changed = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
        assert changed == {part} and f"grad_norm_{kind}" in metrics
        assert all(torch.isfinite(v).all() and not v.requires_grad for v in metrics.values())
    assert torch.equal(model.denoiser.inner_model.noise_emb.weight, before["denoiser.inner_model.noise_emb.weight"])
    learner.check(metrics, "")


def test_bad_numbers_are_named_and_make_no_step():
    model, replay = tiny(), a_replay()
    learner = d.Learner(model, TINY, CPU)
    model.rew_end_model.head[2].weight.data[4, 0] = math.nan  # ends only
    before = [p.clone() for p in model.rew_end_model.parameters()]
    metrics = learner.update("rew_end", replay.batch("rew_end", TINY))
    assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(model.rew_end_model.parameters(), before))
    with pytest.raises(SystemExit, match="at here: end, .*gradient norm"):
        learner.check(metrics, "here")


# ---- Imagination -----------------------------------------------------------------------------------------------------


def fixed(monkeypatch, seed=0):
    """Random numbers of imagination as lists that a slow reference can repeat."""
    g = torch.Generator().manual_seed(seed)
    noise = iter([torch.randn(4, 3, 10, 10, generator=g) for _ in range(100)])
    uniform = [torch.rand(4, generator=g) for _ in range(100)]
    monkeypatch.setattr(d, "imagine_frame", lambda net, past, actions, s, n=None: a_frame(past, actions, next(noise)))
    left = iter(uniform)
    monkeypatch.setattr(d, "draw_class", lambda logits, n=None: pick_class(logits, next(left)))


def a_frame(past, actions, noise):
    """A made-up world: the next frame depends on the whole context."""
    return torch.tanh(past.mean(1) + actions.float().mean(1).view(-1, 1, 1, 1) + 0.1 * noise)


def pick_class(logits, u):
    cdf = torch.softmax(logits, -1).cumsum(-1)
    return (cdf[..., :-1] <= u.view(-1, *[1] * (logits.dim() - 1))).sum(-1)


def slow_imagine(model, state, batch, args):
    """One environment after the other, with branches, as the authors' loops are written."""
    frames, actions, lengths = list(state["frames"]), [a.tolist() for a in state["actions"]], state["lengths"].tolist()
    wm = [(state["wm_h"][n : n + 1, None], state["wm_c"][n : n + 1, None]) for n in range(len(frames))]
    memory = [(state["h"][n : n + 1], state["c"][n : n + 1]) for n in range(len(frames))]
    starts, used, rows = d.segment_frames(batch), 0, []
    for _ in range(args.imag_horizon):
        seen = [f[-1].clone() for f in frames]
        before = [m for m in memory]
        outs = [model.actor_critic(seen[n][None], *memory[n]) for n in range(len(frames))]
        memory = [o[2:] for o in outs]
        act = d.draw_class(torch.cat([o[0] for o in outs]))
        for n, a in enumerate(act.tolist()):
            actions[n][-1] = a
        drawn = d.imagine_frame(None, torch.stack(frames), torch.tensor(actions), None)
        judged = [
            model.rew_end_model(frames[n][None, -1:], act[n : n + 1, None], drawn[n][None, None], wm[n])
            for n in range(len(frames))
        ]
        wm = [j[2] for j in judged]
        reward = d.draw_class(torch.cat([j[0][:, 0] for j in judged])) - 1
        end = d.draw_class(torch.cat([j[1][:, 0] for j in judged])).bool()
        values, trunc = [], []
        for n in range(len(frames)):
            values.append(model.actor_critic(drawn[n][None], *memory[n])[1][0])
            lengths[n] += 1
            trunc.append(lengths[n] >= args.imag_horizon)
            frames[n] = torch.cat([frames[n][1:], drawn[n][None]])
            actions[n] = actions[n][1:] + actions[n][:1]
            if end[n] or trunc[n]:
                k = used % len(batch["actions"])
                used, lengths[n] = used + 1, 0
                frames[n], actions[n] = starts[k], batch["actions"][k].tolist()
                *_, wm[n] = model.rew_end_model(
                    starts[k][None, :-1], batch["actions"][k][None, :-1], starts[k][None, 1:]
                )
                memory[n] = torch.zeros(1, 8), torch.zeros(1, 8)
                for frame in starts[k][:-1]:
                    memory[n] = model.actor_critic(frame[None], *memory[n])[2:]
        rows.append(dict(frame=torch.stack(seen), action=act, reward=reward.float(), end=end, trunc=torch.tensor(trunc),
                         bootstrap=torch.stack(values), h=torch.cat([b[0] for b in before])))  # fmt: skip
    return {k: torch.stack([r[k] for r in rows]) for k in rows[0]}, frames, actions, lengths, memory, wm, used


def dream_state(model, replay, args):
    learner = d.Learner(model, args, CPU)
    learner.begin(replay.batch("begin", args))
    return learner


@pytest.mark.parametrize("pool", [40, 3])
@torch.no_grad()
def test_imagination_against_the_loop_with_branches(monkeypatch, pool):
    """Rollouts, restarts from segments in order (again from the first when they are used up), what lives on."""
    args, model, replay = replace(TINY, start_pool=pool), tiny(3), a_replay()
    model.rew_end_model.head[2].weight.data[4] += 0.2
    learner = dream_state(model, replay, args)
    assert (learner.dream["h"] == 0).all() and (learner.dream["wm_h"] != 0).any()  # the very first start
    total = 0
    for round in range(3):  # the environments live on from update to update
        batch = replay.batch("actor", args)
        assert batch["actions"].shape == (pool, 4)
        fixed(monkeypatch, round)
        expected, frames, actions, lengths, memory, wm, used = slow_imagine(model, learner.dream, batch, args)
        fixed(monkeypatch, round)
        rollout, state = d.imagine_rollout(model, learner.dream, batch, args)
        for k, v in expected.items():
            assert torch.allclose(rollout[k].float(), v.float(), atol=2e-4), k
        dead = expected["end"] | expected["trunc"]
        assert torch.equal(rollout["reset"][1:], dead[:-1]) and not rollout["reset"][0].any()
        alive = ~dead[-1]
        assert torch.allclose(state["frames"], torch.stack(frames), atol=2e-4)
        assert state["lengths"].tolist() == lengths
        assert torch.equal(state["actions"][:, :-1], torch.tensor(actions)[:, :-1])
        assert torch.allclose(state["h"], torch.cat([m[0] for m in memory]), atol=2e-4)
        assert torch.allclose(state["wm_c"], torch.cat([w[1][0] for w in wm]), atol=2e-4)
        learner.dream, total = state, total + used
        assert alive.any() or round >= 0
    assert total > 12 + 3  # ends, not only truncations


@torch.no_grad()
def test_imagined_episodes_are_truncated_at_the_horizon(monkeypatch):
    args, model, replay = TINY, tiny(3), a_replay()
    model.rew_end_model.head[2].weight.data[3:] = 0  # ends are fair coins...
    model.rew_end_model.head[0].bias.data += 5
    model.rew_end_model.head[2].weight.data[4] = -5  # ...no: they never come
    learner = dream_state(model, replay, args)
    for _ in range(2):
        rollout, learner.dream = d.imagine_rollout(model, learner.dream, replay.batch("actor", args), args)
        assert not rollout["end"].any() and rollout["trunc"].tolist() == [[False] * 4] * 4 + [[True] * 4]
        assert (learner.dream["lengths"] == 0).all()


def test_rollout_loss_is_the_rollouts_gradient():
    """Recomputed in one pass: logits, values, returns as step by step, and a gradient for the policy alone."""
    torch.manual_seed(0)
    model, replay, args = tiny(3), a_replay(), TINY
    learner = dream_state(model, replay, args)
    rollout, _ = d.imagine_rollout(model, learner.dream, replay.batch("actor", args), args)
    losses, metrics = d.rollout_loss(model, rollout, args)
    h, c, logits, values = rollout["h"][0], rollout["c"][0], [], []
    for t in range(5):
        again = rollout["reset"][t][:, None]
        h, c = torch.where(again, rollout["h"][t], h), torch.where(again, rollout["c"][t], c)
        a, v, h, c = model.actor_critic(rollout["frame"][t], h, c)
        logits.append(a)
        values.append(v)
    logits, values = torch.stack(logits, 1), torch.stack(values, 1)
    boot = rollout["bootstrap"].T
    going = ~(rollout["end"] | rollout["trunc"]).T[:, :-1]
    assert torch.allclose(boot[:, :-1][going], values[:, 1:][going], atol=1e-5)  # V of the next frame of the rollout
    returns = slow_returns(
        rollout["reward"].T, rollout["end"].T, rollout["trunc"].T, boot, args.gamma, args.return_lambda
    )
    expected, entropy = d.reinforce_loss(logits, rollout["action"].T, values, returns, args.ent_coef, args.vf_coef)
    for k in expected:
        assert torch.allclose(losses[k], expected[k], atol=1e-5), k
    mine = torch.autograd.grad(sum(losses.values()), model.actor_critic.parameters())
    theirs = torch.autograd.grad(sum(expected.values()), model.actor_critic.parameters())
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(mine, theirs))
    assert all(p.grad is None for p in model.parameters())


def test_dream_lives_on_and_in_checkpoints():
    torch.manual_seed(0)
    model, replay, args = tiny(3), a_replay(), replace(TINY, imag_horizon=3)
    learner = dream_state(model, replay, args)
    learner.update("actor", replay.batch("actor", args))
    kept = {k: v.clone() for k, v in learner.dream.items()}
    other = d.Learner(tiny(4), args, CPU)
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    batch = replay.batch("actor", args)
    for one in (learner, other):
        torch.manual_seed(5)
        one.update("actor", batch)
    assert all(torch.equal(learner.dream[k], other.dream[k]) for k in kept)
    assert any(not torch.equal(learner.dream[k], kept[k]) for k in kept)
    same = zip(learner.model.state_dict().values(), other.model.state_dict().values())
    assert all(torch.equal(a, b) for a, b in same)


# ---- Replay ----------------------------------------------------------------------------------------------------------


def test_episode_probabilities():
    assert np.allclose(d.episode_probabilities(10), [0.05] * 6 + [0.175] * 4)
    assert np.allclose(d.episode_probabilities(4), [0.1, 0.1, 0.1, 0.7])
    assert np.allclose(d.episode_probabilities(3, lengths=[1, 2, 5]), [0.125, 0.25, 0.625])
    assert np.allclose(d.episode_probabilities(8, (1, 1, 1, 1)), [0.125] * 8)
    for n in (1, 4, 7, 99):
        assert d.episode_probabilities(n, lengths=[1] * n).sum() == pytest.approx(1)


@pytest.mark.parametrize("right", [False, True])
def test_sample_segments(right):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 12, size=20_000)
    rows, mask = d.segment_rows(rng, lengths, 6, right)
    assert rows.shape == (20_000, 6) and (np.diff(rows, axis=1) == 1).all()
    assert (mask == ((rows >= 0) & (rows < lengths[:, None]))).all() and mask.any(1).all()
    if right:
        assert rows[:, 0].min() == -5 and (rows[:, -1] >= lengths).any()
        where = np.bincount(rows[lengths == 11][:, 2] + 5, minlength=21)
        assert where[7:13].min() > 0.7 * where[7:13].max()  # the same number of segments around every row
    else:
        assert mask[:, -1].all() and rows[:, 0].min() == -5  # the last row always exists, at most 5 do not
        full = lengths == 11
        last = np.bincount(rows[full][:, -1], minlength=11)
        # stop = min(length, row + 1 + shift): rows near the end are last more often, as in the authors' code.
        expected = np.array([min(k + 1, 6) for k in range(10)] + [21]) / 66
        assert np.allclose(last / last.sum(), expected, atol=0.03)


def coded(env, episode, t, side=4):
    return np.full((side, side, 3), (40 * env + 7 * episode + t) % 256, np.uint8) + np.arange(3, dtype=np.uint8)


def fill(replay, plan):
    """plan: [(environment, episode, T, over)]: frames, actions and rewards that tell where they come from."""
    for env, episode, T, over in plan:
        e = np.array([env])
        replay.begin(e, coded(env, episode, 0)[None])
        for t in range(T):
            replay.add(
                e,
                [10 * episode + t],
                [100 * env + 10 * episode + t],
                [bool(over) and t == T - 1],
                coded(env, episode, t + 1)[None],
            )
        if over is not None:
            replay.close(e)


def test_segments_are_what_was_stored():
    """Row t: frame t, the action after it, the reward and end it led to; the true last frame; padding around."""
    replay = d.FrameReplay(100, 2, (4, 4, 3))
    fill(replay, [(0, 0, 5, True), (1, 1, 3, False), (0, 2, 2, True), (1, 3, 6, None)])  # the last one goes on
    found = set()
    batch = replay.segments(3000, 7, np.random.default_rng(0), right_padding=True)
    start = {
        (int(f), n): (e, k)
        for e, k, n in ((0, 0, 5), (1, 1, 3), (0, 2, 2), (1, 3, 6))
        for f in [coded(e, k, 0)[0, 0, 0]]
    }
    lengths = {k: (e, n) for (_, n), (e, k) in start.items()}
    for b in range(3000):
        rows = np.flatnonzero(batch["mask"][b])
        first = batch["frames"][b, rows[0], 0, 0]
        assert torch.equal(first - first[0], torch.tensor([0, 1, 2], dtype=torch.uint8))
        code = int(first[0])
        real = np.flatnonzero(batch["transition"][b])
        inside = [k for k, (e, n) in lengths.items() if any((40 * e + 7 * k + t) % 256 == code for t in range(n + 1))]
        if not len(real):
            continue
        episode = int(batch["rewards"][b, real[0]]) % 100 // 10
        assert episode in inside
        env, T = lengths[episode]
        for i in range(7):
            t = int(batch["rewards"][b, real[0]]) % 10 + i - real[0]
            assert bool(batch["mask"][b, i]) == (0 <= t <= T)  # the last frame has a row of its own
            if 0 <= t <= T:
                assert batch["frames"][b, i].numpy().tobytes() == coded(env, episode, t).tobytes()
            if i < 6:
                assert bool(batch["transition"][b, i]) == (0 <= t < T)
            if 0 <= t < T:
                assert int(batch["actions"][b, i]) == 10 * episode + t
                assert float(batch["rewards"][b, i]) == 100 * env + 10 * episode + t
                assert bool(batch["ends"][b, i]) == (t == T - 1 and episode in (0, 2))
            elif i < 6:
                assert int(batch["actions"][b, i]) == 0
        found.add(episode)
    assert found == {0, 1, 2, 3}


@pytest.mark.parametrize("terminal", [False, True])
def test_denoiser_targets(terminal):
    """Targets are never padding; an episode's last frame is one only if it is asked for."""
    replay, args = d.FrameReplay(100, 1, (4, 4, 3)), replace(TINY, batch_size=4000, terminal_targets=terminal)
    fill(replay, [(0, k, 6, True) for k in range(8)])
    batch = replay.batch("denoiser", args)
    assert batch["frames"].shape == (4000, 6, 4, 4, 3) and batch["mask"][:, -1].all()
    ends_at = {int(coded(0, k, 6)[0, 0, 0]) for k in range(8)} - {
        int(coded(0, k, t)[0, 0, 0]) for k in range(8) for t in range(6)
    }
    last = set(batch["frames"][:, -1, 0, 0, 0].tolist())
    assert bool(last & ends_at) == terminal and ends_at
    start = replay.batch("actor", replace(args, start_pool=2000))
    assert start["mask"][:, -1].all() and start["mask"].shape == (2000, 4)
    assert not set(start["frames"][:, -1, 0, 0, 0].tolist()) & ends_at  # nobody starts where it is over
    assert len(replay.batch("begin", args)["mask"]) == args.imag_envs
    assert replay.batch("rew_end", args)["mask"].shape == (4000, args.rew_end_length)


def test_recent_episodes_are_drawn_more_often():
    replay = d.FrameReplay(1000, 1, (4, 4, 3))
    fill(replay, [(0, k, 2 if k % 2 else 9, True) for k in range(8)])
    batch = replay.segments(20_000, 1, np.random.default_rng(0))
    share = np.bincount(batch["rewards"][:, 0].long().numpy() // 10, minlength=8) / 20_000
    assert np.allclose(share, [0.05] * 6 + [0.35] * 2, atol=0.02)  # whatever their length


def test_old_rows_make_room():
    replay = d.FrameReplay(20, 1, (4, 4, 3))
    fill(replay, [(0, k, 6, True) for k in range(5)])  # 35 rows
    env, first, length, _ = replay.drawable()
    assert (first + length).tolist() == [20, 27, 34] and length.tolist() == [5, 6, 6] and first[0] == 15
    batch = replay.segments(2000, 3, np.random.default_rng(0))
    assert int(batch["rewards"][batch["mask"]].min()) == 21
    fill(replay, [(0, 5, 30, None)])  # an episode longer than the ring: its beginning is lost
    env, first, length, _ = replay.drawable()
    assert len(env) == 1 and int(length[0]) == 19
    fill_more = replay.open[0]
    assert fill_more[2] == 30


def test_episodes_that_have_not_moved_are_not_drawn():
    replay, env = d.FrameReplay(20, 2, (4, 4, 3)), np.array([0, 1])
    replay.begin(env, np.stack([coded(0, 0, 0), coded(1, 0, 0)]))
    assert len(replay.drawable()[0]) == 0
    replay.add(np.array([0]), [1], [0.0], [False], coded(0, 0, 1)[None])
    assert replay.drawable()[0].tolist() == [0]
    replay.close(env)
    assert replay.episodes == [[0, 0, 1]] and replay.open == {}
    replay.begin(env, np.stack([coded(0, 1, 0), coded(1, 1, 0)]))
    assert [e[:2] for e in replay.open.values()] == [[0, 2], [1, 1]]


def test_replay_in_a_checkpoint():
    replay = d.FrameReplay(50, 2, (4, 4, 3), seed=3)
    fill(replay, [(0, 0, 5, True), (1, 1, 3, None), (0, 2, 4, None)])
    replay.segments(8, 4, replay.rng)
    state = copy.deepcopy(replay.state_dict())
    other = d.FrameReplay(60, 2, (4, 4, 3), seed=9)
    other.load_state_dict(state)
    a, b = replay.segments(50, 5, replay.rng), other.segments(50, 5, other.rng)
    assert all(torch.equal(a[k], b[k]) for k in a)
    for r in (replay, other):
        r.add(np.array([1]), [7], [8.0], [True], coded(1, 1, 4)[None])
        r.close(np.array([0, 1]))
    assert replay.episodes == other.episodes and len(replay.episodes) == 3


# ---- Environments and policies ---------------------------------------------------------------------------------------


class Lives(gym.Env):
    """Three lives, one lost every 12 emulator frames; the frame number is the picture."""

    observation_space, action_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), gym.spaces.Discrete(2)

    def __init__(self):
        self.ale, self.resets = self, 0

    def lives(self):
        return 3 - self.t // 12

    def picture(self):
        image = np.zeros((8, 8, 3), np.uint8)
        image[self.t % 2 :: 2] = self.t  # flickers: only two frames together show everything
        return image

    def reset(self, *, seed=None, options=None):
        self.t, self.resets = 0, self.resets + 1
        return self.picture(), {}

    def step(self, action):
        self.t += 1
        return self.picture(), 1.0, self.lives() == 0, False, {}


def test_area_resizing():
    """Cells of 210 / 64 by 160 / 64 pixels, partly covered ones counted by their share; checked by finer pixels."""
    frame = np.random.default_rng(0).integers(256, size=(10, 6, 3), dtype=np.uint8)
    fine = frame.repeat(4, 0).repeat(4, 1).astype(np.float64)  # 40 x 24: cells of 10 x 6
    expected = fine.reshape(4, 10, 4, 6, 3).mean((1, 3))
    env = d.AtariByLife(Lives(), replace(TINY, image_size=4))
    assert np.abs(env.picture(frame) - expected).max() <= 0.501
    weights = d.area_weights(210, 64)
    assert weights.shape == (64, 210) and np.allclose(weights.sum(1), 1, atol=1e-5)
    assert np.allclose(weights.sum(0), 64 / 210, atol=1e-5)
    assert (env.picture(np.full((210, 160, 3), 255, np.uint8)) == 255).all()
    x = np.zeros((210, 160, 3), np.uint8)
    x[0, :, 1] = 200
    assert env.picture(x)[0, :, 1].tolist() == [round(200 * 4 / 210)] * 4 and env.picture(x)[1:].max() == 0
    x[0, 0, 0] = 250
    assert env.picture(x.transpose(1, 0, 2))[:, 0, 1].tolist() == [round(200 * 4 / 210)] * 4  # rows are rows


# ---- Evaluation ------------------------------------------------------------------------------------------------------


# ---- Own data and whole runs -----------------------------------------------------------------------------------------


def call(monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["diamond.py", *map(str, argv)])
    return d.train(d.parse_args(d.Args, d.PRESETS, ""))


SMALL = (
    "--preset cpu --no-cuda --denoiser-channels 8,8 --denoiser-cond 16 --rew-end-channels 8,8 --rew-end-cond 8 "
    "--rew-end-lstm 8 --actor-channels 4,8 --actor-lstm 8 --imag-envs 2 --imag-horizon 3 --start-pool 4 --batch-size 2 "
    "--rew-end-length 6 --eval-episodes 2"
).split()


def test_learning_from_a_file(monkeypatch, tmp_path):
    """--dataset trains on recorded episodes and judges on held-out ones, resumes, and its agent dreams and its
    environment shows the recording."""
    monkeypatch.chdir(tmp_path)
    rng, lengths = np.random.default_rng(0), [9, 14, 7, 11]
    rows = [dict(frames=rng.integers(256, size=(n + 1, 10, 10, 3), dtype=np.uint8), actions=rng.integers(3, size=n + 1),
                 rewards=rng.normal(size=n + 1), lasts=np.arange(n + 1) == n, ends=np.arange(n + 1) == n - 1)
            for n in lengths]  # fmt: skip
    np.savez("play.npz", **{k: np.concatenate([r[k] for r in rows]) for k in rows[0]})
    episodes, rewarded, actions = d.load_dataset("play.npz")
    assert rewarded and actions == 3 and [len(e["actions"]) for e in episodes] == lengths
    assert all(e["end"] for e in episodes)
    flags = "--first-denoiser-updates 3 --first-rew-end-updates 2 --denoiser-updates 1 --rew-end-updates 1".split()
    result = call(monkeypatch, *SMALL, *flags, "--dataset", "play.npz", "--final-epochs", 2)
    assert result["updates"] == 5 + 2 + 2 and result["prediction_errors"]["one_step_mse"] > 0
    (run,) = os.listdir("runs")
    run = os.path.join("runs", run)
    assert "play.npz" in run and json.load(open(os.path.join(run, "result.json")))["updates"] == 9
    again = call(monkeypatch, "--resume", run)
    assert again["updates"] == 9
    agent = d.load(run)
    env = d.make_env(agent.args, 1)
    frame, _ = env.reset(seed=1)
    assert any((frame == r["frames"][0]).all() for r in rows) and env.action_space.n == 3
    (episode,) = [r for r in rows if (frame == r["frames"][0]).all()]
    over, t = False, 0
    while not over:
        frame, reward, terminated, over, _ = env.step(0)
        t += 1
        assert (frame == episode["frames"][t]).all() and reward == episode["rewards"][t - 1]
    assert terminated and t == len(episode["actions"]) - 1
    dream, seen = agent.observe(episode["frames"][None, :3], episode["actions"][None, :2])
    _, reward, alive, after = agent.imagine(dream, np.array([1]))
    assert (seen == episode["frames"][:3]).all() and after.shape == (1, 10, 10, 3) and 0 <= alive[0] <= 1


def test_frames_and_actions_are_enough(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.savez("own.npz", frames=rng.integers(256, size=(60, 12, 9, 1), dtype=np.uint8), actions=rng.integers(5, size=60))
    episodes, rewarded, actions = d.load_dataset("own.npz")
    assert len(episodes) == 1 and len(episodes[0]["actions"]) == 59 and not rewarded and not episodes[0]["end"]
    training, tests = d.split_dataset(episodes)
    assert len(training[0]["actions"]) == 53 and len(tests[0]["actions"]) == 6 and len(tests[0]["frames"]) == 7
    assert (tests[0]["frames"][0] == training[0]["frames"][-1]).all()
    result = call(monkeypatch, *SMALL, "--dataset", "own.npz", "--first-denoiser-updates", 2, "--final-epochs", 0)
    assert result["updates"] == 2


def test_split_of_many_episodes():
    training, tests = d.split_dataset([dict(n=k) for k in range(25)])
    assert [e["n"] for e in tests] == [9, 19] and len(training) == 23
    training, tests = d.split_dataset([dict(n=k) for k in range(3)])
    assert [e["n"] for e in tests] == [2] and len(training) == 2


@pytest.mark.parametrize(
    "data, words",
    [
        (dict(actions=np.zeros(5, int)), "needs frames and actions"),
        (dict(frames=np.zeros((5, 8, 8, 3)), actions=np.zeros(5, int)), "must be uint8 images"),
        (dict(frames=np.zeros((5, 8, 8, 4), np.uint8), actions=np.zeros(5, int)), "must be uint8 images"),
        (dict(frames=np.zeros((5, 8, 8, 3), np.uint8), actions=np.zeros(4, int)), "equal lengths"),
        (dict(frames=np.zeros((5, 8, 8, 3), np.uint8), actions=np.zeros(5)), "integers"),
        (dict(frames=np.zeros((5, 8, 8, 3), np.uint8), actions=np.full(5, -1)), "integers from 0"),
        (dict(frames=np.zeros((5, 8, 8, 3), np.uint8), actions=np.zeros(5, int), ends=np.ones(5)), "belong together"),
        (dict(frames=np.zeros((5, 8, 8, 3), np.uint8), actions=np.zeros(5, int), ends=np.ones(5), rewards=np.ones(5)),
         "ends need lasts"),
    ],
)  # fmt: skip
def test_data_that_does_not_fit(monkeypatch, tmp_path, capsys, data, words):
    monkeypatch.chdir(tmp_path)
    np.savez("own.npz", **data)
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *SMALL, "--dataset", "own.npz")
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error:" in x]
    assert stopped.value.code == 2 and "--dataset own.npz" in line and words in line
    assert os.listdir(".") == ["own.npz"]


def test_init_from(monkeypatch, tmp_path, capsys):
    """A state dict with the authors' names becomes the run's first weights; one that does not fit creates nothing."""
    monkeypatch.chdir(tmp_path)
    model = tiny()
    torch.save(model.state_dict() | {"upsampler.x": torch.zeros(1)}, "official.pt")
    flags = [
        "--init-from",
        "official.pt",
        "--total-timesteps",
        40,
        "--learning-starts",
        20,
        "--learning-starts-max",
        20,
    ]
    still = [f"--{first}{kind}-updates=0" for first in ("", "first-") for kind in ("denoiser", "rew-end", "actor")]
    call(monkeypatch, *SMALL, *flags, *still)
    (run,) = os.listdir("runs")
    agent = d.load(os.path.join("runs", run))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in agent.model.state_dict().items())
    torch.save(tiny(actions=5).state_dict(), "other.pt")
    torch.save([1, 2], "list.pt")
    for name, words in (("other.pt", "size mismatch"), ("list.pt", "list"), ("nowhere.pt", "No such file")):
        with pytest.raises(SystemExit) as stopped:
            call(monkeypatch, *SMALL, *flags, "--init-from", name)
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and f"--init-from {name}" in err and words in err
        assert len(os.listdir("runs")) == 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    home, folder = os.getcwd(), tmp_path_factory.mktemp("diamond")
    os.chdir(folder)
    try:
        with pytest.MonkeyPatch.context() as patch:
            updates = [
                f"--{first}{kind}-updates=2" for first in ("", "first-") for kind in ("denoiser", "rew-end", "actor")
            ]
            flags = [
                "--total-timesteps",
                60,
                "--learning-starts",
                40,
                "--learning-starts-max",
                40,
                "--collect-steps",
                10,
            ]
            result = call(patch, *SMALL, *updates, *flags, "--final-epochs", 1)
        return os.path.join(folder, result["run"]), result
    finally:
        os.chdir(home)


def test_epochs_of_the_published_run():
    """1000 training epochs, 950 of them with 100 new agent steps (table 3)."""
    args = d.Args()
    collecting = 1 + (args.total_timesteps - args.learning_starts) // args.collect_steps
    assert (collecting, collecting + args.final_epochs) == (950, 1000)


def test_epochs(trained):
    _, result = trained
    assert result["updates"] == 6 * 4 and result["global_step"] == 60  # at 40, 50, 60, and one more in the end


def test_the_agent_dreams_what_imagination_draws(trained, monkeypatch):
    """Frames, actions and the reward model's state go on as in imagine_rollout; short episodes are padded; the newest
    action is the one that leads to the frame."""
    agent, rng = d.load(trained[0]), np.random.default_rng(0)
    obs, actions = rng.integers(256, size=(3, 6, 10, 10, 3), dtype=np.uint8), rng.integers(3, size=(3, 5))
    (frames, past, *wm), seen = agent.observe(obs, actions)
    assert (seen == obs).all() and frames.shape == (3, 4, 3, 10, 10) and past[:, :3].tolist() == actions[:, 2:].tolist()
    (short, none, *_), _ = agent.observe(obs[:, :2], actions[:, :1])
    assert (short[:, :2] == 0).all() and none[:, :2].eq(0).all()
    assert torch.equal(short[:, 2:], d.frames_to_float(torch.as_tensor(obs[:, :2])).permute(0, 1, 4, 2, 3))
    drawn = []
    monkeypatch.setattr(d, "imagine_frame", lambda net, f, a, s: drawn.append(a.clone()) or f[:, -1])
    state, reward, alive, after = agent.imagine((frames, past, *wm), np.array([2, 1, 0]))
    assert drawn[0][:, -1].tolist() == [2, 1, 0] and torch.equal(state[0][:, :3], frames[:, 1:])
    assert (after == obs[:, -1]).all() and set(reward) <= {-1.0, 0.0, 1.0} and ((0 < alive) & (alive < 1)).all()
    state, *_ = agent.imagine(state, np.array([1, 1, 1]))
    assert drawn[1][:, -2:].tolist() == [[2, 1], [1, 1], [0, 1]]


def test_lost_lives():
    """A lost life is told and resets nothing; a life that was won and lost again is none; 1 to 30 no-ops."""
    env = d.AtariByLife(Lives(), replace(TINY, image_size=4))
    env.unwrapped.reset = lambda **kw: Lives.reset(env.unwrapped)
    seen = set()
    env.unwrapped.lives = lambda: 3
    for seed in range(300):
        env.reset(seed=seed)
        seen.add(env.unwrapped.t)
    assert seen == set(range(1, 31))
    env.unwrapped.step = lambda a: (env.unwrapped.picture(), 1.0, False, False, {})
    left = iter([3, 3, 3, 4, 4, 3, 3, 2, 2, 2])  # asked once at the reset, then once after each action
    env.unwrapped.lives = lambda: next(left)
    env.reset(seed=0)
    told = [env.step(0)[4]["life_lost"] for _ in range(8)]
    assert told == [False, False, False, False, False, False, True, False]


def test_a_lost_life_ends_an_episode_and_the_game_goes_on(monkeypatch, tmp_path):
    """In the replay a lost life ends an episode; the next one begins with the frame that ended it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(d, "evaluate", lambda *a: np.zeros(1))
    flags = "--env-id ALE/Breakout-v5 --no-pixels --image-size 16 --total-timesteps 160 --learning-starts 150".split()
    flags += "--learning-starts-max 150 --first-denoiser-updates 0 --first-rew-end-updates 0".split()
    call(monkeypatch, *SMALL, *flags, "--first-actor-updates", 0, "--denoiser-updates", 0, "--rew-end-updates", 0,
         "--actor-updates", 0, "--num-envs", 1)  # fmt: skip
    (run,) = os.listdir("runs")
    state = torch.load(os.path.join("runs", run, "ckpt.pt"), weights_only=True)
    episodes, frames = state["replay"]["episodes"], state["replay"]["rows"]["frames"][0]
    assert len(episodes) > state["loop"]["episode"][0] + 1
    lives = [b for a, b in zip(episodes, episodes[1:]) if torch.equal(frames[a[1] + a[2]], frames[b[1]])]
    assert lives and sum(T for _, _, T in episodes) == 160


def test_initial_collection_waits_for_rewards(monkeypatch, tmp_path):
    """Until the two rarer reward signs were seen 10 times, or --learning-starts-max."""
    monkeypatch.chdir(tmp_path)
    steps, real = [], d.Learner.update
    monkeypatch.setattr(d.Learner, "update", lambda self, *a: steps.append(len(stored)) or real(self, *a))
    stored, add = [], d.FrameReplay.add
    monkeypatch.setattr(d.FrameReplay, "add", lambda self, e, a, r, *x: stored.append(r[0]) or add(self, e, a, r, *x))
    flags = [
        "--learning-starts",
        50,
        "--collect-steps",
        20,
        "--first-denoiser-updates",
        1,
        "--first-rew-end-updates",
        0,
    ]
    flags += ["--first-actor-updates", 0, "--denoiser-updates", 0, "--rew-end-updates", 0, "--actor-updates", 0]
    call(monkeypatch, *SMALL, *flags, "--total-timesteps", 400, "--learning-starts-max", 300)
    (began,) = steps
    rewards = np.array(stored)
    assert 50 < began <= 300 and (began - 50) % 20 in (0, 10)
    assert began == 300 or (rewards[:began] != 0).sum() >= 10 > (rewards[: began - 20] != 0).sum()
