"""The peer of bench_entk: neural-tangents' structured derivatives, compiled, in an environment of its own.

Reads the path of an .npz file with the network's weights, biases, inputs and kernel; answers with its worst relative
difference from that kernel; then answers every line of input with the seconds that one evaluation took.
"""

import sys
import time

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np

jax.config.update("jax_enable_x64", True)


def outputs(parameters: list, x: jax.Array) -> jax.Array:
    """Evaluate a ReLU network; weights are (in, out), as its structured rules want them."""
    for weight, bias in parameters[:-1]:
        x = jnp.maximum(x @ weight + bias, 0.0)
    weight, bias = parameters[-1]
    return x @ weight + bias


def main() -> None:
    """Serve timings until the input ends."""
    file = np.load(sys.argv[1])
    parameters = [(jnp.asarray(file[f"w{k}"].T), jnp.asarray(file[f"b{k}"])) for k in range(int(file["layers"]))]
    kernel = jax.jit(
        nt.empirical_ntk_fn(
            outputs, trace_axes=(), vmap_axes=0, implementation=nt.NtkImplementation.STRUCTURED_DERIVATIVES
        )
    )

    x = jnp.asarray(file["x"])

    def evaluate() -> np.ndarray:
        return np.asarray(kernel(x, None, parameters))

    found, expected = evaluate(), file["kernel"]
    print(np.abs(found - expected).max() / np.abs(expected).max(), flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        evaluate()
        print(time.process_time() - start, flush=True)


if __name__ == "__main__":
    main()
