"""From logits to the K best addresses of their product softmax, and the gradient of the logits."""
