"""iris.py by numbers: closed forms, slow references, parameter counts of the published networks, replay, games."""

import copy
import json
import math
import os
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import iris
from iris import (
    ActorCritic,
    Args,
    EpisodeReplay,
    Iris,
    Learner,
    Tokenizer,
    Transformer,
    WorldModel,
    configure_optimizer,
    count_params,
    imagine,
    init_weights,
    lambda_return,
    recon_loss,
    sample_segments,
    vector_quantize,
    vq_loss,
    world_model_labels,
)

CPU, PARTS = torch.device("cpu"), ("tokenizer", "world_model", "actor_critic")
SMALL = dict(
    image_size=16, vocab_size=11, code_dim=6, tok_channels=8, tok_levels=2, tok_blocks=1, tok_attention="8",
    tok_latent=5, tok_groups=2, tok_patch=2, tok_tiles=1, batch_length=4, embed_dim=16, num_layers=2, num_heads=2,
    dropout=0.0, imag_horizon=5, burn_in=3, ac_channels="4 4", lstm_size=8, compile=False,
)  # fmt: skip


def small(**changes):
    torch.manual_seed(0)
    args = Args(**SMALL | changes)
    model = Iris(iris.iris_config(args, 3, 3)).eval()
    return args, model


def batch_of(part, args, n=4, K=16):
    g = torch.Generator().manual_seed(1)
    S, T = args.image_size, args.batch_length
    image = lambda *shape: torch.randint(256, (*shape, S, S, 3), dtype=torch.uint8, generator=g)  # noqa: E731
    tokens = lambda *shape: torch.randint(args.vocab_size, (*shape, K), generator=g)  # noqa: E731
    if part == "tokenizer":
        return {"obs": image(n)}
    if part == "world_model":
        mask = torch.arange(T) < torch.tensor([T, T - 1, 1, T])[:n, None]
        zeros = torch.zeros(n, T)
        rows = dict(action=torch.randint(3, (n, T), generator=g), reward=zeros + 1, end=zeros.bool(), mask=mask)
        return rows | {"tokens": tokens(n, T)}
    mask = torch.arange(args.burn_in) >= torch.tensor([0, 1, args.burn_in, 0])[:n, None]
    return {"recon": image(n, args.burn_in), "mask": mask, "tokens": tokens(n)}


# ---- Maths -----------------------------------------------------------------------------------------------------------


def test_lambda_return_by_hand():
    r, v, d = torch.tensor([[1.0, 0, 2]]), torch.full((1, 3), 0.5), torch.zeros(1, 3)
    assert torch.allclose(lambda_return(r, v, d, 0.9, 0.5), torch.tensor([[1.4275, 0.45, 0.5]]))
    ended = lambda_return(r, v, torch.ones(1, 3), 0.9, 0.5)
    assert torch.allclose(ended, torch.tensor([[1.0, 0, 0.5]]))
    assert torch.allclose(lambda_return(r * 0, v, d, 1.0, 0.7), v)


def test_lambda_return_is_the_recursion():
    torch.manual_seed(0)
    r, v, d = torch.randn(5, 9), torch.randn(5, 9), torch.rand(5, 9) < 0.2
    got = lambda_return(r, v, d, 0.97, 0.8)
    for b in range(5):
        G = v[b, -1]
        assert got[b, -1] == G
        for t in reversed(range(8)):
            G = r[b, t] + 0.97 * (0.0 if d[b, t] else 1.0) * (0.2 * v[b, t + 1] + 0.8 * G)
            assert torch.allclose(got[b, t], G, atol=1e-6)
    one_step = r[:, :-1] + 0.97 * ~d[:, :-1] * v[:, 1:]
    assert torch.allclose(lambda_return(r, v, d, 0.97, 0.0)[:, :-1], one_step)


def test_vector_quantize():
    torch.manual_seed(0)
    codes, z = torch.randn(7, 3, requires_grad=True), torch.randn(40, 3, requires_grad=True)
    tokens, z_q = vector_quantize(codes, codes)
    assert tokens.tolist() == list(range(7)) and torch.equal(z_q, codes)
    tokens, z_q = vector_quantize(z, codes)
    slow = [min(range(7), key=lambda j: float(((z[i] - codes[j]) ** 2).sum().detach())) for i in range(40)]
    assert tokens.tolist() == slow and torch.equal(z_q, codes[tokens])
    assert torch.equal(vector_quantize(z + 3.0, codes + 3.0)[0], tokens)
    # Seen from afar, as at the start of training, distances differ in their last digits only, and still count.
    near, far = (torch.rand(512, 64) * 2 - 1) / 512, 10 * torch.randn(2000, 64)
    exact = torch.cat([(x.double()[:, None] - near.double()).square().sum(-1).argmin(-1) for x in far.split(200)])
    assert torch.equal(vector_quantize(far, near)[0], exact)
    assert not torch.equal(torch.cdist(far, near).argmin(-1), exact)
    straight = z + (z_q - z).detach()
    gz, gc = torch.autograd.grad(straight.sum(), (z, codes), allow_unused=True)
    assert (gz == 1).all() and gc is None


@pytest.mark.parametrize("beta", [1.0, 0.25])
def test_vq_loss(beta):
    z, e = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    loss = vq_loss(z, e, beta)
    assert torch.allclose(loss, (1 + beta) * F.mse_loss(z, e))
    gz, ge = torch.autograd.grad(loss, (z, e))
    assert torch.allclose(gz, 2 * beta * (z - e) / 24) and torch.allclose(ge, 2 * (e - z) / 24)
    assert torch.equal(vq_loss(z, e), vq_loss(z, e, 1.0))


