"""muzero.py: closed-form answers of its pure functions, parameter counts, its search against a slow one, its rules.

Names and facts: reference card of MuZero, section 11."""

import copy
import dataclasses
import functools
import math
import os
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import muzero as mz

sys.path.insert(0, os.path.join(os.path.dirname(mz.__file__), "benchmarks"))
import boards as boards_tool  # noqa: E402

f64 = torch.float64


def close(a, b, tol=1e-9):
    a, b = (torch.as_tensor(x, dtype=f64) for x in (a, b))
    assert a.shape == b.shape or not b.dim(), (a.shape, b.shape)
    assert (a - b).abs().max() <= tol, (a, b)


# ---- Maths -----------------------------------------------------------------------------------------------------------


def test_signed_hyperbolic_and_its_inverse():
    x = torch.cat([torch.linspace(-1000, 1000, 2001, dtype=f64), torch.tensor([1e-6, -1e-6, 1e6], dtype=f64)])
    y = mz.signed_hyperbolic(x)
    assert ((mz.signed_parabolic(y) - x).abs() <= 1e-9 * x.abs().clamp(min=1)).all()
    close(mz.signed_hyperbolic(torch.tensor([0.0, 1.0, 300.0], dtype=f64)), [0, 2**0.5 - 1 + 1e-3, 16.6494], 1e-4)
    close(mz.signed_hyperbolic(-x), -y, 0)
    assert (y.diff()[:-3] > 0).all()


def test_signed_parabolic_is_accurate_in_float32():
    for value in (1e-3, 0.02, 1.0, 200.0):
        back = mz.signed_parabolic(mz.signed_hyperbolic(torch.tensor(value, dtype=f64)).float())
        assert abs(float(back) / value - 1) < 1e-5


def test_scalar_to_support():
    x = torch.tensor([3.7, 5.0, -5.0, 0.0, -0.25, 9.0, -9.0], dtype=f64)
    p = mz.scalar_to_support(x, 5)
    atoms = torch.arange(-5, 6, dtype=f64)
    assert p.shape == (7, 11)
    close(p.sum(-1), torch.ones(7))
    close(p @ atoms, x.clamp(-5, 5), 1e-12)
    assert ((p > 0).sum(-1) <= 2).all() and (p >= 0).all()
    close(p[0, [8, 9]], [0.3, 0.7])
    close(p[1], F.one_hot(torch.tensor(10), 11).double())
    assert mz.scalar_to_support(torch.zeros(2, 3), 4).shape == (2, 3, 9)


def test_support_to_scalar():
    assert (mz.support_to_scalar(torch.full((4, 601), 0.37), 300) == 0).all()
    x = torch.tensor([3.7, -250.25, 0.0], dtype=f64)
    close(mz.support_to_scalar(mz.scalar_to_support(x, 300).log(), 300), x)
    returns = torch.tensor([0.0, 1.0, -7.5, 250.0], dtype=f64)
    logits = mz.scalar_to_support(mz.signed_hyperbolic(returns), 20).log()
    close(mz.signed_parabolic(mz.support_to_scalar(logits, 20)), returns, 1e-6)


def test_renormalize():
    s = torch.randn(5, 3, 4, 4, dtype=f64)
    out = mz.renormalize(s)
    close(out.flatten(1).amin(1), torch.zeros(5))
    close(out.flatten(1).amax(1), torch.ones(5))
    close(mz.renormalize(out), out)
    assert (mz.renormalize(torch.full((2, 7), 3.0)) == 0).all()
    close(mz.renormalize(s[1:2]), out[1:2], 0)  # samples do not see each other


@pytest.mark.parametrize("factor", [0.5, 0.0, 0.2])
def test_scale_gradient(factor):
    x = torch.randn(6, requires_grad=True)
    y = mz.scale_gradient(x, factor)
    assert torch.equal(y, x)
    (y * torch.arange(6.0)).sum().backward()
    close(x.grad, factor * torch.arange(6.0), 1e-7)


def test_n_step_targets():
    ones, zeros = torch.ones(10, dtype=f64), torch.zeros(10, dtype=f64)
    close(mz.n_step_targets(ones, zeros, 1.0, 5), [5, 5, 5, 5, 5, 5, 4, 3, 2, 1])
    close(mz.n_step_targets(torch.tensor([0.0, 0, 1]), torch.zeros(3), -1.0, 3), [1, -1, 1])
    rewards, values = torch.randn(2, 9, dtype=f64), torch.randn(2, 9, dtype=f64)
    for n in (1, 3, 9, 20):
        z = mz.n_step_targets(rewards, values, 0.9, n)
        for b in range(2):
            for t in range(9):
                expected = sum(0.9**i * float(rewards[b, t + i]) for i in range(n) if t + i < 9)
                close(z[b, t], expected + (0.9**n * float(values[b, t + n]) if t + n < 9 else 0))


def test_visit_softmax():
    close(mz.visit_softmax(torch.tensor([9.0, 1.0], dtype=f64), 1.0), [0.9, 0.1])
    close(mz.visit_softmax(torch.tensor([9.0, 1.0], dtype=f64), 0.5), [81 / 82, 1 / 82])
    close(mz.visit_softmax(torch.tensor([[2.0, 5.0, 1.0]]), 0), [[0, 1, 0]])
    assert torch.isfinite(mz.visit_softmax(torch.tensor([800.0, 1.0]), 0.01)).all()


def test_schedules():
    heat = [mz.visit_softmax_temperature(s, 100) for s in (0, 49, 50, 74, 75, 99)]
    assert heat == [1, 1, 0.5, 0.5, 0.25, 0.25]
    close(mz.lr_schedule(0), 0.05)
    close(mz.lr_schedule(350e3), 0.005)
    close(mz.lr_schedule(torch.tensor(350e3, dtype=f64)), 0.005)
    close([mz.lr_schedule(s, 1.0, 0.1, 10, steps=True) for s in (0, 9, 10, 25)], [1, 1, 0.1, 0.01])
    close([mz.lr_schedule(s, 0.2, warmup=4) / mz.lr_schedule(s, 0.2) for s in (0, 1, 3, 9)], [0.25, 0.5, 1, 1])


