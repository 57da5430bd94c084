"""tdmpc2.py: closed forms, the sizes of the paper, and what its plans and updates silently break on."""

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces

import tdmpc2 as t

SPACE = spaces.Box(-1, 1, (5,), np.float32)
TINY = dict(enc_dim=16, mlp_dim=16, latent_dim=16, num_q=3)


def near(a, b, **kw):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), **(dict(rtol=1e-5, atol=1e-6) | kw))


def make(actions=2, seed=0, **overrides):
    torch.manual_seed(seed)
    args = t.Args(**TINY, batch_size=4, **overrides)
    model = t.WorldModel(SPACE, actions, t.model_config(args))
    return model, t.Learner(model, args, 0.9, torch.device("cpu")), args


def batch_of(model, B=4, H=3):
    rows = {"obs": torch.randn(H + 1, B, 5), "action": torch.rand(H + 1, B, model.action_dim) * 2 - 1}
    return rows | {"reward": torch.randn(H + 1, B), "terminated": torch.zeros(H + 1, B, dtype=torch.bool)}


# ---- Maths -----------------------------------------------------------------------------------------------------------


def test_two_hot():
    bins, x = torch.linspace(-10, 10, 101), torch.tensor([0.0, 0.35, -7.0, 1e4, 1e9, -1e9])
    target = t.two_hot(x, bins)
    near(target.sum(-1), torch.ones(6))
    near(target[[0, 4, 5], [50, 100, 0]], torch.ones(3), atol=1e-5)
    assert ((target > 0).sum(-1) <= 2).all()
    near((target @ bins)[:4], t.symlog(x)[:4])
    near(t.two_hot_inv(torch.zeros(3, 101), bins), torch.zeros(3), atol=1e-4)
    near(t.two_hot_inv((target[:4] + 1e-12).log(), bins), x[:4], rtol=1e-3, atol=1e-5)
    loss = t.soft_ce(torch.zeros(6, 101), x, bins)
    near(loss, torch.full((6,), math.log(101)))
    entropy = -(target * target.clamp(min=1e-12).log()).sum(-1)
    assert (t.soft_ce(torch.randn(6, 101), x, bins) >= entropy).all()


def test_simnorm_is_a_softmax_in_groups():
    x = torch.randn(2, 3, 24, requires_grad=True)
    near(t.simnorm(x, 8), torch.softmax(x.view(2, 3, 3, 8), -1).view(2, 3, 24))
    near(t.simnorm(torch.zeros(16), 8), torch.full((16,), 1 / 8))
    (grad,) = torch.autograd.grad((t.simnorm(x, 8) ** 2).sum(), x)
    (same,) = torch.autograd.grad((torch.softmax(x.view(2, 3, 3, 8), -1) ** 2).sum(), x)
    near(grad, same)


def test_mish_and_its_slope():
    x = torch.cat([torch.linspace(-60, 60, 2001), torch.tensor([200.0, -200.0])]).requires_grad_()
    near(t.mish(x), torch.nn.functional.mish(x), atol=3e-6)
    (grad,) = torch.autograd.grad(t.mish(x).sum(), x)
    near(grad, torch.autograd.grad(torch.nn.functional.mish(x).sum(), x)[0])
    with torch.no_grad():
        near(t.mish(x), torch.nn.functional.mish(x), atol=3e-6)


def test_discount_of_episode_lengths():
    found = [t.discount(n) for n in (500, 100, 25, 1000, 100_000)]
    assert found == pytest.approx([0.99, 0.95, 0.95, 0.995, 0.995])


def test_policy_densities():
    assert float(t.log_std(torch.tensor(0.0))) == -4
    near(t.log_std(torch.tensor([-50.0, 50.0])), [-10.0, 2.0])
    near(t.gaussian_logprob(torch.zeros(3, 2), torch.zeros(3, 2)), torch.full((3,), 2 * -0.9189385))
    model, _, _ = make()
    z, eps = torch.rand(7, 16), torch.randn(7, 2)
    action, entropy, scaled = model.act(z, eps)
    mean, raw = model.pi(z).chunk(2, -1)
    gauss = torch.distributions.Normal(mean, t.log_std(raw).exp())
    squashed = torch.distributions.TransformedDistribution(gauss, torch.distributions.TanhTransform())
    near(action, torch.tanh(mean + eps * t.log_std(raw).exp()))
    near(-entropy, squashed.log_prob(action).sum(-1), rtol=1e-3, atol=1e-3)
    near(scaled, entropy * (2 * gauss.log_prob(mean + eps * t.log_std(raw).exp()).sum(-1)) / -entropy, rtol=1e-3)


