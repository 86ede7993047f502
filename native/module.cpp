// The Python module tamis._native. Tensors come as addresses and strides, which torch hands out in
// nanoseconds; tamis.attention.native and tamis.cache.moves check them first.

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "append.h"
#include "cpu.h"
#include "decode.h"
#include "encoded.h"
#include "layer.h"
#include "linear.h"
#include "moves.h"
#include "narrow.h"
#include "nearest.h"
#include "observe.h"
#include "observe_pages.h"
#include "observe_tokens.h"
#include "prefill.h"
#include "quantize.h"
#include "rotate.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace tamis {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The instruction set called `name`; the best one for an empty name.
Isa isa_named(const std::string& name) {
  if (name.empty()) return best_isa();
  for (int i = 0; i < kIsas; ++i) {
    if (name == kIsaNames[i] && runs(static_cast<Isa>(i))) return static_cast<Isa>(i);
  }
  throw std::invalid_argument("this machine does not run the instruction set " + name);
}

void decode_call(const std::string& isa, int threads, int dtype, int64_t n, int64_t q_heads,
                 int64_t kv_heads, int64_t k_dim, int64_t v_dim, uintptr_t q, int64_t q_row_stride,
                 int64_t q_head_stride, uintptr_t data, int64_t page_size, int64_t k_offset,
                 int64_t v_offset, int64_t position_offset, uintptr_t tables,
                 int64_t tables_row_stride, int64_t tables_head_stride, uintptr_t lengths,
                 int64_t lengths_row_stride, int64_t lengths_head_stride, uintptr_t tokens,
                 int64_t tokens_row_stride, int64_t tokens_head_stride, uintptr_t counts,
                 uintptr_t positions, int64_t window, float scale, float softcap, uintptr_t sinks,
                 uintptr_t out, uintptr_t lse) {
  const DecodeArgs args{static_cast<DType>(dtype),
                        n,
                        q_heads,
                        kv_heads,
                        k_dim,
                        v_dim,
                        at<const uint8_t>(q),
                        q_row_stride,
                        q_head_stride,
                        at<const uint8_t>(data),
                        page_size,
                        k_offset,
                        v_offset,
                        position_offset,
                        at<const int32_t>(tables),
                        tables_row_stride,
                        tables_head_stride,
                        at<const int32_t>(lengths),
                        lengths_row_stride,
                        lengths_head_stride,
                        at<const int32_t>(tokens),
                        tokens_row_stride,
                        tokens_head_stride,
                        at<const int32_t>(counts),
                        at<const int64_t>(positions),
                        window,
                        scale,
                        softcap,
                        at<const float>(sinks),
                        at<void>(out),
                        at<float>(lse)};
  const Isa chosen = isa_named(isa);
  nb::gil_scoped_release release;
  decode(args, chosen, threads);
}

// The keys or values of encoded pages from the numbers of `_Side` in attention/encoded_native.py.
Side side_of(const std::vector<int64_t>& n) {
  return {static_cast<Rows>(n[0]), static_cast<DType>(n[1]), n[2],  n[3],  n[4],  n[5],
          n[6],                    n[7],                     n[8],  n[9],  n[10], n[11],
          n[12],                   n[13],                    n[14], n[15], n[16] != 0};
}

void decode_encoded_call(const std::string& isa, int threads, int dtype, int64_t n,
                         int64_t q_heads, int64_t kv_heads, uintptr_t q, int64_t q_row_stride,
                         int64_t q_head_stride, uintptr_t data, int64_t page_size,
                         int64_t page_bytes, const std::vector<int64_t>& k,
                         const std::vector<int64_t>& v, uintptr_t tables,
                         int64_t tables_row_stride, int64_t tables_head_stride, uintptr_t lengths,
                         int64_t lengths_row_stride, int64_t lengths_head_stride, float scale,
                         float softcap, uintptr_t out, uintptr_t lse) {
  const EncodedArgs args{static_cast<DType>(dtype),
                         n,
                         q_heads,
                         kv_heads,
                         at<const uint8_t>(q),
                         q_row_stride,
                         q_head_stride,
                         at<const uint8_t>(data),
                         page_size,
                         page_bytes,
                         side_of(k),
                         side_of(v),
                         at<const int32_t>(tables),
                         tables_row_stride,
                         tables_head_stride,
                         at<const int32_t>(lengths),
                         lengths_row_stride,
                         lengths_head_stride,
                         scale,
                         softcap,
                         at<float>(out),
                         at<float>(lse)};
  const Isa chosen = isa_named(isa);
  nb::gil_scoped_release release;
  decode_encoded(args, chosen, threads);
}

