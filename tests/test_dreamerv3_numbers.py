"""Every formula of dreamerv3.py against closed forms and independent references.

Facts are those of DreamerV3 (Hafner et al., Nature 640:647-653, 2025; arXiv:2301.04104v2) and of its authors' code.
Where a plausible wrong variant exists, the test also checks that the variant would give another number."""

import io
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dreamerv3 as d

BOX = gym.spaces.Box(-1, 1, (3,), np.float32)
VECTOR = gym.spaces.Dict(vector=gym.spaces.Box(-np.inf, np.inf, (3,), np.float32))
IMAGE = gym.spaces.Dict(image=gym.spaces.Box(0, 255, (64, 64, 3), np.uint8))
SENSORS = dict(height=1, orientations=14, velocity=9)
WALKER = gym.spaces.Dict({k: gym.spaces.Box(-np.inf, np.inf, (n,), np.float32) for k, n in SENSORS.items()})
SIX = gym.spaces.Box(-1, 1, (6,), np.float32)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    np.random.seed(0)


def tiny_config(**overrides):
    tiny = dict(deter=32, hidden=16, units=16, cnn_depth=4, classes=4, stoch=6, blocks=4, mlp_layers=1)
    return d.make_config("1m", **(tiny | overrides))


def tiny_model(actions=None, **overrides):
    """A small model with all weights random, also those that start at 0, and reward and values of moderate size."""
    model = d.Dreamer(VECTOR, actions or gym.spaces.Discrete(3), tiny_config(**overrides))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.3)
        for head in (model.rew, model.val, model.slow):
            head.out.weight.normal_(std=0.5)
            head.out.bias.copy_(-0.5 * d.symlog(model.bins) ** 2)  # far atoms, up to 4.85e8, get no probability
    return model


def tiny_batch(model, B=3, T=5):
    """Random rows 0..T as replay returns them."""
    c, A = model.config, model.pol.out_dim
    action = torch.randn(B, T + 1, A).clamp(-1, 1)
    if model.pol.discrete:
        action = F.one_hot(torch.randint(A, (B, T + 1)), A).float()
    flags = {k: torch.zeros(B, T + 1, dtype=torch.bool) for k in ("is_first", "is_last", "is_terminal")}
    batch = {"obs/vector": torch.randn(B, T + 1, 3), "action": action, "reward": torch.randn(B, T + 1), **flags}
    deter, stoch = torch.randn(B, T + 1, c["deter"]), torch.randint(c["classes"], (B, T + 1, c["stoch"]))
    return batch | {"deter": deter.bfloat16(), "stoch": stoch.to(torch.uint8)}


# ---- symlog, two-hot -------------------------------------------------------------------------------------------------


def test_symlog_closed_forms():
    x = torch.tensor([0.0, math.e - 1, 1 - math.e, 1e6], dtype=torch.float64)
    expected = torch.tensor([0.0, 1.0, -1.0, math.log(1e6 + 1)], dtype=torch.float64)
    torch.testing.assert_close(d.symlog(x), expected, rtol=1e-14, atol=0)
    assert d.symlog(torch.tensor(0.0)) == 0


def test_symexp_closed_forms():
    assert float(d.symexp(torch.tensor(20.0, dtype=torch.float64))) == pytest.approx(4.85165194e8, rel=1e-8)
    assert float(d.symexp(torch.tensor(1.0))) == pytest.approx(math.e - 1, rel=1e-6)
    assert d.symexp(torch.tensor(0.0)) == 0


