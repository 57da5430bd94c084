"""ijepa.py by numbers: closed forms, plain references, parameter counts of the released networks, masks' statistics
against a slow sampler, crops against PIL, data of all kinds, several processes against one.

Facts are those of I-JEPA (Assran et al., CVPR 2023; arXiv:2301.08243v3) and of its authors' code. Where a plausible
wrong variant exists, the test also checks that the variant would give another number."""

import copy
import csv
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "benchmarks")]
import common  # noqa: E402
import jepa as plain  # noqa: E402

import ijepa  # noqa: E402
from ijepa import (  # noqa: E402
    Args,
    IJepa,
    JepaLearner,
    MaskCollator,
    MaskConfig,
    Predictor,
    VisionTransformer,
    apply_masks,
    count_params,
    sample_block_size,
    sample_masks,
)

CPU = torch.device("cpu")
SMALL = dict(
    image_size=32, patch_size=4, embed_dim=16, depth=2, num_heads=2, pred_dim=8, pred_depth=2, batch_size=8,
    mask_group=8, min_keep=3, compile=False, num_workers=0, learning_rate=1e-3, start_lr=1e-3, warmup_epochs=0.0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small(classes=0, **changes):
    args = Args(**SMALL | changes)
    model = IJepa(ijepa.jepa_config(args, 3))
    return args, model, JepaLearner(model, args, CPU, total=100, ipe=10, classes=classes)


def batch_of(args, seed=0):
    """Random images and masks of one update."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, generator=g)
    group = min(args.mask_group, args.batch_size)
    return images, MaskCollator(ijepa.mask_config(args), seed, group)(1, 0, args.batch_size)


# ---- Maths -----------------------------------------------------------------------------------------------------------


def test_positions():
    dim, G = 24, 5
    table = ijepa.get_2d_sincos_pos_embed(dim, G)
    assert table.shape == (G * G, dim)
    assert torch.allclose(table[0], torch.tensor(2 * ([0.0] * 6 + [1.0] * 6)))
    assert torch.allclose(table.norm(dim=1), torch.full((G * G,), math.sqrt(dim / 2)))
    for r in range(G):
        for c in range(G):  # first half: column, second half: row; sines, then cosines
            for half, x in ((0, c), (1, r)):
                for j in range(dim // 4):
                    w = 10_000 ** (-j / (dim / 4))
                    assert table[r * G + c, half * 12 + j] == pytest.approx(math.sin(x * w), abs=1e-6)
                    assert table[r * G + c, half * 12 + 6 + j] == pytest.approx(math.cos(x * w), abs=1e-6)
    with pytest.raises(ValueError, match="multiple of 4"):
        ijepa.get_2d_sincos_pos_embed(6, 3)


def test_apply_masks_and_repeats():
    x = torch.randn(3, 7, 2)
    assert torch.equal(apply_masks(x, [torch.arange(7).expand(3, 7)]), x)
    masks = [torch.tensor([[0, 2], [1, 3], [5, 6]]), torch.tensor([[6, 0], [2, 2], [4, 1]])]
    out = apply_masks(x, masks)
    assert out.shape == (6, 2, 2)
    for m in range(2):
        for b in range(3):
            assert torch.equal(out[m * 3 + b], x[b, masks[m][b]])  # mask-major
    a = torch.arange(4.0)[:, None]
    assert ijepa.repeat_interleave_batch(a, 2, 2).flatten().tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert a.repeat_interleave(2, 0).flatten().tolist() != [0, 1, 0, 1, 2, 3, 2, 3]


def test_schedules():
    lr = ijepa.warmup_cosine_lr
    assert lr(1) == pytest.approx(2.00032e-4, rel=1e-9)  # ImageNet: the first update already has moved
    assert lr(25_000) == pytest.approx(1e-3) and lr(187_500) == pytest.approx(1e-6)
    assert lr(25_000 + (187_500 - 25_000) // 2) == pytest.approx((1e-3 + 1e-6) / 2)
    assert lr(12_500) == pytest.approx(6e-4) and lr(187_500, total=187_500) == pytest.approx(1e-6)
    assert lr(5, 10, 20, 0.0, 1.0, 0.1) == 0.5 and lr(20, 10, 20, 0.0, 1.0, 0.1) == pytest.approx(0.1)
    wd = ijepa.cosine_wd
    assert wd(187_500 // 2) == pytest.approx(0.22) and wd(187_500) == pytest.approx(0.4)
    assert wd(0) == pytest.approx(0.04) and wd(187_500 // 4) != pytest.approx(0.13)  # a cosine, not a line
    assert wd(50, 100, 0.05, 0.05) == pytest.approx(0.05)
    m = ijepa.ema_momentum
    assert m(0) == 0.996 and m(187_500) == 1.0 and m(187_500 // 2) == pytest.approx(0.998)


def test_schedules_of_a_run():
    """The first update has the learning rate of step 1 and the momentum of step 0; ipe_scale stretches all three."""
    _, _, learner = small(warmup_epochs=2.0, start_lr=2e-4)
    assert learner.warmup == 20 and learner.horizon == 100
    lr, wd, momentum = learner.schedules(1)
    assert lr == pytest.approx(2e-4 + 8e-4 / 20) and momentum == 0.996 and wd > 0.04
    assert learner.schedules(100)[0] == pytest.approx(1e-6) and learner.schedules(100)[1] == pytest.approx(0.4)
    assert learner.schedules(100)[2] == pytest.approx(0.996 + 0.004 * 0.99)
    _, _, longer = small(ipe_scale=1.25)
    assert longer.horizon == 125 and longer.schedules(100)[0] > 1e-5


def test_target_norm_and_loss():
    h = torch.randn(4, 5, 12) * 7 + 3
    n = ijepa.feature_norm(h)
    assert n.mean(-1).abs().max() < 1e-6 and torch.allclose(n.var(-1, correction=0), torch.ones(4, 5), atol=1e-4)
    assert torch.allclose(ijepa.feature_norm(3 * h - 1), n, atol=1e-5)
    loss = ijepa.jepa_loss
    assert loss(torch.tensor([0.5]), torch.tensor([0.0])) == 0.125
    assert loss(torch.tensor([2.0]), torch.tensor([0.0])) == 1.5
    assert loss(torch.tensor([2.0]), torch.tensor([0.0]), "l2") == 4.0 and loss(h, h) == 0
    pred, target = torch.randn(3, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    loss(pred, target).backward()
    assert target.grad is None and pred.grad is not None


def test_collapse_metrics():
    x = torch.linalg.qr(torch.randn(400, 16)).Q * 3
    x = x - x.mean(0)
    assert ijepa.effective_rank(x) == pytest.approx(16, rel=0.02) and ijepa.rankme(x) == pytest.approx(16, rel=0.02)
    line = torch.randn(50, 1) @ torch.randn(1, 8)
    assert ijepa.effective_rank(line) == pytest.approx(1, abs=1e-3) and ijepa.rankme(line) == pytest.approx(1, abs=1e-3)
    s = torch.linalg.svdvals(torch.randn(30, 6).double())
    x = torch.linalg.qr(torch.randn(30, 6).double()).Q * s
    p = s / s.sum() + 1e-7
    assert ijepa.rankme(x) == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-6)
    same = ijepa.collapse_metrics(torch.ones(40, 5))
    assert same["feature_std"] == 0 and same["rankme"] == pytest.approx(1, abs=1e-3)
    shifted = ijepa.collapse_metrics(torch.randn(500, 5) + 100)
    assert shifted["rankme"] < 1.3 < 4 < shifted["effective_rank"]  # RankMe is not centred


def test_knn_and_linear_probe():
    y = torch.arange(200) % 4
    x = 5 * F.one_hot(y, 4).float() @ torch.randn(4, 10) + torch.randn(200, 10) * 0.1 + 50
    assert ijepa.knn_accuracy(x[:100], y[:100], x[100:], y[100:], 5) == 1.0
    assert ijepa.linear_probe(x[:100], y[:100], x[100:], y[100:]) == 1.0
    x, y = torch.randn(2_000, 10), torch.randint(4, (2_000,))
    for probe in (ijepa.knn_accuracy, ijepa.linear_probe):
        assert 0.18 < probe(x[:1_000], y[:1_000], x[1_000:], y[1_000:]) < 0.32
    # cosine, after the mean is taken away: by distance this one would be another class
    train, labels = torch.tensor([[0.0, 1], [1, 0], [0, -1], [-1, 0]]) + 9, torch.arange(4)
    assert ijepa.knn_accuracy(train, labels, torch.tensor([[9.0, 29], [9.1, 9.0]]), torch.tensor([0, 1]), 1) == 1.0


# ---- Masks -----------------------------------------------------------------------------------------------------------


def test_block_sizes():
    target, context = dict(scale=(0.15, 0.2), aspect=(0.75, 1.5)), dict(scale=(0.85, 1.0), aspect=1)
    assert sample_block_size(0.0, grid=14, **target) == (5, 6) and sample_block_size(0.9999, grid=14, **target) == (
        8,
        5,
    )
    u = np.random.default_rng(0).random(20_000)
    sizes = [sample_block_size(x, grid=14, **target) for x in u]
    share = {s: sizes.count(s) / len(u) for s in set(sizes)}
    wanted = {(5, 6): 0.27, (6, 5): 0.12, (6, 6): 0.21, (7, 5): 0.37, (8, 5): 0.03}
    assert share.keys() == wanted.keys() and all(abs(share[s] - wanted[s]) < 0.015 for s in share)
    assert {sample_block_size(x, grid=14, **context) for x in u} == {(13, 13)}
    assert {sample_block_size(x, grid=16, **context) for x in u} == {(15, 15)}
    assert {sample_block_size(x, grid=28, **context) for x in u} == {(26, 26), (27, 27)}
    sixteen = {sample_block_size(x, grid=16, **target) for x in u}
    assert sixteen == {(5, 7), (6, 6), (6, 7), (7, 6), (8, 6), (9, 6)}


@pytest.mark.parametrize("corners", ["exclusive", "inclusive"])
@pytest.mark.parametrize("truncate", ["first", "random"])
@pytest.mark.parametrize("grid, B", [(14, 32), (6, 16), (28, 3)])
def test_masks_are_what_they_should_be(corners, truncate, grid, B):
    cfg = MaskConfig(grid, corners=corners, truncate=truncate, min_keep=10 if grid > 6 else 3)
    rng, last = torch.Generator().manual_seed(0), 0
    for _ in range(40):
        ctx, tgts = sample_masks(B, cfg, rng)
        assert ctx.shape[0] == B and ctx.shape[1] > cfg.min_keep and ctx.dtype == torch.long and len(tgts) == 4
        assert (ctx.diff(dim=1) > 0).all() and 0 <= ctx.min() and ctx.max() < grid * grid
        shapes = set()
        for t in tgts:
            assert t.shape == tgts[0].shape and (t.diff(dim=1) > 0).all() and t.min() >= 0 and t.max() < grid * grid
            for b in range(B):
                assert not set(t[b].tolist()) & set(ctx[b].tolist())
                y, x = np.divmod(t[b].numpy(), grid)
                shapes.add((np.ptp(y) + 1, np.ptp(x) + 1))
                assert np.prod((np.ptp(y) + 1, np.ptp(x) + 1)) == t.shape[1]  # a full rectangle
        assert len(shapes) == 1  # one size for all blocks of all images
        every = torch.cat([ctx.flatten(), *(t.flatten() for t in tgts)])
        last += int((every % grid == grid - 1).sum() + (every // grid == grid - 1).sum())
    assert (last > 0) == (corners == "inclusive")


def occupancy(contexts, grid):
    """Share of images whose context has each patch: (G, G)."""
    seen = torch.zeros(grid * grid)
    for ctx in contexts:
        seen += torch.bincount(ctx.flatten(), minlength=grid * grid)
    return (seen / sum(map(len, contexts))).view(grid, grid)


@pytest.mark.parametrize("B, K, tolerance", [(128, 50.5, 2.5), (16, 59.6, 2.5), (1, 82.0, 4.0)])
def test_masks_have_the_statistics_of_the_released_sampler(B, K, tolerance):
    """K: what the released collator was measured to keep at 224/16. Rows of the context at 128 images: from .75 at the
    top through .18 in the middle to .06 and .02."""
    n = {128: 60, 16: 200, 1: 600}[B]
    rng, slow = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    ours = [sample_masks(B, MaskConfig(), rng) for _ in range(n)]
    theirs = [plain.slow_masks(B, 14, slow)[:2] for _ in range(max(12, n // 5))]
    mean = lambda masks: np.mean([ctx.shape[1] for ctx, _ in masks])  # noqa: E731
    assert mean(ours) == pytest.approx(K, abs=tolerance)
    assert mean(ours) == pytest.approx(mean(theirs), abs=3 * tolerance)
    sizes = [t[0].shape[1] for _, t in ours]
    assert np.mean(sizes) == pytest.approx(33.4, abs=0.8)
    if B == 128:
        a, b = occupancy([c for c, _ in ours], 14), occupancy([c for c, _ in theirs], 14)
        rows = a.mean(1)
        assert rows[0] == pytest.approx(0.75, abs=0.04) and rows[6] == pytest.approx(0.18, abs=0.04)
        assert rows[11] == pytest.approx(0.06, abs=0.03) and rows[12] == pytest.approx(0.02, abs=0.02) and rows[13] == 0
        assert (a - b).abs().max() < 0.12
        covered = [occupancy([x for _, t in masks for x in t], 14) for masks in (ours, theirs)]
        assert (covered[0] - covered[1]).abs().max() < 0.05
        fair = MaskConfig(corners="inclusive", truncate="random")
        rows = occupancy([sample_masks(B, fair, rng)[0] for _ in range(60)], 14).mean(1)
        assert rows.min() > 0.1 and (rows - rows.flip(0)).abs().max() < 0.03  # top and bottom are alike


def test_random_truncation_has_no_preference():
    cfg = MaskConfig(corners="inclusive", truncate="random", target_scale=(0.15, 0.15), target_aspect=(1.0, 1.0))
    whole = cfg._replace(truncate="first")
    kept = [sample_masks(64, cfg, torch.Generator().manual_seed(i), ((5, 5), (13, 13)))[0] for i in range(60)]
    # the same corners: what each image would have without truncation
    alone = [
        occupancy([sample_masks(1, whole, torch.Generator().manual_seed(s), ((5, 5), (13, 13)))[0]], 14)
        for s in range(900)
    ]
    a, b = occupancy(kept, 14), torch.stack(alone).mean(0)
    assert (a / a.mean() - b / b.mean()).abs().max() < 0.35 and np.corrcoef(a.flatten(), b.flatten())[0, 1] > 0.9


def test_contexts_that_are_too_small_lose_a_constraint():
    """Targets of 5 x 5 on a grid of 6: as released, another corner is tried 20 times, then the last target goes."""
    cfg = MaskConfig(6, min_keep=3)
    rng, sizes = torch.Generator().manual_seed(0), ((5, 5), (5, 5))
    for _ in range(20):  # the context block lies in the upper left, as do all targets: nothing is left of it
        ctx, tgts = sample_masks(4, cfg, rng, sizes)
        assert ctx.shape == (4, 25) and all((t == ctx).all() for t in tgts)
    ctx, tgts = sample_masks(64, cfg._replace(corners="inclusive"), rng, ((5, 4), (5, 5)))
    covered = torch.zeros(64, 36, dtype=torch.bool)
    for m, t in enumerate(tgts):  # earlier targets are kept out longest
        hit = covered.scatter(1, t, True).gather(1, ctx).any(1)
        assert m > 0 or hit.float().mean() < 0.2
    assert ctx.shape[1] > 3


def test_masks_of_a_batch():
    """Groups of a batch have one block size and their own lengths; they depend on step and place only."""
    cfg = MaskConfig()
    whole, lengths = MaskCollator(cfg, 3, 16)(5, 0, 64), set()
    assert len(whole) == 4
    for step in range(20):
        found = MaskCollator(cfg, 3, 16)(step, 0, 64)
        assert len({t[0].shape[1] for _, t in found}) == 1
        lengths |= {len({ctx.shape[1] for ctx, _ in found})}
    assert max(lengths) > 1
    half = MaskCollator(cfg, 3, 16)(5, 32, 32)  # what the second of two processes draws
    for (a, s), (b, t) in zip(half, whole[2:], strict=True):
        assert torch.equal(a, b) and all(torch.equal(x, y) for x, y in zip(s, t))
    assert not torch.equal(whole[0][0][:, :30], whole[1][0][:, :30])


# ---- Networks --------------------------------------------------------------------------------------------------------

# Counted from the released classes: encoder total / trainable, predictor total / trainable.
COUNTS = {
    ("vit_tiny", 224, 16, None): (5_524_032, 5_486_400, 10_871_232, 10_795_968),
    ("vit_small", 224, 16, None): (21_664_896, 21_589_632, 11_018_880, 10_943_616),
    ("vit_base", 224, 16, None): (85_797_120, 85_646_592, 11_314_176, 11_238_912),
    ("vit_base", 224, 16, 12): (85_797_120, 85_646_592, 21_960_960, 21_885_696),
    ("vit_large", 224, 16, None): (303_299_584, 303_098_880, 22_157_824, 22_082_560),
    ("vit_huge", 224, 14, None): (630_762_240, 630_434_560, 22_377_728, 22_279_424),
    ("vit_huge", 448, 16, None): (631_668_480, 630_664_960, 22_580_480, 22_279_424),
    ("vit_giant", 224, 16, None): (1_011_368_576, 1_011_092_608, 29_550_976, 29_475_712),
}


@pytest.mark.parametrize("arch, size, patch, depth", COUNTS)
def test_parameter_counts_of_the_released_networks(arch, size, patch, depth):
    args = Args(arch=arch, image_size=size, patch_size=patch, pred_depth=depth)
    with torch.device("meta"):
        model = IJepa(ijepa.jepa_config(args, 3))
    learn = lambda m: sum(p.numel() for p in m.parameters() if p.requires_grad)  # noqa: E731
    found = count_params(model.encoder), learn(model.encoder), count_params(model.predictor), learn(model.predictor)
    assert found == COUNTS[arch, size, patch, depth]
    assert not any(p.requires_grad for p in model.target_encoder.parameters())


def test_presets_are_the_released_sizes():
    for name, preset in ijepa.PRESETS.items():
        args = Args(**{"preset": name} | preset)
        ijepa.check_args(args)
    huge = Args(**ijepa.PRESETS["vit_huge"])
    assert (huge.patch_size, huge.epochs, huge.batch_size, huge.mask_group) == (14, 300, 2048, 128)


def test_encoder_sees_the_context_only():
    net, x = VisionTransformer(32, 4, 3, 16, 2, 2), torch.randn(3, 3, 32, 32)
    whole = net(x)
    assert whole.shape == (3, 64, 16) and torch.allclose(net(x, torch.arange(64).expand(3, 64)), whole, atol=1e-6)
    mask = torch.stack([torch.randperm(64)[:9] for _ in range(3)])
    out, order = net(x, mask), torch.randperm(9)
    assert out.shape == (3, 9, 16)
    assert torch.allclose(net(x, mask[:, order]), out[:, order], atol=1e-5)  # tokens know where they were
    assert not torch.allclose(out, apply_masks(whole, [mask]), atol=1e-3)  # masked at the input, not at the output
    other = x.clone()
    other[:, :, 28:, 28:] += 5  # patch 63
    mask[mask == 63] = 0
    assert torch.equal(net(other, mask), net(x, mask))
    both = net(x, [mask, mask.flip(1)])
    assert both.shape == (6, 9, 16) and torch.allclose(both[3:].flip(1), net(x, mask), atol=1e-5)
    layers = net.layers(x, 2)
    assert len(layers) == 2 and torch.equal(layers[-1], whole)


def test_predictor_predicts_each_block_alone():
    net = Predictor(64, 16, 8, 3, 2)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    ctx = torch.stack([torch.randperm(64)[:7] for _ in range(3)])
    tgts = [torch.stack([torch.randperm(64)[:5] for _ in range(3)]) for _ in range(4)]
    z = torch.randn(3, 7, 16)
    out = net(z, ctx, tgts).view(4, 3, 5, 16)
    changed = [tgts[0], *(t.flip(0) for t in tgts[1:])]
    assert torch.allclose(net(z, ctx, changed).view(4, 3, 5, 16)[0], out[0], atol=1e-5)
    swapped = net(z, ctx, [tgts[1], tgts[0], *tgts[2:]]).view(4, 3, 5, 16)
    assert torch.allclose(swapped[0], out[1], atol=1e-5) and torch.allclose(swapped[1], out[0], atol=1e-5)
    assert not torch.allclose(out[0], out[1], atol=1e-2)
    order = torch.randperm(5)  # mask tokens of one block do see each other, and know where they are
    assert torch.allclose(net(z, ctx, [tgts[0][:, order]]).view(3, 5, 16), out[0][:, order], atol=1e-5)
    alone = net(z, ctx, [tgts[0][:, :1]]).view(3, 1, 16)
    assert not torch.allclose(alone, out[0][:, :1], atol=1e-3)


def test_the_last_block_may_leave_out_what_nobody_reads():
    block, x = ijepa.Block(16, 4, 4.0), torch.randn(2, 9, 16)
    assert torch.allclose(block(x, 4), block(x)[:, -4:], atol=1e-6)


def test_initial_weights():
    """Effective init of the released training: 0.02 in every layer; what the classes mean to do as a flag."""
    config = ijepa.jepa_config(Args(arch="vit_tiny", pred_dim=192), 3)
    net = IJepa(config)
    for part in (net.encoder, net.predictor):
        for name, p in part.named_parameters():
            if name.endswith("bias"):
                assert (p == 0).all()
            elif p.dim() == 1:
                assert (p == 1).all()
            elif p.requires_grad:
                assert float(p.std()) == pytest.approx(0.02, rel=0.15), name
    scaled = IJepa(config | dict(depth_rescale=True, patch_init=0.14)).encoder
    for i in (0, 5, 11):
        for w in (scaled.blocks[i].attn.proj.weight, scaled.blocks[i].mlp.fc2.weight):
            assert float(w.std()) == pytest.approx(0.02 / math.sqrt(2 * (i + 1)), rel=0.05)
        assert float(scaled.blocks[i].attn.qkv.weight.std()) == pytest.approx(0.02, rel=0.05)
    assert float(scaled.patch_embed.proj.weight.std()) == pytest.approx(0.14, rel=0.05)
    same = [torch.equal(a, b) for a, b in zip(net.encoder.parameters(), net.target_encoder.parameters())]
    assert all(same)


# ---- The update ------------------------------------------------------------------------------------------------------


def test_update_is_the_plain_update():
    """Weights, loss and moving average after two updates against a plain trainer: explicit attention, whole
    convolution, AdamW without fused kernels, a loop over tensors."""
    args, model, learner = small(
        learning_rate=1e-4, start_lr=1e-4, final_lr=1e-4, final_weight_decay=0.04, final_ema=0.996
    )
    parts = {k: copy.deepcopy(getattr(model, k).state_dict()) for k in ("encoder", "predictor")}
    trainer = plain.PlainTrainer(ijepa.jepa_config(args, 3), parts)
    before = copy.deepcopy(model.predictor.mask_token.data)
    for step in (1, 2):
        images, masks = batch_of(args, step)
        loss = float(learner.update(step, images, masks)["prediction"])
        assert loss == pytest.approx(trainer.step(images, *masks[0])[0], rel=1e-5)
    for name, mine in (("encoder", model.encoder), ("predictor", model.predictor), ("target", model.target_encoder)):
        theirs = dict(getattr(trainer, name).named_parameters())
        for k, p in mine.named_parameters():
            assert torch.allclose(p, theirs[k], atol=2e-6), f"{name}.{k}"
    assert not torch.equal(model.predictor.mask_token, before)
    assert learner.slow[0].dtype == torch.float32


def test_first_moving_average_uses_0_996():
    args, model, learner = small()
    for p in model.target_encoder.parameters():
        p.data.zero_()
    learner.update(1, *batch_of(args))
    fast, slow = model.encoder.blocks[0].mlp.fc1.weight, model.target_encoder.blocks[0].mlp.fc1.weight
    assert torch.allclose(slow, 0.004 * fast, rtol=1e-3)
    assert torch.equal(model.target_encoder.pos_embed, torch.zeros_like(model.target_encoder.pos_embed))


def test_what_decays():
    """Without gradients of the loss AdamW only decays: matrices and the mask token, no biases and no norms."""
    args, model, learner = small(weight_decay=0.5, final_weight_decay=0.5, learning_rate=1e-2, start_lr=1e-2)
    decaying = {id(p) for g in learner.opt.param_groups if g["decays"] for p in g["params"]}
    others = {id(p) for g in learner.opt.param_groups if not g["decays"] for p in g["params"]}
    for part in (model.encoder, model.predictor):
        for name, p in part.named_parameters():
            wanted = "bias" not in name and "norm" not in name
            assert (id(p) in decaying, id(p) in others) == ((wanted, not wanted) if p.requires_grad else (False, False))
    assert id(model.predictor.mask_token) in decaying
    learner.update(1, *batch_of(args))
    assert {g["weight_decay"] for g in learner.opt.param_groups} == {0.0, 0.5}


def test_predictor_has_its_own_rate():
    args, _, learner = small(learning_rate=1e-3, predictor_lr=5e-3, start_lr=1e-4, warmup_epochs=1.0)
    learner.update(5, *batch_of(args))
    rates = sorted({g["lr"] for g in learner.opt.param_groups})
    assert rates == pytest.approx([5.5e-4, 2.75e-3])


@pytest.mark.parametrize("changes", [dict(micro_batch=2), dict(mask_group=4), dict(checkpoint_activations=True)])
def test_accumulated_and_recomputed_gradients_are_the_same(changes):
    """Micro-batches and recomputed activations change nothing; groups of masks are the batch split by hand."""
    found = []
    for more in ({}, changes):
        torch.manual_seed(0)
        args, model, learner = small(**more)
        images, masks = batch_of(Args(**SMALL | {"mask_group": changes.get("mask_group", 8)}))
        if not more and "mask_group" in changes:  # one after the other, the mean of their losses
            target = [ijepa.feature_norm(model.target_encoder(images[i : i + 4])) for i in (0, 4)]
            parts = [learner.online(images[4 * i : 4 * i + 4], *masks[i], target[i])["prediction"] for i in (0, 1)]
            loss = sum(parts) / 2
            loss.backward()
        else:
            learner.opt.step = lambda: None
            loss = learner.update(1, images, masks)["prediction"]
        found.append((loss.detach(), [p.grad.clone() for p in learner.params]))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found[0][1], found[1][1]))


def test_targets_get_no_gradient_unless_asked():
    args, model, learner = small()
    learner.update(1, *batch_of(args))
    assert all(p.grad is None for p in model.target_encoder.parameters())
    torch.manual_seed(0)
    args, model, learner = small(target="online")
    images, masks = batch_of(args)
    learner.update(1, images, masks)
    for a, b in zip(model.encoder.parameters(), model.target_encoder.parameters()):
        assert torch.equal(a, b)  # no moving average: the encoder itself
    # the target's path adds to the gradient
    h = ijepa.feature_norm(model.encoder(images))
    for given, same in ((None, False), (h.detach(), True)):
        learner.opt.zero_grad()
        learner.online(images, *masks[0], given)["prediction"].backward()
        grad = model.encoder.blocks[0].mlp.fc1.weight.grad.clone()
        learner.opt.zero_grad()
        learner.online(images, *masks[0], h.detach())["prediction"].backward()
        assert torch.allclose(grad, model.encoder.blocks[0].mlp.fc1.weight.grad, atol=1e-8) == same


def test_variances_of_the_targets():
    """Of a patch over images, and over images and patches: one that sees positions only has none of the first."""
    args, model, learner = small()
    images, masks = batch_of(args)
    with torch.no_grad():
        h = ijepa.feature_norm(model.target_encoder(images))
    found = learner.update(1, images, masks)
    assert float(found["image_variance"]) == pytest.approx(float(h.var(0, correction=0).mean()), rel=1e-5)
    assert float(found["target_variance"]) == pytest.approx(float(h.flatten(0, 1).var(0).mean()), rel=0.1)
    found = learner.update(2, images[:1].expand_as(images), masks)
    assert float(found["image_variance"]) < 1e-10 < 0.1 < float(found["target_variance"])


def test_variance_hinge():
    args, _, learner = small(var_coeff=2.0)
    images, masks = batch_of(args)
    z = learner.online.encoder(images, masks[0][0]).mean(1)
    wanted = 2 * F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()
    assert float(learner.update(1, images, masks)["variance"]) == pytest.approx(float(wanted), rel=1e-4)


def test_online_probe_learns_and_does_not_disturb():
    found = []
    for classes in (0, 3):
        torch.manual_seed(0)
        args, model, learner = small(classes=classes, probe_lr=0.1)
        torch.manual_seed(1)
        images, masks = batch_of(args)
        labels = torch.arange(8) % 3
        for step in range(1, 21):
            metrics = learner.update(step, images, masks, labels if classes else None)
        found.append(model.encoder.norm.weight.detach().clone())
    assert torch.equal(*found) and metrics["probe_accuracy"] == 1.0 and metrics["probe"] < 0.3


# ---- Weights of the authors ------------------------------------------------------------------------------------------


def official_file(path, config, prefix="module."):
    """A file as the authors' code writes it, with random weights; and the plain networks that made it."""
    made = plain.PlainTrainer(config, {k: getattr(IJepa(config), k).state_dict() for k in ("encoder", "predictor")})
    state = {"epoch": 3, "loss": 0.1, "batch_size": 128, "world_size": 16, "lr": 1e-3, "opt": {}, "scaler": None}
    with torch.no_grad():
        for name, part in (("encoder", made.encoder), ("predictor", made.predictor), ("target_encoder", made.target)):
            for k, p in part.named_parameters():
                if "pos_embed" not in k:
                    p.add_(0.1 * torch.randn_like(p))
            state[name] = {prefix + k: v.clone() for k, v in part.state_dict().items()}
    torch.save(state, path)
    return made


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_official_weights_load(tmp_path, prefix):
    args, model, _ = small()
    config = ijepa.jepa_config(args, 3)
    made = official_file(tmp_path / "official.pth.tar", config, prefix)
    for name, weights in ijepa.official_weights(str(tmp_path / "official.pth.tar"), model).items():
        getattr(model, name).load_state_dict(weights)
    images, masks = batch_of(args)
    with torch.no_grad():
        assert torch.allclose(model.target_encoder(images), made.target(images), atol=1e-5)
        assert torch.allclose(model.encoder(images, masks[0][0]), made.encoder(images, [masks[0][0]]), atol=1e-5)
        z = made.encoder(images, [masks[0][0]])
        assert torch.allclose(model.predictor(z, *masks[0]), made.predictor(z, *masks[0]), atol=1e-5)
        assert not torch.allclose(model.target_encoder(images), model.encoder(images), atol=1e-2)


def test_official_weights_at_another_resolution(tmp_path):
    args, model, _ = small(image_size=48)
    official_file(tmp_path / "a.pt", ijepa.jepa_config(Args(**SMALL), 3))
    found = ijepa.official_weights(str(tmp_path / "a.pt"), model)
    assert torch.equal(found["encoder"]["pos_embed"][0], ijepa.get_2d_sincos_pos_embed(16, 12))


@pytest.mark.parametrize("what, words", [
    ("missing", "no such file"), ("text", "is not a checkpoint of facebookresearch/ijepa"),
    ("other", "is not a checkpoint of facebookresearch/ijepa"), ("size", "encoder.pos_embed"), ("depth", "blocks.1"),
])  # fmt: skip
def test_official_weights_that_do_not_fit(tmp_path, capsys, what, words):
    path, args = tmp_path / "x.pt", Args(**SMALL)
    if what == "text":
        path.write_text("no weights")
    elif what == "other":
        torch.save({"model": {}}, path)
    elif what != "missing":
        official_file(path, ijepa.jepa_config(args, 3))
    config = ijepa.jepa_config(args, 3) | (dict(depth=1) if what == "depth" else {})
    model = IJepa(config | (dict(embed_dim=32) if what == "size" else {}))
    with pytest.raises(SystemExit) as stopped:
        ijepa.official_weights(str(path), model)
    err = capsys.readouterr().err
    wanted = "does not fit" if what == "size" else words
    assert stopped.value.code == 2 and wanted in err and f"--init-from {path}" in err and len(err.splitlines()) == 1


# ---- Crops -----------------------------------------------------------------------------------------------------------


def test_crop_parameters():
    rng = torch.Generator().manual_seed(0)
    h, w = torch.randint(40, 300, (4_000,), generator=rng), torch.randint(40, 300, (4_000,), generator=rng)
    top, left, height, width = ijepa.random_resized_crop_params(h, w, (0.3, 1.0), (3 / 4, 4 / 3), rng)
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= h).all() and (left + width <= w).all()
    area, aspect = height * width / (h * w), width / height
    near = (aspect > 0.7) & (aspect < 1.4)
    assert near.all() and (area > 0.29).float().mean() > 0.8 and area.max() <= 1
    square = ijepa.random_resized_crop_params(
        torch.full((20_000,), 1000), torch.full((20_000,), 1000), (0.3, 1.0), (1, 1), rng
    )
    share = (square[2] * square[3] / 1e6).numpy()
    assert np.histogram(share, 7, (0.3, 1.0))[0] / len(share) == pytest.approx(
        np.full(7, 1 / 7), abs=0.015
    )  # uniform area
    t, left, hh, ww = ijepa.random_resized_crop_params(100, 1000, (0.9, 1.0), (3 / 4, 4 / 3), rng)  # can never fit
    assert (int(t), int(hh), int(ww)) == (0, 100, 133) and int(left) == (1000 - 133) // 2
    a = ijepa.random_resized_crop_params(50, 70, (0.3, 1.0), (3 / 4, 4 / 3), torch.Generator().manual_seed(3))
    b = ijepa.random_resized_crop_params(50, 70, (0.3, 1.0), (3 / 4, 4 / 3), torch.Generator().manual_seed(3))
    assert a == b and all(0 <= int(x) for x in a)


