"""A process that writes a journal of 399 steps beside its shipper, prints the shipper's process id and stays: RUN START_LINE."""

import json
import sys
import time

from trainer.config.schema_run import TrackingConfig
from trainer.journal.writer import Journal
from trainer.tracking import shipper

if __name__ == "__main__":
    journal = Journal(sys.argv[1])
    journal.write("start", **json.loads(sys.argv[2]))
    process = shipper.start(sys.argv[1], TrackingConfig(), every=0.2, linger=20).process
    assert process is not None
    for step in range(1, 400):
        journal.write("step", epoch=0, batch=step, step=step, loss=1 / (1 + step))
        time.sleep(0.002)
    print(process.pid, flush=True)
    time.sleep(60)
