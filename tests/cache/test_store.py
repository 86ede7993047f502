"""Stores hold pages beside the live ones: other formats, other tiers, shared between layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tamis.attention import decode
from tamis.cache import (
    CacheLayout,
    Field,
    LayerShape,
    OutOfPages,
    OutOfSwap,
    PagedCache,
    PageError,
    PageFormat,
    SequenceCache,
)
from tamis.errors import ConfigError
from tests.cache import tokens

LAYOUT = CacheLayout(
    (LayerShape(2, 8, 8), LayerShape(2, 8, 8), LayerShape(1, 8, 8)), 4, torch.float32
)
DENSE = PageFormat.dense(8, 8, 8, torch.float32)  # 256 + 256 + 64 bytes
CODES = PageFormat(
    8, (Field("code", torch.uint8, 4), Field("scale", torch.float16, 4, rows=2))
)  # 64 + 64 bytes


def make_cache(
    capacity: int = 60_000, swap_bytes: int = 60_000, host_bytes: int = 60_000
) -> PagedCache:
    return PagedCache(LAYOUT, capacity, swap_bytes=swap_bytes, host_bytes=host_bytes)


def with_store(
    cache: PagedCache, format: PageFormat = DENSE, tier: str = "device", live: int = 0
) -> SequenceCache:
    """A sequence of some live tokens with a store for the first two layers."""
    sequence = cache.new_sequence()
    if live:
        tokens.grow(sequence, range(live))
    sequence.add_store("s", {0: format, 1: format}, tier)
    return sequence


def codes(n: int, pages: int, heads: int = 2) -> dict[str, torch.Tensor]:
    """Distinct codes and scales."""
    return {
        "code": torch.arange(heads * n * 4, dtype=torch.uint8).view(heads, n, 4),
        "scale": torch.arange(heads * pages * 8, dtype=torch.float16).view(heads, pages, 2, 4),
    }


@pytest.mark.parametrize("tier", ["device", "host"])
class TestPut:
    def test_tokens_are_read_as_they_were_put(self, tier: str) -> None:
        sequence = with_store(make_cache(), CODES, tier)
        sequence.put("s", (0,), 16, codes(16, 2))
        sequence.put("s", (0,), 11, codes(11, 2))
        assert sequence.store_length("s", 0).tolist() == [27, 27]
        assert sequence.store_length("s", 1).tolist() == [0, 0]
        read = sequence.stored("s", 0)
        for name in ("code", "scale"):
            expected = torch.cat([codes(16, 2)[name], codes(11, 2)[name]], dim=1)
            assert torch.equal(read[name], expected)

    def test_some_pages_can_be_read(self, tier: str) -> None:
        sequence = with_store(make_cache(), CODES, tier)
        fields = codes(27, 4)
        sequence.put("s", (1,), 27, fields)
        for first, last in ((0, 1), (1, 3), (3, 4), (2, 99), (4, 5), (7, 9)):
            read = sequence.stored("s", 1, first, last)
            assert torch.equal(read["code"], fields["code"][:, first * 8 : last * 8])
            assert torch.equal(read["scale"], fields["scale"][:, first:last])

    def test_some_fields_can_be_read(self, tier: str) -> None:
        sequence = with_store(make_cache(), CODES, tier)
        sequence.put("s", (1,), 27, codes(27, 4))
        read = sequence.stored("s", 1, 1, 3, ["scale"])
        assert set(read) == {"scale"}
        assert torch.equal(read["scale"], codes(27, 4)["scale"][:, 1:3])

    def test_bytes_are_of_whole_pages(self, tier: str) -> None:
        cache = make_cache()
        sequence = with_store(cache, CODES, tier, live=5)
        live = sequence.bytes
        sequence.put("s", (0,), 19, codes(19, 3))
        held = 2 * 3 * 128
        on_device = held if tier == "device" else 0
        assert sequence.bytes == cache.bytes_in_use == live + on_device
        assert sequence.host_bytes == cache.host_bytes_in_use == held - on_device
        sequence.clear_store("s", 0)
        assert sequence.bytes == cache.bytes_in_use == live
        assert sequence.host_bytes == cache.host_bytes_in_use == 0
        sequence.put("s", (0,), 3, codes(3, 1))  # it can be filled again
        assert torch.equal(sequence.stored("s", 0)["code"], codes(3, 1)["code"])

    def test_layers_that_share_pages_pay_once(self, tier: str) -> None:
        cache = make_cache()
        sequence = with_store(cache, CODES, tier)
        sequence.put("s", (0, 1), 16, codes(16, 2))
        sequence.put("s", (1,), 8, codes(8, 1))
        total = 6 * 128
        assert sequence.bytes + sequence.host_bytes == total
        assert cache.bytes_in_use + cache.host_bytes_in_use == total
        for layer in (0, 1):
            read = sequence.stored("s", layer, 0, 2)
            assert torch.equal(read["code"], codes(16, 2)["code"])
        sequence.clear_store("s", 0)
        assert sequence.bytes + sequence.host_bytes == total
        sequence.clear_store("s", 1)
        assert cache.bytes_in_use + cache.host_bytes_in_use == 0

    def test_heads_may_hold_different_numbers_of_tokens(self, tier: str) -> None:
        sequence = with_store(make_cache(), CODES, tier)
        sequence.put("s", (0,), 8, codes(8, 1, heads=1), heads=[1])
        sequence.put("s", (0,), 3, codes(3, 1))
        assert sequence.store_length("s", 0).tolist() == [3, 11]
        read = sequence.stored("s", 0)
        assert torch.equal(read["code"][0, :3], codes(3, 1)["code"][0])
        assert not read["code"][0, 3:].any()
        assert not read["scale"][0, 1].any()
        own = torch.cat([codes(8, 1, heads=1)["code"][0], codes(3, 1)["code"][1]])
        assert torch.equal(read["code"][1], own)

    def test_a_partly_filled_page_is_final(self, tier: str) -> None:
        sequence = with_store(make_cache(), CODES, tier)
        sequence.put("s", (0,), 5, codes(5, 1, heads=1), heads=[0])
        with pytest.raises(PageError, match="partly filled, and final"):
            sequence.put("s", (0,), 8, codes(8, 1))
        sequence.put("s", (0,), 8, codes(8, 1, heads=1), heads=[1])

    def test_pages_that_do_not_fit_change_nothing(self, tier: str) -> None:
        cache = make_cache(capacity=2_000, host_bytes=2_000)
        sequence = with_store(cache, CODES, tier)
        sequence.put("s", (0,), 8, codes(8, 1))
        before = (sequence.bytes, sequence.host_bytes, cache.bytes_in_use, cache.host_bytes_in_use)
        with pytest.raises(OutOfPages):
            sequence.put("s", (0, 1), 100, codes(100, 13))
        assert sequence.store_length("s", 0).tolist() == [8, 8]
        assert before == (
            sequence.bytes,
            sequence.host_bytes,
            cache.bytes_in_use,
            cache.host_bytes_in_use,
        )

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"code": None}, r"needs the fields \['code', 'scale'\], got \['scale'\]"),
            ({"code": torch.zeros(2, 9, 4)}, r"code must be \[2, 10, 4\]"),
            ({"code": torch.zeros(2, 10, 4)}, "code must be torch.uint8, got torch.float32"),
            ({"scale": torch.zeros(2, 1, 2, 4).half()}, r"scale must be \[2, 2, 2, 4\]"),
        ],
    )
    def test_fields_that_do_not_fit_the_format_are_refused(
        self, tier: str, change: dict[str, torch.Tensor | None], message: str
    ) -> None:
        cache = make_cache()
        sequence = with_store(cache, CODES, tier)
        fields = {name: x for name, x in (codes(10, 2) | change).items() if x is not None}
        with pytest.raises(ValueError, match=message):
            sequence.put("s", (0,), 10, fields)
        assert cache.bytes_in_use == cache.host_bytes_in_use == 0

    def test_a_short_last_page_ends_with_zeros(self, tier: str) -> None:
        cache = make_cache()
        sequence = with_store(cache, CODES, tier)
        tier_of = cache.tier(tier)
        tier_of.arena.data.fill_(255)
        sequence.put("s", (0,), 3, codes(3, 1))
        pool = cache.pool(CODES, tier)
        assert not pool.gather(sequence.stores["s"].tables[:2, 0], "code")[:, 3:].any()


class TestStoresGoWithTheirSequence:
    @pytest.mark.parametrize("tier", ["device", "host"])
    def test_forks_share_stores_by_reference(self, tier: str) -> None:
        cache = make_cache()
        sequence = with_store(cache, CODES, tier, live=4)
        sequence.put("s", (0, 1), 16, codes(16, 2))
        in_use = (cache.bytes_in_use, cache.host_bytes_in_use)
        branch = sequence.fork()
        assert (cache.bytes_in_use, cache.host_bytes_in_use) == in_use
        assert (branch.bytes, branch.host_bytes) == (sequence.bytes, sequence.host_bytes)
        assert cache.distinct_bytes([sequence, branch]) == cache.bytes_in_use
        branch.put("s", (0,), 8, codes(8, 1))
        sequence.free()
        assert branch.store_length("s", 0).tolist() == [24, 24]
        assert torch.equal(branch.stored("s", 1)["code"], codes(16, 2)["code"])
        assert (branch.bytes, branch.host_bytes) == (cache.bytes_in_use, cache.host_bytes_in_use)
        branch.free()
        assert cache.bytes_in_use == cache.host_bytes_in_use == 0

    def test_stores_on_the_device_are_swapped_each_page_once(self) -> None:
        cache = make_cache()
        sequence = with_store(cache, CODES, live=6)
        sequence.put("s", (0, 1), 16, codes(16, 2))
        held = sequence.bytes
        sequence.swap_out()
        assert (cache.bytes_in_use, cache.swap_bytes_in_use, sequence.bytes) == (0, held, held)
        cache.arena.data.fill_(255)
        sequence.swap_in()
        assert (cache.bytes_in_use, cache.swap_bytes_in_use, sequence.bytes) == (held, 0, held)
        for layer in (0, 1):
            for name, values in codes(16, 2).items():
                assert torch.equal(sequence.stored("s", layer)[name], values)
        assert torch.equal(sequence.contents(0, 1, "k"), tokens.keys(range(6), 1, 8))
        sequence.clear_store("s", 0)
        assert sequence.bytes == held
        sequence.free()
        assert cache.bytes_in_use == 0

    def test_stores_in_host_memory_stay_there(self) -> None:
        cache = make_cache()
        sequence = with_store(cache, CODES, "host", live=6)
        sequence.put("s", (0,), 16, codes(16, 2))
        live = sequence.bytes
        sequence.swap_out()
        assert (cache.swap_bytes_in_use, cache.host_bytes_in_use) == (live, 4 * 128)
        with pytest.raises(PageError, match="swapped out"):
            sequence.stored("s", 0)
        sequence.swap_in()
        assert torch.equal(sequence.stored("s", 0)["code"], codes(16, 2)["code"])

    def test_the_swap_budget_counts_stores(self) -> None:
        cache = make_cache(swap_bytes=2 * 5 * 320)  # of the live pages alone
        sequence = with_store(cache, CODES, live=6)
        sequence.put("s", (0,), 8, codes(8, 1))
        with pytest.raises(OutOfSwap):
            sequence.swap_out()
        sequence.clear_store("s", 0)
        sequence.swap_out()

    def test_swap_in_is_all_or_nothing(self) -> None:
        cache = make_cache(capacity=12_000)
        sequence = with_store(cache, DENSE, live=4)
        sequence.put("s", (0, 1), 40, tokens.stored(range(40), 2))
        sequence.swap_out()
        other = cache.new_sequence()
        tokens.grow(other, range(12))
        in_use = cache.bytes_in_use
        with pytest.raises(OutOfPages):
            sequence.swap_in()
        assert sequence.swapped
        assert cache.bytes_in_use == in_use
        other.free()
        sequence.swap_in()
        assert torch.equal(sequence.stored("s", 1)["k"], tokens.stored(range(40), 2)["k"])

    @pytest.mark.parametrize("swapped", [False, True])
    @pytest.mark.parametrize("tier", ["device", "host"])
    def test_nothing_is_left_after_free(self, swapped: bool, tier: str) -> None:
        cache = make_cache()
        sequence = with_store(cache, CODES, tier, live=6)
        sequence.put("s", (0, 1), 16, codes(16, 2))
        if swapped:
            sequence.swap_out()
        for _ in range(2):
            sequence.free()
            assert cache.bytes_in_use == cache.host_bytes_in_use == cache.swap_bytes_in_use == 0
            assert sequence.bytes == sequence.host_bytes == 0
        with pytest.raises(PageError, match="freed"):
            sequence.put("s", (0,), 8, codes(8, 1))


class TestPages:
    @pytest.mark.parametrize("tier", ["device", "host"])
    @pytest.mark.parametrize("elsewhere", [False, True])
    def test_attention_over_a_store_equals_attention_over_live_pages(
        self, tier: str, elsewhere: bool
    ) -> None:
        cache = make_cache()
        torch.manual_seed(0)
        sequence = with_store(cache, DENSE.extended((Field("x", torch.uint8, 5),)), tier)
        fields = {name: torch.randn(2, 21, 8) for name in ("k", "v")}
        position = torch.arange(21, dtype=torch.int32).expand(2, 21)[..., None]
        extra = torch.zeros(2, 21, 5, dtype=torch.uint8)
        sequence.put("s", (0, 1), 21, fields | {"position": position, "x": extra})
        sequence.clear_store("s", 0)
        sequence.reserve(21)
        sequence.advance(21)
        indices = [np.arange(21)] * 2
        sequence.write(1, indices, list(fields["k"]), list(fields["v"]))
        pages = sequence.store_pages("s", 1)
        if elsewhere:  # as another device would get them
            pages = sequence.stores["s"].staged(1, torch.device("cpu"))
            assert pages.data.numel() == 2 * 3 * pages.format.page_bytes
        q = torch.randn(1, 4, 8)
        out, lse = decode(q, pages, scale=0.3)
        want_out, want_lse = decode(q, sequence.pages(1), scale=0.3)
        assert torch.allclose(out, want_out, atol=1e-6)
        assert torch.allclose(lse, want_lse, atol=1e-6)

    def test_staging_copies_the_pages_that_there_are_and_no_others(self) -> None:
        sequence = with_store(make_cache(), DENSE, "host")
        sequence.put("s", (0,), 8, {n: x[:1] for n, x in tokens.stored(range(8), 2).items()}, [1])
        pages = sequence.stores["s"].staged(0, torch.device("cpu"))
        assert pages.data.numel() == DENSE.page_bytes
        assert pages.lengths.tolist() == [[0, 8]]
        staged = DENSE.view(pages.data, "k")[pages.tables[0, 1, 0].long()]
        assert torch.equal(staged, tokens.keys(range(8), 0, 8))

    def test_a_store_without_keys_has_no_pages_for_attention(self) -> None:
        sequence = with_store(make_cache(), CODES)
        with pytest.raises(PageError, match=r"holds \['code', 'scale'\]"):
            sequence.store_pages("s", 0)


class TestMisuse:
    def test_a_name_is_given_once(self) -> None:
        sequence = with_store(make_cache())
        with pytest.raises(PageError, match=r"beside \['s'\]"):
            sequence.add_store("s", {0: DENSE})

    def test_layers_are_the_models(self) -> None:
        with pytest.raises(PageError, match="a model of 3 layers"):
            make_cache().new_sequence().add_store("s", {3: DENSE})

    def test_tiers_are_two(self) -> None:
        with pytest.raises(ConfigError, match=r"tier 'disk'.*\['device', 'host'\]"):
            make_cache().new_sequence().add_store("s", {0: DENSE}, "disk")

    def test_host_memory_is_not_negative(self) -> None:
        with pytest.raises(ConfigError, match="host_bytes is -1"):
            make_cache(host_bytes=-1)

    def test_a_page_fits_a_block(self) -> None:
        large = PageFormat.dense(512, 8, 8, torch.float32)
        with pytest.raises(ConfigError, match=r"512 tokens of k, v, position.* does not fit"):
            make_cache().new_sequence().add_store("s", {0: large})

    @pytest.mark.parametrize(
        ("layers", "heads", "message"),
        [
            ((), None, "distinct layers"),
            ((0, 0), None, "distinct layers"),
            ((0, 2), None, r"layers \[0, 2\] differ in KV heads or format"),
            ((3,), None, r"covers the layers \[0, 1, 2\], not 3"),
            ((0,), [1, 0], "ascending heads"),
            ((0,), [2], "ascending heads"),
        ],
    )
    def test_puts_name_layers_and_heads_that_agree(
        self, layers: tuple[int, ...], heads: list[int] | None, message: str
    ) -> None:
        sequence = make_cache().new_sequence()
        sequence.add_store("s", {0: CODES, 1: CODES, 2: CODES})
        with pytest.raises(PageError, match=message):
            sequence.put("s", layers, 8, codes(8, 1), heads)

    def test_a_store_is_added_first(self) -> None:
        with pytest.raises(PageError, match=r"no store 't' among \['s'\]"):
            with_store(make_cache()).store_length("t", 0)
