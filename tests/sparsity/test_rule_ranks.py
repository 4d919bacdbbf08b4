"""The default correctness rule ranks examples more like a clean, unmixed probe than the others do; see docs/results/forgetting-rules.md."""

import pytest

from tests.support.rule_ranks import RULES, SHARES, ranks
from trainer.config.schema_levels import ExamplesConfig


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_default_rule_ranks_like_a_clean_probe():
    every = ranks(50)
    found = {rule: every[rule] for rule in RULES}
    default = found[ExamplesConfig().rule]
    assert default.correlation == max(one.correlation for one in found.values()) > 0.2
    assert default.easiest == min(one.easiest for one in found.values()) < 0.5, "what it would remove is easy for the probe too"
    assert found["authors"].easiest > 1, "the authors' would remove what is harder than chance"
    assert set(every) == {*RULES, *SHARES}
    probes = [every[rule] for rule in SHARES]
    assert all(one.correlation > 0.65 and one.easiest < default.easiest for one in probes)
    assert probes[0].correlation < probes[1].correlation < probes[2].correlation < 1, "more probes, a better ranking"
