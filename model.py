"""
The transformer: LlamaGen (arXiv 2406.06525), a Llama that writes an image as T = grid_size^2 tokens in raster order.

    [P conditioning positions][T image tokens]        p(tokens | cond) = prod_t p(token_t | cond, tokens_<t)

The output at the last conditioning position predicts token 0; there is no BOS, no EOS and no padding of image
tokens. c2i conditions on a class (P = 1, a row of an embedding table), t2i on T5 features (P = 120, through a
two-layer projection). Both know "no condition" as well, which classifier-free guidance needs: the last row of the
table, or stored features (in LlamaGen random and never trained).

The policy is `guide`, then the head, then `policy_logprobs`: guidance before temperature. The sampler (`generate`) and
grpo.log_policy share these functions, so what is trained is what was sampled. Filtering by top-k or top-p is only for
drawing pictures.

Module attributes bear LlamaGen's own parameter names, so that official files load without conversion.
Shapes: B sequences, P conditioning positions, T image tokens, L = P + T, S positions
of one pass, C width, H heads, D = C/H, V codes.
"""

import copy
import math
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class ModelConfig:
    task: str  # "c2i" or "t2i"
    n_layer: int
    n_head: int
    dim: int  # C
    vocab_size: int = 16384  # V, the tokenizer's codebook_size
    grid_size: int = 16  # T = grid_size^2
    num_classes: int = 1000  # c2i only
    caption_dim: int = 2048  # t2i only: width of the text features
    cond_len: int = 1  # P: 1 for c2i, 120 for LlamaGen's t2i

    @property
    def num_tokens(self):
        return self.grid_size**2


class Linear(nn.Linear):
    """
    nn.Linear without bias. With `adapters` (at the end of this file) it adds the product of two thin matrices to its
    weight: up (n_out, rank), down (rank, n_in).

    Decoding one position of a few sequences on a CPU takes as long as reading the weights. W x^T instead of x W^T lets
    MKL read them in order: 1.4 times as fast for 16 sequences of GPT-B. For the toy's 64 the extra copy costs more.
    """

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)
        self.register_parameter("down", None)
        self.register_parameter("up", None)

    def forward(self, x):  # (B, S, n_in) -> (B, S, n_out)
        y = self.product(x)
        return y if self.up is None else y + F.linear(F.linear(x, self.down), self.up)

    def product(self, x):
        few = x.device.type == "cpu" and x.shape[1] == 1 and len(x) <= 32
        if few and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")):
            return (self.weight @ x[:, 0].T).T.contiguous()[:, None]
        return super().forward(x)


def rope_2d(config, base=10000):
    """
    The 2D rotary embedding (arXiv 2104.09864, over rows and columns) as (cos, sin) of the angles, (L, D/2, 2): the
    first half of the angles comes from a token's row, the second from its column.

    At the conditioning positions cos and sin are both 0, so queries and keys are zero vectors there. All positions of
    the text therefore get the same attention logit, 0, from every image token. Word order, and which word matters, must
    already be in the text features.
    """
    half = config.dim // config.n_head // 2
    frequencies = base ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)  # (D/4,)
    place = torch.arange(config.grid_size, dtype=torch.float64)[:, None] * frequencies  # (grid, D/4)
    rows = place[:, None].expand(-1, config.grid_size, -1)
    angles = torch.cat([rows, rows.transpose(0, 1)], -1).flatten(0, 1)  # (T, D/2)
    turns = torch.stack([angles.cos(), angles.sin()], -1).float()  # (T, D/2, 2)
    return torch.cat([turns.new_zeros(config.cond_len, half, 2), turns])  # (L, D/2, 2)