def test_recon_loss():
    x = torch.rand(2, 3, 64, 64)
    assert recon_loss(x, x) == 0
    y = torch.zeros(1, 3, 64, 64)
    wrong = y.clone()
    wrong[0, 1, 5, 7] = 1.0
    assert math.isclose(recon_loss(y, wrong), 0.1 / 12288 + 1 / 12288 + 0.01, rel_tol=1e-6)
    two = recon_loss(torch.cat([y, y]), torch.cat([wrong, y]))  # the largest error of each image, then the mean
    assert math.isclose(two, 0.05 / 12288 + 0.5 / 12288 + 0.005, rel_tol=1e-6)


def test_world_model_labels():
    tokens = torch.arange(2 * 3 * 4).view(2, 3, 4)
    rewards, ends = torch.tensor([[-7, 0, 2.5], [1.0, 1, 1]]), torch.tensor([[0, 0, 1], [0, 1, 1]]).bool()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    frames, signs, over = world_model_labels(tokens, rewards, ends, mask)
    assert frames.shape == (2, 3 * 4 - 1)
    assert frames[0].tolist() == list(range(1, 12)) and frames[1].tolist() == [*range(13, 20), *[-100] * 4]
    assert signs.tolist() == [[0, 1, 2], [2, 2, -100]] and over.tolist() == [[0, 0, 1], [0, 1, -100]]


def test_sample_categorical():
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 1.0, -1.0]).repeat(60_000, 1)
    for temperature in (1.0, 0.5):
        share = torch.bincount(iris.sample_categorical(logits, temperature), minlength=3) / 60_000
        assert torch.allclose(share, torch.softmax(logits[0] / temperature, -1), atol=0.01)
    assert (iris.sample_categorical(logits, 0) == 1).all()


@pytest.mark.parametrize("from_start", [True, False])
def test_sample_segments(from_start):
    lengths, rng = np.array([1, 3, 50]), np.random.default_rng(0)
    episode, steps, mask = sample_segments(lengths, 3000, 5, from_start, rng)
    assert episode.shape == (3000,) and steps.shape == mask.shape == (3000, 5)
    assert np.allclose(np.bincount(episode) / 3000, 1 / 3, atol=0.04)  # uniform over episodes, not over steps
    anchors = steps[:, 0 if from_start else -1]
    for e, n in enumerate(lengths):
        found = anchors[episode == e]
        assert set(found) == set(range(n)) if n < 50 else len(set(found)) > 45
        real = mask[episode == e].sum(1)
        expected = np.minimum(5, n - found) if from_start else np.minimum(5, found + 1)
        assert (real == expected).all()
    side = mask[:, :-1] >= mask[:, 1:] if from_start else mask[:, :-1] <= mask[:, 1:]
    assert side.all() and mask[:, 0 if from_start else -1].all()
    assert (np.diff(steps, axis=1)[mask[:, 1:] & mask[:, :-1]] == 1).all()


@pytest.mark.parametrize("part, total", [("tokenizer", 119_000), ("world_model", 115_000), ("actor_critic", 110_000)])
def test_updates_by_epoch(part, total):
    args, first = Args(), {"tokenizer": 6, "world_model": 26, "actor_critic": 51}[part]
    due = {e: iris.schedule(args, e)[part] for e in range(1, 601)}
    assert due[first - 1] == 0 and due[first] == 200 and sum(due.values()) == total
    assert args.total_timesteps == 500 * args.steps_per_epoch == 100_000 and args.extra_epochs == 100


def test_tokenizer_stops():
    args = Args(tokenizer_stop=12)
    assert [iris.schedule(args, e)["tokenizer"] for e in (5, 6, 12, 13)] == [0, 200, 200, 0]


# ---- Networks --------------------------------------------------------------------------------------------------------


def test_published_parameter_counts():
    with torch.device("meta"):
        tokenizer, parts = Tokenizer(), [WorldModel(), WorldModel(actions=4), ActorCritic(), ActorCritic(actions=4)]
    assert count_params(tokenizer) == 4_027_523
    found = [count_params(m) for m in (tokenizer.encoder, tokenizer.decoder, tokenizer.pre_quant_conv)]
    assert found == [1_418_240, 1_821_827, 262_656] and count_params(tokenizer.embedding) == 262_144
    assert [count_params(m) for m in parts] == [8_451_077, 8_447_493, 3_225_139, 3_217_957]
    world = parts[0]
    assert count_params(world.transformer) == 7_898_112 and count_params(world.pos_emb) == 87_040
    heads = [count_params(getattr(world, f"head_{n}")) for n in ("observations", "rewards", "ends")]
    assert heads == [197_376, 66_563, 66_306]
    config = iris.iris_config(Args(), 3, 18)
    with torch.device("meta"):
        assert count_params(Iris(config)) == 4_027_523 + 8_451_077 + 3_225_139
    assert json.loads(json.dumps(config)) == config


def test_full_size_tokenizer():
    torch.manual_seed(0)
    model = Tokenizer().eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        tokens = model.encode(x)
        assert tokens.shape == (2, 16) and tokens.min() >= 0 and tokens.max() < 512
        y = model.decode(model.embed(tokens))
        assert y.shape == x.shape and torch.equal(y, model.encode_decode(x))
        assert model.show(tokens).min() >= 0 and model.show(tokens).max() <= 1


def test_tokens_are_in_reading_order():
    """A mark in the lower left corner changes the token in the lower left, and with tiles only that one."""
    x, marked = torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32)
    marked[..., 28:, :4] = 1.0
    for tiles in (1, 4):
        torch.manual_seed(0)
        levels, patch = (4, 1) if tiles == 1 else (1, 8)
        model = Tokenizer(32, 3, 8, 4, 8, levels, 1, (), 3, 2, patch, tiles).eval()
        if tiles == 1:
            model.encoder = torch.nn.AvgPool2d(8)  # the real one mixes everything with everything
        with torch.no_grad():
            moved = (model.latents(marked) - model.latents(x))[0].square().sum(-1)
        assert moved.shape == (16,) and (moved > 0).nonzero().flatten().tolist() == [12]


