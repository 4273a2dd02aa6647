"""The scan over slots: ``order`` sorts the accesses, ``pieces`` cuts them, ``masses`` and ``forward`` scan them."""