void prefill_call(const std::string& isa, int threads, int dtype, int64_t tokens, int64_t q_heads,
                  int64_t kv_heads, int64_t k_dim, int64_t v_dim, uintptr_t q,
                  int64_t q_token_stride, int64_t q_head_stride, uintptr_t k,
                  int64_t k_token_stride, int64_t k_head_stride, uintptr_t v,
                  int64_t v_token_stride, int64_t v_head_stride, uintptr_t data, int64_t page_size,
                  int64_t k_offset, int64_t v_offset, int64_t position_offset, uintptr_t tables,
                  int64_t tables_head_stride, uintptr_t lengths, int64_t lengths_head_stride,
                  uintptr_t positions, int64_t window, bool own, float scale, float softcap,
                  uintptr_t sinks, int64_t pattern_block, int64_t pattern_q_blocks,
                  uintptr_t pattern_block_starts, uintptr_t pattern_blocks,
                  uintptr_t pattern_column_starts, uintptr_t pattern_columns,
                  uintptr_t pattern_window, uintptr_t pattern_full, uintptr_t out, uintptr_t lse) {
  const PrefillArgs args{static_cast<DType>(dtype),
                         tokens,
                         q_heads,
                         kv_heads,
                         k_dim,
                         v_dim,
                         {at<const uint8_t>(q), q_token_stride, q_head_stride},
                         {at<const uint8_t>(k), k_token_stride, k_head_stride},
                         {at<const uint8_t>(v), v_token_stride, v_head_stride},
                         at<const uint8_t>(data),
                         page_size,
                         k_offset,
                         v_offset,
                         position_offset,
                         at<const int32_t>(tables),
                         tables_head_stride,
                         at<const int32_t>(lengths),
                         lengths_head_stride,
                         at<const int64_t>(positions),
                         window,
                         own,
                         scale,
                         softcap,
                         at<const float>(sinks),
                         {pattern_block, pattern_q_blocks, at<const int32_t>(pattern_block_starts),
                          at<const int32_t>(pattern_blocks),
                          at<const int32_t>(pattern_column_starts),
                          at<const int32_t>(pattern_columns), at<const int32_t>(pattern_window),
                          at<const uint8_t>(pattern_full)},
                         at<void>(out),
                         at<float>(lse)};
  const Isa chosen = isa_named(isa);
  nb::gil_scoped_release release;
  prefill(args, chosen, threads);
}

void append_call(int threads, uintptr_t data, int64_t page_size, uintptr_t tables,
                 int64_t tables_row_stride, int64_t tables_head_stride, uintptr_t lengths,
                 int64_t lengths_row_stride, int64_t lengths_head_stride, uintptr_t starts,
                 int64_t n, int64_t kv_heads, uintptr_t k, int64_t k_token_stride,
                 int64_t k_head_stride, int64_t k_row_bytes, int64_t k_offset, uintptr_t v,
                 int64_t v_token_stride, int64_t v_head_stride, int64_t v_row_bytes,
                 int64_t v_offset, uintptr_t positions, int64_t position_offset) {
  const AppendArgs args{
      at<uint8_t>(data),
      page_size,
      at<const int32_t>(tables),
      tables_row_stride,
      tables_head_stride,
      at<const int32_t>(lengths),
      lengths_row_stride,
      lengths_head_stride,
      at<const int64_t>(starts),
      n,
      kv_heads,
      {at<const uint8_t>(k), k_token_stride, k_head_stride, k_row_bytes, k_offset},
      {at<const uint8_t>(v), v_token_stride, v_head_stride, v_row_bytes, v_offset},
      {at<const uint8_t>(positions), sizeof(int32_t), 0, sizeof(int32_t), position_offset}};
  nb::gil_scoped_release release;
  append(args, threads);
}

