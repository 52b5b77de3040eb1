// types.hpp -- CUDA's types on the host.
#pragma once
#include <cstdint>

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };

using f32 = float;

// The upper half of a float; rounds to nearest, ties to even.
struct bf16 {
  uint16_t bits;
  bf16() = default;
  explicit bf16(float f) {
    uint32_t u = __builtin_bit_cast(uint32_t, f);
    bits = f != f ? uint16_t(0x7fff) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  explicit operator float() const { return __builtin_bit_cast(float, uint32_t(bits) << 16); }
};