@pytest.mark.parametrize(
    "size, box", [(16, (0, 0, 40, 60)), (16, (3, 10, 30, 31)), (50, (8, 5, 20, 24)), (24, (1, 2, 24, 24))]
)
def test_crops_are_pils(size, box):
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    top, left, height, width = box
    pil = Image.fromarray(image).resize((size, size), Image.BILINEAR, box=(left, top, left + width, top + height))
    x = torch.from_numpy(image).permute(2, 0, 1)[None].expand(2, -1, -1, -1)
    boxes = torch.tensor([[top / 40, left / 60, height / 40, width / 60]]).expand(2, -1)
    mine = ijepa.crop_resize(x, boxes, size, torch.tensor([False, True])) * 255
    wanted = torch.from_numpy(np.asarray(pil).copy()).permute(2, 0, 1).float()
    assert (mine[0] - wanted).abs().max() < 1.01  # PIL rounds twice
    assert torch.allclose(mine[1], mine[0].flip(-1), atol=1e-3)


def test_training_crops_do_not_depend_on_the_number_of_processes():
    args = Args(**SMALL | dict(hflip=True, batch_size=6))
    images, sizes = torch.randint(256, (6, 3, 64, 64), dtype=torch.uint8), torch.randint(64, 200, (6, 2))

    def crop(at, first):
        return ijepa.random_crops(images[at], sizes[at], args, ijepa.keyed(1, 3, 7), first, ijepa.IMAGENET)

    whole = crop(slice(0, 6), 0)
    assert whole.shape == (6, 3, 32, 32)
    assert torch.equal(torch.cat([crop(slice(0, 2), 0), crop(slice(2, 4), 2), crop(slice(4, 6), 4)]), whole)


