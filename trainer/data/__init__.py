"""The data of a run: shards, their index, the order of examples, decoding and augmentation."""