def test_per_weights():
    close(mz.per_weights(torch.full((8,), 3.0, dtype=f64), torch.tensor([1, 5]), 0.7), [1, 1])
    priorities = torch.tensor([[1.0, 3.0], [0.0, 4.0]], dtype=f64)  # P = 1/8, 3/8, 0, 1/2
    close(mz.per_weights(priorities, torch.tensor([0, 1, 3]), 1.0), [1, 1 / 3, 1 / 4])
    close(mz.per_weights(priorities, torch.tensor([0, 3]), 0.0), [1, 1])


def test_negative_cosine_similarity():
    a, b = torch.randn(3, 8, dtype=f64, requires_grad=True), torch.randn(3, 8, dtype=f64, requires_grad=True)
    close(mz.negative_cosine_similarity(a, a.detach()).detach(), -torch.ones(3))
    close(mz.negative_cosine_similarity(3 * a, b), mz.negative_cosine_similarity(a, 7 * b))
    mz.negative_cosine_similarity(a, b).sum().backward()
    assert b.grad is None and a.grad.abs().sum() > 0


# ---- Search: parts ---------------------------------------------------------------------------------------------------


def test_puct_score():
    prior, zeros = torch.tensor([0.2, 0.8], dtype=f64), torch.zeros(2, dtype=f64)
    q = torch.tensor([0.5, 0.1], dtype=f64)
    close(mz.puct_score(prior, zeros, q, 1), q + prior * (1.25 + math.log((1 + 19653) / 19652)))
    visits = torch.tensor([3.0, 1.0], dtype=f64)
    expected = q + prior * 5**0.5 / (1 + visits) * (1.25 + math.log((5 + 19653) / 19652))
    close(mz.puct_score(prior, visits, q, 5), expected)
    close(mz.puct_score(prior[None], visits[None], q[None], torch.tensor([5.0], dtype=f64)), expected[None])


def test_qtransform_by_parent_and_siblings():
    q, visits = torch.tensor([1.0, 3.0, -50.0], dtype=f64), torch.tensor([1.0, 2.0, 0.0])
    close(mz.qtransform_by_parent_and_siblings(q, visits, torch.tensor(2.0)), [0, 1, 0])
    close(mz.qtransform_by_parent_and_siblings(q, visits, torch.tensor(5.0)), [0, 0.5, 0])
    close(mz.qtransform_by_parent_and_siblings(q, visits, torch.tensor(-1.0)), [0.5, 1, 0])
    close(mz.qtransform_by_parent_and_siblings(torch.full((3,), 2.0), visits, torch.tensor(2.0)), [0, 0, 0])
    close(mz.qtransform_by_parent_and_siblings(q, torch.zeros(3), torch.tensor(2.0)), [0, 0, 0])


def test_qtransform_completed_by_mix_value():
    f = mz.qtransform_completed_by_mix_value
    logits, raw = torch.zeros(4, dtype=f64), torch.tensor(0.3, dtype=f64)
    q, none = torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=f64), torch.zeros(4, dtype=f64)
    close(f(q, none, logits, raw), none, 0)
    visits = torch.tensor([2.0, 1.0, 0.0, 0.0], dtype=f64)
    mixed = (0.3 + 3 * 0.0) / 4  # the mean Q of the visited is 0
    expected = (50 + 2) * 0.1 * (torch.tensor([1.0, -1.0, mixed, mixed], dtype=f64) + 1) / 2
    close(f(q, visits, logits, raw), expected)
    skewed = torch.log(torch.tensor([0.6, 0.2, 0.1, 0.1], dtype=f64))
    mixed = (0.3 + 3 * (0.6 - 0.2) / 0.8) / 4
    expected = (10 + 2) * 0.5 * (torch.tensor([1.0, -1.0, mixed, mixed], dtype=f64) + 1) / 2
    close(f(q, visits, skewed, raw, value_scale=0.5, maxvisit_init=10), expected)


def test_sequence_of_considered_visits():
    f = mz.get_sequence_of_considered_visits
    assert f(1, 4) == [0, 1, 2, 3] and f(4, 8) == [0, 0, 0, 0, 1, 1, 2, 2]
    assert f(16, 2) == [0, 0] and f(2, 4) == [0, 0, 1, 1]
    for m in range(1, 20):
        for n in (1, 7, 50):
            visits = [0] * m  # the sequence can be followed: some action always has the wanted number of visits
            for wanted in f(m, n):
                visits[visits.index(wanted)] += 1
            assert sum(visits) == n


def test_root_noise():
    torch.manual_seed(0)
    legal = torch.tensor([[True, True, False, True]]).repeat(2000, 1)
    noise = mz.dirichlet(0.3, legal)
    close(noise.sum(1), torch.ones(2000), 1e-5)
    assert (noise[:, 2] == 0).all() and (noise >= 0).all()
    close(noise.mean(0)[[0, 1, 3]], [1 / 3] * 3, 0.03)
    variance = (1 / 3) * (2 / 3) / (3 * 0.3 + 1)
    close(noise.var(0)[[0, 1, 3]], [variance] * 3, 0.02)
    p = torch.softmax(mz.add_root_noise(torch.zeros(2000, 4), noise, 0.25, ~legal), -1)
    close(p[:, :2], 0.75 / 3 + 0.25 * noise[:, :2], 1e-5)
    assert (p[:, 2] == 0).all()


# ---- Search: whole ---------------------------------------------------------------------------------------------------


def constant(A, value=0.0, reward=None):
    """A model without dynamics: `reward(depth, action)`, the latent counts the steps."""

    def step(latent, action):
        B = len(action)
        r = torch.zeros(B) if reward is None else reward(latent, action).float()
        return r, torch.zeros(B, A), torch.full((B,), value), latent + 1

    return step


class RandomTree:
    """Rewards, values and logits are pseudo-random functions of the history of actions, which is the latent."""

    def __init__(self, A, seed, scale=1.0):
        g = torch.Generator().manual_seed(seed)
        self.A, self.scale = A, scale
        self.weights = [torch.randn(n, dtype=f64, generator=g) * 3 for n in (2, 2, 2 * A)]

    def numbers(self, latent):
        """latent (B, 2) -> reward, logits, value."""
        x = torch.sin(latent * 12.9898 + 1) * 43.758  # chaotic, so that neighbours are unrelated
        reward = torch.sin(x @ self.weights[0]) * self.scale
        value = torch.sin(x @ self.weights[1] * 1.3 + 1)
        logits = torch.stack([torch.sin(x @ self.weights[2][2 * a : 2 * a + 2] + a) for a in range(self.A)], -1)
        return reward, 1.5 * logits, value

    def __call__(self, latent, action):
        a = action.to(f64)
        latent = torch.stack([torch.sin(latent[:, 0] * 3.1 + a + 0.5), torch.cos(latent[:, 1] * 2.7 - 1.9 * a)], -1)
        return *self.numbers(latent), latent

    def root(self, B, seed):
        latent = torch.randn(B, 2, dtype=f64, generator=torch.Generator().manual_seed(seed))
        _, logits, value = self.numbers(latent)
        return logits, value, latent


