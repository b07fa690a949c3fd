"""Passes what each device has round the ring of a mesh axis, for attention over tokens that are split along it.

    devices   0     1     2            each has its tokens' queries, and a part of the keys
    hop 0    q0·k0 q1·k1 q2·k2         attends, and passes queries on with the softmax so far
    hop 1    q2·k0 q0·k1 q1·k2
    hop 2    q1·k0 q2·k1 q0·k2         one more hop, and every query is home, with its softmax over all keys

In Ring Attention (Liu et al. 2023, https://arxiv.org/abs/2310.01889) keys and values travel and queries stay; where
keys are in a cache that was split before, it can be queries that travel (Yang et al. 2024,
https://arxiv.org/abs/2411.01783). `pass_round` is for both. No device ever has all tokens, nor all keys.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax import lax

Travelling = TypeVar("Travelling")
Staying = TypeVar("Staying")


TOKENS_A_DEVICE = 32
"""The least that a device has of a step's tokens. A choice, not a measurement: with so few, reading the weights, which
is not divided, takes longer than arithmetic on any chip that `pallas_kernels.chips` knows."""


def why_no_ring(tokens: int, devices: int) -> str | None:
    """Why a step of so many tokens is not split over so many devices along `sequence`; None if it is."""
    if tokens % devices:
        return f"{tokens} tokens cannot be divided over sequence = {devices}"
    if tokens < devices * TOKENS_A_DEVICE:
        return f"fewer than {TOKENS_A_DEVICE} tokens a device"
    return None


def pass_round(
    visit: Callable[[Travelling, Staying], tuple[Travelling, Staying]],
    travelling: Travelling,
    staying: Staying,
    *,
    axis: str,
    size: int,
) -> tuple[Travelling, Staying]:
    """Let what each device has visit all devices of the ring, its own first; afterwards it is back.

    To be called in `jax.shard_map`, where `axis` is manual.

    Args:
        visit: (what has come, what stays here) → both, changed. Types and shapes do not change.
        travelling, staying: pytrees of this device's arrays.
        axis: name of the mesh axis.
        size: number of devices along it.
    """
    onward = [(device, (device + 1) % size) for device in range(size)]

    def hop(_: jax.Array, both: tuple[Travelling, Staying]) -> tuple[Travelling, Staying]:
        visitor, host = visit(*both)
        return jax.tree.map(lambda x: lax.ppermute(x, axis, onward), visitor), host

    result: tuple[Travelling, Staying] = lax.fori_loop(0, size, hop, (travelling, staying))
    return result


__all__ = ["TOKENS_A_DEVICE", "pass_round", "why_no_ring"]