def rotate(x, rope):
    """Rotates the channel pairs (2i, 2i+1) of x (..., S, D) by rope (S, D/2, 2), in float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (..., S, D/2) each, interleaved
    cos, sin = rope.unbind(-1)  # (S, D/2) each
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.wqkv = Linear(config.dim, 3 * config.dim)
        self.wo = Linear(config.dim, config.dim)

    def forward(self, x, rope, mask, cache=None, place=None):
        """
        x (B, S, C): S positions of the sequence; rope (S, D/2, 2); mask (B, 1, S, keys), or None for causal. With a
        cache (2, B, H, keys, D), keys and values are written to its positions `place` (S,), and all of it is read.
        """
        B, S, C = x.shape
        qkv = self.wqkv(x).view(B, S, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (3, B, H, S, D)
        (q, k), v = rotate(qkv[:2], rope), qkv[2]  # each (B, H, S, D)
        if cache is not None:
            # writes the new ones, and returns those of all positions, (B, H, keys, D) each
            k, v = cache.index_copy_(3, place, torch.stack((k, v)).to(cache.dtype))
        # A single new query stands last and may see all keys, so it needs no causal mask.
        with torch.autocast(x.device.type, enabled=False):  # in the cache's precision, which may be the higher one
            y = F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=mask, is_causal=mask is None and S > 1)
        return self.wo(y.transpose(1, 2).reshape(B, S, C))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): w2(silu(w1 x) * w3 x), hidden width 8C/3 rounded up to a multiple of 256."""

    def __init__(self, dim):
        super().__init__()
        hidden = 256 * math.ceil(int(8 * dim / 3) / 256)
        self.w1, self.w3 = Linear(dim, hidden), Linear(dim, hidden)
        self.w2 = Linear(hidden, dim)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention, self.feed_forward = Attention(config), FeedForward(config.dim)
        # Under bfloat16 autocast only matrix products are rounded; x, the sum that runs through all blocks, and these
        # norms of it stay float32.
        self.attention_norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=1e-5)

    def forward(self, x, rope, mask, cache=None, place=None):
        x = x + self.attention(self.attention_norm(x), rope, mask, cache, place)
        return x + self.feed_forward(self.ffn_norm(x))


class ClassEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)  # the last row is "no class"

    def forward(self, labels):  # (B,) -> (B, 1, C)
        return self.embedding_table(labels)[:, None]

    def null(self, labels):
        return torch.full_like(labels, self.embedding_table.num_embeddings - 1)