def test_symlog_is_odd_and_symexp_its_inverse():
    x = torch.randn(1000, dtype=torch.float64) * torch.logspace(-4, 6, 1000, dtype=torch.float64)
    assert torch.equal(d.symlog(-x), -d.symlog(x)) and torch.equal(d.symexp(-x / 1e6), -d.symexp(x / 1e6))
    torch.testing.assert_close(d.symexp(d.symlog(x)), x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(d.symlog(d.symexp(x.clamp(-20, 20))), x.clamp(-20, 20), rtol=1e-12, atol=1e-12)


def test_symlog_is_the_identity_near_zero():
    x = torch.tensor([-1e-6, 1e-6], dtype=torch.float64, requires_grad=True)
    y = d.symlog(x)
    torch.testing.assert_close(y, x, rtol=1e-5, atol=0)
    slope = torch.autograd.grad(y.sum(), x)[0]
    torch.testing.assert_close(slope, torch.ones_like(x), rtol=1e-5, atol=0)


@pytest.mark.parametrize("n", [41, 63, 127, 255])
def test_bins_are_increasing_antisymmetric_and_contain_zero(n):
    bins = d.make_bins(n)
    assert bins.shape == (n,) and bins.dtype == torch.float32
    assert (bins[1:] > bins[:-1]).all() and torch.equal(bins, -bins.flip(0))
    assert bins[n // 2] == 0 and not torch.signbit(bins[n // 2])


def test_bins_of_the_default_size():
    bins = d.make_bins(255)
    assert float(bins[128]) == pytest.approx(math.expm1(20 / 127), rel=1e-5) == pytest.approx(0.170558, abs=1e-6)
    assert float(bins[254]) == pytest.approx(4.85165184e8, rel=1e-7) and bins[0] == -bins[254]
    steps = d.symlog(bins.double()).diff()
    torch.testing.assert_close(steps, torch.full_like(steps, 20 / 127), rtol=1e-4, atol=0)


def test_bins_of_even_size_have_no_zero_atom():
    bins = d.make_bins(40)
    assert (
        bins.shape == (40,) and (bins != 0).all() and torch.equal(bins, -bins.flip(0)) and (bins[1:] > bins[:-1]).all()
    )


def test_two_hot_is_a_distribution_on_two_neighbours_with_the_right_mean():
    bins = d.make_bins()
    y = d.symexp(torch.empty(40, 50).uniform_(-19.9, 19.9))
    code = d.two_hot(y, bins)
    assert code.shape == (40, 50, 255) and (code >= 0).all()
    torch.testing.assert_close(code.sum(-1), torch.ones(40, 50), rtol=1e-6, atol=0)
    assert ((code > 0).sum(-1) <= 2).all()
    first = (code > 0).float().argmax(-1, keepdim=True)
    pair = code.gather(-1, first) + code.gather(-1, (first + 1).clamp(max=254)) * (first < 254)
    torch.testing.assert_close(pair[..., 0], torch.ones(40, 50), rtol=1e-6, atol=0)  # the two are adjacent
    torch.testing.assert_close((code.double() * bins.double()).sum(-1), y.double(), rtol=1e-5, atol=1e-6)


def test_two_hot_at_an_atom_is_one_hot():
    bins = d.make_bins()
    assert torch.equal(d.two_hot(bins, bins), torch.eye(255))
    assert d.two_hot(torch.tensor(0.0), bins).argmax() == 127


@pytest.mark.parametrize("k", [0, 100, 127, 128, 200, 253])
def test_two_hot_weights_are_linear_in_raw_value_space(k):
    bins = d.make_bins()
    code = d.two_hot((0.5 * (bins[k].double() + bins[k + 1].double())).float(), bins)
    assert code[k : k + 2].tolist() == pytest.approx([0.5, 0.5], abs=1e-5)
    low, mid, high = (d.symlog(x) for x in (bins[200], (bins[200] + bins[201]) / 2, bins[201]))
    assert abs((mid - low) / (high - low) - 0.5) > 0.01  # weights linear in symlog space would be seen


@pytest.mark.parametrize("y,index", [(1e9, 254), (1e30, 254), (math.inf, 254), (-1e9, 0), (-math.inf, 0)])
def test_two_hot_outside_the_range_is_one_hot_at_the_end(y, index):
    bins = d.make_bins()
    assert torch.equal(d.two_hot(torch.tensor([y]), bins)[0], torch.eye(255)[index])
    logits = torch.randn(1, 255)
    loss = d.two_hot_loss(logits, torch.tensor([y]), bins)
    torch.testing.assert_close(loss, -torch.log_softmax(logits, -1)[:, index])


@pytest.mark.parametrize("n", [41, 63, 127, 255, 1023])
def test_mean_of_zero_logits_is_exactly_zero(n):
    bins = d.make_bins(n)
    for shape in ((n,), (1, n), (7, n), (33, 5, n)):
        assert (d.two_hot_mean(torch.zeros(shape), bins) == 0).all()
    assert (d.two_hot_mean(torch.full((3, n), -4.7), bins) == 0).all()


def test_left_to_right_mean_of_zero_logits_would_not_be_zero():
    terms = (torch.softmax(torch.zeros(255), -1) * d.make_bins()).numpy()
    assert np.add.accumulate(terms)[-1] != 0  # what the previous test guards against


def test_two_hot_mean_properties():
    bins = d.make_bins()
    logits = 3 * torch.randn(50, 255) - 0.5 * d.symlog(bins) ** 2
    mean = d.two_hot_mean(logits, bins)
    assert mean.shape == (50,)
    exact = (torch.softmax(logits.double(), -1) * bins.double()).sum(-1)
    torch.testing.assert_close(mean.double(), exact, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(d.two_hot_mean(logits + 5, bins), mean, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(d.two_hot_mean(logits.flip(-1), bins), -mean, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(d.two_hot_mean(200 * torch.eye(255), bins), bins, rtol=1e-6, atol=0)


@pytest.mark.parametrize("y", [0.0, -3.0, 1e12])
def test_two_hot_loss_of_zero_logits_is_log_of_the_number_of_atoms(y):
    loss = d.two_hot_loss(torch.zeros(2, 255), torch.full((2,), y), d.make_bins())
    assert loss.tolist() == pytest.approx([5.541264] * 2, abs=1e-5) and math.log(255) == pytest.approx(
        5.541264, abs=1e-6
    )


def test_two_hot_loss_is_the_cross_entropy_and_its_gradient_softmax_minus_target():
    bins, y = d.make_bins(), d.symexp(torch.linspace(-22, 22, 60)).view(4, 15)
    logits = torch.randn(4, 15, 255, requires_grad=True)
    loss = d.two_hot_loss(logits, y, bins)
    assert loss.shape == (4, 15)
    torch.testing.assert_close(loss, -(d.two_hot(y, bins) * torch.log_softmax(logits, -1)).sum(-1))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(gradient, torch.softmax(logits, -1) - d.two_hot(y, bins), rtol=1e-4, atol=1e-6)


# ---- Categoricals and KL ---------------------------------------------------------------------------------------------


def test_unimix_closed_form():
    logits = torch.zeros(32)
    logits[0] = 1000.0
    probs = d.unimix_probs(logits)
    assert float(probs[0]) == pytest.approx(0.9903125, abs=1e-7)
    assert probs[1:].tolist() == pytest.approx([0.0003125] * 31, abs=1e-9)


@pytest.mark.parametrize("classes,eps", [(2, 0.01), (64, 0.01), (18, 0.1)])
def test_unimix_sums_to_one_above_its_floor(classes, eps):
    probs = d.unimix_probs(50 * torch.randn(100, classes), eps)
    torch.testing.assert_close(probs.sum(-1), torch.ones(100), rtol=1e-5, atol=0)
    assert (probs >= eps / classes * (1 - 1e-5)).all()
    logits = torch.randn(5, classes)
    torch.testing.assert_close(d.unimix_probs(logits, 0.0), torch.softmax(logits, -1))


def test_sample_onehot_is_exactly_one_hot_with_and_without_gradient():
    for grad in (False, True):
        probs = torch.softmax(torch.randn(500, 7), -1).requires_grad_(grad)
        z = d.sample_onehot(probs).detach()
        assert z.shape == probs.shape and ((z == 0) | (z == 1)).all() and (z.sum(-1) == 1).all()


def test_sample_onehot_frequencies():
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.0, 0.05, 0.25]])
    mean = d.sample_onehot(p.expand(200_000, 2, 4)).mean(0)
    torch.testing.assert_close(mean, p, rtol=0, atol=0.005)
    assert mean[1, 1] == 0


def test_sample_onehot_groups_are_independent():
    z = d.sample_onehot(torch.full((100_000, 2, 2), 0.5))
    assert float((z[:, 0, 0] * z[:, 1, 0]).mean()) == pytest.approx(0.25, abs=0.01)


def test_sample_onehot_with_given_noise_inverts_the_distribution_function():
    p = torch.tensor([0.25, 0.5, 0.25])
    u = torch.tensor([0.0, 0.24, 0.25, 0.74, 0.75, 0.9999999])
    assert d.sample_onehot(p.expand(6, 3), u).argmax(-1).tolist() == [0, 0, 1, 1, 2, 2]
    rounded = torch.full((3,), 0.33)  # sums to less than 1: the last class takes the rest
    assert d.sample_onehot(rounded[None], torch.tensor([0.9999])).argmax() == 2


def test_sample_onehot_gradient_is_straight_through_the_probabilities():
    probs, w = torch.softmax(torch.randn(20, 5), -1).requires_grad_(), torch.randn(20, 5)
    (gradient,) = torch.autograd.grad((w * d.sample_onehot(probs)).sum(), probs)
    assert torch.equal(gradient, w)


def test_kl_categorical_against_torch():
    p, q = torch.randn(8, 5, 6, dtype=torch.float64) * 2, torch.randn(8, 5, 6, dtype=torch.float64) * 2
    C = torch.distributions.Categorical
    expected = torch.distributions.kl_divergence(C(logits=p), C(logits=q))
    torch.testing.assert_close(d.kl_categorical(p, q).double(), expected, rtol=1e-4, atol=1e-5)
    assert (d.kl_categorical(p, q) - d.kl_categorical(q, p)).abs().max() > 0.1  # the order matters


def test_kl_categorical_closed_form():
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    assert float(d.kl_categorical(p, q)) == pytest.approx(0.5 * math.log(0.25 / 0.09), rel=1e-5)


def test_kl_loss_of_equal_logits_is_one_nat_without_gradient():
    logits = torch.randn(2, 3, 4, 5)
    post, prior = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    dyn, rep = d.kl_loss(post, prior)
    assert dyn.tolist() == rep.tolist() == [[1.0] * 3] * 2
    gradients = torch.autograd.grad((dyn + rep).sum(), (post, prior))
    assert all((g == 0).all() for g in gradients)


def test_kl_loss_gradients_are_balanced_by_stop_gradients():
    post, prior = (3 * torch.randn(2, 3, 4, 5)).requires_grad_(), (3 * torch.randn(2, 3, 4, 5)).requires_grad_()
    dyn, rep = d.kl_loss(post, prior)
    assert dyn.shape == (2, 3) and (dyn > 1).all() and torch.equal(dyn, rep)
    g_post, g_prior = torch.autograd.grad(dyn.sum(), (post, prior), allow_unused=True, retain_graph=True)
    p, q = torch.softmax(post, -1).detach(), torch.softmax(prior, -1).detach()
    assert g_post is None or (g_post == 0).all()
    torch.testing.assert_close(g_prior, q - p, rtol=1e-4, atol=1e-5)
    g_post, g_prior = torch.autograd.grad(rep.sum(), (post, prior), allow_unused=True)
    ratio = p.log() - q.log()
    assert g_prior is None or (g_prior == 0).all()
    torch.testing.assert_close(g_post, p * (ratio - (p * ratio).sum(-1, keepdim=True)), rtol=1e-3, atol=1e-5)


def test_free_nats_clip_each_step_after_the_sum_over_groups():
    prior = torch.zeros(1, 2, 4, 2)
    post = torch.zeros(1, 2, 4, 2)
    post[0, 1, :, 0] = 30.0  # step 0: KL 0; step 1: 4 groups of ln 2 = 0.69, each below 1 nat by itself
    dyn, rep = d.kl_loss(post, prior)
    assert dyn[0].tolist() == pytest.approx([1.0, 4 * math.log(2)], rel=1e-5)
    assert rep[0].tolist() == pytest.approx([1.0, 4 * math.log(2)], rel=1e-5)
    after_mean = max(1.0, (0 + 4 * math.log(2)) / 2)
    assert abs(float(dyn.mean()) - after_mean) > 0.4  # clipping the mean would be another loss


@pytest.mark.parametrize("free,has_gradient", [(1.0, False), (0.3, True), (0.0, True)])
def test_no_gradient_below_the_free_nats(free, has_gradient):
    post, prior = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2)
    post[..., 0] = 20.0  # KL = ln 2 = 0.69
    post.requires_grad_(), prior.requires_grad_()
    dyn, _ = d.kl_loss(post, prior, free)
    (gradient,) = torch.autograd.grad(dyn.sum(), prior)
    assert bool((gradient != 0).any()) == has_gradient
    assert float(dyn.detach()) == pytest.approx(max(free, math.log(2)), rel=1e-5)


# ---- Returns ---------------------------------------------------------------------------------------------------------


def slow_lambda_return(last, term, rew, boot, disc, lam):
    """The recursion, one number at a time."""
    B, T = rew.shape
    out = np.zeros((B, T - 1))
    for b in range(B):
        later = float(boot[b, T - 1])
        for t in reversed(range(T - 1)):
            mixed = (1 - lam) * float(boot[b, t + 1]) + lam * later
            if last[b, t + 1]:
                mixed = float(boot[b, t + 1])
            later = float(rew[b, t + 1]) + disc * (1 - float(term[b, t + 1])) * mixed
            out[b, t] = later
    return out


@pytest.mark.parametrize("disc,lam", [(1 - 1 / 333, 0.95), (1.0, 1.0), (0.9, 0.0), (0.5, 0.5)])
def test_lambda_return_against_a_slow_loop(disc, lam):
    B, T = 6, 12
    rew, val, boot = torch.randn(3, B, T).unbind(0)
    last = torch.rand(B, T) < 0.3
    term = last & (torch.rand(B, T) < 0.5)
    got = d.lambda_return(last, term, rew, val, boot, disc, lam)
    assert got.shape == (B, T - 1)
    np.testing.assert_allclose(got.numpy(), slow_lambda_return(last, term, rew, boot, disc, lam), rtol=1e-4, atol=1e-5)


def test_lambda_return_counts_the_steps_left():
    zero, one = torch.zeros(2, 7), torch.ones(2, 7)
    assert d.lambda_return(zero, zero, one, zero, zero, 1.0, 1.0)[0].tolist() == [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]


def test_lambda_return_at_lambda_zero_is_one_step():
    zero, rew, boot = torch.zeros(2, 7), torch.randn(2, 7), torch.randn(2, 7)
    got = d.lambda_return(zero, zero, rew, zero, boot, 0.9, 0.0)
    torch.testing.assert_close(got, rew[:, 1:] + 0.9 * boot[:, 1:])


def test_lambda_return_is_the_mixture_of_n_step_returns():
    rew, boot, disc, lam, T = torch.randn(1, 5), torch.randn(1, 5), 0.9, 0.8, 5
    zero = torch.zeros(1, 5)
    n_step = [sum(disc**k * float(rew[0, k + 1]) for k in range(n)) + disc**n * float(boot[0, n]) for n in range(1, T)]
    weights = [(1 - lam) * lam ** (n - 1) for n in range(1, T - 1)] + [lam ** (T - 2)]
    got = d.lambda_return(zero, zero, rew, zero, boot, disc, lam)[0, 0]
    assert float(got) == pytest.approx(sum(w * g for w, g in zip(weights, n_step, strict=True)), rel=1e-5)


@pytest.mark.parametrize("terminal", [True, False])
def test_lambda_return_ends_at_a_terminal_and_bootstraps_at_a_truncation(terminal):
    rew, boot, last, term = torch.randn(1, 6), torch.randn(1, 6), torch.zeros(1, 6), torch.zeros(1, 6)
    last[0, 3], term[0, 3] = 1, terminal
    got = d.lambda_return(last, term, rew, torch.zeros(1, 6), boot, 0.9, 0.95)
    expected = float(rew[0, 3]) + (0 if terminal else 0.9 * float(boot[0, 3]))
    assert float(got[0, 2]) == pytest.approx(expected, rel=1e-6)
    rew[0, 4:], boot[0, 4:] = 100, 100  # nothing after the end is seen before it
    assert torch.equal(d.lambda_return(last, term, rew, torch.zeros(1, 6), boot, 0.9, 0.95)[0, :3], got[0, :3])


def test_lambda_return_takes_the_discount_from_the_continue_probability():
    cont = torch.tensor([[0.3, 0.9, 0.5]])
    rew, boot = torch.tensor([[7.0, 1.0, 2.0]]), torch.tensor([[5.0, 10.0, 20.0]])
    got = d.lambda_return(torch.zeros(1, 3), 1 - cont, rew, boot, boot, 1.0, 0.95)[0]
    second = 2 + 0.5 * 20
    assert got.tolist() == pytest.approx([1 + 0.9 * (0.05 * 10 + 0.95 * second), second], rel=1e-6)


def test_return_norm_first_updates_are_not_debiased():
    norm = d.ReturnNorm()
    assert float(norm.update(torch.full((4, 5), 100.0))) == 1.0
    assert float(norm.lo) == pytest.approx(1.0) and float(norm.hi) == pytest.approx(1.0)
    norm = d.ReturnNorm()
    assert float(norm.update(torch.linspace(0, 100, 101))) == 1.0
    assert float(norm.lo) == pytest.approx(0.05, rel=1e-5) and float(norm.hi) == pytest.approx(0.95, rel=1e-5)


def test_return_norm_converges_to_the_range_between_the_percentiles():
    norm, returns = d.ReturnNorm(), torch.linspace(0, 100, 101)[torch.randperm(101)]
    for _ in range(1000):
        scale = norm.update(returns)
    assert float(scale) == pytest.approx(90 * (1 - 0.99**1000), rel=1e-4)
    assert float(norm.scale()) == float(scale)


def test_return_norm_gives_the_scale_after_the_update():
    scale = d.ReturnNorm().update(torch.linspace(-10_000, 0, 101))
    assert float(scale) == pytest.approx(90.0, rel=1e-5)  # before the update it would be 1


def test_return_norm_never_scales_up_beyond_the_limit():
    norm = d.ReturnNorm(rate=1.0, limit=1.0)
    assert float(norm.update(torch.linspace(0, 0.1, 50))) == 1.0
    assert float(d.ReturnNorm(rate=1.0, limit=0.01).update(torch.linspace(0, 0.1, 101))) == pytest.approx(
        0.09, rel=1e-4
    )


# ---- Optimizer -------------------------------------------------------------------------------------------------------


def tensor_of_norm(norm, *shape):
    x = torch.randn(*shape)
    return x * (norm / x.norm())


@pytest.mark.parametrize(
    "p,g,expected",
    [(2.0, 6.0, 0.6), (2.0, 0.6, 0.6), (2.0, 0.5, 0.5), (0.0, 5.0, 3e-4), (1e-5, 1.0, 3e-4), (0.0, 1e-4, 1e-4)],
)
def test_agc_limits_the_gradient_norm_relative_to_the_parameter_norm(p, g, expected):
    param, grad = tensor_of_norm(p, 4, 5), tensor_of_norm(g, 4, 5)
    before = grad.clone()
    norms = d.agc_([grad], [param])
    assert float(grad.norm()) == pytest.approx(expected, rel=1e-4) and float(norms[0]) == pytest.approx(g, rel=1e-5)
    torch.testing.assert_close(grad, before * (expected / g), rtol=1e-4, atol=1e-9)  # only the length changes


def test_agc_takes_norms_of_whole_tensors_one_by_one():
    params = [torch.eye(4), torch.full((3,), 10.0)]
    grads = [torch.zeros(4, 4), torch.ones(3)]
    grads[0][0] = 0.25  # norm 0.5 <= 0.3 * 2; row by row the limit would be 0.3
    copies = [g.clone() for g in grads]
    d.agc_(grads, params)
    assert all(torch.equal(a, b) for a, b in zip(grads, copies, strict=True))
    assert float(copies[0][0].norm()) > 0.3
    grads[0] *= 100  # clipping one tensor leaves the others alone
    d.agc_(grads, params)
    assert float(grads[0].norm()) == pytest.approx(0.6, rel=1e-5) and torch.equal(grads[1], copies[1])


@pytest.mark.parametrize("step,share", [(0, 0.0), (1, 0.001), (500, 0.5), (1000, 1.0), (10**7, 1.0)])
def test_learning_rate_warms_up_linearly_from_exactly_zero(step, share):
    assert float(d.lr_at(step, 4e-5, 1000)) == pytest.approx(4e-5 * share, rel=1e-6, abs=0)
    assert float(d.lr_at(torch.tensor(step, dtype=torch.float64), 4e-5, 1000)) == pytest.approx(
        4e-5 * share, rel=1e-6, abs=0
    )


def run_laprop(grads, lr=0.01, oks=None, rates=None, **kwargs):
    """Parameters after each of a list of gradients, from 0."""
    p = torch.nn.Parameter(torch.zeros(grads[0].shape))
    opt, path = d.LaProp([p], lr=lr, **kwargs), []
    for t, g in enumerate(grads):
        p.grad = g.clone()
        opt.step(rates and rates[t], None if oks is None else torch.tensor(oks[t]))
        path.append(p.detach().clone())
    return torch.stack(path), opt


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6])
def test_laprop_first_step_is_the_learning_rate_times_the_sign(scale):
    g = torch.randn(100) * scale
    path, _ = run_laprop([g])
    torch.testing.assert_close(path[0], -0.01 * g.sign(), rtol=1e-4, atol=0)


