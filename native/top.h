// The largest of many numbers, by their place.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "element.h"

namespace tamis {
namespace {

// Unsigned numbers in the order of floats; both zeros are equal.
[[maybe_unused]] inline uint32_t ordered(float value) {
  const uint32_t bits = as_bits(value + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Indices of the `count` largest of `n` values (of equal ones the first), ascending, at most n of
// them: written to `out`. The number that the `count`-th has is found by its first bits, and
// exactly only among those that share them.
[[maybe_unused]] inline void top_indices(const float* values, int64_t n, int64_t count,
                                         int64_t* out) {
  constexpr int kShift = 21;
  if (count >= n) {
    for (int64_t i = 0; i < n; ++i) out[i] = i;
    return;
  }
  if (count <= 0) return;
  std::vector<int32_t> sizes(1 << (32 - kShift));
  for (int64_t i = 0; i < n; ++i) ++sizes[ordered(values[i]) >> kShift];
  int64_t bucket = static_cast<int64_t>(sizes.size()) - 1, wanted = count;
  for (; sizes[bucket] < wanted; --bucket) wanted -= sizes[bucket];
  std::vector<uint32_t> same;
  same.reserve(sizes[bucket]);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t value = ordered(values[i]);
    if (value >> kShift == bucket) same.push_back(value);
  }
  std::nth_element(same.begin(), same.begin() + (wanted - 1), same.end(), std::greater<>());
  const uint32_t least = same[wanted - 1];
  for (const uint32_t value : same) wanted -= value > least;  // left: how many equal ones
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t value = ordered(values[i]);
    if (value > least || (value == least && wanted-- > 0)) *out++ = i;
  }
}

}  // namespace
}  // namespace tamis