def test_order_of_the_images():
    n, batch = 23, 4
    order = list(ijepa.BatchOrder(n, batch, 1, 0, 15))
    first = sum(order[:5], [])
    assert len(order) == 15 and len(set(first)) == 20 and set(sum(order[5:10], [])) != set(first)
    assert list(ijepa.BatchOrder(n, batch, 1, 7, 15)) == order[7:]  # resumed in the middle of an epoch
    halves = [list(ijepa.BatchOrder(n, batch, 1, 0, 15, r, 2)) for r in (0, 1)]
    assert [a + b for a, b in zip(*halves)] == order
    assert list(ijepa.BatchOrder(n, batch, 2, 0, 15)) != order


# ---- Data ------------------------------------------------------------------------------------------------------------


def write_images(folder, n=6, classes=("cat", "dog"), size=(60, 48), suffix=".jpg", seed=0):
    """n pictures per class with a colour of their own."""
    rng = np.random.default_rng(seed)
    for i, name in enumerate(classes):
        os.makedirs(os.path.join(folder, name), exist_ok=True)
        for k in range(n):
            picture = rng.integers(0, 60, (size[1], size[0], 3), np.uint8)
            picture[..., i % 3] += 150
            Image.fromarray(picture).save(os.path.join(folder, name, f"{k}{suffix}"))


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["ijepa.py", *map(str, argv)])
    return ijepa.main(ijepa.parse_args(ijepa.Args, ijepa.PRESETS, ""))