def test_laprop_does_not_see_the_scale_of_the_gradients():
    grads = [torch.randn(50) for _ in range(30)]
    big, _ = run_laprop(grads)
    small, _ = run_laprop([g * 1e-6 for g in grads])
    torch.testing.assert_close(small, big, rtol=1e-3, atol=1e-6)
    loose, _ = run_laprop([g * 1e-6 for g in grads], eps=1e-5)
    assert (loose - big).abs().max() > 0.01  # a usual eps would be seen


def test_laprop_constant_gradient_moves_by_the_learning_rate_for_ever():
    path, _ = run_laprop([torch.tensor([3.0, -0.02])] * 200)
    steps = torch.diff(path, dim=0, prepend=torch.zeros(1, 2))
    torch.testing.assert_close(steps, torch.tensor([-0.01, 0.01]).expand(200, 2), rtol=1e-2, atol=0)


def test_laprop_against_a_slow_reference_while_the_learning_rate_changes():
    grads = [torch.randn(20, dtype=torch.float64) * 10 ** (t % 5) for t in range(40)]
    rates = [0.01 * (t + 1) / 40 for t in range(40)]
    p, mu, nu, folded, adam, mom = (torch.zeros(20, dtype=torch.float64) for _ in range(6))
    p_folded, p_adam = p.clone(), p.clone()
    for t, (g, lr) in enumerate(zip(grads, rates, strict=True), 1):
        nu = 0.999 * nu + 0.001 * g**2
        scale = (nu / (1 - 0.999**t)).sqrt() + 1e-20
        mu = 0.9 * mu + 0.1 * g / scale
        p = p - lr * mu / (1 - 0.9**t)
        folded = 0.9 * folded + 0.1 * lr * g / scale  # variant: learning rate inside the momentum
        p_folded = p_folded - folded / (1 - 0.9**t)
        mom = 0.9 * mom + 0.1 * g  # variant: Adam, momentum before normalisation
        p_adam = p_adam - lr * mom / (1 - 0.9**t) / scale
    path, _ = run_laprop([g.float() for g in grads], rates=rates)
    torch.testing.assert_close(path[-1].double(), p, rtol=1e-3, atol=1e-6)
    assert (p_folded - p).abs().max() > 1e-3 and (p_adam - p).abs().max() > 1e-3


def test_laprop_leaves_parameters_without_gradient_alone():
    path, _ = run_laprop([torch.tensor([0.0, 1.0])] * 5)
    assert (path[:, 0] == 0).all() and (path[:, 1] < 0).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1.0])
@pytest.mark.parametrize("before", [0, 3])
def test_laprop_with_ok_false_changes_nothing_bit_for_bit(poison, before):
    p = torch.nn.Parameter(torch.randn(64))
    opt = d.LaProp([p], lr=0.01)
    for _ in range(before):
        p.grad = torch.randn(64)
        opt.step()
    copies = [
        x.detach().clone() for x in (p, *opt.state_dict()["mu"], *opt.state_dict()["nu"], opt.state_dict()["count"])
    ]
    p.grad = torch.full((64,), poison)
    opt.step(0.01, torch.tensor(False))
    now = [p.detach(), *opt.state_dict()["mu"], *opt.state_dict()["nu"], opt.state_dict()["count"]]
    assert all(torch.equal(a, b) for a, b in zip(copies, now, strict=True))


def test_laprop_goes_on_after_a_skipped_step_as_if_it_had_not_been():
    grads = [torch.randn(10) for _ in range(6)]
    plain, _ = run_laprop(grads)
    bad = torch.full((10,), math.nan)
    skipped, _ = run_laprop([*grads[:3], bad, *grads[3:]], oks=[True] * 3 + [False] + [True] * 3)
    assert torch.equal(skipped[-1], plain[-1]) and torch.equal(skipped[3], skipped[2])


def test_laprop_state_dict_roundtrip():
    grads = [torch.randn(10) for _ in range(8)]
    path, _ = run_laprop(grads)
    half, opt = run_laprop(grads[:4])
    p = torch.nn.Parameter(half[-1].clone())
    other = d.LaProp([p], lr=0.01)
    other.load_state_dict(
        {k: [x.clone() for x in v] if isinstance(v, list) else v.clone() for k, v in opt.state_dict().items()}
    )
    for g in grads[4:]:
        p.grad = g.clone()
        other.step()
    assert torch.equal(p.detach(), path[-1])


# ---- Layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.0, 0.01, -3.0, 1e3])
def test_rms_norm_of_a_constant(c):
    norm = d.RMSNorm(16)
    expected = c / math.sqrt(c**2 + 1e-4)  # eps inside the root, mean not subtracted (a LayerNorm would give 0)
    assert norm(torch.full((2, 16), c)).flatten().tolist() == pytest.approx([expected] * 32, rel=1e-5)


def test_rms_norm_has_a_scale_and_no_shift():
    norm = d.RMSNorm(5)
    assert [n for n, _ in norm.named_parameters()] == ["weight"] and torch.equal(norm.weight, torch.ones(5))
    with torch.no_grad():
        norm.weight.copy_(torch.arange(5.0))
    x = torch.randn(7, 5)
    expected = x / (x.double().pow(2).mean(-1, keepdim=True) + 1e-4).sqrt().float() * torch.arange(5.0)
    torch.testing.assert_close(norm(x), expected)


def test_rms_norm_statistics_are_float32_also_for_bfloat16_inputs():
    x = torch.ones(1, 4096, dtype=torch.bfloat16)  # added up in bfloat16, the squares would stop at 256
    torch.testing.assert_close(d.RMSNorm(4096)(x).float(), torch.ones(1, 4096), rtol=2**-7, atol=0)


def test_block_linear_blocks_are_separate():
    layer = d.BlockLinear(24, 16, 4)
    assert layer.weight.shape == (4, 6, 4) and layer.weight.numel() == 24 * 16 // 4 and layer.bias.shape == (16,)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x[None])[0], torch.randn(24))  # (16, 24)
    same = torch.arange(16)[:, None] // 4 == torch.arange(24)[None] // 6
    assert (jacobian[~same] == 0).all() and (jacobian[same] != 0).all()
    torch.testing.assert_close(jacobian[4:8, 6:12], layer.weight[1].T)


def test_block_linear_with_shared_inputs_equals_the_concatenation_in_each_block():
    layer = d.BlockLinear(8 + 4 * 3, 12, 4)
    with torch.no_grad():
        layer.bias.normal_()
    x, shared = torch.randn(5, 8), torch.randn(5, 3)
    parts = [torch.cat([x[:, 2 * g : 2 * g + 2], shared], -1) @ layer.weight[g] for g in range(4)]
    torch.testing.assert_close(layer(x, shared), torch.cat(parts, -1) + layer.bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "block", "conv", "up"])
def test_initial_weights_have_unit_gain_over_the_whole_fan_in(kind):
    make = {
        "linear": lambda: (d.Linear(1024, 1024), 1024),
        "block": lambda: (d.BlockLinear(4096, 2048, 8), 4096),  # a fan-in per block would give sqrt(8)
        "conv": lambda: (d.Encoder(IMAGE, 8, 64).convs[2], 25 * 192),
        "up": lambda: (d.UpConv(192, 256), 25 * 192),
    }
    layer, fan_in = make[kind]()
    gain = float(layer.weight.detach().std()) * math.sqrt(fan_in)
    assert gain == pytest.approx(1.0, abs=0.003) and (layer.bias == 0).all()
    largest = float(layer.weight.detach().abs().max()) * math.sqrt(fan_in)
    assert 2.2 < largest <= 2 * 1.1369  # truncated at two standard deviations


def test_outscale_multiplies_the_kernel():
    assert float(d.Linear(512, 512, 0.01).weight.detach().std()) * math.sqrt(512) == pytest.approx(0.01, rel=0.01)
    assert (d.MLP(8, 16, 1, 5, outscale=0.0)(torch.randn(3, 8)) == 0).all()


def test_mlp_is_linear_then_norm_then_silu():
    mlp, x = d.MLP(6, 8, 2, 3), torch.randn(4, 6)
    y = x
    for linear, norm in zip(mlp.linears, mlp.norms, strict=True):
        y = linear(y)
        y = y / (y.pow(2).mean(-1, keepdim=True) + 1e-4).sqrt() * norm.weight
        y = y * torch.sigmoid(y)
    torch.testing.assert_close(mlp(x), mlp.out(y), rtol=1e-5, atol=1e-6)
    assert d.MLP(6, 8, 2)(x).shape == (4, 8)


