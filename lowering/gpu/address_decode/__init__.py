"""The top-K addresses of a product softmax, and the gradient of its logits."""
