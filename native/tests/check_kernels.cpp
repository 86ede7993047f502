// Whether every instruction set of this machine computes what portable C++ does: attention of a
// chunk over pages and itself, and the statistics of attention, in bf16 on random inputs; and
// whether emulated tiles give the bits of real ones where both run. Needs no Python, so that it
// runs as the only program of an emulated processor. Prints a line per check; fails if any does.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../cpu.h"
#include "../element.h"
#include "../observe.h"
#include "../prefill.h"

namespace {

using tamis::Bf16;
using tamis::Isa;

constexpr int64_t kPageSize = 16;

struct Case {
  int64_t tokens;                // of the chunk
  std::vector<int64_t> lengths;  // cached tokens of each KV head
  int64_t group;                 // query heads per KV head
  int64_t k_dim, v_dim;
  int64_t window;                // 0 for none
  float softcap;                 // 0 for none
};

int64_t longest(const Case& c) {
  int64_t most = 0;
  for (const int64_t length : c.lengths) most = std::max(most, length);
  return most;
}

std::vector<Bf16> random_elements(int64_t count, std::mt19937* random) {
  std::normal_distribution<float> normal;
  std::vector<Bf16> elements(count);
  for (Bf16& element : elements) tamis::from_float(normal(*random), &element);
  return elements;
}

// Cached tokens of every KV head at positions 0, 1, ..., on pages of their own; what no token
// fills is NaN.
struct Cache {
  int64_t k_offset = 0, v_offset, position_offset, page_bytes, pages;
  std::vector<uint8_t> data;
  std::vector<int32_t> tables, lengths;  // [kv_heads, pages], [kv_heads]

  Cache(const Case& c, std::mt19937* random)
      : v_offset(kPageSize * c.k_dim * 2),
        position_offset(v_offset + kPageSize * c.v_dim * 2),
        page_bytes((position_offset + kPageSize * 4 + 63) / 64 * 64),
        pages(longest(c) / kPageSize + 1) {
    const int64_t heads = c.lengths.size();
    data.assign(heads * pages * page_bytes, 0xff);
    for (int64_t head = 0; head < heads; ++head) {
      lengths.push_back(c.lengths[head]);
      for (int64_t page = 0; page < pages; ++page) {
        const int64_t reversed = (head + 1) * pages - 1 - page;
        tables.push_back(reversed * page_bytes / tamis::kUnit);
      }
      for (int32_t token = 0; token < c.lengths[head]; ++token) {
        const int64_t slot = token % kPageSize;
        uint8_t* const page =
            data.data() + tables[head * pages + token / kPageSize] * tamis::kUnit;
        const std::vector<Bf16> k = random_elements(c.k_dim, random);
        const std::vector<Bf16> v = random_elements(c.v_dim, random);
        std::memcpy(page + k_offset + slot * c.k_dim * 2, k.data(), c.k_dim * 2);
        std::memcpy(page + v_offset + slot * c.v_dim * 2, v.data(), c.v_dim * 2);
        std::memcpy(page + position_offset + slot * 4, &token, 4);
      }
    }
  }
};

// What is compared: results of one instruction set.
struct Results {
  std::vector<float> out, lse, scores, sums;
};

class Inputs {
  const Case c_;
  const int64_t kv_heads_, q_heads_;
  std::mt19937 random_{1};
  const Cache cache_;
  const std::vector<Bf16> q_, k_, v_;
  std::vector<int64_t> positions_;

 public:
  explicit Inputs(const Case& c)
      : c_(c),
        kv_heads_(c.lengths.size()),
        q_heads_(kv_heads_ * c.group),
        cache_(c, &random_),
        q_(random_elements(c.tokens * q_heads_ * c.k_dim, &random_)),
        k_(random_elements(c.tokens * kv_heads_ * c.k_dim, &random_)),
        v_(random_elements(c.tokens * kv_heads_ * c.v_dim, &random_)) {
    for (int64_t i = 0; i < c.tokens; ++i) positions_.push_back(longest(c) + i);
  }