def slow_search(logits, value, latent, model, S, discount, invalid, q_norm="siblings", gumbel=None, considered=16):
    """The same search for one tree, as one would write it first: nodes are dicts, one simulation after the other."""

    def node(reward, logits, value, latent):
        return dict(r=reward, p=torch.softmax(logits, -1), logits=logits, raw=value, V=value, N=1, s=latent, kids={})

    A, inf = len(logits), math.inf
    illegal = torch.zeros(A, dtype=torch.bool) if invalid is None else invalid
    root = node(0.0, logits.masked_fill(illegal, -inf), float(value), latent)
    m = min(considered, A - int(illegal.sum()))

    def numbers(n):
        q, visits = torch.zeros(A, dtype=f64), torch.zeros(A, dtype=f64)
        for a, kid in n["kids"].items():
            q[a], visits[a] = kid["r"] + discount * kid["V"], kid["N"]
        return q, visits

    def spread(n):
        return [c["r"] + discount * c["V"] for c in n["kids"].values()] + [
            q for c in n["kids"].values() for q in spread(c)
        ]

    def choose(n, t):
        q, visits = numbers(n)
        if gumbel is not None:
            sigma = mz.qtransform_completed_by_mix_value(q, visits, n["logits"], torch.tensor(n["raw"], dtype=f64))
            if n is root:
                wanted = mz.get_sequence_of_considered_visits(m, S)[t] if t < S else visits.max()
                score = gumbel + n["logits"] + sigma
                return int(score.masked_fill(visits != wanted, -inf).argmax())
            return int((torch.softmax(n["logits"] + sigma, -1) - visits / (1 + visits.sum())).argmax())
        if q_norm == "siblings":
            qn = mz.qtransform_by_parent_and_siblings(q, visits, torch.tensor(n["V"], dtype=f64))
        else:
            found = spread(root) if q_norm == "tree" else [-1.0, 1.0]
            low, high = (min(found), max(found)) if found else (0.0, 0.0)
            qn = torch.where(visits > 0, (q - low) / max(high - low, 1e-8), 0)
        score = qn + n["p"] * n["N"] ** 0.5 / (1 + visits) * (1.25 + math.log((n["N"] + 19653) / 19652))
        return int(score.masked_fill(illegal if n is root else illegal & False, -inf).argmax())

    for t in range(S):
        path, n = [root], root
        while (a := choose(n, t)) in n["kids"]:
            n = n["kids"][a]
            path.append(n)
        r, p, v, s = (x[0] for x in model(n["s"][None], torch.tensor([a])))
        n["kids"][a] = node(float(r), p, float(v), s)
        G, below = float(v), n["kids"][a]
        for n in reversed(path):
            G = below["r"] + discount * G
            n["V"], n["N"], below = (n["V"] * n["N"] + G) / (n["N"] + 1), n["N"] + 1, n
    return numbers(root)[1], root["V"], choose(root, S)


@pytest.mark.parametrize("A, S, discount, masked", [(2, 40, 0.997, False), (5, 60, 0.9, True), (9, 50, -1.0, True)])
@pytest.mark.parametrize("kind", ["siblings", "bounds", "tree", "gumbel"])
@pytest.mark.parametrize("static", [False, True])  # shapes as on a CPU, and as in a CUDA graph
def test_search_equals_the_slow_one(static, kind, A, S, discount, masked, monkeypatch):
    B = 12
    monkeypatch.setattr(mz.Trees, "static", static)
    model = RandomTree(A, seed=A, scale=0.2 if discount < 0 else 1.0)
    logits, value, latent = model.root(B, seed=S)
    g = torch.Generator().manual_seed(0)
    invalid = torch.rand(B, A, generator=g) < 0.4 if masked else None
    if masked:
        invalid[torch.arange(B), torch.arange(B) % A] = False
    gumbel = -torch.log(-torch.log(torch.rand(B, A, dtype=f64, generator=g))) if kind == "gumbel" else None
    settings = dict(gumbel=gumbel, considered=4) if kind == "gumbel" else dict(q_norm=kind)
    visits, root, extra = mz.mcts(logits, value, latent, model, S, discount, invalid, **settings)
    for b in range(B):
        more = dict(gumbel=gumbel[b], considered=4) if kind == "gumbel" else dict(q_norm=kind)
        row = None if invalid is None else invalid[b]
        expected, v, action = slow_search(logits[b], value[b], latent[b], model, S, discount, row, **more)
        assert torch.equal(visits[b], expected), (b, visits[b], expected)
        close(root[b], v, 1e-9)
        if kind == "gumbel":
            assert int(extra["action"][b]) == action
    assert len({round(float(v), 6) for v in root}) == B  # the trees differ


@pytest.mark.parametrize("settings", [dict(), dict(q_norm="bounds"), dict(q_norm="tree"), dict(gumbel=True)])
def test_search_properties(settings):
    B, A, S = 6, 5, 30
    settings = settings | (dict(gumbel=torch.zeros(B, A, dtype=f64)) if "gumbel" in settings else {})
    model = RandomTree(A, seed=3)
    logits, value, latent = model.root(B, seed=1)
    visits, root, _ = mz.mcts(logits, value, latent, model, S, 0.9, **settings)
    close(visits.sum(1), torch.full((B,), S))
    order = torch.tensor([3, 0, 5, 1, 4, 2])  # trees do not see each other
    swapped, values, _ = mz.mcts(logits[order], value[order], latent[order], model, S, 0.9, **settings)
    assert torch.equal(swapped, visits[order]) and torch.equal(values, root[order])
    one, _, _ = mz.mcts(logits, value, latent, model, 1, 0.9, **settings)
    close(one, F.one_hot(logits.argmax(1), A))
    invalid = torch.zeros(B, A, dtype=torch.bool)
    invalid[:, 2] = invalid[:3, 0] = True
    masked, _, extra = mz.mcts(logits, value, latent, model, S, 0.9, invalid, **settings)
    assert (masked[invalid] == 0).all() and (masked.sum(1) == S).all() and (extra["policy"][invalid] == 0).all()
    close(extra["policy"].sum(1), torch.ones(B))