def test_cut_and_join():
    model = Tokenizer(16, 3, 8, 4, 8, 1, 1, (), 4, 2, 4, 4)
    x = torch.rand(3, 5, 16, 16)
    pieces = model.cut(x)
    assert torch.equal(model.join(pieces), x)
    assert torch.equal(pieces[1 * 16 + 2 * 4 + 3], x[1, :, 8:12, 12:16])


@pytest.mark.parametrize("tiles, n", [(4, 1), (4, 5), (2, 5), (1, 5)])
def test_shown_frames_are_decoded_ones(tiles, n):
    torch.manual_seed(0)
    model = Tokenizer(16, 3, 20, 4, 8, 1, 1, (), 3, 2, 4, tiles).eval()
    tokens = torch.randint(20, (n, 16))
    with torch.no_grad():
        assert torch.allclose(model.show(tokens), model.decode(model.embed(tokens)).clamp(0, 1), atol=1e-6)


def test_straight_through():
    args, model = small()
    x = torch.rand(2, 3, 16, 16)
    z, z_q, x_hat, tokens = model.tokenizer(x)
    assert torch.allclose(x_hat, model.tokenizer.encode_decode(x), atol=1e-5)
    x_hat.sum().backward()
    assert model.tokenizer.embedding.weight.grad is None
    assert model.tokenizer.encoder.conv_in.weight.grad.abs().sum() > 0
    assert torch.equal(tokens, model.tokenizer.encode(x))


def test_init_weights():
    torch.manual_seed(0)
    model = WorldModel()
    for m in model.modules():
        if isinstance(m, (torch.nn.Linear, torch.nn.Embedding)) and m.weight.numel() > 5000:
            assert abs(float(m.weight.std()) / 0.02 - 1) < 0.05
        if isinstance(m, torch.nn.Linear):
            assert (m.bias == 0).all()
    layer = torch.nn.LayerNorm(3)
    torch.nn.init.normal_(layer.weight)
    layer.apply(init_weights)
    assert (layer.weight == 1).all() and (layer.bias == 0).all()
    model = WorldModel(init_gain=0.5)
    for m in model.modules():
        if isinstance(m, torch.nn.Linear) and m.weight.numel() > 5000:
            assert abs(float(m.weight.std()) * m.in_features**0.5 / 0.5 - 1) < 0.05
    assert abs(float(model.pos_emb.weight.std()) / 0.02 - 1) < 0.05


def test_losses_at_initialisation():
    torch.manual_seed(0)
    args = Args(dropout=0.0)
    model = Iris(iris.iris_config(args, 3, 6)).eval()
    rows = dict(tokens=torch.randint(512, (2, 20, 16)), action=torch.randint(6, (2, 20)), reward=torch.randn(2, 20))
    rows |= dict(end=torch.rand(2, 20) < 0.5, mask=torch.ones(2, 20, dtype=torch.bool))
    with torch.no_grad():
        losses, _ = iris.gpt_loss(model, rows, args)
    for name, n in (("tokens", 512), ("rewards", 3), ("ends", 2)):
        assert abs(float(losses[name]) - math.log(n)) < 0.05


def test_heads_stand_where_the_next_token_is_of_their_kind():
    model = WorldModel(vocab_size=9, actions=3, embed_dim=8, num_layers=1, num_heads=2)
    places = [p for p in model.obs_places if p < 34]
    assert places == [*range(15), *range(16, 32), 33] and [p for p in model.act_places if p < 34] == [16, 33]
    out = model(torch.randint(3, (2, 34)))
    assert out.observations.shape == (2, 32, 9) and out.rewards.shape == (2, 2, 3) and out.ends.shape == (2, 2, 2)


def test_transformer_is_causal_and_matches_a_slow_one():
    torch.manual_seed(0)
    model = Transformer(16, 2, 4, dropout=0.1).eval()
    x = torch.randn(2, 9, 16)
    y = model(x)
    for j in range(9):
        other = x.clone()
        other[:, j] += torch.randn(16)
        changed = (model(other) - y).abs().amax((0, 2)) > 1e-6
        assert not changed[:j].any() and changed[j:].all()
    h = x
    for block in model.blocks:
        q, k, v = block.qkv(block.ln1(h)).chunk(3, -1)
        heads = []
        for i in range(4):
            a, b, c = (t[..., 4 * i : 4 * i + 4] for t in (q, k, v))
            scores = (a @ b.transpose(1, 2) / 2).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ c)
        h = h + block.proj(torch.cat(heads, -1))
        h = h + block.mlp(block.ln2(h))
    assert torch.allclose(model.ln_f(h), y, atol=1e-5)


@pytest.mark.parametrize("pieces", [[1] * 20, [4, 2, 3, 2, 3, 2, 3, 1], [15, 5], [20]])
def test_cached_equals_uncached(pieces):
    torch.manual_seed(0)
    model = WorldModel(vocab_size=9, actions=3, tokens_per_frame=4, timesteps=4, embed_dim=16, num_layers=3,
                       num_heads=2).eval()  # fmt: skip
    tokens = torch.randint(9, (2, 20))
    tokens[:, 4::5] %= 3
    whole, kv, found, start = model(tokens), model.cache(2), [], 0
    with torch.no_grad():
        for _ in range(2):  # the second time after a reset: nothing of the first may be left
            kv.reset()
            found, start = [], 0
            for n in pieces:
                found.append(model(tokens[:, start : start + n], kv))
                start += n
                assert kv.size == start
    for name in ("observations", "rewards", "ends"):
        parts = torch.cat([getattr(f, name) for f in found], 1)
        assert torch.allclose(parts, getattr(whole, name), atol=1e-5)
    with pytest.raises(AssertionError):
        model(tokens[:, :1], kv)


