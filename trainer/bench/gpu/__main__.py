"""`python -m trainer.bench.gpu`: the parts of `make gpu` that need nothing beside torch and timm."""

from __future__ import annotations

import sys

from trainer.bench.gpu.check import main

sys.exit(main())
