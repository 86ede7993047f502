// The kernel of quantize.h, written once over an instruction set `Isa` (isa_*.h). It rounds where
// attention/quantize.py does, so that codes, scales and zero-points are the same.
#pragma once

#include "quantize.h"
#include "rows_kernel.h"

namespace tamis {

template <class Isa, class T>
class QuantizeKernel {
  using Vec = typename Isa::Vec;
  using Math = RowMath<Isa, T>;
  static constexpr int kWidth = Isa::kWidth;

 public:
  QuantizeKernel(const QuantizeArgs& args, float* scratch)
      : a_(args),
        limit_(args.half == DType::fp16 ? 65504.0f : 0x1.fep127f),
        levels_(static_cast<float>((1 << args.bits) - 1)),
        zeros_(scratch),
        divisors_(scratch + args.dim),
        codes_(scratch + 2 * args.dim) {}

  void run(int64_t begin, int64_t end) {
    if (a_.along_tokens) {
      for (int64_t token = begin; token < end; token += a_.group) encode_tokens(token);
    } else {
      for (int64_t token = begin; token < end; ++token) {
        find_groups(token);
        encode(token);
      }
    }
  }

 private:
  const T* row(int64_t token) const { return static_cast<const T*>(a_.x) + token * a_.dim; }

  Vec clamped(Vec x) const {
    return Isa::min(Isa::max(x, Isa::set(-limit_)), Isa::set(limit_));
  }

  // Tokens whose channels are groups.
  void encode_tokens(int64_t first) {
    Math::each(a_.dim, [&](int64_t i, auto load, auto) {
      Vec low = clamped(load(row(first) + i)), high = low;
      for (int64_t token = first + 1; token < first + a_.group; ++token) {
        const Vec x = clamped(load(row(token) + i));
        low = Isa::min(low, x);
        high = Isa::max(high, x);
      }
      float lows[kWidth], highs[kWidth];
      Isa::store(lows, low);
      Isa::store(highs, high);
      const int64_t count = a_.dim - i < kWidth ? a_.dim - i : kWidth;
      const int64_t group = first / a_.group * a_.dim + i;
      for (int64_t lane = 0; lane < count; ++lane) {
        place(lows[lane], highs[lane], group + lane, i + lane, 1);
      }
    });
    for (int64_t token = first; token < first + a_.group; ++token) encode(token);
  }

  // The groups of channels of one token.
  void find_groups(int64_t token) {
    const int64_t groups = a_.dim / a_.group;
    for (int64_t group = 0; group < groups; ++group) {
      const T* const x = row(token) + group * a_.group;
      const float first = to_float(x[0]);
      Vec low = clamped(Isa::set(first)), high = low;
      Math::each(a_.group, [&](int64_t i, auto load, auto) {
        if (a_.group - i < kWidth) return;  // lanes beyond a row are zeros, which are none of it
        const Vec v = clamped(load(x + i));
        low = Isa::min(low, v);
        high = Isa::max(high, v);
      });
      for (int64_t i = a_.group / kWidth * kWidth; i < a_.group; ++i) {
        const Vec v = clamped(Isa::set(to_float(x[i])));
        low = Isa::min(low, v);
        high = Isa::max(high, v);
      }
      const float least = -Isa::max_lane(Isa::set(0.0f) - low);
      place(least, Isa::max_lane(high), token * groups + group, group * a_.group, a_.group);
    }
  }

  // Zero-point and scale of a group that spans low .. high, for `count` channels from `channel` on.
  void place(float low, float high, int64_t group, int64_t channel, int64_t count) {
    a_.zero[group] = neighbour(low, true);
    const float zero = widened(a_.zero[group]);
    a_.scale[group] = neighbour((high - zero) / levels_, false);
    const float scale = widened(a_.scale[group]);
    for (int64_t i = channel; i < channel + count; ++i) {
      zeros_[i] = zero;
      divisors_[i] = scale > 0.0f ? scale : 1.0f;  // 0 is that of equal numbers: code 0
    }
  }

  // `x` in the 16-bit type, rounded down or up.
  uint16_t neighbour(float x, bool down) const {
    return a_.half == DType::fp16 ? neighbour_of<Fp16>(x, down) : neighbour_of<Bf16>(x, down);
  }

  template <class Half>
  uint16_t neighbour_of(float x, bool down) const {
    Half nearest;
    from_float(x < -limit_ ? -limit_ : x > limit_ ? limit_ : x, &nearest);
    const float back = to_float(nearest);
    if (down ? !(back > x) : !(back < x)) return nearest.bits;
    // The bits of floats of one sign ascend like integers, away from zero.
    const bool away = down ? back <= 0.0f : back >= 0.0f;
    return static_cast<uint16_t>(away ? nearest.bits + 1 : nearest.bits - 1);
  }

  float widened(uint16_t bits) const {
    return a_.half == DType::fp16 ? to_float(Fp16{bits}) : to_float(Bf16{bits});
  }

  // The codes of one token, packed.
  void encode(int64_t token) {
    const Vec zero = Isa::set(0.0f), levels = Isa::set(levels_);
    Math::each(a_.dim, [&](int64_t i, auto load, auto) {
      const bool whole = a_.dim - i >= kWidth;
      const int64_t count = whole ? kWidth : a_.dim - i;
      const auto channels = [&](const float* from) {
        return whole ? Isa::load(from + i) : Isa::load(from + i, count);
      };
      const Vec steps = (clamped(load(row(token) + i)) - channels(zeros_)) / channels(divisors_);
      Isa::store(codes_ + i, Isa::round(Isa::min(Isa::max(steps, zero), levels)), count);
    });
    pack(a_.codes + token * words_of(a_.dim, a_.bits));
  }

  // Sums of shifted codes: words of 16 bits, which floats hold exactly.
  void pack(uint16_t* to) const {
    const int64_t words = words_of(a_.dim, a_.bits), planes = 16 / a_.bits;
    for (int64_t word = 0; word < words; word += kWidth) {
      Vec sum = Isa::set(0.0f);
      for (int64_t plane = 0; plane < planes; ++plane) {
        const Vec shift = Isa::set(static_cast<float>(int64_t{1} << plane * a_.bits));
        sum = Isa::fma(Isa::load(codes_ + plane * words + word), shift, sum);
      }
      float sums[kWidth];
      Isa::store(sums, sum);
      const int64_t count = words - word < kWidth ? words - word : kWidth;
      for (int64_t i = 0; i < count; ++i) {
        to[word + i] = static_cast<uint16_t>(static_cast<int32_t>(sums[i]));
      }
    }
  }

  const QuantizeArgs& a_;
  const float limit_, levels_;
  float *const zeros_, *const divisors_, *const codes_;
};

template <class Isa, class T>
void quantize_range(const QuantizeArgs& args, int64_t begin, int64_t end, float* scratch) {
  QuantizeKernel<Isa, T>(args, scratch).run(begin, end);
}

}  // namespace tamis