@pytest.mark.parametrize("i,o,h,w", [(3, 5, 4, 4), (8, 1, 3, 3), (1, 2, 1, 5), (2, 3, 7, 6)])
def test_upconv_equals_upsampling_then_convolution(i, o, h, w):
    layer, x = d.UpConv(i, o).double(), torch.randn(2, i, h, w, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        layer.bias.normal_()
    up = F.interpolate(x, scale_factor=2, mode="nearest")
    got, expected = layer(x), F.conv2d(up, layer.weight, layer.bias, padding=2)
    assert got.shape == (2, o, 2 * h, 2 * w)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    swapped = F.conv2d(up, layer.weight.transpose(2, 3), layer.bias, padding=2)
    assert (swapped - expected).abs().max() > 1e-3
    m = torch.randn_like(got)
    for a, b in zip(
        *(torch.autograd.grad((m * y).sum(), (x, layer.weight, layer.bias)) for y in (got, expected)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "size,stages",
    [
        (64, (2, 3, 4, 4)),
        (96, (2, 3, 4, 4)),
        (48, (2, 3, 4, 4)),
        (256, (2, 3, 4, 4)),
        (32, (2, 3, 4)),
        (16, (2, 3)),
        (8, (2,)),
    ],
)
def test_image_stages(size, stages):
    assert d.image_stages(size) == stages and 3 <= size >> len(stages) <= 16


# ---- Encoder and decoder ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size,side", [(64, 4), (96, 6)])
def test_encoder_image_features(size, side):
    enc = d.Encoder(gym.spaces.Dict(image=gym.spaces.Box(0, 255, (size, size, 3), np.uint8)), 8, 4)
    image = torch.randint(256, (1, 2, size, size, 3), dtype=torch.uint8)
    assert enc.out_dim == side**2 * 4 * 4 and enc({"image": image}).shape == (1, 2, enc.out_dim)


def reference_encoder(enc, image, order):
    x = (image.float() / 255 - 0.5).permute(0, 3, 1, 2)
    for conv, norm in zip(enc.convs, enc.norms, strict=True):
        x = F.conv2d(x, conv.weight, conv.bias, padding=2)
        for step in order:
            if step == "pool":
                x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))
            elif step == "norm":
                x = x / (x.pow(2).mean(1, keepdim=True) + 1e-4).sqrt() * norm.weight.view(-1, 1, 1)
            else:
                x = x * torch.sigmoid(x)
    return x.permute(0, 2, 3, 1).flatten(1)  # H, W, C


def test_encoder_pools_then_normalises_then_activates():
    enc = d.Encoder(gym.spaces.Dict(image=gym.spaces.Box(0, 255, (32, 32, 3), np.uint8)), 8, 4)
    image = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    got = enc({"image": image[None]})[0]
    torch.testing.assert_close(got, reference_encoder(enc, image, ("pool", "norm", "silu")), rtol=1e-3, atol=1e-4)
    for order in (("norm", "pool", "silu"), ("norm", "silu", "pool"), ("pool", "silu", "norm")):
        assert (got - reference_encoder(enc, image, order)).abs().max() > 0.01


def test_encoder_sees_the_level_of_an_image():
    enc = d.Encoder(gym.spaces.Dict(image=gym.spaces.Box(0, 255, (16, 16, 1), np.uint8)), 8, 4)
    dark, light = (enc({"image": torch.full((1, 1, 16, 16, 1), v, dtype=torch.uint8)}) for v in (50, 200))
    assert (dark - light).abs().max() > 0.01


def test_encoder_vectors_are_symlogged_integers_one_hot_keys_sorted():
    box = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    enc = d.Encoder(gym.spaces.Dict(b=gym.spaces.Discrete(4), c=box, a=box), 8, 4, 1)
    seen = []
    enc.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    a, c = torch.tensor([[[100.0, -5.0]]]), torch.tensor([[[0.5, 1e6]]])
    assert enc({"c": c, "a": a, "b": torch.tensor([[2]])}).shape == (1, 1, 8)
    expected = torch.cat([d.symlog(a), torch.tensor([[[0.0, 0.0, 1.0, 0.0]]]), d.symlog(c)], -1)
    torch.testing.assert_close(seen[0], expected)


def test_encoder_puts_vector_features_before_image_tokens():
    box = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    enc = d.Encoder(gym.spaces.Dict(a=gym.spaces.Box(0, 255, (16, 16, 3), np.uint8), b=box), 8, 4, 1)
    obs = {"a": torch.zeros(1, 1, 16, 16, 3, dtype=torch.uint8), "b": torch.randn(1, 1, 2)}
    one, two = enc(obs), enc(obs | {"b": obs["b"] + 1})
    assert one.shape[-1] == enc.out_dim == 8 + 16 * 12
    assert torch.equal(one[..., 8:], two[..., 8:]) and not torch.equal(one[..., :8], two[..., :8])


def test_decoder_outputs():
    space = gym.spaces.Dict(
        image=gym.spaces.Box(0, 255, (32, 32, 3), np.uint8),
        map=gym.spaces.Box(0, 255, (32, 32, 1), np.uint8),
        number=gym.spaces.Discrete(5),
        vector=gym.spaces.Box(-np.inf, np.inf, (7,), np.float32),
    )
    dec = d.Decoder(space, 32, 6 * 4, 16, 4, 1, 4)
    out = dec(torch.randn(2, 3, 32), torch.randn(2, 3, 6, 4))
    shapes = {k: tuple(v.shape[2:]) for k, v in out.items()}
    assert shapes == {"image": (32, 32, 3), "map": (32, 32, 1), "number": (5,), "vector": (7,)}
    assert all(((out[k] > 0) & (out[k] < 1)).all() for k in ("image", "map"))  # sigmoid


def test_decoder_blocks_of_h_own_channels_at_all_positions():
    dec = d.Decoder(gym.spaces.Dict(image=gym.spaces.Box(0, 255, (16, 16, 3), np.uint8)), 32, 24, 16, 4, 1, 4)
    seen = []
    dec.norms[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    h, z = torch.randn(1, 1, 32), torch.randn(1, 1, 6, 4)
    dec(h, z)
    h[..., 8:16] += 1.0  # block 1
    dec(h, z)
    changed = (seen[0] != seen[1])[0]  # (4, 4, 12): 3 channels per block
    assert (
        changed.shape == (4, 4, 12)
        and changed[..., 3:6].all()
        and not changed[..., :3].any()
        and not changed[..., 6:].any()
    )


def test_recon_loss_of_white_against_black_is_the_number_of_pixels():
    loss = d.recon_loss(torch.ones(2, 3, 64, 64, 3), torch.zeros(2, 3, 64, 64, 3, dtype=torch.uint8))
    assert loss.tolist() == [[12288.0] * 3] * 2
    assert d.recon_loss(torch.ones(1, 1, 64, 64, 3), torch.full((1, 1, 64, 64, 3), 255, dtype=torch.uint8)).item() == 0


def test_recon_loss_of_vectors_sums_squares_in_symlog_space():
    target = torch.tensor([[[math.e - 1, 0.0, -(math.e**2 - 1)]]])
    assert float(d.recon_loss(torch.zeros(1, 1, 3), target)) == pytest.approx(1 + 0 + 4, rel=1e-5)


def test_recon_loss_of_integers_is_a_cross_entropy():
    logits, target = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    expected = -torch.log_softmax(logits, -1).gather(-1, target[..., None])[..., 0]
    torch.testing.assert_close(d.recon_loss(logits, target), expected)


# ---- RSSM ------------------------------------------------------------------------------------------------------------


def make_rssm(embed=5, actions=3):
    rssm = d.RSSM(embed, actions, deter=24, hidden=8, stoch=6, classes=4, blocks=4)
    with torch.no_grad():
        for name, p in rssm.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    return rssm


def test_core_with_zero_weights_keeps_most_of_the_state():
    rssm = make_rssm()
    with torch.no_grad():
        for p in rssm.parameters():
            p.zero_()
    h = torch.randn(7, 24)
    got = rssm.core(h, torch.randn(7, 6, 4), torch.randn(7, 3))
    torch.testing.assert_close(got, 0.7310586 * h, rtol=1e-5, atol=1e-7)  # 1 - sigmoid(-1); without the bias it is half


def reference_core(rssm, h, z, a, chunk="block"):
    """The block GRU in plain loops over blocks."""
    norm = lambda x, w: x / (x.pow(2).mean(-1, keepdim=True) + 1e-4).sqrt() * w  # noqa: E731
    a = a / a.abs().clamp(min=1)
    inputs = ((rssm.in_h, h), (rssm.in_z, z.flatten(1)), (rssm.in_a, a))
    x = [F.silu(norm(m.linears[0](v), m.norms[0].weight)) for m, v in inputs]
    G, n = 4, h.shape[1] // 4
    x = [torch.cat([h[:, g * n : (g + 1) * n], *x], -1) @ rssm.core_in.weight[g] for g in range(G)]
    x = F.silu(norm(torch.cat(x, -1) + rssm.core_in.bias, rssm.core_norm.weight))
    gates = [x[:, g * n : (g + 1) * n] @ rssm.core_gates.weight[g] for g in range(G)]
    gates = torch.cat(gates, -1) + rssm.core_gates.bias  # (N, 3D), block after block
    if chunk == "block":
        blocks = gates.split(3 * n, -1)
        reset, cand, update = (torch.cat([b[:, i * n : (i + 1) * n] for b in blocks], -1) for i in range(3))
    else:
        reset, cand, update = gates.chunk(3, -1)
    update = torch.sigmoid(update - 1)
    return update * torch.tanh(torch.sigmoid(reset) * cand) + (1 - update) * h


def test_core_against_a_slow_reference():
    rssm = make_rssm()
    h, z, a = torch.randn(7, 24), torch.randn(7, 6, 4), 2 * torch.randn(7, 3)
    got = rssm.core(h, z, a)
    torch.testing.assert_close(got, reference_core(rssm, h, z, a), rtol=1e-4, atol=1e-5)
    assert (got - reference_core(rssm, h, z, a, "global")).abs().max() > 0.05  # gates are split inside each block
    torch.testing.assert_close(rssm.core(h, z.flatten(1), a), got)


@pytest.mark.parametrize("action", [5.0, -5.0, 1e6])
def test_core_divides_large_actions_by_their_size(action):
    rssm, h, z = make_rssm(), torch.randn(2, 24), torch.randn(2, 6, 4)
    a = torch.full((2, 3), action)
    torch.testing.assert_close(rssm.core(h, z, a), rssm.core(h, z, a.sign()))
    assert (rssm.core(h, z, a.sign() / 2) - rssm.core(h, z, a.sign())).abs().max() > 1e-3  # small ones pass unchanged


def test_core_action_divisor_has_no_gradient():
    rssm, h, z = make_rssm(), torch.randn(1, 24), torch.randn(1, 6, 4)
    slopes = []
    for size in (1.0, 4.0):
        a = torch.full((1, 3), size, requires_grad=True)
        slopes.append(torch.autograd.grad(rssm.core(h, z, a).sum(), a)[0])
    assert (slopes[0] != 0).all()
    torch.testing.assert_close(slopes[1], slopes[0] / 4, rtol=1e-3, atol=1e-6)


def test_initial_state_is_zero():
    h, z = make_rssm().initial(3)
    assert h.shape == (3, 24) and z.shape == (3, 6, 4) and not h.any() and not z.any()


def test_prior_is_mixed_with_the_uniform_distribution():
    rssm = make_rssm()
    with torch.no_grad():
        rssm.prior_net.out.bias.mul_(1000)
    probs = rssm.prior(torch.randn(2, 5, 24))
    assert probs.shape == (2, 5, 6, 4) and (probs >= 0.0025 * (1 - 1e-5)).all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 5, 6), rtol=1e-5, atol=0)
    assert (probs > 0.99).any()


def observe(rssm, tokens, actions, is_first, h, z, seed=0):
    torch.manual_seed(seed)
    return rssm.observe(tokens, actions, is_first, h, z)