def test_td_target_ends_where_the_episode_ends():
    near(t.td_target(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0]), torch.tensor([5.0, 5.0]), 0.9), [5.5, 1.0])


def test_running_scale():
    scale = t.RunningScale(0.01)
    assert scale.value == 1
    scale.update(torch.zeros(100))
    assert scale.value == 1
    q = torch.linspace(0, 11 / 0.9, 1001)  # 5th to 95th percentile: 11
    scale.update(q)
    near(scale.value, 1.1, rtol=1e-4)


# ---- Planning --------------------------------------------------------------------------------------------------------


def test_mppi_update():
    actions, values = torch.rand(3, 6, 2), torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0, 0.5])
    mean, std = t.mppi_update(actions, values, 1, 0.5, 0.05, 2.0)
    near(mean, actions[:, 1])
    near(std, torch.full((3, 2), 0.05))
    mean, std = t.mppi_update(actions, values, 2, 0.5, 0.05, 2.0)
    w = torch.softmax(0.5 * torch.tensor([3.0, 2.0]), 0)
    near(mean, w[0] * actions[:, 1] + w[1] * actions[:, 3])
    deviation = (w[0] * (actions[:, 1] - mean) ** 2 + w[1] * (actions[:, 3] - mean) ** 2).sqrt()
    near(std, deviation.clamp(0.05, 2))
    both = t.mppi_update(torch.stack([actions, -actions]), torch.stack([values, values]), 2)  # several plans at once
    near(both[0], torch.stack([mean, -mean]))


def test_value_of_a_sequence_stops_at_a_predicted_end(monkeypatch):
    model, _, args = make(episodic=True)
    monkeypatch.setattr(t, "two_hot_inv", lambda logits, bins: torch.ones(logits.shape[:-1]))
    z, actions = torch.rand(1, 1, 16), torch.zeros(1, 3, 6, 2)
    head = model.termination[-1]
    torch.nn.init.zeros_(head.weight)
    for bias, value in ((-1.0, 1 + 0.9 + 0.81 + 0.729), (1.0, 1.0)):
        torch.nn.init.constant_(head.bias, bias)
        near(t.estimate_value(model, z, actions, 0.9), torch.full((1, 6), value))


def test_plans_find_the_rewarding_action(monkeypatch):
    """In a world whose reward is -(a - 0.6)^2 the plan ends near 0.6, for each of several environments."""
    model, _, args = make(1, num_samples=200, num_elites=20)
    torch.nn.init.zeros_(model.pi[-1].weight)

    def reward(z, a):
        return -((a - 0.6) ** 2)

    model.__dict__.update(reward=reward)
    monkeypatch.setattr(t, "two_hot_inv", lambda x, bins: x[..., 0] if x.shape[-1] == 1 else torch.zeros(x.shape[:-1]))
    model._modules.pop("reward")
    action, mean = t.plan(model, torch.rand(3, 16), torch.zeros(3, 3, 1), args, 0.9, greedy=True)
    assert action.shape == (3, 1) and mean.shape == (3, 3, 1)
    assert ((action - 0.6).abs() < 0.15).all() and ((mean - 0.6).abs() < 0.15).all()


def test_a_new_plan_starts_from_the_last_one_shifted(monkeypatch):
    model, _, args = make(1, num_samples=2000, iterations=1, max_std=0.06)
    seen = []
    real = t.estimate_value
    monkeypatch.setattr(t, "estimate_value", lambda m, z, a, g: (seen.append(a), real(m, z, a, g))[1])
    t.plan(model, torch.rand(1, 16), torch.tensor([[[0.1], [0.5], [-0.5]]]), args, 0.9)
    near(seen[0][0, :, args.num_pi_trajs :].mean(1), [[0.5], [-0.5], [0.0]], atol=0.01)


# ---- Networks and learning -------------------------------------------------------------------------------------------


def test_sizes_of_the_paper():
    assert t.count_params("5m") == 4_960_618  # counted in the authors' code
    found = {size: round(t.count_params(size) / 1e6, 2) for size in ("1m", "19m", "48m", "317m")}
    assert found == {"1m": 1.21, "19m": 18.06, "48m": 47.21, "317m": 312.6}
    with torch.device("meta"):
        image = spaces.Box(0, 255, (64, 64, 9), np.uint8)
        model = t.WorldModel(image, 6, t.make_config("5m"))
    assert t.count_params(model.encoder) == 58_272 and model.latent_dim == 512
    parts = {n: t.count_params(getattr(model, n)) for n in ("dynamics", "reward", "pi", "Qs")}
    assert parts == {"dynamics": 794_112, "reward": 582_245, "pi": 533_516, "Qs": 2_911_225}