// Page ids or rows at `address`; std::out_of_range, Python's IndexError, unless all of them lie
// within 0 .. limit - 1.
const int32_t* indices(uintptr_t address, int64_t n, int64_t limit) {
  if (!within(at<const int32_t>(address), n, limit)) {
    throw std::out_of_range("a page or row lies outside of 0 .. " + std::to_string(limit - 1));
  }
  return at<const int32_t>(address);
}

void move_tokens_call(int threads, uintptr_t data, int64_t page_ids, int64_t page_size, int64_t n,
                      uintptr_t source_pages, uintptr_t source_rows, uintptr_t target_pages,
                      uintptr_t target_rows,
                      const std::vector<std::pair<int64_t, int64_t>>& fields, bool at_once) {
  MoveArgs args{at<uint8_t>(data),
                n,
                {indices(source_pages, n, page_ids), indices(source_rows, n, page_size)},
                {indices(target_pages, n, page_ids), indices(target_rows, n, page_size)},
                {},
                at_once};
  for (const auto& [offset, row_bytes] : fields) args.fields.push_back({offset, row_bytes});
  nb::gil_scoped_release release;
  move_tokens(args, threads);
}

// Runs with page ids below `limit`, or one after the other where there are none.
Runs runs_at(uintptr_t base, uintptr_t pages, int64_t n, int64_t limit) {
  return {at<uint8_t>(base), pages != 0 ? indices(pages, n, limit) : nullptr};
}

void copy_runs_call(int threads, int64_t n, int64_t bytes, uintptr_t source,
                    uintptr_t source_pages, int64_t source_ids, uintptr_t target,
                    uintptr_t target_pages, int64_t target_ids) {
  const Runs from = runs_at(source, source_pages, n, source_ids);
  const Runs to = runs_at(target, target_pages, n, target_ids);
  nb::gil_scoped_release release;
  copy_runs(from, to, n, bytes, threads);
}

void quantize_call(const std::string& isa, int threads, int dtype, int half, bool along_tokens,
                   int64_t tokens, int64_t dim, int64_t group, int64_t bits, uintptr_t x,
                   uintptr_t codes, uintptr_t scale, uintptr_t zero) {
  const QuantizeArgs args{static_cast<DType>(dtype),
                          static_cast<DType>(half),
                          along_tokens,
                          tokens,
                          dim,
                          group,
                          bits,
                          at<const void>(x),
                          at<uint16_t>(codes),
                          at<uint16_t>(scale),
                          at<uint16_t>(zero)};
  const Isa chosen = isa_named(isa);
  nb::gil_scoped_release release;
  quantize(args, chosen, threads);
}

void rotate_keys_call(const std::string& isa, int threads, int dtype, int64_t rows,
                      int64_t tokens, int64_t dim, int64_t pairs, bool interleaved, uintptr_t k,
                      uintptr_t cos, uintptr_t sin, uintptr_t angle, uintptr_t out) {
  const RotateArgs args{static_cast<DType>(dtype),
                        rows,
                        tokens,
                        dim,
                        pairs,
                        interleaved,
                        at<const void>(k),
                        at<const float>(cos),
                        at<const float>(sin),
                        at<const int64_t>(angle),
                        at<void>(out)};
  const Isa chosen = isa_named(isa);
  nb::gil_scoped_release release;
  rotate_keys(args, chosen, threads);
}

void nearest_call(const std::string& isa, int threads, int dtype, int64_t n, int64_t among,
                  int64_t dim, uintptr_t keys, uintptr_t others, uintptr_t key_scales,
                  uintptr_t other_scales, uintptr_t similarity, uintptr_t index) {
  const NearestArgs args{static_cast<DType>(dtype),
                         n,
                         among,
                         dim,
                         at<const void>(keys),
                         at<const void>(others),
                         at<const float>(key_scales),
                         at<const float>(other_scales),
                         at<float>(similarity),
                         at<int64_t>(index)};
  const Isa chosen = isa_named(isa);
  nb::gil_scoped_release release;
  nearest(args, chosen, threads);
}

