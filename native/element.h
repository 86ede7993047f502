// The element types of queries, keys, values and outputs.
//
// Everything here has internal linkage: this header is compiled once per instruction set, and the
// linker must not replace the portable copy of a function by one with newer instructions.
#pragma once

#include <cstdint>
#include <cstring>

namespace tamis {

struct Bf16 {
  uint16_t bits;
};

struct Fp16 {
  uint16_t bits;
};

// Quantized: bf16 and fp16 hold every value exactly.
struct Int8 {
  int8_t value;
};

enum class DType { fp32, fp16, bf16 };

namespace {

// Bytes of one element.
[[maybe_unused]] inline int64_t size_of(DType dtype) { return dtype == DType::fp32 ? 4 : 2; }

[[maybe_unused]] inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

[[maybe_unused]] inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

[[maybe_unused]] inline float to_float(float value) { return value; }

[[maybe_unused]] inline float to_float(Bf16 value) { return as_float(uint32_t{value.bits} << 16); }

[[maybe_unused]] inline float to_float(Fp16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = uint32_t{value.bits & 0x7fffu} << 13;
  // The exponent is rebased by a multiplication, which is right for subnormal numbers too.
  const float rebased = as_float(magnitude) * 0x1p112f;
  const bool special = (value.bits & 0x7c00u) == 0x7c00u;  // infinity or NaN
  return as_float(sign | (special ? magnitude | 0x7f800000u : as_bits(rebased)));
}

[[maybe_unused]] inline float to_float(Int8 value) { return value.value; }

[[maybe_unused]] inline void from_float(float value, float* out) { *out = value; }

[[maybe_unused]] inline void from_float(float value, Bf16* out) {
  const uint32_t bits = as_bits(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
  out->bits = static_cast<uint16_t>((nan ? bits | 0x400000u : rounded) >> 16);
}

[[maybe_unused]] inline void from_float(float value, Fp16* out) {
  const uint32_t bits = as_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // rounds to infinity
  } else if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 aligns the mantissa's last bit to 2^-24 and rounds in hardware.
    half = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace
}  // namespace tamis
