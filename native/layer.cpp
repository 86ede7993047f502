// One team of threads runs all of a call and waits between the stages: starting a team for each of
// a layer's matrices costs as much as reading a small one.

#include "layer.h"

#include <algorithm>
#include <memory>

#include "kernels.h"
#include "scratch.h"

namespace tamis {
namespace {

using Bytes = std::unique_ptr<uint8_t[]>;

// One thread's view of a team that shares the rows and outputs of every stage.
struct Member {
  const Kernels& kernels;
  DType dtype;
  int64_t rows;
  int index, count;
  float* scratch;

  int kind() const { return static_cast<int>(dtype); }
  int64_t size() const { return size_of(dtype); }

  // Calls each(begin, end) for this thread's share of `n` things, in units of `unit`.
  template <class Each>
  void share(int64_t n, int64_t unit, Each each) const {
    tamis::share(n, unit, index, count, each);
  }

  // This thread's outputs of y [rows, matrix.out] = x matrix, x [rows, in].
  void multiply(const Matrix& matrix, const void* x, int64_t in, void* y) const {
    const LinearArgs args{dtype,         rows,          in,          matrix.out, x, in,
                          matrix.weight, matrix.scales, matrix.bias, y};
    LinearRange* const range = linear_range_of(kernels, args);
    share(matrix.out, kOutputs,
          [&](int64_t begin, int64_t end) { range(args, begin, end, scratch); });
  }

  // This thread's rows of y = norm(x).
  void normalize(const RmsNorm& norm, const void* x, int64_t width, void* y) const {
    share(rows, 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t at = row * width * size();
        kernels.rms_norm_row[kind()](norm, static_cast<const uint8_t*>(x) + at, width,
                                     static_cast<uint8_t*>(y) + at);
      }
    });
  }

  // Calls each(row of x, row of y, width) for this thread's outputs of every row: those that
  // `multiply` has it compute for a matrix of `width` outputs.
  template <class Each>
  void own(const void* x, void* y, int64_t width, Each each) const {
    share(width, kOutputs, [&](int64_t begin, int64_t end) {
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t at = (row * width + begin) * size();
        each(static_cast<const uint8_t*>(x) + at, static_cast<uint8_t*>(y) + at, end - begin);
      }
    });
  }
};

// Run `work(member)` on a team; `depth` is the longest row that meets a matrix.
template <class Work>
void in_matrix_team(DType dtype, int64_t rows, int64_t depth, Isa isa, int threads, Work work) {
  const Kernels table = kernels(isa);
  const Scratch scratch(threads, linear_scratch_floats(rows, depth));
#pragma omp parallel num_threads(threads)
  work(Member{table, dtype, rows, thread_index(), team_size(), scratch.mine()});
}

// Norm and rotate this thread's rows of heads.
void place(const Member& member, const HeadsArgs& a) {
  const int64_t size = member.size();
  RmsNormRow* const normalize = member.kernels.rms_norm_row[member.kind()];
  RotateRow* const rotate = member.kernels.rotate_row[member.kind()];
  member.share(a.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * a.rotated * size;
      for (int64_t i = row * a.heads; i < (row + 1) * a.heads; ++i) {
        uint8_t* const head = static_cast<uint8_t*>(a.x) + i * a.dim * size;
        if (a.norm.weight != nullptr) normalize(a.norm, head, a.dim, head);
        rotate(head, static_cast<const uint8_t*>(a.cos) + at,
               static_cast<const uint8_t*>(a.sin) + at, a.rotated);
      }
    }
  });
}

// Below this many elements waking other threads costs more than they save.
constexpr int64_t kParallelElements = 1 << 15;

// Elements that a thread takes at least.
constexpr int64_t kElements = 1 << 10;

// The same as `in_matrix_team`, without matrices, for `elements` in all.
template <class Work>
void in_team(DType dtype, int64_t rows, int64_t elements, Isa isa, int threads, Work work) {
  const Kernels table = kernels(isa);
  if (elements < kParallelElements) threads = 1;
#pragma omp parallel num_threads(threads)
  work(Member{table, dtype, rows, thread_index(), team_size(), nullptr});
}

}  // namespace

void layer_inputs(const LayerInputs& a, Isa isa, int threads) {
  const Bytes normed(new uint8_t[a.rows * a.width * size_of(a.dtype)]);
  in_matrix_team(a.dtype, a.rows, a.width, isa, threads, [&](const Member& member) {
    member.normalize(a.norm, a.x, a.width, normed.get());
    wait_for_team();
    member.multiply(a.q, normed.get(), a.width, a.q_out);
    member.multiply(a.k, normed.get(), a.width, a.k_out);
    member.multiply(a.v, normed.get(), a.width, a.v_out);
    wait_for_team();
    place(member, {a.dtype, a.rows, a.q.out / a.k_dim, a.k_dim, a.rotated, a.q_out, a.q_norm,
                   a.cos, a.sin});
    place(member, {a.dtype, a.rows, a.k.out / a.k_dim, a.k_dim, a.rotated, a.k_out, a.k_norm,
                   a.cos, a.sin});
  });
}

void layer_outputs(const LayerOutputs& a, Isa isa, int threads) {
  const int64_t size = size_of(a.dtype);
  const Bytes sum(new uint8_t[a.rows * a.width * size]);  // what attention leaves
  const Bytes normed(new uint8_t[a.rows * a.width * size]);
  const Bytes gate(new uint8_t[a.rows * a.gate.out * size]);
  const Bytes up(new uint8_t[a.rows * a.up.out * size]);
  const int64_t depth = std::max({a.attended_width, a.width, a.gate.out});
  in_matrix_team(a.dtype, a.rows, depth, isa, threads, [&](const Member& member) {
    const int kind = member.kind();
    member.multiply(a.output, a.attended, a.attended_width, sum.get());
    member.own(a.x, sum.get(), a.width, member.kernels.add_row[kind]);
    wait_for_team();
    member.normalize(a.norm, sum.get(), a.width, normed.get());
    wait_for_team();
    member.multiply(a.gate, normed.get(), a.width, gate.get());
    member.multiply(a.up, normed.get(), a.width, up.get());
    member.own(up.get(), gate.get(), a.gate.out, [&](const void* x, void* y, int64_t width) {
      member.kernels.gate_row[kind](y, x, width);
    });
    wait_for_team();
    member.multiply(a.down, gate.get(), a.gate.out, a.y);
    member.own(sum.get(), a.y, a.width, member.kernels.add_row[kind]);
  });
}

void rms_norm(const RmsNormArgs& a, Isa isa, int threads) {
  in_team(a.dtype, a.rows, a.rows * a.width, isa, threads,
          [&](const Member& member) { member.normalize(a.norm, a.x, a.width, a.y); });
}

void place_heads(const HeadsArgs& a, Isa isa, int threads) {
  in_team(a.dtype, a.rows, a.rows * a.heads * a.dim, isa, threads,
          [&](const Member& member) { place(member, a); });
}

void gate(const GateArgs& a, Isa isa, int threads) {
  in_team(a.dtype, 1, a.n, isa, threads, [&](const Member& member) {
    member.share(a.n, kElements, [&](int64_t begin, int64_t end) {
      const int64_t at = begin * member.size();
      member.kernels.gate_row[member.kind()](static_cast<uint8_t*>(a.gate) + at,
                                             static_cast<const uint8_t*>(a.up) + at, end - begin);
    });
  });
}

}  // namespace tamis