def test_embedding_of_frames_and_actions():
    model = WorldModel(vocab_size=9, actions=3, tokens_per_frame=4, timesteps=4, embed_dim=6, num_layers=1, num_heads=2)
    tokens = torch.tensor([[1, 2, 8, 0, 2, 1, 1, 1, 1, 0]])
    for start, stop in [(0, 10), (0, 4), (3, 5), (4, 5), (5, 9), (2, 7), (9, 10)]:
        got = model.embed(tokens[:, start:stop], start)[0]
        for i, p in enumerate(range(start, stop)):
            table = model.act_emb if p % 5 == 4 else model.obs_emb
            assert torch.equal(got[i], table.weight[tokens[0, p]] + model.pos_emb.weight[p])


def test_actor_critic_is_an_lstm_cell_that_skips_padding():
    torch.manual_seed(0)
    model = ActorCritic(3, 16, 3, (4, 5), 6)
    frames, mask = torch.rand(2, 4, 3, 16, 16), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]).bool()
    logits, values, state = model(frames, model.initial(2), mask)
    for b, first in ((0, 0), (1, 2)):
        h, c = torch.zeros(1, 6), torch.zeros(1, 6)
        for t in range(first, 4):
            x = frames[b, t : t + 1] * 2 - 1
            for conv in model.convs:
                x = F.relu(F.max_pool2d(conv(x), 2))
            h, c = model.lstm(x.flatten(1), (h, c))
            assert torch.allclose(logits[b, t], model.actor_linear(h)[0], atol=1e-6)
            assert torch.allclose(values[b, t], model.critic_linear(h)[0, 0], atol=1e-6)
        assert torch.allclose(state[0][b], h[0], atol=1e-6) and torch.allclose(state[1][b], c[0], atol=1e-6)
    assert (model(frames, model.initial(2), torch.zeros(2, 4).bool())[2][0] == 0).all()


def official_names(model):
    """The same weights under the names of the authors' code, with the constants that its checkpoints have."""
    out = {}
    for key, value in model.state_dict().items():
        key = key.replace("world_model.act_emb", "world_model.embedder.embedding_tables.0")
        key = key.replace("world_model.obs_emb", "world_model.embedder.embedding_tables.1")
        for head in ("observations", "rewards", "ends"):
            key = key.replace(f"head_{head}.", f"head_{head}.head_module.")
        if key.startswith("actor_critic.convs."):
            number, rest = key.removeprefix("actor_critic.convs.").split(".")
            key = f"actor_critic.conv{int(number) + 1}.{rest}"
        if ".qkv." in key:
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                out[key.replace("qkv", f"attn.{name}")] = part.clone()
            continue
        out[key.replace(".proj.", ".attn.proj.")] = value.clone()
    out["world_model.transformer.blocks.0.attn.mask"] = torch.ones(3, 3)
    out["world_model.head_rewards.indices"] = torch.arange(3)
    out["tokenizer.lpips.lin0.model.1.weight"] = torch.ones(1, 64, 1, 1)
    return out


def test_official_checkpoints_load(tmp_path, capsys):
    args, model = small()
    torch.save(official_names(model), tmp_path / "last.pt")
    _, other = small()
    for p in other.parameters():
        torch.nn.init.normal_(p.data)
    iris.load_official(other, str(tmp_path / "last.pt"))
    for k, v in model.state_dict().items():
        assert torch.equal(other.state_dict()[k], v)
    _, larger = small(embed_dim=32)
    for wrong, words in ((larger, "size mismatch"), (small(num_layers=3)[1], "Missing")):
        with pytest.raises(SystemExit):
            iris.load_official(wrong, str(tmp_path / "last.pt"))
        assert words in capsys.readouterr().err


def test_names_of_the_official_tokenizer():
    """As taming-transformers names them; a checkpoint's names are the interface."""
    with torch.device("meta"):
        names = set(Tokenizer().state_dict())
    for name in (
        "encoder.conv_in.weight encoder.down.0.block.1.norm2.bias encoder.down.2.attn.1.proj_out.weight "
        "encoder.down.3.downsample.conv.weight encoder.mid.block_1.conv1.weight encoder.mid.attn_1.q.bias "
        "encoder.norm_out.weight encoder.conv_out.bias decoder.up.4.upsample.conv.weight decoder.up.3.attn.2.v.weight "
        "decoder.up.0.block.2.conv2.weight pre_quant_conv.weight embedding.weight post_quant_conv.bias"
    ).split():
        assert name in names, name
    assert "encoder.down.4.downsample.conv.weight" not in names and "decoder.up.0.upsample.conv.weight" not in names
    assert "encoder.down.1.attn.0.q.weight" not in names


