"""How layers are stacked: scans, loops, shared layers, rematerialisation, inner jits."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from zoo.plain import VOCAB, WIDTH, Init, Params, head_weights, heads_of, merge, plain_attend, rms, toy_lm
from zoo.registry import Built, derivable


def block(p: Params, x: jax.Array) -> jax.Array:
    x = x + plain_attend(p, rms(x, p["norm1"]))
    return x + jax.nn.silu(rms(x, p["norm2"]) @ p["up"]) @ p["down"]


def block_weights(init: Init) -> Params:
    return head_weights(init) | {
        "norm1": init.near(1.0, WIDTH),
        "norm2": init.near(1.0, WIDTH),
        "up": init(WIDTH, 50),
        "down": init(50, WIDTH),
    }


def windowed_block(p: Params, x: jax.Array, local: jax.Array) -> jax.Array:
    """A block that sees 3 tokens where `local` is true, all of them where it is not."""
    q, k, v = heads_of(p, rms(x, p["norm1"]))
    back = jnp.arange(x.shape[1])[:, None] - jnp.arange(x.shape[1])
    mask = (back >= 0) & jnp.where(local, back < 3, True)
    s = jnp.where(mask, jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.3, -1e30)
    x = x + merge(p, jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v))
    return x + jax.nn.silu(rms(x, p["norm2"]) @ p["up"]) @ p["down"]


def stacked_lm(seed: int, run, layers: int = 3, extra=None) -> Built:
    """A model whose layers ``params["blocks"]`` are stacked on a leading axis; ``run(params, x)`` goes through them."""
    init = Init(seed)
    blocks = [block_weights(init) for _ in range(layers)]
    params = {
        "embed": init(VOCAB, WIDTH, fan_in=1),
        "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks),
        "norm": init.near(1.0, WIDTH),
        "head": init(WIDTH, VOCAB),
    } | (extra or {})

    def forward(params, tokens):
        x = run(params, params["embed"][tokens])
        return rms(x, params["norm"]) @ params["head"]

    return Built(forward, params, VOCAB)


@derivable("lax.scan over stacked parameters")
def scan_layers(seed: int) -> Built:
    return stacked_lm(seed, lambda params, x: lax.scan(lambda x, p: (block(p, x), None), x, params["blocks"])[0])


@derivable("lax.scan with jax.checkpoint inside and unroll=2")
def scan_checkpoint_unrolled(seed: int) -> Built:
    @jax.checkpoint
    def body(x, p):
        return block(p, x), None

    return stacked_lm(seed, lambda params, x: lax.scan(body, x, params["blocks"], unroll=2)[0])


@derivable("scan with flags per layer, window by jnp.where")
def scan_flags_where(seed: int) -> Built:
    local = jnp.array([True, False, True])

    def run(params, x):
        return lax.scan(lambda x, layer: (windowed_block(layer[0], x, layer[1]), None), x, (params["blocks"], local))[0]

    return stacked_lm(seed, run)


@derivable("scan with flags per layer, window by lax.cond")
def scan_flags_cond(seed: int) -> Built:
    local = jnp.array([False, True, False, True])

    def run(params, x):
        def body(x, layer):
            p, flag = layer
            x = lax.cond(flag, lambda: windowed_block(p, x, True), lambda: windowed_block(p, x, False))
            return x, None

        return lax.scan(body, x, (params["blocks"], local))[0]

    return stacked_lm(seed, run, layers=4)


@derivable("scan with a kind per layer, window by lax.switch")
def scan_kinds_switch(seed: int) -> Built:
    def run(params, x):
        def body(x, layer):
            p, kind = layer
            kinds = [partial(windowed_block, local=True), partial(windowed_block, local=False), block]
            return lax.switch(kind, kinds, p, x), None

        return lax.scan(body, x, (params["blocks"], jnp.array([2, 0, 1])))[0]

    return stacked_lm(seed, run)


@derivable("scan with a window width per layer, a leaf of the model")
def scan_window_widths(seed: int) -> Built:
    def run(params, x):
        back = jnp.arange(x.shape[1])[:, None] - jnp.arange(x.shape[1])

        def body(x, layer):
            p, width = layer
            q, k, v = heads_of(p, rms(x, p["norm1"]))
            s = jnp.where((back >= 0) & (back < width), jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.3, -1e30)
            x = x + merge(p, jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(s), v))
            return x + jax.nn.silu(rms(x, p["norm2"]) @ p["up"]) @ p["down"], None

        return lax.scan(body, x, (params["blocks"], params["widths"]))[0]

    return stacked_lm(seed, run, extra={"widths": jnp.array([3, 2048, 5], jnp.int32)})


@derivable("scan over the layer index alone, parameters taken by it")
def scan_layer_index(seed: int) -> Built:
    def run(params, x):
        def body(x, i):
            p = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, i, keepdims=False), params["blocks"])
            return windowed_block(p, x, i % 2 == 1), None

        return lax.scan(body, x, jnp.arange(3))[0]

    return stacked_lm(seed, run)


@derivable("lax.fori_loop over the layers")
def fori_layers(seed: int) -> Built:
    def run(params, x):
        return lax.fori_loop(0, 3, lambda i, x: block(jax.tree.map(lambda leaf: leaf[i], params["blocks"]), x), x)

    return stacked_lm(seed, run)


@derivable("scans in a scan: layers in groups")
def scan_nested(seed: int) -> Built:
    def run(params, x):
        groups = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), params["blocks"])
        inner = lambda x, p: (block(p, x), None)  # noqa: E731
        return lax.scan(lambda x, group: lax.scan(inner, x, group), x, groups)[0]

    return stacked_lm(seed, run, layers=4)


@derivable("scan of pairs of layers, one local and one global")
def scan_pairs(seed: int) -> Built:
    def run(params, x):
        pairs = jax.tree.map(lambda leaf: leaf.reshape(2, 2, *leaf.shape[1:]), params["blocks"])

        def body(x, pair):
            for i, local in enumerate((True, False)):
                x = windowed_block(jax.tree.map(lambda leaf, i=i: leaf[i], pair), x, local)
            return x, None

        return lax.scan(body, x, pairs)[0]

    return stacked_lm(seed, run, layers=4)


@derivable("scan that also returns every layer's output, which the head uses")
def scan_with_outputs(seed: int) -> Built:
    def run(params, x):
        def body(x, p):
            x = block(p, x)
            return x, x

        last, every = lax.scan(body, x, params["blocks"])
        return last + jnp.einsum("l,lbtc->btc", jnp.array([0.5, -0.3, 0.2]), every)

    return stacked_lm(seed, run)


@derivable("masks, rotary tables and positions made outside of the scan and carried in")
def scan_carried_tables(seed: int) -> Built:
    def run(params, x):
        t = x.shape[1]
        angle = jnp.outer(jnp.arange(t), 10.0 ** -jnp.arange(5))[:, None]
        tables = jnp.tril(jnp.ones((t, t), bool)), jnp.sin(angle), jnp.cos(angle)

        def rotate(x, sin, cos):
            a, b = jnp.split(x, 2, -1)
            return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

        def body(carry, p):
            x, mask, sin, cos = carry
            q, k, v = heads_of(p, rms(x, p["norm1"]))
            s = jnp.einsum("bqhd,bkhd->bhqk", rotate(q, sin, cos), rotate(k, sin, cos)) * 0.3
            w = jax.nn.softmax(jnp.where(mask, s, -jnp.inf))
            return (x + merge(p, jnp.einsum("bhqk,bkhd->bqhd", w, v)), mask, sin, cos), None

        return lax.scan(body, (x, *tables), params["blocks"])[0][0]

    return stacked_lm(seed, run)


@derivable("the same layer applied three times (ALBERT)", "a cache for each use")
def shared_layer(seed: int) -> Built:
    def run(params, x):
        p = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
        for _ in range(3):
            x = block(p, x)
        return x

    return stacked_lm(seed, run, layers=1)


@derivable("the same layer applied by fori_loop")
def shared_layer_fori(seed: int) -> Built:
    def run(params, x):
        p = jax.tree.map(lambda leaf: leaf[0], params["blocks"])
        return lax.fori_loop(0, 3, lambda _, x: block(p, x), x)

    return stacked_lm(seed, run, layers=1)


@derivable("keys and values of one layer read by the next (cross-layer sharing)")
def shared_keys(seed: int) -> Built:
    def run(params, x):
        first, second, third = (jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(3))
        x = block(first, x)
        _, k, v = heads_of(second, rms(x, second["norm1"]))
        for p in (second, third):
            q, _, _ = heads_of(p, rms(x, p["norm1"]))
            x = x + merge(p, jax.nn.dot_product_attention(q, k, v, is_causal=True))
        return x

    return stacked_lm(seed, run)


@derivable("jax.checkpoint with a policy", "inner jits", "named scopes")
def remat_and_inner_jits(seed: int) -> Built:
    inner_attend = jax.jit(plain_attend)

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    def attend(p, h):
        with jax.named_scope("attention"):
            return inner_attend(p, h)

    built = toy_lm(seed, attend)
    return built._replace(forward=jax.jit(built.forward))


@derivable("attention in a function with a custom derivative")
def custom_derivatives(seed: int) -> Built:
    @jax.custom_vjp
    def attend(p, h):
        return plain_attend(p, h)

    attend.defvjp(lambda p, h: (plain_attend(p, h), None), lambda _, g: (None, g))

    @jax.custom_jvp
    def halve(x):
        return x / 2

    halve.defjvp(lambda primals, tangents: (halve(*primals), tangents[0] / 2))
    return toy_lm(seed, attend, mix=lambda params, x: x + halve(x))


@derivable("layers skipped to and from (U-net), values mixed with the first layer's")
def skips_over_depth(seed: int) -> Built:
    def run(params, x):
        start, kept, first_v = x, [], None
        for i in range(4):
            p = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
            x = 0.8 * x + 0.2 * start + (kept.pop() if i >= 2 else 0.0)
            q, k, v = heads_of(p, rms(x, p["norm1"]))
            first_v = v if first_v is None else first_v
            x = x + merge(p, jax.nn.dot_product_attention(q, k, 0.6 * v + 0.4 * first_v, is_causal=True))
            if i < 2:
                kept.append(x)
        return x

    return stacked_lm(seed, run, layers=4)