def test_constant_values_and_no_rewards():
    args = torch.zeros(2, 3), torch.full((2,), 0.7), torch.zeros(2, 1)
    _, root, _ = mz.mcts(*args, constant(3, 0.7), 25, 1.0)
    close(root, [0.7, 0.7], 1e-6)


@pytest.mark.parametrize("q_norm, S", [("siblings", 8), ("bounds", 16)])
def test_winning_move_of_two_players(q_norm, S):
    A = 4
    for win in range(A):
        model = constant(A, reward=lambda latent, a, win=win: (latent[:, 0] == 0) & (a == win))
        visits, root, _ = mz.mcts(torch.zeros(1, A), torch.zeros(1), torch.zeros(1, 1), model, S, -1.0, q_norm=q_norm)
        assert visits[0].argmax() == win and root[0] > 0
        if q_norm == "siblings" and win == 1:
            close(visits[0], [1, 7, 0, 0])


def test_two_plies_are_looked_ahead():
    """One player: the way to the reward leads through a state without one. Two players: the move with the immediate
    gain lets the opponent win more; the search has to see the reply, and its sign."""
    A, S = 3, 60

    def delayed(latent, a):
        """Only 2, then 1 is rewarded. The latent is 1 + the sum of a * 4^depth, and the depth."""
        reward = ((latent[:, 1] == 1) & (latent[:, 0] == 2) & (a == 1)).double()
        after = torch.stack([latent[:, 0] + a * 4.0 ** latent[:, 1], latent[:, 1] + 1], 1)
        return reward, torch.zeros(len(a), A, dtype=f64), torch.zeros(len(a), dtype=f64), after

    root = torch.zeros(1, A, dtype=f64), torch.zeros(1, dtype=f64), torch.zeros(1, 2, dtype=f64)
    for settings in (dict(), dict(q_norm="tree"), dict(q_norm="bounds"), dict(gumbel=torch.zeros(1, A, dtype=f64))):
        visits, value, extra = mz.mcts(*root, delayed, S, 1.0, **settings)
        # Gumbel visits the two finalists equally often; it names its action.
        assert "gumbel" in settings or visits[0].argmax() == 2, (settings, visits)
        assert extra["action"] == 2 and extra["policy"][0].argmax() == 2 and value[0] > 0

    table = torch.tensor([[0.5, 0.9, 0.9, 0.9], [0.0, 0.1, 0.2, 0.1], [0.1, 1.0, 0.0, 0.0]], dtype=f64)

    def reply(latent, a):
        """table[m]: gain of the first move m, then the gains of the opponent's replies 0, 1, 2. Best: 1 (0.0 - 0.2)."""
        ply, first = latent[:, 1], torch.where(latent[:, 1] == 0, a.double(), latent[:, 0])
        gains = table[first.long()]
        reward = torch.where(ply == 0, gains[:, 0], gains.gather(1, a[:, None] + 1)[:, 0])
        reward = torch.where(ply < 2, reward, 0)
        after = torch.stack([first, ply + 1], 1)
        return reward, torch.zeros(len(a), A, dtype=f64), torch.zeros(len(a), dtype=f64), after

    for settings in (dict(), dict(q_norm="tree"), dict(q_norm="bounds"), dict(gumbel=torch.zeros(1, A, dtype=f64))):
        visits, value, extra = mz.mcts(*root, reply, 200, -1.0, **settings)
        assert "gumbel" in settings or visits[0].argmax() == 1, (settings, visits)
        assert extra["action"] == 1 and extra["policy"][0].argmax() == 1
        assert -0.2 <= extra["q"][0, 1] < -0.05  # a mean that includes the explored replies


# ---- Networks and losses ---------------------------------------------------------------------------------------------


def count(module):
    return sum(p.numel() for p in module.parameters())


def spaces(kind):
    box = {
        "atari": gym.spaces.Box(0, 255, (96, 96, 3), np.uint8),
        "vector": gym.spaces.Box(-np.inf, np.inf, (4,), np.float32),
        "minatar": gym.spaces.Box(-np.inf, np.inf, (400,), np.float32),
        "board": gym.spaces.Box(-np.inf, np.inf, (18,), np.float32),
    }
    return box[kind]


def preset(name, **flags):
    return mz.Args(**(mz.PRESETS[name] | dict(preset=name) | flags))


def build(name, kind, actions, **flags):
    args = preset(name, **flags)
    return mz.MuZero(spaces(kind), actions, mz.network_config(args, spaces(kind))), args


def test_paper_network_counts():
    with torch.device("meta"):
        model, _ = build("full", "atari", 18)
        assert count(mz.ResidualBlock(256)) == 1_180_672 and count(mz.tower(256, 16)) == 18_890_752
    down, towers = model.h
    assert count(down) == 8_117_248 and count(towers) == 18_890_752 and count(model.h) == 27_008_000
    # 128 planes: 32 RGB frames and 32 actions; g: 18 one-hot planes
    assert down[0].in_channels == 128 and count(model.g) == 19_522_560 and count(model.f) == 0
    assert model.value.out.out_features == 601 and model.policy.out.out_features == 18
    assert count(model.policy) + count(model.value) + count(model.reward) < 1_000_000
    with torch.device("meta"):
        latent = model.represent(torch.zeros(2, 32, 96, 96, 3, dtype=torch.uint8), torch.zeros(2, 32, dtype=torch.long))
        assert latent.shape == (2, 256, 6, 6)
        assert model.dynamics(latent, torch.zeros(2, dtype=torch.long)).shape == latent.shape


def test_efficientzero_network_counts():
    """Published: h 325,056, of which 7,040 are a convolution and a norm that its code builds and never uses; f 133,611;
    projection 4,465,664; prediction head 1,051,136. g differs: no LSTM, no unused block, one-hot action planes."""
    with torch.device("meta"):
        model, _ = build("atari100k", "atari", 18)
    assert count(model.h) == 325_056 - 7_040
    assert count(model.f) + count(model.policy) + count(model.value) == 133_611
    assert count(model.project) == 4_465_664 and count(model.foresee) == 1_051_136
    published = 2_456_265 - 73_984 - 2_232_320 - 1_024 - (512 * 32 - 576 * 32)  # LSTM, its norm, its output width
    assert count(model.g) + count(model.reward) == published + 17 * 64 * 9  # 18 planes instead of 1