class CaptionProjection(nn.Module):
    def __init__(self, caption_dim, dim):
        super().__init__()
        self.fc1, self.fc2 = Linear(caption_dim, dim), Linear(dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.cap_proj = CaptionProjection(config.caption_dim, config.dim)
        self.uncond_embedding = nn.Parameter(torch.randn(config.cond_len, config.caption_dim) / config.caption_dim**0.5)

    def forward(self, features):  # (B, P, caption_dim) -> (B, P, C)
        return self.cap_proj(features)

    def null(self, features):
        return self.uncond_embedding.to(features.dtype).expand_as(features)


class Transformer(nn.Module):
    """
    cond is (B,) int64 labels for c2i and (B, P, caption_dim) text features for t2i. cond_mask (B, P) is True where
    there is text; a class is never padding, so c2i ignores it. None means that nothing is padding.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.cls_embedding = (ClassEmbedding if config.task == "c2i" else CaptionEmbedding)(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.dim, eps=1e-5)
        self.output = Linear(config.dim, config.vocab_size)  # untied from tok_embeddings
        self.register_buffer("rope", rope_2d(config), persistent=False)
        self.checkpoint_layers = False  # True: the backward pass recomputes each block (arXiv 1604.06174)
        self.compile_steps = False  # True: `generate` takes CompiledStep; faster after minutes of compiling
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def mask(self, cond_mask):
        """
        cond_mask (B, P) -> (B, 1, L, L), True where attention is allowed, or None where plain causal attention says the
        same. With text, key j is visible to query i if (j <= i and j is not padding) or i == j.
        """
        if self.config.task == "c2i" or cond_mask is None:
            return None
        total = len(self.rope)
        visible = F.pad(cond_mask.bool(), (0, self.config.num_tokens), value=True)  # (B, L)
        ones = torch.ones(total, total, dtype=torch.bool, device=cond_mask.device)
        return ((ones.tril() & visible[:, None]) | torch.eye(total, dtype=torch.bool, device=ones.device))[:, None]

    def with_null(self, cond, cond_mask):
        """The batch followed by itself without its condition (same mask), so that guidance takes one forward pass."""
        return torch.cat([cond, self.cls_embedding.null(cond)]), torch.cat([cond_mask, cond_mask])

    def embed(self, cond):
        """
        The conditioning positions (B, P, C), float32. Autocast would leave cap_proj's output in bfloat16. `generate`
        would then run the text in bfloat16, and `forward`, which joins it to float32 token embeddings, in float32.
        """
        return self.cls_embedding(cond).float()

    def head(self, states):
        """Normed states (..., C) -> logits (..., V), float32 even under bfloat16 autocast: softmax needs the digits."""
        with torch.autocast(states.device.type, enabled=False):
            return self.output(states)

    def forward(self, cond, tokens, cond_mask=None):
        """
        Teacher forcing: logits (B, T, V), float32, where logits[:, i] predicts tokens[:, i] from cond and the tokens
        before it.
        """
        return self.head(self.hidden(cond, tokens, cond_mask))

    def hidden(self, cond, tokens, cond_mask=None):
        """Like `forward`, up to the head: states (B, T, C), float32, normed."""
        x = torch.cat([self.embed(cond), self.tok_embeddings(tokens[:, :-1])], 1)  # (B, L-1, C)
        S, mask = x.shape[1], self.mask(cond_mask)
        mask = None if mask is None else mask[..., :S, :S]
        for layer in self.layers:
            if self.checkpoint_layers and torch.is_grad_enabled():
                x = checkpoint(layer, x, self.rope[:S], mask, use_reentrant=False)
            else:
                x = layer(x, self.rope[:S], mask)
        return self.norm(x[:, self.config.cond_len - 1 :].float())

    @torch.no_grad()
    def generate(
        self, cond, cond_mask=None, cfg_scale=1.0, cfg_interval=-1, temperature=1.0, top_k=0, top_p=1.0, noise=None
    ):
        """
        Samples tokens (N, T), int64, one image per row of cond, and returns them with the log-probabilities (N, T),
        nats, float32, that the distribution they were drawn from gave them.

        cfg_scale     above 1 guides every token (arXiv 2207.12598): uncond + (cond - uncond) * cfg_scale
        cfg_interval  k >= 0 guides only token 0 and the next k + 1, as LlamaGen counts; -1 guides all
        temperature   0 takes the likeliest token (log-probabilities are then those of temperature 1)
        top_k, top_p  keep the k likeliest, then the likeliest that together reach p; 0 and 1.0 keep all
        noise         (N, T) numbers in [0, 1), one per token, from `image_noise`; None draws fresh ones

        Memory: the cache holds 2 * layers * N * L * C numbers of `cache_dtype`, with guidance twice that.
        """
        config, N, device = self.config, len(cond), self.rope.device
        P, T = config.cond_len, config.num_tokens
        cond_mask = torch.ones(N, P, device=device) if cond_mask is None else cond_mask
        noise = (torch.rand(N, T) if noise is None else noise).to(device)
        if cfg_scale > 1:
            cond, cond_mask = self.with_null(cond, cond_mask)  # both halves are continued with the same tokens
        x, mask = self.embed(cond), self.mask(cond_mask)  # (N or 2N, P, C), (N or 2N, 1, L, L) or None
        cache = torch.zeros(
            config.n_layer, 2, len(x), config.n_head, P + T, config.dim // config.n_head,
            dtype=cache_dtype(device.type), device=device,
        )  # fmt: skip
        step = CompiledStep(self, mask, cache) if self.compile_steps else partial(self.step, mask, cache)
        place = torch.arange(P, device=device)  # the positions that come next: the condition, then token by token
        tokens, logprobs = [], []
        for i in range(T):
            x = step(x, place, P + i)  # (N or 2N, S, C)
            states = self.norm(x[:, -1].float())  # (N or 2N, C)
            guided = cfg_scale > 1 and (cfg_interval < 0 or i <= cfg_interval + 1)
            states = guide(states, cfg_scale) if guided else states[:N]  # (N, C)
            logp = policy_logprobs(self.head(states), temperature or 1.0)  # (N, V)
            if temperature == 0:
                token = logp.argmax(-1)
            else:
                logp = keep_likeliest(logp, top_k, top_p)
                token = sample_row(logp, noise[:, i])  # (N,)
            tokens.append(token)
            logprobs.append(logp.gather(-1, token[:, None])[:, 0])
            x = self.tok_embeddings(token)[:, None].repeat(len(x) // N, 1, 1)  # (N or 2N, 1, C)
            place = place[-1:] + 1
        return torch.stack(tokens, 1), torch.stack(logprobs, 1)

    def step(self, mask, cache, x, place, filled):
        """
        The blocks at the S positions `place` (S,): x (N, S, C) -> (N, S, C). Their keys and values go into the cache
        (layers, 2, N, H, L, D), of which the first `filled` positions are read: the others hold zeros, and without a
        mask attention would see them.
        """
        rows = None if mask is None else mask[:, :, place, :filled]
        for layer, layer_cache in zip(self.layers, cache[..., :filled, :], strict=True):
            x = layer(x, self.rope[place], rows, layer_cache, place)
        return x


def image_noise(images, num_tokens, *seed):
    """
    Uniform numbers in [0, 1), (n, T) float32, on the CPU. Row k depends on (*seed, images[k]) alone. So an image stays
    the same whatever the batch size, the device and the number of processes. (numpy reads the seed (s, t, 0) as (s, t):
    image 0 of a step shares its numbers with the choice of the step's prompts.)
    """
    rows = [np.random.default_rng([*seed, int(k)]).random(num_tokens, dtype=np.float32) for k in images]
    return torch.from_numpy(np.stack(rows))


def guide(states, cfg_scale):
    """
    Guidance (arXiv 2207.12598): uncond + (cond - uncond) * cfg_scale, of normed states (2N, ..., C), conditional half
    first, -> (N, ..., C). LlamaGen mixes logits. The head is linear, so mixing states gives the same and saves one of
    the two head products.
    """
    cond, uncond = states.chunk(2)
    return uncond + (cond - uncond) * cfg_scale


def policy_logprobs(logits, temperature=1.0):
    """The policy: log softmax(logits / temperature), nats, of guided logits (..., V)."""
    return F.log_softmax(logits / temperature, -1)


def sample_row(logp, u):
    """
    One draw per row from log-probabilities (B, V), with u (B,) in [0, 1) -> (B,), int64. Inverts the cumulative
    distribution, so one random number is enough; torch.multinomial draws V.
    """
    mass = logp.exp().cumsum(-1)  # (B, V)
    # right=True: a draw of exactly 0 must not fall on a token of probability 0
    found = torch.searchsorted(mass, u[:, None] * mass[:, -1:], right=True)
    return found[:, 0].clamp(max=logp.shape[-1] - 1)


def keep_likeliest(logp, top_k=0, top_p=1.0):
    """
    Log-probabilities (B, V), nats, with all but the top_k, then all but the nucleus of mass top_p (arXiv 1904.09751)
    at -inf, renormalised.
    """
    if top_k > 0:
        kth = logp.topk(min(top_k, logp.shape[-1]), -1).values[:, -1:]
        logp = F.log_softmax(logp.masked_fill(logp < kth, -torch.inf), -1)
    if top_p < 1:
        ordered, order = logp.sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()  # mass of what is likelier; the likeliest always stays
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before > top_p)
        logp = F.log_softmax(logp.masked_fill(drop, -torch.inf), -1)
    return logp


# ---------------------------------------------------------------------------------------------------------------
# Speed: --compile, and precision


class CompiledStep:
    """
    `Transformer.step` for --compile, with the same arguments but for mask and cache: one compiled block for all layers,
    matrices in autocast's precision, and on a GPU a graph of all blocks, since launching their kernels one by one takes
    longer than computing them.
    """

    def __init__(self, model, mask, cache):
        total, kind = len(model.rope), cache.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        causal = torch.ones(1, 1, total, total, dtype=torch.bool, device=cache.device).tril()
        self.layers = [rounded(layer, dtype) for layer in model.layers]
        self.rope = model.rope
        self.cache = cache
        self.mask = causal if mask is None else mask
        # A graph reads its inputs from where they were when it was recorded.
        self.x = torch.empty(cache.shape[2], 1, model.config.dim, device=cache.device)
        self.place = torch.zeros(1, dtype=torch.long, device=cache.device)
        self.graphs = {}  # number of cache positions that are read: (graph, its output)

    def __call__(self, x, place, filled):
        # Every length is compiled once, so there are only four. The mask hides positions that are not filled yet.
        quarters = [math.ceil(len(self.rope) * quarter / 4) for quarter in (1, 2, 3, 4)]
        length = min(end for end in quarters if end >= filled)
        if len(place) > 1:  # a caption's positions come once, so compiling them would not pay
            return self.blocks(Block.forward, x, place, length)
        if length in self.graphs:
            self.x.copy_(x)
            self.place.copy_(place)
            graph, output = self.graphs[length]
            graph.replay()
            return output
        output = self.blocks(compiled_block(), x, place, length)  # compiles
        if x.device.type == "cuda":
            with torch.cuda.device(x.device):  # recording takes the current GPU's stream; --device may name another
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):  # which computes nothing
                    recorded = self.blocks(compiled_block(), self.x, self.place, length)
            self.graphs[length] = graph, recorded
        return output

    def blocks(self, block, x, place, length):
        rope = self.rope.index_select(0, place)
        rows = self.mask.index_select(2, place)[..., :length]
        for layer, layer_cache in zip(self.layers, self.cache[..., :length, :], strict=True):
            x = block(layer, x, rope, rows, layer_cache, place)
        return x


@cache
def compiled_block():
    """A block, compiled once for all layers of one shape. Needs a C++ compiler, on GPUs also Triton."""
    torch._dynamo.config.recompile_limit = 64  # four cache lengths for each number of images; the default is 8
    return torch.compile(Block.forward, dynamic=False)


def cache_dtype(kind):
    """
    The cache's dtype on a kind of device ("cpu", "cuda"): that of autocast, except on a CPU, where attention for a
    single query takes twice as long in bfloat16 as in float32.
    """
    half = kind != "cpu" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if half else torch.float32


def rounded(layer, dtype):
    """A block with its matrices in `dtype`, as autocast would cast them at every use: a copy, if that changes them."""
    if dtype == torch.float32:
        return layer
    layer = copy.deepcopy(layer)
    for module in layer.modules():
        if isinstance(module, Linear):
            module.to(dtype)
    return layer


# ---------------------------------------------------------------------------------------------------------------
# LoRA (arXiv 2106.09685), --lora-rank: for those who have one GPU of 24 GB


def adapters(model, rank, generator):
    """
    Freezes the model and adds a learnable change of rank `rank`, 0 at first, to each matrix of its blocks.
    """
    model.requires_grad_(False)
    for module in model.layers.modules():
        if isinstance(module, Linear):
            like = dict(dtype=module.weight.dtype, device=module.weight.device)
            down = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
            module.down = nn.Parameter(down.to(**like))
            module.up = nn.Parameter(torch.zeros(module.out_features, rank, **like))


def merged(weights):
    """A state_dict with its adapters added to their matrices."""
    plain = {name: value for name, value in weights.items() if not name.endswith((".up", ".down"))}
    for name in [name.removesuffix("up") for name in weights if name.endswith(".up")]:
        plain[f"{name}weight"] = plain[f"{name}weight"] + weights[f"{name}up"] @ weights[f"{name}down"]
    return plain
