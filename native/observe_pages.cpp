// Bounds are cut into items of equal numbers of pages; whoever computes the last item of a head
// picks its pages.

#include "observe_pages.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "kernels.h"
#include "scratch.h"
#include "top.h"

namespace tamis {
namespace {

// Pages per item.
constexpr int64_t kPages = kBlock;

// Below this many pages waking other threads costs more than they save.
constexpr int64_t kParallelPages = 2 * kPages;

struct Item {
  int64_t span;                // row * kv_heads + head
  const BoundedPages* source;
  int64_t begin, count, first;  // pages of the source, and the number of the first
};

int64_t tokens_of(const BoundedPages& p, int64_t row, int64_t head) {
  if (p.data == nullptr) return 0;
  return p.lengths[row * p.lengths_row_stride + head * p.lengths_head_stride];
}

// Pages of one head of one row that have bounds: all but the last one.
struct Span {
  int64_t before, own;  // of TopPagesArgs::before and ::pages
  float* bounds;        // [before + own]
  int64_t items;
};

void cut(int64_t span, const BoundedPages& source, int64_t count, int64_t first,
         std::vector<Item>* items) {
  for (int64_t at = 0; at < count; at += kPages) {
    items->push_back({span, &source, at, std::min(kPages, count - at), first + at});
  }
}

void pick(const Span& span, int64_t count, int64_t* out) {
  const int64_t last = span.before + span.own;
  const int64_t others = std::min(last, count - 1);
  top_indices(span.bounds, last, others, out);
  for (int64_t i = others; i < count; ++i) out[i] = last + i - others;
}

}  // namespace

void top_pages(const TopPagesArgs& a, Isa isa, int threads) {
  const int64_t group = a.q_heads / a.kv_heads, heads = a.n * a.kv_heads;
  std::vector<Span> spans(heads);
  std::vector<Item> items;
  int64_t pages = 0;
  for (int64_t s = 0; s < heads; ++s) {
    const int64_t row = s / a.kv_heads, head = s % a.kv_heads;
    const int64_t own = tokens_of(a.pages, row, head);
    int64_t before = tokens_of(a.before, row, head);
    if (before > 0) before /= a.before.page_size;
    spans[s].before = before;
    spans[s].own = own > 0 ? (own - 1) / a.pages.page_size : 0;
    if (own == 0 && before > 0) --spans[s].before;
    pages += spans[s].before + spans[s].own;
  }
  const std::unique_ptr<float[]> bounds(new float[pages]);
  float* at = bounds.get();
  std::vector<std::atomic<int64_t>> pending(heads);
  for (int64_t s = 0; s < heads; ++s) {
    Span& span = spans[s];
    span.bounds = at;
    at += span.before + span.own;
    const size_t first = items.size();
    cut(s, a.before, span.before, 0, &items);
    cut(s, a.pages, span.own, span.before, &items);
    pending[s].store(static_cast<int64_t>(items.size() - first), std::memory_order_relaxed);
    if (items.size() == first) pick(span, a.count, a.out + s * a.count);
  }
  if (pages < kParallelPages) threads = 1;
  const Scratch scratch(threads, bound_scratch_floats(group, a.k_dim));
  BoundPages* const bound = kernels(isa).bound_pages[static_cast<int>(a.dtype)];

#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (size_t i = 0; i < items.size(); ++i) {
    const Item& item = items[i];
    const BoundedPages& p = *item.source;
    const int64_t row = item.span / a.kv_heads, head = item.span % a.kv_heads;
    const int32_t* table =
        p.tables + row * p.tables_row_stride + head * p.tables_head_stride + item.begin;
    const int64_t first_q = row * a.q.token_stride + head * group * a.q.head_stride;
    bound({p.data, table, item.count, p.low_offset, p.high_offset,
           a.q.data + first_q * size_of(a.dtype), a.q.head_stride, group, a.k_dim,
           spans[item.span].bounds + item.first},
          scratch.mine());
    if (pending[item.span].fetch_sub(1, std::memory_order_acq_rel) == 1) {
      pick(spans[item.span], a.count, a.out + item.span * a.count);
    }
  }
}

}  // namespace tamis