void observe_call(const std::string& isa, int threads, bool chunk, int dtype, int64_t n,
                  int64_t q_heads, int64_t kv_heads, int64_t k_dim, uintptr_t q,
                  int64_t q_row_stride, int64_t q_head_stride, uintptr_t data, int64_t page_size,
                  int64_t k_offset, int64_t position_offset, uintptr_t tables,
                  int64_t tables_row_stride, int64_t tables_head_stride, uintptr_t lengths,
                  int64_t lengths_row_stride, int64_t lengths_head_stride, uintptr_t positions,
                  int64_t window, float scale, float softcap, uintptr_t lse, uintptr_t out,
                  int64_t width) {
  const ObserveArgs args{static_cast<DType>(dtype),
                         n,
                         q_heads,
                         kv_heads,
                         k_dim,
                         {at<const uint8_t>(q), q_row_stride, q_head_stride},
                         at<const uint8_t>(data),
                         page_size,
                         k_offset,
                         position_offset,
                         at<const int32_t>(tables),
                         tables_row_stride,
                         tables_head_stride,
                         at<const int32_t>(lengths),
                         lengths_row_stride,
                         lengths_head_stride,
                         at<const int64_t>(positions),
                         window,
                         scale,
                         softcap,
                         at<const float>(lse),
                         at<float>(out),
                         width};
  const Isa chosen = isa_named(isa);
  nb::gil_scoped_release release;
  (chunk ? observe_chunk : observe_decode)(args, chosen, threads);
}

// Pages with bounds, as (data, page_size, low_offset, high_offset, tables, row and head stride,
// lengths, row and head stride); no pages for an empty tuple.
BoundedPages bounded_pages(const nb::tuple& pages) {
  if (pages.size() == 0) return {};
  const auto number = [&](int i) { return nb::cast<int64_t>(pages[i]); };
  const auto address = [&](int i) { return nb::cast<uintptr_t>(pages[i]); };
  return {at<const uint8_t>(address(0)),
          number(1),
          number(2),
          number(3),
          at<const int32_t>(address(4)),
          number(5),
          number(6),
          at<const int32_t>(address(7)),
          number(8),
          number(9)};
}

void top_pages_call(const std::string& isa, int threads, int dtype, int64_t n, int64_t q_heads,
                    int64_t kv_heads, int64_t k_dim, uintptr_t q, int64_t q_row_stride,
                    int64_t q_head_stride, const nb::tuple& before, const nb::tuple& pages,
                    int64_t count, uintptr_t out) {
  const TopPagesArgs args{static_cast<DType>(dtype),
                          n,
                          q_heads,
                          kv_heads,
                          k_dim,
                          {at<const uint8_t>(q), q_row_stride, q_head_stride},
                          bounded_pages(before),
                          bounded_pages(pages),
                          count,
                          at<int64_t>(out)};
  const Isa chosen = isa_named(isa);
  nb::gil_scoped_release release;
  top_pages(args, chosen, threads);
}

void softmax_tokens_call(const std::string& isa, int threads, int64_t n, int64_t q_heads,
                         int64_t kv_heads, int64_t width, uintptr_t scores, uintptr_t lengths,
                         int64_t lengths_row_stride, int64_t lengths_head_stride, int64_t first,
                         int64_t last, uintptr_t divisors) {
  const SoftmaxArgs args{n,
                         q_heads,
                         kv_heads,
                         width,
                         at<float>(scores),
                         at<const int32_t>(lengths),
                         lengths_row_stride,
                         lengths_head_stride,
                         first,
                         last,
                         at<const float>(divisors)};
  const Isa chosen = isa_named(isa);
  nb::gil_scoped_release release;
  softmax_tokens(args, chosen, threads);
}

