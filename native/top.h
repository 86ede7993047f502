// The largest of many numbers, by their place.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "element.h"

namespace tamis {
namespace {

// Unsigned numbers in the order of floats; both zeros are equal.
[[maybe_unused]] inline uint32_t ordered(float value) {
  const uint32_t bits = as_bits(value + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The float whose `ordered` is `key`.
[[maybe_unused]] inline float unordered(uint32_t key) {
  return as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// A number that, judged by every 16th value, somewhat more than `count` of the values reach.
[[maybe_unused]] inline float likely_floor(const float* values, int64_t n, int64_t count) {
  constexpr int64_t kStep = 16, kFew = 64;
  const double share = static_cast<double>(count) / kStep;
  const int64_t rank = static_cast<int64_t>(share + 4 * std::sqrt(share)) + 4;
  if (n / kStep < kFew || rank >= n / kStep) return -std::numeric_limits<float>::infinity();
  std::vector<uint32_t> sample(n / kStep);
  for (size_t i = 0; i < sample.size(); ++i) sample[i] = ordered(values[i * kStep]);
  std::nth_element(sample.begin(), sample.begin() + rank, sample.end(), std::greater<>());
  return unordered(sample[rank]);
}

// Indices of the `count` largest of `n` values (of equal ones the first), ascending, at most n of
// them: written to `out`.
[[maybe_unused]] inline void top_indices(const float* values, int64_t n, int64_t count,
                                         int64_t* out) {
  count = std::min(count, n);
  if (count <= 0) return;
  std::vector<int64_t> reach;  // indices of the values that reach `floor`
  const auto collect = [&](float floor) {
    reach.clear();
    for (int64_t i = 0; i < n; ++i) {
      if (!(values[i] < floor)) reach.push_back(i);
    }
  };
  collect(likely_floor(values, n, count));
  if (static_cast<int64_t>(reach.size()) < count) {
    collect(-std::numeric_limits<float>::infinity());
  }
  std::vector<uint32_t> keys(reach.size());
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = ordered(values[reach[i]]);
  std::vector<uint32_t> sorted = keys;
  std::nth_element(sorted.begin(), sorted.begin() + (count - 1), sorted.end(), std::greater<>());
  const uint32_t least = sorted[count - 1];
  int64_t equal = count;  // how many of those that equal the least are taken
  for (const uint32_t key : sorted) equal -= key > least;
  for (size_t i = 0; i < keys.size(); ++i) {
    if (keys[i] > least || (keys[i] == least && equal-- > 0)) *out++ = reach[i];
  }
}

}  // namespace
}  // namespace tamis