@pytest.mark.parametrize(
    "name, kind, actions, flags",
    [
        ("cpu", "vector", 2, {}),
        ("cpu_tictactoe", "board", 9, {}),
        ("cpu_tictactoe", "board", 9, dict(network="conv")),
        ("minatar", "minatar", 3, {}),
        ("atari100k", "atari", 18, {}),
    ],
)
def test_untrained_networks_foresee_nothing(name, kind, actions, flags):
    """Value and reward are exactly 0 and the policy is uniform; so a search visits all actions equally."""
    torch.manual_seed(0)
    model, args = build(name, kind, actions, **flags)
    model.eval()
    obs = torch.rand(3, args.frame_stack, *spaces(kind).shape).mul(255 if kind == "atari" else 1)
    past = torch.zeros(3, args.frame_stack, dtype=torch.long)
    with torch.no_grad():
        s = model.represent(obs, past)
        logits, value = model.predict(s)
        reward, logits2, value2, s2 = model.recurrent(s, torch.tensor([0, 1, 0]))
    assert s.shape == s2.shape and 0 == s.min() and s.max() == 1 and 0 == s2.min() and s2.max() == 1
    assert (value == 0).all() and (reward == 0).all() and (value2 == 0).all() and (logits == 0).all()
    assert not torch.equal(s[0], s2[0]) and not torch.equal(s2[0], s2[1])
    if name == "cpu":
        visits, root, _ = mz.mcts(logits, value, s, model.recurrent, 50, 0.99)
        assert (visits.amax(1) - visits.amin(1) <= 1).all() and (root == 0).all()


def one_batch(K=3, B=4, A=2):
    g = torch.Generator().manual_seed(0)
    batch = {"obs": torch.randn(B, 1, 1, 4, generator=g), "past": torch.full((B, 1, 1), -1)}
    batch |= {"action": torch.randint(A, (B, K), generator=g), "u": torch.rand(B, K, generator=g)}
    batch |= {"z": 5 * torch.rand(B, K + 1, generator=g), "reward_mask": torch.ones(B, K)}
    batch |= {k: torch.ones(B, K + 1) for k in ("value_mask", "policy_mask", "exists")}
    return batch | {"pi": torch.softmax(torch.randn(B, K + 1, A, generator=g), -1), "weight": torch.ones(B)}


def random_heads(model):
    torch.manual_seed(1)
    for head in (model.policy, model.value, model.reward):
        torch.nn.init.normal_(head[-1].weight, std=0.3)


def test_loss_against_a_loop():
    """The stacked heads give the loss of the loop of the paper's pseudocode, and its gradients: step 0 weighs 1, the
    others 1/K; half of the gradient passes from state to state, all of it from a head to its state."""
    torch.manual_seed(0)
    model, args = build("cpu", "vector", 2, unroll_steps=3, consistency_scale=0.0)
    random_heads(model)
    batch, K = one_batch(), 3
    loss, metrics, values = mz.muzero_loss(model, batch, args)
    grads = torch.autograd.grad(loss.mean(), list(model.parameters()))

    def categorical(logits, x):
        target = mz.scalar_to_support(mz.signed_hyperbolic(x), 20)
        return -(target * torch.log_softmax(logits, -1)).sum(-1)

    s, total = model.represent(batch["obs"][:, 0], None), 0.0
    for k in range(K + 1):
        if k:
            half = 0.5 * s + 0.5 * s.detach()
            s = model.dynamics(half, batch["action"][:, k - 1])
        policy = -(batch["pi"][:, k] * torch.log_softmax(model.policy(s), -1)).sum(-1)
        term = 0.25 * categorical(model.value(s), batch["z"][:, k]) + policy
        if k:
            term = (term + categorical(model.reward(s), batch["u"][:, k - 1])) / K
        total = total + term
    assert torch.allclose(loss, total, atol=1e-5)
    for a, b in zip(grads, torch.autograd.grad(total.mean(), list(model.parameters())), strict=True):
        assert torch.allclose(a, b, atol=1e-6), (a - b).abs().max()
    assert set(metrics) >= {"value", "policy", "reward"} and values.shape == (4,)


def test_consistency_loss():
    """Imagined latents against h of the later observations, only where those exist; the target gets no gradient."""
    torch.manual_seed(0)
    K, B = 3, 4
    model, args = build("cpu", "vector", 2, unroll_steps=K, consistency_scale=2.0)
    model.eval()  # the batch norms of the projections then treat samples apart
    batch = one_batch() | {"past": torch.full((B, K + 1, 1), -1)}
    batch["obs"] = torch.randn(B, K + 1, 1, 4)
    batch["exists"] = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]).float()
    loss, metrics, _ = mz.muzero_loss(model, batch, args)
    plain = mz.muzero_loss(model, batch, dataclasses.replace(args, consistency_scale=0.0))[0]
    s, expected = model.represent(batch["obs"][:, 0], None), torch.zeros(B)
    for k in range(1, K + 1):
        s = model.dynamics(s, batch["action"][:, k - 1])
        with torch.no_grad():
            true = model.project(model.represent(batch["obs"][:, k], None))
        cosine = F.cosine_similarity(model.foresee(model.project(s)), true, dim=-1)
        expected = expected - cosine * batch["exists"][:, k] / K
    assert torch.allclose(loss - plain, 2 * expected, atol=1e-5) and expected[3] == 0 and expected[0] != 0
    close(metrics["consistency"], expected.mean().detach(), 1e-6)
    batch["obs"].requires_grad_()
    mz.muzero_loss(model, batch, args)[0].sum().backward()
    grad = batch["obs"].grad.abs().sum((0, 2, 3))
    assert grad[0] > 0 and (grad[1:] == 0).all()


