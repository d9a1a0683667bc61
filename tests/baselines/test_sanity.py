"""How flat, how near softmax and how ordered by q.k each map is before it learns anything."""

import pytest

from hhbench.attention import ATTENTIONS

# The means of 1,024 heads; the test takes 64 of them. One head of the sharpest map, exp at t = 2, scatters by 0.11 in
# entropy and 0.05 in KL, so 64 are within 0.05.
EXPECTED = [
    # name, options, entropy, KL, Spearman, within
    ("softmax", {}, 4.808, 0.0, 1.0, 0.02),
    ("hedgehog", {}, 5.288, 0.386, 0.872, 0.02),
    ("hedgehog", {"activation": "exp"}, 5.283, 0.380, 0.728, 0.02),
    ("hedgehog", {"activation": "joint-softmax"}, 4.987, 0.385, 0.611, 0.02),
    ("exp", {}, 5.269, 0.399, 0.490, 0.02),
    ("exp", {"temperature": 2.0}, 4.700, 0.585, 0.434, 0.05),
    ("elu", {}, 5.293, 0.443, 0.500, 0.02),
    ("relu", {}, 5.245, 0.351, 0.583, 0.02),
    ("t2r", {}, 5.245, 0.351, 0.583, 0.02),
    ("taylor", {}, 5.041, 0.060, 0.903, 0.02),
]


@pytest.mark.parametrize(
    "name,options,entropy,kl,spearman,within",
    EXPECTED,
    ids=[ATTENTIONS.get(name).label(options) for name, options, *_ in EXPECTED],
)
def test_a_map_s_likeness_to_softmax(name, options, entropy, kl, spearman, within, likeness):
    found = likeness(name, **options)
    assert found.entropy == pytest.approx(entropy, abs=within)
    assert found.kl == pytest.approx(kl, abs=within)
    assert found.spearman == pytest.approx(spearman, abs=within)


def test_few_maps_are_spiky_and_few_are_ordered(likeness):
    """The paper's two properties: spiky are Taylor and exp at t = 2; ordered are Taylor and Hedgehog's."""
    maps = [(name, options) for name, options, *_ in EXPECTED if name != "softmax"]
    spiky = [(name, options) for name, options in maps if likeness(name, **options).entropy < 5.1]
    ordered = [(name, options) for name, options in maps if likeness(name, **options).spearman > 0.7]
    assert spiky == [
        ("hedgehog", {"activation": "joint-softmax"}),
        ("exp", {"temperature": 2.0}),
        ("taylor", {}),
    ]
    assert ordered == [("hedgehog", {}), ("hedgehog", {"activation": "exp"}), ("taylor", {})]
