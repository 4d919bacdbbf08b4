"""What probing costs beside training: processor time of an image, decoded and passed, in training and in the probe of `examples.rule`.

    python -m tests.support.probe_cost CONFIG [ROUNDS]

One process and one thread; images are decoded in it. Processor time, so that other programs of the machine weigh less; medians over ROUNDS
batches (default 20), each of a training step (forward, backward, optimizer), then of a probe of as many images.
"""

from __future__ import annotations

import sys
import time
from statistics import median

import torch

from sparsity.types import DENSE
from trainer.config.load import load
from trainer.data.augment.mixup import draw_mix, mix_images
from trainer.data.augment.on_device import augment_on_device, normalise
from trainer.data.loader.build import clean_images, training_stream
from trainer.data.loader.dataset import open_indexes
from trainer.model.build import build_model, build_objective
from trainer.model.optimizer import build_optimizer


def main(words: list[str]) -> None:
    torch.set_num_threads(1)
    config = load(words[0], ["data.workers=0", *words[2:]])
    rounds, size = int(words[1]) if words[1:] else 20, config.data.batch
    index, _ = open_indexes(config.data)
    model, objective = build_model(config).train(), build_objective(config)
    optimizer = build_optimizer(model, config.optim)
    batches = iter(training_stream(index, config, 0, 1).epoch(0, None))
    clean = clean_images(index, config, 0, 1, 1.0)
    found: dict[str, list[float]] = {"training, decoding": [], "training, step": [], "probe, decoding": [], "probe, pass": []}
    for number in range(rounds):
        marks = [time.process_time()]
        batch = next(batches)
        marks.append(time.process_time())
        mix = draw_mix(config.augment, config.seed, number, config.model.image_size)
        images = mix_images(augment_on_device(batch, config.augment), mix, batch.weights)
        output = model(images, DENSE, frozenset(), batch.rng_keys)
        objective.losses(output.logits, objective.targets(batch.labels, mix, batch.weights)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        marks.append(time.process_time())
        plain = next(clean.of(batch.ids.sort().values.numpy()))
        marks.append(time.process_time())
        model.eval()
        with torch.no_grad():
            output = model(normalise(plain.images[:size], config.augment), DENSE, frozenset({"cls_attention"}))
            objective.probed(plain.labels[:size], plain.weights[:size], output)
        model.train()
        marks.append(time.process_time())
        for name, begin, end in zip(found, marks, marks[1:], strict=False):
            found[name].append(1000 * (end - begin) / size)
    times = {name: median(values) for name, values in found.items()}
    for name, milliseconds in times.items():
        print(f"{name:18} {milliseconds:.3f} ms of processor time per image ({min(found[name]):.3f} - {max(found[name]):.3f})")
    train, probe = (sum(value for name, value in times.items() if name.startswith(kind)) for kind in ("training", "probe"))
    print(
        f"a probed image / a training image: {probe / train:.3f}; with probe_share .1: {10 * probe / train:.1f} % of dense training"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
