"""``ramnet bench --target h200``: the scan, decoding and training on a GPU, beside other libraries'."""
