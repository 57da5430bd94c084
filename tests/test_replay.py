"""Replay of dreamerv3.py: sequences, the online queue, latents that are written back, and when an update is due."""

import io

import numpy as np
import pytest
import torch

import dreamerv3 as d


def make_replay(capacity=23, envs=3, seed=0):
    """Sequences of 5 rows; row x of environment e holds both numbers."""
    specs = {"x": ((), torch.int64), "env": ((), torch.int64), "deter": ((2,), torch.bfloat16)}
    return d.Replay(capacity, envs, specs | {"stoch": ((3,), torch.uint8)}, 4, "cpu", seed)


def add(replay, envs, n=1):
    envs = np.array(envs)
    for _ in range(n):
        rows = dict(x=replay.count[envs], env=envs, deter=np.zeros((len(envs), 2)), stoch=np.zeros((len(envs), 3)))
        replay.add(envs, rows)


def starts_of(batch):
    return list(zip(batch["env"][:, 0].tolist(), batch["x"][:, 0].tolist()))


def test_online_queue_gives_fresh_sequences_from_row_1_in_order_each_once():
    replay = make_replay(capacity=100, envs=2)
    add(replay, [0], 11)
    assert starts_of(replay.sample(2)[0]) == [(0, 1), (0, 6)]
    add(replay, [0, 1], 5)
    add(replay, [1])
    batch = starts_of(replay.sample(64)[0])
    assert batch[:2] == [(0, 11), (1, 1)] and len(set(batch)) > 10 and not replay.queue  # then uniform draws
    replay = make_replay(capacity=12, envs=1)
    add(replay, [0], 42)  # rows 30 to 41 are left
    assert starts_of(replay.sample(2)[0]) == [(0, 31), (0, 36)]


def test_replay_draws_every_sequence_of_one_environment_equally_often():
    replay, rows = make_replay(envs=4), (30, 61, 9, 3)  # two have wrapped, one is filling, one has no whole sequence
    for env, n in enumerate(rows):
        add(replay, [env], n)
    possible = [(e, s) for e, n in enumerate(rows) for s in range(max(0, n - 23), n - 4)]
    assert replay.sequences().sum() == len(possible)
    replay.queue.clear()
    batch, _ = replay.sample(400 * len(possible))
    assert (batch["x"].diff(dim=1) == 1).all() and (batch["env"] == batch["env"][:, :1]).all()
    counts = [starts_of(batch).count(p) for p in possible]
    assert sum(counts) == len(batch["x"]) and min(counts) > 300 and max(counts) < 500  # five standard deviations


def test_latents_written_back_come_with_the_next_sample():
    replay, expected = make_replay(), {}
    for version in range(60):
        add(replay, [0, 1, 2], 5 if version == 0 else version % 2)
        batch, ids = replay.sample(4)
        keys = torch.stack([batch["env"], batch["x"]], -1)  # (4, 5, 2)
        values = torch.tensor([[expected.get(tuple(k), 0) for k in row] for row in keys.tolist()])[..., None]
        assert torch.equal(batch["deter"].long(), torch.cat([values, -values], -1))
        assert torch.equal(batch["stoch"].long(), values.expand(4, 5, 3))
        expected |= {tuple(k): version + 1 for k in keys[:, 1:].reshape(-1, 2).tolist()}  # row 0 is context
        new = torch.full((4, 4, 1), version + 1.0)
        replay.write_back(ids, torch.cat([new, -new], -1).bfloat16(), new.expand(4, 4, 3).to(torch.uint8))
    assert len(expected) > 80


@pytest.mark.parametrize("rows", [(9, 0, 14), (30, 23, 61)], ids=["filling", "wrapped"])
def test_replay_goes_on_from_its_state(rows):
    one, two, buffer = make_replay(), make_replay(seed=9), io.BytesIO()
    for env, n in enumerate(rows):
        add(one, [env], n)
    torch.save(one.state_dict(), buffer)
    buffer.seek(0)
    two.load_state_dict(torch.load(buffer, weights_only=True))
    for _ in range(20):
        (a, i), (b, j) = one.sample(5), two.sample(5)
        assert torch.equal(i, j) and all(torch.equal(a[k], b[k]) for k in a)
        for replay in (one, two):
            add(replay, [0, 2], 3)


def test_ratio():
    for r, steps, due in (
        (0.25, range(1, 10), [1, 0, 0, 0, 1, 0, 0, 0, 1]),
        (1, range(16, 64, 16), [1, 16, 16]),
        (1 / 32, range(16, 128, 16), [1, 0, 1, 0, 1, 0, 1]),
    ):
        ratio = d.Ratio(r)
        assert [ratio(s) for s in steps] == due
    ratio = d.Ratio(0.3)
    assert abs(sum(ratio(s) for s in range(10_000)) - 3_000) <= 1  # no drift
