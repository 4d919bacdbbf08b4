"""How to train: configuration, data, model, engine, loop, checkpoint, metrics, evaluation."""