void top_tokens_call(int threads, int64_t rows, int64_t width, int64_t row_stride,
                     uintptr_t values, uintptr_t lengths, int64_t first, int64_t last,
                     int64_t count, uintptr_t out) {
  const TopTokensArgs args{rows, width, row_stride, at<const float>(values),
                           at<const int64_t>(lengths), first, last, count, at<int64_t>(out)};
  nb::gil_scoped_release release;
  top_tokens(args, threads);
}

void narrow_call(int64_t n, int64_t kv_heads, int64_t page_size, uintptr_t tables,
                 int64_t tables_row_stride, int64_t tables_head_stride, uintptr_t lengths,
                 int64_t lengths_row_stride, int64_t lengths_head_stride, uintptr_t chosen,
                 int64_t chosen_row_stride, int64_t chosen_head_stride, int64_t count,
                 uintptr_t before, uintptr_t out_tables, uintptr_t out_lengths) {
  narrow({n, kv_heads, page_size, at<const int32_t>(tables), tables_row_stride,
          tables_head_stride, at<const int32_t>(lengths), lengths_row_stride, lengths_head_stride,
          at<const int64_t>(chosen), chosen_row_stride, chosen_head_stride, count,
          at<const int64_t>(before), at<int32_t>(out_tables), at<int32_t>(out_lengths)});
}

void linear_call(const std::string& isa, int threads, int dtype, int64_t rows, int64_t in,
                 int64_t out, uintptr_t x, int64_t x_stride, uintptr_t weight, uintptr_t scales,
                 uintptr_t bias, uintptr_t y) {
  const LinearArgs args{static_cast<DType>(dtype), rows,
                        in,                        out,
                        at<const void>(x),         x_stride,
                        at<const void>(weight),    at<const float>(scales),
                        at<const void>(bias),      at<void>(y)};
  const Isa chosen = isa_named(isa);
  nb::gil_scoped_release release;
  linear(args, chosen, threads);
}

// A norm as (weight, epsilon, style), with a weight of 0 for none.
RmsNorm norm_of(const nb::tuple& norm) {
  return {at<const void>(nb::cast<uintptr_t>(norm[0])), nb::cast<float>(norm[1]),
          static_cast<RmsStyle>(nb::cast<int>(norm[2]))};
}

void rms_norm_call(const std::string& isa, int threads, int dtype, int64_t rows, int64_t width,
                   uintptr_t x, const nb::tuple& norm, uintptr_t y) {
  const RmsNormArgs args{static_cast<DType>(dtype), rows, width, at<const void>(x), norm_of(norm),
                         at<void>(y)};
  const Isa chosen = isa_named(isa);
  nb::gil_scoped_release release;
  rms_norm(args, chosen, threads);
}

void place_heads_call(const std::string& isa, int threads, int dtype, int64_t rows, int64_t heads,
                      int64_t dim, int64_t rotated, uintptr_t x, const nb::tuple& norm,
                      uintptr_t cos, uintptr_t sin) {
  const HeadsArgs args{static_cast<DType>(dtype), rows,          heads,
                       dim,                       rotated,       at<void>(x),
                       norm_of(norm),             at<const void>(cos), at<const void>(sin)};
  const Isa chosen = isa_named(isa);
  nb::gil_scoped_release release;
  place_heads(args, chosen, threads);
}

void gate_call(const std::string& isa, int threads, int dtype, int64_t n, uintptr_t gates,
               uintptr_t ups) {
  const GateArgs args{static_cast<DType>(dtype), n, at<void>(gates), at<const void>(ups)};
  const Isa chosen = isa_named(isa);
  nb::gil_scoped_release release;
  gate(args, chosen, threads);
}

// A matrix as (weight, bias, out, scales), with 0 for no bias and no scales.
Matrix matrix_of(const nb::tuple& matrix) {
  return {at<const void>(nb::cast<uintptr_t>(matrix[0])),
          at<const void>(nb::cast<uintptr_t>(matrix[1])), nb::cast<int64_t>(matrix[2]),
          at<const float>(nb::cast<uintptr_t>(matrix[3]))};
}

