"""BERT in TensorFlow: checkpoints, tokenization, graphs."""