  Results run(Isa isa) const {
    Results r;
    std::vector<Bf16> out(c_.tokens * q_heads_ * c_.v_dim);
    r.lse.resize(c_.tokens * q_heads_);
    tamis::PrefillArgs prefill{};
    prefill.dtype = tamis::DType::bf16;
    prefill.tokens = c_.tokens;
    prefill.q_heads = q_heads_;
    prefill.kv_heads = kv_heads_;
    prefill.k_dim = c_.k_dim;
    prefill.v_dim = c_.v_dim;
    prefill.q = heads(q_, q_heads_, c_.k_dim);
    prefill.k = heads(k_, kv_heads_, c_.k_dim);
    prefill.v = heads(v_, kv_heads_, c_.v_dim);
    prefill.v_offset = cache_.v_offset;
    prefill.own = true;
    prefill.out = out.data();
    prefill.lse = r.lse.data();
    prefill.tables_head_stride = cache_.pages;
    prefill.lengths_head_stride = 1;
    fill(&prefill);
    tamis::prefill(prefill, isa, 1);
    for (const Bf16 element : out) r.out.push_back(tamis::to_float(element));

    tamis::ObserveArgs observe{};
    observe.dtype = tamis::DType::bf16;
    observe.n = c_.tokens;
    observe.q_heads = q_heads_;
    observe.kv_heads = kv_heads_;
    observe.k_dim = c_.k_dim;
    observe.q = prefill.q;
    observe.tables_head_stride = cache_.pages;
    observe.lengths_head_stride = 1;
    observe.width = longest(c_);
    fill(&observe);
    r.scores.resize(q_heads_ * c_.tokens * observe.width);
    observe.out = r.scores.data();
    tamis::observe_chunk(observe, isa, 1);
    r.sums.resize(q_heads_ * observe.width);
    observe.lse = r.lse.data();
    observe.out = r.sums.data();
    tamis::observe_chunk(observe, isa, 1);
    return r;
  }

 private:
  static tamis::Heads heads(const std::vector<Bf16>& elements, int64_t count, int64_t dim) {
    return {reinterpret_cast<const uint8_t*>(elements.data()), count * dim, dim};
  }

  // What both functions take.
  template <class Args>
  void fill(Args* args) const {
    args->data = cache_.data.data();
    args->page_size = kPageSize;
    args->k_offset = cache_.k_offset;
    args->position_offset = cache_.position_offset;
    args->tables = cache_.tables.data();
    args->lengths = cache_.lengths.data();
    args->positions = positions_.data();
    args->window = c_.window;
    args->scale = 1.0f / std::sqrt(static_cast<float>(c_.k_dim));
    args->softcap = c_.softcap;
  }
};

// The largest difference, relative where values exceed 1; infinite where only one is a number.
float difference(const std::vector<float>& found, const std::vector<float>& expected) {
  float most = 0.0f;
  for (size_t i = 0; i < found.size(); ++i) {
    const float d = std::fabs(found[i] - expected[i]) / std::fmax(1.0f, std::fabs(expected[i]));
    most = d >= 0.0f ? std::fmax(most, d) : INFINITY;
  }
  return most;
}

bool report(Isa isa, const Case& c, const char* what, float difference, float tolerance) {
  const bool passed = difference <= tolerance;
  std::printf("%s %-12s %-6s tokens %3lld cached %3lld heads %zux%lld dims %3lld,%3lld window %2lld"
              ": differs by %.1e of %.0e\n",
              passed ? "PASS" : "FAIL", tamis::kIsaNames[static_cast<int>(isa)], what,
              static_cast<long long>(c.tokens), static_cast<long long>(longest(c)),
              c.lengths.size(), static_cast<long long>(c.group), static_cast<long long>(c.k_dim),
              static_cast<long long>(c.v_dim), static_cast<long long>(c.window),
              static_cast<double>(difference), static_cast<double>(tolerance));
  return passed;
}

}  // namespace

int main() {
  const Case cases[] = {
      {1, {40}, 1, 64, 64, 0, 0.0f},         {70, {0}, 1, 64, 64, 0, 0.0f},
      {33, {150, 7}, 4, 64, 64, 0, 0.0f},    {48, {129, 0}, 2, 128, 128, 0, 0.0f},
      {17, {90, 64, 1}, 3, 48, 48, 0, 0.0f}, {20, {200}, 7, 80, 80, 0, 0.0f},
      {64, {300}, 2, 64, 64, 50, 0.0f},      {40, {70, 65}, 2, 33, 24, 20, 2.0f},
      {30, {530}, 1, 256, 128, 0, 30.0f},
  };
  bool passed = true;
  for (int i = 1; i < tamis::kIsas; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!tamis::runs(isa)) {
      std::printf("SKIP %s\n", tamis::kIsaNames[i]);
      continue;
    }
    // Emulated tiles give the bits of real ones.
    const bool exact = isa == Isa::amx_emulated && tamis::runs(Isa::amx);
    const Isa other = exact ? Isa::amx : Isa::portable;
    const float allowed = exact ? 0.0f : 1.0f;
    for (const Case& c : cases) {
      const Inputs inputs(c);
      const Results found = inputs.run(isa), expected = inputs.run(other);
      passed &= report(isa, c, "out", difference(found.out, expected.out), 1.6e-2f * allowed);
      passed &= report(isa, c, "lse", difference(found.lse, expected.lse), 1e-5f * allowed);
      passed &= report(isa, c, "scores", difference(found.scores, expected.scores), 1e-4f * allowed);
      passed &= report(isa, c, "sums", difference(found.sums, expected.sums), 1e-4f * allowed);
    }
  }
  std::printf("%s\n", passed ? "all passed" : "some failed");
  return passed ? 0 : 1;
}