def test_reward_and_values_start_at_zero():
    model, _, _ = make()
    z, a = torch.rand(4, 16), torch.rand(4, 2)
    near(t.two_hot_inv(model.reward(z, a), model.bins_at), torch.zeros(4), atol=1e-4)
    near(model.two_q(z, a), torch.zeros(2, 4), atol=1e-4)


def test_ensemble_is_its_members():
    model, _, _ = make()
    torch.nn.init.normal_(model.Qs[2].weight)
    z, a = torch.rand(3, 4, 16), torch.rand(3, 4, 2)
    whole = model.Qs(z, a)
    assert whole.shape == (3, 3, 4, t.BINS)
    for q in range(3):
        x = torch.cat([z, a], -1)
        for layer in list(model.Qs)[:2]:
            x = torch.nn.functional.linear(x, layer.weight[q], layer.bias[q])
            x = torch.nn.functional.layer_norm(x, x.shape[-1:], layer.ln["weight"][q], layer.ln["bias"][q])
            x = torch.nn.functional.mish(x)
        near(whole[q], torch.nn.functional.linear(x, model.Qs[2].weight[q], model.Qs[2].bias[q]), atol=1e-5)
    near(model.Qs(z, a, torch.tensor([2, 0])), whole[[2, 0]], atol=1e-5)
    common = model.dynamics(z[:, :1], a)  # a latent that is common to all actions
    near(common, model.dynamics(z[:, :1].expand(-1, 4, -1), a), atol=1e-5)


def test_consistency_weighs_later_steps_less():
    model, _, args = make()
    batch = batch_of(model)
    losses, zs = t.latent_loss(model, batch, args, 0.9)
    target = model.encoder(batch["obs"][1:]).detach()
    error = (zs[1:] - target).square().mean((1, 2))
    near(losses["consistency"], (error * torch.tensor([1, 0.5, 0.25])).sum() / 3)


def test_an_update_moves_what_it_should():
    model, learner, args = make()
    batch = batch_of(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    learner.update(batch)
    moved = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    # Q is 0 everywhere at first, so only the entropy moves the policy.
    assert moved == {"encoder", "dynamics", "reward", "pi", "Qs", "target_Qs"}
    for name, value in model.Qs.state_dict().items():
        near(model.target_Qs.state_dict()[name], before[f"target_Qs.{name}"].lerp(value, 0.01))
    groups = learner.opt.param_groups
    assert groups[0]["lr"] == pytest.approx(0.3 * groups[1]["lr"])
    model, learner, args = make()
    learner.update(batch_of(model))
    zs = torch.rand(4, 4, 16)
    loss, _ = t.policy_loss(model, zs, learner.scale, args)
    assert zs.grad is None and loss.requires_grad


def test_bfloat16_trains_everything():
    model, _, args = make()
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = t.latent_loss(model, batch_of(model), args, 0.9)
    sum(losses.values()).backward()
    trained = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("pi.")]
    assert all(p.grad is not None for p in trained) and model.encoder[0].weight.grad.abs().max() > 0
    with torch.no_grad():
        torch.manual_seed(3)
        plain, _ = t.latent_loss(model, batch_of(model), args, 0.9)
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            losses, _ = t.latent_loss(model, batch_of(model), args, 0.9)
    for name, value in losses.items():
        near(value.float(), plain[name], rtol=0.03, atol=1e-3)


def test_learning_a_constant_reward():
    model, learner, args = make(learning_rate=3e-3)
    for _ in range(150):
        batch = batch_of(model) | {"reward": torch.full((4, 4), 2.0)}
        metrics = learner.update(batch | {"terminated": torch.ones(4, 4, dtype=torch.bool)})
    learner.check(metrics, "here")
    z, a = model.encoder(torch.randn(9, 5)), torch.zeros(9, 2)
    near(t.two_hot_inv(model.reward(z, a), model.bins_at), torch.full((9,), 2.0), rtol=0.1, atol=0)
    near(model.two_q(z, a).mean(0), torch.full((9,), 2.0), rtol=0.1, atol=0)  # terminal: the value is the reward


@pytest.mark.parametrize("old", [False, True])
def test_checkpoints_of_the_authors(old):
    model, _, _ = make(seed=1)
    theirs = {}
    for name, value in make(seed=2)[0].state_dict().items():
        net, rest = name.split(".", 1)
        layer, leaf = rest.split(".", 1)
        if "Qs" in net:
            number = 4 * int(layer) + ["weight", "bias", "ln.weight", "ln.bias"].index(leaf)
            net = {"Qs": "_Qs.params", "target_Qs": "_target_Qs.params" if old else "_target_Qs_params"}[net]
            theirs[f"{net}.{number if old else rest}"] = value
            continue
        theirs[f"_{net}.state.{rest}" if net == "encoder" else f"_{name}"] = value
    theirs |= {"log_std_min": torch.tensor(-10.0)}
    model.load_state_dict(t.rename(theirs, model))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), make(seed=2)[0].state_dict().values()))
    with pytest.raises(ValueError, match="encoder"):
        t.rename({k: v for k, v in theirs.items() if "encoder" not in k}, model)