void layer_inputs_call(const std::string& isa, int threads, int dtype, int64_t rows, int64_t width,
                       uintptr_t x, const nb::tuple& norm, const nb::tuple& q, const nb::tuple& k,
                       const nb::tuple& v, int64_t k_dim, int64_t rotated, const nb::tuple& q_norm,
                       const nb::tuple& k_norm, uintptr_t cos, uintptr_t sin, uintptr_t q_out,
                       uintptr_t k_out, uintptr_t v_out) {
  const LayerInputs args{static_cast<DType>(dtype),
                         rows,
                         width,
                         at<const void>(x),
                         norm_of(norm),
                         matrix_of(q),
                         matrix_of(k),
                         matrix_of(v),
                         k_dim,
                         rotated,
                         norm_of(q_norm),
                         norm_of(k_norm),
                         at<const void>(cos),
                         at<const void>(sin),
                         at<void>(q_out),
                         at<void>(k_out),
                         at<void>(v_out)};
  const Isa chosen = isa_named(isa);
  nb::gil_scoped_release release;
  layer_inputs(args, chosen, threads);
}

void layer_outputs_call(const std::string& isa, int threads, int dtype, int64_t rows,
                        int64_t width, uintptr_t x, uintptr_t attended, int64_t attended_width,
                        const nb::tuple& output, const nb::tuple& norm, const nb::tuple& gate,
                        const nb::tuple& up, const nb::tuple& down, uintptr_t y) {
  const LayerOutputs args{static_cast<DType>(dtype),
                          rows,
                          width,
                          at<const void>(x),
                          at<const void>(attended),
                          attended_width,
                          matrix_of(output),
                          norm_of(norm),
                          matrix_of(gate),
                          matrix_of(up),
                          matrix_of(down),
                          at<void>(y)};
  const Isa chosen = isa_named(isa);
  nb::gil_scoped_release release;
  layer_outputs(args, chosen, threads);
}

nb::dict cpu_features_dict() {
  const CpuFeatures found = cpu_features();
  nb::dict features;
  features["avx2"] = found.avx2;
  features["avx512"] = found.avx512;
  features["avx512_bf16"] = found.avx512_bf16;
  features["avx512_vnni"] = found.avx512_vnni;
  features["amx"] = found.amx;
  return features;
}

nb::list isas() {
  nb::list names;
  for (int i = 0; i < kIsas; ++i) {
    if (runs(static_cast<Isa>(i))) names.append(kIsaNames[i]);
  }
  return names;
}

}  // namespace
}  // namespace tamis

