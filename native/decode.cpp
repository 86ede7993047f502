// The work of a decode call is cut into chunks of similar length, whatever heads they belong to, so
// that one long head among short ones leaves no core idle. Each chunk gives a partial attention;
// whoever computes the last chunk of a head merges the head's partials, in order, so threads wait
// for each other only at the end. Chunks depend on lengths alone, so the result is the same for
// any number of threads.

#include "decode.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "kernels.h"
#include "partials.h"
#include "scratch.h"

namespace tamis {
namespace {

// The most chunks that a thread takes in a row.
constexpr int64_t kRun = 8;

// Below this many bytes of keys and values waking other threads costs more than they save.
constexpr int64_t kParallelBytes = 1 << 16;

// The visible tokens of one KV head of one row.
struct Span {
  Pages pages;
  const int32_t* tokens;  // as in Range
  int64_t begin, end;
  int64_t first_chunk;

  int64_t chunk() const { return chunk_tokens(end - begin); }
  int64_t chunks() const { return (end - begin + chunk() - 1) / chunk(); }
};

// First token of `pages` in [0, end) at position `oldest` or later; positions ascend.
int64_t first_visible(const Pages& pages, int64_t offset, int64_t end, int64_t oldest,
                      int64_t window) {
  const auto visible = [&](int64_t token) {
    int32_t position;
    std::memcpy(&position, pages.row(token, offset, sizeof position), sizeof position);
    return position >= oldest;
  };
  int64_t low = 0, high = end;
  // A head that has dropped nothing sees exactly its last `window` tokens: try that first.
  const int64_t guess = end - window;
  if (guess > 0) {
    if (visible(guess)) {
      high = guess;
      if (!visible(guess - 1)) low = guess;
    } else {
      low = guess + 1;
    }
  }
  return first_from(pages, offset, low, high, oldest);
}

std::vector<Span> visible_spans(const DecodeArgs& a) {
  std::vector<Span> spans;
  spans.reserve(a.n * a.kv_heads);
  int64_t chunks = 0;
  for (int64_t row = 0; row < a.n; ++row) {
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      const int32_t* table = a.tables + row * a.tables_row_stride + head * a.tables_head_stride;
      Span span{{a.data, table, a.page_size}, nullptr, 0, 0, chunks};
      span.end = a.lengths[row * a.lengths_row_stride + head * a.lengths_head_stride];
      if (a.window > 0) {
        span.begin = first_visible(span.pages, a.position_offset, span.end,
                                   a.positions[row] - a.window + 1, a.window);
      }
      if (a.tokens != nullptr) {
        span.tokens = a.tokens + row * a.tokens_row_stride + head * a.tokens_head_stride;
        span.end = a.counts[row * a.kv_heads + head];
        const int32_t* const end = span.tokens + span.end;
        span.begin = std::lower_bound(span.tokens, end, span.begin) - span.tokens;
      }
      chunks += span.chunks();
      spans.push_back(span);
    }
  }
  return spans;
}

// Merge the partials of span `s` for every query of its group.
void merge_span(const DecodeArgs& a, const Span& span, const Partials& partials, int64_t s,
                float* sums) {
  const int64_t group = a.q_heads / a.kv_heads;
  const float* sinks = a.sinks ? a.sinks + s % a.kv_heads * group : nullptr;
  merge_partials({a.dtype, group, a.v_dim, a.out, a.lse}, partials, span.first_chunk,
                 span.first_chunk + span.chunks(), s * group, sinks, sums);
}

}  // namespace

void decode(const DecodeArgs& a, Isa isa, int threads) {
  const int64_t group = a.q_heads / a.kv_heads;
  const std::vector<Span> spans = visible_spans(a);
  const int64_t heads = static_cast<int64_t>(spans.size());

  std::vector<int64_t> span_of;  // of each chunk
  std::vector<std::atomic<int64_t>> pending(heads);  // chunks of each span
  int64_t tokens = 0;
  for (int64_t s = 0; s < heads; ++s) {
    span_of.insert(span_of.end(), spans[s].chunks(), s);
    pending[s].store(spans[s].chunks(), std::memory_order_relaxed);
    tokens += spans[s].end - spans[s].begin;
  }
  const int64_t chunks = static_cast<int64_t>(span_of.size());
  if (tokens * (a.k_dim + a.v_dim) * size_of(a.dtype) < kParallelBytes) threads = 1;

  const Partials partials(chunks, group, a.v_dim);
  const Scratch scratch(threads, scratch_floats(group, a.k_dim) + padded(a.v_dim));
  AttendRange* const attend = kernels(isa).attend_range[static_cast<int>(a.dtype)];
  for (int64_t s = 0; s < heads; ++s) {
    if (spans[s].chunks() == 0) merge_span(a, spans[s], partials, s, scratch.mine());
  }

  // A thread takes several chunks in a row, so that it can prefetch across their borders.
  const int64_t run = std::clamp(chunks / (8 * threads), int64_t{1}, kRun);
#pragma omp parallel for num_threads(threads) schedule(dynamic, run)
  for (int64_t c = 0; c < chunks; ++c) {
    float* const mine = scratch.mine();
    const int64_t s = span_of[c], row = s / a.kv_heads, head = s % a.kv_heads;
    const Span& span = spans[s];
    const int64_t begin = span.begin + (c - span.first_chunk) * span.chunk();
    const int64_t end = std::min(begin + span.chunk(), span.end);
    const bool ends_run = c % run == run - 1;
    const bool warm = c % run != 0 && c != span.first_chunk;
    const int64_t first_q = row * a.q_row_stride + head * group * a.q_head_stride;
    attend({span.pages, span.tokens, begin, end, ends_run ? end : span.end, warm, a.k_offset,
            a.v_offset, a.q + first_q * size_of(a.dtype), a.q_head_stride, group, a.k_dim, a.v_dim,
            a.scale, a.softcap},
           mine, partials.of(c));
    if (pending[s].fetch_sub(1, std::memory_order_acq_rel) == 1) {
      merge_span(a, span, partials, s, mine + scratch_floats(group, a.k_dim));
    }
  }
}

}  // namespace tamis
