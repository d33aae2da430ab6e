"""State dicts as the authors' codes write them, and their forward passes in plain torch, written from the mathematics.

Letters: B batch, T time, M memory, K = M + T keys, D width, H heads, C = D/H. All tensors are batch first here.
"""

from __future__ import annotations

import collections
import itertools
import math

import torch
from torch.nn import functional


def random(*shape, scale=0.3, generator):
    return scale * torch.randn(*shape, generator=generator)


def normed(state, name, *shape, generator, scale=0.3, raw="", weight="weight"):
    """A weight in two parts: a gain per row, in the axes of the weight, and a direction."""
    state[f"{name}{weight}_g"] = (scale + 0.1 * torch.rand(shape[0], generator=generator)).view(
        -1, *(1,) * (len(shape) - 1)
    )
    state[f"{name}{weight}_v{raw}"] = torch.randn(*shape, generator=generator)


# Vocabularies


def by_count(*texts):
    """Words as the loader of Transformer-XL numbers them: <eos> first, then by how often they occur."""
    counter = collections.Counter()
    for text in texts:
        for line in text.splitlines():
            counter.update([*line.split(), "<eos>"])
    return ["<eos>", *(word for word, _ in counter.most_common() if word != "<eos>")]


def by_appearance(*texts):
    """Words as the loader of AWD-LSTM and TrellisNet numbers them."""
    words = {}
    for text in texts:
        for line in text.splitlines():
            for word in [*line.split(), "<eos>"]:
                words.setdefault(word, len(words))
    return list(words)


# Transformers


