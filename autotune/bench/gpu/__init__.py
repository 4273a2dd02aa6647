"""``ramnet bench --target h200``: compares the scan, decoding and training on a GPU with other libraries."""