TINY = (
    "--preset cpu --no-cuda --image-size 24 --patch-size 4 --embed-dim 16 --depth 1 --num-heads 2 --pred-dim 8 "
    "--pred-depth 1 --batch-size 4 --total-steps 3 --report-every 0 --crop-scale 0.3,1.0 --crop-ratio 0.75,1.33 "
    "--knn-k 3 --eval-images 8 --probe-images 16"
).split()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["split", "classes", "flat", "cached"])
def test_image_folders(tmp_path, monkeypatch, capsys, kind, workers):
    monkeypatch.chdir(tmp_path)
    if kind == "split":
        write_images("data/train")
        write_images("data/val", 2, seed=1)
        Image.new("L", (70, 50), 9).save("data/train/cat/grey.png")
        Image.new("RGBA", (70, 50)).save("data/train/dog/alpha.png")
    elif kind == "classes":
        write_images("data", 10)
    else:
        write_images("data", 20, [""])
    result = run(monkeypatch, *TINY, "--dataset", "data", "--num-workers", workers, *["--cache"] * (kind == "cached"))
    out = capsys.readouterr().out
    labelled = kind in ("split", "classes")
    assert ("2 classes" in out) == labelled and ("no labels" in out) != labelled
    n = {"split": (14, 4), "classes": (18, 2)}.get(kind, (18, 2))
    assert f"{n[0]} training images, {n[1]} held out" in out
    assert result["score_name"] == ("knn" if labelled else "effective_rank") and np.isfinite(result["score"])
    assert ("decoded 18 of 18 images" in out) == (kind == "cached")