def softmax_state(state, *, width, embed, words, cutoffs, division, generator, bare):
    """Embedding and head; ``bare`` projections are parameters, the others are linear modules."""
    bounds = [0, *cutoffs, words]
    sizes = [high - low for low, high in itertools.pairwise(bounds)]
    widths = [embed // division**i for i in range(len(sizes))]
    ending = "" if bare else ".weight"
    if division == 1:
        state["word_emb.emb_layers.0.weight"] = random(words, embed, generator=generator)
        if embed != width:
            state[f"word_emb.emb_projs.0{ending}"] = random(width, embed, generator=generator)
    else:
        for i, (size, d) in enumerate(zip(sizes, widths, strict=True)):
            state[f"word_emb.emb_layers.{i}.weight"] = random(size, d, generator=generator)
            state[f"word_emb.emb_projs.{i}{ending}"] = random(width, d, generator=generator)
    if cutoffs:
        state["crit.cluster_weight"] = random(len(cutoffs), embed, generator=generator)
        state["crit.cluster_bias"] = random(len(cutoffs), generator=generator)
    for i, size in enumerate([words] if division == 1 else sizes):
        state[f"crit.out_layers.{i}.weight"] = state[f"word_emb.emb_layers.{i}.weight"]
        state[f"crit.out_layers.{i}.bias"] = random(size, generator=generator)
    if division > 1 or embed != width:
        state[f"crit.out_projs.0{ending}"] = random(width, widths[0], generator=generator)
        for i in range(1, len(sizes)):
            origin = 0 if division == 1 else i
            state[f"crit.out_projs.{i}{ending}"] = state[f"word_emb.emb_projs.{origin}{ending}"]


def block_state(state, attention, feed, *, width, heads, inner, normal, generator, conv, conv_feed):
    one, two = ((1,) if conv else ()), ((1,) if conv_feed else ())
    table = [
        (f"{attention}qkv_net.", (3 * width, width, *one), 0.2, False),
        (f"{attention}r_net.", (width, width, *one), 0.5, False),
        (f"{attention}o_net.", (width, width, *one), 0.2, True),
        (f"{feed}ff1_net.", (inner, width, *two), 0.5, True),
        (f"{feed}ff2_net.", (width, inner, *two), 0.2, True),
    ]
    for name, shape, scale, bias in table:
        if normal:
            normed(state, name, *shape, generator=generator, scale=scale)
        else:
            state[f"{name}weight"] = random(*shape, scale=scale / math.sqrt(shape[1]), generator=generator)
        if bias:
            state[f"{name}bias"] = random(shape[0], generator=generator)
    for name in ("r_w_bias", "r_r_bias"):
        state[f"{attention}{name}"] = random(heads, width // heads, generator=generator)


def deq_transformer(
    *, words, width=8, heads=2, inner=12, cutoffs=(), division=1, embed=None, year=2021, normal=True, seed=0
):
    """The state dict of locuslab/deq; of 2023 that of TorchDEQ's deq-seq, which has the layers of 2021."""
    generator, state = torch.Generator().manual_seed(seed), collections.OrderedDict()
    softmax = {"words": words, "cutoffs": cutoffs, "division": division, "generator": generator}
    softmax_state(state, width=width, embed=embed or width, bare=year == 2019, **softmax)
    state["inject_conv.weight"] = random(3 * width, width, 1, scale=2.0, generator=generator)
    state["inject_conv.bias"] = random(3 * width, generator=generator)
    state["pos_emb.inv_freq"] = 10000 ** (-torch.arange(0, width, 2) / width)
    sizes = {"width": width, "heads": heads, "inner": inner, "normal": normal, "generator": generator}
    block_state(state, "func.dec_attn.", "func.pos_ff.", conv=True, conv_feed=year < 2021, **sizes)
    if year < 2021:  # the block is there three times, of which one copy has the weights of the beginning
        block = {name: value for name, value in state.items() if name.startswith("func.")}
        for name, value in block.items():
            state[f"func_copy.{name[5:].replace('weight_v', 'weight')}"] = torch.rand_like(value)
            state[f"deq.{name}"] = value
            state[f"{'deqback.' if year == 2019 else 'deq.Backward.'}{name}"] = value
    return state


def deq_lm(*, words, blocks=3, width=8, heads=2, inner=12, cutoffs=(), division=2, seed=0):
    """The state dict of TorchDEQ's deq-lm."""
    generator, state = torch.Generator().manual_seed(seed), collections.OrderedDict()
    softmax = {"words": words, "cutoffs": cutoffs, "division": division, "generator": generator}
    softmax_state(state, width=width, embed=width, bare=False, **softmax)
    state["pos_emb.inv_freq"] = 10000 ** (-torch.arange(0, width, 2) / width)
    state["injection.weight"] = random(3 * width, width, scale=0.5, generator=generator)
    state["injection.bias"] = random(3 * width, generator=generator)
    sizes = {"width": width, "heads": heads, "inner": inner, "normal": True, "generator": generator}
    for i in range(blocks):
        block_state(state, f"func.dec_attn.{i}.", f"func.pos_ff.{i}.", conv=False, conv_feed=False, **sizes)
        for name in (f"func.dec_attn.{i}.ln1.", f"func.dec_attn.{i}.ln2.", f"func.pos_ff.{i}.ln."):
            state[f"{name}weight"] = 1 + random(width, generator=generator)
            state[f"{name}bias"] = random(width, generator=generator)
    return state


def effective(w, name, weight="weight"):
    """W = g v/‖v‖ per row, or W itself; kernels of width 1 are matrices."""
    direction = next((w[key] for key in (f"{name}{weight}_v", f"{name}{weight}_v_raw") if key in w), None)
    if direction is None:
        found = w[f"{name}{weight}_raw"] if f"{name}{weight}_raw" in w else w[f"{name}{weight}"]
    else:
        gain = w[f"{name}{weight}_g"]
        found = direction * (gain / direction.flatten(1).norm(dim=1).view_as(gain))
    return found[..., 0] if found.shape[2:] == (1,) else found


def norm(x, w=None, name=None):
    gain, bias = (None, None) if w is None else (w[f"{name}weight"], w[f"{name}bias"])
    return functional.layer_norm(x, x.shape[-1:], gain, bias)


def attention(w, name, z, past, injection, *, kind, heads, headwise):
    """The attention output, before the residual; ``headwise`` are rows with q, k and v of each head side by side."""
    batch, time, width = z.shape
    size, span = width // heads, past.shape[1]
    c = torch.cat([past, z], dim=1)
    if kind != "post":
        c = norm(c, w, f"{name}ln1.") if headwise else norm(c)
    rows = c @ effective(w, f"{name}qkv_net.").T + injection
    rows = (
        rows.view(batch, span + time, heads, 3, size)
        if headwise
        else rows.view(batch, span + time, 3, heads, size).transpose(2, 3)
    )
    q, k, v = rows.unbind(3)
    q = q[:, span:]
    distance = span + torch.arange(time)[:, None] - torch.arange(span + time)
    angles = distance.clamp(min=0)[..., None] * 10000 ** (-torch.arange(0, width, 2, dtype=z.dtype) / width)
    position = torch.cat([angles.sin(), angles.cos()], dim=-1) @ effective(w, f"{name}r_net.").T
    scores = torch.einsum("bihc,bjhc->bhij", q + w[f"{name}r_w_bias"], k)
    scores = scores + torch.einsum("bihc,ijhc->bhij", q + w[f"{name}r_r_bias"], position.unflatten(-1, (heads, size)))
    scores = (scores / math.sqrt(size)).masked_fill(distance < 0, -math.inf)
    o = torch.einsum("bhij,bjhc->bihc", scores.softmax(-1), v).flatten(2)
    o = norm(o, w, f"{name}ln2.") if headwise else o
    return o @ effective(w, f"{name}o_net.").T + w[f"{name}o_net.bias"]


def feed_forward(w, name, x):
    inner = (x @ effective(w, f"{name}ff1_net.").T + w[f"{name}ff1_net.bias"]).relu()
    return inner @ effective(w, f"{name}ff2_net.").T + w[f"{name}ff2_net.bias"]


def transformer_f(w, z, past, injection, *, kind, heads):
    o = attention(w, "func.dec_attn.", z, past, injection, kind=kind, heads=heads, headwise=False)
    if kind == "post":
        a = norm(z + o)
        return norm(a + feed_forward(w, "func.pos_ff.", a))
    if kind == "pre-normalised":  # version 2.0: the residual is taken from the normalised state
        b = norm(z + o)
        return b + feed_forward(w, "func.pos_ff.", b)
    a = z + o
    return a + feed_forward(w, "func.pos_ff.", norm(a))


def chain_f(w, z, past, injection, *, heads, blocks):
    """Every block reads the same past and the same injection."""
    for i in range(blocks):
        name, feed = f"func.dec_attn.{i}.", f"func.pos_ff.{i}."
        z = z + attention(w, name, z, past, injection, kind="pre", heads=heads, headwise=True)
        z = z + feed_forward(w, feed, norm(z, w, f"{feed}ln."))
    return z


def projected(w, below, index):
    return next((w[name] for name in (f"{below}.{index}.weight", f"{below}.{index}") if name in w), None)


def embedded(w, tokens, *, width, cutoffs, division):
    """Word vectors times √D, word by word."""
    flat = []
    for token in tokens.flatten().tolist():
        i = 0 if division == 1 else sum(token >= cutoff for cutoff in cutoffs)
        first = 0 if i == 0 else cutoffs[i - 1]
        vector, projection = w[f"word_emb.emb_layers.{i}.weight"][token - first], projected(w, "word_emb.emb_projs", i)
        flat.append(vector if projection is None else projection @ vector)
    return torch.stack(flat).view(*tokens.shape, width) * math.sqrt(width)


def log_probabilities(w, h, *, words, cutoffs, division):
    """Adaptive softmax: cluster i hangs on the i-th column of the head from the end."""

    def logits(low, high, i, more=None):
        single = division == 1
        weight = w["crit.out_layers.0.weight"][low:high] if single else w[f"crit.out_layers.{i}.weight"]
        bias = w["crit.out_layers.0.bias"][low:high] if single else w[f"crit.out_layers.{i}.bias"]
        if more is not None:
            weight, bias = torch.cat([weight, more[0]]), torch.cat([bias, more[1]])
        projection = projected(w, "crit.out_projs", i)
        return (h if projection is None else h @ projection) @ weight.T + bias

    if not cutoffs:
        return logits(0, words, 0).log_softmax(-1)
    bounds = [0, *cutoffs, words]
    head = logits(0, bounds[1], 0, (w["crit.cluster_weight"], w["crit.cluster_bias"])).log_softmax(-1)
    parts = [head[..., : bounds[1]]]
    for i in range(1, len(bounds) - 1):
        parts.append(head[..., [-i]] + logits(bounds[i], bounds[i + 1], i).log_softmax(-1))
    return torch.cat(parts, dim=-1)


def iterated(f, z, applications):
    """So many applications of f; or, of None, as many as f needs to change nothing."""
    for _ in range(2_000 if applications is None else applications):
        before, z = z, f(z)
        if applications is None and (z - before).abs().max() < 1e-14:
            return z
    assert applications is not None, "this f is no contraction"
    return z


def transformer_segments(w, segments, f, *, memory, width, applications, softmax):
    """Log-probabilities of each segment: z from zero, the last ``memory`` states and injections for the next."""
    name = "injection." if "injection.weight" in w else "inject_conv."
    batch = len(segments[0])
    past, injected = (torch.zeros(batch, 0, size, dtype=torch.float64) for size in (width, 3 * width))
    found = []
    for tokens in segments:
        x = embedded(w, tokens, width=width, cutoffs=softmax["cutoffs"], division=softmax["division"])
        every = torch.cat([injected, x @ effective(w, name).T + w[f"{name}bias"]], dim=1)
        z = iterated(lambda z: f(z, past, every), torch.zeros_like(x), applications)  # noqa: B023
        found.append(log_probabilities(w, z, **softmax))
        past, injected = torch.cat([past, z], dim=1)[:, -memory:], every[:, -memory:]
    return found


# TrellisNets


def deq_trellisnet(*, words, width=6, hidden=4, outputs=6, experts=0, dropping=False, normal=True, seed=0):
    """The state dict of locuslab/deq; with DropConnect the network is wrapped, and what is dropped is called raw."""
    generator, state = torch.Generator().manual_seed(seed), collections.OrderedDict()
    below, channels, raw = (
        "trellisnet.module." if dropping else "trellisnet.",
        hidden + outputs,
        "_raw" if dropping else "",
    )
    for name, inputs in ((f"{below}func.full_conv.", channels), (f"{below}inject_conv.", width)):
        if normal:
            normed(state, name, 4 * channels, inputs, 2, generator=generator, scale=0.8, raw=raw)
        else:
            state[f"{name}weight{raw}"] = random(4 * channels, inputs, 2, generator=generator)
        bias = random(4 * channels, generator=generator)
        state[f"{name}bias"] = (1024 * bias).round() / 1024  # so that the sum of the two is exact in float32
    for name in [name for name in state if ".func." in name]:
        for copy in ("func_copy", "deq.func", "deqback.func"):
            state[name.replace("func", copy, 1)] = state[name] if copy != "func_copy" else torch.rand_like(state[name])
    table_state(state, words=words, width=width, outputs=outputs, experts=experts, generator=generator)
    return state


def trellisnet(*, words, width=6, hidden=4, outputs=6, experts=0, normal=True, seed=0):
    """The state dict of locuslab/trellisnet, which always calls raw what may be dropped."""
    generator, state = torch.Generator().manual_seed(seed), collections.OrderedDict()
    channels, module = hidden + outputs, {}
    for weight, inputs in (("weight1", width), ("weight2", channels)):
        if normal:
            normed(module, "", 4 * channels, inputs, 2, generator=generator, scale=0.8, raw="_raw", weight=weight)
        else:
            module[f"{weight}_raw"] = random(4 * channels, inputs, 2, generator=generator)
    module["bias2"] = random(4 * channels, generator=generator)
    for below in ("network.0.module.full_conv.", "network.0.module.net.0."):
        state.update({f"{below}{name}": value for name, value in module.items()})
    table_state(state, words=words, width=width, outputs=outputs, experts=experts, generator=generator)
    for name in [name for name in state if name.startswith("mixsoft.")]:
        state[name.replace("mixsoft", "network.1")] = state[name]
    return state


def table_state(state, *, words, width, outputs, experts, generator):
    state["encoder.weight"] = random(words, width, scale=1.0, generator=generator)
    state["decoder.weight"] = state["encoder.weight"]
    state["decoder.bias"] = random(words, generator=generator)
    if experts:
        state["mixsoft.prior.weight"] = random(experts, outputs, scale=1.0, generator=generator)
        state["mixsoft.prior.bias"] = random(experts, generator=generator)
        state["mixsoft.latent.weight"] = random(experts * width, outputs, scale=1.0, generator=generator)
        state["mixsoft.latent.bias"] = random(experts * width, generator=generator)
        state["mixsoft.decoder.weight"], state["mixsoft.decoder.bias"] = state["decoder.weight"], state["decoder.bias"]


def split_softmax(*, width, cutoffs, seed=5):
    """The state dict of the loss of TrellisNet on WikiText-103."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "tail_vectors": random(len(cutoffs), width, generator=generator),
        "tail_bias": random(len(cutoffs), generator=generator),
    }


def trellis_segments(w, segments, *, below, hidden, outputs, applications, cutoffs=(), experts=0):
    """Log-probabilities of each segment; h and c of the last time are carried, and no input is."""
    own = f"{below}bias2" in w  # TrellisNet, not DEQ-TrellisNet
    state = effective(w, below, "weight2") if own else effective(w, f"{below}func.full_conv.")
    inject = effective(w, below, "weight1") if own else effective(w, f"{below}inject_conv.")
    bias = w[f"{below}bias2"] if own else w[f"{below}func.full_conv.bias"] + w[f"{below}inject_conv.bias"]
    channels, batch, found = hidden + outputs, len(segments[0]), []
    last_h, last_c = (torch.zeros(batch, 1, channels, dtype=torch.float64) for _ in range(2))
    for tokens in segments:
        x = w["encoder.weight"][tokens]
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        u = before @ inject[..., 0].T + x @ inject[..., 1].T + bias
        h, c = (torch.zeros(batch, tokens.shape[1], channels, dtype=torch.float64) for _ in range(2))
        for _ in range(applications):
            left_h, left_c = (torch.cat([last, now[:, :-1]], dim=1) for last, now in ((last_h, h), (last_c, c)))
            i, o, g, f = (left_h @ state[..., 0].T + h @ state[..., 1].T + u).chunk(4, dim=-1)
            c = f.sigmoid() * left_c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        last_h, last_c = h[:, -1:], c[:, -1:]
        found.append(_read(w, h[..., hidden:], cutoffs=cutoffs, experts=experts))
    return found


def _read(w, y, *, cutoffs, experts):
    table, bias = w["encoder.weight"], w["decoder.bias"]
    if experts:
        prior = (y @ w["mixsoft.prior.weight"].T + w["mixsoft.prior.bias"]).log_softmax(-1)
        latent = (y @ w["mixsoft.latent.weight"].T + w["mixsoft.latent.bias"]).tanh().unflatten(-1, (experts, -1))
        return (prior[..., None] + (latent @ table.T + bias).log_softmax(-1)).logsumexp(-2)
    if not cutoffs:
        return (y @ table.T + bias).log_softmax(-1)
    bounds = [0, *cutoffs, len(table)]
    head = (
        y @ torch.cat([table[: bounds[1]], w["tail_vectors"]]).T + torch.cat([bias[: bounds[1]], w["tail_bias"]])
    ).log_softmax(-1)
    parts = [head[..., : bounds[1]]]
    for i in range(1, len(bounds) - 1):
        low, high = bounds[i], bounds[i + 1]
        parts.append(head[..., [-i]] + (y @ table[low:high].T + bias[low:high]).log_softmax(-1))
    return torch.cat(parts, dim=-1)
