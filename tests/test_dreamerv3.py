"""Every formula of dreamerv3.py against closed forms and slow references.

Facts are those of DreamerV3 (Hafner et al., Nature 640:647-653, 2025; arXiv:2301.04104v2) and of its authors' code."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gymnasium.spaces import Box, Dict, Discrete

import dreamerv3 as d

VECTOR = Dict(vector=Box(-np.inf, np.inf, (3,), np.float32))
SIX = Box(-1, 1, (6,), np.float32)
near = torch.testing.assert_close


def image(side, channels=3):
    return Box(0, 255, (side, side, channels), np.uint8)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make_rssm(classes=4):
    rssm = d.RSSM(5, 3, deter=24, hidden=8, stoch=6, classes=classes, blocks=4)
    for name, p in rssm.named_parameters():
        if name.endswith("bias") or "norm" in name:
            p.data.normal_()
    return rssm


def tiny_model(actions=None):
    """A small model with all weights random, also those that start at 0, and reward and values of moderate size."""
    tiny = dict(deter=32, hidden=16, units=16, cnn_depth=4, classes=4, stoch=6, blocks=4, mlp_layers=1)
    model = d.Dreamer(VECTOR, actions or Discrete(3), d.make_config("1m", **tiny))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.normal_(std=0.3)
    for head in (model.rew, model.val, model.slow):
        head.out.weight.data.normal_(std=0.5)
        head.out.bias.data.copy_(-0.5 * d.symlog(model.bins) ** 2)  # far atoms, up to 4.85e8, get no probability
    return model


def tiny_batch(model, B=3, T=5):
    """Random rows 0..T as replay returns them; episodes end in two sequences, one of them for good."""
    A, classes = model.pol.out_dim, model.config["classes"]
    action = torch.randn(B, T + 1, A).clamp(-1, 1)
    action = F.one_hot(action.argmax(-1), A).float() if model.pol.discrete else action
    flags = {k: torch.zeros(B, T + 1, dtype=torch.bool) for k in ("is_first", "is_last", "is_terminal")}
    flags["is_last"][0, 2] = flags["is_last"][1, 3] = flags["is_terminal"][1, 3] = True
    batch = {"obs/vector": torch.randn(B, T + 1, 3), "action": action, "reward": 3 * torch.randn(B, T + 1), **flags}
    deter, stoch = torch.randn(B, T + 1, model.config["deter"]), torch.randint(classes, (B, T + 1, 6))
    return batch | {"deter": deter.bfloat16(), "stoch": stoch.to(torch.uint8)}


def seeded_losses(model, batch, **flags):
    torch.manual_seed(0)
    return d.world_model_loss(model, batch, d.Args(**flags))


# ---- Maths -----------------------------------------------------------------------------------------------------------


def test_symlog_and_symexp():
    x = torch.tensor([0.0, math.e - 1, 1 - math.e, 1e6], dtype=torch.float64, requires_grad=True)
    near(d.symlog(x), x.new_tensor([0.0, 1.0, -1.0, math.log(1e6 + 1)]))
    assert torch.autograd.grad(d.symlog(x).sum(), x)[0][0] == 1
    assert d.symexp(x.new_tensor(20.0)).item() == pytest.approx(4.85165194e8, rel=1e-8)
    x = torch.randn(1000, dtype=torch.float64) * torch.logspace(-4, 6, 1000, dtype=torch.float64)
    assert torch.equal(d.symlog(-x), -d.symlog(x))
    near(d.symexp(d.symlog(x)), x)


@pytest.mark.parametrize("n", [40, 41, 63, 127, 255])
def test_bins_increase_and_are_antisymmetric_so_that_zero_logits_mean_exactly_zero(n):
    bins = d.make_bins(n)
    assert bins.shape == (n,) and bins.dtype == torch.float32
    assert (bins[1:] > bins[:-1]).all() and torch.equal(bins, -bins.flip(0)) and (bins == 0).sum() == n % 2
    for shape in ((n,), (7, n), (33, 5, n)):
        assert (d.two_hot_mean(torch.full(shape, -4.7), bins) == 0).all()
    if n == 255:
        expected = [0, math.expm1(20 / 127), 4.85165184e8]
        assert bins[[127, 128, 254]].tolist() == pytest.approx(expected, rel=1e-6)


def test_two_hot():
    bins = d.make_bins()
    y = d.symexp(torch.empty(50).uniform_(-19.9, 19.9))
    code = d.two_hot(y, bins)
    near(code.sum(-1), torch.ones(50))
    near(code.double() @ bins.double(), y.double(), rtol=1e-5, atol=1e-6)
    first = (code > 0).float().argmax(-1)
    assert all((code[i].nonzero() - first[i] <= 1).all() and (code[i] >= 0).all() for i in range(50))  # neighbours
    assert torch.equal(d.two_hot(bins, bins), torch.eye(255))
    middle = d.two_hot((bins[200:201] + bins[201:202]) / 2, bins)  # linear in values, not in symlog space
    near(middle[0, 200:202], torch.tensor([0.5, 0.5]), rtol=1e-5, atol=0)
    ends = d.two_hot(torch.tensor([1e9, math.inf, -1e9, -math.inf]), bins)
    assert ends.argmax(-1).tolist() == [254, 254, 0, 0] and (ends.sum(-1) == 1).all()


def test_two_hot_mean_and_loss():
    bins, y = d.make_bins(), d.symexp(torch.linspace(-22, 22, 50))
    logits = (3 * torch.randn(50, 255) - 0.5 * d.symlog(bins) ** 2).requires_grad_()
    near(
        d.two_hot_mean(logits, bins).double(), torch.softmax(logits.double(), -1) @ bins.double(), rtol=1e-4, atol=1e-3
    )
    loss = d.two_hot_loss(logits, y, bins)
    near(loss, -(d.two_hot(y, bins) * torch.log_softmax(logits, -1)).sum(-1))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    near(gradient, torch.softmax(logits, -1) - d.two_hot(y, bins), rtol=1e-4, atol=1e-6)
    near(d.two_hot_loss(torch.zeros(50, 255), y, bins), torch.full((50,), 5.541264))  # log 255


@pytest.mark.parametrize("classes", [2, 4, 18, 32])
def test_unimix(classes):
    logits = (20 * torch.randn(100, classes)).requires_grad_()
    probs, expected = d.unimix_probs(logits), 0.99 * torch.softmax(logits, -1) + 0.01 / classes
    near(probs, expected)
    assert (probs >= 0.01 / classes * (1 - 1e-5)).all()
    m = torch.randn_like(logits)
    near(*(torch.autograd.grad((m * x).sum(), logits)[0] for x in (probs, expected)))


def test_samples_are_one_hot_invert_the_distribution_and_pass_gradients_straight_through():
    p, u = torch.tensor([0.25, 0.5, 0.25]), torch.tensor([0.0, 0.24, 0.25, 0.74, 0.75, 0.9999999])
    assert d.sample_onehot(p.expand(6, 3), u).argmax(-1).tolist() == [0, 0, 1, 1, 2, 2]
    assert d.sample_onehot(torch.full((1, 3), 0.33), torch.tensor([0.9999])).argmax() == 2  # rounded sums
    probs, w = torch.softmax(torch.randn(500, 7), -1).requires_grad_(), torch.randn(500, 7)
    z = d.sample_onehot(probs)
    assert set(z.detach().unique().tolist()) == {0, 1} and (z.sum(-1) == 1).all()
    assert torch.equal(torch.autograd.grad((w * z).sum(), probs)[0], w)


def test_kl():
    C, p, q = torch.distributions.Categorical, 2 * torch.randn(8, 5, 6), 2 * torch.randn(8, 5, 6)
    near(d.kl_categorical(p, q), torch.distributions.kl_divergence(C(logits=p), C(logits=q)), rtol=1e-4, atol=1e-5)
    post, prior = (3 * torch.randn(2, 3, 4, 5)).requires_grad_(), (3 * torch.randn(2, 3, 4, 5)).requires_grad_()
    dyn, rep = d.kl_loss(post, prior)
    assert dyn.shape == (2, 3) and (dyn > 1).all() and torch.equal(dyn, rep)
    p, q = torch.softmax(post, -1), torch.softmax(prior, -1)
    ratio = p.log() - q.log()
    gradients = [torch.autograd.grad(x.sum(), (post, prior), retain_graph=True, allow_unused=True) for x in (dyn, rep)]
    near(gradients[0][1], q - p, rtol=1e-4, atol=1e-5)  # dyn trains the prior alone, rep the posterior alone
    near(gradients[1][0], p * (ratio - (p * ratio).sum(-1, keepdim=True)), rtol=1e-3, atol=1e-5)
    assert all(g is None or not g.any() for g in (gradients[0][0], gradients[1][1]))


def test_free_nats_clip_each_step_after_the_sum_over_groups():
    post, prior = torch.zeros(1, 2, 4, 2), torch.zeros(1, 2, 4, 2, requires_grad=True)
    post[0, 1, :, 0] = 30.0  # step 0: KL 0; step 1: 4 groups of ln 2 = 0.69, each below 1 nat by itself
    dyn, rep = d.kl_loss(post, prior)
    assert dyn[0].tolist() == rep[0].tolist() == pytest.approx([1.0, 4 * math.log(2)], rel=1e-5)
    (gradient,) = torch.autograd.grad(dyn.sum(), prior)
    assert not gradient[0, 0].any() and gradient[0, 1].any()


def slow_lambda_return(last, term, rew, boot, disc, lam):
    """The recursion, one number at a time."""
    out = np.zeros((len(rew), rew.shape[1] - 1))
    for b in range(len(rew)):
        later = float(boot[b, -1])
        for t in reversed(range(out.shape[1])):
            mixed = (1 - lam) * float(boot[b, t + 1]) + lam * later
            mixed = float(boot[b, t + 1]) if last[b, t + 1] else mixed
            later = out[b, t] = float(rew[b, t + 1]) + disc * (1 - float(term[b, t + 1])) * mixed
    return torch.as_tensor(out)


@pytest.mark.parametrize("disc, lam", [(1 - 1 / 333, 0.95), (1.0, 1.0), (0.9, 0.0)])
def test_lambda_return(disc, lam):
    rew, boot = torch.randn(2, 6, 12)
    last = torch.rand(6, 12) < 0.3
    term = last & (torch.rand(6, 12) < 0.5)
    got = d.lambda_return(last, term, rew, boot, boot, disc, lam)
    near(got.double(), slow_lambda_return(last, term, rew, boot, disc, lam), rtol=1e-4, atol=1e-5)
    zero, one = torch.zeros(2, 7), torch.ones(2, 7)
    assert d.lambda_return(zero, zero, one, zero, zero, 1.0, 1.0)[0].tolist() == [6, 5, 4, 3, 2, 1]
    for terminal, expected in ((0, 1 + 2 * disc), (1, 1.0)):  # bootstraps where it was cut off, not where it ended
        near(d.lambda_return(one, one * terminal, one, zero, 2 * one, disc, lam), expected * one[:, 1:])


def test_return_norm_is_not_debiased_and_never_scales_up():
    norm, returns = d.ReturnNorm(), torch.linspace(0, 100, 101)[torch.randperm(101)]
    assert norm.update(returns) == 1 and (float(norm.lo), float(norm.hi)) == pytest.approx((0.05, 0.95))
    for _ in range(999):
        scale = norm.update(returns)
    assert float(scale) == float(norm.scale()) == pytest.approx(90 * (1 - 0.99**1000), rel=1e-4)
    assert float(d.ReturnNorm().update(-100 * returns)) == pytest.approx(90, rel=1e-4)  # updated before it is used
    assert d.ReturnNorm(rate=1.0).update(returns / 1000) == 1


@pytest.mark.parametrize("p, g, after", [(2, 6, 0.6), (2, 0.6, 0.6), (2, 0.5, 0.5), (0, 5, 3e-4), (0, 1e-4, 1e-4)])
def test_agc_limits_the_norm_of_a_whole_tensor_by_that_of_its_parameter(p, g, after):
    unit, other = torch.randn(4, 5), torch.ones(3)
    grads = [g * unit / unit.norm(), other.clone()]
    norms = d.agc_(grads, [p * unit / unit.norm(), 10 * other])
    near(grads[0], after * unit / unit.norm(), rtol=1e-4, atol=1e-9)
    assert norms.tolist() == pytest.approx([g, math.sqrt(3)], rel=1e-4) and torch.equal(grads[1], other)


def test_learning_rate_warms_up_linearly_from_exactly_zero():
    for step, share in {0: 0.0, 1: 0.001, 500: 0.5, 1000: 1.0, 10**7: 1.0}.items():
        assert float(d.lr_at(torch.tensor(step), 4e-5, 1000)) == pytest.approx(4e-5 * share, rel=1e-6, abs=0)


def run_laprop(grads, oks=None, rates=None):
    """Parameters after each of a list of gradients, from 0."""
    p = torch.nn.Parameter(torch.zeros_like(grads[0]))
    opt, path = d.LaProp([p], lr=0.01), []
    for t, g in enumerate(grads):
        p.grad = g.clone()
        opt.step(rates and rates[t], None if oks is None else torch.tensor(oks[t]))
        path.append(p.detach().clone())
    return torch.stack(path)


def test_laprop_against_a_slow_reference_while_the_learning_rate_changes():
    grads = [torch.randn(20, dtype=torch.float64) * 10 ** (t % 5) for t in range(40)]
    rates = [0.01 * (t + 1) / 40 for t in range(40)]
    p, mu, nu = torch.zeros(3, 20, dtype=torch.float64)
    for t, (g, lr) in enumerate(zip(grads, rates), 1):
        nu = 0.999 * nu + 0.001 * g**2
        mu = 0.9 * mu + 0.1 * g / ((nu / (1 - 0.999**t)).sqrt() + 1e-20)
        p = p - lr * mu / (1 - 0.9**t)
    for scale in (1, 1e-8):  # which it does not see
        near(run_laprop([scale * g.float() for g in grads], rates=rates)[-1].double(), p, rtol=1e-3, atol=1e-6)


def test_laprop_with_ok_false_changes_nothing():
    grads, bad = [torch.randn(10) for _ in range(6)], torch.full((10,), math.nan)
    skipped = run_laprop([bad, *grads[:3], bad, *grads[3:]], oks=[False, *[True] * 3, False, *[True] * 3])
    assert not skipped[0].any() and torch.equal(skipped[[1, 2, 3, 5, 6, 7]], run_laprop(grads))


# ---- Layers ----------------------------------------------------------------------------------------------------------


def plain_norm(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-4).sqrt() * weight


@pytest.mark.parametrize("shape", [(7,), (5, 7)])
def test_rms_norm_and_its_gradient_with_silu(shape):
    norm = d.RMSNorm(7)
    assert [n for n, _ in norm.named_parameters()] == ["weight"] and torch.equal(norm.weight, torch.ones(7))
    near(norm(torch.full((2, 7), -3.0)), torch.full((2, 7), -3 / math.sqrt(9 + 1e-4)))  # the mean is not subtracted
    big = torch.ones(1, 4096, dtype=torch.bfloat16)  # added up in bfloat16, the squares would stop at 256
    near(d.RMSNorm(4096)(big).float(), big.float(), rtol=2**-7, atol=0)
    x, w, m = torch.randn(3, 5, 7, dtype=torch.float64), torch.randn(shape, dtype=torch.float64), torch.randn(3, 5, 7)
    plain = F.silu(plain_norm(x.requires_grad_(), w.requires_grad_()))
    expected = torch.autograd.grad((m * plain).sum(), (x, w))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        a, b = x.detach().to(dtype).requires_grad_(), w.detach().float().requires_grad_()
        y = d.norm_silu(a, b, norm.eps)
        assert y.dtype == dtype
        near(y.double(), plain, rtol=tolerance, atol=tolerance)
        for g, e in zip(torch.autograd.grad((m * y).sum(), (a, b)), expected):
            near(g.double(), e, rtol=tolerance, atol=3 * tolerance)
        with torch.no_grad():
            near(d.norm_silu(a, b, norm.eps), y)


def test_initial_weights_have_unit_gain_over_the_whole_fan_in():
    conv = d.Encoder(Dict(image=image(64)), 8, 64).convs[2]
    layers = [(d.Linear(1024, 1024), 1024), (conv, 25 * 192), (d.UpConv(192, 256), 25 * 192)]
    layers += [(d.BlockLinear(4096, 2048, 8), 4096)]  # a fan-in per block would give sqrt(8)
    for layer, fan_in in layers:
        weight = layer.weight.detach() * math.sqrt(fan_in)
        assert float(weight.std()) == pytest.approx(1.0, abs=0.003) and not layer.bias.any()
        assert 2.2 < weight.abs().max() <= 2 * 1.1369  # truncated at two standard deviations


def test_upconv_equals_upsampling_then_convolution():
    layer, x = d.UpConv(2, 3).double(), torch.randn(2, 2, 7, 6, dtype=torch.float64, requires_grad=True)
    layer.bias.data.normal_()
    pair = layer(x), F.conv2d(F.interpolate(x, scale_factor=2), layer.weight, layer.bias, padding=2)
    near(*pair, rtol=0, atol=1e-12)
    m = torch.randn_like(pair[0])
    for a, b in zip(*(torch.autograd.grad((m * y).sum(), (x, layer.weight, layer.bias)) for y in pair)):
        near(a, b, rtol=0, atol=1e-11)


def test_encoder_pools_then_normalises_then_activates():
    enc, x = d.Encoder(Dict(image=image(32)), 8, 4), torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    y = (x.float() / 255 - 0.5).permute(0, 3, 1, 2)
    for conv, norm in zip(enc.convs, enc.norms):
        y = F.max_pool2d(F.conv2d(y, conv.weight, conv.bias, padding=2), 2)
        y = F.silu(plain_norm(y.permute(0, 2, 3, 1), norm.weight)).permute(0, 3, 1, 2)
    near(enc({"image": x[None]})[0], y.permute(0, 2, 3, 1).flatten(1), rtol=1e-3, atol=1e-4)  # H, W, C
    for size, stages in {8: 1, 16: 2, 32: 3, 48: 4, 64: 4, 96: 4, 256: 4}.items():
        assert d.image_stages(size) == (2, 3, 4, 4)[:stages]
    assert d.Encoder(Dict(image=image(64)), 8, 4).out_dim == 16 * 4 * 4


def test_encoder_of_several_keys():
    box = Box(-np.inf, np.inf, (2,), np.float32)
    enc, seen = d.Encoder(Dict(b=Box(0, 1, (4,), np.float32), c=box, a=box, i=image(16)), 8, 4, 1), []
    enc.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    a, c = torch.tensor([[[100.0, -5.0]]]), torch.tensor([[[0.5, 1e6]]])
    obs = {"i": torch.zeros(1, 1, 16, 16, 3, dtype=torch.uint8), "c": c, "a": a, "b": torch.tensor([[[0.0, 0, 1, 0]]])}
    one, two = enc(obs), enc(obs | {"a": a + 1})
    near(seen[0], d.symlog(torch.cat([a, obs["b"], c], -1)))  # sorted by name
    assert one.shape[-1] == enc.out_dim == 8 + 16 * 12  # vector features come first
    assert torch.equal(one[..., 8:], two[..., 8:]) and not torch.equal(one[..., :8], two[..., :8])


def test_decoder():
    space = Dict(image=image(32), map=image(32, 1), vector=Box(-9, 9, (7,), np.float32))
    dec, seen = d.Decoder(space, 32, 6 * 4, 16, 4, 1, 4), []
    silu = dec.norms[0].silu
    dec.norms[0].silu = lambda x: (seen.append(x), silu(x))[1]
    h, z = torch.randn(1, 3, 32), torch.randn(1, 3, 6, 4)
    out = dec(h, z)
    shapes = {k: tuple(v.shape[2:]) for k, v in out.items()}
    assert shapes == {"image": (32, 32, 3), "map": (32, 32, 1), "vector": (7,)}
    assert all(((out[k] > 0) & (out[k] < 1)).all() for k in ("image", "map"))  # sigmoid
    h[..., 8:16] += 1.0  # block 1 of 4 owns channels 4 to 7 of 16 at all positions
    dec(h, z)
    changed = (seen[0] != seen[1]).reshape(-1, 16)
    assert changed[:, 4:8].all() and not changed[:, :4].any() and not changed[:, 8:].any()


def test_recon_loss_sums():
    white = torch.ones(2, 3, 64, 64, 3)
    assert (d.recon_loss(white, torch.zeros(2, 3, 64, 64, 3, dtype=torch.uint8)) == 12288).all()
    assert (d.recon_loss(white, torch.full((2, 3, 64, 64, 3), 255, dtype=torch.uint8)) == 0).all()
    target = torch.tensor([[[math.e - 1, 0.0, -(math.e**2 - 1)]]])
    assert float(d.recon_loss(torch.zeros(1, 1, 3), target)) == pytest.approx(1 + 0 + 4, rel=1e-5)  # in symlog space


# ---- RSSM ------------------------------------------------------------------------------------------------------------


def plain_core(p, h, z, a):
    """The block GRU in loops over blocks; p: parameters by name."""
    inputs = (("in_h", h), ("in_z", z.flatten(1)), ("in_a", a / a.abs().clamp(min=1).detach()))
    linear = lambda n, x: x @ p[n + ".weight"].T + p[n + ".bias"]  # noqa: E731
    x = [F.silu(plain_norm(linear(n + ".linears.0", v), p[n + ".norms.0.weight"])) for n, v in inputs]
    x = [torch.cat([own, *x], -1) @ w for own, w in zip(h.chunk(4, -1), p["core_in.weight"])]
    x = F.silu(plain_norm(torch.cat(x, -1) + p["core_in.bias"], p["core_norm.weight"]))
    gates = [own @ w for own, w in zip(x.chunk(4, -1), p["core_gates.weight"])]
    gates = [g + b for g, b in zip(gates, p["core_gates.bias"].chunk(4))]  # gates are split inside each block
    reset, cand, update = (torch.cat(g, -1) for g in zip(*(g.chunk(3, -1) for g in gates)))
    update = torch.sigmoid(update - 1)
    return update * torch.tanh(torch.sigmoid(reset) * cand) + (1 - update) * h


def plain_observe(p, tokens, actions, is_first, h, z, chosen):
    """RSSM.observe, one step after the other; `chosen`: the latents that were drawn."""
    out = []
    for t in range(tokens.shape[1]):
        keep = 1 - is_first[:, t, None].to(h.dtype)
        h = plain_core(p, h * keep, z * keep.unsqueeze(-1), actions[:, t] * keep)
        x = torch.cat([h, tokens[:, t]], -1) @ p["post_in.weight"].T + p["post_in.bias"]
        x = F.silu(plain_norm(x, p["post_norm.weight"])) @ p["post_out.weight"].T + p["post_out.bias"]
        probs = 0.99 * torch.softmax(x.view(z.shape), -1) + 0.01 / z.shape[-1]
        z = chosen[:, t] + probs - probs.detach()
        out.append((h, z, probs.log()))
    return [torch.stack(x, 1) for x in zip(*out)]


@pytest.mark.parametrize("classes", [4, 20])
def test_observe_and_its_gradient_by_hand_against_autograd_through_a_plain_loop(classes):
    rssm, first = make_rssm(classes), torch.zeros(3, 7, dtype=torch.bool)
    first[0, 0] = first[1, 3] = first[2, 5] = first[2, 6] = True
    h, z = torch.randn(3, 24), d.sample_onehot(torch.full((3, 6, classes), 1 / classes))
    given = dict(tokens=torch.randn(3, 7, 5), actions=2 * torch.randn(3, 7, 3), **dict(rssm.named_parameters()))
    given = {k: v.requires_grad_() for k, v in given.items() if not k.startswith("prior")}
    got = rssm.observe(given["tokens"], given["actions"], first, h, z)
    assert [x.shape for x in got] == [(3, 7, 24), (3, 7, 6, classes), (3, 7, 6, classes)]
    chosen = got[1].detach().double()
    assert set(chosen.unique().tolist()) == {0, 1} and (chosen.sum(-1) == 1).all()
    p = {k: v.detach().double().requires_grad_() for k, v in given.items()}
    plain = plain_observe(p, p["tokens"], p["actions"], first, h.double(), z.double(), chosen)
    weights = [torch.randn_like(x) for x in got]
    gradients = []
    for xs, inputs in ((got, given), (plain, p)):
        gradients.append(torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, xs)), list(inputs.values())))
    for a, b in zip(got, plain):
        near(a.double(), b, rtol=1e-4, atol=1e-5)
    for name, a, b in zip(p, *gradients):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6, name


def test_observe_forgets_everything_at_is_first_and_does_not_see_the_future():
    rssm, first, zero = make_rssm(), torch.zeros(2, 6, dtype=torch.bool), torch.zeros(2, 6, dtype=torch.bool)
    tokens, actions, h, z = torch.randn(2, 6, 5), torch.randn(2, 6, 3), torch.randn(2, 24), torch.randn(2, 6, 4)
    first[0, 3] = True  # in the first sequence alone
    other = tokens.clone(), actions.clone()
    other[0][:, :3] += 1
    other[1][:, :4] += 1  # also the action that led to the first row
    run = lambda *x: rssm.observe(*x, generator=torch.Generator().manual_seed(0))  # noqa: E731
    one, two = run(tokens, actions, first, h, z), run(*other, first, h + 1, z + 1)
    for a, b in zip(one, two):
        assert torch.equal(a[0, 3:], b[0, 3:])
    assert (one[0][1, 3:] - two[0][1, 3:]).abs().max() > 1e-3
    near(one[0][1], run(tokens, actions, zero, h, z)[0][1])
    tokens[:, 4:], actions[:, 4:], first[:, 4:] = 7, 7, True
    assert all(torch.equal(a[:, :4], b[:, :4]) for a, b in zip(one, run(tokens, actions, first, h, z)))


def test_core_closed_forms():
    rssm, h, z = make_rssm(), torch.randn(7, 24), torch.randn(7, 6, 4)
    for size in (5.0, -1e6):  # large actions are divided by their size, which has no gradient
        near(rssm.core(h, z, torch.full((7, 3), size)), rssm.core(h, z, torch.full((7, 3), math.copysign(1, size))))
    assert rssm.prior(h).min() >= 0.0025 * (1 - 1e-5) and not any(x.any() for x in rssm.initial(3))
    for p in rssm.parameters():
        p.data.zero_()
    near(rssm.core(h, z, torch.randn(7, 3)), 0.7310586 * h)  # 1 - sigmoid(-1); without the gate's bias it is half


# ---- Sizes, policy, losses -------------------------------------------------------------------------------------------

SIZES = {"1m": 686_456, "12m": 10_492_616, "25m": 23_487_016, "50m": 41_646_984, "100m": 93_463_624}
SIZES |= {"200m": 165_942_536, "400m": 372_887_176}


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts(size):
    assert d.count_params(size) == d.count_params(d.make_config(size)) == SIZES[size]
    c, u = d.make_config(size), d.make_config(size)["units"]
    assert (c["deter"], c["hidden"], c["cnn_depth"], c["classes"], c["stoch"]) == (8 * u, u, u // 16, u // 16, 32)
    assert d.make_config(size, units=None, bins=63) == c | {"bins": 63}
    if size == "12m":
        box = lambda n: Box(-9, 9, (n,), np.float32)  # noqa: E731
        walker = Dict(height=box(1), orientations=box(14), velocity=box(9))
        assert d.count_params("1m", walker, SIX) == 640_867 and d.count_params(size, walker, SIX) == 9_738_019


@pytest.mark.parametrize("space", [Discrete(5), SIX], ids=["discrete", "continuous"])
def test_policy_against_torch_distributions(space):
    pol, feat = d.Policy(10, 8, space), 3 * torch.randn(4, 6, 10)
    near(pol(feat)[0], torch.full((4, 6, pol.out_dim), 0.2 if pol.discrete else 0.0), rtol=0, atol=0.1)  # at first
    for out in pol.outs:
        out.weight.data.normal_()
    params = pol(feat)
    logits = [out(pol.trunk(feat)) for out in pol.outs]
    if pol.discrete:
        near(params[0], 0.99 * torch.softmax(logits[0], -1) + 0.01 / 5)
        ref = torch.distributions.OneHotCategorical(probs=params[0])
        assert torch.equal(pol.sample(params, greedy=True), F.one_hot(params[0].argmax(-1), 5).float())
    else:
        near(params, d.bounded_normal(*logits))
        ref = torch.distributions.Independent(torch.distributions.Normal(*params), 1)
        assert torch.equal(pol.sample(params, greedy=True), params[0])
        assert d.bounded_normal(*torch.tensor([[9.0, 0], [-2, 1e4]]))[1].tolist() == pytest.approx([0.55, 1.0])
    action = pol.sample(params).detach()
    near(pol.log_prob(params, action), ref.log_prob(action), rtol=1e-4, atol=1e-4)
    near(pol.entropy(params), ref.entropy(), rtol=1e-4, atol=1e-5)


def test_world_model_losses():
    model = tiny_model()
    model.con.out.weight.data.zero_()
    model.con.out.bias.data.fill_(20.0)  # BCE with a large logit L is L * (1 - target)
    batch = tiny_batch(model)
    losses, h, z = seeded_losses(model, batch)
    assert set(losses) == {"recon_vector", "reward", "continue", "dynamics", "representation"}
    assert all(v.shape == (3, 5) for v in losses.values()) and h.shape == (3, 5, 32) and z.shape == (3, 5, 6, 4)
    alive = torch.full((3, 5), 20 / 333)
    alive[1, 2] = 20.0  # column t is row t + 1; a truncated row is as any other
    near(losses["continue"], alive, rtol=1e-3, atol=0)
    logp = torch.log_softmax(model.rew(torch.cat([h, z.flatten(-2)], -1)), -1)
    near(losses["reward"], -(d.two_hot(batch["reward"], model.bins)[:, 1:] * logp).sum(-1), rtol=1e-4, atol=1e-5)
    assert (seeded_losses(model, batch, kl_free=1e4)[0]["dynamics"] == 1e4).all()


def test_row_zero_is_context_only():
    model = tiny_model()
    batch = tiny_batch(model)
    losses, h, _ = seeded_losses(model, batch)
    changed = {k: v.clone() for k, v in batch.items()}
    changed["obs/vector"][:, 0], changed["reward"][:, 0], changed["action"][:, -1] = 5, 5, 0
    for k in ("is_first", "is_last", "is_terminal"):
        changed[k][:, 0] = True
    changed["deter"][:, 1:], changed["stoch"][:, 1:] = 0, 0  # latents of the rows that are trained on are computed anew
    other = seeded_losses(model, changed)[0]
    assert all(torch.equal(losses[k], other[k]) for k in losses)
    for k in ("deter", "stoch", "action"):  # its latents and its action lead to row 1
        changed = {n: v.clone() for n, v in batch.items()}
        changed[k][:, 0] = changed[k][:, 0] == 0
        assert not torch.equal(seeded_losses(model, changed)[1], h), k


def plain_nll(logits, y, bins):
    return d.two_hot_loss(logits, y.float(), bins).double()


def plain_mean(logits, bins):
    return (torch.softmax(logits.double(), -1) * bins.double()).sum(-1).detach()


@pytest.mark.parametrize("space", [Discrete(3), SIX], ids=["discrete", "continuous"])
def test_behavior_losses_against_a_slow_reference(space, monkeypatch):
    """Eq. 5 to 7 again, in float64 and rollouts first, from the features and actions that were imagined."""
    model, (B, T, H, lam) = tiny_model(space), (3, 5, 4, 0.95)
    batch, args, bins = tiny_batch(model), d.Args(imag_horizon=4, ent_coef=0.05), model.bins
    _, h, z = seeded_losses(model, batch)
    seen, imagine = [], model.imagine
    monkeypatch.setattr(model, "imagine", lambda *a, **k: (seen.append(imagine(*a, **k)), seen[-1])[1])
    losses, _ = d.behavior_loss(model, d.ReturnNorm(0.5, 0.01), batch, h, z, args)
    feats, actions = (x.transpose(0, 1) for x in seen[0])  # (N, H+1, F), (N, H, A)
    assert torch.equal(feats[:, 0], torch.cat([h, z.flatten(-2)], -1).flatten(0, 1)) and not feats.requires_grad
    p = {k: v.detach() for k, v in model.dyn.named_parameters()}
    for t in range(H):  # imagination follows the core
        h1, z1 = feats[:, t].split([32, 24], -1)
        near(feats[:, t + 1, :32], plain_core(p, h1, z1.unflatten(-1, (6, 4)), actions[:, t]), rtol=1e-4, atol=1e-5)

    r, v, slow = (plain_mean(head(feats), bins) for head in (model.rew, model.val, model.slow))
    c = torch.sigmoid(model.con(feats).double())[..., 0].detach()
    R = d.lambda_return(torch.zeros_like(c), 1 - c, r, v, v, 1.0, lam)
    lo, hi = 0.5 * np.quantile(R.numpy(), [0.05, 0.95])
    weight, scale = c.cumprod(1)[:, :H], max(0.01, hi - lo)  # the weight includes c_0
    assert scale > 0.011 and abs(scale - 1) > 0.01  # so that the division is seen
    params = model.pol(feats[:, :-1])
    log_prob, entropy = model.pol.log_prob(params, actions), model.pol.entropy(params)
    policy = -weight * (log_prob * (R - v[:, :H]) / scale + 0.05 * entropy)
    logits = model.val(feats[:, :-1])
    value = weight * (plain_nll(logits, R, bins) + plain_nll(logits, slow[:, :H], bins))
    near(losses["policy"].T.double(), policy, rtol=1e-3, atol=2e-4)
    near(losses["value"].T.double(), value, rtol=1e-3, atol=2e-4)

    feat = torch.cat([h, z.flatten(-2)], -1)
    last, term, rew = (batch[k][:, 1:] for k in ("is_last", "is_terminal", "reward"))
    target = slow_lambda_return(last, term, rew, R[:, 0].view(B, T), 1 - 1 / 333, lam)
    logits, slow = model.val(feat)[:, :-1], plain_mean(model.slow(feat), bins)[:, :-1]
    replayed = (plain_nll(logits, target, bins) + plain_nll(logits, slow, bins)) * (1 - last[:, :-1].double())
    near(losses["replay_value"].double(), replayed, rtol=1e-3, atol=2e-4)

    plain = {"policy": policy, "value": value, "replay_value": replayed}
    trained = {"policy": {"pol"}, "value": {"val"}, "replay_value": {"val", "dyn", "enc"}}
    names, weights = zip(*model.named_parameters())
    for p in weights:
        p.requires_grad_()  # also the slow critic, to see that nothing reaches it
    for k in plain:  # the same gradients: returns, weights and advantages are constants
        pair = [torch.autograd.grad(x[k].sum(), weights, retain_graph=True, allow_unused=True) for x in (losses, plain)]
        assert {n.split(".")[0] for n, g in zip(names, pair[0]) if g is not None and g.any()} == trained[k]
        for a, b in zip(*pair):
            a, b = (torch.zeros(1) if g is None else g for g in (a, b))
            assert (a - b).norm() <= 1e-3 * b.norm() + 2e-3


def make_learner(**flags):
    model = tiny_model()
    model.slow.load_state_dict(model.val.state_dict())
    flags = dict(imag_horizon=2, learning_rate=1e-3, warmup_updates=10) | flags
    return model, d.Learner(model, d.Args(**flags), torch.device("cpu"))


def test_update_trains_all_modules_with_one_weighted_loss(monkeypatch):
    model, learner = make_learner(agc_clip=1e9)
    batch, before = tiny_batch(model), {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(3)
    _, deter, stoch = learner.update(batch)
    assert deter.shape == (3, 5, 32) and deter.dtype == torch.bfloat16
    assert stoch.shape == (3, 5, 6) and stoch.dtype == torch.uint8
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # the first rate is 0
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(3)
    losses, h, z = d.world_model_loss(model, batch, learner.args)
    losses |= d.behavior_loss(model, d.ReturnNorm(), batch, h, z, learner.args)[0]
    scales = dict(representation=0.1, replay_value=0.3)
    total = sum(scales.get(k, 1.0) * v.mean() for k, v in losses.items())
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, g in zip(params, torch.autograd.grad(total, list(params.values()))):
        near(got[name], g, rtol=1e-4, atol=1e-6)
    slow = [p.clone() for p in model.slow.parameters()]
    learner.update(batch)
    learner.check()
    moved = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"enc", "dyn", "dec", "rew", "con", "pol", "val", "slow"}
    for s, now, fast in zip(slow, model.slow.parameters(), model.val.parameters()):
        near(now, 0.98 * s + 0.02 * fast)


def test_update_on_bad_numbers_changes_no_parameter_and_is_reported():
    model, learner = make_learner()
    batch = tiny_batch(model)
    learner.update(batch)
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("slow")}
    learner.update(batch | {"reward": batch["reward"] * math.nan})
    learner.update(batch)  # what comes after it changes nothing either
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    with pytest.raises(SystemExit, match="reward, replay_value"):
        learner.check()