# ---- Losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["features.{}", "tokenizer.lpips.net.slice1.{}"])
def test_lpips(names, tmp_path):
    """VGG16's size, both spellings of its weights, in one file or two; 0 for equal images, by hand for one tap."""
    torch.manual_seed(0)
    widths, i, state, at = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512), 3, {}, 0
    for w in widths:
        if w:
            state[names.format(at) + ".weight"] = torch.randn(w, i, 3, 3) / (3 * i**0.5)
            state[names.format(at) + ".bias"] = torch.zeros(w)
            i = w
        at += 2 if w else 1
    heads = {f"lin{k}.model.1.weight": torch.zeros(1, c, 1, 1) for k, c in enumerate((64, 128, 256, 512, 512))}
    heads["lin0.model.1.weight"] += 1
    torch.save(state, tmp_path / "vgg.pt")
    torch.save(heads, tmp_path / "heads.pt")
    model = iris.LPIPS(f"{tmp_path}/vgg.pt,{tmp_path}/heads.pt")
    assert sum(p.numel() for p in model.net.parameters()) == 14_714_688
    assert not any(p.requires_grad for p in model.parameters())
    x, y = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    assert (model(x, x) == 0).all()
    shift, scale = (torch.tensor(v).view(3, 1, 1) for v in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
    feats = []
    for image in (x, y):
        h = F.relu(F.conv2d((image - shift) / scale, state[names.format(0) + ".weight"], padding=1))
        h = F.relu(F.conv2d(h, state[names.format(2) + ".weight"], padding=1))
        feats.append(h / h.norm(dim=1, keepdim=True))
    expected = ((feats[0] - feats[1]) ** 2).sum(1).mean((1, 2))
    assert torch.allclose(model(x, y), expected, atol=1e-4)


@pytest.mark.parametrize("content", [b"not a checkpoint", {"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}])
def test_lpips_of_a_wrong_file(content, tmp_path, capsys):
    path = tmp_path / "w.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(SystemExit) as e:
        iris.LPIPS(str(path))
    (line,) = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and f"--lpips-weights {path}: no VGG16 with LPIPS heads" in line


@pytest.mark.parametrize("skip", (False, True))
def test_gpt_loss_by_hand(skip):
    """Every prediction stands where its label is, and padding counts for nothing."""
    args, model = small(skip_first_frame=skip)
    batch = batch_of("world_model", args)
    losses, metrics = iris.gpt_loss(model, batch, args)
    tokens, T, K = batch["tokens"], args.batch_length, 16
    stream = torch.cat([tokens, batch["action"].unsqueeze(-1)], -1).flatten(1)
    x = model.world_model.transformer(model.world_model.embed(stream, 0))
    terms = {"tokens": [], "rewards": [], "ends": []}
    right = total = 0
    for b in range(4):
        for t in range(T):
            if not batch["mask"][b, t]:
                continue
            for i in range(K):
                if t + i == 0:
                    continue
                before = t * (K + 1) + i - 1  # the position before; before a frame's first token stands the action
                logits = model.world_model.head_observations(x[b, before])
                if t or not skip:
                    terms["tokens"].append(F.cross_entropy(logits, tokens[b, t, i]))
                if t and tokens[b, t, i] != tokens[b, t - 1, i]:
                    total, right = total + 1, right + int(logits.argmax() == tokens[b, t, i])
            at = x[b, t * (K + 1) + K]
            label = batch["reward"][b, t].sign().long() + 1
            terms["rewards"].append(F.cross_entropy(model.world_model.head_rewards(at), label))
            terms["ends"].append(F.cross_entropy(model.world_model.head_ends(at), batch["end"][b, t].long()))
    for name, found in terms.items():
        assert torch.allclose(losses[name], torch.stack(found).mean(), atol=1e-5)
    assert math.isclose(metrics["changed_token_accuracy"], right / total, abs_tol=1e-6)


def test_padding_changes_nothing():
    args, model = small()
    batch = batch_of("world_model", args)
    other = {k: v.clone() for k, v in batch.items()}
    hidden = ~batch["mask"]
    other["tokens"][hidden] = 0
    other["reward"][hidden], other["end"][hidden], other["action"][hidden] = -5.0, True, 2
    a, b = (iris.gpt_loss(model, x, args)[0] for x in (batch, other))
    assert all(torch.allclose(a[k], b[k]) for k in a)


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda m, inputs, output: calls.append(inputs[0].shape[1]))
    return calls


def test_imagination_of_the_published_length():
    """306 calls of the GPT with the last frame token merged into the action's call, and never more than 340 tokens."""
    torch.manual_seed(0)
    args = Args(**SMALL | dict(image_size=16, batch_length=20, imag_horizon=20))
    model = Iris(iris.iris_config(args, 3, 3)).eval()
    assert model.world_model.max_tokens == 340 and model.tokenizer.num_tokens == 16
    calls = count_calls(model.world_model.transformer)
    sizes = []
    model.world_model.transformer.register_forward_hook(lambda m, i, o: sizes.append(i[1].size))
    rollout = imagine(model, torch.randint(11, (64, 16)), model.actor_critic.initial(64), 20)
    assert len(calls) == 306 and calls[:2] == [15, 2] and max(sizes) == sizes[-1] <= 340
    assert calls.count(2) == 20 and calls.count(15) == 1
    assert rollout.frames.shape == (64, 20, 3, 16, 16)
    for x in (rollout.actions, rollout.rewards, rollout.ends):
        assert x.shape == (64, 20)
    assert set(rollout.rewards.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert set(rollout.ends.unique().tolist()) <= {0.0, 1.0}
    assert rollout.frames.min() >= 0 and rollout.frames.max() <= 1 and not rollout.frames.requires_grad


@pytest.mark.parametrize("timesteps", [2, 4])
def test_full_memory_starts_again_from_the_current_frame(timesteps):
    args, model = small(batch_length=timesteps)
    calls = count_calls(model.world_model.transformer)
    imagine(model, torch.randint(11, (2, 16)), model.actor_critic.initial(2), 9)
    # A memory of n blocks holds n - 1 transitions to a whole next frame; the last step needs no next frame.
    fits = timesteps - 1
    assert calls.count(15) == sum(1 for step in range(8) if step % fits == 0) + (8 % fits == 0 and fits == 1) * 0
    assert calls.count(2) == 9


class CountingWorld(torch.nn.Module):
    """Stands in for the GPT: the next frame's tokens are (first token + action + 1) mod 7, in every place."""

    def __init__(self, K=4, steps=3):
        super().__init__()
        self.block, self.max_tokens, self.seen = K + 1, steps * (K + 1), []

    def cache(self, n):
        self.stream = torch.zeros(n, 0, dtype=torch.long)
        return iris.KeysValues((1, n, 1, self.max_tokens, 1), CPU, torch.float32)

    def forward(self, tokens, kv):
        self.stream = torch.cat([self.stream[:, : kv.size], tokens], 1)
        kv.size += tokens.shape[1]
        assert kv.size <= self.max_tokens
        n = self.stream.shape[1]
        blocks = (n - 1) // self.block
        frame = self.stream[:, blocks * self.block]
        if n % self.block == 0:  # an action is the last token
            token = (frame + self.stream[:, -1] + 1) % 7
            self.seen.append(self.stream.clone())
        else:
            token = frame
        sure = lambda index, n: 1e4 * F.one_hot(index, n).float().unsqueeze(1)  # noqa: E731
        last = self.stream[:, -1]
        return iris.Predictions(sure(token, 7), sure(last % 3, 3), sure((frame == 6).long(), 2))


def test_dream_step_feeds_the_memory_in_order():
    world, kv = CountingWorld(), None
    kv = world.cache(2)
    tokens, expected = torch.tensor([[3] * 4, [5] * 4]), torch.tensor([3, 5])
    for step, action in enumerate(torch.tensor([[0, 1], [2, 2], [1, 0], [0, 0], [1, 1]])):
        reward, end, tokens = iris.dream_step(world, kv, tokens, action)
        assert reward.tolist() == [a % 3 - 1 for a in action.tolist()]
        assert end.tolist() == [float(x == 6) for x in expected]
        expected = (expected + action + 1) % 7
        assert (tokens == expected[:, None]).all()
        blocks = world.seen[-1].view(2, -1, 5)  # whole blocks of a frame and its action, the oldest first
        assert (blocks[:, :, :4] == blocks[:, :, :1]).all() and blocks.shape[1] == step % 2 + 1


def test_actor_critic_loss_by_hand(monkeypatch):
    args, model = small(imag_horizon=4, mask_after_end=False, ent_coef=0.02)
    batch = batch_of("actor_critic", args)
    torch.manual_seed(5)
    state = iris.burn_in(model.actor_critic, batch)
    rollout = imagine(model, batch["tokens"], state, 4)
    rewards = torch.tensor([[1.0, 0, -1, 0], [0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
    ends = torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]])
    rollout = rollout._replace(rewards=rewards, ends=ends)
    monkeypatch.setattr(iris, "imagine", lambda *a: rollout)
    logits, values, _ = model.actor_critic(rollout.frames, state)
    G = lambda_return(rewards, values, ends, args.gamma, args.return_lambda).detach()
    for masked in (False, True):
        losses, _ = iris.actor_critic_loss(model, batch, Args(**vars(args) | {"mask_after_end": masked}))
        policy = value = entropy = count = 0.0
        for b in range(4):
            for t in range(3):
                if masked and ends[b, :t].any():
                    continue
                logp = torch.log_softmax(logits[b, t], -1)
                policy -= logp[rollout.actions[b, t]] * (G[b, t] - values[b, t].detach())
                value += (values[b, t] - G[b, t]) ** 2
                entropy -= (logp.exp() * logp).sum()
                count += 1
        assert count == (9 if masked else 12)
        assert torch.allclose(losses["policy"], policy / count, atol=1e-5)
        assert torch.allclose(losses["value"], value / count, atol=1e-5)
        assert torch.allclose(losses["entropy_bonus"], -0.02 * entropy / count, atol=1e-5)
    # gradients: none into tokenizer and world model, none through the advantage
    losses["policy"].backward()
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("actor_critic"))
    assert (
        model.actor_critic.critic_linear.weight.grad is None or not model.actor_critic.critic_linear.weight.grad.any()
    )


def test_burn_in_is_without_gradient_and_skips_padding():
    args, model = small()
    batch = batch_of("actor_critic", args)
    h, c = iris.burn_in(model.actor_critic, batch)
    assert not h.requires_grad and (h[2] == 0).all() and (h[0] != 0).any()
    other = {k: v.clone() for k, v in batch.items()}
    other["recon"][~batch["mask"]] = 7
    assert torch.equal(iris.burn_in(model.actor_critic, other)[0], h)


def test_configure_optimizer():
    model = WorldModel(vocab_size=9, actions=3, embed_dim=8, num_layers=2, num_heads=2)
    opt = configure_optimizer(model, 1e-3, 0.01)
    decay = {id(p): g["weight_decay"] for g in opt.param_groups for p in g["params"]}
    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear)}
    assert {i for i, w in decay.items() if w} == linear and {w for w in decay.values()} == {0.0, 0.01}
    assert len(decay) == len(list(model.parameters())) and isinstance(opt, torch.optim.AdamW)


@pytest.mark.parametrize("part", PARTS)
def test_an_update_changes_only_its_part(part):
    args, model = small(dropout=0.1)
    learner = Learner(model, args, CPU)
    before = copy.deepcopy(model.state_dict())
    metrics = learner.update(part, batch_of(part, args))
    changed = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {part} and all(torch.isfinite(v) for v in metrics.values())
    assert not model.world_model.training


def test_dropout_only_while_the_world_model_learns(monkeypatch):
    args, model = small(dropout=0.5)
    learner, modes = Learner(model, args, CPU), []
    model.world_model.transformer.register_forward_hook(lambda m, i, o: modes.append(m.training))
    learner.update("world_model", batch_of("world_model", args))
    learner.update("actor_critic", batch_of("actor_critic", args))
    assert modes[0] and not any(modes[1:]) and len(modes) > 10


@pytest.mark.parametrize("part", PARTS)
def test_updates_learn(part, monkeypatch):
    """The same batch again and again, and the same dream: each loss falls."""
    args, model = small(learning_rate=3e-3)
    learner, batch = Learner(model, args, CPU), batch_of(part, args)
    rollout = imagine(model, batch_of("actor_critic", args)["tokens"], model.actor_critic.initial(4), 5)
    monkeypatch.setattr(iris, "imagine", lambda *a: rollout)
    name = {"tokenizer": "reconstruction", "world_model": "tokens", "actor_critic": "value"}[part]
    losses = [float(learner.update(part, batch)[name]) for _ in range(60)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])