def test_vit_base_on_jpegs(tmp_path, monkeypatch):
    """One update of the real thing, ViT-B/16 at 224, from files to the checkpoint."""
    monkeypatch.chdir(tmp_path)
    write_images("data/train", 2, size=(500, 375))
    write_images("data/val", 1, size=(375, 500), seed=1)
    argv = (
        "--dataset data --no-cuda --no-compile --num-threads 2 --batch-size 2 --total-steps 1 --num-workers 2 --knn-k 1"
    )
    try:
        result = run(monkeypatch, *argv.split(), "--probe-images", 4, "--eval-images", 2, "--report-every", 0)
    finally:
        torch.set_num_threads(1)
    (path,) = (tmp_path / "runs").iterdir()
    state = torch.load(path / "ckpt.pt", weights_only=True)
    assert sum(v.numel() for k, v in state["learner"]["model"].items() if k.startswith("encoder")) == 85_797_120
    assert result["updates"] == 1 and np.isfinite(list(result["metrics"].values())).all()
    assert sorted(p.name for p in (path / "videos").iterdir()) == ["masks-1.png", "neighbours-1.png", "pca-1.png"]


def test_decoded_pixels(tmp_path):
    """Workers squash the whole picture to the canvas; crops undo it."""
    write_images(tmp_path / "train", 1, size=(300, 200), suffix=".png")
    args = Args(**SMALL | dict(dataset=str(tmp_path)))
    source = ijepa.FileImages(*ijepa.scan(str(tmp_path / "train")), args)
    ((images, labels, sizes),) = source.batches([[0, 1]])
    assert images.shape == (2, 3, 64, 64) and images.dtype == torch.uint8
    assert labels.tolist() == [0, 1] and sizes.tolist() == [[200, 300]] * 2
    centre = ijepa.centre_crops(images, sizes, args)
    assert centre.shape == (2, 3, 32, 32)
    with Image.open(tmp_path / "train" / "cat" / "0.png") as image:
        box = (150 - 87.5, 100 - 87.5, 150 + 87.5, 100 + 87.5)
        wanted = np.asarray(image.resize((32, 32), Image.BILINEAR, box=box)) / 255
    assert abs(centre[0].permute(1, 2, 0).numpy() - wanted).mean() < 0.01


