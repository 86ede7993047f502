// Decode over encoded pages is cut into chunks of pages of one head, as decode.cpp is into chunks
// of tokens: they depend on lengths alone, and a head's partial attentions are merged in order.

#include "encoded.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <vector>

#include "encoded_scratch.h"
#include "kernels.h"
#include "partials.h"
#include "scratch.h"

namespace tamis {
namespace {

// Below this many tokens waking other threads costs more than they save.
constexpr int64_t kParallelTokens = 256;

// The pages of one KV head of one row.
struct Span {
  const int32_t* table;
  int64_t pages;
  int64_t chunk_pages, first_chunk, chunks;
};

// Pages per chunk of a head of so many tokens.
int64_t chunk_pages_of(int64_t tokens, int64_t page_size) {
  const int64_t chunk = chunk_tokens(tokens);
  return chunk > page_size ? chunk / page_size : 1;
}

std::vector<Span> spans_of(const EncodedArgs& a) {
  std::vector<Span> spans;
  spans.reserve(a.n * a.kv_heads);
  int64_t chunks = 0;
  for (int64_t row = 0; row < a.n; ++row) {
    for (int64_t head = 0; head < a.kv_heads; ++head) {
      const int64_t tokens = a.lengths[row * a.lengths_row_stride + head * a.lengths_head_stride];
      if (tokens % a.page_size != 0) {
        throw std::invalid_argument("encoded pages must be whole, but a head has " +
                                    std::to_string(tokens) + " tokens in pages of " +
                                    std::to_string(a.page_size));
      }
      Span span{a.tables + row * a.tables_row_stride + head * a.tables_head_stride,
                tokens / a.page_size, chunk_pages_of(tokens, a.page_size), chunks, 0};
      span.chunks = (span.pages + span.chunk_pages - 1) / span.chunk_pages;
      chunks += span.chunks;
      spans.push_back(span);
    }
  }
  return spans;
}

// Bytes of the vectors of an instruction set.
int64_t vector_bytes(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return 16;
    case Isa::avx2:
      return 32;
    default:
      return 64;
  }
}

}  // namespace

void decode_encoded(const EncodedArgs& a, Isa isa, int threads) {
  const int64_t group = a.q_heads / a.kv_heads;
  const std::vector<Span> spans = spans_of(a);
  const int64_t heads = static_cast<int64_t>(spans.size());

  std::vector<int64_t> span_of;  // of each chunk
  std::vector<std::atomic<int64_t>> pending(heads);  // chunks of each span
  int64_t pages = 0;
  for (int64_t s = 0; s < heads; ++s) {
    span_of.insert(span_of.end(), spans[s].chunks, s);
    pending[s].store(spans[s].chunks, std::memory_order_relaxed);
    pages += spans[s].pages;
  }
  const int64_t chunks = static_cast<int64_t>(span_of.size());
  if (pages * a.page_size < kParallelTokens) threads = 1;

  EncodedRange range{a.data, nullptr, 0,         0,          a.page_size, a.page_bytes,
                     a.k,    a.v,     nullptr,   a.dtype,    a.q_head_stride,
                     group,  a.scale, a.softcap};
  EncodedScratch parts;
  const int64_t kernel_floats = carve(range, vector_bytes(isa), nullptr, &parts);
  const Scratch scratch(threads, kernel_floats + padded(a.v.dim));
  const Partials partials(chunks, group, a.v.dim);
  const MergeTarget target{DType::fp32, group, a.v.dim, a.out, a.lse};
  const auto merge = [&](int64_t s, float* sums) {
    const Span& span = spans[s];
    merge_partials(target, partials, span.first_chunk, span.first_chunk + span.chunks, s * group,
                   nullptr, sums);
  };
  for (int64_t s = 0; s < heads; ++s) {
    if (spans[s].chunks == 0) merge(s, scratch.mine());
  }

  AttendEncoded* const attend = kernels(isa).attend_encoded;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) firstprivate(range)
  for (int64_t c = 0; c < chunks; ++c) {
    float* const mine = scratch.mine();
    const int64_t s = span_of[c], row = s / a.kv_heads, head = s % a.kv_heads;
    const Span& span = spans[s];
    range.table = span.table;
    range.begin = (c - span.first_chunk) * span.chunk_pages;
    range.end = std::min(range.begin + span.chunk_pages, span.pages);
    range.q = a.q + (row * a.q_row_stride + head * group * a.q_head_stride) * size_of(a.dtype);
    attend(range, mine, partials.of(c));
    if (pending[s].fetch_sub(1, std::memory_order_acq_rel) == 1) merge(s, mine + kernel_floats);
  }
}

}  // namespace tamis
