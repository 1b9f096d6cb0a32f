"""Functions on a `Run`: arithmetic on kept logits, without TensorFlow."""