def test_masked_steps_do_not_count():
    model, args = build("cpu", "vector", 2, unroll_steps=3, consistency_scale=0.0)
    random_heads(model)
    batch = one_batch()
    for k in ("value_mask", "policy_mask", "exists"):
        batch[k][:, 2:] = 0
    batch["reward_mask"][:, 1:] = 0
    loss = mz.muzero_loss(model, batch, args)[0]
    for k in ("z", "u", "pi"):
        batch[k][:, 2 if k != "u" else 1 :] += 0.3
    assert torch.equal(loss, mz.muzero_loss(model, batch, args)[0])


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_updates_follow_the_schedule_and_stop_at_bad_numbers(kind):
    """Weights move as with torch's optimizer and the scheduled rate; after a loss that is not finite nothing moves."""
    torch.manual_seed(0)
    flags = dict(
        unroll_steps=3,
        consistency_scale=0.0,
        optimizer=kind,
        learning_rate=0.01,
        lr_decay=0.5,
        lr_decay_updates=2,
        warmup_updates=2,
    )
    model, args = build("cpu", "vector", 2, max_grad_norm=0.05, **flags)
    random_heads(model)
    learner, other = mz.Learner(model, args, torch.device("cpu")), copy.deepcopy(model)
    kinds = {"sgd": functools.partial(torch.optim.SGD, momentum=0.9), "adamw": torch.optim.AdamW}
    reference, batch = kinds[kind](other.parameters(), lr=1.0, weight_decay=1e-4), one_batch()
    for i in range(4):
        metrics, _ = learner.update(batch)
        reference.zero_grad()
        mz.muzero_loss(other, batch, args)[0].mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.05)
        reference.param_groups[0]["lr"] = 0.01 * min(1, (i + 1) / 2) * 0.5 ** (i / 2)
        reference.step()
        close(metrics["learning_rate"], reference.param_groups[0]["lr"], 1e-8)
        close(metrics["grad_norm"], norm, 1e-4)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-6), (a - b).abs().max()
    learner.check(metrics, "")
    kept = lambda: [*learner.params, *(v for x in learner.opt.state.values() for v in x.values())]  # noqa: E731
    before = [x.detach().clone() for x in kept()]
    metrics, _ = learner.update(batch | {"z": batch["z"] * math.nan})
    learner.update(batch)  # nothing after it counts either
    assert len(before) > 40 and all(torch.equal(a, b) for a, b in zip(before, kept(), strict=True))
    with pytest.raises(SystemExit, match="value.*gradient norm"):
        learner.check(metrics, "here")


def test_augmented_images_are_shifted():
    torch.manual_seed(0)
    x = torch.zeros(50, 2, 3, 16, 16, 3, dtype=torch.uint8)
    x[:, :, :, 8, 8] = 200
    y = mz.augment_images(x)
    assert y.shape == x.shape and y.dtype == torch.uint8
    spots = (y[..., 0] > 0).flatten(0, 2).nonzero()
    assert len(spots) == 300 and spots[:, 1:].min() == 4 and spots[:, 1:].max() == 12
    assert (y.reshape(50, 6, -1) == y.reshape(50, 6, -1)[:, :1]).all()  # one shift and one gain per sample
    assert 175 <= int(y.amax((1, 2, 3, 4, 5)).min()) < 200 < int(y.max()) <= 221


# ---- Replay ----------------------------------------------------------------------------------------------------------


def filled(args, capacity, lengths, terminal, actions=2, size=3):
    """A replay with one episode after the other in 2 environments; the reward of row t is t + 1, its value 100 t, its
    observation (environment, episode, t)."""
    space, args = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32), dataclasses.replace(args, num_envs=2)
    replay, both = mz.TrajectoryReplay(capacity, args, space, actions), np.arange(2)
    for episode, length in enumerate(lengths):
        for t in range(length + 1):
            last = np.full(2, t == length)
            obs = np.stack([[e, episode, t] for e in both]).astype(np.float32)
            rows = dict(action=np.full(2, t % actions), reward=np.full(2, float(t + 1) if t else 0.0), is_last=last)
            rows |= dict(policy=np.full((2, actions), 0.5), value=np.full(2, 100.0 * t), is_first=np.full(2, t == 0))
            replay.add(both, rows | {"is_terminal": last & terminal, "obs": obs})
    return replay


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("capacity", [100, 17])
def test_replay_targets_against_a_loop(terminal, capacity):
    args = preset("cpu", td_steps=4, unroll_steps=3, gamma=0.9, frame_stack=2, action_planes=True)
    lengths = [5, 1, 7, 9]
    replay = filled(args, capacity, lengths, terminal)
    batch, _ = replay.sample(300)
    seen = set()
    for b in range(300):
        e, episode, t = (int(x) for x in batch["obs"][b, 0, -1])
        seen.add((e, episode, t))
        length = lengths[episode]
        assert t < length  # an episode's last row is never drawn
        before = [e, episode, max(t - 1, 0)]  # the stack does not reach into the previous episode
        assert batch["obs"][b, 0, 0].tolist() == before
        assert batch["past"][b, 0].tolist() == [(t - 2) % 2 if t >= 2 else -1, (t - 1) % 2 if t >= 1 else -1]
        for k in range(4):
            i = t + k
            if i < length:
                z = sum(0.9**j * (i + j + 2) for j in range(4) if i + j + 1 <= length)
                far = min(i + 4, length)
                z += 0.9 ** (far - i) * 100 * far * (far < length or not terminal)
                close(batch["z"][b, k], z, 1e-3)
                assert batch["policy_mask"][b, k] == batch["value_mask"][b, k] == 1
                if k < 3:
                    assert batch["action"][b, k] == i % 2
            else:
                assert batch["policy_mask"][b, k] == 0
                # after a terminal state values are 0 for ever; after a truncation nobody knows
                assert batch["value_mask"][b, k] == terminal and (not terminal or batch["z"][b, k] == 0)
            if k and i <= length:
                assert batch["u"][b, k - 1] == i + 1 and batch["reward_mask"][b, k - 1] == 1
            elif k:
                assert batch["u"][b, k - 1] == 0 and batch["reward_mask"][b, k - 1] == terminal
    whole = {(e, i, t) for e in range(2) for i, n in enumerate(lengths) for t in range(n)}
    assert seen == whole if capacity == 100 else seen < whole


def test_rows_are_drawn_when_their_targets_are_known():
    args = preset("cpu", td_steps=4, unroll_steps=3)
    replay = filled(args, 50, [20], True)
    assert (replay.priority[:, :20] > 0).all() and replay.priority[0, 20] == 0
    replay = filled(args, 50, [], True)
    both, none = np.arange(2), np.zeros(2, bool)
    for t in range(12):
        rows = dict(action=none, reward=none, is_last=none, is_terminal=none, is_first=~none if t == 0 else none)
        rows |= dict(policy=np.zeros((2, 2)), value=none)
        replay.add(both, rows | {"obs": np.zeros((2, 3))})
        assert (replay.priority[0] > 0).sum() == max(0, t + 1 - 7) and replay.drawable == (t >= 7)