def test_observe_is_the_core_and_the_posterior_step_by_step():
    rssm = make_rssm()
    tokens, actions, first = torch.randn(2, 6, 5), torch.randn(2, 6, 3), torch.zeros(2, 6, dtype=torch.bool)
    h0, z0 = torch.randn(2, 24), torch.randn(2, 6, 4)
    h, z, logp = observe(rssm, tokens, actions, first, h0, z0)
    assert h.shape == (2, 6, 24) and z.shape == logp.shape == (2, 6, 6, 4)
    assert ((z == 0) | (z == 1)).all() and (z.sum(-1) == 1).all()
    before_h, before_z = torch.cat([h0[:, None], h[:, :-1]], 1), torch.cat([z0[:, None], z[:, :-1]], 1)
    for t in range(6):  # the action at index t led to row t
        torch.testing.assert_close(
            h[:, t], reference_core(rssm, before_h[:, t], before_z[:, t], actions[:, t]), rtol=1e-4, atol=1e-5
        )
    x = rssm.post_in(torch.cat([h, tokens], -1))
    x = F.silu(x / (x.pow(2).mean(-1, keepdim=True) + 1e-4).sqrt() * rssm.post_norm.weight)
    probs = 0.99 * torch.softmax(rssm.post_out(x).view(2, 6, 6, 4), -1) + 0.01 / 4
    torch.testing.assert_close(logp.exp(), probs, rtol=1e-4, atol=1e-5)


def test_observe_samples_the_posterior():
    rssm = make_rssm()
    n = 20_000
    zero = torch.zeros(n, 1, dtype=torch.bool)
    _, z, logp = observe(rssm, torch.ones(n, 1, 5), torch.ones(n, 1, 3), zero, torch.ones(n, 24), torch.ones(n, 6, 4))
    torch.testing.assert_close(z[:, 0].mean(0), logp[0, 0].exp(), rtol=0, atol=0.02)


def test_observe_forgets_everything_at_is_first():
    rssm, at = make_rssm(), 3
    tokens, actions = torch.randn(2, 6, 5), torch.randn(2, 6, 3)
    h0, z0, first = torch.randn(2, 24), torch.randn(2, 6, 4), torch.zeros(2, 6, dtype=torch.bool)
    first[:, at] = True
    other_tokens, other_actions = tokens.clone(), actions.clone()
    other_tokens[:, :at] += 1
    other_actions[:, : at + 1] += 1  # also the action that led to the first row
    one = observe(rssm, tokens, actions, first, h0, z0)
    two = observe(rssm, other_tokens, other_actions, first, h0 + 1, z0 + 1)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a[:, at:], b[:, at:])
    assert (one[0][:, :at] - two[0][:, :at]).abs().amin(-1).max() > 0 and not torch.equal(
        one[2][:, :at], two[2][:, :at]
    )
    fresh = reference_core(rssm, torch.zeros(2, 24), torch.zeros(2, 6, 4), torch.zeros(2, 3))
    torch.testing.assert_close(one[0][:, at], fresh, rtol=1e-4, atol=1e-5)
    never = torch.zeros_like(first)
    a, b = (observe(rssm, tokens, x, never, h0, z0)[0] for x in (actions, other_actions))
    assert (a[:, at:] - b[:, at:]).abs().max() > 1e-3  # without the flag the past is seen


def test_observe_resets_only_the_sequences_that_are_first():
    rssm = make_rssm()
    tokens, actions, h0, z0 = torch.randn(2, 4, 5), torch.randn(2, 4, 3), torch.randn(2, 24), torch.randn(2, 6, 4)
    first = torch.zeros(2, 4, dtype=torch.bool)
    first[0, 2] = True
    h_none = observe(rssm, tokens, actions, torch.zeros_like(first), h0, z0)[0]
    h_some = observe(rssm, tokens, actions, first, h0, z0)[0]
    torch.testing.assert_close(h_none[1], h_some[1])
    assert (h_none[0, 2:] - h_some[0, 2:]).abs().max() > 1e-3


def test_observe_does_not_see_the_future():
    rssm, first = make_rssm(), torch.zeros(2, 5, dtype=torch.bool)
    tokens, actions, h0, z0 = torch.randn(2, 5, 5), torch.randn(2, 5, 3), torch.randn(2, 24), torch.randn(2, 6, 4)
    one = observe(rssm, tokens, actions, first, h0, z0)
    tokens[:, 3:], actions[:, 3:], first[:, 3:] = 7, 7, True
    two = observe(rssm, tokens, actions, first, h0, z0)
    assert all(torch.equal(a[:, :3], b[:, :3]) for a, b in zip(one, two, strict=True))


def test_observe_passes_gradients_through_samples_and_time():
    rssm = make_rssm()
    tokens = torch.randn(1, 4, 5, requires_grad=True)
    h, _, _ = observe(rssm, tokens, torch.randn(1, 4, 3), torch.zeros(1, 4, dtype=torch.bool), *rssm.initial(1))
    (gradient,) = torch.autograd.grad(h[:, 3].sum(), tokens)  # h_3 sees tokens only through sampled latents
    assert (gradient[0, :3].abs().sum(-1) > 0).all() and (gradient[0, 3] == 0).all()


# ---- Sizes -----------------------------------------------------------------------------------------------------------


SIZES = {"1m": 686_456, "12m": 10_492_616, "25m": 23_487_016, "50m": 41_646_984, "100m": 93_463_624}
SIZES |= {"200m": 165_942_536, "400m": 372_887_176}
MODULES = {
    "1m": dict(dyn=376704, enc=14304, dec=80595, rew=57663, con=41153, pol=49926, val=66111),
    "12m": dict(dyn=5979648, enc=220416, dec=1272003, rew=721407, con=656129, pol=789510, val=853503),
    "200m": dict(dyn=95483904, enc=3492864, dec=20282115, rew=10749183, con=10488833, pol=12595206, val=12850431),
}
WALKER_1M = dict(dyn=364416, enc=10112, dec=51096, rew=57663, con=41153, pol=50316, val=66111)


def meta_model(size, obs_space, action_space):
    with torch.device("meta"):
        return d.Dreamer(obs_space, action_space, d.make_config(size))


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_of_the_seven_sizes(size):
    assert d.count_params(size) == d.count_params(d.make_config(size)) == SIZES[size]


@pytest.mark.parametrize("size", MODULES)
def test_parameter_counts_of_each_module(size):
    model = meta_model(size, IMAGE, gym.spaces.Discrete(6))
    assert {k: sum(p.numel() for p in getattr(model, k).parameters()) for k in MODULES[size]} == MODULES[size]
    assert d.count_params(model) == sum(MODULES[size].values())  # the slow critic is not trained and not counted


def test_parameter_counts_of_each_module_for_vectors():
    model = meta_model("1m", WALKER, SIX)
    assert {k: sum(p.numel() for p in getattr(model, k).parameters()) for k in WALKER_1M} == WALKER_1M


@pytest.mark.parametrize(
    "size,obs,actions,total",
    [
        ("1m", WALKER, SIX, 640_867),
        ("12m", WALKER, SIX, 9_738_019),
        ("200m", IMAGE, SIX, 165_948_686),
        ("200m", IMAGE, gym.spaces.Discrete(17), 165_965_075),
        (
            "200m",
            gym.spaces.Dict(image=gym.spaces.Box(0, 255, (96, 96, 1), np.uint8)),
            gym.spaces.Discrete(18),
            186_936_082,
        ),
    ],
)
def test_parameter_counts_of_benchmarks(size, obs, actions, total):
    assert d.count_params(size, obs, actions) == d.count_params(meta_model(size, obs, actions)) == total


