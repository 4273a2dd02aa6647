"""A process for the tests of ``autotune.bench.peers.serving``."""

import sys

from autotune.bench.peers.serving import serve


def double(x):
    print("a library prints this")  # noqa: T201
    return x + x


def leave():
    sys.stderr.write("the last words\n")
    sys.exit(3)


if __name__ == "__main__":
    serve({"double": double, "leave": leave})