def test_unused_codes_are_revived():
    """Latents in 8 places: after a few updates of the codebook every place has its own code word, as good as exact."""
    args, model = small(revive_codes=50)
    learner = Learner(model, args, CPU)
    places = 5 * torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    often = torch.tensor([0] * 90 + [1, 2, 3, 4, 5, 6, 7, 7, 7, 7])  # most of them rare
    for _ in range(12):
        learner.revive(places[often])
    tokens, z_q = vector_quantize(places, model.tokenizer.embedding.weight)
    assert len(tokens.unique()) == 8 and torch.allclose(z_q, places, atol=1e-5)
    learner.count.fill_(50)
    before = model.tokenizer.embedding.weight.clone()
    learner.revive(-places[often])
    assert torch.equal(before, model.tokenizer.embedding.weight)


# ---- Replay ----------------------------------------------------------------------------------------------------------


def filled(capacity, plan, envs=1):
    """A replay of tiny frames: environment e's step t shows e*100 + t; plan: steps after which an episode ends."""
    specs = EpisodeReplay.specs((2, 2, 1), 3)
    replay = EpisodeReplay(capacity, envs, specs)
    for t, last in enumerate(plan):
        values = np.arange(envs) * 100 + t
        obs = np.broadcast_to(values[:, None, None, None], (envs, 2, 2, 1)).astype(np.uint8)
        ended = np.full(envs, bool(last))
        replay.add({"obs": obs, "action": values % 3, "reward": values.astype(float), "end": ended}, ended)
    return replay


