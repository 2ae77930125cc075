// bfloat16 for a CPU: the functions of CUDA's header that csrc/ uses, and no conversion that is not spelt
// out.

#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
    uint16_t bits;
};

inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }

inline float __bfloat162float(__nv_bfloat16 x) {
    const uint32_t wide = uint32_t{x.bits} << 16;
    float out;
    memcpy(&out, &wide, 4);
    return out;
}

/// To the nearest, ties to even. Every NaN becomes 0x7fff, as on a GPU.
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    uint32_t wide;
    memcpy(&wide, &x, 4);
    if ((wide & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
    return {static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16)};
}

inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
