"""Cluster centres of points, for the centres of splats.

May be changed here: how points are clustered.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gsa_jax.errors import InputError

_LLOYD_STEPS = 30


def kmeans(
    key: jax.Array, points: Float[Array, "H N D"], count: int
) -> tuple[Float[Array, "H {count} D"], Float[Array, "H"]]:
    """Cluster centres of each head's points, by Lloyd's algorithm from a k-means++ start.

    The start is Arthur and Vassilvitskii's (SODA 2007): each centre is a point drawn in proportion to its squared
    distance from those before it. A cluster that loses all of its points moves to one of the points farthest from
    their centres. The same key gives the same bits.

    Returns:
        The centres, and the mean squared distance of a point from the nearest one, float32.

    Raises:
        InputError: there are fewer points than centres.
    """
    if points.shape[1] < count:
        raise InputError(f"{points.shape[1]} points cannot make {count} clusters; give more text or fewer splats")
    return _kmeans(jax.random.split(key, points.shape[0]), points.astype(jnp.float32), count)


@functools.partial(jax.jit, static_argnums=2)
def _kmeans(keys: jax.Array, points: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    # One head after another: all of them at once would hold H N S distances.
    return jax.lax.map(lambda head: _kmeans_head(head[0], head[1], count), (keys, points))


def _kmeans_head(key: jax.Array, points: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    mean = jnp.mean(points, axis=0)
    points = points - mean  # squared distances, computed from squared norms, would cancel otherwise

    def seed(step: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        centers, nearest = carry
        chosen = points[jax.random.categorical(jax.random.fold_in(key, step), jnp.log(nearest))]
        return centers.at[step].set(chosen), jnp.minimum(nearest, _squared_distances(points, chosen[None])[:, 0])

    start = (jnp.zeros((count, points.shape[1])), jnp.full(len(points), jnp.finfo(points.dtype).max))
    centers, _ = jax.lax.fori_loop(0, count, seed, start)
    centers = jax.lax.fori_loop(0, _LLOYD_STEPS, lambda _, centers: _lloyd_step(points, centers), centers)
    return centers + mean, jnp.mean(jnp.min(_squared_distances(points, centers), axis=1))


def _squared_distances(points: jax.Array, centers: jax.Array) -> jax.Array:
    products = jnp.matmul(points, centers.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(jnp.sum(points**2, axis=1)[:, None] - 2 * products + jnp.sum(centers**2, axis=1), 0)


def _lloyd_step(points: jax.Array, centers: jax.Array) -> jax.Array:
    distances = _squared_distances(points, centers)
    members = jax.nn.one_hot(jnp.argmin(distances, axis=1), len(centers))
    sizes = jnp.sum(members, axis=0)
    sums = jnp.matmul(members.T, points, precision=jax.lax.Precision.HIGHEST)
    farthest = jax.lax.top_k(jnp.min(distances, axis=1), len(centers))[1]
    empty = sizes == 0
    spare = points[farthest[jnp.cumsum(empty) - 1]]  # the n-th empty cluster gets the n-th farthest point
    return jnp.where(empty[:, None], spare, sums / jnp.maximum(sizes, 1)[:, None])