def test_replay_lists_episodes():
    replay = filled(100, [0, 0, 1, 1, 0, 0], envs=2)
    expected = [[e, a, b] for a, b in ((0, 3), (3, 4), (4, 6)) for e in (0, 1)]
    assert replay.table().tolist() == expected and replay.episodes == expected
    replay.open = [False] * 2
    replay.add({"obs": np.zeros((2, 2, 2, 1), np.uint8), "action": np.zeros(2), "reward": np.zeros(2),
                "end": np.zeros(2, bool)}, np.zeros(2, bool))  # fmt: skip
    assert replay.table().tolist()[-2:] == [[0, 6, 7], [1, 6, 7]]


def test_replay_forgets_the_oldest():
    replay = filled(8, [0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0])
    assert replay.table().tolist() == [[0, 5, 6], [0, 6, 11], [0, 11, 13]]
    assert replay.episodes == [[0, 3, 6], [0, 6, 11], [0, 11, 13]]
    replay.add(
        {"obs": np.full((1, 2, 2, 1), 13, np.uint8), "action": [0], "reward": [0.0], "end": [True]}, np.array([True])
    )
    assert replay.table().tolist() == [[0, 6, 11], [0, 11, 14]]
    index, mask = replay.rows(replay.table(), 500, 3, True)
    seen = replay.gather("obs", index)[..., 0, 0, 0]
    assert set(seen[mask].tolist()) == set(range(6, 14))


def test_segments_stay_in_their_episode():
    replay = filled(100, [0, 0, 1, 0, 0, 0, 0, 1, 1], envs=2)
    batch = replay.segments(replay.table(), 400, 4)
    for reward, end, mask in zip(batch["reward"], batch["end"], batch["mask"], strict=True):
        real = reward[mask]
        assert (real.diff() == 1).all() and end[mask].sum() <= 1
        assert not end[mask][:-1].any()
        if not mask.all():
            assert end[mask][-1]
    starts = replay.starts(replay.table(), 400, 3)
    assert starts["recon"].shape == (400, 3, 2, 2, 1) and starts["tokens"].shape == (400, 3)
    assert replay.frames(replay.table(), 50)["obs"].shape == (50, 2, 2, 1)


class Halves(torch.nn.Module):
    """A tokenizer that remembers how often it ran."""

    calls = 0

    def encode(self, x):
        self.calls += 1
        return (x[:, 0, 0, 0] * 255).round().long()[:, None] // torch.tensor([1, 2, 4])

    def show(self, tokens):
        return (tokens[:, :1, None, None] / 255).expand(-1, 1, 2, 2)