@pytest.mark.parametrize("local", ["file", "folder"])
def test_hugging_face_data(tmp_path, monkeypatch, capsys, local):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_images("files", 10)
    files, labels, classes = ijepa.scan("files")
    kinds = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=classes))
    rows = datasets.Dataset.from_dict(dict(image=files, label=labels), features=kinds)
    os.mkdir("rows")
    rows.map(lambda r: r).to_parquet("rows/train-0.parquet")
    if local == "folder":
        rows.select(range(0, 20, 5)).to_parquet("rows/validation-0.parquet")
    name = "rows" if local == "folder" else "rows/train-0.parquet"
    result = run(monkeypatch, *TINY, "--dataset", name, "--num-workers", 0)
    assert result["score_name"] == "knn" and "2 classes" in capsys.readouterr().out


def test_digits():
    args = Args(**ijepa.PRESETS["cpu"])
    train, val = ijepa.load_data(args)
    assert train.images.shape == (20_000, 1, 24, 24) and len(val) == 3_000 and train.images.dtype == torch.uint8
    again, _ = ijepa.load_data(args)
    assert torch.equal(again.images, train.images)
    assert torch.bincount(val.labels).min() > 200 and train.images.float().std() > 50
    raw = lambda s, n: torch.cat([x.float().flatten(1) for x, _, _ in s.batches(ijepa.some(len(s), n))])  # noqa: E731
    labels = torch.cat([y for _, y, _ in train.batches(ijepa.some(20_000, 2_000))])
    found = ijepa.knn_accuracy(raw(train, 2_000), labels, raw(val, 3_000)[:500], val.labels[:500], 10)
    assert found > 0.7  # labels belong to the images


