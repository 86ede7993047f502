// The work of a call is cut into items of equal numbers of keys that own their columns of the
// result, so the result is the same for any number of threads.

#include "observe.h"

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "scratch.h"

namespace tamis {
namespace {

// Below this many products of a query and a key waking other threads costs more than they save.
constexpr int64_t kParallelPairs = 1 << 14;

// Keys begin..end of one KV head of one row.
struct Item {
  int64_t row, head, begin, end;
};

void cut(int64_t row, int64_t head, int64_t begin, int64_t end, int64_t size,
         std::vector<Item>* items) {
  for (int64_t at = begin; at < end; at += size) {
    items->push_back({row, head, at, std::min(at + size, end)});
  }
}

int64_t length_of(const ObserveArgs& a, int64_t row, int64_t head) {
  return a.lengths[row * a.lengths_row_stride + head * a.lengths_head_stride];
}

Pages pages_of(const ObserveArgs& a, int64_t row, int64_t head) {
  return {a.data, a.tables + row * a.tables_row_stride + head * a.tables_head_stride, a.page_size};
}

}  // namespace

void observe_chunk(const ObserveArgs& a, Isa isa, int threads) {
  const int64_t group = a.q_heads / a.kv_heads;
  std::vector<Item> items;
  for (int64_t head = 0; head < a.kv_heads; ++head) {
    cut(0, head, 0, length_of(a, 0, head), kSpan, &items);
  }
  // The first keys are seen by most queries: they go first.
  std::stable_sort(items.begin(), items.end(),
                   [](const Item& one, const Item& other) { return one.begin < other.begin; });
  if (static_cast<int64_t>(items.size()) * kSpan * a.n * group < kParallelPairs) threads = 1;
  const Scratch scratch(threads, span_scratch_floats(group, a.k_dim));
  ObserveSpan* const observe = kernels(isa).observe_span[static_cast<int>(a.dtype)];

#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (size_t i = 0; i < items.size(); ++i) {
    observe(a, items[i].head, items[i].begin, items[i].end, scratch.mine());
  }
}

void observe_decode(const ObserveArgs& a, Isa isa, int threads) {
  const int64_t group = a.q_heads / a.kv_heads;
  std::vector<Item> items;
  for (int64_t row = 0; row < a.n; ++row) {
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      int64_t begin = 0, end = length_of(a, row, head);
      if (a.positions != nullptr) {
        const Pages pages = pages_of(a, row, head);
        const int64_t after = a.positions[row] + 1;
        end = first_from(pages, a.position_offset, 0, end, after);
        if (a.window > 0) begin = first_from(pages, a.position_offset, 0, end, after - a.window);
      }
      cut(row, head, begin, end, kObserved, &items);
    }
  }
  if (static_cast<int64_t>(items.size()) * kObserved * group < kParallelPairs) threads = 1;
  const Scratch scratch(threads, range_scratch_floats(group, a.k_dim));
  ObserveRange* const observe = kernels(isa).observe_range[static_cast<int>(a.dtype)];

#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (size_t i = 0; i < items.size(); ++i) {
    const Item& item = items[i];
    observe(a, item.row, item.head, item.begin, item.end, scratch.mine());
  }
}

}  // namespace tamis