def test_encoding_once():
    replay, tokenizer = filled(300, [0] * 270), Halves()
    replay.encode(tokenizer, CPU)
    calls = tokenizer.calls
    assert calls == 5  # of 64 frames
    replay.encode(tokenizer, CPU)
    assert tokenizer.calls == calls
    shown = torch.arange(270) % 256
    assert torch.equal(replay.data["tokens"][0, :270, 1].long(), shown // 2)
    assert torch.equal(replay.data["recon"][0, :270, 0, 0, 0].long(), shown)
    replay.add(
        {"obs": np.full((1, 2, 2, 1), 9, np.uint8), "action": [0], "reward": [0.0], "end": [True]}, np.array([True])
    )
    replay.encode(tokenizer, CPU)
    assert tokenizer.calls == calls + 1 and replay.data["tokens"][0, 270].tolist() == [9, 4, 2]
    replay.encoded[:] = 0
    replay.encode(tokenizer, CPU)
    assert tokenizer.calls == calls + 6


@pytest.mark.parametrize("capacity", [40, 300])
def test_replay_is_restored(capacity):
    replay = filled(capacity, [0, 0, 1, 0, 0] * 12, envs=2)
    state = copy.deepcopy(replay.state_dict())
    assert not {"tokens", "recon"} & set(state["rows"])
    other = EpisodeReplay(capacity, 2, EpisodeReplay.specs((2, 2, 1), 3), seed=9)
    other.load_state_dict(state)
    for r in (replay, other):
        r.encode(Halves(), CPU)
    a, b = (r.segments(r.table(), 50, 4) for r in (replay, other))
    assert all(torch.equal(a[k], b[k]) for k in a) and other.open == replay.open


# ---- Environments ----------------------------------------------------------------------------------------------------


def test_catch():
    env = gym.make("Catch-v0")
    returns = []
    for seed in range(300):
        env.reset(seed=seed)
        ball, total = env.unwrapped.ball[1], 0.0
        for step in range(7):
            obs, reward, terminated, truncated, _ = env.step(env.unwrapped.np_random.integers(3))
            total += reward
            assert terminated == (step == 6) and not truncated and (reward == 0) == (step < 6)
        assert obs.shape == (32, 32, 3) and env.unwrapped.ball.tolist() == [7, ball]
        assert (total == 1.0) == (env.unwrapped.paddle == ball)
        returns.append(total)
    assert -0.9 < np.mean(returns) < -0.6  # one in eight
    env.reset(seed=1)
    for _ in range(7):  # a tracking policy always wins
        move = np.sign(env.unwrapped.ball[1] - env.unwrapped.paddle)
        _, reward, *_ = env.step(1 + move)
    assert reward == 1.0


class FakeALE:
    def __init__(self, env):
        self.env = env

    def lives(self):
        return self.env.left


class FakeGame(gym.Env):
    """Raw frames of 4x4 that show the number of the frame; a life is lost at frames of `deaths`, the last ends it."""

    observation_space, action_space = gym.spaces.Box(0, 255, (4, 4, 3), np.uint8), gym.spaces.Discrete(3)

    def __init__(self, deaths):
        self.deaths, self.ale, self.resets = deaths, FakeALE(self), 0

    def picture(self):
        return np.full((4, 4, 3), 0 if self.t % 2 else self.t, np.uint8)  # every other frame is dark

    def reset(self, *, seed=None, options=None):
        self.t, self.left, self.resets, self.actions = 0, len(self.deaths), self.resets + 1, []
        return self.picture(), {}

    def step(self, action):
        self.t += 1
        self.actions.append(int(action))
        self.left -= self.t in self.deaths
        return self.picture(), 1.0, self.left == 0, False, {}


def test_atari_wrapper_skips_pools_and_tells_of_a_lost_life():
    game = FakeGame([14, 30])
    env = iris.AtariLives(game, Args(image_size=4), 1)
    env.reset(seed=0)
    assert game.actions == [0]  # exactly one no-op
    obs, reward, terminated, _, info = env.step(2)
    assert game.actions == [0, 2, 2, 2, 2] and reward == 4.0 and not terminated and not info["life_lost"]
    assert (obs == 4).all()  # of frames 4 and 5, the last of which is dark
    assert [env.step(1)[4]["life_lost"] for _ in range(4)] == [False, False, True, False]  # frame 14 is among 14..17
    assert game.left == 1 and game.resets == 1
    for _ in range(3):
        _, reward, terminated, _, info = env.step(1)
    assert terminated and game.left == 0 and reward == 1.0 and not info["life_lost"]  # the game is over at frame 30


def test_noops_are_drawn_from_1_to_30():
    game = FakeGame([10_000])
    env, counts = iris.AtariLives(game, Args(image_size=4), 30), set()
    for seed in range(400):
        env.reset(seed=seed)
        counts.add(len(game.actions))
    assert counts == set(range(1, 31))


def test_a_lost_life_ends_an_episode_and_the_game_goes_on(tmp_path, monkeypatch):
    """Training episodes of Breakout end with lives, of which the replay has more than the curves have games; a game is
    not reset by them, and its frames follow each other."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(iris, "evaluate", lambda *a: np.zeros(1))
    flags = dict(SMALL, tok_levels=1, tok_attention="", image_size=16, env_id="ALE/Breakout-v5", total_timesteps=200)
    flags |= dict(steps_per_epoch=100, extra_epochs=0, tokenizer_start=1, tokenizer_updates=1, world_model_updates=0)
    flags |= dict(actor_critic_updates=0, eval_episodes=1, cuda=False, num_threads=1, tok_patch=4, temperature=9.0)
    iris.train(Args(**flags))
    (run,) = (tmp_path / "runs").iterdir()
    state = torch.load(run / "ckpt.pt", weights_only=True)
    ends, games = state["replay"]["rows"]["end"][0], state["loop"]["episode"][0]
    assert ends.sum() > games and len(state["replay"]["episodes"]) in (int(ends.sum()), int(ends.sum()) + 1)


def test_dreams_of_the_agent():
    """A state is what the GPT remembers: its dream is that of a slow model without a memory of keys and values; full,
    it goes on from the current frame alone."""
    args, model = small(batch_length=2)
    agent, obs = iris.Agent(model, args), batch_of("tokenizer", args, 12)["obs"].view(3, 4, 16, 16, 3).numpy()
    (memory,), seen = agent.observe(obs, np.zeros((3, 3), int))
    assert seen.shape == obs.shape and seen.dtype == np.uint8 and memory.shape == (3, 16)
    assert torch.equal(memory, model.tokenizer.encode(iris.to_images(torch.as_tensor(obs[:, -1]))))
    torch.manual_seed(3)
    after, reward, alive, frames = agent.imagine((memory,), np.array([0, 1, 2]))
    assert after[0].shape == (3, 33) and (after[0][:, :16] == memory).all() and after[0][:, 16].tolist() == [0, 1, 2]
    assert set(reward) <= {-1.0, 0.0, 1.0} and set(alive) <= {0.0, 1.0} and frames.shape == (3, 16, 16, 3)
    again, *_ = agent.imagine(after, np.array([2, 1, 0]))
    assert again[0].shape == (3, 33) and torch.equal(again[0][:, :16], after[0][:, 17:])  # the memory was full