def test_random_shift_is_a_translation():
    image = torch.zeros(1, 64, 64, 9, dtype=torch.uint8)
    encoder = t.PixelEncoder((64, 64, 9), 32, 8)
    assert encoder(image.expand(3, -1, -1, -1).unflatten(0, (3, 1))).shape == (3, 1, 512)
    seen = []
    encoder[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image[0, 30, 20] = 255
    places = set()
    for _ in range(60):
        encoder(image)
        y, x = (seen[-1][0, 0] > 0).nonzero()[0].tolist()
        assert (seen[-1] > 0).sum() == 9
        places.add((y - 30, x - 20))
    assert {dy for dy, _ in places} == {dx for _, dx in places} == set(range(-3, 4))


# ---- Replay ----------------------------------------------------------------------------------------------------------


def test_stretches_stay_inside_episodes_and_are_uniform():
    replay = t.Replay(20, 2, SPACE, 1)
    for k in range(33):  # episodes of 5 rows in the first environment, of 3 in the second; older rows are overwritten
        rows = dict(obs=np.full((2, 5), k), action=np.zeros((2, 1)), reward=np.array([k, k]), terminated=np.zeros(2))
        replay.add(np.arange(2), np.array([k % 5, k % 3]), rows)
    batch = replay.sample(4000, 2)
    start = batch["obs"][0, :, 0]
    assert batch["obs"].shape == (3, 4000, 5) and (batch["obs"][2, :, 0] == start + 2).all() and start.min() >= 13
    assert set((start % 15).int().tolist()) <= {s for s in range(15) if s % 5 <= 2 or s % 3 == 0}
    valid = [k for k in range(13, 31) if k % 5 <= 2] + [k for k in range(13, 31) if k % 3 == 0]
    counts = torch.stack([(start == k).sum() for k in set(valid)])
    expected = torch.tensor([4000 * valid.count(k) / len(valid) for k in set(valid)])
    assert ((counts - expected).abs() < 6 * expected.sqrt()).all()
    with pytest.raises(SystemExit, match="--horizon"):
        replay.sample(4, 5)
    other = t.Replay(20, 2, SPACE, 1)
    other.load_state_dict(replay.state_dict())
    a, b = replay.sample(8, 2), other.sample(8, 2)
    assert all(torch.equal(a[k], b[k]) for k in a)


# ---- Environments ----------------------------------------------------------------------------------------------------


def test_deepmind_control_is_a_vector_with_action_repeat_2():
    args = t.Args()
    env = t.make_env(args, seed=3)
    obs, _ = env.reset(seed=5)
    assert env.observation_space.contains(obs) and obs.shape == (24,) and env.action_space.shape == (6,)
    assert t.episode_length(args, env) == 500 and t.discount(500) == pytest.approx(0.99)
    steps, over = 0, False
    while not over:
        *_, terminated, truncated, info = env.step(np.zeros(6, np.float32))
        steps, over = steps + 1, terminated or truncated
    assert steps == 500 and truncated and not terminated and info["episode"]["l"] == 500
    again, _ = t.make_env(args, seed=9).reset(seed=5)
    assert np.array_equal(obs, again)


def test_pixels_are_three_frames():
    env = t.make_env(t.Args(env_id="Pendulum-v1", pixels=True), seed=3)
    before, _ = env.reset(seed=5)
    after, *_ = env.step(np.ones(1, np.float32))
    assert env.observation_space.contains(after) and after.shape == (64, 64, 9)
    assert np.array_equal(after[..., :6], before[..., 3:]) and not np.array_equal(after[..., 6:], before[..., 6:])


def test_actions_reach_the_bounds_and_never_leave_them():
    env = t.make_env(t.Args(env_id="Pendulum-v1"), seed=3)
    sent = []
    env.unwrapped.step, real = lambda a: (sent.append(a), real(a))[1], env.unwrapped.step
    env.reset(seed=5)
    for action in (-1, 1, 7, 0.5):
        env.step(np.array([action], np.float32))
    assert [float(a[0]) for a in sent] == [-2, 2, 2, 1]
    with pytest.raises(ValueError, match="Discrete"):
        t.make_env(t.Args(env_id="CartPole-v1"), seed=0)
