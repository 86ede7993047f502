// Bound by memory, and by its latency where rows lie scattered: lines are asked for ahead.

#include "moves.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>

#include "pages.h"
#include "threads.h"

namespace tamis {
namespace {

// Below this many bytes waking other threads costs more than they save.
constexpr int64_t kParallelBytes = 1 << 17;
// What is read before any of it is written: stays in a core's cache in between.
constexpr int64_t kStagedBytes = 1 << 18;
constexpr int64_t kLine = 64;
constexpr int64_t kAhead = 12;  // rows that are asked for before they are read

// A copy of `Bytes` bytes, or of `bytes` where Bytes is 0.
template <int64_t Bytes>
void copy_row(uint8_t* to, const uint8_t* from, int64_t bytes) {
  std::memcpy(to, from, Bytes ? Bytes : bytes);
}

template <int64_t Bytes>
void read_rows(const MoveArgs& a, const RowField& field, int64_t first, int64_t count,
               uint8_t* to) {
  const auto row = [&](int64_t i) {
    return a.data + a.source.pages[i] * kUnit + field.offset + a.source.rows[i] * field.row_bytes;
  };
  for (int64_t i = first; i < first + count; ++i, to += field.row_bytes) {
    const uint8_t* const next = row(std::min(i + kAhead, first + count - 1));
    for (int64_t at = 0; at < field.row_bytes; at += kLine) __builtin_prefetch(next + at);
    copy_row<Bytes>(to, row(i), field.row_bytes);
  }
}

template <int64_t Bytes>
void write_rows(const MoveArgs& a, const RowField& field, int64_t first, int64_t count,
                const uint8_t* from) {
  for (int64_t i = first; i < first + count; ++i, from += field.row_bytes) {
    uint8_t* const page = a.data + a.target.pages[i] * kUnit;
    copy_row<Bytes>(page + field.offset + a.target.rows[i] * field.row_bytes, from,
                    field.row_bytes);
  }
}

// Calls copy(constant), where the constant is `bytes` if rows often have so many, else 0: copies of
// few bytes are quicker where the compiler knows how many.
template <class Copy>
void with_bytes(int64_t bytes, Copy copy) {
  switch (bytes) {
    case 4:
      return copy(std::integral_constant<int64_t, 4>());
    case 128:
      return copy(std::integral_constant<int64_t, 128>());
    case 256:
      return copy(std::integral_constant<int64_t, 256>());
    default:
      return copy(std::integral_constant<int64_t, 0>());
  }
}

}  // namespace

void move_tokens(const MoveArgs& a, int threads) {
  int64_t token_bytes = 0;
  for (const RowField& field : a.fields) token_bytes += field.row_bytes;
  if (a.n == 0 || token_bytes == 0) return;
  if (a.n * token_bytes < kParallelBytes) threads = 1;
  const int64_t piece =
      a.at_once ? a.n : std::min(a.n, std::max<int64_t>(1, threads * kStagedBytes / token_bytes));
  const std::unique_ptr<uint8_t[]> staged(new uint8_t[piece * token_bytes]);
  // Calls each(constant, field, first, count, rows) for this thread's share of a piece.
  const auto share_piece = [&](int64_t first, int64_t count, auto each) {
    share(count, 1, thread_index(), team_size(), [&](int64_t begin, int64_t end) {
      uint8_t* of_field = staged.get();
      for (const RowField& field : a.fields) {
        uint8_t* const rows = of_field + begin * field.row_bytes;
        with_bytes(field.row_bytes, [&](auto bytes) {
          each(bytes, field, first + begin, end - begin, rows);
        });
        of_field += piece * field.row_bytes;
      }
    });
  };

#pragma omp parallel num_threads(threads)
  for (int64_t first = 0; first < a.n; first += piece) {
    const int64_t count = std::min(piece, a.n - first);
    share_piece(first, count, [&](auto bytes, const RowField& field, int64_t begin, int64_t n,
                                  uint8_t* rows) {
      read_rows<decltype(bytes)::value>(a, field, begin, n, rows);
    });
    wait_for_team();
    share_piece(first, count, [&](auto bytes, const RowField& field, int64_t begin, int64_t n,
                                  const uint8_t* rows) {
      write_rows<decltype(bytes)::value>(a, field, begin, n, rows);
    });
    wait_for_team();
  }
}

void copy_runs(const Runs& source, const Runs& target, int64_t n, int64_t bytes, int threads) {
  if (n * bytes < kParallelBytes) threads = 1;
  const auto run = [bytes](const Runs& runs, int64_t i) {
    return runs.base + (runs.pages != nullptr ? runs.pages[i] * kUnit : i * bytes);
  };
#pragma omp parallel num_threads(threads)
  share(n, 1, thread_index(), team_size(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::memcpy(run(target, i), run(source, i), bytes);
  });
}

bool within(const int32_t* numbers, int64_t n, int64_t limit) {
  bool inside = true;
  for (int64_t i = 0; i < n; ++i) inside &= numbers[i] >= 0 && numbers[i] < limit;
  return inside;
}

}  // namespace tamis