def test_games(monkeypatch):
    monkeypatch.setattr(ijepa, "GAMES", ["Pong", "Breakout"])
    train, val = ijepa.load_data(Args(**ijepa.PRESETS["cpu_games"] | dict(game_frames=8)))
    assert train.images.shape == (16, 3, 64, 64) and val.images.shape == (4, 3, 64, 64)
    assert train.labels.tolist() == [0] * 8 + [1] * 8
    assert train.images[:8].float().mean() != train.images[8:].float().mean()
    assert len({bytes(x.numpy()) for x in train.images}) > 12


# ---- Several processes -----------------------------------------------------------------------------------------------


def test_two_processes_are_one(tmp_path):
    """torchrun with two processes over gloo: the losses and weights of one process on the same batches."""
    words = "--dataset digits --crop-scale 1,1 --crop-ratio 1,1 --mask-group 4 --batch-size 8 --total-steps 5"
    argv = [*map(str, TINY), *words.split(), "--log-every", "1", "--micro-batch", "2"]
    found, started = [], []
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, words in (("one", [sys.executable]), ("two", launch)):
        (tmp_path / name).mkdir()
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        command, pipes = [*words, os.path.join(ROOT, "ijepa.py"), *argv], dict(stdout=-1, stderr=-1, text=True)
        started.append((tmp_path / name, subprocess.Popen(command, cwd=tmp_path / name, env=env, **pipes)))
    for home, process in started:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
        (path,) = (home / "runs").iterdir()
        lines = [x for x in out.splitlines() if x.startswith("global_step")]
        losses = [float(x.split("prediction=")[1].split(",")[0]) for x in lines]
        found.append(
            (losses, torch.load(path / "ckpt.pt", weights_only=True), json.loads((path / "result.json").read_text()))
        )
    assert "2 processes, 4 images each" in out and len(found[0][0]) == 5
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3) and len(set(found[0][0])) == 5
    for k, v in found[0][1]["learner"]["model"].items():
        assert torch.allclose(v, found[1][1]["learner"]["model"][k], atol=1e-5), k
    assert found[0][2]["score"] == found[1][2]["score"]


# ---- Benchmarks ------------------------------------------------------------------------------------------------------


def test_benchmark_beside_the_plain_step(tmp_path):
    """Its table; the plain step starts from the same loss."""
    argv = ["--sizes", "cpu", "--seconds", "0", "--no-cuda", "--name", "s", "--results", str(tmp_path)]
    command = [sys.executable, os.path.join(ROOT, "benchmarks", "jepa.py"), *argv]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    masks, step = csv.DictReader(open(tmp_path / "s.csv"))
    assert float(masks["ratio"]) > 10 and float(step["error"]) < 1e-5 and float(step["ours"]) > 0
    assert "step, cpu" in (tmp_path / "s.md").read_text()


def test_scores_count_as_results(tmp_path):
    """benchmarks/run.py and report.py take a score where there is no return."""
    (tmp_path / "result.json").write_text(json.dumps(dict(score=0.5, random_score=0.25)))
    (tmp_path / "args.json").write_text(json.dumps(dict(args=dict(dataset="digits", seed=3))))
    result, problem = common.read_result(tmp_path)
    assert (result["episodic_return"], result["random_return"], problem) == (0.5, 0.25, None)
