"""How much faster are genie_lam.py's updates and imagined frames than those of a plain implementation?

    python benchmarks/genie_peer.py                       # sizes of the cpu preset
    python benchmarks/genie_peer.py --dim 128 --layers 4 --tokens 64 --frames 16 --batch 2

The peer is written here, in the manner of AlmondGod/tinyworlds, the best known PyTorch Genie: the same
transformer at equal sizes with a linear layer each for queries, keys and values, attention in explicit steps with a
mask that is built anew, a norm after each residual whose scale and shift come from the frame's action, and a SwiGLU
network of as many weights; MaskGIT runs the whole window in every round and picks tokens sample by sample in Python.
The project's own modules, run beside it on the same sizes, took 0.94 to 1.19 of its time. CPU time of one thread; a
step is forward, backward, clipping and AdamW; the allocator is as genie_lam.py sets it, for both."""

import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from common import ROOT, Parser, at_least
from torch import nn

sys.path.insert(0, str(ROOT))
import genie_lam  # noqa: E402


class PlainNorm(nn.Module):
    """Layer norm in explicit steps; the action of each frame sets its scale and shift."""

    def __init__(self, dim, width=3):
        super().__init__()
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * dim))

    def forward(self, x, actions):
        """x (B, T, N, D), actions (B, T, width)."""
        x = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
        scale, shift = self.modulate(actions)[:, :, None].repeat(1, 1, x.shape[2], 1).chunk(2, -1)
        return x * (1 + scale) + shift


class PlainAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x, causal):
        """x (M, L, D)."""
        M, L, D = x.shape
        q, k, v = (f(x).view(M, L, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / (D / self.heads) ** 0.5
        if causal:
            scores = scores.masked_fill(torch.triu(torch.ones(L, L), diagonal=1).bool(), -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(M, L, D)
        return self.out(y)


class PlainBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.space, self.time, hidden = PlainAttention(dim, heads), PlainAttention(dim, heads), 4 * dim * 2 // 3
        self.gate, self.value, self.out = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norms = nn.ModuleList([PlainNorm(dim) for _ in range(3)])

    def forward(self, x, actions):
        B, T, N, D = x.shape
        x = self.norms[0](x + self.space(x.reshape(B * T, N, D), False).view(B, T, N, D), actions)
        y = self.time(x.permute(0, 2, 1, 3).reshape(B * N, T, D), True).view(B, N, T, D).permute(0, 2, 1, 3)
        x = self.norms[1](x + y, actions)
        return self.norms[2](x + self.out(F.silu(self.value(x)) * self.gate(x)), actions)


class PlainDynamics(nn.Module):
    """Tokens and actions to logits, with the mask token as the last word."""

    def __init__(self, words, dim, heads, layers, tokens, frames):
        super().__init__()
        self.embed = nn.Embedding(words + 1, dim)
        self.position = nn.Parameter(torch.randn(frames, tokens, dim) * 0.02)
        self.blocks, self.head = nn.ModuleList([PlainBlock(dim, heads) for _ in range(layers)]), nn.Linear(dim, words)

    def forward(self, ids, actions):
        x = self.embed(ids) + self.position[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, actions[..., :3])
        return self.head(x)

    @torch.no_grad()
    def next_frame(self, past, actions, rounds):
        """past (B, T, N), actions (B, T + 1, 32) -> tokens (B, N): all frames in every round."""
        (B, _, N), words = past.shape, self.head.out_features
        ids, masked = torch.full((B, 1, N), words), torch.ones(B, N, dtype=torch.bool)
        for t in range(rounds):
            p = self(torch.cat([past, ids], 1), actions)[:, -1].softmax(-1)
            best, token = p.max(-1)
            count = N - int(N * np.cos(np.pi / 2 * (t + 1) / rounds)) if t + 1 < rounds else N
            for b in range(B):
                open_ = torch.where(masked[b])[0]
                take = max(0, count - (N - len(open_)))
                chosen = open_[best[b][open_].topk(take).indices] if take else open_[:0]
                for i in chosen:
                    ids[b, 0, i] = token[b, i]
                    masked[b, i] = False
        return ids[:, 0]


def median_seconds(function, seconds):
    function()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return float(np.median(times))


def step_of(model, loss):
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        opt.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()

    return step


def main():
    parser = Parser(__doc__)
    for name, value in dict(dim=64, heads=4, layers=2, tokens=25, frames=5, words=64, batch=32, rounds=8).items():
        parser.add_argument(f"--{name}", type=at_least(1), default=value)
    parser.add_argument("--seconds", type=at_least(0, float), default=5.0, help="per measurement")
    a = parser.parse_args()
    torch.set_num_threads(1)
    genie_lam.seed_everything(genie_lam.Args(), torch.device("cpu"))
    config = dict(vocabulary=a.words, dyn_dim=a.dim, dyn_layers=a.layers, dyn_heads=a.heads, dyn_head_dim=None)
    config |= dict(ffn_mult=4, action_cond="add", action_dim=32)
    ours = genie_lam.MaskGITDynamics(config, a.tokens)
    peer = PlainDynamics(a.words, a.dim, a.heads, a.layers, a.tokens, a.frames)
    ids, actions = torch.randint(0, a.words, (a.batch, a.frames, a.tokens)), torch.randn(a.batch, a.frames, 32)
    target = torch.randint(0, a.words, ids.shape)

    def loss_of(model):
        return lambda: F.cross_entropy(model(ids, actions).flatten(0, 2), target.flatten())

    def cached():
        cache = genie_lam.FrameCache()
        with torch.no_grad():
            ours(ids[:1, :-1], actions[:1, :-1], cache)

        @torch.no_grad()
        def frame():
            action, hidden = actions[:1, -1:], torch.full((1, a.tokens), a.words)
            fill = lambda x: ours(x[:, None], action, cache, commit=False)[:, 0]  # noqa: E731
            tokens = genie_lam.maskgit_decode(fill, hidden, a.rounds, 0.0)
            ours(tokens[:, None], action, cache, commit=False)  # so that it stays as it is for the next call

        return frame

    rows = {"training step of the dynamics": (step_of(ours, loss_of(ours)), step_of(peer, loss_of(peer)))}
    rows["imagined frame, one world"] = (cached(), lambda: peer.next_frame(ids[:1, :-1], actions[:1], a.rounds))
    count = [sum(p.numel() for p in m.parameters()) for m in (ours, peer)]
    print(f"parameters: {count[0]:,} and {count[1]:,}; {vars(a)}")
    print("| | genie_lam.py, ms | peer, ms | ratio |\n|---|---|---|---|")
    for name, pair in rows.items():
        x, y = (median_seconds(f, a.seconds) for f in pair)
        print(f"| {name} | {1e3 * x:.1f} | {1e3 * y:.1f} | {y / x:.2f} |")


if __name__ == "__main__":
    main()