def test_outcomes_of_two_players():
    """The last mover wins: targets +1 for the states it moves in, -1 for the other's."""
    args = preset("cpu_tictactoe", num_envs=1)
    env = mz.Board(mz.TicTacToe)
    replay, (obs, _), reward = mz.TrajectoryReplay(30, args, env.observation_space, 9), env.reset(seed=0), 0.0
    one, yes, no = np.arange(1), np.ones(1, bool), np.zeros(1, bool)
    for t, move in enumerate((0, 3, 1, 4, 2)):  # the first player completes the top row
        rows = dict(action=[move], reward=[reward], is_last=no, is_terminal=no, is_first=no if t else yes)
        replay.add(one, rows | dict(value=np.full(1, 0.3), obs=obs[None]))
        assert not replay.drawable  # nothing is learned from a game that is not over
        obs, reward, terminated, truncated, _ = env.step(move)
    assert terminated and not truncated and reward == 1
    replay.add(one, dict(reward=[reward], is_first=no, is_last=yes, is_terminal=yes, obs=obs[None]))
    batch, index = replay.sample(64)
    assert set(index.tolist()) == set(range(5))
    for i, z in zip(index.tolist(), batch["z"][:, 0].tolist(), strict=True):
        assert z == (1.0 if i % 2 == 0 else -1.0)


def test_priorities():
    args = preset("cpu", td_steps=1, unroll_steps=1, per_alpha=0.5, per_beta=1.0)
    replay = filled(args, 60, [20], True)
    replay.priority[:] = 0
    replay.priority[0, 3], replay.priority[1, 5] = 1.0, 3.0
    index, env, row = replay.draw(20_000)
    assert set(index.tolist()) == {3, 65} and (env[index == 65] == 1).all() and (row[index == 65] == 5).all()
    close((index == 65).double().mean(), 0.75, 0.02)
    replay.refresh(torch.tensor([3, 65]), torch.tensor([4.0, 0.25]))
    close(replay.priority.view(-1)[[3, 65]], [2.0, 0.5], 1e-5)
    assert replay.top == replay.priority.max()
    batch, index = replay.sample(1000)
    close(batch["weight"][index == 65].mean() / batch["weight"][index == 3].mean(), 4.0, 1e-4)
    replay.args = dataclasses.replace(args, per_beta=0.0, per_beta_end=0.5)
    for progress, ratio in ((0.0, 1.0), (1.0, 2.0), (0.5, 2**0.5)):
        batch, index = replay.sample(1000, progress=progress)
        close(batch["weight"][index == 65].mean() / batch["weight"][index == 3].mean(), ratio, 1e-4)


# ---- Games -----------------------------------------------------------------------------------------------------------


def test_tic_tac_toe_by_enumeration():
    """255,168 games, of which the first player wins 131,184, the second 77,904, and 46,080 are drawn; perfect play from
    the empty board is a draw."""
    boards, move, ended = np.zeros((1, 9), np.int8), 0, []
    while len(boards):
        game, action = np.nonzero(mz.TicTacToe.legal(boards))
        boards, reward, done = mz.TicTacToe.step(boards[game], action)
        ended.append((int(done.sum()), int(reward.sum())))
        boards, move = boards[~done], move + 1
    assert sum(n for n, _ in ended) == 255_168 and move == 9
    assert sum(w for _, w in ended[::2]) == 131_184 and sum(w for _, w in ended[1::2]) == 77_904
    table = boards_tool.solve(mz.TicTacToe)
    assert table[np.zeros(9, np.int8).tobytes()][0] == 0 and len(table) == 4520  # positions with a move, canonical


@pytest.mark.parametrize("game, lines", [(mz.TicTacToe, 8), (mz.Connect4, 69)])
def test_every_line_wins(game, lines):
    assert len({frozenset(line) for line in game.lines.tolist()}) == lines == len(game.lines)
    for line in game.lines:
        vertical = game is mz.Connect4 and len(set(line % 7)) == 1  # its last stone is the highest
        for last in line[:1] if vertical else line:
            board = np.zeros(game.cells, np.int8)
            board[line] = 1
            board[last] = 0
            if game is mz.Connect4:  # stones below, that complete nothing else
                below = [c for c in range(last + 7, 42, 7) if board[c] == 0]
                board[below] = -1
            action = last % 7 if game is mz.Connect4 else last
            after, reward, done = game.step(board, action)
            assert reward == 1 and done and after[last] == -1


def test_connect4_rules():
    board = np.zeros((2, 42), np.int8)
    for move in range(6):
        assert mz.Connect4.legal(board)[:, 3].all()
        board, reward, done = mz.Connect4.step(board, np.array([3, 3 if move < 5 else 2]))
        assert not reward.any() and not done.any()
    assert not mz.Connect4.legal(board)[0, 3] and mz.Connect4.legal(board)[1, 3]
    column = board[0].reshape(6, 7)[:, 3]
    assert column.tolist() == [-1, 1, -1, 1, -1, 1] and (board[0] != 0).sum() == 6
    assert (mz.Connect4.from_obs(mz.Connect4.observe(board)) == board).all()


def outcomes(game, player, opponent, n):
    """Returns of n games of `player` against `opponent`, and how many of them it began."""
    env, found, began = mz.Board(game, opponent), [], 0
    for seed in range(n):
        obs, reward, over = env.reset(seed=seed)[0], 0.0, False
        began += not obs.any()
        while not over:
            obs, reward, over, _, _ = env.step(player(game, game.from_obs(obs), env.np_random))
        found.append(reward)
    return np.array(found), began


def test_opponents():
    perfect, one_ply, uniform = boards_tool.perfect, boards_tool.one_ply, mz.random_move
    draws, began = outcomes(mz.TicTacToe, perfect, perfect, 40)
    assert (draws == 0).all() and 10 < began < 30
    found, _ = outcomes(mz.TicTacToe, perfect, uniform, 100)
    assert (found >= 0).all() and found.mean() > 0.5
    assert (outcomes(mz.TicTacToe, uniform, perfect, 100)[0] <= 0).all()
    board, rng = np.zeros((2, 42), np.int8), np.random.default_rng(0)
    board[0, [35, 36, 37]] = 1
    board[1, [35, 36, 37]] = -1  # win, and block
    assert [one_ply(mz.Connect4, b, rng) for b in board] == [3, 3]
    assert outcomes(mz.Connect4, one_ply, uniform, 60)[0].mean() > 0.7


