"""The TensorFlow side: checkpoints, tokenization, graphs, training and other formats of BERT classifiers."""