@pytest.mark.parametrize("size", SIZES)
def test_config_rule(size):
    c = d.make_config(size)
    u = c["units"]
    assert (c["deter"], c["hidden"], c["cnn_depth"], c["classes"]) == (8 * u, u, u // 16, u // 16)
    assert (c["stoch"], c["blocks"], c["bins"], c["mlp_layers"], c["unimix"]) == (32, 8, 255, 3, 0.01)
    assert d.make_config(size, units=None, bins=63) == c | {"bins": 63}


# ---- Policy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw,std", [(-2.0, 0.55), (1e4, 1.0), (-1e4, 0.1), (0.0, 0.9 / (1 + math.exp(-2)) + 0.1)])
def test_bounded_normal_std(raw, std):
    mean, got = d.bounded_normal(torch.tensor([-50.0, 0.0, 0.5]), torch.full((3,), raw))
    assert got.tolist() == pytest.approx([std] * 3, rel=1e-6) and mean.tolist() == pytest.approx(
        [-1, 0, math.tanh(0.5)], rel=1e-6
    )


def test_discrete_policy_against_torch_distributions():
    pol, feat = d.Policy(10, 8, gym.spaces.Discrete(5)), 3 * torch.randn(4, 6, 10)
    with torch.no_grad():
        pol.outs[0].weight.normal_()
    params = pol(feat)
    (probs,) = params
    torch.testing.assert_close(probs, d.unimix_probs(pol.outs[0](pol.trunk(feat)), 0.01))
    action = pol.sample(params)
    ref = torch.distributions.OneHotCategorical(probs=probs)
    torch.testing.assert_close(pol.log_prob(params, action), ref.log_prob(action), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pol.entropy(params), ref.entropy(), rtol=1e-4, atol=1e-5)
    assert torch.equal(pol.sample(params, greedy=True), F.one_hot(probs.argmax(-1), 5).float())
    assert not action.requires_grad


def test_continuous_policy_against_torch_distributions():
    pol, feat = d.Policy(10, 8, SIX), 3 * torch.randn(4, 6, 10)
    with torch.no_grad():
        [out.weight.normal_() for out in pol.outs]
    params = pol(feat)
    mean, std = params
    assert (mean.abs() <= 1).all() and ((std >= 0.1) & (std <= 1)).all() and std.std() > 0.01
    action = pol.sample(params).detach()
    ref = torch.distributions.Independent(torch.distributions.Normal(mean, std), 1)  # of the unclipped action
    torch.testing.assert_close(pol.log_prob(params, action), ref.log_prob(action), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pol.entropy(params), ref.entropy(), rtol=1e-4, atol=1e-5)
    assert action.abs().max() > 1 and torch.equal(pol.sample(params, greedy=True), mean)


def test_policy_starts_almost_uniform():
    feat = torch.randn(50, 10)
    (probs,) = d.Policy(10, 8, gym.spaces.Discrete(5))(feat)
    mean, std = d.Policy(10, 8, SIX)(feat)
    torch.testing.assert_close(probs, torch.full((50, 5), 0.2), rtol=0, atol=0.02)
    assert mean.abs().max() < 0.1 and (std - 0.8927).abs().max() < 0.01


def test_policy_samples_follow_its_parameters():
    discrete, continuous = (
        d.Policy(4, 8, gym.spaces.Discrete(3)),
        d.Policy(4, 8, gym.spaces.Box(-1, 1, (2,), np.float32)),
    )
    p = torch.tensor([0.2, 0.5, 0.3])
    torch.testing.assert_close(discrete.sample((p.expand(100_000, 3),)).mean(0), p, rtol=0, atol=0.01)
    mean, std = torch.tensor([0.5, -0.9]), torch.tensor([0.1, 1.0])
    draws = continuous.sample((mean.expand(100_000, 2), std.expand(100_000, 2)))
    torch.testing.assert_close(draws.mean(0), mean, rtol=0, atol=0.01)
    torch.testing.assert_close(draws.std(0), std, rtol=0.02, atol=0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_policy_gradient_makes_good_actions_likelier_and_bad_ones_rarer(sign):
    for space, action in ((gym.spaces.Discrete(2), [1.0, 0.0]), (gym.spaces.Box(-1, 1, (2,), np.float32), [0.9, -0.4])):
        pol, feat, action = d.Policy(4, 8, space), torch.ones(1, 4), torch.tensor([action])
        before = pol.log_prob(pol(feat), action)
        (-before * sign).sum().backward()
        with torch.no_grad():
            for p in pol.parameters():
                p -= 0.05 * p.grad
        assert float((pol.log_prob(pol(feat), action) - before).detach()) * sign > 1e-3


# ---- Losses ----------------------------------------------------------------------------------------------------------


def wm_losses(model, batch, args, seed=0):
    torch.manual_seed(seed)
    return d.world_model_loss(model, batch, args)


def test_world_model_losses_are_per_row():
    model = tiny_model()
    losses, h, z = wm_losses(model, tiny_batch(model), d.Args())
    assert set(losses) == {"recon_vector", "reward", "continue", "dynamics", "representation"}
    assert all(v.shape == (3, 5) for v in losses.values()) and h.shape == (3, 5, 32) and z.shape == (3, 5, 6, 4)


def test_continue_target_is_the_discount_and_truncation_is_not_termination():
    model, args = tiny_model(), d.Args()
    with torch.no_grad():
        model.con.out.weight.zero_()
        model.con.out.bias.fill_(20.0)  # BCE with a large logit L is L * (1 - target)
    batch = tiny_batch(model)
    batch["is_last"][0, 2] = batch["is_last"][1, 3] = batch["is_terminal"][1, 3] = True
    loss = wm_losses(model, batch, args)[0]["continue"].detach()  # column t is row t + 1
    assert float(loss[1, 2]) == pytest.approx(20.0, rel=1e-5)
    assert float(loss[0, 1]) == pytest.approx(20 / 333, rel=1e-3)  # truncated: as any other row
    loss[1, 2] = 20 / 333
    torch.testing.assert_close(loss, torch.full((3, 5), 20 / 333), rtol=1e-3, atol=0)


def test_reward_loss_pairs_the_reward_with_the_state_of_its_row():
    model, args = tiny_model(), d.Args()
    batch = tiny_batch(model)
    losses, h, z = wm_losses(model, batch, args)
    logp = torch.log_softmax(model.rew(torch.cat([h, z.flatten(-2)], -1)), -1)
    expected = -(d.two_hot(batch["reward"], model.bins)[:, 1:] * logp).sum(-1)
    torch.testing.assert_close(losses["reward"], expected, rtol=1e-4, atol=1e-5)


def test_kl_losses_compare_posterior_and_prior_of_the_same_state():
    model, args = tiny_model(), d.Args(kl_free=0.0)
    losses, h, _ = wm_losses(model, tiny_batch(model), args)
    torch.testing.assert_close(losses["dynamics"], losses["representation"])
    assert (losses["dynamics"] > 0).all()
    free = wm_losses(model, tiny_batch(model), d.Args(kl_free=1e4))[0]
    assert (free["dynamics"] == 1e4).all()


def test_row_zero_is_context_only():
    model, args, batch = tiny_model(), d.Args(), tiny_batch(tiny_model())
    reference, h, _ = wm_losses(model, batch, args)
    changed = {k: v.clone() for k, v in batch.items()}
    changed["obs/vector"][:, 0] += 5
    changed["reward"][:, 0] += 5
    changed["action"][:, -1] = 0  # what follows the last row is not used either
    for k in ("is_first", "is_last", "is_terminal"):
        changed[k][:, 0] = True
    changed["deter"][:, 1:], changed["stoch"][:, 1:] = 0, 0  # latents of the rows that are trained on are computed anew
    other = wm_losses(model, changed, args)[0]
    assert all(torch.equal(reference[k], other[k]) for k in reference)
    for k in ("deter", "stoch", "action"):
        changed = {k: v.clone() for k, v in batch.items()}
        changed[k][:, 0] = 0 if k != "stoch" else (changed[k][:, 0] + 1) % 4
        assert not torch.equal(wm_losses(model, changed, args)[1], h), k  # but its latents and its action lead to row 1


def test_first_row_of_an_episode_ignores_the_stored_context():
    model, args, batch = tiny_model(), d.Args(), tiny_batch(tiny_model())
    batch["is_first"][:, 1] = True
    h = wm_losses(model, batch, args)[1]
    batch["deter"][:, 0], batch["stoch"][:, 0], batch["action"][:, 0] = 1, 2, 0
    assert torch.equal(wm_losses(model, batch, args)[1], h)


@pytest.mark.parametrize("name", ["recon_vector", "reward", "continue"])
def test_predictions_train_the_representation(name):
    model = tiny_model()
    losses = wm_losses(model, tiny_batch(model), d.Args())[0]
    gradient = torch.autograd.grad(losses[name].mean(), list(model.enc.parameters()))
    assert any(g.abs().max() > 0 for g in gradient)


def reference_two_hot_nll(logits, y, bins):
    """Dense, from numpy's own interpolation."""
    bins, y = bins.double().numpy(), y.double().numpy()
    k = np.clip(np.searchsorted(bins, y, side="right") - 1, 0, len(bins) - 2)
    w = np.clip((y - bins[k]) / (bins[k + 1] - bins[k]), 0, 1)
    target = np.zeros((*y.shape, len(bins)))
    np.put_along_axis(target, k[..., None], (1 - w)[..., None], -1)
    np.put_along_axis(target, k[..., None] + 1, w[..., None], -1)
    return -(torch.as_tensor(target) * torch.log_softmax(logits.double(), -1)).sum(-1)


def rollouts_first(x, n):
    """Imagined quantities of n rollouts, rollouts before time, whichever of the two the script puts first."""
    return x if x.shape[0] == n else x.transpose(0, 1)


def reference_mean(logits, bins):
    return (torch.softmax(logits.double(), -1) * bins.double()).sum(-1).detach()


@pytest.mark.parametrize("space", [gym.spaces.Discrete(3), SIX], ids=["discrete", "continuous"])
def test_behavior_losses_against_a_slow_reference(space, monkeypatch):
    """All of eq. 6 and 7 again, in float64, from the features and actions that were imagined."""
    model = tiny_model(space)
    args = d.Args(imag_horizon=4, ent_coef=0.05, slow_reg=0.7)
    batch, (B, T, H, lam) = tiny_batch(model), (3, 5, 4, 0.95)
    batch["is_last"][0, 2] = batch["is_last"][1, 3] = batch["is_terminal"][1, 3] = True
    batch["reward"] *= 3
    _, h, z = wm_losses(model, batch, args)
    seen, imagine = [], model.imagine
    monkeypatch.setattr(model, "imagine", lambda *a, **k: (seen.append(imagine(*a, **k)), seen[-1])[1])
    norm = d.ReturnNorm(0.5, 0.01)
    losses, _ = d.behavior_loss(model, norm, batch, h, z, args)
    (feats, actions), bins = (rollouts_first(x, B * T) for x in seen[0]), model.bins
    assert feats.shape == (B * T, H + 1, 32 + 24) and actions.shape[:2] == (B * T, H)
    assert torch.equal(feats[:, 0], torch.cat([h, z.flatten(-2)], -1).flatten(0, 1))

    r, v = reference_mean(model.rew(feats), bins), reference_mean(model.val(feats), bins)
    slow, c = reference_mean(model.slow(feats), bins), torch.sigmoid(model.con(feats).double())[..., 0].detach()
    R = v[:, H].clone()
    returns = []
    for t in reversed(range(H)):
        R = r[:, t + 1] + c[:, t + 1] * ((1 - lam) * v[:, t + 1] + lam * R)
        returns.insert(0, R)
    R, weight = torch.stack(returns, 1), c.cumprod(1)[:, :H]
    lo, hi = 0.5 * np.quantile(R.numpy(), [0.05, 0.95])
    scale = max(0.01, hi - lo)
    assert scale > 0.011 and abs(scale - 1) > 0.01  # so that the division is seen
    params = model.pol(feats[:, :-1])
    if model.pol.discrete:
        dist = torch.distributions.OneHotCategorical(probs=params[0])
    else:
        dist = torch.distributions.Independent(torch.distributions.Normal(*params), 1)
    policy = -weight * (dist.log_prob(actions) * (R - v[:, :H]) / scale + 0.05 * dist.entropy())
    logits = model.val(feats[:, :-1])
    value = weight * (reference_two_hot_nll(logits, R, bins) + 0.7 * reference_two_hot_nll(logits, slow[:, :H], bins))
    torch.testing.assert_close(rollouts_first(losses["policy"], B * T).double(), policy, rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(rollouts_first(losses["value"], B * T).double(), value, rtol=1e-3, atol=2e-4)

    feat = torch.cat([h, z.flatten(-2)], -1)
    last, term, rew = (batch[k][:, 1:] for k in ("is_last", "is_terminal", "reward"))
    target = torch.as_tensor(slow_lambda_return(last, term, rew, R[:, 0].view(B, T), 1 - 1 / 333, lam))
    logits, slow = model.val(feat), reference_mean(model.slow(feat), bins)
    nll = reference_two_hot_nll(logits[:, :-1], target, bins) + 0.7 * reference_two_hot_nll(
        logits[:, :-1], slow[:, :-1], bins
    )
    nll = nll * (1 - last[:, :-1].double())
    assert losses["replay_value"].shape == (B, T - 1)
    torch.testing.assert_close(losses["replay_value"].double(), nll, rtol=1e-3, atol=2e-4)

    # The same gradients: returns, weights and advantages are constants.
    for got, expected, module in ((losses["policy"], policy, model.pol), (losses["value"], value, model.val)):
        pairs = (torch.autograd.grad(x.sum(), list(module.parameters()), retain_graph=True) for x in (got, expected))
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


def test_each_behavior_loss_trains_its_own_parameters():
    model, args = tiny_model(), d.Args(imag_horizon=3)
    batch = tiny_batch(model)
    _, h, z = wm_losses(model, batch, args)
    losses, _ = d.behavior_loss(model, d.ReturnNorm(), batch, h, z, args)
    trained = {}
    for name, loss in losses.items():
        names, params = zip(*model.named_parameters(), strict=True)
        params = [p.requires_grad_() for p in params]  # also the slow critic, to see that nothing reaches it
        gradients = torch.autograd.grad(loss.mean(), params, retain_graph=True, allow_unused=True)
        trained[name] = {
            n.split(".")[0] for n, g in zip(names, gradients, strict=True) if g is not None and g.abs().max() > 0
        }
    assert trained == {"policy": {"pol"}, "value": {"val"}, "replay_value": {"val", "dyn", "enc"}}


def test_rollouts_from_terminal_states_count_for_nothing():
    model, args = tiny_model(), d.Args(imag_horizon=3)
    with torch.no_grad():
        model.con.out.weight.zero_()
        model.con.out.bias.fill_(-50.0)
    batch = tiny_batch(model)
    _, h, z = wm_losses(model, batch, args)
    losses, _ = d.behavior_loss(model, d.ReturnNorm(), batch, h, z, args)
    assert losses["policy"].abs().max() < 1e-6 and losses["value"].abs().max() < 1e-6  # the weight includes c_0
    assert losses["replay_value"].min() > 0.01


@pytest.mark.parametrize("starts", [None, 1, 7])
def test_number_of_imagined_rollouts(starts):
    model, args = tiny_model(), d.Args(imag_horizon=6, imag_starts=starts)
    batch = tiny_batch(model)
    _, h, z = wm_losses(model, batch, args)
    losses, _ = d.behavior_loss(model, d.ReturnNorm(), batch, h, z, args)
    n = starts or 15
    assert all(rollouts_first(losses[k], n).shape == (n, 6) for k in ("policy", "value"))
    assert losses["replay_value"].shape == (3, 4)


def test_imagination_follows_the_core_and_carries_no_gradient():
    model = tiny_model()
    h, z = torch.randn(8, 32), d.sample_onehot(torch.full((8, 6, 4), 0.25))
    feats, actions = (rollouts_first(x, 8) for x in model.imagine(h, z, 4))
    assert (
        feats.shape == (8, 5, 56)
        and actions.shape == (8, 4, 3)
        and not feats.requires_grad
        and not actions.requires_grad
    )
    h, z = feats[..., :32], feats[..., 32:].unflatten(-1, (6, 4))
    assert ((z == 0) | (z == 1)).all() and (z.sum(-1) == 1).all() and (actions.sum(-1) == 1).all()
    for t in range(4):
        expected = reference_core(model.dyn, h[:, t], z[:, t], actions[:, t])
        torch.testing.assert_close(h[:, t + 1], expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("space", [gym.spaces.Discrete(3), BOX], ids=["discrete", "continuous"])
def test_policy_loss_raises_the_imagined_reward(space, sign):
    torch.manual_seed(3)
    model, args = tiny_model(space), d.Args(imag_horizon=2, ent_coef=0.0)
    with torch.no_grad():  # a world in which the state, and with it the reward, depends on the action
        model.dyn.core_in.weight[:, -16:] *= 20
        model.dyn.core_gates.weight *= 4
        model.rew.linears[0].weight[:, 32:] = 0
        model.rew.out.weight *= 4
    batch = tiny_batch(model, 4, 16)
    _, h, z = wm_losses(model, batch, args)
    h, z = h.detach(), z.detach()

    def reward():
        torch.manual_seed(7)
        feats = rollouts_first(model.imagine(h.flatten(0, 1).repeat(8, 1), z.flatten(0, 1).repeat(8, 1, 1), 2)[0], 512)
        return float(reference_mean(model.rew(feats[:, 1:]), model.bins).mean())

    before, opt = reward(), torch.optim.Adam(model.pol.parameters(), 2e-2)
    for _ in range(40):
        losses, _ = d.behavior_loss(model, d.ReturnNorm(), batch, h, z, args)
        opt.zero_grad()
        (sign * losses["policy"].mean()).backward()
        opt.step()
    assert (reward() - before) * sign > 0.5  # and minimising its opposite lowers the reward


def test_reward_and_value_of_a_new_model_are_exactly_zero():
    model = d.Dreamer(VECTOR, gym.spaces.Discrete(3), tiny_config())
    feat = torch.randn(9, 56)
    for head in (model.rew, model.val, model.slow):
        assert (d.two_hot_mean(head(feat), model.bins) == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(model.val.parameters(), model.slow.parameters(), strict=True))


def make_learner(**flags):
    model = tiny_model()
    model.slow.load_state_dict(model.val.state_dict())
    args = d.Args(**(dict(imag_horizon=2, learning_rate=1e-3, warmup_updates=10) | flags))
    return model, d.Learner(model, args, torch.device("cpu"))


def test_first_update_does_nothing_and_the_second_trains_every_module():
    model, learner = make_learner()
    batch, before = tiny_batch(model), {k: v.clone() for k, v in model.state_dict().items()}
    learner.update(batch)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    learner.update(batch)
    learner.check()
    moved = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"enc", "dyn", "dec", "rew", "con", "pol", "val", "slow"}


def test_slow_critic_follows_the_fast_one():
    model, learner = make_learner(tau=0.02)
    batch = tiny_batch(model)
    for _ in range(3):
        slow = [p.clone() for p in model.slow.parameters()]
        learner.update(batch)
        expected = [0.98 * s + 0.02 * f.detach() for s, f in zip(slow, model.val.parameters(), strict=True)]
        for a, b in zip(model.slow.parameters(), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(a, b) for a, b in zip(model.slow.parameters(), model.val.parameters(), strict=True))


def test_update_returns_the_latents_of_the_rows_it_trained_on():
    model, learner = make_learner()
    _, deter, stoch = learner.update(tiny_batch(model))
    assert deter.shape == (3, 5, 32) and deter.dtype == torch.bfloat16
    assert stoch.shape == (3, 5, 6) and stoch.dtype == torch.uint8 and stoch.max() < 4


def test_one_loss_with_the_published_scales(monkeypatch):
    """The gradient that reaches the optimizer is that of one weighted sum."""
    model, learner = make_learner()
    batch = tiny_batch(model)
    monkeypatch.setattr(d, "agc_", lambda grads, params, clip=0.3: torch.stack([g.norm() for g in grads]))
    torch.manual_seed(3)
    learner.update(batch)
    got = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(3)
    losses, h, z = d.world_model_loss(model, batch, learner.args)
    more, _ = d.behavior_loss(model, d.ReturnNorm(), batch, h, z, learner.args)
    scales = dict(representation=0.1, replay_value=0.3)
    total = sum(scales.get(k, 1.0) * v.mean() for k, v in (losses | more).items())
    assert len(losses | more) == 8
    names, params = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    for n, g in zip(names, torch.autograd.grad(total, params), strict=True):
        torch.testing.assert_close(got[n], g, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("key", ["reward", "obs/vector"])
def test_update_on_bad_numbers_changes_no_parameter_and_is_reported(key):
    model, learner = make_learner()
    batch = tiny_batch(model)
    for _ in range(2):
        learner.update(batch)
    before = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("slow")}
    learner.update(batch | {key: torch.full_like(batch[key], math.nan)})
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    with pytest.raises(FloatingPointError, match="reward|recon_vector"):
        learner.check()


def test_acting_forgets_the_past_at_the_first_observation():
    model = tiny_model()
    obs, first = {"vector": torch.randn(4, 3)}, torch.ones(4, dtype=torch.bool)
    results = []
    for shift in (0.0, 3.0):
        torch.manual_seed(0)
        past = (torch.full(shape, shift) for shape in ((4, 32), (4, 6, 4), (4, 3)))
        results.append(model.act(obs, first, *past))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][0].shape == (4, 32) and results[0][1].shape == (4, 6, 4) and results[0][2].shape == (4, 3)


# ---- Replay ----------------------------------------------------------------------------------------------------------


SPECS = {
    "env": ((), torch.int64),
    "x": ((), torch.int64),
    "deter": ((2,), torch.bfloat16),
    "stoch": ((3,), torch.uint8),
}


def make_replay(capacity=23, envs=3, length=4, seed=0):
    return d.Replay(capacity, envs, SPECS, length, seed=seed)


def add(replay, envs, n=1):
    """n rows for each of these environments; x counts the rows of its environment."""
    for _ in range(n):
        envs = np.asarray(envs)
        x = replay.count[envs].copy()
        zeros = {"deter": np.zeros((len(envs), 2), np.float32), "stoch": np.zeros((len(envs), 3), np.uint8)}
        replay.add(envs, {"env": envs, "x": x} | zeros)


def starts_of(batch):
    return list(zip(batch["env"][:, 0].tolist(), batch["x"][:, 0].tolist(), strict=True))


def drain(replay):
    replay.sample(len(replay.queue) + 1)


def test_replay_counts_rows_and_sequences_per_environment():
    replay = make_replay()
    add(replay, [0, 2], 3)
    add(replay, [2], 4)
    assert replay.count.tolist() == [3, 0, 7] and replay.sequences().tolist() == [0, 0, 3]
    add(replay, [0, 1, 2], 40)
    assert replay.count.tolist() == [43, 40, 47] and replay.sequences().tolist() == [23 - 4] * 3


def test_replay_sequences_are_consecutive_rows_of_one_environment_across_the_write_cursor():
    replay, rng = make_replay(), np.random.default_rng(0)
    add(replay, [0, 1, 2], 5)
    for _ in range(120):
        add(replay, np.flatnonzero(rng.random(3) < 0.7))
        batch, ids = replay.sample(16)
        x, env = batch["x"].numpy(), batch["env"].numpy()
        assert x.shape == (16, 5) and ids.shape == (16, 5)
        assert (np.diff(x, axis=1) == 1).all() and (env == env[:, :1]).all()
        assert (x[:, -1] < replay.count[env[:, 0]]).all() and (x[:, 0] >= replay.count[env[:, 0]] - 23).all()


@pytest.mark.parametrize("rows", [(12, 3, 9), (30, 61, 9)], ids=["filling", "wrapped"])
def test_replay_draws_every_sequence_equally_often(rows):
    replay = make_replay()
    for env, n in enumerate(rows):
        add(replay, [env], n)
    drain(replay)
    possible = [(e, s) for e, n in enumerate(rows) for s in range(max(0, n - 23), n - 4)]
    drawn = starts_of(replay.sample(400 * len(possible))[0])
    counts = [drawn.count(p) for p in possible]
    assert sum(counts) == len(drawn)  # nothing else was drawn, also not from an environment without a whole sequence
    assert min(counts) > 300 and max(counts) < 500  # five standard deviations


def test_replay_differs_between_seeds_only():
    batches = []
    for seed in (0, 0, 1):
        replay = make_replay(seed=seed)
        add(replay, [0, 1, 2], 30)
        drain(replay)
        batches.append(replay.sample(50)[0]["x"])
    assert torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[2])


def test_online_queue_gives_fresh_chunks_in_order_each_once():
    replay = make_replay(capacity=100, envs=2)
    add(replay, [0], 20)
    assert starts_of(replay.sample(2)[0]) == [(0, 0), (0, 5)]
    assert starts_of(replay.sample(2)[0]) == [(0, 10), (0, 15)]
    add(replay, [0, 1], 4)
    add(replay, [1], 1)
    add(replay, [0], 1)
    assert starts_of(replay.sample(2)[0]) == [(1, 0), (0, 20)]
    assert not replay.queue


def test_online_queue_is_filled_up_with_uniform_draws():
    replay = make_replay(capacity=100, envs=1)
    add(replay, [0], 40)
    drain(replay)
    add(replay, [0], 5)
    batch = starts_of(replay.sample(64)[0])
    assert batch[0] == (0, 40) and len(batch) == 64 and len(set(batch)) > 20


def test_online_queue_skips_chunks_that_were_overwritten():
    replay = make_replay(capacity=12, envs=1)
    add(replay, [0], 40)  # rows 28..39 are left
    assert starts_of(replay.sample(2)[0]) == [(0, 30), (0, 35)]


def test_replay_write_back_comes_back_on_the_next_sample():
    replay, expected = make_replay(), {}
    for version in range(60):
        add(replay, [0, 1, 2], 5 if version == 0 else version % 2)
        batch, ids = replay.sample(4)
        keys = np.stack([batch["env"], batch["x"]], -1)  # (4, 5, 2)
        values = torch.tensor([[expected.get(tuple(k), 0) for k in row] for row in keys.tolist()])[..., None]
        assert torch.equal(batch["deter"].long(), torch.cat([values, -values], -1))
        assert torch.equal(batch["stoch"].long(), values.expand(4, 5, 3))
        expected |= {tuple(k): version + 1 for k in keys[:, 1:].reshape(-1, 2).tolist()}
        new = torch.full((4, 4, 1), version + 1.0)
        replay.write_back(ids, torch.cat([new, -new], -1).bfloat16(), new.expand(4, 4, 3).to(torch.uint8))
    assert len(expected) > 80


def test_replay_write_back_leaves_row_zero():
    replay = make_replay(envs=1)
    add(replay, [0], 5)
    _, ids = replay.sample(1)
    replay.write_back(ids, torch.ones(1, 4, 2).bfloat16(), torch.ones(1, 4, 3, dtype=torch.uint8))
    batch, _ = replay.sample(1)
    assert batch["deter"][0, :, 0].tolist() == [0, 1, 1, 1, 1] and batch["stoch"][0, :, 0].tolist() == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("rows", [(9, 0, 14), (30, 23, 61)], ids=["filling", "wrapped"])
def test_replay_state_dict_roundtrip_gives_the_same_further_samples(rows):
    one, two = make_replay(), make_replay(seed=9)
    for env, n in enumerate(rows):
        add(one, [env], n)
    batch, ids = one.sample(2)
    one.write_back(ids, torch.randn(2, 4, 2).bfloat16(), torch.randint(9, (2, 4, 3), dtype=torch.uint8))
    buffer = io.BytesIO()
    torch.save(one.state_dict(), buffer)
    buffer.seek(0)
    two.load_state_dict(torch.load(buffer, weights_only=True))
    for _ in range(20):
        (a, i), (b, j) = one.sample(5), two.sample(5)
        assert torch.equal(i, j) and all(torch.equal(a[k], b[k]) for k in a)
        for replay in (one, two):
            add(replay, [0, 2], 3)


def test_replay_state_dict_is_a_snapshot():
    replay = make_replay()
    add(replay, [0, 1, 2], 10)
    state = replay.state_dict()
    before = {k: v.clone() for k, v in state["rows"].items()}
    add(replay, [0, 1, 2], 40)
    assert all(torch.equal(state["rows"][k], v) for k, v in before.items()) and list(state["count"]) == [10] * 3


def test_replay_rows_of_the_default_model_are_small():
    specs = d.Replay.specs(IMAGE, 6, d.make_config("200m"))
    assert specs["obs/image"] == ((64, 64, 3), torch.uint8)
    assert d.Replay.row_bytes(specs) == 12288 + 6 * 4 + 4 + 3 + 8192 * 2 + 32


@pytest.mark.parametrize(
    "ratio,steps,due",
    [
        (0.25, range(1, 10), [1, 0, 0, 0, 1, 0, 0, 0, 1]),
        (1, range(16, 64, 16), [1, 16, 16]),
        (2.5, range(1, 6), [1, 2, 3, 2, 3]),
        (1 / 32, range(16, 128, 16), [1, 0, 1, 0, 1, 0, 1]),
    ],
)
def test_ratio(ratio, steps, due):
    counter = d.Ratio(ratio)
    assert [counter(s) for s in steps] == due


def test_ratio_does_not_drift():
    counter = d.Ratio(256 / 1024)
    assert abs(sum(counter(s) for s in range(1000, 41_000)) - 10_000) <= 1
    counter = d.Ratio(0.3)
    assert abs(sum(counter(s) for s in range(10_000)) - 3_000) <= 1


# ---- Environments ----------------------------------------------------------------------------------------------------


class Frames(gym.Env):
    """Frame k of an episode shows pixel k (mod 64) alone, in red; reward k; ends after `end` steps."""

    def __init__(self, end=1000, side=8):
        self.end, self.side = end, side
        self.observation_space = gym.spaces.Box(0, 255, (side, side, 3), np.uint8)
        self.action_space, self.actions = gym.spaces.Discrete(4), []

    def frame(self):
        image = np.zeros((self.side, self.side, 3), np.uint8)
        image.reshape(-1, 3)[self.t % self.side**2, 0] = 200
        return image

    def reset(self, *, seed=None, options=None):
        self.t, self.actions = 0, []
        return self.frame(), {}

    def step(self, action):
        self.t += 1
        self.actions.append(action)
        return self.frame(), float(self.t), self.t >= self.end, False, {}


def lit(image):
    return np.flatnonzero(image[..., 0].ravel()).tolist()


def test_atari_pools_the_last_two_frames_and_sums_rewards():
    env = d.Atari(Frames(), repeat=4, size=8, grayscale=False, noop_max=0)
    image, _ = env.reset(seed=0)
    assert lit(image) == [0]
    for k in range(3):
        image, reward, terminated, truncated, _ = env.step(2)
        assert lit(image) == [4 * k + 3, 4 * k + 4] and reward == sum(range(4 * k + 1, 4 * k + 5))  # not clipped
        assert not terminated and not truncated and image.dtype == np.uint8
    assert env.unwrapped.actions == [2] * 12
    assert lit(env.reset(seed=0)[0]) == [0]  # the last frame of the old episode is not pooled into the new one


@pytest.mark.parametrize("end,pooled", [(1, [1]), (2, [1, 2]), (3, [2, 3])])
def test_atari_stops_repeating_at_the_end(end, pooled):
    env = d.Atari(Frames(end), repeat=4, size=8, grayscale=False, noop_max=0)
    env.reset(seed=0)
    image, reward, terminated, _, _ = env.step(1)
    assert lit(image) == pooled and terminated and reward == sum(range(1, end + 1))
    assert len(env.unwrapped.actions) == end


def test_atari_without_repeat_does_not_pool():
    env = d.Atari(Frames(), repeat=1, size=8, grayscale=False, noop_max=0)
    env.reset(seed=0)
    assert [lit(env.step(0)[0]) for _ in range(3)] == [[1], [2], [3]]


def test_atari_noops_are_random_seeded_and_bounded():
    env = d.Atari(Frames(), repeat=4, size=8, grayscale=False, noop_max=30)
    counts = []
    for seed in range(200):
        image, _ = env.reset(seed=seed)
        counts.append(len(env.unwrapped.actions))
        assert set(env.unwrapped.actions) <= {0} and lit(image) == [counts[-1]]
    assert min(counts) == 0 and max(counts) == 30 and len(set(counts)) > 25
    env.reset(seed=5)
    assert len(env.unwrapped.actions) == counts[5]


def test_atari_noops_survive_the_end_of_an_episode():
    env = d.Atari(Frames(end=3), repeat=4, size=8, grayscale=False, noop_max=30)
    for seed in range(20):
        env.reset(seed=seed)
        assert env.unwrapped.t < 3


def test_atari_grey_weights_and_size():
    env = d.Atari(Frames(side=16), repeat=4, size=8, grayscale=True, noop_max=0)
    assert env.observation_space.shape == (8, 8, 1) and env.reset(seed=0)[0].shape == (8, 8, 1)
    colours = np.zeros((8, 8, 3), np.uint8)
    for row, colour in enumerate(np.eye(3)):
        colours[row] = 255 * colour
    colours[3] = 200
    grey = env.picture(colours)[:4, 0, 0].astype(int)
    assert np.abs(grey - [76, 150, 29, 200]).max() <= 1


def test_resize_is_bilinear_and_keeps_images_of_the_right_size():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    assert np.array_equal(d.resize(image, 32), image)
    assert d.resize(image[..., :1], 16).shape == (16, 16, 1)
    half = np.zeros((16, 16, 3), np.uint8)
    half[:, 8:] = 255
    small = d.resize(half, 8)
    assert small.shape == (8, 8, 3) and (small[:, :3] == 0).all() and (small[:, 5:] == 255).all()


def test_repeat_sums_rewards_and_stops_at_the_end():
    env = d.Repeat(Frames(end=6), 4)
    env.reset()
    _, reward, terminated, _, _ = env.step(1)
    assert reward == 1 + 2 + 3 + 4 and not terminated
    _, reward, terminated, _, _ = env.step(1)
    assert reward == 5 + 6 and terminated


class Fake(gym.Env):
    """Any spaces; sends `obs` or a sample and remembers the last action."""

    def __init__(self, obs_space, action_space, obs=None):
        self.observation_space, self.action_space, self.obs = obs_space, action_space, obs

    def reset(self, *, seed=None, options=None):
        return (self.observation_space.sample() if self.obs is None else self.obs), {}

    def step(self, action):
        self.last = action
        return self.reset()[0], 1, False, np.bool_(True), {}


@pytest.mark.parametrize(
    "action,sent",
    [
        ([1, -1, 0.5], [2, 0, 0.5]),
        ([0, 0, 0], [0, 5, 0]),
        ([7, -7, 7], [2, 0, 1]),  # samples of the policy are unbounded
        ([-0.5, 0.5, -3], [-1, 7.5, -1]),
    ],
)
def test_adapter_clips_and_rescales_actions_to_finite_bounds(action, sent):
    low, high = np.array([-2, 0, -np.inf], np.float32), np.array([2, 10, np.inf], np.float32)
    env = d.Adapter(Fake(BOX, gym.spaces.Box(low, high, dtype=np.float32)), 16)
    assert env.action_space == gym.spaces.Box(-1, 1, (3,), np.float32)
    env.reset()
    _, reward, terminated, truncated, _ = env.step(np.array(action, np.float32))
    np.testing.assert_allclose(env.unwrapped.last, sent, rtol=1e-6)
    assert env.unwrapped.last.dtype == np.float32 and env.unwrapped.action_space.contains(env.unwrapped.last)
    assert (reward, terminated, truncated) == (1.0, False, True) and type(reward) is float and type(truncated) is bool


def test_adapter_shifts_discrete_actions_and_observations_by_their_start():
    env = d.Adapter(Fake(gym.spaces.Discrete(4, start=-2), gym.spaces.Discrete(3, start=5), np.int64(-1)), 16)
    obs, _ = env.reset()
    assert obs["observation"] == 1 and env.observation_space["observation"] == gym.spaces.Discrete(4)
    env.step(np.int64(2))
    assert env.unwrapped.last == 7 and env.action_space == gym.spaces.Discrete(3)


@pytest.mark.parametrize(
    "space,shape,dtype",
    [
        (gym.spaces.Box(0, 255, (40, 30, 3), np.uint8), (16, 16, 3), np.uint8),
        (gym.spaces.Box(0, 255, (40, 30, 1), np.uint8), (16, 16, 1), np.uint8),
        (gym.spaces.Box(-1, 1, (2, 3), np.float64), (6,), np.float32),
        (gym.spaces.Box(-1, 1, (), np.float32), (1,), np.float32),
        (gym.spaces.Box(0, 255, (128,), np.uint8), (128,), np.float32),
        (gym.spaces.Discrete(5), (), np.int64),
    ],
)
def test_adapter_converts_observations(space, shape, dtype):
    for wrapped in (space, gym.spaces.Dict(observation=space)):
        env = d.Adapter(Fake(wrapped, gym.spaces.Discrete(2)), 16)
        obs, _ = env.reset()
        assert list(obs) == ["observation"] and obs["observation"].shape == shape and obs["observation"].dtype == dtype
        assert env.observation_space["observation"].shape == shape and env.observation_space.contains(obs)


def test_adapter_keeps_the_order_of_flattened_numbers():
    value = np.arange(6, dtype=np.float64).reshape(2, 3)
    obs, _ = d.Adapter(Fake(gym.spaces.Box(0, 9, (2, 3), np.float64), gym.spaces.Discrete(2), value), 16).reset()
    assert obs["observation"].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Box(0, 255, (64, 64, 4), np.uint8),
        gym.spaces.Box(0, 255, (64, 64), np.uint8),
        gym.spaces.Box(0, 1, (64, 64, 3), np.float32),
        gym.spaces.Box(0, 1, (4097,), np.float32),
        gym.spaces.MultiBinary(4),
        gym.spaces.Dict(a=BOX, b=gym.spaces.Dict(c=BOX)),
    ],
    ids=str,
)
def test_adapter_refuses_observations_it_cannot_use(space):
    with pytest.raises(ValueError, match="must be"):
        d.Adapter(Fake(space, gym.spaces.Discrete(2)), 16)


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.MultiDiscrete([2, 3]),
        gym.spaces.MultiBinary(3),
        gym.spaces.Box(-1, 1, (2, 2), np.float32),
        gym.spaces.Box(0, 5, (2,), np.int64),
    ],
    ids=str,
)
def test_adapter_refuses_actions_it_cannot_use(space):
    with pytest.raises(ValueError, match="actions must be"):
        d.Adapter(Fake(BOX, space), 16)


@pytest.mark.parametrize("sent", [np.zeros(4, np.float32), np.zeros((3, 1), np.float32)])
def test_adapter_refuses_observations_that_break_their_declaration(sent):
    with pytest.raises(ValueError, match="declared"):
        d.Adapter(Fake(BOX, gym.spaces.Discrete(2), sent), 16).reset()


def test_adapter_refuses_images_of_another_type():
    space = gym.spaces.Box(0, 255, (16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="declared"):
        d.Adapter(Fake(space, gym.spaces.Discrete(2), np.zeros((16, 16, 3), np.float32)), 16).reset()