def test_random_openings_and_illegal_moves():
    """Games begin after 0 to 4 moves that end nothing, the same for a seed; an illegal move becomes a legal one."""
    env, seen = mz.Board(mz.TicTacToe, opening=4), []
    for seed in range(300):
        obs = env.reset(seed=seed)[0]
        seen.append(mz.TicTacToe.from_obs(obs).tobytes())
        assert (env.reset(seed=seed)[0] == obs).all()
        taken = np.flatnonzero(env.board)
        if len(taken):
            after, *_ = env.step(taken[0])
            assert (mz.TicTacToe.from_obs(after) != 0).sum() == len(taken) + 1
    stones = np.bincount([(np.frombuffer(x, np.int8) != 0).sum() for x in seen])
    assert len(stones) == 5 and (stones > len(seen) / 10).all() and len(set(seen)) > 50


def test_random_games_agree_with_a_slow_referee():
    rng = np.random.default_rng(1)
    for game in (mz.TicTacToe, mz.Connect4):
        board, done = np.zeros(game.cells, np.int8), False
        while not done:
            H, W = game.shape
            legal = game.legal(board)
            action = int(rng.choice(np.flatnonzero(legal)))
            board, reward, done = game.step(board, action)
            grid = -board.reshape(H, W)  # as the mover saw it
            runs = [
                all(
                    0 <= y + i * dy < H and 0 <= x + i * dx < W and grid[y + i * dy, x + i * dx] == 1
                    for i in range(game.connect)
                )
                for y in range(H)
                for x in range(W)
                for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1))
            ]
            assert bool(reward) == any(runs) and done == (any(runs) or (board != 0).all())


class Lives(gym.Env):
    """Lives after each raw step from a list; frames are noise; has an `ale` as the emulator's environment."""

    observation_space, action_space = gym.spaces.Box(0, 255, (20, 30, 3), np.uint8), gym.spaces.Discrete(4)

    def __init__(self, lives):
        self.plan, self.ale, self.resets = lives, self, 0

    def lives(self):
        return self.plan[self.t]

    def frame(self):
        return np.random.default_rng(self.t).integers(256, size=(20, 30, 3), dtype=np.uint8)

    def reset(self, *, seed=None, options=None):
        self.t, self.resets = 0, self.resets + 1
        return self.frame(), {}

    def step(self, action):
        self.t += 1
        return self.frame(), 1.0, self.plan[self.t] == 0, False, {}


def test_atari_frames_rewards_and_lives():
    """Two raw steps per action; a lost life is told and ends nothing; a life won must not hide the next one lost."""
    args = mz.Args(image_size=10, action_repeat=2)
    env = mz.AtariGame(Lives([3, 3, 4, 4, 3, 3, 3, 2, 2, 2, 0]), args)
    env.unwrapped.reset = lambda **kw: Lives.reset(env.unwrapped)
    seed = next(s for s in range(100) if np.random.default_rng(s).integers(31) == 0)  # without no-ops
    env.reset(seed=seed)
    fine = lambda t: np.random.default_rng(t).integers(256, size=(20, 30, 3), dtype=np.uint8)  # noqa: E731
    seen = []
    for t in (2, 4, 6, 8, 10):
        picture, reward, terminated, truncated, info = env.step(1)
        assert env.unwrapped.t == t and reward == 2 and not truncated and terminated == (t == 10)
        block = np.maximum(fine(t), fine(t - 1)).reshape(10, 2, 10, 3, 3).mean((1, 3))
        assert np.abs(picture - block).max() <= 0.501
        seen.append(info["life_lost"])
    assert seen == [False, True, False, True, True]
    grey = mz.AtariGame(Lives([3, 3, 2]), dataclasses.replace(args, grayscale=True))
    assert grey.reset(seed=seed)[0].shape == (10, 10, 1)


def test_area_weights():
    for n, size in ((210, 96), (160, 96), (10, 5), (7, 7)):
        weights = mz.area_weights(n, size)
        assert weights.shape == (size, n) and np.allclose(weights.sum(1), 1, atol=1e-5)
        assert np.allclose(weights.sum(0), size / n, atol=1e-5)
    assert np.allclose(mz.area_weights(3, 2), [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]])


def test_stacks_of_frames_and_actions():
    """Newest last; an episode begins with copies of its first frame and without actions before it."""
    obs, first = torch.arange(4.0)[:, None, None].expand(4, 2, 1), torch.tensor([[1, 1], [0, 0], [0, 1], [0, 0]]).bool()
    state, found = None, []
    for t in range(4):
        frames, past = mz.stack_frames(obs[t], first[t], state, 3)
        state = frames, past, torch.full((2,), 10 + t)
        found.append((frames[..., 0].tolist(), past.tolist()))
    assert [f[0][0] for f in found] == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]]
    assert [f[1][0] for f in found] == [[-1, -1, -1], [-1, -1, 10], [-1, 10, 11], [10, 11, 12]]
    assert [f[0][1] for f in found] == [[0, 0, 0], [0, 0, 1], [2, 2, 2], [2, 2, 3]]
    assert [f[1][1] for f in found] == [[-1, -1, -1], [-1, -1, 10], [-1, -1, -1], [-1, -1, 12]]


def test_a_lost_life_ends_an_episode_and_the_game_goes_on(tmp_path, monkeypatch):
    """With --episodic-life the row of the loss is terminal, the next row is a first one with the same picture, and the
    environment is not reset."""
    monkeypatch.chdir(tmp_path)
    args = preset("atari100k", env_id="ALE/Breakout-v5", total_timesteps=160, learning_starts=150, num_envs=1,
                  num_simulations=2, batch_size=2, train_ratio=0.1, image_size=32, eval_episodes=1, log_every=100,
                  save_every=100, buffer_size=500, max_episode_steps=60, cuda=False, num_threads=1)  # fmt: skip
    monkeypatch.setattr(mz, "evaluate", lambda *a: np.zeros(1))
    mz.train(args)
    (run,) = (tmp_path / "runs").iterdir()
    rows = {k: v[0] for k, v in torch.load(run / "ckpt.pt", weights_only=True)["replay"]["rows"].items()}
    lost = rows["is_terminal"].nonzero()[:, 0]
    assert 0 < len(lost) < 8 and rows["is_last"].sum() >= len(lost) and rows["is_last"][lost].all()
    for i in lost[lost < len(rows["reward"]) - 1].tolist():
        assert rows["is_first"][i + 1] and torch.equal(rows["obs"][i + 1], rows["obs"][i])
