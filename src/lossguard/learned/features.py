"""What a learned optimizer sees of a gradient."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def log_and_sign(gradient: Float[Array, " n"], p: float = 10.0) -> Float[Array, "2 n"]:
    """Two inputs for each coordinate g of a gradient, its magnitude apart from its sign:

        (log|g| / p, sign g)   where |g| >= exp(-p)
        (-1, exp(p) g)         elsewhere

    Both lie within [-1, 1] for |g| up to exp(p). Source: Andrychowicz et al. 2016, appendix A.

    >>> log_and_sign(jnp.array([1.0, -1.0, 0.0]))
    Array([[ 0.,  0., -1.],
           [ 1., -1.,  0.]], dtype=float32)
    """
    floor = jnp.exp(-p)
    magnitude = jnp.abs(gradient)
    log = jnp.log(jnp.maximum(magnitude, floor)) / p
    sign = jnp.where(magnitude >= floor, jnp.sign(gradient), gradient * jnp.exp(p))
    return jnp.stack([log, sign])