NB_MODULE(_native, m) {
  m.doc() = "tamis's kernels for the CPU.";
  m.def("cpu_features", tamis::cpu_features_dict, "Features of the processor, by name.");
  m.def("isas", tamis::isas,
        "Instruction sets that this machine runs, from the least to the most demanding; a build "
        "for tests has an emulated one last.");
  m.def("decode", tamis::decode_call, "isa"_a, "threads"_a, "dtype"_a, "n"_a, "q_heads"_a,
        "kv_heads"_a, "k_dim"_a, "v_dim"_a, "q"_a, "q_row_stride"_a, "q_head_stride"_a, "data"_a,
        "page_size"_a, "k_offset"_a, "v_offset"_a, "position_offset"_a, "tables"_a,
        "tables_row_stride"_a, "tables_head_stride"_a, "lengths"_a, "lengths_row_stride"_a,
        "lengths_head_stride"_a, "tokens"_a, "tokens_row_stride"_a, "tokens_head_stride"_a,
        "counts"_a, "positions"_a, "window"_a, "scale"_a, "softcap"_a, "sinks"_a, "out"_a, "lse"_a,
        "Paged decode attention; see decode.h.");
  m.def("decode_encoded", tamis::decode_encoded_call, "isa"_a, "threads"_a, "dtype"_a, "n"_a,
        "q_heads"_a, "kv_heads"_a, "q"_a, "q_row_stride"_a, "q_head_stride"_a, "data"_a,
        "page_size"_a, "page_bytes"_a, "k"_a, "v"_a, "tables"_a, "tables_row_stride"_a,
        "tables_head_stride"_a, "lengths"_a, "lengths_row_stride"_a, "lengths_head_stride"_a,
        "scale"_a, "softcap"_a, "out"_a, "lse"_a, "Attention over encoded pages; see encoded.h.");
  m.def("prefill", tamis::prefill_call, "isa"_a, "threads"_a, "dtype"_a, "tokens"_a, "q_heads"_a,
        "kv_heads"_a, "k_dim"_a, "v_dim"_a, "q"_a, "q_token_stride"_a, "q_head_stride"_a, "k"_a,
        "k_token_stride"_a, "k_head_stride"_a, "v"_a, "v_token_stride"_a, "v_head_stride"_a,
        "data"_a, "page_size"_a, "k_offset"_a, "v_offset"_a, "position_offset"_a, "tables"_a,
        "tables_head_stride"_a, "lengths"_a, "lengths_head_stride"_a, "positions"_a, "window"_a,
        "own"_a, "scale"_a, "softcap"_a, "sinks"_a, "pattern_block"_a, "pattern_q_blocks"_a,
        "pattern_block_starts"_a, "pattern_blocks"_a, "pattern_column_starts"_a,
        "pattern_columns"_a, "pattern_window"_a, "pattern_full"_a, "out"_a, "lse"_a,
        "Attention of a chunk; see prefill.h.");
  m.def("observe", tamis::observe_call, "isa"_a, "threads"_a, "chunk"_a, "dtype"_a, "n"_a,
        "q_heads"_a, "kv_heads"_a, "k_dim"_a, "q"_a, "q_row_stride"_a, "q_head_stride"_a, "data"_a,
        "page_size"_a, "k_offset"_a, "position_offset"_a, "tables"_a, "tables_row_stride"_a,
        "tables_head_stride"_a, "lengths"_a, "lengths_row_stride"_a, "lengths_head_stride"_a,
        "positions"_a, "window"_a, "scale"_a, "softcap"_a, "lse"_a, "out"_a, "width"_a,
        "Scores or weights of cached tokens; see observe.h.");
  m.def("top_pages", tamis::top_pages_call, "isa"_a, "threads"_a, "dtype"_a, "n"_a, "q_heads"_a,
        "kv_heads"_a, "k_dim"_a, "q"_a, "q_row_stride"_a, "q_head_stride"_a, "before"_a, "pages"_a,
        "count"_a, "out"_a, "Pages of largest bounds; see observe_pages.h.");
  m.def("softmax_tokens", tamis::softmax_tokens_call, "isa"_a, "threads"_a, "n"_a, "q_heads"_a,
        "kv_heads"_a, "width"_a, "scores"_a, "lengths"_a, "lengths_row_stride"_a,
        "lengths_head_stride"_a, "first"_a, "last"_a, "divisors"_a,
        "Softmax over cached tokens; see observe_tokens.h.");
  m.def("top_tokens", tamis::top_tokens_call, "threads"_a, "rows"_a, "width"_a, "row_stride"_a,
        "values"_a, "lengths"_a, "first"_a, "last"_a, "count"_a, "out"_a,
        "Tokens of largest value; see observe_tokens.h.");
  m.def("narrow", tamis::narrow_call, "n"_a, "kv_heads"_a, "page_size"_a, "tables"_a,
        "tables_row_stride"_a, "tables_head_stride"_a, "lengths"_a, "lengths_row_stride"_a,
        "lengths_head_stride"_a, "chosen"_a, "chosen_row_stride"_a, "chosen_head_stride"_a,
        "count"_a, "before"_a, "out_tables"_a, "out_lengths"_a,
        "Page tables cut down to some pages; see narrow.h.");
  m.def("linear", tamis::linear_call, "isa"_a, "threads"_a, "dtype"_a, "rows"_a, "in"_a, "out"_a,
        "x"_a, "x_stride"_a, "weight"_a, "scales"_a, "bias"_a, "y"_a,
        "A linear layer; see linear.h.");
  m.def("rms_norm", tamis::rms_norm_call, "isa"_a, "threads"_a, "dtype"_a, "rows"_a, "width"_a,
        "x"_a, "norm"_a, "y"_a, "Root mean square norm; see layer.h.");
  m.def("place_heads", tamis::place_heads_call, "isa"_a, "threads"_a, "dtype"_a, "rows"_a,
        "heads"_a, "dim"_a, "rotated"_a, "x"_a, "norm"_a, "cos"_a, "sin"_a,
        "Heads normed and turned by RoPE; see layer.h.");
  m.def("gate", tamis::gate_call, "isa"_a, "threads"_a, "dtype"_a, "n"_a, "gates"_a, "ups"_a,
        "A gated activation; see layer.h.");
  m.def("layer_inputs", tamis::layer_inputs_call, "isa"_a, "threads"_a, "dtype"_a, "rows"_a,
        "width"_a, "x"_a, "norm"_a, "q"_a, "k"_a, "v"_a, "k_dim"_a, "rotated"_a, "q_norm"_a,
        "k_norm"_a, "cos"_a, "sin"_a, "q_out"_a, "k_out"_a, "v_out"_a,
        "Queries, keys and values of a decoder layer; see layer.h.");
  m.def("layer_outputs", tamis::layer_outputs_call, "isa"_a, "threads"_a, "dtype"_a, "rows"_a,
        "width"_a, "x"_a, "attended"_a, "attended_width"_a, "output"_a, "norm"_a, "gate"_a, "up"_a,
        "down"_a, "y"_a, "A decoder layer after its attention; see layer.h.");
  m.def("append", tamis::append_call, "threads"_a, "data"_a, "page_size"_a, "tables"_a,
        "tables_row_stride"_a, "tables_head_stride"_a, "lengths"_a, "lengths_row_stride"_a,
        "lengths_head_stride"_a, "starts"_a, "n"_a, "kv_heads"_a, "k"_a, "k_token_stride"_a,
        "k_head_stride"_a, "k_row_bytes"_a, "k_offset"_a, "v"_a, "v_token_stride"_a,
        "v_head_stride"_a, "v_row_bytes"_a, "v_offset"_a, "positions"_a, "position_offset"_a,
        "Write new tokens to pages; see append.h.");
  m.def("move_tokens", tamis::move_tokens_call, "threads"_a, "data"_a, "page_ids"_a, "page_size"_a,
        "n"_a, "source_pages"_a, "source_rows"_a, "target_pages"_a, "target_rows"_a, "fields"_a,
        "at_once"_a, "Copy tokens between pages; see moves.h.");
  m.def("copy_runs", tamis::copy_runs_call, "threads"_a, "n"_a, "bytes"_a, "source"_a,
        "source_pages"_a, "source_ids"_a, "target"_a, "target_pages"_a, "target_ids"_a,
        "Copy runs of bytes between pages and tensors; see moves.h.");
  m.def("quantize", tamis::quantize_call, "isa"_a, "threads"_a, "dtype"_a, "half"_a,
        "along_tokens"_a, "tokens"_a, "dim"_a, "group"_a, "bits"_a, "x"_a, "codes"_a, "scale"_a,
        "zero"_a, "Groups of numbers in few bits; see quantize.h.");
  m.def("rotate_keys", tamis::rotate_keys_call, "isa"_a, "threads"_a, "dtype"_a, "rows"_a,
        "tokens"_a, "dim"_a, "pairs"_a, "interleaved"_a, "k"_a, "cos"_a, "sin"_a, "angle"_a,
        "out"_a, "Keys turned further by RoPE; see rotate.h.");
  m.def("nearest", tamis::nearest_call, "isa"_a, "threads"_a, "dtype"_a, "n"_a, "among"_a, "dim"_a,
        "keys"_a, "others"_a, "key_scales"_a, "other_scales"_a, "similarity"_a, "index"_a,
        "Most similar keys; see nearest.h.");
}
